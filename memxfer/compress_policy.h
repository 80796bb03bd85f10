/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MEMXFER_COMPRESS_POLICY_H
#define MEMXFER_COMPRESS_POLICY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "memxfer/memxfer.h"

/*
 * Whether a stream's next frame should be compressed: only while packing costs less time than it saves on
 * the wire. It steps aside for a number of frames, doubled each time that a probe finds no gain, so that what
 * does not pack, or a wire faster than the processor, costs next to nothing. Pure; one thread.
 */
struct compress_policy {
	enum mem_compress mode;
	bool spare;    /* this host has processor time to spare: else packing must save twice what it takes */
	unsigned skip; /* frames still sent as they are */
	unsigned backoff; /* how many the next time */
	unsigned trial;	  /* compressed frames before the wire's time, as seen while compressing, is judged */
	double ratio;	  /* wire bytes a raw byte, moving average */
	double pack_ns, wire_ns; /* a byte, moving averages; 0 = not measured yet */
};

void compress_policy_init(struct compress_policy *p, enum mem_compress mode);
/* Call once a frame with data. */
bool compress_policy_wants(struct compress_policy *p);
/* The next frame that is compressed is a probe: a sample of it should be compressed first, so that data that
 * do not pack cost next to nothing. A poor sample goes to compress_policy_packed in the frame's stead. */
bool compress_policy_probes(const struct compress_policy *p);
bool compress_policy_poor(size_t raw, size_t packed);
/* After a frame was compressed; packed = raw when the result was not worth sending. */
void compress_policy_packed(struct compress_policy *p, size_t raw, size_t packed, uint64_t ns);
/* After a frame was sent. */
void compress_policy_sent(struct compress_policy *p, size_t wire, uint64_t ns);

#endif
