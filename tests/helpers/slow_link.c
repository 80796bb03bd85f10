/* SPDX-License-Identifier: Apache-2.0 */
/*
 * slow_link ADDRESS:PORT TARGET:PORT DELAY_MS: a TCP relay that holds every byte for so long in both
 * directions, for kernels without netem. What is on its way in one direction is bounded; the link is not
 * slowed otherwise. Prints "ready" when it listens. Ends by a signal.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"

#define PARCEL_BYTES (64u << 10)
#define HELD_BYTES   (64u << 20)

static uint64_t delay_ns;
static struct sockaddr_in target;

struct parcel {
	struct parcel *next;
	uint64_t due_ns;
	size_t len;
	uint8_t data[];
};

struct direction {
	int from, to;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	struct parcel *first, **tail;
	size_t held;
	bool ended, broken;
};

static struct parcel *receive(int fd)
{
	struct parcel *p = malloc(sizeof *p + PARCEL_BYTES);
	ssize_t n = p ? recv(fd, p->data, PARCEL_BYTES, 0) : 0;
	if (n <= 0) {
		free(p);
		return NULL;
	}
	p->len = (size_t)n;
	p->due_ns = clock_now_ns() + delay_ns;
	p->next = NULL;
	return p;
}

static void *reader(void *arg)
{
	struct direction *d = arg;
	struct parcel *p;
	while ((p = receive(d->from))) {
		pthread_mutex_lock(&d->lock);
		while (d->held >= HELD_BYTES && !d->broken)
			pthread_cond_wait(&d->changed, &d->lock);
		d->held += p->len;
		*d->tail = p;
		d->tail = &p->next;
		pthread_cond_broadcast(&d->changed);
		pthread_mutex_unlock(&d->lock);
	}
	pthread_mutex_lock(&d->lock);
	d->ended = true;
	pthread_cond_broadcast(&d->changed);
	pthread_mutex_unlock(&d->lock);
	return NULL;
}

static bool deliver(int fd, const struct parcel *p)
{
	for (size_t at = 0; at < p->len;) {
		ssize_t n = send(fd, p->data + at, p->len - at, MSG_NOSIGNAL);
		if (n < 0)
			return false;
		at += (size_t)n;
	}
	return true;
}

static void *writer(void *arg)
{
	struct direction *d = arg;
	for (;;) {
		pthread_mutex_lock(&d->lock);
		while (!d->first && !d->ended)
			pthread_cond_wait(&d->changed, &d->lock);
		struct parcel *p = d->first;
		if (p && !(d->first = p->next))
			d->tail = &d->first;
		pthread_mutex_unlock(&d->lock);
		if (!p)
			break;
		uint64_t now = clock_now_ns();
		if (p->due_ns > now)
			usleep((useconds_t)((p->due_ns - now) / 1000));
		bool ok = deliver(d->to, p);
		pthread_mutex_lock(&d->lock);
		d->held -= p->len;
		d->broken |= !ok;
		pthread_cond_broadcast(&d->changed);
		pthread_mutex_unlock(&d->lock);
		free(p);
	}
	shutdown(d->to, SHUT_WR);
	return NULL;
}

static void start(struct direction *d, int from, int to)
{
	pthread_t thread;
	d->from = from;
	d->to = to;
	d->tail = &d->first;
	pthread_mutex_init(&d->lock, NULL);
	pthread_cond_init(&d->changed, NULL);
	if (pthread_create(&thread, NULL, reader, d) || pthread_detach(thread) ||
	    pthread_create(&thread, NULL, writer, d) || pthread_detach(thread))
		abort();
}

/* A connection lives as long as the process: it is a test's. */
static void relay(int client)
{
	int one = 1, server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct direction *d = calloc(2, sizeof *d);
	if (!d || server < 0 || connect(server, (struct sockaddr *)&target, sizeof target)) {
		perror("slow_link: target");
		free(d);
		close(client);
		if (server >= 0)
			close(server);
		return;
	}
	setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	setsockopt(server, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	start(&d[0], client, server);
	start(&d[1], server, client);
}

static bool parse(const char *text, struct sockaddr_in *out)
{
	char host[64];
	unsigned port;
	*out = (struct sockaddr_in){.sin_family = AF_INET};
	if (sscanf(text, "%63[^:]:%u", host, &port) != 2 || port > 65535)
		return false;
	out->sin_port = htons((uint16_t)port);
	return inet_pton(AF_INET, host, &out->sin_addr) == 1;
}

int main(int argc, char **argv)
{
	struct sockaddr_in here;
	int one = 1;
	if (argc != 4 || !parse(argv[1], &here) || !parse(argv[2], &target)) {
		fprintf(stderr, "usage: slow_link ADDRESS:PORT TARGET:PORT DELAY_MS\n");
		return 2;
	}
	delay_ns = strtoul(argv[3], NULL, 10) * UINT64_C(1000000);
	signal(SIGPIPE, SIG_IGN);
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (fd < 0 || bind(fd, (struct sockaddr *)&here, sizeof here) || listen(fd, 64)) {
		perror("slow_link");
		return 1;
	}
	puts("ready");
	fflush(stdout);
	for (;;) {
		int client = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
		if (client >= 0)
			relay(client);
		else if (errno != EINTR && errno != ECONNABORTED)
			return 1;
	}
}
