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
	if (preamble_parse((const char *)data, size, &pre, &err) < 0)
		return 0;
	bool routed = pre.channel == CHANNEL_MEMORY || pre.channel == CHANNEL_DISK;
	bool word =
		!strcmp(pre.token, "-") || (pre.channel == CHANNEL_CONTROL && !strcmp(pre.token, "paired"));
	if (routed ? strlen(pre.token) != TOKEN_HEX_CHARS : !word)
		abort();
	return 0;
}
