/* SPDX-License-Identifier: Apache-2.0 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "host/cpu.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Refused with a sentence, or written as it was read. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct cpu_features f, again;
	struct error err = ERROR_INIT;
	if (cpu_baseline_parse((const char *)data, size, "fuzz", &f, &err) < 0) {
		if (!err.code || !*err.message)
			abort();
		return 0;
	}
	char *lines = cpu_baseline_lines(&f), *text = NULL;
	if (!lines ||
	    asprintf(&text, "[baseline]\nversion = 1\nvendor = %s\n[features]\n%s", f.vendor, lines) < 0 ||
	    cpu_baseline_parse(text, strlen(text), "again", &again, &err) < 0 ||
	    memcmp(f.words, again.words, sizeof f.words) || strcmp(f.vendor, again.vendor))
		abort();
	free(text);
	free(lines);
	return 0;
}
