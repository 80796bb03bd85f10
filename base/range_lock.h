/* SPDX-License-Identifier: Apache-2.0 */
#ifndef BASE_RANGE_LOCK_H
#define BASE_RANGE_LOCK_H

#include <stdbool.h>
#include <stdint.h>

/*
 * Byte ranges that are held in the order of their arrival. The caller brings the lock, held throughout every
 * call, and the entries, which stay where they are from add to remove.
 */
enum range_kind { RANGE_ALONE, RANGE_WRITE, RANGE_READ };

struct range_entry {
	struct range_entry *prev, *next; /* all, in order of arrival */
	struct range_entry *next_granted;
	uint64_t offset_bytes, len_bytes;
	unsigned nwaits;      /* earlier entries that conflict */
	enum range_kind kind; /* two of one kind do not conflict, but RANGE_ALONE does with all */
	unsigned tag;	      /* the caller's */
};
struct range_lock {
	struct range_entry *first, *last;
	unsigned count[3], total; /* by kind */
};

/* True: granted at once. Else once range_lock_remove of another entry returns it. */
bool range_lock_add(struct range_lock *rl, struct range_entry *e);
/* Returns those that are granted now, linked by next_granted, in order of arrival. */
struct range_entry *range_lock_remove(struct range_lock *rl, struct range_entry *e);

#endif
