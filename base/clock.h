/* SPDX-License-Identifier: Apache-2.0 */
#ifndef BASE_CLOCK_H
#define BASE_CLOCK_H

#include <stdint.h>
#include <time.h>

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
/* For a timed wait until then. */
static inline struct timespec clock_timespec(uint64_t ns)
{
	return (struct timespec){.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};
}
/* CLOCK_REALTIME in ns. */
uint64_t clock_realtime_ns(void);
/* Sleeps; restarts after signals. */
void clock_sleep_ms(unsigned ms);

#endif
