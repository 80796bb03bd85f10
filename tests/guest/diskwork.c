/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Disk load. The guest knows, for every sector, what it must read: nothing yet, zeroes, or the data of one
 * generation. No two requests in flight overlap. The first sectors hold numbered records, each flushed before
 * it counts as acked.
 */
#include "guest.h"
#include "selfdesc.h"
#include "virtio_blk.h"

#define DISKS_MAX	    4u
#define REQUEST_SECTORS_MAX 64u
#define BUFFER_BYTES	    (REQUEST_SECTORS_MAX * VBLK_SECTOR_BYTES)
#define ALIGN_SECTORS	    8u /* what most requests are aligned to; discards always */
#define RECENT		    1024u
#define HELD		    32u
#define HOLD_MS		    1500u
#define SPAN_MAX_MIB	    8192u
#define PICK_TRIES	    8u

/* A sector's state: what it holds in the low bits, the generation above. */
enum { UNKNOWN = 0, ZERO = 1, DATA = 2, KIND_MASK = 3, GENERATION_SHIFT = 2 };

enum op { READ, WRITE, RECORD, FLUSH, ZEROES, DISCARD };
static const char *const op_names[] = {"read", "write", "record", "flush", "zeroes", "discard"};

struct request {
	bool busy, late;
	enum op op;
	uint32_t sector, n, generation;
	uint64_t since; /* active_ticks */
	uint64_t *buffer;
};

/* A buffer that the device has written, kept a while and checked again: its pages too must survive a
 * migration. */
struct held {
	uint64_t *buffer;
	uint64_t since;
	uint32_t sector, n;
	uint32_t states[REQUEST_SECTORS_MAX];
};

static struct disk {
	struct vblk v;
	uint64_t seed;
	uint32_t span, unit, max_n; /* sectors */
	uint32_t *states;
	struct request requests[VBLK_SLOTS_MAX];
	unsigned depth, in_flight;
	struct held held[HELD];
	unsigned held_at;
	struct {
		uint32_t sector, n;
	} recent[RECENT];
	unsigned nrecent;
	uint64_t generation;
	enum { RECORD_IDLE, RECORD_WRITING, RECORD_FLUSH, RECORD_FLUSHING } record_state;
	uint64_t record, acked, record_since;
	uint32_t records_read; /* sectors of an earlier boot's records looked at */
	struct pacer pacer;
	uint32_t verify_at;
	bool flushed_last;
} disks[DISKS_MAX];
static unsigned ndisks;
static bool read_only, discard_zeroes, discard_off;
static uint64_t record_ticks, timeout_ticks, slow_ticks;
static uint32_t align_least;

struct disk_stats disk_stats;

unsigned disk_count(void)
{
	return ndisks;
}

uint64_t disk_acked(unsigned disk)
{
	return disks[disk].acked;
}

unsigned disk_in_flight(void)
{
	unsigned n = 0;

	for (unsigned i = 0; i < ndisks; i++)
		n += disks[i].in_flight;
	return n;
}

static uint32_t min32(uint64_t a, uint64_t b)
{
	return (uint32_t)(a < b ? a : b);
}

static void disk_set_up(struct disk *d, uint64_t span_mib, bool fresh)
{
	const struct vblk *v = &d->v;

	d->seed = guest_seed + (uint64_t)(d - disks);
	d->unit = v->block_sectors > align_least ? v->block_sectors : align_least;
	d->span = min32(v->sectors, span_mib * (MIB / VBLK_SECTOR_BYTES)) / ALIGN_SECTORS * ALIGN_SECTORS;
	d->max_n = min32(v->max_request_sectors, REQUEST_SECTORS_MAX) / d->unit * d->unit;
	d->depth = min32(option_number("depth", 8), v->nslots);
	d->pacer.per_second = option_number("diskrate", 0);
	/* An earlier boot may have left sectors: no generation of ours may be mistaken for one of theirs. */
	d->generation = fresh ? 0 : selfdesc_mix(rdtsc()) >> 35;
	d->records_read = fresh ? SELFDESC_RECORD_SECTORS : 0;
	d->record_since = 0;
	d->states = ram_alloc((uint64_t)d->span * sizeof(*d->states) + 1, PAGE_BYTES);
	if (fresh)
		for (uint32_t i = 0; i < d->span; i++)
			d->states[i] = ZERO;
	for (unsigned i = 0; i < d->depth; i++)
		d->requests[i].buffer = ram_alloc(BUFFER_BYTES, PAGE_BYTES);
	for (unsigned i = 0; i < HELD; i++)
		d->held[i].buffer = ram_alloc(BUFFER_BYTES, PAGE_BYTES);
}

void disk_init(void)
{
	unsigned device = 0;
	uint64_t span_mib = option_number("span", 1024);
	bool fresh = option_is("fresh", "1");

	read_only = option_is("disk", "ro");
	discard_off = option_is("discard", "off");
	discard_zeroes = !option_is("discard", "any");
	record_ticks = option_number("record", 20) * tsc_khz;
	timeout_ticks = option_number("timeout", 30000) * tsc_khz;
	slow_ticks = option_number("slow", 100) * tsc_khz;
	align_least = option_number("align", 512) / VBLK_SECTOR_BYTES;
	if (align_least < 1 || align_least > ALIGN_SECTORS)
		align_least = 1;
	(void)option_is("disk", "rw");
	if (option_is("disk", "off"))
		return;
	if (span_mib > SPAN_MAX_MIB)
		span_mib = SPAN_MAX_MIB;
	while (ndisks < DISKS_MAX && vblk_next(&disks[ndisks].v, &device)) {
		struct disk *d = &disks[ndisks];

		if (d->v.block_sectors > ALIGN_SECTORS) {
			con_printf("BAD disk device=%u has blocks of %u sectors\n", d->v.slot_on_bus,
				   d->v.block_sectors);
			continue;
		}
		disk_set_up(d, span_mib, fresh);
		con_printf("disk %u device=%u sectors=%lu span=%u block=%u features=0x%lx queue=%u depth=%u "
			   "discard_align=%u\n",
			   ndisks, d->v.slot_on_bus, d->v.sectors, d->span, d->v.block_sectors, d->v.features,
			   d->v.queue.size, d->depth, d->v.discard_align_sectors);
		if (d->span < 4 * SELFDESC_RECORD_SECTORS || !d->depth || !d->max_n) {
			con_printf("BAD disk %u is too small to use\n", ndisks);
			continue;
		}
		ndisks++;
	}
	if (!ndisks)
		con_printf("note no virtio-blk disk found\n");
}

static bool overlaps_in_flight(const struct disk *d, uint32_t sector, uint32_t n)
{
	for (unsigned i = 0; i < d->depth; i++) {
		const struct request *r = &d->requests[i];

		if (r->busy && r->op != FLUSH && sector < r->sector + r->n && r->sector < sector + n)
			return true;
	}
	return false;
}

static struct request *free_request(struct disk *d)
{
	for (unsigned i = 0; i < d->depth; i++)
		if (!d->requests[i].busy)
			return &d->requests[i];
	return NULL;
}

static void submit(struct disk *d, struct request *r, enum op op, uint32_t sector, uint32_t n)
{
	static const enum vblk_type types[] = {VBLK_READ,  VBLK_WRITE,	      VBLK_WRITE,
					       VBLK_FLUSH, VBLK_WRITE_ZEROES, VBLK_DISCARD};
	uint32_t split = 0, flags = 0;

	r->busy = true;
	r->late = false;
	r->op = op;
	r->sector = sector;
	r->n = n;
	r->since = active_ticks;
	if (op == WRITE || op == RECORD) {
		r->generation = (uint32_t)(op == RECORD ? d->record : ++d->generation);
		for (uint32_t i = 0; i < n; i++)
			selfdesc_fill(r->buffer + (uint64_t)i * SELFDESC_SECTOR_WORDS, SELFDESC_SECTOR_WORDS,
				      SELFDESC_SECTOR_MAGIC, d->seed, sector + i, r->generation);
	}
	if (op == READ || op == WRITE) {
		split = (uint32_t)(guest_random() % n);
		if (guest_random() & 1)
			split = 0;
	}
	if (op == ZEROES && (guest_random() & 1))
		flags = VBLK_ZEROES_UNMAP;
	d->in_flight++;
	vblk_submit(&d->v, (unsigned)(r - d->requests), types[op], sector, n, r->buffer, split, flags);
}

static const char *diagnose(const struct disk *d, const uint64_t *words, uint32_t sector, uint32_t generation)
{
	if (!selfdesc_nonzero(words, SELFDESC_SECTOR_WORDS))
		return "zero";
	if (words[SELFDESC_MAGIC] != SELFDESC_SECTOR_MAGIC)
		return "corrupt";
	if (selfdesc_inconsistent(words, SELFDESC_SECTOR_WORDS))
		return "torn";
	if (words[SELFDESC_SEED] != d->seed)
		return "foreign";
	if (words[SELFDESC_NUMBER] != sector)
		return "swapped";
	return words[SELFDESC_GENERATION] < generation ? "stale" : "future";
}

/* Checks a sector that was read; one that nothing was known of is known from now on. */
static void check_sector(struct disk *d, const uint64_t *words, uint32_t sector, uint32_t *state,
			 const char *where)
{
	uint32_t kind = *state & KIND_MASK, generation = *state >> GENERATION_SHIFT;

	disk_stats.sectors++;
	if (kind == UNKNOWN) {
		if (!selfdesc_nonzero(words, SELFDESC_SECTOR_WORDS))
			*state = ZERO;
		else if (!selfdesc_differs(words, SELFDESC_SECTOR_WORDS, SELFDESC_SECTOR_MAGIC, d->seed,
					   sector, words[SELFDESC_GENERATION]))
			*state = (uint32_t)(words[SELFDESC_GENERATION] << GENERATION_SHIFT) | DATA;
		return;
	}
	if (kind == ZERO ? !selfdesc_nonzero(words, SELFDESC_SECTOR_WORDS)
			 : !selfdesc_differs(words, SELFDESC_SECTOR_WORDS, SELFDESC_SECTOR_MAGIC, d->seed,
					     sector, generation))
		return;
	if (report_bad(BAD_SECTOR))
		con_printf("BAD sector disk=%u lba=%u where=%s kind=%s expected=%s expected_generation=%u "
			   "found_magic=0x%lx "
			   "found_seed=%lu found_lba=%lu found_generation=%lu\n",
			   (unsigned)(d - disks), sector, where, diagnose(d, words, sector, generation),
			   kind == ZERO ? "zero" : "data", generation, words[SELFDESC_MAGIC],
			   words[SELFDESC_SEED], words[SELFDESC_NUMBER], words[SELFDESC_GENERATION]);
	*state = UNKNOWN;
}

static void check_held(struct disk *d, struct held *h)
{
	for (uint32_t i = 0; i < h->n; i++)
		if (h->states[i] & KIND_MASK)
			check_sector(d, h->buffer + (uint64_t)i * SELFDESC_SECTOR_WORDS, h->sector + i,
				     &h->states[i], "held");
	disk_stats.rechecked += h->n;
	h->n = 0;
}

static void hold(struct disk *d, struct request *r)
{
	struct held *h = &d->held[d->held_at];
	uint64_t *buffer = h->buffer;

	if (h->n && active_ticks - h->since < HOLD_MS * tsc_khz)
		return;
	check_held(d, h);
	h->buffer = r->buffer;
	r->buffer = buffer;
	h->sector = r->sector;
	h->n = r->n;
	h->since = active_ticks;
	for (uint32_t i = 0; i < r->n; i++)
		h->states[i] = d->states[r->sector + i];
	d->held_at = (d->held_at + 1) % HELD;
}

static void set_states(struct disk *d, const struct request *r, uint32_t state)
{
	for (uint32_t i = 0; i < r->n; i++)
		d->states[r->sector + i] = state;
}

static void remember(struct disk *d, const struct request *r)
{
	unsigned at = d->nrecent++ % RECENT;

	d->recent[at].sector = r->sector;
	d->recent[at].n = min32(r->n, d->max_n);
}

static void complete(struct disk *d, struct request *r, uint8_t status, uint32_t written)
{
	uint32_t expected_bytes = 1 + (r->op == READ ? r->n * VBLK_SECTOR_BYTES : 0);
	bool failed = status != 0;
	uint64_t took = active_ticks - r->since;

	r->busy = false;
	d->in_flight--;
	if (r->op != READ && r->op != FLUSH) {
		disk_stats.slow_writes += took > slow_ticks;
		if (took > disk_stats.max_write)
			disk_stats.max_write = took;
	}
	if (r->op == READ && r->sector < SELFDESC_RECORD_SECTORS && d->records_read < SELFDESC_RECORD_SECTORS)
		d->records_read = r->sector + r->n;
	if ((failed || written != expected_bytes) && report_bad(BAD_REQUEST))
		con_printf("BAD request disk=%u op=%s lba=%u n=%u status=%u written=%u expected_written=%u\n",
			   (unsigned)(d - disks), op_names[r->op], r->sector, r->n, status, written,
			   expected_bytes);
	if (r->late)
		con_printf("late request disk=%u op=%s lba=%u n=%u done after ms=%lu\n",
			   (unsigned)(d - disks), op_names[r->op], r->sector, r->n,
			   (active_ticks - r->since) / tsc_khz);
	switch (r->op) {
	case READ:
		disk_stats.reads++;
		if (failed)
			break;
		for (uint32_t i = 0; i < r->n; i++)
			check_sector(d, r->buffer + (uint64_t)i * SELFDESC_SECTOR_WORDS, r->sector + i,
				     &d->states[r->sector + i], "read");
		hold(d, r);
		break;
	case WRITE:
	case RECORD:
		disk_stats.writes++;
		set_states(d, r, failed ? UNKNOWN : r->generation << GENERATION_SHIFT | DATA);
		if (r->op == WRITE)
			remember(d, r);
		else if (failed)
			d->record_state = RECORD_IDLE;
		else
			d->record_state = RECORD_FLUSH;
		break;
	case ZEROES:
		disk_stats.zeroes++;
		set_states(d, r, failed ? UNKNOWN : ZERO);
		remember(d, r);
		break;
	case DISCARD:
		disk_stats.discards++;
		set_states(d, r, failed || !discard_zeroes ? UNKNOWN : ZERO);
		remember(d, r);
		break;
	case FLUSH:
		disk_stats.flushes++;
		if (d->record_state == RECORD_FLUSHING) {
			if (!failed)
				d->acked = d->record;
			d->record_state = RECORD_IDLE;
		}
		break;
	}
}

static void reap(struct disk *d)
{
	uint8_t status;
	uint32_t written;
	int slot = vblk_poll(&d->v, &status, &written);

	if (slot >= 0) {
		if ((unsigned)slot < d->depth && d->requests[slot].busy)
			complete(d, &d->requests[slot], status, written);
		else if (report_bad(BAD_REQUEST))
			con_printf("BAD request disk=%u completed twice slot=%u\n", (unsigned)(d - disks),
				   (unsigned)slot);
	}
	for (unsigned i = 0; i < d->depth; i++) {
		struct request *r = &d->requests[i];

		if (r->busy && !r->late && active_ticks - r->since > timeout_ticks) {
			r->late = true;
			if (report_bad(BAD_REQUEST))
				con_printf("BAD request disk=%u op=%s lba=%u n=%u stuck_ms=%lu\n",
					   (unsigned)(d - disks), op_names[r->op], r->sector, r->n,
					   (active_ticks - r->since) / tsc_khz);
		}
	}
}

/* One record at a time: written, then flushed, then acked. True if a request was submitted. */
static bool record_step(struct disk *d)
{
	bool can_flush = d->v.features & VBLK_F_FLUSH;
	struct request *r;

	if (d->record_state == RECORD_FLUSH && !can_flush) { /* a write-through device */
		d->acked = d->record;
		d->record_state = RECORD_IDLE;
	}
	if (d->record_state == RECORD_FLUSH) {
		r = free_request(d);
		if (!r)
			return false;
		d->record_state = RECORD_FLUSHING;
		submit(d, r, FLUSH, 0, 0);
		return true;
	}
	if (d->record_state != RECORD_IDLE || !record_ticks || active_ticks - d->record_since < record_ticks)
		return false;
	{
		uint32_t sector = (uint32_t)(d->record + 1) * d->unit % SELFDESC_RECORD_SECTORS;

		r = free_request(d);
		if (!r || overlaps_in_flight(d, sector, d->unit))
			return false;
		d->record++;
		d->record_since = active_ticks;
		d->record_state = RECORD_WRITING;
		submit(d, r, RECORD, sector, d->unit);
		return true;
	}
}

/* Somewhere outside the records, half of the time in a hot sixteenth of the disk; false if something is in
 * flight there. */
static bool pick(struct disk *d, uint32_t max_n, uint32_t align, uint32_t *sector, uint32_t *n)
{
	uint32_t area = d->span - SELFDESC_RECORD_SECTORS, slots;

	if (guest_random() & 1)
		area = area / 16 > max_n ? area / 16 : area;
	for (unsigned i = 0; i < PICK_TRIES; i++) {
		*n = (uint32_t)(guest_random() % (max_n / align) + 1) * align;
		if (*n > area)
			continue;
		slots = (area - *n) / align + 1;
		*sector = SELFDESC_RECORD_SECTORS + (uint32_t)(guest_random() % slots) * align;
		if (!overlaps_in_flight(d, *sector, *n))
			return true;
	}
	return false;
}

static bool pick_recent(struct disk *d, uint32_t *sector, uint32_t *n)
{
	unsigned have = d->nrecent < RECENT ? d->nrecent : RECENT, at;

	if (!have)
		return false;
	at = (unsigned)(guest_random() % have);
	*sector = d->recent[at].sector;
	*n = d->recent[at].n;
	return !overlaps_in_flight(d, *sector, *n);
}

static uint32_t align_of(const struct disk *d)
{
	return guest_random() % 4 && d->max_n >= ALIGN_SECTORS ? ALIGN_SECTORS : d->unit;
}

/* Records go on counting where an earlier boot on this disk left off. */
static void read_records_step(struct disk *d)
{
	for (uint32_t i = 0; i < d->records_read; i++)
		if ((d->states[i] & KIND_MASK) == DATA && d->states[i] >> GENERATION_SHIFT > d->record)
			d->record = d->states[i] >> GENERATION_SHIFT;
	if (d->records_read < SELFDESC_RECORD_SECTORS && !d->in_flight)
		submit(d, &d->requests[0], READ, d->records_read,
		       min32(d->max_n, SELFDESC_RECORD_SECTORS - d->records_read));
}

static void load_step(struct disk *d)
{
	uint64_t dice = guest_random() % 100;
	bool ro = read_only || (d->v.features & VBLK_F_RO);
	uint32_t sector, n, most;
	struct request *r;

	if (d->records_read < SELFDESC_RECORD_SECTORS || !d->record) {
		read_records_step(d);
		if (d->records_read < SELFDESC_RECORD_SECTORS)
			return;
	}
	if (!ro && record_step(d))
		return;
	r = free_request(d);
	if (!r || (d->pacer.per_second && !pacer_take(&d->pacer)))
		return;
	if (ro || dice < 40) {
		if ((dice < 30 && pick_recent(d, &sector, &n)) || pick(d, d->max_n, align_of(d), &sector, &n))
			submit(d, r, READ, sector, n);
	} else if (dice < 46 && (d->v.features & VBLK_F_WRITE_ZEROES)) {
		most = min32(d->v.max_zeroes_sectors, 4 * REQUEST_SECTORS_MAX) / ALIGN_SECTORS *
		       ALIGN_SECTORS;
		if (most && pick(d, most, align_of(d), &sector, &n))
			submit(d, r, ZEROES, sector, n);
	} else if (dice < 52 && (d->v.features & VBLK_F_DISCARD) && !discard_off) {
		uint32_t align = d->v.discard_align_sectors > ALIGN_SECTORS ? d->v.discard_align_sectors
									    : ALIGN_SECTORS;

		most = min32(d->v.max_discard_sectors,
			     4 * (uint64_t)(align > REQUEST_SECTORS_MAX ? align : REQUEST_SECTORS_MAX));
		/* pick() counts from the end of the records, which is itself a multiple of any usual
		 * alignment only up to 64. */
		if (align <= SELFDESC_RECORD_SECTORS && SELFDESC_RECORD_SECTORS % align == 0 &&
		    most >= align && pick(d, most / align * align, align, &sector, &n))
			submit(d, r, DISCARD, sector, n);
	} else if (pick(d, d->max_n, align_of(d), &sector, &n)) {
		submit(d, r, WRITE, sector, n);
	}
}

void disk_step(void)
{
	for (unsigned i = 0; i < ndisks; i++) {
		reap(&disks[i]);
		load_step(&disks[i]);
	}
}

static bool finish_one(struct disk *d)
{
	struct request *r;

	reap(d);
	if (d->verify_at < d->span) {
		uint32_t n = min32(d->max_n, d->span - d->verify_at);

		r = free_request(d);
		if (r && !overlaps_in_flight(d, d->verify_at, n)) {
			submit(d, r, READ, d->verify_at, n);
			d->verify_at += n;
		}
		return false;
	}
	if (d->in_flight)
		return false;
	if (!d->flushed_last && (d->v.features & VBLK_F_FLUSH)) {
		d->flushed_last = true;
		submit(d, &d->requests[0], FLUSH, 0, 0);
		return false;
	}
	return true;
}

bool disk_finish_step(void)
{
	bool done = true;

	for (unsigned i = 0; i < ndisks; i++)
		done &= finish_one(&disks[i]);
	return done;
}

void disk_report_done(void)
{
	for (unsigned i = 0; i < ndisks; i++) {
		struct disk *d = &disks[i];
		uint64_t digest = 0, data = 0;

		for (unsigned k = 0; k < HELD; k++)
			check_held(d, &d->held[k]);
		for (uint32_t s = 0; s < d->span; s++)
			if ((d->states[s] & KIND_MASK) == DATA) {
				digest += selfdesc_digest(s, d->states[s] >> GENERATION_SHIFT);
				data++;
			}
		con_printf(
			"disk %u final seed=%lu span=%u data_sectors=%lu digest=0x%lx record=%lu acked=%lu\n",
			i, d->seed, d->span, data, digest, d->record, d->acked);
	}
}
