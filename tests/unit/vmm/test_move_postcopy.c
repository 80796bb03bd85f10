/* SPDX-License-Identifier: Apache-2.0 */
/* What the source of a post-copy makes of the destination's word, and of --postcopy. */
#include <check.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "tests/suite.h"
#include "vmm/move_source.h"

#define EPOCH 5

static const struct {
	struct handover_report report;
	int judged;
} words[] = {
	/* it runs and lacks pages, whether or not it knows that we know */
	{{.state = HANDOVER_OWNER_UNCONFIRMED, .epoch = EPOCH, .paging = true}, 0},
	{{.state = HANDOVER_OWNER, .epoch = EPOCH, .paging = true}, 0},
	/* a person there said --run-here: the pages are missing all the same */
	{{.state = HANDOVER_OWNER_UNCONFIRMED, .epoch = EPOCH + 1, .paging = true}, 0},
	/* the last word was lost */
	{{.state = HANDOVER_OWNER, .epoch = EPOCH, .started = true}, 1},
	{{.state = HANDOVER_OWNER_UNCONFIRMED, .epoch = EPOCH, .started = true}, 1},
	{{.state = HANDOVER_MOVED, .epoch = EPOCH + 1}, 1},
	{{.state = HANDOVER_HANDING_OVER, .epoch = EPOCH + 2}, 1},
	/* COMMIT is being read */
	{{.state = HANDOVER_PREPARED, .epoch = EPOCH}, -EAGAIN},
	/* its VMM has ended */
	{{.state = HANDOVER_OWNER, .epoch = EPOCH}, -EOWNERDEAD},
	{{.state = HANDOVER_OWNER_UNCONFIRMED, .epoch = EPOCH}, -EOWNERDEAD},
	{{.state = HANDOVER_ABANDONED, .epoch = EPOCH}, -EOWNERDEAD},
	/* deleted there; or stale */
	{{.state = HANDOVER_NONE}, -EOWNERDEAD},
	{{.state = HANDOVER_OWNER, .epoch = EPOCH - 1, .paging = true}, -EOWNERDEAD},
};

START_TEST(the_word_of_the_destination)
{
	ck_assert_int_eq(source_postcopy_judge(&words[_i].report, EPOCH), words[_i].judged);
}
END_TEST

static enum move_exceed exceed = MOVE_EXCEED_THROTTLE;

static int parse(const char *text, enum move_postcopy *out)
{
	struct move_options opt = {.on_exceed = exceed};
	json_t *o = json_loads(text, 0, NULL);
	ck_assert_ptr_nonnull(o);
	int rc = source_postcopy_parse(o, &opt, NULL);
	json_decref(o);
	*out = opt.postcopy;
	return rc;
}

START_TEST(the_option)
{
	enum move_postcopy p;
	ck_assert_int_eq(parse("{}", &p), 0);
	ck_assert_int_eq(p, MOVE_POSTCOPY_NEVER);
	ck_assert_int_eq(parse("{\"postcopy\":\"auto\"}", &p), 0);
	ck_assert_int_eq(p, MOVE_POSTCOPY_AUTO);
	ck_assert_int_eq(parse("{\"postcopy\":\"now\"}", &p), 0);
	ck_assert_int_eq(p, MOVE_POSTCOPY_NOW);
	ck_assert_int_eq(parse("{\"postcopy\":\"never\"}", &p), 0);
	ck_assert_int_eq(p, MOVE_POSTCOPY_NEVER);
	ck_assert_int_eq(parse("{\"postcopy\":\"later\"}", &p), -EINVAL);
	ck_assert_int_eq(parse("{\"postcopy\":1}", &p), -EINVAL);
	exceed = MOVE_EXCEED_POSTCOPY;
	ck_assert_int_eq(parse("{}", &p), 0);
	ck_assert_int_eq(p, MOVE_POSTCOPY_AUTO);
	ck_assert_int_eq(parse("{\"postcopy\":\"now\"}", &p), 0);
	ck_assert_int_eq(p, MOVE_POSTCOPY_NOW);
	ck_assert_int_eq(parse("{\"postcopy\":\"never\"}", &p), -EINVAL);
}
END_TEST

static struct move_events *quiet;

static int accepted(enum move_postcopy asked, const char *hello_ok, bool *agreed, struct error *err)
{
	struct move mv = {.opt = {.postcopy = asked, .peer = "host2", .max_rounds = 30}, .events = quiet};
	json_t *o = json_loads(hello_ok, 0, NULL);
	ck_assert_ptr_nonnull(o);
	*err = ERROR_INIT;
	int rc = source_postcopy_accepted(&mv, o, err);
	json_decref(o);
	*agreed = mv.postcopy.agreed;
	if (!rc)
		ck_assert_uint_eq(source_postcopy_rounds(&mv), !*agreed			    ? 30
							       : asked == MOVE_POSTCOPY_NOW ? 1
											    : 6);
	return rc;
}

#define TOKEN "0123456789abcdef0123456789abcdef"

START_TEST(what_a_destination_can)
{
	const char *both = "{\"postcopy_tokens\":[\"" TOKEN "\",\"" TOKEN "\"]}";
	struct error err;
	bool agreed;
	quiet = move_events_create();
	ck_assert_int_eq(accepted(MOVE_POSTCOPY_NOW, both, &agreed, &err), 0);
	ck_assert(agreed);
	ck_assert_int_eq(accepted(MOVE_POSTCOPY_AUTO, both, &agreed, &err), 0);
	ck_assert(agreed);
	/* not asked for: nothing counts */
	ck_assert_int_eq(accepted(MOVE_POSTCOPY_NEVER, both, &agreed, &err), 0);
	ck_assert(!agreed);
	/* one that is older, one that cannot */
	ck_assert_int_eq(accepted(MOVE_POSTCOPY_AUTO, "{}", &agreed, &err), 0);
	ck_assert(!agreed);
	ck_assert_int_eq(accepted(MOVE_POSTCOPY_NOW, "{}", &agreed, &err), -EOPNOTSUPP);
	ck_assert_msg(strstr(err.message, "host2 does not know post-copy: upgrade it"), "%s", err.message);
	ck_assert_int_eq(accepted(MOVE_POSTCOPY_NOW, "{\"postcopy_refused\":\"no way\"}", &agreed, &err),
			 -EOPNOTSUPP);
	ck_assert_msg(strstr(err.message, "host2 cannot take part in post-copy: no way"), "%s", err.message);
	ck_assert_int_eq(accepted(MOVE_POSTCOPY_NOW, "{\"postcopy_tokens\":[\"" TOKEN "\"]}", &agreed, &err),
			 -EPROTO);
	ck_assert_int_eq(
		accepted(MOVE_POSTCOPY_NOW, "{\"postcopy_tokens\":[\"x\",\"" TOKEN "\"]}", &agreed, &err),
		-EPROTO);
	ck_assert_int_eq(accepted(MOVE_POSTCOPY_AUTO, "{\"postcopy_tokens\":7}", &agreed, &err), -EPROTO);
	move_events_free(quiet);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("move_postcopy");
	TCase *tc = tcase_create("all");
	tcase_add_loop_test(tc, the_word_of_the_destination, 0, ARRAY_SIZE(words));
	tcase_add_test(tc, the_option);
	tcase_add_test(tc, what_a_destination_can);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
