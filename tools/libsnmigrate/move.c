/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "host/client.h"
#include "host/config.h"
#include "host/exit.h"
#include "host/ini.h"
#include "tools/libsnmigrate/receipt.h"
#include "tools/libsnmigrate/snmigrate.h"

#define FIRST_REPLY_TIMEOUT_MS 60000
#define CALL_TIMEOUT_MS	       60000
#define POLL_MS		       250
#define RECONNECT_MS	       30000 /* docs/handover.md, "What users see" */
#define DOWNTIME_MAX_MS	       3600000

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

/* What identifies the move when the daemon has to be asked anew. */
struct session {
	struct snmigrate *s;
	struct display display;
	char vm[64], uuid[40];
	json_int_t epoch;
	struct jsonl *link;
	struct receipt receipt;
};

static void remember(struct session *m, const json_t *reply)
{
	const char *uuid = json_string_value(json_object_get(reply, "uuid"));
	if (uuid)
		snprintf(m->uuid, sizeof m->uuid, "%s", uuid);
	m->epoch = json_integer_value(json_object_get(reply, "epoch"));
}

static json_t *watch_request(const struct session *m)
{
	json_t *o = json_pack("{s:s, s:s, s:I}", "cmd", "watch", "vm", m->vm, "epoch", m->epoch);
	if (*m->uuid)
		json_object_set_new(o, "uuid", json_string(m->uuid));
	return o;
}

/* The daemon has gone: the move goes on without it, and a new one will know. */
static int reconnect(struct session *m, struct error *err)
{
	uint64_t deadline = clock_now_ms() + RECONNECT_MS;
	jsonl_close(m->link);
	m->link = NULL;
	display_note(&m->display, "the daemon went away; the move goes on, looking for it for %d s",
		     RECONNECT_MS / 1000);
	do {
		clock_sleep_ms(POLL_MS);
		int status = 0;
		json_t *request = watch_request(m), *reply = NULL;
		int rc = client_connect(m->s->control, &m->link, err);
		if (!rc)
			rc = jsonl_call(m->link, request, &reply, &status, FIRST_REPLY_TIMEOUT_MS, err);
		json_decref(request);
		json_decref(reply);
		if (!rc)
			return 0;
		jsonl_close(m->link);
		m->link = NULL;
	} while (!interrupted && clock_now_ms() < deadline);
	return -ETIMEDOUT;
}

static int leave(struct session *m)
{
	/* not an outcome: the move has none yet */
	display_note(&m->display,
		     "the move of VM %s goes on; \"snmigrate watch %s\" follows it, \"snmigrate cancel %s\" "
		     "ends it",
		     m->vm, m->vm, m->vm);
	return 128 + SIGINT;
}

static int follow(struct session *m)
{
	char reason[512];
	for (;;) {
		json_t *event = NULL;
		struct error err = ERROR_INIT;
		if (interrupted)
			return leave(m);
		int rc = jsonl_read(m->link, &event, NULL, POLL_MS, &err);
		if (rc == -ETIMEDOUT)
			continue;
		if (rc < 0) {
			if (reconnect(m, &err) == 0)
				continue;
			if (interrupted)
				return leave(m);
			snprintf(reason, sizeof reason,
				 "snmigrated does not answer; the move of VM %s goes on by itself: start "
				 "snmigrated again, then see snmigrate watch %s",
				 m->vm, m->vm);
			return display_failure(&m->display, "in-doubt", EXIT_IN_DOUBT, reason);
		}
		if (json_object_get(event, "result")) {
			/* The outcome stays what it is: it is said in words that there is no receipt. */
			if (receipt_write(&m->receipt, event, &err))
				display_note(&m->display, "%s", err.message);
			int status = display_end(&m->display, event);
			json_decref(event);
			return status;
		}
		display_event(&m->display, event);
		json_decref(event);
	}
}

/* The first request, then the events. */
static int run(struct session *m, json_t *request)
{
	struct error err = ERROR_INIT;
	int status = EXIT_REFUSED;
	json_t *reply = NULL;
	catch_interrupts();
	int rc = client_connect(m->s->control, &m->link, &err);
	if (!rc)
		rc = jsonl_call(m->link, request, &reply, &status, FIRST_REPLY_TIMEOUT_MS, &err);
	json_decref(request);
	if (rc < 0) {
		static const char *const results[] = {[EXIT_REFUSED] = "refused",
						      [EXIT_FAILED] = "failed",
						      [EXIT_CANCELLED] = "cancelled",
						      [EXIT_IN_DOUBT] = "in-doubt",
						      [EXIT_CRASHED] = "crashed"};
		const char *result = NULL;
		if (status > 0 && status < (int)(sizeof results / sizeof *results))
			result = results[status];
		status = display_failure(&m->display, result ? result : "failed",
					 status ? status : EXIT_FAILED, err.message);
	} else {
		remember(m, reply);
		status = follow(m);
	}
	json_decref(reply);
	jsonl_close(m->link);
	if (m->receipt.fd >= 0)
		display_note(&m->display, "no receipt was written: there is no end of a move to write down");
	receipt_end(&m->receipt);
	return status;
}

/* --receipt: refused before anything is asked for if it could not be written. */
static int begin_receipt(struct session *m, const char *path)
{
	struct error err = ERROR_INIT;
	m->receipt = RECEIPT_NONE;
	if (!path || !receipt_begin(&m->receipt, path, &err))
		return 0;
	return snmigrate_usage_error("--receipt: %s", err.message);
}

static int parse_downtime(const char *arg, json_t *options)
{
	char *end;
	unsigned long ms = strtoul(arg, &end, 10);
	if (*arg < '0' || *arg > '9' || *end || ms == 0 || ms > DOWNTIME_MAX_MS)
		return snmigrate_usage_error("--max-downtime %s: not a number of milliseconds", arg);
	json_object_set_new(options, "max_downtime_ms", json_integer((json_int_t)ms));
	return 0;
}

static int parse_bandwidth(const char *arg, json_t *options)
{
	uint64_t rate;
	if (size_parse(arg, &rate) || rate > INT64_MAX)
		return snmigrate_usage_error("--bandwidth %s: not a number of bytes a second, such as 200M",
					     arg);
	json_object_set_new(options, "bandwidth_bytes_per_s", json_integer((json_int_t)rate));
	return 0;
}

static int parse_mirror(const char *arg, json_t *options)
{
	if (strcmp(arg, "sync") && strcmp(arg, "buffered"))
		return snmigrate_usage_error("--mirror %s: sync or buffered is needed", arg);
	json_object_set_new(options, "mirror", json_string(arg));
	return 0;
}

static int parse_mirror_buffer(const char *arg, json_t *options)
{
	uint64_t bytes;
	if (size_parse(arg, &bytes) || bytes > INT64_MAX)
		return snmigrate_usage_error("--mirror-buffer %s: not a number of bytes, such as 64M", arg);
	json_object_set_new(options, "mirror_buffer_bytes", json_integer((json_int_t)bytes));
	return 0;
}

static int parse_time(const char *option, const char *arg, unsigned max_s, const char *key, json_t *options)
{
	unsigned seconds;
	if (duration_parse(arg, max_s, &seconds))
		return snmigrate_usage_error("%s %s: not a time such as 30s, 5m or 2h, at most %ud", option,
					     arg, max_s / 86400);
	json_object_set_new(options, key, json_integer(seconds));
	return 0;
}

int snmigrate_move(struct snmigrate *s, int argc, char **argv)
{
	/* clang-format off */
	static const struct option known[] = {
		{"with-storage", no_argument, NULL, 's'},
		{"json", no_argument, NULL, 'j'},
		{"keep-source", no_argument, NULL, 'k'},
		{"suspend", no_argument, NULL, 'p'},
		{"no-tls", no_argument, NULL, 'n'},
		{"max-downtime", required_argument, NULL, 'd'},
		{"bandwidth", required_argument, NULL, 'b'},
		{"receipt", required_argument, NULL, 'r'},
		{"mirror", required_argument, NULL, 'm'},
		{"mirror-buffer", required_argument, NULL, 'B'},
		{"retry-for", required_argument, NULL, 'R'},
		{"keep-partial", required_argument, NULL, 'P'},
		{"control", required_argument, NULL, 'c'},
		{0}};
	/* clang-format on */
	json_t *options = json_object();
	const char *receipt = NULL;
	bool json = false;
	int c, status = 0;
	while (!status && (c = getopt_long(argc, argv, "", known, NULL)) != -1) {
		switch (c) {
		case 's':
			json_object_set_new(options, "with_storage", json_true());
			break;
		case 'j':
			json = true;
			break;
		case 'k':
			json_object_set_new(options, "keep_source", json_true());
			break;
		case 'p':
			json_object_set_new(options, "suspend", json_true());
			break;
		case 'n':
			json_object_set_new(options, "no_tls", json_true());
			break;
		case 'd':
			status = parse_downtime(optarg, options);
			break;
		case 'b':
			status = parse_bandwidth(optarg, options);
			break;
		case 'r':
			receipt = optarg;
			break;
		case 'm':
			status = parse_mirror(optarg, options);
			break;
		case 'B':
			status = parse_mirror_buffer(optarg, options);
			break;
		case 'R':
			status = parse_time("--retry-for", optarg, HOST_RETRY_FOR_MAX_S, "retry_for_s",
					    options);
			break;
		case 'P':
			status = parse_time("--keep-partial", optarg, HOST_KEEP_PARTIAL_MAX_S,
					    "keep_partial_s", options);
			break;
		case 'c':
			s->control = optarg;
			break;
		default:
			status = client_option_error("snmigrate", argv);
		}
	}
	if (!status && argc - optind != 2)
		status = snmigrate_usage_error("a move takes a VM and a host");
	if (!status && (strlen(argv[optind]) > 63 || strlen(argv[optind + 1]) > 63))
		status = snmigrate_usage_error("names have at most 63 characters");
	struct session m = {.s = s};
	if (!status)
		status = begin_receipt(&m, receipt);
	if (status) {
		json_decref(options);
		return status;
	}
	const char *vm = argv[optind], *host = argv[optind + 1];
	snprintf(m.vm, sizeof m.vm, "%s", vm);
	display_begin(&m.display, json, vm, host);
	return run(&m, json_pack("{s:s, s:s, s:s, s:o}", "cmd", "move", "vm", vm, "host", host, "options",
				 options));
}

int snmigrate_watch(struct snmigrate *s, int argc, char **argv)
{
	static const struct option known[] = {{"json", no_argument, NULL, 'j'},
					      {"receipt", required_argument, NULL, 'r'},
					      {"control", required_argument, NULL, 'c'},
					      {0}};
	const char *receipt = NULL;
	bool json = false;
	int c;
	while ((c = getopt_long(argc, argv, "", known, NULL)) != -1) {
		if (c == 'j')
			json = true;
		else if (c == 'r')
			receipt = optarg;
		else if (c == 'c')
			s->control = optarg;
		else
			return client_option_error("snmigrate", argv);
	}
	if (argc - optind != 1 || strlen(argv[optind]) > 63)
		return snmigrate_usage_error("watch takes one VM");
	struct session m = {.s = s};
	int status = begin_receipt(&m, receipt);
	if (status)
		return status;
	snprintf(m.vm, sizeof m.vm, "%s", argv[optind]);
	display_begin(&m.display, json, m.vm, "");
	return run(&m, watch_request(&m));
}

int snmigrate_tune(struct snmigrate *s, int argc, char **argv)
{
	static const struct option known[] = {
		{"bandwidth", required_argument, NULL, 'b'}, {"control", required_argument, NULL, 'c'}, {0}};
	json_t *request = json_pack("{s:s}", "cmd", "tune");
	int c, status = 0;
	while (!status && (c = getopt_long(argc, argv, "", known, NULL)) != -1) {
		if (c == 'b')
			status = parse_bandwidth(optarg, request);
		else if (c == 'c')
			s->control = optarg;
		else
			status = client_option_error("snmigrate", argv);
	}
	if (!status && argc - optind != 1)
		status = snmigrate_usage_error("tune takes one VM");
	if (!status && json_object_size(request) == 1)
		status = snmigrate_usage_error("tune: nothing to change: give --bandwidth RATE");
	if (status) {
		json_decref(request);
		return status;
	}
	json_object_set_new(request, "vm", json_string(argv[optind]));
	return client_request("snmigrate", s->control, request, NULL, CALL_TIMEOUT_MS);
}

int snmigrate_cancel(struct snmigrate *s, int argc, char **argv)
{
	static const struct option known[] = {{"control", required_argument, NULL, 'c'}, {0}};
	int c;
	while ((c = getopt_long(argc, argv, "", known, NULL)) != -1) {
		if (c != 'c')
			return client_option_error("snmigrate", argv);
		s->control = optarg;
	}
	if (argc - optind != 1)
		return snmigrate_usage_error("cancel takes one VM");
	return client_request("snmigrate", s->control,
			      json_pack("{s:s, s:s}", "cmd", "cancel", "vm", argv[optind]), NULL,
			      CALL_TIMEOUT_MS);
}
