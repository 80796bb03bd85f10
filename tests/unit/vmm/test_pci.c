/* SPDX-License-Identifier: Apache-2.0 */
/* Configuration space, BARs and MSI-X, with a real interrupt router of a KVM VM without vCPUs. */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "base/bytes.h"
#include "tests/suite.h"
#include "vmm/irq_router.h"
#include "vmm/pci_bus.h"

static int kvm = -1, vm = -1;
static struct bus *bus;
static struct irq_router *irq;
static struct pci_bus *pci;
static unsigned resets, mapped_calls;
static uint64_t mapped_at;
static uint32_t touched;

static void bar_read(void *opaque, uint64_t offset, uint8_t *data, unsigned len)
{
	memset(data, 0xab, len);
}

static void bar_write(void *opaque, uint64_t offset, const uint8_t *data, unsigned len)
{
	touched = (uint32_t)offset;
}

static void bar_mapped(void *opaque, uint64_t base, bool is)
{
	mapped_calls++;
	mapped_at = is ? base : 0;
}

static void on_reset(void *opaque)
{
	resets++;
}

static void setup(void)
{
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	ck_assert_int_ge(vm, 0);
	ck_assert_int_eq(ioctl(vm, KVM_CREATE_IRQCHIP, 0), 0);
	bus = bus_create();
	ck_assert_int_eq(irq_router_create(vm, &irq, NULL), 0);
	ck_assert_int_eq(pci_bus_create(bus, irq, &pci, NULL), 0);
	resets = mapped_calls = touched = 0;
	mapped_at = 0;
}

static void teardown(void)
{
	pci_bus_free(pci);
	irq_router_free(irq);
	bus_free(bus);
	close(vm);
	close(kvm);
}

static uint32_t port_get(unsigned slot, unsigned reg, unsigned len)
{
	uint8_t a[4], d[4] = {0};
	put_le32(a, 0x80000000u | slot << 11 | (reg & 0xfc));
	bus_write(bus, BUS_PIO, 0xcf8, a, 4);
	bus_read(bus, BUS_PIO, 0xcfc + (reg & 3), d, len);
	return get_le32(d);
}

static void port_set(unsigned slot, unsigned reg, uint32_t v, unsigned len)
{
	uint8_t a[4], d[4];
	put_le32(a, 0x80000000u | slot << 11 | (reg & 0xfc));
	put_le32(d, v);
	bus_write(bus, BUS_PIO, 0xcf8, a, 4);
	bus_write(bus, BUS_PIO, 0xcfc + (reg & 3), d, len);
}

static uint32_t ecam_get(unsigned slot, unsigned reg, unsigned len)
{
	uint8_t d[4] = {0};
	bus_read(bus, BUS_MMIO, PCI_ECAM_BASE + (slot << 15) + reg, d, len);
	return get_le32(d);
}

static uint32_t mmio_get(uint64_t at)
{
	uint8_t d[4];
	bus_read(bus, BUS_MMIO, at, d, 4);
	return get_le32(d);
}

static void mmio_set(uint64_t at, uint32_t v)
{
	uint8_t d[4];
	put_le32(d, v);
	bus_write(bus, BUS_MMIO, at, d, 4);
}

static struct pci_device *add(unsigned slot)
{
	struct pci_device_config cfg = {
		.slot = (uint8_t)slot,
		.vendor_id = 0x1af4,
		.device_id = 0x1042,
		.class_code = 1,
		.msix_bar = 1,
		.msix_vectors = 3,
	};
	cfg.bar[0].size_bytes = 0x4000;
	cfg.bar[0].handler = (struct bus_handler){.read = bar_read, .write = bar_write};
	cfg.bar[0].mapped = bar_mapped;
	struct pci_device *d = NULL;
	ck_assert_int_eq(pci_device_create(pci, &cfg, &d, NULL), 0);
	return d;
}

START_TEST(both_ways_see_the_same)
{
	struct pci_device *d = add(3);
	ck_assert_uint_eq(port_get(0, 0, 4), 0x0d578086);
	ck_assert_uint_eq(port_get(3, 0, 4), 0x10421af4);
	ck_assert_uint_eq(ecam_get(3, 0, 4), 0x10421af4);
	ck_assert_uint_eq(port_get(3, 2, 2), 0x1042);
	ck_assert_uint_eq(ecam_get(3, 3, 1), 0x10);
	ck_assert_uint_eq(port_get(4, 0, 4), 0xffffffff);
	ck_assert_uint_eq(ecam_get(4, 0, 4), 0xffffffff);
	ck_assert_uint_eq(ecam_get(3, 0x100, 4), 0); /* no extended capabilities */
	uint8_t v[4] = {0};
	bus_read(bus, BUS_MMIO, PCI_ECAM_BASE + (3 << 15) + (1 << 12), v, 4); /* function 1 */
	ck_assert_uint_eq(get_le32(v), 0xffffffff);
	pci_device_destroy(d);
	ck_assert_uint_eq(port_get(3, 0, 4), 0xffffffff);
}
END_TEST

START_TEST(read_only_registers_stay)
{
	struct pci_device *d = add(3);
	port_set(3, 0, 0, 4);
	port_set(3, 8, 0xffffffff, 4);
	port_set(3, 0x34, 0xff, 1);
	ck_assert_uint_eq(port_get(3, 0, 4), 0x10421af4);
	ck_assert_uint_eq(port_get(3, 8, 4), 0x01000000);
	port_set(3, 4, 0xffff, 2);
	ck_assert_uint_eq(port_get(3, 4, 2), 0x406);
	ck_assert(pci_bus_master(d));
	port_set(3, 4, 0, 1);
	ck_assert(!pci_bus_master(d));
	pci_device_destroy(d);
}
END_TEST

START_TEST(bars_are_sized_moved_and_switched)
{
	struct pci_device *d = add(3);
	uint32_t base = port_get(3, 0x10, 4);
	ck_assert_uint_ge(base, 0xc0000000);
	ck_assert_uint_eq(base % 0x4000, 0);
	ck_assert_uint_eq(mmio_get(base), 0xffffffff); /* decoding is off */
	port_set(3, 0x10, 0xffffffff, 4);
	ck_assert_uint_eq(port_get(3, 0x10, 4), 0xffffc000);
	ck_assert_uint_eq(mapped_calls, 0);
	port_set(3, 0x18, 0xffffffff, 4);
	ck_assert_uint_eq(port_get(3, 0x18, 4), 0); /* there is none */
	port_set(3, 0x10, base, 4);
	port_set(3, 4, 2, 2);
	ck_assert_uint_eq(mapped_at, base);
	ck_assert_uint_eq(mmio_get(base), 0xabababab);
	mmio_set(base + 0x123c, 1);
	ck_assert_uint_eq(touched, 0x123c);

	port_set(3, 0x10, 0xd0000000, 4);
	ck_assert_uint_eq(mapped_at, 0xd0000000);
	ck_assert_uint_eq(mmio_get(base), 0xffffffff);
	ck_assert_uint_eq(mmio_get(0xd0000000), 0xabababab);
	port_set(3, 0x10, 0x1000000, 4); /* into RAM: not ours to map */
	ck_assert_uint_eq(mapped_at, 0);
	port_set(3, 0x10, (uint32_t)PCI_ECAM_BASE, 4); /* over the configuration space */
	ck_assert_uint_eq(mapped_at, 0);
	ck_assert_uint_eq(ecam_get(3, 0, 4), 0x10421af4);
	port_set(3, 0x10, 0xd0000000, 4);
	ck_assert_uint_eq(mapped_at, 0xd0000000);
	port_set(3, 4, 0, 2);
	ck_assert_uint_eq(mapped_at, 0);
	pci_device_reset(d);
	ck_assert_uint_eq(port_get(3, 0x10, 4), base);
	pci_device_destroy(d);
}
END_TEST

static uint32_t msix_setup(unsigned slot)
{
	port_set(slot, 4, 6, 2);
	uint32_t at = port_get(slot, 0x34, 1);
	ck_assert_uint_eq(port_get(slot, at, 1), 0x11);
	ck_assert_uint_eq(port_get(slot, at + 2, 2), 2); /* three vectors */
	ck_assert_uint_eq(port_get(slot, at + 4, 4), 1); /* table: BAR 1, offset 0 */
	ck_assert_uint_eq(port_get(slot, at + 8, 4), 0x1001);
	return at;
}

START_TEST(msix_masks_and_remembers)
{
	struct pci_device *d = add(3);
	uint32_t cap = msix_setup(3), table = port_get(3, 0x14, 4);
	ck_assert_uint_eq(mmio_get(table + 12), 1); /* masked at power-on */
	pci_msix_trigger(d, 0);			    /* off: nothing */
	ck_assert_uint_eq(mmio_get(table + 0x1000), 0);
	port_set(3, cap + 2, 0x8000, 2);
	ck_assert(pci_msix_enabled(d));
	mmio_set(table + 16, 0xfee00000);
	mmio_set(table + 24, 0x41);
	pci_msix_trigger(d, 1);
	pci_msix_trigger(d, 7); /* there is none */
	ck_assert_uint_eq(mmio_get(table + 0x1000), 2);
	mmio_set(table + 28, 0); /* unmasked: it goes out */
	ck_assert_uint_eq(mmio_get(table + 0x1000), 0);
	ck_assert_uint_eq(mmio_get(table + 16), 0xfee00000);
	pci_msix_trigger(d, 1);
	ck_assert_uint_eq(mmio_get(table + 0x1000), 0);
	port_set(3, cap + 2, 0xc000, 2); /* all masked */
	pci_msix_trigger(d, 1);
	ck_assert_uint_eq(mmio_get(table + 0x1000), 2);
	pci_device_reset(d);
	ck_assert(!pci_msix_enabled(d));
	pci_device_destroy(d);
}
END_TEST

static const uint8_t *save(struct pci_device *d, struct state_writer **w, size_t *len)
{
	const uint8_t *buf;
	*w = state_writer_create();
	pci_bus_save(pci, *w);
	state_section_begin(*w, "dev", 1);
	pci_device_save(d, *w);
	state_section_end(*w);
	ck_assert_int_eq(state_writer_finish(*w, &buf, len, NULL), 0);
	return buf;
}

START_TEST(a_loaded_device_is_as_it_was)
{
	struct pci_device *d = add(3);
	uint32_t cap = msix_setup(3), table = port_get(3, 0x14, 4);
	port_set(3, cap + 2, 0x8000, 2);
	mmio_set(table + 8, 0x42);
	pci_msix_trigger(d, 0);
	port_set(3, 0x10, 0xd4000000, 4);
	port_set(3, 0x3c, 0x55, 1);
	struct state_writer *w;
	size_t len;
	const uint8_t *buf = save(d, &w, &len);
	pci_device_destroy(d);
	teardown();
	setup();
	d = add(3);
	struct state_reader *r;
	ck_assert_int_eq(state_reader_open(buf, len, &r, NULL), 0);
	ck_assert_int_eq(pci_bus_load(pci, r, NULL), 0);
	ck_assert_int_eq(state_reader_section(r, "dev", 1, NULL, NULL), 0);
	ck_assert_int_eq(pci_device_load(d, r, NULL), 0);
	ck_assert_int_eq(state_reader_section_end(r, NULL), 0);
	ck_assert_int_eq(state_reader_finish(r, NULL), 0);
	state_reader_free(r);
	ck_assert_uint_eq(mapped_at, 0xd4000000);
	ck_assert(pci_msix_enabled(d));
	ck_assert(pci_bus_master(d));
	ck_assert_uint_eq(mmio_get(table + 8), 0x42);
	ck_assert_uint_eq(mmio_get(table + 0x1000), 1);
	ck_assert_uint_eq(port_get(3, 0x3c, 1), 0x55);

	/* Saved again, it is the same to the byte. */
	struct state_writer *w2;
	size_t len2;
	port_get(3, 0x3c, 1);
	const uint8_t *buf2 = save(d, &w2, &len2);
	ck_assert_uint_eq(len, len2);
	ck_assert_mem_eq(buf + len - 100, buf2 + len - 100, 100);
	state_writer_free(w);
	state_writer_free(w2);
	pci_device_destroy(d);
}
END_TEST

START_TEST(another_devices_state_is_refused)
{
	struct pci_device *d = add(3);
	struct state_writer *w = state_writer_create();
	struct state_reader *r;
	struct error err = ERROR_INIT;
	const uint8_t *buf;
	size_t len;
	state_section_begin(w, "dev", 1);
	state_put_u16(w, 0x1af4);
	state_put_u16(w, 0x1041);
	state_section_end(w);
	ck_assert_int_eq(state_writer_finish(w, &buf, &len, NULL), 0);
	ck_assert_int_eq(state_reader_open(buf, len, &r, NULL), 0);
	ck_assert_int_eq(state_reader_section(r, "dev", 1, NULL, NULL), 0);
	ck_assert_int_eq(pci_device_load(d, r, &err), -EPROTO);
	ck_assert_ptr_nonnull(strstr(err.message, "1af4:1041"));
	state_reader_free(r);
	state_writer_free(w);
	pci_device_destroy(d);
}
END_TEST

START_TEST(the_reset_register_is_told_by_its_width)
{
	uint8_t v[4] = {0x00, 0x06, 0x00, 0x80};
	pci_bus_on_reset(pci, on_reset, NULL);
	bus_write(bus, BUS_PIO, 0xcf8, v, 4); /* an address that has these bits */
	ck_assert_uint_eq(resets, 0);
	bus_write(bus, BUS_PIO, 0xcf9, (const uint8_t *)"\x02", 1);
	ck_assert_uint_eq(resets, 0);
	bus_write(bus, BUS_PIO, 0xcf9, (const uint8_t *)"\x06", 1);
	ck_assert_uint_eq(resets, 1);
}
END_TEST

START_TEST(taken_slots_and_odd_bars_are_refused)
{
	struct pci_device *d = add(3), *e;
	struct pci_device_config cfg = {.slot = 3, .msix_bar = -1};
	ck_assert_int_eq(pci_device_create(pci, &cfg, &e, NULL), -EEXIST);
	cfg.slot = 4;
	cfg.bar[0].size_bytes = 0x3000;
	ck_assert_int_eq(pci_device_create(pci, &cfg, &e, NULL), -EINVAL);
	cfg.bar[0].size_bytes = UINT64_C(1) << 40;
	ck_assert_int_eq(pci_device_create(pci, &cfg, &e, NULL), -EINVAL);
	cfg.slot = 32;
	ck_assert_int_eq(pci_device_create(pci, &cfg, &e, NULL), -EINVAL);
	pci_device_destroy(d);
}
END_TEST

START_TEST(every_config_access_is_harmless)
{
	struct pci_device *d = add(3);
	for (unsigned reg = 0; reg < 256; reg++)
		for (unsigned len = 1; len <= 4; len *= 2) {
			uint8_t v[8] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff};
			bus_write(bus, BUS_MMIO, PCI_ECAM_BASE + (3 << 15) + reg, v, len);
			bus_read(bus, BUS_MMIO, PCI_ECAM_BASE + (3 << 15) + reg, v, len);
			port_set(3, reg, 0xffffffff, len);
			port_get(3, reg, len);
		}
	uint8_t v[8];
	bus_read(bus, BUS_MMIO, PCI_ECAM_BASE + (3 << 15) + 4094, v, 8);
	ck_assert_uint_eq(port_get(3, 0, 4), 0x10421af4);
	pci_device_destroy(d);
}
END_TEST

int main(void)
{
	if (access("/dev/kvm", R_OK | W_OK)) {
		printf("skipped: no access to /dev/kvm\n100%%: Checks: 1, Failures: 0, Errors: 0\n");
		return 0;
	}
	Suite *s = suite_create("pci");
	TCase *t = tcase_create("pci");
	tcase_add_checked_fixture(t, setup, teardown);
	tcase_add_test(t, both_ways_see_the_same);
	tcase_add_test(t, read_only_registers_stay);
	tcase_add_test(t, bars_are_sized_moved_and_switched);
	tcase_add_test(t, msix_masks_and_remembers);
	tcase_add_test(t, a_loaded_device_is_as_it_was);
	tcase_add_test(t, another_devices_state_is_refused);
	tcase_add_test(t, the_reset_register_is_told_by_its_width);
	tcase_add_test(t, taken_slots_and_odd_bars_are_refused);
	tcase_add_test(t, every_config_access_is_harmless);
	suite_add_tcase(s, t);
	return suite_run(s);
}
