/* SPDX-License-Identifier: Apache-2.0 */
/* Sets of features that are not a host's: the levels of the x86-64 ABI, and baseline files. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "host/cpu.h"
#include "host/ini.h"

/*
 * The levels as the x86-64 psABI has them, register by register, and beside them what any 64-bit guest is
 * used to and every host has. No more: AES, PCID or the bits about side channels are in no level, so that a
 * level is the same wherever it is.
 */
#define SYSTEM_1D                                                                                            \
	"fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 " \
	"ss"
#define SYSTEM_81D                                                                                           \
	"fpu vme de pse tsc msr pae mce cx8 apic syscall mtrr pge mca cmov pat pse36 nx mmx fxsr lm"
#define SYSTEM_KVM "kvm_clock kvm_nopiodelay kvm_clock2 kvm_steal_time kvm_pv_eoi kvm_clock_stable"

static const struct level_line {
	const char *key, *v2, *v3; /* v3: beyond v2 */
	bool needed;		   /* of the host; else it may be there */
} level_lines[] = {
	{"cpuid.1.0.ecx", "sse3 ssse3 cx16 sse4_1 sse4_2 popcnt", "fma movbe xsave avx f16c", true},
	{"cpuid.1.0.ecx", "x2apic tsc_deadline hypervisor", "", false},
	{"cpuid.1.0.edx", SYSTEM_1D, "", false},
	{"cpuid.6.0.eax", "arat", "", false},
	{"cpuid.7.0.ebx", "", "bmi1 avx2 bmi2", true},
	{"cpuid.d.0.eax", "", "xcr0.x87 xcr0.sse xcr0.avx", true},
	{"cpuid.80000001.0.ecx", "lahf_lm", "abm", true},
	{"cpuid.80000001.0.edx", SYSTEM_81D, "", false},
	{"cpuid.40000001.0.eax", SYSTEM_KVM, "", false},
};

int cpu_level(const char *name, struct cpu_features *allowed, struct cpu_features *needed)
{
	bool v3 = !strcmp(name, "x86-64-v3");
	*allowed = *needed = (struct cpu_features){0};
	if (!v3 && strcmp(name, "x86-64-v2"))
		return -EINVAL;
	for (size_t i = 0; i < ARRAY_SIZE(level_lines); i++) {
		const struct level_line *l = &level_lines[i];
		struct cpu_features *sets[] = {allowed, l->needed ? needed : allowed};
		for (size_t k = 0; k < ARRAY_SIZE(sets); k++) {
			cpu_baseline_entry(l->key, l->v2, sets[k], NULL);
			if (v3)
				cpu_baseline_entry(l->key, l->v3, sets[k], NULL);
		}
	}
	return 0;
}

/* ---- files ---- */

#define BASELINE_VERSION 1

struct parser {
	struct cpu_features *f;
	unsigned version;
	bool vendor, features;
};

static int on_baseline(struct parser *p, const struct ini_entry *e, struct error *err)
{
	if (!strcmp(e->key, "version")) {
		int rc = ini_get_uint(e, 1, 1000000, &p->version, err);
		if (!rc && p->version > BASELINE_VERSION)
			rc = error_set(err, EPROTONOSUPPORT, "version %u: a newer program wrote it",
				       p->version);
		return rc;
	}
	if (!strcmp(e->key, "vendor")) {
		p->vendor = true;
		return cpu_vendor_set(e->value, p->f, err);
	}
	return error_set(err, EINVAL, "unknown key '%.64s' in [baseline]", e->key);
}

static int on_entry(void *opaque, const struct ini_entry *e, struct error *err)
{
	struct parser *p = opaque;
	bool features = !strcmp(e->section, "features");
	if ((!features && strcmp(e->section, "baseline")) || *e->label)
		return error_set(err, EINVAL, "not a section of a baseline: [%.64s]", e->section);
	p->features |= features;
	if (!e->key)
		return 0;
	return features ? cpu_baseline_entry(e->key, e->value, p->f, err) : on_baseline(p, e, err);
}

int cpu_baseline_parse(const char *text, size_t len, const char *origin, struct cpu_features *out,
		       struct error *err)
{
	struct parser p = {.f = out};
	*out = (struct cpu_features){0};
	int rc = ini_parse_text(text, len, origin, on_entry, &p, err);
	if (!rc && (!p.version || !p.vendor || !p.features))
		rc = error_set(err, EINVAL,
			       "%s: not a baseline: [baseline] version and vendor, and [features] are needed",
			       origin);
	return rc;
}
