/* SPDX-License-Identifier: Apache-2.0 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "mirror/proof.h"
#include "vmm/move_hashes.h"

#define NDISKS 3u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* What is accepted must encode to something that decodes to the same. */
static void round_trip_hashes(const struct hash_ask *ask, const struct mirror_hash *hashes, uint32_t n)
{
	static uint8_t raw[HASH_ASK_BYTES + MIRROR_VERIFY_CHUNKS * 20];
	static struct mirror_hash again[MIRROR_VERIFY_CHUNKS];
	const struct mirror_hash zero = {.low = 1, .high = 2};
	uint32_t len = hashes_encode(raw, ask, hashes, &zero);
	if (len > hashes_max_bytes(n) || hashes_decode(raw, len, &zero, ask->n, again, NULL) ||
	    memcmp(again, hashes, n * sizeof *hashes))
		abort();
}

/* The first byte chooses the payload's kind. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct mirror_hash hashes[MIRROR_VERIFY_CHUNKS];
	static struct mirror_sums sums[NDISKS];
	const struct mirror_hash zero = {.low = 1, .high = 2};
	struct hash_ask ask;
	if (!size || size > 1u << 20)
		return 0;
	const uint8_t *raw = data + 1;
	uint32_t len = (uint32_t)size - 1;
	switch (data[0] % 3) {
	case 0:
		if (!hash_ask_decode(raw, len, NDISKS, &ask, NULL) &&
		    (ask.disk >= NDISKS || ask.n > MIRROR_VERIFY_CHUNKS))
			abort();
		break;
	case 1:
		if (hashes_decode_head(raw, len, &ask, NULL) || ask.n > MIRROR_VERIFY_CHUNKS)
			break;
		if (!hashes_decode(raw, len, &zero, ask.n, hashes, NULL))
			round_trip_hashes(&ask, hashes, ask.n ? ask.n : 1);
		break;
	default:
		if (!sums_decode(raw, len, NDISKS, sums, NULL))
			for (unsigned d = 0; d < NDISKS; d++)
				for (unsigned g = 0; g < sums[d].n; g++)
					if (sums[d].groups[g].group >= MIRROR_SUM_GROUPS)
						abort();
	}
	return 0;
}
