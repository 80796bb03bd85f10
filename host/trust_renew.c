/* SPDX-License-Identifier: Apache-2.0 */
#include "host/trust_renew.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "host/fsutil.h"
#include "host/pki.h"

#define NEXT_FILE	"next.pem"
#define LOOK_MIN_MS	1000
#define LOOK_MAX_MS	600000
#define TELL_TIMEOUT_MS 5000
/* A certificate is valid from a day before it was made (host/pki.c). */
#define BACKDATE_S 86400

static int next_load(const struct host_config *cfg, struct trust_own *out, struct error *err)
{
	int rc = registry_path(cfg, "trust/" NEXT_FILE, out->file, err);
	return rc ? rc
		  : tls_certificate_file(out->file, out->present.sha256, &out->not_before,
					 &out->present.not_after, out->names, sizeof out->names, err);
}

static int open_folder(const struct host_config *cfg, struct error *err)
{
	char folder[REGISTRY_PATH_BYTES];
	int rc = registry_path(cfg, "trust", folder, err);
	return rc ? rc : fs_open_dir(folder, err);
}

static int next_ensure(const struct host_config *cfg, struct trust_own *out, struct error *err)
{
	int rc = next_load(cfg, out, NULL);
	/* one that is left over from long ago would not last either */
	if (!rc && !strcmp(out->names, cfg->name) &&
	    out->present.not_after > (int64_t)time(NULL) + cfg->certificate_s / 2)
		return 0;
	CLEANUP_FD int dirfd = open_folder(cfg, err);
	if (dirfd < 0)
		return dirfd;
	rc = pki_self_signed(dirfd, NEXT_FILE, cfg->name, cfg->certificate_s, err);
	return rc ? rc : next_load(cfg, out, err);
}

static int promote(const struct host_config *cfg, struct error *err)
{
	char from[REGISTRY_PATH_BYTES], to[REGISTRY_PATH_BYTES], folder[REGISTRY_PATH_BYTES];
	int rc = registry_path(cfg, "trust", folder, err);
	if (!rc)
		rc = registry_path(cfg, "trust/" NEXT_FILE, from, err);
	if (!rc)
		rc = registry_path(cfg, "trust/host.pem", to, err);
	CLEANUP_FD int held = rc ? -1 : trust_lock(cfg, err);
	if (held < 0)
		return rc ? rc : held;
	return rename(from, to) < 0 ? error_errno(err, errno, "%s", to) : fs_sync_dir(folder, err);
}

/* ---- telling ---- */

static int tell(const struct host_config *cfg, const struct trust_peer *p,
		const struct trust_certificate *next, struct error *err)
{
	struct conn *conn = NULL;
	struct frame reply = {0};
	int rc = trust_dial(cfg, p, p->address, TELL_TIMEOUT_MS, &conn, err);
	if (rc < 0)
		return rc;
	json_t *o = json_pack("{s:s, s:I}", "sha256", next->sha256, "not_after", (json_int_t)next->not_after);
	rc = frame_send_json(conn, FRAME_RENEW, 0, o, TELL_TIMEOUT_MS, err);
	json_decref(o);
	if (!rc)
		rc = frame_read(conn, TELL_TIMEOUT_MS, &reply, err);
	if (!rc && reply.type == FRAME_REFUSE) {
		const char *why = json_string_value(json_object_get(reply.json, "reason"));
		rc = error_set(err, EPERM, "%s refused: %.300s", p->name, why ? why : "no reason given");
	} else if (!rc && reply.type != FRAME_ANSWER) {
		rc = error_set(err, EPROTO, "%s answered with %s", p->name, frame_type_name(reply.type));
	}
	frame_release(&reply);
	conn_close(conn);
	return rc;
}

struct round {
	const struct host_config *cfg;
	const struct trust_certificate *next;
	unsigned ignorant; /* hosts that do not know the next one */
	char who[256];
};

static int note_known(struct trust_peer *p, void *opaque, struct error *err)
{
	snprintf(p->knows, sizeof p->knows, "%s", (const char *)opaque);
	return 0;
}

static int tell_one(void *opaque, const struct trust_peer *p)
{
	struct round *r = opaque;
	struct error err = ERROR_INIT;
	if (!p->paired || p->denied || !strcmp(p->knows, r->next->sha256))
		return 0;
	int rc = tell(r->cfg, p, r->next, &err);
	if (!rc)
		rc = trust_peer_change(r->cfg, p->name, note_known, (void *)r->next->sha256, &err);
	if (!rc) {
		log_info("host %s knows this host's next certificate, SHA-256 %.16s...", p->name,
			 r->next->sha256);
		return 0;
	}
	log_debug("host %s could not be told of the next certificate: %s", p->name, err.message);
	size_t n = strlen(r->who);
	snprintf(r->who + n, sizeof r->who - n, "%s%s", n ? ", " : "", p->name);
	r->ignorant++;
	return 0;
}

unsigned trust_renew(const struct host_config *cfg)
{
	struct trust_own own, next;
	struct error err = ERROR_INIT;
	if (trust_own_load(cfg, &own, NULL) < 0)
		return LOOK_MAX_MS / 10; /* nobody was paired yet */
	int64_t life = own.present.not_after - own.not_before - BACKDATE_S,
		left = own.present.not_after - (int64_t)time(NULL);
	uint64_t pace = life > 0 ? (uint64_t)life * 1000 / 60 : LOOK_MIN_MS;
	unsigned wait_ms = pace < LOOK_MIN_MS	? LOOK_MIN_MS
			   : pace > LOOK_MAX_MS ? LOOK_MAX_MS
						: (unsigned)pace;
	if (left > life / 3)
		return wait_ms;
	struct round r = {.cfg = cfg, .next = &next.present};
	int rc = next_ensure(cfg, &next, &err);
	if (!rc)
		rc = trust_peers_each(cfg, tell_one, &r, &err);
	if (!rc && (!r.ignorant || left < life / 12)) {
		rc = promote(cfg, &err);
		if (!rc)
			log_info("%s was renewed, SHA-256 %.16s...", own.file, next.present.sha256);
		if (!rc && r.ignorant)
			log_warn("could not be told of it, and have to be paired again: %s", r.who);
	}
	if (rc < 0)
		log_error("renewing %s: %s", own.file, err.message);
	return wait_ms;
}

/* ---- being told ---- */

struct successor {
	const char *used; /* what the connection was proved with */
	struct trust_certificate next;
};

static int add_successor(struct trust_peer *p, void *opaque, struct error *err)
{
	const struct successor *s = opaque;
	struct trust_certificate present = {{0}, 0};
	for (unsigned i = 0; i < p->ncertificates; i++) {
		if (!strcmp(p->certificates[i].sha256, s->next.sha256))
			return 0;
		if (!strcmp(p->certificates[i].sha256, s->used))
			present = p->certificates[i];
	}
	if (!*present.sha256)
		return error_set(err, EPERM, "host %s is not paired by that certificate any more", p->name);
	p->certificates[0] = present;
	p->certificates[1] = s->next;
	p->ncertificates = 2;
	return 0;
}

static int take(const struct host_config *cfg, const struct trust_peer *peer, struct conn *conn,
		const json_t *o, struct error *err)
{
	const char *sha256 = json_string_value(json_object_get(o, "sha256"));
	const json_t *end = json_object_get(o, "not_after");
	struct successor s = {.used = conn_peer_fingerprint(conn)};
	if (!peer->paired)
		return error_set(err, EPERM, "host %s is no paired host of %s", peer->name, cfg->name);
	if (!sha256 || strlen(sha256) != TRUST_FINGERPRINT_CHARS ||
	    strspn(sha256, "0123456789abcdef") != TRUST_FINGERPRINT_CHARS || !json_is_integer(end) ||
	    json_integer_value(end) < 0)
		return error_set(err, EPROTO, "renewal without a proper certificate");
	strcpy(s.next.sha256, sha256);
	s.next.not_after = json_integer_value(end);
	return trust_peer_change(cfg, peer->name, add_successor, &s, err);
}

int trust_renew_answer(const struct host_config *cfg, const struct trust_peer *peer, struct conn *conn,
		       const struct frame *frame, struct error *err)
{
	int rc = take(cfg, peer, conn, frame->json, err);
	json_t *o = rc ? json_pack("{s:s}", "reason", err->message) : json_object();
	int sent = frame_send_json(conn, rc ? FRAME_REFUSE : FRAME_ANSWER, frame->epoch, o, TELL_TIMEOUT_MS,
				   rc ? NULL : err);
	json_decref(o);
	if (!rc)
		log_info("host %s announced its next certificate", peer->name);
	return rc ? rc : sent;
}
