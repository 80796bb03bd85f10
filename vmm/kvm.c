/* SPDX-License-Identifier: Apache-2.0 */
/* The VM as KVM sees it: capabilities, memory slots, interrupt controllers, timer, clock. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "base/log.h"
#include "vmm/machine_internal.h"

/* Three pages that Intel's KVM needs for real mode, and one for the identity map: below the reset vector,
 * outside RAM. */
#define IDENTITY_MAP_ADDRESS UINT64_C(0xfffbc000)
#define TSS_ADDRESS	     0xfffbd000ul

int kvm_ioctl(int fd, unsigned long request, void *arg)
{
	int ret;
	do
		ret = ioctl(fd, request, arg);
	while (ret < 0 && errno == EINTR);
	return ret < 0 ? -errno : ret;
}

static const struct {
	int cap;
	const char *name;
} needed[] = {
	{KVM_CAP_IRQCHIP, "IRQCHIP"},
	{KVM_CAP_PIT2, "PIT2"},
	{KVM_CAP_PIT_STATE2, "PIT_STATE2"},
	{KVM_CAP_USER_MEMORY, "USER_MEMORY"},
	{KVM_CAP_IRQ_ROUTING, "IRQ_ROUTING"},
	{KVM_CAP_IRQFD, "IRQFD"},
	{KVM_CAP_IOEVENTFD, "IOEVENTFD"},
	{KVM_CAP_EXT_CPUID, "EXT_CPUID"},
	{KVM_CAP_IMMEDIATE_EXIT, "IMMEDIATE_EXIT"},
	{KVM_CAP_ADJUST_CLOCK, "ADJUST_CLOCK"},
	{KVM_CAP_VCPU_EVENTS, "VCPU_EVENTS"},
	{KVM_CAP_DEBUGREGS, "DEBUGREGS"},
	{KVM_CAP_XSAVE, "XSAVE"},
	{KVM_CAP_MP_STATE, "MP_STATE"},
	{KVM_CAP_SIGNAL_MSI, "SIGNAL_MSI"},
};

int kvm_open(struct machine *m, struct error *err)
{
	m->kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (m->kvm_fd < 0)
		return error_errno(err, errno, "/dev/kvm");
	int version = kvm_ioctl(m->kvm_fd, KVM_GET_API_VERSION, NULL);
	if (version != KVM_API_VERSION)
		return error_set(err, ENOTSUP, "/dev/kvm: API version %d, not %d", version, KVM_API_VERSION);
	for (size_t i = 0; i < sizeof needed / sizeof needed[0]; i++)
		if (ioctl(m->kvm_fd, KVM_CHECK_EXTENSION, needed[i].cap) <= 0)
			return error_set(err, ENOTSUP, "/dev/kvm: this kernel's KVM lacks KVM_CAP_%s",
					 needed[i].name);
	int size = kvm_ioctl(m->kvm_fd, KVM_GET_VCPU_MMAP_SIZE, NULL);
	if (size < (int)sizeof(struct kvm_run))
		return error_set(err, ENOTSUP, "/dev/kvm: bad vCPU area size %d", size);
	m->caps.run_bytes = (size_t)size;
	int max = ioctl(m->kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_MAX_VCPUS);
	if (max > 0 && m->ncpus > (unsigned)max)
		return error_set(err, EINVAL, "%u vCPUs: this host's KVM allows %d", m->ncpus, max);
	return 0;
}

static int check(struct machine *m, int cap)
{
	int ret = ioctl(m->vm_fd, KVM_CHECK_EXTENSION, cap);
	return ret < 0 ? 0 : ret;
}

int kvm_create_vm(struct machine *m, struct error *err)
{
	m->vm_fd = kvm_ioctl(m->kvm_fd, KVM_CREATE_VM, NULL);
	if (m->vm_fd < 0)
		return error_errno(err, m->vm_fd, "KVM_CREATE_VM");
	struct kvm_caps *c = &m->caps;
	c->xcrs = check(m, KVM_CAP_XCRS) > 0;
	c->sregs2 = check(m, KVM_CAP_SREGS2) > 0;
	c->tsc_control = check(m, KVM_CAP_TSC_CONTROL) > 0;
	c->deadline_timer = check(m, KVM_CAP_TSC_DEADLINE_TIMER) > 0;
	int n = check(m, KVM_CAP_XSAVE2);
	c->xsave_bytes = n >= (int)sizeof(struct kvm_xsave) ? (unsigned)n : 0;
	n = check(m, KVM_CAP_NESTED_STATE);
	c->nested_bytes = n > 0 ? (unsigned)n : 0;
	int manual = check(m, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
	if (manual & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE) {
		struct kvm_enable_cap cap = {
			.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
			.args = {(uint64_t)manual &
				 (KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET)}};
		if (!kvm_ioctl(m->vm_fd, KVM_ENABLE_CAP, &cap)) {
			c->manual_protect = true;
			c->initially_set = manual & KVM_DIRTY_LOG_INITIALLY_SET;
		}
	}
	uint64_t identity = IDENTITY_MAP_ADDRESS;
	int ret = kvm_ioctl(m->vm_fd, KVM_SET_IDENTITY_MAP_ADDR, &identity);
	if (ret < 0)
		return error_errno(err, ret, "KVM_SET_IDENTITY_MAP_ADDR");
	ret = kvm_ioctl(m->vm_fd, KVM_SET_TSS_ADDR, (void *)TSS_ADDRESS);
	if (ret < 0)
		return error_errno(err, ret, "KVM_SET_TSS_ADDR");
	ret = kvm_ioctl(m->vm_fd, KVM_CREATE_IRQCHIP, NULL);
	if (ret < 0)
		return error_errno(err, ret, "KVM_CREATE_IRQCHIP");
	struct kvm_pit_config pit = {.flags = KVM_PIT_SPEAKER_DUMMY};
	ret = kvm_ioctl(m->vm_fd, KVM_CREATE_PIT2, &pit);
	if (ret < 0)
		return error_errno(err, ret, "KVM_CREATE_PIT2");
	return kvm_set_memory(m, false, err);
}

int kvm_set_memory(struct machine *m, bool log_dirty, struct error *err)
{
	struct guest_memory *mem = &m->mem;
	struct kvm_userspace_memory_region slots[2] = {
		{.slot = 0,
		 .guest_phys_addr = 0,
		 .memory_size = mem->low_bytes,
		 .userspace_addr = (uint64_t)(uintptr_t)mem->base},
		{.slot = 1,
		 .guest_phys_addr = MEMORY_HIGH_BASE,
		 .memory_size = mem->size_bytes - mem->low_bytes,
		 .userspace_addr = (uint64_t)(uintptr_t)(mem->base + mem->low_bytes)},
	};
	for (unsigned i = 0; i < 2; i++) {
		if (!slots[i].memory_size)
			continue;
		slots[i].flags = log_dirty ? KVM_MEM_LOG_DIRTY_PAGES : 0;
		int ret = kvm_ioctl(m->vm_fd, KVM_SET_USER_MEMORY_REGION, &slots[i]);
		if (ret < 0)
			return error_errno(err, ret, "memory slot %u", i);
	}
	return 0;
}

int kvm_irqchip_save(struct machine *m, struct state_writer *w, struct error *err)
{
	state_section_begin(w, "kvm", 1);
	for (uint32_t id = KVM_IRQCHIP_PIC_MASTER; id <= KVM_IRQCHIP_IOAPIC; id++) {
		struct kvm_irqchip chip = {.chip_id = id};
		int ret = kvm_ioctl(m->vm_fd, KVM_GET_IRQCHIP, &chip);
		if (ret < 0)
			return error_errno(err, ret, "interrupt controller %u", id);
		state_put_bytes(w, &chip.chip, sizeof chip.chip);
	}
	struct kvm_pit_state2 pit = {0};
	int ret = kvm_ioctl(m->vm_fd, KVM_GET_PIT2, &pit);
	if (ret < 0)
		return error_errno(err, ret, "PIT");
	state_put_bytes(w, &pit, sizeof pit);
	struct kvm_clock_data clock = {0};
	ret = kvm_ioctl(m->vm_fd, KVM_GET_CLOCK, &clock);
	if (ret < 0)
		return error_errno(err, ret, "KVM clock");
	state_put_u64(w, clock.clock);
	state_section_end(w);
	return 0;
}

int kvm_irqchip_load(struct machine *m, struct state_reader *r, struct error *err)
{
	int ret = state_reader_section(r, "kvm", 1, NULL, err);
	if (ret)
		return ret;
	struct kvm_irqchip chips[3];
	memset(chips, 0, sizeof chips);
	for (uint32_t id = KVM_IRQCHIP_PIC_MASTER; id <= KVM_IRQCHIP_IOAPIC; id++) {
		chips[id].chip_id = id;
		state_get_bytes(r, &chips[id].chip, sizeof chips[id].chip);
	}
	struct kvm_pit_state2 pit;
	state_get_bytes(r, &pit, sizeof pit);
	m->loaded_clock_ns = state_get_u64(r);
	ret = state_reader_section_end(r, err);
	if (ret)
		return ret;
	for (uint32_t id = 0; id < 3; id++) {
		ret = kvm_ioctl(m->vm_fd, KVM_SET_IRQCHIP, &chips[id]);
		if (ret < 0)
			return error_errno(err, ret, "interrupt controller %u", id);
	}
	ret = kvm_ioctl(m->vm_fd, KVM_SET_PIT2, &pit);
	if (ret < 0)
		return error_errno(err, ret, "PIT");
	return 0;
}

struct chips {
	struct kvm_irqchip chip[3];
	struct kvm_pit_state2 pit;
};

static int read_chips(struct state_reader *r, struct chips *c, struct error *err)
{
	int ret = state_reader_section(r, "kvm", 1, NULL, err);
	if (ret)
		return ret;
	memset(c, 0, sizeof *c);
	for (unsigned id = 0; id < 3; id++)
		state_get_bytes(r, &c->chip[id].chip, sizeof c->chip[id].chip);
	state_get_bytes(r, &c->pit, sizeof c->pit);
	state_get_u64(r); /* the clock */
	/* Time passes here as well: what it changes by itself, and the line that the PIT pulls. */
	c->chip[KVM_IRQCHIP_PIC_MASTER].chip.pic.irr &= 0xfe;
	c->chip[KVM_IRQCHIP_PIC_MASTER].chip.pic.last_irr &= 0xfe;
	c->chip[KVM_IRQCHIP_IOAPIC].chip.ioapic.irr &= ~UINT32_C(5);
	for (unsigned i = 0; i < 3; i++)
		c->pit.channels[i].count_load_time = 0;
	return state_reader_section_end(r, err);
}

int kvm_irqchip_differ(struct state_reader *a, struct state_reader *b, struct error *err)
{
	static const char *const names[] = {"PIC", "second PIC", "I/O APIC"};
	struct chips x, y;
	int ret = read_chips(a, &x, err);
	if (!ret)
		ret = read_chips(b, &y, err);
	for (unsigned id = 0; id < 3 && !ret; id++)
		if (memcmp(&x.chip[id].chip, &y.chip[id].chip, sizeof x.chip[id].chip))
			ret = error_set(err, EBADMSG, "section kvm: the %s differs", names[id]);
	if (!ret && memcmp(&x.pit, &y.pit, sizeof x.pit))
		ret = error_set(err, EBADMSG, "section kvm: the PIT differs");
	return ret;
}
