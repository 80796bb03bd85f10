/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "host/status.h"
#include "tests/suite.h"

/* clang-format off */
static const struct {
	enum handover_state state;
	uint32_t flags;
	bool live;
	const char *seen;
	int waits; /* 0: for nothing; 1: by itself; 2: for a person */
	const char *advice;
} known[] = {
	{HANDOVER_OWNER, RECORD_POWERED_ON, true, "running", 0, ""},
	{HANDOVER_OWNER, 0, false, "stopped", 0, ""},
	{HANDOVER_OWNER, RECORD_POWERED_ON, false, "crashed", 2, "snvm start vm1"},
	{HANDOVER_OWNER, RECORD_POWERED_ON, true, "in-doubt", 2, "snmigrate resolve vm1"},
	{HANDOVER_HANDING_OVER, RECORD_POWERED_ON, true, "paused", 0, ""},
	{HANDOVER_HANDING_OVER, RECORD_POWERED_ON, true, "in-doubt", 2, "snmigrate resolve vm1 --run-here"},
	{HANDOVER_HANDING_OVER, RECORD_POWERED_ON, false, "in-doubt", 2, "bring hostb back"},
	{HANDOVER_MOVED, 0, false, "absent", 2, "start it on hostb (snvm start vm1)"},
	{HANDOVER_MOVED, RECORD_PEER_STARTED, false, "absent", 1, ""},
	{HANDOVER_MOVED, RECORD_PEER_STARTED | RECORD_FILES_DONE, false, "absent", 1, ""},
	{HANDOVER_MOVED, RECORD_PEER_STARTED | RECORD_FILES_DONE | RECORD_PEER_ACKED, false, "absent", 0, ""},
	{HANDOVER_PREPARED, 0, true, "incoming", 0, ""},
	{HANDOVER_PREPARED, 0, true, "in-doubt", 2, "see to the disk"},
	{HANDOVER_PREPARED, 0, false, "incoming", 1, ""},
	{HANDOVER_OWNER_UNCONFIRMED, 0, true, "running", 1, ""},
	{HANDOVER_OWNER_UNCONFIRMED, RECORD_HIGHER_SEEN, false, "in-doubt", 2, "snmigrate resolve vm1"},
	{HANDOVER_OWNER_UNCONFIRMED, 0, true, "in-doubt", 2, "--give-up"},
	{HANDOVER_ABANDONED, 0, false, "absent", 0, ""},
};
/* clang-format on */

START_TEST(what_to_do)
{
	struct vm_record rec = {.state = known[_i].state, .flags = known[_i].flags};
	struct status_advice advice;
	strcpy(rec.name, "vm1");
	strcpy(rec.peer, "hostb");
	bool waits = status_advise(&rec, known[_i].live, known[_i].seen, &advice);
	ck_assert_int_eq(waits, known[_i].waits > 0);
	ck_assert_int_eq(advice.needs_you, known[_i].waits == 2);
	ck_assert_int_eq(*advice.what != '\0', waits);
	ck_assert_msg(strstr(advice.what_to_do, known[_i].advice) != NULL, "%s", advice.what_to_do);
	if (known[_i].waits < 2)
		ck_assert_str_eq(advice.what_to_do, "");
}
END_TEST

int main(void)
{
	Suite *s = suite_create("status");
	TCase *tc = tcase_create("status");
	tcase_add_loop_test(tc, what_to_do, 0, ARRAY_SIZE(known));
	suite_add_tcase(s, tc);
	return suite_run(s);
}
