/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The destination's part in post-copy: the VM is owned and runs here, and fetches its last pages from the
 * source's VMM, which keeps them for as long as that takes. If that ends first, so does the guest: it has
 * crashed, with good disks.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/bitmap.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/log.h"
#include "host/exit.h"
#include "vmm/memory.h"
#include "vmm/move_destination.h"

#define LOOK_EVERY_MS 500
/* The source is believed when it has said so often in a row, once a look, that it has nothing to give. */
#define LOST_ANSWERS 3

void arrival_postcopy_open(struct arrival *a, json_t *hello)
{
	if (!json_is_true(json_object_get(hello, "postcopy")))
		return;
	int rc = fault_point("d-userfaultfd")
			 ? error_set(&a->postcopy_refused, EPERM, "userfaultfd: refused by a fault point")
			 : mem_postcopy_open_faults(&a->faults_fd, &a->postcopy_refused);
	if (rc)
		log_warn("post-copy: %s", a->postcopy_refused.message);
}

static void session_broken(void *opaque, const struct error *why)
{
	struct arrival *a = opaque;
	log_warn("post-copy: %s; waiting for %s", why->message, a->peer);
}

int arrival_postcopy_memory(struct arrival *a, struct error *err)
{
	struct mem_space space = machine_memory_space(a->vm->machine);
	return a->faults_fd < 0 ? 0 : mem_postcopy_small_pages(&space, err);
}

int arrival_postcopy_create(struct arrival *a, struct error *err)
{
	struct mem_postcopy_dest_options opt = {
		.space = machine_memory_space(a->vm->machine),
		.faults_fd = a->faults_fd,
		.timeout_ms = a->vm->cfg->silence_ms,
		.epoch = a->epoch,
		.broken = session_broken,
		.opaque = a,
	};
	struct mem_postcopy_dest *d;
	if (a->faults_fd < 0)
		return 0;
	int rc = mem_postcopy_dest_create(&opt, &d, err);
	if (rc)
		return rc;
	SCOPE_LOCK(&a->lock);
	a->postcopy = d;
	return 0;
}

static struct mem_postcopy_dest *pages_of(struct arrival *a)
{
	SCOPE_LOCK(&a->lock);
	return a->postcopy;
}

unsigned arrival_postcopy_token(const struct arrival *a, const char *token)
{
	unsigned i = 0;
	while (i < MEM_POSTCOPY_CHANNELS && (a->faults_fd < 0 || strcmp(a->postcopy_token[i], token)))
		i++;
	return i;
}

int arrival_postcopy_add(struct arrival *a, unsigned channel, struct conn *conn, struct error *err)
{
	struct mem_postcopy_dest *d = pages_of(a);
	if (!d) {
		conn_close(conn);
		return error_set(err, EPROTO, "post-copy: not in the phase of memory yet");
	}
	mem_postcopy_dest_add(d, channel, conn);
	return 0;
}

/* The guest runs and gives memory back while some of it is missing. */
static void pages_given_back(void *dest, uint64_t first_page, uint64_t npages)
{
	mem_postcopy_dest_forget(dest, first_page, npages);
}

int arrival_postcopy_begin(struct arrival *a, struct error *err)
{
	uint64_t *missing = mem_receiver_take_later(a->receiver);
	struct mem_postcopy_dest *d = pages_of(a);
	if (!missing)
		return 0;
	if (a->verify) {
		uint64_t npages = machine_memory_space(a->vm->machine).npages;
		free(a->later);
		a->later = bitmap_alloc(npages);
		if (a->later)
			memcpy(a->later, missing, BITMAP_WORDS(npages) * sizeof *missing);
	}
	int rc = mem_postcopy_dest_begin(d, missing, err);
	if (!rc)
		guest_memory_on_discard(machine_memory(a->vm->machine), pages_given_back, d);
	/* The link may have failed just now: then nobody is to wait. */
	pthread_mutex_lock(&a->lock);
	bool give_up = a->memory_void;
	pthread_mutex_unlock(&a->lock);
	if (give_up)
		mem_postcopy_dest_abort(d);
	return rc;
}

bool arrival_is_paging(struct arrival *a)
{
	struct mem_postcopy_dest *d = __atomic_load_n(&a->postcopy, __ATOMIC_ACQUIRE);
	return d && mem_postcopy_dest_pending(d);
}

void arrival_postcopy_abort(struct arrival *a)
{
	struct mem_postcopy_dest *d = pages_of(a);
	if (d)
		mem_postcopy_dest_abort(d);
}

bool arrival_postcopy_stats(struct arrival *a, struct mem_postcopy_stats *out)
{
	struct mem_postcopy_dest *d = pages_of(a);
	if (d)
		mem_postcopy_dest_stats(d, out);
	return d != NULL;
}

static void remember(struct vm *vm, const char *why)
{
	struct vm_record rec;
	if (vm_record(vm, &rec, NULL))
		return;
	snprintf(rec.reason, sizeof rec.reason, "%s", why);
	struct error e = ERROR_INIT;
	if (record_store(vm->record, &rec, &e))
		log_error("record: %s", e.message);
}

/* A thread that waits for a page never gets it. It must not get anything else either, so the process ends as
 * if the host had lost power: what the guest wrote is on its disks. */
static void memory_lost(struct arrival *a)
{
	char why[256];
	struct mem_postcopy_stats st;
	mem_postcopy_dest_stats(a->postcopy, &st);
	snprintf(why, sizeof why, "%s lost the last %" PRIu64 " KiB of its memory before they had got here",
		 a->peer, st.missing_pages * (MEM_PAGE_BYTES >> 10));
	log_error("%s: the guest has crashed", why);
	remember(a->vm, why);
	arrival_note_end(a, "crashed", EXIT_CRASHED, why, NULL);
	_exit(EXIT_CRASHED);
}

/* Whether the source says that it has no pages for this guest. */
static bool source_has_none(struct arrival *a)
{
	struct handover_report answer;
	struct error e = ERROR_INIT;
	if (arrival_ask(a, &answer, &e)) {
		log_debug("post-copy: %s", e.message);
		return false;
	}
	arrival_settle(a, &answer, &e);
	return !answer.paging;
}

static void *pager_thread(void *arg)
{
	struct arrival *a = arg;
	struct mem_postcopy_stats st;
	unsigned lost = 0;
	int rc;
	while ((rc = mem_postcopy_dest_wait(a->postcopy, LOOK_EVERY_MS, NULL)) == -ETIMEDOUT) {
		mem_postcopy_dest_stats(a->postcopy, &st);
		lost = !st.connected && source_has_none(a) ? lost + 1 : 0;
		/* it may have arrived meanwhile */
		if (lost == LOST_ANSWERS && arrival_is_paging(a))
			memory_lost(a);
	}
	mem_postcopy_dest_stats(a->postcopy, &st);
	if (!rc)
		log_info("post-copy: %" PRIu64 " pages are here; %" PRIu64 " faults waited %" PRIu64
			 " us in the middle, %" PRIu64 " at most; %u sessions",
			 st.total_pages, st.faults, st.fault_median_us, st.fault_worst_us, st.sessions);
	if (!rc)
		arrival_note_owned(a, NULL);
	arrival_channels_close(a);
	return NULL;
}

int arrival_postcopy_start(struct arrival *a, struct error *err)
{
	int rc = pthread_create(&a->pager, NULL, pager_thread, a);
	if (rc)
		return error_errno(err, rc, "thread");
	a->pager_started = true;
	return 0;
}

void arrival_postcopy_free(struct arrival *a)
{
	if (a->pager_started)
		pthread_join(a->pager, NULL);
	a->pager_started = false;
	pthread_mutex_lock(&a->lock);
	struct mem_postcopy_dest *d = steal_ptr(a->postcopy);
	pthread_mutex_unlock(&a->lock);
	if (d)
		guest_memory_on_discard(machine_memory(a->vm->machine), NULL, NULL);
	mem_postcopy_dest_free(d);
	if (a->faults_fd >= 0)
		close(steal_fd(&a->faults_fd));
}

static struct arrival *arrival_of(struct vm *vm)
{
	SCOPE_LOCK(&vm->lock);
	return vm->arrival;
}

bool move_destination_is_paging(struct vm *vm)
{
	struct arrival *a = arrival_of(vm);
	return a && arrival_is_paging(a);
}

bool move_destination_knows(struct vm *vm, const char *token)
{
	struct arrival *a = arrival_of(vm);
	return a && arrival_is_paging(a) && arrival_postcopy_token(a, token) < MEM_POSTCOPY_CHANNELS;
}

int move_destination_channel(struct vm *vm, const char *token, int fd, struct error *err)
{
	struct arrival *a = arrival_of(vm);
	struct conn *conn = NULL;
	unsigned channel = arrival_postcopy_token(a, token);
	int rc = arrival_accept(a, fd, &conn, err);
	return rc ? error_prefix(err, "memory channel") : arrival_postcopy_add(a, channel, conn, err);
}

void move_destination_leave(struct vm *vm, int exit_status)
{
	if (!move_destination_is_paging(vm))
		return;
	log_warn("the VM ends before the last of its memory has arrived");
	_exit(exit_status);
}
