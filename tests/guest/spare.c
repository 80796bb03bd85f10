/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory that the guest can do without: it is written and checked like the rest, given back to the host by a
 * virtio balloon (VIRTIO 1.2, section 5.5) and written again when it is wanted. What is in the balloon is the
 * beginning of it, as large as the host asks; of the rest all or chunks are reported as free.
 */
#include "guest.h"
#include "virtio.h"

#define TYPE_BALLOON	  5u
#define F_DEFLATE_ON_OOM  (1ULL << 2)
#define F_REPORTING	  (1ULL << 5)
#define QUEUE_SIZE	  64u
#define PFNS_PER_REQUEST  256u
#define PAGES_PER_SEGMENT 512u
#define SEGMENTS_MAX	  32u
#define CHURN_PAGES	  32u
#define FILL_PER_STEP	  4u
#define LOOK_PER_STEP	  256u
#define CONFIG_POLL_MS	  50u
#define NUMBER_BASE	  (1ULL << 40) /* no other page has such a number */

/* As the specification numbers them; drivers of Linux before 6.11 take the first free number for reporting.
 */
enum { QUEUE_INFLATE, QUEUE_DEFLATE, QUEUE_REPORTING = 4, QUEUE_REPORTING_OLD = 2 };
enum { CONFIG_TARGET = 0, CONFIG_ACTUAL = 4 };
enum state { UNWRITTEN, HELD, LEAVING, GIVEN, IN_BALLOON };

static struct virtio device;
static struct virtio_queue inflate, deflate, reporting;
static bool has_device, report_all, churning;
static uint64_t base, npages, in_state[IN_BALLOON + 1];
static uint8_t *state;
static uint32_t *generation;
static uint64_t fill_at, scan_at, report_at, verify_at, last_poll;
static uint64_t ballooned, target;
static uint64_t moving; /* pages of the request to inflate or deflate that is under way */
static bool inflating;
static bool report_under_way;
static uint32_t *pfns;
static struct pacer scan_pacer, churn_pacer;
static struct {
	uint64_t checked, written;
} stats;

static uint64_t *page_of(uint64_t i)
{
	return (uint64_t *)(base + i * PAGE_BYTES);
}

static void set_state(uint64_t i, enum state s)
{
	in_state[state[i]]--;
	in_state[s]++;
	state[i] = (uint8_t)s;
}

void spare_init(void)
{
	unsigned at = 0;

	npages = option_number("spare", 0) * (MIB / PAGE_BYTES);
	scan_pacer.per_second = option_number("scan", 32) * 1000000 / PAGE_BYTES;
	churn_pacer.per_second = option_number("churn", 0);
	if (!npages)
		return;
	base = (uint64_t)ram_alloc(npages * PAGE_BYTES, 512 * PAGE_BYTES);
	state = ram_alloc(npages, PAGE_BYTES);
	generation = ram_alloc(npages * sizeof(*generation), PAGE_BYTES);
	pfns = ram_alloc(PFNS_PER_REQUEST * sizeof(*pfns), PAGE_BYTES);
	in_state[UNWRITTEN] = npages;
	has_device = virtio_next(&device, &at, TYPE_BALLOON, F_DEFLATE_ON_OOM | F_REPORTING, "balloon") &&
		     virtio_queue_init(&device, &inflate, QUEUE_INFLATE, QUEUE_SIZE) &&
		     virtio_queue_init(&device, &deflate, QUEUE_DEFLATE, QUEUE_SIZE) &&
		     (!(device.features & F_REPORTING) ||
		      virtio_queue_init(&device, &reporting,
					option_is("reporting", "old") ? QUEUE_REPORTING_OLD : QUEUE_REPORTING,
					QUEUE_SIZE));
	if (has_device)
		virtio_go(&device);
	con_printf("spare pages=%lu balloon=%u features=0x%lx\n", npages, has_device, device.features);
}

/* ---- contents ---- */

static void write_one(uint64_t i)
{
	work_done++;
	mem_write_page(page_of(i), NUMBER_BASE + i, ++generation[i]);
	set_state(i, HELD);
	stats.written++;
}

static bool check_one(uint64_t i)
{
	stats.checked++;
	return mem_check_page(page_of(i), NUMBER_BASE + i, generation[i]);
}

/* What is not held and could be is written anew. */
static void fill_step(void)
{
	for (unsigned look = 0, filled = 0; look < LOOK_PER_STEP && filled < FILL_PER_STEP; look++) {
		uint64_t i = fill_at;

		fill_at = (fill_at + 1) % npages;
		if (state[i] != UNWRITTEN && (state[i] != GIVEN || report_all))
			continue;
		write_one(i);
		filled++;
	}
}

static void scan_step(void)
{
	if (!pacer_take(&scan_pacer))
		return;
	for (unsigned look = 0; look < LOOK_PER_STEP; look++) {
		uint64_t i = scan_at;

		scan_at = (scan_at + 1) % npages;
		if (state[i] != HELD)
			continue;
		if (!check_one(i))
			write_one(i);
		return;
	}
}

/* ---- the balloon ---- */

static void resize_done(void)
{
	for (uint64_t i = 0; i < moving; i++)
		set_state(inflating ? ballooned + i : ballooned - 1 - i, inflating ? IN_BALLOON : GIVEN);
	ballooned = inflating ? ballooned + moving : ballooned - moving;
	moving = 0;
	virtio_config_write32(&device, CONFIG_ACTUAL, (uint32_t)ballooned);
}

static void resize_step(void)
{
	struct virtio_queue *q;
	uint32_t head, written;

	if (moving) {
		if (virtio_poll(inflating ? &inflate : &deflate, &head, &written))
			resize_done();
		return;
	}
	inflating = ballooned < target;
	while (moving < PFNS_PER_REQUEST &&
	       (inflating ? ballooned + moving < target : ballooned - moving > target)) {
		uint64_t i = inflating ? ballooned + moving : ballooned - 1 - moving;

		if (inflating && state[i] != HELD && state[i] != GIVEN)
			break;
		if (inflating)
			set_state(i, LEAVING);
		pfns[moving++] = (uint32_t)((uint64_t)page_of(i) / PAGE_BYTES);
	}
	if (!moving)
		return;
	q = inflating ? &inflate : &deflate;
	virtio_describe(q, 0, pfns, (uint32_t)(moving * sizeof(*pfns)), 0);
	virtio_submit(q, 0);
}

/* ---- reporting ---- */

static struct {
	uint64_t first, n;
} segments[SEGMENTS_MAX];
static unsigned nsegments;

static void report_done(void)
{
	for (unsigned s = 0; s < nsegments; s++)
		for (uint64_t i = 0; i < segments[s].n; i++)
			set_state(segments[s].first + i, GIVEN);
	nsegments = 0;
	report_under_way = false;
}

static void report_submit(void)
{
	for (unsigned s = 0; s < nsegments; s++)
		virtio_describe(&reporting, s, page_of(segments[s].first),
				(uint32_t)(segments[s].n * PAGE_BYTES),
				VIRTIO_DESC_WRITE | (s + 1 < nsegments ? VIRTIO_DESC_NEXT : 0));
	report_under_way = true;
	virtio_submit(&reporting, 0);
}

/* Pages held from `first` on, at most `most`, become a segment. */
static uint64_t add_segment(uint64_t first, uint64_t most)
{
	uint64_t n = 0;

	while (n < most && first + n < npages && state[first + n] == HELD)
		set_state(first + n++, LEAVING);
	if (n) {
		segments[nsegments].first = first;
		segments[nsegments++].n = n;
	}
	return n;
}

static void report_step(void)
{
	uint32_t head, written;

	if (report_under_way) {
		if (virtio_poll(&reporting, &head, &written))
			report_done();
		return;
	}
	if (report_all) {
		for (unsigned look = 0; look < LOOK_PER_STEP && nsegments < SEGMENTS_MAX; look++) {
			uint64_t n = add_segment(report_at, PAGES_PER_SEGMENT);

			report_at = (report_at + (n ? n : 1)) % npages;
		}
	} else if (churning && npages > CHURN_PAGES && pacer_take(&churn_pacer)) {
		add_segment(guest_random() % (npages - CHURN_PAGES), CHURN_PAGES);
	}
	if (nsegments)
		report_submit();
}

void spare_command(int c)
{
	if (c == 'r')
		report_all = true;
	if (c == 'u')
		report_all = false;
	if (c == 'c')
		churning = true;
}

void spare_step(void)
{
	if (!npages)
		return;
	fill_step();
	if (in_state[UNWRITTEN])
		return;
	scan_step();
	if (!has_device)
		return;
	if (active_ticks - last_poll > CONFIG_POLL_MS * tsc_khz) {
		last_poll = active_ticks;
		target = virtio_config_read32(&device, CONFIG_TARGET);
		if (target > npages)
			target = npages;
	}
	resize_step();
	if (device.features & F_REPORTING)
		report_step();
}

bool spare_touched(void)
{
	return !in_state[UNWRITTEN];
}

bool spare_verify_step(void)
{
	for (unsigned n = 0; n < LOOK_PER_STEP / 8 && verify_at < npages; verify_at++)
		if (state[verify_at] == HELD) {
			check_one(verify_at);
			n++;
		}
	return verify_at == npages;
}

void spare_print(void)
{
	if (npages)
		con_printf("spare held=%lu given=%lu leaving=%lu balloon=%lu target=%lu checked=%lu "
			   "written=%lu\n",
			   in_state[HELD], in_state[GIVEN], in_state[LEAVING], ballooned, target,
			   stats.checked, stats.written);
}
