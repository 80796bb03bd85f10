/* SPDX-License-Identifier: Apache-2.0 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "host/vmdef.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* A peer's definition: what is accepted is written as it was read, and what is let in stays in the VM's
 * folder. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct vm_definition def, again;
	struct error err = ERROR_INIT;

	if (vmdef_parse((const char *)data, size, "fuzz", &def, &err) < 0) {
		if (!err.code || !*err.message)
			abort();
		return 0;
	}
	char *text = vmdef_format(&def);
	if (!text || vmdef_parse(text, strlen(text), "again", &again, &err) < 0 ||
	    memcmp(&def, &again, sizeof def))
		abort();
	free(text);
	if (vmdef_check_foreign(&def, "br0", &err) == 0)
		for (unsigned i = 0; i < def.ndisks; i++)
			if (strchr(def.disks[i].path, '/') || def.disks[i].path[0] == '.')
				abort();
	if (vm_uuid_valid(def.uuid)) {
		vmdef_make_portable(&def);
		if (vmdef_check_foreign(&def, "", &err) < 0)
			abort();
	}
	return 0;
}
