/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/move_destination.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/cond.h"
#include "base/clock.h"
#include "base/confine.h"
#include "base/fault.h"
#include "base/log.h"
#include "host/administer.h"
#include "host/ask.h"
#include "host/exit.h"
#include "host/trust.h"
#include "host/trust_renew.h"
#include "vmm/control.h"
#include "vmm/move_destination_hash.h"

#define PROOF_TIMEOUT_MS 10000

/* --- frames that come any time --- */

static int file_frame(struct arrival *a, const struct frame *f, struct error *err)
{
	if (f->len < 12)
		return error_set(err, EPROTO, "file: a frame of %u bytes", f->len);
	uint32_t index = get_be32(f->payload), len = f->len - 12;
	uint64_t offset = get_be64(f->payload + 4);
	if (index >= a->nfiles || a->files[index].fd < 0)
		return error_set(err, EPROTO, "file: no file %u", index);
	struct arrival_file *file = &a->files[index];
	if (offset != file->received || !range_fits(offset, len, file->size))
		return error_set(err, EPROTO, "file %s: %u bytes at %llu of %llu", file->name, len,
				 (unsigned long long)offset, (unsigned long long)file->size);
	for (uint32_t at = 0; at < len;) {
		ssize_t n = pwrite(file->fd, f->payload + 12 + at, len - at, (off_t)(offset + at));
		if (n < 0)
			return error_errno(err, errno, "file %s: write at %llu", file->name,
					   (unsigned long long)(offset + at));
		at += (uint32_t)n;
	}
	file->received += len;
	return 0;
}

static int any_frame(void *opaque, const struct frame *f, struct error *err)
{
	if (f->type == FRAME_FILE)
		return file_frame(opaque, f, err);
	if (f->type == FRAME_HASH_ASK)
		return arrival_hash_ask(opaque, f, err);
	return error_set(err, EPROTO, "control channel: unexpected %s", frame_type_name(f->type));
}

static void link_failed(void *opaque, const struct error *why)
{
	struct arrival *a = opaque;
	log_info("%s", why->message);
	pthread_mutex_lock(&a->lock);
	a->channel_up = false;
	struct mem_receiver *r = a->commit ? NULL : a->receiver;
	bool give_up = !a->commit && a->postcopy;
	a->memory_void |= give_up;
	pthread_cond_broadcast(&a->changed);
	/* Wakes a receiver that waits for memory which will not come. */
	if (r)
		for (unsigned i = 0; i < a->nstreams; i++)
			if (a->memory[i])
				conn_shutdown(a->memory[i]);
	pthread_mutex_unlock(&a->lock);
	/* ... and whoever waits for a page. */
	if (give_up)
		arrival_postcopy_abort(a);
}

/* Not where the whole move may be over before it would pay: the kernel works for milliseconds on end at it,
 * on a processor that may be some guest's. */
#define PREFAULT_DELAY_MS 250

/* Beside the copy of the disks. Nothing is lost but time where it fails. */
static void prefault_start(struct arrival *a)
{
	struct mem_prefault_options opt = {
		.space = machine_memory_space(a->vm->machine),
		.regions = a->regions,
		.nregions = a->nregions,
		.delay_ms = PREFAULT_DELAY_MS,
		.huge = a->faults_fd < 0,
	};
	struct error err = ERROR_INIT;
	if (mem_prefault_start(&opt, &a->prefault, &err))
		log_warn("%s", err.message);
}

static void prefault_stop(struct arrival *a)
{
	struct error err = ERROR_INIT;
	if (a->prefault && mem_prefault_stop(a->prefault, &err))
		log_warn("%s", err.message);
}

/* --- phases --- */

static int phase_storage(struct arrival *a, struct error *err)
{
	for (unsigned i = 0; i < a->nfiles; i++) {
		struct arrival_file *f = &a->files[i];
		if (f->received != f->size)
			return error_set(err, EPROTO, "file %s: %llu of %llu bytes came", f->name,
					 (unsigned long long)f->received, (unsigned long long)f->size);
		if (fsync(f->fd))
			return error_errno(err, errno, "file %s", f->name);
	}
	int rc = arrival_layers_done(a, err);
	if (!rc && a->nlayers)
		rc = arrival_assemble(a, err);
	if (!rc)
		rc = arrival_note_partial(a, err);
	if (rc)
		return rc;
	arrival_hash_open(a);
	if (a->vm->cold)
		return 0;
	prefault_start(a);
	return 0;
}

/* Everything that the VM needs to start here is durable when this returns, and so is the record that says so.
 */
static int phase_prepare(struct arrival *a, struct error *err)
{
	struct vm *vm = a->vm;
	int rc = 0;
	prefault_stop(a);
	for (unsigned i = 0; !rc && i < vm->def.ndisks; i++) {
		rc = block_flush(vm->disks[i].local);
		if (rc)
			error_errno(err, rc, "disk %s: flush", vm->def.disks[i].id);
	}
	if (!rc && fsync(vm->dirfd))
		rc = error_errno(err, errno, "%s", vm->dir);
	return rc;
}

/* It comes ahead of the last memory: loaded once that is here. */
static int take_device_state(struct arrival *a, const struct frame *f, uint64_t *load_us, struct error *err)
{
	if (a->stage != ARRIVAL_PREPARED || !arrival_hash_agreed(a))
		return error_set(err, EPROTO, "device state out of turn");
	if (a->vm->cold) {
		if (f->len)
			return error_set(err, EPROTO, "device state of a VM that is stopped");
		int locked = arrival_lock_shared(a, err);
		if (locked)
			return locked;
		__atomic_store_n(&a->stage, ARRIVAL_LOADED, __ATOMIC_RELAXED);
		return 0;
	}
	int rc = mem_receiver_wait(a->receiver, err);
	if (rc)
		return error_prefix(err, "memory");
	rc = arrival_lock_shared(a, err);
	if (!rc)
		rc = arrival_postcopy_begin(a, err);
	if (rc)
		return rc;
	uint64_t before = clock_now_us();
	rc = machine_load(a->vm->machine, f->payload, f->len, err);
	if (rc)
		return error_prefix(err, "device state");
	*load_us = clock_now_us() - before;
	__atomic_store_n(&a->stage, ARRIVAL_LOADED, __ATOMIC_RELAXED);
	return 0;
}

static int take_phase(struct arrival *a, const char *phase, struct error *err)
{
	static const struct {
		const char *name;
		enum arrival_stage stage;
		int (*begin)(struct arrival *a, struct error *err);
	} phases[] = {{"storage", ARRIVAL_STORAGE, phase_storage},
		      {"memory", ARRIVAL_MEMORY, arrival_receiver_start},
		      {"prepare", ARRIVAL_PREPARED, phase_prepare}};
	for (unsigned i = 0; phase && i < ARRAY_SIZE(phases); i++) {
		if (strcmp(phase, phases[i].name))
			continue;
		if (a->stage + 1 != phases[i].stage)
			return error_set(err, EPROTO, "phase %s out of turn", phase);
		int rc = phases[i].begin(a, err);
		if (!rc)
			__atomic_store_n(&a->stage, phases[i].stage, __ATOMIC_RELAXED);
		return rc;
	}
	return error_set(err, EPROTO, "unknown phase \"%.32s\"", phase ? phase : "");
}

/* Until COMMIT (0) or failure. */
static int run_phases(struct arrival *a, struct frame *commit, struct error *err)
{
	for (;;) {
		struct frame f;
		int rc = move_link_wait(a->link,
					1u << FRAME_PHASE | 1u << FRAME_SUMS | 1u << FRAME_DEVICE_STATE |
						1u << FRAME_VERIFY | 1u << FRAME_COMMIT,
					0, &f, err);
		if (rc)
			return rc;
		if (f.type == FRAME_COMMIT) {
			if (a->stage != ARRIVAL_LOADED) {
				frame_release(&f);
				return error_set(err, EPROTO, "COMMIT before READY");
			}
			*commit = f;
			return 0;
		}
		if (f.type == FRAME_SUMS) {
			rc = arrival_hash_compare(a, &f, err);
		} else if (f.type == FRAME_DEVICE_STATE) {
			uint64_t load_us = 0;
			rc = take_device_state(a, &f, &load_us, err);
			fault_point("d-before-ready");
			json_t *o = json_pack("{s:I}", "load_us", (json_int_t)load_us);
			if (!rc)
				rc = move_link_send(a->link, FRAME_READY, o, err);
			json_decref(o);
			arrival_compare_keep(a, &f);
		} else if (f.type == FRAME_VERIFY) {
			rc = arrival_compare(a, &f, err);
		} else {
			rc = take_phase(a, json_string_value(json_object_get(f.json, "phase")), err);
			if (!rc)
				rc = move_link_send(a->link, FRAME_PHASE_OK, f.json, err);
		}
		frame_release(&f);
		if (rc)
			return rc;
	}
}

/* --- COMMIT: from here this process owns the VM, or is in doubt --- */

static void in_doubt(struct arrival *a, const struct error *why)
{
	char reason[400];
	vm_stop_guest(a->vm);
	snprintf(reason, sizeof reason, "the owner record could not be written: %s", why->message);
	pthread_mutex_lock(&a->lock);
	a->write_failed = true;
	pthread_mutex_unlock(&a->lock);
	vm_set_state(a->vm, VM_IN_DOUBT, reason);
}

enum vm_state arrival_state(const struct arrival *a)
{
	return a->vm->cold ? VM_STOPPED : a->suspend ? VM_PAUSED : VM_RUNNING;
}

static int run_commit(struct arrival *a, struct frame *commit, struct error *err)
{
	struct vm *vm = a->vm;
	uint64_t received_us = clock_now_us(), stopped_us = 0, vcpus_us = 0;
	pthread_mutex_lock(&a->lock);
	if (a->abandoned || a->memory_void) {
		pthread_mutex_unlock(&a->lock);
		return error_set(err, ECANCELED, "given up before COMMIT came");
	}
	a->commit = true;
	pthread_mutex_unlock(&a->lock);
	json_t *s = json_object_get(commit->json, "stopped_us");
	if (json_is_integer(s) && json_integer_value(s) > 0)
		stopped_us = (uint64_t)json_integer_value(s);
	/* What a person had paused stays paused. */
	if (json_is_true(json_object_get(commit->json, "paused")))
		a->suspend = true;
	fault_point("d-commit-received");
	int rc = 0;
	bool runs = !a->suspend && !vm->cold;
	if (runs) {
		machine_adjust_clock(vm->machine, stopped_us * 1000, NULL);
		rc = machine_start_held(vm->machine, err);
		vcpus_us = clock_now_us() - received_us;
	}
	arrival_storage_stop(a);
	/* A machine that does not start is a crash here, after the owner record: the source must not go on
	 * from its old memory once this side may have run. Before the record nothing left the gate, so giving
	 * up is still safe and better. */
	if (rc) {
		pthread_mutex_lock(&a->lock);
		a->commit = false;
		pthread_mutex_unlock(&a->lock);
		return rc;
	}
	struct vm_transition t = {.from = HANDOVER_PREPARED,
				  .from_epoch = a->epoch,
				  .to = HANDOVER_OWNER_UNCONFIRMED,
				  .to_epoch = a->epoch};
	struct error e = ERROR_INIT;
	fault_point("d-held-running");
	if (vm_record_transition(vm, &t, &e)) {
		in_doubt(a, &e);
		return 0;
	}
	pthread_mutex_lock(&a->lock);
	__atomic_store_n(&a->owner, true, __ATOMIC_RELAXED);
	pthread_mutex_unlock(&a->lock);
	fault_point("d-owner-recorded");
	arrival_unfence_shared(a);
	if (runs) {
		rc = machine_release_effects(vm->machine, &e);
		if (rc)
			log_error("release of effects: %s", e.message);
		machine_announce(vm->machine);
	}
	vm_set_state(vm, arrival_state(a), NULL);
	uint64_t since_us = clock_now_us() - received_us;
	json_t *o = json_pack("{s:I, s:I}", "since_commit_us", (json_int_t)since_us, "vcpus_us",
			      (json_int_t)(runs ? vcpus_us : since_us));
	move_link_send(a->link, FRAME_RUNNING, o, NULL);
	json_decref(o);
	fault_point("d-running-sent");
	return 0;
}

void arrival_settle_in(struct arrival *a)
{
	struct vm *vm = a->vm;
	struct error e = ERROR_INIT;
	int rc = registry_publish(vm->cfg, a->rel, vm->def.name, &e);
	if (rc) {
		log_error("%s: %s", a->rel, e.message);
		return;
	}
	pthread_mutex_lock(&vm->lock);
	snprintf(vm->dir, sizeof vm->dir, "%s/vms/%s", vm->cfg->state_dir, vm->def.name);
	pthread_mutex_unlock(&vm->lock);
	/* The source's question may confirm the owner between the look and the write: look again. */
	for (int i = 0; i < 3; i++) {
		struct vm_record rec;
		rc = vm_record(vm, &rec, &e);
		if (!rc) {
			registry_vm_rel(vm->def.name, rec.folder);
			rc = record_store(vm->record, &rec, &e);
		}
		if (rc != -EINVAL)
			break;
	}
	if (rc)
		log_error("record: %s", e.message);
	json_t *q =
		json_pack("{s:s, s:s, s:s}", "cmd", "arrived", "uuid", vm->def.uuid, "name", vm->def.name);
	jsonl_write(a->daemon, q, -1, NULL);
	json_decref(q);
}

static void give_up(struct arrival *a, const struct error *why)
{
	struct vm *vm = a->vm;
	struct error e = ERROR_INIT;
	/* The promise first, durable; then the other side may hear it. */
	if (arrival_abandon(a, why->message, &e))
		log_error("record: %s", e.message);
	if (a->link) {
		json_t *o = json_pack("{s:o}", "reason", jsonl_text(why->message));
		move_link_send(a->link,
			       a->abandoned && a->stage == ARRIVAL_LOADED ? FRAME_ABANDONED : FRAME_ABORT, o,
			       NULL);
		json_decref(o);
	}
	if (!a->rel[0])
		arrival_note_end(a, "refused", EXIT_REFUSED, why->message, NULL);
	else if (a->link && move_link_rehearsed(a->link))
		arrival_note_end(a, "rehearsed", EXIT_MOVED, "", NULL);
	else
		arrival_note_end(a, "failed", EXIT_FAILED, why->message, NULL);
	prefault_stop(a);
	arrival_postcopy_abort(a);
	arrival_channels_close(a);
	arrival_postcopy_free(a);
	arrival_hash_stop(a);
	control_stop(vm);
	struct record *record = steal_ptr(vm->record);
	vm_release(vm);
	if (a->rel[0] && partial_end_arrival(vm->cfg, a->rel, NULL, &e))
		log_error("%s: %s", a->rel, e.message);
	struct vm_record rec;
	if (record && !record_load(record, &rec, &e) && rec.state == HANDOVER_ABANDONED) {
		rec.flags |= RECORD_FILES_DONE;
		if (record_store(record, &rec, &e))
			log_error("record: %s", e.message);
	}
	record_close(record);
}

static void arrival_init(struct arrival *a, struct vm *vm, struct jsonl *daemon)
{
	a->vm = vm;
	a->begun_ms = clock_now_ms();
	a->daemon = daemon;
	pthread_mutex_init(&a->lock, NULL);
	pthread_mutex_init(&a->note_lock, NULL);
	cond_init_monotonic(&a->changed);
	a->faults_fd = -1;
	for (unsigned i = 0; i < ARRIVAL_FILES_MAX; i++)
		a->files[i].fd = -1;
}

/* This process's log is that of all who knock; the operator reads the daemon's. */
static void tell_daemon_refused(struct arrival *a, const struct error *err)
{
	char text[ERROR_MESSAGE_BYTES + 256];
	snprintf(text, sizeof text, "%s from %s: %s", a->vm->def.name[0] ? a->vm->def.name : "a VM", a->peer,
		 err->message);
	json_t *q = json_pack("{s:s, s:o}", "cmd", "refused", "reason", jsonl_text(text));
	jsonl_write(a->daemon, q, -1, NULL);
	json_decref(q);
}

static int refuse(struct arrival *a, struct error *err)
{
	json_t *o = json_pack("{s:o}", "reason", jsonl_text(err->message));
	log_info("refused %s from %s: %s", a->vm->def.name, a->peer, err->message);
	tell_daemon_refused(a, err);
	move_link_send(a->link, FRAME_REFUSE, o, NULL);
	json_decref(o);
	/* the source reads the sentence and closes; a reset must not overtake it */
	struct frame f;
	move_link_wait(a->link, 1u << FRAME_REFUSE, 1000, &f, NULL);
	return err->code;
}

static int hello_ok(struct arrival *a, struct error *err)
{
	json_t *disks = json_array(), *memory = json_array(), *resumed = json_array();
	json_t *modes = json_array(), *layers = json_array();
	for (unsigned i = 0; i < a->vm->def.ndisks; i++) {
		json_array_append_new(disks, json_string(a->disk_token[i]));
		json_array_append_new(resumed, json_boolean(a->resumed[i]));
		json_array_append_new(modes, json_string(move_disk_mode_name(a->disks[i].mode)));
	}
	for (unsigned i = 0; i < a->nlayers; i++)
		json_array_append_new(layers, json_string(a->layer_token[i]));
	for (unsigned i = 0; i < a->nstreams; i++)
		json_array_append_new(memory, json_string(a->memory_token[i]));
	json_t *o =
		json_pack("{s:i, s:s, s:s, s:o, s:o, s:o, s:o, s:o}", "version", (int)a->version, "program",
			  SNM_VERSION, "host", a->vm->cfg->name, "disk_tokens", disks, "memory_tokens",
			  memory, "resumed", resumed, "disk_modes", modes, "layer_tokens", layers);
	if (o && a->faults_fd >= 0)
		json_object_set_new(o, "postcopy_tokens",
				    json_pack("[s, s]", a->postcopy_token[0], a->postcopy_token[1]));
	else if (o && error_is_set(&a->postcopy_refused))
		json_object_set_new(o, "postcopy_refused", jsonl_text(a->postcopy_refused.message));
	if (o && a->deltas)
		json_object_set_new(o, "memory_deltas", json_true());
	if (o && a->verify)
		json_object_set_new(o, "verify", json_true());
	if (o && *a->vm->cfg->migration_address)
		json_object_set_new(o, "data_address", json_string(a->vm->cfg->migration_address));
	int rc = move_link_send(a->link, FRAME_HELLO_OK, o, err);
	json_decref(o);
	return rc;
}

static int receive(struct arrival *a, struct conn *conn, struct frame *hello, struct error *err)
{
	struct vm *vm = a->vm;
	a->epoch = hello->epoch;
	struct move_link_options lopt = {.conn = conn,
					 .epoch = a->epoch,
					 .silence_ms = vm->cfg->silence_ms,
					 .failed = link_failed,
					 .frame = any_frame,
					 .opaque = a};
	a->channel_up = true;
	int rc = move_link_start(&lopt, &a->link, err);
	if (rc)
		return rc;
	if (!a->epoch)
		rc = error_set(err, EPROTO, "hello: epoch 0");
	if (!rc)
		rc = arrival_read_hello(a, hello->json, err);
	if (!rc) {
		log_set_subject(vm->def.name);
		log_info("%s wants to move %s here, epoch %llu", a->peer, vm->def.name,
			 (unsigned long long)a->epoch);
		pthread_mutex_lock(&vm->lock);
		vm->arrival = a;
		pthread_mutex_unlock(&vm->lock);
		rc = arrival_build(a, hello->json, err);
	}
	if (!rc)
		rc = arrival_tokens(a, err);
	if (rc)
		return refuse(a, err);
	rc = hello_ok(a, err);
	struct frame commit = {0};
	if (!rc)
		rc = run_phases(a, &commit, err);
	if (!rc)
		rc = run_commit(a, &commit, err);
	frame_release(&commit);
	return rc;
}

static int answer_question(struct arrival *a, struct conn *conn, struct frame *ask, struct error *err)
{
	json_t *answer = NULL;
	int rc = ask_answer_local(a->vm->cfg, a->peer, ask->json, &answer, err);
	if (!rc)
		rc = frame_send_json(conn, FRAME_ANSWER, ask->epoch, answer, PROOF_TIMEOUT_MS, err);
	json_decref(answer);
	conn_close(conn);
	return rc;
}

/* A host of the same CA that no [peer] names, or one that is refused by name, hears why, so that the person
 * at its keyboard does. Its frames are read for the epoch alone. */
static void refuse_stranger(struct arrival *a, struct conn *conn, bool paired)
{
	struct frame f = {0};
	uint64_t deadline = clock_now_ms() + PROOF_TIMEOUT_MS;
	while (!frame_read(conn, PROOF_TIMEOUT_MS, &f, NULL) && clock_now_ms() < deadline) {
		bool hello = f.type == FRAME_HELLO;
		uint64_t epoch = f.epoch;
		frame_release(&f);
		if (!hello)
			continue;
		char reason[256];
		if (paired || host_config_peer_denied(a->vm->cfg, conn_peer_name(conn)))
			snprintf(reason, sizeof reason, "host %s is refused by host %s", conn_peer_name(conn),
				 a->vm->cfg->name);
		else
			snprintf(reason, sizeof reason,
				 "no [peer] of host %s has the name of your certificate, %s",
				 a->vm->cfg->name, conn_peer_name(conn));
		json_t *o = json_pack("{s:s}", "reason", reason);
		frame_send_json(conn, FRAME_REFUSE, epoch, o, PROOF_TIMEOUT_MS, NULL);
		json_decref(o);
		/* until the other side has closed: a reset must not overtake the sentence */
		deadline = clock_now_ms() + 1000;
	}
	frame_release(&f);
}

static int serve(struct arrival *a, int fd, bool paired, bool *became_owner, struct error *err)
{
	struct vm *vm = a->vm;
	struct conn *conn = NULL;
	int rc = trust_server_context(vm->cfg, paired, &a->tls, err);
	if (rc) {
		close(fd);
		return rc;
	}
	rc = conn_tls_accept(fd, a->tls, PROOF_TIMEOUT_MS, &conn, err);
	if (rc)
		return rc;
	struct trust_peer peer;
	rc = trust_peer_of(vm->cfg, paired, conn, &peer, err);
	if (rc) {
		refuse_stranger(a, conn, paired);
		conn_close(conn);
		return rc;
	}
	snprintf(a->peer, sizeof a->peer, "%s", peer.name);
	snprintf(a->peer_address, sizeof a->peer_address, "%s", peer.address);
	snprintf(a->fingerprint, sizeof a->fingerprint, "%s", conn_peer_fingerprint(conn));
	/* The peer beats while it puts its hello together. */
	struct frame first = {0};
	uint64_t deadline = clock_now_ms() + PROOF_TIMEOUT_MS;
	do {
		frame_release(&first);
		rc = frame_read(conn, PROOF_TIMEOUT_MS, &first, err);
		if (!rc && first.type == FRAME_BEAT && clock_now_ms() > deadline)
			rc = error_set(err, ETIMEDOUT, "no hello within %d ms", PROOF_TIMEOUT_MS);
	} while (!rc && first.type == FRAME_BEAT);
	if (rc) {
		frame_release(&first);
		conn_close(conn);
		return error_prefix(err, "%s", a->peer);
	}
	if (first.type == FRAME_ASK) {
		rc = answer_question(a, conn, &first, err);
		frame_release(&first);
		return rc;
	}
	if (first.type == FRAME_CHECK) {
		rc = arrival_answer_check(a, conn, &first, err);
		frame_release(&first);
		return rc;
	}
	if (first.type == FRAME_RENEW || first.type == FRAME_ADMINISTER) {
		rc = first.type == FRAME_RENEW ? trust_renew_answer(vm->cfg, &peer, conn, &first, err)
					       : administer_answer(vm->cfg, &peer, conn, &first, err);
		frame_release(&first);
		conn_close(conn);
		return rc;
	}
	if (first.type != FRAME_HELLO) {
		rc = error_set(err, EPROTO, "%s began with %s", a->peer, frame_type_name(first.type));
		frame_release(&first);
		conn_close(conn);
		return rc;
	}
	rc = receive(a, conn, &first, err);
	frame_release(&first);
	if (rc) {
		give_up(a, err);
		move_link_free(steal_ptr(a->link));
		return rc;
	}
	*became_owner = true;
	vm->arrived = true;
	if (!a->write_failed) {
		arrival_settle_in(a);
		arrival_note_owned(a, NULL);
	}
	arrival_hash_stop(a);
	/* the data channels are done, but for those of pages that are missing; the control channel stays for
	 * MOVED */
	if (arrival_is_paging(a))
		rc = arrival_postcopy_start(a, err);
	else
		arrival_channels_close(a);
	if (rc)
		return rc;
	return a->write_failed ? arrival_reread_start(a, err) : arrival_confirm_start(a, err);
}

static void arrival_free(struct arrival *a)
{
	pthread_mutex_lock(&a->lock);
	a->closing = true;
	pthread_cond_broadcast(&a->changed);
	pthread_mutex_unlock(&a->lock);
	struct error why = ERROR_INIT;
	error_set(&why, ESHUTDOWN, "the VM ended");
	if (a->link)
		move_link_fail(a->link, &why);
	if (a->rereader_started)
		pthread_join(a->rereader, NULL);
	if (a->confirmer_started)
		pthread_join(a->confirmer, NULL);
	arrival_postcopy_free(a);
	move_link_free(a->link);
	arrival_hash_free(a);
	tls_context_free(a->tls);
	json_decref(a->cpu);
	json_decref(a->figures);
	free(a->regions);
	mem_prefault_free(a->prefault);
	frame_release(&a->state);
	free(a->later);
	for (unsigned i = 0; i < a->nfiles; i++)
		if (a->files[i].fd >= 0)
			close(a->files[i].fd);
	free(a);
}

void move_destination_free(struct vm *vm)
{
	pthread_mutex_lock(&vm->lock);
	struct arrival *a = steal_ptr(vm->arrival);
	pthread_mutex_unlock(&vm->lock);
	if (a)
		arrival_free(a);
}

int move_destination_serve(struct vm *vm, int fd, struct jsonl *daemon, bool paired, bool *became_owner,
			   struct error *err)
{
	*became_owner = false;
	struct arrival *a = calloc(1, sizeof *a);
	if (!a) {
		close(fd);
		return error_errno(err, ENOMEM, "arrival");
	}
	arrival_init(a, vm, daemon);
	int rc = serve(a, fd, paired, became_owner, err);
	/* a question, or a peer that was not let in; else it is the VM's */
	if (vm->arrival != a)
		arrival_free(a);
	return rc;
}
