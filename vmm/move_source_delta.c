/* SPDX-License-Identifier: Apache-2.0 */
/* --delta-cache at the source: how many former copies of pages are kept, and whether the other side knows
 * what to do with what has changed of them. */
#include <errno.h>

#include "base/log.h"
#include "vmm/move_source.h"

/* By itself: this part of the guest's memory, within bounds, and no more than all of it. */
#define AUTO_PART	 16u
#define AUTO_LEAST_BYTES (UINT64_C(64) << 20)
#define AUTO_MOST_BYTES	 (UINT64_C(1) << 30)

int source_delta_parse(json_t *o, struct move_options *opt, struct error *err)
{
	json_t *v = json_object_get(o, "delta_cache_bytes");
	json_int_t n = json_integer_value(v);
	opt->delta_cache_bytes = MOVE_DELTA_AUTO;
	if (!v || json_is_null(v))
		return 0;
	if (!json_is_integer(v) || (n && n < (json_int_t)MOVE_DELTA_MIN_BYTES) ||
	    n > (json_int_t)MOVE_DELTA_MAX_BYTES)
		return error_set(
			err, EINVAL, "option delta_cache_bytes: 0, or from %llu to %llu, are possible",
			(unsigned long long)MOVE_DELTA_MIN_BYTES, (unsigned long long)MOVE_DELTA_MAX_BYTES);
	opt->delta_cache_bytes = (uint64_t)n;
	return 0;
}

uint64_t source_delta_bytes(const struct move_options *opt, uint64_t memory_bytes)
{
	uint64_t bytes = opt->delta_cache_bytes;
	if (bytes == MOVE_DELTA_AUTO) {
		bytes = memory_bytes / AUTO_PART;
		bytes = bytes > AUTO_MOST_BYTES ? AUTO_MOST_BYTES : bytes;
		bytes = bytes < AUTO_LEAST_BYTES ? AUTO_LEAST_BYTES : bytes;
	}
	return bytes < memory_bytes ? bytes : memory_bytes;
}

void source_delta_hello(const struct move *mv, json_t *hello)
{
	if (mv->opt.delta_cache_bytes)
		json_object_set_new(hello, "memory_deltas", json_true());
}

void source_delta_accepted(struct move *mv, const json_t *hello_ok)
{
	mv->deltas_agreed =
		mv->opt.delta_cache_bytes && json_is_true(json_object_get(hello_ok, "memory_deltas"));
	if (mv->opt.delta_cache_bytes && !mv->deltas_agreed)
		log_info("move to %s: it takes pages as a whole only", mv->opt.peer);
}
