/* SPDX-License-Identifier: Apache-2.0 */
#ifndef VMM_MOVE_SHARED_H
#define VMM_MOVE_SHARED_H

/*
 * A disk that both hosts see is proved to be one and the same file before a VM goes from one host to the
 * other without it. The source gives the very inode that its VM uses a second name, drawn at random, in the
 * same folder; the destination looks both names up in its own [shared] folders and demands that they are one
 * inode there. A copy of the folder has no such name; a copy with the same name of the image has another
 * inode. The image itself is neither read nor written for it. The name goes as soon as the destination has
 * answered.
 */

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"

#define MOVE_SHARED_PATH_BYTES	1024
#define MOVE_SHARED_NAME_PREFIX ".snmigrate-"
#define MOVE_SHARED_NAME_BYTES	48

struct move_shared {
	char path[MOVE_SHARED_PATH_BYTES]; /* of the image, relative to a shared folder; plain */
	char name[MOVE_SHARED_NAME_BYTES]; /* the second name, beside it */
	uint64_t bytes;
};

/* dirs: as [shared] path, separated by commas. -EXDEV: the image (an absolute path) is in none of them. Fills
 * path, and the folder of the shared ones. */
int move_shared_locate(const char *dirs, const char *image, char folder[MOVE_SHARED_PATH_BYTES],
		       struct move_shared *out, struct error *err);
/*
 * Removes what the image (an absolute path; that inode) has of such names: those of a process that was killed
 * before it could. Only whoever has the image's lock may, and before it gives it a name itself. Nothing
 * happens where the image is in none of the dirs.
 */
void move_shared_sweep(const char *dirs, const char *image, uint64_t device, uint64_t inode);
/* Gives the image its second name; it has to be that inode. Fills name and bytes. */
int move_shared_challenge(const char *folder, uint64_t device, uint64_t inode, struct move_shared *s,
			  struct error *err);
/* Takes it away again. May be called without one. */
void move_shared_withdraw(const char *folder, struct move_shared *s);
/* At the destination: the path there, and the inode that it is. -ENOENT with what was tried. */
int move_shared_find(const char *dirs, const struct move_shared *s, char path[MOVE_SHARED_PATH_BYTES],
		     uint64_t *device, uint64_t *inode, struct error *err);

json_t *move_shared_to_json(const struct move_shared *s);
/* A peer's word: -EPROTO. */
int move_shared_parse(json_t *o, struct move_shared *s, struct error *err);

#endif
