/* SPDX-License-Identifier: Apache-2.0 */
#include "base/cleanup.h"
#include "host/journal.h"

/*
 * Append, never change: databases of every version are out there.
 *
 * move: one row a move that began here (direction "out") and one an arrival ("in"; a source that tries again
 * arrives again). Times are milliseconds since 1970. result is NULL while it is under way; "in-doubt" with
 * ended_ms NULL is waiting to be settled. details: the move's last line (snmigrate(1), "end"), or what an
 * arrival knows of it, as a JSON object.
 *
 * plan: an evacuation or a return (host/evacuate.h); id is when it began. options: how, as a JSON object.
 * plan_vm: its VMs in the order of the queue; state as run_state_name says.
 */
const char *const journal_schema_steps[] = {
	"CREATE TABLE move ("
	" id INTEGER PRIMARY KEY,"
	" direction TEXT NOT NULL CHECK (direction IN ('out', 'in')),"
	" uuid TEXT NOT NULL,"
	" name TEXT NOT NULL,"
	" peer TEXT NOT NULL,"
	" epoch INTEGER NOT NULL,"
	" last_epoch INTEGER NOT NULL,"
	" begun_ms INTEGER NOT NULL,"
	" ended_ms INTEGER,"
	" phase TEXT NOT NULL DEFAULT '',"
	" result TEXT,"
	" exit INTEGER,"
	" reason TEXT NOT NULL DEFAULT '',"
	" details TEXT,"
	" UNIQUE (direction, uuid, epoch));"
	"CREATE INDEX move_begun ON move (begun_ms);",

	"CREATE TABLE plan ("
	" id INTEGER PRIMARY KEY,"
	" kind TEXT NOT NULL,"
	" peer TEXT NOT NULL DEFAULT '',"
	" options TEXT NOT NULL,"
	" cancelled INTEGER NOT NULL DEFAULT 0,"
	" begun_ms INTEGER NOT NULL,"
	" ended_ms INTEGER,"
	" result TEXT,"
	" exit INTEGER,"
	" reason TEXT NOT NULL DEFAULT '');"
	"CREATE TABLE plan_vm ("
	" plan INTEGER NOT NULL REFERENCES plan (id),"
	" turn INTEGER NOT NULL,"
	" uuid TEXT NOT NULL,"
	" name TEXT NOT NULL,"
	" priority INTEGER NOT NULL,"
	" destination TEXT NOT NULL,"
	" tried TEXT NOT NULL,"
	" state TEXT NOT NULL,"
	" attempts INTEGER NOT NULL,"
	" exit INTEGER NOT NULL,"
	" reason TEXT NOT NULL,"
	" predicted_begin_ms INTEGER,"
	" predicted_end_ms INTEGER,"
	" begun_ms INTEGER,"
	" ended_ms INTEGER,"
	" PRIMARY KEY (plan, uuid));",
};
const unsigned journal_schema_version = ARRAY_SIZE(journal_schema_steps);
