/* SPDX-License-Identifier: Apache-2.0 */
#include "memxfer/codec.h"

#include <errno.h>
#include <xxhash.h>

#include "base/bytes.h"
#include "base/cleanup.h"

#define MEM_MAGIC UINT32_C(0x534e4d4d) /* "SNMM" */

static const char *const frame_names[] = {
	[MEM_FRAME_PAGES] = "pages",   [MEM_FRAME_BEAT] = "beat",	[MEM_FRAME_BARRIER] = "barrier",
	[MEM_FRAME_END] = "end",       [MEM_FRAME_ACK] = "ack",		[MEM_FRAME_ERROR] = "error",
	[MEM_FRAME_OPEN] = "open",     [MEM_FRAME_MISSING] = "missing", [MEM_FRAME_WANT] = "want",
	[MEM_FRAME_STATUS] = "status", [MEM_FRAME_DELTA] = "delta",
};

const char *mem_frame_name(unsigned type)
{
	return type < ARRAY_SIZE(frame_names) && frame_names[type] ? frame_names[type] : "unknown";
}

void mem_header_encode(uint8_t raw[MEM_HEADER_BYTES], const struct mem_header *h)
{
	put_be32(raw, MEM_MAGIC);
	put_be16(raw + 4, MEM_WIRE_VERSION);
	put_be16(raw + 6, h->type);
	put_be16(raw + 8, h->stream);
	put_be16(raw + 10, h->flags);
	put_be32(raw + 12, h->nruns);
	put_be64(raw + 16, h->epoch);
	put_be64(raw + 24, h->sequence);
	put_be32(raw + 32, h->round);
	put_be32(raw + 36, h->raw_len);
	put_be32(raw + 40, h->wire_len);
	put_be32(raw + 44, 0);
	put_be64(raw + 48, h->body_sum);
	put_be64(raw + 56, XXH3_64bits(raw, 56));
}

/* Lengths that a frame of its type may have; pages are bounded here and checked against the runs later. */
static bool lengths_fit(const struct mem_header *h)
{
	switch (h->type) {
	case MEM_FRAME_PAGES:
		if (!h->nruns || h->nruns > MEM_FRAME_RUNS_MAX || h->raw_len > MEM_PAYLOAD_MAX ||
		    h->raw_len % MEM_PAGE_BYTES)
			return false;
		if (h->flags & MEM_FLAG_ZSTD)
			return h->wire_len && h->wire_len < h->raw_len;
		return h->wire_len == h->raw_len;
	case MEM_FRAME_DELTA:
		return h->nruns && h->nruns <= MEM_FRAME_RUNS_MAX && h->raw_len &&
		       h->raw_len <= MEM_PAYLOAD_MAX && h->wire_len == h->raw_len;
	case MEM_FRAME_END:
		return !h->nruns && h->raw_len == MEM_TOTALS_BYTES && h->wire_len == h->raw_len;
	case MEM_FRAME_MISSING:
	case MEM_FRAME_WANT:
		return h->nruns && h->nruns <= MEM_FRAME_RUNS_MAX && !h->raw_len && !h->wire_len;
	case MEM_FRAME_STATUS:
		return !h->nruns && h->raw_len == MEM_STATUS_BYTES && h->wire_len == h->raw_len;
	case MEM_FRAME_ERROR:
		return !h->nruns && h->raw_len <= MEM_SENTENCE_MAX && h->wire_len == h->raw_len;
	default:
		return !h->nruns && !h->raw_len && !h->wire_len;
	}
}

int mem_header_decode(const uint8_t raw[MEM_HEADER_BYTES], struct mem_header *out, struct error *err)
{
	struct mem_header h = {
		.type = get_be16(raw + 6),
		.stream = get_be16(raw + 8),
		.flags = get_be16(raw + 10),
		.nruns = get_be32(raw + 12),
		.epoch = get_be64(raw + 16),
		.sequence = get_be64(raw + 24),
		.round = get_be32(raw + 32),
		.raw_len = get_be32(raw + 36),
		.wire_len = get_be32(raw + 40),
		.body_sum = get_be64(raw + 48),
	};
	uint16_t allowed = h.type == MEM_FRAME_PAGES   ? MEM_FLAG_ZSTD | MEM_FLAG_FINAL
			   : h.type == MEM_FRAME_DELTA ? MEM_FLAG_FINAL
						       : 0;

	if (get_be64(raw + 56) != XXH3_64bits(raw, 56))
		return error_set(err, EBADMSG, "memory frame: header checksum does not match");
	if (get_be32(raw) != MEM_MAGIC)
		return error_set(err, EPROTO, "memory frame: magic is %08x, not SNMM", get_be32(raw));
	if (get_be16(raw + 4) != MEM_WIRE_VERSION)
		return error_set(err, EPROTO, "memory frame: format version %u, this side knows %u",
				 get_be16(raw + 4), MEM_WIRE_VERSION);
	if (h.type >= ARRAY_SIZE(frame_names) || !frame_names[h.type])
		return error_set(err, EPROTO, "memory frame: unknown type %u", h.type);
	if ((h.flags & ~allowed) || get_be32(raw + 44))
		return error_set(err, EPROTO, "memory frame %s: unknown flags %04x", frame_names[h.type],
				 h.flags);
	if (!lengths_fit(&h))
		return error_set(err, EPROTO, "memory frame %s: lengths %u runs, %u raw, %u wire do not fit",
				 frame_names[h.type], h.nruns, h.raw_len, h.wire_len);
	*out = h;
	return 0;
}

void mem_run_encode(uint8_t raw[MEM_RUN_BYTES], const struct mem_run *run)
{
	put_be64(raw, run->first);
	put_be32(raw + 8, run->npages);
	put_be16(raw + 12, run->kind);
	put_be16(raw + 14, 0);
}

void mem_run_decode(const uint8_t raw[MEM_RUN_BYTES], struct mem_run *out)
{
	*out = (struct mem_run){
		.first = get_be64(raw), .npages = get_be32(raw + 8), .kind = get_be16(raw + 12)};
}

/* What is named only is to come later. */
static bool kind_fits(const struct mem_header *h, unsigned kind)
{
	if (h->type != MEM_FRAME_PAGES)
		return kind == (h->type == MEM_FRAME_DELTA ? MEM_RUN_DELTA : MEM_RUN_LATER);
	return kind >= MEM_RUN_HOLE && kind <= MEM_RUN_LATER;
}

int mem_runs_decode(const struct mem_header *h, const uint8_t *table, uint64_t npages, unsigned nstreams,
		    struct mem_run *out, struct error *err)
{
	uint64_t data_pages = 0;
	bool named = h->type == MEM_FRAME_MISSING || h->type == MEM_FRAME_WANT;

	if ((h->type != MEM_FRAME_PAGES && h->type != MEM_FRAME_DELTA && !named) ||
	    h->nruns > MEM_FRAME_RUNS_MAX)
		return error_set(err, EPROTO, "memory frame %s carries no pages", mem_frame_name(h->type));
	for (uint32_t i = 0; i < h->nruns; i++) {
		const uint8_t *raw = table + (size_t)i * MEM_RUN_BYTES;
		struct mem_run *run = &out[i];
		uint64_t region;

		mem_run_decode(raw, run);
		if (!kind_fits(h, run->kind) || get_be16(raw + 14))
			return error_set(err, EPROTO, "memory frame: run %u is of unknown kind %u", i,
					 run->kind);
		if (!run->npages || !range_fits(run->first, run->npages, npages))
			return error_set(err, EPROTO,
					 "memory frame: run %u of %u pages at page %llu is outside of the "
					 "guest's %llu pages",
					 i, run->npages, (unsigned long long)run->first,
					 (unsigned long long)npages);
		region = run->first / MEM_REGION_PAGES;
		if ((run->first + run->npages - 1) / MEM_REGION_PAGES != region)
			return error_set(err, EPROTO, "memory frame: run %u crosses a region's end", i);
		if (!named && !(h->flags & MEM_FLAG_FINAL) && region % nstreams != h->stream)
			return error_set(err, EPROTO,
					 "memory frame: region %llu belongs to stream %llu, not to %u",
					 (unsigned long long)region, (unsigned long long)(region % nstreams),
					 h->stream);
		if (run->kind == MEM_RUN_DATA)
			data_pages += run->npages;
	}
	if (h->type != MEM_FRAME_DELTA && data_pages * MEM_PAGE_BYTES != h->raw_len)
		return error_set(err, EPROTO, "memory frame: %llu data pages but %u bytes",
				 (unsigned long long)data_pages, h->raw_len);
	return 0;
}

uint64_t mem_body_sum(const void *a, size_t a_len, const void *b, size_t b_len)
{
	/* The first piece's sum seeds the second's: one shot each, no streaming state to carry about. */
	uint64_t sum = XXH3_64bits(a, a_len);

	return b_len ? XXH3_64bits_withSeed(b, b_len, sum) : sum;
}

void mem_totals_encode(uint8_t raw[MEM_TOTALS_BYTES], const struct mem_totals *t)
{
	put_be64(raw, t->data_pages);
	put_be64(raw + 8, t->zero_pages);
	put_be64(raw + 16, t->hole_pages);
	put_be64(raw + 24, t->frames);
}

void mem_totals_decode(const uint8_t raw[MEM_TOTALS_BYTES], struct mem_totals *t)
{
	*t = (struct mem_totals){.data_pages = get_be64(raw),
				 .zero_pages = get_be64(raw + 8),
				 .hole_pages = get_be64(raw + 16),
				 .frames = get_be64(raw + 24)};
}

void mem_status_encode(uint8_t raw[MEM_STATUS_BYTES], const struct mem_postcopy_status *s)
{
	put_be64(raw, s->missing_pages);
	put_be64(raw + 8, s->faults);
	put_be64(raw + 16, s->fault_median_us);
	put_be64(raw + 24, s->fault_worst_us);
	put_be64(raw + 32, s->duplicate_pages);
}

void mem_status_decode(const uint8_t raw[MEM_STATUS_BYTES], struct mem_postcopy_status *s)
{
	*s = (struct mem_postcopy_status){.missing_pages = get_be64(raw),
					  .faults = get_be64(raw + 8),
					  .fault_median_us = get_be64(raw + 16),
					  .fault_worst_us = get_be64(raw + 24),
					  .duplicate_pages = get_be64(raw + 32)};
}
