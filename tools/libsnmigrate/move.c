/* SPDX-License-Identifier: Apache-2.0 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "host/client.h"
#include "host/config.h"
#include "host/exit.h"
#include "host/ini.h"
#include "tools/libsnmigrate/receipt.h"
#include "tools/libsnmigrate/snmigrate.h"

#define CALL_TIMEOUT_MS	      60000
#define DOWNTIME_MAX_MS	      3600000
#define DEVICE_PATH_MAX_BYTES 255
#define ZSTD_LEVEL_MAX	      19
#define STREAMS_MAX	      16
#define ROUNDS_MAX	      10000
#define PRECOPY_MAX_S	      86400

/* --receipt: refused before anything is asked for if it could not be written. */
static int begin_receipt(struct receipt *r, const char *path)
{
	struct error err = ERROR_INIT;
	*r = RECEIPT_NONE;
	if (!path || !receipt_begin(r, path, &err))
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

/* One of some words. */
struct choice {
	const char *option, *key;
	const char *words[4]; /* up to NULL */
	const char *needed;
};

static const struct choice backing = {
	"--backing", "backing", {"flatten", "chain", "reuse"}, "flatten, chain or reuse"};
static const struct choice priority = {
	"--priority", "priority", {"guest", "balanced", "finish"}, "guest, balanced or finish"};
static const struct choice on_exceed = {
	"--on-exceed", "on_exceed", {"cancel", "throttle", "postcopy"}, "cancel, throttle or postcopy"};
static const struct choice postcopy = {
	"--postcopy", "postcopy", {"auto", "now", "never"}, "auto, now or never"};

static int parse_choice(const struct choice *choice, const char *arg, json_t *options)
{
	for (size_t i = 0; choice->words[i]; i++) {
		if (strcmp(arg, choice->words[i]))
			continue;
		json_object_set_new(options, choice->key, json_string(arg));
		return 0;
	}
	return snmigrate_usage_error("%s %s: %s is needed", choice->option, arg, choice->needed);
}

static int parse_rounds(const char *arg, json_t *options)
{
	char *end;
	unsigned long n = strtoul(arg, &end, 10);
	if (*arg < '0' || *arg > '9' || *end || !n || n > ROUNDS_MAX)
		return snmigrate_usage_error("--max-rounds %s: not a number from 1 to %d", arg, ROUNDS_MAX);
	json_object_set_new(options, "max_rounds", json_integer((json_int_t)n));
	return 0;
}

/* Of pre-copy; 0: any time. */
static int parse_max_time(const char *arg, json_t *options)
{
	unsigned seconds;
	if (duration_parse(arg, PRECOPY_MAX_S, &seconds))
		return snmigrate_usage_error("--max-time %s: not a time such as 90s or 10m, at most 24h",
					     arg);
	json_object_set_new(options, "max_time_ms", json_integer((json_int_t)seconds * 1000));
	return 0;
}

static int parse_to_disk(const char *arg, json_t *options)
{
	const char *eq = strchr(arg, '=');
	if (!eq || eq == arg || eq[1] != '/' || strlen(eq + 1) > DEVICE_PATH_MAX_BYTES)
		return snmigrate_usage_error("--to-disk %s: DISK=/DEVICE is needed", arg);
	json_t *to = json_object_get(options, "to_disk");
	if (!to) {
		to = json_object();
		json_object_set_new(options, "to_disk", to);
	}
	char id[64];
	snprintf(id, sizeof id, "%.*s", (int)(eq - arg), arg);
	json_t *path = json_string(eq + 1);
	if (!path || json_object_get(to, id)) {
		json_decref(path);
		return snmigrate_usage_error("--to-disk %s: given twice, or no text", arg);
	}
	json_object_set_new(to, id, path);
	return 0;
}

/* auto, off, zstd or zstd:LEVEL */
static int parse_compress(const char *arg, json_t *options)
{
	const char *colon = strchr(arg, ':');
	size_t len = colon ? (size_t)(colon - arg) : strlen(arg);
	char *end = NULL;
	unsigned long level = colon ? strtoul(colon + 1, &end, 10) : 1;
	bool zstd = len == 4 && !strncmp(arg, "zstd", 4);
	bool known = zstd || (!colon && (!strcmp(arg, "auto") || !strcmp(arg, "off")));
	if (!known ||
	    (colon && (colon[1] < '0' || colon[1] > '9' || *end || !level || level > ZSTD_LEVEL_MAX)))
		return snmigrate_usage_error("--compress %s: not auto, off, zstd or zstd:LEVEL (1 to %d)",
					     arg, ZSTD_LEVEL_MAX);
	json_object_set_new(options, "compress", json_stringn(arg, len));
	json_object_set_new(options, "zstd_level", json_integer((json_int_t)level));
	return 0;
}

/* A size, off or auto. */
static int parse_delta_cache(const char *arg, json_t *options)
{
	uint64_t bytes = 0;
	if (!strcmp(arg, "auto")) {
		json_object_del(options, "delta_cache_bytes");
		return 0;
	}
	if (strcmp(arg, "off") && (size_parse(arg, &bytes) || bytes > INT64_MAX))
		return snmigrate_usage_error(
			"--delta-cache %s: not auto, off, or a number of bytes such as 256M", arg);
	json_object_set_new(options, "delta_cache_bytes", json_integer((json_int_t)bytes));
	return 0;
}

static int parse_streams(const char *arg, json_t *options)
{
	char *end;
	unsigned long n = strtoul(arg, &end, 10);
	if (*arg < '0' || *arg > '9' || *end || !n || n > STREAMS_MAX)
		return snmigrate_usage_error("--streams %s: not a number from 1 to %d", arg, STREAMS_MAX);
	json_object_set_new(options, "streams", json_integer((json_int_t)n));
	return 0;
}

/* clang-format off */
const struct option snmigrate_move_options[] = {
	{"with-storage", no_argument, NULL, 's'},
	{"json", no_argument, NULL, 'j'},
	{"plain", no_argument, NULL, 'l'},
	{"keep-source", no_argument, NULL, 'k'},
	{"quick", no_argument, NULL, 'q'},
	{"suspend", no_argument, NULL, 'p'},
	{"no-tls", no_argument, NULL, 'n'},
	{"max-downtime", required_argument, NULL, 'd'},
	{"priority", required_argument, NULL, 'y'},
	{"on-exceed", required_argument, NULL, 'e'},
	{"max-rounds", required_argument, NULL, 'o'},
	{"max-time", required_argument, NULL, 'T'},
	{"bandwidth", required_argument, NULL, 'b'},
	{"compress", required_argument, NULL, 'z'},
	{"delta-cache", required_argument, NULL, 'C'},
	{"streams", required_argument, NULL, 't'},
	{"receipt", required_argument, NULL, 'r'},
	{"mirror", required_argument, NULL, 'm'},
	{"mirror-buffer", required_argument, NULL, 'B'},
	{"retry-for", required_argument, NULL, 'R'},
	{"keep-partial", required_argument, NULL, 'P'},
	{"backing", required_argument, NULL, 'K'},
	{"to-disk", required_argument, NULL, 'D'},
	{"postcopy", required_argument, NULL, 'O'},
	{"control", required_argument, NULL, 'c'},
	{0}};
/* clang-format on */

/* What `check` predicts; what it finds in the way is the move's to say. New reference or NULL. */
static json_t *predict(struct snmigrate *s, const char *vm, const char *host, const json_t *options)
{
	struct jsonl *j = NULL;
	json_t *reply = NULL, *downtime = json_object_get(options, "max_downtime_ms"), *predicted = NULL;
	json_t *request = json_pack("{s:s, s:s, s:s, s:O?, s:b}", "cmd", "check", "vm", vm, "host", host,
				    "max_downtime_ms", downtime, "backing", 1);
	if (request && !client_connect(s->control, &j, NULL) &&
	    !jsonl_call(j, request, &reply, NULL, CALL_TIMEOUT_MS, NULL))
		predicted = json_incref(json_object_get(reply, "predicted"));
	jsonl_close(j);
	json_decref(reply);
	json_decref(request);
	return predicted;
}

static int move_or_rehearse(struct snmigrate *s, int argc, char **argv, bool rehearse)
{
	json_t *options = json_object();
	const char *receipt = NULL;
	struct follow_how how = {0};
	int c, status = 0;
	while (!status && (c = getopt_long(argc, argv, "", snmigrate_move_options, NULL)) != -1) {
		switch (c) {
		case 's':
			json_object_set_new(options, "with_storage", json_true());
			break;
		case 'j':
			how.json = true;
			break;
		case 'l':
			how.plain = true;
			break;
		case 'k':
			json_object_set_new(options, "keep_source", json_true());
			break;
		case 'q':
			json_object_set_new(options, "quick", json_true());
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
		case 'y':
			status = parse_choice(&priority, optarg, options);
			break;
		case 'e':
			status = parse_choice(&on_exceed, optarg, options);
			break;
		case 'o':
			status = parse_rounds(optarg, options);
			break;
		case 'T':
			status = parse_max_time(optarg, options);
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
		case 'K':
			status = parse_choice(&backing, optarg, options);
			break;
		case 'D':
			status = parse_to_disk(optarg, options);
			break;
		case 'O':
			status = parse_choice(&postcopy, optarg, options);
			break;
		case 'z':
			status = parse_compress(optarg, options);
			break;
		case 'C':
			status = parse_delta_cache(optarg, options);
			break;
		case 't':
			status = parse_streams(optarg, options);
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
	struct receipt r = RECEIPT_NONE;
	if (!status)
		status = begin_receipt(&r, receipt);
	if (status) {
		json_decref(options);
		return status;
	}
	const char *vm = argv[optind], *host = argv[optind + 1];
	how.receipt = &r;
	json_t *predicted = rehearse ? predict(s, vm, host, options) : NULL;
	if (rehearse)
		json_object_set_new(options, "rehearse", json_true());
	how.predicted = predicted;
	status = follow_one(
		s, how, vm, host,
		json_pack("{s:s, s:s, s:s, s:o}", "cmd", "move", "vm", vm, "host", host, "options", options));
	json_decref(predicted);
	return status;
}

int snmigrate_move(struct snmigrate *s, int argc, char **argv)
{
	return move_or_rehearse(s, argc, argv, false);
}

int snmigrate_rehearse(struct snmigrate *s, int argc, char **argv)
{
	return move_or_rehearse(s, argc, argv, true);
}

int snmigrate_watch(struct snmigrate *s, int argc, char **argv)
{
	static const struct option known[] = {{"json", no_argument, NULL, 'j'},
					      {"plain", no_argument, NULL, 'l'},
					      {"receipt", required_argument, NULL, 'r'},
					      {"control", required_argument, NULL, 'c'},
					      {0}};
	const char *receipt = NULL;
	struct follow_how how = {0};
	int c;
	while ((c = getopt_long(argc, argv, "", known, NULL)) != -1) {
		if (c == 'j')
			how.json = true;
		else if (c == 'l')
			how.plain = true;
		else if (c == 'r')
			receipt = optarg;
		else if (c == 'c')
			s->control = optarg;
		else
			return client_option_error("snmigrate", argv);
	}
	if (argc - optind > 1 || (argc > optind && strlen(argv[optind]) > 63))
		return snmigrate_usage_error("watch takes one VM, or none for all moves of this host");
	if (argc == optind)
		return receipt ? snmigrate_usage_error("--receipt is of the move of one VM")
			       : follow_all(s, how);
	struct receipt r;
	int status = begin_receipt(&r, receipt);
	if (status)
		return status;
	how.receipt = &r;
	return follow_one(s, how, argv[optind], "",
			  json_pack("{s:s, s:s}", "cmd", "watch", "vm", argv[optind]));
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
