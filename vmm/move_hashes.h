/* SPDX-License-Identifier: Apache-2.0 */
#ifndef VMM_MOVE_HASHES_H
#define VMM_MOVE_HASHES_H

#include <stdint.h>

#include "base/error.h"
#include "mirror/mirror.h"

/* Payloads of HASH_ASK, HASHES and SUMS (docs/protocol.md, "Proof"). Pure; what a host sends is hostile. */

/* One request for hashes of chunks [first, first+n) of a disk; n 0: for the root over all of them. */
struct hash_ask {
	uint32_t id; /* the asker's */
	uint32_t disk, n;
	uint64_t first;
};
#define HASH_ASK_BYTES 20u
void hash_ask_encode(uint8_t out[HASH_ASK_BYTES], const struct hash_ask *ask);
int hash_ask_decode(const uint8_t *raw, uint32_t len, unsigned ndisks, struct hash_ask *out,
		    struct error *err);

/* Room for any answer of n hashes: the ask again, then runs. */
uint32_t hashes_max_bytes(uint32_t n);
/* Runs of hashes that equal *zero, those of full chunks of zeroes, take four bytes. Returns the length. */
uint32_t hashes_encode(uint8_t *out, const struct hash_ask *ask, const struct mirror_hash *hashes,
		       const struct mirror_hash *zero);
/* The ask that it answers; 0 or -EPROTO. */
int hashes_decode_head(const uint8_t *raw, uint32_t len, struct hash_ask *out, struct error *err);
/* Exactly n hashes (1 for n 0), which is the head's. */
int hashes_decode(const uint8_t *raw, uint32_t len, const struct mirror_hash *zero, uint32_t n,
		  struct mirror_hash *out, struct error *err);

uint32_t sums_max_bytes(unsigned ndisks);
uint32_t sums_encode(uint8_t *out, unsigned ndisks, const struct mirror_sums *sums);
/* out: ndisks of them. Groups are in ascending order and below MIRROR_SUM_GROUPS. */
int sums_decode(const uint8_t *raw, uint32_t len, unsigned ndisks, struct mirror_sums *out,
		struct error *err);

#endif
