/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The guest's other end, outside of every host.
 *   collector listen PORT LOG           receive the recorders' numbers
 *   collector watch ADDRESS PORT LOG    connect once and follow the counter; exits 1 when the connection ends
 *   collector summary LOG               one JSON line for each stream of LOG
 * A log line is "MICROSECONDS CONNECTION connect|stream NAME|close|NUMBER", on the monotonic clock.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { CONNECTIONS_MAX = 64, LINE_MAX_BYTES = 128, STREAMS_MAX = 16 };

struct connection {
	int fd;
	unsigned id;
	size_t len;
	char line[LINE_MAX_BYTES];
};

static struct connection connections[CONNECTIONS_MAX];
static int nconnections;
static unsigned next_id = 1;
static FILE *logfile;
static volatile sig_atomic_t stop;

static void on_term(int sig)
{
	(void)sig;
	stop = 1;
}

static uint64_t now_us(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000u + (uint64_t)ts.tv_nsec / 1000;
}

static void add_connection(int fd)
{
	if (nconnections == CONNECTIONS_MAX) {
		close(fd);
		return;
	}
	struct connection *c = &connections[nconnections++];
	*c = (struct connection){.fd = fd, .id = next_id++};
	fprintf(logfile, "%" PRIu64 " %u connect\n", now_us(), c->id);
}

/* Returns false once the connection has ended. */
static bool receive(struct connection *c)
{
	char buf[4096];
	ssize_t n = read(c->fd, buf, sizeof buf);
	if (n < 0 && errno == EINTR)
		return true;
	if (n <= 0) {
		fprintf(logfile, "%" PRIu64 " %u close\n", now_us(), c->id);
		close(c->fd);
		return false;
	}
	uint64_t t = now_us();
	for (ssize_t i = 0; i < n; i++) {
		if (buf[i] == '\n') {
			fprintf(logfile, "%" PRIu64 " %u %.*s\n", t, c->id, (int)c->len, c->line);
			c->len = 0;
		} else if (c->len < sizeof c->line) {
			c->line[c->len++] = buf[i];
		}
	}
	return true;
}

/* listener is -1 for a watch, which ends with its only connection. */
static int collect(int listener)
{
	while (!stop && (listener >= 0 || nconnections > 0)) {
		struct pollfd pfd[CONNECTIONS_MAX + 1];
		for (int i = 0; i < nconnections; i++)
			pfd[i] = (struct pollfd){.fd = connections[i].fd, .events = POLLIN};
		pfd[nconnections] = (struct pollfd){.fd = listener, .events = POLLIN};
		int had = nconnections;
		/* A test reads the log while it grows; buffered for a fifth of a second at most. */
		if (poll(pfd, (nfds_t)had + 1, 200) <= 0) {
			fflush(logfile);
			continue;
		}
		if (pfd[had].revents != 0) {
			int fd = accept(listener, NULL, NULL);
			if (fd >= 0)
				add_connection(fd);
		}
		for (int i = had - 1; i >= 0; i--)
			if (pfd[i].revents != 0 && !receive(&connections[i]))
				connections[i] = connections[--nconnections];
		fflush(logfile);
	}
	fclose(logfile);
	return stop ? 0 : 1;
}

static int run_listen(const char *port)
{
	struct sockaddr_in sa = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
	int on = 1, s = socket(AF_INET, SOCK_STREAM, 0);
	setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	if (s < 0 || bind(s, (struct sockaddr *)&sa, sizeof sa) < 0 || listen(s, 16) < 0) {
		perror("collector");
		return 1;
	}
	return collect(s);
}

static int run_watch(const char *address, const char *port)
{
	struct sockaddr_in sa = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
	if (inet_pton(AF_INET, address, &sa.sin_addr) != 1)
		return 2;
	for (int tries = 0; tries < 300 && !stop; tries++) {
		int s = socket(AF_INET, SOCK_STREAM, 0);
		if (connect(s, (struct sockaddr *)&sa, sizeof sa) == 0) {
			add_connection(s);
			return collect(-1);
		}
		close(s);
		nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
	}
	fprintf(stderr, "collector: nothing listens at %s port %s\n", address, port);
	return 1;
}

struct stream {
	char name[32];
	unsigned connections, closed;
	uint64_t count, first, last, out_of_order, last_us, longest_gap_us;
};

static int run_summary(const char *path)
{
	static struct stream streams[STREAMS_MAX];
	static struct stream *of_connection[65536];
	int nstreams = 0;
	FILE *f = fopen(path, "r");
	if (f == NULL) {
		fprintf(stderr, "collector: %s: %s\n", path, strerror(errno));
		return 1;
	}
	uint64_t t;
	unsigned id;
	char what[64], streamname[32];
	char line[256];
	while (fgets(line, sizeof line, f) != NULL) {
		if (sscanf(line, "%" SCNu64 " %u %63s %31s", &t, &id, what, streamname) < 3 || id >= 65536)
			continue;
		struct stream *s = of_connection[id];
		if (strcmp(what, "stream") == 0) {
			int i = 0;
			while (i < nstreams && strcmp(streams[i].name, streamname) != 0)
				i++;
			if (i == STREAMS_MAX)
				continue;
			if (i == nstreams)
				memcpy(streams[nstreams++].name, streamname, sizeof streamname);
			of_connection[id] = &streams[i];
			streams[i].connections++;
		} else if (s != NULL && strcmp(what, "close") == 0) {
			s->closed++;
		} else if (s != NULL && what[0] >= '0' && what[0] <= '9') {
			uint64_t number = strtoull(what, NULL, 10);
			if (s->count++ == 0)
				s->first = number;
			else if (number != s->last + 1)
				s->out_of_order++;
			if (s->last_us != 0 && t - s->last_us > s->longest_gap_us)
				s->longest_gap_us = t - s->last_us;
			s->last = number;
			s->last_us = t;
		}
	}
	fclose(f);
	for (int i = 0; i < nstreams; i++) {
		struct stream *s = &streams[i];
		printf("{\"stream\":\"%s\",\"connections\":%u,\"closed\":%u,\"count\":%" PRIu64
		       ",\"first\":%" PRIu64 ",\"last\":%" PRIu64 ",\"out_of_order\":%" PRIu64
		       ",\"longest_gap_ms\":%.1f}\n",
		       s->name, s->connections, s->closed, s->count, s->first, s->last, s->out_of_order,
		       (double)s->longest_gap_us / 1000);
	}
	return 0;
}

int main(int argc, char **argv)
{
	struct sigaction sa = {.sa_handler = on_term};
	sigaction(SIGTERM, &sa, NULL);
	sigaction(SIGINT, &sa, NULL);
	signal(SIGPIPE, SIG_IGN);
	if (argc == 3 && strcmp(argv[1], "summary") == 0)
		return run_summary(argv[2]);
	bool listens = argc == 4 && strcmp(argv[1], "listen") == 0;
	if (!listens && !(argc == 5 && strcmp(argv[1], "watch") == 0)) {
		fprintf(stderr, "usage: collector listen PORT LOG | watch ADDRESS PORT LOG | summary LOG\n");
		return 2;
	}
	logfile = fopen(argv[argc - 1], "a");
	if (logfile == NULL) {
		fprintf(stderr, "collector: %s: %s\n", argv[argc - 1], strerror(errno));
		return 1;
	}
	return listens ? run_listen(argv[2]) : run_watch(argv[2], argv[3]);
}
