/* SPDX-License-Identifier: Apache-2.0 */
/* The receiving streams: their threads, the frames' order, answers. What a frame does to memory is in
 * receiver_pages.c. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/bitmap.h"
#include "base/cleanup.h"
#include "memxfer/receiver_impl.h"

#define ERROR_SEND_MS 1000u

/* What comes after the barrier may concern any stream's regions: all must have finished what came before. */
static int pass_barrier(struct mem_rx *rx, struct error *err)
{
	struct mem_receiver *r = rx->receiver;
	int ret = 0;

	if (rx->past_barrier)
		return error_set(err, EPROTO, "memory frame: a second barrier");
	rx->past_barrier = true;
	pthread_mutex_lock(&r->lock);
	r->at_barrier++;
	pthread_cond_broadcast(&r->changed);
	while (r->at_barrier < r->opt.nstreams && !error_is_set(&r->failure) && !r->stopping)
		pthread_cond_wait(&r->changed, &r->lock);
	if (r->at_barrier < r->opt.nstreams)
		ret = error_set(err, ESHUTDOWN, "memory transfer was stopped");
	pthread_mutex_unlock(&r->lock);
	return ret;
}

static int reply(struct mem_rx *rx, enum mem_frame_type type, const char *text, unsigned timeout_ms,
		 struct error *err)
{
	struct mem_receiver *r = rx->receiver;
	size_t len = strnlen(text, MEM_SENTENCE_MAX);
	struct mem_header h = {
		.type = (uint16_t)type,
		.stream = (uint16_t)rx->index,
		.epoch = r->opt.epoch,
		.sequence = rx->reply_sequence++,
		.raw_len = (uint32_t)len,
		.wire_len = (uint32_t)len,
		.body_sum = mem_body_sum(NULL, 0, text, len),
	};
	uint8_t raw[MEM_HEADER_BYTES];
	struct iovec iov[2] = {{.iov_base = raw, .iov_len = sizeof raw},
			       {.iov_base = (void *)text, .iov_len = len}};

	mem_header_encode(raw, &h);
	return conn_writev_full(r->streams[rx->index], iov, 2, timeout_ms, err);
}

static int finish_stream(struct mem_rx *rx, struct error *err)
{
	struct mem_totals sent;

	mem_totals_decode(rx->packed, &sent);
	if (!rx->past_barrier)
		return error_set(err, EPROTO, "memory frame: the end without a barrier");
	if (sent.data_pages != rx->totals.data_pages || sent.zero_pages != rx->totals.zero_pages ||
	    sent.hole_pages != rx->totals.hole_pages || sent.frames != rx->totals.frames)
		return error_set(
			err, EPROTO,
			"memory stream: the source counted %llu data, %llu zero, %llu hole pages in "
			"%llu frames, here %llu, %llu, %llu in %llu arrived",
			(unsigned long long)sent.data_pages, (unsigned long long)sent.zero_pages,
			(unsigned long long)sent.hole_pages, (unsigned long long)sent.frames,
			(unsigned long long)rx->totals.data_pages, (unsigned long long)rx->totals.zero_pages,
			(unsigned long long)rx->totals.hole_pages, (unsigned long long)rx->totals.frames);
	return reply(rx, MEM_FRAME_ACK, "", rx->receiver->opt.timeout_ms, err);
}

/* A frame's header, checked but for what it announces. */
static int read_header(struct mem_rx *rx, struct mem_header *h, struct error *err)
{
	struct mem_receiver *r = rx->receiver;
	uint8_t raw[MEM_HEADER_BYTES];
	int ret = conn_read_full(r->streams[rx->index], raw, sizeof raw, r->opt.timeout_ms, err);

	if (ret == -ENODATA)
		return error_set(err, ENODATA, "the source closed the stream before its end");
	if (ret == 0)
		ret = mem_header_decode(raw, h, err);
	if (ret < 0)
		return ret;
	if (h->epoch != r->opt.epoch)
		return error_set(err, EPROTO, "memory frame: of epoch %llu, this is %llu",
				 (unsigned long long)h->epoch, (unsigned long long)r->opt.epoch);
	if (h->stream != rx->index)
		return error_set(err, EPROTO, "memory frame: of stream %u", h->stream);
	if (h->sequence != rx->sequence)
		return error_set(err, EPROTO, "memory frame: number %llu where %llu was due",
				 (unsigned long long)h->sequence, (unsigned long long)rx->sequence);
	rx->sequence++;
	return 0;
}

int mem_rx_readv(struct mem_rx *rx, struct iovec *iov, int niov, struct error *err)
{
	struct mem_receiver *r = rx->receiver;
	int ret = conn_readv_full(r->streams[rx->index], iov, niov, r->opt.timeout_ms, err);

	if (ret == -ENODATA)
		return error_set(err, ECONNRESET, "the source closed the stream in the middle of a frame");
	return ret;
}

int mem_rx_check_sum(const struct mem_header *h, uint64_t sum, struct error *err)
{
	if (sum == h->body_sum)
		return 0;
	return error_set(err, EBADMSG, "memory frame %s, number %llu: checksum does not match",
			 mem_frame_name(h->type), (unsigned long long)h->sequence);
}

/* The payload of a frame without pages, which is short. */
static int read_control(struct mem_rx *rx, const struct mem_header *h, struct error *err)
{
	struct iovec iov = {.iov_base = rx->packed, .iov_len = h->wire_len};
	int ret = mem_rx_readv(rx, &iov, 1, err);

	return ret < 0 ? ret : mem_rx_check_sum(h, mem_body_sum(NULL, 0, rx->packed, h->wire_len), err);
}

/* 1 at the stream's end. */
static int receive_frame(struct mem_rx *rx, struct error *err)
{
	struct mem_header h;
	int ret = read_header(rx, &h, err);

	if (ret < 0)
		return ret;
	if (h.type != MEM_FRAME_PAGES && h.type != MEM_FRAME_DELTA && h.type != MEM_FRAME_BEAT &&
	    h.type != MEM_FRAME_BARRIER && h.type != MEM_FRAME_END)
		return error_set(err, EPROTO, "memory frame %s is not the source's to send",
				 mem_frame_name(h.type));
	if (h.type == MEM_FRAME_PAGES)
		ret = mem_rx_pages(rx, &h, err);
	else if (h.type == MEM_FRAME_DELTA)
		ret = mem_rx_deltas(rx, &h, err);
	else
		ret = read_control(rx, &h, err);
	if (ret < 0)
		return ret;
	if (h.type == MEM_FRAME_END) { /* the source's count of frames is from before this one */
		ret = finish_stream(rx, err);
		return ret < 0 ? ret : 1;
	}
	if (h.type == MEM_FRAME_BEAT)
		ret = reply(rx, MEM_FRAME_BEAT, "", rx->receiver->opt.timeout_ms, err);
	else if (h.type == MEM_FRAME_BARRIER)
		ret = pass_barrier(rx, err);
	rx->totals.frames++;
	return ret;
}

static bool is_ours_to_tell(int code)
{
	return code != -ECONNRESET && code != -ENODATA && code != -ESHUTDOWN;
}

static void fail(struct mem_rx *rx, const struct error *err)
{
	struct mem_receiver *r = rx->receiver;
	bool first;

	pthread_mutex_lock(&r->lock);
	first = !error_is_set(&r->failure);
	if (first) {
		r->failure = *err;
		error_prefix(&r->failure, "memory stream %u", rx->index);
	}
	pthread_cond_broadcast(&r->changed);
	pthread_mutex_unlock(&r->lock);
	if (!first)
		return;
	if (is_ours_to_tell(err->code))
		(void)reply(rx, MEM_FRAME_ERROR, err->message, ERROR_SEND_MS, NULL);
	for (unsigned i = 0; i < r->opt.nstreams; i++)
		conn_shutdown(r->streams[i]);
}

static void *rx_main(void *arg)
{
	struct mem_rx *rx = arg;
	struct mem_receiver *r = rx->receiver;
	struct error err = ERROR_INIT;
	int ret;

	mem_stream_thread(&r->yield, "mem receive", rx->index);
	do {
		mem_yield_step(&r->yield);
		ret = receive_frame(rx, &err);
	} while (ret == 0);
	mem_yield_leave(&r->yield);
	if (ret < 0)
		fail(rx, &err);
	pthread_mutex_lock(&r->lock);
	r->done++;
	pthread_cond_broadcast(&r->changed);
	pthread_mutex_unlock(&r->lock);
	return NULL;
}

static int rx_init(struct mem_receiver *r, unsigned i, struct error *err)
{
	struct mem_rx *rx = &r->rx[i];

	rx->receiver = r;
	rx->index = i;
	return mem_rx_alloc(rx, err);
}

int mem_receiver_start(const struct mem_receiver_options *opt, struct mem_receiver **out, struct error *err)
{
	struct mem_receiver *r;
	struct stat st;
	int ret = 0;

	*out = NULL;
	if (!opt->nstreams || opt->nstreams > MEM_STREAMS_MAX)
		return error_set(err, EINVAL, "memory transfer: %u streams; 1 to %u are possible",
				 opt->nstreams, MEM_STREAMS_MAX);
	if (!opt->space.npages || !opt->space.base || fstat(opt->space.fd, &st) < 0 ||
	    (uint64_t)st.st_size / MEM_PAGE_BYTES < opt->space.npages)
		return error_set(err, EINVAL, "memory transfer: guest memory is smaller than it says");
	r = calloc(1, sizeof *r);
	if (!r)
		return error_errno(err, ENOMEM, "memory transfer");
	r->opt = *opt;
	memcpy(r->streams, opt->streams, opt->nstreams * sizeof *opt->streams);
	r->opt.streams = r->streams;
	mem_yield_init(&r->yield);
	mem_yield_begin(&r->yield);
	pthread_mutex_init(&r->lock, NULL);
	pthread_cond_init(&r->changed, NULL);
	r->written = bitmap_alloc(opt->space.npages);
	if (opt->postcopy)
		r->later = bitmap_alloc(opt->space.npages);
	if (!r->written || (opt->postcopy && !r->later))
		ret = error_errno(err, ENOMEM, "memory transfer: bitmap");
	for (unsigned i = 0; i < opt->nstreams && ret == 0; i++)
		ret = rx_init(r, i, err);
	for (unsigned i = 0; i < opt->nstreams && ret == 0; i++) {
		ret = -pthread_create(&r->rx[i].thread, NULL, rx_main, &r->rx[i]);
		r->rx[i].started = ret == 0;
		if (ret < 0)
			error_errno(err, ret, "memory transfer: thread");
	}
	if (ret < 0) {
		mem_receiver_free(r);
		return ret;
	}
	*out = r;
	return 0;
}

int mem_receiver_wait(struct mem_receiver *r, struct error *err)
{
	int code;

	mem_yield_end(&r->yield);
	pthread_mutex_lock(&r->lock);
	while (r->done < r->opt.nstreams && !error_is_set(&r->failure))
		pthread_cond_wait(&r->changed, &r->lock);
	code = r->failure.code;
	if (code)
		error_copy(err, &r->failure);
	pthread_mutex_unlock(&r->lock);
	return code;
}

uint64_t *mem_receiver_take_later(struct mem_receiver *r)
{
	uint64_t npages = r->opt.space.npages;

	return r->later && bitmap_next_set(r->later, npages, 0) < npages ? steal_ptr(r->later) : NULL;
}

void mem_receiver_stats(struct mem_receiver *r, struct mem_stats *out)
{
	*out = (struct mem_stats){
		.round = atomic_load(&r->round),
		.sent_pages = atomic_load(&r->data_pages),
		.zero_pages = atomic_load(&r->zero_pages),
		.hole_pages = atomic_load(&r->hole_pages),
	};
	for (unsigned i = 0; i < r->opt.nstreams; i++)
		out->wire_bytes += conn_bytes_received(r->streams[i]);
}

void mem_receiver_free(struct mem_receiver *r)
{
	if (!r)
		return;
	mem_yield_end(&r->yield);
	pthread_mutex_lock(&r->lock);
	r->stopping = true;
	pthread_cond_broadcast(&r->changed);
	pthread_mutex_unlock(&r->lock);
	for (unsigned i = 0; i < r->opt.nstreams; i++)
		conn_shutdown(r->streams[i]);
	for (unsigned i = 0; i < r->opt.nstreams; i++) {
		struct mem_rx *rx = &r->rx[i];

		if (rx->started)
			pthread_join(rx->thread, NULL);
		mem_rx_release(rx);
	}
	free(r->written);
	free(r->later);
	mem_yield_destroy(&r->yield);
	pthread_cond_destroy(&r->changed);
	pthread_mutex_destroy(&r->lock);
	free(r);
}
