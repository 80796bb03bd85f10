/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/pidfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "host/daemon.h"
#include "host/exit.h"
#include "host/fsutil.h"
#include "host/spawn.h"

#define STOP_TIMEOUT_DEFAULT_MS 60000
#define STOP_TIMEOUT_MAX_MS	86400000
#define QUIT_TIMEOUT_MS		5000
#define INFO_TIMEOUT_MS		2000

int reply_ok(struct jsonl *client, json_t *more)
{
	json_t *o = more ? more : json_object();
	json_object_set_new(o, "ok", json_true());
	int rc = jsonl_write(client, o, -1, NULL);
	json_decref(o);
	return rc;
}

/* ---- what a VM looks like
 * ---------------------------------------------------------------------------------- */

static void absolute_paths(json_t *disks, const char *dir)
{
	size_t i;
	json_t *disk;
	json_array_foreach(disks, i, disk)
	{
		const char *path = json_string_value(json_object_get(disk, "path"));
		char whole[2 * REGISTRY_PATH_BYTES];
		if (path && *path != '/' && fs_join(whole, sizeof whole, dir, path, NULL) == 0)
			json_object_set_new(disk, "path", jsonl_text(whole));
	}
}

static json_t *describe_definition(const struct vm_ref *vm)
{
	struct vm_definition *def = malloc(sizeof *def);
	json_t *o = json_object(), *disks = json_array();
	CLEANUP_FD int dirfd = fs_open_dir(vm->dir, NULL);
	if (def && dirfd >= 0 && registry_load_definition(dirfd, vm->dir, def, NULL) == 0) {
		json_object_set_new(o, "memory_bytes", json_integer((json_int_t)def->memory_bytes));
		json_object_set_new(o, "cpus", json_integer(def->cpus));
		for (unsigned i = 0; i < def->ndisks; i++)
			json_array_append_new(disks, json_pack("{s:s, s:o, s:s}", "id", def->disks[i].id,
							       "path", jsonl_text(def->disks[i].path),
							       "format", def->disks[i].format));
	} else {
		json_object_set_new(o, "memory_bytes", json_integer(0));
		json_object_set_new(o, "cpus", json_integer(0));
	}
	json_object_set_new(o, "disks", disks);
	free(def);
	return o;
}

json_t *vm_describe(struct daemon *d, struct vm_ref *vm, bool always)
{
	json_t *reply = NULL, *o;
	struct jsonl *j = NULL;
	json_t *request = json_pack("{s:s}", "cmd", "info");
	struct handover_self self = {.live = false};
	if (vm_connect(vm, &j, NULL) == 0 && jsonl_call(j, request, &reply, NULL, INFO_TIMEOUT_MS, NULL) == 0)
		self.live = true;
	jsonl_close(j);
	json_decref(request);
	enum vm_state state = handover_vm_state(&vm->rec, &self, false);
	/* One that has moved is not listed, although its snvmm may have memory to hand out still. */
	if (state == VM_ABSENT && !always) {
		json_decref(reply);
		return NULL;
	}
	if (self.live) {
		o = json_incref(reply);
		json_object_del(o, "ok");
	} else {
		o = describe_definition(vm);
		json_object_set_new(o, "state", json_string(vm_state_name(state)));
		json_object_set_new(o, "state_reason", jsonl_text(vm->rec.reason));
		json_object_set_new(o, "migrating", json_null());
	}
	json_decref(reply);
	json_object_set_new(o, "uuid", json_string(vm->rec.uuid));
	json_object_set_new(o, "name", json_string(vm->rec.name));
	json_object_set_new(o, "host", json_string(d->cfg->name));
	json_object_set_new(o, "folder", jsonl_text(vm->dir));
	json_object_set_new(o, "record", json_string(handover_state_name(vm->rec.state)));
	json_object_set_new(o, "epoch", json_integer((json_int_t)vm->rec.epoch));
	json_object_set_new(o, "peer", json_string(vm->rec.peer));
	absolute_paths(json_object_get(o, "disks"), vm->dir);
	return o;
}

struct listing {
	struct daemon *daemon;
	json_t *vms;
};

static int list_each(void *opaque, const char *uuid)
{
	struct listing *l = opaque;
	struct vm_ref vm = {0};
	if (record_hint(l->daemon->cfg, uuid, &vm.rec) == 0 &&
	    registry_path(l->daemon->cfg, vm.rec.folder, vm.dir, NULL) == 0) {
		json_t *o = vm_describe(l->daemon, &vm, false);
		if (o)
			json_array_append_new(l->vms, o);
	}
	return 0;
}

static int command_list(struct command_context *c, struct error *err)
{
	struct listing l = {.daemon = c->daemon, .vms = json_array()};
	int rc = record_list(c->daemon->cfg->state_dir, list_each, &l, err);
	if (rc < 0) {
		json_decref(l.vms);
		return EXIT_FAILED;
	}
	reply_ok(c->client, json_pack("{s:o}", "vms", l.vms));
	return 0;
}

static int command_info(struct command_context *c, struct error *err)
{
	struct vm_ref vm;
	if (vm_find_present(c->daemon, c->request, &vm, err) < 0)
		return EXIT_REFUSED;
	reply_ok(c->client, json_pack("{s:o}", "vm", vm_describe(c->daemon, &vm, true)));
	return 0;
}

/* ---- create and delete
 * ------------------------------------------------------------------------------------- */

static int command_create(struct command_context *c, struct error *err)
{
	const char *text = json_string_value(json_object_get(c->request, "definition"));
	const char *origin = json_string_value(json_object_get(c->request, "origin"));
	const char *base = json_string_value(json_object_get(c->request, "base_dir"));
	CLEANUP_FREE struct vm_definition *def = malloc(sizeof *def);
	if (!def || !text || !origin || !base || *base != '/')
		return error_set(err, EINVAL, "malformed request to create a VM"), EXIT_USAGE;
	struct vm_ref other;
	int rc = vmdef_parse(text, strlen(text), origin, def, err);
	if (!rc && vm_find(c->daemon, def->name, &other, NULL) == 0 && vm_is_present(&other.rec))
		rc = error_set(err, EEXIST, "a VM named %s is already on host %s", def->name,
			       c->daemon->cfg->name);
	if (!rc)
		rc = registry_create_vm(c->daemon->cfg, def, base, json_object_get(c->request, "imports"),
					err);
	if (rc < 0)
		return EXIT_REFUSED;
	keeper_get(c->daemon, def->uuid, NULL);
	log_set_vm(def->name);
	log_info("VM %s created, %s", def->name, def->uuid);
	reply_ok(c->client, json_pack("{s:s, s:s}", "name", def->name, "uuid", def->uuid));
	return 0;
}

static int delete_locked(struct daemon *d, struct vm_ref *vm, struct record *r, json_t **left,
			 struct error *err)
{
	int rc = record_load(r, &vm->rec, err);
	if (!rc)
		rc = handover_may_delete(&vm->rec, err);
	if (!rc)
		rc = keeper_empty_group(vm->keeper, err);
	/* the files first: a record without files can be deleted again, files without a record would be
	 * forgotten */
	if (!rc)
		rc = registry_delete_moved(d->cfg, vm->rec.folder, left, err);
	return rc < 0 ? rc : record_remove(r, err);
}

static int command_delete(struct command_context *c, struct error *err)
{
	struct daemon *d = c->daemon;
	struct vm_ref vm;
	struct record *r = NULL;
	json_t *left = NULL;
	int rc = vm_find_arrived(d, c->request, &vm, err);
	if (rc < 0)
		return EXIT_REFUSED;
	rc = vm_check_no_cold_move(d, &vm, err);
	if (rc < 0)
		return EXIT_REFUSED;
	pthread_mutex_lock(&vm.keeper->op);
	if (keeper_is_live(vm.keeper))
		rc = error_set(err, EBUSY, "VM %s is not stopped: snvm stop %s first", vm.rec.name,
			       vm.rec.name);
	if (!rc)
		rc = record_open(d->cfg->state_dir, vm.rec.uuid, &r, err);
	if (!rc)
		rc = record_lock(r, 2000, err);
	if (!rc)
		rc = delete_locked(d, &vm, r, &left, err);
	record_close(r);
	pthread_mutex_unlock(&vm.keeper->op);
	keeper_wake(vm.keeper);
	if (rc < 0) {
		json_decref(left);
		return EXIT_REFUSED;
	}
	log_info("VM %s deleted", vm.rec.name);
	reply_ok(c->client, json_pack("{s:o}", "left_behind", left));
	return 0;
}

/* ---- start and stop
 * ---------------------------------------------------------------------------------------- */

static int command_start(struct command_context *c, struct error *err)
{
	struct vm_ref vm;
	if (vm_find_arrived(c->daemon, c->request, &vm, err) < 0)
		return EXIT_REFUSED;
	bool paused = json_is_true(json_object_get(c->request, "paused"));
	int rc = vm_start(c->daemon, &vm, paused ? VM_START_PAUSED : VM_START_RUN, err);
	if (rc < 0)
		return rc == -ETIMEDOUT ? EXIT_FAILED : EXIT_REFUSED;
	reply_ok(c->client, json_pack("{s:s}", "state", paused ? "paused" : "running"));
	return 0;
}

/* A VM that is off is `stopped`, also if it had crashed. */
static int mark_stopped(struct daemon *d, struct vm_ref *vm, struct error *err)
{
	struct record *r = NULL;
	pthread_mutex_lock(&vm->keeper->op);
	int rc = record_open(d->cfg->state_dir, vm->rec.uuid, &r, err);
	if (!rc)
		rc = record_lock(r, 2000, err);
	if (!rc)
		rc = record_load(r, &vm->rec, err);
	if (!rc)
		rc = handover_may_start(&vm->rec, err);
	if (!rc && vm->rec.flags & RECORD_POWERED_ON) {
		vm->rec.flags &= ~RECORD_POWERED_ON;
		rc = record_store(r, &vm->rec, err);
	}
	record_close(r);
	pthread_mutex_unlock(&vm->keeper->op);
	return rc;
}

static int command_stop(struct command_context *c, struct error *err)
{
	struct daemon *d = c->daemon;
	struct vm_ref vm;
	if (vm_find_arrived(d, c->request, &vm, err) < 0)
		return EXIT_REFUSED;
	bool force = json_is_true(json_object_get(c->request, "force"));
	json_int_t timeout = json_integer_value(json_object_get(c->request, "timeout_ms"));
	if (timeout <= 0 || timeout > STOP_TIMEOUT_MAX_MS)
		timeout = STOP_TIMEOUT_DEFAULT_MS;
	if (keeper_is_live(vm.keeper)) {
		int status = EXIT_FAILED;
		int rc = vm_call(&vm, json_pack("{s:s}", "cmd", force ? "quit" : "power-button"), NULL,
				 &status, err);
		/* a VMM that answers "not now" decides; one that does not answer is ended, if so ordered */
		if (rc == -EREMOTE)
			return status;
		if (rc < 0 && !force)
			return error_prefix(err, "VM %s", vm.rec.name), EXIT_FAILED;
		bool dead = keeper_wait_dead(vm.keeper, force ? QUIT_TIMEOUT_MS : (unsigned)timeout);
		if (!dead && !force) {
			error_set(err, ETIMEDOUT,
				  "VM %s did not power off within %lld s after its power button was pressed; "
				  "--force ends it",
				  vm.rec.name, (long long)timeout / 1000);
			return EXIT_FAILED;
		}
		if (!dead &&
		    (spawn_group_kill(vm.rec.uuid, err) < 0 || !keeper_wait_dead(vm.keeper, QUIT_TIMEOUT_MS)))
			return EXIT_FAILED;
	}
	if (mark_stopped(d, &vm, err) < 0)
		return EXIT_REFUSED;
	/* "stopped" promises that nobody uses the disks any more */
	if (spawn_group_wait_empty(vm.rec.uuid, DAEMON_GROUP_TIMEOUT_MS, err) < 0)
		return EXIT_FAILED;
	reply_ok(c->client, json_pack("{s:s}", "state", "stopped"));
	return 0;
}

static int forward(struct command_context *c, const char *cmd, struct error *err)
{
	struct vm_ref vm;
	int status = EXIT_FAILED;
	if (vm_find_arrived(c->daemon, c->request, &vm, err) < 0)
		return EXIT_REFUSED;
	if (!keeper_is_live(vm.keeper))
		return error_set(err, ESRCH, "VM %s is not running", vm.rec.name), EXIT_REFUSED;
	if (vm_call(&vm, json_pack("{s:s}", "cmd", cmd), NULL, &status, err) < 0)
		return status ? status : EXIT_FAILED;
	reply_ok(c->client, NULL);
	return 0;
}

static int command_pause(struct command_context *c, struct error *err)
{
	return forward(c, "pause", err);
}

static int command_resume(struct command_context *c, struct error *err)
{
	return forward(c, "resume", err);
}

static int command_console(struct command_context *c, struct error *err)
{
	struct vm_ref vm;
	struct stat st;
	char path[REGISTRY_PATH_BYTES + 16];
	if (vm_find_arrived(c->daemon, c->request, &vm, err) < 0)
		return EXIT_REFUSED;
	snprintf(path, sizeof path, "%s/console.sock", vm.dir);
	if (!keeper_is_live(vm.keeper))
		return error_set(err, ESRCH, "VM %s is not running", vm.rec.name), EXIT_REFUSED;
	if (stat(path, &st) < 0)
		return error_set(err, ENOENT, "VM %s has no console socket (serial = socket)", vm.rec.name),
		       EXIT_REFUSED;
	reply_ok(c->client, json_pack("{s:o}", "path", jsonl_text(path)));
	return 0;
}

/* ---- dispatch
 * ---------------------------------------------------------------------------------------------- */

static int command_hello(struct command_context *c, struct error *err)
{
	reply_ok(c->client, json_pack("{s:i, s:s, s:s, s:i}", "version", 1, "program", SNM_VERSION, "host",
				      c->daemon->cfg->name, "pid", (int)getpid()));
	return 0;
}

static const struct {
	const char *name;
	int (*run)(struct command_context *c, struct error *err);
} commands[] = {{"hello", command_hello},
		{"list", command_list},
		{"info", command_info},
		{"create", command_create},
		{"delete", command_delete},
		{"start", command_start},
		{"stop", command_stop},
		{"pause", command_pause},
		{"resume", command_resume},
		{"console", command_console},
		{"move", command_move},
		{"cancel", command_cancel},
		{"tune", command_tune},
		{"dirty-rate", command_dirty_rate},
		{"watch", command_watch},
		{"resolve", command_resolve},
		{"set", command_set},
		{"balloon", command_balloon},
		{"baseline", command_baseline},
		{"check", command_check},
		{"evacuate", command_evacuate},
		{"return", command_return},
		{"plan", command_plan},
		{"maintenance", command_maintenance},
		{"history", command_history},
		{"status", command_status},
		{"pair-open", command_pair_open},
		{"pair-join", command_pair_join},
		{"peer-list", command_peer_list},
		{"peer-set", command_peer_set},
		{"unpair", command_unpair},
		{"remote", command_remote},
		{"partial-list", command_partial_list},
		{"partial-delete", command_partial_delete}};

void commands_serve(struct daemon *d, struct jsonl *client)
{
	for (;;) {
		struct command_context c = {.daemon = d, .client = client};
		struct error err = ERROR_INIT;
		log_set_vm(NULL);
		int rc = jsonl_read(client, &c.request, NULL, 0, &err);
		if (rc == -EPROTO)
			jsonl_write_error(client, EXIT_USAGE, &err);
		if (rc < 0)
			break;
		const char *name = json_string_value(json_object_get(c.request, "cmd"));
		size_t i = 0;
		while (i < ARRAY_SIZE(commands) && (!name || strcmp(commands[i].name, name)))
			i++;
		int status = EXIT_USAGE;
		if (i < ARRAY_SIZE(commands))
			status = commands[i].run(&c, &err);
		else
			error_set(&err, EINVAL, "unknown request '%.32s'", name ? name : "");
		if (status) {
			log_info("%s: %s", name ? name : "request", err.message);
			jsonl_write_error(client, status, &err);
		}
		json_decref(c.request);
	}
	jsonl_close(client);
}
