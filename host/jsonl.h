/* SPDX-License-Identifier: Apache-2.0 */
/* interface: one JSON object a line over a Unix stream socket, with descriptors where needed */
#ifndef HOST_JSONL_H
#define HOST_JSONL_H

#include <jansson.h>
#include <stdbool.h>

#include "base/error.h"

#define JSONL_LINE_MAX_BYTES (4u << 20)

struct jsonl; /* one side of a connection; one reading and one writing thread at a time (writes are locked) */

/* Takes fd over. */
struct jsonl *jsonl_from_fd(int fd);
/* -ENOENT, -ECONNREFUSED... name the path. */
int jsonl_connect(const char *path, unsigned timeout_ms, struct jsonl **out, struct error *err);
/* Listening socket at path (mode 0600, a stale one is replaced). Longer paths than sun_path go through
 * /proc/self/fd. */
int jsonl_listen(const char *path, struct error *err);
void jsonl_close(struct jsonl *j);
int jsonl_fd(const struct jsonl *j);
/* True if a whole line is already buffered (do not poll then). */
bool jsonl_pending(const struct jsonl *j);
/* 0, -ENODATA at the orderly end, -ETIMEDOUT, -EPROTO (not a JSON object, too long). fd (may be NULL) gets a
 * descriptor that came along, or -1. timeout_ms 0 = for ever. */
int jsonl_read(struct jsonl *j, json_t **out, int *fd, unsigned timeout_ms, struct error *err);
/* Sends obj (not consumed) with an optional descriptor (-1 = none; stays the caller's). Never raises SIGPIPE;
 * bounded wait. */
int jsonl_write(struct jsonl *j, json_t *obj, int fd, struct error *err);
/* A JSON string of any bytes: what is not UTF-8 becomes '?'. For messages and paths. */
json_t *jsonl_text(const char *text);
/* {"ok":false,"exit":EXIT,"error":MESSAGE} */
int jsonl_write_error(struct jsonl *j, int exit_status, const struct error *e);
/* One request, one reply. An {"ok":false} reply becomes an error (err->message its sentence), *exit_status
 * its exit. */
int jsonl_call(struct jsonl *j, json_t *request, json_t **reply, int *exit_status, unsigned timeout_ms,
	       struct error *err);
/* Likewise, with a descriptor that may come with the reply, or -1 (also where the reply is an error). */
int jsonl_call_fd(struct jsonl *j, json_t *request, json_t **reply, int *fd, int *exit_status,
		  unsigned timeout_ms, struct error *err);

#endif
