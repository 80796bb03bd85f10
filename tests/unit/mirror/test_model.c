/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Random guests against the mirror: every write has a number that all its sectors carry. Each guest thread
 * has a region of its own, where a reference model says what has to be read and to be on both disks at the
 * end; in a shared region everybody's requests overlap, and both disks must have taken them in one order.
 * The remote fails, falls silent, answers late; sessions are stopped and started again with the map kept.
 * Half of the seeds have buffered sessions.
 *
 * SNM_MODEL_SEEDS (default 200) seeds from SNM_MODEL_FIRST (default 1).
 */
#include "base/cleanup.h"
#include "tests/suite.h"
#include "tests/unit/mirror/rig.h"

#define SECTOR	      512u
#define GUESTS	      3
#define OWN_BYTES     (1 * MIB)
#define SHARED_BYTES  (1 * MIB)
#define DISK_BYTES    (GUESTS * OWN_BYTES + SHARED_BYTES)
#define DEPTH	      6
#define OPS_MIN	      60
#define OPS_SYNCED    25 /* of each guest after all chunks are synced */
#define SEEDS_A_CASE  10
#define CHANGE_BUFFER 0x5a

#if defined(__SANITIZE_THREAD__)
#define MAY_CHANGE_BUFFERS false /* what the guest may do is a data race by definition */
#else
#define MAY_CHANGE_BUFFERS true
#endif

struct world;

struct guest {
	struct world *w;
	unsigned index, seed;
	uint64_t base;
	uint32_t *model; /* number of the write in each sector of the own region, 0 = zeroes */
	uint32_t next;
	unsigned ops;
	pthread_t thread;
};

struct world {
	struct rig r;
	struct guest guests[GUESTS];
	atomic_bool synced;
	unsigned joined;
	unsigned seed;
	bool buffered;
};

static uint32_t new_number(struct guest *g)
{
	return (g->index + 1) << 24 | ++g->next;
}

static void fill_number(uint8_t *buf, uint64_t len, uint32_t number)
{
	for (uint64_t i = 0; i < len; i += 4)
		memcpy(buf + i, &number, 4);
}

/* The number that the whole sector carries; fails if it is torn. */
static uint32_t sector_number(const uint8_t *sector, uint64_t at)
{
	uint32_t first, n;
	unsigned bad = 0;
	memcpy(&first, sector, 4);
	for (unsigned i = 0; i < SECTOR; i += 4) {
		memcpy(&n, sector + i, 4);
		bad += n != first;
	}
	ck_assert_msg(bad == 0, "sector %llu is torn", (unsigned long long)(at / SECTOR));
	return first;
}

static uint64_t random_range(struct guest *g, uint64_t region, uint64_t *len)
{
	static const unsigned sectors_max[] = {1, 8, 64, 256, 700};
	unsigned max = sectors_max[rand_r(&g->seed) % ARRAY_SIZE(sectors_max)];
	uint64_t n = 1 + (unsigned)rand_r(&g->seed) % max;
	uint64_t at = (unsigned)rand_r(&g->seed) % (region / SECTOR - n);
	*len = n * SECTOR;
	return at * SECTOR;
}

static enum block_op random_change(struct guest *g)
{
	unsigned n = (unsigned)rand_r(&g->seed) % 10;
	return n < 7 ? BLOCK_WRITE : n < 8 ? BLOCK_WRITE_ZEROES : BLOCK_DISCARD;
}

static unsigned random_flags(struct guest *g)
{
	return (rand_r(&g->seed) % 16 ? 0 : BLOCK_REQ_FUA) | (rand_r(&g->seed) % 2 ? BLOCK_REQ_MAY_UNMAP : 0);
}

static void own_change(struct guest *g)
{
	uint64_t len, at = random_range(g, OWN_BYTES, &len);
	enum block_op op = random_change(g);
	uint32_t number = op == BLOCK_WRITE ? new_number(g) : 0;
	struct guest_io io;
	/* the buffer has to be filled before it is submitted */
	if (op == BLOCK_WRITE) {
		uint8_t *buf = malloc(len);
		fill_number(buf, len, number);
		ck_assert_int_eq(block_pwrite(g->w->r.top, buf, len, g->base + at), 0);
		free(buf);
	} else {
		guest_submit(&io, g->w->r.top, op, random_flags(g), g->base + at, len, 0);
		ck_assert_int_eq(guest_wait(&io), 0);
	}
	for (uint64_t s = 0; s < len / SECTOR; s++)
		g->model[at / SECTOR + s] = number;
}

static void own_read(struct guest *g)
{
	uint64_t len, at = random_range(g, OWN_BYTES, &len);
	uint8_t *buf = malloc(len);
	unsigned bad = 0;
	ck_assert_int_eq(block_pread(g->w->r.top, buf, len, g->base + at), 0);
	for (uint64_t s = 0; s < len / SECTOR; s++)
		bad += sector_number(buf + s * SECTOR, g->base + at + s * SECTOR) !=
		       g->model[at / SECTOR + s];
	ck_assert_msg(bad == 0, "guest %u: %u sectors at %llu are not what was written", g->index, bad,
		      (unsigned long long)(g->base + at));
	free(buf);
}

/* A batch in flight at once, over what the others write too. */
static void shared_batch(struct guest *g)
{
	struct guest_io io[DEPTH];
	unsigned n = 1 + (unsigned)rand_r(&g->seed) % DEPTH;
	for (unsigned i = 0; i < n; i++) {
		uint64_t len, at = random_range(g, SHARED_BYTES, &len);
		enum block_op op = random_change(g);
		guest_submit(&io[i], g->w->r.top, op, random_flags(g), GUESTS * OWN_BYTES + at, len,
			     (int)new_number(g) & 0xff);
		if (op == BLOCK_WRITE && MAY_CHANGE_BUFFERS && rand_r(&g->seed) % 2)
			memset(io[i].buf, CHANGE_BUFFER, len);
	}
	for (unsigned i = 0; i < n; i++)
		ck_assert_int_eq(guest_wait(&io[i]), 0);
}

static void *guest_main(void *arg)
{
	struct guest *g = arg;
	unsigned after = 0;
	for (;;) {
		unsigned what = (unsigned)rand_r(&g->seed) % 16;
		if (what < 5)
			own_change(g);
		else if (what < 9)
			own_read(g);
		else if (what < 15)
			shared_batch(g);
		else
			ck_assert_int_eq(guest_do(g->w->r.top, BLOCK_FLUSH, 0, 0, 0), 0);
		g->ops++;
		after = atomic_load(&g->w->synced) ? after + 1 : 0;
		if (g->ops >= OPS_MIN && after >= OPS_SYNCED)
			break;
	}
	return NULL;
}

/* --- the world of one seed --- */

static void initial_content(struct world *w)
{
	uint8_t *buf = malloc(OWN_BYTES);
	int fd = open(w->r.local_path, O_WRONLY);
	for (unsigned i = 0; i < GUESTS; i++) {
		struct guest *g = &w->guests[i];
		g->model = calloc(OWN_BYTES / SECTOR, sizeof *g->model);
		for (unsigned k = 0; k < 6; k++) {
			uint64_t len, at = random_range(g, OWN_BYTES, &len);
			uint32_t number = new_number(g);
			fill_number(buf, len, number);
			ck_assert_int_eq(pwrite(fd, buf, len, (off_t)(g->base + at)), (ssize_t)len);
			for (uint64_t s = 0; s < len / SECTOR; s++)
				g->model[at / SECTOR + s] = number;
		}
	}
	free(buf);
	close(fd);
}

static void plan_faults(struct world *w, unsigned session, struct mirror_options *opt)
{
	struct faulty *f = w->r.remote;
	f->seed = (unsigned)rand_r(&w->seed);
	f->delay_max_ns = (unsigned)rand_r(&w->seed) % 3 * (w->buffered ? 2000000 : 200000);
	if (session >= 3)
		return;
	long after = 1 + rand_r(&w->seed) % (session ? 40 : 160);
	switch (rand_r(&w->seed) % 5) {
	case 0:
		f->error_after = after;
		break;
	case 1:
	case 2:
		f->silent_after = after;
		f->silent_after_kind = rand_r(&w->seed) % 2 ? SILENCE_AFTER : SILENCE_BEFORE;
		opt->write_grace_ms = 15;
		break;
	default:
		break;
	}
}

static void start_session(struct world *w, unsigned session, bool remote_is_zero)
{
	struct rig *r = &w->r;
	rig_open_remote(r);
	struct mirror_options opt = rig_options(r);
	opt.remote_is_zero = remote_is_zero;
	opt.keep_map = session > 0;
	opt.chunk_bytes = session ? 0 : 4096u << (w->seed % 6);
	opt.requests_in_flight = 1 + (unsigned)rand_r(&w->seed) % 20;
	opt.buffered = w->buffered;
	opt.buffer_bytes = w->buffered ? 1 * MIB : 0; /* that it fills */
	plan_faults(w, session, &opt);
	rig_start(r, &opt);
}

/* True when all have ended; joins them. */
static bool guests_ended(struct world *w)
{
	for (; w->joined < GUESTS; w->joined++)
		if (pthread_tryjoin_np(w->guests[w->joined].thread, NULL))
			return false;
	return true;
}

/* One session to the end of the guests (true) or to its failure (false). */
static bool run_session(struct world *w)
{
	struct rig *r = &w->r;
	struct error err = ERROR_INIT;
	struct mirror_stats st = {0};
	int rc = mirror_wait_synced(r->m, 30000, &err);
	if (!rc && rand_r(&w->seed) % 2)
		rc = mirror_flush_remote(r->m, &err);
	atomic_store(&w->synced, rc == 0);
	while (!rc && !st.failed && !guests_ended(w)) {
		clock_sleep_ms(1);
		mirror_stats(r->m, &st);
	}
	atomic_store(&w->synced, false);
	if (!rc)
		rc = mirror_wait_synced(r->m, 30000, &err);
	if (!rc)
		rc = mirror_flush_remote(r->m, &err);
	mirror_stats(r->m, &st);
	ck_assert_msg((rc != 0) == st.failed, "%d: %s", rc, err.message);
	return rc == 0;
}

static void check_model(struct world *w)
{
	uint8_t *disk = (uint8_t *)rig_read_file(w->r.remote_path, DISK_BYTES);
	for (unsigned i = 0; i < GUESTS; i++) {
		struct guest *g = &w->guests[i];
		unsigned bad = 0;
		for (uint64_t s = 0; s < OWN_BYTES / SECTOR; s++)
			bad += sector_number(disk + g->base + s * SECTOR, g->base + s * SECTOR) !=
			       g->model[s];
		ck_assert_msg(bad == 0, "guest %u: %u sectors of the destination are not what was written", i,
			      bad);
		free(g->model);
	}
	free(disk);
}

static void run_seed(unsigned seed)
{
	struct world *w = calloc(1, sizeof *w);
	struct rig *r = &w->r;
	w->seed = seed * 2654435761u;
	r->direct = seed % 16 == 5;
	r->in_memory = !r->direct;
	w->buffered = seed % 8 >= 4;
	rig_files(r, DISK_BYTES);
	r->over_nbd = seed % 4 == 3;
	bool remote_is_zero = rand_r(&w->seed) % 3;
	for (unsigned i = 0; i < GUESTS; i++)
		w->guests[i] = (struct guest){
			.w = w, .index = i, .base = i * OWN_BYTES, .seed = (unsigned)rand_r(&w->seed)};
	initial_content(w);
	if (!remote_is_zero)
		rig_fill(r->remote_path, 0, DISK_BYTES, seed);
	rig_open_local(r);
	r->local->delay_max_ns = (unsigned)rand_r(&w->seed) % 3 * 100000;
	for (unsigned i = 0; i < GUESTS; i++)
		ck_assert_int_eq(pthread_create(&w->guests[i].thread, NULL, guest_main, &w->guests[i]), 0);
	unsigned session = 0;
	start_session(w, session, remote_is_zero);
	while (!run_session(w)) {
		mirror_stop(r->m);
		rig_remote_gone(r);
		ck_assert_uint_eq(atomic_load(&r->failed), ++session);
		start_session(w, session, remote_is_zero);
	}
	ck_assert(guests_ended(w));
	ck_assert(mirror_is_consistent(r->m));
	rig_close(r);
	rig_assert_equal(r);
	check_model(w);
	rig_remove(r);
	free(w);
}

static unsigned env_number(const char *name, unsigned otherwise)
{
	const char *s = getenv(name);
	return s && *s ? (unsigned)strtoul(s, NULL, 10) : otherwise;
}

START_TEST(both_sides_agree_after_anything)
{
	unsigned first = env_number("SNM_MODEL_FIRST", 1), last = first + env_number("SNM_MODEL_SEEDS", 200);
	for (unsigned seed = first + (unsigned)_i * SEEDS_A_CASE;
	     seed < last && seed < first + ((unsigned)_i + 1) * SEEDS_A_CASE; seed++) {
		printf("seed %u\n", seed);
		fflush(stdout);
		run_seed(seed);
	}
}
END_TEST

int main(void)
{
	unsigned seeds = env_number("SNM_MODEL_SEEDS", 200);
	setenv("SNM_LOG", "error", 0);
	Suite *s = suite_create("mirror-model");
	TCase *tc = tcase_create("model");
	tcase_set_timeout(tc, 300);
	tcase_add_loop_test(tc, both_sides_agree_after_anything, 0,
			    (int)((seeds + SEEDS_A_CASE - 1) / SEEDS_A_CASE));
	suite_add_tcase(s, tc);
	return suite_run(s);
}
