/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/state.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#define XXH_STATIC_LINKING_ONLY /* XXH3_state_t on the stack */
#include <xxhash.h>

#include "base/bytes.h"
#include "base/cleanup.h"

#define MAGIC		"SNMSTATE"
#define HEADER_BYTES	24u
#define SECTION_BYTES	40u /* name, version, payload length, checksum */
#define CHECKED_BYTES	32u /* of the section header: name..length */
#define STATE_BYTES_MAX (256u << 20)

struct state_writer {
	uint8_t *buf;
	size_t len, cap;
	size_t section; /* offset of the open section's header; 0 = none */
	uint32_t nsections;
	int error;
};

static int make_room(struct state_writer *w, size_t n)
{
	if (n > STATE_BYTES_MAX || w->len > STATE_BYTES_MAX - n)
		return -E2BIG;
	if (w->len + n <= w->cap)
		return 0;
	size_t cap = w->cap ? w->cap : 65536;
	while (cap < w->len + n)
		cap *= 2;
	uint8_t *p = realloc(w->buf, cap);
	if (!p)
		return -ENOMEM;
	w->buf = p;
	w->cap = cap;
	return 0;
}

static uint8_t *grow(struct state_writer *w, size_t n)
{
	if (!w->error)
		w->error = make_room(w, n);
	if (w->error)
		return NULL;
	uint8_t *at = w->buf + w->len;
	w->len += n;
	return at;
}

int state_writer_reserve(struct state_writer *w, size_t len)
{
	int rc = make_room(w, len);
	if (!rc)
		memset(w->buf + w->len, 0, w->cap - w->len);
	return rc;
}

struct state_writer *state_writer_create(void)
{
	struct state_writer *w = calloc(1, sizeof *w);
	if (!w)
		return NULL;
	uint8_t *h = grow(w, HEADER_BYTES);
	if (!h) {
		free(w);
		return NULL;
	}
	memset(h, 0, HEADER_BYTES);
	return w;
}

void state_writer_free(struct state_writer *w)
{
	if (!w)
		return;
	free(w->buf);
	free(w);
}

void state_section_begin(struct state_writer *w, const char *name, uint32_t version)
{
	size_t n = strlen(name);
	if (w->section || n == 0 || n > STATE_NAME_BYTES || w->nsections == STATE_SECTIONS_MAX) {
		if (!w->error)
			w->error = -EINVAL;
		return;
	}
	size_t at = w->len;
	uint8_t *h = grow(w, SECTION_BYTES);
	if (!h)
		return;
	memset(h, 0, SECTION_BYTES);
	memcpy(h, name, n);
	put_le32(h + 24, version);
	w->section = at;
	w->nsections++;
}

static uint64_t section_checksum(const uint8_t *header, const uint8_t *payload, size_t len)
{
	XXH3_state_t s;
	XXH3_64bits_reset(&s);
	XXH3_64bits_update(&s, header, CHECKED_BYTES);
	XXH3_64bits_update(&s, payload, len);
	return XXH3_64bits_digest(&s);
}

void state_section_end(struct state_writer *w)
{
	if (w->error)
		return;
	if (!w->section) {
		w->error = -EINVAL;
		return;
	}
	uint8_t *h = w->buf + w->section;
	size_t len = w->len - w->section - SECTION_BYTES;
	put_le32(h + 28, (uint32_t)len);
	put_le64(h + 32, section_checksum(h, h + SECTION_BYTES, len));
	w->section = 0;
}

void state_put_bytes(struct state_writer *w, const void *p, size_t len)
{
	uint8_t *at = grow(w, len);
	if (at && len)
		memcpy(at, p, len);
}

void *state_put_space(struct state_writer *w, size_t len)
{
	uint8_t *at = grow(w, len);
	return at ? memset(at, 0, len) : NULL;
}

void state_put_sections(struct state_writer *w, const struct state_writer *from)
{
	if (!w->error && (from->error || w->section || from->section ||
			  from->nsections > STATE_SECTIONS_MAX - w->nsections))
		w->error = from->error ? from->error : -EINVAL;
	if (w->error)
		return;
	state_put_bytes(w, from->buf + HEADER_BYTES, from->len - HEADER_BYTES);
	w->nsections += from->nsections;
}

void state_put_u8(struct state_writer *w, uint8_t v)
{
	state_put_bytes(w, &v, 1);
}

#define PUT(bits)                                                                                            \
	void state_put_u##bits(struct state_writer *w, uint##bits##_t v)                                     \
	{                                                                                                    \
		uint8_t b[sizeof v];                                                                         \
		put_le##bits(b, v);                                                                          \
		state_put_bytes(w, b, sizeof b);                                                             \
	}
PUT(16)
PUT(32)
PUT(64)

int state_writer_finish(struct state_writer *w, const uint8_t **buf, size_t *len, struct error *err)
{
	if (!w->error && w->section)
		w->error = -EINVAL;
	if (w->error)
		return error_errno(err, w->error, "machine state: write");
	memcpy(w->buf, MAGIC, 8);
	put_le32(w->buf + 8, STATE_FORMAT_VERSION);
	put_le32(w->buf + 12, w->nsections);
	put_le64(w->buf + 16, w->len);
	*buf = w->buf;
	*len = w->len;
	return 0;
}

struct section {
	char name[STATE_NAME_BYTES + 1];
	uint32_t version;
	const uint8_t *payload;
	size_t len;
	bool entered;
};

struct state_reader {
	struct section *sections;
	uint32_t nsections;
	struct section *open;
	size_t at;
	bool short_read;
};

static bool name_ok(const uint8_t *p)
{
	bool ended = false;
	for (unsigned i = 0; i < STATE_NAME_BYTES; i++) {
		if (!p[i])
			ended = true;
		else if (ended || p[i] < 0x21 || p[i] > 0x7e)
			return false;
	}
	return p[0] != 0;
}

int state_reader_open(const void *buf, size_t len, struct state_reader **out, struct error *err)
{
	const uint8_t *p = buf;
	if (len < HEADER_BYTES || memcmp(p, MAGIC, 8))
		return error_set(err, EPROTO, "machine state: not a saved state");
	uint32_t version = get_le32(p + 8), n = get_le32(p + 12);
	if (version > STATE_FORMAT_VERSION)
		return error_set(
			err, ENOTSUP,
			"machine state: format %u is newer than this program's %u: upgrade this side",
			version, STATE_FORMAT_VERSION);
	if (version == 0 || n > STATE_SECTIONS_MAX || get_le64(p + 16) != len)
		return error_set(err, EPROTO, "machine state: bad header (%u sections, length %llu, got %zu)",
				 n, (unsigned long long)get_le64(p + 16), len);
	CLEANUP_FREE struct section *sections = calloc(n ? n : 1, sizeof *sections);
	struct state_reader *r = calloc(1, sizeof *r);
	if (!sections || !r) {
		free(r);
		return error_errno(err, ENOMEM, "machine state");
	}
	size_t at = HEADER_BYTES;
	int ret = 0;
	for (uint32_t i = 0; i < n && !ret; i++) {
		if (!range_fits(at, SECTION_BYTES, len)) {
			ret = error_set(err, EPROTO, "machine state: truncated at section %u", i);
			break;
		}
		const uint8_t *h = p + at;
		struct section *s = &sections[i];
		size_t n_payload = get_le32(h + 28);
		if (!name_ok(h)) {
			ret = error_set(err, EPROTO, "machine state: bad name of section %u", i);
			break;
		}
		memcpy(s->name, h, STATE_NAME_BYTES);
		if (!range_fits(at + SECTION_BYTES, n_payload, len)) {
			ret = error_set(err, EPROTO, "machine state: section %s is truncated", s->name);
			break;
		}
		s->version = get_le32(h + 24);
		s->payload = h + SECTION_BYTES;
		s->len = n_payload;
		if (section_checksum(h, s->payload, s->len) != get_le64(h + 32)) {
			ret = error_set(err, EPROTO, "machine state: section %s: checksum does not match",
					s->name);
			break;
		}
		for (uint32_t j = 0; j < i; j++)
			if (!strcmp(sections[j].name, s->name))
				ret = error_set(err, EPROTO, "machine state: section %s is there twice",
						s->name);
		at += SECTION_BYTES + n_payload;
	}
	if (!ret && at != len)
		ret = error_set(err, EPROTO, "machine state: %zu bytes after the last section", len - at);
	if (ret) {
		free(r);
		return ret;
	}
	r->sections = steal_ptr(sections);
	r->nsections = n;
	*out = r;
	return 0;
}

bool state_reader_view(const struct state_reader *r, uint32_t i, struct state_view *out)
{
	if (i >= r->nsections)
		return false;
	const struct section *s = &r->sections[i];
	*out = (struct state_view){.name = s->name, .payload = s->payload, .len = s->len};
	return true;
}

void state_reader_free(struct state_reader *r)
{
	if (!r)
		return;
	free(r->sections);
	free(r);
}

int state_reader_section(struct state_reader *r, const char *name, uint32_t max_version, uint32_t *version,
			 struct error *err)
{
	for (uint32_t i = 0; i < r->nsections; i++) {
		struct section *s = &r->sections[i];
		if (strcmp(s->name, name))
			continue;
		if (s->entered)
			return error_set(err, EINVAL, "machine state: section %s entered twice", name);
		if (s->version > max_version)
			return error_set(
				err, ENOTSUP,
				"machine state: section %s has version %u, this program knows up to %u: "
				"upgrade this side",
				name, s->version, max_version);
		s->entered = true;
		r->open = s;
		r->at = 0;
		r->short_read = false;
		if (version)
			*version = s->version;
		return 0;
	}
	return error_set(err, ENOENT, "machine state: section %s is missing", name);
}

void state_get_bytes(struct state_reader *r, void *p, size_t len)
{
	if (!r->open || r->short_read || !range_fits(r->at, len, r->open->len)) {
		r->short_read = true;
		memset(p, 0, len);
		return;
	}
	memcpy(p, r->open->payload + r->at, len);
	r->at += len;
}

uint8_t state_get_u8(struct state_reader *r)
{
	uint8_t v;
	state_get_bytes(r, &v, 1);
	return v;
}

#define GET(bits)                                                                                            \
	uint##bits##_t state_get_u##bits(struct state_reader *r)                                             \
	{                                                                                                    \
		uint8_t b[bits / 8];                                                                         \
		state_get_bytes(r, b, sizeof b);                                                             \
		return get_le##bits(b);                                                                      \
	}
GET(16)
GET(32)
GET(64)

size_t state_remaining(const struct state_reader *r)
{
	return r->open && !r->short_read ? r->open->len - r->at : 0;
}

int state_reader_section_end(struct state_reader *r, struct error *err)
{
	struct section *s = r->open;
	if (!s)
		return error_set(err, EINVAL, "machine state: no section is open");
	r->open = NULL;
	if (r->short_read)
		return error_set(err, EPROTO, "machine state: section %s is too short", s->name);
	if (r->at != s->len)
		return error_set(err, EPROTO, "machine state: section %s has %zu bytes too many", s->name,
				 s->len - r->at);
	return 0;
}

int state_reader_finish(struct state_reader *r, struct error *err)
{
	for (uint32_t i = 0; i < r->nsections; i++)
		if (!r->sections[i].entered)
			return error_set(err, EPROTO, "machine state: nobody here knows section %s",
					 r->sections[i].name);
	return 0;
}
