/* SPDX-License-Identifier: Apache-2.0 */
#include "base/confine.h"

#include <cap-ng.h>
#include <errno.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/fs.h>
#include <linux/if_tun.h>
#include <linux/kvm.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <seccomp.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/confine_lists.h"
#include "base/confine_trap.h"
#include "base/fault.h"
#include "base/log.h"

static atomic_bool enabled;
/* Made while there is one thread: making a filter takes calls, and time. */
static struct sock_fprog programs[CONFINE_KINDS];

/* ---- making the filters ---- */

static int add(scmp_filter_ctx filter, uint32_t action, const struct confine_list *list)
{
	int rc = 0;
	for (size_t i = 0; !rc && i < list->n; i++) {
		int nr = seccomp_syscall_resolve_name(list->rules[i].call);
		if (nr != __NR_SCMP_ERROR) /* a library older than the call: the kernel may be, too */
			rc = seccomp_rule_add(filter, action, nr, 0);
	}
	return rc;
}

/* Memory, but none that could be executed; a name for the thread. */
static int add_common_arguments(scmp_filter_ctx filter)
{
	int rc = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(mmap), 1,
				  SCMP_A2(SCMP_CMP_MASKED_EQ, PROT_EXEC, 0));
	if (!rc)
		rc = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(mprotect), 1,
				      SCMP_A2(SCMP_CMP_MASKED_EQ, PROT_EXEC, 0));
	return rc ? rc
		  : seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(prctl), 1,
				     SCMP_A0(SCMP_CMP_EQ, PR_SET_NAME));
}

static int add_ioctl(scmp_filter_ctx filter, uint64_t mask, uint64_t value)
{
	return seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(ioctl), 1,
				SCMP_A1(SCMP_CMP_MASKED_EQ, mask, value));
}

/* No namespaces, no processes; the arguments of clone3 lie where a filter cannot look. */
static int add_threads(scmp_filter_ctx filter)
{
	const uint64_t thread = CLONE_THREAD | CLONE_VM;
	int rc = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(clone), 1,
				  SCMP_A0(SCMP_CMP_MASKED_EQ, thread, thread));
	if (!rc)
		rc = seccomp_rule_add(filter, SCMP_ACT_ERRNO(ENOSYS), SCMP_SYS(clone3), 0);
	if (!rc)
		rc = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(rseq), 0);
	return rc ? rc : seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(set_robust_list), 0);
}

static int add_yield(scmp_filter_ctx filter)
{
	static const int policies[] = {SCHED_OTHER, SCHED_BATCH, SCHED_IDLE};
	int rc = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(sched_getscheduler), 0);
	for (size_t i = 0; !rc && i < ARRAY_SIZE(policies); i++)
		rc = seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(sched_setscheduler), 1,
				      SCMP_A1_32(SCMP_CMP_EQ, (uint32_t)policies[i]));
	return rc;
}

static int add_arguments(scmp_filter_ctx filter, unsigned what)
{
	static const unsigned tap[] = {TUNSETOFFLOAD, TUNSETVNETHDRSZ, TUNGETVNETHDRSZ, TUNGETIFF};
	int rc = add_common_arguments(filter);
	if (!rc && what & CONFINE_IOCTL_KVM)
		rc = add_ioctl(filter, 0xff00, KVMIO << 8);
	for (size_t i = 0; !rc && what & CONFINE_IOCTL_TAP && i < ARRAY_SIZE(tap); i++)
		rc = add_ioctl(filter, 0xffffffff, tap[i]);
	if (!rc && what & CONFINE_IOCTL_FAULTS)
		rc = add_ioctl(filter, 0xff00, UFFDIO << 8);
	if (!rc && what & CONFINE_IOCTL_ZERO)
		rc = add_ioctl(filter, 0xffffffff, BLKZEROOUT);
	if (!rc && what & CONFINE_THREADS)
		rc = add_threads(filter);
	if (!rc && what & CONFINE_YIELD)
		rc = add_yield(filter);
	return rc;
}

static int add_allowed(scmp_filter_ctx filter, const struct confine_allowed *allowed)
{
	int rc = 0;
	for (unsigned i = 0; !rc && i < CONFINE_LISTS_MAX && allowed->lists[i]; i++)
		rc = add(filter, SCMP_ACT_ALLOW, allowed->lists[i]);
	if (!rc && getenv("SNM_FAULT"))
		rc = add(filter, SCMP_ACT_ALLOW, &confine_faults);
	return rc ? rc : add_arguments(filter, allowed->with_arguments);
}

static int add_denied(scmp_filter_ctx filter)
{
	static const uint64_t namespaces[] = {CLONE_NEWNS,   CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC,
					      CLONE_NEWUSER, CLONE_NEWPID,    CLONE_NEWNET};
	int rc = add(filter, SCMP_ACT_TRAP, &confine_denied);
	for (size_t i = 0; !rc && i < ARRAY_SIZE(namespaces); i++)
		rc = seccomp_rule_add(filter, SCMP_ACT_TRAP, SCMP_SYS(clone), 1,
				      SCMP_A0(SCMP_CMP_MASKED_EQ, namespaces[i], namespaces[i]));
	if (!rc)
		rc = seccomp_rule_add(filter, SCMP_ACT_ERRNO(ENOSYS), SCMP_SYS(clone3), 0);
	for (unsigned family = 0; !rc && family < AF_NETLINK; family++)
		if (family != AF_UNIX && family != AF_INET && family != AF_INET6)
			rc = seccomp_rule_add(filter, SCMP_ACT_TRAP, SCMP_SYS(socket), 1,
					      SCMP_A0(SCMP_CMP_EQ, family));
	if (!rc)
		rc = seccomp_rule_add(filter, SCMP_ACT_TRAP, SCMP_SYS(socket), 1,
				      SCMP_A0(SCMP_CMP_GT, AF_NETLINK));
	return rc ? rc
		  : seccomp_rule_add(filter, SCMP_ACT_TRAP, SCMP_SYS(ioctl), 1,
				     SCMP_A1(SCMP_CMP_MASKED_EQ, 0xffffffff, TIOCSTI));
}

/* The filter as the kernel takes it. */
static int export(scmp_filter_ctx filter, struct sock_fprog *out)
{
	CLEANUP_FD int fd = memfd_create("filter", MFD_CLOEXEC);
	struct stat st;
	int rc = fd < 0 ? -errno : seccomp_export_bpf(filter, fd);
	if (rc)
		return rc;
	if (fstat(fd, &st) < 0)
		return -errno;
	CLEANUP_FREE struct sock_filter *code = malloc((size_t)st.st_size);
	if (!code)
		return -ENOMEM;
	if (pread(fd, code, (size_t)st.st_size, 0) != st.st_size)
		return -EIO;
	out->len = (unsigned short)((size_t)st.st_size / sizeof *code);
	out->filter = steal_ptr(code);
	return 0;
}

static int make_filter(enum confine_kind kind, struct error *err)
{
	bool denies = kind == CONFINE_PROCESS;
	scmp_filter_ctx filter = seccomp_init(denies ? SCMP_ACT_ALLOW : SCMP_ACT_TRAP);
	if (!filter)
		return error_errno(err, ENOMEM, "filter of %s", confine_allowed[kind].name);
	int rc = denies ? add_denied(filter) : add_allowed(filter, &confine_allowed[kind]);
	if (!rc) /* calls by another machine's numbers: the library's own answer ends one thread, silently */
		rc = seccomp_attr_set(filter, SCMP_FLTATR_ACT_BADARCH, SCMP_ACT_TRAP);
	if (!rc)
		rc = seccomp_attr_set(filter, SCMP_FLTATR_CTL_OPTIMIZE, 2); /* a tree, not a chain */
	if (!rc)
		rc = export(filter, &programs[kind]);
	seccomp_release(filter);
	return rc ? error_errno(err, rc, "filter of %s", confine_allowed[kind].name) : 0;
}

/* ---- using them ---- */

int confine_enable(struct error *err)
{
	tzset(); /* a log line's time would open /etc/localtime */
	int rc = 0;
	for (unsigned kind = 0; !rc && kind < CONFINE_KINDS; kind++)
		rc = make_filter(kind, err);
	if (rc)
		return rc;
	rc = confine_trap_init();
	if (rc)
		return error_errno(err, rc, "SIGSYS");
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
		return error_errno(err, errno, "no new privileges");
	enabled = true;
	return 0;
}

/* Of the calling thread alone. With no new privileges an executed file gets none that are gone. */
static int keep_capabilities(uint64_t keep)
{
	struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct caps[_LINUX_CAPABILITY_U32S_3];
	if (syscall(SYS_capget, &head, caps) < 0)
		return -errno;
	for (unsigned i = 0; i < _LINUX_CAPABILITY_U32S_3; i++) {
		uint32_t mask = (uint32_t)(keep >> (32 * i));
		caps[i].effective &= mask;
		caps[i].permitted &= mask;
		caps[i].inheritable = 0;
	}
	return syscall(SYS_capset, &head, caps) < 0 ? -errno : 0;
}

int confine_thread(enum confine_kind kind, struct error *err)
{
	const struct confine_allowed *allowed = &confine_allowed[kind];
	char once[32], grave[32];
	if (!enabled)
		return 0;
	snprintf(once, sizeof once, "confine-%s", allowed->id);
	snprintf(grave, sizeof grave, "confine-%s-grave", allowed->id);
	/* looked at before the filter: a point may read files */
	bool ask_once = fault_point(once), ask_grave = fault_point(grave);
	confine_trap_expect(kind);
	int rc = keep_capabilities(allowed->capabilities);
	if (rc)
		return error_errno(err, rc, "capabilities of %s", allowed->name);
	/* Before Linux 5.16 a filter turned the processor's speculation down for its thread, which slows a
	 * guest and its memory's transfer. It is of no use here: the threads of a process share their memory
	 * anyway. */
	if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_SPEC_ALLOW, &programs[kind]) <
	    0)
		return error_errno(err, errno, "filter of %s", allowed->name);
	if (ask_once)
		syscall(SYS_getppid);
	if (ask_grave)
		syscall(SYS_ptrace, 0, 0, 0, 0);
	return 0;
}

void confine_self(enum confine_kind kind)
{
	struct error err = ERROR_INIT;
	if (!enabled)
		return;
	if (kind == CONFINE_PROCESS)
		confine_trap_expect(kind);
	else if (confine_thread(kind, &err))
		log_warn("a thread runs without a filter: %s", err.message);
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
