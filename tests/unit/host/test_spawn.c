/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/pidfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "host/fsutil.h"
#include "host/spawn.h"
#include "tests/suite.h"

/* 0: cgroups, 1: where there is no cgroup2 that we may write. */
static char dir[128], log_path[160];
static struct host_config cfg;
static struct error err;

static void setup(void)
{
	strcpy(dir, "/tmp/test_spawn.XXXXXX");
	ck_assert(mkdtemp(dir) != NULL);
	memset(&cfg, 0, sizeof cfg);
	snprintf(cfg.name, sizeof cfg.name, "test-%d", (int)getpid());
	strcpy(cfg.state_dir, dir);
	snprintf(log_path, sizeof log_path, "%s/log", dir);
	err = ERROR_INIT;
}

static void teardown(void)
{
	fs_remove_tree(dir, NULL);
	spawn_end();
}

static void begin(int fallback)
{
	if (fallback)
		setenv("SNM_FAULT", "spawn-cgroup:fail",
		       1); /* read once a process: each test has one of its own */
	ck_assert_msg(spawn_init(&cfg, &err) == 0, "%s", err.message);
}

static pid_t start(const char *group, const char *script, const int *fds, unsigned nfds)
{
	const char *argv[] = {"/bin/sh", "-c", script, NULL};
	struct spawn_options opt = {
		.group = group, .argv = argv, .fds = fds, .nfds = nfds, .log_path = log_path};
	pid_t pid = spawn_start(&opt, &err);
	ck_assert_msg(pid > 0, "%s", err.message);
	return pid;
}

static char *log_text(void)
{
	static char text[4096];
	CLEANUP_FREE char *t = NULL;
	size_t len;
	*text = '\0';
	if (fs_read_file(log_path, 4000, &t, &len, NULL) == 0)
		strcpy(text, t);
	return text;
}

/* Descriptors 3 and 4 are what was passed, nothing else is open, stdin is empty, the session is its own. */
START_TEST(what_a_child_gets)
{
	int pipes[2], stray = open("/dev/zero", O_RDONLY);
	begin(_i);
	ck_assert_int_eq(pipe(pipes), 0);
	int fds[] = {pipes[1], pipes[0]};
	pid_t pid = start("g1",
			  "echo hello >&3; read x <&4; echo \"got $x\"; read y || echo empty; ls /proc/$$/fd "
			  "| tr '\\n' ' '; "
			  "echo; cut -d' ' -f1,6 /proc/$$/stat",
			  fds, 2);
	int status;
	ck_assert_int_eq(waitpid(pid, &status, 0), pid);
	char want[64];
	snprintf(want, sizeof want, "%d %d\n", (int)pid, (int)pid);
	ck_assert_msg(strstr(log_text(), "got hello\nempty\n0 1 2 3 4 ") != NULL, "%s", log_text());
	ck_assert_msg(strstr(log_text(), want) != NULL, "%s", log_text());
	ck_assert_int_eq(spawn_group_wait_empty("g1", 2000, &err), 0);
	close(stray);
	close(pipes[0]);
	close(pipes[1]);
}
END_TEST

/* The one that matters: a process whose parent was killed is still found, killed, and waited for. */
START_TEST(orphans_are_found)
{
	begin(_i);
	pid_t pid = start("g2", "setsid sleep 300 & echo $! ; exec sleep 300", NULL, 0);
	for (int i = 0; i < 200 && !strchr(log_text(), '\n'); i++)
		clock_sleep_ms(10);
	pid_t orphan = atoi(log_text());
	ck_assert_int_gt(orphan, 0);
	ck_assert_int_eq(spawn_group_is_empty("g2", &err), 0);
	ck_assert_int_eq(spawn_group_is_empty("g3", &err), 1);
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	ck_assert_int_eq(spawn_group_is_empty("g2", &err), 0);
	ck_assert_int_eq(spawn_group_wait_empty("g2", 100, &err), -ETIMEDOUT);
	ck_assert_int_eq(spawn_group_kill("g2", &err), 0);
	ck_assert_msg(spawn_group_wait_empty("g2", 5000, &err) == 0, "%s", err.message);
	ck_assert_int_eq(spawn_group_is_empty("g2", &err), 1);
	ck_assert_int_eq(spawn_group_kill("g2", &err), 0);
}
END_TEST

START_TEST(moving_to_another_group)
{
	begin(_i);
	pid_t pid = start("connection-1", "exec sleep 300", NULL, 0);
	ck_assert_msg(spawn_group_move("connection-1", "uuid-1", pid, &err) == 0, "%s", err.message);
	ck_assert_int_eq(spawn_group_is_empty("uuid-1", &err), 0);
	ck_assert_int_eq(spawn_group_kill("uuid-1", &err), 0);
	waitpid(pid, NULL, 0);
	ck_assert_int_eq(spawn_group_wait_empty("uuid-1", 5000, &err), 0);
	ck_assert_int_eq(spawn_group_is_empty("uuid-1", &err), 1);
}
END_TEST

START_TEST(a_program_that_is_not_there)
{
	const char *argv[] = {"/nonexistent/snvmm", NULL};
	struct spawn_options opt = {.group = "g4", .argv = argv, .log_path = log_path};
	begin(_i);
	ck_assert_int_eq(spawn_start(&opt, &err), -ENOENT);
	ck_assert_msg(strstr(err.message, "/nonexistent/snvmm") != NULL, "%s", err.message);
	ck_assert_int_eq(spawn_group_wait_empty("g4", 2000, &err), 0);
	while (waitpid(-1, NULL, 0) > 0)
		;
}
END_TEST

START_TEST(a_configured_cgroup_must_work)
{
	strcpy(cfg.cgroup, "/tmp");
	ck_assert_int_eq(spawn_init(&cfg, &err), -EINVAL);
	ck_assert_msg(strstr(err.message, "[programs] cgroup = /tmp") != NULL, "%s", err.message);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("spawn");
	TCase *tc = tcase_create("spawn");
	tcase_add_checked_fixture(tc, setup, teardown);
	tcase_add_loop_test(tc, what_a_child_gets, 0, 2);
	tcase_add_loop_test(tc, orphans_are_found, 0, 2);
	tcase_add_loop_test(tc, moving_to_another_group, 0, 2);
	tcase_add_loop_test(tc, a_program_that_is_not_there, 0, 2);
	tcase_add_test(tc, a_configured_cgroup_must_work);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
