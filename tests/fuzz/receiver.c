/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A whole receiver of guest memory, with its threads, against two streams of frames that the input chooses.
 * Numbers and checksums are made right, else nothing would get past them. Nothing may be written outside of
 * the guest's memory, nobody may hang, and a refusal says why.
 *
 * Input: a byte of options (bit 0: post-copy is agreed; 1: deltas are), then records: a byte (bit 0: stream;
 * bits 1 and 2 both set: the frame stays as it is), a header, its runs, its payload; of plain pages, whose
 * payload could be anything, a byte that fills it.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/bytes.h"
#include "memxfer/codec.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define NPAGES	    1100u /* three regions, the last of them not whole */
#define SPACE_BYTES (NPAGES * (size_t)MEM_PAGE_BYTES)
#define GUARD_BYTES ((size_t)1 << 20)
#define GUARD_FILL  0xa5
#define EPOCH	    7u
#define NSTREAMS    2u
#define TIMEOUT_MS  5000u
#define FRAMES_MAX  64u

static struct mem_space space;
static uint8_t frame[MEM_HEADER_BYTES + MEM_BODY_MAX];

/* Between pages that fault; the file goes on behind the space with a pattern. */
static void make_space(void)
{
	uint8_t *area =
		mmap(NULL, SPACE_BYTES + 2 * GUARD_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	static uint8_t fill[GUARD_BYTES];

	space = (struct mem_space){.fd = memfd_create("guest", MFD_CLOEXEC), .npages = NPAGES};
	memset(fill, GUARD_FILL, sizeof fill);
	if (area == MAP_FAILED || space.fd < 0 ||
	    ftruncate(space.fd, (off_t)(SPACE_BYTES + GUARD_BYTES)) < 0 ||
	    pwrite(space.fd, fill, sizeof fill, (off_t)SPACE_BYTES) != (ssize_t)sizeof fill)
		abort();
	space.base = mmap(area + GUARD_BYTES, SPACE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
			  space.fd, 0);
	if (space.base == MAP_FAILED)
		abort();
}

static void check_guard(void)
{
	static uint8_t got[GUARD_BYTES];
	struct stat st;

	if (fstat(space.fd, &st) < 0 || st.st_size != (off_t)(SPACE_BYTES + GUARD_BYTES) ||
	    pread(space.fd, got, sizeof got, (off_t)SPACE_BYTES) != (ssize_t)sizeof got)
		abort();
	if (got[0] != GUARD_FILL || memcmp(got, got + 1, sizeof got - 1) != 0) {
		fprintf(stderr, "written behind guest memory\n");
		abort();
	}
}

struct input {
	const uint8_t *at;
	size_t left;
};

/* Zeroes where it ends. */
static void take(struct input *in, uint8_t *out, size_t len)
{
	size_t n = len < in->left ? len : in->left;

	memcpy(out, in->at, n);
	memset(out + n, 0, len - n);
	in->at += n;
	in->left -= n;
}

/* The next frame: its length, 0 at the end. */
static size_t make_frame(struct input *in, uint64_t sequence[NSTREAMS], unsigned *stream)
{
	uint8_t how = 0, *body = frame + MEM_HEADER_BYTES;
	struct mem_header h;

	if (!in->left)
		return 0;
	take(in, &how, 1);
	*stream = how % NSTREAMS;
	take(in, frame, MEM_HEADER_BYTES);
	if ((how & 6) == 6)
		return MEM_HEADER_BYTES;
	put_be32(frame, 0x534e4d4d);
	put_be16(frame + 4, MEM_WIRE_VERSION);
	put_be16(frame + 8, (uint16_t)*stream);
	put_be64(frame + 16, EPOCH);
	put_be64(frame + 24, sequence[*stream]);
	put_be32(frame + 44, 0);
	h = (struct mem_header){.type = get_be16(frame + 6),
				.stream = (uint16_t)*stream,
				.flags = get_be16(frame + 10),
				.nruns = get_be32(frame + 12) % (MEM_FRAME_RUNS_MAX + 2),
				.epoch = EPOCH,
				.sequence = sequence[*stream]++,
				.round = get_be32(frame + 32),
				.raw_len = get_be32(frame + 36) % (MEM_PAYLOAD_MAX + 2),
				.wire_len = get_be32(frame + 40) % (MEM_PAYLOAD_MAX + 2)};
	size_t runs_len = h.nruns * MEM_RUN_BYTES;
	if (runs_len + h.wire_len > MEM_BODY_MAX)
		h.wire_len = (uint32_t)(MEM_BODY_MAX - runs_len);
	take(in, body, runs_len);
	if (h.type == MEM_FRAME_PAGES && !(h.flags & MEM_FLAG_ZSTD)) {
		uint8_t fill;

		take(in, &fill, 1);
		memset(body + runs_len, fill, h.wire_len);
	} else {
		take(in, body + runs_len, h.wire_len);
	}
	h.body_sum = mem_body_sum(body, runs_len, body + runs_len, h.wire_len);
	mem_header_encode(frame, &h);
	return MEM_HEADER_BYTES + runs_len + h.wire_len;
}

/* Sockets of bounded buffers: the receiver has to take what comes, or end. */
static void feed(int fds[NSTREAMS], struct input *in)
{
	uint64_t sequence[NSTREAMS] = {0};
	unsigned stream;
	size_t len;

	for (unsigned n = 0; n < FRAMES_MAX && (len = make_frame(in, sequence, &stream)) > 0; n++) {
		/* a stream that waits for the other at the barrier takes no more: then what does not fit is
		 * cut off */
		for (size_t at = 0; at < len;) {
			ssize_t sent = send(fds[stream], frame + at, len - at, MSG_NOSIGNAL | MSG_DONTWAIT);

			if (sent <= 0) {
				struct timespec moment = {.tv_nsec = 200000};

				nanosleep(&moment, NULL);
				sent = send(fds[stream], frame + at, len - at, MSG_NOSIGNAL | MSG_DONTWAIT);
			}
			if (sent <= 0)
				return;
			at += (size_t)sent;
		}
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = {.at = data, .left = size};
	struct conn *streams[NSTREAMS];
	struct mem_receiver *r;
	struct error err = ERROR_INIT;
	uint8_t options = 0;
	int fds[NSTREAMS];

	if (!space.base)
		make_space();
	take(&in, &options, 1);
	for (unsigned i = 0; i < NSTREAMS; i++) {
		int pair[2];

		if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0 ||
		    conn_from_fd(pair[1], &streams[i], NULL) < 0)
			abort();
		fds[i] = pair[0];
	}
	struct mem_receiver_options opt = {.space = space,
					   .streams = streams,
					   .nstreams = NSTREAMS,
					   .timeout_ms = TIMEOUT_MS,
					   .epoch = EPOCH,
					   .postcopy = options & 1,
					   .deltas = options & 2};
	if (mem_receiver_start(&opt, &r, &err) < 0)
		abort();
	feed(fds, &in);
	for (unsigned i = 0; i < NSTREAMS; i++)
		shutdown(fds[i], SHUT_WR);
	if (mem_receiver_wait(r, &err) < 0 && !err.message[0])
		abort();
	free(mem_receiver_take_later(r));
	mem_receiver_free(r);
	for (unsigned i = 0; i < NSTREAMS; i++) {
		conn_close(streams[i]);
		close(fds[i]);
	}
	check_guard();
	if (fallocate(space.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)SPACE_BYTES) < 0)
		abort();
	return 0;
}
