/* SPDX-License-Identifier: Apache-2.0 */
#include "host/ask.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "host/jsonl.h"
#include "host/registry.h"
#include "host/trust.h"
#include "net/conn.h"
#include "net/frame.h"

#define LIVE_ANSWER_TIMEOUT_MS 3000
/* Between two tries while a snvmm is being born, dies, or the daemon has the record's lock. */
#define LOCAL_RETRY_MS 50
#define LOCAL_TRIES    20
/* Every step raises the state or sets a flag; more than this is a bug in the table. */
#define SETTLE_STEPS_MAX 8

json_t *ask_report_to_json(const char *uuid, const struct handover_report *r)
{
	json_t *o = json_pack("{s:s, s:s, s:I, s:b, s:b}", "uuid", uuid, "state",
			      handover_state_name(r->state), "epoch", (json_int_t)r->epoch, "started",
			      (int)r->started, "attempt_open", (int)r->attempt_open);
	if (o && r->paging)
		json_object_set_new(o, "paging", json_true());
	return o;
}

int ask_report_from_json(const json_t *obj, bool asked, char uuid[VM_UUID_CHARS + 1],
			 struct handover_report *out, struct error *err)
{
	const char *id = json_string_value(json_object_get(obj, "uuid"));
	const char *state = json_string_value(json_object_get(obj, "state"));
	const json_t *epoch = json_object_get(obj, "epoch");
	if (!id || !vm_uuid_valid(id))
		return error_set(err, EPROTO, "report without a valid uuid");
	int s = state ? handover_state_parse(state) : -EINVAL;
	if (s < 0)
		return error_set(err, EPROTO, "report with the unknown state '%.32s'", state ? state : "");
	if (!json_is_integer(epoch) || json_integer_value(epoch) < 0)
		return error_set(err, EPROTO, "report without a valid epoch");
	strcpy(uuid, id);
	*out = (struct handover_report){.heard = true,
					.asked = asked,
					.state = (enum handover_state)s,
					.epoch = (uint64_t)json_integer_value(epoch),
					.started = json_is_true(json_object_get(obj, "started")),
					.attempt_open = json_is_true(json_object_get(obj, "attempt_open")),
					.paging = json_is_true(json_object_get(obj, "paging"))};
	return 0;
}

static int exchange(struct conn *conn, const char *uuid, const struct handover_report *own,
		    unsigned timeout_ms, struct handover_report *answer, struct error *err)
{
	json_t *ask = ask_report_to_json(uuid, own);
	int rc = ask ? frame_send_json(conn, FRAME_ASK, own->epoch, ask, timeout_ms, err)
		     : error_errno(err, ENOMEM, "ask");
	json_decref(ask);
	if (rc < 0)
		return rc;
	struct frame f = {0};
	rc = frame_read(conn, timeout_ms, &f, err);
	if (rc < 0)
		return rc;
	char about[VM_UUID_CHARS + 1];
	if (f.type == FRAME_REFUSE) {
		const char *why = json_string_value(json_object_get(f.json, "reason"));
		rc = error_set(err, EREMOTE, "%s", why ? why : "refused without a reason");
	} else if (f.type != FRAME_ANSWER) {
		rc = error_set(err, EPROTO, "%s instead of an answer", frame_type_name(f.type));
	} else {
		rc = ask_report_from_json(f.json, false, about, answer, err);
		if (!rc && strcmp(about, uuid))
			rc = error_set(err, EPROTO, "an answer about another VM");
	}
	frame_release(&f);
	return rc;
}

int ask_peer(const struct host_config *cfg, const char *peer, const char *address, const char *uuid,
	     const struct handover_report *own, unsigned timeout_ms, struct handover_report *answer,
	     struct error *err)
{
	struct trust_peer known;
	struct conn *conn = NULL;
	int rc = trust_peer_find(cfg, peer, &known, err);
	/* one that the configuration has lost still answers by its certificate of the CA */
	if (rc == -ENOENT && address && *address && *cfg->ca) {
		known = (struct trust_peer){.may_send = false};
		snprintf(known.name, sizeof known.name, "%s", peer);
		snprintf(known.address, sizeof known.address, "%s", address);
		rc = 0;
	}
	if (!rc)
		rc = trust_dial(cfg, &known, known.address, timeout_ms, &conn, err);
	if (!rc)
		rc = exchange(conn, uuid, own, timeout_ms, answer, err);
	conn_close(conn);
	return rc < 0 ? error_prefix(err, "asking host %s", peer) : 0;
}

/* What an action writes. False: it writes nothing. */
static bool next_record(const struct vm_record *rec, const struct handover_report *report,
			enum handover_action action, struct vm_record *to)
{
	*to = *rec;
	if (report && report->heard && report->epoch > to->peer_epoch)
		to->peer_epoch = report->epoch;
	switch (action) {
	case HANDOVER_ACT_TAKE_BACK:
		to->state = HANDOVER_OWNER;
		snprintf(to->reason, sizeof to->reason, "%s gave the arrival up", rec->peer);
		return true;
	case HANDOVER_ACT_RECORD_MOVED:
		to->state = HANDOVER_MOVED;
		to->flags = handover_note(rec, report);
		snprintf(to->reason, sizeof to->reason, "%s said that it owns the VM", rec->peer);
		return true;
	case HANDOVER_ACT_NOTE:
	case HANDOVER_ACT_IN_DOUBT:
		to->flags = handover_note(rec, report);
		return to->flags != rec->flags;
	case HANDOVER_ACT_ABANDON:
		to->state = HANDOVER_ABANDONED;
		snprintf(to->reason, sizeof to->reason, "the arrival ended before the VM started here");
		return true;
	case HANDOVER_ACT_CONFIRM:
		to->state = HANDOVER_OWNER;
		to->flags &= ~(uint32_t)(RECORD_FORCED | RECORD_HIGHER_SEEN);
		snprintf(to->reason, sizeof to->reason, "%s confirmed that it gave the VM up", rec->peer);
		return true;
	default:
		return false;
	}
}

int settle_record(struct record *r, struct vm_record *rec, const struct handover_report *report,
		  enum handover_action *next, struct error *err)
{
	struct handover_self self = {.live = false};
	for (int step = 0; step < SETTLE_STEPS_MAX; step++) {
		int rc = record_load(r, rec, err);
		if (rc < 0)
			return rc;
		enum handover_action action = handover_decide(rec, &self, report);
		struct vm_record to;
		*next = action;
		if (action == HANDOVER_ACT_FORGET)
			return record_remove(r, err);
		if (!next_record(rec, report, action, &to))
			return 0;
		if (to.state == rec->state)
			rc = record_store(r, &to, err);
		else
			rc = record_compare_and_set(r, rec->state, rec->epoch, &to, NULL, err);
		if (rc < 0)
			return rc;
		*rec = to;
		if (action == HANDOVER_ACT_IN_DOUBT)
			return 0;
	}
	return error_set(err, EPROTO, "VM %s: the record in state %s does not settle", rec->name,
			 handover_state_name(rec->state));
}

/* The snvmm that holds the record's lock answers. -EAGAIN when it cannot be reached now. */
static int forward(const struct host_config *cfg, struct record *r, const char *peer_name, const json_t *ask,
		   uint64_t epoch, json_t **answer, struct error *err)
{
	struct vm_record hint;
	char folder[REGISTRY_PATH_BYTES], path[REGISTRY_PATH_BYTES + 16];
	struct jsonl *j = NULL;
	int rc = record_load(r, &hint, err);
	if (!rc)
		rc = registry_path(cfg, hint.folder, folder, err);
	if (rc < 0)
		return rc;
	snprintf(path, sizeof path, "%s/snvmm.sock", folder);
	if (jsonl_connect(path, 1000, &j, err) < 0)
		return -EAGAIN;
	json_t *request = json_pack("{s:s, s:s, s:s, s:I, s:O}", "cmd", "ask", "uuid", hint.uuid, "peer",
				    peer_name, "epoch", (json_int_t)epoch, "report", (json_t *)ask);
	json_t *reply = NULL;
	rc = request ? jsonl_call(j, request, &reply, NULL, LIVE_ANSWER_TIMEOUT_MS, err)
		     : error_errno(err, ENOMEM, "ask");
	json_decref(request);
	jsonl_close(j);
	if (rc < 0)
		return -EAGAIN;
	json_t *inner = json_object_get(reply, "answer");
	*answer = json_incref(json_is_object(inner) ? inner : reply);
	json_decref(reply);
	return 0;
}

static int answer_from(const char *uuid, const struct vm_record *rec, json_t **answer, struct error *err)
{
	struct handover_self self = {.live = false};
	struct handover_report report;
	handover_describe(rec, &self, false, &report);
	*answer = ask_report_to_json(uuid, &report);
	return *answer ? 0 : error_errno(err, ENOMEM, "answer");
}

/* With the lock: settle, then describe. */
static int answer_locked(struct record *r, const char *peer_name, const struct handover_report *report,
			 json_t **answer, struct error *err)
{
	struct vm_record rec;
	enum handover_action next = HANDOVER_ACT_NONE;
	int rc = record_load(r, &rec, err);
	if (rc < 0)
		return rc;
	/* what another than the other side of this VM says about it does not count */
	bool counts = !strcmp(rec.peer, peer_name);
	if (counts)
		rc = settle_record(r, &rec, report, &next, err);
	if (rc < 0)
		return rc;
	return answer_from(rec.uuid, next == HANDOVER_ACT_FORGET ? NULL : &rec, answer, err);
}

int ask_answer_once(const struct host_config *cfg, const char *peer_name, const json_t *ask, json_t **answer,
		    struct error *err)
{
	char uuid[VM_UUID_CHARS + 1];
	struct handover_report report;
	struct record *r = NULL;
	*answer = NULL;
	struct trust_peer peer;
	if (trust_peer_find(cfg, peer_name, &peer, NULL) < 0)
		return error_set(err, EPERM, "host %.63s is not a peer of %s", peer_name, cfg->name);
	int rc = ask_report_from_json(ask, true, uuid, &report, err);
	if (rc < 0)
		return rc;
	rc = record_open(cfg->state_dir, uuid, &r, err);
	if (rc == -ENOENT)
		return answer_from(uuid, NULL, answer, err);
	if (rc < 0)
		return rc;
	rc = record_lock(r, 0, err);
	if (!rc)
		rc = answer_locked(r, peer_name, &report, answer, err);
	else if (rc == -EBUSY)
		rc = forward(cfg, r, peer_name, ask, report.epoch, answer, err);
	else if (rc == -ENOENT)
		rc = -EAGAIN; /* removed meanwhile: look again */
	record_close(r);
	return rc == -EAGAIN
		       ? error_set(err, EAGAIN, "host %s cannot answer about VM %s now", cfg->name, uuid)
		       : rc;
}

int ask_answer_local(const struct host_config *cfg, const char *peer_name, const json_t *ask, json_t **answer,
		     struct error *err)
{
	int rc = -EAGAIN;
	for (int i = 0; rc == -EAGAIN && i < LOCAL_TRIES; i++) {
		if (i)
			clock_sleep_ms(LOCAL_RETRY_MS);
		rc = ask_answer_once(cfg, peer_name, ask, answer, err);
	}
	return rc;
}
