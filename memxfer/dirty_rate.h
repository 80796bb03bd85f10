/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MEMXFER_DIRTY_RATE_H
#define MEMXFER_DIRTY_RATE_H

#include "memxfer/memxfer.h"

/* How fast a guest dirties its memory, without a move. A page counts once a sample, as it travels once a
 * round; samples are as short as the last rounds of a move, since in longer ones a guest that writes to the
 * same pages all the time seems slower than it is. */

#define MEM_DIRTY_SAMPLE_MS 100

struct mem_dirty_rate {
	unsigned samples;
	uint64_t bytes_per_s, most_bytes_per_s; /* on average; in one sample */
	uint64_t working_set_bytes;		/* dirtied at all */
};

/* Takes so many samples, one after the other; tracking is on meanwhile, so nobody else may use the source.
 * `stop` is asked all the time: a negative errno from it ends the measurement with that. Blocking. */
int mem_dirty_rate_measure(const struct dirty_source *source, uint64_t npages, unsigned samples,
			   int (*stop)(void *opaque, struct error *err), void *opaque,
			   struct mem_dirty_rate *out, struct error *err);

#endif
