/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MEMXFER_CODEC_H
#define MEMXFER_CODEC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "memxfer/memxfer.h"

/*
 * Wire format of a memory stream, private to memxfer/ (docs/protocol.md describes it). Big-endian. A frame is
 * a header of 64 bytes, then nruns runs of 16 bytes, then the payload:
 *
 *   0 u32 magic "SNMM"   4 u16 version      6 u16 type      8 u16 stream    10 u16 flags
 *  12 u32 nruns         16 u64 epoch       24 u64 sequence 32 u32 round     36 u32 raw length
 *  40 u32 wire length   44 u32 zero        48 u64 XXH3 of runs and payload  56 u64 XXH3 of bytes 0..55
 *
 *   run: 0 u64 first page, 8 u32 pages, 12 u16 kind, 14 u16 zero
 *
 * A run lies within one region. The data pages of a frame, in the order of their runs, are its payload; it is
 * one zstd frame if FLAG_ZSTD is set, and then `raw length` is what it unpacks to. The payload of a DELTA
 * frame is one delta a page (memxfer/delta.h).
 *
 * Post-copy has two channels of its own with the same frames (memxfer/postcopy.h): number 0 for pages that
 * are waited for, number 1 for the rest.
 */
#define MEM_WIRE_VERSION    1
#define MEM_HEADER_BYTES    64u
#define MEM_RUN_BYTES	    16u
#define MEM_FRAME_PAGES_MAX 128u
#define MEM_FRAME_RUNS_MAX  512u
#define MEM_PAYLOAD_MAX	    (MEM_FRAME_PAGES_MAX * MEM_PAGE_BYTES)
#define MEM_TOTALS_BYTES    32u
#define MEM_STATUS_BYTES    40u
#define MEM_SENTENCE_MAX    480u
#define MEM_REGION_PAGES    (MEM_REGION_BYTES / MEM_PAGE_BYTES)
#define MEM_REGIONS(npages) (((npages) + MEM_REGION_PAGES - 1) / MEM_REGION_PAGES)

enum mem_frame_type {
	MEM_FRAME_PAGES = 1,
	MEM_FRAME_BEAT,	   /* answered with a beat of the same sequence number in its payload-free frame */
	MEM_FRAME_BARRIER, /* what follows on this stream comes after all that precedes on every stream */
	MEM_FRAME_END,	   /* payload: struct mem_totals */
	MEM_FRAME_ACK,	   /* receiver: everything up to END is in memory */
	MEM_FRAME_ERROR,   /* payload: a sentence */
	/* of post-copy alone */
	MEM_FRAME_OPEN,	   /* source, first on both channels: `round` is the session's number */
	MEM_FRAME_MISSING, /* destination: runs of pages that it lacks; a STATUS ends the list */
	MEM_FRAME_WANT,	   /* destination: runs of pages that somebody waits for */
	MEM_FRAME_STATUS,  /* destination; payload: struct mem_postcopy_status */
	/* where both sides agreed on it */
	MEM_FRAME_DELTA, /* source: pages as what changed of what it sent last of them on this stream, or
			  * before the barrier */
};

#define MEM_FLAG_ZSTD  0x0001u
#define MEM_FLAG_FINAL 0x0002u /* after the barrier: regions are not bound to streams any more */

/* LATER: what was sent of the page is void; unless it is sent again on this stream, it comes by post-copy. */
enum mem_run_kind { MEM_RUN_HOLE = 1, MEM_RUN_ZERO, MEM_RUN_DATA, MEM_RUN_LATER, MEM_RUN_DELTA };

struct mem_header {
	uint16_t type, stream, flags;
	uint32_t nruns, round, raw_len, wire_len;
	uint64_t epoch, sequence, body_sum;
};

struct mem_run {
	uint64_t first;
	uint32_t npages;
	uint16_t kind;
};

/* What a stream carried, for the receiver to compare. A page that went as a delta is a data page, too. */
struct mem_totals {
	uint64_t data_pages, zero_pages, hole_pages, frames;
};

static inline size_t mem_body_bytes(const struct mem_header *h)
{
	return (size_t)h->nruns * MEM_RUN_BYTES + h->wire_len;
}
#define MEM_BODY_MAX (MEM_FRAME_RUNS_MAX * MEM_RUN_BYTES + MEM_PAYLOAD_MAX)

const char *mem_frame_name(unsigned type);
void mem_header_encode(uint8_t raw[MEM_HEADER_BYTES], const struct mem_header *h);
/* Checks magic, version, checksum, type, flags and every length against its limit. -EPROTO, -EBADMSG for a
 * checksum. */
int mem_header_decode(const uint8_t raw[MEM_HEADER_BYTES], struct mem_header *out, struct error *err);

void mem_run_encode(uint8_t raw[MEM_RUN_BYTES], const struct mem_run *run);
void mem_run_decode(const uint8_t raw[MEM_RUN_BYTES], struct mem_run *out);

/*
 * Checks the whole table of a PAGES, DELTA, MISSING or WANT frame before any of it is acted upon: kinds,
 * ranges within npages and one region, the stream's right to the region unless the frame is final, data pages
 * agreeing with raw_len. Writes at most h->nruns runs to out.
 */
int mem_runs_decode(const struct mem_header *h, const uint8_t *table, uint64_t npages, unsigned nstreams,
		    struct mem_run *out, struct error *err);
/* Body checksum; two pieces so that runs and payload need not lie together. */
uint64_t mem_body_sum(const void *a, size_t a_len, const void *b, size_t b_len);

void mem_totals_encode(uint8_t raw[MEM_TOTALS_BYTES], const struct mem_totals *t);
void mem_totals_decode(const uint8_t raw[MEM_TOTALS_BYTES], struct mem_totals *t);

/* What the destination tells of post-copy. */
struct mem_postcopy_status {
	uint64_t missing_pages, faults, fault_median_us, fault_worst_us, duplicate_pages;
};
void mem_status_encode(uint8_t raw[MEM_STATUS_BYTES], const struct mem_postcopy_status *s);
void mem_status_decode(const uint8_t raw[MEM_STATUS_BYTES], struct mem_postcopy_status *s);

#endif
