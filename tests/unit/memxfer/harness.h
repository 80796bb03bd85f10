/* SPDX-License-Identifier: Apache-2.0 */
#ifndef TESTS_UNIT_MEMXFER_HARNESS_H
#define TESTS_UNIT_MEMXFER_HARNESS_H

/* Guest memory, a dirty log and connections for the tests of memxfer/. Header only. */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/bitmap.h"
#include "base/clock.h"
#include "memxfer/memxfer.h"
#include "tests/unit/net/pki.h"

#define TIMEOUT_MS  10000
#define GUARD_BYTES (1u << 20)
#define GUARD_FILL  0xa5

/* Between two guards of pages that fault, and the file goes on behind the space with a pattern. */
static inline struct mem_space space_create(uint64_t npages)
{
	size_t len = npages * MEM_PAGE_BYTES;
	struct mem_space sp = {.fd = memfd_create("guest", MFD_CLOEXEC), .npages = npages};
	static uint8_t fill[GUARD_BYTES];
	uint8_t *area;

	ck_assert_int_ge(sp.fd, 0);
	memset(fill, GUARD_FILL, sizeof fill);
	ck_assert_int_eq(ftruncate(sp.fd, (off_t)(len + GUARD_BYTES)), 0);
	ck_assert_int_eq(pwrite(sp.fd, fill, sizeof fill, (off_t)len), sizeof fill);
	area = mmap(NULL, len + 2 * GUARD_BYTES + MEM_REGION_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS,
		    -1, 0);
	ck_assert(area != MAP_FAILED);
	/* Guest memory is aligned as huge pages are. */
	area += -(uintptr_t)(area + GUARD_BYTES) % MEM_REGION_BYTES;
	sp.base = mmap(area + GUARD_BYTES, len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, sp.fd, 0);
	ck_assert(sp.base != MAP_FAILED);
	return sp;
}

static inline void space_check_guard(const struct mem_space *sp)
{
	static uint8_t got[GUARD_BYTES];

	ck_assert_int_eq(pread(sp->fd, got, sizeof got, (off_t)(sp->npages * MEM_PAGE_BYTES)), sizeof got);
	/* One assertion for all: libcheck writes a message for each. */
	ck_assert(got[0] == GUARD_FILL && memcmp(got, got + 1, sizeof got - 1) == 0);
}

static inline void space_free(struct mem_space *sp)
{
	munmap(sp->base - GUARD_BYTES, sp->npages * MEM_PAGE_BYTES + 2 * GUARD_BYTES);
	close(sp->fd);
}

/* Pages of the space that the memfd has allocated. */
static inline uint64_t space_populated(const struct mem_space *sp, uint64_t *map)
{
	off_t end_of_space = (off_t)(sp->npages * MEM_PAGE_BYTES), at = 0, hole;
	uint64_t n = 0;

	while ((at = lseek(sp->fd, at, SEEK_DATA)) >= 0 && at < end_of_space) {
		hole = lseek(sp->fd, at, SEEK_HOLE);
		if (hole > end_of_space)
			hole = end_of_space;
		n += (uint64_t)(hole - at) / MEM_PAGE_BYTES;
		if (map)
			bitmap_set_range(map, (size_t)at / MEM_PAGE_BYTES,
					 (size_t)(hole - at) / MEM_PAGE_BYTES);
		at = hole;
	}
	return n;
}

/* The guest's stores: atomic, as the race with the sender's copy is meant. */
static inline void page_fill(struct mem_space *sp, uint64_t page, uint64_t seed)
{
	uint64_t *p = (uint64_t *)(sp->base + page * MEM_PAGE_BYTES);

	for (unsigned i = 0; i < MEM_PAGE_BYTES / 8; i++) {
		/* Half of a page repeats, so that it packs, but not to nothing. */
		uint64_t v = seed ? (i % 2 ? seed : (seed + i) * UINT64_C(0x9e3779b97f4a7c15)) : 0;

		__atomic_store_n(&p[i], v, __ATOMIC_RELAXED);
	}
}

/* Changes one word. */
static inline void page_touch(struct mem_space *sp, uint64_t page, uint64_t value)
{
	uint64_t *p = (uint64_t *)(sp->base + page * MEM_PAGE_BYTES);

	__atomic_store_n(&p[value % (MEM_PAGE_BYTES / 8)], value, __ATOMIC_RELAXED);
}

/* As KVM's log with manual protection: collect does not clear, clear does. */
struct fake_log {
	uint64_t *bits;
	uint64_t npages;
	unsigned starts, stops;
	_Atomic uint64_t cleared_ranges;
	bool fail_collect;
	uint64_t always_dirty; /* this many first pages are dirty at each collect */
};

static inline int fake_start(void *opaque, struct error *err)
{
	struct fake_log *log = opaque;

	log->starts++;
	for (uint64_t w = 0; w < BITMAP_WORDS(log->npages); w++)
		__atomic_store_n(&log->bits[w], ~UINT64_C(0), __ATOMIC_RELEASE);
	return 0;
}

static inline int fake_collect(void *opaque, uint64_t *bitmap, struct error *err)
{
	struct fake_log *log = opaque;

	if (log->fail_collect)
		return error_set(err, EIO, "log is broken");
	for (uint64_t w = 0; w < BITMAP_WORDS(log->npages); w++)
		bitmap[w] |= __atomic_load_n(&log->bits[w], __ATOMIC_ACQUIRE);
	if (log->npages % 64)
		bitmap[log->npages / 64] &= ~(~UINT64_C(0) << (log->npages % 64));
	bitmap_set_range(bitmap, 0, log->always_dirty);
	return 0;
}

static inline int fake_clear(void *opaque, uint64_t first, uint64_t npages, const uint64_t *bitmap,
			     struct error *err)
{
	struct fake_log *log = opaque;

	/* What KVM demands. */
	if (first % 64 || (npages % 64 && first + npages != log->npages) || first + npages > log->npages)
		return error_set(err, EINVAL, "clear of %llu pages at %llu", (unsigned long long)npages,
				 (unsigned long long)first);
	for (uint64_t w = first / 64; w * 64 < first + npages; w++)
		__atomic_fetch_and(&log->bits[w], ~bitmap[w], __ATOMIC_ACQ_REL);
	atomic_fetch_add(&log->cleared_ranges, 1);
	return 0;
}

static inline int fake_stop(void *opaque)
{
	((struct fake_log *)opaque)->stops++;
	return 0;
}

static inline struct dirty_source fake_source(struct fake_log *log, uint64_t npages)
{
	*log = (struct fake_log){.bits = bitmap_alloc(npages), .npages = npages};
	return (struct dirty_source){.opaque = log,
				     .start = fake_start,
				     .collect = fake_collect,
				     .clear = fake_clear,
				     .stop = fake_stop};
}

struct tls_pair {
	struct tls_context *ctx;
	int fd;
	struct conn *conn;
};

static inline void *tls_accept_main(void *arg)
{
	struct tls_pair *p = arg;
	struct error err = ERROR_INIT;

	if (conn_tls_accept(p->fd, p->ctx, TIMEOUT_MS, &p->conn, &err) < 0)
		fprintf(stderr, "accept: %s\n", err.message);
	return NULL;
}

/* n connected pairs, plain or TLS. */
static inline void connect_streams(bool tls, unsigned n, struct conn **a, struct conn **b)
{
	struct tls_context *ctx[2] = {NULL, NULL};
	char *dir = NULL, file[3][512];
	struct error err = ERROR_INIT;

	if (tls) {
		dir = pki_create();
		for (int i = 0; i < 2; i++) {
			snprintf(file[0], sizeof file[0], "%s/ca.pem", dir);
			snprintf(file[1], sizeof file[1], "%s/host%d.pem", dir, i + 1);
			snprintf(file[2], sizeof file[2], "%s/host%d.key", dir, i + 1);
			ck_assert_int_eq(tls_context_create(file[0], file[1], file[2], &ctx[i], &err), 0);
		}
	}
	for (unsigned i = 0; i < n; i++) {
		int fds[2];

		ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
		if (tls) {
			struct tls_pair p = {.ctx = ctx[1], .fd = fds[1]};
			pthread_t thread;

			pthread_create(&thread, NULL, tls_accept_main, &p);
			ck_assert_int_eq(conn_tls_connect(fds[0], ctx[0], "host2", TIMEOUT_MS, &a[i], &err),
					 0);
			pthread_join(thread, NULL);
			ck_assert_ptr_nonnull(p.conn);
			b[i] = p.conn;
		} else {
			ck_assert_int_eq(conn_from_fd(fds[0], &a[i], &err), 0);
			ck_assert_int_eq(conn_from_fd(fds[1], &b[i], &err), 0);
		}
	}
	tls_context_free(ctx[0]);
	tls_context_free(ctx[1]);
	if (dir)
		pki_remove(dir);
}

static inline void close_streams(unsigned n, struct conn **a)
{
	for (unsigned i = 0; i < n; i++)
		conn_close(a[i]);
}

static inline uint64_t random_next(uint64_t *state)
{
	uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);

	z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
	z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
	return z ^ (z >> 31);
}

/* A guest that writes, zeroes and gives back pages until told to stop; marks a page after writing it. */
struct guest {
	struct mem_space *space;
	struct fake_log *log;
	uint64_t seed;
	unsigned pause_us;
	uint64_t first, npages; /* works here */
	bool punches;
	atomic_bool stop;
	uint64_t writes;
	pthread_t thread;
};

static inline void guest_step(struct guest *g)
{
	uint64_t r = random_next(&g->seed), page = g->first + r % g->npages;

	switch ((r >> 40) % 8) {
	case 0:
		page_fill(g->space, page, 0);
		break;
	case 1:
		if (g->punches) {
			fallocate(g->space->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
				  (off_t)(page * MEM_PAGE_BYTES), MEM_PAGE_BYTES);
			break;
		}
		/* fallthrough */
	case 2:
	case 3:
		page_touch(g->space, page, r);
		break;
	default:
		page_fill(g->space, page, r | 1);
	}
	bitmap_set_atomic(g->log->bits, page);
	g->writes++;
}

static inline void *guest_main(void *arg)
{
	struct guest *g = arg;

	while (!atomic_load(&g->stop)) {
		for (int i = 0; i < 8; i++)
			guest_step(g);
		if (g->pause_us)
			usleep(g->pause_us);
	}
	return NULL;
}

static inline void guest_run(struct guest *g)
{
	ck_assert_int_eq(pthread_create(&g->thread, NULL, guest_main, g), 0);
}

static inline void guest_pause(struct guest *g)
{
	atomic_store(&g->stop, true);
	pthread_join(g->thread, NULL);
}

#endif
