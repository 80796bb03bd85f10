/* SPDX-License-Identifier: Apache-2.0 */
#include "virtio_rig.h"

#include <linux/virtio_balloon.h>

#include "tests/suite.h"
#include "vmm/virtqueue.h"

#define F(bit)	   (UINT64_C(1) << (bit))
#define FEATURES   (F(VIRTIO_BALLOON_F_DEFLATE_ON_OOM) | F(VIRTIO_BALLOON_F_REPORTING))
#define PAGE	   4096u
#define PAGES	   (RIG_MEMORY_BYTES / PAGE)
#define GIVEN	   0x800000u /* the upper half of memory: what tests give back */
#define REPORTING  4u
#define REPORTING2 2u /* of drivers that number queues without gaps */

static struct rig r;
static struct virtio_balloon *balloon;

static void begin(void)
{
	struct error err = ERROR_INIT;

	rig_init(&r);
	ck_assert_msg(virtio_balloon_create(r.m, RIG_SLOT, &balloon, &err) == 0, "%s", err.message);
	rig_probe(&r);
	memset(r.mem.base, 0xa5, RIG_MEMORY_BYTES);
	RIG_RESUME(&r);
	rig_start_driver(&r, FEATURES, RIG_QUEUES);
	memset(r.mem.vmm_dirty, 0, BITMAP_WORDS(PAGES) * 8);
}

static void end(void)
{
	rig_free(&r);
}

static bool is_hole(uint64_t gpa)
{
	uint64_t page = gpa / PAGE * PAGE;

	return lseek(r.mem.fd, (off_t)page, SEEK_DATA) != (off_t)page;
}

/* Exactly [from, to) is gone, marked and reads as zeroes; nothing else was touched but the rings. */
static void check_given(uint64_t from, uint64_t to)
{
	for (uint64_t gpa = GIVEN; gpa < RIG_MEMORY_BYTES; gpa += PAGE) {
		bool given = gpa >= from && gpa < to;

		ck_assert_msg(is_hole(gpa) == given, "0x%llx", (unsigned long long)gpa);
		ck_assert_msg(bitmap_test(r.mem.vmm_dirty, gpa / PAGE) == given, "0x%llx is %smarked",
			      (unsigned long long)gpa, given ? "not " : "");
	}
	if (from < to)
		ck_assert_uint_eq(*rig_ptr(&r, from), 0);
	ck_assert_uint_eq(*rig_ptr(&r, 0x3000), 0xa5);
}

static void send(unsigned queue, const struct rig_buffer *b, unsigned n)
{
	uint16_t head = rig_add(&r, queue, b, n);
	uint32_t len;

	rig_kick(&r, queue);
	ck_assert_uint_eq(rig_take_used(&r, queue, &len), head);
	ck_assert_uint_eq(len, 0);
}

static void send_pfns(unsigned queue, const uint32_t *pfns, unsigned n)
{
	struct rig_buffer b = {rig_alloc(&r, 4 * n), 4 * n, false};

	for (unsigned i = 0; i < n; i++)
		put_le32(rig_ptr(&r, b.gpa) + 4 * i, pfns[i]);
	send(queue, &b, 1);
}

START_TEST(test_config)
{
	begin();
	ck_assert_uint_eq(rig_config_read(&r, 0, 4), 0x10451af4);
	ck_assert_uint_eq(rig_offered(&r) & 0xffffff, FEATURES);
	ck_assert_uint_eq(rig_read(&r, r.device, 4), 0);
	virtio_balloon_set_target(balloon, 5 * PAGE);
	RIG_UNTIL(rig_interrupts(0) > 0);
	ck_assert_uint_eq(rig_read(&r, r.device, 4), 5);
	rig_write(&r, r.device + 4, 3, 4);
	ck_assert_uint_eq(rig_read(&r, r.device + 4, 4), 3);

	struct machine_balloon b;
	virtio_balloon_state(balloon, &b);
	ck_assert_uint_eq(b.target_bytes, RIG_MEMORY_BYTES - 5 * PAGE);
	ck_assert_uint_eq(b.actual_bytes, RIG_MEMORY_BYTES - 3 * PAGE);
	ck_assert(b.driver);
	/* not the driver's to write; not a whole field; beyond the end */
	rig_write(&r, r.device, 77, 4);
	rig_write(&r, r.device + 4, 77, 2);
	rig_write(&r, r.device + 6, 77, 4);
	rig_write(&r, r.device + 8, 77, 4);
	ck_assert_uint_eq(rig_read(&r, r.device, 8), 5 | UINT64_C(3) << 32);
	/* a lie, and a wish beyond all memory */
	rig_write(&r, r.device + 4, 0xffffffff, 4);
	virtio_balloon_set_target(balloon, UINT64_MAX);
	virtio_balloon_state(balloon, &b);
	ck_assert_uint_eq(b.target_bytes, 0);
	ck_assert_uint_eq(b.actual_bytes, 0);
	/* a new driver begins with an empty balloon and the old target */
	rig_set_status(&r, 0);
	virtio_balloon_state(balloon, &b);
	ck_assert_uint_eq(b.actual_bytes, RIG_MEMORY_BYTES);
	ck_assert_uint_eq(b.target_bytes, 0);
	ck_assert(!b.driver);
	end();
}
END_TEST

START_TEST(test_inflate)
{
	uint32_t pfns[300];

	begin();
	/* up, down, in no order, and some twice */
	for (unsigned i = 0; i < 300; i++)
		pfns[i] = (GIVEN + 0x10000) / PAGE + (i < 64 ? i : i < 128 ? 191 - i : 128 + i * 7 % 128);
	send_pfns(0, pfns, 300);
	check_given(GIVEN + 0x10000, GIVEN + 0x10000 + 256 * PAGE);
	RIG_UNTIL(rig_interrupts(1) > 0);
	/* but for the one that was looked at */
	ck_assert_uint_eq(guest_memory_resident_bytes(&r.mem), RIG_MEMORY_BYTES - 255 * PAGE);
	/* deflating only says so: whoever writes has the page */
	send_pfns(1, pfns, 10);
	*rig_ptr(&r, GIVEN + 0x10000) = 1;
	ck_assert(!is_hole(GIVEN + 0x10000));
	ck_assert_uint_eq(rig_status(&r), 15);
	end();
}
END_TEST

START_TEST(test_inflate_hostile)
{
	const uint32_t pfns[] = {PAGES, PAGES - 1, 0xffffffff, 0x80000000, 0x100000, 0xc0000};
	struct rig_buffer odd = {0, 7, false}, empty = {0, 0, false}, readable = {0, 8, true};

	begin();
	send_pfns(0, pfns, ARRAY_SIZE(pfns));
	check_given(RIG_MEMORY_BYTES - PAGE, RIG_MEMORY_BYTES);
	/* half a number; nothing; a buffer of the wrong direction */
	memset(rig_ptr(&r, RIG_MEMORY_BYTES - PAGE), 0xa5, PAGE);
	memset(r.mem.vmm_dirty, 0, BITMAP_WORDS(PAGES) * 8);
	odd.gpa = empty.gpa = readable.gpa = rig_alloc(&r, 8);
	put_le32(rig_ptr(&r, odd.gpa), PAGES - 2);
	put_le32(rig_ptr(&r, odd.gpa) + 4, PAGES - 3);
	send(0, &odd, 1);
	send(0, &empty, 1);
	send(0, &readable, 1);
	check_given(RIG_MEMORY_BYTES - 2 * PAGE, RIG_MEMORY_BYTES - PAGE);
	ck_assert_uint_eq(rig_status(&r), 15);
	end();
}
END_TEST

/* The same memory by every number that a driver may take for the queue. */
START_TEST(test_report)
{
	const unsigned queue = _i ? REPORTING2 + (unsigned)_i - 1 : REPORTING;
	/* several turns long; only whole pages count */
	struct rig_buffer b[] = {{GIVEN + 100, 2 * PAGE, true},
				 {GIVEN + 3 * PAGE, PAGE, true},
				 {GIVEN + 4 * PAGE, 0x700000, true},
				 {GIVEN + 4 * PAGE + 0x700000, PAGE + 1, true},
				 {GIVEN + 16 * PAGE, PAGE, true}};

	begin();
	send(queue, b, ARRAY_SIZE(b));
	ck_assert(!is_hole(GIVEN));
	ck_assert(!is_hole(GIVEN + 2 * PAGE));
	ck_assert(is_hole(GIVEN + PAGE));
	*rig_ptr(&r, GIVEN + PAGE) = 0xa5;
	bitmap_clear(r.mem.vmm_dirty, GIVEN / PAGE + 1);
	check_given(GIVEN + 3 * PAGE, GIVEN + 5 * PAGE + 0x700000);
	end();
}
END_TEST

START_TEST(test_report_hostile)
{
	struct rig_buffer beyond = {RIG_MEMORY_BYTES - PAGE, 2 * PAGE, true},
			  wrap = {UINT64_MAX - PAGE + 1, PAGE, true}, hole = {MEMORY_HIGH_BASE, PAGE, true},
			  out = {GIVEN, 16 * PAGE, false}, nothing = {GIVEN, 0, true},
			  over[3] = {{GIVEN, 8 * PAGE, true},
				     {GIVEN, 8 * PAGE, true},
				     {GIVEN + PAGE, PAGE, true}};
	const struct rig_buffer *bad[] = {&beyond, &wrap, &hole};

	begin();
	send(REPORTING, &out, 1);
	send(REPORTING, &nothing, 1);
	check_given(0, 0);
	send(REPORTING, over, 3);
	check_given(GIVEN, GIVEN + 8 * PAGE);
	/* what is not RAM is the driver's fault: nothing of the chain is done, and it has to reset */
	for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
		rig_start_driver(&r, FEATURES, RIG_QUEUES);
		rig_add(&r, REPORTING, bad[i], 1);
		rig_kick(&r, REPORTING);
		RIG_UNTIL(rig_status(&r) & VIRTIO_CONFIG_S_NEEDS_RESET);
		ck_assert_uint_eq(rig_used_idx(&r, REPORTING), 0);
	}
	ck_assert(!is_hole(RIG_MEMORY_BYTES - PAGE));
	end();
}
END_TEST

/* All of its memory, its rings included: the guest has broken itself, and nothing else. */
START_TEST(test_report_itself)
{
	struct rig_buffer all = {0, RIG_MEMORY_BYTES, true};

	begin();
	rig_add(&r, REPORTING, &all, 1);
	rig_kick(&r, REPORTING);
	RIG_UNTIL(is_hole(r.q[REPORTING].desc));
	rig_start_driver(&r, FEATURES, RIG_QUEUES);
	ck_assert_uint_eq(rig_status(&r), 15);
	end();
}
END_TEST

/* A full queue of the longest requests there are does not keep anybody who pauses, and goes on after that. */
START_TEST(test_pause_between_turns)
{
	struct rig_buffer all[VIRTQUEUE_CHAIN_MAX];
	uint64_t before;
	uint16_t used;

	begin();
	rig_start_driver(&r, FEATURES | F(VIRTIO_RING_F_INDIRECT_DESC), RIG_QUEUES);
	for (unsigned i = 0; i < VIRTQUEUE_CHAIN_MAX; i++)
		all[i] = (struct rig_buffer){GIVEN, RIG_MEMORY_BYTES - GIVEN, true};
	for (unsigned i = 0; i < RIG_QUEUE_SIZE; i++)
		rig_add_indirect(&r, REPORTING, all, VIRTQUEUE_CHAIN_MAX);
	rig_kick(&r, REPORTING);
	clock_sleep_ms(3);
	before = clock_now_ms();
	RIG_PAUSE(&r);
	ck_assert_uint_lt(clock_now_ms() - before, 1000);
	used = rig_used_idx(&r, REPORTING);
	ck_assert_uint_lt(used, RIG_QUEUE_SIZE);
	memset(rig_ptr(&r, GIVEN), 0xa5, RIG_MEMORY_BYTES - GIVEN);
	clock_sleep_ms(20);
	ck_assert(!is_hole(GIVEN) && !is_hole(RIG_MEMORY_BYTES - PAGE));
	ck_assert_uint_eq(rig_used_idx(&r, REPORTING), used);
	ck_assert_int_eq(r.m->ops->drain(r.m->dev, 0), 0);
	RIG_RESUME(&r);
	RIG_UNTIL(rig_used_idx(&r, REPORTING) == RIG_QUEUE_SIZE);
	check_given(GIVEN, RIG_MEMORY_BYTES);
	end();
}
END_TEST

/* A move in the middle of a request: it begins anew, target and balloon go on. */
START_TEST(test_save_load)
{
	struct rig_buffer b = {GIVEN, RIG_MEMORY_BYTES - GIVEN, true};
	struct virtio_balloon *other;
	struct machine_balloon s;
	struct error err = ERROR_INIT;
	struct machine *to;

	begin();
	virtio_balloon_set_target(balloon, 9 * PAGE);
	rig_write(&r, r.device + 4, 4, 4);
	RIG_PAUSE(&r);
	rig_add(&r, REPORTING, &b, 1);
	to = rig_machine(&r.mem);
	ck_assert_int_eq(virtio_balloon_create(to, RIG_SLOT, &other, &err), 0);
	ck_assert_msg(rig_transfer(&r, to, &err) == 0, "%s", err.message);
	rig_machine_free(r.m);
	r.m = to;
	virtio_balloon_state(other, &s);
	ck_assert_uint_eq(s.target_bytes, RIG_MEMORY_BYTES - 9 * PAGE);
	ck_assert_uint_eq(s.actual_bytes, RIG_MEMORY_BYTES - 4 * PAGE);
	ck_assert(s.driver);
	ck_assert_uint_eq(rig_read(&r, r.device, 8), 9 | UINT64_C(4) << 32);
	RIG_RESUME(&r);
	rig_take_used(&r, REPORTING, NULL);
	check_given(GIVEN, RIG_MEMORY_BYTES);
	end();
}
END_TEST

START_TEST(test_load_hostile)
{
	struct state_writer *w = state_writer_create();
	struct state_reader *s = NULL;
	struct virtio_balloon *other;
	struct error err = ERROR_INIT;
	struct machine *to;
	const uint8_t *buf;
	uint8_t *copy;
	size_t len, at;

	begin();
	/* found in the saved state by its value, which nothing else has */
	virtio_balloon_set_target(balloon, 0x5c3 * PAGE);
	rig_write(&r, r.device + 4, 0x7b1d2e3f, 4);
	RIG_PAUSE(&r);
	to = rig_machine(&r.mem);
	ck_assert_int_eq(virtio_balloon_create(to, RIG_SLOT, &other, &err), 0);
	ck_assert_int_eq(r.m->ops->save(r.m->dev, w, &err), 0);
	ck_assert_int_eq(state_writer_finish(w, &buf, &len, &err), 0);
	for (at = 0; at + 8 <= len && get_le64(buf + at) != (0x5c3 | UINT64_C(0x7b1d2e3f) << 32); at++)
		;
	ck_assert_uint_le(at + 8, len);
	copy = malloc(len);
	memcpy(copy, buf, len);
	put_le32(copy + at, PAGES + 1);
	/* the section's payload again, with a checksum that is right */
	state_writer_free(w);
	w = state_writer_create();
	state_section_begin(w, "virtio-balloon", 1);
	state_put_bytes(w, copy + 24 + 40, len - 24 - 40);
	state_section_end(w);
	ck_assert_int_eq(state_writer_finish(w, &buf, &len, &err), 0);
	ck_assert_int_eq(state_reader_open(buf, len, &s, &err), 0);
	ck_assert_int_eq(to->ops->load(to->dev, s, &err), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.message, "balloon: a target of 4097 pages, where there are 4096"));
	state_reader_free(s);
	state_writer_free(w);
	free(copy);
	rig_machine_free(to);
	end();
}
END_TEST

/* ---- who is told ---- */

static uint64_t told_first, told_pages;
static bool told_before;

static void told(void *opaque, uint64_t first, uint64_t npages)
{
	told_first = first;
	told_pages = npages;
	told_before = !is_hole(first * PAGE);
}

START_TEST(test_discard)
{
	begin();
	guest_memory_on_discard(&r.mem, told, NULL);
	ck_assert_int_eq(guest_memory_discard(&r.mem, GIVEN, 3 * PAGE), 0);
	ck_assert(told_before);
	ck_assert_uint_eq(told_first, GIVEN / PAGE);
	ck_assert_uint_eq(told_pages, 3);
	check_given(GIVEN, GIVEN + 3 * PAGE);
	ck_assert_int_eq(guest_memory_discard(&r.mem, GIVEN, 0), 0);
	ck_assert_int_eq(guest_memory_discard(&r.mem, GIVEN + 1, PAGE), -EINVAL);
	ck_assert_int_eq(guest_memory_discard(&r.mem, GIVEN, PAGE + 1), -EINVAL);
	ck_assert_int_eq(guest_memory_discard(&r.mem, RIG_MEMORY_BYTES, PAGE), -EFAULT);
	ck_assert_int_eq(guest_memory_discard(&r.mem, 0, RIG_MEMORY_BYTES + PAGE), -EFAULT);
	guest_memory_on_discard(&r.mem, NULL, NULL);
	told_pages = 0;
	ck_assert_int_eq(guest_memory_discard(&r.mem, GIVEN, 4 * PAGE), 0);
	ck_assert_uint_eq(told_pages, 0);
	end();
}
END_TEST

int main(void)
{
	Suite *s = suite_create("virtio_balloon");
	TCase *c = tcase_create("balloon");

	tcase_set_timeout(c, 60);
	tcase_add_test(c, test_config);
	tcase_add_test(c, test_inflate);
	tcase_add_test(c, test_inflate_hostile);
	tcase_add_loop_test(c, test_report, 0, 3);
	tcase_add_test(c, test_report_hostile);
	tcase_add_test(c, test_report_itself);
	tcase_add_test(c, test_pause_between_turns);
	tcase_add_test(c, test_save_load);
	tcase_add_test(c, test_load_hostile);
	tcase_add_test(c, test_discard);
	suite_add_tcase(s, c);
	return suite_run(s);
}
