/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/tap.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <libmnl/libmnl.h>
#include <net/if.h>
#include <linux/if_link.h>
#include <linux/if_tun.h>
#include <linux/rtnetlink.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>

#include "base/cleanup.h"

struct link_info {
	uint32_t index;
	bool bridge;
};

static void cleanup_mnl(struct mnl_socket **s)
{
	if (*s)
		mnl_socket_close(*s);
}

static int attr_kind(const struct nlattr *attr, void *data)
{
	struct link_info *info = data;

	if (mnl_attr_get_type(attr) == IFLA_INFO_KIND && mnl_attr_validate(attr, MNL_TYPE_STRING) >= 0)
		info->bridge = strcmp(mnl_attr_get_str(attr), "bridge") == 0;
	return MNL_CB_OK;
}

static int attr_link(const struct nlattr *attr, void *data)
{
	if (mnl_attr_get_type(attr) == IFLA_LINKINFO && mnl_attr_validate(attr, MNL_TYPE_NESTED) >= 0)
		return mnl_attr_parse_nested(attr, attr_kind, data);
	return MNL_CB_OK;
}

static int on_link(const struct nlmsghdr *nlh, void *data)
{
	struct link_info *info = data;
	const struct ifinfomsg *ifm = mnl_nlmsg_get_payload(nlh);

	if (nlh->nlmsg_type != RTM_NEWLINK)
		return MNL_CB_OK;
	info->index = (uint32_t)ifm->ifi_index;
	mnl_attr_parse(nlh, sizeof *ifm, attr_link, info);
	return MNL_CB_OK;
}

/* Sends one request and reads to its end. 0 or negative errno. */
static int transact(struct nlmsghdr *nlh, struct link_info *info)
{
	CLEANUP(cleanup_mnl) struct mnl_socket *s = mnl_socket_open2(NETLINK_ROUTE, SOCK_CLOEXEC);
	struct timeval timeout = {.tv_sec = 5};
	char buf[16384]; /* a link with all its attributes is a few KiB */
	uint32_t seq = (uint32_t)time(NULL);
	ssize_t n;
	int rc;

	if (!s || mnl_socket_bind(s, 0, MNL_SOCKET_AUTOPID) < 0)
		return -errno;
	setsockopt(mnl_socket_get_fd(s), SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
	nlh->nlmsg_seq = seq;
	if (mnl_socket_sendto(s, nlh, nlh->nlmsg_len) < 0)
		return -errno;
	do {
		n = mnl_socket_recvfrom(s, buf, sizeof buf);
		if (n < 0)
			return -errno;
		rc = mnl_cb_run(buf, (size_t)n, seq, mnl_socket_get_portid(s), info ? on_link : NULL, info);
		if (rc < 0)
			return -errno;
		if (info && info->index)
			return 0;
	} while (rc > 0);
	return 0;
}

static struct nlmsghdr *link_message(char *buf, uint16_t type, const char *ifname)
{
	struct nlmsghdr *nlh = mnl_nlmsg_put_header(buf);

	nlh->nlmsg_type = type;
	nlh->nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK;
	mnl_nlmsg_put_extra_header(nlh, sizeof(struct ifinfomsg));
	mnl_attr_put_strz(nlh, IFLA_IFNAME, ifname);
	return nlh;
}

static int find_bridge(const char *bridge, uint32_t *index, struct error *err)
{
	char buf[1024] = {0}; /* the padding goes to the kernel, too */
	struct link_info info = {0};
	int rc;

	if (!bridge || !*bridge || strlen(bridge) >= IFNAMSIZ)
		return error_set(err, EINVAL, "bridge \"%.64s\": not a name of an interface",
				 bridge ? bridge : "");
	rc = transact(link_message(buf, RTM_GETLINK, bridge), &info);
	if (rc == -ENODEV || (rc == 0 && !info.index))
		return error_set(err, ENODEV, "bridge %s: no such interface on this host", bridge);
	if (rc < 0)
		return error_errno(err, rc, "bridge %s", bridge);
	if (!info.bridge)
		return error_set(err, EINVAL, "%s is not a bridge", bridge);
	*index = info.index;
	return 0;
}

int tap_bridge_check(const char *bridge, struct error *err)
{
	uint32_t index;

	return find_bridge(bridge, &index, err);
}

/* Up, and a port of the bridge. */
static int attach(const char *ifname, uint32_t bridge_index)
{
	char buf[1024] = {0}; /* the padding goes to the kernel, too */
	struct nlmsghdr *nlh = link_message(buf, RTM_NEWLINK, ifname);
	struct ifinfomsg *ifm = mnl_nlmsg_get_payload(nlh);

	ifm->ifi_flags = ifm->ifi_change = IFF_UP;
	mnl_attr_put_u32(nlh, IFLA_MASTER, bridge_index);
	return transact(nlh, NULL);
}

int tap_open(const char *bridge, char ifname[16], struct error *err)
{
	CLEANUP_FD int fd = -1;
	struct ifreq ifr = {.ifr_name = "snm%d", .ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
	uint32_t index;
	int rc;

	rc = find_bridge(bridge, &index, err);
	if (rc < 0)
		return rc;
	fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
	if (fd < 0)
		return error_errno(err, errno, "bridge %s: /dev/net/tun", bridge);
	if (ioctl(fd, TUNSETIFF, &ifr) < 0)
		return error_errno(err, errno, "bridge %s: create a tap", bridge);
	memcpy(ifname, ifr.ifr_name, 16);
	ifname[15] = 0;
	rc = attach(ifname, index);
	if (rc < 0)
		return error_errno(err, rc, "bridge %s: add %s as a port", bridge, ifname);
	return steal_fd(&fd);
}
