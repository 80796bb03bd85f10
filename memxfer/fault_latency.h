/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MEMXFER_FAULT_LATENCY_H
#define MEMXFER_FAULT_LATENCY_H

#include <stdint.h>

/* How long accesses waited for a page: a histogram with four steps to an octave, so the median is right to
 * within a fifth. Zeroed is empty. */
#define FAULT_LATENCY_STEPS 160

struct fault_latency {
	uint64_t count, worst_us;
	uint64_t steps[FAULT_LATENCY_STEPS];
};

static inline unsigned fault_latency_step(uint64_t us)
{
	if (us < 4)
		return (unsigned)us;
	unsigned octave = 63u - (unsigned)__builtin_clzll(us);
	unsigned step = 4 * (octave - 1) + (unsigned)(us >> (octave - 2) & 3);
	return step < FAULT_LATENCY_STEPS ? step : FAULT_LATENCY_STEPS - 1;
}

/* The middle of a step. */
static inline uint64_t fault_latency_of_step(unsigned step)
{
	if (step < 4)
		return step;
	unsigned octave = step / 4 + 1;
	return (UINT64_C(4) + step % 4) << (octave - 2) | (octave > 2 ? UINT64_C(1) << (octave - 3) : 0);
}

static inline void fault_latency_add(struct fault_latency *l, uint64_t us)
{
	l->count++;
	l->steps[fault_latency_step(us)]++;
	if (us > l->worst_us)
		l->worst_us = us;
}

static inline uint64_t fault_latency_median(const struct fault_latency *l)
{
	uint64_t below = 0;

	for (unsigned i = 0; i < FAULT_LATENCY_STEPS && l->count; i++) {
		below += l->steps[i];
		if (2 * below >= l->count)
			return fault_latency_of_step(i) < l->worst_us ? fault_latency_of_step(i)
								      : l->worst_us;
	}
	return 0;
}

#endif
