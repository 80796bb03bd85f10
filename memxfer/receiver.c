/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <zstd.h>

#include "base/bitmap.h"
#include "base/cleanup.h"
#include "memxfer/codec.h"

#define ERROR_SEND_MS 1000u

struct mem_rx {
	struct mem_receiver *receiver;
	unsigned index;
	pthread_t thread;
	bool started;
	uint64_t sequence, reply_sequence;
	struct mem_totals totals;
	bool past_barrier;
	uint8_t *body, *unpacked;
	struct mem_run *runs;
	ZSTD_DCtx *zstd;
};

struct mem_receiver {
	struct mem_receiver_options opt;
	struct conn *streams[MEM_STREAMS_MAX];
	struct mem_rx rx[MEM_STREAMS_MAX];
	/* Pages that this receiver wrote: for others zero is what they are already. Words are shared between
	 * streams after the barrier, hence atomic. */
	uint64_t *written;
	uint64_t *later; /* NULL: not agreed. Pages that post-copy brings; likewise */
	atomic_bool any_later;
	_Atomic uint64_t data_pages, zero_pages, hole_pages;
	_Atomic unsigned round;

	pthread_mutex_t lock;
	pthread_cond_t changed;
	unsigned at_barrier, done;
	bool stopping;
	struct error failure; /* the first */
};

static void mark_written(struct mem_receiver *r, uint64_t first, uint64_t npages)
{
	uint64_t end = first + npages;

	for (uint64_t w = first / 64; w * 64 < end; w++) {
		uint64_t mask = ~UINT64_C(0);

		if (w == first / 64)
			mask &= ~UINT64_C(0) << (first % 64);
		if (w == end / 64)
			mask &= ~(~UINT64_C(0) << (end % 64));
		if ((__atomic_load_n(&r->written[w], __ATOMIC_RELAXED) & mask) != mask)
			__atomic_fetch_or(&r->written[w], mask, __ATOMIC_RELAXED);
	}
}

static bool is_written(const struct mem_receiver *r, uint64_t page)
{
	return __atomic_load_n(&r->written[page / 64], __ATOMIC_RELAXED) >> (page % 64) & 1;
}

/* Zeroes, or for a hole frees, the pages of a run that were written before; the others are left alone. */
static int clear_run(struct mem_receiver *r, const struct mem_run *run, struct error *err)
{
	uint64_t end = run->first + run->npages;

	for (uint64_t page = run->first, first; page < end;) {
		uint8_t *at;

		if (!__atomic_load_n(&r->written[page / 64], __ATOMIC_RELAXED)) {
			page = (page / 64 + 1) * 64;
			continue;
		}
		if (!is_written(r, page)) {
			page++;
			continue;
		}
		for (first = page; page < end && is_written(r, page); page++) {
			if (run->kind == MEM_RUN_HOLE)
				__atomic_fetch_and(&r->written[page / 64], ~(UINT64_C(1) << (page % 64)),
						   __ATOMIC_RELAXED);
		}
		at = r->opt.space.base + first * MEM_PAGE_BYTES;
		if (run->kind == MEM_RUN_ZERO)
			memset(at, 0, (page - first) * MEM_PAGE_BYTES);
		else if (fallocate(r->opt.space.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
				   (off_t)(first * MEM_PAGE_BYTES),
				   (off_t)((page - first) * MEM_PAGE_BYTES)) < 0)
			return error_errno(err, errno, "guest memory: freeing %llu pages at page %llu",
					   (unsigned long long)(page - first), (unsigned long long)first);
	}
	return 0;
}

/* What came of these pages is void: the guest must fault on each. */
static int expect_later(struct mem_receiver *r, const struct mem_run *run, struct error *err)
{
	uint64_t end = run->first + run->npages;

	if (!r->later)
		return error_set(err, EPROTO,
				 "memory frame: pages that are to come later, which was not agreed");
	if (fallocate(r->opt.space.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
		      (off_t)(run->first * MEM_PAGE_BYTES), (off_t)(run->npages * MEM_PAGE_BYTES)) < 0)
		return error_errno(err, errno, "guest memory: freeing %u pages at page %llu", run->npages,
				   (unsigned long long)run->first);
	for (uint64_t page = run->first; page < end; page++)
		bitmap_set_atomic(r->later, page);
	atomic_store(&r->any_later, true);
	return 0;
}

/* They have come after all. */
static void forget_later(struct mem_receiver *r, const struct mem_run *run)
{
	uint64_t end = run->first + run->npages;

	for (uint64_t page = run->first; page < end && atomic_load(&r->any_later); page++)
		__atomic_fetch_and(&r->later[page / 64], ~(UINT64_C(1) << (page % 64)), __ATOMIC_RELAXED);
}

/* The runs were validated as a whole. */
static int apply(struct mem_rx *rx, const struct mem_header *h, const uint8_t *data, struct error *err)
{
	struct mem_receiver *r = rx->receiver;

	for (uint32_t i = 0; i < h->nruns; i++) {
		const struct mem_run *run = &rx->runs[i];
		int ret = 0;

		if (run->kind != MEM_RUN_LATER)
			forget_later(r, run);
		switch (run->kind) {
		case MEM_RUN_DATA:
			memcpy(r->opt.space.base + run->first * MEM_PAGE_BYTES, data,
			       (size_t)run->npages * MEM_PAGE_BYTES);
			data += (size_t)run->npages * MEM_PAGE_BYTES;
			mark_written(r, run->first, run->npages);
			rx->totals.data_pages += run->npages;
			atomic_fetch_add_explicit(&r->data_pages, run->npages, memory_order_relaxed);
			break;
		case MEM_RUN_ZERO:
			ret = clear_run(r, run, err);
			rx->totals.zero_pages += run->npages;
			atomic_fetch_add_explicit(&r->zero_pages, run->npages, memory_order_relaxed);
			break;
		case MEM_RUN_LATER:
			ret = expect_later(r, run, err);
			break;
		default:
			ret = clear_run(r, run, err);
			rx->totals.hole_pages += run->npages;
			atomic_fetch_add_explicit(&r->hole_pages, run->npages, memory_order_relaxed);
		}
		if (ret < 0)
			return ret;
	}
	return 0;
}

static int receive_pages(struct mem_rx *rx, const struct mem_header *h, struct error *err)
{
	struct mem_receiver *r = rx->receiver;
	const uint8_t *data = rx->body + (size_t)h->nruns * MEM_RUN_BYTES;
	int ret;

	if (!(h->flags & MEM_FLAG_FINAL) != !rx->past_barrier)
		return error_set(err, EPROTO, "memory frame: %s the barrier",
				 rx->past_barrier ? "one that belongs before"
						  : "one of the final round, but before");
	ret = mem_runs_decode(h, rx->body, r->opt.space.npages, r->opt.nstreams, rx->runs, err);
	if (ret < 0)
		return ret;
	if (h->flags & MEM_FLAG_ZSTD) {
		size_t n = ZSTD_decompressDCtx(rx->zstd, rx->unpacked, h->raw_len, data, h->wire_len);

		if (ZSTD_isError(n))
			return error_set(err, EPROTO, "memory frame: unpacking: %s", ZSTD_getErrorName(n));
		if (n != h->raw_len)
			return error_set(err, EPROTO, "memory frame: unpacks to %zu bytes, not to %u", n,
					 h->raw_len);
		data = rx->unpacked;
	}
	atomic_store_explicit(&r->round, h->round, memory_order_relaxed);
	return apply(rx, h, data, err);
}

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

	mem_totals_decode(rx->body, &sent);
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

/* One frame with its body, checked but for its meaning. */
static int read_frame(struct mem_rx *rx, struct mem_header *h, struct error *err)
{
	struct mem_receiver *r = rx->receiver;
	struct conn *conn = r->streams[rx->index];
	size_t runs_len;
	uint8_t raw[MEM_HEADER_BYTES];
	int ret = conn_read_full(conn, raw, sizeof raw, r->opt.timeout_ms, err);

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
	ret = conn_read_full(conn, rx->body, mem_body_bytes(h), r->opt.timeout_ms, err);
	if (ret == -ENODATA)
		return error_set(err, ECONNRESET, "the source closed the stream in the middle of a frame");
	if (ret < 0)
		return ret;
	runs_len = (size_t)h->nruns * MEM_RUN_BYTES;
	if (mem_body_sum(rx->body, runs_len, rx->body + runs_len, h->wire_len) != h->body_sum)
		return error_set(err, EBADMSG, "memory frame %s, number %llu: checksum does not match",
				 mem_frame_name(h->type), (unsigned long long)h->sequence);
	return 0;
}

/* 1 at the stream's end. */
static int receive_frame(struct mem_rx *rx, struct error *err)
{
	struct mem_header h;
	int ret = read_frame(rx, &h, err);

	if (ret < 0)
		return ret;
	switch (h.type) {
	case MEM_FRAME_PAGES:
		ret = receive_pages(rx, &h, err);
		break;
	case MEM_FRAME_BEAT:
		ret = reply(rx, MEM_FRAME_BEAT, "", rx->receiver->opt.timeout_ms, err);
		break;
	case MEM_FRAME_BARRIER:
		ret = pass_barrier(rx, err);
		break;
	case MEM_FRAME_END: /* the source's count of frames is from before this one */
		ret = finish_stream(rx, err);
		return ret < 0 ? ret : 1;
	default:
		return error_set(err, EPROTO, "memory frame %s is not the source's to send",
				 mem_frame_name(h.type));
	}
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

	do {
		ret = receive_frame(rx, &err);
	} while (ret == 0);
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
	rx->body = malloc(MEM_BODY_MAX);
	rx->unpacked = malloc(MEM_PAYLOAD_MAX);
	rx->runs = malloc(MEM_FRAME_RUNS_MAX * sizeof *rx->runs);
	rx->zstd = ZSTD_createDCtx();
	if (!rx->body || !rx->unpacked || !rx->runs || !rx->zstd)
		return error_errno(err, ENOMEM, "memory stream %u", i);
	return 0;
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
		free(rx->body);
		free(rx->unpacked);
		free(rx->runs);
		ZSTD_freeDCtx(rx->zstd);
	}
	free(r->written);
	free(r->later);
	pthread_cond_destroy(&r->changed);
	pthread_mutex_destroy(&r->lock);
	free(r);
}
