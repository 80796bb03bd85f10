/* SPDX-License-Identifier: Apache-2.0 */
#ifndef HOST_STATUS_H
#define HOST_STATUS_H

#include <stdbool.h>

#include "base/error.h"
#include "host/record.h"

struct status_advice {
	bool needs_you;			      /* it does not settle by itself */
	char what[ERROR_MESSAGE_BYTES];	      /* what it waits for */
	char what_to_do[ERROR_MESSAGE_BYTES]; /* a sentence; "" with nothing to do */
};

/* Pure. Whether the VM waits for something, by its record and what is seen of it (host/handover.h,
 * vm_state_name; whether it has a live snvmm). */
bool status_advise(const struct vm_record *rec, bool live, const char *state, struct status_advice *out);

#endif
