/* SPDX-License-Identifier: Apache-2.0 */
#include "mirror/witness.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "base/bitmap.h"
#include "base/cleanup.h"

#define WITNESS_PART_BYTES (256u << 20)

struct witness {
	struct block *blk;
	atomic_bool counting; /* a chunk is */
	atomic_bool cancelled;
	pthread_mutex_t lock; /* what follows */
	struct proof *proof;
	uint64_t *begun, nbegun; /* chunks that were asked for */
	uint64_t hashed_bytes;
	struct mirror_hash root;
};

int witness_create(struct block *blk, uint32_t chunk_bytes, uint64_t seed, struct witness **out,
		   struct error *err)
{
	if (chunk_bytes < 4096 || (chunk_bytes & (chunk_bytes - 1)))
		return error_set(err, EINVAL, "%s: hashes of chunks of %u bytes", blk->label, chunk_bytes);
	struct witness *w = calloc(1, sizeof *w);
	if (!w)
		return error_errno(err, ENOMEM, "%s: hashes", blk->label);
	w->blk = blk;
	atomic_init(&w->counting, false);
	atomic_init(&w->cancelled, false);
	pthread_mutex_init(&w->lock, NULL);
	if (proof_create(blk->size_bytes, chunk_bytes, seed, &w->proof) ||
	    !(w->begun = bitmap_alloc(w->proof->nchunks + 1))) {
		witness_free(w);
		return error_errno(err, ENOMEM, "%s: hashes", blk->label);
	}
	*out = w;
	return 0;
}

void witness_free(struct witness *w)
{
	if (!w)
		return;
	proof_free(w->proof);
	free(w->begun);
	pthread_mutex_destroy(&w->lock);
	free(w);
}

static void begin(struct witness *w, uint64_t first, unsigned n)
{
	SCOPE_LOCK(&w->lock);
	for (uint64_t c = first; c < first + n; c++) {
		proof_begin(w->proof, c);
		w->nbegun += !bitmap_test(w->begun, c);
		bitmap_set(w->begun, c);
	}
	atomic_store(&w->counting, true);
}

int witness_hashes(struct witness *w, uint64_t first, unsigned n, struct mirror_hash *out, struct error *err)
{
	struct proof *p = w->proof;
	if (!n || first >= p->nchunks || n > p->nchunks - first)
		return error_set(err, EINVAL, "%s: hashes of %u chunks from %llu of %llu", w->blk->label, n,
				 (unsigned long long)first, (unsigned long long)p->nchunks);
	begin(w, first, n);
	uint64_t at = first << p->shift,
		 len = ((uint64_t)(n - 1) << p->shift) + proof_chunk_len(p, first + n - 1);
	if (!w->blk->limits.read_only) {
		int rc = block_flush(w->blk);
		if (rc)
			return error_errno(err, rc, "%s: flush before it is read again", w->blk->label);
	}
	block_drop_cache(w->blk, at, len);
	/* In parts, as a source may ask for many terabytes at a time. */
	unsigned part = p->chunk_bytes < WITNESS_PART_BYTES ? WITNESS_PART_BYTES / p->chunk_bytes : 1;
	for (unsigned done = 0, now; done < n; done += now) {
		if (atomic_load(&w->cancelled))
			return error_set(err, ECANCELED, "%s: hashes: cancelled", w->blk->label);
		now = n - done < part ? n - done : part;
		int rc = mirror_hash_block(w->blk, p->chunk_bytes, p->seed, first + done, now, out + done,
					   err);
		if (rc)
			return error_prefix(err, "reading what was written");
	}
	SCOPE_LOCK(&w->lock);
	for (unsigned i = 0; i < n; i++)
		proof_set(p, first + i, &out[i]);
	w->hashed_bytes += len;
	return 0;
}

void witness_cancel(struct witness *w)
{
	if (w)
		atomic_store(&w->cancelled, true);
}

/* lock held. */
static bool any_begun(const struct witness *w, uint64_t first, uint64_t last)
{
	return bitmap_next_set(w->begun, last + 1, first) <= last;
}

void witness_observe(struct witness *w, uint64_t offset_bytes, uint64_t len_bytes, const void *data)
{
	struct proof *p = w->proof;
	/* Beyond the end: the block refuses it. */
	if (!atomic_load(&w->counting) || !len_bytes || offset_bytes >= p->size_bytes ||
	    len_bytes > p->size_bytes - offset_bytes)
		return;
	uint64_t at = offset_bytes, end = offset_bytes + len_bytes, len;
	pthread_mutex_lock(&w->lock);
	bool counts = any_begun(w, at >> p->shift, (end - 1) >> p->shift);
	pthread_mutex_unlock(&w->lock);
	for (; counts && at < end; at += len) {
		uint64_t chunk = at >> p->shift, next = (chunk + 1) << p->shift;
		len = (next < end ? next : end) - at;
		struct mirror_hash h = proof_write(p->seed, at, len,
						   data ? (const uint8_t *)data + (at - offset_bytes) : NULL);
		SCOPE_LOCK(&w->lock);
		if (bitmap_test(w->begun, chunk))
			proof_count(p, chunk, &h);
	}
}

struct mirror_hash witness_root(struct witness *w)
{
	SCOPE_LOCK(&w->lock);
	w->root = (struct mirror_hash){0};
	if (w->nbegun == w->proof->nchunks)
		w->root = proof_root(w->proof);
	return w->root;
}

int witness_compare(struct witness *w, const struct mirror_sums *sums, struct error *err)
{
	struct proof *p = w->proof;
	SCOPE_LOCK(&w->lock);
	unsigned given = 0;
	for (uint64_t g = 0; g < p->ngroups; g++) {
		struct mirror_hash expected = {0};
		if (given < sums->n && sums->groups[given].group == g)
			expected = sums->groups[given++].sum;
		if (mirror_hash_equal(&expected, &p->groups[g]))
			continue;
		uint64_t at, len;
		proof_group_range(p, g, &at, &len);
		return error_set(err, EILSEQ,
				 "%s: what was written within bytes %llu to %llu since they were compared is "
				 "not what the source sent",
				 w->blk->label, (unsigned long long)at, (unsigned long long)(at + len - 1));
	}
	if (given < sums->n || w->nbegun != p->nchunks || !mirror_hash_equal(&sums->root, &w->root) ||
	    !mirror_hash_equal(&sums->total, &p->total))
		return error_set(err, EILSEQ, "%s: the content that was compared is not the source's",
				 w->blk->label);
	return 0;
}

void witness_stats(struct witness *w, uint64_t *hashed_bytes, uint64_t *writes)
{
	SCOPE_LOCK(&w->lock);
	*hashed_bytes = w->hashed_bytes;
	*writes = w->proof->writes;
}
