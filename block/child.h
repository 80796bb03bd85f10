/* SPDX-License-Identifier: Apache-2.0 */
/* Private to block: starting QEMU's tools. */
#ifndef BLOCK_CHILD_H
#define BLOCK_CHILD_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#include "base/error.h"

/* What a child finds as its descriptor 3 and up; a path to the image that no name can subvert. */
#define CHILD_FD_PATH(n) "file:/proc/self/fd/" #n

struct child_spec {
	const char *tool;	 /* looked up in PATH */
	const char *const *argv; /* argv[0] included, NULL at the end */
	const int *fds;		 /* become 3, 4, ... ; everything above is closed */
	unsigned nfds;
	bool listen_fd; /* descriptor 3 is a listening socket for sd_listen_fds(3) */
	int out_fd;	/* standard output, -1 = /dev/null */
	int err_fd;	/* standard error, -1 = /dev/null */
};

/*
 * Forks and executes. The child is killed when the *thread* that called this ends (PR_SET_PDEATHSIG is about
 * the thread). Its own session, no signal blocked, environment as ours but LC_ALL=C.
 */
int child_spawn(const struct child_spec *spec, pid_t *pid, struct error *err);

struct child_result {
	int exit_status; /* of a normal exit, else -1 */
	char *out;	 /* NUL-terminated; free(3) */
	size_t out_len;
	char complaint[256]; /* last line of standard error, without the tool's name and our own file name */
};

/* Runs to the end, collecting output of at most 1 MiB; kills it after timeout_ms (-ETIMEDOUT). */
int child_run(const struct child_spec *spec, unsigned timeout_ms, struct child_result *res,
	      struct error *err);
/* Cuts a tool's standard error down to what a person needs; text is modified. */
const char *child_complaint(char *text);

#endif
