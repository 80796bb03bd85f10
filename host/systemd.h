/* SPDX-License-Identifier: Apache-2.0 */
#ifndef HOST_SYSTEMD_H
#define HOST_SYSTEMD_H

#include <stdbool.h>
#include <sys/types.h>

#include "base/error.h"

/* What the daemon asks of systemd where that started it: sd_notify(3), transient scopes, the journal. */

/* Units of ours are in this slice. */
#define SYSTEMD_SLICE "snmigrate.slice"
/* Powers the guests off before the host shuts down. */
#define SYSTEMD_GUESTS "snmigrate-guests.service"

/* This process is a service of systemd that reports when it is ready (Type=notify). Any thread. */
bool systemd_is_manager(void);
/* As sd_notify(3), e.g. "READY=1"; does nothing elsewhere. */
void systemd_notify(const char *state);
/* Log lines go to the journal with fields of their own, if stderr does (systemd.exec(5), JOURNAL_STREAM). */
void systemd_log(void);
/*
 * Moves a process into a new transient scope `name` (".scope" included) and returns once it is there:
 * ending our own service leaves it alone, and on shutdown systemd sends it SIGTERM and waits. -EEXIST: there
 * is such a scope still. Any thread.
 */
int systemd_scope_start(const char *name, const char *description, pid_t pid, struct error *err);

#endif
