/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The move of a VM that is stopped (docs/handover.md, "Cold"): a snvmm without a machine holds record and
 * disks, and goes through the states of every move; there is no memory to send, nothing to pause and nothing
 * to resume.
 */
#include <errno.h>

#include "base/clock.h"
#include "vmm/move_source.h"

int source_cold_options(const struct vm *vm, const struct move_options *opt, struct error *err)
{
	const char *what = opt->suspend				? "--suspend"
			   : opt->postcopy == MOVE_POSTCOPY_NOW ? "--postcopy now"
			   : opt->mirror_buffered		? "--mirror buffered"
								: NULL;
	if (!what)
		return 0;
	return error_set(err, EINVAL, "VM %s is stopped: %s is for a guest that runs", vm->def.name, what);
}

/* SUMS, the device state that there is none of, and the destination's READY. */
static int agree(struct move *mv, struct error *err)
{
	if (!source_storage_consistent(mv) || !source_take_sums(mv))
		return error_set(err, EIO, "a disk fell behind at the last moment");
	int rc = source_shared_release(mv, err);
	if (!rc)
		rc = source_send_sums(mv, err);
	if (!rc)
		rc = move_link_send_bytes(mv->link, FRAME_DEVICE_STATE, NULL, 0, err);
	struct frame f;
	if (!rc)
		rc = move_link_wait(mv->link, 1u << FRAME_READY, mv->vm->cfg->silence_ms, &f, err);
	if (rc)
		return rc;
	frame_release(&f);
	source_proof_ready(mv);
	return 0;
}

int source_handover_cold(struct move *mv, struct error *err)
{
	int rc = source_phase_with_peer(mv, "memory", err);
	/* flushes at the destination, too; what a session that broke left is copied and compared again */
	if (!rc)
		rc = source_verify(mv, err);
	if (!rc)
		rc = source_phase_with_peer(mv, "prepare", err);
	mv->handover_begun |= !rc;
	if (!rc && mv->opt.rehearse) {
		mv->rehearsed = true;
		return error_set(err, ECANCELED, "the rehearsal is over");
	}
	if (!rc)
		rc = source_record_handing_over(mv, err);
	if (rc)
		return rc;
	source_set_phase(mv, MOVE_HANDOVER, "handover");
	return agree(mv, err);
}
