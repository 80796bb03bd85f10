/* SPDX-License-Identifier: Apache-2.0 */
/* Which VM a name means, and what is said of one that is not here any more, or not yet. */
#include <errno.h>
#include <string.h>
#include <time.h>

#include "base/log.h"
#include "host/daemon.h"
#include "host/journal.h"
#include "host/recorder.h"

struct search {
	const struct host_config *cfg;
	const char *name;
	struct vm_record *out;
	bool found;
};

int record_hint(const struct host_config *cfg, const char *uuid, struct vm_record *rec)
{
	struct record *r = NULL;
	int rc = record_open(cfg->state_dir, uuid, &r, NULL);
	if (!rc)
		rc = record_load(r, rec, NULL);
	record_close(r);
	return rc;
}

bool vm_is_present(const struct vm_record *rec)
{
	return rec->state != HANDOVER_MOVED && rec->state != HANDOVER_ABANDONED;
}

static int search_each(void *opaque, const char *uuid)
{
	struct search *s = opaque;
	struct vm_record rec;
	if (record_hint(s->cfg, uuid, &rec) < 0 || (strcmp(rec.name, s->name) && strcmp(uuid, s->name)))
		return 0;
	/* a VM that is here goes before the tombstone of one with the same name */
	if (!s->found || vm_is_present(&rec))
		*s->out = rec;
	s->found = true;
	return 0;
}

/* When its last move from here to that host ended, as " at ..."; "" where the journal does not know. */
static void when_moved(struct daemon *d, const char *uuid, const char *where, char *out, size_t size)
{
	struct journal_statement q = {
		.sql = "SELECT ended_ms FROM move WHERE uuid = ?1 AND peer = ?2 AND direction = 'out' AND "
		       "result = "
		       "'moved' AND ended_ms IS NOT NULL ORDER BY ended_ms DESC LIMIT 1",
		.params = json_pack("[s, s]", uuid, where)};
	json_t *rows = NULL;
	struct tm tm;
	*out = '\0';
	journal_query(recorder_journal(d), &q, 1, &rows, NULL);
	json_int_t ms = json_integer_value(json_object_get(json_array_get(rows, 0), "ended_ms"));
	json_decref(rows);
	time_t t = (time_t)(ms / 1000);
	if (ms <= 0 || !localtime_r(&t, &tm) || !strftime(out, size, " at %Y-%m-%d %H:%M:%S", &tm))
		*out = '\0';
}

static int moved_away(struct daemon *d, const char *name, const char *uuid, const char *where,
		      struct error *err)
{
	char when[40];
	when_moved(d, uuid, where, when, sizeof when);
	return error_set(err, ENOENT, "VM %.64s is not on host %s any more: it moved to %s%s", name,
			 d->cfg->name, where, when);
}

/* The tombstone of a VM that moved away goes once the other host has it for good; what is kept of the move
 * still tells where it went. */
static int unknown_vm(struct daemon *d, const char *name, struct error *err)
{
	json_t *move = NULL;
	const char *result = NULL, *where = NULL, *uuid = NULL;
	if (move_result_find(d, name, &move)) {
		result = json_string_value(json_object_get(move, "result"));
		where = json_string_value(json_object_get(move, "destination"));
		uuid = json_string_value(json_object_get(move, "uuid"));
	}
	int rc = result && where && uuid && !strcmp(result, "moved")
			 ? moved_away(d, name, uuid, where, err)
			 : error_set(err, ENOENT, "no VM named %.64s on host %s", name, d->cfg->name);
	json_decref(move);
	return rc;
}

int vm_find(struct daemon *d, const char *name, struct vm_ref *out, struct error *err)
{
	memset(out, 0, sizeof *out);
	struct search s = {.cfg = d->cfg, .name = name, .out = &out->rec};
	int rc = record_list(d->cfg->state_dir, search_each, &s, err);
	if (rc < 0)
		return rc;
	if (!s.found)
		return unknown_vm(d, name, err);
	log_set_vm(out->rec.name);
	out->keeper = keeper_get(d, out->rec.uuid, err);
	if (!out->keeper)
		return err ? err->code : -ENOMEM;
	return registry_path(d->cfg, out->rec.folder, out->dir, err);
}

int vm_check_arrived(struct daemon *d, struct vm_ref *vm, struct error *err)
{
	if (vm->rec.state != HANDOVER_PREPARED || !keeper_is_live(vm->keeper))
		return 0;
	return error_set(
		err, EBUSY,
		"VM %s is arriving from host %s and is not host %s's yet: ask there (snmigrate watch, or "
		"snmigrate cancel, to end the move)",
		vm->rec.name, vm->rec.peer, d->cfg->name);
}

int vm_find_present(struct daemon *d, json_t *request, struct vm_ref *vm, struct error *err)
{
	const char *name = json_string_value(json_object_get(request, "vm"));
	if (!name)
		return error_set(err, EINVAL, "the request names no VM");
	int rc = vm_find(d, name, vm, err);
	if (rc < 0 || vm_is_present(&vm->rec))
		return rc;
	if (vm->rec.state == HANDOVER_MOVED)
		return moved_away(d, vm->rec.name, vm->rec.uuid, vm->rec.peer, err);
	return error_set(err, ENOENT, "no VM named %.64s on host %s", name, d->cfg->name);
}

int vm_find_arrived(struct daemon *d, json_t *request, struct vm_ref *vm, struct error *err)
{
	int rc = vm_find_present(d, request, vm, err);
	return rc < 0 ? rc : vm_check_arrived(d, vm, err);
}
