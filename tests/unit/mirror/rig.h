/* SPDX-License-Identifier: Apache-2.0 */
/* Two real image files, the mirror between them, and a guest's requests. */
#ifndef TESTS_UNIT_MIRROR_RIG_H
#define TESTS_UNIT_MIRROR_RIG_H

#include <fcntl.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "block/open.h"
#include "mirror/mirror.h"
#include "nbd/nbd.h"
#include "net/conn.h"
#include "tests/unit/mirror/faulty.h"

#define KIB	   UINT64_C(1024)
#define MIB	   (UINT64_C(1024) * 1024)
#define PATIENT_MS 20000 /* a grace that no busy machine exceeds */

struct rig {
	char dir[64], local_path[96], remote_path[96];
	uint64_t size;
	bool in_memory; /* the files: set before rig_files */
	bool over_nbd, direct;
	struct faulty *local, *remote;
	struct block *remote_disk; /* over NBD: behind the server */
	struct nbd_server *server;
	struct mirror *m;
	struct block *top;
	atomic_uint failed;
	int failed_code;
};

/* The thread sanitizer does not see that the kernel orders a ring's submission before its completion. */
#if defined(__SANITIZE_THREAD__)
#define RIG_NO_RING true
#else
#define RIG_NO_RING false
#endif

static inline void rig_make_file(const char *path, uint64_t size)
{
	int fd = open(path, O_RDWR | O_CREAT | O_EXCL, 0600);
	ck_assert_int_ge(fd, 0);
	ck_assert_int_eq(ftruncate(fd, (off_t)size), 0);
	close(fd);
}

static inline void rig_fill(const char *path, uint64_t offset, uint64_t len, unsigned seed)
{
	int fd = open(path, O_WRONLY);
	ck_assert_int_ge(fd, 0);
	char *buf = malloc(len);
	for (uint64_t i = 0; i < len; i++)
		buf[i] = (char)(rand_r(&seed) >> 8);
	ck_assert_int_eq(pwrite(fd, buf, len, (off_t)offset), (ssize_t)len);
	free(buf);
	close(fd);
}

static inline struct block *rig_open(struct rig *r, const char *path, bool threads)
{
	struct block_open_options opt = {.format = BLOCK_FORMAT_RAW,
					 .direct = r->direct,
					 .no_io_uring = threads || RIG_NO_RING,
					 .label = "disk test"};
	struct error err = ERROR_INIT;
	struct block *b = NULL;
	ck_assert_msg(block_open(path, &opt, &b, &err) == 0, "%s", err.message);
	return b;
}

static inline void rig_files(struct rig *r, uint64_t size)
{
	const char *tmp = r->in_memory && access("/dev/shm", W_OK) == 0 ? "/dev/shm" : getenv("TMPDIR");
	snprintf(r->dir, sizeof r->dir, "%.40s/mirror.XXXXXX", tmp && strlen(tmp) < 40 ? tmp : "/tmp");
	ck_assert_ptr_nonnull(mkdtemp(r->dir));
	snprintf(r->local_path, sizeof r->local_path, "%s/local", r->dir);
	snprintf(r->remote_path, sizeof r->remote_path, "%s/remote", r->dir);
	r->size = size;
	atomic_init(&r->failed, 0);
	rig_make_file(r->local_path, size);
	rig_make_file(r->remote_path, size);
}

static inline void rig_open_local(struct rig *r)
{
	struct error err = ERROR_INIT;
	r->local = faulty_create(rig_open(r, r->local_path, false), "disk local");
	r->local->count_overlaps = false; /* without a session they are the guest's own business */
	ck_assert_msg(mirror_create(&r->local->block, &r->m, &r->top, &err) == 0, "%s", err.message);
}

static inline void rig_open_remote(struct rig *r)
{
	struct block *b = rig_open(r, r->remote_path, true);
	if (r->over_nbd) {
		struct error err = ERROR_INIT;
		int sv[2];
		ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sv), 0);
		r->remote_disk = b;
		struct nbd_server_options so = {.export_name = "", .block = b};
		ck_assert_msg(nbd_server_create(&so, &r->server, &err) == 0, "%s", err.message);
		struct conn *conn = NULL;
		ck_assert_msg(conn_from_fd(sv[0], &conn, &err) == 0, "%s", err.message);
		ck_assert_msg(nbd_server_add(r->server, conn, &err) == 0, "%s", err.message);
		struct nbd_client_options co = {.export_name = "", .label = "nbd"};
		ck_assert_msg(nbd_client_open(&sv[1], 1, &co, &b, &err) == 0, "%s", err.message);
	}
	r->remote = faulty_create(b, "disk remote");
}

/* After the mirror closed the client. */
static inline void rig_remote_gone(struct rig *r)
{
	r->remote = NULL;
	if (!r->server)
		return;
	nbd_server_free(r->server);
	block_close(r->remote_disk);
	r->server = NULL;
}

static inline void rig_failed(void *opaque, const struct error *err)
{
	struct rig *r = opaque;
	r->failed_code = err->code;
	atomic_fetch_add(&r->failed, 1);
}

static inline struct mirror_options rig_options(struct rig *r)
{
	return (struct mirror_options){.remote = &r->remote->block,
				       .remote_is_zero = true,
				       .chunk_bytes = 64 * 1024,
				       .write_grace_ms = PATIENT_MS,
				       .failed = rig_failed,
				       .opaque = r};
}

static inline void rig_start(struct rig *r, const struct mirror_options *opt)
{
	struct error err = ERROR_INIT;
	ck_assert_msg(mirror_start(r->m, opt, &err) == 0, "%s", err.message);
}

static inline void rig_wait_synced(struct rig *r)
{
	struct error err = ERROR_INIT;
	ck_assert_msg(mirror_wait_synced(r->m, 50000, &err) == 0, "%s", err.message);
}

static inline void rig_stop(struct rig *r)
{
	mirror_stop(r->m);
	if (r->remote)
		rig_remote_gone(r);
}

static inline void rig_close(struct rig *r)
{
	rig_stop(r);
	mirror_free(r->m);
	block_close(&r->local->block);
	r->m = NULL;
}

static inline char *rig_read_file(const char *path, uint64_t size)
{
	char *buf = malloc(size);
	int fd = open(path, O_RDONLY);
	ck_assert_int_ge(fd, 0);
	ck_assert_int_eq(pread(fd, buf, size, 0), (ssize_t)size);
	close(fd);
	return buf;
}

static inline void rig_assert_equal(struct rig *r)
{
	char *a = rig_read_file(r->local_path, r->size), *b = rig_read_file(r->remote_path, r->size);
	uint64_t i = 0;
	if (memcmp(a, b, r->size))
		while (a[i] == b[i])
			i++;
	else
		i = r->size;
	ck_assert_msg(i == r->size, "sides differ first at %llu (chunk %llu): %02x here, %02x there",
		      (unsigned long long)i, (unsigned long long)(i / (64 * 1024)),
		      (unsigned char)(i < r->size ? a[i] : 0), (unsigned char)(i < r->size ? b[i] : 0));
	free(a);
	free(b);
}

static inline uint64_t rig_allocated(const char *path)
{
	struct stat st;
	ck_assert_int_eq(stat(path, &st), 0);
	return (uint64_t)st.st_blocks * 512;
}

static inline void rig_remove(struct rig *r)
{
	unlink(r->local_path);
	unlink(r->remote_path);
	rmdir(r->dir);
}

/* --- one guest request, asynchronous --- */
struct guest_io {
	struct block_request req;
	struct iovec iov[2];
	uint8_t *buf;
	pthread_mutex_t lock;
	pthread_cond_t cond;
	bool done;
	int result;
	uint64_t done_ns;
};

static __thread bool rig_in_submit;

static inline void guest_done(struct block_request *req, int result)
{
	struct guest_io *io = req->opaque;
	ck_assert_msg(!rig_in_submit, "done() from inside submit");
	pthread_mutex_lock(&io->lock);
	ck_assert_msg(!io->done, "done() twice");
	io->done = true;
	io->result = result;
	io->done_ns = clock_now_ns();
	pthread_cond_broadcast(&io->cond);
	pthread_mutex_unlock(&io->lock);
}

static inline void guest_submit(struct guest_io *io, struct block *top, enum block_op op, unsigned flags,
				uint64_t offset, uint64_t len, int byte)
{
	memset(io, 0, sizeof *io);
	pthread_mutex_init(&io->lock, NULL);
	pthread_cond_init(&io->cond, NULL);
	io->req = (struct block_request){.op = op,
					 .flags = flags,
					 .offset_bytes = op == BLOCK_FLUSH ? 0 : offset,
					 .len_bytes = op == BLOCK_FLUSH ? 0 : len,
					 .done = guest_done,
					 .opaque = io};
	if (op == BLOCK_WRITE || op == BLOCK_READ) {
		void *mem = NULL;
		ck_assert_int_eq(posix_memalign(&mem, 4096, len), 0);
		io->buf = mem;
		memset(io->buf, byte, len);
		io->iov[0] = (struct iovec){.iov_base = io->buf, .iov_len = len > 512 ? 512 : len};
		io->iov[1] = (struct iovec){.iov_base = io->buf + 512, .iov_len = len > 512 ? len - 512 : 0};
		io->req.iov = io->iov;
		io->req.niov = len > 512 ? 2 : 1;
	}
	rig_in_submit = true;
	int rc = block_submit(top, &io->req);
	rig_in_submit = false;
	ck_assert_int_eq(rc, 0);
}

static inline bool guest_is_done(struct guest_io *io)
{
	pthread_mutex_lock(&io->lock);
	bool done = io->done;
	pthread_mutex_unlock(&io->lock);
	return done;
}

static inline int guest_wait(struct guest_io *io)
{
	pthread_mutex_lock(&io->lock);
	while (!io->done)
		pthread_cond_wait(&io->cond, &io->lock);
	int rc = io->result;
	pthread_mutex_unlock(&io->lock);
	free(io->buf);
	io->buf = NULL;
	pthread_mutex_destroy(&io->lock);
	pthread_cond_destroy(&io->cond);
	return rc;
}

static inline int guest_do(struct block *top, enum block_op op, uint64_t offset, uint64_t len, int byte)
{
	struct guest_io io;
	guest_submit(&io, top, op, 0, offset, len, byte);
	return guest_wait(&io);
}

#define rig_eventually(cond)                                                                                 \
	do {                                                                                                 \
		uint64_t until_ = clock_now_ms() + 20000;                                                    \
		while (!(cond) && clock_now_ms() < until_)                                                   \
			clock_sleep_ms(1);                                                                   \
		ck_assert_msg(cond, "never: %s", #cond);                                                     \
	} while (0)

#endif
