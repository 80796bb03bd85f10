/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/bus.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"

struct range {
	uint64_t base, len;
	struct bus_handler handler;
};

struct space {
	struct range *ranges; /* sorted by base */
	size_t n, cap;
};

struct bus {
	/* Held for the look-up only, never while a handler runs: a handler may add and remove ranges. A
	 * handler can therefore still run for a moment after bus_remove returned; devices outlive the vCPU
	 * threads. */
	pthread_rwlock_t lock;
	struct space space[2];
};

struct bus *bus_create(void)
{
	struct bus *bus = calloc(1, sizeof *bus);
	if (bus)
		pthread_rwlock_init(&bus->lock, NULL);
	return bus;
}

void bus_free(struct bus *bus)
{
	if (!bus)
		return;
	free(bus->space[0].ranges);
	free(bus->space[1].ranges);
	pthread_rwlock_destroy(&bus->lock);
	free(bus);
}

/* Index of the first range with base > addr. */
static size_t upper(const struct space *s, uint64_t addr)
{
	size_t lo = 0, hi = s->n;
	while (lo < hi) {
		size_t mid = lo + (hi - lo) / 2;
		if (s->ranges[mid].base <= addr)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo;
}

int bus_add(struct bus *bus, enum bus_space space, uint64_t base, uint64_t len, const struct bus_handler *h,
	    struct error *err)
{
	const char *kind = space == BUS_PIO ? "I/O port" : "MMIO";
	if (!len || base + len - 1 < base)
		return error_set(err, EINVAL, "%s range at 0x%llx: bad length", kind,
				 (unsigned long long)base);
	int ret = 0;
	pthread_rwlock_wrlock(&bus->lock);
	struct space *s = &bus->space[space];
	size_t at = upper(s, base);
	if ((at > 0 && base - s->ranges[at - 1].base < s->ranges[at - 1].len) ||
	    (at < s->n && s->ranges[at].base - base < len)) {
		ret = -EEXIST;
	} else {
		if (s->n == s->cap) {
			size_t cap = s->cap ? s->cap * 2 : 32;
			struct range *p = realloc(s->ranges, cap * sizeof *p);
			if (p) {
				s->ranges = p;
				s->cap = cap;
			} else {
				ret = -ENOMEM;
			}
		}
		if (!ret) {
			memmove(s->ranges + at + 1, s->ranges + at, (s->n - at) * sizeof *s->ranges);
			s->ranges[at] = (struct range){.base = base, .len = len, .handler = *h};
			s->n++;
		}
	}
	pthread_rwlock_unlock(&bus->lock);
	if (ret == -EEXIST)
		return error_set(err, EEXIST, "%s range 0x%llx+0x%llx overlaps another", kind,
				 (unsigned long long)base, (unsigned long long)len);
	return ret ? error_errno(err, ret, "%s range at 0x%llx", kind, (unsigned long long)base) : 0;
}

void bus_remove(struct bus *bus, enum bus_space space, uint64_t base)
{
	pthread_rwlock_wrlock(&bus->lock);
	struct space *s = &bus->space[space];
	size_t at = upper(s, base);
	if (at > 0 && s->ranges[at - 1].base == base) {
		memmove(s->ranges + at - 1, s->ranges + at, (s->n - at) * sizeof *s->ranges);
		s->n--;
	}
	pthread_rwlock_unlock(&bus->lock);
}

static bool find(struct bus *bus, enum bus_space space, uint64_t addr, unsigned len, struct bus_handler *h,
		 uint64_t *offset)
{
	bool found = false;
	pthread_rwlock_rdlock(&bus->lock);
	const struct space *s = &bus->space[space];
	size_t at = upper(s, addr);
	if (at > 0 && range_fits(addr - s->ranges[at - 1].base, len, s->ranges[at - 1].len)) {
		*h = s->ranges[at - 1].handler;
		*offset = addr - s->ranges[at - 1].base;
		found = true;
	}
	pthread_rwlock_unlock(&bus->lock);
	return found;
}

void bus_read(struct bus *bus, enum bus_space space, uint64_t addr, uint8_t *data, unsigned len)
{
	struct bus_handler h;
	uint64_t offset;
	memset(data, 0xff, len);
	if (find(bus, space, addr, len, &h, &offset) && h.read)
		h.read(h.opaque, offset, data, len);
}

void bus_write(struct bus *bus, enum bus_space space, uint64_t addr, const uint8_t *data, unsigned len)
{
	struct bus_handler h;
	uint64_t offset;
	if (find(bus, space, addr, len, &h, &offset) && h.write)
		h.write(h.opaque, offset, data, len);
}
