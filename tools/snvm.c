/* SPDX-License-Identifier: Apache-2.0 */
/* The life of a VM on this host. */
#include <getopt.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "host/client.h"
#include "host/exit.h"
#include "tools/libsnvm/snvm.h"

static const struct {
	const char *name;
	int (*run)(const struct snvm *s, int argc, char **argv);
} subcommands[] = {{"create", snvm_create}, {"start", snvm_start},     {"stop", snvm_stop},
		   {"pause", snvm_pause},   {"resume", snvm_resume},   {"list", snvm_list},
		   {"info", snvm_info},	    {"console", snvm_console}, {"delete", snvm_delete},
		   {"set", snvm_set},	    {"balloon", snvm_balloon}};

static void usage(FILE *out)
{
	fputs("Usage: snvm [--control SOCKET] [--on HOST] SUBCOMMAND ...\n"
	      "\n"
	      "  create FILE [--import DISK=PATH]...   make a VM of a definition; kernel, initrd and "
	      "imported images are copied\n"
	      "  start VM [--paused]                   start it\n"
	      "  stop VM|--all [--force] [--timeout S] press its power button and wait (60 s); --force: end "
	      "it now\n"
	      "  pause VM | resume VM                  stop and continue its processors\n"
	      "  list [--json]                         the VMs of this host\n"
	      "  info VM [--json]                      one VM in detail\n"
	      "  console VM                            its serial console; ^] leaves\n"
	      "  balloon VM SIZE                       ask its guest to keep so much of its memory and give "
	      "the rest back\n"
	      "  set VM cpu=CPU | balloon=yes|no       of a stopped VM: its CPU (host, x86-64-v3, "
	      "baseline:FILE...), its balloon\n"
	      "  delete VM                             delete a stopped VM and its files\n"
	      "\n"
	      "--on HOST: at that host, which must let this one administer it; not create and console.\n"
	      "The daemon is found by --control, $SNMIGRATE_CONTROL or /etc/snmigrate/snmigrated.ini.\n"
	      "Exit status: 0 done, 2 wrong usage, 3 refused, 4 failed.\n",
	      out);
}

int snvm_usage_error(const char *fmt, ...)
{
	va_list ap;
	va_start(ap, fmt);
	fputs("snvm: ", stderr);
	vfprintf(stderr, fmt, ap);
	fputs(" (try snvm --help)\n", stderr);
	va_end(ap);
	return EXIT_USAGE;
}

const char *snvm_one_name(int argc, char **argv, int at)
{
	if (argc - at == 1)
		return argv[at];
	snvm_usage_error("%s takes exactly one VM", argv[0]);
	return NULL;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {{"control", required_argument, NULL, 'c'},
						{"on", required_argument, NULL, 'o'},
						{"help", no_argument, NULL, 'h'},
						{"version", no_argument, NULL, 'V'},
						{0}};
	struct snvm s = {0};
	int c;
	log_init("snvm");
	signal(SIGPIPE, SIG_IGN);
	opterr = 0;
	/* "+": options after the subcommand are the subcommand's */
	while ((c = getopt_long(argc, argv, "+h", options, NULL)) != -1) {
		switch (c) {
		case 'c':
			s.control = optarg;
			break;
		case 'o':
			client_on_host(optarg);
			break;
		case 'h':
			usage(stdout);
			return 0;
		case 'V':
			printf("snvm %s\n", SNM_VERSION);
			return 0;
		default:
			return client_option_error("snvm", argv);
		}
	}
	if (optind == argc) {
		usage(stderr);
		return EXIT_USAGE;
	}
	if (!strcmp(argv[optind], "help") || client_wants_help(argc - optind, argv + optind)) {
		usage(stdout);
		return 0;
	}
	for (size_t i = 0; i < ARRAY_SIZE(subcommands); i++)
		if (!strcmp(argv[optind], subcommands[i].name)) {
			int at = optind;
			optind = 0; /* getopt begins anew */
			return subcommands[i].run(&s, argc - at, argv + at);
		}
	return snvm_usage_error("unknown subcommand '%s'", argv[optind]);
}
