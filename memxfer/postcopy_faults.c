/* SPDX-License-Identifier: Apache-2.0 */
#include "memxfer/postcopy_faults.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/cleanup.h"

#define NEEDED_IOCTLS (UINT64_C(1) << _UFFDIO_COPY | UINT64_C(1) << _UFFDIO_WAKE)

/* Without UFFD_USER_MODE_ONLY: KVM's own accesses are the kernel's. That takes CAP_SYS_PTRACE,
 * /proc/sys/vm/unprivileged_userfaultfd or, from Linux 6.1 on, the right to open a device. */
static int open_userfaultfd(void)
{
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	int why = errno;
#ifdef USERFAULTFD_IOC_NEW
	if (fd < 0 && why == EPERM) {
		CLEANUP_FD int device = open("/dev/userfaultfd", O_RDONLY | O_CLOEXEC);
		if (device >= 0)
			fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
	}
#endif
	return fd < 0 ? -why : fd;
}

int mem_postcopy_open_faults(int *fd, struct error *err)
{
	CLEANUP_FD int u = open_userfaultfd();
	struct uffdio_api api = {.api = UFFD_API};

	*fd = -1;
	if (u < 0)
		return error_errno(err, u, "userfaultfd");
	/* Features are what a kernel offers unasked here: memory of a file is served since 4.11. */
	if (ioctl(u, UFFDIO_API, &api) < 0)
		return error_errno(err, errno, "userfaultfd: UFFDIO_API");
	if (!(api.features & UFFD_FEATURE_MISSING_SHMEM))
		return error_set(err, EOPNOTSUPP, "userfaultfd: this kernel does not serve shared memory");
	*fd = steal_fd(&u);
	return 0;
}

int mem_postcopy_small_pages(const struct mem_space *space, struct error *err)
{
	/* EINVAL: a kernel without huge pages */
	if (madvise(space->base, space->npages * MEM_PAGE_BYTES, MADV_NOHUGEPAGE) < 0 && errno != EINVAL)
		return error_errno(err, errno, "guest memory: MADV_NOHUGEPAGE");
	return 0;
}

static struct uffdio_range range_of(const struct mem_space *space, uint64_t first, uint64_t npages)
{
	return (struct uffdio_range){.start = (uint64_t)(uintptr_t)(space->base + first * MEM_PAGE_BYTES),
				     .len = npages * MEM_PAGE_BYTES};
}

int faults_register(int fd, const struct mem_space *space, struct error *err)
{
	struct uffdio_register r = {.range = range_of(space, 0, space->npages),
				    .mode = UFFDIO_REGISTER_MODE_MISSING};

	if (ioctl(fd, UFFDIO_REGISTER, &r) < 0)
		return error_errno(err, errno, "userfaultfd: UFFDIO_REGISTER");
	if ((r.ioctls & NEEDED_IOCTLS) != NEEDED_IOCTLS)
		return error_set(err, EOPNOTSUPP, "userfaultfd: this kernel cannot fill shared memory");
	return 0;
}

int faults_unregister(int fd, const struct mem_space *space, struct error *err)
{
	struct uffdio_range r = range_of(space, 0, space->npages);

	return ioctl(fd, UFFDIO_UNREGISTER, &r) < 0
		       ? error_errno(err, errno, "userfaultfd: UFFDIO_UNREGISTER")
		       : 0;
}

int faults_next(int fd, const struct mem_space *space, uint64_t *page, struct error *err)
{
	struct uffd_msg m;
	ssize_t n = read(fd, &m, sizeof m);

	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return -EAGAIN;
	if (n != sizeof m)
		return error_errno(err, n < 0 ? errno : EIO, "userfaultfd: read");
	if (m.event != UFFD_EVENT_PAGEFAULT)
		return error_set(err, EPROTO, "userfaultfd: event %u", m.event);
	*page = (m.arg.pagefault.address - (uint64_t)(uintptr_t)space->base) / MEM_PAGE_BYTES;
	return 0;
}

static int wake(int fd, const struct mem_space *space, uint64_t page, struct error *err)
{
	struct uffdio_range r = range_of(space, page, 1);

	return ioctl(fd, UFFDIO_WAKE, &r) < 0 ? error_errno(err, errno, "userfaultfd: UFFDIO_WAKE") : 0;
}

/* One page or, with data, up to npages: how many are done, or negative. */
static int64_t fill_some(int fd, const struct mem_space *space, uint64_t first, uint64_t npages,
			 const uint8_t *data, struct error *err)
{
	static const uint8_t zeroes[MEM_PAGE_BYTES];
	struct uffdio_copy c = {
		.dst = range_of(space, first, 1).start,
		.src = (uint64_t)(uintptr_t)(data ? data : zeroes),
		.len = data ? npages * MEM_PAGE_BYTES : MEM_PAGE_BYTES,
	};

	if (ioctl(fd, UFFDIO_COPY, &c) == 0)
		return (int64_t)(c.len / MEM_PAGE_BYTES);
	if (c.copy > 0)
		return c.copy / MEM_PAGE_BYTES;
	if (errno == EEXIST)
		return -EEXIST;
	if (errno == EAGAIN || errno == EINTR)
		return 0;
	return error_errno(err, errno, "guest memory: filling page %llu", (unsigned long long)first);
}

int faults_fill(int fd, const struct mem_space *space, uint64_t first, uint64_t npages, const uint8_t *data,
		uint64_t *present, struct error *err)
{
	while (npages) {
		int64_t n = fill_some(fd, space, first, npages, data, err);

		if (n == -EEXIST) {
			int ret = wake(fd, space, first, err);

			if (ret < 0)
				return ret;
			(*present)++;
			n = 1;
		} else if (n < 0) {
			return (int)n;
		} else if (n == 0) {
			sched_yield();
		}
		first += (uint64_t)n;
		npages -= (uint64_t)n;
		data = data ? data + (uint64_t)n * MEM_PAGE_BYTES : NULL;
	}
	return 0;
}
