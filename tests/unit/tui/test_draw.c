/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <locale.h>
#include <stdlib.h>

#include "tests/suite.h"
#include "tests/unit/tui/recorded.h"
#include "tui/text.h"
#include "tui/ui.h"

#define LINE (SCREEN_COLS_MAX * 4 + 1)

static struct view views[UI_MOVES];
static struct ui ui;
static struct screen page;
static char whole[1 << 20];

static void setup(void)
{
	memset(&ui, 0, sizeof ui);
	view_init(&views[0], "vm1", "hosta", "hostb");
	ui.view[0] = &views[0];
	ui.nviews = 1;
	page = (struct screen){0};
}

static void teardown(void)
{
	screen_free(&page);
}

/* Draws; whole gets the rows, one a line. 2026-01-02 03:04:05 UTC. */
static const char *draw(unsigned rows, unsigned cols, bool unicode)
{
	char line[LINE], *at = whole;
	screen_free(&page);
	ck_assert_int_eq(screen_init(&page, rows, cols, unicode), 0);
	ui_draw(&page, &ui, 0, 1767323045);
	for (unsigned row = 0; row < page.rows; row++) {
		screen_row(&page, row, line, sizeof line);
		at += sprintf(at, "%s\n", line);
	}
	return whole;
}

/* The page is the one kept in FILE; SNM_SCREENS=keep writes it anew, for a person to look at. */
static void as_kept(const char *file)
{
	static char kept[sizeof whole];
	char path[128];
	const char *how = getenv("SNM_SCREENS");
	bool keep = how && !strcmp(how, "keep");
	snprintf(path, sizeof path, "tests/unit/tui/%s", file);
	FILE *f = fopen(path, keep ? "w" : "r");
	ck_assert_msg(f != NULL, "%s: run from the top of the tree", path);
	if (keep)
		fputs(whole, f);
	else
		kept[fread(kept, 1, sizeof kept - 1, f)] = '\0';
	fclose(f);
	ck_assert_msg(keep || !strcmp(kept, whole), "%s is\n%s\nnot\n%s", path, kept, whole);
}

#define HAS(text)     ck_assert_msg(strstr(whole, text) != NULL, "'%s' is not in:\n%s", text, whole)
#define HAS_NOT(text) ck_assert_msg(strstr(whole, text) == NULL, "'%s' is in:\n%s", text, whole)

START_TEST(the_copy_at_80x24)
{
	play(&views[0], 8);
	draw(24, 80, true);
	as_kept("copy_80x24.txt");
}
END_TEST

START_TEST(the_memory_at_200x50)
{
	play(&views[0], 24);
	draw(50, 200, true);
	as_kept("memory_200x50.txt");
	HAS("vm1  hosta -> hostb");
	HAS("root  ");
	HAS("data  ");
	HAS("100 % 83.9 MB of 83.9 MB, mirrored");
	HAS("left, round ");
	HAS("rounds   1: 88.0 MB  2: ");
	HAS("dirtied  ");
	HAS("downtime about ");
	HAS("limit 16.8 MB/s (holds it back)");
	HAS("q leave, the move goes on");
}
END_TEST

START_TEST(short_and_narrow_keep_what_matters)
{
	play(&views[0], 24);
	draw(10, 40, true);
	as_kept("memory_40x10.txt");
	HAS("vm1");
	HAS(" % ");
	HAS("left");
	HAS("mem ");
	HAS("memory ");
	HAS("c cancel b rate q leave");
	draw(3, 40, true);
	HAS("vm1");
	HAS(" % ");
	HAS("q leave");
}
END_TEST

START_TEST(ascii_alone)
{
	play(&views[0], 24);
	draw(24, 80, false);
	for (const char *p = whole; *p; p++)
		ck_assert_msg((*p >= ' ' && *p < 0x7f) || *p == '\n', "%s", whole);
	HAS("####");
}
END_TEST

/* Every size and every moment: no crash, nothing outside, the keys at the bottom. */
START_TEST(any_size)
{
	static const unsigned moments[] = {0, 1, 8, 16, 30, UINT32_MAX};
	char line[LINE];
	for (unsigned m = 0; m < 6; m++) {
		setup();
		play(&views[0], moments[m]);
		view_note(&views[0],
			  "a long sentence that goes over more than one row where the screen is narrow, "
			  "with averylongwordthatfitsnowhereatallbecauseithasnospace");
		for (unsigned rows = 1; rows < 60; rows += rows < 14 ? 1 : 9)
			for (unsigned cols = 1; cols < 240; cols += cols < 30 ? 1 : 13) {
				draw(rows, cols, (rows + cols) & 1);
				for (unsigned row = 0; row < rows; row++) {
					screen_row(&page, row, line, sizeof line);
					ck_assert_uint_le(text_cells(line), cols);
				}
				screen_row(&page, rows - 1, line, sizeof line);
				ck_assert_int_eq(line[0], 'c');
			}
	}
}
END_TEST

START_TEST(names_from_outside_stay_text)
{
	char line[LINE];
	event(&views[0], "{\"event\":\"progress\",\"phase\":\"st\\u001b[2Jorage\",\"disks\":[{\"id\":"
			 "\"\\u001b]0;t\\u0007\","
			 "\"total_bytes\":5,\"synced_bytes\":1},{\"id\":"
			 "\"\xe7\xa3\x81\xe7\x9b\x98\xe7\xa3\x81\xe7\x9b\x98\"}]}");
	view_note(&views[0], "\x1b[31m red \x9b"
			     "1m");
	draw(24, 80, true);
	for (unsigned row = 0; row < page.rows; row++) {
		screen_row(&page, row, line, sizeof line);
		for (const unsigned char *p = (const unsigned char *)line; *p; p++)
			ck_assert_msg(*p >= 0x20 && *p != 0x7f, "%s", line);
	}
	HAS("?[31m red ?1m");
	HAS("?]0;t?");
	/* straight onto a page, without the model in between */
	ck_assert_uint_eq(screen_text(&page, 0, 78, 80, STYLE_PLAIN, "\x1b[5m"), 80);
	screen_row(&page, 0, line, sizeof line);
	ck_assert(!strchr(line, 0x1b));
	/* a wide character does not hang over the edge */
	ck_assert_uint_eq(screen_text(&page, 0, 79, 80, STYLE_PLAIN, "\xe7\xa3\x81"), 79);
}
END_TEST

START_TEST(more_disks_than_rows)
{
	char text[4096] = "{\"event\":\"progress\",\"disks\":[";
	for (unsigned i = 0; i < 20; i++)
		sprintf(text + strlen(text),
			"%s{\"id\":\"disk%02u\",\"total_bytes\":100000000,\"synced_bytes\":%u}", i ? "," : "",
			i, i * 5000000);
	strcat(text, "]}");
	event(&views[0], text);
	draw(50, 100, true);
	HAS("disk00");
	HAS("disk19");
	HAS_NOT("more");
	draw(16, 100, true);
	HAS("disk00");
	HAS(" more");
	HAS_NOT("disk19");
	draw(6, 100, true);
	HAS("20 disks");
	HAS("950 MB of 2.0 GB");
}
END_TEST

START_TEST(messages_are_wrapped_newest_last)
{
	for (unsigned i = 0; i < 30; i++) {
		char text[128];
		snprintf(text, sizeof text, "message %u says something that does not fit on one row of forty",
			 i);
		view_note(&views[0], text);
	}
	draw(24, 40, true);
	HAS("message 29 says something that does not\nfit on one row of forty");
	HAS("message 28");
	HAS_NOT("message 0 ");
	ck_assert(strstr(whole, "message 29") > strstr(whole, "message 28"));
}
END_TEST

START_TEST(the_proof_of_the_disks)
{
	event(&views[0], "{\"event\":\"phase\",\"phase\":\"verify\",\"ms\":5}");
	event(&views[0], "{\"event\":\"progress\",\"phase\":\"verify\",\"verified_bytes\":25000000,"
			 "\"verify_bytes\":100000000}");
	draw(24, 80, true);
	HAS("verify ");
	HAS("compared ");
	HAS(" 25 % 25.0 MB of 100 MB");
	event(&views[0], "{\"event\":\"progress\",\"phase\":\"memory\"}");
	draw(24, 80, true);
	HAS_NOT("compared");
}
END_TEST

START_TEST(a_slowed_guest)
{
	event(&views[0], "{\"event\":\"progress\",\"phase\":\"memory\",\"predicted_downtime_ms\":120.4,"
			 "\"guest_slowed_percent\":62,\"guest_slowed_vcpus\":1}");
	draw(24, 80, true);
	HAS("downtime about 120 ms  guest slowed by 62 %");
	draw(24, 50, true);
	HAS("guest -62 %");
	event(&views[0], "{\"event\":\"progress\",\"phase\":\"memory\",\"guest_slowed_percent\":0}");
	draw(24, 80, true);
	HAS_NOT("slowed");
	event(&views[0], "{\"event\":\"progress\",\"guest_slowed_percent\":1e300}");
	ck_assert_uint_eq(views[0].slowed_percent, 100);
	event(&views[0], "{\"event\":\"end\",\"result\":\"moved\",\"guest_slowed_percent\":62}");
	draw(24, 80, true);
	HAS_NOT("slowed");
}
END_TEST

START_TEST(post_copy)
{
	event(&views[0], "{\"event\":\"phase\",\"phase\":\"postcopy\",\"ms\":5}");
	event(&views[0],
	      "{\"event\":\"progress\",\"phase\":\"postcopy\",\"predicted_downtime_ms\":99,\"postcopy\":{"
	      "\"faults\":12,\"fault_median_us\":1500,\"fault_worst_us\":90000,\"connected\":true}}");
	draw(24, 80, true);
	HAS("postcopy ");
	HAS("12 waits for a page, 1.5 ms (worst 90.0)");
	HAS_NOT("99 ms");
	event(&views[0], "{\"event\":\"progress\",\"phase\":\"postcopy\",\"postcopy\":{\"faults\":-1,"
			 "\"connected\":false}}");
	draw(24, 80, true);
	HAS("guest waits for the link");
}
END_TEST

START_TEST(the_end_is_shown)
{
	play(&views[0], UINT32_MAX);
	draw(24, 80, true);
	HAS("100 % ");
	HAS("moved");
	HAS("downtime 50 ms");
	HAS_NOT(" left, ends");
}
END_TEST

START_TEST(many_moves)
{
	static char names[UI_MOVES][8];
	for (unsigned i = 0; i < 40; i++) {
		snprintf(names[i], sizeof names[i], "vm%02u", i);
		view_init(&views[i], names[i], "hosta", i & 1 ? "hostb" : "hostc");
		play(&views[i], 4 + i % 8);
		ui.view[i] = &views[i];
	}
	ui.nviews = 40;
	draw(24, 80, true);
	HAS("> vm00 -> hostc");
	HAS("  vm01 -> hostb");
	HAS("vm00  hosta -> hostc");
	HAS("another move");
	for (unsigned i = 0; i < 39; i++)
		ui_key(&ui, UI_KEY_DOWN);
	draw(24, 80, true);
	HAS("> vm39 -> hostb");
	HAS("vm39  hosta -> hostb");
	HAS_NOT("vm00");
	ui_key(&ui, UI_KEY_DOWN);
	ck_assert_uint_eq(ui.selected, 39);
	ui_key(&ui, '\t');
	ck_assert_uint_eq(ui.selected, 0);
	ui_key(&ui, UI_KEY_UP);
	ck_assert_uint_eq(ui.selected, 0);
}
END_TEST

START_TEST(none_yet)
{
	ui.nviews = 0;
	draw(24, 80, true);
	HAS("no VM of this host is being moved");
	ck_assert_int_eq(ui_key(&ui, 'c'), UI_NONE);
	ck_assert_int_eq(ui.mode, UI_WATCH);
	ck_assert_int_eq(ui_key(&ui, 'q'), UI_LEAVE);
}
END_TEST

START_TEST(cancel_asks_once)
{
	ck_assert_int_eq(ui_key(&ui, 'c'), UI_NONE);
	draw(24, 80, true);
	HAS("Cancel the move of vm1? It stays where it is. y/n");
	ck_assert_int_eq(ui_key(&ui, 'x'), UI_NONE); /* anything else is a no */
	draw(24, 80, true);
	HAS_NOT("Cancel the move");
	ck_assert_int_eq(ui_key(&ui, 'y'), UI_NONE);
	ui_key(&ui, 'c');
	ck_assert_int_eq(ui_key(&ui, 'q'), UI_NONE); /* not even leaving */
	ui_key(&ui, 'c');
	ck_assert_int_eq(ui_key(&ui, 'y'), UI_CANCEL);
	ck_assert_ptr_eq(ui.target, &views[0]);
	/* one that has ended cannot be cancelled, nor one that ends while the question stands */
	ui_key(&ui, 'c');
	event(&views[0], "{\"result\":\"moved\"}");
	ck_assert_int_eq(ui_key(&ui, 'y'), UI_NONE);
	ck_assert_int_eq(ui.mode, UI_WATCH);
	ui_key(&ui, 'c');
	ck_assert_int_eq(ui.mode, UI_WATCH);
}
END_TEST

START_TEST(a_bandwidth_is_typed_in)
{
	ui_key(&ui, 'b');
	ck_assert_int_eq(ui_key(&ui, UI_KEY_ENTER), UI_NONE); /* nothing typed: nothing changes */
	ui_key(&ui, 'b');
	for (const char *p = "2x;\x1b"
			     "0";
	     *p && *p != 0x1b; p++)
		ck_assert_int_eq(ui_key(&ui, *p), UI_NONE);
	ui_key(&ui, '0');
	ui_key(&ui, '9');
	ui_key(&ui, UI_KEY_BACKSPACE);
	ui_key(&ui, 'M');
	ck_assert_str_eq(ui.input, "20M");
	draw(24, 80, true);
	HAS("20M");
	ck_assert_int_eq(page.cursor_row, 23);
	ck_assert_int_ge(page.cursor_col, 3);
	ck_assert_int_eq(ui_key(&ui, UI_KEY_ENTER), UI_TUNE);
	ck_assert_str_eq(ui.input, "20M");
	ui_key(&ui, 'b');
	ck_assert_str_eq(ui.input, "");
	for (unsigned i = 0; i < 100; i++)
		ui_key(&ui, '1');
	ck_assert_uint_lt(strlen(ui.input), sizeof ui.input);
	for (unsigned i = 0; i < 100; i++)
		ui_key(&ui, UI_KEY_BACKSPACE);
	ck_assert_str_eq(ui.input, "");
	ck_assert_int_eq(ui_key(&ui, UI_KEY_ESCAPE), UI_NONE);
	ck_assert_int_eq(ui.mode, UI_WATCH);
}
END_TEST

int main(void)
{
	if (!setlocale(LC_CTYPE, "C.UTF-8"))
		abort();
	setenv("TZ", "UTC", 1);
	setenv("CK_MAX_MSG_SIZE", "1000000", 1); /* whole pages */
	Suite *s = suite_create("draw");
	TCase *tc = tcase_create("draw");
	tcase_add_checked_fixture(tc, setup, teardown);
	tcase_add_test(tc, the_copy_at_80x24);
	tcase_add_test(tc, the_memory_at_200x50);
	tcase_add_test(tc, short_and_narrow_keep_what_matters);
	tcase_add_test(tc, ascii_alone);
	tcase_add_test(tc, any_size);
	tcase_add_test(tc, names_from_outside_stay_text);
	tcase_add_test(tc, more_disks_than_rows);
	tcase_add_test(tc, messages_are_wrapped_newest_last);
	tcase_add_test(tc, the_proof_of_the_disks);
	tcase_add_test(tc, a_slowed_guest);
	tcase_add_test(tc, post_copy);
	tcase_add_test(tc, the_end_is_shown);
	tcase_add_test(tc, many_moves);
	tcase_add_test(tc, none_yet);
	tcase_add_test(tc, cancel_asks_once);
	tcase_add_test(tc, a_bandwidth_is_typed_in);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
