/* SPDX-License-Identifier: Apache-2.0 */
#include <getopt.h>
#include <stdio.h>

#include "host/client.h"
#include "host/exit.h"
#include "tools/libsnvm/snvm.h"

#define CALL_TIMEOUT_MS 60000

static const char *text(const json_t *o, const char *key)
{
	const char *s = json_string_value(json_object_get(o, key));
	return s ? s : "";
}

static int take_json_option(int argc, char **argv, bool *json)
{
	static const struct option options[] = {{"json", no_argument, NULL, 'j'}, {0}};
	int c;
	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (c != 'j')
			return client_option_error("snvm", argv);
		*json = true;
	}
	return 0;
}

static void print_json(json_t *o)
{
	json_dumpf(o, stdout, JSON_INDENT(2));
	putchar('\n');
}

static void print_row(const json_t *vm)
{
	char state[64];
	json_t *migrating = json_object_get(vm, "migrating");
	bool moves = migrating && !json_is_null(migrating) && !json_is_false(migrating);
	snprintf(state, sizeof state, "%s%s", text(vm, "state"), moves ? ", migrating" : "");
	printf("%-20s %-20s %8lld MiB %4lld  %s\n", text(vm, "name"), state,
	       (long long)json_integer_value(json_object_get(vm, "memory_bytes")) >> 20,
	       (long long)json_integer_value(json_object_get(vm, "cpus")), text(vm, "uuid"));
}

int snvm_list(const struct snvm *s, int argc, char **argv)
{
	bool json = false;
	json_t *reply = NULL, *vm;
	size_t i;
	int status = take_json_option(argc, argv, &json);
	if (!status && optind != argc)
		status = snvm_usage_error("list takes no argument");
	if (!status)
		status = client_request("snvm", s->control, json_pack("{s:s}", "cmd", "list"), &reply,
					CALL_TIMEOUT_MS);
	if (status)
		return status;
	json_t *vms = json_object_get(reply, "vms");
	if (json) {
		print_json(vms);
	} else {
		printf("%-20s %-20s %12s %4s  %s\n", "NAME", "STATE", "MEMORY", "CPUS", "UUID");
		json_array_foreach(vms, i, vm) print_row(vm);
	}
	json_decref(reply);
	return 0;
}

static long long mib(const json_t *o, const char *key)
{
	return (long long)json_integer_value(json_object_get(o, key)) >> 20;
}

static void print_memory(const json_t *vm)
{
	const json_t *b = json_object_get(vm, "balloon");
	printf("memory  %lld MiB", mib(vm, "memory_bytes"));
	if (json_object_get(vm, "resident_bytes"))
		printf(", of which the host holds %lld", mib(vm, "resident_bytes"));
	putchar('\n');
	if (json_is_object(b))
		printf("balloon the guest keeps %lld MiB, asked for %lld%s\n", mib(b, "actual_bytes"),
		       mib(b, "target_bytes"),
		       json_is_true(json_object_get(b, "driver")) ? "" : "; it has no driver at work");
}

static void print_info(const json_t *vm)
{
	json_t *disk, *migrating = json_object_get(vm, "migrating");
	size_t i;
	printf("name    %s\nuuid    %s\nstate   %s\n", text(vm, "name"), text(vm, "uuid"), text(vm, "state"));
	if (*text(vm, "state_reason"))
		printf("reason  %s\n", text(vm, "state_reason"));
	if (json_is_object(migrating))
		printf("moving  to %s, %.0f %%, for %lld s\n", text(migrating, "destination"),
		       json_number_value(json_object_get(migrating, "percent")),
		       (long long)json_integer_value(json_object_get(migrating, "elapsed_ms")) / 1000);
	print_memory(vm);
	printf("cpus    %lld\nfolder  %s\n", (long long)json_integer_value(json_object_get(vm, "cpus")),
	       text(vm, "folder"));
	json_array_foreach(json_object_get(vm, "disks"), i, disk)
		printf("disk    %s: %s, %s\n", text(disk, "id"), text(disk, "format"), text(disk, "path"));
	printf("owner   record %s, epoch %lld%s%s\n", text(vm, "record"),
	       (long long)json_integer_value(json_object_get(vm, "epoch")),
	       *text(vm, "peer") ? ", last peer " : "", text(vm, "peer"));
}

int snvm_info(const struct snvm *s, int argc, char **argv)
{
	bool json = false;
	json_t *reply = NULL;
	int status = take_json_option(argc, argv, &json);
	const char *name = status ? NULL : snvm_one_name(argc, argv, optind);
	if (!name)
		return EXIT_USAGE;
	status = client_request("snvm", s->control, json_pack("{s:s, s:s}", "cmd", "info", "vm", name),
				&reply, CALL_TIMEOUT_MS);
	if (status)
		return status;
	json_t *vm = json_object_get(reply, "vm");
	if (json)
		print_json(vm);
	else
		print_info(vm);
	json_decref(reply);
	return 0;
}
