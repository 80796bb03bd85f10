/* SPDX-License-Identifier: Apache-2.0 */
/* The pass, its window, holes, the flushes around its end, and the life of a mirror. */
#include "tests/suite.h"
#include "tests/unit/mirror/rig.h"

START_TEST(passes_through_without_a_mirror)
{
	struct rig r = {0};
	rig_files(&r, 4 * MIB);
	rig_open_local(&r);
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 4096, 8192, 7), 0);
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE_ZEROES, 8192, 4096, 0), 0);
	ck_assert_int_eq(guest_do(r.top, BLOCK_FLUSH, 0, 0, 0), 0);
	uint8_t buf[8192];
	ck_assert_int_eq(block_pread(r.top, buf, sizeof buf, 4096), 0);
	ck_assert_int_eq(buf[4095], 7);
	ck_assert_int_eq(buf[4096], 0);
	ck_assert(!mirror_is_consistent(r.m));
	mirror_cancel(r.m);
	mirror_stop(r.m);
	struct error err = ERROR_INIT;
	ck_assert_int_eq(mirror_wait_synced(r.m, 0, &err), -ECANCELED);
	ck_assert_int_eq(mirror_flush_remote(r.m, &err), -ECANCELED);
	rig_close(&r);
	rig_remove(&r);
}
END_TEST

static void fill_sparsely(struct rig *r)
{
	rig_fill(r->local_path, 0, 300 * KIB, 1);
	rig_fill(r->local_path, 5 * MIB + 12 * KIB, 20 * KIB, 2);
	rig_fill(r->local_path, 17 * MIB, 3 * MIB, 3);
	rig_fill(r->local_path, r->size - 4 * KIB, 4 * KIB, 4);
}

static void check_copy(bool over_nbd, bool direct, uint32_t chunk_bytes)
{
	struct rig r = {0};
	rig_files(&r, 48 * MIB + 20 * KIB);
	r.over_nbd = over_nbd;
	r.direct = direct;
	fill_sparsely(&r);
	rig_open_local(&r);
	rig_open_remote(&r);
	struct mirror_options opt = rig_options(&r);
	opt.chunk_bytes = chunk_bytes;
	rig_start(&r, &opt);
	rig_wait_synced(&r);
	ck_assert(mirror_is_consistent(r.m));
	struct mirror_stats st;
	mirror_stats(r.m, &st);
	ck_assert_uint_eq(st.total_bytes, r.size);
	ck_assert_uint_eq(st.synced_bytes, r.size);
	ck_assert(st.all_synced && !st.failed);
	ck_assert_uint_eq(st.data_bytes_copied + st.zero_bytes_copied + st.hole_bytes_skipped, r.size);
	ck_assert_uint_eq(st.hole_bytes_skipped, r.size - rig_allocated(r.local_path));
	/* holes are neither read nor sent */
	ck_assert_uint_eq(r.local->read_bytes, r.size - st.hole_bytes_skipped);
	struct error err = ERROR_INIT;
	ck_assert_int_eq(mirror_flush_remote(r.m, &err), 0);
	rig_close(&r);
	rig_assert_equal(&r);
	uint64_t here = rig_allocated(r.local_path), there = rig_allocated(r.remote_path);
	ck_assert_msg(there <= here + here / 20 && here <= there + there / 20,
		      "allocated %llu here, %llu there", (unsigned long long)here, (unsigned long long)there);
	rig_remove(&r);
}

START_TEST(copies_data_and_keeps_holes)
{
	static const uint32_t chunks[] = {0, 64 * 1024, 16 * 1024, 4 << 20};
	check_copy(false, false, chunks[_i]);
}
END_TEST

/* A local disk that cannot be read ends the session, and says which sector it is. */
START_TEST(a_local_read_error_names_its_sector)
{
	struct rig r = {0};
	struct error err = ERROR_INIT;
	struct mirror_stats st;
	rig_files(&r, 4 * MIB);
	rig_fill(r.local_path, 0, 4 * MIB, 3);
	rig_open_local(&r);
	rig_open_remote(&r);
	ck_assert_int_eq(truncate(r.local_path, MIB + 100 * KIB), 0);
	struct mirror_options opt = rig_options(&r);
	opt.requests_in_flight = 1; /* or a later chunk may fail first */
	rig_start(&r, &opt);
	ck_assert_int_eq(mirror_wait_synced(r.m, 50000, &err), -EIO);
	ck_assert_msg(strstr(err.message, "read of the local disk at byte 1150976 (sector 2248): ") != NULL,
		      "%s", err.message);
	mirror_stats(r.m, &st);
	ck_assert(st.failed && st.local_failed && !st.all_synced);
	rig_close(&r);
	rig_remove(&r);
}
END_TEST

START_TEST(copies_with_direct_io)
{
	check_copy(false, true, 0);
}
END_TEST

START_TEST(copies_over_nbd)
{
	check_copy(true, _i, 0);
}
END_TEST

START_TEST(sends_zeroes_to_a_remote_with_other_content)
{
	struct rig r = {0};
	rig_files(&r, 24 * MIB);
	r.over_nbd = _i;
	rig_fill(r.local_path, 0, 300 * KIB, 1);
	rig_fill(r.local_path, 17 * MIB + 8 * KIB, 3 * KIB, 3);
	rig_fill(r.remote_path, 0, r.size, 9);
	rig_open_local(&r);
	rig_open_remote(&r);
	struct mirror_options opt = rig_options(&r);
	opt.remote_is_zero = false;
	rig_start(&r, &opt);
	rig_wait_synced(&r);
	ck_assert(mirror_is_consistent(r.m));
	struct mirror_stats st;
	mirror_stats(r.m, &st);
	ck_assert_uint_eq(st.hole_bytes_skipped, 0);
	rig_close(&r);
	rig_assert_equal(&r);
	rig_remove(&r);
}
END_TEST

START_TEST(data_that_is_zero_becomes_a_hole)
{
	struct rig r = {0};
	rig_files(&r, 8 * MIB);
	int fd = open(r.local_path, O_WRONLY);
	char *zero = calloc(1, 4 * MIB);
	ck_assert_int_eq(pwrite(fd, zero, 4 * MIB, 0), 4 * (ssize_t)MIB);
	free(zero);
	close(fd);
	rig_open_local(&r);
	rig_open_remote(&r);
	struct mirror_options opt = rig_options(&r);
	rig_start(&r, &opt);
	rig_wait_synced(&r);
	struct mirror_stats st;
	mirror_stats(r.m, &st);
	ck_assert_uint_eq(st.zero_bytes_copied, 4 * MIB);
	ck_assert_uint_eq(st.data_bytes_copied, 0);
	rig_close(&r);
	rig_assert_equal(&r);
	ck_assert_uint_lt(rig_allocated(r.remote_path), 64 * KIB);
	rig_remove(&r);
}
END_TEST

START_TEST(a_hole_written_during_the_pass_arrives)
{
	struct rig r = {0};
	rig_files(&r, 64 * MIB);
	rig_open_local(&r);
	rig_open_remote(&r);
	r.local->delay_max_ns = 300000;
	struct mirror_options opt = rig_options(&r);
	opt.chunk_bytes = 4096;
	struct guest_io io[64];
	for (unsigned i = 0; i < 32; i++)
		guest_submit(&io[i], r.top, BLOCK_WRITE, 0, (uint64_t)i * 1999 * 512, 4096, 0x40 + (int)i);
	rig_start(&r, &opt);
	for (unsigned i = 32; i < 64; i++)
		guest_submit(&io[i], r.top, BLOCK_WRITE, 0, (uint64_t)i * 1999 * 512, 4096, 0x40 + (int)i);
	for (unsigned i = 0; i < 64; i++)
		ck_assert_int_eq(guest_wait(&io[i]), 0);
	rig_wait_synced(&r);
	ck_assert(mirror_is_consistent(r.m));
	rig_close(&r);
	rig_assert_equal(&r);
	rig_remove(&r);
}
END_TEST

START_TEST(refusals_leave_the_remote_to_the_caller)
{
	struct rig r = {0};
	rig_files(&r, 4 * MIB);
	rig_open_local(&r);
	ck_assert_int_eq(truncate(r.remote_path, 5 * MIB), 0);
	rig_open_remote(&r);
	struct mirror_options opt = rig_options(&r);
	struct error err = ERROR_INIT;
	ck_assert_int_eq(mirror_start(r.m, &opt, &err), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.message, "5242880 at the remote"));
	block_close(&r.remote->block);
	ck_assert_int_eq(truncate(r.remote_path, 4 * MIB), 0);
	rig_open_remote(&r);
	opt = rig_options(&r);
	opt.chunk_bytes = 65537;
	ck_assert_int_eq(mirror_start(r.m, &opt, &err), -EINVAL);
	opt.chunk_bytes = 65536;
	opt.requests_in_flight = 100000;
	ck_assert_int_eq(mirror_start(r.m, &opt, &err), -EINVAL);
	opt.requests_in_flight = 0;
	rig_start(&r, &opt);
	ck_assert_int_eq(mirror_start(r.m, &opt, &err), -EBUSY);
	rig_wait_synced(&r);
	rig_stop(&r);
	mirror_stop(r.m);
	rig_close(&r);
	rig_remove(&r);
}
END_TEST

struct canceller {
	struct mirror *m;
};

static void *cancel_later(void *arg)
{
	clock_sleep_ms(30);
	mirror_cancel(((struct canceller *)arg)->m);
	return NULL;
}

START_TEST(cancel_wakes_those_who_wait)
{
	struct rig r = {0};
	rig_files(&r, 4 * MIB);
	rig_fill(r.local_path, 0, r.size, 5);
	rig_open_local(&r);
	rig_open_remote(&r);
	faulty_say(r.remote, SILENCE_BEFORE);
	struct mirror_options opt = rig_options(&r);
	rig_start(&r, &opt);
	struct error err = ERROR_INIT;
	ck_assert_int_eq(mirror_wait_synced(r.m, 20, &err), -ETIMEDOUT);
	struct canceller c = {r.m};
	pthread_t t;
	pthread_create(&t, NULL, cancel_later, &c);
	ck_assert_int_eq(mirror_wait_synced(r.m, 0, &err), -ECANCELED);
	pthread_join(t, NULL);
	ck_assert(!mirror_is_consistent(r.m));
	rig_stop(&r);
	ck_assert_uint_eq(atomic_load(&r.failed), 0);
	rig_close(&r);
	rig_remove(&r);
}
END_TEST

START_TEST(flushes_reach_both_once_the_remote_was_flushed)
{
	struct rig r = {0};
	rig_files(&r, 1 * MIB);
	rig_fill(r.local_path, 0, r.size, 5);
	rig_open_local(&r);
	rig_open_remote(&r);
	struct mirror_options opt = rig_options(&r);
	rig_start(&r, &opt);
	rig_wait_synced(&r);
	ck_assert_int_eq(guest_do(r.top, BLOCK_FLUSH, 0, 0, 0), 0);
	ck_assert_uint_eq(faulty_count(r.remote, BLOCK_FLUSH), 0);
	struct error err = ERROR_INIT;
	ck_assert_int_eq(mirror_flush_remote(r.m, &err), 0);
	ck_assert_uint_eq(faulty_count(r.remote, BLOCK_FLUSH), 1);
	ck_assert_int_eq(guest_do(r.top, BLOCK_FLUSH, 0, 0, 0), 0);
	ck_assert_uint_eq(faulty_count(r.remote, BLOCK_FLUSH), 2);
	ck_assert_uint_eq(faulty_count(r.local, BLOCK_FLUSH), 2);
	ck_assert(mirror_is_consistent(r.m));
	/* what waits at the remote keeps the guest's flush */
	faulty_say(r.remote, SILENCE_BEFORE);
	struct guest_io io;
	guest_submit(&io, r.top, BLOCK_FLUSH, 0, 0, 0, 0);
	clock_sleep_ms(50);
	ck_assert(!guest_is_done(&io));
	ck_assert(!mirror_is_consistent(r.m));
	faulty_say(r.remote, SILENCE_NONE);
	ck_assert_int_eq(guest_wait(&io), 0);
	rig_close(&r);
	rig_remove(&r);
}
END_TEST

START_TEST(the_window_keeps_a_slow_link_within_the_grace)
{
	struct rig r = {0};
	rig_files(&r, 24 * MIB);
	rig_fill(r.local_path, 0, r.size, 5);
	rig_open_local(&r);
	rig_open_remote(&r);
	/* 16 requests of 256 KiB would take 512 ms on 8 MiB/s */
	r.remote->bytes_per_ms = 8 * KIB;
	struct mirror_options opt = rig_options(&r);
	opt.write_grace_ms = 300;
	opt.chunk_bytes = 1 << 20;
	rig_start(&r, &opt);
	rig_eventually(r.m && faulty_count(r.remote, BLOCK_WRITE) > 4);
	uint64_t worst = 0;
	struct mirror_stats st;
	do {
		uint64_t t = clock_now_ms();
		ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 0, 4096, (int)(t & 0xff)), 0);
		t = clock_now_ms() - t;
		worst = t > worst ? t : worst;
		clock_sleep_ms(5);
		mirror_stats(r.m, &st);
	} while (!st.all_synced && !st.failed);
	ck_assert_uint_eq(atomic_load(&r.failed), 0);
	/* the copy of a chunk under a write included */
	ck_assert_msg(worst < 400, "a write took %llu ms", (unsigned long long)worst);
	ck_assert_uint_gt(st.mirrored_bytes, 0);
	rig_close(&r);
	rig_assert_equal(&r);
	rig_remove(&r);
}
END_TEST

/* Every other 64 KiB is a hole: no piece is a full one. On a quick link they go several at a time; where a
 * full one would take more than a quarter of the grace, one by one. */
START_TEST(short_pieces_widen_the_window_on_a_quick_link_only)
{
	struct rig r = {0};
	bool quick = _i == 0;
	rig_files(&r, 8 * MIB);
	for (uint64_t at = 0; at < r.size; at += 128 * KIB)
		rig_fill(r.local_path, at, 64 * KIB, 5);
	rig_open_local(&r);
	rig_open_remote(&r);
	if (quick)
		r.remote->delay_max_ns = 2000000;
	else
		r.remote->bytes_per_ms = 8 * KIB;
	struct mirror_options opt = rig_options(&r);
	opt.write_grace_ms = quick ? 8000 : 100;
	opt.chunk_bytes = 1 << 20;
	opt.remote_is_zero = true;
	rig_start(&r, &opt);
	rig_wait_synced(&r);
	ck_assert_uint_eq(faulty_count(r.remote, BLOCK_WRITE), 64);
	if (quick)
		ck_assert_uint_ge(r.remote->inflight_bytes_max, 3 * 64 * KIB);
	else
		ck_assert_uint_eq(r.remote->inflight_bytes_max, 64 * KIB);
	rig_close(&r);
	rig_assert_equal(&r);
	rig_remove(&r);
}
END_TEST

START_TEST(fault_point_holds_after_the_first_chunk)
{
	struct rig r = {0};
	rig_files(&r, 2 * MIB);
	rig_fill(r.local_path, 0, r.size, 5);
	char dir[96], path[160];
	snprintf(dir, sizeof dir, "%s/fault", r.dir);
	mkdir(dir, 0700);
	setenv("SNM_FAULT", "in-copy:hold", 1);
	setenv("SNM_FAULT_DIR", dir, 1);
	rig_open_local(&r);
	rig_open_remote(&r);
	struct mirror_options opt = rig_options(&r);
	rig_start(&r, &opt);
	snprintf(path, sizeof path, "%s/in-copy.hit", dir);
	rig_eventually(access(path, F_OK) == 0);
	struct mirror_stats st;
	clock_sleep_ms(20);
	mirror_stats(r.m, &st);
	ck_assert_uint_eq(st.synced_bytes, 64 * KIB);
	/* the guest goes on meanwhile, on synced and unsynced chunks */
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 32 * KIB, 64 * KIB, 1), 0);
	unlink(path);
	snprintf(path, sizeof path, "%s/in-copy.go", dir);
	rig_make_file(path, 1);
	rig_wait_synced(&r);
	rig_close(&r);
	rig_assert_equal(&r);
	unlink(path);
	rmdir(dir);
	rig_remove(&r);
}
END_TEST

/* What waits for the bandwidth is held: few chunks at a time, so that few of a guest's writes wait. */
START_TEST(little_is_held_while_the_bandwidth_is_waited_for)
{
	enum { N = 32 };
	struct rig r = {0};
	struct rate_limit slow;
	static struct guest_io io[N];
	struct mirror_stats st;
	rig_files(&r, N * 64 * KIB);
	rig_fill(r.local_path, 0, r.size, 1);
	rig_open_local(&r);
	rig_open_remote(&r);
	rate_limit_init(&slow, 1024); /* a chunk a minute */
	struct mirror_options opt = rig_options(&r);
	opt.bandwidth = &slow;
	opt.buffered = _i;
	rig_start(&r, &opt);
	do
		mirror_stats(r.m, &st);
	while (!st.synced_bytes);
	rig_eventually(faulty_count(r.local, BLOCK_READ) > 1);
	clock_sleep_ms(100);
	for (unsigned i = 0; i < N; i++)
		guest_submit(&io[i], r.top, BLOCK_WRITE, 0, i * 64 * KIB, 4096, (int)i);
	clock_sleep_ms(300);
	unsigned waiting = 0;
	for (unsigned i = 0; i < N; i++)
		waiting += !guest_is_done(&io[i]);
	rate_limit_set(&slow, 0);
	for (unsigned i = 0; i < N; i++)
		ck_assert_int_eq(guest_wait(&io[i]), 0);
	rig_wait_synced(&r);
	ck_assert_uint_le(waiting, 1);
	struct error err = ERROR_INIT;
	ck_assert_int_eq(mirror_flush_remote(r.m, &err), 0);
	rig_close(&r);
	rate_limit_destroy(&slow);
	rig_assert_equal(&r);
	rig_remove(&r);
}
END_TEST

/* The guest writes all the time, but a few pieces would leave the link empty. */
START_TEST(a_long_link_is_filled_while_the_guest_writes)
{
	enum { CHUNK = 256 * KIB, N = 128 };
	struct rig r = {0};
	rig_files(&r, (uint64_t)N * CHUNK);
	rig_fill(r.local_path, 0, r.size, 1);
	rig_open_local(&r);
	rig_open_remote(&r);
	r.remote->delay_ns = UINT64_C(20000000);
	struct mirror_options opt = rig_options(&r);
	opt.chunk_bytes = CHUNK;
	opt.buffered = true;
	rig_start(&r, &opt);
	struct mirror_stats st = {0};
	for (unsigned i = 0; !st.all_synced; i++) {
		ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 0, 512, (int)i), 0);
		clock_sleep_ms(1);
		mirror_stats(r.m, &st);
	}
	ck_assert_uint_ge(r.remote->inflight_bytes_max, 6 * CHUNK);
	struct error err = ERROR_INIT;
	ck_assert_int_eq(mirror_flush_remote(r.m, &err), 0);
	rig_close(&r);
	rig_assert_equal(&r);
	rig_remove(&r);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("mirror-copy");
	TCase *tc = tcase_create("copy");
	tcase_add_test(tc, passes_through_without_a_mirror);
	tcase_add_test(tc, a_local_read_error_names_its_sector);
	tcase_add_loop_test(tc, copies_data_and_keeps_holes, 0, 4);
	tcase_add_test(tc, copies_with_direct_io);
	tcase_add_loop_test(tc, copies_over_nbd, 0, 2);
	tcase_add_loop_test(tc, sends_zeroes_to_a_remote_with_other_content, 0, 2);
	tcase_add_test(tc, data_that_is_zero_becomes_a_hole);
	tcase_add_test(tc, a_hole_written_during_the_pass_arrives);
	tcase_add_test(tc, refusals_leave_the_remote_to_the_caller);
	tcase_add_test(tc, cancel_wakes_those_who_wait);
	tcase_add_test(tc, flushes_reach_both_once_the_remote_was_flushed);
	tcase_add_test(tc, the_window_keeps_a_slow_link_within_the_grace);
	tcase_add_loop_test(tc, short_pieces_widen_the_window_on_a_quick_link_only, 0, 2);
	tcase_add_loop_test(tc, little_is_held_while_the_bandwidth_is_waited_for, 0, 2);
	tcase_add_test(tc, a_long_link_is_filled_while_the_guest_writes);
	tcase_add_test(tc, fault_point_holds_after_the_first_chunk);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
