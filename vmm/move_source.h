/* SPDX-License-Identifier: Apache-2.0 */
#ifndef VMM_MOVE_SOURCE_H
#define VMM_MOVE_SOURCE_H

/* Private to vmm/move_source*.c: the state of a move at its source. */

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "host/handover.h"
#include "memxfer/memxfer.h"
#include "memxfer/postcopy.h"
#include "net/conn.h"
#include "net/preamble.h"
#include "vmm/move.h"
#include "vmm/move_link.h"
#include "vmm/move_shared.h"
#include "vmm/vm.h"

/* So many silence limits without an outcome and the command is told that it is in doubt. */
#define SETTLE_SILENCES 3

enum move_phase {
	MOVE_CONNECT,	/* hello: nothing is touched before HELLO_OK */
	MOVE_STORAGE,	/* bulk copy and mirroring */
	MOVE_VERIFY,	/* the destination's disks are read again and compared */
	MOVE_MEMORY,	/* pre-copy rounds */
	MOVE_HANDOVER,	/* guest paused, up to READY */
	MOVE_COMMITTED, /* COMMIT may have left: only the destination's word settles */
	MOVE_POSTCOPY,	/* the guest runs there, its last memory is here */
	MOVE_CLEANUP,
	MOVE_ENDED,
};

/* How a disk is to arrive. */
struct source_disk {
	enum move_disk_mode mode;
	char device[MOVE_DEVICE_PATH_BYTES]; /* at the destination */
	struct move_backing below;
	uint64_t below_allocated_bytes;
	struct move_shared shared;
	char shared_folder[MOVE_SHARED_PATH_BYTES];
	bool released; /* fenced and unlocked: the destination's, unless it is taken back */
};
#define SOURCE_LAYERS_MAX (VM_DISKS_MAX * BLOCK_BACKING_MAX)
/* What the guest's stop was made of, in microseconds; the sum is the downtime. */
struct blackout {
	uint64_t quick_us;  /* --quick: all until the handover */
	uint64_t stop_us;   /* vCPUs and devices */
	uint64_t drain_us;  /* requests in flight; the disks agree */
	uint64_t state_us;  /* device state saved */
	uint64_t dirty_us;  /* the last look at the dirty log */
	uint64_t send_us;   /* state and last memory, both in place at the destination */
	uint64_t load_us;   /* device state loaded there */
	uint64_t resume_us; /* COMMIT, clocks, vCPUs go there; and the way back of its word */
};

/* vmm/move_source_pace.c; under the move's lock, but for lead_us: the move's own thread. */
struct source_pace {
	uint64_t predicted_us; /* the downtime, after the last round; 0 = not yet */
	uint64_t judged_us;    /* when that was (clock_now_us) */
	uint64_t lead_us;      /* from then to the pause, the last time */
	bool cancelled;	       /* by --on-exceed cancel */
	unsigned slowed_percent, most_percent;
	uint64_t since_ms, slowed_ms;
};

/* vmm/move_source_postcopy.c */
struct source_postcopy {
	char token[MEM_POSTCOPY_CHANNELS][64];
	bool agreed; /* the destination can */
	bool chosen; /* the memory that is left at the pause goes by post-copy; the move's thread */
	/* under lock */
	struct mem_postcopy_source *pages; /* NULL before it is chosen, and after the end */
	bool began;			   /* pages are missing there */
	bool complete;
	bool stop;	      /* nobody is to be waited for any more */
	struct error failure; /* why the destination never got them */
	uint64_t began_ms, ended_ms;
	struct mem_postcopy_stats stats; /* at the end */
	const uint64_t *later; /* pages that go this way, the sender's; NULL: none. The move's thread */
};

/* vmm/move_source_compare.c: SNM_VERIFY=1 */
struct source_compare {
	bool wanted;
	unsigned chunks, left_out, sections; /* of memory, of device state; 0: not compared (yet) */
};

struct move {
	struct move *former;
	struct vm *vm;
	struct move_options opt;
	struct move_events *events;
	pthread_t thread, ticker;
	bool thread_started, ticker_started;

	pthread_mutex_t lock;
	pthread_cond_t changed;
	enum move_phase phase;
	const char *reached; /* name of the last phase that people were told of */
	bool interrupted;    /* why is the first reason */
	bool cancelled;	     /* by a person */
	struct error why;
	bool deciding;	     /* guest paused for the handover, outcome open */
	bool commit;	     /* a first byte of COMMIT may have left */
	bool settle_started; /* a resolve command may act */
	bool peer_started;   /* the destination said that the VM runs there */
	char resolve[16];    /* asked for by a person */
	struct error resolve_result;
	bool resolve_done;
	unsigned grace_ms[VM_DISKS_MAX];    /* what a guest's write waits for the destination */
	unsigned busy_breaks[VM_DISKS_MAX]; /* sessions that a busy destination let fall silent */
	struct rate_limit bandwidth;	    /* of all disks and the memory */
	struct mem_sender *sender;	    /* under lock while it may be cancelled from outside */
	bool mirrors_on;		    /* mirrors may be cancelled */
	struct source_proof *proof;	    /* vmm/move_source_verify.c; figures under lock */

	struct tls_context *tls;
	const char *control_word; /* of the preamble: how both sides prove themselves */
	char data_address[128];	  /* where the destination takes data channels; "" = as control */
	struct move_link *link;
	unsigned link_users; /* other threads inside the link */
	struct conn *memory[MEM_STREAMS_MAX];
	unsigned nmemory;
	char disk_token[VM_DISKS_MAX][64];
	char memory_token[MEM_STREAMS_MAX][64];
	struct source_disk disks[VM_DISKS_MAX];
	char layer_token[SOURCE_LAYERS_MAX][64]; /* disk by disk, nearest first */
	unsigned nlayers;
	struct mirror *layer_mirror;		      /* under lock: of the file that is copied now */
	uint64_t layer_total_bytes, layer_done_bytes; /* under lock: allocated */
	uint64_t layer_counted_bytes;
	uint64_t layer_copied_bytes; /* data that travelled */

	/* figures */
	uint64_t t_start_ms, t_storage_ms, t_memory_ms; /* when each phase began */
	uint64_t pause_us, ready_us, running_us;	/* clock_now_us: pause, READY, vCPUs go */
	uint64_t disk_bytes, wire_bytes;
	uint64_t mirrored_bytes; /* of disk_bytes: a guest's writes */
	struct {
		uint64_t copied, mirrored;
	} counted[VM_DISKS_MAX]; /* of a mirror's present figures */
	struct mem_stats mem;
	double percent;	 /* what was shown last; never falls */
	bool negotiated; /* HELLO_OK was received */
	/* attempts after a lost link; the move's own thread */
	uint64_t first_epoch, retry_until_ms, best_synced;
	unsigned tries, retries_in_vain;
	bool negotiated_now; /* HELLO_OK of this attempt */
	bool handover_begun;
	bool rehearsed;		    /* up to the handover, which was not meant to be */
	bool deltas_agreed;	    /* the destination takes what changed of a page */
	bool resumed[VM_DISKS_MAX]; /* the destination kept the disk of an earlier attempt */
	bool paused_by_us, was_paused;
	unsigned attempts;
	struct blackout blackout; /* of the last attempt */
	struct source_pace pace;
	struct source_postcopy postcopy;
	struct source_compare compare;
};

/* Ends what is under way before COMMIT: mirrors, sender, link waits. The first reason stays. Any thread. */
void source_interrupt(struct move *mv, const struct error *why);
/* The reason, if there is one: 0 or its code. */
int source_check(struct move *mv, struct error *err);
/* name: a literal. */
void source_set_phase(struct move *mv, enum move_phase phase, const char *name);

void source_link_failed(void *opaque, const struct error *why);
/* Tells the destination the phase and waits until it is ready for it. */
int source_phase_with_peer(struct move *mv, const char *phase, struct error *err);

/* What the command hears, told once everything has ended. */
struct outcome {
	const char *result;
	int exit_status;
};

/* "bandwidth_bytes_per_s" of o, which must be an integer if it is there; *out stays as it is without it. */
int source_parse_bandwidth(json_t *o, uint64_t *out, struct error *err);

/* move_source_delta.c */
int source_delta_parse(json_t *o, struct move_options *opt, struct error *err);
/* How many bytes of former pages are kept for a guest of that memory. */
uint64_t source_delta_bytes(const struct move_options *opt, uint64_t memory_bytes);
void source_delta_hello(const struct move *mv, json_t *hello);
void source_delta_accepted(struct move *mv, const json_t *hello_ok);

/* move_source_compare.c */
/* Before hello: whether SNM_VERIFY asks for it. */
void source_compare_hello(struct move *mv, json_t *hello);
int source_compare_accepted(const struct move *mv, const json_t *hello_ok, struct error *err);
/* READY has come: hashes of everything go to the destination, which compares. state: as it was sent. */
int source_compare(struct move *mv, const void *state, size_t len, struct error *err);
/* What came of it, for the last line; or nothing. */
void source_compare_result(const struct move *mv, json_t *ev);

/* move_source_retry.c */
/* Whether it is the link that failed, and not a host that said no. */
bool source_link_lost(const struct error *why);
/* After a failed attempt, with its reason: closes it and waits. False: the move is over, for the reason in
 * err. */
bool source_try_again(struct move *mv, struct error *err);

/* move_source_hello.c: connects, proves, says hello, sends the files. */
int source_hello(struct move *mv, struct error *err);

/* Of the protocol, as hello offers it: the lowest that says all that this move needs. */
unsigned source_protocol(const struct move *mv);

/* move_source_disks.c: how each disk arrives, from the options, before the destination hears of anything. */
int source_disks_plan(struct move *mv, struct error *err);
/* Adds to hello's object of the disk what is not its shape. */
void source_disk_describe(struct move *mv, unsigned disk, json_t *o);
/* What the destination made of it, and its tokens for the files below. */
int source_disks_accepted(struct move *mv, json_t *hello_ok, struct error *err);
/* Whether every image is still the file that was opened, with the length that it has to have. */
int source_images_check(struct move *mv, struct error *err);
/* Copies the files below the disks, before the disks. */
int source_layers_copy(struct move *mv, struct error *err);

/* move_source_handover.c */
/* Pre-copy, pause, last memory and state: 0 = READY. */
int source_handover(struct move *mv, struct error *err);
/* move_source_shared.c: disks that both hosts see */
bool source_is_shared(const struct move *mv, unsigned disk);
/* Before the destination hears of anything: without --with-storage every disk has to be one. */
int source_shared_plan(struct move *mv, struct error *err);
/* The second names, for hello; and away with them. */
int source_shared_challenge(struct move *mv, struct error *err);
void source_shared_withdraw(struct move *mv);
/* While the guest runs: what the flush in the pause need not do. */
int source_shared_flush(struct move *mv, struct error *err);
/* In the pause, nothing in flight: flushed, fenced, unlocked. */
int source_shared_release(struct move *mv, struct error *err);
/* The record says that the VM stays: locked again, however long that takes, before the guest runs. */
void source_shared_take_back(struct move *mv);
/* New reference, NULL: none. */
json_t *source_shared_paths(const struct move *mv);
/* move_source_quick.c */
int source_quick_parse(json_t *o, struct move_options *opt, struct error *err); /* after "postcopy" */
/* With --quick: the guest stands still from here on. */
int source_quick_pause(struct move *mv, struct error *err);
/* Of a guest that runs: -EINVAL where nothing limits for how long it may. */
int source_quick_options(const struct move_options *opt, struct error *err);
/* mv->lock held. When it has for as long as it may; UINT64_MAX while there is no such time. */
uint64_t source_quick_deadline_ns(const struct move *mv);
/* Ends the move if that time is over. */
void source_quick_expire(struct move *mv);
/* move_source_handover.c: the guest goes on here, if it was this move that stopped it. */
void source_unpause(struct move *mv);
/* move_source_cold.c: of a VM that is stopped */
/* What only a guest that runs could mean: -EINVAL. */
int source_cold_options(const struct vm *vm, const struct move_options *opt, struct error *err);
/* From disks that agree to READY: 0. */
int source_handover_cold(struct move *mv, struct error *err);
/* move_source_handover.c */
/* owner(e) -> handing-over(e), once. */
int source_record_handing_over(struct move *mv, struct error *err);
/* Sends COMMIT and learns the outcome: 0 = the destination owns the VM; -ECANCELED = it promised not to;
 * -EOWNERDEAD = undecided. */
int source_commit(struct move *mv, struct error *err);
/* Memory, disks, control: closes them and adds up what they carried. The two that follow do it, too. */
void source_close_channels(struct move *mv);
struct outcome source_end_failed(struct move *mv, const struct error *why);
int source_end_moved(struct move *mv, struct error *err);

/* move_source_pace.c */
/* "priority" and "on_exceed" of o. */
int source_parse_pace(json_t *o, struct move_options *opt, struct error *err);
/* Budget, limits and brake. */
void source_pace_options(struct move *mv, struct mem_sender_options *so);
/* After rounds: is the guest to be stopped now? -ECANCELED with the reason: --on-exceed says no. */
int source_pace_judge(struct move *mv, bool limit_hit, struct error *err);
void source_pace_paused(struct move *mv);  /* just now; it runs at full speed when it runs again */
void source_pace_again(struct move *mv);   /* before more rounds, after a pause: what that cost counts */
void source_pace_release(struct move *mv); /* the guest runs at full speed */
/* Adds what there is to tell; mv->lock held. */
void source_pace_progress(struct move *mv, json_t *ev);
void source_pace_result(struct move *mv, json_t *ev);

/* move_source_storage.c */
/* broken_ms: when the session before it broke, in this attempt (clock_now_ms); 0: the first one. */
int source_storage_open(struct move *mv, unsigned disk, uint64_t broken_ms, struct error *err);
int source_storage_sync(struct move *mv, struct error *err); /* until every chunk of every disk is synced */
/* As sync, then every disk flushed at the destination; later guest flushes go to both. */
int source_storage_flush(struct move *mv, struct error *err);
bool source_storage_consistent(struct move *mv);
void source_storage_stop(struct move *mv);
/* A disk channel with an NBD client on it. */
int source_remote_open(struct move *mv, const char *token, const char *export_name, uint64_t size_bytes,
		       struct block **out, struct error *err);
int source_dial(struct move *mv, enum channel channel, const char *token, struct conn **out,
		struct error *err);

/* move_source_verify.c */
int source_proof_create(struct move *mv, struct error *err);
void source_proof_free(struct move *mv);
void source_proof_peer(struct move *mv, const struct conn *control); /* who it is, for the receipt */
uint64_t source_proof_seed(const struct move *mv);		     /* of all hashes of the move */
uint32_t source_chunk_bytes(uint64_t disk_bytes);		     /* of its mirror and its hashes */
/* FRAME_HASHES, from the link's reading thread. */
int source_hashes_frame(struct move *mv, const struct frame *f, struct error *err);
/* For a mirror_verify of that disk with the destination's answers. */
void source_verify_options(struct move *mv, unsigned disk, bool adopt, struct mirror_verify_options *out);
/* Flushes (source_storage_flush) and compares until all is verified. -EILSEQ: a disk differs. */
int source_verify(struct move *mv, struct error *err);
bool source_verified(struct move *mv);
/* With the guest paused and the disks drained: false if not all is verified. */
bool source_take_sums(struct move *mv);
int source_send_sums(struct move *mv, struct error *err);
void source_proof_ready(struct move *mv); /* the destination agreed */
void source_verify_progress(struct move *mv, uint64_t *done, uint64_t *total);
json_t *source_proof_json(const struct move *mv); /* mv->lock held; new reference */

/* Adds up what the disks carried; mv->lock held. May be called again. */
void source_count_disks(struct move *mv);

/* move_source_postcopy.c */
int source_postcopy_parse(json_t *o, struct move_options *opt,
			  struct error *err); /* "postcopy" of o, after "on_exceed" */
/* What the destination said to it in HELLO_OK: -EOPNOTSUPP where --postcopy now cannot be. */
int source_postcopy_accepted(struct move *mv, json_t *hello_ok, struct error *err);
unsigned source_postcopy_rounds(const struct move *mv); /* of pre-copy */
/* Rounds before the pause: that one more is worth while. */
bool source_postcopy_catches_up(const struct move *mv);
/* Before the pause: chooses, and makes everything for it. */
int source_postcopy_prepare(struct move *mv, struct error *err);
/* In the pause, if it was chosen, instead of mem_sender_finish. */
int source_postcopy_send(struct move *mv, struct error *err);
/* Pages are missing at the destination, and may be had here; any thread. */
bool source_postcopy_open(struct move *mv);
/* After COMMIT: waits until the destination has every page, or never will have (then its guest is gone). */
void source_postcopy_finish(struct move *mv);
/* What a destination says of itself after COMMIT of that epoch: 0 its guest waits for pages; 1 it has them
 * all; -EAGAIN it has not decided; -EOWNERDEAD it will never want one. Pure. */
int source_postcopy_judge(const struct handover_report *r, uint64_t epoch);
/* {"cmd":"resolve"} meanwhile. */
int source_postcopy_resolve(struct move *mv, const char *how, struct error *err);
void source_postcopy_close(struct move *mv); /* and adds up what it carried */
/* Figures; mv->lock held. New reference, or NULL if there was none. */
json_t *source_postcopy_json(struct move *mv);

/* move_source_report.c */
uint64_t source_populated_bytes(struct vm *vm);
/* The figures of the last line, as they are now. New reference. */
json_t *source_figures(struct move *mv);
int source_ticker_start(struct move *mv);
void source_ticker_stop(struct move *mv);
void source_emit_end(struct move *mv, const char *result, int exit_status, const char *reason, bool final);

/* move_source_settle.c: after COMMIT without an answer. Returns when the record is settled or a person
 * decided. */
enum handover_action source_settle(struct move *mv, struct error *err);

#endif
