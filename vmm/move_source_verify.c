/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The source's part in the proof (docs/protocol.md, "Proof"): what the destination's media hold is compared
 * before the memory is sent, and in the pause the sums of what was written since.
 */
#include <errno.h>
#include <stdio.h>
#include <sys/random.h>
#include <time.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "base/cond.h"
#include "base/log.h"
#include "mirror/proof.h"
#include "vmm/move_hashes.h"
#include "vmm/move_source.h"

#define VERIFY_RETRIES	  8
#define ANSWER_TIMEOUT_MS 120000 /* the destination beats meanwhile, so this is a disk that hangs */
#define ANSWER_LOOK_NS	  UINT64_C(200000000)

/* A question on its way. */
struct question {
	struct question *next;
	struct hash_ask ask;
	struct mirror_hash zero, *out;
	bool answered;
};

struct disk_proof {
	struct source_proof *proof;
	unsigned disk;
	struct mirror_verify_result all; /* added up over all verifications */
	struct mirror_hash root_there;
	bool compared; /* roots, too; the move's own thread */
	uint64_t bad_offset, bad_len;
};

struct source_proof {
	struct move *mv;
	uint64_t seed, begun_ms, took_ms;
	struct disk_proof disks[VM_DISKS_MAX];
	uint64_t started_ns; /* by the clock on the wall */
	char own_certificate[65], peer_certificate[65];
	struct mirror_sums *sums; /* that went with the device state */
	bool ready;		  /* the destination found them right */

	pthread_mutex_t lock;
	pthread_cond_t changed;
	struct question *questions;
	uint32_t ids;
};

uint32_t source_chunk_bytes(uint64_t disk_bytes)
{
	uint32_t chunk = MOVE_CHUNK_BYTES;
	while (disk_bytes / chunk > MOVE_CHUNKS_MAX - 1)
		chunk *= 2;
	return chunk;
}

int source_proof_create(struct move *mv, struct error *err)
{
	struct source_proof *p = calloc(1, sizeof *p);
	struct mirror_sums *sums = calloc(mv->vm->def.ndisks + 1, sizeof *sums);
	if (!p || !sums) {
		free(p);
		free(sums);
		return error_errno(err, ENOMEM, "proof");
	}
	p->mv = mv;
	p->started_ns = clock_realtime_ns();
	p->sums = sums;
	pthread_mutex_init(&p->lock, NULL);
	cond_init_monotonic(&p->changed);
	for (unsigned i = 0; i < VM_DISKS_MAX; i++)
		p->disks[i] = (struct disk_proof){.proof = p, .disk = i};
	mv->proof = p;
	if (getrandom(&p->seed, sizeof p->seed, 0) != sizeof p->seed)
		return error_errno(err, errno, "getrandom");
	return 0;
}

void source_proof_peer(struct move *mv, const struct conn *control)
{
	struct source_proof *p = mv->proof;
	SCOPE_LOCK(&mv->lock);
	snprintf(p->own_certificate, sizeof p->own_certificate, "%s", conn_own_fingerprint(control));
	snprintf(p->peer_certificate, sizeof p->peer_certificate, "%s", conn_peer_fingerprint(control));
}

void source_proof_free(struct move *mv)
{
	struct source_proof *p = steal_ptr(mv->proof);
	if (!p)
		return;
	pthread_cond_destroy(&p->changed);
	pthread_mutex_destroy(&p->lock);
	free(p->sums);
	free(p);
}

uint64_t source_proof_seed(const struct move *mv)
{
	return mv->proof->seed;
}

/* --- questions --- */

static bool same_ask(const struct hash_ask *a, const struct hash_ask *b)
{
	return a->id == b->id && a->disk == b->disk && a->first == b->first && a->n == b->n;
}

int source_hashes_frame(struct move *mv, const struct frame *f, struct error *err)
{
	struct source_proof *p = mv->proof;
	struct hash_ask head;
	int rc = hashes_decode_head(f->payload, f->len, &head, err);
	if (rc)
		return rc;
	SCOPE_LOCK(&p->lock);
	for (struct question *q = p->questions; q; q = q->next) {
		if (q->answered || !same_ask(&q->ask, &head))
			continue;
		rc = hashes_decode(f->payload, f->len, &q->zero, q->ask.n, q->out, err);
		q->answered = !rc;
		pthread_cond_broadcast(&p->changed);
		return rc;
	}
	/* To a question that was given up: nobody waits for it. */
	return 0;
}

static int wait_answer(struct source_proof *p, struct question *q, struct error *err)
{
	uint64_t until = clock_now_ms() + ANSWER_TIMEOUT_MS;
	int rc = 0;
	SCOPE_LOCK(&p->lock);
	while (!q->answered && !rc) {
		struct timespec ts = clock_timespec(clock_now_ns() + ANSWER_LOOK_NS);
		pthread_cond_timedwait(&p->changed, &p->lock, &ts);
		rc = q->answered ? 0 : source_check(p->mv, err);
		if (!rc && !q->answered && clock_now_ms() > until)
			rc = error_set(err, ETIMEDOUT, "disk %s: %s gave no hashes within %d s",
				       p->mv->vm->def.disks[q->ask.disk].id, p->mv->opt.peer,
				       ANSWER_TIMEOUT_MS / 1000);
	}
	for (struct question **at = &p->questions; *at; at = &(*at)->next)
		if (*at == q) {
			*at = q->next;
			break;
		}
	return rc;
}

/* struct mirror_verify_options.remote_hashes; n 0: the root. */
static int remote_hashes(void *opaque, uint64_t first, unsigned n, struct mirror_hash *out, struct error *err)
{
	struct disk_proof *d = opaque;
	struct source_proof *p = d->proof;
	struct question q = {.ask = {.disk = d->disk, .n = n, .first = first}, .out = out};
	uint8_t payload[HASH_ASK_BYTES];
	/* of the ask's zero runs: those of full chunks */
	q.zero = mirror_hash_zeroes(p->seed, source_chunk_bytes(p->mv->vm->disks[d->disk].local->size_bytes));
	pthread_mutex_lock(&p->lock);
	q.ask.id = ++p->ids;
	q.next = p->questions;
	p->questions = &q;
	pthread_mutex_unlock(&p->lock);
	hash_ask_encode(payload, &q.ask);
	struct error sending = ERROR_INIT;
	if (move_link_send_bytes(p->mv->link, FRAME_HASH_ASK, payload, sizeof payload, &sending))
		source_interrupt(p->mv, &sending);
	return wait_answer(p, &q, err);
}

/* --- verification --- */

void source_verify_options(struct move *mv, unsigned disk, bool adopt, struct mirror_verify_options *out)
{
	*out = (struct mirror_verify_options){.adopt = adopt,
					      .seed = mv->proof->seed,
					      .remote_hashes = remote_hashes,
					      .opaque = &mv->proof->disks[disk]};
}

static int verify_disk(struct move *mv, unsigned i, struct error *err)
{
	struct disk_proof *d = &mv->proof->disks[i];
	struct mirror_verify_options opt;
	struct mirror_verify_result res;
	source_verify_options(mv, i, false, &opt);
	int rc = mirror_verify(mv->vm->disks[i].mirror, &opt, &res, err);
	pthread_mutex_lock(&mv->lock);
	d->all.chunks += res.chunks;
	d->all.agreed += res.agreed;
	d->all.differed += res.differed;
	d->all.retried += res.retried;
	d->all.bytes_read += res.bytes_read;
	d->all.root = res.root;
	d->bad_offset = res.bad_offset;
	d->bad_len = res.bad_len;
	pthread_mutex_unlock(&mv->lock);
	if (rc)
		return rc;
	struct mirror_hash there;
	rc = remote_hashes(d, 0, 0, &there, err);
	if (rc)
		return rc;
	pthread_mutex_lock(&mv->lock);
	d->root_there = there;
	pthread_mutex_unlock(&mv->lock);
	if (!mirror_hash_equal(&there, &res.root))
		return error_set(err, EILSEQ,
				 "disk %s: the destination's root hash differs from the source's",
				 mv->vm->def.disks[i].id);
	d->compared = true;
	return 0;
}

bool source_verified(struct move *mv)
{
	for (unsigned i = 0; i < mv->vm->def.ndisks; i++)
		if (!source_is_shared(mv, i) && !mirror_is_verified(mv->vm->disks[i].mirror))
			return false;
	return true;
}

/* What the guest's disks or the link did meanwhile, rather than what they hold. */
static bool may_pass(struct move *mv, unsigned disk, int code)
{
	struct mirror_stats st;
	mirror_stats(mv->vm->disks[disk].mirror, &st);
	return code == -EAGAIN || code == -EBUSY || st.failed;
}

static int verify_once(struct move *mv, bool *again, struct error *err)
{
	/* A buffered mirror stays so until the memory has been sent: the flush would end that. The
	 * destination makes durable what it hashes. */
	bool early = mv->opt.mirror_buffered && mv->phase == MOVE_VERIFY;
	int rc = early ? source_storage_sync(mv, err) : source_storage_flush(mv, err);
	*again = false;
	for (unsigned i = 0; !rc && i < mv->vm->def.ndisks; i++) {
		/* A disk that the destination had already, every chunk of it, is proved by its adoption; the
		 * root is agreed on all the same. */
		if (source_is_shared(mv, i) ||
		    (mirror_is_verified(mv->vm->disks[i].mirror) && mv->proof->disks[i].compared))
			continue;
		rc = verify_disk(mv, i, err);
		*again = rc && may_pass(mv, i, rc);
	}
	return rc;
}

int source_verify(struct move *mv, struct error *err)
{
	struct source_proof *p = mv->proof;
	uint64_t begun_ms = clock_now_ms();
	int rc = 0;
	for (unsigned tries = 1;; tries++) {
		struct error e = ERROR_INIT;
		bool again;
		rc = verify_once(mv, &again, &e);
		if (source_check(mv, err)) {
			rc = source_check(mv, err);
			break;
		}
		if (!rc && source_verified(mv))
			break;
		if (rc && (!again || tries > VERIFY_RETRIES)) {
			error_copy(err, &e);
			break;
		}
		if (rc)
			log_warn("verification: %s (%u)", e.message, tries);
	}
	pthread_mutex_lock(&mv->lock);
	p->took_ms += clock_now_ms() - begun_ms;
	pthread_mutex_unlock(&mv->lock);
	return rc;
}

/* --- the handover --- */

bool source_take_sums(struct move *mv)
{
	for (unsigned i = 0; i < mv->vm->def.ndisks; i++)
		if (!source_is_shared(mv, i) && !mirror_sums(mv->vm->disks[i].mirror, &mv->proof->sums[i]))
			return false;
	return true;
}

int source_send_sums(struct move *mv, struct error *err)
{
	unsigned n = mv->vm->def.ndisks;
	CLEANUP_FREE uint8_t *payload = malloc(sums_max_bytes(n));
	if (!payload)
		return error_errno(err, ENOMEM, "sums");
	return move_link_send_bytes(mv->link, FRAME_SUMS, payload, sums_encode(payload, n, mv->proof->sums),
				    err);
}

void source_proof_ready(struct move *mv)
{
	SCOPE_LOCK(&mv->lock);
	mv->proof->ready = true;
}

/* --- what is told of it --- */

void source_verify_progress(struct move *mv, uint64_t *done, uint64_t *total)
{
	*done = *total = 0;
	for (unsigned i = 0; i < mv->vm->def.ndisks; i++) {
		struct mirror_stats st;
		if (source_is_shared(mv, i))
			continue;
		mirror_stats(mv->vm->disks[i].mirror, &st);
		*done += st.verified_bytes;
		*total += mv->vm->disks[i].local->size_bytes;
	}
}

static json_t *hash_text(const struct mirror_hash *h)
{
	char text[33];
	mirror_hash_print(h, text);
	return json_string(text);
}

static json_t *disk_json(const struct move *mv, unsigned i)
{
	const struct disk_proof *d = &mv->proof->disks[i];
	const struct mirror_sums *s = &mv->proof->sums[i];
	uint64_t size = mv->vm->disks[i].local->size_bytes;
	uint32_t chunk = source_chunk_bytes(size);
	json_t *o = json_pack("{s:s, s:I, s:I, s:s, s:I, s:I, s:I, s:I, s:o, s:o, s:I, s:o}", "id",
			      mv->vm->def.disks[i].id, "bytes", (json_int_t)size, "chunk_bytes",
			      (json_int_t)chunk, "algorithm", "XXH3-128", "chunks",
			      (json_int_t)((size + chunk - 1) / chunk), "chunks_proved",
			      (json_int_t)d->all.agreed, "bytes_read_again", (json_int_t)d->all.bytes_read,
			      "retried", (json_int_t)d->all.retried, "root_source", hash_text(&d->all.root),
			      "root_destination", hash_text(&d->root_there), "mirrored_writes",
			      (json_int_t)s->writes, "mirrored_sum", hash_text(&s->total));
	if (o && d->bad_len) {
		json_object_set_new(o, "bad_offset", json_integer((json_int_t)d->bad_offset));
		json_object_set_new(o, "bad_bytes", json_integer((json_int_t)d->bad_len));
	}
	return o;
}

static json_t *time_text(uint64_t ns)
{
	char text[32];
	time_t seconds = (time_t)(ns / 1000000000u);
	struct tm tm;
	gmtime_r(&seconds, &tm);
	strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &tm);
	return json_string(text);
}

json_t *source_proof_json(const struct move *mv)
{
	const struct source_proof *p = mv->proof;
	if (!p)
		return json_null();
	json_t *disks = json_array();
	for (unsigned i = 0; i < mv->vm->def.ndisks; i++)
		if (mv->vm->disks[i].local && !source_is_shared(mv, i))
			json_array_append_new(disks, disk_json(mv, i));
	char seed[17];
	snprintf(seed, sizeof seed, "%016llx", (unsigned long long)p->seed);
	json_t *hosts = json_pack("{s:{s:s, s:s}, s:{s:s, s:s}}", "source", "name", mv->vm->cfg->name,
				  "certificate_sha256", p->own_certificate, "destination", "name",
				  mv->opt.peer, "certificate_sha256", p->peer_certificate);
	json_t *memory = json_pack("{s:s, s:b, s:I, s:I}", "algorithm", "XXH3-64", "every_frame_checked",
				   (int)p->ready, "pages", (json_int_t)mv->mem.sent_pages, "wire_bytes",
				   (json_int_t)mv->mem.wire_bytes);
	return json_pack("{s:b, s:s, s:b, s:I, s:o, s:o, s:o, s:o, s:o}", "agreed", (int)p->ready, "seed",
			 seed, "tls", !mv->opt.no_tls, "verify_ms", (json_int_t)p->took_ms, "started",
			 time_text(p->started_ns), "ended", time_text(clock_realtime_ns()), "hosts", hosts,
			 "disks", disks, "memory", memory);
}
