/* SPDX-License-Identifier: Apache-2.0 */
#ifndef VMM_VM_H
#define VMM_VM_H

#include <jansson.h>
#include <pthread.h>
#include <stdbool.h>

#include "base/error.h"
#include "block/block.h"
#include "block/open.h"
#include "host/config.h"
#include "host/handover.h"
#include "host/record.h"
#include "host/registry.h"
#include "host/vmdef.h"
#include "mirror/mirror.h"
#include "vmm/machine.h"

/* The VM that this process holds: its definition, folder, disks, machine and record. */

struct vm_disk {
	struct block *local;
	struct mirror *mirror;
	struct block *top; /* what the guest's device submits to */
	struct block_image_info info;
	bool shared; /* to be opened while another host uses it */
};

struct move;
struct arrival;

struct vm {
	const struct host_config *cfg;
	struct vm_definition def;
	int dirfd;		       /* the VM's folder; stays valid through a rename */
	char dir[REGISTRY_PATH_BYTES]; /* its path; changes under lock when an arrival gets its place */
	struct vm_disk disks[VM_DISKS_MAX];
	struct machine *machine; /* NULL: cold */
	bool cold;		 /* here for its disks' move alone: the VM is stopped */
	struct record *record;	 /* locked while this process lives */
	uint64_t record_us;	 /* what its last transition took; atomic */

	/* Held by whoever pauses or resumes the guest together with the state that says so. Before every
	 * other lock. */
	pthread_mutex_t run_lock;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	enum vm_state state;
	char state_reason[256];	 /* why it is in doubt or crashed */
	struct move *move;	 /* the last or present one as source; NULL before the first */
	struct arrival *arrival; /* this process began as the destination of a move */
	bool arrived;		 /* this process was the destination of a move and owns the VM now */
	bool quit;		 /* main is to end the process */
	int exit_status;
	bool guest_stopped, guest_crashed; /* events of the machine */
	bool measuring, measure_end;	   /* dirty_rate.c */
	pthread_t forced;		   /* move_forced.c */
	bool forced_started, forced_over, forced_stop, forced_answers;
};

int vm_init(struct vm *vm, const struct host_config *cfg);
void vm_release(struct vm *vm);

/* Relative paths are below the VM's folder. */
int vm_resolve_path(const struct vm *vm, const char *path, char *out, size_t size, struct error *err);
/* The files below a disk, as paths. */
struct vm_backing {
	unsigned n;
	char paths[VM_BACKING_MAX][REGISTRY_PATH_BYTES + 256];
	const char *list[VM_BACKING_MAX];
};
int vm_backing_paths(const struct vm *vm, unsigned disk, struct vm_backing *out, struct error *err);
/* Opens every disk of the definition below vm->dir with its mirror filter. */
int vm_open_disks(struct vm *vm, struct error *err);
/* Stops the guest, if there is one in this process. */
void vm_stop_guest(struct vm *vm);
/* Opens taps, creates the machine around the disks. cpu as machine_config.cpu. */
int vm_create_machine(struct vm *vm, json_t *cpu, struct error *err);
/* Loads the kernel (boot) or only tells the machine where it is for a later reset. */
int vm_load_kernel(struct vm *vm, bool boot, struct error *err);

/* Sets or clears RECORD_POWERED_ON durably: a record that has it without a live VMM is a crashed VM. */
int vm_mark_powered_on(struct vm *vm, bool on, struct error *err);
/* The record as it is now. */
int vm_record(struct vm *vm, struct vm_record *out, struct error *err);
/*
 * One durable transition from the present state and epoch: flags_set are added, flags_clear taken out; peer
 * and address may be NULL (kept), as may folder and reason.
 */
struct vm_transition {
	enum handover_state from, to;
	uint64_t from_epoch, to_epoch;
	uint32_t flags_set, flags_clear;
	const char *peer, *peer_address, *folder, *reason;
};
int vm_record_transition(struct vm *vm, const struct vm_transition *t, struct error *err);

void vm_set_state(struct vm *vm, enum vm_state state, const char *reason);
enum vm_state vm_get_state(struct vm *vm);
/* Ends the process from main once no move is under way. */
void vm_request_quit(struct vm *vm, int exit_status);
/* Commands of people; refused while a move decides (-EBUSY). */
int vm_user_pause(struct vm *vm, struct error *err);
int vm_user_resume(struct vm *vm, struct error *err);
/* What the guest is to keep of its memory (vmm/machine.h). */
int vm_user_balloon(struct vm *vm, json_t *request, struct error *err);
json_t *vm_info(struct vm *vm);

#endif
