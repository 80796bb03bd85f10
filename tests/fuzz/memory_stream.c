/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A whole memory stream as the receiver takes it: frames out of the input, by a peer that may lie in every
 * field. The receiver has to end when the stream does, and to have written nothing outside of the guest.
 *
 * The first byte: 1: post-copy is agreed. Then frames, each a byte and 64 of a header, whose checksums,
 * magic, epoch, stream and number are made right unless the byte says 1 (header) or 2 (body) to leave them
 * wrong; 4: the payload is packed by us. What a body lacks at the input's end is made up.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>
#include <xxhash.h>
#include <zstd.h>

#include "base/bytes.h"
#include "memxfer/codec.h"

#define NPAGES	      1300u
#define SPACE_BYTES   ((size_t)NPAGES * MEM_PAGE_BYTES)
#define GUARD_BYTES   (1u << 20)
#define GUARD_FILL    0xa5
#define EPOCH	      9u
#define FRAMES_MAX    24
#define HANG_MS	      5000
#define BROKEN_HEAD   1
#define BROKEN_BODY   2
#define PACKED	      4
#define BODY_SUM_AT   48
#define WIRE_LEN_AT   40
#define HEADER_SUM_AT 56

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static struct mem_space space = {.fd = -1, .npages = NPAGES};

static void fatal(const char *what)
{
	fprintf(stderr, "memory_stream: %s\n", what);
	abort();
}

/* Between pages that fault; the file goes on behind with a pattern. */
static void space_open(void)
{
	static uint8_t fill[GUARD_BYTES];
	uint8_t *area;

	if (space.fd >= 0)
		return;
	space.fd = memfd_create("guest", MFD_CLOEXEC);
	memset(fill, GUARD_FILL, sizeof fill);
	area = mmap(NULL, SPACE_BYTES + 2 * GUARD_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (space.fd < 0 || ftruncate(space.fd, (off_t)(SPACE_BYTES + GUARD_BYTES)) < 0 ||
	    pwrite(space.fd, fill, sizeof fill, (off_t)SPACE_BYTES) != (ssize_t)sizeof fill ||
	    area == MAP_FAILED)
		fatal("no memory");
	space.base = mmap(area + GUARD_BYTES, SPACE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
			  space.fd, 0);
	if (space.base == MAP_FAILED)
		fatal("no mapping");
}

static void space_check_and_clear(void)
{
	static uint8_t got[GUARD_BYTES];

	if (pread(space.fd, got, sizeof got, (off_t)SPACE_BYTES) != (ssize_t)sizeof got)
		fatal("what lies behind the guest is gone");
	if (got[0] != GUARD_FILL || memcmp(got, got + 1, sizeof got - 1) != 0)
		fatal("written behind the guest");
	if (fallocate(space.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)SPACE_BYTES) < 0)
		fatal("fallocate");
}

/* Until all is sent or the receiver has closed its side. Answers are read, so that it never waits for us. */
static bool send_all(int fd, const uint8_t *p, size_t len)
{
	while (len) {
		struct pollfd pfd = {.fd = fd, .events = POLLIN | POLLOUT};
		uint8_t answers[4096];
		ssize_t n;

		if (poll(&pfd, 1, HANG_MS) <= 0)
			fatal("the receiver neither reads nor ends");
		if (pfd.revents & (POLLIN | POLLHUP) && recv(fd, answers, sizeof answers, MSG_DONTWAIT) == 0)
			return false;
		if (!(pfd.revents & POLLOUT))
			continue;
		n = send(fd, p, len, MSG_NOSIGNAL | MSG_DONTWAIT);
		if (n < 0 && errno != EAGAIN)
			return false;
		if (n > 0) {
			p += n;
			len -= (size_t)n;
		}
	}
	return true;
}

/* Until the receiver closes its side. */
static void read_to_end(int fd)
{
	uint8_t answers[4096];
	struct pollfd pfd = {.fd = fd, .events = POLLIN};

	do {
		if (poll(&pfd, 1, HANG_MS) <= 0)
			fatal("the receiver does not end");
	} while (recv(fd, answers, sizeof answers, 0) > 0);
}

struct input {
	const uint8_t *at;
	size_t left;
};

static void take(struct input *in, uint8_t *to, size_t len)
{
	size_t n = len < in->left ? len : in->left;

	memcpy(to, in->at, n);
	memset(to + n, 0x5a, len - n);
	in->at += n;
	in->left -= n;
}

/* The next frame into raw: its length, and how much of it came from the input. */
static size_t next_frame(struct input *in, uint64_t sequence, uint8_t *raw)
{
	static uint8_t plain[MEM_PAYLOAD_MAX];
	uint8_t *body = raw + MEM_HEADER_BYTES, how;
	uint32_t nruns, wire_len;
	size_t runs_len;

	take(in, &how, 1);
	take(in, raw, MEM_HEADER_BYTES);
	if (!(how & BROKEN_HEAD)) {
		put_be32(raw, 0x534e4d4d);
		put_be16(raw + 4, MEM_WIRE_VERSION);
		put_be16(raw + 8, 0);
		put_be64(raw + 16, EPOCH);
		put_be64(raw + 24, sequence);
		put_be32(raw + 44, 0);
	}
	/* What is longer than any frame may be is refused by its header. */
	nruns = get_be32(raw + 12) % (MEM_FRAME_RUNS_MAX + 1);
	wire_len = get_be32(raw + WIRE_LEN_AT) % (MEM_PAYLOAD_MAX + 1);
	runs_len = (size_t)nruns * MEM_RUN_BYTES;
	take(in, body, runs_len);
	take(in, body + runs_len, wire_len);
	if (how & PACKED) {
		size_t n = get_be32(raw + 36) % (MEM_PAYLOAD_MAX + 1);

		memset(plain, how, n);
		memcpy(plain, body + runs_len, n < wire_len ? n : wire_len);
		n = ZSTD_compress(body + runs_len, MEM_PAYLOAD_MAX, plain, n, 1);
		wire_len = ZSTD_isError(n) ? 0 : (uint32_t)n;
		put_be32(raw + WIRE_LEN_AT, wire_len);
	}
	if (!(how & BROKEN_BODY))
		put_be64(raw + BODY_SUM_AT, mem_body_sum(body, runs_len, body + runs_len, wire_len));
	put_be64(raw + HEADER_SUM_AT, XXH3_64bits(raw, HEADER_SUM_AT) ^ (how & BROKEN_HEAD ? how >> 4 : 0));
	return MEM_HEADER_BYTES + runs_len + wire_len;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static uint8_t raw[MEM_HEADER_BYTES + MEM_BODY_MAX];
	struct input in = {.at = data, .left = size};
	struct mem_receiver_options opt = {.nstreams = 1, .timeout_ms = HANG_MS, .epoch = EPOCH};
	struct mem_receiver *r;
	struct conn *conn;
	uint8_t how;
	int fds[2];

	if (size < 1 + MEM_HEADER_BYTES)
		return 0;
	space_open();
	take(&in, &how, 1);
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) < 0 ||
	    conn_from_fd(fds[1], &conn, NULL) < 0)
		fatal("no connection");
	opt.space = space;
	opt.streams = &conn;
	opt.postcopy = how & 1;
	if (mem_receiver_start(&opt, &r, NULL) < 0)
		fatal("no receiver");
	for (uint64_t i = 0; in.left && i < FRAMES_MAX; i++)
		if (!send_all(fds[0], raw, next_frame(&in, i, raw)))
			break;
	shutdown(fds[0], SHUT_WR);
	if (mem_receiver_wait(r, NULL) < 0)
		read_to_end(fds[0]);
	free(mem_receiver_take_later(r));
	mem_receiver_free(r);
	conn_close(conn);
	close(fds[0]);
	space_check_and_clear();
	return 0;
}
