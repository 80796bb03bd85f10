/* SPDX-License-Identifier: Apache-2.0 */
/* interface: host configuration */
#ifndef HOST_CONFIG_H
#define HOST_CONFIG_H

#include <stdbool.h>
#include <stddef.h>

#include "base/error.h"
#include "host/networks.h"

#define HOST_PORT		16516
#define HOST_NAME_MAX_CHARS	63
#define HOST_PEERS_MAX		256
#define HOST_BACKINGS_MAX	64
#define HOST_RETRY_FOR_S	300
#define HOST_RETRY_FOR_MAX_S	(7u * 86400)
#define HOST_KEEP_PARTIAL_S	86400
#define HOST_KEEP_PARTIAL_MAX_S (365u * 86400)
#define HOST_CERTIFICATE_S	(365u * 86400)
#define HOST_CERTIFICATE_MIN_S	10u
#define HOST_CERTIFICATE_MAX_S	(3650u * 86400)
#define HOST_STATE_DIR_DEFAULT	"/var/lib/snmigrate"

/* A file that arriving VMs may have as their backing file, if its content is what they had. */
struct host_backing {
	char name[HOST_NAME_MAX_CHARS + 1];
	char path[4096];
	char format[8]; /* raw | qcow2 */
};

struct host_peer {
	char name[HOST_NAME_MAX_CHARS + 1];
	char address[128]; /* HOST:PORT, port added when absent */
	bool may_send, may_receive, may_administer;
};

/*
 * INI (inih), "#" and ";" comments:
 *   [host]   name (default: the host's own, up to its first dot), listen (ADDRESS:PORT, port default 16516),
 * migration-address (ADDRESS[:PORT]: where data channels arrive; absent: as listen), state-dir
 * (/var/lib/snmigrate), control (default state-dir/control.sock), allow-from, deny-from (networks),
 * deny-peers (names) [tls]    ca, cert, key (paths; all or none: then only paired hosts, host/trust.h) [peer
 * NAME]  address, send, receive (yes), administer (no) [network] bridges = br0, br1 (bridges that an arriving
 * VM may use; absent: any bridge that exists) [backing NAME] path, format (raw | qcow2) [devices] allow =
 * /dev/vg0/vm-* (patterns of the block devices that an arriving disk may be put on; absent: none) [limits]
 * silence-ms (default 10000), max-incoming (8), moves-per-link (2: of a plan, at once to one host),
 * allow-no-tls = no, drain-timeout-ms (5000), mirror-grace-ms (50: how long a guest's write waits for the
 * destination before it is acknowledged from the local disk alone), retry-for (5m: how long a move that
 * starts here tries again after its link was lost; 0 = not), keep-partial (24h: how long the disks of an
 * arrival that failed are kept here at the most; 0 = not), certificate-validity (365d: of the certificate
 * that paired hosts know) [programs] snvmm (default: beside the daemon's own executable), cgroup (default: a
 * "snmigrate-NAME" group under the daemon's own) Unknown sections and keys are errors that name file and
 * line.
 */
struct host_config {
	char path[4096]; /* absolute path of the file itself */
	char name[HOST_NAME_MAX_CHARS + 1];
	char listen[128];
	char migration_address[128];	       /* "" = none */
	struct networks allow_from, deny_from; /* allow_from: empty = all */
	char deny_peers[1024];
	char state_dir[4096];
	char control[108];		      /* fits sockaddr_un */
	char ca[4096], cert[4096], key[4096]; /* all or none */
	struct host_peer *peers;
	unsigned npeers;
	struct host_backing *backings;
	unsigned nbackings;
	char devices[2048]; /* patterns of paths, separated by commas; "" = none */
	char shared[2048];  /* folders that other hosts see as well, separated by commas; "" = none */
	char bridges[512];
	unsigned silence_ms;
	unsigned max_incoming;
	unsigned moves_per_link;
	unsigned drain_timeout_ms;
	unsigned mirror_grace_ms;
	unsigned retry_for_s, keep_partial_s, certificate_s;
	bool allow_no_tls;
	char snvmm[4096];
	char cgroup[4096];
};

/* Errors name file and line. -ENOENT when the file is missing. */
int host_config_load(const char *path, struct host_config **out, struct error *err);
/* Pure, from text (the fuzzer links it); `path` stands for the file in errors and must be absolute. */
int host_config_parse(const char *text, size_t len, const char *path, struct host_config **out,
		      struct error *err);
void host_config_free(struct host_config *cfg);
/* Of the [peer] sections alone; for paired hosts as well see host/trust.h. */
const struct host_peer *host_config_peer(const struct host_config *cfg, const char *name);
/* [host] deny-peers */
bool host_config_peer_denied(const struct host_config *cfg, const char *name);
/* deny-from, allow-from */
bool host_config_network_allowed(const struct host_config *cfg, const struct sockaddr_storage *address);
/* "HOST:PORT" or "[V6]:PORT" of HOST, HOST:PORT, [V6] or [V6]:PORT; -EINVAL. */
int host_address_normalize(const char *text, char *out, size_t size, struct error *err);
/* Whether [devices] allow covers it: an absolute path without "." and "..", "*" not standing for "/". */
bool host_config_device_allowed(const struct host_config *cfg, const char *path);

#endif
