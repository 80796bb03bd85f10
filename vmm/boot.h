/* SPDX-License-Identifier: Apache-2.0 */
/* What the two ways to boot share: the layout of low memory, the memory map, reading files into guest memory.
 */
#ifndef VMM_BOOT_H
#define VMM_BOOT_H

#include "vmm/machine_internal.h"

#define BOOT_GDT	   UINT64_C(0x500)
#define BOOT_START_INFO	   UINT64_C(0x6000)
#define BOOT_ZERO_PAGE	   UINT64_C(0x7000)
#define BOOT_STACK	   UINT64_C(0x8ff0)
#define BOOT_PAGE_TABLES   UINT64_C(0x9000) /* 6 pages */
#define BOOT_CMDLINE	   UINT64_C(0x20000)
#define BOOT_CMDLINE_BYTES 65536u
#define BOOT_LOW_END	   UINT64_C(0xa0000)
#define BOOT_ACPI	   UINT64_C(0xe0000) /* where an OS without boot loader help would look for the RSDP */
#define BOOT_ACPI_END	   UINT64_C(0x100000)
#define BOOT_RESET_VECTOR  UINT64_C(0xffff0)
#define BOOT_HIGH	   UINT64_C(0x100000)

#define BOOT_E820_RAM	   1u
#define BOOT_E820_RESERVED 2u
#define BOOT_MAP_MAX	   8

struct boot_map {
	uint64_t base, len;
	uint32_t type;
};
/* The memory map; returns the number of entries. */
unsigned boot_memory_map(struct machine *m, struct boot_map map[BOOT_MAP_MAX]);

/* Reads [offset, offset+len) of fd into guest memory at gpa; the rest of guest memory is untouched. Errors
 * name `name`. */
int boot_read(struct machine *m, int fd, const char *name, uint64_t offset, uint64_t gpa, uint64_t len,
	      struct error *err);
/* Puts the initrd as high as it may be below `limit` and above `floor`; *size 0 if there is none. */
int boot_initrd(struct machine *m, uint64_t floor, uint64_t limit, uint64_t *gpa, uint64_t *size,
		struct error *err);
/* Registers of vCPU 0. */
int boot_set_regs(struct machine *m, const struct kvm_regs *regs, const struct kvm_sregs *sregs,
		  struct error *err);
int boot_get_sregs(struct machine *m, struct kvm_sregs *sregs, struct error *err);
/* A flat segment. */
struct kvm_segment boot_segment(uint16_t selector, uint8_t type, bool long_mode);

#endif
