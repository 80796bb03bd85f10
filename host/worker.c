/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/pidfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "host/daemon.h"
#include "host/exit.h"
#include "host/fsutil.h"
#include "host/maintenance.h"
#include "host/recorder.h"
#include "host/pair_codes.h"
#include "host/pair_serve.h"
#include "host/spawn.h"
#include "host/trust.h"
#include "net/preamble.h"

/* The daemon's side of a snvmm --incoming (docs/design.md, "The control connection is a process"). */

/* An attempt that a newer one supersedes has to close its disks first; one that does not react is ended then.
 */
#define ADMISSION_SETTLE_MS 10000
#define OFFER_TIMEOUT_MS    500
/* What the host itself needs beyond the memory of its VMs. */
#define MEMORY_RESERVE_BYTES (UINT64_C(64) << 20)

struct worker {
	struct daemon *daemon;
	struct worker *next;
	struct jsonl *link;
	enum worker_kind kind;
	char group[48];
	char from[DAEMON_ADDRESS_CHARS];
	pid_t pid;
	int pidfd;
	/* under daemon->lock */
	bool admitted, arrived;
	char uuid[VM_UUID_CHARS + 1];
	char name[VM_NAME_MAX_CHARS + 1];
	uint64_t memory_bytes;
	char tokens[TOKENS_PER_WORKER_MAX][TOKEN_HEX_CHARS + 1];
	unsigned ntokens;
};

/* ---- admission
 * --------------------------------------------------------------------------------------------- */

struct name_search {
	struct daemon *daemon;
	const char *name, *uuid;
	bool taken;
};

static int name_each(void *opaque, const char *uuid)
{
	struct name_search *s = opaque;
	struct record *r = NULL;
	struct vm_record rec;
	if (strcmp(uuid, s->uuid) && record_open(s->daemon->cfg->state_dir, uuid, &r, NULL) == 0 &&
	    record_load(r, &rec, NULL) == 0 && !strcmp(rec.name, s->name) &&
	    (rec.state != HANDOVER_MOVED ||
	     !(rec.flags & RECORD_FILES_DONE)) && /* its folder is there still */
	    rec.state != HANDOVER_ABANDONED)
		s->taken = true;
	record_close(r);
	return 0;
}

static int check_name(struct daemon *d, const char *name, const char *uuid, struct error *err)
{
	struct name_search s = {.daemon = d, .name = name, .uuid = uuid};
	if (!vm_name_valid(name))
		return error_set(err, EINVAL, "'%.64s' is not a VM name", name);
	record_list(d->cfg->state_dir, name_each, &s, NULL);
	SCOPE_LOCK(&d->lock);
	for (struct worker *w = d->workers; w; w = w->next)
		if (w->admitted && !strcmp(w->name, name) && strcmp(w->uuid, uuid))
			s.taken = true;
	return s.taken ? error_set(err, EEXIST, "another VM named %s is already on host %s", name,
				   d->cfg->name)
		       : 0;
}

static uint64_t available_memory(void)
{
	CLEANUP_FREE char *text = NULL;
	size_t len;
	unsigned long long kib = 0;
	if (fs_read_file("/proc/meminfo", 1u << 16, &text, &len, NULL) == 0) {
		const char *line = strstr(text, "MemAvailable:");
		if (line)
			sscanf(line, "MemAvailable: %llu", &kib);
	}
	return kib << 10;
}

/* Those on their way have not touched their memory yet, so MemAvailable does not show them. */
static int check_room(struct daemon *d, const char *uuid, uint64_t memory_bytes, struct error *err)
{
	uint64_t promised = 0, available = available_memory();
	unsigned arriving = 0;
	SCOPE_LOCK(&d->lock);
	for (struct worker *w = d->workers; w; w = w->next)
		if (w->admitted && !w->arrived && strcmp(w->uuid, uuid)) {
			promised += w->memory_bytes;
			arriving++;
		}
	if (arriving >= d->cfg->max_incoming)
		return error_set(err, EBUSY, "host %s takes at most %u arrivals at once", d->cfg->name,
				 d->cfg->max_incoming);
	if (available &&
	    (memory_bytes > UINT64_MAX / 2 || memory_bytes + promised + MEMORY_RESERVE_BYTES > available))
		return error_set(err, ENOMEM,
				 "not enough memory: the VM needs %" PRIu64 " MiB, host %s has %" PRIu64
				 " MiB free",
				 memory_bytes >> 20, d->cfg->name,
				 (available > promised + MEMORY_RESERVE_BYTES
					  ? available - promised - MEMORY_RESERVE_BYTES
					  : 0) >>
					 20);
	return 0;
}

/* The source itself, in a new attempt: so it sent no COMMIT in the one before, and never will. */
static bool is_superseded(const struct vm_record *rec, const char *peer, uint64_t epoch)
{
	return rec->state == HANDOVER_PREPARED && rec->epoch < epoch && !strcmp(rec->peer, peer);
}

/* Settled, cleaned, and no process left of an earlier attempt. */
static int check_record(struct daemon *d, struct keeper *k, const char *peer, uint64_t epoch,
			struct error *err)
{
	const char *uuid = k->uuid;
	uint64_t deadline = clock_now_ms() + ADMISSION_SETTLE_MS;
	bool ended = false;
	for (;;) {
		struct record *r = NULL;
		struct vm_record rec;
		int rc = record_open(d->cfg->state_dir, uuid, &r, err);
		bool none = rc == -ENOENT;
		if (!rc)
			rc = record_load(r, &rec, err);
		record_close(r);
		if (rc == -ENOENT)
			none = true;
		else if (rc < 0)
			return rc;
		rc = handover_may_arrive(none ? NULL : &rec, epoch, err);
		if (!rc && keeper_is_live(k))
			rc = error_set(err, EAGAIN, "VM %s: an earlier attempt is still ending", uuid);
		if (rc != -EAGAIN)
			return rc;
		if (clock_now_ms() >= deadline) {
			if (ended || none || !is_superseded(&rec, peer, epoch))
				return rc;
			log_warn("VM %s: its earlier attempt does not react, ending it", rec.name);
			ended = true;
			deadline = clock_now_ms() + ADMISSION_SETTLE_MS;
			rc = spawn_group_kill(uuid, err);
			if (rc < 0)
				return rc;
		}
		keeper_wake(k);
		clock_sleep_ms(50);
	}
}

static int admit(struct worker *w, json_t *request, struct error *err)
{
	struct daemon *d = w->daemon;
	const char *uuid = json_string_value(json_object_get(request, "uuid"));
	const char *name = json_string_value(json_object_get(request, "name"));
	const char *peer = json_string_value(json_object_get(request, "peer"));
	json_int_t epoch = json_integer_value(json_object_get(request, "epoch"));
	json_int_t memory = json_integer_value(json_object_get(request, "memory_bytes"));
	if (w->admitted || !uuid || !vm_uuid_valid(uuid) || !name || !peer || epoch <= 0 || memory < 0)
		return error_set(err, EPROTO, "malformed request for admission");
	struct trust_peer trusted;
	int rc = trust_peer_find(d->cfg, peer, &trusted, err);
	if (!rc && !trusted.may_send)
		rc = trust_refuse_send(d->cfg, &trusted, err);
	if (!rc)
		rc = maintenance_check(d->cfg, err);
	if (!rc)
		rc = check_name(d, name, uuid, err);
	struct keeper *k = rc ? NULL : keeper_get(d, uuid, err);
	if (!rc && !k)
		rc = err->code;
	if (!rc)
		rc = check_record(d, k, peer, (uint64_t)epoch, err);
	/* after an earlier attempt has given its memory back */
	if (!rc)
		rc = check_room(d, uuid, (uint64_t)memory, err);
	if (rc < 0)
		return rc;
	pthread_mutex_lock(&k->op);
	/* two attempts may have waited for the same moment */
	if (keeper_is_live(k))
		rc = error_set(err, EBUSY, "VM %s is already arriving", name);
	if (!rc)
		rc = keeper_empty_group(k, err);
	if (!rc)
		rc = spawn_group_move(w->group, uuid, w->pid, err);
	int pidfd = rc ? -1 : pidfd_open(w->pid, 0);
	if (!rc && pidfd < 0)
		rc = error_errno(err, errno, "pidfd_open");
	if (!rc)
		keeper_attach(k, w->pid, pidfd);
	pthread_mutex_unlock(&k->op);
	if (rc < 0)
		return rc;
	SCOPE_LOCK(&d->lock);
	w->admitted = true;
	d->unproven--;
	w->memory_bytes = (uint64_t)memory;
	strcpy(w->uuid, uuid);
	snprintf(w->name, sizeof w->name, "%s", name);
	log_set_vm(name);
	recorder_begin(d, true, uuid, name, peer, (uint64_t)epoch);
	log_info("VM %s arrives from %s, epoch %" PRIu64 " (snvmm %d)", name, peer, (uint64_t)epoch,
		 (int)w->pid);
	return 0;
}

/* What would keep this VM out now, in sentences: the same as admit, without waiting and without doing. */
static int may_arrive(struct worker *w, json_t *request, json_t **refusals, struct error *err)
{
	struct daemon *d = w->daemon;
	const char *uuid = json_string_value(json_object_get(request, "uuid"));
	const char *name = json_string_value(json_object_get(request, "name"));
	json_int_t memory = json_integer_value(json_object_get(request, "memory_bytes"));
	if (!uuid || !vm_uuid_valid(uuid) || !name || memory < 0)
		return error_set(err, EPROTO, "check: uuid, name and memory_bytes are needed");
	struct vm_record rec;
	struct error why[5] = {{0}};
	maintenance_check(d->cfg, &why[4]);
	const char *peer = json_string_value(json_object_get(request, "peer"));
	struct trust_peer trusted;
	if (peer && trust_peer_find(d->cfg, peer, &trusted, &why[3]) == 0 && !trusted.may_send)
		trust_refuse_send(d->cfg, &trusted, &why[3]);
	check_name(d, name, uuid, &why[0]);
	/* an attempt that is ending is waited for by a move */
	bool known = record_hint(d->cfg, uuid, &rec) == 0;
	if (handover_may_arrive(known ? &rec : NULL, INT64_MAX, &why[1]) == -EAGAIN)
		why[1] = ERROR_INIT;
	check_room(d, uuid, (uint64_t)memory, &why[2]);
	*refusals = json_array();
	for (size_t i = 0; i < ARRAY_SIZE(why); i++)
		if (why[i].code)
			json_array_append_new(*refusals, jsonl_text(why[i].message));
	return 0;
}

static int take_tokens(struct worker *w, json_t *request, struct error *err)
{
	json_t *list = json_object_get(request, "tokens"), *item;
	size_t i;
	SCOPE_LOCK(&w->daemon->lock);
	if (!w->admitted || json_array_size(list) > TOKENS_PER_WORKER_MAX - w->ntokens)
		return error_set(err, EPROTO, "tokens before admission, or too many");
	json_array_foreach(list, i, item)
	{
		const char *token = json_string_value(item);
		if (!token || strlen(token) != TOKEN_HEX_CHARS)
			return error_set(err, EPROTO, "malformed token");
		strcpy(w->tokens[w->ntokens++], token);
	}
	return 0;
}

static int answer(struct worker *w, int rc, const struct error *err)
{
	return rc < 0 ? jsonl_write_error(w->link, EXIT_REFUSED, err) : reply_ok(w->link, NULL);
}

/* It is the VM's process from here on, and so is what it says: it gets the VM's log. */
static int answer_admitted(struct worker *w)
{
	char path[REGISTRY_PATH_BYTES];
	struct error err = ERROR_INIT;
	int rc = registry_log_path(w->daemon->cfg, w->name, path, &err);
	CLEANUP_FD int log = rc < 0 ? -1 : spawn_open_log(path, &err);
	if (log < 0)
		log_warn("VM %s: its log: %s", w->name, err.message);
	json_t *o = json_pack("{s:b}", "ok", 1);
	rc = o ? jsonl_write(w->link, o, log, &err) : -ENOMEM;
	json_decref(o);
	return rc;
}

static int pair(struct worker *w, json_t *request, struct error *err)
{
	if (w->kind != WORKER_PAIR)
		return error_set(err, EPROTO, "this connection is not for pairing");
	json_t *reply = pair_answer(w->daemon->cfg, w->daemon->codes, request, w->from, err);
	return reply ? reply_ok(w->link, reply) : answer(w, err->code, err);
}

/* ---- its life
 * ---------------------------------------------------------------------------------------------- */

static void serve(struct worker *w)
{
	for (;;) {
		struct error err = ERROR_INIT;
		json_t *request = NULL;
		int rc = jsonl_read(w->link, &request, NULL, 0, &err);
		if (rc < 0) {
			if (rc != -ENODATA && rc != -ECONNRESET)
				log_warn("snvmm %d: %s", (int)w->pid, err.message);
			return;
		}
		const char *cmd = json_string_value(json_object_get(request, "cmd"));
		if (!cmd)
			cmd = "";
		if (!strcmp(cmd, "incoming")) {
			rc = admit(w, request, &err);
			rc = rc < 0 ? answer(w, rc, &err) : answer_admitted(w);
		} else if (!strcmp(cmd, "may-arrive")) {
			json_t *refusals = NULL;
			rc = may_arrive(w, request, &refusals, &err);
			rc = rc < 0 ? answer(w, rc, &err)
				    : reply_ok(w->link, json_pack("{s:o}", "refusals", refusals));
		} else if (!strcmp(cmd, "pair")) {
			rc = pair(w, request, &err);
		} else if (!strcmp(cmd, "tokens")) {
			rc = answer(w, take_tokens(w, request, &err), &err);
		} else if (!strcmp(cmd, "refused")) {
			const char *reason = json_string_value(json_object_get(request, "reason"));
			log_info("arrival refused: %s", reason ? reason : "no reason given");
			rc = answer(w, 0, &err);
		} else if (!strcmp(cmd, "arrived")) {
			pthread_mutex_lock(&w->daemon->lock);
			w->arrived = true;
			pthread_mutex_unlock(&w->daemon->lock);
			log_info("VM %s has arrived", w->name);
			rc = answer(w, 0, &err);
		} else {
			error_set(&err, EPROTO, "unknown command '%.32s'", cmd);
			rc = answer(w, -EPROTO, &err);
		}
		json_decref(request);
		if (rc < 0)
			return;
	}
}

/* daemon->lock held. */
static void forget(struct worker *w)
{
	struct worker **at = &w->daemon->workers;
	while (*at != w)
		at = &(*at)->next;
	*at = w->next;
}

static void *run(void *arg)
{
	struct worker *w = arg;
	struct daemon *d = w->daemon;
	serve(w);
	/* The link ends with the process, or because it has no more use for it. An admitted one is its
	 * keeper's to watch. */
	pthread_mutex_lock(&d->lock);
	bool admitted = w->admitted;
	forget(w);
	pthread_mutex_unlock(&d->lock);
	if (!admitted) {
		struct pollfd p = {.fd = w->pidfd, .events = POLLIN};
		siginfo_t info;
		if (poll(&p, 1, DAEMON_CALL_TIMEOUT_MS) == 0)
			log_warn("snvmm %d does not end, killing it", (int)w->pid);
		spawn_group_kill(w->group, NULL);
		spawn_group_wait_empty(w->group, DAEMON_GROUP_TIMEOUT_MS, NULL);
		waitid(P_PIDFD, (id_t)w->pidfd, &info, WEXITED);
		SCOPE_LOCK(&d->lock);
		d->unproven--;
	}
	close(w->pidfd);
	jsonl_close(w->link);
	free(w);
	return NULL;
}

static int start(struct worker *w, int fd, struct error *err)
{
	const struct host_config *cfg = w->daemon->cfg;
	char log_path[REGISTRY_PATH_BYTES];
	int pair[2], rc = registry_log_path(cfg, "incoming", log_path, err);
	if (rc < 0)
		return rc;
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
		return error_errno(err, errno, "socketpair");
	const char *argv[] = {cfg->snvmm, w->kind == WORKER_PAIR ? "--pair" : "--incoming",	"--config",
			      cfg->path,  w->kind == WORKER_CONTROL_PAIRED ? "--paired" : NULL, NULL};
	int fds[] = {fd, pair[1]};
	struct spawn_options opt = {
		.group = w->group, .argv = argv, .fds = fds, .nfds = 2, .log_path = log_path};
	w->pid = spawn_start(&opt, err);
	close(pair[1]);
	if (w->pid < 0) {
		close(pair[0]);
		return (int)w->pid;
	}
	w->pidfd = pidfd_open(w->pid, 0);
	w->link = jsonl_from_fd(pair[0]);
	return w->link && w->pidfd >= 0 ? 0 : error_errno(err, ENOMEM, "snvmm");
}

/* daemon->lock held. */
static bool has_room(struct daemon *d, const char *from, enum worker_kind kind)
{
	unsigned same = 0, pairings = 0;
	for (const struct worker *w = d->workers; w; w = w->next) {
		same += !w->admitted && !strcmp(w->from, from);
		pairings += w->kind == WORKER_PAIR;
	}
	return d->unproven < DAEMON_UNPROVEN_MAX && same < DAEMON_UNPROVEN_MAX / DAEMON_SHARE_OF_ONE &&
	       (kind != WORKER_PAIR || pairings < DAEMON_PAIRINGS_MAX);
}

void worker_start(struct daemon *d, int fd, const char *from, enum worker_kind kind)
{
	CLEANUP_FD int conn = fd;
	struct error err = ERROR_INIT;
	struct worker *w = calloc(1, sizeof *w);
	if (!w)
		return;
	w->daemon = d;
	w->pidfd = -1;
	w->kind = kind;
	pthread_mutex_lock(&d->lock);
	snprintf(w->from, sizeof w->from, "%s", from);
	bool room = has_room(d, from, kind);
	if (room) {
		/* counted from here on: others are looking for room at the same time */
		d->unproven++;
		w->next = d->workers;
		d->workers = w;
	}
	snprintf(w->group, sizeof w->group, "connection-%d-%u", (int)getpid(), d->next_connection++);
	pthread_mutex_unlock(&d->lock);
	if (!room) {
		log_warn("too many connections have not proved themselves yet, closing another one from %s",
			 from);
		free(w);
		return;
	}
	int rc = start(w, conn, &err);
	pthread_t thread;
	if (!rc) {
		if (pthread_create(&thread, NULL, run, w) == 0) {
			pthread_detach(thread);
			return;
		}
		/* no thread to be had: do it in this one, whose connection is done with */
		run(w);
		return;
	}
	log_error("starting snvmm for a connection: %s", err.message);
	if (w->pid > 0) {
		kill(w->pid, SIGKILL);
		waitpid(w->pid, NULL, 0);
	}
	jsonl_close(w->link);
	if (w->pidfd >= 0)
		close(w->pidfd);
	SCOPE_LOCK(&d->lock);
	forget(w);
	d->unproven--;
	free(w);
}

/* ---- channels of a VM that arrived before this daemon was started
 * ---------------------------------------------------------------------------------------------- */

struct offer {
	struct daemon *daemon;
	json_t *message;
	int fd;
	bool taken;
};

/* Only the VM's snvmm knows which tokens are its own. */
static int offer_each(void *opaque, const char *uuid)
{
	struct offer *o = opaque;
	struct record *r = NULL;
	struct vm_record rec;
	struct jsonl *vmm = NULL;
	json_t *reply = NULL;
	char folder[REGISTRY_PATH_BYTES], path[REGISTRY_PATH_BYTES + 16];
	int rc = o->taken ? -EALREADY : record_open(o->daemon->cfg->state_dir, uuid, &r, NULL);
	if (!rc)
		rc = record_load(r, &rec, NULL);
	record_close(r);
	if (rc || (rec.state != HANDOVER_OWNER && rec.state != HANDOVER_OWNER_UNCONFIRMED) ||
	    registry_path(o->daemon->cfg, rec.folder, folder, NULL) < 0)
		return 0;
	snprintf(path, sizeof path, "%s/snvmm.sock", folder);
	if (jsonl_connect(path, OFFER_TIMEOUT_MS, &vmm, NULL) < 0)
		return 0;
	if (jsonl_write(vmm, o->message, o->fd, NULL) == 0 &&
	    jsonl_read(vmm, &reply, NULL, OFFER_TIMEOUT_MS, NULL) == 0)
		o->taken = json_is_true(json_object_get(reply, "ok"));
	json_decref(reply);
	jsonl_close(vmm);
	return 0;
}

static bool offer_to_vms(struct daemon *d, const char *channel, const char *token, int fd)
{
	struct offer o = {.daemon = d, .fd = fd};
	o.message = json_pack("{s:s, s:s, s:s}", "cmd", "channel", "channel", channel, "token", token);
	if (o.message)
		record_list(d->cfg->state_dir, offer_each, &o, NULL);
	json_decref(o.message);
	return o.taken;
}

void worker_route(struct daemon *d, const char *channel, const char *token, int fd)
{
	CLEANUP_FD int conn = fd;
	json_t *message = json_pack("{s:s, s:s}", "channel", channel, "token", token);
	struct error err = ERROR_INIT;
	bool found = false;
	/* The write under the lock keeps the worker alive; it is bounded, and a Unix socket of a live reader
	 * has room. */
	pthread_mutex_lock(&d->lock);
	for (struct worker *w = d->workers; w && !found; w = w->next)
		for (unsigned i = 0; i < w->ntokens && !found; i++)
			if (!strcmp(w->tokens[i], token)) {
				found = true;
				if (!message || jsonl_write(w->link, message, conn, &err) < 0)
					log_warn("passing a %s connection on: %s", channel, err.message);
			}
	pthread_mutex_unlock(&d->lock);
	json_decref(message);
	/* Pages may be on the way to a VM that arrived before this daemon was started. */
	if (!found && !strcmp(channel, channel_name(CHANNEL_MEMORY)))
		found = offer_to_vms(d, channel, token, conn);
	if (!found)
		log_warn("a %s connection with an unknown token, closed", channel);
}
