/* SPDX-License-Identifier: Apache-2.0 */
#ifndef BASE_CONFINE_H
#define BASE_CONFINE_H

#include "base/error.h"

/*
 * What a process, and within it a thread that works for somebody hostile, may still ask of the kernel: a
 * seccomp filter a kind. The lists, with a reason for each call, are in confine_lists.c; docs/security.md
 * explains them. What a filter does not have is not done: the log names the kind of thread and the call,
 * which fails or, where it can be no accident, ends the process.
 */
enum confine_kind {
	CONFINE_PAIRING, /* snvmm --pair: TLS and messages of a stranger */
	CONFINE_VCPU,	 /* runs the guest, and the device registers that it touches */
	CONFINE_DEVICE,	 /* a guest's queues and console; its turns and announcements */
	CONFINE_DISK,	 /* reads and writes images */
	CONFINE_NBD,	 /* NBD's bytes: connections of a client or a server */
	CONFINE_MEMORY,	 /* sends or receives guest memory */
	CONFINE_MIRROR,	 /* copies, mirrors and compares disks */
	CONFINE_LINK,	 /* reads and feeds the control channel of a move */
	CONFINE_PROCESS, /* the whole of it, and what it starts: all that no program of ours has use for */
	CONFINE_KINDS
};

/* Once, while there is one thread: without it nothing below does anything (unit tests, other programs). From
 * here on nothing that this process starts gains privileges by being executed. */
int confine_enable(struct error *err);
/* For good, for the calling thread and those it starts. Gives up capabilities, too: all that its kind has no
 * use for (confine_lists.c). */
int confine_thread(enum confine_kind kind, struct error *err);
/* Likewise, first thing in a thread's own function; where it cannot be, the log says so and the thread goes
 * on. For CONFINE_PROCESS, which a thread has from the process: makes sure that its end would be told. */
void confine_self(enum confine_kind kind);
/* Of a process that has one thread: gives up every capability, for good. */
int confine_drop_capabilities(struct error *err);

#endif
