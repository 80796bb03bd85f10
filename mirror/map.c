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
	if (!map->synced || !map->copying || !map->touched) {
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
		map->synced_bytes -= chunk_map_len(map, c);
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

void chunk_map_mark_scan(struct chunk_map *map, uint64_t offset_bytes, uint64_t len_bytes)
{
	if (!map->scan_n)
		return;
	uint64_t first = offset_bytes >> map->shift, last = last_chunk(map, offset_bytes, len_bytes);
	if (first < map->scan_first)
		first = map->scan_first;
	for (uint64_t c = first; c <= last && c - map->scan_first < map->scan_n; c++)
		bitmap_set(map->scan_dirty, c - map->scan_first);
}
