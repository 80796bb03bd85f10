/* SPDX-License-Identifier: Apache-2.0 */
/* interface: port and memory-mapped I/O dispatch */
#ifndef VMM_BUS_H
#define VMM_BUS_H

#include <stdint.h>

#include "base/error.h"

struct bus;
enum bus_space { BUS_PIO, BUS_MMIO };

/* Called on the vCPU thread that exited; several vCPUs may call at once: the device locks. offset is relative
 * to the range, len is 1, 2, 4 or 8; data is little-endian in *data for len bytes. Must not block for I/O. */
struct bus_handler {
	void (*read)(void *opaque, uint64_t offset, uint8_t *data, unsigned len);
	void (*write)(void *opaque, uint64_t offset, const uint8_t *data, unsigned len);
	void *opaque;
};

struct bus *bus_create(void);
void bus_free(struct bus *bus);
/* -EEXIST on overlap. Any thread, also from inside a handler (dispatch holds no lock that this takes). */
int bus_add(struct bus *bus, enum bus_space space, uint64_t base, uint64_t len, const struct bus_handler *h,
	    struct error *err);
void bus_remove(struct bus *bus, enum bus_space space, uint64_t base);
/* Reads of nothing give all ones, writes vanish. */
void bus_read(struct bus *bus, enum bus_space space, uint64_t addr, uint8_t *data, unsigned len);
void bus_write(struct bus *bus, enum bus_space space, uint64_t addr, const uint8_t *data, unsigned len);

#endif
