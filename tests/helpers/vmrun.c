/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Runs a machine by itself, without a host daemon, for tests of the VMM. With --save-load-every the machine
 * is again and again saved, destroyed and rebuilt from the saved state and a copy of its memory, as a move
 * does, but in one process.
 *
 * Exit status: 0 powered off, 2 wrong usage, 3 could not start, 4 crashed, 5 time is over.
 */
#include <errno.h>
#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "block/open.h"
#include "vmm/machine.h"
#include "vmm/memory.h"
#include "vmm/state.h"
#include "vmm/tap.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
static int ended; /* 0 running, 1 off, 2 crashed */
static unsigned resets;

static struct {
	const char *kernel, *initrd, *cmdline, *serial, *run_dir;
	const char *nets[MACHINE_NETS_MAX];
	unsigned save_load_ms, seconds, power_button_s, pause_ms, max_resets;
	bool held;
} opt = {.cmdline = "", .serial = "stdio"};

static void on_event(void *opaque, enum machine_event event, const char *detail)
{
	static const char *const names[] = {"shutdown", "reset", "crashed"};
	fprintf(stderr, "vmrun: event %s: %s\n", names[event], detail);
	SCOPE_LOCK(&lock);
	if (event == MACHINE_EVENT_SHUTDOWN)
		ended = 1;
	else if (event == MACHINE_EVENT_CRASHED)
		ended = 2;
	else if (++resets == opt.max_resets)
		ended = 1;
	pthread_cond_broadcast(&cond);
}

static bool wait_ms(unsigned ms)
{
	struct timespec until;
	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += ms / 1000;
	until.tv_nsec += (long)(ms % 1000) * 1000000;
	until.tv_sec += until.tv_nsec / 1000000000;
	until.tv_nsec %= 1000000000;
	SCOPE_LOCK(&lock);
	while (!ended)
		if (pthread_cond_timedwait(&cond, &lock, &until) == ETIMEDOUT)
			return false;
	return true;
}

static uint64_t parse_size(const char *s)
{
	char *end;
	uint64_t v = strtoull(s, &end, 0);
	if (*end == 'G')
		v <<= 30;
	else if (*end == 'M' || !*end)
		v <<= 20;
	else
		v = 0;
	return v;
}

static _Noreturn void die(int status, const struct error *err)
{
	fprintf(stderr, "vmrun: %s\n", err->message);
	exit(status);
}

static void open_nets(struct machine_config *cfg)
{
	struct error err = ERROR_INIT;
	for (unsigned i = 0; i < cfg->nnets; i++) {
		char bridge[64], ifname[16];
		unsigned mac[6];
		if (sscanf(opt.nets[i], "%63[^,],%x:%x:%x:%x:%x:%x", bridge, &mac[0], &mac[1], &mac[2],
			   &mac[3], &mac[4], &mac[5]) != 7) {
			fprintf(stderr, "vmrun: --net BRIDGE,MAC\n");
			exit(2);
		}
		for (unsigned k = 0; k < 6; k++)
			cfg->nets[i].mac[k] = (uint8_t)mac[k];
		snprintf(cfg->nets[i].id, sizeof cfg->nets[i].id, "net%u", i);
		cfg->nets[i].tap_fd = tap_open(bridge, ifname, &err);
		if (cfg->nets[i].tap_fd < 0)
			die(3, &err);
	}
}

static void check(int ret, const struct error *err)
{
	if (ret)
		die(3, err);
}

/* A machine like m, with m's memory and state, in m's place. */
static struct machine *move_in_place(struct machine *m, struct machine_config *cfg, unsigned round)
{
	struct error err = ERROR_INIT;
	uint64_t paused_at = clock_now_ns();
	check(machine_pause(m, &err), &err);
	uint64_t stopped = clock_now_ns();
	check(machine_drain(m, 5000, &err), &err);
	uint64_t drained = clock_now_ns();
	struct state_writer *w = state_writer_create();
	check(machine_save(m, w, &err), &err);
	uint64_t saved = clock_now_ns();
	const uint8_t *buf;
	size_t len;
	check(state_writer_finish(w, &buf, &len, &err), &err);
	json_t *cpu = machine_cpu_describe(m, &err);
	if (!cpu)
		die(3, &err);
	check(machine_cpu_check(cpu, &err), &err);

	open_nets(cfg);
	cfg->cpu = cpu;
	/* The console's name is the same in both. */
	struct machine *n = NULL;
	struct mem_space from = machine_memory_space(m);
	uint8_t *keep =
		mmap(NULL, from.npages * MEM_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, from.fd, 0);
	if (keep == MAP_FAILED) {
		perror("vmrun: mmap");
		exit(3);
	}
	machine_destroy(m);
	uint64_t create = clock_now_ns();
	check(machine_create(cfg, &n, &err), &err);
	check(machine_set_kernel(n, opt.kernel, opt.initrd, opt.cmdline, &err), &err);
	uint64_t created = clock_now_ns();
	struct mem_space to = machine_memory_space(n);
	for (uint64_t i = 0; i < to.npages; i++) {
		static const uint8_t zero[MEM_PAGE_BYTES];
		const uint8_t *p = keep + i * MEM_PAGE_BYTES;
		if (memcmp(p, zero, MEM_PAGE_BYTES))
			memcpy(to.base + i * MEM_PAGE_BYTES, p, MEM_PAGE_BYTES);
	}
	munmap(keep, from.npages * MEM_PAGE_BYTES);
	uint64_t copied = clock_now_ns();
	check(machine_load(n, buf, len, &err), &err);
	uint64_t loaded = clock_now_ns();
	check(machine_adjust_clock(n, clock_now_ns() - paused_at, &err), &err);
	if (opt.held) {
		check(machine_start_held(n, &err), &err);
		clock_sleep_ms(20);
		check(machine_release_effects(n, &err), &err);
	} else {
		check(machine_start(n, &err), &err);
	}
	machine_announce(n);
	fprintf(stderr,
		"vmrun: move %u: state %zu bytes; us: pause %llu drain %llu save %llu create %llu copy %llu "
		"load %llu\n",
		round, len, (unsigned long long)(stopped - paused_at) / 1000,
		(unsigned long long)(drained - stopped) / 1000, (unsigned long long)(saved - drained) / 1000,
		(unsigned long long)(created - create) / 1000, (unsigned long long)(copied - created) / 1000,
		(unsigned long long)(loaded - copied) / 1000);
	state_writer_free(w);
	json_decref(cpu);
	cfg->cpu = NULL;
	return n;
}

static const struct option options[] = {
	{"kernel", required_argument, NULL, 'k'},
	{"initrd", required_argument, NULL, 'i'},
	{"cmdline", required_argument, NULL, 'c'},
	{"memory", required_argument, NULL, 'm'},
	{"cpus", required_argument, NULL, 'p'},
	{"disk", required_argument, NULL, 'd'},
	{"net", required_argument, NULL, 'n'},
	{"save-load-every", required_argument, NULL, 's'},
	{"seconds", required_argument, NULL, 't'},
	{"serial", required_argument, NULL, 'S'},
	{"run-dir", required_argument, NULL, 'r'},
	{"power-button-after", required_argument, NULL, 'b'},
	{"pause-resume-every", required_argument, NULL, 'P'},
	{"max-resets", required_argument, NULL, 'R'},
	{"held", no_argument, NULL, 'H'},
	{NULL, 0, NULL, 0},
};

int main(int argc, char **argv)
{
	struct machine_config cfg = {.memory_bytes = 256u << 20, .cpus = 1, .event = on_event};
	struct error err = ERROR_INIT;
	const char *disks[MACHINE_DISKS_MAX];
	int o;
	log_init("vmrun");
	signal(SIGPIPE, SIG_IGN);
	while ((o = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (o) {
		case 'k':
			opt.kernel = optarg;
			break;
		case 'i':
			opt.initrd = optarg;
			break;
		case 'c':
			opt.cmdline = optarg;
			break;
		case 'm':
			cfg.memory_bytes = parse_size(optarg);
			break;
		case 'p':
			cfg.cpus = (unsigned)atoi(optarg);
			break;
		case 'd':
			if (cfg.ndisks < MACHINE_DISKS_MAX)
				disks[cfg.ndisks++] = optarg;
			break;
		case 'n':
			if (cfg.nnets < MACHINE_NETS_MAX)
				opt.nets[cfg.nnets++] = optarg;
			break;
		case 's':
			opt.save_load_ms = (unsigned)atoi(optarg);
			break;
		case 't':
			opt.seconds = (unsigned)atoi(optarg);
			break;
		case 'S':
			opt.serial = optarg;
			break;
		case 'r':
			opt.run_dir = optarg;
			break;
		case 'b':
			opt.power_button_s = (unsigned)atoi(optarg);
			break;
		case 'P':
			opt.pause_ms = (unsigned)atoi(optarg);
			break;
		case 'R':
			opt.max_resets = (unsigned)atoi(optarg);
			break;
		case 'H':
			opt.held = true;
			break;
		default:
			opt.kernel = NULL;
			optind = argc;
			break;
		}
	}
	if (!opt.kernel) {
		fprintf(stderr,
			"usage: vmrun --kernel K [--initrd I] [--cmdline C] [--memory MIB|nM|nG] [--cpus N]\n"
			"  [--disk raw:PATH|qcow2:PATH]... [--net BRIDGE,MAC]... [--serial "
			"socket|file:PATH|stdio]\n"
			"  [--run-dir DIR] [--seconds N] [--save-load-every MS] [--held] "
			"[--pause-resume-every MS]\n"
			"  [--power-button-after S] [--max-resets N]\n");
		return 2;
	}
	cfg.serial = opt.serial;
	cfg.run_dir = opt.run_dir;
	for (unsigned i = 0; i < cfg.ndisks; i++) {
		const char *colon = strchr(disks[i], ':');
		char format[16] = "raw";
		if (colon)
			snprintf(format, sizeof format, "%.*s", (int)(colon - disks[i]), disks[i]);
		struct block_open_options bo = {.run_dir = opt.run_dir};
		if (block_format_parse(format, &bo.format)) {
			fprintf(stderr, "vmrun: --disk %s: unknown format\n", disks[i]);
			return 2;
		}
		snprintf(cfg.disks[i].id, sizeof cfg.disks[i].id, "disk%u", i);
		check(block_open(colon ? colon + 1 : disks[i], &bo, &cfg.disks[i].block, &err), &err);
	}
	open_nets(&cfg);
	struct machine *m;
	check(machine_create(&cfg, &m, &err), &err);
	check(machine_load_kernel(m, opt.kernel, opt.initrd, opt.cmdline, &err), &err);
	uint64_t start = clock_now_ms();
	check(machine_start(m, &err), &err);
	bool pressed = false;
	unsigned round = 0;
	int status = -1;
	while (status < 0) {
		unsigned step = opt.save_load_ms ? opt.save_load_ms : opt.pause_ms ? opt.pause_ms : 200;
		if (wait_ms(step)) {
			status = ended == 1 ? 0 : 4;
			break;
		}
		uint64_t passed = clock_now_ms() - start;
		if (opt.seconds && passed >= opt.seconds * 1000u)
			status = 5;
		else if (opt.power_button_s && !pressed && passed >= opt.power_button_s * 1000u) {
			fprintf(stderr, "vmrun: power button\n");
			machine_power_button(m);
			pressed = true;
		} else if (opt.save_load_ms)
			m = move_in_place(m, &cfg, ++round);
		else if (opt.pause_ms) {
			check(machine_pause(m, &err), &err);
			check(machine_drain(m, 5000, &err), &err);
			check(machine_start(m, &err), &err);
		}
	}
	machine_pause(m, NULL);
	machine_drain(m, 1000, NULL);
	machine_destroy(m);
	for (unsigned i = 0; i < cfg.ndisks; i++)
		block_close(cfg.disks[i].block);
	fprintf(stderr, "vmrun: status %d, %u moves, %u resets\n", status, round, resets);
	return status;
}
