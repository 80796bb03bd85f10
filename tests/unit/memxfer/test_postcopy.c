/* SPDX-License-Identifier: Apache-2.0 */
/* Post-copy between two spaces: threads that use the destination's memory while its pages are still at the
 * source. */
#include "memxfer/codec.h"
#include "memxfer/fault_latency.h"
#include "tests/suite.h"
#include "tests/unit/memxfer/postcopy_rig.h"

START_TEST(test_every_page_comes_once)
{
	struct mem_postcopy_stats st, dst;
	uint64_t n;

	if (!spaces_create())
		return;
	n = bitmap_count(missing, NPAGES);
	dest_create(NULL);
	source_create();
	ck_assert(!mem_postcopy_dest_pending(dest));
	dest_begin();
	ck_assert(mem_postcopy_dest_pending(dest));
	mem_postcopy_source_begin(source, missing);
	rate_limit_set(&bandwidth, 40 << 20);
	users_start();
	finish();
	ck_assert(!mem_postcopy_dest_pending(dest));
	users_stop();
	check_all();
	mem_postcopy_source_stats(source, &st);
	mem_postcopy_dest_stats(dest, &dst);
	ck_assert_uint_eq(st.sent_pages, n);
	ck_assert_uint_eq(st.total_pages, n);
	ck_assert_uint_eq(st.missing_pages, 0);
	ck_assert_uint_eq(dst.duplicate_pages, 0);
	ck_assert_uint_gt(st.faults, 0);
	ck_assert_uint_gt(st.fault_worst_us, 0);
	ck_assert_uint_le(st.fault_median_us, st.fault_worst_us);
	ck_assert_uint_eq(st.sessions, 1);
	release();
}
END_TEST

/* A cut at any point costs what was on its way, and nobody reads anything wrong. */
START_TEST(test_cut_again_and_again)
{
	struct mem_postcopy_stats st;
	uint64_t n;
	unsigned cuts = 0;

	if (!spaces_create())
		return;
	n = bitmap_count(missing, NPAGES);
	dest_create(NULL);
	source_create();
	dest_begin();
	mem_postcopy_source_begin(source, missing);
	rate_limit_set(&bandwidth, 16 << 20);
	users_start();
	while (mem_postcopy_dest_wait(dest, 1, NULL) == -ETIMEDOUT) {
		mem_postcopy_dest_stats(dest, &st);
		if (st.missing_pages * 8 > n * (8 - cuts))
			continue;
		cuts += cut(cuts % 2);
	}
	finish();
	users_stop();
	check_all();
	mem_postcopy_source_stats(source, &st);
	ck_assert_uint_ge(cuts, 4);
	ck_assert_uint_ge(st.sessions, cuts);
	/* what a socket holds of both channels, each time */
	ck_assert_uint_le(st.sent_pages, n + (cuts + 1) * 256);
	release();
}
END_TEST

START_TEST(test_the_source_gives_up)
{
	struct error err = ERROR_INIT;

	if (!spaces_create())
		return;
	dest_create(NULL);
	source_create();
	dest_begin();
	rate_limit_set(&bandwidth, 1 << 20);
	dialler.answer = -1;
	mem_postcopy_source_begin(source, missing);
	ck_assert_int_eq(mem_postcopy_dest_wait(dest, 100, &err), -ETIMEDOUT);
	cut(MEM_POSTCOPY_FAULTS);
	ck_assert_int_eq(mem_postcopy_source_wait(source, &err), -EOWNERDEAD);
	ck_assert(mem_postcopy_dest_pending(dest));
	/* A guest that never ran: its memory may be taken down. */
	mem_postcopy_dest_abort(dest);
	ck_assert_int_eq(mem_postcopy_dest_wait(dest, 0, &err), -ECANCELED);
	release();
}
END_TEST

/* The last word was lost, and another way told that all is there. */
START_TEST(test_the_source_hears_otherwise)
{
	struct error err = ERROR_INIT;

	if (!spaces_create())
		return;
	dest_create(NULL);
	source_create();
	dialler.answer = 1;
	mem_postcopy_source_begin(source, missing);
	cut(MEM_POSTCOPY_PUSH);
	ck_assert_int_eq(mem_postcopy_source_wait(source, &err), 0);
	release();
}
END_TEST

START_TEST(test_cancel)
{
	struct error err = ERROR_INIT;

	if (!spaces_create())
		return;
	dest_create(NULL);
	source_create();
	mem_postcopy_source_cancel(source);
	ck_assert_int_eq(mem_postcopy_source_wait(source, &err), -ECANCELED);
	release();
}
END_TEST

/* --- a source that lies --- */

static struct conn *raw[MEM_POSTCOPY_CHANNELS];
static uint64_t sequence[MEM_POSTCOPY_CHANNELS];

static void raw_frame(unsigned channel, struct mem_header h, const struct mem_run *runs, const void *payload)
{
	static uint8_t out[MEM_HEADER_BYTES + MEM_BODY_MAX];
	uint8_t *body = out + MEM_HEADER_BYTES;
	size_t runs_len = h.nruns * MEM_RUN_BYTES;

	for (uint32_t i = 0; i < h.nruns; i++)
		mem_run_encode(body + i * MEM_RUN_BYTES, &runs[i]);
	if (h.wire_len)
		memcpy(body + runs_len, payload, h.wire_len);
	h.epoch = EPOCH;
	h.stream = (uint16_t)channel;
	h.sequence = sequence[channel]++;
	h.body_sum ^= mem_body_sum(body, runs_len, body + runs_len, h.wire_len);
	mem_header_encode(out, &h);
	(void)conn_write_full(raw[channel], out, MEM_HEADER_BYTES + runs_len + h.wire_len, 2000, NULL);
}

static void raw_session(unsigned number)
{
	struct conn *b[MEM_POSTCOPY_CHANNELS];

	connect_streams(false, MEM_POSTCOPY_CHANNELS, raw, b);
	for (unsigned i = 0; i < MEM_POSTCOPY_CHANNELS; i++) {
		sequence[i] = 0;
		raw_frame(i, (struct mem_header){.type = MEM_FRAME_OPEN, .round = number}, NULL, NULL);
		mem_postcopy_dest_add(dest, i, b[i]);
	}
}

static uint8_t lie[MEM_PAGE_BYTES];

static void raw_page(unsigned channel, uint64_t page, unsigned spoil)
{
	struct mem_run run = {.first = page, .npages = 1, .kind = MEM_RUN_DATA};
	struct mem_header h = {.type = MEM_FRAME_PAGES,
			       .flags = MEM_FLAG_FINAL,
			       .nruns = 1,
			       .raw_len = MEM_PAGE_BYTES,
			       .wire_len = MEM_PAGE_BYTES,
			       .body_sum = spoil};

	memset(lie, 0x77, sizeof lie);
	raw_frame(channel, h, &run, lie);
}

/* Waits until the destination gives up the session, for a reason that holds `words`. */
static void expect_broken(struct error *last, const char *words)
{
	struct error why = ERROR_INIT;

	for (int i = 0; i < 500 && !strstr(why.message, words); i++) {
		usleep(10000);
		pthread_mutex_lock(&broken_lock);
		why = *last;
		pthread_mutex_unlock(&broken_lock);
	}
	ck_assert_msg(strstr(why.message, words), "\"%s\" instead of \"%s\"", why.message, words);
	close_streams(MEM_POSTCOPY_CHANNELS, raw);
}

START_TEST(test_a_source_that_lies)
{
	struct error last = ERROR_INIT;
	struct mem_postcopy_stats st;
	struct mem_run bad = {.first = 0, .npages = 1, .kind = MEM_RUN_LATER};
	/* missing, missing too, not missing, a hole of both sides */
	uint64_t first = 50, second = 51, had = 1, hole = 63;

	if (!spaces_create())
		return;
	ck_assert(bitmap_test(missing, first) && bitmap_test(missing, second));
	ck_assert(!bitmap_test(missing, had) && !bitmap_test(missing, hole));
	dest_create(&last);
	dest_begin();
	raw_session(1);
	raw_page(MEM_POSTCOPY_PUSH, had, 0);
	expect_broken(&last, "never missing");
	raw_session(2);
	raw_page(MEM_POSTCOPY_FAULTS, hole, 0);
	expect_broken(&last, "never missing");
	raw_session(3);
	raw_page(MEM_POSTCOPY_PUSH, NPAGES, 0);
	expect_broken(&last, "outside");
	raw_session(4);
	raw_page(MEM_POSTCOPY_PUSH, first, 1);
	expect_broken(&last, "checksum");
	raw_session(5);
	raw_frame(MEM_POSTCOPY_PUSH, (struct mem_header){.type = MEM_FRAME_WANT, .nruns = 1}, &bad, NULL);
	expect_broken(&last, "not the source's to send");
	raw_session(6);
	raw_frame(MEM_POSTCOPY_PUSH,
		  (struct mem_header){.type = MEM_FRAME_PAGES, .flags = MEM_FLAG_FINAL, .nruns = 1}, &bad,
		  NULL);
	expect_broken(&last, "later still");
	raw_session(7);
	raw_frame(MEM_POSTCOPY_PUSH,
		  (struct mem_header){.type = MEM_FRAME_END, .raw_len = 32, .wire_len = 32}, NULL, lie);
	expect_broken(&last, "not the source's to send");
	/* A page that came, and that its owner has written since, stays as it is. */
	value[first] = 0x1234567;
	raw_session(8);
	raw_page(MEM_POSTCOPY_PUSH, first, 0);
	page_fill(&to, first, value[first]);
	for (int i = 0; i < 3; i++)
		raw_page(i % 2 ? MEM_POSTCOPY_PUSH : MEM_POSTCOPY_FAULTS, first, 0);
	for (int i = 0; i < 500; i++) {
		mem_postcopy_dest_stats(dest, &st);
		if (st.duplicate_pages == 3)
			break;
		usleep(10000);
	}
	ck_assert_uint_eq(st.duplicate_pages, 3);
	ck_assert(page_holds(first, value[first]));
	raw_frame(MEM_POSTCOPY_FAULTS, (struct mem_header){.type = MEM_FRAME_OPEN}, NULL, NULL);
	expect_broken(&last, "not the source's to send");
	/* ... and one that tells the truth goes on with what is left. */
	bitmap_clear(missing, first);
	source_create();
	mem_postcopy_source_begin(source, missing);
	users_start();
	finish();
	users_stop();
	check_all();
	release();
}
END_TEST

/* Two channels that do not belong together. */
START_TEST(test_sessions_are_not_mixed)
{
	struct error last = ERROR_INIT;
	struct conn *b[MEM_POSTCOPY_CHANNELS];

	if (!spaces_create())
		return;
	dest_create(&last);
	dest_begin();
	connect_streams(false, MEM_POSTCOPY_CHANNELS, raw, b);
	for (unsigned i = 0; i < MEM_POSTCOPY_CHANNELS; i++) {
		sequence[i] = 0;
		raw_frame(i, (struct mem_header){.type = MEM_FRAME_OPEN, .round = 5 + i}, NULL, NULL);
		mem_postcopy_dest_add(dest, i, b[i]);
	}
	expect_broken(&last, "sessions 5 and 6");
	source_create();
	mem_postcopy_source_begin(source, missing);
	finish();
	check_all();
	release();
}
END_TEST

/* --- a destination that lies --- */

START_TEST(test_a_destination_that_lies)
{
	static const struct {
		enum mem_frame_type type;
		unsigned channel;
		uint64_t page;
		const char *words;
	} cases[] = {
		{MEM_FRAME_MISSING, MEM_POSTCOPY_PUSH, 1, "given before"},
		{MEM_FRAME_MISSING, MEM_POSTCOPY_PUSH, NPAGES, "outside"},
		{MEM_FRAME_WANT, MEM_POSTCOPY_PUSH, 50, "on the push channel"},
		{MEM_FRAME_WANT, MEM_POSTCOPY_FAULTS, 1, "given before"},
		{MEM_FRAME_WANT, MEM_POSTCOPY_FAULTS, NPAGES + 5, "outside"},
		{MEM_FRAME_STATUS, MEM_POSTCOPY_FAULTS, 0, "on the channel of faults"},
	};
	uint8_t status[MEM_STATUS_BYTES];

	if (!spaces_create())
		return;
	dest_create(NULL);
	dialler.answer = -1;
	for (unsigned i = 0; i < sizeof cases / sizeof *cases; i++) {
		struct mem_postcopy_source_options opt = {.space = from,
							  .zstd_level = 1,
							  .timeout_ms = SILENT_MS,
							  .epoch = EPOCH,
							  .again = dial_again};
		struct mem_run run = {.first = cases[i].page, .npages = 1, .kind = MEM_RUN_LATER};
		struct error err = ERROR_INIT;
		bool is_status = cases[i].type == MEM_FRAME_STATUS;
		struct mem_header h = {.type = cases[i].type,
				       .nruns = is_status ? 0 : 1,
				       .raw_len = is_status ? MEM_STATUS_BYTES : 0,
				       .wire_len = is_status ? MEM_STATUS_BYTES : 0};

		connect_streams(false, MEM_POSTCOPY_CHANNELS, opt.channels, raw);
		sequence[0] = sequence[1] = 0;
		ck_assert_int_eq(mem_postcopy_source_create(&opt, &source, &err), 0);
		mem_postcopy_source_begin(source, missing);
		mem_status_encode(status, &(struct mem_postcopy_status){.missing_pages = 1});
		if (cases[i].channel == MEM_POSTCOPY_FAULTS)
			raw_frame(MEM_POSTCOPY_PUSH,
				  (struct mem_header){.type = MEM_FRAME_STATUS,
						      .raw_len = MEM_STATUS_BYTES,
						      .wire_len = MEM_STATUS_BYTES},
				  NULL, status);
		raw_frame(cases[i].channel, h, &run, status);
		ck_assert_int_eq(mem_postcopy_source_wait(source, &err), -EOWNERDEAD);
		ck_assert_msg(strstr(dialler.why.message, cases[i].words), "case %u: %s", i,
			      dialler.why.message);
		mem_postcopy_source_free(source);
		close_streams(MEM_POSTCOPY_CHANNELS, raw);
	}
	source = NULL;
	release();
}
END_TEST

/* --- from pre-copy on --- */

START_TEST(test_the_last_round_names_what_comes_later)
{
	enum { STREAMS = 2, DIRTY = 700, ALWAYS = 1200 };
	struct conn *a[STREAMS], *b[STREAMS];
	struct fake_log log;
	struct mem_sender *sender;
	struct mem_receiver *receiver;
	struct error err = ERROR_INIT;
	const uint64_t *later;
	uint64_t npages, seed = 5, *told;
	bool limit_hit;

	if (!spaces_create())
		return;
	space_free(&to);
	to = space_create(NPAGES);
	connect_streams(false, STREAMS, a, b);
	struct mem_sender_options so = {.space = from,
					.dirty = fake_source(&log, NPAGES),
					.streams = a,
					.nstreams = STREAMS,
					.downtime_target_ms = 1000,
					.max_rounds = 1,
					.timeout_ms = TIMEOUT_MS,
					.epoch = EPOCH};
	struct mem_receiver_options ro = {.space = to,
					  .streams = b,
					  .nstreams = STREAMS,
					  .timeout_ms = TIMEOUT_MS,
					  .epoch = EPOCH,
					  .postcopy = true};
	ck_assert_int_eq(mem_receiver_start(&ro, &receiver, &err), 0);
	ck_assert_int_eq(mem_sender_create(&so, &sender, &err), 0);
	ck_assert_int_eq(mem_sender_precopy(sender, &limit_hit, &err), 0);
	/* Announced, and sent in a round after all, as they were: the destination has them no more. */
	log.always_dirty = ALWAYS;
	ck_assert_int_eq(mem_sender_precopy(sender, &limit_hit, &err), 0);
	ck_assert_msg(mem_sender_announce_later(sender, &err) == 0, "%s", err.message);
	ck_assert(!page_holds(1, value[1]));
	ck_assert_int_eq(mem_sender_precopy(sender, &limit_hit, &err), 0);
	ck_assert(page_holds(1, value[1]));
	log.always_dirty = ALWAYS / 2;
	ck_assert_int_eq(mem_sender_precopy(sender, &limit_hit, &err), 0);
	ck_assert_msg(mem_sender_announce_later(sender, &err) == 0, "%s", err.message);
	for (unsigned i = 0; i < DIRTY; i++) {
		uint64_t page = random_next(&seed) % NPAGES;

		value[page] = i % 5 ? random_next(&seed) | 1 : 0;
		/* a tenth is given back altogether */
		if (i % 10 == 9) {
			value[page] = 0;
			fallocate(from.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
				  (off_t)(page * MEM_PAGE_BYTES), MEM_PAGE_BYTES);
		} else {
			page_fill(&from, page, value[page]);
		}
		bitmap_set(log.bits, page);
	}
	ck_assert_msg(mem_sender_finish_later(sender, &later, &npages, &err) == 0, "%s", err.message);
	ck_assert_msg(mem_receiver_wait(receiver, &err) == 0, "%s", err.message);
	ck_assert_uint_gt(npages, DIRTY / 2 + ALWAYS / 3);
	ck_assert_uint_le(npages, DIRTY + ALWAYS / 2);
	told = mem_receiver_take_later(receiver);
	ck_assert_ptr_nonnull(told);
	ck_assert(!memcmp(told, later, BITMAP_WORDS(NPAGES) * 8));
	memcpy(missing, later, BITMAP_WORDS(NPAGES) * 8);
	dest_create(NULL);
	source_create();
	ck_assert_int_eq(mem_postcopy_dest_begin(dest, told, &err), 0);
	mem_postcopy_source_begin(source, missing);
	users_start();
	finish();
	users_stop();
	check_all();
	mem_receiver_free(receiver);
	mem_sender_free(sender);
	close_streams(STREAMS, a);
	close_streams(STREAMS, b);
	free(log.bits);
	release();
}
END_TEST

START_TEST(test_later_pages_have_to_be_agreed)
{
	struct conn *a[1], *b[1];
	struct fake_log log;
	struct mem_sender *sender;
	struct mem_receiver *receiver;
	struct error err = ERROR_INIT;
	const uint64_t *later;
	uint64_t npages;
	bool limit_hit;

	if (!spaces_create())
		return;
	connect_streams(false, 1, a, b);
	struct mem_sender_options so = {.space = from,
					.dirty = fake_source(&log, NPAGES),
					.streams = a,
					.nstreams = 1,
					.max_rounds = 1,
					.timeout_ms = TIMEOUT_MS,
					.epoch = EPOCH};
	struct mem_receiver_options ro = {
		.space = to, .streams = b, .nstreams = 1, .timeout_ms = TIMEOUT_MS, .epoch = EPOCH};
	ck_assert_int_eq(mem_receiver_start(&ro, &receiver, &err), 0);
	ck_assert_int_eq(mem_sender_create(&so, &sender, &err), 0);
	ck_assert_int_eq(mem_sender_precopy(sender, &limit_hit, &err), 0);
	bitmap_set(log.bits, 50);
	ck_assert_int_lt(mem_sender_finish_later(sender, &later, &npages, &err), 0);
	ck_assert_msg(strstr(err.message, "not agreed"), "%s", err.message);
	mem_receiver_free(receiver);
	mem_sender_free(sender);
	close_streams(1, a);
	close_streams(1, b);
	free(log.bits);
	spaces_free();
}
END_TEST

START_TEST(test_latency_histogram)
{
	struct fault_latency l = {0};

	ck_assert_uint_eq(fault_latency_median(&l), 0);
	for (uint64_t us = 0; us < 100000; us = us * 9 / 8 + 1) {
		unsigned step = fault_latency_step(us);

		ck_assert_uint_lt(step, FAULT_LATENCY_STEPS);
		/* within a fifth, and steps rise with time */
		ck_assert_uint_ge(6 * fault_latency_of_step(step), 5 * us);
		ck_assert_uint_le(5 * fault_latency_of_step(step), 6 * us + 5);
		ck_assert_uint_ge(fault_latency_step(us * 9 / 8 + 1), step);
	}
	ck_assert_uint_lt(fault_latency_step(UINT64_MAX), FAULT_LATENCY_STEPS);
	for (int i = 0; i < 10; i++)
		fault_latency_add(&l, 100);
	for (int i = 0; i < 9; i++)
		fault_latency_add(&l, 100000);
	ck_assert_uint_ge(fault_latency_median(&l), 80);
	ck_assert_uint_le(fault_latency_median(&l), 120);
	ck_assert_uint_eq(l.worst_us, 100000);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("postcopy");
	TCase *tc = tcase_create("all");

	tcase_add_test(tc, test_every_page_comes_once);
	tcase_add_test(tc, test_cut_again_and_again);
	tcase_add_test(tc, test_the_source_gives_up);
	tcase_add_test(tc, test_the_source_hears_otherwise);
	tcase_add_test(tc, test_cancel);
	tcase_add_test(tc, test_a_source_that_lies);
	tcase_add_test(tc, test_sessions_are_not_mixed);
	tcase_add_test(tc, test_a_destination_that_lies);
	tcase_add_test(tc, test_the_last_round_names_what_comes_later);
	tcase_add_test(tc, test_later_pages_have_to_be_agreed);
	tcase_add_test(tc, test_latency_histogram);
	tcase_set_timeout(tc, 60);
	suite_add_tcase(suite, tc);
	return suite_run(suite);
}
