/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <locale.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "tests/suite.h"
#include "tui/text.h"

static const struct {
	const char *in, *out;
} hostile[] = {
	{"vm1", "vm1"},
	{"", ""},
	{"a\nb\rc\td\x1b[2Je", "a?b?c?d?[2Je"},
	{"\x7f\x01", "??"},
	{"\xc2\x9b"
	 "2J",
	 "?2J"}, /* CSI as one character */
	{"\x9b"
	 "2J",
	 "?2J"},		      /* and as a byte */
	{"\xc0\x9b", "??"},	      /* overlong */
	{"\xe0\x80\x9b", "???"},      /* likewise */
	{"\xf4\x90\x80\x80", "????"}, /* above U+10FFFF */
	{"\xed\xa0\x80", "???"},      /* half of a pair */
	{"\xe2\x82", "??"},	      /* cut off */
	{"\xe2\x80\xae"
	 "abc",
	 "?abc"},	       /* right-to-left override */
	{"\xe2\x80\x8b", "?"}, /* zero width */
	{"e\xcc\x81", "e?"},   /* combining */
	{"gr\xc3\xbc\xc3\x9f", "gr\xc3\xbc\xc3\x9f"},
	{"\xe2\x82\xac 5", "\xe2\x82\xac 5"},
	{"\xe7\xa3\x81\xe7\x9b\x98", "\xe7\xa3\x81\xe7\x9b\x98"}, /* two cells each */
	{"\xf3\xa0\x80\x81", "?"},				  /* a tag */
};

START_TEST(nothing_that_steers_a_terminal_comes_through)
{
	char out[64];
	text_clean(out, sizeof out, hostile[_i].in);
	ck_assert_str_eq(out, hostile[_i].out);
}
END_TEST

START_TEST(every_byte_is_shown_or_replaced)
{
	for (int first = 1; first < 256; first++)
		for (int second = 1; second < 256; second++) {
			char in[] = {(char)first, (char)second, 'x', 0}, out[16];
			text_clean(out, sizeof out, in);
			for (const unsigned char *p = (const unsigned char *)out; *p; p++) {
				ck_assert_msg(*p >= 0x20 && *p != 0x7f, "%02x %02x", first, second);
				if (*p == 0xc2)
					ck_assert_msg(p[1] >= 0xa0, "%02x %02x", first, second);
			}
		}
}
END_TEST

START_TEST(cut_at_a_whole_character)
{
	char out[5];
	text_clean(out, sizeof out, "abc\xc3\xbc");
	ck_assert_str_eq(out, "abc");
	text_clean(out, sizeof out,
		   "ab\xc3\xbc"
		   "c");
	ck_assert_str_eq(out, "ab\xc3\xbc");
	text_clean(out, 1, "abc");
	ck_assert_str_eq(out, "");
	text_clean(out, sizeof out, NULL);
	ck_assert_str_eq(out, "");
}
END_TEST

START_TEST(cells)
{
	ck_assert_uint_eq(text_cells("gr\xc3\xbcn"), 4);
	ck_assert_uint_eq(text_cells("\xe7\xa3\x81\xe7\x9b\x98"), 4);
	ck_assert_uint_eq(text_cells(""), 0);
}
END_TEST

START_TEST(without_utf8_only_ascii)
{
	char out[16];
	ck_assert_ptr_nonnull(setlocale(LC_CTYPE, "C"));
	text_clean(out, sizeof out, "gr\xc3\xbcn");
	ck_assert_ptr_nonnull(setlocale(LC_CTYPE, "C.UTF-8"));
	ck_assert_str_eq(out, "gr?n");
}
END_TEST

START_TEST(figures)
{
	char buf[TEXT_BYTES];
	ck_assert_str_eq(text_bytes(0, buf), "0 B");
	ck_assert_str_eq(text_bytes(-5, buf), "0 B");
	ck_assert_str_eq(text_bytes(999, buf), "999 B");
	ck_assert_str_eq(text_bytes(999.9, buf), "1.0 kB");
	ck_assert_str_eq(text_bytes(12345678, buf), "12.3 MB");
	ck_assert_str_eq(text_bytes(123456789, buf), "123 MB");
	ck_assert_uint_lt(strlen(text_bytes(1e300, buf)), TEXT_BYTES);
	ck_assert_str_eq(text_clock(0, buf), "0:00");
	ck_assert_str_eq(text_clock(59999, buf), "0:59");
	ck_assert_str_eq(text_clock(3600000, buf), "1:00:00");
	ck_assert_uint_lt(strlen(text_clock(UINT64_MAX, buf)), TEXT_BYTES);
	ck_assert_str_eq(text_span(350, buf), "350 ms");
	ck_assert_str_eq(text_span(12399, buf), "12.3 s");
	ck_assert_str_eq(text_span(125000, buf), "2:05");
}
END_TEST

int main(void)
{
	if (!setlocale(LC_CTYPE, "C.UTF-8"))
		abort();
	Suite *s = suite_create("text");
	TCase *tc = tcase_create("text");
	tcase_add_loop_test(tc, nothing_that_steers_a_terminal_comes_through, 0, ARRAY_SIZE(hostile));
	tcase_add_test(tc, every_byte_is_shown_or_replaced);
	tcase_add_test(tc, cut_at_a_whole_character);
	tcase_add_test(tc, cells);
	tcase_add_test(tc, without_utf8_only_ascii);
	tcase_add_test(tc, figures);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
