/* SPDX-License-Identifier: Apache-2.0 */
/* interface: CPUID tables and the features in them, pure functions */
#ifndef HOST_CPU_H
#define HOST_CPU_H

#include <jansson.h>
#include <linux/kvm.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

#define CPU_TABLE_MAX	 256 /* entries */
#define CPU_WORDS	 15  /* registers whose bits are features */
#define CPU_VENDOR_BYTES 13
#define CPU_MODEL_BYTES	 49
#define CPU_NAMES_BYTES	 320

/* ---- a table (host/cpu_table.c) ---- */

/* NULL: there is none. */
const struct kvm_cpuid_entry2 *cpu_entry(const struct kvm_cpuid2 *t, uint32_t function, uint32_t index);
void cpu_vendor(const struct kvm_cpuid2 *t, char out[CPU_VENDOR_BYTES]);
void cpu_model(const struct kvm_cpuid2 *t, char out[CPU_MODEL_BYTES]);
/* {"vendor", "model", "tsc_khz", "cpuid": [[function, index, flags, eax, ebx, ecx, edx]...]}; new reference
 * or NULL. */
json_t *cpu_to_json(const struct kvm_cpuid2 *t, uint32_t tsc_khz, struct error *err);
/* Hostile input: -EPROTO. *out has room for CPU_TABLE_MAX entries; free(3) it. */
int cpu_from_json(const json_t *cpu, struct kvm_cpuid2 **out, uint32_t *tsc_khz, struct error *err);

/* ---- features (host/cpu_features.c, cpu_baseline.c) ---- */

/* A set of features, perhaps bound to a vendor ("": any). */
struct cpu_features {
	char vendor[CPU_VENDOR_BYTES];
	uint32_t words[CPU_WORDS];
};

void cpu_features_of(const struct kvm_cpuid2 *t, struct cpu_features *out);
/* *a keeps what *b has as well. */
void cpu_features_and(struct cpu_features *a, const struct cpu_features *b);
/* How many of `wanted` `have` lacks; `names` (may be NULL) gets their names, as many as fit, "a, b, c". */
unsigned cpu_features_lacking(const struct cpu_features *wanted, const struct cpu_features *have, char *names,
			      size_t size);
/* Takes every other feature out of the table, and what belongs to it (XSAVE areas). */
void cpu_features_apply(struct kvm_cpuid2 *t, const struct cpu_features *f);

/* Whether a guest with its table could run on a host with that one: 0, or -ENOTSUP with the sentence. */
int cpu_judge(const struct kvm_cpuid2 *guest, uint32_t guest_khz, const struct kvm_cpuid2 *host,
	      uint32_t host_khz, bool host_scales_tsc, struct error *err);

/* "x86-64-v2", "x86-64-v3": what a guest may see (*allowed) and what its host must have (*needed). -EINVAL
 * for another name. */
int cpu_level(const char *name, struct cpu_features *allowed, struct cpu_features *needed);

/*
 * A baseline file (snmigrate(1), BASELINE FILES): INI, [baseline] with version and vendor, [features] with a
 * line a register: "cpuid.7.0.ebx = fsgsbase bmi1 bit30". Bits without a name are written by their number.
 */
#define CPU_BASELINE_TEXT_MAX 65536
int cpu_baseline_parse(const char *text, size_t len, const char *origin, struct cpu_features *out,
		       struct error *err);
/* What a CPU's vendor string can be; -EINVAL with a sentence. */
int cpu_vendor_set(const char *vendor, struct cpu_features *f, struct error *err);
/* One entry of [features], as it stands there and in [cpu] of a definition. -EINVAL with a sentence. */
int cpu_baseline_entry(const char *key, const char *value, struct cpu_features *f, struct error *err);
/* The lines of [features]; free(3) it, NULL without memory. */
char *cpu_baseline_lines(const struct cpu_features *f);

#endif
