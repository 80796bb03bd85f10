/* SPDX-License-Identifier: Apache-2.0 */
/* Private to block. */
#ifndef BLOCK_QCOW2_H
#define BLOCK_QCOW2_H

#include "block/open.h"

/* As block_open, which calls it. */
int qcow2_open(const char *path, const struct block_open_options *opt, struct block **out, struct error *err);

#endif
