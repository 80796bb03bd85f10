/* SPDX-License-Identifier: Apache-2.0 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "host/exit.h"
#include "host/jsonl.h"
#include "tools/libsnmigrate/snmigrate.h"

static const char *text(const json_t *o, const char *key)
{
	const char *s = json_string_value(json_object_get(o, key));
	return s ? s : "";
}

static double number(const json_t *o, const char *key)
{
	return json_number_value(json_object_get(o, key));
}

void display_begin(struct display *d, bool json, const char *vm, const char *host)
{
	*d = (struct display){.json = json, .terminal = !json && isatty(STDOUT_FILENO)};
	snprintf(d->vm, sizeof d->vm, "%s", vm);
	snprintf(d->host, sizeof d->host, "%s", host);
}

static void print_json(json_t *event)
{
	char *line = json_dumps(event, JSON_COMPACT);
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
	va_list ap;
	clear_line(d);
	fflush(stdout);
	va_start(ap, fmt);
	fputs("snmigrate: ", stderr);
	vfprintf(stderr, fmt, ap);
	fputc('\n', stderr);
	va_end(ap);
}

/* "12.3 MB": decimal, as links are. */
static const char *bytes(double n, char *buf, size_t size)
{
	static const char *const units[] = {"B", "kB", "MB", "GB", "TB"};
	unsigned u = 0;
	while (n >= 999.5 && u < 4) {
		n /= 1000;
		u++;
	}
	snprintf(buf, size, u && n < 99.95 ? "%.1f %s" : "%.0f %s", n, units[u]);
	return buf;
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

static void show_line(struct display *d, const json_t *event)
{
	char rate[32], dirty[32], left[48] = "";
	double eta = number(event, "eta_ms"), speed = number(event, "rate_bytes_per_s");
	if (eta > 0) {
		unsigned long s = (unsigned long)((eta + 999) / 1000);
		snprintf(left, sizeof left, "  %lu:%02lu left", s / 60, s % 60);
	}
	char line[256];
	int n = snprintf(line, sizeof line, "%s -> %s  %-9s %3.0f %%  %s/s", d->vm, d->host, d->phase,
			 d->percent, bytes(speed, rate, sizeof rate));
	double dirtied = number(event, "dirty_bytes_per_s");
	if (dirtied > 0 && n > 0 && (size_t)n < sizeof line)
		n += snprintf(line + n, sizeof line - (size_t)n, "  dirty %s/s",
			      bytes(dirtied, dirty, sizeof dirty));
	if (n > 0 && (size_t)n < sizeof line)
		snprintf(line + n, sizeof line - (size_t)n, "%s", left);
	size_t len = strlen(line);
	int pad = d->width > len ? (int)(d->width - len) : 0;
	printf("\r%s%*s", line, pad, "");
	d->width = (unsigned)len;
	fflush(stdout);
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
		return;
	}
	if (!*d->host) /* of a watch */
		snprintf(d->host, sizeof d->host, "%s", text(event, "peer"));
	bool changed = *text(event, "phase") && strcmp(d->phase, text(event, "phase"));
	if (changed)
		snprintf(d->phase, sizeof d->phase, "%s", text(event, "phase"));
	if (d->terminal)
		show_line(d, event);
	else if (phase && changed) {
		printf("%s -> %s: %s\n", d->vm, d->host, d->phase);
		fflush(stdout);
	}
}

static void print_moved(struct display *d, const json_t *event, int status)
{
	char disk[32], memory[32], wire[32];
	json_t *path;
	size_t i;
	printf("VM %s moved to %s", d->vm, d->host);
	if (json_is_number(json_object_get(event, "downtime_ms")))
		printf(" in %.1f s; downtime %.0f ms, disks %s, memory %s, on the wire %s, %.0f rounds",
		       number(event, "total_ms") / 1000, number(event, "downtime_ms"),
		       bytes(number(event, "disk_bytes"), disk, sizeof disk),
		       bytes(number(event, "memory_bytes"), memory, sizeof memory),
		       bytes(number(event, "wire_bytes"), wire, sizeof wire), number(event, "rounds"));
	putchar('\n');
	fflush(stdout);
	json_array_foreach(json_object_get(event, "left_behind"), i, path)
		fprintf(stderr, "snmigrate: left behind: %s\n", json_string_value(path));
	if (status != EXIT_MOVED)
		fprintf(stderr, "snmigrate: %s\n", text(event, "reason"));
}

static void print_reason(struct display *d, const json_t *event, int status)
{
	const char *reason = text(event, "reason");
	if (!*reason)
		reason = text(event, "result");
	if (status == EXIT_FAILED || status == EXIT_CANCELLED)
		fprintf(stderr, "snmigrate: VM %s stays here: %s\n", d->vm, reason);
	else
		fprintf(stderr, "snmigrate: %s\n", reason);
}

int display_end(struct display *d, json_t *event)
{
	json_t *exit_status = json_object_get(event, "exit");
	bool moved = !strcmp(text(event, "result"), "moved");
	int status = json_is_integer(exit_status) ? (int)json_integer_value(exit_status) : EXIT_FAILED;
	if (!*d->host)
		snprintf(d->host, sizeof d->host, "%s", text(event, "destination"));
	clear_line(d);
	if (d->json) {
		json_object_del(event, "final");
		print_json(event);
		/* one clear sentence for people, also of scripts */
		if (!moved)
			print_reason(d, event, status);
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
