/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/control.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "host/exit.h"
#include "host/jsonl.h"
#include "vmm/dirty_rate.h"
#include "vmm/move.h"
#include "vmm/vm.h"

#define CONTROL_CLIENTS_MAX 32

struct client {
	struct vm *vm;
	struct jsonl *j;
	pthread_t thread;
	bool used, done;
};

/* One server a process: a VMM holds one VM. */
static struct {
	pthread_mutex_t lock;
	pthread_t thread;
	bool started, closing;
	int fd;
	struct client client[CONTROL_CLIENTS_MAX];
} server = {.lock = PTHREAD_MUTEX_INITIALIZER, .fd = -1};

static bool is_closing(void)
{
	SCOPE_LOCK(&server.lock);
	return server.closing;
}

static int reply_ok(struct jsonl *j, json_t *extra)
{
	json_t *o = extra ? extra : json_object();
	json_object_set_new(o, "ok", json_true());
	int rc = jsonl_write(j, o, -1, NULL);
	json_decref(o);
	return rc;
}

/* Writes the events of the move until its last one; false when the client has gone. */
static bool stream_events(struct client *c, struct move_events *ev)
{
	unsigned next = 0;
	for (;;) {
		bool ended;
		json_t *e = move_events_wait(ev, &next, 500, &ended);
		if (ended)
			return true;
		if (!e) {
			struct pollfd p = {.fd = jsonl_fd(c->j), .events = POLLRDHUP};
			if (poll(&p, 1, 0) > 0 && p.revents & (POLLHUP | POLLRDHUP | POLLERR))
				return false;
			if (is_closing()) {
				json_t *last = move_events_final(ev);
				json_decref(last);
				if (!last)
					return false;
			}
			continue;
		}
		int rc = jsonl_write(c->j, e, -1, NULL);
		json_decref(e);
		if (rc)
			return false;
	}
}

static int do_migrate(struct client *c, json_t *q, struct error *err)
{
	struct move_options opt;
	int rc = move_options_parse(q, &opt, err);
	if (!rc)
		rc = move_source_start(c->vm, &opt, err);
	if (rc)
		return rc;
	struct move_events *ev = move_source_events(c->vm);
	if (reply_ok(c->j, NULL) || !stream_events(c, ev))
		return -EPIPE;
	return 0;
}

static int resolve(struct vm *vm, json_t *q, struct error *err)
{
	const char *how = json_string_value(json_object_get(q, "how"));
	if (!how)
		return error_set(err, EINVAL, "resolve: \"how\" is missing");
	return move_is_running(vm) ? move_source_resolve(vm, how, err)
				   : move_destination_resolve(vm, how, err);
}

/* A daemon that was restarted passes on what it does not know. fd is taken over. */
static void take_channel(struct client *c, json_t *q, int fd)
{
	struct error err = ERROR_INIT;
	const char *token = json_string_value(json_object_get(q, "token"));
	if (fd < 0 || !token || !move_destination_knows(c->vm, token)) {
		if (fd >= 0)
			close(fd);
		error_set(&err, ENOENT, "no channel of this VM");
		jsonl_write_error(c->j, EXIT_REFUSED, &err);
		return;
	}
	reply_ok(c->j, NULL);
	if (move_destination_channel(c->vm, token, fd, &err))
		log_warn("%s", err.message);
}

static void do_request(struct client *c, json_t *q)
{
	struct vm *vm = c->vm;
	const char *cmd = json_string_value(json_object_get(q, "cmd"));
	struct error err = ERROR_INIT;
	int rc = 0, status = EXIT_REFUSED;
	json_t *extra = NULL;
	if (!cmd) {
		rc = error_set(&err, EINVAL, "a request without \"cmd\"");
	} else if (!strcmp(cmd, "hello")) {
		extra = json_pack("{s:i, s:s, s:s, s:i, s:s}", "version", CONTROL_VERSION_MAX, "uuid",
				  vm->def.uuid, "name", vm->def.name, "pid", (int)getpid(), "program",
				  SNM_VERSION);
	} else if (!strcmp(cmd, "info")) {
		extra = vm_info(vm);
	} else if (!strcmp(cmd, "check")) {
		extra = move_check_describe(vm, &err);
		rc = extra ? 0 : err.code;
	} else if (!strcmp(cmd, "pause")) {
		rc = vm_user_pause(vm, &err);
	} else if (!strcmp(cmd, "resume")) {
		rc = vm_user_resume(vm, &err);
	} else if (!strcmp(cmd, "balloon")) {
		rc = vm_user_balloon(vm, q, &err);
	} else if (!strcmp(cmd, "power-button")) {
		enum vm_state state = vm_get_state(vm);
		rc = state == VM_RUNNING || state == VM_PAUSED
			     ? machine_power_button(vm->machine)
			     : error_set(&err, EBUSY, "VM %s is %s", vm->def.name, vm_state_name(state));
	} else if (!strcmp(cmd, "quit")) {
		enum vm_state state = vm_get_state(vm);
		if (move_is_deciding(vm) || state == VM_IN_DOUBT || state == VM_INCOMING)
			rc = error_set(&err, EBUSY, "VM %s is %s: not now", vm->def.name,
				       move_is_deciding(vm) ? "being handed over" : vm_state_name(state));
		else
			vm_request_quit(vm, 0);
	} else if (!strcmp(cmd, "migrate")) {
		rc = do_migrate(c, q, &err);
		if (!rc || rc == -EPIPE)
			return;
	} else if (!strcmp(cmd, "watch")) {
		struct move_events *ev = move_source_events(vm);
		if (ev) {
			if (!reply_ok(c->j, NULL))
				stream_events(c, ev);
			return;
		}
		rc = error_set(&err, ENOENT, "VM %s was not moved since its VMM started", vm->def.name);
	} else if (!strcmp(cmd, "cancel")) {
		rc = move_source_cancel(vm, &err);
	} else if (!strcmp(cmd, "tune")) {
		rc = move_source_tune(vm, q, &err);
	} else if (!strcmp(cmd, "dirty-rate")) {
		extra = vm_dirty_rate(vm, q, &err);
		rc = extra ? 0 : err.code ? err.code : -ENOMEM;
	} else if (!strcmp(cmd, "ask")) {
		json_t *o = move_answer(vm, q, &err);
		rc = o ? 0 : err.code ? err.code : -EIO;
		extra = o;
		if (rc == -EAGAIN)
			status = EXIT_IN_DOUBT;
	} else if (!strcmp(cmd, "resolve")) {
		rc = resolve(vm, q, &err);
	} else {
		rc = error_set(&err, ENOSYS, "unknown request \"%.32s\"", cmd);
	}
	if (rc) {
		if (!err.code)
			error_errno(&err, rc, "%s", cmd ? cmd : "request");
		jsonl_write_error(c->j, status, &err);
	} else {
		reply_ok(c->j, extra);
	}
}

static void *client_thread(void *arg)
{
	struct client *c = arg;
	for (;;) {
		json_t *q = NULL;
		int rc = 0;
		while (!jsonl_pending(c->j) && !is_closing()) {
			struct pollfd p = {.fd = jsonl_fd(c->j), .events = POLLIN};
			rc = poll(&p, 1, 200);
			if (rc)
				break;
		}
		int fd = -1;
		if (is_closing() || jsonl_read(c->j, &q, &fd, 1000, NULL))
			break;
		const char *cmd = json_string_value(json_object_get(q, "cmd"));
		if (cmd && !strcmp(cmd, "channel"))
			take_channel(c, q, steal_fd(&fd));
		else
			do_request(c, q);
		if (fd >= 0)
			close(fd);
		json_decref(q);
	}
	SCOPE_LOCK(&server.lock);
	c->done = true;
	return NULL;
}

static void reap(bool all)
{
	for (unsigned i = 0; i < CONTROL_CLIENTS_MAX; i++) {
		struct client *c = &server.client[i];
		pthread_mutex_lock(&server.lock);
		bool join = c->used && (c->done || all);
		pthread_mutex_unlock(&server.lock);
		if (!join)
			continue;
		pthread_join(c->thread, NULL);
		jsonl_close(c->j);
		memset(c, 0, sizeof *c);
	}
}

static void add_client(struct vm *vm, int fd)
{
	reap(false);
	for (unsigned i = 0; i < CONTROL_CLIENTS_MAX; i++) {
		struct client *c = &server.client[i];
		if (c->used)
			continue;
		c->vm = vm;
		c->j = jsonl_from_fd(fd);
		if (!c->j)
			return;
		c->used = !pthread_create(&c->thread, NULL, client_thread, c);
		if (!c->used)
			jsonl_close(steal_ptr(c->j));
		return;
	}
	close(fd);
	log_warn("more than %d control connections", CONTROL_CLIENTS_MAX);
}

static void *accept_thread(void *arg)
{
	struct vm *vm = arg;
	while (!is_closing()) {
		struct pollfd p = {.fd = server.fd, .events = POLLIN};
		if (poll(&p, 1, 100) <= 0)
			continue;
		int fd = accept4(server.fd, NULL, NULL, SOCK_CLOEXEC);
		if (fd >= 0)
			add_client(vm, fd);
	}
	return NULL;
}

int control_start(struct vm *vm, struct error *err)
{
	char path[4400];
	snprintf(path, sizeof path, "%s/snvmm.sock", vm->dir);
	server.fd = jsonl_listen(path, err);
	if (server.fd < 0)
		return server.fd;
	server.closing = false;
	int rc = pthread_create(&server.thread, NULL, accept_thread, vm);
	if (rc)
		return error_errno(err, rc, "control: thread");
	server.started = true;
	return 0;
}

void control_stop(struct vm *vm)
{
	pthread_mutex_lock(&server.lock);
	server.closing = true;
	pthread_mutex_unlock(&server.lock);
	if (server.started)
		pthread_join(server.thread, NULL);
	server.started = false;
	reap(true);
	if (server.fd >= 0)
		close(server.fd);
	server.fd = -1;
	if (vm->dirfd >= 0)
		unlinkat(vm->dirfd, "snvmm.sock", 0);
}
