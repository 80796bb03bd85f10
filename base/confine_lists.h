/* SPDX-License-Identifier: Apache-2.0 */
#ifndef BASE_CONFINE_LISTS_H
#define BASE_CONFINE_LISTS_H

#include <stddef.h>
#include <stdint.h>

#include "base/confine.h"

/* What each kind of thread may ask of the kernel, and why. Internal to base/confine*.c. */

struct confine_rule {
	const char *call, *why;
};

struct confine_list {
	const struct confine_rule *rules;
	size_t n;
};

/* Calls that are allowed with some arguments alone. */
enum {
	CONFINE_IOCTL_KVM = 1 << 0,    /* of any descriptor: the guest, interrupts, registers, dirty pages */
	CONFINE_IOCTL_TAP = 1 << 1,    /* what the guest's driver can do, and what an announcement asks */
	CONFINE_IOCTL_FAULTS = 1 << 2, /* userfaultfd: filling pages */
	CONFINE_IOCTL_ZERO = 1 << 3,   /* zeroes on a block device */
	CONFINE_THREADS = 1 << 4,      /* threads of its own, which inherit the filter; no processes */
	CONFINE_YIELD =
		1 << 5, /* letting others go first, and the way back; nothing that is ahead of others */
};

#define CONFINE_LISTS_MAX 5

struct confine_allowed {
	const char *id;	  /* of its fault point: confine-ID */
	const char *name; /* in messages: "the filter of NAME" */
	const struct confine_list *lists[CONFINE_LISTS_MAX];
	unsigned with_arguments;
	uint64_t capabilities; /* kept, as far as they are there */
};

extern const struct confine_allowed confine_allowed[CONFINE_KINDS];

/* What CONFINE_PROCESS, whose other calls are all allowed, forbids. */
extern const struct confine_list confine_denied;
/* What ends the process if a thread of another kind asks for it. */
extern const struct confine_list confine_grave;
/* What a fault point does: allowed besides where SNM_FAULT is set. */
extern const struct confine_list confine_faults;

#endif
