/* SPDX-License-Identifier: Apache-2.0 */
#ifndef HOST_PKI_H
#define HOST_PKI_H

#include "base/error.h"

/*
 * The certificates of a group of hosts: DIR/ca.pem and ca.key, DIR/NAME.pem and NAME.key. EC P-256, SHA-256.
 * Keys are mode 0600. Nothing is ever overwritten (-EEXIST).
 */
#define PKI_CA_DAYS   3650
#define PKI_HOST_DAYS 825

/* Makes DIR (0700) when missing. */
int pki_init(const char *dir, int days, struct error *err);
/* Subject alternative names: DNS:name first, then each address as IP or DNS. days may be negative (for tests:
 * expired). */
int pki_issue(const char *dir, const char *name, char *const *addresses, int naddresses, int days,
	      struct error *err);
/*
 * A certificate and key of host `name` alone, signed by itself, for hosts that know its fingerprint
 * (host/trust.h), as one file, which replaces the one that is there at once and durably, mode 0600. Valid for
 * `seconds` from now, and from a day before.
 */
int pki_self_signed(int dirfd, const char *file, const char *name, unsigned seconds, struct error *err);

#endif
