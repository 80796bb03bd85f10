/* SPDX-License-Identifier: Apache-2.0 */
#include "memxfer/prefault.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "base/bitmap.h"
#include "base/clock.h"
#include "base/cond.h"
#include "base/confine.h"
#include "base/log.h"
#include "memxfer/codec.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

#define THREADS_MAX 8u
/* Regions that are made ready together: MADV_COLLAPSE waits for every processor each time it is called, so a
 * huge page at a time takes ten times the work that its zeroes do. */
#define GROUP_REGIONS 16u
#define GROUPS(n)     (((n) + GROUP_REGIONS - 1) / GROUP_REGIONS)
#define EARLY_BYTES   (64u << 10) /* pages that the kernel makes in some tenths of a millisecond, at worst */

/* Processor time that regions have taken. */
struct cost {
	uint64_t regions, ns;
};

struct mem_prefault {
	struct mem_prefault_options opt;
	pthread_t threads[THREADS_MAX];
	unsigned nthreads;
	uint64_t begin_ns;
	atomic_bool stop, huge;

	pthread_mutex_t lock;
	pthread_cond_t done; /* somebody is through with a group, a thread has ended, or all are to */
	uint64_t *given;     /* regions that were asked for */
	uint64_t *wanted;    /* those that nobody has begun */
	uint64_t *at_work;   /* groups that somebody is at */
	uint64_t next;
	struct cost pages, huge_pages;
	unsigned ended;
	int failed; /* positive errno */
};

/* For kernels before 5.14. An atomic add of nothing faults the page in for writing and loses no data that the
 * receiver stores meanwhile. */
static void touch(uint8_t *p, size_t len)
{
	for (size_t i = 0; i < len; i += MEM_PAGE_BYTES)
		__atomic_fetch_add(p + i, 0, __ATOMIC_RELAXED);
}

/*
 * Huge pages, by name: for a memfd the kernel's own choice is mostly "never", which leaves them to those who
 * ask. Each takes a page to begin with. False: not to be had, or not all.
 */
static bool make_huge(struct mem_prefault *p, uint8_t *at, size_t len)
{
	if (len % MEM_REGION_BYTES || (uintptr_t)at % MEM_REGION_BYTES)
		return false;
	for (size_t i = 0; i < len; i += MEM_REGION_BYTES)
		touch(at + i, MEM_PAGE_BYTES);
	if (madvise(at, len, MADV_COLLAPSE) == 0)
		return true;
	/* This kernel cannot, may not, or has none left. */
	atomic_store(&p->huge, false);
	return false;
}

/* Regions [first, end), `piece` bytes at a time, and others let through after each if that is less than a
 * region. 0 or a positive errno. */
static int fault_in(struct mem_prefault *p, uint64_t first, uint64_t end, bool huge, size_t piece)
{
	const struct mem_space *space = &p->opt.space;
	uint64_t last = space->npages * MEM_PAGE_BYTES;
	uint64_t from = first * MEM_REGION_BYTES,
		 to = end * MEM_REGION_BYTES < last ? end * MEM_REGION_BYTES : last;

	if (huge && make_huge(p, space->base + from, (size_t)(to - from)))
		return 0;
	while (from < to && !atomic_load_explicit(&p->stop, memory_order_relaxed)) {
		size_t len = to - from < piece ? (size_t)(to - from) : piece;
		int e = madvise(space->base + from, len, MADV_POPULATE_WRITE) < 0 ? errno : 0;

		if (e == EINTR || e == EAGAIN)
			continue;
		if (e == EINVAL)
			touch(space->base + from, len);
		else if (e)
			return e;
		from += len;
		if (piece < MEM_REGION_BYTES)
			sched_yield();
	}
	return 0;
}

/* What there is to do in a group, one bit a region, is the caller's now. Lock held. */
static unsigned claim(struct mem_prefault *p, uint64_t group)
{
	uint64_t *word = &p->wanted[group * GROUP_REGIONS / 64];
	unsigned shift = group * GROUP_REGIONS % 64;
	unsigned mine = *word >> shift & ((1u << GROUP_REGIONS) - 1);

	if (!mine || p->failed || atomic_load(&p->stop))
		return 0;
	*word &= ~((uint64_t)mine << shift);
	bitmap_set(p->at_work, group);
	return mine;
}

/*
 * Huge pages take a tenth of the time, as a rule. Not where none is free and others have to be moved first,
 * or where this host is a guest itself whose own host has taken the large free pieces back. So both are
 * tried, and what was cheaper goes on. Lock held.
 */
static bool wants_huge(const struct mem_prefault *p)
{
	const struct cost *pages = &p->pages, *huge = &p->huge_pages;

	if (!atomic_load(&p->huge))
		return false;
	if (!pages->regions || !huge->regions)
		return !huge->regions;
	return huge->ns / huge->regions <= pages->ns / pages->regions;
}

static uint64_t thread_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
	return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

/* What was claimed. Lock held, and given back meanwhile. */
static void make_ready(struct mem_prefault *p, uint64_t group, unsigned mine)
{
	uint64_t map = mine, first = 0, end, before = thread_ns();
	bool huge = wants_huge(p);
	struct cost *cost = huge ? &p->huge_pages : &p->pages;
	int e = 0;

	pthread_mutex_unlock(&p->lock);
	for (; !e && (first = bitmap_next_set(&map, GROUP_REGIONS, first)) < GROUP_REGIONS; first = end) {
		end = bitmap_next_clear(&map, GROUP_REGIONS, first);
		e = fault_in(p, group * GROUP_REGIONS + first, group * GROUP_REGIONS + end, huge,
			     MEM_REGION_BYTES);
	}
	pthread_mutex_lock(&p->lock);
	cost->regions += (unsigned)__builtin_popcount(mine);
	cost->ns += thread_ns() - before;
	bitmap_clear(p->at_work, group);
	if (e && !p->failed)
		p->failed = e;
	pthread_cond_broadcast(&p->done);
}

static void *prefault_main(void *arg)
{
	struct mem_prefault *p = arg;
	struct timespec begin = clock_timespec(p->begin_ns);

	pthread_setname_np(pthread_self(), "mem prefault");
	confine_self(CONFINE_MEMORY);
	pthread_mutex_lock(&p->lock);
	while (!p->stop && clock_now_ns() < p->begin_ns)
		pthread_cond_timedwait(&p->done, &p->lock, &begin);
	while (p->next < GROUPS(p->opt.nregions)) {
		uint64_t group = p->next++;
		unsigned mine = claim(p, group);

		if (mine)
			make_ready(p, group, mine);
	}
	p->ended++;
	pthread_cond_broadcast(&p->done);
	pthread_mutex_unlock(&p->lock);
	return NULL;
}

void mem_prefault_region(struct mem_prefault *p, uint64_t region)
{
	uint64_t group = region / GROUP_REGIONS;
	unsigned mine;

	if (region >= p->opt.nregions)
		return;
	pthread_mutex_lock(&p->lock);
	if (clock_now_ns() < p->begin_ns && bitmap_test(p->wanted, region)) {
		bitmap_clear(p->wanted, region);
		pthread_mutex_unlock(&p->lock);
		/* what fails here, fails again where the data land */
		(void)fault_in(p, region, region + 1, false, EARLY_BYTES);
		return;
	}
	mine = bitmap_test(p->wanted, region) ? claim(p, group) : 0;
	if (mine)
		make_ready(p, group, mine);
	while (bitmap_test(p->at_work, group))
		pthread_cond_wait(&p->done, &p->lock);
	pthread_mutex_unlock(&p->lock);
}

bool mem_prefault_forgo(struct mem_prefault *p, uint64_t region)
{
	bool begun;

	if (region >= p->opt.nregions)
		return false;
	pthread_mutex_lock(&p->lock);
	begun = bitmap_test(p->given, region) && !bitmap_test(p->wanted, region);
	bitmap_clear(p->wanted, region);
	while (begun && bitmap_test(p->at_work, region / GROUP_REGIONS))
		pthread_cond_wait(&p->done, &p->lock);
	pthread_mutex_unlock(&p->lock);
	return begun;
}

static unsigned threads_by_processors(void)
{
	long n = sysconf(_SC_NPROCESSORS_ONLN);

	return n < 1 ? 1 : n > (long)THREADS_MAX ? THREADS_MAX : (unsigned)n;
}

int mem_prefault_start(const struct mem_prefault_options *opt, struct mem_prefault **out, struct error *err)
{
	unsigned nthreads = opt->nthreads ? opt->nthreads : threads_by_processors();
	struct mem_prefault *p;
	int e = 0;

	*out = NULL;
	if (opt->nregions > MEM_REGIONS(opt->space.npages))
		return error_set(err, EINVAL, "faulting in guest memory: %llu regions, the guest has %llu",
				 (unsigned long long)opt->nregions,
				 (unsigned long long)MEM_REGIONS(opt->space.npages));
	p = calloc(1, sizeof *p);
	if (!p)
		return error_errno(err, ENOMEM, "faulting in guest memory");
	p->opt = *opt;
	pthread_mutex_init(&p->lock, NULL);
	cond_init_monotonic(&p->done);
	p->begin_ns = clock_now_ns() + opt->delay_ms * UINT64_C(1000000);
	atomic_init(&p->huge, opt->huge);
	p->given = bitmap_alloc(opt->nregions);
	p->wanted = bitmap_alloc(opt->nregions);
	p->at_work = bitmap_alloc(GROUPS(opt->nregions));
	if (!p->given || !p->wanted || !p->at_work) {
		mem_prefault_free(p);
		return error_errno(err, ENOMEM, "faulting in guest memory");
	}
	for (uint64_t r = 0; (r = bitmap_next_set(opt->regions, opt->nregions, r)) < opt->nregions; r++) {
		bitmap_set(p->given, r);
		bitmap_set(p->wanted, r);
	}
	while (p->nthreads < nthreads && p->nthreads < THREADS_MAX && !e) {
		e = pthread_create(&p->threads[p->nthreads], NULL, prefault_main, p);
		p->nthreads += !e;
	}
	if (!p->nthreads) {
		mem_prefault_free(p);
		return error_errno(err, e, "faulting in guest memory: thread");
	}
	*out = p;
	return 0;
}

int mem_prefault_wait(struct mem_prefault *p, struct error *err)
{
	int e;

	pthread_mutex_lock(&p->lock);
	while (p->ended < p->nthreads)
		pthread_cond_wait(&p->done, &p->lock);
	e = p->failed;
	pthread_mutex_unlock(&p->lock);
	return e ? error_errno(err, e, "faulting in guest memory") : 0;
}

int mem_prefault_stop(struct mem_prefault *p, struct error *err)
{
	bool again = atomic_exchange(&p->stop, true);

	pthread_mutex_lock(&p->lock);
	pthread_cond_broadcast(&p->done);
	pthread_mutex_unlock(&p->lock);
	for (unsigned i = 0; !again && i < p->nthreads; i++)
		pthread_join(p->threads[i], NULL);
	if (!again)
		log_debug("guest memory faulted in: %llu regions in %llu ms of processor time, %llu as huge "
			  "pages in %llu ms",
			  (unsigned long long)p->pages.regions, (unsigned long long)p->pages.ns / 1000000,
			  (unsigned long long)p->huge_pages.regions,
			  (unsigned long long)p->huge_pages.ns / 1000000);
	return p->failed ? error_errno(err, p->failed, "faulting in guest memory") : 0;
}

void mem_prefault_free(struct mem_prefault *p)
{
	if (!p)
		return;
	(void)mem_prefault_stop(p, NULL);
	free(p->given);
	free(p->wanted);
	free(p->at_work);
	pthread_cond_destroy(&p->done);
	pthread_mutex_destroy(&p->lock);
	free(p);
}
