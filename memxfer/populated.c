/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <unistd.h>

#include "base/bitmap.h"
#include "memxfer/codec.h"
#include "memxfer/holes.h"

int mem_holes_next_data(const struct mem_space *space, uint64_t from, uint64_t *page, struct error *err)
{
	off_t at;

	if (from >= space->npages) {
		*page = space->npages;
		return 0;
	}
	at = lseek(space->fd, (off_t)(from * MEM_PAGE_BYTES), SEEK_DATA);
	if (at < 0 && errno != ENXIO)
		return error_errno(err, errno, "guest memory: SEEK_DATA");
	*page = at < 0 ? space->npages : (uint64_t)at / MEM_PAGE_BYTES;
	if (*page > space->npages)
		*page = space->npages;
	return 0;
}

int mem_holes_next_hole(const struct mem_space *space, uint64_t from, uint64_t *page, struct error *err)
{
	off_t at = lseek(space->fd, (off_t)(from * MEM_PAGE_BYTES), SEEK_HOLE);

	if (at < 0 && errno != ENXIO)
		return error_errno(err, errno, "guest memory: SEEK_HOLE");
	/* With a page cache of huge pages a hole may begin within none of ours: round up, data is what
	 * counts. */
	*page = at < 0 ? from : ((uint64_t)at + MEM_PAGE_BYTES - 1) / MEM_PAGE_BYTES;
	if (*page > space->npages)
		*page = space->npages;
	return 0;
}

int mem_populated_pages(const struct mem_space *space, uint64_t *npages, struct error *err)
{
	uint64_t first = 0, end = 0;

	*npages = 0;
	for (;;) {
		int ret = mem_holes_next_data(space, end, &first, err);

		if (ret < 0)
			return ret;
		if (first >= space->npages)
			return 0;
		ret = mem_holes_next_hole(space, first, &end, err);
		if (ret < 0)
			return ret;
		if (end <= first) /* punched between the two calls */
			end = first + 1;
		*npages += end - first;
	}
}

int mem_populated_regions(const struct mem_space *space, uint64_t *region_bitmap, struct error *err)
{
	uint64_t nregions = MEM_REGIONS(space->npages), first = 0, end = 0;

	bitmap_clear_range(region_bitmap, 0, nregions);
	for (;;) {
		uint64_t last;
		int ret = mem_holes_next_data(space, end, &first, err);

		if (ret < 0)
			return ret;
		if (first >= space->npages)
			return 0;
		ret = mem_holes_next_hole(space, first, &end, err);
		if (ret < 0)
			return ret;
		if (end <= first)
			end = first + 1;
		last = (end - 1) / MEM_REGION_PAGES;
		bitmap_set_range(region_bitmap, first / MEM_REGION_PAGES,
				 last - first / MEM_REGION_PAGES + 1);
		/* The rest of the last region is of no further interest. */
		end = (last + 1) * MEM_REGION_PAGES;
	}
}
