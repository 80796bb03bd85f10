/* SPDX-License-Identifier: Apache-2.0 */
#ifndef VMM_MOVE_DESTINATION_H
#define VMM_MOVE_DESTINATION_H

/* Private to vmm/move_destination*.c: the state of an arriving VM. */

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "host/handover.h"
#include "host/jsonl.h"
#include "host/partial.h"
#include "host/registry.h"
#include "memxfer/memxfer.h"
#include "memxfer/postcopy.h"
#include "nbd/nbd.h"
#include "net/conn.h"
#include "net/preamble.h"
#include "vmm/move.h"
#include "vmm/move_link.h"
#include "vmm/move_shared.h"
#include "vmm/vm.h"

#define ARRIVAL_FILES_MAX 2
/* The daemon may have to clean up first; if it dies, its stream ends at once. The source hears beats
 * meanwhile. */
#define DAEMON_ANSWER_MS 30000

struct arrival_file {
	char name[16];
	uint64_t size, received;
	int fd;
};

/* How a disk arrives, as hello says. */
struct arrival_disk {
	enum move_disk_mode mode;
	char device[MOVE_DEVICE_PATH_BYTES];
	struct move_backing below;
	struct move_shared shared;
	uint64_t shared_device, shared_inode; /* what was found of it here */
};
#define ARRIVAL_LAYERS_MAX (VM_DISKS_MAX * BLOCK_BACKING_MAX)

/* What has been done, in this order and once each, whatever the peer asks for. */
enum arrival_stage { ARRIVAL_OPENED, ARRIVAL_STORAGE, ARRIVAL_MEMORY, ARRIVAL_PREPARED, ARRIVAL_LOADED };

struct arrival {
	struct vm *vm;
	struct jsonl *daemon;
	struct tls_context *tls;
	char peer[HOST_NAME_MAX_CHARS + 1];
	char peer_address[128];
	char fingerprint[80];
	uint64_t epoch;
	uint64_t begun_ms;
	struct move_link *link;

	/* from hello */
	bool suspend, no_tls;
	bool deltas; /* pages may come as what changed of them */
	bool verify; /* memory and device state are compared before COMMIT */
	enum move_purpose purpose;
	unsigned nstreams;
	struct arrival_file files[ARRIVAL_FILES_MAX];
	unsigned nfiles;
	struct block_image_info shape[VM_DISKS_MAX];
	unsigned version;   /* of the protocol, chosen here */
	uint64_t hash_seed; /* from version 2 on, as the chunks */
	uint32_t chunk_bytes[VM_DISKS_MAX];
	struct arrival_disk disks[VM_DISKS_MAX];
	unsigned nlayers; /* files below disks that travel along */
	uint64_t *regions;
	uint64_t nregions;
	struct mem_prefault *prefault;
	json_t *cpu;
	uint64_t keep_s; /* its disks, should it fail */

	/* made here */
	char rel[REGISTRY_FOLDER_BYTES]; /* incoming/UUID-EPOCH; "" until the folder exists */
	bool admitted;
	bool resumed[VM_DISKS_MAX]; /* the image is one that was kept of an earlier attempt */
	char disk_token[VM_DISKS_MAX][TOKEN_HEX_CHARS + 1];
	char memory_token[MEM_STREAMS_MAX][TOKEN_HEX_CHARS + 1];
	char layer_token[ARRIVAL_LAYERS_MAX][TOKEN_HEX_CHARS + 1]; /* disk by disk, nearest first */
	pthread_t router, confirmer, rereader;
	bool router_started, confirmer_started, rereader_started;
	struct mem_receiver *receiver;
	struct arrival_hash *hash; /* NULL: a source of version 1 */
	/* move_destination_postcopy.c; not agreed: faults_fd is -1 */
	int faults_fd;
	struct error postcopy_refused; /* asked for, and why not */
	char postcopy_token[MEM_POSTCOPY_CHANNELS][TOKEN_HEX_CHARS + 1];
	struct mem_postcopy_dest *postcopy; /* with the receiver */
	pthread_t pager;
	bool pager_started;
	enum arrival_stage stage; /* atomic */
	struct frame state;	  /* with `verify`: the device state that was loaded */
	uint64_t *later;	  /* likewise: the pages that were missing then; NULL: none */

	pthread_mutex_t note_lock; /* over the writing of a last line by arrival_note_owned */
	json_t *figures;	   /* note_lock: the source's, with MOVED */

	pthread_mutex_t lock;
	pthread_cond_t changed;
	struct nbd_server *nbd[VM_DISKS_MAX];
	bool assembled; /* disks and machine are there */
	/* the file below a disk that is being filled; the router's thread opens it */
	unsigned layers_begun; /* in order of copying */
	struct block *layer;
	struct nbd_server *layer_nbd;
	struct conn *memory[MEM_STREAMS_MAX];
	unsigned nmemory;
	bool closing;	    /* the process ends */
	bool channels_over; /* no further one is taken */
	bool memory_void;   /* pages that were missing have been given up, before COMMIT */
	bool channel_up;    /* control */
	bool commit;	    /* COMMIT was read */
	bool abandoned;	    /* durably */
	bool owner;	    /* durably; also read without the lock, atomically */
	bool write_failed;  /* the owner record could not be written: nobody knows */
	bool confirmed;
	bool answers; /* the source does, at the last question */
	char resolve[16];
};

/* move_destination_prepare.c: reads hello, checks everything, opens every object. The error is the refusal's
 * sentence. */
int arrival_read_hello(struct arrival *a, json_t *hello, struct error *err);
int arrival_build(struct arrival *a, json_t *hello, struct error *err);

/* move_destination_partial.c */
/* Ends an earlier attempt of the same source that this host has not given up yet. */
void arrival_supersede(struct arrival *a, json_t *hello);
/* What is there already of the disks, in bytes, and would be taken up. Removes what would not. */
uint64_t arrival_partial_bytes(struct arrival *a);
/* Makes the folder `rel` of what is kept of an earlier attempt: 0, or -ENOENT when there is nothing fit; sets
 * a->resumed for the disks whose image stayed. */
int arrival_take_partial(struct arrival *a, const char *rel, struct error *err);
/* A resumed disk whose image turns out not to be whole is made anew. */
void arrival_check_resumed(struct arrival *a);
/* Notes in the folder what may be kept of it. */
int arrival_note_partial(struct arrival *a, struct error *err);
/* Opens the disks and makes the machine around them: from arrival_build, or, where files below them travel
 * along, once those are there. */
int arrival_assemble(struct arrival *a, struct error *err);

/* move_destination_disks.c */
/* The part of hello's disk that is not its shape. */
int arrival_read_disk(struct arrival *a, unsigned disk, json_t *o, struct error *err);
uint64_t arrival_layers_bytes(const struct arrival *a);
/* Nothing but images of their own: the others are not kept of an attempt that failed. */
bool arrival_all_files(const struct arrival *a);
/* Finds what is to be reused, makes the images that are not there of an earlier attempt. */
int arrival_make_images(struct arrival *a, struct error *err);
/* A channel for a file below a disk. conn is taken over. */
int arrival_layer_add(struct arrival *a, unsigned layer, struct conn *conn, struct error *err);
void arrival_layer_close(struct arrival *a);
/* Every file below has been filled and is closed. */
int arrival_layers_done(struct arrival *a, struct error *err);

/* move_destination_shared.c: disks that both hosts see */
bool arrival_is_shared(const struct arrival *a, unsigned disk);
/* Its part of hello. */
int arrival_read_shared(struct arrival *a, unsigned disk, json_t *o, struct error *err);
/* Opened: whether it is the file that was found, with O_DIRECT. */
int arrival_check_shared(struct arrival *a, struct error *err);
/* Before READY: the source has given its locks back. */
int arrival_lock_shared(struct arrival *a, struct error *err);
/* This host is the owner, durably: its guest may write. */
void arrival_unfence_shared(struct arrival *a);

/* move_destination_channels.c */
/* The other side's end of a data channel, proved; fd is taken over. */
int arrival_accept(struct arrival *a, int fd, struct conn **out, struct error *err);
int arrival_tokens(struct arrival *a, struct error *err); /* makes and registers them, starts the router */
int arrival_receiver_start(struct arrival *a,
			   struct error *err); /* waits until all memory channels are there */
void arrival_storage_stop(struct arrival *a);  /* the fence: nothing of the peer writes afterwards */
void arrival_channels_close(struct arrival *a);

/* move_destination_postcopy.c */
/* Before the machine is made: sees whether it can be done here, if hello asks for it. */
void arrival_postcopy_open(struct arrival *a, json_t *hello);
int arrival_postcopy_memory(struct arrival *a, struct error *err); /* the machine is made, and empty */
int arrival_postcopy_create(struct arrival *a, struct error *err); /* with the receiver of memory */
/* Of which channel the token is; MEM_POSTCOPY_CHANNELS: of none. */
unsigned arrival_postcopy_token(const struct arrival *a, const char *token);
/* A channel of the source; conn is taken over. */
int arrival_postcopy_add(struct arrival *a, unsigned channel, struct conn *conn, struct error *err);
/* The last round is here: from now on who touches a page that it only named waits for it. */
int arrival_postcopy_begin(struct arrival *a, struct error *err);
bool arrival_is_paging(struct arrival *a);					/* any thread */
bool arrival_postcopy_stats(struct arrival *a, struct mem_postcopy_stats *out); /* false: not agreed on */
/* Of a VM that never ran: nothing waits for pages any more. Any thread. */
void arrival_postcopy_abort(struct arrival *a);
/* The VM is owned here: waits for its pages in the background, then closes the channels. */
int arrival_postcopy_start(struct arrival *a, struct error *err);
void arrival_postcopy_free(struct arrival *a); /* idempotent; before the machine goes */

/* move_destination.c: what the VM is once this host owns it. */
enum vm_state arrival_state(const struct arrival *a);
/* move_destination.c: the VM's folder gets its place; everything in it can be done again by a daemon that
 * finds it undone. */
void arrival_settle_in(struct arrival *a);

/* move_destination_check.c */
/* Why the daemon would not let this VM in now: array of sentences, new reference. */
json_t *arrival_refusals(struct arrival *a, const char *uuid, const char *name, uint64_t memory_bytes);
/* Answers the CHECK that a connection began with; takes conn over. */
int arrival_answer_check(struct arrival *a, struct conn *conn, const struct frame *check, struct error *err);

/* move_destination_compare.c: a VERIFY. Takes device state that was loaded over for it; compares and answers.
 */
void arrival_compare_keep(struct arrival *a, struct frame *state);
int arrival_compare(struct arrival *a, const struct frame *verify, struct error *err);

/* move_destination_report.c */
/* What the journal reads of this arrival: its last line, in the state directory. `figures` are the source's,
 * as it sent them; may be NULL. */
void arrival_note_end(struct arrival *a, const char *result, int exit_status, const char *reason,
		      const json_t *figures);
/* The last line of an arrival that owns the VM. While pages are missing it is that of a guest that crashed,
 * with "provisional": this process could not write it any more then. To be called again when they are here.
 * `figures` as above, remembered. Any thread. */
void arrival_note_owned(struct arrival *a, const json_t *figures);
const char *arrival_stage_name(struct arrival *a);

/* move_destination_reread.c: the owner record could not be written, so nobody knows what the medium holds:
 * reads it again every second under its lock, until it tells. */
int arrival_reread_start(struct arrival *a, struct error *err);

/* move_destination_confirm.c: from owner-unconfirmed to owner */
int arrival_confirm_start(struct arrival *a, struct error *err);
/* One step by the rules with what the peer said; any thread. Returns the action taken. */
enum handover_action arrival_settle(struct arrival *a, const struct handover_report *report,
				    struct error *err);
/* Asks the source what it says of itself, and tells what this side does. Any thread. */
int arrival_ask(struct arrival *a, struct handover_report *answer, struct error *err);
/* prepared -> abandoned, durably, unless COMMIT was read. */
int arrival_abandon(struct arrival *a, const char *why, struct error *err);

#endif
