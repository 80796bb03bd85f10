/* SPDX-License-Identifier: Apache-2.0 */
/* Tells the switches where the guest's addresses are now: at once, then four more times, spreading out. */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <time.h>

#include "base/cleanup.h"
#include "base/confine.h"
#include "base/log.h"
#include "vmm/machine_internal.h"
#include "vmm/virtio.h"

static const unsigned announce_at_ms[] = {0, 50, 150, 350, 750};

static void announce_all(struct machine *m)
{
	for (unsigned i = 0; i < m->cfg.nnets; i++) {
		int ret = net_announce_rarp(m->cfg.nets[i].tap_fd, m->cfg.nets[i].mac);
		if (ret < 0)
			log_warn("net %s: announce: %s", m->cfg.nets[i].id, strerror(-ret));
	}
}

static void *announce_main(void *arg)
{
	struct machine *m = arg;
	pthread_setname_np(pthread_self(), "announce");
	confine_self(CONFINE_DEVICE);
	struct timespec start;
	clock_gettime(CLOCK_MONOTONIC, &start);
	for (size_t i = 0; i < ARRAY_SIZE(announce_at_ms); i++) {
		struct timespec until = start;
		until.tv_nsec += (long)announce_at_ms[i] * 1000000;
		until.tv_sec += until.tv_nsec / 1000000000;
		until.tv_nsec %= 1000000000;
		{
			SCOPE_LOCK(&m->announce_lock);
			while (!m->announce_quit &&
			       pthread_cond_timedwait(&m->announce_cond, &m->announce_lock, &until) !=
				       ETIMEDOUT)
				;
			if (m->announce_quit)
				break;
		}
		announce_all(m);
	}
	return NULL;
}

void machine_announce(struct machine *m)
{
	if (!m->cfg.nnets)
		return;
	machine_announce_stop(m);
	m->announce_quit = false;
	sigset_t all, old;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	int ret = pthread_create(&m->announce_thread, NULL, announce_main, m);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	m->announcing = ret == 0;
	if (ret)
		announce_all(m);
}

void machine_announce_stop(struct machine *m)
{
	if (!m->announcing)
		return;
	{
		SCOPE_LOCK(&m->announce_lock);
		m->announce_quit = true;
		pthread_cond_broadcast(&m->announce_cond);
	}
	pthread_join(m->announce_thread, NULL);
	m->announcing = false;
}
