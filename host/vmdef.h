/* SPDX-License-Identifier: Apache-2.0 */
/* interface: the definition of a VM */
#ifndef HOST_VMDEF_H
#define HOST_VMDEF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "host/cpu.h"

#define VM_NAME_MAX_CHARS 63
#define VM_DISKS_MAX	  16
#define VM_NETS_MAX	  8
#define VM_UUID_CHARS	  36
#define VM_BACKING_MAX	  8
#define VM_PRIORITY_MAX	  1000

struct vm_disk_def {
	char id[32];
	char path[4096];
	char format[8]; /* raw | qcow2 */
	bool read_only;
	/* 0, or: in the VM's folder, create an empty image of this size (at `snvm create` only); of a block
	 * device, only so much of its beginning is the disk */
	uint64_t size_bytes;
	char backing[4096]; /* qcow2: the files below it, nearest first, separated by commas; "" = none */
};

struct vm_net_def {
	char id[32];
	char bridge[16];
	uint8_t mac[6]; /* generated (locally administered) and written back when the file has none */
	bool has_mac;
};

/* Whether the guest has a device to give memory back by. What says nothing means no, as in definitions of
 * before there was one, and older programs do not know the key; but `snvm create` takes it for yes. */
enum vm_balloon { VM_BALLOON_UNSAID, VM_BALLOON_NO, VM_BALLOON_YES };

/* The INI of DESIGN.md "Files people write". Names are [A-Za-z0-9][A-Za-z0-9_.-]*, and not a subcommand of
 * snmigrate. */
struct vm_definition {
	char name[VM_NAME_MAX_CHARS + 1];
	char uuid[VM_UUID_CHARS + 1]; /* [vm] uuid =, generated at create when absent */
	uint64_t memory_bytes;
	unsigned cpus;
	enum vm_balloon balloon;
	unsigned priority; /* of an evacuation: the higher, the earlier; 0 when not given */
	char kernel[4096], initrd[4096], cmdline[2048];
	char serial[4096]; /* socket | file:PATH | stdio */
	char cpu[4096]; /* "" (host), x86-64-v2, x86-64-v3, baseline, or, before it was read, baseline:FILE */
	struct cpu_features cpu_features; /* with baseline: the features of [cpu] */
	struct vm_disk_def disks[VM_DISKS_MAX];
	unsigned ndisks;
	struct vm_net_def nets[VM_NETS_MAX];
	unsigned nnets;
};

/* Errors name file and line. */
int vmdef_load(const char *path, struct vm_definition *def, struct error *err);
/* From text; `origin` stands for the file name in errors. */
int vmdef_parse(const char *text, size_t len, const char *origin, struct vm_definition *def,
		struct error *err);
/* INI text, free(3) it. vmdef_parse of it gives the same definition. */
char *vmdef_format(const struct vm_definition *def);
/* "host" and the like, as after `cpu =`; -EINVAL with a sentence. */
int vmdef_set_cpu(struct vm_definition *def, const char *value, struct error *err);
/* No is left unsaid, so that hosts with an older program take the VM. */
void vmdef_set_balloon(struct vm_definition *def, bool yes);
/* Of `baseline:FILE`, reads the file (relative: below base_dir) into the definition. */
int vmdef_read_baseline(struct vm_definition *def, const char *base_dir, struct error *err);
/* What the guest may see and what its host must have, by `cpu =`. False: all that the host has. */
bool vmdef_cpu_limits(const struct vm_definition *def, struct cpu_features *allowed,
		      struct cpu_features *needed);
/*
 * A definition that came from a peer: every path must be a plain file name in the VM's own folder (no '/', no
 * leading dot), serial must be socket, bridges must be allowed by `bridges` (comma list, empty = any). -EPERM
 * with the field named.
 */
int vmdef_check_foreign(const struct vm_definition *def, const char *bridges, struct error *err);
/* Whether the list (comma list, empty = any) has it. */
bool vmdef_bridge_allowed(const char *list, const char *bridge);
/*
 * Rewrites what only makes sense on this host into what vmdef_check_foreign accepts: every disk, kernel and
 * initrd becomes a plain name in the VM's folder (names that already are stay), serial becomes socket. The
 * move sends this.
 */
void vmdef_make_portable(struct vm_definition *def);
/* The files of disk->backing, in buf; how many, or -EINVAL when it is no list of 1 to VM_BACKING_MAX names. 0
 * for an empty one. */
int vmdef_backing_names(const struct vm_disk_def *disk, char buf[4096], const char *names[VM_BACKING_MAX]);
/* True for a plain name that a file of a VM may have in its folder: no '/', no leading dot, none of the
 * registry's own. */
bool vm_file_name_valid(const char *name);
/* [A-Za-z0-9][A-Za-z0-9_.-]*, at most VM_NAME_MAX_CHARS. */
bool name_chars_valid(const char *name);
/* name_chars_valid, and not the name of a subcommand. */
bool vm_name_valid(const char *name);
bool vm_uuid_valid(const char *uuid);
int vm_uuid_generate(char uuid[VM_UUID_CHARS + 1], struct error *err);

#endif
