/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A link between two sockets: a thread that carries bytes both ways, at a rate and with a delay, falls silent
 * in either direction, or is cut in the middle of a message. What it holds when one end closes it still
 * delivers to the other.
 */
#ifndef TESTS_STORAGE_MODEL_WIRE_H
#define TESTS_STORAGE_MODEL_WIRE_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define WIRE_BUFFER_BYTES (256u << 10)

enum wire_way { WIRE_UP, WIRE_DOWN }; /* requests, replies */

struct wire_pipe {
	uint8_t *buf;
	size_t head, len; /* a ring */
	uint64_t ready_ns, carried, next_ns;
	bool from_closed, to_closed;
};

struct wire {
	int ends[2]; /* the client's side, the server's */
	int wake[2];
	pthread_t thread;
	struct wire_pipe pipes[2]; /* the thread's */
	pthread_mutex_t lock;	   /* what follows */
	bool silent[2], quit;
	uint64_t bytes_per_ms, delay_ns;
	/* 0: not. Counted from now on, in the direction of requests. */
	uint64_t cut_after, silence_after;
	bool silence_both;
};

/* Two ends for the users of the wire. tcp: over the loopback, else socket pairs. */
struct wire *wire_create(bool tcp, int *client_fd, int *server_fd);
void wire_pace(struct wire *w, uint64_t bytes_per_ms, unsigned delay_us);
void wire_silence(struct wire *w, bool up, bool down);
void wire_cut_after(struct wire *w, uint64_t bytes);
void wire_silence_after(struct wire *w, uint64_t bytes, bool both);
void wire_free(struct wire *w);

#endif
