/* SPDX-License-Identifier: Apache-2.0 */
#ifndef HOST_SPAWN_H
#define HOST_SPAWN_H

#include <stdbool.h>
#include <sys/types.h>

#include "base/error.h"
#include "host/config.h"

/*
 * Every process of a VM is in a group of its own, named by the VM's UUID (an arrival's connection before that
 * has a name of its own): a cgroup where there is a writable cgroup2, else all processes whose environment
 * carries the group's mark, which children inherit. A killed snvmm leaves a qemu-nbd that may still write:
 * nothing is started, retried or deleted before the group is empty. Any thread.
 */

/* Call once. Says in the log which of the two it is. */
int spawn_init(const struct host_config *cfg, struct error *err);

/* Removes our folder of groups if nothing is in it; the groups of live VMs stay. */
void spawn_end(void);

struct spawn_options {
	const char *group;
	const char *const *argv; /* NULL-terminated, argv[0] the program's path */
	const int *fds;		 /* become 3, 4, ... */
	unsigned nfds;
	const char *log_path; /* stdout and stderr, appended; stdin is /dev/null */
};
/* Starts a detached process (a session of its own) that outlives this one. Its pid; the caller reaps it. */
pid_t spawn_start(const struct spawn_options *opt, struct error *err);

/* Opens such a file to be appended to; one that has grown large gives way to a new one (PATH.old). */
int spawn_open_log(const char *path, struct error *err);

/* Moves a process from one group to another. */
int spawn_group_move(const char *from, const char *to, pid_t pid, struct error *err);
/* 1 empty (or no such group), 0 not, negative errno. */
int spawn_group_is_empty(const char *group, struct error *err);
/* SIGKILL to every process of the group. */
int spawn_group_kill(const char *group, struct error *err);
/* -ETIMEDOUT when somebody is still in it then. Removes the empty group. */
int spawn_group_wait_empty(const char *group, unsigned timeout_ms, struct error *err);

#endif
