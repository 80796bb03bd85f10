/* SPDX-License-Identifier: Apache-2.0 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "host/client.h"
#include "host/exit.h"
#include "host/ini.h"
#include "tools/libsnvm/snvm.h"

#define CALL_TIMEOUT_MS	     30000
#define START_TIMEOUT_MS     90000
#define DELETE_TIMEOUT_MS    300000
#define STOP_SECONDS_DEFAULT 60
#define STOP_SECONDS_MAX     86400

static int simple(const struct snvm *s, int argc, char **argv, unsigned timeout_ms, json_t **reply)
{
	static const struct option none[] = {{0}};
	if (getopt_long(argc, argv, "", none, NULL) != -1)
		return client_option_error("snvm", argv);
	const char *name = snvm_one_name(argc, argv, optind);
	if (!name)
		return EXIT_USAGE;
	return client_request("snvm", s->control, json_pack("{s:s, s:s}", "cmd", argv[0], "vm", name), reply,
			      timeout_ms);
}

int snvm_pause(const struct snvm *s, int argc, char **argv)
{
	return simple(s, argc, argv, CALL_TIMEOUT_MS, NULL);
}

int snvm_resume(const struct snvm *s, int argc, char **argv)
{
	return simple(s, argc, argv, CALL_TIMEOUT_MS, NULL);
}

int snvm_delete(const struct snvm *s, int argc, char **argv)
{
	json_t *reply = NULL, *path;
	size_t i;
	int status = simple(s, argc, argv, DELETE_TIMEOUT_MS, &reply);
	json_array_foreach(json_object_get(reply, "left_behind"), i, path)
		printf("left behind: %s\n", json_string_value(path));
	json_decref(reply);
	return status;
}

int snvm_start(const struct snvm *s, int argc, char **argv)
{
	static const struct option options[] = {{"paused", no_argument, NULL, 'p'}, {0}};
	bool paused = false;
	int c;
	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (c != 'p')
			return client_option_error("snvm", argv);
		paused = true;
	}
	const char *name = snvm_one_name(argc, argv, optind);
	if (!name)
		return EXIT_USAGE;
	json_t *request = json_pack("{s:s, s:s, s:b}", "cmd", "start", "vm", name, "paused", paused);
	return client_request("snvm", s->control, request, NULL, START_TIMEOUT_MS);
}

static int stop_one(const struct snvm *s, const char *name, bool force, unsigned long seconds)
{
	json_t *request = json_pack("{s:s, s:s, s:b, s:I}", "cmd", "stop", "vm", name, "force", force,
				    "timeout_ms", (json_int_t)seconds * 1000);
	return client_request("snvm", s->control, request, NULL, (unsigned)seconds * 1000 + CALL_TIMEOUT_MS);
}

/* All that run or are paused, at the same time: a process each. The worst exit status. */
static int stop_all(const struct snvm *s, bool force, unsigned long seconds)
{
	json_t *reply = NULL, *vm;
	size_t i;
	int status = client_request("snvm", s->control, json_pack("{s:s}", "cmd", "list"), &reply,
				    CALL_TIMEOUT_MS);
	if (status)
		return status;
	json_array_foreach(json_object_get(reply, "vms"), i, vm)
	{
		const char *state = json_string_value(json_object_get(vm, "state"));
		const char *name = json_string_value(json_object_get(vm, "name"));
		if (!state || !name || (strcmp(state, "running") && strcmp(state, "paused")))
			continue;
		pid_t pid = fork();
		if (pid == 0)
			_exit(stop_one(s, name, force, seconds));
		if (pid < 0) {
			perror("snvm: fork");
			status = EXIT_FAILED;
		}
	}
	json_decref(reply);
	int how;
	while (wait(&how) > 0) {
		int one = WIFEXITED(how) ? WEXITSTATUS(how) : EXIT_FAILED;
		if (one > status)
			status = one;
	}
	return status;
}

int snvm_stop(const struct snvm *s, int argc, char **argv)
{
	static const struct option options[] = {{"force", no_argument, NULL, 'f'},
						{"timeout", required_argument, NULL, 't'},
						{"all", no_argument, NULL, 'a'},
						{0}};
	bool force = false, all = false;
	unsigned long seconds = STOP_SECONDS_DEFAULT;
	char *end;
	int c;
	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (c == 'f') {
			force = true;
		} else if (c == 'a') {
			all = true;
		} else if (c == 't') {
			seconds = strtoul(optarg, &end, 10);
			if (*optarg < '0' || *optarg > '9' || *end || seconds == 0 ||
			    seconds > STOP_SECONDS_MAX)
				return snvm_usage_error("--timeout %s: not a number from 1 to %d", optarg,
							STOP_SECONDS_MAX);
		} else {
			return client_option_error("snvm", argv);
		}
	}
	if (all && optind != argc)
		return snvm_usage_error("stop takes one VM, or --all");
	if (all)
		return stop_all(s, force, seconds);
	const char *name = snvm_one_name(argc, argv, optind);
	return name ? stop_one(s, name, force, seconds) : EXIT_USAGE;
}

int snvm_balloon(const struct snvm *s, int argc, char **argv)
{
	static const struct option none[] = {{0}};
	uint64_t bytes;
	if (getopt_long(argc, argv, "", none, NULL) != -1)
		return client_option_error("snvm", argv);
	if (argc - optind != 2)
		return snvm_usage_error("balloon takes a VM and a size");
	if (size_parse(argv[optind + 1], &bytes) || bytes > INT64_MAX)
		return snvm_usage_error("balloon: '%s' is no size, like 512M", argv[optind + 1]);
	return client_request("snvm", s->control,
			      json_pack("{s:s, s:s, s:I}", "cmd", "balloon", "vm", argv[optind], "bytes",
					(json_int_t)bytes),
			      NULL, CALL_TIMEOUT_MS);
}

int snvm_set(const struct snvm *s, int argc, char **argv)
{
	static const struct option none[] = {{0}};
	if (getopt_long(argc, argv, "", none, NULL) != -1)
		return client_option_error("snvm", argv);
	const char *equals = argc - optind == 2 ? strchr(argv[optind + 1], '=') : NULL;
	if (!equals || equals == argv[optind + 1])
		return snvm_usage_error("set takes a VM and KEY=VALUE");
	char key[32], base[4096];
	snprintf(key, sizeof key, "%.*s", (int)(equals - argv[optind + 1]), argv[optind + 1]);
	if (!getcwd(base, sizeof base))
		return snvm_usage_error("set: this folder has no path");
	return client_request("snvm", s->control,
			      json_pack("{s:s, s:s, s:s, s:s, s:s}", "cmd", "set", "vm", argv[optind], "key",
					key, "value", equals + 1, "base_dir", base),
			      NULL, CALL_TIMEOUT_MS);
}
