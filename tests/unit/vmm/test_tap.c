/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <linux/if_tun.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/ioctl.h>

#include "base/bytes.h"
#include "netns.h"
#include "tests/suite.h"
#include "vmm/tap.h"
#include "vmm/virtio.h"

static const uint8_t mac[6] = {0x52, 0x54, 0, 1, 2, 3};

START_TEST(test_opens_a_port_of_the_bridge)
{
	struct error err = ERROR_INIT;
	char a[16], b[16], command[128];
	int fa, fb;

	if (!netns_enter())
		return;
	ck_assert_msg(tap_bridge_check("br0", &err) == 0, "%s", err.message);
	fa = tap_open("br0", a, &err);
	ck_assert_msg(fa >= 0, "%s", err.message);
	fb = tap_open("br0", b, &err);
	ck_assert_msg(fb >= 0, "%s", err.message);
	ck_assert_str_eq(a, "snm0");
	ck_assert_str_eq(b, "snm1");
	snprintf(command, sizeof command, "ip link show dev %s master br0 up | grep -q %s", a, a);
	ck_assert_int_eq(system(command), 0);
	/* it goes with its file descriptor */
	close(fa);
	ck_assert_uint_eq(if_nametoindex(a), 0);
	ck_assert_uint_ne(if_nametoindex(b), 0);
	close(fb);
}
END_TEST

START_TEST(test_errors_name_the_bridge)
{
	struct error err = ERROR_INIT;
	char name[16];

	if (!netns_enter())
		return;
	ck_assert_int_eq(tap_bridge_check("br7", &err), -ENODEV);
	ck_assert_ptr_nonnull(strstr(err.message, "bridge br7"));
	ck_assert_int_eq(tap_open("br7", name, &err), -ENODEV);
	ck_assert_int_eq(tap_bridge_check("lo", &err), -EINVAL);
	ck_assert_str_eq(err.message, "lo is not a bridge");
	ck_assert_int_eq(tap_open("lo", name, &err), -EINVAL);
	ck_assert_int_eq(tap_bridge_check("", &err), -EINVAL);
	ck_assert_int_eq(tap_bridge_check("a-name-that-is-too-long", &err), -EINVAL);
	ck_assert_uint_eq(if_nametoindex("snm0"), 0);
}
END_TEST

START_TEST(test_rarp_is_seen_from_the_port)
{
	struct error err = ERROR_INIT;
	uint8_t frame[128];
	char name[16];
	int fd, s, header = 12;

	if (!netns_enter())
		return;
	fd = tap_open("br0", name, &err);
	ck_assert_msg(fd >= 0, "%s", err.message);
	s = netns_socket("br0", 0x8035);
	ck_assert_int_ge(s, 0);
	for (int round = 0; round < 2; round++) {
		/* with the header size that a fresh tap has, then with that of virtio 1.0 */
		if (round == 1)
			ck_assert_int_eq(ioctl(fd, TUNSETVNETHDRSZ, &header), 0);
		ck_assert_int_eq(net_announce_rarp(fd, mac), 0);
		ck_assert_int_eq(netns_receive(s, frame, sizeof frame, 3000), 60);
		for (int i = 0; i < 6; i++)
			ck_assert_uint_eq(frame[i], 0xff);
		ck_assert_int_eq(memcmp(frame + 6, mac, 6), 0);
		ck_assert_uint_eq(get_be16(frame + 20), 3);
		ck_assert_int_eq(memcmp(frame + 22, mac, 6), 0);
		ck_assert_int_eq(memcmp(frame + 32, mac, 6), 0);
	}
	/* the bridge learned it on the guest's port */
	ck_assert_int_eq(system("bridge fdb show dev snm0 | grep -q 52:54:00:01:02:03"), 0);
	ck_assert_int_lt(net_announce_rarp(s, mac), 0);
	close(s);
	close(fd);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("tap");
	TCase *t = tcase_create("tap");

	tcase_add_test(t, test_opens_a_port_of_the_bridge);
	tcase_add_test(t, test_errors_name_the_bridge);
	tcase_add_test(t, test_rarp_is_seen_from_the_port);
	suite_add_tcase(s, t);
	return suite_run(s);
}
