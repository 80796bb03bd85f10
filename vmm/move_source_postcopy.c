/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The source's part in post-copy: the guest goes when it must, and this process keeps its memory, at rest,
 * until the destination has every page. What the record says is as without (docs/handover.md): `moved`, but
 * not yet `peer-started`, so that nothing is deleted here.
 */
#include <errno.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "host/ask.h"
#include "host/jsonl.h"
#include "vmm/move_source.h"

/* What has not got small after so many rounds, each about as long as the one before, will not. */
#define AUTO_ROUNDS  6
#define ASK_EVERY_MS 1000
#define ASK_SOON_MS  100 /* the first time */
#define RECORD_TRIES 3

int source_postcopy_parse(json_t *o, struct move_options *opt, struct error *err)
{
	static const char *const words[] = {"never", "auto", "now"};
	json_t *v = json_object_get(o, "postcopy");
	const char *s = json_string_value(v);
	bool exceed = opt->on_exceed == MOVE_EXCEED_POSTCOPY;
	unsigned i = 0;
	opt->postcopy = exceed ? MOVE_POSTCOPY_AUTO : MOVE_POSTCOPY_NEVER;
	if (!v || json_is_null(v))
		return 0;
	while (s && i < ARRAY_SIZE(words) && strcmp(s, words[i]))
		i++;
	if (!s || i == ARRAY_SIZE(words))
		return error_set(err, EINVAL, "option postcopy: auto, now or never is needed");
	if (exceed && i == MOVE_POSTCOPY_NEVER)
		return error_set(err, EINVAL, "--on-exceed postcopy and --postcopy never: one of the two");
	opt->postcopy = (enum move_postcopy)i;
	return 0;
}

static void say(struct move *mv, const char *text)
{
	log_info("move to %s: %s", mv->opt.peer, text);
	move_events_emit(mv->events,
			 json_pack("{s:s, s:I, s:o}", "event", "message", "ms",
				   (json_int_t)(clock_now_ms() - mv->t_start_ms), "text", jsonl_text(text)),
			 false);
}

int source_postcopy_accepted(struct move *mv, json_t *hello_ok, struct error *err)
{
	struct source_postcopy *pc = &mv->postcopy;
	json_t *tokens = json_object_get(hello_ok, "postcopy_tokens");
	const char *why = json_string_value(json_object_get(hello_ok, "postcopy_refused"));
	char text[400];
	pc->agreed = false;
	if (mv->opt.postcopy == MOVE_POSTCOPY_NEVER)
		return 0;
	for (unsigned i = 0; tokens && i < MEM_POSTCOPY_CHANNELS; i++) {
		const char *t = json_string_value(json_array_get(tokens, i));
		if (!t || strlen(t) != TOKEN_HEX_CHARS || json_array_size(tokens) != MEM_POSTCOPY_CHANNELS)
			return error_set(err, EPROTO, "hello: malformed postcopy_tokens");
		strcpy(pc->token[i], t);
	}
	pc->agreed = tokens != NULL;
	if (pc->agreed)
		return 0;
	if (why)
		snprintf(text, sizeof text, "%s cannot take part in post-copy: %s", mv->opt.peer, why);
	else
		snprintf(text, sizeof text, "%s does not know post-copy: upgrade it", mv->opt.peer);
	if (mv->opt.postcopy == MOVE_POSTCOPY_NOW)
		return error_set(err, EOPNOTSUPP, "%s, or move without --postcopy", text);
	say(mv, text);
	return 0;
}

unsigned source_postcopy_rounds(const struct move *mv)
{
	unsigned most = mv->opt.max_rounds;
	if (!mv->postcopy.agreed)
		return most;
	if (mv->opt.postcopy == MOVE_POSTCOPY_NOW)
		return 1;
	return most && most < AUTO_ROUNDS ? most : AUTO_ROUNDS;
}

bool source_postcopy_catches_up(const struct move *mv)
{
	return !mv->postcopy.agreed || mv->opt.postcopy != MOVE_POSTCOPY_NOW;
}

/* --- a session's channels --- */

static int dial_session(struct move *mv, struct conn *channels[MEM_POSTCOPY_CHANNELS], struct error *err)
{
	int rc = 0;
	for (unsigned i = 0; !rc && i < MEM_POSTCOPY_CHANNELS; i++)
		rc = source_dial(mv, CHANNEL_MEMORY, mv->postcopy.token[i], &channels[i], err);
	for (unsigned i = 0; rc && i < MEM_POSTCOPY_CHANNELS; i++)
		conn_close(steal_ptr(channels[i]));
	return rc;
}

static int ask(struct move *mv, struct handover_report *answer, struct error *err)
{
	struct vm *vm = mv->vm;
	struct handover_self self = {.live = true, .attempt_open = true, .commit = true};
	struct handover_report own;
	struct vm_record rec;
	int rc = vm_record(vm, &rec, err);
	if (rc)
		return rc;
	handover_describe(&rec, &self, false, &own);
	own.paging = true;
	return ask_peer(vm->cfg, mv->opt.peer, mv->opt.address, vm->def.uuid, &own, vm->cfg->silence_ms,
			answer, err);
}

int source_postcopy_judge(const struct handover_report *r, uint64_t epoch)
{
	bool owner = r->state == HANDOVER_OWNER || r->state == HANDOVER_OWNER_UNCONFIRMED;
	if (owner && r->epoch >= epoch && r->paging)
		return 0;
	/* past this epoch it has had the VM, and moved it on */
	if ((owner && r->epoch >= epoch && r->started) || (r->state != HANDOVER_NONE && r->epoch > epoch))
		return 1;
	if (r->state == HANDOVER_PREPARED && r->epoch == epoch)
		return -EAGAIN;
	return -EOWNERDEAD;
}

/* False when nobody is to be waited for any more. */
static bool rest(struct move *mv, unsigned ms)
{
	uint64_t at = clock_now_ns() + ms * UINT64_C(1000000);
	struct timespec until = clock_timespec(at);
	SCOPE_LOCK(&mv->lock);
	while (!mv->postcopy.stop && clock_now_ns() < at)
		pthread_cond_timedwait(&mv->changed, &mv->lock, &until);
	return !mv->postcopy.stop;
}

/* For mem_postcopy_source: for as long as it takes. Nothing but the destination's own word ends this, or a
 * person's. */
static int session_again(void *opaque, const struct error *why, struct conn *channels[MEM_POSTCOPY_CHANNELS],
			 struct error *err)
{
	struct move *mv = opaque;
	pthread_mutex_lock(&mv->lock);
	bool commit = mv->commit, stop = mv->postcopy.stop;
	pthread_mutex_unlock(&mv->lock);
	if (!commit) {
		/* The guest has not gone yet: nor will it. */
		if (!stop)
			source_interrupt(mv, why);
		error_copy(err, why);
		return why->code;
	}
	char text[ERROR_MESSAGE_BYTES + 100];
	snprintf(text, sizeof text, "post-copy: %s; the guest waits where it needs a page that is here",
		 why->message);
	say(mv, text);
	for (unsigned ms = ASK_SOON_MS; rest(mv, ms); ms = ASK_EVERY_MS) {
		struct handover_report answer;
		struct error e = ERROR_INIT;
		int rc = ask(mv, &answer, &e);
		if (!rc) {
			rc = source_postcopy_judge(&answer, mv->opt.epoch);
			if (rc == -EOWNERDEAD)
				return error_set(
					err, EOWNERDEAD,
					"VM %s ended on %s before the last of its memory had got there: "
					"start it there again; the files here stay until then",
					mv->vm->def.name, mv->opt.peer);
			if (rc == 1)
				return 1;
			if (!rc)
				rc = dial_session(mv, channels, &e);
		}
		if (!rc) {
			say(mv, "post-copy: connected again");
			return 0;
		}
		log_debug("post-copy: %s", e.message);
	}
	return error_set(err, ECANCELED, "given up");
}

/* --- the way there --- */

/* Whether what is left would stop the guest for longer than it may. */
static bool too_much_left(struct move *mv)
{
	struct mem_stats st;
	mem_sender_stats(mv->sender, &st);
	return st.predicted_downtime_us > mv->opt.max_downtime_ms * UINT64_C(1000);
}

int source_postcopy_prepare(struct move *mv, struct error *err)
{
	struct source_postcopy *pc = &mv->postcopy;
	if (pc->chosen)
		return mem_sender_announce_later(mv->sender, err);
	if (!pc->agreed || (mv->opt.postcopy == MOVE_POSTCOPY_AUTO && !too_much_left(mv)))
		return 0;
	struct mem_postcopy_source_options opt = {
		.space = machine_memory_space(mv->vm->machine),
		.compress = mv->opt.compress,
		.zstd_level = mv->opt.zstd_level,
		.timeout_ms = mv->vm->cfg->silence_ms,
		.bandwidth = &mv->bandwidth,
		.epoch = mv->opt.epoch,
		.again = session_again,
		.opaque = mv,
	};
	struct mem_postcopy_source *pages;
	int rc = dial_session(mv, opt.channels, err);
	if (!rc)
		rc = mem_postcopy_source_create(&opt, &pages, err);
	if (rc)
		return error_prefix(err, "post-copy");
	pc->chosen = true;
	pthread_mutex_lock(&mv->lock);
	pc->pages = pages;
	pc->stop = pc->began = false;
	pthread_mutex_unlock(&mv->lock);
	/* Making room at the destination takes longer than anything else of the pause would. */
	return mem_sender_announce_later(mv->sender, err);
}

int source_postcopy_send(struct move *mv, struct error *err)
{
	struct source_postcopy *pc = &mv->postcopy;
	const uint64_t *later;
	uint64_t npages;
	int rc = mem_sender_finish_later(mv->sender, &later, &npages, err);
	if (rc || !npages)
		return rc;
	pc->later = later;
	mem_postcopy_source_begin(pc->pages, later);
	SCOPE_LOCK(&mv->lock);
	pc->began = true;
	pc->began_ms = clock_now_ms();
	return 0;
}

bool source_postcopy_open(struct move *mv)
{
	SCOPE_LOCK(&mv->lock);
	return mv->postcopy.pages && mv->postcopy.began && !mv->postcopy.complete && !mv->postcopy.stop;
}

/* From here on the destination's VM has all that it needs, and the files here may go. */
static void record_peer_started(struct move *mv)
{
	for (int i = 0; i < RECORD_TRIES; i++) {
		struct error e = ERROR_INIT;
		struct vm_record rec;
		int rc = vm_record(mv->vm, &rec, &e);
		if (!rc && rec.state != HANDOVER_MOVED)
			return;
		rec.flags |= RECORD_PEER_STARTED;
		if (!rc)
			rc = record_store(mv->vm->record, &rec, &e);
		if (!rc)
			return;
		/* Without it the daemon asks the destination, and hears the same. */
		log_warn("record: %s", e.message);
	}
}

void source_postcopy_finish(struct move *mv)
{
	struct source_postcopy *pc = &mv->postcopy;
	struct error e = ERROR_INIT;
	int rc = mem_postcopy_source_wait(pc->pages, &e);
	if (!rc) {
		record_peer_started(mv);
		mv->peer_started = true;
		log_info("move to %s: every page is there", mv->opt.peer);
	}
	SCOPE_LOCK(&mv->lock);
	pc->complete = !rc;
	pc->ended_ms = clock_now_ms();
	if (rc) {
		pc->stop = true;
		pc->failure = e;
		if (rc == -ECANCELED)
			error_set(
				&pc->failure, EOWNERDEAD,
				"VM %s: its last memory was given up here; it crashes on %s, where it can be "
				"started again",
				mv->vm->def.name, mv->opt.peer);
	}
}

int source_postcopy_resolve(struct move *mv, const char *how, struct error *err)
{
	if (!strcmp(how, "ask"))
		return 0; /* it is asked every second, when there is a question */
	if (strcmp(how, "give-up"))
		return error_set(err, EPERM, "VM %s is %s's: what is left here is memory that it fetches",
				 mv->vm->def.name, mv->opt.peer);
	SCOPE_LOCK(&mv->lock);
	mv->postcopy.stop = true;
	pthread_cond_broadcast(&mv->changed);
	if (mv->postcopy.pages)
		mem_postcopy_source_cancel(mv->postcopy.pages);
	return 0;
}

void source_postcopy_close(struct move *mv)
{
	struct source_postcopy *pc = &mv->postcopy;
	pthread_mutex_lock(&mv->lock);
	struct mem_postcopy_source *pages = steal_ptr(pc->pages);
	pc->stop = true;
	pthread_cond_broadcast(&mv->changed);
	if (pages)
		mem_postcopy_source_stats(pages, &pc->stats);
	pthread_mutex_unlock(&mv->lock);
	mem_postcopy_source_free(pages);
	mv->wire_bytes += pages ? pc->stats.wire_bytes : 0;
	/* a new attempt chooses anew */
	pc->chosen = false;
	pc->later = NULL;
}

json_t *source_postcopy_json(struct move *mv)
{
	struct source_postcopy *pc = &mv->postcopy;
	struct mem_postcopy_stats st = pc->stats;
	uint64_t end_ms = pc->ended_ms ? pc->ended_ms : clock_now_ms();
	if (pc->pages)
		mem_postcopy_source_stats(pc->pages, &st);
	return json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:i, s:b, s:I}", "pages", (json_int_t)st.total_pages,
			 "remaining_bytes", (json_int_t)(st.missing_pages * MEM_PAGE_BYTES), "pages_sent",
			 (json_int_t)st.sent_pages, "faults", (json_int_t)st.faults, "fault_median_us",
			 (json_int_t)st.fault_median_us, "fault_worst_us", (json_int_t)st.fault_worst_us,
			 "sessions", (int)st.sessions, "connected", (int)(st.connected && pc->pages), "ms",
			 (json_int_t)(end_ms - pc->began_ms));
}
