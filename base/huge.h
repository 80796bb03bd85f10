/* SPDX-License-Identifier: Apache-2.0 */
#ifndef BASE_HUGE_H
#define BASE_HUGE_H

#include <stddef.h>

/*
 * Memory for large transfers: zeroed, aligned to a huge page and, where the kernel has some, of huge pages,
 * so that a transfer is few segments for a device. A virtio disk, for one, has 256 of them on the way at
 * most, and a piece of 256 KiB in single pages takes 64. NULL with errno set: no memory. Pages are there
 * once touched. Any thread; free with the same size.
 */
void *huge_alloc(size_t bytes);
void huge_free(void *p, size_t bytes);
/* Gives the pages back, the addresses stay. */
void huge_discard(void *p, size_t bytes);

#endif
