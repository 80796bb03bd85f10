/* SPDX-License-Identifier: Apache-2.0 */
/* Buffered sessions: what a guest waits for, what the remote gets in which order, and what a break costs. */
#include "tests/suite.h"
#include "tests/unit/mirror/rig.h"

#define BUFFER_BYTES (1 * MIB)

static void start_buffered(struct rig *r, uint64_t size, unsigned grace_ms)
{
	rig_files(r, size);
	rig_fill(r->local_path, 0, size, 5);
	rig_open_local(r);
	rig_open_remote(r);
	struct mirror_options opt = rig_options(r);
	opt.write_grace_ms = grace_ms;
	opt.buffered = true;
	opt.buffer_bytes = BUFFER_BYTES;
	rig_start(r, &opt);
	rig_wait_synced(r);
	r->local->count_overlaps = true;
}

static void start_again(struct rig *r)
{
	rig_open_remote(r);
	struct mirror_options opt = rig_options(r);
	opt.keep_map = true;
	opt.buffered = true;
	opt.buffer_bytes = BUFFER_BYTES;
	rig_start(r, &opt);
	rig_wait_synced(r);
}

static void drain(struct rig *r)
{
	struct error err = ERROR_INIT;
	ck_assert_msg(mirror_flush_remote(r->m, &err) == 0, "%s", err.message);
	ck_assert(mirror_is_consistent(r->m));
	rig_assert_equal(r);
}

static void end(struct rig *r)
{
	rig_close(r);
	rig_remove(r);
}

static struct mirror_stats stats(struct rig *r)
{
	struct mirror_stats st;
	mirror_stats(r->m, &st);
	return st;
}

START_TEST(a_write_is_answered_by_the_local_disk)
{
	struct rig r = {0};
	start_buffered(&r, 1 * MIB, PATIENT_MS);
	ck_assert(mirror_is_consistent(r.m));
	faulty_say(r.remote, SILENCE_BEFORE);
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 0, 4096, 1), 0);
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 60 * KIB, 200 * KIB, 2), 0);
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE_ZEROES, 300 * KIB, 100 * KIB, 0), 0);
	ck_assert_int_eq(guest_do(r.top, BLOCK_DISCARD, 512 * KIB, 256 * KIB, 0), 0);
	ck_assert_int_eq(guest_do(r.top, BLOCK_FLUSH, 0, 0, 0), 0);
	ck_assert(!mirror_is_consistent(r.m));
	ck_assert_uint_eq(stats(&r).buffered_bytes, 204 * KIB);
	ck_assert_uint_eq(stats(&r).mirrored_bytes, 0);
	faulty_say(r.remote, SILENCE_NONE);
	rig_eventually(mirror_is_consistent(r.m));
	ck_assert_uint_eq(stats(&r).buffered_bytes, 0);
	ck_assert_uint_eq(stats(&r).buffered_bytes_max, 204 * KIB);
	ck_assert_uint_eq(stats(&r).mirrored_bytes, 204 * KIB);
	ck_assert_uint_eq(faulty_count(r.remote, BLOCK_FLUSH), 0);
	drain(&r);
	end(&r);
}
END_TEST

START_TEST(latency_does_not_follow_the_round_trip)
{
	struct rig r = {0};
	start_buffered(&r, 4 * MIB, PATIENT_MS);
	r.remote->delay_ns = 200000000;
	uint64_t begin = clock_now_ms();
	for (unsigned i = 0; i < 64; i++)
		ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, i % 16 * 4096, 4096, (int)i), 0);
	uint64_t took = clock_now_ms() - begin;
	ck_assert_msg(took < 64 * 200 / 8, "%llu ms", (unsigned long long)took);
	drain(&r);
	/* synchronous from then on */
	begin = clock_now_ms();
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 0, 4096, 1), 0);
	ck_assert_uint_ge(clock_now_ms() - begin, 200);
	end(&r);
}
END_TEST

START_TEST(what_is_overwritten_before_it_was_sent_is_never_sent)
{
	struct rig r = {0};
	start_buffered(&r, 1 * MIB, PATIENT_MS);
	unsigned before = faulty_count(r.remote, BLOCK_WRITE);
	faulty_say(r.remote, SILENCE_BEFORE);
	for (unsigned i = 0; i < 500; i++)
		ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 4096, 4096, (int)i), 0);
	/* the first, which left at once, and the last */
	ck_assert_uint_eq(stats(&r).buffered_bytes, 2 * 4096);
	faulty_say(r.remote, SILENCE_NONE);
	drain(&r);
	ck_assert_uint_eq(faulty_count(r.remote, BLOCK_WRITE) - before, 2);
	end(&r);
}
END_TEST

START_TEST(overlapping_writes_reach_the_remote_in_the_local_order)
{
	struct rig r = {0};
	start_buffered(&r, 1 * MIB, PATIENT_MS);
	unsigned seed = (unsigned)_i;
	r.local->delay_max_ns = 300000;
	r.remote->delay_max_ns = 3000000;
	for (unsigned round = 0; round < 12; round++) {
		struct guest_io io[32];
		for (unsigned i = 0; i < 32; i++) {
			unsigned kind = (unsigned)rand_r(&seed) % 8;
			uint64_t at = (unsigned)rand_r(&seed) % 200 * 512;
			uint64_t len = (1 + (unsigned)rand_r(&seed) % 130) * 512;
			guest_submit(&io[i], r.top,
				     kind < 6	 ? BLOCK_WRITE
				     : kind == 6 ? BLOCK_WRITE_ZEROES
						 : BLOCK_DISCARD,
				     kind == 0 ? BLOCK_REQ_FUA : 0, at, len, (int)(round * 32 + i));
		}
		for (unsigned i = 0; i < 32; i++)
			ck_assert_int_eq(guest_wait(&io[i]), 0);
	}
	drain(&r);
	end(&r);
}
END_TEST

START_TEST(a_full_buffer_slows_the_guest_to_the_link)
{
	struct rig r = {0};
	start_buffered(&r, 8 * MIB, PATIENT_MS);
	r.remote->bytes_per_ms = 8 * KIB;
	r.remote->inflight_bytes_max = 0;
	uint64_t begin = clock_now_ms();
	for (unsigned i = 0; i < 64; i++)
		ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, i * 64 * KIB, 64 * KIB, (int)i), 0);
	uint64_t took = clock_now_ms() - begin;
	/* 4 MiB take 512 ms on that link, of which a quarter fits into the buffer */
	ck_assert_msg(took >= 350, "%llu ms", (unsigned long long)took);
	struct mirror_stats st = stats(&r);
	ck_assert_uint_le(st.buffered_bytes_max, BUFFER_BYTES);
	ck_assert_uint_ge(st.buffered_bytes_max, BUFFER_BYTES * 3 / 4);
	/* an eighth of it is under way at a time */
	ck_assert_uint_le(r.remote->inflight_bytes_max, BUFFER_BYTES / 8);
	drain(&r);
	end(&r);
}
END_TEST

START_TEST(small_writes_count_with_what_they_cost)
{
	struct rig r = {0};
	start_buffered(&r, 4 * MIB, PATIENT_MS);
	faulty_say(r.remote, SILENCE_BEFORE);
	struct guest_io *io = calloc(1000, sizeof *io);
	for (unsigned i = 0; i < 1000; i++)
		guest_submit(&io[i], r.top, i % 2 ? BLOCK_WRITE : BLOCK_WRITE_ZEROES, 0, i * 1024, 512, 1);
	clock_sleep_ms(100);
	unsigned done = 0;
	for (unsigned i = 0; i < 1000; i++)
		done += guest_is_done(&io[i]);
	/* one of 512 bytes and one without data take 5 to 6 KiB together */
	ck_assert_uint_gt(done, 2 * BUFFER_BYTES / (8 * KIB));
	ck_assert_uint_lt(done, 2 * BUFFER_BYTES / (5 * KIB));
	faulty_say(r.remote, SILENCE_NONE);
	for (unsigned i = 0; i < 1000; i++)
		ck_assert_int_eq(guest_wait(&io[i]), 0);
	free(io);
	drain(&r);
	end(&r);
}
END_TEST

START_TEST(a_write_larger_than_the_buffer_goes_alone)
{
	struct rig r = {0};
	start_buffered(&r, 8 * MIB, PATIENT_MS);
	r.remote->delay_ns = 20000000;
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 0, 3 * MIB, 1), 0);
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 1 * MIB, 3 * MIB, 2), 0);
	drain(&r);
	end(&r);
}
END_TEST

START_TEST(after_the_drain_guests_wait_for_both)
{
	struct rig r = {0};
	start_buffered(&r, 1 * MIB, PATIENT_MS);
	faulty_say(r.remote, SILENCE_BEFORE);
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 0, 64 * KIB, 1), 0);
	faulty_say(r.remote, SILENCE_NONE);
	drain(&r);
	ck_assert_uint_eq(faulty_count(r.remote, BLOCK_FLUSH), 1);
	faulty_say(r.remote, SILENCE_BEFORE);
	struct guest_io write, flush;
	guest_submit(&write, r.top, BLOCK_WRITE, 0, 0, 4096, 2);
	guest_submit(&flush, r.top, BLOCK_FLUSH, 0, 0, 0, 0);
	clock_sleep_ms(40);
	ck_assert(!guest_is_done(&write));
	ck_assert(!guest_is_done(&flush));
	ck_assert_uint_eq(stats(&r).buffered_bytes, 0);
	faulty_say(r.remote, SILENCE_NONE);
	ck_assert_int_eq(guest_wait(&write), 0);
	ck_assert_int_eq(guest_wait(&flush), 0);
	drain(&r);
	end(&r);
}
END_TEST

static void *drain_main(void *arg)
{
	struct rig *r = arg;
	struct error err = ERROR_INIT;
	return (void *)(intptr_t)mirror_flush_remote(r->m, &err);
}

START_TEST(a_write_during_the_drain_overtakes_but_what_it_overlaps)
{
	struct rig r = {0};
	start_buffered(&r, 2 * MIB, PATIENT_MS);
	r.remote->bytes_per_ms = 1 * KIB;
	struct guest_io io[2];
	for (unsigned i = 0; i < 8; i++)
		ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, i * 64 * KIB, 64 * KIB, (int)i + 1), 0);
	pthread_t thread;
	ck_assert_int_eq(pthread_create(&thread, NULL, drain_main, &r), 0);
	rig_eventually(stats(&r).buffered_bytes <= 448 * KIB);
	guest_submit(&io[0], r.top, BLOCK_WRITE, 0, 1 * MIB, 4096, 20);
	guest_submit(&io[1], r.top, BLOCK_WRITE, 0, 7 * 64 * KIB + 512, 4096, 21);
	ck_assert_int_eq(guest_wait(&io[0]), 0);
	uint64_t left = stats(&r).buffered_bytes;
	ck_assert_int_eq(guest_wait(&io[1]), 0);
	ck_assert_uint_gt(left, 128 * KIB);
	ck_assert_uint_eq(stats(&r).buffered_bytes, 0);
	void *rc;
	pthread_join(thread, &rc);
	ck_assert_ptr_null(rc);
	drain(&r);
	end(&r);
}
END_TEST

START_TEST(a_break_unsyncs_what_was_not_answered)
{
	struct rig r = {0};
	start_buffered(&r, 4 * MIB, PATIENT_MS);
	faulty_say(r.remote, _i ? SILENCE_AFTER : SILENCE_BEFORE);
	/* on its way, behind it, and in the window's wake */
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 0, 128 * KIB, 1), 0);
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 512, 4096, 2), 0);
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 2 * MIB, 128 * KIB, 3), 0);
	ck_assert_int_eq(guest_do(r.top, BLOCK_DISCARD, 3 * MIB, 128 * KIB, 0), 0);
	struct guest_io more[16];
	for (unsigned i = 0; i < 16; i++)
		guest_submit(&more[i], r.top, BLOCK_WRITE, 0, 1 * MIB + i * 64 * KIB, 64 * KIB, 4);
	/* what was sent fails, or was done and what comes next fails */
	faulty_set_error(r.remote, -EIO, -1);
	faulty_say(r.remote, SILENCE_NONE);
	rig_eventually(atomic_load(&r.failed) == 1);
	for (unsigned i = 0; i < 16; i++)
		ck_assert_int_eq(guest_wait(&more[i]), 0);
	struct mirror_stats st = stats(&r);
	ck_assert(st.failed);
	ck_assert_uint_eq(st.buffered_bytes, 0);
	ck_assert_uint_lt(st.synced_bytes, 3 * MIB);
	ck_assert_uint_ge(st.synced_bytes, 1 * MIB);
	rig_stop(&r);
	start_again(&r);
	drain(&r);
	end(&r);
}
END_TEST

START_TEST(a_full_buffer_and_a_silent_link_cost_the_guest_one_grace)
{
	struct rig r = {0};
	start_buffered(&r, 8 * MIB, 300);
	faulty_say(r.remote, SILENCE_BEFORE);
	uint64_t begin = clock_now_ms();
	for (unsigned i = 0; i < 12; i++)
		ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, i * 64 * KIB, 64 * KIB, 1), 0);
	ck_assert_uint_eq(atomic_load(&r.failed), 0);
	for (unsigned i = 12; i < 24; i++)
		ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, i * 64 * KIB, 64 * KIB, 1), 0);
	uint64_t took = clock_now_ms() - begin;
	ck_assert_msg(took >= 250 && took < 5000, "%llu ms", (unsigned long long)took);
	rig_eventually(atomic_load(&r.failed) == 1);
	ck_assert_int_eq(r.failed_code, -ETIMEDOUT);
	rig_stop(&r);
	start_again(&r);
	drain(&r);
	end(&r);
}
END_TEST

START_TEST(a_silent_drain_ends_the_session)
{
	struct rig r = {0};
	start_buffered(&r, 1 * MIB, 20);
	faulty_say(r.remote, SILENCE_BEFORE);
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 0, 4096, 1), 0);
	clock_sleep_ms(100); /* nobody waits */
	ck_assert_uint_eq(atomic_load(&r.failed), 0);
	struct error err = ERROR_INIT;
	ck_assert_int_eq(mirror_flush_remote(r.m, &err), -ETIMEDOUT);
	rig_stop(&r);
	start_again(&r);
	drain(&r);
	end(&r);
}
END_TEST

START_TEST(a_stop_drops_what_was_not_sent)
{
	struct rig r = {0};
	start_buffered(&r, 4 * MIB, PATIENT_MS);
	faulty_say(r.remote, SILENCE_BEFORE);
	unsigned before = faulty_count(r.remote, BLOCK_WRITE);
	struct guest_io io[32];
	for (unsigned i = 0; i < 32; i++)
		guest_submit(&io[i], r.top, BLOCK_WRITE, 0, i * 64 * KIB, 64 * KIB, (int)i + 1);
	rig_eventually(guest_is_done(&io[8]));
	ck_assert(!guest_is_done(&io[31]));
	unsigned sent = faulty_count(r.remote, BLOCK_WRITE) - before;
	ck_assert_uint_le(sent, 2);
	struct mirror_stats st;
	rig_stop(&r); /* the remote answers when it is closed */
	for (unsigned i = 0; i < 32; i++)
		ck_assert_int_eq(guest_wait(&io[i]), 0);
	st = stats(&r);
	ck_assert_uint_eq(st.synced_bytes, 4 * MIB - (32 - sent) * 64 * KIB);
	ck_assert_uint_eq(st.buffered_bytes, 0);
	ck_assert_uint_eq(atomic_load(&r.failed), 0);
	start_again(&r);
	drain(&r);
	end(&r);
}
END_TEST

START_TEST(a_stop_keeps_the_errors_of_late_replies)
{
	struct rig r = {0};
	start_buffered(&r, 1 * MIB, PATIENT_MS);
	faulty_say(r.remote, SILENCE_BEFORE);
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 0, 4096, 1), 0);
	faulty_set_error(r.remote, -EIO, -1);
	rig_stop(&r);
	ck_assert_uint_eq(stats(&r).synced_bytes, 1 * MIB - 64 * KIB);
	start_again(&r);
	drain(&r);
	end(&r);
}
END_TEST

START_TEST(a_copy_waits_for_the_chunks_queued_writes)
{
	struct rig r = {0};
	start_buffered(&r, 1 * MIB, PATIENT_MS);
	faulty_say(r.remote, SILENCE_BEFORE);
	unsigned before = faulty_count(r.remote, BLOCK_WRITE);
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 0, 4096, 1), 0);
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 2048, 4096, 2), 0);
	/* what the guest is told to have failed makes the chunk unsynced: the pass comes back to it */
	faulty_set_error(r.local, -EIO, BLOCK_WRITE);
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 8192, 4096, 3), -EIO);
	faulty_set_error(r.local, 0, -1);
	clock_sleep_ms(60);
	/* the first write and the failed one, which went to both at a time */
	ck_assert_uint_eq(faulty_count(r.remote, BLOCK_WRITE) - before, 2);
	/* a write into the chunk that waits to be copied waits for it */
	struct guest_io io;
	guest_submit(&io, r.top, BLOCK_WRITE, 0, 3072, 512, 4);
	clock_sleep_ms(20);
	ck_assert(!guest_is_done(&io));
	faulty_say(r.remote, SILENCE_NONE);
	ck_assert_int_eq(guest_wait(&io), 0);
	rig_wait_synced(&r);
	drain(&r);
	end(&r);
}
END_TEST

START_TEST(the_fastest_reply_is_no_silence)
{
	struct rig r = {0};
	rig_files(&r, 1 * MIB);
	rig_fill(r.local_path, 0, r.size, 5);
	rig_open_local(&r);
	rig_open_remote(&r);
	r.remote->delay_ns = 400000000;
	struct mirror_options opt = rig_options(&r);
	opt.chunk_bytes = 1 * MIB;
	opt.write_grace_ms = 100;
	opt.buffered = true;
	opt.buffer_bytes = BUFFER_BYTES;
	rig_start(&r, &opt);
	rig_wait_synced(&r);
	struct guest_io io[40];
	for (unsigned i = 0; i < 40; i++)
		guest_submit(&io[i], r.top, BLOCK_WRITE, 0, i % 20 * 48 * KIB, 64 * KIB, (int)i);
	for (unsigned i = 0; i < 40; i++)
		ck_assert_int_eq(guest_wait(&io[i]), 0);
	drain(&r);
	ck_assert_uint_eq(atomic_load(&r.failed), 0);
	end(&r);
}
END_TEST

START_TEST(a_buffer_of_no_use_is_refused)
{
	struct rig r = {0};
	rig_files(&r, 1 * MIB);
	rig_open_local(&r);
	rig_open_remote(&r);
	struct mirror_options opt = rig_options(&r);
	struct error err = ERROR_INIT;
	opt.buffered = true;
	opt.buffer_bytes = BUFFER_BYTES - 1;
	ck_assert_int_eq(mirror_start(r.m, &opt, &err), -EINVAL);
	opt.buffer_bytes = UINT64_C(1) << 50;
	ck_assert_int_eq(mirror_start(r.m, &opt, &err), -EINVAL);
	block_close(&r.remote->block);
	rig_remote_gone(&r);
	end(&r);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("mirror-buffered");
	TCase *tc = tcase_create("buffered");
	tcase_set_timeout(tc, 60);
	tcase_add_test(tc, a_write_is_answered_by_the_local_disk);
	tcase_add_test(tc, latency_does_not_follow_the_round_trip);
	tcase_add_test(tc, what_is_overwritten_before_it_was_sent_is_never_sent);
	tcase_add_loop_test(tc, overlapping_writes_reach_the_remote_in_the_local_order, 0, 4);
	tcase_add_test(tc, a_full_buffer_slows_the_guest_to_the_link);
	tcase_add_test(tc, small_writes_count_with_what_they_cost);
	tcase_add_test(tc, a_write_larger_than_the_buffer_goes_alone);
	tcase_add_test(tc, after_the_drain_guests_wait_for_both);
	tcase_add_test(tc, a_write_during_the_drain_overtakes_but_what_it_overlaps);
	tcase_add_loop_test(tc, a_break_unsyncs_what_was_not_answered, 0, 2);
	tcase_add_test(tc, a_full_buffer_and_a_silent_link_cost_the_guest_one_grace);
	tcase_add_test(tc, a_silent_drain_ends_the_session);
	tcase_add_test(tc, a_stop_drops_what_was_not_sent);
	tcase_add_test(tc, a_stop_keeps_the_errors_of_late_replies);
	tcase_add_test(tc, a_copy_waits_for_the_chunks_queued_writes);
	tcase_add_test(tc, the_fastest_reply_is_no_silence);
	tcase_add_test(tc, a_buffer_of_no_use_is_refused);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
