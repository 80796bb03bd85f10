/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>

#include "vmm/machine_internal.h"
#include "vmm/virtio.h"

bool machine_balloon(struct machine *m, struct machine_balloon *out)
{
	if (m->balloon)
		virtio_balloon_state(m->balloon, out);
	return m->balloon;
}

int machine_balloon_set(struct machine *m, uint64_t bytes, struct error *err)
{
	if (!m->balloon)
		return error_set(err, ENOTSUP, "it has no balloon");
	if (bytes > m->mem.size_bytes)
		return error_set(err, EINVAL, "%llu MiB are more than the %llu MiB that it has",
				 (unsigned long long)(bytes >> 20),
				 (unsigned long long)(m->mem.size_bytes >> 20));
	virtio_balloon_set_target(m->balloon, m->mem.size_bytes - bytes);
	return 0;
}
