/* SPDX-License-Identifier: Apache-2.0 */
#include "block/cluster_order.h"

#include <errno.h>
#include <stdlib.h>

#include "base/cleanup.h"

struct ordered {
	struct range_entry range; /* first */
	struct block_request below;
	struct block_request *req; /* the caller's */
	struct cluster_order *order;
	struct ordered *next_failed;
	int result;
};

void cluster_order_init(struct cluster_order *o, struct block *below, uint32_t cluster_bytes)
{
	*o = (struct cluster_order){.below = below, .cluster_bytes = cluster_bytes};
	pthread_mutex_init(&o->lock, NULL);
	pthread_cond_init(&o->empty, NULL);
}

void cluster_order_destroy(struct cluster_order *o)
{
	pthread_mutex_destroy(&o->lock);
	pthread_cond_destroy(&o->empty);
}

void cluster_order_drain(struct cluster_order *o)
{
	SCOPE_LOCK(&o->lock);
	while (o->ranges.first)
		pthread_cond_wait(&o->empty, &o->lock);
}

/* Lock held. Those that waited for it go on; the ones that cannot are added to failed. */
static void let_go(struct cluster_order *o, struct ordered *r, struct ordered **failed)
{
	struct range_entry *granted = range_lock_remove(&o->ranges, &r->range), *next;
	for (; granted; granted = next) {
		struct ordered *g = (struct ordered *)granted;
		next = granted->next_granted;
		g->result = o->below->ops->submit(o->below, &g->below);
		if (g->result) {
			g->next_failed = *failed;
			*failed = g;
		}
	}
}

static void on_done(struct block_request *below, int result)
{
	struct ordered *r = below->opaque, *failed, *next;
	struct cluster_order *o = r->order;
	r->result = result;
	r->next_failed = NULL;
	for (failed = r; failed; failed = next) {
		next = failed->next_failed;
		struct block_request *req = failed->req;
		int rc = failed->result;
		pthread_mutex_lock(&o->lock);
		let_go(o, failed, &next);
		if (!o->ranges.first)
			pthread_cond_broadcast(&o->empty);
		pthread_mutex_unlock(&o->lock);
		free(failed);
		req->done(req, rc);
	}
}

int cluster_order_submit(struct cluster_order *o, struct block_request *req)
{
	if (req->op == BLOCK_FLUSH)
		return o->below->ops->submit(o->below, req);
	struct ordered *r = malloc(sizeof *r);
	if (!r)
		return -ENOMEM;
	uint64_t mask = o->cluster_bytes - 1, end = req->offset_bytes + req->len_bytes;
	*r = (struct ordered){.below = *req, .req = req, .order = o};
	r->below.done = on_done;
	r->below.opaque = r;
	r->range.offset_bytes = req->offset_bytes & ~mask;
	r->range.len_bytes = ((end + mask) & ~mask) - r->range.offset_bytes;
	r->range.kind = req->op == BLOCK_WRITE	? RANGE_WRITE
			: req->op != BLOCK_READ ? RANGE_ALONE
			: o->reads_apart	? RANGE_READ
						: RANGE_WRITE;
	/* Submitted with the lock held, which no completion below us does: nobody can have queued behind it
	 * when it is refused, so that nobody's done() has to be called from here. */
	SCOPE_LOCK(&o->lock);
	int rc = range_lock_add(&o->ranges, &r->range) ? o->below->ops->submit(o->below, &r->below) : 0;
	if (rc) {
		range_lock_remove(&o->ranges, &r->range);
		free(r);
	}
	return rc;
}
