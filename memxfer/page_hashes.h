/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MEMXFER_PAGE_HASHES_H
#define MEMXFER_PAGE_HASHES_H

#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"

/*
 * What the destination has of each page, as a hash of what was sent: a page that was dirtied and is as it was
 * need not go again. 128 bits with a random seed: no guest can make two pages that agree. Filled from the
 * second round on, as most pages of the first never come again; memory is taken only for those that do.
 *
 * A page's entry belongs to the stream that sends the page.
 */
struct page_hashes;
int page_hashes_create(uint64_t npages, struct page_hashes **out, struct error *err);
void page_hashes_free(struct page_hashes *h);
/* Whether the destination has this content of the page already; from now on it is taken to have. */
bool page_hashes_same(struct page_hashes *h, uint64_t page, const uint8_t *copy);
/* The pages go as zeroes or holes, or without a hash. */
void page_hashes_forget(struct page_hashes *h, uint64_t first, uint64_t npages);

#endif
