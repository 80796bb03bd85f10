/* SPDX-License-Identifier: Apache-2.0 */
#ifndef VMM_CONTROL_H
#define VMM_CONTROL_H

#include "base/error.h"

struct vm;

#define CONTROL_VERSION_MIN 1
#define CONTROL_VERSION_MAX 1

/* Serves snvmm.sock in the VM's folder, a thread a connection (docs/design.md has the requests). */
int control_start(struct vm *vm, struct error *err);
/* Closes the socket and every connection, joins. Idempotent. Sends what is left of a move's events first. */
void control_stop(struct vm *vm);

#endif
