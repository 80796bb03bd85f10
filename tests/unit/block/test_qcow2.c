/* SPDX-License-Identifier: Apache-2.0 */
/* qcow2 through qemu-nbd and qemu-img: shape, contents, locks, and what must be refused. */
#include <check.h>
#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "block/qcow2_header.h"
#include "tests/suite.h"
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
	{.format = BLOCK_FORMAT_QCOW2,
	 .virtual_bytes = 64 * MiB,
	 .cluster_bytes = 16384,
	 .compat = "1.1",
	 .extended_l2 = true,
	 .lazy_refcounts = true,
	 .zstd = true,
	 .refcount_bits = 64},
};
#define NSHAPES ((int)ARRAY_SIZE(shapes))

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
	ck_assert_uint_eq(got.refcount_bits, like->refcount_bits ? like->refcount_bits : 16);
	ck_assert_int_eq(got.zstd, like->zstd);
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
	ck_assert_uint_eq(copy.refcount_bits, got.refcount_bits);
	ck_assert_int_eq(copy.zstd, got.zstd);
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
	patch("backing", 512, 0x2f6574632f706173, 8); /* a backing file's name, /etc/pas */
	patch("backing", 8, 512, 8);
	patch("backing", 16, 8, 4);
	ck_assert_int_eq(try_open("backing", false, &blk, &err), -ENOTSUP);
	ck_assert_ptr_nonnull(strstr(err.message, "has a backing file, /etc/pas, which"));
	ck_ok(block_image_info(rig_path("backing"), BLOCK_FORMAT_QCOW2, false, &info, &err), err);
	ck_assert(info.has_backing);
	ck_assert_str_eq(info.backing_name, "/etc/pas");
	patch("backing", 8, UINT64_MAX - 3, 8); /* its name is nowhere */
	ck_assert_int_eq(try_open("backing", false, &blk, &err), -EINVAL);
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

/* --- backing files --- */

static void create_over(const char *name, const char *below, enum block_format format,
			const struct block_image_info *like)
{
	struct block_image_info over = *like;
	snprintf(over.backing_name, sizeof over.backing_name, "%s", below);
	over.backing_format = format;
	create(name, &over);
}

static struct block *open_over(const char *name, const char *const *below, unsigned n, int want,
			       struct error *err)
{
	struct block *blk = NULL;
	struct block_open_options opt = {.format = BLOCK_FORMAT_QCOW2,
					 .label = "disk",
					 .run_dir = rig_dir,
					 .backing = below,
					 .nbacking = n};
	int rc = block_open(rig_path(name), &opt, &blk, err);
	ck_assert_msg(rc == want, "%d: %s", rc, err->message);
	return blk;
}

/* Three layers: raw, qcow2, qcow2. What each reads as, what is whose, and that those below are never written.
 */
START_TEST(test_chain)
{
	struct error err = ERROR_INIT;
	rig_file("base", 64 * MiB);
	struct block_open_options raw = {.format = BLOCK_FORMAT_RAW};
	struct block *blk;
	ck_ok(block_open(rig_path("base"), &raw, &blk, &err), err);
	rig_fill(blk, 1, 8 * MiB, 0);
	block_close(blk);
	create_over("mid", "/elsewhere/base", BLOCK_FORMAT_RAW, &shapes[_i]);
	char base[128], mid[128];
	snprintf(base, sizeof base, "%s", rig_path("base"));
	snprintf(mid, sizeof mid, "%s", rig_path("mid"));
	const char *const below[] = {mid, base};
	blk = open_over("mid", &below[1], 1, 0, &err);
	rig_fill(blk, 2, 2 * MiB, 2 * MiB);
	block_close(blk);
	create_over("top", "mid", BLOCK_FORMAT_QCOW2, &shapes[_i]);
	blk = open_over("top", below, 2, 0, &err);
	ck_assert_int_eq(block_discard(blk, 6 * MiB, 2 * MiB), 0);
	rig_fill(blk, 3, 4096, 4 * MiB);
	rig_fill(blk, 3, MiB, 16 * MiB);
	rig_expect(blk, 1, 2 * MiB, 0);
	rig_expect(blk, 2, 2 * MiB, 2 * MiB);
	rig_expect(blk, 3, 4096, 4 * MiB);
	rig_expect(blk, 1, 2 * MiB - 4096, 4 * MiB + 4096);
	rig_expect(blk, 0, 8 * MiB, 6 * MiB);
	uint64_t own = 0, at = 0;
	while (at < 32 * MiB) {
		struct block_extent x[16];
		unsigned n = 16;
		ck_ok(block_extents(blk, at, 32 * MiB - at, x, &n, &err), err);
		for (unsigned i = 0; i < n; i++) {
			own += x[i].backing ? 0 : x[i].len_bytes;
			at += x[i].len_bytes;
		}
	}
	/* the write at 4 MiB owns its cluster, or of it a piece with extended L2 */
	ck_assert_uint_ge(own, 3 * MiB + 4096);
	uint64_t cluster = shapes[_i].cluster_bytes;
	ck_assert_uint_le(own, 2 * MiB + (cluster > MiB ? cluster : MiB) + cluster);
	/* others may have what is below as theirs, nobody may write it */
	struct block *other;
	ck_assert_int_eq(block_open(base, &raw, &other, &err), -EBUSY);
	struct block_open_options ro = {.format = BLOCK_FORMAT_RAW, .read_only = true, .as_backing = true};
	struct block *reader;
	ck_ok(block_open(base, &ro, &reader, &err), err);
	create_over("second", "mid", BLOCK_FORMAT_QCOW2, &shapes[_i]);
	other = open_over("second", below, 2, 0, &err);
	block_close(reader);
	rig_expect(other, 0x01, 2 * MiB, 4 * MiB);
	block_close(other);
	block_close(blk);
	ck_ok(block_open(base, &raw, &blk, &err), err);
	rig_expect(blk, 1, 8 * MiB, 0);
	rig_expect(blk, 0, 56 * MiB, 8 * MiB);
	block_close(blk);
}
END_TEST

START_TEST(test_chain_is_the_definitions)
{
	struct error err = ERROR_INIT;
	create("base", &shapes[0]);
	create_over("top", "/images/base", BLOCK_FORMAT_QCOW2, &shapes[0]);
	char base[128], other[128];
	snprintf(base, sizeof base, "%s", rig_path("base"));
	const char *const below[] = {base, base};
	block_close(open_over("top", below, 1, 0, &err));
	open_over("top", NULL, 0, -ENOTSUP, &err);
	ck_assert_ptr_nonnull(strstr(err.message, "/images/base, which the definition does not name"));
	open_over("top", below, 2, -EINVAL, &err);
	ck_assert_ptr_nonnull(strstr(err.message, "has no backing file"));
	create("other", &shapes[0]);
	snprintf(other, sizeof other, "%s", rig_path("other"));
	const char *const wrong[] = {other};
	open_over("top", wrong, 1, -EINVAL, &err);
	ck_assert_ptr_nonnull(strstr(err.message, "rebase -u"));
	ck_assert_int_eq(truncate(base, 70000), 0);
	open_over("top", below, 1, -EINVAL, &err);
	ck_assert_ptr_nonnull(strstr(err.message, base));
	ck_assert_int_eq(unlink(base), 0);
	open_over("top", below, 1, -ENOENT, &err);
	ck_assert_ptr_nonnull(strstr(err.message, base));
}
END_TEST

static bool stop_now(void *opaque)
{
	return true;
}

/* The same content in any format has the same hash; one byte more makes another. */
START_TEST(test_content_hash)
{
	struct error err = ERROR_INIT;
	char hex[3][BLOCK_CONTENT_HEX_CHARS + 1];
	struct block_open_options raw = {.format = BLOCK_FORMAT_RAW};
	rig_file("r", 64 * MiB);
	create("q", &shapes[0]);
	for (int i = 0; i < 2; i++) {
		struct block *blk;
		if (i)
			blk = open_disk("q", true);
		else
			ck_ok(block_open(rig_path("r"), &raw, &blk, &err), err);
		rig_fill(blk, 7, 100000 / 512 * 512, 5 * MiB + 512);
		if (i) /* zeroes that are there */
			rig_fill(blk, 0, 3 * MiB, 40 * MiB);
		ck_ok(block_content_hash(blk, NULL, NULL, hex[i], &err), err);
		if (i) {
			rig_fill(blk, 1, 512, 64 * MiB - 512);
			ck_ok(block_content_hash(blk, NULL, NULL, hex[2], &err), err);
			ck_assert_int_eq(block_content_hash(blk, stop_now, NULL, hex[2], &err), -ECANCELED);
		}
		block_close(blk);
	}
	ck_assert_uint_eq(strlen(hex[0]), BLOCK_CONTENT_HEX_CHARS);
	ck_assert_str_eq(hex[0], hex[1]);
	ck_assert_str_ne(hex[0], hex[2]);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("qcow2");
	TCase *t = tcase_create("qcow2");
	tcase_add_checked_fixture(t, rig_setup, rig_teardown);
	tcase_set_timeout(t, 60);
	tcase_add_loop_test(t, test_create_keeps_shape, 0, NSHAPES);
	tcase_add_loop_test(t, test_contents_survive, 0, NSHAPES);
	tcase_add_test(t, test_lock_and_in_use);
	tcase_add_test(t, test_opener_thread_may_end);
	tcase_add_loop_test(t, test_truncated_is_refused, 0, 8);
	tcase_add_test(t, test_foreign_references_are_refused);
	tcase_add_test(t, test_tool_missing);
	tcase_add_test(t, test_server_dies);
	tcase_add_loop_test(t, test_zeroing_and_writing_share_a_cluster, 0, 2);
	tcase_add_loop_test(t, test_chain, 2, 5);
	tcase_add_test(t, test_chain_is_the_definitions);
	tcase_add_test(t, test_content_hash);
	suite_add_tcase(s, t);
	return suite_run(s);
}
