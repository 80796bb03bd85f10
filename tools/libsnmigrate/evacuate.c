/* SPDX-License-Identifier: Apache-2.0 */
/* A host is emptied and filled again: evacuate, return, maintenance. The daemon does it; this asks for it and
 * looks on. */
#include <errno.h>
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "host/client.h"
#include "host/exit.h"
#include "host/ini.h"
#include "host/jsonl.h"
#include "tools/libsnmigrate/session.h"
#include "tools/libsnmigrate/snmigrate.h"
#include "tui/text.h"

#define CALL_TIMEOUT_MS	  60000
#define SURVEY_TIMEOUT_MS 3600000 /* many VMs on many hosts, each pair asked after */
#define LINE_TIMEOUT_MS	  10000	  /* for the rest of a line */
#define WAIT_MS		  250
#define SHOWN_BYTES	  1024
#define PARALLEL_MAX	  64
#define DEADLINE_MAX_S	  (30u * 86400)

static volatile sig_atomic_t interrupted;

static void on_interrupt(int sig)
{
	interrupted = 1;
}

static const char *text(const json_t *o, const char *key)
{
	const char *s = json_string_value(json_object_get(o, key));
	return s ? s : "";
}

static const char *shown(const json_t *o, const char *key, char buf[SHOWN_BYTES])
{
	text_clean(buf, SHOWN_BYTES, text(o, key));
	return buf;
}

static bool has_number(const json_t *o, const char *key)
{
	return json_is_number(json_object_get(o, key));
}

static uint64_t number(const json_t *o, const char *key)
{
	double n = json_number_value(json_object_get(o, key));
	return n > 0 ? (uint64_t)n : 0;
}

static bool is_state(const json_t *vm, const char *state)
{
	return !strcmp(text(vm, "state"), state);
}

static void print_json(json_t *o, const char *event)
{
	if (event)
		json_object_set_new(o, "event", json_string(event));
	char *line = json_dumps(o, JSON_COMPACT);
	if (line)
		puts(line);
	free(line);
	fflush(stdout);
}

/* ---- a plan as a table ---- */

/* "2.1 s", or "-" */
static const char *span(const json_t *o, const char *key, char buf[TEXT_BYTES])
{
	if (!has_number(o, key))
		return "-";
	return text_span(number(o, key), buf);
}

static void print_vm(const json_t *vm)
{
	char name[SHOWN_BYTES], to[SHOWN_BYTES], why[SHOWN_BYTES], a[TEXT_BYTES], b[TEXT_BYTES],
		c[TEXT_BYTES], d[TEXT_BYTES];
	bool goes = !is_state(vm, "stays") && !is_state(vm, "off");
	printf("  %-16s %-10s %-16s %8d %10s %10s %10s %10s\n", shown(vm, "vm", name), text(vm, "state"),
	       goes ? shown(vm, "destination", to) : "-", (int)number(vm, "priority"),
	       span(vm, "predicted_begin_ms", a), span(vm, "predicted_end_ms", b), span(vm, "begin_ms", c),
	       span(vm, "end_ms", d));
	if (*shown(vm, "reason", why))
		printf("                   %s\n", why);
}

static void print_plan(const json_t *plan)
{
	char host[SHOWN_BYTES], peer[SHOWN_BYTES], buf[TEXT_BYTES];
	const json_t *vms = json_object_get(plan, "vms");
	size_t i;
	json_t *vm;
	bool back = !strcmp(text(plan, "kind"), "return");
	printf("%s of %s: %zu VM%s, %d at once, in the order of %s\n", back ? "Return to" : "Evacuation",
	       back ? shown(plan, "peer", peer) : shown(plan, "host", host), json_array_size(vms),
	       json_array_size(vms) == 1 ? "" : "s", (int)number(plan, "parallel"), text(plan, "order"));
	if (json_array_size(vms))
		printf("  %-16s %-10s %-16s %8s %10s %10s %10s %10s\n", "VM", "", "TO", "PRIORITY", "BEGINS",
		       "ENDS", "BEGAN", "ENDED");
	json_array_foreach(vms, i, vm) print_vm(vm);
	if (has_number(plan, "predicted_ms"))
		printf("Predicted: %s in all.\n", text_span(number(plan, "predicted_ms"), buf));
	if (*text(plan, "warning"))
		printf("Not written down, so a restarted daemon would not take it up: %s\n",
		       shown(plan, "warning", host));
}

static void print_outcome(const json_t *end)
{
	char why[SHOWN_BYTES], buf[TEXT_BYTES];
	printf("%s: %s", text(end, "result"), shown(end, "reason", why));
	if (has_number(end, "total_ms"))
		printf(" (took %s", text_span(number(end, "total_ms"), buf));
	if (has_number(end, "total_ms") && has_number(end, "predicted_ms"))
		printf(", predicted %s", text_span(number(end, "predicted_ms"), buf));
	puts(has_number(end, "total_ms") ? ")" : "");
}

/* ---- following ---- */

struct watching {
	struct snmigrate *s;
	bool json;
	struct jsonl *link;
	json_int_t id; /* of the plan; 0: not heard of yet */
	uint64_t lost_ms;
};

static void print_event(const json_t *e)
{
	char vm[SHOWN_BYTES], to[SHOWN_BYTES], why[SHOWN_BYTES], a[TEXT_BYTES], b[TEXT_BYTES];
	if (strcmp(text(e, "event"), "vm"))
		return;
	printf("%s: %s", shown(e, "vm", vm), text(e, "state"));
	if (*text(e, "destination") &&
	    (is_state(e, "moving") || is_state(e, "moved") || is_state(e, "waiting")))
		printf(", %s", shown(e, "destination", to));
	if (is_state(e, "moved") && has_number(e, "end_ms") && has_number(e, "begin_ms")) {
		printf(" in %s", text_span(number(e, "end_ms") - number(e, "begin_ms"), a));
		if (has_number(e, "predicted_end_ms"))
			printf(", predicted %s",
			       text_span(number(e, "predicted_end_ms") - number(e, "predicted_begin_ms"), b));
	}
	if (!is_state(e, "moving") && *shown(e, "reason", why) &&
	    !(is_state(e, "moved") && !number(e, "exit")))
		printf(": %s", why);
	putchar('\n');
	fflush(stdout);
}

static void print_end(const json_t *end)
{
	char vm[SHOWN_BYTES], why[SHOWN_BYTES];
	size_t i;
	json_t *v;
	json_array_foreach(json_object_get(end, "vms"), i, v) if (!is_state(v, "moved"))
		printf("  %s: %s: %s\n", shown(v, "vm", vm), text(v, "state"), shown(v, "reason", why));
	print_outcome(end);
}

/* Whatever the exit, the last line of --json has a result. */
static int fail(const struct watching *w, const char *result, int status, const char *why)
{
	char clean[SHOWN_BYTES];
	text_clean(clean, sizeof clean, why);
	if (w->json) {
		json_t *o = json_pack("{s:s, s:i, s:o}", "result", result, "exit", status, "reason",
				      jsonl_text(why));
		print_json(o, "end");
		json_decref(o);
	}
	fprintf(stderr, "snmigrate: %s\n", clean);
	return status;
}

static int refused(const struct watching *w, const json_t *answer)
{
	const json_t *exit_status = json_object_get(answer, "exit");
	int status = json_is_integer(exit_status) ? (int)json_integer_value(exit_status) : EXIT_FAILED;
	return fail(w, status == EXIT_REFUSED ? "refused" : "failed", status, text(answer, "error"));
}

static int leave(const struct watching *w)
{
	fputs("snmigrate: the plan goes on; \"snmigrate evacuate --follow\" follows it, \"snmigrate evacuate "
	      "--cancel\" ends it\n",
	      stderr);
	return 128 + SIGINT;
}

/* 0, -EINTR, or that the daemon went away. */
static int read_line(struct watching *w, json_t **line, uint64_t timeout_ms, struct error *err)
{
	uint64_t until = clock_now_ms() + timeout_ms;
	while (!interrupted && clock_now_ms() < until) {
		struct pollfd p = {.fd = jsonl_fd(w->link), .events = POLLIN};
		if (jsonl_pending(w->link) || poll(&p, 1, WAIT_MS) > 0)
			return jsonl_read(w->link, line, NULL, LINE_TIMEOUT_MS, err);
	}
	return interrupted ? -EINTR : error_set(err, ETIMEDOUT, "snmigrated does not answer");
}

static int ask(struct watching *w, json_t *request, json_t **answer, struct error *err)
{
	jsonl_close(w->link);
	w->link = NULL;
	int rc = client_connect(w->s->control, &w->link, err);
	if (!rc)
		rc = jsonl_write(w->link, request, -1, err);
	if (!rc)
		rc = read_line(w, answer, w->id ? CALL_TIMEOUT_MS : SURVEY_TIMEOUT_MS, err);
	return rc;
}

/* The daemon went away: the plan is taken up by the next one. 0, -EINTR or -ETIMEDOUT. */
static int find_again(struct watching *w, struct error *err)
{
	json_t *request = json_pack("{s:s, s:s, s:I}", "cmd", "plan", "do", "follow", "id", w->id),
	       *answer = NULL;
	uint64_t until = clock_now_ms() + SESSION_RECONNECT_MS;
	int rc = -ETIMEDOUT;
	fputs("snmigrate: the daemon went away; the moves go on, looking for it for 30 s\n", stderr);
	while (rc && rc != -EINTR && clock_now_ms() < until) {
		poll(NULL, 0, WAIT_MS);
		rc = interrupted ? -EINTR : ask(w, request, &answer, err);
		/* one that has just begun may not have read the journal yet */
		if (!rc && !json_is_true(json_object_get(answer, "ok")))
			rc = -EAGAIN;
		json_decref(answer);
		answer = NULL;
	}
	json_decref(request);
	return rc;
}

static int follow_to_end(struct watching *w)
{
	struct error err = ERROR_INIT;
	for (;;) {
		json_t *event = NULL;
		int rc = read_line(w, &event, CALL_TIMEOUT_MS, &err);
		if (rc && rc != -EINTR)
			rc = find_again(w, &err);
		else if (!rc && strcmp(text(event, "event"), "end"))
			w->json ? print_json(event, NULL) : print_event(event);
		else if (!rc) {
			int status = (int)number(event, "exit");
			w->json ? print_json(event, NULL) : print_end(event);
			json_decref(event);
			return status;
		}
		json_decref(event);
		if (rc == -EINTR)
			return leave(w);
		if (rc)
			return fail(w, "in-doubt", EXIT_IN_DOUBT,
				    "snmigrated does not answer; the plan is taken up when it runs again: "
				    "snmigrate evacuate --follow");
	}
}

/* What a dry run says of the whole: whether something would stay that runs. */
static int judge_plan(const json_t *plan)
{
	size_t i;
	json_t *vm;
	int status = 0;
	json_array_foreach(json_object_get(plan, "vms"), i, vm)
	{
		bool late = json_is_true(json_object_get(vm, "late"));
		if (!is_state(vm, "off") && (!is_state(vm, "waiting") || late))
			status = EXIT_FAILED;
	}
	return status;
}

/* request is taken over. */
static int run(struct snmigrate *s, bool json, bool dry_run, json_t *request)
{
	struct watching w = {.s = s, .json = json};
	struct sigaction sa = {.sa_handler = on_interrupt};
	struct error err = ERROR_INIT;
	json_t *answer = NULL;
	sigaction(SIGINT, &sa, NULL);
	sigaction(SIGTERM, &sa, NULL);
	sigaction(SIGHUP, &sa, NULL);
	int status, rc = ask(&w, request, &answer, &err);
	json_t *plan = json_object_get(answer, "plan");
	if (rc == -EINTR) {
		status = leave(&w);
	} else if (rc < 0) {
		status = fail(&w, "refused", EXIT_REFUSED, err.message);
	} else if (!json_is_true(json_object_get(answer, "ok"))) {
		status = refused(&w, answer);
	} else {
		w.id = json_integer_value(json_object_get(plan, "id"));
		json ? print_json(plan, "plan") : print_plan(plan);
		status = dry_run ? judge_plan(plan) : follow_to_end(&w);
	}
	json_decref(answer);
	json_decref(request);
	jsonl_close(w.link);
	return status;
}

/* ---- evacuate and return ---- */

static int parse_to(const char *arg, json_t *request)
{
	json_t *to = json_array();
	json_object_set_new(request, "to", to);
	for (const char *p = arg; *p;) {
		size_t n = strcspn(p, ",");
		json_t *name = n && n <= 63 ? json_stringn(p, n) : NULL;
		if (!name)
			return snmigrate_usage_error("--to %s: not a list of hosts such as host2,host3", arg);
		json_array_append_new(to, name);
		p += n + (p[n] == ',');
	}
	return json_array_size(to) ? 0
				   : snmigrate_usage_error("--to: not a list of hosts such as host2,host3");
}

static int parse_parallel(const char *arg, json_t *request)
{
	char *end;
	unsigned long n = strtoul(arg, &end, 10);
	if (*arg < '0' || *arg > '9' || *end || !n || n > PARALLEL_MAX)
		return snmigrate_usage_error("--parallel %s: not a number from 1 to %d", arg, PARALLEL_MAX);
	json_object_set_new(request, "parallel", json_integer((json_int_t)n));
	return 0;
}

static int parse_deadline(const char *arg, json_t *request)
{
	unsigned seconds;
	if (duration_parse(arg, DEADLINE_MAX_S, &seconds) || !seconds)
		return snmigrate_usage_error("--deadline %s: not a time such as 90s, 30m or 2h, at most 30d",
					     arg);
	json_object_set_new(request, "deadline_s", json_integer(seconds));
	return 0;
}

static int parse_choice(const char *option, const char *key, const char *arg, const char *const choices[3],
			json_t *request)
{
	for (int i = 0; i < 3; i++) {
		if (strcmp(arg, choices[i]))
			continue;
		json_object_set_new(request, key, json_string(arg));
		return 0;
	}
	return snmigrate_usage_error("%s %s: %s, %s or %s is needed", option, arg, choices[0], choices[1],
				     choices[2]);
}

/* --status, --follow, --cancel: of the plan that is under way here. */
static int look_on(struct snmigrate *s, const char *what, bool json)
{
	json_t *request = json_pack("{s:s, s:s}", "cmd", "plan", "do", what), *reply = NULL;
	if (!strcmp(what, "follow"))
		return run(s, json, false, request);
	int status = client_request("snmigrate", s->control, request, &reply, CALL_TIMEOUT_MS);
	json_t *plan = json_object_get(reply, "plan");
	if (status || !strcmp(what, "cancel")) {
		json_decref(reply);
		return status;
	}
	if (json && json_is_object(plan)) {
		print_json(plan, "plan");
	} else if (json) {
		puts("{\"event\":\"plan\",\"id\":null}");
	} else if (json_is_object(plan)) {
		print_plan(plan);
		if (*text(plan, "result"))
			print_outcome(plan);
		else
			puts("Under way (snmigrate evacuate --follow).");
	} else {
		puts("Neither an evacuation nor a return is known here.");
	}
	json_decref(reply);
	return 0;
}

/* clang-format off */
static const struct option known[] = {
	{"to", required_argument, NULL, 't'},
	{"parallel", required_argument, NULL, 'p'},
	{"deadline", required_argument, NULL, 'd'},
	{"order", required_argument, NULL, 'o'},
	{"backing", required_argument, NULL, 'K'},
	{"dry-run", no_argument, NULL, 'n'},
	{"with-storage", no_argument, NULL, 's'},
	{"json", no_argument, NULL, 'j'},
	{"status", no_argument, NULL, 'S'},
	{"follow", no_argument, NULL, 'F'},
	{"cancel", no_argument, NULL, 'C'},
	{"control", required_argument, NULL, 'c'},
	{0}};
/* clang-format on */

static int begin(struct snmigrate *s, int argc, char **argv, const char *cmd)
{
	static const char *const orders[] = {"priority", "size", "fastest"};
	static const char *const backings[] = {"flatten", "chain", "reuse"};
	bool json = false, dry_run = false, back = !strcmp(cmd, "return");
	const char *what = NULL;
	json_t *request = json_pack("{s:s}", "cmd", cmd);
	int c, status = 0, options = 0;
	while (!status && (c = getopt_long(argc, argv, "", known, NULL)) != -1) {
		options += c != 'j' && c != 'c' && !strchr("SFC", c);
		if (c == 't' && !back)
			status = parse_to(optarg, request);
		else if (c == 'p')
			status = parse_parallel(optarg, request);
		else if (c == 'd')
			status = parse_deadline(optarg, request);
		else if (c == 'o')
			status = parse_choice("--order", "order", optarg, orders, request);
		else if (c == 'K')
			status = parse_choice("--backing", "backing", optarg, backings, request);
		else if (c == 'n')
			dry_run = true;
		else if (c == 's')
			json_object_set_new(request, "with_storage", json_true());
		else if (c == 'j')
			json = true;
		else if (c == 'c')
			s->control = optarg;
		else if (c == 'S' && !back && !what)
			what = "status";
		else if (c == 'F' && !back && !what)
			what = "follow";
		else if (c == 'C' && !back && !what)
			what = "cancel";
		else if (c != '?' && c != ':')
			status = snmigrate_usage_error(
				"%s does not take %s%s", cmd, argv[optind - 1],
				what ? " beside another one of --status, --follow, --cancel" : "");
		else
			status = client_option_error("snmigrate", argv);
	}
	if (!status && what && (options || argc > optind))
		status = snmigrate_usage_error("evacuate --%s stands by itself", what);
	if (!status && !what && (argc - optind != 1 || strlen(argv[optind]) > 63))
		status = snmigrate_usage_error("%s takes one host", cmd);
	json_t *host = status || what ? NULL : json_string(argv[optind]);
	if (!status && !what && !host)
		status = snmigrate_usage_error("%s: that is not the name of a host", cmd);
	if (status || what) {
		json_decref(host);
		json_decref(request);
		return status ? status : look_on(s, what, json);
	}
	json_object_set_new(request, "host", host);
	json_object_set_new(request, "dry_run", json_boolean(dry_run));
	return run(s, json, dry_run, request);
}

int snmigrate_evacuate(struct snmigrate *s, int argc, char **argv)
{
	return begin(s, argc, argv, "evacuate");
}

int snmigrate_return(struct snmigrate *s, int argc, char **argv)
{
	return begin(s, argc, argv, "return");
}

/* ---- maintenance ---- */

int snmigrate_maintenance(struct snmigrate *s, int argc, char **argv)
{
	static const struct option options[] = {{"control", required_argument, NULL, 'c'}, {0}};
	int c;
	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (c != 'c')
			return client_option_error("snmigrate", argv);
		s->control = optarg;
	}
	const char *word = argc - optind == 1 ? argv[optind] : "";
	bool on = !strcmp(word, "on");
	if (!on && strcmp(word, "off"))
		return snmigrate_usage_error("maintenance takes on or off");
	return client_request("snmigrate", s->control,
			      json_pack("{s:s, s:b}", "cmd", "maintenance", "on", on), NULL, CALL_TIMEOUT_MS);
}
