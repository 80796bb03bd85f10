/* SPDX-License-Identifier: Apache-2.0 */
#ifndef HOST_INI_H
#define HOST_INI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

/*
 * A strict INI reader. libinih as Debian builds it cuts lines at 200 bytes (a kernel command line is longer),
 * takes the rest for a line of its own, and tells the handler no line numbers.
 *
 * "[section]" or "[section label]", "key = value"; "#" and ";" begin a comment at the start of a line, ";"
 * also after white space. Lines up to INI_LINE_MAX_BYTES, no continuation lines, no NUL or other control
 * characters but tab.
 */
#define INI_LINE_MAX_BYTES 8192
#define INI_TEXT_MAX_BYTES (1u << 20)

struct ini_entry {
	const char *section; /* "" before the first */
	const char *label;   /* "" when the section has none */
	const char *key;     /* NULL: the section header itself */
	const char *value;   /* "" for a header */
	unsigned line;
};

/* Non-zero ends the parsing; err then holds a message without place, which the parser prefixes with
 * "origin:line: ". */
typedef int (*ini_handler_fn)(void *opaque, const struct ini_entry *entry, struct error *err);

/* Pure (the fuzzers link it). -EINVAL with origin and line, or what the handler returned. */
int ini_parse_text(const char *text, size_t len, const char *origin, ini_handler_fn handler, void *opaque,
		   struct error *err);
/* Reads the file (at most INI_TEXT_MAX_BYTES) first. */
int ini_parse_path(const char *path, ini_handler_fn handler, void *opaque, struct error *err);

/* Values, for handlers. -EINVAL with "key: reason". */
int ini_get_string(const struct ini_entry *entry, char *out, size_t size, struct error *err);
int ini_get_uint(const struct ini_entry *entry, unsigned min, unsigned max, unsigned *out, struct error *err);
/* yes/no, true/false, on/off, 1/0 */
int ini_get_bool(const struct ini_entry *entry, bool *out, struct error *err);
/* Bytes with an optional binary suffix K M G T (KiB, MiB, ... accepted too). */
int ini_get_size(const struct ini_entry *entry, uint64_t *out, struct error *err);
/* The same from a string. 0 or -EINVAL. */
int size_parse(const char *text, uint64_t *out);
/* A time: a number with s, m, h or d behind it (s may be left out). Seconds. */
int ini_get_duration(const struct ini_entry *entry, unsigned max_s, unsigned *out_s, struct error *err);
/* The same from a string. 0 or -EINVAL, also above max_s. */
int duration_parse(const char *text, unsigned max_s, unsigned *out_s);

#endif
