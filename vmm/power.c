/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Power: ACPI 6.4, 4.8.3.7 sleep control and status registers, the reset register at 0xcf9 with the keyboard
 * controller's reset line for older habits, and the power button as a generic event device's interrupt.
 *
 * Saved: a press that the guest has not been told of. The power state itself is the machine's.
 */
#include <errno.h>
#include <stdlib.h>

#include "base/cleanup.h"
#include "vmm/machine_internal.h"
#include "vmm/power.h"

#define SLEEP_ENABLE	  0x20
#define SLEEP_TYPE(v)	  ((v) >> 2 & 7)
#define I8042_COMMAND	  0x64
#define I8042_RESET_PULSE 0xfe

struct power {
	struct machine *m;
	pthread_mutex_t lock;
	bool paused, pressed;
};

static void sleep_read(void *opaque, uint64_t offset, uint8_t *data, unsigned len)
{
	(void)opaque, (void)offset;
	for (unsigned i = 0; i < len; i++)
		data[i] = 0;
}

static void sleep_write(void *opaque, uint64_t offset, const uint8_t *data, unsigned len)
{
	struct power *p = opaque;
	if (offset == 0 && len == 1 && (*data & SLEEP_ENABLE) && SLEEP_TYPE(*data) == POWER_SLEEP_TYPE_S5)
		machine_request_power(p->m, POWER_OFF, "ACPI S5");
}

static void i8042_write(void *opaque, uint64_t offset, const uint8_t *data, unsigned len)
{
	struct power *p = opaque;
	(void)offset;
	if (len == 1 && *data == I8042_RESET_PULSE)
		machine_request_power(p->m, POWER_RESET, "keyboard controller");
}

static void on_reset_register(void *opaque)
{
	machine_request_power(((struct power *)opaque)->m, POWER_RESET, "reset register");
}

/* Caller holds lock. */
static void pulse(struct power *p)
{
	irq_set_level(p->m->irq, POWER_BUTTON_GSI, true);
	irq_set_level(p->m->irq, POWER_BUTTON_GSI, false);
	p->pressed = false;
}

void power_button_press(struct power *p)
{
	SCOPE_LOCK(&p->lock);
	p->pressed = true;
	if (!p->paused)
		pulse(p);
}

static void power_pause(void *dev)
{
	struct power *p = dev;
	SCOPE_LOCK(&p->lock);
	p->paused = true;
}

static void power_resume(void *dev)
{
	struct power *p = dev;
	SCOPE_LOCK(&p->lock);
	p->paused = false;
	if (p->pressed)
		pulse(p);
}

static int power_save(void *dev, struct state_writer *w, struct error *err)
{
	struct power *p = dev;
	SCOPE_LOCK(&p->lock);
	state_section_begin(w, "power", 1);
	state_put_u8(w, p->pressed);
	state_section_end(w);
	return 0;
}

static int power_load(void *dev, struct state_reader *r, struct error *err)
{
	struct power *p = dev;
	int ret = state_reader_section(r, "power", 1, NULL, err);
	if (ret)
		return ret;
	SCOPE_LOCK(&p->lock);
	p->pressed = state_get_u8(r) != 0;
	return state_reader_section_end(r, err);
}

static void power_reset(void *dev)
{
	struct power *p = dev;
	SCOPE_LOCK(&p->lock);
	p->pressed = false;
}

static void power_destroy(void *dev)
{
	struct power *p = dev;
	bus_remove(p->m->bus, BUS_PIO, POWER_SLEEP_CONTROL);
	bus_remove(p->m->bus, BUS_PIO, I8042_COMMAND);
	pci_bus_on_reset(p->m->pci, NULL, NULL);
	pthread_mutex_destroy(&p->lock);
	free(p);
}

static const struct device_ops power_ops = {
	.name = "power",
	.pause = power_pause,
	.resume = power_resume,
	.save = power_save,
	.load = power_load,
	.reset = power_reset,
	.destroy = power_destroy,
};

int power_create(struct machine *m, struct error *err)
{
	struct power *p = calloc(1, sizeof *p);
	if (!p)
		return error_errno(err, ENOMEM, "power");
	p->m = m;
	p->paused = true;
	pthread_mutex_init(&p->lock, NULL);
	struct bus_handler sleep = {.read = sleep_read, .write = sleep_write, .opaque = p};
	/* Reads of the controller's status give an idle one, or a guest waits before it pulses the reset
	 * line. */
	struct bus_handler i8042 = {.read = sleep_read, .write = i8042_write, .opaque = p};
	int ret = bus_add(m->bus, BUS_PIO, POWER_SLEEP_CONTROL, 2, &sleep, err);
	if (!ret)
		ret = bus_add(m->bus, BUS_PIO, I8042_COMMAND, 1, &i8042, err);
	if (!ret)
		ret = machine_add_device(m, &power_ops, p, err);
	if (ret) {
		power_destroy(p);
		return ret;
	}
	pci_bus_on_reset(m->pci, on_reset_register, p);
	m->power_device = p;
	return 0;
}
