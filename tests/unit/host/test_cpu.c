/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "host/cpu.h"
#include "host/vmdef.h"
#include "tests/suite.h"

#define XSAVE	(1u << 26)
#define OSXSAVE (1u << 27)
#define AVX	(1u << 28)
#define HTT	(1u << 28) /* in leaf 1's edx */
#define AVX2	(1u << 5)

static struct error err;

static void setup(void)
{
	err = ERROR_INIT;
}

static struct kvm_cpuid2 *table(void)
{
	static const struct kvm_cpuid_entry2 entries[] = {
		{.function = 0, .ebx = 0x756e6547, .edx = 0x49656e69, .ecx = 0x6c65746e},
		{.function = 1, .ecx = XSAVE | OSXSAVE | AVX | 1, .edx = HTT | 1},
		{.function = 7, .ebx = AVX2 | 1u << 16, .ecx = 1u << 15},
		{.function = 0xd, .index = 0, .eax = 0xe7, .ebx = 0x340, .ecx = 0xa80},
		{.function = 0xd, .index = 1, .eax = 0xf},
		{.function = 0xd, .index = 2, .eax = 0x100, .ebx = 0x240},
		{.function = 0xd, .index = 5, .eax = 0x40, .ebx = 0x440},
		{.function = 0xd, .index = 6, .eax = 0x200, .ebx = 0x480},
		{.function = 0xd, .index = 7, .eax = 0x400, .ebx = 0x680},
		{.function = 0xd, .index = 8, .eax = 0x80, .ecx = 1},
		{.function = 0x80000008, .eax = 0x3030, .ebx = 1},
	};
	struct kvm_cpuid2 *t = calloc(1, sizeof *t + CPU_TABLE_MAX * sizeof t->entries[0]);
	t->nent = ARRAY_SIZE(entries);
	memcpy(t->entries, entries, sizeof entries);
	return t;
}

START_TEST(as_text_and_back)
{
	CLEANUP_FREE struct kvm_cpuid2 *t = table();
	struct cpu_features f, again;
	cpu_features_of(t, &f);
	ck_assert_str_eq(f.vendor, "GenuineIntel");
	CLEANUP_FREE char *lines = cpu_baseline_lines(&f);
	ck_assert(strstr(lines, "cpuid.1.0.ecx = sse3 xsave avx\n")); /* OSXSAVE is the guest's to set */
	ck_assert(strstr(lines, "cpuid.1.0.edx = fpu\n"));	      /* nor is HTT a feature */
	ck_assert(strstr(lines, "cpuid.7.0.ecx = bit15\n"));	      /* one without a name */
	ck_assert(strstr(lines, "cpuid.d.0.eax = xcr0.x87 xcr0.sse xcr0.avx"));
	char text[4096];
	snprintf(text, sizeof text, "# x\n[baseline]\nversion = 1\nvendor = %s\n[features]\n%s", f.vendor,
		 lines);
	ck_assert_msg(cpu_baseline_parse(text, strlen(text), "b", &again, &err) == 0, "%s", err.message);
	ck_assert_str_eq(again.vendor, f.vendor);
	ck_assert(!memcmp(again.words, f.words, sizeof f.words));
}
END_TEST

START_TEST(what_is_lacking_has_a_name)
{
	CLEANUP_FREE struct kvm_cpuid2 *t = table(), *u = table();
	struct cpu_features f, g;
	char names[CPU_NAMES_BYTES], few[12];
	cpu_features_of(t, &f);
	u->entries[1].ecx &= ~(AVX | OSXSAVE);
	u->entries[2].ebx = 0;
	u->entries[2].ecx = 0;
	u->entries[1].edx = 1; /* without HTT */
	cpu_features_of(u, &g);
	ck_assert_uint_eq(cpu_features_lacking(&f, &g, names, sizeof names), 4);
	ck_assert_str_eq(names, "avx, avx2, avx512f, cpuid 7.0 ecx bit 15");
	ck_assert_uint_eq(cpu_features_lacking(&f, &g, few, sizeof few), 4); /* no more than fit */
	ck_assert_str_eq(few, "avx, avx2");
	ck_assert_uint_eq(cpu_features_lacking(&g, &f, NULL, 0), 0);
	cpu_features_and(&f, &g);
	ck_assert(!memcmp(f.words, g.words, sizeof f.words));
}
END_TEST

START_TEST(applying_takes_out_what_belongs_to_it)
{
	CLEANUP_FREE struct kvm_cpuid2 *t = table();
	struct cpu_features f;
	cpu_features_of(t, &f);
	cpu_features_apply(t, &f); /* all of it: nothing changes but the sizes, which were right */
	ck_assert_uint_eq(t->nent, 11);
	ck_assert_uint_eq(cpu_entry(t, 0xd, 0)->ecx, 0xa80);
	/* no AVX-512: its areas go, the rest ends after AVX's */
	cpu_baseline_entry("cpuid.d.0.eax", "xcr0.x87 xcr0.sse xcr0.avx", (f.words[8] = 0, &f), &err);
	cpu_features_apply(t, &f);
	ck_assert_uint_eq(cpu_entry(t, 0xd, 0)->eax, 7);
	ck_assert_uint_eq(cpu_entry(t, 0xd, 0)->ecx, 0x340);
	ck_assert_ptr_null(cpu_entry(t, 0xd, 5));
	ck_assert_ptr_null(cpu_entry(t, 0xd, 7));
	ck_assert_ptr_nonnull(cpu_entry(t, 0xd, 2));
	ck_assert_ptr_nonnull(cpu_entry(t, 0xd, 8)); /* a supervisor's */
	/* no XSAVE at all */
	struct cpu_features none = {0};
	cpu_features_apply(t, &none);
	ck_assert_ptr_null(cpu_entry(t, 0xd, 0));
	ck_assert_uint_eq(cpu_entry(t, 1, 0)->ecx, OSXSAVE);
	ck_assert_uint_eq(cpu_entry(t, 1, 0)->edx, HTT);
	ck_assert_uint_eq(cpu_entry(t, 0x80000008, 0)->eax, 0x3030);
	ck_assert_uint_eq(cpu_entry(t, 0x80000008, 0)->ebx, 0);
}
END_TEST

START_TEST(levels)
{
	struct cpu_features v2, v3, need2, need3;
	ck_assert_int_eq(cpu_level("x86-64-v2", &v2, &need2), 0);
	ck_assert_int_eq(cpu_level("x86-64-v3", &v3, &need3), 0);
	ck_assert_int_eq(cpu_level("x86-64-v4", &v3, &need3), -EINVAL);
	ck_assert_int_eq(cpu_level("x86-64-v3", &v3, &need3), 0);
	char names[CPU_NAMES_BYTES];
	ck_assert_uint_eq(cpu_features_lacking(&v2, &v3, NULL, 0), 0);
	ck_assert_uint_eq(cpu_features_lacking(&need2, &v2, NULL, 0), 0);
	ck_assert_uint_eq(cpu_features_lacking(&v3, &v2, names, sizeof names), 12);
	ck_assert_str_eq(names,
			 "fma, movbe, xsave, avx, f16c, bmi1, avx2, bmi2, xcr0.x87, xcr0.sse, xcr0.avx, abm");
	ck_assert_uint_eq(cpu_features_lacking(&need2, &(struct cpu_features){0}, names, sizeof names), 7);
	ck_assert_str_eq(names, "sse3, ssse3, cx16, sse4_1, sse4_2, popcnt, lahf_lm");
	ck_assert_str_eq(v2.vendor, "");
}
END_TEST

#define HEAD "[baseline]\nversion = 1\nvendor = GenuineIntel\n[features]\n"
static const struct {
	const char *text, *why;
} bad[] = {
	{"", "not a baseline"},
	{"[features]\n", "not a baseline"},
	{"[baseline]\nversion = 1\nvendor = x\n", "not a baseline"},
	{"[baseline]\nversion = 2\nvendor = x\n[features]\n", "b:2: version 2: a newer program"},
	{"[baseline]\nversion = x\nvendor = x\n[features]\n", "b:2: version"},
	{"[baseline]\nversion = 1\nvendor = GenuineIntel12\n[features]\n", "b:3: vendor"},
	{"[baseline]\nmodel = 1\n", "unknown key 'model'"},
	{"[vm]\nname = x\n", "not a section of a baseline: [vm]"},
	{HEAD "cpuid.1.0.ebx = sse3\n", "b:5: unknown key 'cpuid.1.0.ebx'"},
	{HEAD "cpuid.1.0.ecx = sse3 avx2\n", "b:5: cpuid.1.0.ecx: 'avx2' is not one of its features"},
	{HEAD "cpuid.1.0.ecx = sse\n", "'sse' is not one"},
	{HEAD "cpuid.1.0.ecx = -\n", "'-' is not one"},
	{HEAD "cpuid.1.0.ecx = bit0\n", "'bit0' is not one"},
	{HEAD "cpuid.7.0.ecx = bit32\n", "'bit32' is not one"},
};

START_TEST(bad_files)
{
	struct cpu_features f;
	ck_assert_int_lt(cpu_baseline_parse(bad[_i].text, strlen(bad[_i].text), "b", &f, &err), 0);
	ck_assert_msg(strstr(err.message, bad[_i].why) != NULL, "%s", err.message);
}
END_TEST

/* ---- in a definition ---- */

static int parse(const char *cpu, const char *section, struct vm_definition *def)
{
	char text[1024];
	snprintf(text, sizeof text, "[vm]\nname = vm1\nmemory = 2M\nkernel = k\n%s%s%s\n%s",
		 *cpu ? "cpu = " : "", cpu, "", section);
	return vmdef_parse(text, strlen(text), "d", def, &err);
}

START_TEST(in_a_definition)
{
	CLEANUP_FREE struct vm_definition *d = malloc(sizeof *d), *e = malloc(sizeof *e);
	struct cpu_features allowed, needed;
	ck_assert_int_eq(parse("", "", d), 0);
	ck_assert(!vmdef_cpu_limits(d, &allowed, &needed));
	ck_assert_int_eq(parse("host", "", d), 0);
	ck_assert_str_eq(d->cpu, "");
	/* an older host reads what it knows */
	CLEANUP_FREE char *plain = vmdef_format(d);
	ck_assert_ptr_null(strstr(plain, "cpu ="));
	ck_assert_int_eq(parse("x86-64-v3", "", d), 0);
	ck_assert(vmdef_cpu_limits(d, &allowed, &needed));
	ck_assert_uint_gt(cpu_features_lacking(&allowed, &needed, NULL, 0), 0);
	ck_assert_msg(parse("baseline", "[cpu]\nvendor = GenuineIntel\ncpuid.1.0.ecx = sse3 avx\n", d) == 0,
		      "%s", err.message);
	CLEANUP_FREE char *text = vmdef_format(d);
	ck_assert_msg(vmdef_parse(text, strlen(text), "again", e, &err) == 0, "%s", err.message);
	ck_assert(!memcmp(d, e, sizeof *d));
	ck_assert(vmdef_cpu_limits(e, &allowed, &needed));
	ck_assert(!memcmp(&allowed, &needed, sizeof allowed));
	ck_assert_uint_eq(allowed.words[0], AVX | 1);
	ck_assert_int_eq(parse("baseline:/etc/b", "", d), 0);
	ck_assert_int_eq(vmdef_read_baseline(d, "/", &err), -ENOENT);
	strcpy(d->uuid, "0b8a4c1e-7d2f-4a36-9c55-3f1e2d4c5b6a");
	ck_assert_int_eq(vmdef_check_foreign(d, "", &err), -EPERM);
	ck_assert(strstr(err.message, "cpu = baseline:/etc/b"));
}
END_TEST

START_TEST(wrong_in_a_definition)
{
	CLEANUP_FREE struct vm_definition *d = malloc(sizeof *d);
	ck_assert_int_eq(parse("x86-64-v9", "", d), -EINVAL);
	ck_assert_int_eq(parse("baseline:", "", d), -EINVAL);
	ck_assert_int_eq(parse("baseline", "", d), -EINVAL);
	ck_assert_int_eq(parse("baseline", "[cpu]\ncpuid.1.0.ecx = sse3\n", d), -EINVAL);
	ck_assert_int_eq(parse("x86-64-v2", "[cpu]\nvendor = GenuineIntel\n", d), -EINVAL);
	ck_assert_int_eq(parse("", "[cpu]\nvendor = GenuineIntel\n", d), -EINVAL);
	ck_assert_int_eq(parse("baseline", "[cpu x]\nvendor = GenuineIntel\n", d), -EINVAL);
	ck_assert_int_eq(parse("baseline", "[cpu]\nvendor = GenuineIntel\ncpuid.1.0.ecx = nonsense\n", d),
			 -EINVAL);
}
END_TEST

START_TEST(a_file_is_read_into_it)
{
	CLEANUP_FREE struct vm_definition *d = malloc(sizeof *d);
	char path[] = "/tmp/test_cpu.XXXXXX";
	int fd = mkstemp(path);
	ck_assert_int_ge(fd, 0);
	ck_assert_int_gt(dprintf(fd, HEAD "cpuid.1.0.ecx = sse3\n"), 0);
	close(fd);
	ck_assert_int_eq(parse("host", "", d), 0);
	char value[64];
	snprintf(value, sizeof value, "baseline:%s", path + 5);
	ck_assert_int_eq(vmdef_set_cpu(d, value, &err), 0);
	ck_assert_msg(vmdef_read_baseline(d, "/tmp", &err) == 0, "%s", err.message);
	ck_assert_str_eq(d->cpu, "baseline");
	ck_assert_uint_eq(d->cpu_features.words[0], 1);
	unlink(path);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("cpu");
	TCase *tc = tcase_create("cpu");
	tcase_add_checked_fixture(tc, setup, NULL);
	tcase_add_test(tc, as_text_and_back);
	tcase_add_test(tc, what_is_lacking_has_a_name);
	tcase_add_test(tc, applying_takes_out_what_belongs_to_it);
	tcase_add_test(tc, levels);
	tcase_add_loop_test(tc, bad_files, 0, ARRAY_SIZE(bad));
	tcase_add_test(tc, in_a_definition);
	tcase_add_test(tc, wrong_in_a_definition);
	tcase_add_test(tc, a_file_is_read_into_it);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
