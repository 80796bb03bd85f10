/* SPDX-License-Identifier: Apache-2.0 */
#ifndef HOST_TRUST_H
#define HOST_TRUST_H

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "host/config.h"
#include "host/registry.h"
#include "net/conn.h"

/*
 * Which hosts this one trusts, how they prove themselves, and what they may (docs/security.md). Two kinds,
 * side by side: configured  [peer NAME] in the configuration: a certificate of the CA in [tls] that carries
 * the name; paired      STATE/trust/peers/NAME.json, made by `snmigrate pair`: this very certificate, by its
 * SHA-256. This host proves itself to them with STATE/trust/host.pem, certificate and key, which it made and
 * renews itself (host/trust_renew.h). A name is one or the other; where both know it, the configuration
 * counts. Everything is read from the disk each time, so that what is revoked holds at once, in every
 * process. Writers hold STATE/trust/lock. Any thread.
 */
#define TRUST_CERTIFICATES_MAX	2 /* the present one, and the one that follows it */
#define TRUST_FINGERPRINT_CHARS 64

struct trust_certificate {
	char sha256[TRUST_FINGERPRINT_CHARS + 1];
	int64_t not_after; /* seconds since 1970 */
};

struct trust_peer {
	char name[HOST_NAME_MAX_CHARS + 1];
	char address[128];
	bool paired;	     /* else configured */
	bool denied;	     /* [host] deny-peers: nothing else counts */
	bool may_send;	     /* VMs to this host */
	bool may_receive;    /* VMs from this host */
	bool may_administer; /* this host, by commands sent from there */
	/* of paired ones alone */
	struct trust_certificate certificates[TRUST_CERTIFICATES_MAX];
	unsigned ncertificates;
	char knows[TRUST_FINGERPRINT_CHARS +
		   1]; /* the newest certificate of this host that it has acknowledged */
	int64_t paired_at;
};

/* -ENOENT with a sentence that names file and folder; -EPERM when [host] deny-peers has it. */
int trust_peer_find(const struct host_config *cfg, const char *name, struct trust_peer *out,
		    struct error *err);
/* The sentence for a host without that right: -EPERM. */
int trust_refuse_send(const struct host_config *cfg, const struct trust_peer *peer, struct error *err);
int trust_refuse_administer(const struct host_config *cfg, const struct trust_peer *peer, struct error *err);
int trust_refuse_receive(const struct host_config *cfg, const struct trust_peer *peer, struct error *err);
/* All, sorted as they come: the configured ones first, denied ones too. A non-zero return ends it and is
 * returned. */
int trust_peers_each(const struct host_config *cfg, int (*each)(void *opaque, const struct trust_peer *peer),
		     void *opaque, struct error *err);

/* ---- paired hosts ---- */
/* Makes STATE/trust and what is in it. */
int trust_prepare(const struct host_config *cfg, struct error *err);
/* An fd that holds STATE/trust/lock until it is closed, or an error. */
int trust_lock(const struct host_config *cfg, struct error *err);
/* Durable. -EEXIST when the name is taken: by this host, the configuration, or a host with another
 * certificate. The same host again gets a new address and keeps its rights. */
int trust_peer_add(const struct host_config *cfg, const struct trust_peer *peer, struct error *err);
/* What trust_peer_add would say, nothing written. */
int trust_peer_check(const struct host_config *cfg, const struct trust_peer *peer, struct error *err);
int trust_peer_remove(const struct host_config *cfg, const char *name, struct error *err);
/* Reads, changes and writes one under the lock. `change` returns 0, or an error that leaves it as it was. */
int trust_peer_change(const struct host_config *cfg, const char *name,
		      int (*change)(struct trust_peer *peer, void *opaque, struct error *err), void *opaque,
		      struct error *err);

/* ---- this host's own certificate for paired hosts ---- */
struct trust_own {
	char file[REGISTRY_PATH_BYTES]; /* both */
	char names[128];
	struct trust_certificate present;
	int64_t not_before;
};
/* Makes key and certificate if there are none; -EKEYREJECTED when the certificate is for another name. */
int trust_own_ensure(const struct host_config *cfg, struct trust_own *out, struct error *err);
/* -ENOENT when there is none. */
int trust_own_load(const struct host_config *cfg, struct trust_own *out, struct error *err);

/* ---- TLS ---- */
/* Of connections to this peer. cfg must live as long as the context. */
int trust_client_context(const struct host_config *cfg, const struct trust_peer *peer,
			 struct tls_context **out, struct error *err);
/* Of arriving connections, whose preamble says which kind it is. */
int trust_server_context(const struct host_config *cfg, bool paired, struct tls_context **out,
			 struct error *err);
/* Whose connection it is, once its TLS stands. -EPERM: nobody's who is (still) trusted. */
int trust_peer_of(const struct host_config *cfg, bool paired, const struct conn *conn, struct trust_peer *out,
		  struct error *err);
/* Dials the peer's control channel: preamble and TLS. */
int trust_dial(const struct host_config *cfg, const struct trust_peer *peer, const char *address,
	       unsigned timeout_ms, struct conn **out, struct error *err);
/* What the preamble of a control channel to it says. */
const char *trust_preamble(const struct trust_peer *peer);

#endif
