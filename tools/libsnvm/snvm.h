/* SPDX-License-Identifier: Apache-2.0 */
#ifndef TOOLS_SNVM_H
#define TOOLS_SNVM_H

#include <stdbool.h>

/* One function a subcommand; argv[0] is its name. They return the exit status. */
struct snvm {
	const char *control; /* --control, or NULL */
};

int snvm_create(const struct snvm *s, int argc, char **argv);
int snvm_list(const struct snvm *s, int argc, char **argv);
int snvm_info(const struct snvm *s, int argc, char **argv);
int snvm_start(const struct snvm *s, int argc, char **argv);
int snvm_stop(const struct snvm *s, int argc, char **argv);
int snvm_pause(const struct snvm *s, int argc, char **argv);
int snvm_resume(const struct snvm *s, int argc, char **argv);
int snvm_delete(const struct snvm *s, int argc, char **argv);
int snvm_set(const struct snvm *s, int argc, char **argv);
int snvm_balloon(const struct snvm *s, int argc, char **argv);
int snvm_console(const struct snvm *s, int argc, char **argv);

/* "snvm: message" and exit status 2. */
int snvm_usage_error(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* The only positional argument of a subcommand that takes one; NULL after a message. */
const char *snvm_one_name(int argc, char **argv, int optind_now);

#endif
