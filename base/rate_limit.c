/* SPDX-License-Identifier: Apache-2.0 */
#include "base/rate_limit.h"

#include "base/cleanup.h"
#include "base/clock.h"

/* What an idle sender may catch up on: a late wake-up must not cost bandwidth. */
#define CREDIT_NS     UINT64_C(50000000)
#define URGENT_MAX_NS UINT64_C(500000000)

void rate_limit_init(struct rate_limit *rl, uint64_t bytes_per_s)
{
	*rl = (struct rate_limit){.bytes_per_s = bytes_per_s};
	pthread_mutex_init(&rl->lock, NULL);
}

void rate_limit_destroy(struct rate_limit *rl)
{
	pthread_mutex_destroy(&rl->lock);
}

static uint64_t cost_ns(const struct rate_limit *rl, uint64_t bytes)
{
	return (uint64_t)((unsigned __int128)bytes * 1000000000u / rl->bytes_per_s);
}

void rate_limit_set(struct rate_limit *rl, uint64_t bytes_per_s)
{
	SCOPE_LOCK(&rl->lock);
	uint64_t now = clock_now_ns();
	uint64_t debt =
		rl->bytes_per_s && rl->free_ns > now
			? (uint64_t)((unsigned __int128)(rl->free_ns - now) * rl->bytes_per_s / 1000000000u)
			: 0;
	rl->bytes_per_s = bytes_per_s;
	rl->free_ns = bytes_per_s ? now + cost_ns(rl, debt) : 0;
}

uint64_t rate_limit_get(struct rate_limit *rl)
{
	SCOPE_LOCK(&rl->lock);
	return rl->bytes_per_s;
}

uint64_t rate_limit_wait_ns(struct rate_limit *rl)
{
	if (!rl)
		return 0;
	SCOPE_LOCK(&rl->lock);
	uint64_t now = clock_now_ns();
	return rl->bytes_per_s && rl->free_ns > now ? rl->free_ns - now : 0;
}

static void take(struct rate_limit *rl, uint64_t bytes, uint64_t most_ns)
{
	if (!rl)
		return;
	SCOPE_LOCK(&rl->lock);
	if (!rl->bytes_per_s)
		return;
	uint64_t now = clock_now_ns(), former = rl->free_ns;
	if (rl->free_ns + CREDIT_NS < now)
		rl->free_ns = now - CREDIT_NS;
	rl->free_ns += cost_ns(rl, bytes);
	if (most_ns && rl->free_ns > now + most_ns)
		rl->free_ns = former > now + most_ns ? former : now + most_ns;
}

void rate_limit_take(struct rate_limit *rl, uint64_t bytes)
{
	take(rl, bytes, 0);
}

void rate_limit_take_urgent(struct rate_limit *rl, uint64_t bytes)
{
	take(rl, bytes, URGENT_MAX_NS);
}
