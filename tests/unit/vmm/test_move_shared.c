/* SPDX-License-Identifier: Apache-2.0 */
/* Whether two hosts see the same file: the second name, and what a hostile hello may say of it. */
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/suite.h"
#include "vmm/move_shared.h"

static char top[64], dirs[300], at_a[100], image[200];

static void put(const char *path, const char *text)
{
	FILE *f = fopen(path, "w");
	ck_assert(f != NULL && fputs(text, f) >= 0);
	fclose(f);
}

static void setup(void)
{
	char path[200];
	strcpy(top, "/tmp/move-shared.XXXXXX");
	ck_assert(mkdtemp(top) != NULL);
	snprintf(at_a, sizeof at_a, "%s/a", top);
	mkdir(at_a, 0700);
	snprintf(path, sizeof path, "%s/a/vms", top);
	mkdir(path, 0700);
	snprintf(path, sizeof path, "%s/copy", top);
	mkdir(path, 0700);
	snprintf(path, sizeof path, "%s/copy/vms", top);
	mkdir(path, 0700);
	snprintf(image, sizeof image, "%s/a/vms/root.raw", top);
	put(image, "the disk");
	snprintf(path, sizeof path, "%s/copy/vms/root.raw", top);
	put(path, "the disk");
	snprintf(dirs, sizeof dirs, "/nowhere, %s/a/ ,%s/copy", top, top);
}

static void teardown(void)
{
	char cmd[100];
	snprintf(cmd, sizeof cmd, "rm -rf %s", top);
	ck_assert_int_eq(system(cmd), 0);
}

static void challenge(struct move_shared *s, char folder[MOVE_SHARED_PATH_BYTES])
{
	struct stat st;
	ck_assert_int_eq(stat(image, &st), 0);
	ck_assert_int_eq(move_shared_locate(dirs, image, folder, s, NULL), 0);
	ck_assert_int_eq(move_shared_challenge(folder, st.st_dev, st.st_ino, s, NULL), 0);
}

static unsigned links(void)
{
	struct stat st;
	ck_assert_int_eq(stat(image, &st), 0);
	return (unsigned)st.st_nlink;
}

START_TEST(the_same_file_is_found)
{
	struct move_shared s;
	char folder[MOVE_SHARED_PATH_BYTES], path[MOVE_SHARED_PATH_BYTES];
	uint64_t dev, ino;
	struct stat st;
	challenge(&s, folder);
	ck_assert_str_eq(folder, at_a);
	ck_assert_str_eq(s.path, "vms/root.raw");
	ck_assert_uint_eq(s.bytes, 8);
	ck_assert_uint_eq(links(), 2);
	json_t *o = move_shared_to_json(&s);
	struct move_shared heard;
	ck_assert_int_eq(move_shared_parse(o, &heard, NULL), 0);
	json_decref(o);
	ck_assert_int_eq(move_shared_find(dirs, &heard, path, &dev, &ino, NULL), 0);
	ck_assert_str_eq(path, image);
	stat(image, &st);
	ck_assert(dev == st.st_dev && ino == st.st_ino);
	move_shared_withdraw(folder, &s);
	ck_assert_uint_eq(links(), 1);
	move_shared_withdraw(folder, &s); /* again */
	/* the name has gone, and so has the proof */
	ck_assert_int_eq(move_shared_find(dirs, &heard, path, &dev, &ino, NULL), -ENOENT);
}
END_TEST

START_TEST(another_file_is_not)
{
	struct move_shared s;
	struct error err = ERROR_INIT;
	char folder[MOVE_SHARED_PATH_BYTES], path[MOVE_SHARED_PATH_BYTES], other[200];
	uint64_t dev, ino;
	challenge(&s, folder);
	/* a copy of the folder */
	snprintf(other, sizeof other, "%s/copy", top);
	ck_assert_int_eq(move_shared_find(other, &s, path, &dev, &ino, &err), -ENOENT);
	ck_assert(strstr(err.message, "the folder is another one") != NULL);
	/* which has the second name, too, of its own copy */
	char second[300], name[200];
	snprintf(name, sizeof name, "%s/copy/vms/root.raw", top);
	snprintf(second, sizeof second, "%s/copy/vms/%s", top, s.name);
	put(second, "the disk");
	err = ERROR_INIT;
	ck_assert_int_eq(move_shared_find(other, &s, path, &dev, &ino, &err), -ENOENT);
	ck_assert(strstr(err.message, "the file is another one") != NULL);
	/* a symbolic link where the image is looked for */
	unlink(name);
	ck_assert_int_eq(symlink(image, name), 0);
	ck_assert_int_eq(move_shared_find(other, &s, path, &dev, &ino, NULL), -ENOENT);
	/* no folder at all */
	err = ERROR_INIT;
	ck_assert_int_eq(move_shared_find("", &s, path, &dev, &ino, &err), -ENOENT);
	ck_assert(strstr(err.message, "no [shared] path") != NULL);
	/* the length that the source has */
	s.bytes++;
	ck_assert_int_eq(move_shared_find(dirs, &s, path, &dev, &ino, NULL), -ENOENT);
	move_shared_withdraw(folder, &s);
}
END_TEST

START_TEST(only_the_vm_s_own_file_gets_a_name)
{
	struct move_shared s;
	struct stat st;
	char folder[MOVE_SHARED_PATH_BYTES], beside[200];
	ck_assert_int_eq(stat(image, &st), 0);
	ck_assert_int_eq(move_shared_locate(dirs, image, folder, &s, NULL), 0);
	ck_assert_int_eq(move_shared_challenge(folder, st.st_dev, st.st_ino + 1, &s, NULL), -EIO);
	/* exchanged under the VM */
	snprintf(beside, sizeof beside, "%s.new", image);
	put(beside, "another");
	ck_assert_int_eq(rename(beside, image), 0);
	ck_assert_int_eq(move_shared_challenge(folder, st.st_dev, st.st_ino, &s, NULL), -EIO);
	ck_assert_uint_eq(links(), 1);
	static const char *const elsewhere[] = {"/var/x.raw",  "/nowhere",	 "/nowhere/", "/nowhere/../x",
						"/nowhere//x", "/nowhereelse/x", "relative"};
	for (size_t i = 0; i < sizeof elsewhere / sizeof *elsewhere; i++)
		ck_assert_msg(move_shared_locate(dirs, elsewhere[i], folder, &s, NULL) == -EXDEV, "%s",
			      elsewhere[i]);
}
END_TEST

START_TEST(what_a_killed_process_left_is_swept)
{
	struct move_shared s, other;
	struct stat st;
	char folder[MOVE_SHARED_PATH_BYTES], second[200], foreign[300], kept[300], copy[300];
	challenge(&s, folder);
	challenge(&s, folder);
	ck_assert_uint_eq(links(), 3);
	ck_assert_int_eq(stat(image, &st), 0);
	/* what is not of this image, or not such a name, stays: another VM's proof, a file of that name, a
	 * person's link */
	snprintf(second, sizeof second, "%s/a/vms/data.raw", top);
	put(second, "another disk");
	struct stat beside;
	ck_assert_int_eq(stat(second, &beside), 0);
	ck_assert_int_eq(move_shared_locate(dirs, second, folder, &other, NULL), 0);
	ck_assert_int_eq(move_shared_challenge(folder, beside.st_dev, beside.st_ino, &other, NULL), 0);
	snprintf(foreign, sizeof foreign, "%s/a/vms/.snmigrate-0123456789abcdef0123456789abcdef", top);
	put(foreign, "somebody's");
	snprintf(kept, sizeof kept, "%s/a/vms/.snmigrate-backup", top);
	ck_assert_int_eq(link(image, kept), 0);
	snprintf(copy, sizeof copy, "%s/copy/vms/root.raw", top);
	/* neither for another inode, nor for an image elsewhere */
	move_shared_sweep(dirs, image, st.st_dev, st.st_ino + 1);
	move_shared_sweep("", image, st.st_dev, st.st_ino);
	move_shared_sweep(dirs, copy, st.st_dev, st.st_ino);
	ck_assert_uint_eq(links(), 4);
	move_shared_sweep(dirs, image, st.st_dev, st.st_ino);
	ck_assert_uint_eq(links(), 2);
	ck_assert_int_eq(access(kept, F_OK), 0);
	ck_assert_int_eq(access(foreign, F_OK), 0);
	ck_assert_int_eq(stat(second, &beside), 0);
	ck_assert_uint_eq(beside.st_nlink, 2);
	move_shared_sweep(dirs, image, st.st_dev, st.st_ino); /* again */
	move_shared_withdraw(folder, &other);
}
END_TEST

#define NAME "\"name\":\".snmigrate-0123456789abcdef0123456789abcdef\""
static const char *const hostile[] = {
	"{}",
	"{\"path\":\"vms/root.raw\"," NAME "}",
	"{\"path\":\"vms/root.raw\"," NAME ",\"bytes\":0}",
	"{\"path\":\"vms/root.raw\"," NAME ",\"bytes\":-1}",
	"{\"path\":\"\"," NAME ",\"bytes\":8}",
	"{\"path\":\"/etc/shadow\"," NAME ",\"bytes\":8}",
	"{\"path\":\"../a/root.raw\"," NAME ",\"bytes\":8}",
	"{\"path\":\"vms/../../x\"," NAME ",\"bytes\":8}",
	"{\"path\":\"vms/./x\"," NAME ",\"bytes\":8}",
	"{\"path\":\"vms//x\"," NAME ",\"bytes\":8}",
	"{\"path\":\"vms/x/\"," NAME ",\"bytes\":8}",
	"{\"path\":\"vms/x\\nformat = qcow2\"," NAME ",\"bytes\":8}",
	"{\"path\":\"vms/x \"," NAME ",\"bytes\":8}",
	"{\"path\":\"vms/x\\t\"," NAME ",\"bytes\":8}",
	"{\"path\":1," NAME ",\"bytes\":8}",
	"{\"path\":\"vms/x\",\"name\":\"root.raw\",\"bytes\":8}",
	"{\"path\":\"vms/x\",\"name\":\".snmigrate-../../../../etc/passwd00000000\",\"bytes\":8}",
	"{\"path\":\"vms/x\",\"name\":\".snmigrate-0123456789ABCDEF0123456789abcdef\",\"bytes\":8}",
	"{\"path\":\"vms/x\",\"bytes\":8}",
};

START_TEST(hostile_words_are_refused)
{
	struct move_shared s;
	json_t *o = json_loads(hostile[_i], 0, NULL);
	ck_assert_msg(o != NULL, "%s", hostile[_i]);
	ck_assert_msg(move_shared_parse(o, &s, NULL) == -EPROTO, "%s", hostile[_i]);
	json_decref(o);
}
END_TEST

int main(void)
{
	Suite *s = suite_create("move_shared");
	TCase *tc = tcase_create("move_shared");
	tcase_add_checked_fixture(tc, setup, teardown);
	tcase_add_test(tc, the_same_file_is_found);
	tcase_add_test(tc, another_file_is_not);
	tcase_add_test(tc, only_the_vm_s_own_file_gets_a_name);
	tcase_add_test(tc, what_a_killed_process_left_is_swept);
	tcase_add_loop_test(tc, hostile_words_are_refused, 0, sizeof hostile / sizeof *hostile);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
