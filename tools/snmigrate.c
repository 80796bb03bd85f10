/* SPDX-License-Identifier: Apache-2.0 */
/* The command people type. */
#include <getopt.h>
#include <locale.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "host/client.h"
#include "host/exit.h"
#include "tools/libsnmigrate/snmigrate.h"

static const struct {
	const char *name;
	int (*run)(struct snmigrate *s, int argc, char **argv);
	bool elsewhere; /* --on goes with it */
} subcommands[] = {{"move", snmigrate_move, false},
		   {"watch", snmigrate_watch, false},
		   {"tune", snmigrate_tune, true},
		   {"dirty-rate", snmigrate_dirty_rate, true},
		   {"cancel", snmigrate_cancel, true},
		   {"resolve", snmigrate_resolve, false},
		   {"partial", snmigrate_partial, true},
		   {"check", snmigrate_check, false},
		   {"baseline", snmigrate_baseline, false},
		   {"rehearse", snmigrate_rehearse, false},
		   {"history", snmigrate_history, false},
		   {"status", snmigrate_status, true},
		   {"pair", snmigrate_pair, false},
		   {"peers", snmigrate_peers, true},
		   {"unpair", snmigrate_unpair, false},
		   {"pki", snmigrate_pki, false},
		   {"evacuate", snmigrate_evacuate, false},
		   {"return", snmigrate_return, false},
		   {"maintenance", snmigrate_maintenance, true}};

static void usage(FILE *out)
{
	fputs("Usage: snmigrate VM HOST [OPTION...]          the same as snmigrate move VM HOST\n"
	      "       snmigrate move VM HOST [OPTION...]     move a running VM to another host\n"
	      "         --with-storage      its disks as well (needed unless both hosts see them)\n"
	      "         --max-downtime MS   the budget of the guest's stop (50)\n"
	      "         --priority WHO      how far a guest that dirties faster than the link carries is "
	      "slowed: "
	      "guest (not at all),\n"
	      "                             balanced (to a quarter of its speed; default), finish (to a "
	      "hundredth)\n"
	      "         --on-exceed WHAT    when the budget cannot be held in spite of it: throttle (go all "
	      "the "
	      "same; default), cancel,\n"
	      "                             postcopy (as --postcopy auto)\n"
	      "         --max-rounds N      at most so many rounds of the memory before that (30)\n"
	      "         --max-time TIME     at most so long, such as 90s or 10m; 0: any time (0)\n"
	      "         --bandwidth RATE    at most so many bytes a second, such as 200M or 1G (no limit)\n"
	      "         --compress HOW      the memory: auto, off, zstd or zstd:LEVEL (auto: where it saves "
	      "time)\n"
	      "         --delta-cache SIZE  former copies of pages, to send what changed of them where that "
	      "saves time:\n"
	      "                             such as 256M, off, or auto (a 16th of the guest's memory, 64M to "
	      "1G; default)\n"
	      "         --streams N         connections that carry the memory, 1 to 16 (by the processors, "
	      "at most 4)\n"
	      "         --postcopy WHEN     the guest goes before its last memory: now (after one round), "
	      "auto (when\n"
	      "                             the rest does not get small enough) or never (default)\n"
	      "         --mirror MODE       sync (default), or buffered for long links: a guest's writes do "
	      "not "
	      "wait for HOST\n"
	      "         --mirror-buffer SIZE  of --mirror buffered: how much of them may be on the way "
	      "(64M)\n"
	      "         --retry-for TIME    after a lost link try again for so long, such as 30s or 2h; 0: "
	      "not (5m)\n"
	      "         --keep-partial TIME how long the destination keeps the disks of a move that failed "
	      "(24h)\n"
	      "         --backing MODE      of a disk with a backing file: flatten (one full image there), "
	      "chain\n"
	      "                             (the files below travel along) or reuse (it has them already)\n"
	      "         --to-disk DISK=DEV  onto a block device that the other host allows\n"
	      "         --keep-source       keep the source's files, under a name that nothing can start\n"
	      "         --quick             stop the guest first, then send all once: shorter in all, all of "
	      "it "
	      "downtime\n"
	      "         --suspend           leave the guest paused at the destination\n"
	      "         --no-tls            memory and disks unencrypted; both hosts must allow it\n"
	      "         --receipt FILE      write down, as JSON, what was proved of it\n"
	      "         --json              one JSON object a line, the last one with \"result\"\n"
	      "         --plain             lines also on a terminal, instead of the full-screen view\n"
	      "       snmigrate watch [VM] [--json|--plain] [--receipt FILE]\n"
	      "                                              follow a move under way; without VM all of this "
	      "host\n"
	      "       snmigrate tune VM --bandwidth RATE     change the limit of a move under way; 0: none\n"
	      "       snmigrate dirty-rate VM [--seconds N] [--json]\n"
	      "                                              how fast a running guest dirties its memory, "
	      "over N "
	      "seconds (5)\n"
	      "       snmigrate cancel VM                    end it; the VM stays where it is\n"
	      "       snmigrate resolve VM [--run-here [--yes-the-other-host-is-off] | --give-up]\n"
	      "                                              settle a VM that is in doubt\n"
	      "       snmigrate check VM HOST [--with-storage] [--backing MODE] [--max-downtime MS] "
	      "[--json]\n"
	      "                                              all that would be in the way of a move, and "
	      "what "
	      "to do\n"
	      "       snmigrate rehearse VM HOST [OPTION...] all but the handover: predicted against "
	      "measured\n"
	      "       snmigrate baseline HOST...             print the CPU features that all of them have, "
	      "for "
	      "snvm set\n"
	      "       snmigrate evacuate HOST [OPTION...]    move all VMs of this host away, as the daemon "
	      "plans\n"
	      "         --to HOST,HOST      only to these (all other hosts that are configured)\n"
	      "         --parallel N        so many moves at once (2)\n"
	      "         --deadline TIME     begin nothing after that time, such as 30m\n"
	      "         --order HOW         priority (as the VMs' definitions say), size or fastest\n"
	      "         --with-storage, --backing MODE, --json   as of a move\n"
	      "         --dry-run           only the plan: who goes where, why, how long, and what stays\n"
	      "       snmigrate evacuate --status | --follow | --cancel [--json]\n"
	      "                                              of the evacuation, or return, that is under way "
	      "here\n"
	      "       snmigrate return HOST [OPTION...]      move VMs back that an evacuation of HOST "
	      "brought here\n"
	      "       snmigrate maintenance on|off           on: no VM may arrive at this host\n"
	      "       snmigrate status [--json]              what moves, what waits for you, and the last "
	      "moves\n"
	      "       snmigrate history [VM] [--since TIME] [--limit N] [--json]\n"
	      "                                              moves from and to this host: TIME is 2h, 3d or "
	      "a date\n"
	      "       snmigrate partial list [--json]        what this host keeps of moves to it that "
	      "failed\n"
	      "       snmigrate partial delete VM            deletes it\n"
	      "       snmigrate pair [--valid TIME] [--json] print a code for another host, good once, for "
	      "10m\n"
	      "       snmigrate pair ADDRESS CODE [--json]   there: trust one another\n"
	      "       snmigrate peers [--json]               hosts that are trusted, and what they may\n"
	      "       snmigrate peers set HOST CHANGE...     +send -send +receive -receive +administer "
	      "-administer\n"
	      "                                              address=ADDRESS: of a paired host\n"
	      "       snmigrate unpair HOST [--force]        trust it no longer\n"
	      "       snmigrate pki init DIR [--days N]      make a certificate authority\n"
	      "       snmigrate pki issue DIR NAME ADDRESS... [--days N]\n"
	      "                                              make the certificate of a host\n"
	      "\n"
	      "  --control SOCKET   the daemon of this host (also $SNMIGRATE_CONTROL; else as "
	      "/etc/snmigrate/snmigrated.ini says)\n"
	      "  --on HOST          before cancel, tune, peers, partial, status, dirty-rate, maintenance: at "
	      "that "
	      "host,\n"
	      "                     which must let this one administer it\n"
	      "  --help, --version\n"
	      "\n"
	      "Exit status: 0 moved; 2 wrong usage; 3 refused, nothing touched; 4 failed, the VM is at the "
	      "source as before;\n"
	      "5 cancelled, likewise; 6 in doubt, paused, the message says what to do; 7 moved, but the "
	      "source is not cleaned\n"
	      "up; 8 the VM runs nowhere (crashed).\n",
	      out);
}

int snmigrate_usage_error(const char *fmt, ...)
{
	va_list ap;
	va_start(ap, fmt);
	fputs("snmigrate: ", stderr);
	vfprintf(stderr, fmt, ap);
	fputs(" (try snmigrate --help)\n", stderr);
	va_end(ap);
	return EXIT_USAGE;
}

int snmigrate_common_options(struct snmigrate *s, int argc, char **argv, const char *how, bool *json)
{
	static const struct option known[] = {
		{"json", no_argument, NULL, 'j'}, {"control", required_argument, NULL, 'c'}, {0}};
	int c;
	*json = false;
	while ((c = getopt_long(argc, argv, how, known, NULL)) != -1) {
		if (c == 'j')
			*json = true;
		else if (c == 'c')
			s->control = optarg;
		else
			return client_option_error("snmigrate", argv);
	}
	return 0;
}

/* Options of move whose argument is a word of its own. */
static bool takes_argument(const char *option)
{
	if (!strcmp(option, "--on"))
		return true;
	for (const struct option *o = snmigrate_move_options; o->name; o++)
		if (!strncmp(option, "--", 2) && !strcmp(option + 2, o->name))
			return o->has_arg == required_argument;
	return false;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {{"control", required_argument, NULL, 'c'},
						{"on", required_argument, NULL, 'o'},
						{"help", no_argument, NULL, 'h'},
						{"version", no_argument, NULL, 'V'},
						{0}};
	struct snmigrate s = {0};
	log_init("snmigrate");
	setlocale(LC_CTYPE, ""); /* what may be shown; numbers stay as they are */
	signal(SIGPIPE, SIG_IGN);
	/* The short form may begin with options: find the first word that is none. */
	int at = 1;
	while (at < argc && argv[at][0] == '-') {
		if (!strcmp(argv[at], "--help") || !strcmp(argv[at], "-h")) {
			usage(stdout);
			return 0;
		}
		if (!strcmp(argv[at], "--version")) {
			printf("snmigrate %s\n", SNM_VERSION);
			return 0;
		}
		at += takes_argument(argv[at]) ? 2 : 1;
	}
	if (argc == 1) {
		usage(stderr);
		return EXIT_USAGE;
	}
	if ((at < argc && !strcmp(argv[at], "help")) || client_wants_help(argc, argv)) {
		usage(stdout);
		return 0;
	}
	opterr = 0;
	for (size_t i = 0; at < argc && i < ARRAY_SIZE(subcommands); i++) {
		if (strcmp(argv[at], subcommands[i].name))
			continue;
		/* what stands before the subcommand */
		int c, before = at;
		argv[0] = (char *)"snmigrate";
		while ((c = getopt_long(before, argv, "+", options, NULL)) != -1) {
			if (c == 'c')
				s.control = optarg;
			else if (c == 'o' && subcommands[i].elsewhere)
				client_on_host(optarg);
			else if (c == 'o')
				return snmigrate_usage_error("--on does not go with %s", subcommands[i].name);
			else
				return client_option_error("snmigrate", argv);
		}
		optind = 0; /* getopt begins anew */
		return subcommands[i].run(&s, argc - at, argv + at);
	}
	/* getopt would take it for the beginning of --on-exceed */
	for (int i = 1; i < at && i < argc; i++)
		if (!strcmp(argv[i], "--on"))
			return snmigrate_usage_error("--on does not go with move");
	optind = 0;
	return snmigrate_move(&s, argc, argv);
}
