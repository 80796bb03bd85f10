/* SPDX-License-Identifier: Apache-2.0 */
/* The machine inside; for the files that make it up, not for devices. */
#ifndef VMM_MACHINE_INTERNAL_H
#define VMM_MACHINE_INTERNAL_H

#include <linux/kvm.h>
#include <pthread.h>

#include "host/cpu.h"
#include "vmm/bus.h"
#include "vmm/console.h"
#include "vmm/device.h"
#include "vmm/irq_router.h"
#include "vmm/machine.h"
#include "vmm/memory.h"
#include "vmm/pci_bus.h"

#define MACHINE_DEVICES_MAX 32
#define MACHINE_MSRS_MAX    1024
#define MACHINE_CPUID_MAX   CPU_TABLE_MAX
#define MSR_TSC		    0x10
#define MSR_TSC_DEADLINE    0x6e0

/* What this host's KVM can do. */
struct kvm_caps {
	bool manual_protect, initially_set, tsc_control, sregs2, deadline_timer;
	bool xcrs; /* absent where the host CPU has no XSAVE */
	unsigned xsave_bytes, nested_bytes;
	size_t run_bytes;
};

enum power_state { POWER_ON, POWER_OFF, POWER_RESET, POWER_CRASHED };

struct vcpu;
/* One call for every vCPU, shared among threads that are parked anyway. */
struct vcpu_work {
	int (*call)(struct vcpu *v, void *opaque, struct error *err);
	void *opaque;
	unsigned next, done;  /* under the machine's lock */
	struct error failure; /* the first */
};

struct vcpu {
	struct machine *m;
	unsigned id;
	int fd;
	struct kvm_run *run;
	pthread_t thread;
	bool thread_started;
	bool pending_io; /* the last exit is completed by entering KVM_RUN again */
	/* Of the loaded state, for machine_adjust_clock. */
	uint64_t loaded_tsc, loaded_deadline;
	uint32_t loaded_tsc_khz;
	struct state_writer *saved; /* made before the pause in which it is filled */
	/* throttle.c */
	double speed;  /* its share of a period: 1 = not slowed. Under the machine's lock */
	bool off_turn; /* it has had its turn in this period; atomic */
	int stats_fd;
	uint64_t faults; /* as counted last; under control */
};

/* Of a guest that is slowed; throttle.c. Under the machine's lock. */
struct throttle {
	pthread_t thread;
	bool started, on, quit;
	pthread_cond_t changed; /* monotonic clock */
	unsigned generation;	/* of the speeds */
	unsigned period_us;
	uint8_t order[MACHINE_CPUS_MAX]; /* of the vCPUs, the slowest first */
	long counters[2];		 /* where the statistics of a vCPU have them; -1: nowhere */
};

struct boot_source {
	int kernel_fd, initrd_fd; /* kept open: a reset loads them again */
	char *kernel, *initrd, *cmdline;
};

struct machine {
	struct machine_config cfg;
	char *serial_spec, *run_dir;
	int kvm_fd, vm_fd;
	struct kvm_caps caps;
	struct guest_memory mem;
	struct bus *bus;
	struct irq_router *irq;
	struct pci_bus *pci;
	struct serial *serial;
	struct console *console;
	struct power *power_device;
	struct virtio_balloon *balloon; /* NULL: none */
	struct kvm_cpuid2 *cpuid;	/* the table as described; per-vCPU leaves are patched in cpuid_set */
	uint32_t tsc_khz;
	uint32_t guest_tsc_khz; /* as set or found at creation; 0 unknown */
	uint32_t msr_list[MACHINE_MSRS_MAX];
	unsigned nmsrs;
	struct vcpu vcpus[MACHINE_CPUS_MAX];
	unsigned ncpus;

	struct {
		const struct device_ops *ops;
		void *dev;
	} devices[MACHINE_DEVICES_MAX];
	unsigned ndevices;

	bool owns_taps;
	struct boot_source boot;
	uint8_t *power_on_state; /* vCPUs and interrupt controllers as created: what a reset goes back to */
	size_t power_on_len;
	uint64_t loaded_clock_ns;
	bool loaded;
	uint64_t loaded_at_ns;

	/* Serialises pause, start, save, load and the reset done by the event thread. Taken before lock. */
	pthread_mutex_t control;
	bool devices_running;
	struct mem_pause_costs costs; /* as measured last; under control */

	pthread_mutex_t lock; /* the fields below */
	pthread_cond_t cond;
	bool want_run, held, quit;
	enum power_state power;
	bool power_told; /* the event of a power state other than on was delivered */
	char power_detail[160];
	pthread_cond_t parked;	/* the last vCPU thread is in its park, or a vcpu_work is done */
	struct vcpu_work *work; /* for parked threads to take part in */
	unsigned running;	/* vCPU threads outside their park */
	bool allowed;		/* atomic: want_run and power on */
	pthread_t event_thread;
	bool event_thread_started;
	struct throttle throttle;

	bool tracking;	     /* dirty log on; atomic */
	uint64_t *dirty_log; /* what KVM_GET_DIRTY_LOG fills, while tracking; not allocated in the pause */

	/* Announcing: used by the thread that controls the machine. */
	pthread_t announce_thread;
	bool announcing;
	pthread_mutex_t announce_lock;
	pthread_cond_t announce_cond; /* monotonic clock */
	bool announce_quit;
};

/* kvm.c */
int kvm_open(struct machine *m, struct error *err);
int kvm_create_vm(struct machine *m, struct error *err);
int kvm_set_memory(struct machine *m, bool log_dirty, struct error *err);
/* ioctl that retries EINTR; -errno on failure. */
int kvm_ioctl(int fd, unsigned long request, void *arg);
/* Section "kvm": PICs, IOAPIC, PIT, clock. */
int kvm_irqchip_save(struct machine *m, struct state_writer *w, struct error *err);
int kvm_irqchip_load(struct machine *m, struct state_reader *r, struct error *err);
/* Two saved sections, but for what goes on by itself: -EBADMSG naming the part. */
int kvm_irqchip_differ(struct state_reader *a, struct state_reader *b, struct error *err);

/* cpuid.c */
int cpuid_host_table(int kvm_fd, struct kvm_cpuid2 **out, struct error *err);
/* The copy for one vCPU, its APIC id and the topology filled in. */
int cpuid_set(struct vcpu *v, struct error *err);

/* vcpu.c */
int vcpu_create(struct machine *m, unsigned id, struct error *err);
int vcpu_start_thread(struct vcpu *v, struct error *err);
void vcpu_destroy(struct vcpu *v);
/* Caller holds m->lock: makes every thread leave KVM_RUN. */
void vcpus_kick(struct machine *m);
void vcpu_kick(struct vcpu *v);
void vcpus_update_allowed(struct machine *m); /* caller holds m->lock */
/* Calls for each vCPU, on this thread and on parked ones at once, in no order; returns the first error. The
 * caller holds control, all vCPUs are parked. */
int vcpus_each(struct machine *m, int (*call)(struct vcpu *v, void *opaque, struct error *err), void *opaque,
	       struct error *err);

/* throttle.c */
void throttle_init(struct machine *m);
void throttle_vcpu_created(struct vcpu *v);
void throttle_release(struct machine *m); /* ends its thread; before the vCPUs' */

/* vcpu_state.c */
int vcpu_msrs_find(struct machine *m, struct error *err);
int vcpu_save(struct vcpu *v, struct state_writer *w, struct error *err);
/* All vCPUs, several at once; their sections in order. */
int vcpus_save(struct machine *m, struct state_writer *w, struct error *err);
int vcpus_load(struct machine *m, struct state_reader *r, struct error *err);
/* keep_tsc: a reset in place, where time goes on. */
int vcpu_load(struct vcpu *v, struct state_reader *r, bool keep_tsc, struct error *err);
/* As kvm_irqchip_differ. */
int vcpu_differ(struct vcpu *v, struct state_reader *a, struct state_reader *b, struct error *err);
/* Moves the guest's TSC on. Negative where KVM has no TSC offset attribute. */
int vcpu_forward_tsc(struct vcpu *v, uint64_t forward_cycles);
int vcpu_set_msr(struct vcpu *v, uint32_t index, uint64_t value);

/* boot*.c */
void boot_source_close(struct boot_source *b);
int boot_load(struct machine *m, struct error *err);
int boot_bzimage(struct machine *m, uint64_t rsdp, struct error *err);
int boot_pvh(struct machine *m, uint64_t rsdp, struct error *err);

/* acpi.c: writes the tables; *rsdp is the address of the RSDP. */
int acpi_write(struct machine *m, uint64_t *rsdp, struct error *err);

/* announce.c: waits for the thread, if there is one. */
void machine_announce_stop(struct machine *m);

/* power.c */
int power_create(struct machine *m, struct error *err);
void power_button_press(struct power *p);

/* machine.c: what a device or vCPU asks for. Any thread. The first one stands. */
void machine_request_power(struct machine *m, enum power_state state, const char *detail);

/* serial.c */
int serial_create(struct machine *m, struct error *err);

#endif
