/* SPDX-License-Identifier: Apache-2.0 */
/*
 * NBD client: a struct block over one or more libnbd handles ("lanes"). Each lane has a thread that receives,
 * and that sends what a submitter could not: a submitter that finds the handle free hands its request to
 * libnbd itself, which sends without waiting, so that a small write needs no other thread on its way out.
 * Otherwise it appends to the lane's queue and wakes the thread. libnbd has no timeouts of its own and
 * forbids calling a handle from its callbacks: callbacks only note the result, and done() runs afterwards in
 * the lane's thread, outside any libnbd call and any lock.
 */
#include <errno.h>
#include <libnbd.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/confine.h"
#include "base/log.h"
#include "nbd/nbd.h"

#define LANES_MAX	      16
#define LANE_INFLIGHT_MAX     64 /* of libnbd */
#define TRANSFER_MAX_BYTES    (64u << 20)
#define TRANSFER_UNSAID_BYTES (32u << 20) /* where the server names no maximum */
#define ZEROES_MAX_BYTES      (UINT32_MAX & ~UINT32_C(0xffff))
#define ALIGNMENT_MAX_BYTES   65536
#define DEFAULT_TIMEOUT_MS    10000
#define GOODBYE_TIMEOUT_MS    1000
/* A lane without requests in flight looks so often whether a submitter has sent one. */
#define IDLE_LOOK_MS 1000
/* A request may wait behind others on a slow link as long as bytes move, but not longer than this many
 * timeouts. */
#define PATIENCE 10

enum job_kind { JOB_IO, JOB_EXTENTS, JOB_NOTHING };

#define EXTENTS_MAX   64 /* of one call with depths */
#define DEPTHS_MAX    64
#define DEPTH_CONTEXT "qemu:allocation-depth"

struct extents_call {
	struct block_extent *ext;
	unsigned n, max;
	uint64_t len_bytes; /* still wanted */
	/* with DEPTH_CONTEXT: where the image itself has something, and where not */
	struct {
		uint64_t len_bytes;
		bool backing;
	} depths[DEPTHS_MAX];
	unsigned ndepths;
	pthread_mutex_t lock;
	pthread_cond_t cond;
	bool done;
	int result;
};

struct job {
	struct job *next;
	struct lane *lane;
	enum job_kind kind;
	struct block_request *req;
	struct extents_call *call;
	uint64_t offset_bytes, len_bytes; /* JOB_EXTENTS */
	void *bounce;
	bool flush_after; /* FUA for a server that lacks it */
	bool finished;
	int result;
	unsigned slot;
	uint64_t issued_ms;
};

struct lane {
	struct client *client;
	pthread_t thread;
	int wake_fd;

	pthread_mutex_t io;   /* what follows; may be held when `lock` is taken */
	struct nbd_handle *h; /* NULL when dead */
	struct job *flying[LANE_INFLIGHT_MAX];
	unsigned nflying;
	struct job *completed, **completed_tail;
	uint64_t progress_ms;

	pthread_mutex_t lock; /* what follows */
	struct job *pending, **pending_tail;
	bool dead;
	bool closing;
};

struct client {
	struct block block; /* first */
	unsigned timeout_ms;
	bool can_zero, can_fast_zero, can_fua, can_flush, can_extents, can_depth;
	atomic_uint turn;
	atomic_int death; /* negative errno of the first lane that died */
	unsigned nlanes;
	struct lane lanes[];
};

static void wake(struct lane *lane)
{
	uint64_t one = 1;
	while (write(lane->wake_fd, &one, sizeof one) < 0 && errno == EINTR)
		;
}

/* Takes the job over if it returns 0. */
static int enqueue(struct lane *lane, struct job *job)
{
	job->lane = lane;
	job->next = NULL;
	SCOPE_LOCK(&lane->lock);
	if (lane->dead)
		return -ENOTCONN;
	bool first = !lane->pending;
	*lane->pending_tail = job;
	lane->pending_tail = &job->next;
	if (first)
		wake(lane);
	return 0;
}

static struct lane *next_lane(struct client *c)
{
	return &c->lanes[c->nlanes == 1 ? 0 : atomic_fetch_add(&c->turn, 1) % c->nlanes];
}

static bool needs_zero_bytes(const struct client *c, const struct block_request *req)
{
	return (req->op == BLOCK_WRITE_ZEROES || req->op == BLOCK_DISCARD) && !c->can_zero;
}

/* libnbd takes one buffer a request. */
static int prepare_buffer(struct client *c, struct job *job)
{
	struct block_request *req = job->req;
	bool transfer = req->op == BLOCK_READ || req->op == BLOCK_WRITE;
	if (needs_zero_bytes(c, req)) {
		job->bounce = calloc(1, req->len_bytes);
		return job->bounce ? 0 : -ENOMEM;
	}
	if (!transfer || req->niov == 1)
		return 0;
	job->bounce = malloc(req->len_bytes);
	if (!job->bounce)
		return -ENOMEM;
	char *p = job->bounce;
	for (int i = 0; req->op == BLOCK_WRITE && i < req->niov; i++) {
		memcpy(p, req->iov[i].iov_base, req->iov[i].iov_len);
		p += req->iov[i].iov_len;
	}
	return 0;
}

/* --- handing requests to libnbd; lane->io held --- */

static void complete_later(struct job *job)
{
	struct lane *lane = job->lane;
	job->next = NULL;
	*lane->completed_tail = job;
	lane->completed_tail = &job->next;
}

/* Within a libnbd call: note the result, touch nothing else. Returns 1: libnbd forgets the command. */
static int command_completed(void *opaque, int *error)
{
	struct job *job = opaque;
	if (!job->finished) {
		job->finished = true;
		job->result = *error > 0 ? -*error : 0;
		complete_later(job);
	}
	return 1;
}

static int extents_arrived(void *opaque, const char *context, uint64_t offset, uint32_t *entries,
			   size_t nentries, int *error)
{
	struct job *job = opaque;
	struct extents_call *call = job->call;
	if (strcmp(context, DEPTH_CONTEXT) == 0) {
		for (size_t i = 0; i + 1 < nentries && call->ndepths < DEPTHS_MAX && entries[i]; i += 2) {
			call->depths[call->ndepths].len_bytes = entries[i];
			call->depths[call->ndepths++].backing = entries[i + 1] != 1;
		}
		return 0;
	}
	if (strcmp(context, LIBNBD_CONTEXT_BASE_ALLOCATION) != 0)
		return 0;
	for (size_t i = 0; i + 1 < nentries && call->n < call->max && call->len_bytes; i += 2) {
		uint64_t len = entries[i];
		bool zero = entries[i + 1] & LIBNBD_STATE_ZERO;
		if (len == 0)
			break;
		if (len > call->len_bytes)
			len = call->len_bytes; /* the last one may reach further than asked */
		call->ext[call->n++] = (struct block_extent){
			.len_bytes = len, .zero = zero, .hole = zero && (entries[i + 1] & LIBNBD_STATE_HOLE)};
		call->len_bytes -= len;
	}
	return 0;
}

static int64_t issue_io(struct client *c, struct lane *lane, struct job *job)
{
	struct block_request *req = job->req;
	nbd_completion_callback done = {.callback = command_completed, .user_data = job};
	uint32_t fua = (req->flags & BLOCK_REQ_FUA) && c->can_fua ? LIBNBD_CMD_FLAG_FUA : 0;
	void *buf = job->bounce ? job->bounce : req->niov ? req->iov[0].iov_base : NULL;
	switch (req->op) {
	case BLOCK_READ:
		return nbd_aio_pread(lane->h, buf, req->len_bytes, req->offset_bytes, done, 0);
	case BLOCK_WRITE:
		return nbd_aio_pwrite(lane->h, buf, req->len_bytes, req->offset_bytes, done, fua);
	case BLOCK_FLUSH:
		return nbd_aio_flush(lane->h, done, 0);
	default:
		break;
	}
	if (needs_zero_bytes(c, req))
		return nbd_aio_pwrite(lane->h, buf, req->len_bytes, req->offset_bytes, done, fua);
	uint32_t flags = fua;
	if (req->op == BLOCK_WRITE_ZEROES && !(req->flags & BLOCK_REQ_MAY_UNMAP))
		flags |= LIBNBD_CMD_FLAG_NO_HOLE;
	if (req->op == BLOCK_WRITE_ZEROES && (req->flags & BLOCK_REQ_NO_FALLBACK))
		flags |= LIBNBD_CMD_FLAG_FAST_ZERO;
	return nbd_aio_zero(lane->h, req->len_bytes, req->offset_bytes, done, flags);
}

static void issue(struct lane *lane, struct job *job)
{
	struct client *c = lane->client;
	int64_t cookie = 0;
	unsigned slot = 0;
	while (lane->flying[slot])
		slot++;
	job->slot = slot;
	job->finished = false;
	job->issued_ms = clock_now_ms();
	if (!lane->nflying)
		lane->progress_ms = job->issued_ms;
	lane->flying[slot] = job;
	lane->nflying++;
	if (job->kind == JOB_NOTHING) {
		job->finished = true;
		complete_later(job);
	} else if (job->kind == JOB_EXTENTS) {
		nbd_extent_callback extent = {.callback = extents_arrived, .user_data = job};
		nbd_completion_callback done = {.callback = command_completed, .user_data = job};
		cookie = nbd_aio_block_status(lane->h, job->len_bytes, job->offset_bytes, extent, done,
					      job->call->max == 1 ? LIBNBD_CMD_FLAG_REQ_ONE : 0);
	} else if (job->req && job->flush_after && job->result == -EINPROGRESS) {
		nbd_completion_callback done = {.callback = command_completed, .user_data = job};
		job->flush_after = false;
		cookie = nbd_aio_flush(lane->h, done, 0);
	} else {
		cookie = issue_io(c, lane, job);
	}
	if (cookie < 0 && !job->finished) {
		int e = nbd_get_errno();
		job->finished = true;
		job->result = e ? -e : -EIO;
		complete_later(job);
	}
}

static short poll_events(struct nbd_handle *h)
{
	unsigned dir = nbd_aio_get_direction(h);
	return (dir & LIBNBD_AIO_DIRECTION_READ ? POLLIN : 0) |
	       (dir & LIBNBD_AIO_DIRECTION_WRITE ? POLLOUT : 0);
}

/* --- submitting --- */

/* lane->io held. */
static bool can_send(struct lane *lane)
{
	SCOPE_LOCK(&lane->lock);
	return lane->h && !lane->dead && !lane->pending && lane->nflying < LANE_INFLIGHT_MAX;
}

/* Takes the job over if it returns 0. */
static int send_or_enqueue(struct lane *lane, struct job *job)
{
	if (pthread_mutex_trylock(&lane->io))
		return enqueue(lane, job);
	bool sent = can_send(lane), more = false;
	if (sent) {
		job->lane = lane;
		issue(lane, job);
		/* What is left to send, and results, are the thread's. */
		more = lane->completed || (poll_events(lane->h) & POLLOUT);
	}
	pthread_mutex_unlock(&lane->io);
	if (more)
		wake(lane);
	return sent ? 0 : enqueue(lane, job);
}

static int client_submit(struct block *blk, struct block_request *req)
{
	struct client *c = (struct client *)blk;
	if (atomic_load(&c->death))
		return -ENOTCONN;
	if (req->op == BLOCK_WRITE_ZEROES && (req->flags & BLOCK_REQ_NO_FALLBACK) && !c->can_fast_zero)
		return -EOPNOTSUPP;
	struct job *job = calloc(1, sizeof *job);
	if (!job)
		return -ENOMEM;
	job->req = req;
	job->kind = req->op == BLOCK_FLUSH && !c->can_flush ? JOB_NOTHING : JOB_IO;
	bool changes = req->op != BLOCK_READ && req->op != BLOCK_FLUSH;
	job->flush_after = changes && (req->flags & BLOCK_REQ_FUA) && !c->can_fua && c->can_flush;
	int rc = prepare_buffer(c, job);
	if (rc == 0)
		rc = send_or_enqueue(next_lane(c), job);
	if (rc) {
		free(job->bounce);
		free(job);
	}
	return rc;
}

/* --- the lane's thread --- */

static void finish(struct job *job, int result)
{
	if (job->kind == JOB_EXTENTS) {
		struct extents_call *call = job->call;
		free(job);
		pthread_mutex_lock(&call->lock);
		call->result = result;
		call->done = true;
		pthread_cond_signal(&call->cond);
		pthread_mutex_unlock(&call->lock);
		return;
	}
	struct block_request *req = job->req;
	if (job->bounce && req->op == BLOCK_READ && result == 0) {
		const char *p = job->bounce;
		for (int i = 0; i < req->niov; i++) {
			memcpy(req->iov[i].iov_base, p, req->iov[i].iov_len);
			p += req->iov[i].iov_len;
		}
	}
	free(job->bounce);
	free(job);
	req->done(req, result);
}

/* No libnbd call is on the stack. lane->io held on entry and return, not during done(). */
static void run_completed(struct lane *lane)
{
	while (lane->completed) {
		struct job *job = lane->completed;
		lane->completed = job->next;
		if (!lane->completed)
			lane->completed_tail = &lane->completed;
		lane->flying[job->slot] = NULL;
		lane->nflying--;
		if (job->flush_after && job->result == 0) {
			if (lane->h) {
				job->result = -EINPROGRESS; /* the write is done, its flush is not */
				issue(lane, job);
				continue;
			}
			job->result = -ENOTCONN;
		}
		pthread_mutex_unlock(&lane->io);
		finish(job, job->result);
		pthread_mutex_lock(&lane->io);
	}
}

/* The lane is lost: everything in flight and queued fails, and so will the other lanes. lane->io held on
 * entry and return. */
static void die(struct lane *lane, int code, const char *why)
{
	struct client *c = lane->client;
	int none = 0;
	if (atomic_compare_exchange_strong(&c->death, &none, code)) {
		log_info("%s: NBD connection lost: %s", c->block.label, why);
		for (unsigned i = 0; i < c->nlanes; i++)
			if (&c->lanes[i] != lane)
				wake(&c->lanes[i]);
	}
	pthread_mutex_lock(&lane->lock);
	lane->dead = true;
	struct job *pending = lane->pending;
	lane->pending = NULL;
	lane->pending_tail = &lane->pending;
	pthread_mutex_unlock(&lane->lock);

	/* From here on libnbd touches no buffer of ours; its callbacks for what was in flight may still run.
	 */
	nbd_close(lane->h);
	lane->h = NULL;
	/* Results that came before the end stand. */
	run_completed(lane);
	for (unsigned i = 0; i < LANE_INFLIGHT_MAX; i++) {
		struct job *job = lane->flying[i];
		if (job) {
			lane->flying[i] = NULL;
			lane->nflying--;
			pthread_mutex_unlock(&lane->io);
			finish(job, code);
			pthread_mutex_lock(&lane->io);
		}
	}
	pthread_mutex_unlock(&lane->io);
	while (pending) {
		struct job *job = pending;
		pending = job->next;
		finish(job, code);
	}
	pthread_mutex_lock(&lane->io);
}

/* Milliseconds until a request is overdue, at least 0. */
static int until_overdue(const struct lane *lane)
{
	uint64_t timeout = lane->client->timeout_ms, now = clock_now_ms(), first = UINT64_MAX;
	for (unsigned i = 0; i < LANE_INFLIGHT_MAX; i++) {
		const struct job *job = lane->flying[i];
		if (!job)
			continue;
		uint64_t since = job->issued_ms > lane->progress_ms ? job->issued_ms : lane->progress_ms;
		uint64_t due = since + timeout, limit = job->issued_ms + timeout * PATIENCE;
		if (limit < due)
			due = limit;
		if (due < first)
			first = due;
	}
	if (first == UINT64_MAX)
		return timeout / 2 < IDLE_LOOK_MS ? (int)(timeout / 2) + 1 : IDLE_LOOK_MS;
	return first <= now ? 0 : first - now > 60000 ? 60000 : (int)(first - now);
}

static void take_pending(struct lane *lane, bool *closing)
{
	for (;;) {
		struct job *job = NULL;
		pthread_mutex_lock(&lane->lock);
		if (lane->nflying < LANE_INFLIGHT_MAX && (job = lane->pending)) {
			lane->pending = job->next;
			if (!lane->pending)
				lane->pending_tail = &lane->pending;
		}
		*closing = lane->closing && !lane->pending;
		pthread_mutex_unlock(&lane->lock);
		if (!job)
			return;
		issue(lane, job);
	}
}

/* 0, or -1 when the handle is lost. */
static int notify(struct nbd_handle *h, short revents, short events)
{
	if ((revents & (POLLERR | POLLHUP | POLLNVAL)) && !(revents & (POLLIN | POLLOUT)))
		revents |= events; /* let libnbd meet the error itself */
	int rc = 0;
	if ((revents & POLLIN) && (nbd_aio_get_direction(h) & LIBNBD_AIO_DIRECTION_READ))
		rc = nbd_aio_notify_read(h);
	else if ((revents & POLLOUT) && (nbd_aio_get_direction(h) & LIBNBD_AIO_DIRECTION_WRITE))
		rc = nbd_aio_notify_write(h);
	return rc < 0 || nbd_aio_is_dead(h) || nbd_aio_is_closed(h) ? -1 : 0;
}

/* One wait on the handle and on new work. lane->io held on entry and return, not while waiting. */
static void wait_and_serve(struct lane *lane)
{
	struct pollfd pfd[2] = {{.fd = nbd_aio_get_fd(lane->h)}, {.fd = lane->wake_fd, .events = POLLIN}};
	pfd[0].events = poll_events(lane->h);
	int timeout_ms = until_overdue(lane);
	pthread_mutex_unlock(&lane->io);
	int rc = poll(pfd, 2, timeout_ms), e = errno;
	pthread_mutex_lock(&lane->io);
	if (rc < 0 && e != EINTR) {
		die(lane, -e, strerror(e));
		return;
	}
	if (rc > 0 && pfd[1].revents) {
		uint64_t count;
		if (read(lane->wake_fd, &count, sizeof count) < 0 && errno != EAGAIN && errno != EINTR)
			log_warn("%s: eventfd: %s", lane->client->block.label, strerror(errno));
	}
	if (rc > 0 && pfd[0].revents) {
		lane->progress_ms = clock_now_ms();
		if (notify(lane->h, pfd[0].revents, pfd[0].events)) {
			const char *why = nbd_get_error();
			die(lane, -ENOTCONN, why ? why : "closed by the server");
			return;
		}
	}
	int death = atomic_load(&lane->client->death);
	if (death)
		die(lane, -ENOTCONN, "another connection was lost");
	else if (lane->nflying && !lane->completed && until_overdue(lane) == 0)
		die(lane, -ETIMEDOUT, "no reply in time");
}

static void say_goodbye(struct nbd_handle *h)
{
	uint64_t deadline = clock_now_ms() + GOODBYE_TIMEOUT_MS, now;
	if (nbd_aio_disconnect(h, 0) < 0)
		return;
	while (!nbd_aio_is_closed(h) && !nbd_aio_is_dead(h) && (now = clock_now_ms()) < deadline) {
		struct pollfd pfd = {.fd = nbd_aio_get_fd(h), .events = poll_events(h)};
		if (poll(&pfd, 1, (int)(deadline - now)) > 0 && notify(h, pfd.revents, pfd.events))
			break;
	}
}

static void *lane_main(void *arg)
{
	struct lane *lane = arg;
	pthread_setname_np(pthread_self(), "nbd-client");
	confine_self(CONFINE_NBD);
	pthread_mutex_lock(&lane->io);
	for (;;) {
		bool closing = false;
		if (lane->h)
			take_pending(lane, &closing);
		run_completed(lane);
		if (!lane->h)
			break; /* enqueue refuses from now on */
		if (closing && !lane->nflying)
			break;
		pthread_mutex_lock(&lane->lock);
		bool more = lane->pending && lane->nflying < LANE_INFLIGHT_MAX;
		pthread_mutex_unlock(&lane->lock);
		if (!more)
			wait_and_serve(lane);
	}
	if (lane->h) {
		say_goodbye(lane->h);
		nbd_close(lane->h);
		lane->h = NULL;
	}
	pthread_mutex_unlock(&lane->io);
	return NULL;
}

/* --- open, extents, close --- */

/* Cuts the extents where the depth changes; what no depth was told for is left out. */
static void apply_depths(struct extents_call *call)
{
	struct block_extent whole[EXTENTS_MAX];
	unsigned n = 0, k = 0, nwhole = call->n < EXTENTS_MAX ? call->n : EXTENTS_MAX;
	memcpy(whole, call->ext, nwhole * sizeof whole[0]);
	uint64_t left = call->ndepths ? call->depths[0].len_bytes : 0;
	for (unsigned i = 0; i < nwhole; i++) {
		while (whole[i].len_bytes && k < call->ndepths && n < call->max) {
			uint64_t len = whole[i].len_bytes < left ? whole[i].len_bytes : left;
			call->ext[n] = whole[i];
			call->ext[n].len_bytes = len;
			call->ext[n++].backing = call->depths[k].backing;
			whole[i].len_bytes -= len;
			left -= len;
			if (!left && ++k < call->ndepths)
				left = call->depths[k].len_bytes;
		}
	}
	call->n = n;
}

static int client_extents(struct block *blk, uint64_t offset_bytes, uint64_t len_bytes,
			  struct block_extent *ext, unsigned *n, struct error *err)
{
	struct client *c = (struct client *)blk;
	uint32_t mask = blk->limits.request_alignment - 1;
	if (len_bytes > ZEROES_MAX_BYTES)
		len_bytes = ZEROES_MAX_BYTES;
	if (!c->can_extents || ((offset_bytes | len_bytes) & mask)) {
		ext[0] = (struct block_extent){.len_bytes = len_bytes};
		*n = 1;
		return 0;
	}
	struct job *job = calloc(1, sizeof *job);
	if (!job)
		return error_errno(err, ENOMEM, "%s: extents", blk->label);
	struct extents_call call = {.ext = ext,
				    .max = c->can_depth && *n > EXTENTS_MAX ? EXTENTS_MAX : *n,
				    .len_bytes = len_bytes,
				    .lock = PTHREAD_MUTEX_INITIALIZER,
				    .cond = PTHREAD_COND_INITIALIZER};
	job->kind = JOB_EXTENTS;
	job->call = &call;
	job->offset_bytes = offset_bytes;
	job->len_bytes = len_bytes;
	int rc = enqueue(next_lane(c), job);
	if (rc) {
		free(job);
		return error_errno(err, rc, "%s: extents", blk->label);
	}
	pthread_mutex_lock(&call.lock);
	while (!call.done)
		pthread_cond_wait(&call.cond, &call.lock);
	pthread_mutex_unlock(&call.lock);
	pthread_cond_destroy(&call.cond);
	pthread_mutex_destroy(&call.lock);
	if (call.result == 0 && c->can_depth)
		apply_depths(&call);
	if (call.result == 0 && call.n == 0)
		call.result = -EPROTO;
	if (call.result)
		return error_errno(err, call.result, "%s: extents at %llu", blk->label,
				   (unsigned long long)offset_bytes);
	*n = call.n;
	return 0;
}

static void free_client(struct client *c)
{
	for (unsigned i = 0; i < c->nlanes; i++) {
		struct lane *lane = &c->lanes[i];
		nbd_close(lane->h);
		if (lane->wake_fd >= 0)
			close(lane->wake_fd);
		pthread_mutex_destroy(&lane->lock);
		pthread_mutex_destroy(&lane->io);
	}
	free(c);
}

static void stop_lanes(struct client *c, unsigned started)
{
	for (unsigned i = 0; i < started; i++) {
		pthread_mutex_lock(&c->lanes[i].lock);
		c->lanes[i].closing = true;
		pthread_mutex_unlock(&c->lanes[i].lock);
		wake(&c->lanes[i]);
	}
	for (unsigned i = 0; i < started; i++)
		pthread_join(c->lanes[i].thread, NULL);
}

static void client_close(struct block *blk)
{
	struct client *c = (struct client *)blk;
	stop_lanes(c, c->nlanes);
	free_client(c);
}

static const struct block_ops client_ops = {
	.name = "nbd",
	.submit = client_submit,
	.extents = client_extents,
	.close = client_close,
};

static int nbd_failure(struct error *err, const char *label)
{
	int e = nbd_get_errno();
	const char *why = nbd_get_error();
	return error_set(err, e ? e : EIO, "%s: NBD: %s", label, why ? why : "unknown failure");
}

/* Takes the fd over. */
static int connect_lane(struct lane *lane, int fd, const struct nbd_client_options *opt, const char *label,
			struct error *err)
{
	lane->h = nbd_create();
	if (!lane->h) {
		close(fd);
		return nbd_failure(err, label);
	}
	if (nbd_set_export_name(lane->h, opt->export_name ? opt->export_name : "") < 0 ||
	    nbd_set_tls(lane->h, LIBNBD_TLS_DISABLE) < 0 ||
	    nbd_add_meta_context(lane->h, LIBNBD_CONTEXT_BASE_ALLOCATION) < 0 ||
	    (opt->allocation_depth && nbd_add_meta_context(lane->h, DEPTH_CONTEXT) < 0) ||
	    nbd_aio_connect_socket(lane->h, fd) < 0) {
		/* libnbd takes the socket only when it accepts the call. */
		if (nbd_aio_is_created(lane->h))
			close(fd);
		return nbd_failure(err, label);
	}
	uint64_t deadline = clock_now_ms() + lane->client->timeout_ms;
	while (nbd_aio_is_connecting(lane->h)) {
		uint64_t now = clock_now_ms();
		if (now >= deadline)
			return error_set(err, ETIMEDOUT, "%s: NBD handshake: no answer in %u ms", label,
					 lane->client->timeout_ms);
		struct pollfd pfd = {.fd = nbd_aio_get_fd(lane->h), .events = poll_events(lane->h)};
		int rc = poll(&pfd, 1, (int)(deadline - now));
		if (rc < 0 && errno != EINTR)
			return error_errno(err, errno, "%s: poll", label);
		if (rc > 0 && notify(lane->h, pfd.revents, pfd.events))
			return nbd_failure(err, label);
	}
	if (!nbd_aio_is_ready(lane->h))
		return nbd_failure(err, label);
	return 0;
}

/* What the first lane's server offers becomes the block's limits. */
static int learn_limits(struct client *c, struct error *err)
{
	struct nbd_handle *h = c->lanes[0].h;
	const char *label = c->block.label;
	int64_t size = nbd_get_size(h);
	int64_t min = nbd_get_block_size(h, LIBNBD_SIZE_MINIMUM),
		max = nbd_get_block_size(h, LIBNBD_SIZE_MAXIMUM);
	if (size < 0 || min < 0 || max < 0)
		return nbd_failure(err, label);
	if (min == 0)
		min = 1;
	if (min > ALIGNMENT_MAX_BYTES || (min & (min - 1)))
		return error_set(err, EPROTO, "%s: NBD: block size %lld", label, (long long)min);
	if (max == 0)
		max = TRANSFER_UNSAID_BYTES;
	if (max > TRANSFER_MAX_BYTES)
		max = TRANSFER_MAX_BYTES;
	if (max < min)
		return error_set(err, EPROTO, "%s: NBD: largest request %lld", label, (long long)max);
	c->can_zero = nbd_can_zero(h) > 0;
	c->can_fast_zero = c->can_zero && nbd_can_fast_zero(h) > 0;
	c->can_fua = nbd_can_fua(h) > 0;
	c->can_flush = nbd_can_flush(h) > 0;
	c->can_extents = nbd_can_meta_context(h, LIBNBD_CONTEXT_BASE_ALLOCATION) > 0;
	c->can_depth = c->can_extents && nbd_can_meta_context(h, DEPTH_CONTEXT) > 0;
	c->block.size_bytes = (uint64_t)size - (uint64_t)size % (uint64_t)min;
	c->block.limits = (struct block_limits){
		.request_alignment = (uint32_t)min,
		.max_transfer_bytes = (uint32_t)(max - max % min),
		.read_only = nbd_is_read_only(h) > 0,
		.can_multi_conn = nbd_can_multi_conn(h) > 0,
	};
	c->block.limits.max_zeroes_bytes =
		c->can_zero ? ZEROES_MAX_BYTES : c->block.limits.max_transfer_bytes;
	return 0;
}

static int start_lanes(struct client *c, struct error *err)
{
	sigset_t all, old;
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &old);
	unsigned started = 0;
	int rc = 0;
	while (started < c->nlanes && rc == 0) {
		rc = pthread_create(&c->lanes[started].thread, NULL, lane_main, &c->lanes[started]);
		if (rc == 0)
			started++;
	}
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (rc == 0)
		return 0;
	stop_lanes(c, started);
	return error_errno(err, rc, "%s: NBD client thread", c->block.label);
}

int nbd_client_open(const int *fds, unsigned nfds, const struct nbd_client_options *opt, struct block **out,
		    struct error *err)
{
	unsigned taken = 0;
	int rc = 0;
	struct client *c = NULL;
	*out = NULL;
	if (nfds < 1 || nfds > LANES_MAX)
		rc = error_set(err, EINVAL, "%u NBD connections: 1 to %d are possible", nfds, LANES_MAX);
	else if (!(c = calloc(1, sizeof *c + nfds * sizeof c->lanes[0])))
		rc = error_errno(err, ENOMEM, "NBD client");
	if (rc)
		goto out;
	c->block.ops = &client_ops;
	c->timeout_ms = opt->timeout_ms ? opt->timeout_ms : DEFAULT_TIMEOUT_MS;
	snprintf(c->block.label, sizeof c->block.label, "%s", opt->label ? opt->label : "nbd");
	for (unsigned i = 0; i < nfds; i++) {
		struct lane *lane = &c->lanes[i];
		lane->client = c;
		lane->pending_tail = &lane->pending;
		lane->completed_tail = &lane->completed;
		lane->wake_fd = -1;
		pthread_mutex_init(&lane->lock, NULL);
		pthread_mutex_init(&lane->io, NULL);
	}
	c->nlanes = nfds;
	for (unsigned i = 0; rc == 0 && i < nfds; i++) {
		struct lane *lane = &c->lanes[i];
		lane->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		if (lane->wake_fd < 0) {
			rc = error_errno(err, errno, "eventfd");
			break;
		}
		taken++;
		rc = connect_lane(lane, fds[i], opt, c->block.label, err);
		if (rc == 0 && i == 0)
			rc = learn_limits(c, err);
		if (rc == 0 && nfds > 1 && !c->block.limits.can_multi_conn)
			rc = error_set(err, ENOTSUP,
				       "%s: the NBD server does not promise that one flush covers "
				       "several connections",
				       c->block.label);
		if (rc == 0 && i > 0 &&
		    nbd_get_size(lane->h) - nbd_get_size(lane->h) % c->block.limits.request_alignment !=
			    (int64_t)c->block.size_bytes)
			rc = error_set(err, EPROTO, "%s: NBD connections disagree about the size",
				       c->block.label);
	}
	if (rc == 0)
		rc = start_lanes(c, err);
	if (rc == 0) {
		*out = &c->block;
		return 0;
	}
	free_client(c);
out:
	for (unsigned i = taken; i < nfds; i++)
		close(fds[i]);
	return rc;
}

int nbd_client_open_unix(const char *path, unsigned nconn, const struct nbd_client_options *opt,
			 struct block **out, struct error *err)
{
	struct sockaddr_un sa = {.sun_family = AF_UNIX};
	int fds[LANES_MAX], rc = 0;
	unsigned n = 0;
	*out = NULL;
	if (strlen(path) >= sizeof sa.sun_path)
		return error_set(err, ENAMETOOLONG, "%s: path of a Unix socket is at most %zu bytes", path,
				 sizeof sa.sun_path - 1);
	if (nconn < 1 || nconn > LANES_MAX)
		return error_set(err, EINVAL, "%u NBD connections: 1 to %d are possible", nconn, LANES_MAX);
	strcpy(sa.sun_path, path);
	for (; rc == 0 && n < nconn; n++) {
		fds[n] = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
		if (fds[n] < 0) {
			rc = error_errno(err, errno, "socket");
			break;
		}
		if (connect(fds[n], (struct sockaddr *)&sa, sizeof sa))
			rc = error_errno(err, errno, "%s: connect", path);
	}
	if (rc) {
		for (unsigned i = 0; i < n; i++)
			close(fds[i]);
		return rc;
	}
	return nbd_client_open(fds, nconn, opt, out, err);
}
