/* SPDX-License-Identifier: Apache-2.0 */
#ifndef HOST_PARTIAL_H
#define HOST_PARTIAL_H

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "host/config.h"
#include "host/vmdef.h"

/*
 * The disk images of an arrival that ended before it owned its VM, kept in STATE/partial/UUID for the next
 * attempt of that VM from that host. They are no copy of anything: no definition, no record names them,
 * nothing can start them, and whoever takes them up compares their content before it counts (docs/design.md,
 * "Resume").
 *
 * The note partial.json stands in the arrival's own folder from the start of its copy on, so that whoever
 * finds the folder of a dead arrival (the daemon) knows what it may keep.
 */
#define PARTIAL_NOTE "partial.json"
/* With less room than this no partial is kept: a full disk must not stay full for its sake. */
#define PARTIAL_ROOM_LEAST_BYTES (UINT64_C(64) << 20)

struct partial_disk {
	char file[208]; /* in the folder */
	char format[8];
	uint64_t virtual_bytes;
	uint32_t cluster_bytes;
	char compat[8];
	bool lazy_refcounts, extended_l2;
};

struct partial {
	char uuid[VM_UUID_CHARS + 1];
	char name[VM_NAME_MAX_CHARS + 1];
	char peer[HOST_NAME_MAX_CHARS + 1]; /* whose certificate brought it */
	uint64_t keep_s;		    /* after the arrival ended; 0: not at all */
	int64_t since_s;		    /* when it ended, CLOCK_REALTIME; 0: it goes on */
	unsigned ndisks;
	struct partial_disk disks[VM_DISKS_MAX];
	uint64_t allocated_bytes; /* of the images; set by load and each */
};

/* Writes the note, durably, into an arrival's folder. */
int partial_note(int dirfd, const struct partial *p, struct error *err);
/* Takes everything out of the folder but p's images and the note. */
int partial_prune(const char *folder, const struct partial *p, struct error *err);
/* The folder has become a VM's: takes the note out. 0 also when there is none. */
int partial_unnote(const char *folder, struct error *err);
/*
 * The end of an arrival that is abandoned (durably, if it had a record): moves its images to partial/UUID
 * when the note allows it and there is room, otherwise removes the folder with all that is in it. Idempotent.
 * rel is "incoming/...". *kept may be NULL.
 */
int partial_end_arrival(const struct host_config *cfg, const char *rel, bool *kept, struct error *err);

/* -ENOENT when there is none; -EUCLEAN when its note cannot be read. */
int partial_load(const struct host_config *cfg, const char *uuid, struct partial *out, struct error *err);
/* Renames partial/UUID to rel, which must not exist. The note comes with it. */
int partial_take(const struct host_config *cfg, const char *uuid, const char *rel, struct error *err);
/* 0 when it is gone already. */
int partial_remove(const struct host_config *cfg, const char *uuid, struct error *err);
/* Calls each() with every readable partial; a non-zero return stops and is returned. */
int partial_each(const struct host_config *cfg, int (*each)(void *opaque, const struct partial *p),
		 void *opaque);
bool partial_expired(const struct partial *p, int64_t now_s);
/* Removes the expired, the unreadable, and what an interrupted removal left. Returns how many went. */
unsigned partial_sweep(const struct host_config *cfg);
/* Removes the oldest partials but that of `uuid` until the state directory has so many bytes free, or none is
 * left. */
void partial_make_room(const struct host_config *cfg, const char *uuid, uint64_t bytes);

#endif
