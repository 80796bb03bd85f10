/* SPDX-License-Identifier: Apache-2.0 */
#include "base/confine_lists.h"

#include <linux/capability.h>

#include "base/cleanup.h"

#define LIST(rules_)                                                                                         \
	{                                                                                                    \
		.rules = (rules_), .n = ARRAY_SIZE(rules_)                                                   \
	}

static const struct confine_rule common_rules[] = {
	{"read", "eventfds; a socket's bytes"},
	{"write", "log lines; eventfds that wake other threads"},
	{"writev", "the last words of a broken heap"},
	{"futex", "locks and conditions"},
	{"brk", "memory for messages and errors"},
	{"munmap", "likewise"},
	{"mremap", "likewise"},
	{"madvise", "likewise; a thread's stack at its end"},
	{"close", "descriptors that are done with"},
	{"clock_gettime", "log lines and deadlines where the vDSO has no clock"},
	{"gettimeofday", "likewise"},
	{"time", "likewise"},
	{"getpid", "log lines; OpenSSL looks for a fork before it draws random numbers"},
	{"sched_getaffinity", "malloc counts the processors before it gives a thread memory of its own"},
	{"gettid", "a broken assertion's end"},
	{"tgkill", "likewise; vCPUs that have to look up when one asks for a reset"},
	{"rt_sigprocmask", "locks that are held with signals blocked"},
	{"rt_sigreturn", "the end of a signal's handler"},
	{"sched_yield", "a kernel that is short of memory"},
	{"clock_nanosleep", "likewise; the bandwidth that was asked for"},
	{"restart_syscall", "a wait that a stop and continue interrupted"},
	{"exit", "the end of the thread"},
	{"exit_group", "the end of the process"},
};
static const struct confine_list common = LIST(common_rules);

static const struct confine_rule vcpu_rules[] = {
	{"eventfd2", "an interrupt's descriptor, when the guest sets up MSI-X"},
};
static const struct confine_list vcpu = LIST(vcpu_rules);

/* Whoever completes a request goes on with what waited for it: another disk's request, a write over NBD, the
 * reply to a client, an interrupt. So each thread that moves data may use connections that are there. */
static const struct confine_rule traffic_rules[] = {
	{"poll", "waits for connections"},
	{"recvfrom", "their bytes"},
	{"recvmsg", "their bytes, into several places"},
	{"sendto", "their bytes"},
	{"sendmsg", "their bytes, gathered"},
	{"shutdown", "the end of a connection"},
	{"getrandom", "fresh keys of TLS; the guest's entropy device"},
	{"getuid", "OpenSSL asks whether it runs with another's rights"},
	{"geteuid", "likewise"},
	{"getgid", "likewise"},
	{"getegid", "likewise"},
};
static const struct confine_list traffic = LIST(traffic_rules);

/* Those that make a connection of a socket, too. */
static const struct confine_rule pairing_rules[] = {
	{"ppoll", "waits for the stranger and the daemon"},
	{"fcntl", "non-blocking sockets"},
	{"getsockopt", "the kind of the daemon's socket"},
	{"setsockopt", "the time that the daemon's socket may take"},
	{"eventfd2", "what wakes a connection's waiters"},
};
static const struct confine_list pairing = LIST(pairing_rules);

/* Of what is open. */
static const struct confine_rule look_rules[] = {
	{"lseek", "holes and data of images and of guest memory"},
	{"fstat", "whether a file was cut"},
	{"newfstatat", "likewise, as the C library asks"},
	{"fadvise64", "what is compared is read from the medium, not from the page cache"},
};
static const struct confine_list look = LIST(look_rules);

/* Likewise. An idle disk does a small request in its submitter's thread (block/raw.c), a reply over NBD may
 * complete there, and so on: this, too, is everybody's who moves data. */
static const struct confine_rule contents_rules[] = {
	{"pread64", "images; how busy the processors are, from /proc/stat, which is open"},
	{"preadv", "images"},
	{"pwrite64", "kernel and initrd that travel along"},
	{"pwritev", "images"},
	{"pwritev2", "likewise, some through to the medium"},
	{"fdatasync", "flushes"},
	{"fallocate", "zeroes and discards; pages of guest memory that are given back"},
	{"ftruncate", "a file whose size is no multiple of its alignment"},
	{"mincore", "which pages of guest memory are there to be sent"},
};
static const struct confine_list contents = LIST(contents_rules);

static const struct confine_rule device_rules[] = {
	{"epoll_wait", "waits for the guest's queues and the tap"},
	{"accept4", "whoever wants to read the console"},
};
static const struct confine_list device = LIST(device_rules);

static const struct confine_rule disk_rules[] = {
	{"io_uring_enter", "the ring, which takes reads, writes and flushes of its one file alone"},
};
static const struct confine_list disk = LIST(disk_rules);

static const struct confine_rule fault_rules[] = {
	{"openat", "a point that was hit leaves a file"},
	{"access", "and waits for another"},
	{"faccessat", "likewise"},
	{"faccessat2", "likewise"},
	{"newfstatat", "printing to it"},
	{"fstat", "likewise"},
	{"lseek", "likewise"},
	{"kill", "a point that kills"},
};
const struct confine_list confine_faults = LIST(fault_rules);

#define CAPABILITY(cap) (UINT64_C(1) << (cap))
/* From SCHED_IDLE to SCHED_OTHER again (memxfer/yield.h), which some kernels allow nobody else; the filter
 * lets no policy through that is ahead of others. */
#define YIELD_CAPABILITY CAPABILITY(CAP_SYS_NICE)
/* taps; kernel-mode faults of guest memory; disks that belong to others; memory that is locked, and the last
 * blocks of a file system */
#define WIDE_CAPABILITIES                                                                                    \
	(CAPABILITY(CAP_NET_ADMIN) | CAPABILITY(CAP_SYS_PTRACE) | CAPABILITY(CAP_DAC_OVERRIDE) |             \
	 CAPABILITY(CAP_IPC_LOCK) | CAPABILITY(CAP_SYS_RESOURCE) | YIELD_CAPABILITY)

#define MOVES_DATA &common, &traffic, &look, &contents

const struct confine_allowed confine_allowed[CONFINE_KINDS] = {
	[CONFINE_PAIRING] = {"pairing", "pairing threads", {&common, &traffic, &pairing}, 0},
	[CONFINE_VCPU] = {"vcpu", "vCPU threads", {&common, &vcpu}, CONFINE_IOCTL_KVM | CONFINE_IOCTL_TAP},
	[CONFINE_DEVICE] = {"device",
			    "device threads",
			    {MOVES_DATA, &device},
			    CONFINE_IOCTL_KVM | CONFINE_IOCTL_TAP},
	[CONFINE_DISK] = {"disk",
			  "disk threads",
			  {MOVES_DATA, &disk},
			  CONFINE_IOCTL_KVM | CONFINE_IOCTL_ZERO},
	[CONFINE_NBD] = {"nbd", "NBD threads", {MOVES_DATA}, CONFINE_IOCTL_KVM | CONFINE_THREADS},
	[CONFINE_MEMORY] = {"memory",
			    "memory threads",
			    {MOVES_DATA},
			    CONFINE_IOCTL_KVM | CONFINE_IOCTL_FAULTS | CONFINE_THREADS | CONFINE_YIELD,
			    YIELD_CAPABILITY},
	[CONFINE_MIRROR] = {"mirror", "mirror threads", {MOVES_DATA}, CONFINE_IOCTL_KVM},
	[CONFINE_LINK] = {"link",
			  "control channel threads",
			  {MOVES_DATA},
			  CONFINE_IOCTL_KVM | CONFINE_IOCTL_FAULTS},
	[CONFINE_PROCESS] = {"process", "this process", {NULL}, 0, WIDE_CAPABILITIES},
};

static const struct confine_rule denied_rules[] = {
	{"ptrace", "other processes are nobody's business here"},
	{"process_vm_readv", "likewise"},
	{"process_vm_writev", "likewise"},
	{"process_madvise", "likewise"},
	{"pidfd_getfd", "likewise"},
	{"kcmp", "likewise"},
	{"mount", "the view of the file system stays"},
	{"umount2", "likewise"},
	{"move_mount", "likewise"},
	{"open_tree", "likewise"},
	{"mount_setattr", "likewise"},
	{"fsopen", "likewise"},
	{"fsconfig", "likewise"},
	{"fsmount", "likewise"},
	{"fspick", "likewise"},
	{"pivot_root", "likewise"},
	{"chroot", "likewise"},
	{"unshare", "namespaces widen what of the kernel can be reached"},
	{"setns", "likewise"},
	{"open_by_handle_at", "files past their folders' rights"},
	{"mknod", "devices"},
	{"mknodat", "likewise"},
	{"bpf", "programs in the kernel"},
	{"perf_event_open", "a large surface, and a view of others"},
	{"fanotify_init", "a view of others' files"},
	{"add_key", "the kernel's keys"},
	{"request_key", "likewise"},
	{"keyctl", "likewise"},
	{"init_module", "the kernel itself"},
	{"finit_module", "likewise"},
	{"delete_module", "likewise"},
	{"kexec_load", "likewise"},
	{"kexec_file_load", "likewise"},
	{"reboot", "the host"},
	{"swapon", "likewise"},
	{"swapoff", "likewise"},
	{"acct", "likewise"},
	{"quotactl", "likewise"},
	{"quotactl_fd", "likewise"},
	{"sethostname", "likewise"},
	{"setdomainname", "likewise"},
	{"vhangup", "likewise"},
	{"settimeofday", "likewise"},
	{"clock_settime", "likewise"},
	{"adjtimex", "likewise"},
	{"clock_adjtime", "likewise"},
	{"syslog", "the kernel's log"},
	{"iopl", "ports of the machine"},
	{"ioperm", "likewise"},
	{"modify_ldt", "old corners of the processor"},
	{"vm86", "likewise"},
	{"setuid", "who this process is does not change"},
	{"setgid", "likewise"},
	{"setreuid", "likewise"},
	{"setregid", "likewise"},
	{"setresuid", "likewise"},
	{"setresgid", "likewise"},
	{"setgroups", "likewise"},
	{"setfsuid", "likewise"},
	{"setfsgid", "likewise"},
};
const struct confine_list confine_denied = LIST(denied_rules);

/* Added to what is denied to all: whoever makes one of these in a thread with a list of its own has the
 * thread in his hands. No library comes to them unasked. What is neither in a thread's list nor here fails
 * without ending anything: in a rare moment, or with a newer C library, it may be one that nobody thought of.
 */
static const struct confine_rule grave_rules[] = {
	{"execve", "other programs"},
	{"execveat", "likewise"},
	{"fork", "processes"},
	{"vfork", "likewise"},
	{"clone", "likewise: threads are allowed where they are needed"},
	{"kill", "other processes; tgkill is for the threads of this one"},
	{"tkill", "likewise"},
	{"rt_sigqueueinfo", "likewise"},
	{"rt_tgsigqueueinfo", "likewise"},
	{"pidfd_open", "likewise"},
	{"pidfd_send_signal", "likewise"},
	{"mmap", "memory that can be executed, as other memory is allowed"},
	{"mprotect", "likewise"},
	{"pkey_mprotect", "likewise"},
	{"personality", "likewise: every readable page"},
	{"rt_sigaction", "the handler that tells of all this"},
	{"socket", "connections that nobody made for this thread"},
	{"connect", "likewise"},
	{"bind", "likewise"},
	{"listen", "likewise"},
	{"io_uring_setup", "a ring does what it is asked past every filter"},
	{"io_uring_register", "likewise: it lifts what a ring is restricted to"},
	{"userfaultfd", "the faults of others"},
	{"creat", "files' names, and whose they are"},
	{"rename", "likewise"},
	{"renameat", "likewise"},
	{"renameat2", "likewise"},
	{"unlink", "likewise"},
	{"unlinkat", "likewise"},
	{"link", "likewise"},
	{"linkat", "likewise"},
	{"symlink", "likewise"},
	{"symlinkat", "likewise"},
	{"mkdir", "likewise"},
	{"mkdirat", "likewise"},
	{"rmdir", "likewise"},
	{"truncate", "likewise"},
	{"chmod", "likewise"},
	{"fchmod", "likewise"},
	{"fchmodat", "likewise"},
	{"chown", "likewise"},
	{"lchown", "likewise"},
	{"fchown", "likewise"},
	{"fchownat", "likewise"},
	{"setxattr", "likewise"},
	{"lsetxattr", "likewise"},
	{"fsetxattr", "likewise"},
};
const struct confine_list confine_grave = LIST(grave_rules);
