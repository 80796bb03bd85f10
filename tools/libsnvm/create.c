/* SPDX-License-Identifier: Apache-2.0 */
#include <getopt.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "host/client.h"
#include "host/exit.h"
#include "host/fsutil.h"
#include "host/ini.h"
#include "host/vmdef.h"
#include "tools/libsnvm/snvm.h"

/* Copying an image takes as long as it takes. */
#define CREATE_TIMEOUT_MS 0

static int add_import(json_t *imports, char *arg)
{
	char *eq = strchr(arg, '=');
	if (!eq || eq == arg || !eq[1])
		return snvm_usage_error("--import %s: expected DISK=PATH", arg);
	*eq = '\0';
	CLEANUP_FREE char *whole = realpath(eq + 1, NULL);
	if (!whole) {
		fprintf(stderr, "snvm: --import %s=%s: %m\n", arg, eq + 1);
		return EXIT_REFUSED;
	}
	if (json_object_get(imports, arg))
		return snvm_usage_error("--import %s is given twice", arg);
	json_object_set_new(imports, arg, jsonl_text(whole));
	return 0;
}

static int send_definition(const struct snvm *s, const char *path, json_t *imports)
{
	CLEANUP_FREE char *text = NULL;
	CLEANUP_FREE char *whole = realpath(path, NULL);
	CLEANUP_FREE struct vm_definition *def = malloc(sizeof *def);
	struct error err = ERROR_INIT;
	size_t len;
	int rc = fs_read_file(path, INI_TEXT_MAX_BYTES, &text, &len, &err);
	/* the daemon parses it too; here so that errors name the file as it was typed */
	if (!rc && def)
		rc = vmdef_parse(text, len, path, def, &err);
	if (rc < 0 || !whole || !def) {
		fprintf(stderr, "snvm: %s\n", rc < 0 ? err.message : "out of memory");
		return EXIT_REFUSED;
	}
	*strrchr(whole, '/') = '\0';
	json_t *definition = json_stringn(text, len), *reply = NULL;
	if (!definition) {
		fprintf(stderr, "snvm: %s: not UTF-8\n", path);
		return EXIT_REFUSED;
	}
	json_t *request =
		json_pack("{s:s, s:o, s:o, s:o, s:O}", "cmd", "create", "definition", definition, "origin",
			  jsonl_text(path), "base_dir", jsonl_text(*whole ? whole : "/"), "imports", imports);
	int status = client_request("snvm", s->control, request, &reply, CREATE_TIMEOUT_MS);
	if (status == 0)
		printf("VM %s created, uuid %s\n", json_string_value(json_object_get(reply, "name")),
		       json_string_value(json_object_get(reply, "uuid")));
	json_decref(reply);
	return status;
}

int snvm_create(const struct snvm *s, int argc, char **argv)
{
	static const struct option options[] = {{"import", required_argument, NULL, 'i'}, {0}};
	json_t *imports = json_object();
	int c, status = 0;
	while (!status && (c = getopt_long(argc, argv, "", options, NULL)) != -1)
		status = c == 'i' ? add_import(imports, optarg) : client_option_error("snvm", argv);
	if (!status && argc - optind != 1)
		status = snvm_usage_error("create takes one definition file");
	if (!status)
		status = send_definition(s, argv[optind], imports);
	json_decref(imports);
	return status;
}
