/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Payload buffers of a connection. Large ones are above malloc's threshold for mmap: a fresh one for each
 * request is a page fault for each page that is received into it, and an unmap, which together cost as much
 * as the receiving. So buffers of the size that a copy's pieces have come from a slab that stays with the
 * connection; its huge pages spare the disk segments as well (base/huge.h).
 */
#include <stdlib.h>

#include "base/cleanup.h"
#include "base/huge.h"
#include "nbd/server_impl.h"

#define SLAB_BYTES (NBD_KEPT_BUFFERS * NBD_KEPT_BUFFER_BYTES)

_Static_assert(NBD_KEPT_BUFFERS == 32, "slab_used has a bit for each");

size_t nbd_buffer_bytes(size_t len_bytes)
{
	return len_bytes > NBD_KEPT_BUFFER_BYTES / 2 && len_bytes <= NBD_KEPT_BUFFER_BYTES
		       ? NBD_KEPT_BUFFER_BYTES
		       : len_bytes;
}

static uint8_t *slab_take(struct nbd_connection *nc)
{
	SCOPE_LOCK(&nc->lock);
	if (!nc->slab)
		nc->slab = huge_alloc(SLAB_BYTES);
	if (!nc->slab || nc->slab_used == UINT32_MAX)
		return NULL;
	/* The lowest: few are touched by a client with few requests in flight. */
	unsigned i = (unsigned)__builtin_ctz(~nc->slab_used);
	nc->slab_used |= UINT32_C(1) << i;
	if (nc->slab_touched <= i)
		nc->slab_touched = i + 1;
	return nc->slab + i * NBD_KEPT_BUFFER_BYTES;
}

uint8_t *nbd_buffer_take(struct nbd_connection *nc, size_t len_bytes)
{
	size_t bytes = nbd_buffer_bytes(len_bytes);
	if (bytes == NBD_KEPT_BUFFER_BYTES) {
		uint8_t *buf = slab_take(nc);
		if (buf)
			return buf;
	}
	void *p = NULL;
	/* Page-aligned, so that a direct disk needs no bounce. */
	return posix_memalign(&p, 4096, bytes ? bytes : 1) ? NULL : p;
}

void nbd_buffer_give(struct nbd_connection *nc, uint8_t *buf, size_t len_bytes)
{
	if (buf && nbd_buffer_bytes(len_bytes) == NBD_KEPT_BUFFER_BYTES) {
		SCOPE_LOCK(&nc->lock);
		if (nc->slab && buf >= nc->slab && buf < nc->slab + SLAB_BYTES) {
			nc->slab_used &= ~(UINT32_C(1) << (size_t)(buf - nc->slab) / NBD_KEPT_BUFFER_BYTES);
			return;
		}
	}
	free(buf);
}

void nbd_buffers_trim(struct nbd_connection *nc, size_t keep_bytes)
{
	if (nc->slab_used || nc->slab_touched * NBD_KEPT_BUFFER_BYTES <= keep_bytes)
		return;
	huge_discard(nc->slab, SLAB_BYTES);
	nc->slab_touched = 0;
}

void nbd_buffers_free(struct nbd_connection *nc)
{
	huge_free(nc->slab, SLAB_BYTES);
}
