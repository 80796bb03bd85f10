/* SPDX-License-Identifier: Apache-2.0 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "host/client.h"
#include "host/exit.h"
#include "host/pki.h"
#include "tools/libsnmigrate/snmigrate.h"

#define DAYS_MAX 36500

int snmigrate_pki(struct snmigrate *s, int argc, char **argv)
{
	static const struct option known[] = {{"days", required_argument, NULL, 'd'}, {0}};
	long days = 0;
	char *end;
	int c;
	while ((c = getopt_long(argc, argv, "", known, NULL)) != -1) {
		if (c != 'd')
			return client_option_error("snmigrate", argv);
		days = strtol(optarg, &end, 10);
		if (!*optarg || *end || days == 0 || days > DAYS_MAX || days < -DAYS_MAX)
			return snmigrate_usage_error("--days %s: not a number of days", optarg);
	}
	argc -= optind;
	argv += optind;
	struct error err = ERROR_INIT;
	int rc;
	if (argc == 2 && !strcmp(argv[0], "init")) {
		rc = pki_init(argv[1], days ? (int)days : PKI_CA_DAYS, &err);
		if (!rc)
			printf("%s/ca.pem: give it to every host; %s/ca.key: keep it secret\n", argv[1],
			       argv[1]);
	} else if (argc >= 4 && !strcmp(argv[0], "issue")) {
		rc = pki_issue(argv[1], argv[2], argv + 3, argc - 3, days ? (int)days : PKI_HOST_DAYS, &err);
		if (!rc)
			printf("%s/%s.pem and %s/%s.key: for host %s\n", argv[1], argv[2], argv[1], argv[2],
			       argv[2]);
	} else {
		return snmigrate_usage_error("pki takes: init DIR, or issue DIR NAME ADDRESS...");
	}
	if (rc < 0) {
		fprintf(stderr, "snmigrate: %s\n", err.message);
		return EXIT_REFUSED;
	}
	return 0;
}
