/* SPDX-License-Identifier: Apache-2.0 */
/* Codes, proofs, messages and the daemon's table of codes. */
#include <check.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "host/pair.h"
#include "host/pair_codes.h"
#include "tests/suite.h"

#define SHA_A	  "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
#define SHA_B	  "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
#define MINUTE_MS 60000

static struct error err;

START_TEST(a_code_survives_typing)
{
	struct pair_code code, back;
	char text[PAIR_CODE_CHARS + 1], typed[64];
	for (int i = 0; i < 200; i++) {
		ck_assert_int_eq(pair_code_make(SHA_A, &code, &err), 0);
		pair_code_format(&code, text);
		ck_assert_uint_eq(strlen(text), PAIR_CODE_CHARS);
		ck_assert_int_eq(pair_code_parse(text, &back, &err), 0);
		ck_assert_mem_eq(&code, &back, sizeof code);
		/* as people type: small letters, spaces, O for 0, l for 1 */
		size_t n = 0;
		for (const char *p = text; *p; p++)
			typed[n++] = *p == '-' ? ' ' : *p == '0' ? 'o' : *p == '1' ? 'l' : (char)(*p | 0x20);
		typed[n] = '\0';
		ck_assert_msg(pair_code_parse(typed, &back, &err) == 0, "%s: %s", typed, err.message);
		ck_assert_mem_eq(&code, &back, sizeof code);
		ck_assert(pair_code_is_of(&code, SHA_A));
		ck_assert(!pair_code_is_of(&code, SHA_B));
		ck_assert(!pair_code_is_of(&code, "aa"));
	}
}
END_TEST

START_TEST(every_wrong_letter_is_found_before_anything_is_sent)
{
	static const char all[] = "0123456789ABCDEFGHJKMNPQRSTVWXYZ";
	struct pair_code code, back;
	char text[PAIR_CODE_CHARS + 1];
	ck_assert_int_eq(pair_code_make(SHA_A, &code, &err), 0);
	pair_code_format(&code, text);
	for (unsigned at = 0; at < PAIR_CODE_CHARS; at++) {
		char right = text[at];
		for (const char *p = all; right != '-' && *p; p++) {
			if (*p == right)
				continue;
			text[at] = *p;
			ck_assert_msg(pair_code_parse(text, &back, &err) == -EINVAL, "%s", text);
		}
		text[at] = right;
	}
	static const char *const bad[] = {"",
					  "-",
					  "AAAAA",
					  "U0000-00000-00000-00000-00000",
					  "00000-00000-00000-00000-0000",
					  "00000-00000-00000-00000-00000-0",
					  "\x80\xff",
					  "00000_00000"};
	for (size_t i = 0; i < ARRAY_SIZE(bad); i++)
		ck_assert_msg(pair_code_parse(bad[i], &back, &err) == -EINVAL, "%s", bad[i]);
}
END_TEST

START_TEST(codes_do_not_repeat)
{
	struct pair_code a, b;
	ck_assert_int_eq(pair_code_make(SHA_A, &a, &err), 0);
	ck_assert_int_eq(pair_code_make(SHA_A, &b, &err), 0);
	ck_assert_mem_ne(a.secret, b.secret, sizeof a.secret);
	/* nor does the tag tell anything about a certificate that is known */
	ck_assert_mem_ne(a.tag, b.tag, sizeof a.tag);
}
END_TEST

static struct pair_binding binding(uint8_t seed)
{
	struct pair_binding b;
	memset(&b, seed, sizeof b);
	return b;
}

static struct pair_hello hello_by(const struct pair_code *code, const struct pair_binding *b)
{
	struct pair_hello h = {.version_min = 1,
			       .version_max = 1,
			       .name = "host2",
			       .address = "192.0.2.2:16516",
			       .port = 16516};
	pair_prove_hello(code, b, &h, h.proof);
	return h;
}

START_TEST(a_proof_is_of_one_session_one_pair_of_certificates_one_role_and_one_message)
{
	struct pair_code code, other;
	ck_assert_int_eq(pair_code_make(SHA_A, &code, &err), 0);
	ck_assert_int_eq(pair_code_make(SHA_A, &other, &err), 0);
	struct pair_binding b = binding(1);
	struct pair_hello h = hello_by(&code, &b), changed;
	uint8_t p[PAIR_PROOF_BYTES];
	pair_prove_hello(&code, &b, &h, p);
	ck_assert(pair_proofs_equal(p, h.proof));
	pair_prove_hello(&other, &b, &h, p);
	ck_assert(!pair_proofs_equal(p, h.proof));
	uint8_t *parts[] = {b.exported, b.caller, b.listener};
	for (size_t i = 0; i < ARRAY_SIZE(parts); i++) {
		parts[i][31] ^= 1;
		pair_prove_hello(&code, &b, &h, p);
		ck_assert(!pair_proofs_equal(p, h.proof));
		parts[i][31] ^= 1;
	}
	changed = h;
	strcpy(changed.name, "host3");
	pair_prove_hello(&code, &b, &changed, p);
	ck_assert(!pair_proofs_equal(p, h.proof));
	changed = h;
	changed.port++;
	pair_prove_hello(&code, &b, &changed, p);
	ck_assert(!pair_proofs_equal(p, h.proof));
	/* the answer cannot be made of the question */
	struct pair_reply r = {.ok = true, .name = "host2"};
	pair_prove_reply(&code, &b, &r, p);
	ck_assert(!pair_proofs_equal(p, h.proof));
}
END_TEST

START_TEST(messages_come_back_as_they_were)
{
	struct pair_code code;
	struct pair_binding b = binding(2);
	ck_assert_int_eq(pair_code_make(SHA_A, &code, &err), 0);
	struct pair_hello h = hello_by(&code, &b), h2;
	CLEANUP_FREE char *text = pair_hello_text(&h);
	ck_assert_msg(pair_hello_parse(text, strlen(text), &h2, &err) == 0, "%s", err.message);
	ck_assert_mem_eq(&h, &h2, sizeof h);
	struct pair_reply r = {.ok = true, .name = "host1"}, r2;
	pair_prove_reply(&code, &b, &r, r.proof);
	CLEANUP_FREE char *answer = pair_reply_text(&r);
	ck_assert_msg(pair_reply_parse(answer, strlen(answer), &r2, &err) == 0, "%s", err.message);
	ck_assert_mem_eq(&r, &r2, sizeof r);
	struct pair_reply no = {.reason = "the code is wrong"};
	CLEANUP_FREE char *refusal = pair_reply_text(&no);
	ck_assert_int_eq(pair_reply_parse(refusal, strlen(refusal), &r2, &err), 0);
	ck_assert(!r2.ok);
	ck_assert_str_eq(r2.reason, "the code is wrong");
}
END_TEST

#define PROOF "0000000000000000000000000000000000000000000000000000000000000000"
static const char *const bad_hellos[] = {
	"",
	"[]",
	"{",
	"{}",
	"null",
	"{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":1}}}}}",
	"{\"versions\":[1,1],\"name\":\"../x\",\"address\":\"\",\"port\":1,\"proof\":\"" PROOF "\"}",
	"{\"versions\":[1,1],\"name\":\"\",\"address\":\"\",\"port\":1,\"proof\":\"" PROOF "\"}",
	"{\"versions\":[1,1],\"name\":5,\"address\":\"\",\"port\":1,\"proof\":\"" PROOF "\"}",
	"{\"versions\":[1,1],\"name\":\"h\",\"name\":\"g\",\"address\":\"\",\"port\":1,\"proof\":\"" PROOF
	"\"}",
	"{\"versions\":[2,1],\"name\":\"h\",\"address\":\"\",\"port\":1,\"proof\":\"" PROOF "\"}",
	"{\"versions\":[2,3],\"name\":\"h\",\"address\":\"\",\"port\":1,\"proof\":\"" PROOF "\"}",
	"{\"versions\":[1],\"name\":\"h\",\"address\":\"\",\"port\":1,\"proof\":\"" PROOF "\"}",
	"{\"versions\":[1,1],\"name\":\"h\",\"address\":\"a b\",\"port\":1,\"proof\":\"" PROOF "\"}",
	"{\"versions\":[1,1],\"name\":\"h\",\"address\":\"a\\n\",\"port\":1,\"proof\":\"" PROOF "\"}",
	"{\"versions\":[1,1],\"name\":\"h\",\"address\":\"a:99999\",\"port\":1,\"proof\":\"" PROOF "\"}",
	"{\"versions\":[1,1],\"name\":\"h\",\"address\":\"\",\"port\":65536,\"proof\":\"" PROOF "\"}",
	"{\"versions\":[1,1],\"name\":\"h\",\"address\":\"\",\"port\":-1,\"proof\":\"" PROOF "\"}",
	"{\"versions\":[1,1],\"name\":\"h\",\"address\":\"\",\"port\":1,\"proof\":\"00\"}",
	"{\"versions\":[1,1],\"name\":\"h\",\"address\":\"\",\"port\":1,\"proof\":\"G" PROOF "\"}",
	"{\"versions\":[1,1],\"name\":\"h\",\"address\":\"\",\"port\":1}",
};

START_TEST(a_hostile_message_is_refused)
{
	struct pair_hello h;
	err = ERROR_INIT;
	ck_assert_int_eq(pair_hello_parse(bad_hellos[_i], strlen(bad_hellos[_i]), &h, &err), -EPROTO);
	ck_assert(*err.message);
}
END_TEST

START_TEST(a_reason_is_bounded_and_printable)
{
	struct pair_reply r;
	static const char text[] = "{\"ok\":false,\"error\":\"\\u001b[31mgotcha\\n\"}";
	ck_assert_int_eq(pair_reply_parse(text, sizeof text - 1, &r, &err), 0);
	ck_assert_str_eq(r.reason, "?[31mgotcha?");
	char large[1000];
	snprintf(large, sizeof large, "{\"ok\":false,\"error\":\"%0500d\"}", 0);
	ck_assert_int_eq(pair_reply_parse(large, strlen(large), &r, &err), -EPROTO);
}
END_TEST

/* ---- the table ---- */

static struct pair_codes codes;
static unsigned accepted;
static int accept_code;

static int take(void *opaque, const struct pair_hello *hello, struct error *e)
{
	if (accept_code)
		return error_set(e, accept_code, "not that host");
	accepted++;
	return 0;
}

static void table_setup(void)
{
	pair_codes_init(&codes);
	accepted = 0;
	accept_code = 0;
	err = ERROR_INIT;
}

static int redeem(const struct pair_code *code, uint64_t now)
{
	struct pair_binding b = binding(3);
	struct pair_hello h = hello_by(code, &b);
	struct pair_reply r = {.ok = true, .name = "host1"};
	uint8_t want[PAIR_PROOF_BYTES];
	int rc = pair_codes_redeem(&codes, &b, &h, now, take, NULL, &r, &err);
	pair_prove_reply(code, &b, &r, want);
	ck_assert(pair_proofs_equal(want, r.proof) == !rc);
	return rc;
}

START_TEST(a_code_is_good_once)
{
	struct pair_code c;
	ck_assert(!pair_codes_any(&codes, 0));
	ck_assert_int_eq(pair_codes_make(&codes, SHA_A, 600, 1000, &c, &err), 0);
	ck_assert(pair_codes_any(&codes, 1000));
	ck_assert_int_eq(redeem(&c, 2000), 0);
	ck_assert_int_eq(redeem(&c, 2001), -EALREADY);
	ck_assert_msg(strstr(err.message, "used already, by host host2") != NULL, "%s", err.message);
	ck_assert_uint_eq(accepted, 1);
}
END_TEST

START_TEST(a_code_expires_and_is_forgotten)
{
	struct pair_code c;
	ck_assert_int_eq(pair_codes_make(&codes, SHA_A, 600, 1000, &c, &err), 0);
	ck_assert_int_eq(redeem(&c, 1000 + 600000), -EKEYEXPIRED);
	ck_assert_int_eq(redeem(&c, 1000 + 605000), -EKEYEXPIRED);
	ck_assert_msg(strstr(err.message, "expired, 5 s ago") != NULL, "%s", err.message);
	ck_assert(pair_codes_any(&codes, 1000 + 600000 + 9 * MINUTE_MS));
	ck_assert(!pair_codes_any(&codes, 1000 + 600000 + 11 * MINUTE_MS));
	ck_assert_uint_eq(accepted, 0);
}
END_TEST

START_TEST(five_wrong_tries_close_every_open_code)
{
	struct pair_code mine, second, wrong;
	ck_assert_int_eq(pair_codes_make(&codes, SHA_A, 600, 0, &mine, &err), 0);
	ck_assert_int_eq(pair_codes_make(&codes, SHA_A, 600, 0, &second, &err), 0);
	for (int i = 0; i < PAIR_WRONG_TRIES_MAX - 1; i++) {
		ck_assert_int_eq(pair_code_make(SHA_A, &wrong, &err), 0);
		ck_assert_int_eq(redeem(&wrong, 10), -EACCES);
		ck_assert_str_eq(err.message, "the code is wrong");
	}
	/* one that is right does not count as a try, and four wrong ones do not close it */
	ck_assert_int_eq(redeem(&second, 11), 0);
	ck_assert_int_eq(redeem(&wrong, 12), -EACCES);
	ck_assert_msg(strstr(err.message, "no code is open there any more") != NULL, "%s", err.message);
	ck_assert_int_eq(redeem(&mine, 13), -EPERM);
	ck_assert_uint_eq(accepted, 1);
	/* a new one is good */
	ck_assert_int_eq(pair_codes_make(&codes, SHA_A, 600, 14, &mine, &err), 0);
	ck_assert_int_eq(redeem(&mine, 15), 0);
}
END_TEST

START_TEST(a_refused_host_does_not_use_the_code_up)
{
	struct pair_code c;
	ck_assert_int_eq(pair_codes_make(&codes, SHA_A, 600, 0, &c, &err), 0);
	accept_code = EEXIST;
	ck_assert_int_eq(redeem(&c, 1), -EEXIST);
	accept_code = 0;
	ck_assert_int_eq(redeem(&c, 2), 0);
}
END_TEST

START_TEST(open_codes_are_bounded_and_never_pushed_out)
{
	struct pair_code c[PAIR_CODES_MAX], more;
	for (int i = 0; i < PAIR_CODES_MAX; i++)
		ck_assert_int_eq(pair_codes_make(&codes, SHA_A, 600, (uint64_t)i, &c[i], &err), 0);
	ck_assert_int_eq(pair_codes_make(&codes, SHA_A, 600, 9, &more, &err), -ENOSPC);
	ck_assert_int_eq(redeem(&c[5], 10), 0);
	ck_assert_int_eq(pair_codes_make(&codes, SHA_A, 600, 11, &more, &err), 0);
	for (int i = 0; i < PAIR_CODES_MAX; i++)
		ck_assert_int_eq(redeem(&c[i], 12), i == 5 ? -EACCES : 0);
	ck_assert_int_eq(redeem(&more, 13), 0);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("pair");
	TCase *tc = tcase_create("pair");
	tcase_add_checked_fixture(tc, table_setup, NULL);
	tcase_add_test(tc, a_code_survives_typing);
	tcase_add_test(tc, every_wrong_letter_is_found_before_anything_is_sent);
	tcase_add_test(tc, codes_do_not_repeat);
	tcase_add_test(tc, a_proof_is_of_one_session_one_pair_of_certificates_one_role_and_one_message);
	tcase_add_test(tc, messages_come_back_as_they_were);
	tcase_add_loop_test(tc, a_hostile_message_is_refused, 0, (int)ARRAY_SIZE(bad_hellos));
	tcase_add_test(tc, a_reason_is_bounded_and_printable);
	tcase_add_test(tc, a_code_is_good_once);
	tcase_add_test(tc, a_code_expires_and_is_forgotten);
	tcase_add_test(tc, five_wrong_tries_close_every_open_code);
	tcase_add_test(tc, a_refused_host_does_not_use_the_code_up);
	tcase_add_test(tc, open_codes_are_bounded_and_never_pushed_out);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
