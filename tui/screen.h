/* SPDX-License-Identifier: Apache-2.0 */
#ifndef TUI_SCREEN_H
#define TUI_SCREEN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <wchar.h>

/* A page of character cells, to be drawn on by functions that know no terminal, then shown by one that does.
 */

enum style {
	STYLE_PLAIN,
	STYLE_DIM,
	STYLE_BOLD,
	STYLE_TITLE, /* of a section */
	STYLE_BAR,   /* done */
	STYLE_SEND,
	STYLE_DIRTY,
	STYLE_GOOD,
	STYLE_WARN,
	STYLE_BAD,
	STYLE_SELECTED,
	STYLE_KEYS, /* the line of keys, and questions */
	STYLES
};

struct cell {
	wchar_t ch; /* 0: the second half of the character before it */
	enum style style;
};

#define SCREEN_ROWS_MAX 500
#define SCREEN_COLS_MAX 1000

struct screen {
	unsigned rows, cols;
	bool unicode; /* blocks and lines may be drawn; else ASCII alone */
	struct cell *cell;
	int cursor_row, cursor_col; /* -1: none is shown */
};

/* Larger ones are cut to SCREEN_*_MAX, empty ones are 1. -ENOMEM. */
int screen_init(struct screen *s, unsigned rows, unsigned cols, bool unicode);
void screen_free(struct screen *s);

/* Writes text (by text_next: no control character gets on a screen) into the columns [col, end) of a row,
 * end at most s->cols; the rest is cut. Returns the column after it. Outside of the screen nothing happens.
 */
unsigned screen_text(struct screen *s, unsigned row, unsigned col, unsigned end, enum style style,
		     const char *text);
unsigned screen_format(struct screen *s, unsigned row, unsigned col, unsigned end, enum style style,
		       const char *fmt, ...) __attribute__((format(printf, 6, 7)));
void screen_style(struct screen *s, unsigned row, unsigned col, unsigned end, enum style style);
/* A bar over [col, end), filled by part (0 to 1) in the style. */
void screen_bar(struct screen *s, unsigned row, unsigned col, unsigned end, double part, enum style style);
/* Column of a graph in rows [top, top + height): part (0 to 1) of its height, from below. */
void screen_column(struct screen *s, unsigned top, unsigned height, unsigned col, double part,
		   enum style style);
/* A row as UTF-8 without the blanks at its end. */
void screen_row(const struct screen *s, unsigned row, char *out, size_t size);

#endif
