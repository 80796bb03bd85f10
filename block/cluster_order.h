/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What QEMU's qcow2 driver (seen with 7.2) leaves to its callers: requests that touch different sectors of
 * one cluster.
 *
 * - A write that allocates, and a write-zeroes or discard that deallocates. The zeroing takes the whole
 * cluster when the rest of it reads as zero, and frees its place in the file; the write then links that place
 * all the same, and the next allocation gets it a second time: two clusters of the disk share their data
 * ("refcount=1 reference=2").
 * - A read of a compressed cluster, and a write to it. The write frees the compressed place; once that is
 * used again, the read finds something else there.
 * - A read, and a zeroing that deallocates: likewise.
 *
 * So a zeroing waits for all that was there before it in its clusters, and all that comes later waits for it;
 * in an image with compressed clusters reads and writes wait for one another, too. Everything else passes.
 */
#ifndef BLOCK_CLUSTER_ORDER_H
#define BLOCK_CLUSTER_ORDER_H

#include <pthread.h>

#include "base/range_lock.h"
#include "block/block.h"

struct cluster_order {
	struct block *below;
	uint32_t cluster_bytes; /* a power of two */
	bool reads_apart;	/* from writes too: some clusters are compressed */
	pthread_mutex_t lock;
	pthread_cond_t empty;
	struct range_lock ranges;
};

void cluster_order_init(struct cluster_order *o, struct block *below, uint32_t cluster_bytes);
/* As block_ops.submit. */
int cluster_order_submit(struct cluster_order *o, struct block_request *req);
/* Waits for all that were submitted; not from a completion. */
void cluster_order_drain(struct cluster_order *o);
void cluster_order_destroy(struct cluster_order *o);

#endif
