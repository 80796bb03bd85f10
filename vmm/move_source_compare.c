/* SPDX-License-Identifier: Apache-2.0 */
/* SNM_VERIFY=1: the guest stands still a little longer, until both sides agree on what it is made of. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "base/cleanup.h"
#include "base/log.h"
#include "memxfer/memory_hash.h"
#include "vmm/move_compare.h"
#include "vmm/move_source.h"

void source_compare_hello(struct move *mv, json_t *hello)
{
	const char *s = getenv("SNM_VERIFY");
	mv->compare = (struct source_compare){.wanted = s && !strcmp(s, "1")};
	if (mv->compare.wanted)
		json_object_set_new(hello, "verify", json_true());
}

int source_compare_accepted(const struct move *mv, const json_t *hello_ok, struct error *err)
{
	if (!mv->compare.wanted || json_is_true(json_object_get(hello_ok, "verify")))
		return 0;
	return error_set(err, EOPNOTSUPP, "SNM_VERIFY is set here, and %s does not know how to verify",
			 mv->opt.peer);
}

static int make_image(struct move *mv, const void *state, size_t len, struct move_image *im,
		      struct error *err)
{
	struct mem_space space = machine_memory_space(mv->vm->machine);
	int rc = move_image_init(im, space.npages, err);
	if (rc)
		return rc;
	if (mv->postcopy.later)
		move_image_skip(im, mv->postcopy.later);
	im->state_sum = XXH3_64bits(state, len);
	return mem_hash_chunks(&space, im->chunk_pages, im->skip, im->hashes, err);
}

static int wait_verdict(struct move *mv, struct error *err)
{
	struct frame f;
	int rc = move_link_wait(mv->link, 1u << FRAME_VERIFIED | 1u << FRAME_ABANDONED, 0, &f, err);
	if (rc)
		return rc;
	if (f.type == FRAME_ABANDONED) {
		const char *s = json_string_value(json_object_get(f.json, "reason"));
		struct error why = ERROR_INIT;
		rc = error_set(&why, EBADMSG, "%s: %s", mv->opt.peer, s ? s : "no reason given");
		/* and not that it closed the link after that */
		source_interrupt(mv, &why);
		error_copy(err, &why);
	} else {
		mv->compare.sections = (unsigned)json_integer_value(json_object_get(f.json, "sections"));
	}
	frame_release(&f);
	return rc;
}

int source_compare(struct move *mv, const void *state, size_t len, struct error *err)
{
	CLEANUP(move_image_release) struct move_image im = {0};
	int rc = make_image(mv, state, len, &im, err);
	CLEANUP_FREE uint8_t *raw = rc ? NULL : malloc(move_image_bytes(&im));
	if (!rc && !raw)
		rc = error_errno(err, ENOMEM, "verify");
	if (rc)
		return rc;
	move_image_encode(raw, &im);
	rc = move_link_send_bytes(mv->link, FRAME_VERIFY, raw, move_image_bytes(&im), err);
	if (!rc)
		rc = wait_verdict(mv, err);
	if (rc)
		return rc;
	mv->compare.chunks = im.nchunks;
	mv->compare.left_out = move_image_left_out(&im);
	log_info("move to %s: verified: %u pieces of memory (%u left out), %u sections of device state agree",
		 mv->opt.peer, im.nchunks, mv->compare.left_out, mv->compare.sections);
	return 0;
}

void source_compare_result(const struct move *mv, json_t *ev)
{
	const struct source_compare *c = &mv->compare;
	if (c->chunks)
		json_object_set_new(ev, "verified",
				    json_pack("{s:i, s:i, s:i}", "memory_pieces", (int)c->chunks, "left_out",
					      (int)c->left_out, "sections", (int)c->sections));
}
