/* SPDX-License-Identifier: Apache-2.0 */
#include "guest.h"

#define START_MAGIC   0x336ec578u
#define MEMMAP_RAM    1u
#define CMDLINE_BYTES 4096u
#define OPTIONS_MAX   64u
#define RANGES_MAX    16u
#define GIB_SHIFT     30
#define PTE_TABLE     0x27u
#define PTE_LARGE     0xe7u
#define PTE_ADDRESS   0x000ffffffffff000ULL
#define VECTOR_IRQ_0  0x20
#define VECTOR_INVALID 6

struct start_info {
	uint32_t magic, version, flags, nr_modules;
	uint64_t modlist, cmdline, rsdp, memmap;
	uint32_t memmap_entries, reserved;
};
struct memmap_entry {
	uint64_t address, size;
	uint32_t type, reserved;
};

extern char guest_image_end[], fault_stubs[], idle_gate[], interrupt_gate[];
extern uint64_t page_table_pml4[];
extern uint64_t guest_idt[];
void guest_fault(uint64_t vector, uint64_t code, uint64_t rip, uint64_t cr2);
void *memcpy(void *to, const void *from, size_t n);
void *memset(void *to, int c, size_t n);

static struct option {
	const char *name, *value;
	bool used;
} options[OPTIONS_MAX];
static unsigned noptions;
static char cmdline[CMDLINE_BYTES];

static struct range {
	uint64_t base, size;
} ranges[RANGES_MAX];
static unsigned nranges;
static uint64_t total_ram, low_end;

void *memcpy(void *to, const void *from, size_t n)
{
	void *t = to;

	__asm__ volatile("rep movsb" : "+D"(t), "+S"(from), "+c"(n)::"memory");
	return to;
}

void *memset(void *to, int c, size_t n)
{
	void *t = to;

	__asm__ volatile("rep stosb" : "+D"(t), "+c"(n) : "a"(c) : "memory");
	return to;
}

void guest_halt(const char *why)
{
	con_printf("BAD halt why=%s\n", why);
	con_drain();
	for (;;)
		__asm__ volatile("pause");
}

void guest_fault(uint64_t vector, uint64_t code, uint64_t rip, uint64_t cr2)
{
	con_printf("BAD exception vector=%lu code=0x%lx rip=0x%lx cr2=0x%lx\n", vector, code, rip, cr2);
	guest_halt("exception");
}

static void install_gate(unsigned vector, const char *to)
{
	uint64_t a = (uint64_t)to;

	guest_idt[2 * vector] = (a & 0xffff) | 0x10ULL << 16 | 0x8e00ULL << 32 | ((a >> 16) & 0xffff) << 48;
	guest_idt[2 * vector + 1] = a >> 32;
}

static void install_fault_handlers(void)
{
	for (unsigned i = 0; i < 32; i++)
		install_gate(i, fault_stubs + i * 16);
}

void idle_init(void)
{
	const unsigned latch = 1193182 / 1000 * IDLE_MS;

	for (unsigned i = 0; i < 8; i++)
		install_gate(VECTOR_IRQ_0 + i, interrupt_gate);
	install_gate(VECTOR_INVALID, idle_gate);
	/* the PICs by their data sheet: edges, vectors, cascade at input 2, 8086 mode; all but the PIT's line masked */
	outb(0x20, 0x11);
	outb(0x21, VECTOR_IRQ_0);
	outb(0x21, 1 << 2);
	outb(0x21, 1);
	outb(0xa0, 0x11);
	outb(0xa1, 0x70);
	outb(0xa1, 2);
	outb(0xa1, 1);
	outb(0x21, 0xfe);
	outb(0xa1, 0xff);
	outb(0x43, 0x34); /* channel 0, both bytes, mode 2 */
	outb(0x40, latch & 0xff);
	outb(0x40, latch >> 8);
}

static bool same(const char *a, const char *b)
{
	while (*a && *a == *b)
		a++, b++;
	return *a == *b;
}

static void parse_options(const char *text)
{
	unsigned n = 0;
	char *c = cmdline;

	while (n < CMDLINE_BYTES - 1 && text[n]) {
		cmdline[n] = text[n];
		n++;
	}
	while (*c && noptions < OPTIONS_MAX) {
		struct option *o = &options[noptions];

		while (*c == ' ')
			*c++ = 0;
		if (!*c)
			break;
		o->name = c;
		o->value = "";
		for (; *c && *c != ' '; c++)
			if (*c == '=' && !*o->value) {
				*c = 0;
				o->value = c + 1;
			}
		noptions++;
	}
}

const char *option_string(const char *name)
{
	for (unsigned i = 0; i < noptions; i++)
		if (same(options[i].name, name)) {
			options[i].used = true;
			return options[i].value;
		}
	return NULL;
}

bool option_is(const char *name, const char *value)
{
	const char *v = option_string(name);

	return v && same(v, value);
}

/* Decimal or 0x hexadecimal; *end is the first character that is neither. */
static uint64_t parse_number(const char *s, const char **end)
{
	uint64_t v = 0;
	unsigned base = 10;

	if (s[0] == '0' && s[1] == 'x') {
		base = 16;
		s += 2;
	}
	for (;; s++) {
		unsigned d = *s >= '0' && *s <= '9'   ? (unsigned)(*s - '0')
			     : *s >= 'a' && *s <= 'f' ? (unsigned)(*s - 'a' + 10)
						      : 99;

		if (d >= base)
			break;
		v = v * base + d;
	}
	*end = s;
	return v;
}

uint64_t option_number(const char *name, uint64_t otherwise)
{
	const char *s = option_string(name), *end;
	uint64_t v;

	if (!s)
		return otherwise;
	v = parse_number(s, &end);
	if (end == s || *end) {
		con_printf("BAD option %s=%s is not a number\n", name, s);
		return otherwise;
	}
	return v;
}

void options_report_unknown(void)
{
	for (unsigned i = 0; i < noptions; i++)
		if (!options[i].used)
			con_printf("note unknown option %s ignored\n", options[i].name);
}

static uint64_t *table_entry_alloc(void)
{
	return ram_alloc(PAGE_BYTES, PAGE_BYTES);
}

/*
 * Ring 3 extends the page tables by itself: an entry that becomes present needs no TLB flush. A page
 * directory is filled before it is linked, so that a hypervisor with shadow paging sees one write per GiB.
 */
static void map_gib(uint64_t gib)
{
	uint64_t *pml4e = &page_table_pml4[gib >> 9 & 511], *pdpte, *pd;

	if (!*pml4e)
		*pml4e = (uint64_t)table_entry_alloc() | PTE_TABLE;
	pdpte = (uint64_t *)(*pml4e & PTE_ADDRESS) + (gib & 511);
	if (*pdpte)
		return;
	pd = table_entry_alloc();
	for (unsigned i = 0; i < 512; i++)
		pd[i] = (gib << GIB_SHIFT) + ((uint64_t)i << 21) + PTE_LARGE;
	barrier();
	*pdpte = (uint64_t)pd | PTE_TABLE;
	barrier();
}

void map_physical(uint64_t base, uint64_t len)
{
	for (uint64_t g = base >> GIB_SHIFT; len && g <= (base + len - 1) >> GIB_SHIFT; g++)
		map_gib(g);
}

static void add_ram(uint64_t base, uint64_t end)
{
	uint64_t floor = ((uint64_t)guest_image_end + 0x1fffff) & ~0x1fffffULL;

	total_ram += end - base;
	if (end <= 1ULL << 32 && end > low_end)
		low_end = end;
	if (base < floor)
		base = floor;
	base = (base + PAGE_BYTES - 1) & ~(uint64_t)(PAGE_BYTES - 1);
	end &= ~(uint64_t)(PAGE_BYTES - 1);
	if (base < end && nranges < RANGES_MAX)
		ranges[nranges++] = (struct range){base, end - base};
}

void platform_init(const struct start_info *given)
{
	struct start_info info = *given;
	struct memmap_entry map[RANGES_MAX * 2];
	unsigned n = 0;

	install_fault_handlers();
	if (info.magic != START_MAGIC)
		guest_halt("start info has no magic");
	if (info.cmdline)
		parse_options((const char *)info.cmdline);
	/* Copied before anything is allocated: the VMM may have put all of this into RAM that we take. */
	if (info.version >= 1)
		for (; n < info.memmap_entries && n < RANGES_MAX * 2; n++)
			map[n] = ((const struct memmap_entry *)info.memmap)[n];
	for (unsigned i = 0; i < n; i++)
		if (map[i].type == MEMMAP_RAM && map[i].size)
			add_ram(map[i].address, map[i].address + map[i].size);
	if (!nranges)
		guest_halt("no RAM in the memory map of the start info");
	for (unsigned i = 0; i < nranges; i++)
		map_physical(ranges[i].base, ranges[i].size);
}

uint64_t ram_bytes(void)
{
	return total_ram;
}

uint64_t ram_low_end(void)
{
	return low_end;
}

void *ram_alloc(uint64_t bytes, uint64_t align)
{
	for (unsigned i = 0; i < nranges; i++) {
		uint64_t at = (ranges[i].base + align - 1) & ~(align - 1), skip = at - ranges[i].base;
		uint64_t rounded = (bytes + PAGE_BYTES - 1) & ~(uint64_t)(PAGE_BYTES - 1);

		if (skip > ranges[i].size || rounded > ranges[i].size - skip)
			continue;
		ranges[i].base += skip + rounded;
		ranges[i].size -= skip + rounded;
		return memset((void *)at, 0, rounded);
	}
	guest_halt("out of memory");
}

uint64_t ram_pages_left(void)
{
	uint64_t n = 0;

	for (unsigned i = 0; i < nranges; i++)
		n += ranges[i].size / PAGE_BYTES;
	return n;
}

uint64_t *ram_page(uint64_t index)
{
	for (unsigned i = 0; i < nranges; i++) {
		uint64_t n = ranges[i].size / PAGE_BYTES;

		if (index < n)
			return (uint64_t *)(ranges[i].base + index * PAGE_BYTES);
		index -= n;
	}
	guest_halt("page index out of range");
}

/* poweroff=io:PORT:VALUE[:WIDTH in bits] */
void guest_power_off(void)
{
	const char *s = option_string("poweroff"), *end;
	uint64_t port, value, width;

	if (!s || s[0] != 'i' || s[1] != 'o' || s[2] != ':')
		return;
	port = parse_number(s + 3, &end);
	if (*end != ':')
		return;
	value = parse_number(end + 1, &end);
	width = *end == ':' ? parse_number(end + 1, &end) : value > 0xffff ? 32 : value > 0xff ? 16 : 8;
	if (width == 32)
		outl((uint16_t)port, (uint32_t)value);
	else if (width == 16)
		outw((uint16_t)port, (uint16_t)value);
	else
		outb((uint16_t)port, (uint8_t)value);
}
