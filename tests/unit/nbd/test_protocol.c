/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "nbd/protocol.h"
#include "tests/suite.h"

#define SIZE UINT64_C(1048576)

enum { RO = 1, UNSTRUCTURED = 2, NO_STATUS = 4, ALIGNED = 8 };

static const struct {
	unsigned rules;
	uint16_t command, flags;
	uint64_t offset;
	uint32_t len, want;
} table[] = {
	{0, NBD_CMD_READ, 0, 0, 512, 0},
	{0, NBD_CMD_READ, 0, SIZE, 0, 0},
	{0, NBD_CMD_READ, 0, SIZE, 1, NBD_EINVAL},
	{0, NBD_CMD_READ, 0, SIZE - 1, 2, NBD_EINVAL},
	{0, NBD_CMD_READ, 0, UINT64_MAX, 1, NBD_EINVAL},
	{0, NBD_CMD_READ, 0, UINT64_MAX - 510, 512, NBD_EINVAL},
	{0, NBD_CMD_READ, 0, 0, 65537, NBD_EINVAL}, /* over the limit below */
	{0, NBD_CMD_READ, NBD_CMD_FLAG_DF, 0, 512, 0},
	{UNSTRUCTURED, NBD_CMD_READ, NBD_CMD_FLAG_DF, 0, 512, NBD_EINVAL},
	{0, NBD_CMD_READ, NBD_CMD_FLAG_NO_HOLE, 0, 512, NBD_EINVAL},
	{RO, NBD_CMD_READ, 0, 0, 512, 0},
	{0, NBD_CMD_WRITE, NBD_CMD_FLAG_FUA, SIZE - 512, 512, 0},
	{0, NBD_CMD_WRITE, 0, SIZE - 511, 512, NBD_ENOSPC},
	{0, NBD_CMD_WRITE, 0, UINT64_MAX, 512, NBD_ENOSPC},
	{0, NBD_CMD_WRITE, 0, 0, 65537, NBD_EINVAL},
	{0, NBD_CMD_WRITE, NBD_CMD_FLAG_DF, 0, 512, NBD_EINVAL},
	{RO, NBD_CMD_WRITE, 0, 0, 512, NBD_EPERM},
	{RO, NBD_CMD_WRITE, 0, SIZE, 512, NBD_EPERM},
	{RO, NBD_CMD_TRIM, 0, 0, 512, NBD_EPERM},
	{RO, NBD_CMD_WRITE_ZEROES, 0, 0, 512, NBD_EPERM},
	{RO, NBD_CMD_FLUSH, 0, 0, 0, 0},
	{0, NBD_CMD_FLUSH, 0, 99, 99, 0}, /* reserved fields are ignored */
	{0, NBD_CMD_TRIM, NBD_CMD_FLAG_FUA, 0, (uint32_t)SIZE, 0},
	{0, NBD_CMD_TRIM, 0, 1, (uint32_t)SIZE, NBD_EINVAL},
	{0, NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO | NBD_CMD_FLAG_FUA, 0,
	 (uint32_t)SIZE, 0},
	{0, NBD_CMD_WRITE_ZEROES, 0, 0, UINT32_MAX, NBD_ENOSPC},
	{0, NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_REQ_ONE, 0, 512, NBD_EINVAL},
	{0, NBD_CMD_BLOCK_STATUS, NBD_CMD_FLAG_REQ_ONE, 0, (uint32_t)SIZE, 0},
	{0, NBD_CMD_BLOCK_STATUS, 0, 0, 0, NBD_EINVAL},
	{0, NBD_CMD_BLOCK_STATUS, 0, SIZE, 512, NBD_EINVAL},
	{NO_STATUS, NBD_CMD_BLOCK_STATUS, 0, 0, 512, NBD_EINVAL},
	{0, NBD_CMD_CACHE, 0, 0, (uint32_t)SIZE, 0},
	{0, NBD_CMD_CACHE, 0, SIZE, 1, NBD_EINVAL},
	{0, 8, 0, 0, 512, NBD_EINVAL},
	{0, 65535, 0, 0, 512, NBD_EINVAL},
	{0, NBD_CMD_READ, 1 << 15, 0, 512, NBD_EINVAL},
	{ALIGNED, NBD_CMD_READ, 0, 512, 1024, 0},
	{ALIGNED, NBD_CMD_READ, 0, 511, 1024, NBD_EINVAL},
	{ALIGNED, NBD_CMD_WRITE, 0, 512, 1023, NBD_EINVAL},
	{ALIGNED, NBD_CMD_TRIM, 0, 512, 100, NBD_EINVAL},
};

START_TEST(test_request_table)
{
	unsigned r = table[_i].rules;
	struct nbd_request_rules rules = {.size_bytes = SIZE,
					  .request_alignment = r & ALIGNED ? 512 : 1,
					  .max_request_bytes = 65536,
					  .read_only = r & RO,
					  .structured = !(r & UNSTRUCTURED),
					  .allocation = !(r & NO_STATUS)};
	uint8_t raw[NBD_REQUEST_BYTES];
	put_be32(raw, NBD_REQUEST_MAGIC);
	put_be16(raw + 4, table[_i].flags);
	put_be16(raw + 6, table[_i].command);
	put_be64(raw + 8, 0x1122334455667788);
	put_be64(raw + 16, table[_i].offset);
	put_be32(raw + 24, table[_i].len);
	struct nbd_request req;
	ck_assert_int_eq(nbd_request_decode(raw, &req), 0);
	ck_assert_uint_eq(req.cookie, 0x1122334455667788);
	ck_assert_uint_eq(nbd_request_validate(&req, &rules), table[_i].want);
	raw[0] ^= 1;
	ck_assert_int_eq(nbd_request_decode(raw, &req), -EPROTO);
}
END_TEST

/* Every prefix of a valid payload, and one with a byte too many, is refused. */
START_TEST(test_info_request)
{
	uint8_t p[64];
	struct nbd_info_request info;
	put_be32(p, 3);
	memcpy(p + 4, "abc", 3);
	put_be16(p + 7, 2);
	put_be16(p + 9, NBD_INFO_BLOCK_SIZE);
	put_be16(p + 11, 999);
	ck_assert_int_eq(nbd_info_request_decode(p, 13, &info), 0);
	ck_assert(info.name.len == 3 && info.want_block_size && !info.want_name && !info.want_description);
	for (size_t n = 0; n < 13; n++)
		ck_assert_int_eq(nbd_info_request_decode(p, n, &info), -EINVAL);
	ck_assert_int_eq(nbd_info_request_decode(p, 14, &info), -EINVAL);
	put_be32(p, UINT32_MAX);
	ck_assert_int_eq(nbd_info_request_decode(p, 13, &info), -EINVAL);
}
END_TEST

START_TEST(test_meta_request)
{
	uint8_t p[128];
	struct nbd_meta_request meta;
	put_be32(p, 0);
	put_be32(p + 4, 2);
	put_be32(p + 8, 15);
	memcpy(p + 12, "base:allocation", 15);
	put_be32(p + 27, 5);
	memcpy(p + 31, "qemu:", 5);
	ck_assert_int_eq(nbd_meta_request_decode(p, 36, &meta), 0);
	ck_assert(meta.nqueries == 2 && meta.wants_allocation && !meta.wants_base);
	for (size_t n = 0; n < 36; n++)
		ck_assert_int_eq(nbd_meta_request_decode(p, n, &meta), -EINVAL);
	ck_assert_int_eq(nbd_meta_request_decode(p, 37, &meta), -EINVAL);
	put_be32(p + 4, UINT32_MAX);
	ck_assert_int_eq(nbd_meta_request_decode(p, 36, &meta), -EINVAL);
}
END_TEST

START_TEST(test_errors)
{
	ck_assert_uint_eq(nbd_wire_error(0), 0);
	ck_assert_uint_eq(nbd_wire_error(-EROFS), NBD_EPERM);
	ck_assert_uint_eq(nbd_wire_error(-EDQUOT), NBD_ENOSPC);
	ck_assert_uint_eq(nbd_wire_error(-EOPNOTSUPP), NBD_ENOTSUP);
	ck_assert_uint_eq(nbd_wire_error(-EUCLEAN), NBD_EIO);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("protocol");
	TCase *t = tcase_create("protocol");
	tcase_add_loop_test(t, test_request_table, 0, ARRAY_SIZE(table));
	tcase_add_test(t, test_info_request);
	tcase_add_test(t, test_meta_request);
	tcase_add_test(t, test_errors);
	suite_add_tcase(s, t);
	return suite_run(s);
}
