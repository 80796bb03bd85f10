/* SPDX-License-Identifier: Apache-2.0 */
/* A guest's CPU as JSON, for the other host, and the judgement whether it could run here. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "vmm/machine_internal.h"

#define TSC_TOLERANCE_PPM 250u /* KVM's own, module parameter tsc_tolerance_ppm */

static void cleanup_json(json_t **j)
{
	json_decref(*j);
}
#define CLEANUP_JSON CLEANUP(cleanup_json)

static const struct kvm_cpuid_entry2 *find(const struct kvm_cpuid2 *t, uint32_t function, uint32_t index)
{
	for (uint32_t i = 0; i < t->nent; i++)
		if (t->entries[i].function == function && t->entries[i].index == index)
			return &t->entries[i];
	return NULL;
}

static void vendor_of(const struct kvm_cpuid2 *t, char out[13])
{
	const struct kvm_cpuid_entry2 *e = find(t, 0, 0);
	uint32_t v[3] = {e ? e->ebx : 0, e ? e->edx : 0, e ? e->ecx : 0};
	memcpy(out, v, 12);
	out[12] = 0;
	for (unsigned i = 0; i < 12; i++)
		if (out[i] < 0x20 || out[i] > 0x7e)
			out[i] = '?';
}

static void model_of(const struct kvm_cpuid2 *t, char out[49])
{
	memset(out, 0, 49);
	for (uint32_t i = 0; i < 3; i++) {
		const struct kvm_cpuid_entry2 *e = find(t, 0x80000002 + i, 0);
		uint32_t v[4] = {e ? e->eax : 0, e ? e->ebx : 0, e ? e->ecx : 0, e ? e->edx : 0};
		memcpy(out + 16 * i, v, 16);
	}
	for (unsigned i = 0; i < 48 && out[i]; i++)
		if (out[i] < 0x20 || out[i] > 0x7e)
			out[i] = '?';
}

static json_t *describe(const struct kvm_cpuid2 *t, uint32_t tsc_khz, struct error *err)
{
	char vendor[13], model[49];
	vendor_of(t, vendor);
	model_of(t, model);
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

json_t *machine_cpu_describe(struct machine *m, struct error *err)
{
	return describe(m->cpuid, m->guest_tsc_khz, err);
}

struct host_cpu {
	struct kvm_cpuid2 *table;
	uint32_t tsc_khz;
	bool tsc_control;
};

/* The TSC rate is only to be had from a vCPU. */
static int host_cpu_get(struct host_cpu *h, struct error *err)
{
	CLEANUP_FD int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		return error_errno(err, errno, "/dev/kvm");
	CLEANUP_FD int vm = kvm_ioctl(kvm, KVM_CREATE_VM, NULL);
	if (vm < 0)
		return error_errno(err, vm, "KVM_CREATE_VM");
	CLEANUP_FD int vcpu = kvm_ioctl(vm, KVM_CREATE_VCPU, NULL);
	if (vcpu < 0)
		return error_errno(err, vcpu, "KVM_CREATE_VCPU");
	int khz = kvm_ioctl(vcpu, KVM_GET_TSC_KHZ, NULL);
	h->tsc_khz = khz > 0 ? (uint32_t)khz : 0;
	h->tsc_control = ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_TSC_CONTROL) > 0;
	return cpuid_host_table(kvm, &h->table, err);
}

json_t *machine_cpu_describe_host(struct error *err)
{
	struct host_cpu h = {0};
	json_t *j = host_cpu_get(&h, err) ? NULL : describe(h.table, h.tsc_khz, err);
	free(h.table);
	return j;
}

static int get_u32(const json_t *v, uint32_t *out)
{
	if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > UINT32_MAX)
		return -EPROTO;
	*out = (uint32_t)json_integer_value(v);
	return 0;
}

int cpuid_from_json(const json_t *cpu, struct kvm_cpuid2 **out, uint32_t *tsc_khz, struct error *err)
{
	const json_t *table = json_object_get(cpu, "cpuid");
	size_t n = json_array_size(table);
	if (!json_is_array(table) || n == 0 || n > MACHINE_CPUID_MAX)
		return error_set(err, EPROTO, "CPU description: bad CPUID table");
	if (get_u32(json_object_get(cpu, "tsc_khz"), tsc_khz) || *tsc_khz > 100000000)
		return error_set(err, EPROTO, "CPU description: bad TSC rate");
	CLEANUP_FREE struct kvm_cpuid2 *t = calloc(1, sizeof *t + MACHINE_CPUID_MAX * sizeof t->entries[0]);
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

/* ---- features ---- */

enum reg { EAX, EBX, ECX, EDX };

/* Names of the bits of a register, least significant first, as Linux calls them; "" has no name, "-" is not a
 * feature that a guest could miss (it depends on the topology or is filled in per vCPU). */
static const struct feature_word {
	uint32_t function, index;
	enum reg reg;
	const char *names; /* 32 words */
} feature_words[] = {
	{1, 0, ECX,
	 "sse3 pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm ? pcid dca "
	 "sse4_1 sse4_2 "
	 "x2apic movbe popcnt tsc_deadline aes xsave - avx f16c rdrand hypervisor"},
	{1, 0, EDX,
	 "fpu vme de pse tsc msr pae mce cx8 apic ? sep mtrr pge mca cmov pat pse36 pn clflush ? dts acpi "
	 "mmx fxsr sse sse2 "
	 "ss - tm ia64 pbe"},
	{6, 0, EAX, "dtherm ida arat ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ?"},
	{7, 0, EBX,
	 "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx "
	 "rdt_a avx512f "
	 "avx512dq rdseed adx smap avx512ifma pcommit clflushopt clwb intel_pt avx512pf avx512er avx512cd "
	 "sha_ni avx512bw "
	 "avx512vl"},
	{7, 0, ECX,
	 "prefetchwt1 avx512vbmi umip pku - waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni "
	 "avx512_bitalg tme "
	 "avx512_vpopcntdq ? la57 ? ? ? ? ? rdpid ? bus_lock cldemote ? movdiri movdir64b enqcmd sgx_lc pks"},
	{7, 0, EDX,
	 "? ? avx512_4vnniw avx512_4fmaps fsrm uintr ? ? avx512_vp2intersect srbds_ctrl md_clear "
	 "rtm_always_abort ? "
	 "tsx_force_abort serialize hybrid tsxldtrk ? pconfig arch_lbr ibt ? amx_bf16 avx512_fp16 amx_tile "
	 "amx_int8 spec_ctrl "
	 "stibp flush_l1d arch_capabilities core_capabilities ssbd"},
	{7, 1, EAX,
	 "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd ? ? fzrm fsrs fsrc ? ? ? ? fred lkgs "
	 "wrmsrns ? amx_fp16 "
	 "hreset avx_ifma ? ? lam ? ? ? ? ?"},
	{0xd, 1, EAX,
	 "xsaveopt xsavec xgetbv1 xsaves xfd ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ?"},
	{0xd, 0, EAX,
	 "xcr0.x87 xcr0.sse xcr0.avx xcr0.bndregs xcr0.bndcsr xcr0.opmask xcr0.zmm_hi256 xcr0.hi16_zmm ? "
	 "xcr0.pkru ? ? ? ? ? ? "
	 "? xcr0.tilecfg xcr0.tiledata ? ? ? ? ? ? ? ? ? ? ? ? ?"},
	{0x80000001, 0, ECX,
	 "lahf_lm - svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt ? lwp "
	 "fma4 tce ? "
	 "nodeid_msr ? tbm topoext perfctr_core perfctr_nb ? bpext ptsc perfctr_llc mwaitx ? ?"},
	{0x80000001, 0, EDX,
	 "fpu vme de pse tsc msr pae mce cx8 apic ? syscall mtrr pge mca cmov pat pse36 ? mp nx ? mmxext mmx "
	 "fxsr fxsr_opt "
	 "pdpe1gb rdtscp ? lm 3dnowext 3dnow"},
	{0x80000007, 0, EDX, "? ? ? ? ? ? ? ? invtsc ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? ?"},
	{0x80000008, 0, EBX,
	 "clzero irperf xsaveerptr ? rdpru ? ? ? ? wbnoinvd ? ? ibpb ? ibrs stibp ibrs_always_on "
	 "stibp_always_on ? ? "
	 "efer_lmsle_unsupported ? ? ? amd_ssbd virt_ssbd amd_no_ssb ? amd_psfd ? ? ?"},
	{0x80000021, 0, EAX,
	 "no_nested_data_bp ? lfence_rdtsc ? ? ? null_sel_clr_base ? autoibrs ? ? ? ? ? ? ? ? ? ? ? ? ? ? ? "
	 "? ? ? ? ? ? ? ?"},
	{0x40000001, 0, EAX,
	 "kvm_clock kvm_nopiodelay kvm_mmu_op kvm_clock2 kvm_asyncpf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt "
	 "? "
	 "kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_send_ipi kvm_poll_control kvm_pv_sched_yield "
	 "kvm_asyncpf_int "
	 "kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control ? ? ? ? ? ? kvm_clock_stable ? ? ? "
	 "? ? ? ?"},
};

static uint32_t register_of(const struct kvm_cpuid_entry2 *e, enum reg reg)
{
	if (!e)
		return 0;
	const uint32_t v[] = {e->eax, e->ebx, e->ecx, e->edx};
	return v[reg];
}

static void nth_name(const char *names, unsigned n, char *out, size_t size)
{
	for (; n; n--) {
		names += strcspn(names, " ");
		names += *names == ' ';
	}
	snprintf(out, size, "%.*s", (int)strcspn(names, " "), names);
}

/* Appends the names of what the guest has and this host has not. */
static unsigned missing_features(const struct kvm_cpuid2 *guest, const struct kvm_cpuid2 *host, char *out,
				 size_t size)
{
	unsigned count = 0;
	size_t len = 0;
	out[0] = 0;
	for (size_t i = 0; i < ARRAY_SIZE(feature_words); i++) {
		const struct feature_word *w = &feature_words[i];
		uint32_t lost = register_of(find(guest, w->function, w->index), w->reg) &
				~register_of(find(host, w->function, w->index), w->reg);
		for (unsigned bit = 0; bit < 32; bit++) {
			char name[48];
			if (!(lost >> bit & 1))
				continue;
			nth_name(w->names, bit, name, sizeof name);
			if (!strcmp(name, "-"))
				continue;
			if (!strcmp(name, "?") || !name[0])
				snprintf(name, sizeof name, "cpuid %x.%x %s bit %u", w->function, w->index,
					 (const char *[]){"eax", "ebx", "ecx", "edx"}[w->reg], bit);
			count++;
			if (len + strlen(name) + 3 < size)
				len += (size_t)snprintf(out + len, size - len, "%s%s", len ? ", " : "", name);
		}
	}
	return count;
}

int machine_cpu_check(const json_t *guest, struct error *err)
{
	CLEANUP_FREE struct kvm_cpuid2 *theirs = NULL;
	uint32_t khz = 0;
	int ret = cpuid_from_json(guest, &theirs, &khz, err);
	if (ret)
		return ret;
	struct host_cpu h = {0};
	ret = host_cpu_get(&h, err);
	CLEANUP_FREE struct kvm_cpuid2 *ours = h.table;
	if (ret)
		return ret;
	char vendor_theirs[13], vendor_ours[13], list[300];
	vendor_of(theirs, vendor_theirs);
	vendor_of(ours, vendor_ours);
	if (strcmp(vendor_theirs, vendor_ours))
		return error_set(
			err, ENOTSUP,
			"the guest's CPU is %s, this host's is %s: a running guest cannot change vendor",
			vendor_theirs, vendor_ours);
	unsigned n = missing_features(theirs, ours, list, sizeof list);
	if (n)
		return error_set(err, ENOTSUP, "this host's CPU lacks %u feature%s of the guest's: %s", n,
				 n == 1 ? "" : "s", list);
	uint64_t slack = (uint64_t)h.tsc_khz * TSC_TOLERANCE_PPM / 1000000;
	if (khz && h.tsc_khz && !h.tsc_control && (khz + slack < h.tsc_khz || khz > h.tsc_khz + slack))
		return error_set(err, ENOTSUP,
				 "the guest's TSC runs at %u kHz, this host's at %u kHz, and this host "
				 "cannot scale it",
				 khz, h.tsc_khz);
	return 0;
}
