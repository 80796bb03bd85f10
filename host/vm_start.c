/* SPDX-License-Identifier: Apache-2.0 */
/* A snvmm for a VM of the registry. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/pidfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "host/daemon.h"
#include "host/spawn.h"

#define LOG_TAIL_BYTES	    (64u << 10)
#define COLD_END_TIMEOUT_MS 5000
#define COLD_LOOK_MS	    100

int vm_check_no_cold_move(struct daemon *d, struct vm_ref *vm, struct error *err)
{
	uint64_t deadline = clock_now_ms() + COLD_END_TIMEOUT_MS;
	while (keeper_is_live(vm->keeper)) {
		json_t *o = vm_describe(d, vm, true);
		const char *state = json_string_value(json_object_get(o, "state"));
		bool cold = state && !strcmp(state, vm_state_name(VM_STOPPED));
		bool moving = json_is_object(json_object_get(o, "migrating"));
		bool answers = json_object_get(o, "pid") != NULL;
		json_decref(o);
		if (!cold)
			return 0;
		if (moving)
			return error_set(err, EBUSY,
					 "VM %s is stopped, and being moved: wait for its end, or snmigrate "
					 "cancel %s",
					 vm->rec.name, vm->rec.name);
		if (clock_now_ms() >= deadline)
			return !answers ? 0
					: error_set(err, EBUSY,
						    "VM %s is stopped, and another command is about to move "
						    "it: try again",
						    vm->rec.name);
		/* it has not been told to yet, or is ending */
		keeper_wait_dead(vm->keeper, COLD_LOOK_MS);
	}
	return 0;
}

/* "HH:MM:SS.mmm snvmm[1] NAME error: sentence" -> sentence; the last such line after offset. */
static void last_error(const char *path, off_t offset, struct error *err)
{
	CLEANUP_FD int fd = open(path, O_RDONLY | O_CLOEXEC);
	CLEANUP_FREE char *text = malloc(LOG_TAIL_BYTES + 1);
	off_t end = fd < 0 ? -1 : lseek(fd, 0, SEEK_END);
	if (!text || end < 0)
		return;
	if (end - offset > (off_t)LOG_TAIL_BYTES || end < offset)
		offset = end > (off_t)LOG_TAIL_BYTES ? end - (off_t)LOG_TAIL_BYTES : 0;
	ssize_t n = pread(fd, text, LOG_TAIL_BYTES, offset);
	if (n <= 0)
		return;
	text[n] = '\0';
	char *save = NULL;
	for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
		char *mark = strstr(line, " error: ");
		if (mark)
			error_set(err, EIO, "%s", mark + 8);
	}
}

static int wait_started(struct vm_ref *vm, struct error *err)
{
	uint64_t deadline = clock_now_ms() + DAEMON_START_TIMEOUT_MS;
	for (;;) {
		json_t *request =
			json_pack("{s:s, s:[i,i]}", "cmd", "hello", "versions", 1, DAEMON_SNVMM_PROTOCOL);
		if (keeper_is_live(vm->keeper) && vm_call(vm, request, NULL, NULL, NULL) == 0)
			return 0;
		if (!keeper_is_live(vm->keeper))
			return error_set(err, EIO, "snvmm ended at once");
		if (clock_now_ms() >= deadline)
			return error_set(err, ETIMEDOUT, "snvmm does not answer");
		clock_sleep_ms(20);
	}
}

static int spawn_vm(struct daemon *d, struct vm_ref *vm, const char *log_path, enum vm_start_how how,
		    struct error *err)
{
	static const char *const options[] = {
		[VM_START_PAUSED] = "--paused", [VM_START_FORCED] = "--forced", [VM_START_COLD] = "--cold"};
	const char *argv[] = {d->cfg->snvmm, "--config",   d->cfg->path, "--vm",
			      vm->rec.name,  options[how], NULL};
	struct spawn_options opt = {.group = vm->rec.uuid, .argv = argv, .log_path = log_path};
	int rc = keeper_empty_group(vm->keeper, err);
	if (rc < 0)
		return rc;
	pid_t pid = spawn_start(&opt, err);
	if (pid < 0)
		return (int)pid;
	int pidfd = pidfd_open(pid, 0);
	if (pidfd < 0)
		return error_errno(err, errno, "pidfd_open");
	keeper_attach(vm->keeper, pid, pidfd);
	return 0;
}

int vm_start(struct daemon *d, struct vm_ref *vm, enum vm_start_how how, struct error *err)
{
	char log_path[REGISTRY_PATH_BYTES];
	int rc = registry_log_path(d->cfg, vm->rec.name, log_path, err);
	if (!rc)
		rc = vm_check_no_cold_move(d, vm, err);
	if (rc < 0)
		return rc;
	pthread_mutex_lock(&vm->keeper->op);
	struct stat st = {0};
	stat(log_path, &st);
	if (keeper_is_live(vm->keeper))
		rc = error_set(err, EALREADY, "VM %s is already started", vm->rec.name);
	/* as it is now: settling may have changed it since */
	if (!rc && record_hint(d->cfg, vm->rec.uuid, &vm->rec) < 0)
		rc = error_set(err, ENOENT, "VM %s is not there any more", vm->rec.name);
	if (!rc && how != VM_START_FORCED)
		rc = handover_may_start(&vm->rec, err);
	if (!rc && strncmp(vm->rec.folder, "vms/", 4))
		rc = error_set(err, EAGAIN, "VM %s has not got its place yet: try again", vm->rec.name);
	if (!rc)
		rc = spawn_vm(d, vm, log_path, how, err);
	pthread_mutex_unlock(&vm->keeper->op);
	if (rc < 0)
		return rc;
	rc = wait_started(vm, err);
	if (rc == -EIO)
		last_error(log_path, st.st_size, err);
	return rc < 0 ? error_prefix(err, how == VM_START_COLD ? "VM %s stays here" : "VM %s does not start",
				     vm->rec.name)
		      : 0;
}
