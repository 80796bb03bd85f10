/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/cleanup.h"
#include "host/fsutil.h"
#include "host/record.h"
#include "host/registry.h"
#include "tests/suite.h"

#define UUID "0b8a4c1e-7d2f-4a36-9c55-3f1e2d4c5b6a"

static char dir[128];
static struct host_config cfg;
static struct error err;

static void setup(void)
{
	snprintf(dir, sizeof dir, "%s/test_registry.XXXXXX",
		 getenv("TMPDIR") ? getenv("TMPDIR") : "/var/tmp");
	ck_assert(mkdtemp(dir) != NULL);
	memset(&cfg, 0, sizeof cfg);
	strcpy(cfg.name, "h1");
	snprintf(cfg.state_dir, sizeof cfg.state_dir, "%s/state", dir);
	err = ERROR_INIT;
	ck_assert_int_eq(fs_make_dirs(cfg.state_dir, &err), 0);
	ck_assert_msg(registry_prepare(&cfg, &err) == 0, "%s", err.message);
}

static void teardown(void)
{
	ck_assert_msg(fs_remove_tree(dir, &err) == 0, "%s", err.message);
}

static const char *at(const char *rel)
{
	static char path[4][600];
	static unsigned n;
	n = (n + 1) % 4;
	snprintf(path[n], sizeof path[n], "%s/%s", dir, rel);
	return path[n];
}

static void put(const char *rel, const char *text)
{
	FILE *f = fopen(at(rel), "w");
	ck_assert_msg(f != NULL, "%s", at(rel));
	fputs(text, f);
	fclose(f);
}

static bool there(const char *rel)
{
	struct stat st;
	return lstat(at(rel), &st) == 0;
}

static void make_socket(const char *rel)
{
	struct sockaddr_un sa = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);
	snprintf(sa.sun_path, sizeof sa.sun_path, "%s", at(rel));
	ck_assert_int_eq(bind(fd, (struct sockaddr *)&sa, sizeof sa), 0);
	close(fd);
}

static int open_vm(void)
{
	int fd = open(at("state/vms/vm1"), O_RDONLY | O_DIRECTORY);
	ck_assert_int_ge(fd, 0);
	return fd;
}

static void define(struct vm_definition *def, const char *more)
{
	char text[2048];
	put("kernel.img", "KERNEL");
	snprintf(text, sizeof text,
		 "[vm]\nname = vm1\nuuid = " UUID "\nmemory = 64M\nkernel = kernel.img\n%s", more);
	ck_assert_msg(vmdef_parse(text, strlen(text), "t", def, &err) == 0, "%s", err.message);
}

static int create(const char *more, json_t *imports)
{
	static struct vm_definition def;
	define(&def, more);
	return registry_create_vm(&cfg, &def, dir, imports, &err);
}

static bool listed(json_t *left, const char *rel)
{
	size_t i;
	json_t *v;
	json_array_foreach(left, i, v) if (!strcmp(json_string_value(v), at(rel))) return true;
	return false;
}

static bool empty(const char *rel)
{
	DIR *d = opendir(at(rel));
	struct dirent *de;
	int n = 0;
	while ((de = readdir(d)))
		n++;
	closedir(d);
	return n == 2;
}

/* What says nothing gets a balloon; a no is not written, as older programs do not know the key. */
START_TEST(create_gives_a_balloon)
{
	static const char *const said[] = {"", "balloon = yes\n", "balloon = no\n"};
	struct vm_definition def;
	ck_assert_msg(create(said[_i], NULL) == 0, "%s", err.message);
	CLEANUP_FD int fd = open_vm();
	ck_assert_int_eq(registry_load_definition(fd, "vm1", &def, &err), 0);
	ck_assert_int_eq(def.balloon, _i < 2 ? VM_BALLOON_YES : VM_BALLOON_UNSAID);
}
END_TEST

START_TEST(create_copies_and_owns)
{
	put("image", "IMAGE");
	json_t *imports = json_pack("{s:s}", "root", at("image"));
	ck_assert_msg(create("[disk root]\npath = r.img\nformat = raw\n[disk data]\npath = d.img\nformat = "
			     "raw\nsize = 1M\n"
			     "[net n]\nbridge = br0\n",
			     imports) == 0,
		      "%s", err.message);
	json_decref(imports);
	struct vm_definition def;
	CLEANUP_FD int fd = open_vm();
	ck_assert_int_eq(registry_load_definition(fd, "vm1", &def, &err), 0);
	ck_assert_str_eq(def.kernel, "kernel");
	ck_assert(def.nets[0].has_mac && (def.nets[0].mac[0] & 3) == 2);
	ck_assert_uint_eq(def.disks[1].size_bytes, 0);
	struct stat st;
	ck_assert_int_eq(stat(at("state/vms/vm1/d.img"), &st), 0);
	ck_assert_int_eq(st.st_size, 1 << 20);
	ck_assert_int_eq(st.st_mode & 0777, 0600);
	CLEANUP_FREE char *text = NULL;
	size_t len;
	ck_assert_int_eq(fs_read_file(at("state/vms/vm1/r.img"), 100, &text, &len, &err), 0);
	ck_assert_str_eq(text, "IMAGE");
	struct record *r = NULL;
	struct vm_record rec;
	ck_assert_int_eq(record_open(cfg.state_dir, UUID, &r, &err), 0);
	ck_assert_int_eq(record_load(r, &rec, &err), 0);
	record_close(r);
	ck_assert_int_eq(rec.state, HANDOVER_OWNER);
	ck_assert_uint_eq(rec.epoch, 1);
	ck_assert_str_eq(rec.folder, "vms/vm1");
	ck_assert(empty("state/creating"));
	/* the name is taken; nothing of the second try stays */
	ck_assert_int_eq(create("", NULL), -EEXIST);
	ck_assert(empty("state/creating"));
}
END_TEST

static const struct {
	const char *more, *says;
	int rc;
} refusals[] = {
	{"[disk a]\npath = a.img\nformat = raw\n",
	 "[disk a]: a.img does not exist: give --import a=PATH, or size =", -ENOENT},
	{"[disk a]\npath = ../a.img\nformat = raw\n", "not a plain file name", -EINVAL},
	{"[disk a]\npath = /nonexistent/a\nformat = raw\n", "[disk a]: /nonexistent/a: No such file",
	 -ENOENT},
	{"[disk a]\npath = kernel\nformat = raw\nsize = 1M\n", "that name is the kernel's", -EINVAL},
	{"[disk a]\npath = vm.ini\nformat = raw\nsize = 1M\n", "not a plain file name", -EINVAL},
	{"initrd = missing.img\n", "missing.img: No such file", -ENOENT},
};

START_TEST(create_refusals_leave_nothing)
{
	ck_assert_int_eq(create(refusals[_i].more, NULL), refusals[_i].rc);
	ck_assert_msg(strstr(err.message, refusals[_i].says) != NULL, "%s", err.message);
	ck_assert(empty("state/creating") && empty("state/vms"));
	ck_assert(!there("state/records/" UUID));
}
END_TEST

START_TEST(create_refuses_an_import_of_no_disk)
{
	json_t *imports = json_pack("{s:s}", "rot", "/etc/passwd");
	ck_assert_int_eq(create("", imports), -EINVAL);
	ck_assert_msg(strstr(err.message, "has no [disk rot]") != NULL, "%s", err.message);
	json_decref(imports);
}
END_TEST

START_TEST(copies_keep_holes)
{
	CLEANUP_FD int in = open(at("sparse"), O_RDWR | O_CREAT, 0600);
	ck_assert_int_eq(ftruncate(in, 64 << 20), 0);
	ck_assert_int_eq(pwrite(in, "x", 1, 40 << 20), 1);
	CLEANUP_FD int d = open(dir, O_RDONLY | O_DIRECTORY);
	ck_assert_msg(fs_copy_file(at("sparse"), d, "copy", &err) == 0, "%s", err.message);
	struct stat st;
	char c = 0;
	ck_assert_int_eq(stat(at("copy"), &st), 0);
	ck_assert_int_eq(st.st_size, 64 << 20);
	ck_assert_int_lt(st.st_blocks * 512, 2 << 20);
	CLEANUP_FD int out = open(at("copy"), O_RDONLY);
	ck_assert_int_eq(pread(out, &c, 1, 40 << 20), 1);
	ck_assert_int_eq(c, 'x');
	ck_assert_int_eq(fs_copy_file(at("sparse"), d, "copy", &err), -EEXIST);
}
END_TEST

static void make_moved(void)
{
	json_t *imports = json_pack("{s:s}", "root", at("image"));
	put("image", "IMAGE");
	put("outside", "OUTSIDE");
	char more[400];
	snprintf(more, sizeof more,
		 "[disk root]\npath = r.img\nformat = raw\n[disk out]\npath = %s\nformat = raw\n",
		 at("outside"));
	ck_assert_msg(create(more, imports) == 0, "%s", err.message);
	json_decref(imports);
	make_socket("state/vms/vm1/snvmm.sock");
	ck_assert_int_eq(mkdir(at("state/vms/vm1/run"), 0700), 0);
	make_socket("state/vms/vm1/run/nbd.sock");
}

START_TEST(delete_takes_what_was_created)
{
	json_t *left = NULL;
	make_moved();
	ck_assert_msg(registry_delete_moved(&cfg, "vms/vm1", &left, &err) == 0, "%s", err.message);
	ck_assert(!there("state/vms/vm1"));
	ck_assert(there("outside"));
	ck_assert_uint_eq(json_array_size(left), 1);
	ck_assert(listed(left, "outside"));
	json_decref(left);
	ck_assert_int_eq(registry_delete_moved(&cfg, "vms/vm1", &left, &err), 0);
	ck_assert_uint_eq(json_array_size(left), 0);
	json_decref(left);
}
END_TEST

/* What the registry did not create stays: foreign files, links, folders, and files that took a listed name.
 */
START_TEST(delete_leaves_what_is_not_ours)
{
	json_t *left = NULL;
	make_moved();
	put("precious", "P");
	put("state/vms/vm1/notes.txt", "N");
	ck_assert_int_eq(symlink(at("precious"), at("state/vms/vm1/link")), 0);
	ck_assert_int_eq(mkdir(at("state/vms/vm1/sub"), 0700), 0);
	put("state/vms/vm1/sub/file", "F");
	/* another file under the listed name */
	put("state/vms/vm1/other", "O");
	ck_assert_int_eq(rename(at("state/vms/vm1/other"), at("state/vms/vm1/r.img")), 0);
	/* and a link where the kernel was */
	unlink(at("state/vms/vm1/kernel"));
	ck_assert_int_eq(symlink(at("precious"), at("state/vms/vm1/kernel")), 0);
	ck_assert_msg(registry_delete_moved(&cfg, "vms/vm1", &left, &err) == 0, "%s", err.message);
	static const char *const stay[] = {"state/vms/vm1/notes.txt", "state/vms/vm1/link",
					   "state/vms/vm1/sub", "state/vms/vm1/r.img",
					   "state/vms/vm1/kernel"};
	for (size_t i = 0; i < ARRAY_SIZE(stay); i++)
		ck_assert_msg(there(stay[i]) && listed(left, stay[i]), "%s", stay[i]);
	ck_assert(there("precious") && there("state/vms/vm1/sub/file"));
	ck_assert_uint_eq(json_array_size(left), ARRAY_SIZE(stay) + 1);
	ck_assert(!there("state/vms/vm1/vm.ini") && !there("state/vms/vm1/snvmm.sock") &&
		  !there("state/vms/vm1/run"));
	json_decref(left);
	/* the name is free for an arrival; what was left stays within reach */
	ck_assert_int_eq(mkdir(at("state/incoming/" UUID "-2"), 0700), 0);
	put("state/incoming/" UUID "-2/vm.ini", "x");
	ck_assert_msg(registry_publish(&cfg, "incoming/" UUID "-2", "vm1", &err) == 0, "%s", err.message);
	ck_assert(there("state/vms/vm1/vm.ini") && !there("state/vms/vm1/notes.txt"));
	ck_assert_int_eq(registry_publish(&cfg, "incoming/" UUID "-2", "vm1", &err), 0);
	ck_assert(!empty("state/kept"));
}
END_TEST

START_TEST(delete_never_leaves_the_folder_by_files_json)
{
	json_t *left = NULL;
	struct stat st;
	char text[600];
	make_moved();
	put("precious", "P");
	ck_assert_int_eq(stat(at("precious"), &st), 0);
	snprintf(text, sizeof text,
		 "{\"files\":[{\"name\":\"../../../precious\",\"device\":%llu,\"inode\":%llu}]}",
		 (unsigned long long)st.st_dev, (unsigned long long)st.st_ino);
	put("state/vms/vm1/files.json", text);
	ck_assert_int_eq(registry_delete_moved(&cfg, "vms/vm1", &left, &err), 0);
	ck_assert(there("precious"));
	ck_assert(listed(left, "state/vms/vm1/r.img"));
	json_decref(left);
}
END_TEST

START_TEST(delete_of_a_link_is_refused)
{
	json_t *left = NULL;
	make_moved();
	ck_assert_int_eq(rename(at("state/vms/vm1"), at("elsewhere")), 0);
	ck_assert_int_eq(symlink(at("elsewhere"), at("state/vms/vm1")), 0);
	ck_assert_int_lt(registry_delete_moved(&cfg, "vms/vm1", &left, &err), 0);
	ck_assert(there("elsewhere/r.img"));
	json_decref(left);
}
END_TEST

START_TEST(keep)
{
	char kept[REGISTRY_FOLDER_BYTES];
	make_moved();
	ck_assert_msg(registry_keep(&cfg, "vms/vm1", "vm1", 7, kept, &err) == 0, "%s", err.message);
	ck_assert_str_eq(kept, "kept/vm1-7");
	ck_assert(there("state/kept/vm1-7/r.img") && !there("state/kept/vm1-7/snvmm.sock") &&
		  !there("state/vms/vm1"));
	ck_assert_int_eq(registry_keep(&cfg, "vms/vm1", "vm1", 7, kept, &err), 0);
	ck_assert_int_eq(registry_keep(&cfg, "kept/vm1-7", "vm1", 7, kept, &err), 0);
}
END_TEST

/* Stopped, it holds nothing: only its definition says whose the device is. */
START_TEST(a_device_of_a_vm_is_known_by_any_name)
{
	char more[256], name[VM_NAME_MAX_CHARS + 1] = "";
	if (mknod(at("dev"), S_IFBLK | 0600, makedev(7, 250)) || symlink(at("dev"), at("alias")) ||
	    mknod(at("free"), S_IFBLK | 0600, makedev(7, 251))) {
		printf("skipped: no device node can be made\n");
		return;
	}
	struct vm_definition def;
	snprintf(more, sizeof more, "[disk root]\npath = %s\nformat = raw\n", at("dev"));
	define(&def, more);
	ck_assert_int_eq(mkdir(at("state/vms/vm1"), 0700), 0);
	int fd = open(at("state/vms/vm1"), O_RDONLY | O_DIRECTORY);
	ck_assert_msg(registry_store_definition(fd, &def, &err) == 0, "%s", err.message);
	close(fd);
	const char *other = "1b8a4c1e-7d2f-4a36-9c55-3f1e2d4c5b6a";
	ck_assert(registry_device_used(&cfg, at("dev"), other, name));
	ck_assert_str_eq(name, "vm1");
	ck_assert(registry_device_used(&cfg, at("alias"), other, name));
	ck_assert(!registry_device_used(&cfg, at("free"), other, name));
	ck_assert(!registry_device_used(&cfg, at("dev"), UUID, name));
}
END_TEST

START_TEST(publish_refuses_a_taken_name)
{
	make_moved();
	ck_assert_int_eq(mkdir(at("state/incoming/" UUID "-2"), 0700), 0);
	ck_assert_int_eq(registry_publish(&cfg, "incoming/" UUID "-2", "vm1", &err), -EEXIST);
	ck_assert(there("state/incoming/" UUID "-2"));
}
END_TEST

START_TEST(incoming_is_removed_whole_and_nothing_else_is)
{
	ck_assert_int_eq(mkdir(at("state/incoming/" UUID "-2"), 0700), 0);
	ck_assert_int_eq(mkdir(at("state/incoming/" UUID "-2/run"), 0700), 0);
	put("state/incoming/" UUID "-2/run/x", "x");
	put("precious", "P");
	ck_assert_int_eq(symlink(at("precious"), at("state/incoming/" UUID "-2/link")), 0);
	ck_assert_int_eq(registry_remove_incoming(&cfg, "incoming/" UUID "-2", &err), 0);
	ck_assert(empty("state/incoming") && there("precious"));
	ck_assert_int_eq(registry_remove_incoming(&cfg, "incoming/" UUID "-2", &err), 0);
	ck_assert_int_eq(registry_remove_incoming(&cfg, "incoming/..", &err), -EINVAL);
	ck_assert_int_eq(registry_remove_incoming(&cfg, "incoming/../vms", &err), -EINVAL);
	ck_assert_int_eq(registry_remove_incoming(&cfg, "vms/vm1", &err), -EINVAL);
	ck_assert(there("state/vms"));
}
END_TEST

START_TEST(results)
{
	json_t *o = NULL, *put_in = json_pack("{s:s, s:i}", "result", "moved", "epoch", 3);
	ck_assert_int_eq(registry_result_load(&cfg, UUID, &o, &err), -ENOENT);
	ck_assert_int_eq(registry_result_store(&cfg, UUID, put_in, &err), 0);
	ck_assert_int_eq(registry_result_load(&cfg, UUID, &o, &err), 0);
	ck_assert(json_equal(o, put_in));
	ck_assert_int_eq(registry_result_load(&cfg, "../x", &o, &err), -EINVAL);
	json_decref(o);
	json_decref(put_in);
}
END_TEST

static void count_line(void *opaque, const char *uuid, bool arrival)
{
	ck_assert_str_eq(uuid, UUID);
	((unsigned *)opaque)[arrival]++;
}

/* The last line of a move from here and that of an arrival are two. */
START_TEST(last_lines)
{
	json_t *out = json_pack("{s:s}", "result", "failed"), *in = json_pack("{s:s}", "result", "moved"),
	       *o = NULL;
	unsigned n[2] = {0};
	ck_assert_uint_eq(registry_result_time_ms(&cfg, UUID, false), 0);
	ck_assert_int_eq(registry_arrival_load(&cfg, UUID, &o, &err), -ENOENT);
	ck_assert_int_eq(registry_result_store(&cfg, UUID, out, &err), 0);
	ck_assert_int_eq(registry_arrival_load(&cfg, UUID, &o, &err), -ENOENT);
	ck_assert_int_eq(registry_arrival_store(&cfg, UUID, in, &err), 0);
	ck_assert_int_eq(registry_arrival_load(&cfg, UUID, &o, &err), 0);
	ck_assert(json_equal(o, in));
	json_decref(o);
	ck_assert_int_eq(registry_result_load(&cfg, UUID, &o, &err), 0);
	ck_assert(json_equal(o, out));
	json_decref(o);
	ck_assert_uint_gt(registry_result_time_ms(&cfg, UUID, true), UINT64_C(1600000000000));
	put("state/moves/" UUID ".json.new", "x");
	put("state/moves/nonsense.json", "x");
	ck_assert_int_eq(registry_results_each(&cfg, count_line, n, &err), 0);
	ck_assert_uint_eq(n[0], 1);
	ck_assert_uint_eq(n[1], 1);
	ck_assert_int_eq(registry_arrival_store(&cfg, "../x", in, &err), -EINVAL);
	json_decref(in);
	json_decref(out);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("registry");
	TCase *tc = tcase_create("registry");
	tcase_add_checked_fixture(tc, setup, teardown);
	tcase_add_loop_test(tc, create_gives_a_balloon, 0, 3);
	tcase_add_test(tc, create_copies_and_owns);
	tcase_add_loop_test(tc, create_refusals_leave_nothing, 0, ARRAY_SIZE(refusals));
	tcase_add_test(tc, create_refuses_an_import_of_no_disk);
	tcase_add_test(tc, copies_keep_holes);
	tcase_add_test(tc, delete_takes_what_was_created);
	tcase_add_test(tc, delete_leaves_what_is_not_ours);
	tcase_add_test(tc, delete_never_leaves_the_folder_by_files_json);
	tcase_add_test(tc, delete_of_a_link_is_refused);
	tcase_add_test(tc, keep);
	tcase_add_test(tc, a_device_of_a_vm_is_known_by_any_name);
	tcase_add_test(tc, publish_refuses_a_taken_name);
	tcase_add_test(tc, incoming_is_removed_whole_and_nothing_else_is);
	tcase_add_test(tc, results);
	tcase_add_test(tc, last_lines);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
