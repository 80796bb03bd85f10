/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/bitmap.h"
#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/fault.h"
#include "base/huge.h"
#include "base/rate_limit.h"
#include "tests/suite.h"

START_TEST(an_error_grows_its_context_on_the_way_up)
{
	struct error e = ERROR_INIT;
	ck_assert(!error_is_set(&e));
	ck_assert_int_eq(error_errno(&e, ENOSPC, "write at %d", 4096), -ENOSPC);
	ck_assert_int_eq(error_prefix(&e, "disk %s", "root"), -ENOSPC);
	ck_assert_str_eq(e.message, "disk root: write at 4096: No space left on device");
	ck_assert_int_eq(error_set(&e, -EPERM, "no"), -EPERM);
	ck_assert_str_eq(e.message, "no");
	ck_assert_int_eq(error_set(NULL, ENOENT, "unheard"), -ENOENT);
	ck_assert_int_eq(error_prefix(NULL, "unheard"), -EIO);
}
END_TEST

START_TEST(a_long_error_is_cut_not_overrun)
{
	struct error e = ERROR_INIT;
	char text[2000];
	memset(text, 'x', sizeof text - 1);
	text[sizeof text - 1] = '\0';
	error_errno(&e, EIO, "%s", text);
	ck_assert_uint_eq(strlen(e.message), ERROR_MESSAGE_BYTES - 1);
	for (int i = 0; i < 20; i++)
		error_prefix(&e, "context %d", i);
	ck_assert_uint_lt(strlen(e.message), ERROR_MESSAGE_BYTES);
}
END_TEST

/* Against the plain loop, at every offset and length around word borders. */
START_TEST(bitmap_ranges_agree_with_single_bits)
{
	for (size_t first = 0; first < 130; first += 7) {
		for (size_t n = 0; first + n <= 200; n += 13) {
			uint64_t *a = bitmap_alloc(200), *b = bitmap_alloc(200);
			bitmap_set_range(a, first, n);
			for (size_t i = first; i < first + n; i++)
				bitmap_set(b, i);
			ck_assert_mem_eq(a, b, BITMAP_WORDS(200) * 8);
			ck_assert_uint_eq(bitmap_count(a, 200), n);
			if (n) {
				ck_assert_uint_eq(bitmap_next_set(a, 200, 0), first);
				ck_assert_uint_eq(bitmap_next_clear(a, 200, first), first + n);
			} else {
				ck_assert_uint_eq(bitmap_next_set(a, 200, 0), 200);
			}
			bitmap_clear_range(a, first, n / 2);
			ck_assert_uint_eq(bitmap_count(a, 200), n - n / 2);
			free(a);
			free(b);
		}
	}
}
END_TEST

static uint64_t *shared;
static void *setter(void *arg)
{
	size_t start = (size_t)arg;
	for (size_t i = start; i < 64 * 1024; i += 2)
		bitmap_set_atomic(shared, i);
	return NULL;
}

START_TEST(no_bit_is_lost_between_setting_and_taking)
{
	const size_t n = 64 * 1024;
	pthread_t t[2];
	shared = bitmap_alloc(n);
	uint64_t *taken = bitmap_alloc(n);
	for (size_t i = 0; i < 2; i++)
		pthread_create(&t[i], NULL, setter, (void *)i);
	for (int i = 0; i < 100; i++)
		bitmap_take_words(taken, shared, 0, BITMAP_WORDS(n));
	for (size_t i = 0; i < 2; i++)
		pthread_join(t[i], NULL);
	bitmap_take_words(taken, shared, 0, BITMAP_WORDS(n));
	ck_assert_uint_eq(bitmap_count(taken, n), n);
	ck_assert_uint_eq(bitmap_count(shared, n), 0);
	free(taken);
	free(shared);
}
END_TEST

START_TEST(zero_test_sees_every_byte)
{
	unsigned char buf[600] = {0};
	for (size_t at = 0; at < 40; at++)
		for (size_t len = 0; at + len <= sizeof buf; len += 31) {
			ck_assert(bytes_all_zero(buf + at, len));
			if (!len)
				continue;
			buf[at + len - 1] = 1;
			bool seen = !bytes_all_zero(buf + at, len);
			buf[at + len - 1] = 0;
			ck_assert(seen);
		}
}
END_TEST

START_TEST(bytes_and_ranges)
{
	unsigned char b[9];
	put_be32(b + 1, 0x01020304);
	ck_assert_uint_eq(b[1], 1);
	ck_assert_uint_eq(get_be32(b + 1), 0x01020304);
	ck_assert_uint_eq(get_le32(b + 1), 0x04030201);
	put_le64(b + 1, UINT64_C(0x1122334455667788));
	ck_assert_uint_eq(b[1], 0x88);
	ck_assert(range_fits(0, 0, 0));
	ck_assert(range_fits(10, 5, 15));
	ck_assert(!range_fits(10, 6, 15));
	ck_assert(!range_fits(UINT64_MAX, 2, UINT64_MAX));
	ck_assert(!range_fits(2, UINT64_MAX, UINT64_MAX));
}
END_TEST

START_TEST(fault_points)
{
	char dir[] = "/tmp/fault-XXXXXX", path[64];
	ck_assert_ptr_nonnull(mkdtemp(dir));
	setenv("SNM_FAULT", "one:fail,two:hold", 1);
	setenv("SNM_FAULT_DIR", dir, 1);
	ck_assert(fault_point("one"));
	ck_assert(!fault_point("on"));
	ck_assert(!fault_point("three"));
	snprintf(path, sizeof path, "%s/two.go", dir);
	close(open(path, O_CREAT | O_WRONLY, 0600));
	ck_assert(!fault_point("two"));
	unlink(path);
	snprintf(path, sizeof path, "%s/two.hit", dir);
	ck_assert_int_eq(unlink(path), 0);
	rmdir(dir);
}
END_TEST

START_TEST(cleanup_closes_and_steals)
{
	int kept, copy;
	{
		CLEANUP_FD int a = open("/dev/null", O_RDONLY);
		CLEANUP_FD int b = open("/dev/null", O_RDONLY);
		copy = a;
		kept = steal_fd(&b);
		ck_assert_int_eq(b, -1);
	}
	ck_assert_int_eq(fcntl(copy, F_GETFD), -1);
	ck_assert_int_ge(fcntl(kept, F_GETFD), 0);
	close(kept);
	uint64_t t = clock_now_ms();
	clock_sleep_ms(20);
	ck_assert_uint_ge(clock_now_ms() - t, 19);
}
END_TEST

START_TEST(huge_memory_is_aligned_zeroed_and_writable)
{
	const size_t sizes[] = {1, 4096, (size_t)2 << 20, ((size_t)2 << 20) + 1, (size_t)8 << 20};
	for (size_t i = 0; i < ARRAY_SIZE(sizes); i++) {
		uint8_t *p = huge_alloc(sizes[i]);
		ck_assert_ptr_nonnull(p);
		ck_assert_uint_eq((uintptr_t)p % (2 << 20), 0);
		ck_assert(bytes_all_zero(p, sizes[i]));
		memset(p, 0xa5, sizes[i]);
		huge_discard(p, sizes[i]);
		ck_assert(bytes_all_zero(p, sizes[i]));
		huge_free(p, sizes[i]);
	}
	huge_free(NULL, 1);
}
END_TEST

START_TEST(a_rate_limit_holds_the_average_and_changes_at_once)
{
	struct rate_limit rl;
	rate_limit_init(&rl, 10000000);
	ck_assert_uint_eq(rate_limit_wait_ns(NULL), 0);
	rate_limit_take(NULL, 1);
	uint64_t begin = clock_now_ns();
	rate_limit_take(&rl, 20000000); /* two seconds, less what an idle sender may catch up on */
	uint64_t wait = rate_limit_wait_ns(&rl);
	ck_assert_uint_le(wait, 2000000000u);
	ck_assert_uint_ge(wait + (clock_now_ns() - begin), 1900000000u);
	/* the same bytes at ten times the rate, and back at half of the first */
	rate_limit_set(&rl, 100000000);
	ck_assert_uint_eq(rate_limit_get(&rl), 100000000);
	ck_assert_uint_le(rate_limit_wait_ns(&rl), 200000000u);
	rate_limit_set(&rl, 5000000);
	wait = rate_limit_wait_ns(&rl);
	ck_assert_uint_le(wait, 4000000000u);
	/* a guest's writes make others wait for half a second at most, and take nothing off what they wait
	 * for anyway */
	rate_limit_take_urgent(&rl, 1u << 30);
	ck_assert_uint_le(rate_limit_wait_ns(&rl), wait);
	rate_limit_set(&rl, 0);
	ck_assert_uint_eq(rate_limit_wait_ns(&rl), 0);
	rate_limit_set(&rl, 1000000);
	rate_limit_take_urgent(&rl, 1u << 30);
	ck_assert_uint_le(rate_limit_wait_ns(&rl), 500000000u);
	/* many small pieces cost as much as one big one */
	rate_limit_set(&rl, 0);
	rate_limit_set(&rl, 1000000);
	begin = clock_now_ns();
	for (unsigned i = 0; i < 1000; i++)
		rate_limit_take(&rl, 3000);
	wait = rate_limit_wait_ns(&rl) + (clock_now_ns() - begin);
	ck_assert_uint_ge(wait, 2900000000u);
	rate_limit_destroy(&rl);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("base");
	TCase *tc = tcase_create("base");
	tcase_add_test(tc, an_error_grows_its_context_on_the_way_up);
	tcase_add_test(tc, a_long_error_is_cut_not_overrun);
	tcase_add_test(tc, bitmap_ranges_agree_with_single_bits);
	tcase_add_test(tc, no_bit_is_lost_between_setting_and_taking);
	tcase_add_test(tc, zero_test_sees_every_byte);
	tcase_add_test(tc, bytes_and_ranges);
	tcase_add_test(tc, fault_points);
	tcase_add_test(tc, cleanup_closes_and_steals);
	tcase_add_test(tc, huge_memory_is_aligned_zeroed_and_writable);
	tcase_add_test(tc, a_rate_limit_holds_the_average_and_changes_at_once);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
