/* SPDX-License-Identifier: Apache-2.0 */
/* interface: the saved state of a machine */
#ifndef VMM_STATE_H
#define VMM_STATE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

/*
 * Versioned binary format, little-endian:
 *   file header:    "SNMSTATE", u32 format version, u32 number of sections, u64 total length
 *   each section:   char name[24] (NUL-padded), u32 version, u32 payload length, u64 XXH3-64 of name..length
 * and payload; payload A reader refuses a section version newer than it knows, and a section that nobody
 * asked for; a missing section is an error unless the owner said optional. docs/protocol.md lists the
 * sections.
 */
#define STATE_FORMAT_VERSION 1
#define STATE_NAME_BYTES     24
#define STATE_SECTIONS_MAX   1024

struct state_writer;
struct state_writer *state_writer_create(void);
/* Room for so many bytes more, faulted in: puts that fit into it allocate nothing. -ENOMEM, -E2BIG. */
int state_writer_reserve(struct state_writer *w, size_t len);
void state_writer_free(struct state_writer *w);
void state_section_begin(struct state_writer *w, const char *name, uint32_t version);
void state_section_end(struct state_writer *w);
void state_put_u8(struct state_writer *w, uint8_t v);
void state_put_u16(struct state_writer *w, uint16_t v);
void state_put_u32(struct state_writer *w, uint32_t v);
void state_put_u64(struct state_writer *w, uint64_t v);
void state_put_bytes(struct state_writer *w, const void *p, size_t len);
/* Room for len bytes for the caller to fill before the next put: zeroes; NULL when there is no memory. */
void *state_put_space(struct state_writer *w, size_t len);
/* Appends all sections of another writer, none of which is open in either. */
void state_put_sections(struct state_writer *w, const struct state_writer *from);
/* Ends the file. The buffer belongs to the writer. 0, or -ENOMEM if any put ran out of memory. */
int state_writer_finish(struct state_writer *w, const uint8_t **buf, size_t *len, struct error *err);

struct state_reader;
/* Checks the whole structure and every checksum first. buf must outlive the reader. */
int state_reader_open(const void *buf, size_t len, struct state_reader **out, struct error *err);
/* Enters the section: -ENOENT if absent, -ENOTSUP if its version is above max_version. *version tells. */
int state_reader_section(struct state_reader *r, const char *name, uint32_t max_version, uint32_t *version,
			 struct error *err);
/* Reads in order; past the end they return zeroes and set the sticky error that state_reader_section_end
 * reports. */
uint8_t state_get_u8(struct state_reader *r);
uint16_t state_get_u16(struct state_reader *r);
uint32_t state_get_u32(struct state_reader *r);
uint64_t state_get_u64(struct state_reader *r);
void state_get_bytes(struct state_reader *r, void *p, size_t len);
size_t state_remaining(const struct state_reader *r);
/* -EPROTO naming the section if too little was there or bytes are left over. */
int state_reader_section_end(struct state_reader *r, struct error *err);
/* -EPROTO naming a section that nobody entered. */
int state_reader_finish(struct state_reader *r, struct error *err);
/* The i-th section as it is, for whoever compares two files; false: there are no more. */
struct state_view {
	const char *name; /* all of them as long as the reader and its buffer */
	const uint8_t *payload;
	size_t len;
};
bool state_reader_view(const struct state_reader *r, uint32_t i, struct state_view *out);
void state_reader_free(struct state_reader *r);

#endif
