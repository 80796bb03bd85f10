/* SPDX-License-Identifier: Apache-2.0 */
/* The NBD server by itself: one export, until SIGTERM. */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "block/open.h"
#include "nbd/nbd.h"
#include "net/conn.h"

#define BACKLOG			 64
#define LISTEN_FDS_START	 3 /* sd_listen_fds(3) */
#define TLS_HANDSHAKE_TIMEOUT_MS 10000

static const char usage[] =
	"usage: snnbd [OPTION]... (--unix SOCKET | --tcp ADDRESS:PORT | --stdio) FILE\n"
	"Serve a disk image or block device over NBD until SIGTERM or SIGINT.\n"
	"\n"
	"  --unix SOCKET         listen on a Unix socket (created, mode 0600; removed at the end)\n"
	"  --tcp ADDRESS:PORT    listen on TCP\n"
	"  --stdio               one client on standard input and output (a socket)\n"
	"                        none of these: a listening socket from LISTEN_FDS (sd_listen_fds(3))\n"
	"  --format raw|qcow2    format of FILE (default raw)\n"
	"  --read-only           refuse changes\n"
	"  --direct              bypass the page cache (O_DIRECT)\n"
	"  --no-io-uring         threads instead of io_uring\n"
	"  --export NAME         name of the export (default: the empty name)\n"
	"  --description TEXT    description of the export\n"
	"  --max-connections N   clients at once (default 16)\n"
	"  --tls-ca FILE --tls-cert FILE --tls-key FILE\n"
	"                        TLS 1.3 from the first byte on; the client must have a certificate of this "
	"CA\n"
	"  --help, --version\n";

struct args {
	struct block_open_options open;
	const char *unix_path, *tcp, *file, *export_name, *description;
	const char *tls_ca, *tls_cert, *tls_key;
	bool stdio;
	unsigned max_connections;
};

struct program {
	struct args args;
	struct nbd_server *server;
	struct tls_context *tls;
	unsigned handshaking; /* TLS handshakes in threads; atomic */
};

static int bad_usage(const char *message, const char *what)
{
	fprintf(stderr, "snnbd: %s%s%s\n%s", message, what ? ": " : "", what ? what : "", usage);
	return 2;
}

static int fail(const struct error *err)
{
	fprintf(stderr, "snnbd: %s\n", err->message);
	return 1;
}

enum {
	OPT_UNIX = 256,
	OPT_TCP,
	OPT_STDIO,
	OPT_FORMAT,
	OPT_RO,
	OPT_DIRECT,
	OPT_NO_URING,
	OPT_EXPORT,
	OPT_DESCRIPTION,
	OPT_MAX,
	OPT_CA,
	OPT_CERT,
	OPT_KEY,
	OPT_HELP,
	OPT_VERSION
};

static const struct option longopts[] = {
	{"unix", required_argument, NULL, OPT_UNIX},
	{"tcp", required_argument, NULL, OPT_TCP},
	{"stdio", no_argument, NULL, OPT_STDIO},
	{"format", required_argument, NULL, OPT_FORMAT},
	{"read-only", no_argument, NULL, OPT_RO},
	{"direct", no_argument, NULL, OPT_DIRECT},
	{"no-io-uring", no_argument, NULL, OPT_NO_URING},
	{"export", required_argument, NULL, OPT_EXPORT},
	{"description", required_argument, NULL, OPT_DESCRIPTION},
	{"max-connections", required_argument, NULL, OPT_MAX},
	{"tls-ca", required_argument, NULL, OPT_CA},
	{"tls-cert", required_argument, NULL, OPT_CERT},
	{"tls-key", required_argument, NULL, OPT_KEY},
	{"help", no_argument, NULL, OPT_HELP},
	{"version", no_argument, NULL, OPT_VERSION},
	{0},
};

/* -1: go on; else the exit status. */
static int parse_args(int argc, char **argv, struct args *a)
{
	int c;
	while ((c = getopt_long(argc, argv, "", longopts, NULL)) != -1) {
		switch (c) {
		case OPT_UNIX:
			a->unix_path = optarg;
			break;
		case OPT_TCP:
			a->tcp = optarg;
			break;
		case OPT_STDIO:
			a->stdio = true;
			break;
		case OPT_FORMAT:
			if (block_format_parse(optarg, &a->open.format))
				return bad_usage("unknown format", optarg);
			break;
		case OPT_RO:
			a->open.read_only = true;
			break;
		case OPT_DIRECT:
			a->open.direct = true;
			break;
		case OPT_NO_URING:
			a->open.no_io_uring = true;
			break;
		case OPT_EXPORT:
			a->export_name = optarg;
			break;
		case OPT_DESCRIPTION:
			a->description = optarg;
			break;
		case OPT_MAX: {
			char *end;
			unsigned long n = strtoul(optarg, &end, 10);
			if (*end || !*optarg || n < 1 || n > 1024)
				return bad_usage("--max-connections takes a number from 1 to 1024", optarg);
			a->max_connections = (unsigned)n;
			break;
		}
		case OPT_CA:
			a->tls_ca = optarg;
			break;
		case OPT_CERT:
			a->tls_cert = optarg;
			break;
		case OPT_KEY:
			a->tls_key = optarg;
			break;
		case OPT_HELP:
			fputs(usage, stdout);
			return 0;
		case OPT_VERSION:
			puts("snnbd " SNM_VERSION);
			return 0;
		default:
			fputs(usage, stderr);
			return 2;
		}
	}
	if (optind == argc)
		return bad_usage("FILE is missing", NULL);
	if (argc - optind > 1)
		return bad_usage("one FILE only", argv[optind + 1]);
	a->file = argv[optind];
	if (!!a->unix_path + !!a->tcp + a->stdio > 1)
		return bad_usage("one of --unix, --tcp and --stdio", NULL);
	if (!a->unix_path && !a->tcp && !a->stdio && !getenv("LISTEN_FDS"))
		return bad_usage("where to serve: --unix, --tcp, --stdio or LISTEN_FDS", NULL);
	int ntls = !!a->tls_ca + !!a->tls_cert + !!a->tls_key;
	if (ntls != 0 && ntls != 3)
		return bad_usage("--tls-ca, --tls-cert and --tls-key go together", NULL);
	return -1;
}

static int listen_unix(const char *path, struct error *err)
{
	struct sockaddr_un sa = {.sun_family = AF_UNIX};
	if (strlen(path) >= sizeof sa.sun_path)
		return error_set(err, ENAMETOOLONG, "%s: path of a Unix socket is at most %zu bytes", path,
				 sizeof sa.sun_path - 1);
	strcpy(sa.sun_path, path);
	CLEANUP_FD int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return error_errno(err, errno, "socket");
	mode_t old = umask(0177);
	int rc = bind(fd, (struct sockaddr *)&sa, sizeof sa);
	int e = errno;
	umask(old);
	if (rc)
		return error_errno(err, e, "%s: bind", path);
	if (listen(fd, BACKLOG)) {
		e = errno;
		unlink(path);
		return error_errno(err, e, "%s: listen", path);
	}
	return steal_fd(&fd);
}

static int listen_inherited(struct error *err)
{
	const char *fds = getenv("LISTEN_FDS"), *pid = getenv("LISTEN_PID");
	if (pid && strtol(pid, NULL, 10) != (long)getpid())
		return error_set(err, EINVAL, "LISTEN_PID is %s, not this process", pid);
	if (strcmp(fds, "1") != 0)
		return error_set(err, EINVAL, "LISTEN_FDS is %s: one socket is expected", fds);
	int listening = 0;
	socklen_t len = sizeof listening;
	if (getsockopt(LISTEN_FDS_START, SOL_SOCKET, SO_ACCEPTCONN, &listening, &len) || !listening)
		return error_set(err, EINVAL, "LISTEN_FDS: descriptor %d is no listening socket",
				 LISTEN_FDS_START);
	fcntl(LISTEN_FDS_START, F_SETFD, FD_CLOEXEC);
	unsetenv("LISTEN_FDS");
	unsetenv("LISTEN_PID");
	return LISTEN_FDS_START;
}

struct arrival {
	struct program *prog;
	int fd;
};

/* In a thread of its own where TLS is used: a slow handshake must not hold up the others. */
static void *arrive(void *arg)
{
	struct arrival *a = arg;
	struct program *prog = a->prog;
	struct conn *conn = NULL;
	struct error err = ERROR_INIT;
	int rc = prog->tls ? conn_tls_accept(a->fd, prog->tls, TLS_HANDSHAKE_TIMEOUT_MS, &conn, &err)
			   : conn_from_fd(a->fd, &conn, &err);
	if (rc == 0)
		rc = nbd_server_add(prog->server, conn, &err);
	if (rc)
		log_warn("client refused: %s", err.message);
	if (prog->tls)
		__atomic_fetch_sub(&prog->handshaking, 1, __ATOMIC_RELEASE);
	free(a);
	return NULL;
}

static void accept_one(struct program *prog, int listen_fd)
{
	int fd = accept4(listen_fd, NULL, NULL, SOCK_CLOEXEC);
	if (fd < 0) {
		if (errno == EMFILE || errno == ENFILE || errno == ENOMEM) {
			log_warn("accept: %s", strerror(errno));
			clock_sleep_ms(100);
		}
		return;
	}
	struct arrival *a = malloc(sizeof *a);
	if (!a) {
		close(fd);
		return;
	}
	*a = (struct arrival){prog, fd};
	if (!prog->tls) {
		arrive(a);
		return;
	}
	unsigned max = prog->args.max_connections ? prog->args.max_connections : 16;
	pthread_t thread;
	if (__atomic_fetch_add(&prog->handshaking, 1, __ATOMIC_ACQUIRE) < max &&
	    pthread_create(&thread, NULL, arrive, a) == 0) {
		pthread_detach(thread);
		return;
	}
	__atomic_fetch_sub(&prog->handshaking, 1, __ATOMIC_RELEASE);
	log_warn("client refused: %u TLS handshakes under way", max);
	close(fd);
	free(a);
}

static void serve_listener(struct program *prog, int listen_fd, int signal_fd)
{
	struct pollfd pfd[2] = {{.fd = signal_fd, .events = POLLIN}, {.fd = listen_fd, .events = POLLIN}};
	for (;;) {
		if (poll(pfd, 2, -1) < 0 && errno != EINTR)
			break;
		if (pfd[0].revents)
			break;
		if (pfd[1].revents)
			accept_one(prog, listen_fd);
	}
}

static int serve_stdio(struct program *prog, int signal_fd, struct error *err)
{
	struct stat st;
	if (fstat(STDIN_FILENO, &st) || !S_ISSOCK(st.st_mode))
		return error_set(err, ENOTSOCK, "--stdio: standard input is no socket");
	int fd = fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 3);
	if (fd < 0)
		return error_errno(err, errno, "standard input");
	struct conn *conn = NULL;
	int rc = prog->tls ? conn_tls_accept(fd, prog->tls, TLS_HANDSHAKE_TIMEOUT_MS, &conn, err)
			   : conn_from_fd(fd, &conn, err);
	if (rc == 0)
		rc = nbd_server_add(prog->server, conn, err);
	if (rc)
		return rc;
	struct pollfd pfd = {.fd = signal_fd, .events = POLLIN};
	while (nbd_server_connections(prog->server) && poll(&pfd, 1, 50) <= 0)
		;
	return 0;
}

static int run(struct program *prog, int signal_fd)
{
	struct args *a = &prog->args;
	struct error err = ERROR_INIT;
	char run_dir[] = "/tmp/snnbd.XXXXXX";
	struct block *blk = NULL;
	CLEANUP_FD int listen_fd = -1;
	int rc = 0;

	if (a->tls_ca && tls_context_create(a->tls_ca, a->tls_cert, a->tls_key, &prog->tls, &err))
		return fail(&err);
	bool need_dir = a->open.format == BLOCK_FORMAT_QCOW2;
	if (need_dir && !mkdtemp(run_dir)) {
		error_errno(&err, errno, "%s", run_dir);
		return fail(&err);
	}
	a->open.run_dir = need_dir ? run_dir : NULL;
	rc = block_open(a->file, &a->open, &blk, &err);
	if (rc == 0) {
		struct nbd_server_options opt = {.export_name = a->export_name,
						 .description = a->description,
						 .block = blk,
						 .read_only = a->open.read_only,
						 .max_connections = a->max_connections};
		rc = nbd_server_create(&opt, &prog->server, &err);
	}
	if (rc == 0 && a->stdio) {
		rc = serve_stdio(prog, signal_fd, &err);
	} else if (rc == 0) {
		if (a->unix_path)
			listen_fd = listen_unix(a->unix_path, &err);
		else if (a->tcp)
			listen_fd = net_listen(a->tcp, BACKLOG, &err);
		else
			listen_fd = listen_inherited(&err);
		rc = listen_fd < 0 ? listen_fd : 0;
		if (rc == 0) {
			log_info("serving %s (%llu bytes)", a->file, (unsigned long long)blk->size_bytes);
			serve_listener(prog, listen_fd, signal_fd);
			if (a->unix_path)
				unlink(a->unix_path);
		}
	}
	while (__atomic_load_n(&prog->handshaking, __ATOMIC_ACQUIRE))
		clock_sleep_ms(10); /* each is bounded by its timeout */
	nbd_server_free(prog->server);
	if (rc == 0 && blk) {
		int flushed = blk->limits.read_only ? 0 : block_flush(blk);
		if (flushed)
			rc = error_errno(&err, flushed, "%s: flush", a->file);
	}
	block_close(blk);
	tls_context_free(prog->tls);
	if (need_dir)
		rmdir(run_dir);
	return rc ? fail(&err) : 0;
}

int main(int argc, char **argv)
{
	struct program prog = {0};
	int status = parse_args(argc, argv, &prog.args);
	if (status >= 0)
		return status;
	log_init("snnbd");
	signal(SIGPIPE, SIG_IGN);
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	CLEANUP_FD int signal_fd = signalfd(-1, &set, SFD_CLOEXEC);
	if (signal_fd < 0) {
		fprintf(stderr, "snnbd: signalfd: %s\n", strerror(errno));
		return 1;
	}
	return run(&prog, signal_fd);
}
