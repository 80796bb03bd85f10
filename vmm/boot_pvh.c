/* SPDX-License-Identifier: Apache-2.0 */
/* PVH: an ELF file whose note XEN_ELFNOTE_PHYS32_ENTRY names a 32-bit entry point (Xen,
 * docs/misc/pvh.pandoc). */
#include <elf.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "vmm/boot.h"

#define NOTE_PHYS32_ENTRY 18
#define PHDRS_MAX	  64
#define NOTE_BYTES_MAX	  65536u
#define START_MAGIC	  0x336ec578u
/* struct hvm_start_info version 1, hvm_modlist_entry, hvm_memmap_table_entry */
#define START_INFO_BYTES 56u
#define MODULE_BYTES	 32u
#define MEMMAP_BYTES	 24u

static int bad(struct machine *m, struct error *err, const char *what)
{
	return error_set(err, EINVAL, "kernel %s: %s", m->boot.kernel, what);
}

static int read_exact(struct machine *m, void *p, size_t len, uint64_t offset, struct error *err)
{
	ssize_t n = pread(m->boot.kernel_fd, p, len, (off_t)offset);
	if (n < 0)
		return error_errno(err, errno, "kernel %s: read", m->boot.kernel);
	if ((size_t)n != len)
		return error_set(err, EINVAL, "kernel %s: truncated at byte %llu", m->boot.kernel,
				 (unsigned long long)(offset + (uint64_t)n));
	return 0;
}

/* *entry stays 0 when the segment has no such note. */
static int find_note(struct machine *m, const Elf64_Phdr *ph, uint64_t file_bytes, uint32_t *entry,
		     struct error *err)
{
	if (ph->p_filesz > NOTE_BYTES_MAX || !range_fits(ph->p_offset, ph->p_filesz, file_bytes))
		return bad(m, err, "note segment outside the file or too large");
	CLEANUP_FREE uint8_t *buf = malloc(ph->p_filesz + 1);
	if (!buf)
		return error_errno(err, ENOMEM, "kernel %s", m->boot.kernel);
	int ret = read_exact(m, buf, ph->p_filesz, ph->p_offset, err);
	if (ret)
		return ret;
	/* Old binutils gave note segments an alignment of 8 and aligned only to 4. */
	uint64_t align = ph->p_align == 8 ? 8 : 4, at = 0;
	while (range_fits(at, sizeof(Elf64_Nhdr), ph->p_filesz)) {
		Elf64_Nhdr n;
		memcpy(&n, buf + at, sizeof n);
		uint64_t name = at + sizeof n;
		uint64_t desc = (name + n.n_namesz + align - 1) & ~(align - 1);
		if (!range_fits(name, n.n_namesz, ph->p_filesz) ||
		    !range_fits(desc, n.n_descsz, ph->p_filesz))
			break;
		if (n.n_type == NOTE_PHYS32_ENTRY && n.n_namesz == 4 && !memcmp(buf + name, "Xen", 4) &&
		    n.n_descsz >= 4) {
			*entry = get_le32(buf + desc);
			return 0;
		}
		at = (desc + n.n_descsz + align - 1) & ~(align - 1);
	}
	return 0;
}

/* Loads the segments; *end is the first byte after them. */
static int load_elf(struct machine *m, uint32_t *entry, uint64_t *end, struct error *err)
{
	struct stat st;
	if (fstat(m->boot.kernel_fd, &st) < 0)
		return error_errno(err, errno, "kernel %s", m->boot.kernel);
	uint64_t file_bytes = (uint64_t)st.st_size;
	Elf64_Ehdr eh;
	int ret = read_exact(m, &eh, sizeof eh, 0, err);
	if (ret)
		return ret;
	if (eh.e_ident[EI_CLASS] != ELFCLASS64 || eh.e_ident[EI_DATA] != ELFDATA2LSB ||
	    eh.e_machine != EM_X86_64)
		return bad(m, err, "not a 64-bit x86 ELF file");
	if (eh.e_phentsize != sizeof(Elf64_Phdr) || eh.e_phnum == 0 || eh.e_phnum > PHDRS_MAX)
		return bad(m, err, "bad program headers");
	Elf64_Phdr ph[PHDRS_MAX];
	ret = read_exact(m, ph, eh.e_phnum * sizeof ph[0], eh.e_phoff, err);
	if (ret)
		return ret;
	*entry = 0;
	*end = BOOT_HIGH;
	for (unsigned i = 0; i < eh.e_phnum; i++) {
		if (ph[i].p_type == PT_NOTE && !*entry) {
			ret = find_note(m, &ph[i], file_bytes, entry, err);
			if (ret)
				return ret;
		}
		if (ph[i].p_type != PT_LOAD || !ph[i].p_memsz)
			continue;
		if (ph[i].p_filesz > ph[i].p_memsz || !range_fits(ph[i].p_offset, ph[i].p_filesz, file_bytes))
			return bad(m, err, "a segment lies outside the file");
		/* Below 1 MiB is what the boot protocol itself uses. */
		if (ph[i].p_paddr < BOOT_HIGH || !range_fits(ph[i].p_paddr, ph[i].p_memsz, m->mem.low_bytes))
			return error_set(err, EINVAL,
					 "kernel %s: a segment at 0x%llx of 0x%llx bytes does not fit the "
					 "guest's memory",
					 m->boot.kernel, (unsigned long long)ph[i].p_paddr,
					 (unsigned long long)ph[i].p_memsz);
		ret = boot_read(m, m->boot.kernel_fd, m->boot.kernel, ph[i].p_offset, ph[i].p_paddr,
				ph[i].p_filesz, err);
		if (ret)
			return ret;
		uint64_t zero_at = ph[i].p_paddr + ph[i].p_filesz, zero_len = ph[i].p_memsz - ph[i].p_filesz;
		memset(guest_memory_ptr(&m->mem, zero_at, zero_len), 0, zero_len);
		guest_memory_mark_dirty(&m->mem, zero_at, zero_len);
		if (ph[i].p_paddr + ph[i].p_memsz > *end)
			*end = ph[i].p_paddr + ph[i].p_memsz;
	}
	if (!*entry)
		return bad(m, err,
			   "no PVH entry point (XEN_ELFNOTE_PHYS32_ENTRY): not a kernel that boots by PVH");
	return 0;
}

static void write_start_info(struct machine *m, uint64_t rsdp, uint64_t initrd, uint64_t initrd_bytes)
{
	uint8_t page[4096] = {0};
	uint8_t *modules = page + 64, *memmap = page + 128;
	struct boot_map map[BOOT_MAP_MAX];
	unsigned n = boot_memory_map(m, map);
	put_le32(page, START_MAGIC);
	put_le32(page + 4, 1); /* version */
	put_le32(page + 12, initrd_bytes ? 1 : 0);
	put_le64(page + 16, BOOT_START_INFO + 64);
	put_le64(page + 24, BOOT_CMDLINE);
	put_le64(page + 32, rsdp);
	put_le64(page + 40, BOOT_START_INFO + 128);
	put_le32(page + 48, n);
	put_le64(modules, initrd);
	put_le64(modules + 8, initrd_bytes);
	for (unsigned i = 0; i < n; i++) {
		put_le64(memmap + i * MEMMAP_BYTES, map[i].base);
		put_le64(memmap + i * MEMMAP_BYTES + 8, map[i].len);
		put_le32(memmap + i * MEMMAP_BYTES + 16, map[i].type);
	}
	guest_memory_write(&m->mem, BOOT_START_INFO, page, sizeof page);
	guest_memory_write(&m->mem, BOOT_CMDLINE, m->boot.cmdline, strlen(m->boot.cmdline) + 1);
}

int boot_pvh(struct machine *m, uint64_t rsdp, struct error *err)
{
	uint32_t entry = 0;
	uint64_t end = 0, initrd = 0, initrd_bytes = 0;
	int ret = load_elf(m, &entry, &end, err);
	if (!ret)
		ret = boot_initrd(m, end, m->mem.low_bytes, &initrd, &initrd_bytes, err);
	if (ret)
		return ret;
	write_start_info(m, rsdp, initrd, initrd_bytes);

	struct kvm_sregs sregs;
	ret = boot_get_sregs(m, &sregs, err);
	if (ret)
		return ret;
	sregs.cs = boot_segment(0x08, 0xb, false);
	sregs.ds = sregs.es = sregs.ss = sregs.fs = sregs.gs = boot_segment(0x10, 0x3, false);
	sregs.tr = (struct kvm_segment){.selector = 0x18, .limit = 0x67, .type = 0xb, .present = 1};
	sregs.cr0 = 0x11; /* PE, ET */
	sregs.cr3 = sregs.cr4 = 0;
	sregs.efer = 0;
	struct kvm_regs regs = {.rip = entry, .rbx = BOOT_START_INFO, .rflags = 2, .rsp = BOOT_STACK};
	return boot_set_regs(m, &regs, &sregs, err);
}
