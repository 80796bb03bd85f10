/* SPDX-License-Identifier: Apache-2.0 */
#ifndef VMM_DIRTY_RATE_H
#define VMM_DIRTY_RATE_H

#include "vmm/vm.h"

#define DIRTY_RATE_SECONDS_MAX 60

/* {"cmd":"dirty-rate"}: measures for "seconds" (1 to 60) how fast the running guest dirties its memory. New
 * reference, or NULL with err: -EBUSY while it is being moved, and when a move began meanwhile. */
json_t *vm_dirty_rate(struct vm *vm, json_t *request, struct error *err);
/* A move needs the dirty log for itself: ends a measurement and waits for that. */
void vm_dirty_rate_end(struct vm *vm);

#endif
