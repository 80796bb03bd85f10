/* SPDX-License-Identifier: Apache-2.0 */
#include "host/pair_codes.h"

#include <errno.h>
#include <inttypes.h>
#include <openssl/crypto.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "base/cleanup.h"

void pair_codes_init(struct pair_codes *codes)
{
	*codes = (struct pair_codes){0};
	pthread_mutex_init(&codes->lock, NULL);
}

uint64_t pair_codes_now_ms(void)
{
	struct timespec t;
	clock_gettime(CLOCK_BOOTTIME, &t);
	return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

static bool is_open(const struct pair_code_entry *e, uint64_t now_ms)
{
	return e->state == PAIR_OPEN && now_ms < e->valid_until_ms;
}

/* An open one is never pushed out; of the others the oldest. */
static struct pair_code_entry *place(struct pair_codes *codes, uint64_t now_ms)
{
	struct pair_code_entry *best = NULL;
	for (unsigned i = 0; i < PAIR_CODES_MAX; i++) {
		struct pair_code_entry *e = &codes->entries[i];
		if (e->state == PAIR_FREE)
			return e;
		if (!is_open(e, now_ms) && (!best || e->valid_until_ms < best->valid_until_ms))
			best = e;
	}
	return best;
}

int pair_codes_make(struct pair_codes *codes, const char *listener_sha256, unsigned valid_s, uint64_t now_ms,
		    struct pair_code *out, struct error *err)
{
	SCOPE_LOCK(&codes->lock);
	struct pair_code_entry *e = place(codes, now_ms);
	if (!e)
		return error_set(err, ENOSPC,
				 "%d codes are open already; each is good until it is used or its time is up",
				 PAIR_CODES_MAX);
	int rc = pair_code_make(listener_sha256, out, err);
	if (rc < 0)
		return rc;
	*e = (struct pair_code_entry){
		.state = PAIR_OPEN, .code = *out, .valid_until_ms = now_ms + valid_s * UINT64_C(1000)};
	return 0;
}

bool pair_codes_any(struct pair_codes *codes, uint64_t now_ms)
{
	SCOPE_LOCK(&codes->lock);
	for (unsigned i = 0; i < PAIR_CODES_MAX; i++)
		if (codes->entries[i].state != PAIR_FREE &&
		    now_ms < codes->entries[i].valid_until_ms + PAIR_REMEMBERED_MS)
			return true;
	return false;
}

static struct pair_code_entry *find(struct pair_codes *codes, const struct pair_binding *b,
				    const struct pair_hello *hello)
{
	struct pair_code_entry *found = NULL;
	uint8_t proof[PAIR_PROOF_BYTES];
	for (unsigned i = 0; i < PAIR_CODES_MAX; i++) {
		struct pair_code_entry *e = &codes->entries[i];
		if (e->state == PAIR_FREE)
			continue;
		pair_prove_hello(&e->code, b, hello, proof);
		if (pair_proofs_equal(proof, hello->proof))
			found = e;
	}
	OPENSSL_cleanse(proof, sizeof proof);
	return found;
}

static int wrong_try(struct pair_codes *codes, uint64_t now_ms, struct error *err)
{
	unsigned open = 0;
	for (unsigned i = 0; i < PAIR_CODES_MAX; i++) {
		struct pair_code_entry *e = &codes->entries[i];
		if (!is_open(e, now_ms))
			continue;
		open++;
		if (++e->wrong >= PAIR_WRONG_TRIES_MAX) {
			e->state = PAIR_VOID;
			open--;
		}
	}
	return error_set(err, EACCES, "the code is wrong%s",
			 open ? ""
			      : ", and no code is open there any more: print a new one with snmigrate pair");
}

int pair_codes_redeem(struct pair_codes *codes, const struct pair_binding *binding,
		      const struct pair_hello *hello, uint64_t now_ms,
		      int (*accept)(void *opaque, const struct pair_hello *hello, struct error *err),
		      void *opaque, struct pair_reply *reply, struct error *err)
{
	SCOPE_LOCK(&codes->lock);
	struct pair_code_entry *e = find(codes, binding, hello);
	if (!e)
		return wrong_try(codes, now_ms, err);
	if (e->state == PAIR_USED)
		return error_set(err, EALREADY, "the code was used already, by host %s; a code is good once",
				 e->used_by);
	if (e->state == PAIR_VOID)
		return error_set(err, EPERM, "the code is void: there were %d tries with wrong ones",
				 PAIR_WRONG_TRIES_MAX);
	if (!is_open(e, now_ms))
		return error_set(err, EKEYEXPIRED, "the code has expired, %" PRIu64 " s ago",
				 (now_ms - e->valid_until_ms) / 1000);
	int rc = accept(opaque, hello, err);
	if (rc < 0)
		return rc;
	e->state = PAIR_USED;
	strcpy(e->used_by, hello->name);
	pair_prove_reply(&e->code, binding, reply, reply->proof);
	return 0;
}
