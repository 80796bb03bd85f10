/* SPDX-License-Identifier: Apache-2.0 */
#include "vmm/aml.h"

#include <string.h>

void aml_byte(struct aml *a, uint8_t v)
{
	if (a->len == AML_BYTES_MAX)
		a->overflow = true;
	else
		a->bytes[a->len++] = v;
}

void aml_word(struct aml *a, uint16_t v)
{
	aml_byte(a, (uint8_t)v);
	aml_byte(a, (uint8_t)(v >> 8));
}

void aml_dword(struct aml *a, uint32_t v)
{
	aml_word(a, (uint16_t)v);
	aml_word(a, (uint16_t)(v >> 16));
}

void aml_integer(struct aml *a, uint32_t v)
{
	if (v <= 1) {
		aml_byte(a, (uint8_t)v); /* ZeroOp, OneOp */
	} else if (v <= 0xff) {
		aml_byte(a, 0x0a);
		aml_byte(a, (uint8_t)v);
	} else if (v <= 0xffff) {
		aml_byte(a, 0x0b);
		aml_word(a, (uint16_t)v);
	} else {
		aml_byte(a, 0x0c);
		aml_dword(a, v);
	}
}

void aml_string(struct aml *a, const char *s)
{
	aml_byte(a, 0x0d);
	do
		aml_byte(a, (uint8_t)*s);
	while (*s++);
}

static uint32_t hex_digit(char c)
{
	return c <= '9' ? (uint32_t)(c - '0') : (uint32_t)(c - 'A' + 10);
}

/* ACPI 6.4, 19.3.4: three letters of 5 bits, four hex digits, the bytes then swapped. */
void aml_eisa_id(struct aml *a, const char *id)
{
	uint32_t v = (uint32_t)(id[0] - 0x40) << 26 | (uint32_t)(id[1] - 0x40) << 21 |
		     (uint32_t)(id[2] - 0x40) << 16 | hex_digit(id[3]) << 12 | hex_digit(id[4]) << 8 |
		     hex_digit(id[5]) << 4 | hex_digit(id[6]);
	aml_byte(a, 0x0c);
	aml_dword(a, __builtin_bswap32(v));
}

void aml_path(struct aml *a, const char *path)
{
	if (*path == '\\')
		aml_byte(a, (uint8_t)*path++);
	size_t segments = (strlen(path) + 1) / 5;
	if (segments == 2) {
		aml_byte(a, 0x2e);
	} else if (segments > 2) {
		aml_byte(a, 0x2f);
		aml_byte(a, (uint8_t)segments);
	}
	for (; *path; path++)
		if (*path != '.')
			aml_byte(a, (uint8_t)*path);
}

void aml_name(struct aml *a, const char *name)
{
	aml_byte(a, 0x08);
	aml_path(a, name);
}

/* PkgLength in its three-byte form, filled in by aml_end. */
static aml_mark begin(struct aml *a)
{
	aml_mark mark = a->len;
	for (unsigned i = 0; i < 3; i++)
		aml_byte(a, 0);
	return mark;
}

void aml_end(struct aml *a, aml_mark mark)
{
	if (a->overflow)
		return;
	size_t len = a->len - mark;
	a->bytes[mark] = (uint8_t)(0x80 | (len & 0xf));
	a->bytes[mark + 1] = (uint8_t)(len >> 4);
	a->bytes[mark + 2] = (uint8_t)(len >> 12);
}

aml_mark aml_scope(struct aml *a, const char *path)
{
	aml_byte(a, 0x10);
	aml_mark mark = begin(a);
	aml_path(a, path);
	return mark;
}

aml_mark aml_device(struct aml *a, const char *name)
{
	aml_byte(a, 0x5b);
	aml_byte(a, 0x82);
	aml_mark mark = begin(a);
	aml_path(a, name);
	return mark;
}

aml_mark aml_method(struct aml *a, const char *name, unsigned args)
{
	aml_byte(a, 0x14);
	aml_mark mark = begin(a);
	aml_path(a, name);
	aml_byte(a, (uint8_t)(args | 8)); /* serialized */
	return mark;
}

aml_mark aml_if_arg0_is(struct aml *a, uint32_t value)
{
	aml_byte(a, 0xa0);
	aml_mark mark = begin(a);
	aml_byte(a, 0x93); /* LEqual */
	aml_byte(a, 0x68); /* Arg0 */
	aml_integer(a, value);
	return mark;
}

aml_mark aml_package(struct aml *a, uint8_t elements)
{
	aml_byte(a, 0x12);
	aml_mark mark = begin(a);
	aml_byte(a, elements);
	return mark;
}

void aml_notify(struct aml *a, const char *path, uint32_t value)
{
	aml_byte(a, 0x86);
	aml_path(a, path);
	aml_integer(a, value);
}

/* ---- resources: ACPI 6.4, 6.4 ---- */

/* Buffer: PkgLength, then its size as a word constant, filled in at the end. */
aml_mark aml_resources(struct aml *a)
{
	aml_byte(a, 0x11);
	aml_mark mark = begin(a);
	aml_byte(a, 0x0b);
	aml_word(a, 0);
	return mark;
}

void aml_resources_end(struct aml *a, aml_mark mark)
{
	aml_byte(a, 0x79);
	aml_byte(a, 0);
	if (a->overflow)
		return;
	size_t len = a->len - mark - 6;
	a->bytes[mark + 4] = (uint8_t)len;
	a->bytes[mark + 5] = (uint8_t)(len >> 8);
	aml_end(a, mark);
}

void aml_io(struct aml *a, uint16_t port, uint8_t len)
{
	aml_byte(a, 0x47);
	aml_byte(a, 1); /* decodes 16 bits */
	aml_word(a, port);
	aml_word(a, port);
	aml_byte(a, 1);
	aml_byte(a, len);
}

void aml_irq(struct aml *a, unsigned irq)
{
	aml_byte(a, 0x22);
	aml_word(a, (uint16_t)(1u << irq));
}

void aml_interrupt_edge(struct aml *a, uint32_t gsi)
{
	aml_byte(a, 0x89);
	aml_word(a, 6);
	aml_byte(a, 3); /* consumer, edge, active high, exclusive */
	aml_byte(a, 1);
	aml_dword(a, gsi);
}

static void word_window(struct aml *a, uint8_t type, uint8_t flags, uint16_t first, uint16_t last)
{
	aml_byte(a, 0x88);
	aml_word(a, 13);
	aml_byte(a, type);
	aml_byte(a, 0x0c); /* producer, positive decode, both ends fixed */
	aml_byte(a, flags);
	aml_word(a, 0);
	aml_word(a, first);
	aml_word(a, last);
	aml_word(a, 0);
	aml_word(a, (uint16_t)(last - first + 1));
}

void aml_bus_range(struct aml *a, uint16_t first, uint16_t last)
{
	word_window(a, 2, 0, first, last);
}

void aml_io_window(struct aml *a, uint16_t first, uint16_t last)
{
	word_window(a, 1, 3, first, last);
}

void aml_memory_window(struct aml *a, uint32_t first, uint32_t last)
{
	aml_byte(a, 0x87);
	aml_word(a, 23);
	aml_byte(a, 0);
	aml_byte(a, 0x0c);
	aml_byte(a, 1); /* not cacheable, read-write */
	aml_dword(a, 0);
	aml_dword(a, first);
	aml_dword(a, last);
	aml_dword(a, 0);
	aml_dword(a, last - first + 1);
}
