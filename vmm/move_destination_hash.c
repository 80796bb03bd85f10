/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/move_destination_hash.h"

#include <errno.h>
#include <string.h>

#include "base/cleanup.h"
#include "base/confine.h"
#include "base/fault.h"
#include "base/log.h"
#include "host/jsonl.h"
#include "mirror/witness.h"
#include "vmm/move_destination.h"
#include "vmm/move_hashes.h"

/* A source asks from three threads a disk; one that asks more before it has its answers is broken. */
#define ASKS_MAX 64

struct arrival_hash {
	struct arrival *a;
	struct witness *witness[VM_DISKS_MAX];
	struct mirror_hash zero[VM_DISKS_MAX]; /* of a full chunk */
	pthread_t thread;
	bool started;

	pthread_mutex_t lock;
	pthread_cond_t changed;
	struct hash_ask asks[ASKS_MAX];
	unsigned head, count;
	bool open;    /* questions are taken, */
	bool closing; /* and no more */
	bool agreed;
};

static bool next_ask(struct arrival_hash *h, struct hash_ask *out)
{
	SCOPE_LOCK(&h->lock);
	while (!h->count && !h->closing)
		pthread_cond_wait(&h->changed, &h->lock);
	if (h->closing)
		return false;
	*out = h->asks[h->head];
	h->head = (h->head + 1) % ASKS_MAX;
	h->count--;
	return true;
}

static int answer(struct arrival_hash *h, const struct hash_ask *ask, struct error *err)
{
	struct arrival *a = h->a;
	uint32_t n = ask->n ? ask->n : 1;
	CLEANUP_FREE struct mirror_hash *hashes = calloc(n, sizeof *hashes);
	CLEANUP_FREE uint8_t *payload = malloc(hashes_max_bytes(n));
	if (!hashes || !payload)
		return error_errno(err, ENOMEM, "hashes");
	int rc = 0;
	if (ask->n) {
		fault_point("d-before-hash");
		rc = witness_hashes(h->witness[ask->disk], ask->first, ask->n, hashes, err);
	} else {
		hashes[0] = witness_root(h->witness[ask->disk]);
	}
	if (rc)
		return rc;
	uint32_t len = hashes_encode(payload, ask, hashes, &h->zero[ask->disk]);
	return move_link_send_bytes(a->link, FRAME_HASHES, payload, len, err);
}

static void *hash_thread(void *arg)
{
	struct arrival_hash *h = arg;
	struct hash_ask ask;
	struct error err = ERROR_INIT;
	pthread_setname_np(pthread_self(), "hashes");
	confine_self(CONFINE_MIRROR);
	while (next_ask(h, &ask)) {
		if (!answer(h, &ask, &err))
			continue;
		/* The source ends the move, which ends this side. */
		log_warn("%s", err.message);
		json_t *o = json_pack("{s:o}", "reason", jsonl_text(err.message));
		move_link_send(h->a->link, FRAME_ABORT, o, NULL);
		json_decref(o);
		break;
	}
	return NULL;
}

int arrival_hash_start(struct arrival *a, struct error *err)
{
	struct arrival_hash *h = calloc(1, sizeof *h);
	if (!h)
		return error_errno(err, ENOMEM, "hashes");
	h->a = a;
	pthread_mutex_init(&h->lock, NULL);
	pthread_cond_init(&h->changed, NULL);
	a->hash = h; /* whole: the channel's thread looks at it */
	int rc = 0;
	for (unsigned i = 0; !rc && i < a->vm->def.ndisks; i++) {
		if (arrival_is_shared(a, i))
			continue;
		h->zero[i] = mirror_hash_zeroes(a->hash_seed, a->chunk_bytes[i]);
		rc = witness_create(a->vm->disks[i].local, a->chunk_bytes[i], a->hash_seed, &h->witness[i],
				    err);
	}
	if (rc)
		return rc;
	rc = pthread_create(&h->thread, NULL, hash_thread, h);
	if (rc)
		return error_errno(err, rc, "hashes: thread");
	h->started = true;
	return 0;
}

void arrival_hash_open(struct arrival *a)
{
	if (!a->hash)
		return;
	SCOPE_LOCK(&a->hash->lock);
	a->hash->open = true;
}

int arrival_hash_ask(struct arrival *a, const struct frame *f, struct error *err)
{
	struct arrival_hash *h = a->hash;
	struct hash_ask ask;
	if (!h)
		return error_set(err, EPROTO, "hash-ask in a move without hashes");
	int rc = hash_ask_decode(f->payload, f->len, a->vm->def.ndisks, &ask, err);
	if (rc)
		return rc;
	if (!h->witness[ask.disk])
		return error_set(err, EPROTO, "hash-ask of disk %s, which both hosts see",
				 a->vm->def.disks[ask.disk].id);
	SCOPE_LOCK(&h->lock);
	if (!h->open || h->closing)
		return error_set(err, EPROTO, "hash-ask out of turn");
	if (h->count == ASKS_MAX)
		return error_set(err, EPROTO, "hash-ask: more than %d at once", ASKS_MAX);
	h->asks[(h->head + h->count++) % ASKS_MAX] = ask;
	pthread_cond_signal(&h->changed);
	return 0;
}

void *arrival_hash_witness(struct arrival *a, unsigned disk)
{
	return a->hash ? a->hash->witness[disk] : NULL;
}

void arrival_hash_observe(void *witness, uint64_t offset_bytes, uint64_t len_bytes, const void *data)
{
	witness_observe(witness, offset_bytes, len_bytes, data);
}

static void end_questions(struct arrival_hash *h)
{
	SCOPE_LOCK(&h->lock);
	h->closing = true;
	pthread_cond_signal(&h->changed);
}

int arrival_hash_compare(struct arrival *a, const struct frame *f, struct error *err)
{
	struct arrival_hash *h = a->hash;
	unsigned n = a->vm->def.ndisks;
	if (!h || a->stage != ARRIVAL_PREPARED)
		return error_set(err, EPROTO, "sums out of turn");
	end_questions(h);
	CLEANUP_FREE struct mirror_sums *sums = calloc(n + 1, sizeof *sums);
	if (!sums)
		return error_errno(err, ENOMEM, "sums");
	int rc = sums_decode(f->payload, f->len, n, sums, err);
	for (unsigned i = 0; !rc && i < n; i++)
		if (h->witness[i])
			rc = witness_compare(h->witness[i], &sums[i], err);
	h->agreed = !rc;
	return rc;
}

bool arrival_hash_agreed(const struct arrival *a)
{
	return !a->hash || a->hash->agreed;
}

void arrival_hash_stop(struct arrival *a)
{
	struct arrival_hash *h = a->hash;
	if (!h)
		return;
	end_questions(h);
	for (unsigned i = 0; i < a->vm->def.ndisks; i++)
		witness_cancel(h->witness[i]);
	if (h->started)
		pthread_join(h->thread, NULL);
	h->started = false;
}

void arrival_hash_free(struct arrival *a)
{
	struct arrival_hash *h = a->hash;
	if (!h)
		return;
	arrival_hash_stop(a);
	a->hash = NULL;
	for (unsigned i = 0; i < VM_DISKS_MAX; i++)
		witness_free(h->witness[i]);
	pthread_cond_destroy(&h->changed);
	pthread_mutex_destroy(&h->lock);
	free(h);
}
