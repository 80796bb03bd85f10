/* SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "host/jsonl.h"
#include "host/registry.h"
#include "vmm/move_source.h"

static const char *phase_word(enum move_phase phase)
{
	static const char *const words[] = {"connect",	 "storage", "memory", "handover",
					    "committed", "cleanup", "ended"};
	return words[phase];
}

/* Bytes moved and to move, over disks and memory: what the per cent is made of. */
static void totals(struct move *mv, uint64_t *done, uint64_t *total)
{
	*done = *total = 0;
	for (unsigned i = 0; i < mv->vm->def.ndisks; i++) {
		struct mirror_stats st;
		mirror_stats(mv->vm->disks[i].mirror, &st);
		if (!st.total_bytes)
			st.total_bytes = mv->vm->disks[i].local->size_bytes;
		/* A hole costs nothing: count what is allocated, in proportion to how far the pass is. */
		uint64_t weight = mv->vm->disks[i].info.allocated_bytes;
		if (!weight)
			weight = st.total_bytes;
		*total += weight;
		*done += st.total_bytes ? (uint64_t)((double)weight * (double)st.synced_bytes /
						     (double)st.total_bytes)
					: 0;
	}
	if (mv->mem.total_bytes) {
		*total += mv->mem.total_bytes;
		if (mv->mem.remaining_bytes < mv->mem.total_bytes)
			*done += mv->mem.total_bytes - mv->mem.remaining_bytes;
	} else {
		*total += mv->vm->def.memory_bytes / 2;
	}
}

static uint64_t storage_copied(struct move *mv)
{
	uint64_t n = 0;
	for (unsigned i = 0; i < mv->vm->def.ndisks; i++) {
		struct mirror_stats st;
		mirror_stats(mv->vm->disks[i].mirror, &st);
		n += st.data_bytes_copied + st.mirrored_bytes;
	}
	return n;
}

static void *tick(void *arg)
{
	struct move *mv = arg;
	uint64_t last_copied = 0, last_us = clock_now_us();
	pthread_mutex_lock(&mv->lock);
	while (mv->ticker_started) {
		uint64_t at = clock_now_ns() + UINT64_C(1000000000);
		struct timespec until = clock_timespec(at);
		while (mv->ticker_started && clock_now_ns() < at)
			pthread_cond_timedwait(&mv->changed, &mv->lock, &until);
		if (!mv->ticker_started)
			break;
		if (mv->sender)
			mem_sender_stats(mv->sender, &mv->mem);
		enum move_phase phase = mv->phase;
		uint64_t done, total;
		totals(mv, &done, &total);
		uint64_t copied = storage_copied(mv), now = clock_now_us();
		uint64_t rate = phase == MOVE_STORAGE ? (copied - last_copied) * 1000000 / (now - last_us + 1)
						      : mv->mem.rate_bytes_per_s;
		last_copied = copied;
		last_us = now;
		double percent = total ? 99.0 * (double)done / (double)total : 0;
		if (percent > mv->percent)
			mv->percent = percent;
		uint64_t eta_ms = rate && total > done ? (total - done) * 1000 / rate : 0;
		json_t *ev = json_pack("{s:s, s:s, s:f, s:I, s:I, s:I, s:I, s:I, s:i}", "event", "progress",
				       "phase", phase_word(phase), "percent", mv->percent, "done_bytes",
				       (json_int_t)done, "total_bytes", (json_int_t)total, "rate_bytes_per_s",
				       (json_int_t)rate, "dirty_bytes_per_s",
				       (json_int_t)mv->mem.dirty_bytes_per_s, "eta_ms", (json_int_t)eta_ms,
				       "round", (int)mv->mem.round);
		uint64_t bandwidth = rate_limit_get(&mv->bandwidth);
		if (bandwidth)
			json_object_set_new(ev, "bandwidth_bytes_per_s", json_integer((json_int_t)bandwidth));
		move_events_emit(mv->events, ev, false);
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
	uint64_t now = clock_now_ms();
	if (phase == MOVE_STORAGE)
		mv->t_storage_ms = now;
	if (phase == MOVE_MEMORY && !mv->t_memory_ms)
		mv->t_memory_ms = now;
	json_t *ev = json_pack("{s:s, s:s, s:I, s:s}", "event", "phase", "phase", name, "ms",
			       (json_int_t)(now - mv->t_start_ms), "peer", mv->opt.peer);
	pthread_mutex_unlock(&mv->lock);
	move_events_emit(mv->events, ev, false);
}

void source_emit_end(struct move *mv, const char *result, int exit_status, const char *reason, bool final)
{
	uint64_t now = clock_now_ms();
	pthread_mutex_lock(&mv->lock);
	uint64_t storage_end = mv->t_memory_ms ? mv->t_memory_ms : now;
	uint64_t downtime_us =
		mv->running_us > mv->pause_us && mv->pause_us ? mv->running_us - mv->pause_us : 0;
	json_t *ev = json_pack(
		"{s:s, s:s, s:i, s:o, s:s, s:s, s:I, s:I, s:I, s:I, s:f, s:I, s:I, s:I, s:i, s:[]}", "event",
		"end", "result", result, "exit", exit_status, "reason", jsonl_text(reason ? reason : ""),
		"vm", mv->vm->def.name, "destination", mv->opt.peer, "epoch", (json_int_t)mv->opt.epoch,
		"total_ms", (json_int_t)(now - mv->t_start_ms), "storage_ms",
		(json_int_t)(mv->t_storage_ms ? storage_end - mv->t_storage_ms : 0), "memory_ms",
		(json_int_t)(mv->t_memory_ms ? now - mv->t_memory_ms : 0), "downtime_ms",
		(double)downtime_us / 1000.0, "memory_bytes",
		(json_int_t)(mv->mem.sent_pages * MEM_PAGE_BYTES), "disk_bytes", (json_int_t)mv->disk_bytes,
		"wire_bytes", (json_int_t)mv->wire_bytes, "rounds", (int)mv->mem.round, "left_behind");
	pthread_mutex_unlock(&mv->lock);
	if (!ev)
		return;
	json_object_set_new(ev, "uuid", json_string(mv->vm->def.uuid));
	struct error err = ERROR_INIT;
	if (registry_result_store(mv->vm->cfg, mv->vm->def.uuid, ev, &err))
		log_warn("%s", err.message);
	move_events_emit(mv->events, ev, final);
}
