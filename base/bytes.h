/* SPDX-License-Identifier: Apache-2.0 */
#ifndef BASE_BYTES_H
#define BASE_BYTES_H

#include <endian.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Explicit byte order accessors; unaligned addresses are fine. */
#define BYTES_ACCESSORS(bits)                                                                                \
	static inline uint##bits##_t get_be##bits(const void *p)                                             \
	{                                                                                                    \
		uint##bits##_t v;                                                                            \
		memcpy(&v, p, sizeof v);                                                                     \
		return be##bits##toh(v);                                                                     \
	}                                                                                                    \
	static inline void put_be##bits(void *p, uint##bits##_t v)                                           \
	{                                                                                                    \
		v = htobe##bits(v);                                                                          \
		memcpy(p, &v, sizeof v);                                                                     \
	}                                                                                                    \
	static inline uint##bits##_t get_le##bits(const void *p)                                             \
	{                                                                                                    \
		uint##bits##_t v;                                                                            \
		memcpy(&v, p, sizeof v);                                                                     \
		return le##bits##toh(v);                                                                     \
	}                                                                                                    \
	static inline void put_le##bits(void *p, uint##bits##_t v)                                           \
	{                                                                                                    \
		v = htole##bits(v);                                                                          \
		memcpy(p, &v, sizeof v);                                                                     \
	}
BYTES_ACCESSORS(16)
BYTES_ACCESSORS(32)
BYTES_ACCESSORS(64)
#undef BYTES_ACCESSORS

/* True if [offset, offset+len) lies within size; no overflow. */
static inline bool range_fits(uint64_t offset, uint64_t len, uint64_t size)
{
	return offset <= size && len <= size - offset;
}

/* True if all len bytes are zero; vectorised by the compiler, any alignment. */
bool bytes_all_zero(const void *p, size_t len);

#endif
