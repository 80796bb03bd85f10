/* SPDX-License-Identifier: Apache-2.0 */
#include "block/chain.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "block/image.h"
#include "block/raw.h"

static const char *last_part(const char *path)
{
	const char *slash = strrchr(path, '/');
	return slash ? slash + 1 : path;
}

static int open_layer(const char *path, enum block_format format, bool read_only,
		      const struct block_open_options *opt, struct image_chain *chain, struct error *err)
{
	struct chain_layer *layer = &chain->layers[chain->nlayers];
	*layer = (struct chain_layer){.format = format};
	CLEANUP_FD int fd = open(path, (read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
	if (fd < 0)
		return error_errno(err, errno, "%s: open", path);
	struct stat st;
	if (fstat(fd, &st))
		return error_errno(err, errno, "%s: stat", path);
	if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
		return error_set(err, EINVAL, "%s: neither a regular file nor a block device", path);
	layer->is_device = S_ISBLK(st.st_mode);
	if (chain->direct && opt->direct) {
		int probe = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC | O_NONBLOCK);
		chain->direct = probe >= 0;
		if (probe >= 0)
			close(probe);
	}
	/* A raw file below others, too, is locked beside QEMU's lock bytes, which its processes need on it.
	 */
	int rc = block_lock_fd(fd, path, BLOCK_FORMAT_QCOW2, read_only, err);
	if (rc)
		return rc;
	layer->fd = fd;
	if (format == BLOCK_FORMAT_QCOW2) {
		rc = qcow2_header_read(fd, &layer->head, err);
		if (!rc)
			rc = chain_layer_check(layer, err);
	}
	if (rc)
		return error_prefix(err, "%s", path);
	layer->fd = steal_fd(&fd);
	chain->nlayers++;
	return 0;
}

/* What the image at path says of its backing file and the next name of the list must agree. */
static int check_backing(const char *path, const struct qcow2_header *head, const char *below,
			 enum block_format *format, struct error *err)
{
	if (!head->has_backing && below)
		return error_set(err, EINVAL, "%s has no backing file, but %s is given as one", path, below);
	if (!below)
		return error_set(err, ENOTSUP,
				 "%s has a backing file, %s, which the definition does not name: add backing "
				 "= with its absolute path",
				 path, head->backing_name);
	if (strcmp(last_part(head->backing_name), last_part(below)) != 0)
		return error_set(err, EINVAL,
				 "%s has the backing file %s, but %s is given (qemu-img rebase -u changes "
				 "the image's word)",
				 path, head->backing_name, below);
	if (block_format_parse(head->backing_format, format))
		return error_set(err, ENOTSUP,
				 "%s says \"%s\" of its backing file's format: raw or qcow2 is needed "
				 "(qemu-img rebase -u -F)",
				 path, head->backing_format);
	return 0;
}

int chain_open(const char *path, const struct block_open_options *opt, struct image_chain *chain,
	       struct error *err)
{
	*chain = (struct image_chain){.direct = opt->direct};
	if (opt->nbacking > BLOCK_BACKING_MAX)
		return error_set(err, EINVAL, "%s: more than %d backing files", path, BLOCK_BACKING_MAX);
	const char *upper = path;
	enum block_format format = BLOCK_FORMAT_QCOW2;
	int rc = open_layer(path, format, opt->read_only, opt, chain, err);
	for (unsigned i = 0; !rc; i++) {
		const struct chain_layer *above = &chain->layers[chain->nlayers - 1];
		const char *below = i < opt->nbacking ? opt->backing[i] : NULL;
		bool may = format == BLOCK_FORMAT_QCOW2 && above->head.has_backing;
		if (!may && !below)
			break;
		rc = check_backing(upper, &above->head, below, &format, err);
		if (!rc)
			rc = open_layer(below, format, true, opt, chain, err);
		upper = below;
	}
	if (rc)
		chain_close(chain);
	return rc;
}

void chain_close(struct image_chain *chain)
{
	for (unsigned i = 0; i < chain->nlayers; i++)
		close(chain->layers[i].fd);
	chain->nlayers = 0;
}

static size_t describe_layer(const struct chain_layer *layer, int fd, char *out, size_t size)
{
	return (size_t)snprintf(
		out, size,
		"{\"driver\":\"%s\",\"file\":{\"driver\":\"%s\",\"filename\":\"/proc/self/fd/%d\"}",
		block_format_name(layer->format), layer->is_device ? "host_device" : "file", fd);
}

void chain_describe(const struct image_chain *chain, int first_fd, char out[CHAIN_TEXT_BYTES])
{
	size_t at = (size_t)snprintf(out, CHAIN_TEXT_BYTES, "json:");
	for (unsigned i = 0; i < chain->nlayers; i++) {
		if (i)
			at += (size_t)snprintf(out + at, CHAIN_TEXT_BYTES - at, ",\"backing\":");
		at += describe_layer(&chain->layers[i], first_fd + (int)i, out + at, CHAIN_TEXT_BYTES - at);
	}
	/* QEMU follows no name that an image contains. */
	if (chain->layers[chain->nlayers - 1].format == BLOCK_FORMAT_QCOW2)
		at += (size_t)snprintf(out + at, CHAIN_TEXT_BYTES - at, ",\"backing\":null");
	for (unsigned i = 0; i < chain->nlayers; i++)
		out[at++] = '}';
	out[at] = '\0';
}

int chain_layer_check(struct chain_layer *layer, struct error *err)
{
	int rc = qcow2_header_usable(&layer->head, err);
	return rc ? rc : block_qcow2_check(layer->fd, layer->is_device, &layer->head, err);
}
