/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The pass: a thread that takes chunk after chunk from unsynced over copying to synced.
 *
 * A job holds a chunk's range and goes through it piece by piece; completions only queue the job for the
 * thread, which tests for zeroes and sends. How many pieces the remote has at a time follows the delay that
 * they cause: a guest's mirrored write queues behind them, so the window shrinks when a whole window of
 * replies took a good part of the grace longer than the fastest one seen, and grows while they do not. (A
 * queue on the way delays all of them; a busy host delays some.) While the guest writes and the link is
 * short, the window is as small as keeps both disks at work.
 */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "base/bitmap.h"
#include "base/bytes.h"
#include "base/clock.h"
#include "base/cond.h"
#include "base/confine.h"
#include "base/fault.h"
#include "base/huge.h"
#include "base/log.h"
#include "mirror/mirror_impl.h"

#define BANDWIDTH_LOOK_NS UINT64_C(100000000) /* so often a changed bandwidth is seen */
/* One chunk, and what a limited bandwidth carries in this part of a second, may wait for it. */
#define HELD_FRACTION 20
#define PROBE_BYTES   4096u
#define SCAN_QUERIES  16 /* of MIRROR_EXTENTS_PER_QUERY extents, then the rest is left to the jobs */
/* Chunks that are read, or wait for the window, beyond those that the remote has. */
#define READ_AHEAD 4
/* A guest that changed its disk so recently is in the midst of it. */
#define GUEST_BUSY_NS UINT64_C(20000000)
/* Then the remote gets so many pieces at a time, and so many more are read. But not where even a piece alone
 * takes long: a few would leave a long link empty, and the guest waits for its round trip anyway. */
#define YIELD_WINDOW	 2
#define YIELD_READ_AHEAD 1
/* A guest with so many requests under way waits for its own more than for a piece: it lets the copy have so
 * many. */
#define DEEP_GUEST	  8
#define DEEP_YIELD_WINDOW 8
#define YIELD_LATENCY_NS  UINT64_C(2000000)

static void queue_push(struct copy_queue *q, struct copy_job *job)
{
	job->next = NULL;
	*q->tail = job;
	q->tail = &job->next;
}

static struct copy_job *queue_pop(struct copy_queue *q)
{
	struct copy_job *job = q->first;
	if (job && !(q->first = job->next))
		q->tail = &q->first;
	return job;
}

/* mirror->lock held for those that follow. */
void copy_wake(struct session *s)
{
	pthread_cond_signal(&s->copy_wake);
}

static void push_event(struct copy_job *job, enum copy_state state)
{
	job->state = state;
	queue_push(&job->session->events, job);
	copy_wake(job->session);
}

void copy_granted(struct copy_job *job)
{
	job->ordered = true;
	if (remote_order_enter(job->session, &job->range, &job->order))
		copy_ordered(job);
}

void copy_ordered(struct copy_job *job)
{
	struct session *s = job->session;
	job->untouched = !bitmap_test(s->m->map->touched, job->chunk);
	push_event(job, COPY_GRANTED);
}

static void release_chunk(struct copy_job *job, bool synced, struct mirror_work *work)
{
	struct mirror *m = job->session->m;
	if (!job->holds)
		return;
	job->holds = false;
	bitmap_clear(m->map->copying, job->chunk);
	if (synced)
		chunk_map_set_synced(m->map, job->chunk);
	if (job->ordered)
		remote_order_remove(job->session, &job->order, work);
	job->ordered = false;
	mirror_granted(m, range_lock_remove(&m->ranges, &job->range), work);
}

void copy_abandon(struct session *s, struct mirror_work *work)
{
	for (unsigned i = 0; i < s->njobs; i++)
		release_chunk(&s->jobs[i], false, work);
}

/* The guest writes, and would notice. Where the link does not carry even what the guest has queued for it,
 * that waits for the link whatever the copy does: the copy gets its share. */
static bool yields(const struct session *s)
{
	return !s->unsent && s->yield != MIRROR_YIELD_NOTHING && s->min_latency_ns < YIELD_LATENCY_NS &&
	       clock_now_ns() - s->guest_ns < GUEST_BUSY_NS;
}

void copy_guest_writes(struct session *s)
{
	unsigned held =
		s->m->ranges.total; /* the copy's and the guest's; the guest's new one is among them */
	unsigned depth = held > s->active ? held - s->active : 1;
	s->guest_ns = clock_now_ns();
	s->guest_depth_x16 += depth - s->guest_depth_x16 / 16;
}

static unsigned window(const struct session *s)
{
	bool deep = s->yield == MIRROR_YIELD_BALANCED && s->guest_depth_x16 >= DEEP_GUEST * 16;
	unsigned most = deep ? DEEP_YIELD_WINDOW : YIELD_WINDOW;
	return s->limit > most && yields(s) ? most : s->limit;
}

static unsigned chunks_allowed(const struct session *s)
{
	if (!s->first_copied)
		return 1;
	return yields(s) ? window(s) + YIELD_READ_AHEAD : s->limit + READ_AHEAD;
}

static void widen_window(struct session *s)
{
	s->bad = 0;
	if (++s->good >= s->limit && s->limit < s->njobs) {
		s->limit++;
		s->good = 0;
	}
}

/*
 * Latency of a full piece moves the window; but no guest waits for it while a session is buffered. A shorter
 * one can only widen it, or a fragmented image would be copied piece after piece: a full one in its place
 * would have taken longer by their ratio at the most.
 */
static void adapt_window(struct session *s, uint64_t len_bytes, uint64_t latency_ns)
{
	if (len_bytes >= s->piece_bytes && (!s->min_latency_ns || latency_ns < s->min_latency_ns))
		s->min_latency_ns = latency_ns;
	if (s->buffered && !s->synchronous) {
		widen_window(s);
		return;
	}
	if (len_bytes < s->piece_bytes) {
		if (latency_ns / len_bytes * s->piece_bytes <= s->grace_ns / 4)
			widen_window(s);
		return;
	}
	if (latency_ns - s->min_latency_ns <= s->grace_ns / 4) {
		widen_window(s);
		return;
	}
	s->good = 0;
	if (++s->bad >= s->limit && s->limit > 1) {
		s->limit /= 2;
		s->bad = 0;
	}
}

static void copy_arrived(struct remote_piece *piece, int result, struct mirror_work *work)
{
	struct copy_job *job = piece->owner;
	struct session *s = job->session;
	struct mirror_stats *st = &s->m->stats;
	bool data = piece->req.op == BLOCK_WRITE;
	s->writing--;
	if (result < 0 && s->stopping)
		return;
	if (result < 0) {
		session_fail(s, result, work, "copy: %s of %llu bytes at %llu",
			     data ? "write" : "write-zeroes", (unsigned long long)piece->req.len_bytes,
			     (unsigned long long)piece->req.offset_bytes);
		return;
	}
	*(data ? &st->data_bytes_copied : &st->zero_bytes_copied) += piece->req.len_bytes;
	if (data)
		adapt_window(s, piece->req.len_bytes, clock_now_ns() - piece->sent_ns);
	s->copied_since = true;
	push_event(job, COPY_ANSWERED);
}

static void read_done(struct block_request *req, int result)
{
	struct copy_job *job = req->opaque;
	struct session *s = job->session;
	struct mirror *m = s->m;
	pthread_mutex_lock(&m->lock);
	s->reading--;
	job->result = result;
	push_event(job, COPY_READ);
	pthread_mutex_unlock(&m->lock);
}

/* --- steps of a job: the copying thread, no lock held --- */

static void fail_locally(struct session *s, int code, const char *what, uint64_t offset)
{
	struct mirror_work work;
	mirror_work_init(&work);
	pthread_mutex_lock(&s->m->lock);
	session_fail(s, code, &work, "%s at %llu", what, (unsigned long long)offset);
	pthread_mutex_unlock(&s->m->lock);
	mirror_work_run(s->m, &work);
}

/* The first sector that cannot be read of a piece that could not. */
static uint64_t bad_sector(struct copy_job *job)
{
	struct session *s = job->session;
	uint64_t len = s->align > PROBE_BYTES ? s->align : PROBE_BYTES;
	for (uint64_t at = 0; at < job->piece_bytes; at += len) {
		uint64_t n = job->piece_bytes - at < len ? job->piece_bytes - at : len;
		if (block_pread(s->m->local, job->buf, n, job->cursor + at))
			return (job->cursor + at) / MIRROR_SECTOR_BYTES;
	}
	return job->cursor / MIRROR_SECTOR_BYTES; /* it can now */
}

static void local_read_failed(struct copy_job *job)
{
	struct session *s = job->session;
	uint64_t sector = bad_sector(job);
	struct mirror_work work;
	mirror_work_init(&work);
	pthread_mutex_lock(&s->m->lock);
	if (!s->failed)
		s->m->stats.local_failed = true;
	session_fail(s, job->result, &work, "read of the local disk at byte %llu (sector %llu)",
		     (unsigned long long)(sector * MIRROR_SECTOR_BYTES), (unsigned long long)sector);
	pthread_mutex_unlock(&s->m->lock);
	mirror_work_run(s->m, &work);
}

static void queue_to_send(struct copy_job *job, enum block_op op, unsigned flags)
{
	struct session *s = job->session;
	job->piece.owner = job;
	job->piece.arrived = copy_arrived;
	job->piece.req = (struct block_request){
		.op = op, .flags = flags, .offset_bytes = job->cursor, .len_bytes = job->piece_bytes};
	if (op == BLOCK_WRITE) {
		job->piece.iov = (struct iovec){.iov_base = job->buf, .iov_len = job->piece_bytes};
		job->piece.req.iov = &job->piece.iov;
		job->piece.req.niov = 1;
	}
	pthread_mutex_lock(&s->m->lock);
	job->state = COPY_QUEUED;
	queue_push(&s->queued, job);
	pthread_mutex_unlock(&s->m->lock);
}

static void read_piece(struct copy_job *job)
{
	struct session *s = job->session;
	job->read_iov = (struct iovec){.iov_base = job->buf, .iov_len = job->piece_bytes};
	job->read = (struct block_request){.op = BLOCK_READ,
					   .offset_bytes = job->cursor,
					   .len_bytes = job->piece_bytes,
					   .iov = &job->read_iov,
					   .niov = 1,
					   .done = read_done,
					   .opaque = job};
	pthread_mutex_lock(&s->m->lock);
	job->state = COPY_READING;
	s->reading++;
	pthread_mutex_unlock(&s->m->lock);
	int rc = block_submit(s->m->local, &job->read);
	if (rc)
		read_done(&job->read, rc);
}

/* Nothing else is under way in the pass: a test may hold it here. */
static void first_chunk_copied(struct session *s)
{
	s->first_copied = true;
	if (fault_point("in-copy"))
		fail_locally(s, EIO, "fault point in-copy", 0);
}

static void finish_chunk(struct copy_job *job)
{
	struct session *s = job->session;
	struct mirror *m = s->m;
	struct mirror_work work;
	mirror_work_init(&work);
	pthread_mutex_lock(&m->lock);
	release_chunk(job, true, &work);
	job->state = COPY_IDLE;
	s->active--;
	pthread_mutex_unlock(&m->lock);
	mirror_work_run(m, &work);
	if (!s->first_copied)
		first_chunk_copied(s);
}

/* The extent at the cursor, of a length that both disks' alignment allows. */
static int next_extent(struct copy_job *job, struct block_extent *out, struct error *err)
{
	struct session *s = job->session;
	while (!job->extent_left) {
		if (job->extent == job->nextents) {
			job->nextents = MIRROR_EXTENTS_PER_QUERY;
			job->extent = 0;
			int rc = block_extents(s->m->local, job->cursor, job->end - job->cursor, job->extents,
					       &job->nextents, err);
			if (rc)
				return rc;
			if (!job->nextents)
				return error_set(err, EIO, "%s: no extent", s->m->top.label);
		}
		job->extent_left = job->extents[job->extent++].len_bytes;
	}
	*out = job->extents[job->extent - 1];
	out->len_bytes = job->extent_left;
	if (out->len_bytes > job->end - job->cursor)
		out->len_bytes = job->end - job->cursor;
	uint64_t odd = out->len_bytes % s->align;
	if (out->len_bytes > odd) {
		out->len_bytes -= odd;
	} else {
		/* A block that is partly hole is data; what follows it is asked for again. */
		*out = (struct block_extent){.len_bytes = s->align};
		job->extent_left = s->align;
		job->extent = job->nextents;
	}
	return 0;
}

static void advance(struct copy_job *job, uint64_t len)
{
	job->cursor += len;
	job->extent_left -= len < job->extent_left ? len : job->extent_left;
}

/* What an untouched remote reads as already. */
static bool is_there(const struct session *s, const struct block_extent *x)
{
	return s->remote_has_backing ? x->backing : s->remote_is_zero && x->hole;
}

static void next_piece(struct copy_job *job)
{
	struct session *s = job->session;
	while (job->cursor < job->end) {
		struct block_extent x = {0};
		struct error err = ERROR_INIT;
		int rc = next_extent(job, &x, &err);
		if (rc) {
			log_warn("%s", err.message);
			fail_locally(s, rc, "copy: extents", job->cursor);
			return;
		}
		if (job->untouched && is_there(s, &x)) {
			pthread_mutex_lock(&s->m->lock);
			s->m->stats.hole_bytes_skipped += x.len_bytes;
			pthread_mutex_unlock(&s->m->lock);
			advance(job, x.len_bytes);
			continue;
		}
		bool zero = x.hole || x.zero;
		uint64_t max = s->piece_bytes;
		if (zero) {
			max = s->remote->limits.max_zeroes_bytes;
			max = max && max < MIRROR_ZERO_PIECE_BYTES ? max - max % s->align
								   : MIRROR_ZERO_PIECE_BYTES;
		}
		job->piece_bytes = x.len_bytes < max ? x.len_bytes : max;
		if (zero) /* what is allocated there stays so here */
			queue_to_send(job, BLOCK_WRITE_ZEROES, x.hole ? BLOCK_REQ_MAY_UNMAP : 0);
		else
			read_piece(job);
		return;
	}
	finish_chunk(job);
}

static void step(struct copy_job *job, enum copy_state state)
{
	switch (state) {
	case COPY_GRANTED:
		next_piece(job);
		break;
	case COPY_READ:
		if (job->result < 0)
			local_read_failed(job);
		else if (bytes_all_zero(job->buf, job->piece_bytes))
			queue_to_send(job, BLOCK_WRITE_ZEROES, BLOCK_REQ_MAY_UNMAP);
		else
			queue_to_send(job, BLOCK_WRITE, 0);
		break;
	case COPY_ANSWERED:
		advance(job, job->piece_bytes);
		next_piece(job);
		break;
	default:
		break;
	}
}

/* --- what the thread decides; mirror->lock held --- */

static bool quit(const struct session *s)
{
	return s->failed || s->stopping || s->cancelled;
}

static void send_next(struct session *s)
{
	struct copy_job *job = queue_pop(&s->queued);
	job->state = COPY_SENT;
	s->writing++;
	rate_limit_take(s->bandwidth, remote_piece_wire_bytes(&job->piece));
	chunk_map_touch(s->m->map, job->range.offset_bytes, job->range.len_bytes);
	s->copied_since = true;
	remote_piece_register(s, &job->piece);
	pthread_mutex_unlock(&s->m->lock);
	remote_piece_send(&job->piece);
	pthread_mutex_lock(&s->m->lock);
}

static void start_chunk(struct session *s, uint64_t chunk)
{
	struct mirror *m = s->m;
	struct copy_job *job = s->jobs;
	while (job->state != COPY_IDLE)
		job++;
	s->cursor = chunk + 1;
	s->active++;
	bitmap_set(m->map->copying, chunk);
	job->holds = true;
	job->chunk = chunk;
	job->cursor = chunk << m->map->shift;
	job->end = job->cursor + chunk_map_len(m->map, chunk);
	job->nextents = job->extent = 0;
	job->extent_left = 0;
	job->range = (struct range_entry){
		.offset_bytes = job->cursor, .len_bytes = job->end - job->cursor, .tag = RANGE_OF_COPY};
	job->state = COPY_WAITING;
	if (range_lock_add(&m->ranges, &job->range))
		copy_granted(job);
}

/* Marks chunks within [at, at+len) of a hole that nobody wrote since the scan began. */
static void skip_hole(struct session *s, uint64_t at, uint64_t len)
{
	struct chunk_map *map = s->m->map;
	uint64_t first = (at + map->chunk_bytes - 1) >> map->shift;
	for (uint64_t c = first; c < map->scan_first + map->scan_n; c++) {
		if ((c << map->shift) + chunk_map_len(map, c) > at + len)
			break;
		if (bitmap_test(map->scan_dirty, c - map->scan_first) || bitmap_test(map->synced, c))
			continue;
		chunk_map_set_synced(map, c);
		s->m->stats.hole_bytes_skipped += chunk_map_len(map, c);
	}
}

/*
 * Looks for chunks that are holes, many at a time and without holding up the guest: chunks with a change in
 * flight, and those that the guest changes meanwhile, are left to the jobs. Returns with s->scanned further
 * on.
 */
static void scan_holes(struct session *s, uint64_t from)
{
	struct mirror *m = s->m;
	struct chunk_map *map = m->map;
	map->scan_first = from;
	map->scan_n = map->nchunks - from < MIRROR_SCAN_CHUNKS ? map->nchunks - from : MIRROR_SCAN_CHUNKS;
	memset(map->scan_dirty, 0, sizeof map->scan_dirty);
	for (uint64_t i = 0; i < map->scan_n; i++)
		if (bitmap_test(map->touched, from + i) || bitmap_test(map->copying, from + i))
			bitmap_set(map->scan_dirty, i);
	for (const struct range_entry *e = m->ranges.first; e; e = e->next)
		chunk_map_mark_scan(map, e->offset_bytes, e->len_bytes);
	uint64_t at = from << map->shift, end = at + (map->scan_n << map->shift);
	if (end > map->size_bytes)
		end = map->size_bytes;
	for (unsigned q = 0; q < SCAN_QUERIES && at < end && !quit(s); q++) {
		struct block_extent x[MIRROR_EXTENTS_PER_QUERY];
		unsigned n = MIRROR_EXTENTS_PER_QUERY;
		pthread_mutex_unlock(&m->lock);
		int rc = block_extents(m->local, at, end - at, x, &n, NULL);
		pthread_mutex_lock(&m->lock);
		if (rc || !n)
			break; /* a job meets the error */
		for (unsigned i = 0; i < n && at < end; i++) {
			if (is_there(s, &x[i]))
				skip_hole(s, at, x[i].len_bytes);
			at += x[i].len_bytes;
		}
	}
	map->scan_n = 0;
	/* At least one, that the pass goes on. */
	s->scanned = at < end ? at >> map->shift : (end + map->chunk_bytes - 1) >> map->shift;
	if (s->scanned <= from)
		s->scanned = from + 1;
}

/* A chunk that waits for the bandwidth is held, and a guest's write to it waits as well. */
static bool enough_waits(const struct session *s)
{
	uint64_t rate = s->bandwidth ? rate_limit_get(s->bandwidth) : 0;
	return rate && s->active - s->writing > rate / HELD_FRACTION / s->m->map->chunk_bytes;
}

/* True if something was begun. */
static bool begin_chunk(struct session *s)
{
	uint64_t chunk;
	if (s->active >= s->njobs || s->active >= chunks_allowed(s) || enough_waits(s))
		return false;
	if (!chunk_map_next_unsynced(s->m->map, s->cursor, &chunk))
		return false;
	if ((s->remote_is_zero || s->remote_has_backing) && chunk >= s->scanned) {
		scan_holes(s, chunk);
		return true;
	}
	start_chunk(s, chunk);
	return true;
}

static void announce(struct session *s)
{
	if (!s->announced) {
		s->announced = true;
		log_info("%s: mirror: all %llu bytes are synced", s->m->top.label,
			 (unsigned long long)s->m->map->size_bytes);
	}
	pthread_cond_broadcast(&s->m->changed);
}

static void wait_for_work(struct session *s, uint64_t bandwidth_ns)
{
	if (!bandwidth_ns) {
		pthread_cond_wait(&s->copy_wake, &s->m->lock);
		return;
	}
	uint64_t at = clock_now_ns() + (bandwidth_ns < BANDWIDTH_LOOK_NS ? bandwidth_ns : BANDWIDTH_LOOK_NS);
	struct timespec until = clock_timespec(at);
	pthread_cond_timedwait(&s->copy_wake, &s->m->lock, &until);
}

static void run_pass(struct session *s)
{
	struct mirror *m = s->m;
	while (!quit(s)) {
		uint64_t wait_ns = 0;
		struct copy_job *job = queue_pop(&s->events);
		if (job) {
			enum copy_state state = job->state;
			pthread_mutex_unlock(&m->lock);
			step(job, state);
			pthread_mutex_lock(&m->lock);
		} else if (s->queued.first && s->writing < window(s) &&
			   !(wait_ns = rate_limit_wait_ns(s->bandwidth))) {
			send_next(s);
		} else if (!begin_chunk(s)) {
			bool finished = chunk_map_all_synced(m->map) && !s->active;
			if (finished && !s->first_copied) { /* nothing but holes */
				pthread_mutex_unlock(&m->lock);
				first_chunk_copied(s);
				pthread_mutex_lock(&m->lock);
				continue;
			}
			if (finished)
				announce(s);
			wait_for_work(s, wait_ns);
		}
	}
}

static void *copy_main(void *arg)
{
	struct session *s = arg;
	struct mirror *m = s->m;
	struct mirror_work work;
	mirror_work_init(&work);
	pthread_setname_np(pthread_self(), "mirror-copy");
	confine_self(CONFINE_MIRROR);
	pthread_mutex_lock(&m->lock);
	while (!s->go)
		pthread_cond_wait(&s->copy_wake, &m->lock);
	/* Changes that passed through before the session was there hold no range. */
	while (m->passing && !quit(s))
		pthread_cond_wait(&m->changed, &m->lock);
	while (s->held && !quit(s))
		pthread_cond_wait(&s->copy_wake, &m->lock);
	run_pass(s);
	copy_abandon(s, &work);
	while (s->reading)
		pthread_cond_wait(&s->copy_wake, &m->lock);
	pthread_mutex_unlock(&m->lock);
	mirror_work_run(m, &work);
	return NULL;
}

int copy_create(struct session *s, unsigned requests, struct error *err)
{
	s->events.tail = &s->events.first;
	s->queued.tail = &s->queued.first;
	s->limit = 1;
	cond_init_monotonic(&s->copy_wake);
	s->jobs = calloc(requests, sizeof *s->jobs);
	s->copy_buffers_bytes = (size_t)requests * s->piece_bytes;
	s->copy_buffers = huge_alloc(s->copy_buffers_bytes);
	if (!s->jobs || !s->copy_buffers)
		return error_errno(err, ENOMEM, "%s: mirror", s->m->top.label);
	for (s->njobs = 0; s->njobs < requests; s->njobs++) {
		s->jobs[s->njobs].buf = s->copy_buffers + (size_t)s->njobs * s->piece_bytes;
		s->jobs[s->njobs].session = s;
	}
	sigset_t all, old;
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &old);
	int rc = pthread_create(&s->copy_thread, NULL, copy_main, s);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (rc)
		return error_errno(err, rc, "%s: mirror: thread", s->m->top.label);
	return 0;
}

void copy_free(struct session *s)
{
	huge_free(s->copy_buffers, s->copy_buffers_bytes);
	free(s->jobs);
	pthread_cond_destroy(&s->copy_wake);
}
