/* SPDX-License-Identifier: Apache-2.0 */
#include <getopt.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "host/client.h"
#include "host/exit.h"
#include "tools/libsnmigrate/snmigrate.h"

#define RESOLVE_TIMEOUT_MS 180000

static const char *text(const json_t *o, const char *key)
{
	const char *s = json_string_value(json_object_get(o, key));
	return s ? s : "";
}

/* Only a person can know that a host that does not answer does not run either. */
static int confirm(const char *vm)
{
	char line[16];
	if (!isatty(STDIN_FILENO)) {
		fprintf(stderr,
			"snmigrate: --run-here starts VM %s here; if the other host still runs it, it runs "
			"twice and its "
			"disks diverge. Make sure that the other host has no power, then add "
			"--yes-the-other-host-is-off\n",
			vm);
		return EXIT_REFUSED;
	}
	fprintf(stderr,
		"VM %s will be started here. If the other host still runs it, it runs twice and its disks "
		"diverge.\n"
		"Is the other host powered off? Type \"yes\": ",
		vm);
	if (!fgets(line, sizeof line, stdin) || strcmp(line, "yes\n")) {
		fputs("snmigrate: not confirmed, nothing done\n", stderr);
		return EXIT_REFUSED;
	}
	return 0;
}

static int print_outcome(const json_t *o)
{
	const char *vm = text(o, "vm"), *state = text(o, "state"), *record = text(o, "record"),
		   *peer = text(o, "peer");
	printf("VM %s: %s here (record %s, epoch %lld%s%s)\n", vm, state, record,
	       (long long)json_integer_value(json_object_get(o, "epoch")), *peer ? ", other host " : "",
	       peer);
	if (*text(o, "why"))
		printf("  %s\n", text(o, "why"));
	if (*text(o, "peer_error"))
		printf("  %s\n", text(o, "peer_error"));
	if (!strcmp(state, "in-doubt")) {
		fprintf(stderr,
			"snmigrate: VM %s is still in doubt: bring %s back, or, if it is off for good, use "
			"--run-here\n",
			vm, *peer ? peer : "the other host");
		return EXIT_IN_DOUBT;
	}
	return 0;
}

static int request_resolve(struct snmigrate *s, const char *vm, const char *how, bool confirmed,
			   json_t **reply)
{
	json_t *request = json_pack("{s:s, s:s, s:s, s:b}", "cmd", "resolve", "vm", vm, "how", how,
				    "confirmed", confirmed);
	return client_request("snmigrate", s->control, request, reply, RESOLVE_TIMEOUT_MS);
}

int snmigrate_resolve(struct snmigrate *s, int argc, char **argv)
{
	static const struct option known[] = {{"run-here", no_argument, NULL, 'r'},
					      {"give-up", no_argument, NULL, 'g'},
					      {"yes-the-other-host-is-off", no_argument, NULL, 'y'},
					      {"control", required_argument, NULL, 'c'},
					      {0}};
	bool run_here = false, give_up = false, confirmed = false;
	int c;
	while ((c = getopt_long(argc, argv, "", known, NULL)) != -1) {
		if (c == 'r')
			run_here = true;
		else if (c == 'g')
			give_up = true;
		else if (c == 'y')
			confirmed = true;
		else if (c == 'c')
			s->control = optarg;
		else
			return client_option_error("snmigrate", argv);
	}
	if (argc - optind != 1 || (run_here && give_up) || (confirmed && !run_here))
		return snmigrate_usage_error("resolve takes one VM, and --run-here or --give-up or neither");
	const char *vm = argv[optind];
	json_t *reply = NULL;
	int status = 0;
	if (run_here && !confirmed) {
		/* the other side may settle it, and nobody confirms for a VM that is not there */
		status = request_resolve(s, vm, "ask", false, &reply);
		json_decref(reply);
		reply = NULL;
		if (!status)
			status = confirm(vm);
		if (status)
			return status;
	}
	status = request_resolve(s, vm,
				 run_here  ? "run-here"
				 : give_up ? "give-up"
					   : "ask",
				 run_here, &reply);
	if (status == 0)
		status = print_outcome(reply);
	json_decref(reply);
	return status;
}
