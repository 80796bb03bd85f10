/* SPDX-License-Identifier: Apache-2.0 */
#ifndef TOOLS_SNMIGRATE_TERMINAL_H
#define TOOLS_SNMIGRATE_TERMINAL_H

#include <stdbool.h>

#include "tui/screen.h"

/* The one file that knows ncurses: shows pages, reads keys. */

/* Input and output are a terminal that can place its cursor (TERM=dumb cannot). */
bool terminal_is_able(void);
/* Takes the terminal over, until terminal_close. */
int terminal_open(void);
void terminal_close(void);
/* A page of its present size. */
int terminal_page(struct screen *s);
void terminal_show(const struct screen *s);
/* As ui_key takes it; 0: none; TERMINAL_RESIZED; TERMINAL_REDRAW (^L). */
int terminal_key(void);
#define TERMINAL_RESIZED (-1)
#define TERMINAL_REDRAW	 (-2)

#endif
