/* SPDX-License-Identifier: Apache-2.0 */
/* A guest's CPU as JSON, for the other host, and the judgement whether it could run here. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "host/cpu.h"
#include "vmm/machine_internal.h"

json_t *machine_cpu_describe(struct machine *m, struct error *err)
{
	return cpu_to_json(m->cpuid, m->guest_tsc_khz, err);
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
	json_t *j = host_cpu_get(&h, err) ? NULL : cpu_to_json(h.table, h.tsc_khz, err);
	if (j)
		json_object_set_new(j, "tsc_scaling", json_boolean(h.tsc_control));
	free(h.table);
	return j;
}

int machine_cpu_check(const json_t *guest, struct error *err)
{
	CLEANUP_FREE struct kvm_cpuid2 *theirs = NULL;
	uint32_t khz = 0;
	int ret = cpu_from_json(guest, &theirs, &khz, err);
	if (ret)
		return ret;
	struct host_cpu h = {0};
	ret = host_cpu_get(&h, err);
	CLEANUP_FREE struct kvm_cpuid2 *ours = h.table;
	if (ret)
		return ret;
	return cpu_judge(theirs, khz, ours, h.tsc_khz, h.tsc_control, err);
}
