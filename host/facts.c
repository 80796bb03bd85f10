/* SPDX-License-Identifier: Apache-2.0 */
#include "host/facts.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "host/fsutil.h"
#include "host/vmdef.h"

#define TEXT_MAX_BYTES 65536
#define CPUS_MAX       (1u << 16)
#define BYTES_MAX      (INT64_MAX / 2)

/* ---- collecting ---- */

static char *read_text(const char *root, const char *path)
{
	char whole[PATH_MAX];
	char *text = NULL;
	size_t len;
	snprintf(whole, sizeof whole, "%s%s", root, path);
	return fs_read_file(whole, TEXT_MAX_BYTES, &text, &len, NULL) < 0 ? NULL : text;
}

static uint64_t read_number(const char *root, const char *path)
{
	CLEANUP_FREE char *text = read_text(root, path);
	return text ? strtoull(text, NULL, 10) : 0;
}

/* "key ... : N kB" anywhere on a line. */
static uint64_t kib_of(const char *text, const char *key)
{
	const char *at = text ? strstr(text, key) : NULL;
	return at ? strtoull(at + strlen(key), NULL, 10) << 10 : 0;
}

/* "0-3,8-11" -> 8 */
static unsigned count_list(const char *text)
{
	unsigned n = 0;
	while (text && isdigit((unsigned char)*text)) {
		char *end;
		unsigned long a = strtoul(text, &end, 10), b = a;
		if (*end == '-')
			b = strtoul(end + 1, &end, 10);
		if (b >= a && b - a < CPUS_MAX)
			n += (unsigned)(b - a) + 1;
		text = *end == ',' ? end + 1 : NULL;
	}
	return n;
}

/* Calls each with the number behind `prefix` in every name of the folder. */
static void each_numbered(const char *root, const char *folder, const char *prefix,
			  void (*each)(const char *root, const char *folder, unsigned n,
				       struct host_facts *f),
			  struct host_facts *f)
{
	char whole[PATH_MAX];
	snprintf(whole, sizeof whole, "%s%s", root, folder);
	DIR *dir = opendir(whole);
	struct dirent *de;
	size_t len = strlen(prefix);
	while (dir && (de = readdir(dir)))
		if (!strncmp(de->d_name, prefix, len) && isdigit((unsigned char)de->d_name[len]))
			each(root, folder, (unsigned)strtoul(de->d_name + len, NULL, 10), f);
	if (dir)
		closedir(dir);
}

static void add_node(const char *root, const char *folder, unsigned n, struct host_facts *f)
{
	char path[300];
	if (f->nnodes == FACTS_NODES_MAX)
		return;
	snprintf(path, sizeof path, "%s/node%u/meminfo", folder, n);
	CLEANUP_FREE char *memory = read_text(root, path);
	snprintf(path, sizeof path, "%s/node%u/cpulist", folder, n);
	CLEANUP_FREE char *cpus = read_text(root, path);
	f->nodes[f->nnodes++] =
		(struct facts_node){.cpus = count_list(cpus),
				    .total_bytes = kib_of(memory, "MemTotal:"),
				    .free_bytes = kib_of(memory, "MemFree:") + kib_of(memory, "FilePages:")};
}

static void add_ecc(const char *root, const char *folder, unsigned n, struct host_facts *f)
{
	char path[300];
	f->ecc_controllers++;
	snprintf(path, sizeof path, "%s/mc%u/ce_count", folder, n);
	f->ecc_corrected += read_number(root, path);
	snprintf(path, sizeof path, "%s/mc%u/ue_count", folder, n);
	f->ecc_uncorrected += read_number(root, path);
}

/* The word in brackets of "always [madvise] never". */
static void read_choice(const char *root, const char *path, char out[16])
{
	CLEANUP_FREE char *text = read_text(root, path);
	const char *open = text ? strchr(text, '[') : NULL, *close = open ? strchr(open, ']') : NULL;
	out[0] = '\0';
	if (close && close - open <= 15)
		snprintf(out, 16, "%.*s", (int)(close - open - 1), open + 1);
}

void host_facts_collect(const char *root, struct host_facts *f)
{
	*f = (struct host_facts){0};
	CLEANUP_FREE char *memory = read_text(root, "/proc/meminfo");
	CLEANUP_FREE char *load = read_text(root, "/proc/loadavg");
	CLEANUP_FREE char *cpus = read_text(root, "/sys/devices/system/cpu/online");
	f->memory_total_bytes = kib_of(memory, "MemTotal:");
	f->memory_available_bytes = kib_of(memory, "MemAvailable:");
	f->load = load ? strtod(load, NULL) : 0;
	f->cpus = count_list(cpus);
	each_numbered(root, "/sys/devices/system/node", "node", add_node, f);
	each_numbered(root, "/sys/devices/system/edac/mc", "mc", add_ecc, f);
	read_choice(root, "/sys/kernel/mm/transparent_hugepage/shmem_enabled", f->huge_shmem);
	read_choice(root, "/sys/kernel/mm/transparent_hugepage/enabled", f->huge_anonymous);
}

unsigned facts_interface_mtu(const char *name)
{
	char path[300];
	if (!name_chars_valid(name))
		return 0;
	snprintf(path, sizeof path, "/sys/class/net/%s/mtu", name);
	return (unsigned)read_number("", path);
}

/* ---- as JSON ---- */

json_t *host_facts_to_json(const struct host_facts *f)
{
	json_t *nodes = json_array();
	for (unsigned i = 0; i < f->nnodes; i++)
		json_array_append_new(nodes, json_pack("{s:i, s:I, s:I}", "cpus", (int)f->nodes[i].cpus,
						       "total_bytes", (json_int_t)f->nodes[i].total_bytes,
						       "free_bytes", (json_int_t)f->nodes[i].free_bytes));
	return json_pack("{s:I, s:I, s:i, s:f, s:o, s:i, s:I, s:I, s:s, s:s}", "memory_total_bytes",
			 (json_int_t)f->memory_total_bytes, "memory_available_bytes",
			 (json_int_t)f->memory_available_bytes, "cpus", (int)f->cpus, "load", f->load,
			 "nodes", nodes, "ecc_controllers", (int)f->ecc_controllers, "ecc_corrected",
			 (json_int_t)f->ecc_corrected, "ecc_uncorrected", (json_int_t)f->ecc_uncorrected,
			 "huge_shmem", f->huge_shmem, "huge_anonymous", f->huge_anonymous);
}

int facts_take_u64(const json_t *o, const char *key, uint64_t max, uint64_t *out, struct error *err)
{
	const json_t *v = json_object_get(o, key);
	json_int_t n = json_integer_value(v);
	if (!json_is_integer(v) || n < 0 || (uint64_t)n > max)
		return error_set(err, EPROTO, "facts: \"%s\" is not a number up to %llu", key,
				 (unsigned long long)max);
	*out = (uint64_t)n;
	return 0;
}

int facts_take_unsigned(const json_t *o, const char *key, unsigned max, unsigned *out, struct error *err)
{
	uint64_t n = 0;
	int rc = facts_take_u64(o, key, max, &n, err);
	*out = (unsigned)n;
	return rc;
}

/* A word of lower case letters. */
static int take_word(const json_t *o, const char *key, char out[16], struct error *err)
{
	const char *s = json_string_value(json_object_get(o, key));
	if (!s || strlen(s) > 15 || strspn(s, "abcdefghijklmnopqrstuvwxyz_") != strlen(s))
		return error_set(err, EPROTO, "facts: \"%s\" is not a word", key);
	strcpy(out, s);
	return 0;
}

int host_facts_from_json(const json_t *o, struct host_facts *f, struct error *err)
{
	*f = (struct host_facts){0};
	const json_t *nodes = json_object_get(o, "nodes"), *load = json_object_get(o, "load");
	size_t i;
	json_t *node;
	int rc = facts_take_u64(o, "memory_total_bytes", BYTES_MAX, &f->memory_total_bytes, err);
	if (!rc)
		rc = facts_take_u64(o, "memory_available_bytes", BYTES_MAX, &f->memory_available_bytes, err);
	if (!rc)
		rc = facts_take_unsigned(o, "cpus", CPUS_MAX, &f->cpus, err);
	if (!rc &&
	    (!json_is_number(load) || !(json_number_value(load) >= 0 && json_number_value(load) < 1e6)))
		rc = error_set(err, EPROTO, "facts: \"load\" is no load");
	f->load = json_number_value(load);
	if (!rc)
		rc = facts_take_unsigned(o, "ecc_controllers", 1024, &f->ecc_controllers, err);
	if (!rc)
		rc = facts_take_u64(o, "ecc_corrected", BYTES_MAX, &f->ecc_corrected, err);
	if (!rc)
		rc = facts_take_u64(o, "ecc_uncorrected", BYTES_MAX, &f->ecc_uncorrected, err);
	if (!rc)
		rc = take_word(o, "huge_shmem", f->huge_shmem, err);
	if (!rc)
		rc = take_word(o, "huge_anonymous", f->huge_anonymous, err);
	if (!rc && (!json_is_array(nodes) || json_array_size(nodes) > FACTS_NODES_MAX))
		rc = error_set(err, EPROTO, "facts: \"nodes\" is no list of at most %d", FACTS_NODES_MAX);
	json_array_foreach(nodes, i, node)
	{
		struct facts_node *n = &f->nodes[f->nnodes];
		if (!rc)
			rc = facts_take_unsigned(node, "cpus", CPUS_MAX, &n->cpus, err);
		if (!rc)
			rc = facts_take_u64(node, "total_bytes", BYTES_MAX, &n->total_bytes, err);
		if (!rc)
			rc = facts_take_u64(node, "free_bytes", BYTES_MAX, &n->free_bytes, err);
		f->nnodes += !rc;
	}
	return rc;
}
