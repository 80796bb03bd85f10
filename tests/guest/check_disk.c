/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Checks a disk that the native test guest has written, sector by sector: raw image, block device, or raw
 * data on stdin.
 *
 *   check_disk [--seed N] [--span SECTORS] [--digest 0xHEX] [--record N] [--allow-foreign] [--find-valid]
 * [FILE]
 *
 * --seed: the guest's seed plus the disk's index; sectors of another seed count as foreign. --digest: what
 * the guest printed in "disk N final": the image must hold exactly the generations that the guest last wrote.
 * --record: the last record that the guest called acked; the image must hold it or a later one. Exit status:
 * 0 all right, 1 the disk is bad, 2 wrong usage or the image cannot be read.
 */
#include "selfdesc.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SECTOR_BYTES  (SELFDESC_SECTOR_WORDS * 8u)
#define BATCH_SECTORS 2048u
#define BAD_LINES_MAX 20u

static struct {
	bool has_seed, has_digest, has_record, allow_foreign, find_valid;
	uint64_t seed, digest, record, span;
} want = {.span = UINT64_MAX};

static struct {
	uint64_t sectors, valid, zero, bad, foreign, digest, last_record, first_valid;
} found;

static void check(const uint64_t *words, uint64_t lba)
{
	const char *why;

	found.sectors++;
	if (!selfdesc_nonzero(words, SELFDESC_SECTOR_WORDS)) {
		found.zero++;
		return;
	}
	if (words[SELFDESC_MAGIC] != SELFDESC_SECTOR_MAGIC) {
		if (found.foreign++ < BAD_LINES_MAX && !want.allow_foreign)
			printf("foreign lba=%" PRIu64 " first_word=0x%" PRIx64 "\n", lba, words[0]);
		return;
	}
	if (selfdesc_inconsistent(words, SELFDESC_SECTOR_WORDS))
		why = "torn";
	else if (words[SELFDESC_NUMBER] != lba)
		why = "misplaced";
	else
		why = NULL;
	if (why) {
		if (found.bad++ < BAD_LINES_MAX)
			printf("bad lba=%" PRIu64 " kind=%s found_lba=%" PRIu64 " found_generation=%" PRIu64
			       "\n",
			       lba, why, words[SELFDESC_NUMBER], words[SELFDESC_GENERATION]);
		return;
	}
	if (want.has_seed && words[SELFDESC_SEED] != want.seed) {
		if (found.foreign++ < BAD_LINES_MAX && !want.allow_foreign)
			printf("foreign lba=%" PRIu64 " seed=%" PRIu64 "\n", lba, words[SELFDESC_SEED]);
		return;
	}
	found.valid++;
	if (want.find_valid && !found.first_valid && lba >= SELFDESC_RECORD_SECTORS)
		found.first_valid = lba;
	found.digest += selfdesc_digest(lba, words[SELFDESC_GENERATION]);
	if (lba < SELFDESC_RECORD_SECTORS && words[SELFDESC_GENERATION] > found.last_record)
		found.last_record = words[SELFDESC_GENERATION];
}

/* Fills the buffer unless the input ends; the bytes read, or -1. */
static ssize_t read_full(int fd, void *buffer, size_t len)
{
	size_t done = 0;

	while (done < len) {
		ssize_t n = read(fd, (char *)buffer + done, len - done);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -1;
		if (n == 0)
			break;
		done += (size_t)n;
	}
	return (ssize_t)done;
}

static int check_all(int fd, const char *name)
{
	static uint64_t buffer[BATCH_SECTORS * SELFDESC_SECTOR_WORDS];
	uint64_t lba = 0;

	while (lba < want.span) {
		ssize_t n = read_full(fd, buffer, sizeof(buffer));

		if (n < 0) {
			fprintf(stderr, "check_disk: %s: read at sector %" PRIu64 ": %s\n", name, lba,
				strerror(errno));
			return -1;
		}
		for (size_t i = 0; i < (size_t)n / SECTOR_BYTES && lba < want.span; i++)
			check(buffer + i * SELFDESC_SECTOR_WORDS, lba++);
		if ((size_t)n < sizeof(buffer))
			break;
	}
	return 0;
}

static uint64_t number(const char *s)
{
	char *end;
	uint64_t v;

	errno = 0;
	v = strtoull(s, &end, 0);
	if (errno || end == s || *end || *s == '-') {
		fprintf(stderr, "check_disk: %s is not a number\n", s);
		exit(2);
	}
	return v;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {{"seed", required_argument, NULL, 's'},
						{"span", required_argument, NULL, 'n'},
						{"digest", required_argument, NULL, 'd'},
						{"record", required_argument, NULL, 'r'},
						{"allow-foreign", no_argument, NULL, 'f'},
						{"find-valid", no_argument, NULL, 'v'},
						{NULL, 0, NULL, 0}};
	const char *name = "stdin";
	int fd = 0, c;
	bool ok;

	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (c) {
		case 's':
			want.has_seed = true;
			want.seed = number(optarg);
			break;
		case 'n':
			want.span = number(optarg);
			break;
		case 'd':
			want.has_digest = true;
			want.digest = number(optarg);
			break;
		case 'r':
			want.has_record = true;
			want.record = number(optarg);
			break;
		case 'f':
			want.allow_foreign = true;
			break;
		case 'v':
			want.find_valid = true;
			break;
		default:
			fprintf(stderr, "usage: check_disk [--seed N] [--span SECTORS] [--digest 0xHEX] "
					"[--record N] [--allow-foreign] [--find-valid] [FILE]\n");
			return 2;
		}
	}
	if (optind < argc) {
		name = argv[optind];
		fd = open(name, O_RDONLY | O_CLOEXEC);
		if (fd < 0) {
			fprintf(stderr, "check_disk: %s: %s\n", name, strerror(errno));
			return 2;
		}
	}
	if (check_all(fd, name) < 0)
		return 2;
	if (want.find_valid) {
		printf("%" PRIu64 "\n", found.first_valid);
		return found.first_valid ? 0 : 1;
	}
	ok = !found.bad && (want.allow_foreign || !found.foreign);
	if (want.has_digest && want.digest != found.digest) {
		printf("bad digest: expected 0x%" PRIx64 ", found 0x%" PRIx64 "\n", want.digest,
		       found.digest);
		ok = false;
	}
	if (want.has_record && found.last_record < want.record) {
		printf("bad record: %" PRIu64 " was acked, the last on disk is %" PRIu64 "\n", want.record,
		       found.last_record);
		ok = false;
	}
	printf("sectors=%" PRIu64 " valid=%" PRIu64 " zero=%" PRIu64 " bad=%" PRIu64 " foreign=%" PRIu64
	       " record=%" PRIu64 " digest=0x%" PRIx64 " ok=%d\n",
	       found.sectors, found.valid, found.zero, found.bad, found.foreign, found.last_record,
	       found.digest, ok);
	return ok ? 0 : 1;
}
