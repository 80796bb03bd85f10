/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/move_source.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/bitmap.h"
#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/fault.h"
#include "host/ask.h"
#include "host/trust.h"
#include "mirror/mirror.h"

/* A destination may open big images and 64 vCPUs before it answers; it beats meanwhile. */
#define HELLO_TIMEOUT_MS    120000
#define HASH_BYTES_PER_MS   20000 /* at the least, of each file that may be the right one */
#define FILE_CHUNK_BYTES    (1u << 20)
#define DOWNTIME_DEFAULT_MS 50
#define ROUNDS_DEFAULT	    30

static int get_uint(json_t *o, const char *key, unsigned max, unsigned *out, struct error *err)
{
	json_t *v = json_object_get(o, key);
	if (!v || json_is_null(v))
		return 0;
	if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > max)
		return error_set(err, EINVAL, "option %s: a whole number from 0 to %u is needed", key, max);
	*out = (unsigned)json_integer_value(v);
	return 0;
}

int source_parse_bandwidth(json_t *o, uint64_t *out, struct error *err)
{
	json_t *v = json_object_get(o, "bandwidth_bytes_per_s");
	if (!v || json_is_null(v))
		return 0;
	json_int_t n = json_integer_value(v);
	if (!json_is_integer(v) || n < 0 || (n && (uint64_t)n < MOVE_BANDWIDTH_MIN))
		return error_set(err, EINVAL,
				 "bandwidth: at least %llu bytes a second, or 0 for no limit, are needed",
				 (unsigned long long)MOVE_BANDWIDTH_MIN);
	*out = (uint64_t)n;
	return 0;
}

/* "mirror" and "mirror_buffer_bytes" of o. */
static int parse_mirror(json_t *o, struct move_options *opt, struct error *err)
{
	json_t *mode = json_object_get(o, "mirror"), *buffer = json_object_get(o, "mirror_buffer_bytes");
	if (mode && !json_is_null(mode)) {
		const char *word = json_is_string(mode) ? json_string_value(mode) : "";
		opt->mirror_buffered = !strcmp(word, "buffered");
		if (!opt->mirror_buffered && strcmp(word, "sync"))
			return error_set(err, EINVAL, "mirror: sync or buffered is needed");
	}
	if (buffer && !json_is_null(buffer)) {
		json_int_t n = json_integer_value(buffer);
		if (!json_is_integer(buffer) || n < (json_int_t)MIRROR_BUFFER_MIN_BYTES ||
		    n > (json_int_t)MIRROR_BUFFER_MAX_BYTES)
			return error_set(err, EINVAL, "mirror-buffer: from %llu to %llu bytes are possible",
					 (unsigned long long)MIRROR_BUFFER_MIN_BYTES,
					 (unsigned long long)MIRROR_BUFFER_MAX_BYTES);
		opt->mirror_buffer_bytes = (uint64_t)n;
	}
	return 0;
}

static int parse_backing(json_t *o, enum move_backing_choice *out, struct error *err)
{
	static const char *const names[] = {[MOVE_BACKING_FLATTEN] = "flatten",
					    [MOVE_BACKING_CHAIN] = "chain",
					    [MOVE_BACKING_REUSE] = "reuse"};
	json_t *v = json_object_get(o, "backing");
	const char *s = json_string_value(v);
	if (!v || json_is_null(v))
		return 0;
	for (unsigned i = MOVE_BACKING_FLATTEN; s && i < ARRAY_SIZE(names); i++) {
		if (!strcmp(s, names[i])) {
			*out = (enum move_backing_choice)i;
			return 0;
		}
	}
	return error_set(err, EINVAL, "option backing: flatten, chain or reuse is needed");
}

static int parse_to_disk(json_t *o, struct move_options *opt, struct error *err)
{
	const char *id;
	json_t *v;
	json_object_foreach(json_object_get(o, "to_disk"), id, v)
	{
		const char *path = json_string_value(v);
		struct move_to_disk *t = &opt->to_disk[opt->nto_disk];
		if (opt->nto_disk == VM_DISKS_MAX || strlen(id) >= sizeof t->id || !path ||
		    strlen(path) >= sizeof t->path || path[0] != '/')
			return error_set(err, EINVAL,
					 "--to-disk %.32s: the absolute path of a block device is needed",
					 id);
		strcpy(t->id, id);
		strcpy(t->path, path);
		opt->nto_disk++;
	}
	return 0;
}

#define ZSTD_LEVEL_MAX 19

/* "compress": auto, off or zstd, and "zstd_level". */
static int parse_compress(json_t *o, struct move_options *opt, struct error *err)
{
	static const char *const modes[] = {
		[MEM_COMPRESS_OFF] = "off", [MEM_COMPRESS_AUTO] = "auto", [MEM_COMPRESS_ALWAYS] = "zstd"};
	json_t *v = json_object_get(o, "compress");
	unsigned mode = MEM_COMPRESS_AUTO, level = 1;
	if (v && !json_is_null(v)) {
		const char *name = json_string_value(v);
		for (mode = 0; mode < ARRAY_SIZE(modes) && (!name || strcmp(name, modes[mode])); mode++)
			;
		if (mode == ARRAY_SIZE(modes))
			return error_set(err, EINVAL, "option compress: auto, off or zstd is needed");
	}
	int rc = get_uint(o, "zstd_level", ZSTD_LEVEL_MAX, &level, err);
	if (!rc && !level)
		rc = error_set(err, EINVAL, "option zstd_level: a whole number from 1 to %u is needed",
			       ZSTD_LEVEL_MAX);
	opt->compress = mode;
	opt->zstd_level = (int)level;
	return rc;
}

int move_options_parse(json_t *request, struct move_options *opt, struct error *err)
{
	memset(opt, 0, sizeof *opt);
	const char *address = json_string_value(json_object_get(request, "address"));
	const char *peer = json_string_value(json_object_get(request, "peer"));
	json_t *epoch = json_object_get(request, "epoch");
	json_t *o = json_object_get(request, "options");
	if (!address || !peer || strlen(address) >= sizeof opt->address || strlen(peer) >= sizeof opt->peer)
		return error_set(err, EINVAL, "migrate: address and peer are needed");
	if (!json_is_integer(epoch) || json_integer_value(epoch) <= 0)
		return error_set(err, EINVAL, "migrate: an epoch is needed");
	strcpy(opt->address, address);
	strcpy(opt->peer, peer);
	opt->epoch = (uint64_t)json_integer_value(epoch);
	opt->max_downtime_ms = DOWNTIME_DEFAULT_MS;
	opt->max_rounds = ROUNDS_DEFAULT;
	long ncpu = sysconf(_SC_NPROCESSORS_ONLN);
	opt->streams = ncpu < 1 ? 1 : ncpu > 4 ? 4 : (unsigned)ncpu;
	opt->retry_for_s = opt->keep_partial_s = MOVE_AS_CONFIGURED;
	int rc = get_uint(o, "retry_for_s", HOST_RETRY_FOR_MAX_S, &opt->retry_for_s, err);
	if (!rc)
		rc = get_uint(o, "keep_partial_s", HOST_KEEP_PARTIAL_MAX_S, &opt->keep_partial_s, err);
	if (!rc)
		rc = get_uint(o, "max_downtime_ms", 600000, &opt->max_downtime_ms, err);
	if (!rc)
		rc = get_uint(o, "streams", MEM_STREAMS_MAX, &opt->streams, err);
	if (!rc)
		rc = get_uint(o, "max_rounds", 10000, &opt->max_rounds, err);
	if (!rc)
		rc = get_uint(o, "max_time_ms", 86400000, &opt->max_time_ms, err);
	if (!rc)
		rc = source_parse_pace(o, opt, err);
	if (!rc)
		rc = source_parse_bandwidth(o, &opt->bandwidth_bytes_per_s, err);
	if (!rc)
		rc = parse_mirror(o, opt, err);
	if (!rc)
		rc = parse_backing(o, &opt->backing, err);
	if (!rc)
		rc = parse_to_disk(o, opt, err);
	if (!rc)
		rc = parse_compress(o, opt, err);
	if (!rc)
		rc = source_delta_parse(o, opt, err);
	if (!rc)
		rc = source_postcopy_parse(o, opt, err);
	if (!rc)
		rc = source_quick_parse(o, opt, err);
	if (rc)
		return rc;
	if (!opt->streams)
		opt->streams = 1;
	opt->with_storage = json_is_true(json_object_get(o, "with_storage"));
	opt->keep_source = json_is_true(json_object_get(o, "keep_source"));
	opt->rehearse = json_is_true(json_object_get(o, "rehearse"));
	opt->suspend = json_is_true(json_object_get(o, "suspend"));
	opt->no_tls = json_is_true(json_object_get(o, "no_tls"));
	opt->purpose = move_purpose_parse(json_string_value(json_object_get(o, "purpose")));
	return 0;
}

/* --- hello --- */

unsigned source_protocol(const struct move *mv)
{
	bool shared = false;
	for (unsigned i = 0; i < mv->vm->def.ndisks; i++)
		shared |= source_is_shared(mv, i);
	return mv->vm->cold || shared ? MOVE_PROTOCOL_COLD : MOVE_PROTOCOL_MOST;
}

static json_t *populated_regions(struct move *mv)
{
	struct mem_space space = machine_memory_space(mv->vm->machine);
	uint64_t n = (space.npages * MEM_PAGE_BYTES + MEM_REGION_BYTES - 1) / MEM_REGION_BYTES;
	CLEANUP_FREE uint64_t *map = bitmap_alloc(n);
	json_t *runs = json_array();
	if (!map || mem_populated_regions(&space, map, NULL))
		return runs;
	for (size_t at = bitmap_next_set(map, n, 0); at < n;) {
		size_t end = bitmap_next_clear(map, n, at);
		json_array_append_new(runs, json_pack("[I, I]", (json_int_t)at, (json_int_t)(end - at)));
		at = bitmap_next_set(map, n, end);
	}
	return runs;
}

struct travel_file {
	const char *name;
	char path[8400];
	uint64_t size;
};

/* The definition as the destination is to have it: every path a plain name in the VM's folder. */
static char *foreign_definition(struct move *mv)
{
	struct vm *vm = mv->vm;
	CLEANUP_FREE struct vm_definition *def = malloc(sizeof *def);
	if (!def)
		return NULL;
	*def = vm->def;
	snprintf(def->kernel, sizeof def->kernel, "kernel");
	if (def->initrd[0])
		snprintf(def->initrd, sizeof def->initrd, "initrd");
	snprintf(def->serial, sizeof def->serial, "socket");
	for (unsigned i = 0; i < def->ndisks; i++) {
		struct vm_disk_def *d = &def->disks[i];
		const struct source_disk *to = &mv->disks[i];
		const char *id = vm->def.disks[i].id, *format = vm->def.disks[i].format;
		if (to->mode == MOVE_DISK_DEVICE)
			format = block_format_name(BLOCK_FORMAT_RAW);
		snprintf(d->format, sizeof d->format, "%s", format);
		snprintf(d->path, sizeof d->path, "%s.%s", id, format);
		d->size_bytes = 0;
		d->backing[0] = '\0';
		size_t at = 0;
		for (unsigned k = 0; to->mode == MOVE_DISK_CHAIN && k < to->below.nlayers; k++)
			at += (size_t)snprintf(d->backing + at, sizeof d->backing - at, "%s%s.below%u.%s",
					       k ? ", " : "", id, k + 1,
					       block_format_name(to->below.layers[k].format));
	}
	return vmdef_format(def);
}

static int travel_files(struct vm *vm, struct travel_file files[2], unsigned *n, struct error *err)
{
	const char *paths[2] = {vm->def.kernel, vm->def.initrd};
	static const char *const names[2] = {"kernel", "initrd"};
	*n = 0;
	for (unsigned i = 0; i < 2; i++) {
		if (!paths[i][0])
			continue;
		struct travel_file *f = &files[*n];
		f->name = names[i];
		int rc = vm_resolve_path(vm, paths[i], f->path, sizeof f->path, err);
		if (rc)
			return rc;
		struct stat st;
		if (stat(f->path, &st))
			return error_errno(err, errno, "%s", f->path);
		f->size = (uint64_t)st.st_size;
		(*n)++;
	}
	return 0;
}

static json_t *make_hello(struct move *mv, struct travel_file *files, unsigned nfiles, struct error *err)
{
	struct vm *vm = mv->vm;
	CLEANUP_FREE char *def = foreign_definition(mv);
	json_t *cpu = vm->cold ? json_null() : machine_cpu_describe(vm->machine, err);
	if (!def || !cpu) {
		if (cpu)
			error_errno(err, ENOMEM, "hello");
		json_decref(cpu);
		return NULL;
	}
	json_t *fs = json_array(), *disks = json_array();
	for (unsigned i = 0; i < nfiles; i++)
		json_array_append_new(fs, json_pack("{s:s, s:I}", "name", files[i].name, "size",
						    (json_int_t)files[i].size));
	for (unsigned i = 0; i < vm->def.ndisks; i++) {
		const struct block_image_info *in = &vm->disks[i].info;
		struct block_image_info now;
		/* what is allocated has changed since the VM started */
		char path[8400];
		vm_resolve_path(vm, vm->def.disks[i].path, path, sizeof path, NULL);
		struct stat st;
		now = *in;
		if (!stat(path, &st) && S_ISREG(st.st_mode))
			now.allocated_bytes = (uint64_t)st.st_blocks * 512;
		/* an image of its own will hold what is below as well */
		if (mv->disks[i].mode == MOVE_DISK_FILE)
			now.allocated_bytes += mv->disks[i].below_allocated_bytes;
		vm->disks[i].info.allocated_bytes = now.allocated_bytes;
		now.virtual_bytes = vm->disks[i].local->size_bytes;
		if (mv->disks[i].mode == MOVE_DISK_DEVICE)
			now.format = BLOCK_FORMAT_RAW;
		json_t *o = move_shape_to_json(&now);
		json_object_set_new(o, "id", json_string(vm->def.disks[i].id));
		json_object_set_new(o, "read_only", json_boolean(vm->def.disks[i].read_only));
		json_object_set_new(
			o, "chunk_bytes",
			json_integer((json_int_t)source_chunk_bytes(vm->disks[i].local->size_bytes)));
		source_disk_describe(mv, i, o);
		json_array_append_new(disks, o);
	}
	char seed[17];
	snprintf(seed, sizeof seed, "%016llx", (unsigned long long)source_proof_seed(mv));
	json_t *hello = json_pack(
		"{s:[i,i], s:s, s:s, s:s, s:s, s:s, s:s, s:o, s:o, s:o, s:I, s:i, s:o, s:b, s:b}", "versions",
		(int)source_protocol(mv), (int)source_protocol(mv), "hash_seed", seed, "program", SNM_VERSION,
		"host", vm->cfg->name, "uuid", vm->def.uuid, "name", vm->def.name, "definition", def, "files",
		fs, "disks", disks, "cpu", cpu, "memory_bytes", (json_int_t)vm->def.memory_bytes, "streams",
		(int)mv->opt.streams, "regions", vm->cold ? json_array() : populated_regions(mv), "suspend",
		mv->opt.suspend, "no_tls", mv->opt.no_tls);
	if (!hello) {
		error_errno(err, ENOMEM, "hello");
		return NULL;
	}
	if (vm->cold)
		json_object_set_new(hello, "cold", json_true());
	if (mv->opt.purpose != MOVE_BY_ITSELF)
		json_object_set_new(hello, "purpose", json_string(move_purpose_name(mv->opt.purpose)));
	if (mv->opt.keep_partial_s != MOVE_AS_CONFIGURED)
		json_object_set_new(hello, "keep_partial_s", json_integer(mv->opt.keep_partial_s));
	if (mv->opt.postcopy != MOVE_POSTCOPY_NEVER && !vm->cold)
		json_object_set_new(hello, "postcopy", json_true());
	source_delta_hello(mv, hello);
	source_compare_hello(mv, hello);
	/* What is left at the destination of an earlier attempt is settled by what this side says of itself.
	 */
	struct vm_record rec;
	struct handover_report own;
	struct handover_self self = {.live = true, .channel_up = true, .attempt_open = true};
	if (!vm_record(vm, &rec, NULL)) {
		handover_describe(&rec, &self, true, &own);
		json_object_set_new(hello, "report", ask_report_to_json(vm->def.uuid, &own));
	}
	return hello;
}

static int source_frame(void *opaque, const struct frame *f, struct error *err)
{
	if (f->type == FRAME_HASHES)
		return source_hashes_frame(opaque, f, err);
	return error_set(err, EPROTO, "control channel: unexpected %s", frame_type_name(f->type));
}

static int take_tokens(json_t *reply, const char *key, char (*out)[64], unsigned n, struct error *err)
{
	json_t *a = json_object_get(reply, key);
	if (json_array_size(a) != n)
		return error_set(err, EPROTO, "hello: the destination gave %zu %s for %u", json_array_size(a),
				 key, n);
	for (unsigned i = 0; i < n; i++) {
		const char *t = json_string_value(json_array_get(a, i));
		if (!t || strlen(t) != TOKEN_HEX_CHARS)
			return error_set(err, EPROTO, "hello: malformed %s", key);
		strcpy(out[i], t);
	}
	return 0;
}

static int send_files(struct move *mv, struct travel_file *files, unsigned nfiles, struct error *err)
{
	CLEANUP_FREE uint8_t *buf = malloc(FILE_CHUNK_BYTES + 12);
	if (!buf)
		return error_errno(err, ENOMEM, "files");
	for (unsigned i = 0; i < nfiles; i++) {
		CLEANUP_FD int fd = open(files[i].path, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			return error_errno(err, errno, "%s", files[i].path);
		for (uint64_t at = 0; at < files[i].size;) {
			ssize_t n = pread(fd, buf + 12, FILE_CHUNK_BYTES, (off_t)at);
			if (n <= 0)
				return error_errno(err, n ? errno : EIO, "%s: read at %llu", files[i].path,
						   (unsigned long long)at);
			put_be32(buf, i);
			put_be64(buf + 4, at);
			int rc = move_link_send_bytes(mv->link, FRAME_FILE, buf, (uint32_t)n + 12, err);
			if (rc)
				return rc;
			at += (uint64_t)n;
		}
	}
	return 0;
}

/* The attempt's epoch is durable before the destination hears of it: it is never used twice. */
static int record_attempt(struct move *mv, struct error *err)
{
	struct vm_record rec;
	int rc = vm_record(mv->vm, &rec, err);
	if (rc)
		return rc;
	uint32_t set = (mv->opt.keep_source ? RECORD_KEEP_SOURCE : 0) | (mv->vm->cold ? RECORD_COLD : 0);
	struct vm_transition t = {
		.from = HANDOVER_OWNER,
		.from_epoch = rec.epoch,
		.to = HANDOVER_OWNER,
		.to_epoch = mv->opt.epoch,
		.peer = mv->opt.peer,
		.peer_address = mv->opt.address,
		.flags_set = set,
		.flags_clear = (RECORD_KEEP_SOURCE | RECORD_COLD) & ~set,
	};
	return vm_record_transition(mv->vm, &t, err);
}

/* A destination that is to prove that it has the files below reads them first. */
static unsigned hello_timeout_ms(const struct move *mv)
{
	uint64_t ms = HELLO_TIMEOUT_MS;
	for (unsigned i = 0; i < mv->vm->def.ndisks; i++)
		ms += mv->disks[i].below.virtual_bytes / HASH_BYTES_PER_MS;
	return ms < UINT32_MAX ? (unsigned)ms : UINT32_MAX;
}

/* As it is now: another attempt may find that this host's or the other's trust has changed. */
static int trust_peer(struct move *mv, struct error *err)
{
	const struct host_config *cfg = mv->vm->cfg;
	struct trust_peer peer;
	int rc = trust_peer_find(cfg, mv->opt.peer, &peer, err);
	if (!rc && !peer.may_receive)
		rc = trust_refuse_receive(cfg, &peer, err);
	if (!rc)
		rc = trust_client_context(cfg, &peer, &mv->tls, err);
	mv->control_word = trust_preamble(&peer);
	return rc;
}

/* Proved with the destination's certificate when it is dialled, like the other. */
static int take_data_address(struct move *mv, const json_t *reply, struct error *err)
{
	const json_t *o = json_object_get(reply, "data_address");
	const char *s = json_string_value(o);
	mv->data_address[0] = '\0';
	if (!o)
		return 0;
	return s ? host_address_normalize(s, mv->data_address, sizeof mv->data_address, err)
		 : error_set(err, EPROTO, "%s: malformed data_address", mv->opt.peer);
}

int source_hello(struct move *mv, struct error *err)
{
	struct vm *vm = mv->vm;
	struct travel_file files[2];
	unsigned nfiles;
	int rc = travel_files(vm, files, &nfiles, err);
	if (!rc)
		rc = trust_peer(mv, err);
	struct conn *conn = NULL;
	if (!rc)
		rc = source_dial(mv, CHANNEL_CONTROL, mv->control_word, &conn, err);
	if (rc)
		return rc;
	source_proof_peer(mv, conn);
	struct move_link_options lopt = {
		.conn = conn,
		.epoch = mv->opt.epoch,
		.silence_ms = vm->cfg->silence_ms,
		.failed = source_link_failed,
		.frame = source_frame,
		.opaque = mv,
	};
	struct move_link *link;
	rc = move_link_start(&lopt, &link, err);
	if (rc)
		return rc;
	pthread_mutex_lock(&mv->lock);
	mv->link = link;
	pthread_mutex_unlock(&mv->lock);

	/* Whoever ended the move before the link was there has not ended the link. */
	rc = source_check(mv, err);
	if (!rc)
		rc = record_attempt(mv, err);
	if (rc)
		return rc;
	rc = source_shared_challenge(mv, err);
	json_t *hello = rc ? NULL : make_hello(mv, files, nfiles, err);
	if (!hello) {
		source_shared_withdraw(mv);
		return rc ? rc : -EIO;
	}
	rc = move_link_send(mv->link, FRAME_HELLO, hello, err);
	json_decref(hello);
	fault_point("in-hello");
	struct frame reply;
	if (!rc)
		rc = move_link_wait(mv->link, 1u << FRAME_HELLO_OK | 1u << FRAME_REFUSE, hello_timeout_ms(mv),
				    &reply, err);
	source_shared_withdraw(mv);
	if (rc)
		return error_prefix(err, "%s", mv->opt.peer);
	if (reply.type == FRAME_REFUSE) {
		const char *s = json_string_value(json_object_get(reply.json, "reason"));
		rc = error_set(err, EPERM, "%s refused: %s", mv->opt.peer, s ? s : "no reason given");
		frame_release(&reply);
		return rc;
	}
	json_int_t version = json_integer_value(json_object_get(reply.json, "version"));
	if (version != source_protocol(mv)) {
		frame_release(&reply);
		return error_set(err, EPROTO, "%s chose migration protocol %lld, which was not offered",
				 mv->opt.peer, (long long)version);
	}
	rc = take_data_address(mv, reply.json, err);
	if (!rc)
		rc = take_tokens(reply.json, "disk_tokens", mv->disk_token, vm->def.ndisks, err);
	if (!rc)
		rc = take_tokens(reply.json, "memory_tokens", mv->memory_token, mv->opt.streams, err);
	if (!rc && mv->nlayers)
		rc = take_tokens(reply.json, "layer_tokens", mv->layer_token, mv->nlayers, err);
	if (!rc)
		rc = source_disks_accepted(mv, reply.json, err);
	if (!rc)
		rc = source_postcopy_accepted(mv, reply.json, err);
	source_delta_accepted(mv, reply.json);
	if (!rc)
		rc = source_compare_accepted(mv, reply.json, err);
	for (unsigned i = 0; i < vm->def.ndisks; i++)
		mv->resumed[i] = json_is_true(json_array_get(json_object_get(reply.json, "resumed"), i));
	frame_release(&reply);
	if (rc)
		return rc;
	mv->negotiated = mv->negotiated_now = true;
	fault_point("before-storage");
	rc = source_check(mv, err);
	return rc ? rc : send_files(mv, files, nfiles, err);
}
