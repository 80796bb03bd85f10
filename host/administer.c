/* SPDX-License-Identifier: Apache-2.0 */
#include "host/administer.h"

#include <errno.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "host/jsonl.h"

#define CONNECT_TIMEOUT_MS 10000
/* A guest that is asked to power itself off takes a while. */
#define ANSWER_TIMEOUT_MS 150000

static void cleanup_json(json_t **o)
{
	json_decref(*o);
}

static bool is_for_others(const char *cmd)
{
	static const char *const commands[] = {"list",	       "info",		 "start",	"stop",
					       "pause",	       "resume",	 "delete",	"cancel",
					       "tune",	       "status",	 "peer-list",	"dirty-rate",
					       "partial-list", "partial-delete", "maintenance", "balloon"};
	for (size_t i = 0; cmd && i < ARRAY_SIZE(commands); i++)
		if (!strcmp(cmd, commands[i]))
			return true;
	return false;
}

int administer_ask(const struct host_config *cfg, const char *host, json_t *request, json_t **reply,
		   struct error *err)
{
	struct trust_peer p;
	struct conn *conn = NULL;
	struct frame f = {0};
	*reply = NULL;
	int rc = trust_peer_find(cfg, host, &p, err);
	if (!rc)
		rc = trust_dial(cfg, &p, p.address, CONNECT_TIMEOUT_MS, &conn, err);
	if (!rc)
		rc = frame_send_json(conn, FRAME_ADMINISTER, 0, request, CONNECT_TIMEOUT_MS, err);
	if (!rc)
		rc = frame_read(conn, ANSWER_TIMEOUT_MS, &f, err);
	if (rc < 0) {
		error_prefix(err, "host %.63s", host);
	} else if (f.type == FRAME_REFUSE) {
		const char *why = json_string_value(json_object_get(f.json, "reason"));
		rc = error_set(err, EPERM, "host %s refused: %.300s", host, why ? why : "no reason given");
	} else if (f.type != FRAME_ANSWER || !json_is_object(json_object_get(f.json, "reply"))) {
		rc = error_set(err, EPROTO, "host %s answered with %s", host, frame_type_name(f.type));
	} else {
		*reply = json_incref(json_object_get(f.json, "reply"));
	}
	frame_release(&f);
	conn_close(conn);
	return rc;
}

static int ask_daemon(const struct host_config *cfg, json_t *request, json_t **reply, struct error *err)
{
	struct jsonl *j = NULL;
	int rc = jsonl_connect(cfg->control, CONNECT_TIMEOUT_MS, &j, err);
	if (!rc)
		rc = jsonl_write(j, request, -1, err);
	if (!rc)
		rc = jsonl_read(j, reply, NULL, ANSWER_TIMEOUT_MS, err);
	jsonl_close(j);
	return rc;
}

int administer_answer(const struct host_config *cfg, const struct trust_peer *peer, struct conn *conn,
		      const struct frame *frame, struct error *err)
{
	CLEANUP(cleanup_json) json_t *reply = NULL;
	const char *cmd = json_string_value(json_object_get(frame->json, "cmd"));
	int rc = 0;
	if (!peer->may_administer)
		rc = trust_refuse_administer(cfg, peer, err);
	else if (!is_for_others(cmd))
		rc = error_set(err, EPERM, "'%.32s' is not among the commands that other hosts may send",
			       cmd ? cmd : "");
	else
		rc = ask_daemon(cfg, frame->json, &reply, err);
	if (!rc)
		log_info("host %s: %s, on behalf of its administrator", peer->name, cmd);
	CLEANUP(cleanup_json)
	json_t *o = rc ? json_pack("{s:o}", "reason", jsonl_text(err->message))
		       : json_pack("{s:O}", "reply", reply);
	int sent = frame_send_json(conn, rc ? FRAME_REFUSE : FRAME_ANSWER, frame->epoch, o,
				   CONNECT_TIMEOUT_MS, rc ? NULL : err);
	return rc ? rc : sent;
}
