/* SPDX-License-Identifier: Apache-2.0 */
/* The lines of the report, one function each. */
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/cleanup.h"
#include "host/check.h"

/* What the destination keeps for itself (vmm/move_destination_prepare.c, host/worker.c). */
#define RESERVE_BYTES	   (UINT64_C(64) << 20)
#define SCARCE_PART	   10 /* less than a tenth left is worth a word */
#define CLOCK_WARN_MS	   1000
#define LINK_SLOW	   (UINT64_C(20) << 20)
#define ROUND_TRIP_LONG_US 10000
#define SYNC_SLOW_US	   50000
#define LOAD_HIGH	   1.5 /* for each processor */

const char *check_grade_name(enum check_grade grade)
{
	static const char *const names[] = {"pass", "warning", "failure"};
	return names[grade];
}

static void say(struct check_line *l, enum check_grade grade, const char *fmt, ...)
	__attribute__((format(printf, 3, 4)));
static void say(struct check_line *l, enum check_grade grade, const char *fmt, ...)
{
	va_list ap;
	l->grade = grade;
	va_start(ap, fmt);
	vsnprintf(l->text, sizeof l->text, fmt, ap);
	va_end(ap);
}

static void advise(struct check_line *l, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void advise(struct check_line *l, const char *fmt, ...)
{
	va_list ap;
	va_start(ap, fmt);
	vsnprintf(l->what_to_do, sizeof l->what_to_do, fmt, ap);
	va_end(ap);
}

static double mib(uint64_t bytes)
{
	return (double)bytes / (1 << 20);
}

static uint64_t disk_bytes(const struct check_facts *f)
{
	uint64_t sum = 0;
	for (unsigned i = 0; i < f->ndisks; i++)
		sum += f->disks[i].allocated_bytes;
	return sum;
}

/* ---- lines; each fills text and grade ---- */

static void judge_vm(const struct check_facts *f, struct check_line *l)
{
	if (!*f->not_movable && !strcmp(f->state, "stopped")) {
		say(l, CHECK_PASS,
		    "VM %s is stopped on %s: it moves as it is, without memory; whether %s has room for its "
		    "disks shows when the move begins",
		    f->vm, f->here, f->there);
		return;
	}
	if (!*f->not_movable) {
		say(l, CHECK_PASS, "VM %s is %s on %s", f->vm, f->state, f->here);
		return;
	}
	say(l, CHECK_FAILURE, "%s", f->not_movable);
	if (!strcmp(f->state, "crashed"))
		advise(l, "snvm start %s", f->vm);
	else
		advise(l, "see snmigrate status");
}

static void judge_trust(const struct check_facts *f, struct check_line *l)
{
	if (f->answered) {
		say(l, CHECK_PASS, "%s and %s have proved themselves to one another", f->here, f->there);
		return;
	}
	say(l, CHECK_FAILURE, "%s", f->no_answer);
	advise(l,
	       "see that snmigrated runs on %s, is reached at the address in the configuration, and that "
	       "both "
	       "certificates are of the same CA and in date (snmigrated --check on both)",
	       f->there);
}

static void judge_versions(const struct check_facts *f, struct check_line *l)
{
	if (f->protocol > f->protocol_max) {
		say(l, CHECK_FAILURE, "%s speaks migration protocol %u, %s %u at most", f->here, f->protocol,
		    f->there, f->protocol_max);
		advise(l, "upgrade snmigrate on %s", f->there);
	} else if (f->protocol < f->protocol_min) {
		say(l, CHECK_FAILURE, "%s speaks migration protocol %u, %s needs %u", f->here, f->protocol,
		    f->there, f->protocol_min);
		advise(l, "upgrade snmigrate on %s", f->here);
	} else {
		say(l, CHECK_PASS, "migration protocol %u; program %s there, %s here", f->protocol,
		    f->program, SNM_VERSION);
	}
}

static void judge_cpu(const struct check_facts *f, struct check_line *l)
{
	struct cpu_features guest, host;
	char names[CPU_NAMES_BYTES];
	if (!f->host.table) {
		say(l, CHECK_FAILURE, "%s cannot run VMs: %s", f->there, f->cpu_error);
		advise(l, "load the KVM module there, and see that /dev/kvm may be used");
		return;
	}
	cpu_features_of(f->guest.table, &guest);
	cpu_features_of(f->host.table, &host);
	unsigned n = cpu_features_lacking(&guest, &host, names, sizeof names);
	if (strcmp(guest.vendor, host.vendor)) {
		say(l, CHECK_FAILURE, "the guest's CPU is %s, that of %s %s", guest.vendor, f->there,
		    host.vendor);
		advise(l, "a running guest cannot change vendor: choose another host, or stop the VM first");
	} else if (n) {
		say(l, CHECK_FAILURE, "the CPU of %s lacks %u feature%s that the guest has seen: %s",
		    f->there, n, n == 1 ? "" : "s", names);
		advise(l,
		       "give the VM a CPU that both hosts have and start it anew: snmigrate baseline %s %s "
		       ">FILE; snvm stop %s; snvm set %s cpu=baseline:FILE",
		       f->here, f->there, f->vm, f->vm);
	} else {
		char model[CPU_MODEL_BYTES];
		cpu_model(f->host.table, model);
		say(l, CHECK_PASS, "%s has every feature that the guest has seen (%s)", f->there,
		    *model ? model : host.vendor);
	}
}

static void judge_tsc(const struct check_facts *f, struct check_line *l)
{
	struct error err = ERROR_INIT;
	/* of the same table: what is left is the rate */
	if (f->host.table && cpu_judge(f->guest.table, f->guest.tsc_khz, f->guest.table, f->host.tsc_khz,
				       f->host.scales_tsc, &err)) {
		say(l, CHECK_FAILURE,
		    "the guest's TSC runs at %u kHz, that of %s at %u kHz, and %s cannot scale it",
		    f->guest.tsc_khz, f->there, f->host.tsc_khz, f->there);
		advise(l, "choose a host with the same rate, or start the VM anew there");
	} else {
		say(l, CHECK_PASS, "%u kHz, %u kHz on %s%s", f->guest.tsc_khz, f->host.tsc_khz, f->there,
		    f->host.scales_tsc ? ", which can scale" : "");
	}
}

static void judge_admission(const struct check_facts *f, struct check_line *l)
{
	char all[CHECK_TEXT_BYTES] = "";
	size_t n = 0;
	for (unsigned i = 0; i < f->nrefusals && n < sizeof all; i++)
		n += (size_t)snprintf(all + n, sizeof all - n, "%s%s", i ? "; " : "", f->refusals[i]);
	if (f->nrefusals) {
		say(l, CHECK_FAILURE, "%s would refuse: %s", f->there, all);
		advise(l, "make room there, or see snmigrate status on %s", f->there);
	} else {
		say(l, CHECK_PASS, "%s would let it in", f->there);
	}
}

static void judge_memory(const struct check_facts *f, struct check_line *l)
{
	uint64_t free_bytes = f->theirs.memory_available_bytes, need = f->memory_bytes + RESERVE_BYTES;
	if (free_bytes < need) {
		say(l, CHECK_FAILURE, "%s has %.0f MiB of memory free, the VM needs %.0f", f->there,
		    mib(free_bytes), mib(need));
		advise(l, "free memory on %s, or choose another host", f->there);
	} else if (free_bytes - f->memory_bytes < f->theirs.memory_total_bytes / SCARCE_PART) {
		say(l, CHECK_WARNING, "%.0f MiB of memory would be left on %s of %.0f",
		    mib(free_bytes - f->memory_bytes), f->there, mib(f->theirs.memory_total_bytes));
		advise(l, "the host may begin to swap when its other VMs grow");
	} else {
		say(l, CHECK_PASS, "%.0f MiB free on %s, %.0f needed", mib(free_bytes), f->there, mib(need));
	}
}

static bool fits_node(const struct host_facts *h, const struct check_facts *f, bool ever)
{
	for (unsigned i = 0; i < h->nnodes; i++)
		if (h->nodes[i].cpus >= f->cpus &&
		    (ever ? h->nodes[i].total_bytes : h->nodes[i].free_bytes) >= f->memory_bytes)
			return true;
	return false;
}

static void judge_numa(const struct check_facts *f, struct check_line *l)
{
	const struct host_facts *h = &f->theirs;
	if (h->nnodes <= 1) {
		say(l, CHECK_PASS, "%s has one NUMA node", f->there);
	} else if (fits_node(h, f, false)) {
		say(l, CHECK_PASS, "it fits into one of the %u NUMA nodes of %s", h->nnodes, f->there);
	} else if (fits_node(h, f, true)) {
		say(l, CHECK_WARNING, "no one of the %u NUMA nodes of %s has room for it now", h->nnodes,
		    f->there);
		advise(l, "its memory will lie on several nodes and be slower; make room on one first");
	} else {
		say(l, CHECK_WARNING, "it is larger than any of the %u NUMA nodes of %s", h->nnodes,
		    f->there);
		advise(l, "its memory will lie on several nodes%s",
		       fits_node(&f->own, f, true) ? ", which it does not have to here" : "");
	}
}

static void judge_ecc(const struct check_facts *f, struct check_line *l)
{
	if (f->theirs.ecc_uncorrected) {
		say(l, CHECK_WARNING, "%s has seen %" PRIu64 " memory errors that ECC could not correct",
		    f->there, f->theirs.ecc_uncorrected);
		advise(l, "do not move VMs there before its memory is replaced");
	} else if (f->own.ecc_controllers && !f->theirs.ecc_controllers) {
		say(l, CHECK_WARNING, "%s has ECC memory (EDAC), %s shows none", f->here, f->there);
		advise(l, "a flipped bit there goes unseen; load the EDAC driver there if it has ECC");
	} else if (f->theirs.ecc_controllers) {
		say(l, CHECK_PASS, "%s has ECC memory, %" PRIu64 " errors corrected", f->there,
		    f->theirs.ecc_corrected);
	} else {
		say(l, CHECK_PASS, "neither host shows ECC memory (EDAC)");
	}
}

static bool never(const char *choice)
{
	return !*choice || !strcmp(choice, "never") || !strcmp(choice, "deny");
}

static void judge_huge_pages(const struct check_facts *f, struct check_line *l)
{
	bool here = !never(f->own.huge_shmem), there = !never(f->theirs.huge_shmem);
	if (here && !there) {
		say(l, CHECK_WARNING, "guest memory gets huge pages on %s (%s), not on %s (%s)", f->here,
		    f->own.huge_shmem, f->there, *f->theirs.huge_shmem ? f->theirs.huge_shmem : "not known");
		advise(l, "on %s: echo %s >/sys/kernel/mm/transparent_hugepage/shmem_enabled", f->there,
		       f->own.huge_shmem);
	} else {
		say(l, CHECK_PASS, "huge pages for guest memory: %s on %s",
		    *f->theirs.huge_shmem ? f->theirs.huge_shmem : "not known", f->there);
	}
}

static void judge_load(const struct check_facts *f, struct check_line *l)
{
	const struct host_facts *h = &f->theirs;
	if (h->cpus < f->cpus) {
		say(l, CHECK_WARNING, "the VM has %u CPUs, %s only %u", f->cpus, f->there, h->cpus);
		advise(l, "its CPUs will wait for one another there");
	} else if (h->cpus && h->load > LOAD_HIGH * h->cpus) {
		say(l, CHECK_WARNING, "%s is loaded: %.1f on %u CPUs", f->there, h->load, h->cpus);
		advise(l, "the move and the VM will be slow there; wait, or choose another host");
	} else {
		say(l, CHECK_PASS, "load %.1f on %u CPUs of %s", h->load, h->cpus, f->there);
	}
}

static void judge_backing(const struct check_facts *f, struct check_line *l)
{
	const char *with = NULL;
	for (unsigned i = 0; i < f->ndisks && !with; i++)
		if (f->disks[i].backing)
			with = f->disks[i].id;
	if (with && !f->backing_chosen) {
		say(l, CHECK_FAILURE, "disk %s has backing files", with);
		advise(l, "say what becomes of them: --backing flatten, chain or reuse");
	} else {
		say(l, CHECK_PASS, "%s",
		    with ? "--backing says what becomes of backing files" : "no disk has one");
	}
}

static void judge_disk_space(const struct check_facts *f, struct check_line *l)
{
	uint64_t need = disk_bytes(f) + RESERVE_BYTES, room = f->disk_free_bytes + f->disk_kept_bytes;
	if (room < need) {
		say(l, CHECK_FAILURE, "%s has %.0f MiB of disk free, the VM's disks need %.0f", f->there,
		    mib(room), mib(need));
		advise(l,
		       "make room on %s (snmigrate partial list, kept/), or put a disk onto a device: "
		       "--to-disk",
		       f->there);
	} else if (room - need < room / SCARCE_PART) {
		say(l, CHECK_WARNING, "%.0f MiB of disk would be left on %s", mib(room - need), f->there);
		advise(l, "a guest that writes more than that finds the host's disk full");
	} else {
		say(l, CHECK_PASS, "%.0f MiB free on %s, %.0f needed", mib(room), f->there, mib(need));
	}
}

static void judge_disk_speed(const struct check_facts *f, struct check_line *l)
{
	uint64_t write = f->disk_write_bytes_per_s;
	if (!write) {
		say(l, CHECK_WARNING, "the disk of %s was not measured: %s", f->there,
		    *f->disk_error ? f->disk_error : "nothing was said");
		advise(l, "check again later");
	} else if (f->disk_sync_us > SYNC_SLOW_US) {
		say(l, CHECK_WARNING, "a durable write takes %.0f ms on %s", (double)f->disk_sync_us / 1000,
		    f->there);
		advise(l, "the guest stops for longer at the handover; move when that disk is less busy");
	} else if (f->link_bytes_per_s > 4 * write) {
		say(l, CHECK_WARNING, "%s writes %.0f MB/s, a quarter or less of what the link carries",
		    f->there, (double)write / 1e6);
		advise(l, "the disks travel as fast as that disk writes");
	} else {
		say(l, CHECK_PASS, "%s writes %.0f MB/s, a durable write takes %.1f ms", f->there,
		    (double)write / 1e6, (double)f->disk_sync_us / 1000);
	}
}

static void judge_bridges(const struct check_facts *f, struct check_line *l)
{
	char all[CHECK_TEXT_BYTES] = "";
	size_t n = 0;
	for (unsigned i = 0; i < f->nnets && n < sizeof all; i++)
		if (*f->nets[i].error)
			n += (size_t)snprintf(all + n, sizeof all - n, "%snet %s: %s", n ? "; " : "",
					      f->nets[i].id, f->nets[i].error);
	if (n) {
		say(l, CHECK_FAILURE, "%s", all);
		advise(l, "make the bridge on %s, or allow it there ([network] bridges)", f->there);
	} else if (f->nnets) {
		say(l, CHECK_PASS, "every bridge of the VM is there on %s", f->there);
	} else {
		say(l, CHECK_PASS, "the VM has no network");
	}
}

static void judge_mtu(const struct check_facts *f, struct check_line *l)
{
	for (unsigned i = 0; i < f->nnets; i++) {
		const struct check_net *n = &f->nets[i];
		if (!n->mtu_there || n->mtu_there >= n->mtu_here)
			continue;
		say(l, CHECK_WARNING, "net %s: bridge %s has an MTU of %u here and %u on %s", n->id,
		    n->bridge, n->mtu_here, n->mtu_there, f->there);
		advise(l, "the guest's larger packets will be lost: on %s, ip link set %s mtu %u", f->there,
		       n->bridge, n->mtu_here);
		return;
	}
	say(l, CHECK_PASS, "no bridge has a smaller MTU there");
}

static void judge_clock(const struct check_facts *f, struct check_line *l)
{
	int64_t off = f->clock_offset_ms;
	if (off > CLOCK_WARN_MS || off < -CLOCK_WARN_MS) {
		say(l, CHECK_WARNING, "the clock of %s is %.1f s %s", f->there,
		    (double)(off < 0 ? -off : off) / 1000, off < 0 ? "behind" : "ahead");
		advise(l, "let both hosts keep time (chrony, systemd-timesyncd): certificates and logs go by "
			  "it");
	} else {
		say(l, CHECK_PASS, "the clocks differ by %.0f ms", (double)(off < 0 ? -off : off));
	}
}

static void judge_link(const struct check_facts *f, struct check_line *l)
{
	double rate = (double)f->link_bytes_per_s / 1e6, trip = (double)f->round_trip_us / 1000;
	if (!f->link_bytes_per_s) {
		say(l, CHECK_WARNING, "the link was not measured: %s",
		    *f->link_error ? f->link_error : "nothing was said");
		advise(l, "check again later");
	} else if (f->link_bytes_per_s < CHECK_LINK_LEAST) {
		say(l, CHECK_FAILURE, "the link carries %.2f MB/s: too little to move a VM", rate);
		advise(l, "a move needs at least 1 MiB/s");
	} else if (f->round_trip_us > ROUND_TRIP_LONG_US) {
		say(l, CHECK_WARNING, "%.0f MB/s on one connection, but a round trip of %.1f ms", rate, trip);
		advise(l, "use --mirror buffered: else each write of the guest waits a round trip while the "
			  "disks "
			  "are mirrored");
	} else if (f->link_bytes_per_s < LINK_SLOW) {
		say(l, CHECK_WARNING, "%.1f MB/s on one connection, round trip %.2f ms", rate, trip);
		advise(l, "it will take long; the guest runs on meanwhile");
	} else {
		say(l, CHECK_PASS, "%.0f MB/s on one connection, round trip %.2f ms", rate, trip);
	}
}

static void judge_dirty(const struct check_facts *f, struct check_line *l)
{
	if (!f->dirty_known || !f->link_bytes_per_s) {
		say(l, CHECK_PASS, "not measured: %s",
		    f->dirty_known ? "the link was not"
				   : "only a running guest, or one that was moved, shows it");
		return;
	}
	const char *when = f->dirty_now ? "" : "at its last move ",
		   *does = f->dirty_now ? "changes" : "changed";
	double dirty = (double)f->dirty_bytes_per_s / 1e6, rate = (double)f->link_bytes_per_s / 1e6;
	if (f->dirty_bytes_per_s >= f->link_bytes_per_s) {
		say(l, CHECK_WARNING, "%sthe guest %s %.0f MB/s of its memory, the link carries %.0f", when,
		    does, dirty, rate);
		advise(l, "pre-copy will not end by itself: move at a quieter time, or allow a longer stop "
			  "(--max-downtime)");
	} else if (2 * f->dirty_bytes_per_s >= f->link_bytes_per_s) {
		say(l, CHECK_WARNING, "%sthe guest %s %.0f MB/s of its memory, the link carries %.0f", when,
		    does, dirty, rate);
		advise(l, "pre-copy will take several rounds");
	} else {
		say(l, CHECK_PASS, "%sthe guest %s %.0f MB/s of its memory, the link carries %.0f", when,
		    does, dirty, rate);
	}
}

static void judge_prediction(const struct check_facts *f, struct check_line *l)
{
	struct check_prediction p;
	check_predict(f, &p);
	if (!p.total_ms)
		say(l, CHECK_PASS, "nothing to predict from");
	else
		say(l, CHECK_PASS, "about %.1f s in all; the guest stops for about %u to %u ms",
		    (double)p.total_ms / 1000, p.downtime_least_ms, p.downtime_most_ms);
}

/* ---- all of them ---- */

unsigned check_judge(const struct check_facts *f, struct check_line lines[CHECK_LINES_MAX])
{
	static const struct {
		const char *name;
		void (*judge)(const struct check_facts *f, struct check_line *l);
		enum { ALWAYS, THEIRS, BOTH } needs; /* the destination's facts; the VM's as well */
	} all[] = {{"vm", judge_vm, ALWAYS},
		   {"trust", judge_trust, ALWAYS},
		   {"versions", judge_versions, BOTH},
		   {"cpu", judge_cpu, BOTH},
		   {"tsc", judge_tsc, BOTH},
		   {"admission", judge_admission, BOTH},
		   {"memory", judge_memory, BOTH},
		   {"numa", judge_numa, BOTH},
		   {"ecc", judge_ecc, THEIRS},
		   {"huge-pages", judge_huge_pages, THEIRS},
		   {"load", judge_load, BOTH},
		   {"backing", judge_backing, BOTH},
		   {"disk-space", judge_disk_space, BOTH},
		   {"disk-speed", judge_disk_speed, THEIRS},
		   {"bridges", judge_bridges, BOTH},
		   {"mtu", judge_mtu, BOTH},
		   {"clock", judge_clock, THEIRS},
		   {"link", judge_link, THEIRS},
		   {"dirty-rate", judge_dirty, BOTH},
		   {"prediction", judge_prediction, BOTH}};
	_Static_assert(ARRAY_SIZE(all) <= CHECK_LINES_MAX, "lines");
	unsigned n = 0;
	for (size_t i = 0; i < ARRAY_SIZE(all); i++) {
		if ((all[i].needs >= THEIRS && !f->answered) || (all[i].needs == BOTH && !f->live))
			continue;
		lines[n] = (struct check_line){.name = all[i].name};
		all[i].judge(f, &lines[n++]);
	}
	return n;
}
