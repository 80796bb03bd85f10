/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bitmap.h"
#include "mirror/mirror_impl.h"

int chunk_map_create(uint64_t size_bytes, uint32_t chunk_bytes, struct chunk_map **out)
{
	struct chunk_map *map = calloc(1, sizeof *map);
	if (!map)
		return -ENOMEM;
	map->size_bytes = size_bytes;
	map->chunk_bytes = chunk_bytes;
	map->shift = (unsigned)__builtin_ctz(chunk_bytes);
	map->nchunks = (size_bytes >> map->shift) + ((size_bytes & (chunk_bytes - 1)) != 0);
	/* one more: an empty disk */
	map->synced = bitmap_alloc(map->nchunks + 1);
	map->copying = bitmap_alloc(map->nchunks + 1);
	map->touched = bitmap_alloc(map->nchunks + 1);
	map->verified = bitmap_alloc(map->nchunks + 1);
	if (!map->synced || !map->copying || !map->touched || !map->verified) {
		chunk_map_free(map);
		return -ENOMEM;
	}
	*out = map;
	return 0;
}

void chunk_map_free(struct chunk_map *map)
{
	if (!map)
		return;
	free(map->synced);
	free(map->copying);
	free(map->touched);
	free(map->verified);
	proof_free(map->proof);
	free(map);
}

uint64_t chunk_map_len(const struct chunk_map *map, uint64_t chunk)
{
	uint64_t at = chunk << map->shift;
	return map->size_bytes - at < map->chunk_bytes ? map->size_bytes - at : map->chunk_bytes;
}

void chunk_map_set_synced(struct chunk_map *map, uint64_t chunk)
{
	if (bitmap_test(map->synced, chunk))
		return;
	bitmap_set(map->synced, chunk);
	map->synced_bytes += chunk_map_len(map, chunk);
	map->nsynced++;
}

void chunk_map_set_verified(struct chunk_map *map, uint64_t chunk)
{
	if (bitmap_test(map->verified, chunk))
		return;
	bitmap_set(map->verified, chunk);
	map->verified_bytes += chunk_map_len(map, chunk);
	map->nverified++;
}

static void clear_verified(struct chunk_map *map, uint64_t chunk)
{
	if (!bitmap_test(map->verified, chunk))
		return;
	bitmap_clear(map->verified, chunk);
	map->verified_bytes -= chunk_map_len(map, chunk);
	map->nverified--;
}

void chunk_map_forget_verified(struct chunk_map *map)
{
	bitmap_clear_range(map->verified, 0, map->nchunks);
	map->nverified = map->verified_bytes = 0;
}

static uint64_t last_chunk(const struct chunk_map *map, uint64_t offset_bytes, uint64_t len_bytes)
{
	return (offset_bytes + len_bytes - 1) >> map->shift;
}

bool chunk_map_unsync(struct chunk_map *map, uint64_t offset_bytes, uint64_t len_bytes)
{
	bool any = false;
	for (uint64_t c = offset_bytes >> map->shift; c <= last_chunk(map, offset_bytes, len_bytes); c++) {
		if (!bitmap_test(map->synced, c))
			continue;
		bitmap_clear(map->synced, c);
		clear_verified(map, c);
		map->synced_bytes -= chunk_map_len(map, c);
		map->unsynced_bytes += chunk_map_len(map, c);
		map->nsynced--;
		any = true;
	}
	return any;
}

void chunk_map_touch(struct chunk_map *map, uint64_t offset_bytes, uint64_t len_bytes)
{
	for (uint64_t c = offset_bytes >> map->shift; c <= last_chunk(map, offset_bytes, len_bytes); c++)
		bitmap_set(map->touched, c);
}

bool chunk_map_all_synced(const struct chunk_map *map)
{
	return map->nsynced == map->nchunks;
}

static bool next_unsynced_in(const struct chunk_map *map, uint64_t from, uint64_t to, uint64_t *chunk)
{
	for (uint64_t c = from; (c = bitmap_next_clear(map->synced, to, c)) < to; c++)
		if (!bitmap_test(map->copying, c)) {
			*chunk = c;
			return true;
		}
	return false;
}

bool chunk_map_next_unsynced(const struct chunk_map *map, uint64_t from, uint64_t *chunk)
{
	if (map->nsynced == map->nchunks)
		return false;
	if (from > map->nchunks)
		from = map->nchunks;
	return next_unsynced_in(map, from, map->nchunks, chunk) || next_unsynced_in(map, 0, from, chunk);
}

bool chunk_map_next_run(const struct chunk_map *map, uint64_t *offset_bytes, uint64_t end_bytes,
			uint64_t max_bytes, uint64_t *len_bytes)
{
	uint64_t at = *offset_bytes, end;
	while (at < end_bytes && !bitmap_test(map->synced, at >> map->shift))
		at = ((at >> map->shift) + 1) << map->shift;
	if (at >= end_bytes)
		return false;
	for (end = at;
	     end < end_bytes && end - at < max_bytes && bitmap_test(map->synced, end >> map->shift);)
		end = ((end >> map->shift) + 1) << map->shift;
	if (end > end_bytes)
		end = end_bytes;
	if (end - at > max_bytes)
		end = at + max_bytes;
	*offset_bytes = at;
	*len_bytes = end - at;
	return true;
}

void chunk_map_watch(struct chunk_map *map, struct chunk_watch *w)
{
	w->next = map->watches;
	map->watches = w;
}

void chunk_map_unwatch(struct chunk_map *map, struct chunk_watch *w)
{
	for (struct chunk_watch **p = &map->watches; *p; p = &(*p)->next)
		if (*p == w) {
			*p = w->next;
			return;
		}
}

static void mark(uint64_t *dirty, uint64_t watch_first, uint64_t n, uint64_t first, uint64_t last)
{
	if (first < watch_first)
		first = watch_first;
	for (uint64_t c = first; c <= last && c - watch_first < n; c++)
		bitmap_set(dirty, c - watch_first);
}

void chunk_map_mark_scan(struct chunk_map *map, uint64_t offset_bytes, uint64_t len_bytes)
{
	uint64_t first = offset_bytes >> map->shift, last = last_chunk(map, offset_bytes, len_bytes);
	if (map->scan_n)
		mark(map->scan_dirty, map->scan_first, map->scan_n, first, last);
	for (struct chunk_watch *w = map->watches; w; w = w->next)
		mark(w->dirty, w->first, w->n, first, last);
}
