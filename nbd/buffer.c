/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Payload buffers of a connection. Large ones are above malloc's threshold for mmap: a fresh one for each
 * request is a page fault for each page that is received into it, and an unmap, which together cost as much
 * as the receiving. So buffers of the size that a copy's pieces have are kept for the next request of the
 * same connection.
 */
#include <stdlib.h>

#include "base/cleanup.h"
#include "nbd/server_impl.h"

size_t nbd_buffer_bytes(size_t len_bytes)
{
	return len_bytes > NBD_KEPT_BUFFER_BYTES / 2 && len_bytes <= NBD_KEPT_BUFFER_BYTES
		       ? NBD_KEPT_BUFFER_BYTES
		       : len_bytes;
}

uint8_t *nbd_buffer_take(struct nbd_connection *nc, size_t len_bytes)
{
	size_t bytes = nbd_buffer_bytes(len_bytes);
	if (bytes == NBD_KEPT_BUFFER_BYTES) {
		SCOPE_LOCK(&nc->lock);
		if (nc->nkept)
			return nc->kept[--nc->nkept];
	}
	void *p = NULL;
	/* Page-aligned, so that a direct disk needs no bounce. */
	return posix_memalign(&p, 4096, bytes ? bytes : 1) ? NULL : p;
}

void nbd_buffer_give(struct nbd_connection *nc, uint8_t *buf, size_t len_bytes)
{
	if (buf && nbd_buffer_bytes(len_bytes) == NBD_KEPT_BUFFER_BYTES) {
		SCOPE_LOCK(&nc->lock);
		if (nc->nkept < NBD_KEPT_BUFFERS) {
			nc->kept[nc->nkept++] = buf;
			return;
		}
	}
	free(buf);
}

void nbd_buffers_trim(struct nbd_connection *nc, size_t keep_bytes)
{
	while (nc->nkept && nc->nkept * NBD_KEPT_BUFFER_BYTES > keep_bytes)
		free(nc->kept[--nc->nkept]);
}
