/* SPDX-License-Identifier: Apache-2.0 */
#include "base/bytes.h"

bool bytes_all_zero(const void *p, size_t len)
{
	const unsigned char *c = p;
	size_t head = len < 16 ? len : 16;
	for (size_t i = 0; i < head; i++)
		if (c[i])
			return false;
	/* The first 16 bytes are zero; the rest is zero if every byte equals the one 16 before it. memcmp is
	 * the library's vectorised loop. */
	return len <= 16 || memcmp(c, c + 16, len - 16) == 0;
}
