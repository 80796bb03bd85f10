/* SPDX-License-Identifier: Apache-2.0 */
/* This host's own certificate for paired hosts, and the TLS contexts of both kinds of trust. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "host/fsutil.h"
#include "host/pki.h"
#include "host/trust.h"
#include "net/preamble.h"

#define OWN_FILE "host.pem"

int trust_own_load(const struct host_config *cfg, struct trust_own *out, struct error *err)
{
	int rc = registry_path(cfg, "trust/" OWN_FILE, out->file, err);
	if (!rc)
		rc = tls_certificate_file(out->file, out->present.sha256, &out->not_before,
					  &out->present.not_after, out->names, sizeof out->names, err);
	return rc;
}

/* Unless another process was faster. */
static int make(const struct host_config *cfg, struct trust_own *out, struct error *err)
{
	char folder[REGISTRY_PATH_BYTES];
	int rc = trust_prepare(cfg, err);
	if (!rc)
		rc = registry_path(cfg, "trust", folder, err);
	CLEANUP_FD int dirfd = rc ? -1 : fs_open_dir(folder, err);
	CLEANUP_FD int held = dirfd < 0 ? -1 : trust_lock(cfg, err);
	if (rc || held < 0)
		return rc ? rc : dirfd < 0 ? dirfd : held;
	if (trust_own_load(cfg, out, NULL) != -ENOENT)
		return 0;
	rc = pki_self_signed(dirfd, OWN_FILE, cfg->name, cfg->certificate_s, err);
	if (!rc)
		log_info("made %s/" OWN_FILE ", the certificate by which paired hosts know this host",
			 folder);
	return rc;
}

int trust_own_ensure(const struct host_config *cfg, struct trust_own *out, struct error *err)
{
	struct error why = ERROR_INIT;
	int rc = trust_own_load(cfg, out, &why);
	if (rc == -ENOENT) {
		rc = make(cfg, out, err);
		if (!rc)
			rc = trust_own_load(cfg, out, err);
	} else if (rc < 0) {
		error_copy(err, &why);
	}
	if (rc < 0)
		return rc;
	/* A host that was given another name: who paired with it knows it by the former. */
	if (strcmp(out->names, cfg->name))
		return error_set(err, EKEYREJECTED,
				 "%s: the certificate found is for %s, expected is %s: set [host] name = %s, "
				 "or unpair "
				 "all hosts, remove that file and pair them again",
				 out->file, out->names, cfg->name, out->names);
	return 0;
}

/* ---- who is believed ---- */

struct search {
	const char *sha256;
	struct trust_peer *out;
};

static int match(void *opaque, const struct trust_peer *p)
{
	struct search *s = opaque;
	for (unsigned i = 0; p->paired && i < p->ncertificates; i++)
		if (!strcmp(p->certificates[i].sha256, s->sha256)) {
			*s->out = *p;
			return 1;
		}
	return 0;
}

static int judge(void *opaque, const struct tls_claim *claim, struct error *err)
{
	const struct host_config *cfg = opaque;
	char folder[REGISTRY_PATH_BYTES];
	struct trust_peer p;
	struct search s = {.sha256 = claim->fingerprint, .out = &p};
	int rc = registry_path(cfg, "trust/peers", folder, err);
	if (rc < 0)
		return rc;
	if (*claim->expected_name) {
		rc = trust_peer_find(cfg, claim->expected_name, &p, err);
		if (rc < 0)
			return rc;
		return match(&s, &p) ? 0
				     : error_set(err, EKEYREJECTED,
						 "%s/%s.json: expected %s with the certificate of SHA-256 "
						 "%.16s..., but "
						 "found one for: %s, SHA-256 %.16s...; if it was installed "
						 "anew, unpair "
						 "and pair it again",
						 folder, p.name, p.name, p.certificates[0].sha256,
						 claim->names, claim->fingerprint);
	}
	rc = trust_peers_each(cfg, match, &s, err);
	if (rc < 0)
		return rc;
	return rc ? 0
		  : error_set(err, EKEYREJECTED,
			      "the certificate found (for: %s, SHA-256 %.16s...) is of no host that is "
			      "paired here (%s)",
			      claim->names, claim->fingerprint, folder);
}

static int judged_context(const struct host_config *cfg, bool only_accepts, struct tls_context **out,
			  struct error *err)
{
	struct trust_own own;
	int rc = trust_own_ensure(cfg, &own, err);
	return rc ? rc
		  : tls_context_create_judged(own.file, own.file, only_accepts, judge, (void *)cfg, out, err);
}

int trust_client_context(const struct host_config *cfg, const struct trust_peer *peer,
			 struct tls_context **out, struct error *err)
{
	return peer->paired ? judged_context(cfg, false, out, err)
			    : tls_context_create(cfg->ca, cfg->cert, cfg->key, out, err);
}

int trust_server_context(const struct host_config *cfg, bool paired, struct tls_context **out,
			 struct error *err)
{
	if (!paired && !*cfg->ca)
		return error_set(
			err, EPERM,
			"somebody wants to prove himself by a CA, but %s has no [tls] section: this host "
			"knows paired hosts alone",
			cfg->path);
	return paired ? judged_context(cfg, true, out, err)
		      : tls_context_create_server(cfg->ca, cfg->cert, cfg->key, out, err);
}

int trust_peer_of(const struct host_config *cfg, bool paired, const struct conn *conn, struct trust_peer *out,
		  struct error *err)
{
	if (paired) {
		struct search s = {.sha256 = conn_peer_fingerprint(conn), .out = out};
		int rc = trust_peers_each(cfg, match, &s, err);
		if (rc < 0)
			return rc;
		if (!rc)
			return error_set(err, EPERM, "host %s is not paired here any more",
					 conn_peer_name(conn));
		return trust_peer_find(cfg, out->name, out, err);
	}
	for (unsigned i = 0; i < cfg->npeers; i++)
		if (conn_peer_has_name(conn, cfg->peers[i].name))
			return trust_peer_find(cfg, cfg->peers[i].name, out, err);
	return error_set(err, EPERM, "certificate of %s: no [peer] of %s has that name", conn_peer_name(conn),
			 cfg->path);
}

const char *trust_preamble(const struct trust_peer *peer)
{
	return peer->paired ? PREAMBLE_BY_PAIRING : PREAMBLE_BY_CA;
}

int trust_dial(const struct host_config *cfg, const struct trust_peer *peer, const char *address,
	       unsigned timeout_ms, struct conn **out, struct error *err)
{
	struct tls_context *tls = NULL;
	*out = NULL;
	int rc = trust_client_context(cfg, peer, &tls, err);
	if (rc < 0)
		return rc;
	int fd = net_connect(address, timeout_ms, err);
	rc = fd < 0 ? fd : 0;
	if (!rc) {
		struct preamble pre = {.channel = CHANNEL_CONTROL};
		strcpy(pre.token, trust_preamble(peer));
		rc = preamble_write(fd, &pre, timeout_ms, err);
		if (rc < 0)
			close(fd);
		else
			rc = conn_tls_connect(fd, tls, peer->name, timeout_ms, out, err);
	}
	tls_context_free(tls);
	return rc;
}
