/* SPDX-License-Identifier: Apache-2.0 */
#include <getopt.h>
#include <stdio.h>
#include <string.h>

#include "host/client.h"
#include "tools/libsnmigrate/snmigrate.h"

#define CALL_TIMEOUT_MS 120000

int snmigrate_baseline(struct snmigrate *s, int argc, char **argv)
{
	static const struct option known[] = {{"control", required_argument, NULL, 'c'}, {0}};
	int c;
	while ((c = getopt_long(argc, argv, "", known, NULL)) != -1) {
		if (c != 'c')
			return client_option_error("snmigrate", argv);
		s->control = optarg;
	}
	if (optind == argc)
		return snmigrate_usage_error("baseline takes hosts");
	json_t *hosts = json_array(), *reply = NULL;
	for (int i = optind; i < argc; i++)
		if (json_array_append_new(hosts, json_string(argv[i]))) {
			json_decref(hosts);
			return snmigrate_usage_error("baseline: that is not the name of a host");
		}
	int status = client_request("snmigrate", s->control,
				    json_pack("{s:s, s:o}", "cmd", "baseline", "hosts", hosts), &reply,
				    CALL_TIMEOUT_MS);
	if (status)
		return status;
	printf("# snmigrate %s; what these have in common:", SNM_VERSION);
	for (int i = optind; i < argc; i++)
		printf(" %s", argv[i]);
	printf("\n[baseline]\nversion = 1\nvendor = %s\n[features]\n%s",
	       json_string_value(json_object_get(reply, "vendor")),
	       json_string_value(json_object_get(reply, "features")));
	json_decref(reply);
	return 0;
}
