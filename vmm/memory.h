/* SPDX-License-Identifier: Apache-2.0 */
/* interface: guest memory */
#ifndef VMM_MEMORY_H
#define VMM_MEMORY_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "base/error.h"
#include "memxfer/memxfer.h"

/*
 * Guest RAM: one memfd, mapped once. Guest-physical [0, low) with low <= 3 GiB (0xc0000000), the rest from 4
 * GiB up. memfd offset = gpa for low memory, low + (gpa - 4 GiB) above.
 *
 * All accesses are any-thread. Writes by the VMM go through these functions, which mark the page in the VMM's
 * own dirty bitmap after the data landed.
 */
#define MEMORY_LOW_LIMIT UINT64_C(0xc0000000)
#define MEMORY_HIGH_BASE UINT64_C(0x100000000)

struct guest_memory {
	int fd;
	uint8_t *base;
	uint64_t size_bytes, low_bytes;
	uint64_t *vmm_dirty; /* one bit a page of the memfd; set with memory_mark_dirty */

	pthread_mutex_t discard_lock; /* of what follows; held while it is called */
	void (*discarding)(void *opaque, uint64_t first_page, uint64_t npages);
	void *discarding_opaque;
};

int guest_memory_create(uint64_t size_bytes, struct guest_memory *mem, struct error *err);
void guest_memory_destroy(struct guest_memory *mem);
/* Host address of [gpa, gpa+len), or NULL if any byte is not RAM or it crosses the hole. */
void *guest_memory_ptr(const struct guest_memory *mem, uint64_t gpa, uint64_t len);
/* 0 or -EFAULT. */
int guest_memory_read(const struct guest_memory *mem, uint64_t gpa, void *buf, size_t len);
int guest_memory_write(struct guest_memory *mem, uint64_t gpa, const void *buf, size_t len);
/* For writes made through a pointer (disk reads into guest buffers, used rings): after the data landed,
 * before completion is told. */
void guest_memory_mark_dirty(struct guest_memory *mem, uint64_t gpa, uint64_t len);
/*
 * The guest has no use for what is in [gpa, gpa+len), whole pages: they are taken out of the memfd, so that
 * the host has them back, read as zeroes from now on, and are marked dirty after that. Whoever sends them
 * either reads what was there, and again later, or finds the hole. 0; -EFAULT, -EINVAL, or what fallocate
 * said.
 */
int guest_memory_discard(struct guest_memory *mem, uint64_t gpa, uint64_t len);
/* Who is told, before the pages go: pages of the memfd. NULL: nobody, and nobody is being told any more. */
void guest_memory_on_discard(struct guest_memory *mem,
			     void (*discarding)(void *opaque, uint64_t first_page, uint64_t npages),
			     void *opaque);
/* What the host has given for it. */
uint64_t guest_memory_resident_bytes(const struct guest_memory *mem);
/* The flat space that memxfer sends. */
struct mem_space guest_memory_space(const struct guest_memory *mem);

#endif
