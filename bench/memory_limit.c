/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The ceiling of bench/memory: memory, one copy, checksum, socket, memory, and nothing else. No rounds, no
 * dirty log, no zero test, no page table of what is where. Two processes, a TCP connection over the loopback
 * device and a thread at each end for every stream; a third process may spin meanwhile, as a guest's
 * processor does.
 */
#include <arpa/inet.h>
#include <err.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

#define STREAMS_MAX  16
#define REGION_BYTES (UINT64_C(2) << 20)
#define FRAME_BYTES  (UINT64_C(512) << 10)

static uint64_t size_bytes = UINT64_C(1) << 30;
static unsigned nstreams = 2;
static uint8_t *memory; /* of this process: the source's or the destination's */
static int sockets[STREAMS_MAX];

static void send_all(int fd, const void *data, size_t len)
{
	for (const uint8_t *p = data; len;) {
		ssize_t n = send(fd, p, len, MSG_NOSIGNAL);
		if (n <= 0)
			err(1, "send");
		p += n;
		len -= (size_t)n;
	}
}

static void receive_all(int fd, void *data, size_t len)
{
	for (uint8_t *p = data; len;) {
		ssize_t n = recv(fd, p, len, MSG_WAITALL);
		if (n <= 0)
			err(1, "recv");
		p += n;
		len -= (size_t)n;
	}
}

static void *send_main(void *arg)
{
	unsigned stream = (unsigned)(uintptr_t)arg;
	uint8_t *copy = malloc(FRAME_BYTES), ack;
	if (!copy)
		err(1, "malloc");
	for (uint64_t region = stream * REGION_BYTES; region < size_bytes; region += nstreams * REGION_BYTES)
		for (uint64_t at = region; at < region + REGION_BYTES; at += FRAME_BYTES) {
			memcpy(copy, memory + at, FRAME_BYTES);
			uint64_t sum = XXH3_64bits(copy, FRAME_BYTES);
			send_all(sockets[stream], &sum, sizeof sum);
			send_all(sockets[stream], copy, FRAME_BYTES);
		}
	receive_all(sockets[stream], &ack, 1);
	free(copy);
	return NULL;
}

static void *receive_main(void *arg)
{
	unsigned stream = (unsigned)(uintptr_t)arg;
	for (uint64_t region = stream * REGION_BYTES; region < size_bytes; region += nstreams * REGION_BYTES)
		for (uint64_t at = region; at < region + REGION_BYTES; at += FRAME_BYTES) {
			uint64_t sum;
			receive_all(sockets[stream], &sum, sizeof sum);
			receive_all(sockets[stream], memory + at, FRAME_BYTES);
			if (XXH3_64bits(memory + at, FRAME_BYTES) != sum)
				errx(1, "a frame's checksum does not match");
		}
	send_all(sockets[stream], "", 1);
	return NULL;
}

static void each_stream(void *(*run)(void *))
{
	pthread_t threads[STREAMS_MAX];
	for (unsigned i = 0; i < nstreams; i++)
		if (pthread_create(&threads[i], NULL, run, (void *)(uintptr_t)i))
			errx(1, "pthread_create");
	for (unsigned i = 0; i < nstreams; i++)
		pthread_join(threads[i], NULL);
}

/* As guest memory is: a memfd, mapped shared. */
static void map_memory(void)
{
	int fd = memfd_create("memory_limit", MFD_CLOEXEC);
	if (fd < 0 || ftruncate(fd, (off_t)size_bytes) < 0)
		err(1, "memfd");
	memory = mmap(NULL, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (memory == MAP_FAILED)
		err(1, "mmap");
	close(fd);
}

static void fill(void)
{
	uint64_t x = 88172645463325252;
	for (uint64_t i = 0; i < size_bytes / 8; i++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		((uint64_t *)memory)[i] = x;
	}
}

/* Memory in place before the source may begin, unless it is to be faulted in as it arrives. */
static void destination(int listener, bool fresh)
{
	map_memory();
	if (!fresh)
		for (uint64_t at = 0; at < size_bytes; at += 4096)
			((volatile uint8_t *)memory)[at] = 0;
	for (unsigned i = 0; i < nstreams; i++)
		if ((sockets[i] = accept(listener, NULL, NULL)) < 0)
			err(1, "accept");
	for (unsigned i = 0; i < nstreams; i++)
		send_all(sockets[i], "", 1);
	each_stream(receive_main);
}

static pid_t child(void)
{
	pid_t pid = fork();
	if (pid < 0)
		err(1, "fork");
	if (!pid)
		prctl(PR_SET_PDEATHSIG, SIGKILL);
	return pid;
}

static double now_s(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void source(const struct sockaddr_in *to)
{
	map_memory();
	fill();
	for (unsigned i = 0; i < nstreams; i++) {
		int on = 1;
		uint8_t ready;
		sockets[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
		if (sockets[i] < 0 || connect(sockets[i], (const struct sockaddr *)to, sizeof *to) < 0)
			err(1, "connect");
		setsockopt(sockets[i], IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
		if (i == nstreams - 1)
			for (unsigned j = 0; j < nstreams; j++)
				receive_all(sockets[j], &ready, 1);
	}
}

int main(int argc, char **argv)
{
	static const struct option known[] = {{"mib", required_argument, NULL, 'm'},
					      {"streams", required_argument, NULL, 's'},
					      {"fresh", no_argument, NULL, 'f'},
					      {"spin", no_argument, NULL, 'p'},
					      {0}};
	bool fresh = false, spin = false;
	int c;
	while ((c = getopt_long(argc, argv, "", known, NULL)) != -1) {
		if (c == 'm')
			size_bytes = strtoull(optarg, NULL, 10) << 20;
		else if (c == 's')
			nstreams = (unsigned)strtoul(optarg, NULL, 10);
		else if (c == 'f')
			fresh = true;
		else if (c == 'p')
			spin = true;
		else
			return 2;
	}
	if (!size_bytes || size_bytes % REGION_BYTES || !nstreams || nstreams > STREAMS_MAX)
		errx(2, "--mib: a multiple of 2; --streams: 1 to %d", STREAMS_MAX);
	struct sockaddr_in addr = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t len = sizeof addr;
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (listener < 0 || bind(listener, (struct sockaddr *)&addr, len) < 0 ||
	    listen(listener, STREAMS_MAX) < 0 || getsockname(listener, (struct sockaddr *)&addr, &len) < 0)
		err(1, "listen");
	pid_t receiver = child();
	if (!receiver) {
		destination(listener, fresh);
		return 0;
	}
	close(listener);
	source(&addr);
	pid_t spinner = spin ? child() : 0;
	if (spin && !spinner)
		for (volatile uint64_t i = 0;; i++)
			;
	double begin = now_s();
	each_stream(send_main);
	double seconds = now_s() - begin;
	if (spinner)
		kill(spinner, SIGKILL);
	int status;
	if (waitpid(receiver, &status, 0) < 0 || status)
		errx(1, "the destination failed");
	printf("{\"seconds\": %.6f, \"bytes\": %llu}\n", seconds, (unsigned long long)size_bytes);
	return 0;
}
