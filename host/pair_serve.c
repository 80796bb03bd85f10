/* SPDX-License-Identifier: Apache-2.0 */
#include "host/pair_serve.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/confine.h"
#include "base/log.h"
#include "host/exit.h"
#include "host/pair_codes.h"
#include "net/preamble.h"

static void cleanup_json(json_t **o)
{
	json_decref(*o);
}

/* ---- the process at the listening host ---- */

/* Nobody is known yet: what counts is the proof. */
static int judge_nobody(void *opaque, const struct tls_claim *claim, struct error *err)
{
	return 0;
}

static json_t *make_request(const struct pair_hello *h, const struct pair_binding *b, struct conn *conn)
{
	char exported[2 * CONN_EXPORTED_BYTES + 1], proof[2 * PAIR_PROOF_BYTES + 1];
	pair_hex(b->exported, sizeof b->exported, exported);
	pair_hex(h->proof, sizeof h->proof, proof);
	return json_pack("{s:s, s:s, s:s, s:i, s:s, s:s, s:s, s:s, s:I}", "cmd", "pair", "name", h->name,
			 "address", h->address, "port", (int)h->port, "proof", proof, "exported", exported,
			 "caller", conn_peer_fingerprint(conn), "listener", conn_own_fingerprint(conn),
			 "not_after", (json_int_t)conn_peer_not_after(conn));
}

/* What the daemon says about it. */
static int ask_daemon(struct jsonl *daemon, struct conn *conn, const struct pair_hello *hello,
		      struct pair_reply *reply, struct error *err)
{
	struct pair_binding b;
	int rc = pair_binding_of(conn, false, &b, err);
	if (rc < 0)
		return rc;
	CLEANUP(cleanup_json) json_t *request = make_request(hello, &b, conn);
	CLEANUP(cleanup_json) json_t *answer = NULL;
	rc = request ? jsonl_call(daemon, request, &answer, NULL, PAIR_TIMEOUT_MS, err)
		     : error_errno(err, ENOMEM, "pairing");
	if (rc < 0)
		return rc;
	const char *name = json_string_value(json_object_get(answer, "name"));
	const char *proof = json_string_value(json_object_get(answer, "proof"));
	if (!name || !proof || !pair_unhex(proof, reply->proof, PAIR_PROOF_BYTES))
		return error_set(err, EPROTO, "pairing: the daemon's answer has no proof");
	reply->ok = true;
	snprintf(reply->name, sizeof reply->name, "%s", name);
	return 0;
}

static int hear(struct conn *conn, struct jsonl *daemon, uint64_t deadline, struct pair_reply *reply,
		struct error *err)
{
	char buf[PAIR_MESSAGE_MAX_BYTES];
	size_t len = 0;
	struct pair_hello hello;
	int rc = pair_receive(conn, buf, &len, deadline, err);
	if (!rc)
		rc = pair_hello_parse(buf, len, &hello, err);
	if (!rc && !conn_peer_has_name(conn, hello.name))
		rc = error_set(err, EPROTO,
			       "the other host says that it is %s, but its certificate is for %s", hello.name,
			       conn_peer_name(conn));
	return rc ? rc : ask_daemon(daemon, conn, &hello, reply, err);
}

int pair_serve(const struct host_config *cfg, int fd, struct jsonl *daemon, struct error *err)
{
	uint64_t deadline = clock_now_ms() + PAIR_TIMEOUT_MS;
	struct trust_own own;
	struct tls_context *tls = NULL;
	struct conn *conn = NULL;
	int rc = trust_own_ensure(cfg, &own, err);
	if (!rc)
		rc = tls_context_create_judged(own.file, own.file, true, judge_nobody, NULL, &tls, err);
	if (!rc)
		rc = confine_drop_capabilities(err);
	if (!rc)
		rc = confine_thread(CONFINE_PAIRING, err);
	if (rc)
		close(fd);
	else
		rc = conn_tls_accept(fd, tls, PAIR_TIMEOUT_MS, &conn, err);
	if (!rc) {
		struct pair_reply reply = {0};
		struct error why = ERROR_INIT;
		rc = hear(conn, daemon, deadline, &reply, &why);
		if (rc < 0) {
			snprintf(reply.reason, sizeof reply.reason, "%s", why.message);
			error_copy(err, &why);
		}
		CLEANUP_FREE char *text = pair_reply_text(&reply);
		char byte;
		if (text && pair_send(conn, text, deadline, rc ? NULL : err) == 0)
			/* until the other side has closed: a reset must not overtake the sentence */
			(void)!conn_read_some(conn, &byte, 1, 1000, NULL);
	}
	conn_close(conn);
	tls_context_free(tls);
	return rc;
}

/* ---- the daemon of the listening host ---- */

struct acceptance {
	const struct host_config *cfg;
	struct trust_peer peer;
};

static int accept_peer(void *opaque, const struct pair_hello *hello, struct error *err)
{
	struct acceptance *a = opaque;
	return trust_peer_add(a->cfg, &a->peer, err);
}

/* Where the calling host listens: as it says, or where it came from. */
static void place_of(const struct pair_hello *h, const char *from, char *out, size_t size)
{
	if (*h->address)
		snprintf(out, size, "%s", h->address);
	else
		snprintf(out, size, strchr(from, ':') ? "[%s]:%u" : "%s:%u", from, h->port);
}

static bool read_request(const json_t *o, struct pair_hello *h, struct pair_binding *b,
			 struct trust_certificate *c)
{
	const char *name = json_string_value(json_object_get(o, "name"));
	const char *address = json_string_value(json_object_get(o, "address"));
	const char *proof = json_string_value(json_object_get(o, "proof"));
	const char *exported = json_string_value(json_object_get(o, "exported"));
	const char *caller = json_string_value(json_object_get(o, "caller"));
	const char *listener = json_string_value(json_object_get(o, "listener"));
	*h = (struct pair_hello){.port = (unsigned)json_integer_value(json_object_get(o, "port"))};
	c->not_after = json_integer_value(json_object_get(o, "not_after"));
	return name && address && proof && exported && caller && listener &&
	       (size_t)snprintf(h->name, sizeof h->name, "%s", name) < sizeof h->name &&
	       (size_t)snprintf(h->address, sizeof h->address, "%s", address) < sizeof h->address &&
	       (size_t)snprintf(c->sha256, sizeof c->sha256, "%s", caller) < sizeof c->sha256 &&
	       pair_unhex(proof, h->proof, sizeof h->proof) &&
	       pair_unhex(exported, b->exported, sizeof b->exported) &&
	       pair_unhex(caller, b->caller, sizeof b->caller) &&
	       pair_unhex(listener, b->listener, sizeof b->listener);
}

json_t *pair_answer(const struct host_config *cfg, struct pair_codes *codes, const json_t *request,
		    const char *from, struct error *err)
{
	struct pair_hello hello;
	struct pair_binding binding;
	struct acceptance a = {.cfg = cfg,
			       .peer = {.paired = true,
					.may_send = true,
					.may_receive = true,
					.ncertificates = 1,
					.paired_at = (int64_t)time(NULL)}};
	struct pair_reply reply = {.ok = true};
	if (!read_request(request, &hello, &binding, &a.peer.certificates[0])) {
		error_set(err, EPROTO, "malformed request to pair");
		return NULL;
	}
	snprintf(a.peer.name, sizeof a.peer.name, "%s", hello.name);
	snprintf(a.peer.knows, sizeof a.peer.knows, "%s",
		 json_string_value(json_object_get(request, "listener")));
	place_of(&hello, from, a.peer.address, sizeof a.peer.address);
	snprintf(reply.name, sizeof reply.name, "%s", cfg->name);
	int rc =
		pair_codes_redeem(codes, &binding, &hello, pair_codes_now_ms(), accept_peer, &a, &reply, err);
	if (rc < 0) {
		log_warn("host %s at %s (certificate SHA-256 %.16s...) was not paired: %s", hello.name, from,
			 a.peer.certificates[0].sha256, err->message);
		return NULL;
	}
	log_info("paired with host %s at %s, certificate SHA-256 %.16s...", a.peer.name, a.peer.address,
		 a.peer.certificates[0].sha256);
	char proof[2 * PAIR_PROOF_BYTES + 1];
	pair_hex(reply.proof, sizeof reply.proof, proof);
	return json_pack("{s:s, s:s}", "name", reply.name, "proof", proof);
}

/* ---- the calling host ---- */

struct caller {
	const char *address;
	struct pair_code code;
};

/* Before anything that depends on the code is sent. */
static int judge_listener(void *opaque, const struct tls_claim *claim, struct error *err)
{
	const struct caller *c = opaque;
	if (pair_code_is_of(&c->code, claim->fingerprint))
		return 0;
	return error_set(err, EKEYREJECTED,
			 "the code is not of the host that answers at %s (certificate for %s, SHA-256 "
			 "%.16s...): it is "
			 "another host's, or somebody is in between; nothing was sent",
			 c->address, claim->names, claim->fingerprint);
}

/* What the other host is to dial: ours if we listen at one address, else where we come from. */
static void own_place(const struct host_config *cfg, struct pair_hello *h)
{
	const char *colon = strrchr(cfg->listen, ':');
	size_t n = (size_t)(colon - cfg->listen);
	char host[128];
	snprintf(host, sizeof host, "%.*s", (int)n, cfg->listen);
	h->port = (unsigned)strtoul(colon + 1, NULL, 10);
	if (strcmp(host, "0.0.0.0") && strcmp(host, "[::]"))
		snprintf(h->address, sizeof h->address, "%s", cfg->listen);
}

static int dial(const struct host_config *cfg, struct caller *c, struct conn **out, struct error *err)
{
	struct trust_own own;
	struct tls_context *tls = NULL;
	int rc = trust_own_ensure(cfg, &own, err);
	if (!rc)
		rc = tls_context_create_judged(own.file, own.file, false, judge_listener, c, &tls, err);
	if (rc < 0)
		return rc;
	struct preamble pre = {.channel = CHANNEL_PAIR, .token = "-"};
	int fd = net_connect(c->address, PAIR_TIMEOUT_MS, err);
	rc = fd < 0 ? fd : preamble_write(fd, &pre, PAIR_TIMEOUT_MS, err);
	if (rc < 0 && fd >= 0)
		close(fd);
	if (!rc) {
		rc = conn_tls_connect(fd, tls, "any", PAIR_TIMEOUT_MS, out, err);
		/* a daemon without a code hangs up before it says anything that could be believed */
		if (rc == -ECONNRESET)
			rc = error_set(err, ECONNREFUSED,
				       "%s closed the connection: no code is open there (it has expired or "
				       "was used some "
				       "time ago, or the daemon was restarted), or it does not let this host "
				       "in; print "
				       "one there with snmigrate pair",
				       c->address);
	}
	tls_context_free(tls);
	return rc;
}

static int exchange(struct conn *conn, const struct caller *c, const struct pair_hello *hello,
		    const struct pair_binding *b, uint64_t deadline, struct pair_reply *reply,
		    struct error *err)
{
	char buf[PAIR_MESSAGE_MAX_BYTES];
	size_t len = 0;
	uint8_t proof[PAIR_PROOF_BYTES];
	CLEANUP_FREE char *text = pair_hello_text(hello);
	if (!text)
		return error_errno(err, ENOMEM, "pairing");
	int rc = pair_send(conn, text, deadline, err);
	if (!rc)
		rc = pair_receive(conn, buf, &len, deadline, err);
	if (!rc)
		rc = pair_reply_parse(buf, len, reply, err);
	if (rc < 0)
		return error_prefix(err, "%s", c->address);
	if (!reply->ok)
		return error_set(err, EACCES, "%s refused: %s", c->address, reply->reason);
	pair_prove_reply(&c->code, b, reply, proof);
	if (!pair_proofs_equal(proof, reply->proof) || !conn_peer_has_name(conn, reply->name))
		return error_set(err, EKEYREJECTED, "%s: the host that answers does not know the code",
				 c->address);
	return 0;
}

int pair_join(const struct host_config *cfg, const char *address, const char *code, struct trust_peer *out,
	      struct error *err)
{
	uint64_t deadline = clock_now_ms() + 2 * PAIR_TIMEOUT_MS;
	char where[128];
	struct caller c = {.address = where};
	struct conn *conn = NULL;
	struct pair_binding binding;
	struct pair_hello hello = {.version_min = PAIR_VERSION, .version_max = PAIR_VERSION};
	struct pair_reply reply = {0};
	int rc = host_address_normalize(address, where, sizeof where, err);
	if (!rc)
		rc = pair_code_parse(code, &c.code, err);
	if (!rc)
		rc = dial(cfg, &c, &conn, err);
	if (rc < 0)
		return rc;
	*out = (struct trust_peer){.paired = true,
				   .may_send = true,
				   .may_receive = true,
				   .ncertificates = 1,
				   .paired_at = (int64_t)time(NULL),
				   .certificates[0].not_after = conn_peer_not_after(conn)};
	snprintf(out->name, sizeof out->name, "%s", conn_peer_name(conn));
	snprintf(out->address, sizeof out->address, "%s", where);
	snprintf(out->knows, sizeof out->knows, "%s", conn_own_fingerprint(conn));
	snprintf(out->certificates[0].sha256, sizeof out->certificates[0].sha256, "%s",
		 conn_peer_fingerprint(conn));
	/* what would not do here is said while the code is still good */
	rc = trust_peer_check(cfg, out, err);
	snprintf(hello.name, sizeof hello.name, "%s", cfg->name);
	own_place(cfg, &hello);
	if (!rc)
		rc = pair_binding_of(conn, true, &binding, err);
	if (!rc) {
		pair_prove_hello(&c.code, &binding, &hello, hello.proof);
		rc = exchange(conn, &c, &hello, &binding, deadline, &reply, err);
	}
	if (!rc && strcmp(reply.name, out->name))
		rc = error_set(err, EKEYREJECTED, "%s says that it is %s, but its certificate is for %s",
			       where, reply.name, out->name);
	if (!rc)
		rc = trust_peer_add(cfg, out, err);
	conn_close(conn);
	return rc;
}
