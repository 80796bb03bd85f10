/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qcow2: a qemu-nbd child holds the image, our NBD client drives it. The child gets the image as a descriptor
 * that we opened and locked, and its listening socket by socket activation: the socket's name is gone from
 * the file system before anybody else could connect, and no name of a user's ever reaches QEMU's parsers.
 */
#include "block/qcow2.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/cond.h"
#include "base/confine.h"
#include "base/log.h"
#include "block/chain.h"
#include "block/child.h"
#include "block/cluster_order.h"
#include "block/raw.h"
#include "nbd/nbd.h"

#define REQUEST_TIMEOUT_MS 60000 /* a local disk under load, not a network */
#define EXIT_TIMEOUT_S	   30	 /* writing the caches back */
#define KILL_TIMEOUT_S	   5

struct qcow2_disk {
	struct block block; /* first */
	struct block *nbd;
	struct cluster_order order; /* over nbd, once that is open */
	struct image_chain chain;   /* holds the locks */
	/* PR_SET_PDEATHSIG goes by thread: this one starts the child and stays as long as it. */
	pthread_t keeper;
	bool has_keeper;
	pthread_mutex_t lock; /* what follows */
	pthread_cond_t changed;
	pid_t pid; /* 0: not yet, or reaped */
	bool started, exited;
	int wait_status;
	struct error start_error;
	char complaint[256];
	/* for the keeper's start */
	int listen_fd;
	bool read_only;
};

static int start_child(struct qcow2_disk *disk, int err_fd, pid_t *pid, struct error *err)
{
	const struct image_chain *chain = &disk->chain;
	const char *argv[12];
	char image[CHAIN_TEXT_BYTES];
	unsigned n = 0;
	chain_describe(chain, 4, image);
	argv[n++] = "qemu-nbd";
	argv[n++] = "--shared=1";
	argv[n++] = "--discard=unmap";
	argv[n++] = "--detect-zeroes=off";
	argv[n++] = chain->direct ? "--cache=none" : "--cache=writeback";
	argv[n++] = chain->direct ? "--aio=native" : "--aio=threads";
	if (disk->read_only)
		argv[n++] = "--read-only";
	if (chain->nlayers > 1)
		argv[n++] = "--allocation-depth";
	argv[n++] = image;
	argv[n] = NULL;
	int fds[2 + BLOCK_BACKING_MAX] = {disk->listen_fd};
	for (unsigned i = 0; i < chain->nlayers; i++)
		fds[1 + i] = chain->layers[i].fd;
	struct child_spec spec = {.tool = "qemu-nbd",
				  .argv = argv,
				  .fds = fds,
				  .nfds = 1 + chain->nlayers,
				  .listen_fd = true,
				  .out_fd = -1,
				  .err_fd = err_fd};
	return child_spawn(&spec, pid, err);
}

static void *keeper_main(void *arg)
{
	struct qcow2_disk *disk = arg;
	pthread_setname_np(pthread_self(), "qemu-nbd-keeper");
	confine_self(CONFINE_PROCESS);
	int errs[2] = {-1, -1};
	struct error err = ERROR_INIT;
	pid_t pid = 0;
	int rc = pipe2(errs, O_CLOEXEC) ? error_errno(&err, errno, "pipe")
					: start_child(disk, errs[1], &pid, &err);
	if (errs[1] >= 0)
		close(errs[1]);
	pthread_mutex_lock(&disk->lock);
	disk->started = true;
	disk->pid = pid;
	disk->start_error = err;
	disk->exited = rc != 0;
	pthread_cond_broadcast(&disk->changed);
	pthread_mutex_unlock(&disk->lock);
	if (rc) {
		if (errs[0] >= 0)
			close(errs[0]);
		return NULL;
	}
	char text[1024];
	size_t len = 0;
	for (;;) {
		ssize_t n = read(errs[0], text + len, sizeof text - 1 - len);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			break;
		len += (size_t)n;
		text[len] = '\0';
		char copy[sizeof text];
		memcpy(copy, text, len + 1);
		const char *complaint = child_complaint(copy);
		log_warn("%s: qemu-nbd: %s", disk->block.label, complaint);
		pthread_mutex_lock(&disk->lock);
		snprintf(disk->complaint, sizeof disk->complaint, "%s", complaint);
		pthread_mutex_unlock(&disk->lock);
		len = 0;
	}
	close(errs[0]);
	/* WNOWAIT first: the pid must not be free for reuse while somebody under the lock may still signal
	 * it. */
	siginfo_t info;
	while (waitid(P_PID, (id_t)pid, &info, WEXITED | WNOWAIT) < 0 && errno == EINTR)
		;
	pthread_mutex_lock(&disk->lock);
	while (waitpid(pid, &disk->wait_status, 0) < 0 && errno == EINTR)
		;
	disk->pid = 0;
	disk->exited = true;
	pthread_cond_broadcast(&disk->changed);
	pthread_mutex_unlock(&disk->lock);
	return NULL;
}

/* Caller holds disk->lock. True if the child has gone. */
static bool wait_exit(struct qcow2_disk *disk, unsigned seconds)
{
	struct timespec until;
	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += seconds;
	while (!disk->exited)
		if (pthread_cond_timedwait(&disk->changed, &disk->lock, &until) == ETIMEDOUT)
			break;
	return disk->exited;
}

/* The client has gone: qemu-nbd, not persistent, writes back and exits by itself. */
static void end_child(struct qcow2_disk *disk, bool in_good_order)
{
	if (!disk->has_keeper)
		return;
	pthread_mutex_lock(&disk->lock);
	bool gone = in_good_order && wait_exit(disk, EXIT_TIMEOUT_S);
	if (!gone && disk->pid > 0) {
		if (in_good_order)
			log_warn("%s: qemu-nbd does not end: terminating it", disk->block.label);
		kill(disk->pid, SIGTERM);
		gone = wait_exit(disk, KILL_TIMEOUT_S);
	}
	if (!gone && disk->pid > 0)
		kill(disk->pid, SIGKILL);
	int status = disk->wait_status;
	pthread_mutex_unlock(&disk->lock);
	pthread_join(disk->keeper, NULL);
	if (in_good_order && status)
		log_error("%s: qemu-nbd ended badly (status 0x%x): %s", disk->block.label, status,
			  disk->complaint);
}

static int qcow2_submit(struct block *blk, struct block_request *req)
{
	struct qcow2_disk *disk = (struct qcow2_disk *)blk;
	return cluster_order_submit(&disk->order, req);
}

static int qcow2_extents(struct block *blk, uint64_t offset_bytes, uint64_t len_bytes,
			 struct block_extent *ext, unsigned *n, struct error *err)
{
	struct qcow2_disk *disk = (struct qcow2_disk *)blk;
	return disk->nbd->ops->extents(disk->nbd, offset_bytes, len_bytes, ext, n, err);
}

static void qcow2_close(struct block *blk)
{
	struct qcow2_disk *disk = (struct qcow2_disk *)blk;
	bool opened = disk->nbd;
	cluster_order_drain(&disk->order);
	block_close(disk->nbd);
	end_child(disk, opened);
	chain_close(&disk->chain);
	cluster_order_destroy(&disk->order);
	pthread_mutex_destroy(&disk->lock);
	pthread_cond_destroy(&disk->changed);
	free(disk);
}

/* The host's cache of the files; qemu-nbd keeps metadata alone. */
static void qcow2_drop_cache(struct block *blk, uint64_t offset_bytes, uint64_t len_bytes)
{
	(void)offset_bytes;
	(void)len_bytes;
	const struct image_chain *chain = &((struct qcow2_disk *)blk)->chain;
	for (unsigned i = 0; i < chain->nlayers; i++)
		posix_fadvise(chain->layers[i].fd, 0, 0, POSIX_FADV_DONTNEED);
}

static const struct block_ops qcow2_ops = {
	.name = "qcow2",
	.submit = qcow2_submit,
	.extents = qcow2_extents,
	.drop_cache = qcow2_drop_cache,
	.close = qcow2_close,
};

/* A listening socket in run_dir, and a connection to it; its name is gone afterwards. */
static int private_socket(const char *run_dir, int *listen_out, int *conn_out, struct error *err)
{
	CLEANUP_FD int dir = open(run_dir, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (dir < 0)
		return error_errno(err, errno, "%s: open", run_dir);
	CLEANUP_FD int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	CLEANUP_FD int conn = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (listener < 0 || conn < 0)
		return error_errno(err, errno, "socket");
	static unsigned serial;
	unsigned mine = __atomic_fetch_add(&serial, 1, __ATOMIC_RELAXED);
	char name[64];
	snprintf(name, sizeof name, "qemu-nbd.%ld.%u", (long)getpid(), mine);
	/* By the descriptor, since a Unix socket's path is short. */
	struct sockaddr_un sa = {.sun_family = AF_UNIX};
	snprintf(sa.sun_path, sizeof sa.sun_path, "/proc/self/fd/%d/%s", dir, name);
	unlinkat(dir, name, 0); /* left by a process of this number that was killed in the few lines below */
	if (bind(listener, (struct sockaddr *)&sa, sizeof sa))
		return error_errno(err, errno, "%s/%s: bind", run_dir, name);
	int rc = 0;
	if (fchmodat(dir, name, 0600, 0) || listen(listener, 1) ||
	    connect(conn, (struct sockaddr *)&sa, sizeof sa))
		rc = error_errno(err, errno, "%s/%s", run_dir, name);
	unlinkat(dir, name, 0);
	if (rc)
		return rc;
	*listen_out = steal_fd(&listener);
	*conn_out = steal_fd(&conn);
	return 0;
}

static int start_keeper(struct qcow2_disk *disk, struct error *err)
{
	sigset_t all, old;
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &old);
	int rc = pthread_create(&disk->keeper, NULL, keeper_main, disk);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (rc)
		return error_errno(err, rc, "thread for qemu-nbd");
	disk->has_keeper = true;
	SCOPE_LOCK(&disk->lock);
	while (!disk->started)
		pthread_cond_wait(&disk->changed, &disk->lock);
	error_copy(err, &disk->start_error);
	return disk->start_error.code;
}

static int drive(struct qcow2_disk *disk, const struct block_open_options *opt, struct error *err)
{
	int conn = -1;
	int rc = private_socket(opt->run_dir, &disk->listen_fd, &conn, err);
	if (rc)
		return rc;
	rc = start_keeper(disk, err);
	/* Ours must go, or the connection would wait for ever in the backlog of a child that died. */
	close(disk->listen_fd);
	if (rc) {
		close(conn);
		return rc;
	}
	struct nbd_client_options copt = {.label = disk->block.label,
					  .timeout_ms = REQUEST_TIMEOUT_MS,
					  .allocation_depth = disk->chain.nlayers > 1};
	rc = nbd_client_open(&conn, 1, &copt, &disk->nbd, err);
	if (rc == 0)
		return 0;
	pthread_mutex_lock(&disk->lock);
	/* The child's own words are better than "connection reset". */
	if (wait_exit(disk, 1) && disk->complaint[0])
		rc = error_set(err, EIO, "qemu-nbd: %s", disk->complaint);
	pthread_mutex_unlock(&disk->lock);
	return rc;
}

int qcow2_open(const char *path, const struct block_open_options *opt, struct block **out, struct error *err)
{
	if (!opt->run_dir)
		return error_set(err, EINVAL, "%s: qcow2 needs a folder for its socket", path);
	struct qcow2_disk *disk = calloc(1, sizeof *disk);
	if (!disk)
		return error_errno(err, ENOMEM, "%s", path);
	int rc = chain_open(path, opt, &disk->chain, err);
	if (rc) {
		free(disk);
		return rc;
	}
	const struct qcow2_header *head = &disk->chain.layers[0].head;
	if (head->nsnapshots)
		log_warn("%s: %u internal snapshots: only the present state is served", path,
			 head->nsnapshots);
	disk->block.ops = &qcow2_ops;
	snprintf(disk->block.label, sizeof disk->block.label, "%s", opt->label ? opt->label : path);
	disk->listen_fd = -1;
	disk->read_only = opt->read_only;
	pthread_mutex_init(&disk->lock, NULL);
	cond_init_monotonic(&disk->changed);
	cluster_order_init(&disk->order, NULL, head->cluster_bytes);
	for (unsigned i = 0; i < disk->chain.nlayers; i++)
		disk->order.reads_apart |= disk->chain.layers[i].head.compressed;
	rc = drive(disk, opt, err);
	disk->order.below = disk->nbd;
	if (rc == 0 && disk->nbd->size_bytes != head->virtual_bytes)
		rc = error_set(err, EIO, "qemu-nbd serves %llu bytes instead of %llu",
			       (unsigned long long)disk->nbd->size_bytes,
			       (unsigned long long)head->virtual_bytes);
	if (rc) {
		qcow2_close(&disk->block);
		return error_prefix(err, "%s", path);
	}
	disk->block.size_bytes = disk->nbd->size_bytes;
	disk->block.limits = disk->nbd->limits;
	/* One connection underneath, so one flush covers whatever our callers' connections wrote. */
	disk->block.limits.can_multi_conn = true;
	*out = &disk->block;
	return 0;
}
