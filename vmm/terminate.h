/* SPDX-License-Identifier: Apache-2.0 */
#ifndef VMM_TERMINATE_H
#define VMM_TERMINATE_H

#include "base/error.h"
#include "vmm/vm.h"

/*
 * SIGTERM, from a person or a host's shutdown: the first presses the guest's power button, a second ends
 * the VM unless a move decides. An arrival that does not own its VM yet dies of it, as of any other death.
 */

/* From main, before there are threads: they all leave the signal alone. */
void terminate_block(void);
/* Starts the thread that waits for it; it lives as long as the process. */
int terminate_watch(struct vm *vm, struct error *err);

#endif
