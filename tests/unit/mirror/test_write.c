/* SPDX-License-Identifier: Apache-2.0 */
/* Guest requests by chunk state, failure and silence of the remote, and going on afterwards. */
#include "tests/suite.h"
#include "tests/unit/mirror/rig.h"

static void start_synced(struct rig *r, uint64_t size, bool filled, unsigned grace_ms)
{
	rig_files(r, size);
	if (filled)
		rig_fill(r->local_path, 0, size, 5);
	rig_open_local(r);
	rig_open_remote(r);
	struct mirror_options opt = rig_options(r);
	opt.write_grace_ms = grace_ms;
	rig_start(r, &opt);
	rig_wait_synced(r);
	r->local->count_overlaps = true;
}

/* Goes on with a new connection to the same remote file. */
static void start_again(struct rig *r)
{
	rig_open_remote(r);
	struct mirror_options opt = rig_options(r);
	opt.keep_map = true;
	rig_start(r, &opt);
	rig_wait_synced(r);
}

static void end_equal(struct rig *r)
{
	ck_assert(mirror_is_consistent(r->m));
	rig_close(r);
	rig_assert_equal(r);
	rig_remove(r);
}

START_TEST(a_synced_chunk_is_written_on_both_sides)
{
	struct rig r = {0};
	start_synced(&r, 4 * MIB, true, PATIENT_MS);
	unsigned before = faulty_count(r.remote, BLOCK_WRITE);
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 60 * KIB, 300 * KIB, 1), 0);
	ck_assert_uint_gt(faulty_count(r.remote, BLOCK_WRITE), before);
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE_ZEROES, 512, 130 * KIB, 0), 0);
	ck_assert_int_eq(guest_do(r.top, BLOCK_DISCARD, 1 * MIB, 1 * MIB, 0), 0);
	ck_assert_uint_eq(faulty_count(r.remote, BLOCK_DISCARD), 0);
	struct mirror_stats st;
	mirror_stats(r.m, &st);
	ck_assert_uint_eq(st.mirrored_bytes, 300 * KIB);
	end_equal(&r);
}
END_TEST

START_TEST(a_write_is_answered_when_both_have_it)
{
	struct rig r = {0};
	start_synced(&r, 1 * MIB, true, PATIENT_MS);
	struct guest_io io;
	struct faulty *slow = _i ? r.local : r.remote;
	faulty_say(slow, SILENCE_BEFORE);
	guest_submit(&io, r.top, BLOCK_WRITE, 0, 0, 4096, 1);
	clock_sleep_ms(40);
	ck_assert(!guest_is_done(&io));
	ck_assert(!mirror_is_consistent(r.m));
	/* the guest may do with its buffer what it likes: both sides have the copy */
	memset(io.buf, 2, 2048);
	faulty_say(slow, SILENCE_NONE);
	ck_assert_int_eq(guest_wait(&io), 0);
	end_equal(&r);
}
END_TEST

START_TEST(an_unsynced_chunk_is_written_locally_and_a_copied_one_waits)
{
	struct rig r = {0};
	rig_files(&r, 4 * MIB);
	rig_fill(r.local_path, 0, r.size, 5);
	rig_open_local(&r);
	rig_open_remote(&r);
	faulty_say(r.remote, SILENCE_BEFORE);
	struct mirror_options opt = rig_options(&r);
	rig_start(&r, &opt);
	rig_eventually(faulty_inflight(r.remote) == 1);
	struct guest_io first;
	guest_submit(&first, r.top, BLOCK_WRITE, 0, 4096, 4096, 1); /* the pass is at chunk 0 */
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 3 * MIB, 4096, 2), 0);
	ck_assert_uint_eq(faulty_inflight(r.remote), 1);
	clock_sleep_ms(20);
	ck_assert(!guest_is_done(&first));
	faulty_say(r.remote, SILENCE_NONE);
	ck_assert_int_eq(guest_wait(&first), 0);
	rig_wait_synced(&r);
	end_equal(&r);
}
END_TEST

START_TEST(a_copy_waits_for_local_writes)
{
	struct rig r = {0};
	rig_files(&r, 64 * KIB);
	rig_fill(r.local_path, 0, r.size, 5);
	rig_open_local(&r);
	rig_open_remote(&r);
	struct guest_io io;
	faulty_say(r.local, SILENCE_BEFORE);
	guest_submit(&io, r.top, BLOCK_WRITE, 0, 4096, 4096, 1); /* before there is a session */
	struct mirror_options opt = rig_options(&r);
	rig_start(&r, &opt);
	clock_sleep_ms(40);
	ck_assert_uint_eq(faulty_count(r.local, BLOCK_READ), 0);
	struct guest_io second;
	guest_submit(&second, r.top, BLOCK_WRITE, 0, 16384, 4096, 2);
	faulty_say(r.local, SILENCE_NONE);
	ck_assert_int_eq(guest_wait(&io), 0);
	ck_assert_int_eq(guest_wait(&second), 0);
	rig_wait_synced(&r);
	end_equal(&r);
}
END_TEST

START_TEST(overlapping_writes_have_one_order)
{
	struct rig r = {0};
	start_synced(&r, 2 * MIB, true, PATIENT_MS);
	r.local->delay_max_ns = r.remote->delay_max_ns = 2000000;
	struct guest_io io[48];
	for (unsigned i = 0; i < 48; i++)
		guest_submit(&io[i], r.top, i % 5 == 4 ? BLOCK_WRITE_ZEROES : BLOCK_WRITE, 0, (i % 7) * 4096,
			     64 * KIB, (int)i + 1);
	for (unsigned i = 0; i < 48; i++)
		ck_assert_int_eq(guest_wait(&io[i]), 0);
	uint8_t buf[512];
	/* in order of submission: the last one that covers the sector */
	ck_assert_int_eq(block_pread(r.top, buf, sizeof buf, 6 * 4096), 0);
	ck_assert_uint_eq(buf[0], 48);
	end_equal(&r);
}
END_TEST

START_TEST(silence_costs_the_guest_one_grace)
{
	struct rig r = {0};
	start_synced(&r, 2 * MIB, true, 50);
	enum silence kind = _i ? SILENCE_AFTER : SILENCE_BEFORE;
	faulty_say(r.remote, kind);
	struct guest_io io, behind;
	uint64_t t = clock_now_ns();
	guest_submit(&io, r.top, BLOCK_WRITE, BLOCK_REQ_FUA, 0, 4096, 1);
	guest_submit(&behind, r.top, BLOCK_WRITE, 0, 0, 4096, 2);
	ck_assert_int_eq(guest_wait(&io), 0);
	ck_assert_int_eq(guest_wait(&behind), 0);
	t = (io.done_ns - t) / 1000000;
	ck_assert_msg(t >= 49 && t < 1000, "answered after %llu ms", (unsigned long long)t);
	rig_eventually(atomic_load(&r.failed) == 1);
	ck_assert_int_eq(r.failed_code, -ETIMEDOUT);
	struct mirror_stats st;
	mirror_stats(r.m, &st);
	ck_assert(st.failed && !st.all_synced);
	ck_assert_uint_eq(st.synced_bytes, r.size - 64 * KIB);
	ck_assert(!mirror_is_consistent(r.m));
	struct error err = ERROR_INIT;
	ck_assert_int_eq(mirror_wait_synced(r.m, 0, &err), -ETIMEDOUT);
	ck_assert_int_eq(mirror_flush_remote(r.m, &err), -ETIMEDOUT);
	/* no further request there; what is written now is unsynced */
	unsigned n = faulty_inflight(r.remote);
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 1 * MIB, 4096, 3), 0);
	ck_assert_int_eq(guest_do(r.top, BLOCK_DISCARD, 1 * MIB + 256 * KIB, 4096, 3), 0);
	ck_assert_int_eq(guest_do(r.top, BLOCK_FLUSH, 0, 0, 0), 0);
	ck_assert_uint_eq(faulty_inflight(r.remote), n);
	mirror_stats(r.m, &st);
	ck_assert_uint_eq(st.synced_bytes, r.size - 3 * 64 * KIB);
	rig_stop(&r); /* late replies */
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 1 * MIB + 640 * KIB, 4096, 4), 0);
	mirror_stats(r.m, &st);
	uint64_t before = st.data_bytes_copied;
	start_again(&r);
	mirror_stats(r.m, &st);
	/* the discarded 4 KiB need not be read */
	ck_assert_uint_le(st.data_bytes_copied - before, 4 * 64 * KIB);
	ck_assert_uint_ge(st.data_bytes_copied - before, 4 * 64 * KIB - 4096);
	ck_assert_uint_eq(atomic_load(&r.failed), 1);
	end_equal(&r);
}
END_TEST

START_TEST(silence_under_a_copy_frees_the_waiting_write)
{
	struct rig r = {0};
	rig_files(&r, 1 * MIB);
	rig_fill(r.local_path, 0, r.size, 5);
	rig_open_local(&r);
	rig_open_remote(&r);
	faulty_say(r.remote, SILENCE_BEFORE);
	struct mirror_options opt = rig_options(&r);
	opt.write_grace_ms = 50;
	rig_start(&r, &opt);
	rig_eventually(faulty_inflight(r.remote) == 1);
	clock_sleep_ms(150);
	/* the pass alone does not break a session: it may be a slow disk, and nobody waits */
	ck_assert_uint_eq(atomic_load(&r.failed), 0);
	uint64_t t = clock_now_ms();
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 0, 4096, 1), 0);
	t = clock_now_ms() - t;
	ck_assert_msg(t >= 49 && t < 1000, "answered after %llu ms", (unsigned long long)t);
	rig_eventually(atomic_load(&r.failed) == 1);
	rig_stop(&r);
	start_again(&r);
	end_equal(&r);
}
END_TEST

START_TEST(a_silent_flush_gets_twenty_graces)
{
	struct rig r = {0};
	start_synced(&r, 1 * MIB, true, 10);
	struct error err = ERROR_INIT;
	ck_assert_int_eq(mirror_flush_remote(r.m, &err), 0);
	r.remote->silence_flush_only = true;
	faulty_say(r.remote, SILENCE_BEFORE);
	uint64_t t = clock_now_ms();
	ck_assert_int_eq(guest_do(r.top, BLOCK_FLUSH, 0, 0, 0), 0);
	t = clock_now_ms() - t;
	ck_assert_msg(t >= 199 && t < 2000, "answered after %llu ms", (unsigned long long)t);
	rig_eventually(atomic_load(&r.failed) == 1);
	rig_stop(&r);
	start_again(&r);
	end_equal(&r);
}
END_TEST

START_TEST(a_remote_error_ends_the_session_at_once)
{
	struct rig r = {0};
	start_synced(&r, 2 * MIB, true, PATIENT_MS);
	faulty_set_error(r.remote, -ENOSPC, -1);
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 0, 300 * KIB, 1), 0);
	rig_eventually(atomic_load(&r.failed) == 1);
	ck_assert_int_eq(r.failed_code, -ENOSPC);
	struct error err = ERROR_INIT;
	ck_assert_int_eq(mirror_wait_synced(r.m, 0, &err), -ENOSPC);
	ck_assert_ptr_nonnull(strstr(err.message, "No space left"));
	rig_stop(&r);
	start_again(&r);
	end_equal(&r);
}
END_TEST

START_TEST(an_error_of_the_copy_ends_the_session)
{
	struct rig r = {0};
	rig_files(&r, 2 * MIB);
	rig_fill(r.local_path, 0, r.size, 5);
	rig_open_local(&r);
	rig_open_remote(&r);
	r.remote->error_after = 7;
	struct mirror_options opt = rig_options(&r);
	rig_start(&r, &opt);
	struct error err = ERROR_INIT;
	ck_assert_int_eq(mirror_wait_synced(r.m, 0, &err), -EIO);
	struct mirror_stats st;
	mirror_stats(r.m, &st);
	uint64_t synced = st.synced_bytes;
	ck_assert_uint_gt(synced, 0);
	ck_assert_uint_lt(synced, r.size);
	rig_stop(&r);
	ck_assert_uint_eq(atomic_load(&r.failed), 1);
	start_again(&r);
	end_equal(&r);
}
END_TEST

START_TEST(a_hole_that_the_remote_has_written_is_sent_as_zeroes)
{
	struct rig r = {0};
	start_synced(&r, 1 * MIB, false, PATIENT_MS); /* nothing but holes: skipped */
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 128 * KIB, 8192, 1), 0);
	faulty_set_error(r.remote, -EIO, -1);
	ck_assert_int_eq(guest_do(r.top, BLOCK_DISCARD, 128 * KIB, 8192, 0), 0);
	rig_eventually(atomic_load(&r.failed) == 1);
	rig_stop(&r);
	ck_assert_uint_eq(rig_allocated(r.local_path), 0);
	start_again(&r);
	end_equal(&r);
}
END_TEST

START_TEST(the_guest_gets_the_local_error_and_the_chunk_is_copied_again)
{
	struct rig r = {0};
	start_synced(&r, 1 * MIB, true, PATIENT_MS);
	faulty_set_error(r.local, -EIO, -1);
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 60 * KIB, 8192, 1), -EIO);
	faulty_set_error(r.local, 0, -1);
	rig_wait_synced(&r);
	rig_eventually(mirror_is_consistent(r.m));
	ck_assert_uint_eq(atomic_load(&r.failed), 0);
	struct mirror_stats st;
	mirror_stats(r.m, &st);
	ck_assert_uint_eq(st.data_bytes_copied, r.size + 128 * KIB);
	/* with the remote failing too, it is still the local error */
	faulty_set_error(r.local, -ENOSPC, -1);
	faulty_set_error(r.remote, -EIO, -1);
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 0, 4096, 1), -ENOSPC);
	faulty_set_error(r.local, 0, -1);
	rig_eventually(atomic_load(&r.failed) == 1);
	rig_stop(&r);
	start_again(&r);
	end_equal(&r);
}
END_TEST

START_TEST(a_copy_after_the_remote_flush_voids_it)
{
	struct rig r = {0};
	start_synced(&r, 1 * MIB, true, PATIENT_MS);
	struct error err = ERROR_INIT;
	ck_assert_int_eq(mirror_flush_remote(r.m, &err), 0);
	ck_assert(mirror_is_consistent(r.m));
	faulty_set_error(r.local, -EIO, -1);
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 0, 4096, 1), -EIO);
	faulty_set_error(r.local, 0, -1);
	struct mirror_stats st;
	do {
		clock_sleep_ms(2);
		mirror_stats(r.m, &st);
	} while (!st.all_synced || st.data_bytes_copied < r.size + 64 * KIB);
	ck_assert(!mirror_is_consistent(r.m));
	ck_assert_int_eq(mirror_flush_remote(r.m, &err), 0);
	end_equal(&r);
}
END_TEST

START_TEST(bounce_memory_is_bounded_and_requests_wait_in_order)
{
	struct rig r = {0};
	start_synced(&r, 96 * MIB, false, PATIENT_MS);
	faulty_say(r.remote, SILENCE_BEFORE);
	struct guest_io io[12];
	for (unsigned i = 0; i < 12; i++)
		guest_submit(&io[i], r.top, BLOCK_WRITE, 0, i * 8 * MIB, 8 * MIB, (int)i + 1);
	clock_sleep_ms(50);
	pthread_mutex_lock(&r.remote->lock);
	ck_assert_uint_eq(r.remote->inflight_bytes_max, 64 * MIB);
	pthread_mutex_unlock(&r.remote->lock);
	faulty_say(r.remote, SILENCE_NONE);
	for (unsigned i = 0; i < 12; i++)
		ck_assert_int_eq(guest_wait(&io[i]), 0);
	ck_assert_uint_le(r.remote->inflight_bytes_max, 64 * MIB);
	end_equal(&r);
}
END_TEST

START_TEST(a_failure_frees_those_who_wait_for_bounce_memory)
{
	struct rig r = {0};
	start_synced(&r, 96 * MIB, false, 200);
	faulty_say(r.remote, SILENCE_AFTER);
	struct guest_io io[12];
	for (unsigned i = 0; i < 12; i++)
		guest_submit(&io[i], r.top, BLOCK_WRITE, 0, i * 8 * MIB, 8 * MIB, (int)i + 1);
	for (unsigned i = 0; i < 12; i++)
		ck_assert_int_eq(guest_wait(&io[i]), 0);
	rig_stop(&r);
	ck_assert_uint_eq(atomic_load(&r.failed), 1);
	start_again(&r);
	end_equal(&r);
}
END_TEST

START_TEST(a_refused_request_is_answered_from_the_mirrors_thread)
{
	struct rig r = {0};
	start_synced(&r, 1 * MIB, true, PATIENT_MS);
	faulty_refuse(r.local, -ENOMEM);
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 0, 4096, 1), -ENOMEM);
	faulty_refuse(r.local, 0);
	/* the pass may have met the refusal too: then that ended the session */
	struct error err = ERROR_INIT;
	if (mirror_wait_synced(r.m, 50000, &err)) {
		rig_stop(&r);
		start_again(&r);
	}
	unsigned failed = atomic_load(&r.failed);
	faulty_refuse(r.remote, -ENOTCONN);
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 0, 300 * KIB, 1), 0);
	rig_eventually(atomic_load(&r.failed) == failed + 1);
	ck_assert_int_eq(r.failed_code, -ENOTCONN);
	faulty_refuse(r.local, -ENOMEM);
	ck_assert_int_eq(guest_do(r.top, BLOCK_WRITE, 0, 4096, 1), -ENOMEM);
	faulty_refuse(r.local, 0);
	rig_stop(&r);
	start_again(&r);
	end_equal(&r);
}
END_TEST

START_TEST(a_fresh_start_forgets_the_map)
{
	struct rig r = {0};
	start_synced(&r, 1 * MIB, true, PATIENT_MS);
	rig_stop(&r);
	struct mirror_stats st;
	rig_open_remote(&r);
	struct mirror_options opt = rig_options(&r);
	opt.remote_is_zero = false;
	rig_start(&r, &opt);
	rig_wait_synced(&r);
	mirror_stats(r.m, &st);
	ck_assert_uint_eq(st.data_bytes_copied, r.size);
	end_equal(&r);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("mirror-write");
	TCase *tc = tcase_create("write");
	tcase_add_test(tc, a_synced_chunk_is_written_on_both_sides);
	tcase_add_loop_test(tc, a_write_is_answered_when_both_have_it, 0, 2);
	tcase_add_test(tc, an_unsynced_chunk_is_written_locally_and_a_copied_one_waits);
	tcase_add_test(tc, a_copy_waits_for_local_writes);
	tcase_add_test(tc, overlapping_writes_have_one_order);
	tcase_add_loop_test(tc, silence_costs_the_guest_one_grace, 0, 2);
	tcase_add_test(tc, silence_under_a_copy_frees_the_waiting_write);
	tcase_add_test(tc, a_silent_flush_gets_twenty_graces);
	tcase_add_test(tc, a_remote_error_ends_the_session_at_once);
	tcase_add_test(tc, an_error_of_the_copy_ends_the_session);
	tcase_add_test(tc, a_hole_that_the_remote_has_written_is_sent_as_zeroes);
	tcase_add_test(tc, the_guest_gets_the_local_error_and_the_chunk_is_copied_again);
	tcase_add_test(tc, a_copy_after_the_remote_flush_voids_it);
	tcase_add_test(tc, bounce_memory_is_bounded_and_requests_wait_in_order);
	tcase_add_test(tc, a_failure_frees_those_who_wait_for_bounce_memory);
	tcase_add_test(tc, a_refused_request_is_answered_from_the_mirrors_thread);
	tcase_add_test(tc, a_fresh_start_forgets_the_map);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
