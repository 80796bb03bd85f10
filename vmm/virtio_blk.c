/* SPDX-License-Identifier: Apache-2.0 */
/*
 * virtio block device (virtio 1.2, 5.2): read, write, flush, get-id, discard, write-zeroes, one queue.
 *
 * Saved:   what vmm/virtio_pci.h lists, nothing more. Rebuilt: configuration space, from the disk.
 * Requests in flight are not saved: the machine drains before it saves.
 *
 * Requests go straight from guest memory to the block layer; the guest may change a buffer while it is being
 * written, and whoever needs a stable copy (the mirror) makes one. Requests that overlap in flight are the
 * guest's own business, as on any disk.
 */
#include <errno.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_ids.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/log.h"
#include "vmm/virtio.h"
#include "vmm/virtio_pci.h"

#define SECTOR_SHIFT	   9
#define SECTOR_BYTES	   512u
#define HEADER_BYTES	   16u
#define SEGMENT_BYTES	   16u /* struct virtio_blk_discard_write_zeroes */
#define CONFIG_BYTES	   60u
#define SEG_MAX		   (VIRTQUEUE_CHAIN_MAX - 2) /* header and status take one each */
#define ZERO_SEGMENTS_MAX  16u
#define ZERO_SECTORS_MAX   (1u << 22)	  /* 2 GiB a segment */
#define TRANSFER_BYTES_MAX (256ull << 20) /* of one request; far above what drivers send */
#define PIECES_MAX	   1024u

struct virtio_blk {
	struct virtio_pci *v;
	struct block *blk;
	bool read_only;
	char id[VIRTIO_BLK_ID_BYTES + 1];
};

/* One guest request: one or more requests to the block layer that complete together. */
struct request {
	struct virtio_blk *d;
	struct virtqueue_segment status; /* the byte that tells the driver the outcome */
	uint16_t head;
	uint64_t in_bytes;  /* written to guest memory besides the status byte */
	unsigned remaining; /* pieces not completed; guarded by the device lock */
	int result;	    /* the first failure */
	unsigned nsegments, npieces;
	struct block_request *pieces; /* these three are parts of the same allocation */
	struct iovec *iov;
	struct virtqueue_segment segments[];
};

static struct request *request_new(struct virtio_blk *d, const struct virtqueue_chain *c, unsigned nsegments,
				   unsigned npieces, unsigned niov)
{
	size_t segments = nsegments * sizeof(struct virtqueue_segment);
	size_t pieces = npieces * sizeof(struct block_request);
	struct request *r = malloc(sizeof *r + segments + pieces + niov * sizeof(struct iovec));

	if (!r)
		return NULL;
	*r = (struct request){.d = d, .head = c->head, .npieces = npieces, .nsegments = nsegments};
	r->pieces = (struct block_request *)(void *)((char *)r->segments + segments);
	r->iov = (struct iovec *)(void *)((char *)r->pieces + pieces);
	memset(r->pieces, 0, pieces);
	r->status = c->seg[c->nout + c->nin - 1];
	r->status.gpa += r->status.len - 1;
	r->status.ptr += r->status.len - 1;
	r->status.len = 1;
	return r;
}

/* Lock held. written_bytes excludes the status byte. */
static void finish_now(struct virtio_blk *d, uint16_t head, const struct virtqueue_segment *status,
		       uint8_t code, uint64_t written_bytes)
{
	*status->ptr = code;
	guest_memory_mark_dirty(virtio_pci_memory(d->v), status->gpa, 1);
	virtqueue_push(virtio_pci_queue(d->v, 0), head, (uint32_t)written_bytes + 1);
	virtio_pci_signal(d->v, 0);
}

static uint8_t status_code(int result)
{
	return result == 0 ? VIRTIO_BLK_S_OK : result == -ENOTSUP ? VIRTIO_BLK_S_UNSUPP : VIRTIO_BLK_S_IOERR;
}

/* Lock held; the last piece is done. */
static void request_finish(struct request *r)
{
	struct guest_memory *mem = virtio_pci_memory(r->d->v);

	/* Also after a failure: some of the data may have landed. */
	for (unsigned i = 0; i < r->nsegments; i++)
		guest_memory_mark_dirty(mem, r->segments[i].gpa, r->segments[i].len);
	if (r->result < 0)
		log_debug("%s: request of type %d: %s", r->d->blk->label, (int)r->pieces[0].op,
			  strerror(-r->result));
	finish_now(r->d, r->head, &r->status, status_code(r->result), r->result == 0 ? r->in_bytes : 0);
	free(r);
}

/* Lock held. True when that was the last. */
static bool piece_done(struct request *r, int result)
{
	if (result < 0 && r->result == 0)
		r->result = result;
	return --r->remaining == 0;
}

static void on_done(struct block_request *req, int result)
{
	struct request *r = req->opaque;
	struct virtio_pci *v = r->d->v;
	bool last;

	virtio_pci_lock(v);
	last = piece_done(r, result);
	if (last)
		request_finish(r);
	virtio_pci_unlock(v);
	if (last)
		virtio_pci_inflight_end(v);
}

/* Lock held; a piece that completes meanwhile waits for it. */
static void request_submit(struct request *r)
{
	struct virtio_blk *d = r->d;

	virtio_pci_inflight_begin(d->v);
	r->remaining = r->npieces;
	for (unsigned i = 0, n = r->npieces; i < n; i++) {
		int rc;

		r->pieces[i].done = on_done;
		r->pieces[i].opaque = r;
		rc = block_submit(d->blk, &r->pieces[i]);
		if (rc < 0 && piece_done(r, rc)) {
			request_finish(r);
			virtio_pci_inflight_cancel(d->v);
			return;
		}
	}
}

static unsigned copy_segments(struct request *r, const struct virtqueue_chain *c, uint64_t len)
{
	unsigned n = 0;

	for (unsigned i = c->nout; i < c->nout + c->nin && len; i++, n++) {
		r->segments[n] = c->seg[i];
		if (r->segments[n].len > len)
			r->segments[n].len = (uint32_t)len;
		len -= r->segments[n].len;
	}
	return n;
}

static uint64_t piece_bytes(const struct virtio_blk *d)
{
	uint64_t max = d->blk->limits.max_transfer_bytes;

	return max ? max - max % SECTOR_BYTES : TRANSFER_BYTES_MAX;
}

/* 0 when submitted, else the status to give. */
static int start_transfer(struct virtio_blk *d, const struct virtqueue_chain *c, bool write, uint64_t sector)
{
	uint64_t len = write ? c->out_bytes - HEADER_BYTES : c->in_bytes - 1, piece = piece_bytes(d);
	uint64_t flush = virtio_pci_features(d->v) & UINT64_C(1) << VIRTIO_BLK_F_FLUSH;
	unsigned npieces, used = 0;
	struct request *r;

	if (write && d->read_only)
		return VIRTIO_BLK_S_IOERR;
	if (len == 0 || len % SECTOR_BYTES || len > TRANSFER_BYTES_MAX ||
	    sector > d->blk->size_bytes >> SECTOR_SHIFT ||
	    !range_fits(sector << SECTOR_SHIFT, len, d->blk->size_bytes))
		return VIRTIO_BLK_S_IOERR;
	npieces = (unsigned)((len + piece - 1) / piece);
	if (npieces > PIECES_MAX)
		return VIRTIO_BLK_S_IOERR;
	/* Each cut between pieces may split one segment into two. */
	r = request_new(d, c, write ? 0 : c->nin, npieces, (write ? c->nout : c->nin) + npieces);
	if (!r)
		return VIRTIO_BLK_S_IOERR;
	if (!write) {
		r->nsegments = copy_segments(r, c, len);
		r->in_bytes = len;
	}
	for (unsigned i = 0; i < npieces; i++) {
		uint64_t at = i * piece, n = len - at < piece ? len - at : piece;

		r->pieces[i].op = write ? BLOCK_WRITE : BLOCK_READ;
		/* A driver that does not know flush expects a disk that needs none (5.2.6.2). */
		r->pieces[i].flags = write && !flush ? BLOCK_REQ_FUA : 0;
		r->pieces[i].offset_bytes = (sector << SECTOR_SHIFT) + at;
		r->pieces[i].len_bytes = n;
		r->pieces[i].iov = r->iov + used;
		r->pieces[i].niov =
			virtqueue_chain_iov(c, !write, at + (write ? HEADER_BYTES : 0), n, r->iov + used);
		used += (unsigned)r->pieces[i].niov;
	}
	request_submit(r);
	return 0;
}

struct zero_range {
	uint64_t offset_bytes, len_bytes;
	bool unmap;
};

static int parse_ranges(struct virtio_blk *d, const struct virtqueue_chain *c, bool discard,
			struct zero_range *range, unsigned *n)
{
	uint64_t bytes = c->out_bytes - HEADER_BYTES;

	if (bytes == 0 || bytes % SEGMENT_BYTES || bytes / SEGMENT_BYTES > ZERO_SEGMENTS_MAX)
		return VIRTIO_BLK_S_IOERR;
	*n = (unsigned)(bytes / SEGMENT_BYTES);
	for (unsigned i = 0; i < *n; i++) {
		uint8_t raw[SEGMENT_BYTES];
		uint64_t sector;
		uint32_t sectors, flags;

		virtqueue_chain_read(c, HEADER_BYTES + i * SEGMENT_BYTES, raw, sizeof raw);
		sector = get_le64(raw);
		sectors = get_le32(raw + 8);
		flags = get_le32(raw + 12);
		if (flags & ~(discard ? 0u : (uint32_t)VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP))
			return VIRTIO_BLK_S_UNSUPP;
		if (sectors == 0 || sectors > ZERO_SECTORS_MAX ||
		    sector > d->blk->size_bytes >> SECTOR_SHIFT ||
		    !range_fits(sector << SECTOR_SHIFT, (uint64_t)sectors << SECTOR_SHIFT,
				d->blk->size_bytes))
			return VIRTIO_BLK_S_IOERR;
		range[i] = (struct zero_range){sector << SECTOR_SHIFT, (uint64_t)sectors << SECTOR_SHIFT,
					       flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP};
	}
	return 0;
}

static uint64_t zero_piece_bytes(const struct virtio_blk *d)
{
	uint64_t max = d->blk->limits.max_zeroes_bytes;

	return max >= SECTOR_BYTES ? max - max % SECTOR_BYTES : UINT64_MAX;
}

static int start_zeroes(struct virtio_blk *d, const struct virtqueue_chain *c, bool discard)
{
	struct zero_range range[ZERO_SEGMENTS_MAX];
	uint64_t piece = zero_piece_bytes(d), npieces = 0;
	uint64_t flush = virtio_pci_features(d->v) & UINT64_C(1) << VIRTIO_BLK_F_FLUSH;
	unsigned n, at = 0;
	struct request *r;
	int rc;

	if (d->read_only)
		return VIRTIO_BLK_S_IOERR;
	rc = parse_ranges(d, c, discard, range, &n);
	if (rc)
		return rc;
	for (unsigned i = 0; i < n; i++)
		npieces += (range[i].len_bytes - 1) / piece + 1;
	if (npieces > PIECES_MAX)
		return VIRTIO_BLK_S_IOERR;
	r = request_new(d, c, 0, (unsigned)npieces, 0);
	if (!r)
		return VIRTIO_BLK_S_IOERR;
	for (unsigned i = 0; i < n; i++) {
		for (uint64_t done = 0; done < range[i].len_bytes; at++) {
			uint64_t left = range[i].len_bytes - done;

			r->pieces[at].op = discard ? BLOCK_DISCARD : BLOCK_WRITE_ZEROES;
			r->pieces[at].flags =
				(range[i].unmap ? BLOCK_REQ_MAY_UNMAP : 0u) | (flush ? 0u : BLOCK_REQ_FUA);
			r->pieces[at].offset_bytes = range[i].offset_bytes + done;
			r->pieces[at].len_bytes = left < piece ? left : piece;
			done += r->pieces[at].len_bytes;
		}
	}
	request_submit(r);
	return 0;
}

static int start_flush(struct virtio_blk *d, const struct virtqueue_chain *c)
{
	struct request *r = request_new(d, c, 0, 1, 0);

	if (!r)
		return VIRTIO_BLK_S_IOERR;
	r->pieces[0].op = BLOCK_FLUSH;
	request_submit(r);
	return 0;
}

/* Lock held. */
static void start(struct virtio_blk *d, const struct virtqueue_chain *c)
{
	struct virtqueue_segment status;
	uint8_t header[HEADER_BYTES];
	uint64_t written = 0;
	uint32_t type;
	int rc;

	/* The chain may be cut into descriptors anywhere: header first, status in the last writable byte. */
	if (!virtqueue_chain_read(c, 0, header, sizeof header) || c->in_bytes == 0) {
		virtio_pci_broken(d->v, "request without a header or a status byte");
		return;
	}
	status = c->seg[c->nout + c->nin - 1];
	status.gpa += status.len - 1;
	status.ptr += status.len - 1;
	type = get_le32(header);
	switch (type) {
	case VIRTIO_BLK_T_IN:
	case VIRTIO_BLK_T_OUT:
		rc = start_transfer(d, c, type == VIRTIO_BLK_T_OUT, get_le64(header + 8));
		break;
	case VIRTIO_BLK_T_FLUSH:
		rc = start_flush(d, c);
		break;
	case VIRTIO_BLK_T_DISCARD:
	case VIRTIO_BLK_T_WRITE_ZEROES:
		rc = start_zeroes(d, c, type == VIRTIO_BLK_T_DISCARD);
		break;
	case VIRTIO_BLK_T_GET_ID:
		written = c->in_bytes - 1 < VIRTIO_BLK_ID_BYTES ? c->in_bytes - 1 : VIRTIO_BLK_ID_BYTES;
		virtqueue_chain_write(virtio_pci_memory(d->v), c, 0, d->id, written);
		finish_now(d, c->head, &status, VIRTIO_BLK_S_OK, written);
		return;
	default:
		rc = VIRTIO_BLK_S_UNSUPP;
	}
	if (rc)
		finish_now(d, c->head, &status, (uint8_t)rc, 0);
}

static void process(void *dev, unsigned queue)
{
	struct virtio_blk *d = dev;
	const struct virtqueue_chain *c;

	do {
		while ((c = virtio_pci_pop(d->v, queue)))
			start(d, c);
	} while (virtio_pci_running(d->v) && virtqueue_rearm(virtio_pci_queue(d->v, queue)));
}

static void config_read(void *dev, uint8_t *config)
{
	const struct virtio_blk *d = dev;
	uint32_t zero_sectors = ZERO_SECTORS_MAX;

	put_le64(config, d->blk->size_bytes >> SECTOR_SHIFT);
	put_le32(config + offsetof(struct virtio_blk_config, seg_max), SEG_MAX);
	put_le32(config + offsetof(struct virtio_blk_config, blk_size), SECTOR_BYTES);
	put_le16(config + offsetof(struct virtio_blk_config, num_queues), 1);
	put_le32(config + offsetof(struct virtio_blk_config, max_discard_sectors), zero_sectors);
	put_le32(config + offsetof(struct virtio_blk_config, max_discard_seg), ZERO_SEGMENTS_MAX);
	put_le32(config + offsetof(struct virtio_blk_config, discard_sector_alignment), 8);
	put_le32(config + offsetof(struct virtio_blk_config, max_write_zeroes_sectors), zero_sectors);
	put_le32(config + offsetof(struct virtio_blk_config, max_write_zeroes_seg), ZERO_SEGMENTS_MAX);
	config[offsetof(struct virtio_blk_config, write_zeroes_may_unmap)] = 1;
}

static void destroy(void *dev)
{
	free(dev);
}

#define BLK_FEATURES                                                                                         \
	(UINT64_C(1) << VIRTIO_BLK_F_SEG_MAX | UINT64_C(1) << VIRTIO_BLK_F_BLK_SIZE |                        \
	 UINT64_C(1) << VIRTIO_BLK_F_FLUSH)
#define BLK_OPS(more)                                                                                        \
	{                                                                                                    \
		.device_type = VIRTIO_ID_BLOCK, .class_code = 0x01, .subclass = 0x00, .nqueues = 1,          \
		.features = BLK_FEATURES | (more), .config_bytes = CONFIG_BYTES, .config_read = config_read, \
		.process = process, .destroy = destroy                                                       \
	}

static const struct virtio_device_ops ops_writable =
	BLK_OPS(UINT64_C(1) << VIRTIO_BLK_F_DISCARD | UINT64_C(1) << VIRTIO_BLK_F_WRITE_ZEROES);
static const struct virtio_device_ops ops_read_only = BLK_OPS(UINT64_C(1) << VIRTIO_BLK_F_RO);

int virtio_blk_create(struct machine *m, uint8_t slot, const char *id, struct block *blk, bool read_only,
		      struct error *err)
{
	CLEANUP_FREE struct virtio_blk *d = calloc(1, sizeof *d);
	char section[STATE_NAME_BYTES], label[64];

	snprintf(label, sizeof label, "disk %s", id);
	if (!d)
		return error_errno(err, ENOMEM, "%s", label);
	if (blk->size_bytes % SECTOR_BYTES || blk->limits.request_alignment > SECTOR_BYTES)
		return error_set(err, EINVAL, "%s: size %llu or alignment %u does not suit 512-byte sectors",
				 label, (unsigned long long)blk->size_bytes, blk->limits.request_alignment);
	if (blk->limits.max_transfer_bytes && blk->limits.max_transfer_bytes < SECTOR_BYTES)
		return error_set(err, EINVAL, "%s: largest transfer is below one sector", label);
	d->blk = blk;
	d->read_only = read_only || blk->limits.read_only;
	snprintf(d->id, sizeof d->id, "%.*s", VIRTIO_BLK_ID_BYTES, id);
	virtio_pci_section(section, "virtio-blk", id, slot);
	struct virtio_blk *taken = steal_ptr(d);
	return virtio_pci_add(m, slot, section, label, taken->read_only ? &ops_read_only : &ops_writable,
			      taken, &taken->v, err);
}
