/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "tests/suite.h"
#include "vmm/state.h"

static const uint8_t *write_sample(struct state_writer **w, size_t *len)
{
	const uint8_t *buf;
	*w = state_writer_create();
	state_section_begin(*w, "first", 1);
	state_put_u8(*w, 0x12);
	state_put_u16(*w, 0x3456);
	state_put_u32(*w, 0x789abcde);
	state_put_u64(*w, UINT64_C(0x1122334455667788));
	state_section_end(*w);
	state_section_begin(*w, "second", 3);
	state_put_bytes(*w, "hello", 5);
	state_section_end(*w);
	ck_assert_int_eq(state_writer_finish(*w, &buf, len, NULL), 0);
	return buf;
}

START_TEST(what_was_written_is_read)
{
	struct state_writer *w;
	size_t len;
	const uint8_t *buf = write_sample(&w, &len);
	struct state_reader *r;
	uint32_t version;
	ck_assert_int_eq(state_reader_open(buf, len, &r, NULL), 0);
	ck_assert_int_eq(state_reader_section(r, "second", 3, &version, NULL), 0);
	ck_assert_uint_eq(version, 3);
	char hello[5];
	state_get_bytes(r, hello, 5);
	ck_assert_mem_eq(hello, "hello", 5);
	ck_assert_int_eq(state_reader_section_end(r, NULL), 0);
	ck_assert_int_eq(state_reader_section(r, "first", 1, NULL, NULL), 0);
	ck_assert_uint_eq(state_get_u8(r), 0x12);
	ck_assert_uint_eq(state_get_u16(r), 0x3456);
	ck_assert_uint_eq(state_get_u32(r), 0x789abcde);
	ck_assert(state_get_u64(r) == UINT64_C(0x1122334455667788));
	ck_assert_int_eq(state_reader_section_end(r, NULL), 0);
	ck_assert_int_eq(state_reader_finish(r, NULL), 0);
	state_reader_free(r);
	state_writer_free(w);
}
END_TEST

START_TEST(layout_is_fixed)
{
	struct state_writer *w;
	size_t len;
	const uint8_t *buf = write_sample(&w, &len);
	ck_assert_uint_eq(len, 24 + 40 + 15 + 40 + 5);
	ck_assert_mem_eq(buf, "SNMSTATE\x01\0\0\0\x02\0\0\0", 16);
	ck_assert_mem_eq(buf + 24, "first\0", 6);
	ck_assert_mem_eq(buf + 48, "\x01\0\0\0\x0f\0\0\0", 8);
	ck_assert_mem_eq(buf + 64, "\x12\x56\x34\xde\xbc\x9a\x78\x88\x77\x66\x55\x44\x33\x22\x11", 15);
	state_writer_free(w);
}
END_TEST

/* As if they had been written here, with memory made before or not. */
START_TEST(sections_of_another_writer_are_the_same_bytes)
{
	for (int reserve = 0; reserve < 2; reserve++) {
		struct state_writer *plain, *w = state_writer_create(), *other = state_writer_create();
		size_t plain_len, len;
		const uint8_t *expected = write_sample(&plain, &plain_len), *buf;
		if (reserve) {
			ck_assert_int_eq(state_writer_reserve(w, 300000), 0);
			ck_assert_int_eq(state_writer_reserve(other, 300000), 0);
		}
		state_section_begin(w, "first", 1);
		state_put_u8(w, 0x12);
		state_put_u16(w, 0x3456);
		state_put_u32(w, 0x789abcde);
		state_put_u64(w, UINT64_C(0x1122334455667788));
		state_section_end(w);
		state_section_begin(other, "second", 3);
		memcpy(state_put_space(other, 5), "hello", 5);
		state_section_end(other);
		state_put_sections(w, other);
		ck_assert_int_eq(state_writer_finish(w, &buf, &len, NULL), 0);
		ck_assert_uint_eq(len, plain_len);
		ck_assert_mem_eq(buf, expected, len);
		state_writer_free(plain);
		state_writer_free(other);
		state_writer_free(w);
	}
}
END_TEST

START_TEST(what_went_wrong_in_another_writer_is_not_lost)
{
	struct state_writer *w = state_writer_create(), *other = state_writer_create();
	const uint8_t *buf;
	size_t len;
	state_section_begin(other, "left open", 1);
	state_put_sections(w, other);
	ck_assert_int_eq(state_writer_finish(w, &buf, &len, NULL), -EINVAL);
	state_writer_free(other);
	state_writer_free(w);
}
END_TEST

START_TEST(every_flipped_bit_is_found)
{
	struct state_writer *w;
	size_t len;
	const uint8_t *buf = write_sample(&w, &len);
	uint8_t *copy = malloc(len);
	for (size_t bit = 0; bit < len * 8; bit++) {
		struct state_reader *r = NULL;
		struct error err = ERROR_INIT;
		memcpy(copy, buf, len);
		copy[bit / 8] ^= (uint8_t)(1 << bit % 8);
		ck_assert_msg(state_reader_open(copy, len, &r, &err) < 0, "bit %zu", bit);
		ck_assert(err.message[0]);
	}
	free(copy);
	state_writer_free(w);
}
END_TEST

START_TEST(every_truncation_is_found)
{
	struct state_writer *w;
	size_t len;
	const uint8_t *buf = write_sample(&w, &len);
	for (size_t n = 0; n < len; n++) {
		struct state_reader *r = NULL;
		uint8_t *copy = malloc(n + 1); /* the allocator's own bounds tell of reads beyond */
		memcpy(copy, buf, n);
		ck_assert_int_lt(state_reader_open(copy, n, &r, NULL), 0);
		free(copy);
	}
	state_writer_free(w);
}
END_TEST

START_TEST(newer_versions_are_refused_with_advice)
{
	struct state_writer *w;
	size_t len;
	const uint8_t *buf = write_sample(&w, &len);
	struct state_reader *r;
	struct error err = ERROR_INIT;
	ck_assert_int_eq(state_reader_open(buf, len, &r, NULL), 0);
	ck_assert_int_eq(state_reader_section(r, "second", 2, NULL, &err), -ENOTSUP);
	ck_assert_ptr_nonnull(strstr(err.message, "second"));
	ck_assert_ptr_nonnull(strstr(err.message, "upgrade"));
	state_reader_free(r);
	state_writer_free(w);
}
END_TEST

START_TEST(missing_unknown_short_and_long_sections_are_named)
{
	struct state_writer *w;
	size_t len;
	const uint8_t *buf = write_sample(&w, &len);
	struct state_reader *r;
	struct error err = ERROR_INIT;
	ck_assert_int_eq(state_reader_open(buf, len, &r, NULL), 0);
	ck_assert_int_eq(state_reader_section(r, "third", 9, NULL, &err), -ENOENT);
	ck_assert_ptr_nonnull(strstr(err.message, "third"));
	ck_assert_int_eq(state_reader_section(r, "first", 1, NULL, NULL), 0);
	state_get_u32(r);
	ck_assert_int_eq(state_reader_section_end(r, &err), -EPROTO); /* left over */
	ck_assert_ptr_nonnull(strstr(err.message, "first"));
	ck_assert_int_eq(state_reader_finish(r, &err), -EPROTO); /* nobody asked for it */
	ck_assert_ptr_nonnull(strstr(err.message, "second"));
	ck_assert_int_eq(state_reader_section(r, "second", 3, NULL, NULL), 0);
	ck_assert_uint_eq(state_remaining(r), 5);
	state_get_u32(r);
	ck_assert_uint_eq(state_get_u32(r), 0); /* past the end */
	ck_assert_uint_eq(state_get_u8(r), 0);	/* sticky, though a byte is there */
	ck_assert_int_eq(state_reader_section_end(r, &err), -EPROTO);
	ck_assert_ptr_nonnull(strstr(err.message, "short"));
	state_reader_free(r);
	state_writer_free(w);
}
END_TEST

START_TEST(one_name_twice_is_refused)
{
	struct state_writer *w = state_writer_create();
	struct state_reader *r;
	const uint8_t *buf;
	size_t len;
	for (int i = 0; i < 2; i++) {
		state_section_begin(w, "same", 1);
		state_section_end(w);
	}
	ck_assert_int_eq(state_writer_finish(w, &buf, &len, NULL), 0);
	ck_assert_int_eq(state_reader_open(buf, len, &r, NULL), -EPROTO);
	state_writer_free(w);
}
END_TEST

START_TEST(an_open_section_is_an_error_at_the_end)
{
	struct state_writer *w = state_writer_create();
	const uint8_t *buf;
	size_t len;
	state_section_begin(w, "open", 1);
	ck_assert_int_lt(state_writer_finish(w, &buf, &len, NULL), 0);
	state_writer_free(w);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("state");
	TCase *t = tcase_create("state");
	tcase_add_test(t, what_was_written_is_read);
	tcase_add_test(t, layout_is_fixed);
	tcase_add_test(t, sections_of_another_writer_are_the_same_bytes);
	tcase_add_test(t, what_went_wrong_in_another_writer_is_not_lost);
	tcase_add_test(t, every_flipped_bit_is_found);
	tcase_add_test(t, every_truncation_is_found);
	tcase_add_test(t, newer_versions_are_refused_with_advice);
	tcase_add_test(t, missing_unknown_short_and_long_sections_are_named);
	tcase_add_test(t, one_name_twice_is_refused);
	tcase_add_test(t, an_open_section_is_an_error_at_the_end);
	suite_add_tcase(s, t);
	return suite_run(s);
}
