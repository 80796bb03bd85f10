/* SPDX-License-Identifier: Apache-2.0 */
/* Hardware-reduced ACPI (ACPI 6.4): RSDP, XSDT, FADT, MADT, MCFG, DSDT. */
#include "vmm/acpi.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "vmm/aml.h"
#include "vmm/boot.h"
#include "vmm/power.h"

#define HEADER_BYTES 36u
#define FADT_BYTES   276u
#define LAPIC_BASE   0xfee00000u
#define IOAPIC_BASE  0xfec00000u

#define FADT_WBINVD	    (1u << 0)
#define FADT_POWER_BUTTON   (1u << 4) /* no fixed-feature button: a control method device */
#define FADT_SLEEP_BUTTON   (1u << 5)
#define FADT_RESET_REGISTER (1u << 10)
#define FADT_HW_REDUCED	    (1u << 20)
#define BOOT_NO_VGA	    (1u << 2)
#define BOOT_NO_ASPM	    (1u << 4)
#define BOOT_NO_CMOS_RTC    (1u << 5)

static uint8_t checksum(const uint8_t *p, size_t len)
{
	uint8_t sum = 0;
	for (size_t i = 0; i < len; i++)
		sum = (uint8_t)(sum + p[i]);
	return (uint8_t)-sum;
}

static void finish(uint8_t *t, const char *signature, uint8_t revision, size_t len)
{
	memcpy(t, signature, 4);
	put_le32(t + 4, (uint32_t)len);
	t[8] = revision;
	t[9] = 0;
	memcpy(t + 10, "SNMIGR", 6);
	memcpy(t + 16, "SNMIGRAT", 8);
	put_le32(t + 24, 1);
	memcpy(t + 28, "SNMG", 4);
	put_le32(t + 32, 1);
	t[9] = checksum(t, len);
}

static void io_register(uint8_t *gas, uint16_t port)
{
	gas[0] = 1; /* system I/O */
	gas[1] = 8;
	gas[3] = 1; /* byte access */
	put_le64(gas + 4, port);
}

static size_t build_fadt(uint8_t *t, uint64_t dsdt)
{
	memset(t, 0, FADT_BYTES);
	put_le32(t + 40, (uint32_t)dsdt);
	put_le16(t + 109, BOOT_NO_VGA | BOOT_NO_ASPM | BOOT_NO_CMOS_RTC);
	put_le32(t + 112,
		 FADT_WBINVD | FADT_POWER_BUTTON | FADT_SLEEP_BUTTON | FADT_RESET_REGISTER | FADT_HW_REDUCED);
	io_register(t + 116, POWER_RESET_PORT);
	t[128] = POWER_RESET_VALUE;
	t[131] = 4; /* minor version */
	put_le64(t + 140, dsdt);
	io_register(t + 244, POWER_SLEEP_CONTROL);
	io_register(t + 256, POWER_SLEEP_STATUS);
	finish(t, "FACP", 6, FADT_BYTES);
	return FADT_BYTES;
}

static size_t build_madt(uint8_t *t, unsigned ncpus)
{
	size_t n = 44;
	memset(t, 0, n);
	put_le32(t + 36, LAPIC_BASE);
	put_le32(t + 40, 1); /* there are 8259s, to be masked */
	for (unsigned i = 0; i < ncpus; i++, n += 8) {
		uint8_t e[8] = {0, 8, (uint8_t)i, (uint8_t)i, 1};
		memcpy(t + n, e, 8);
	}
	uint8_t ioapic[12] = {1, 12, 0};
	put_le32(ioapic + 4, IOAPIC_BASE);
	memcpy(t + n, ioapic, 12);
	n += 12;
	uint8_t timer[10] = {2, 10, 0, 0, 2}; /* ISA 0, the PIT, comes in at pin 2 */
	memcpy(t + n, timer, 10);
	n += 10;
	uint8_t nmi[6] = {4, 6, 0xff, 0, 0, 1};
	memcpy(t + n, nmi, 6);
	n += 6;
	finish(t, "APIC", 5, n);
	return n;
}

static size_t build_mcfg(uint8_t *t)
{
	memset(t, 0, 60);
	put_le64(t + 44, PCI_ECAM_BASE);
	finish(t, "MCFG", 1, 60);
	return 60;
}

static void dsdt_body(struct aml *a)
{
	aml_mark sb = aml_scope(a, "\\_SB_");

	aml_mark pci = aml_device(a, "PCI0");
	aml_name(a, "_HID");
	aml_eisa_id(a, "PNP0A08");
	aml_name(a, "_CID");
	aml_eisa_id(a, "PNP0A03");
	aml_name(a, "_SEG");
	aml_integer(a, 0);
	aml_name(a, "_BBN");
	aml_integer(a, 0);
	aml_name(a, "_UID");
	aml_integer(a, 0);
	aml_name(a, "_CCA");
	aml_integer(a, 1);
	aml_name(a, "_CRS");
	aml_mark crs = aml_resources(a);
	aml_bus_range(a, 0, 0);
	aml_io(a, 0xcf8, 8);
	aml_io_window(a, 0, 0xcf7);
	aml_io_window(a, 0xd00, 0xffff);
	aml_memory_window(a, (uint32_t)PCI_MMIO_BASE, (uint32_t)PCI_MMIO_END - 1);
	aml_resources_end(a, crs);
	aml_end(a, pci);

	aml_mark com = aml_device(a, "COM1");
	aml_name(a, "_HID");
	aml_eisa_id(a, "PNP0501");
	aml_name(a, "_UID");
	aml_integer(a, 0);
	aml_name(a, "_CRS");
	crs = aml_resources(a);
	aml_io(a, 0x3f8, 8);
	aml_irq(a, 4);
	aml_resources_end(a, crs);
	aml_end(a, com);

	aml_mark button = aml_device(a, "PWRB");
	aml_name(a, "_HID");
	aml_eisa_id(a, "PNP0C0C");
	aml_name(a, "_UID");
	aml_integer(a, 0);
	aml_end(a, button);

	aml_mark ged = aml_device(a, "GED_");
	aml_name(a, "_HID");
	aml_string(a, "ACPI0013");
	aml_name(a, "_UID");
	aml_integer(a, 0);
	aml_name(a, "_CRS");
	crs = aml_resources(a);
	aml_interrupt_edge(a, POWER_BUTTON_GSI);
	aml_resources_end(a, crs);
	aml_mark evt = aml_method(a, "_EVT", 1);
	aml_mark is = aml_if_arg0_is(a, POWER_BUTTON_GSI);
	aml_notify(a, "\\_SB_.PWRB", 0x80);
	aml_end(a, is);
	aml_end(a, evt);
	aml_end(a, ged);

	aml_end(a, sb);

	aml_name(a, "\\_S5_");
	aml_mark s5 = aml_package(a, 4);
	aml_integer(a, POWER_SLEEP_TYPE_S5);
	aml_integer(a, POWER_SLEEP_TYPE_S5);
	aml_integer(a, 0);
	aml_integer(a, 0);
	aml_end(a, s5);
}

int acpi_build_dsdt(uint8_t *out, size_t cap, struct error *err)
{
	CLEANUP_FREE struct aml *a = calloc(1, sizeof *a);
	if (!a)
		return error_errno(err, ENOMEM, "ACPI tables");
	dsdt_body(a);
	if (a->overflow || HEADER_BYTES + a->len > cap)
		return error_set(err, ENOSPC, "ACPI tables: the DSDT does not fit");
	memcpy(out + HEADER_BYTES, a->bytes, a->len);
	finish(out, "DSDT", 6, HEADER_BYTES + a->len);
	return (int)(HEADER_BYTES + a->len);
}

int acpi_build(unsigned ncpus, uint64_t base, uint8_t *out, size_t cap, struct error *err)
{
	/* RSDP, XSDT, FADT, MADT, MCFG at their greatest, then the DSDT. */
	if (cap < 4096)
		return error_set(err, ENOSPC, "ACPI tables: %zu bytes are too few", cap);
	memset(out, 0, cap);
	size_t at = 64, xsdt = at;
	at += 64;
	uint64_t tables[3];
	size_t dsdt_at = 2048;
	int dsdt = acpi_build_dsdt(out + dsdt_at, cap - dsdt_at, err);
	if (dsdt < 0)
		return dsdt;
	tables[0] = base + at;
	at += (build_fadt(out + at, base + dsdt_at) + 15) & ~(size_t)15;
	tables[1] = base + at;
	at += (build_madt(out + at, ncpus) + 15) & ~(size_t)15;
	tables[2] = base + at;
	at += build_mcfg(out + at);
	if (at > dsdt_at)
		return error_set(err, ENOSPC, "ACPI tables: %u vCPUs do not fit", ncpus);
	for (unsigned i = 0; i < 3; i++)
		put_le64(out + xsdt + HEADER_BYTES + 8 * i, tables[i]);
	finish(out + xsdt, "XSDT", 1, HEADER_BYTES + sizeof tables);
	memcpy(out, "RSD PTR SNMIGR", 8);
	memcpy(out + 9, "SNMIGR", 6);
	out[15] = 2;
	put_le32(out + 20, 36);
	put_le64(out + 24, base + xsdt);
	out[8] = checksum(out, 20);
	out[32] = checksum(out, 36);
	return (int)(dsdt_at + (size_t)dsdt);
}

int acpi_write(struct machine *m, uint64_t *rsdp, struct error *err)
{
	uint8_t tables[16384];
	int len = acpi_build(m->ncpus, BOOT_ACPI, tables, sizeof tables, err);
	if (len < 0)
		return len;
	*rsdp = BOOT_ACPI;
	return guest_memory_write(&m->mem, BOOT_ACPI, tables, (size_t)len)
		       ? error_set(err, EFBIG, "ACPI tables: the guest has too little memory")
		       : 0;
}
