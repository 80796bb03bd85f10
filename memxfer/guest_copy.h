/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MEMXFER_GUEST_COPY_H
#define MEMXFER_GUEST_COPY_H

#include <stdint.h>
#include <string.h>

#include "memxfer/memxfer.h"

/*
 * The one read of a guest page. The guest may write it at the same time: the copy may then be torn, which is
 * fine, as the page is dirty again; what is not fine is to read it twice and trust the two to agree.
 */
static inline void guest_page_copy(uint8_t *dst, const uint8_t *guest)
{
#ifdef __SANITIZE_THREAD__
	/* Says to the race detector that this race is meant. */
	const uint64_t *src = (const uint64_t *)guest;

	for (unsigned i = 0; i < MEM_PAGE_BYTES / 8; i++) {
		uint64_t v = __atomic_load_n(&src[i], __ATOMIC_RELAXED);

		memcpy(dst + 8 * i, &v, 8);
	}
#else
	memcpy(dst, guest, MEM_PAGE_BYTES);
#endif
}

#endif
