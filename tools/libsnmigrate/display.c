/* SPDX-License-Identifier: Apache-2.0 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "host/exit.h"
#include "host/jsonl.h"
#include "tools/libsnmigrate/snmigrate.h"
#include "tui/model.h"
#include "tui/text.h"

/* Reasons have up to 512 bytes. */
#define SHOWN_BYTES 1024

static const char *text(const json_t *o, const char *key)
{
	const char *s = json_string_value(json_object_get(o, key));
	return s ? s : "";
}

static double number(const json_t *o, const char *key)
{
	return json_number_value(json_object_get(o, key));
}

/* For a person: what comes from elsewhere must not steer the terminal. */
static const char *shown(const json_t *o, const char *key, char buf[SHOWN_BYTES])
{
	text_clean(buf, SHOWN_BYTES, text(o, key));
	return buf;
}

void display_begin(struct display *d, bool json, bool many, const char *vm, const char *host,
		   const struct view *view)
{
	*d = (struct display){
		.json = json, .terminal = !json && !many && isatty(STDOUT_FILENO), .view = view};
	text_clean(d->vm, sizeof d->vm, vm);
	text_clean(d->host, sizeof d->host, host);
}

static void print_json(json_t *event)
{
	/* JSON escapes control characters up to U+001F by itself */
	char *line = json_dumps(event, JSON_COMPACT | (isatty(STDOUT_FILENO) ? JSON_ENSURE_ASCII : 0));
	if (line)
		puts(line);
	fflush(stdout);
	free(line);
}

static void clear_line(struct display *d)
{
	if (d->terminal && d->width)
		printf("\r%*s\r", (int)d->width, "");
	d->width = 0;
}

void display_note(struct display *d, const char *fmt, ...)
{
	char said[SHOWN_BYTES], clean[SHOWN_BYTES];
	va_list ap;
	clear_line(d);
	fflush(stdout);
	va_start(ap, fmt);
	vsnprintf(said, sizeof said, fmt, ap);
	va_end(ap);
	text_clean(clean, sizeof clean, said);
	fprintf(stderr, "snmigrate: %s\n", clean);
}

/* "4m50s" */
static const char *minutes(double ms, char *buf, size_t size)
{
	unsigned long s = ms > 0 ? (unsigned long)((ms + 999) / 1000) : 0;
	if (s >= 3600)
		snprintf(buf, size, "%luh%02lum", s / 3600, s / 60 % 60);
	else if (s >= 60)
		snprintf(buf, size, "%lum%02lus", s / 60, s % 60);
	else
		snprintf(buf, size, "%lus", s);
	return buf;
}

struct line {
	char text[256];
	size_t len;
};

static void add(struct line *l, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void add(struct line *l, const char *fmt, ...)
{
	va_list ap;
	va_start(ap, fmt);
	int n = vsnprintf(l->text + l->len, sizeof l->text - l->len, fmt, ap);
	va_end(ap);
	if (n > 0)
		l->len = strlen(l->text);
}

static void show_line(struct display *d)
{
	const struct view *v = d->view;
	char rate[TEXT_BYTES], dirty[TEXT_BYTES], left[TEXT_BYTES];
	struct line l = {.len = 0};
	add(&l, "%s -> %s  %-9s %3.0f %%  %s/s", d->vm, d->host, d->phase, v->percent,
	    text_bytes((double)v->send_rate, rate));
	if (v->dirty_rate)
		add(&l, "  dirty %s/s", text_bytes((double)v->dirty_rate, dirty));
	if (v->postcopy.known)
		add(&l, "  %llu waits, worst %.1f ms", (unsigned long long)v->postcopy.faults,
		    (double)v->postcopy.worst_us / 1000);
	else if (v->downtime_predicted)
		add(&l, "  downtime ~%.0f ms", v->predicted_downtime_ms);
	if (v->slowed_percent)
		add(&l, "  guest -%u %%", v->slowed_percent);
	if (v->left_known)
		add(&l, "  %s left", text_clock(v->left_ms, left));
	unsigned len = text_cells(l.text);
	int pad = d->width > len ? (int)(d->width - len) : 0;
	printf("\r%s%*s", l.text, pad, "");
	d->width = len;
	fflush(stdout);
}

/* Without a line that shows per cent and time left, why these change does not matter. */
static void show_messages(struct display *d, bool progress)
{
	const struct view *v = d->view;
	if (v->nmessages - d->told > VIEW_MESSAGES)
		d->told = v->nmessages - VIEW_MESSAGES;
	/* what replaces its predecessor is told once */
	for (; d->told < v->nmessages; d->told++) {
		if (progress && !d->terminal)
			continue;
		clear_line(d);
		printf("%s: %s\n", d->vm, view_message(v, d->told)->text);
		fflush(stdout);
	}
}

void display_event(struct display *d, json_t *event)
{
	/* whoever reads the lines gets the same promise as whoever looks at them */
	json_t *percent = json_object_get(event, "percent");
	if (percent) {
		double p = json_number_value(percent);
		if (p > 100)
			p = 100;
		if (p > d->percent)
			d->percent = p;
		json_object_set_new(event, "percent", json_real(d->percent));
	}
	if (d->json) {
		print_json(event);
		return;
	}
	bool phase = !strcmp(text(event, "event"), "phase");
	if (!strcmp(text(event, "event"), "retry")) {
		char left[32];
		display_note(d, "%s; the VM runs on here, retrying for another %s", text(event, "reason"),
			     minutes(number(event, "left_ms"), left, sizeof left));
		d->told = d->view->nmessages;
		return;
	}
	if (!*d->host) /* of a watch */
		text_clean(d->host, sizeof d->host, text(event, "peer"));
	const char *name = view_phase_name(d->view);
	bool changed = strcmp(d->phase, name) != 0;
	if (changed)
		snprintf(d->phase, sizeof d->phase, "%s", name);
	show_messages(d, !strcmp(text(event, "event"), "progress"));
	if (d->terminal)
		show_line(d);
	else if (phase && changed) {
		printf("%s -> %s: %s\n", d->vm, d->host, d->phase);
		fflush(stdout);
	}
}

static void print_moved(struct display *d, const json_t *event, int status)
{
	char disk[TEXT_BYTES], memory[TEXT_BYTES], wire[TEXT_BYTES], clean[SHOWN_BYTES];
	json_t *path;
	size_t i;
	printf("VM %s moved to %s", d->vm, d->host);
	if (json_is_true(json_object_get(event, "cold")))
		printf(" in %.1f s, and is stopped there; disks %s, on the wire %s",
		       number(event, "total_ms") / 1000, text_bytes(number(event, "disk_bytes"), disk),
		       text_bytes(number(event, "wire_bytes"), wire));
	else if (json_is_number(json_object_get(event, "downtime_ms")))
		printf(" in %.1f s; downtime %.0f ms, disks %s, memory %s, on the wire %s, %.0f rounds",
		       number(event, "total_ms") / 1000, number(event, "downtime_ms"),
		       text_bytes(number(event, "disk_bytes"), disk),
		       text_bytes(number(event, "memory_bytes"), memory),
		       text_bytes(number(event, "wire_bytes"), wire), number(event, "rounds"));
	putchar('\n');
	fflush(stdout);
	json_array_foreach(json_object_get(event, "left_behind"), i, path)
	{
		text_clean(clean, sizeof clean, json_string_value(path));
		fprintf(stderr, "snmigrate: left behind: %s\n", clean);
	}
	if (status != EXIT_MOVED)
		fprintf(stderr, "snmigrate: %s\n", shown(event, "reason", clean));
}

static void print_reason(struct display *d, const json_t *event, int status)
{
	char clean[SHOWN_BYTES];
	const char *reason = shown(event, *text(event, "reason") ? "reason" : "result", clean);
	if (status == EXIT_FAILED || status == EXIT_CANCELLED)
		fprintf(stderr, "snmigrate: VM %s stays here: %s\n", d->vm, reason);
	else
		fprintf(stderr, "snmigrate: %s\n", reason);
}

/* Predicted against measured. */
static void print_rehearsed(struct display *d, const json_t *event)
{
	char disk[TEXT_BYTES], memory[TEXT_BYTES], wire[TEXT_BYTES];
	printf("VM %s was rehearsed to %s and %s here; in %.1f s", d->vm, d->host,
	       json_is_true(json_object_get(event, "cold")) ? "stays" : "runs on",
	       number(event, "total_ms") / 1000);
	if (d->predicted && number(d->predicted, "total_ms") > 0)
		printf(" (predicted: %.1f s)", number(d->predicted, "total_ms") / 1000);
	printf(": disks %s, memory %s, on the wire %s, %.0f rounds\n",
	       text_bytes(number(event, "disk_bytes"), disk),
	       text_bytes(number(event, "memory_bytes"), memory),
	       text_bytes(number(event, "wire_bytes"), wire), number(event, "rounds"));
	if (json_is_number(json_object_get(event, "predicted_downtime_ms"))) {
		printf("  the guest would have stood still for about %.0f ms",
		       number(event, "predicted_downtime_ms"));
		if (d->predicted)
			printf(" (predicted: %.0f to %.0f ms)", number(d->predicted, "downtime_least_ms"),
			       number(d->predicted, "downtime_most_ms"));
		putchar('\n');
	}
	printf("  %s keeps what came of its disks for the move (snmigrate partial list there)\n", d->host);
	fflush(stdout);
}

int display_end(struct display *d, json_t *event)
{
	json_t *exit_status = json_object_get(event, "exit");
	bool moved = !strcmp(text(event, "result"), "moved");
	int status = json_is_integer(exit_status) ? (int)json_integer_value(exit_status) : EXIT_FAILED;
	if (!*d->host)
		text_clean(d->host, sizeof d->host, text(event, "destination"));
	bool rehearsed = !strcmp(text(event, "result"), "rehearsed");
	clear_line(d);
	if (d->json) {
		json_object_del(event, "final");
		if (d->predicted)
			json_object_set(event, "predicted", (json_t *)(uintptr_t)d->predicted);
		print_json(event);
		/* one clear sentence for people, also of scripts */
		if (!moved && !rehearsed)
			print_reason(d, event, status);
	} else if (rehearsed) {
		print_rehearsed(d, event);
	} else if (moved) {
		print_moved(d, event, status);
	} else {
		print_reason(d, event, status);
	}
	return status;
}

int display_failure(struct display *d, const char *result, int exit_status, const char *reason)
{
	json_t *o = json_pack("{s:s, s:s, s:i, s:o, s:s, s:s, s:[]}", "event", "end", "result", result,
			      "exit", exit_status, "reason", jsonl_text(reason), "vm", d->vm, "destination",
			      d->host, "left_behind");
	static const char *const figures[] = {"total_ms",     "storage_ms", "memory_ms",  "downtime_ms",
					      "memory_bytes", "disk_bytes", "wire_bytes", "rounds"};
	for (size_t i = 0; o && i < sizeof figures / sizeof *figures; i++)
		json_object_set_new(o, figures[i], json_integer(0));
	int status = o ? display_end(d, o) : exit_status;
	json_decref(o);
	return status;
}
