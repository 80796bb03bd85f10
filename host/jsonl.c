/* SPDX-License-Identifier: Apache-2.0 */
#include "host/jsonl.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "host/exit.h"

#define WRITE_TIMEOUT_MS 10000
#define FDS_MAX		 16
/* A line that brings a descriptor says so with this member: the k-th such line belongs to the k-th
 * descriptor. */
#define DESCRIPTOR_KEY "descriptor"

struct jsonl {
	int fd;
	bool broken; /* a line was cut short: nothing may follow it */
	pthread_mutex_t write_lock;
	char *buf;
	size_t room, len, scanned;
	int fds[FDS_MAX];
	unsigned nfds;
};

struct jsonl *jsonl_from_fd(int fd)
{
	struct jsonl *j = calloc(1, sizeof *j);
	if (!j) {
		close(fd);
		return NULL;
	}
	j->fd = fd;
	pthread_mutex_init(&j->write_lock, NULL);
	return j;
}

void jsonl_close(struct jsonl *j)
{
	if (!j)
		return;
	for (unsigned i = 0; i < j->nfds; i++)
		close(j->fds[i]);
	close(j->fd);
	pthread_mutex_destroy(&j->write_lock);
	free(j->buf);
	free(j);
}

int jsonl_fd(const struct jsonl *j)
{
	return j->fd;
}

bool jsonl_pending(const struct jsonl *j)
{
	return j->len > 0 && memchr(j->buf, '\n', j->len);
}

/* The address of path, through a descriptor of its folder where it is too long; *dirfd must be closed after
 * use. */
static int socket_address(const char *path, struct sockaddr_un *addr, int *dirfd, struct error *err)
{
	*addr = (struct sockaddr_un){.sun_family = AF_UNIX};
	*dirfd = -1;
	if (strlen(path) < sizeof addr->sun_path) {
		strcpy(addr->sun_path, path);
		return 0;
	}
	const char *slash = strrchr(path, '/');
	CLEANUP_FREE char *folder = slash ? strndup(path, (size_t)(slash - path)) : NULL;
	if (!folder)
		return error_errno(err, ENAMETOOLONG, "%s", path);
	*dirfd = open(folder, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (*dirfd < 0)
		return error_errno(err, errno, "%s", path);
	if ((size_t)snprintf(addr->sun_path, sizeof addr->sun_path, "/proc/self/fd/%d/%s", *dirfd,
			     slash + 1) >= sizeof addr->sun_path)
		return error_errno(err, ENAMETOOLONG, "%s", path);
	return 0;
}

static int connect_path(const char *path, unsigned timeout_ms, struct error *err)
{
	struct sockaddr_un addr;
	CLEANUP_FD int dirfd = -1;
	CLEANUP_FD int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return error_errno(err, errno, "socket");
	int rc = socket_address(path, &addr, &dirfd, err);
	if (rc < 0)
		return rc;
	/* connect(2) to a Unix socket waits for a full backlog; the send timeout bounds that */
	struct timeval tv = {.tv_sec = timeout_ms / 1000, .tv_usec = (timeout_ms % 1000) * 1000};
	if (timeout_ms)
		setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof tv);
	if (connect(fd, (struct sockaddr *)&addr, sizeof addr) < 0)
		return error_errno(err, errno == EAGAIN ? ETIMEDOUT : errno, "%s", path);
	return steal_fd(&fd);
}

int jsonl_connect(const char *path, unsigned timeout_ms, struct jsonl **out, struct error *err)
{
	int fd = connect_path(path, timeout_ms, err);
	if (fd < 0)
		return fd;
	*out = jsonl_from_fd(fd);
	return *out ? 0 : error_errno(err, ENOMEM, "%s", path);
}

int jsonl_listen(const char *path, struct error *err)
{
	struct sockaddr_un addr;
	CLEANUP_FD int dirfd = -1;
	CLEANUP_FD int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return error_errno(err, errno, "socket");
	int rc = socket_address(path, &addr, &dirfd, err);
	if (rc < 0)
		return rc;
	struct stat st;
	if (lstat(path, &st) == 0) {
		if (!S_ISSOCK(st.st_mode))
			return error_set(err, EEXIST, "%s: is there and is not a socket", path);
		int other = connect_path(path, 1000, NULL);
		if (other >= 0) {
			close(other);
			return error_errno(err, EADDRINUSE, "%s", path);
		}
		if (other != -ECONNREFUSED && other != -ENOENT)
			return error_errno(err, other, "%s", path);
		unlink(path);
	}
	/* bind(2) takes its mode from the socket's inode: nobody else may connect in between */
	if (fchmod(fd, 0600) < 0 || bind(fd, (struct sockaddr *)&addr, sizeof addr) < 0)
		return error_errno(err, errno, "%s", path);
	if (chmod(addr.sun_path, 0600) < 0 || listen(fd, 64) < 0) {
		rc = error_errno(err, errno, "%s", path);
		unlink(path);
		return rc;
	}
	return steal_fd(&fd);
}

static void take_descriptors(struct jsonl *j, struct msghdr *msg)
{
	for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c)) {
		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		size_t n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		for (size_t i = 0; i < n; i++) {
			int fd;
			memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
			if (j->nfds < FDS_MAX)
				j->fds[j->nfds++] = fd;
			else
				close(fd);
		}
	}
}

static int fill(struct jsonl *j, struct error *err)
{
	if (j->len == j->room) {
		size_t room = j->room ? 2 * j->room : 4096;
		if (j->len > JSONL_LINE_MAX_BYTES)
			return error_set(err, EPROTO, "a line longer than %u bytes", JSONL_LINE_MAX_BYTES);
		char *more = realloc(j->buf, room);
		if (!more)
			return error_errno(err, ENOMEM, "reading a line");
		j->buf = more;
		j->room = room;
	}
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(FDS_MAX * sizeof(int))];
	} control;
	struct iovec iov = {j->buf + j->len, j->room - j->len};
	struct msghdr msg = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
	ssize_t n = recvmsg(j->fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	if (n < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : error_errno(err, errno, "reading a line");
	take_descriptors(j, &msg);
	if (n == 0)
		return j->len ? error_set(err, ECONNRESET, "the connection ended inside a line")
			      : error_set(err, ENODATA, "the connection ended");
	j->len += (size_t)n;
	return 0;
}

/* Takes the first line off the buffer. 1 with it, 0 when it is not whole yet. */
static int take_line(struct jsonl *j, json_t **out, struct error *err)
{
	char *nl = j->len > j->scanned ? memchr(j->buf + j->scanned, '\n', j->len - j->scanned) : NULL;
	if (!nl) {
		j->scanned = j->len;
		return 0;
	}
	size_t line = (size_t)(nl - j->buf);
	json_error_t why;
	json_t *obj = json_loadb(j->buf, line, JSON_REJECT_DUPLICATES, &why);
	memmove(j->buf, nl + 1, j->len - line - 1);
	j->len -= line + 1;
	j->scanned = 0;
	if (!obj)
		return error_set(err, EPROTO, "not JSON: %s", why.text);
	if (!json_is_object(obj)) {
		json_decref(obj);
		return error_set(err, EPROTO, "not a JSON object");
	}
	*out = obj;
	return 1;
}

int jsonl_read(struct jsonl *j, json_t **out, int *fd, unsigned timeout_ms, struct error *err)
{
	uint64_t deadline = clock_now_ms() + timeout_ms;
	*out = NULL;
	if (fd)
		*fd = -1;
	for (;;) {
		int rc = take_line(j, out, err);
		if (rc < 0)
			return rc;
		if (rc > 0)
			break;
		uint64_t now = clock_now_ms();
		if (timeout_ms && now >= deadline)
			return error_set(err, ETIMEDOUT, "no answer within %u ms", timeout_ms);
		struct pollfd p = {.fd = j->fd, .events = POLLIN};
		int ready = poll(&p, 1, timeout_ms ? (int)(deadline - now) : -1);
		if (ready < 0 && errno != EINTR)
			return error_errno(err, errno, "poll");
		if (ready > 0 && (rc = fill(j, err)) < 0)
			return rc;
	}
	if (!json_is_true(json_object_get(*out, DESCRIPTOR_KEY)))
		return 0;
	if (!j->nfds) {
		json_decref(*out);
		*out = NULL;
		return error_set(err, EPROTO, "a descriptor is missing");
	}
	int got = j->fds[0];
	memmove(j->fds, j->fds + 1, --j->nfds * sizeof *j->fds);
	if (fd)
		*fd = got;
	else
		close(got);
	return 0;
}

static int send_all(struct jsonl *j, const char *text, size_t len, int pass, struct error *err)
{
	uint64_t deadline = clock_now_ms() + WRITE_TIMEOUT_MS;
	for (size_t at = 0; at < len;) {
		union {
			struct cmsghdr align;
			char bytes[CMSG_SPACE(sizeof(int))];
		} control = {0};
		struct iovec iov = {(char *)text + at, len - at};
		struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
		if (at == 0 && pass >= 0) {
			msg.msg_control = &control;
			msg.msg_controllen = sizeof control;
			struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
			c->cmsg_level = SOL_SOCKET;
			c->cmsg_type = SCM_RIGHTS;
			c->cmsg_len = CMSG_LEN(sizeof(int));
			memcpy(CMSG_DATA(c), &pass, sizeof pass);
		}
		ssize_t n = sendmsg(j->fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
		if (n > 0) {
			at += (size_t)n;
			continue;
		}
		if (n < 0 && errno != EAGAIN && errno != EINTR) {
			j->broken = true;
			return error_errno(err, errno, "sending a line");
		}
		uint64_t now = clock_now_ms();
		if (now >= deadline) {
			j->broken = true;
			return error_set(err, ETIMEDOUT, "sending a line: the other side does not read");
		}
		struct pollfd p = {.fd = j->fd, .events = POLLOUT};
		poll(&p, 1, (int)(deadline - now));
	}
	return 0;
}

int jsonl_write(struct jsonl *j, json_t *obj, int fd, struct error *err)
{
	json_t *marked = fd >= 0 ? json_copy(obj) : json_incref(obj);
	if (fd >= 0)
		json_object_set_new(marked, DESCRIPTOR_KEY, json_true());
	char *text = json_dumps(marked, JSON_COMPACT);
	json_decref(marked);
	if (!text)
		return error_errno(err, ENOMEM, "sending a line");
	size_t len = strlen(text);
	text[len] = '\n'; /* in the place of the NUL */
	SCOPE_LOCK(&j->write_lock);
	int rc = j->broken ? error_errno(err, EPIPE, "sending a line") : send_all(j, text, len + 1, fd, err);
	free(text);
	return rc;
}

json_t *jsonl_text(const char *text)
{
	json_t *s = json_string(text);
	if (s)
		return s;
	char *plain = strdup(text);
	if (!plain)
		return NULL;
	for (char *p = plain; *p; p++)
		if (*p & 0x80)
			*p = '?';
	s = json_string(plain);
	free(plain);
	return s;
}

int jsonl_write_error(struct jsonl *j, int exit_status, const struct error *e)
{
	json_t *obj =
		json_pack("{s:b,s:i,s:o}", "ok", 0, "exit", exit_status, "error", jsonl_text(e->message));
	int rc = obj ? jsonl_write(j, obj, -1, NULL) : -ENOMEM;
	json_decref(obj);
	return rc;
}

int jsonl_call(struct jsonl *j, json_t *request, json_t **reply, int *exit_status, unsigned timeout_ms,
	       struct error *err)
{
	return jsonl_call_fd(j, request, reply, NULL, exit_status, timeout_ms, err);
}

int jsonl_call_fd(struct jsonl *j, json_t *request, json_t **reply, int *fd, int *exit_status,
		  unsigned timeout_ms, struct error *err)
{
	json_t *answer = NULL;
	if (exit_status)
		*exit_status = 0;
	if (fd)
		*fd = -1;
	int rc = jsonl_write(j, request, -1, err);
	if (!rc)
		rc = jsonl_read(j, &answer, fd, timeout_ms, err);
	if (rc < 0)
		return rc;
	if (!json_is_true(json_object_get(answer, "ok"))) {
		const char *why = json_string_value(json_object_get(answer, "error"));
		const json_t *status = json_object_get(answer, "exit");
		if (exit_status)
			*exit_status =
				json_is_integer(status) ? (int)json_integer_value(status) : EXIT_FAILED;
		rc = error_set(err, EREMOTE, "%s", why ? why : "refused without a reason");
		json_decref(answer);
		if (fd && *fd >= 0)
			close(*fd);
		if (fd)
			*fd = -1;
		return rc;
	}
	if (reply)
		*reply = answer;
	else
		json_decref(answer);
	return 0;
}
