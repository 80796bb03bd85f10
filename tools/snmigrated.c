/* SPDX-License-Identifier: Apache-2.0 */
/* The daemon of a host: registry of VMs, the one network port, settling after crashes. */
#include <getopt.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "host/config.h"
#include "host/daemon.h"
#include "host/exit.h"
#include "host/systemd.h"
#include "net/conn.h"

static void usage(FILE *out)
{
	fputs("Usage: snmigrated --config FILE [--check]\n"
	      "\n"
	      "Serves one host of snmigrate: its VMs, and the port on which VMs arrive. Ends on SIGTERM; the "
	      "VMs go on.\n"
	      "  --config FILE   the host's configuration (INI)\n"
	      "  --check         check the configuration and certificates, and end\n"
	      "  --help, --version\n",
	      out);
}

static int check(const struct host_config *cfg, bool only_check, struct error *err)
{
	struct tls_context *tls = NULL;
	int rc = *cfg->ca ? tls_context_create(cfg->ca, cfg->cert, cfg->key, &tls, err) : 0;
	/* The daemon runs all the same, but no peer will believe it. */
	struct error e = ERROR_INIT;
	if (!rc && tls && tls_context_check_name(tls, cfg->name, &e)) {
		if (only_check)
			rc = error_set(err, e.code, "%s: %s", cfg->cert, e.message);
		else
			log_warn("%s: %s: every peer will refuse this host", cfg->cert, e.message);
	}
	tls_context_free(tls);
	if (!rc && access(cfg->snvmm, X_OK) < 0)
		rc = error_set(err, 2, "[programs] snvmm = %s: cannot be run", cfg->snvmm);
	return rc;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {{"config", required_argument, NULL, 'c'},
						{"check", no_argument, NULL, 'k'},
						{"help", no_argument, NULL, 'h'},
						{"version", no_argument, NULL, 'V'},
						{0}};
	const char *config = NULL;
	bool only_check = false;
	int c;
	log_init("snmigrated");
	while ((c = getopt_long(argc, argv, "c:h", options, NULL)) != -1) {
		switch (c) {
		case 'c':
			config = optarg;
			break;
		case 'k':
			only_check = true;
			break;
		case 'h':
			usage(stdout);
			return 0;
		case 'V':
			printf("snmigrated %s\n", SNM_VERSION);
			return 0;
		default:
			usage(stderr);
			return EXIT_USAGE;
		}
	}
	if (!config || optind != argc) {
		usage(stderr);
		return EXIT_USAGE;
	}
	struct error err = ERROR_INIT;
	struct host_config *cfg = NULL;
	int rc = host_config_load(config, &cfg, &err);
	if (!rc)
		rc = check(cfg, only_check, &err);
	if (!rc && only_check)
		printf("%s: good, host %s, %u %s\n", cfg->path, cfg->name, cfg->npeers,
		       cfg->npeers == 1 ? "peer" : "peers");
	else if (!rc) {
		systemd_log();
		rc = daemon_run(cfg, &err);
	}
	if (rc < 0)
		fprintf(stderr, "snmigrated: %s\n", err.message);
	/* the daemon's threads may still use the configuration: it goes with the process */
	return rc < 0 ? EXIT_REFUSED : 0;
}
