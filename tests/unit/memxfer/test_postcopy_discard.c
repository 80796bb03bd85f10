/* SPDX-License-Identifier: Apache-2.0 */
/* Post-copy to a guest that gives memory back while some of it is missing still. */
#include "tests/suite.h"
#include "tests/unit/memxfer/postcopy_rig.h"

#define UNDEFINED UINT64_MAX /* given back, and not written since */

static void give_back(uint64_t first, uint64_t npages)
{
	for (uint64_t page = first; page < first + npages; page++)
		value[page] = UNDEFINED;
	mem_postcopy_dest_forget(dest, first, npages);
	ck_assert_int_eq(fallocate(to.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
				   (off_t)(first * MEM_PAGE_BYTES), (off_t)(npages * MEM_PAGE_BYTES)),
			 0);
}

/* What this session would still have brought is not waited for. */
START_TEST(test_what_was_given_back_is_not_waited_for)
{
	struct mem_postcopy_stats st;
	uint64_t n;

	if (!spaces_create())
		return;
	n = bitmap_count(missing, NPAGES);
	dest_create(NULL);
	source_create();
	mem_postcopy_dest_forget(dest, 0, NPAGES); /* not begun: nothing is missing */
	dest_begin();
	rate_limit_set(&bandwidth, 1 << 20); /* all of it would take 15 s */
	mem_postcopy_source_begin(source, missing);
	give_back(0, NPAGES / 2);
	mem_postcopy_dest_stats(dest, &st);
	ck_assert_uint_lt(st.missing_pages, n * 2 / 3);
	/* who takes it again waits for nobody, and keeps what is written there */
	for (uint64_t page = 0; page < NPAGES / 2; page += 97) {
		value[page] = page + 5;
		page_fill(&to, page, value[page]);
	}
	give_back(NPAGES / 2, NPAGES / 2);
	finish();
	mem_postcopy_source_stats(source, &st);
	ck_assert_uint_lt(st.sent_pages, n / 2);
	for (uint64_t page = 0; page < NPAGES / 2; page += 97)
		ck_assert(page_holds(page, value[page]));
	release();
}
END_TEST

static atomic_bool looked;

static void *look_at_50(void *good)
{
	*(bool *)good = page_holds(50, value[50]);
	atomic_store(&looked, true);
	return NULL;
}

/* Somebody waits for a page: it stays missing, since nobody else would wake him. */
START_TEST(test_what_somebody_waits_for_still_comes)
{
	struct mem_postcopy_stats st;
	pthread_t thread;
	bool good = false;

	if (!spaces_create())
		return;
	ck_assert(bitmap_test(missing, 50));
	dest_create(NULL);
	dest_begin();
	ck_assert_int_eq(pthread_create(&thread, NULL, look_at_50, &good), 0);
	/* until the server knows */
	for (int i = 0; i < 100 && !atomic_load(&looked); i++)
		usleep(1000);
	ck_assert(!atomic_load(&looked));
	mem_postcopy_dest_forget(dest, 0, NPAGES);
	mem_postcopy_dest_stats(dest, &st);
	ck_assert_uint_eq(st.missing_pages, 1);
	ck_assert(mem_postcopy_dest_pending(dest));
	source_create();
	mem_postcopy_source_begin(source, missing);
	finish();
	pthread_join(thread, NULL);
	ck_assert(good);
	mem_postcopy_source_stats(source, &st);
	ck_assert_uint_eq(st.sent_pages, 1);
	release();
}
END_TEST

static void *use_and_give_back(void *arg)
{
	struct user *u = arg;

	while (!atomic_load(&u->stop)) {
		uint64_t r = random_next(&u->seed), page = r % (NPAGES / NUSERS) * NUSERS + u->id;

		u->bad += value[page] != UNDEFINED && !page_holds(page, value[page]);
		u->uses++;
		if (r >> 62 == 0) {
			give_back(page, 1);
		} else if (r >> 62 == 1) {
			value[page] = r | 1;
			page_fill(&to, page, value[page]);
		}
	}
	return NULL;
}

/* Pages are taken, given back and taken again while they come: nobody waits for ever, and nothing that was
 * written is lost. */
START_TEST(test_giving_back_while_pages_come)
{
	if (!spaces_create())
		return;
	dest_create(NULL);
	source_create();
	dest_begin();
	rate_limit_set(&bandwidth, 30 << 20);
	mem_postcopy_source_begin(source, missing);
	for (unsigned i = 0; i < NUSERS; i++) {
		users[i] = (struct user){.id = i, .seed = i + 77};
		ck_assert_int_eq(pthread_create(&users[i].thread, NULL, use_and_give_back, &users[i]), 0);
	}
	finish();
	users_stop();
	for (uint64_t page = 0; page < NPAGES; page++)
		ck_assert(value[page] == UNDEFINED || page_holds(page, value[page]));
	release();
}
END_TEST

int main(void)
{
	Suite *s = suite_create("postcopy_discard");
	TCase *tc = tcase_create("discard");

	tcase_set_timeout(tc, 60);
	tcase_add_test(tc, test_what_was_given_back_is_not_waited_for);
	tcase_add_test(tc, test_what_somebody_waits_for_still_comes);
	tcase_add_test(tc, test_giving_back_while_pages_come);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
