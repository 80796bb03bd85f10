/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/move_disk.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#include "base/cleanup.h"

#define DISK_MAX_BYTES	  (UINT64_C(1) << 50)
#define CLUSTER_MIN_BYTES 512
#define CLUSTER_MAX_BYTES (2u << 20)
#define REFCOUNT_BITS_MAX 64

static const char *const modes[] = {[MOVE_DISK_FILE] = "file",
				    [MOVE_DISK_DEVICE] = "device",
				    [MOVE_DISK_CHAIN] = "chain",
				    [MOVE_DISK_REUSE] = "reuse",
				    [MOVE_DISK_SHARED] = "shared"};

const char *move_disk_mode_name(enum move_disk_mode mode)
{
	return modes[mode];
}

int move_disk_mode_parse(const char *name, enum move_disk_mode *mode)
{
	*mode = MOVE_DISK_FILE;
	if (!name)
		return 0;
	for (unsigned i = 0; i < ARRAY_SIZE(modes); i++) {
		if (strcmp(name, modes[i]) == 0) {
			*mode = (enum move_disk_mode)i;
			return 0;
		}
	}
	return -EINVAL;
}

json_t *move_shape_to_json(const struct block_image_info *s)
{
	return json_pack("{s:s, s:I, s:I, s:i, s:s, s:b, s:b, s:b, s:i}", "format",
			 block_format_name(s->format), "virtual_bytes", (json_int_t)s->virtual_bytes,
			 "allocated_bytes", (json_int_t)s->allocated_bytes, "cluster_bytes",
			 (int)s->cluster_bytes, "compat", s->compat, "lazy_refcounts", s->lazy_refcounts,
			 "extended_l2", s->extended_l2, "zstd", s->zstd, "refcount_bits",
			 (int)s->refcount_bits);
}

int move_need_u64(json_t *o, const char *key, uint64_t max, uint64_t *out, struct error *err)
{
	json_t *v = json_object_get(o, key);
	if (!json_is_integer(v) || json_integer_value(v) < 0 || (uint64_t)json_integer_value(v) > max)
		return error_set(err, EPROTO, "hello: \"%s\" is missing or not a number from 0 to %" PRIu64,
				 key, max);
	*out = (uint64_t)json_integer_value(v);
	return 0;
}

static bool power_of_two(uint64_t n)
{
	return n && !(n & (n - 1));
}

int move_shape_parse(json_t *o, struct block_image_info *s, struct error *err)
{
	uint64_t cluster = 0, refcount = 0;
	const char *format = json_string_value(json_object_get(o, "format"));
	*s = (struct block_image_info){0};
	if (!format || block_format_parse(format, &s->format))
		return error_set(err, EPROTO, "hello: no known \"format\"");
	int rc = move_need_u64(o, "virtual_bytes", DISK_MAX_BYTES, &s->virtual_bytes, err);
	if (!rc)
		rc = move_need_u64(o, "allocated_bytes", DISK_MAX_BYTES, &s->allocated_bytes, err);
	if (!rc)
		rc = move_need_u64(o, "cluster_bytes", CLUSTER_MAX_BYTES, &cluster, err);
	if (!rc && json_object_get(o, "refcount_bits"))
		rc = move_need_u64(o, "refcount_bits", REFCOUNT_BITS_MAX, &refcount, err);
	if (rc)
		return rc;
	if (!s->virtual_bytes || s->virtual_bytes % 512)
		return error_set(err, EPROTO, "hello: a size of %" PRIu64 " bytes", s->virtual_bytes);
	if (s->format == BLOCK_FORMAT_QCOW2 && (cluster < CLUSTER_MIN_BYTES || !power_of_two(cluster)))
		return error_set(err, EPROTO, "hello: a cluster size of %" PRIu64, cluster);
	if (refcount && !power_of_two(refcount))
		return error_set(err, EPROTO, "hello: reference counts of %" PRIu64 " bits", refcount);
	s->cluster_bytes = (uint32_t)cluster;
	s->refcount_bits = (uint32_t)refcount;
	const char *compat = json_string_value(json_object_get(o, "compat"));
	snprintf(s->compat, sizeof s->compat, "%s", compat && !strcmp(compat, "0.10") ? "0.10" : "1.1");
	s->lazy_refcounts = json_is_true(json_object_get(o, "lazy_refcounts"));
	s->extended_l2 = json_is_true(json_object_get(o, "extended_l2"));
	s->zstd = json_is_true(json_object_get(o, "zstd"));
	return 0;
}

json_t *move_backing_to_json(enum move_disk_mode mode, const struct move_backing *b)
{
	if (mode == MOVE_DISK_REUSE)
		return json_pack("{s:I, s:s, s:s}", "virtual_bytes", (json_int_t)b->virtual_bytes, "sha256",
				 b->sha256, "name", b->name);
	json_t *layers = json_array();
	for (unsigned i = 0; i < b->nlayers; i++)
		json_array_append_new(layers, move_shape_to_json(&b->layers[i]));
	return json_pack("{s:o}", "layers", layers);
}

static int parse_reuse(json_t *o, struct move_backing *b, struct error *err)
{
	const char *hash = json_string_value(json_object_get(o, "sha256"));
	const char *name = json_string_value(json_object_get(o, "name"));
	if (!hash || strlen(hash) != BLOCK_CONTENT_HEX_CHARS ||
	    strspn(hash, "0123456789abcdef") != BLOCK_CONTENT_HEX_CHARS)
		return error_set(err, EPROTO, "hello: \"sha256\" of the backing file is missing");
	strcpy(b->sha256, hash);
	snprintf(b->name, sizeof b->name, "%s", name ? name : "");
	return move_need_u64(o, "virtual_bytes", DISK_MAX_BYTES, &b->virtual_bytes, err);
}

int move_backing_parse(json_t *o, enum move_disk_mode mode, struct move_backing *b, struct error *err)
{
	*b = (struct move_backing){0};
	if (mode == MOVE_DISK_REUSE)
		return parse_reuse(o, b, err);
	if (mode != MOVE_DISK_CHAIN)
		return 0;
	json_t *layers = json_object_get(o, "layers");
	size_t n = json_array_size(layers);
	if (n < 1 || n > BLOCK_BACKING_MAX)
		return error_set(err, EPROTO, "hello: %zu files below a disk", n);
	for (size_t i = 0; i < n; i++) {
		int rc = move_shape_parse(json_array_get(layers, i), &b->layers[i], err);
		if (rc)
			return rc;
		/* only the lowest may be something that cannot have a backing file */
		if (b->layers[i].format != BLOCK_FORMAT_QCOW2 && i + 1 < n)
			return error_set(err, EPROTO, "hello: a raw file over another");
	}
	b->nlayers = (unsigned)n;
	return 0;
}
