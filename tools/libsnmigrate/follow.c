/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/libsnmigrate/follow.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "host/exit.h"
#include "tools/libsnmigrate/receipt.h"
#include "tools/libsnmigrate/terminal.h"
#include "tui/text.h"

#define LIST_MS	      1000
#define LIST_GRACE_MS 3000 /* between two moves of a series there may be none */

static volatile sig_atomic_t interrupted;

static void on_interrupt(int sig)
{
	interrupted = 1;
}

static void catch_interrupts(void)
{
	struct sigaction sa = {.sa_handler = on_interrupt};
	sigaction(SIGINT, &sa, NULL);
	sigaction(SIGTERM, &sa, NULL);
	sigaction(SIGHUP, &sa, NULL);
}

bool follow_interrupted(void)
{
	return interrupted;
}

/* --- one move --- */

static struct followed *add(struct follow *f, const char *vm, const char *from, const char *host)
{
	if (f->nmoves == UI_MOVES)
		return NULL;
	struct followed *m = calloc(1, sizeof *m);
	if (!m)
		return NULL;
	view_init(&m->view, vm, from, host);
	display_begin(&m->display, f->how.json, f->all, vm, host, &m->view);
	m->display.predicted = f->how.predicted;
	m->heard_ms = clock_now_ms();
	f->move[f->nmoves++] = m;
	return m;
}

static void remove_last(struct follow *f)
{
	free(f->move[--f->nmoves]);
}

static void print_end(struct follow *f, struct followed *m)
{
	struct error err = ERROR_INIT;
	if (m->printed)
		return;
	m->printed = true;
	/* The outcome stays what it is: it is said in words that there is no receipt. */
	if (m->end && f->how.receipt && receipt_write(f->how.receipt, m->end, &err))
		display_note(&m->display, "%s", err.message);
	if (m->end)
		m->status = display_end(&m->display, m->end);
	else
		m->status = display_failure(&m->display, m->failed, m->status, m->reason);
}

static void note(struct follow *f, struct followed *m, const char *text)
{
	view_note(&m->view, text);
	if (!f->fullscreen)
		display_note(&m->display, "%s", text);
}

static void ends(struct follow *f, struct followed *m)
{
	m->over = true;
	if (!f->fullscreen)
		print_end(f, m);
}

static void fails(struct follow *f, struct followed *m, const char *result, int status, const char *reason)
{
	snprintf(m->failed, sizeof m->failed, "%s", result);
	snprintf(m->reason, sizeof m->reason, "%s", reason);
	m->status = status;
	ends(f, m);
}

static void refused(struct follow *f, struct followed *m, int status, const char *reason)
{
	static const char *const results[] = {[EXIT_REFUSED] = "refused",
					      [EXIT_FAILED] = "failed",
					      [EXIT_CANCELLED] = "cancelled",
					      [EXIT_IN_DOUBT] = "in-doubt",
					      [EXIT_CRASHED] = "crashed"};
	const char *result = NULL;
	if (status > 0 && status < (int)(sizeof results / sizeof *results))
		result = results[status];
	fails(f, m, result ? result : "failed", status ? status : EXIT_FAILED, reason);
}

static void given_up(struct follow *f, struct followed *m)
{
	char reason[ERROR_MESSAGE_BYTES];
	snprintf(reason, sizeof reason,
		 "snmigrated does not answer; the move of VM %s goes on by itself: start snmigrated again, "
		 "then see snmigrate watch %s",
		 m->session.vm, m->session.vm);
	fails(f, m, "in-doubt", EXIT_IN_DOUBT, reason);
}

static void take_event(struct follow *f, struct followed *m, json_t *event)
{
	if (f->all && f->how.json && !json_object_get(event, "vm"))
		json_object_set_new(event, "vm", json_string(m->session.vm));
	view_event(&m->view, event);
	if (!f->fullscreen)
		display_event(&m->display, event);
}

static void take_news(struct follow *f, struct followed *m, enum session_news news, json_t *event, int status,
		      const struct error *err)
{
	m->heard_ms = clock_now_ms();
	switch (news) {
	case SESSION_BEGINS:
		text_clean(m->view.from, sizeof m->view.from, m->session.from);
		break;
	case SESSION_EVENT:
		take_event(f, m, event);
		break;
	case SESSION_END:
		if (json_integer_value(json_object_get(event, "epoch")) > m->session.epoch)
			m->session.epoch = json_integer_value(json_object_get(event, "epoch"));
		view_end(&m->view, event);
		m->end = json_incref(event);
		ends(f, m);
		break;
	case SESSION_REFUSED:
		refused(f, m, status, err->message);
		break;
	case SESSION_GONE:
		note(f, m, "the daemon went away; the move goes on, looking for it for 30 s");
		break;
	case SESSION_GIVEN_UP:
		given_up(f, m);
		break;
	default:
		break;
	}
}

static bool read_move(struct follow *f, struct followed *m)
{
	bool any = false;
	for (enum session_news news = SESSION_BEGINS; news && !m->over && !interrupted; any |= news != 0) {
		json_t *event;
		int status;
		struct error err = ERROR_INIT;
		news = session_read(&m->session, &event, &status, &err);
		if (news)
			take_news(f, m, news, event, status, &err);
		json_decref(event);
	}
	return any;
}

/* --- all moves of the host --- */

/* A VM has one move at a time, whose epoch may rise with its attempts; the list may be older than its end. */
static bool is_followed(const struct follow *f, const char *uuid, json_int_t epoch)
{
	for (unsigned i = 0; i < f->nmoves; i++) {
		const struct followed *m = f->move[i];
		if (!strcmp(m->session.uuid, uuid) && (!m->over || m->session.epoch >= epoch))
			return true;
	}
	return false;
}

static void follow_listed(struct follow *f, const json_t *vm)
{
	const char *name = json_string_value(json_object_get(vm, "name"));
	const char *uuid = json_string_value(json_object_get(vm, "uuid"));
	const char *from = json_string_value(json_object_get(vm, "host"));
	const json_t *move = json_object_get(vm, "migrating");
	const char *to = json_string_value(json_object_get(move, "destination"));
	json_int_t epoch = json_integer_value(json_object_get(move, "epoch"));
	if (!json_is_object(move) || !name || !uuid || strlen(uuid) >= sizeof f->move[0]->session.uuid)
		return;
	f->seen_ms = clock_now_ms();
	struct followed *m = is_followed(f, uuid, epoch) ? NULL : add(f, name, from, to);
	if (!m)
		return;
	snprintf(m->session.uuid, sizeof m->session.uuid, "%s", uuid);
	snprintf(m->session.vm, sizeof m->session.vm, "%s", name);
	m->session.epoch = epoch;
	struct error err = ERROR_INIT;
	if (session_begin(&m->session, f->s->control, name, session_watch_request(&m->session), &err) < 0)
		remove_last(f); /* the daemon went away: the next list tells */
}

static void list_failed(struct follow *f, const struct error *err)
{
	uint64_t now = clock_now_ms();
	if (f->listed && now - f->answered_ms < SESSION_RECONNECT_MS)
		return;
	f->failed_status = EXIT_REFUSED;
	snprintf(f->failed, sizeof f->failed, "%s", err->message);
}

static bool read_list(struct follow *f)
{
	struct error err = ERROR_INIT;
	json_t *reply = NULL, *vm;
	size_t i;
	uint64_t now = clock_now_ms();
	int rc;
	if (!f->list.link) {
		if (now < f->next_list_ms)
			return false;
		f->next_list_ms = now + LIST_MS;
		rc = call_begin(&f->list, f->s->control, json_pack("{s:s}", "cmd", "list"), &err);
		if (rc < 0)
			list_failed(f, &err);
		return false;
	}
	rc = call_read(&f->list, &reply, &err);
	if (rc == -EAGAIN)
		return false;
	f->next_list_ms = clock_now_ms() + LIST_MS;
	if (rc < 0) {
		list_failed(f, &err);
		return true;
	}
	f->listed = true;
	f->answered_ms = clock_now_ms();
	json_array_foreach(json_object_get(reply, "vms"), i, vm) follow_listed(f, vm);
	json_decref(reply);
	return true;
}

/* --- the loop --- */

bool follow_step(struct follow *f)
{
	bool any = f->all && read_list(f);
	for (unsigned i = 0; i < f->nmoves; i++)
		if (!f->move[i]->over)
			any |= read_move(f, f->move[i]);
	return any;
}

bool follow_over(const struct follow *f)
{
	for (unsigned i = 0; i < f->nmoves; i++)
		if (!f->move[i]->over)
			return false;
	if (!f->all || f->failed_status)
		return true;
	return f->listed && f->answered_ms >= f->seen_ms && clock_now_ms() - f->seen_ms >= LIST_GRACE_MS;
}

unsigned follow_fds(const struct follow *f, struct pollfd *p, unsigned max)
{
	unsigned n = 0;
	if (f->list.link && n < max)
		p[n++] = (struct pollfd){.fd = jsonl_fd(f->list.link), .events = POLLIN};
	for (unsigned i = 0; i < f->nmoves && n < max; i++)
		if (session_fd(&f->move[i]->session) >= 0)
			p[n++] = (struct pollfd){.fd = session_fd(&f->move[i]->session), .events = POLLIN};
	return n;
}

/* True when all is over, false when the user left. */
static bool follow_lines(struct follow *f)
{
	struct pollfd p[UI_MOVES + 1];
	while (!interrupted) {
		bool any = follow_step(f);
		if (follow_over(f))
			return true;
		if (!any)
			poll(p, follow_fds(f, p, UI_MOVES + 1), FOLLOW_WAIT_MS);
	}
	return false;
}

static int leave(struct follow *f)
{
	/* not an outcome: the moves have none yet */
	if (f->all)
		fputs("snmigrate: the moves go on; \"snmigrate watch\" follows them\n", stderr);
	else
		display_note(&f->move[0]->display,
			     "the move of VM %s goes on; \"snmigrate watch %s\" follows it, \"snmigrate "
			     "cancel %s\" ends it",
			     f->move[0]->session.vm, f->move[0]->session.vm, f->move[0]->session.vm);
	return 128 + SIGINT;
}

static int finish(struct follow *f, bool left)
{
	int status = 0;
	for (unsigned i = 0; i < f->nmoves; i++) {
		struct followed *m = f->move[i];
		if (m->over)
			print_end(f, m);
		if (m->status > status)
			status = m->status;
	}
	if (f->failed_status) {
		fprintf(stderr, "snmigrate: %s\n", f->failed);
		status = f->failed_status;
	} else if (left) {
		status = leave(f);
	} else if (f->all && !f->nmoves) {
		fputs("snmigrate: no VM of this host is being moved\n", stderr);
	}
	for (unsigned i = 0; i < f->nmoves; i++) {
		session_close(&f->move[i]->session);
		json_decref(f->move[i]->end);
		free(f->move[i]);
	}
	call_close(&f->list);
	if (f->how.receipt && f->how.receipt->fd >= 0)
		fputs("snmigrate: no receipt was written: there is no end of a move to write down\n", stderr);
	if (f->how.receipt)
		receipt_end(f->how.receipt);
	return status;
}

static int run(struct follow *f)
{
	bool left = false;
	f->fullscreen = !f->how.json && !f->how.plain && terminal_is_able();
	if (f->fullscreen && fullscreen_follow(f, &left) < 0)
		f->fullscreen = false;
	if (!f->fullscreen)
		left = !follow_lines(f);
	return finish(f, left);
}

int follow_one(struct snmigrate *s, struct follow_how how, const char *vm, const char *host, json_t *request)
{
	struct follow f = {.s = s, .how = how};
	struct error err = ERROR_INIT;
	catch_interrupts();
	struct followed *m = add(&f, vm, "", host);
	if (!m) {
		json_decref(request);
		finish(&f, false);
		return EXIT_FAILED;
	}
	if (session_begin(&m->session, s->control, vm, request, &err) < 0) {
		refused(&f, m, EXIT_REFUSED, err.message);
		return finish(&f, false);
	}
	return run(&f);
}

int follow_all(struct snmigrate *s, struct follow_how how)
{
	struct follow f = {.s = s, .how = how, .all = true};
	catch_interrupts();
	return run(&f);
}
