/* SPDX-License-Identifier: Apache-2.0 */
#ifndef BASE_ERROR_H
#define BASE_ERROR_H

#include <stdarg.h>
#include <stdbool.h>

/*
 * The one error contract: a function that can fail returns 0 (or a count) on success and a negative errno on
 * failure, and fills the caller's struct error with a message whose context grows on the way up:
 * "disk root: write at 4096: No space left on device".
 *
 * `err` may be NULL everywhere; the code is then all the caller learns. Plain data, no clean-up needed; not
 * shared between threads.
 */
#define ERROR_MESSAGE_BYTES 512

struct error {
	int code; /* negative errno, 0 when no error was set */
	char message[ERROR_MESSAGE_BYTES];
};

#define ERROR_INIT ((struct error){0})

/* Sets the message to the format alone. `code` may be positive or negative errno. Returns -abs(code). */
int error_set(struct error *err, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* As error_set, followed by ": strerror(code)". Returns -abs(code). */
int error_errno(struct error *err, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* Puts "context: " before the message already there. Returns err->code (or -EIO if err is NULL or unset). */
int error_prefix(struct error *err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Copies src over dst when both exist. */
void error_copy(struct error *dst, const struct error *src);
static inline bool error_is_set(const struct error *err)
{
	return err && err->code != 0;
}

#endif
