/* SPDX-License-Identifier: Apache-2.0 */
#ifndef TUI_UI_H
#define TUI_UI_H

#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#include "tui/model.h"
#include "tui/screen.h"

/* What the full-screen view shows and what its keys mean, without a terminal: keys change it (ui_key), a page
 * is drawn from it (ui_draw). */

#define UI_MOVES 256

enum ui_mode {
	UI_WATCH,
	UI_CONFIRM,   /* "cancel?" */
	UI_BANDWIDTH, /* a rate is typed in */
};

enum ui_action {
	UI_NONE,
	UI_LEAVE,  /* the moves go on */
	UI_CANCEL, /* the move of ui->target */
	UI_TUNE,   /* its bandwidth: ui->input, as it was typed */
};

enum ui_key { /* beside characters */
	      UI_KEY_ENTER = '\n',
	      UI_KEY_ESCAPE = 27,
	      UI_KEY_BACKSPACE = 127,
	      UI_KEY_UP = 0x110000,
	      UI_KEY_DOWN,
};

struct ui {
	struct view *view[UI_MOVES]; /* the caller's */
	unsigned nviews, selected;
	enum ui_mode mode;
	struct view *target; /* of the question or the prompt */
	char input[24];
};

enum ui_action ui_key(struct ui *ui, int key);
/* since_ms: since the last event came (clocks run on meanwhile); now: the time of day. */
void ui_draw(struct screen *s, const struct ui *ui, uint64_t since_ms, time_t now);

#endif
