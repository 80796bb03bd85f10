/* SPDX-License-Identifier: Apache-2.0 */
#ifndef HOST_PAIR_CODES_H
#define HOST_PAIR_CODES_H

#include <pthread.h>

#include "host/pair.h"

/*
 * The codes that this daemon has printed. In memory alone: a daemon that is restarted knows none, so a code
 * is never good for longer than its daemon lives. Times are of CLOCK_BOOTTIME, in milliseconds, and the
 * caller's: a host that sleeps does not make its codes last.
 */
#define PAIR_CODES_MAX	      8
#define PAIR_CODE_VALID_S     600
#define PAIR_CODE_VALID_MAX_S 3600
#define PAIR_WRONG_TRIES_MAX  5
/* So long it is still said why a code is no longer good, to who knows it. */
#define PAIR_REMEMBERED_MS (10 * 60000u)

enum pair_code_state { PAIR_FREE, PAIR_OPEN, PAIR_USED, PAIR_VOID };

struct pair_codes {
	pthread_mutex_t lock;
	struct pair_code_entry {
		enum pair_code_state state;
		struct pair_code code;
		uint64_t valid_until_ms;
		unsigned wrong; /* tries while it was open */
		char used_by[HOST_NAME_MAX_CHARS + 1];
	} entries[PAIR_CODES_MAX];
};

void pair_codes_init(struct pair_codes *codes);
uint64_t pair_codes_now_ms(void);
/* -ENOSPC when there are so many open ones. */
int pair_codes_make(struct pair_codes *codes, const char *listener_sha256, unsigned valid_s, uint64_t now_ms,
		    struct pair_code *out, struct error *err);
/* Whether anybody need be listened to: a code is open, or was until lately. */
bool pair_codes_any(struct pair_codes *codes, uint64_t now_ms);
/*
 * Whether the proof is that of a code that is good now; `accept` then stores the other host, under the lock,
 * and the code is used up if it could: it counts once. A wrong one counts against every open code. *reply
 * gets the proof. -EACCES wrong, -EKEYEXPIRED too late, -EALREADY used, -EPERM void; or what accept said.
 */
int pair_codes_redeem(struct pair_codes *codes, const struct pair_binding *binding,
		      const struct pair_hello *hello, uint64_t now_ms,
		      int (*accept)(void *opaque, const struct pair_hello *hello, struct error *err),
		      void *opaque, struct pair_reply *reply, struct error *err);

#endif
