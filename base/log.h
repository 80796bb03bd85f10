/* SPDX-License-Identifier: Apache-2.0 */
#ifndef BASE_LOG_H
#define BASE_LOG_H

#include <stdarg.h>

/*
 * Logging to stderr, one line a call, "TIME program[pid] level: message", written with one write(2) so that
 * lines of several processes do not mix. Thread-safe. The level comes from SNM_LOG (debug, info, warn, error;
 * default info).
 */
enum log_level { LOG_LEVEL_DEBUG, LOG_LEVEL_INFO, LOG_LEVEL_WARN, LOG_LEVEL_ERROR };

/* Call once from main. `name` is kept, not copied. */
void log_init(const char *name);
/* A further word in every line, e.g. the VM's name; copied, NULL removes. */
void log_set_subject(const char *subject);
/* The VM that this thread works for, where a sink tells it apart; copied, NULL removes. */
void log_set_vm(const char *name);
/* Messages go there instead of stderr: control characters are out, no time and no name in front. Call from
 * main before there are threads. `vm` is "" without one. */
void log_set_sink(void (*sink)(enum log_level level, const char *vm, const char *message));
void log_write(enum log_level level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#define log_debug(...) log_write(LOG_LEVEL_DEBUG, __VA_ARGS__)
#define log_info(...)  log_write(LOG_LEVEL_INFO, __VA_ARGS__)
#define log_warn(...)  log_write(LOG_LEVEL_WARN, __VA_ARGS__)
#define log_error(...) log_write(LOG_LEVEL_ERROR, __VA_ARGS__)

#endif
