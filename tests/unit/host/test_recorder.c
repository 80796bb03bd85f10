/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "host/exit.h"
#include "host/recorder.h"
#include "tests/suite.h"

#define NONE 99u

struct known {
	const char *what;
	bool incoming;
	enum { DEAD, IDLE, BUSY, DOUBTS } snvmm;
	unsigned state; /* NONE: no record */
	uint64_t epoch; /* of the record; the move's is 5 */
	uint32_t flags;
	const char *stored; /* result of the last line, or NULL */
	bool patient;
	/* then; "crashed" as the last line of an arrival is a provisional one */
	enum move_verdict verdict;
	const char *result;
	int exit;
};

/* clang-format off */
static const struct known outgoing[] = {
	{"it is worked on", false, BUSY, HANDOVER_OWNER, 5, RECORD_POWERED_ON, NULL, true, MOVE_UNDER_WAY, "", 0},
	{"before its epoch is written", false, BUSY, HANDOVER_OWNER, 4, RECORD_POWERED_ON, NULL, true, MOVE_UNDER_WAY, "", 0},
	{"a former line does not end it", false, BUSY, HANDOVER_OWNER, 5, RECORD_POWERED_ON, "failed", true, MOVE_UNDER_WAY, "", 0},
	{"the destination is silent", false, DOUBTS, HANDOVER_HANDING_OVER, 5, RECORD_POWERED_ON, NULL, true, MOVE_WAITING, "in-doubt", EXIT_IN_DOUBT},
	{"the VMM died in the handover", false, DEAD, HANDOVER_HANDING_OVER, 5, RECORD_POWERED_ON, NULL, false, MOVE_WAITING, "in-doubt", EXIT_IN_DOUBT},
	{"a doubt that was told stays one", false, DEAD, HANDOVER_HANDING_OVER, 5, RECORD_POWERED_ON, "in-doubt", false, MOVE_WAITING, "in-doubt", EXIT_IN_DOUBT},
	{"refused", false, IDLE, HANDOVER_OWNER, 5, RECORD_POWERED_ON, "refused", true, MOVE_OVER, "refused", 17},
	{"cancelled, and the VM stopped since", false, DEAD, HANDOVER_OWNER, 5, 0, "cancelled", false, MOVE_OVER, "cancelled", 17},
	{"failed, and the VM was deleted since", false, DEAD, NONE, 0, 0, "failed", false, MOVE_OVER, "failed", 17},
	{"the line is not written yet", false, IDLE, HANDOVER_OWNER, 5, RECORD_POWERED_ON, NULL, true, MOVE_UNDER_WAY, "", 0},
	{"no line was ever written", false, IDLE, HANDOVER_OWNER, 5, RECORD_POWERED_ON, NULL, false, MOVE_OVER, "failed", EXIT_FAILED},
	{"its process was killed, of a stopped VM", false, DEAD, HANDOVER_OWNER, 5, RECORD_COLD, NULL, false, MOVE_OVER, "failed", EXIT_FAILED},
	{"the VMM was killed", false, DEAD, HANDOVER_OWNER, 5, RECORD_POWERED_ON, NULL, true, MOVE_OVER, "crashed", EXIT_CRASHED},
	{"the VM was stopped", false, DEAD, HANDOVER_OWNER, 5, 0, NULL, true, MOVE_OVER, "failed", EXIT_FAILED},
	{"a doubt that ended here", false, DEAD, HANDOVER_OWNER, 5, RECORD_POWERED_ON, "in-doubt", false, MOVE_OVER, "crashed", EXIT_CRASHED},
	{"a doubt that ended here, alive", false, IDLE, HANDOVER_OWNER, 5, RECORD_POWERED_ON, "in-doubt", false, MOVE_OVER, "failed", EXIT_FAILED},
	{"resolved by a person", false, DEAD, HANDOVER_OWNER_UNCONFIRMED, 7, RECORD_FORCED, "in-doubt", false, MOVE_OVER, "failed", EXIT_FAILED},
	{"moved, being cleaned", false, DEAD, HANDOVER_MOVED, 5, RECORD_PEER_STARTED, "moved", false, MOVE_UNDER_WAY, "", 0},
	{"moved and cleaned", false, DEAD, HANDOVER_MOVED, 5, RECORD_PEER_STARTED | RECORD_FILES_DONE, "moved", false, MOVE_OVER, "moved", 17},
	{"moved, cleaned, no line", false, DEAD, HANDOVER_MOVED, 5, RECORD_FILES_DONE, NULL, false, MOVE_OVER, "moved", EXIT_MOVED},
	{"moved and forgotten", false, DEAD, NONE, 0, 0, "moved", false, MOVE_OVER, "moved", 17},
	{"just moved", false, DEAD, HANDOVER_MOVED, 5, 0, NULL, true, MOVE_UNDER_WAY, "", 0},
	{"moved, and crashed there", false, DEAD, HANDOVER_MOVED, 5, 0, "crashed", false, MOVE_WAITING, "crashed", EXIT_CRASHED},
	{"moved, and coming back", false, IDLE, HANDOVER_PREPARED, 8, 0, "moved", false, MOVE_OVER, "moved", 17},
	{"moved while nobody looked, and back", false, IDLE, HANDOVER_OWNER_UNCONFIRMED, 8, 0, "in-doubt", false, MOVE_OVER, "moved", EXIT_MOVED},
	{"nothing is known", false, DEAD, NONE, 0, 0, NULL, false, MOVE_OVER, "unknown", EXIT_FAILED},
};
static const struct known incoming[] = {
	{"before it is prepared", true, BUSY, NONE, 0, 0, NULL, true, MOVE_UNDER_WAY, "", 0},
	{"the record is the attempt's before", true, BUSY, HANDOVER_ABANDONED, 4, 0, NULL, true, MOVE_UNDER_WAY, "", 0},
	{"refused before there was a record", true, DEAD, NONE, 0, 0, "refused", false, MOVE_OVER, "refused", 17},
	{"killed before there was a record", true, DEAD, NONE, 0, 0, NULL, false, MOVE_OVER, "failed", EXIT_FAILED},
	{"on its way", true, BUSY, HANDOVER_PREPARED, 5, RECORD_POWERED_ON, NULL, true, MOVE_UNDER_WAY, "", 0},
	{"killed on its way", true, DEAD, HANDOVER_PREPARED, 5, RECORD_POWERED_ON, NULL, false, MOVE_WAITING, "in-doubt", EXIT_IN_DOUBT},
	{"given up", true, DEAD, HANDOVER_ABANDONED, 5, 0, "failed", false, MOVE_OVER, "failed", 17},
	{"given up by the daemon", true, DEAD, HANDOVER_ABANDONED, 5, 0, NULL, false, MOVE_OVER, "failed", EXIT_FAILED},
	{"not confirmed yet", true, IDLE, HANDOVER_OWNER_UNCONFIRMED, 5, RECORD_POWERED_ON, "moved", false, MOVE_WAITING, "moved", EXIT_MOVED},
	{"the source shows more", true, IDLE, HANDOVER_OWNER_UNCONFIRMED, 5, RECORD_HIGHER_SEEN, "moved", false, MOVE_WAITING, "in-doubt", EXIT_IN_DOUBT},
	{"arrived", true, IDLE, HANDOVER_OWNER, 5, RECORD_POWERED_ON, "moved", false, MOVE_OVER, "moved", EXIT_MOVED},
	{"arrived, its figures are coming", true, IDLE, HANDOVER_OWNER, 5, RECORD_POWERED_ON, NULL, true, MOVE_UNDER_WAY, "", 0},
	{"arrived without figures", true, IDLE, HANDOVER_OWNER, 5, RECORD_POWERED_ON, NULL, false, MOVE_OVER, "moved", EXIT_MOVED},
	{"arrived and crashed", true, DEAD, HANDOVER_OWNER, 5, RECORD_POWERED_ON, "moved", false, MOVE_OVER, "moved", EXIT_MOVED},
	{"a later attempt", true, BUSY, HANDOVER_PREPARED, 6, 0, NULL, false, MOVE_OVER, "failed", EXIT_FAILED},
	{"a later attempt, its own end known", true, BUSY, HANDOVER_PREPARED, 6, 0, "failed", false, MOVE_OVER, "failed", 17},
	{"arrived, and deleted since", true, DEAD, NONE, 0, 0, "moved", false, MOVE_OVER, "moved", 17},
	{"rehearsed", true, DEAD, HANDOVER_ABANDONED, 5, 0, "rehearsed", false, MOVE_OVER, "rehearsed", 17},
	{"its last memory is on the way", true, BUSY, HANDOVER_OWNER, 5, RECORD_POWERED_ON, "crashed", true, MOVE_UNDER_WAY, "", 0},
	{"likewise, for longer than anybody waits", true, BUSY, HANDOVER_OWNER, 5, RECORD_POWERED_ON, "crashed", false, MOVE_UNDER_WAY, "", 0},
	{"likewise, not confirmed", true, BUSY, HANDOVER_OWNER_UNCONFIRMED, 5, RECORD_POWERED_ON, "crashed", true, MOVE_UNDER_WAY, "", 0},
	{"its last memory has just come", true, IDLE, HANDOVER_OWNER, 5, RECORD_POWERED_ON, "crashed", true, MOVE_UNDER_WAY, "", 0},
	{"killed before its last memory came", true, DEAD, HANDOVER_OWNER, 5, RECORD_POWERED_ON, "crashed", true, MOVE_OVER, "crashed", 17},
	{"likewise, not confirmed, killed", true, DEAD, HANDOVER_OWNER_UNCONFIRMED, 5, RECORD_POWERED_ON, "crashed", false, MOVE_WAITING, "crashed", EXIT_CRASHED},
	{"started again since", true, IDLE, HANDOVER_OWNER, 5, RECORD_POWERED_ON, "crashed", false, MOVE_OVER, "crashed", 17},
	{"arrived and moved on", true, BUSY, HANDOVER_OWNER, 6, RECORD_POWERED_ON, NULL, false, MOVE_OVER, "moved", EXIT_MOVED},
};
/* clang-format on */

static void check_one(const struct known *k)
{
	struct vm_record rec = {.state = k->state, .epoch = k->epoch, .flags = k->flags};
	strcpy(rec.peer, "hostb");
	json_t *stored = k->stored ? json_pack("{s:s, s:i, s:s, s:i}", "result", k->stored, "exit", 17,
					       "reason", "as told", "epoch", 5)
				   : NULL;
	if (k->incoming && k->stored && !strcmp(k->stored, "crashed"))
		json_object_set_new(stored, "provisional", json_true());
	struct move_facts f = {.incoming = k->incoming,
			       .epoch = 5,
			       .peer = "hostb",
			       .live = k->snvmm != DEAD,
			       .busy = k->snvmm >= BUSY,
			       .doubt = k->snvmm == DOUBTS,
			       .patient = k->patient,
			       .record = k->state == NONE ? NULL : &rec,
			       .stored = stored};
	struct move_outcome out;
	move_judge(&f, &out);
	ck_assert_msg(out.verdict == k->verdict && !strcmp(out.result, k->result) && out.exit == k->exit,
		      "%s: %d %s %d (%s)", k->what, out.verdict, out.result, out.exit, out.reason);
	if (k->exit == 17)
		ck_assert_str_eq(out.reason, "as told");
	else if (strcmp(k->result, "") && (strcmp(k->result, "moved") || k->verdict == MOVE_WAITING))
		ck_assert_msg(*out.reason, "%s: no reason", k->what);
	json_decref(stored);
}

START_TEST(moves_from_here)
{
	check_one(&outgoing[_i]);
}
END_TEST

START_TEST(arrivals)
{
	check_one(&incoming[_i]);
}
END_TEST

/* Whatever there is: an answer, and never "moved" while the record says that the VM did not leave. */
START_TEST(no_combination_claims_what_the_record_denies)
{
	static const char *const lines[] = {NULL, "moved", "failed", "in-doubt", "crashed"};
	unsigned n = 0;
	for (unsigned state = HANDOVER_OWNER; state < HANDOVER_STATES; state++)
		for (unsigned bits = 0; bits < 32; bits++)
			for (unsigned line = 0; line < ARRAY_SIZE(lines); line++) {
				struct vm_record rec = {
					.state = state, .epoch = 5, .flags = RECORD_POWERED_ON};
				json_t *stored = lines[line] ? json_pack("{s:s, s:i, s:i}", "result",
									 lines[line], "exit", 0, "epoch", 5)
							     : NULL;
				struct move_facts f = {.incoming = bits & 1,
						       .epoch = 5,
						       .peer = "h",
						       .live = bits & 2,
						       .busy = bits & 4,
						       .doubt = bits & 8,
						       .patient = bits & 16,
						       .record = &rec,
						       .stored = stored};
				struct move_outcome out;
				move_judge(&f, &out);
				bool here = state == HANDOVER_OWNER || state == HANDOVER_HANDING_OVER;
				bool not_here = state == HANDOVER_PREPARED || state == HANDOVER_ABANDONED;
				if (f.incoming ? not_here : here)
					ck_assert_str_ne(out.result, "moved");
				ck_assert(out.verdict == MOVE_UNDER_WAY || *out.result);
				json_decref(stored);
				n++;
			}
	ck_assert_uint_eq(n, 6 * 32 * 5);
}
END_TEST

static bool matches(bool in, const char *text)
{
	json_t *o = json_loads(text, 0, NULL);
	ck_assert_ptr_nonnull(o);
	bool m = move_line_matches(o, in, 5);
	json_decref(o);
	return m;
}

START_TEST(which_line_belongs_to_a_move)
{
	ck_assert(matches(false, "{\"result\": \"failed\", \"epoch\": 5}"));
	ck_assert(matches(false, "{\"result\": \"failed\", \"epoch\": 7, \"first_epoch\": 5}"));
	ck_assert(!matches(false, "{\"result\": \"failed\", \"epoch\": 7, \"first_epoch\": 6}"));
	ck_assert(!matches(false, "{\"result\": \"failed\", \"epoch\": 4, \"first_epoch\": 3}"));
	ck_assert(!matches(false, "{\"epoch\": 5}"));
	ck_assert(!matches(false, "{\"result\": \"failed\", \"epoch\": -5}"));
	ck_assert(!matches(false, "{\"result\": \"failed\"}"));
	ck_assert(matches(true, "{\"result\": \"failed\", \"epoch\": 5}"));
	ck_assert(!matches(true, "{\"result\": \"failed\", \"epoch\": 6}"));
}
END_TEST

int main(void)
{
	Suite *s = suite_create("recorder");
	TCase *tc = tcase_create("recorder");
	tcase_add_loop_test(tc, moves_from_here, 0, ARRAY_SIZE(outgoing));
	tcase_add_loop_test(tc, arrivals, 0, ARRAY_SIZE(incoming));
	tcase_add_test(tc, no_combination_claims_what_the_record_denies);
	tcase_add_test(tc, which_line_belongs_to_a_move);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
