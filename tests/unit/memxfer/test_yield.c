/* SPDX-License-Identifier: Apache-2.0 */
/* Which threads of a transfer leave the processors to others, and when not. */
#include "memxfer/yield.h"

#include <dirent.h>
#include <sched.h>

#include "tests/suite.h"
#include "tests/unit/memxfer/harness.h"

#define PAGES_PER_REGION (MEM_REGION_BYTES / MEM_PAGE_BYTES)
#define PATIENCE_MS	 10000

/* --- a thread that waits to be told --- */

struct yielder {
	struct mem_yield *yield;
	pthread_t thread;
	pid_t tid;
	pthread_barrier_t joined, leave, left, end;
};

static void *yielder_main(void *arg)
{
	struct yielder *y = arg;

	y->tid = gettid();
	mem_yield_join(y->yield);
	pthread_barrier_wait(&y->joined);
	pthread_barrier_wait(&y->leave);
	mem_yield_leave(y->yield);
	pthread_barrier_wait(&y->left);
	pthread_barrier_wait(&y->end);
	return NULL;
}

static void yielder_start(struct yielder *y, struct mem_yield *yield)
{
	y->yield = yield;
	pthread_barrier_init(&y->joined, NULL, 2);
	pthread_barrier_init(&y->leave, NULL, 2);
	pthread_barrier_init(&y->left, NULL, 2);
	pthread_barrier_init(&y->end, NULL, 2);
	ck_assert_int_eq(pthread_create(&y->thread, NULL, yielder_main, y), 0);
	pthread_barrier_wait(&y->joined);
}

static void yielder_leave(struct yielder *y)
{
	pthread_barrier_wait(&y->leave);
	pthread_barrier_wait(&y->left);
}

static void yielder_end(struct yielder *y)
{
	pthread_barrier_wait(&y->end);
	pthread_join(y->thread, NULL);
}

/* Without the privilege threads stay as they are, which is what is looked at then. */
static bool may_yield;

static void *try_yield(void *arg)
{
	struct sched_param none = {0};

	may_yield = sched_setscheduler(0, SCHED_IDLE, &none) == 0 &&
		    sched_setscheduler(0, SCHED_OTHER, &none) == 0;
	return arg;
}

static int yielding(void)
{
	return may_yield ? SCHED_IDLE : SCHED_OTHER;
}

START_TEST(test_from_begin_to_end)
{
	struct mem_yield yield;
	struct yielder early, late;

	mem_yield_init(&yield);
	yielder_start(&early, &yield);
	ck_assert_int_eq(sched_getscheduler(early.tid), SCHED_OTHER);
	mem_yield_begin(&yield);
	ck_assert_int_eq(sched_getscheduler(early.tid), yielding());
	yielder_start(&late, &yield);
	ck_assert_int_eq(sched_getscheduler(late.tid), yielding());
	ck_assert_int_eq(sched_getscheduler(0), SCHED_OTHER);
	mem_yield_end(&yield);
	ck_assert_int_eq(sched_getscheduler(early.tid), SCHED_OTHER);
	ck_assert_int_eq(sched_getscheduler(late.tid), SCHED_OTHER);
	/* again, for what is left of the time; who has left is not touched any more */
	yielder_leave(&late);
	yield.until_ns = clock_now_ns() + UINT64_C(3600000000000);
	mem_yield_begin(&yield);
	ck_assert_int_eq(sched_getscheduler(early.tid), yielding());
	ck_assert_int_eq(sched_getscheduler(late.tid), SCHED_OTHER);
	yielder_leave(&early);
	ck_assert_int_eq(sched_getscheduler(early.tid), SCHED_OTHER);
	yielder_end(&early);
	yielder_end(&late);
	mem_yield_destroy(&yield);
}
END_TEST

START_TEST(test_time_is_up)
{
	struct mem_yield yield;
	struct yielder a;

	mem_yield_init(&yield);
	yielder_start(&a, &yield);
	uint64_t before = clock_now_ns();
	mem_yield_begin(&yield);
	ck_assert_uint_ge(yield.until_ns, before + MEM_YIELD_MS * UINT64_C(1000000));
	yield.until_ns = clock_now_ns() + UINT64_C(3600000000000);
	mem_yield_step(&yield);
	ck_assert_int_eq(sched_getscheduler(a.tid), yielding());
	yield.until_ns = clock_now_ns() - 1;
	mem_yield_step(&yield);
	ck_assert_int_eq(sched_getscheduler(a.tid), SCHED_OTHER);
	ck_assert(!yield.on);
	mem_yield_begin(&yield);
	ck_assert_int_eq(sched_getscheduler(a.tid), SCHED_OTHER);
	ck_assert(!yield.on);
	yielder_leave(&a);
	yielder_end(&a);
	mem_yield_destroy(&yield);
}
END_TEST

/* One that an operator had given another place keeps it. */
START_TEST(test_policy_of_its_own)
{
	struct mem_yield yield;
	struct yielder a;
	struct sched_param none = {0};

	mem_yield_init(&yield);
	ck_assert_int_eq(sched_setscheduler(0, SCHED_BATCH, &none), 0);
	yielder_start(&a, &yield); /* inherits it */
	ck_assert_int_eq(sched_setscheduler(0, SCHED_OTHER, &none), 0);
	ck_assert_int_eq(sched_getscheduler(a.tid), SCHED_BATCH);
	mem_yield_begin(&yield);
	ck_assert_int_eq(sched_getscheduler(a.tid), may_yield ? SCHED_IDLE : SCHED_BATCH);
	mem_yield_end(&yield);
	ck_assert_int_eq(sched_getscheduler(a.tid), SCHED_BATCH);
	yielder_leave(&a);
	yielder_end(&a);
	mem_yield_destroy(&yield);
}
END_TEST

/* --- a whole transfer --- */

/* Threads of this process whose names begin so: how many, and how many of them yield. */
static unsigned count_threads(const char *name, unsigned *idle)
{
	DIR *d = opendir("/proc/self/task");
	unsigned n = 0;

	ck_assert_ptr_nonnull(d);
	*idle = 0;
	for (struct dirent *e; (e = readdir(d));) {
		char path[300], comm[32] = "";
		FILE *f;

		snprintf(path, sizeof path, "/proc/self/task/%s/comm", e->d_name);
		f = e->d_name[0] == '.' ? NULL : fopen(path, "re");
		if (!f)
			continue;
		if (fgets(comm, sizeof comm, f) && !strncmp(comm, name, strlen(name))) {
			n++;
			*idle += sched_getscheduler(atoi(e->d_name)) == SCHED_IDLE;
		}
		fclose(f);
	}
	closedir(d);
	return n;
}

struct watched {
	struct fake_log log;
	struct dirty_source below;
	_Atomic unsigned cleared, cleared_yielding;
	unsigned collected, senders, senders_yielding; /* at the last look at the log */
};

static int watched_clear(void *opaque, uint64_t first, uint64_t npages, const uint64_t *bitmap,
			 struct error *err)
{
	struct watched *w = opaque;

	w->cleared++;
	w->cleared_yielding += sched_getscheduler(0) == SCHED_IDLE;
	return w->below.clear(w->below.opaque, first, npages, bitmap, err);
}

static int watched_collect(void *opaque, uint64_t *bitmap, struct error *err)
{
	struct watched *w = opaque;

	w->collected++;
	w->senders = count_threads("mem send", &w->senders_yielding) +
		     count_threads("mem answers", &(unsigned){0});
	return w->below.collect(w->below.opaque, bitmap, err);
}

static int watched_start(void *opaque, struct error *err)
{
	struct watched *w = opaque;

	return w->below.start(w->below.opaque, err);
}

static int watched_stop(void *opaque)
{
	struct watched *w = opaque;

	return w->below.stop(w->below.opaque);
}

static void *wait_main(void *arg)
{
	mem_receiver_wait(arg, NULL);
	return NULL;
}

/* The rounds yield, as far as their time goes, to a guest that runs (even _i); what the guest waits for does
 * not, at either end. */
START_TEST(test_transfer_yields_but_for_its_end)
{
	enum { NSTREAMS = 2 };
	uint64_t npages = 4 * PAGES_PER_REGION;
	struct mem_space src = space_create(npages), dst = space_create(npages);
	struct conn *a[NSTREAMS], *b[NSTREAMS];
	struct mem_sender *sender;
	struct mem_receiver *receiver;
	struct watched w = {0};
	struct error err = ERROR_INIT;
	unsigned idle;
	bool limit;

	for (uint64_t page = 0; page < npages; page++)
		page_fill(&src, page, page + 1);
	connect_streams(false, NSTREAMS, a, b);
	w.below = fake_source(&w.log, npages);
	struct mem_receiver_options ro = {
		.space = dst, .streams = b, .nstreams = NSTREAMS, .timeout_ms = TIMEOUT_MS, .epoch = 42};
	struct mem_sender_options so = {
		.space = src,
		.dirty = {&w, watched_start, watched_collect, watched_clear, watched_stop},
		.streams = a,
		.nstreams = NSTREAMS,
		.downtime_target_ms = 1000,
		.max_rounds = 3,
		.timeout_ms = TIMEOUT_MS,
		.guest_stands = _i,
		.epoch = 42};
	bool yields = may_yield && !_i;

	ck_assert_msg(mem_receiver_start(&ro, &receiver, &err) == 0, "%s", err.message);
	ck_assert_msg(mem_sender_create(&so, &sender, &err) == 0, "%s", err.message);
	uint64_t before = clock_now_ms();
	ck_assert_msg(mem_sender_precopy(sender, &limit, &err) == 0, "%s", err.message);
	ck_assert_uint_gt(w.cleared, 0);
	/* on a machine that stands still the time may be up before the first page */
	if (!yields || clock_now_ms() - before < MEM_YIELD_MS)
		ck_assert_uint_eq(w.cleared_yielding, yields ? w.cleared : 0);
	unsigned looks = w.collected;
	ck_assert_msg(mem_sender_finish(sender, &err) == 0, "%s", err.message);
	ck_assert_uint_eq(w.collected, looks + 1);
	ck_assert_uint_eq(w.senders, 2 * NSTREAMS);
	ck_assert_uint_eq(w.senders_yielding, 0);
	ck_assert_msg(mem_receiver_wait(receiver, &err) == 0, "%s", err.message);
	ck_assert_int_eq(memcmp(src.base, dst.base, npages * MEM_PAGE_BYTES), 0);
	mem_sender_free(sender);
	mem_receiver_free(receiver);
	unsigned left = 1; /* one that was joined may be listed for a moment */
	for (unsigned ms = 0; ms < PATIENCE_MS && left; ms++) {
		left = count_threads("mem ", &idle);
		usleep(1000);
	}
	ck_assert_uint_eq(left, 0);
	close_streams(NSTREAMS, a);
	close_streams(NSTREAMS, b);
	space_free(&src);
	space_free(&dst);
	free(w.log.bits);
}
END_TEST

/* No frame comes that would tell them the time. */
START_TEST(test_receivers_hurry_when_waited_for)
{
	enum { NSTREAMS = 2 };
	struct mem_space dst = space_create(PAGES_PER_REGION);
	struct conn *a[NSTREAMS], *b[NSTREAMS];
	struct mem_receiver *receiver;
	struct error err = ERROR_INIT;
	unsigned n = 0, idle = 0;
	pthread_t waiter;

	connect_streams(false, NSTREAMS, a, b);
	struct mem_receiver_options ro = {
		.space = dst, .streams = b, .nstreams = NSTREAMS, .timeout_ms = TIMEOUT_MS, .epoch = 42};
	ck_assert_msg(mem_receiver_start(&ro, &receiver, &err) == 0, "%s", err.message);
	for (unsigned ms = 0; ms < PATIENCE_MS && (n < NSTREAMS || idle < (may_yield ? NSTREAMS : 0)); ms++) {
		n = count_threads("mem receive", &idle);
		usleep(1000);
	}
	ck_assert_uint_eq(n, NSTREAMS);
	ck_assert_uint_eq(idle, may_yield ? NSTREAMS : 0);
	ck_assert_int_eq(pthread_create(&waiter, NULL, wait_main, receiver), 0);
	for (unsigned ms = 0; ms < PATIENCE_MS / 2 && idle; ms++) {
		n = count_threads("mem receive", &idle);
		usleep(1000);
	}
	ck_assert_uint_eq(n, NSTREAMS);
	ck_assert_uint_eq(idle, 0);
	close_streams(NSTREAMS, a);
	pthread_join(waiter, NULL);
	mem_receiver_free(receiver);
	close_streams(NSTREAMS, b);
	space_free(&dst);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("yield");
	TCase *tc = tcase_create("yield");
	pthread_t probe;

	if (pthread_create(&probe, NULL, try_yield, NULL) == 0)
		pthread_join(probe, NULL);
	if (!may_yield)
		puts("skipped: yielding threads: no way back from SCHED_IDLE here (CAP_SYS_NICE, "
		     "RLIMIT_NICE)");
	tcase_set_timeout(tc, 60);
	tcase_add_test(tc, test_from_begin_to_end);
	tcase_add_test(tc, test_time_is_up);
	tcase_add_test(tc, test_policy_of_its_own);
	tcase_add_loop_test(tc, test_transfer_yields_but_for_its_end, 0, 2);
	tcase_add_test(tc, test_receivers_hurry_when_waited_for);
	suite_add_tcase(suite, tc);
	return suite_run(suite);
}
