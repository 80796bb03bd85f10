/* SPDX-License-Identifier: Apache-2.0 */
#include "host/client.h"

#include <getopt.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "host/config.h"
#include "host/exit.h"

static const char *on_host;

void client_on_host(const char *host)
{
	on_host = host;
}

int client_control_path(const char *control, char out[4096], struct error *err)
{
	struct host_config *cfg = NULL;
	struct error why = ERROR_INIT;
	if (!control || !*control)
		control = getenv("SNMIGRATE_CONTROL");
	if (control && *control) {
		if ((size_t)snprintf(out, 4096, "%s", control) >= 4096)
			return error_set(err, ENAMETOOLONG, "the path of the control socket is too long");
		return 0;
	}
	if (host_config_load(CLIENT_CONFIG_DEFAULT, &cfg, &why) < 0)
		return error_set(err, ENOENT,
				 "which daemon? Give --control SOCKET or set SNMIGRATE_CONTROL (%.300s)",
				 why.message);
	snprintf(out, 4096, "%s", cfg->control);
	host_config_free(cfg);
	return 0;
}

int client_connect(const char *control, struct jsonl **out, struct error *err)
{
	char path[4096];
	struct error why = ERROR_INIT;
	int rc = client_control_path(control, path, err);
	if (rc < 0)
		return rc;
	rc = jsonl_connect(path, 5000, out, &why);
	if (rc == -ENOENT || rc == -ECONNREFUSED)
		return error_set(err, rc, "snmigrated does not run here (%.300s)", why.message);
	if (rc < 0)
		error_copy(err, &why);
	return rc;
}

int client_request(const char *program, const char *control, json_t *request, json_t **reply,
		   unsigned timeout_ms)
{
	struct jsonl *j = NULL;
	struct error err = ERROR_INIT;
	int status = EXIT_FAILED;
	if (request && on_host)
		request = json_pack("{s:s, s:s, s:o}", "cmd", "remote", "host", on_host, "request", request);
	int rc = request ? client_connect(control, &j, &err) : error_errno(&err, ENOMEM, "request");
	if (rc < 0)
		status = EXIT_REFUSED;
	else
		rc = jsonl_call(j, request, reply, &status, timeout_ms, &err);
	jsonl_close(j);
	json_decref(request);
	if (rc == 0)
		return 0;
	fprintf(stderr, "%s: %s\n", program, err.message);
	return status ? status : EXIT_FAILED;
}

int client_option_error(const char *program, char **argv)
{
	const char *word = optind > 0 && argv[optind - 1] ? argv[optind - 1] : "";
	bool is_long = !strncmp(word, "--", 2);
	fprintf(stderr, "%s: ", program);
	if (is_long && !optopt)
		fprintf(stderr, "unknown or ambiguous option '%s'", word);
	else if (is_long && strchr(word, '='))
		fprintf(stderr, "option '%s' takes no argument", word);
	else if (is_long)
		fprintf(stderr, "option '%s' needs an argument", word);
	else
		fprintf(stderr, "unknown option '-%c'", optopt);
	fprintf(stderr, " (try %s --help)\n", program);
	return EXIT_USAGE;
}

bool client_wants_help(int argc, char **argv)
{
	for (int i = 0; i < argc && strcmp(argv[i], "--"); i++)
		if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h"))
			return true;
	return false;
}
