/* SPDX-License-Identifier: Apache-2.0 */
#include "base/confine.h"

#include <cap-ng.h>
#include <errno.h>
#include <linux/if_tun.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <seccomp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"

#define CALL_NAMES_MAX	512
#define CALL_NAME_BYTES 32
#define EXIT_FORBIDDEN	70

struct rule {
	const char *call, *why;
};

static const struct rule common[] = {
	{"read", "eventfds; a socket's bytes"},
	{"write", "log lines; eventfds that wake other threads"},
	{"futex", "locks and conditions"},
	{"brk", "memory for messages and errors"},
	{"munmap", "likewise"},
	{"mremap", "likewise"},
	{"madvise", "likewise; a thread's stack at its end"},
	{"close", "descriptors that are done with"},
	{"clock_gettime", "log lines and deadlines where the vDSO has no clock"},
	{"getpid", "log lines; OpenSSL looks for a fork before it draws random numbers"},
	{"sched_getaffinity", "malloc counts the processors before it gives a thread memory of its own"},
	{"gettid", "a broken assertion's end"},
	{"tgkill", "likewise; vCPUs that have to look up when one asks for a reset"},
	{"rt_sigprocmask", "locks that are held with signals blocked"},
	{"rt_sigreturn", "the end of a signal's handler"},
	{"restart_syscall", "a wait that a stop and continue interrupted"},
	{"exit", "the end of the thread"},
	{"exit_group", "the end of the process"},
};

static const struct rule pairing[] = {
	{"poll", "waits for the stranger and the daemon"},
	{"ppoll", "likewise"},
	{"recvfrom", "the stranger's bytes"},
	{"sendto", "TLS records to the stranger"},
	{"recvmsg", "the daemon's answer"},
	{"sendmsg", "the question to the daemon"},
	{"shutdown", "the end of the connection"},
	{"fcntl", "non-blocking sockets"},
	{"getsockopt", "the kind of the daemon's socket"},
	{"setsockopt", "the time that the daemon's socket may take"},
	{"eventfd2", "what wakes a connection's waiters"},
	{"getrandom", "TLS keys"},
	{"getuid", "OpenSSL asks whether it runs with another's rights"},
	{"geteuid", "likewise"},
	{"getgid", "likewise"},
	{"getegid", "likewise"},
};

static const struct rule vcpu[] = {
	{"eventfd2", "an interrupt's descriptor, when the guest sets up MSI-X"},
};

static const struct {
	const char *name;
	const struct rule *rules;
	size_t count;
} kinds[] = {[CONFINE_PAIRING] = {"pairing", pairing, ARRAY_SIZE(pairing)},
	     [CONFINE_VCPU] = {"vCPU", vcpu, ARRAY_SIZE(vcpu)}};

static atomic_bool enabled;
/* Made before the first filter: a handler may not allocate. */
static char call_names[CALL_NAMES_MAX][CALL_NAME_BYTES];

/* Async-signal-safe. */
static size_t append(char *line, size_t at, size_t size, const char *text)
{
	while (*text && at + 1 < size)
		line[at++] = *text++;
	return at;
}

static void on_forbidden(int sig, siginfo_t *info, void *context)
{
	char line[160], number[12];
	size_t n = append(line, 0, sizeof line, "error: the filter of this thread forbids the call ");
	int nr = info->si_syscall;
	if (nr >= 0 && nr < CALL_NAMES_MAX && *call_names[nr]) {
		n = append(line, n, sizeof line, call_names[nr]);
	} else {
		char *p = number + sizeof number;
		*--p = '\0';
		unsigned v = nr < 0 ? 0 : (unsigned)nr;
		do
			*--p = (char)('0' + v % 10);
		while (v /= 10);
		n = append(line, n, sizeof line, "number ");
		n = append(line, n, sizeof line, p);
	}
	n = append(line, n, sizeof line, ": the process ends\n");
	(void)!write(STDERR_FILENO, line, n);
	_exit(EXIT_FORBIDDEN);
}

static void learn_names(void)
{
	for (int nr = 0; nr < CALL_NAMES_MAX; nr++) {
		CLEANUP_FREE char *name = seccomp_syscall_resolve_num_arch(SCMP_ARCH_NATIVE, nr);
		if (name)
			snprintf(call_names[nr], CALL_NAME_BYTES, "%s", name);
	}
}

int confine_enable(struct error *err)
{
	struct sigaction sa = {.sa_sigaction = on_forbidden, .sa_flags = SA_SIGINFO};
	sigemptyset(&sa.sa_mask);
	learn_names();
	tzset(); /* a log line's time would open /etc/localtime */
	if (sigaction(SIGSYS, &sa, NULL) < 0)
		return error_errno(err, errno, "SIGSYS");
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
		return error_errno(err, errno, "no new privileges");
	enabled = true;
	return 0;
}

static int allow(scmp_filter_ctx filter, const struct rule *rules, size_t n)
{
	int rc = 0;
	for (size_t i = 0; !rc && i < n; i++)
		rc = seccomp_rule_add(filter, SCMP_ACT_ALLOW, seccomp_syscall_resolve_name(rules[i].call), 0);
	return rc;
}

/* Memory, but none that could be executed. */
static int allow_mapping(scmp_filter_ctx filter)
{
	int rc = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(mmap), 1,
				  SCMP_A2(SCMP_CMP_MASKED_EQ, PROT_EXEC, 0));
	return rc ? rc
		  : seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(mprotect), 1,
				     SCMP_A2(SCMP_CMP_MASKED_EQ, PROT_EXEC, 0));
}

/* KVM's, of any descriptor: running the guest, interrupts, registers. The tap's: what the guest's driver can
 * do. */
static int allow_vcpu_ioctls(scmp_filter_ctx filter)
{
	static const unsigned tap[] = {TUNSETOFFLOAD, TUNSETVNETHDRSZ};
	int rc = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(ioctl), 1,
				  SCMP_A1(SCMP_CMP_MASKED_EQ, 0xff00, KVMIO << 8));
	for (size_t i = 0; !rc && i < ARRAY_SIZE(tap); i++)
		rc = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(ioctl), 1,
				      SCMP_A1(SCMP_CMP_MASKED_EQ, 0xffffffff, tap[i]));
	return rc;
}

int confine_thread(enum confine_kind kind, struct error *err)
{
	sigset_t set;
	if (!enabled)
		return 0;
	scmp_filter_ctx filter = seccomp_init(SCMP_ACT_TRAP);
	if (!filter)
		return error_errno(err, ENOMEM, "filter of %s threads", kinds[kind].name);
	int rc = allow(filter, common, ARRAY_SIZE(common));
	if (!rc)
		rc = allow(filter, kinds[kind].rules, kinds[kind].count);
	if (!rc)
		rc = allow_mapping(filter);
	if (!rc && kind == CONFINE_VCPU)
		rc = allow_vcpu_ioctls(filter);
	/* blocked, it would end the process without a word */
	sigemptyset(&set);
	sigaddset(&set, SIGSYS);
	pthread_sigmask(SIG_UNBLOCK, &set, NULL);
	if (!rc)
		rc = seccomp_load(filter);
	seccomp_release(filter);
	return rc ? error_errno(err, rc, "filter of %s threads", kinds[kind].name) : 0;
}

int confine_drop_capabilities(struct error *err)
{
	if (!enabled)
		return 0;
	capng_clear(CAPNG_SELECT_BOTH);
	/* The bounding set is only root's to shrink; with no new privileges nothing comes of it any more. */
	if (capng_apply(CAPNG_SELECT_BOTH) < 0 && capng_apply(CAPNG_SELECT_CAPS) < 0)
		return error_set(err, EPERM, "the capabilities of this process cannot be given up");
	return 0;
}
