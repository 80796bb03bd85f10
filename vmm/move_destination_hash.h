/* SPDX-License-Identifier: Apache-2.0 */
#ifndef VMM_MOVE_DESTINATION_HASH_H
#define VMM_MOVE_DESTINATION_HASH_H

#include "base/error.h"
#include "net/frame.h"

/*
 * The destination's part in the proof: a thread reads the disks again and answers HASH_ASK; what arrives
 * later on the disk channels is counted. docs/protocol.md, "Proof".
 */
struct arrival;
struct arrival_hash;

/* With the disks open, and what hello said of hashes. */
int arrival_hash_start(struct arrival *a, struct error *err);
void arrival_hash_open(struct arrival *a); /* from here on questions are answered */
/* FRAME_HASH_ASK, from the link's reading thread: queues it. */
int arrival_hash_ask(struct arrival *a, const struct frame *f, struct error *err);
/* For nbd_server_options of disk i: counts a change before the block has it. */
void *arrival_hash_witness(struct arrival *a, unsigned disk); /* NULL: nothing is counted */
void arrival_hash_observe(void *witness, uint64_t offset_bytes, uint64_t len_bytes, const void *data);
/* FRAME_SUMS: compares, and answers no further question. -EILSEQ naming disk and range. */
int arrival_hash_compare(struct arrival *a, const struct frame *f, struct error *err);
bool arrival_hash_agreed(const struct arrival *a);
/* Ends the thread; before the disks are closed. Idempotent. */
void arrival_hash_stop(struct arrival *a);
void arrival_hash_free(struct arrival *a); /* with no disk session left */

#endif
