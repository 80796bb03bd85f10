/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A host with a valid certificate that sends what no honest source sends: one HELLO of its own making, then
 * what the case demands, over the real protocol (docs/protocol.md). Prints what came back: "refused:
 * SENTENCE", "aborted: SENTENCE", "accepted", "closed: SENTENCE"
 *
 * hostile_peer ADDRESS PEER CA CERT KEY CASE [EPOCH]
 * Exit status: 0 when the peer said or did something, 2 wrong usage, 3 when there was no connection.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "net/conn.h"
#include "net/frame.h"
#include "net/preamble.h"
#include "vmm/machine.h"
#include "vmm/move_hashes.h"

#define TIMEOUT_MS 10000
#define EPOCH	   1

struct hostile {
	struct conn *conn;
	json_t *hello;
	uint64_t epoch;
	char definition[4096];
	const char *name, *uuid;
};

static const char *const default_disks = "[disk root]\npath = root.raw\nformat = raw\n";
static const char junk[] = "GET /this-is-no-frame-at-all HTTP/1.1\r\nHost: example\r\n\r\n";

static void define(struct hostile *h, const char *vm_extra, const char *kernel, const char *rest)
{
	snprintf(h->definition, sizeof h->definition,
		 "[vm]\nname = %s\nuuid = %s\nmemory = 64M\ncpus = 1\nkernel = %s\nserial = socket\n%s%s",
		 h->name, h->uuid, kernel, vm_extra, rest);
	json_object_set_new(h->hello, "definition", json_string(h->definition));
}

static json_t *disk(const char *id, const char *format, json_int_t virtual_bytes)
{
	return json_pack("{s:s, s:s, s:I, s:I, s:i, s:s}", "id", id, "format", format, "virtual_bytes",
			 virtual_bytes, "allocated_bytes", (json_int_t)0, "cluster_bytes", 65536, "compat",
			 "1.1");
}

static void make_hello(struct hostile *h)
{
	struct error err = ERROR_INIT;
	json_t *cpu = machine_cpu_describe_host(&err);
	if (!cpu) {
		fprintf(stderr, "hostile_peer: %s\n", err.message);
		exit(3);
	}
	h->hello = json_pack(
		"{s:[i,i], s:s, s:s, s:s, s:s, s:[{s:s, s:i}], s:[o], s:o, s:I, s:i, s:[[i,i]], s:b, s:b}",
		"versions", 1, 1, "program", "hostile", "host", "hosta", "uuid", h->uuid, "name", h->name,
		"files", "name", "kernel", "size", 4096, "disks", disk("root", "raw", 1 << 20), "cpu", cpu,
		"memory_bytes", (json_int_t)(64 << 20), "streams", 1, "regions", 0, 4, "suspend", 0, "no_tls",
		0);
	define(h, "", "kernel", default_disks);
}

/* A feature that this host lacks, of leaf 7 EBX: AVX-512 and older. */
static void cpu_feature(struct hostile *h)
{
	json_t *table = json_object_get(json_object_get(h->hello, "cpu"), "cpuid"), *e;
	size_t i;
	json_array_foreach(table, i, e)
	{
		/* function, index, flags, eax, ebx, ecx, edx */
		if (json_integer_value(json_array_get(e, 0)) != 7 ||
		    json_integer_value(json_array_get(e, 1)) != 0)
			continue;
		json_array_set_new(e, 4, json_integer(0xffffffff));
		return;
	}
	json_array_append_new(table, json_pack("[i,i,i,i,I,i,i]", 7, 0, 1, 0, (json_int_t)0xffffffff, 0, 0));
}

static void cpu_vendor(struct hostile *h)
{
	json_t *table = json_object_get(json_object_get(h->hello, "cpu"), "cpuid"), *e;
	size_t i;
	json_array_foreach(table, i, e)
	{
		if (json_integer_value(json_array_get(e, 0)) != 0)
			continue;
		/* "VIA VIA VIA " */
		json_array_set_new(e, 4, json_integer(get_le32((const uint8_t *)"VIA ")));
		json_array_set_new(e, 5, json_integer(get_le32((const uint8_t *)"VIA ")));
		json_array_set_new(e, 6, json_integer(get_le32((const uint8_t *)"VIA ")));
	}
}

static json_t *first(struct hostile *h, const char *list)
{
	return json_array_get(json_object_get(h->hello, list), 0);
}

static void device(struct hostile *h, const char *path)
{
	json_object_set_new(first(h, "disks"), "mode", json_string("device"));
	json_object_set_new(first(h, "disks"), "device", json_string(path));
}

/* A qcow2 disk over files that travel. names: of the definition; NULL: none. */
static void backing(struct hostile *h, const char *names, unsigned nlayers)
{
	char text[256];
	snprintf(text, sizeof text, "[disk root]\npath = root.qcow2\nformat = qcow2\n%s%s\n",
		 names ? "backing = " : "", names ? names : "");
	define(h, "", "kernel", text);
	json_t *layers = json_array();
	for (unsigned i = 0; i < nlayers; i++)
		json_array_append_new(layers, disk("below", i + 1 < nlayers ? "qcow2" : "raw", 1 << 20));
	json_t *o = first(h, "disks");
	json_object_set_new(o, "format", json_string("qcow2"));
	json_object_set_new(o, "mode", json_string("chain"));
	json_object_set_new(o, "backing", json_pack("{s:o}", "layers", layers));
}

/* Changes to the HELLO. False: the case is none of these. */
/* A source of version 2. True: that alone is the case. */
static bool change_hash_options(struct hostile *h, const char *what)
{
	json_t *o = h->hello, *d = json_array_get(json_object_get(o, "disks"), 0);
	json_object_set_new(o, "versions", json_pack("[i,i]", 2, 2));
	json_object_set_new(o, "hash_seed", json_string("0123456789abcdef"));
	json_object_set_new(d, "chunk_bytes", json_integer(1 << 20));
	if (!strcmp(what, "hash-seed-none"))
		json_object_del(o, "hash_seed");
	else if (!strcmp(what, "hash-seed-long"))
		json_object_set_new(o, "hash_seed", json_string("0123456789abcdef0"));
	else if (!strcmp(what, "hash-chunks-tiny"))
		json_object_set_new(d, "chunk_bytes", json_integer(512));
	else if (!strcmp(what, "hash-chunks-odd"))
		json_object_set_new(d, "chunk_bytes", json_integer((1 << 20) + 512));
	else if (!strcmp(what, "hash-chunks-many"))
		json_object_set_new(d, "virtual_bytes", json_integer((json_int_t)1 << 45));
	else
		return false;
	return true;
}

static bool change_hello(struct hostile *h, const char *what)
{
	json_t *o = h->hello;
	char text[512];
	if (!strcmp(what, "honest")) {
		return true;
	} else if (!strcmp(what, "disk-path-parent")) {
		define(h, "", "kernel", "[disk root]\npath = ../../escaped\nformat = raw\n");
	} else if (!strcmp(what, "disk-path-absolute")) {
		define(h, "", "kernel", "[disk root]\npath = /etc/hostname\nformat = raw\n");
	} else if (!strcmp(what, "disk-path-ours")) {
		define(h, "", "kernel", "[disk root]\npath = vm.ini\nformat = raw\n");
	} else if (!strcmp(what, "kernel-path")) {
		define(h, "", "../../../../boot/vmlinuz", default_disks);
	} else if (!strcmp(what, "initrd-path")) {
		define(h, "initrd = /etc/shadow\n", "kernel", default_disks);
	} else if (!strcmp(what, "serial-file")) {
		snprintf(text, sizeof text,
			 "[vm]\nname = %s\nuuid = %s\nmemory = 64M\nkernel = kernel\nserial = "
			 "file:/etc/escaped\n%s",
			 h->name, h->uuid, default_disks);
		json_object_set_new(o, "definition", json_string(text));
	} else if (!strcmp(what, "definition-malformed")) {
		define(h, "cpus\n", "kernel", default_disks);
	} else if (!strcmp(what, "bridge-missing")) {
		define(h, "", "kernel",
		       "[disk root]\npath = root.raw\nformat = raw\n[net lan]\nbridge = nobr7\n");
	} else if (!strcmp(what, "backing-absolute")) {
		backing(h, "/etc/shadow", 1);
	} else if (!strcmp(what, "backing-unsaid")) {
		backing(h, "root.below1.raw, root.below2.raw", 1);
	} else if (!strcmp(what, "backing-many")) {
		backing(h, "root.below1.raw", 9);
	} else if (!strcmp(what, "backing-hash")) {
		backing(h, NULL, 0);
		json_object_set_new(first(h, "disks"), "mode", json_string("reuse"));
		json_object_set_new(
			first(h, "disks"), "backing",
			json_pack("{s:s, s:i}", "sha256", "../../etc/shadow", "virtual_bytes", 512));
	} else if (!strcmp(what, "device-not-allowed")) {
		device(h, "/dev/vda");
	} else if (!strcmp(what, "device-parent")) {
		device(h, "/dev/snm-test/../vda");
	} else if (!strcmp(what, "device-file")) {
		device(h, "/dev/snm-test/none");
	} else if (!strcmp(what, "mode-unknown")) {
		json_object_set_new(first(h, "disks"), "mode", json_string("cloud"));
	} else if (!strcmp(what, "disk-list-short")) {
		json_object_set_new(o, "disks", json_array());
	} else if (!strcmp(what, "disk-id-other")) {
		json_object_set_new(first(h, "disks"), "id", json_string("data"));
	} else if (!strcmp(what, "disk-huge")) {
		json_object_set_new(first(h, "disks"), "virtual_bytes", json_integer(INT64_MAX - 511));
	} else if (!strcmp(what, "disk-negative")) {
		json_object_set_new(first(h, "disks"), "virtual_bytes", json_integer(-512));
	} else if (!strcmp(what, "disk-allocated-huge")) {
		json_object_set_new(first(h, "disks"), "virtual_bytes", json_integer((json_int_t)1 << 49));
		json_object_set_new(first(h, "disks"), "allocated_bytes", json_integer((json_int_t)1 << 49));
	} else if (!strcmp(what, "region-outside")) {
		json_object_set_new(o, "regions", json_pack("[[i,i]]", 30, 30));
	} else if (!strcmp(what, "region-overflow")) {
		json_object_set_new(o, "regions", json_pack("[[i,I]]", 1, (json_int_t)INT64_MAX));
	} else if (!strcmp(what, "file-foreign-name")) {
		json_object_set_new(first(h, "files"), "name", json_string("../kernel"));
	} else if (!strcmp(what, "file-huge")) {
		json_object_set_new(first(h, "files"), "size", json_integer((json_int_t)1 << 60));
	} else if (!strcmp(what, "file-twice")) {
		json_array_append_new(json_object_get(o, "files"),
				      json_pack("{s:s, s:i}", "name", "kernel", "size", 1));
	} else if (!strcmp(what, "memory-huge")) {
		snprintf(text, sizeof text, "[vm]\nname = %s\nuuid = %s\nmemory = 8T\nkernel = kernel\n%s",
			 h->name, h->uuid, default_disks);
		json_object_set_new(o, "definition", json_string(text));
	} else if (!strcmp(what, "streams-many")) {
		json_object_set_new(o, "streams", json_integer(100000));
	} else if (!strcmp(what, "name-other")) {
		json_object_set_new(o, "name", json_string("othername"));
	} else if (!strcmp(what, "uuid-path")) {
		json_object_set_new(o, "uuid", json_string("../../../../../../../../tmp/escaped-uuid-12"));
	} else if (!strcmp(what, "versions-newer")) {
		json_object_set_new(o, "versions", json_pack("[i,i]", 9, 12));
	} else if (!strcmp(what, "versions-older")) {
		json_object_set_new(o, "versions", json_pack("[i,i]", 0, 0));
	} else if (!strncmp(what, "hash-", 5) || !strcmp(what, "sums-early")) {
		return change_hash_options(h, what);
	} else if (!strcmp(what, "cpu-feature")) {
		cpu_feature(h);
	} else if (!strcmp(what, "cpu-vendor")) {
		cpu_vendor(h);
	} else if (!strcmp(what, "cpu-none")) {
		json_object_del(o, "cpu");
	} else if (!strcmp(what, "no-tls")) {
		json_object_set_new(o, "no_tls", json_true());
	} else if (!strcmp(what, "epoch-zero")) {
		h->epoch = 0;
	} else if (!strcmp(what, "empty-hello")) {
		json_object_clear(o);
	} else {
		return false;
	}
	return true;
}

/* Header of a frame by hand: for what frame_send_* would refuse to send. */
static int send_raw(struct hostile *h, uint16_t type, uint32_t len, const char *payload)
{
	uint8_t raw[FRAME_HEADER_BYTES];
	frame_header_encode(
		raw, &(struct frame_header){.type = type, .epoch = h->epoch, .len = len, .checksum = 1});
	int rc = conn_write_full(h->conn, raw, sizeof raw, TIMEOUT_MS, NULL);
	return rc || !payload ? rc : conn_write_full(h->conn, payload, strlen(payload), TIMEOUT_MS, NULL);
}

static int send_file(struct hostile *h, uint32_t index, uint64_t offset)
{
	uint8_t buf[12 + 8192] = {0};
	put_be32(buf, index);
	put_be64(buf + 4, offset);
	return frame_send_bytes(h->conn, FRAME_FILE, h->epoch, buf, sizeof buf, TIMEOUT_MS, NULL);
}

static int send_json(struct hostile *h, enum frame_type type, uint64_t epoch, json_t *o)
{
	int rc = frame_send_json(h->conn, type, epoch, o, TIMEOUT_MS, NULL);
	json_decref(o);
	return rc;
}

static int send_ask(struct hostile *h, uint32_t disk, uint32_t n)
{
	uint8_t buf[HASH_ASK_BYTES];
	hash_ask_encode(buf, &(struct hash_ask){.id = 1, .disk = disk, .n = n});
	return frame_send_bytes(h->conn, FRAME_HASH_ASK, h->epoch, buf, sizeof buf, TIMEOUT_MS, NULL);
}

/* After an accepted HELLO. False: unknown case. */
static bool misbehave(struct hostile *h, const char *what)
{
	if (!strcmp(what, "wrong-epoch"))
		send_json(h, FRAME_PHASE, h->epoch + 1, json_pack("{s:s}", "phase", "storage"));
	else if (!strcmp(what, "unknown-type"))
		send_raw(h, 99, 0, NULL);
	else if (!strcmp(what, "junk"))
		conn_write_full(h->conn, junk, strlen(junk), TIMEOUT_MS, NULL);
	else if (!strcmp(what, "frame-too-long"))
		send_raw(h, FRAME_PHASE, UINT32_MAX, NULL);
	else if (!strcmp(what, "checksum"))
		send_raw(h, FRAME_PHASE, 2, "{}");
	else if (!strcmp(what, "commit-early"))
		send_json(h, FRAME_COMMIT, h->epoch, json_object());
	else if (!strcmp(what, "state-early"))
		frame_send_bytes(h->conn, FRAME_DEVICE_STATE, h->epoch, "SNMSTATE", 8, TIMEOUT_MS, NULL);
	else if (!strcmp(what, "hash-early"))
		send_ask(h, 0, 1);
	else if (!strcmp(what, "hash-disk"))
		send_ask(h, 7, 1);
	else if (!strcmp(what, "hash-many"))
		send_ask(h, 0, UINT32_MAX);
	else if (!strcmp(what, "sums-early"))
		frame_send_bytes(h->conn, FRAME_SUMS, h->epoch, "\0\0\0\1", 4, TIMEOUT_MS, NULL);
	else if (!strcmp(what, "prepare-early"))
		send_json(h, FRAME_PHASE, h->epoch, json_pack("{s:s}", "phase", "prepare"));
	else if (!strcmp(what, "phase-unknown"))
		send_json(h, FRAME_PHASE, h->epoch, json_pack("{s:s}", "phase", "party"));
	else if (!strcmp(what, "hello-again"))
		frame_send_json(h->conn, FRAME_HELLO, h->epoch, h->hello, TIMEOUT_MS, NULL);
	else if (!strcmp(what, "file-index"))
		send_file(h, 9, 0);
	else if (!strcmp(what, "file-beyond"))
		send_file(h, 0, 0); /* 8 KiB of 4 */
	else if (!strcmp(what, "file-gap"))
		send_file(h, 0, 1ull << 40);
	else if (!strcmp(what, "file-missing"))
		send_json(h, FRAME_PHASE, h->epoch, json_pack("{s:s}", "phase", "storage"));
	else if (!strcmp(what, "silent"))
		;
	else if (!strcmp(what, "vanish"))
		conn_shutdown(h->conn);
	else
		return false;
	return true;
}

/* What the destination says, beats aside. Returns the type, or 0 when the connection ended. */
static int hear(struct hostile *h)
{
	struct error err = ERROR_INIT;
	uint64_t until = clock_now_ms() + TIMEOUT_MS;
	while (clock_now_ms() < until) {
		struct frame f;
		if (frame_read(h->conn, TIMEOUT_MS, &f, &err)) {
			printf("closed: %s\n", err.message);
			return 0;
		}
		int type = (int)f.type;
		const char *s = f.json ? json_string_value(json_object_get(f.json, "reason")) : NULL;
		if (type == FRAME_REFUSE)
			printf("refused: %s\n", s ? s : "");
		else if (type == FRAME_ABORT || type == FRAME_ABANDONED)
			printf("aborted: %s\n", s ? s : "");
		frame_release(&f);
		if (type != FRAME_BEAT)
			return type;
	}
	printf("closed: nothing but beats for %d ms\n", TIMEOUT_MS);
	return 0;
}

static void check(int rc, const struct error *err)
{
	if (!rc)
		return;
	fprintf(stderr, "hostile_peer: %s\n", err->message);
	exit(3);
}

int main(int argc, char **argv)
{
	if (argc != 7 && argc != 8) {
		fprintf(stderr, "usage: hostile_peer ADDRESS PEER CA CERT KEY CASE [EPOCH]\n");
		return 2;
	}
	struct error err = ERROR_INIT;
	struct hostile h = {
		.epoch = EPOCH, .name = "hostile", .uuid = "5a5a5a5a-1111-4222-8333-444455556666"};
	if (argc == 8)
		h.epoch = strtoull(argv[7], NULL, 10);
	setvbuf(stdout, NULL, _IOLBF, 0);
	make_hello(&h);
	const char *what = argv[6];
	bool in_hello = change_hello(&h, what);
	struct tls_context *tls;
	check(tls_context_create(argv[3], argv[4], argv[5], &tls, &err), &err);
	int fd = net_connect(argv[1], TIMEOUT_MS, &err);
	check(fd < 0 ? fd : 0, &err);
	struct preamble pre = {.channel = CHANNEL_CONTROL, .token = "-"};
	check(preamble_write(fd, &pre, TIMEOUT_MS, &err), &err);
	check(conn_tls_connect(fd, tls, argv[2], TIMEOUT_MS, &h.conn, &err), &err);
	if (!strcmp(what, "first-not-hello"))
		send_json(&h, FRAME_COMMIT, h.epoch, json_object());
	else if (!strcmp(what, "first-junk"))
		conn_write_full(h.conn, junk, strlen(junk), TIMEOUT_MS, NULL);
	else
		check(frame_send_json(h.conn, FRAME_HELLO, h.epoch, h.hello, TIMEOUT_MS, &err), &err);
	int type = hear(&h);
	if (type == FRAME_HELLO_OK) {
		printf("accepted\n");
		if (!in_hello && !misbehave(&h, what)) {
			fprintf(stderr, "hostile_peer: unknown case %s\n", what);
			return 2;
		}
		if (!in_hello)
			hear(&h);
	}
	conn_close(h.conn);
	tls_context_free(tls);
	json_decref(h.hello);
	return 0;
}
