/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/virtqueue.h"

#include <errno.h>
#include <linux/virtio_ring.h>
#include <string.h>

#include "base/bytes.h"

/* Offsets in the rings (virtio 1.2, 2.7.6 and 2.7.8). */
enum { RING_FLAGS = 0, RING_IDX = 2, RING_ENTRIES = 4, DESC_BYTES = 16, USED_ELEM_BYTES = 8 };

void virtqueue_init(struct virtqueue *q, struct guest_memory *mem, uint16_t max_size)
{
	*q = (struct virtqueue){.mem = mem, .max_size = max_size};
	virtqueue_reset(q);
}

void virtqueue_reset(struct virtqueue *q)
{
	*q = (struct virtqueue){
		.mem = q->mem, .max_size = q->max_size, .size = q->max_size, .vector = VIRTQUEUE_NO_VECTOR};
}

static uint64_t avail_bytes(const struct virtqueue *q)
{
	return RING_ENTRIES + 2 * (uint64_t)q->size + 2;
}

static uint64_t used_bytes(const struct virtqueue *q)
{
	return RING_ENTRIES + USED_ELEM_BYTES * (uint64_t)q->size + 2;
}

int virtqueue_enable(struct virtqueue *q, bool event_idx, bool indirect, struct error *err)
{
	q->enabled = false;
	if (q->size == 0 || q->size > q->max_size || (q->size & (q->size - 1)))
		return error_set(err, EINVAL, "queue size %u is not a power of two up to %u", q->size,
				 q->max_size);
	if (q->desc_gpa % 16 || q->avail_gpa % 2 || q->used_gpa % 4)
		return error_set(err, EINVAL, "ring addresses are not aligned");
	q->desc = guest_memory_ptr(q->mem, q->desc_gpa, DESC_BYTES * (uint64_t)q->size);
	q->avail = guest_memory_ptr(q->mem, q->avail_gpa, avail_bytes(q));
	q->used = guest_memory_ptr(q->mem, q->used_gpa, used_bytes(q));
	if (!q->desc || !q->avail || !q->used)
		return error_set(err, EINVAL, "a ring lies outside guest memory");
	q->event_idx = event_idx;
	q->indirect = indirect;
	q->enabled = true;
	return 0;
}

static uint16_t load16(const uint8_t *p, int order)
{
	const uint16_t *v = (const uint16_t *)(const void *)p;

	return le16toh(order == __ATOMIC_ACQUIRE ? __atomic_load_n(v, __ATOMIC_ACQUIRE)
						 : __atomic_load_n(v, __ATOMIC_RELAXED));
}

static void store16(uint8_t *p, uint16_t v)
{
	__atomic_store_n((uint16_t *)(void *)p, htole16(v), __ATOMIC_RELEASE);
}

/* A store before it is seen before a load after it reads: what x86 does not do by itself. The instruction
 * itself, as ThreadSanitizer does not know the compiler's fence. */
static void full_barrier(void)
{
	__asm__ volatile("mfence" ::: "memory");
}

struct descriptor {
	uint64_t addr;
	uint32_t len;
	uint16_t flags, next;
};

/* The barrier keeps the compiler from reading guest memory a second time. */
static struct descriptor fetch(const uint8_t *p)
{
	uint8_t raw[DESC_BYTES];

	memcpy(raw, p, sizeof raw);
	__asm__ volatile("" ::: "memory");
	return (struct descriptor){get_le64(raw), get_le32(raw + 8), get_le16(raw + 12), get_le16(raw + 14)};
}

static int add_segment(struct virtqueue *q, struct virtqueue_chain *c, const struct descriptor *d,
		       struct error *err)
{
	struct virtqueue_segment *s = &c->seg[c->nout + c->nin];
	bool writable = d->flags & VRING_DESC_F_WRITE;

	if (!writable && c->nin)
		return error_set(err, EINVAL, "descriptor chain %u: readable after writable", c->head);
	if (d->len == 0)
		return 0;
	s->gpa = d->addr;
	s->len = d->len;
	s->ptr = guest_memory_ptr(q->mem, d->addr, d->len);
	if (!s->ptr)
		return error_set(err, EINVAL, "descriptor chain %u: 0x%llx+0x%x is not guest memory", c->head,
				 (unsigned long long)d->addr, d->len);
	if (writable) {
		c->nin++;
		c->in_bytes += d->len;
	} else {
		c->nout++;
		c->out_bytes += d->len;
	}
	return 0;
}

static int walk(struct virtqueue *q, struct virtqueue_chain *c, struct error *err)
{
	const uint8_t *table = q->desc;
	uint32_t entries = q->size, at = c->head;
	bool in_indirect = false;

	for (unsigned n = 0; n < VIRTQUEUE_CHAIN_MAX + 1; n++) {
		struct descriptor d;
		int rc;

		if (at >= entries)
			return error_set(err, EINVAL,
					 "descriptor chain %u: index %u is beyond the table of %u", c->head,
					 at, entries);
		d = fetch(table + (size_t)at * DESC_BYTES);
		if (d.flags & VRING_DESC_F_INDIRECT) {
			if (!q->indirect || in_indirect || (d.flags & VRING_DESC_F_NEXT) || d.len == 0 ||
			    d.len % DESC_BYTES)
				return error_set(err, EINVAL, "descriptor chain %u: bad indirect table",
						 c->head);
			table = guest_memory_ptr(q->mem, d.addr, d.len);
			if (!table)
				return error_set(err, EINVAL,
						 "descriptor chain %u: indirect table is not guest memory",
						 c->head);
			entries = d.len / DESC_BYTES;
			at = 0;
			in_indirect = true;
			continue;
		}
		if (c->nout + c->nin == VIRTQUEUE_CHAIN_MAX)
			break;
		rc = add_segment(q, c, &d, err);
		if (rc < 0)
			return rc;
		if (!(d.flags & VRING_DESC_F_NEXT))
			return 0;
		at = d.next;
	}
	return error_set(err, EINVAL, "descriptor chain %u is longer than %u or a loop", c->head,
			 VIRTQUEUE_CHAIN_MAX);
}

int virtqueue_pop(struct virtqueue *q, struct virtqueue_chain *chain, struct error *err)
{
	uint16_t avail_idx, pending;
	int rc;

	if (!q->enabled)
		return 0;
	avail_idx = load16(q->avail + RING_IDX, __ATOMIC_ACQUIRE);
	pending = (uint16_t)(avail_idx - q->next_avail);
	if (pending == 0)
		return 0;
	if (pending > q->size)
		return error_set(err, EINVAL, "available index %u is more than %u ahead of %u", avail_idx,
				 q->size, q->next_avail);
	chain->head = load16(q->avail + RING_ENTRIES + 2 * (q->next_avail & (q->size - 1)), __ATOMIC_RELAXED);
	chain->nout = chain->nin = 0;
	chain->out_bytes = chain->in_bytes = 0;
	rc = walk(q, chain, err);
	if (rc < 0)
		return rc;
	q->next_avail++;
	return 1;
}

void virtqueue_unpop(struct virtqueue *q)
{
	q->next_avail--;
}

void virtqueue_fill(struct virtqueue *q, unsigned ahead, uint16_t head, uint32_t written_bytes)
{
	uint32_t slot = (uint16_t)(q->used_idx + ahead) & (q->size - 1u);
	uint64_t at = RING_ENTRIES + USED_ELEM_BYTES * (uint64_t)slot;

	put_le32(q->used + at, head);
	put_le32(q->used + at + 4, written_bytes);
	guest_memory_mark_dirty(q->mem, q->used_gpa + at, USED_ELEM_BYTES);
}

void virtqueue_publish(struct virtqueue *q, unsigned n)
{
	q->used_idx = (uint16_t)(q->used_idx + n);
	store16(q->used + RING_IDX, q->used_idx);
	guest_memory_mark_dirty(q->mem, q->used_gpa + RING_IDX, 2);
}

void virtqueue_push(struct virtqueue *q, uint16_t head, uint32_t written_bytes)
{
	virtqueue_fill(q, 0, head, written_bytes);
	virtqueue_publish(q, 1);
}

bool virtqueue_should_signal(struct virtqueue *q)
{
	uint16_t old = q->signalled, now = q->used_idx;
	bool valid = q->signalled_valid;

	/* The used index must be visible before the driver's wish is read (virtio 1.2, 2.7.7.1). */
	full_barrier();
	if (!q->event_idx)
		return !(load16(q->avail + RING_FLAGS, __ATOMIC_RELAXED) & VRING_AVAIL_F_NO_INTERRUPT);
	q->signalled = now;
	q->signalled_valid = true;
	if (!valid)
		return true;
	return vring_need_event(load16(q->avail + RING_ENTRIES + 2 * q->size, __ATOMIC_RELAXED), now, old);
}

bool virtqueue_rearm(struct virtqueue *q)
{
	if (!q->enabled)
		return false;
	if (q->event_idx) {
		uint64_t at = RING_ENTRIES + USED_ELEM_BYTES * (uint64_t)q->size;

		store16(q->used + at, q->next_avail);
		guest_memory_mark_dirty(q->mem, q->used_gpa + at, 2);
	}
	full_barrier();
	return load16(q->avail + RING_IDX, __ATOMIC_ACQUIRE) != q->next_avail;
}

/* Walks the segments of one direction over [offset, offset+len). */
static bool chain_copy(const struct virtqueue_chain *c, bool writable, uint64_t offset, void *buf, size_t len,
		       struct guest_memory *mem)
{
	unsigned i = writable ? c->nout : 0, end = writable ? c->nout + c->nin : c->nout;
	uint8_t *p = buf;

	if (!range_fits(offset, len, writable ? c->in_bytes : c->out_bytes))
		return false;
	for (; i < end && len; i++) {
		const struct virtqueue_segment *s = &c->seg[i];
		size_t n;

		if (offset >= s->len) {
			offset -= s->len;
			continue;
		}
		n = s->len - offset < len ? s->len - offset : len;
		if (writable) {
			memcpy(s->ptr + offset, p, n);
			guest_memory_mark_dirty(mem, s->gpa + offset, n);
		} else {
			memcpy(p, s->ptr + offset, n);
		}
		p += n;
		len -= n;
		offset = 0;
	}
	__asm__ volatile("" ::: "memory");
	return true;
}

bool virtqueue_chain_read(const struct virtqueue_chain *c, uint64_t offset, void *buf, size_t len)
{
	return chain_copy(c, false, offset, buf, len, NULL);
}

bool virtqueue_chain_write(struct guest_memory *mem, const struct virtqueue_chain *c, uint64_t offset,
			   const void *buf, size_t len)
{
	return chain_copy(c, true, offset, (void *)(uintptr_t)buf, len, mem);
}

int virtqueue_chain_iov(const struct virtqueue_chain *c, bool writable, uint64_t offset, uint64_t len,
			struct iovec *iov)
{
	unsigned i = writable ? c->nout : 0, end = writable ? c->nout + c->nin : c->nout;
	int n = 0;

	for (; i < end && len; i++) {
		const struct virtqueue_segment *s = &c->seg[i];

		if (offset >= s->len) {
			offset -= s->len;
			continue;
		}
		iov[n].iov_base = s->ptr + offset;
		iov[n].iov_len = s->len - offset < len ? s->len - offset : len;
		len -= iov[n++].iov_len;
		offset = 0;
	}
	return n;
}

void virtqueue_save(const struct virtqueue *q, struct state_writer *w)
{
	state_put_u16(w, q->size);
	state_put_u16(w, q->vector);
	state_put_u8(w, q->enabled);
	state_put_u8(w, q->signalled_valid);
	state_put_u16(w, q->next_avail);
	state_put_u16(w, q->used_idx);
	state_put_u16(w, q->signalled);
	state_put_u64(w, q->desc_gpa);
	state_put_u64(w, q->avail_gpa);
	state_put_u64(w, q->used_gpa);
}

int virtqueue_load(struct virtqueue *q, struct state_reader *r, bool event_idx, bool indirect, bool drained,
		   struct error *err)
{
	uint8_t enabled, valid;

	virtqueue_reset(q);
	q->size = state_get_u16(r);
	q->vector = state_get_u16(r);
	enabled = state_get_u8(r);
	valid = state_get_u8(r);
	q->next_avail = state_get_u16(r);
	q->used_idx = state_get_u16(r);
	q->signalled = state_get_u16(r);
	q->desc_gpa = state_get_u64(r);
	q->avail_gpa = state_get_u64(r);
	q->used_gpa = state_get_u64(r);
	if (enabled > 1 || valid > 1)
		return error_set(err, EINVAL, "queue flags are neither 0 nor 1");
	q->signalled_valid = valid;
	if (drained && q->next_avail != q->used_idx)
		return error_set(err, EINVAL, "queue indices %u and %u show requests in flight",
				 q->next_avail, q->used_idx);
	return enabled ? virtqueue_enable(q, event_idx, indirect, err) : 0;
}
