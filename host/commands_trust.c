/* SPDX-License-Identifier: Apache-2.0 */
/* Pairing and peers: the commands. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "host/administer.h"
#include "host/daemon.h"
#include "host/exit.h"
#include "host/pair_codes.h"
#include "host/pair_serve.h"
#include "host/trust.h"

/* What to type at the other host after "snmigrate pair". */
static void own_address(const struct host_config *cfg, char *out, size_t size)
{
	char name[256] = "";
	const char *port = strrchr(cfg->listen, ':');
	bool any = !strncmp(cfg->listen, "0.0.0.0:", 8) || !strncmp(cfg->listen, "[::]:", 5);
	if (any && (gethostname(name, sizeof name - 1) < 0 || !*name))
		snprintf(name, sizeof name, "%s", cfg->name);
	if (any)
		snprintf(out, size, "%s%s", name, port);
	else
		snprintf(out, size, "%s", cfg->listen);
}

int command_pair_open(struct command_context *c, struct error *err)
{
	struct daemon *d = c->daemon;
	const json_t *valid = json_object_get(c->request, "valid_s");
	json_int_t valid_s = valid ? json_integer_value(valid) : PAIR_CODE_VALID_S;
	struct trust_own own;
	struct pair_code code;
	if (valid_s < 1 || valid_s > PAIR_CODE_VALID_MAX_S)
		return error_set(err, EINVAL, "a code is valid from 1 to %d s", PAIR_CODE_VALID_MAX_S),
		       EXIT_USAGE;
	int rc = trust_own_ensure(d->cfg, &own, err);
	if (!rc)
		rc = pair_codes_make(d->codes, own.present.sha256, (unsigned)valid_s, pair_codes_now_ms(),
				     &code, err);
	if (rc < 0)
		return EXIT_REFUSED;
	char text[PAIR_CODE_CHARS + 1], address[384];
	pair_code_format(&code, text);
	own_address(d->cfg, address, sizeof address);
	log_info("a code for pairing is open for %d s", (int)valid_s);
	reply_ok(c->client, json_pack("{s:s, s:s, s:s, s:I}", "code", text, "host", d->cfg->name, "address",
				      address, "valid_s", (json_int_t)valid_s));
	return 0;
}

int command_pair_join(struct command_context *c, struct error *err)
{
	struct daemon *d = c->daemon;
	const char *address = json_string_value(json_object_get(c->request, "address"));
	const char *code = json_string_value(json_object_get(c->request, "code"));
	struct trust_peer p;
	if (!address || !code)
		return error_set(err, EINVAL, "malformed request to pair"), EXIT_USAGE;
	int rc = pair_join(d->cfg, address, code, &p, err);
	if (rc < 0)
		return EXIT_REFUSED;
	log_info("paired with host %s at %s, certificate SHA-256 %.16s...", p.name, p.address,
		 p.certificates[0].sha256);
	reply_ok(c->client, json_pack("{s:s, s:s, s:s}", "host", p.name, "address", p.address, "sha256",
				      p.certificates[0].sha256));
	return 0;
}

static int describe(void *opaque, const struct trust_peer *p)
{
	json_t *certificates = json_array();
	for (unsigned i = 0; i < p->ncertificates; i++)
		json_array_append_new(certificates,
				      json_pack("{s:s, s:I}", "sha256", p->certificates[i].sha256,
						"not_after", (json_int_t)p->certificates[i].not_after));
	json_t *o = json_pack("{s:s, s:s, s:s, s:b, s:b, s:b, s:b, s:o}", "name", p->name, "address",
			      p->address, "trust", p->paired ? "paired" : "configured", "send",
			      (int)p->may_send, "receive", (int)p->may_receive, "administer",
			      (int)p->may_administer, "denied", (int)p->denied, "certificates", certificates);
	if (o && p->paired)
		json_object_set_new(o, "paired_at", json_integer((json_int_t)p->paired_at));
	json_array_append_new(opaque, o);
	return 0;
}

int command_peer_list(struct command_context *c, struct error *err)
{
	json_t *list = json_array();
	int rc = trust_peers_each(c->daemon->cfg, describe, list, err);
	if (rc < 0) {
		json_decref(list);
		return EXIT_REFUSED;
	}
	reply_ok(c->client, json_pack("{s:o}", "peers", list));
	return 0;
}

static void take_bool(const json_t *o, const char *key, bool *value)
{
	const json_t *v = json_object_get(o, key);
	if (json_is_boolean(v))
		*value = json_is_true(v);
}

static int change(struct trust_peer *p, void *opaque, struct error *err)
{
	const json_t *o = opaque;
	const char *address = json_string_value(json_object_get(o, "address"));
	take_bool(o, "send", &p->may_send);
	take_bool(o, "receive", &p->may_receive);
	take_bool(o, "administer", &p->may_administer);
	return address ? host_address_normalize(address, p->address, sizeof p->address, err) : 0;
}

int command_peer_set(struct command_context *c, struct error *err)
{
	const char *host = json_string_value(json_object_get(c->request, "host"));
	if (!host)
		return error_set(err, EINVAL, "the request names no host"), EXIT_USAGE;
	if (trust_peer_change(c->daemon->cfg, host, change, c->request, err) < 0)
		return EXIT_REFUSED;
	log_info("host %s: its rights or address were changed", host);
	reply_ok(c->client, NULL);
	return 0;
}

int command_remote(struct command_context *c, struct error *err)
{
	const char *host = json_string_value(json_object_get(c->request, "host"));
	json_t *request = json_object_get(c->request, "request"), *reply = NULL;
	if (!host || !json_is_object(request))
		return error_set(err, EINVAL, "malformed request for another host"), EXIT_USAGE;
	if (administer_ask(c->daemon->cfg, host, request, &reply, err) < 0)
		return EXIT_REFUSED;
	jsonl_write(c->client, reply, -1, NULL);
	json_decref(reply);
	return 0;
}

/* ---- unpair ---- */

struct ties {
	struct daemon *daemon;
	const char *host;
	bool cancel;	  /* moves there are ended, not only found */
	struct error why; /* code 0: nothing is open between the two hosts */
};

static bool is_moving_there(struct ties *t, struct vm_ref *vm)
{
	json_t *info = NULL, *request = json_pack("{s:s}", "cmd", "info");
	bool there = false;
	if (keeper_is_live(vm->keeper) && vm_call(vm, request, &info, NULL, NULL) == 0) {
		const char *to =
			json_string_value(json_object_get(json_object_get(info, "migrating"), "destination"));
		there = to && !strcmp(to, t->host);
	}
	json_decref(info);
	return there;
}

/* What of a VM still needs the other host's word (docs/handover.md), or is under way. */
static int look_for_tie(void *opaque, const char *uuid)
{
	struct ties *t = opaque;
	struct vm_ref vm;
	if (vm_find(t->daemon, uuid, &vm, NULL) < 0 || strcmp(vm.rec.peer, t->host))
		return 0;
	if (vm.rec.state == HANDOVER_OWNER) {
		if (!is_moving_there(t, &vm))
			return 0;
		if (t->cancel)
			vm_call(&vm, json_pack("{s:s}", "cmd", "cancel"), NULL, NULL, NULL);
		error_set(&t->why, EBUSY, "VM %s is being moved there: snmigrate cancel %s first",
			  vm.rec.name, vm.rec.name);
	} else if (vm.rec.state != HANDOVER_ABANDONED &&
		   !(vm.rec.state == HANDOVER_MOVED && vm.rec.flags & RECORD_PEER_ACKED)) {
		error_set(&t->why, EBUSY,
			  "VM %s (%s) is not settled with it yet, and could not be afterwards without a "
			  "decision of "
			  "yours",
			  vm.rec.name, handover_state_name(vm.rec.state));
	}
	return !t->cancel && t->why.code;
}

int command_unpair(struct command_context *c, struct error *err)
{
	struct daemon *d = c->daemon;
	const char *host = json_string_value(json_object_get(c->request, "host"));
	bool force = json_is_true(json_object_get(c->request, "force"));
	struct ties t = {.daemon = d, .host = host, .cancel = force};
	if (!host)
		return error_set(err, EINVAL, "the request names no host"), EXIT_USAGE;
	if (!force && record_list(d->cfg->state_dir, look_for_tie, &t, err) < 0)
		return EXIT_REFUSED;
	if (!force && t.why.code)
		return error_set(err, EBUSY, "host %.63s stays paired: %.300s (or --force)", host,
				 t.why.message),
		       EXIT_REFUSED;
	if (trust_peer_remove(d->cfg, host, err) < 0)
		return EXIT_REFUSED;
	log_info("host %s is no longer paired", host);
	/* after the trust is gone, so that none of them dials again */
	if (force)
		record_list(d->cfg->state_dir, look_for_tie, &t, NULL);
	reply_ok(c->client, NULL);
	return 0;
}
