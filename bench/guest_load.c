/* SPDX-License-Identifier: Apache-2.0 */
#include "bench/guest_load.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"

#define SAMPLES_MAX (16u << 20) /* then latencies are no longer kept; 64 MiB, touched as used */

struct slot {
	struct guest_load *load;
	struct block_request req;
	struct iovec iov;
	uint8_t *buf;
	uint64_t since_ns, random;
	unsigned number;
};

struct guest_load {
	struct block *disk;
	uint32_t write_bytes;
	uint64_t nblocks; /* a slot's own share of the disk: every depth-th block */
	unsigned depth;
	uint64_t begin_ns, end_ns;

	pthread_mutex_t lock; /* what follows */
	pthread_cond_t idle;
	bool stopping;
	unsigned inflight;
	int error;
	uint64_t writes;
	uint32_t *samples; /* nanoseconds */
	uint32_t nsamples;
	struct slot slots[];
};

/* xorshift64 */
static uint64_t next_random(struct slot *s)
{
	uint64_t x = s->random;
	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	return s->random = x;
}

static void slot_leave(struct slot *s, int result)
{
	struct guest_load *load = s->load;
	pthread_mutex_lock(&load->lock);
	if (result < 0 && !load->error)
		load->error = result;
	if (--load->inflight == 0)
		pthread_cond_broadcast(&load->idle);
	pthread_mutex_unlock(&load->lock);
}

static void write_done(struct block_request *req, int result);

static void slot_write(struct slot *s)
{
	struct guest_load *load = s->load;
	uint64_t r = next_random(s);
	memcpy(s->buf, &r, sizeof r); /* no write repeats what is there */
	s->iov = (struct iovec){.iov_base = s->buf, .iov_len = load->write_bytes};
	s->req = (struct block_request){.op = BLOCK_WRITE,
					.offset_bytes = (r % load->nblocks * load->depth + s->number) *
							load->write_bytes,
					.len_bytes = load->write_bytes,
					.iov = &s->iov,
					.niov = 1,
					.done = write_done,
					.opaque = s};
	s->since_ns = clock_now_ns();
	int rc = block_submit(load->disk, &s->req);
	if (rc)
		slot_leave(s, rc);
}

static void write_done(struct block_request *req, int result)
{
	struct slot *s = req->opaque;
	struct guest_load *load = s->load;
	uint64_t took = clock_now_ns() - s->since_ns;
	pthread_mutex_lock(&load->lock);
	if (result == 0) {
		load->writes++;
		if (load->nsamples < SAMPLES_MAX)
			load->samples[load->nsamples++] = took < UINT32_MAX ? (uint32_t)took : UINT32_MAX;
	}
	bool go_on = result == 0 && !load->stopping;
	pthread_mutex_unlock(&load->lock);
	if (go_on)
		slot_write(s);
	else
		slot_leave(s, result);
}

int guest_load_start(struct block *disk, unsigned depth, uint32_t write_bytes, struct guest_load **out,
		     struct error *err)
{
	uint64_t nblocks = depth && write_bytes ? disk->size_bytes / write_bytes / depth : 0;
	if (!nblocks)
		return error_set(err, EINVAL, "load: %u writes of %u bytes do not fit the disk", depth,
				 write_bytes);
	struct guest_load *load = calloc(1, sizeof *load + depth * sizeof load->slots[0]);
	if (!load)
		return error_errno(err, ENOMEM, "load");
	load->disk = disk;
	load->write_bytes = write_bytes;
	load->nblocks = nblocks;
	load->depth = depth;
	pthread_mutex_init(&load->lock, NULL);
	pthread_cond_init(&load->idle, NULL);
	load->samples = malloc(SAMPLES_MAX * sizeof load->samples[0]);
	bool complete = load->samples != NULL;
	for (unsigned i = 0; i < depth && complete; i++) {
		struct slot *s = &load->slots[i];
		void *mem = NULL;
		s->load = load;
		s->number = i;
		s->random = UINT64_C(0x9e3779b97f4a7c15) * (i + 1);
		if (posix_memalign(&mem, 4096, write_bytes)) {
			complete = false;
			break;
		}
		s->buf = mem;
		for (uint32_t at = 0; at + 8 <= write_bytes; at += 8) {
			uint64_t r = next_random(s);
			memcpy(s->buf + at, &r, sizeof r);
		}
	}
	if (!complete) {
		guest_load_free(load);
		return error_errno(err, ENOMEM, "load");
	}
	load->inflight = depth;
	load->begin_ns = clock_now_ns();
	for (unsigned i = 0; i < depth; i++)
		slot_write(&load->slots[i]);
	*out = load;
	return 0;
}

int guest_load_stop(struct guest_load *load)
{
	pthread_mutex_lock(&load->lock);
	load->stopping = true;
	while (load->inflight)
		pthread_cond_wait(&load->idle, &load->lock);
	if (!load->end_ns)
		load->end_ns = clock_now_ns();
	int rc = load->error;
	pthread_mutex_unlock(&load->lock);
	return rc;
}

static int compare_samples(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
	return (x > y) - (x < y);
}

void guest_load_result(struct guest_load *load, struct guest_load_result *out)
{
	uint32_t n = load->nsamples;
	*out = (struct guest_load_result){.writes = load->writes,
					  .bytes = load->writes * load->write_bytes,
					  .elapsed_ns = load->end_ns - load->begin_ns};
	if (!n)
		return;
	qsort(load->samples, n, sizeof load->samples[0], compare_samples);
	out->p50_ns = load->samples[n / 2];
	out->p99_ns = load->samples[(uint64_t)n * 99 / 100];
	out->max_ns = load->samples[n - 1];
}

void guest_load_free(struct guest_load *load)
{
	if (!load)
		return;
	guest_load_stop(load);
	for (unsigned i = 0; i < load->depth; i++)
		free(load->slots[i].buf);
	free(load->samples);
	pthread_cond_destroy(&load->idle);
	pthread_mutex_destroy(&load->lock);
	free(load);
}
