/* SPDX-License-Identifier: Apache-2.0 */
#include "memxfer/delta_policy.h"

#include "memxfer/memxfer.h"

/* What comparing and keeping a page takes, before it is measured. */
#define WORK_NS 1500.0
/* A page whose way takes so many times that is worth keeping at once, any shorter than so many times not even
 * in part. */
#define WORTH_ALL    8
#define WORTH_SAMPLE 2
/* Fewer tell nothing. */
#define JUDGED_PAGES 32u
#define JUDGED_BYTES (UINT64_C(1) << 20)

void delta_policy_init(struct delta_policy *p)
{
	*p = (struct delta_policy){.page_bytes = MEM_PAGE_BYTES};
}

void delta_policy_whole(struct delta_policy *p, double page_bytes)
{
	p->page_bytes += (page_bytes - p->page_bytes) / 8;
}

void delta_policy_tried(struct delta_policy *p, uint64_t ns, double saved_bytes)
{
	p->tried++;
	p->tried_ns += (double)ns;
	p->tried_saved += saved_bytes;
}

void delta_policy_arrived(struct delta_policy *p, uint64_t bytes, uint64_t ns)
{
	double sample;

	/* Few bytes tell of the round trip, not of the link. */
	if (bytes < JUDGED_BYTES)
		return;
	sample = (double)ns / (double)bytes;
	p->byte_ns = p->byte_ns > 0 ? (p->byte_ns + sample) / 2 : sample;
}

enum delta_use delta_policy_judge(struct delta_policy *p, uint64_t limit_bytes_per_s, bool spare)
{
	double limit_ns = limit_bytes_per_s ? 1e9 / (double)limit_bytes_per_s : 0;
	double byte_ns = p->byte_ns > limit_ns ? p->byte_ns : limit_ns;
	double needed = spare ? 1 : 2, work;

	if (p->tried >= JUDGED_PAGES) {
		p->work_ns = p->tried_ns / (double)p->tried;
		p->saved_bytes = p->tried_saved / (double)p->tried;
		p->tried = 0;
		p->tried_ns = p->tried_saved = 0;
	}
	work = (p->work_ns > 0 ? p->work_ns : WORK_NS) * needed;
	if (p->page_bytes * byte_ns < work * WORTH_SAMPLE)
		p->use = DELTA_NONE;
	else if (p->work_ns > 0)
		p->use = p->saved_bytes * byte_ns > work ? DELTA_ALL : DELTA_SAMPLE;
	else
		p->use = p->page_bytes * byte_ns > work * WORTH_ALL ? DELTA_ALL : DELTA_SAMPLE;
	return p->use;
}
