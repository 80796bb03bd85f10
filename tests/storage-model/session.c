/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "net/conn.h"
#include "tests/storage-model/world.h"

#define BUFFERED_MS 200
#define PATIENT_MS  20000 /* a grace that no busy machine exceeds */

const char *fault_name(enum fault fault)
{
	static const char *const names[] = {[FAULT_NONE] = "none",
					    [FAULT_CUT] = "cut",
					    [FAULT_SILENT] = "silent",
					    [FAULT_SILENT_REPLIES] = "silent replies",
					    [FAULT_REMOTE_ERROR] = "remote error",
					    [FAULT_SERVER_STOPPED] = "server stopped",
					    [FAULT_STOP] = "stop",
					    [FAULT_LOCAL_READ] = "local read error",
					    [FAULT_LOCAL_WRITE] = "local write error"};
	return names[fault];
}

static void mirror_failed(void *opaque, const struct error *err)
{
	struct world *w = opaque;
	model_event(&w->model, "session %u failed: %s", w->sessions, err->message);
	if (atomic_fetch_add(&w->failed_calls, 1))
		model_fail(&w->model, 0, 0, "failed() was called twice in a session");
}

/* --- the destination --- */

static void serve(struct world *w, const int *fds, unsigned n)
{
	struct nbd_server_options opt = {.export_name = "disk", .block = &w->remote_shaky->block};
	struct error err = ERROR_INIT;
	shaky_fence(w->remote_shaky, false);
	ck_assert_msg(nbd_server_create(&opt, &w->server, &err) == 0, "%s", err.message);
	for (unsigned i = 0; i < n; i++) {
		struct conn *conn = NULL;
		ck_assert_msg(conn_from_fd(fds[i], &conn, &err) == 0, "%s", err.message);
		ck_assert_msg(nbd_server_add(w->server, conn, &err) == 0, "%s", err.message);
	}
}

void session_fence(struct world *w)
{
	if (!w->server)
		return;
	nbd_server_free(w->server);
	w->server = NULL;
	shaky_fence(w->remote_shaky, true);
}

/* --- faults --- */

static void plan_wire_fault(struct world *w)
{
	uint64_t bytes = world_random_log(w, 1, 2 * w->local.size_bytes / w->connections);
	struct wire *wire = w->wires[world_random(w, w->connections)];
	if (w->fault == FAULT_CUT)
		wire_cut_after(wire, bytes);
	else
		wire_silence_after(wire, bytes, w->fault == FAULT_SILENT);
}

/* A change by the guest fails at the source's disk, whether that has taken it or not. */
void session_local_error(struct world *w)
{
	shaky_fail_once(w->local_shaky, 1 + world_random(w, 20),
			1u << BLOCK_WRITE | 1u << BLOCK_WRITE_ZEROES | 1u << BLOCK_DISCARD, -EIO,
			world_random(w, 2));
}

static void plan_fault(struct world *w)
{
	static const int codes[] = {-EIO, -ENOSPC, -EINVAL};
	unsigned requests = (unsigned)world_random_log(w, 1, 400);
	w->fault_at_ns = 0;
	w->fault = FAULT_NONE;
	if (!w->faults_left)
		return;
	w->faults_left--;
	w->fault = (enum fault)(1 + world_random(w, FAULTS - 1));
	switch (w->fault) {
	case FAULT_CUT:
	case FAULT_SILENT:
	case FAULT_SILENT_REPLIES:
		plan_wire_fault(w);
		break;
	case FAULT_REMOTE_ERROR:
		shaky_fail_once(w->remote_shaky, requests,
				1u << BLOCK_WRITE | 1u << BLOCK_WRITE_ZEROES | 1u << BLOCK_FLUSH |
					1u << BLOCK_DISCARD,
				codes[world_random(w, 3)], world_random(w, 2));
		break;
	case FAULT_LOCAL_READ:
		shaky_fail_once(w->local_shaky, requests, 1u << BLOCK_READ, -EIO, false);
		break;
	case FAULT_LOCAL_WRITE:
		session_local_error(w);
		break;
	default:
		w->fault_at_ns = clock_now_ns() + world_random_log(w, 1, 300) * 1000000;
		break;
	}
	w->faults[w->fault]++;
}

/* What happens at a time rather than at a place. */
static void fault_by_time(struct world *w)
{
	if (!w->fault_at_ns || clock_now_ns() < w->fault_at_ns)
		return;
	w->fault_at_ns = 0;
	model_event(&w->model, "%s", fault_name(w->fault));
	if (w->fault == FAULT_STOP)
		w->stop_wanted = true;
	else
		session_fence(w);
}

/* --- proof --- */

static void observe(void *opaque, const struct block_request *req)
{
	struct world *w = opaque;
	ck_assert(req->op != BLOCK_WRITE || req->niov == 1);
	witness_observe(w->witness, req->offset_bytes, req->len_bytes,
			req->op == BLOCK_WRITE ? req->iov[0].iov_base : NULL);
}

void session_forget_witness(struct world *w)
{
	shaky_observe(w->remote_shaky, NULL, NULL);
	witness_free(w->witness);
	w->witness = NULL;
}

static void new_witness(struct world *w)
{
	struct error err = ERROR_INIT;
	session_forget_witness(w);
	w->witness_seed = w->seed * 1000u + w->sessions;
	ck_assert_msg(witness_create(&w->remote_shaky->block, w->chunk_bytes, w->witness_seed, &w->witness,
				     &err) == 0,
		      "%s", err.message);
	shaky_observe(w->remote_shaky, observe, w);
}

static int remote_hashes(void *opaque, uint64_t first, unsigned n, struct mirror_hash *out, struct error *err)
{
	struct world *w = opaque;
	return witness_hashes(w->witness, first, n, out, err);
}

static int verify(struct world *w, bool adopt, struct error *err)
{
	struct mirror_verify_options opt = {
		.adopt = adopt, .seed = w->witness_seed, .remote_hashes = remote_hashes, .opaque = w};
	struct mirror_verify_result result;
	int rc = mirror_verify(w->mirror, &opt, &result, err);
	model_event(&w->model, "%s: %d, %llu chunks, %llu agreed, %llu differed, %llu retried",
		    adopt ? "adopted" : "verified", rc, (unsigned long long)result.chunks,
		    (unsigned long long)result.agreed, (unsigned long long)result.differed,
		    (unsigned long long)result.retried);
	if (rc == -EILSEQ)
		model_fail(&w->model, result.bad_offset, result.bad_len, "verification: %s", err->message);
	return rc;
}

void session_compare_sums(struct world *w)
{
	static struct mirror_sums sums;
	struct error err = ERROR_INIT;
	struct mirror_hash root = witness_root(w->witness);
	if (!mirror_sums(w->mirror, &sums))
		model_fail(&w->model, 0, 0, "all is verified, but there are no sums");
	if (root.low != sums.root.low || root.high != sums.root.high)
		model_fail(
			&w->model, 0, 0,
			"the roots differ: %016llx%016llx at the source, %016llx%016llx at the destination",
			(unsigned long long)sums.root.high, (unsigned long long)sums.root.low,
			(unsigned long long)root.high, (unsigned long long)root.low);
	if (witness_compare(w->witness, &sums, &err))
		model_fail(&w->model, 0, 0, "sums: %s", err.message);
	w->proofs++;
}

/* --- the source --- */

static struct block *connect_client(struct world *w)
{
	int ours[WIRES_MAX], theirs[WIRES_MAX];
	for (unsigned i = 0; i < w->connections; i++) {
		w->wires[i] = wire_create(w->tcp, &ours[i], &theirs[i]);
		if (w->slow) {
			uint64_t bytes_per_ms = world_random_log(w, 4 << 10, 200 << 10);
			wire_pace(w->wires[i], bytes_per_ms, world_random(w, 2) * 200);
			if (i == 0 || bytes_per_ms < w->bytes_per_ms)
				w->bytes_per_ms = bytes_per_ms;
		}
	}
	serve(w, theirs, w->connections);
	/* Short: what is lost by a silent link is given up after this long. */
	struct nbd_client_options opt = {.export_name = "disk", .label = "remote", .timeout_ms = 1000};
	if (!w->faults_left)
		opt.timeout_ms = PATIENT_MS;
	struct block *remote = NULL;
	struct error err = ERROR_INIT;
	ck_assert_msg(nbd_client_open(ours, w->connections, &opt, &remote, &err) == 0, "seed %u: %s", w->seed,
		      err.message);
	return remote;
}

void session_forget_wires(struct world *w)
{
	for (unsigned i = 0; i < WIRES_MAX; i++)
		if (w->old_wires[i]) {
			wire_free(w->old_wires[i]);
			w->old_wires[i] = NULL;
		}
}

void session_open(struct world *w, enum start how)
{
	bool last = !w->faults_left, buffered = world_random(w, 3) == 0;
	uint64_t buffer_bytes = buffered ? world_random_log(w, MIRROR_BUFFER_MIN_BYTES, 64u << 20) : 0;
	w->buffered += buffered;
	static const char *const names[] = {[START_FIRST] = "first",
					    [START_KEEP_MAP] = "map kept",
					    [START_OVER] = "from the beginning",
					    [START_ADOPT] = "adopts"};
	if (how == START_OVER || how == START_ADOPT)
		w->remote_is_zero = false; /* and with keep_map, later */
	if (how != START_KEEP_MAP)
		new_witness(w);
	struct block *remote = connect_client(w);
	/* A copy of one small chunk at a time waits for its share of what a guest has queued: not for
	 * minutes. */
	if (w->slow && buffer_bytes > BUFFERED_MS * w->bytes_per_ms)
		buffer_bytes = BUFFERED_MS * w->bytes_per_ms;
	if (buffered && buffer_bytes < MIRROR_BUFFER_MIN_BYTES)
		buffer_bytes = MIRROR_BUFFER_MIN_BYTES;
	struct mirror_options opt = {
		.remote = remote,
		.remote_is_zero = w->remote_is_zero,
		.keep_map = how == START_KEEP_MAP,
		.hold_pass = how == START_ADOPT,
		.chunk_bytes = w->chunk_bytes,
		.requests_in_flight = 1 + world_random(w, 32),
		.write_grace_ms = last ? PATIENT_MS : 20 + world_random(w, 200),
		.bandwidth = &w->rate,
		.buffered = buffered,
		.buffer_bytes = buffer_bytes,
		.failed = mirror_failed,
		.opaque = w,
	};
	w->sessions++;
	atomic_store(&w->failed_calls, 0);
	plan_fault(w);
	w->starts[how]++;
	model_event(&w->model, "session %u: %s, %s, %s", w->sessions, names[how],
		    buffered ? "buffered" : "synchronous", fault_name(w->fault));
	struct error err = ERROR_INIT;
	ck_assert_msg(mirror_start(w->mirror, &opt, &err) == 0, "seed %u: %s", w->seed, err.message);
	w->open = true;
	w->stop_wanted = false;
	/* What a former link still holds arrives now, if its server would take it. */
	for (unsigned i = 0; i < WIRES_MAX; i++)
		if (w->old_wires[i])
			wire_silence(w->old_wires[i], false, false);
	if (how != START_ADOPT)
		return;
	err = ERROR_INIT;
	verify(w, true, &err); /* what fails ends the session, which is seen soon enough */
	mirror_release_pass(w->mirror);
}

void session_end(struct world *w)
{
	if (!w->open)
		return;
	shaky_fail_once(w->remote_shaky, 0, 0, 0, false);
	shaky_fail_once(w->local_shaky, 0, 0, 0, false);
	/* Replies that come after all, or never. */
	bool late = world_random(w, 2);
	for (unsigned i = 0; late && i < w->connections; i++)
		wire_silence(w->wires[i], false, false);
	mirror_stop(w->mirror);
	session_fence(w);
	session_forget_wires(w);
	memcpy(w->old_wires, w->wires, sizeof w->old_wires);
	memset(w->wires, 0, sizeof w->wires);
	w->open = false;
	model_event(&w->model, "session %u ended", w->sessions);
}

static bool broke(struct world *w, int rc, const struct error *err)
{
	struct mirror_stats st;
	mirror_stats(w->mirror, &st);
	if (!st.failed)
		model_fail(&w->model, 0, 0, "%d (%s), but the session has not failed", rc, err->message);
	w->broken++;
	return false;
}

bool session_sync(struct world *w)
{
	uint64_t until = clock_now_ns() + HANG_S * UINT64_C(1000000000);
	for (;;) {
		struct error err = ERROR_INIT;
		struct mirror_stats st;
		int rc = mirror_wait_synced(w->mirror, 1 + world_random(w, 20), &err);
		if (rc == 0)
			return true;
		mirror_stats(w->mirror, &st);
		if (rc != -ETIMEDOUT || st.failed)
			return broke(w, rc, &err);
		if (clock_now_ns() > until)
			model_fail(&w->model, 0, 0, "not synced after %d s: %llu of %llu bytes", HANG_S,
				   (unsigned long long)st.synced_bytes, (unsigned long long)st.total_bytes);
		if (world_random(w, 8) == 0)
			rate_limit_set(&w->rate,
				       world_random(w, 3) ? 0 : world_random_log(w, 8 << 20, 400 << 20));
		fault_by_time(w);
		if (w->stop_wanted)
			return false;
	}
}

bool session_flush(struct world *w)
{
	struct error err = ERROR_INIT;
	int rc = mirror_flush_remote(w->mirror, &err);
	return rc ? broke(w, rc, &err) : true;
}

/* The comparison reads the source's disk by itself: an error there ends the move, as it does in broke(), and
 * the session is whole. */
static bool read_error_met(const struct world *w, int rc)
{
	return rc == -EIO && w->fault == FAULT_LOCAL_READ;
}

bool session_verify(struct world *w)
{
	uint64_t until = clock_now_ns() + HANG_S * UINT64_C(1000000000);
	for (;;) {
		struct error err = ERROR_INIT;
		int rc = verify(w, false, &err);
		if (rc == 0)
			return true;
		if (read_error_met(w, rc)) {
			w->broken++;
			return false;
		}
		/* EBUSY: the destination was too slow for the guest; a move asks again, too */
		if (rc != -EAGAIN && (rc != -EBUSY || clock_now_ns() > until))
			return broke(w, rc, &err);
		if (!session_sync(w))
			return false;
	}
}
