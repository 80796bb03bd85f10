/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cleanup.h"
#include "host/vmdef.h"
#include "tests/suite.h"

static struct vm_definition def, again;
static struct error err;

static int parse(const char *text)
{
	err = ERROR_INIT;
	return vmdef_parse(text, strlen(text), "vm.ini", &def, &err);
}

#define HEAD "[vm]\nname = vm1\nmemory = 2G\nkernel = /boot/vmlinuz\n"
#define UUID "uuid = 0b8a4c1e-7d2f-4a36-9c55-3f1e2d4c5b6a\n"

START_TEST(whole_definition)
{
	ck_assert_msg(parse(HEAD UUID
			    "cpus = 2\npriority = 7\nballoon = yes\ninitrd = /boot/initrd.img\ncmdline = "
			    "console=ttyS0 "
			    "root=/dev/vda1 "
			    "a=\"b;c\"\n"
			    "serial = file:/var/log/vm1\n[disk root]\npath = root.qcow2\nformat = qcow2\n"
			    "backing = /images/a.qcow2, /images/b.raw\n"
			    "[disk data]\npath = /dev/vg/data\nformat = raw\nread-only = yes\n"
			    "[net lan]\nbridge = br0\nmac = 52:54:00:00:00:01\n[net b]\nbridge = br1\n") == 0,
		      "%s", err.message);
	ck_assert_str_eq(def.name, "vm1");
	ck_assert_uint_eq(def.memory_bytes, UINT64_C(2) << 30);
	ck_assert_uint_eq(def.cpus, 2);
	ck_assert_uint_eq(def.priority, 7);
	ck_assert_int_eq(def.balloon, VM_BALLOON_YES);
	ck_assert_str_eq(def.cmdline, "console=ttyS0 root=/dev/vda1 a=\"b;c\"");
	ck_assert_str_eq(def.serial, "file:/var/log/vm1");
	ck_assert_uint_eq(def.ndisks, 2);
	ck_assert_str_eq(def.disks[0].id, "root");
	ck_assert_str_eq(def.disks[0].format, "qcow2");
	ck_assert(!def.disks[0].read_only && def.disks[1].read_only);
	char buf[4096];
	const char *names[VM_BACKING_MAX];
	ck_assert_int_eq(vmdef_backing_names(&def.disks[0], buf, names), 2);
	ck_assert_str_eq(names[0], "/images/a.qcow2");
	ck_assert_str_eq(names[1], "/images/b.raw");
	ck_assert_int_eq(vmdef_backing_names(&def.disks[1], buf, names), 0);
	ck_assert_uint_eq(def.nnets, 2);
	ck_assert(def.nets[0].has_mac && !def.nets[1].has_mac);
	ck_assert_uint_eq(def.nets[0].mac[5], 1);

	CLEANUP_FREE char *text = vmdef_format(&def);
	ck_assert_ptr_nonnull(text);
	ck_assert_msg(vmdef_parse(text, strlen(text), "again", &again, &err) == 0, "%s", err.message);
	ck_assert_mem_eq(&def, &again, sizeof def);
}
END_TEST

START_TEST(defaults)
{
	ck_assert_int_eq(parse(HEAD), 0);
	ck_assert_uint_eq(def.cpus, 1);
	ck_assert_uint_eq(def.priority, 0);
	ck_assert_int_eq(def.balloon, VM_BALLOON_UNSAID);
	CLEANUP_FREE char *text = vmdef_format(&def);
	ck_assert_ptr_null(strstr(text, "priority"));
	ck_assert_ptr_null(strstr(text, "balloon"));
	ck_assert_str_eq(def.serial, "socket");
	ck_assert_str_eq(def.uuid, "");
	ck_assert_uint_eq(def.ndisks, 0);
}
END_TEST

START_TEST(long_command_line_survives)
{
	char text[4096];
	int at = snprintf(text, sizeof text, HEAD "cmdline = ");
	memset(text + at, 'x', 2047);
	text[at + 2047] = '\0';
	ck_assert_int_eq(parse(text), 0);
	ck_assert_uint_eq(strlen(def.cmdline), 2047);
	strcat(text, "x");
	ck_assert_int_eq(parse(text), -EINVAL);
}
END_TEST

static const struct {
	const char *text, *says;
} bad[] = {
	{"[vm]\nmemory = 2G\nkernel = k\n", "vm.ini: [vm] name is missing"},
	{"[vm]\nname = vm1\nkernel = k\n", "vm.ini: [vm] memory is missing"},
	{"[vm]\nname = vm1\nmemory = 2G\n", "vm.ini: [vm] kernel is missing"},
	{"[vm]\nname = move\n", "vm.ini:2: name: 'move' is the name of a subcommand"},
	{"[vm]\nname = start\n", "is the name of a subcommand"},
	{"[vm]\nname = ../x\n", "vm.ini:2: name: '../x' is not a VM name"},
	{"[vm]\nname = .x\n", "not a VM name"},
	{"[vm]\nuuid = 0B8A4C1E-7D2F-4A36-9C55-3F1E2D4C5B6A\n", "not a UUID"},
	{"[vm]\nmemory = 3M\n", "multiple of 2M"},
	{"[vm]\nmemory = 0\n", "multiple of 2M"},
	{"[vm]\nmemory = much\n", "not a size"},
	{"[vm]\ncpus = 65\n", "not a number from 1 to 64"},
	{"[vm]\ncpus = 0\n", "not a number from 1 to 64"},
	{"[vm]\nballoon = perhaps\n", "neither yes nor no"},
	{"[vm]\nballoon = no\nballoon = no\n", "vm.ini:3: balloon: given twice"},
	{"[vm]\npriority = 1001\n", "not a number from 0 to 1000"},
	{"[vm]\nserial = file:relative\n", "none of socket"},
	{"[vm]\nfirmware = CLOUDHV.fd\n", "vm.ini:2: firmware: not supported yet"},
	{"[vm]\ncpus = 1\ncpus = 2\n", "vm.ini:3: cpus: given twice"},
	{"[vm]\npriority = 1\npriority = 2\n", "vm.ini:3: priority: given twice"},
	{"[vm x]\n", "takes no name"},
	{"[disk]\n", "needs a name"},
	{"[disk a/b]\n", "must be at most"},
	{"[disk abcdefghijklmnopqrstuvwxyz]\n", "must be at most 20"},
	{"[disk a]\n[disk a]\n", "vm.ini:2: [disk a]: given twice"},
	{"[disk a]\nformat = vmdk\n", "neither raw nor qcow2"},
	{"[disk a]\nsize = 100\n", "multiple of 512"},
	{"[disk a]\npath = x\npath = y\n", "given twice"},
	{"[disk a]\nbacking = a,,b\n", "no list of 1 to 8 files"},
	{"[disk a]\nbacking = 1,2,3,4,5,6,7,8,9\n", "no list of 1 to 8 files"},
	{HEAD "[disk a]\npath = x\nformat = raw\nbacking = /b\n", "[disk a] backing needs format = qcow2"},
	{HEAD "[disk a]\nformat = raw\n", "[disk a] path is missing"},
	{HEAD "[disk a]\npath = x\n", "[disk a] format is missing"},
	{HEAD "[disk a]\npath = x\nformat = raw\n[disk b]\npath = x\nformat = raw\n", "have the same path"},
	{"[net a]\nbridge = ../../x\n", "not an interface name"},
	{"[net a]\nbridge = abcdefghijklmnop\n", "longer than 15"},
	{"[net a]\nmac = 01:00:00:00:00:01\n", "not a unicast MAC"},
	{"[net a]\nmac = 52:54:00:00:00\n", "not a unicast MAC"},
	{"[net a]\nmac = 52:54:00:00:00:0x\n", "not a unicast MAC"},
	{HEAD "[net a]\n", "[net a] bridge is missing"},
	{"[cdrom]\n", "unknown section"},
};

START_TEST(bad_input)
{
	ck_assert_int_eq(parse(bad[_i].text), -EINVAL);
	ck_assert_msg(strstr(err.message, bad[_i].says) != NULL, "%s", err.message);
}
END_TEST

START_TEST(too_many_disks)
{
	char text[4096];
	int at = snprintf(text, sizeof text, HEAD);
	for (int i = 0; i <= VM_DISKS_MAX; i++)
		at += snprintf(text + at, sizeof text - (size_t)at, "[disk d%d]\npath = p%d\nformat = raw\n",
			       i, i);
	ck_assert_int_eq(parse(text), -EINVAL);
	ck_assert_msg(strstr(err.message, "more than 16 disks") != NULL, "%s", err.message);
}
END_TEST

/* A peer's definition: what of it may not come in. */
static const struct {
	const char *text, *says;
} foreign[] = {
	{"kernel = /boot/vmlinuz\n", "kernel = /boot/vmlinuz: not a plain file name"},
	{"kernel = ../k\n", "kernel = ../k: not a plain file name"},
	{"kernel = .k\n", "not a plain file name"},
	{"kernel = vm.ini\n", "not a plain file name"},
	{"kernel = k\ninitrd = a/b\n", "initrd = a/b: not a plain file name"},
	{"kernel = k\ninitrd = k\n", "the file name k is used twice"},
	{"kernel = k\nserial = file:/etc/passwd\n", "serial = file:/etc/passwd"},
	{"kernel = k\nserial = stdio\n", "only socket may arrive"},
	{"kernel = k\n[disk a]\npath = /dev/sda\nformat = raw\n", "[disk a] path = /dev/sda"},
	{"kernel = k\n[disk a]\npath = snvmm.sock\nformat = raw\n", "[disk a] path = snvmm.sock"},
	{"kernel = k\n[disk a]\npath = files.json.new\nformat = raw\n", "[disk a] path"},
	{"kernel = k\n[disk a]\npath = run\nformat = raw\n", "[disk a] path = run"},
	{"kernel = k\n[disk a]\npath = ..\nformat = raw\n", "[disk a] path = .."},
	{"kernel = k\n[disk a]\npath = k\nformat = raw\n", "used twice"},
	{"kernel = k\n[disk a]\npath = a\nformat = qcow2\nbacking = b, /etc/shadow\n",
	 "[disk a] backing = /etc/shadow: not a plain file name"},
	{"kernel = k\n[disk a]\npath = a\nformat = qcow2\nbacking = ../x\n", "[disk a] backing = ../x"},
	{"kernel = k\n[disk a]\npath = a\nformat = qcow2\nbacking = b, a\n", "file name a is used twice"},
	{"kernel = k\n[net a]\nbridge = br9\n", "bridge = br9: not among the bridges"},
};

START_TEST(foreign_definition_is_confined)
{
	char text[1024];
	snprintf(text, sizeof text, "[vm]\nname = vm1\nmemory = 2G\n" UUID "%s", foreign[_i].text);
	ck_assert_msg(parse(text) == 0, "%s", err.message);
	ck_assert_int_eq(vmdef_check_foreign(&def, "br0, br1", &err), -EPERM);
	ck_assert_msg(strstr(err.message, foreign[_i].says) != NULL, "%s", err.message);
}
END_TEST

START_TEST(portable_definition_is_let_in)
{
	ck_assert_int_eq(
		parse(HEAD UUID
		      "initrd = /boot/i\nserial = stdio\n[disk kernel]\npath = kernel\nformat = raw\n"
		      "[disk a]\npath = /dev/sda\nformat = raw\nsize = 512\n[disk b]\npath = /srv/x\nformat "
		      "= qcow2\nbacking = /srv/base\n"
		      "[disk c]\npath = a.raw\nformat = raw\n[net n]\nbridge = br1\n"),
		0);
	ck_assert_int_eq(vmdef_check_foreign(&def, "br0, br1", &err), -EPERM);
	vmdef_make_portable(&def);
	ck_assert_msg(vmdef_check_foreign(&def, "br0, br1", &err) == 0, "%s", err.message);
	ck_assert_int_eq(vmdef_check_foreign(&def, "", &err), 0);
	ck_assert_str_eq(def.disks[0].path, "kernel");
	ck_assert_str_eq(def.disks[2].path, "b.qcow2");
	ck_assert_str_eq(def.disks[3].path, "a.raw");
	ck_assert_uint_eq(def.disks[1].size_bytes, 0);
	again = def;
	vmdef_make_portable(&again);
	ck_assert_mem_eq(&def, &again, sizeof def);
}
END_TEST

START_TEST(uuids)
{
	char a[VM_UUID_CHARS + 1], b[VM_UUID_CHARS + 1];
	ck_assert_int_eq(vm_uuid_generate(a, &err), 0);
	ck_assert_int_eq(vm_uuid_generate(b, &err), 0);
	ck_assert(vm_uuid_valid(a) && vm_uuid_valid(b));
	ck_assert_str_ne(a, b);
	ck_assert_int_eq(a[14], '4');
	ck_assert(!vm_uuid_valid("") && !vm_uuid_valid("0b8a4c1e-7d2f-4a36-9c55-3f1e2d4c5b6"));
	ck_assert(!vm_uuid_valid("0b8a4c1e/7d2f-4a36-9c55-3f1e2d4c5b6a"));
}
END_TEST

int main(void)
{
	Suite *s = suite_create("vmdef");
	TCase *tc = tcase_create("vmdef");
	tcase_add_test(tc, whole_definition);
	tcase_add_test(tc, defaults);
	tcase_add_test(tc, long_command_line_survives);
	tcase_add_loop_test(tc, bad_input, 0, ARRAY_SIZE(bad));
	tcase_add_test(tc, too_many_disks);
	tcase_add_loop_test(tc, foreign_definition_is_confined, 0, ARRAY_SIZE(foreign));
	tcase_add_test(tc, portable_definition_is_let_in);
	tcase_add_test(tc, uuids);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
