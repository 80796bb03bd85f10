/* SPDX-License-Identifier: Apache-2.0 */
/* interface: the durable record that says who may run a VM */
#ifndef HOST_RECORD_H
#define HOST_RECORD_H

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "host/vmdef.h"

/*
 * One record per VM and host, STATE_DIR/records/UUID: two slots of 4096 bytes, written alternately with
 * O_DIRECT|O_DSYNC, each with a sequence number and an XXH3-64 checksum, so that a torn write leaves the one
 * before it. Where the filesystem refuses O_DIRECT the slot is written through the page cache with O_DSYNC.
 *
 * The live snvmm of the VM holds the record's lock from start to end; whoever else wants to write (the
 * daemon, an ASK's snvmm) takes the lock first, which proves that the snvmm is dead. Nobody answers a peer
 * from a record that it has not locked. docs/handover.md has the states and what each means.
 */

/* The numbers are on disk: append, never renumber. handover.h has names and allowed transitions. */
enum handover_state {
	HANDOVER_NONE = 0,	   /* no record: this host knows nothing of the VM */
	HANDOVER_OWNER = 1,	   /* this host's copy is the VM */
	HANDOVER_HANDING_OVER = 2, /* source: COMMIT may have been sent; only the peer's word settles it */
	HANDOVER_MOVED = 3,	   /* source: the peer owns it; tombstone until acknowledged */
	HANDOVER_PREPARED = 4,	   /* destination: becomes owner by COMMIT, or abandoned */
	HANDOVER_OWNER_UNCONFIRMED = 5, /* owner, but the peer is not known to know it */
	HANDOVER_ABANDONED = 6,		/* destination: "I did not start this epoch and never will" */
};
#define HANDOVER_STATES 7

/* Flags, on disk too. */
#define RECORD_POWERED_ON   (1u << 0) /* the guest is meant to run; without a live snvmm it has crashed */
#define RECORD_KEEP_SOURCE  (1u << 1) /* moved: files go to kept/ instead of being deleted */
#define RECORD_FILES_DONE   (1u << 2) /* moved, abandoned: nothing of the folder is left to clean */
#define RECORD_PEER_STARTED (1u << 3) /* moved: the peer said that the VM runs there; files may go */
#define RECORD_PEER_ACKED   (1u << 4) /* moved: the peer has `owner` durably; the tombstone may go */
#define RECORD_FORCED	    (1u << 5) /* owner-unconfirmed by resolve --run-here */
#define RECORD_HIGHER_SEEN  (1u << 6) /* owner-unconfirmed: the peer showed a higher epoch; in doubt */
#define RECORD_COLD                                                                                          \
	(1u                                                                                                  \
	 << 7) /* owner, prepared: this epoch moves the VM while it is stopped (docs/handover.md, *Cold*) */
#define RECORD_FLAGS_KNOWN 0xffu

#define RECORD_SLOT_BYTES     4096
#define RECORD_FORMAT_VERSION 1

struct vm_record {
	char uuid[VM_UUID_CHARS + 1]; /* lower case */
	enum handover_state state;
	uint64_t epoch;
	uint64_t peer_epoch; /* the highest epoch that the peer showed; with HIGHER_SEEN above ours */
	uint64_t sequence;   /* set by load and by every write; what the caller puts there is ignored */
	uint32_t flags;	     /* RECORD_* */
	char name[VM_NAME_MAX_CHARS + 1];
	char peer[64]; /* the other side's host name, as its certificate says; "" when there is none */
	char peer_address[128]; /* HOST:PORT where the other side is asked */
	char folder[256]; /* relative to the state directory: vms/NAME, incoming/UUID-EPOCH, kept/NAME-EPOCH
			   */
	char reason[256]; /* why it is in this state, a sentence for people; "" when nothing to say */
	uint64_t created_ns; /* CLOCK_REALTIME; set by record_create */
	uint64_t changed_ns; /* set by every write */
};

struct record; /* an open record; calls from several threads are serialised */

/*
 * Makes the record of init->uuid (state owner or prepared) durable, directory entry included, and returns it
 * locked. Creates STATE_DIR/records when missing. -EEXIST when there is one already; -EBUSY when another is
 * just creating it.
 */
int record_create(const char *state_dir, const struct vm_record *init, struct record **out,
		  struct error *err);
/* Opens without locking. -ENOENT when there is none, -EINVAL for a malformed uuid. */
int record_open(const char *state_dir, const char *uuid, struct record **out, struct error *err);
/*
 * Takes the lock, waiting at most timeout_ms (0: not at all); -EBUSY when another process, or another struct
 * record of this one, still has it then; -ENOENT when the record was removed meanwhile. What is found is
 * first written once more, so that a write which a killed process left between cache and medium is durable
 * before anybody acts on it. The lock ends with record_unlock, record_close, or the process (it is not
 * inherited through exec).
 */
int record_lock(struct record *r, unsigned timeout_ms, struct error *err);
void record_unlock(struct record *r);
/* 1 if somebody else holds the lock (the snvmm lives), 0 if not, negative errno. Does not disturb anyone; may
 * be stale at once. */
int record_is_held(struct record *r, struct error *err);
/*
 * The newest valid slot. With the lock: what was last written durably. Without: a hint, perhaps stale, for
 * display. -EUCLEAN when neither slot is valid, -EPROTONOSUPPORT when a newer version wrote it: both leave
 * the VM in doubt.
 */
int record_load(struct record *r, struct vm_record *out, struct error *err);
/*
 * Needs the lock. Rewrites everything but uuid, state and epoch, which must equal the current ones (-EINVAL).
 * Durable on return. After -EIO (or any other failed write) nobody knows which content the medium holds:
 * every later write and load through this struct record fails with -EIO until record_reload succeeds.
 */
int record_store(struct record *r, const struct vm_record *to, struct error *err);
/*
 * Needs the lock. After a failed write: reads the medium again under the lock held all along, and makes what
 * it finds durable. 0 ends the failure; then decide anew from *out. Otherwise still in doubt, -EIO or the
 * like.
 */
int record_reload(struct record *r, struct vm_record *out, struct error *err);
/*
 * Needs the lock. If the record is in (from, from_epoch), writes `to` durably, as record_store, and logs one
 * line. -ESTALE when it is in another state or epoch: *actual (may be NULL) then gets it. -EINVAL for a
 * transition that handover.h does not allow. `to` may be a changed copy of what record_load gave.
 */
int record_compare_and_set(struct record *r, enum handover_state from, uint64_t from_epoch,
			   const struct vm_record *to, struct vm_record *actual, struct error *err);
/* Needs the lock. Unlinks and makes that durable; the record stays open for record_close only. -EINVAL unless
 * the state allows none. */
int record_remove(struct record *r, struct error *err);
/* NULL is fine. */
void record_close(struct record *r);
/* Whether O_DIRECT is in use (for the log and the tests). */
bool record_is_direct(const struct record *r);

/*
 * Calls each() with every record's uuid (sorted); a non-zero return stops and is returned. 0 when the
 * directory is missing. Left-overs of interrupted creations and foreign names are passed over.
 */
int record_list(const char *state_dir, int (*each)(void *opaque, const char *uuid), void *opaque,
		struct error *err);

/* Pure, for unit tests and the fuzzer. decode: -EUCLEAN for anything that encode would not have made, but
 * -EPROTONOSUPPORT for a sound slot of a newer format. */
void record_encode(const struct vm_record *rec, uint8_t slot[RECORD_SLOT_BYTES]);
int record_decode(const uint8_t slot[RECORD_SLOT_BYTES], struct vm_record *out, struct error *err);

#endif
