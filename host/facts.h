/* SPDX-License-Identifier: Apache-2.0 */
#ifndef HOST_FACTS_H
#define HOST_FACTS_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"

/* What a host can say of itself that matters to a VM, and as the other host hears it. */

#define FACTS_NODES_MAX 64

struct facts_node {
	unsigned cpus;
	uint64_t total_bytes, free_bytes;
};

struct host_facts {
	uint64_t memory_total_bytes, memory_available_bytes;
	unsigned cpus;
	double load; /* of the last minute */
	struct facts_node nodes[FACTS_NODES_MAX];
	unsigned nnodes;
	unsigned ecc_controllers; /* that EDAC knows */
	uint64_t ecc_corrected, ecc_uncorrected;
	char huge_shmem[16], huge_anonymous[16]; /* always, never...; "" = not known */
};

/* From /proc and /sys below root ("" for this host's own). What is not there stays 0 or "". */
void host_facts_collect(const char *root, struct host_facts *out);
json_t *host_facts_to_json(const struct host_facts *f);
/* Hostile input: -EPROTO with what is wrong. */
int host_facts_from_json(const json_t *o, struct host_facts *out, struct error *err);

/* A number 0 to max of what the other host said; -EPROTO with the key: it is none. */
int facts_take_u64(const json_t *o, const char *key, uint64_t max, uint64_t *out, struct error *err);
int facts_take_unsigned(const json_t *o, const char *key, unsigned max, unsigned *out, struct error *err);

/* 0 where it has none. name must be a plain interface name. */
unsigned facts_interface_mtu(const char *name);

/*
 * How fast the file system of the folder takes O_DIRECT writes and gives them back, and how long one small
 * durable write takes: with a file without a name, at most 64 MiB and half a second each. One at a time in a folder: -EBUSY. -ENOSPC
 * when there is not plenty of room; -EOPNOTSUPP without O_DIRECT.
 */
struct disk_speed {
	uint64_t write_bytes_per_s, read_bytes_per_s;
	uint64_t sync_us;
};
int facts_disk_speed(const char *folder, struct disk_speed *out, struct error *err);

#endif
