/* SPDX-License-Identifier: Apache-2.0 */
/* The rings by themselves; tests of whole devices are in test_virtio_*.c. */
#include <check.h>
#include <errno.h>
#include <linux/virtio_ring.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/bitmap.h"
#include "base/bytes.h"
#include "tests/suite.h"
#include "vmm/virtqueue.h"

#define MEMORY_BYTES (4u << 20)
#define DESC	     0x1000u
#define AVAIL	     0x3000u
#define USED	     0x5000u
#define BUFFER	     0x10000u
#define SIZE	     8u

static struct guest_memory mem;
static struct virtqueue q;
static struct virtqueue_chain chain;

static void setup(void)
{
	struct error err = ERROR_INIT;

	ck_assert_int_eq(guest_memory_create(MEMORY_BYTES, &mem, &err), 0);
	virtqueue_init(&q, &mem, 256);
	q.size = SIZE;
	q.desc_gpa = DESC;
	q.avail_gpa = AVAIL;
	q.used_gpa = USED;
	ck_assert_msg(virtqueue_enable(&q, true, true, &err) == 0, "%s", err.message);
}

static void teardown(void)
{
	guest_memory_destroy(&mem);
}

static void desc(unsigned i, uint64_t addr, uint32_t len, uint16_t flags, uint16_t next)
{
	uint8_t *p = mem.base + DESC + 16 * i;

	put_le64(p, addr);
	put_le32(p + 8, len);
	put_le16(p + 12, flags);
	put_le16(p + 14, next);
}

static void offer(uint16_t head)
{
	uint16_t idx = get_le16(mem.base + AVAIL + 2);

	put_le16(mem.base + AVAIL + 4 + 2 * (idx % SIZE), head);
	put_le16(mem.base + AVAIL + 2, (uint16_t)(idx + 1));
}

START_TEST(test_indices_wrap_at_65536)
{
	desc(0, BUFFER, 16, 0, 0);
	for (unsigned i = 0; i < 70000; i++) {
		offer(0);
		ck_assert_int_eq(virtqueue_pop(&q, &chain, NULL), 1);
		ck_assert_int_eq(virtqueue_pop(&q, &chain, NULL), 0);
		virtqueue_push(&q, 0, i);
		ck_assert_uint_eq(get_le16(mem.base + USED + 2), (uint16_t)(i + 1));
		ck_assert_uint_eq(get_le32(mem.base + USED + 4 + 8 * (i % SIZE) + 4), i);
	}
	ck_assert_uint_eq(q.next_avail, (uint16_t)70000);
}
END_TEST

START_TEST(test_copy_helpers)
{
	uint8_t buf[32];

	desc(0, BUFFER, 3, VRING_DESC_F_NEXT, 1);
	desc(1, BUFFER + 100, 5, VRING_DESC_F_NEXT, 2);
	desc(2, BUFFER + 4094, 4, VRING_DESC_F_NEXT | VRING_DESC_F_WRITE, 3);
	desc(3, BUFFER + 9000, 2, VRING_DESC_F_WRITE, 0);
	memcpy(mem.base + BUFFER, "abc", 3);
	memcpy(mem.base + BUFFER + 100, "defgh", 5);
	offer(0);
	ck_assert_int_eq(virtqueue_pop(&q, &chain, NULL), 1);
	ck_assert_uint_eq(chain.nout, 2);
	ck_assert_uint_eq(chain.nin, 2);
	ck_assert(virtqueue_chain_read(&chain, 1, buf, 6));
	ck_assert_int_eq(memcmp(buf, "bcdefg", 6), 0);
	ck_assert(!virtqueue_chain_read(&chain, 3, buf, 6));
	ck_assert(!virtqueue_chain_read(&chain, UINT64_MAX, buf, 2));
	ck_assert(virtqueue_chain_write(&mem, &chain, 1, "WXYZ", 4));
	ck_assert_int_eq(memcmp(mem.base + BUFFER + 4095, "WXY", 3), 0);
	ck_assert_int_eq(memcmp(mem.base + BUFFER + 9000, "Z", 2), 0);
	ck_assert(!virtqueue_chain_write(&mem, &chain, 3, "WXYZ", 4));
	/* pages of BUFFER+4095.. (two) and BUFFER+9000 (the third) */
	ck_assert_uint_eq(bitmap_count(mem.vmm_dirty, MEMORY_BYTES / 4096), 3);
	ck_assert(bitmap_test(mem.vmm_dirty, BUFFER / 4096));
	ck_assert(bitmap_test(mem.vmm_dirty, BUFFER / 4096 + 2));
}
END_TEST

START_TEST(test_event_idx_signals_at_the_wish)
{
	uint8_t *used_event = mem.base + AVAIL + 4 + 2 * SIZE;

	put_le16(used_event, 3);
	ck_assert(virtqueue_should_signal(&q)); /* nothing is known yet: better once too often */
	for (unsigned i = 0; i < 6; i++) {
		virtqueue_push(&q, 0, 0);
		ck_assert_int_eq(virtqueue_should_signal(&q), i == 3);
	}
	/* a batch that passes the wish */
	put_le16(used_event, 8);
	virtqueue_fill(&q, 0, 1, 0);
	virtqueue_fill(&q, 1, 2, 0);
	virtqueue_fill(&q, 2, 3, 0);
	virtqueue_fill(&q, 3, 4, 0);
	ck_assert_uint_eq(get_le16(mem.base + USED + 2), 6);
	virtqueue_publish(&q, 4);
	ck_assert_uint_eq(get_le16(mem.base + USED + 2), 10);
	ck_assert(virtqueue_should_signal(&q));
	ck_assert(!virtqueue_should_signal(&q));
}
END_TEST

START_TEST(test_flags_without_event_idx)
{
	ck_assert_int_eq(virtqueue_enable(&q, false, false, NULL), 0);
	virtqueue_push(&q, 0, 0);
	ck_assert(virtqueue_should_signal(&q));
	put_le16(mem.base + AVAIL, VRING_AVAIL_F_NO_INTERRUPT);
	virtqueue_push(&q, 0, 0);
	ck_assert(!virtqueue_should_signal(&q));
	/* indirect was not negotiated */
	desc(0, BUFFER, 16, VRING_DESC_F_INDIRECT, 0);
	offer(0);
	ck_assert_int_eq(virtqueue_pop(&q, &chain, NULL), -EINVAL);
	ck_assert_uint_eq(q.next_avail, 0);
}
END_TEST

START_TEST(test_longest_chain)
{
	uint8_t *table = mem.base + BUFFER;

	/* 257 descriptors in an indirect table are one too many, 256 are not */
	for (unsigned n = 256; n <= 257; n++) {
		for (unsigned i = 0; i < n; i++) {
			put_le64(table + 16 * i, BUFFER + 0x10000);
			put_le32(table + 16 * i + 8, 1);
			put_le16(table + 16 * i + 12, i + 1 < n ? VRING_DESC_F_NEXT : 0);
			put_le16(table + 16 * i + 14, (uint16_t)(i + 1));
		}
		desc(0, BUFFER, 16 * n, VRING_DESC_F_INDIRECT, 0);
		offer(0);
		ck_assert_int_eq(virtqueue_pop(&q, &chain, NULL), n == 256 ? 1 : -EINVAL);
	}
}
END_TEST

/* Saved and loaded indices; those of a queue with requests in flight are refused. */
START_TEST(test_save_load)
{
	for (unsigned inflight = 0; inflight < 2; inflight++) {
		struct state_writer *w = state_writer_create();
		struct state_reader *r;
		struct virtqueue p;
		struct error err = ERROR_INIT;
		const uint8_t *buf;
		size_t len;
		uint32_t version;
		int rc;

		q.next_avail = 65535;
		q.used_idx = (uint16_t)(65535 - inflight);
		q.signalled = 65530;
		q.signalled_valid = true;
		q.vector = 1;
		state_section_begin(w, "q", 1);
		virtqueue_save(&q, w);
		state_section_end(w);
		ck_assert_int_eq(state_writer_finish(w, &buf, &len, &err), 0);
		ck_assert_int_eq(state_reader_open(buf, len, &r, &err), 0);
		ck_assert_int_eq(state_reader_section(r, "q", 1, &version, &err), 0);
		virtqueue_init(&p, &mem, 256);
		rc = virtqueue_load(&p, r, true, true, true, &err);
		if (inflight) {
			ck_assert_int_eq(rc, -EINVAL);
		} else {
			ck_assert_msg(rc == 0, "%s", err.message);
			ck_assert_int_eq(state_reader_section_end(r, &err), 0);
			ck_assert(p.enabled && p.event_idx && p.indirect && p.signalled_valid);
			ck_assert_uint_eq(p.next_avail, 65535);
			ck_assert_uint_eq(p.used_idx, 65535);
			ck_assert_uint_eq(p.signalled, 65530);
			ck_assert_uint_eq(p.vector, 1);
			ck_assert_uint_eq(p.size, SIZE);
			ck_assert_ptr_eq(p.used, q.used);
		}
		state_reader_free(r);
		state_writer_free(w);
	}
}
END_TEST

/* A guest that rewrites its descriptors all the time: what was accepted stays inside memory. */
static bool stop;
static void *scribbler(void *unused)
{
	unsigned seed = 1;

	while (!__atomic_load_n(&stop, __ATOMIC_RELAXED)) {
		seed = seed * 1103515245 + 12345;
		desc(seed >> 16 & 7, seed & 0x10000 ? UINT64_MAX - seed : BUFFER + (seed & 0xffff),
		     seed & 0x20000 ? UINT32_MAX : seed >> 20, (uint16_t)(seed >> 8 & 7),
		     (uint16_t)(seed >> 12 & 15));
	}
	return NULL;
}

START_TEST(test_descriptors_change_while_read)
{
	pthread_t t;
	unsigned taken = 0;

	ck_assert_int_eq(pthread_create(&t, NULL, scribbler, NULL), 0);
	for (unsigned i = 0; i < 200000; i++) {
		offer((uint16_t)(i % SIZE));
		if (virtqueue_pop(&q, &chain, NULL) != 1) {
			q.next_avail++;
			continue;
		}
		taken++;
		for (unsigned s = 0; s < chain.nout + chain.nin; s++) {
			ck_assert_ptr_eq(chain.seg[s].ptr, mem.base + chain.seg[s].gpa);
			ck_assert(range_fits(chain.seg[s].gpa, chain.seg[s].len, MEMORY_BYTES));
		}
	}
	__atomic_store_n(&stop, true, __ATOMIC_RELAXED);
	pthread_join(t, NULL);
	ck_assert_uint_gt(taken, 0);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("virtqueue");
	TCase *t = tcase_create("virtqueue");

	tcase_add_checked_fixture(t, setup, teardown);
	tcase_add_test(t, test_indices_wrap_at_65536);
	tcase_add_test(t, test_copy_helpers);
	tcase_add_test(t, test_event_idx_signals_at_the_wish);
	tcase_add_test(t, test_flags_without_event_idx);
	tcase_add_test(t, test_longest_chain);
	tcase_add_test(t, test_save_load);
	tcase_add_test(t, test_descriptors_change_while_read);
	suite_add_tcase(s, t);
	return suite_run(s);
}
