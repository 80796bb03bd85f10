/* SPDX-License-Identifier: Apache-2.0 */
/* interface: the first line of every connection to the one port */
#ifndef NET_PREAMBLE_H
#define NET_PREAMBLE_H

#include <stdbool.h>
#include <stddef.h>

#include "base/error.h"

#define PREAMBLE_MAX_BYTES  256
#define PREAMBLE_TIMEOUT_MS 5000
#define TOKEN_HEX_CHARS	    32 /* 128 random bits */

enum channel { CHANNEL_CONTROL, CHANNEL_MEMORY, CHANNEL_DISK, CHANNEL_PAIR };

/* Instead of a token: of a control channel, by which certificates both sides prove themselves (host/trust.h).
 */
#define PREAMBLE_BY_CA	    "-"
#define PREAMBLE_BY_PAIRING "paired"

struct preamble {
	enum channel channel;
	char token[TOKEN_HEX_CHARS + 1]; /* control: one of the two above; pair: "-" */
};

const char *channel_name(enum channel channel);
/* Pure: one line without its newline. -EPROTO with the reason. The fuzzer links this. */
int preamble_parse(const char *line, size_t len, struct preamble *out, struct error *err);
/* Reads exactly the line from a blocking or non-blocking fd, byte by byte with MSG_PEEK, never past the
 * newline. */
int preamble_read(int fd, unsigned timeout_ms, struct preamble *out, struct error *err);
int preamble_write(int fd, const struct preamble *pre, unsigned timeout_ms, struct error *err);
/* token must have TOKEN_HEX_CHARS + 1 bytes; from getrandom(2). */
int token_generate(char *token, struct error *err);

#endif
