/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
#include "tests/storage-model/world.h"

#define KIB	       UINT64_C(1024)
#define MIB	       (KIB * KIB)
#define PRESET_NUMBER  0xf0000000u /* of what the source's disk holds at first */
#define FOREIGN_NUMBER 0xff000000u /* of what the destination's does */
#define SETTLES_MAX    60

#if defined(__SANITIZE_THREAD__)
#define MAY_CHANGE_BUFFERS false /* what the guest may do is a data race by definition */
#else
#define MAY_CHANGE_BUFFERS true
#endif

unsigned world_random(struct world *w, unsigned below)
{
	return (unsigned)rand_r(&w->rng) % below;
}

uint64_t world_random_log(struct world *w, uint64_t least, uint64_t most)
{
	unsigned shifts = 0;
	while (least << (shifts + 1) <= most)
		shifts++;
	uint64_t n = least << world_random(w, shifts + 1);
	n += (uint64_t)rand_r(&w->rng) % n;
	return n > most ? most : n;
}

/* --- the plan and the disks --- */

static void fill(struct world *w, struct disk *d, unsigned pieces, uint32_t number, bool known)
{
	uint8_t *buf = malloc(2 * MIB);
	for (unsigned i = 0; i < pieces; i++) {
		uint64_t len = world_random_log(w, SECTOR_BYTES, 2 * MIB) & ~(uint64_t)(SECTOR_BYTES - 1);
		uint64_t at = world_random(w, (unsigned)((d->size_bytes - len) / SECTOR_BYTES)) *
			      (uint64_t)SECTOR_BYTES;
		bool zero = known && world_random(w, 6) == 0; /* allocated, and yet zeroes */
		model_fill(buf, at, len, zero ? 0 : number + i);
		if (zero && world_random(w, 2))
			ck_assert_int_eq(block_zero(d->block, at, len, 0), 0);
		else
			ck_assert_int_eq(block_pwrite(d->block, buf, len, at), 0);
		if (known)
			model_preset(&w->model, at, len, zero ? 0 : number + i);
	}
	free(buf);
}

static void plan(struct world *w)
{
	static const uint32_t chunks[] = {4096, 16384, 65536, 262144, 1048576};
	w->tcp = world_random(w, 2);
	w->slow = world_random(w, 2);
	w->connections = 1 + (world_random(w, 2) ? world_random(w, WIRES_MAX) : 0);
	w->faults_left = world_random(w, 5);
	w->handovers = 1 + world_random(w, 3);
	w->chunk_bytes = chunks[world_random(w, 5)];
	w->remote_is_zero = world_random(w, 3) != 0;
	w->proof = world_random(w, 3) != 0;
}

static enum disk_kind random_kind(struct world *w)
{
	static const enum disk_kind kinds[] = {DISK_RAW,   DISK_RAW,  DISK_RAW,	 DISK_RAW_BUFFERED,
					       DISK_LOOP,  DISK_LOOP, DISK_LOOP, DISK_LOOP,
					       DISK_QCOW2, DISK_QCOW2};
	return kinds[world_random(w, 10)];
}

/* False: this machine cannot. */
static bool make_disks(struct world *w)
{
	static const uint32_t clusters[] = {65536, 65536, 4096, 524288};
	enum disk_kind kinds[2] = {random_kind(w), random_kind(w)};
	for (unsigned i = 0; i < 2; i++) {
		const char *missing = disk_kind_missing(kinds[i]);
		if (missing) {
			printf("skipped: storage model, seed %u: %s\n", w->seed, missing);
			return false;
		}
	}
	/* Not more than some hundred chunks: each may have to be compared alone, one after another. */
	unsigned least = w->chunk_bytes < 65536 ? 3 : 6, more = w->chunk_bytes < 65536 ? 3 : 19;
	uint64_t size = (least + world_random(w, more)) * MIB +
			world_random(w, 2) * world_random(w, 2000) * SECTOR_BYTES;
	const char *tmp = getenv("TMPDIR");
	snprintf(w->dir, sizeof w->dir, "%.40s/storage-model.XXXXXX", tmp && strlen(tmp) < 40 ? tmp : "/tmp");
	ck_assert_ptr_nonnull(mkdtemp(w->dir));
	disk_create(&w->local, kinds[0], w->dir, "local", size, clusters[world_random(w, 4)]);
	disk_create(&w->remote, kinds[1], w->dir, "remote", size, clusters[world_random(w, 4)]);
	model_init(&w->model, size, w->seed);
	disk_open(&w->local);
	disk_open(&w->remote);
	fill(w, &w->local, 4 + world_random(w, 24), PRESET_NUMBER, true);
	if (!w->remote_is_zero)
		fill(w, &w->remote, 24, FOREIGN_NUMBER, false);
	w->local_shaky = shaky_create(w->local.block, w->seed);
	w->remote_shaky = shaky_create(w->remote.block, w->seed + 1);
	w->remote_shaky->count_overlaps = true;
	shaky_fence(w->remote_shaky, true);
	if (world_random(w, 3) == 0)
		shaky_delay(w->local_shaky, 1 + world_random(w, w->chunk_bytes < 65536 ? 100 : 2000));
	if (world_random(w, 3) == 0)
		shaky_delay(w->remote_shaky, 1 + world_random(w, w->chunk_bytes < 65536 ? 200 : 4000));
	return true;
}

static void make_guest(struct world *w)
{
	static const unsigned paces[] = {0, 0, 50, 500};
	uint64_t size = w->local.size_bytes, hot = world_random_log(w, 64 * KIB, 4 * MIB) & ~(uint64_t)4095;
	hot = hot < size / 2 ? hot : size / 2 & ~(uint64_t)4095;
	/* Each chunk waits its turn behind all writes that touch it: not all of them behind all. */
	unsigned largest = w->chunk_bytes < GUEST_REQUEST_MAX / 32 ? w->chunk_bytes * 32 : GUEST_REQUEST_MAX;
	struct guest_options opt = {
		.seed = (unsigned)rand_r(&w->rng),
		.depth = 1 + world_random(w, GUEST_DEPTH_MAX),
		.pace_us = paces[world_random(w, 4)],
		.largest_bytes = (unsigned)world_random_log(w, 4096, largest),
		.overlaps_per_1000 = world_random(w, 2) * 20,
		.wild_per_1000 = MAY_CHANGE_BUFFERS ? world_random(w, 2) * 10 : 0,
		.hot_bytes = hot,
		.hot_offset =
			world_random(w, (unsigned)((size - hot) / SECTOR_BYTES)) * (uint64_t)SECTOR_BYTES,
		.from_callback = world_random(w, 2),
		.errors_allowed = true,
	};
	guest_create(&w->guest, &w->model, &opt);
}

/* --- between sessions --- */

static void start_mirror(struct world *w)
{
	struct error err = ERROR_INIT;
	ck_assert_msg(mirror_create(&w->local_shaky->block, &w->mirror, &w->top, &err) == 0, "%s",
		      err.message);
}

/* Something of what a source that was killed had under way. */
static void scribble(struct world *w)
{
	shaky_fence(w->remote_shaky, false);
	fill(w, &w->remote, world_random(w, 6), FOREIGN_NUMBER, false);
	shaky_fence(w->remote_shaky, true);
}

/* The source starts anew: what it knew of the destination is lost. */
static void restart_source(struct world *w)
{
	model_event(&w->model, "the source starts anew");
	guest_quiesce(&w->guest);
	session_end(w);
	session_forget_witness(w);
	mirror_free(w->mirror);
	scribble(w);
	start_mirror(w);
	w->mirror_is_new = true;
	guest_run(&w->guest, w->top);
}

static void next_session(struct world *w)
{
	enum start how = world_random(w, 6) ? START_KEEP_MAP : START_OVER;
	if (!w->sessions)
		how = START_FIRST;
	else if (w->mirror_is_new)
		how = world_random(w, 4) ? START_ADOPT : START_OVER;
	w->mirror_is_new = false;
	session_open(w, how);
}

/* --- judging --- */

static void check_extents(struct world *w, struct disk *d, const char *who)
{
	uint64_t at = 0;
	while (at < d->size_bytes) {
		struct block_extent x[32];
		unsigned n = 32;
		struct error err = ERROR_INIT;
		ck_assert_msg(block_extents(d->block, at, d->size_bytes - at, x, &n, &err) == 0, "%s",
			      err.message);
		ck_assert_uint_gt(n, 0);
		for (unsigned i = 0; i < n; at += x[i++].len_bytes)
			if (x[i].zero || x[i].hole)
				model_expect_zero(&w->model, at, x[i].len_bytes, who);
	}
}

static void check_watchers(struct world *w)
{
	if (w->remote_shaky->overlaps)
		model_fail(&w->model, 0, 0, "%u overlapping changes were in flight at the destination",
			   w->remote_shaky->overlaps);
	if (w->remote_shaky->while_fenced)
		model_fail(&w->model, 0, 0, "%u requests came to the destination's disk while it was fenced",
			   w->remote_shaky->while_fenced);
	if (w->guest.errors && !shaky_failures(w->local_shaky))
		model_fail(&w->model, 0, 0, "the guest got %u errors, and its disk had none",
			   w->guest.errors);
}

static void check_durable(struct world *w, struct shaky *disk, const char *who)
{
	for (uint64_t s = 0; s < w->model.nsectors; s++)
		if (model_must_be_durable(&w->model, s) && shaky_is_volatile(disk, s))
			model_fail(&w->model, s * SECTOR_BYTES, SECTOR_BYTES,
				   "handover %u: offset %llu was flushed, and is not durable at %s",
				   w->handovers_done, (unsigned long long)s * SECTOR_BYTES, who);
}

static void judge(struct world *w, bool remote_flushed)
{
	char when[64];
	snprintf(when, sizeof when, "handover %u", w->handovers_done);
	if (remote_flushed && !shaky_all_durable(w->remote_shaky))
		model_fail(&w->model, 0, 0, "%s: the destination was flushed, and not all is durable there",
			   when);
	check_durable(w, w->local_shaky, "the source");
	check_durable(w, w->remote_shaky, "the destination");
	uint8_t *local = disk_content(&w->local), *remote = disk_content(&w->remote);
	model_compare(&w->model, local, remote, when);
	free(local);
	free(remote);
	check_extents(w, &w->local, "the source");
	check_extents(w, &w->remote, "the destination");
	check_watchers(w);
}

/* --- the way to a handover --- */

/* The guest is quiesced, and both sides are as they have to be; or the session broke, or fell behind. */
static bool settle(struct world *w, bool *remote_flushed)
{
	if (!session_sync(w))
		return false;
	guest_wait_answers(&w->guest, world_random(w, 80));
	if (!session_sync(w))
		return false;
	if (w->proof && !session_verify(w))
		return false;
	bool quiet = world_random(w, 3) == 0;
	if (quiet)
		guest_quiesce(&w->guest);
	if (!session_flush(w))
		return false;
	if (!quiet) {
		if (world_random(w, 4) == 0)
			session_local_error(w);
		guest_wait_answers(&w->guest, world_random(w, 40));
		guest_quiesce(&w->guest);
	}
	if (!mirror_is_consistent(w->mirror))
		return false;
	*remote_flushed = quiet;
	if (world_random(w, 2) && block_flush(w->top) == 0)
		model_flushed(&w->model);
	/* A session that broke in between took some of the proof with it. */
	if (w->proof && !mirror_is_verified(w->mirror))
		return false;
	/* The flush itself may have found the session broken. */
	return mirror_is_consistent(w->mirror);
}

static void reach_handover(struct world *w)
{
	bool remote_flushed = false;
	for (unsigned tries = 0;; tries++) {
		if (tries > SETTLES_MAX)
			model_fail(&w->model, 0, 0, "no handover in %u tries", tries);
		guest_run(&w->guest, w->top);
		if (!w->open)
			next_session(w);
		w->settles++;
		if (settle(w, &remote_flushed))
			break;
		struct mirror_stats st;
		mirror_stats(w->mirror, &st);
		model_event(&w->model, "not settled%s", st.failed ? ": the session broke" : "");
		guest_run(&w->guest, w->top);
		guest_wait_answers(&w->guest, world_random(w, 30));
		if (st.failed || w->stop_wanted || world_random(w, 4) == 0)
			session_end(w);
		guest_wait_answers(&w->guest, world_random(w, 30));
		if (world_random(w, 8) == 0)
			restart_source(w);
	}
	w->handovers_done++;
	if (w->proof)
		session_compare_sums(w);
	model_event(&w->model, "handover %u", w->handovers_done);
	if (world_random(w, 2))
		session_fence(w);
	judge(w, remote_flushed);
}

static void summary(struct world *w)
{
	printf("seed %u: %s -> %s, %llu KiB, chunks of %u KiB, %u connections%s; %zu requests at depth %u, "
	       "%u sessions, %u buffered, %u "
	       "broken (",
	       w->seed, disk_kind_name(w->local.kind), disk_kind_name(w->remote.kind),
	       (unsigned long long)(w->local.size_bytes / KIB), w->chunk_bytes / 1024, w->connections,
	       w->tcp ? " by TCP" : "", w->model.nops, w->guest.opt.depth, w->sessions, w->buffered,
	       w->broken);
	bool any = false;
	for (unsigned i = 1; i < FAULTS; i++)
		if (w->faults[i]) {
			printf("%s%s", any ? ", " : "", fault_name((enum fault)i));
			any = true;
		}
	printf("%s), %u adopted, %u handovers, %u proofs, %.1f s\n", any ? "" : "no fault",
	       w->starts[START_ADOPT], w->handovers_done, w->proofs,
	       (double)(clock_now_ns() - w->model.begin_ns) / 1e9);
	fflush(stdout);
}

/* rand_r's first numbers are alike for seeds that are neighbours: MurmurHash3's finalizer. */
static unsigned scatter(unsigned x)
{
	x = (x ^ x >> 16) * 0x85ebca6bu;
	x = (x ^ x >> 13) * 0xc2b2ae35u;
	return x ^ x >> 16;
}

void run_seed(unsigned seed)
{
	struct world *w = calloc(1, sizeof *w);
	w->seed = seed;
	w->rng = scatter(seed);
	atomic_init(&w->failed_calls, 0);
	rate_limit_init(&w->rate, 0);
	plan(w);
	if (!make_disks(w)) {
		free(w);
		return;
	}
	start_mirror(w);
	make_guest(w);
	guest_run(&w->guest, w->top);
	guest_wait_answers(&w->guest, world_random(w, 60));
	for (;;) {
		reach_handover(w);
		if (w->handovers_done == w->handovers)
			break;
		if (world_random(w, 2))
			session_end(w);
		if (world_random(w, 3) == 0)
			restart_source(w);
	}
	session_end(w);
	session_forget_witness(w);
	session_forget_wires(w);
	guest_destroy(&w->guest);
	mirror_free(w->mirror);
	shaky_free(w->local_shaky);
	shaky_free(w->remote_shaky);
	disk_close(&w->local);
	disk_close(&w->remote);
	uint8_t *local = disk_foreign_content(&w->local), *remote = disk_foreign_content(&w->remote);
	model_compare(&w->model, local, remote, "after all was closed");
	free(local);
	free(remote);
	summary(w);
	disk_remove(&w->local);
	disk_remove(&w->remote);
	rmdir(w->dir);
	model_free(&w->model);
	rate_limit_destroy(&w->rate);
	free(w);
}
