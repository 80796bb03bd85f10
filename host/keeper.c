/* SPDX-License-Identifier: Apache-2.0 */
#include <dirent.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/pidfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "host/ask.h"
#include "host/daemon.h"
#include "host/exit.h"
#include "host/partial.h"
#include "host/spawn.h"

#define ASK_TIMEOUT_MS	  5000
#define ASK_INTERVAL_MS	  1000
#define ADOPT_INTERVAL_MS 100
#define CLEAN_TRIES	  3

void daemon_timed_wait(struct daemon *d, unsigned ms)
{
	uint64_t at = clock_now_ns() + ms * UINT64_C(1000000);
	struct timespec until = clock_timespec(at);
	pthread_cond_timedwait(&d->changed, &d->lock, &until);
}

/* ---- what others call
 * -------------------------------------------------------------------------------------- */

static struct keeper *find_locked(struct daemon *d, const char *uuid)
{
	struct keeper *k = d->keepers;
	while (k && strcmp(k->uuid, uuid))
		k = k->next;
	return k;
}

struct keeper *keeper_find(struct daemon *d, const char *uuid)
{
	SCOPE_LOCK(&d->lock);
	return find_locked(d, uuid);
}

void keeper_wake(struct keeper *k)
{
	uint64_t one = 1;
	if (write(k->wake_fd, &one, sizeof one) < 0)
		log_debug("wake: %s", strerror(errno));
}

static void *keep(void *arg);

static int run_locked(struct keeper *k, struct error *err)
{
	pthread_t thread;
	if (k->running)
		return 0;
	int rc = pthread_create(&thread, NULL, keep, k);
	if (rc)
		return error_errno(err, rc, "VM %s: a thread for it", k->uuid);
	pthread_detach(thread);
	k->running = true;
	return 0;
}

void keeper_attach(struct keeper *k, pid_t pid, int pidfd)
{
	struct daemon *d = k->daemon;
	struct error err = ERROR_INIT;
	pthread_mutex_lock(&d->lock);
	if (k->pidfd >= 0)
		close(k->pidfd);
	k->pid = pid;
	k->pidfd = pidfd;
	k->settled = false;
	if (run_locked(k, &err) < 0)
		log_error("%s", err.message);
	pthread_cond_broadcast(&d->changed);
	pthread_mutex_unlock(&d->lock);
	keeper_wake(k);
}

bool keeper_is_live(struct keeper *k)
{
	SCOPE_LOCK(&k->daemon->lock);
	return k->pidfd >= 0;
}

bool keeper_wait_dead(struct keeper *k, unsigned timeout_ms)
{
	uint64_t deadline = clock_now_ms() + timeout_ms;
	SCOPE_LOCK(&k->daemon->lock);
	while (k->pidfd >= 0) {
		if (clock_now_ms() >= deadline)
			return false;
		daemon_timed_wait(k->daemon, 100);
	}
	return true;
}

int keeper_settle_now(struct keeper *k, unsigned timeout_ms)
{
	struct daemon *d = k->daemon;
	uint64_t deadline = clock_now_ms() + timeout_ms;
	SCOPE_LOCK(&d->lock);
	/* the round under way may have begun before the cause to ask */
	unsigned want = k->rounds + 2;
	while (k->running && k->pidfd < 0 && (int)(k->rounds - want) < 0) {
		if (clock_now_ms() >= deadline)
			return -ETIMEDOUT;
		keeper_wake(k);
		daemon_timed_wait(d, 50);
	}
	return 0;
}

bool keeper_wait_cleaned(struct keeper *k, uint64_t epoch, unsigned timeout_ms)
{
	struct daemon *d = k->daemon;
	uint64_t deadline = clock_now_ms() + timeout_ms;
	SCOPE_LOCK(&d->lock);
	while (k->cleaned_epoch < epoch) {
		if (clock_now_ms() >= deadline)
			return false;
		daemon_timed_wait(d, 100);
	}
	return true;
}

int keeper_empty_group(struct keeper *k, struct error *err)
{
	int rc = spawn_group_is_empty(k->uuid, err);
	if (rc < 0)
		return rc;
	/* A qemu-nbd whose client died ends by itself, its image in order; killed, it may leave the image
	 * corrupt. */
	if (rc == 0 && spawn_group_wait_empty(k->uuid, DAEMON_ORDERLY_END_MS, NULL) == 0)
		return 0;
	if (rc == 0) {
		log_info("VM %s: ending processes that its snvmm left behind", k->uuid);
		rc = spawn_group_kill(k->uuid, err);
		if (rc < 0)
			return rc;
	}
	return spawn_group_wait_empty(k->uuid, DAEMON_GROUP_TIMEOUT_MS, err);
}

/* ---- the thread
 * -------------------------------------------------------------------------------------------- */

/* Waits for a wake, at most ms (0: for ever). */
static void rest(struct keeper *k, unsigned ms)
{
	struct pollfd p = {.fd = k->wake_fd, .events = POLLIN};
	uint64_t count;
	if (poll(&p, 1, ms ? (int)ms : -1) > 0 && read(k->wake_fd, &count, sizeof count) < 0)
		log_debug("wake: %s", strerror(errno));
}

static void round_done(struct keeper *k, bool settled)
{
	SCOPE_LOCK(&k->daemon->lock);
	k->rounds++;
	k->settled = settled;
	pthread_cond_broadcast(&k->daemon->changed);
}

static void watch_process(struct keeper *k, int pidfd)
{
	struct pollfd p[2] = {{.fd = pidfd, .events = POLLIN}, {.fd = k->wake_fd, .events = POLLIN}};
	while (!(p[0].revents & POLLIN)) {
		uint64_t count;
		if (poll(p, 2, -1) > 0 && p[1].revents && read(k->wake_fd, &count, sizeof count) < 0)
			log_debug("wake: %s", strerror(errno));
	}
	siginfo_t info = {0};
	bool ours = waitid(P_PIDFD, (id_t)pidfd, &info, WEXITED) == 0;
	SCOPE_LOCK(&k->daemon->lock);
	if (ours)
		log_info("VM %s: snvmm %d %s %d", k->uuid, (int)k->pid,
			 info.si_code == CLD_EXITED ? "ended with status" : "was ended by signal",
			 info.si_status);
	else
		log_info("VM %s: snvmm %d ended", k->uuid, (int)k->pid);
	close(k->pidfd);
	k->pidfd = -1;
	k->pid = 0;
	k->stops++;
	pthread_cond_broadcast(&k->daemon->changed);
}

/* Calls each with every folder of an arrival of this VM, "incoming/UUID-EPOCH"; a non-zero return ends it. */
static int each_arrival(struct keeper *k, int (*each)(struct keeper *k, const char *rel, void *opaque),
			void *opaque)
{
	char path[REGISTRY_PATH_BYTES], rel[REGISTRY_FOLDER_BYTES];
	int rc = registry_path(k->daemon->cfg, "incoming", path, NULL);
	DIR *dir = rc < 0 ? NULL : opendir(path);
	struct dirent *de;
	while (dir && !rc && (de = readdir(dir))) {
		if (strncmp(de->d_name, k->uuid, VM_UUID_CHARS) || de->d_name[VM_UUID_CHARS] != '-')
			continue;
		snprintf(rel, sizeof rel, "incoming/%.200s", de->d_name);
		rc = each(k, rel, opaque);
	}
	if (dir)
		closedir(dir);
	return rc;
}

static int remove_one(struct keeper *k, const char *rel, void *opaque)
{
	log_info("removing %s, which no record knows", rel);
	return registry_remove_incoming(k->daemon->cfg, rel, opaque);
}

static int remove_arrivals(struct keeper *k, struct error *err)
{
	return each_arrival(k, remove_one, err);
}

/* 1 when the snvmm that listens in this folder is the VM's, and is watched now. */
static int adopt_in(struct keeper *k, const char *rel, void *opaque)
{
	struct vm_ref vm = {.keeper = k};
	struct jsonl *j = NULL;
	struct ucred cred;
	socklen_t len = sizeof cred;
	if (registry_path(k->daemon->cfg, rel, vm.dir, NULL) < 0 || vm_connect(&vm, &j, NULL) < 0)
		return 0;
	json_t *request = json_pack("{s:s, s:[i,i]}", "cmd", "hello", "versions", 1, DAEMON_SNVMM_PROTOCOL),
	       *reply = NULL;
	struct error err = ERROR_INIT;
	bool good = jsonl_call(j, request, &reply, NULL, DAEMON_CALL_TIMEOUT_MS, &err) == 0;
	const char *uuid = json_string_value(json_object_get(reply, "uuid"));
	if (good && (!uuid || strcmp(uuid, k->uuid)))
		good = false;
	/* the kernel's word for who listens there */
	int pidfd = -1;
	if (good && getsockopt(jsonl_fd(j), SOL_SOCKET, SO_PEERCRED, &cred, &len) == 0)
		pidfd = pidfd_open(cred.pid, 0);
	json_decref(request);
	json_decref(reply);
	jsonl_close(j);
	if (pidfd < 0) {
		log_warn("%s: cannot adopt its snvmm: %s", rel, err.code ? err.message : strerror(errno));
		return 0;
	}
	log_info("%s: adopted snvmm %d", rel, (int)cred.pid);
	keeper_attach(k, cred.pid, pidfd);
	return 1;
}

/*
 * Somebody holds the record's lock, or there is no record yet: the live snvmm, in its place or still
 * arriving, is found by its socket. rec, which may be NULL, is a hint: an arrival keeps the record of the
 * attempt before it until it is prepared.
 */
static bool adopt(struct keeper *k, const struct vm_record *rec)
{
	char rel[REGISTRY_FOLDER_BYTES];
	if (rec && adopt_in(k, rec->folder, NULL))
		return true;
	if (rec) {
		/* renamed, but not noted yet */
		registry_vm_rel(rec->name, rel);
		if (adopt_in(k, rel, NULL))
			return true;
	}
	return each_arrival(k, adopt_in, NULL) > 0;
}

/* The last line of the move gets what only the cleaning daemon knows. */
static void complete_result(struct keeper *k, const struct vm_record *rec, json_t *left, bool clean)
{
	const struct host_config *cfg = k->daemon->cfg;
	json_t *result = NULL;
	if (registry_result_load(cfg, k->uuid, &result, NULL) < 0 ||
	    (uint64_t)json_integer_value(json_object_get(result, "epoch")) != rec->epoch) {
		json_decref(result);
		/* the snvmm died before it could write it: its figures are gone with it */
		result = json_pack("{s:s, s:s, s:s, s:s, s:s, s:I}", "event", "end", "result", "moved",
				   "uuid", k->uuid, "vm", rec->name, "destination", rec->peer, "epoch",
				   (json_int_t)rec->epoch);
		static const char *const figures[] = {"total_ms",    "storage_ms",   "memory_ms",
						      "downtime_ms", "memory_bytes", "disk_bytes",
						      "wire_bytes",  "rounds"};
		for (size_t i = 0; result && i < ARRAY_SIZE(figures); i++)
			json_object_set_new(result, figures[i], json_null());
	}
	if (!result)
		return;
	json_object_set_new(result, "result", json_string("moved"));
	json_object_set_new(result, "exit", json_integer(clean ? EXIT_MOVED : EXIT_NOT_CLEANED));
	json_object_set_new(result, "reason",
			    json_string(clean ? "" : "moved, but files are left at the source"));
	json_object_set(result, "left_behind", left);
	struct error err = ERROR_INIT;
	if (registry_result_store(cfg, k->uuid, result, &err) < 0)
		log_warn("VM %s: %s", rec->name, err.message);
	json_decref(result);
}

static bool below(const char *path, const char *folder)
{
	size_t n = strlen(folder);
	return !strncmp(path, folder, n) && path[n] == '/';
}

/* Disks that both hosts see are where they were, and in use: they are not left behind. */
static void leave_out_shared(struct keeper *k, uint64_t epoch, json_t *left)
{
	json_t *result = NULL, *path;
	size_t i, n;
	if (registry_result_load(k->daemon->cfg, k->uuid, &result, NULL) < 0 ||
	    (uint64_t)json_integer_value(json_object_get(result, "epoch")) != epoch) {
		json_decref(result);
		return;
	}
	json_array_foreach(json_object_get(result, "shared"), i,
			   path) for (n = json_array_size(left);
				      n-- > 0;) if (json_equal(json_array_get(left, n), path))
		json_array_remove(left, n);
	json_decref(result);
}

/* The source after a move. */
static int clean_moved(struct keeper *k, struct vm_record *rec, struct error *err)
{
	const struct host_config *cfg = k->daemon->cfg;
	json_t *left = NULL;
	int rc = -EIO;
	char kept[REGISTRY_FOLDER_BYTES], dir[REGISTRY_PATH_BYTES];
	for (int i = 0; rc < 0 && i < CLEAN_TRIES; i++) {
		if (i)
			clock_sleep_ms(500);
		json_decref(left);
		left = NULL;
		if (rec->flags & RECORD_KEEP_SOURCE)
			rc = registry_keep(cfg, rec->folder, rec->name, rec->epoch, kept, err);
		else
			rc = registry_delete_moved(cfg, rec->folder, &left, err);
	}
	bool clean = rc == 0;
	if (!left)
		left = json_array();
	if (rc < 0) {
		log_error("VM %s: cleaning up after the move: %s", rec->name, err->message);
		if (registry_path(cfg, rec->folder, dir, NULL) == 0 && json_array_size(left) == 0)
			json_array_append_new(left, jsonl_text(dir));
	} else if (rec->flags & RECORD_KEEP_SOURCE) {
		snprintf(rec->folder, sizeof rec->folder, "%s", kept);
	}
	size_t i;
	json_t *path;
	leave_out_shared(k, rec->epoch, left);
	registry_path(cfg, rec->folder, dir, NULL);
	json_array_foreach(left, i, path)
	{
		log_warn("VM %s: left behind: %s", rec->name, json_string_value(path));
		/* a disk outside the VM's folder was never the registry's to delete */
		if (below(json_string_value(path), dir))
			clean = false;
	}
	complete_result(k, rec, left, clean);
	json_decref(left);
	return 0;
}

static int clean(struct keeper *k, struct record *r, struct vm_record *rec, struct error *err)
{
	const struct host_config *cfg = k->daemon->cfg;
	char kept[REGISTRY_FOLDER_BYTES];
	int rc;
	if (rec->state == HANDOVER_MOVED) {
		rc = clean_moved(k, rec, err);
	} else if (!strncmp(rec->folder, "incoming/", 9)) {
		rc = partial_end_arrival(cfg, rec->folder, NULL, err);
	} else {
		/* given up by a person: kept aside, never deleted */
		rc = registry_keep(cfg, rec->folder, rec->name, rec->epoch, kept, err);
		if (!rc)
			snprintf(rec->folder, sizeof rec->folder, "%s", kept);
		else if (rc == -ENOENT)
			rc = 0;
	}
	if (rc < 0)
		return rc;
	rec->flags |= RECORD_FILES_DONE;
	rc = record_store(r, rec, err);
	if (rc < 0)
		return rc;
	log_info("VM %s: %s cleaned", rec->name, rec->state == HANDOVER_MOVED ? "source" : "arrival");
	if (rec->state == HANDOVER_MOVED) {
		SCOPE_LOCK(&k->daemon->lock);
		k->cleaned_epoch = rec->epoch;
		pthread_cond_broadcast(&k->daemon->changed);
	}
	return 0;
}

/* An owner whose folder has not got its place yet, or whose creation was interrupted. 1: the record is gone.
 */
static int check_owner(struct keeper *k, struct record *r, struct vm_record *rec, struct error *err)
{
	const struct host_config *cfg = k->daemon->cfg;
	char dir[REGISTRY_PATH_BYTES];
	struct stat st;
	int rc = registry_path(cfg, rec->folder, dir, err);
	if (rc < 0)
		return rc;
	if (!strncmp(rec->folder, "incoming/", 9)) {
		rc = registry_publish(cfg, rec->folder, rec->name, err);
		if (rc < 0)
			return rc;
		registry_vm_rel(rec->name, rec->folder);
		log_info("VM %s: its folder got its place", rec->name);
		return record_store(r, rec, err);
	}
	if (stat(dir, &st) < 0 && errno == ENOENT) {
		if (rec->epoch > 1 || rec->state != HANDOVER_OWNER || rec->flags)
			return error_errno(err, ENOENT, "%s", dir);
		log_info("VM %s: its creation was interrupted, forgetting it", rec->name);
		rc = record_remove(r, err);
		return rc < 0 ? rc : 1;
	}
	return 0;
}

/* One look at the record, locked, by a dead VM's daemon. *wait_ms: how long to rest then; 0 = for ever.
 * False: end. */
static bool settle_round(struct keeper *k, struct record *r, unsigned *wait_ms, unsigned *asked)
{
	struct daemon *d = k->daemon;
	struct vm_record rec;
	struct error err = ERROR_INIT;
	enum handover_action next = HANDOVER_ACT_NONE;
	*wait_ms = ASK_INTERVAL_MS;
	int rc = keeper_empty_group(k, &err);
	if (!rc)
		rc = settle_record(r, &rec, NULL, &next, &err);
	while (!rc && next == HANDOVER_ACT_CLEAN) {
		rc = clean(k, r, &rec, &err);
		if (!rc)
			rc = settle_record(r, &rec, NULL, &next, &err);
	}
	if (!rc && next == HANDOVER_ACT_FORGET)
		return false;
	if (!rc && next == HANDOVER_ACT_NONE) {
		rc = check_owner(k, r, &rec, &err);
		if (rc > 0)
			return false;
		*wait_ms = rc ? 30000 : 0;
	}
	if (rc < 0) {
		log_error("VM %s: %s", k->uuid, err.message);
		return true;
	}
	if (next != HANDOVER_ACT_ASK && next != HANDOVER_ACT_IN_DOUBT)
		return true;

	/* the lock must not be held over the network: the peer may ask at the same time */
	record_unlock(r);
	pthread_mutex_unlock(&k->op);
	struct handover_self self = {.live = false};
	struct handover_report own, answer = {0};
	handover_describe(&rec, &self, false, &own);
	rc = ask_peer(d->cfg, rec.peer, rec.peer_address, rec.uuid, &own, ASK_TIMEOUT_MS, &answer, &err);
	pthread_mutex_lock(&d->lock);
	k->last_ask = rc < 0 ? err : ERROR_INIT;
	k->last_answer = answer.state;
	pthread_mutex_unlock(&d->lock);
	if (rc < 0 && (*asked)++ % 30 == 0)
		log_info("VM %s (%s): %s; asking again", rec.name, handover_state_name(rec.state),
			 err.message);
	pthread_mutex_lock(&k->op);
	if (rc < 0 || keeper_is_live(k) || record_lock(r, 1000, NULL) < 0)
		return true;
	*asked = 0;
	enum handover_state was = rec.state;
	rc = settle_record(r, &rec, &answer, &next, &err);
	if (rc < 0)
		log_error("VM %s: %s", rec.name, err.message);
	else if (next == HANDOVER_ACT_FORGET)
		log_info("VM %s: the record (%s) is no longer needed", rec.name, handover_state_name(was));
	else if (next == HANDOVER_ACT_CLEAN || next == HANDOVER_ACT_NONE)
		*wait_ms = 1; /* go on at once */
	return rc < 0 || next != HANDOVER_ACT_FORGET;
}

/* False: there is nothing left to keep. */
static bool look(struct keeper *k, unsigned *asked)
{
	struct daemon *d = k->daemon;
	struct record *r = NULL;
	struct vm_record hint;
	struct error err = ERROR_INIT;
	unsigned wait_ms = ASK_INTERVAL_MS;
	int rc = record_open(d->cfg->state_dir, k->uuid, &r, &err);
	if (rc == -ENOENT) {
		pthread_mutex_lock(&k->op);
		/* an arrival has no record before it is prepared */
		bool arriving = keeper_is_live(k) || adopt(k, NULL);
		rc = arriving ? 1 : keeper_empty_group(k, &err);
		if (!rc)
			rc = remove_arrivals(k, &err);
		pthread_mutex_unlock(&k->op);
		if (rc < 0)
			log_error("VM %s: %s", k->uuid, err.message);
		if (rc < 0)
			rest(k, ASK_INTERVAL_MS);
		return rc != 0;
	}
	bool more = true;
	pthread_mutex_lock(&k->op);
	bool live = keeper_is_live(k);
	if (!rc && !live)
		rc = record_lock(r, 0, &err);
	if (live) {
		wait_ms = 1;
	} else if (rc == -EBUSY) {
		wait_ms = ADOPT_INTERVAL_MS;
		if (record_load(r, &hint, NULL) == 0)
			adopt(k, &hint);
	} else if (rc == 0) {
		more = settle_round(k, r, &wait_ms, asked);
	} else if (rc != -ENOENT) {
		log_error("VM %s: %s", k->uuid, err.message);
		wait_ms = 30000;
	}
	record_close(r);
	pthread_mutex_unlock(&k->op);
	round_done(k, more && wait_ms != 1);
	if (more)
		rest(k, wait_ms);
	return more;
}

static void *keep(void *arg)
{
	struct keeper *k = arg;
	struct daemon *d = k->daemon;
	unsigned asked = 0;
	for (;;) {
		pthread_mutex_lock(&d->lock);
		int pidfd = k->pidfd;
		pthread_mutex_unlock(&d->lock);
		if (pidfd >= 0) {
			watch_process(k, pidfd);
			continue;
		}
		if (look(k, &asked))
			continue;
		SCOPE_LOCK(&d->lock);
		k->rounds++;
		k->settled = true;
		/* a snvmm may have been attached meanwhile */
		if (k->pidfd >= 0)
			continue;
		k->running = false;
		pthread_cond_broadcast(&d->changed);
		return NULL;
	}
}

struct keeper *keeper_get(struct daemon *d, const char *uuid, struct error *err)
{
	SCOPE_LOCK(&d->lock);
	struct keeper *k = find_locked(d, uuid);
	if (!k) {
		k = calloc(1, sizeof *k);
		if (!k) {
			error_errno(err, ENOMEM, "VM %s", uuid);
			return NULL;
		}
		k->daemon = d;
		k->pidfd = -1;
		strcpy(k->uuid, uuid);
		pthread_mutex_init(&k->op, NULL);
		k->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		if (k->wake_fd < 0) {
			error_errno(err, errno, "VM %s", uuid);
			free(k);
			return NULL;
		}
		k->next = d->keepers;
		d->keepers = k;
	}
	return run_locked(k, err) < 0 ? NULL : k;
}

static int start_one(void *opaque, const char *uuid)
{
	struct error err = ERROR_INIT;
	if (!keeper_get(opaque, uuid, &err))
		log_error("%s", err.message);
	return 0;
}

int keepers_start(struct daemon *d, struct error *err)
{
	return record_list(d->cfg->state_dir, start_one, d, err);
}
