/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A guest that is slowed down. Time is cut into periods; in each of them a vCPU runs for its share and is
 * held for the rest: its thread is parked as in a pause, so that stopping the machine does not wait for it.
 * One thread keeps the time, and only exists once a machine was slowed. Quotas of the kernel would not do:
 * they are for whole groups of threads, and the VMM's own have to run.
 *
 * Who is slowed how far: memxfer/pace.h, by what each vCPU dirties. KVM tells that per vCPU as the page
 * faults that it resolved, since a page whose dirtying is to be logged is write-protected. Where it tells
 * nothing (a processor that logs by itself), all are slowed alike.
 */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/cond.h"
#include "base/confine.h"
#include "base/log.h"
#include "memxfer/pace.h"
#include "vmm/machine_internal.h"

#define PERIOD_US      20000u
#define RUN_LEAST_US   1000u /* shorter turns are lost in waking up: the period grows instead */
#define STATS_NAME_MAX 256u
#define STATS_MAX      1024u

/* --- what each vCPU dirties --- */

/* Offsets of the two counters in the statistics of the vCPU whose descriptor fd is; -1: has it not. */
static void find_counters(int fd, long offsets[2])
{
	static const char *const names[2] = {"pf_fixed", "pf_fast"};
	struct kvm_stats_header h;
	if (pread(fd, &h, sizeof h, 0) != sizeof h || h.name_size > STATS_NAME_MAX || h.num_desc > STATS_MAX)
		return;
	for (uint32_t i = 0; i < h.num_desc; i++) {
		union {
			struct kvm_stats_desc desc;
			char bytes[sizeof(struct kvm_stats_desc) + STATS_NAME_MAX + 1];
		} d;
		size_t size = sizeof d.desc + h.name_size;
		if (pread(fd, &d, size, (off_t)(h.desc_offset + i * size)) != (ssize_t)size)
			return;
		d.bytes[size] = 0;
		for (unsigned k = 0; k < 2; k++)
			if (!strcmp(d.bytes + sizeof d.desc, names[k]))
				offsets[k] = (long)(h.data_offset + d.desc.offset);
	}
}

static uint64_t faults(const struct throttle *t, int fd)
{
	uint64_t sum = 0, n;
	for (unsigned k = 0; k < 2; k++)
		if (t->counters[k] >= 0 && pread(fd, &n, sizeof n, t->counters[k]) == sizeof n)
			sum += n;
	return sum;
}

/* Asked for while no vCPU runs yet: it would wait for its next exit. */
void throttle_vcpu_created(struct vcpu *v)
{
	struct throttle *t = &v->m->throttle;
	v->stats_fd = kvm_ioctl(v->fd, KVM_GET_STATS_FD, NULL);
	if (v->id == 0 && v->stats_fd >= 0)
		find_counters(v->stats_fd, t->counters);
}

/* Since the last look, per vCPU. Caller holds control. */
static void look_at_faults(struct machine *m, double *since)
{
	for (unsigned i = 0; i < m->ncpus; i++) {
		struct vcpu *v = &m->vcpus[i];
		uint64_t n = v->stats_fd < 0 ? 0 : faults(&m->throttle, v->stats_fd);
		since[i] = (double)(n - v->faults);
		v->faults = n;
	}
}

void machine_slow_prepare(struct machine *m)
{
	double since[MACHINE_CPUS_MAX];
	SCOPE_LOCK(&m->control);
	look_at_faults(m, since);
}

/* --- the turns --- */

static void hold(struct machine *m, struct vcpu *v)
{
	__atomic_store_n(&v->off_turn, true, __ATOMIC_RELEASE);
	vcpu_kick(v);
}

static void release_all(struct machine *m)
{
	for (unsigned i = 0; i < m->ncpus; i++)
		__atomic_store_n(&m->vcpus[i].off_turn, false, __ATOMIC_RELEASE);
	/* In a pause nobody is to be woken for nothing; its end wakes all. */
	if (m->allowed)
		pthread_cond_broadcast(&m->cond);
}

/* Caller holds m->lock. False: the shares have changed, or it is over. */
static bool wait_until(struct machine *m, uint64_t ns, unsigned generation)
{
	struct throttle *t = &m->throttle;
	struct timespec until = clock_timespec(ns);
	while (t->generation == generation && clock_now_ns() < ns)
		pthread_cond_timedwait(&t->changed, &m->lock, &until);
	return t->generation == generation;
}

/* One period: everybody runs, then one after the other is held. Caller holds m->lock. */
static void one_period(struct machine *m)
{
	struct throttle *t = &m->throttle;
	unsigned generation = t->generation;
	uint64_t begin = clock_now_ns();
	bool on = true;
	release_all(m);
	for (unsigned i = 0; i < m->ncpus && on; i++) {
		struct vcpu *v = &m->vcpus[t->order[i]];
		if (v->speed >= 1)
			break;
		on = wait_until(m, begin + (uint64_t)(v->speed * t->period_us * 1000), generation);
		if (on)
			hold(m, v);
	}
	if (on)
		wait_until(m, begin + t->period_us * UINT64_C(1000), generation);
}

static void *throttle_main(void *arg)
{
	struct machine *m = arg;
	struct throttle *t = &m->throttle;
	pthread_setname_np(pthread_self(), "throttle");
	confine_self(CONFINE_DEVICE);
	SCOPE_LOCK(&m->lock);
	while (!t->quit) {
		if (t->on)
			one_period(m);
		else
			pthread_cond_wait(&t->changed, &m->lock);
	}
	return NULL;
}

static int by_speed(const void *a, const void *b, void *opaque)
{
	const struct machine *m = opaque;
	double x = m->vcpus[*(const uint8_t *)a].speed, y = m->vcpus[*(const uint8_t *)b].speed;
	return (x > y) - (x < y);
}

/* Caller holds m->lock. */
static void set_shares(struct machine *m, const double *speeds)
{
	struct throttle *t = &m->throttle;
	t->on = false;
	for (unsigned i = 0; i < m->ncpus; i++) {
		m->vcpus[i].speed = speeds[i];
		t->order[i] = (uint8_t)i;
		t->on |= speeds[i] < 1;
	}
	qsort_r(t->order, m->ncpus, sizeof t->order[0], by_speed, m);
	double least = m->vcpus[t->order[0]].speed;
	t->period_us = PERIOD_US;
	if (least * PERIOD_US < RUN_LEAST_US)
		t->period_us = (unsigned)(RUN_LEAST_US / (least > 0.01 ? least : 0.01));
	t->generation++;
	if (!t->on)
		release_all(m);
	pthread_cond_signal(&t->changed);
}

static int start_thread(struct machine *m, struct error *err)
{
	struct throttle *t = &m->throttle;
	if (t->started)
		return 0;
	sigset_t all, old;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	int ret = pthread_create(&t->thread, NULL, throttle_main, m);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	t->started = !ret;
	return ret ? error_errno(err, ret, "machine: slowing thread") : 0;
}

int machine_slow(struct machine *m, double speed, double least, struct error *err)
{
	double dirties[MACHINE_CPUS_MAX], speeds[MACHINE_CPUS_MAX];
	SCOPE_LOCK(&m->control);
	int ret = start_thread(m, err);
	if (ret)
		return ret;
	look_at_faults(m, dirties);
	/* what it would have dirtied at full speed */
	for (unsigned i = 0; i < m->ncpus; i++)
		dirties[i] /= m->vcpus[i].speed;
	mem_pace_spread(dirties, m->ncpus, speed, least, speeds);
	SCOPE_LOCK(&m->lock);
	set_shares(m, speeds);
	return 0;
}

void machine_unslow(struct machine *m)
{
	double full[MACHINE_CPUS_MAX];
	for (unsigned i = 0; i < m->ncpus; i++)
		full[i] = 1;
	SCOPE_LOCK(&m->lock);
	if (m->throttle.on)
		set_shares(m, full);
}

unsigned machine_slowed(struct machine *m, unsigned *vcpus)
{
	SCOPE_LOCK(&m->lock);
	double least = 1;
	unsigned n = 0;
	for (unsigned i = 0; i < m->ncpus; i++) {
		n += m->vcpus[i].speed < 1;
		least = m->vcpus[i].speed < least ? m->vcpus[i].speed : least;
	}
	if (vcpus)
		*vcpus = n;
	return (unsigned)((1 - least) * 100 + 0.5);
}

void throttle_init(struct machine *m)
{
	cond_init_monotonic(&m->throttle.changed);
	m->throttle.counters[0] = m->throttle.counters[1] = -1;
	for (unsigned i = 0; i < MACHINE_CPUS_MAX; i++) {
		m->vcpus[i].speed = 1;
		m->vcpus[i].stats_fd = -1;
	}
}

void throttle_release(struct machine *m)
{
	struct throttle *t = &m->throttle;
	{
		SCOPE_LOCK(&m->lock);
		t->quit = true;
		t->on = false;
		t->generation++;
		release_all(m);
		pthread_cond_signal(&t->changed);
	}
	if (t->started)
		pthread_join(t->thread, NULL);
	for (unsigned i = 0; i < m->ncpus; i++)
		if (m->vcpus[i].stats_fd >= 0)
			close(m->vcpus[i].stats_fd);
	pthread_cond_destroy(&t->changed);
}
