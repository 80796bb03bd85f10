/* SPDX-License-Identifier: Apache-2.0 */
#ifndef BASE_CLOCK_H
#define BASE_CLOCK_H

#include <stdint.h>

/* CLOCK_MONOTONIC in ns, us, ms; any thread. */
uint64_t clock_now_ns(void);
static inline uint64_t clock_now_us(void)
{
	return clock_now_ns() / 1000;
}
static inline uint64_t clock_now_ms(void)
{
	return clock_now_ns() / 1000000;
}
/* CLOCK_REALTIME in ns. */
uint64_t clock_realtime_ns(void);
/* Sleeps; restarts after signals. */
void clock_sleep_ms(unsigned ms);

#endif
