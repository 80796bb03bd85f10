/* SPDX-License-Identifier: Apache-2.0 */
#include "base/confine_trap.h"

#include <errno.h>
#include <linux/audit.h>
#include <pthread.h>
#include <seccomp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/confine_lists.h"

#define CALLS_MAX	512
#define CALL_NAME_BYTES 32
#define EXIT_FORBIDDEN	70

struct call {
	char name[CALL_NAME_BYTES];
	bool grave;
};

/* Filled while there is one thread: a handler may not allocate. */
static struct call calls[CALLS_MAX];
/* Kinds that have said so, a bit each. */
static atomic_uint told[CALLS_MAX];
/* One more than the kind; 0 in a thread that did not say. */
static _Thread_local unsigned own_kind;

/* Async-signal-safe. */
static size_t append(char *line, size_t at, size_t size, const char *text)
{
	while (*text && at + 1 < size)
		line[at++] = *text++;
	return at;
}

static size_t append_number(char *line, size_t at, size_t size, unsigned v)
{
	char digits[12], *p = digits + sizeof digits;
	*--p = '\0';
	do
		*--p = (char)('0' + v % 10);
	while (v /= 10);
	return append(line, at, size, p);
}

static void tell(int nr, const char *verb, const char *outcome)
{
	char line[192];
	size_t n = append(line, 0, sizeof line, "error: the filter of ");
	n = append(line, n, sizeof line, own_kind ? confine_allowed[own_kind - 1].name : "this thread");
	n = append(line, n, sizeof line, verb);
	if (nr >= 0 && nr < CALLS_MAX && *calls[nr].name) {
		n = append(line, n, sizeof line, calls[nr].name);
	} else {
		n = append(line, n, sizeof line, "number ");
		n = append_number(line, n, sizeof line, (unsigned)nr);
	}
	n = append(line, n, sizeof line, outcome);
	(void)!write(STDERR_FILENO, line, n);
}

/* Files that malloc looks at, once, wherever it comes to it: how many processors there are, which it then
 * asks otherwise, and how to give memory back, where "no" makes it choose the other way for good. */
static bool is_mallocs(const ucontext_t *at)
{
	static const char *const files[] = {"/sys/devices/system/cpu/online", "/proc/stat",
					    "/proc/sys/vm/overcommit_memory"};
	const char *path = (const char *)at->uc_mcontext.gregs[REG_RSI];
	size_t i = 0;
	while (i < ARRAY_SIZE(files) && strcmp(path, files[i]))
		i++;
	return i < ARRAY_SIZE(files);
}

static bool is_grave(const siginfo_t *info, const ucontext_t *at)
{
	int nr = info->si_syscall;
	if (info->si_arch != AUDIT_ARCH_X86_64 || nr < 0)
		return true; /* another machine's numbers, which nothing here was compiled for */
	if (nr == SYS_ioctl)
		return (unsigned)at->uc_mcontext.gregs[REG_RSI] == TIOCSTI;
	return nr < CALLS_MAX ? calls[nr].grave : nr & __X32_SYSCALL_BIT;
}

static void on_forbidden(int sig, siginfo_t *info, void *context)
{
	ucontext_t *at = context;
	int nr = info->si_syscall, before = errno;
	if (is_grave(info, at)) {
		tell(nr, " forbids the call ", ": the process ends\n");
		_exit(EXIT_FORBIDDEN);
	}
	at->uc_mcontext.gregs[REG_RAX] = nr == SYS_openat ? -EACCES : -ENOSYS;
	if ((nr != SYS_openat || !is_mallocs(at)) &&
	    !(nr < CALLS_MAX && atomic_fetch_or(&told[nr], 1U << own_kind) >> own_kind & 1))
		tell(nr, " does not have the call ", ": it fails, and this is said once\n");
	errno = before;
}

static void mark_grave(const struct confine_list *list)
{
	for (size_t i = 0; i < list->n; i++) {
		int nr = seccomp_syscall_resolve_name(list->rules[i].call);
		if (nr >= 0 && nr < CALLS_MAX)
			calls[nr].grave = true;
	}
}

int confine_trap_init(void)
{
	struct sigaction sa = {.sa_sigaction = on_forbidden, .sa_flags = SA_SIGINFO};
	sigemptyset(&sa.sa_mask);
	for (int nr = 0; nr < CALLS_MAX; nr++) {
		CLEANUP_FREE char *name = seccomp_syscall_resolve_num_arch(SCMP_ARCH_NATIVE, nr);
		if (name)
			snprintf(calls[nr].name, CALL_NAME_BYTES, "%s", name);
	}
	mark_grave(&confine_denied);
	mark_grave(&confine_grave);
	return sigaction(SIGSYS, &sa, NULL) < 0 ? -errno : 0;
}

/* Blocked, the signal would end the process without a word. */
void confine_trap_expect(enum confine_kind kind)
{
	sigset_t set;
	own_kind = kind + 1;
	sigemptyset(&set);
	sigaddset(&set, SIGSYS);
	pthread_sigmask(SIG_UNBLOCK, &set, NULL);
}
