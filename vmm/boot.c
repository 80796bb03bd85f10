/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/boot.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "vmm/power.h"

unsigned boot_memory_map(struct machine *m, struct boot_map map[BOOT_MAP_MAX])
{
	unsigned n = 0;
	const struct guest_memory *mem = &m->mem;
	map[n++] = (struct boot_map){0, BOOT_LOW_END, BOOT_E820_RAM};
	map[n++] = (struct boot_map){BOOT_ACPI, BOOT_ACPI_END - BOOT_ACPI, BOOT_E820_RESERVED};
	if (mem->low_bytes > BOOT_HIGH)
		map[n++] = (struct boot_map){BOOT_HIGH, mem->low_bytes - BOOT_HIGH, BOOT_E820_RAM};
	map[n++] = (struct boot_map){PCI_ECAM_BASE, PCI_ECAM_BYTES, BOOT_E820_RESERVED};
	if (mem->size_bytes > mem->low_bytes)
		map[n++] =
			(struct boot_map){MEMORY_HIGH_BASE, mem->size_bytes - mem->low_bytes, BOOT_E820_RAM};
	return n;
}

int boot_read(struct machine *m, int fd, const char *name, uint64_t offset, uint64_t gpa, uint64_t len,
	      struct error *err)
{
	uint8_t *p = guest_memory_ptr(&m->mem, gpa, len);
	if (!p)
		return error_set(err, EFBIG, "%s: %llu bytes for guest address 0x%llx do not fit its memory",
				 name, (unsigned long long)len, (unsigned long long)gpa);
	uint64_t done = 0;
	while (done < len) {
		ssize_t n = pread(fd, p + done, len - done, (off_t)(offset + done));
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return error_errno(err, errno, "%s: read", name);
		if (n == 0)
			return error_set(err, EIO, "%s: ends at byte %llu, %llu more expected", name,
					 (unsigned long long)(offset + done),
					 (unsigned long long)(len - done));
		done += (uint64_t)n;
	}
	guest_memory_mark_dirty(&m->mem, gpa, len);
	return 0;
}

int boot_initrd(struct machine *m, uint64_t floor, uint64_t limit, uint64_t *gpa, uint64_t *size,
		struct error *err)
{
	*gpa = *size = 0;
	if (m->boot.initrd_fd < 0)
		return 0;
	struct stat st;
	if (fstat(m->boot.initrd_fd, &st) < 0)
		return error_errno(err, errno, "initrd %s", m->boot.initrd);
	uint64_t len = (uint64_t)st.st_size;
	if (limit > m->mem.low_bytes)
		limit = m->mem.low_bytes;
	if (len > limit || ((limit - len) & ~UINT64_C(4095)) < floor)
		return error_set(err, EFBIG, "initrd %s: %llu bytes do not fit the guest's memory",
				 m->boot.initrd, (unsigned long long)len);
	*gpa = (limit - len) & ~UINT64_C(4095);
	*size = len;
	return boot_read(m, m->boot.initrd_fd, m->boot.initrd, 0, *gpa, len, err);
}

int boot_get_sregs(struct machine *m, struct kvm_sregs *sregs, struct error *err)
{
	int ret = kvm_ioctl(m->vcpus[0].fd, KVM_GET_SREGS, sregs);
	return ret < 0 ? error_errno(err, ret, "vCPU 0: KVM_GET_SREGS") : 0;
}

int boot_set_regs(struct machine *m, const struct kvm_regs *regs, const struct kvm_sregs *sregs,
		  struct error *err)
{
	int ret = kvm_ioctl(m->vcpus[0].fd, KVM_SET_SREGS, (void *)sregs);
	if (ret < 0)
		return error_errno(err, ret, "vCPU 0: KVM_SET_SREGS");
	ret = kvm_ioctl(m->vcpus[0].fd, KVM_SET_REGS, (void *)regs);
	return ret < 0 ? error_errno(err, ret, "vCPU 0: KVM_SET_REGS") : 0;
}

struct kvm_segment boot_segment(uint16_t selector, uint8_t type, bool long_mode)
{
	return (struct kvm_segment){
		.base = 0,
		.limit = 0xffffffff,
		.selector = selector,
		.type = type,
		.present = 1,
		.s = 1,
		.g = 1,
		.l = long_mode,
		.db = !long_mode,
	};
}

void boot_source_close(struct boot_source *b)
{
	if (b->kernel_fd >= 0)
		close(b->kernel_fd);
	if (b->initrd_fd >= 0)
		close(b->initrd_fd);
	free(b->kernel);
	free(b->initrd);
	free(b->cmdline);
	*b = (struct boot_source){.kernel_fd = -1, .initrd_fd = -1};
}

static int open_file(const char *kind, const char *path, int *fd, struct error *err)
{
	struct stat st;
	*fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (*fd < 0)
		return error_errno(err, errno, "%s %s", kind, path);
	if (fstat(*fd, &st) < 0)
		return error_errno(err, errno, "%s %s", kind, path);
	if (!S_ISREG(st.st_mode))
		return error_set(err, EINVAL, "%s %s: not a regular file", kind, path);
	return 0;
}

int machine_set_kernel(struct machine *m, const char *kernel, const char *initrd, const char *cmdline,
		       struct error *err)
{
	struct boot_source b = {.kernel_fd = -1, .initrd_fd = -1};
	int ret = open_file("kernel", kernel, &b.kernel_fd, err);
	if (!ret && initrd)
		ret = open_file("initrd", initrd, &b.initrd_fd, err);
	if (!ret) {
		b.kernel = strdup(kernel);
		b.initrd = initrd ? strdup(initrd) : NULL;
		b.cmdline = strdup(cmdline ? cmdline : "");
		if (!b.kernel || !b.cmdline || (initrd && !b.initrd))
			ret = error_errno(err, ENOMEM, "kernel %s", kernel);
		else if (strlen(b.cmdline) >= BOOT_CMDLINE_BYTES)
			ret = error_set(err, EINVAL, "kernel command line: longer than %u bytes",
					BOOT_CMDLINE_BYTES - 1);
	}
	if (ret) {
		boot_source_close(&b);
		return ret;
	}
	boot_source_close(&m->boot);
	m->boot = b;
	return 0;
}

/* A kernel that reboots by way of the BIOS jumps to the processor's reset vector in real mode; Debian's does.
 */
static void write_reset_vector(struct machine *m)
{
	static const uint8_t code[] = {
		0xba,
		POWER_RESET_PORT & 0xff,
		POWER_RESET_PORT >> 8, /* mov dx, port */
		0xb0,
		POWER_RESET_VALUE,
		0xee, /* mov al, value; out dx, al */
		0xf4,
		0xeb,
		0xfd, /* hlt; jmp to hlt */
	};
	guest_memory_write(&m->mem, BOOT_RESET_VECTOR, code, sizeof code);
}

int boot_load(struct machine *m, struct error *err)
{
	uint8_t magic[0x206] = {0};
	if (m->mem.low_bytes < (16u << 20))
		return error_set(err, EINVAL, "guest memory: %llu bytes are too few to boot from",
				 (unsigned long long)m->mem.size_bytes);
	ssize_t n = pread(m->boot.kernel_fd, magic, sizeof magic, 0);
	if (n < 0)
		return error_errno(err, errno, "kernel %s: read", m->boot.kernel);
	uint64_t rsdp;
	int ret = acpi_write(m, &rsdp, err);
	if (ret)
		return ret;
	write_reset_vector(m);
	if (n >= 4 && !memcmp(magic, "\177ELF", 4))
		return boot_pvh(m, rsdp, err);
	if (n == sizeof magic && !memcmp(magic + 0x202, "HdrS", 4))
		return boot_bzimage(m, rsdp, err);
	return error_set(err, EINVAL, "kernel %s: neither a bzImage nor an ELF file", m->boot.kernel);
}
