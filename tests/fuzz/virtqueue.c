/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A virtqueue whose rings, descriptors and saved state the input chooses. Every segment that comes out of it
 * must be guest memory, and the rest of memory must stay as it was.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "tests/fuzz/queue.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define MEMORY_BYTES (2u << 20)
#define TABLE_GPA    0x1000u /* where the input's bytes lie; the rings may be anywhere */
#define TABLE_BYTES  0x8000u
#define HEADER_BYTES 40u

static struct guest_memory mem;
static struct virtqueue_chain chain;

static void check_chain(void)
{
	uint64_t in = 0, out = 0;

	if (chain.nin + chain.nout > VIRTQUEUE_CHAIN_MAX)
		abort();
	for (unsigned i = 0; i < chain.nout + chain.nin; i++) {
		const struct virtqueue_segment *s = &chain.seg[i];

		if (!s->len || s->ptr < mem.base || s->ptr + s->len > mem.base + mem.size_bytes ||
		    s->ptr != mem.base + s->gpa)
			abort();
		*(i < chain.nout ? &out : &in) += s->len;
	}
	if (in != chain.in_bytes || out != chain.out_bytes)
		abort();
}

static void use_chain(void)
{
	static struct iovec iov[VIRTQUEUE_CHAIN_MAX];
	uint8_t buf[64];
	uint64_t sum = 0;
	int n = virtqueue_chain_iov(&chain, false, 0, chain.out_bytes, iov);

	for (int i = 0; i < n; i++)
		sum += iov[i].iov_len;
	if (sum != chain.out_bytes)
		abort();
	if (virtqueue_chain_read(&chain, 3, buf, sizeof buf) != range_fits(3, sizeof buf, chain.out_bytes))
		abort();
	memset(buf, 0x5a, sizeof buf);
	if (virtqueue_chain_write(&mem, &chain, 5, buf, 7) != range_fits(5, 7, chain.in_bytes))
		abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct virtqueue q;

	if (size < HEADER_BYTES)
		return 0;
	if (!mem.base && guest_memory_create(MEMORY_BYTES, &mem, NULL) < 0)
		abort();
	memset(mem.base, 0, 0x10000);
	virtqueue_init(&q, &mem, VIRTQUEUE_SIZE_MAX);
	if (queue_load(&q, data, data[36] & 1, data[36] & 2) < 0 || !q.enabled)
		return 0;
	data += HEADER_BYTES;
	size -= HEADER_BYTES;
	memcpy(mem.base + TABLE_GPA, data, size < TABLE_BYTES ? size : TABLE_BYTES);
	for (unsigned i = 0; i < 2 * VIRTQUEUE_SIZE_MAX; i++) {
		int rc = virtqueue_pop(&q, &chain, NULL);

		if (rc <= 0 && (rc < 0 || !virtqueue_rearm(&q)))
			break;
		if (rc <= 0)
			continue;
		check_chain();
		use_chain();
		virtqueue_push(&q, chain.head, (uint32_t)chain.in_bytes);
		virtqueue_should_signal(&q);
	}
	return 0;
}
