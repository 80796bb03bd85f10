/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/bitmap.h"
#include "tests/suite.h"
#include "vmm/memory.h"

#define GIB (UINT64_C(1) << 30)

START_TEST(sizes_are_checked)
{
	struct guest_memory m;
	ck_assert_int_eq(guest_memory_create(0, &m, NULL), -EINVAL);
	ck_assert_int_eq(guest_memory_create(4096, &m, NULL), -EINVAL);
	ck_assert_int_eq(guest_memory_create(UINT64_MAX & ~UINT64_C(0x1fffff), &m, NULL), -EINVAL);
	guest_memory_destroy(&m);
}
END_TEST

START_TEST(low_memory_only)
{
	struct guest_memory m;
	ck_assert_int_eq(guest_memory_create(64 << 20, &m, NULL), 0);
	ck_assert_ptr_eq(guest_memory_ptr(&m, 0, 64 << 20), m.base);
	ck_assert_ptr_null(guest_memory_ptr(&m, 0, (64 << 20) + 1));
	ck_assert_ptr_null(guest_memory_ptr(&m, 64 << 20, 1));
	ck_assert_ptr_null(guest_memory_ptr(&m, MEMORY_HIGH_BASE, 1));
	ck_assert_ptr_null(guest_memory_ptr(&m, UINT64_MAX, 2));
	ck_assert_ptr_null(guest_memory_ptr(&m, 4096, UINT64_MAX));
	ck_assert_int_eq(guest_memory_write(&m, (64 << 20) - 2, "abc", 3), -EFAULT);
	guest_memory_destroy(&m);
}
END_TEST

START_TEST(high_memory_goes_on_at_4_gib)
{
	struct guest_memory m;
	ck_assert_int_eq(guest_memory_create(4 * GIB, &m, NULL), 0);
	ck_assert(m.low_bytes == 3 * GIB);
	ck_assert_ptr_eq(guest_memory_ptr(&m, MEMORY_HIGH_BASE, GIB), m.base + 3 * GIB);
	ck_assert_ptr_null(guest_memory_ptr(&m, 3 * GIB - 1, 2)); /* crosses the hole */
	ck_assert_ptr_null(guest_memory_ptr(&m, 3 * GIB, 1));
	ck_assert_ptr_null(guest_memory_ptr(&m, MEMORY_HIGH_BASE - 1, 2));
	ck_assert_ptr_null(guest_memory_ptr(&m, MEMORY_HIGH_BASE + GIB, 1));
	ck_assert_int_eq(guest_memory_write(&m, MEMORY_HIGH_BASE + 8192, "x", 1), 0);
	ck_assert(bitmap_test(m.vmm_dirty, 3 * GIB / 4096 + 2));
	ck_assert_uint_eq(bitmap_count(m.vmm_dirty, m.size_bytes / 4096), 1);
	guest_memory_destroy(&m);
}
END_TEST

START_TEST(writes_mark_every_page_they_touch)
{
	struct guest_memory m;
	uint8_t buf[8192] = {1}, back[8192];
	ck_assert_int_eq(guest_memory_create(2 << 20, &m, NULL), 0);
	ck_assert_uint_eq((uintptr_t)m.base % (2 << 20), 0); /* or there are no huge pages */
	ck_assert_int_eq(guest_memory_write(&m, 4095, buf, sizeof buf), 0);
	ck_assert_int_eq(guest_memory_read(&m, 4095, back, sizeof back), 0);
	ck_assert_mem_eq(buf, back, sizeof buf);
	ck_assert_uint_eq(m.vmm_dirty[0], 7);
	guest_memory_mark_dirty(&m, 64 * 4096, 1);
	ck_assert_uint_eq(m.vmm_dirty[1], 1);
	guest_memory_mark_dirty(&m, 65 * 4096, 0);
	guest_memory_mark_dirty(&m, 2 << 20, 4096);
	ck_assert_uint_eq(m.vmm_dirty[1], 1);
	guest_memory_destroy(&m);
}
END_TEST

START_TEST(never_touched_memory_is_a_hole)
{
	struct guest_memory m;
	struct stat st;
	ck_assert_int_eq(guest_memory_create(64 << 20, &m, NULL), 0);
	ck_assert_int_eq(guest_memory_write(&m, 32 << 20, "x", 1), 0);
	struct mem_space space = guest_memory_space(&m);
	ck_assert_uint_eq(space.npages, (64 << 20) / 4096);
	ck_assert_int_eq(lseek(space.fd, 0, SEEK_DATA), 32 << 20);
	ck_assert_int_eq(fstat(space.fd, &st), 0);
	ck_assert_int_le(st.st_blocks * 512, 2 << 20);
	ck_assert_int_eq(ftruncate(space.fd, 4096), -1); /* sealed: the mapping cannot lose its ground */
	guest_memory_destroy(&m);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("memory");
	TCase *t = tcase_create("memory");
	tcase_add_test(t, sizes_are_checked);
	tcase_add_test(t, low_memory_only);
	tcase_add_test(t, high_memory_goes_on_at_4_gib);
	tcase_add_test(t, writes_mark_every_page_they_touch);
	tcase_add_test(t, never_touched_memory_is_a_hole);
	suite_add_tcase(s, t);
	return suite_run(s);
}
