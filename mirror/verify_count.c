/* SPDX-License-Identifier: Apache-2.0 */
/* What is written to verified chunks, and to those that turn so before it is sent. */
#include <errno.h>
#include <stdlib.h>

#include "base/bitmap.h"
#include "mirror/verify_impl.h"

static uint64_t part_len(uint64_t at, uint64_t end, unsigned shift)
{
	uint64_t next = ((at >> shift) + 1) << shift;
	return (next < end ? next : end) - at;
}

void verify_plan_op(struct mirror_op *op)
{
	const struct chunk_map *map = op->m->map;
	const struct verify *v = op->m->verify;
	op->counted = false;
	if (!map->nverified && !v)
		return;
	for (unsigned i = 0; i < op->npieces && !op->counted; i++) {
		const struct block_request *req = &op->pieces[i].req;
		op->counted = v && verify_lock_before(v, req->offset_bytes, req->len_bytes);
		uint64_t last = (req->offset_bytes + req->len_bytes - 1) >> map->shift;
		for (uint64_t c = req->offset_bytes >> map->shift; c <= last && !op->counted; c++)
			op->counted = bitmap_test(map->verified, c);
	}
	/* A chunk's turning verified needs that no operation is there, but for those behind the comparison.
	 */
	if (op->counted) {
		op->write_seed = map->proof->seed;
		op->write_shift = map->shift;
	}
}

int verify_hash_op(struct mirror_op *op)
{
	if (!op->counted)
		return 0;
	size_t n = 0;
	for (int pass = 0; pass < 2; pass++) {
		if (pass && !(op->write_hashes = calloc(n, sizeof *op->write_hashes)))
			return -ENOMEM;
		n = 0;
		for (unsigned i = 0; i < op->npieces; i++) {
			const struct block_request *req = &op->pieces[i].req;
			uint64_t at = req->offset_bytes, end = at + req->len_bytes, len;
			op->pieces[i].first_hash = n;
			for (; at < end; at += len, n++) {
				len = part_len(at, end, op->write_shift);
				const uint8_t *data = req->niov ? req->iov->iov_base : NULL;
				if (pass)
					op->write_hashes[n] =
						proof_write(op->write_seed, at, len,
							    data ? data + (at - req->offset_bytes) : NULL);
			}
		}
	}
	return 0;
}

void verify_count_piece(const struct remote_piece *piece)
{
	const struct mirror_op *op = piece->owner;
	struct chunk_map *map = op->m->map;
	if (!op->counted)
		return;
	size_t n = piece->first_hash;
	uint64_t at = piece->req.offset_bytes, end = at + piece->req.len_bytes, len;
	for (; at < end; at += len, n++) {
		len = part_len(at, end, op->write_shift);
		if (bitmap_test(map->verified, at >> map->shift))
			proof_count(map->proof, at >> map->shift, &op->write_hashes[n]);
	}
}
