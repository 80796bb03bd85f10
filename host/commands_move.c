/* SPDX-License-Identifier: Apache-2.0 */
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/log.h"
#include "host/ask.h"
#include "host/daemon.h"
#include "host/exit.h"
#include "host/recorder.h"
#include "host/trust.h"

/* ---- following a move to its end
 * --------------------------------------------------------------------------- */

/* The move as the client knows it. */
struct follow {
	struct command_context *c;
	struct vm_ref vm;
	uint64_t epoch;
	char destination[HOST_NAME_MAX_CHARS + 1];
	uint64_t began_ms;
	bool cold; /* of a VM that is stopped; a snvmm was started for it */
};

static bool client_gone(struct jsonl *client)
{
	struct pollfd p = {.fd = jsonl_fd(client), .events = POLLRDHUP};
	return poll(&p, 1, 0) > 0 && p.revents & (POLLRDHUP | POLLHUP | POLLERR);
}

static json_t *make_end(const struct follow *f, const char *result, int exit_status, const char *reason)
{
	json_t *o = json_pack("{s:s, s:s, s:i, s:o, s:s, s:s, s:s, s:I, s:I, s:[]}", "event", "end", "result",
			      result, "exit", exit_status, "reason", jsonl_text(reason), "vm", f->vm.rec.name,
			      "uuid", f->vm.rec.uuid, "destination", f->destination, "epoch",
			      (json_int_t)f->epoch, "total_ms", (json_int_t)(clock_now_ms() - f->began_ms),
			      "left_behind");
	static const char *const figures[] = {"storage_ms", "memory_ms",  "downtime_ms", "memory_bytes",
					      "disk_bytes", "wire_bytes", "rounds"};
	for (size_t i = 0; o && i < ARRAY_SIZE(figures); i++)
		json_object_set_new(o, figures[i], json_null());
	return o;
}

/* The stored last line of this very move, or NULL. */
static json_t *stored_end(const struct follow *f)
{
	json_t *o = NULL;
	if (registry_result_load(f->c->daemon->cfg, f->vm.rec.uuid, &o, NULL) < 0)
		return NULL;
	/* Each new attempt of a move that was retried has a higher epoch. */
	json_t *first = json_object_get(o, "first_epoch");
	if ((uint64_t)json_integer_value(json_object_get(o, "epoch")) >= f->epoch &&
	    (!first || (uint64_t)json_integer_value(first) <= f->epoch))
		return o;
	json_decref(o);
	return NULL;
}

static void set_text(json_t *o, const char *key, const char *text)
{
	json_object_set_new(o, key, jsonl_text(text));
}

/* The source's VMM said moved, or the record does: wait for the cleaning. Takes `end` over (may be NULL). */
static json_t *end_moved(struct follow *f, json_t *end)
{
	char reason[256];
	if (keeper_wait_cleaned(f->vm.keeper, f->epoch, DAEMON_SETTLE_TIMEOUT_MS)) {
		json_t *whole = stored_end(f);
		if (whole) {
			json_decref(end);
			return whole;
		}
	}
	if (!end)
		end = make_end(f, "moved", EXIT_NOT_CLEANED, "");
	json_object_set_new(end, "exit", json_integer(EXIT_NOT_CLEANED));
	snprintf(reason, sizeof reason, "VM %s runs on %s, but its files here are not deleted yet",
		 f->vm.rec.name, f->destination);
	set_text(end, "reason", reason);
	json_t *left = json_array();
	json_array_append_new(left, jsonl_text(f->vm.dir));
	json_object_set_new(end, "left_behind", left);
	return end;
}

static int load_record(struct follow *f, struct vm_record *rec)
{
	struct record *r = NULL;
	int rc = record_open(f->c->daemon->cfg->state_dir, f->vm.rec.uuid, &r, NULL);
	if (!rc)
		rc = record_load(r, rec, NULL);
	record_close(r);
	return rc;
}

/* The snvmm died before it said how the move ended: the record tells, once it is settled (docs/handover.md).
 */
static json_t *end_from_record(struct follow *f)
{
	uint64_t deadline = clock_now_ms() + DAEMON_SETTLE_TIMEOUT_MS;
	char reason[512];
	struct vm_record rec;
	for (;; clock_sleep_ms(100)) {
		json_t *stored = stored_end(f);
		const char *result = json_string_value(json_object_get(stored, "result"));
		if (result && strcmp(result, "moved"))
			return stored;
		json_decref(stored);
		int rc = load_record(f, &rec);
		if (rc == -ENOENT || (!rc && rec.state == HANDOVER_MOVED && rec.flags & RECORD_PEER_STARTED))
			return end_moved(f, NULL);
		bool late = clock_now_ms() >= deadline;
		if (!rc && rec.state == HANDOVER_OWNER && !keeper_is_live(f->vm.keeper)) {
			if (rec.flags & RECORD_COLD && !(rec.flags & RECORD_POWERED_ON))
				return make_end(f, "failed", EXIT_FAILED, MOVE_COLD_BROKEN);
			if (!(rec.flags & RECORD_POWERED_ON))
				return make_end(f, "failed", EXIT_FAILED,
						"the VM was stopped during the move");
			snprintf(reason, sizeof reason,
				 "VM %s crashed on %s during the move: its VMM was killed; snvm start %s",
				 rec.name, f->c->daemon->cfg->name, rec.name);
			return make_end(f, "crashed", EXIT_CRASHED, reason);
		}
		if (!rc && rec.state == HANDOVER_MOVED && (late || f->vm.keeper->rounds > 2)) {
			snprintf(reason, sizeof reason,
				 "VM %s crashed on %s just after it had moved there; snvm start %s there, "
				 "the files here are kept until then",
				 rec.name, f->destination, rec.name);
			return make_end(f, "crashed", EXIT_CRASHED, reason);
		}
		if (late) {
			snprintf(reason, sizeof reason,
				 "VM %s: its VMM is gone and %s does not tell whether it has the VM; it is "
				 "settled when %s answers, or see snmigrate resolve %s",
				 f->vm.rec.name, f->destination, f->destination, f->vm.rec.name);
			return make_end(f, "in-doubt", EXIT_IN_DOUBT, reason);
		}
	}
}

/* Passes the events of the snvmm on; returns the client's last line, or NULL when the client has gone (the
 * move goes on). */
static json_t *pass_events(struct follow *f, struct jsonl *vmm)
{
	for (;;) {
		json_t *event = NULL;
		struct error err = ERROR_INIT;
		int rc = jsonl_read(vmm, &event, NULL, 500, &err);
		if (rc == -ETIMEDOUT) {
			if (client_gone(f->c->client))
				return NULL;
			continue;
		}
		if (rc < 0)
			return end_from_record(f);
		const char *result = json_string_value(json_object_get(event, "result"));
		if (result)
			return strcmp(result, "moved") ? event : end_moved(f, event);
		rc = jsonl_write(f->c->client, event, -1, NULL);
		json_decref(event);
		if (rc < 0)
			return NULL;
	}
}

static void follow_to_end(struct follow *f, struct jsonl *vmm)
{
	json_t *end = pass_events(f, vmm);
	/* whoever hears the end may start the VM, or delete it */
	if (end && f->cold)
		keeper_wait_dead(f->vm.keeper, DAEMON_CALL_TIMEOUT_MS);
	if (end) {
		json_object_set_new(end, "final", json_true());
		jsonl_write(f->c->client, end, -1, NULL);
		const char *result = json_string_value(json_object_get(end, "result"));
		log_info("VM %s: move to %s ended: %s", f->vm.rec.name, f->destination,
			 result ? result : "?");
	}
	json_decref(end);
}

/* ---- move, cancel, watch
 * ----------------------------------------------------------------------------------- */

static bool has_local_disks(struct vm_ref *vm, struct daemon *d)
{
	json_t *o = vm_describe(d, vm, true);
	bool has = json_array_size(json_object_get(o, "disks")) > 0;
	json_decref(o);
	return has;
}

static int check_move(struct command_context *c, struct follow *f, const char *host, json_t *options,
		      struct trust_peer *peer, struct error *err)
{
	struct daemon *d = c->daemon;
	struct vm_ref *vm = &f->vm;
	if (!strcmp(host, d->cfg->name))
		return error_set(err, EINVAL, "VM %s is on host %s already", vm->rec.name, host);
	int rc = trust_peer_find(d->cfg, host, peer, err);
	if (!rc && !peer->may_receive)
		rc = trust_refuse_receive(d->cfg, peer, err);
	if (!rc)
		rc = vm_check_arrived(d, vm, err);
	if (!rc)
		rc = handover_may_move(&vm->rec, err);
	if (rc < 0)
		return rc;
	/* One that is off may have a snvmm of another move: only who starts that process may use it. */
	f->cold = !(vm->rec.flags & RECORD_POWERED_ON);
	if (!f->cold && !keeper_is_live(vm->keeper))
		return error_set(
			err, ESRCH,
			"VM %s is crashed: snvm start %s, or snvm stop %s to move it stopped as it is",
			vm->rec.name, vm->rec.name, vm->rec.name);
	/* where there are such folders, its snvmm knows which disks are in them */
	if (!json_is_true(json_object_get(options, "with_storage")) && !*d->cfg->shared &&
	    has_local_disks(vm, d))
		return error_set(err, EINVAL,
				 "VM %s has local disks: move it with --with-storage ([shared] path names "
				 "folders that both hosts see)",
				 vm->rec.name);
	return 0;
}

/* A move that did not begin has no use for the process that was started for it. */
static void end_cold(struct follow *f)
{
	struct error err = ERROR_INIT;
	if (vm_call(&f->vm, json_pack("{s:s}", "cmd", "quit"), NULL, NULL, &err) < 0)
		log_warn("VM %s: %s", f->vm.rec.name, err.message);
	keeper_wait_dead(f->vm.keeper, DAEMON_CALL_TIMEOUT_MS);
}

int command_move(struct command_context *c, struct error *err)
{
	struct daemon *d = c->daemon;
	const char *name = json_string_value(json_object_get(c->request, "vm"));
	const char *host = json_string_value(json_object_get(c->request, "host"));
	json_t *options = json_object_get(c->request, "options");
	struct follow f = {.c = c, .began_ms = clock_now_ms()};
	struct jsonl *vmm = NULL;
	struct trust_peer peer;
	int status = EXIT_REFUSED;
	if (!name || !host || (options && !json_is_object(options)))
		return error_set(err, EINVAL, "malformed request to move a VM"), EXIT_USAGE;
	int rc = vm_find(d, name, &f.vm, err);
	if (!rc)
		rc = check_move(c, &f, host, options, &peer, err);
	if (rc < 0)
		return EXIT_REFUSED;
	snprintf(f.destination, sizeof f.destination, "%s", peer.name);
	f.epoch = f.vm.rec.epoch + 1;
	if (json_is_true(json_object_get(options, "quick")) && !f.cold)
		rc = check_quick(d, &f.vm, f.destination, options, err);
	if (!rc && f.cold)
		rc = vm_start(d, &f.vm, VM_START_COLD, err);
	if (rc < 0)
		return EXIT_REFUSED;
	fault_point("move-before-asked");
	rc = vm_connect(&f.vm, &vmm, err);
	if (rc < 0) {
		if (f.cold)
			end_cold(&f);
		return error_prefix(err, "VM %s", f.vm.rec.name), EXIT_FAILED;
	}
	json_t *request = json_pack("{s:s, s:s, s:s, s:I, s:O}", "cmd", "migrate", "address", peer.address,
				    "peer", peer.name, "epoch", (json_int_t)f.epoch, "options",
				    options ? options : json_object());
	rc = request ? jsonl_call(vmm, request, NULL, &status, DAEMON_CALL_TIMEOUT_MS, err)
		     : error_errno(err, ENOMEM, "migrate");
	json_decref(request);
	if (rc < 0) {
		if (f.cold)
			end_cold(&f);
		jsonl_close(vmm);
		return rc == -EREMOTE && status ? status : EXIT_FAILED;
	}
	log_info("VM %s: move to %s begins, epoch %" PRIu64, f.vm.rec.name, host, f.epoch);
	recorder_begin(d, false, f.vm.rec.uuid, f.vm.rec.name, peer.name, f.epoch);
	reply_ok(c->client,
		 json_pack("{s:s, s:s, s:s, s:s, s:I}", "vm", f.vm.rec.name, "uuid", f.vm.rec.uuid, "host",
			   d->cfg->name, "destination", host, "epoch", (json_int_t)f.epoch));
	follow_to_end(&f, vmm);
	jsonl_close(vmm);
	return 0;
}

/* Passed on (the request is taken over) to the VM's snvmm, which answers. */
static int pass_on(struct command_context *c, json_t *request, struct error *err)
{
	const char *name = json_string_value(json_object_get(c->request, "vm"));
	struct vm_ref vm;
	int status = EXIT_FAILED;
	if (!name || vm_find(c->daemon, name, &vm, err) < 0) {
		json_decref(request);
		return EXIT_REFUSED;
	}
	if (vm_check_arrived(c->daemon, &vm, err) < 0) {
		json_decref(request);
		return EXIT_REFUSED;
	}
	if (!keeper_is_live(vm.keeper)) {
		json_decref(request);
		return error_set(err, ESRCH, "VM %s is not being moved", vm.rec.name), EXIT_REFUSED;
	}
	if (vm_call(&vm, request, NULL, &status, err) < 0)
		return status ? status : EXIT_FAILED;
	reply_ok(c->client, NULL);
	return 0;
}

int command_cancel(struct command_context *c, struct error *err)
{
	return pass_on(c, json_pack("{s:s}", "cmd", "cancel"), err);
}

int command_tune(struct command_context *c, struct error *err)
{
	json_t *bandwidth = json_object_get(c->request, "bandwidth_bytes_per_s");
	return pass_on(c, json_pack("{s:s, s:O?}", "cmd", "tune", "bandwidth_bytes_per_s", bandwidth), err);
}

bool move_result_find(struct daemon *d, const char *name, json_t **out)
{
	char path[REGISTRY_PATH_BYTES];
	time_t newest = 0;
	*out = NULL;
	if (registry_path(d->cfg, "moves", path, NULL) < 0)
		return false;
	DIR *dir = opendir(path);
	struct dirent *de;
	while (dir && (de = readdir(dir))) {
		char uuid[VM_UUID_CHARS + 1], file[REGISTRY_PATH_BYTES + 300];
		struct stat st;
		json_t *o = NULL;
		if (strlen(de->d_name) != VM_UUID_CHARS + 5)
			continue;
		snprintf(uuid, sizeof uuid, "%s", de->d_name);
		snprintf(file, sizeof file, "%s/%s", path, de->d_name);
		if (stat(file, &st) < 0 || registry_result_load(d->cfg, uuid, &o, NULL) < 0)
			continue;
		const char *vm = json_string_value(json_object_get(o, "vm"));
		if (((vm && !strcmp(vm, name)) || !strcmp(uuid, name)) && st.st_mtime >= newest) {
			newest = st.st_mtime;
			json_decref(*out);
			*out = json_incref(o);
		}
		json_decref(o);
	}
	if (dir)
		closedir(dir);
	return *out != NULL;
}

/* Which move it is that the snvmm speaks of: the record may not know of one that has just begun. */
static int begin_watch(struct follow *f, struct jsonl *vmm)
{
	json_t *request = json_pack("{s:s}", "cmd", "info"), *info = NULL;
	int rc = jsonl_call(vmm, request, &info, NULL, DAEMON_CALL_TIMEOUT_MS, NULL);
	json_t *move = json_object_get(info, "migrating");
	const char *destination = json_string_value(json_object_get(move, "destination"));
	json_int_t epoch = json_integer_value(json_object_get(move, "epoch"));
	if (destination && epoch > 0 && (uint64_t)epoch >= f->epoch) {
		snprintf(f->destination, sizeof f->destination, "%s", destination);
		f->epoch = (uint64_t)epoch;
	}
	json_decref(info);
	json_decref(request);
	request = json_pack("{s:s}", "cmd", "watch");
	if (!rc)
		rc = jsonl_call(vmm, request, NULL, NULL, DAEMON_CALL_TIMEOUT_MS, NULL);
	json_decref(request);
	return rc;
}

int command_watch(struct command_context *c, struct error *err)
{
	struct daemon *d = c->daemon;
	const char *name = json_string_value(json_object_get(c->request, "uuid"));
	if (!name)
		name = json_string_value(json_object_get(c->request, "vm"));
	json_int_t since = json_integer_value(json_object_get(c->request, "epoch"));
	struct follow f = {.c = c, .began_ms = clock_now_ms()};
	struct jsonl *vmm = NULL;
	json_t *stored = NULL;
	if (!name)
		return error_set(err, EINVAL, "the request names no VM"), EXIT_USAGE;
	bool known = vm_find(d, name, &f.vm, err) == 0;
	if (known) {
		snprintf(f.destination, sizeof f.destination, "%s", f.vm.rec.peer);
		f.epoch = since > 0 ? (uint64_t)since : f.vm.rec.epoch;
		/* a daemon that was just started has to find the snvmm first */
		for (int i = 0; i < 20 && !keeper_is_live(f.vm.keeper) && f.vm.keeper->rounds == 0; i++)
			clock_sleep_ms(50);
	}
	int rc = known ? vm_connect(&f.vm, &vmm, NULL) : -ENOENT;
	if (!rc)
		rc = begin_watch(&f, vmm);
	bool ended = move_result_find(d, name, &stored);
	uint64_t epoch = ended ? (uint64_t)json_integer_value(json_object_get(stored, "epoch")) : 0;
	const char *result = json_string_value(json_object_get(stored, "result"));
	if (rc == 0) {
		reply_ok(c->client, json_pack("{s:s, s:s, s:s, s:s, s:I}", "vm", f.vm.rec.name, "uuid",
					      f.vm.rec.uuid, "host", d->cfg->name, "destination",
					      f.destination, "epoch", (json_int_t)f.epoch));
		follow_to_end(&f, vmm);
	} else if (known && since > 0 && (epoch < (uint64_t)since || (result && !strcmp(result, "moved")))) {
		/* the move that the client knows ended without its last line, or is being cleaned */
		reply_ok(c->client, json_pack("{s:s, s:s, s:I}", "vm", f.vm.rec.name, "uuid", f.vm.rec.uuid,
					      "epoch", (json_int_t)f.epoch));
		json_t *end = end_from_record(&f);
		json_object_set_new(end, "final", json_true());
		jsonl_write(c->client, end, -1, NULL);
		json_decref(end);
	} else if (ended && epoch >= (uint64_t)since) {
		reply_ok(c->client, json_pack("{s:O, s:I}", "vm", json_object_get(stored, "vm"), "epoch",
					      (json_int_t)epoch));
		json_object_set_new(stored, "final", json_true());
		jsonl_write(c->client, stored, -1, NULL);
	} else {
		error_set(err, ENOENT,
			  known ? "VM %.64s is not being moved" : "no VM named %.64s is known here", name);
		rc = EXIT_REFUSED;
	}
	json_decref(stored);
	jsonl_close(vmm);
	return rc == EXIT_REFUSED ? rc : 0;
}

/* ---- resolve
 * ----------------------------------------------------------------------------------------------- */

static void describe_outcome(struct command_context *c, const char *uuid, const char *name)
{
	struct vm_record rec;
	struct record *r = NULL;
	struct handover_self self = {.live = false};
	struct keeper *k = keeper_find(c->daemon, uuid);
	int rc = record_open(c->daemon->cfg->state_dir, uuid, &r, NULL);
	if (!rc)
		rc = record_load(r, &rec, NULL);
	record_close(r);
	self.live = k && keeper_is_live(k);
	struct error asked = ERROR_INIT;
	if (k) {
		SCOPE_LOCK(&c->daemon->lock);
		asked = k->last_ask;
	}
	/* a live snvmm knows best: the record does not tell a paused copy in doubt from one that runs */
	struct vm_ref vm;
	json_t *seen = !rc && self.live && vm_find(c->daemon, uuid, &vm, NULL) == 0
			       ? vm_describe(c->daemon, &vm, false)
			       : NULL;
	const char *state = json_string_value(json_object_get(seen, "state"));
	if (!state)
		state = rc ? "absent" : vm_state_name(handover_vm_state(&rec, &self, true));
	json_t *o = json_pack("{s:s, s:s, s:s, s:s, s:I, s:s, s:o, s:o}", "vm", name, "uuid", uuid, "record",
			      rc ? "none" : handover_state_name(rec.state), "state", state, "epoch",
			      (json_int_t)(rc ? 0 : rec.epoch), "peer", rc ? "" : rec.peer, "why",
			      jsonl_text(rc ? "" : rec.reason), "peer_error",
			      asked.code && !self.live ? jsonl_text(asked.message) : json_null());
	json_decref(seen);
	reply_ok(c->client, o);
}

static int settle_again(struct vm_ref *vm)
{
	return keeper_settle_now(vm->keeper, 15000);
}

/* No snvmm lives; keeper->op is held. */
static int give_up_dead(struct daemon *d, struct vm_ref *vm, struct record *r, struct error *err)
{
	struct handover_self self = {.live = false};
	char kept[REGISTRY_FOLDER_BYTES];
	int rc = record_load(r, &vm->rec, err);
	if (rc < 0)
		return rc;
	struct vm_record to = vm->rec;
	switch (handover_give_up(&vm->rec, &self, err)) {
	case HANDOVER_ACT_ABANDON:
		/* A copy that was the VM is kept aside, never deleted, although its folder has not got its
		 * place. */
		if (vm->rec.state == HANDOVER_OWNER_UNCONFIRMED &&
		    !strncmp(vm->rec.folder, "incoming/", strlen("incoming/"))) {
			rc = registry_publish(d->cfg, vm->rec.folder, vm->rec.name, err);
			if (rc < 0)
				return rc;
			registry_vm_rel(vm->rec.name, vm->rec.folder);
			rc = record_store(r, &vm->rec, err);
			if (rc < 0)
				return rc;
			to = vm->rec;
		}
		to.state = HANDOVER_ABANDONED;
		snprintf(to.reason, sizeof to.reason, "given up by snmigrate resolve");
		return record_compare_and_set(r, vm->rec.state, vm->rec.epoch, &to, NULL, err);
	case HANDOVER_ACT_CLEAN:
		if (to.state == HANDOVER_MOVED) {
			rc = registry_keep(d->cfg, to.folder, to.name, to.epoch, kept, err);
			if (rc < 0)
				return rc;
			snprintf(to.folder, sizeof to.folder, "%s", kept);
			to.flags |= RECORD_FILES_DONE;
			return record_store(r, &to, err);
		}
		return 0; /* the keeper cleans an abandoned arrival anyway */
	case HANDOVER_ACT_FORGET:
		return record_remove(r, err);
	case HANDOVER_ACT_ASK:
		return 0; /* there is no process to end; the peer's word settles */
	default:
		return err->code ? err->code : -EPERM;
	}
}

static int run_here_dead(struct vm_ref *vm, struct record *r, struct error *err)
{
	struct handover_self self = {.live = false};
	struct vm_record to;
	int rc = record_load(r, &vm->rec, err);
	if (!rc)
		rc = handover_run_here(&vm->rec, &self, &to, err);
	if (!rc)
		rc = record_compare_and_set(r, vm->rec.state, vm->rec.epoch, &to, NULL, err);
	if (!rc)
		vm->rec = to;
	return rc;
}

static int resolve_dead(struct command_context *c, struct vm_ref *vm, const char *how, struct error *err)
{
	struct daemon *d = c->daemon;
	struct record *r = NULL;
	bool here = !strcmp(how, "run-here");
	settle_again(vm);
	if (!strcmp(how, "ask"))
		return 0;
	pthread_mutex_lock(&d->lock);
	struct error asked = vm->keeper->last_ask;
	/* A host that has forgotten the VM runs it no more than one without power, and can settle nothing. */
	bool answers = !asked.code && vm->keeper->last_answer != HANDOVER_NONE;
	pthread_mutex_unlock(&d->lock);
	pthread_mutex_lock(&vm->keeper->op);
	int rc = keeper_is_live(vm->keeper)
			 ? error_set(err, EBUSY, "VM %s has been started meanwhile", vm->rec.name)
			 : 0;
	if (!rc)
		rc = record_open(d->cfg->state_dir, vm->rec.uuid, &r, err);
	if (!rc)
		rc = record_lock(r, 2000, err);
	if (!rc && here && answers && record_load(r, &vm->rec, NULL) == 0 && vm->rec.state != HANDOVER_OWNER)
		rc = error_set(err, EPERM,
			       "VM %s: host %s answers, so it has power; see snmigrate resolve %s on both",
			       vm->rec.name, vm->rec.peer, vm->rec.name);
	if (!rc)
		rc = here ? run_here_dead(vm, r, err) : give_up_dead(d, vm, r, err);
	record_close(r);
	pthread_mutex_unlock(&vm->keeper->op);
	if (!rc && here) {
		/* an arrival that owned the VM gets its folder's place first, and is looked for there */
		char uuid[VM_UUID_CHARS + 1];
		settle_again(vm);
		snprintf(uuid, sizeof uuid, "%s", vm->rec.uuid);
		rc = vm_find(d, uuid, vm, err);
		if (!rc)
			rc = vm_start(d, vm, VM_START_FORCED, err);
	}
	keeper_wake(vm->keeper);
	if (!rc)
		settle_again(vm);
	return rc;
}

int command_resolve(struct command_context *c, struct error *err)
{
	const char *name = json_string_value(json_object_get(c->request, "vm"));
	const char *how = json_string_value(json_object_get(c->request, "how"));
	struct vm_ref vm;
	if (!name || !how || (strcmp(how, "ask") && strcmp(how, "run-here") && strcmp(how, "give-up")))
		return error_set(err, EINVAL, "malformed request to resolve"), EXIT_USAGE;
	if (vm_find(c->daemon, name, &vm, err) < 0)
		return EXIT_REFUSED;
	if (!strcmp(how, "run-here") && !json_is_true(json_object_get(c->request, "confirmed")))
		return error_set(err, EPERM,
				 "--run-here needs the confirmation that host %s has no power; if it runs, "
				 "the VM would run twice",
				 vm.rec.peer),
		       EXIT_REFUSED;
	int rc, status = EXIT_REFUSED;
	if (keeper_is_live(vm.keeper))
		rc = vm_call(&vm, json_pack("{s:s, s:s}", "cmd", "resolve", "how", how), NULL, &status, err);
	else
		rc = resolve_dead(c, &vm, how, err);
	if (rc < 0)
		return status ? status : EXIT_REFUSED;
	describe_outcome(c, vm.rec.uuid, vm.rec.name);
	return 0;
}
