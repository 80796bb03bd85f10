/* SPDX-License-Identifier: Apache-2.0 */
/* A guest that is slowed: by how much, through pauses and saved states, and at full speed again. */
#include <check.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/bitmap.h"
#include "base/clock.h"
#include "tests/suite.h"
#include "tests/unit/vmm/tiny_kernel.h"
#include "vmm/machine_internal.h"
#include "vmm/state.h"

#define MEMORY_BYTES (32u << 20)
#define SPAN_MS	     400
#define WAIT_MS	     20000

static char dir[] = "/tmp/snm-test-throttle-XXXXXX";
static char kernel[64], serial[96];

static void setup(void)
{
	strcpy(dir + sizeof dir - 7, "XXXXXX");
	ck_assert_ptr_nonnull(mkdtemp(dir));
	snprintf(kernel, sizeof kernel, "%s/kernel", dir);
	snprintf(serial, sizeof serial, "file:%s/console", dir);
	tiny_write(kernel, tiny_count, sizeof tiny_count);
}

static void teardown(void)
{
	char path[96];
	snprintf(path, sizeof path, "%s/console", dir);
	unlink(path);
	unlink(kernel);
	rmdir(dir);
}

/* Its first vCPU counts, the others wait to be started. */
static struct machine *counting(unsigned cpus)
{
	struct machine_config cfg = {
		.memory_bytes = MEMORY_BYTES, .cpus = cpus, .serial = serial, .run_dir = dir};
	struct error err = ERROR_INIT;
	struct machine *m = NULL;
	int ret = machine_create(&cfg, &m, &err);
	if (!ret)
		ret = machine_load_kernel(m, kernel, NULL, "x", &err);
	if (!ret)
		ret = machine_start(m, &err);
	ck_assert_msg(ret == 0, "%s", err.message);
	return m;
}

static uint32_t count(struct machine *m)
{
	return __atomic_load_n((uint32_t *)guest_memory_ptr(machine_memory(m), TINY_COUNTER, 4),
			       __ATOMIC_RELAXED);
}

static void wait_count(struct machine *m, uint32_t more)
{
	uint32_t from = count(m);
	uint64_t until = clock_now_ms() + WAIT_MS;
	while (count(m) - from < more && clock_now_ms() < until)
		clock_sleep_ms(1);
	ck_assert_uint_ge(count(m) - from, more);
}

/* Which part of SPAN_MS its first vCPU ran for: by the processor's time, as a busy machine may have had none
 * for it. */
static double share(struct machine *m)
{
	clockid_t clock;
	struct timespec before, after;
	ck_assert_int_eq(pthread_getcpuclockid(m->vcpus[0].thread, &clock), 0);
	uint64_t at = clock_now_ns();
	clock_gettime(clock, &before);
	clock_sleep_ms(SPAN_MS);
	clock_gettime(clock, &after);
	return ((double)(after.tv_sec - before.tv_sec) * 1e9 + (double)(after.tv_nsec - before.tv_nsec)) /
	       (double)(clock_now_ns() - at);
}

static void slow(struct machine *m, double speed, double least)
{
	struct error err = ERROR_INIT;
	int ret = machine_slow(m, speed, least, &err);
	ck_assert_msg(ret == 0, "%s", err.message);
}

START_TEST(a_slowed_guest_gets_its_share_and_all_of_it_back)
{
	struct machine *m = counting(1);
	wait_count(m, 1000);
	ck_assert_uint_eq(machine_slowed(m, NULL), 0);
	slow(m, 0.25, 0.01);
	ck_assert_uint_eq(machine_slowed(m, NULL), 75);
	double quarter = share(m);
	wait_count(m, 1);
	slow(m, 0.02, 0.01);
	double least = share(m);
	wait_count(m, 1);
	machine_unslow(m);
	ck_assert_uint_eq(machine_slowed(m, NULL), 0);
	/* more than a slowed one may ever get, as soon as the machine has it */
	double again = share(m);
	for (uint64_t until = clock_now_ms() + WAIT_MS; again < 0.4 && clock_now_ms() < until;)
		again = share(m);
	printf("slowed to 25 %%: ran for %.1f %% of the time, to 2 %%: %.1f %%; again: %.1f %%\n",
	       quarter * 100, least * 100, again * 100);
	ck_assert(quarter > 0 && quarter < 0.4);
	ck_assert(least > 0 && least < 0.15);
	ck_assert(again >= 0.4);
	machine_destroy(m);
}
END_TEST

/* A vCPU that waits for its turn is parked: the pause does not wait for it, and nothing of it is lost. */
START_TEST(a_slowed_guest_is_paused_at_once)
{
	struct machine *m = counting(1);
	struct error err = ERROR_INIT;
	struct mem_pause_costs costs = {.lead_us = 7};
	slow(m, 0.02, 0.01); /* 1 ms of 50 */
	for (int i = 0; i < 20; i++) {
		wait_count(m, 1);
		clock_sleep_ms(i % 7);
		uint64_t at = clock_now_ms();
		ck_assert_int_eq(machine_pause(m, &err), 0);
		ck_assert_uint_lt(clock_now_ms() - at, 1000);
		uint32_t n = count(m);
		clock_sleep_ms(60);
		ck_assert_uint_eq(count(m), n);
		ck_assert_int_eq(machine_drain(m, 1000, &err), 0);
		struct state_writer *w = state_writer_create();
		int ret = machine_save(m, w, &err);
		ck_assert_msg(ret == 0, "%s", err.message);
		state_writer_free(w);
		ck_assert_int_eq(machine_start(m, &err), 0);
	}
	ck_assert_uint_eq(machine_slowed(m, NULL), 98);
	machine_pause_costs(m, &costs);
	ck_assert_uint_gt(costs.stop_us, 0);
	ck_assert_uint_gt(costs.state_us, 0);
	ck_assert_uint_eq(costs.load_us, costs.state_us); /* it never loaded */
	ck_assert_uint_eq(costs.lead_us, 7);
	machine_unslow(m);
	wait_count(m, 1000);
	ck_assert_uint_eq(__atomic_load_n((uint32_t *)guest_memory_ptr(machine_memory(m), TINY_BAD, 4),
					  __ATOMIC_RELAXED),
			  0);
	machine_destroy(m);
}
END_TEST

START_TEST(a_slowed_machine_can_go)
{
	for (int i = 0; i < 5; i++) {
		struct machine *m = counting(3);
		slow(m, 0.05, 0.01);
		clock_sleep_ms(i * 7);
		machine_destroy(m);
	}
}
END_TEST

/* Only the one that dirties is slowed, where KVM tells which it is; otherwise all. */
START_TEST(the_vcpu_that_dirties_is_slowed)
{
	struct machine *m = counting(4);
	struct dirty_source d = machine_dirty_source(m);
	struct error err = ERROR_INIT;
	size_t npages = MEMORY_BYTES / MEM_PAGE_BYTES;
	uint64_t *map = bitmap_alloc(npages);
	unsigned vcpus;
	ck_assert_int_eq(d.start(d.opaque, &err), 0);
	machine_slow_prepare(m);
	for (int i = 0; i < 20; i++) {
		bitmap_set_range(map, 0, npages);
		ck_assert_int_eq(d.clear(d.opaque, 0, npages, map, &err), 0);
		wait_count(m, 10);
	}
	slow(m, 0.2, 0.01);
	ck_assert_uint_eq(machine_slowed(m, &vcpus), 80);
	printf("%u of 4 vCPUs are slowed\n", vcpus);
	ck_assert(vcpus == 1 || vcpus == 4);
	/* none by more than is allowed */
	slow(m, 0.01, 0.5);
	ck_assert_uint_eq(machine_slowed(m, NULL), 50);
	slow(m, 1, 0.5);
	ck_assert_uint_eq(machine_slowed(m, &vcpus), 0);
	ck_assert_uint_eq(vcpus, 0);
	ck_assert_int_eq(d.stop(d.opaque), 0);
	free(map);
	machine_destroy(m);
}
END_TEST

int main(void)
{
	if (access("/dev/kvm", R_OK | W_OK)) {
		printf("skipped: no access to /dev/kvm\n");
		/* run-unit wants a summary line of libcheck's shape: one check, skipped */
		printf("100%%: Checks: 1, Failures: 0, Errors: 0\n");
		return 0;
	}
	Suite *suite = suite_create("throttle");
	TCase *t = tcase_create("throttle");
	tcase_set_timeout(t, 120);
	tcase_add_checked_fixture(t, setup, teardown);
	tcase_add_test(t, a_slowed_guest_gets_its_share_and_all_of_it_back);
	tcase_add_test(t, a_slowed_guest_is_paused_at_once);
	tcase_add_test(t, a_slowed_machine_can_go);
	tcase_add_test(t, the_vcpu_that_dirties_is_slowed);
	suite_add_tcase(suite, t);
	return suite_run(suite);
}
