/* SPDX-License-Identifier: Apache-2.0 */
#include "host/vmdef.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "base/cleanup.h"
#include "host/fsutil.h"
#include "host/ini.h"

#define MEMORY_GRANULE_BYTES (UINT64_C(2) << 20)
#define MEMORY_MAX_BYTES     (UINT64_C(16) << 40)
#define CPUS_MAX	     64
#define ID_MAX_CHARS	     20 /* what a virtio disk can show as its serial number */

/* What stands in a VM's folder beside its disks (docs/design.md, "State directory"). */
static const char *const own_names[] = {"vm.ini",     "files.json",   "partial.json",
					"snvmm.sock", "console.sock", "run"};
static const char *const subcommands[] = {
	"move",	   "cancel",   "resolve",    "watch",	"pki",	    "help",	   "version", "check",
	"plan",	   "evacuate", "rehearse",   "status",	"list",	    "history",	   "pair",    "hosts",
	"config",  "create",   "start",	     "stop",	"pause",    "resume",	   "info",    "delete",
	"console", "import",   "drain",	     "balance", "baseline", "compare",	   "set",     "bandwidth",
	"tune",	   "partial",  "dirty-rate", "peers",	"unpair",   "maintenance", "return"};

bool name_chars_valid(const char *name)
{
	size_t n = strlen(name);
	if (n == 0 || n > VM_NAME_MAX_CHARS)
		return false;
	for (size_t i = 0; i < n; i++) {
		char c = name[i];
		bool alnum = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
		if (!alnum && (i == 0 || !strchr("_.-", c)))
			return false;
	}
	return true;
}

bool vm_name_valid(const char *name)
{
	if (!name_chars_valid(name))
		return false;
	for (size_t i = 0; i < ARRAY_SIZE(subcommands); i++)
		if (!strcmp(name, subcommands[i]))
			return false;
	return true;
}

bool vm_file_name_valid(const char *name)
{
	size_t n = strlen(name);
	if (n == 0 || n > 200 || name[0] == '.' || strchr(name, '/'))
		return false;
	for (size_t i = 0; i < n; i++)
		if ((unsigned char)name[i] < 0x20 || name[i] == 0x7f)
			return false;
	/* the temporary name of files that are replaced (fs_write_file_at) */
	if (n >= 4 && !strcmp(name + n - 4, ".new"))
		return false;
	for (size_t i = 0; i < ARRAY_SIZE(own_names); i++)
		if (!strcmp(name, own_names[i]))
			return false;
	return true;
}

bool vm_uuid_valid(const char *uuid)
{
	if (strlen(uuid) != VM_UUID_CHARS)
		return false;
	for (int i = 0; i < VM_UUID_CHARS; i++) {
		bool dash = i == 8 || i == 13 || i == 18 || i == 23;
		bool hex = (uuid[i] >= '0' && uuid[i] <= '9') || (uuid[i] >= 'a' && uuid[i] <= 'f');
		if (dash ? uuid[i] != '-' : !hex)
			return false;
	}
	return true;
}

int vm_uuid_generate(char uuid[VM_UUID_CHARS + 1], struct error *err)
{
	uint8_t b[16];
	if (getrandom(b, sizeof b, 0) != sizeof b)
		return error_errno(err, errno, "getrandom");
	b[6] = (uint8_t)((b[6] & 0x0f) | 0x40); /* RFC 9562: version 4 */
	b[8] = (uint8_t)((b[8] & 0x3f) | 0x80);
	snprintf(uuid, VM_UUID_CHARS + 1,
		 "%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", b[0], b[1], b[2],
		 b[3], b[4], b[5], b[6], b[7], b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]);
	return 0;
}

/* Bits of struct parser.seen: a key that is given twice is an error. */
enum {
	SEEN_NAME = 1,
	SEEN_UUID = 2,
	SEEN_MEMORY = 4,
	SEEN_CPUS = 8,
	SEEN_KERNEL = 16,
	SEEN_INITRD = 32,
	SEEN_CMDLINE = 64,
	SEEN_SERIAL = 128,
	SEEN_CPU = 256,
	SEEN_PRIORITY = 512,
	SEEN_BALLOON = 1024
};
enum {
	SEEN_PATH = 1,
	SEEN_FORMAT = 2,
	SEEN_READ_ONLY = 4,
	SEEN_SIZE = 8,
	SEEN_BRIDGE = 16,
	SEEN_MAC = 32,
	SEEN_BACKING = 64
};

struct parser {
	struct vm_definition *def;
	unsigned seen, item_seen;
	bool cpu_section;
};

static int once(unsigned *seen, unsigned bit, const struct ini_entry *e, struct error *err)
{
	if (*seen & bit)
		return error_set(err, EINVAL, "%s: given twice", e->key);
	*seen |= bit;
	return 0;
}

static int on_vm(struct parser *p, const struct ini_entry *e, struct error *err)
{
	struct vm_definition *d = p->def;
	unsigned bit;
	int rc;
	if (!strcmp(e->key, "name")) {
		bit = SEEN_NAME;
		rc = ini_get_string(e, d->name, sizeof d->name, err);
		if (!rc && !name_chars_valid(d->name))
			rc = error_set(err, EINVAL,
				       "name: '%s' is not a VM name (letters, digits, '.', '_', '-')",
				       d->name);
		else if (!rc && !vm_name_valid(d->name))
			rc = error_set(err, EINVAL, "name: '%s' is the name of a subcommand; choose another",
				       d->name);
	} else if (!strcmp(e->key, "uuid")) {
		bit = SEEN_UUID;
		rc = vm_uuid_valid(e->value)
			     ? ini_get_string(e, d->uuid, sizeof d->uuid, err)
			     : error_set(err, EINVAL, "uuid: '%.64s' is not a UUID in lower case", e->value);
	} else if (!strcmp(e->key, "memory")) {
		bit = SEEN_MEMORY;
		rc = ini_get_size(e, &d->memory_bytes, err);
		if (!rc && (d->memory_bytes < MEMORY_GRANULE_BYTES || d->memory_bytes > MEMORY_MAX_BYTES ||
			    d->memory_bytes % MEMORY_GRANULE_BYTES))
			rc = error_set(err, EINVAL, "memory: '%.64s' is not a multiple of 2M from 2M to 16T",
				       e->value);
	} else if (!strcmp(e->key, "cpus")) {
		bit = SEEN_CPUS;
		rc = ini_get_uint(e, 1, CPUS_MAX, &d->cpus, err);
	} else if (!strcmp(e->key, "priority")) {
		bit = SEEN_PRIORITY;
		rc = ini_get_uint(e, 0, VM_PRIORITY_MAX, &d->priority, err);
	} else if (!strcmp(e->key, "kernel")) {
		bit = SEEN_KERNEL;
		rc = ini_get_string(e, d->kernel, sizeof d->kernel, err);
	} else if (!strcmp(e->key, "initrd")) {
		bit = SEEN_INITRD;
		rc = ini_get_string(e, d->initrd, sizeof d->initrd, err);
	} else if (!strcmp(e->key, "cmdline")) {
		bit = SEEN_CMDLINE;
		rc = *e->value ? ini_get_string(e, d->cmdline, sizeof d->cmdline, err) : 0;
	} else if (!strcmp(e->key, "serial")) {
		bit = SEEN_SERIAL;
		rc = ini_get_string(e, d->serial, sizeof d->serial, err);
		if (!rc && strcmp(d->serial, "socket") && strcmp(d->serial, "stdio") &&
		    (strncmp(d->serial, "file:", 5) || d->serial[5] != '/'))
			rc = error_set(err, EINVAL, "serial: '%.64s' is none of socket, stdio, file:/PATH",
				       e->value);
	} else if (!strcmp(e->key, "cpu")) {
		bit = SEEN_CPU;
		rc = vmdef_set_cpu(d, e->value, err);
	} else if (!strcmp(e->key, "balloon")) {
		bool yes = false;
		bit = SEEN_BALLOON;
		rc = ini_get_bool(e, &yes, err);
		d->balloon = yes ? VM_BALLOON_YES : VM_BALLOON_NO;
	} else if (!strcmp(e->key, "firmware")) {
		return error_set(err, EINVAL, "firmware: not supported yet; give kernel =");
	} else {
		return -ENOKEY;
	}
	return rc ? rc : once(&p->seen, bit, e, err);
}

static int check_id(const struct ini_entry *e, struct error *err)
{
	if (!*e->label)
		return error_set(err, EINVAL, "[%s] needs a name: [%s NAME]", e->section, e->section);
	if (!name_chars_valid(e->label) || strlen(e->label) > ID_MAX_CHARS)
		return error_set(err, EINVAL,
				 "[%s %.64s]: the name must be at most %d letters, digits, '.', '_', '-'",
				 e->section, e->label, ID_MAX_CHARS);
	return 0;
}

static int new_disk(struct parser *p, const struct ini_entry *e, struct error *err)
{
	struct vm_definition *d = p->def;
	int rc = check_id(e, err);
	if (rc < 0)
		return rc;
	for (unsigned i = 0; i < d->ndisks; i++)
		if (!strcmp(d->disks[i].id, e->label))
			return error_set(err, EINVAL, "[disk %s]: given twice", e->label);
	if (d->ndisks == VM_DISKS_MAX)
		return error_set(err, EINVAL, "more than %d disks", VM_DISKS_MAX);
	snprintf(d->disks[d->ndisks++].id, sizeof d->disks->id, "%s", e->label);
	p->item_seen = 0;
	return 0;
}

int vmdef_backing_names(const struct vm_disk_def *disk, char buf[4096], const char *names[VM_BACKING_MAX])
{
	int n = 0;
	if (!*disk->backing)
		return 0;
	memcpy(buf, disk->backing, sizeof disk->backing);
	for (char *p = buf; p;) {
		char *comma = strchr(p, ',');
		if (comma)
			*comma++ = '\0';
		p += strspn(p, " \t");
		for (char *end = p + strlen(p); end > p && (end[-1] == ' ' || end[-1] == '\t');)
			*--end = '\0';
		if (!*p || n == VM_BACKING_MAX)
			return -EINVAL;
		names[n++] = p;
		p = comma;
	}
	return n;
}

static int set_backing(const struct ini_entry *e, struct vm_disk_def *disk, struct error *err)
{
	char buf[sizeof disk->backing];
	const char *names[VM_BACKING_MAX];
	int rc = ini_get_string(e, disk->backing, sizeof disk->backing, err);
	if (!rc && vmdef_backing_names(disk, buf, names) < 0)
		rc = error_set(err, EINVAL, "backing: '%.100s' is no list of 1 to %d files", e->value,
			       VM_BACKING_MAX);
	return rc;
}

static int on_disk(struct parser *p, const struct ini_entry *e, struct error *err)
{
	if (!e->key)
		return new_disk(p, e, err);
	struct vm_disk_def *disk = &p->def->disks[p->def->ndisks - 1];
	unsigned bit;
	int rc;
	if (!strcmp(e->key, "path")) {
		bit = SEEN_PATH;
		rc = ini_get_string(e, disk->path, sizeof disk->path, err);
	} else if (!strcmp(e->key, "format")) {
		bit = SEEN_FORMAT;
		rc = strcmp(e->value, "raw") && strcmp(e->value, "qcow2")
			     ? error_set(err, EINVAL, "format: '%.64s' is neither raw nor qcow2", e->value)
			     : ini_get_string(e, disk->format, sizeof disk->format, err);
	} else if (!strcmp(e->key, "backing")) {
		bit = SEEN_BACKING;
		rc = set_backing(e, disk, err);
	} else if (!strcmp(e->key, "read-only")) {
		bit = SEEN_READ_ONLY;
		rc = ini_get_bool(e, &disk->read_only, err);
	} else if (!strcmp(e->key, "size")) {
		bit = SEEN_SIZE;
		rc = ini_get_size(e, &disk->size_bytes, err);
		if (!rc && (disk->size_bytes == 0 || disk->size_bytes % 512 || disk->size_bytes > INT64_MAX))
			rc = error_set(err, EINVAL, "size: '%.64s' is not a positive multiple of 512",
				       e->value);
	} else {
		return -ENOKEY;
	}
	return rc ? rc : once(&p->item_seen, bit, e, err);
}

static int hex_digit(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	c |= 0x20;
	return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* By hand: sscanf's %2x takes "0x" for a number. */
static int parse_mac(const char *s, uint8_t mac[6])
{
	unsigned sum = 0;
	if (strlen(s) != 17)
		return -EINVAL;
	for (int i = 0; i < 6; i++) {
		int high = hex_digit(s[3 * i]), low = hex_digit(s[3 * i + 1]);
		if (high < 0 || low < 0 || (i < 5 && s[3 * i + 2] != ':'))
			return -EINVAL;
		mac[i] = (uint8_t)(high << 4 | low);
		sum |= mac[i];
	}
	return (mac[0] & 1) || !sum ? -EINVAL : 0;
}

static int on_net(struct parser *p, const struct ini_entry *e, struct error *err)
{
	struct vm_definition *d = p->def;
	if (!e->key) {
		int rc = check_id(e, err);
		if (rc < 0)
			return rc;
		for (unsigned i = 0; i < d->nnets; i++)
			if (!strcmp(d->nets[i].id, e->label))
				return error_set(err, EINVAL, "[net %s]: given twice", e->label);
		if (d->nnets == VM_NETS_MAX)
			return error_set(err, EINVAL, "more than %d networks", VM_NETS_MAX);
		snprintf(d->nets[d->nnets++].id, sizeof d->nets->id, "%s", e->label);
		p->item_seen = 0;
		return 0;
	}
	struct vm_net_def *net = &d->nets[d->nnets - 1];
	unsigned bit;
	int rc;
	if (!strcmp(e->key, "bridge")) {
		bit = SEEN_BRIDGE;
		rc = ini_get_string(e, net->bridge, sizeof net->bridge, err);
		/* a device name ends up in paths below /sys */
		if (!rc && (strpbrk(net->bridge, "/ \t,") || net->bridge[0] == '.'))
			rc = error_set(err, EINVAL, "bridge: '%s' is not an interface name", net->bridge);
	} else if (!strcmp(e->key, "mac")) {
		bit = SEEN_MAC;
		rc = parse_mac(e->value, net->mac) < 0
			     ? error_set(err, EINVAL, "mac: '%.64s' is not a unicast MAC address", e->value)
			     : 0;
		net->has_mac = true;
	} else {
		return -ENOKEY;
	}
	return rc ? rc : once(&p->item_seen, bit, e, err);
}

/* The baseline that `cpu = baseline` stands for. */
static int on_cpu(struct parser *p, const struct ini_entry *e, struct error *err)
{
	struct cpu_features *f = &p->def->cpu_features;
	if (*e->label)
		return error_set(err, EINVAL, "[cpu] takes no name");
	p->cpu_section = true;
	if (!e->key)
		return 0;
	return strcmp(e->key, "vendor") ? cpu_baseline_entry(e->key, e->value, f, err)
					: cpu_vendor_set(e->value, f, err);
}

static int on_entry(void *opaque, const struct ini_entry *e, struct error *err)
{
	struct parser *p = opaque;
	int rc;
	if (!strcmp(e->section, "vm")) {
		if (*e->label)
			return error_set(err, EINVAL, "[vm] takes no name");
		rc = e->key ? on_vm(p, e, err) : 0;
	} else if (!strcmp(e->section, "disk")) {
		rc = on_disk(p, e, err);
	} else if (!strcmp(e->section, "net")) {
		rc = on_net(p, e, err);
	} else if (!strcmp(e->section, "cpu")) {
		rc = on_cpu(p, e, err);
	} else {
		return error_set(err, EINVAL, "unknown section [%.64s]", e->section);
	}
	if (rc == -ENOKEY)
		return error_set(err, EINVAL, "unknown key '%.64s' in [%s]", e->key, e->section);
	return rc;
}

static int finish(struct vm_definition *d, const struct parser *p, const char *origin, struct error *err)
{
	unsigned seen = p->seen;
	static const struct {
		unsigned bit;
		const char *key;
	} needed[] = {{SEEN_NAME, "name"}, {SEEN_MEMORY, "memory"}, {SEEN_KERNEL, "kernel"}};
	for (size_t i = 0; i < ARRAY_SIZE(needed); i++)
		if (!(seen & needed[i].bit))
			return error_set(err, EINVAL, "%s: [vm] %s is missing", origin, needed[i].key);
	if (!(seen & SEEN_CPUS))
		d->cpus = 1;
	if (!(seen & SEEN_SERIAL))
		strcpy(d->serial, "socket");
	if (p->cpu_section != !strcmp(d->cpu, "baseline") || (p->cpu_section && !*d->cpu_features.vendor))
		return error_set(err, EINVAL,
				 "%s: cpu = baseline and a section [cpu] with vendor belong together",
				 origin);
	for (unsigned i = 0; i < d->ndisks; i++) {
		const struct vm_disk_def *disk = &d->disks[i];
		if (!*disk->path)
			return error_set(err, EINVAL, "%s: [disk %s] path is missing", origin, disk->id);
		if (!*disk->format)
			return error_set(err, EINVAL, "%s: [disk %s] format is missing (raw or qcow2)",
					 origin, disk->id);
		if (*disk->backing && strcmp(disk->format, "qcow2"))
			return error_set(err, EINVAL, "%s: [disk %s] backing needs format = qcow2", origin,
					 disk->id);
		for (unsigned k = 0; k < i; k++)
			if (!strcmp(d->disks[k].path, disk->path))
				return error_set(err, EINVAL,
						 "%s: [disk %s] and [disk %s] have the same path", origin,
						 d->disks[k].id, disk->id);
	}
	for (unsigned i = 0; i < d->nnets; i++)
		if (!*d->nets[i].bridge)
			return error_set(err, EINVAL, "%s: [net %s] bridge is missing", origin,
					 d->nets[i].id);
	return 0;
}

int vmdef_parse(const char *text, size_t len, const char *origin, struct vm_definition *def,
		struct error *err)
{
	memset(def, 0, sizeof *def);
	struct parser p = {.def = def};
	int rc = ini_parse_text(text, len, origin, on_entry, &p, err);
	return rc < 0 ? rc : finish(def, &p, origin, err);
}

int vmdef_load(const char *path, struct vm_definition *def, struct error *err)
{
	CLEANUP_FREE char *text = NULL;
	size_t len;
	int rc = fs_read_file(path, INI_TEXT_MAX_BYTES, &text, &len, err);
	return rc < 0 ? rc : vmdef_parse(text, len, path, def, err);
}

char *vmdef_format(const struct vm_definition *d)
{
	char *text = NULL;
	size_t size;
	FILE *f = open_memstream(&text, &size);
	if (!f)
		return NULL;
	fprintf(f, "[vm]\nname = %s\n", d->name);
	if (*d->uuid)
		fprintf(f, "uuid = %s\n", d->uuid);
	fprintf(f, "memory = %llu\ncpus = %u\nkernel = %s\n", (unsigned long long)d->memory_bytes, d->cpus,
		d->kernel);
	/* older programs know neither */
	if (d->priority)
		fprintf(f, "priority = %u\n", d->priority);
	if (d->balloon)
		fprintf(f, "balloon = %s\n", d->balloon == VM_BALLOON_YES ? "yes" : "no");
	if (*d->initrd)
		fprintf(f, "initrd = %s\n", d->initrd);
	if (*d->cmdline)
		fprintf(f, "cmdline = %s\n", d->cmdline);
	fprintf(f, "serial = %s\n", d->serial);
	if (*d->cpu)
		fprintf(f, "cpu = %s\n", d->cpu);
	for (unsigned i = 0; i < d->ndisks; i++) {
		const struct vm_disk_def *k = &d->disks[i];
		fprintf(f, "\n[disk %s]\npath = %s\nformat = %s\n", k->id, k->path, k->format);
		if (*k->backing)
			fprintf(f, "backing = %s\n", k->backing);
		if (k->read_only)
			fputs("read-only = yes\n", f);
		if (k->size_bytes)
			fprintf(f, "size = %llu\n", (unsigned long long)k->size_bytes);
	}
	for (unsigned i = 0; i < d->nnets; i++) {
		const struct vm_net_def *n = &d->nets[i];
		fprintf(f, "\n[net %s]\nbridge = %s\n", n->id, n->bridge);
		if (n->has_mac)
			fprintf(f, "mac = %02x:%02x:%02x:%02x:%02x:%02x\n", n->mac[0], n->mac[1], n->mac[2],
				n->mac[3], n->mac[4], n->mac[5]);
	}
	if (!strcmp(d->cpu, "baseline")) {
		CLEANUP_FREE char *lines = cpu_baseline_lines(&d->cpu_features);
		fprintf(f, "\n[cpu]\nvendor = %s\n%s", d->cpu_features.vendor, lines ? lines : "");
	}
	bool bad = ferror(f);
	if (fclose(f) || bad) {
		free(text);
		return NULL;
	}
	return text;
}

void vmdef_set_balloon(struct vm_definition *d, bool yes)
{
	d->balloon = yes ? VM_BALLOON_YES : VM_BALLOON_UNSAID;
}

bool vmdef_bridge_allowed(const char *list, const char *bridge)
{
	size_t n = strlen(bridge);
	if (!list || !*list)
		return true;
	for (const char *p = list; *p;) {
		p += strspn(p, ", \t");
		size_t len = strcspn(p, ", \t");
		if (len == n && !memcmp(p, bridge, n))
			return true;
		p += len;
	}
	return false;
}

int vmdef_check_foreign(const struct vm_definition *d, const char *bridges, struct error *err)
{
	const char *names[2 + VM_DISKS_MAX * (1 + VM_BACKING_MAX)];
	CLEANUP_FREE char(*below)[4096] = malloc(VM_DISKS_MAX * sizeof *below);
	unsigned n = 0;
	if (!below)
		return error_errno(err, ENOMEM, "definition");
	if (!vm_uuid_valid(d->uuid))
		return error_set(err, EPERM, "the definition has no valid uuid");
	if (!strncmp(d->cpu, "baseline:", strlen("baseline:")))
		return error_set(err, EPERM, "cpu = %.100s: names a file", d->cpu);
	if (!vm_file_name_valid(d->kernel))
		return error_set(err, EPERM, "kernel = %.100s: not a plain file name in the VM's own folder",
				 d->kernel);
	names[n++] = d->kernel;
	if (*d->initrd) {
		if (!vm_file_name_valid(d->initrd))
			return error_set(err, EPERM,
					 "initrd = %.100s: not a plain file name in the VM's own folder",
					 d->initrd);
		names[n++] = d->initrd;
	}
	for (unsigned i = 0; i < d->ndisks; i++) {
		if (!vm_file_name_valid(d->disks[i].path))
			return error_set(
				err, EPERM,
				"[disk %s] path = %.100s: not a plain file name in the VM's own folder",
				d->disks[i].id, d->disks[i].path);
		names[n++] = d->disks[i].path;
		int nbelow = vmdef_backing_names(&d->disks[i], below[i], &names[n]);
		for (int k = 0; k < nbelow; k++, n++)
			if (!vm_file_name_valid(names[n]))
				return error_set(err, EPERM,
						 "[disk %s] backing = %.100s: not a plain file name in the "
						 "VM's own folder",
						 d->disks[i].id, names[n]);
	}
	for (unsigned i = 0; i < n; i++)
		for (unsigned k = 0; k < i; k++)
			if (!strcmp(names[i], names[k]))
				return error_set(err, EPERM, "the file name %.100s is used twice", names[i]);
	if (strcmp(d->serial, "socket"))
		return error_set(err, EPERM, "serial = %.100s: only socket may arrive", d->serial);
	for (unsigned i = 0; i < d->nnets; i++)
		if (!vmdef_bridge_allowed(bridges, d->nets[i].bridge))
			return error_set(
				err, EPERM,
				"[net %s] bridge = %s: not among the bridges that this host allows (%s)",
				d->nets[i].id, d->nets[i].bridge, bridges);
	return 0;
}

static bool name_taken(const struct vm_definition *d, const char *name, const char *except)
{
	if (except != d->kernel && !strcmp(d->kernel, name))
		return true;
	if (except != d->initrd && !strcmp(d->initrd, name))
		return true;
	for (unsigned i = 0; i < d->ndisks; i++)
		if (except != d->disks[i].path && !strcmp(d->disks[i].path, name))
			return true;
	return false;
}

static void make_plain(struct vm_definition *d, char *field, size_t size, const char *wish)
{
	if (vm_file_name_valid(field) && !name_taken(d, field, field))
		return;
	snprintf(field, size, "%s", wish);
	for (unsigned i = 2; name_taken(d, field, field) || !vm_file_name_valid(field); i++)
		snprintf(field, size, "%.100s-%u", wish, i);
}

void vmdef_make_portable(struct vm_definition *d)
{
	for (unsigned i = 0; i < d->ndisks; i++) {
		char wish[64];
		snprintf(wish, sizeof wish, "%s.%s", d->disks[i].id, d->disks[i].format);
		make_plain(d, d->disks[i].path, sizeof d->disks[i].path, wish);
		d->disks[i].size_bytes = 0;
		d->disks[i].backing[0] = '\0';
	}
	make_plain(d, d->kernel, sizeof d->kernel, "kernel");
	if (*d->initrd)
		make_plain(d, d->initrd, sizeof d->initrd, "initrd");
	strcpy(d->serial, "socket");
	/* a file of this host's: it is read before a VM is made of it */
	if (!strncmp(d->cpu, "baseline:", strlen("baseline:")))
		d->cpu[0] = '\0';
}
