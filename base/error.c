/* SPDX-License-Identifier: Apache-2.0 */
#include "base/error.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int error_set(struct error *err, int code, const char *fmt, ...)
{
	code = code ? -abs(code) : -EIO;
	if (err) {
		va_list ap;
		va_start(ap, fmt);
		vsnprintf(err->message, sizeof err->message, fmt, ap);
		va_end(ap);
		err->code = code;
	}
	return code;
}

int error_errno(struct error *err, int code, const char *fmt, ...)
{
	code = code ? -abs(code) : -EIO;
	if (err) {
		va_list ap;
		va_start(ap, fmt);
		int n = vsnprintf(err->message, sizeof err->message, fmt, ap);
		va_end(ap);
		if (n >= 0 && (size_t)n < sizeof err->message) {
			char buf[128];
			snprintf(err->message + n, sizeof err->message - (size_t)n, ": %s",
				 strerror_r(-code, buf, sizeof buf));
		}
		err->code = code;
	}
	return code;
}

int error_prefix(struct error *err, const char *fmt, ...)
{
	if (!err || !err->code)
		return -EIO;
	char old[ERROR_MESSAGE_BYTES];
	memcpy(old, err->message, sizeof old);
	va_list ap;
	va_start(ap, fmt);
	int n = vsnprintf(err->message, sizeof err->message, fmt, ap);
	va_end(ap);
	if (n >= 0 && (size_t)n < sizeof err->message)
		snprintf(err->message + n, sizeof err->message - (size_t)n, ": %s", old);
	return err->code;
}

void error_copy(struct error *dst, const struct error *src)
{
	if (dst && src)
		*dst = *src;
}
