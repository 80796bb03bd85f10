/* SPDX-License-Identifier: Apache-2.0 */
/* A main for fuzzers where there is no libFuzzer: runs the files named once each. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int main(int argc, char **argv)
{
	static uint8_t buf[1 << 20];

	for (int i = 1; i < argc; i++) {
		FILE *f = fopen(argv[i], "rb");
		if (!f) {
			perror(argv[i]);
			return 1;
		}
		size_t n = fread(buf, 1, sizeof buf, f);
		fclose(f);
		/* An allocation of its exact size, so that a sanitizer sees a read beyond it. */
		uint8_t *copy = malloc(n ? n : 1);
		if (!copy)
			return 1;
		for (size_t b = 0; b < n; b++)
			copy[b] = buf[b];
		LLVMFuzzerTestOneInput(copy, n);
		free(copy);
	}
	printf("ok   %s: %d inputs\n", argv[0], argc - 1);
	return 0;
}
