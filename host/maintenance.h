/* SPDX-License-Identifier: Apache-2.0 */
#ifndef HOST_MAINTENANCE_H
#define HOST_MAINTENANCE_H

#include <stdbool.h>

#include "base/error.h"
#include "host/config.h"

/*
 * A host in maintenance takes no arrivals. STATE/maintenance is there while it is: it survives every restart,
 * and what cannot be read counts as there.
 */
bool maintenance_is_on(const struct host_config *cfg);
/* Durable when it returns 0; setting what is set already is fine. */
int maintenance_set(const struct host_config *cfg, bool on, struct error *err);
/* -EPERM with a sentence for the source of an arrival, while it is on. */
int maintenance_check(const struct host_config *cfg, struct error *err);

#endif
