/* SPDX-License-Identifier: Apache-2.0 */
#ifndef HOST_CLIENT_H
#define HOST_CLIENT_H

#include <jansson.h>
#include <stdbool.h>

#include "base/error.h"
#include "host/jsonl.h"

/* What the commands that people type have in common: finding the daemon and talking to it. */

#define CLIENT_CONFIG_DEFAULT "/etc/snmigrate/snmigrated.ini"

/* The socket: `control` if given, else $SNMIGRATE_CONTROL, else what the host's configuration (default path)
 * says. */
int client_control_path(const char *control, char out[4096], struct error *err);
/* From now on requests are for that host's daemon, through this host's; NULL: for this host. */
void client_on_host(const char *host);
/* Connects to it; errors say whether the daemon runs. */
int client_connect(const char *control, struct jsonl **out, struct error *err);
/* One request (taken over), one reply. Prints the error as "PROGRAM: sentence" and returns its exit status,
 * or 0. */
int client_request(const char *program, const char *control, json_t *request, json_t **reply,
		   unsigned timeout_ms);

/* After getopt_long said '?' (opterr being 0): one sentence on stderr that names the option. Returns
 * EXIT_USAGE. */
int client_option_error(const char *program, char **argv);
/* True if "--help" or "-h" stands among them, before any "--". */
bool client_wants_help(int argc, char **argv);

#endif
