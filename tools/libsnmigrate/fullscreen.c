/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "host/ini.h"
#include "tools/libsnmigrate/follow.h"
#include "tools/libsnmigrate/terminal.h"
#include "tui/text.h"

#define DRAW_MS 500 /* so often at least: clocks run */

/* A request that a key made; one at a time. */
struct order {
	struct call call;
	struct followed *m;
	char done[80]; /* what to say when it was accepted */
};

struct fullscreen {
	struct follow *f;
	struct ui ui;
	struct order order;
	bool changed, gone; /* gone: the terminal */
};

static struct followed *target(struct fullscreen *x)
{
	return container_of(x->ui.target, struct followed, view);
}

static void order_begin(struct fullscreen *x, json_t *request)
{
	struct order *o = &x->order;
	struct error err = ERROR_INIT;
	if (o->call.link) {
		view_note(x->ui.target, "the former request has not been answered yet");
		json_decref(request);
		return;
	}
	o->m = target(x);
	if (call_begin(&o->call, x->f->s->control, request, &err) < 0)
		view_note(x->ui.target, err.message);
}

static void order_read(struct fullscreen *x)
{
	struct order *o = &x->order;
	struct error err = ERROR_INIT;
	json_t *reply;
	int rc = o->call.link ? call_read(&o->call, &reply, &err) : -EAGAIN;
	if (rc == -EAGAIN)
		return;
	view_note(&o->m->view, rc < 0 ? err.message : o->done);
	if (!rc)
		json_decref(reply);
	x->changed = true;
}

/* The VM as the daemon knows it: by its UUID, since there may be two of a name over time. */
static const char *key_of(const struct followed *m)
{
	return *m->session.uuid ? m->session.uuid : m->session.vm;
}

static void cancel(struct fullscreen *x)
{
	snprintf(x->order.done, sizeof x->order.done, "cancelled by a key");
	order_begin(x, json_pack("{s:s, s:s}", "cmd", "cancel", "vm", key_of(target(x))));
}

static void tune(struct fullscreen *x)
{
	uint64_t rate;
	char words[TEXT_BYTES], said[80];
	if (size_parse(x->ui.input, &rate) || rate > INT64_MAX) {
		snprintf(said, sizeof said, "%s: not a number of bytes a second, such as 200M", x->ui.input);
		view_note(x->ui.target, said);
		return;
	}
	if (rate)
		snprintf(x->order.done, sizeof x->order.done, "the bandwidth is limited to %s/s from now on",
			 text_bytes((double)rate, words));
	else
		snprintf(x->order.done, sizeof x->order.done, "the bandwidth is not limited any more");
	order_begin(x, json_pack("{s:s, s:s, s:I}", "cmd", "tune", "vm", key_of(target(x)),
				 "bandwidth_bytes_per_s", (json_int_t)rate));
}

/* True to leave. */
static bool read_keys(struct fullscreen *x)
{
	for (int key; (key = terminal_key());) {
		x->changed = true;
		if (key < 0)
			continue;
		switch (ui_key(&x->ui, key)) {
		case UI_LEAVE:
			return true;
		case UI_CANCEL:
			cancel(x);
			break;
		case UI_TUNE:
			tune(x);
			break;
		case UI_NONE:
			break;
		}
	}
	return false;
}

static void draw(struct fullscreen *x)
{
	struct screen page;
	struct ui *ui = &x->ui;
	uint64_t now = clock_now_ms();
	ui->nviews = 0;
	for (unsigned i = 0; i < x->f->nmoves; i++)
		ui->view[ui->nviews++] = &x->f->move[i]->view;
	if (terminal_page(&page) < 0)
		return;
	const struct followed *m = ui->nviews ? x->f->move[ui->selected] : NULL;
	ui_draw(&page, ui, m ? now - m->heard_ms : 0, time(NULL));
	terminal_show(&page);
	screen_free(&page);
}

static void wait_for_more(struct fullscreen *x)
{
	struct pollfd p[UI_MOVES + 3];
	unsigned n = 0;
	p[n++] = (struct pollfd){.fd = STDIN_FILENO, .events = POLLIN};
	if (x->order.call.link)
		p[n++] = (struct pollfd){.fd = jsonl_fd(x->order.call.link), .events = POLLIN};
	n += follow_fds(x->f, p + n, UI_MOVES + 1);
	if (poll(p, n, FOLLOW_WAIT_MS) > 0 && p[0].revents & (POLLHUP | POLLERR | POLLNVAL))
		x->gone = true;
}

int fullscreen_follow(struct follow *f, bool *left)
{
	struct fullscreen x = {.f = f};
	uint64_t drawn_ms = 0;
	int rc = terminal_open();
	if (rc < 0)
		return rc;
	*left = false;
	while (!*left) {
		x.changed |= follow_step(f);
		order_read(&x);
		if (follow_over(f))
			break;
		*left = read_keys(&x) || follow_interrupted() || x.gone;
		if (*left)
			break;
		uint64_t now = clock_now_ms();
		if (x.changed || now - drawn_ms >= DRAW_MS) {
			draw(&x);
			drawn_ms = now;
			x.changed = false;
		}
		wait_for_more(&x);
	}
	terminal_close();
	call_close(&x.order.call);
	return 0;
}
