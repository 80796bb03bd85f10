/* SPDX-License-Identifier: Apache-2.0 */
#include "base/log.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const char *program = "snmigrate";
static char subject_text[80];
static enum log_level threshold = LOG_LEVEL_INFO;
static void (*sink_fn)(enum log_level level, const char *vm, const char *message);
static _Thread_local char vm_text[80];
static const char *const level_names[] = {"debug", "info", "warning", "error"};

void log_init(const char *name)
{
	program = name;
	const char *want = getenv("SNM_LOG");
	if (!want)
		return;
	if (!strcmp(want, "debug"))
		threshold = LOG_LEVEL_DEBUG;
	else if (!strcmp(want, "info"))
		threshold = LOG_LEVEL_INFO;
	else if (!strcmp(want, "warn"))
		threshold = LOG_LEVEL_WARN;
	else if (!strcmp(want, "error"))
		threshold = LOG_LEVEL_ERROR;
}

void log_set_subject(const char *subject)
{
	snprintf(subject_text, sizeof subject_text, "%s%s", subject ? " " : "", subject ? subject : "");
}

void log_set_vm(const char *name)
{
	snprintf(vm_text, sizeof vm_text, "%s", name ? name : "");
}

void log_set_sink(void (*sink)(enum log_level level, const char *vm, const char *message))
{
	sink_fn = sink;
}

void log_write(enum log_level level, const char *fmt, ...)
{
	if (level < threshold)
		return;
	int saved_errno = errno;
	char line[1024];
	struct timespec now;
	struct tm tm;
	clock_gettime(CLOCK_REALTIME, &now);
	gmtime_r(&now.tv_sec, &tm);
	size_t n = strftime(line, sizeof line, "%H:%M:%S", &tm);
	n += (size_t)snprintf(line + n, sizeof line - n, ".%03ld %s[%d]%s %s: ", now.tv_nsec / 1000000,
			      program, (int)getpid(), subject_text, level_names[level]);
	va_list ap;
	va_start(ap, fmt);
	size_t head = n;
	int m = vsnprintf(line + n, sizeof line - n, fmt, ap);
	va_end(ap);
	if (m > 0)
		n += (size_t)m;
	if (n > sizeof line - 2)
		n = sizeof line - 2;
	/* Peers' words end up in messages: a terminal must not be steered by them. */
	for (size_t i = 0; i < n; i++)
		if ((unsigned char)line[i] < 0x20 || line[i] == 0x7f)
			line[i] = ' ';
	if (sink_fn) {
		line[n] = '\0';
		sink_fn(level, vm_text, line + head);
		errno = saved_errno;
		return;
	}
	line[n++] = '\n';
	if (write(STDERR_FILENO, line, n) < 0)
		errno = saved_errno;
	errno = saved_errno;
}
