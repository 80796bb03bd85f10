/* SPDX-License-Identifier: Apache-2.0 */
#include "memxfer/postcopy_channel.h"

#include <errno.h>
#include <stdlib.h>

#define BEAT_MOST_MS  500u
#define BEAT_LEAST_MS 10u

unsigned postcopy_beat_ms(unsigned timeout_ms)
{
	unsigned ms = timeout_ms / 4;

	if (!timeout_ms || ms > BEAT_MOST_MS)
		return BEAT_MOST_MS;
	return ms < BEAT_LEAST_MS ? BEAT_LEAST_MS : ms;
}

int postcopy_channel_init(struct postcopy_channel *c, unsigned index, unsigned timeout_ms, uint64_t epoch,
			  struct error *err)
{
	*c = (struct postcopy_channel){.index = index, .timeout_ms = timeout_ms, .epoch = epoch};
	c->body = malloc(MEM_BODY_MAX);
	return c->body ? 0 : error_errno(err, ENOMEM, "post-copy");
}

void postcopy_channel_release(struct postcopy_channel *c)
{
	free(c->body);
	c->body = NULL;
}

void postcopy_channel_attach(struct postcopy_channel *c, struct conn *conn)
{
	c->conn = conn;
	c->received = c->sent = 0;
}

int postcopy_channel_read(struct postcopy_channel *c, struct mem_header *h, unsigned timeout_ms,
			  struct error *err)
{
	uint8_t raw[MEM_HEADER_BYTES];
	int ret = conn_read_full(c->conn, raw, sizeof raw, timeout_ms, err);

	if (ret == 0)
		ret = mem_header_decode(raw, h, err);
	if (ret < 0)
		return ret;
	if (h->epoch != c->epoch || h->stream != c->index || h->sequence != c->received)
		return error_set(
			err, EPROTO,
			"post-copy frame %s: of epoch %llu, channel %u, number %llu; %llu, %u, %llu was "
			"due",
			mem_frame_name(h->type), (unsigned long long)h->epoch, h->stream,
			(unsigned long long)h->sequence, (unsigned long long)c->epoch, c->index,
			(unsigned long long)c->received);
	c->received++;
	ret = conn_read_full(c->conn, c->body, mem_body_bytes(h), c->timeout_ms, err);
	if (ret == -ENODATA)
		return error_set(err, ECONNRESET, "the channel was closed in the middle of a frame");
	if (ret < 0)
		return ret;

	size_t runs_len = (size_t)h->nruns * MEM_RUN_BYTES;

	if (mem_body_sum(c->body, runs_len, c->body + runs_len, h->wire_len) != h->body_sum)
		return error_set(err, EBADMSG, "post-copy frame %s, number %llu: checksum does not match",
				 mem_frame_name(h->type), (unsigned long long)h->sequence);
	return 0;
}

int postcopy_channel_send(struct postcopy_channel *c, enum mem_frame_type type, uint32_t nruns, uint32_t len,
			  const void *body, struct error *err)
{
	const uint8_t *bytes = body;
	size_t runs_len = (size_t)nruns * MEM_RUN_BYTES;
	struct mem_header h = {
		.type = (uint16_t)type,
		.stream = (uint16_t)c->index,
		.nruns = nruns,
		.raw_len = len,
		.wire_len = len,
		.epoch = c->epoch,
		.sequence = c->sent++,
		.body_sum = mem_body_sum(bytes, runs_len, len ? bytes + runs_len : NULL, len),
	};
	uint8_t raw[MEM_HEADER_BYTES];
	struct iovec iov[2] = {{.iov_base = raw, .iov_len = sizeof raw},
			       {.iov_base = (void *)body, .iov_len = runs_len + len}};

	mem_header_encode(raw, &h);
	return conn_writev_full(c->conn, iov, 2, c->timeout_ms, err);
}
