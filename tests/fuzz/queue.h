/* SPDX-License-Identifier: Apache-2.0 */
#ifndef TESTS_FUZZ_QUEUE_H
#define TESTS_FUZZ_QUEUE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "vmm/state.h"
#include "vmm/virtqueue.h"

/* A queue of 36 bytes (size, flags, indices and ring addresses), loaded as from a saved state. */
static inline int queue_load(struct virtqueue *q, const uint8_t *data, bool event_idx, bool indirect)
{
	struct state_writer *w = state_writer_create();
	struct state_reader *r = NULL;
	const uint8_t *buf;
	uint32_t version;
	size_t len;
	int rc;

	state_section_begin(w, "q", 1);
	state_put_bytes(w, data, 36);
	state_section_end(w);
	rc = state_writer_finish(w, &buf, &len, NULL);
	if (rc == 0)
		rc = state_reader_open(buf, len, &r, NULL);
	if (rc == 0)
		rc = state_reader_section(r, "q", 1, &version, NULL);
	if (rc == 0)
		rc = virtqueue_load(q, r, event_idx, indirect, false, NULL);
	state_reader_free(r);
	state_writer_free(w);
	return rc;
}

#endif
