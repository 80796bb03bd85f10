/* SPDX-License-Identifier: Apache-2.0 */
#include "memxfer/yield.h"

#include <sched.h>
#include <stdio.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/confine.h"

static bool way_back;
/* This thread's, once it may yield; else -1. */
static __thread int own_policy = -1;

static int set_policy(pid_t tid, int policy)
{
	struct sched_param none = {0};

	return sched_setscheduler(tid, policy, &none);
}

/* In a thread that may be lost: whoever has no CAP_SYS_NICE, nor a limit for it, would stay idle for ever. */
static void *try_way_back(void *arg)
{
	int own = sched_getscheduler(0);

	way_back = own >= 0 && set_policy(0, SCHED_IDLE) == 0 && set_policy(0, own) == 0;
	return arg;
}

static void find_way_back(void)
{
	pthread_t thread;

	if (pthread_create(&thread, NULL, try_way_back, NULL) == 0)
		pthread_join(thread, NULL);
}

void mem_yield_init(struct mem_yield *y)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, find_way_back); /* not by those that join: they may be confined */
	*y = (struct mem_yield){0};
	pthread_mutex_init(&y->lock, NULL);
}

void mem_yield_destroy(struct mem_yield *y)
{
	pthread_mutex_destroy(&y->lock);
}

/* Before it takes the lock: nobody who may not get a processor holds it, as the guest's pause would wait. */
static void come_back(void)
{
	if (own_policy >= 0)
		set_policy(0, own_policy);
}

void mem_stream_thread(struct mem_yield *y, const char *does, unsigned index)
{
	char name[16];

	mem_yield_join(y); /* first: what comes next takes a while */
	snprintf(name, sizeof name, "%s %u", does, index);
	pthread_setname_np(pthread_self(), name);
	confine_self(CONFINE_MEMORY);
}

void mem_yield_join(struct mem_yield *y)
{
	int own = sched_getscheduler(0);
	bool joined;

	if ((own != SCHED_OTHER && own != SCHED_BATCH) || !way_back)
		return;
	pthread_mutex_lock(&y->lock);
	joined = y->n < MEM_YIELD_THREADS_MAX;
	if (joined) {
		y->threads[y->n].tid = gettid();
		y->threads[y->n++].policy = own_policy = own;
	}
	pthread_mutex_unlock(&y->lock);
	if (!joined || !y->on)
		return;
	set_policy(0, SCHED_IDLE);
	sched_yield(); /* who waits already would do so until the next tick */
	/* Who ended it meanwhile may have been too early for this thread. */
	if (!y->on)
		come_back();
}

void mem_yield_leave(struct mem_yield *y)
{
	pid_t self = gettid();

	come_back();
	pthread_mutex_lock(&y->lock);
	for (unsigned i = 0; i < y->n; i++)
		if (y->threads[i].tid == self)
			y->threads[i] = y->threads[--y->n];
	pthread_mutex_unlock(&y->lock);
	own_policy = -1;
}

void mem_yield_begin(struct mem_yield *y)
{
	uint64_t now = clock_now_ns();

	pthread_mutex_lock(&y->lock);
	if (!y->until_ns)
		y->until_ns = now + MEM_YIELD_MS * UINT64_C(1000000);
	if (now < y->until_ns) {
		y->on = true;
		for (unsigned i = 0; i < y->n; i++)
			set_policy(y->threads[i].tid, SCHED_IDLE);
	}
	pthread_mutex_unlock(&y->lock);
}

void mem_yield_end(struct mem_yield *y)
{
	if (!y->on)
		return;
	come_back();
	pthread_mutex_lock(&y->lock);
	y->on = false;
	for (unsigned i = 0; i < y->n; i++)
		set_policy(y->threads[i].tid, y->threads[i].policy);
	pthread_mutex_unlock(&y->lock);
}

void mem_yield_look(struct mem_yield *y)
{
	if (y->on && clock_now_ns() >= y->until_ns)
		mem_yield_end(y);
}

void mem_yield_step(struct mem_yield *y)
{
	mem_yield_look(y);
	if (y->on)
		sched_yield();
}
