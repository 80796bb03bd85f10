/* SPDX-License-Identifier: Apache-2.0 */
/* What two hosts say before either has proved who it is, and the code that a person types. */
#include <ctype.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "host/pair.h"
#include "host/vmdef.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(int good)
{
	if (!good)
		abort();
}

static void printable(const char *s)
{
	for (; *s; s++)
		require(isprint((unsigned char)*s));
}

/* What is accepted is well-formed, and comes back as it was. */
static void hello(const char *text, size_t len)
{
	struct pair_hello h, again;
	struct error err = ERROR_INIT;
	if (pair_hello_parse(text, len, &h, &err) < 0) {
		require(err.code && *err.message);
		return;
	}
	require(name_chars_valid(h.name) && h.port <= 65535 && h.version_min <= h.version_max);
	printable(h.address);
	char *out = pair_hello_text(&h);
	require(out && pair_hello_parse(out, strlen(out), &again, &err) == 0 &&
		!memcmp(&h, &again, sizeof h));
	free(out);
}

static void reply(const char *text, size_t len)
{
	struct pair_reply r;
	struct error err = ERROR_INIT;
	if (pair_reply_parse(text, len, &r, &err) < 0) {
		require(err.code && *err.message);
		return;
	}
	printable(r.reason);
	require(!r.ok || name_chars_valid(r.name));
}

static void code(const char *text, size_t len)
{
	struct pair_code c, again;
	char typed[256], out[PAIR_CODE_CHARS + 1];
	if (len >= sizeof typed)
		return;
	memcpy(typed, text, len);
	typed[len] = '\0';
	if (pair_code_parse(typed, &c, NULL) < 0)
		return;
	pair_code_format(&c, out);
	require(pair_code_parse(out, &again, NULL) == 0 && !memcmp(&c, &again, sizeof c));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	if (size == 0)
		return 0;
	static void (*const parsers[])(const char *, size_t) = {hello, reply, code};
	parsers[*data % 3]((const char *)data + 1, size - 1);
	return 0;
}
