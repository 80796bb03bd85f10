/* SPDX-License-Identifier: Apache-2.0 */
/* Private to block. */
#ifndef BLOCK_IMAGE_H
#define BLOCK_IMAGE_H

#include "base/error.h"
#include "block/qcow2_header.h"

/* qemu-img check on an image that nobody writes, without what is below it, bounded in time. -EINVAL with the
 * reason if it is truncated or corrupt; leaked clusters are fine. */
int block_qcow2_check(int fd, bool is_device, struct qcow2_header *head, struct error *err);

#endif
