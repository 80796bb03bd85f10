/* SPDX-License-Identifier: Apache-2.0 */
/* Configuration space of a flat bus 0: mechanism 1 ports, ECAM, BARs and capabilities. MSI-X is in
 * pci_msix.c. */
#include "vmm/pci.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/log.h"
#include "vmm/pci_bus.h"
#include "vmm/pci_device.h"

#define PORT_ADDRESS 0xcf8
#define PORT_DATA    0xcfc

/* PCI 3.0, 6.1 and 6.2 */
#define REG_COMMAND	 0x04
#define REG_STATUS	 0x06
#define REG_CACHE_LINE	 0x0c
#define REG_BAR0	 0x10
#define REG_CAPABILITIES 0x34
#define REG_LINE	 0x3c
#define STATUS_CAP_LIST	 0x10
#define COMMAND_WRITABLE (PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | PCI_COMMAND_INTX_OFF)

struct pci_bus {
	struct bus *bus;
	struct irq_router *irq;
	pthread_mutex_t lock; /* config space of every device, the address register, BAR mappings */
	uint32_t address;
	uint64_t next_mmio;
	struct pci_device *slots[32];
	struct pci_device *bridge;
	void (*on_reset)(void *opaque);
	void *on_reset_opaque;
};

/* ---- BARs; caller holds bus->lock ---- */

static bool bar_wanted(const struct pci_device *d, unsigned i, uint64_t *base)
{
	*base = get_le32(d->config + REG_BAR0 + 4 * i) & 0xfffffff0u;
	return (get_le16(d->config + REG_COMMAND) & PCI_COMMAND_MEMORY) && d->cfg.bar[i].size_bytes &&
	       *base >= PCI_MMIO_BASE && *base + d->cfg.bar[i].size_bytes <= PCI_MMIO_END;
}

static void bar_unmap(struct pci_device *d, unsigned i)
{
	if (!d->bar[i].mapped)
		return;
	if (d->cfg.bar[i].mapped)
		d->cfg.bar[i].mapped(d->cfg.bar[i].handler.opaque, d->bar[i].base, false);
	bus_remove(d->bus->bus, BUS_MMIO, d->bar[i].base);
	d->bar[i].mapped = false;
}

static void bars_update(struct pci_device *d)
{
	uint64_t base;
	for (unsigned i = 0; i < PCI_BARS; i++)
		if (d->bar[i].mapped && (!bar_wanted(d, i, &base) || base != d->bar[i].base))
			bar_unmap(d, i);
	for (unsigned i = 0; i < PCI_BARS; i++) {
		if (d->bar[i].mapped || !bar_wanted(d, i, &base))
			continue;
		struct error err = ERROR_INIT;
		if (bus_add(d->bus->bus, BUS_MMIO, base, d->cfg.bar[i].size_bytes, &d->cfg.bar[i].handler,
			    &err)) {
			log_debug("pci slot %u BAR %u: %s", d->cfg.slot, i, err.message);
			continue;
		}
		d->bar[i].mapped = true;
		d->bar[i].base = base;
		if (d->cfg.bar[i].mapped)
			d->cfg.bar[i].mapped(d->cfg.bar[i].handler.opaque, base, true);
	}
}

static void write_command(struct pci_device *d, uint16_t v)
{
	put_le16(d->config + REG_COMMAND, v & COMMAND_WRITABLE);
	__atomic_store_n(&d->master, (v & PCI_COMMAND_MASTER) != 0, __ATOMIC_RELEASE);
}

static void write_bar(struct pci_device *d, unsigned i, uint32_t v)
{
	uint64_t size = d->cfg.bar[i].size_bytes;
	put_le32(d->config + REG_BAR0 + 4 * i, size ? v & ~(uint32_t)(size - 1) : 0);
}

/* ---- access ---- */

static void config_read(struct pci_device *d, unsigned off, uint8_t *data, unsigned len)
{
	if (d->hook && off >= d->hook_offset && off < d->hook_offset + d->hook_len &&
	    d->hook(d->hook_opaque, false, off, data, len))
		return;
	SCOPE_LOCK(&d->bus->lock);
	memcpy(data, d->config + off, len);
}

static void config_write(struct pci_device *d, unsigned off, const uint8_t *data, unsigned len)
{
	uint8_t copy[8];
	memcpy(copy, data, len);
	if (d->hook && off >= d->hook_offset && off < d->hook_offset + d->hook_len &&
	    d->hook(d->hook_opaque, true, off, copy, len))
		return;
	SCOPE_LOCK(&d->bus->lock);
	if (off >= 256)
		return;
	/* Byte by byte into a copy, then register by register through its mask. */
	uint8_t now[260];
	memcpy(now, d->config, 256);
	memcpy(now + off, data, off + len > 256 ? 256 - off : len);
	unsigned end = off + len;
	bool bars = false;
	if (off < REG_COMMAND + 2 && end > REG_COMMAND) {
		write_command(d, get_le16(now + REG_COMMAND));
		bars = true;
	}
	if (off < REG_CACHE_LINE + 1 && end > REG_CACHE_LINE)
		d->config[REG_CACHE_LINE] = now[REG_CACHE_LINE];
	for (unsigned i = 0; i < PCI_BARS; i++) {
		unsigned reg = REG_BAR0 + 4 * i;
		if (off < reg + 4 && end > reg) {
			write_bar(d, i, get_le32(now + reg));
			bars = true;
		}
	}
	if (off < REG_LINE + 1 && end > REG_LINE)
		d->config[REG_LINE] = now[REG_LINE];
	unsigned ctrl = d->msix.cap + 2;
	if (d->msix.vectors && off < ctrl + 2 && end > ctrl)
		pci_msix_write_control(d, get_le16(now + ctrl));
	if (bars)
		bars_update(d);
}

static struct pci_device *decode(struct pci_bus *b, unsigned busnr, unsigned slot, unsigned fn)
{
	if (busnr != 0 || fn != 0)
		return NULL;
	SCOPE_LOCK(&b->lock);
	return b->slots[slot];
}

static bool access_ok(unsigned off, unsigned len, unsigned limit)
{
	return len <= 8 && off + len <= limit;
}

static void ecam_read(void *opaque, uint64_t offset, uint8_t *data, unsigned len)
{
	struct pci_device *d = decode(opaque, (unsigned)(offset >> 20), offset >> 15 & 31, offset >> 12 & 7);
	if (d && access_ok(offset & 4095, len, PCI_CONFIG_BYTES))
		config_read(d, offset & 4095, data, len);
}

static void ecam_write(void *opaque, uint64_t offset, const uint8_t *data, unsigned len)
{
	struct pci_device *d = decode(opaque, (unsigned)(offset >> 20), offset >> 15 & 31, offset >> 12 & 7);
	if (d && access_ok(offset & 4095, len, PCI_CONFIG_BYTES))
		config_write(d, offset & 4095, data, len);
}

static void port_read(void *opaque, uint64_t offset, uint8_t *data, unsigned len)
{
	struct pci_bus *b = opaque;
	uint32_t a;
	{
		SCOPE_LOCK(&b->lock);
		a = b->address;
	}
	if (offset < 4) {
		uint8_t reg[4];
		put_le32(reg, a);
		if (offset + len <= 4)
			memcpy(data, reg + offset, len);
		return;
	}
	unsigned off = (a & 0xfc) + (unsigned)(offset - 4);
	struct pci_device *d = a & 0x80000000u ? decode(b, a >> 16 & 255, a >> 11 & 31, a >> 8 & 7) : NULL;
	if (d && access_ok(off, len, 256))
		config_read(d, off, data, len);
}

static void port_write(void *opaque, uint64_t offset, const uint8_t *data, unsigned len)
{
	struct pci_bus *b = opaque;
	uint32_t a;
	{
		SCOPE_LOCK(&b->lock);
		if (offset == 0 && len == 4)
			b->address = get_le32(data) & 0x80fffffcu;
		a = b->address;
	}
	/* The chipsets' reset control register lies inside the address register, told apart by its width. */
	if (offset == 1 && len == 1 && (*data & 4) && b->on_reset)
		b->on_reset(b->on_reset_opaque);
	if (offset < 4)
		return;
	unsigned off = (a & 0xfc) + (unsigned)(offset - 4);
	struct pci_device *d = a & 0x80000000u ? decode(b, a >> 16 & 255, a >> 11 & 31, a >> 8 & 7) : NULL;
	if (d && access_ok(off, len, 256))
		config_write(d, off, data, len);
}

/* ---- devices ---- */

static void config_init(struct pci_device *d)
{
	uint8_t *c = d->config;
	put_le16(c + 0x00, d->cfg.vendor_id);
	put_le16(c + 0x02, d->cfg.device_id);
	c[0x08] = d->cfg.revision;
	c[0x09] = d->cfg.prog_if;
	c[0x0a] = d->cfg.subclass;
	c[0x0b] = d->cfg.class_code;
	put_le16(c + 0x2c, d->cfg.subsystem_vendor_id);
	put_le16(c + 0x2e, d->cfg.subsystem_id);
}

int pci_device_create(struct pci_bus *bus, const struct pci_device_config *cfg, struct pci_device **out,
		      struct error *err)
{
	if (cfg->slot > 31 || cfg->msix_vectors > PCI_MSIX_VECTORS_MAX || cfg->msix_bar >= PCI_BARS)
		return error_set(err, EINVAL, "pci slot %u: bad configuration", cfg->slot);
	struct pci_device *d = calloc(1, sizeof *d);
	if (!d)
		return error_errno(err, ENOMEM, "pci slot %u", cfg->slot);
	d->bus = bus;
	d->irq = bus->irq;
	d->cfg = *cfg;
	config_init(d);
	int ret = pci_msix_init(d, err);
	if (ret < 0) {
		pci_msix_destroy(d);
		free(d);
		return error_prefix(err, "pci slot %u", cfg->slot);
	}
	{
		SCOPE_LOCK(&bus->lock);
		if (bus->slots[cfg->slot])
			ret = error_set(err, EEXIST, "pci slot %u is taken", cfg->slot);
		uint64_t next = bus->next_mmio;
		for (unsigned i = 0; i < PCI_BARS && !ret; i++) {
			uint64_t size = d->cfg.bar[i].size_bytes;
			if (!size)
				continue;
			uint64_t base = (next + size - 1) & ~(size - 1);
			if (size < 4096 || (size & (size - 1)) || base + size > PCI_MMIO_END) {
				ret = error_set(err, EINVAL,
						"pci slot %u: BAR %u of 0x%llx bytes does not fit", cfg->slot,
						i, (unsigned long long)size);
				break;
			}
			d->bar[i].assigned = (uint32_t)base;
			write_bar(d, i, (uint32_t)base);
			next = base + size;
		}
		if (!ret) {
			bus->next_mmio = next;
			bus->slots[cfg->slot] = d;
		}
	}
	if (ret) {
		pci_msix_destroy(d);
		free(d);
		return ret;
	}
	*out = d;
	return 0;
}

void pci_device_destroy(struct pci_device *d)
{
	if (!d)
		return;
	{
		SCOPE_LOCK(&d->bus->lock);
		for (unsigned i = 0; i < PCI_BARS; i++)
			bar_unmap(d, i);
		d->bus->slots[d->cfg.slot] = NULL;
	}
	pci_msix_destroy(d);
	free(d);
}

int pci_add_capability(struct pci_device *d, uint8_t id, const void *body, unsigned len, struct error *err)
{
	SCOPE_LOCK(&d->bus->lock);
	unsigned at = d->next_cap ? d->next_cap : 0x40;
	if (at + 2 + len > 256)
		return error_set(err, ENOSPC, "pci slot %u: no room for capability 0x%02x", d->cfg.slot, id);
	d->config[at] = id;
	d->config[at + 1] = 0;
	memcpy(d->config + at + 2, body, len);
	d->config[d->last_cap ? d->last_cap + 1 : REG_CAPABILITIES] = (uint8_t)at;
	d->config[REG_STATUS] |= STATUS_CAP_LIST;
	d->last_cap = at;
	d->next_cap = (at + 2 + len + 3) & ~3u;
	return (int)at;
}

void pci_set_config_hook(struct pci_device *d, unsigned offset, unsigned len,
			 bool (*hook)(void *opaque, bool write, unsigned off, uint8_t *data, unsigned n),
			 void *opaque)
{
	d->hook_offset = offset;
	d->hook_len = len;
	d->hook = hook;
	d->hook_opaque = opaque;
}

bool pci_bus_master(const struct pci_device *d)
{
	return __atomic_load_n(&d->master, __ATOMIC_ACQUIRE);
}

/* Saved: command, cache line size, interrupt line, BARs, MSI-X. Rebuilt from the configuration: all else. */
void pci_device_save(struct pci_device *d, struct state_writer *w)
{
	SCOPE_LOCK(&d->bus->lock);
	state_put_u16(w, d->cfg.vendor_id);
	state_put_u16(w, d->cfg.device_id);
	state_put_u16(w, get_le16(d->config + REG_COMMAND));
	state_put_u8(w, d->config[REG_CACHE_LINE]);
	state_put_u8(w, d->config[REG_LINE]);
	for (unsigned i = 0; i < PCI_BARS; i++)
		state_put_u32(w, get_le32(d->config + REG_BAR0 + 4 * i));
	pci_msix_save(d, w);
}

int pci_device_load(struct pci_device *d, struct state_reader *r, struct error *err)
{
	SCOPE_LOCK(&d->bus->lock);
	uint16_t vendor = state_get_u16(r), device = state_get_u16(r);
	if (vendor != d->cfg.vendor_id || device != d->cfg.device_id)
		return error_set(err, EPROTO, "pci slot %u: saved device is %04x:%04x, here is %04x:%04x",
				 d->cfg.slot, vendor, device, d->cfg.vendor_id, d->cfg.device_id);
	uint16_t command = state_get_u16(r);
	d->config[REG_CACHE_LINE] = state_get_u8(r);
	d->config[REG_LINE] = state_get_u8(r);
	for (unsigned i = 0; i < PCI_BARS; i++)
		write_bar(d, i, state_get_u32(r));
	int ret = pci_msix_load(d, r, err);
	if (ret < 0)
		return error_prefix(err, "pci slot %u", d->cfg.slot);
	write_command(d, command);
	bars_update(d);
	return 0;
}

void pci_device_reset(struct pci_device *d)
{
	SCOPE_LOCK(&d->bus->lock);
	write_command(d, 0);
	bars_update(d);
	d->config[REG_CACHE_LINE] = 0;
	d->config[REG_LINE] = 0;
	for (unsigned i = 0; i < PCI_BARS; i++)
		write_bar(d, i, d->bar[i].assigned);
	pci_msix_reset(d);
}

/* ---- bus ---- */

int pci_bus_create(struct bus *bus, struct irq_router *irq, struct pci_bus **out, struct error *err)
{
	struct pci_bus *b = calloc(1, sizeof *b);
	if (!b)
		return error_errno(err, ENOMEM, "pci");
	b->bus = bus;
	b->irq = irq;
	b->next_mmio = PCI_MMIO_BASE;
	pthread_mutex_init(&b->lock, NULL);
	struct bus_handler ports = {.read = port_read, .write = port_write, .opaque = b};
	struct bus_handler ecam = {.read = ecam_read, .write = ecam_write, .opaque = b};
	/* The host bridge that the firmware CLOUDHV.fd looks for. */
	struct pci_device_config bridge = {
		.vendor_id = 0x8086, .device_id = 0x0d57, .class_code = 6, .msix_bar = -1};
	int ret = bus_add(bus, BUS_PIO, PORT_ADDRESS, 8, &ports, err);
	if (!ret) {
		ret = bus_add(bus, BUS_MMIO, PCI_ECAM_BASE, PCI_ECAM_BYTES, &ecam, err);
		if (ret)
			bus_remove(bus, BUS_PIO, PORT_ADDRESS);
	}
	if (ret) {
		free(b);
		return ret;
	}
	ret = pci_device_create(b, &bridge, &b->bridge, err);
	if (ret) {
		pci_bus_free(b);
		return ret;
	}
	*out = b;
	return 0;
}

void pci_bus_free(struct pci_bus *b)
{
	if (!b)
		return;
	pci_device_destroy(b->bridge);
	bus_remove(b->bus, BUS_PIO, PORT_ADDRESS);
	bus_remove(b->bus, BUS_MMIO, PCI_ECAM_BASE);
	pthread_mutex_destroy(&b->lock);
	free(b);
}

void pci_bus_on_reset(struct pci_bus *b, void (*fn)(void *opaque), void *opaque)
{
	b->on_reset = fn;
	b->on_reset_opaque = opaque;
}

void pci_bus_reset(struct pci_bus *b)
{
	pci_device_reset(b->bridge);
	SCOPE_LOCK(&b->lock);
	b->address = 0;
}

void pci_bus_save(struct pci_bus *b, struct state_writer *w)
{
	state_section_begin(w, "pci", 1);
	state_put_u32(w, b->address);
	pci_device_save(b->bridge, w);
	state_section_end(w);
}

int pci_bus_load(struct pci_bus *b, struct state_reader *r, struct error *err)
{
	int ret = state_reader_section(r, "pci", 1, NULL, err);
	if (ret)
		return ret;
	b->address = state_get_u32(r) & 0x80fffffcu;
	ret = pci_device_load(b->bridge, r, err);
	return ret ? ret : state_reader_section_end(r, err);
}
