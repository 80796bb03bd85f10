/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Saved and restored state of one vCPU: section "cpu.N". The order matters: MP_STATE first while saving, for
 * asking can change the LAPIC; TSC_DEADLINE after the LAPIC while restoring, or it is silently lost.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "vmm/machine_internal.h"

#define MSR_TSC_ADJUST	       0x3b
#define MSR_SYSENTER_ESP       0x175
#define MSR_SYSENTER_EIP       0x176
#define MSR_KVM_WALL_CLOCK     0x11
#define MSR_KVM_WALL_CLOCK_NEW 0x4b564d00u
#define MSR_KVM_FIRST	       0x4b564d00u
#define MSR_KVM_LAST	       0x4b564dffu

/* A blob is a KVM structure, with its length before it. */
static void put_blob(struct state_writer *w, const void *p, size_t len)
{
	state_put_u32(w, (uint32_t)len);
	state_put_bytes(w, p, len);
}

static int get_blob(struct state_reader *r, void *p, size_t len, const char *what, struct error *err)
{
	uint32_t n = state_get_u32(r);
	if (n != len)
		return error_set(err, EPROTO, "%s: %u bytes saved, %zu expected", what, n, len);
	state_get_bytes(r, p, len);
	return 0;
}

static int get_msr(struct vcpu *v, uint32_t index, uint64_t *value)
{
	struct {
		struct kvm_msrs h;
		struct kvm_msr_entry e;
	} q = {.h.nmsrs = 1, .e.index = index};
	int ret = kvm_ioctl(v->fd, KVM_GET_MSRS, &q);
	*value = q.e.data;
	return ret == 1 ? 0 : -ENOENT;
}

int vcpu_set_msr(struct vcpu *v, uint32_t index, uint64_t value)
{
	struct {
		struct kvm_msrs h;
		struct kvm_msr_entry e;
	} q = {.h.nmsrs = 1, .e = {.index = index, .data = value}};
	return kvm_ioctl(v->fd, KVM_SET_MSRS, &q) == 1 ? 0 : -ENOENT;
}

int vcpu_forward_tsc(struct vcpu *v, uint64_t forward_cycles)
{
	uint64_t offset = 0;
	struct kvm_device_attr attr = {.group = KVM_VCPU_TSC_CTRL,
				       .attr = KVM_VCPU_TSC_OFFSET,
				       .addr = (uint64_t)(uintptr_t)&offset};
	int ret = kvm_ioctl(v->fd, KVM_GET_DEVICE_ATTR, &attr);
	if (ret < 0)
		return ret;
	offset += forward_cycles;
	return kvm_ioctl(v->fd, KVM_SET_DEVICE_ATTR, &attr);
}

/* Setting it makes KVM write the time of boot to the memory it names, at once: when the guest does it, as it
 * asks for that. It is free to use the memory for something else after that, and has it as it was. */
static bool msr_writes_memory(uint32_t index)
{
	return index == MSR_KVM_WALL_CLOCK || index == MSR_KVM_WALL_CLOCK_NEW;
}

static void add_msr(struct machine *m, uint32_t index)
{
	uint64_t value;
	if (m->nmsrs == MACHINE_MSRS_MAX || index == MSR_TSC || index == MSR_TSC_DEADLINE ||
	    msr_writes_memory(index))
		return;
	for (unsigned i = 0; i < m->nmsrs; i++)
		if (m->msr_list[i] == index)
			return;
	if (!get_msr(&m->vcpus[0], index, &value))
		m->msr_list[m->nmsrs++] = index;
}

int vcpu_msrs_find(struct machine *m, struct error *err)
{
	struct kvm_msr_list probe = {.nmsrs = 0};
	int ret = kvm_ioctl(m->kvm_fd, KVM_GET_MSR_INDEX_LIST, &probe);
	if (ret < 0 && ret != -E2BIG)
		return error_errno(err, ret, "KVM_GET_MSR_INDEX_LIST");
	CLEANUP_FREE struct kvm_msr_list *list =
		calloc(1, sizeof *list + probe.nmsrs * sizeof list->indices[0]);
	if (!list)
		return error_errno(err, ENOMEM, "MSR list");
	list->nmsrs = probe.nmsrs;
	ret = kvm_ioctl(m->kvm_fd, KVM_GET_MSR_INDEX_LIST, list);
	if (ret < 0)
		return error_errno(err, ret, "KVM_GET_MSR_INDEX_LIST");
	m->nmsrs = 0;
	for (uint32_t i = 0; i < list->nmsrs; i++)
		add_msr(m, list->indices[i]);
	for (uint32_t index = MSR_KVM_FIRST; index <= MSR_KVM_LAST; index++)
		add_msr(m, index);
	return 0;
}

/* KVM_GET_MSRS stops at the first index that it does not like. */
static int save_msrs(struct vcpu *v, struct state_writer *w, struct error *err)
{
	struct machine *m = v->m;
	unsigned n = m->nmsrs + 2;
	CLEANUP_FREE struct kvm_msrs *q = calloc(1, sizeof *q + n * sizeof q->entries[0]);
	CLEANUP_FREE struct kvm_msr_entry *got = calloc(n, sizeof *got);
	if (!q || !got)
		return error_errno(err, ENOMEM, "vCPU %u: MSRs", v->id);
	unsigned ngot = 0, at = 0;
	uint32_t first[2] = {MSR_TSC, MSR_TSC_DEADLINE};
	while (at < n) {
		q->nmsrs = n - at;
		for (unsigned i = at; i < n; i++)
			q->entries[i - at] =
				(struct kvm_msr_entry){.index = i < 2 ? first[i] : m->msr_list[i - 2]};
		int ret = kvm_ioctl(v->fd, KVM_GET_MSRS, q);
		if (ret < 0)
			return error_errno(err, ret, "vCPU %u: KVM_GET_MSRS", v->id);
		memcpy(got + ngot, q->entries, (unsigned)ret * sizeof *got);
		ngot += (unsigned)ret;
		at += (unsigned)ret + ((unsigned)ret < n - at);
	}
	state_put_u32(w, ngot);
	for (unsigned i = 0; i < ngot; i++) {
		state_put_u32(w, got[i].index);
		state_put_u64(w, got[i].data);
	}
	return 0;
}

/* These differ from host to host and mean nothing to a guest that has started: a failure to set them is no
 * reason to refuse. */
static bool msr_may_fail(uint32_t index)
{
	return index == 0x8b /* microcode level */ || index == 0xce /* PLATFORM_INFO */ ||
	       index == 0x10a /* ARCH_CAPABILITIES */ || index == 0x345 /* PERF_CAPABILITIES */ ||
	       index == 0xc0011029 /* AMD DE_CFG */ || index == 0xc0010015 /* AMD HWCR */ ||
	       (index >= 0x480 && index <= 0x493) /* VMX capabilities, hidden from the guest */;
}

static int load_msr_failed(struct vcpu *v, const struct kvm_msr_entry *e, struct error *err)
{
	uint64_t now;
	if (e->data == 0 || msr_may_fail(e->index) || (!get_msr(v, e->index, &now) && now == e->data)) {
		log_debug("vCPU %u: MSR 0x%x = 0x%llx not set", v->id, e->index, (unsigned long long)e->data);
		return 0;
	}
	return error_set(err, ENOTSUP, "vCPU %u: this host refuses MSR 0x%x = 0x%llx", v->id, e->index,
			 (unsigned long long)e->data);
}

static int set_msrs(struct vcpu *v, const struct kvm_msr_entry *entries, unsigned n, struct error *err)
{
	CLEANUP_FREE struct kvm_msrs *q = calloc(1, sizeof *q + n * sizeof q->entries[0]);
	if (!q)
		return error_errno(err, ENOMEM, "vCPU %u: MSRs", v->id);
	unsigned at = 0;
	while (at < n) {
		q->nmsrs = n - at;
		memcpy(q->entries, entries + at, (n - at) * sizeof *entries);
		int ret = kvm_ioctl(v->fd, KVM_SET_MSRS, q);
		if (ret < 0)
			return error_errno(err, ret, "vCPU %u: KVM_SET_MSRS", v->id);
		at += (unsigned)ret;
		if (at < n) {
			ret = load_msr_failed(v, &entries[at++], err);
			if (ret)
				return ret;
		}
	}
	return 0;
}

#define GET(request, object, what)                                                                           \
	do {                                                                                                 \
		int ret_ = kvm_ioctl(v->fd, request, object);                                                \
		if (ret_ < 0)                                                                                \
			return error_errno(err, ret_, "vCPU %u: save " what, v->id);                         \
	} while (0)

static int save(struct vcpu *v, struct state_writer *w, struct error *err)
{
	const struct kvm_caps *c = &v->m->caps;
	struct kvm_mp_state mp;
	GET(KVM_GET_MP_STATE, &mp, "MP state");
	state_put_u32(w, mp.mp_state);
	int khz = kvm_ioctl(v->fd, KVM_GET_TSC_KHZ, NULL);
	state_put_u32(w, khz > 0 ? (uint32_t)khz : 0);

	struct kvm_regs regs;
	GET(KVM_GET_REGS, &regs, "registers");
	put_blob(w, &regs, sizeof regs);
	state_put_u8(w, c->sregs2 ? 2 : 1);
	if (c->sregs2) {
		struct kvm_sregs2 s;
		memset(&s, 0, sizeof s);
		GET(KVM_GET_SREGS2, &s, "special registers");
		put_blob(w, &s, sizeof s);
	} else {
		struct kvm_sregs s;
		memset(&s, 0, sizeof s);
		GET(KVM_GET_SREGS, &s, "special registers");
		put_blob(w, &s, sizeof s);
	}

	size_t xsave_bytes = c->xsave_bytes ? c->xsave_bytes : sizeof(struct kvm_xsave);
	/* Straight into the writer: nothing is allocated while the guest stands still. */
	state_put_u32(w, (uint32_t)xsave_bytes);
	void *xsave = state_put_space(w, xsave_bytes);
	if (!xsave)
		return error_errno(err, ENOMEM, "vCPU %u: XSAVE", v->id);
	if (c->xsave_bytes)
		GET(KVM_GET_XSAVE2, xsave, "XSAVE area");
	else
		GET(KVM_GET_XSAVE, xsave, "XSAVE area");
	struct kvm_xcrs xcrs;
	memset(&xcrs, 0, sizeof xcrs);
	if (c->xcrs)
		GET(KVM_GET_XCRS, &xcrs, "XCRs");
	put_blob(w, &xcrs, sizeof xcrs);
	struct kvm_debugregs debug;
	memset(&debug, 0, sizeof debug);
	GET(KVM_GET_DEBUGREGS, &debug, "debug registers");
	put_blob(w, &debug, sizeof debug);
	struct kvm_lapic_state lapic;
	GET(KVM_GET_LAPIC, &lapic, "LAPIC");
	put_blob(w, &lapic, sizeof lapic);
	int ret = save_msrs(v, w, err);
	if (ret)
		return ret;
	struct kvm_vcpu_events events;
	memset(&events, 0, sizeof events);
	GET(KVM_GET_VCPU_EVENTS, &events, "events");
	put_blob(w, &events, sizeof events);

	CLEANUP_FREE struct kvm_nested_state *nested = NULL;
	uint32_t nested_len = 0;
	if (c->nested_bytes >= sizeof *nested) {
		nested = calloc(1, c->nested_bytes);
		if (!nested)
			return error_errno(err, ENOMEM, "vCPU %u: nested state", v->id);
		nested->size = c->nested_bytes;
		if (kvm_ioctl(v->fd, KVM_GET_NESTED_STATE, nested) >= 0 && nested->size <= c->nested_bytes)
			nested_len = nested->size;
	}
	put_blob(w, nested, nested_len);
	return 0;
}

int vcpu_save(struct vcpu *v, struct state_writer *w, struct error *err)
{
	char name[STATE_NAME_BYTES];
	snprintf(name, sizeof name, "cpu.%u", v->id);
	state_section_begin(w, name, 1);
	int ret = save(v, w, err);
	state_section_end(w);
	return ret;
}

static int save_apart(struct vcpu *v, void *opaque, struct error *err)
{
	(void)opaque;
	if (!v->saved)
		v->saved = state_writer_create();
	return v->saved ? vcpu_save(v, v->saved, err) : error_errno(err, ENOMEM, "vCPU %u: state", v->id);
}

int vcpus_save(struct machine *m, struct state_writer *w, struct error *err)
{
	if (m->ncpus == 1)
		return vcpu_save(&m->vcpus[0], w, err);
	int ret = vcpus_each(m, save_apart, NULL, err);
	for (unsigned i = 0; i < m->ncpus; i++) {
		struct state_writer *saved = steal_ptr(m->vcpus[i].saved);
		if (!ret)
			state_put_sections(w, saved);
		state_writer_free(saved);
	}
	return ret;
}

struct loaded {
	uint32_t mp_state, tsc_khz;
	struct kvm_regs regs;
	uint8_t sregs_kind;
	struct kvm_sregs2 sregs2;
	struct kvm_sregs sregs;
	uint8_t *xsave; /* xsave_bytes of this host */
	struct kvm_xcrs xcrs;
	struct kvm_debugregs debug;
	struct kvm_lapic_state lapic;
	struct kvm_msr_entry *msrs;
	unsigned nmsrs;
	struct kvm_vcpu_events events;
	struct kvm_nested_state *nested;
};

static void loaded_free(struct loaded *l)
{
	free(l->xsave);
	free(l->msrs);
	free(l->nested);
}

static int parse_xsave(struct vcpu *v, struct state_reader *r, struct loaded *l, struct error *err)
{
	const struct kvm_caps *c = &v->m->caps;
	size_t here = c->xsave_bytes ? c->xsave_bytes : sizeof(struct kvm_xsave);
	uint32_t len = state_get_u32(r);
	if (len < sizeof(struct kvm_xsave) || len > state_remaining(r))
		return error_set(err, EPROTO, "XSAVE area of %u bytes", len);
	l->xsave = calloc(1, len > here ? len : here);
	if (!l->xsave)
		return error_errno(err, ENOMEM, "XSAVE area");
	state_get_bytes(r, l->xsave, len);
	for (size_t i = here; i < len; i++)
		if (l->xsave[i])
			return error_set(err, ENOTSUP, "XSAVE area of %u bytes does not fit this host's %zu",
					 len, here);
	return 0;
}

static int parse(struct vcpu *v, struct state_reader *r, struct loaded *l, struct error *err)
{
	int ret;
	l->mp_state = state_get_u32(r);
	l->tsc_khz = state_get_u32(r);
	if ((ret = get_blob(r, &l->regs, sizeof l->regs, "registers", err)))
		return ret;
	l->sregs_kind = state_get_u8(r);
	if (l->sregs_kind == 2)
		ret = v->m->caps.sregs2 ? get_blob(r, &l->sregs2, sizeof l->sregs2, "special registers", err)
					: error_set(err, ENOTSUP, "this host's KVM lacks KVM_CAP_SREGS2");
	else if (l->sregs_kind == 1)
		ret = get_blob(r, &l->sregs, sizeof l->sregs, "special registers", err);
	else
		ret = error_set(err, EPROTO, "special registers of kind %u", l->sregs_kind);
	if (ret || (ret = parse_xsave(v, r, l, err)) ||
	    (ret = get_blob(r, &l->xcrs, sizeof l->xcrs, "XCRs", err)) ||
	    (ret = get_blob(r, &l->debug, sizeof l->debug, "debug registers", err)) ||
	    (ret = get_blob(r, &l->lapic, sizeof l->lapic, "LAPIC", err)))
		return ret;
	if (l->xcrs.nr_xcrs > KVM_MAX_XCRS)
		return error_set(err, EPROTO, "%u XCRs", l->xcrs.nr_xcrs);
	l->nmsrs = state_get_u32(r);
	if (l->nmsrs > MACHINE_MSRS_MAX + 2)
		return error_set(err, EPROTO, "%u MSRs", l->nmsrs);
	l->msrs = calloc(l->nmsrs + 1, sizeof *l->msrs);
	if (!l->msrs)
		return error_errno(err, ENOMEM, "MSRs");
	for (unsigned i = 0; i < l->nmsrs; i++) {
		l->msrs[i].index = state_get_u32(r);
		l->msrs[i].data = state_get_u64(r);
	}
	if ((ret = get_blob(r, &l->events, sizeof l->events, "events", err)))
		return ret;
	uint32_t len = state_get_u32(r);
	if (len > state_remaining(r) || (len && len < sizeof *l->nested))
		return error_set(err, EPROTO, "nested state of %u bytes", len);
	if (len) {
		l->nested = malloc(len);
		if (!l->nested)
			return error_errno(err, ENOMEM, "nested state");
		state_get_bytes(r, l->nested, len);
		if (l->nested->size != len)
			return error_set(err, EPROTO, "nested state says %u of %u bytes", l->nested->size,
					 len);
	}
	return state_reader_section_end(r, err);
}

#define SET(request, object, what)                                                                           \
	do {                                                                                                 \
		int ret_ = kvm_ioctl(v->fd, request, object);                                                \
		if (ret_ < 0)                                                                                \
			return error_errno(err, ret_, "vCPU %u: load " what, v->id);                         \
	} while (0)

static bool msr_before_all(uint32_t index)
{
	return msr_may_fail(index) || index == 0x3a /* FEATURE_CONTROL */;
}

static int apply(struct vcpu *v, struct loaded *l, bool keep_tsc, struct error *err)
{
	const struct kvm_caps *c = &v->m->caps;
	CLEANUP_FREE struct kvm_msr_entry *batch = calloc(l->nmsrs + 1, sizeof *batch);
	if (!batch)
		return error_errno(err, ENOMEM, "vCPU %u: MSRs", v->id);
	unsigned n = 0;
	if (!keep_tsc && l->tsc_khz && c->tsc_control)
		SET(KVM_SET_TSC_KHZ, (void *)(uintptr_t)l->tsc_khz, "TSC rate");
	for (unsigned i = 0; i < l->nmsrs; i++)
		if (msr_before_all(l->msrs[i].index))
			batch[n++] = l->msrs[i];
	int ret = set_msrs(v, batch, n, err);
	if (ret)
		return ret;
	if (l->sregs_kind == 2)
		SET(KVM_SET_SREGS2, &l->sregs2, "special registers");
	else
		SET(KVM_SET_SREGS, &l->sregs, "special registers");
	if (l->nested && c->nested_bytes)
		SET(KVM_SET_NESTED_STATE, l->nested, "nested state");
	SET(KVM_SET_REGS, &l->regs, "registers");
	SET(KVM_SET_XSAVE, l->xsave, "XSAVE area");
	if (l->xcrs.nr_xcrs)
		SET(KVM_SET_XCRS, &l->xcrs, "XCRs");
	SET(KVM_SET_DEBUGREGS, &l->debug, "debug registers");
	SET(KVM_SET_LAPIC, &l->lapic, "LAPIC");

	n = 0;
	v->loaded_tsc = v->loaded_deadline = 0;
	v->loaded_tsc_khz = l->tsc_khz;
	for (unsigned i = 0; i < l->nmsrs; i++)
		if (l->msrs[i].index == MSR_TSC) {
			v->loaded_tsc = l->msrs[i].data;
			if (!keep_tsc)
				batch[n++] = l->msrs[i];
		}
	for (unsigned i = 0; i < l->nmsrs; i++) {
		uint32_t index = l->msrs[i].index;
		if (index == MSR_TSC_DEADLINE)
			v->loaded_deadline = l->msrs[i].data;
		else if (index != MSR_TSC && !msr_before_all(index) && !msr_writes_memory(index) &&
			 !(keep_tsc && index == MSR_TSC_ADJUST))
			batch[n++] = l->msrs[i];
	}
	ret = set_msrs(v, batch, n, err);
	if (ret)
		return ret;
	if (v->loaded_deadline && vcpu_set_msr(v, MSR_TSC_DEADLINE, v->loaded_deadline))
		return error_set(err, ENOTSUP, "vCPU %u: this host refuses TSC_DEADLINE", v->id);
	SET(KVM_SET_VCPU_EVENTS, &l->events, "events");
	struct kvm_mp_state mp = {.mp_state = l->mp_state};
	SET(KVM_SET_MP_STATE, &mp, "MP state");
	return 0;
}

static int read_section(struct vcpu *v, struct state_reader *r, struct loaded *l, struct error *err)
{
	char name[STATE_NAME_BYTES];
	snprintf(name, sizeof name, "cpu.%u", v->id);
	int ret = state_reader_section(r, name, 1, NULL, err);
	if (ret)
		return ret;
	ret = parse(v, r, l, err);
	return ret ? error_prefix(err, "saved state of vCPU %u", v->id) : 0;
}

int vcpu_load(struct vcpu *v, struct state_reader *r, bool keep_tsc, struct error *err)
{
	CLEANUP(loaded_free) struct loaded l;
	memset(&l, 0, sizeof l);
	int ret = read_section(v, r, &l, err);
	return ret ? ret : apply(v, &l, keep_tsc, err);
}

static int apply_one(struct vcpu *v, void *opaque, struct error *err)
{
	struct loaded *all = opaque;
	return apply(v, &all[v->id], false, err);
}

int vcpus_load(struct machine *m, struct state_reader *r, struct error *err)
{
	CLEANUP_FREE struct loaded *all = calloc(m->ncpus, sizeof *all);
	if (!all)
		return error_errno(err, ENOMEM, "vCPUs");
	int ret = 0;
	for (unsigned i = 0; i < m->ncpus && !ret; i++)
		ret = read_section(&m->vcpus[i], r, &all[i], err);
	if (!ret)
		ret = vcpus_each(m, apply_one, all, err);
	for (unsigned i = 0; i < m->ncpus; i++)
		loaded_free(&all[i]);
	return ret;
}

#define LAPIC_PPR	0xa0
#define LAPIC_COUNTDOWN 0x390
#define HV_VP_RUNTIME	0x40000010u
#define HV_TIME_REF	0x40000020u

/* What goes on while nobody runs, or need not be as it was. */
static bool msr_may_differ(uint32_t index)
{
	return index == MSR_TSC || index == MSR_TSC_DEADLINE || index == MSR_TSC_ADJUST ||
	       msr_writes_memory(index) || index == HV_VP_RUNTIME || index == HV_TIME_REF ||
	       msr_may_fail(index);
}

/* What SYSENTER uses has 32 bits on AMD's processors, which KVM keeps to when it is set; an emulated one lets
 * the guest write 64. */
static uint64_t msr_kept(const struct kvm_msr_entry *e)
{
	bool half =
		(e->index == MSR_SYSENTER_ESP || e->index == MSR_SYSENTER_EIP) && !__builtin_cpu_is("intel");
	return half ? (uint32_t)e->data : e->data;
}

static int msrs_differ(const struct vcpu *v, const struct loaded *a, const struct loaded *b,
		       struct error *err)
{
	for (unsigned i = 0; i < a->nmsrs; i++) {
		const struct kvm_msr_entry *x = &a->msrs[i], *y = b->msrs;
		while (y < b->msrs + b->nmsrs && y->index != x->index)
			y++;
		bool there = y < b->msrs + b->nmsrs;
		/* what this host does not have was 0, or it would have been refused */
		if (!msr_may_differ(x->index) && there && msr_kept(x) != msr_kept(y))
			return error_set(err, EBADMSG, "section cpu.%u: MSR 0x%x was 0x%llx and is 0x%llx",
					 v->id, x->index, (unsigned long long)x->data,
					 (unsigned long long)y->data);
	}
	return 0;
}

static int loaded_differ(struct vcpu *v, struct loaded *a, struct loaded *b, struct error *err)
{
	/* the processor priority follows from TPR and ISR: KVM computes it anew as it loads them */
	static const unsigned not_kept[] = {LAPIC_PPR, LAPIC_COUNTDOWN};
	for (unsigned i = 0; i < ARRAY_SIZE(not_kept); i++) {
		memset(a->lapic.regs + not_kept[i], 0, 4);
		memset(b->lapic.regs + not_kept[i], 0, 4);
	}
	const struct {
		const char *name;
		const void *a, *b;
		size_t len;
	} parts[] = {
		{"run state", &a->mp_state, &b->mp_state, sizeof a->mp_state},
		{"registers", &a->regs, &b->regs, sizeof a->regs},
		{"special registers", &a->sregs2, &b->sregs2, sizeof a->sregs2},
		{"special registers", &a->sregs, &b->sregs, sizeof a->sregs},
		{"XSAVE area", a->xsave, b->xsave,
		 v->m->caps.xsave_bytes ? v->m->caps.xsave_bytes : sizeof(struct kvm_xsave)},
		{"XCRs", &a->xcrs, &b->xcrs, sizeof a->xcrs},
		{"debug registers", &a->debug, &b->debug, sizeof a->debug},
		{"LAPIC", &a->lapic, &b->lapic, sizeof a->lapic},
		{"events", &a->events, &b->events, sizeof a->events},
	};
	for (unsigned i = 0; i < ARRAY_SIZE(parts); i++) {
		const uint8_t *x = parts[i].a, *y = parts[i].b;
		size_t at = 0;
		while (at < parts[i].len && x[at] == y[at])
			at++;
		if (at < parts[i].len)
			return error_set(err, EBADMSG,
					 "section cpu.%u: its %s differ at byte %zu: 0x%02x was loaded, "
					 "0x%02x is there",
					 v->id, parts[i].name, at, x[at], y[at]);
	}
	return msrs_differ(v, a, b, err);
}

int vcpu_differ(struct vcpu *v, struct state_reader *a, struct state_reader *b, struct error *err)
{
	CLEANUP(loaded_free) struct loaded x, y;
	memset(&x, 0, sizeof x);
	memset(&y, 0, sizeof y);
	int ret = read_section(v, a, &x, err);
	if (!ret)
		ret = read_section(v, b, &y, err);
	return ret ? ret : loaded_differ(v, &x, &y, err);
}
