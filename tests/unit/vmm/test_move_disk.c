/* SPDX-License-Identifier: Apache-2.0 */
/* What a peer says of a disk: kept as it was meant, refused where it cannot be meant. */
#include <check.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "tests/suite.h"
#include "vmm/move_disk.h"

static struct error err;

static json_t *parse(const char *text)
{
	json_t *o = json_loads(text, 0, NULL);
	ck_assert_msg(o != NULL, "%s", text);
	err = ERROR_INIT;
	return o;
}

START_TEST(a_shape_comes_back)
{
	struct block_image_info in = {.format = BLOCK_FORMAT_QCOW2,
				      .virtual_bytes = 3 * 512,
				      .allocated_bytes = 70000,
				      .cluster_bytes = 131072,
				      .compat = "1.1",
				      .refcount_bits = 64,
				      .lazy_refcounts = true,
				      .extended_l2 = true,
				      .zstd = true},
				out;
	json_t *o = move_shape_to_json(&in);
	ck_assert_msg(move_shape_parse(o, &out, &err) == 0, "%s", err.message);
	ck_assert_mem_eq(&in, &out, sizeof in);
	json_object_del(o, "refcount_bits"); /* of an older source */
	ck_assert_int_eq(move_shape_parse(o, &out, &err), 0);
	ck_assert_uint_eq(out.refcount_bits, 0);
	json_decref(o);
}
END_TEST

#define QCOW2                                                                                                \
	"\"format\":\"qcow2\",\"virtual_bytes\":1048576,\"allocated_bytes\":0,\"cluster_bytes\":65536,"      \
	"\"compat\":\"1.1\""

static const struct {
	const char *text, *says;
} bad_shapes[] = {
	{"{}", "format"},
	{"[]", "format"},
	{"{\"format\":\"vmdk\"}", "format"},
	{"{\"format\":\"raw\"}", "virtual_bytes"},
	{"{\"format\":\"raw\",\"virtual_bytes\":0,\"allocated_bytes\":0,\"cluster_bytes\":0}", "a size of 0"},
	{"{\"format\":\"raw\",\"virtual_bytes\":513,\"allocated_bytes\":0,\"cluster_bytes\":0}",
	 "size of 513"},
	{"{\"format\":\"raw\",\"virtual_bytes\":2251799813685248,\"allocated_bytes\":0,\"cluster_bytes\":0}",
	 "virtual_bytes"},
	{"{\"format\":\"raw\",\"virtual_bytes\":512,\"allocated_bytes\":-1,\"cluster_bytes\":0}",
	 "allocated_bytes"},
	{"{\"format\":\"qcow2\",\"virtual_bytes\":512,\"allocated_bytes\":0,\"cluster_bytes\":0}",
	 "cluster size of 0"},
	{"{\"format\":\"qcow2\",\"virtual_bytes\":512,\"allocated_bytes\":0,\"cluster_bytes\":4194304}",
	 "cluster_bytes"},
	{"{\"format\":\"qcow2\",\"virtual_bytes\":512,\"allocated_bytes\":0,\"cluster_bytes\":65535}",
	 "cluster size of 65535"},
	{"{" QCOW2 ",\"refcount_bits\":3}", "reference counts of 3"},
	{"{" QCOW2 ",\"refcount_bits\":\"x\"}", "refcount_bits"},
};

START_TEST(bad_shapes_are_refused)
{
	struct block_image_info out;
	json_t *o = parse(bad_shapes[_i].text);
	ck_assert_int_eq(move_shape_parse(o, &out, &err), -EPROTO);
	ck_assert_msg(strstr(err.message, bad_shapes[_i].says) != NULL, "%s", err.message);
	json_decref(o);
}
END_TEST

START_TEST(backing_comes_back)
{
	struct move_backing *in = calloc(1, sizeof *in), *out = calloc(1, sizeof *out);
	in->nlayers = 2;
	in->layers[0] = (struct block_image_info){
		.format = BLOCK_FORMAT_QCOW2, .virtual_bytes = 512, .cluster_bytes = 4096, .compat = "0.10"};
	in->layers[1] = (struct block_image_info){.virtual_bytes = 1024, .compat = "1.1"};
	json_t *o = move_backing_to_json(MOVE_DISK_CHAIN, in);
	ck_assert_int_eq(move_backing_parse(o, MOVE_DISK_CHAIN, out, &err), 0);
	ck_assert_mem_eq(in, out, sizeof *in);
	/* what only the mode of a plain file says is not looked at */
	ck_assert_int_eq(move_backing_parse(o, MOVE_DISK_FILE, out, &err), 0);
	ck_assert_uint_eq(out->nlayers, 0);
	json_decref(o);
	memset(in, 0, sizeof *in);
	in->virtual_bytes = 1 << 20;
	memset(in->sha256, 'a', BLOCK_CONTENT_HEX_CHARS);
	strcpy(in->name, "debian.qcow2");
	o = move_backing_to_json(MOVE_DISK_REUSE, in);
	ck_assert_int_eq(move_backing_parse(o, MOVE_DISK_REUSE, out, &err), 0);
	ck_assert_mem_eq(in, out, sizeof *in);
	json_decref(o);
	free(in);
	free(out);
}
END_TEST

#define RAW  "{\"format\":\"raw\",\"virtual_bytes\":512,\"allocated_bytes\":0,\"cluster_bytes\":0}"
#define HASH "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde"

static const struct {
	enum move_disk_mode mode;
	const char *text, *says;
} bad_backing[] = {
	{MOVE_DISK_CHAIN, "{}", "0 files below"},
	{MOVE_DISK_CHAIN, "{\"layers\":[]}", "0 files below"},
	{MOVE_DISK_CHAIN, "{\"layers\":[1]}", "format"},
	{MOVE_DISK_CHAIN, "{\"layers\":[" RAW "," RAW "]}", "a raw file over another"},
	{MOVE_DISK_REUSE, "{}", "sha256"},
	{MOVE_DISK_REUSE, "{\"sha256\":\"" HASH "\",\"virtual_bytes\":512}", "sha256"},
	{MOVE_DISK_REUSE, "{\"sha256\":\"" HASH "F\",\"virtual_bytes\":512}", "sha256"},
	{MOVE_DISK_REUSE, "{\"sha256\":\"" HASH "f\"}", "virtual_bytes"},
};

START_TEST(bad_backing_is_refused)
{
	struct move_backing *out = calloc(1, sizeof *out);
	json_t *o = parse(bad_backing[_i].text);
	ck_assert_int_eq(move_backing_parse(o, bad_backing[_i].mode, out, &err), -EPROTO);
	ck_assert_msg(strstr(err.message, bad_backing[_i].says) != NULL, "%s", err.message);
	json_decref(o);
	free(out);
}
END_TEST

START_TEST(modes)
{
	enum move_disk_mode mode;
	for (int i = MOVE_DISK_FILE; i <= MOVE_DISK_REUSE; i++) {
		ck_assert_int_eq(move_disk_mode_parse(move_disk_mode_name((enum move_disk_mode)i), &mode), 0);
		ck_assert_int_eq(mode, i);
	}
	ck_assert_int_eq(move_disk_mode_parse(NULL, &mode), 0);
	ck_assert_int_eq(mode, MOVE_DISK_FILE);
	ck_assert_int_eq(move_disk_mode_parse("cloud", &mode), -EINVAL);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("move_disk");
	TCase *t = tcase_create("move_disk");
	tcase_add_test(t, a_shape_comes_back);
	tcase_add_loop_test(t, bad_shapes_are_refused, 0, ARRAY_SIZE(bad_shapes));
	tcase_add_test(t, backing_comes_back);
	tcase_add_loop_test(t, bad_backing_is_refused, 0, ARRAY_SIZE(bad_backing));
	tcase_add_test(t, modes);
	suite_add_tcase(s, t);
	return suite_run(s);
}
