/* SPDX-License-Identifier: Apache-2.0 */
#ifndef TUI_TEXT_H
#define TUI_TEXT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <wchar.h>

/* Words and figures for a person's eyes. Names and reasons come from other hosts, guests and images: nothing
 * that a terminal would obey leaves this file. */

/*
 * The next character of *p as something that may be shown: '?' in the place of what is not UTF-8, of control,
 * formatting and combining characters, and of what the locale (LC_CTYPE) cannot show. *p moves on; 0 at the
 * end. *cells gets the cells that it takes, 1 or 2.
 */
wchar_t text_next(const char **p, unsigned *cells);
/* src as text_next sees it, in UTF-8, cut at a whole character to fit size bytes (at least 1). NULL is "". */
void text_clean(char *dst, size_t size, const char *src);
/* A character as UTF-8, without a NUL; its bytes. */
size_t text_encode(uint32_t c, char out[4]);
/* Cells that text takes. */
unsigned text_cells(const char *text);

#define TEXT_BYTES 24
/* "12.3 MB": decimal, as links are. All three return buf. */
const char *text_bytes(double n, char buf[TEXT_BYTES]);
/* "350 ms", "12.3 s", "2:05", "1:02:05" */
const char *text_span(uint64_t ms, char buf[TEXT_BYTES]);
/* "0:45", "1:02:05" */
const char *text_clock(uint64_t ms, char buf[TEXT_BYTES]);

#endif
