/* SPDX-License-Identifier: Apache-2.0 */
/* Kernels of a few instructions for unit tests: an ELF file with a PVH note, loaded and entered at 1 MiB in
 * 32-bit mode. */
#ifndef TESTS_UNIT_VMM_TINY_KERNEL_H
#define TESTS_UNIT_VMM_TINY_KERNEL_H

#include <elf.h>
#include <stdio.h>
#include <string.h>

#define TINY_ADDRESS 0x100000u
#define TINY_BYTES   4096u
#define TINY_COUNTER 0x200000u /* counts with ecx */
#define TINY_BAD     0x201000u /* not 0: register and memory disagreed */
#define TINY_BOOTS   0x202000u

/* ecx and [COUNTER] go up together; if they ever differ, [BAD] = 1 and it stays there. Prints 'A' first. */
static const unsigned char tiny_count[] = {
	0xba, 0xf8, 0x03, 0x00, 0x00,				    /* mov edx, 0x3f8 */
	0xb0, 'A',  0xee,					    /* mov al, 'A'; out dx, al */
	0x31, 0xc9,						    /* xor ecx, ecx */
	0x89, 0x0d, 0x00, 0x00, 0x20, 0x00,			    /* mov [COUNTER], ecx */
	0x3b, 0x0d, 0x00, 0x00, 0x20, 0x00,			    /* cmp ecx, [COUNTER] */
	0x75, 0x09,						    /* jne bad */
	0x41,							    /* inc ecx */
	0x89, 0x0d, 0x00, 0x00, 0x20, 0x00,			    /* mov [COUNTER], ecx */
	0xeb, 0xef,						    /* jmp to cmp */
	0xc7, 0x05, 0x00, 0x10, 0x20, 0x00, 0x01, 0x00, 0x00, 0x00, /* bad: mov dword [BAD], 1 */
	0xeb, 0xfe,						    /* jmp . */
};

/* Prints 'B', then writes the sleep control register: S5. */
static const unsigned char tiny_power_off[] = {
	0xba, 0xf8, 0x03, 0x00, 0x00, /* mov edx, 0x3f8 */
	0xb0, 'B',  0xee,	      /* mov al, 'B'; out dx, al */
	0xba, 0x00, 0x06, 0x00, 0x00, /* mov edx, 0x600 */
	0xb0, 0x34, 0xee,	      /* mov al, 0x34; out dx, al */
	0xeb, 0xfe,		      /* jmp . */
};

/* Resets itself by the reset register until it has booted three times, then powers off. */
static const unsigned char tiny_reset[] = {
	0xff, 0x05, 0x00, 0x20, 0x20, 0x00,	  /* inc dword [BOOTS] */
	0x83, 0x3d, 0x00, 0x20, 0x20, 0x00, 0x03, /* cmp dword [BOOTS], 3 */
	0x73, 0x0a,				  /* jae off */
	0xba, 0xf9, 0x0c, 0x00, 0x00,		  /* mov edx, 0xcf9 */
	0xb0, 0x06, 0xee,			  /* mov al, 6; out dx, al */
	0xeb, 0xfe,				  /* jmp . */
	0xba, 0x00, 0x06, 0x00, 0x00,		  /* off: mov edx, 0x600 */
	0xb0, 0x34, 0xee,			  /* mov al, 0x34; out dx, al */
	0xeb, 0xfe,
};

/* No IDT: an undefined instruction is a triple fault. */
static const unsigned char tiny_triple_fault[] = {
	0x0f, 0x01, 0x1d, 0x0c, 0x00, 0x10, 0x00, /* lidt [0x10000c] */
	0x0f, 0x0b,				  /* ud2 */
	0xeb, 0xfe, 0x90, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
};

static const struct tiny_note {
	Elf64_Nhdr header;
	char name[4];
	unsigned entry;
} tiny_note = {{4, 4, 18}, "Xen", TINY_ADDRESS};

static inline void tiny_headers(Elf64_Ehdr *eh, Elf64_Phdr ph[2])
{
	memset(eh, 0, sizeof *eh);
	memset(ph, 0, 2 * sizeof ph[0]);
	memcpy(eh->e_ident, ELFMAG, SELFMAG);
	eh->e_ident[EI_CLASS] = ELFCLASS64;
	eh->e_ident[EI_DATA] = ELFDATA2LSB;
	eh->e_type = ET_EXEC;
	eh->e_machine = EM_X86_64;
	eh->e_phoff = sizeof *eh;
	eh->e_phentsize = sizeof ph[0];
	eh->e_phnum = 2;
	ph[0].p_type = PT_LOAD;
	ph[0].p_offset = 512;
	ph[0].p_paddr = TINY_ADDRESS;
	ph[0].p_memsz = TINY_BYTES;
	ph[1].p_type = PT_NOTE;
	ph[1].p_offset = 256;
	ph[1].p_filesz = sizeof tiny_note;
	ph[1].p_align = 4;
}

/* Writes eh, ph, the note and the code as a file. */
static inline void tiny_write_headers(const char *path, const Elf64_Ehdr *eh, const Elf64_Phdr ph[2],
				      const void *code, size_t len)
{
	unsigned char file[1024] = {0};
	memcpy(file, eh, sizeof *eh);
	memcpy(file + sizeof *eh, ph, 2 * sizeof ph[0]);
	memcpy(file + 256, &tiny_note, sizeof tiny_note);
	memcpy(file + 512, code, len);
	FILE *f = fopen(path, "w");
	fwrite(file, 1, 512 + len, f);
	fclose(f);
}

static inline void tiny_write(const char *path, const void *code, size_t len)
{
	Elf64_Ehdr eh;
	Elf64_Phdr ph[2];
	tiny_headers(&eh, ph);
	ph[0].p_filesz = len;
	tiny_write_headers(path, &eh, ph, code, len);
}

#endif
