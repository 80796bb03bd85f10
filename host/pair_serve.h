/* SPDX-License-Identifier: Apache-2.0 */
#ifndef HOST_PAIR_SERVE_H
#define HOST_PAIR_SERVE_H

#include "host/config.h"
#include "host/jsonl.h"
#include "host/pair.h"
#include "host/trust.h"

/*
 * The two ends of a pairing. The listening one is a process of its own (snvmm --pair): a stranger's TLS and
 * messages are read there, and the daemon, which has the codes, is told a checked message.
 */

/*
 * fd is the connection after its preamble (taken over), `daemon` the link. Bounded in time and memory;
 * confined (base/confine.h) before the stranger's first byte is read. No thread may have been started before.
 */
int pair_serve(const struct host_config *cfg, int fd, struct jsonl *daemon, struct error *err);

/* In the daemon: `request` is what pair_serve says; the answer for it (new reference). */
struct pair_codes;
json_t *pair_answer(const struct host_config *cfg, struct pair_codes *codes, const json_t *request,
		    const char *from, struct error *err);

/* The calling one, where the code was typed: pairs with the host that listens at the address. *out is that
 * host. */
int pair_join(const struct host_config *cfg, const char *address, const char *code, struct trust_peer *out,
	      struct error *err);

#endif
