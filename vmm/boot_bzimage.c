/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bzImage by its 64-bit entry point (Linux, Documentation/arch/x86/boot.rst): identity-mapped page tables,
 * flat segments, rsi = the zero page.
 */
#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/bytes.h"
#include "vmm/boot.h"

/* Offsets in the file's first sector and in the zero page: the setup header sits at the same place in both.
 */
#define SETUP_SECTS	  0x1f1
#define HEADER_JUMP	  0x200
#define VERSION		  0x206
#define TYPE_OF_LOADER	  0x210
#define LOADFLAGS	  0x211
#define RAMDISK_IMAGE	  0x218
#define RAMDISK_SIZE	  0x21c
#define CMD_LINE_PTR	  0x228
#define INITRD_ADDR_MAX	  0x22c
#define KERNEL_ALIGNMENT  0x230
#define RELOCATABLE	  0x234
#define XLOADFLAGS	  0x236
#define CMDLINE_SIZE	  0x238
#define PREF_ADDRESS	  0x258
#define INIT_SIZE	  0x260
#define ZERO_ACPI_RSDP	  0x070
#define ZERO_E820_ENTRIES 0x1e8
#define ZERO_E820_TABLE	  0x2d0
#define VERSION_MIN	  0x020c
#define XLF_KERNEL_64	  1
#define LOADED_HIGH	  1
#define LOADER_UNDEFINED  0xff
#define ENTRY_64	  0x200
#define SETUP_BYTES_MAX	  (65 * 512u)

static int bad(struct machine *m, struct error *err, const char *what)
{
	return error_set(err, EINVAL, "kernel %s: %s", m->boot.kernel, what);
}

/* Where the protected-mode code goes. */
static int choose_address(struct machine *m, const uint8_t *h, uint64_t len, uint64_t *address, uint64_t *end,
			  struct error *err)
{
	uint64_t need = get_le32(h + INIT_SIZE), pref = get_le64(h + PREF_ADDRESS);
	uint64_t align = get_le32(h + KERNEL_ALIGNMENT);
	if (need < len)
		need = len;
	*address = pref;
	if (pref < BOOT_HIGH || !range_fits(pref, need, m->mem.low_bytes)) {
		if (!h[RELOCATABLE] || align < 4096 || (align & (align - 1)))
			return error_set(err, EINVAL,
					 "kernel %s: its address 0x%llx does not fit the guest's memory",
					 m->boot.kernel, (unsigned long long)pref);
		*address = (BOOT_HIGH + align - 1) & ~(align - 1);
		if (!range_fits(*address, need, m->mem.low_bytes))
			return error_set(err, EINVAL,
					 "kernel %s: needs %llu bytes of memory, the guest has less",
					 m->boot.kernel, (unsigned long long)(*address + need));
	}
	*end = *address + need;
	return 0;
}

static void write_page_tables(struct machine *m)
{
	uint8_t t[6 * 4096] = {0};
	put_le64(t, (BOOT_PAGE_TABLES + 4096) | 3);
	for (unsigned i = 0; i < 4; i++)
		put_le64(t + 4096 + 8 * i, (BOOT_PAGE_TABLES + 8192 + 4096 * i) | 3);
	for (uint64_t i = 0; i < 2048; i++)
		put_le64(t + 8192 + 8 * i, i << 21 | 0x83);
	guest_memory_write(&m->mem, BOOT_PAGE_TABLES, t, sizeof t);
}

static int enter_64(struct machine *m, uint64_t entry, struct error *err)
{
	static const uint64_t gdt[] = {0, 0, 0x00af9b000000ffff, 0x00cf93000000ffff};
	uint8_t table[sizeof gdt];
	for (unsigned i = 0; i < 4; i++)
		put_le64(table + 8 * i, gdt[i]);
	guest_memory_write(&m->mem, BOOT_GDT, table, sizeof table);
	write_page_tables(m);
	struct kvm_sregs sregs;
	int ret = boot_get_sregs(m, &sregs, err);
	if (ret)
		return ret;
	sregs.gdt.base = BOOT_GDT;
	sregs.gdt.limit = sizeof table - 1;
	sregs.idt.base = 0;
	sregs.idt.limit = 0;
	sregs.cs = boot_segment(0x10, 0xb, true);
	sregs.ds = sregs.es = sregs.ss = sregs.fs = sregs.gs = boot_segment(0x18, 0x3, false);
	sregs.tr = (struct kvm_segment){.limit = 0x67, .type = 0xb, .present = 1};
	sregs.cr0 = 0x80000033; /* PG, NE, ET, MP, PE */
	sregs.cr3 = BOOT_PAGE_TABLES;
	sregs.cr4 = 0x20;   /* PAE */
	sregs.efer = 0x500; /* LME, LMA */
	struct kvm_regs regs = {.rip = entry, .rsi = BOOT_ZERO_PAGE, .rsp = BOOT_STACK, .rflags = 2};
	return boot_set_regs(m, &regs, &sregs, err);
}

int boot_bzimage(struct machine *m, uint64_t rsdp, struct error *err)
{
	struct stat st;
	uint8_t h[1024] = {0};
	if (fstat(m->boot.kernel_fd, &st) < 0)
		return error_errno(err, errno, "kernel %s", m->boot.kernel);
	ssize_t n = pread(m->boot.kernel_fd, h, sizeof h, 0);
	if (n < (ssize_t)sizeof h)
		return bad(m, err, "truncated");
	if (get_le16(h + VERSION) < VERSION_MIN || !(get_le16(h + XLOADFLAGS) & XLF_KERNEL_64) ||
	    !(h[LOADFLAGS] & LOADED_HIGH))
		return bad(m, err, "no 64-bit entry point (boot protocol 2.12, XLF_KERNEL_64)");
	uint64_t setup = (h[SETUP_SECTS] ? h[SETUP_SECTS] + 1u : 5u) * 512u;
	if (setup > SETUP_BYTES_MAX || setup >= (uint64_t)st.st_size)
		return bad(m, err, "truncated: nothing after the setup code");
	uint64_t len = (uint64_t)st.st_size - setup;
	uint64_t address = 0, end = 0, initrd = 0, initrd_bytes = 0;
	if (len <= ENTRY_64)
		return bad(m, err, "truncated: nothing after the setup code");
	size_t cmdline = strlen(m->boot.cmdline);
	if (cmdline > get_le32(h + CMDLINE_SIZE))
		return error_set(err, EINVAL, "kernel %s: command line of %zu bytes, the kernel takes %u",
				 m->boot.kernel, cmdline, get_le32(h + CMDLINE_SIZE));
	int ret = choose_address(m, h, len, &address, &end, err);
	if (!ret)
		ret = boot_initrd(m, end, (uint64_t)get_le32(h + INITRD_ADDR_MAX) + 1, &initrd, &initrd_bytes,
				  err);
	if (!ret)
		ret = boot_read(m, m->boot.kernel_fd, m->boot.kernel, setup, address, len, err);
	if (ret)
		return ret;

	uint8_t zero[4096] = {0};
	/* The header ends where the jump at 0x200 lands. */
	size_t header_end = 0x202u + h[HEADER_JUMP + 1];
	memcpy(zero + SETUP_SECTS, h + SETUP_SECTS, header_end - SETUP_SECTS);
	zero[TYPE_OF_LOADER] = LOADER_UNDEFINED;
	put_le32(zero + RAMDISK_IMAGE, (uint32_t)initrd);
	put_le32(zero + RAMDISK_SIZE, (uint32_t)initrd_bytes);
	put_le32(zero + CMD_LINE_PTR, (uint32_t)BOOT_CMDLINE);
	put_le64(zero + ZERO_ACPI_RSDP, rsdp);
	struct boot_map map[BOOT_MAP_MAX];
	unsigned nmap = boot_memory_map(m, map);
	zero[ZERO_E820_ENTRIES] = (uint8_t)nmap;
	for (unsigned i = 0; i < nmap; i++) {
		put_le64(zero + ZERO_E820_TABLE + 20 * i, map[i].base);
		put_le64(zero + ZERO_E820_TABLE + 20 * i + 8, map[i].len);
		put_le32(zero + ZERO_E820_TABLE + 20 * i + 16, map[i].type);
	}
	guest_memory_write(&m->mem, BOOT_ZERO_PAGE, zero, sizeof zero);
	guest_memory_write(&m->mem, BOOT_CMDLINE, m->boot.cmdline, cmdline + 1);
	return enter_64(m, address + ENTRY_64, err);
}
