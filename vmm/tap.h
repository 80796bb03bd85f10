/* SPDX-License-Identifier: Apache-2.0 */
/* interface: tap devices */
#ifndef VMM_TAP_H
#define VMM_TAP_H

#include "base/error.h"

/*
 * Opens a new tap (name chosen by the kernel from "snm%d", IFF_TAP|IFF_NO_PI|IFF_VNET_HDR, non-blocking, not
 * persistent: it goes when the fd closes) and makes it a port of bridge `bridge`, up, by netlink. Error names
 * the bridge. Returns an fd.
 */
int tap_open(const char *bridge, char ifname[16], struct error *err);
/* 0 if the bridge is there (and is a bridge). */
int tap_bridge_check(const char *bridge, struct error *err);

#endif
