/* SPDX-License-Identifier: Apache-2.0 */
/* The comparison of both sides' content, and the sums of what is written after it. */
#define XXH_STATIC_LINKING_ONLY /* what the state looks like */
#include <xxhash.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "mirror/proof.h"
#include "mirror/witness.h"
#include "tests/suite.h"
#include "tests/unit/mirror/rig.h"

#define SEED  UINT64_C(0x0123456789abcdef)
#define CHUNK (64 * KIB)

/* --- the destination's block, with a witness before it; may spoil what passes --- */
struct bench;
struct spy {
	struct block block; /* first */
	struct bench *b;
};

struct bench {
	struct rig r;
	struct block *disk; /* the destination's, which outlives a session */
	struct witness *witness;
	atomic_int spoil;  /* the next write: 1: a bit of its data flips; 2: it goes 512 bytes further on */
	atomic_uint asked; /* times for hashes */
	unsigned delay_ms; /* of an answer */
	int answer;	   /* instead of one */
	void (*meanwhile)(struct bench *b, uint64_t first, unsigned n); /* before the hashes are made */
};

static int spy_submit(struct block *blk, struct block_request *req)
{
	struct bench *b = ((struct spy *)blk)->b;
	int spoil = req->op == BLOCK_WRITE ? atomic_exchange(&b->spoil, 0) : 0;
	if (spoil == 1)
		((uint8_t *)req->iov[0].iov_base)[req->iov[0].iov_len / 2] ^= 4;
	if (spoil == 2)
		req->offset_bytes += 512;
	if (req->op == BLOCK_WRITE) {
		ck_assert_int_eq(req->niov, 1);
		witness_observe(b->witness, req->offset_bytes, req->len_bytes, req->iov[0].iov_base);
	} else if (req->op == BLOCK_WRITE_ZEROES || req->op == BLOCK_DISCARD) {
		witness_observe(b->witness, req->offset_bytes, req->len_bytes, NULL);
	}
	return block_submit(b->disk, req);
}

static int spy_extents(struct block *blk, uint64_t off, uint64_t len, struct block_extent *ext, unsigned *n,
		       struct error *err)
{
	return block_extents(((struct spy *)blk)->b->disk, off, len, ext, n, err);
}

static void spy_close(struct block *blk)
{
	free(blk);
}

static const struct block_ops spy_ops = {
	.name = "spy", .submit = spy_submit, .extents = spy_extents, .close = spy_close};

static void open_remote(struct bench *b)
{
	struct spy *spy = calloc(1, sizeof *spy);
	spy->block = *b->disk;
	spy->block.ops = &spy_ops;
	spy->b = b;
	b->r.remote = faulty_create(&spy->block, "disk remote");
}

static int remote_hashes(void *opaque, uint64_t first, unsigned n, struct mirror_hash *out, struct error *err)
{
	struct bench *b = opaque;
	atomic_fetch_add(&b->asked, 1);
	if (b->meanwhile)
		b->meanwhile(b, first, n);
	if (b->delay_ms)
		clock_sleep_ms(b->delay_ms);
	if (b->answer)
		return error_set(err, b->answer, "no answer");
	return witness_hashes(b->witness, first, n, out, err);
}

static int verify(struct bench *b, bool adopt, struct mirror_verify_result *out, struct error *err)
{
	struct mirror_verify_options opt = {
		.adopt = adopt, .seed = SEED, .remote_hashes = remote_hashes, .opaque = b};
	*err = ERROR_INIT;
	return mirror_verify(b->r.m, &opt, out, err);
}

static void verify_well(struct bench *b, struct mirror_verify_result *out)
{
	struct error err;
	ck_assert_msg(verify(b, false, out, &err) == 0, "%s", err.message);
	ck_assert_uint_eq(out->differed, 0);
	ck_assert(mirror_is_verified(b->r.m));
}

static int compare_sums(struct bench *b, struct error *err)
{
	static struct mirror_sums sums;
	ck_assert(mirror_is_consistent(b->r.m));
	ck_assert(mirror_sums(b->r.m, &sums));
	*err = ERROR_INIT;
	return witness_compare(b->witness, &sums, err);
}

static void sums_agree(struct bench *b)
{
	struct error err;
	struct mirror_sums *sums = malloc(sizeof *sums);
	struct mirror_hash there = witness_root(b->witness);
	ck_assert(mirror_sums(b->r.m, sums));
	ck_assert(mirror_hash_equal(&sums->root, &there));
	free(sums);
	ck_assert_msg(compare_sums(b, &err) == 0, "%s", err.message);
}

static void open_both(struct bench *b, uint32_t chunk_bytes)
{
	struct error err = ERROR_INIT;
	rig_open_local(&b->r);
	b->disk = rig_open(&b->r, b->r.remote_path, true);
	ck_assert_int_eq(witness_create(b->disk, chunk_bytes, SEED, &b->witness, &err), 0);
	open_remote(b);
}

static void fill(const char *path, uint64_t size)
{
	rig_fill(path, 0, 300 * KIB, 1);
	rig_fill(path, 2 * MIB + 12 * KIB, 20 * KIB, 2);
	rig_fill(path, 3 * MIB, 1 * MIB, 3);
	rig_fill(path, size - 4 * KIB, 4 * KIB, 4);
}

static void begin(struct bench *b, uint64_t size)
{
	rig_files(&b->r, size);
	fill(b->r.local_path, size);
	open_both(b, CHUNK);
}

static void copy(struct bench *b)
{
	struct mirror_options opt = rig_options(&b->r);
	struct error err = ERROR_INIT;
	rig_start(&b->r, &opt);
	rig_wait_synced(&b->r);
	ck_assert_int_eq(mirror_flush_remote(b->r.m, &err), 0);
}

static void end(struct bench *b, bool equal)
{
	rig_close(&b->r);
	witness_free(b->witness);
	block_close(b->disk);
	if (equal)
		rig_assert_equal(&b->r);
	rig_remove(&b->r);
}

START_TEST(hashes_are_those_of_the_content)
{
	static const uint32_t chunks[] = {4096, 64 * 1024, 1 << 20, 4 << 20};
	uint32_t chunk = chunks[_i];
	struct rig r = {.direct = _i & 1};
	rig_files(&r, 9 * MIB + 20 * KIB);
	rig_fill(r.local_path, 0, 300 * KIB, 1);
	rig_fill(r.local_path, 2 * MIB + 12 * KIB, 20 * KIB, 2);
	rig_fill(r.local_path, 5 * MIB - 512, 2 * MIB + 700, 3);
	rig_fill(r.local_path, r.size - 4 * KIB, 4 * KIB, 4);
	struct block *blk = rig_open(&r, r.local_path, false);
	uint64_t n = (r.size + chunk - 1) / chunk;
	struct mirror_hash *out = calloc(n, sizeof *out), some[2];
	struct error err = ERROR_INIT;
	ck_assert_msg(mirror_hash_block(blk, chunk, SEED, 0, (unsigned)n, out, &err) == 0, "%s", err.message);
	char *all = rig_read_file(r.local_path, r.size);
	for (uint64_t c = 0; c < n; c++) {
		uint64_t len = r.size - c * chunk < chunk ? r.size - c * chunk : chunk;
		struct mirror_hash h = mirror_hash_bytes(SEED, all + c * chunk, len);
		ck_assert_msg(mirror_hash_equal(&h, &out[c]), "chunk %llu of %u bytes", (unsigned long long)c,
			      chunk);
		if (bytes_all_zero(all + c * chunk, len)) {
			h = mirror_hash_zeroes(SEED, len);
			ck_assert(mirror_hash_equal(&h, &out[c]));
		}
	}
	ck_assert_int_eq(mirror_hash_block(blk, chunk, SEED, n - 2, 2, some, &err), 0);
	ck_assert(mirror_hash_equal(&some[0], &out[n - 2]) && mirror_hash_equal(&some[1], &out[n - 1]));
	ck_assert_int_eq(mirror_hash_block(blk, chunk, SEED + 1, n - 1, 1, some, &err), 0);
	ck_assert(!mirror_hash_equal(&some[0], &out[n - 1]));
	ck_assert_int_eq(mirror_hash_block(blk, chunk, SEED, n - 1, 2, some, &err), -EINVAL);
	free(all);
	free(out);
	block_close(blk);
	rig_remove(&r);
}
END_TEST

START_TEST(agrees_and_counts_what_comes_later)
{
	struct bench b = {.r.direct = _i};
	struct mirror_verify_result res;
	begin(&b, 8 * MIB + 20 * KIB);
	copy(&b);
	ck_assert(!mirror_is_verified(b.r.m));
	verify_well(&b, &res);
	ck_assert_uint_eq(res.chunks, 129);
	ck_assert_uint_eq(res.agreed, 129);
	ck_assert_uint_eq(res.retried, 0);
	struct mirror_stats st;
	mirror_stats(b.r.m, &st);
	ck_assert_uint_eq(st.verified_bytes, b.r.size);
	sums_agree(&b);
	/* within a chunk, across several, across pieces and of every kind */
	ck_assert_int_eq(guest_do(b.r.top, BLOCK_WRITE, 4096, 512, 5), 0);
	ck_assert_int_eq(guest_do(b.r.top, BLOCK_WRITE, 4096, 512, 6), 0);
	ck_assert_int_eq(guest_do(b.r.top, BLOCK_WRITE, CHUNK - 4096, 8192, 7), 0);
	ck_assert_int_eq(guest_do(b.r.top, BLOCK_WRITE, MIB + 512, 700 * KIB, 8), 0);
	ck_assert_int_eq(guest_do(b.r.top, BLOCK_WRITE_ZEROES, 3 * MIB + 512, 5 * CHUNK, 0), 0);
	ck_assert_int_eq(guest_do(b.r.top, BLOCK_DISCARD, 4096, 4096, 0), 0);
	sums_agree(&b);
	/* nothing is left to compare */
	verify_well(&b, &res);
	ck_assert_uint_eq(res.chunks, 0);
	sums_agree(&b);
	end(&b, true);
}
END_TEST

static void flip(const char *path, uint64_t at)
{
	int fd = open(path, O_RDWR);
	uint8_t byte;
	ck_assert_int_eq(pread(fd, &byte, 1, (off_t)at), 1);
	byte ^= 0x10;
	ck_assert_int_eq(pwrite(fd, &byte, 1, (off_t)at), 1);
	close(fd);
}

START_TEST(finds_a_flipped_bit)
{
	static const uint64_t places[] = {0, 3 * MIB + 70001, 5 * MIB /* a hole */, 8 * MIB + 20 * KIB - 1};
	struct bench b = {0};
	struct mirror_verify_result res;
	struct error err;
	uint64_t at = places[_i / 2];
	begin(&b, 8 * MIB + 20 * KIB);
	copy(&b);
	flip(_i & 1 ? b.r.local_path : b.r.remote_path, at);
	ck_assert_int_eq(verify(&b, false, &res, &err), -EILSEQ);
	ck_assert_uint_eq(res.bad_offset, at - at % CHUNK);
	ck_assert_uint_eq(res.bad_len, at > 8 * MIB ? 20 * KIB : CHUNK);
	char range[64];
	snprintf(range, sizeof range, "bytes %llu to %llu", (unsigned long long)res.bad_offset,
		 (unsigned long long)(res.bad_offset + res.bad_len - 1));
	ck_assert_msg(strstr(err.message, range) && strstr(err.message, "disk local"), "%s", err.message);
	ck_assert(!mirror_is_verified(b.r.m));
	ck_assert_int_eq(guest_do(b.r.top, BLOCK_WRITE, 0, 4096, 1), 0);
	end(&b, false);
}
END_TEST

START_TEST(finds_a_spoilt_write)
{
	struct bench b = {0};
	struct mirror_verify_result res;
	struct error err;
	begin(&b, 8 * MIB);
	copy(&b);
	verify_well(&b, &res);
	ck_assert_int_eq(guest_do(b.r.top, BLOCK_WRITE, MIB, 4096, 9), 0);
	sums_agree(&b);
	atomic_store(&b.spoil, _i + 1);
	/* Across a chunk's border where the place is wrong. */
	ck_assert_int_eq(guest_do(b.r.top, BLOCK_WRITE, 4 * MIB + CHUNK - 4096, 4096, 3), 0);
	ck_assert_int_eq(compare_sums(&b, &err), -EILSEQ);
	char range[64];
	snprintf(range, sizeof range, "bytes %llu to %llu", 4 * (unsigned long long)MIB,
		 (unsigned long long)(4 * MIB + CHUNK - 1));
	ck_assert_msg(strstr(err.message, range), "%s", err.message);
	end(&b, false);
}
END_TEST

struct writer {
	struct bench *b;
	pthread_t thread;
	uint64_t first, span;
	atomic_bool quit;
	atomic_uint writes;
};

static void *writer_main(void *arg)
{
	struct writer *w = arg;
	unsigned seed = 11;
	while (!atomic_load(&w->quit)) {
		uint64_t at = w->first + (uint64_t)rand_r(&seed) % (w->span / 512) * 512;
		enum block_op op = rand_r(&seed) % 8 ? BLOCK_WRITE : BLOCK_WRITE_ZEROES;
		ck_assert_int_eq(guest_do(w->b->r.top, op, at, 512 + rand_r(&seed) % 8 * 512,
					  (int)(rand_r(&seed) & 255)),
				 0);
		atomic_fetch_add(&w->writes, 1);
	}
	return NULL;
}

static void writer_start(struct writer *w, struct bench *b, uint64_t first, uint64_t span)
{
	*w = (struct writer){.b = b, .first = first, .span = span};
	ck_assert_int_eq(pthread_create(&w->thread, NULL, writer_main, w), 0);
	rig_eventually(atomic_load(&w->writes) > 3);
}

static void writer_stop(struct writer *w)
{
	atomic_store(&w->quit, true);
	pthread_join(w->thread, NULL);
}

START_TEST(writes_go_on_during_verification)
{
	struct bench b = {.delay_ms = 5};
	struct mirror_verify_result res;
	struct writer everywhere, one_place;
	begin(&b, 8 * MIB);
	copy(&b);
	writer_start(&everywhere, &b, 0, b.r.size - 4096);
	writer_start(&one_place, &b, 3 * MIB, 8 * KIB);
	verify_well(&b, &res);
	/* One chunk is written all the time: three sweeps without the lock never see it at rest. */
	ck_assert_uint_ge(res.retried, 3);
	unsigned before = atomic_load(&everywhere.writes);
	rig_eventually(atomic_load(&everywhere.writes) > before + 20);
	writer_stop(&everywhere);
	writer_stop(&one_place);
	sums_agree(&b);
	end(&b, true);
}
END_TEST

/* What is queued is a change under way: its chunk is no judgement, under the lock it is waited for. What was
 * overwritten before it was sent is not counted. */
START_TEST(a_buffered_session_is_compared_with_what_is_queued)
{
	struct bench b = {.delay_ms = 5};
	struct mirror_verify_result res;
	struct writer everywhere, one_place;
	begin(&b, 8 * MIB);
	b.r.remote->delay_ns = 10000000;
	struct mirror_options opt = rig_options(&b.r);
	opt.buffered = true;
	opt.buffer_bytes = 1 * MIB;
	rig_start(&b.r, &opt);
	rig_wait_synced(&b.r);
	writer_start(&everywhere, &b, 0, b.r.size - 4096);
	writer_start(&one_place, &b, 3 * MIB, 8 * KIB);
	verify_well(&b, &res);
	ck_assert_uint_ge(res.retried, 3);
	for (unsigned i = 0; i < 200; i++)
		ck_assert_int_eq(guest_do(b.r.top, BLOCK_WRITE, 5 * MIB, 4096, (int)i), 0);
	writer_stop(&everywhere);
	writer_stop(&one_place);
	struct error err = ERROR_INIT;
	ck_assert_int_eq(mirror_flush_remote(b.r.m, &err), 0);
	sums_agree(&b);
	end(&b, true);
}
END_TEST

static atomic_int locked_writes;

static void write_meanwhile(struct bench *b, uint64_t first, unsigned n)
{
	(void)n;
	if (first <= 5 && first + n > 5) {
		ck_assert_int_eq(guest_do(b->r.top, BLOCK_WRITE, 5 * CHUNK, 4096, 1), 0);
		atomic_fetch_add(&locked_writes, 1);
	}
}

/* The answer comes only after the guest's write to the chunk is through. */
START_TEST(a_guest_does_not_wait_for_a_slow_answer)
{
	struct bench b = {.meanwhile = write_meanwhile};
	struct mirror_verify_result res;
	struct error err;
	begin(&b, 8 * MIB);
	struct mirror_options opt = rig_options(&b.r);
	opt.write_grace_ms = 80;
	rig_start(&b.r, &opt);
	rig_wait_synced(&b.r);
	ck_assert_int_eq(verify(&b, false, &res, &err), -EBUSY);
	ck_assert_msg(strstr(err.message, "content at 327680"), "%s", err.message);
	ck_assert_int_gt(atomic_load(&locked_writes), 20);
	ck_assert_uint_eq(atomic_load(&b.r.failed), 0);
	b.meanwhile = NULL;
	verify_well(&b, &res);
	ck_assert_uint_eq(res.chunks, 1);
	sums_agree(&b);
	end(&b, true);
}
END_TEST

/* Nor for the link in a buffered session: what it writes is queued behind the comparison, whose last question
 * has its answer. */
START_TEST(a_buffered_guest_does_not_wait_for_the_answer)
{
	struct bench b = {.meanwhile = write_meanwhile, .delay_ms = 300};
	struct mirror_verify_result res;
	struct error err = ERROR_INIT;
	begin(&b, 8 * MIB);
	b.r.remote->delay_ns = 20000000;
	struct mirror_options opt = rig_options(&b.r);
	opt.write_grace_ms = 80;
	opt.buffered = true;
	opt.buffer_bytes = 1 * MIB;
	rig_start(&b.r, &opt);
	rig_wait_synced(&b.r);
	verify_well(&b, &res);
	/* each of the sweeps without the lock, and once under it */
	ck_assert_int_eq(atomic_load(&locked_writes), 4);
	ck_assert_int_eq(mirror_flush_remote(b.r.m, &err), 0);
	sums_agree(&b);
	end(&b, true);
}
END_TEST

/* The buffer is always full and the link slow: all of what is written all the time is compared together. */
START_TEST(a_full_buffer_does_not_make_each_chunk_wait)
{
	struct bench b = {0};
	struct mirror_verify_result res;
	struct writer everywhere[4];
	begin(&b, 8 * MIB);
	struct mirror_options opt = rig_options(&b.r);
	opt.buffered = true;
	opt.buffer_bytes = 4 * MIB;
	rig_start(&b.r, &opt);
	rig_wait_synced(&b.r);
	b.r.remote->delay_ns = 100000000;
	for (unsigned i = 0; i < ARRAY_SIZE(everywhere); i++)
		writer_start(&everywhere[i], &b, 2 * MIB * i, 2 * MIB - 4096);
	clock_sleep_ms(300);
	uint64_t before = clock_now_ns();
	verify_well(&b, &res);
	/* 128 chunks, one after the other, of a tenth of a second and more */
	ck_assert_uint_lt(clock_now_ns() - before, UINT64_C(10000000000));
	for (unsigned i = 0; i < ARRAY_SIZE(everywhere); i++)
		writer_stop(&everywhere[i]);
	struct error err = ERROR_INIT;
	ck_assert_int_eq(mirror_flush_remote(b.r.m, &err), 0);
	sums_agree(&b);
	end(&b, true);
}
END_TEST

START_TEST(what_a_broken_session_left_is_compared_again)
{
	struct bench b = {0};
	struct mirror_verify_result res;
	begin(&b, 8 * MIB);
	struct mirror_options opt = rig_options(&b.r);
	opt.write_grace_ms = 50;
	rig_start(&b.r, &opt);
	rig_wait_synced(&b.r);
	verify_well(&b, &res);
	ck_assert_int_eq(guest_do(b.r.top, BLOCK_WRITE, 0, 4096, 1), 0);
	/* silent before, or after the remote had the write */
	faulty_say(b.r.remote, _i ? SILENCE_AFTER : SILENCE_BEFORE);
	ck_assert_int_eq(guest_do(b.r.top, BLOCK_WRITE, 7 * CHUNK - 4096, 8192, 2), 0);
	rig_eventually(atomic_load(&b.r.failed) == 1);
	ck_assert(!mirror_is_verified(b.r.m));
	rig_stop(&b.r);
	open_remote(&b);
	opt = rig_options(&b.r);
	opt.keep_map = true;
	rig_start(&b.r, &opt);
	rig_wait_synced(&b.r);
	ck_assert(!mirror_is_verified(b.r.m));
	ck_assert_int_eq(guest_do(b.r.top, BLOCK_WRITE, 6 * CHUNK, 4096, 3), 0);
	verify_well(&b, &res);
	ck_assert_uint_eq(res.chunks, 2);
	ck_assert_int_eq(guest_do(b.r.top, BLOCK_WRITE, 7 * CHUNK - 4096, 8192, 4), 0);
	sums_agree(&b);
	end(&b, true);
}
END_TEST

START_TEST(ends_with_its_session_or_an_error)
{
	struct bench b = {0};
	struct mirror_verify_result res;
	struct error err;
	begin(&b, 8 * MIB);
	ck_assert_int_eq(verify(&b, false, &res, &err), -ECANCELED);
	copy(&b);
	b.answer = -ECONNRESET;
	ck_assert_int_eq(verify(&b, false, &res, &err), -ECONNRESET);
	ck_assert_str_eq(err.message, "no answer");
	b.answer = 0;
	mirror_cancel(b.r.m);
	ck_assert_int_eq(verify(&b, false, &res, &err), -ECANCELED);
	ck_assert_uint_eq(atomic_load(&b.asked) > 0, 1);
	end(&b, true);
}
END_TEST

static void lose_extents(struct bench *b, uint64_t first, unsigned n)
{
	if (atomic_load(&b->r.local->extents_error))
		return;
	ck_assert_uint_eq(first, 0);
	ck_assert_int_eq(guest_do(b->r.top, BLOCK_WRITE, 5 * CHUNK, 4096, 1), 0);
	atomic_store(&b->r.local->extents_error, -EIO);
}

/* It is asked for a range that does not begin with the disk, too: no question about nothing, again and again.
 */
START_TEST(ends_when_the_local_disk_tells_nothing)
{
	struct bench b = {.meanwhile = lose_extents};
	struct mirror_verify_result res;
	struct error err;
	begin(&b, 8 * MIB);
	copy(&b);
	ck_assert_int_eq(verify(&b, false, &res, &err), -EIO);
	ck_assert_msg(strstr(err.message, "disk local: extents"), "%s", err.message);
	ck_assert_uint_eq(atomic_load(&b.asked), 1);
	atomic_store(&b.r.local->extents_error, 0);
	b.meanwhile = NULL;
	verify_well(&b, &res);
	end(&b, true);
}
END_TEST

/* --- adoption --- */

static void adopt_begin(struct bench *b, uint64_t size)
{
	struct mirror_options opt;
	open_both(b, CHUNK);
	opt = rig_options(&b->r);
	opt.remote_is_zero = false;
	opt.hold_pass = true;
	rig_start(&b->r, &opt);
	(void)size;
}

START_TEST(adopts_what_agrees_and_copies_the_rest)
{
	struct bench b = {.r.direct = _i};
	struct mirror_verify_result res;
	struct error err;
	uint64_t size = 8 * MIB + 20 * KIB;
	rig_files(&b.r, size);
	fill(b.r.local_path, size);
	fill(b.r.remote_path, size);
	rig_fill(b.r.local_path, 6 * MIB, 100 * KIB, 5);	    /* not there yet: two chunks */
	rig_fill(b.r.remote_path, 7 * MIB, 10 * KIB, 6);	    /* a hole here */
	rig_fill(b.r.remote_path, 3 * MIB + 5 * CHUNK, 4 * KIB, 7); /* other content */
	adopt_begin(&b, size);
	ck_assert_int_eq(guest_do(b.r.top, BLOCK_WRITE, 0, 4096, 1), 0); /* and one written since */
	ck_assert_msg(verify(&b, true, &res, &err) == 0, "%s", err.message);
	ck_assert_uint_eq(res.chunks, 129);
	ck_assert_uint_eq(res.agreed, 124);
	ck_assert_uint_eq(res.differed, 5);
	struct mirror_stats st;
	mirror_stats(b.r.m, &st);
	ck_assert_uint_eq(st.synced_bytes, size - 5 * CHUNK);
	ck_assert_uint_eq(st.data_bytes_copied, 0);
	ck_assert(!st.all_synced);
	/* the pass is held still; what agreed is mirrored */
	ck_assert_int_eq(guest_do(b.r.top, BLOCK_WRITE, 3 * MIB, 4096, 2), 0);
	ck_assert_int_eq(guest_do(b.r.top, BLOCK_WRITE, 6 * MIB, 4096, 2), 0);
	mirror_stats(b.r.m, &st);
	ck_assert_uint_eq(st.mirrored_bytes, 4096);
	ck_assert_uint_eq(st.synced_bytes, size - 5 * CHUNK);
	mirror_release_pass(b.r.m);
	rig_wait_synced(&b.r);
	mirror_stats(b.r.m, &st);
	/* chunk 0, 3 MiB + 5, and of 6 MiB what is allocated: its other half is a hole on both sides */
	ck_assert_uint_le(st.data_bytes_copied, 2 * CHUNK + 100 * KIB);
	ck_assert_uint_le(st.zero_bytes_copied, CHUNK);
	verify_well(&b, &res);
	ck_assert_uint_eq(res.chunks, 5);
	sums_agree(&b);
	end(&b, true);
}
END_TEST

static void write_once(struct bench *b, uint64_t first, unsigned n)
{
	static atomic_bool done;
	if (first <= 48 && first + n > 48 && !atomic_exchange(&done, true))
		ck_assert_int_eq(guest_do(b->r.top, BLOCK_WRITE, 3 * MIB, 4096, 1), 0);
}

START_TEST(what_is_written_during_adoption_is_copied)
{
	struct bench b = {.meanwhile = write_once};
	struct mirror_verify_result res;
	struct error err;
	rig_files(&b.r, 8 * MIB);
	fill(b.r.local_path, b.r.size);
	fill(b.r.remote_path, b.r.size);
	adopt_begin(&b, b.r.size);
	ck_assert_msg(verify(&b, true, &res, &err) == 0, "%s", err.message);
	ck_assert_uint_eq(res.differed, 1);
	mirror_release_pass(b.r.m);
	rig_wait_synced(&b.r);
	verify_well(&b, &res);
	ck_assert_uint_eq(res.chunks, 1);
	sums_agree(&b);
	end(&b, true);
}
END_TEST

START_TEST(a_failed_adoption_loses_nothing)
{
	struct bench b = {.answer = -EIO};
	struct mirror_verify_result res;
	struct error err;
	rig_files(&b.r, 8 * MIB);
	fill(b.r.local_path, b.r.size);
	rig_fill(b.r.remote_path, 0, b.r.size, 9);
	adopt_begin(&b, b.r.size);
	ck_assert_int_eq(verify(&b, true, &res, &err), -EIO);
	mirror_release_pass(b.r.m);
	rig_wait_synced(&b.r);
	ck_assert_int_eq(verify(&b, true, &res, &err), -EINVAL); /* not held any more */
	b.answer = 0;
	verify_well(&b, &res);
	sums_agree(&b);
	end(&b, true);
}
END_TEST

START_TEST(a_huge_empty_disk_costs_next_to_nothing)
{
	struct bench b = {0};
	struct mirror_verify_result res;
	rig_files(&b.r, 1 * MIB);
	b.r.size = UINT64_C(1) << 40;
	ck_assert_int_eq(truncate(b.r.local_path, (off_t)b.r.size), 0);
	ck_assert_int_eq(truncate(b.r.remote_path, (off_t)b.r.size), 0);
	rig_fill(b.r.local_path, b.r.size / 3, MIB, 1);
	open_both(&b, MIB);
	struct mirror_options opt = rig_options(&b.r);
	opt.chunk_bytes = MIB;
	rig_start(&b.r, &opt);
	rig_wait_synced(&b.r);
	verify_well(&b, &res);
	ck_assert_uint_eq(res.chunks, 1 << 20);
	ck_assert_uint_le(res.bytes_read, 2 * MIB);
	ck_assert_uint_le(atomic_load(&b.asked), (1 << 20) / MIRROR_VERIFY_CHUNKS + 2);
	ck_assert_int_eq(guest_do(b.r.top, BLOCK_WRITE, b.r.size - 4096, 4096, 1), 0);
	sums_agree(&b);
	end(&b, false);
}
END_TEST

/* What a function finds on the stack that it does not set: here, all over, what a state of xxHash looks like
 * that was set to this seed: its place for a secret of somebody else's is empty. */
static void __attribute__((noinline)) leave_on_the_stack(uint64_t seed)
{
	volatile uint64_t words[2048] __attribute__((aligned(64)));
	for (unsigned i = 0; i < ARRAY_SIZE(words); i++)
		words[i] = i % 8 == offsetof(XXH3_state_t, extSecret) % 64 / 8 ? 0 : seed;
}

START_TEST(hashes_depend_on_the_content_alone)
{
	static const uint64_t words[] = {0, SEED, UINT64_MAX};
	struct proof *p = NULL;
	ck_assert_int_eq(proof_create(100 * CHUNK, CHUNK, SEED, &p), 0);
	for (unsigned i = 0; i < 100; i++)
		proof_set(p, i, &(struct mirror_hash){.low = i, .high = SEED});
	struct mirror_hash root[3], zeroes[3];
	for (unsigned i = 0; i < 3; i++) {
		leave_on_the_stack(words[i]);
		root[i] = proof_root(p);
		leave_on_the_stack(words[i]);
		zeroes[i] = mirror_hash_zeroes(SEED, CHUNK);
		ck_assert(mirror_hash_equal(&root[i], &root[0]));
		ck_assert(mirror_hash_equal(&zeroes[i], &zeroes[0]));
	}
	proof_free(p);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("mirror-verify");
	TCase *tc = tcase_create("verify");
	tcase_set_timeout(tc, 60);
	tcase_add_test(tc, hashes_depend_on_the_content_alone);
	tcase_add_loop_test(tc, hashes_are_those_of_the_content, 0, 4);
	tcase_add_loop_test(tc, agrees_and_counts_what_comes_later, 0, 2);
	tcase_add_loop_test(tc, finds_a_flipped_bit, 0, 8);
	tcase_add_loop_test(tc, finds_a_spoilt_write, 0, 2);
	tcase_add_test(tc, writes_go_on_during_verification);
	tcase_add_test(tc, a_buffered_session_is_compared_with_what_is_queued);
	tcase_add_test(tc, a_buffered_guest_does_not_wait_for_the_answer);
	tcase_add_test(tc, a_full_buffer_does_not_make_each_chunk_wait);
	tcase_add_test(tc, a_guest_does_not_wait_for_a_slow_answer);
	tcase_add_loop_test(tc, what_a_broken_session_left_is_compared_again, 0, 2);
	tcase_add_test(tc, ends_with_its_session_or_an_error);
	tcase_add_test(tc, ends_when_the_local_disk_tells_nothing);
	tcase_add_loop_test(tc, adopts_what_agrees_and_copies_the_rest, 0, 2);
	tcase_add_test(tc, what_is_written_during_adoption_is_copied);
	tcase_add_test(tc, a_failed_adoption_loses_nothing);
	tcase_add_test(tc, a_huge_empty_disk_costs_next_to_nothing);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
