/* SPDX-License-Identifier: Apache-2.0 */
/* How long a move will take, from what was measured of guest, hosts and link. */
#include "host/check.h"

#include <math.h>

/*
 * What does not depend on the size: so long on a host with nothing else to do, and so many times what a
 * connection took just now, with a process of its own there and both sides' proofs, which tells how fast both
 * hosts are.
 */
static const struct {
	double ms, dials;
} connect_cost = {200, 2},	  /* HELLO, the machine made there, all channels */
	disk_cost = {60, 0.4},	  /* of each: image, channel, map */
	memory_cost = {100, 0.5}; /* the last rounds, the handover, the end */
#define SYNCS	16		  /* records, folders and disks that have to be durable in turn */
#define DIAL_MS 5		  /* one that was not measured */
/* Where processors are short it waits for them, for a part of its time: the dials tell most of that already,
 * and what makes the load may give way. */
#define CROWDED	     0.25
#define CROWDED_MOST 1.5

#define PAUSE_FIXED_MS 5

#define ROUNDS_MOST   30
#define LATE_ROUNDS   3
#define SLOWED_SHRINK 0.75

static double busy_part(const struct host_facts *h)
{
	return h->cpus ? h->load / h->cpus : 0;
}

/* Of the busier of both hosts: runnable threads for each of its processors. */
static double busy(const struct check_facts *f)
{
	double here = busy_part(&f->own), there = busy_part(&f->theirs);
	return here > there ? here : there;
}

static double fixed_ms(const struct check_facts *f)
{
	double dial = f->dial_us ? (double)f->dial_us / 1000 : DIAL_MS, crowd = busy(f);
	double work = connect_cost.ms + disk_cost.ms * f->ndisks + memory_cost.ms +
		      dial * (connect_cost.dials + disk_cost.dials * f->ndisks + memory_cost.dials);
	crowd = crowd > 1 ? 1 + (crowd - 1) * CROWDED : 1;
	crowd = crowd < CROWDED_MOST ? crowd : CROWDED_MOST;
	return work * crowd + SYNCS * (double)f->disk_sync_us / 1000;
}

/* The disks: read, sent and written at the same time, or one after another where the hosts have no processor
 * left for that; then both sides read them again, with the same difference. */
static double storage_ms(const struct check_facts *f, double link)
{
	double write = (double)f->disk_write_bytes_per_s, read = (double)f->disk_read_bytes_per_s, copied = 0;
	for (unsigned i = 0; i < f->ndisks && !f->without_storage; i++)
		copied += (double)f->disks[i].allocated_bytes;
	if (write < 1)
		return copied * 1000 / link;
	read = read < 1 ? write : read;
	double in_turn = busy(f) < 1 ? busy(f) : 1, sum = 1 / link + 1 / write + 1 / read;
	double least = link < write ? link : write;
	least = read < least ? read : least;
	double again = (1 + in_turn) / (read < write ? read : write);
	return copied * 1000 * (1 / least + in_turn * (sum - 1 / least) + again);
}

/*
 * The rounds of pre-copy. A round leaves what the guest dirtied meanwhile, never more than it has; of what it
 * dirties at all only the last second is known, and longer looks find more of it, ever more slowly. Who does
 * not get there by himself is slowed after some rounds (memxfer/pace.c, vmm/move_source_pace.c: balanced).
 */
static double memory_ms(const struct check_facts *f, double link)
{
	double left = (double)f->populated_bytes, rate = f->dirty_known ? (double)f->dirty_bytes_per_s : 0;
	double sum = 0, enough = link * f->max_downtime_ms / 1000;
	for (unsigned round = 1; round <= ROUNDS_MOST && left > enough; round++) {
		double s = left / link, looks = s / CHECK_DIRTY_SECONDS, dirtied = rate * s;
		double set = (double)f->dirty_set_bytes * (looks > 1 ? 1 + log(looks) : 1);
		if (f->dirty_set_bytes && dirtied > set)
			dirtied = set;
		if (round >= LATE_ROUNDS && dirtied > left * SLOWED_SHRINK)
			dirtied = left * SLOWED_SHRINK;
		sum += s;
		left = fmin(dirtied, (double)f->populated_bytes);
	}
	return (sum + left / link) * 1000;
}

void check_predict(const struct check_facts *f, struct check_prediction *out)
{
	*out = (struct check_prediction){0};
	double link = (double)f->link_bytes_per_s;
	if (!f->live || link < 1)
		return;
	double limit = (double)f->bandwidth_bytes_per_s;
	if (limit > 0 && limit < link)
		link = limit;
	double once = (double)f->populated_bytes * 1000 / link, memory = memory_ms(f, link);
	double fixed = fixed_ms(f), storage = storage_ms(f, link),
	       ms = fixed + storage + memory + (double)f->files_bytes * 1000 / link;
	double pause = PAUSE_FIXED_MS + 2 * (double)f->round_trip_us / 1000 + (double)f->disk_sync_us / 1000;
	out->total_ms = (uint64_t)(ms < 1e12 ? ms : 1e12);
	out->fixed_ms = (uint64_t)(fixed < 1e12 ? fixed : 1e12);
	double quick = storage + once + pause; /* a guest that stands still changes nothing */
	out->quick_ms = (uint64_t)(quick < 1e12 ? quick : 1e12);
	out->downtime_least_ms = (unsigned)pause;
	out->downtime_most_ms = (unsigned)pause + f->max_downtime_ms;
}
