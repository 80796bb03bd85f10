/* SPDX-License-Identifier: Apache-2.0 */
#ifndef HOST_NETWORKS_H
#define HOST_NETWORKS_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/socket.h>

#include "base/error.h"

/* Lists of networks: "192.0.2.0/24, 198.51.100.7, fd00::/8". Pure. */

#define NETWORKS_MAX 64

struct network {
	uint8_t address[16]; /* IPv4 as ::ffff:A.B.C.D */
	uint8_t bits;	     /* of the 128 */
};

struct networks {
	struct network list[NETWORKS_MAX];
	unsigned count;
};

/* -EINVAL naming what is wrong: no address, a prefix that is too long, bits set behind the prefix, too many.
 */
int networks_parse(const char *text, struct networks *out, struct error *err);
/* IPv4 addresses in IPv6 sockets count as IPv4. False for other families. */
bool networks_contain(const struct networks *n, const struct sockaddr_storage *address);

#endif
