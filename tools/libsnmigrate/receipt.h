/* SPDX-License-Identifier: Apache-2.0 */
#ifndef LIBSNMIGRATE_RECEIPT_H
#define LIBSNMIGRATE_RECEIPT_H

#include <jansson.h>

#include "base/error.h"

/* The receipt of a move: what was proved of it, and what was not. */
struct receipt {
	char path[4096], temporary[4110];
	int fd; /* -1: none is wanted, or it is written */
};

#define RECEIPT_NONE ((struct receipt){.fd = -1})

/* Makes sure, before anything moves, that it can be written: creates a file beside it, mode 0600. */
int receipt_begin(struct receipt *r, const char *path, struct error *err);
/* Writes what the move's last line says; an earlier file of that name is replaced at once or not at all. */
int receipt_write(struct receipt *r, const json_t *end, struct error *err);
/* Leaves nothing behind if it was not written. */
void receipt_end(struct receipt *r);

#endif
