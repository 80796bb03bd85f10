/* SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/bitmap.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "host/jsonl.h"
#include "host/registry.h"
#include "vmm/move_source.h"

static const char *phase_word(enum move_phase phase)
{
	static const char *const words[] = {"connect",	 "storage",  "verify",	"memory", "handover",
					    "committed", "postcopy", "cleanup", "ended"};
	return words[phase];
}

/* What the ticker remembers from one second to the next. */
struct report {
	struct move *mv;
	struct mirror_stats disk[VM_DISKS_MAX];
	uint64_t unsynced_bytes[VM_DISKS_MAX]; /* as told so far */
	uint64_t populated_bytes;	       /* of the guest's memory, before it is counted */
	uint64_t done_bytes, total_bytes;
	uint64_t copied_bytes, copied_before, done_before, last_us;
	double progress; /* done bytes a second, smoothed */
	unsigned round;	 /* of the memory, and what it began with */
	uint64_t round_bytes;
	double shrink; /* how much of a round's bytes the next one has; 0 = not known */
};

/* So much guest memory there is to send: what is populated, by regions of 2 MiB. */
uint64_t source_populated_bytes(struct vm *vm)
{
	if (vm->cold)
		return 0;
	struct mem_space space = machine_memory_space(vm->machine);
	uint64_t n = (space.npages * MEM_PAGE_BYTES + MEM_REGION_BYTES - 1) / MEM_REGION_BYTES;
	CLEANUP_FREE uint64_t *map = bitmap_alloc(n);
	if (!map || mem_populated_regions(&space, map, NULL))
		return vm->def.memory_bytes;
	return bitmap_count(map, n) * MEM_REGION_BYTES;
}

/* How the rounds get shorter, or do not. */
static void look_at_rounds(struct report *r)
{
	const struct mem_stats *mem = &r->mv->mem;
	if (mem->round == r->round)
		return;
	if (r->round && r->round_bytes && mem->round > r->round) {
		double ratio =
			pow((double)mem->round_bytes / (double)r->round_bytes, 1.0 / (mem->round - r->round));
		ratio = ratio < 1 ? ratio : 1;
		r->shrink = r->shrink > 0 ? (r->shrink + ratio) / 2 : ratio;
	}
	r->round = mem->round;
	r->round_bytes = mem->round_bytes;
}

/* Bytes moved and to move, over disks and memory: what the per cent is made of. mv->lock held. */
static void look(struct report *r)
{
	struct move *mv = r->mv;
	r->done_bytes = r->total_bytes = r->copied_bytes = 0;
	for (unsigned i = 0; i < mv->vm->def.ndisks; i++) {
		struct mirror_stats *st = &r->disk[i];
		if (source_is_shared(mv, i))
			continue;
		mirror_stats(mv->vm->disks[i].mirror, st);
		if (!st->total_bytes)
			st->total_bytes = mv->vm->disks[i].local->size_bytes;
		/* A hole costs nothing: count what is allocated, in proportion to how far the pass is. */
		uint64_t weight = mv->vm->disks[i].info.allocated_bytes;
		if (!weight)
			weight = st->total_bytes;
		r->total_bytes += weight;
		r->done_bytes += st->total_bytes ? (uint64_t)((double)weight * (double)st->synced_bytes /
							      (double)st->total_bytes)
						 : 0;
		r->copied_bytes += st->data_bytes_copied + st->mirrored_bytes;
	}
	r->total_bytes += mv->layer_total_bytes;
	r->done_bytes += mv->layer_done_bytes;
	/* Reading both sides again, without the wire. */
	uint64_t verified, all;
	source_verify_progress(mv, &verified, &all);
	uint64_t share = r->total_bytes / 4;
	r->done_bytes += all ? (uint64_t)((double)share * (double)verified / (double)all) : 0;
	r->total_bytes += share;
	if (mv->sender)
		mem_sender_stats(mv->sender, &mv->mem);
	if (mv->postcopy.pages && mv->postcopy.began) {
		struct mem_postcopy_stats st;
		mem_postcopy_source_stats(mv->postcopy.pages, &st);
		mv->mem.remaining_bytes = st.missing_pages * MEM_PAGE_BYTES;
	}
	look_at_rounds(r);
	if (mv->mem.total_bytes) {
		r->total_bytes += mv->mem.total_bytes;
		if (mv->mem.remaining_bytes < mv->mem.total_bytes)
			r->done_bytes += mv->mem.total_bytes - mv->mem.remaining_bytes;
	} else {
		r->total_bytes += r->populated_bytes;
	}
}

/* Bytes of the rounds that are still to come, until what is left fits the downtime aimed at or the rounds are
 * used up. */
static double bytes_of_rounds(const struct report *r, double pace)
{
	const struct move_options *opt = &r->mv->opt;
	double sum = 0, next = (double)r->round_bytes * r->shrink;
	for (unsigned n = r->round; n && n < opt->max_rounds && next > pace * opt->max_downtime_ms / 1000;
	     n++) {
		sum += next;
		next *= r->shrink;
	}
	return sum;
}

/* Milliseconds to the end, 0 = not known: the bytes still to move at the pace so far, and in the rounds of
 * the memory what the guest dirties while they travel. */
static uint64_t predict_end_ms(const struct report *r, enum move_phase phase)
{
	const struct mem_stats *mem = &r->mv->mem;
	double left = (double)(r->total_bytes - r->done_bytes), pace = r->progress;
	if (phase == MOVE_MEMORY && mem->rate_bytes_per_s) {
		pace = (double)mem->rate_bytes_per_s;
		left += bytes_of_rounds(r, pace);
	}
	double ms = pace > 0 ? left * 1000 / pace : 0;
	return ms < 1e15 ? (uint64_t)ms : 0;
}

static json_t *describe_disks(const struct report *r)
{
	json_t *disks = json_array();
	for (unsigned i = 0; i < r->mv->vm->def.ndisks; i++) {
		const struct mirror_stats *st = &r->disk[i];
		if (source_is_shared(r->mv, i))
			continue;
		json_array_append_new(disks,
				      json_pack("{s:s, s:I, s:I, s:I, s:I}", "id", r->mv->vm->def.disks[i].id,
						"total_bytes", (json_int_t)st->total_bytes, "synced_bytes",
						(json_int_t)st->synced_bytes, "copied_bytes",
						(json_int_t)st->data_bytes_copied, "mirrored_bytes",
						(json_int_t)st->mirrored_bytes));
	}
	return disks;
}

static json_t *describe_memory(const struct mem_stats *mem)
{
	return json_pack("{s:I, s:I, s:I, s:i, s:I, s:I, s:I, s:I, s:I, s:I}", "total_bytes",
			 (json_int_t)mem->total_bytes, "remaining_bytes", (json_int_t)mem->remaining_bytes,
			 "round_bytes", (json_int_t)mem->round_bytes, "round", (int)mem->round,
			 "rate_bytes_per_s", (json_int_t)mem->rate_bytes_per_s, "dirty_bytes_per_s",
			 (json_int_t)mem->dirty_bytes_per_s, "sent_bytes",
			 (json_int_t)(mem->sent_pages * MEM_PAGE_BYTES), "wire_bytes",
			 (json_int_t)mem->wire_bytes, "delta_pages", (json_int_t)mem->delta_pages,
			 "delta_bytes", (json_int_t)mem->delta_bytes);
}

static uint64_t mirror_buffered(const struct report *r)
{
	uint64_t n = 0;
	for (unsigned i = 0; i < r->mv->vm->def.ndisks; i++)
		n += r->disk[i].buffered_bytes;
	return n;
}

/* Why what is left grew: chunks that a broken session left behind. */
static void tell_unsynced(struct report *r, uint64_t ms)
{
	for (unsigned i = 0; i < r->mv->vm->def.ndisks; i++) {
		const char *id = r->mv->vm->def.disks[i].id;
		uint64_t now = r->disk[i].unsynced_bytes, before = r->unsynced_bytes[i];
		r->unsynced_bytes[i] = now;
		if (now <= before) /* less: a new map */
			continue;
		char text[160];
		uint64_t again = now - before;
		bool mib = again >= (1u << 20);
		snprintf(text, sizeof text, "disk %s: session broke, %llu %s to copy again", id,
			 (unsigned long long)(again >> (mib ? 20 : 10)), mib ? "MiB" : "KiB");
		move_events_emit(r->mv->events,
				 json_pack("{s:s, s:I, s:s, s:s, s:I}", "event", "message", "ms",
					   (json_int_t)ms, "text", text, "disk", id, "again_bytes",
					   (json_int_t)again),
				 false);
	}
}

/* mv->lock held. */
static void report_once(struct report *r)
{
	struct move *mv = r->mv;
	look(r);
	enum move_phase phase = mv->phase;
	uint64_t now_us = clock_now_us(), ms = now_us / 1000 - mv->t_start_ms, span = now_us - r->last_us + 1;
	uint64_t rate = phase == MOVE_STORAGE ? (r->copied_bytes - r->copied_before) * 1000000 / span
					      : mv->mem.rate_bytes_per_s;
	if (r->done_bytes > r->done_before) {
		double sample = (double)(r->done_bytes - r->done_before) * 1e6 / (double)span;
		r->progress += r->progress > 0 ? (sample - r->progress) * 0.3 : sample;
	} else {
		r->progress *= 0.7;
	}
	r->copied_before = r->copied_bytes;
	r->done_before = r->done_bytes;
	r->last_us = now_us;
	double percent = r->total_bytes ? 99.0 * (double)r->done_bytes / (double)r->total_bytes : 0;
	if (percent > mv->percent)
		mv->percent = percent;
	tell_unsynced(r, ms);
	json_t *ev =
		json_pack("{s:s, s:s, s:I, s:f, s:I, s:I, s:I, s:I, s:I, s:I, s:i, s:o}", "event", "progress",
			  "phase", phase_word(phase), "ms", (json_int_t)ms, "percent", mv->percent,
			  "done_bytes", (json_int_t)r->done_bytes, "total_bytes", (json_int_t)r->total_bytes,
			  "remaining_bytes", (json_int_t)(r->total_bytes - r->done_bytes), "rate_bytes_per_s",
			  (json_int_t)rate, "dirty_bytes_per_s", (json_int_t)mv->mem.dirty_bytes_per_s,
			  "eta_ms", (json_int_t)predict_end_ms(r, phase), "round", (int)mv->mem.round,
			  "disks", describe_disks(r));
	if (mv->mem.total_bytes)
		json_object_set_new(ev, "memory", describe_memory(&mv->mem));
	source_pace_progress(mv, ev);
	if (mv->postcopy.began)
		json_object_set_new(ev, "postcopy", source_postcopy_json(mv));
	if (phase == MOVE_VERIFY) {
		uint64_t verified, all;
		source_verify_progress(mv, &verified, &all);
		json_object_set_new(ev, "verified_bytes", json_integer((json_int_t)verified));
		json_object_set_new(ev, "verify_bytes", json_integer((json_int_t)all));
	}
	uint64_t bandwidth = rate_limit_get(&mv->bandwidth);
	if (bandwidth) {
		json_object_set_new(ev, "bandwidth_bytes_per_s", json_integer((json_int_t)bandwidth));
		json_object_set_new(ev, "throttled", json_boolean(rate_limit_wait_ns(&mv->bandwidth) > 0));
	}
	if (mv->opt.mirror_buffered)
		json_object_set_new(ev, "mirror_buffered_bytes",
				    json_integer((json_int_t)mirror_buffered(r)));
	move_events_emit(mv->events, ev, false);
}

/* mv->lock held. A guest that stands still for the whole move is not kept so a moment longer than it may. */
static void rest_until(struct move *mv, uint64_t at)
{
	while (mv->ticker_started && clock_now_ns() < at) {
		uint64_t late = source_quick_deadline_ns(mv);
		struct timespec until = clock_timespec(late < at ? late : at);
		pthread_cond_timedwait(&mv->changed, &mv->lock, &until);
		if (clock_now_ns() < source_quick_deadline_ns(mv))
			continue;
		pthread_mutex_unlock(&mv->lock);
		source_quick_expire(mv);
		pthread_mutex_lock(&mv->lock);
	}
}

static void *tick(void *arg)
{
	struct report r = {.mv = arg, .last_us = clock_now_us()};
	struct move *mv = arg;
	r.populated_bytes = source_populated_bytes(mv->vm);
	pthread_mutex_lock(&mv->lock);
	while (mv->ticker_started) {
		uint64_t at = clock_now_ns() + UINT64_C(1000000000);
		rest_until(mv, at);
		if (mv->ticker_started)
			report_once(&r);
	}
	pthread_mutex_unlock(&mv->lock);
	return NULL;
}

int source_ticker_start(struct move *mv)
{
	mv->ticker_started = true;
	int rc = pthread_create(&mv->ticker, NULL, tick, mv);
	if (rc)
		mv->ticker_started = false;
	return -rc;
}

void source_ticker_stop(struct move *mv)
{
	pthread_mutex_lock(&mv->lock);
	bool was = mv->ticker_started;
	mv->ticker_started = false;
	pthread_cond_broadcast(&mv->changed);
	pthread_mutex_unlock(&mv->lock);
	if (was)
		pthread_join(mv->ticker, NULL);
}

void source_set_phase(struct move *mv, enum move_phase phase, const char *name)
{
	pthread_mutex_lock(&mv->lock);
	mv->phase = phase;
	mv->reached = name;
	uint64_t now = clock_now_ms();
	if (phase == MOVE_STORAGE && !mv->t_storage_ms)
		mv->t_storage_ms = now;
	if (phase == MOVE_MEMORY && !mv->t_memory_ms)
		mv->t_memory_ms = now;
	json_t *ev = json_pack("{s:s, s:s, s:I, s:s}", "event", "phase", "phase", name, "ms",
			       (json_int_t)(now - mv->t_start_ms), "peer", mv->opt.peer);
	pthread_mutex_unlock(&mv->lock);
	move_events_emit(mv->events, ev, false);
}

static void add_blackout(struct move *mv, const struct blackout *b, json_t *ev)
{
	const struct {
		const char *name;
		uint64_t us;
	} parts[] = {{"quick_us", b->quick_us}, {"stop_us", b->stop_us},    {"drain_us", b->drain_us},
		     {"dirty_us", b->dirty_us}, {"state_us", b->state_us},  {"send_us", b->send_us},
		     {"load_us", b->load_us},	{"resume_us", b->resume_us}};
	for (unsigned i = 0; i < ARRAY_SIZE(parts); i++)
		json_object_set_new(ev, parts[i].name, json_integer((json_int_t)parts[i].us));
	log_info("move to %s: the guest stood still: stop %llu us, drain %llu, state %llu, dirty log %llu, "
		 "send %llu, load %llu, resume %llu",
		 mv->opt.peer, (unsigned long long)b->stop_us, (unsigned long long)b->drain_us,
		 (unsigned long long)b->state_us, (unsigned long long)b->dirty_us,
		 (unsigned long long)b->send_us, (unsigned long long)b->load_us,
		 (unsigned long long)b->resume_us);
}

/* mv->lock held. */
static json_t *make_figures(const struct move *mv, uint64_t wire_bytes)
{
	uint64_t now = clock_now_ms();
	uint64_t storage_end = mv->t_memory_ms ? mv->t_memory_ms : now;
	uint64_t downtime_us =
		mv->running_us > mv->pause_us && mv->pause_us ? mv->running_us - mv->pause_us : 0;
	return json_pack(
		"{s:I, s:I, s:I, s:f, s:I, s:I, s:I, s:I, s:I, s:i, s:I, s:I, s:I, s:I, s:I, s:i}",
		"total_ms", (json_int_t)(now - mv->t_start_ms), "storage_ms",
		(json_int_t)(mv->t_storage_ms ? storage_end - mv->t_storage_ms : 0), "memory_ms",
		(json_int_t)(mv->t_memory_ms ? now - mv->t_memory_ms : 0), "downtime_ms",
		(double)downtime_us / 1000.0, "memory_bytes",
		(json_int_t)((mv->mem.sent_pages + mv->postcopy.stats.sent_pages) * MEM_PAGE_BYTES),
		"unchanged_bytes", (json_int_t)(mv->mem.unchanged_pages * MEM_PAGE_BYTES), "disk_bytes",
		(json_int_t)mv->disk_bytes, "mirrored_bytes", (json_int_t)mv->mirrored_bytes, "wire_bytes",
		(json_int_t)wire_bytes, "rounds", (int)mv->mem.round, "attempts", (json_int_t)mv->tries + 1,
		"dirty_bytes_per_s", (json_int_t)mv->mem.dirty_bytes_per_s, "delta_pages",
		(json_int_t)mv->mem.delta_pages, "delta_bytes", (json_int_t)mv->mem.delta_bytes,
		"populated_bytes", (json_int_t)mv->mem.total_bytes, "disk_count", (int)mv->vm->def.ndisks);
}

json_t *source_figures(struct move *mv)
{
	SCOPE_LOCK(&mv->lock);
	source_count_disks(mv);
	if (mv->sender)
		mem_sender_stats(mv->sender, &mv->mem);
	uint64_t wire_bytes = mv->wire_bytes;
	for (unsigned i = 0; i < mv->nmemory; i++)
		wire_bytes += conn_bytes_sent(mv->memory[i]);
	if (mv->link)
		wire_bytes += conn_bytes_sent(move_link_conn(mv->link));
	return make_figures(mv, wire_bytes);
}

void source_emit_end(struct move *mv, const char *result, int exit_status, const char *reason, bool final)
{
	pthread_mutex_lock(&mv->lock);
	json_t *figures = make_figures(mv, mv->wire_bytes);
	json_t *ev = json_pack("{s:s, s:s, s:i, s:o, s:s, s:s, s:I, s:s, s:[]}", "event", "end", "result",
			       result, "exit", exit_status, "reason", jsonl_text(reason ? reason : ""), "vm",
			       mv->vm->def.name, "destination", mv->opt.peer, "epoch",
			       (json_int_t)mv->opt.epoch, "phase", mv->reached, "left_behind");
	if (ev)
		json_object_update(ev, figures);
	json_decref(figures);
	bool stood_still = mv->running_us > mv->pause_us && mv->pause_us;
	if (ev) {
		json_object_set_new(ev, "proof", source_proof_json(mv));
		source_pace_result(mv, ev);
		source_compare_result(mv, ev);
		if (mv->postcopy.began)
			json_object_set_new(ev, "postcopy", source_postcopy_json(mv));
	}
	struct blackout blackout = mv->blackout;
	pthread_mutex_unlock(&mv->lock);
	if (!ev)
		return;
	if (mv->vm->cold)
		json_object_set_new(ev, "cold", json_true());
	json_t *shared = source_shared_paths(mv);
	if (shared)
		json_object_set_new(ev, "shared", shared);
	if (stood_still)
		add_blackout(mv, &blackout, ev);
	json_object_set_new(ev, "uuid", json_string(mv->vm->def.uuid));
	json_object_set_new(ev, "first_epoch", json_integer((json_int_t)mv->first_epoch));
	struct error err = ERROR_INIT;
	if (registry_result_store(mv->vm->cfg, mv->vm->def.uuid, ev, &err))
		log_warn("%s", err.message);
	move_events_emit(mv->events, ev, final);
}
