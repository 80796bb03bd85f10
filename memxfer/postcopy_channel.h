/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MEMXFER_POSTCOPY_CHANNEL_H
#define MEMXFER_POSTCOPY_CHANNEL_H

#include "memxfer/codec.h"
#include "memxfer/postcopy.h"

/* Private to postcopy*.c: frames on a post-copy channel, one reading and one writing thread. */
struct postcopy_channel {
	struct conn *conn;
	unsigned index, timeout_ms;
	uint64_t epoch, received, sent;
	uint8_t *body; /* MEM_BODY_MAX: of the last frame read */
};

int postcopy_channel_init(struct postcopy_channel *c, unsigned index, unsigned timeout_ms, uint64_t epoch,
			  struct error *err);
void postcopy_channel_release(struct postcopy_channel *c); /* not the conn */
/* A new connection: numbers begin anew. */
void postcopy_channel_attach(struct postcopy_channel *c, struct conn *conn);
/* One frame with its body, checked but for its meaning. timeout_ms as of conn_read_full. */
int postcopy_channel_read(struct postcopy_channel *c, struct mem_header *h, unsigned timeout_ms,
			  struct error *err);
/* body: nruns encoded runs, then len bytes. */
int postcopy_channel_send(struct postcopy_channel *c, enum mem_frame_type type, uint32_t nruns, uint32_t len,
			  const void *body, struct error *err);

/* So often something is said on a channel on which nothing else is. */
unsigned postcopy_beat_ms(unsigned timeout_ms);

#endif
