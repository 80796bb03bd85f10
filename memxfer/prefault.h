/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MEMXFER_PREFAULT_H
#define MEMXFER_PREFAULT_H

#include "memxfer/memxfer.h"

/*
 * For the receiver, before data of the region land: makes it ready, with those around it that were asked for,
 * if nobody has begun to, or waits for who has. Any thread.
 */
void mem_prefault_region(struct mem_prefault *p, uint64_t region);
/*
 * For the receiver, when the source has nothing of the region any more: nobody begins with it from now on.
 * True: pages were made for it, and nobody is at it any more. Any thread.
 */
bool mem_prefault_forgo(struct mem_prefault *p, uint64_t region);

#endif
