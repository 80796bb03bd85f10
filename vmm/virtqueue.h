/* SPDX-License-Identifier: Apache-2.0 */
#ifndef VMM_VIRTQUEUE_H
#define VMM_VIRTQUEUE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "base/error.h"
#include "vmm/memory.h"
#include "vmm/state.h"

/*
 * A split virtqueue (virtio 1.2, 2.7), device side. Everything in guest memory is hostile and changes while
 * it is read: a descriptor is copied once and only the copy is looked at; every range must be RAM; a chain
 * has at most VIRTQUEUE_CHAIN_MAX descriptors, so a loop ends as an error.
 *
 * Not locked: the caller holds its device lock around every call.
 *
 * Saved:   size, ring addresses, enabled, the next available and used index, whether and up to where the
 *          driver has been signalled, the MSI-X vector.
 * Rebuilt: host pointers. The used ring, avail_event and flags live in guest memory and travel with it.
 */
#define VIRTQUEUE_SIZE_MAX  256
#define VIRTQUEUE_CHAIN_MAX 256
#define VIRTQUEUE_NO_VECTOR 0xffff

struct virtqueue {
	struct guest_memory *mem;
	uint16_t max_size;
	uint16_t size; /* as the driver chose; power of two */
	uint16_t vector;
	bool enabled;
	bool event_idx, indirect; /* negotiated; set on enabling */
	uint64_t desc_gpa, avail_gpa, used_gpa;
	uint16_t next_avail;	      /* the next entry of the available ring to take */
	uint16_t used_idx;	      /* the next entry of the used ring to fill */
	uint16_t signalled;	      /* used_idx when last asked whether to signal */
	bool signalled_valid;	      /* false: signal unconditionally the next time */
	uint8_t *desc, *avail, *used; /* host addresses while enabled */
};

struct virtqueue_segment {
	uint64_t gpa;
	uint32_t len;
	uint8_t *ptr;
};

/* The readable segments come first, then the writable ones. Empty descriptors are left out. */
struct virtqueue_chain {
	uint16_t head;
	unsigned nout, nin;
	uint64_t out_bytes, in_bytes;
	struct virtqueue_segment seg[VIRTQUEUE_CHAIN_MAX];
};

void virtqueue_init(struct virtqueue *q, struct guest_memory *mem, uint16_t max_size);
/* Back to power-on. */
void virtqueue_reset(struct virtqueue *q);
/* Checks size, alignment and that the rings are RAM; the fields were set by the driver or loaded. -EINVAL
 * with a sentence. Keeps the indices. */
int virtqueue_enable(struct virtqueue *q, bool event_idx, bool indirect, struct error *err);
/*
 * Takes the next chain: 1 and *chain filled, 0 when there is none, -EINVAL when the ring or the chain is
 * malformed (nothing is taken; the device needs a reset).
 */
int virtqueue_pop(struct virtqueue *q, struct virtqueue_chain *chain, struct error *err);
/* Puts the last popped chain back; only before another pop or push. */
void virtqueue_unpop(struct virtqueue *q);
/* Publishes a used element; what was written to the buffers has been marked dirty before. Marks the ring. */
void virtqueue_push(struct virtqueue *q, uint16_t head, uint32_t written_bytes);
/* Fills a used element `ahead` places after the next one, without publishing: several buffers of one packet
 * become visible together by virtqueue_publish. */
void virtqueue_fill(struct virtqueue *q, unsigned ahead, uint16_t head, uint32_t written_bytes);
void virtqueue_publish(struct virtqueue *q, unsigned n);
/* Does the driver want an interrupt for what was pushed since the last call? */
bool virtqueue_should_signal(struct virtqueue *q);
/* Asks for notification of the next available buffer. True if one came meanwhile: look again. */
bool virtqueue_rearm(struct virtqueue *q);

/* Copies [offset, offset+len) of the readable bytes; false if there are fewer. */
bool virtqueue_chain_read(const struct virtqueue_chain *c, uint64_t offset, void *buf, size_t len);
/* Copies to [offset, offset+len) of the writable bytes and marks them dirty; false if there are fewer. */
bool virtqueue_chain_write(struct guest_memory *mem, const struct virtqueue_chain *c, uint64_t offset,
			   const void *buf, size_t len);
/* Describes [offset, offset+len) of the readable (writable) bytes as at most VIRTQUEUE_CHAIN_MAX iovecs;
 * returns how many. The range must be there. */
int virtqueue_chain_iov(const struct virtqueue_chain *c, bool writable, uint64_t offset, uint64_t len,
			struct iovec *iov);

/* Within the caller's section. load validates and enables; -EINVAL with a sentence. `drained` says that
 * every chain taken was also given back, which is then checked. */
void virtqueue_save(const struct virtqueue *q, struct state_writer *w);
int virtqueue_load(struct virtqueue *q, struct state_reader *r, bool event_idx, bool indirect, bool drained,
		   struct error *err);

#endif
