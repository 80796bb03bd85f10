/* SPDX-License-Identifier: Apache-2.0 */
#include "virtio_rig.h"

#include <linux/ethtool.h>
#include <linux/if_tun.h>
#include <linux/sockios.h>
#include <linux/virtio_net.h>
#include <sys/ioctl.h>

#include "netns.h"
#include "tests/suite.h"
#include "vmm/tap.h"

#define F(bit)	 (UINT64_C(1) << (bit))
#define OFFLOADS (F(VIRTIO_NET_F_CSUM) | F(VIRTIO_NET_F_GUEST_CSUM) | F(VIRTIO_NET_F_GUEST_TSO4))
#define CONTROL	 (F(VIRTIO_NET_F_CTRL_VQ) | F(VIRTIO_NET_F_GUEST_ANNOUNCE) | F(VIRTIO_NET_F_STATUS))
#define HEADER	 12u

static const uint8_t mac[6] = {0x52, 0x54, 0, 0xaa, 0xbb, 0xcc};
static struct rig r;
static char ifname[16];
static int sock;

/* False: skipped, and said so. */
static bool begin(void)
{
	struct error err = ERROR_INIT;
	int tap;

	if (!netns_enter())
		return false;
	tap = tap_open("br0", ifname, &err);
	ck_assert_msg(tap >= 0, "%s", err.message);
	sock = netns_socket("br0", TEST_ETHERTYPE);
	ck_assert_int_ge(sock, 0);
	rig_init(&r);
	ck_assert_msg(virtio_net_create(r.m, RIG_SLOT, "lan", tap, mac, &err) == 0, "%s", err.message);
	rig_probe(&r);
	return true;
}

static void end(void)
{
	rig_free(&r);
	close(sock);
}

static void make_frame(uint8_t *f, size_t len, uint8_t seed)
{
	static const uint8_t host[6] = {2, 0, 0, 0, 0, 1};

	memcpy(f, mac, 6);
	memcpy(f + 6, host, 6);
	put_be16(f + 12, TEST_ETHERTYPE);
	for (size_t i = 14; i < len; i++)
		f[i] = (uint8_t)(seed + i);
}

static bool offload_on(uint32_t command)
{
	struct ethtool_value v = {.cmd = command};
	struct ifreq ifr = {.ifr_data = (void *)&v};

	snprintf(ifr.ifr_name, sizeof ifr.ifr_name, "%s", ifname);
	ck_assert_int_eq(ioctl(sock, SIOCETHTOOL, &ifr), 0);
	return v.data;
}

/* Takes received packets until one is of our type; others are the kernel's own chatter on a new bridge.
 * Returns its length without the header. bufs: the buffer of each descriptor head. */
static size_t receive(const uint64_t *bufs, uint32_t buf_len, uint8_t *out, size_t max, unsigned *nbufs)
{
	for (;;) {
		uint32_t len, got = 0;
		unsigned n;
		uint32_t id = rig_take_used(&r, 0, &len);
		const uint8_t *h = rig_ptr(&r, bufs[id]);

		n = get_le16(h + 10);
		ck_assert_uint_ge(n, 1);
		memcpy(out, h + HEADER, len - HEADER);
		got = len - HEADER;
		for (unsigned i = 1; i < n; i++) {
			ck_assert_uint_eq(len, buf_len);
			id = rig_take_used(&r, 0, &len);
			ck_assert_uint_le(got + len, max);
			memcpy(out + got, rig_ptr(&r, bufs[id]), len);
			got += len;
		}
		if (get_be16(out + 12) != TEST_ETHERTYPE)
			continue;
		*nbufs = n;
		return got;
	}
}

/* Each descriptor has a page of its own. */
static void give_buffers(uint64_t *bufs, unsigned n, uint32_t len)
{
	for (unsigned i = 0; i < n; i++) {
		struct rig_buffer b = {0x400000 + (r.q[0].next_desc % RIG_QUEUE_SIZE) * 4096, len, true};

		bufs[rig_add(&r, 0, &b, 1)] = b.gpa;
	}
	rig_kick(&r, 0);
}

START_TEST(test_config)
{
	if (!begin())
		return;
	for (unsigned i = 0; i < 6; i++)
		ck_assert_uint_eq(rig_read(&r, r.device + i, 1), mac[i]);
	ck_assert_uint_eq(rig_read(&r, r.device + 6, 2), VIRTIO_NET_S_LINK_UP);
	ck_assert_uint_eq(rig_config_read(&r, 0, 4), 0x10411af4);
	end();
}
END_TEST

START_TEST(test_transmit)
{
	uint8_t f[1500], got[2000];

	if (!begin())
		return;
	RIG_RESUME(&r);
	rig_start_driver(&r, F(VIRTIO_NET_F_MAC), 2);
	for (unsigned i = 0; i < 5; i++) {
		size_t len = 60 + 300 * i;
		uint64_t g = rig_alloc(&r, 2048);
		struct rig_buffer b[] = {{g, HEADER, false},
					 {g + HEADER, 20, false},
					 {g + HEADER + 20, (uint32_t)len - 20, false}};

		make_frame(f, len, (uint8_t)i);
		memset(f, 0xff, 6);
		memcpy(rig_ptr(&r, g + HEADER), f, len);
		rig_add(&r, 1, b, 3);
		rig_kick(&r, 1);
		rig_take_used(&r, 1, NULL);
		ck_assert_int_eq(netns_receive(sock, got, sizeof got, 3000), (ssize_t)len);
		ck_assert_int_eq(memcmp(got, f, len), 0);
	}
	RIG_UNTIL(rig_interrupts(2) > 0);
	/* nonsense for a frame is dropped, the buffer comes back */
	{
		struct rig_buffer tiny = {rig_alloc(&r, 16), 5, false};
		rig_add(&r, 1, &tiny, 1);
		rig_kick(&r, 1);
		rig_take_used(&r, 1, NULL);
	}
	ck_assert_uint_eq(rig_status(&r), 15);
	end();
}
END_TEST

START_TEST(test_receive_mergeable)
{
	uint8_t f[1400], got[4096];
	uint64_t bufs[RIG_QUEUE_SIZE];
	unsigned n;

	if (!begin())
		return;
	RIG_RESUME(&r);
	rig_start_driver(&r, F(VIRTIO_NET_F_MRG_RXBUF), 2);
	give_buffers(bufs, 60, 512);
	make_frame(f, 60, 1);
	ck_assert_int_eq(send(sock, f, 60, 0), 60);
	ck_assert_uint_eq(receive(bufs, 512, got, sizeof got, &n), 60);
	ck_assert_uint_eq(n, 1);
	make_frame(f, sizeof f, 2);
	ck_assert_int_eq(send(sock, f, sizeof f, 0), sizeof f);
	ck_assert_uint_eq(receive(bufs, 512, got, sizeof got, &n), sizeof f);
	ck_assert_uint_eq(n, 3);
	ck_assert_int_eq(memcmp(got, f, sizeof f), 0);
	RIG_UNTIL(rig_interrupts(1) >= 1);
	end();
}
END_TEST

/* A frame waits for buffers; it arrives when there are enough, and only then. */
START_TEST(test_receive_waits_for_buffers)
{
	uint8_t f[1400], got[4096];
	uint64_t bufs[RIG_QUEUE_SIZE];
	unsigned n;

	if (!begin())
		return;
	RIG_RESUME(&r);
	rig_start_driver(&r, F(VIRTIO_NET_F_MRG_RXBUF), 2);
	for (unsigned i = 0; i < 3; i++) {
		make_frame(f, sizeof f, (uint8_t)i);
		ck_assert_int_eq(send(sock, f, sizeof f, 0), sizeof f);
	}
	clock_sleep_ms(30);
	ck_assert_uint_eq(rig_used_idx(&r, 0), 0);
	give_buffers(bufs, 60, 512);
	for (unsigned i = 0; i < 3; i++) {
		make_frame(f, sizeof f, (uint8_t)i);
		ck_assert_uint_eq(receive(bufs, 512, got, sizeof got, &n), sizeof f);
		ck_assert_int_eq(memcmp(got, f, sizeof f), 0);
	}
	end();
}
END_TEST

START_TEST(test_receive_marks_dirty)
{
	uint8_t f[600], got[4096];
	uint64_t bufs[RIG_QUEUE_SIZE];
	unsigned n;

	if (!begin())
		return;
	RIG_RESUME(&r);
	rig_start_driver(&r, 0, 2);
	memset(r.mem.vmm_dirty, 0, BITMAP_WORDS(RIG_MEMORY_BYTES / 4096) * 8);
	give_buffers(bufs, 40, 2048);
	make_frame(f, sizeof f, 9);
	ck_assert_int_eq(send(sock, f, sizeof f, 0), sizeof f);
	ck_assert_uint_eq(receive(bufs, 2048, got, sizeof got, &n), sizeof f);
	RIG_PAUSE(&r);
	/* each used buffer is a page of its own; besides them only the used ring */
	ck_assert_uint_eq(bitmap_count(r.mem.vmm_dirty, RIG_MEMORY_BYTES / 4096), rig_used_idx(&r, 0) + 1u);
	ck_assert(bitmap_test(r.mem.vmm_dirty, r.q[0].used / 4096));
	end();
}
END_TEST

/* More frames than the tap's queue holds while paused: nothing stalls, nothing spins, later ones arrive. */
START_TEST(test_storm_while_paused)
{
	uint8_t f[200], got[4096];
	uint64_t bufs[RIG_QUEUE_SIZE];
	unsigned n, kept = 0;
	uint16_t used;

	if (!begin())
		return;
	RIG_RESUME(&r);
	rig_start_driver(&r, 0, 2);
	RIG_PAUSE(&r);
	used = rig_used_idx(&r, 0);
	make_frame(f, sizeof f, 1);
	for (unsigned i = 0; i < 3000; i++)
		ck_assert_int_eq(send(sock, f, sizeof f, 0), sizeof f);
	ck_assert_uint_eq(rig_used_idx(&r, 0), used);
	RIG_RESUME(&r);
	/* What the tap kept comes first; then there is room in it again. */
	make_frame(f, sizeof f, 77);
	for (bool last = false, sent = false; !last; kept++) {
		if ((uint16_t)(r.q[0].avail_idx - r.q[0].seen) < 10)
			give_buffers(bufs, 50, 2048);
		if (kept == 200 && !sent)
			sent = send(sock, f, sizeof f, 0) == sizeof f;
		ck_assert_uint_eq(receive(bufs, 2048, got, sizeof got, &n), sizeof f);
		last = got[14] == 77 + 14;
	}
	ck_assert_uint_gt(kept, 200);
	ck_assert_uint_lt(kept, 3000);
	end();
}
END_TEST

START_TEST(test_load_restores_offloads_and_asks_for_announcement)
{
	struct error err = ERROR_INIT;
	struct machine *to;
	char other[16];
	int tap;

	if (!begin())
		return;
	RIG_RESUME(&r);
	rig_start_driver(&r, OFFLOADS | CONTROL, 3);
	ck_assert(offload_on(ETHTOOL_GTXCSUM));
	ck_assert(offload_on(ETHTOOL_GTSO));
	RIG_PAUSE(&r);
	ck_assert_int_eq(r.m->ops->drain(r.m->dev, 1000), 0);
	tap = tap_open("br0", other, &err);
	ck_assert_int_ge(tap, 0);
	to = rig_machine(&r.mem);
	ck_assert_int_eq(virtio_net_create(to, RIG_SLOT, "lan", tap, mac, &err), 0);
	memcpy(ifname, other, sizeof ifname);
	ck_assert(!offload_on(ETHTOOL_GTSO));
	ck_assert_msg(rig_transfer(&r, to, &err) == 0, "%s", err.message);
	rig_machine_free(r.m);
	r.m = to;
	ck_assert(offload_on(ETHTOOL_GTXCSUM));
	ck_assert(offload_on(ETHTOOL_GTSO));
	ck_assert_uint_eq(rig_read(&r, r.device + 6, 2), VIRTIO_NET_S_LINK_UP);
	memset(rig_raised, 0, sizeof rig_raised);
	RIG_RESUME(&r);
	ck_assert_uint_eq(rig_interrupts(0), 1);
	ck_assert_uint_eq(rig_read(&r, r.isr, 1), 3 & ~1u);
	ck_assert_uint_eq(rig_read(&r, r.device + 6, 2), VIRTIO_NET_S_LINK_UP | VIRTIO_NET_S_ANNOUNCE);
	{
		uint64_t g = rig_alloc(&r, 16);
		struct rig_buffer b[] = {{g, 2, false}, {g + 8, 1, true}};

		*rig_ptr(&r, g) = VIRTIO_NET_CTRL_ANNOUNCE;
		*rig_ptr(&r, g + 1) = VIRTIO_NET_CTRL_ANNOUNCE_ACK;
		*rig_ptr(&r, g + 8) = 0xee;
		rig_add(&r, 2, b, 2);
		rig_kick(&r, 2);
		rig_take_used(&r, 2, NULL);
		ck_assert_uint_eq(*rig_ptr(&r, g + 8), VIRTIO_NET_OK);
	}
	ck_assert_uint_eq(rig_read(&r, r.device + 6, 2), VIRTIO_NET_S_LINK_UP);
	/* a reset takes the offloads back */
	rig_set_status(&r, 0);
	ck_assert(!offload_on(ETHTOOL_GTSO));
	end();
}
END_TEST

START_TEST(test_load_of_another_mac_is_refused)
{
	static const uint8_t mac2[6] = {0x52, 0x54, 0, 0, 0, 1};
	struct error err = ERROR_INIT;
	struct machine *to;
	char other[16];
	int tap;

	if (!begin())
		return;
	tap = tap_open("br0", other, &err);
	to = rig_machine(&r.mem);
	ck_assert_int_eq(virtio_net_create(to, RIG_SLOT, "lan", tap, mac2, &err), 0);
	ck_assert_int_eq(rig_transfer(&r, to, &err), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.message, "net lan: MAC"));
	rig_machine_free(to);
	end();
}
END_TEST

START_TEST(test_rng)
{
	struct error err = ERROR_INIT;
	struct rig_buffer b[2];
	uint32_t len;

	rig_init(&r);
	ck_assert_int_eq(virtio_rng_create(r.m, RIG_SLOT, &err), 0);
	rig_probe(&r);
	ck_assert_uint_eq(rig_config_read(&r, 0, 4), 0x10441af4);
	RIG_RESUME(&r);
	rig_start_driver(&r, 0, 1);
	b[0] = (struct rig_buffer){rig_alloc(&r, 4096), 64, true};
	b[1] = (struct rig_buffer){rig_alloc(&r, 65536), 65536, true};
	rig_add(&r, 0, b, 2);
	rig_kick(&r, 0);
	rig_take_used(&r, 0, &len);
	ck_assert_uint_eq(len, 4096);
	ck_assert(!bytes_all_zero(rig_ptr(&r, b[0].gpa), 64));
	ck_assert(bytes_all_zero(rig_ptr(&r, b[0].gpa + 64), 64));
	ck_assert(!bytes_all_zero(rig_ptr(&r, b[1].gpa), 4096 - 64));
	ck_assert(bytes_all_zero(rig_ptr(&r, b[1].gpa + 4096 - 64), 4096));
	/* a readable buffer only: nothing to fill */
	b[0].write = false;
	rig_add(&r, 0, b, 1);
	rig_kick(&r, 0);
	rig_take_used(&r, 0, &len);
	ck_assert_uint_eq(len, 0);
	rig_free(&r);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("virtio-net");
	TCase *t = tcase_create("virtio-net");

	tcase_add_test(t, test_config);
	tcase_add_test(t, test_transmit);
	tcase_add_test(t, test_receive_mergeable);
	tcase_add_test(t, test_receive_waits_for_buffers);
	tcase_add_test(t, test_receive_marks_dirty);
	tcase_add_test(t, test_storm_while_paused);
	tcase_add_test(t, test_load_restores_offloads_and_asks_for_announcement);
	tcase_add_test(t, test_load_of_another_mac_is_refused);
	tcase_add_test(t, test_rng);
	suite_add_tcase(s, t);
	return suite_run(s);
}
