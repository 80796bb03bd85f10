/* SPDX-License-Identifier: Apache-2.0 */
/* Whole transfers, with a guest that writes meanwhile. */
#include "memxfer/codec.h"
#include "tests/suite.h"
#include "tests/unit/memxfer/harness.h"

#define PAGES_PER_REGION (MEM_REGION_BYTES / MEM_PAGE_BYTES)

struct transfer {
	unsigned nstreams;
	bool tls;
	struct mem_space src, dst;
	struct fake_log log;
	struct conn *a[MEM_STREAMS_MAX], *b[MEM_STREAMS_MAX];
	struct mem_sender_options so;
	struct mem_receiver_options ro;
	struct mem_sender *sender;
	struct mem_receiver *receiver;
	struct error err, rerr;
};

static void transfer_open(struct transfer *t, uint64_t npages)
{
	t->src = space_create(npages);
	t->dst = space_create(npages);
	connect_streams(t->tls, t->nstreams, t->a, t->b);
	t->so = (struct mem_sender_options){.space = t->src,
					    .dirty = fake_source(&t->log, npages),
					    .streams = t->a,
					    .nstreams = t->nstreams,
					    .compress = MEM_COMPRESS_AUTO,
					    .zstd_level = 1,
					    .downtime_target_ms = 50,
					    .max_rounds = 30,
					    .timeout_ms = TIMEOUT_MS,
					    .epoch = 42};
	t->ro = (struct mem_receiver_options){.space = t->dst,
					      .streams = t->b,
					      .nstreams = t->nstreams,
					      .timeout_ms = TIMEOUT_MS,
					      .epoch = 42};
}

static void transfer_start(struct transfer *t)
{
	ck_assert_msg(mem_receiver_start(&t->ro, &t->receiver, &t->err) == 0, "%s", t->err.message);
	ck_assert_msg(mem_sender_create(&t->so, &t->sender, &t->err) == 0, "%s", t->err.message);
}

static void transfer_finish(struct transfer *t)
{
	ck_assert_msg(mem_sender_finish(t->sender, &t->err) == 0, "%s", t->err.message);
	ck_assert_msg(mem_receiver_wait(t->receiver, &t->rerr) == 0, "%s", t->rerr.message);
}

static void transfer_close(struct transfer *t)
{
	mem_sender_free(t->sender);
	mem_receiver_free(t->receiver);
	close_streams(t->nstreams, t->a);
	close_streams(t->nstreams, t->b);
	space_check_guard(&t->dst);
	space_free(&t->src);
	space_free(&t->dst);
	free(t->log.bits);
}

static void check_equal(struct transfer *t)
{
	for (uint64_t p = 0; p < t->src.npages; p++) {
		if (memcmp(t->src.base + p * MEM_PAGE_BYTES, t->dst.base + p * MEM_PAGE_BYTES,
			   MEM_PAGE_BYTES))
			ck_abort_msg("page %llu differs", (unsigned long long)p);
	}
}

START_TEST(test_idle_guest)
{
	struct transfer t = {.nstreams = 1 + (unsigned)_i % 4, .tls = _i >= 4};
	uint64_t npages = 8 * PAGES_PER_REGION + 77;
	uint64_t *srcmap, *dstmap;
	struct mem_stats st, rst;
	bool limit;

	transfer_open(&t, npages);
	for (uint64_t p = 100; p < 1700; p++)
		page_fill(&t.src, p, p);
	page_fill(&t.src, npages - 1, 5);
	page_fill(&t.src, 2000, 0); /* populated, but zero */
	page_fill(&t.src, 300, 0);
	/* Populated, but in no page table of this process. */
	ck_assert_int_eq(pwrite(t.src.fd, "x", 1, 3000 * MEM_PAGE_BYTES), 1);
	transfer_start(&t);
	ck_assert_msg(mem_sender_precopy(t.sender, &limit, &t.err) == 0, "%s", t.err.message);
	ck_assert(!limit);
	transfer_finish(&t);
	mem_sender_stats(t.sender, &st);
	mem_receiver_stats(t.receiver, &rst);
	ck_assert_uint_eq(st.sent_pages, 1601);
	ck_assert_uint_eq(st.zero_pages, 2);
	ck_assert_uint_eq(st.hole_pages, npages - 1603);
	ck_assert_uint_eq(st.total_bytes, 1603 * MEM_PAGE_BYTES);
	ck_assert_uint_eq(st.remaining_bytes, 0);
	ck_assert_uint_eq(rst.sent_pages, 1601);
	ck_assert_uint_eq(rst.hole_pages, npages - 1603);
	ck_assert_uint_lt(st.wire_bytes, 1600 * MEM_PAGE_BYTES); /* half of each page packs */
	if (!t.tls)
		ck_assert_uint_eq(st.wire_bytes, rst.wire_bytes);
	/* What was a hole is one there, and what was zero was not even allocated. */
	srcmap = bitmap_alloc(npages);
	dstmap = bitmap_alloc(npages);
	ck_assert_uint_eq(space_populated(&t.src, srcmap), 1603);
	ck_assert_uint_eq(space_populated(&t.dst, dstmap), 1601);
	bitmap_clear(srcmap, 300);
	bitmap_clear(srcmap, 2000);
	ck_assert_int_eq(memcmp(srcmap, dstmap, BITMAP_WORDS(npages) * 8), 0);
	free(srcmap);
	free(dstmap);
	check_equal(&t);
	ck_assert_uint_eq(t.log.starts, 1);
	ck_assert_uint_eq(t.log.stops, 0);
	transfer_close(&t);
	ck_assert_uint_eq(t.log.stops, 1);
}
END_TEST

/* The model: whatever the guest does meanwhile, both memories agree once it has stopped. */
START_TEST(test_busy_guest)
{
	uint64_t seed = 1000 + (uint64_t)_i, r = random_next(&seed);
	struct transfer t = {.nstreams = 1 + (unsigned)(r % 4), .tls = r >> 8 & 1};
	uint64_t npages = 2000 + (r >> 16) % 6000;
	struct guest g = {.space = &t.src,
			  .log = &t.log,
			  .seed = seed,
			  .pause_us = 200,
			  .punches = r >> 9 & 1,
			  .npages = npages};
	struct rate_limit rate;
	bool limit;

	transfer_open(&t, npages);
	t.so.compress = (enum mem_compress)((r >> 32) % 3);
	t.so.zstd_level = r >> 36 & 1 ? 1 : -1;
	t.so.max_rounds = 1 + (unsigned)((r >> 40) % 6);
	t.so.downtime_target_ms = (r >> 50) % 8 ? 1 : 0; /* mostly until the limit */
	/* a limit, as deltas are for slow links */
	rate_limit_init(&rate, UINT64_C(150) << 20);
	t.so.bandwidth = r >> 54 & 1 ? &rate : NULL;
	t.ro.deltas = true;
	t.so.delta_cache_bytes = (r >> 56 & 1 ? 4096 : 100) * MEM_PAGE_BYTES;
	for (uint64_t p = 0; p < npages; p++) {
		if ((r = random_next(&seed)) % 3 == 0)
			page_fill(&t.src, p, r % 5 ? r | 1 : 0);
	}
	transfer_start(&t);
	guest_run(&g);
	ck_assert_msg(mem_sender_precopy(t.sender, &limit, &t.err) == 0, "%s", t.err.message);
	usleep(20000);
	guest_pause(&g);
	ck_assert_uint_gt(g.writes, 0);
	transfer_finish(&t);
	check_equal(&t);
	transfer_close(&t);
	rate_limit_destroy(&rate);
}
END_TEST

START_TEST(test_zeroed_and_freed_after_being_sent)
{
	struct transfer t = {.nstreams = 2};
	uint64_t npages = 4 * PAGES_PER_REGION;
	bool limit;

	transfer_open(&t, npages);
	for (uint64_t p = 0; p < npages; p++)
		page_fill(&t.src, p, p + 1);
	transfer_start(&t);
	ck_assert_int_eq(mem_sender_precopy(t.sender, &limit, &t.err), 0);
	for (uint64_t p = 10; p < 20; p++) {
		page_fill(&t.src, p, 0);
		bitmap_set_atomic(t.log.bits, p);
	}
	fallocate(t.src.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 600 * MEM_PAGE_BYTES,
		  900 * MEM_PAGE_BYTES);
	for (uint64_t p = 600; p < 1500; p++)
		bitmap_set_atomic(t.log.bits, p);
	transfer_finish(&t);
	ck_assert_uint_eq(space_populated(&t.src, NULL), npages - 900);
	ck_assert_uint_eq(space_populated(&t.dst, NULL), npages - 900);
	check_equal(&t);
	transfer_close(&t);
}
END_TEST

/* Whole regions that were given back after the destination had made room for them. */
START_TEST(test_prefaulted_for_nothing_is_freed)
{
	struct transfer t = {.nstreams = 2};
	uint64_t npages = 6 * PAGES_PER_REGION, regions[1] = {0x17};
	struct error err = ERROR_INIT;
	struct mem_prefault *prefault = NULL;
	bool limit;

	transfer_open(&t, npages);
	struct mem_prefault_options po = {.space = t.dst, .regions = regions, .nregions = 6};
	ck_assert_int_eq(mem_prefault_start(&po, &prefault, &err), 0);
	ck_assert_int_eq(mem_prefault_wait(prefault, &err), 0);
	t.ro.prefault = prefault;
	page_fill(&t.src, 7, 3);
	for (uint64_t p = PAGES_PER_REGION; p < 2 * PAGES_PER_REGION; p++)
		page_fill(&t.src, p, p);
	ck_assert_uint_eq(space_populated(&t.dst, NULL), 4 * PAGES_PER_REGION);
	transfer_start(&t);
	ck_assert_msg(mem_sender_precopy(t.sender, &limit, &t.err) == 0, "%s", t.err.message);
	/* the first has something in it, the second is full; the other two are holes */
	ck_assert_uint_eq(space_populated(&t.dst, NULL), 2 * PAGES_PER_REGION);
	transfer_finish(&t);
	check_equal(&t);
	transfer_close(&t);
	mem_prefault_free(prefault);
}
END_TEST

/* The whole last round lies in one region, and yet each stream carries a share of it. */
START_TEST(test_final_round_is_striped)
{
	struct transfer t = {.nstreams = 4};
	uint64_t npages = 4 * PAGES_PER_REGION;
	uint64_t before[4];
	bool limit;

	transfer_open(&t, npages);
	t.so.compress = MEM_COMPRESS_OFF;
	transfer_start(&t);
	ck_assert_int_eq(mem_sender_precopy(t.sender, &limit, &t.err), 0);
	for (uint64_t p = 512; p < 1024; p++) {
		page_fill(&t.src, p, p);
		bitmap_set_atomic(t.log.bits, p);
	}
	for (int i = 0; i < 4; i++)
		before[i] = conn_bytes_sent(t.a[i]);
	transfer_finish(&t);
	for (int i = 0; i < 4; i++)
		ck_assert_uint_gt(conn_bytes_sent(t.a[i]) - before[i], 128 * MEM_PAGE_BYTES);
	check_equal(&t);
	transfer_close(&t);
}
END_TEST

/* Dirtied, but as it was when it was sent last: from the third round on it does not go again. */
START_TEST(test_unchanged_pages_are_not_sent_again)
{
	/* What each round after the first finds, and data, zero and unchanged pages so far. */
	static const struct {
		unsigned change, zero, data, zeroes, unchanged;
	} rounds[] = {
		{0, 0, 1124, 0, 0},   /* hashed for the first time */
		{0, 0, 1124, 0, 100}, /* all as they were */
		{7, 0, 1131, 0, 193}, /* seven are not */
		{7, 3, 1131, 3, 290}, /* three became zeroes */
		{7, 0, 1134, 3, 387}, /* and what they were before */
		{7, 0, 1134, 3, 487},
	};
	struct transfer t = {.nstreams = 2};
	uint64_t npages = 2 * PAGES_PER_REGION;
	struct mem_stats st;
	bool limit;

	transfer_open(&t, npages);
	for (uint64_t p = 0; p < npages; p++)
		page_fill(&t.src, p, p + 1);
	transfer_start(&t);
	ck_assert_int_eq(mem_sender_precopy(t.sender, &limit, &t.err), 0);
	for (unsigned i = 0; i < sizeof rounds / sizeof rounds[0]; i++) {
		for (unsigned p = 0; p < 100; p++) {
			page_fill(&t.src, p,
				  p < rounds[i].change		       ? 1000 + p
				  : p >= 50 && p < 50 + rounds[i].zero ? 0
								       : p + 1);
			bitmap_set_atomic(t.log.bits, p);
		}
		if (i + 1 < sizeof rounds / sizeof rounds[0])
			ck_assert_int_eq(mem_sender_catch_up(t.sender, &limit, &t.err), 0);
		else
			transfer_finish(&t); /* where another stream may have the page */
		mem_sender_stats(t.sender, &st);
		ck_assert_msg(st.sent_pages == rounds[i].data && st.zero_pages == rounds[i].zeroes &&
				      st.unchanged_pages == rounds[i].unchanged,
			      "round %u: %llu data, %llu zero, %llu unchanged", i,
			      (unsigned long long)st.sent_pages, (unsigned long long)st.zero_pages,
			      (unsigned long long)st.unchanged_pages);
		ck_assert_uint_eq(st.round, i + 2);
	}
	check_equal(&t);
	transfer_close(&t);
}
END_TEST

/* Two words of each page change in each round: from the third on, that is what goes. */
START_TEST(test_little_changes_go_as_deltas)
{
	struct transfer t = {.nstreams = 2};
	uint64_t npages = 2 * PAGES_PER_REGION, wire;
	struct rate_limit rate;
	struct mem_stats st;
	bool limit;

	rate_limit_init(&rate, 40 << 20);
	transfer_open(&t, npages);
	t.so.compress = MEM_COMPRESS_OFF;
	t.so.bandwidth = &rate;
	t.so.delta_cache_bytes = npages * MEM_PAGE_BYTES;
	t.ro.deltas = true;
	for (uint64_t p = 0; p < npages; p++)
		page_fill(&t.src, p, p + 1);
	transfer_start(&t);
	ck_assert_int_eq(mem_sender_precopy(t.sender, &limit, &t.err), 0);
	for (unsigned round = 2; round <= 6; round++) {
		mem_sender_stats(t.sender, &st);
		wire = st.wire_bytes;
		for (uint64_t p = 100; p < 900; p++) {
			page_touch(&t.src, p, 1000 * round + p);
			page_touch(&t.src, p, 7777 * round + p);
			bitmap_set_atomic(t.log.bits, p);
		}
		if (round == 5) { /* not any more what was sent of it */
			page_fill(&t.src, 200, 0);
			fallocate(t.src.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 700 * MEM_PAGE_BYTES,
				  100 * MEM_PAGE_BYTES);
		}
		if (round < 6)
			ck_assert_int_eq(mem_sender_catch_up(t.sender, &limit, &t.err), 0);
		else
			transfer_finish(&t); /* either stream has pages of both regions */
		mem_sender_stats(t.sender, &st);
		ck_assert_uint_eq(st.delta_pages, round == 2   ? 0
						  : round == 3 ? 800
						  : round == 4 ? 1600
						  : round == 5 ? 2299
							       : 2998);
		if (round == 3 || round == 4)
			ck_assert_uint_lt(st.wire_bytes - wire, 800 * 64);
	}
	ck_assert_uint_eq(st.sent_pages, npages + 3 * 800 + 699 + 800);
	ck_assert_uint_lt(st.delta_bytes, 2998 * 40);
	check_equal(&t);
	transfer_close(&t);
	rate_limit_destroy(&rate);
}
END_TEST

START_TEST(test_limit_on_rounds)
{
	struct transfer t = {.nstreams = 2};
	struct mem_stats st;
	bool limit = false;

	transfer_open(&t, 4096);
	t.so.max_rounds = 5;
	t.so.downtime_target_ms = 0;
	transfer_start(&t);
	t.log.always_dirty = 2000;
	ck_assert_int_eq(mem_sender_precopy(t.sender, &limit, &t.err), 0);
	ck_assert(limit);
	mem_sender_stats(t.sender, &st);
	ck_assert_uint_eq(st.round, 5);
	ck_assert_uint_eq(st.remaining_bytes, 2000 * MEM_PAGE_BYTES);
	ck_assert_uint_gt(st.predicted_downtime_us, 0);
	transfer_finish(&t);
	check_equal(&t);
	transfer_close(&t);
}
END_TEST

START_TEST(test_limit_on_time)
{
	struct transfer t = {.nstreams = 1};
	uint64_t before;
	bool limit = false;

	transfer_open(&t, 4096);
	t.so.max_rounds = 0;
	t.so.max_time_ms = 200;
	t.so.downtime_target_ms = 0;
	transfer_start(&t);
	t.log.always_dirty = 2000;
	before = clock_now_ms();
	ck_assert_int_eq(mem_sender_precopy(t.sender, &limit, &t.err), 0);
	ck_assert(limit);
	ck_assert_uint_ge(clock_now_ms() - before, 200);
	ck_assert_uint_lt(clock_now_ms() - before, 5000);
	transfer_finish(&t);
	transfer_close(&t);
}
END_TEST

static void *cancel_later(void *arg)
{
	usleep(100000);
	mem_sender_cancel(arg);
	return NULL;
}

START_TEST(test_cancel)
{
	struct transfer t = {.nstreams = 2};
	pthread_t thread;
	bool limit;

	transfer_open(&t, 4096);
	t.so.max_rounds = 0;
	t.so.downtime_target_ms = 0;
	transfer_start(&t);
	t.log.always_dirty = 2000;
	pthread_create(&thread, NULL, cancel_later, t.sender);
	ck_assert_int_eq(mem_sender_precopy(t.sender, &limit, &t.err), -ECANCELED);
	pthread_join(thread, NULL);
	ck_assert_int_eq(mem_sender_finish(t.sender, &t.err), -ECANCELED);
	ck_assert_int_lt(mem_receiver_wait(t.receiver, &t.rerr), 0);
	transfer_close(&t);
}
END_TEST

/* Blocked in a write to a destination that reads nothing, or waiting for its answer. */
START_TEST(test_silent_destination)
{
	struct transfer t = {.nstreams = 2};
	uint64_t before;
	bool limit;

	transfer_open(&t, 4096);
	t.so.timeout_ms = 300;
	t.so.compress = MEM_COMPRESS_OFF;
	for (uint64_t p = 0; p < (_i ? 4096 : 10); p++)
		page_fill(&t.src, p, p + 1);
	ck_assert_int_eq(mem_sender_create(&t.so, &t.sender, &t.err), 0);
	before = clock_now_ms();
	ck_assert_int_eq(mem_sender_precopy(t.sender, &limit, &t.err), -ETIMEDOUT);
	ck_assert_uint_ge(clock_now_ms() - before, 290);
	ck_assert_uint_lt(clock_now_ms() - before, 4000);
	ck_assert_msg(strstr(t.err.message, "300 ms") != NULL, "%s", t.err.message);
	transfer_close(&t);
}
END_TEST

START_TEST(test_silent_source)
{
	struct transfer t = {.nstreams = 2};

	transfer_open(&t, 4096);
	t.ro.timeout_ms = 200;
	ck_assert_int_eq(mem_receiver_start(&t.ro, &t.receiver, &t.err), 0);
	ck_assert_int_eq(mem_receiver_wait(t.receiver, &t.err), -ETIMEDOUT);
	transfer_close(&t);
}
END_TEST

/* Idle between rounds is not silence: streams beat. */
START_TEST(test_idle_streams_stay_alive)
{
	struct transfer t = {.nstreams = 3, .tls = _i};
	bool limit;

	transfer_open(&t, 4096);
	t.so.timeout_ms = t.ro.timeout_ms = 1500;
	page_fill(&t.src, 7, 7);
	transfer_start(&t);
	usleep(2000000);
	ck_assert_msg(mem_sender_precopy(t.sender, &limit, &t.err) == 0, "%s", t.err.message);
	usleep(2000000);
	transfer_finish(&t);
	check_equal(&t);
	transfer_close(&t);
}
END_TEST

START_TEST(test_receiver_dies)
{
	struct transfer t = {.nstreams = 2};
	struct guest g = {.space = &t.src, .log = &t.log, .seed = 1, .pause_us = 100, .npages = 4096};
	uint64_t before;
	bool limit;

	transfer_open(&t, 4096);
	t.so.max_rounds = 0;
	t.so.downtime_target_ms = 0;
	transfer_start(&t);
	guest_run(&g);
	if (_i == 0) { /* in mid-flight, from a thread that cancels nothing */
		t.log.always_dirty = 2000;
		shutdown(conn_fd(t.b[1]), SHUT_RDWR);
	} else {
		mem_receiver_free(t.receiver);
		t.receiver = NULL;
		close_streams(2, t.b);
	}
	before = clock_now_ms();
	ck_assert_int_lt(mem_sender_precopy(t.sender, &limit, &t.err), 0);
	ck_assert_uint_lt(clock_now_ms() - before, 5000);
	ck_assert_msg(strstr(t.err.message, "memory stream") != NULL, "%s", t.err.message);
	guest_pause(&g);
	mem_sender_free(t.sender);
	t.sender = NULL;
	if (_i == 0) {
		transfer_close(&t);
	} else {
		close_streams(2, t.a);
		space_check_guard(&t.dst);
		space_free(&t.src);
		space_free(&t.dst);
		free(t.log.bits);
	}
}
END_TEST

START_TEST(test_dirty_log_fails)
{
	struct transfer t = {.nstreams = 2};
	bool limit;

	transfer_open(&t, 1024);
	transfer_start(&t);
	t.log.fail_collect = true;
	ck_assert_int_eq(mem_sender_precopy(t.sender, &limit, &t.err), -EIO);
	ck_assert(strstr(t.err.message, "log is broken") != NULL);
	transfer_close(&t);
}
END_TEST

/* Between source and destination sits a relay that flips a bit. */
struct relay {
	int from, to;
	uint64_t flip_at;
	pthread_t thread;
};

static void *relay_main(void *arg)
{
	struct relay *r = arg;
	uint64_t done = 0;
	uint8_t buf[65536];
	ssize_t n;

	while ((n = recv(r->from, buf, sizeof buf, 0)) > 0) {
		if (r->flip_at >= done && r->flip_at < done + (uint64_t)n)
			buf[r->flip_at - done] ^= 0x10;
		for (ssize_t at = 0; at < n;) {
			ssize_t sent = send(r->to, buf + at, (size_t)(n - at), MSG_NOSIGNAL);

			if (sent <= 0)
				break;
			at += sent;
		}
		done += (uint64_t)n;
	}
	shutdown(r->to, SHUT_WR);
	return NULL;
}

START_TEST(test_corruption_on_the_wire)
{
	/* The first header, a run table, a payload, somewhere later. */
	static const uint64_t at[] = {17, 64 + 5, 64 + 16 + 1000, 200 * MEM_PAGE_BYTES, 900 * MEM_PAGE_BYTES};
	struct transfer t = {.nstreams = 1};
	struct relay forth, back;
	uint64_t wrong = 0;
	int s[2], d[2];
	bool limit;

	transfer_open(&t, 4096);
	close_streams(1, t.a);
	close_streams(1, t.b);
	socketpair(AF_UNIX, SOCK_STREAM, 0, s);
	socketpair(AF_UNIX, SOCK_STREAM, 0, d);
	conn_from_fd(s[0], &t.a[0], NULL);
	conn_from_fd(d[0], &t.b[0], NULL);
	forth = (struct relay){.from = s[1], .to = d[1], .flip_at = at[_i]};
	back = (struct relay){.from = d[1], .to = s[1], .flip_at = UINT64_MAX};
	pthread_create(&forth.thread, NULL, relay_main, &forth);
	pthread_create(&back.thread, NULL, relay_main, &back);
	t.so.compress = MEM_COMPRESS_OFF;
	for (uint64_t p = 0; p < 1500; p++)
		page_fill(&t.src, p, p + 1);
	transfer_start(&t);
	ck_assert_int_eq(mem_sender_precopy(t.sender, &limit, &t.err), -EREMOTEIO);
	ck_assert_msg(strstr(t.err.message, "the destination says") && strstr(t.err.message, "checksum"),
		      "%s", t.err.message);
	ck_assert_int_eq(mem_receiver_wait(t.receiver, &t.rerr), -EBADMSG);
	ck_assert_msg(strstr(t.rerr.message, "checksum") != NULL, "%s", t.rerr.message);
	/* The frame that failed has spoiled no more than a frame's pages. */
	for (uint64_t p = 0; p < 4096; p++) {
		const uint8_t *page = t.dst.base + p * MEM_PAGE_BYTES;
		bool empty = !page[0] && memcmp(page, page + 1, MEM_PAGE_BYTES - 1) == 0;

		wrong += !empty && memcmp(page, t.src.base + p * MEM_PAGE_BYTES, MEM_PAGE_BYTES) != 0;
	}
	ck_assert_uint_le(wrong, MEM_FRAME_PAGES_MAX);
	transfer_close(&t);
	pthread_join(forth.thread, NULL);
	pthread_join(back.thread, NULL);
	close(s[1]);
	close(d[1]);
}
END_TEST

static void *watch_stats(void *arg)
{
	struct transfer *t = arg;
	struct mem_stats st, last = {0};

	for (int i = 0; i < 100; i++) {
		mem_sender_stats(t->sender, &st);
		ck_assert_uint_ge(st.wire_bytes, last.wire_bytes);
		ck_assert_uint_ge(st.sent_pages, last.sent_pages);
		ck_assert_uint_le(st.remaining_bytes, t->src.npages * MEM_PAGE_BYTES);
		last = st;
		usleep(10000);
	}
	ck_assert_uint_gt(st.rate_bytes_per_s, 0);
	return NULL;
}

START_TEST(test_stats_while_running)
{
	struct transfer t = {.nstreams = 2};
	struct guest g = {.space = &t.src, .log = &t.log, .seed = 3, .pause_us = 100, .npages = 4096};
	struct mem_stats st;
	pthread_t thread;
	bool limit;

	transfer_open(&t, 4096);
	t.so.max_rounds = 0;
	t.so.downtime_target_ms = 0;
	t.so.max_time_ms = 1500;
	transfer_start(&t);
	guest_run(&g);
	t.log.always_dirty = 2000;
	pthread_create(&thread, NULL, watch_stats, &t);
	ck_assert_int_eq(mem_sender_precopy(t.sender, &limit, &t.err), 0);
	pthread_join(thread, NULL);
	mem_sender_stats(t.sender, &st);
	ck_assert_uint_gt(st.round, 1);
	ck_assert_uint_gt(st.dirty_bytes_per_s, 0);
	ck_assert_uint_gt(st.wire_bytes, 0);
	guest_pause(&g);
	transfer_finish(&t);
	check_equal(&t);
	transfer_close(&t);
}
END_TEST

/* What the sender's brake was told. */
struct brake {
	double last, lowest;
	unsigned calls;
};

static void brake_set(void *opaque, double speed)
{
	struct brake *b = opaque;

	b->last = speed;
	b->lowest = speed < b->lowest ? speed : b->lowest;
	b->calls++;
}

/* As much is dirty after each round as before it. */
START_TEST(test_guest_that_outruns_the_link_is_slowed)
{
	struct transfer t = {.nstreams = 2};
	struct brake b = {.last = 1, .lowest = 1};
	struct mem_stats st;
	bool limit;

	transfer_open(&t, 2 * PAGES_PER_REGION);
	t.log.always_dirty = 2 * PAGES_PER_REGION;
	t.so.downtime_target_ms = 1;
	t.so.pause = (struct mem_pause_costs){.lead_us = 1000000}; /* nothing fits */
	t.so.max_rounds = 6;
	t.so.slow_max_percent = 90;
	t.so.shrink = 0.5;
	t.so.brake = (struct guest_brake){&b, brake_set};
	transfer_start(&t);
	ck_assert_int_eq(mem_sender_precopy(t.sender, &limit, &t.err), 0);
	ck_assert(limit);
	ck_assert(b.calls >= 2 && b.lowest < 0.3 && b.lowest >= 0.1 - 1e-9);
	mem_sender_stats(t.sender, &st);
	ck_assert_uint_eq(st.round, 6);
	ck_assert_uint_gt(st.predicted_downtime_us, 1000);
	/* after that one round, and as slow as before */
	brake_set(&b, 1);
	ck_assert_int_eq(mem_sender_catch_up(t.sender, &limit, &t.err), 0);
	ck_assert(limit && b.last < 0.3);
	mem_sender_stats(t.sender, &st);
	ck_assert_uint_eq(st.round, 7);
	transfer_finish(&t);
	transfer_close(&t);
}
END_TEST

/* The last round is not held to the bandwidth, and so is not predicted as if it were. */
START_TEST(test_prediction_under_a_bandwidth)
{
	struct transfer t = {.nstreams = 2};
	struct rate_limit limit_rate;
	uint64_t npages = 4 * PAGES_PER_REGION; /* 8 MiB */
	struct mem_stats st;
	bool limit;

	rate_limit_init(&limit_rate, 10 << 20);
	transfer_open(&t, npages);
	for (uint64_t p = 0; p < npages; p++)
		page_fill(&t.src, p, p + 1);
	t.log.always_dirty = npages;
	t.so.compress = MEM_COMPRESS_OFF;
	t.so.downtime_target_ms = 0;
	t.so.max_rounds = 1;
	t.so.bandwidth = &limit_rate;
	transfer_start(&t);
	ck_assert_int_eq(mem_sender_precopy(t.sender, &limit, &t.err), 0);
	mem_sender_stats(t.sender, &st);
	ck_assert_uint_gt(st.predicted_downtime_us, 0);
	ck_assert_msg(st.predicted_downtime_us < 400000, "%llu us, %u at the limited rate",
		      (unsigned long long)st.predicted_downtime_us, 800000);
	/* without a limit the rounds tell the rate */
	rate_limit_set(&limit_rate, 0);
	ck_assert_int_eq(mem_sender_catch_up(t.sender, &limit, &t.err), 0);
	transfer_finish(&t);
	check_equal(&t);
	transfer_close(&t);
	rate_limit_destroy(&limit_rate);
}
END_TEST

START_TEST(test_options_are_checked)
{
	struct transfer t = {.nstreams = 1};

	transfer_open(&t, 64);
	t.so.nstreams = 0;
	ck_assert_int_eq(mem_sender_create(&t.so, &t.sender, &t.err), -EINVAL);
	t.so.nstreams = MEM_STREAMS_MAX + 1;
	ck_assert_int_eq(mem_sender_create(&t.so, &t.sender, &t.err), -EINVAL);
	t.so.nstreams = 1;
	t.so.zstd_level = 1000;
	ck_assert_int_eq(mem_sender_create(&t.so, &t.sender, &t.err), -EINVAL);
	t.so.zstd_level = 0;
	ck_assert_int_eq(mem_sender_create(&t.so, &t.sender, &t.err), -EINVAL);
	t.so.zstd_level = 1;
	t.so.slow_max_percent = 50; /* without a brake */
	ck_assert_int_eq(mem_sender_create(&t.so, &t.sender, &t.err), -EINVAL);
	t.ro.space.npages = 1000000;
	ck_assert_int_eq(mem_receiver_start(&t.ro, &t.receiver, &t.err), -EINVAL);
	transfer_close(&t);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("transfer");
	TCase *tc = tcase_create("transfer");

	tcase_set_timeout(tc, 120);
	tcase_add_loop_test(tc, test_idle_guest, 0, 8);
	/* Under valgrind each takes long. */
	tcase_add_loop_test(tc, test_busy_guest, 0, getenv("SNM_WRAP") ? 6 : 24);
	tcase_add_test(tc, test_zeroed_and_freed_after_being_sent);
	tcase_add_test(tc, test_final_round_is_striped);
	tcase_add_test(tc, test_unchanged_pages_are_not_sent_again);
	tcase_add_test(tc, test_little_changes_go_as_deltas);
	tcase_add_test(tc, test_limit_on_rounds);
	tcase_add_test(tc, test_limit_on_time);
	tcase_add_test(tc, test_cancel);
	tcase_add_loop_test(tc, test_silent_destination, 0, 2);
	tcase_add_test(tc, test_silent_source);
	tcase_add_loop_test(tc, test_idle_streams_stay_alive, 0, 2);
	tcase_add_loop_test(tc, test_receiver_dies, 0, 2);
	tcase_add_test(tc, test_dirty_log_fails);
	tcase_add_loop_test(tc, test_corruption_on_the_wire, 0, 5);
	tcase_add_test(tc, test_prefaulted_for_nothing_is_freed);
	tcase_add_test(tc, test_stats_while_running);
	tcase_add_test(tc, test_guest_that_outruns_the_link_is_slowed);
	tcase_add_test(tc, test_prediction_under_a_bandwidth);
	tcase_add_test(tc, test_options_are_checked);
	suite_add_tcase(suite, tc);
	return suite_run(suite);
}
