/* SPDX-License-Identifier: Apache-2.0 */
#include "pci.h"

#define BARS	       6u
#define COMMAND	       0x04u
#define COMMAND_MEMORY 2u
#define COMMAND_MASTER 4u
#define HOLE_START     0xc0000000ULL
#define HOLE_END       0xfec00000ULL /* the IOAPIC */
#define DEVICES	       32u
#define HIGH_START     (256ULL << 30) /* beyond any RAM that a test gives us */

static void select_register(unsigned device, unsigned offset)
{
	outl(0xcf8, 0x80000000u | device << 11 | (offset & 0xfc));
}

uint32_t pci_read32(unsigned device, unsigned offset)
{
	select_register(device, offset);
	return inl(0xcfc);
}

uint16_t pci_read16(unsigned device, unsigned offset)
{
	select_register(device, offset);
	return inw((uint16_t)(0xcfc + (offset & 2)));
}

uint8_t pci_read8(unsigned device, unsigned offset)
{
	select_register(device, offset);
	return inb((uint16_t)(0xcfc + (offset & 3)));
}

void pci_write32(unsigned device, unsigned offset, uint32_t v)
{
	select_register(device, offset);
	outl(0xcfc, v);
}

static unsigned bar_offset(unsigned bar)
{
	return 0x10 + 4 * bar;
}

/* Address and size of a memory BAR; size 0 if there is none. Decoding is off meanwhile, as sizing moves the
 * BAR. */
static uint64_t probe_bar(unsigned device, unsigned bar, uint64_t *size, bool *is_64)
{
	uint32_t command = pci_read16(device, COMMAND), low = pci_read32(device, bar_offset(bar)), mask,
		 high = 0;
	uint32_t high_mask = 0xffffffff;

	*size = 0;
	*is_64 = (low & 6) == 4 && bar + 1 < BARS;
	if (low & 1)
		return 0;
	pci_write32(device, COMMAND, command & ~(COMMAND_MEMORY | COMMAND_MASTER));
	pci_write32(device, bar_offset(bar), 0xffffffff);
	mask = pci_read32(device, bar_offset(bar));
	pci_write32(device, bar_offset(bar), low);
	if (*is_64) {
		high = pci_read32(device, bar_offset(bar + 1));
		pci_write32(device, bar_offset(bar + 1), 0xffffffff);
		high_mask = pci_read32(device, bar_offset(bar + 1));
		pci_write32(device, bar_offset(bar + 1), high);
	}
	pci_write32(device, COMMAND, command);
	if (mask & ~15u || (*is_64 && high_mask))
		*size = ~((uint64_t)high_mask << 32 | (mask & ~15u)) + 1;
	return (uint64_t)high << 32 | (low & ~15u);
}

/* The end of whatever on bus 0 decodes a part of [at, at + size), or 0 if nothing does. */
static uint64_t in_the_way(uint64_t at, uint64_t size)
{
	for (unsigned d = 0; d < DEVICES; d++) {
		if (pci_read16(d, 0) == 0xffff || (pci_read8(d, 0x0e) & 0x7f))
			continue;
		for (unsigned b = 0; b < BARS; b++) {
			bool is_64;
			uint64_t their_size, theirs = probe_bar(d, b, &their_size, &is_64);

			if (their_size && theirs && theirs < at + size && at < theirs + their_size)
				return theirs + their_size;
			b += is_64;
		}
	}
	return 0;
}

/* A free place in the hole below 4 GiB, beyond RAM. */
static uint64_t free_address(uint64_t size)
{
	uint64_t at = HOLE_START > ram_low_end() ? HOLE_START : ram_low_end();

	for (;;) {
		uint64_t end;

		at = (at + size - 1) & ~(size - 1);
		if (size > HOLE_END || at > HOLE_END - size)
			guest_halt("no room for a PCI BAR");
		end = in_the_way(at, size);
		if (!end)
			return at;
		at = end;
	}
}

uint64_t pci_memory_bar(unsigned device, unsigned bar)
{
	static unsigned placed[DEVICES]; /* bit per BAR */
	bool is_64;
	uint64_t size, at;

	if (bar >= BARS)
		return 0;
	at = probe_bar(device, bar, &size, &is_64);
	if (!size)
		return 0;
	if (!at || (option_string("rebar") && !(placed[device] & 1u << bar))) {
		if (is_64 && option_is("rebar", "high"))
			at = HIGH_START + ((uint64_t)device << 32 | (uint64_t)bar << 28);
		else
			at = free_address(size);
		pci_write32(device, bar_offset(bar), (uint32_t)at);
		if (is_64)
			pci_write32(device, bar_offset(bar + 1), (uint32_t)(at >> 32));
		con_printf("pci device=%u bar=%u placed at=0x%lx size=0x%lx\n", device, bar, at, size);
		placed[device] |= 1u << bar;
	}
	map_physical(at, size);
	return at;
}

void pci_enable(unsigned device)
{
	pci_write32(device, COMMAND,
		    (pci_read32(device, COMMAND) & 0xffff) | COMMAND_MEMORY | COMMAND_MASTER);
}
