/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/console.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/cond.h"
#include "base/confine.h"
#include "base/log.h"

#define RING_BYTES  65536u
#define SOCKET_NAME "console.sock"

struct console {
	struct console_input in;
	int dir_fd; /* holds the socket, which is removed at the end */
	bool bound;
	int listen_fd, wake_fd;
	int out_fd, in_fd; /* file or stdio */
	pthread_t thread;
	bool started;

	pthread_mutex_t lock;
	pthread_cond_t idle;
	uint8_t ring[RING_BYTES];
	/* Positions count bytes since the beginning of the guest. */
	uint64_t head;	/* next to be put */
	uint64_t start; /* oldest byte kept */
	uint64_t sent;	/* next to leave */
	uint64_t limit; /* may leave up to here, when paused */
	bool paused, quit;
	bool stuck;  /* the reader does not read */
	bool reader; /* there is one */
	int client;
};

static void wake(struct console *c)
{
	uint64_t one = 1;
	if (write(c->wake_fd, &one, sizeof one) < 0 && errno != EAGAIN)
		log_debug("console: wake: %s", strerror(errno));
}

void console_wake(struct console *c)
{
	wake(c);
}

/* Caller holds lock. */
static uint64_t may_leave(const struct console *c)
{
	uint64_t end = c->paused ? c->limit : c->head;
	return end > c->sent ? end - c->sent : 0;
}

/* Caller holds lock. */
static void put_locked(struct console *c, uint8_t byte)
{
	c->ring[c->head++ % RING_BYTES] = byte;
	if (c->head - c->start > RING_BYTES)
		c->start = c->head - RING_BYTES;
	if (c->sent < c->start)
		c->sent = c->start;
}

void console_put(struct console *c, uint8_t byte)
{
	bool was_idle;
	{
		SCOPE_LOCK(&c->lock);
		was_idle = may_leave(c) == 0;
		put_locked(c, byte);
		/* With no reader, bytes wait in the ring. */
		was_idle = was_idle && c->reader && !c->paused;
	}
	if (was_idle)
		wake(c);
}

static void client_close(struct console *c)
{
	if (c->client >= 0)
		close(c->client);
	c->client = -1;
	SCOPE_LOCK(&c->lock);
	c->reader = c->out_fd >= 0;
	c->stuck = false;
	pthread_cond_broadcast(&c->idle);
}

static void client_accept(struct console *c)
{
	int fd = accept4(c->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	if (fd < 0)
		return;
	if (c->client >= 0) {
		static const char busy[] = "console: another client is connected\r\n";
		if (send(fd, busy, sizeof busy - 1, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
			log_debug("console: %s", strerror(errno));
		close(fd);
		return;
	}
	c->client = fd;
	SCOPE_LOCK(&c->lock);
	c->reader = true;
	c->sent = c->start;
}

/* Sends what may leave. True if the descriptor took all of it. */
static bool send_out(struct console *c, int fd)
{
	for (;;) {
		uint8_t copy[4096];
		uint64_t from;
		size_t n;
		{
			SCOPE_LOCK(&c->lock);
			n = may_leave(c) < sizeof copy ? (size_t)may_leave(c) : sizeof copy;
			from = c->sent;
			for (size_t i = 0; i < n; i++)
				copy[i] = c->ring[(from + i) % RING_BYTES];
			if (!n) {
				c->stuck = false;
				pthread_cond_broadcast(&c->idle);
				return true;
			}
		}
		ssize_t done =
			c->client >= 0 ? send(fd, copy, n, MSG_NOSIGNAL | MSG_DONTWAIT) : write(fd, copy, n);
		if (done < 0 && errno == EINTR)
			continue;
		SCOPE_LOCK(&c->lock);
		if (done < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
			c->stuck = true;
			pthread_cond_broadcast(&c->idle);
			return false;
		}
		if (done <
		    0) { /* a full disk or a closed terminal must not stop the guest: the bytes are lost */
			log_warn("console: %s", strerror(errno));
			done = (ssize_t)n;
		}
		if (c->sent < from + (uint64_t)done)
			c->sent = from + (uint64_t)done;
	}
}

static void *console_main(void *arg)
{
	struct console *c = arg;
	pthread_setname_np(pthread_self(), "console");
	confine_self(CONFINE_DEVICE);
	bool blocked = false, input_open = true;
	for (;;) {
		int out = c->client >= 0 ? c->client : c->out_fd;
		int in = c->client >= 0 ? c->client : c->in_fd;
		bool quit, paused;
		{
			SCOPE_LOCK(&c->lock);
			quit = c->quit;
			paused = c->paused;
		}
		if (quit)
			return NULL;
		if (out >= 0)
			blocked = !send_out(c, out);
		size_t room = paused ? 0 : c->in.room(c->in.opaque);
		struct pollfd p[4] = {
			{.fd = c->wake_fd, .events = POLLIN},
			{.fd = c->listen_fd, .events = POLLIN},
			{.fd = in >= 0 && (input_open || c->client >= 0) && room ? in : -1, .events = POLLIN},
			{.fd = out >= 0 && blocked ? out : -1, .events = POLLOUT},
		};
		/* A paused or full console still has to notice that its client went away. */
		if (c->client >= 0 && p[2].fd < 0)
			p[2] = (struct pollfd){.fd = c->client, .events = 0};
		if (poll(p, 4, -1) < 0)
			continue;
		if (p[0].revents) {
			uint64_t n;
			if (read(c->wake_fd, &n, sizeof n) < 0)
				log_debug("console: %s", strerror(errno));
		}
		if (p[1].revents)
			client_accept(c);
		if (p[2].revents) {
			uint8_t bytes[256];
			size_t want = room < sizeof bytes ? room : sizeof bytes;
			ssize_t n = want ? read(p[2].fd, bytes, want) : 0;
			if (n > 0)
				c->in.deliver(c->in.opaque, bytes, (size_t)n);
			else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
				if (p[2].fd == c->client && (want || (p[2].revents & (POLLHUP | POLLERR))))
					client_close(c);
				else if (p[2].fd == c->in_fd)
					input_open = false;
			}
		}
	}
}

/* The folder may be renamed while the guest runs (an arrival becomes a VM), and its path may be longer than a
 * socket address: both are why the socket is reached through a descriptor of the folder. */
static int listen_unix(struct console *c, const char *run_dir, struct error *err)
{
	struct sockaddr_un sa = {.sun_family = AF_UNIX};
	if (!run_dir)
		return error_set(err, EINVAL, "console: serial = socket needs a run directory");
	c->dir_fd = open(run_dir, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (c->dir_fd < 0)
		return error_errno(err, errno, "console: %s", run_dir);
	c->listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (c->listen_fd < 0)
		return error_errno(err, errno, "console: socket");
	unlinkat(c->dir_fd, SOCKET_NAME, 0);
	snprintf(sa.sun_path, sizeof sa.sun_path, "/proc/self/fd/%d/" SOCKET_NAME, c->dir_fd);
	/* Nobody can connect before listen. */
	if (bind(c->listen_fd, (struct sockaddr *)&sa, sizeof sa) < 0 ||
	    fchmodat(c->dir_fd, SOCKET_NAME, 0600, 0) < 0 || listen(c->listen_fd, 4) < 0)
		return error_errno(err, errno, "console: %s/" SOCKET_NAME, run_dir);
	c->bound = true;
	return 0;
}

static int open_backend(struct console *c, const char *spec, const char *run_dir, struct error *err)
{
	if (!spec || !strcmp(spec, "socket"))
		return listen_unix(c, run_dir, err);
	if (!strcmp(spec, "stdio")) {
		c->out_fd = fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 3);
		c->in_fd = fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 3);
		return c->out_fd < 0 ? error_errno(err, errno, "console: stdout") : 0;
	}
	if (!strncmp(spec, "file:", 5) && spec[5]) {
		c->out_fd = open(spec + 5, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOCTTY, 0600);
		return c->out_fd < 0 ? error_errno(err, errno, "console: %s", spec + 5) : 0;
	}
	return error_set(err, EINVAL, "serial = %s: must be socket, file:PATH or stdio", spec);
}

int console_create(const char *spec, const char *run_dir, const struct console_input *in,
		   struct console **out, struct error *err)
{
	struct console *c = calloc(1, sizeof *c);
	if (!c)
		return error_errno(err, ENOMEM, "console");
	c->in = *in;
	c->dir_fd = c->listen_fd = c->out_fd = c->in_fd = c->client = -1;
	c->paused = true;
	pthread_mutex_init(&c->lock, NULL);
	cond_init_monotonic(&c->idle);
	c->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	int ret = c->wake_fd < 0 ? error_errno(err, errno, "console: eventfd")
				 : open_backend(c, spec, run_dir, err);
	if (!ret) {
		c->reader = c->out_fd >= 0;
		sigset_t all, old;
		sigfillset(&all);
		pthread_sigmask(SIG_SETMASK, &all, &old);
		ret = pthread_create(&c->thread, NULL, console_main, c);
		pthread_sigmask(SIG_SETMASK, &old, NULL);
		c->started = ret == 0;
		if (ret)
			ret = error_errno(err, ret, "console: thread");
	}
	if (ret) {
		console_destroy(c);
		return ret;
	}
	*out = c;
	return 0;
}

void console_destroy(struct console *c)
{
	if (!c)
		return;
	if (c->started) {
		{
			SCOPE_LOCK(&c->lock);
			c->quit = true;
		}
		wake(c);
		pthread_join(c->thread, NULL);
	}
	if (c->bound)
		unlinkat(c->dir_fd, SOCKET_NAME, 0);
	int fds[] = {c->dir_fd, c->listen_fd, c->wake_fd, c->out_fd, c->in_fd, c->client};
	for (size_t i = 0; i < ARRAY_SIZE(fds); i++)
		if (fds[i] >= 0)
			close(fds[i]);
	pthread_cond_destroy(&c->idle);
	pthread_mutex_destroy(&c->lock);
	free(c);
}

void console_pause(struct console *c)
{
	SCOPE_LOCK(&c->lock);
	if (!c->paused)
		c->limit = c->head;
	c->paused = true;
}

int console_drain(struct console *c, unsigned timeout_ms)
{
	struct timespec until;
	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += timeout_ms / 1000;
	until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
	if (until.tv_nsec >= 1000000000) {
		until.tv_sec++;
		until.tv_nsec -= 1000000000;
	}
	wake(c);
	SCOPE_LOCK(&c->lock);
	while (c->reader && !c->stuck && may_leave(c))
		if (pthread_cond_timedwait(&c->idle, &c->lock, &until) == ETIMEDOUT)
			return -ETIMEDOUT;
	return 0;
}

void console_resume(struct console *c)
{
	{
		SCOPE_LOCK(&c->lock);
		c->paused = false;
	}
	wake(c);
}

void console_save(struct console *c, struct state_writer *w)
{
	SCOPE_LOCK(&c->lock);
	uint32_t n = (uint32_t)(c->head - c->start);
	state_put_u32(w, n);
	for (uint64_t at = c->start; at < c->head;) {
		uint64_t run = RING_BYTES - at % RING_BYTES;
		if (run > c->head - at)
			run = c->head - at;
		state_put_bytes(w, c->ring + at % RING_BYTES, (size_t)run);
		at += run;
	}
	/* What had not left when the state was taken has to leave at the destination. */
	state_put_u32(w, c->reader && c->client < 0 ? (uint32_t)(c->head - c->sent) : 0);
}

int console_load(struct console *c, struct state_reader *r, struct error *err)
{
	SCOPE_LOCK(&c->lock);
	uint32_t n = state_get_u32(r);
	if (n > RING_BYTES || n > state_remaining(r))
		return error_set(err, EPROTO, "console: %u bytes kept", n);
	c->start = 0;
	c->head = n;
	state_get_bytes(r, c->ring, n);
	uint32_t unsent = state_get_u32(r);
	if (unsent > n)
		return error_set(err, EPROTO, "console: %u of %u bytes unsent", unsent, n);
	c->sent = n - unsent;
	c->limit = c->sent;
	return 0;
}
