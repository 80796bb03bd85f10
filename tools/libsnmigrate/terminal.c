/* SPDX-License-Identifier: Apache-2.0 */
#define NCURSES_WIDECHAR 1
#include "tools/libsnmigrate/terminal.h"

#include <errno.h>
#include <langinfo.h>
#include <locale.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <curses.h>
#include <term.h>

#include "tui/ui.h"

#define ESCAPE_WAIT_MS 50

static SCREEN *term;
static bool colours;
static chtype attributes[STYLES];

bool terminal_is_able(void)
{
	int error = 0;
	const char *name = getenv("TERM");
	if (!isatty(STDIN_FILENO) || !isatty(STDOUT_FILENO) || !name || !*name || !strcmp(name, "dumb"))
		return false;
	if (setupterm(name, STDOUT_FILENO, &error) != OK)
		return false;
	const char *place = tigetstr("cup"), *clear_screen_words = tigetstr("clear");
	bool able = place && place != (char *)-1 && clear_screen_words && clear_screen_words != (char *)-1;
	del_curterm(cur_term);
	return able;
}

static void choose_attributes(void)
{
	static const struct {
		short colour; /* -1: none */
		attr_t with, without;
	} looks[STYLES] = {
		[STYLE_PLAIN] = {-1, A_NORMAL, A_NORMAL},      [STYLE_DIM] = {-1, A_DIM, A_DIM},
		[STYLE_BOLD] = {-1, A_BOLD, A_BOLD},	       [STYLE_TITLE] = {COLOR_CYAN, A_BOLD, A_BOLD},
		[STYLE_BAR] = {COLOR_CYAN, 0, A_NORMAL},       [STYLE_SEND] = {COLOR_GREEN, 0, A_NORMAL},
		[STYLE_DIRTY] = {COLOR_YELLOW, 0, A_NORMAL},   [STYLE_GOOD] = {COLOR_GREEN, A_BOLD, A_BOLD},
		[STYLE_WARN] = {COLOR_YELLOW, A_BOLD, A_BOLD}, [STYLE_BAD] = {COLOR_RED, A_BOLD, A_BOLD},
		[STYLE_SELECTED] = {-1, A_REVERSE, A_REVERSE}, [STYLE_KEYS] = {-1, A_REVERSE, A_REVERSE},
	};
	const char *no = getenv("NO_COLOR");
	colours = has_colors() && !(no && *no);
	if (colours) {
		start_color();
		if (use_default_colors() != OK)
			assume_default_colors(COLOR_WHITE, COLOR_BLACK);
	}
	for (short i = 0; i < STYLES; i++) {
		bool own = colours && looks[i].colour >= 0;
		if (own)
			init_pair((short)(i + 1), looks[i].colour, -1);
		attributes[i] = own ? looks[i].with | (chtype)COLOR_PAIR(i + 1) : looks[i].without;
	}
}

int terminal_open(void)
{
	term = newterm(NULL, stdout, stdin);
	if (!term)
		return -ENOTTY;
	set_term(term);
	set_escdelay(ESCAPE_WAIT_MS);
	cbreak();
	noecho();
	nonl();
	keypad(stdscr, TRUE);
	nodelay(stdscr, TRUE);
	scrollok(stdscr, FALSE);
	choose_attributes();
	return 0;
}

void terminal_close(void)
{
	if (!term)
		return;
	endwin();
	delscreen(term);
	term = NULL;
}

int terminal_page(struct screen *s)
{
	int rows, cols;
	getmaxyx(stdscr, rows, cols);
	return screen_init(s, rows < 1 ? 1 : (unsigned)rows, cols < 1 ? 1 : (unsigned)cols,
			   !strcmp(nl_langinfo(CODESET), "UTF-8"));
}

void terminal_show(const struct screen *s)
{
	erase();
	for (unsigned row = 0; row < s->rows; row++)
		for (unsigned col = 0; col < s->cols; col++) {
			const struct cell *c = &s->cell[(size_t)row * s->cols + col];
			wchar_t text[2] = {c->ch, 0};
			cchar_t cell;
			chtype a = attributes[c->style];
			if (c->ch && setcchar(&cell, text, a & ~A_COLOR, (short)PAIR_NUMBER(a), NULL) == OK)
				mvadd_wch((int)row, (int)col, &cell);
		}
	curs_set(s->cursor_row >= 0);
	if (s->cursor_row >= 0)
		move(s->cursor_row, s->cursor_col);
	refresh();
}

int terminal_key(void)
{
	wint_t key;
	int rc = wget_wch(stdscr, &key);
	if (rc == ERR)
		return 0;
	if (rc != KEY_CODE_YES)
		return key == 12     ? (clearok(stdscr, TRUE), TERMINAL_REDRAW)
		       : key == '\r' ? UI_KEY_ENTER
				     : (int)key;
	switch (key) {
	case KEY_RESIZE:
		return TERMINAL_RESIZED;
	case KEY_UP:
		return UI_KEY_UP;
	case KEY_DOWN:
		return UI_KEY_DOWN;
	case KEY_ENTER:
		return UI_KEY_ENTER;
	case KEY_BACKSPACE:
	case KEY_DC:
		return UI_KEY_BACKSPACE;
	default:
		return TERMINAL_REDRAW; /* a key without a meaning here */
	}
}
