/* SPDX-License-Identifier: Apache-2.0 */
/* The CPUID table of a guest: what KVM supports here, less what cannot move, with the topology of the guest.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "vmm/machine_internal.h"

#define LEAF_TIMING 0x40000010u

static struct kvm_cpuid_entry2 *find(struct kvm_cpuid2 *t, uint32_t function, uint32_t index)
{
	for (uint32_t i = 0; i < t->nent; i++)
		if (t->entries[i].function == function &&
		    (!(t->entries[i].flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) ||
		     t->entries[i].index == index))
			return &t->entries[i];
	return NULL;
}

static size_t table_bytes(uint32_t n)
{
	return sizeof(struct kvm_cpuid2) + n * sizeof(struct kvm_cpuid_entry2);
}

int cpuid_host_table(int kvm_fd, struct kvm_cpuid2 **out, struct error *err)
{
	CLEANUP_FREE struct kvm_cpuid2 *t = calloc(1, table_bytes(MACHINE_CPUID_MAX));
	if (!t)
		return error_errno(err, ENOMEM, "CPUID");
	t->nent = MACHINE_CPUID_MAX;
	int ret = kvm_ioctl(kvm_fd, KVM_GET_SUPPORTED_CPUID, t);
	if (ret < 0)
		return error_errno(err, ret, "KVM_GET_SUPPORTED_CPUID");
	struct kvm_cpuid_entry2 *e = find(t, 1, 0);
	if (e) {
		e->ecx |= 1u << 31 /* hypervisor */ | 1u << 21 /* x2APIC, in the kernel */;
		e->ecx &= ~(1u << 3 | 1u << 5); /* MWAIT; VMX: no nested machines */
		/* What the LAPIC in the kernel does, though KVM leaves it to us to say. */
		if (kvm_ioctl(kvm_fd, KVM_CHECK_EXTENSION, (void *)KVM_CAP_TSC_DEADLINE_TIMER) > 0)
			e->ecx |= 1u << 24;
		/* Of the CPU it was asked on. */
		e->ebx &= 0x0000ffffu;
	}
	e = find(t, 0xa, 0); /* performance counters do not move */
	if (e)
		e->eax = e->ebx = e->ecx = e->edx = 0;
	e = find(t, 0x80000001, 0);
	if (e)
		e->ecx &= ~(1u << 2); /* SVM */
	e = find(t, 0x8000000a, 0);
	if (e)
		e->eax = e->ebx = e->ecx = e->edx = 0;
	*out = steal_ptr(t);
	return 0;
}

static unsigned bits_for(unsigned n)
{
	unsigned bits = 0;
	while ((1u << bits) < n)
		bits++;
	return bits;
}

static void add_entry(struct kvm_cpuid2 *t, struct kvm_cpuid_entry2 e)
{
	if (t->nent < MACHINE_CPUID_MAX)
		t->entries[t->nent++] = e;
}

static void remove_function(struct kvm_cpuid2 *t, uint32_t function)
{
	uint32_t n = 0;
	for (uint32_t i = 0; i < t->nent; i++)
		if (t->entries[i].function != function)
			t->entries[n++] = t->entries[i];
	t->nent = n;
}

/* One package of n cores with one thread each. */
static void extended_topology(struct kvm_cpuid2 *t, uint32_t function, unsigned id, unsigned ncpus)
{
	if (!find(t, function, 0))
		return;
	remove_function(t, function);
	struct kvm_cpuid_entry2 e = {
		.function = function, .flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX, .edx = id};
	e.index = 0;
	e.eax = 0;
	e.ebx = 1;
	e.ecx = 0 | 1 << 8; /* threads */
	add_entry(t, e);
	e.index = 1;
	e.eax = bits_for(ncpus);
	e.ebx = ncpus;
	e.ecx = 1 | 2 << 8; /* cores */
	add_entry(t, e);
	e.index = 2;
	e.eax = e.ebx = 0;
	e.ecx = 2;
	add_entry(t, e);
}

int cpuid_set(struct vcpu *v, struct error *err)
{
	const struct kvm_cpuid2 *src = v->m->cpuid;
	unsigned n = v->m->ncpus;
	CLEANUP_FREE struct kvm_cpuid2 *t = calloc(1, table_bytes(MACHINE_CPUID_MAX));
	if (!t)
		return error_errno(err, ENOMEM, "CPUID");
	memcpy(t, src, table_bytes(src->nent));
	extended_topology(t, 0xb, v->id, n);
	extended_topology(t, 0x1f, v->id, n);
	remove_function(t, 0x80000026); /* AMD's: would have to be kept in step with the others */
	for (uint32_t i = 0; i < t->nent; i++) {
		struct kvm_cpuid_entry2 *e = &t->entries[i];
		switch (e->function) {
		case 1:
			e->ebx = (e->ebx & 0xffff) | n << 16 | v->id << 24;
			e->edx = n > 1 ? e->edx | 1u << 28 : e->edx & ~(1u << 28);
			break;
		case 4:
			if (!(e->eax & 31))
				break;
			/* Only the last level cache is shared. */
			e->eax &= ~(0xfffu << 14 | 0x3fu << 26);
			e->eax |= ((1u << bits_for(n)) - 1) << 26;
			if ((e->eax >> 5 & 7) >= 3)
				e->eax |= ((1u << bits_for(n)) - 1) << 14;
			break;
		case 0x80000001:
			e->ecx = n > 1 ? e->ecx | 2 : e->ecx & ~2u; /* CmpLegacy */
			break;
		case 0x80000008:
			e->ecx = (e->ecx & ~0xf0ffu) | (n - 1) | bits_for(n) << 12;
			break;
		case 0x8000001d:
			e->eax &= ~(0xfffu << 14);
			if ((e->eax >> 5 & 7) >= 3)
				e->eax |= (n - 1) << 14;
			break;
		case 0x8000001e:
			e->eax = v->id;
			e->ebx = v->id & 0xff;
			e->ecx = 0;
			break;
		default:
			break;
		}
	}
	struct kvm_cpuid_entry2 *hv = find(t, 0x40000000, 0);
	int khz = kvm_ioctl(v->fd, KVM_GET_TSC_KHZ, NULL);
	if (hv && khz > 0 && !find(t, LEAF_TIMING, 0)) {
		/* The rates, as VMware began to tell them: TSC kHz, and the LAPIC's bus, 1 GHz in KVM. */
		hv->eax = hv->eax > LEAF_TIMING ? hv->eax : LEAF_TIMING;
		add_entry(t, (struct kvm_cpuid_entry2){
				     .function = LEAF_TIMING, .eax = (uint32_t)khz, .ebx = 1000000});
	}
	int ret = kvm_ioctl(v->fd, KVM_SET_CPUID2, t);
	return ret < 0 ? error_errno(err, ret, "vCPU %u: KVM_SET_CPUID2", v->id) : 0;
}
