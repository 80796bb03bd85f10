/* SPDX-License-Identifier: Apache-2.0 */
/*
 * recordcheck STREAM FILE RECORD-SIZE LOG
 * FILE is a record log taken from the guest's disk, LOG what the collector received. Fails unless FILE is
 * whole records numbered from 1 without a gap and every number that LOG has for STREAM is among them.
 */
#include <errno.h>
#include <stdlib.h>

#include "record.h"

static uint64_t highest_received(const char *stream, const char *path, uint64_t *count)
{
	static bool ours[65536];
	uint64_t highest = 0, t;
	unsigned id;
	char line[256], what[64], streamname[32];
	FILE *f = fopen(path, "r");
	if (f == NULL) {
		fprintf(stderr, "recordcheck: %s: %s\n", path, strerror(errno));
		exit(1);
	}
	while (fgets(line, sizeof line, f) != NULL) {
		int n = sscanf(line, "%" SCNu64 " %u %63s %31s", &t, &id, what, streamname);
		if (n < 3 || id >= 65536)
			continue;
		if (n == 4 && strcmp(what, "stream") == 0)
			ours[id] = strcmp(streamname, stream) == 0;
		else if (ours[id] && what[0] >= '0' && what[0] <= '9') {
			uint64_t number = strtoull(what, NULL, 10);
			if (number > highest)
				highest = number;
			++*count;
		}
	}
	fclose(f);
	return highest;
}

int main(int argc, char **argv)
{
	static char buf[RECORD_SIZE_MAX];
	if (argc != 5) {
		fprintf(stderr, "usage: recordcheck STREAM FILE RECORD-SIZE LOG\n");
		return 2;
	}
	size_t size = strtoul(argv[3], NULL, 10), got;
	FILE *f = fopen(argv[2], "r");
	if (f == NULL || size < RECORD_SIZE_MIN || size > RECORD_SIZE_MAX) {
		fprintf(stderr, "recordcheck: %s: %s\n", argv[2],
			f == NULL ? strerror(errno) : "bad record size");
		return 2;
	}
	uint64_t records = 0, number, time_ns, previous_ns = 0, received = 0;
	while ((got = fread(buf, 1, size, f)) == size) {
		if (!record_parse(buf, size, &number, &time_ns) || number != records + 1) {
			fprintf(stderr, "recordcheck: %s: record %" PRIu64 " on the disk is damaged\n",
				argv[1], records + 1);
			return 1;
		}
		if (time_ns < previous_ns) {
			fprintf(stderr,
				"recordcheck: %s: the guest's clock went back at record %" PRIu64 "\n",
				argv[1], number);
			return 1;
		}
		previous_ns = time_ns;
		records++;
	}
	fclose(f);
	uint64_t highest = highest_received(argv[1], argv[4], &received);
	printf("{\"stream\":\"%s\",\"on_disk\":%" PRIu64 ",\"received\":%" PRIu64
	       ",\"highest_received\":%" PRIu64 "}\n",
	       argv[1], records, received, highest);
	if (received == 0) {
		fprintf(stderr, "recordcheck: %s: nothing was received\n", argv[1]);
		return 1;
	}
	if (highest > records) {
		fprintf(stderr,
			"recordcheck: %s: records %" PRIu64 " to %" PRIu64
			" were acknowledged and are not on the disk\n",
			argv[1], records + 1, highest);
		return 1;
	}
	/* What was being written when the guest stopped may end in a part of a record. */
	if (got != 0)
		fprintf(stderr, "recordcheck: %s: %zu bytes of an unfinished record at the end\n", argv[1],
			got);
	return 0;
}
