/* SPDX-License-Identifier: Apache-2.0 */
#include "memxfer/prefault.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/bitmap.h"
#include "base/log.h"
#include "memxfer/codec.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

#define THREADS_MAX 8u
#define NO_REGION   UINT64_MAX

struct mem_prefault {
	struct mem_prefault_options opt;
	pthread_t threads[THREADS_MAX];
	unsigned nthreads;
	atomic_bool stop, huge;
	_Atomic uint64_t huge_regions;

	pthread_mutex_t lock;
	pthread_cond_t done;	       /* a thread is through with its region */
	uint64_t *wanted;	       /* that nobody has begun */
	uint64_t current[THREADS_MAX]; /* what each thread is at, or NO_REGION */
	uint64_t next, regions;
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
 * A huge page, by name: for a memfd the kernel's own choice is mostly "never", which leaves this to those who
 * ask. It takes a page to begin with. False: not to be had.
 */
static bool make_huge(struct mem_prefault *p, uint8_t *at, size_t len)
{
	if (!atomic_load_explicit(&p->huge, memory_order_relaxed) || len != MEM_REGION_BYTES ||
	    (uintptr_t)at % MEM_REGION_BYTES)
		return false;
	touch(at, MEM_PAGE_BYTES);
	if (madvise(at, len, MADV_COLLAPSE) == 0) {
		atomic_fetch_add_explicit(&p->huge_regions, 1, memory_order_relaxed);
		return true;
	}
	/* EINVAL: this kernel cannot, or may not. For all else the next region has another chance. */
	if (errno == EINVAL)
		atomic_store(&p->huge, false);
	return false;
}

static int fault_in(struct mem_prefault *p, uint64_t region)
{
	const struct mem_space *space = &p->opt.space;
	uint64_t offset = region * MEM_REGION_BYTES, end = space->npages * MEM_PAGE_BYTES;
	size_t len = end - offset < MEM_REGION_BYTES ? (size_t)(end - offset) : MEM_REGION_BYTES;
	uint8_t *at = space->base + offset;

	if (make_huge(p, at, len))
		return 0;
	while (madvise(at, len, MADV_POPULATE_WRITE) < 0) {
		if (errno == EINTR || errno == EAGAIN)
			continue;
		if (errno != EINVAL)
			return errno;
		touch(at, len);
		break;
	}
	return 0;
}

/* The next region that nobody has begun. Lock held. */
static uint64_t next_region(struct mem_prefault *p)
{
	uint64_t region = bitmap_next_set(p->wanted, p->opt.nregions, p->next);

	if (region >= p->opt.nregions || p->failed || atomic_load(&p->stop))
		return NO_REGION;
	bitmap_clear(p->wanted, region);
	p->next = region + 1;
	p->regions++;
	return region;
}

static void *prefault_main(void *arg)
{
	struct mem_prefault *p = arg;
	uint64_t region;
	unsigned self;

	pthread_mutex_lock(&p->lock);
	for (self = 0; !pthread_equal(p->threads[self], pthread_self());)
		self++;
	while ((region = next_region(p)) != NO_REGION) {
		int e;

		p->current[self] = region;
		pthread_mutex_unlock(&p->lock);
		e = fault_in(p, region);
		pthread_mutex_lock(&p->lock);
		p->current[self] = NO_REGION;
		if (e && !p->failed)
			p->failed = e;
		pthread_cond_broadcast(&p->done);
	}
	p->ended++;
	pthread_cond_broadcast(&p->done);
	pthread_mutex_unlock(&p->lock);
	return NULL;
}

/* Lock held. */
static bool is_at_work(const struct mem_prefault *p, uint64_t region)
{
	for (unsigned i = 0; i < p->nthreads; i++)
		if (p->current[i] == region)
			return true;
	return false;
}

void mem_prefault_region(struct mem_prefault *p, uint64_t region)
{
	bool ours;

	pthread_mutex_lock(&p->lock);
	ours = region < p->opt.nregions && bitmap_test(p->wanted, region) && !atomic_load(&p->stop);
	if (ours) {
		bitmap_clear(p->wanted, region);
		p->regions++;
	}
	while (!ours && is_at_work(p, region))
		pthread_cond_wait(&p->done, &p->lock);
	pthread_mutex_unlock(&p->lock);
	/* Without it the data that come fault their pages in. */
	if (ours)
		(void)fault_in(p, region);
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
	pthread_cond_init(&p->done, NULL);
	atomic_init(&p->huge, opt->huge);
	for (unsigned i = 0; i < THREADS_MAX; i++)
		p->current[i] = NO_REGION;
	p->wanted = bitmap_alloc(opt->nregions ? opt->nregions : 1);
	if (!p->wanted) {
		mem_prefault_free(p);
		return error_errno(err, ENOMEM, "faulting in guest memory");
	}
	for (uint64_t r = 0; (r = bitmap_next_set(opt->regions, opt->nregions, r)) < opt->nregions; r++)
		bitmap_set(p->wanted, r);
	/* Threads look themselves up under the lock. */
	pthread_mutex_lock(&p->lock);
	while (p->nthreads < nthreads && p->nthreads < THREADS_MAX && !e) {
		e = pthread_create(&p->threads[p->nthreads], NULL, prefault_main, p);
		p->nthreads += !e;
	}
	pthread_mutex_unlock(&p->lock);
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

	for (unsigned i = 0; !again && i < p->nthreads; i++)
		pthread_join(p->threads[i], NULL);
	if (!again)
		log_debug("faulted in %llu regions of guest memory, %llu as huge pages",
			  (unsigned long long)p->regions, (unsigned long long)atomic_load(&p->huge_regions));
	return p->failed ? error_errno(err, p->failed, "faulting in guest memory") : 0;
}

void mem_prefault_free(struct mem_prefault *p)
{
	if (!p)
		return;
	(void)mem_prefault_stop(p, NULL);
	free(p->wanted);
	pthread_cond_destroy(&p->done);
	pthread_mutex_destroy(&p->lock);
	free(p);
}
