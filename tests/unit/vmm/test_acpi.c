/* SPDX-License-Identifier: Apache-2.0 */
/* The ACPI tables: their sums and pointers here, their AML by iasl, which is the judge of it. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/bytes.h"
#include "tests/suite.h"
#include "vmm/acpi.h"
#include "vmm/aml.h"

#define BASE 0xe0000u

static uint8_t tables[16384];

static unsigned sum(const uint8_t *p, size_t len)
{
	uint8_t s = 0;
	while (len--)
		s = (uint8_t)(s + *p++);
	return s;
}

/* The table at guest address `at`, its sum checked. */
static const uint8_t *table(uint64_t at, const char *signature, int total)
{
	ck_assert_uint_ge(at, BASE);
	const uint8_t *t = tables + (at - BASE);
	uint32_t len = get_le32(t + 4);
	ck_assert_mem_eq(t, signature, 4);
	ck_assert_uint_le(at - BASE + len, (unsigned)total);
	ck_assert_uint_eq(sum(t, len), 0);
	return t;
}

static void check_tables(unsigned ncpus)
{
	int total = acpi_build(ncpus, BASE, tables, sizeof tables, NULL);
	ck_assert_int_gt(total, 0);
	ck_assert_mem_eq(tables, "RSD PTR ", 8);
	ck_assert_uint_eq(sum(tables, 20), 0);
	ck_assert_uint_eq(sum(tables, 36), 0);
	const uint8_t *xsdt = table(get_le64(tables + 24), "XSDT", total);
	ck_assert_uint_eq(get_le32(xsdt + 4), 36 + 3 * 8);
	const uint8_t *fadt = table(get_le64(xsdt + 36), "FACP", total);
	ck_assert_uint_eq(get_le32(fadt + 112) >> 20 & 1, 1); /* hardware-reduced */
	ck_assert_uint_eq(get_le16(fadt + 109) >> 5 & 1, 1);  /* no CMOS clock */
	ck_assert_uint_eq(get_le64(fadt + 248), 0x600);
	table(get_le64(fadt + 140), "DSDT", total);
	const uint8_t *madt = table(get_le64(xsdt + 44), "APIC", total);
	unsigned cpus = 0, ioapics = 0;
	for (uint32_t at = 44; at < get_le32(madt + 4); at += madt[at + 1]) {
		ck_assert_uint_ge(madt[at + 1], 6);
		if (madt[at] == 0)
			ck_assert_uint_eq(madt[at + 3], cpus++);
		ioapics += madt[at] == 1;
	}
	ck_assert_uint_eq(cpus, ncpus);
	ck_assert_uint_eq(ioapics, 1);
	const uint8_t *mcfg = table(get_le64(xsdt + 52), "MCFG", total);
	ck_assert_uint_eq(get_le64(mcfg + 44), 0xe0000000);
}

START_TEST(tables_point_at_one_another)
{
	check_tables(1);
	check_tables(2);
	check_tables(64);
}
END_TEST

START_TEST(too_little_room_is_an_error)
{
	uint8_t small[5000];
	ck_assert_int_lt(acpi_build(1, BASE, small, 100, NULL), 0);
	ck_assert_int_lt(acpi_build_dsdt(small, 100, NULL), 0);
	ck_assert_int_gt(acpi_build_dsdt(small, sizeof small, NULL), 0);
}
END_TEST

START_TEST(encoding_follows_the_specification)
{
	static struct aml a;
	memset(&a, 0, sizeof a);
	aml_integer(&a, 0);
	aml_integer(&a, 1);
	aml_integer(&a, 2);
	aml_integer(&a, 0x1234);
	aml_integer(&a, 0x12345678);
	ck_assert_mem_eq(a.bytes, "\x00\x01\x0a\x02\x0b\x34\x12\x0c\x78\x56\x34\x12", 12);
	memset(&a, 0, sizeof a);
	aml_eisa_id(&a, "PNP0A03"); /* ACPI 6.4, 19.6.36 */
	ck_assert_mem_eq(a.bytes, "\x0c\x41\xd0\x0a\x03", 5);
	memset(&a, 0, sizeof a);
	aml_path(&a, "\\_SB_.PWRB");
	ck_assert_mem_eq(a.bytes, "\\\x2e_SB_PWRB", 10);
	ck_assert_uint_eq(a.len, 10);
	memset(&a, 0, sizeof a);
	for (int i = 0; i < AML_BYTES_MAX + 1; i++)
		aml_byte(&a, 0);
	ck_assert(a.overflow);
	ck_assert_uint_eq(a.len, AML_BYTES_MAX);
}
END_TEST

static int run(const char *dir, const char *command)
{
	char line[256];
	snprintf(line, sizeof line, "cd %s && { %s; } >out 2>&1", dir, command);
	return system(line);
}

static bool says(const char *dir, const char *file, const char *what)
{
	char path[96], line[256];
	bool found = false;
	snprintf(path, sizeof path, "%s/%s", dir, file);
	FILE *f = fopen(path, "r");
	ck_assert_ptr_nonnull(f);
	while (!found && fgets(line, sizeof line, f))
		found = strstr(line, what) != NULL;
	fclose(f);
	return found;
}

START_TEST(iasl_reads_the_dsdt)
{
	char dir[] = "/tmp/snm-test-acpi-XXXXXX", path[64], cleanup[64];
	ck_assert_ptr_nonnull(mkdtemp(dir));
	snprintf(path, sizeof path, "%s/dsdt.aml", dir);
	snprintf(cleanup, sizeof cleanup, "rm -rf %s", dir);
	int len = acpi_build_dsdt(tables, sizeof tables, NULL);
	FILE *f = fopen(path, "w");
	ck_assert_uint_eq(fwrite(tables, 1, (size_t)len, f), (size_t)len);
	fclose(f);
	/* Taken apart, put together again by the compiler that checks names and objects. */
	ck_assert_int_eq(run(dir, "iasl -d dsdt.aml && iasl -p again dsdt.dsl"), 0);
	ck_assert(says(dir, "out", "0 Errors, 0 Warnings"));
	ck_assert(says(dir, "dsdt.dsl", "Device (PCI0)"));
	ck_assert(says(dir, "dsdt.dsl", "Notify (\\_SB.PWRB, 0x80)"));
	ck_assert(says(dir, "dsdt.dsl", "0xC0000000,         // Range Minimum"));
	ck_assert(says(dir, "dsdt.dsl", "Name (\\_S5, Package (0x04)"));
	ck_assert_int_eq(system(cleanup), 0);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("acpi");
	TCase *t = tcase_create("acpi");
	tcase_add_test(t, tables_point_at_one_another);
	tcase_add_test(t, too_little_room_is_an_error);
	tcase_add_test(t, encoding_follows_the_specification);
	if (system("command -v iasl >/dev/null 2>&1") == 0)
		tcase_add_test(t, iasl_reads_the_dsdt);
	else
		printf("skipped: iasl_reads_the_dsdt: no iasl (package acpica-tools)\n");
	suite_add_tcase(s, t);
	return suite_run(s);
}
