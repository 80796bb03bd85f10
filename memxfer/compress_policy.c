/* SPDX-License-Identifier: Apache-2.0 */
#include "memxfer/compress_policy.h"

#define BACKOFF_MIN	 16u
#define BACKOFF_MAX	 256u
#define RATIO_POOR	 0.85
#define TRIAL_FIRST	 32u
#define TRIAL_AFTER_GAIN 256u
#define WEIGHT		 (1.0 / 8)

void compress_policy_init(struct compress_policy *p, enum mem_compress mode)
{
	*p = (struct compress_policy){
		.mode = mode, .spare = true, .backoff = BACKOFF_MIN, .trial = TRIAL_FIRST};
}

bool compress_policy_wants(struct compress_policy *p)
{
	if (p->mode != MEM_COMPRESS_AUTO)
		return p->mode == MEM_COMPRESS_ALWAYS;
	if (p->skip) {
		p->skip--;
		return false;
	}
	return true;
}

bool compress_policy_probes(const struct compress_policy *p)
{
	return p->mode == MEM_COMPRESS_AUTO && (!p->trial || p->ratio <= 0);
}

bool compress_policy_poor(size_t raw, size_t packed)
{
	return (double)packed / (double)raw > RATIO_POOR;
}

static double average(double old, double sample)
{
	return old > 0 ? old + (sample - old) * WEIGHT : sample;
}

static void step_aside(struct compress_policy *p)
{
	p->skip = p->backoff;
	p->backoff = p->backoff * 2 < BACKOFF_MAX ? p->backoff * 2 : BACKOFF_MAX;
	p->trial = 0;
}

void compress_policy_packed(struct compress_policy *p, size_t raw, size_t packed, uint64_t ns)
{
	bool gain;

	if (!raw || p->mode != MEM_COMPRESS_AUTO)
		return;
	p->ratio = average(p->ratio, (double)packed / (double)raw);
	p->pack_ns = average(p->pack_ns, (double)ns / (double)raw);
	if (compress_policy_poor(raw, packed)) {
		step_aside(p);
		return;
	}
	gain = p->wire_ns <= 0 || p->pack_ns * (p->spare ? 1 : 2) < (1 - p->ratio) * p->wire_ns;
	if (p->trial > 1) {
		p->trial--;
	} else if (p->trial == 1) {
		/* The trial is over: judged by the wire as it is while compressing. */
		p->trial = 0;
		if (!gain)
			step_aside(p);
		else
			p->backoff = BACKOFF_MIN;
	} else if (!gain) {
		step_aside(p);
	} else {
		/* A probe after uncompressed frames, whose wire time is the true one: stay for a while, as a
		 * wire that compression relieves looks faster than it is. */
		p->backoff = BACKOFF_MIN;
		p->trial = TRIAL_AFTER_GAIN;
	}
}

void compress_policy_sent(struct compress_policy *p, size_t wire, uint64_t ns)
{
	if (wire)
		p->wire_ns = average(p->wire_ns, (double)ns / (double)wire);
}
