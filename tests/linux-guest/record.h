/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The record log: what the recorder in the guest appends and recordcheck reads from the disk's image
 * afterwards. A record is a line of text of a fixed length, so that a log is also readable with less: "NUMBER
 * REALTIME_NS CHECKSUM ...padding...\n", numbers counting from 1 without a gap.
 */
#pragma once
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { RECORD_SIZE_MIN = 64, RECORD_SIZE_MAX = 65536 };

/* FNV-1a over number, time and padding: enough to tell a torn or stale record from a whole one. */
static inline uint64_t record_checksum(uint64_t number, uint64_t time_ns, const char *padding, size_t len)
{
	uint64_t h = 14695981039346656037u ^ number;
	h = (h ^ time_ns) * 1099511628211u;
	for (size_t i = 0; i < len; i++)
		h = (h ^ (unsigned char)padding[i]) * 1099511628211u;
	return h;
}

enum { RECORD_HEAD = 20 + 1 + 20 + 1 + 16 + 1 };

/* Fills buf with exactly size bytes; size lies between RECORD_SIZE_MIN and RECORD_SIZE_MAX. */
static inline void record_format(char *buf, size_t size, uint64_t number, uint64_t time_ns)
{
	char head[RECORD_HEAD + 1];
	for (size_t i = RECORD_HEAD; i < size - 1; i++)
		buf[i] = (char)('a' + (number + i) % 26);
	uint64_t sum = record_checksum(number, time_ns, buf + RECORD_HEAD, size - 1 - RECORD_HEAD);
	snprintf(head, sizeof head, "%020" PRIu64 " %020" PRIu64 " %016" PRIx64 " ", number, time_ns, sum);
	memcpy(buf, head, RECORD_HEAD);
	buf[size - 1] = '\n';
}

static inline bool record_parse(const char *buf, size_t size, uint64_t *number, uint64_t *time_ns)
{
	char head[RECORD_HEAD + 1];
	uint64_t sum;
	memcpy(head, buf, RECORD_HEAD);
	head[RECORD_HEAD] = '\0';
	if (sscanf(head, "%20" SCNu64 " %20" SCNu64 " %16" SCNx64, number, time_ns, &sum) != 3)
		return false;
	return buf[size - 1] == '\n' &&
	       sum == record_checksum(*number, *time_ns, buf + RECORD_HEAD, size - 1 - RECORD_HEAD);
}
