/* SPDX-License-Identifier: Apache-2.0 */
#include "guest.h"

#include <stdarg.h>

#define COM1	       0x3f8
#define LSR_DATA_READY 0x01
#define LSR_THR_EMPTY  0x20
#define FIFO_BYTES     16
#define QUEUE_BYTES    32768u /* a power of two */
#define LINE_BYTES     1024u

static char queue[QUEUE_BYTES];
static unsigned head, tail; /* free-running */
static unsigned fifo_room;
static bool absent;
static uint64_t dropped;

void con_init(void)
{
	outb(COM1 + 1, 0);    /* no interrupts */
	outb(COM1 + 3, 0x80); /* divisor latch */
	outb(COM1 + 0, 1);
	outb(COM1 + 1, 0);
	outb(COM1 + 3, 0x03); /* 8n1 */
	outb(COM1 + 2, 0x07); /* FIFOs on and empty */
	outb(COM1 + 4, 0x03); /* DTR, RTS */
	absent = inb(COM1 + 5) == 0xff;
}

static char line[LINE_BYTES];
static unsigned line_len;

static void put(char c)
{
	if (line_len < LINE_BYTES - 2) /* room for the end of the line */
		line[line_len++] = c;
}

static void put_number(uint64_t v, unsigned base)
{
	char digits[24];
	unsigned k = 0;

	do {
		digits[k++] = "0123456789abcdef"[v % base];
		v /= base;
	} while (v);
	while (k)
		put(digits[--k]);
}

/* Only whole lines are dropped when the queue is full, so what arrives stays parseable. */
static void commit_line(void)
{
	line[line_len++] = '\r';
	line[line_len++] = '\n';
	if (!absent && QUEUE_BYTES - (head - tail) >= line_len)
		for (unsigned i = 0; i < line_len; i++)
			queue[head++ % QUEUE_BYTES] = line[i];
	else
		dropped++;
	line_len = 0;
}

void con_printf(const char *format, ...)
{
	va_list args;

	/* %s, %u, %x, %lu and %lx: all that the guest prints. */
	va_start(args, format);
	for (const char *f = format; *f; f++) {
		bool is_long = false;

		if (*f == '\n') {
			commit_line();
			continue;
		}
		if (*f != '%') {
			put(*f);
			continue;
		}
		f++;
		if (*f == 'l') {
			is_long = true;
			f++;
		}
		if (*f == 's') {
			for (const char *s = va_arg(args, const char *); *s; s++)
				put(*s);
		} else {
			uint64_t v = is_long ? va_arg(args, unsigned long) : va_arg(args, unsigned);

			put_number(v, *f == 'x' ? 16 : 10);
		}
	}
	va_end(args);
}

void con_poll(void)
{
	if (head == tail)
		return;
	if (!fifo_room) {
		if (!(inb(COM1 + 5) & LSR_THR_EMPTY))
			return;
		fifo_room = FIFO_BYTES;
	}
	work_done++;
	outb(COM1, (uint8_t)queue[tail++ % QUEUE_BYTES]);
	fifo_room--;
}

void con_drain(void)
{
	uint64_t start = rdtsc();

	/* A console that nobody reads must not keep the guest from powering off. */
	while (head != tail && rdtsc() - start < 20000000000ULL)
		con_poll();
}

int con_input(void)
{
	if (absent || !(inb(COM1 + 5) & LSR_DATA_READY))
		return -1;
	return inb(COM1);
}

uint64_t con_dropped(void)
{
	return dropped;
}
