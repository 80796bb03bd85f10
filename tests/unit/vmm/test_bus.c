/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <errno.h>
#include <string.h>

#include "tests/suite.h"
#include "vmm/bus.h"

struct probe {
	struct bus *bus;
	uint64_t offset;
	unsigned len, reads, writes;
	uint8_t data[8];
};

static void probe_read(void *opaque, uint64_t offset, uint8_t *data, unsigned len)
{
	struct probe *p = opaque;
	p->offset = offset;
	p->len = len;
	p->reads++;
	memset(data, 0x5a, len);
}

static void probe_write(void *opaque, uint64_t offset, const uint8_t *data, unsigned len)
{
	struct probe *p = opaque;
	p->offset = offset;
	p->len = len;
	p->writes++;
	memcpy(p->data, data, len);
}

static void moving_write(void *opaque, uint64_t offset, const uint8_t *data, unsigned len)
{
	struct probe *p = opaque;
	struct bus_handler h = {.read = probe_read, .write = moving_write, .opaque = p};
	bus_remove(p->bus, BUS_MMIO, 0x1000);
	ck_assert_int_eq(bus_add(p->bus, BUS_MMIO, 0x9000, 0x1000, &h, NULL), 0);
}

START_TEST(accesses_reach_their_range)
{
	struct bus *b = bus_create();
	struct probe p = {0};
	struct bus_handler h = {.read = probe_read, .write = probe_write, .opaque = &p};
	uint8_t data[8] = {1, 2, 3, 4};
	ck_assert_int_eq(bus_add(b, BUS_PIO, 0x3f8, 8, &h, NULL), 0);
	bus_read(b, BUS_PIO, 0x3ff, data, 1);
	ck_assert_uint_eq(data[0], 0x5a);
	ck_assert_uint_eq(p.offset, 7);
	bus_write(b, BUS_PIO, 0x3f8, data, 4);
	ck_assert_uint_eq(p.writes, 1);
	ck_assert_uint_eq(p.len, 4);
	ck_assert_mem_eq(p.data, data, 4);
	bus_read(b, BUS_MMIO, 0x3f8, data, 1); /* the other space */
	ck_assert_uint_eq(data[0], 0xff);
	bus_read(b, BUS_PIO, 0x3fe, data, 4); /* runs over the end */
	ck_assert_uint_eq(data[0], 0xff);
	bus_read(b, BUS_PIO, 0x400, data, 1);
	ck_assert_uint_eq(data[0], 0xff);
	bus_read(b, BUS_PIO, 0x3f7, data, 1);
	ck_assert_uint_eq(data[0], 0xff);
	ck_assert_uint_eq(p.reads, 1);
	bus_remove(b, BUS_PIO, 0x3f8);
	bus_write(b, BUS_PIO, 0x3f8, data, 1);
	ck_assert_uint_eq(p.writes, 1);
	bus_free(b);
}
END_TEST

START_TEST(overlaps_are_refused)
{
	struct bus *b = bus_create();
	struct bus_handler h = {0};
	ck_assert_int_eq(bus_add(b, BUS_MMIO, 0x1000, 0x1000, &h, NULL), 0);
	ck_assert_int_eq(bus_add(b, BUS_MMIO, 0x1fff, 1, &h, NULL), -EEXIST);
	ck_assert_int_eq(bus_add(b, BUS_MMIO, 0x800, 0x801, &h, NULL), -EEXIST);
	ck_assert_int_eq(bus_add(b, BUS_MMIO, 0x0, 0x10000, &h, NULL), -EEXIST);
	ck_assert_int_eq(bus_add(b, BUS_MMIO, 0x1000, 0x1000, &h, NULL), -EEXIST);
	ck_assert_int_eq(bus_add(b, BUS_MMIO, 0x800, 0x800, &h, NULL), 0);
	ck_assert_int_eq(bus_add(b, BUS_MMIO, 0x2000, 1, &h, NULL), 0);
	ck_assert_int_eq(bus_add(b, BUS_MMIO, UINT64_MAX, 2, &h, NULL), -EINVAL);
	ck_assert_int_eq(bus_add(b, BUS_MMIO, 0x5000, 0, &h, NULL), -EINVAL);
	for (uint64_t i = 0; i < 300; i++)
		ck_assert_int_eq(bus_add(b, BUS_MMIO, 0x100000 - i * 16, 16, &h, NULL), 0);
	bus_free(b);
}
END_TEST

START_TEST(a_handler_may_move_its_own_range)
{
	struct bus *b = bus_create();
	struct probe p = {.bus = b};
	struct bus_handler h = {.read = probe_read, .write = moving_write, .opaque = &p};
	uint8_t data[4] = {0};
	ck_assert_int_eq(bus_add(b, BUS_MMIO, 0x1000, 0x1000, &h, NULL), 0);
	bus_write(b, BUS_MMIO, 0x1004, data, 4);
	bus_read(b, BUS_MMIO, 0x1004, data, 4);
	ck_assert_uint_eq(data[0], 0xff);
	bus_read(b, BUS_MMIO, 0x9004, data, 4);
	ck_assert_uint_eq(data[0], 0x5a);
	bus_free(b);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("bus");
	TCase *t = tcase_create("bus");
	tcase_add_test(t, accesses_reach_their_range);
	tcase_add_test(t, overlaps_are_refused);
	tcase_add_test(t, a_handler_may_move_its_own_range);
	suite_add_tcase(s, t);
	return suite_run(s);
}
