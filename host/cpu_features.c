/* SPDX-License-Identifier: Apache-2.0 */
/* The features of a CPU by name: what one lacks, what several have in common, and the levels of the x86-64
 * ABI. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "host/cpu.h"

enum reg { EAX, EBX, ECX, EDX };

/* Names of the bits of a register, least significant first, as Linux calls them; "" has no name, "-" is not a
 * feature that a guest could miss (it depends on the topology or is filled in per vCPU). */
static const struct cpu_word {
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

_Static_assert(ARRAY_SIZE(feature_words) == CPU_WORDS, "cpu.h");

static const char *const reg_names[] = {"eax", "ebx", "ecx", "edx"};

static uint32_t *register_of(struct kvm_cpuid_entry2 *e, enum reg reg)
{
	uint32_t *const at[] = {&e->eax, &e->ebx, &e->ecx, &e->edx};
	return at[reg];
}

static void nth_name(const char *names, unsigned n, char *out, size_t size)
{
	for (; n; n--) {
		names += strcspn(names, " ");
		names += *names == ' ';
	}
	snprintf(out, size, "%.*s", (int)strcspn(names, " "), names);
}

#define NAME_BYTES 48
/* False: not a feature.. */
static bool name_of(const struct cpu_word *w, unsigned bit, char out[NAME_BYTES])
{
	nth_name(w->names, bit, out, NAME_BYTES);
	if (!strcmp(out, "-"))
		return false;
	if (!strcmp(out, "?") || !out[0])
		snprintf(out, NAME_BYTES, "bit%u", bit);
	return true;
}

/* The bits that are features. */
static uint32_t feature_bits(const struct cpu_word *w)
{
	char name[NAME_BYTES];
	uint32_t mask = 0;
	for (unsigned bit = 0; bit < 32; bit++)
		mask |= (uint32_t)name_of(w, bit, name) << bit;
	return mask;
}

void cpu_features_of(const struct kvm_cpuid2 *t, struct cpu_features *out)
{
	cpu_vendor(t, out->vendor);
	for (size_t i = 0; i < CPU_WORDS; i++) {
		const struct cpu_word *w = &feature_words[i];
		const struct kvm_cpuid_entry2 *e = cpu_entry(t, w->function, w->index);
		struct kvm_cpuid_entry2 copy = e ? *e : (struct kvm_cpuid_entry2){0};
		out->words[i] = *register_of(&copy, w->reg) & feature_bits(w);
	}
}

void cpu_features_and(struct cpu_features *a, const struct cpu_features *b)
{
	for (size_t i = 0; i < CPU_WORDS; i++)
		a->words[i] &= b->words[i];
}

unsigned cpu_features_lacking(const struct cpu_features *wanted, const struct cpu_features *have, char *names,
			      size_t size)
{
	unsigned count = 0;
	size_t len = 0;
	if (names)
		names[0] = '\0';
	for (size_t i = 0; i < CPU_WORDS; i++) {
		const struct cpu_word *w = &feature_words[i];
		uint32_t lost = wanted->words[i] & ~have->words[i];
		for (unsigned bit = 0; bit < 32; bit++) {
			char name[NAME_BYTES], whole[NAME_BYTES + 32];
			if (!(lost >> bit & 1) || !name_of(w, bit, name))
				continue;
			count++;
			snprintf(whole, sizeof whole, "%s", name);
			if (!strncmp(name, "bit", 3) && name[3] >= '0' && name[3] <= '9')
				snprintf(whole, sizeof whole, "cpuid %x.%x %s bit %u", w->function, w->index,
					 reg_names[w->reg], bit);
			if (names && len + strlen(whole) + 3 < size)
				len += (size_t)snprintf(names + len, size - len, "%s%s", len ? ", " : "",
							whole);
		}
	}
	return count;
}

/* ---- taking features out of a table ---- */

#define LEAF_XSAVE	  0xdu
#define XSAVE_LEGACY	  576u /* legacy area and header */
#define FEATURE_XSAVE_ECX (1u << 26)

/* The components' areas that are no longer there, and the size that is left. */
static void trim_xsave(struct kvm_cpuid2 *t, bool xsave)
{
	uint32_t n = 0, size = XSAVE_LEGACY;
	const struct kvm_cpuid_entry2 *main = cpu_entry(t, LEAF_XSAVE, 0);
	uint64_t xcr0 = main ? main->eax | (uint64_t)main->edx << 32 : 0;
	for (uint32_t i = 0; i < t->nent; i++) {
		struct kvm_cpuid_entry2 e = t->entries[i];
		bool component = e.function == LEAF_XSAVE && e.index >= 2;
		bool supervisor = component && e.ecx & 1;
		if (e.function == LEAF_XSAVE && !xsave)
			continue;
		if (component && !supervisor && (e.index > 62 || !(xcr0 >> e.index & 1)))
			continue;
		if (component && !supervisor && e.eax + e.ebx > size)
			size = e.eax + e.ebx;
		t->entries[n++] = e;
	}
	t->nent = n;
	for (uint32_t i = 0; i < n; i++)
		if (t->entries[i].function == LEAF_XSAVE && t->entries[i].index == 0)
			t->entries[i].ebx = t->entries[i].ecx = size;
}

void cpu_features_apply(struct kvm_cpuid2 *t, const struct cpu_features *f)
{
	bool xsave = false;
	for (uint32_t i = 0; i < t->nent; i++) {
		struct kvm_cpuid_entry2 *e = &t->entries[i];
		for (size_t k = 0; k < CPU_WORDS; k++) {
			const struct cpu_word *w = &feature_words[k];
			if (e->function != w->function || e->index != w->index)
				continue;
			uint32_t *reg = register_of(e, w->reg);
			*reg &= f->words[k] | ~feature_bits(w);
			if (w->function == 1 && w->reg == ECX)
				xsave = *reg & FEATURE_XSAVE_ECX;
		}
	}
	trim_xsave(t, xsave);
}

/* ---- the judgement ---- */

#define TSC_TOLERANCE_PPM 250u /* KVM's own, module parameter tsc_tolerance_ppm */

int cpu_judge(const struct kvm_cpuid2 *guest, uint32_t guest_khz, const struct kvm_cpuid2 *host,
	      uint32_t host_khz, bool host_scales_tsc, struct error *err)
{
	struct cpu_features theirs, ours;
	char list[CPU_NAMES_BYTES];
	cpu_features_of(guest, &theirs);
	cpu_features_of(host, &ours);
	if (strcmp(theirs.vendor, ours.vendor))
		return error_set(
			err, ENOTSUP,
			"the guest's CPU is %s, this host's is %s: a running guest cannot change vendor",
			theirs.vendor, ours.vendor);
	unsigned n = cpu_features_lacking(&theirs, &ours, list, sizeof list);
	if (n)
		return error_set(err, ENOTSUP, "this host's CPU lacks %u feature%s of the guest's: %s", n,
				 n == 1 ? "" : "s", list);
	uint64_t slack = (uint64_t)host_khz * TSC_TOLERANCE_PPM / 1000000;
	if (guest_khz && host_khz && !host_scales_tsc &&
	    (guest_khz + slack < host_khz || guest_khz > host_khz + slack))
		return error_set(err, ENOTSUP,
				 "the guest's TSC runs at %u kHz, this host's at %u kHz, and this host "
				 "cannot scale it",
				 guest_khz, host_khz);
	return 0;
}

/* ---- as text ---- */

int cpu_vendor_set(const char *vendor, struct cpu_features *f, struct error *err)
{
	size_t n = strlen(vendor);
	if (n == 0 || n >= sizeof f->vendor || strpbrk(vendor, ";#\"") || vendor[strcspn(vendor, "\t\n")])
		return error_set(err, EINVAL, "vendor: '%.64s' is no CPU's", vendor);
	memset(f->vendor, 0, sizeof f->vendor);
	memcpy(f->vendor, vendor, n);
	return 0;
}

static const struct cpu_word *word_of(const char *key, unsigned *at)
{
	for (*at = 0; *at < CPU_WORDS; (*at)++) {
		char name[40];
		const struct cpu_word *w = &feature_words[*at];
		snprintf(name, sizeof name, "cpuid.%x.%x.%s", w->function, w->index, reg_names[w->reg]);
		if (!strcmp(name, key))
			return w;
	}
	return NULL;
}

int cpu_baseline_entry(const char *key, const char *value, struct cpu_features *f, struct error *err)
{
	unsigned at;
	const struct cpu_word *w = word_of(key, &at);
	if (!w)
		return error_set(err, EINVAL, "unknown key '%.64s': no register with features", key);
	for (const char *p = value + strspn(value, " \t"); *p; p += strspn(p, " \t")) {
		size_t len = strcspn(p, " \t");
		char name[NAME_BYTES];
		unsigned bit = 0;
		while (bit < 32 && !(name_of(w, bit, name) && strlen(name) == len && !strncmp(p, name, len)))
			bit++;
		if (bit == 32)
			return error_set(err, EINVAL, "%s: '%.*s' is not one of its features", key,
					 (int)(len < 64 ? len : 64), p);
		f->words[at] |= 1u << bit;
		p += len;
	}
	return 0;
}

char *cpu_baseline_lines(const struct cpu_features *f)
{
	char *text = NULL;
	size_t size;
	FILE *out = open_memstream(&text, &size);
	if (!out)
		return NULL;
	for (size_t i = 0; i < CPU_WORDS; i++) {
		const struct cpu_word *w = &feature_words[i];
		char name[NAME_BYTES];
		if (!f->words[i])
			continue;
		fprintf(out, "cpuid.%x.%x.%s =", w->function, w->index, reg_names[w->reg]);
		for (unsigned bit = 0; bit < 32; bit++)
			if (f->words[i] >> bit & 1 && name_of(w, bit, name))
				fprintf(out, " %s", name);
		fputc('\n', out);
	}
	bool bad = ferror(out);
	if (fclose(out) || bad) {
		free(text);
		return NULL;
	}
	return text;
}
