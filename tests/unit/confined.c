/* SPDX-License-Identifier: Apache-2.0 */
/* In every unit test: with SNM_CONFINED=1 its threads get the filters that they have in a snvmm (make
 * unit-confined). */
#include <errno.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "base/confine.h"

static void __attribute__((constructor)) confine_all(void)
{
	const char *want = getenv("SNM_CONFINED");
	/* which confines processes of its own */
	if (!want || !strcmp(program_invocation_short_name, "test_confine"))
		return;
	json_object_seed(0); /* as snvmm does */
	setenv("SNM_FAULT", "", 0);
	if (confine_enable(NULL))
		abort();
}
