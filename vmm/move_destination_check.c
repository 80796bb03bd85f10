/* SPDX-License-Identifier: Apache-2.0 */
/* snmigrate check, at the destination: says what this host has, and lets the link be measured. Nothing is
 * made. */
#include <errno.h>
#include <string.h>
#include <sys/statvfs.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "host/facts.h"
#include "vmm/move_destination.h"
#include "vmm/tap.h"

#define ANSWER_TIMEOUT_MS 10000
#define BRIDGE_NAME_MAX	  15
/* What a peer may send to measure the link. */
#define PROBE_BYTES_MAX	 (UINT64_C(512) << 20)
#define PROBE_FRAMES_MAX 100000
#define PROBE_TIME_MS	 30000

static json_t *sentence_or_null(int rc, const struct error *err)
{
	return rc ? jsonl_text(err->message) : json_null();
}

/* Of the bridges that the VM needs. */
static json_t *bridges(struct arrival *a, const json_t *asked, struct error *err)
{
	json_t *list = json_array(), *v;
	size_t i;
	json_array_foreach(asked, i, v)
	{
		struct error why = ERROR_INIT;
		const char *name = json_string_value(v);
		if (i >= VM_NETS_MAX || !name || strlen(name) > BRIDGE_NAME_MAX || !name_chars_valid(name)) {
			json_decref(list);
			error_set(err, EPROTO, "check: \"bridges\" is no list of at most %d names",
				  VM_NETS_MAX);
			return NULL;
		}
		int rc = vmdef_bridge_allowed(a->vm->cfg->bridges, name)
				 ? tap_bridge_check(name, &why)
				 : error_set(&why, EPERM, "bridge %s is not one that arriving VMs may use",
					     name);
		json_array_append_new(list, json_pack("{s:s, s:o, s:i}", "name", name, "error",
						      sentence_or_null(rc, &why), "mtu",
						      (int)facts_interface_mtu(name)));
	}
	return list;
}

static int add_kept(void *opaque, const struct partial *p)
{
	*(uint64_t *)opaque += p->allocated_bytes;
	return 0;
}

static json_t *disk(struct arrival *a, bool measure)
{
	const char *folder = a->vm->cfg->state_dir;
	struct disk_speed speed = {0};
	struct error why = ERROR_INIT;
	struct statvfs fs;
	uint64_t kept = 0, free_bytes = 0;
	if (!statvfs(folder, &fs))
		free_bytes = (uint64_t)fs.f_bavail * fs.f_frsize;
	/* they give way to an arrival */
	partial_each(a->vm->cfg, add_kept, &kept);
	int rc = measure ? facts_disk_speed(folder, &speed, &why) : 0;
	return json_pack("{s:I, s:I, s:I, s:I, s:I, s:o}", "free_bytes", (json_int_t)free_bytes, "kept_bytes",
			 (json_int_t)kept, "write_bytes_per_s", (json_int_t)speed.write_bytes_per_s,
			 "read_bytes_per_s", (json_int_t)speed.read_bytes_per_s, "sync_us",
			 (json_int_t)speed.sync_us, "error", sentence_or_null(rc, &why));
}

json_t *arrival_refusals(struct arrival *a, const char *uuid, const char *name, uint64_t memory_bytes)
{
	json_t *list = json_array(), *reply = NULL, *v;
	struct error why = ERROR_INIT;
	size_t i;
	json_t *q = json_pack("{s:s, s:s, s:s, s:s, s:I}", "cmd", "may-arrive", "uuid", uuid, "name", name,
			      "peer", a->peer, "memory_bytes", (json_int_t)memory_bytes);
	int rc = q ? jsonl_call(a->daemon, q, &reply, NULL, DAEMON_ANSWER_MS, &why) : -EPROTO;
	if (rc)
		json_array_append_new(list, jsonl_text(why.message));
	json_array_foreach(json_object_get(reply, "refusals"), i, v) if (json_is_string(v))
		json_array_append(list, v);
	json_decref(reply);
	json_decref(q);
	return list;
}

/* Of the VM that the question names, if it does. */
static json_t *refusals(struct arrival *a, const json_t *check)
{
	const char *uuid = json_string_value(json_object_get(check, "uuid"));
	const char *name = json_string_value(json_object_get(check, "name"));
	json_int_t memory = json_integer_value(json_object_get(check, "memory_bytes"));
	if (!uuid || !name || memory < 0)
		return json_array();
	return arrival_refusals(a, uuid, name, (uint64_t)memory);
}

static json_t *make_facts(struct arrival *a, const json_t *check, struct error *err)
{
	struct host_facts own;
	struct error why = ERROR_INIT;
	host_facts_collect("", &own);
	json_t *net = bridges(a, json_object_get(check, "bridges"), err);
	if (!net)
		return NULL;
	json_t *cpu = machine_cpu_describe_host(&why);
	json_t *o = json_pack("{s:s, s:s, s:[i,i], s:o, s:o, s:o, s:o, s:o, s:b}", "host", a->vm->cfg->name,
			      "program", SNM_VERSION, "versions", MOVE_PROTOCOL_MIN, MOVE_PROTOCOL_MAX, "own",
			      host_facts_to_json(&own), "bridges", net, "disk",
			      disk(a, json_is_true(json_object_get(check, "measure"))), "refusals",
			      refusals(a, check), "cpu", cpu ? cpu : json_null(), "allow_no_tls",
			      a->vm->cfg->allow_no_tls);
	if (!o)
		error_errno(err, ENOMEM, "check");
	else if (!cpu)
		json_object_set_new(o, "cpu_error", jsonl_text(why.message));
	/* last: what came before took its time */
	json_object_set_new(o, "clock_ns", json_integer((json_int_t)clock_realtime_ns()));
	return o;
}

/* An empty probe is answered at once, one with bytes in it is taken. Until the other side closes. */
static int serve_probes(struct conn *conn, struct error *err)
{
	uint64_t bytes = 0, until = clock_now_ms() + PROBE_TIME_MS;
	for (unsigned n = 0; n < PROBE_FRAMES_MAX && clock_now_ms() < until; n++) {
		struct frame f = {0};
		int rc = frame_read(conn, ANSWER_TIMEOUT_MS, &f, err);
		unsigned type = f.type, len = f.len;
		uint64_t epoch = f.epoch;
		frame_release(&f);
		if (rc == -ENODATA)
			return 0;
		if (!rc && type != FRAME_PROBE)
			rc = error_set(err, EPROTO, "check: %s instead of a probe", frame_type_name(type));
		bytes += len;
		if (!rc && bytes > PROBE_BYTES_MAX)
			rc = error_set(err, EPROTO, "check: more than %llu bytes of probes",
				       (unsigned long long)PROBE_BYTES_MAX);
		if (!rc && !len)
			rc = frame_send_bytes(conn, FRAME_PROBE, epoch, NULL, 0, ANSWER_TIMEOUT_MS, err);
		if (rc)
			return rc;
	}
	return error_set(err, ETIMEDOUT, "check: the other side measures for too long");
}

int arrival_answer_check(struct arrival *a, struct conn *conn, const struct frame *check, struct error *err)
{
	json_t *facts = make_facts(a, check->json, err);
	int rc = facts ? frame_send_json(conn, FRAME_FACTS, check->epoch, facts, ANSWER_TIMEOUT_MS, err)
		       : err->code;
	json_decref(facts);
	if (!rc)
		rc = serve_probes(conn, err);
	conn_close(conn);
	return rc;
}
