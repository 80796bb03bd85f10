/* SPDX-License-Identifier: Apache-2.0 */
#include "base/range_lock.h"

#include <stddef.h>

/*
 * A list in order of arrival: an entry waits for the earlier ones that conflict with it, granted or not, so
 * nobody starves. It is as long as what is in flight: some hundred, or what an NBD server admits.
 */
static bool conflict(const struct range_entry *a, const struct range_entry *b)
{
	return (a->kind == RANGE_ALONE || a->kind != b->kind) &&
	       a->offset_bytes < b->offset_bytes + b->len_bytes &&
	       b->offset_bytes < a->offset_bytes + a->len_bytes;
}

/* All are of one kind that does not conflict with itself: no need to look. */
static bool all_alike(const struct range_lock *rl, enum range_kind kind)
{
	return kind != RANGE_ALONE && rl->count[kind] == rl->total;
}

bool range_lock_add(struct range_lock *rl, struct range_entry *e)
{
	e->nwaits = 0;
	for (const struct range_entry *o = all_alike(rl, e->kind) ? NULL : rl->first; o; o = o->next)
		e->nwaits += conflict(o, e);
	rl->count[e->kind]++;
	rl->total++;
	e->next = NULL;
	e->prev = rl->last;
	if (rl->last)
		rl->last->next = e;
	else
		rl->first = e;
	rl->last = e;
	return e->nwaits == 0;
}

struct range_entry *range_lock_remove(struct range_lock *rl, struct range_entry *e)
{
	struct range_entry *granted = NULL, **tail = &granted;
	for (struct range_entry *o = all_alike(rl, e->kind) ? NULL : e->next; o; o = o->next)
		if (o->nwaits && conflict(o, e) && --o->nwaits == 0) {
			o->next_granted = NULL;
			*tail = o;
			tail = &o->next_granted;
		}
	if (e->prev)
		e->prev->next = e->next;
	else
		rl->first = e->next;
	if (e->next)
		e->next->prev = e->prev;
	else
		rl->last = e->prev;
	rl->count[e->kind]--;
	rl->total--;
	return granted;
}
