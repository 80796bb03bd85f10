/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/socket.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "nbd/nbd.h"
#include "net/preamble.h"
#include "vmm/move_source.h"

/* A disk whose mirror broke this often without progress in between ends the move. */
#define STORAGE_RETRIES 8
/* A destination that fell silent and can be dialled again is busy, not dead: a guest's write waits twice as
 * long for it from the second time on, up to so many times what is configured: the first may be anything. */
#define GRACE_GROWTH_MAX 32
/* What the disks of a move share: pieces of the copies under way, of 256 KiB each, which bounds the memory
 * that the passes take; and the buffers of the guest's writes. Each disk gets the same part and keeps it:
 * disks end at different times, but a part is enough for the link where the round trip is short, and where it
 * is long, few disks are moved at a time. */
#define COPY_PIECES	  64
#define COPY_PIECES_LEAST 2
#define COPY_PIECES_MOST  32
/* After so long without an answer it was the link that was gone, not a busy host. */
#define BUSY_MOST_MS 3000
#define DIAL_TRIES   4
/* A lost SYN goes out again after one second: that it is asked anew costs nothing, and a cancel is seen
 * between. */
#define CONNECT_MOST_MS 2500
#define SYNC_ROUND_MS	200 /* so often every disk is looked at */
#define REDIAL_WAIT_MS	1000

static int dial_once(struct move *mv, enum channel channel, const char *token, struct conn **out,
		     struct error *err)
{
	unsigned timeout_ms = mv->vm->cfg->silence_ms;
	bool first = channel == CHANNEL_CONTROL && !mv->tries;
	bool data = channel != CHANNEL_CONTROL && *mv->data_address;
	const char *address = data ? mv->data_address : mv->opt.address;
	int fd = net_connect_from(data ? mv->vm->cfg->migration_address : "", address,
				  first || timeout_ms < CONNECT_MOST_MS ? timeout_ms : CONNECT_MOST_MS, err);
	if (fd < 0)
		return fd;
	(void)setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &timeout_ms, sizeof timeout_ms);
	struct preamble pre = {.channel = channel};
	snprintf(pre.token, sizeof pre.token, "%s", token);
	int rc = preamble_write(fd, &pre, timeout_ms, err);
	if (rc) {
		close(fd);
		return error_prefix(err, "%s", address);
	}
	if (mv->opt.no_tls && channel != CHANNEL_CONTROL)
		rc = conn_from_fd(fd, out, err);
	else
		rc = conn_tls_connect(fd, mv->tls, mv->opt.peer, timeout_ms, out, err);
	return rc ? error_prefix(err, "%s channel to %s (%s)", channel_name(channel), mv->opt.peer, address)
		  : 0;
}

/* While the control channel lives, a data channel that is not answered in time met a busy host: it is dialled
 * again. */
int source_dial(struct move *mv, enum channel channel, const char *token, struct conn **out,
		struct error *err)
{
	uint64_t until = clock_now_ms() + DIAL_TRIES * (uint64_t)mv->vm->cfg->silence_ms;
	for (;;) {
		struct error e = ERROR_INIT;
		int rc = dial_once(mv, channel, token, out, &e);
		if (!rc)
			return 0;
		if (rc != -ETIMEDOUT || channel == CHANNEL_CONTROL || clock_now_ms() >= until) {
			error_copy(err, &e);
			return rc;
		}
		log_warn("%s: dialling again", e.message);
		rc = source_check(mv, err);
		if (rc)
			return rc;
	}
}

static void mirror_failed(void *opaque, const struct error *why)
{
	/* The storage loop sees it in the statistics and dials again; the guest runs on. */
	(void)opaque;
	log_warn("mirror: %s", why->message);
}

static void share_budget(const struct move *mv, struct mirror_options *opt)
{
	unsigned ndisks = mv->vm->def.ndisks, pieces = COPY_PIECES / ndisks;
	uint64_t buffer = mv->opt.mirror_buffer_bytes;
	buffer = (buffer ? buffer : MIRROR_BUFFER_DEFAULT_BYTES) / ndisks;
	opt->requests_in_flight = pieces > COPY_PIECES_MOST    ? COPY_PIECES_MOST
				  : pieces < COPY_PIECES_LEAST ? COPY_PIECES_LEAST
							       : pieces;
	opt->buffer_bytes = buffer < MIRROR_BUFFER_MIN_BYTES ? MIRROR_BUFFER_MIN_BYTES : buffer;
}

int source_remote_open(struct move *mv, const char *token, const char *export_name, uint64_t size_bytes,
		       struct block **out, struct error *err)
{
	struct conn *conn = NULL;
	int rc = source_dial(mv, CHANNEL_DISK, token, &conn, err);
	if (rc)
		return error_prefix(err, "disk %s", export_name);
	int fd = -1;
	rc = conn_pump_start(conn, &fd, err);
	if (rc)
		return error_prefix(err, "disk %s", export_name);
	struct nbd_client_options copt = {
		.export_name = export_name, .label = export_name, .timeout_ms = mv->vm->cfg->silence_ms};
	struct block *remote = NULL;
	rc = nbd_client_open(&fd, 1, &copt, &remote, err);
	if (rc)
		return error_prefix(err, "disk %s at %s", export_name, mv->opt.peer);
	if (remote->size_bytes != size_bytes) {
		rc = error_set(err, EPROTO, "disk %s: %llu bytes here, %llu at %s", export_name,
			       (unsigned long long)size_bytes, (unsigned long long)remote->size_bytes,
			       mv->opt.peer);
		block_close(remote);
		return rc;
	}
	*out = remote;
	return 0;
}

int source_storage_open(struct move *mv, unsigned i, uint64_t broken_ms, struct error *err)
{
	struct vm_disk *d = &mv->vm->disks[i];
	const char *id = mv->vm->def.disks[i].id;
	struct block *remote = NULL;
	int rc = source_remote_open(mv, mv->disk_token[i], id, d->local->size_bytes, &remote, err);
	if (rc)
		return rc;
	const char *grace = getenv("SNM_MIRROR_GRACE_MS");
	unsigned least = grace ? (unsigned)strtoul(grace, NULL, 10) : mv->vm->cfg->mirror_grace_ms;
	if (!mv->grace_ms[i])
		mv->grace_ms[i] = least;
	else if (broken_ms && clock_now_ms() - broken_ms < BUSY_MOST_MS && mv->busy_breaks[i]++ &&
		 mv->grace_ms[i] < least * GRACE_GROWTH_MAX && mv->grace_ms[i] < mv->vm->cfg->silence_ms / 4)
		mv->grace_ms[i] *= 2;
	static const enum mirror_yield yields[] = {[MOVE_PRIORITY_GUEST] = MIRROR_YIELD_MOST,
						   [MOVE_PRIORITY_BALANCED] = MIRROR_YIELD_BALANCED,
						   [MOVE_PRIORITY_FINISH] = MIRROR_YIELD_NOTHING};
	struct mirror_options mopt = {
		.remote = remote,
		.remote_is_zero = mv->disks[i].mode == MOVE_DISK_FILE && !mv->resumed[i],
		.remote_has_backing =
			mv->disks[i].mode == MOVE_DISK_CHAIN || mv->disks[i].mode == MOVE_DISK_REUSE,
		.hold_pass = mv->resumed[i],
		.keep_map = broken_ms,
		.chunk_bytes = source_chunk_bytes(d->local->size_bytes),
		.yield = yields[mv->opt.priority],
		.write_grace_ms = mv->grace_ms[i],
		.buffered = mv->opt.mirror_buffered,
		.bandwidth = &mv->bandwidth,
		.failed = mirror_failed,
		.opaque = mv,
	};
	share_budget(mv, &mopt);
	rc = mirror_start(d->mirror, &mopt, err);
	if (rc) {
		block_close(remote);
		return error_prefix(err, "disk %s", id);
	}
	if (!broken_ms)
		memset(&mv->counted[i], 0, sizeof mv->counted[i]); /* its figures began anew */
	return 0;
}

/*
 * A session that broke is dialled again for as long as the control channel lives: that one knows whether the
 * link or the host is gone. Without --retry-for, a few times only.
 */
static int redial(struct move *mv, unsigned i, unsigned *tries, struct error *err)
{
	uint64_t began = clock_now_ms();
	mirror_stop(mv->vm->disks[i].mirror);
	for (unsigned wait = 50 * *tries;; wait += 50) {
		struct error e = ERROR_INIT;
		clock_sleep_ms(wait < REDIAL_WAIT_MS ? wait : REDIAL_WAIT_MS);
		int rc = source_check(mv, err);
		if (rc)
			return rc;
		rc = source_storage_open(mv, i, began, &e);
		if (!rc)
			return 0;
		bool patient = mv->opt.retry_for_s && source_link_lost(&e) &&
			       clock_now_ms() - began < mv->opt.retry_for_s * UINT64_C(1000);
		if (patient)
			continue;
		if (*tries >= STORAGE_RETRIES) {
			error_copy(err, &e);
			return rc;
		}
		(*tries)++;
	}
}

/* What the destination holds of an earlier attempt: chunks that agree need no copy. The pass goes on with the
 * rest. */
static int adopt(struct move *mv, unsigned i, struct error *err)
{
	struct mirror *m = mv->vm->disks[i].mirror;
	struct mirror_verify_options opt;
	struct mirror_verify_result res;
	source_verify_options(mv, i, true, &opt);
	int rc = mirror_verify(m, &opt, &res, err);
	if (rc)
		return rc;
	mv->resumed[i] = false;
	log_info("disk %s: %llu of %llu chunks are at %s already", mv->vm->def.disks[i].id,
		 (unsigned long long)res.agreed, (unsigned long long)res.chunks, mv->opt.peer);
	mirror_release_pass(m);
	return 0;
}

/* How far a disk's copy had got when its session broke last. */
struct sync_progress {
	unsigned tries; /* in a row without progress */
	uint64_t best, moved;
};

/* Its session broke: 0 when it has a new one. `e` is why. */
static int mend_session(struct move *mv, unsigned i, struct sync_progress *p, const struct mirror_stats *st,
			const struct error *e, struct error *err)
{
	/* Where a session ends by silence, chunks are copied again, so that the synced ones need not grow
	 * though the copy goes on. An error at one place is no progress, whatever else was copied. */
	uint64_t moved = st->data_bytes_copied + st->zero_bytes_copied;
	if (st->synced_bytes > p->best || (e->code == -ETIMEDOUT && moved > p->moved))
		p->tries = 0;
	p->best = st->synced_bytes > p->best ? st->synced_bytes : p->best;
	p->moved = moved;
	/* A disk that is full, here or there, one that cannot be read, and hashes that cannot be had are no
	 * matter of this session. */
	if (st->local_failed)
		return error_set(err, e->code, "%s, on %s", e->message, mv->vm->cfg->name);
	if (e->code == -ENOSPC)
		return error_set(err, e->code, "%s, at %s", e->message, mv->opt.peer);
	if (mv->resumed[i] && !st->failed) {
		error_copy(err, e);
		return e->code;
	}
	bool silent = e->code == -ETIMEDOUT;
	if (++p->tries > STORAGE_RETRIES)
		return error_set(err, e->code, "%s, at %s (%u times in a row%s%s%s)", e->message,
				 mv->opt.peer, p->tries, silent ? "; " : "", silent ? mv->opt.peer : "",
				 silent ? " is too busy, or the link too slow" : "");
	log_warn("disk %s: session broke (%s), dialling again (%u)", mv->vm->def.disks[i].id, e->message,
		 p->tries);
	return redial(mv, i, &p->tries, err);
}

/* Looks after one disk for up to wait_ms. *synced: all its chunks are. */
static int sync_step(struct move *mv, unsigned i, struct sync_progress *p, unsigned wait_ms, bool *synced,
		     struct error *err)
{
	struct mirror *m = mv->vm->disks[i].mirror;
	struct error e = ERROR_INIT;
	*synced = false;
	int rc = mv->resumed[i] ? adopt(mv, i, &e) : 0;
	if (!rc)
		rc = mirror_wait_synced(m, wait_ms, &e);
	*synced = !rc;
	if (!rc)
		return 0;
	struct mirror_stats st;
	mirror_stats(m, &st);
	/* A session that ended by silence says ETIMEDOUT, too. */
	if (rc == -ETIMEDOUT && !st.failed && !mv->resumed[i])
		return 0;
	rc = source_check(mv, err);
	return rc ? rc : mend_session(mv, i, p, &st, &e, err);
}

int source_storage_sync(struct move *mv, struct error *err)
{
	struct sync_progress progress[VM_DISKS_MAX] = {0};
	unsigned n = mv->vm->def.ndisks;
	/* All before one of them is waited for, so that every pass begins; what fails here is met again
	 * below. */
	for (unsigned i = 0; i < n; i++) {
		struct error e = ERROR_INIT;
		if (mv->resumed[i] && adopt(mv, i, &e))
			log_info("disk %s: %s", mv->vm->def.disks[i].id, e.message);
	}
	/* In turn: a session that broke is not to wait for the other disks' copies. */
	for (bool all = n == 0; !all;) {
		all = true;
		for (unsigned i = 0; i < n; i++) {
			bool synced = true;
			int rc = source_check(mv, err);
			if (!rc)
				rc = source_images_check(mv, err);
			if (!rc && !source_is_shared(mv, i))
				rc = sync_step(mv, i, &progress[i], SYNC_ROUND_MS / n, &synced, err);
			if (rc)
				return rc;
			all = all && synced;
		}
	}
	return 0;
}

int source_storage_flush(struct move *mv, struct error *err)
{
	/* A session may break in the flush itself: what it left unsynced is copied again, and flushed again.
	 */
	for (unsigned tries = 1;; tries++) {
		struct error e = ERROR_INIT;
		int rc = source_storage_sync(mv, err);
		if (!rc)
			rc = source_shared_flush(mv, err);
		if (rc)
			return rc;
		for (unsigned i = 0; !rc && i < mv->vm->def.ndisks; i++) {
			if (source_is_shared(mv, i))
				continue;
			rc = mirror_flush_remote(mv->vm->disks[i].mirror, &e);
			if (rc)
				error_prefix(&e, "disk %s", mv->vm->def.disks[i].id);
		}
		if (!rc) {
			rc = source_images_check(mv, err);
			return rc ? rc : source_check(mv, err);
		}
		if (source_check(mv, err))
			return source_check(mv, err);
		if (tries > STORAGE_RETRIES) {
			error_copy(err, &e);
			return rc;
		}
		log_warn("flush at the destination: %s (%u)", e.message, tries);
	}
}

bool source_storage_consistent(struct move *mv)
{
	for (unsigned i = 0; i < mv->vm->def.ndisks; i++)
		if (!source_is_shared(mv, i) && !mirror_is_consistent(mv->vm->disks[i].mirror))
			return false;
	return true;
}

void source_storage_stop(struct move *mv)
{
	pthread_mutex_lock(&mv->lock);
	mv->mirrors_on = false;
	pthread_mutex_unlock(&mv->lock);
	for (unsigned i = 0; i < mv->vm->def.ndisks; i++)
		mirror_stop(mv->vm->disks[i].mirror);
}
