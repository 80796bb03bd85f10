/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The source's side of a disk's copy alone: what vmm/vm.c and vmm/move_source_storage.c do with a disk,
 * without a VM around it. Opens the image, puts a mirror over it, dials an NBD server (snnbd), runs the pass,
 * flushes the remote, and prints one line of JSON. A guest may be played by random writes (--load) or by an
 * NBD client on a Unix socket (--serve).
 *
 * Exit status: 0 done; 1 failed; 2 wrong usage.
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <jansson.h>
#include <limits.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/rate_limit.h"
#include "bench/guest_load.h"
#include "block/block.h"
#include "block/open.h"
#include "mirror/mirror.h"
#include "nbd/nbd.h"
#include "net/conn.h"

#define TIMEOUT_MS	10000 /* the default of silence-ms */
#define CONNECTIONS_MAX 16
#define TRIES		8 /* STORAGE_RETRIES of vmm/move_source_storage.c */

static const char usage[] =
	"Usage: mirror_driver --source FILE [--to HOST:PORT] [OPTION...]\n"
	"  --format raw|qcow2   of FILE (raw); --run-dir DIR for qcow2\n"
	"  --buffered           without O_DIRECT, which a VM's disks have\n"
	"  --export NAME        of the server (\"\")\n"
	"  --connections N      NBD connections (1, what a move uses)\n"
	"  --in-flight N        requests of the pass (the mirror's default); --chunk-bytes N: its chunks\n"
	"  --bandwidth N        bytes a second; --then N: another bandwidth, --seconds S after the start\n"
	"  --grace-ms N         how long a guest's write waits for a silent remote (the mirror's default)\n"
	"  --mirror sync|buffered   what a guest's write waits for (sync); --mirror-buffer N: bytes of it\n"
	"  --tls CA CERT KEY PEER   four options: --tls-ca, --tls-cert, --tls-key, --tls-peer\n"
	"  --load DEPTH         random writes by a guest, DEPTH in flight; --load-bytes N each (4096)\n"
	"  --phase none|pass|synced   when the guest writes: without a mirror, while the pass runs, after "
	"it\n"
	"  --seconds S          how long it writes without a mirror and after the pass (5)\n"
	"  --serve SOCKET       the guest is an NBD client; a line on standard input starts the mirror and "
	"is\n"
	"                       answered when all is synced; after the end of standard input\n"
	"                       both sides are settled again, and that is answered too\n";

enum phase { PHASE_NONE, PHASE_PASS, PHASE_SYNCED };

struct driver {
	const char *source, *to, *export_name, *serve;
	const char *tls_ca, *tls_cert, *tls_key, *tls_peer;
	struct block_open_options open;
	unsigned connections, in_flight, chunk_bytes, grace_ms, load_depth, load_bytes;
	unsigned bandwidth, then, buffer_bytes;
	bool mirror_buffered;
	double seconds;
	enum phase phase;

	struct tls_context *tls;
	struct block *local, *top;
	struct mirror *mirror;
	struct guest_load *load;
	int sockets[CONNECTIONS_MAX]; /* copies, for what TCP counted */
	unsigned nsockets, sessions;
	uint64_t wire_bytes; /* of sessions that ended */
	uint64_t pass_ns, flush_ns;
	struct rate_limit rate;
	double rate_before, rate_after; /* bytes a second before the change, and from a second after it on */
};

/* --- the connection --- */

static void count_wire(struct driver *d)
{
	for (unsigned i = 0; i < d->nsockets; i++) {
		struct tcp_info info = {0};
		socklen_t len = sizeof info;
		if (getsockopt(d->sockets[i], IPPROTO_TCP, TCP_INFO, &info, &len) == 0)
			d->wire_bytes += info.tcpi_bytes_sent + info.tcpi_bytes_received;
		close(d->sockets[i]);
	}
	d->nsockets = 0;
}

static int dial(struct driver *d, int *fd_out, struct error *err)
{
	int fd = net_connect(d->to, TIMEOUT_MS, err);
	if (fd < 0)
		return fd;
	int copy = fcntl(fd, F_DUPFD_CLOEXEC, 3);
	if (copy >= 0)
		d->sockets[d->nsockets++] = copy;
	struct conn *conn = NULL;
	int rc = d->tls ? conn_tls_connect(fd, d->tls, d->tls_peer, TIMEOUT_MS, &conn, err)
			: conn_from_fd(fd, &conn, err);
	return rc ? rc : conn_pump_start(conn, fd_out, err);
}

static void mirror_failed(void *opaque, const struct error *why)
{
	(void)opaque;
	log_warn("mirror: %s", why->message);
}

static int open_session(struct driver *d, bool again, struct error *err)
{
	int fds[CONNECTIONS_MAX], rc = 0;
	unsigned n = 0;
	count_wire(d);
	for (; n < d->connections; n++) {
		rc = dial(d, &fds[n], err);
		if (rc)
			break;
	}
	if (rc) {
		while (n)
			close(fds[--n]);
		return rc;
	}
	struct nbd_client_options copt = {
		.export_name = d->export_name, .label = "remote", .timeout_ms = TIMEOUT_MS};
	struct block *remote = NULL;
	rc = nbd_client_open(fds, n, &copt, &remote, err);
	if (rc)
		return rc;
	struct mirror_options mopt = {
		.remote = remote,
		.remote_is_zero = true,
		.keep_map = again,
		.chunk_bytes = d->chunk_bytes,
		.requests_in_flight = d->in_flight,
		.write_grace_ms = d->grace_ms,
		.buffered = d->mirror_buffered,
		.buffer_bytes = d->buffer_bytes,
		.bandwidth = d->bandwidth ? &d->rate : NULL,
		.failed = mirror_failed,
	};
	rc = mirror_start(d->mirror, &mopt, err);
	if (rc)
		block_close(remote);
	else
		d->sessions++;
	return rc;
}

/* As sync_disk of the move: until all is synced, dialling again when the session broke. */
static int sync_disk(struct driver *d, struct error *err)
{
	unsigned tries = 0;
	uint64_t best = 0;
	for (;;) {
		int rc = mirror_wait_synced(d->mirror, 200, err);
		if (!rc)
			return 0;
		struct mirror_stats st;
		mirror_stats(d->mirror, &st);
		if (rc == -ETIMEDOUT && !st.failed)
			continue;
		if (st.synced_bytes > best)
			tries = 0;
		best = st.synced_bytes > best ? st.synced_bytes : best;
		if (++tries > TRIES)
			return rc;
		mirror_stop(d->mirror);
		clock_sleep_ms(50 * tries);
		rc = open_session(d, true, err);
		if (rc)
			return rc;
	}
}

/* --- one run --- */

static int start_load(struct driver *d, struct error *err)
{
	return d->load_depth ? guest_load_start(d->top, d->load_depth, d->load_bytes, &d->load, err) : 0;
}

static int stop_load(struct driver *d, struct error *err)
{
	int rc = d->load ? guest_load_stop(d->load) : 0;
	return rc ? error_errno(err, rc, "a guest's write") : 0;
}

/* What comes before a handover: all synced, and the remote flushed. */
static int settle(struct driver *d, struct error *err)
{
	uint64_t begin = clock_now_ns();
	int rc = sync_disk(d, err);
	if (!rc)
		rc = mirror_flush_remote(d->mirror, err);
	d->flush_ns = clock_now_ns() - begin;
	if (!rc && !mirror_is_consistent(d->mirror))
		rc = error_set(err, EIO, "the mirror is not consistent at the end");
	return rc;
}

static uint64_t bytes_copied(struct driver *d)
{
	struct mirror_stats st;
	mirror_stats(d->mirror, &st);
	return st.data_bytes_copied;
}

/* Changes the bandwidth while the pass runs. */
static void retune(struct driver *d, uint64_t begin_ns)
{
	clock_sleep_ms((unsigned)(d->seconds * 1000));
	d->rate_before = (double)bytes_copied(d) * 1e9 / (double)(clock_now_ns() - begin_ns);
	rate_limit_set(&d->rate, d->then);
	clock_sleep_ms(1000);
	uint64_t bytes = bytes_copied(d);
	begin_ns = clock_now_ns();
	struct error err = ERROR_INIT;
	while (mirror_wait_synced(d->mirror, 20, &err) == -ETIMEDOUT)
		;
	d->rate_after = (double)(bytes_copied(d) - bytes) * 1e9 / (double)(clock_now_ns() - begin_ns);
}

static int run_mirror(struct driver *d, struct error *err)
{
	int rc = 0;
	uint64_t begin = clock_now_ns();
	if (d->phase == PHASE_PASS)
		rc = start_load(d, err);
	if (!rc)
		rc = open_session(d, false, err);
	if (!rc && d->then)
		retune(d, begin);
	if (!rc)
		rc = sync_disk(d, err);
	d->pass_ns = clock_now_ns() - begin;
	if (!rc && d->phase == PHASE_SYNCED) {
		rc = start_load(d, err);
		clock_sleep_ms((unsigned)(d->seconds * 1000));
	}
	if (!rc)
		rc = stop_load(d, err);
	return rc ? rc : settle(d, err);
}

static int run_unmirrored(struct driver *d, struct error *err)
{
	int rc = start_load(d, err);
	if (rc)
		return rc;
	clock_sleep_ms((unsigned)(d->seconds * 1000));
	return stop_load(d, err);
}

/* Peak resident memory of this program alone; getrusage would count what it was forked from. */
static uint64_t peak_memory_bytes(void)
{
	CLEANUP_FILE FILE *f = fopen("/proc/self/status", "re");
	char line[256];
	uint64_t kib = 0;
	while (f && fgets(line, sizeof line, f))
		if (sscanf(line, "VmHWM: %" SCNu64, &kib) == 1)
			break;
	return kib * 1024;
}

static double seconds_of(struct timeval tv)
{
	return (double)tv.tv_sec + (double)tv.tv_usec / 1e6;
}

static void report(struct driver *d)
{
	struct rusage ru;
	struct mirror_stats st = {0};
	getrusage(RUSAGE_SELF, &ru);
	mirror_stats(d->mirror, &st);
	json_t *o =
		json_pack("{s:f, s:f, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:i, s:f, s:f}", "pass_s",
			  (double)d->pass_ns / 1e9, "flush_s", (double)d->flush_ns / 1e9, "wire_bytes",
			  (json_int_t)d->wire_bytes, "data_bytes", (json_int_t)st.data_bytes_copied,
			  "zero_bytes", (json_int_t)st.zero_bytes_copied, "hole_bytes",
			  (json_int_t)st.hole_bytes_skipped, "mirrored_bytes", (json_int_t)st.mirrored_bytes,
			  "buffered_bytes_max", (json_int_t)st.buffered_bytes_max, "peak_memory_bytes",
			  (json_int_t)peak_memory_bytes(), "sessions", (int)d->sessions, "user_s",
			  seconds_of(ru.ru_utime), "system_s", seconds_of(ru.ru_stime));
	if (d->then)
		json_object_set_new(
			o, "rates",
			json_pack("{s:f, s:f}", "before", d->rate_before, "after", d->rate_after));
	if (d->load) {
		struct guest_load_result r;
		guest_load_result(d->load, &r);
		json_object_set_new(o, "load",
				    json_pack("{s:I, s:I, s:f, s:f, s:f, s:f}", "writes",
					      (json_int_t)r.writes, "bytes", (json_int_t)r.bytes, "elapsed_s",
					      (double)r.elapsed_ns / 1e9, "p50_us", (double)r.p50_ns / 1e3,
					      "p99_us", (double)r.p99_ns / 1e3, "max_us",
					      (double)r.max_ns / 1e3));
	}
	char *text = json_dumps(o, JSON_COMPACT);
	puts(text ? text : "{}");
	fflush(stdout);
	free(text);
	json_decref(o);
}

/* --- a guest by NBD --- */

struct guest_door {
	struct nbd_server *server;
	int listen_fd;
};

static void *accept_guests(void *arg)
{
	struct guest_door *door = arg;
	for (;;) {
		struct error err = ERROR_INIT;
		struct conn *conn = NULL;
		int fd = accept4(door->listen_fd, NULL, NULL, SOCK_CLOEXEC);
		if (fd < 0 && errno == EINTR)
			continue;
		if (fd < 0)
			return NULL; /* shut down */
		if (conn_from_fd(fd, &conn, &err) || nbd_server_add(door->server, conn, &err))
			log_warn("guest refused: %s", err.message);
	}
}

static int open_door(struct driver *d, struct guest_door *door, struct error *err)
{
	struct sockaddr_un sa = {.sun_family = AF_UNIX};
	if (strlen(d->serve) >= sizeof sa.sun_path)
		return error_set(err, ENAMETOOLONG, "%s: path of a Unix socket", d->serve);
	strcpy(sa.sun_path, d->serve);
	CLEANUP_FD int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || bind(fd, (struct sockaddr *)&sa, sizeof sa) || listen(fd, 4))
		return error_errno(err, errno, "%s", d->serve);
	struct nbd_server_options opt = {.block = d->top};
	int rc = nbd_server_create(&opt, &door->server, err);
	if (!rc)
		door->listen_fd = steal_fd(&fd);
	return rc;
}

static int run_serving(struct driver *d, struct error *err)
{
	struct guest_door door = {.listen_fd = -1};
	pthread_t thread;
	int rc = open_door(d, &door, err);
	if (rc)
		return rc;
	rc = pthread_create(&thread, NULL, accept_guests, &door);
	if (rc) {
		rc = error_errno(err, rc, "thread");
	} else {
		puts("{\"serving\": true}");
		fflush(stdout);
		char line[64];
		while (!rc && fgets(line, sizeof line, stdin)) {
			rc = run_mirror(d, err);
			if (!rc)
				report(d);
		}
		shutdown(door.listen_fd, SHUT_RDWR);
		pthread_join(thread, NULL);
	}
	nbd_server_free(door.server);
	close(door.listen_fd);
	unlink(d->serve);
	if (!rc && d->sessions)
		rc = settle(d, err);
	if (!rc)
		report(d);
	return rc;
}

/* --- arguments --- */

static int bad_usage(const char *what)
{
	fprintf(stderr, "mirror_driver: %s\n%s", what, usage);
	return 2;
}

static bool number(const char *text, unsigned min, unsigned max, unsigned *out)
{
	char *end;
	unsigned long n = strtoul(text, &end, 10);
	*out = (unsigned)n;
	return *text && !*end && n >= min && n <= max;
}

static bool phase_parse(const char *text, enum phase *out)
{
	static const char *const names[] = {"none", "pass", "synced"};
	for (unsigned i = 0; i < ARRAY_SIZE(names); i++)
		if (!strcmp(text, names[i])) {
			*out = (enum phase)i;
			return true;
		}
	return false;
}

enum {
	OPT_SOURCE = 256,
	OPT_TO,
	OPT_FORMAT,
	OPT_RUN_DIR,
	OPT_BUFFERED,
	OPT_EXPORT,
	OPT_CONNECTIONS,
	OPT_IN_FLIGHT,
	OPT_CHUNK,
	OPT_BANDWIDTH,
	OPT_THEN,
	OPT_GRACE,
	OPT_CA,
	OPT_CERT,
	OPT_KEY,
	OPT_PEER,
	OPT_LOAD,
	OPT_LOAD_BYTES,
	OPT_PHASE,
	OPT_SECONDS,
	OPT_SERVE,
	OPT_MIRROR,
	OPT_MIRROR_BUFFER
};

static const struct option longopts[] = {
	{"source", required_argument, NULL, OPT_SOURCE},
	{"to", required_argument, NULL, OPT_TO},
	{"format", required_argument, NULL, OPT_FORMAT},
	{"run-dir", required_argument, NULL, OPT_RUN_DIR},
	{"buffered", no_argument, NULL, OPT_BUFFERED},
	{"export", required_argument, NULL, OPT_EXPORT},
	{"connections", required_argument, NULL, OPT_CONNECTIONS},
	{"in-flight", required_argument, NULL, OPT_IN_FLIGHT},
	{"chunk-bytes", required_argument, NULL, OPT_CHUNK},
	{"bandwidth", required_argument, NULL, OPT_BANDWIDTH},
	{"then", required_argument, NULL, OPT_THEN},
	{"grace-ms", required_argument, NULL, OPT_GRACE},
	{"tls-ca", required_argument, NULL, OPT_CA},
	{"tls-cert", required_argument, NULL, OPT_CERT},
	{"tls-key", required_argument, NULL, OPT_KEY},
	{"tls-peer", required_argument, NULL, OPT_PEER},
	{"load", required_argument, NULL, OPT_LOAD},
	{"load-bytes", required_argument, NULL, OPT_LOAD_BYTES},
	{"phase", required_argument, NULL, OPT_PHASE},
	{"seconds", required_argument, NULL, OPT_SECONDS},
	{"serve", required_argument, NULL, OPT_SERVE},
	{"mirror", required_argument, NULL, OPT_MIRROR},
	{"mirror-buffer", required_argument, NULL, OPT_MIRROR_BUFFER},
	{0},
};

static bool parse_option(struct driver *d, int c)
{
	char *end;
	switch (c) {
	case OPT_SOURCE:
		d->source = optarg;
		return true;
	case OPT_TO:
		d->to = optarg;
		return true;
	case OPT_FORMAT:
		return block_format_parse(optarg, &d->open.format) == 0;
	case OPT_RUN_DIR:
		d->open.run_dir = optarg;
		return true;
	case OPT_BUFFERED:
		d->open.direct = false;
		return true;
	case OPT_EXPORT:
		d->export_name = optarg;
		return true;
	case OPT_CONNECTIONS:
		return number(optarg, 1, CONNECTIONS_MAX, &d->connections);
	case OPT_IN_FLIGHT:
		return number(optarg, 1, 128, &d->in_flight);
	case OPT_CHUNK:
		return number(optarg, 4096, 256u << 20, &d->chunk_bytes);
	case OPT_BANDWIDTH:
		return number(optarg, 1, UINT_MAX, &d->bandwidth);
	case OPT_THEN:
		return number(optarg, 1, UINT_MAX, &d->then);
	case OPT_GRACE:
		return number(optarg, 1, 60000, &d->grace_ms);
	case OPT_CA:
		d->tls_ca = optarg;
		return true;
	case OPT_CERT:
		d->tls_cert = optarg;
		return true;
	case OPT_KEY:
		d->tls_key = optarg;
		return true;
	case OPT_PEER:
		d->tls_peer = optarg;
		return true;
	case OPT_LOAD:
		return number(optarg, 1, 256, &d->load_depth);
	case OPT_LOAD_BYTES:
		return number(optarg, 512, 1u << 20, &d->load_bytes);
	case OPT_PHASE:
		return phase_parse(optarg, &d->phase);
	case OPT_SECONDS:
		d->seconds = strtod(optarg, &end);
		return !*end && d->seconds > 0;
	case OPT_SERVE:
		d->serve = optarg;
		return true;
	case OPT_MIRROR:
		d->mirror_buffered = !strcmp(optarg, "buffered");
		return d->mirror_buffered || !strcmp(optarg, "sync");
	case OPT_MIRROR_BUFFER:
		return number(optarg, (unsigned)MIRROR_BUFFER_MIN_BYTES, UINT_MAX, &d->buffer_bytes);
	default:
		return false;
	}
}

static int open_disk(struct driver *d, struct error *err)
{
	int rc = 0;
	if (d->tls_ca)
		rc = tls_context_create(d->tls_ca, d->tls_cert, d->tls_key, &d->tls, err);
	if (!rc)
		rc = block_open(d->source, &d->open, &d->local, err);
	if (!rc)
		rc = mirror_create(d->local, &d->mirror, &d->top, err);
	return rc;
}

static void close_disk(struct driver *d)
{
	guest_load_free(d->load);
	if (d->mirror) {
		mirror_stop(d->mirror);
		mirror_free(d->mirror);
	}
	block_close(d->local);
	tls_context_free(d->tls);
	rate_limit_destroy(&d->rate);
}

int main(int argc, char **argv)
{
	struct driver d = {.export_name = "",
			   .open = {.direct = true, .label = "disk"},
			   .connections = 1,
			   .load_bytes = 4096,
			   .seconds = 5};
	int c;
	while ((c = getopt_long(argc, argv, "", longopts, NULL)) != -1)
		if (!parse_option(&d, c))
			return bad_usage("an option or its value is wrong");
	if (!d.source || optind != argc)
		return bad_usage("--source FILE and options only");
	bool unmirrored = !d.to && d.load_depth && d.phase == PHASE_NONE && !d.serve;
	if (!d.to && !unmirrored && !d.serve)
		return bad_usage("--to is missing");
	if (!!d.tls_ca + !!d.tls_cert + !!d.tls_key + !!d.tls_peer != (d.tls_ca ? 4 : 0))
		return bad_usage("--tls-ca, --tls-cert, --tls-key and --tls-peer go together");
	if (d.load_depth && !unmirrored && d.phase == PHASE_NONE)
		return bad_usage("--load with --to needs --phase pass or synced");
	if (d.then && !d.bandwidth)
		return bad_usage("--then needs --bandwidth");
	rate_limit_init(&d.rate, d.bandwidth);
	log_init("mirror_driver");
	signal(SIGPIPE, SIG_IGN);
	struct error err = ERROR_INIT;
	int rc = open_disk(&d, &err);
	if (!rc && d.serve) {
		rc = run_serving(&d, &err);
	} else if (!rc) {
		rc = unmirrored ? run_unmirrored(&d, &err) : run_mirror(&d, &err);
		count_wire(&d);
		if (!rc)
			report(&d);
	}
	close_disk(&d);
	if (rc)
		fprintf(stderr, "mirror_driver: %s\n", err.message);
	return rc ? 1 : 0;
}
