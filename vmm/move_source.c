/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/move_source.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/bitmap.h"
#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/log.h"
#include "host/ask.h"
#include "host/exit.h"
#include "vmm/state.h"

/* A destination may open big images and 64 vCPUs before it answers; it beats meanwhile. */
#define HELLO_TIMEOUT_MS    120000
#define HANDOVER_ATTEMPTS   3
#define RECORD_RETRY_MS	    500
#define FILE_CHUNK_BYTES    (1u << 20)
#define DOWNTIME_DEFAULT_MS 50
#define ROUNDS_DEFAULT	    30

static int get_uint(json_t *o, const char *key, unsigned max, unsigned *out, struct error *err)
{
	json_t *v = json_object_get(o, key);
	if (!v || json_is_null(v))
		return 0;
	if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > max)
		return error_set(err, EINVAL, "option %s: a whole number from 0 to %u is needed", key, max);
	*out = (unsigned)json_integer_value(v);
	return 0;
}

int move_options_parse(json_t *request, struct move_options *opt, struct error *err)
{
	memset(opt, 0, sizeof *opt);
	const char *address = json_string_value(json_object_get(request, "address"));
	const char *peer = json_string_value(json_object_get(request, "peer"));
	json_t *epoch = json_object_get(request, "epoch");
	json_t *o = json_object_get(request, "options");
	if (!address || !peer || strlen(address) >= sizeof opt->address || strlen(peer) >= sizeof opt->peer)
		return error_set(err, EINVAL, "migrate: address and peer are needed");
	if (!json_is_integer(epoch) || json_integer_value(epoch) <= 0)
		return error_set(err, EINVAL, "migrate: an epoch is needed");
	strcpy(opt->address, address);
	strcpy(opt->peer, peer);
	opt->epoch = (uint64_t)json_integer_value(epoch);
	opt->max_downtime_ms = DOWNTIME_DEFAULT_MS;
	opt->max_rounds = ROUNDS_DEFAULT;
	long ncpu = sysconf(_SC_NPROCESSORS_ONLN);
	opt->streams = ncpu < 1 ? 1 : ncpu > 4 ? 4 : (unsigned)ncpu;
	opt->zstd_level = 1;
	int rc = get_uint(o, "max_downtime_ms", 600000, &opt->max_downtime_ms, err);
	if (!rc)
		rc = get_uint(o, "streams", MEM_STREAMS_MAX, &opt->streams, err);
	if (!rc)
		rc = get_uint(o, "max_rounds", 10000, &opt->max_rounds, err);
	if (!rc)
		rc = get_uint(o, "max_time_ms", 86400000, &opt->max_time_ms, err);
	if (rc)
		return rc;
	if (!opt->streams)
		opt->streams = 1;
	json_t *level = json_object_get(o, "zstd_level");
	if (json_is_integer(level))
		opt->zstd_level = (int)json_integer_value(level);
	opt->keep_source = json_is_true(json_object_get(o, "keep_source"));
	opt->suspend = json_is_true(json_object_get(o, "suspend"));
	opt->no_tls = json_is_true(json_object_get(o, "no_tls"));
	return 0;
}

/* --- interruption --- */

/* Threads other than the move's own count themselves while they use the link. */
static void link_put(struct move *mv)
{
	SCOPE_LOCK(&mv->lock);
	mv->link_users--;
	pthread_cond_broadcast(&mv->changed);
}

void source_interrupt(struct move *mv, const struct error *why)
{
	pthread_mutex_lock(&mv->lock);
	if (mv->commit || mv->interrupted || mv->phase == MOVE_ENDED) {
		pthread_mutex_unlock(&mv->lock);
		return;
	}
	mv->interrupted = true;
	mv->why = *why;
	if (mv->sender)
		mem_sender_cancel(mv->sender);
	if (mv->mirrors_on)
		for (unsigned i = 0; i < mv->vm->def.ndisks; i++)
			mirror_cancel(mv->vm->disks[i].mirror);
	for (unsigned i = 0; i < mv->nmemory; i++)
		conn_shutdown(mv->memory[i]);
	struct move_link *link = mv->link;
	if (link)
		mv->link_users++;
	pthread_cond_broadcast(&mv->changed);
	pthread_mutex_unlock(&mv->lock);
	if (link) {
		move_link_fail(link, why);
		link_put(mv);
	}
}

int source_check(struct move *mv, struct error *err)
{
	SCOPE_LOCK(&mv->lock);
	if (mv->interrupted)
		error_copy(err, &mv->why);
	return mv->interrupted ? mv->why.code : 0;
}

static void link_failed(void *opaque, const struct error *why)
{
	source_interrupt(opaque, why);
}

/* --- hello --- */

static json_t *populated_regions(struct move *mv)
{
	struct mem_space space = machine_memory_space(mv->vm->machine);
	uint64_t n = (space.npages * MEM_PAGE_BYTES + MEM_REGION_BYTES - 1) / MEM_REGION_BYTES;
	CLEANUP_FREE uint64_t *map = bitmap_alloc(n);
	json_t *runs = json_array();
	if (!map || mem_populated_regions(&space, map, NULL))
		return runs;
	for (size_t at = bitmap_next_set(map, n, 0); at < n;) {
		size_t end = bitmap_next_clear(map, n, at);
		json_array_append_new(runs, json_pack("[I, I]", (json_int_t)at, (json_int_t)(end - at)));
		at = bitmap_next_set(map, n, end);
	}
	return runs;
}

struct travel_file {
	const char *name;
	char path[8400];
	uint64_t size;
};

/* The definition as the destination is to have it: every path a plain name in the VM's folder. */
static char *foreign_definition(struct vm *vm)
{
	CLEANUP_FREE struct vm_definition *def = malloc(sizeof *def);
	if (!def)
		return NULL;
	*def = vm->def;
	snprintf(def->kernel, sizeof def->kernel, "kernel");
	if (def->initrd[0])
		snprintf(def->initrd, sizeof def->initrd, "initrd");
	snprintf(def->serial, sizeof def->serial, "socket");
	for (unsigned i = 0; i < def->ndisks; i++)
		snprintf(def->disks[i].path, sizeof def->disks[i].path, "%s.%s", vm->def.disks[i].id,
			 vm->def.disks[i].format);
	return vmdef_format(def);
}

static int travel_files(struct vm *vm, struct travel_file files[2], unsigned *n, struct error *err)
{
	const char *paths[2] = {vm->def.kernel, vm->def.initrd};
	static const char *const names[2] = {"kernel", "initrd"};
	*n = 0;
	for (unsigned i = 0; i < 2; i++) {
		if (!paths[i][0])
			continue;
		struct travel_file *f = &files[*n];
		f->name = names[i];
		int rc = vm_resolve_path(vm, paths[i], f->path, sizeof f->path, err);
		if (rc)
			return rc;
		struct stat st;
		if (stat(f->path, &st))
			return error_errno(err, errno, "%s", f->path);
		f->size = (uint64_t)st.st_size;
		(*n)++;
	}
	return 0;
}

static json_t *make_hello(struct move *mv, struct travel_file *files, unsigned nfiles, struct error *err)
{
	struct vm *vm = mv->vm;
	CLEANUP_FREE char *def = foreign_definition(vm);
	json_t *cpu = machine_cpu_describe(vm->machine, err);
	if (!def || !cpu) {
		if (cpu)
			error_errno(err, ENOMEM, "hello");
		json_decref(cpu);
		return NULL;
	}
	json_t *fs = json_array(), *disks = json_array();
	for (unsigned i = 0; i < nfiles; i++)
		json_array_append_new(fs, json_pack("{s:s, s:I}", "name", files[i].name, "size",
						    (json_int_t)files[i].size));
	for (unsigned i = 0; i < vm->def.ndisks; i++) {
		const struct block_image_info *in = &vm->disks[i].info;
		struct block_image_info now;
		/* what is allocated has changed since the VM started */
		char path[8400];
		vm_resolve_path(vm, vm->def.disks[i].path, path, sizeof path, NULL);
		struct stat st;
		now = *in;
		if (!stat(path, &st) && S_ISREG(st.st_mode))
			now.allocated_bytes = (uint64_t)st.st_blocks * 512;
		vm->disks[i].info.allocated_bytes = now.allocated_bytes;
		json_array_append_new(disks,
				      json_pack("{s:s, s:s, s:I, s:I, s:i, s:s, s:b, s:b, s:b}", "id",
						vm->def.disks[i].id, "format", vm->def.disks[i].format,
						"virtual_bytes", (json_int_t)vm->disks[i].local->size_bytes,
						"allocated_bytes", (json_int_t)now.allocated_bytes,
						"cluster_bytes", (int)now.cluster_bytes, "compat", now.compat,
						"lazy_refcounts", now.lazy_refcounts, "extended_l2",
						now.extended_l2, "read_only", vm->def.disks[i].read_only));
	}
	json_t *hello = json_pack(
		"{s:[i,i], s:s, s:s, s:s, s:s, s:s, s:o, s:o, s:o, s:I, s:i, s:o, s:b, s:b}", "versions",
		MOVE_PROTOCOL_MIN, MOVE_PROTOCOL_MAX, "program", SNM_VERSION, "host", vm->cfg->name, "uuid",
		vm->def.uuid, "name", vm->def.name, "definition", def, "files", fs, "disks", disks, "cpu",
		cpu, "memory_bytes", (json_int_t)vm->def.memory_bytes, "streams", (int)mv->opt.streams,
		"regions", populated_regions(mv), "suspend", mv->opt.suspend, "no_tls", mv->opt.no_tls);
	if (!hello) {
		error_errno(err, ENOMEM, "hello");
		return NULL;
	}
	/* What is left at the destination of an earlier attempt is settled by what this side says of itself.
	 */
	struct vm_record rec;
	struct handover_report own;
	struct handover_self self = {.live = true, .channel_up = true, .attempt_open = true};
	if (!vm_record(vm, &rec, NULL)) {
		handover_describe(&rec, &self, true, &own);
		json_object_set_new(hello, "report", ask_report_to_json(vm->def.uuid, &own));
	}
	return hello;
}

static int take_tokens(json_t *reply, const char *key, char (*out)[64], unsigned n, struct error *err)
{
	json_t *a = json_object_get(reply, key);
	if (json_array_size(a) != n)
		return error_set(err, EPROTO, "hello: the destination gave %zu %s for %u", json_array_size(a),
				 key, n);
	for (unsigned i = 0; i < n; i++) {
		const char *t = json_string_value(json_array_get(a, i));
		if (!t || strlen(t) != TOKEN_HEX_CHARS)
			return error_set(err, EPROTO, "hello: malformed %s", key);
		strcpy(out[i], t);
	}
	return 0;
}

static int send_files(struct move *mv, struct travel_file *files, unsigned nfiles, struct error *err)
{
	CLEANUP_FREE uint8_t *buf = malloc(FILE_CHUNK_BYTES + 12);
	if (!buf)
		return error_errno(err, ENOMEM, "files");
	for (unsigned i = 0; i < nfiles; i++) {
		CLEANUP_FD int fd = open(files[i].path, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			return error_errno(err, errno, "%s", files[i].path);
		for (uint64_t at = 0; at < files[i].size;) {
			ssize_t n = pread(fd, buf + 12, FILE_CHUNK_BYTES, (off_t)at);
			if (n <= 0)
				return error_errno(err, n ? errno : EIO, "%s: read at %llu", files[i].path,
						   (unsigned long long)at);
			put_be32(buf, i);
			put_be64(buf + 4, at);
			int rc = move_link_send_bytes(mv->link, FRAME_FILE, buf, (uint32_t)n + 12, err);
			if (rc)
				return rc;
			at += (uint64_t)n;
		}
	}
	return 0;
}

/* The attempt's epoch is durable before the destination hears of it: it is never used twice. */
static int record_attempt(struct move *mv, struct error *err)
{
	struct vm_record rec;
	int rc = vm_record(mv->vm, &rec, err);
	if (rc)
		return rc;
	struct vm_transition t = {
		.from = HANDOVER_OWNER,
		.from_epoch = rec.epoch,
		.to = HANDOVER_OWNER,
		.to_epoch = mv->opt.epoch,
		.peer = mv->opt.peer,
		.peer_address = mv->opt.address,
		.flags_set = mv->opt.keep_source ? RECORD_KEEP_SOURCE : 0,
		.flags_clear = mv->opt.keep_source ? 0 : RECORD_KEEP_SOURCE,
	};
	return vm_record_transition(mv->vm, &t, err);
}

static int connect_and_hello(struct move *mv, struct error *err)
{
	struct vm *vm = mv->vm;
	struct travel_file files[2];
	unsigned nfiles;
	int rc = travel_files(vm, files, &nfiles, err);
	if (!rc)
		rc = tls_context_create(vm->cfg->ca, vm->cfg->cert, vm->cfg->key, &mv->tls, err);
	struct conn *conn = NULL;
	if (!rc)
		rc = source_dial(mv, CHANNEL_CONTROL, "-", &conn, err);
	if (rc)
		return rc;
	struct move_link_options lopt = {
		.conn = conn,
		.epoch = mv->opt.epoch,
		.silence_ms = vm->cfg->silence_ms,
		.failed = link_failed,
		.opaque = mv,
	};
	struct move_link *link;
	rc = move_link_start(&lopt, &link, err);
	if (rc)
		return rc;
	pthread_mutex_lock(&mv->lock);
	mv->link = link;
	pthread_mutex_unlock(&mv->lock);

	rc = record_attempt(mv, err);
	if (rc)
		return rc;
	json_t *hello = make_hello(mv, files, nfiles, err);
	if (!hello)
		return -EIO;
	rc = move_link_send(mv->link, FRAME_HELLO, hello, err);
	json_decref(hello);
	struct frame reply;
	if (!rc)
		rc = move_link_wait(mv->link, 1u << FRAME_HELLO_OK | 1u << FRAME_REFUSE, HELLO_TIMEOUT_MS,
				    &reply, err);
	if (rc)
		return error_prefix(err, "%s", mv->opt.peer);
	if (reply.type == FRAME_REFUSE) {
		const char *s = json_string_value(json_object_get(reply.json, "reason"));
		rc = error_set(err, EPERM, "%s refused: %s", mv->opt.peer, s ? s : "no reason given");
		frame_release(&reply);
		return rc;
	}
	rc = take_tokens(reply.json, "disk_tokens", mv->disk_token, vm->def.ndisks, err);
	if (!rc)
		rc = take_tokens(reply.json, "memory_tokens", mv->memory_token, mv->opt.streams, err);
	frame_release(&reply);
	if (rc)
		return rc;
	mv->negotiated = true;
	fault_point("before-storage");
	rc = source_check(mv, err);
	return rc ? rc : send_files(mv, files, nfiles, err);
}

/* Tells the destination the phase and waits until it is ready for it. */
static int phase_with_peer(struct move *mv, const char *phase, struct error *err)
{
	json_t *o = json_pack("{s:s}", "phase", phase);
	int rc = move_link_send(mv->link, FRAME_PHASE, o, err);
	json_decref(o);
	struct frame f;
	if (!rc)
		rc = move_link_wait(mv->link, 1u << FRAME_PHASE_OK, 0, &f, err);
	if (rc)
		return rc;
	frame_release(&f);
	return 0;
}

static int run_storage(struct move *mv, struct error *err)
{
	source_set_phase(mv, MOVE_STORAGE, "storage");
	int rc = phase_with_peer(mv, "storage", err);
	for (unsigned i = 0; !rc && i < mv->vm->def.ndisks; i++)
		rc = source_storage_open(mv, i, false, err);
	pthread_mutex_lock(&mv->lock);
	mv->mirrors_on = true;
	pthread_mutex_unlock(&mv->lock);
	if (!rc)
		rc = source_storage_sync(mv, err);
	if (!rc) {
		fault_point("in-mirror");
		rc = source_check(mv, err);
	}
	return rc;
}

/* All channels are there before the first disk byte moves: what could be refused later is refused now. */
static int dial_memory(struct move *mv, struct error *err)
{
	for (unsigned i = 0; i < mv->opt.streams; i++) {
		struct conn *c;
		int rc = source_dial(mv, CHANNEL_MEMORY, mv->memory_token[i], &c, err);
		if (rc)
			return rc;
		SCOPE_LOCK(&mv->lock);
		mv->memory[mv->nmemory++] = c;
	}
	return 0;
}

static int open_memory(struct move *mv, struct error *err)
{
	struct vm *vm = mv->vm;
	int rc = phase_with_peer(mv, "memory", err);
	if (rc)
		return rc;
	struct mem_sender_options so = {
		.space = machine_memory_space(vm->machine),
		.dirty = machine_dirty_source(vm->machine),
		.streams = mv->memory,
		.nstreams = mv->nmemory,
		.zstd_level = mv->opt.zstd_level,
		.downtime_target_ms = mv->opt.max_downtime_ms,
		.max_rounds = mv->opt.max_rounds,
		.max_time_ms = mv->opt.max_time_ms,
		.timeout_ms = vm->cfg->silence_ms,
		.epoch = mv->opt.epoch,
	};
	struct mem_sender *s;
	rc = mem_sender_create(&so, &s, err);
	if (rc)
		return error_prefix(err, "memory");
	SCOPE_LOCK(&mv->lock);
	mv->sender = s;
	return 0;
}

static int record_handing_over(struct move *mv, struct error *err)
{
	struct vm_record rec;
	int rc = vm_record(mv->vm, &rec, err);
	if (rc || (rec.state == HANDOVER_HANDING_OVER && rec.epoch == mv->opt.epoch))
		return rc;
	struct vm_transition t = {
		.from = HANDOVER_OWNER,
		.from_epoch = rec.epoch,
		.to = HANDOVER_HANDING_OVER,
		.to_epoch = mv->opt.epoch,
	};
	return vm_record_transition(mv->vm, &t, err);
}

/* Guest paused and drained, disks agree: the last memory and the device state. Until COMMIT everything may
 * fail. */
static int send_last(struct move *mv, struct error *err)
{
	struct state_writer *w = state_writer_create();
	if (!w)
		return error_errno(err, ENOMEM, "device state");
	const uint8_t *buf;
	size_t len;
	int rc = machine_save(mv->vm->machine, w, err);
	if (!rc)
		rc = state_writer_finish(w, &buf, &len, err);
	if (!rc && len > FRAME_STATE_MAX_BYTES)
		rc = error_set(err, E2BIG, "device state of %zu bytes", len);
	if (!rc)
		rc = mem_sender_finish(mv->sender, err);
	if (!rc)
		rc = move_link_send_bytes(mv->link, FRAME_DEVICE_STATE, buf, (uint32_t)len, err);
	state_writer_free(w);
	struct frame f;
	if (!rc)
		rc = move_link_wait(mv->link, 1u << FRAME_READY, mv->vm->cfg->silence_ms, &f, err);
	if (!rc)
		frame_release(&f);
	return rc;
}

static void unpause(struct move *mv)
{
	if (!mv->paused_by_us)
		return;
	struct error e = ERROR_INIT;
	if (machine_start(mv->vm->machine, &e)) {
		log_error("resume: %s", e.message);
		vm_set_state(mv->vm, VM_CRASHED, e.message);
	}
	mv->paused_by_us = false;
	pthread_mutex_lock(&mv->lock);
	mv->deciding = false;
	pthread_mutex_unlock(&mv->lock);
}

/* 0: READY; -EAGAIN: could not quiesce, the guest runs again; else failed. */
static int pause_and_send(struct move *mv, struct error *err)
{
	struct vm *vm = mv->vm;
	/* A resume by a person that has looked at the state already must not start the guest after this. */
	pthread_mutex_lock(&vm->run_lock);
	pthread_mutex_lock(&mv->lock);
	mv->deciding = true;
	pthread_mutex_unlock(&mv->lock);
	mv->was_paused = vm_get_state(vm) == VM_PAUSED;
	mv->pause_us = clock_now_us();
	int rc = machine_pause(vm->machine, err);
	if (!rc)
		mv->paused_by_us = !mv->was_paused;
	pthread_mutex_unlock(&vm->run_lock);
	if (rc)
		return rc;
	rc = machine_drain(vm->machine, vm->cfg->drain_timeout_ms, err);
	if (!rc && !source_storage_consistent(mv))
		rc = error_set(err, ETIMEDOUT, "a disk fell behind at the last moment");
	if (rc == -ETIMEDOUT) {
		unpause(mv);
		return -EAGAIN;
	}
	return rc ? rc : send_last(mv, err);
}

static int run_handover(struct move *mv, struct error *err)
{
	int rc = 0;
	for (mv->attempts = 1;; mv->attempts++) {
		bool limit_hit;
		source_set_phase(mv, MOVE_MEMORY, "memory");
		rc = mem_sender_precopy(mv->sender, &limit_hit, err);
		if (!rc)
			rc = source_storage_flush(mv, err);
		if (!rc && mv->attempts == 1)
			rc = phase_with_peer(mv, "prepare", err);
		if (!rc)
			rc = record_handing_over(mv, err);
		if (rc)
			return rc;
		source_set_phase(mv, MOVE_HANDOVER, "handover");
		rc = pause_and_send(mv, err);
		if (rc != -EAGAIN)
			return rc;
		log_warn("handover attempt %u: %s; the guest runs on", mv->attempts, err ? err->message : "");
		if (mv->attempts == HANDOVER_ATTEMPTS)
			return error_set(err, ETIMEDOUT,
					 "the guest's disks could not be quiesced in %u attempts",
					 mv->attempts);
	}
}

/* Sends COMMIT and learns the outcome: 0 = the destination runs the VM; -ECANCELED = it promised not to. */
static int run_commit(struct move *mv, struct error *err)
{
	fault_point("after-ready");
	if (!source_storage_consistent(mv))
		return error_set(err, EIO, "a disk became unsynced after READY");
	pthread_mutex_lock(&mv->lock);
	if (mv->interrupted) {
		error_copy(err, &mv->why);
		pthread_mutex_unlock(&mv->lock);
		return err ? err->code : -EIO;
	}
	mv->commit = true; /* from here nobody may cancel, and only the destination's word settles */
	mv->phase = MOVE_COMMITTED;
	pthread_mutex_unlock(&mv->lock);
	json_t *o = json_pack("{s:I, s:b}", "stopped_us", (json_int_t)(clock_now_us() - mv->pause_us),
			      "paused", (int)mv->was_paused);
	struct error lost = ERROR_INIT;
	int rc = move_link_send(mv->link, FRAME_COMMIT, o, &lost);
	json_decref(o);
	fault_point("after-commit");
	struct frame f;
	if (!rc)
		rc = move_link_wait(mv->link, 1u << FRAME_RUNNING | 1u << FRAME_ABANDONED, 0, &f, &lost);
	if (!rc) {
		mv->running_us = clock_now_us();
		mv->peer_started = true;
		bool abandoned = f.type == FRAME_ABANDONED;
		const char *s = json_string_value(json_object_get(f.json, "reason"));
		if (abandoned)
			error_set(err, ECANCELED, "%s gave the VM back: %s", mv->opt.peer,
				  s ? s : "no reason given");
		frame_release(&f);
		return abandoned ? -ECANCELED : 0;
	}
	log_warn("after COMMIT: %s", lost.message);
	switch (source_settle(mv, err)) {
	case HANDOVER_ACT_RECORD_MOVED:
		return 0;
	case HANDOVER_ACT_TAKE_BACK:
		return -ECANCELED;
	default:
		return -EOWNERDEAD; /* a person decided, or the process has to end undecided */
	}
}

static void close_channels(struct move *mv)
{
	pthread_mutex_lock(&mv->lock);
	struct mem_sender *s = steal_ptr(mv->sender);
	if (s)
		mem_sender_stats(s, &mv->mem);
	pthread_mutex_unlock(&mv->lock);
	mem_sender_free(s);
	pthread_mutex_lock(&mv->lock);
	unsigned n = mv->nmemory;
	mv->nmemory = 0;
	pthread_mutex_unlock(&mv->lock);
	for (unsigned i = 0; i < n; i++) {
		mv->wire_bytes += conn_bytes_sent(mv->memory[i]);
		conn_close(mv->memory[i]);
		mv->memory[i] = NULL;
	}
	for (unsigned i = 0; i < mv->vm->def.ndisks; i++) {
		struct mirror_stats st;
		mirror_stats(mv->vm->disks[i].mirror, &st);
		mv->disk_bytes += st.data_bytes_copied + st.mirrored_bytes;
	}
	mv->wire_bytes += mv->disk_bytes;
	source_storage_stop(mv);
	pthread_mutex_lock(&mv->lock);
	struct move_link *link = steal_ptr(mv->link);
	while (mv->link_users)
		pthread_cond_wait(&mv->changed, &mv->lock);
	pthread_mutex_unlock(&mv->lock);
	if (link)
		mv->wire_bytes += conn_bytes_sent(move_link_conn(link));
	move_link_free(link);
	tls_context_free(mv->tls);
	mv->tls = NULL;
}

static int record_owner(struct move *mv, const struct error *why, struct error *err)
{
	struct vm_record rec;
	int rc = vm_record(mv->vm, &rec, err);
	if (rc || rec.state != HANDOVER_HANDING_OVER)
		return rc;
	struct vm_transition t = {
		.from = HANDOVER_HANDING_OVER,
		.from_epoch = rec.epoch,
		.to = HANDOVER_OWNER,
		.to_epoch = rec.epoch,
		.flags_clear = RECORD_KEEP_SOURCE,
		.reason = why->message,
	};
	return vm_record_transition(mv->vm, &t, err);
}

/* The move is off; the guest goes on here. The record first: a resumed guest with a handing-over record would
 * be in doubt. A medium that fails for a while must not cost the guest its memory: tried for as long as a
 * silent peer is. */
static bool take_back(struct move *mv, const struct error *why)
{
	struct vm *vm = mv->vm;
	struct error e = ERROR_INIT;
	uint64_t until = clock_now_ms() + SETTLE_SILENCES * (uint64_t)vm->cfg->silence_ms;
	while (record_owner(mv, why, &e)) {
		log_error("record: %s", e.message);
		vm_set_state(vm, VM_IN_DOUBT, e.message);
		if (clock_now_ms() >= until)
			return false;
		clock_sleep_ms(RECORD_RETRY_MS);
		e = ERROR_INIT;
	}
	unpause(mv);
	pthread_mutex_lock(&mv->lock);
	mv->deciding = false;
	pthread_mutex_unlock(&mv->lock);
	struct vm_record rec;
	if (!vm_record(vm, &rec, NULL) && rec.state == HANDOVER_OWNER_UNCONFIRMED &&
	    move_forced_start(vm, &e))
		log_error("%s", e.message);
	if (vm_get_state(vm) == VM_IN_DOUBT)
		vm_set_state(vm, mv->was_paused ? VM_PAUSED : VM_RUNNING, NULL);
	return true;
}

/* What the command hears, told once everything has ended. */
struct outcome {
	const char *result;
	int exit_status;
};

static struct outcome end_failed(struct move *mv, const struct error *why)
{
	if (mv->link && !mv->commit) {
		json_t *o = json_pack("{s:o}", "reason", jsonl_text(why->message));
		move_link_send(mv->link, FRAME_ABORT, o, NULL);
		json_decref(o);
	}
	bool back = take_back(mv, why);
	close_channels(mv);
	pthread_mutex_lock(&mv->vm->lock);
	bool crashed = mv->vm->guest_crashed || mv->vm->state == VM_CRASHED;
	pthread_mutex_unlock(&mv->vm->lock);
	if (!back)
		return (struct outcome){"in-doubt", EXIT_IN_DOUBT};
	if (crashed)
		return (struct outcome){"crashed", EXIT_CRASHED};
	if (mv->cancelled)
		return (struct outcome){"cancelled", EXIT_CANCELLED};
	if (!mv->negotiated)
		return (struct outcome){"refused", EXIT_REFUSED};
	return (struct outcome){"failed", EXIT_FAILED};
}

static int end_moved(struct move *mv, struct error *err)
{
	struct vm *vm = mv->vm;
	struct vm_record rec;
	int rc = vm_record(vm, &rec, err);
	if (!rc && rec.state == HANDOVER_HANDING_OVER) {
		struct vm_transition t = {
			.from = HANDOVER_HANDING_OVER,
			.from_epoch = rec.epoch,
			.to = HANDOVER_MOVED,
			.to_epoch = rec.epoch,
			.flags_set = mv->peer_started ? RECORD_PEER_STARTED : 0,
			.flags_clear = RECORD_POWERED_ON,
		};
		rc = vm_record_transition(vm, &t, err);
	}
	if (rc)
		return rc;
	fault_point("moved-recorded");
	source_set_phase(mv, MOVE_CLEANUP, "cleanup");
	struct frame f;
	if (mv->link && !move_link_failed(mv->link, NULL) &&
	    !move_link_send(mv->link, FRAME_MOVED, NULL, NULL) &&
	    !move_link_wait(mv->link, 1u << FRAME_MOVED_ACK, vm->cfg->silence_ms, &f, NULL)) {
		frame_release(&f);
		if (!vm_record(vm, &rec, NULL)) {
			rec.flags |= RECORD_PEER_ACKED;
			record_store(vm->record, &rec, NULL);
		}
	}
	close_channels(mv);
	return 0;
}

static void *source_thread(void *arg)
{
	struct move *mv = arg;
	struct vm *vm = mv->vm;
	struct error err = ERROR_INIT;
	struct outcome out = {"moved", EXIT_MOVED};
	source_set_phase(mv, MOVE_CONNECT, "connect");
	source_ticker_start(mv);
	int rc = connect_and_hello(mv, &err);
	if (!rc)
		rc = dial_memory(mv, &err);
	if (!rc)
		rc = run_storage(mv, &err);
	if (!rc)
		rc = open_memory(mv, &err);
	if (!rc) {
		fault_point("in-precopy");
		rc = source_check(mv, &err);
	}
	if (!rc)
		rc = run_handover(mv, &err);
	if (!rc)
		rc = run_commit(mv, &err);
	if (!rc) {
		rc = end_moved(mv, &err);
		if (rc) {
			/* The destination runs the VM; this side cannot write it down. It must not resume;
			 * the daemon asks again once this process has ended. */
			log_error("record moved: %s", err.message);
			vm_set_state(vm, VM_IN_DOUBT, err.message);
			close_channels(mv);
			out = (struct outcome){"in-doubt", EXIT_IN_DOUBT};
		} else if (!mv->peer_started) {
			error_set(&err, EOWNERDEAD,
				  "%s owns the VM, but it ended there before it was heard of: it has crashed "
				  "at %s; "
				  "the files here stay until it has been started there",
				  mv->opt.peer, mv->opt.peer);
			out = (struct outcome){"crashed", EXIT_CRASHED};
		}
	} else if (rc == -EOWNERDEAD) {
		close_channels(mv);
		out = (struct outcome){"in-doubt", EXIT_IN_DOUBT};
	} else {
		/* A peer's reason or a cancel beats the error that it caused in some stream. */
		struct error why = ERROR_INIT;
		if (source_check(mv, &why) && why.code)
			err = why;
		if (!err.code)
			error_set(&err, rc, "the move failed");
		log_warn("move to %s ended: %s", mv->opt.peer, err.message);
		out = end_failed(mv, &err);
	}
	source_ticker_stop(mv);
	pthread_mutex_lock(&mv->lock);
	mv->phase = MOVE_ENDED;
	pthread_cond_broadcast(&mv->changed);
	pthread_mutex_unlock(&mv->lock);
	source_emit_end(mv, out.result, out.exit_status, out.exit_status ? err.message : "", true);
	struct vm_record rec;
	if (out.exit_status == EXIT_IN_DOUBT || (!vm_record(vm, &rec, NULL) && rec.state == HANDOVER_MOVED))
		vm_request_quit(vm, 0);
	return NULL;
}

int move_source_start(struct vm *vm, const struct move_options *opt, struct error *err)
{
	enum vm_state state = vm_get_state(vm);
	if (state != VM_RUNNING && state != VM_PAUSED)
		return error_set(err, EBUSY, "VM %s is %s", vm->def.name, vm_state_name(state));
	if (move_is_running(vm))
		return error_set(err, EBUSY, "VM %s is already being moved", vm->def.name);
	struct vm_record rec;
	int rc = vm_record(vm, &rec, err);
	if (!rc)
		rc = handover_may_move(&rec, err);
	if (rc)
		return rc;
	if (opt->epoch <= rec.epoch)
		return error_set(err, ESTALE, "epoch %llu is not above the record's %llu",
				 (unsigned long long)opt->epoch, (unsigned long long)rec.epoch);
	if (opt->no_tls && !vm->cfg->allow_no_tls)
		return error_set(err, EPERM, "--no-tls: [limits] allow-no-tls of %s does not allow it",
				 vm->cfg->path);
	struct move *mv = calloc(1, sizeof *mv);
	if (!mv)
		return error_errno(err, ENOMEM, "move");
	mv->vm = vm;
	mv->opt = *opt;
	mv->t_start_ms = clock_now_ms();
	mv->events = move_events_create();
	pthread_mutex_init(&mv->lock, NULL);
	pthread_condattr_t attr;
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&mv->changed, &attr);
	pthread_condattr_destroy(&attr);
	/* Watchers may still read the former move's events: moves are freed with the process. */
	pthread_mutex_lock(&vm->lock);
	mv->former = vm->move;
	vm->move = mv;
	pthread_mutex_unlock(&vm->lock);
	rc = pthread_create(&mv->thread, NULL, source_thread, mv);
	mv->thread_started = !rc;
	if (rc) {
		mv->phase = MOVE_ENDED;
		return error_errno(err, rc, "move: thread");
	}
	return 0;
}

/* The present move or NULL. It is only replaced while no thread but the control's asks, and freed with the
 * process. */
static struct move *current(struct vm *vm)
{
	SCOPE_LOCK(&vm->lock);
	return vm->move;
}

struct move_events *move_source_events(struct vm *vm)
{
	struct move *mv = current(vm);
	return mv ? mv->events : NULL;
}

bool move_is_running(struct vm *vm)
{
	struct move *mv = current(vm);
	if (!mv)
		return false;
	SCOPE_LOCK(&mv->lock);
	return mv->phase != MOVE_ENDED;
}

bool move_is_deciding(struct vm *vm)
{
	struct move *mv = current(vm);
	if (!mv)
		return false;
	SCOPE_LOCK(&mv->lock);
	return mv->phase != MOVE_ENDED && (mv->deciding || mv->commit);
}

json_t *move_describe(struct vm *vm)
{
	struct move *mv = current(vm);
	if (!mv || !move_is_running(vm))
		return json_null();
	SCOPE_LOCK(&mv->lock);
	return json_pack("{s:s, s:I, s:f, s:I}", "destination", mv->opt.peer, "epoch",
			 (json_int_t)mv->opt.epoch, "percent", mv->percent, "elapsed_ms",
			 (json_int_t)(clock_now_ms() - mv->t_start_ms));
}

int move_source_cancel(struct vm *vm, struct error *err)
{
	struct move *mv = current(vm);
	if (!mv || !move_is_running(vm))
		return error_set(err, ENOENT, "VM %s is not being moved", vm->def.name);
	pthread_mutex_lock(&mv->lock);
	if (mv->commit) {
		pthread_mutex_unlock(&mv->lock);
		return error_set(err, EBUSY, "VM %s has been handed over already: too late to cancel",
				 vm->def.name);
	}
	mv->cancelled = !mv->interrupted;
	pthread_mutex_unlock(&mv->lock);
	struct error why = ERROR_INIT;
	error_set(&why, ECANCELED, "cancelled");
	/* tell the destination before the link is cut on this side */
	pthread_mutex_lock(&mv->lock);
	struct move_link *link = mv->link;
	if (link)
		mv->link_users++;
	pthread_mutex_unlock(&mv->lock);
	if (link) {
		json_t *o = json_pack("{s:s}", "reason", "cancelled at the source");
		move_link_send(link, FRAME_ABORT, o, NULL);
		json_decref(o);
		link_put(mv);
	}
	source_interrupt(mv, &why);
	return 0;
}

void move_source_guest_gone(struct vm *vm, const char *what)
{
	struct move *mv = current(vm);
	if (!mv)
		return;
	struct error why = ERROR_INIT;
	error_set(&why, ECANCELED, "%s", what);
	source_interrupt(mv, &why);
	pthread_mutex_lock(&mv->lock);
	while (mv->phase != MOVE_ENDED)
		pthread_cond_wait(&mv->changed, &mv->lock);
	pthread_mutex_unlock(&mv->lock);
	/* The last line is stored and told before the control socket closes. */
	json_t *last;
	for (int i = 0; !(last = move_events_final(mv->events)) && i < 400; i++)
		clock_sleep_ms(5);
	json_decref(last);
}

int move_source_resolve(struct vm *vm, const char *how, struct error *err)
{
	struct move *mv = current(vm);
	if (!mv || !move_is_running(vm))
		return error_set(err, ENOENT, "VM %s is not in doubt here", vm->def.name);
	SCOPE_LOCK(&mv->lock);
	if (!mv->settle_started)
		return error_set(err, EBUSY, "VM %s is being handed over and not in doubt yet", vm->def.name);
	snprintf(mv->resolve, sizeof mv->resolve, "%s", how);
	mv->resolve_done = false;
	pthread_cond_broadcast(&mv->changed);
	while (!mv->resolve_done && mv->phase != MOVE_ENDED)
		pthread_cond_wait(&mv->changed, &mv->lock);
	if (!mv->resolve_done) /* the other side's word came first */
		return strcmp(how, "ask") ? error_set(err, EBUSY, "VM %s has settled meanwhile", vm->def.name)
					  : 0;
	if (mv->resolve_result.code)
		error_copy(err, &mv->resolve_result);
	return mv->resolve_result.code;
}

void move_source_free(struct vm *vm)
{
	pthread_mutex_lock(&vm->lock);
	struct move *mv = steal_ptr(vm->move);
	pthread_mutex_unlock(&vm->lock);
	while (mv) {
		struct move *former = mv->former;
		struct error why = ERROR_INIT;
		error_set(&why, ECANCELED, "the VM ended");
		source_interrupt(mv, &why); /* one that began after the VM was told to end */
		if (mv->thread_started)
			pthread_join(mv->thread, NULL);
		move_events_free(mv->events);
		pthread_cond_destroy(&mv->changed);
		pthread_mutex_destroy(&mv->lock);
		free(mv);
		mv = former;
	}
}
