/* SPDX-License-Identifier: Apache-2.0 */
#include "host/spawn.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/log.h"
#include "host/fsutil.h"
#include "host/registry.h"
#include "host/systemd.h"

#define LOG_MAX_BYTES	 (8u << 20)
#define MARK_VARIABLE	 "SNMIGRATE_VM_GROUP"
#define FDS_MAX		 8
#define POLL_INTERVAL_MS 10

static struct {
	bool cgroups, systemd;
	char base[4096]; /* the folder of our cgroups */
	char scope[24];	 /* tells state directories of one machine apart */
	char state_dir[4096];
} spawn;

/* FNV-1a: the scope only has to differ between state directories, not to resist anybody. */
static uint32_t scope_hash(const char *s)
{
	uint32_t h = 2166136261u;
	for (; *s; s++)
		h = (h ^ (unsigned char)*s) * 16777619u;
	return h;
}

/* Where cgroup2 is mounted, and which group of it we are in: -ENOENT if there is none. */
static int find_cgroup2(char *mount, size_t mount_size, char *own, size_t own_size)
{
	char line[8192], at[4096];
	*mount = *own = '\0';
	CLEANUP_FILE FILE *f = fopen("/proc/self/mountinfo", "re");
	while (f && !*mount && fgets(line, sizeof line, f)) {
		char *dash = strstr(line, " - ");
		if (dash && !strncmp(dash + 3, "cgroup2 ", 8) &&
		    sscanf(line, "%*s %*s %*s %*s %4095s", at) == 1)
			snprintf(mount, mount_size, "%s", at);
	}
	CLEANUP_FILE FILE *g = fopen("/proc/self/cgroup", "re");
	while (g && !*own && fgets(line, sizeof line, g))
		if (!strncmp(line, "0::", 3)) {
			line[strcspn(line, "\n")] = '\0';
			snprintf(own, own_size, "%.4000s", line + 3);
		}
	return *mount && *own ? 0 : -ENOENT;
}

static int own_cgroup(char *out, size_t size)
{
	char mount[4096], own[4096];
	if (find_cgroup2(mount, sizeof mount, own, sizeof own))
		return -ENOENT;
	int n = snprintf(out, size, "%s%s", mount, strcmp(own, "/") ? own : "");
	return n < 0 || (size_t)n >= size ? -ENAMETOOLONG : 0;
}

/* Can we make groups there, and kill them as a whole (Linux 5.14)? */
static bool usable(const char *base)
{
	char probe[4200];
	if (mkdir(base, 0755) < 0 && errno != EEXIST)
		return false;
	snprintf(probe, sizeof probe, "%s/probe-%d", base, (int)getpid());
	if (mkdir(probe, 0755) < 0)
		return false;
	char file[4300];
	snprintf(file, sizeof file, "%s/cgroup.kill", probe);
	bool good = access(file, W_OK) == 0;
	rmdir(probe);
	return good;
}

/* Where systemd puts our scopes, if that is a cgroup2 whose groups can be killed as a whole. */
static bool find_slice(void)
{
	char mount[4096], own[4096], file[4200];
	if (find_cgroup2(mount, sizeof mount, own, sizeof own))
		return false;
	snprintf(file, sizeof file, "%.2000s%.2000s/cgroup.kill", mount, own);
	snprintf(spawn.base, sizeof spawn.base, "%.3900s/" SYSTEMD_SLICE, mount);
	return access(file, W_OK) == 0;
}

int spawn_init(const struct host_config *cfg, struct error *err)
{
	char own[4096], tail[128];
	snprintf(spawn.scope, sizeof spawn.scope, "%08x", scope_hash(cfg->state_dir));
	snprintf(spawn.state_dir, sizeof spawn.state_dir, "%s", cfg->state_dir);
	snprintf(tail, sizeof tail, "/snmigrate-%s-%s", cfg->name, spawn.scope);
	/* Scopes are root's to ask for. Who runs as another user gets a cgroup of its own (Delegate=yes). */
	if (!*cfg->cgroup && geteuid() == 0 && systemd_is_manager()) {
		spawn.systemd = true;
		spawn.cgroups = find_slice();
		log_info("every VM gets a scope of systemd in %s%s", SYSTEMD_SLICE,
			 spawn.cgroups ? ""
				       : "; without cgroup2 and cgroup.kill, its processes are told "
					 "by " MARK_VARIABLE " in their environment");
		return 0;
	}
	if (*cfg->cgroup)
		snprintf(spawn.base, sizeof spawn.base, "%s", cfg->cgroup);
	else if (own_cgroup(own, sizeof own - sizeof tail) == 0)
		snprintf(spawn.base, sizeof spawn.base, "%.3900s%s", own, tail);
	spawn.cgroups = *spawn.base && !fault_point("spawn-cgroup") && usable(spawn.base);
	if (*cfg->cgroup && !spawn.cgroups)
		return error_set(err, EINVAL,
				 "[programs] cgroup = %s: not a writable cgroup2 folder with cgroup.kill",
				 cfg->cgroup);
	if (spawn.cgroups) {
		log_info("every VM gets a cgroup below %s", spawn.base);
		return 0;
	}
	log_warn("no writable cgroup2 with cgroup.kill: the processes of a VM are told by %s in their "
		 "environment",
		 MARK_VARIABLE);
	return 0;
}

void spawn_end(void)
{
	if (spawn.cgroups && !spawn.systemd && rmdir(spawn.base) < 0 && errno != ENOTEMPTY &&
	    errno != EBUSY && errno != ENOENT)
		log_debug("%s: %s", spawn.base, strerror(errno));
}

static void scope_name(const char *group, char *out, size_t size)
{
	snprintf(out, size, "snmigrate-%s-%.100s.scope", spawn.scope, group);
}

static void group_path(const char *group, const char *file, char *out, size_t size)
{
	char name[160];
	if (spawn.systemd) {
		scope_name(group, name, sizeof name);
		group = name;
	}
	snprintf(out, size, "%.3900s/%.150s%s%.60s", spawn.base, group, *file ? "/" : "", file);
}

static int write_file(const char *path, const char *text)
{
	CLEANUP_FD int fd = open(path, O_WRONLY | O_CLOEXEC);
	size_t len = strlen(text);
	if (fd < 0 || write(fd, text, len) != (ssize_t)len)
		return -errno;
	return 0;
}

static int make_group(const char *group, struct error *err)
{
	char path[4200];
	group_path(group, "", path, sizeof path);
	if (mkdir(spawn.base, 0755) < 0 && errno != EEXIST)
		return error_errno(err, errno, "cgroup %s", spawn.base);
	if (mkdir(path, 0755) < 0 && errno != EEXIST)
		return error_errno(err, errno, "cgroup %s", path);
	return 0;
}

/* ---- without cgroups: the mark in the environment --------------------------------------------------------
 */

/* An arrival's group changes its name after it was started: STATE/groups/TO holds FROM. */
static void alias_path(const char *group, char *out, size_t size)
{
	snprintf(out, size, "%.3900s/groups/%.100s", spawn.state_dir, group);
}

static bool marked(const char *pid, const char *group, const char *alias)
{
	char path[280], want[2][192];
	CLEANUP_FREE char *env = NULL;
	size_t len;
	snprintf(path, sizeof path, "/proc/%s/environ", pid);
	if (fs_read_file(path, 1u << 20, &env, &len, NULL) < 0)
		return false;
	snprintf(want[0], sizeof want[0], MARK_VARIABLE "=%s/%s", spawn.scope, group);
	snprintf(want[1], sizeof want[1], MARK_VARIABLE "=%s/%s", spawn.scope, alias);
	for (size_t at = 0; at < len; at += strlen(env + at) + 1)
		if (!strcmp(env + at, want[0]) || (*alias && !strcmp(env + at, want[1])))
			return true;
	return false;
}

/* Zombies have an empty environment, so they do not count. Returns how many there are; sends them sig (0:
 * none). */
static int each_marked(const char *group, int sig)
{
	char path[4200], alias[128] = "";
	CLEANUP_FREE char *text = NULL;
	size_t len;
	alias_path(group, path, sizeof path);
	if (fs_read_file(path, sizeof alias - 1, &text, &len, NULL) == 0)
		snprintf(alias, sizeof alias, "%s", text);
	DIR *proc = opendir("/proc");
	if (!proc)
		return -errno;
	int n = 0;
	struct dirent *de;
	while ((de = readdir(proc))) {
		if (de->d_name[0] < '1' || de->d_name[0] > '9' || !marked(de->d_name, group, alias))
			continue;
		n++;
		if (sig)
			kill((pid_t)atoi(de->d_name), sig);
	}
	closedir(proc);
	return n;
}

/* ---- both -------------------------------------------------------------------------------------------------
 */

static int enter_scope(const char *group, pid_t pid, struct error *err)
{
	char name[160], description[160];
	scope_name(group, name, sizeof name);
	snprintf(description, sizeof description, "snmigrate VM %.100s", group);
	return systemd_scope_start(name, description, pid, err);
}

int spawn_group_move(const char *from, const char *to, pid_t pid, struct error *err)
{
	char path[4200], text[24];
	if (spawn.systemd) {
		int rc = enter_scope(to, pid, err);
		if (rc < 0)
			return rc;
	}
	if (spawn.systemd && spawn.cgroups)
		return 0;
	if (!spawn.cgroups) {
		snprintf(path, sizeof path, "%.3900s/groups", spawn.state_dir);
		int rc = fs_make_dirs(path, err);
		CLEANUP_FD int dir = rc < 0 ? -1 : fs_open_dir(path, err);
		return dir < 0 ? -EIO : fs_write_file_at(dir, to, from, strlen(from), 0600, err);
	}
	int rc = make_group(to, err);
	if (rc < 0)
		return rc;
	group_path(to, "cgroup.procs", path, sizeof path);
	snprintf(text, sizeof text, "%d", (int)pid);
	rc = write_file(path, text);
	if (rc < 0)
		return error_errno(err, rc, "moving process %d to cgroup %s", (int)pid, to);
	group_path(from, "", path, sizeof path);
	rmdir(path);
	return 0;
}

int spawn_group_is_empty(const char *group, struct error *err)
{
	if (!spawn.cgroups) {
		int n = each_marked(group, 0);
		return n < 0 ? error_errno(err, n, "/proc") : n == 0;
	}
	char path[4200];
	CLEANUP_FREE char *text = NULL;
	size_t len;
	group_path(group, "cgroup.events", path, sizeof path);
	int rc = fs_read_file(path, 4096, &text, &len, err);
	if (rc == -ENOENT || rc == -ENODEV)
		return 1;
	return rc < 0 ? rc : strstr(text, "populated 0") != NULL;
}

int spawn_group_kill(const char *group, struct error *err)
{
	if (!spawn.cgroups) {
		int n = each_marked(group, SIGKILL);
		return n < 0 ? error_errno(err, n, "/proc") : 0;
	}
	char path[4200];
	group_path(group, "cgroup.kill", path, sizeof path);
	int rc = write_file(path, "1");
	return rc < 0 && rc != -ENOENT && rc != -ENODEV ? error_errno(err, rc, "%s", path) : 0;
}

int spawn_group_wait_empty(const char *group, unsigned timeout_ms, struct error *err)
{
	uint64_t deadline = clock_now_ms() + timeout_ms;
	char path[4200];
	for (;;) {
		int rc = spawn_group_is_empty(group, err);
		if (rc < 0)
			return rc;
		if (rc > 0)
			break;
		if (clock_now_ms() >= deadline)
			return error_set(err, ETIMEDOUT, "processes of group %s are still there after %u ms",
					 group, timeout_ms);
		clock_sleep_ms(POLL_INTERVAL_MS);
	}
	if (spawn.cgroups && spawn.systemd)
		return 0; /* which collects its empty scopes */
	if (spawn.cgroups)
		group_path(group, "", path, sizeof path);
	else
		alias_path(group, path, sizeof path);
	if (spawn.cgroups ? rmdir(path) < 0 : unlink(path) < 0)
		log_debug("%s: %s", path, strerror(errno));
	return 0;
}

int spawn_open_log(const char *path, struct error *err)
{
	struct stat st;
	if (stat(path, &st) == 0 && st.st_size > LOG_MAX_BYTES) {
		char old[REGISTRY_PATH_BYTES + 8];
		snprintf(old, sizeof old, "%s.old", path);
		rename(path, old);
	}
	int fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	return fd < 0 ? error_errno(err, errno, "%s", path) : fd;
}

/* In the child, between fork and exec: async-signal-safe calls only. Returns an errno. */
static int become(const struct spawn_options *opt, int procs_fd, int go_fd, int log_fd, int null_fd,
		  const int *high, int *report, char **env)
{
	char go;
	/* not before it is in its scope; the parent closes the pipe where that fails */
	if (go_fd >= 0 && read(go_fd, &go, 1) != 1)
		return ECANCELED;
	if (procs_fd >= 0 && write(procs_fd, "0", 1) != 1)
		return errno;
	if (setsid() < 0)
		return errno;
	if (dup2(null_fd, 0) < 0 || dup2(log_fd, 1) < 0 || dup2(log_fd, 2) < 0)
		return errno;
	/* `high` are above all the numbers that are assigned here; report too */
	for (unsigned i = 0; i < opt->nfds; i++)
		if (dup2(high[i], 3 + (int)i) < 0)
			return errno;
	if (dup3(*report, 3 + (int)opt->nfds, O_CLOEXEC) < 0)
		return errno;
	*report = 3 + (int)opt->nfds;
	close_range(4 + opt->nfds, ~0u, 0);
	signal(SIGPIPE, SIG_DFL);
	sigset_t none;
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	execve(opt->argv[0], (char *const *)opt->argv, env);
	return errno;
}

static char **marked_environment(const char *mark)
{
	extern char **environ;
	size_t n = 0;
	while (environ[n])
		n++;
	char **env = calloc(n + 2, sizeof *env);
	if (!env)
		return NULL;
	size_t k = 0;
	for (size_t i = 0; i < n; i++) /* and what systemd told this process alone */
		if (strncmp(environ[i], MARK_VARIABLE "=", sizeof MARK_VARIABLE) &&
		    strncmp(environ[i], "NOTIFY_SOCKET=", strlen("NOTIFY_SOCKET=")) &&
		    strncmp(environ[i], "JOURNAL_STREAM=", strlen("JOURNAL_STREAM=")))
			env[k++] = environ[i];
	env[k] = (char *)mark;
	return env;
}

pid_t spawn_start(const struct spawn_options *opt, struct error *err)
{
	char path[4200], mark[192];
	CLEANUP_FD int procs_fd = -1;
	if (opt->nfds > FDS_MAX)
		return error_set(err, EINVAL, "too many descriptors");
	if (spawn.cgroups && !spawn.systemd) {
		int rc = make_group(opt->group, err);
		if (rc < 0)
			return rc;
		group_path(opt->group, "cgroup.procs", path, sizeof path);
		procs_fd = open(path, O_WRONLY | O_CLOEXEC);
		if (procs_fd < 0)
			return error_errno(err, errno, "%s", path);
	}
	snprintf(mark, sizeof mark, MARK_VARIABLE "=%s/%.100s", spawn.scope, opt->group);
	CLEANUP_FREE char **env = marked_environment(mark);
	CLEANUP_FD int log_fd = spawn_open_log(opt->log_path, err);
	CLEANUP_FD int null_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
	int pipes[2], go[2] = {-1, -1};
	if (!env || log_fd < 0 || null_fd < 0 || pipe2(pipes, O_CLOEXEC) < 0)
		return log_fd < 0 ? log_fd
				  : error_errno(err, env ? errno : ENOMEM, "starting %s", opt->argv[0]);
	CLEANUP_FD int result = pipes[0];
	CLEANUP_FD int report_low = pipes[1];
	CLEANUP_FD int report = fcntl(report_low, F_DUPFD_CLOEXEC, 64);
	if (spawn.systemd && pipe2(go, O_CLOEXEC) < 0)
		return error_errno(err, errno, "starting %s", opt->argv[0]);
	CLEANUP_FD int go_fd = go[0];
	CLEANUP_FD int let_go = go[1];
	int high[FDS_MAX];
	unsigned have = 0;
	while (have < opt->nfds && (high[have] = fcntl(opt->fds[have], F_DUPFD_CLOEXEC, 64)) >= 0)
		have++;
	pid_t pid = report < 0 || have < opt->nfds ? -1 : fork();
	int saved = errno;
	if (pid == 0) {
		int why = become(opt, procs_fd, go_fd, log_fd, null_fd, high, &report, env);
		if (write(report, &why, sizeof why) < 0)
			_exit(126);
		_exit(127);
	}
	for (unsigned i = 0; i < have; i++)
		close(high[i]);
	if (pid < 0)
		return error_errno(err, saved, "starting %s", opt->argv[0]);
	if (spawn.systemd) {
		int rc = enter_scope(opt->group, pid, err);
		if (!rc && write(let_go, "", 1) != 1)
			rc = error_errno(err, errno, "starting %s", opt->argv[0]);
		if (rc < 0) {
			kill(pid, SIGKILL);
			waitpid(pid, NULL, 0);
			return rc;
		}
	}
	close(report);
	report = -1;
	close(report_low);
	report_low = -1;
	int why = 0;
	ssize_t n;
	while ((n = read(result, &why, sizeof why)) < 0 && errno == EINTR)
		;
	return n == sizeof why ? error_errno(err, why, "starting %s", opt->argv[0]) : pid;
}
