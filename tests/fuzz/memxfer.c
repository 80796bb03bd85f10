/* SPDX-License-Identifier: Apache-2.0 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "base/bytes.h"
#include "memxfer/codec.h"
#include "memxfer/delta.h"

#define NPAGES	 100000u
#define NSTREAMS 3u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* What is accepted as deltas of so many pages: each is read to its end and no further, and makes a page or is
 * refused. */
static void take_deltas(const uint8_t *p, size_t size, uint64_t pages)
{
	uint8_t page[MEM_PAGE_BYTES] = {0}, scratch[MEM_PAGE_BYTES];
	const uint8_t *at = p;

	if (mem_delta_pages_check(p, size, pages, NULL) < 0)
		return;
	for (uint64_t i = 0; i < pages; i++) {
		const uint8_t *before = at;
		size_t len = get_be16(at);

		if (mem_delta_page_apply(page, scratch, &at, NULL) == 0 &&
		    at != before + MEM_DELTA_HEAD_BYTES + len)
			abort();
		at = before + MEM_DELTA_HEAD_BYTES + len;
	}
	if (at != p + size)
		abort();
}

/* Header checksums are made right first, else nothing would get past them. A table that is accepted must lie
 * within the guest and its stream's regions, and account for the payload. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct mem_run runs[MEM_FRAME_RUNS_MAX];
	uint8_t raw[MEM_HEADER_BYTES];
	struct error err = ERROR_INIT;
	struct mem_header h;
	uint64_t pages = 0;

	if (size < MEM_HEADER_BYTES)
		return 0;
	memcpy(raw, data, sizeof raw);
	(void)mem_header_decode(raw, &h, &err);
	put_be32(raw, 0x534e4d4d);
	put_be16(raw + 4, MEM_WIRE_VERSION);
	put_be64(raw + 56, XXH3_64bits(raw, 56));
	if (mem_header_decode(raw, &h, &err) < 0)
		return 0;
	if (mem_body_bytes(&h) > MEM_BODY_MAX)
		abort();
	data += MEM_HEADER_BYTES;
	size -= MEM_HEADER_BYTES;
	bool named = h.type == MEM_FRAME_MISSING || h.type == MEM_FRAME_WANT,
	     delta = h.type == MEM_FRAME_DELTA;
	if ((h.type != MEM_FRAME_PAGES && !named && !delta) || size < (size_t)h.nruns * MEM_RUN_BYTES)
		return 0;
	h.stream %= NSTREAMS;
	if (mem_runs_decode(&h, data, NPAGES, NSTREAMS, runs, &err) < 0)
		return 0;
	for (uint32_t i = 0; i < h.nruns; i++) {
		if (!range_fits(runs[i].first, runs[i].npages, NPAGES) ||
		    (!named && !(h.flags & MEM_FLAG_FINAL) &&
		     runs[i].first / MEM_REGION_PAGES % NSTREAMS != h.stream))
			abort();
		/* only named, and never data, where nothing is carried */
		if (named && runs[i].kind != MEM_RUN_LATER)
			abort();
		if (delta != (runs[i].kind == MEM_RUN_DELTA))
			abort();
		if (delta || runs[i].kind == MEM_RUN_DATA)
			pages += runs[i].npages;
	}
	size_t table = (size_t)h.nruns * MEM_RUN_BYTES;
	if (delta)
		take_deltas(data + table, size - table < h.raw_len ? size - table : h.raw_len, pages);
	else if (pages * MEM_PAGE_BYTES != h.raw_len)
		abort();
	return 0;
}
