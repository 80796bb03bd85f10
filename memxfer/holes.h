/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MEMXFER_HOLES_H
#define MEMXFER_HOLES_H

#include "memxfer/memxfer.h"

/* Private to memxfer/: where the memfd has pages. First data page (hole) at or after `from`, or npages. */
int mem_holes_next_data(const struct mem_space *space, uint64_t from, uint64_t *page, struct error *err);
int mem_holes_next_hole(const struct mem_space *space, uint64_t from, uint64_t *page, struct error *err);
int mem_populated_pages(const struct mem_space *space, uint64_t *npages, struct error *err);

#endif
