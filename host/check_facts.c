/* SPDX-License-Identifier: Apache-2.0 */
/* What the VM's snvmm and the other host said, into a struct: bounded, checked. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "host/check.h"

#define BYTES_MAX (INT64_MAX / 4)
#define MTU_MAX	  (1u << 20)

/* Text of any content, cut; null and nothing are "". Whoever prints it cleans it. */
static int take_text(const json_t *o, const char *key, char *out, size_t size, struct error *err)
{
	const json_t *v = json_object_get(o, key);
	out[0] = '\0';
	if (!v || json_is_null(v))
		return 0;
	if (!json_is_string(v))
		return error_set(err, EPROTO, "facts: \"%s\" is not text", key);
	snprintf(out, size, "%s", json_string_value(v));
	return 0;
}

static int take_name(const json_t *o, const char *key, char *out, size_t size, struct error *err)
{
	const char *s = json_string_value(json_object_get(o, key));
	if (!s || !name_chars_valid(s) || strlen(s) >= size)
		return error_set(err, EPROTO, "facts: \"%s\" is not a name", key);
	strcpy(out, s);
	return 0;
}

static int take_list(const json_t *o, const char *key, size_t max, const json_t **out, struct error *err)
{
	*out = json_object_get(o, key);
	if (!json_is_array(*out) || json_array_size(*out) > max)
		return error_set(err, EPROTO, "facts: \"%s\" is no list of at most %zu", key, max);
	return 0;
}

static int take_cpu(const json_t *cpu, struct check_cpu *out, struct error *err)
{
	free(steal_ptr(out->table));
	out->scales_tsc = json_is_true(json_object_get(cpu, "tsc_scaling"));
	return cpu_from_json(cpu, &out->table, &out->tsc_khz, err);
}

static int take_disks(struct check_facts *f, const json_t *o, struct error *err)
{
	const json_t *list;
	size_t i;
	json_t *disk;
	int rc = take_list(o, "disks", VM_DISKS_MAX, &list, err);
	json_array_foreach(list, i, disk)
	{
		struct check_disk *d = &f->disks[i];
		if (!rc)
			rc = take_name(disk, "id", d->id, sizeof d->id, err);
		if (!rc)
			rc = facts_take_u64(disk, "allocated_bytes", BYTES_MAX / VM_DISKS_MAX,
					    &d->allocated_bytes, err);
		d->backing = json_is_true(json_object_get(disk, "backing"));
		f->ndisks = (unsigned)i + 1;
		if (rc)
			break;
	}
	return rc;
}

static int take_nets(struct check_facts *f, const json_t *o, struct error *err)
{
	const json_t *list;
	size_t i;
	json_t *net;
	int rc = take_list(o, "nets", VM_NETS_MAX, &list, err);
	json_array_foreach(list, i, net)
	{
		struct check_net *n = &f->nets[i];
		if (!rc)
			rc = take_name(net, "id", n->id, sizeof n->id, err);
		if (!rc)
			rc = take_name(net, "bridge", n->bridge, sizeof n->bridge, err);
		if (!rc)
			rc = facts_take_unsigned(net, "mtu", MTU_MAX, &n->mtu_here, err);
		f->nnets = (unsigned)i + 1;
		if (rc)
			break;
	}
	return rc;
}

int check_take_vm(struct check_facts *f, const json_t *o, struct error *err)
{
	int rc = facts_take_unsigned(o, "protocol", 1000, &f->protocol, err);
	if (!rc)
		rc = facts_take_unsigned(o, "cpus", 1024, &f->cpus, err);
	if (!rc)
		rc = facts_take_u64(o, "memory_bytes", BYTES_MAX, &f->memory_bytes, err);
	if (!rc)
		rc = facts_take_u64(o, "populated_bytes", BYTES_MAX, &f->populated_bytes, err);
	if (!rc)
		rc = take_disks(f, o, err);
	if (!rc)
		rc = take_nets(f, o, err);
	if (!rc)
		rc = take_cpu(json_object_get(o, "cpu"), &f->guest, err);
	/* an older program does not tell */
	if (!rc && json_object_get(o, "files_bytes"))
		rc = facts_take_u64(o, "files_bytes", BYTES_MAX, &f->files_bytes, err);
	f->live = !rc;
	return rc;
}

/* ---- the destination ---- */

static int take_bridges(struct check_facts *f, const json_t *o, struct error *err)
{
	const json_t *list;
	size_t i;
	json_t *bridge;
	int rc = take_list(o, "bridges", VM_NETS_MAX, &list, err);
	if (!rc && json_array_size(list) != f->nnets)
		rc = error_set(err, EPROTO, "facts: %zu bridges for %u", json_array_size(list), f->nnets);
	if (rc)
		return rc;
	json_array_foreach(list, i, bridge)
	{
		struct check_net *n = &f->nets[i];
		rc = facts_take_unsigned(bridge, "mtu", MTU_MAX, &n->mtu_there, err);
		if (!rc)
			rc = take_text(bridge, "error", n->error, sizeof n->error, err);
		if (rc)
			return rc;
	}
	return 0;
}

static int take_refusals(struct check_facts *f, const json_t *o, struct error *err)
{
	const json_t *list;
	size_t i;
	json_t *v;
	int rc = take_list(o, "refusals", CHECK_REFUSALS_MAX, &list, err);
	if (rc)
		return rc;
	json_array_foreach(list, i, v)
	{
		const char *s = json_string_value(v);
		if (!s)
			return error_set(err, EPROTO, "facts: \"refusals\" are not sentences");
		snprintf(f->refusals[f->nrefusals++], CHECK_TEXT_BYTES, "%s", s);
	}
	return 0;
}

static int take_versions(struct check_facts *f, const json_t *o, struct error *err)
{
	const json_t *list;
	int rc = take_list(o, "versions", 2, &list, err);
	json_int_t lo = json_integer_value(json_array_get(list, 0)),
		   hi = json_integer_value(json_array_get(list, 1));
	if (!rc && (lo < 1 || hi < lo || hi > 1000))
		rc = error_set(err, EPROTO, "facts: \"versions\" is not a range");
	f->protocol_min = (unsigned)lo;
	f->protocol_max = (unsigned)hi;
	return rc;
}

int check_take_destination(struct check_facts *f, const json_t *o, struct error *err)
{
	const json_t *disk = json_object_get(o, "disk"), *cpu = json_object_get(o, "cpu");
	int rc = take_text(o, "program", f->program, sizeof f->program, err);
	if (!rc)
		rc = take_versions(f, o, err);
	if (!rc)
		rc = host_facts_from_json(json_object_get(o, "own"), &f->theirs, err);
	if (!rc)
		rc = take_bridges(f, o, err);
	if (!rc)
		rc = take_refusals(f, o, err);
	if (!rc)
		rc = take_text(o, "cpu_error", f->cpu_error, sizeof f->cpu_error, err);
	if (!rc && cpu && !json_is_null(cpu))
		rc = take_cpu(cpu, &f->host, err);
	if (!rc)
		rc = facts_take_u64(disk, "free_bytes", BYTES_MAX, &f->disk_free_bytes, err);
	if (!rc)
		rc = facts_take_u64(disk, "kept_bytes", BYTES_MAX, &f->disk_kept_bytes, err);
	if (!rc)
		rc = facts_take_u64(disk, "write_bytes_per_s", BYTES_MAX, &f->disk_write_bytes_per_s, err);
	if (!rc && json_object_get(disk, "read_bytes_per_s"))
		rc = facts_take_u64(disk, "read_bytes_per_s", BYTES_MAX, &f->disk_read_bytes_per_s, err);
	if (!rc)
		rc = facts_take_u64(disk, "sync_us", 600000000, &f->disk_sync_us, err);
	if (!rc)
		rc = take_text(disk, "error", f->disk_error, sizeof f->disk_error, err);
	f->answered = !rc;
	return rc;
}

void check_facts_free(struct check_facts *f)
{
	free(steal_ptr(f->guest.table));
	free(steal_ptr(f->host.table));
}
