/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The storage model: a random guest, the mirror, our NBD client and server, and two real disks, while the
 * copy runs at random speed and breaks at random places; at every handover both disks and a reference in
 * memory are the same, byte by byte.
 *
 * SNM_STORAGE_SEEDS (default 10, in the check 5) seeds from SNM_STORAGE_FIRST (default 1);
 * SNM_STORAGE_VERBOSE=1 prints what happens. One seed makes the same choices each time; when requests end is
 * up to the kernel.
 *
 * What it was tried with, one change of the product at a time, and found within 30 seeds: a chunk copied
 * without its range; overlapping writes not ordered; a discard not mirrored; chunks that stay synced when a
 * session breaks, when only the local disk got a write, when the local disk failed it, or when their copy was
 * given up; holes skipped although written to since, touched before, or in a destination that was not empty;
 * a start that does not wait for what passes through; the guest's buffer written instead of the bounce; only
 * the first buffer of a request sent; flushes not sent to the destination, or answered there before the disk
 * did; a handover that overlooks copies after the last flush. Not found: a server whose stop does not wait,
 * and remote errors that are taken for success when only some errors are.
 */
#include <check.h>
#include <signal.h>
#include <stdlib.h>

#include "base/log.h"
#include "tests/storage-model/world.h"
#include "tests/suite.h"

static unsigned env_number(const char *name, unsigned otherwise)
{
	const char *s = getenv(name);
	return s && *s ? (unsigned)strtoul(s, NULL, 10) : otherwise;
}

START_TEST(both_disks_and_the_model_agree_at_every_handover)
{
	run_seed(env_number("SNM_STORAGE_FIRST", 1) + (unsigned)_i);
}
END_TEST

int main(void)
{
	setenv("SNM_LOG", "error", 0);
	log_init("storage-model");
	signal(SIGPIPE, SIG_IGN);
	Suite *s = suite_create("storage-model");
	TCase *tc = tcase_create("seeds");
	tcase_set_timeout(tc, env_number("SNM_STORAGE_TIMEOUT", 400));
	tcase_add_loop_test(tc, both_disks_and_the_model_agree_at_every_handover, 0,
			    (int)env_number("SNM_STORAGE_SEEDS", env_number("SNM_BRIEF", 0) ? 5 : 10));
	suite_add_tcase(s, tc);
	return suite_run(s);
}
