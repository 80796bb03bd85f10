/* SPDX-License-Identifier: Apache-2.0 */
#include "base/fault.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"

static bool action_of(const char *spec, const char *point, char *action, size_t size)
{
	size_t n = strlen(point);
	for (const char *p = spec; p && *p; p = strchr(p, ',') ? strchr(p, ',') + 1 : NULL) {
		if (strncmp(p, point, n) || p[n] != ':')
			continue;
		size_t len = strcspn(p + n + 1, ",");
		snprintf(action, size, "%.*s", (int)len, p + n + 1);
		return true;
	}
	return false;
}

static void hold(const char *point)
{
	const char *dir = getenv("SNM_FAULT_DIR");
	if (!dir)
		return;
	char hit[512], go[512];
	snprintf(hit, sizeof hit, "%s/%s.hit", dir, point);
	snprintf(go, sizeof go, "%s/%s.go", dir, point);
	int fd = open(hit, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
	if (fd >= 0) {
		dprintf(fd, "%d\n", (int)getpid());
		close(fd);
	}
	while (access(go, F_OK) && !access(dir, F_OK))
		clock_sleep_ms(5);
}

static bool failing(const char *point)
{
	const char *dir = getenv("SNM_FAULT_DIR");
	char path[512];
	snprintf(path, sizeof path, "%s/%s.fail", dir ? dir : "", point);
	return dir && !access(path, F_OK);
}

bool fault_point(const char *point)
{
	static const char *spec;
	static bool known;
	if (!__atomic_load_n(&known, __ATOMIC_ACQUIRE)) {
		spec = getenv("SNM_FAULT");
		__atomic_store_n(&known, true, __ATOMIC_RELEASE);
	}
	if (!spec || !*spec)
		return false;
	char action[16];
	if (!action_of(spec, point, action, sizeof action))
		return false;
	log_warn("fault point %s: %s", point, action);
	if (!strcmp(action, "kill"))
		kill(getpid(), SIGKILL);
	else if (!strcmp(action, "hold"))
		hold(point);
	else if (!strcmp(action, "failif"))
		return failing(point);
	return !strcmp(action, "fail");
}
