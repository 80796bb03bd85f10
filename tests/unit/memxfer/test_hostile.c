/* SPDX-License-Identifier: Apache-2.0 */
/* A receiver against a source that sends well-checksummed nonsense, and a sender against such a destination.
 */
#include <zstd.h>

#include "memxfer/codec.h"
#include "memxfer/delta.h"
#include "tests/suite.h"
#include "tests/unit/memxfer/harness.h"

#define NPAGES 1500u
#define EPOCH  7u

static struct mem_space space;
static struct mem_receiver *receiver;
static struct conn *a[2], *b[2];
static uint64_t sequence[2];

static void receiver_open_with(bool deltas)
{
	struct mem_receiver_options opt = {
		.streams = b, .nstreams = 2, .timeout_ms = 2000, .epoch = EPOCH, .deltas = deltas};
	struct error err = ERROR_INIT;

	space = space_create(NPAGES);
	connect_streams(false, 2, a, b);
	opt.space = space;
	sequence[0] = sequence[1] = 0;
	ck_assert_int_eq(mem_receiver_start(&opt, &receiver, &err), 0);
}

static void receiver_open(void)
{
	receiver_open_with(false);
}

static void receiver_open_deltas(void)
{
	receiver_open_with(true);
}

static void receiver_close(void)
{
	mem_receiver_free(receiver);
	close_streams(2, a);
	close_streams(2, b);
	space_check_guard(&space);
	space_free(&space);
}

static void send_frame(unsigned stream, struct mem_header h, const struct mem_run *runs, const void *payload)
{
	static uint8_t raw[MEM_HEADER_BYTES + MEM_BODY_MAX];
	uint8_t *body = raw + MEM_HEADER_BYTES;
	size_t runs_len = h.nruns * MEM_RUN_BYTES;

	for (uint32_t i = 0; i < h.nruns; i++)
		mem_run_encode(body + i * MEM_RUN_BYTES, &runs[i]);
	if (h.wire_len)
		memcpy(body + runs_len, payload, h.wire_len);
	if (!h.epoch)
		h.epoch = EPOCH;
	if (!h.stream)
		h.stream = (uint16_t)stream;
	h.sequence += sequence[stream]++;
	h.body_sum ^= mem_body_sum(body, runs_len, body + runs_len, h.wire_len);
	mem_header_encode(raw, &h);
	(void)conn_write_full(a[stream], raw, MEM_HEADER_BYTES + runs_len + h.wire_len, 2000, NULL);
}

static uint8_t page[2 * MEM_PAGE_BYTES];

static void send_data(unsigned stream, uint64_t first, unsigned flags)
{
	struct mem_run run = {first, 1, MEM_RUN_DATA};
	struct mem_header h = {.type = MEM_FRAME_PAGES,
			       .flags = (uint16_t)flags,
			       .nruns = 1,
			       .raw_len = MEM_PAGE_BYTES,
			       .wire_len = MEM_PAGE_BYTES};

	memset(page, 'x', sizeof page);
	send_frame(stream, h, &run, page);
}

static void send_control(unsigned stream, enum mem_frame_type type)
{
	send_frame(stream, (struct mem_header){.type = (uint16_t)type}, NULL, NULL);
}

static void send_end(unsigned stream, struct mem_totals t)
{
	uint8_t raw[MEM_TOTALS_BYTES];

	mem_totals_encode(raw, &t);
	send_frame(stream,
		   (struct mem_header){.type = MEM_FRAME_END, .raw_len = sizeof raw, .wire_len = sizeof raw},
		   NULL, raw);
}

/* The reply stream of `stream` up to an ERROR frame, whose sentence comes back. */
static const char *error_sentence(unsigned stream)
{
	static char text[MEM_SENTENCE_MAX + 1];
	uint8_t raw[MEM_HEADER_BYTES];
	struct mem_header h;

	for (;;) {
		ck_assert_int_eq(conn_read_full(a[stream], raw, sizeof raw, 2000, NULL), 0);
		ck_assert_int_eq(mem_header_decode(raw, &h, NULL), 0);
		ck_assert_int_eq(conn_read_full(a[stream], text, h.wire_len, 2000, NULL), 0);
		text[h.wire_len] = '\0';
		if (h.type == MEM_FRAME_ERROR)
			return text;
	}
}

/* At most so many pages were written, none of them outside. */
static void expect_failure_within(unsigned stream, int code, const char *mention, uint64_t pages)
{
	struct error err = ERROR_INIT;
	const char *sentence = error_sentence(stream);

	ck_assert_int_eq(mem_receiver_wait(receiver, &err), code);
	ck_assert_msg(strstr(err.message, mention) != NULL, "\"%s\" does not mention %s", err.message,
		      mention);
	ck_assert_msg(strstr(sentence, mention) != NULL, "\"%s\" does not mention %s", sentence, mention);
	ck_assert_uint_le(space_populated(&space, NULL), pages);
}

static void expect_failure(unsigned stream, int code, const char *mention)
{
	expect_failure_within(stream, code, mention, 0);
}

static const struct {
	struct mem_run run[2];
	unsigned stream, nruns, flags, raw_pages;
	const char *mention;
} tables[] = {
	{{{NPAGES, 1, MEM_RUN_DATA}}, 0, 1, 0, 1, "outside"},
	{{{NPAGES - 1, 2, MEM_RUN_DATA}}, 0, 1, 0, 2, "outside"},
	{{{UINT64_MAX, 2, MEM_RUN_DATA}}, 0, 1, 0, 2, "outside"},
	{{{UINT64_MAX / MEM_PAGE_BYTES, 1, MEM_RUN_DATA}}, 0, 1, 0, 1, "outside"},
	{{{0, UINT32_MAX, MEM_RUN_ZERO}}, 0, 1, 0, 0, "outside"},
	{{{511, 2, MEM_RUN_DATA}}, 0, 1, 0, 2, "crosses"},
	{{{0, 1, MEM_RUN_DATA}}, 1, 1, 0, 1, "belongs to stream 0"},
	{{{0, 1, 9}}, 0, 1, 0, 0, "unknown kind"},
	/* The first run is good and must not be written either. */
	{{{0, 1, MEM_RUN_DATA}, {NPAGES, 1, MEM_RUN_DATA}}, 0, 2, 0, 2, "outside"},
	{{{0, 1, MEM_RUN_DATA}, {1, 2, MEM_RUN_DATA}}, 0, 2, 0, 2, "data pages but"},
	/* A page twice, or backwards. */
	{{{5, 1, MEM_RUN_DATA}, {5, 1, MEM_RUN_ZERO}}, 0, 2, 0, 1, "does not follow on"},
	{{{5, 2, MEM_RUN_HOLE}, {6, 1, MEM_RUN_DATA}}, 0, 2, 0, 1, "does not follow on"},
	{{{6, 1, MEM_RUN_DATA}, {5, 1, MEM_RUN_DATA}}, 0, 2, 0, 2, "does not follow on"},
	{{{0, 1, MEM_RUN_DATA}}, 0, 1, MEM_FLAG_FINAL, 1, "before the barrier"},
	{{{0, 2, MEM_RUN_DATA}}, 0, 1, MEM_FLAG_ZSTD, 2, "unpacking"},
};

START_TEST(test_bad_run_tables)
{
	struct mem_header h = {.type = MEM_FRAME_PAGES,
			       .flags = (uint16_t)tables[_i].flags,
			       .nruns = tables[_i].nruns,
			       .raw_len = tables[_i].raw_pages * MEM_PAGE_BYTES};

	h.wire_len = h.flags & MEM_FLAG_ZSTD ? 100 : h.raw_len;
	memset(page, 'x', sizeof page);
	send_frame(tables[_i].stream, h, tables[_i].run, page);
	expect_failure(tables[_i].stream, -EPROTO, tables[_i].mention);
}
END_TEST

/* Packed data that unpack to less or more than the runs say. */
START_TEST(test_packed_length_lies)
{
	static uint8_t raw[4 * MEM_PAGE_BYTES];
	uint8_t packed[1000];
	struct mem_run run = {0, 2, MEM_RUN_DATA};
	struct mem_header h = {
		.type = MEM_FRAME_PAGES, .flags = MEM_FLAG_ZSTD, .nruns = 1, .raw_len = 2 * MEM_PAGE_BYTES};
	size_t n = ZSTD_compress(packed, sizeof packed, raw, (_i ? 4 : 1) * MEM_PAGE_BYTES, 1);

	ck_assert(!ZSTD_isError(n));
	h.wire_len = (uint32_t)n;
	send_frame(0, h, &run, packed);
	expect_failure_within(0, -EPROTO, _i ? "unpacking" : "unpacks to 4096 bytes", 2);
}
END_TEST

START_TEST(test_wrong_epoch)
{
	send_frame(0, (struct mem_header){.type = MEM_FRAME_BEAT, .epoch = EPOCH + 1}, NULL, NULL);
	expect_failure(0, -EPROTO, "epoch 8, this is 7");
}
END_TEST

START_TEST(test_wrong_stream)
{
	send_frame(0, (struct mem_header){.type = MEM_FRAME_BEAT, .stream = 1}, NULL, NULL);
	expect_failure(0, -EPROTO, "of stream 1");
}
END_TEST

START_TEST(test_wrong_sequence)
{
	send_frame(0, (struct mem_header){.type = MEM_FRAME_BEAT, .sequence = 1}, NULL, NULL);
	expect_failure(0, -EPROTO, "number 1 where 0 was due");
}
END_TEST

START_TEST(test_wrong_body_checksum)
{
	struct mem_run run = {0, 1, MEM_RUN_HOLE};

	send_frame(0, (struct mem_header){.type = MEM_FRAME_PAGES, .nruns = 1, .body_sum = 1}, &run, NULL);
	expect_failure(0, -EBADMSG, "checksum");
}
END_TEST

/* Bytes that are not what was sent land in the pages of their frame and nowhere else. */
START_TEST(test_wrong_page_checksum)
{
	static const struct mem_run runs[3] = {
		{3, 1, MEM_RUN_DATA}, {4, 2, MEM_RUN_ZERO}, {9, 1, MEM_RUN_DATA}};
	struct mem_header h = {.type = MEM_FRAME_PAGES,
			       .nruns = _i ? 3 : 1,
			       .raw_len = (_i ? 2 : 1) * MEM_PAGE_BYTES,
			       .body_sum = 1};
	uint64_t map[BITMAP_WORDS(NPAGES)] = {0};

	h.wire_len = h.raw_len;
	memset(page, 'x', sizeof page);
	send_frame(0, h, runs, page);
	expect_failure_within(0, -EBADMSG, "pages, number 0: checksum", 2);
	space_populated(&space, map);
	bitmap_clear(map, 3);
	bitmap_clear(map, 9);
	ck_assert_uint_eq(bitmap_count(map, NPAGES), 0);
}
END_TEST

START_TEST(test_end_within_pages)
{
	struct mem_run run = {0, 2, MEM_RUN_DATA};
	struct mem_header h = {.type = MEM_FRAME_PAGES,
			       .epoch = EPOCH,
			       .nruns = 1,
			       .raw_len = sizeof page,
			       .wire_len = sizeof page};
	uint8_t raw[MEM_HEADER_BYTES + MEM_RUN_BYTES];
	struct error err = ERROR_INIT;

	mem_run_encode(raw + MEM_HEADER_BYTES, &run);
	mem_header_encode(raw, &h);
	ck_assert_int_eq(conn_write_full(a[0], raw, sizeof raw, 1000, NULL), 0);
	ck_assert_int_eq(conn_write_full(a[0], page, _i * MEM_PAGE_BYTES / 2 * 3, 1000, NULL), 0);
	conn_shutdown(a[0]);
	ck_assert_int_eq(mem_receiver_wait(receiver, &err), -ECONNRESET);
	ck_assert_msg(strstr(err.message, "in the middle") != NULL, "%s", err.message);
	ck_assert_uint_le(space_populated(&space, NULL), 2);
}
END_TEST

/* Pages far apart, more pieces than one system call takes, and next to each other, packed and not. */
START_TEST(test_scattered_pages)
{
	static uint8_t raw[100 * MEM_PAGE_BYTES], packed[ZSTD_COMPRESSBOUND(sizeof raw)];
	static struct mem_run runs[100];
	struct mem_header h = {
		.type = MEM_FRAME_PAGES, .nruns = 100, .raw_len = sizeof raw, .wire_len = sizeof raw};
	uint64_t *words = (uint64_t *)raw;

	for (unsigned i = 0; i < sizeof raw / 8; i++)
		words[i] = i % 2 ? 7 : i * UINT64_C(0x9e3779b97f4a7c15);
	for (unsigned i = 0; i < 100; i++)
		runs[i] = (struct mem_run){i < 50 ? i : 3 * i, 1, MEM_RUN_DATA};
	if (_i) {
		h.flags = MEM_FLAG_ZSTD;
		h.wire_len = (uint32_t)ZSTD_compress(packed, sizeof packed, raw, sizeof raw, 1);
		ck_assert_uint_lt(h.wire_len, h.raw_len);
	}
	send_frame(0, h, runs, _i ? packed : raw);
	send_control(0, MEM_FRAME_BARRIER);
	send_control(1, MEM_FRAME_BARRIER);
	send_end(0, (struct mem_totals){.frames = 2, .data_pages = 100});
	send_end(1, (struct mem_totals){.frames = 1});
	ck_assert_int_eq(mem_receiver_wait(receiver, NULL), 0);
	ck_assert_uint_eq(space_populated(&space, NULL), 100);
	for (unsigned i = 0; i < 100; i++)
		ck_assert_mem_eq(space.base + runs[i].first * MEM_PAGE_BYTES,
				 raw + (size_t)i * MEM_PAGE_BYTES, MEM_PAGE_BYTES);
}
END_TEST

START_TEST(test_frames_out_of_place)
{
	static const struct {
		enum mem_frame_type first, second;
		const char *mention;
	} t[] = {
		{MEM_FRAME_ACK, 0, "not the source's to send"},
		{MEM_FRAME_ERROR, 0, "not the source's to send"},
		{MEM_FRAME_END, 0, "without a barrier"},
		{MEM_FRAME_BARRIER, MEM_FRAME_BARRIER, "second barrier"},
		{MEM_FRAME_BARRIER, MEM_FRAME_PAGES, "belongs before"},
	};

	if (t[_i].first == MEM_FRAME_BARRIER)
		send_control(1, MEM_FRAME_BARRIER);
	if (t[_i].first == MEM_FRAME_END)
		send_end(0, (struct mem_totals){0});
	else
		send_control(0, t[_i].first);
	if (t[_i].second == MEM_FRAME_PAGES)
		send_data(0, 0, 0);
	else if (t[_i].second)
		send_control(0, t[_i].second);
	expect_failure(0, -EPROTO, t[_i].mention);
}
END_TEST

START_TEST(test_totals_must_agree)
{
	send_control(0, MEM_FRAME_BARRIER);
	send_control(1, MEM_FRAME_BARRIER);
	send_end(0, (struct mem_totals){.frames = 1, .data_pages = 1});
	expect_failure(0, -EPROTO, "counted 1 data");
}
END_TEST

/* A final frame that overtakes an earlier one of another stream must wait for it. */
START_TEST(test_barrier_orders_streams)
{
	struct error err = ERROR_INIT;

	send_control(0, MEM_FRAME_BARRIER);
	send_data(0, 512, MEM_FLAG_FINAL); /* stream 1's region */
	send_end(0, (struct mem_totals){.frames = 2, .data_pages = 1});
	usleep(100000);
	ck_assert_uint_eq(space_populated(&space, NULL), 0);
	send_data(1, 512, 0);
	send_control(1, MEM_FRAME_BARRIER);
	send_end(1, (struct mem_totals){.frames = 2, .data_pages = 1});
	ck_assert_msg(mem_receiver_wait(receiver, &err) == 0, "%s", err.message);
	ck_assert_uint_eq(space.base[512 * MEM_PAGE_BYTES], 'x');
}
END_TEST

START_TEST(test_end_in_the_middle)
{
	struct error err = ERROR_INIT;

	send_control(0, MEM_FRAME_BEAT);
	conn_shutdown(a[0]);
	ck_assert_int_eq(mem_receiver_wait(receiver, &err), -ENODATA);
	ck_assert_msg(strstr(err.message, "before its end") != NULL, "%s", err.message);
}
END_TEST

/* Page 0 came as so many 'x'; then a frame of deltas against it. */
static void send_delta(unsigned stream, const struct mem_run *runs, uint32_t nruns, const uint8_t *deltas,
		       size_t len, unsigned flags)
{
	struct mem_header h = {.type = MEM_FRAME_DELTA,
			       .flags = (uint16_t)flags,
			       .nruns = nruns,
			       .raw_len = (uint32_t)len,
			       .wire_len = (uint32_t)len};

	send_frame(stream, h, runs, deltas);
}

static size_t delta_of(uint8_t base, uint8_t changed, uint8_t *out)
{
	uint8_t old[MEM_PAGE_BYTES], new[MEM_PAGE_BYTES];

	memset(old, base, sizeof old);
	memcpy(new, old, sizeof new);
	new[77] = changed;
	return (size_t)mem_delta_page_encode(old, new, out, MEM_DELTA_MAX_BYTES);
}

static const struct {
	struct mem_run run;
	uint8_t base;
	int longer; /* than the delta is */
	unsigned stream, flags;
	int code;
	const char *mention;
} bad_deltas[] = {
	{{0, 1, MEM_RUN_DELTA}, 'y', 0, 0, 0, -EBADMSG, "page 0: memory delta: the page here is not"},
	{{1, 1, MEM_RUN_DELTA}, 'x', 0, 0, 0, -EPROTO, "nothing has come of page 1"},
	{{NPAGES, 1, MEM_RUN_DELTA}, 'x', 0, 0, 0, -EPROTO, "outside"},
	{{UINT64_MAX, 1, MEM_RUN_DELTA}, 'x', 0, 0, 0, -EPROTO, "outside"},
	{{0, 1, MEM_RUN_DATA}, 'x', 0, 0, 0, -EPROTO, "unknown kind"},
	{{0, 1, MEM_RUN_DELTA}, 'x', 0, 1, 0, -EPROTO, "belongs to stream 0"},
	{{0, 2, MEM_RUN_DELTA}, 'x', 0, 0, 0, -EPROTO, "2 pages, but only 1 deltas"},
	{{0, 1, MEM_RUN_DELTA}, 'x', 1, 0, 0, -EPROTO, "1 bytes after the last"},
	{{0, 1, MEM_RUN_DELTA}, 'x', -1, 0, 0, -EPROTO, "follow"},
	{{0, 1, MEM_RUN_DELTA}, 'x', 0, 0, MEM_FLAG_FINAL, -EPROTO, "before the barrier"},
};

START_TEST(test_bad_deltas)
{
	uint8_t deltas[MEM_DELTA_HEAD_BYTES + MEM_DELTA_MAX_BYTES] = {0};
	size_t len = delta_of(bad_deltas[_i].base, 'z', deltas);
	unsigned stream = bad_deltas[_i].stream;
	struct error err = ERROR_INIT;

	if (stream == 0)
		send_data(0, 0, 0);
	send_delta(stream, &bad_deltas[_i].run, 1, deltas, len + (size_t)bad_deltas[_i].longer,
		   bad_deltas[_i].flags);
	const char *sentence = error_sentence(stream);
	ck_assert_msg(strstr(sentence, bad_deltas[_i].mention) != NULL, "%s", sentence);
	ck_assert_int_eq(mem_receiver_wait(receiver, &err), bad_deltas[_i].code);
	/* Of what came before nothing is gone. */
	if (stream == 0)
		ck_assert(memcmp(space.base, page, MEM_PAGE_BYTES) == 0);
	ck_assert_uint_eq(space_populated(&space, NULL), stream == 0);
}
END_TEST

/* What was zeroed there is nothing to change any more. */
START_TEST(test_delta_of_a_freed_page)
{
	uint8_t deltas[MEM_DELTA_HEAD_BYTES + MEM_DELTA_MAX_BYTES];
	size_t len = delta_of('x', 'z', deltas);
	struct mem_run run = {0, 1, MEM_RUN_DELTA}, hole = {0, 1, MEM_RUN_HOLE};

	send_data(0, 0, 0);
	send_frame(0, (struct mem_header){.type = MEM_FRAME_PAGES, .nruns = 1}, &hole, NULL);
	send_delta(0, &run, 1, deltas, len, 0);
	expect_failure(0, -EPROTO, "nothing has come of page 0");
}
END_TEST

START_TEST(test_deltas_that_were_not_agreed)
{
	uint8_t deltas[MEM_DELTA_HEAD_BYTES + MEM_DELTA_MAX_BYTES];
	size_t len = delta_of('x', 'z', deltas);
	struct mem_run run = {0, 1, MEM_RUN_DELTA};

	send_delta(0, &run, 1, deltas, len, 0);
	expect_failure(0, -EPROTO, "not agreed");
}
END_TEST

/* In order on a stream, and after the barrier on any; each counts as a data page. */
START_TEST(test_good_deltas)
{
	uint8_t deltas[MEM_DELTA_HEAD_BYTES + MEM_DELTA_MAX_BYTES];
	struct mem_run run = {0, 1, MEM_RUN_DELTA};
	struct error err = ERROR_INIT;

	send_data(0, 0, 0);
	send_delta(0, &run, 1, deltas, delta_of('x', 'z', deltas), 0);
	send_control(0, MEM_FRAME_BARRIER);
	send_end(0, (struct mem_totals){.frames = 3, .data_pages = 2});
	send_control(1, MEM_FRAME_BARRIER);
	/* from 'z' back to 'x' */
	uint8_t old[MEM_PAGE_BYTES];
	size_t len;

	memcpy(old, page, sizeof old);
	old[77] = 'z';
	len = (size_t)mem_delta_page_encode(old, page, deltas, MEM_DELTA_MAX_BYTES);
	send_delta(1, &run, 1, deltas, len, MEM_FLAG_FINAL);
	send_end(1, (struct mem_totals){.frames = 2, .data_pages = 1});
	ck_assert_msg(mem_receiver_wait(receiver, &err) == 0, "%s", err.message);
	ck_assert(memcmp(space.base, page, MEM_PAGE_BYTES) == 0);
}
END_TEST

/* The other way round: what a destination may not answer. */
START_TEST(test_sender_checks_answers)
{
	static const struct {
		struct mem_header h;
		const char *mention;
	} t[] = {
		{{.type = MEM_FRAME_ACK, .epoch = EPOCH}, "acknowledged an end before it came"},
		{{.type = MEM_FRAME_BARRIER, .epoch = EPOCH}, "sent a frame of type barrier"},
		{{.type = MEM_FRAME_BEAT, .epoch = EPOCH + 1}, "another stream, epoch or time"},
		{{.type = MEM_FRAME_BEAT, .epoch = EPOCH, .stream = 1}, "another stream, epoch or time"},
		{{.type = MEM_FRAME_BEAT, .epoch = EPOCH, .sequence = 1}, "another stream, epoch or time"},
		{{.type = MEM_FRAME_BEAT, .epoch = EPOCH, .body_sum = 1}, "checksum"},
		{{.type = MEM_FRAME_ERROR, .epoch = EPOCH, .raw_len = 6, .wire_len = 6},
		 "the destination says: no\?\?m!"},
	};
	struct mem_space src = space_create(600);
	struct conn *sa[1], *sb[1];
	struct fake_log log;
	struct mem_sender_options opt = {.space = src,
					 .dirty = fake_source(&log, 600),
					 .streams = sa,
					 .nstreams = 1,
					 .timeout_ms = 2000,
					 .epoch = EPOCH};
	struct mem_header h = t[_i].h;
	struct mem_sender *s;
	struct error err = ERROR_INIT;
	uint8_t raw[MEM_HEADER_BYTES];
	bool limit;

	connect_streams(false, 1, sa, sb);
	ck_assert_int_eq(mem_sender_create(&opt, &s, &err), 0);
	h.body_sum ^= mem_body_sum(NULL, 0, "no\n\x1bm!", h.wire_len);
	mem_header_encode(raw, &h);
	ck_assert_int_eq(conn_write_full(sb[0], raw, sizeof raw, 1000, NULL), 0);
	ck_assert_int_eq(conn_write_full(sb[0], "no\n\x1bm!", h.wire_len, 1000, NULL), 0);
	ck_assert_int_lt(mem_sender_precopy(s, &limit, &err), 0);
	ck_assert_msg(strstr(err.message, t[_i].mention) != NULL, "%s", err.message);
	mem_sender_free(s);
	close_streams(1, sa);
	close_streams(1, sb);
	space_free(&src);
	free(log.bits);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("hostile");
	TCase *tc = tcase_create("receiver"), *tx = tcase_create("sender"), *td = tcase_create("deltas");

	tcase_add_checked_fixture(tc, receiver_open, receiver_close);
	tcase_add_loop_test(tc, test_bad_run_tables, 0, (int)(sizeof tables / sizeof tables[0]));
	tcase_add_loop_test(tc, test_packed_length_lies, 0, 2);
	tcase_add_test(tc, test_wrong_epoch);
	tcase_add_test(tc, test_wrong_stream);
	tcase_add_test(tc, test_wrong_sequence);
	tcase_add_test(tc, test_wrong_body_checksum);
	tcase_add_loop_test(tc, test_wrong_page_checksum, 0, 2);
	tcase_add_loop_test(tc, test_end_within_pages, 0, 2);
	tcase_add_loop_test(tc, test_scattered_pages, 0, 2);
	tcase_add_loop_test(tc, test_frames_out_of_place, 0, 5);
	tcase_add_test(tc, test_totals_must_agree);
	tcase_add_test(tc, test_barrier_orders_streams);
	tcase_add_test(tc, test_end_in_the_middle);
	tcase_add_test(tc, test_deltas_that_were_not_agreed);
	tcase_add_checked_fixture(td, receiver_open_deltas, receiver_close);
	tcase_add_loop_test(td, test_bad_deltas, 0, (int)(sizeof bad_deltas / sizeof bad_deltas[0]));
	tcase_add_test(td, test_delta_of_a_freed_page);
	tcase_add_test(td, test_good_deltas);
	tcase_add_loop_test(tx, test_sender_checks_answers, 0, 7);
	suite_add_tcase(suite, tc);
	suite_add_tcase(suite, td);
	suite_add_tcase(suite, tx);
	return suite_run(suite);
}
