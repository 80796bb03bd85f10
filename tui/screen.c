/* SPDX-License-Identifier: Apache-2.0 */
#include "tui/screen.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tui/text.h"

int screen_init(struct screen *s, unsigned rows, unsigned cols, bool unicode)
{
	rows = rows < 1 ? 1 : rows > SCREEN_ROWS_MAX ? SCREEN_ROWS_MAX : rows;
	cols = cols < 1 ? 1 : cols > SCREEN_COLS_MAX ? SCREEN_COLS_MAX : cols;
	*s = (struct screen){
		.rows = rows, .cols = cols, .unicode = unicode, .cursor_row = -1, .cursor_col = -1};
	s->cell = calloc((size_t)rows * cols, sizeof *s->cell);
	if (!s->cell)
		return -ENOMEM;
	for (size_t i = 0; i < (size_t)rows * cols; i++)
		s->cell[i].ch = L' ';
	return 0;
}

void screen_free(struct screen *s)
{
	free(s->cell);
	s->cell = NULL;
}

static void put(struct screen *s, unsigned row, unsigned col, enum style style, wchar_t ch)
{
	if (row < s->rows && col < s->cols)
		s->cell[(size_t)row * s->cols + col] = (struct cell){.ch = ch, .style = style};
}

unsigned screen_text(struct screen *s, unsigned row, unsigned col, unsigned end, enum style style,
		     const char *text)
{
	unsigned cells;
	if (end > s->cols)
		end = s->cols;
	for (wchar_t ch; (ch = text_next(&text, &cells)) && col + cells <= end; col += cells) {
		put(s, row, col, style, ch);
		if (cells == 2)
			put(s, row, col + 1, style, 0);
	}
	return col;
}

unsigned screen_format(struct screen *s, unsigned row, unsigned col, unsigned end, enum style style,
		       const char *fmt, ...)
{
	char text[1024];
	va_list ap;
	va_start(ap, fmt);
	vsnprintf(text, sizeof text, fmt, ap);
	va_end(ap);
	return screen_text(s, row, col, end, style, text);
}

void screen_style(struct screen *s, unsigned row, unsigned col, unsigned end, enum style style)
{
	for (; row < s->rows && col < end && col < s->cols; col++)
		s->cell[(size_t)row * s->cols + col].style = style;
}

static double within(double part)
{
	return part >= 1 ? 1 : part > 0 ? part : 0; /* NaN: 0 */
}

void screen_bar(struct screen *s, unsigned row, unsigned col, unsigned end, double part, enum style style)
{
	if (end > s->cols)
		end = s->cols;
	if (col >= end)
		return;
	unsigned width = end - col, filled = (unsigned)(within(part) * width);
	for (unsigned i = 0; i < width; i++) {
		bool full = i < filled;
		put(s, row, col + i, full ? style : STYLE_DIM,
		    s->unicode ? (full ? 0x2588 : 0x2591) : (full ? L'#' : L'-'));
	}
}

void screen_column(struct screen *s, unsigned top, unsigned height, unsigned col, double part,
		   enum style style)
{
	/* eight steps a cell with block characters, three without */
	static const char ascii[] = {' ', '.', ':', '|'};
	unsigned steps = s->unicode ? 8 : 3, filled = (unsigned)(within(part) * height * steps + 0.5);
	if (!filled && part > 0)
		filled = 1;
	for (unsigned i = 0; i < height; i++) {
		unsigned n = filled > i * steps ? filled - i * steps : 0;
		n = n > steps ? steps : n;
		wchar_t ch = !n ? L' ' : s->unicode ? (wchar_t)(0x2580 + n) : (wchar_t)ascii[n];
		put(s, top + height - 1 - i, col, style, ch);
	}
}

void screen_row(const struct screen *s, unsigned row, char *out, size_t size)
{
	size_t at = 0, last = 0;
	for (unsigned col = 0; row < s->rows && col < s->cols; col++) {
		char bytes[8];
		uint32_t c = (uint32_t)s->cell[(size_t)row * s->cols + col].ch;
		if (!c)
			continue;
		size_t n = text_encode(c, bytes);
		if (at + n >= size)
			break;
		memcpy(out + at, bytes, n);
		at += n;
		if (c != ' ')
			last = at;
	}
	out[last] = '\0';
}
