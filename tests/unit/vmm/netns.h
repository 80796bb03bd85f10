/* SPDX-License-Identifier: Apache-2.0 */
/* A private network namespace with a bridge "br0", for tests of taps. */
#ifndef TESTS_UNIT_VMM_NETNS_H
#define TESTS_UNIT_VMM_NETNS_H

#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"

#define TEST_ETHERTYPE 0x88b5 /* IEEE: local experiments */

/* Says why on failure, in the form that tests/run-unit counts. */
static inline bool netns_enter(void)
{
	if (unshare(CLONE_NEWNET) < 0 && unshare(CLONE_NEWUSER | CLONE_NEWNET) < 0) {
		printf("skipped: no private network namespace: %s\n", strerror(errno));
		fflush(stdout);
		return false;
	}
	if (access("/dev/net/tun", R_OK | W_OK) < 0) {
		printf("skipped: /dev/net/tun: %s\n", strerror(errno));
		fflush(stdout);
		return false;
	}
	if (system("ip link add br0 type bridge 2>/dev/null && ip link set br0 up") != 0) {
		printf("skipped: cannot make a bridge here\n");
		fflush(stdout);
		return false;
	}
	return true;
}

/* Frames of one type seen on, or sent into, an interface. */
static inline int netns_socket(const char *ifname, uint16_t type)
{
	struct sockaddr_ll to = {.sll_family = AF_PACKET,
				 .sll_protocol = htons(type),
				 .sll_ifindex = (int)if_nametoindex(ifname)};
	int fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, htons(type));

	if (fd >= 0 && bind(fd, (struct sockaddr *)&to, sizeof to) < 0) {
		close(fd);
		return -1;
	}
	return fd;
}

/* The next frame within the time, or -1. */
static inline ssize_t netns_receive(int fd, void *buf, size_t len, int timeout_ms)
{
	struct pollfd p = {.fd = fd, .events = POLLIN};

	return poll(&p, 1, timeout_ms) == 1 ? recv(fd, buf, len, MSG_TRUNC) : -1;
}

#endif
