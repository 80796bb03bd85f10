/* SPDX-License-Identifier: Apache-2.0 */
#ifndef BASE_CONFINE_TRAP_H
#define BASE_CONFINE_TRAP_H

#include "base/confine.h"

/*
 * What becomes of a call that a filter does not have: the kernel sends SIGSYS instead of doing it, and the
 * log gets a line with the kind of thread and the call. A grave call (confine_lists.c) ends the process; any
 * other fails, as on a kernel that lacks it. Internal to base/confine*.c.
 */

/* Once, while there is one thread. 0 or a negative errno. */
int confine_trap_init(void);
/* Says whose calls the calling thread's are. */
void confine_trap_expect(enum confine_kind kind);

#endif
