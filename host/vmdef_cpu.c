/* SPDX-License-Identifier: Apache-2.0 */
/* `cpu =` of a definition. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/cleanup.h"
#include "host/fsutil.h"
#include "host/vmdef.h"

int vmdef_set_cpu(struct vm_definition *d, const char *value, struct error *err)
{
	bool file = !strncmp(value, "baseline:", 9) && value[9];
	if (!file && strcmp(value, "host") && strcmp(value, "x86-64-v2") && strcmp(value, "x86-64-v3") &&
	    strcmp(value, "baseline"))
		return error_set(err, EINVAL,
				 "cpu: '%.64s' is none of host, x86-64-v2, x86-64-v3, baseline:FILE", value);
	if (strlen(value) >= sizeof d->cpu)
		return error_set(err, EINVAL, "cpu: longer than %zu bytes", sizeof d->cpu - 1);
	strcpy(d->cpu, strcmp(value, "host") ? value : "");
	return 0;
}

int vmdef_read_baseline(struct vm_definition *d, const char *base_dir, struct error *err)
{
	char path[2 * sizeof d->cpu];
	CLEANUP_FREE char *text = NULL;
	size_t len;
	const char *file = d->cpu + strlen("baseline:");
	if (strncmp(d->cpu, "baseline:", strlen("baseline:")))
		return 0;
	if (*file == '/')
		snprintf(path, sizeof path, "%s", file);
	else
		snprintf(path, sizeof path, "%.4095s/%s", base_dir, file);
	int rc = fs_read_file(path, CPU_BASELINE_TEXT_MAX, &text, &len, err);
	if (!rc)
		rc = cpu_baseline_parse(text, len, path, &d->cpu_features, err);
	if (rc)
		return error_prefix(err, "cpu");
	strcpy(d->cpu, "baseline");
	return 0;
}

bool vmdef_cpu_limits(const struct vm_definition *d, struct cpu_features *allowed,
		      struct cpu_features *needed)
{
	if (!*d->cpu)
		return false;
	if (cpu_level(d->cpu, allowed, needed))
		*allowed = *needed = d->cpu_features;
	return true;
}
