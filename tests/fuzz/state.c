/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#define XXH_STATIC_LINKING_ONLY
#include <xxhash.h>

#include "base/bytes.h"
#include "vmm/state.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Length and checksums are made right first, else nothing would get past them. */
static void repair(uint8_t *p, size_t size)
{
	size_t at = 24;
	if (size < at)
		return;
	memcpy(p, "SNMSTATE", 8);
	put_le64(p + 16, size);
	while (range_fits(at, 40, size)) {
		size_t len = get_le32(p + at + 28);
		XXH3_state_t s;
		if (!range_fits(at + 40, len, size))
			return;
		XXH3_64bits_reset(&s);
		XXH3_64bits_update(&s, p + at, 32);
		XXH3_64bits_update(&s, p + at + 40, len);
		put_le64(p + at + 32, XXH3_64bits_digest(&s));
		at += 40 + len;
	}
}

static void read_all(const uint8_t *p, size_t size)
{
	static const char *const names[] = {"a", "cpu.0", "second"};
	struct state_reader *r;
	uint8_t buf[16];
	if (state_reader_open(p, size, &r, NULL))
		return;
	for (unsigned i = 0; i < 3; i++) {
		if (state_reader_section(r, names[i], 3, NULL, NULL))
			continue;
		size_t left = state_remaining(r);
		while (state_remaining(r) >= sizeof buf) {
			state_get_bytes(r, buf, sizeof buf);
			left -= sizeof buf;
		}
		if (left != state_remaining(r))
			abort();
		if (state_get_u64(r) && left < 8)
			abort(); /* past the end there are zeroes */
		state_reader_section_end(r, NULL);
	}
	state_reader_finish(r, NULL);
	state_reader_free(r);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	uint8_t *copy = malloc(size + 1);
	if (!copy)
		return 0;
	memcpy(copy, data, size);
	read_all(copy, size);
	repair(copy, size);
	read_all(copy, size);
	free(copy);
	return 0;
}
