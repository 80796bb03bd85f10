/* SPDX-License-Identifier: Apache-2.0 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "net/preamble.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct preamble pre;
	struct error err = ERROR_INIT;

	/* What is accepted has a token of the one shape that a registry is asked for. */
	if (preamble_parse((const char *)data, size, &pre, &err) == 0 &&
	    strlen(pre.token) != (pre.channel == CHANNEL_CONTROL ? 1 : TOKEN_HEX_CHARS))
		abort();
	return 0;
}
