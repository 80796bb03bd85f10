/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "base/bitmap.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "host/ask.h"
#include "vmm/control.h"
#include "vmm/move_destination.h"
#include "vmm/move_destination_hash.h"
#include "vmm/tap.h"
#include "vmm/view.h"

#define SPACE_RESERVE_BYTES  (UINT64_C(64) << 20)
#define MEMORY_RESERVE_BYTES (UINT64_C(64) << 20)
#define FILE_MAX_BYTES	     (UINT64_C(2) << 30)
#define MEMORY_MAX_BYTES     (UINT64_C(1) << 44)
#define SETTLE_WAIT_MS	     5000

static const char *need_string(json_t *o, const char *key, struct error *err)
{
	const char *s = json_string_value(json_object_get(o, key));
	if (!s)
		error_set(err, EPROTO, "hello: \"%s\" is missing or not a string", key);
	return s;
}

static int check_versions(struct arrival *a, json_t *hello, struct error *err)
{
	json_t *v = json_object_get(hello, "versions");
	json_t *lo = json_array_get(v, 0), *hi = json_array_get(v, 1);
	const char *host = json_string_value(json_object_get(hello, "host"));
	if (!json_is_integer(lo) || !json_is_integer(hi) || json_integer_value(lo) > json_integer_value(hi))
		return error_set(err, EPROTO, "hello: \"versions\" is not a range");
	if (json_integer_value(lo) > MOVE_PROTOCOL_MAX)
		return error_set(err, EPROTONOSUPPORT,
				 "%.63s speaks migration protocol %lld or newer, this host only %d: upgrade "
				 "the destination",
				 host ? host : "the source", (long long)json_integer_value(lo),
				 MOVE_PROTOCOL_MAX);
	if (json_integer_value(hi) < MOVE_PROTOCOL_MIN)
		return error_set(err, EPROTONOSUPPORT,
				 "%.63s speaks migration protocol %lld at most, this host needs %d: upgrade "
				 "the source",
				 host ? host : "the source", (long long)json_integer_value(hi),
				 MOVE_PROTOCOL_MIN);
	json_int_t highest = json_integer_value(hi);
	a->version = highest < MOVE_PROTOCOL_MAX ? (unsigned)highest : MOVE_PROTOCOL_MAX;
	return 0;
}

/* From version 2 on: the seed of all hashes, and the size of each disk's chunks. */
static int read_hash_options(struct arrival *a, json_t *hello, struct error *err)
{
	if (a->version < 2)
		return 0;
	const char *seed = need_string(hello, "hash_seed", err);
	if (!seed)
		return -EPROTO;
	if (strlen(seed) != 16 || strspn(seed, "0123456789abcdef") != 16)
		return error_set(err, EPROTO, "hello: \"hash_seed\" is not 16 hexadecimal digits");
	a->hash_seed = strtoull(seed, NULL, 16);
	for (unsigned i = 0; i < a->vm->def.ndisks; i++) {
		uint64_t chunk;
		json_t *disk = json_array_get(json_object_get(hello, "disks"), i);
		int rc = move_need_u64(disk, "chunk_bytes", UINT64_C(256) << 20, &chunk, err);
		if (rc)
			return error_prefix(err, "disk %s", a->vm->def.disks[i].id);
		if (chunk < MOVE_CHUNK_BYTES || (chunk & (chunk - 1)) ||
		    a->shape[i].virtual_bytes / chunk >= MOVE_CHUNKS_MAX)
			return error_set(err, EPROTO, "hello: disk %s: chunks of %" PRIu64 " bytes",
					 a->vm->def.disks[i].id, chunk);
		a->chunk_bytes[i] = (uint32_t)chunk;
	}
	return 0;
}

static int read_files(struct arrival *a, json_t *hello, struct error *err)
{
	json_t *files = json_object_get(hello, "files");
	static const char *const allowed[] = {"kernel", "initrd"};
	if (!json_is_array(files) || json_array_size(files) > ARRIVAL_FILES_MAX)
		return error_set(err, EPROTO, "hello: \"files\" is not a list of at most %d",
				 ARRIVAL_FILES_MAX);
	for (size_t i = 0; i < json_array_size(files); i++) {
		json_t *o = json_array_get(files, i);
		struct arrival_file *f = &a->files[i];
		const char *name = need_string(o, "name", err);
		if (!name)
			return -EPROTO;
		if (strcmp(name, allowed[0]) && strcmp(name, allowed[1]))
			return error_set(err, EPROTO, "hello: file \"%.32s\" is none that travels", name);
		if (i && !strcmp(name, a->files[0].name))
			return error_set(err, EPROTO, "hello: file \"%s\" is there twice", name);
		snprintf(f->name, sizeof f->name, "%s", name);
		int rc = move_need_u64(o, "size", FILE_MAX_BYTES, &f->size, err);
		if (rc)
			return error_prefix(err, "file %s", name);
		f->fd = -1;
		a->nfiles++;
	}
	return 0;
}

static int read_disks(struct arrival *a, json_t *hello, struct error *err)
{
	struct vm_definition *def = &a->vm->def;
	json_t *disks = json_object_get(hello, "disks");
	if (!json_is_array(disks) || json_array_size(disks) != def->ndisks)
		return error_set(err, EPROTO, "hello: \"disks\" does not match the definition");
	for (unsigned i = 0; i < def->ndisks; i++) {
		json_t *o = json_array_get(disks, i);
		struct block_image_info *s = &a->shape[i];
		const char *id = need_string(o, "id", err);
		if (!id)
			return -EPROTO;
		int rc = move_shape_parse(o, s, err);
		if (rc)
			return error_prefix(err, "disk %.32s", id);
		if (strcmp(id, def->disks[i].id) ||
		    strcmp(block_format_name(s->format), def->disks[i].format))
			return error_set(err, EPROTO, "hello: disk %u does not match the definition", i);
		rc = arrival_read_disk(a, i, o, err);
		if (rc)
			return error_prefix(err, "disk %s", id);
	}
	return 0;
}

static int read_regions(struct arrival *a, json_t *hello, struct error *err)
{
	a->nregions = (a->vm->def.memory_bytes + MEM_REGION_BYTES - 1) / MEM_REGION_BYTES;
	a->regions = bitmap_alloc(a->nregions);
	if (!a->regions)
		return error_errno(err, ENOMEM, "hello");
	json_t *runs = json_object_get(hello, "regions");
	for (size_t i = 0; i < json_array_size(runs); i++) {
		json_t *r = json_array_get(runs, i), *s = json_array_get(r, 0), *n = json_array_get(r, 1);
		if (!json_is_integer(s) || !json_is_integer(n) || json_integer_value(s) < 0 ||
		    json_integer_value(n) < 0 || (uint64_t)json_integer_value(s) > a->nregions ||
		    (uint64_t)json_integer_value(n) > a->nregions - (uint64_t)json_integer_value(s))
			return error_set(err, EPROTO, "hello: a memory region outside guest memory");
		bitmap_set_range(a->regions, (size_t)json_integer_value(s), (size_t)json_integer_value(n));
	}
	return 0;
}

int arrival_read_hello(struct arrival *a, json_t *hello, struct error *err)
{
	struct vm *vm = a->vm;
	int rc = check_versions(a, hello, err);
	if (rc)
		return rc;
	const char *uuid = need_string(hello, "uuid", err), *name = need_string(hello, "name", err);
	const char *text = need_string(hello, "definition", err);
	if (!uuid || !name || !text)
		return -EPROTO;
	char origin[128];
	snprintf(origin, sizeof origin, "definition from %s", a->peer);
	rc = vmdef_parse(text, strlen(text), origin, &vm->def, err);
	if (!rc)
		rc = vmdef_check_foreign(&vm->def, vm->cfg->bridges, err);
	if (rc)
		return rc;
	if (strcmp(vm->def.uuid, uuid) || strcmp(vm->def.name, name) || !vm_uuid_valid(uuid) ||
	    !vm_name_valid(name))
		return error_set(err, EPROTO, "hello: name and uuid do not match the definition");
	if (vm->def.memory_bytes > MEMORY_MAX_BYTES || vm->def.memory_bytes % MEM_REGION_BYTES)
		return error_set(err, EPROTO, "hello: memory of %" PRIu64 " bytes", vm->def.memory_bytes);
	vm->cold = json_is_true(json_object_get(hello, "cold"));
	if (vm->cold && a->version < MOVE_PROTOCOL_COLD)
		return error_set(err, EPROTO, "hello: \"cold\" in protocol %u", a->version);
	uint64_t streams;
	rc = move_need_u64(hello, "streams", MEM_STREAMS_MAX, &streams, err);
	if (!rc && (streams == 0) != vm->cold)
		rc = error_set(err, EPROTO, "hello: %s memory stream",
			       vm->cold ? "a stopped VM with a" : "no");
	a->nstreams = (unsigned)streams;
	a->keep_s = vm->cfg->keep_partial_s;
	if (json_object_get(hello, "keep_partial_s") && !rc)
		rc = move_need_u64(hello, "keep_partial_s", HOST_KEEP_PARTIAL_MAX_S, &a->keep_s, err);
	if (a->keep_s > vm->cfg->keep_partial_s)
		a->keep_s = vm->cfg->keep_partial_s;
	a->purpose = move_purpose_parse(json_string_value(json_object_get(hello, "purpose")));
	a->suspend = json_is_true(json_object_get(hello, "suspend"));
	a->no_tls = json_is_true(json_object_get(hello, "no_tls"));
	a->verify = json_is_true(json_object_get(hello, "verify"));
	a->deltas = json_is_true(json_object_get(hello, "memory_deltas"));
	if (!rc && a->no_tls && !vm->cfg->allow_no_tls)
		rc = error_set(err, EPERM,
			       "unencrypted data channels are not allowed by [limits] allow-no-tls here");
	a->cpu = json_object_get(hello, "cpu");
	if (!rc && !vm->cold && !json_is_object(a->cpu))
		rc = error_set(err, EPROTO, "hello: \"cpu\" is missing");
	json_incref(a->cpu);
	if (!rc)
		rc = read_files(a, hello, err);
	if (!rc)
		rc = read_disks(a, hello, err);
	if (!rc)
		rc = read_hash_options(a, hello, err);
	if (!rc)
		rc = read_regions(a, hello, err);
	return rc;
}

static uint64_t memory_available(void)
{
	CLEANUP_FILE FILE *f = fopen("/proc/meminfo", "re");
	char line[128];
	unsigned long long kib;
	while (f && fgets(line, sizeof line, f))
		if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1)
			return (uint64_t)kib << 10;
	return UINT64_MAX;
}

/* What it takes of the host's memory while it arrives. */
static uint64_t memory_taken(const struct arrival *a)
{
	return a->vm->cold ? 0 : a->vm->def.memory_bytes;
}

static int check_memory(struct arrival *a, struct error *err)
{
	struct vm *vm = a->vm;
	if (vm->cold)
		return 0;
	uint64_t memory = memory_available(), need = vm->def.memory_bytes + MEMORY_RESERVE_BYTES;
	if (memory < need)
		return error_set(err, ENOMEM,
				 "not enough memory: %s needs %" PRIu64 " MiB, %" PRIu64 " MiB are available",
				 vm->def.name, need >> 20, memory >> 20);
	return 0;
}

static int check_space(struct arrival *a, struct error *err)
{
	struct vm *vm = a->vm;
	struct statvfs fs;
	uint64_t space = SPACE_RESERVE_BYTES, there = arrival_partial_bytes(a);
	for (unsigned i = 0; i < vm->def.ndisks; i++) {
		if (a->disks[i].mode == MOVE_DISK_DEVICE || arrival_is_shared(a, i))
			continue;
		space += a->shape[i].allocated_bytes <
					 a->shape[i].virtual_bytes + (a->shape[i].virtual_bytes >> 3)
				 ? a->shape[i].allocated_bytes
				 : a->shape[i].virtual_bytes;
	}
	space += arrival_layers_bytes(a);
	for (unsigned i = 0; i < a->nfiles; i++)
		space += a->files[i].size;
	space -= there < space - SPACE_RESERVE_BYTES ? there : space - SPACE_RESERVE_BYTES;
	partial_make_room(vm->cfg, vm->def.uuid, space);
	if (statvfs(vm->cfg->state_dir, &fs))
		return error_errno(err, errno, "%s", vm->cfg->state_dir);
	uint64_t have = (uint64_t)fs.f_bavail * fs.f_frsize;
	if (have < space)
		return error_set(err, ENOSPC,
				 "not enough disk space in %s: %s needs %" PRIu64 " MiB, %" PRIu64
				 " MiB are free",
				 vm->cfg->state_dir, vm->def.name, space >> 20, have >> 20);
	return 0;
}

/* Every reason at once: whoever has to see to them should not meet them one by one. */
static int check_machine(struct arrival *a, struct error *err)
{
	struct vm *vm = a->vm;
	char all[ERROR_MESSAGE_BYTES] = "";
	size_t n = 0;
	int first = 0;
	for (unsigned i = 0; i <= vm->def.nnets && n < sizeof all; i++) {
		struct error why = ERROR_INIT;
		int rc = i < vm->def.nnets ? tap_bridge_check(vm->def.nets[i].bridge, &why)
			 : vm->cold	   ? 0 /* it is given this host's when it is started */
					   : machine_cpu_check(a->cpu, &why);
		if (rc && i < vm->def.nnets)
			error_prefix(&why, "net %s", vm->def.nets[i].id);
		if (rc)
			n += (size_t)snprintf(all + n, sizeof all - n, "%s%s", n ? "; " : "", why.message);
		first = first ? first : rc;
	}
	if (!first)
		return 0;
	json_t *more = arrival_refusals(a, vm->def.uuid, vm->def.name, memory_taken(a));
	for (size_t i = 0; i < json_array_size(more) && n < sizeof all; i++)
		n += (size_t)snprintf(all + n, sizeof all - n, "; %s",
				      json_string_value(json_array_get(more, i)));
	json_decref(more);
	return error_set(err, first, "%s", all);
}

/* prepared: the arrival is accepted, before its folder is made. From here an answer to the source binds this
 * host. */
static int write_prepared(struct arrival *a, struct record *r, const struct vm_record *old, struct error *err)
{
	struct vm *vm = a->vm;
	struct vm_record rec = {.state = HANDOVER_PREPARED, .epoch = a->epoch};
	snprintf(rec.uuid, sizeof rec.uuid, "%s", vm->def.uuid);
	snprintf(rec.name, sizeof rec.name, "%s", vm->def.name);
	snprintf(rec.peer, sizeof rec.peer, "%s", a->peer);
	snprintf(rec.peer_address, sizeof rec.peer_address, "%s", a->peer_address);
	registry_incoming_rel(vm->def.uuid, a->epoch, rec.folder);
	/* Suspended too: a paused guest whose VMM dies has lost its memory, which is a crash. */
	rec.flags = vm->cold ? RECORD_COLD : RECORD_POWERED_ON;
	int rc;
	if (r)
		rc = record_compare_and_set(r, old->state, old->epoch, &rec, NULL, err);
	else
		rc = record_create(vm->cfg->state_dir, &rec, &r, err);
	if (rc)
		return rc;
	SCOPE_LOCK(&vm->lock);
	vm->record = r;
	return 0;
}

/* Takes this VM's record, once it is settled so far that an arrival may begin, and writes prepared. */
static int take_record(struct arrival *a, json_t *hello, struct error *err)
{
	struct vm *vm = a->vm;
	json_t *report = json_object_get(hello, "report");
	uint64_t deadline = clock_now_ms() + SETTLE_WAIT_MS;
	for (;;) {
		struct record *r = NULL;
		struct vm_record rec;
		int rc = record_open(vm->cfg->state_dir, vm->def.uuid, &r, err);
		if (rc == -ENOENT) {
			rc = write_prepared(a, NULL, NULL, err);
		} else if (!rc) {
			rc = record_lock(r, 0, err);
			if (!rc)
				rc = record_load(r, &rec, err);
			if (!rc)
				rc = handover_may_arrive(&rec, a->epoch, err);
			if (!rc)
				rc = write_prepared(a, r, &rec, err);
			if (rc)
				record_close(r);
		}
		if (!rc)
			return 0;
		bool later = rc == -EAGAIN || rc == -EBUSY || rc == -ENOENT;
		if (!later || clock_now_ms() > deadline)
			return rc;
		if (rc == -EAGAIN && report) {
			json_t *answer = NULL;
			struct error e = ERROR_INIT;
			if (ask_answer_local(vm->cfg, a->peer, report, &answer, &e))
				log_debug("settling before the arrival: %s", e.message);
			json_decref(answer);
		}
		clock_sleep_ms(100);
	}
}

/* The daemon opens it, which keeps it short; one of an older version has none to give. */
static void take_log(struct arrival *a, int fd)
{
	if (fd < 0)
		return;
	log_info("VM %s arrives from %s: what follows is in its own log", a->vm->def.name, a->peer);
	dup2(fd, STDOUT_FILENO);
	dup2(fd, STDERR_FILENO);
	close(fd);
	log_info("arrives from %s, epoch %" PRIu64, a->peer, a->epoch);
}

static int ask_admission(struct arrival *a, struct error *err)
{
	struct vm *vm = a->vm;
	json_t *q = json_pack("{s:s, s:s, s:s, s:I, s:s, s:I}", "cmd", "incoming", "uuid", vm->def.uuid,
			      "name", vm->def.name, "epoch", (json_int_t)a->epoch, "peer", a->peer,
			      "memory_bytes", (json_int_t)memory_taken(a));
	int log;
	int rc = jsonl_call_fd(a->daemon, q, NULL, &log, NULL, DAEMON_ANSWER_MS, err);
	json_decref(q);
	if (!rc)
		a->admitted = true;
	take_log(a, log);
	return rc;
}

static int make_folder(struct arrival *a, struct error *err)
{
	struct vm *vm = a->vm;
	char rel[REGISTRY_FOLDER_BYTES], path[REGISTRY_PATH_BYTES];
	registry_incoming_rel(vm->def.uuid, a->epoch, rel);
	int rc = registry_path(vm->cfg, rel, path, err);
	if (rc)
		return rc;
	rc = arrival_take_partial(a, rel, err);
	if (rc && rc != -ENOENT)
		return rc;
	if (rc && mkdir(path, 0700))
		return error_errno(err, errno, "%s", path);
	snprintf(a->rel, sizeof a->rel, "%s", rel);
	snprintf(vm->dir, sizeof vm->dir, "%s", path);
	vm->dirfd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (vm->dirfd < 0)
		return error_errno(err, errno, "%s", path);
	rc = view_restrict(vm, err);
	if (rc)
		return rc;
	vm_set_state(vm, VM_INCOMING, NULL);
	return control_start(vm, err);
}

static bool any_resumed(const struct arrival *a)
{
	for (unsigned i = 0; i < a->vm->def.ndisks; i++)
		if (a->resumed[i])
			return true;
	return false;
}

int arrival_assemble(struct arrival *a, struct error *err)
{
	struct vm *vm = a->vm;
	int rc;
	/* A read-only disk of the guest is still written by the copy. */
	bool read_only[VM_DISKS_MAX];
	for (unsigned i = 0; i < vm->def.ndisks; i++) {
		read_only[i] = vm->def.disks[i].read_only;
		vm->def.disks[i].read_only &= arrival_is_shared(a, i);
	}
	rc = vm_open_disks(vm, err);
	for (unsigned i = 0; i < vm->def.ndisks; i++) {
		vm->def.disks[i].read_only = read_only[i];
		if (!rc && vm->disks[i].local->size_bytes != a->shape[i].virtual_bytes)
			rc = error_set(err, EIO, "disk %s: %" PRIu64 " bytes were made for %" PRIu64,
				       vm->def.disks[i].id, vm->disks[i].local->size_bytes,
				       a->shape[i].virtual_bytes);
	}
	if (!rc)
		rc = arrival_check_shared(a, err);
	if (!rc && a->version >= 2)
		rc = arrival_hash_start(a, err);
	else if (!rc)
		log_warn("%s speaks migration protocol %u: the disks' content will not be proved", a->peer,
			 a->version);
	if (!rc)
		rc = registry_store_definition(vm->dirfd, &vm->def, err);
	if (!rc && !vm->cold)
		rc = vm_create_machine(vm, a->cpu, err);
	if (!rc && !vm->cold)
		rc = arrival_postcopy_memory(a, err);
	if (!rc && !vm->cold)
		rc = vm_load_kernel(vm, false, err);
	SCOPE_LOCK(&a->lock);
	a->assembled = !rc;
	return rc;
}

int arrival_build(struct arrival *a, json_t *hello, struct error *err)
{
	struct vm *vm = a->vm;
	int rc = check_machine(a, err);
	if (!rc && !vm->cold)
		arrival_postcopy_open(a, hello);
	arrival_supersede(a, hello);
	if (!rc)
		rc = ask_admission(a, err);
	/* With an earlier attempt gone, its memory is free and its disks are counted. */
	if (!rc)
		rc = check_memory(a, err);
	if (!rc)
		rc = check_space(a, err);
	if (!rc)
		rc = take_record(a, hello, err);
	if (!rc)
		rc = make_folder(a, err);
	for (unsigned i = 0; !rc && i < a->nfiles; i++) {
		struct arrival_file *f = &a->files[i];
		f->fd = openat(vm->dirfd, f->name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW,
			       0600);
		rc = f->fd < 0 ? error_errno(err, errno, "%s/%s", vm->dir, f->name)
			       : registry_files_add(vm->dirfd, f->name, err);
	}
	arrival_check_resumed(a);
	if (!rc)
		rc = arrival_make_images(a, err);
	/* The note of an earlier attempt speaks of other images. */
	if (!rc && any_resumed(a))
		rc = arrival_note_partial(a, err);
	if (!rc && !a->nlayers)
		rc = arrival_assemble(a, err);
	return rc;
}
