/* SPDX-License-Identifier: Apache-2.0 */
/* A CPUID table as JSON and back. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "host/cpu.h"

static void cleanup_json(json_t **j)
{
	json_decref(*j);
}
#define CLEANUP_JSON CLEANUP(cleanup_json)

const struct kvm_cpuid_entry2 *cpu_entry(const struct kvm_cpuid2 *t, uint32_t function, uint32_t index)
{
	for (uint32_t i = 0; i < t->nent; i++)
		if (t->entries[i].function == function && t->entries[i].index == index)
			return &t->entries[i];
	return NULL;
}

void cpu_vendor(const struct kvm_cpuid2 *t, char out[13])
{
	const struct kvm_cpuid_entry2 *e = cpu_entry(t, 0, 0);
	uint32_t v[3] = {e ? e->ebx : 0, e ? e->edx : 0, e ? e->ecx : 0};
	memcpy(out, v, 12);
	out[12] = 0;
	for (unsigned i = 0; i < 12; i++)
		if (out[i] < 0x20 || out[i] > 0x7e)
			out[i] = '?';
}

void cpu_model(const struct kvm_cpuid2 *t, char out[49])
{
	memset(out, 0, 49);
	for (uint32_t i = 0; i < 3; i++) {
		const struct kvm_cpuid_entry2 *e = cpu_entry(t, 0x80000002 + i, 0);
		uint32_t v[4] = {e ? e->eax : 0, e ? e->ebx : 0, e ? e->ecx : 0, e ? e->edx : 0};
		memcpy(out + 16 * i, v, 16);
	}
	for (unsigned i = 0; i < 48 && out[i]; i++)
		if (out[i] < 0x20 || out[i] > 0x7e)
			out[i] = '?';
}

json_t *cpu_to_json(const struct kvm_cpuid2 *t, uint32_t tsc_khz, struct error *err)
{
	char vendor[13], model[49];
	cpu_vendor(t, vendor);
	cpu_model(t, model);
	CLEANUP_JSON json_t *table = json_array();
	for (uint32_t i = 0; i < t->nent; i++) {
		const struct kvm_cpuid_entry2 *e = &t->entries[i];
		json_array_append_new(table, json_pack("[I,I,I,I,I,I,I]", (json_int_t)e->function,
						       (json_int_t)e->index, (json_int_t)e->flags,
						       (json_int_t)e->eax, (json_int_t)e->ebx,
						       (json_int_t)e->ecx, (json_int_t)e->edx));
	}
	if (json_array_size(table) != t->nent) {
		error_errno(err, ENOMEM, "CPU description");
		return NULL;
	}
	json_t *j = json_pack("{s:s,s:s,s:I,s:O}", "vendor", vendor, "model", model, "tsc_khz",
			      (json_int_t)tsc_khz, "cpuid", table);
	if (!j)
		error_errno(err, ENOMEM, "CPU description");
	return j;
}

static int get_u32(const json_t *v, uint32_t *out)
{
	if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > UINT32_MAX)
		return -EPROTO;
	*out = (uint32_t)json_integer_value(v);
	return 0;
}

int cpu_from_json(const json_t *cpu, struct kvm_cpuid2 **out, uint32_t *tsc_khz, struct error *err)
{
	const json_t *table = json_object_get(cpu, "cpuid");
	size_t n = json_array_size(table);
	if (!json_is_array(table) || n == 0 || n > CPU_TABLE_MAX)
		return error_set(err, EPROTO, "CPU description: bad CPUID table");
	if (get_u32(json_object_get(cpu, "tsc_khz"), tsc_khz) || *tsc_khz > 100000000)
		return error_set(err, EPROTO, "CPU description: bad TSC rate");
	CLEANUP_FREE struct kvm_cpuid2 *t = calloc(1, sizeof *t + CPU_TABLE_MAX * sizeof t->entries[0]);
	if (!t)
		return error_errno(err, ENOMEM, "CPU description");
	for (size_t i = 0; i < n; i++) {
		const json_t *row = json_array_get(table, i);
		uint32_t v[7];
		bool ok = json_array_size(row) == 7;
		for (size_t k = 0; k < 7 && ok; k++)
			ok = !get_u32(json_array_get(row, k), &v[k]);
		if (!ok)
			return error_set(err, EPROTO, "CPU description: bad CPUID entry %zu", i);
		t->entries[i] = (struct kvm_cpuid_entry2){
			.function = v[0],
			.index = v[1],
			.flags = v[2] & KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
			.eax = v[3],
			.ebx = v[4],
			.ecx = v[5],
			.edx = v[6],
		};
	}
	t->nent = (uint32_t)n;
	*out = steal_ptr(t);
	return 0;
}
