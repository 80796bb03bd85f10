/* SPDX-License-Identifier: Apache-2.0 */
/* VERIFY at the destination: whether what is here is what the source says that it sent. */
#include <errno.h>
#include <stdlib.h>
#include <xxhash.h>

#include "base/cleanup.h"
#include "base/fault.h"
#include "base/log.h"
#include "memxfer/memory_hash.h"
#include "vmm/bus.h"
#include "vmm/move_compare.h"
#include "vmm/move_destination.h"

#define SERIAL_SCRATCH 0x3ff /* a register that no device acts on */

void arrival_compare_keep(struct arrival *a, struct frame *state)
{
	if (!a->verify)
		return;
	frame_release(&a->state);
	a->state = *state;
	*state = (struct frame){0};
}

/* For the tests of the comparison itself. */
static void spoil(struct arrival *a, const struct mem_space *space)
{
	if (fault_point("d-flip-memory"))
		space->base[space->npages / 2 * MEM_PAGE_BYTES + 123] ^= 1;
	if (fault_point("d-flip-device")) {
		uint8_t v;
		bus_read(machine_bus(a->vm->machine), BUS_PIO, SERIAL_SCRATCH, &v, 1);
		v ^= 1;
		bus_write(machine_bus(a->vm->machine), BUS_PIO, SERIAL_SCRATCH, &v, 1);
	}
}

static int compare_memory(struct arrival *a, const struct frame *verify, struct move_image *ours,
			  struct move_image *theirs, struct error *err)
{
	struct mem_space space = machine_memory_space(a->vm->machine);
	int rc = move_image_init(ours, space.npages, err);
	if (!rc)
		rc = move_image_init(theirs, space.npages, err);
	if (!rc)
		rc = move_image_decode(verify->payload, verify->len, theirs, err);
	if (rc)
		return rc;
	/* What is missing there is a hole here, which is not touched. */
	if (a->later)
		move_image_skip(ours, a->later);
	for (uint32_t i = 0; i < (ours->nchunks + 63) / 64; i++)
		if (ours->skip[i] != theirs->skip[i])
			return error_set(err, EPROTO,
					 "verify: the pages that come later are not those left out");
	spoil(a, &space);
	rc = mem_hash_chunks(&space, ours->chunk_pages, ours->skip, ours->hashes, err);
	return rc ? rc : move_image_differ(ours, theirs, err);
}

static int compare_state(struct arrival *a, const struct move_image *theirs, unsigned *nsections,
			 struct error *err)
{
	if (XXH3_64bits(a->state.payload, a->state.len) != theirs->state_sum)
		return error_set(err, EBADMSG, "device state: %u bytes came that are not those sent",
				 a->state.len);
	return machine_compare(a->vm->machine, a->state.payload, a->state.len, nsections, err);
}

int arrival_compare(struct arrival *a, const struct frame *verify, struct error *err)
{
	CLEANUP(move_image_release) struct move_image ours = {0}, theirs = {0};
	unsigned nsections = 0;
	if (!a->verify || a->stage != ARRIVAL_LOADED || !a->state.payload)
		return error_set(err, EPROTO, "verify out of turn");
	int rc = compare_memory(a, verify, &ours, &theirs, err);
	if (!rc)
		rc = compare_state(a, &theirs, &nsections, err);
	frame_release(&a->state);
	if (rc)
		return error_prefix(err, "verify");
	log_info("verified: %u pieces of memory (%u left out), %u sections of device state agree",
		 ours.nchunks, move_image_left_out(&ours), nsections);
	json_t *o = json_pack("{s:i}", "sections", (int)nsections);
	rc = move_link_send(a->link, FRAME_VERIFIED, o, err);
	json_decref(o);
	return rc;
}
