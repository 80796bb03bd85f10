/* SPDX-License-Identifier: Apache-2.0 */
#include "memxfer/memory_hash.h"
#include "tests/suite.h"
#include "tests/unit/memxfer/harness.h"

#define PAGES_PER_REGION (MEM_REGION_BYTES / MEM_PAGE_BYTES)
#define NPAGES		 (5 * PAGES_PER_REGION + 33)

START_TEST(test_chunk_sizes)
{
	ck_assert_uint_eq(mem_hash_chunk_pages(1, 4), PAGES_PER_REGION);
	ck_assert_uint_eq(mem_hash_chunk_pages(4 * PAGES_PER_REGION, 4), PAGES_PER_REGION);
	ck_assert_uint_eq(mem_hash_chunk_pages(4 * PAGES_PER_REGION + 1, 4), 2 * PAGES_PER_REGION);
	ck_assert_uint_eq(mem_hash_chunk_pages(UINT64_C(1) << 26, 32768), 2048);
}
END_TEST

static void hash(struct mem_space *sp, uint32_t chunk_pages, const uint64_t *skip, uint64_t *hashes)
{
	struct error err = ERROR_INIT;

	ck_assert_msg(mem_hash_chunks(sp, chunk_pages, skip, hashes, &err) == 0, "%s", err.message);
}

/* The same contents, of which one has holes, the other zeroes; then each byte that differs is noticed where
 * it is, and nothing is allocated by looking. */
START_TEST(test_memories_are_compared)
{
	struct mem_space a = space_create(NPAGES), b = space_create(NPAGES);
	uint32_t chunk = _i ? 2 * PAGES_PER_REGION : PAGES_PER_REGION;
	unsigned n = (NPAGES + chunk - 1) / chunk;
	uint64_t x[6], y[6], skip = 0;

	for (uint64_t p = 0; p < NPAGES; p += 1 + p % 7) {
		page_fill(&a, p, p + 1);
		page_fill(&b, p, p + 1);
	}
	for (uint64_t p = 600; p < 900; p++) {
		page_fill(&a, p, 0);
		page_fill(&b, p, 0);
	}
	fallocate(b.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 700 * MEM_PAGE_BYTES,
		  100 * MEM_PAGE_BYTES);
	/* there, but in no page table of this process */
	ck_assert_int_eq(pwrite(a.fd, "x", 1, 1201 * MEM_PAGE_BYTES), 1);
	b.base[1201 * MEM_PAGE_BYTES] = 'x';
	uint64_t populated = space_populated(&b, NULL);
	hash(&a, chunk, NULL, x);
	hash(&b, chunk, NULL, y);
	ck_assert_int_eq(memcmp(x, y, n * sizeof *x), 0);
	ck_assert_uint_eq(space_populated(&b, NULL), populated);
	for (unsigned i = 0; i < 200; i++) {
		uint64_t at = (i * 1237) % NPAGES, kept = at / chunk;

		b.base[at * MEM_PAGE_BYTES + (i * 97) % MEM_PAGE_BYTES] ^= 1;
		hash(&b, chunk, NULL, y);
		b.base[at * MEM_PAGE_BYTES + (i * 97) % MEM_PAGE_BYTES] ^= 1;
		for (unsigned c = 0; c < n; c++)
			ck_assert_msg((x[c] == y[c]) == (c != kept), "page %u, chunk %u", (unsigned)at, c);
		skip = UINT64_C(1) << kept;
	}
	/* two pages that changed places */
	uint8_t page[MEM_PAGE_BYTES];
	memcpy(page, b.base, sizeof page);
	memcpy(b.base, b.base + MEM_PAGE_BYTES, sizeof page);
	memcpy(b.base + MEM_PAGE_BYTES, page, sizeof page);
	hash(&b, chunk, NULL, y);
	ck_assert_uint_ne(x[0], y[0]);
	/* what is left out is 0 on both sides */
	hash(&b, chunk, &skip, y);
	for (unsigned c = 0; c < n; c++)
		ck_assert(!(skip >> c & 1) || y[c] == 0);
	space_free(&a);
	space_free(&b);
}
END_TEST

int main(void)
{
	Suite *suite = suite_create("memory_hash");
	TCase *tc = tcase_create("memory_hash");

	tcase_add_test(tc, test_chunk_sizes);
	tcase_add_loop_test(tc, test_memories_are_compared, 0, 2);
	suite_add_tcase(suite, tc);
	return suite_run(suite);
}
