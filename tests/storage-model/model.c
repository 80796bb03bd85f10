/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/storage-model/model.h"

#include <check.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"

#define WORDS		(SECTOR_BYTES / 8)
#define OPS_SHOWN	24
#define DIFFERENT_SHOWN 8

static const char *const op_names[] = {[BLOCK_READ] = "read",
				       [BLOCK_WRITE] = "write",
				       [BLOCK_FLUSH] = "flush",
				       [BLOCK_WRITE_ZEROES] = "zeroes",
				       [BLOCK_DISCARD] = "discard"};

void model_init(struct model *m, uint64_t size_bytes, unsigned seed)
{
	memset(m, 0, sizeof *m);
	pthread_mutex_init(&m->lock, NULL);
	m->size_bytes = size_bytes;
	m->nsectors = size_bytes / SECTOR_BYTES;
	m->sectors = calloc(m->nsectors, sizeof *m->sectors);
	ck_assert_ptr_nonnull(m->sectors);
	m->seed = seed;
	m->begin_ns = clock_now_ns();
}

void model_free(struct model *m)
{
	free(m->sectors);
	free(m->ops);
	pthread_mutex_destroy(&m->lock);
}

static double ms_since_begin(const struct model *m, uint64_t ns)
{
	return ns > m->begin_ns ? (double)(ns - m->begin_ns) / 1e6 : 0;
}

void model_event(struct model *m, const char *fmt, ...)
{
	char text[sizeof m->events[0].text];
	va_list ap;
	va_start(ap, fmt);
	vsnprintf(text, sizeof text, fmt, ap);
	va_end(ap);
	pthread_mutex_lock(&m->lock);
	unsigned i = m->nevents++ % 64;
	m->events[i].at_ns = clock_now_ns();
	memcpy(m->events[i].text, text, sizeof text);
	pthread_mutex_unlock(&m->lock);
	if (!getenv("SNM_STORAGE_VERBOSE"))
		return;
	printf("  %9.3f ms  %s\n", ms_since_begin(m, clock_now_ns()), text);
	fflush(stdout);
}

static bool touches(const struct model_op *op, uint64_t offset, uint64_t len)
{
	return op->op == BLOCK_FLUSH ||
	       (op->offset_bytes < offset + len && offset < op->offset_bytes + op->len_bytes);
}

static void print_op(const struct model *m, const struct model_op *op)
{
	printf("  %9.3f ms  %s #%" PRIu32 " %" PRIu64 "+%" PRIu64 "%s%s%s", ms_since_begin(m, op->submit_ns),
	       op_names[op->op], op->number, op->offset_bytes, op->len_bytes,
	       op->flags & BLOCK_REQ_FUA ? " fua" : "", op->flags & BLOCK_REQ_MAY_UNMAP ? " unmap" : "",
	       op->wild ? " (buffer changed in flight)" : "");
	if (op->done)
		printf(": %d after %.3f ms\n", op->result, (double)(op->done_ns - op->submit_ns) / 1e6);
	else
		printf(": in flight\n");
}

void model_fail(struct model *m, uint64_t offset, uint64_t len, const char *fmt, ...)
{
	char what[512];
	va_list ap;
	va_start(ap, fmt);
	vsnprintf(what, sizeof what, fmt, ap);
	va_end(ap);
	/* The caller may hold the lock, and ends the process at any rate. */
	pthread_mutex_trylock(&m->lock);
	printf("seed %u: %s\n the last events:\n", m->seed, what);
	for (unsigned i = m->nevents > 64 ? m->nevents - 64 : 0; i < m->nevents; i++)
		printf("  %9.3f ms  %s\n", ms_since_begin(m, m->events[i % 64].at_ns),
		       m->events[i % 64].text);
	printf(" the last requests at %" PRIu64 "+%" PRIu64 ":\n", offset, len);
	size_t first = m->nops, shown = 0;
	while (first && shown < OPS_SHOWN)
		shown += touches(&m->ops[--first], offset, len);
	for (size_t i = first; i < m->nops; i++)
		if (touches(&m->ops[i], offset, len))
			print_op(m, &m->ops[i]);
	fflush(stdout);
	ck_abort_msg("seed %u: %s", m->seed, what);
}

/* --- content --- */

static uint64_t mix(uint64_t x)
{
	x += UINT64_C(0x9e3779b97f4a7c15);
	x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
	x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
	return x ^ (x >> 31);
}

static void fill_sector(uint8_t *p, uint64_t index, uint32_t number)
{
	uint64_t words[WORDS] = {0};
	if (number) {
		words[0] = (uint64_t)number << 32 | index;
		for (unsigned i = 1; i < WORDS; i++)
			words[i] = mix(words[0] + i * UINT64_C(0x100000001b3));
	}
	memcpy(p, words, SECTOR_BYTES);
}

void model_fill(uint8_t *buf, uint64_t offset, uint64_t len, uint32_t number)
{
	for (uint64_t i = 0; i < len; i += SECTOR_BYTES)
		fill_sector(buf + i, (offset + i) / SECTOR_BYTES, number);
}

/* Whole, wherever it belongs. */
static bool decode_anywhere(const uint8_t *sector, uint64_t *index, uint32_t *number)
{
	uint8_t want[SECTOR_BYTES];
	uint64_t word;
	memcpy(&word, sector, 8);
	*index = word & UINT32_MAX;
	*number = (uint32_t)(word >> 32);
	fill_sector(want, *index, *number);
	return memcmp(want, sector, SECTOR_BYTES) == 0;
}

bool model_decode(const uint8_t *sector, uint64_t index, uint32_t *number)
{
	uint64_t at;
	return decode_anywhere(sector, &at, number) && (!*number || at == index);
}

static const char *describe(const uint8_t *sector, uint64_t index, char *out, size_t size)
{
	uint64_t at;
	uint32_t number;
	if (!decode_anywhere(sector, &at, &number))
		snprintf(out, size, "torn or foreign bytes (%02x %02x %02x %02x ...)", sector[0], sector[1],
			 sector[2], sector[3]);
	else if (!number)
		snprintf(out, size, "zeroes");
	else if (at != index)
		snprintf(out, size, "write #%" PRIu32 " of offset %" PRIu64, number, at * SECTOR_BYTES);
	else
		snprintf(out, size, "write #%" PRIu32, number);
	return out;
}

static void describe_expected(const struct model_sector *s, char *out, size_t size)
{
	if (s->unsure)
		snprintf(out, size, "either of several");
	else if (!s->number)
		snprintf(out, size, "zeroes");
	else
		snprintf(out, size, "write #%" PRIu32, s->number);
}

/* --- requests --- */

bool model_has_changes_in_flight(const struct model *m, uint64_t offset, uint64_t len)
{
	for (uint64_t s = offset / SECTOR_BYTES; s < (offset + len) / SECTOR_BYTES; s++)
		if (m->sectors[s].in_flight)
			return true;
	return false;
}

static bool changes(enum block_op op)
{
	return op != BLOCK_READ && op != BLOCK_FLUSH;
}

size_t model_submit(struct model *m, enum block_op op, unsigned flags, uint64_t offset, uint64_t len,
		    bool wild)
{
	if (m->nops == m->max_ops) {
		m->max_ops = m->max_ops ? 2 * m->max_ops : 1024;
		m->ops = realloc(m->ops, m->max_ops * sizeof *m->ops);
		ck_assert_ptr_nonnull(m->ops);
	}
	struct model_op *o = &m->ops[m->nops];
	*o = (struct model_op){.number = (uint32_t)m->nops + 1,
			       .op = op,
			       .flags = flags,
			       .offset_bytes = offset,
			       .len_bytes = len,
			       .wild = wild,
			       .submit_ns = clock_now_ns(),
			       .serial = ++m->serial};
	for (uint64_t s = offset / SECTOR_BYTES; changes(op) && s < (offset + len) / SECTOR_BYTES; s++) {
		struct model_sector *x = &m->sectors[s];
		x->contended = x->contended || x->in_flight;
		x->in_flight++;
		x->changed_serial = o->serial;
	}
	return m->nops++;
}

static void change_done(struct model *m, const struct model_op *o)
{
	/* A read that was submitted before now may have seen what was there before. */
	uint64_t now = ++m->serial;
	for (uint64_t s = o->offset_bytes / SECTOR_BYTES; s < (o->offset_bytes + o->len_bytes) / SECTOR_BYTES;
	     s++) {
		struct model_sector *x = &m->sectors[s];
		bool sure = !x->contended && !o->result && !o->wild;
		x->wild = sure ? false : x->wild || o->wild;
		x->unsure = !sure;
		x->number = o->op == BLOCK_WRITE ? o->number : 0;
		x->changed_serial = now;
		x->fua = sure && o->flags & BLOCK_REQ_FUA;
		if (--x->in_flight == 0)
			x->contended = false;
	}
}

static void read_done(struct model *m, const struct model_op *o, const uint8_t *data)
{
	for (uint64_t at = 0; at < o->len_bytes; at += SECTOR_BYTES) {
		uint64_t index = (o->offset_bytes + at) / SECTOR_BYTES;
		struct model_sector *x = &m->sectors[index];
		if (x->in_flight || x->changed_serial > o->serial || x->wild)
			continue;
		uint32_t number = 0;
		bool whole = model_decode(data + at, index, &number);
		if (whole && x->unsure) { /* it is known from now on, and may not change */
			x->unsure = false;
			x->number = number;
		}
		if (whole && number == x->number)
			continue;
		char is[96], should[64];
		describe_expected(x, should, sizeof should);
		model_fail(m, index * SECTOR_BYTES, SECTOR_BYTES,
			   "a read (%" PRIu64 "+%" PRIu64 ") got at %" PRIu64 ": %s, and not %s",
			   o->offset_bytes, o->len_bytes, index * SECTOR_BYTES,
			   describe(data + at, index, is, sizeof is), should);
	}
}

void model_done(struct model *m, size_t index, int result, const uint8_t *data)
{
	struct model_op *o = &m->ops[index];
	o->done = true;
	o->done_ns = clock_now_ns();
	o->result = result;
	if (changes(o->op))
		change_done(m, o);
	else if (o->op == BLOCK_READ && !result)
		read_done(m, o, data);
	else if (o->op == BLOCK_FLUSH && !result && o->serial > m->flushed_serial)
		m->flushed_serial = o->serial;
}

void model_flushed(struct model *m)
{
	pthread_mutex_lock(&m->lock);
	m->flushed_serial = ++m->serial;
	pthread_mutex_unlock(&m->lock);
}

bool model_must_be_durable(struct model *m, uint64_t sector)
{
	pthread_mutex_lock(&m->lock);
	const struct model_sector *x = &m->sectors[sector];
	bool must = x->changed_serial && (x->fua || x->changed_serial < m->flushed_serial);
	pthread_mutex_unlock(&m->lock);
	return must;
}

void model_preset(struct model *m, uint64_t offset, uint64_t len, uint32_t number)
{
	for (uint64_t s = offset / SECTOR_BYTES; s < (offset + len) / SECTOR_BYTES; s++)
		m->sectors[s].number = number;
}

/* --- judging --- */

static bool sector_is_right(struct model_sector *x, const uint8_t *local, const uint8_t *remote,
			    uint64_t index)
{
	uint32_t number;
	if (memcmp(local, remote, SECTOR_BYTES))
		return false;
	if (x->wild)
		return true;
	if (!model_decode(local, index, &number))
		return false;
	if (!x->unsure)
		return number == x->number;
	x->unsure = false;
	x->number = number;
	return true;
}

void model_compare(struct model *m, const uint8_t *local, const uint8_t *remote, const char *when)
{
	uint64_t bad = 0, first = 0, last = 0, runs = 0;
	pthread_mutex_lock(&m->lock);
	for (uint64_t s = 0; s < m->nsectors; s++) {
		const uint8_t *l = local + s * SECTOR_BYTES, *r = remote + s * SECTOR_BYTES;
		struct model_sector before = m->sectors[s];
		if (sector_is_right(&m->sectors[s], l, r, s))
			continue;
		char here[96], there[96], should[64];
		describe_expected(&before, should, sizeof should);
		if (!bad || last + 1 != s) {
			if (runs++ < DIFFERENT_SHOWN)
				printf(" sector %" PRIu64 " (offset %" PRIu64
				       "): %s at the source, %s at the destination, %s in the model\n",
				       s, s * SECTOR_BYTES, describe(l, s, here, sizeof here),
				       describe(r, s, there, sizeof there), should);
			if (!bad)
				first = s;
		}
		last = s;
		bad++;
	}
	if (bad) {
		char here[96], there[96], should[64];
		const uint8_t *l = local + first * SECTOR_BYTES, *r = remote + first * SECTOR_BYTES;
		describe_expected(&m->sectors[first], should, sizeof should);
		model_fail(m, first * SECTOR_BYTES, SECTOR_BYTES,
			   "%s: %" PRIu64 " sectors in %" PRIu64 " runs are wrong, first at %" PRIu64
			   ": %s at the source, %s at the destination, %s in the model",
			   when, bad, runs, first * SECTOR_BYTES, describe(l, first, here, sizeof here),
			   describe(r, first, there, sizeof there), should);
	}
	pthread_mutex_unlock(&m->lock);
}

void model_expect_zero(struct model *m, uint64_t offset, uint64_t len, const char *who)
{
	pthread_mutex_lock(&m->lock);
	for (uint64_t s = offset / SECTOR_BYTES; s < (offset + len) / SECTOR_BYTES; s++) {
		const struct model_sector *x = &m->sectors[s];
		if (!x->unsure && !x->wild && x->number)
			model_fail(m, s * SECTOR_BYTES, SECTOR_BYTES,
				   "%s says that %" PRIu64 "+%" PRIu64 " reads as zeroes, but write #%" PRIu32
				   " is there at %" PRIu64,
				   who, offset, len, x->number, s * SECTOR_BYTES);
	}
	pthread_mutex_unlock(&m->lock);
}
