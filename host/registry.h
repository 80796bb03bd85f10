/* SPDX-License-Identifier: Apache-2.0 */
#ifndef HOST_REGISTRY_H
#define HOST_REGISTRY_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "host/config.h"
#include "host/vmdef.h"

/*
 * The folders of the state directory (docs/design.md, "State directory") and the files in them that belong to
 * VMs. Who may do what with a VM is the record's matter, not the registry's. "rel" is a path below the state
 * directory, as vm_record.folder.
 */
#define REGISTRY_PATH_BYTES   4608
#define REGISTRY_FOLDER_BYTES 256 /* as vm_record.folder */

/* Makes vms, incoming, partial, records, moves, kept, logs and creating; empties creating (an interrupted
 * `snvm create`). */
int registry_prepare(const struct host_config *cfg, struct error *err);
int registry_path(const struct host_config *cfg, const char *rel, char out[REGISTRY_PATH_BYTES],
		  struct error *err);
/* STATE/vms/NAME */
int registry_vm_dir(const struct host_config *cfg, const char *name, char out[REGISTRY_PATH_BYTES],
		    struct error *err);
/* STATE/logs/NAME.log */
int registry_log_path(const struct host_config *cfg, const char *name, char out[REGISTRY_PATH_BYTES],
		      struct error *err);
/* "vms/NAME", "incoming/UUID-EPOCH" */
void registry_vm_rel(const char *name, char out[REGISTRY_FOLDER_BYTES]);
void registry_incoming_rel(const char *uuid, uint64_t epoch, char out[REGISTRY_FOLDER_BYTES]);

/*
 * Notes in the folder's files.json that the registry created the regular file `name` there (durable). Only
 * what is noted is ever deleted by registry_delete_moved. A name noted again gets its present inode.
 */
int registry_files_add(int dirfd, const char *name, struct error *err);
/* vm.ini of the folder. Its disk, kernel and initrd paths are relative to the folder or absolute. */
int registry_load_definition(int dirfd, const char *label, struct vm_definition *def, struct error *err);
int registry_store_definition(int dirfd, const struct vm_definition *def, struct error *err);
/*
 * Whether a VM of this host but `uuid`, running or stopped, has a disk on this block device, or in this file,
 * by whatever name: then its name is in `name`.
 */
bool registry_device_used(const struct host_config *cfg, const char *device, const char *uuid,
			  char name[VM_NAME_MAX_CHARS + 1]);

/*
 * Renames an arrival's folder to vms/NAME, durably; calling it again after it succeeded is fine. -EEXIST when
 * another VM has that place. Left-behind files of a VM that moved away go to kept/ first.
 */
int registry_publish(const struct host_config *cfg, const char *from_rel, const char *name,
		     struct error *err);
/*
 * Deletes the regular files of the folder that files.json lists with this device and inode, the VM's own
 * sockets, run/, vm.ini, files.json and the folder; never follows a link. Idempotent: after a crash, call it
 * again. *left_behind gets an array of the absolute paths that stay: everything else in the folder, and disks
 * of the definition outside it. 0, or an error after which some of the files may be gone.
 */
int registry_delete_moved(const struct host_config *cfg, const char *rel, json_t **left_behind,
			  struct error *err);
/* Renames the folder to kept/NAME-EPOCH (kept_rel), durably, without its sockets. Idempotent. */
int registry_keep(const struct host_config *cfg, const char *rel, const char *name, uint64_t epoch,
		  char kept_rel[REGISTRY_FOLDER_BYTES], struct error *err);
/* Removes a partial arrival, incoming/... only, whatever is in it. 0 when it is gone already. */
int registry_remove_incoming(const struct host_config *cfg, const char *rel, struct error *err);

/* moves/UUID.json: the last line of the VM's last move. -ENOENT when there is none. */
int registry_result_load(const struct host_config *cfg, const char *uuid, json_t **out, struct error *err);
int registry_result_store(const struct host_config *cfg, const char *uuid, json_t *result, struct error *err);
/* moves/UUID.in.json: the same of the VM's last arrival here, written by the snvmm that took it. */
int registry_arrival_load(const struct host_config *cfg, const char *uuid, json_t **out, struct error *err);
int registry_arrival_store(const struct host_config *cfg, const char *uuid, json_t *result,
			   struct error *err);
/* What a move is part of; the destination writes it into its last line ("purpose", left out for none). */
enum move_purpose { MOVE_BY_ITSELF, MOVE_EVACUATION, MOVE_RETURN };
/* "", evacuation, return */
const char *move_purpose_name(enum move_purpose purpose);
/* What is unknown, or NULL, is none. */
enum move_purpose move_purpose_parse(const char *name);

/* When it was written, in milliseconds since 1970; 0 when there is none. */
uint64_t registry_result_time_ms(const struct host_config *cfg, const char *uuid, bool arrival);
/* Calls each with every VM that has a last line, or a last arrival. */
int registry_results_each(const struct host_config *cfg,
			  void (*each)(void *opaque, const char *uuid, bool arrival), void *opaque,
			  struct error *err);

/*
 * Makes the VM of a definition: generates what is missing (uuid, MACs), copies kernel, initrd and imported
 * images into its folder, makes empty images for disks with a size, writes the record (owner, epoch 1) and
 * only then lets the folder appear. Relative kernel and initrd paths are below base_dir. imports: object DISK
 * -> absolute path. -EEXIST when the name is taken. Nothing stays after a failure.
 */
int registry_create_vm(const struct host_config *cfg, struct vm_definition *def, const char *base_dir,
		       json_t *imports, struct error *err);

/* Renames below the state directory, -EEXIST if the new name is taken; durable in both folders. */
int registry_rename(const struct host_config *cfg, const char *from_rel, const char *to_rel,
		    struct error *err);

#endif
