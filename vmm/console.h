/* SPDX-License-Identifier: Apache-2.0 */
/* Where a serial port's bytes go and come from: a Unix socket, a file or stdio. */
#ifndef VMM_CONSOLE_H
#define VMM_CONSOLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "vmm/state.h"

struct console;

struct console_input {
	/* On the console's thread: room for how many bytes, and their delivery. */
	size_t (*room)(void *opaque);
	void (*deliver)(void *opaque, const uint8_t *bytes, size_t n);
	void *opaque;
};

/* spec: "socket" (run_dir/console.sock), "file:PATH", "stdio"; NULL is "socket". Starts paused. */
int console_create(const char *spec, const char *run_dir, const struct console_input *in,
		   struct console **out, struct error *err);
void console_destroy(struct console *c);
/* Never blocks. The last 64 KiB are kept for whoever connects later; a reader that falls further behind loses
 * bytes. */
void console_put(struct console *c, uint8_t byte);
/* There is room for input again. Any thread. */
void console_wake(struct console *c);
/* While paused bytes are kept and none leave; those put before the pause still do. */
void console_pause(struct console *c);
/* Waits until what was put before the pause has left, but not for a reader that does not read. 0 or
 * -ETIMEDOUT. */
int console_drain(struct console *c, unsigned timeout_ms);
void console_resume(struct console *c);
/* The kept bytes, inside the caller's section. */
void console_save(struct console *c, struct state_writer *w);
int console_load(struct console *c, struct state_reader *r, struct error *err);

#endif
