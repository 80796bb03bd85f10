/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "mirror/proof.h"
#include "net/frame.h"
#include "tests/suite.h"
#include "vmm/move_hashes.h"

static const struct mirror_hash zero = {.low = 5, .high = 77};

START_TEST(an_ask_comes_through)
{
	uint8_t raw[HASH_ASK_BYTES];
	struct hash_ask ask = {.id = 9, .disk = 1, .n = 3, .first = UINT64_C(0x123456789a)}, got;
	hash_ask_encode(raw, &ask);
	ck_assert_int_eq(hash_ask_decode(raw, sizeof raw, 2, &got, NULL), 0);
	ck_assert_uint_eq(got.id, 9);
	ck_assert_uint_eq(got.disk, 1);
	ck_assert_uint_eq(got.n, 3);
	ck_assert_uint_eq(got.first, ask.first);
	ck_assert_int_eq(hash_ask_decode(raw, sizeof raw, 1, &got, NULL), -EPROTO);
	ck_assert_int_eq(hash_ask_decode(raw, sizeof raw - 1, 2, &got, NULL), -EPROTO);
	put_be32(raw + 8, MIRROR_VERIFY_CHUNKS + 1);
	ck_assert_int_eq(hash_ask_decode(raw, sizeof raw, 2, &got, NULL), -EPROTO);
}
END_TEST

static void check_hashes(uint32_t n, unsigned kind)
{
	struct hash_ask ask = {.id = 1, .n = n}, head;
	uint32_t real = n ? n : 1;
	struct mirror_hash *in = calloc(real, sizeof *in), *out = calloc(real, sizeof *out);
	for (uint32_t i = 0; i < real; i++)
		in[i] = kind == 0 || (kind == 2 && i % 3)
				? zero
				: (struct mirror_hash){.low = i, .high = ~(uint64_t)i};
	uint8_t *raw = malloc(hashes_max_bytes(n));
	uint32_t len = hashes_encode(raw, &ask, in, &zero);
	ck_assert_uint_le(len, hashes_max_bytes(n));
	ck_assert_uint_le(len, FRAME_HASHES_MAX_BYTES);
	if (kind == 0)
		ck_assert_uint_eq(len, HASH_ASK_BYTES + 4);
	ck_assert_int_eq(hashes_decode_head(raw, len, &head, NULL), 0);
	ck_assert_uint_eq(head.n, n);
	struct error err = ERROR_INIT;
	ck_assert_msg(hashes_decode(raw, len, &zero, n, out, &err) == 0, "%s", err.message);
	for (uint32_t i = 0; i < real; i++)
		ck_assert(mirror_hash_equal(&in[i], &out[i]));
	/* cut anywhere, too many, too few */
	for (uint32_t cut = 0; cut < len; cut += 1 + len / 97)
		ck_assert_int_eq(hashes_decode(raw, cut, &zero, n, out, NULL), -EPROTO);
	ck_assert_int_eq(hashes_decode(raw, len, &zero, real + 1, out, NULL), -EPROTO);
	if (real > 1)
		ck_assert_int_eq(hashes_decode(raw, len, &zero, real - 1, out, NULL), -EPROTO);
	/* a run of none, and one that overflows */
	put_be32(raw + HASH_ASK_BYTES, 0);
	ck_assert_int_eq(hashes_decode(raw, len, &zero, n, out, NULL), -EPROTO);
	put_be32(raw + HASH_ASK_BYTES, 0xffffffff);
	ck_assert_int_eq(hashes_decode(raw, len, &zero, n, out, NULL), -EPROTO);
	free(raw);
	free(in);
	free(out);
}

START_TEST(hashes_come_through)
{
	static const uint32_t counts[] = {0, 1, 2, 7, 1000, MIRROR_VERIFY_CHUNKS};
	for (unsigned i = 0; i < sizeof counts / sizeof *counts; i++)
		check_hashes(counts[i], (unsigned)_i);
}
END_TEST

START_TEST(sums_come_through)
{
	struct mirror_sums *in = calloc(16, sizeof *in), *out = calloc(16, sizeof *out);
	for (unsigned d = 0; d < 16; d++) {
		in[d].root = (struct mirror_hash){.low = d + 1, .high = d + 2};
		in[d].total = (struct mirror_hash){.low = d + 3, .high = d + 4};
		in[d].writes = d * 1000;
		in[d].n = d ? MIRROR_SUM_GROUPS / d : MIRROR_SUM_GROUPS;
		for (unsigned g = 0; g < in[d].n; g++) {
			in[d].groups[g].group = d ? g * d : g;
			in[d].groups[g].sum = (struct mirror_hash){.low = g, .high = d};
		}
	}
	uint8_t *raw = malloc(sums_max_bytes(16));
	uint32_t len = sums_encode(raw, 16, in);
	ck_assert_uint_le(len, sums_max_bytes(16));
	ck_assert_uint_le(sums_max_bytes(16), FRAME_HASHES_MAX_BYTES);
	struct error err = ERROR_INIT;
	ck_assert_msg(sums_decode(raw, len, 16, out, &err) == 0, "%s", err.message);
	ck_assert_int_eq(memcmp(in, out, 16 * sizeof *in), 0);
	for (uint32_t cut = 0; cut < len; cut += 1 + len / 97)
		ck_assert_int_eq(sums_decode(raw, cut, 16, out, NULL), -EPROTO);
	ck_assert_int_eq(sums_decode(raw, len, 15, out, NULL), -EPROTO);
	/* a group twice, and one too high */
	put_be32(raw + 4 + 44 + 20, 0);
	ck_assert_int_eq(sums_decode(raw, len, 16, out, NULL), -EPROTO);
	put_be32(raw + 4 + 44, MIRROR_SUM_GROUPS);
	ck_assert_int_eq(sums_decode(raw, len, 16, out, NULL), -EPROTO);
	put_be32(raw + 4 + 40, MIRROR_SUM_GROUPS + 1);
	ck_assert_int_eq(sums_decode(raw, len, 16, out, NULL), -EPROTO);
	free(raw);
	free(in);
	free(out);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("move-hashes");
	TCase *t = tcase_create("codec");
	tcase_add_test(t, an_ask_comes_through);
	tcase_add_loop_test(t, hashes_come_through, 0, 3);
	tcase_add_test(t, sums_come_through);
	suite_add_tcase(s, t);
	return suite_run(s);
}
