/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A machine's life. Two locks: `control` serialises what changes the machine as a whole (start, pause, save,
 * load, and the reset that the event thread does); `lock`, taken inside it, guards whether vCPUs may run and
 * the power state.
 *
 * A guest that powers off, resets or crashes only sets the power state, which stops all vCPUs; the event
 * thread does the rest. A power state that nobody has acted on is part of the saved state, so that it is not
 * lost across a move.
 */
#include "vmm/machine.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/cond.h"
#include "base/confine.h"
#include "base/log.h"
#include "vmm/machine_internal.h"
#include "vmm/virtio.h"

#define RESET_DRAIN_MS 1000
/* More than the state of a machine takes, and of a vCPU: consoles and virtio queues; XSAVE area and MSRs. */
#define STATE_RESERVE_BYTES	(512u << 10)
#define STATE_RESERVE_CPU_BYTES (32u << 10)
#define SLOT_DISK		1
#define SLOT_NET		17
#define SLOT_RNG		25
#define SLOT_BALLOON		26

int machine_add_device(struct machine *m, const struct device_ops *ops, void *dev, struct error *err)
{
	if (m->ndevices == MACHINE_DEVICES_MAX)
		return error_set(err, ENOSPC, "more than %d devices", MACHINE_DEVICES_MAX);
	m->devices[m->ndevices].ops = ops;
	m->devices[m->ndevices++].dev = dev;
	return 0;
}

/* ---- stopping and going on; caller holds control ---- */

static void vcpus_stop(struct machine *m)
{
	uint64_t begin = clock_now_us();
	SCOPE_LOCK(&m->lock);
	bool ran = m->allowed;
	m->want_run = false;
	vcpus_update_allowed(m);
	vcpus_kick(m);
	while (m->running)
		pthread_cond_wait(&m->parked, &m->lock);
	if (ran)
		m->costs.stop_us = clock_now_us() - begin;
}

static void vcpus_go(struct machine *m)
{
	SCOPE_LOCK(&m->lock);
	m->want_run = true;
	vcpus_update_allowed(m);
	pthread_cond_broadcast(&m->cond);
}

static void devices_pause(struct machine *m)
{
	if (!m->devices_running)
		return;
	m->devices_running = false;
	for (unsigned i = 0; i < m->ndevices; i++)
		if (m->devices[i].ops->pause)
			m->devices[i].ops->pause(m->devices[i].dev);
}

static void devices_resume(struct machine *m)
{
	if (m->devices_running)
		return;
	m->devices_running = true;
	for (unsigned i = 0; i < m->ndevices; i++)
		if (m->devices[i].ops->resume)
			m->devices[i].ops->resume(m->devices[i].dev);
}

static int devices_drain(struct machine *m, unsigned timeout_ms, struct error *err)
{
	uint64_t until = clock_now_ms() + timeout_ms;
	for (unsigned i = 0; i < m->ndevices; i++) {
		if (!m->devices[i].ops->drain)
			continue;
		uint64_t now = clock_now_ms();
		int ret = m->devices[i].ops->drain(m->devices[i].dev,
						   now < until ? (unsigned)(until - now) : 0);
		if (ret < 0)
			return error_set(err, ret, "%s: requests still in flight after %u ms",
					 m->devices[i].ops->name, timeout_ms);
	}
	return 0;
}

int machine_start(struct machine *m, struct error *err)
{
	SCOPE_LOCK(&m->control);
	devices_resume(m);
	{
		SCOPE_LOCK(&m->lock);
		m->held = false;
	}
	vcpus_go(m);
	return 0;
}

int machine_start_held(struct machine *m, struct error *err)
{
	SCOPE_LOCK(&m->control);
	if (m->devices_running)
		return error_set(err, EBUSY, "the machine's devices are running already");
	{
		SCOPE_LOCK(&m->lock);
		m->held = true;
	}
	vcpus_go(m);
	return 0;
}

int machine_release_effects(struct machine *m, struct error *err)
{
	SCOPE_LOCK(&m->control);
	{
		SCOPE_LOCK(&m->lock);
		if (!m->want_run)
			return error_set(err, EINVAL, "the machine is paused, not held");
	}
	devices_resume(m);
	SCOPE_LOCK(&m->lock);
	m->held = false;
	pthread_cond_broadcast(&m->cond);
	return 0;
}

int machine_pause(struct machine *m, struct error *err)
{
	SCOPE_LOCK(&m->control);
	vcpus_stop(m);
	devices_pause(m);
	return 0;
}

int machine_drain(struct machine *m, unsigned timeout_ms, struct error *err)
{
	SCOPE_LOCK(&m->control);
	if (machine_is_running(m))
		return error_set(err, EBUSY, "the machine is running");
	uint64_t begin = clock_now_us();
	int ret = devices_drain(m, timeout_ms, err);
	m->costs.drain_us = clock_now_us() - begin;
	return ret;
}

void machine_pause_costs(struct machine *m, struct mem_pause_costs *out)
{
	SCOPE_LOCK(&m->control);
	uint64_t lead = out->lead_us;
	*out = m->costs;
	out->lead_us = lead;
	/* A machine that did not arrive by a move has loaded nothing yet; what it saves is as much. */
	if (!out->load_us)
		out->load_us = out->state_us;
}

bool machine_is_running(const struct machine *m)
{
	return __atomic_load_n(&m->allowed, __ATOMIC_ACQUIRE);
}

int machine_power_button(struct machine *m)
{
	power_button_press(m->power_device);
	return 0;
}

/* ---- power events ---- */

void machine_request_power(struct machine *m, enum power_state state, const char *detail)
{
	SCOPE_LOCK(&m->lock);
	if (m->power != POWER_ON)
		return;
	m->power = state;
	m->power_told = false;
	snprintf(m->power_detail, sizeof m->power_detail, "%s", detail);
	vcpus_update_allowed(m);
	vcpus_kick(m);
	pthread_cond_broadcast(&m->cond);
}

static void tell(struct machine *m, enum machine_event event, const char *detail)
{
	if (m->cfg.event)
		m->cfg.event(m->cfg.opaque, event, detail);
}

/* Caller holds control; all vCPUs are parked. */
static int reset_to_power_on(struct machine *m, struct error *err)
{
	struct state_reader *r = NULL;
	int ret = state_reader_open(m->power_on_state, m->power_on_len, &r, err);
	for (unsigned i = 0; i < m->ncpus && !ret; i++)
		ret = vcpu_load(&m->vcpus[i], r, true, err);
	if (!ret)
		ret = kvm_irqchip_load(m, r, err);
	state_reader_free(r);
	if (ret)
		return ret;
	pci_bus_reset(m->pci);
	for (unsigned i = 0; i < m->ndevices; i++)
		if (m->devices[i].ops->reset)
			m->devices[i].ops->reset(m->devices[i].dev);
	return boot_load(m, err);
}

/* False: not now; the event thread looks again. */
static bool try_reset(struct machine *m)
{
	struct error err = ERROR_INIT;
	{
		SCOPE_LOCK(&m->control);
		{
			SCOPE_LOCK(&m->lock);
			if (m->quit || m->power != POWER_RESET || !m->want_run || m->held)
				return true;
			while (m->running)
				pthread_cond_wait(&m->parked, &m->lock);
		}
		devices_pause(m);
		if (devices_drain(m, RESET_DRAIN_MS, &err)) {
			log_warn("reset: waiting: %s", err.message);
			devices_resume(m);
			return false;
		}
		int ret = m->boot.kernel ? reset_to_power_on(m, &err)
					 : error_set(&err, ENOENT, "no kernel to boot again");
		if (!ret)
			devices_resume(m);
		SCOPE_LOCK(&m->lock);
		if (ret) {
			m->power = POWER_CRASHED;
			snprintf(m->power_detail, sizeof m->power_detail, "reset: %.150s", err.message);
			return true;
		}
		m->power = POWER_ON;
		vcpus_update_allowed(m);
		pthread_cond_broadcast(&m->cond);
	}
	log_info("guest reset done");
	tell(m, MACHINE_EVENT_RESET, "guest reset");
	return true;
}

static void *event_main(void *arg)
{
	struct machine *m = arg;
	pthread_setname_np(pthread_self(), "machine events");
	confine_self(CONFINE_PROCESS);
	pthread_mutex_lock(&m->lock);
	while (!m->quit) {
		bool reset = m->power == POWER_RESET && m->want_run && !m->held;
		bool end = (m->power == POWER_OFF || m->power == POWER_CRASHED) && !m->power_told && !m->held;
		if (reset) {
			pthread_mutex_unlock(&m->lock);
			if (!try_reset(m))
				clock_sleep_ms(10);
			pthread_mutex_lock(&m->lock);
		} else if (end) {
			char detail[sizeof m->power_detail];
			memcpy(detail, m->power_detail, sizeof detail);
			bool off = m->power == POWER_OFF;
			m->power_told = true;
			pthread_mutex_unlock(&m->lock);
			log_info("guest %s: %s", off ? "powered off" : "crashed", detail);
			tell(m, off ? MACHINE_EVENT_SHUTDOWN : MACHINE_EVENT_CRASHED, detail);
			pthread_mutex_lock(&m->lock);
		} else {
			pthread_cond_wait(&m->cond, &m->lock);
		}
	}
	pthread_mutex_unlock(&m->lock);
	return NULL;
}

/* ---- save and load ---- */

/* Saved here: memory size and number of vCPUs (to be compared), the power state nobody acted on. */
static void save_self(struct machine *m, struct state_writer *w)
{
	SCOPE_LOCK(&m->lock);
	state_section_begin(w, "machine", 1);
	state_put_u64(w, m->mem.size_bytes);
	state_put_u32(w, m->ncpus);
	state_put_u32(w, m->power);
	state_put_bytes(w, m->power_detail, sizeof m->power_detail);
	state_section_end(w);
}

static int load_self(struct machine *m, struct state_reader *r, struct error *err)
{
	int ret = state_reader_section(r, "machine", 1, NULL, err);
	if (ret)
		return ret;
	uint64_t bytes = state_get_u64(r);
	uint32_t ncpus = state_get_u32(r), power = state_get_u32(r);
	if (bytes != m->mem.size_bytes || ncpus != m->ncpus)
		return error_set(
			err, EPROTO, "saved machine has %llu bytes and %u vCPUs, this one %llu and %u",
			(unsigned long long)bytes, ncpus, (unsigned long long)m->mem.size_bytes, m->ncpus);
	if (power > POWER_CRASHED)
		return error_set(err, EPROTO, "saved machine has power state %u", power);
	SCOPE_LOCK(&m->lock);
	m->power = power;
	m->power_told = false;
	state_get_bytes(r, m->power_detail, sizeof m->power_detail);
	m->power_detail[sizeof m->power_detail - 1] = 0;
	for (char *p = m->power_detail; *p; p++)
		if (*p < 0x20 || *p > 0x7e)
			*p = '?';
	vcpus_update_allowed(m);
	return state_reader_section_end(r, err);
}

int machine_prepare_save(struct machine *m, struct state_writer *w, struct error *err)
{
	SCOPE_LOCK(&m->control);
	int ret = state_writer_reserve(w, STATE_RESERVE_BYTES + m->ncpus * STATE_RESERVE_CPU_BYTES);
	for (unsigned i = 0; m->ncpus > 1 && i < m->ncpus && !ret; i++) {
		struct vcpu *v = &m->vcpus[i];
		if (!v->saved)
			v->saved = state_writer_create();
		ret = v->saved ? state_writer_reserve(v->saved, STATE_RESERVE_CPU_BYTES) : -ENOMEM;
	}
	return ret ? error_errno(err, ret, "machine state") : 0;
}

int machine_save(struct machine *m, struct state_writer *w, struct error *err)
{
	SCOPE_LOCK(&m->control);
	{
		SCOPE_LOCK(&m->lock);
		if (m->running || m->want_run)
			return error_set(err, EBUSY, "machine state: the vCPUs are running");
	}
	uint64_t begin = clock_now_us();
	save_self(m, w);
	int ret = vcpus_save(m, w, err);
	if (!ret)
		ret = kvm_irqchip_save(m, w, err);
	if (!ret)
		pci_bus_save(m->pci, w);
	for (unsigned i = 0; i < m->ndevices && !ret; i++)
		if (m->devices[i].ops->save)
			ret = m->devices[i].ops->save(m->devices[i].dev, w, err);
	m->costs.state_us = clock_now_us() - begin;
	return ret ? error_prefix(err, "machine state") : 0;
}

static int load_all(struct machine *m, struct state_reader *r, struct error *err)
{
	int ret = load_self(m, r, err);
	if (!ret)
		ret = vcpus_load(m, r, err);
	if (!ret)
		ret = kvm_irqchip_load(m, r, err);
	if (!ret)
		ret = pci_bus_load(m->pci, r, err);
	irq_router_batch_begin(m->irq);
	for (unsigned i = 0; i < m->ndevices && !ret; i++)
		if (m->devices[i].ops->load)
			ret = m->devices[i].ops->load(m->devices[i].dev, r, err);
	int batch = irq_router_batch_end(m->irq, ret ? NULL : err);
	if (!ret)
		ret = batch;
	return ret ? ret : state_reader_finish(r, err);
}

static int set_clock(struct machine *m, uint64_t clock_ns, struct error *err)
{
	struct kvm_clock_data clock = {.clock = clock_ns};
	int ret = kvm_ioctl(m->vm_fd, KVM_SET_CLOCK, &clock);
	if (ret < 0)
		return error_errno(err, ret, "KVM_SET_CLOCK");
	/* Tells the guest's watchdogs that it was stopped. EINVAL where the guest has no kvmclock. */
	for (unsigned i = 0; i < m->ncpus; i++)
		kvm_ioctl(m->vcpus[i].fd, KVM_KVMCLOCK_CTRL, NULL);
	return 0;
}

int machine_load(struct machine *m, const void *buf, size_t len, struct error *err)
{
	SCOPE_LOCK(&m->control);
	{
		SCOPE_LOCK(&m->lock);
		if (m->running || m->want_run)
			return error_set(err, EBUSY, "machine state: the vCPUs are running");
	}
	struct state_reader *r = NULL;
	int ret = state_reader_open(buf, len, &r, err);
	if (ret)
		return ret;
	uint64_t begin = clock_now_us();
	ret = load_all(m, r, err);
	m->costs.load_us = clock_now_us() - begin;
	state_reader_free(r);
	if (ret)
		return error_prefix(err, "loading the machine's state");
	m->loaded = true;
	m->loaded_at_ns = clock_now_ns();
	return set_clock(m, m->loaded_clock_ns, err);
}

/* A guest that was stopped for longer than this has its clocks set by other means; and a peer's lie is
 * bounded. */
#define STOPPED_NS_MAX (UINT64_C(7) * 24 * 3600 * 1000000000)

static uint64_t cycles(uint64_t ns, uint32_t khz)
{
	return (uint64_t)((unsigned __int128)ns * khz / 1000000);
}

/*
 * The TSC goes on by the same time as kvmclock, for guests that use it directly. By the offset where KVM has
 * it: a write to the MSR within a second of what KVM expects is taken as an attempt to synchronise vCPUs, and
 * ignored. Where it has not, one value for all vCPUs, so that it is at least taken as equal.
 */
static void advance_tsc(struct machine *m, uint64_t stopped_ns)
{
	uint64_t since_load = clock_now_ns() - m->loaded_at_ns, tsc = 0;
	uint32_t khz = m->vcpus[0].loaded_tsc_khz;
	uint64_t forward = stopped_ns > since_load ? cycles(stopped_ns - since_load, khz) : 0;
	for (unsigned i = 0; i < m->ncpus; i++)
		if (m->vcpus[i].loaded_tsc > tsc)
			tsc = m->vcpus[i].loaded_tsc;
	if (!tsc || !khz || !forward)
		return;
	for (unsigned i = 0; i < m->ncpus; i++) {
		struct vcpu *v = &m->vcpus[i];
		if (vcpu_forward_tsc(v, forward))
			vcpu_set_msr(v, MSR_TSC, tsc + cycles(stopped_ns, khz));
		/* An armed deadline was computed with the old offset. */
		if (v->loaded_deadline)
			vcpu_set_msr(v, MSR_TSC_DEADLINE, v->loaded_deadline);
	}
}

int machine_adjust_clock(struct machine *m, uint64_t stopped_ns, struct error *err)
{
	SCOPE_LOCK(&m->control);
	if (!m->loaded)
		return error_set(err, EINVAL, "clock: no state was loaded");
	if (machine_is_running(m))
		return error_set(err, EBUSY, "clock: the vCPUs are running");
	if (stopped_ns > STOPPED_NS_MAX)
		stopped_ns = STOPPED_NS_MAX;
	advance_tsc(m, stopped_ns);
	return set_clock(m, m->loaded_clock_ns + stopped_ns, err);
}

/* ---- creation ---- */

static int check_config(const struct machine_config *cfg, struct error *err)
{
	if (cfg->cpus == 0 || cfg->cpus > MACHINE_CPUS_MAX)
		return error_set(err, EINVAL, "%u vCPUs: must be 1 to %d", cfg->cpus, MACHINE_CPUS_MAX);
	if (cfg->ndisks > MACHINE_DISKS_MAX || cfg->nnets > MACHINE_NETS_MAX)
		return error_set(err, EINVAL, "%u disks and %u networks: at most %d and %d", cfg->ndisks,
				 cfg->nnets, MACHINE_DISKS_MAX, MACHINE_NETS_MAX);
	return 0;
}

/* The device gets a descriptor of its own: the caller's is taken over only if the whole machine can be made.
 */
static int create_net(struct machine *m, unsigned i, struct error *err)
{
	const struct machine_net *net = &m->cfg.nets[i];
	CLEANUP_FD int fd = fcntl(net->tap_fd, F_DUPFD_CLOEXEC, 3);
	if (fd < 0)
		return error_errno(err, errno, "net %s: tap", net->id);
	int ret = virtio_net_create(m, (uint8_t)(SLOT_NET + i), net->id, fd, net->mac, err);
	if (!ret)
		steal_fd(&fd);
	return ret;
}

static int create_devices(struct machine *m, struct error *err)
{
	const struct machine_config *cfg = &m->cfg;
	int ret = serial_create(m, err);
	if (!ret)
		ret = power_create(m, err);
	for (unsigned i = 0; i < cfg->ndisks && !ret; i++)
		ret = virtio_blk_create(m, (uint8_t)(SLOT_DISK + i), cfg->disks[i].id, cfg->disks[i].block,
					cfg->disks[i].read_only, err);
	for (unsigned i = 0; i < cfg->nnets && !ret; i++)
		ret = create_net(m, i, err);
	if (!ret)
		ret = virtio_rng_create(m, SLOT_RNG, err);
	if (!ret && cfg->balloon)
		ret = virtio_balloon_create(m, SLOT_BALLOON, &m->balloon, err);
	return ret;
}

static int keep_power_on_state(struct machine *m, struct error *err)
{
	struct state_writer *w = state_writer_create();
	if (!w)
		return error_errno(err, ENOMEM, "machine");
	int ret = 0;
	const uint8_t *buf;
	size_t len;
	uint64_t begin = clock_now_us();
	for (unsigned i = 0; i < m->ncpus && !ret; i++)
		ret = vcpu_save(&m->vcpus[i], w, err);
	if (!ret)
		ret = kvm_irqchip_save(m, w, err);
	m->costs.state_us = clock_now_us() - begin;
	if (!ret)
		ret = state_writer_finish(w, &buf, &len, err);
	if (!ret) {
		m->power_on_state = malloc(len);
		if (m->power_on_state) {
			memcpy(m->power_on_state, buf, len);
			m->power_on_len = len;
		} else {
			ret = error_errno(err, ENOMEM, "machine");
		}
	}
	state_writer_free(w);
	return ret;
}

/* This host's CPU, or what the definition lets the guest see of it. */
static int own_cpu(struct machine *m, struct error *err)
{
	struct cpu_features own;
	char names[CPU_NAMES_BYTES];
	int ret = cpuid_host_table(m->kvm_fd, &m->cpuid, err);
	if (ret || !m->cfg.cpu_allowed)
		return ret;
	cpu_features_of(m->cpuid, &own);
	if (*m->cfg.cpu_needed->vendor && strcmp(own.vendor, m->cfg.cpu_needed->vendor))
		return error_set(err, ENOTSUP, "cpu: the definition wants one of %s, this host's is of %s",
				 m->cfg.cpu_needed->vendor, own.vendor);
	unsigned n = cpu_features_lacking(m->cfg.cpu_needed, &own, names, sizeof names);
	if (n)
		return error_set(err, ENOTSUP,
				 "cpu: this host lacks %u feature%s that the definition wants: %s", n,
				 n == 1 ? "" : "s", names);
	cpu_features_apply(m->cpuid, m->cfg.cpu_allowed);
	return 0;
}

static int create(struct machine *m, struct error *err)
{
	int ret = kvm_open(m, err);
	if (!ret)
		ret = guest_memory_create(m->cfg.memory_bytes, &m->mem, err);
	if (!ret)
		ret = kvm_create_vm(m, err);
	if (!ret && !(m->bus = bus_create()))
		ret = error_errno(err, ENOMEM, "machine");
	if (!ret)
		ret = irq_router_create(m->vm_fd, &m->irq, err);
	if (!ret)
		ret = pci_bus_create(m->bus, m->irq, &m->pci, err);
	if (!ret)
		ret = m->cfg.cpu ? cpu_from_json(m->cfg.cpu, &m->cpuid, &m->tsc_khz, err) : own_cpu(m, err);
	m->cfg.cpu = NULL;
	m->cfg.cpu_allowed = m->cfg.cpu_needed = NULL;
	for (unsigned i = 0; i < m->ncpus && !ret; i++)
		ret = vcpu_create(m, i, err);
	if (!ret)
		ret = vcpu_msrs_find(m, err);
	if (!ret)
		ret = create_devices(m, err);
	if (!ret)
		ret = keep_power_on_state(m, err);
	for (unsigned i = 0; i < m->ncpus && !ret; i++)
		ret = vcpu_start_thread(&m->vcpus[i], err);
	if (!ret) {
		sigset_t all, old;
		sigfillset(&all);
		pthread_sigmask(SIG_SETMASK, &all, &old);
		int e = pthread_create(&m->event_thread, NULL, event_main, m);
		pthread_sigmask(SIG_SETMASK, &old, NULL);
		m->event_thread_started = e == 0;
		if (e)
			ret = error_errno(err, e, "machine: event thread");
	}
	return ret;
}

int machine_create(const struct machine_config *cfg, struct machine **out, struct error *err)
{
	int ret = check_config(cfg, err);
	if (ret)
		return ret;
	struct machine *m = calloc(1, sizeof *m);
	if (!m)
		return error_errno(err, ENOMEM, "machine");
	m->cfg = *cfg;
	m->cfg.serial = m->cfg.run_dir = NULL;
	m->serial_spec = cfg->serial ? strdup(cfg->serial) : NULL;
	m->run_dir = cfg->run_dir ? strdup(cfg->run_dir) : NULL;
	m->ncpus = cfg->cpus;
	m->kvm_fd = m->vm_fd = m->mem.fd = -1;
	m->boot.kernel_fd = m->boot.initrd_fd = -1;
	for (unsigned i = 0; i < MACHINE_CPUS_MAX; i++)
		m->vcpus[i].fd = -1;
	throttle_init(m);
	pthread_mutex_init(&m->control, NULL);
	pthread_mutex_init(&m->lock, NULL);
	pthread_cond_init(&m->cond, NULL);
	pthread_cond_init(&m->parked, NULL);
	pthread_mutex_init(&m->announce_lock, NULL);
	cond_init_monotonic(&m->announce_cond);
	ret = create(m, err);
	if (ret) {
		machine_destroy(m);
		return ret;
	}
	m->owns_taps = true;
	*out = m;
	return 0;
}

void machine_destroy(struct machine *m)
{
	if (!m)
		return;
	{
		SCOPE_LOCK(&m->lock);
		m->want_run = false;
		m->quit = true;
		vcpus_update_allowed(m);
		vcpus_kick(m);
		pthread_cond_broadcast(&m->cond);
	}
	if (m->event_thread_started)
		pthread_join(m->event_thread, NULL);
	throttle_release(m);
	for (unsigned i = 0; i < m->ncpus; i++)
		if (m->vcpus[i].thread_started) {
			pthread_join(m->vcpus[i].thread, NULL);
			m->vcpus[i].thread_started = false;
		}
	machine_announce_stop(m);
	devices_pause(m);
	while (m->ndevices) {
		m->ndevices--;
		m->devices[m->ndevices].ops->destroy(m->devices[m->ndevices].dev);
	}
	for (unsigned i = 0; i < m->cfg.nnets && m->owns_taps; i++)
		close(m->cfg.nets[i].tap_fd);
	pci_bus_free(m->pci);
	irq_router_free(m->irq);
	for (unsigned i = 0; i < m->ncpus; i++) {
		m->vcpus[i].m = m;
		vcpu_destroy(&m->vcpus[i]);
	}
	if (m->vm_fd >= 0)
		close(m->vm_fd);
	if (m->kvm_fd >= 0)
		close(m->kvm_fd);
	guest_memory_destroy(&m->mem);
	bus_free(m->bus);
	boot_source_close(&m->boot);
	free(m->cpuid);
	free(m->power_on_state);
	free(m->serial_spec);
	free(m->run_dir);
	pthread_cond_destroy(&m->announce_cond);
	pthread_mutex_destroy(&m->announce_lock);
	pthread_cond_destroy(&m->cond);
	pthread_cond_destroy(&m->parked);
	pthread_mutex_destroy(&m->lock);
	pthread_mutex_destroy(&m->control);
	free(m);
}

int machine_load_kernel(struct machine *m, const char *kernel, const char *initrd, const char *cmdline,
			struct error *err)
{
	int ret = machine_set_kernel(m, kernel, initrd, cmdline, err);
	if (ret)
		return ret;
	SCOPE_LOCK(&m->control);
	if (machine_is_running(m))
		return error_set(err, EBUSY, "kernel %s: the machine is running", kernel);
	return boot_load(m, err);
}

struct mem_space machine_memory_space(struct machine *m)
{
	return guest_memory_space(&m->mem);
}

struct guest_memory *machine_memory(struct machine *m)
{
	return &m->mem;
}

struct bus *machine_bus(struct machine *m)
{
	return m->bus;
}

struct pci_bus *machine_pci(struct machine *m)
{
	return m->pci;
}

struct irq_router *machine_irq(struct machine *m)
{
	return m->irq;
}

int machine_vm_fd(struct machine *m)
{
	return m->vm_fd;
}
