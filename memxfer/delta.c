/* SPDX-License-Identifier: Apache-2.0 */
#include "memxfer/delta.h"

#include <errno.h>
#include <string.h>
#include <xxhash.h>

#include "base/bytes.h"

#define WORD	  8u
#define WORDS	  (MEM_PAGE_BYTES / WORD)
#define RUN_WORDS 128u /* that a run may change */
#define SAME_BITS 7u

static uint64_t differs(const uint8_t *a, const uint8_t *b, unsigned word)
{
	uint64_t x, y;

	memcpy(&x, a + word * WORD, WORD);
	memcpy(&y, b + word * WORD, WORD);
	return x ^ y;
}

/* First word from `at` on that differs, or WORDS. Most do not: looked at by cache lines. */
static unsigned next_change(const uint8_t *a, const uint8_t *b, unsigned at)
{
	while (at < WORDS && at % 8) {
		if (differs(a, b, at))
			return at;
		at++;
	}
	while (at < WORDS && !memcmp(a + at * WORD, b + at * WORD, 8 * WORD))
		at += 8;
	while (at < WORDS && !differs(a, b, at))
		at++;
	return at;
}

int mem_delta_encode(const uint8_t base[MEM_PAGE_BYTES], const uint8_t new[MEM_PAGE_BYTES], uint8_t *out,
		     size_t max)
{
	size_t len = 0;

	for (unsigned at = 0, first; (first = next_change(base, new, at)) < WORDS;) {
		unsigned n = 0;
		uint64_t change;
		uint8_t *head = out + len;

		if (max - len < 2)
			return -1;
		len += 2;
		while (n < RUN_WORDS && first + n < WORDS && (change = differs(base, new, first + n))) {
			if (max - len < WORD)
				return -1;
			memcpy(out + len, &change, WORD);
			len += WORD;
			n++;
		}
		put_be16(head, (uint16_t)((first - at) << SAME_BITS | (n - 1)));
		at = first + n;
	}
	return (int)len;
}

int mem_delta_decode(uint8_t page[MEM_PAGE_BYTES], const uint8_t *delta, size_t len, struct error *err)
{
	unsigned at = 0;

	for (size_t pos = 0; pos < len;) {
		unsigned head, n;

		if (len - pos < 2)
			return error_set(err, EPROTO, "memory delta: cut off in a run's head");
		head = get_be16(delta + pos);
		pos += 2;
		at += head >> SAME_BITS;
		n = (head & (RUN_WORDS - 1)) + 1;
		if (at > WORDS || n > WORDS - at)
			return error_set(err, EPROTO, "memory delta: %u words at word %u leave the page", n,
					 at);
		if (len - pos < (size_t)n * WORD)
			return error_set(err, EPROTO, "memory delta: cut off in a run of %u words", n);
		for (unsigned end = at + n; at < end; at++, pos += WORD) {
			uint64_t now, change;

			memcpy(&now, page + at * WORD, WORD);
			memcpy(&change, delta + pos, WORD);
			now ^= change;
			memcpy(page + at * WORD, &now, WORD);
		}
	}
	return 0;
}

int mem_delta_page_encode(const uint8_t base[MEM_PAGE_BYTES], const uint8_t new[MEM_PAGE_BYTES], uint8_t *out,
			  size_t max)
{
	int len = mem_delta_encode(base, new, out + MEM_DELTA_HEAD_BYTES, max);

	if (len < 0)
		return -1;
	put_be16(out, (uint16_t)len);
	put_be64(out + 2, XXH3_64bits(new, MEM_PAGE_BYTES));
	return (int)MEM_DELTA_HEAD_BYTES + len;
}

int mem_delta_pages_check(const uint8_t *p, size_t len, uint64_t npages, struct error *err)
{
	size_t pos = 0;

	for (uint64_t i = 0; i < npages; i++) {
		size_t n;

		if (len - pos < MEM_DELTA_HEAD_BYTES)
			return error_set(err, EPROTO, "memory delta: %llu pages, but only %llu deltas",
					 (unsigned long long)npages, (unsigned long long)i);
		n = get_be16(p + pos);
		pos += MEM_DELTA_HEAD_BYTES;
		if (n > MEM_DELTA_MAX_BYTES || n > len - pos)
			return error_set(err, EPROTO, "memory delta: one of %zu bytes where %zu follow", n,
					 len - pos);
		pos += n;
	}
	if (pos != len)
		return error_set(err, EPROTO, "memory delta: %zu bytes after the last of %llu", len - pos,
				 (unsigned long long)npages);
	return 0;
}

int mem_delta_page_apply(uint8_t now[MEM_PAGE_BYTES], uint8_t scratch[MEM_PAGE_BYTES], const uint8_t **at,
			 struct error *err)
{
	size_t len = get_be16(*at);
	uint64_t sum = get_be64(*at + 2);
	int ret;

	memcpy(scratch, now, MEM_PAGE_BYTES);
	ret = mem_delta_decode(scratch, *at + MEM_DELTA_HEAD_BYTES, len, err);
	if (ret < 0)
		return ret;
	if (XXH3_64bits(scratch, MEM_PAGE_BYTES) != sum)
		return error_set(err, EBADMSG,
				 "memory delta: the page here is not the one that the source changed");
	memcpy(now, scratch, MEM_PAGE_BYTES);
	*at += MEM_DELTA_HEAD_BYTES + len;
	return 0;
}
