/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the two ends of a mirror know of a disk's content, to be compared: a hash for each chunk, and a sum
 * over the writes that came after it. Both ends keep the same tables; the caller brings the lock.
 *
 * The sum of a chunk is the sum modulo 2^128 of a hash of each write's part in the chunk (what, where, which
 * bytes), in no order: replies and connections may overtake one another, while writes that overlap do not.
 * Sums of many chunks are sums again, so that a disk's writes are compared in at most PROOF_GROUPS figures.
 */
#ifndef MIRROR_PROOF_H
#define MIRROR_PROOF_H

#include <stdbool.h>
#include <stdint.h>

#include "mirror/mirror.h"

#define PROOF_GROUPS MIRROR_SUM_GROUPS

struct proof {
	uint64_t seed, size_bytes, nchunks, ngroups;
	uint32_t chunk_bytes;
	unsigned shift, group_shift;	/* chunk: bytes; group: chunks */
	struct mirror_hash *hashes;	/* of the chunks, when they were last hashed */
	struct mirror_hash *sums;	/* of what was written to them since */
	struct mirror_hash *groups;	/* sums of sums */
	struct mirror_hash total, root; /* of all sums; of the hashes, when a verification ended */
	uint64_t writes;		/* parts in the sums, ever */
};

/* chunk_bytes: a power of two. 0 or -ENOMEM. */
int proof_create(uint64_t size_bytes, uint32_t chunk_bytes, uint64_t seed, struct proof **out);
void proof_free(struct proof *p); /* NULL is fine */
uint64_t proof_chunk_len(const struct proof *p, uint64_t chunk);
/* The chunk's content begins to be looked at: the sum begins anew. */
void proof_begin(struct proof *p, uint64_t chunk);
void proof_set(struct proof *p, uint64_t chunk, const struct mirror_hash *hash);
/* The hash of a write of data (NULL: of zeroes) that lies within one chunk. */
struct mirror_hash proof_write(uint64_t seed, uint64_t offset_bytes, uint64_t len_bytes, const void *data);
void proof_count(struct proof *p, uint64_t chunk, const struct mirror_hash *write);
/* Over the chunks' hashes in order, without the sums. Reads the whole table. */
struct mirror_hash proof_root(const struct proof *p);
void proof_group_range(const struct proof *p, uint64_t group, uint64_t *offset_bytes, uint64_t *len_bytes);

struct mirror_hash mirror_hash_bytes(uint64_t seed, const void *data, uint64_t len_bytes);
struct mirror_hash mirror_hash_zeroes(uint64_t seed, uint64_t len_bytes);
static inline bool mirror_hash_equal(const struct mirror_hash *a, const struct mirror_hash *b)
{
	return a->low == b->low && a->high == b->high;
}
struct mirror_hash mirror_hash_add(struct mirror_hash a, struct mirror_hash b);
struct mirror_hash mirror_hash_subtract(struct mirror_hash a, struct mirror_hash b);

/* 16 bytes, most significant first, as it is printed. */
#define MIRROR_HASH_BYTES 16
void mirror_hash_put(uint8_t out[MIRROR_HASH_BYTES], const struct mirror_hash *h);
struct mirror_hash mirror_hash_get(const uint8_t in[MIRROR_HASH_BYTES]);
/* 32 hexadecimal digits. */
void mirror_hash_print(const struct mirror_hash *h, char out[33]);

#endif
