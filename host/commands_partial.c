/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <string.h>
#include <time.h>

#include "host/daemon.h"
#include "host/exit.h"
#include "host/partial.h"

/* What is kept of arrivals that failed: no VMs, so that no other command sees them. */

static int list_one(void *opaque, const struct partial *p)
{
	int64_t age = (int64_t)time(NULL) - p->since_s;
	int64_t left = (int64_t)p->keep_s - (age > 0 ? age : 0);
	json_t *o = json_pack("{s:s, s:s, s:s, s:I, s:I, s:I}", "name", p->name, "uuid", p->uuid, "peer",
			      p->peer, "allocated_bytes", (json_int_t)p->allocated_bytes, "since",
			      (json_int_t)p->since_s, "expires_s", (json_int_t)(left > 0 ? left : 0));
	json_array_append_new(opaque, o);
	return 0;
}

int command_partial_list(struct command_context *c, struct error *err)
{
	json_t *list = json_array();
	partial_each(c->daemon->cfg, list_one, list);
	reply_ok(c->client, json_pack("{s:o}", "partials", list));
	return 0;
}

struct search {
	const char *name;
	char uuid[VM_UUID_CHARS + 1];
	unsigned found;
};

static int match(void *opaque, const struct partial *p)
{
	struct search *s = opaque;
	if (!strcmp(p->name, s->name) || !strcmp(p->uuid, s->name)) {
		strcpy(s->uuid, p->uuid);
		s->found++;
	}
	return 0;
}

int command_partial_delete(struct command_context *c, struct error *err)
{
	struct search s = {.name = json_string_value(json_object_get(c->request, "vm"))};
	if (!s.name)
		return error_set(err, EINVAL, "the request names no VM"), EXIT_USAGE;
	partial_each(c->daemon->cfg, match, &s);
	if (!s.found)
		return error_set(err, ENOENT, "nothing is kept here of an arrival of %.64s", s.name),
		       EXIT_REFUSED;
	if (s.found > 1)
		return error_set(err, EEXIST, "%u VMs named %.64s were to arrive here: give the UUID",
				 s.found, s.name),
		       EXIT_REFUSED;
	if (partial_remove(c->daemon->cfg, s.uuid, err) < 0)
		return EXIT_FAILED;
	reply_ok(c->client, NULL);
	return 0;
}
