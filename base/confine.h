/* SPDX-License-Identifier: Apache-2.0 */
#ifndef BASE_CONFINE_H
#define BASE_CONFINE_H

#include "base/error.h"

/*
 * What a thread that works for somebody hostile may still ask of the kernel: a seccomp filter a kind of
 * thread. The lists, with a reason for each call, are in confine.c. A call that is not among them ends the
 * process; the log names thread and call.
 */
enum confine_kind {
	CONFINE_PAIRING, /* snvmm --pair: TLS and messages of a stranger */
	CONFINE_VCPU,	 /* runs the guest, and the device registers that it touches */
};

/* Once, before threads are confined: without it confine_thread does nothing (unit tests, other programs).
 * From here on nothing that this process starts gains privileges by being executed. */
int confine_enable(struct error *err);
/* For good, for the calling thread and those it starts. */
int confine_thread(enum confine_kind kind, struct error *err);
/* Of a process that has one thread: gives up every capability, for good. */
int confine_drop_capabilities(struct error *err);

#endif
