/* SPDX-License-Identifier: Apache-2.0 */
#include "host/systemd.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <syslog.h>
#include <systemd/sd-bus.h>
#include <systemd/sd-daemon.h>
#include <systemd/sd-journal.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "host/fsutil.h"

/* The manager's own socket, for root: no bus daemon is needed. */
#define MANAGER_ADDRESS	 "unix:path=/run/systemd/private"
#define CALL_TIMEOUT_US	 (UINT64_C(10) * 1000000)
#define ENTER_TIMEOUT_MS 5000
#define EXISTS_WAIT_MS	 3000 /* an empty scope is collected soon */
#define STOP_TIMEOUT_US	 (UINT64_C(90) * 1000000)

bool systemd_is_manager(void)
{
	return getenv("NOTIFY_SOCKET") && sd_booted() > 0;
}

void systemd_notify(const char *state)
{
	sd_notify(0, state);
}

/* --- the journal --- */

static void to_journal(enum log_level level, const char *vm, const char *message)
{
	static const int priorities[] = {LOG_DEBUG, LOG_INFO, LOG_WARNING, LOG_ERR};
	int rc = *vm ? sd_journal_send("MESSAGE=%s", message, "PRIORITY=%d", priorities[level],
				       "SNMIGRATE_VM=%s", vm, NULL)
		     : sd_journal_send("MESSAGE=%s", message, "PRIORITY=%d", priorities[level], NULL);
	if (rc < 0)
		dprintf(STDERR_FILENO, "%s\n", message);
}

void systemd_log(void)
{
	const char *stream = getenv("JOURNAL_STREAM");
	unsigned long long dev, ino;
	struct stat st;
	if (stream && sscanf(stream, "%llu:%llu", &dev, &ino) == 2 && fstat(STDERR_FILENO, &st) == 0 &&
	    st.st_dev == dev && st.st_ino == ino)
		log_set_sink(to_journal);
}

/* --- scopes --- */

static int open_manager(sd_bus **out)
{
	sd_bus *bus = NULL;
	int rc = sd_bus_new(&bus);
	if (rc >= 0)
		rc = sd_bus_set_address(bus, MANAGER_ADDRESS);
	if (rc >= 0)
		rc = sd_bus_start(bus);
	if (rc < 0)
		sd_bus_close_unref(bus);
	else
		*out = bus;
	return rc;
}

static int append_properties(sd_bus_message *m, const char *description, pid_t pid)
{
	int rc = sd_bus_message_open_container(m, 'a', "(sv)");
	if (rc >= 0)
		rc = sd_bus_message_append(m, "(sv)", "Description", "s", description);
	if (rc >= 0)
		rc = sd_bus_message_append(m, "(sv)", "Slice", "s", SYSTEMD_SLICE);
	if (rc >= 0)
		rc = sd_bus_message_append(m, "(sv)", "CollectMode", "s", "inactive-or-failed");
	if (rc >= 0)
		rc = sd_bus_message_append(m, "(sv)", "TimeoutStopUSec", "t", STOP_TIMEOUT_US);
	/* so that on shutdown the guests' service, which powers them off, is stopped first */
	if (rc >= 0)
		rc = sd_bus_message_append(m, "(sv)", "Before", "as", 1, SYSTEMD_GUESTS);
	if (rc >= 0)
		rc = sd_bus_message_append(m, "(sv)", "PIDs", "au", 1, (uint32_t)pid);
	return rc >= 0 ? sd_bus_message_close_container(m) : rc;
}

static int start_unit(sd_bus *bus, const char *name, const char *description, pid_t pid, sd_bus_error *why)
{
	sd_bus_message *m = NULL;
	int rc = sd_bus_message_new_method_call(bus, &m, "org.freedesktop.systemd1",
						"/org/freedesktop/systemd1",
						"org.freedesktop.systemd1.Manager", "StartTransientUnit");
	if (rc >= 0)
		rc = sd_bus_message_append(m, "ss", name, "fail");
	if (rc >= 0)
		rc = append_properties(m, description, pid);
	if (rc >= 0)
		rc = sd_bus_message_append(m, "a(sa(sv))", 0);
	if (rc >= 0)
		rc = sd_bus_call(bus, m, CALL_TIMEOUT_US, why, NULL);
	sd_bus_message_unref(m);
	return rc < 0 ? rc : 0;
}

static bool is_in(pid_t pid, const char *scope)
{
	char path[64];
	CLEANUP_FREE char *text = NULL;
	size_t len;
	snprintf(path, sizeof path, "/proc/%d/cgroup", (int)pid);
	return fs_read_file(path, 65536, &text, &len, NULL) == 0 && strstr(text, scope);
}

int systemd_scope_start(const char *name, const char *description, pid_t pid, struct error *err)
{
	uint64_t deadline = clock_now_ms() + EXISTS_WAIT_MS;
	sd_bus *bus = NULL;
	int rc = open_manager(&bus);
	if (rc < 0)
		return error_errno(err, rc, "systemd (%s)", MANAGER_ADDRESS);
	for (;;) {
		sd_bus_error why = SD_BUS_ERROR_NULL;
		rc = start_unit(bus, name, description, pid, &why);
		bool exists = rc < 0 && sd_bus_error_has_name(&why, "org.freedesktop.systemd1.UnitExists");
		if (rc < 0)
			error_set(err, exists ? EEXIST : -rc, "systemd: scope %s: %s", name,
				  why.message ? why.message : strerror(-rc));
		sd_bus_error_free(&why);
		if (!exists || clock_now_ms() >= deadline) {
			rc = exists ? -EEXIST : rc;
			break;
		}
		clock_sleep_ms(20);
	}
	sd_bus_close_unref(bus);
	/* the call only queued the job */
	deadline = clock_now_ms() + ENTER_TIMEOUT_MS;
	while (!rc && !is_in(pid, name)) {
		if (clock_now_ms() >= deadline)
			return error_set(err, ETIMEDOUT, "systemd: process %d is not in scope %s after %d ms",
					 (int)pid, name, ENTER_TIMEOUT_MS);
		clock_sleep_ms(2);
	}
	return rc;
}
