/* SPDX-License-Identifier: Apache-2.0 */
/* The announcement by which bridges and switches learn a VM's new place. */
#include <errno.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "base/bytes.h"
#include "vmm/virtio.h"

#define VNET_HEADER_MAX 64
#define RARP_BYTES	60 /* the smallest Ethernet frame */

/*
 * RFC 903: request reverse, with the guest's address as source, sender and target, to everybody. A frame
 * written to the tap's file descriptor comes out of the interface, as if the guest had sent it: so the bridge
 * learns the address on the guest's own port and passes the frame on.
 */
int net_announce_rarp(int tap_fd, const uint8_t mac[6])
{
	uint8_t buf[VNET_HEADER_MAX + RARP_BYTES] = {0};
	int header = 0;
	struct ifreq ifr = {0};
	uint8_t *f;
	ssize_t n;

	if (ioctl(tap_fd, TUNGETIFF, &ifr) < 0)
		return -errno;
	if ((ifr.ifr_flags & IFF_VNET_HDR) && ioctl(tap_fd, TUNGETVNETHDRSZ, &header) < 0)
		return -errno;
	if (header < 0 || header > VNET_HEADER_MAX)
		return -EINVAL;
	f = buf + header;
	memset(f, 0xff, 6);
	memcpy(f + 6, mac, 6);
	put_be16(f + 12, 0x8035); /* RARP */
	put_be16(f + 14, 1);	  /* Ethernet */
	put_be16(f + 16, 0x0800); /* IPv4 */
	f[18] = 6;
	f[19] = 4;
	put_be16(f + 20, 3); /* request reverse */
	memcpy(f + 22, mac, 6);
	memcpy(f + 32, mac, 6);
	do
		n = write(tap_fd, buf, (size_t)header + RARP_BYTES);
	while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : 0;
}
