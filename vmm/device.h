/* SPDX-License-Identifier: Apache-2.0 */
/* interface: what every device of a machine can do */
#ifndef VMM_DEVICE_H
#define VMM_DEVICE_H

#include <stdint.h>

#include "base/error.h"
#include "vmm/state.h"

/*
 * Life: created paused -> resume -> pause -> drain -> save ...; on a destination: created paused -> load ->
 * (vCPUs run while the device is still paused: the effects gate of the handover) -> resume.
 *
 * While a device is paused register and config accesses work, but nothing leaves and nothing is taken from a
 * queue: no disk request is submitted, no packet or console byte goes out. resume() looks at every queue
 * again and raises every queue interrupt once, so that nothing lost in between matters.
 */
struct device_ops {
	const char *name;
	/* vCPUs are stopped (or the gate is closed). After it returns the device starts nothing new. Fast. */
	void (*pause)(void *dev);
	/* Waits until all requests in flight have completed into guest memory. 0 or -ETIMEDOUT. Optional. */
	int (*drain)(void *dev, unsigned timeout_ms);
	void (*resume)(void *dev);
	/* One or more sections, named by instance ("virtio-blk.root"). vCPUs stopped, drained. */
	int (*save)(void *dev, struct state_writer *w, struct error *err);
	int (*load)(void *dev, struct state_reader *r, struct error *err);
	/* Guest reset: back to power-on; paused at the time. Optional. */
	void (*reset)(void *dev);
	void (*destroy)(void *dev);
};

struct machine;
/* The machine calls the ops from then on, in order of addition (destroy in reverse). */
int machine_add_device(struct machine *m, const struct device_ops *ops, void *dev, struct error *err);

#endif
