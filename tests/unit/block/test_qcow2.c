/* SPDX-License-Identifier: Apache-2.0 */
/* qcow2 through qemu-nbd and qemu-img: shape, contents, locks, and what must be refused. */
#include <check.h>
#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>

#include "base/bytes.h"
#include "base/clock.h"
#include "block/qcow2_header.h"
#include "tests/unit/block/rig.h"

#define MiB (UINT64_C(1) << 20)

static const struct block_image_info shapes[] = {
	{.format = BLOCK_FORMAT_QCOW2, .virtual_bytes = 64 * MiB},
	{.format = BLOCK_FORMAT_QCOW2,
	 .virtual_bytes = 100 * MiB + 512,
	 .cluster_bytes = 65536,
	 .compat = "0.10"},
	{.format = BLOCK_FORMAT_QCOW2, .virtual_bytes = 64 * MiB, .cluster_bytes = 4096, .compat = "1.1"},
	{.format = BLOCK_FORMAT_QCOW2,
	 .virtual_bytes = 4096 * MiB,
	 .cluster_bytes = 2 * MiB,
	 .compat = "1.1",
	 .lazy_refcounts = true},
	{.format = BLOCK_FORMAT_QCOW2,
	 .virtual_bytes = 64 * MiB,
	 .cluster_bytes = 131072,
	 .compat = "1.1",
	 .extended_l2 = true},
};

static void create(const char *name, const struct block_image_info *like)
{
	struct error err = ERROR_INIT;
	int dir = open(rig_dir, O_RDONLY | O_DIRECTORY);
	ck_ok(block_image_create(dir, name, like, &err), err);
	close(dir);
}

static int try_open(const char *name, bool direct, struct block **blk, struct error *err)
{
	struct block_open_options opt = {
		.format = BLOCK_FORMAT_QCOW2, .direct = direct, .label = "disk", .run_dir = rig_dir};
	return block_open(rig_path(name), &opt, blk, err);
}

static struct block *open_disk(const char *name, bool direct)
{
	struct block *blk = NULL;
	struct error err = ERROR_INIT;
	ck_ok(try_open(name, direct, &blk, &err), err);
	return blk;
}

START_TEST(test_create_keeps_shape)
{
	const struct block_image_info *like = &shapes[_i];
	struct block_image_info got;
	struct error err = ERROR_INIT;
	create("i", like);
	ck_ok(block_image_info(rig_path("i"), BLOCK_FORMAT_QCOW2, false, &got, &err), err);
	ck_assert_uint_eq(got.virtual_bytes, like->virtual_bytes);
	ck_assert_uint_eq(got.cluster_bytes, like->cluster_bytes ? like->cluster_bytes : 65536);
	ck_assert_str_eq(got.compat, like->compat[0] ? like->compat : "1.1");
	ck_assert_int_eq(got.lazy_refcounts, like->lazy_refcounts);
	ck_assert_int_eq(got.extended_l2, like->extended_l2);
	ck_assert(!got.has_backing && !got.is_block_device);
	ck_assert_uint_lt(got.allocated_bytes, 8 * MiB);
	struct stat st;
	ck_assert_int_eq(stat(rig_path("i"), &st), 0);
	ck_assert_uint_eq(st.st_mode & 07777, 0600);
	/* And again, from what was found. */
	create("copy", &got);
	struct block_image_info copy;
	ck_ok(block_image_info(rig_path("copy"), BLOCK_FORMAT_QCOW2, false, &copy, &err), err);
	ck_assert_uint_eq(copy.cluster_bytes, got.cluster_bytes);
	ck_assert_int_eq(copy.extended_l2, got.extended_l2);
	int dir = open(rig_dir, O_RDONLY | O_DIRECTORY);
	ck_assert_int_eq(block_image_create(dir, "i", like, &err), -EEXIST);
	struct block_image_info bad = *like;
	bad.cluster_bytes = 12345;
	ck_assert_int_lt(block_image_create(dir, "bad", &bad, &err), 0);
	ck_assert_ptr_nonnull(strstr(err.message, "luster size"));
	ck_assert_int_ne(access(rig_path("bad"), F_OK), 0);
	close(dir);
}
END_TEST

START_TEST(test_contents_survive)
{
	create("i", &shapes[_i]);
	for (int direct = 0; direct < 2; direct++) {
		uint64_t at = direct ? 32 * MiB : 0;
		struct block *blk = open_disk("i", direct);
		ck_assert_uint_eq(blk->size_bytes, shapes[_i].virtual_bytes);
		rig_fill(blk, 1 + direct, 8 * MiB, at);
		ck_assert_int_eq(block_zero(blk, at + 1 * MiB, MiB, 0), 0);
		ck_assert_int_eq(block_zero(blk, at + 2 * MiB + 512, 1024, BLOCK_REQ_MAY_UNMAP), 0);
		ck_assert_int_eq(block_discard(blk, at + 4 * MiB, 2 * MiB), 0);
		ck_assert_int_eq(block_flush(blk), 0);
		rig_fill(blk, 0x77, 512, blk->size_bytes - 512);
		block_close(blk);
	}
	struct block *blk = open_disk("i", false);
	for (int direct = 0; direct < 2; direct++) {
		uint64_t at = direct ? 32 * MiB : 0;
		rig_expect(blk, 1 + direct, MiB, at);
		rig_expect(blk, 0, MiB, at + 1 * MiB);
		rig_expect(blk, 1 + direct, 512, at + 2 * MiB);
		rig_expect(blk, 0, 1024, at + 2 * MiB + 512);
		rig_expect(blk, 1 + direct, 2 * MiB - 1536, at + 2 * MiB + 1536);
		rig_expect(blk, 0, 2 * MiB, at + 4 * MiB);
		rig_expect(blk, 1 + direct, 2 * MiB, at + 6 * MiB);
	}
	rig_expect(blk, 0x77, 512, blk->size_bytes - 512);
	struct block_extent ext[16];
	unsigned n = 16;
	struct error err = ERROR_INIT;
	ck_ok(block_extents(blk, 16 * MiB, 8 * MiB, ext, &n, &err), err);
	ck_assert_uint_eq(n, 1);
	ck_assert(ext[0].hole && ext[0].zero && ext[0].len_bytes == 8 * MiB);
	block_close(blk);
	struct block_image_info info;
	ck_ok(block_image_info(rig_path("i"), BLOCK_FORMAT_QCOW2, false, &info, &err), err);
}
END_TEST

START_TEST(test_lock_and_in_use)
{
	create("i", &shapes[0]);
	struct block *blk = open_disk("i", false), *other;
	struct error err = ERROR_INIT;
	struct block_image_info info;
	ck_assert_int_eq(try_open("i", false, &other, &err), -EBUSY);
	ck_ok(block_image_info(rig_path("i"), BLOCK_FORMAT_QCOW2, true, &info, &err), err);
	ck_assert_uint_eq(info.virtual_bytes, 64 * MiB);
	block_close(blk);
	block_close(open_disk("i", false));
	/* Nothing is left of the sockets. */
	DIR *d = opendir(rig_dir);
	for (struct dirent *e; (e = readdir(d));)
		ck_assert_msg(e->d_name[0] == '.' || strcmp(e->d_name, "i") == 0, "%s was left", e->d_name);
	closedir(d);
}
END_TEST

static void *open_in_thread(void *out)
{
	*(struct block **)out = open_disk("i", false);
	return NULL;
}

/* The parent death signal goes by thread: the one that opened the disk may end. */
START_TEST(test_opener_thread_may_end)
{
	create("i", &shapes[0]);
	struct block *blk = NULL;
	pthread_t thread;
	ck_assert_int_eq(pthread_create(&thread, NULL, open_in_thread, &blk), 0);
	pthread_join(thread, NULL);
	clock_sleep_ms(100);
	rig_fill(blk, 5, MiB, 0);
	ck_assert_int_eq(block_flush(blk), 0);
	rig_expect(blk, 5, MiB, 0);
	block_close(blk);
}
END_TEST

static void cut(const char *name, off_t size)
{
	ck_assert_int_eq(truncate(rig_path(name), size), 0);
}

START_TEST(test_truncated_is_refused)
{
	static const off_t sizes[] = {0, 3, 50, 100, 70000, 200 * 1024, 400 * 1024, 1500 * 1024};
	create("i", &shapes[0]);
	struct block *blk = open_disk("i", false);
	rig_fill(blk, 3, 4 * MiB, 0);
	block_close(blk);
	cut("i", sizes[_i]);
	struct error err = ERROR_INIT;
	struct block_image_info info;
	ck_assert_int_eq(try_open("i", false, &blk, &err), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.message, rig_path("i")));
	ck_assert_int_eq(block_image_info(rig_path("i"), BLOCK_FORMAT_QCOW2, false, &info, &err), -EINVAL);
	ck_assert_msg(strstr(err.message, "truncated") || strstr(err.message, "qemu-img check") ||
			      strstr(err.message, "not a qcow2"),
		      "%s", err.message);
}
END_TEST

static void patch(const char *name, off_t at, uint64_t value, int bytes)
{
	uint8_t raw[8];
	put_be64(raw, value << (64 - 8 * bytes));
	int fd = open(rig_path(name), O_WRONLY);
	ck_assert_int_eq(pwrite(fd, raw, (size_t)bytes, at), bytes);
	close(fd);
}

START_TEST(test_foreign_references_are_refused)
{
	struct block *blk;
	struct error err = ERROR_INIT;
	struct block_image_info info;
	create("backing", &shapes[0]);
	patch("backing", 8, 512, 8); /* a backing file's name, whatever it says there */
	patch("backing", 16, 8, 4);
	ck_assert_int_eq(try_open("backing", false, &blk, &err), -ENOTSUP);
	ck_assert_ptr_nonnull(strstr(err.message, "backing file"));
	ck_ok(block_image_info(rig_path("backing"), BLOCK_FORMAT_QCOW2, false, &info, &err), err);
	ck_assert(info.has_backing);
	create("data", &shapes[0]);
	patch("data", 72, 4, 8);
	ck_assert_int_eq(try_open("data", false, &blk, &err), -ENOTSUP);
	ck_assert_ptr_nonnull(strstr(err.message, "external data file"));
	create("crypt", &shapes[0]);
	patch("crypt", 32, 1, 4);
	ck_assert_int_eq(try_open("crypt", false, &blk, &err), -ENOTSUP);
	create("corrupt", &shapes[0]);
	patch("corrupt", 72, 2, 8);
	ck_assert_int_eq(try_open("corrupt", false, &blk, &err), -EINVAL);
	ck_assert_int_eq(block_image_info(rig_path("corrupt"), BLOCK_FORMAT_QCOW2, false, &info, &err),
			 -EINVAL);
	create("future", &shapes[0]);
	patch("future", 72, 1ull << 40, 8);
	ck_assert_int_eq(try_open("future", false, &blk, &err), -EINVAL);
	create("cluster", &shapes[0]);
	patch("cluster", 20, 63, 4);
	ck_assert_int_eq(try_open("cluster", false, &blk, &err), -EINVAL);
	struct block_open_options opt = {.format = BLOCK_FORMAT_QCOW2};
	ck_assert_int_eq(block_open(rig_path("crypt"), &opt, &blk, &err), -EINVAL); /* no run_dir */
}
END_TEST

/* A tool that is not there is an error that names it. */
START_TEST(test_tool_missing)
{
	create("i", &shapes[0]);
	struct block *blk;
	struct error err = ERROR_INIT;
	setenv("PATH", "/nonexistent", 1);
	ck_assert_int_eq(try_open("i", false, &blk, &err), -ENOENT);
	ck_assert_ptr_nonnull(strstr(err.message, "qemu-img"));
}
END_TEST

static void find_child(char *out, size_t size)
{
	char path[64];
	out[0] = '\0';
	DIR *d = opendir("/proc/self/task");
	for (struct dirent *e; (e = readdir(d));) {
		snprintf(path, sizeof path, "/proc/self/task/%.20s/children", e->d_name);
		FILE *f = e->d_name[0] == '.' ? NULL : fopen(path, "r");
		if (f && !out[0] && !fgets(out, (int)size, f))
			out[0] = '\0';
		if (f)
			fclose(f);
	}
	closedir(d);
}

/* qemu-nbd dies under us: requests fail, close returns. */
START_TEST(test_server_dies)
{
	create("i", &shapes[0]);
	struct block *blk = open_disk("i", false);
	rig_fill(blk, 5, MiB, 0);
	char child[64];
	find_child(child, sizeof child);
	ck_assert_int_gt(atoi(child), 1);
	kill(atoi(child), SIGKILL);
	char buf[512];
	int rc = 0;
	for (int i = 0; i < 100 && rc == 0; i++)
		rc = block_pread(blk, buf, sizeof buf, 0);
	ck_assert_int_lt(rc, 0);
	ck_assert_int_lt(block_flush(blk), 0);
	block_close(blk);
	block_close(open_disk("i", false));
}
END_TEST

/*
 * Half a cluster is written while sectors of the other half are zeroed and may be unmapped: QEMU's driver
 * loses the cluster's place in the file then (block/cluster_order.h), and without the order kept there this
 * fails.
 */
#define CLUSTER UINT64_C(65536)
#define PAIRS	8 /* clusters, all at a time */

struct waiting {
	pthread_mutex_t lock;
	pthread_cond_t cond;
	unsigned left;
	int failed;
};

static void one_done(struct block_request *req, int result)
{
	struct waiting *w = req->opaque;
	pthread_mutex_lock(&w->lock);
	w->failed = w->failed ? w->failed : result;
	if (--w->left == 0)
		pthread_cond_signal(&w->cond);
	pthread_mutex_unlock(&w->lock);
}

START_TEST(test_zeroing_and_writing_share_a_cluster)
{
	static unsigned char data[CLUSTER / 2];
	struct waiting w = {.lock = PTHREAD_MUTEX_INITIALIZER, .cond = PTHREAD_COND_INITIALIZER};
	create("i", &shapes[0]);
	struct block *blk = open_disk("i", _i);
	rig_fill(blk, 0xee, PAIRS * CLUSTER, 0);
	memset(data, 0x11, sizeof data);
	for (unsigned round = 0; round < 40; round++) {
		/* zero, with its place kept */
		ck_assert_int_eq(block_zero(blk, 0, PAIRS * CLUSTER, 0), 0);
		struct block_request reqs[2 * PAIRS];
		struct iovec iov[PAIRS];
		for (unsigned i = 0; i < PAIRS; i++)
			iov[i] = (struct iovec){.iov_base = data, .iov_len = sizeof data};
		w.left = 2 * PAIRS;
		for (unsigned i = 0; i < 2 * PAIRS; i++) {
			bool write = (i ^ round) & 1;
			reqs[i] = (struct block_request){.op = write ? BLOCK_WRITE : BLOCK_WRITE_ZEROES,
							 .flags = write ? 0 : BLOCK_REQ_MAY_UNMAP,
							 .offset_bytes =
								 i / 2 * CLUSTER + (write ? 0 : CLUSTER / 2),
							 .len_bytes = write ? sizeof data : 4096,
							 .iov = &iov[i / 2],
							 .niov = write,
							 .done = one_done,
							 .opaque = &w};
			ck_assert_int_eq(block_submit(blk, &reqs[i]), 0);
		}
		pthread_mutex_lock(&w.lock);
		while (w.left)
			pthread_cond_wait(&w.cond, &w.lock);
		pthread_mutex_unlock(&w.lock);
		ck_assert_int_eq(w.failed, 0);
		/* whoever gets a lost place writes into it */
		rig_fill(blk, 0x22, PAIRS * CLUSTER, (1 + round % 4) * MiB);
		for (unsigned i = 0; i < PAIRS; i++) {
			rig_expect(blk, 0x11, CLUSTER / 2, i * CLUSTER);
			rig_expect(blk, 0, CLUSTER / 2, i * CLUSTER + CLUSTER / 2);
		}
		ck_assert_int_eq(block_discard(blk, (1 + round % 4) * MiB, PAIRS * CLUSTER), 0);
	}
	block_close(blk);
	char command[200];
	snprintf(command, sizeof command, "qemu-img check -q -f qcow2 %s >&2", rig_path("i"));
	ck_assert_int_eq(system(command), 0);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("qcow2");
	TCase *t = tcase_create("qcow2");
	tcase_add_checked_fixture(t, rig_setup, rig_teardown);
	tcase_set_timeout(t, 60);
	tcase_add_loop_test(t, test_create_keeps_shape, 0, 5);
	tcase_add_loop_test(t, test_contents_survive, 0, 5);
	tcase_add_test(t, test_lock_and_in_use);
	tcase_add_test(t, test_opener_thread_may_end);
	tcase_add_loop_test(t, test_truncated_is_refused, 0, 8);
	tcase_add_test(t, test_foreign_references_are_refused);
	tcase_add_test(t, test_tool_missing);
	tcase_add_test(t, test_server_dies);
	tcase_add_loop_test(t, test_zeroing_and_writing_share_a_cluster, 0, 2);
	suite_add_tcase(s, t);
	return rig_main(s);
}
