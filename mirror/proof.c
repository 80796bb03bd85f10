/* SPDX-License-Identifier: Apache-2.0 */
#include "mirror/proof.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#define XXH_STATIC_LINKING_ONLY /* the state's size */
#include <xxhash.h>

#include "base/bytes.h"

int proof_create(uint64_t size_bytes, uint32_t chunk_bytes, uint64_t seed, struct proof **out)
{
	struct proof *p = calloc(1, sizeof *p);
	if (!p)
		return -ENOMEM;
	p->seed = seed;
	p->size_bytes = size_bytes;
	p->chunk_bytes = chunk_bytes;
	p->shift = (unsigned)__builtin_ctz(chunk_bytes);
	p->nchunks = (size_bytes >> p->shift) + ((size_bytes & (chunk_bytes - 1)) != 0);
	while ((p->nchunks >> p->group_shift) >= PROOF_GROUPS)
		p->group_shift++;
	p->ngroups = p->nchunks ? ((p->nchunks - 1) >> p->group_shift) + 1 : 0;
	/* one more: an empty disk */
	p->hashes = calloc(p->nchunks + 1, sizeof *p->hashes);
	p->sums = calloc(p->nchunks + 1, sizeof *p->sums);
	p->groups = calloc(p->ngroups + 1, sizeof *p->groups);
	if (!p->hashes || !p->sums || !p->groups) {
		proof_free(p);
		return -ENOMEM;
	}
	*out = p;
	return 0;
}

void proof_free(struct proof *p)
{
	if (!p)
		return;
	free(p->hashes);
	free(p->sums);
	free(p->groups);
	free(p);
}

uint64_t proof_chunk_len(const struct proof *p, uint64_t chunk)
{
	uint64_t at = chunk << p->shift;
	return p->size_bytes - at < p->chunk_bytes ? p->size_bytes - at : p->chunk_bytes;
}

void proof_begin(struct proof *p, uint64_t chunk)
{
	struct mirror_hash *group = &p->groups[chunk >> p->group_shift];
	*group = mirror_hash_subtract(*group, p->sums[chunk]);
	p->total = mirror_hash_subtract(p->total, p->sums[chunk]);
	p->sums[chunk] = (struct mirror_hash){0};
}

void proof_set(struct proof *p, uint64_t chunk, const struct mirror_hash *hash)
{
	p->hashes[chunk] = *hash;
}

struct mirror_hash proof_write(uint64_t seed, uint64_t offset_bytes, uint64_t len_bytes, const void *data)
{
	struct mirror_hash h = {0};
	if (data)
		h = mirror_hash_bytes(seed, data, len_bytes);
	uint8_t head[40];
	put_be64(head, data != NULL);
	put_be64(head + 8, offset_bytes);
	put_be64(head + 16, len_bytes);
	mirror_hash_put(head + 24, &h);
	return mirror_hash_bytes(seed, head, sizeof head);
}

void proof_count(struct proof *p, uint64_t chunk, const struct mirror_hash *write)
{
	struct mirror_hash *group = &p->groups[chunk >> p->group_shift];
	p->sums[chunk] = mirror_hash_add(p->sums[chunk], *write);
	*group = mirror_hash_add(*group, *write);
	p->total = mirror_hash_add(p->total, *write);
	p->writes++;
}

struct mirror_hash proof_root(const struct proof *p)
{
	/* In the order of the wire, so that the root does not depend on this machine's. */
	uint8_t raw[256 * MIRROR_HASH_BYTES];
	XXH3_state_t st;
	XXH3_INITSTATE(&st); /* or a former one in the same place would pass for one with this seed */
	XXH3_128bits_reset_withSeed(&st, p->seed);
	for (uint64_t c = 0; c < p->nchunks;) {
		unsigned n = 0;
		for (; n < 256 && c < p->nchunks; n++, c++)
			mirror_hash_put(raw + n * MIRROR_HASH_BYTES, &p->hashes[c]);
		XXH3_128bits_update(&st, raw, n * MIRROR_HASH_BYTES);
	}
	XXH128_hash_t h = XXH3_128bits_digest(&st);
	return (struct mirror_hash){.low = h.low64, .high = h.high64};
}

void proof_group_range(const struct proof *p, uint64_t group, uint64_t *offset_bytes, uint64_t *len_bytes)
{
	uint64_t len = (uint64_t)p->chunk_bytes << p->group_shift;
	*offset_bytes = group * len;
	*len_bytes = p->size_bytes - *offset_bytes < len ? p->size_bytes - *offset_bytes : len;
}

/* --- hashes --- */

struct mirror_hash mirror_hash_bytes(uint64_t seed, const void *data, uint64_t len_bytes)
{
	XXH128_hash_t h = XXH3_128bits_withSeed(data, len_bytes, seed);
	return (struct mirror_hash){.low = h.low64, .high = h.high64};
}

struct mirror_hash mirror_hash_add(struct mirror_hash a, struct mirror_hash b)
{
	struct mirror_hash sum = {.low = a.low + b.low, .high = a.high + b.high};
	sum.high += sum.low < a.low;
	return sum;
}

struct mirror_hash mirror_hash_subtract(struct mirror_hash a, struct mirror_hash b)
{
	struct mirror_hash d = {.low = a.low - b.low, .high = a.high - b.high};
	d.high -= a.low < b.low;
	return d;
}

void mirror_hash_put(uint8_t out[MIRROR_HASH_BYTES], const struct mirror_hash *h)
{
	put_be64(out, h->high);
	put_be64(out + 8, h->low);
}

struct mirror_hash mirror_hash_get(const uint8_t in[MIRROR_HASH_BYTES])
{
	return (struct mirror_hash){.high = get_be64(in), .low = get_be64(in + 8)};
}

void mirror_hash_print(const struct mirror_hash *h, char out[33])
{
	snprintf(out, 33, "%016llx%016llx", (unsigned long long)h->high, (unsigned long long)h->low);
}
