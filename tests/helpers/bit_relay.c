/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A relay between two hosts that flips one bit of a disk's stream: bit_relay LISTEN TARGET EXPORT SPEC [FILE]
 *
 * It follows NBD on the `disk` channel of EXPORT, which --no-tls leaves in the clear, and passes everything
 * else through. SPEC: data:N or header:N, the data, or the offset in the header, of the copy's first write
 * after N MiB of the channel's stream; later:data or later:header, of the first write, zeroing or trim after
 * FILE exists. It says "flipped WHAT at OFFSET" once it did.
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/bytes.h"
#include "nbd/protocol.h"
#include "net/preamble.h"

#define BULK_BYTES	  (64u << 10)
#define OPTION_MAGIC_HIGH UINT32_C(0x49484156) /* IHAVEOPT */

static const char *export_name, *trigger;
static struct sockaddr_in target;
static bool flip_header, later;
static uint64_t after_bytes;
static atomic_bool flipped;

struct leg {
	int from, to;
	uint64_t passed;
	bool ours; /* the export's */
	char preamble[PREAMBLE_MAX_BYTES + 1];
};

static bool take(struct leg *leg, void *buf, size_t len)
{
	for (size_t got = 0; got < len;) {
		ssize_t n = recv(leg->from, (char *)buf + got, len - got, 0);
		if (n <= 0)
			return false;
		got += (size_t)n;
	}
	return true;
}

static bool give(struct leg *leg, const void *buf, size_t len)
{
	for (size_t put = 0; put < len;) {
		ssize_t n = send(leg->to, (const char *)buf + put, len - put, MSG_NOSIGNAL);
		if (n <= 0)
			return false;
		put += (size_t)n;
	}
	leg->passed += len;
	return true;
}

static bool pass(struct leg *leg, uint64_t len, uint8_t flip)
{
	static _Thread_local uint8_t buf[65536];
	for (; len; flip = 0) {
		size_t n = len < sizeof buf ? len : sizeof buf;
		if (!take(leg, buf, n))
			return false;
		buf[n / 2] ^= flip;
		if (!give(leg, buf, n))
			return false;
		len -= n;
	}
	return true;
}

static void pass_rest(struct leg *leg)
{
	uint8_t buf[65536];
	ssize_t n;
	while ((n = recv(leg->from, buf, sizeof buf, 0)) > 0 && give(leg, buf, (size_t)n))
		;
}

static bool due(const struct leg *leg)
{
	if (!leg->ours || atomic_load(&flipped))
		return false;
	return later ? access(trigger, F_OK) == 0 : leg->passed >= after_bytes;
}

/* An option of the handshake, of which the first 4 bytes are in raw. */
static bool pass_option(struct leg *leg, uint8_t raw[16])
{
	if (!take(leg, raw + 4, 12) || !give(leg, raw, 16))
		return false;
	uint32_t option = get_be32(raw + 8), len = get_be32(raw + 12);
	char data[512] = "";
	if (option != NBD_OPT_GO || len > sizeof data - 1)
		return pass(leg, len, 0);
	if (!take(leg, data, len))
		return false;
	uint32_t name = len >= 4 ? get_be32(data) : 0;
	leg->ours = name == strlen(export_name) && name <= len - 4 && !memcmp(data + 4, export_name, name);
	return give(leg, data, len);
}

static bool pass_request(struct leg *leg, uint8_t raw[NBD_REQUEST_BYTES])
{
	if (!take(leg, raw + 4, NBD_REQUEST_BYTES - 4))
		return false;
	uint16_t command = get_be16(raw + 6);
	uint64_t offset = get_be64(raw + 16);
	bool write = command == NBD_CMD_WRITE;
	bool changes = write || command == NBD_CMD_WRITE_ZEROES || command == NBD_CMD_TRIM;
	/* what the guest wrote it may soon write again, right this time; a chunk is copied once */
	bool bulk = write && get_be32(raw + 24) >= BULK_BYTES;
	bool now = due(leg) && (!later ? bulk : flip_header ? changes : write);
	if (now) {
		atomic_store(&flipped, true);
		if (flip_header) /* within the guest's span; in bulk, the next megabyte */
			raw[later ? 22 : 21] ^= 16;
	}
	if (!give(leg, raw, NBD_REQUEST_BYTES))
		return false;
	if (now) {
		printf("flipped %s at %llu\n", flip_header ? "header" : "data", (unsigned long long)offset);
		fflush(stdout);
	}
	return !write || pass(leg, get_be32(raw + 24), now && !flip_header ? 0x20 : 0);
}

static void follow_disk(struct leg *leg)
{
	uint8_t raw[NBD_REQUEST_BYTES];
	if (!pass(leg, 4, 0)) /* the client's flags */
		return;
	while (take(leg, raw, 4)) {
		bool option = get_be32(raw) == OPTION_MAGIC_HIGH;
		if (!option && get_be32(raw) != NBD_REQUEST_MAGIC) {
			fprintf(stderr, "bit_relay: neither option nor request: %08x\n", get_be32(raw));
			return;
		}
		if (!(option ? pass_option(leg, raw) : pass_request(leg, raw)))
			return;
	}
}

static void *source_main(void *arg)
{
	struct leg *leg = arg;
	if (strstr(leg->preamble, " disk "))
		follow_disk(leg);
	else
		pass_rest(leg);
	shutdown(leg->to, SHUT_WR);
	shutdown(leg->from, SHUT_RD);
	return NULL;
}

static void *destination_main(void *arg)
{
	struct leg *leg = arg, back = {.from = leg->to, .to = leg->from};
	pass_rest(&back);
	shutdown(back.to, SHUT_RDWR);
	shutdown(back.from, SHUT_RDWR);
	return NULL;
}

static void serve(int fd)
{
	struct leg *leg = calloc(1, sizeof *leg);
	pthread_t thread;
	size_t n = 0;
	leg->from = fd;
	leg->to = socket(AF_INET, SOCK_STREAM, 0);
	while (n < PREAMBLE_MAX_BYTES && recv(fd, leg->preamble + n, 1, 0) == 1 && leg->preamble[n++] != '\n')
		;
	if (connect(leg->to, (struct sockaddr *)&target, sizeof target) || !give(leg, leg->preamble, n)) {
		perror("bit_relay: connect");
		close(fd);
		close(leg->to);
		return; /* the leg is freed with the process, as all are */
	}
	if (pthread_create(&thread, NULL, source_main, leg) ||
	    pthread_create(&thread, NULL, destination_main, leg))
		exit(1);
}

static struct sockaddr_in address(const char *text)
{
	char host[64];
	unsigned port = 0;
	struct sockaddr_in sa = {.sin_family = AF_INET};
	if (sscanf(text, "%63[^:]:%u", host, &port) != 2 || inet_pton(AF_INET, host, &sa.sin_addr) != 1) {
		fprintf(stderr, "bit_relay: %s: not an address\n", text);
		exit(2);
	}
	sa.sin_port = htons((uint16_t)port);
	return sa;
}

int main(int argc, char **argv)
{
	if (argc < 5 || (strncmp(argv[4], "later:", 6) == 0 && argc != 6)) {
		fprintf(stderr, "usage: bit_relay LISTEN TARGET EXPORT SPEC [FILE]\n");
		return 2;
	}
	struct sockaddr_in self = address(argv[1]);
	target = address(argv[2]);
	export_name = argv[3];
	later = !strncmp(argv[4], "later:", 6);
	flip_header = strstr(argv[4], "header") != NULL;
	if (later)
		trigger = argv[5];
	else
		after_bytes = strtoull(strchr(argv[4], ':') ? strchr(argv[4], ':') + 1 : "0", NULL, 10) << 20;
	signal(SIGPIPE, SIG_IGN);
	int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(listener, (struct sockaddr *)&self, sizeof self) || listen(listener, 16)) {
		perror("bit_relay: listen");
		return 1;
	}
	for (int fd; (fd = accept(listener, NULL, NULL)) >= 0;)
		serve(fd);
	return 0;
}
