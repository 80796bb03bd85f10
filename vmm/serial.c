/* SPDX-License-Identifier: Apache-2.0 */
/*
 * 16550A at 0x3f8, IRQ 4 (National Semiconductor PC16550D). The transmitter is infinitely fast: a byte
 * written is in the console's ring at once, so THR is always empty.
 *
 * Saved: IER, LCR, MCR, SCR, divisor, FIFO enable, trigger level, receive FIFO, overrun, MSR deltas, pending
 * transmit interrupt, the console's kept bytes. Rebuilt: LSR, IIR and the interrupt line; on load a guest
 * that has the transmit interrupt enabled gets one, whatever was saved, because one that was lost on the way
 * would be waited for for ever.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "vmm/machine_internal.h"

#define SERIAL_PORT 0x3f8
#define SERIAL_IRQ  4

#define IER_RX	     0x01
#define IER_TX	     0x02
#define IER_LINE     0x04
#define IER_MODEM    0x08
#define FCR_ENABLE   0x01
#define FCR_CLEAR_RX 0x02
#define LCR_DLAB     0x80
#define MCR_DTR	     0x01
#define MCR_RTS	     0x02
#define MCR_OUT1     0x04
#define MCR_OUT2     0x08
#define MCR_LOOP     0x10
#define LSR_DATA     0x01
#define LSR_OVERRUN  0x02
#define LSR_THRE     0x20
#define LSR_TEMT     0x40
#define MSR_CTS	     0x10
#define MSR_DSR	     0x20
#define MSR_RI	     0x40
#define MSR_DCD	     0x80
#define MSR_LINES    (MSR_CTS | MSR_DSR | MSR_DCD)

#define RX_BYTES 1024u /* deeper than the chip's 16: nothing typed is lost to a busy guest */

struct serial {
	struct machine *m;
	struct console *console;
	pthread_mutex_t lock;
	uint8_t ier, lcr, mcr, scr, dll, dlm, fcr, msr_delta;
	bool thr_pending, overrun, level;
	uint8_t rx[RX_BYTES];
	unsigned rx_at, rx_n;
};

/* Caller holds lock. */
static uint8_t iir(const struct serial *s)
{
	uint8_t fifo = s->fcr & FCR_ENABLE ? 0xc0 : 0;
	if ((s->ier & IER_LINE) && s->overrun)
		return fifo | 0x06;
	if ((s->ier & IER_RX) && s->rx_n)
		return fifo | 0x04;
	if ((s->ier & IER_TX) && s->thr_pending)
		return fifo | 0x02;
	if ((s->ier & IER_MODEM) && s->msr_delta)
		return fifo;
	return fifo | 0x01;
}

/* Caller holds lock. */
static void update_irq(struct serial *s)
{
	bool level = !(iir(s) & 1) && (s->mcr & (MCR_OUT2 | MCR_LOOP)) == MCR_OUT2;
	if (level != s->level) {
		s->level = level;
		irq_set_level(s->m->irq, SERIAL_IRQ, level);
	}
}

static void rx_push(struct serial *s, uint8_t byte)
{
	if (s->rx_n == RX_BYTES) {
		s->overrun = true;
		return;
	}
	s->rx[(s->rx_at + s->rx_n++) % RX_BYTES] = byte;
}

static uint8_t modem_status(const struct serial *s)
{
	if (!(s->mcr & MCR_LOOP))
		return MSR_LINES | s->msr_delta;
	uint8_t v = 0;
	if (s->mcr & MCR_RTS)
		v |= MSR_CTS;
	if (s->mcr & MCR_DTR)
		v |= MSR_DSR;
	if (s->mcr & MCR_OUT1)
		v |= MSR_RI;
	if (s->mcr & MCR_OUT2)
		v |= MSR_DCD;
	return v | s->msr_delta;
}

static uint8_t read_register(struct serial *s, uint64_t offset, bool *room)
{
	uint8_t v = 0;
	switch (offset) {
	case 0:
		if (s->lcr & LCR_DLAB)
			return s->dll;
		if (s->rx_n) {
			v = s->rx[s->rx_at];
			s->rx_at = (s->rx_at + 1) % RX_BYTES;
			*room = s->rx_n == RX_BYTES || s->rx_n == 1;
			s->rx_n--;
		}
		return v;
	case 1:
		return s->lcr & LCR_DLAB ? s->dlm : s->ier;
	case 2:
		v = iir(s);
		if ((v & 0x0f) == 0x02)
			s->thr_pending = false;
		return v;
	case 3:
		return s->lcr;
	case 4:
		return s->mcr;
	case 5:
		v = LSR_THRE | LSR_TEMT | (s->rx_n ? LSR_DATA : 0) | (s->overrun ? LSR_OVERRUN : 0);
		s->overrun = false;
		return v;
	case 6:
		v = modem_status(s);
		s->msr_delta = 0;
		return v;
	default:
		return s->scr;
	}
}

static void serial_read(void *opaque, uint64_t offset, uint8_t *data, unsigned len)
{
	struct serial *s = opaque;
	bool room = false;
	if (len != 1)
		return;
	{
		SCOPE_LOCK(&s->lock);
		*data = read_register(s, offset, &room);
		update_irq(s);
	}
	if (room)
		console_wake(s->console);
}

static void serial_write(void *opaque, uint64_t offset, const uint8_t *data, unsigned len)
{
	struct serial *s = opaque;
	if (len != 1)
		return;
	uint8_t v = *data;
	bool put = false;
	{
		SCOPE_LOCK(&s->lock);
		switch (offset) {
		case 0:
			if (s->lcr & LCR_DLAB) {
				s->dll = v;
				break;
			}
			if (s->mcr & MCR_LOOP)
				rx_push(s, v);
			else
				put = true;
			s->thr_pending = true;
			/* The line falls and rises again for each byte, or an edge-triggered IOAPIC pin sees
			 * only the first. */
			if ((s->ier & IER_TX) && s->level) {
				s->thr_pending = false;
				update_irq(s);
				s->thr_pending = true;
			}
			break;
		case 1:
			if (s->lcr & LCR_DLAB) {
				s->dlm = v;
				break;
			}
			if ((v & IER_TX) && !(s->ier & IER_TX))
				s->thr_pending = true; /* THR is empty: enabling raises it */
			s->ier = v & 0x0f;
			break;
		case 2:
			if ((v ^ s->fcr) & FCR_ENABLE || v & FCR_CLEAR_RX)
				s->rx_n = 0;
			s->fcr = v & 0xc9;
			break;
		case 3:
			s->lcr = v;
			break;
		case 4:
			s->mcr = v & 0x1f;
			break;
		case 7:
			s->scr = v;
			break;
		default:
			break;
		}
		update_irq(s);
	}
	if (put)
		console_put(s->console, v);
}

static size_t serial_room(void *opaque)
{
	struct serial *s = opaque;
	SCOPE_LOCK(&s->lock);
	return RX_BYTES - s->rx_n;
}

static void serial_deliver(void *opaque, const uint8_t *bytes, size_t n)
{
	struct serial *s = opaque;
	SCOPE_LOCK(&s->lock);
	for (size_t i = 0; i < n; i++)
		rx_push(s, bytes[i]);
	update_irq(s);
}

static void serial_pause(void *dev)
{
	console_pause(((struct serial *)dev)->console);
}

static int serial_drain(void *dev, unsigned timeout_ms)
{
	return console_drain(((struct serial *)dev)->console, timeout_ms);
}

static void serial_resume(void *dev)
{
	struct serial *s = dev;
	{
		SCOPE_LOCK(&s->lock);
		if (s->ier & IER_TX)
			s->thr_pending = true;
		s->level = false;
		irq_set_level(s->m->irq, SERIAL_IRQ, false);
		update_irq(s);
	}
	console_resume(s->console);
}

static int serial_save(void *dev, struct state_writer *w, struct error *err)
{
	struct serial *s = dev;
	SCOPE_LOCK(&s->lock);
	state_section_begin(w, "serial", 1);
	uint8_t regs[] = {s->ier, s->lcr, s->mcr,	s->scr,		s->dll,
			  s->dlm, s->fcr, s->msr_delta, s->thr_pending, s->overrun};
	state_put_bytes(w, regs, sizeof regs);
	state_put_u32(w, s->rx_n);
	for (unsigned i = 0; i < s->rx_n; i++)
		state_put_u8(w, s->rx[(s->rx_at + i) % RX_BYTES]);
	console_save(s->console, w);
	state_section_end(w);
	return 0;
}

static int serial_load(void *dev, struct state_reader *r, struct error *err)
{
	struct serial *s = dev;
	int ret = state_reader_section(r, "serial", 1, NULL, err);
	if (ret)
		return ret;
	SCOPE_LOCK(&s->lock);
	s->ier = state_get_u8(r) & 0x0f;
	s->lcr = state_get_u8(r);
	s->mcr = state_get_u8(r) & 0x1f;
	s->scr = state_get_u8(r);
	s->dll = state_get_u8(r);
	s->dlm = state_get_u8(r);
	s->fcr = state_get_u8(r);
	s->msr_delta = state_get_u8(r) & 0x0f;
	s->thr_pending = state_get_u8(r) || (s->ier & IER_TX);
	s->overrun = state_get_u8(r);
	uint32_t n = state_get_u32(r);
	if (n > RX_BYTES)
		return error_set(err, EPROTO, "serial port: %u bytes received", n);
	s->rx_at = 0;
	s->rx_n = n;
	state_get_bytes(r, s->rx, n);
	ret = console_load(s->console, r, err);
	if (ret)
		return ret;
	s->level = false; /* the IOAPIC's copy is loaded with it; serial_resume makes a fresh edge */
	return state_reader_section_end(r, err);
}

static void serial_reset(void *dev)
{
	struct serial *s = dev;
	SCOPE_LOCK(&s->lock);
	s->ier = s->lcr = s->scr = s->dll = s->dlm = s->fcr = s->msr_delta = 0;
	s->mcr = MCR_OUT2;
	s->thr_pending = s->overrun = false;
	s->rx_n = 0;
	update_irq(s);
}

static void serial_destroy(void *dev)
{
	struct serial *s = dev;
	bus_remove(s->m->bus, BUS_PIO, SERIAL_PORT);
	console_destroy(s->console);
	pthread_mutex_destroy(&s->lock);
	free(s);
}

static const struct device_ops serial_ops = {
	.name = "serial",
	.pause = serial_pause,
	.drain = serial_drain,
	.resume = serial_resume,
	.save = serial_save,
	.load = serial_load,
	.reset = serial_reset,
	.destroy = serial_destroy,
};

int serial_create(struct machine *m, struct error *err)
{
	struct serial *s = calloc(1, sizeof *s);
	if (!s)
		return error_errno(err, ENOMEM, "serial port");
	s->m = m;
	s->mcr = MCR_OUT2;
	pthread_mutex_init(&s->lock, NULL);
	struct console_input in = {.room = serial_room, .deliver = serial_deliver, .opaque = s};
	struct bus_handler h = {.read = serial_read, .write = serial_write, .opaque = s};
	int ret = bus_add(m->bus, BUS_PIO, SERIAL_PORT, 8, &h, err);
	if (!ret) {
		ret = console_create(m->serial_spec, m->run_dir, &in, &s->console, err);
		if (!ret)
			ret = machine_add_device(m, &serial_ops, s, err);
	}
	if (ret) {
		serial_destroy(s);
		return ret;
	}
	return 0;
}
