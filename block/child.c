/* SPDX-License-Identifier: Apache-2.0 */
#include "block/child.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"

#define OUTPUT_MAX_BYTES (1u << 20)
#define CHILD_FDS_MAX	 10

extern char **environ;

static int find_tool(const char *tool, char *path, size_t size, struct error *err)
{
	const char *dirs = getenv("PATH");
	if (!dirs || !*dirs)
		dirs = "/usr/local/bin:/usr/bin:/bin";
	while (*dirs) {
		size_t len = strcspn(dirs, ":");
		struct stat st;
		int n = snprintf(path, size, "%.*s/%s", (int)len, dirs, tool);
		/* A relative entry would depend on where we happen to stand. */
		if (len && dirs[0] == '/' && n > 0 && (size_t)n < size && stat(path, &st) == 0 &&
		    S_ISREG(st.st_mode) && access(path, X_OK) == 0)
			return 0;
		dirs += len + (dirs[len] == ':');
	}
	return error_set(err, ENOENT, "%s is not in PATH (Debian package qemu-utils)", tool);
}

static void put_decimal(char *at, unsigned long v)
{
	char digits[24];
	int n = 0;
	do
		digits[n++] = (char)('0' + v % 10);
	while (v /= 10);
	while (n)
		*at++ = digits[--n];
	*at = '\0';
}

/* Between fork and exec: async-signal-safe calls only. */
static void __attribute__((noreturn)) become(const char *path, const struct child_spec *spec, char **envp,
					     char *listen_pid, pid_t parent, int null_fd)
{
	int high[CHILD_FDS_MAX];
	/* Not SIGKILL: a qemu-nbd cut off in the middle of a metadata table can leave a qcow2 image corrupt.
	 */
	prctl(PR_SET_PDEATHSIG, SIGTERM);
	if (getppid() != parent)
		_exit(127);
	setsid(); /* a terminal's Ctrl-C is for us, who then close in order */
	int out = fcntl(spec->out_fd >= 0 ? spec->out_fd : null_fd, F_DUPFD, 16);
	int errfd = fcntl(spec->err_fd >= 0 ? spec->err_fd : null_fd, F_DUPFD, 16);
	int in = fcntl(null_fd, F_DUPFD, 16);
	for (unsigned i = 0; i < spec->nfds; i++)
		high[i] = fcntl(spec->fds[i], F_DUPFD, 16);
	if (dup2(in, 0) < 0 || dup2(out, 1) < 0 || dup2(errfd, 2) < 0)
		_exit(127);
	for (unsigned i = 0; i < spec->nfds; i++)
		if (dup2(high[i], (int)(3 + i)) < 0)
			_exit(127);
	close_range(3 + spec->nfds, ~0U, 0);
	for (int s = 1; s < NSIG; s++)
		signal(s, SIG_DFL);
	sigset_t none;
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	if (listen_pid)
		put_decimal(listen_pid, (unsigned long)getpid());
	execve(path, (char *const *)(uintptr_t)spec->argv, envp);
	static const char message[] = "cannot be executed\n";
	if (write(2, message, sizeof message - 1) < 0)
		_exit(126);
	_exit(127);
}

int child_spawn(const struct child_spec *spec, pid_t *pid, struct error *err)
{
	char path[4096];
	int rc = find_tool(spec->tool, path, sizeof path, err);
	if (rc)
		return rc;
	if (spec->nfds > CHILD_FDS_MAX)
		return error_set(err, EINVAL, "too many descriptors for %s", spec->tool);
	size_t n = 0;
	while (environ[n])
		n++;
	CLEANUP_FREE char **envp = calloc(n + 4, sizeof *envp);
	if (!envp)
		return error_errno(err, ENOMEM, "%s", spec->tool);
	char lc_all[] = "LC_ALL=C", listen_fds[] = "LISTEN_FDS=1", listen_pid[48] = "LISTEN_PID=";
	size_t to = 0;
	for (size_t i = 0; i < n; i++)
		if (strncmp(environ[i], "LC_ALL=", 7) != 0 && strncmp(environ[i], "LISTEN_", 7) != 0)
			envp[to++] = environ[i];
	envp[to++] = lc_all;
	if (spec->listen_fd) {
		envp[to++] = listen_fds;
		envp[to++] = listen_pid;
	}
	CLEANUP_FD int null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
	if (null_fd < 0)
		return error_errno(err, errno, "/dev/null");
	pid_t parent = getpid(), child = fork();
	if (child < 0)
		return error_errno(err, errno, "fork for %s", spec->tool);
	if (child == 0)
		become(path, spec, envp, spec->listen_fd ? listen_pid + strlen(listen_pid) : NULL, parent,
		       null_fd);
	*pid = child;
	return 0;
}

const char *child_complaint(char *text)
{
	size_t len = strlen(text);
	while (len && (text[len - 1] == '\n' || text[len - 1] == ' '))
		text[--len] = '\0';
	char *line = strrchr(text, '\n');
	line = line ? line + 1 : text;
	/* "qemu-img: Could not open 'file:/proc/self/fd/3': reason": the name means nothing to anybody. */
	char *own = strstr(line, "/proc/self/fd/"), *after = own ? strstr(own, "': ") : NULL;
	if (after)
		line = after + 3;
	else if (strncmp(line, "qemu-", 5) == 0 && strstr(line, ": "))
		line = strstr(line, ": ") + 2;
	for (char *p = line; *p; p++)
		if ((unsigned char)*p < ' ')
			*p = '?';
	return line;
}

struct collector {
	int fd;
	char *buf;
	size_t len, size;
};

/* False when the stream ended. */
static bool collect(struct collector *c)
{
	char chunk[4096];
	ssize_t n = read(c->fd, chunk, sizeof chunk);
	if (n < 0)
		return errno == EINTR || errno == EAGAIN;
	if (n == 0)
		return false;
	if (c->len + (size_t)n + 1 > c->size) {
		size_t size = (c->len + (size_t)n + 1) * 2;
		char *more = size <= OUTPUT_MAX_BYTES * 2 ? realloc(c->buf, size) : NULL;
		if (!more)
			return true; /* the rest is read and dropped: nobody wants that much */
		c->buf = more;
		c->size = size;
	}
	memcpy(c->buf + c->len, chunk, (size_t)n);
	c->len += (size_t)n;
	c->buf[c->len] = '\0';
	return true;
}

static int collect_until_end(struct collector c[2], uint64_t deadline_ms)
{
	while (c[0].fd >= 0 || c[1].fd >= 0) {
		uint64_t now = clock_now_ms();
		if (now >= deadline_ms)
			return -ETIMEDOUT;
		struct pollfd pfd[2] = {{.fd = c[0].fd, .events = POLLIN}, {.fd = c[1].fd, .events = POLLIN}};
		if (poll(pfd, 2, (int)(deadline_ms - now)) < 0 && errno != EINTR)
			return -errno;
		for (int i = 0; i < 2; i++) {
			if (c[i].fd >= 0 && pfd[i].revents && !collect(&c[i])) {
				close(c[i].fd);
				c[i].fd = -1;
			}
		}
	}
	return 0;
}

int child_run(const struct child_spec *spec, unsigned timeout_ms, struct child_result *res, struct error *err)
{
	int out[2], errs[2];
	*res = (struct child_result){.exit_status = -1};
	if (pipe2(out, O_CLOEXEC))
		return error_errno(err, errno, "pipe");
	if (pipe2(errs, O_CLOEXEC)) {
		int e = errno;
		close(out[0]);
		close(out[1]);
		return error_errno(err, e, "pipe");
	}
	struct child_spec with_pipes = *spec;
	with_pipes.out_fd = out[1];
	with_pipes.err_fd = errs[1];
	pid_t pid = -1;
	int rc = child_spawn(&with_pipes, &pid, err);
	close(out[1]);
	close(errs[1]);
	struct collector c[2] = {{.fd = out[0]}, {.fd = errs[0]}};
	if (rc == 0) {
		rc = collect_until_end(c, clock_now_ms() + timeout_ms);
		if (rc) {
			kill(pid, SIGKILL);
			error_errno(err, rc, "%s", spec->tool);
		}
		int status = 0;
		while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
			;
		if (WIFEXITED(status))
			res->exit_status = WEXITSTATUS(status);
	}
	for (int i = 0; i < 2; i++)
		if (c[i].fd >= 0)
			close(c[i].fd);
	snprintf(res->complaint, sizeof res->complaint, "%s", c[1].buf ? child_complaint(c[1].buf) : "");
	free(c[1].buf);
	res->out = c[0].buf;
	res->out_len = c[0].len;
	if (rc) {
		free(res->out);
		res->out = NULL;
	}
	return rc;
}
