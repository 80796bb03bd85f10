/* SPDX-License-Identifier: Apache-2.0 */
#ifndef TESTS_UNIT_MEMXFER_POSTCOPY_RIG_H
#define TESTS_UNIT_MEMXFER_POSTCOPY_RIG_H

/* Post-copy between two spaces: both ends, links that are cut, threads that use the destination's memory.
 * Header only. */
#include "memxfer/codec.h"
#include "memxfer/fault_latency.h"
#include "memxfer/postcopy.h"
#include "tests/unit/memxfer/harness.h"

#define NPAGES	  6000u
#define EPOCH	  9u
#define NUSERS	  3u
#define SILENT_MS 2000u

static struct mem_space from, to;
static struct mem_postcopy_source *source;
static struct mem_postcopy_dest *dest;
static struct rate_limit bandwidth;
static uint64_t *missing;
static int faults_fd = -1;
static uint64_t value[NPAGES]; /* what each page holds at the destination; 0: zeroes, or nothing at all */

/* False, and said so, where the kernel does not let us. */
static inline bool spaces_create(void)
{
	struct error err = ERROR_INIT;

	if (mem_postcopy_open_faults(&faults_fd, &err) < 0) {
		printf("skipped: post-copy: %s\n", err.message);
		return false;
	}
	from = space_create(NPAGES);
	to = space_create(NPAGES);
	ck_assert_int_eq(mem_postcopy_small_pages(&to, &err), 0);
	rate_limit_init(&bandwidth, 0);
	missing = bitmap_alloc(NPAGES);
	/* A tenth are holes on both sides; of the rest the destination has a third. */
	for (uint64_t page = 0; page < NPAGES; page++) {
		if (page % 10 == 3)
			continue;
		value[page] = page % 7 ? page + 1 : 0;
		page_fill(&from, page, value[page]);
		if (page / 50 % 3)
			bitmap_set(missing, page);
		else
			page_fill(&to, page, value[page]);
	}
	return true;
}

static inline void spaces_free(void)
{
	space_check_guard(&to);
	close(faults_fd);
	free(missing);
	space_free(&from);
	space_free(&to);
	rate_limit_destroy(&bandwidth);
}

static pthread_mutex_t broken_lock = PTHREAD_MUTEX_INITIALIZER;

static inline void dest_broken(void *opaque, const struct error *why)
{
	struct error *last = opaque;

	pthread_mutex_lock(&broken_lock);
	if (last)
		*last = *why;
	pthread_mutex_unlock(&broken_lock);
}

static inline void dest_create(struct error *last)
{
	struct mem_postcopy_dest_options opt = {.space = to,
						.faults_fd = faults_fd,
						.timeout_ms = SILENT_MS,
						.epoch = EPOCH,
						.broken = dest_broken,
						.opaque = last};
	struct error err = ERROR_INIT;

	ck_assert_int_eq(mem_postcopy_dest_create(&opt, &dest, &err), 0);
}

static inline void dest_begin(void)
{
	struct error err = ERROR_INIT;
	uint64_t *copy = bitmap_alloc(NPAGES);

	memcpy(copy, missing, BITMAP_WORDS(NPAGES) * 8);
	ck_assert_int_eq(mem_postcopy_dest_begin(dest, copy, &err), 0);
}

/* The source's side of dialling. */
static struct dialler {
	pthread_mutex_t lock;
	int now[MEM_POSTCOPY_CHANNELS]; /* the source's sockets, to be cut; -1: none */
	unsigned dials, refuse;
	int answer;
	struct error why;
} dialler = {.lock = PTHREAD_MUTEX_INITIALIZER, .now = {-1, -1}};

/* dialler.lock held. */
static inline void forget_sockets(void)
{
	for (unsigned i = 0; i < MEM_POSTCOPY_CHANNELS; i++) {
		if (dialler.now[i] >= 0)
			close(dialler.now[i]);
		dialler.now[i] = -1;
	}
}

/* False when there is nothing to cut. */
static inline bool cut(unsigned channel)
{
	pthread_mutex_lock(&dialler.lock);
	bool there = dialler.now[channel] >= 0;
	if (there)
		shutdown(dialler.now[channel], SHUT_RDWR);
	pthread_mutex_unlock(&dialler.lock);
	return there;
}

static inline void dial(struct conn *channels[MEM_POSTCOPY_CHANNELS])
{
	struct conn *b[MEM_POSTCOPY_CHANNELS];

	connect_streams(false, MEM_POSTCOPY_CHANNELS, channels, b);
	pthread_mutex_lock(&dialler.lock);
	forget_sockets();
	for (unsigned i = 0; i < MEM_POSTCOPY_CHANNELS; i++)
		dialler.now[i] = dup(conn_fd(channels[i]));
	dialler.dials++;
	pthread_mutex_unlock(&dialler.lock);
	for (unsigned i = 0; i < MEM_POSTCOPY_CHANNELS; i++)
		mem_postcopy_dest_add(dest, i, b[i]);
}

static inline int dial_again(void *opaque, const struct error *why,
			     struct conn *channels[MEM_POSTCOPY_CHANNELS], struct error *err)
{
	(void)opaque;
	pthread_mutex_lock(&dialler.lock);
	dialler.why = *why;
	forget_sockets();
	pthread_mutex_unlock(&dialler.lock);
	if (dialler.answer)
		return dialler.answer == 1 ? 1 : error_set(err, EOWNERDEAD, "it is gone");
	usleep(20000);
	/* the cut may have come right after the last page: who asks hears that */
	if (mem_postcopy_dest_wait(dest, 1, NULL) == 0)
		return 1;
	dial(channels);
	return 0;
}

static inline void source_create(void)
{
	struct mem_postcopy_source_options opt = {.space = from,
						  .compress = MEM_COMPRESS_AUTO,
						  .zstd_level = 1,
						  .timeout_ms = SILENT_MS,
						  .bandwidth = &bandwidth,
						  .epoch = EPOCH,
						  .again = dial_again};
	struct error err = ERROR_INIT;

	dial(opt.channels);
	ck_assert_int_eq(mem_postcopy_source_create(&opt, &source, &err), 0);
}

/* --- who uses the memory --- */

struct user {
	unsigned id;
	uint64_t seed, bad, uses;
	atomic_bool stop;
	pthread_t thread;
};

static inline bool page_holds(uint64_t page, uint64_t seed)
{
	const uint64_t *p = (const uint64_t *)(to.base + page * MEM_PAGE_BYTES);

	for (unsigned i = 0; i < MEM_PAGE_BYTES / 8; i++) {
		uint64_t v = seed ? (i % 2 ? seed : (seed + i) * UINT64_C(0x9e3779b97f4a7c15)) : 0;

		if (__atomic_load_n(&p[i], __ATOMIC_RELAXED) != v)
			return false;
	}
	return true;
}

/* Each user has pages of its own, all over the memory; half of what it looks at it changes. */
static inline void *use(void *arg)
{
	struct user *u = arg;

	while (!atomic_load(&u->stop)) {
		uint64_t r = random_next(&u->seed), page = r % (NPAGES / NUSERS) * NUSERS + u->id;

		u->bad += !page_holds(page, value[page]);
		u->uses++;
		if (r >> 63) {
			value[page] = r | 1;
			page_fill(&to, page, value[page]);
		}
		if (r >> 40 & 1)
			usleep(200);
	}
	return NULL;
}

static struct user users[NUSERS];

static inline void users_start(void)
{
	for (unsigned i = 0; i < NUSERS; i++) {
		users[i] = (struct user){.id = i, .seed = i + 1};
		ck_assert_int_eq(pthread_create(&users[i].thread, NULL, use, &users[i]), 0);
	}
}

static inline void users_stop(void)
{
	for (unsigned i = 0; i < NUSERS; i++) {
		atomic_store(&users[i].stop, true);
		pthread_join(users[i].thread, NULL);
		ck_assert_uint_eq(users[i].bad, 0);
		ck_assert_uint_gt(users[i].uses, 0);
	}
}

static inline void check_all(void)
{
	uint64_t bad = 0;

	for (uint64_t page = 0; page < NPAGES; page++)
		bad += !page_holds(page, value[page]);
	ck_assert_uint_eq(bad, 0);
}

static inline void finish(void)
{
	struct error err = ERROR_INIT;

	ck_assert_msg(mem_postcopy_dest_wait(dest, 30000, &err) == 0, "%s", err.message);
	ck_assert_msg(mem_postcopy_source_wait(source, &err) == 0, "%s", err.message);
}

static inline void release(void)
{
	mem_postcopy_source_free(source);
	mem_postcopy_dest_free(dest);
	spaces_free();
}

#endif
