/* SPDX-License-Identifier: Apache-2.0 */
#ifndef BENCH_GUEST_LOAD_H
#define BENCH_GUEST_LOAD_H

#include <stdint.h>

#include "base/error.h"
#include "block/block.h"

/*
 * Random writes to a disk, `depth` of them always in flight, as a guest's queue does: the next one is
 * submitted when one completes. Writes in flight never overlap. The latency of each is kept.
 */
struct guest_load;

int guest_load_start(struct block *disk, unsigned depth, uint32_t write_bytes, struct guest_load **out,
		     struct error *err);
/* Lets the writes in flight end. Idempotent. 0, or the first write's error. */
int guest_load_stop(struct guest_load *load);

struct guest_load_result {
	uint64_t writes, bytes, elapsed_ns;
	uint64_t p50_ns, p99_ns, max_ns;
};
/* After the stop. */
void guest_load_result(struct guest_load *load, struct guest_load_result *out);
void guest_load_free(struct guest_load *load); /* stops first; NULL is fine */

#endif
