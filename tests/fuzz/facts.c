/* SPDX-License-Identifier: Apache-2.0 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "host/check.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* What the other host says of itself to a check: refused with a sentence, or judged. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct check_facts f;
	static struct check_line lines[CHECK_LINES_MAX];
	struct error err = ERROR_INIT;
	json_t *o = json_loadb((const char *)data, size, JSON_REJECT_DUPLICATES, NULL);
	if (!o)
		return 0;
	memset(&f, 0, sizeof f);
	f.live = true;
	f.nnets = (unsigned)json_array_size(json_object_get(o, "bridges")) % (VM_NETS_MAX + 1);
	f.guest.table = calloc(1, sizeof *f.guest.table);
	if (check_take_destination(&f, o, &err) < 0 && (!err.code || !*err.message || f.answered))
		abort();
	if (check_judge(&f, lines) > CHECK_LINES_MAX)
		abort();
	check_facts_free(&f);
	json_decref(o);
	return 0;
}
