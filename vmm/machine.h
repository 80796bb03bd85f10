/* SPDX-License-Identifier: Apache-2.0 */
/* interface: a whole KVM machine */
#ifndef VMM_MACHINE_H
#define VMM_MACHINE_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "block/block.h"
#include "memxfer/memxfer.h"

#define MACHINE_CPUS_MAX  64
#define MACHINE_DISKS_MAX 16
#define MACHINE_NETS_MAX  8

struct machine;
struct bus;
struct pci_bus;
struct irq_router;
struct guest_memory;

enum machine_event {
	MACHINE_EVENT_SHUTDOWN, /* guest powered itself off */
	MACHINE_EVENT_RESET, /* guest asked for a reset; the machine did it and goes on (tracking stays alive)
			      */
	MACHINE_EVENT_CRASHED, /* triple fault, KVM internal error, failed entry; vCPUs stopped */
};

struct machine_disk {
	char id[32];
	struct block *block; /* stays the caller's */
	bool read_only;
};

struct machine_net {
	char id[32];
	int tap_fd; /* taken over when the machine was created; made by tap_open (vmm/tap.h) */
	uint8_t mac[6];
};

struct cpu_features;
struct machine_config {
	uint64_t memory_bytes; /* multiple of 2 MiB */
	unsigned cpus;	       /* 1..64 */
	struct machine_disk disks[MACHINE_DISKS_MAX];
	unsigned ndisks;
	struct machine_net nets[MACHINE_NETS_MAX];
	unsigned nnets;
	bool balloon;
	const char *serial; /* "socket" (run_dir/console.sock), "file:PATH", "stdio" */
	const char *run_dir;
	/* of a machine that begins here: what the guest may see, and what this host must have; NULL: all */
	const struct cpu_features *cpu_allowed, *cpu_needed;
	json_t *cpu; /* destination: the source's machine_cpu_describe; NULL: this host's own */
	/* Called on some thread of the machine, no locks held; must not call machine_destroy. */
	void (*event)(void *opaque, enum machine_event event, const char *detail);
	void *opaque;
};

/* Builds everything: VM, irqchip, PIT, memory, vCPU threads (parked), devices (paused). Runs nothing. */
int machine_create(const struct machine_config *cfg, struct machine **out, struct error *err);
void machine_destroy(struct machine *m);

/* Loads kernel (bzImage by its 64-bit entry, or PVH ELF), initrd (may be NULL), command line, ACPI tables,
 * boot registers. */
int machine_load_kernel(struct machine *m, const char *kernel, const char *initrd, const char *cmdline,
			struct error *err);

/* Opens and remembers them for a later reset, without loading: what a destination needs, whose memory
 * arrives. */
int machine_set_kernel(struct machine *m, const char *kernel, const char *initrd, const char *cmdline,
		       struct error *err);

/* vCPUs and devices run. */
int machine_start(struct machine *m, struct error *err);
/* Stops the vCPUs (out of KVM_RUN, each at a clean boundary), then pauses the devices. Idempotent. */
int machine_pause(struct machine *m, struct error *err);
/* After pause: waits for requests in flight. -ETIMEDOUT leaves the machine paused; machine_start goes on. */
int machine_drain(struct machine *m, unsigned timeout_ms, struct error *err);
/* Handover on the destination: vCPUs run, devices stay paused (nothing leaves; shutdown and reset events are
 * kept back)... */
int machine_start_held(struct machine *m, struct error *err);
/* ...until this. */
int machine_release_effects(struct machine *m, struct error *err);
bool machine_is_running(const struct machine *m);

/* Before machine_slow, as soon as pages are write-protected: what each vCPU dirties counts from here. */
void machine_slow_prepare(struct machine *m);
/* Lets the guest dirty its memory at this part (0 to 1) of what it would at full speed, by holding the vCPUs
 * that dirty most for a part of the time; none runs for less than `least` of it (0.01 at the least). */
int machine_slow(struct machine *m, double speed, double least, struct error *err);
/* All vCPUs run again as they like, at once. Any thread. */
void machine_unslow(struct machine *m);
/* By how many per cent the vCPU that is slowed most is slowed; how many are (vcpus may be NULL). */
unsigned machine_slowed(struct machine *m, unsigned *vcpus);
/* What stopping, draining, saving and loading took when they were done last; before the first time, what is
 * like it or 0. lead_us is left alone. */
void machine_pause_costs(struct machine *m, struct mem_pause_costs *out);

/* What a guest with a balloon is to keep of its memory, and what its driver says that it keeps. */
struct machine_balloon {
	uint64_t target_bytes, actual_bytes;
	bool driver; /* it has one at work */
};
/* False: the machine has no balloon. Never waits. */
bool machine_balloon(struct machine *m, struct machine_balloon *out);
/* Asks the guest to keep so much and no more. -ENOTSUP without a balloon, -EINVAL above what it has. Waits
 * for the device, which may wait for a page that is missing. */
int machine_balloon_set(struct machine *m, uint64_t bytes, struct error *err);

/* ACPI power button. -ENOTSUP if the guest never enabled it cannot be known: returns 0. */
int machine_power_button(struct machine *m);

/* Makes and faults in the memory that a later machine_save needs, while the guest runs. Optional. */
struct state_writer;
int machine_prepare_save(struct machine *m, struct state_writer *w, struct error *err);
/* Paused and drained. The writer's buffer is state_writer's (vmm/state.h). */
int machine_save(struct machine *m, struct state_writer *w, struct error *err);
/* On a created machine that never ran. */
int machine_load(struct machine *m, const void *buf, size_t len, struct error *err);
/* After machine_load of this very state, before the machine runs: saves it again. -EBADMSG naming the section
 * that is not what was loaded, clocks apart; *nsections are the same. May write guest memory, as saving may.
 */
int machine_compare(struct machine *m, const void *buf, size_t len, unsigned *nsections, struct error *err);
/* Fixes clocks for the time that passed while the guest was stopped; call on the destination after load. */
int machine_adjust_clock(struct machine *m, uint64_t stopped_ns, struct error *err);

/* Memory transfer seams. */
struct mem_space machine_memory_space(struct machine *m);
struct dirty_source machine_dirty_source(struct machine *m);

/* Announces every net's MAC by RARP from the destination: at once, then 4 more at 50, 150, 350, 750 ms on a
 * timer thread. */
void machine_announce(struct machine *m);

/* Vendor, model, TSC kHz, CPUID table as set for the guest: for hello. New reference. */
json_t *machine_cpu_describe(struct machine *m, struct error *err);
/* What this host would give a guest, without a machine. */
json_t *machine_cpu_describe_host(struct error *err);
/* Could a guest with `guest` CPU run here? -ENOTSUP with a sentence that names the missing features, vendor
 * or TSC rate. Hostile input. */
int machine_cpu_check(const json_t *guest, struct error *err);

/* For devices (virtio). */
struct guest_memory *machine_memory(struct machine *m);
struct bus *machine_bus(struct machine *m);
struct pci_bus *machine_pci(struct machine *m);
struct irq_router *machine_irq(struct machine *m);
int machine_vm_fd(struct machine *m); /* KVM VM fd: ioeventfds */

#endif
