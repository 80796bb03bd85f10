/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "base/bytes.h"
#include "memxfer/codec.h"
#include "memxfer/compress_policy.h"
#include "memxfer/guest_copy.h"
#include "memxfer/idle_cpu.h"
#include "tests/suite.h"

#define NPAGES 1500u /* not a whole number of regions */

static struct mem_header pages_header(void)
{
	return (struct mem_header){.type = MEM_FRAME_PAGES,
				   .stream = 1,
				   .flags = MEM_FLAG_ZSTD,
				   .nruns = 3,
				   .round = 4,
				   .raw_len = 2 * MEM_PAGE_BYTES,
				   .wire_len = 77,
				   .epoch = UINT64_C(0x1122334455667788),
				   .sequence = 99,
				   .body_sum = UINT64_C(0xfedcba9876543210)};
}

START_TEST(test_header_round_trip)
{
	struct mem_header h = pages_header(), got;
	uint8_t raw[MEM_HEADER_BYTES], again[MEM_HEADER_BYTES];

	mem_header_encode(raw, &h);
	ck_assert_int_eq(mem_header_decode(raw, &got, NULL), 0);
	mem_header_encode(again, &got);
	ck_assert_int_eq(memcmp(raw, again, sizeof raw), 0);
	ck_assert_uint_eq(got.epoch, h.epoch);
	ck_assert_uint_eq(got.wire_len, h.wire_len);
	ck_assert_uint_eq(mem_body_bytes(&got), 3 * MEM_RUN_BYTES + 77);
}
END_TEST

/* The format of version 1, byte for byte: what an older build sent must stay readable. */
START_TEST(test_header_of_version_1)
{
	static const uint8_t kept[] = {'S',  'N',  'M',	 'M',  0,    1,	   0,	 1,    0,    1,	   0,	 1,
				       0,    0,	   0,	 3,    0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88,
				       0,    0,	   0,	 0,    0,    0,	   0,	 99,   0,    0,	   0,	 4,
				       0,    0,	   0x20, 0,    0,    0,	   0,	 77,   0,    0,	   0,	 0,
				       0xfe, 0xdc, 0xba, 0x98, 0x76, 0x54, 0x32, 0x10};
	struct mem_header h = pages_header();
	uint8_t raw[MEM_HEADER_BYTES];

	mem_header_encode(raw, &h);
	ck_assert_int_eq(memcmp(raw, kept, sizeof kept), 0);
	ck_assert_uint_eq(get_be64(raw + 56), XXH3_64bits(raw, 56));
}
END_TEST

START_TEST(test_every_flipped_bit_of_a_header_is_noticed)
{
	struct mem_header h = pages_header(), got;
	uint8_t raw[MEM_HEADER_BYTES];

	for (unsigned bit = 0; bit < MEM_HEADER_BYTES * 8; bit++) {
		mem_header_encode(raw, &h);
		raw[bit / 8] ^= (uint8_t)(1u << (bit % 8));
		if (mem_header_decode(raw, &got, NULL) != -EBADMSG)
			ck_abort_msg("bit %u", bit);
	}
}
END_TEST

/* Headers with a right checksum and wrong contents. */
static const struct {
	unsigned at, bytes;
	uint32_t value;
	const char *mention;
} bad_headers[] = {
	{0, 4, 0x534e4d43, "magic"},
	{4, 2, 0, "format version"},
	{4, 2, 2, "format version 2, this side knows 1"},
	{6, 2, 0, "unknown type"},
	{6, 2, MEM_FRAME_DELTA + 1, "unknown type"},
	{6, 2, MEM_FRAME_BEAT, "unknown flags"},
	{10, 2, 4, "unknown flags"},
	{44, 4, 1, "unknown flags"},
	{12, 4, 0, "do not fit"},
	{12, 4, MEM_FRAME_RUNS_MAX + 1, "do not fit"},
	{36, 4, MEM_PAYLOAD_MAX + MEM_PAGE_BYTES, "do not fit"},
	{36, 4, MEM_PAGE_BYTES + 1, "do not fit"},
	{36, 4, 0, "do not fit"},
	{40, 4, 0, "do not fit"},
	{40, 4, 2 * MEM_PAGE_BYTES, "do not fit"},
	{40, 4, UINT32_MAX, "do not fit"},
};

START_TEST(test_bad_headers)
{
	struct mem_header h = pages_header(), got;
	struct error err = ERROR_INIT;
	uint8_t raw[MEM_HEADER_BYTES];

	mem_header_encode(raw, &h);
	if (bad_headers[_i].bytes == 2)
		put_be16(raw + bad_headers[_i].at, (uint16_t)bad_headers[_i].value);
	else
		put_be32(raw + bad_headers[_i].at, bad_headers[_i].value);
	put_be64(raw + 56, XXH3_64bits(raw, 56));
	ck_assert_int_eq(mem_header_decode(raw, &got, &err), -EPROTO);
	ck_assert_msg(strstr(err.message, bad_headers[_i].mention) != NULL, "%s", err.message);
}
END_TEST

START_TEST(test_lengths_of_control_frames)
{
	static const struct {
		uint16_t type;
		uint32_t nruns, len;
		int ret;
	} t[] = {
		{MEM_FRAME_BEAT, 0, 0, 0},
		{MEM_FRAME_BEAT, 0, 1, -EPROTO},
		{MEM_FRAME_BARRIER, 0, 0, 0},
		{MEM_FRAME_BARRIER, 1, 0, -EPROTO},
		{MEM_FRAME_ACK, 0, 0, 0},
		{MEM_FRAME_END, 0, MEM_TOTALS_BYTES, 0},
		{MEM_FRAME_END, 0, MEM_TOTALS_BYTES - 1, -EPROTO},
		{MEM_FRAME_END, 1, MEM_TOTALS_BYTES, -EPROTO},
		{MEM_FRAME_ERROR, 0, MEM_SENTENCE_MAX, 0},
		{MEM_FRAME_ERROR, 0, MEM_SENTENCE_MAX + 1, -EPROTO},
		{MEM_FRAME_OPEN, 0, 0, 0},
		{MEM_FRAME_OPEN, 1, 0, -EPROTO},
		{MEM_FRAME_MISSING, MEM_FRAME_RUNS_MAX, 0, 0},
		{MEM_FRAME_MISSING, MEM_FRAME_RUNS_MAX + 1, 0, -EPROTO},
		{MEM_FRAME_MISSING, 1, MEM_PAGE_BYTES, -EPROTO},
		{MEM_FRAME_WANT, 1, 0, 0},
		{MEM_FRAME_WANT, 0, 0, -EPROTO},
		{MEM_FRAME_STATUS, 0, MEM_STATUS_BYTES, 0},
		{MEM_FRAME_STATUS, 0, MEM_STATUS_BYTES + 1, -EPROTO},
		{MEM_FRAME_DELTA, 1, 10, 0},
		{MEM_FRAME_DELTA, MEM_FRAME_RUNS_MAX, MEM_PAYLOAD_MAX, 0},
		{MEM_FRAME_DELTA, MEM_FRAME_RUNS_MAX + 1, 10, -EPROTO},
		{MEM_FRAME_DELTA, 1, MEM_PAYLOAD_MAX + 1, -EPROTO},
		{MEM_FRAME_DELTA, 0, 10, -EPROTO},
		{MEM_FRAME_DELTA, 1, 0, -EPROTO},
	};
	struct mem_header got;
	uint8_t raw[MEM_HEADER_BYTES];

	for (size_t i = 0; i < sizeof t / sizeof t[0]; i++) {
		struct mem_header h = {
			.type = t[i].type, .nruns = t[i].nruns, .raw_len = t[i].len, .wire_len = t[i].len};

		mem_header_encode(raw, &h);
		ck_assert_int_eq(mem_header_decode(raw, &got, NULL), t[i].ret);
	}
}
END_TEST

static const struct {
	struct mem_run run;
	uint16_t stream, flags;
	uint32_t raw_pages;
	int ret;
	const char *mention;
} runs[] = {
	{{0, 512, MEM_RUN_HOLE}, 0, 0, 0, 0, NULL},
	{{512, 512, MEM_RUN_ZERO}, 1, 0, 0, 0, NULL},
	{{1024, 476, MEM_RUN_ZERO}, 0, 0, 0, 0, NULL},
	{{1499, 1, MEM_RUN_DATA}, 0, 0, 1, 0, NULL},
	{{512, 128, MEM_RUN_DATA}, 1, 0, 128, 0, NULL},
	{{512, 5, MEM_RUN_DATA}, 0, MEM_FLAG_FINAL, 5, 0, NULL},
	{{512, 5, MEM_RUN_DATA}, 0, 0, 5, -EPROTO, "belongs to stream 1, not to 0"},
	{{0, 5, MEM_RUN_DATA}, 1, 0, 5, -EPROTO, "belongs to stream 0, not to 1"},
	{{511, 2, MEM_RUN_DATA}, 0, 0, 2, -EPROTO, "crosses"},
	{{511, 2, MEM_RUN_DATA}, 0, MEM_FLAG_FINAL, 2, -EPROTO, "crosses"},
	{{0, 513, MEM_RUN_HOLE}, 0, 0, 0, -EPROTO, "crosses"},
	{{1499, 2, MEM_RUN_DATA}, 0, 0, 2, -EPROTO, "outside"},
	{{1500, 1, MEM_RUN_DATA}, 0, 0, 1, -EPROTO, "outside"},
	{{UINT64_MAX, 1, MEM_RUN_DATA}, 0, MEM_FLAG_FINAL, 1, -EPROTO, "outside"},
	{{UINT64_MAX - 1, 4, MEM_RUN_ZERO}, 0, MEM_FLAG_FINAL, 0, -EPROTO, "outside"},
	{{UINT64_C(1) << 52, 1, MEM_RUN_DATA}, 0, 0, 1, -EPROTO, "outside"},
	{{0, UINT32_MAX, MEM_RUN_HOLE}, 0, 0, 0, -EPROTO, "outside"},
	{{0, 0, MEM_RUN_HOLE}, 0, 0, 0, -EPROTO, "outside"},
	{{0, 1, 0}, 0, 0, 0, -EPROTO, "unknown kind"},
	{{512, 7, MEM_RUN_LATER}, 0, MEM_FLAG_FINAL, 0, 0, NULL},
	{{512, 7, MEM_RUN_LATER}, 1, 0, 0, 0, NULL},
	{{512, 7, MEM_RUN_LATER}, 0, 0, 0, -EPROTO, "belongs to stream 1, not to 0"},
	{{0, 1, MEM_RUN_LATER + 1}, 0, MEM_FLAG_FINAL, 0, -EPROTO, "unknown kind"},
	{{0, 2, MEM_RUN_DATA}, 0, 0, 1, -EPROTO, "2 data pages but 4096 bytes"},
	{{0, 2, MEM_RUN_ZERO}, 0, 0, 2, -EPROTO, "0 data pages but 8192 bytes"},
};

START_TEST(test_run_table)
{
	struct mem_header h = {.type = MEM_FRAME_PAGES,
			       .nruns = 1,
			       .stream = runs[_i].stream,
			       .flags = runs[_i].flags,
			       .raw_len = runs[_i].raw_pages * MEM_PAGE_BYTES};
	struct mem_run out[1];
	struct error err = ERROR_INIT;
	uint8_t raw[MEM_RUN_BYTES];

	mem_run_encode(raw, &runs[_i].run);
	ck_assert_int_eq(mem_runs_decode(&h, raw, NPAGES, 2, out, &err), runs[_i].ret);
	if (runs[_i].mention)
		ck_assert_msg(strstr(err.message, runs[_i].mention) != NULL, "%s", err.message);
	else
		ck_assert(out[0].first == runs[_i].run.first && out[0].npages == runs[_i].run.npages);
}
END_TEST

START_TEST(test_body_sum_covers_both_pieces)
{
	uint8_t a[32] = {1}, b[64] = {2};
	uint64_t sum = mem_body_sum(a, sizeof a, b, sizeof b);

	ck_assert_uint_eq(sum, mem_body_sum(a, sizeof a, b, sizeof b));
	a[31] ^= 1;
	ck_assert_uint_ne(sum, mem_body_sum(a, sizeof a, b, sizeof b));
	a[31] ^= 1;
	b[63] ^= 1;
	ck_assert_uint_ne(sum, mem_body_sum(a, sizeof a, b, sizeof b));
	ck_assert_uint_ne(mem_body_sum(a, 32, NULL, 0), mem_body_sum(a, 31, NULL, 0));
}
END_TEST

/* `packed` frames out of n, with the given costs a byte. */
static unsigned simulate(struct compress_policy *p, unsigned n, double ratio, double pack_ns, double wire_ns)
{
	const size_t raw = 1 << 19;
	unsigned packed = 0;

	for (unsigned i = 0; i < n; i++) {
		size_t wire = raw;

		if (compress_policy_wants(p)) {
			wire = (size_t)((double)raw * ratio);
			compress_policy_packed(p, raw, wire, (uint64_t)((double)raw * pack_ns));
			packed++;
		}
		compress_policy_sent(p, wire, (uint64_t)((double)wire * wire_ns));
	}
	return packed;
}

START_TEST(test_policy)
{
	struct compress_policy p;

	compress_policy_init(&p, MEM_COMPRESS_OFF);
	ck_assert_uint_eq(simulate(&p, 100, 0.2, 1, 100), 0);
	/* Asked for, whatever it costs. */
	compress_policy_init(&p, MEM_COMPRESS_ALWAYS);
	ck_assert_uint_eq(simulate(&p, 1000, 1, 100, 0.1), 1000);
	ck_assert(!compress_policy_probes(&p));
	/* Gigabit: always. */
	compress_policy_init(&p, MEM_COMPRESS_AUTO);
	ck_assert_uint_eq(simulate(&p, 1000, 0.4, 1.2, 8), 1000);
	/* Random data: hardly ever, and less as time goes. */
	compress_policy_init(&p, MEM_COMPRESS_AUTO);
	ck_assert_uint_le(simulate(&p, 1000, 1, 0.5, 8), 10);
	ck_assert_uint_le(simulate(&p, 1000, 1, 0.5, 8), 5);
	/* ... until the data change. */
	ck_assert_uint_ge(simulate(&p, 1000, 0.3, 1.2, 8), 700);
	/* A wire faster than the processor. */
	compress_policy_init(&p, MEM_COMPRESS_AUTO);
	simulate(&p, 200, 0.4, 1.2, 0.2);
	ck_assert_uint_le(simulate(&p, 1000, 0.4, 1.2, 0.2), 10);
	/* What pays with processors idle may not where the guest would have to give the time. */
	compress_policy_init(&p, MEM_COMPRESS_AUTO);
	ck_assert_uint_eq(simulate(&p, 1000, 0.4, 1.2, 3), 1000);
	compress_policy_init(&p, MEM_COMPRESS_AUTO);
	p.spare = false;
	simulate(&p, 200, 0.4, 1.2, 3);
	ck_assert_uint_le(simulate(&p, 1000, 0.4, 1.2, 3), 10);
}
END_TEST

/* The first frame and every one after a pause is looked at by a sample; in a run of gain none is. */
START_TEST(test_policy_probes)
{
	struct compress_policy p;

	compress_policy_init(&p, MEM_COMPRESS_AUTO);
	ck_assert(compress_policy_wants(&p) && compress_policy_probes(&p));
	compress_policy_packed(&p, 32768, 32768, 1000);
	ck_assert(!compress_policy_wants(&p));
	while (!compress_policy_wants(&p))
		;
	ck_assert(compress_policy_probes(&p));
	compress_policy_init(&p, MEM_COMPRESS_AUTO);
	simulate(&p, 2, 0.4, 1.2, 8);
	ck_assert(compress_policy_wants(&p) && !compress_policy_probes(&p));
	ck_assert(compress_policy_poor(100, 86) && !compress_policy_poor(100, 84));
}
END_TEST

START_TEST(test_any_byte_makes_a_page_not_zero)
{
	static _Alignas(64) uint8_t page[MEM_PAGE_BYTES];

	ck_assert(guest_page_is_zero(page));
	for (unsigned i = 0; i < MEM_PAGE_BYTES; i++) {
		page[i] = (uint8_t)(1u << i % 8);
		ck_assert_msg(!guest_page_is_zero(page), "byte %u", i);
		page[i] = 0;
	}
	ck_assert(guest_page_is_zero(page));
}
END_TEST

START_TEST(test_idle_cpu)
{
	uint64_t idle, all;
	struct idle_cpu c;

	ck_assert(idle_cpu_parse("cpu  1 2 3 40 5 6 7 8 9 0\ncpu0 ", &idle, &all));
	ck_assert_uint_eq(idle, 45);
	ck_assert_uint_eq(all, 72);
	ck_assert(!idle_cpu_parse("cpu  1 2 3", &idle, &all));
	ck_assert(!idle_cpu_parse("", &idle, &all));
	idle_cpu_init(&c);
	ck_assert_int_ge(c.fd, 0);
	/* All of the time since then was idle, then none. */
	idle = c.idle;
	c.next_ns = c.idle = 0;
	c.all -= idle;
	c.spare = false;
	ck_assert(idle_cpu_to_spare(&c));
	c.spare = false;
	ck_assert(!idle_cpu_to_spare(&c)); /* not looked at again so soon */
	c.spare = true;
	c.next_ns = c.all = 0;
	ck_assert(!idle_cpu_to_spare(&c));
	idle_cpu_release(&c);
	ck_assert(!idle_cpu_to_spare(&c));
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("codec");
	TCase *tc = tcase_create("codec");

	tcase_add_test(tc, test_header_round_trip);
	tcase_add_test(tc, test_header_of_version_1);
	tcase_add_test(tc, test_every_flipped_bit_of_a_header_is_noticed);
	tcase_add_loop_test(tc, test_bad_headers, 0, (int)(sizeof bad_headers / sizeof bad_headers[0]));
	tcase_add_test(tc, test_lengths_of_control_frames);
	tcase_add_loop_test(tc, test_run_table, 0, (int)(sizeof runs / sizeof runs[0]));
	tcase_add_test(tc, test_body_sum_covers_both_pieces);
	tcase_add_test(tc, test_policy);
	tcase_add_test(tc, test_policy_probes);
	tcase_add_test(tc, test_any_byte_makes_a_page_not_zero);
	tcase_add_test(tc, test_idle_cpu);
	suite_add_tcase(suite, tc);
	return suite_run(suite);
}
