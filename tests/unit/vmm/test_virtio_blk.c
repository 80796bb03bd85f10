/* SPDX-License-Identifier: Apache-2.0 */
#include "virtio_rig.h"

#include <fcntl.h>
#include <linux/virtio_blk.h>
#include <pthread.h>
#include <unistd.h>

#include "block/block.h"
#include "block/open.h"
#include "tests/suite.h"

#define DISK_BYTES (4u << 20)
#define EVENT_IDX  (UINT64_C(1) << VIRTIO_RING_F_EVENT_IDX)
#define INDIRECT   (UINT64_C(1) << VIRTIO_RING_F_INDIRECT_DESC)
#define FLUSH	   (UINT64_C(1) << VIRTIO_BLK_F_FLUSH)
#define ZEROES	   (UINT64_C(1) << VIRTIO_BLK_F_WRITE_ZEROES | UINT64_C(1) << VIRTIO_BLK_F_DISCARD)

/*
 * A block layer that completes when the test lets it: requests wait in a list until the gate is open, and are
 * then passed on to the real disk below.
 */
struct gate {
	struct block blk;
	struct block *below;
	pthread_mutex_t lock;
	bool open;
	struct block_request *held[256];
	unsigned nheld, submitted, flags_seen;
	enum block_op ops_seen[256];
};

static int gate_submit(struct block *blk, struct block_request *req)
{
	struct gate *g = (struct gate *)(void *)blk;
	SCOPE_LOCK(&g->lock);

	g->ops_seen[g->submitted++ % 256] = req->op;
	g->flags_seen |= req->flags;
	if (g->open)
		return block_submit(g->below, req);
	g->held[g->nheld++] = req;
	return 0;
}

static void gate_close(struct block *blk)
{
}

static const struct block_ops gate_ops = {.name = "gate", .submit = gate_submit, .close = gate_close};

static unsigned gate_held(struct gate *g)
{
	SCOPE_LOCK(&g->lock);
	return g->nheld;
}

static unsigned gate_submitted(struct gate *g)
{
	SCOPE_LOCK(&g->lock);
	return g->submitted;
}

static void gate_release(struct gate *g)
{
	SCOPE_LOCK(&g->lock);
	for (unsigned i = 0; i < g->nheld; i++)
		ck_assert_int_eq(block_submit(g->below, g->held[i]), 0);
	g->nheld = 0;
	g->open = true;
}

static struct rig r;
static struct gate gate;
static struct block *disk;
static char path[] = "/tmp/snm-blk-XXXXXX";

static void open_disk(bool read_only)
{
	struct block_open_options opt = {
		.format = BLOCK_FORMAT_RAW, .read_only = read_only, .label = "disk t"};
	struct error err = ERROR_INIT;

	ck_assert_msg(block_open(path, &opt, &disk, &err) == 0, "%s", err.message);
	memset(&gate, 0, sizeof gate);
	gate.blk = *disk;
	gate.blk.ops = &gate_ops;
	gate.below = disk;
	gate.open = true;
	pthread_mutex_init(&gate.lock, NULL);
}

static void setup_disk(bool read_only)
{
	struct error err = ERROR_INIT;
	int fd;

	memcpy(path + strlen(path) - 6, "XXXXXX", 6);
	fd = mkstemp(path);
	ck_assert_int_ge(fd, 0);
	ck_assert_int_eq(ftruncate(fd, DISK_BYTES), 0);
	close(fd);
	open_disk(read_only);
	rig_init(&r);
	ck_assert_msg(virtio_blk_create(r.m, RIG_SLOT, "t", &gate.blk, false, &err) == 0, "%s", err.message);
	rig_probe(&r);
}

static void setup(void)
{
	setup_disk(false);
}

static void teardown(void)
{
	rig_free(&r);
	block_close(disk);
	unlink(path);
}

struct blk_io {
	uint64_t header, data, status;
	uint32_t len;
	uint16_t head;
};

static struct blk_io queue_io(uint32_t type, uint64_t sector, uint32_t len, bool in, bool indirect)
{
	struct blk_io io = {.header = rig_alloc(&r, 16), .data = rig_alloc(&r, len + 1), .len = len};
	struct rig_buffer b[3];
	unsigned n = 0;
	uint8_t *h = rig_ptr(&r, io.header);

	io.status = rig_alloc(&r, 1);
	put_le32(h, type);
	put_le32(h + 4, 0);
	put_le64(h + 8, sector);
	*rig_ptr(&r, io.status) = 0xee;
	b[n++] = (struct rig_buffer){io.header, 16, false};
	if (len)
		b[n++] = (struct rig_buffer){io.data, len, in};
	b[n++] = (struct rig_buffer){io.status, 1, true};
	io.head = indirect ? rig_add_indirect(&r, 0, b, n) : rig_add(&r, 0, b, n);
	return io;
}

static uint8_t io_status(const struct blk_io *io)
{
	return *rig_ptr(&r, io->status);
}

/* One request from start to end. */
static uint8_t do_io(uint32_t type, uint64_t sector, void *buf, uint32_t len, bool in)
{
	struct blk_io io = queue_io(type, sector, len, in, false);
	uint32_t used_len;

	if (!in && len)
		memcpy(rig_ptr(&r, io.data), buf, len);
	rig_kick(&r, 0);
	ck_assert_uint_eq(rig_take_used(&r, 0, &used_len), io.head);
	if (in && buf)
		memcpy(buf, rig_ptr(&r, io.data), len);
	if (io_status(&io) == VIRTIO_BLK_S_OK)
		ck_assert_uint_eq(used_len, (in ? len : 0) + 1);
	r.next_buffer = 0x200000;
	return io_status(&io);
}

static uint8_t range_request(uint32_t type, uint64_t sector, uint32_t sectors, uint32_t flags)
{
	uint8_t seg[16];

	put_le64(seg, sector);
	put_le32(seg + 8, sectors);
	put_le32(seg + 12, flags);
	return do_io(type, 0, seg, sizeof seg, false);
}

START_TEST(test_config_and_features)
{
	uint64_t f = rig_offered(&r);

	ck_assert_uint_eq(rig_config_read(&r, 0, 4), 0x10421af4);
	ck_assert(f & UINT64_C(1) << VIRTIO_F_VERSION_1);
	ck_assert(f & FLUSH && (f & ZEROES) == ZEROES && f & EVENT_IDX && f & INDIRECT);
	ck_assert_uint_eq(rig_read(&r, r.device, 4), DISK_BYTES / 512);
	ck_assert_uint_eq(rig_read(&r, r.device + 12, 4), 254);
	ck_assert_uint_eq(rig_read(&r, r.device + 20, 4), 512);
	ck_assert_uint_eq(rig_read(&r, r.device + 34, 2), 1);
	/* beyond the device's configuration */
	ck_assert_uint_eq(rig_read(&r, r.device + 60, 4), 0);
	/* a feature that was not offered keeps FEATURES_OK clear */
	rig_set_status(&r, 3);
	rig_write(&r, r.common + VIRTIO_PCI_COMMON_GFSELECT, 1, 4);
	rig_write(&r, r.common + VIRTIO_PCI_COMMON_GF, 0xffffffff, 4);
	rig_set_status(&r, 3 | VIRTIO_CONFIG_S_FEATURES_OK);
	ck_assert_uint_eq(rig_status(&r), 3);
}
END_TEST

START_TEST(test_pci_config_access_window)
{
	rig_config_write(&r, r.cfg_cap + 4, 0, 1);
	rig_config_write(&r, r.cfg_cap + 8, (uint32_t)(r.device - r.bar), 4);
	rig_config_write(&r, r.cfg_cap + 12, 4, 4);
	ck_assert_uint_eq(rig_config_read(&r, r.cfg_cap + 16, 4), DISK_BYTES / 512);
	rig_config_write(&r, r.cfg_cap + 8, (uint32_t)(r.common - r.bar) + VIRTIO_PCI_COMMON_STATUS, 4);
	rig_config_write(&r, r.cfg_cap + 12, 1, 4);
	rig_config_write(&r, r.cfg_cap + 16, 1, 1);
	ck_assert_uint_eq(rig_status(&r), 1);
	/* outside the BAR: nothing happens */
	rig_config_write(&r, r.cfg_cap + 8, 0xfffffffc, 4);
	rig_config_write(&r, r.cfg_cap + 12, 4, 4);
	ck_assert_uint_eq(rig_config_read(&r, r.cfg_cap + 16, 4), 0);
}
END_TEST

START_TEST(test_read_write_flush_id)
{
	uint8_t out[8192], in[8192];

	for (unsigned i = 0; i < sizeof out; i++)
		out[i] = (uint8_t)(i * 7 + i / 256);
	RIG_RESUME(&r);
	rig_start_driver(&r, FLUSH | ZEROES, 1);
	ck_assert_uint_eq(do_io(VIRTIO_BLK_T_OUT, 100, out, sizeof out, false), VIRTIO_BLK_S_OK);
	ck_assert_uint_eq(do_io(VIRTIO_BLK_T_IN, 100, in, sizeof in, true), VIRTIO_BLK_S_OK);
	ck_assert_int_eq(memcmp(in, out, sizeof in), 0);
	ck_assert_uint_eq(do_io(VIRTIO_BLK_T_FLUSH, 0, NULL, 0, false), VIRTIO_BLK_S_OK);
	ck_assert_uint_eq(do_io(VIRTIO_BLK_T_GET_ID, 0, in, 20, true), VIRTIO_BLK_S_OK);
	ck_assert_str_eq((char *)in, "t");
	ck_assert_uint_eq(gate.flags_seen & BLOCK_REQ_FUA, 0);
	RIG_UNTIL(rig_interrupts(1) == 4);
	/* the raw file has it */
	{
		CLEANUP_FD int fd = open(path, O_RDONLY);
		ck_assert_int_eq(pread(fd, in, sizeof in, 100 * 512), sizeof in);
		ck_assert_int_eq(memcmp(in, out, sizeof in), 0);
	}
}
END_TEST

START_TEST(test_without_flush_writes_are_durable)
{
	uint8_t out[512] = {1};

	RIG_RESUME(&r);
	rig_start_driver(&r, 0, 1);
	ck_assert_uint_eq(do_io(VIRTIO_BLK_T_OUT, 0, out, sizeof out, false), VIRTIO_BLK_S_OK);
	ck_assert(gate.flags_seen & BLOCK_REQ_FUA);
}
END_TEST

START_TEST(test_discard_and_zeroes)
{
	uint8_t out[4096], in[4096], zero[4096] = {0};

	memset(out, 0xa5, sizeof out);
	RIG_RESUME(&r);
	rig_start_driver(&r, FLUSH | ZEROES, 1);
	for (unsigned i = 0; i < 4; i++)
		ck_assert_uint_eq(do_io(VIRTIO_BLK_T_OUT, i * 8, out, sizeof out, false), VIRTIO_BLK_S_OK);
	ck_assert_uint_eq(range_request(VIRTIO_BLK_T_DISCARD, 0, 8, 0), VIRTIO_BLK_S_OK);
	ck_assert_uint_eq(gate.flags_seen & BLOCK_REQ_MAY_UNMAP, 0);
	ck_assert_uint_eq(range_request(VIRTIO_BLK_T_WRITE_ZEROES, 8, 8, 1), VIRTIO_BLK_S_OK);
	ck_assert_uint_ne(gate.flags_seen & BLOCK_REQ_MAY_UNMAP, 0);
	for (unsigned i = 0; i < 4; i++) {
		ck_assert_uint_eq(do_io(VIRTIO_BLK_T_IN, i * 8, in, sizeof in, true), VIRTIO_BLK_S_OK);
		ck_assert_int_eq(memcmp(in, i < 2 ? zero : out, sizeof in), 0);
	}
	ck_assert_uint_eq(range_request(VIRTIO_BLK_T_DISCARD, 0, 8, 1), VIRTIO_BLK_S_UNSUPP);
	ck_assert_uint_eq(range_request(VIRTIO_BLK_T_WRITE_ZEROES, 0, 8, 2), VIRTIO_BLK_S_UNSUPP);
	ck_assert_uint_eq(range_request(VIRTIO_BLK_T_DISCARD, DISK_BYTES / 512 - 1, 2, 0),
			  VIRTIO_BLK_S_IOERR);
	ck_assert_uint_eq(range_request(VIRTIO_BLK_T_DISCARD, UINT64_MAX, 8, 0), VIRTIO_BLK_S_IOERR);
	ck_assert_uint_eq(rig_status(&r) & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
}
END_TEST

/* Many segments and a small limit of the block layer: one guest request, many pieces, one completion. */
START_TEST(test_split_requests_complete_together)
{
	uint8_t seg[16 * 4], out[8192], in[8192];

	gate.blk.limits.max_zeroes_bytes = 1024;
	gate.blk.limits.max_transfer_bytes = 2048 + 100;
	RIG_RESUME(&r);
	rig_start_driver(&r, FLUSH | ZEROES, 1);
	for (unsigned i = 0; i < sizeof out; i++)
		out[i] = (uint8_t)(i / 512 + 1);
	ck_assert_uint_eq(do_io(VIRTIO_BLK_T_OUT, 0, out, sizeof out, false), VIRTIO_BLK_S_OK);
	ck_assert_uint_eq(gate_submitted(&gate), 4);
	for (unsigned i = 0; i < 4; i++) {
		put_le64(seg + 16 * i, 4 * i);
		put_le32(seg + 16 * i + 8, 3);
		put_le32(seg + 16 * i + 12, 0);
	}
	ck_assert_uint_eq(do_io(VIRTIO_BLK_T_DISCARD, 0, seg, sizeof seg, false), VIRTIO_BLK_S_OK);
	ck_assert_uint_eq(gate_submitted(&gate), 4 + 4 * 2);
	ck_assert_uint_eq(rig_used_idx(&r, 0), 2);
	ck_assert_uint_eq(do_io(VIRTIO_BLK_T_IN, 0, in, sizeof in, true), VIRTIO_BLK_S_OK);
	for (unsigned i = 0; i < sizeof in; i++)
		ck_assert_uint_eq(in[i], i / 512 % 4 == 3 ? out[i] : 0);
}
END_TEST

START_TEST(test_bad_requests)
{
	uint8_t buf[1024] = {0};

	RIG_RESUME(&r);
	rig_start_driver(&r, FLUSH | ZEROES, 1);
	ck_assert_uint_eq(do_io(VIRTIO_BLK_T_IN, DISK_BYTES / 512, buf, 512, true), VIRTIO_BLK_S_IOERR);
	ck_assert_uint_eq(do_io(VIRTIO_BLK_T_IN, DISK_BYTES / 512 - 1, buf, 1024, true), VIRTIO_BLK_S_IOERR);
	ck_assert_uint_eq(do_io(VIRTIO_BLK_T_OUT, UINT64_MAX / 512, buf, 512, false), VIRTIO_BLK_S_IOERR);
	ck_assert_uint_eq(do_io(VIRTIO_BLK_T_OUT, UINT64_MAX, buf, 512, false), VIRTIO_BLK_S_IOERR);
	ck_assert_uint_eq(do_io(VIRTIO_BLK_T_IN, 0, buf, 100, true), VIRTIO_BLK_S_IOERR);
	ck_assert_uint_eq(do_io(77, 0, NULL, 0, false), VIRTIO_BLK_S_UNSUPP);
	ck_assert_uint_eq(do_io(VIRTIO_BLK_T_IN, 0, buf, 512, true), VIRTIO_BLK_S_OK);
	ck_assert_uint_eq(rig_status(&r) & VIRTIO_CONFIG_S_NEEDS_RESET, 0);
}
END_TEST

START_TEST(test_read_only)
{
	uint8_t buf[512] = {0};

	teardown();
	setup_disk(true);
	ck_assert(rig_offered(&r) & UINT64_C(1) << VIRTIO_BLK_F_RO);
	ck_assert_uint_eq(rig_offered(&r) & ZEROES, 0);
	RIG_RESUME(&r);
	rig_start_driver(&r, FLUSH | UINT64_C(1) << VIRTIO_BLK_F_RO, 1);
	ck_assert_uint_eq(do_io(VIRTIO_BLK_T_OUT, 0, buf, 512, false), VIRTIO_BLK_S_IOERR);
	ck_assert_uint_eq(range_request(VIRTIO_BLK_T_DISCARD, 0, 8, 0), VIRTIO_BLK_S_IOERR);
	ck_assert_uint_eq(do_io(VIRTIO_BLK_T_IN, 0, buf, 512, true), VIRTIO_BLK_S_OK);
	ck_assert_uint_eq(gate_submitted(&gate), 1);
}
END_TEST

/* Each is the driver's fault: NEEDS_RESET and a configuration interrupt, nothing else; and a reset cures. */
START_TEST(test_malformed_chains)
{
	uint64_t b = 0x300000;
	struct rig_queue *q = &r.q[0];

	RIG_RESUME(&r);
	for (unsigned how = 0; how < 11; how++) {
		unsigned before;

		rig_start_driver(&r, FLUSH | INDIRECT, 1);
		before = rig_interrupts(0);
		memset(rig_ptr(&r, b), 0, 4096);
		switch (how) {
		case 0: /* loop */
			rig_put_desc(&r, q->desc, b, 16, VRING_DESC_F_NEXT, 1);
			rig_put_desc(&r, q->desc + 16, b, 16, VRING_DESC_F_NEXT, 0);
			rig_publish(&r, q, 0);
			break;
		case 1: /* not RAM */
			rig_put_desc(&r, q->desc, UINT64_MAX - 8, 16, 0, 0);
			rig_publish(&r, q, 0);
			break;
		case 2: /* crosses the end of RAM */
			rig_put_desc(&r, q->desc, RIG_MEMORY_BYTES - 8, 16, 0, 0);
			rig_publish(&r, q, 0);
			break;
		case 3: /* readable after writable */
			rig_put_desc(&r, q->desc, b, 16, VRING_DESC_F_NEXT | VRING_DESC_F_WRITE, 1);
			rig_put_desc(&r, q->desc + 16, b, 16, 0, 0);
			rig_publish(&r, q, 0);
			break;
		case 4: /* head beyond the table */
			rig_publish(&r, q, RIG_QUEUE_SIZE);
			break;
		case 5: /* next beyond the table */
			rig_put_desc(&r, q->desc, b, 16, VRING_DESC_F_NEXT, 0xffff);
			rig_publish(&r, q, 0);
			break;
		case 6: /* available index too far ahead */
			q->avail_idx = 1000;
			rig_publish(&r, q, 0);
			break;
		case 7: /* indirect table of a strange length */
			rig_put_desc(&r, q->desc, b, 17, VRING_DESC_F_INDIRECT, 0);
			rig_publish(&r, q, 0);
			break;
		case 8: /* indirect in indirect */
			rig_put_desc(&r, b, b, 16, VRING_DESC_F_INDIRECT, 0);
			rig_put_desc(&r, q->desc, b, 16, VRING_DESC_F_INDIRECT, 0);
			rig_publish(&r, q, 0);
			break;
		case 9: /* no status byte */
			rig_put_desc(&r, q->desc, b, 16, 0, 0);
			rig_publish(&r, q, 0);
			break;
		case 10: /* header too short */
			rig_put_desc(&r, q->desc, b, 15, VRING_DESC_F_NEXT, 1);
			rig_put_desc(&r, q->desc + 16, b + 16, 1, VRING_DESC_F_WRITE, 0);
			rig_publish(&r, q, 0);
			break;
		}
		rig_kick(&r, 0);
		RIG_UNTIL(rig_status(&r) & VIRTIO_CONFIG_S_NEEDS_RESET);
		RIG_UNTIL(rig_interrupts(0) > before);
		ck_assert_uint_eq(rig_used_idx(&r, 0), 0);
		ck_assert_uint_eq(gate_submitted(&gate), 0);
	}
	rig_start_driver(&r, FLUSH, 1);
	ck_assert_uint_eq(do_io(VIRTIO_BLK_T_FLUSH, 0, NULL, 0, false), VIRTIO_BLK_S_OK);
}
END_TEST

START_TEST(test_bad_rings_are_refused)
{
	static const struct {
		uint64_t desc, avail, used;
		unsigned size;
	} bad[] = {
		{0x100008, 0x102000, 0x104000, 64},
		{0x100000, 0x102001, 0x104000, 64},
		{0x100000, 0x102000, 0x104002, 64},
		{0x100000, 0x102000, RIG_MEMORY_BYTES - 16, 64},
		{0xfffffffffffff000, 0x102000, 0x104000, 64},
		{0x100000, 0xc0000000, 0x104000, 64},
		{0x100000, 0x102000, 0x104000, 63},
		{0x100000, 0x102000, 0x104000, 512},
		{0x100000, 0x102000, 0x104000, 0},
	};

	RIG_RESUME(&r);
	for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
		rig_start_driver(&r, 0, 0);
		rig_write(&r, r.common + VIRTIO_PCI_COMMON_Q_SELECT, 0, 2);
		rig_write(&r, r.common + VIRTIO_PCI_COMMON_Q_SIZE, bad[i].size, 2);
		rig_write(&r, r.common + VIRTIO_PCI_COMMON_Q_DESCLO, bad[i].desc, 8);
		rig_write(&r, r.common + VIRTIO_PCI_COMMON_Q_AVAILLO, bad[i].avail, 8);
		rig_write(&r, r.common + VIRTIO_PCI_COMMON_Q_USEDLO, bad[i].used, 8);
		rig_write(&r, r.common + VIRTIO_PCI_COMMON_Q_ENABLE, 1, 2);
		ck_assert_uint_eq(rig_read(&r, r.common + VIRTIO_PCI_COMMON_Q_ENABLE, 2), 0);
		ck_assert(rig_status(&r) & VIRTIO_CONFIG_S_NEEDS_RESET);
		rig_kick(&r, 0);
	}
	/* a queue that is not there */
	rig_write(&r, r.common + VIRTIO_PCI_COMMON_Q_SELECT, 9, 2);
	ck_assert_uint_eq(rig_read(&r, r.common + VIRTIO_PCI_COMMON_Q_SIZE, 2), 0);
	rig_write(&r, r.common + VIRTIO_PCI_COMMON_Q_ENABLE, 1, 2);
	rig_kick(&r, 9);
}
END_TEST

START_TEST(test_indirect_and_scattered)
{
	uint64_t base = rig_alloc(&r, 16384);
	/* header in two parts, data in odd parts with an empty one, status with the data's last part */
	struct rig_buffer b[] = {
		{base, 5, false},	{base + 5, 11, false},	  {base + 4096, 100, true},
		{base + 5000, 0, true}, {base + 6000, 400, true}, {base + 8000, 12 + 1, true},
	};
	uint8_t out[512];
	uint32_t len;

	for (unsigned i = 0; i < sizeof out; i++)
		out[i] = (uint8_t)(255 - i);
	ck_assert_int_eq(block_pwrite(disk, out, sizeof out, 512 * 9), 0);
	put_le32(rig_ptr(&r, base), VIRTIO_BLK_T_IN);
	put_le64(rig_ptr(&r, base + 8), 9);
	RIG_RESUME(&r);
	rig_start_driver(&r, FLUSH | INDIRECT, 1);
	*rig_ptr(&r, base + 8012) = 0xee;
	rig_add_indirect(&r, 0, b, ARRAY_SIZE(b));
	rig_kick(&r, 0);
	rig_take_used(&r, 0, &len);
	ck_assert_uint_eq(len, 513);
	ck_assert_int_eq(memcmp(rig_ptr(&r, base + 4096), out, 100), 0);
	ck_assert_int_eq(memcmp(rig_ptr(&r, base + 6000), out + 100, 400), 0);
	ck_assert_int_eq(memcmp(rig_ptr(&r, base + 8000), out + 500, 12), 0);
	ck_assert_uint_eq(*rig_ptr(&r, base + 8012), VIRTIO_BLK_S_OK);
}
END_TEST

START_TEST(test_event_idx)
{
	uint8_t *used_event = rig_ptr(&r, r.q[0].avail + 4 + 2 * RIG_QUEUE_SIZE);
	unsigned before;

	RIG_RESUME(&r);
	rig_start_driver(&r, FLUSH | EVENT_IDX, 1);
	do_io(VIRTIO_BLK_T_FLUSH, 0, NULL, 0, false);
	/* the device asks to be told of the next one */
	RIG_UNTIL(get_le16(rig_ptr(&r, r.q[0].used + 4 + 8 * RIG_QUEUE_SIZE)) == 1);
	RIG_UNTIL(rig_interrupts(1) > 0);
	before = rig_interrupts(1);
	/* an interrupt only once entry 5 is used */
	put_le16(used_event, 5);
	for (unsigned i = 1; i < 5; i++)
		do_io(VIRTIO_BLK_T_FLUSH, 0, NULL, 0, false);
	RIG_PAUSE(&r);
	ck_assert_uint_eq(rig_interrupts(1), before);
	RIG_RESUME(&r);
	ck_assert_uint_eq(rig_interrupts(1), before + 1); /* resume raises it */
	do_io(VIRTIO_BLK_T_FLUSH, 0, NULL, 0, false);
	RIG_UNTIL(rig_interrupts(1) == before + 2);
}
END_TEST

START_TEST(test_pause_takes_nothing_and_loses_nothing)
{
	struct blk_io io[8];

	RIG_RESUME(&r);
	rig_start_driver(&r, FLUSH, 1);
	RIG_PAUSE(&r);
	for (unsigned i = 0; i < ARRAY_SIZE(io); i++)
		io[i] = queue_io(VIRTIO_BLK_T_IN, i, 512, true, false);
	rig_kick(&r, 0);
	clock_sleep_ms(50);
	ck_assert_uint_eq(gate_submitted(&gate), 0);
	ck_assert_int_eq(r.m->ops->drain(r.m->dev, 1000), 0);
	RIG_RESUME(&r); /* no further kick */
	for (unsigned i = 0; i < ARRAY_SIZE(io); i++)
		rig_take_used(&r, 0, NULL);
	for (unsigned i = 0; i < ARRAY_SIZE(io); i++)
		ck_assert_uint_eq(io_status(&io[i]), VIRTIO_BLK_S_OK);
}
END_TEST

START_TEST(test_drain_times_out_and_resume_works)
{
	struct blk_io io;
	struct error err = ERROR_INIT;
	struct state_writer *w = state_writer_create();

	RIG_RESUME(&r);
	rig_start_driver(&r, FLUSH, 1);
	gate.open = false;
	io = queue_io(VIRTIO_BLK_T_FLUSH, 0, 0, false, false);
	rig_kick(&r, 0);
	RIG_UNTIL(gate_held(&gate) == 1);
	RIG_PAUSE(&r);
	ck_assert_int_eq(r.m->ops->drain(r.m->dev, 30), -ETIMEDOUT);
	ck_assert_int_eq(r.m->ops->save(r.m->dev, w, &err), -EBUSY);
	state_writer_free(w);
	RIG_RESUME(&r);
	gate_release(&gate);
	ck_assert_uint_eq(rig_take_used(&r, 0, NULL), io.head);
	ck_assert_uint_eq(io_status(&io), VIRTIO_BLK_S_OK);
	ck_assert_uint_eq(do_io(VIRTIO_BLK_T_FLUSH, 0, NULL, 0, false), VIRTIO_BLK_S_OK);
}
END_TEST

START_TEST(test_guest_reset_waits_for_requests)
{
	struct blk_io io;

	RIG_RESUME(&r);
	rig_start_driver(&r, FLUSH, 1);
	gate.open = false;
	io = queue_io(VIRTIO_BLK_T_IN, 0, 512, true, false);
	rig_kick(&r, 0);
	RIG_UNTIL(gate_held(&gate) == 1);
	rig_set_status(&r, 0);
	ck_assert_uint_ne(rig_status(&r), 0);
	gate_release(&gate);
	RIG_UNTIL(rig_status(&r) == 0);
	ck_assert_uint_eq(io_status(&io), VIRTIO_BLK_S_OK);
	rig_start_driver(&r, FLUSH, 1);
	ck_assert_uint_eq(do_io(VIRTIO_BLK_T_FLUSH, 0, NULL, 0, false), VIRTIO_BLK_S_OK);
}
END_TEST

/* Requests in flight at the pause complete into memory while draining; those not yet taken are taken at the
 * other side, by the indices that were saved. */
START_TEST(test_save_and_load_in_the_middle)
{
	struct blk_io io[12];
	struct error err = ERROR_INIT;
	struct machine *to;
	unsigned seen = 0;

	RIG_RESUME(&r);
	rig_start_driver(&r, FLUSH | EVENT_IDX | INDIRECT, 1);
	for (unsigned i = 0; i < 100; i++) /* so that indices wrap around the ring */
		do_io(VIRTIO_BLK_T_FLUSH, 0, NULL, 0, false);
	gate.open = false;
	for (unsigned i = 0; i < 6; i++)
		io[i] = queue_io(VIRTIO_BLK_T_OUT, i, 512, false, i & 1);
	rig_kick(&r, 0);
	RIG_UNTIL(gate_held(&gate) == 6);
	RIG_PAUSE(&r);
	for (unsigned i = 6; i < 12; i++)
		io[i] = queue_io(VIRTIO_BLK_T_OUT, i, 512, false, i & 1);
	rig_kick(&r, 0);
	gate_release(&gate);
	ck_assert_int_eq(r.m->ops->drain(r.m->dev, 5000), 0);
	ck_assert_uint_eq(gate_submitted(&gate), 106);

	to = rig_machine(&r.mem);
	ck_assert_int_eq(virtio_blk_create(to, RIG_SLOT, "t", &gate.blk, false, &err), 0);
	ck_assert_msg(rig_transfer(&r, to, &err) == 0, "%s", err.message);
	rig_machine_free(r.m);
	r.m = to;
	/* the gate of the handover: registers answer, nothing is taken */
	ck_assert_uint_eq(rig_status(&r), 15);
	clock_sleep_ms(20);
	ck_assert_uint_eq(gate_submitted(&gate), 106);
	memset(rig_raised, 0, sizeof rig_raised);
	RIG_RESUME(&r);
	ck_assert_uint_ge(rig_interrupts(1), 1);
	while (seen < 12) {
		rig_take_used(&r, 0, NULL);
		seen++;
	}
	ck_assert_uint_eq(gate_submitted(&gate), 112);
	for (unsigned i = 0; i < 12; i++)
		ck_assert_uint_eq(io_status(&io[i]), VIRTIO_BLK_S_OK);
	ck_assert_uint_eq(do_io(VIRTIO_BLK_T_FLUSH, 0, NULL, 0, false), VIRTIO_BLK_S_OK);
	ck_assert_uint_eq(rig_used_idx(&r, 0), 113);
}
END_TEST

/* Every byte of a saved device changed to something else, one at a time: loaded or refused, never a crash. */
START_TEST(test_load_is_hostile_input)
{
	struct error err = ERROR_INIT;
	size_t payload = 0;
	unsigned refused = 0, loaded = 0;

	RIG_RESUME(&r);
	rig_start_driver(&r, FLUSH | EVENT_IDX, 1);
	do_io(VIRTIO_BLK_T_FLUSH, 0, NULL, 0, false);
	RIG_PAUSE(&r);
	ck_assert_int_eq(r.m->ops->drain(r.m->dev, 1000), 0);
	for (size_t at = 0; at == 0 || at < payload; at++) {
		struct state_writer *w = state_writer_create(), *w2 = state_writer_create();
		struct state_reader *s = NULL;
		struct machine *to = rig_machine(&r.mem);
		const uint8_t *buf;
		uint8_t bytes[512];
		size_t len;
		uint32_t version;

		ck_assert_int_eq(r.m->ops->save(r.m->dev, w, &err), 0);
		ck_assert_int_eq(state_writer_finish(w, &buf, &len, &err), 0);
		ck_assert_int_eq(state_reader_open(buf, len, &s, &err), 0);
		ck_assert_int_eq(state_reader_section(s, "virtio-blk.t", 1, &version, &err), 0);
		payload = state_remaining(s);
		ck_assert_uint_le(payload, sizeof bytes);
		state_get_bytes(s, bytes, payload);
		state_reader_free(s);
		bytes[at] ^= (uint8_t)(1 + at % 255);
		state_section_begin(w2, "virtio-blk.t", 1);
		state_put_bytes(w2, bytes, payload);
		state_section_end(w2);
		ck_assert_int_eq(state_writer_finish(w2, &buf, &len, &err), 0);
		ck_assert_int_eq(state_reader_open(buf, len, &s, &err), 0);
		ck_assert_int_eq(virtio_blk_create(to, RIG_SLOT, "t", &gate.blk, false, &err), 0);
		if (to->ops->load(to->dev, s, &err) < 0) {
			ck_assert_msg(strstr(err.message, "disk t") != NULL, "%s", err.message);
			refused++;
		} else {
			loaded++;
			to->ops->resume(to->dev);
			to->ops->pause(to->dev);
			ck_assert_int_eq(to->ops->drain(to->dev, 5000), 0);
		}
		state_reader_free(s);
		state_writer_free(w);
		state_writer_free(w2);
		rig_machine_free(to);
	}
	ck_assert_uint_gt(refused, 20);
	ck_assert_uint_gt(loaded, 5);
}
END_TEST

/* Exactly the pages written: the buffer of the read, the status, the used ring. */
START_TEST(test_dirty_pages_are_marked)
{
	size_t npages = RIG_MEMORY_BYTES / 4096, marked;
	struct blk_io io;

	RIG_RESUME(&r);
	rig_start_driver(&r, FLUSH, 1);
	memset(r.mem.vmm_dirty, 0, BITMAP_WORDS(npages) * 8);
	rig_alloc(&r, 4096 * 5);
	io = queue_io(VIRTIO_BLK_T_IN, 0, 3 * 4096, true, false);
	rig_kick(&r, 0);
	rig_take_used(&r, 0, NULL);
	RIG_PAUSE(&r);
	marked = bitmap_count(r.mem.vmm_dirty, npages);
	for (unsigned i = 0; i < 3; i++)
		ck_assert(bitmap_test(r.mem.vmm_dirty, io.data / 4096 + i));
	ck_assert(bitmap_test(r.mem.vmm_dirty, io.status / 4096));
	ck_assert(bitmap_test(r.mem.vmm_dirty, r.q[0].used / 4096));
	ck_assert_uint_eq(marked, 5);
	/* a write to the disk changes no guest page but these two */
	memset(r.mem.vmm_dirty, 0, BITMAP_WORDS(npages) * 8);
	RIG_RESUME(&r);
	queue_io(VIRTIO_BLK_T_OUT, 0, 4096, false, false);
	rig_kick(&r, 0);
	rig_take_used(&r, 0, NULL);
	RIG_PAUSE(&r);
	ck_assert_uint_eq(bitmap_count(r.mem.vmm_dirty, npages), 2);
}
END_TEST

START_TEST(test_moved_bar_still_works)
{
	uint64_t old = r.bar;

	RIG_RESUME(&r);
	rig_start_driver(&r, FLUSH, 1);
	rig_config_write(&r, 0x04, 0x4, 2);
	rig_config_write(&r, 0x10, 0xc8000000, 4);
	rig_config_write(&r, 0x04, 0x6, 2);
	ck_assert_uint_eq(rig_read(&r, old + VIRTIO_PCI_COMMON_STATUS, 1), 0xff);
	r.common += 0xc8000000 - old;
	r.notify += 0xc8000000 - old;
	ck_assert_uint_eq(rig_status(&r), 15);
	ck_assert_uint_eq(do_io(VIRTIO_BLK_T_FLUSH, 0, NULL, 0, false), VIRTIO_BLK_S_OK);
}
END_TEST

START_TEST(test_machine_reset)
{
	RIG_RESUME(&r);
	rig_start_driver(&r, FLUSH, 1);
	RIG_PAUSE(&r);
	ck_assert_int_eq(r.m->ops->drain(r.m->dev, 1000), 0);
	r.m->ops->reset(r.m->dev);
	RIG_RESUME(&r);
	rig_probe(&r);
	ck_assert_uint_eq(rig_status(&r), 0);
	rig_start_driver(&r, FLUSH, 1);
	ck_assert_uint_eq(do_io(VIRTIO_BLK_T_FLUSH, 0, NULL, 0, false), VIRTIO_BLK_S_OK);
}
END_TEST

/* Many requests in flight while the device is paused and resumed all the time. */
START_TEST(test_pause_resume_under_load)
{
	unsigned taken = 0, queued = 0;

	RIG_RESUME(&r);
	rig_start_driver(&r, FLUSH | EVENT_IDX, 1);
	while (taken < 2000) {
		while (queued < 2000 && queued - taken < 16) {
			r.next_buffer = 0x200000 + (queued % 16) * 0x4000;
			queue_io(queued % 3 ? VIRTIO_BLK_T_IN : VIRTIO_BLK_T_OUT, queued % 64 * 8, 4096,
				 queued % 3, false);
			queued++;
			if (queued % 4 == 0)
				rig_kick(&r, 0);
		}
		if (taken % 100 == 0) {
			RIG_PAUSE(&r);
			ck_assert_int_eq(r.m->ops->drain(r.m->dev, 5000), 0);
			RIG_RESUME(&r);
		}
		rig_kick(&r, 0);
		rig_take_used(&r, 0, NULL);
		taken++;
	}
	ck_assert_uint_eq(rig_used_idx(&r, 0), 2000);
	ck_assert_uint_eq(rig_status(&r), 15);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("virtio-blk");
	TCase *t = tcase_create("virtio-blk");

	tcase_add_checked_fixture(t, setup, teardown);
	tcase_add_test(t, test_config_and_features);
	tcase_add_test(t, test_pci_config_access_window);
	tcase_add_test(t, test_read_write_flush_id);
	tcase_add_test(t, test_without_flush_writes_are_durable);
	tcase_add_test(t, test_discard_and_zeroes);
	tcase_add_test(t, test_split_requests_complete_together);
	tcase_add_test(t, test_bad_requests);
	tcase_add_test(t, test_read_only);
	tcase_add_test(t, test_malformed_chains);
	tcase_add_test(t, test_bad_rings_are_refused);
	tcase_add_test(t, test_indirect_and_scattered);
	tcase_add_test(t, test_event_idx);
	tcase_add_test(t, test_pause_takes_nothing_and_loses_nothing);
	tcase_add_test(t, test_drain_times_out_and_resume_works);
	tcase_add_test(t, test_guest_reset_waits_for_requests);
	tcase_add_test(t, test_save_and_load_in_the_middle);
	tcase_add_test(t, test_load_is_hostile_input);
	tcase_add_test(t, test_dirty_pages_are_marked);
	tcase_add_test(t, test_moved_bar_still_works);
	tcase_add_test(t, test_machine_reset);
	tcase_add_test(t, test_pause_resume_under_load);
	suite_add_tcase(s, t);
	return suite_run(s);
}
