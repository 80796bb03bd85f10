/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/move_compare.h"

#include <errno.h>
#include <stdlib.h>

#include "base/bitmap.h"
#include "base/bytes.h"
#include "memxfer/memory_hash.h"

#define HEAD_BYTES 24u

int move_image_init(struct move_image *im, uint64_t npages, struct error *err)
{
	*im = (struct move_image){.npages = npages,
				  .chunk_pages = mem_hash_chunk_pages(npages, MOVE_COMPARE_CHUNKS_MAX)};
	im->nchunks = (uint32_t)((npages + im->chunk_pages - 1) / im->chunk_pages);
	im->hashes = calloc(im->nchunks, sizeof *im->hashes);
	im->skip = bitmap_alloc(im->nchunks);
	return im->hashes && im->skip ? 0 : error_errno(err, ENOMEM, "hashes of guest memory");
}

void move_image_release(struct move_image *im)
{
	free(im->hashes);
	free(im->skip);
	*im = (struct move_image){0};
}

void move_image_skip(struct move_image *im, const uint64_t *pages)
{
	uint64_t page = 0;

	while ((page = bitmap_next_set(pages, im->npages, page)) < im->npages) {
		bitmap_set(im->skip, page / im->chunk_pages);
		page = (page / im->chunk_pages + 1) * im->chunk_pages;
	}
}

uint32_t move_image_left_out(const struct move_image *im)
{
	return (uint32_t)bitmap_count(im->skip, im->nchunks);
}

uint32_t move_image_bytes(const struct move_image *im)
{
	return HEAD_BYTES + im->nchunks * 8 + (uint32_t)BITMAP_WORDS(im->nchunks) * 8;
}

void move_image_encode(uint8_t *out, const struct move_image *im)
{
	put_be64(out, im->npages);
	put_be64(out + 8, im->state_sum);
	put_be32(out + 16, im->chunk_pages);
	put_be32(out + 20, im->nchunks);
	out += HEAD_BYTES;
	for (uint32_t i = 0; i < im->nchunks; i++, out += 8)
		put_be64(out, im->hashes[i]);
	for (uint32_t i = 0; i < BITMAP_WORDS(im->nchunks); i++, out += 8)
		put_be64(out, im->skip[i]);
}

int move_image_decode(const uint8_t *raw, uint32_t len, struct move_image *im, struct error *err)
{
	if (len != move_image_bytes(im) || get_be64(raw) != im->npages ||
	    get_be32(raw + 16) != im->chunk_pages || get_be32(raw + 20) != im->nchunks)
		return error_set(err, EPROTO,
				 "verify: %u bytes that do not describe %llu pages in chunks of %u", len,
				 (unsigned long long)im->npages, im->chunk_pages);
	im->state_sum = get_be64(raw + 8);
	raw += HEAD_BYTES;
	for (uint32_t i = 0; i < im->nchunks; i++, raw += 8)
		im->hashes[i] = get_be64(raw);
	for (uint32_t i = 0; i < BITMAP_WORDS(im->nchunks); i++, raw += 8)
		im->skip[i] = get_be64(raw);
	if (im->nchunks % 64 && im->skip[im->nchunks / 64] >> (im->nchunks % 64))
		return error_set(err, EPROTO, "verify: a chunk after the last is left out");
	return 0;
}

int move_image_differ(const struct move_image *ours, const struct move_image *theirs, struct error *err)
{
	uint64_t n = 0, first = 0;

	for (uint32_t i = 0; i < ours->nchunks; i++) {
		if (bitmap_test(ours->skip, i) || ours->hashes[i] == theirs->hashes[i])
			continue;
		if (!n++)
			first = i;
	}
	if (!n)
		return 0;
	return error_set(err, EBADMSG,
			 "guest memory differs in %llu of %u pieces, first in the %u KiB at byte 0x%llx",
			 (unsigned long long)n, ours->nchunks, ours->chunk_pages * 4,
			 (unsigned long long)first * ours->chunk_pages * 4096);
}
