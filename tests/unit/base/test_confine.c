/* SPDX-License-Identifier: Apache-2.0 */
/* Filters of threads, each tried in a process of its own. */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/kvm.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/confine.h"
#include "tests/suite.h"

#define FORBIDDEN 70 /* the exit status that confine.c gives */

static void *nothing(void *arg)
{
	prctl(PR_SET_NAME, "another");
	free(malloc(100000));
	return arg;
}

/* Runs `what` in a child that is confined so; its exit status, and what it said. */
static int child(enum confine_kind kind, int (*what)(void), char said[512])
{
	int out[2], status;
	ck_assert_int_eq(pipe(out), 0);
	pid_t pid = fork();
	if (pid == 0) {
		struct error err = ERROR_INIT;
		pthread_t first; /* for which the C library sets up signals */
		dup2(out[1], STDERR_FILENO);
		if (pthread_create(&first, NULL, nothing, NULL) || pthread_join(first, NULL))
			_exit(98);
		if (confine_enable(&err) || confine_thread(kind, &err)) {
			dprintf(STDERR_FILENO, "%s\n", err.message);
			_exit(99);
		}
		_exit(what());
	}
	close(out[1]);
	size_t len = 0;
	for (ssize_t n; len < 511 && (n = read(out[0], said + len, 511 - len)) > 0;)
		len += (size_t)n;
	said[len] = '\0';
	close(out[0]);
	ck_assert_int_eq(waitpid(pid, &status, 0), pid);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

static int usual(void)
{
	void *p = malloc(1 << 20),
	     *big = mmap(NULL, 1 << 24, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t one = 1;
	int fd = eventfd(0, 0);
	bool good = p && big != MAP_FAILED && fd >= 0 && write(fd, &one, sizeof one) == sizeof one &&
		    read(fd, &one, sizeof one) == sizeof one && close(fd) == 0 && munmap(big, 1 << 24) == 0 &&
		    getpid() > 0;
	free(p);
	return good ? 0 : 1;
}
static int kvm_ioctl_only(void)
{
	return ioctl(0, KVM_RUN, 0) < 0 ? 0 : 1;
}
static int opens(void)
{
	return open("/etc/passwd", O_RDONLY) < 0 ? 1 : 2;
}
static int dials(void)
{
	return socket(AF_INET, SOCK_STREAM, 0) < 0 ? 1 : 2;
}
static int executes(void)
{
	char *argv[] = {(char *)"/bin/true", NULL};
	return execv(argv[0], argv);
}
static int forks(void)
{
	return (int)syscall(SYS_clone, 17 /* SIGCHLD */, 0, 0, 0, 0) < 0 ? 1 : 2;
}
static int maps_code(void)
{
	return mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED ? 1
													 : 2;
}
static int terminal_ioctl(void)
{
	return ioctl(0, 0x5412 /* TIOCSTI */, "x") < 0 ? 1 : 2;
}
static int fills_pages(void)
{
	uint64_t one = 1;
	return ioctl(0, UFFDIO_WAKE, &one) < 0 ? 0 : 1;
}
static int lets_others_go_first(void)
{
	const struct sched_param none = {0};
	return sched_setscheduler(0, SCHED_IDLE, &none) < 0 || sched_setscheduler(0, SCHED_OTHER, &none) < 0;
}
static int goes_first(void)
{
	const struct sched_param first = {.sched_priority = 1};
	return sched_setscheduler(0, SCHED_FIFO, &first) < 0 ? 1 : 2;
}
static int asks_parent(void)
{
	return (int)syscall(SYS_getppid);
}
static int traces(void)
{
	return ptrace(PTRACE_TRACEME, 0, NULL, NULL) < 0 ? 1 : 2;
}
static int mounts(void)
{
	return mount("none", "/", NULL, MS_REC | MS_SLAVE, NULL) < 0 ? 1 : 2;
}
static int unshares(void)
{
	return unshare(CLONE_NEWUSER) < 0 ? 1 : 2;
}
static int forks_apart(void)
{
	return (int)syscall(SYS_clone, CLONE_NEWUSER | 17, 0, 0, 0, 0) < 0 ? 1 : 2;
}
static int sniffs(void)
{
	return socket(AF_PACKET, SOCK_RAW, 0) < 0 ? 1 : 2;
}
static int sniffs_keys(void)
{
	return socket(AF_KEY, SOCK_RAW, 2) < 0 ? 1 : 2;
}
static int becomes_another(void)
{
	return setuid(65534) < 0 ? 1 : 2;
}
/* What the VMM's main thread and its children live on. */
static int wide(void)
{
	int fd = open("/etc/passwd", O_RDONLY), s = socket(AF_INET, SOCK_STREAM, 0), status = -1;
	pid_t pid = fork();
	if (pid == 0) {
		execl("/bin/true", "true", NULL);
		_exit(1);
	}
	return fd >= 0 && s >= 0 && waitpid(pid, &status, 0) == pid && status == 0 ? 0 : 1;
}
static int makes_thread(void)
{
	pthread_t t;
	return pthread_create(&t, NULL, nothing, NULL) || pthread_join(t, NULL);
}
static int reads_file(void)
{
	/* in the way the pool does it; the descriptor is none */
	struct iovec iov = {0};
	return preadv(-1, &iov, 1, 0) < 0 && pwritev2(-1, &iov, 1, 0, RWF_DSYNC) < 0 && fdatasync(-1) < 0 &&
			       fallocate(-1, 0, 0, 1) < 0 && lseek(-1, 0, SEEK_DATA) < 0 &&
			       ioctl(-1, BLKZEROOUT, &iov) < 0
		       ? 0
		       : 1;
}
static int receives(void)
{
	char byte;
	return recv(0, &byte, 1, MSG_DONTWAIT) < 0 ? 0 : 1;
}

static int unforeseen(void)
{
	errno = 0;
	for (int i = 0; i < 3; i++)
		if (syscall(SYS_getppid) != -1 || errno != ENOSYS)
			return 1;
	return open("/etc/passwd", O_RDONLY) < 0 && errno == EACCES && open("/etc/group", O_RDONLY) < 0 ? 0
													: 2;
}
static int other_numbers(void)
{
	return (int)syscall(0x40000000 | SYS_getpid) < 0 ? 1 : 2;
}

enum fate { ENDS, FAILS };

static const struct {
	enum confine_kind kind;
	int (*what)(void);
	const char *call; /* NULL: allowed */
	enum fate fate;	  /* of a process, or of the call alone */
} cases[] = {
	{CONFINE_VCPU, usual, NULL},
	{CONFINE_VCPU, kvm_ioctl_only, NULL},
	{CONFINE_VCPU, opens, "openat", FAILS},
	{CONFINE_VCPU, dials, "socket"},
	{CONFINE_VCPU, executes, "execve"},
	{CONFINE_VCPU, forks, "clone"},
	{CONFINE_VCPU, maps_code, "mmap"},
	{CONFINE_VCPU, terminal_ioctl, "ioctl"},
	{CONFINE_VCPU, other_numbers, "number 1073741863"},
	{CONFINE_VCPU, receives, "recvfrom", FAILS},
	{CONFINE_PAIRING, usual, NULL},
	{CONFINE_PAIRING, receives, NULL},
	{CONFINE_PAIRING, opens, "openat", FAILS},
	{CONFINE_PAIRING, dials, "socket"},
	{CONFINE_PAIRING, executes, "execve"},
	{CONFINE_PAIRING, kvm_ioctl_only, "ioctl", FAILS},
	{CONFINE_DEVICE, usual, "eventfd2", FAILS},
	{CONFINE_DEVICE, kvm_ioctl_only, NULL},
	{CONFINE_DEVICE, receives, NULL},
	{CONFINE_DEVICE, asks_parent, "getppid", FAILS},
	{CONFINE_DEVICE, opens, "openat", FAILS},
	{CONFINE_DEVICE, forks, "clone"},
	{CONFINE_DISK, reads_file, NULL},
	{CONFINE_DISK, receives, NULL},
	{CONFINE_DISK, opens, "openat", FAILS},
	{CONFINE_DISK, dials, "socket"},
	{CONFINE_DISK, executes, "execve"},
	{CONFINE_DISK, maps_code, "mmap"},
	{CONFINE_NBD, receives, NULL},
	{CONFINE_NBD, makes_thread, NULL},
	{CONFINE_NBD, forks, "clone"},
	{CONFINE_NBD, forks_apart, "clone"},
	{CONFINE_NBD, reads_file, "ioctl", FAILS},
	{CONFINE_NBD, dials, "socket"},
	{CONFINE_MEMORY, fills_pages, NULL},
	{CONFINE_MEMORY, makes_thread, NULL},
	{CONFINE_MEMORY, lets_others_go_first, NULL},
	{CONFINE_MEMORY, goes_first, "sched_setscheduler", FAILS},
	{CONFINE_MEMORY, opens, "openat", FAILS},
	{CONFINE_MEMORY, forks, "clone"},
	{CONFINE_MIRROR, receives, NULL},
	{CONFINE_MIRROR, fills_pages, "ioctl", FAILS},
	{CONFINE_MIRROR, opens, "openat", FAILS},
	{CONFINE_LINK, receives, NULL},
	{CONFINE_LINK, opens, "openat", FAILS},
	{CONFINE_LINK, forks, "clone"},
	{CONFINE_LINK, executes, "execve"},
	{CONFINE_PROCESS, usual, NULL},
	{CONFINE_PROCESS, wide, NULL},
	{CONFINE_PROCESS, makes_thread, NULL},
	{CONFINE_PROCESS, traces, "ptrace"},
	{CONFINE_PROCESS, mounts, "mount"},
	{CONFINE_PROCESS, unshares, "unshare"},
	{CONFINE_PROCESS, forks_apart, "clone"},
	{CONFINE_PROCESS, sniffs, "socket"},
	{CONFINE_PROCESS, sniffs_keys, "socket"},
	{CONFINE_PROCESS, other_numbers, "number 1073741863"},
	{CONFINE_PROCESS, becomes_another, "setuid"},
	{CONFINE_PROCESS, terminal_ioctl, "ioctl"},
};

START_TEST(what_is_not_in_the_list_is_not_done_and_told_by_name)
{
	char said[512], want[96];
	int status = child(cases[_i].kind, cases[_i].what, said);
	if (!cases[_i].call) {
		ck_assert_msg(status == 0, "status %d: %s", status, said);
		return;
	}
	bool ends = cases[_i].fate == ENDS;
	ck_assert_msg((status == FORBIDDEN) == ends, "status %d: %s", status, said);
	snprintf(want, sizeof want,
		 ends ? "forbids the call %s: the process ends" : "does not have the call %s: it fails",
		 cases[_i].call);
	ck_assert_msg(strstr(said, want) != NULL, "%s", said);
}
END_TEST

START_TEST(an_unforeseen_call_fails_and_is_told_once)
{
	char said[512];
	int status = child(CONFINE_DISK, unforeseen, said);
	ck_assert_msg(status == 0, "status %d: %s", status, said);
	ck_assert_str_eq(said, "error: the filter of disk threads does not have the call getppid: it fails, "
			       "and this is said once\n"
			       "error: the filter of disk threads does not have the call openat: it fails, "
			       "and this is said once\n");
}
END_TEST

/* In memory of this thread's own: malloc then looks at /proc/sys/vm/overcommit_memory. */
static void *gives_back(void *arg)
{
	char *blocks[16];
	if (confine_thread(CONFINE_VCPU, NULL))
		return arg;
	for (int i = 0; i < 16; i++)
		memset(blocks[i] = malloc(100000), 1, 100000);
	for (int i = 16; i-- > 0;)
		free(blocks[i]);
	return NULL;
}

START_TEST(malloc_may_give_memory_back)
{
	int status;
	pid_t pid = fork();
	if (pid == 0) {
		pthread_t t;
		void *failed = NULL;
		if (confine_enable(NULL) || pthread_create(&t, NULL, gives_back, &failed) ||
		    pthread_join(t, &failed))
			_exit(99);
		_exit(failed ? 1 : 0);
	}
	ck_assert_int_eq(waitpid(pid, &status, 0), pid);
	ck_assert_int_eq(status, 0);
}
END_TEST

static void *confined(void *arg)
{
	return confine_thread(CONFINE_VCPU, NULL) ? arg : NULL;
}
static int other_threads_go_on(void)
{
	return open("/etc/passwd", O_RDONLY) < 0 ? 1 : 0;
}

START_TEST(a_filter_is_of_its_thread_alone_and_privileges_are_not_gained)
{
	int status;
	pid_t pid = fork();
	if (pid == 0) {
		pthread_t t;
		void *failed = NULL;
		if (confine_enable(NULL) || pthread_create(&t, NULL, confined, &failed) ||
		    pthread_join(t, &failed) || failed)
			_exit(99);
		_exit(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1 ? other_threads_go_on() : 98);
	}
	ck_assert_int_eq(waitpid(pid, &status, 0), pid);
	ck_assert_int_eq(status, 0);
}
END_TEST

START_TEST(capabilities_are_gone_for_good)
{
	int status;
	pid_t pid = fork();
	if (pid == 0) {
		char line[256];
		unsigned long long effective = 1, permitted = 1;
		if (confine_enable(NULL) || confine_drop_capabilities(NULL))
			_exit(99);
		FILE *f = fopen("/proc/self/status", "re");
		while (f && fgets(line, sizeof line, f)) {
			sscanf(line, "CapEff: %llx", &effective);
			sscanf(line, "CapPrm: %llx", &permitted);
		}
		_exit(effective || permitted ? 1 : 0);
	}
	ck_assert_int_eq(waitpid(pid, &status, 0), pid);
	ck_assert_int_eq(status, 0);
}
END_TEST

START_TEST(without_enable_nothing_is_forbidden)
{
	ck_assert_int_eq(confine_thread(CONFINE_VCPU, NULL), 0);
	ck_assert_int_eq(other_threads_go_on(), 0);
}
END_TEST

START_TEST(not_under_valgrind)
{
	puts("skipped: filters of system calls, under valgrind");
	fflush(stdout);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("confine");
	TCase *tc = tcase_create("confine");
	/* valgrind makes calls of its own in a thread's name */
	const char *wrap = getenv("SNM_WRAP");
	if (wrap && strstr(wrap, "valgrind")) {
		tcase_add_test(tc, not_under_valgrind);
	} else {
		tcase_add_loop_test(tc, what_is_not_in_the_list_is_not_done_and_told_by_name, 0,
				    (int)ARRAY_SIZE(cases));
		tcase_add_test(tc, an_unforeseen_call_fails_and_is_told_once);
		tcase_add_test(tc, a_filter_is_of_its_thread_alone_and_privileges_are_not_gained);
		tcase_add_test(tc, capabilities_are_gone_for_good);
		tcase_add_test(tc, malloc_may_give_memory_back);
		tcase_add_test(tc, without_enable_nothing_is_forbidden);
	}
	suite_add_tcase(s, tc);
	return suite_run(s);
}
