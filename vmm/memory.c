/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/memory.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/bitmap.h"
#include "base/bytes.h"
#include "base/cleanup.h"

/* Every CPU that runs this has at least 39 bits of physical address; what is above needs a check nobody
 * makes. */
#define MEMORY_MAX_BYTES (UINT64_C(1) << 38)

/* Aligned as a huge page is, in the guest as here, or there can be none. NULL with errno set. */
static void *map_aligned(int fd, uint64_t size)
{
	uint8_t *area = mmap(NULL, size + MEM_REGION_BYTES, PROT_NONE,
			     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (area == MAP_FAILED)
		return NULL;
	size_t before = -(uintptr_t)area % MEM_REGION_BYTES;
	if (before)
		munmap(area, before);
	if (before < MEM_REGION_BYTES)
		munmap(area + before + size, MEM_REGION_BYTES - before);
	void *base = mmap(area + before, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE | MAP_FIXED,
			  fd, 0);
	if (base != MAP_FAILED)
		return base;
	int e = errno;
	munmap(area + before, size);
	errno = e;
	return NULL;
}

int guest_memory_create(uint64_t size_bytes, struct guest_memory *mem, struct error *err)
{
	*mem = (struct guest_memory){.fd = -1, .discard_lock = PTHREAD_MUTEX_INITIALIZER};
	if (size_bytes == 0 || size_bytes % MEM_REGION_BYTES || size_bytes > MEMORY_MAX_BYTES)
		return error_set(err, EINVAL,
				 "guest memory: %llu bytes: must be a multiple of 2 MiB, at most 256 GiB",
				 (unsigned long long)size_bytes);
	CLEANUP_FD int fd = memfd_create("guest-ram", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (fd < 0)
		return error_errno(err, errno, "guest memory: memfd");
	if (ftruncate(fd, (off_t)size_bytes) < 0)
		return error_errno(err, errno, "guest memory: size %llu", (unsigned long long)size_bytes);
	/* A mapping must never run past the end of the file: nobody may shrink it. */
	if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0)
		return error_errno(err, errno, "guest memory: seal");
	uint64_t *dirty = bitmap_alloc(size_bytes / MEM_PAGE_BYTES);
	if (!dirty)
		return error_errno(err, ENOMEM, "guest memory: dirty bitmap");
	void *base = map_aligned(fd, size_bytes);
	if (!base) {
		int e = errno;
		free(dirty);
		return error_errno(err, e, "guest memory: map %llu bytes", (unsigned long long)size_bytes);
	}
	madvise(base, size_bytes, MADV_DONTDUMP);
	madvise(base, size_bytes, MADV_DONTFORK);
	mem->fd = steal_fd(&fd);
	mem->base = base;
	mem->size_bytes = size_bytes;
	mem->low_bytes = size_bytes < MEMORY_LOW_LIMIT ? size_bytes : MEMORY_LOW_LIMIT;
	mem->vmm_dirty = dirty;
	return 0;
}

void guest_memory_destroy(struct guest_memory *mem)
{
	if (mem->base)
		munmap(mem->base, mem->size_bytes);
	if (mem->fd >= 0)
		close(mem->fd);
	free(mem->vmm_dirty);
	*mem = (struct guest_memory){.fd = -1};
}

/* Offset in the memfd of [gpa, gpa+len), or -1. */
static int64_t memory_offset(const struct guest_memory *mem, uint64_t gpa, uint64_t len)
{
	if (range_fits(gpa, len, mem->low_bytes))
		return (int64_t)gpa;
	uint64_t high = mem->size_bytes - mem->low_bytes;
	if (gpa >= MEMORY_HIGH_BASE && range_fits(gpa - MEMORY_HIGH_BASE, len, high))
		return (int64_t)(mem->low_bytes + gpa - MEMORY_HIGH_BASE);
	return -1;
}

void *guest_memory_ptr(const struct guest_memory *mem, uint64_t gpa, uint64_t len)
{
	int64_t off = memory_offset(mem, gpa, len);
	return off < 0 ? NULL : mem->base + off;
}

int guest_memory_read(const struct guest_memory *mem, uint64_t gpa, void *buf, size_t len)
{
	const void *p = guest_memory_ptr(mem, gpa, len);
	if (!p)
		return -EFAULT;
	memcpy(buf, p, len);
	return 0;
}

int guest_memory_write(struct guest_memory *mem, uint64_t gpa, const void *buf, size_t len)
{
	void *p = guest_memory_ptr(mem, gpa, len);
	if (!p)
		return -EFAULT;
	memcpy(p, buf, len);
	guest_memory_mark_dirty(mem, gpa, len);
	return 0;
}

void guest_memory_mark_dirty(struct guest_memory *mem, uint64_t gpa, uint64_t len)
{
	int64_t off = memory_offset(mem, gpa, len);
	if (off < 0 || !len)
		return;
	uint64_t last = ((uint64_t)off + len - 1) / MEM_PAGE_BYTES;
	for (uint64_t page = (uint64_t)off / MEM_PAGE_BYTES; page <= last; page++)
		bitmap_set_atomic(mem->vmm_dirty, page);
}

int guest_memory_discard(struct guest_memory *mem, uint64_t gpa, uint64_t len)
{
	int64_t off = memory_offset(mem, gpa, len);
	if (off < 0)
		return -EFAULT;
	if (gpa % MEM_PAGE_BYTES || len % MEM_PAGE_BYTES)
		return -EINVAL;
	if (!len)
		return 0;
	{
		SCOPE_LOCK(&mem->discard_lock);
		if (mem->discarding)
			mem->discarding(mem->discarding_opaque, (uint64_t)off / MEM_PAGE_BYTES,
					len / MEM_PAGE_BYTES);
	}
	if (fallocate(mem->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, off, (off_t)len) < 0)
		return -errno;
	guest_memory_mark_dirty(mem, gpa, len);
	return 0;
}

void guest_memory_on_discard(struct guest_memory *mem,
			     void (*discarding)(void *opaque, uint64_t first_page, uint64_t npages),
			     void *opaque)
{
	SCOPE_LOCK(&mem->discard_lock);
	mem->discarding = discarding;
	mem->discarding_opaque = opaque;
}

uint64_t guest_memory_resident_bytes(const struct guest_memory *mem)
{
	struct stat st;
	return fstat(mem->fd, &st) < 0 ? 0 : (uint64_t)st.st_blocks * 512;
}

struct mem_space guest_memory_space(const struct guest_memory *mem)
{
	return (struct mem_space){
		.fd = mem->fd, .base = mem->base, .npages = mem->size_bytes / MEM_PAGE_BYTES};
}
