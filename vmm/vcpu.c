/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A vCPU and its thread. The thread is parked on m->cond or runs the guest. To stop it, under m->lock,
 * `allowed` becomes false (or its own `off_turn` true), run->immediate_exit 1, and a signal is sent: whoever
 * is before KVM_RUN is turned back by immediate_exit, whoever is in it by the signal. Only the thread itself,
 * under m->lock and when allowed, sets immediate_exit to 0 again.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/confine.h"
#include "base/log.h"
#include "vmm/machine_internal.h"
#include "vmm/state.h"

#define KICK_SIGNAL SIGRTMIN

static __thread struct kvm_run *this_run;

static void set_immediate_exit(struct kvm_run *run, uint8_t v)
{
	__atomic_store_n(&run->immediate_exit, v, __ATOMIC_RELEASE);
}

static void on_kick(int sig)
{
	(void)sig;
	if (this_run)
		set_immediate_exit(this_run, 1);
}

static void install_handler(void)
{
	struct sigaction sa = {.sa_handler = on_kick};
	sigemptyset(&sa.sa_mask);
	sigaction(KICK_SIGNAL, &sa, NULL);
}

void vcpus_update_allowed(struct machine *m)
{
	__atomic_store_n(&m->allowed, m->want_run && m->power == POWER_ON, __ATOMIC_RELEASE);
}

void vcpu_kick(struct vcpu *v)
{
	if (!v->thread_started)
		return;
	set_immediate_exit(v->run, 1);
	pthread_kill(v->thread, KICK_SIGNAL);
}

void vcpus_kick(struct machine *m)
{
	for (unsigned i = 0; i < m->ncpus; i++)
		vcpu_kick(&m->vcpus[i]);
}

static bool may_run(const struct vcpu *v)
{
	return __atomic_load_n(&v->m->allowed, __ATOMIC_ACQUIRE) &&
	       !__atomic_load_n(&v->off_turn, __ATOMIC_ACQUIRE);
}

static void crash(struct vcpu *v, const char *what)
{
	char detail[160];
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	memset(&regs, 0, sizeof regs);
	memset(&sregs, 0, sizeof sregs);
	kvm_ioctl(v->fd, KVM_GET_REGS, &regs);
	kvm_ioctl(v->fd, KVM_GET_SREGS, &sregs);
	log_error("vCPU %u: %s: rip %llx rflags %llx cs %x cr0 %llx cr2 %llx cr3 %llx cr4 %llx efer %llx",
		  v->id, what, regs.rip, regs.rflags, sregs.cs.selector, sregs.cr0, sregs.cr2, sregs.cr3,
		  sregs.cr4, sregs.efer);
	log_error("vCPU %u: rax %llx rbx %llx rcx %llx rdx %llx rsi %llx rdi %llx rsp %llx rbp %llx", v->id,
		  regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rsp, regs.rbp);
	snprintf(detail, sizeof detail, "vCPU %u: %s at rip %llx", v->id, what, regs.rip);
	machine_request_power(v->m, POWER_CRASHED, detail);
}

static void handle_io(struct vcpu *v)
{
	struct kvm_run *run = v->run;
	uint8_t *p = (uint8_t *)run + run->io.data_offset;
	for (uint32_t i = 0; i < run->io.count; i++, p += run->io.size) {
		if (run->io.direction == KVM_EXIT_IO_OUT)
			bus_write(v->m->bus, BUS_PIO, run->io.port, p, run->io.size);
		else
			bus_read(v->m->bus, BUS_PIO, run->io.port, p, run->io.size);
	}
	v->pending_io = true;
}

static void handle_exit(struct vcpu *v)
{
	struct kvm_run *run = v->run;
	char what[96];
	switch (run->exit_reason) {
	case KVM_EXIT_IO:
		handle_io(v);
		return;
	case KVM_EXIT_MMIO:
		if (run->mmio.is_write)
			bus_write(v->m->bus, BUS_MMIO, run->mmio.phys_addr, run->mmio.data, run->mmio.len);
		else
			bus_read(v->m->bus, BUS_MMIO, run->mmio.phys_addr, run->mmio.data, run->mmio.len);
		v->pending_io = true;
		return;
	case KVM_EXIT_INTR:
	case KVM_EXIT_IRQ_WINDOW_OPEN:
	case KVM_EXIT_HLT: /* the in-kernel LAPIC waits itself; nothing to do but enter again */
		return;
	case KVM_EXIT_SHUTDOWN:
		crash(v, "triple fault");
		return;
	case KVM_EXIT_SYSTEM_EVENT:
		if (run->system_event.type == KVM_SYSTEM_EVENT_SHUTDOWN)
			machine_request_power(v->m, POWER_OFF, "system event");
		else if (run->system_event.type == KVM_SYSTEM_EVENT_RESET)
			machine_request_power(v->m, POWER_RESET, "system event");
		else
			crash(v, "system event: crash");
		return;
	case KVM_EXIT_INTERNAL_ERROR:
		snprintf(what, sizeof what, "KVM internal error %u", run->internal.suberror);
		for (uint32_t i = 0; i < run->internal.ndata && i < 16; i++)
			log_error("vCPU %u: internal error data %u: %llx", v->id, i, run->internal.data[i]);
		crash(v, what);
		return;
	case KVM_EXIT_FAIL_ENTRY:
		snprintf(what, sizeof what, "failed entry, reason 0x%llx",
			 run->fail_entry.hardware_entry_failure_reason);
		crash(v, what);
		return;
	default:
		snprintf(what, sizeof what, "unknown exit %u", run->exit_reason);
		crash(v, what);
		return;
	}
}

/* One KVM_RUN. False when it failed for good. */
static bool run_once(struct vcpu *v)
{
	v->pending_io = false;
	if (ioctl(v->fd, KVM_RUN, NULL) == 0) {
		handle_exit(v);
		return true;
	}
	if (errno == EINTR || errno == EAGAIN)
		return true;
	char what[96];
	snprintf(what, sizeof what, "KVM_RUN: %s", strerror(errno));
	crash(v, what);
	return false;
}

/* Caller holds m->lock, which is released meanwhile. The work is its owner's until its last call is counted.
 */
static void take_part(struct machine *m)
{
	struct vcpu_work *w = m->work;
	while (w && w->next < m->ncpus) {
		struct vcpu *v = &m->vcpus[w->next++];
		struct error err = ERROR_INIT;
		pthread_mutex_unlock(&m->lock);
		int ret = w->call(v, w->opaque, &err);
		pthread_mutex_lock(&m->lock);
		if (ret && !error_is_set(&w->failure))
			w->failure = err;
		if (++w->done == m->ncpus)
			pthread_cond_signal(&m->parked);
	}
}

int vcpus_each(struct machine *m, int (*call)(struct vcpu *v, void *opaque, struct error *err), void *opaque,
	       struct error *err)
{
	struct vcpu_work w = {.call = call, .opaque = opaque, .failure = ERROR_INIT};
	long helpers = sysconf(_SC_NPROCESSORS_ONLN) - 1;
	pthread_mutex_lock(&m->lock);
	m->work = &w;
	/* Not all of them: a thread more than there are processors only costs its waking. */
	for (long i = 0; i < helpers && i < (long)m->ncpus - 1; i++)
		pthread_cond_signal(&m->cond);
	take_part(m);
	while (w.done < m->ncpus)
		pthread_cond_wait(&m->parked, &m->lock);
	m->work = NULL;
	pthread_mutex_unlock(&m->lock);
	if (error_is_set(&w.failure))
		error_copy(err, &w.failure);
	return w.failure.code;
}

static void *vcpu_main(void *arg)
{
	struct vcpu *v = arg;
	struct machine *m = v->m;
	char name[16];
	snprintf(name, sizeof name, "vcpu %u", v->id);
	pthread_setname_np(pthread_self(), name);
	this_run = v->run;
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, KICK_SIGNAL);
	pthread_sigmask(SIG_UNBLOCK, &set, NULL);
	confine_self(CONFINE_VCPU);

	pthread_mutex_lock(&m->lock);
	for (;;) {
		while (!m->quit && !may_run(v)) {
			if (m->work && m->work->next < m->ncpus)
				take_part(m);
			else
				pthread_cond_wait(&m->cond, &m->lock);
		}
		if (m->quit)
			break;
		m->running++;
		set_immediate_exit(v->run, 0);
		pthread_mutex_unlock(&m->lock);

		while (may_run(v) && run_once(v))
			;
		/* The registers are up to date only once KVM has taken in what an I/O exit read. */
		set_immediate_exit(v->run, 1);
		while (v->pending_io && run_once(v))
			;

		pthread_mutex_lock(&m->lock);
		if (!--m->running)
			pthread_cond_broadcast(&m->parked);
	}
	pthread_mutex_unlock(&m->lock);
	return NULL;
}

int vcpu_create(struct machine *m, unsigned id, struct error *err)
{
	struct vcpu *v = &m->vcpus[id];
	v->m = m;
	v->id = id;
	v->fd = kvm_ioctl(m->vm_fd, KVM_CREATE_VCPU, (void *)(uintptr_t)id);
	if (v->fd < 0)
		return error_errno(err, v->fd, "vCPU %u", id);
	v->run = mmap(NULL, m->caps.run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, 0);
	if (v->run == MAP_FAILED) {
		v->run = NULL;
		return error_errno(err, errno, "vCPU %u: map", id);
	}
	if (m->tsc_khz) {
		int ret = kvm_ioctl(v->fd, KVM_SET_TSC_KHZ, (void *)(uintptr_t)m->tsc_khz);
		/* Without scaling, a rate within KVM's tolerance needs nothing; machine_cpu_check judged it.
		 */
		if (ret < 0 && m->caps.tsc_control)
			return error_errno(err, ret, "vCPU %u: TSC rate %u kHz", id, m->tsc_khz);
	}
	/* Asked now: on a vCPU that runs, the ioctl would wait for its next exit. */
	if (id == 0) {
		int khz = kvm_ioctl(v->fd, KVM_GET_TSC_KHZ, NULL);
		m->guest_tsc_khz = khz > 0 ? (uint32_t)khz : 0;
	}
	throttle_vcpu_created(v);
	return cpuid_set(v, err);
}

int vcpu_start_thread(struct vcpu *v, struct error *err)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	pthread_once(&once, install_handler);
	/* Signals meant for the process go to the main thread. */
	sigset_t all, old;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	int ret = pthread_create(&v->thread, NULL, vcpu_main, v);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (ret)
		return error_errno(err, ret, "vCPU %u: thread", v->id);
	v->thread_started = true;
	return 0;
}

void vcpu_destroy(struct vcpu *v)
{
	if (v->thread_started)
		pthread_join(v->thread, NULL);
	if (v->run)
		munmap(v->run, v->m->caps.run_bytes);
	if (v->fd >= 0)
		close(v->fd);
	v->fd = -1;
	state_writer_free(v->saved);
	v->saved = NULL;
}
