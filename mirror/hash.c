/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Hashes of a block's chunks: a few reads in flight, hashed by the calling thread. A chunk of which nothing
 * is allocated is not read, and of one that is partly so, only what is.
 */
#include <errno.h>
#define XXH_STATIC_LINKING_ONLY /* the state's size */
#include <xxhash.h>

#include "base/cleanup.h"
#include "base/huge.h"
#include "mirror/proof.h"

#define HASH_READS	 8
#define HASH_PIECE_BYTES (512u << 10)
#define HASH_EXTENTS	 32

static const uint8_t zeroes[64 << 10];

struct hash_job;

/* A chunk being hashed. */
struct hash_slot {
	struct hash_job *job;
	struct hash_slot *next; /* read */
	struct block_request req;
	struct iovec iov;
	uint8_t *buf;
	XXH3_state_t state;
	int result;
	bool busy;
	uint64_t chunk, cursor, end; /* bytes */
	uint64_t run_bytes;	     /* what is known of the cursor on */
	bool run_zero;
};

struct hash_job {
	struct block *blk;
	uint64_t seed, chunk_bytes, first;
	uint32_t piece_bytes, align;
	struct mirror_hash *out, zero; /* of a full chunk of zeroes */
	bool have_zero;
	struct error *err;
	pthread_mutex_t lock;
	pthread_cond_t wake;
	struct hash_slot *read; /* answered */
	struct hash_slot slots[HASH_READS];
	unsigned active;
	uint8_t *buffers; /* one a slot */
	/* extents from `known_at` on, asked for many chunks at a time */
	struct block_extent extents[HASH_EXTENTS];
	unsigned nextents, extent;
	uint64_t known_at, end;
};

static void update_zeroes(XXH3_state_t *st, uint64_t len)
{
	while (len) {
		size_t n = len < sizeof zeroes ? len : sizeof zeroes;
		XXH3_128bits_update(st, zeroes, n);
		len -= n;
	}
}

struct mirror_hash mirror_hash_zeroes(uint64_t seed, uint64_t len_bytes)
{
	XXH3_state_t st;
	XXH3_INITSTATE(&st);
	XXH3_128bits_reset_withSeed(&st, seed);
	update_zeroes(&st, len_bytes);
	XXH128_hash_t h = XXH3_128bits_digest(&st);
	return (struct mirror_hash){.low = h.low64, .high = h.high64};
}

static void read_done(struct block_request *req, int result)
{
	struct hash_slot *slot = req->opaque;
	struct hash_job *job = slot->job;
	pthread_mutex_lock(&job->lock);
	slot->result = result;
	slot->next = job->read;
	job->read = slot;
	pthread_cond_signal(&job->wake);
	pthread_mutex_unlock(&job->lock);
}

/* What is at the cursor, in units that the block can be asked for. */
static int look(struct hash_slot *slot)
{
	struct hash_job *job = slot->job;
	struct block_extent x;
	unsigned n = 1;
	uint64_t left = slot->end - slot->cursor;
	int rc = block_extents(job->blk, slot->cursor, left, &x, &n, job->err);
	if (rc)
		return rc;
	if (!n || !x.len_bytes)
		return error_set(job->err, EIO, "%s: no extent at %llu", job->blk->label,
				 (unsigned long long)slot->cursor);
	uint64_t len = x.len_bytes < left ? x.len_bytes : left;
	slot->run_zero = x.hole || x.zero;
	if (len < left && len % job->align) {
		/* A sector that is partly hole is data. */
		slot->run_zero = slot->run_zero && len > job->align;
		len = len > job->align ? len - len % job->align : job->align;
	}
	slot->run_bytes = len;
	return 0;
}

/* Reads the chunk's next piece, or ends it. */
static int step(struct hash_slot *slot)
{
	struct hash_job *job = slot->job;
	while (slot->cursor < slot->end) {
		int rc = slot->run_bytes ? 0 : look(slot);
		if (rc)
			return rc;
		if (slot->run_zero) {
			update_zeroes(&slot->state, slot->run_bytes);
			slot->cursor += slot->run_bytes;
			slot->run_bytes = 0;
			continue;
		}
		uint64_t len = slot->run_bytes < job->piece_bytes ? slot->run_bytes : job->piece_bytes;
		slot->iov = (struct iovec){.iov_base = slot->buf, .iov_len = len};
		slot->req = (struct block_request){.op = BLOCK_READ,
						   .offset_bytes = slot->cursor,
						   .len_bytes = len,
						   .iov = &slot->iov,
						   .niov = 1,
						   .done = read_done,
						   .opaque = slot};
		rc = block_submit(job->blk, &slot->req);
		if (rc)
			return error_errno(job->err, rc, "%s: read at %llu", job->blk->label,
					   (unsigned long long)slot->cursor);
		job->active++;
		return 0;
	}
	XXH128_hash_t h = XXH3_128bits_digest(&slot->state);
	job->out[slot->chunk - job->first] = (struct mirror_hash){.low = h.low64, .high = h.high64};
	slot->busy = false;
	return 0;
}

/* How many bytes at `at` are one way, as far as is known; asks again where nothing is. */
static int extent_at(struct hash_job *job, uint64_t at, bool *zero, uint64_t *len)
{
	while (job->extent < job->nextents && job->known_at + job->extents[job->extent].len_bytes <= at)
		job->known_at += job->extents[job->extent++].len_bytes;
	if (job->extent == job->nextents) {
		job->nextents = HASH_EXTENTS;
		job->extent = 0;
		job->known_at = at;
		int rc = block_extents(job->blk, at, job->end - at, job->extents, &job->nextents, job->err);
		if (rc)
			return rc;
		if (!job->nextents)
			return error_set(job->err, EIO, "%s: no extent at %llu", job->blk->label,
					 (unsigned long long)at);
	}
	const struct block_extent *x = &job->extents[job->extent];
	*zero = x->hole || x->zero;
	*len = job->known_at + x->len_bytes - at;
	return 0;
}

static void set_zero(struct hash_job *job, uint64_t chunk, uint64_t len)
{
	struct mirror_hash *out = &job->out[chunk - job->first];
	if (len < job->chunk_bytes) {
		*out = mirror_hash_zeroes(job->seed, len);
		return;
	}
	if (!job->have_zero)
		job->zero = mirror_hash_zeroes(job->seed, len);
	job->have_zero = true;
	*out = job->zero;
}

static int begin(struct hash_job *job, uint64_t chunk, struct hash_slot *slot)
{
	uint64_t at = chunk * job->chunk_bytes, known = 0;
	uint64_t len = job->end - at < job->chunk_bytes ? job->end - at : job->chunk_bytes;
	bool zero = false;
	int rc = extent_at(job, at, &zero, &known);
	if (rc)
		return rc;
	if (zero && known >= len) {
		set_zero(job, chunk, len);
		return 0;
	}
	slot->busy = true;
	slot->chunk = chunk;
	slot->cursor = at;
	slot->end = at + len;
	slot->run_zero = false;
	slot->run_bytes = !zero && known >= len ? len : 0;
	XXH3_128bits_reset_withSeed(&slot->state, job->seed);
	return step(slot);
}

static int read_finished(struct hash_slot *slot, int rc)
{
	struct hash_job *job = slot->job;
	job->active--;
	if (slot->result < 0 && !rc)
		return error_errno(job->err, slot->result, "%s: read of %llu bytes at %llu", job->blk->label,
				   (unsigned long long)slot->req.len_bytes,
				   (unsigned long long)slot->req.offset_bytes);
	if (rc)
		return rc;
	XXH3_128bits_update(&slot->state, slot->buf, slot->req.len_bytes);
	slot->cursor += slot->req.len_bytes;
	slot->run_bytes -= slot->req.len_bytes;
	return step(slot);
}

static struct hash_slot *wait_read(struct hash_job *job)
{
	SCOPE_LOCK(&job->lock);
	while (!job->read)
		pthread_cond_wait(&job->wake, &job->lock);
	struct hash_slot *slot = job->read;
	job->read = slot->next;
	return slot;
}

static struct hash_slot *idle_slot(struct hash_job *job)
{
	for (unsigned i = 0; i < HASH_READS; i++)
		if (!job->slots[i].busy)
			return &job->slots[i];
	return NULL;
}

static int run(struct hash_job *job, unsigned n)
{
	int rc = 0;
	uint64_t next = job->first;
	for (;;) {
		struct hash_slot *slot;
		while (!rc && next < job->first + n && (slot = idle_slot(job)))
			rc = begin(job, next++, slot);
		if (!job->active)
			return rc;
		int later = read_finished(wait_read(job), rc);
		if (!rc)
			rc = later;
	}
}

static size_t buffer_bytes(const struct hash_job *job)
{
	return ((size_t)job->piece_bytes + 4095) / 4096 * 4096;
}

static int prepare(struct hash_job *job)
{
	job->buffers = huge_alloc(HASH_READS * buffer_bytes(job));
	if (!job->buffers)
		return error_errno(job->err, errno, "%s: hashes", job->blk->label);
	for (unsigned i = 0; i < HASH_READS; i++) {
		job->slots[i].job = job;
		job->slots[i].buf = job->buffers + i * buffer_bytes(job);
	}
	return 0;
}

int mirror_hash_block(struct block *blk, uint32_t chunk_bytes, uint64_t seed, uint64_t first, unsigned n,
		      struct mirror_hash *out, struct error *err)
{
	uint64_t nchunks = blk->size_bytes / chunk_bytes + (blk->size_bytes % chunk_bytes != 0);
	if (first > nchunks || n > nchunks - first)
		return error_set(err, EINVAL, "%s: hashes of %u chunks from %llu of %llu", blk->label, n,
				 (unsigned long long)first, (unsigned long long)nchunks);
	struct hash_job job = {.blk = blk,
			       .seed = seed,
			       .chunk_bytes = chunk_bytes,
			       .first = first,
			       .out = out,
			       .err = err,
			       .end = blk->size_bytes,
			       .align = blk->limits.request_alignment ? blk->limits.request_alignment : 1};
	job.piece_bytes = chunk_bytes < HASH_PIECE_BYTES ? chunk_bytes : HASH_PIECE_BYTES;
	if (blk->limits.max_transfer_bytes && blk->limits.max_transfer_bytes < job.piece_bytes)
		job.piece_bytes = blk->limits.max_transfer_bytes;
	if (first * chunk_bytes + (uint64_t)n * chunk_bytes < job.end)
		job.end = (first + n) * chunk_bytes;
	pthread_mutex_init(&job.lock, NULL);
	pthread_cond_init(&job.wake, NULL);
	int rc = prepare(&job);
	if (!rc)
		rc = run(&job, n);
	huge_free(job.buffers, HASH_READS * buffer_bytes(&job));
	pthread_cond_destroy(&job.wake);
	pthread_mutex_destroy(&job.lock);
	return rc;
}
