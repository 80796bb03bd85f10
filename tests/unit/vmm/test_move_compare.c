/* SPDX-License-Identifier: Apache-2.0 */
/* What both sides tell of guest memory under SNM_VERIFY, and what a host makes of what another says. */
#include <check.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bitmap.h"
#include "base/bytes.h"
#include "tests/suite.h"
#include "vmm/move_compare.h"

#define NPAGES (70 * 512u - 100) /* 70 chunks */

static struct move_image a, b;
static uint8_t *raw;

static void setup(void)
{
	ck_assert_int_eq(move_image_init(&a, NPAGES, NULL), 0);
	ck_assert_int_eq(move_image_init(&b, NPAGES, NULL), 0);
	for (uint32_t i = 0; i < a.nchunks; i++)
		a.hashes[i] = i * UINT64_C(0x9e3779b97f4a7c15);
	a.state_sum = 77;
	raw = malloc(move_image_bytes(&a));
}

static void teardown(void)
{
	move_image_release(&a);
	move_image_release(&b);
	free(raw);
}

START_TEST(what_is_said_arrives)
{
	ck_assert_uint_eq(a.nchunks, 70);
	bitmap_set(a.skip, 3);
	bitmap_set(a.skip, 69);
	move_image_encode(raw, &a);
	ck_assert_int_eq(move_image_decode(raw, move_image_bytes(&a), &b, NULL), 0);
	ck_assert_uint_eq(b.state_sum, 77);
	ck_assert_uint_eq(move_image_left_out(&b), 2);
	ck_assert(bitmap_test(b.skip, 3) && bitmap_test(b.skip, 69));
	ck_assert_int_eq(move_image_differ(&a, &b, NULL), 0);
}
END_TEST

START_TEST(the_first_that_differs_is_named)
{
	struct error err = ERROR_INIT;
	memcpy(b.hashes, a.hashes, a.nchunks * sizeof *a.hashes);
	b.hashes[5] ^= 1;
	b.hashes[64] ^= 1;
	ck_assert_int_eq(move_image_differ(&b, &a, &err), -EBADMSG);
	ck_assert_str_eq(err.message,
			 "guest memory differs in 2 of 70 pieces, first in the 2048 KiB at byte 0xa00000");
	bitmap_set(b.skip, 5); /* that comes later */
	ck_assert_int_eq(move_image_differ(&b, &a, &err), -EBADMSG);
	ck_assert(strstr(err.message, "in 1 of 70"));
	bitmap_set(b.skip, 64);
	ck_assert_int_eq(move_image_differ(&b, &a, &err), 0);
}
END_TEST

START_TEST(pages_that_come_later_leave_out_their_chunk)
{
	uint64_t *pages = bitmap_alloc(NPAGES);
	bitmap_set(pages, 511);
	bitmap_set(pages, 1024);
	bitmap_set(pages, 1025);
	bitmap_set(pages, NPAGES - 1);
	move_image_skip(&a, pages);
	ck_assert_uint_eq(move_image_left_out(&a), 3);
	ck_assert(bitmap_test(a.skip, 0) && bitmap_test(a.skip, 2) && bitmap_test(a.skip, 69));
	free(pages);
}
END_TEST

START_TEST(nonsense_is_refused)
{
	uint32_t len = move_image_bytes(&a);
	struct error err = ERROR_INIT;
	move_image_encode(raw, &a);
	ck_assert_int_eq(move_image_decode(raw, len - 1, &b, &err), -EPROTO);
	ck_assert_int_eq(move_image_decode(raw, 0, &b, &err), -EPROTO);
	for (unsigned at = 0; at < 24; at++) {
		if (at >= 8 && at < 16) /* the sum may be anything */
			continue;
		raw[at] ^= 0x10;
		ck_assert_int_eq(move_image_decode(raw, len, &b, &err), -EPROTO);
		raw[at] ^= 0x10;
	}
	put_be64(raw + len - 8, UINT64_C(1) << 6); /* chunk 70 of 70 */
	ck_assert_int_eq(move_image_decode(raw, len, &b, &err), -EPROTO);
	ck_assert(strstr(err.message, "after the last"));
}
END_TEST

START_TEST(a_large_memory_has_larger_chunks)
{
	struct move_image im;
	uint64_t npages = (UINT64_C(256) << 30) / 4096;
	ck_assert_int_eq(move_image_init(&im, npages, NULL), 0);
	ck_assert_uint_eq(im.nchunks, MOVE_COMPARE_CHUNKS_MAX);
	ck_assert_uint_eq(im.chunk_pages, 2048);
	ck_assert_uint_lt(move_image_bytes(&im), 512 << 10);
	move_image_release(&im);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("move_compare");
	TCase *t = tcase_create("move_compare");
	tcase_add_checked_fixture(t, setup, teardown);
	tcase_add_test(t, what_is_said_arrives);
	tcase_add_test(t, the_first_that_differs_is_named);
	tcase_add_test(t, pages_that_come_later_leave_out_their_chunk);
	tcase_add_test(t, nonsense_is_refused);
	tcase_add_test(t, a_large_memory_has_larger_chunks);
	suite_add_tcase(suite, t);
	return suite_run(suite);
}
