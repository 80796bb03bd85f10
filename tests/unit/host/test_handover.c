/* SPDX-License-Identifier: Apache-2.0 */
/* The code against the tables of docs/handover.md, every combination. */
#include <check.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "host/handover.h"
#include "tests/suite.h"

/* ck_assert records every pass in a file: too slow for millions of cases. */
#define MUST(expr)                                                                                           \
	do {                                                                                                 \
		if (!(expr))                                                                                 \
			ck_abort_msg("%s", #expr);                                                           \
	} while (0)

#define COLUMNS_MAX 8
#define ROWS_MAX    64

struct row {
	char cell[COLUMNS_MAX][200];
	unsigned hits;
};

struct table {
	struct row row[ROWS_MAX];
	unsigned n;
};

/* Rows between "<!-- table: NAME -->" and "<!-- end -->", heading and rule left out. */
static void read_table(const char *name, unsigned columns, struct table *t)
{
	char line[1024], start[64];
	unsigned seen = 0;
	bool inside = false;
	CLEANUP_FILE FILE *f = fopen("docs/handover.md", "re");
	ck_assert_msg(f != NULL, "docs/handover.md: %s (run from the root of the tree)", strerror(errno));
	snprintf(start, sizeof start, "<!-- table: %s -->", name);
	memset(t, 0, sizeof *t);
	while (fgets(line, sizeof line, f)) {
		if (!strncmp(line, start, strlen(start))) {
			inside = true;
			continue;
		}
		if (inside && !strncmp(line, "<!-- end -->", 12))
			break;
		if (!inside || line[0] != '|' || seen++ < 2)
			continue;
		ck_assert_uint_lt(t->n, ROWS_MAX);
		char *save = NULL, *p = strtok_r(line, "|", &save);
		unsigned c = 0;
		for (; p && c < columns; p = strtok_r(NULL, "|", &save), c++) {
			while (*p == ' ')
				p++;
			size_t len = strlen(p);
			while (len && (p[len - 1] == ' ' || p[len - 1] == '\n'))
				len--;
			snprintf(t->row[t->n].cell[c], sizeof t->row[0].cell[0], "%.*s", (int)len, p);
		}
		ck_assert_msg(c == columns, "table %s: row %u has %u columns", name, t->n + 1, c);
		t->n++;
	}
	ck_assert_msg(t->n > 0, "table %s not found", name);
}

START_TEST(names_go_both_ways)
{
	for (int s = 0; s < HANDOVER_STATES; s++)
		ck_assert_int_eq(handover_state_parse(handover_state_name((enum handover_state)s)), s);
	ck_assert_int_eq(handover_state_parse("Owner"), -EINVAL);
	ck_assert_int_eq(handover_state_parse(""), -EINVAL);
	ck_assert_str_eq(handover_state_name((enum handover_state)99), "invalid");
	for (int a = 0; a < HANDOVER_ACTIONS; a++)
		ck_assert_ptr_nonnull(handover_action_name((enum handover_action)a));
}
END_TEST

START_TEST(transitions_are_the_document_s)
{
	struct table t;
	read_table("transitions", 3, &t);
	for (int from = 0; from < HANDOVER_STATES; from++)
		for (int to = 0; to < HANDOVER_STATES; to++)
			for (int d = -1; d <= 1; d++) {
				bool want = false;
				for (unsigned i = 0; i < t.n; i++) {
					struct row *r = &t.row[i];
					if (strcmp(r->cell[0],
						   handover_state_name((enum handover_state)from)) ||
					    strcmp(r->cell[1], handover_state_name((enum handover_state)to)))
						continue;
					r->hits++;
					if (!strcmp(r->cell[2], "any") ||
					    (!strcmp(r->cell[2], "=") && d == 0) ||
					    (!strcmp(r->cell[2], ">") && d == 1))
						want = true;
				}
				bool got = handover_transition_allowed((enum handover_state)from, 5,
								       (enum handover_state)to,
								       (uint64_t)(5 + d));
				ck_assert_msg(got == want, "%s epoch 5 -> %s epoch %d: code %d, document %d",
					      handover_state_name((enum handover_state)from),
					      handover_state_name((enum handover_state)to), 5 + d, got, want);
			}
	for (unsigned i = 0; i < t.n; i++)
		ck_assert_msg(t.row[i].hits > 0, "row %u names an unknown state", i + 1);
	ck_assert(!handover_transition_allowed((enum handover_state)99, 1, HANDOVER_OWNER, 1));
	ck_assert(!handover_transition_allowed(HANDOVER_OWNER, 1, (enum handover_state) - 1, 1));
}
END_TEST

/* ---- decisions */

static bool is(const char *cell, const char *word)
{
	return !strcmp(cell, word);
}

static bool flags_match(const char *cell, uint32_t flags)
{
	static const struct {
		const char *name;
		uint32_t bit;
	} names[] = {{"files-done", RECORD_FILES_DONE},	  {"peer-started", RECORD_PEER_STARTED},
		     {"peer-acked", RECORD_PEER_ACKED},	  {"forced", RECORD_FORCED},
		     {"higher-seen", RECORD_HIGHER_SEEN}, {"keep-source", RECORD_KEEP_SOURCE}};
	char copy[200], *save = NULL;

	if (is(cell, "*"))
		return true;
	snprintf(copy, sizeof copy, "%s", cell);
	for (char *p = strtok_r(copy, ",", &save); p; p = strtok_r(NULL, ",", &save)) {
		bool negated = *p == '!', known = false;
		p += negated;
		for (unsigned i = 0; i < ARRAY_SIZE(names); i++)
			if (is(p, names[i].name)) {
				known = true;
				if (!(flags & names[i].bit) != negated)
					return false;
			}
		if (!known)
			ck_abort_msg("unknown flag %s", p);
	}
	return true;
}

static bool process_matches(const char *cell, const struct handover_self *s)
{
	if (is(cell, "*"))
		return true;
	if (is(cell, "dead"))
		return !s->live;
	if (is(cell, "live"))
		return s->live;
	if (is(cell, "uncommitted"))
		return s->live && !s->commit;
	if (is(cell, "commit"))
		return s->live && s->commit;
	if (is(cell, "attempt"))
		return s->live && s->attempt_open;
	if (is(cell, "write-failed"))
		return s->live && s->write_failed;
	ck_abort_msg("unknown process %s", cell);
}

static bool report_matches(const char *cell, const struct handover_report *r)
{
	if (is(cell, "*"))
		return true;
	if (is(cell, "silence"))
		return !r->heard;
	if (!r->heard)
		return false;
	if (is(cell, "some"))
		return r->state != HANDOVER_NONE;
	if (is(cell, "owners"))
		return r->state == HANDOVER_OWNER || r->state == HANDOVER_OWNER_UNCONFIRMED;
	int state = handover_state_parse(cell);
	if (state < 0)
		ck_abort_msg("unknown report %s", cell);
	return (int)r->state == state;
}

static bool epoch_matches(const char *cell, uint64_t own, const struct handover_report *r)
{
	if (is(cell, "*"))
		return true;
	/* "no record" has no epoch */
	if (!r->heard || r->state == HANDOVER_NONE)
		return false;
	if (is(cell, "="))
		return r->epoch == own;
	if (is(cell, ">"))
		return r->epoch > own;
	if (is(cell, "<"))
		return r->epoch < own;
	if (is(cell, ">="))
		return r->epoch >= own;
	ck_abort_msg("unknown epoch %s", cell);
}

static bool detail_matches(const char *cell, const struct vm_record *rec, const struct handover_report *r)
{
	if (is(cell, "*"))
		return true;
	if (is(cell, "asked"))
		return r->heard && r->asked;
	if (is(cell, "closed"))
		return r->heard && !r->attempt_open;
	if (is(cell, "news"))
		return handover_note(rec, r) != rec->flags;
	ck_abort_msg("unknown detail %s", cell);
}

static void for_all(void (*visit)(const struct vm_record *, const struct handover_self *,
				  const struct handover_report *, void *),
		    void *opaque)
{
	struct vm_record rec = {.epoch = 5};
	for (int state = HANDOVER_OWNER; state < HANDOVER_STATES; state++)
		for (uint32_t flags = 0; flags <= RECORD_FLAGS_KNOWN; flags++)
			for (unsigned self = 0; self < 32; self++)
				for (unsigned rep = 0; rep < 1 + HANDOVER_STATES * 3 * 8; rep++) {
					rec.state = (enum handover_state)state;
					rec.flags = flags;
					struct handover_self s = {.live = self & 1,
								  .channel_up = self & 2,
								  .attempt_open = self & 4,
								  .commit = self & 8,
								  .write_failed = self & 16};
					/* these two decide nothing but what users see */
					if (flags & (RECORD_KEEP_SOURCE | RECORD_POWERED_ON) &&
					    state != HANDOVER_OWNER)
						continue;
					/* a dead process has no channel and knows nothing */
					if (!s.live && self)
						continue;
					struct handover_report r = {0};
					if (rep) {
						unsigned x = rep - 1;
						r.heard = true;
						r.asked = x & 1;
						r.started = x & 2;
						r.attempt_open = x & 4;
						x /= 8;
						r.epoch = 4 + x % 3;
						r.state = (enum handover_state)(x / 3);
					}
					visit(&rec, &s, &r, opaque);
				}
}

static void compare_decision(const struct vm_record *rec, const struct handover_self *s,
			     const struct handover_report *r, void *opaque)
{
	struct table *t = opaque;
	enum handover_action got = handover_decide(rec, s, r);
	for (unsigned i = 0; i < t->n; i++) {
		struct row *row = &t->row[i];
		bool up = s->live && s->channel_up;
		if (!is(row->cell[0], handover_state_name(rec->state)) ||
		    !flags_match(row->cell[1], rec->flags) || !process_matches(row->cell[2], s) ||
		    !(is(row->cell[3], "*") || is(row->cell[3], up ? "up" : "down")) ||
		    !report_matches(row->cell[4], r) || !epoch_matches(row->cell[5], rec->epoch, r) ||
		    !detail_matches(row->cell[6], rec, r))
			continue;
		row->hits++;
		if (!is(row->cell[7], handover_action_name(got)))
			ck_abort_msg("%s flags %#x live %d up %d attempt %d commit %d failed %d, report %s%s "
				     "epoch %d "
				     "(own 5) asked %d open %d: code %s, document's row %u says %s",
				     row->cell[0], rec->flags, s->live, s->channel_up, s->attempt_open,
				     s->commit, s->write_failed, r->heard ? "" : "silence/",
				     handover_state_name(r->state), (int)r->epoch, r->asked, r->attempt_open,
				     handover_action_name(got), i + 1, row->cell[7]);
		return;
	}
	ck_abort_msg("no row for %s", handover_state_name(rec->state));
}

START_TEST(decisions_are_the_document_s)
{
	struct table t;
	read_table("decisions", 8, &t);
	for_all(compare_decision, &t);
	for (unsigned i = 0; i < t.n; i++)
		ck_assert_msg(t.row[i].hits > 0, "row %u (%s, %s) is never reached", i + 1, t.row[i].cell[0],
			      t.row[i].cell[4]);
}
END_TEST

/* What must hold whatever the table says. */
static void check_safe(const struct vm_record *rec, const struct handover_self *s,
		       const struct handover_report *r, void *opaque)
{
	enum handover_action a = handover_decide(rec, s, r);
	bool peer_owner = r->heard && (r->state == HANDOVER_OWNER || r->state == HANDOVER_OWNER_UNCONFIRMED);
	unsigned *seen = opaque;

	seen[a]++;
	switch (a) {
	case HANDOVER_ACT_TAKE_BACK: {
		bool promised = r->heard && r->state == HANDOVER_ABANDONED && r->epoch == rec->epoch;
		MUST(rec->state == HANDOVER_HANDING_OVER && (promised || (s->live && !s->commit)));
		MUST(!(peer_owner && r->epoch >= rec->epoch));
		break;
	}
	case HANDOVER_ACT_RECORD_MOVED:
		MUST(rec->state == HANDOVER_HANDING_OVER && peer_owner && r->epoch >= rec->epoch);
		break;
	case HANDOVER_ACT_CLEAN:
		MUST(rec->state == HANDOVER_ABANDONED ||
		     (rec->state == HANDOVER_MOVED && rec->flags & RECORD_PEER_STARTED));
		break;
	case HANDOVER_ACT_FORGET:
		MUST(rec->flags & RECORD_FILES_DONE);
		MUST(rec->state == HANDOVER_ABANDONED ||
		     (rec->state == HANDOVER_MOVED && rec->flags & RECORD_PEER_ACKED));
		MUST(handover_transition_allowed(rec->state, rec->epoch, HANDOVER_NONE, 0));
		break;
	case HANDOVER_ACT_ABANDON:
		/* never between COMMIT read and the owner record */
		MUST(rec->state == HANDOVER_PREPARED && !(s->live && (s->commit || s->write_failed)));
		break;
	case HANDOVER_ACT_CONFIRM:
		MUST(rec->state == HANDOVER_OWNER_UNCONFIRMED && r->heard && !peer_owner);
		MUST(r->state == HANDOVER_NONE || r->epoch <= rec->epoch);
		break;
	case HANDOVER_ACT_ABORT:
		MUST(rec->state == HANDOVER_OWNER && s->live && s->attempt_open);
		break;
	case HANDOVER_ACT_NOTE:
		MUST(rec->state == HANDOVER_MOVED && handover_note(rec, r) != rec->flags);
		break;
	default:
		break;
	}
	/* An asked prepared side that has not committed never stays prepared. */
	if (rec->state == HANDOVER_PREPARED && r->heard && r->asked && r->state == HANDOVER_HANDING_OVER &&
	    r->epoch == rec->epoch && !(s->live && (s->commit || s->write_failed)))
		MUST((a) == (HANDOVER_ACT_ABANDON));
	/* Only `owner` may be started, and `in doubt` is never shown as something startable. */
	MUST((handover_may_start(rec, NULL) == 0) == (rec->state == HANDOVER_OWNER));
	enum vm_state shown = handover_vm_state(rec, s, true);
	if (shown == VM_STOPPED || shown == VM_CRASHED)
		MUST((handover_may_start(rec, NULL)) == (0));
	if (!s->live)
		MUST(shown != VM_RUNNING && shown != VM_PAUSED);
}

START_TEST(no_decision_risks_a_second_copy)
{
	unsigned seen[HANDOVER_ACTIONS] = {0};
	for_all(check_safe, seen);
	for (int a = 0; a < HANDOVER_ACTIONS; a++)
		ck_assert_msg(seen[a] > 0, "no case leads to %s",
			      handover_action_name((enum handover_action)a));
}
END_TEST

/* Two sides that ask one another settle, from every pair of records that a crash can leave behind. */
struct side {
	struct vm_record rec;
	struct handover_self self;
	bool gone;
};

static void apply(struct side *s, enum handover_action a, const struct handover_report *r)
{
	struct vm_record to = s->rec;
	switch (a) {
	case HANDOVER_ACT_TAKE_BACK:
	case HANDOVER_ACT_CONFIRM:
		to.state = HANDOVER_OWNER;
		break;
	case HANDOVER_ACT_RECORD_MOVED:
		to.state = HANDOVER_MOVED;
		to.flags = handover_note(&s->rec, r);
		s->self = (struct handover_self){0};
		break;
	case HANDOVER_ACT_NOTE:
		to.flags = handover_note(&s->rec, r);
		break;
	case HANDOVER_ACT_CLEAN:
		to.flags |= RECORD_FILES_DONE;
		break;
	case HANDOVER_ACT_ABANDON:
		to.state = HANDOVER_ABANDONED;
		s->self = (struct handover_self){0};
		break;
	case HANDOVER_ACT_FORGET:
		s->gone = true;
		return;
	default:
		return;
	}
	if (to.state != s->rec.state)
		ck_assert(handover_transition_allowed(s->rec.state, s->rec.epoch, to.state, to.epoch));
	s->rec = to;
}

static void tick(struct side *me, struct side *peer)
{
	struct handover_report r, back;
	if (me->gone)
		return;
	enum handover_action a = handover_decide(&me->rec, &me->self, NULL);
	if (a != HANDOVER_ACT_ASK) {
		apply(me, a, NULL);
		return;
	}
	handover_describe(&me->rec, &me->self, true, &r);
	r.asked = true;
	if (!peer->gone)
		apply(peer, handover_decide(&peer->rec, &peer->self, &r), &r);
	handover_describe(peer->gone ? NULL : &peer->rec, &peer->self, true, &back);
	apply(me, handover_decide(&me->rec, &me->self, &back), &back);
}

static const struct {
	enum handover_state s, d;
	bool s_live, d_live, s_commit;
	enum handover_state s_end, d_end; /* none: forgotten */
} endings[] = {
	/* A: the attempt died before handing-over */
	{HANDOVER_OWNER, HANDOVER_PREPARED, true, false, false, HANDOVER_OWNER, HANDOVER_NONE},
	{HANDOVER_OWNER, HANDOVER_PREPARED, false, true, false, HANDOVER_OWNER, HANDOVER_NONE},
	{HANDOVER_OWNER, HANDOVER_PREPARED, false, false, false, HANDOVER_OWNER, HANDOVER_NONE},
	/* B, C, D */
	{HANDOVER_HANDING_OVER, HANDOVER_PREPARED, true, false, false, HANDOVER_OWNER, HANDOVER_NONE},
	{HANDOVER_HANDING_OVER, HANDOVER_PREPARED, true, false, true, HANDOVER_OWNER, HANDOVER_NONE},
	{HANDOVER_HANDING_OVER, HANDOVER_PREPARED, false, true, false, HANDOVER_OWNER, HANDOVER_NONE},
	{HANDOVER_HANDING_OVER, HANDOVER_PREPARED, false, false, false, HANDOVER_OWNER, HANDOVER_NONE},
	{HANDOVER_HANDING_OVER, HANDOVER_ABANDONED, false, false, false, HANDOVER_OWNER, HANDOVER_NONE},
	/* E: D runs */
	{HANDOVER_HANDING_OVER, HANDOVER_OWNER_UNCONFIRMED, true, true, true, HANDOVER_NONE, HANDOVER_OWNER},
	{HANDOVER_HANDING_OVER, HANDOVER_OWNER_UNCONFIRMED, false, true, false, HANDOVER_NONE,
	 HANDOVER_OWNER},
	/* E: D crashed; the files stay at S until D's VM has been started */
	{HANDOVER_HANDING_OVER, HANDOVER_OWNER_UNCONFIRMED, true, false, true, HANDOVER_MOVED,
	 HANDOVER_OWNER},
	{HANDOVER_HANDING_OVER, HANDOVER_OWNER_UNCONFIRMED, false, false, false, HANDOVER_MOVED,
	 HANDOVER_OWNER},
	/* F, H */
	{HANDOVER_MOVED, HANDOVER_OWNER_UNCONFIRMED, false, true, false, HANDOVER_NONE, HANDOVER_OWNER},
	{HANDOVER_MOVED, HANDOVER_OWNER, false, true, false, HANDOVER_NONE, HANDOVER_OWNER},
};

START_TEST(both_sides_settle)
{
	for (int who_first = 0; who_first < 2; who_first++) {
		struct side s = {.rec = {.state = endings[_i].s, .epoch = 7}};
		struct side d = {.rec = {.state = endings[_i].d, .epoch = 7}};
		s.self = (struct handover_self){.live = endings[_i].s_live, .commit = endings[_i].s_commit};
		d.self = (struct handover_self){.live = endings[_i].d_live};
		for (int i = 0; i < 10; i++) {
			tick(who_first ? &d : &s, who_first ? &s : &d);
			tick(who_first ? &s : &d, who_first ? &d : &s);
		}
		enum handover_state s_end = s.gone ? HANDOVER_NONE : s.rec.state;
		enum handover_state d_end = d.gone ? HANDOVER_NONE : d.rec.state;
		ck_assert_msg(s_end == endings[_i].s_end && d_end == endings[_i].d_end, "%s/%s ends as %s/%s",
			      handover_state_name(endings[_i].s), handover_state_name(endings[_i].d),
			      handover_state_name(s_end), handover_state_name(d_end));
		if (s_end == HANDOVER_MOVED) {
			ck_assert(!(s.rec.flags & RECORD_FILES_DONE));
			/* snvm start there; the tombstone's next question finishes the matter */
			d.self.live = true;
			for (int i = 0; i < 5; i++)
				tick(&s, &d);
			ck_assert(s.gone);
		}
	}
}
END_TEST

/* ---- resolve and arrivals */

START_TEST(run_here_raises_the_epoch_above_all_seen)
{
	struct handover_self dead = {0}, paused = {.live = true, .commit = true}, early = {.live = true};
	struct vm_record rec = {.state = HANDOVER_HANDING_OVER, .epoch = 5}, to;
	struct error err = ERROR_INIT;

	ck_assert_int_eq(handover_run_here(&rec, &dead, &to, NULL), 0);
	ck_assert_int_eq(to.state, HANDOVER_OWNER_UNCONFIRMED);
	ck_assert_uint_eq(to.epoch, 6);
	ck_assert(to.flags & RECORD_FORCED);
	ck_assert(handover_transition_allowed(rec.state, rec.epoch, to.state, to.epoch));
	ck_assert_int_eq(handover_run_here(&rec, &paused, &to, NULL), 0);
	ck_assert_int_eq(handover_run_here(&rec, &early, &to, &err), -EPERM);

	rec = (struct vm_record){.state = HANDOVER_OWNER_UNCONFIRMED,
				 .epoch = 5,
				 .peer_epoch = 6,
				 .flags = RECORD_HIGHER_SEEN};
	ck_assert_int_eq(handover_run_here(&rec, &dead, &to, NULL), 0);
	ck_assert_uint_eq(to.epoch, 7);
	ck_assert(!(to.flags & RECORD_HIGHER_SEEN));

	static const enum handover_state refused[] = {HANDOVER_OWNER, HANDOVER_MOVED, HANDOVER_PREPARED,
						      HANDOVER_ABANDONED};
	for (unsigned i = 0; i < ARRAY_SIZE(refused); i++) {
		rec = (struct vm_record){.state = refused[i], .epoch = 5};
		err = ERROR_INIT;
		ck_assert_int_eq(handover_run_here(&rec, &dead, &to, &err), -EPERM);
		ck_assert(err.message[0]);
	}
}
END_TEST

START_TEST(give_up_never_loses_the_only_copy)
{
	struct handover_self dead = {0}, live = {.live = true}, commit = {.live = true, .commit = true},
			     failed = {.live = true, .commit = true, .write_failed = true};
	struct vm_record rec = {.epoch = 5};
	struct error err = ERROR_INIT;

	rec.state = HANDOVER_OWNER;
	ck_assert_int_eq(handover_give_up(&rec, &dead, &err), HANDOVER_ACT_NONE);
	ck_assert_int_eq(err.code, -EPERM);
	rec.state = HANDOVER_OWNER_UNCONFIRMED;
	ck_assert_int_eq(handover_give_up(&rec, &dead, NULL), HANDOVER_ACT_NONE);
	ck_assert_int_eq(handover_give_up(&rec, &live, NULL), HANDOVER_ACT_NONE);
	rec.flags = RECORD_HIGHER_SEEN;
	ck_assert_int_eq(handover_give_up(&rec, &dead, NULL), HANDOVER_ACT_ABANDON);
	rec.flags = 0;
	rec.state = HANDOVER_HANDING_OVER;
	ck_assert_int_eq(handover_give_up(&rec, &live, NULL), HANDOVER_ACT_NONE);
	ck_assert_int_eq(handover_give_up(&rec, &commit, NULL), HANDOVER_ACT_ASK);
	ck_assert_int_eq(handover_give_up(&rec, &dead, NULL), HANDOVER_ACT_ASK);
	rec.state = HANDOVER_PREPARED;
	ck_assert_int_eq(handover_give_up(&rec, &live, NULL), HANDOVER_ACT_ABANDON);
	ck_assert_int_eq(handover_give_up(&rec, &commit, NULL), HANDOVER_ACT_NONE);
	ck_assert_int_eq(handover_give_up(&rec, &failed, NULL), HANDOVER_ACT_ABANDON);
	rec.state = HANDOVER_MOVED;
	ck_assert_int_eq(handover_give_up(&rec, &dead, NULL), HANDOVER_ACT_CLEAN);
	rec.flags = RECORD_FILES_DONE;
	ck_assert_int_eq(handover_give_up(&rec, &dead, NULL), HANDOVER_ACT_FORGET);
}
END_TEST

START_TEST(arrivals_need_a_settled_record_and_a_higher_epoch)
{
	struct vm_record rec = {.epoch = 5, .name = "vm1"};
	static const struct {
		enum handover_state state;
		uint32_t flags;
		int lower, higher;
	} t[] = {
		{HANDOVER_OWNER, 0, -EEXIST, -EEXIST},
		{HANDOVER_HANDING_OVER, 0, -EEXIST, -EEXIST},
		{HANDOVER_OWNER_UNCONFIRMED, 0, -EEXIST, -EEXIST},
		{HANDOVER_PREPARED, 0, -ESTALE, -EAGAIN},
		{HANDOVER_MOVED, 0, -ESTALE, -EAGAIN},
		{HANDOVER_MOVED, RECORD_FILES_DONE, -ESTALE, 0},
		{HANDOVER_ABANDONED, 0, -ESTALE, -EAGAIN},
		{HANDOVER_ABANDONED, RECORD_FILES_DONE, -ESTALE, 0},
	};
	ck_assert_int_eq(handover_may_arrive(NULL, 1, NULL), 0);
	for (unsigned i = 0; i < ARRAY_SIZE(t); i++) {
		rec.state = t[i].state;
		rec.flags = t[i].flags;
		ck_assert_int_eq(handover_may_arrive(&rec, 4, NULL), t[i].lower);
		ck_assert_int_eq(handover_may_arrive(&rec, 5, NULL), t[i].lower);
		ck_assert_int_eq(handover_may_arrive(&rec, 6, NULL), t[i].higher);
		if (!t[i].higher)
			ck_assert(handover_transition_allowed(rec.state, 5, HANDOVER_PREPARED, 6));
	}
}
END_TEST

START_TEST(users_see_what_the_document_says)
{
	struct handover_self dead = {0}, live = {.live = true, .channel_up = true},
			     commit = {.live = true, .commit = true},
			     failed = {.live = true, .write_failed = true};
	struct vm_record rec = {.state = HANDOVER_OWNER};

	ck_assert_int_eq(handover_vm_state(NULL, &dead, false), VM_ABSENT);
	ck_assert_int_eq(handover_vm_state(&rec, &live, true), VM_RUNNING);
	ck_assert_int_eq(handover_vm_state(&rec, &live, false), VM_PAUSED);
	ck_assert_int_eq(handover_vm_state(&rec, &dead, false), VM_STOPPED);
	rec.flags = RECORD_POWERED_ON;
	ck_assert_int_eq(handover_vm_state(&rec, &dead, false), VM_CRASHED);
	rec.state = HANDOVER_HANDING_OVER;
	ck_assert_int_eq(handover_vm_state(&rec, &live, true), VM_RUNNING);
	ck_assert_int_eq(handover_vm_state(&rec, &commit, false), VM_IN_DOUBT);
	ck_assert_int_eq(handover_vm_state(&rec, &dead, false), VM_IN_DOUBT);
	rec.state = HANDOVER_PREPARED;
	ck_assert_int_eq(handover_vm_state(&rec, &live, false), VM_INCOMING);
	ck_assert_int_eq(handover_vm_state(&rec, &failed, false), VM_IN_DOUBT);
	rec.state = HANDOVER_OWNER_UNCONFIRMED;
	ck_assert_int_eq(handover_vm_state(&rec, &live, true), VM_RUNNING);
	ck_assert_int_eq(handover_vm_state(&rec, &dead, true), VM_IN_DOUBT);
	rec.flags |= RECORD_HIGHER_SEEN;
	ck_assert_int_eq(handover_vm_state(&rec, &live, false), VM_IN_DOUBT);
	rec.state = HANDOVER_MOVED;
	ck_assert_int_eq(handover_vm_state(&rec, &dead, false), VM_ABSENT);
	ck_assert_str_eq(vm_state_name(VM_IN_DOUBT), "in-doubt");
}
END_TEST

START_TEST(a_vm_that_moved_stopped_has_nothing_to_start)
{
	struct handover_self dead = {0};
	struct vm_record rec = {.state = HANDOVER_OWNER_UNCONFIRMED, .epoch = 7, .flags = RECORD_COLD};
	struct vm_record source = {.state = HANDOVER_HANDING_OVER, .epoch = 7, .flags = RECORD_COLD};
	struct handover_report r;

	/* the destination's process died, and its daemon answers: the source may delete all the same */
	handover_describe(&rec, &dead, false, &r);
	ck_assert(r.started);
	ck_assert_int_eq(handover_decide(&source, &dead, &r), HANDOVER_ACT_RECORD_MOVED);
	ck_assert_uint_eq(handover_note(&source, &r), RECORD_COLD | RECORD_PEER_STARTED);
	/* not before it owns it */
	rec.state = HANDOVER_PREPARED;
	handover_describe(&rec, &dead, false, &r);
	ck_assert(!r.started);
	/* without a process it is stopped, not crashed */
	rec.state = HANDOVER_OWNER;
	ck_assert_int_eq(handover_vm_state(&rec, &dead, false), VM_STOPPED);
	/* whom a person made owner is started, and its peer's word counts as of any VM */
	struct vm_record to;
	ck_assert_int_eq(handover_run_here(&source, &dead, &to, NULL), 0);
	ck_assert_uint_eq(to.flags, RECORD_FORCED | RECORD_POWERED_ON);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("handover");
	TCase *tc = tcase_create("rules");
	tcase_set_timeout(tc, 120);
	tcase_add_test(tc, names_go_both_ways);
	tcase_add_test(tc, transitions_are_the_document_s);
	tcase_add_test(tc, decisions_are_the_document_s);
	tcase_add_test(tc, no_decision_risks_a_second_copy);
	tcase_add_loop_test(tc, both_sides_settle, 0, ARRAY_SIZE(endings));
	tcase_add_test(tc, run_here_raises_the_epoch_above_all_seen);
	tcase_add_test(tc, give_up_never_loses_the_only_copy);
	tcase_add_test(tc, arrivals_need_a_settled_record_and_a_higher_epoch);
	tcase_add_test(tc, users_see_what_the_document_says);
	tcase_add_test(tc, a_vm_that_moved_stopped_has_nothing_to_start);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
