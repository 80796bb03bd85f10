/* SPDX-License-Identifier: Apache-2.0 */
#include "memxfer/idle_cpu.h"

#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#include "base/clock.h"

#define INTERVAL_NS    UINT64_C(250000000)
#define SPARE_FRACTION 20u

bool idle_cpu_parse(const char *text, uint64_t *idle, uint64_t *all)
{
	/* user nice system idle iowait irq softirq steal; what guests take is part of user */
	unsigned long long v[8];

	if (sscanf(text, "cpu %llu %llu %llu %llu %llu %llu %llu %llu", &v[0], &v[1], &v[2], &v[3], &v[4],
		   &v[5], &v[6], &v[7]) != 8)
		return false;
	*idle = v[3] + v[4];
	*all = 0;
	for (unsigned i = 0; i < 8; i++)
		*all += v[i];
	return true;
}

static bool read_times(const struct idle_cpu *c, uint64_t *idle, uint64_t *all)
{
	char text[256];
	ssize_t n = pread(c->fd, text, sizeof text - 1, 0);

	if (n <= 0)
		return false;
	text[n] = 0;
	return idle_cpu_parse(text, idle, all);
}

void idle_cpu_init(struct idle_cpu *c)
{
	c->fd = open("/proc/stat", O_RDONLY | O_CLOEXEC);
	atomic_init(&c->spare, true);
	atomic_init(&c->next_ns, clock_now_ns() + INTERVAL_NS);
	if (c->fd >= 0 && !read_times(c, &c->idle, &c->all)) {
		close(c->fd);
		c->fd = -1;
	}
}

void idle_cpu_release(struct idle_cpu *c)
{
	if (c->fd >= 0)
		close(c->fd);
	c->fd = -1;
}

bool idle_cpu_to_spare(struct idle_cpu *c)
{
	uint64_t due = atomic_load(&c->next_ns), now = clock_now_ns(), idle, all;

	if (c->fd < 0 || now < due || !atomic_compare_exchange_strong(&c->next_ns, &due, UINT64_MAX))
		return atomic_load_explicit(&c->spare, memory_order_relaxed);
	if (read_times(c, &idle, &all) && all > c->all) {
		atomic_store(&c->spare, (idle - c->idle) * SPARE_FRACTION >= all - c->all);
		c->idle = idle;
		c->all = all;
	}
	atomic_store(&c->next_ns, now + INTERVAL_NS);
	return atomic_load(&c->spare);
}
