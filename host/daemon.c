/* SPDX-License-Identifier: Apache-2.0 */
#include "host/daemon.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/cond.h"
#include "base/log.h"
#include "host/evacuate.h"
#include "host/fsutil.h"
#include "host/pair_codes.h"
#include "host/partial.h"
#include "host/recorder.h"
#include "host/spawn.h"
#include "host/systemd.h"
#include "host/trust.h"
#include "host/trust_renew.h"
#include "net/conn.h"
#include "net/preamble.h"

#define LISTEN_BACKLOG	   64
#define GARBAGE_REMEMBERED 64
#define GARBAGE_LOG_MS	   60000
#define PARTIAL_SWEEP_MS   2000

/* ---- the one port
 * ------------------------------------------------------------------------------------------ */

struct arrival {
	struct daemon *daemon;
	struct arrival *next; /* daemon->lock */
	int fd;
	bool data_only; /* it came to [host] migration-address */
	char from[DAEMON_ADDRESS_CHARS];
};

static bool arrival_add(struct arrival *a)
{
	struct daemon *d = a->daemon;
	unsigned same = 0;
	SCOPE_LOCK(&d->lock);
	for (const struct arrival *o = d->arrivals; o; o = o->next)
		same += !strcmp(o->from, a->from);
	if (d->preambles >= DAEMON_PREAMBLES_MAX || same >= DAEMON_PREAMBLES_MAX / DAEMON_SHARE_OF_ONE)
		return false;
	d->preambles++;
	a->next = d->arrivals;
	d->arrivals = a;
	return true;
}

static void arrival_remove(struct arrival *a)
{
	struct daemon *d = a->daemon;
	SCOPE_LOCK(&d->lock);
	struct arrival **at = &d->arrivals;
	while (*at != a)
		at = &(*at)->next;
	*at = a->next;
	d->preambles--;
}

/* Once a minute and address: whoever scans the port must not fill the log. */
static bool may_log_garbage(struct daemon *d, const char *from)
{
	static struct {
		char from[DAEMON_ADDRESS_CHARS];
		uint64_t at_ms;
	} seen[GARBAGE_REMEMBERED];
	uint64_t now = clock_now_ms();
	unsigned oldest = 0;
	SCOPE_LOCK(&d->lock);
	for (unsigned i = 0; i < GARBAGE_REMEMBERED; i++) {
		if (seen[i].at_ms && !strcmp(seen[i].from, from)) {
			if (now - seen[i].at_ms < GARBAGE_LOG_MS)
				return false;
			seen[i].at_ms = now;
			return true;
		}
		if (seen[i].at_ms < seen[oldest].at_ms)
			oldest = i;
	}
	snprintf(seen[oldest].from, sizeof seen[oldest].from, "%s", from);
	seen[oldest].at_ms = now;
	return true;
}

static bool is_welcome(const struct arrival *a, const struct preamble *pre, struct error *err)
{
	bool data = pre->channel == CHANNEL_MEMORY || pre->channel == CHANNEL_DISK;
	if (a->data_only && !data)
		return error_set(err, EPERM, "a %s channel at the migration-address, which is for data alone",
				 channel_name(pre->channel)),
		       false;
	if (pre->channel == CHANNEL_PAIR && !pair_codes_any(a->daemon->codes, pair_codes_now_ms()))
		return error_set(err, EPERM, "it wants to be paired, but no code is open (snmigrate pair)"),
		       false;
	return true;
}

static enum worker_kind kind_of(const struct preamble *pre)
{
	return pre->channel == CHANNEL_PAIR		  ? WORKER_PAIR
	       : !strcmp(pre->token, PREAMBLE_BY_PAIRING) ? WORKER_CONTROL_PAIRED
							  : WORKER_CONTROL;
}

static void *read_preamble(void *arg)
{
	struct arrival *a = arg;
	struct daemon *d = a->daemon;
	struct preamble pre;
	struct error err = ERROR_INIT;
	int rc = preamble_read(a->fd, PREAMBLE_TIMEOUT_MS, &pre, &err);
	arrival_remove(a);
	if (!rc && !is_welcome(a, &pre, &err))
		rc = -EPERM;
	if (rc < 0) {
		if (may_log_garbage(d, a->from))
			log_warn("connection from %s closed: %s", a->from, err.message);
		close(a->fd);
	} else if (pre.channel == CHANNEL_CONTROL || pre.channel == CHANNEL_PAIR) {
		worker_start(d, a->fd, a->from, kind_of(&pre));
	} else {
		worker_route(d, channel_name(pre.channel), pre.token, a->fd);
	}
	free(a);
	return NULL;
}

static void accept_tcp(struct daemon *d, int listener, bool data_only)
{
	struct sockaddr_storage addr;
	socklen_t len = sizeof addr;
	int fd = accept4(listener, (struct sockaddr *)&addr, &len, SOCK_CLOEXEC);
	if (fd < 0) {
		/* out of descriptors: let some go first */
		if (errno == EMFILE || errno == ENFILE || errno == ENOMEM)
			clock_sleep_ms(50);
		return;
	}
	struct arrival *a = calloc(1, sizeof *a);
	pthread_t thread;
	bool room = false, allowed = host_config_network_allowed(d->cfg, &addr);
	if (a) {
		a->daemon = d;
		a->fd = fd;
		a->data_only = data_only;
		if (getnameinfo((struct sockaddr *)&addr, len, a->from, sizeof a->from, NULL, 0,
				NI_NUMERICHOST))
			strcpy(a->from, "?");
		room = allowed && arrival_add(a);
	}
	if (room && pthread_create(&thread, NULL, read_preamble, a) == 0) {
		pthread_detach(thread);
		return;
	}
	if (room)
		arrival_remove(a);
	else if (a && !allowed && may_log_garbage(d, a->from))
		log_warn("connection from %s closed: %s refuses that network (allow-from, deny-from)",
			 a->from, d->cfg->path);
	else if (a && allowed && may_log_garbage(d, a->from))
		log_warn("connection from %s closed: too many others, here or from there, have not said yet "
			 "what they "
			 "want",
			 a->from);
	free(a);
	close(fd);
}

/* ---- the control socket
 * ------------------------------------------------------------------------------------ */

struct client {
	struct daemon *daemon;
	struct jsonl *j;
};

static void *serve_client(void *arg)
{
	struct client *c = arg;
	commands_serve(c->daemon, c->j);
	SCOPE_LOCK(&c->daemon->lock);
	c->daemon->clients--;
	free(c);
	return NULL;
}

static void accept_client(struct daemon *d, int listener)
{
	int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	if (fd < 0) {
		clock_sleep_ms(10);
		return;
	}
	struct client *c = calloc(1, sizeof *c);
	struct jsonl *j = jsonl_from_fd(fd);
	pthread_t thread;
	if (!c || !j) {
		free(c);
		jsonl_close(j);
		return;
	}
	c->daemon = d;
	c->j = j;
	pthread_mutex_lock(&d->lock);
	bool room = d->clients < DAEMON_CLIENTS_MAX;
	if (room)
		d->clients++;
	pthread_mutex_unlock(&d->lock);
	if (room && pthread_create(&thread, NULL, serve_client, c) == 0) {
		pthread_detach(thread);
		return;
	}
	struct error err = ERROR_INIT;
	error_set(&err, EBUSY, "too many clients at once");
	jsonl_write_error(j, 3, &err);
	jsonl_close(j);
	free(c);
	if (room) {
		SCOPE_LOCK(&d->lock);
		d->clients--;
	}
}

/* ---- start and end
 * ----------------------------------------------------------------------------------------- */

static int take_lock(const struct host_config *cfg, struct error *err)
{
	char path[REGISTRY_PATH_BYTES];
	int rc = registry_path(cfg, "lock", path, err);
	if (rc < 0)
		return rc;
	CLEANUP_FD int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (fd < 0)
		return error_errno(err, errno, "%s", path);
	if (flock(fd, LOCK_EX | LOCK_NB) < 0)
		return errno == EWOULDBLOCK
			       ? error_set(err, EBUSY, "%s: another snmigrated uses this state directory",
					   cfg->state_dir)
			       : error_errno(err, errno, "%s", path);
	return steal_fd(&fd);
}

/* Arrivals without a record: a live one is adopted by its keeper, what a dead one left is removed by it. */
static void keep_arrivals(struct daemon *d)
{
	char path[REGISTRY_PATH_BYTES];
	if (registry_path(d->cfg, "incoming", path, NULL) < 0)
		return;
	DIR *dir = opendir(path);
	struct dirent *de;
	while (dir && (de = readdir(dir))) {
		char uuid[VM_UUID_CHARS + 1], rel[REGISTRY_FOLDER_BYTES];
		if (de->d_name[0] == '.')
			continue;
		snprintf(uuid, sizeof uuid, "%s", de->d_name);
		snprintf(rel, sizeof rel, "incoming/%.200s", de->d_name);
		if (vm_uuid_valid(uuid))
			keeper_get(d, uuid, NULL);
		else
			registry_remove_incoming(d->cfg, rel, NULL);
	}
	if (dir)
		closedir(dir);
}

/* Removing a large image takes a while: not in the thread that accepts. */
static void *sweep_partials(void *arg)
{
	struct daemon *d = arg;
	for (;;) {
		partial_sweep(d->cfg);
		clock_sleep_ms(PARTIAL_SWEEP_MS);
	}
	return NULL;
}

static void *renew_certificate(void *arg)
{
	struct daemon *d = arg;
	for (;;)
		clock_sleep_ms(trust_renew(d->cfg));
	return NULL;
}

static int start_thread(void *(*run)(void *), struct daemon *d, struct error *err)
{
	pthread_t thread;
	int rc = pthread_create(&thread, NULL, run, d);
	return rc ? error_errno(err, rc, "thread") : pthread_detach(thread);
}

static int serve(struct daemon *d, int tcp, int data, int control, int signals)
{
	struct pollfd p[] = {{.fd = signals, .events = POLLIN},
			     {.fd = tcp, .events = POLLIN},
			     {.fd = control, .events = POLLIN},
			     {.fd = data, .events = POLLIN}}; /* -1 is passed over */
	for (;;) {
		if (poll(p, ARRAY_SIZE(p), -1) < 0 && errno != EINTR)
			return -errno;
		if (p[0].revents)
			return 0;
		if (p[1].revents)
			accept_tcp(d, tcp, false);
		if (p[2].revents)
			accept_client(d, control);
		if (p[3].revents)
			accept_tcp(d, data, true);
	}
}

/* A second port for data channels, unless `listen` has that address already. *out: -1 = none. */
static int listen_data(const struct host_config *cfg, int *out, struct error *err)
{
	const char *port = strrchr(cfg->listen, ':'), *own = strrchr(cfg->migration_address, ':');
	bool any = !strncmp(cfg->listen, "0.0.0.0:", 8) || !strncmp(cfg->listen, "[::]:", 5);
	*out = -1;
	if (!*cfg->migration_address || !strcmp(cfg->migration_address, cfg->listen) ||
	    (any && !strcmp(port, own)))
		return 0;
	*out = net_listen(cfg->migration_address, LISTEN_BACKLOG, err);
	return *out < 0 ? error_prefix(err, "[host] migration-address") : 0;
}

/* Paired hosts know this one by what is made here once. */
static int prepare_trust(struct daemon *d, struct error *err)
{
	struct trust_own own;
	d->codes = malloc(sizeof *d->codes);
	if (!d->codes)
		return error_errno(err, ENOMEM, "snmigrated");
	pair_codes_init(d->codes);
	int rc = trust_prepare(d->cfg, err);
	if (rc || *d->cfg->ca)
		return rc;
	struct error why = ERROR_INIT;
	/* A host that was given another name has VMs to keep all the same. */
	if (trust_own_ensure(d->cfg, &own, &why) < 0)
		log_error("%s", why.message);
	return 0;
}

int daemon_run(const struct host_config *cfg, struct error *err)
{
	/* Threads of the daemon never end before the process does. */
	struct daemon *d = calloc(1, sizeof *d);
	if (!d)
		return error_errno(err, ENOMEM, "snmigrated");
	d->cfg = cfg;
	pthread_mutex_init(&d->lock, NULL);
	cond_init_monotonic(&d->changed);

	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	signal(SIGPIPE, SIG_IGN);
	umask(077);

	int rc = fs_make_dirs(cfg->state_dir, err);
	CLEANUP_FD int lock = rc < 0 ? -1 : take_lock(cfg, err);
	CLEANUP_FD int signals = signalfd(-1, &set, SFD_CLOEXEC);
	if (lock < 0 || signals < 0)
		return lock < 0 ? -EBUSY : error_errno(err, errno, "signalfd");
	rc = registry_prepare(cfg, err);
	if (!rc)
		rc = spawn_init(cfg, err);
	if (!rc)
		rc = prepare_trust(d, err);
	/* the ports before the work: a refused one must not leave threads that settle */
	CLEANUP_FD int tcp = rc < 0 ? -1 : net_listen(cfg->listen, LISTEN_BACKLOG, err);
	CLEANUP_FD int control = tcp < 0 ? -1 : jsonl_listen(cfg->control, err);
	CLEANUP_FD int data = -1;
	if (tcp >= 0 && control >= 0)
		rc = listen_data(cfg, &data, err);
	if (tcp < 0 || control < 0 || rc < 0)
		return rc < 0 ? rc : err && err->code ? err->code : -EIO;
	rc = recorder_start(d, err);
	if (!rc)
		rc = keepers_start(d, err);
	if (rc < 0)
		return rc;
	keep_arrivals(d);
	rc = evacuator_start(d, err);
	if (!rc)
		rc = start_thread(sweep_partials, d, err);
	if (!rc)
		rc = start_thread(renew_certificate, d, err);
	if (rc)
		return rc;
	log_info("host %s serves %s and %s, state in %s", cfg->name, cfg->listen, cfg->control,
		 cfg->state_dir);
	systemd_notify("READY=1");
	rc = serve(d, tcp, data, control, signals);
	systemd_notify("STOPPING=1");
	unlink(cfg->control);
	recorder_stop(d);
	spawn_end();
	log_info("ends; the VMs go on");
	return rc < 0 ? error_errno(err, rc, "poll") : 0;
}
