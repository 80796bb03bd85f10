/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/move_hashes.h"

#include <errno.h>

#include "base/bytes.h"
#include "mirror/proof.h"

/* A run: u32, of which the upper bit says that its hashes are those of zeroes and do not follow. */
#define RUN_BYTES 4u
#define RUN_ZERO  UINT32_C(0x80000000)

#define SUMS_DISK_BYTES	 (2u * MIRROR_HASH_BYTES + 8 + 4)
#define SUMS_GROUP_BYTES (4u + MIRROR_HASH_BYTES)

void hash_ask_encode(uint8_t out[HASH_ASK_BYTES], const struct hash_ask *ask)
{
	put_be32(out, ask->id);
	put_be32(out + 4, ask->disk);
	put_be32(out + 8, ask->n);
	put_be64(out + 12, ask->first);
}

static void get_ask(const uint8_t *raw, struct hash_ask *out)
{
	*out = (struct hash_ask){.id = get_be32(raw),
				 .disk = get_be32(raw + 4),
				 .n = get_be32(raw + 8),
				 .first = get_be64(raw + 12)};
}

int hash_ask_decode(const uint8_t *raw, uint32_t len, unsigned ndisks, struct hash_ask *out,
		    struct error *err)
{
	if (len != HASH_ASK_BYTES)
		return error_set(err, EPROTO, "hash-ask: %u bytes", len);
	get_ask(raw, out);
	if (out->disk >= ndisks)
		return error_set(err, EPROTO, "hash-ask: disk %u of %u", out->disk, ndisks);
	if (out->n > MIRROR_VERIFY_CHUNKS)
		return error_set(err, EPROTO, "hash-ask: %u hashes at once, at most %u are given", out->n,
				 MIRROR_VERIFY_CHUNKS);
	return 0;
}

uint32_t hashes_max_bytes(uint32_t n)
{
	/* a run for each at the worst */
	return HASH_ASK_BYTES + (n ? n : 1) * (RUN_BYTES + MIRROR_HASH_BYTES);
}

uint32_t hashes_encode(uint8_t *out, const struct hash_ask *ask, const struct mirror_hash *hashes,
		       const struct mirror_hash *zero)
{
	uint32_t n = ask->n ? ask->n : 1;
	uint8_t *at = out + HASH_ASK_BYTES;
	hash_ask_encode(out, ask);
	for (uint32_t i = 0, end; i < n; i = end) {
		bool zeroes = mirror_hash_equal(&hashes[i], zero);
		for (end = i + 1; end < n && mirror_hash_equal(&hashes[end], zero) == zeroes;)
			end++;
		put_be32(at, (end - i) | (zeroes ? RUN_ZERO : 0));
		at += RUN_BYTES;
		for (uint32_t j = i; !zeroes && j < end; j++, at += MIRROR_HASH_BYTES)
			mirror_hash_put(at, &hashes[j]);
	}
	return (uint32_t)(at - out);
}

int hashes_decode_head(const uint8_t *raw, uint32_t len, struct hash_ask *out, struct error *err)
{
	if (len < HASH_ASK_BYTES)
		return error_set(err, EPROTO, "hashes: %u bytes", len);
	get_ask(raw, out);
	return 0;
}

int hashes_decode(const uint8_t *raw, uint32_t len, const struct mirror_hash *zero, uint32_t n,
		  struct mirror_hash *out, struct error *err)
{
	uint32_t at = HASH_ASK_BYTES, got = 0;
	n = n ? n : 1;
	if (len < HASH_ASK_BYTES)
		return error_set(err, EPROTO, "hashes: %u bytes", len);
	while (at < len) {
		if (len - at < RUN_BYTES)
			return error_set(err, EPROTO, "hashes: %u bytes are left over", len - at);
		uint32_t run = get_be32(raw + at), count = run & ~RUN_ZERO;
		at += RUN_BYTES;
		if (!count || count > n - got)
			return error_set(err, EPROTO, "hashes: a run of %u where %u are missing", count,
					 n - got);
		if (!(run & RUN_ZERO) && count > (len - at) / MIRROR_HASH_BYTES)
			return error_set(err, EPROTO, "hashes: cut off in a run of %u", count);
		for (uint32_t i = 0; i < count; i++, got++) {
			if (run & RUN_ZERO) {
				out[got] = *zero;
				continue;
			}
			out[got] = mirror_hash_get(raw + at);
			at += MIRROR_HASH_BYTES;
		}
	}
	if (got != n)
		return error_set(err, EPROTO, "hashes: %u of %u", got, n);
	return 0;
}

uint32_t sums_max_bytes(unsigned ndisks)
{
	return 4 + ndisks * (SUMS_DISK_BYTES + MIRROR_SUM_GROUPS * SUMS_GROUP_BYTES);
}

uint32_t sums_encode(uint8_t *out, unsigned ndisks, const struct mirror_sums *sums)
{
	uint8_t *at = out + 4;
	put_be32(out, ndisks);
	for (unsigned i = 0; i < ndisks; i++) {
		const struct mirror_sums *s = &sums[i];
		mirror_hash_put(at, &s->root);
		mirror_hash_put(at + MIRROR_HASH_BYTES, &s->total);
		put_be64(at + 2 * MIRROR_HASH_BYTES, s->writes);
		put_be32(at + 2 * MIRROR_HASH_BYTES + 8, s->n);
		at += SUMS_DISK_BYTES;
		for (unsigned g = 0; g < s->n; g++, at += SUMS_GROUP_BYTES) {
			put_be32(at, s->groups[g].group);
			mirror_hash_put(at + 4, &s->groups[g].sum);
		}
	}
	return (uint32_t)(at - out);
}

static int decode_disk(const uint8_t *raw, uint32_t len, uint32_t *at, struct mirror_sums *out,
		       struct error *err)
{
	if (len - *at < SUMS_DISK_BYTES)
		return error_set(err, EPROTO, "sums: cut off");
	const uint8_t *p = raw + *at;
	out->root = mirror_hash_get(p);
	out->total = mirror_hash_get(p + MIRROR_HASH_BYTES);
	out->writes = get_be64(p + 2 * MIRROR_HASH_BYTES);
	out->n = get_be32(p + 2 * MIRROR_HASH_BYTES + 8);
	*at += SUMS_DISK_BYTES;
	if (out->n > MIRROR_SUM_GROUPS || out->n > (len - *at) / SUMS_GROUP_BYTES)
		return error_set(err, EPROTO, "sums: %u groups of a disk", out->n);
	for (unsigned g = 0; g < out->n; g++, *at += SUMS_GROUP_BYTES) {
		out->groups[g].group = get_be32(raw + *at);
		out->groups[g].sum = mirror_hash_get(raw + *at + 4);
		if (out->groups[g].group >= MIRROR_SUM_GROUPS ||
		    (g && out->groups[g].group <= out->groups[g - 1].group))
			return error_set(err, EPROTO, "sums: group %u out of turn", out->groups[g].group);
	}
	return 0;
}

int sums_decode(const uint8_t *raw, uint32_t len, unsigned ndisks, struct mirror_sums *out, struct error *err)
{
	uint32_t at = 4;
	if (len < 4 || get_be32(raw) != ndisks)
		return error_set(err, EPROTO, "sums: not those of %u disks", ndisks);
	for (unsigned i = 0; i < ndisks; i++) {
		int rc = decode_disk(raw, len, &at, &out[i], err);
		if (rc)
			return rc;
	}
	if (at != len)
		return error_set(err, EPROTO, "sums: %u bytes are left over", len - at);
	return 0;
}
