/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a disk has to hold. Every sector that a write makes carries the write's number and its own place, so
 * that a wrong one says where its content came from. What the model cannot know (overlapping writes in
 * flight, a write that failed, a buffer changed under way) is "unsure": any of the possible contents, but the
 * same one for every reader and on both disks.
 */
#ifndef TESTS_STORAGE_MODEL_MODEL_H
#define TESTS_STORAGE_MODEL_MODEL_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "block/block.h"

#define SECTOR_BYTES 512u

struct model_op {
	uint32_t number; /* of a write, from 1: what its sectors carry */
	enum block_op op;
	unsigned flags;
	uint64_t offset_bytes, len_bytes, submit_ns, done_ns, serial;
	bool done, wild; /* wild: the guest changes the buffer while it is written */
	int result;
};

struct model_sector {
	uint32_t number; /* 0: zeroes */
	uint16_t in_flight;
	bool contended, unsure, wild;
	bool fua;		 /* the last change was durable when it was answered */
	uint64_t changed_serial; /* when a change was last submitted or done */
};

struct model {
	pthread_mutex_t lock; /* what follows */
	uint64_t size_bytes, nsectors;
	struct model_sector *sectors;
	struct model_op *ops; /* a journal of all */
	size_t nops, max_ops;
	uint64_t serial, flushed_serial; /* what was done before the latter was flushed */
	struct {
		uint64_t at_ns;
		char text[120];
	} events[64];
	unsigned nevents;
	unsigned seed;
	uint64_t begin_ns;
};

void model_init(struct model *m, uint64_t size_bytes, unsigned seed);
void model_free(struct model *m);
/* For the report of a failure. */
void model_event(struct model *m, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Prints what is known about a range and ends the test. */
void model_fail(struct model *m, uint64_t offset_bytes, uint64_t len_bytes, const char *fmt, ...)
	__attribute__((format(printf, 4, 5), noreturn));

void model_fill(uint8_t *buf, uint64_t offset_bytes, uint64_t len_bytes, uint32_t number);
/* The number that a sector carries, if it is whole and in its place. */
bool model_decode(const uint8_t *sector, uint64_t index, uint32_t *number);

/* lock held for these. Indexes of ops stay valid, pointers do not. */
bool model_has_changes_in_flight(const struct model *m, uint64_t offset_bytes, uint64_t len_bytes);
size_t model_submit(struct model *m, enum block_op op, unsigned flags, uint64_t offset_bytes,
		    uint64_t len_bytes, bool wild);
/* data: of a read. Fails the test where it is wrong. */
void model_done(struct model *m, size_t op, int result, const uint8_t *data);

/* A flush by somebody else than the guest, with nothing in flight. */
void model_flushed(struct model *m);
/* The guest was told that the sector's content is durable; no lock. */
bool model_must_be_durable(struct model *m, uint64_t sector);

/* What the disk holds before anybody reads it; no lock. */
void model_preset(struct model *m, uint64_t offset_bytes, uint64_t len_bytes, uint32_t number);
/* With nothing in flight: both disks are alike and as they have to be, or the test fails. */
void model_compare(struct model *m, const uint8_t *local, const uint8_t *remote, const char *when);
/* With nothing in flight: what an extent that reads as zeroes covers has to be zeroes. */
void model_expect_zero(struct model *m, uint64_t offset_bytes, uint64_t len_bytes, const char *who);

#endif
