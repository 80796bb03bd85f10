/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "host/ask.h"
#include "host/fsutil.h"
#include "host/jsonl.h"
#include "host/registry.h"
#include "tests/suite.h"

#define UUID "0b8a4c1e-7d2f-4a36-9c55-3f1e2d4c5b6a"

static char dir[128];
static struct host_config cfg;
static struct host_peer peers[2];
static struct error err;

static void setup(void)
{
	snprintf(dir, sizeof dir, "%s/test_ask.XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/var/tmp");
	ck_assert(mkdtemp(dir) != NULL);
	memset(&cfg, 0, sizeof cfg);
	strcpy(cfg.name, "h1");
	strcpy(cfg.state_dir, dir);
	strcpy(peers[0].name, "h2");
	strcpy(peers[1].name, "h3");
	cfg.peers = peers;
	cfg.npeers = 2;
	err = ERROR_INIT;
}

static void teardown(void)
{
	fs_remove_tree(dir, NULL);
}

/* A record in the given state, unlocked, as its dead snvmm left it. */
static void have(enum handover_state state, uint64_t epoch, uint32_t flags)
{
	struct vm_record rec = {
		.uuid = UUID, .name = "vm1", .peer = "h2", .folder = "vms/vm1", .epoch = epoch};
	struct record *r = NULL;
	bool arrival = state == HANDOVER_PREPARED || state == HANDOVER_ABANDONED ||
		       state == HANDOVER_OWNER_UNCONFIRMED;
	rec.state = arrival ? HANDOVER_PREPARED : HANDOVER_OWNER;
	ck_assert_msg(record_create(dir, &rec, &r, &err) == 0, "%s", err.message);
	if (state == HANDOVER_MOVED) {
		rec.state = HANDOVER_HANDING_OVER;
		ck_assert_int_eq(record_compare_and_set(r, HANDOVER_OWNER, epoch, &rec, NULL, &err), 0);
	}
	enum handover_state from = rec.state;
	rec.state = state;
	rec.flags = flags;
	if (from == state)
		ck_assert_int_eq(record_store(r, &rec, &err), 0);
	else
		ck_assert_msg(record_compare_and_set(r, from, epoch, &rec, NULL, &err) == 0, "%s",
			      err.message);
	record_close(r);
}

static enum handover_state state_now(uint32_t *flags)
{
	struct record *r = NULL;
	struct vm_record rec = {.state = HANDOVER_NONE};
	if (record_open(dir, UUID, &r, NULL) == 0)
		record_load(r, &rec, NULL);
	record_close(r);
	if (flags)
		*flags = rec.flags;
	return rec.state;
}

static json_t *report(const char *state, int epoch, int started)
{
	return json_pack("{s:s, s:s, s:i, s:b, s:b}", "uuid", UUID, "state", state, "epoch", epoch, "started",
			 started, "attempt_open", 0);
}

/* Asks as `peer`; the answer's state, or a negative errno. */
static int ask(const char *peer, json_t *question)
{
	json_t *answer = NULL;
	struct handover_report r;
	char uuid[VM_UUID_CHARS + 1];
	int rc = ask_answer_local(&cfg, peer, question, &answer, &err);
	json_decref(question);
	if (!rc) {
		ck_assert_int_eq(ask_report_from_json(answer, false, uuid, &r, &err), 0);
		ck_assert_str_eq(uuid, UUID);
		rc = (int)r.state;
	}
	json_decref(answer);
	return rc;
}

START_TEST(paging_is_said_only_where_it_is)
{
	struct handover_report r = {.state = HANDOVER_OWNER, .epoch = 3}, back;
	char uuid[VM_UUID_CHARS + 1];
	for (int i = 0; i < 2; i++) {
		r.paging = i;
		json_t *o = ask_report_to_json(UUID, &r);
		/* as it was before there was post-copy */
		ck_assert_int_eq(json_object_size(o), 5 + (size_t)i);
		ck_assert_int_eq(ask_report_from_json(o, false, uuid, &back, &err), 0);
		ck_assert(back.paging == (i == 1));
		json_decref(o);
	}
}
END_TEST

/* docs/handover.md: the asked side settles durably, then answers with what it is now. */
static const struct {
	enum handover_state have;
	uint32_t flags;
	const char *says;
	int epoch;
	enum handover_state answer;
} settled[] = {
	{HANDOVER_PREPARED, 0, "handing-over", 5, HANDOVER_ABANDONED},
	{HANDOVER_HANDING_OVER, 0, "owner-unconfirmed", 5, HANDOVER_MOVED},
	{HANDOVER_HANDING_OVER, 0, "owner", 5, HANDOVER_MOVED},
	{HANDOVER_HANDING_OVER, 0, "abandoned", 5, HANDOVER_OWNER},
	{HANDOVER_HANDING_OVER, 0, "abandoned", 4, HANDOVER_HANDING_OVER},
	{HANDOVER_HANDING_OVER, 0, "none", 0, HANDOVER_HANDING_OVER},
	{HANDOVER_OWNER_UNCONFIRMED, 0, "moved", 5, HANDOVER_OWNER},
	{HANDOVER_OWNER_UNCONFIRMED, 0, "handing-over", 5, HANDOVER_OWNER_UNCONFIRMED},
	{HANDOVER_OWNER, 0, "owner-unconfirmed", 5, HANDOVER_OWNER},
	{HANDOVER_MOVED, RECORD_FILES_DONE | RECORD_PEER_STARTED, "owner", 5, HANDOVER_NONE},
	{HANDOVER_MOVED, RECORD_PEER_STARTED, "owner", 5, HANDOVER_MOVED},
	{HANDOVER_ABANDONED, RECORD_FILES_DONE, "owner", 5, HANDOVER_NONE},
	{HANDOVER_ABANDONED, 0, "owner", 5, HANDOVER_ABANDONED},
};

START_TEST(asked_side_settles_then_answers)
{
	have(settled[_i].have, 5, settled[_i].flags);
	int got = ask("h2", report(settled[_i].says, settled[_i].epoch, 1));
	ck_assert_msg(got == (int)settled[_i].answer, "answered %s (%s)",
		      got < 0 ? "error" : handover_state_name(got), err.message);
	ck_assert_int_eq(state_now(NULL), settled[_i].answer);
	/* asking again changes nothing more */
	ck_assert_int_eq(ask("h2", report(settled[_i].says, settled[_i].epoch, 1)), settled[_i].answer);
}
END_TEST

START_TEST(another_host_gets_the_answer_and_changes_nothing)
{
	have(HANDOVER_PREPARED, 5, 0);
	ck_assert_int_eq(ask("h3", report("handing-over", 5, 0)), HANDOVER_PREPARED);
	ck_assert_int_eq(state_now(NULL), HANDOVER_PREPARED);
	ck_assert_int_eq(ask("h9", report("handing-over", 5, 0)), -EPERM);
	ck_assert_int_eq(state_now(NULL), HANDOVER_PREPARED);
}
END_TEST

START_TEST(no_record)
{
	ck_assert_int_eq(ask("h2", report("handing-over", 5, 0)), HANDOVER_NONE);
}
END_TEST

static const char *const malformed[] = {
	"{}",
	"{\"uuid\":\"x\",\"state\":\"owner\",\"epoch\":1}",
	"{\"uuid\":\"../../../../etc/passwd\",\"state\":\"owner\",\"epoch\":1}",
	"{\"uuid\":\"" UUID "\",\"state\":\"king\",\"epoch\":1}",
	"{\"uuid\":\"" UUID "\",\"state\":\"owner\",\"epoch\":-1}",
	"{\"uuid\":\"" UUID "\",\"state\":\"owner\",\"epoch\":\"1\"}",
	"{\"uuid\":\"" UUID "\",\"state\":3,\"epoch\":1}",
};

START_TEST(malformed_questions)
{
	have(HANDOVER_PREPARED, 5, 0);
	ck_assert_int_eq(ask("h2", json_loads(malformed[_i], 0, NULL)), -EPROTO);
	ck_assert_int_eq(state_now(NULL), HANDOVER_PREPARED);
}
END_TEST

static int listener;

static void *live_snvmm(void *arg)
{
	int fd = accept(listener, NULL, NULL);
	struct jsonl *j = jsonl_from_fd(fd);
	json_t *q = NULL;
	if (jsonl_read(j, &q, NULL, 5000, NULL) == 0 &&
	    !strcmp(json_string_value(json_object_get(q, "peer")), "h2") &&
	    !strcmp(json_string_value(json_object_get(json_object_get(q, "report"), "state")),
		    "handing-over")) {
		json_t *a = json_pack("{s:b, s:s, s:s, s:i, s:b}", "ok", 1, "uuid", UUID, "state",
				      "owner-unconfirmed", "epoch", 5, "started", 1);
		jsonl_write(j, a, -1, NULL);
		json_decref(a);
	}
	json_decref(q);
	jsonl_close(j);
	return NULL;
}

/* Who holds the lock answers. Without a socket to reach it: not now, and nothing is written past the lock. */
START_TEST(a_live_snvmm_answers_for_its_vm)
{
	struct record *r = NULL;
	pthread_t t;
	char path[300];
	have(HANDOVER_PREPARED, 5, 0);
	ck_assert_int_eq(record_open(dir, UUID, &r, &err), 0);
	ck_assert_int_eq(record_lock(r, 0, &err), 0);
	ck_assert_int_eq(ask("h2", report("handing-over", 5, 0)), -EAGAIN);
	snprintf(path, sizeof path, "%s/vms/vm1", dir);
	ck_assert_int_eq(fs_make_dirs(path, &err), 0);
	strcat(path, "/snvmm.sock");
	listener = jsonl_listen(path, &err);
	ck_assert_int_ge(listener, 0);
	pthread_create(&t, NULL, live_snvmm, NULL);
	ck_assert_msg(ask("h2", report("handing-over", 5, 0)) == HANDOVER_OWNER_UNCONFIRMED, "%s",
		      err.message);
	pthread_join(t, NULL);
	close(listener);
	record_close(r);
	ck_assert_int_eq(state_now(NULL), HANDOVER_PREPARED);
}
END_TEST

START_TEST(settling_without_news)
{
	static const struct {
		enum handover_state have;
		uint32_t flags;
		enum handover_action next;
		enum handover_state then;
	} cases[] = {
		{HANDOVER_OWNER, 0, HANDOVER_ACT_NONE, HANDOVER_OWNER},
		{HANDOVER_HANDING_OVER, 0, HANDOVER_ACT_ASK, HANDOVER_HANDING_OVER},
		{HANDOVER_MOVED, RECORD_PEER_STARTED, HANDOVER_ACT_CLEAN, HANDOVER_MOVED},
		{HANDOVER_MOVED, RECORD_FILES_DONE | RECORD_PEER_ACKED, HANDOVER_ACT_FORGET, HANDOVER_NONE},
		{HANDOVER_PREPARED, 0, HANDOVER_ACT_CLEAN, HANDOVER_ABANDONED},
		{HANDOVER_OWNER_UNCONFIRMED, 0, HANDOVER_ACT_ASK, HANDOVER_OWNER_UNCONFIRMED}};
	struct record *r = NULL;
	struct vm_record rec;
	enum handover_action next;
	have(cases[_i].have, 5, cases[_i].flags);
	ck_assert_int_eq(record_open(dir, UUID, &r, &err), 0);
	ck_assert_int_eq(record_lock(r, 0, &err), 0);
	ck_assert_msg(settle_record(r, &rec, NULL, &next, &err) == 0, "%s", err.message);
	ck_assert_str_eq(handover_action_name(next), handover_action_name(cases[_i].next));
	record_close(r);
	ck_assert_int_eq(state_now(NULL), cases[_i].then);
}
END_TEST

START_TEST(a_higher_epoch_is_noted)
{
	uint32_t flags;
	have(HANDOVER_OWNER_UNCONFIRMED, 5, 0);
	ck_assert_int_eq(ask("h2", report("owner-unconfirmed", 6, 1)), HANDOVER_OWNER_UNCONFIRMED);
	ck_assert_int_eq(state_now(&flags), HANDOVER_OWNER_UNCONFIRMED);
	ck_assert(flags & RECORD_HIGHER_SEEN);
	struct record *r = NULL;
	struct vm_record rec;
	ck_assert_int_eq(record_open(dir, UUID, &r, &err), 0);
	ck_assert_int_eq(record_load(r, &rec, &err), 0);
	record_close(r);
	ck_assert_uint_eq(rec.peer_epoch, 6);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("ask");
	TCase *tc = tcase_create("ask");
	tcase_add_checked_fixture(tc, setup, teardown);
	tcase_add_loop_test(tc, asked_side_settles_then_answers, 0, ARRAY_SIZE(settled));
	tcase_add_test(tc, another_host_gets_the_answer_and_changes_nothing);
	tcase_add_test(tc, no_record);
	tcase_add_test(tc, paging_is_said_only_where_it_is);
	tcase_add_loop_test(tc, malformed_questions, 0, ARRAY_SIZE(malformed));
	tcase_add_test(tc, a_live_snvmm_answers_for_its_vm);
	tcase_add_loop_test(tc, settling_without_news, 0, 6);
	tcase_add_test(tc, a_higher_epoch_is_noted);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
