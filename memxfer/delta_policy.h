/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MEMXFER_DELTA_POLICY_H
#define MEMXFER_DELTA_POLICY_H

#include <stdbool.h>
#include <stdint.h>

/*
 * Whether a stream keeps former copies of pages and sends deltas against them: only where the bytes that are
 * saved would take longer on their way than keeping and comparing copies takes here. Judged at the beginning
 * of each round, from figures alone: where a page's way is short, nothing is done at all; in between, for one
 * page in so many, to learn what is saved. Pure; one thread.
 */
enum delta_use {
	DELTA_NONE,   /* no copies, no cost */
	DELTA_SAMPLE, /* of one page in DELTA_SAMPLE_EVERY */
	DELTA_ALL,
};
#define DELTA_SAMPLE_EVERY 16u

struct delta_policy {
	enum delta_use use;
	double byte_ns;	    /* a byte's way to its place, end to end; 0 = not measured yet */
	double page_bytes;  /* what a page takes on the wire when it goes whole */
	double work_ns;	    /* of a page whose copy was found: comparing and keeping; 0 = not measured */
	double saved_bytes; /* of such a page, on the wire */
	uint64_t tried;	    /* such pages since the last judgement */
	double tried_ns, tried_saved; /* theirs, sums */
};

void delta_policy_init(struct delta_policy *p);
/* A whole page took so much of a frame. */
void delta_policy_whole(struct delta_policy *p, double page_bytes);
/* A page's former copy was found: what that took, and saved (0: it went whole). */
void delta_policy_tried(struct delta_policy *p, uint64_t ns, double saved_bytes);
/* So many bytes were sent and arrived in so long. */
void delta_policy_arrived(struct delta_policy *p, uint64_t bytes, uint64_t ns);
/* The next round's use. limit_bytes_per_s: 0 = none; spare: this host has processor time to spare, else it
 * must save twice what it takes. */
enum delta_use delta_policy_judge(struct delta_policy *p, uint64_t limit_bytes_per_s, bool spare);
/* Whether the page is one of the sample. */
static inline bool delta_policy_takes(const struct delta_policy *p, uint64_t page)
{
	if (p->use != DELTA_SAMPLE)
		return p->use == DELTA_ALL;
	/* spread by a multiplication, as guests write at powers of two */
	return (page * UINT64_C(0x9e3779b97f4a7c15)) >> 60 == 0;
}

#endif
