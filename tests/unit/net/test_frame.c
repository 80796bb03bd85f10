/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include <xxhash.h>

#include "base/bytes.h"
#include "net/frame.h"
#include "tests/suite.h"

#define TIMEOUT_MS 2000

static struct conn *tx, *rx;

static void open_pair(void)
{
	int fds[2];

	ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
	ck_assert_int_eq(conn_from_fd(fds[0], &tx, NULL), 0);
	ck_assert_int_eq(conn_from_fd(fds[1], &rx, NULL), 0);
}

static void close_pair(void)
{
	conn_close(tx);
	conn_close(rx);
}

START_TEST(test_json_round_trip)
{
	json_t *json = json_pack("{s:s, s:i}", "name", "vm\xc3\xa9", "cpus", 2);
	struct frame f;
	struct error err = ERROR_INIT;

	ck_assert_int_eq(frame_send_json(tx, FRAME_HELLO, 7, json, TIMEOUT_MS, &err), 0);
	ck_assert_int_eq(frame_send_json(tx, FRAME_BEAT, 8, NULL, TIMEOUT_MS, &err), 0);
	ck_assert_msg(frame_read(rx, TIMEOUT_MS, &f, &err) == 0, "%s", err.message);
	ck_assert_int_eq(f.type, FRAME_HELLO);
	ck_assert_uint_eq(f.epoch, 7);
	ck_assert(json_equal(f.json, json));
	frame_release(&f);
	ck_assert_int_eq(frame_read(rx, TIMEOUT_MS, &f, &err), 0);
	ck_assert_int_eq(f.type, FRAME_BEAT);
	ck_assert_uint_eq(json_object_size(f.json), 0);
	ck_assert_str_eq((char *)f.payload, "{}");
	frame_release(&f);
	frame_release(&f);
	json_decref(json);
}
END_TEST

static void *send_state(void *arg)
{
	frame_send_bytes(tx, FRAME_DEVICE_STATE, 3, arg, 5u << 20, TIMEOUT_MS, NULL);
	return NULL;
}

START_TEST(test_device_state_round_trip)
{
	uint8_t *blob = malloc(5u << 20);
	pthread_t thread;
	struct frame f;

	for (size_t i = 0; i < 5u << 20; i++)
		blob[i] = (uint8_t)(i * 31 >> 3);
	pthread_create(&thread, NULL, send_state, blob);
	ck_assert_int_eq(frame_read(rx, TIMEOUT_MS, &f, NULL), 0);
	pthread_join(thread, NULL);
	ck_assert_uint_eq(f.len, 5u << 20);
	ck_assert(f.json == NULL);
	ck_assert_int_eq(memcmp(f.payload, blob, f.len), 0);
	frame_release(&f);
	free(blob);
}
END_TEST

static const uint8_t good[FRAME_HEADER_BYTES] = {'S', 'N', 'M', 'C', 0, FRAME_BEAT, 0, 0, 0, 0,
						 0,   0,   0,	0,   0, 9,	    0, 0, 0, 2};

static const struct {
	unsigned at;
	uint8_t value;
	const char *mention;
} spoils[] = {
	{0, 'X', "magic"},	{3, 0, "magic"},
	{5, 0, "unknown type"}, {5, FRAME_VERIFIED + 1, "unknown type"},
	{4, 1, "unknown type"}, {6, 1, "flags"},
	{7, 1, "flags"},	{16, 1, "at most"},
	{16, 0xff, "at most"},
};

START_TEST(test_header_decode_table)
{
	struct frame_header h;
	struct error err = ERROR_INIT;
	uint8_t raw[FRAME_HEADER_BYTES], again[FRAME_HEADER_BYTES];

	memcpy(raw, good, sizeof raw);
	ck_assert_int_eq(frame_header_decode(raw, &h, &err), 0);
	ck_assert_uint_eq(h.type, FRAME_BEAT);
	ck_assert_uint_eq(h.epoch, 9);
	ck_assert_uint_eq(h.len, 2);
	frame_header_encode(again, &h);
	ck_assert_int_eq(memcmp(raw, again, sizeof raw), 0);
	raw[spoils[_i].at] = spoils[_i].value;
	ck_assert_int_eq(frame_header_decode(raw, &h, &err), -EPROTO);
	ck_assert_msg(strstr(err.message, spoils[_i].mention) != NULL, "%s", err.message);
}
END_TEST

START_TEST(test_length_limit_is_by_type)
{
	struct frame_header h = {.type = FRAME_DEVICE_STATE, .len = FRAME_STATE_MAX_BYTES}, out;
	uint8_t raw[FRAME_HEADER_BYTES];

	frame_header_encode(raw, &h);
	ck_assert_int_eq(frame_header_decode(raw, &out, NULL), 0);
	h.len++;
	frame_header_encode(raw, &h);
	ck_assert_int_eq(frame_header_decode(raw, &out, NULL), -EPROTO);
	h = (struct frame_header){.type = FRAME_FILE, .len = FRAME_FILE_MAX_BYTES};
	frame_header_encode(raw, &h);
	ck_assert_int_eq(frame_header_decode(raw, &out, NULL), 0);
	h.len++;
	frame_header_encode(raw, &h);
	ck_assert_int_eq(frame_header_decode(raw, &out, NULL), -EPROTO);
	h = (struct frame_header){.type = FRAME_HELLO, .len = FRAME_JSON_MAX_BYTES};
	frame_header_encode(raw, &h);
	ck_assert_int_eq(frame_header_decode(raw, &out, NULL), 0);
	h.len++;
	frame_header_encode(raw, &h);
	ck_assert_int_eq(frame_header_decode(raw, &out, NULL), -EPROTO);
}
END_TEST

static int send_raw(const char *payload, bool spoil, struct frame *f, struct error *err)
{
	struct frame_header h = {.type = FRAME_HELLO,
				 .len = (uint32_t)strlen(payload),
				 .checksum = XXH3_64bits(payload, strlen(payload)) ^ spoil};
	uint8_t raw[FRAME_HEADER_BYTES];

	frame_header_encode(raw, &h);
	ck_assert_int_eq(conn_write_full(tx, raw, sizeof raw, TIMEOUT_MS, NULL), 0);
	ck_assert_int_eq(conn_write_full(tx, payload, strlen(payload), TIMEOUT_MS, NULL), 0);
	return frame_read(rx, TIMEOUT_MS, f, err);
}

START_TEST(test_bad_payloads)
{
	static const char *const bad[] = {"",
					  "[]",
					  "{",
					  "{} x",
					  "\"x\"",
					  "{\"a\":1,\"a\":2}",
					  "{\"a\":\xff}",
					  "{\"\xff\":1}",
					  "{\"a\":\"\\u0000\"}"};
	struct frame f;
	struct error err = ERROR_INIT;

	ck_assert_int_eq(send_raw(bad[_i], false, &f, &err), -EPROTO);
	ck_assert_msg(strstr(err.message, "control frame hello") != NULL, "%s", err.message);
	ck_assert(f.payload == NULL && f.json == NULL);
}
END_TEST

START_TEST(test_bad_checksum)
{
	struct frame f;
	struct error err = ERROR_INIT;

	ck_assert_int_eq(send_raw("{}", true, &f, &err), -EPROTO);
	ck_assert(strstr(err.message, "checksum") != NULL);
}
END_TEST

START_TEST(test_ends)
{
	struct frame f;

	ck_assert_int_eq(conn_write_full(tx, good, sizeof good, TIMEOUT_MS, NULL), 0);
	ck_assert_int_eq(frame_read(rx, 50, &f, NULL), -ETIMEDOUT);
	close_pair();
	open_pair();
	ck_assert_int_eq(conn_write_full(tx, good, sizeof good, TIMEOUT_MS, NULL), 0);
	conn_shutdown(tx);
	ck_assert_int_eq(frame_read(rx, TIMEOUT_MS, &f, NULL), -ECONNRESET);
	close_pair();
	open_pair();
	conn_shutdown(tx);
	ck_assert_int_eq(frame_read(rx, TIMEOUT_MS, &f, NULL), -ENODATA);
}
END_TEST

START_TEST(test_what_cannot_be_sent)
{
	json_t *array = json_array();

	ck_assert_int_eq(frame_send_json(tx, FRAME_HELLO, 1, array, TIMEOUT_MS, NULL), -EINVAL);
	ck_assert_int_eq(frame_send_json(tx, FRAME_DEVICE_STATE, 1, NULL, TIMEOUT_MS, NULL), -EINVAL);
	ck_assert_int_eq(frame_send_bytes(tx, (enum frame_type)99, 1, "", 0, TIMEOUT_MS, NULL), -EINVAL);
	json_decref(array);
}
END_TEST

START_TEST(test_binary_types_and_their_limits)
{
	static const unsigned types[] = {FRAME_HASH_ASK, FRAME_HASHES, FRAME_SUMS};
	for (unsigned i = 0; i < sizeof types / sizeof *types; i++) {
		struct frame_header h = {.type = (uint16_t)types[i], .len = FRAME_HASHES_MAX_BYTES}, got;
		uint8_t raw[FRAME_HEADER_BYTES];
		ck_assert(!frame_type_is_json(types[i]));
		frame_header_encode(raw, &h);
		ck_assert_int_eq(frame_header_decode(raw, &got, NULL), 0);
		h.len++;
		frame_header_encode(raw, &h);
		ck_assert_int_eq(frame_header_decode(raw, &got, NULL), -EPROTO);
	}
	ck_assert(frame_type_is_json(FRAME_HELLO));
	struct frame_header h = {.type = FRAME_PROBE, .len = FRAME_PROBE_MAX_BYTES + 1}, got;
	uint8_t raw[FRAME_HEADER_BYTES];
	ck_assert(!frame_type_is_json(FRAME_PROBE) && frame_type_is_json(FRAME_CHECK) &&
		  frame_type_is_json(FRAME_FACTS));
	ck_assert(!frame_type_is_json(FRAME_VERIFY) && frame_type_is_json(FRAME_VERIFIED));
	frame_header_encode(raw, &h);
	ck_assert_int_eq(frame_header_decode(raw, &got, NULL), -EPROTO);
}
END_TEST

START_TEST(test_names)
{
	ck_assert_str_eq(frame_type_name(FRAME_RENEW), "renew");
	for (unsigned t = FRAME_HELLO; t <= FRAME_VERIFIED; t++)
		ck_assert_str_ne(frame_type_name(t), "unknown");
	ck_assert_str_eq(frame_type_name(0), "unknown");
	ck_assert_str_eq(frame_type_name(FRAME_VERIFIED + 1), "unknown");
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("frame");
	TCase *tc = tcase_create("frame");

	tcase_add_checked_fixture(tc, open_pair, close_pair);
	tcase_add_test(tc, test_json_round_trip);
	tcase_add_test(tc, test_device_state_round_trip);
	tcase_add_loop_test(tc, test_header_decode_table, 0, (int)(sizeof spoils / sizeof spoils[0]));
	tcase_add_test(tc, test_length_limit_is_by_type);
	tcase_add_loop_test(tc, test_bad_payloads, 0, 9);
	tcase_add_test(tc, test_bad_checksum);
	tcase_add_test(tc, test_ends);
	tcase_add_test(tc, test_what_cannot_be_sent);
	tcase_add_test(tc, test_binary_types_and_their_limits);
	tcase_add_test(tc, test_names);
	suite_add_tcase(suite, tc);
	return suite_run(suite);
}
