/* SPDX-License-Identifier: Apache-2.0 */
/* Pages as what changed of them: the encoding, the copies kept for it, and when it is done at all. */
#include <check.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <xxhash.h>

#include "base/bytes.h"
#include "memxfer/codec.h"
#include "memxfer/delta.h"
#include "memxfer/delta_cache.h"
#include "memxfer/delta_policy.h"
#include "tests/suite.h"

#define WORDS (MEM_PAGE_BYTES / 8)

static uint64_t random_next(uint64_t *state)
{
	uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);

	z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
	return z ^ (z >> 31);
}

static void fill(uint8_t *page, uint64_t *seed)
{
	for (unsigned i = 0; i < MEM_PAGE_BYTES; i += 8)
		put_le64(page + i, random_next(seed));
}

/* `edits` stretches of up to `most` bytes change. */
static void edit(uint8_t *page, unsigned edits, unsigned most, uint64_t *seed)
{
	while (edits--) {
		uint64_t r = random_next(seed);
		unsigned at = (unsigned)(r % MEM_PAGE_BYTES), n = 1 + (unsigned)(r >> 20) % most;

		for (; n-- && at < MEM_PAGE_BYTES; at++)
			page[at] = (uint8_t)random_next(seed);
	}
}

/* A page before memory that faults, so that a word read or written beyond it ends the test. */
static uint8_t *guarded(void)
{
	uint8_t *p =
		mmap(NULL, 2 * MEM_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	ck_assert(p != MAP_FAILED);
	ck_assert_int_eq(mprotect(p + MEM_PAGE_BYTES, MEM_PAGE_BYTES, PROT_NONE), 0);
	return p;
}

static void check_round_trip(const uint8_t *base, const uint8_t *new)
{
	static uint8_t delta[MEM_DELTA_MAX_BYTES + 1];
	static uint8_t *page, *scratch;
	struct error err = ERROR_INIT;

	page = page ? page : guarded();
	scratch = scratch ? scratch : guarded();
	delta[MEM_DELTA_MAX_BYTES] = 0xa5;
	int len = mem_delta_encode(base, new, delta, MEM_DELTA_MAX_BYTES);
	ck_assert_int_ge(len, 0);
	ck_assert_uint_eq(delta[MEM_DELTA_MAX_BYTES], 0xa5);
	memcpy(page, base, MEM_PAGE_BYTES);
	ck_assert_msg(mem_delta_decode(page, delta, (size_t)len, &err) == 0, "%s", err.message);
	ck_assert(memcmp(page, new, MEM_PAGE_BYTES) == 0);
	/* into exactly so much room, and not into less */
	memset(scratch, 0x5a, MEM_PAGE_BYTES);
	if (len <= (int)MEM_PAGE_BYTES) {
		uint8_t *end = scratch + MEM_PAGE_BYTES;

		ck_assert_int_eq(mem_delta_encode(base, new, end - len, (size_t)len), len);
		ck_assert(memcmp(end - len, delta, (size_t)len) == 0);
	}
	if (len)
		ck_assert_int_eq(mem_delta_encode(base, new, delta, (size_t)len - 1), -1);
}

START_TEST(test_random_edits_round_trip)
{
	uint64_t seed = (uint64_t)_i;
	uint8_t base[MEM_PAGE_BYTES], new[MEM_PAGE_BYTES];

	for (unsigned n = 0; n < 5000; n++) {
		uint64_t r = random_next(&seed);

		fill(base, &seed);
		memcpy(new, base, sizeof new);
		edit(new, (unsigned)(r % 40), 1 + (unsigned)(r >> 8) % (r >> 40 & 1 ? 16 : 1500), &seed);
		check_round_trip(base, new);
	}
}
END_TEST

START_TEST(test_sizes)
{
	uint8_t base[MEM_PAGE_BYTES], new[MEM_PAGE_BYTES], delta[MEM_DELTA_MAX_BYTES];
	uint64_t seed = 1;

	fill(base, &seed);
	memcpy(new, base, sizeof new);
	ck_assert_int_eq(mem_delta_encode(base, new, delta, sizeof delta), 0);
	check_round_trip(base, new);
	new[MEM_PAGE_BYTES - 1] ^= 1; /* the last word alone */
	ck_assert_int_eq(mem_delta_encode(base, new, delta, sizeof delta), 2 + 8);
	check_round_trip(base, new);
	new[0] ^= 1;
	ck_assert_int_eq(mem_delta_encode(base, new, delta, sizeof delta), 2 * (2 + 8));
	check_round_trip(base, new);
	for (unsigned i = 0; i < WORDS; i++)
		new[8 * i] = (uint8_t)~base[8 * i];
	ck_assert_int_eq(mem_delta_encode(base, new, delta, sizeof delta), MEM_DELTA_MAX_BYTES);
	check_round_trip(base, new);
	memcpy(new, base, sizeof new);
	for (unsigned i = 0; i < WORDS; i += 2)
		new[8 * i + 3] = (uint8_t)~base[8 * i + 3];
	ck_assert_int_eq(mem_delta_encode(base, new, delta, sizeof delta), 2560);
	check_round_trip(base, new);
	/* a run is as long as it may be, and one longer */
	for (unsigned n = 127; n <= 129; n++) {
		memcpy(new, base, sizeof new);
		for (unsigned i = 100; i < 100 + n; i++)
			new[8 * i] ^= 0x80;
		ck_assert_int_eq(mem_delta_encode(base, new, delta, sizeof delta),
				 (int)(8 * n + (n > 128 ? 4 : 2)));
		check_round_trip(base, new);
	}
}
END_TEST

static void head(uint8_t *p, unsigned same, unsigned changed)
{
	put_be16(p, (uint16_t)(same << 7 | (changed - 1)));
}

START_TEST(test_malformed_deltas)
{
	uint8_t delta[MEM_DELTA_MAX_BYTES] = {0};
	uint8_t *page = guarded(), *end = page + MEM_PAGE_BYTES;
	struct error err = ERROR_INIT;

	delta[0] = 1; /* half a head */
	ck_assert_int_eq(mem_delta_decode(page, delta, 1, &err), -EPROTO);
	ck_assert(strstr(err.message, "head"));
	head(delta, 3, 2);
	ck_assert_int_eq(mem_delta_decode(page, delta, 2 + 15, &err), -EPROTO);
	ck_assert(strstr(err.message, "cut off"));
	head(delta, 511, 2); /* one word fits */
	ck_assert_int_eq(mem_delta_decode(page, delta, 2 + 16, &err), -EPROTO);
	ck_assert(strstr(err.message, "leave the page"));
	head(delta, 511, 1);
	memset(delta + 2, 7, 8);
	ck_assert_int_eq(mem_delta_decode(page, delta, 2 + 8, &err), 0);
	ck_assert_uint_eq(end[-1], 7);
	head(delta + 10, 0, 1); /* and then none */
	ck_assert_int_eq(mem_delta_decode(page, delta, 2 * (2 + 8), &err), -EPROTO);
	for (unsigned i = 0; i < 3; i++) /* 3 times 511 words are skipped */
		head(delta + 10 * i, 511, 1);
	ck_assert_int_eq(mem_delta_decode(page, delta, 30, &err), -EPROTO);
}
END_TEST

/* Whatever comes: refused, or a page, and never a byte elsewhere. */
START_TEST(test_noise_is_bounded)
{
	uint64_t seed = 100 + (uint64_t)_i;
	uint8_t *page = guarded(), *room = guarded(), noise[MEM_PAGE_BYTES];
	unsigned good = 0;

	for (unsigned n = 0; n < 20000; n++) {
		size_t len = random_next(&seed) % (n % 4 ? 64 : MEM_PAGE_BYTES);
		uint8_t *delta = room + MEM_PAGE_BYTES - len;

		fill(noise, &seed);
		memcpy(delta, noise, len);
		good += mem_delta_decode(page, delta, len, NULL) == 0;
		(void)mem_delta_pages_check(delta, len, random_next(&seed) % 4, NULL);
	}
	ck_assert_uint_gt(good, 0);
}
END_TEST

START_TEST(test_pages_of_a_frame)
{
	uint8_t base[MEM_PAGE_BYTES], new[MEM_PAGE_BYTES], scratch[MEM_PAGE_BYTES], kept[MEM_PAGE_BYTES];
	uint8_t buf[4 * (MEM_DELTA_HEAD_BYTES + MEM_DELTA_MAX_BYTES)];
	const uint8_t *at = buf;
	struct error err = ERROR_INIT;
	uint64_t seed = 5;
	size_t len = 0;

	fill(base, &seed);
	memcpy(new, base, sizeof new);
	edit(new, 5, 20, &seed);
	for (unsigned i = 0; i < 4; i++)
		len += (size_t)mem_delta_page_encode(base, new, buf + len, MEM_DELTA_MAX_BYTES);
	ck_assert_int_eq(mem_delta_pages_check(buf, len, 4, &err), 0);
	ck_assert_int_eq(mem_delta_pages_check(buf, len, 3, &err), -EPROTO);
	ck_assert(strstr(err.message, "after the last"));
	ck_assert_int_eq(mem_delta_pages_check(buf, len, 5, &err), -EPROTO);
	ck_assert_int_eq(mem_delta_pages_check(buf, len - 1, 4, &err), -EPROTO);
	ck_assert_int_eq(mem_delta_pages_check(buf, 0, 0, &err), 0);
	for (unsigned i = 0; i < 4; i++) {
		memcpy(kept, base, sizeof kept);
		ck_assert_int_eq(mem_delta_page_apply(kept, scratch, &at, &err), 0);
		ck_assert(memcmp(kept, new, sizeof new) == 0);
	}
	ck_assert_ptr_eq(at, buf + len);
	/* Of another base: found out, and nothing is written. */
	memcpy(kept, base, sizeof kept);
	kept[2000] ^= 1;
	at = buf;
	ck_assert_int_eq(mem_delta_page_apply(kept, scratch, &at, &err), -EBADMSG);
	kept[2000] ^= 1;
	ck_assert(memcmp(kept, base, sizeof base) == 0);
	ck_assert_ptr_eq(at, buf);
}
END_TEST

/* --- the cache --- */

static struct delta_cache *cache_of(uint64_t pages, uint64_t npages, unsigned nstreams)
{
	struct delta_cache *c;
	struct error err = ERROR_INIT;

	ck_assert_msg(delta_cache_create(pages * MEM_PAGE_BYTES, npages, nstreams, &c, &err) == 0, "%s",
		      err.message);
	return c;
}

static void put(struct delta_cache *c, uint64_t page, uint8_t value, uint32_t round)
{
	uint8_t copy[MEM_PAGE_BYTES];

	memset(copy, value, sizeof copy);
	delta_cache_put(c, page, copy, round);
}

static int found(struct delta_cache *c, uint64_t page)
{
	const uint8_t *p = delta_cache_find(c, page);

	ck_assert(!p || p[0] == p[MEM_PAGE_BYTES - 1]);
	return p ? p[0] : -1;
}

START_TEST(test_cache_finds_what_was_put_last)
{
	struct delta_cache *c = cache_of(100000, 5000, 3); /* room for all */

	ck_assert_int_eq(found(c, 7), -1);
	for (uint64_t p = 0; p < 5000; p++)
		put(c, p, (uint8_t)(p % 251), 2);
	for (uint64_t p = 0; p < 5000; p++)
		ck_assert_int_eq(found(c, p), (int)(p % 251));
	put(c, 1234, 255, 2);
	ck_assert_int_eq(found(c, 1234), 255);
	delta_cache_forget(c, 1230, 10);
	ck_assert_int_eq(found(c, 1229), 1229 % 251);
	ck_assert_int_eq(found(c, 1234), -1);
	ck_assert_int_eq(found(c, 1240), 1240 % 251);
	/* one stream's pages only */
	delta_cache_clear(c, 1);
	ck_assert_int_eq(found(c, 511), 511 % 251);
	ck_assert_int_eq(found(c, 512), -1);
	ck_assert_int_eq(found(c, 1024), 1024 % 251);
	put(c, 512, 9, 3);
	ck_assert_int_eq(found(c, 512), 9);
	delta_cache_free(c);
}
END_TEST

/* A guest that goes round more pages than there is room for finds some of them each time. */
START_TEST(test_cache_does_not_thrash)
{
	struct delta_cache *c = cache_of(512, 4096, 1);
	unsigned hits = 0;

	for (uint32_t round = 2; round < 12; round++) {
		for (uint64_t p = 0; p < 1024; p++) {
			hits += found(c, p) == (int)(p % 251);
			put(c, p, (uint8_t)(p % 251), round);
		}
	}
	ck_assert_uint_eq(hits, 9 * 512);
	/* and gives way to a working set that has moved on */
	for (uint32_t round = 12; round < 16; round++) {
		for (uint64_t p = 2048; p < 2048 + 512; p++)
			put(c, p, 1, round);
	}
	hits = 0;
	for (uint64_t p = 2048; p < 2048 + 512; p++)
		hits += found(c, p) == 1;
	ck_assert_uint_eq(hits, 512);
	delta_cache_free(c);
}
END_TEST

START_TEST(test_cache_is_bounded)
{
	struct delta_cache *c;

	ck_assert_int_eq(delta_cache_create(3 * MEM_PAGE_BYTES, 4096, 4, &c, NULL), -EINVAL);
	ck_assert_ptr_null(c);
	ck_assert_ptr_null(delta_cache_find(NULL, 1));
	delta_cache_forget(NULL, 1, 1);
	delta_cache_clear(NULL, 0);
	delta_cache_free(NULL);
	c = cache_of(64, 1 << 16, 2);
	for (uint64_t p = 0; p < 1 << 16; p += 77)
		put(c, p, 1, 2);
	unsigned there = 0;
	for (uint64_t p = 0; p < 1 << 16; p++)
		there += delta_cache_find(c, p) != NULL;
	ck_assert_uint_le(there, 64);
	ck_assert_uint_gt(there, 0);
	delta_cache_free(c);
}
END_TEST

/* --- the policy --- */

#define MBIT 125000.0 /* bytes a second */

/* A round over a link of so many bytes a second. */
static void round_of(struct delta_policy *p, double bytes_per_s, unsigned tried, double saved,
		     uint64_t work_ns)
{
	uint64_t bytes = 64 << 20;

	delta_policy_arrived(p, bytes, (uint64_t)((double)bytes / bytes_per_s * 1e9));
	for (unsigned i = 0; i < tried; i++)
		delta_policy_tried(p, work_ns, saved);
}

START_TEST(test_policy_is_off_on_a_fast_link)
{
	struct delta_policy p;

	delta_policy_init(&p);
	ck_assert_int_eq(delta_policy_judge(&p, 0, true), DELTA_NONE); /* nothing is measured */
	round_of(&p, 25000 * MBIT, 0, 0, 0);
	for (int i = 0; i < 5; i++)
		ck_assert_int_eq(delta_policy_judge(&p, 0, true), DELTA_NONE);
	ck_assert(!delta_policy_takes(&p, 0));
}
END_TEST

START_TEST(test_policy_is_on_where_little_changes)
{
	struct delta_policy p;

	delta_policy_init(&p);
	round_of(&p, 1000 * MBIT, 0, 0, 0);
	ck_assert_int_eq(delta_policy_judge(&p, 0, true), DELTA_ALL);
	ck_assert(delta_policy_takes(&p, 12345));
	for (int i = 0; i < 5; i++) {
		round_of(&p, 1000 * MBIT, 1000, 4000, 1200);
		ck_assert_int_eq(delta_policy_judge(&p, 0, true), DELTA_ALL);
	}
	/* the link turns out to be fast: 0.1 ns a byte, after some rounds */
	for (int i = 0; i < 12; i++)
		round_of(&p, 80000 * MBIT, 1000, 4000, 1200);
	ck_assert_int_eq(delta_policy_judge(&p, 0, true), DELTA_NONE);
	/* but a limit makes each byte dear */
	ck_assert_int_eq(delta_policy_judge(&p, 10 << 20, true), DELTA_ALL);
}
END_TEST

START_TEST(test_policy_only_samples_where_all_changes)
{
	struct delta_policy p;
	unsigned taken = 0;

	delta_policy_init(&p);
	round_of(&p, 1000 * MBIT, 0, 0, 0);
	ck_assert_int_eq(delta_policy_judge(&p, 0, true), DELTA_ALL);
	round_of(&p, 1000 * MBIT, 1000, 0, 1500);
	ck_assert_int_eq(delta_policy_judge(&p, 0, true), DELTA_SAMPLE);
	for (uint64_t page = 0; page < 65536; page += 16)
		taken += delta_policy_takes(&p, page);
	ck_assert_uint_gt(taken, 4096 / DELTA_SAMPLE_EVERY / 2);
	ck_assert_uint_lt(taken, 4096 / DELTA_SAMPLE_EVERY * 2);
	/* few pages do not change its mind, many do */
	round_of(&p, 1000 * MBIT, 10, 4000, 1500);
	ck_assert_int_eq(delta_policy_judge(&p, 0, true), DELTA_SAMPLE);
	round_of(&p, 1000 * MBIT, 60, 4000, 1500);
	ck_assert_int_eq(delta_policy_judge(&p, 0, true), DELTA_ALL);
}
END_TEST

/* In between, a sample decides; without processor time to spare it has to save twice as much. */
START_TEST(test_policy_in_between)
{
	struct delta_policy p;

	delta_policy_init(&p);
	round_of(&p, 5000 * MBIT, 0, 0, 0); /* 6.5 us a page */
	ck_assert_int_eq(delta_policy_judge(&p, 0, true), DELTA_SAMPLE);
	round_of(&p, 5000 * MBIT, 100, 2000, 2000); /* 3.2 us saved by 2 */
	ck_assert_int_eq(delta_policy_judge(&p, 0, true), DELTA_ALL);
	ck_assert_int_eq(delta_policy_judge(&p, 0, false), DELTA_NONE);
	/* pages that pack well save less, as they are short already */
	for (int i = 0; i < 100; i++)
		delta_policy_whole(&p, 400);
	ck_assert_int_eq(delta_policy_judge(&p, 0, true), DELTA_NONE);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("delta");
	TCase *codec = tcase_create("codec"), *cache = tcase_create("cache"),
	      *policy = tcase_create("policy");

	tcase_set_timeout(codec, 60);
	tcase_add_loop_test(codec, test_random_edits_round_trip, 0, 4);
	tcase_add_test(codec, test_sizes);
	tcase_add_test(codec, test_malformed_deltas);
	tcase_add_loop_test(codec, test_noise_is_bounded, 0, 2);
	tcase_add_test(codec, test_pages_of_a_frame);
	tcase_add_test(cache, test_cache_finds_what_was_put_last);
	tcase_add_test(cache, test_cache_does_not_thrash);
	tcase_add_test(cache, test_cache_is_bounded);
	tcase_add_test(policy, test_policy_is_off_on_a_fast_link);
	tcase_add_test(policy, test_policy_is_on_where_little_changes);
	tcase_add_test(policy, test_policy_only_samples_where_all_changes);
	tcase_add_test(policy, test_policy_in_between);
	suite_add_tcase(suite, codec);
	suite_add_tcase(suite, cache);
	suite_add_tcase(suite, policy);
	return suite_run(suite);
}
