/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MEMXFER_IDLE_CPU_H
#define MEMXFER_IDLE_CPU_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* Whether this host has processor time to spare, looked at a few times a second by whoever asks first. */
struct idle_cpu {
	int fd;			  /* /proc/stat; -1: unknown, which counts as time to spare */
	_Atomic uint64_t next_ns; /* of the next look; UINT64_MAX while somebody looks */
	uint64_t idle, all;	  /* jiffies at the last one; the looker's */
	atomic_bool spare;
};

void idle_cpu_init(struct idle_cpu *c);
void idle_cpu_release(struct idle_cpu *c);
/* Any thread. Host without a processor idle for a twentieth of the time since the last look: false. */
bool idle_cpu_to_spare(struct idle_cpu *c);
/* The first line of /proc/stat: jiffies idle, and all of them. Pure. */
bool idle_cpu_parse(const char *text, uint64_t *idle, uint64_t *all);

#endif
