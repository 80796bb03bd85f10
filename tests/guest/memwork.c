/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory load. The working set lies at the bottom of RAM, pages that are only checked at its top, and what is
 * between is never touched: so both sides of the hole below 4 GiB are in use, and a migration has something
 * that it need not send.
 */
#include "guest.h"
#include "selfdesc.h"

#define PAGES_PER_STEP 8u
#define TOUCH_PER_STEP 4u /* few: a fault on fresh memory is slow */

struct mem_stats mem_stats;

static uint32_t *generations; /* of the working set; zero: not written yet */
static uint64_t magic = SELFDESC_PAGE_MAGIC;
static uint64_t total_pages, walk, stride, scan_at, verify_at;
static uint64_t zero_every;
static struct pacer dirty_pacer, scan_pacer;

static uint64_t gcd(uint64_t a, uint64_t b)
{
	while (b) {
		uint64_t r = a % b;

		a = b;
		b = r;
	}
	return a;
}

static uint64_t min64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

void mem_init(void)
{
	uint64_t per_mib = MIB / PAGE_BYTES, left;

	mem_stats.ws_pages = option_number("ws", 64) * per_mib;
	mem_stats.zero_pages = option_number("zero", 4) * per_mib;
	mem_stats.cold_pages = option_is("touch", "all") ? UINT64_MAX : option_number("touch", 64) * per_mib;
	zero_every = option_number("zero_every", 16);
	dirty_pacer.per_second = option_number("rate", 50) * 1000000 / PAGE_BYTES;
	scan_pacer.per_second = option_number("scan", 32) * 1000000 / PAGE_BYTES;
	if (option_is("fill", "easy"))
		magic = SELFDESC_EASY_MAGIC;
	else if (option_is("fill", "few"))
		magic = SELFDESC_FEW_MAGIC;
	else
		(void)option_is("fill", "random");

	left = ram_pages_left();
	mem_stats.ws_pages =
		min64(mem_stats.ws_pages, left - left / 64); /* the table of generations needs room too */
	generations = ram_alloc(mem_stats.ws_pages * sizeof(*generations) + 1, PAGE_BYTES);
	total_pages = ram_pages_left();
	mem_stats.ws_pages = min64(mem_stats.ws_pages, total_pages);
	mem_stats.zero_pages = min64(mem_stats.zero_pages, total_pages - mem_stats.ws_pages);
	mem_stats.cold_pages =
		min64(mem_stats.cold_pages, total_pages - mem_stats.ws_pages - mem_stats.zero_pages);

	/* A stride coprime to the size visits every page once a pass, in an order that no read-ahead guesses.
	 */
	if (mem_stats.ws_pages) {
		stride = mem_stats.ws_pages * 618 / 1000 | 1;
		while (gcd(stride, mem_stats.ws_pages) != 1)
			stride++;
	}
}

/* Some generations of a page are all zeroes: pages must be able to turn into zero pages, and back. */
static bool generation_is_zero(uint64_t number, uint64_t generation)
{
	return zero_every && generation > 1 && selfdesc_mix(number * 0x10001 + generation) % zero_every == 0;
}

void mem_write_page(uint64_t *page, uint64_t number, uint64_t generation)
{
	if (generation_is_zero(number, generation)) {
		uint64_t n = SELFDESC_PAGE_WORDS;

		__asm__ volatile("rep stosq" : "+D"(page), "+c"(n) : "a"(0) : "memory");
	} else {
		selfdesc_fill(page, SELFDESC_PAGE_WORDS, magic, guest_seed, number, generation);
	}
}

static const char *diagnose(const uint64_t *page, uint64_t number, uint64_t generation)
{
	if (!selfdesc_nonzero(page, SELFDESC_PAGE_WORDS))
		return "zero";
	if (page[SELFDESC_MAGIC] != magic)
		return "corrupt";
	if (selfdesc_inconsistent(page, SELFDESC_PAGE_WORDS))
		return "torn";
	if (page[SELFDESC_SEED] != guest_seed)
		return "foreign";
	if (page[SELFDESC_NUMBER] != number)
		return "swapped";
	return page[SELFDESC_GENERATION] < generation ? "stale" : "future";
}

/* Whether the page is what it ought to be; says BAD if not. zero: it ought to be all zeroes. */
static bool check_page(const uint64_t *page, uint64_t number, uint64_t generation, bool zero)
{
	unsigned i = 0;
	uint64_t expected = 0;

	if (zero ? !selfdesc_nonzero(page, SELFDESC_PAGE_WORDS)
		 : !selfdesc_differs(page, SELFDESC_PAGE_WORDS, magic, guest_seed, number, generation))
		return true;
	for (; i < SELFDESC_PAGE_WORDS; i++) {
		expected = zero ? 0 : selfdesc_expected(i, magic, guest_seed, number, generation);
		if (page[i] != expected)
			break;
	}
	if (report_bad(BAD_PAGE))
		con_printf("BAD page address=0x%lx page=%lu kind=%s word=%u expected=0x%lx found=0x%lx "
			   "expected_generation=%lu "
			   "found_generation=%lu found_page=%lu\n",
			   (uint64_t)page, number, diagnose(page, number, generation), i, expected,
			   i < SELFDESC_PAGE_WORDS ? page[i] : 0, generation, page[SELFDESC_GENERATION],
			   page[SELFDESC_NUMBER]);
	return false;
}

bool mem_check_page(const uint64_t *page, uint64_t number, uint64_t generation)
{
	return check_page(page, number, generation, generation_is_zero(number, generation));
}

static bool check_ws_page(uint64_t number)
{
	uint32_t g = generations[number];

	return !g || mem_check_page(ram_page(number), number, g);
}

static void rewrite_one(void)
{
	uint64_t number = walk;

	walk = (walk + stride) % mem_stats.ws_pages;
	check_ws_page(number);
	mem_write_page(ram_page(number), number, ++generations[number]);
	mem_stats.rewritten++;
}

/* Pages outside the working set: the cold ones from the top of RAM down, then those that are zero again. */
static uint64_t rest_page(uint64_t index)
{
	return total_pages - 1 - index;
}

static bool check_rest(uint64_t index)
{
	uint64_t number = rest_page(index);

	return check_page(ram_page(number), number, 1, index >= mem_stats.cold_pages);
}

static void fill_rest(uint64_t index)
{
	uint64_t number = rest_page(index), n = SELFDESC_PAGE_WORDS, *page = ram_page(number);

	selfdesc_fill(page, SELFDESC_PAGE_WORDS, magic, guest_seed, number, 1);
	barrier();
	if (index >= mem_stats.cold_pages)
		__asm__ volatile("rep stosq" : "+D"(page), "+c"(n) : "a"(0) : "memory");
}

static uint64_t rest_pages(void)
{
	return mem_stats.cold_pages + mem_stats.zero_pages;
}

bool mem_touched(void)
{
	return mem_stats.touched == rest_pages() + mem_stats.ws_pages;
}

static void touch_one(uint64_t index)
{
	work_done++;
	if (index < mem_stats.ws_pages)
		mem_write_page(ram_page(index), index, ++generations[index]);
	else
		fill_rest(index - mem_stats.ws_pages);
}

void mem_step(void)
{
	if (!mem_touched()) {
		for (unsigned i = 0; i < TOUCH_PER_STEP && !mem_touched(); i++)
			touch_one(mem_stats.touched++);
		return;
	}
	if (rest_pages() && pacer_take(&scan_pacer)) {
		if (!check_rest(scan_at))
			fill_rest(scan_at);
		scan_at = (scan_at + 1) % rest_pages();
		mem_stats.scanned++;
	}
	for (unsigned i = 0; i < PAGES_PER_STEP && mem_stats.ws_pages && pacer_take(&dirty_pacer); i++)
		rewrite_one();
}

bool mem_verify_step(void)
{
	for (unsigned i = 0; i < PAGES_PER_STEP; i++, verify_at++) {
		if (verify_at < mem_stats.ws_pages)
			check_ws_page(verify_at);
		else if (verify_at < mem_stats.touched)
			check_rest(verify_at - mem_stats.ws_pages);
		else
			return true;
	}
	return false;
}
