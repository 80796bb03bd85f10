/* SPDX-License-Identifier: Apache-2.0 */
/*
 * recorder NAME FILE RECORD-SIZE INTERVAL-MS ADDRESS PORT
 * Runs in the guest. Appends a numbered record to FILE, fsyncs, and only then sends the number over TCP:
 * every number that arrives is one that the disk acknowledged. Goes on where FILE ends. Says so when the
 * connection is lost, an fsync takes longer than a second, or the clock goes back.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "record.h"

static const char *name;

static uint64_t now_ns(clockid_t clock)
{
	struct timespec ts;
	clock_gettime(clock, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static void sleep_ms(long ms)
{
	nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000}, NULL);
}

static int connect_collector(const char *address, uint16_t port)
{
	struct sockaddr_in sa = {.sin_family = AF_INET, .sin_port = htons(port)};
	if (inet_pton(AF_INET, address, &sa.sin_addr) != 1) {
		fprintf(stderr, "%s: bad address %s\n", name, address);
		exit(2);
	}
	for (;;) {
		int on = 1, s = socket(AF_INET, SOCK_STREAM, 0);
		if (s >= 0 && connect(s, (struct sockaddr *)&sa, sizeof sa) == 0) {
			setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
			dprintf(s, "stream %s\n", name);
			return s;
		}
		if (s >= 0)
			close(s);
		sleep_ms(200);
	}
}

/* The number of the last whole record; cuts off what a crash left of a partial one. */
static uint64_t last_record(int fd, size_t size, char *buf)
{
	struct stat st;
	uint64_t number = 0, time_ns;
	if (fstat(fd, &st) < 0)
		exit(1);
	off_t whole = st.st_size / (off_t)size;
	if (whole > 0 && (pread(fd, buf, size, (whole - 1) * (off_t)size) != (ssize_t)size ||
			  !record_parse(buf, size, &number, &time_ns) || number != (uint64_t)whole)) {
		fprintf(stderr, "%s: record %jd of the log is damaged\n", name, (intmax_t)whole);
		exit(1);
	}
	if (ftruncate(fd, whole * (off_t)size) < 0)
		exit(1);
	return number;
}

int main(int argc, char **argv)
{
	static char buf[RECORD_SIZE_MAX];
	if (argc != 7) {
		fprintf(stderr, "usage: recorder NAME FILE RECORD-SIZE INTERVAL-MS ADDRESS PORT\n");
		return 2;
	}
	name = argv[1];
	size_t size = strtoul(argv[3], NULL, 10);
	long interval_ms = strtol(argv[4], NULL, 10);
	if (size < RECORD_SIZE_MIN || size > RECORD_SIZE_MAX || interval_ms < 0)
		return 2;
	signal(SIGPIPE, SIG_IGN);
	setvbuf(stderr, NULL, _IOLBF, 0);
	int fd = open(argv[2], O_RDWR | O_CREAT | O_APPEND, 0644);
	if (fd < 0) {
		fprintf(stderr, "%s: cannot open %s: %s\n", name, argv[2], strerror(errno));
		return 1;
	}
	uint64_t number = last_record(fd, size, buf), real = 0, mono = 0;
	int sock = connect_collector(argv[5], (uint16_t)atoi(argv[6]));
	fprintf(stderr, "%s: continues after record %" PRIu64 "\n", name, number);
	for (;;) {
		uint64_t r = now_ns(CLOCK_REALTIME), m = now_ns(CLOCK_MONOTONIC);
		if (r < real || m < mono)
			fprintf(stderr, "%s: the clock went back at record %" PRIu64 "\n", name, number);
		real = r;
		mono = m;
		record_format(buf, size, ++number, real);
		if (write(fd, buf, size) != (ssize_t)size || fsync(fd) < 0) {
			fprintf(stderr, "%s: record %" PRIu64 ": %s\n", name, number, strerror(errno));
			return 1;
		}
		uint64_t took_ms = (now_ns(CLOCK_MONOTONIC) - m) / 1000000;
		if (took_ms > 1000)
			fprintf(stderr, "%s: record %" PRIu64 " took %" PRIu64 " ms\n", name, number,
				took_ms);
		while (dprintf(sock, "%" PRIu64 "\n", number) < 0) {
			fprintf(stderr, "%s: connection lost: %s\n", name, strerror(errno));
			close(sock);
			sock = connect_collector(argv[5], (uint16_t)atoi(argv[6]));
		}
		sleep_ms(interval_ms);
	}
}
