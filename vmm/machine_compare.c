/* SPDX-License-Identifier: Apache-2.0 */
/* Whether a machine holds the state that it was given: it is saved again, and compared by sections. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "vmm/machine_internal.h"

struct both {
	struct machine *m;
	struct state_writer *now;
	struct state_reader *was, *is;
};

static void both_release(struct both *b)
{
	state_reader_free(b->was);
	state_reader_free(b->is);
	state_writer_free(b->now);
}

/* Of a section in which every byte counts. */
static int bytes_differ(const struct both *b, const struct state_view *was, struct error *err)
{
	struct state_view is;
	uint32_t i = 0;
	while (state_reader_view(b->is, i, &is) && strcmp(is.name, was->name))
		i++;
	if (!state_reader_view(b->is, i, &is))
		return error_set(err, EBADMSG, "section %s is not there any more", was->name);
	if (is.len != was->len)
		return error_set(err, EBADMSG, "section %s: %zu bytes were loaded, %zu are there", was->name,
				 was->len, is.len);
	for (size_t at = 0; at < is.len; at++)
		if (is.payload[at] != was->payload[at])
			return error_set(
				err, EBADMSG,
				"section %s differs at byte %zu of %zu: 0x%02x was loaded, 0x%02x is there",
				was->name, at, is.len, was->payload[at], is.payload[at]);
	return 0;
}

/* Those with clocks in them are compared by parts. */
static int section_differs(const struct both *b, const struct state_view *was, struct error *err)
{
	if (!strcmp(was->name, "kvm"))
		return kvm_irqchip_differ(b->was, b->is, err);
	for (unsigned i = 0; i < b->m->ncpus; i++) {
		char name[STATE_NAME_BYTES];
		snprintf(name, sizeof name, "cpu.%u", i);
		if (!strcmp(was->name, name))
			return vcpu_differ(&b->m->vcpus[i], b->was, b->is, err);
	}
	return bytes_differ(b, was, err);
}

int machine_compare(struct machine *m, const void *buf, size_t len, unsigned *nsections, struct error *err)
{
	CLEANUP(both_release) struct both b = {.m = m, .now = state_writer_create()};
	struct state_view was;
	const uint8_t *now;
	size_t now_len;
	if (!b.now)
		return error_errno(err, ENOMEM, "machine state");
	int ret = machine_save(m, b.now, err);
	if (!ret)
		ret = state_writer_finish(b.now, &now, &now_len, err);
	if (!ret)
		ret = state_reader_open(buf, len, &b.was, err);
	if (!ret)
		ret = state_reader_open(now, now_len, &b.is, err);
	for (*nsections = 0; !ret && state_reader_view(b.was, *nsections, &was); ++*nsections)
		ret = section_differs(&b, &was, err);
	if (!ret && state_reader_view(b.is, *nsections, &was))
		ret = error_set(err, EBADMSG, "there are more sections than were loaded");
	return ret ? error_prefix(err, "device state") : 0;
}
