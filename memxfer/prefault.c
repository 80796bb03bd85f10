/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>

#include "base/bitmap.h"
#include "memxfer/codec.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

#define PREFAULT_THREADS_MAX 16u

struct prefault {
	const struct mem_space *space;
	const uint64_t *regions;
	uint64_t nregions;
	const bool *cancel;
	_Atomic uint64_t next;
	_Atomic int failed; /* positive errno */
};

/* For kernels before 5.14. An atomic add of nothing faults the page in for writing and loses no data that the
 * receiver stores meanwhile. */
static void touch_region(uint8_t *p, size_t len)
{
	for (size_t i = 0; i < len; i += MEM_PAGE_BYTES)
		__atomic_fetch_add(p + i, 0, __ATOMIC_RELAXED);
}

static int populate_region(const struct prefault *pf, uint64_t region)
{
	uint64_t offset = region * MEM_REGION_BYTES;
	uint64_t end = pf->space->npages * MEM_PAGE_BYTES;
	size_t len = end - offset < MEM_REGION_BYTES ? (size_t)(end - offset) : MEM_REGION_BYTES;

	while (madvise(pf->space->base + offset, len, MADV_POPULATE_WRITE) < 0) {
		if (errno == EINTR || errno == EAGAIN)
			continue;
		if (errno != EINVAL)
			return errno;
		touch_region(pf->space->base + offset, len);
		break;
	}
	return 0;
}

static void *prefault_main(void *arg)
{
	struct prefault *pf = arg;

	for (;;) {
		uint64_t region = atomic_fetch_add(&pf->next, 1);
		int e;

		if (region >= pf->nregions || atomic_load(&pf->failed))
			return NULL;
		if (!bitmap_test(pf->regions, region))
			continue;
		if (pf->cancel && __atomic_load_n(pf->cancel, __ATOMIC_RELAXED)) {
			atomic_store(&pf->failed, ECANCELED);
			return NULL;
		}
		e = populate_region(pf, region);
		if (e)
			atomic_store(&pf->failed, e);
	}
}

int mem_prefault(const struct mem_space *space, const uint64_t *region_bitmap, uint64_t nregions,
		 unsigned nthreads, const bool *cancel, struct error *err)
{
	struct prefault pf = {
		.space = space, .regions = region_bitmap, .nregions = nregions, .cancel = cancel};
	pthread_t threads[PREFAULT_THREADS_MAX];
	unsigned started = 0;
	int e;

	if (nregions > MEM_REGIONS(space->npages))
		return error_set(err, EINVAL, "faulting in guest memory: %llu regions, the guest has %llu",
				 (unsigned long long)nregions,
				 (unsigned long long)MEM_REGIONS(space->npages));
	if (nthreads > PREFAULT_THREADS_MAX)
		nthreads = PREFAULT_THREADS_MAX;
	while (started + 1 < nthreads && pthread_create(&threads[started], NULL, prefault_main, &pf) == 0)
		started++;
	prefault_main(&pf);
	while (started)
		pthread_join(threads[--started], NULL);
	e = atomic_load(&pf.failed);
	if (e == ECANCELED)
		return error_set(err, ECANCELED, "faulting in guest memory was cancelled");
	if (e)
		return error_errno(err, e, "faulting in guest memory");
	return 0;
}
