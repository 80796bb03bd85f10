/* SPDX-License-Identifier: Apache-2.0 */
#include "block/open.h"

#include <errno.h>
#include <string.h>

#include "base/cleanup.h"
#include "block/qcow2.h"
#include "block/raw.h"

static const char *const names[] = {
	[BLOCK_FORMAT_RAW] = "raw",
	[BLOCK_FORMAT_QCOW2] = "qcow2",
};

const char *block_format_name(enum block_format format)
{
	return (unsigned)format < ARRAY_SIZE(names) ? names[format] : "unknown";
}

int block_format_parse(const char *name, enum block_format *format)
{
	for (unsigned i = 0; i < ARRAY_SIZE(names); i++) {
		if (strcmp(name, names[i]) == 0) {
			*format = (enum block_format)i;
			return 0;
		}
	}
	return -EINVAL;
}

int block_open(const char *path, const struct block_open_options *opt, struct block **out, struct error *err)
{
	*out = NULL;
	return opt->format == BLOCK_FORMAT_QCOW2 ? qcow2_open(path, opt, out, err)
						 : raw_open(path, opt, out, err);
}
