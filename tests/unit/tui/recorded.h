/* SPDX-License-Identifier: Apache-2.0 */
#ifndef TESTS_UNIT_TUI_RECORDED_H
#define TESTS_UNIT_TUI_RECORDED_H

#include <check.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>

#include "tui/model.h"

/* What snmigrate --json printed of a move of the native guest, two disks of 80 MiB, --bandwidth 16M. */
#define RECORDED "tests/unit/tui/move.jsonl"

/* Line n of the record, from 0; NULL after the last. */
static inline json_t *recorded(unsigned n)
{
	static char line[1 << 16];
	json_t *o = NULL;
	FILE *f = fopen(RECORDED, "r");
	ck_assert_msg(f != NULL, "%s: run from the top of the tree", RECORDED);
	for (unsigned i = 0; fgets(line, sizeof line, f); i++)
		if (i == n) {
			o = json_loads(line, 0, NULL);
			ck_assert_ptr_nonnull(o);
			break;
		}
	fclose(f);
	return o;
}

/* Plays lines up to (not including) end, or all. */
static inline void play(struct view *v, unsigned end)
{
	json_t *o;
	for (unsigned i = 0; i < end && (o = recorded(i)); i++) {
		if (json_object_get(o, "result"))
			view_end(v, o);
		else
			view_event(v, o);
		json_decref(o);
	}
}

static inline void event(struct view *v, const char *text)
{
	json_error_t why;
	json_t *o = json_loads(text, 0, &why);
	ck_assert_msg(o != NULL, "%s: %s", text, why.text);
	if (json_object_get(o, "result"))
		view_end(v, o);
	else
		view_event(v, o);
	json_decref(o);
}

#endif
