/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/libsnmigrate/session.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>

#include "base/clock.h"
#include "host/client.h"
#include "host/exit.h"

#define ANSWER_TIMEOUT_MS 60000
#define RETRY_MS	  250
#define LINE_TIMEOUT_MS	  250 /* for the rest of a line */

static int ask(struct session *m, json_t *request, struct error *err)
{
	int rc = client_connect(m->control, &m->link, err);
	if (!rc)
		rc = jsonl_write(m->link, request, -1, err);
	json_decref(request);
	if (rc < 0) {
		jsonl_close(m->link);
		m->link = NULL;
		return rc;
	}
	m->state = SESSION_ASKED;
	m->asked_ms = clock_now_ms();
	return 0;
}

int session_begin(struct session *m, const char *control, const char *vm, json_t *request, struct error *err)
{
	m->control = control;
	snprintf(m->vm, sizeof m->vm, "%s", vm);
	if (!request)
		return error_errno(err, ENOMEM, "request");
	return ask(m, request, err);
}

json_t *session_watch_request(const struct session *m)
{
	json_t *o = json_pack("{s:s, s:s, s:I}", "cmd", "watch", "vm", m->vm, "epoch", m->epoch);
	if (*m->uuid)
		json_object_set_new(o, "uuid", json_string(m->uuid));
	return o;
}

int session_fd(const struct session *m)
{
	return m->link ? jsonl_fd(m->link) : -1;
}

void session_close(struct session *m)
{
	jsonl_close(m->link);
	m->link = NULL;
	m->state = SESSION_DONE;
}

/* The daemon has gone: the move goes on without it, and a new one will know. */
static enum session_news lose(struct session *m)
{
	uint64_t now = clock_now_ms();
	bool known = m->lost_ms != 0;
	jsonl_close(m->link);
	m->link = NULL;
	m->state = SESSION_LOST;
	m->retry_ms = now + RETRY_MS;
	if (!known)
		m->lost_ms = now;
	return known ? SESSION_NOTHING : SESSION_GONE;
}

static enum session_news look_again(struct session *m, struct error *err)
{
	uint64_t now = clock_now_ms();
	if (now < m->retry_ms)
		return SESSION_NOTHING;
	if (now >= m->lost_ms + SESSION_RECONNECT_MS) {
		error_set(err, ETIMEDOUT, "snmigrated does not answer");
		session_close(m);
		return SESSION_GIVEN_UP;
	}
	if (ask(m, session_watch_request(m), NULL) < 0)
		m->retry_ms = now + RETRY_MS;
	return SESSION_NOTHING;
}

static enum session_news take_answer(struct session *m, json_t *answer, int *status, struct error *err)
{
	if (!json_is_true(json_object_get(answer, "ok"))) {
		if (m->accepted) /* a daemon that has just started may not know the VM yet */
			return lose(m);
		const char *why = json_string_value(json_object_get(answer, "error"));
		const json_t *exit_status = json_object_get(answer, "exit");
		*status = json_is_integer(exit_status) ? (int)json_integer_value(exit_status) : EXIT_FAILED;
		error_set(err, EREMOTE, "%s", why ? why : "refused without a reason");
		session_close(m);
		return SESSION_REFUSED;
	}
	const char *uuid = json_string_value(json_object_get(answer, "uuid"));
	if (uuid)
		snprintf(m->uuid, sizeof m->uuid, "%s", uuid);
	const char *from = json_string_value(json_object_get(answer, "host"));
	if (from)
		snprintf(m->from, sizeof m->from, "%s", from);
	m->epoch = json_integer_value(json_object_get(answer, "epoch"));
	m->state = SESSION_FOLLOWS;
	bool again = m->accepted;
	m->accepted = true;
	m->lost_ms = 0;
	return again ? SESSION_BACK : SESSION_BEGINS;
}

static bool readable(struct session *m)
{
	struct pollfd p = {.fd = jsonl_fd(m->link), .events = POLLIN};
	return jsonl_pending(m->link) || poll(&p, 1, 0) > 0;
}

enum session_news session_read(struct session *m, json_t **event, int *status, struct error *err)
{
	*event = NULL;
	*status = 0;
	if (m->state == SESSION_DONE)
		return SESSION_NOTHING;
	if (m->state == SESSION_LOST)
		return look_again(m, err);
	bool late = m->state == SESSION_ASKED && clock_now_ms() - m->asked_ms > ANSWER_TIMEOUT_MS;
	if (!late && !readable(m))
		return SESSION_NOTHING;
	json_t *line = NULL;
	int rc = late ? error_set(err, ETIMEDOUT, "no answer within %u s", ANSWER_TIMEOUT_MS / 1000)
		      : jsonl_read(m->link, &line, NULL, LINE_TIMEOUT_MS, err);
	if (rc == -ETIMEDOUT && !late)
		return SESSION_NOTHING;
	if (rc < 0 && !m->accepted) {
		*status = EXIT_FAILED;
		session_close(m);
		return SESSION_REFUSED;
	}
	if (rc < 0)
		return lose(m);
	if (m->state == SESSION_ASKED) {
		enum session_news news = take_answer(m, line, status, err);
		json_decref(line);
		return news;
	}
	*event = line;
	if (!json_object_get(line, "result"))
		return SESSION_EVENT;
	session_close(m);
	return SESSION_END;
}

int call_begin(struct call *c, const char *control, json_t *request, struct error *err)
{
	int rc = request ? client_connect(control, &c->link, err) : error_errno(err, ENOMEM, "request");
	if (!rc)
		rc = jsonl_write(c->link, request, -1, err);
	json_decref(request);
	c->asked_ms = clock_now_ms();
	if (rc < 0)
		call_close(c);
	return rc;
}

int call_read(struct call *c, json_t **reply, struct error *err)
{
	*reply = NULL;
	bool late = clock_now_ms() - c->asked_ms > ANSWER_TIMEOUT_MS;
	struct pollfd p = {.fd = jsonl_fd(c->link), .events = POLLIN};
	if (!late && !jsonl_pending(c->link) && poll(&p, 1, 0) <= 0)
		return -EAGAIN;
	int rc = jsonl_read(c->link, reply, NULL, LINE_TIMEOUT_MS, err);
	if (rc == -ETIMEDOUT && !late)
		return -EAGAIN;
	call_close(c);
	if (!rc && !json_is_true(json_object_get(*reply, "ok"))) {
		const char *why = json_string_value(json_object_get(*reply, "error"));
		rc = error_set(err, EREMOTE, "%s", why ? why : "refused without a reason");
		json_decref(*reply);
		*reply = NULL;
	}
	return rc;
}

void call_close(struct call *c)
{
	jsonl_close(c->link);
	c->link = NULL;
}
