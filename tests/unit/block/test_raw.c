/* SPDX-License-Identifier: Apache-2.0 */
/* The raw driver: each test runs with io_uring and with threads, buffered and direct. */
#include <check.h>
#include <errno.h>
#include <linux/fs.h>
#include <linux/loop.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <sys/wait.h>

#include "base/clock.h"
#include "tests/suite.h"
#include "tests/unit/block/rig.h"

#define MiB (UINT64_C(1) << 20)

static struct block_open_options engine(int i)
{
	return (struct block_open_options){
		.format = BLOCK_FORMAT_RAW, .no_io_uring = i & 1, .direct = i & 2, .label = "disk"};
}

static struct block *open_disk(const char *path, int i)
{
	struct block_open_options opt = engine(i);
	struct block *blk = NULL;
	struct error err = ERROR_INIT;
	ck_ok(block_open(path, &opt, &blk, &err), err);
	return blk;
}

START_TEST(test_write_then_read)
{
	rig_file("d", 16 * MiB);
	struct block *blk = open_disk(rig_path("d"), _i);
	ck_assert_uint_eq(blk->size_bytes, 16 * MiB);
	rig_fill(blk, 1, 4 * MiB, 0);
	rig_fill(blk, 2, 512, 512);
	rig_fill(blk, 3, 4096, 16 * MiB - 4096);
	rig_expect(blk, 1, 512, 0);
	rig_expect(blk, 2, 512, 512);
	rig_expect(blk, 1, 4 * MiB - 1024, 1024);
	rig_expect(blk, 0, 12 * MiB - 4096, 4 * MiB);
	rig_expect(blk, 3, 4096, 16 * MiB - 4096);
	ck_assert_int_eq(block_flush(blk), 0);
	block_close(blk);
}
END_TEST

/* Byte offsets and lengths, and buffers at odd addresses: what O_DIRECT needs is the driver's business. */
START_TEST(test_unaligned)
{
	unsigned char model[40000], buf[40000 + 64];
	rig_file("d", sizeof model / 512 * 512 + 512);
	struct block *blk = open_disk(rig_path("d"), _i);
	memset(model, 0, sizeof model);
	unsigned seed = 7;
	for (int n = 0; n < 300; n++) {
		size_t off = (size_t)rand_r(&seed) % sizeof model, len = 1 + (size_t)rand_r(&seed) % 9000;
		if (len > sizeof model - off)
			len = sizeof model - off;
		unsigned char *odd = buf + rand_r(&seed) % 64;
		switch (rand_r(&seed) % 4) {
		case 0:
			ck_assert_int_eq(block_zero(blk, off, len, n & 1 ? BLOCK_REQ_MAY_UNMAP : 0), 0);
			memset(model + off, 0, len);
			break;
		case 1:
			ck_assert_int_eq(block_pread(blk, odd, len, off), 0);
			ck_assert_mem_eq(odd, model + off, len);
			break;
		default:
			for (size_t i = 0; i < len; i++)
				odd[i] = (unsigned char)rand_r(&seed);
			ck_assert_int_eq(block_pwrite(blk, odd, len, off), 0);
			memcpy(model + off, odd, len);
		}
	}
	ck_assert_int_eq(block_pread(blk, buf, sizeof model, 0), 0);
	ck_assert_mem_eq(buf, model, sizeof model);
	block_close(blk);
}
END_TEST

struct many {
	struct block_request req;
	struct iovec iov[3];
	unsigned char *buf;
	atomic_uint *left;
	int result;
};

static void many_done(struct block_request *req, int result)
{
	struct many *m = req->opaque;
	m->result = result;
	atomic_fetch_sub(m->left, 1);
}

/* More requests than the ring has entries, of several pieces each, all in flight together. */
START_TEST(test_many_in_flight)
{
	enum { N = 1000, LEN = 6144 };
	rig_file("d", (uint64_t)N * LEN);
	struct block *blk = open_disk(rig_path("d"), _i);
	struct many *m = calloc(N, sizeof *m);
	for (int pass = 0; pass < 2; pass++) {
		atomic_uint left = N;
		for (int i = 0; i < N; i++) {
			if (!m[i].buf)
				m[i].buf = malloc(LEN);
			memset(m[i].buf, pass ? 0xee : i & 0xff, LEN);
			m[i].left = &left;
			m[i].iov[0] = (struct iovec){m[i].buf, 1};
			m[i].iov[1] = (struct iovec){m[i].buf + 1, 4095};
			m[i].iov[2] = (struct iovec){m[i].buf + 4096, LEN - 4096};
			m[i].req = (struct block_request){.op = pass ? BLOCK_READ : BLOCK_WRITE,
							  .flags = i % 50 ? 0 : BLOCK_REQ_FUA,
							  .offset_bytes = (uint64_t)i * LEN,
							  .len_bytes = LEN,
							  .iov = m[i].iov,
							  .niov = 3,
							  .done = many_done,
							  .opaque = &m[i]};
			ck_assert_int_eq(block_submit(blk, &m[i].req), 0);
		}
		while (atomic_load(&left))
			clock_sleep_ms(1);
		for (int i = 0; i < N; i++) {
			ck_assert_int_eq(m[i].result, 0);
			int b = 0;
			while (b < LEN && m[i].buf[b] == (i & 0xff))
				b++;
			ck_assert_int_eq(b, LEN);
		}
	}
	block_close(blk);
	for (int i = 0; i < N; i++)
		free(m[i].buf);
	free(m);
}
END_TEST

struct single {
	struct block_request req;
	struct iovec iov;
	pthread_t thread; /* that answered it */
	atomic_int result;
};

static void single_done(struct block_request *req, int result)
{
	struct single *s = req->opaque;
	s->thread = pthread_self();
	atomic_store(&s->result, result);
}

/* On an idle disk: true if the submitter itself answered it. */
static bool answered_at_once(struct block *blk, enum block_op op, unsigned flags, void *buf, size_t len)
{
	struct single s = {.iov = {buf, len}};
	atomic_init(&s.result, 1);
	s.req = (struct block_request){.op = op,
				       .flags = flags,
				       .len_bytes = len,
				       .iov = &s.iov,
				       .niov = 1,
				       .done = single_done,
				       .opaque = &s};
	ck_assert_int_eq(block_submit(blk, &s.req), 0);
	while (atomic_load(&s.result) == 1)
		clock_sleep_ms(1);
	ck_assert_int_eq(atomic_load(&s.result), 0);
	return pthread_equal(s.thread, pthread_self());
}

/* The one before is counted until a moment after its answer. */
static bool at_once_soon(struct block *blk, enum block_op op, void *buf)
{
	for (int i = 0; i < 100; i++) {
		if (answered_at_once(blk, op, BLOCK_REQ_MAY_WAIT, buf, 4096))
			return true;
		clock_sleep_ms(5);
	}
	return false;
}

/* Only who allows it is kept waiting, and not for long. */
START_TEST(test_at_once)
{
	rig_file("d", MiB);
	struct block *blk = open_disk(rig_path("d"), _i);
	unsigned char *buf = aligned_alloc(4096, 65536), *seen = aligned_alloc(4096, 65536);
	memset(buf, 0x5a, 65536);
	ck_assert(!answered_at_once(blk, BLOCK_WRITE, 0, buf, 4096));
	ck_assert(at_once_soon(blk, BLOCK_WRITE, buf));
	ck_assert(!answered_at_once(blk, BLOCK_WRITE, BLOCK_REQ_MAY_WAIT, buf, 65536));
	ck_assert(!answered_at_once(blk, BLOCK_WRITE, BLOCK_REQ_MAY_WAIT | BLOCK_REQ_FUA, buf, 4096));
	ck_assert(at_once_soon(blk, BLOCK_READ, seen));
	ck_assert_mem_eq(seen, buf, 4096);
	block_close(blk);
	free(buf);
	free(seen);
}
END_TEST

START_TEST(test_zero_and_discard)
{
	const char *path = rig_path("d");
	rig_file("d", 16 * MiB);
	struct block *blk = open_disk(path, _i);
	rig_fill(blk, 9, 16 * MiB, 0);
	ck_assert_int_eq(block_flush(blk), 0);
	uint64_t full = rig_allocated(path);
	ck_assert_int_eq(block_zero(blk, 1 * MiB, 2 * MiB, 0), 0);
	rig_expect(blk, 0, 2 * MiB, 1 * MiB);
	ck_assert_uint_ge(rig_allocated(path), full); /* without MAY_UNMAP nothing is given back; below, 64
							 KiB for the file system's own maps */
	ck_assert_int_eq(block_zero(blk, 4 * MiB, 2 * MiB, BLOCK_REQ_MAY_UNMAP | BLOCK_REQ_FUA), 0);
	rig_expect(blk, 0, 2 * MiB, 4 * MiB);
	ck_assert_uint_le(rig_allocated(path), full - 2 * MiB + 65536);
	ck_assert_int_eq(block_discard(blk, 8 * MiB, 2 * MiB), 0);
	rig_expect(blk, 0, 2 * MiB, 8 * MiB);
	ck_assert_uint_le(rig_allocated(path), full - 4 * MiB + 65536);
	rig_expect(blk, 9, 1 * MiB, 0);
	rig_expect(blk, 9, 1 * MiB, 3 * MiB);
	rig_expect(blk, 9, 2 * MiB, 6 * MiB);
	rig_expect(blk, 9, 6 * MiB, 10 * MiB);
	block_close(blk);
}
END_TEST

START_TEST(test_extents)
{
	rig_file("d", 64 * MiB);
	struct block *blk = open_disk(rig_path("d"), _i);
	struct block_extent ext[8];
	struct error err = ERROR_INIT;
	unsigned n = 8;
	ck_ok(block_extents(blk, 0, 64 * MiB, ext, &n, &err), err);
	ck_assert_uint_eq(n, 1);
	ck_assert(ext[0].hole && ext[0].zero && ext[0].len_bytes == 64 * MiB);
	rig_fill(blk, 1, MiB, 4 * MiB);
	rig_fill(blk, 1, MiB, 32 * MiB);
	n = 8;
	ck_ok(block_extents(blk, 0, 64 * MiB, ext, &n, &err), err);
	ck_assert_uint_eq(n, 5);
	static const struct block_extent want[5] = {{4 * MiB, true, true},
						    {1 * MiB, false, false},
						    {27 * MiB, true, true},
						    {1 * MiB, false, false},
						    {31 * MiB, true, true}};
	for (unsigned i = 0; i < n; i++)
		ck_assert(ext[i].len_bytes == want[i].len_bytes && ext[i].hole == want[i].hole &&
			  ext[i].zero == want[i].zero);
	n = 2;
	ck_ok(block_extents(blk, 4 * MiB + 512, 8 * MiB, ext, &n, &err), err);
	ck_assert_uint_eq(n, 2);
	ck_assert(!ext[0].hole && ext[0].len_bytes == MiB - 512);
	ck_assert(ext[1].hole && ext[1].len_bytes == 7 * MiB + 512);
	n = 8;
	ck_assert_int_eq(block_extents(blk, 64 * MiB, 512, ext, &n, &err), -EINVAL);
	block_close(blk);
}
END_TEST

/* A file of 1000 bytes is a disk of 1024: what lies beyond the file's end reads as zero. */
START_TEST(test_odd_file_size)
{
	rig_file("d", 1000);
	int fd = open(rig_path("d"), O_WRONLY);
	ck_assert_int_eq(pwrite(fd, "xxxxxxxxxx", 10, 990), 10);
	close(fd);
	struct block *blk = open_disk(rig_path("d"), _i);
	ck_assert_uint_eq(blk->size_bytes, 1024);
	rig_expect(blk, 'x', 10, 990);
	rig_expect(blk, 0, 24, 1000);
	rig_fill(blk, 'y', 512, 512);
	rig_expect(blk, 'y', 512, 512);
	ck_assert_int_eq(block_flush(blk), 0);
	block_close(blk);
	struct stat st;
	ck_assert_int_eq(stat(rig_path("d"), &st), 0);
	ck_assert_int_eq(st.st_size, 1024);
}
END_TEST

static int try(struct block *blk, enum block_op op, uint64_t offset, uint64_t len)
{
	static char buf[4096];
	struct iovec iov = {buf, len <= sizeof buf ? len : sizeof buf};
	struct block_request req = {
		.op = op, .offset_bytes = offset, .len_bytes = len, .iov = &iov, .niov = 1};
	return block_submit(blk, &req); /* refused at once, so done is never called */
}

START_TEST(test_refuses)
{
	rig_file("d", MiB);
	struct block *blk = open_disk(rig_path("d"), _i);
	ck_assert_int_eq(try(blk, BLOCK_WRITE, MiB, 512), -ENOSPC);
	ck_assert_int_eq(try(blk, BLOCK_WRITE, MiB - 512, 1024), -ENOSPC);
	ck_assert_int_eq(try(blk, BLOCK_WRITE, UINT64_MAX - 511, 512), -ENOSPC);
	ck_assert_int_eq(try(blk, BLOCK_WRITE_ZEROES, MiB - 512, 1024), -ENOSPC);
	ck_assert_int_eq(try(blk, BLOCK_READ, MiB, 512), -EINVAL);
	ck_assert_int_eq(try(blk, BLOCK_READ, UINT64_MAX, 512), -EINVAL);
	ck_assert_int_eq(try(blk, BLOCK_DISCARD, 512, UINT64_MAX), -EINVAL);
	ck_assert_int_eq(try(blk, BLOCK_READ, 0, 0), -EINVAL);
	ck_assert_int_eq(try(blk, BLOCK_READ, 0, 8192), -EINVAL); /* the pieces do not sum up */
	block_close(blk);

	struct block_open_options opt = engine(_i);
	struct error err = ERROR_INIT;
	opt.read_only = true;
	ck_ok(block_open(rig_path("d"), &opt, &blk, &err), err);
	ck_assert_int_eq(try(blk, BLOCK_WRITE, 0, 512), -EPERM);
	ck_assert_int_eq(try(blk, BLOCK_DISCARD, 0, 512), -EPERM);
	ck_assert_int_eq(try(blk, BLOCK_WRITE_ZEROES, 0, 512), -EPERM);
	rig_expect(blk, 0, MiB, 0);
	ck_assert_int_eq(block_flush(blk), 0);
	block_close(blk);

	ck_assert_int_eq(block_open(rig_path("absent"), &opt, &blk, &err), -ENOENT);
	ck_assert_ptr_nonnull(strstr(err.message, "absent"));
	ck_assert_int_eq(block_open("/dev/null", &opt, &blk, &err), -EINVAL);
	ck_assert_int_eq(block_open(rig_dir, &opt, &blk, &err), -EINVAL);
}
END_TEST

/* Somebody cuts the file under us: what is gone is an error, neither zeroes nor a hole. */
START_TEST(test_cut_file_is_an_error)
{
	rig_file("d", 4 * MiB);
	struct block_open_options opt = engine(_i);
	struct block *blk;
	struct error err = ERROR_INIT;
	struct block_extent x[4];
	unsigned n = 4;
	ck_ok(block_open(rig_path("d"), &opt, &blk, &err), err);
	rig_fill(blk, 5, 4 * MiB, 0);
	ck_assert_int_eq(truncate(rig_path("d"), MiB + 8192), 0);
	char *buf = malloc(MiB);
	rig_expect(blk, 5, MiB, 0);
	ck_assert_int_eq(block_pread(blk, buf, MiB, MiB), -EIO);
	ck_assert_int_eq(block_pread(blk, buf, 4096, 3 * MiB), -EIO);
	ck_assert_int_eq(block_pread(blk, buf, 512, 3 * MiB + 512), -EIO);
	rig_expect(blk, 5, 8192, MiB);
	ck_ok(block_extents(blk, 2 * MiB, MiB, x, &n, &err), err);
	ck_assert_uint_ge(n, 1);
	ck_assert(!x[0].hole && !x[0].zero);
	free(buf);
	block_close(blk);
}
END_TEST

START_TEST(test_lock)
{
	rig_file("d", MiB);
	struct block_open_options opt = engine(_i), ro = engine(_i);
	ro.read_only = true;
	struct block *a, *b, *c;
	struct error err = ERROR_INIT;
	ck_ok(block_open(rig_path("d"), &opt, &a, &err), err);
	ck_assert_int_eq(block_open(rig_path("d"), &opt, &b, &err), -EBUSY);
	ck_assert_ptr_nonnull(strstr(err.message, rig_path("d")));
	ck_assert_int_eq(block_open(rig_path("d"), &ro, &b, &err), -EBUSY);
	block_close(a);
	/* At once, although a ring lives on in the kernel for a moment. */
	ck_ok(block_open(rig_path("d"), &ro, &a, &err), err);
	ck_ok(block_open(rig_path("d"), &ro, &b, &err), err);
	ck_assert_int_eq(block_open(rig_path("d"), &opt, &c, &err), -EBUSY);
	block_close(a);
	block_close(b);
}
END_TEST

/* A killed holder leaves the file to the next, whatever its ring was doing. */
START_TEST(test_lock_after_kill)
{
	rig_file("d", 64 * MiB);
	int p[2];
	ck_assert_int_eq(pipe(p), 0);
	pid_t pid = fork();
	if (pid == 0) {
		struct block *blk = open_disk(rig_path("d"), _i);
		if (write(p[1], "x", 1) != 1)
			_exit(1);
		for (;;)
			rig_fill(blk, 3, 16 * MiB, 0);
	}
	char x;
	ck_assert_int_eq(read(p[0], &x, 1), 1);
	clock_sleep_ms(20);
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	block_close(open_disk(rig_path("d"), _i));
	close(p[0]);
	close(p[1]);
}
END_TEST

static int loop_fd = -1;
static char loop_path[32];

static bool loop_attach(const char **why)
{
	int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
	if (control < 0) {
		*why = "no /dev/loop-control that we may use";
		return false;
	}
	int file = open(rig_path("backing"), O_RDWR | O_CLOEXEC);
	ck_assert_int_ge(file, 0);
	bool ok = false;
	for (int tries = 0; !ok && tries < 5; tries++) {
		int nr = ioctl(control, LOOP_CTL_GET_FREE);
		if (nr < 0)
			break;
		snprintf(loop_path, sizeof loop_path, "/dev/loop%d", nr);
		loop_fd = open(loop_path, O_RDWR | O_CLOEXEC);
		if (loop_fd < 0)
			break;
		struct loop_config config = {
			.fd = (unsigned)file, .block_size = 512, .info.lo_flags = LO_FLAGS_AUTOCLEAR};
		ok = ioctl(loop_fd, LOOP_CONFIGURE, &config) == 0;
		if (!ok) {
			close(loop_fd);
			loop_fd = -1;
		}
	}
	close(file);
	close(control);
	*why = "no loop device can be set up";
	return ok;
}

START_TEST(test_loop_device)
{
	rig_file("backing", 32 * MiB);
	const char *why;
	if (!loop_attach(&why)) {
		printf("skipped: block device: %s\n", why);
		return;
	}
	struct block *blk = open_disk(loop_path, _i);
	ck_assert_uint_eq(blk->size_bytes, 32 * MiB);
	rig_fill(blk, 5, 32 * MiB, 0);
	rig_fill(blk, 6, 100, 1000);
	rig_expect(blk, 6, 100, 1000);
	rig_expect(blk, 5, 1000, 0);
	ck_assert_int_eq(block_zero(blk, 1 * MiB, MiB, 0), 0);
	ck_assert_int_eq(block_zero(blk, 4 * MiB + 3, MiB, BLOCK_REQ_MAY_UNMAP), 0);
	ck_assert_int_eq(block_discard(blk, 8 * MiB, 4 * MiB), 0);
	ck_assert_int_eq(block_flush(blk), 0);
	rig_expect(blk, 0, MiB, 1 * MiB);
	rig_expect(blk, 5, 3, 4 * MiB);
	rig_expect(blk, 0, MiB, 4 * MiB + 3);
	rig_expect(blk, 5, 1000, 5 * MiB + 3);
	rig_expect(blk, 0, 4 * MiB, 8 * MiB);
	rig_expect(blk, 5, MiB, 12 * MiB);
	struct block_image_info info;
	struct error err = ERROR_INIT;
	ck_ok(block_image_info(loop_path, BLOCK_FORMAT_RAW, false, &info, &err), err);
	ck_assert(info.is_block_device && info.virtual_bytes == 32 * MiB && info.allocated_bytes == 0);
	block_close(blk);
	close(loop_fd); /* the last one out: LO_FLAGS_AUTOCLEAR detaches */
}
END_TEST

/* A disk that goes from one process to another while both have it open. */
START_TEST(test_shared)
{
	rig_file("d", MiB);
	struct block *here = open_disk(rig_path("d"), _i), *there = NULL;
	struct block_open_options opt = engine(_i);
	struct error err = ERROR_INIT;
	opt.shared = true;
	ck_ok(block_open(rig_path("d"), &opt, &there, &err), err);
	ck_assert(block_is_direct(there) == block_is_direct(here));
	rig_fill(here, 1, 4096, 0);
	/* it sees what the other one wrote, and writes nothing */
	char buf[4096] = {0};
	rig_expect(there, 1, 4096, 0);
	ck_assert_int_eq(block_pwrite(there, buf, sizeof buf, 0), -ESHUTDOWN);
	ck_assert_int_eq(block_zero(there, 0, 4096, 0), -ESHUTDOWN);
	ck_assert_int_eq(block_discard(there, 0, 4096), -ESHUTDOWN);
	ck_assert_int_eq(block_flush(there), 0);
	ck_assert_int_eq(block_share_lock(there, &err), -EBUSY);
	/* handed over */
	block_share_fence(here);
	block_share_unlock(here);
	ck_assert_int_eq(block_pwrite(here, buf, sizeof buf, 0), -ESHUTDOWN);
	ck_ok(block_share_lock(there, &err), err);
	ck_assert_int_eq(block_share_lock(here, &err), -EBUSY);
	block_share_unfence(there);
	rig_fill(there, 2, 4096, 8192);
	rig_expect(here, 2, 4096, 8192);
	/* given up there, taken back here */
	block_close(there);
	ck_ok(block_share_lock(here, &err), err);
	block_share_unfence(here);
	rig_fill(here, 3, 4096, 0);
	block_close(here);
}
END_TEST

START_TEST(test_create)
{
	int dir = open(rig_dir, O_RDONLY | O_DIRECTORY);
	struct block_image_info like = {.format = BLOCK_FORMAT_RAW, .virtual_bytes = 1000 * MiB}, got;
	struct error err = ERROR_INIT;
	ck_ok(block_image_create(dir, "new", &like, &err), err);
	ck_ok(block_image_info(rig_path("new"), BLOCK_FORMAT_RAW, false, &got, &err), err);
	ck_assert_uint_eq(got.virtual_bytes, like.virtual_bytes);
	ck_assert_uint_eq(got.allocated_bytes, 0);
	struct stat st;
	ck_assert_int_eq(stat(rig_path("new"), &st), 0);
	ck_assert_uint_eq(st.st_mode & 07777, 0600);
	ck_assert_uint_eq(got.inode, st.st_ino);
	ck_assert_int_eq(block_image_create(dir, "new", &like, &err), -EEXIST);
	ck_assert_int_eq(block_image_create(dir, "../new2", &like, &err), -EINVAL);
	ck_assert_int_eq(block_image_create(dir, "..", &like, &err), -EINVAL);
	ck_assert_int_eq(block_image_create(dir, "", &like, &err), -EINVAL);
	ck_assert_int_eq(symlink("elsewhere", rig_path("link")), 0);
	ck_assert_int_eq(block_image_create(dir, "link", &like, &err), -EEXIST);
	like.virtual_bytes = INT64_MAX; /* more than the file system takes */
	ck_assert_int_lt(block_image_create(dir, "huge", &like, &err), 0);
	ck_assert_int_ne(access(rig_path("huge"), F_OK), 0);
	close(dir);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("raw");
	TCase *t = tcase_create("raw");
	tcase_add_checked_fixture(t, rig_setup, rig_teardown);
	tcase_set_timeout(t, 60);
	tcase_add_loop_test(t, test_write_then_read, 0, 4);
	tcase_add_loop_test(t, test_unaligned, 0, 4);
	tcase_add_loop_test(t, test_many_in_flight, 0, 4);
	tcase_add_loop_test(t, test_at_once, 0, 4);
	tcase_add_loop_test(t, test_zero_and_discard, 0, 4);
	tcase_add_loop_test(t, test_extents, 0, 4);
	tcase_add_loop_test(t, test_odd_file_size, 0, 4);
	tcase_add_loop_test(t, test_refuses, 0, 4);
	tcase_add_loop_test(t, test_lock, 0, 4);
	tcase_add_loop_test(t, test_cut_file_is_an_error, 0, 4);
	tcase_add_loop_test(t, test_lock_after_kill, 0, 4);
	tcase_add_loop_test(t, test_loop_device, 0, 4);
	tcase_add_loop_test(t, test_shared, 0, 4);
	tcase_add_test(t, test_create);
	suite_add_tcase(s, t);
	return suite_run(s);
}
