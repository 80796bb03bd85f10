/* SPDX-License-Identifier: Apache-2.0 */
#include <check.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>
#include <xxhash.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "host/handover.h"
#include "host/record.h"
#include "tests/suite.h"

#define UUID  "0b8a4c1e-7d2f-4a36-9c55-3f1e2d4c5b6a"
#define OTHER "1b8a4c1e-7d2f-4a36-9c55-3f1e2d4c5b6a"

/* Everything three times: on the disk of the temporary directory, on tmpfs, and as where O_DIRECT is refused.
 */
static const char *const roots[] = {NULL, "/dev/shm", NULL};
#define REFUSED 2
static char dir[256];

static void make_dir(int which)
{
	const char *root = roots[which] ? roots[which] : getenv("TMPDIR") ? getenv("TMPDIR") : "/var/tmp";
	snprintf(dir, sizeof dir, "%s/test_record.XXXXXX", root);
	ck_assert_msg(mkdtemp(dir) != NULL, "%s: %s", dir, strerror(errno));
	/* read at the first fault point of the process, hence of the test where each has a process of its own
	 */
	if (which == REFUSED)
		setenv("SNM_FAULT", "record-direct:fail", 1);
}

static void remove_dir(void)
{
	char path[600];
	snprintf(path, sizeof path, "%s/records", dir);
	DIR *d = opendir(path);
	struct dirent *e;
	while (d && (e = readdir(d)))
		unlinkat(dirfd(d), e->d_name, 0);
	if (d)
		closedir(d);
	rmdir(path);
	rmdir(dir);
}

static void path_of(const char *name, char *out, size_t size)
{
	snprintf(out, size, "%s/records/%s", dir, name);
}

static struct vm_record sample(enum handover_state state, uint64_t epoch)
{
	struct vm_record rec = {.uuid = UUID,
				.state = state,
				.epoch = epoch,
				.flags = RECORD_POWERED_ON,
				.name = "vm1",
				.peer = "host2",
				.peer_address = "192.0.2.7:16516",
				.folder = "vms/vm1",
				.reason = "a test"};
	return rec;
}

static void check_same(const struct vm_record *a, const struct vm_record *b)
{
	ck_assert_str_eq(a->uuid, b->uuid);
	ck_assert_int_eq(a->state, b->state);
	ck_assert_uint_eq(a->epoch, b->epoch);
	ck_assert_uint_eq(a->peer_epoch, b->peer_epoch);
	ck_assert_uint_eq(a->flags, b->flags);
	ck_assert_str_eq(a->name, b->name);
	ck_assert_str_eq(a->peer, b->peer);
	ck_assert_str_eq(a->peer_address, b->peer_address);
	ck_assert_str_eq(a->folder, b->folder);
	ck_assert_str_eq(a->reason, b->reason);
}

static struct record *create(enum handover_state state, uint64_t epoch)
{
	struct error err = ERROR_INIT;
	struct vm_record rec = sample(state, epoch);
	struct record *r = NULL;
	ck_assert_msg(record_create(dir, &rec, &r, &err) == 0, "%s", err.message);
	return r;
}

static void step(struct record *r, enum handover_state to, uint64_t to_epoch)
{
	struct error err = ERROR_INIT;
	struct vm_record rec;
	ck_assert_msg(record_load(r, &rec, &err) == 0, "%s", err.message);
	enum handover_state from = rec.state;
	uint64_t from_epoch = rec.epoch;
	rec.state = to;
	rec.epoch = to_epoch;
	ck_assert_msg(record_compare_and_set(r, from, from_epoch, &rec, NULL, &err) == 0, "%s", err.message);
}

static int load_fresh(struct vm_record *out, struct error *err)
{
	struct record *r = NULL;
	int rc = record_open(dir, UUID, &r, err);
	if (!rc)
		rc = record_load(r, out, err);
	record_close(r);
	return rc;
}

static void scribble(off_t offset, const void *bytes, size_t len)
{
	char path[600];
	path_of(UUID, path, sizeof path);
	CLEANUP_FD int fd = open(path, O_WRONLY | O_CLOEXEC);
	ck_assert_int_ge(fd, 0);
	ck_assert_int_eq(pwrite(fd, bytes, len, offset), (ssize_t)len);
	ck_assert_int_eq(fsync(fd), 0);
}

static void peek(uint8_t file[2 * RECORD_SLOT_BYTES])
{
	char path[600];
	path_of(UUID, path, sizeof path);
	CLEANUP_FD int fd = open(path, O_RDONLY | O_CLOEXEC);
	ck_assert_int_ge(fd, 0);
	ck_assert_int_eq(pread(fd, file, 2 * RECORD_SLOT_BYTES, 0), 2 * RECORD_SLOT_BYTES);
}

START_TEST(codec_gives_back_what_went_in)
{
	uint8_t slot[RECORD_SLOT_BYTES];
	struct vm_record in = sample(HANDOVER_HANDING_OVER, UINT64_MAX - 1), out;
	in.sequence = 77;
	in.peer_epoch = 12;
	in.flags = RECORD_FLAGS_KNOWN;
	memset(in.folder, 'f', sizeof in.folder - 1);
	memset(in.reason, 'r', sizeof in.reason - 1);
	record_encode(&in, slot);
	ck_assert_int_eq(record_decode(slot, &out, NULL), 0);
	check_same(&in, &out);
	ck_assert_uint_eq(out.sequence, 77);
}
END_TEST

START_TEST(codec_refuses_every_flipped_bit)
{
	uint8_t slot[RECORD_SLOT_BYTES];
	struct vm_record in = sample(HANDOVER_OWNER, 3), out;
	record_encode(&in, slot);
	for (unsigned bit = 0; bit < RECORD_SLOT_BYTES * 8; bit += bit < 8 * 1200 ? 1 : 251) {
		slot[bit / 8] ^= (uint8_t)(1u << bit % 8);
		if (record_decode(slot, &out, NULL) != -EUCLEAN)
			ck_abort_msg("bit %u accepted", bit);
		slot[bit / 8] ^= (uint8_t)(1u << bit % 8);
	}
	ck_assert_int_eq(record_decode(slot, &out, NULL), 0);
}
END_TEST

static void reseal(uint8_t *slot)
{
	put_be64(slot + RECORD_SLOT_BYTES - 8, XXH3_64bits(slot, RECORD_SLOT_BYTES - 8));
}

START_TEST(codec_refuses_senseless_content_under_a_sound_checksum)
{
	uint8_t slot[RECORD_SLOT_BYTES];
	struct vm_record in = sample(HANDOVER_OWNER, 3), out;
	static const struct {
		unsigned at;
		uint8_t value;
		int want;
	} t[] = {
		{11, 0, -EUCLEAN},			      /* format 0 */
		{11, 2, -EPROTONOSUPPORT}, {35, 0, -EUCLEAN}, /* state none */
		{35, 7, -EUCLEAN},			      /* state unknown */
		{40, 0x80, -EUCLEAN},			      /* flag unknown */
		{44, 1, -EUCLEAN},			      /* reserved */
		{64, 'G', -EUCLEAN},			      /* not a uuid */
		{64, 'B', -EUCLEAN},			      /* upper case */
		{128 + 64, 'x', -EUCLEAN},		      /* bytes behind the name */
		{500, 1, -EUCLEAN},	   {2000, 1, -EUCLEAN},
	};
	for (unsigned i = 0; i < ARRAY_SIZE(t); i++) {
		record_encode(&in, slot);
		slot[t[i].at] = t[i].value;
		reseal(slot);
		ck_assert_msg(record_decode(slot, &out, NULL) == t[i].want, "case %u", i);
	}
	/* an unterminated string */
	record_encode(&in, slot);
	memset(slot + 832, 'x', 256);
	reseal(slot);
	ck_assert_int_eq(record_decode(slot, &out, NULL), -EUCLEAN);
}
END_TEST

START_TEST(a_record_is_durable_through_a_whole_move)
{
	struct vm_record got, want = sample(HANDOVER_OWNER, 0);
	make_dir(_i);
	struct record *r = create(HANDOVER_OWNER, 0);
	if (_i == REFUSED && !(getenv("CK_FORK") && !strcmp(getenv("CK_FORK"), "no")))
		ck_assert(!record_is_direct(r));
	ck_assert_int_eq(load_fresh(&got, NULL), 0);
	check_same(&got, &want);
	step(r, HANDOVER_OWNER, 1);
	step(r, HANDOVER_HANDING_OVER, 1);
	step(r, HANDOVER_MOVED, 1);
	ck_assert_int_eq(load_fresh(&got, NULL), 0);
	ck_assert_int_eq(got.state, HANDOVER_MOVED);
	ck_assert_uint_eq(got.sequence, 4);
	got.flags |= RECORD_FILES_DONE;
	ck_assert_int_eq(record_store(r, &got, NULL), 0);
	record_close(r);
	ck_assert_int_eq(load_fresh(&got, NULL), 0);
	ck_assert(got.flags & RECORD_FILES_DONE);
	ck_assert_uint_ge(got.changed_ns, got.created_ns);

	ck_assert_int_eq(record_open(dir, UUID, &r, NULL), 0);
	ck_assert_int_eq(record_lock(r, 0, NULL), 0);
	ck_assert_int_eq(record_remove(r, NULL), 0);
	record_close(r);
	ck_assert_int_eq(record_open(dir, UUID, &r, NULL), -ENOENT);
	remove_dir();
}
END_TEST

START_TEST(compare_and_set_compares)
{
	struct error err = ERROR_INIT;
	make_dir(_i);
	struct record *r = create(HANDOVER_PREPARED, 4);
	struct vm_record rec, actual;
	ck_assert_int_eq(record_load(r, &rec, NULL), 0);

	rec.state = HANDOVER_ABANDONED;
	ck_assert_int_eq(record_compare_and_set(r, HANDOVER_PREPARED, 3, &rec, &actual, NULL), -ESTALE);
	ck_assert_uint_eq(actual.epoch, 4);
	ck_assert_int_eq(record_compare_and_set(r, HANDOVER_PREPARED, 4, &rec, &actual, NULL), 0);
	/* the COMMIT that comes too late */
	rec.state = HANDOVER_OWNER_UNCONFIRMED;
	ck_assert_int_eq(record_compare_and_set(r, HANDOVER_PREPARED, 4, &rec, &actual, &err), -ESTALE);
	ck_assert_int_eq(actual.state, HANDOVER_ABANDONED);
	ck_assert_ptr_nonnull(strstr(err.message, "abandoned"));
	/* what the table forbids */
	ck_assert_int_eq(record_compare_and_set(r, HANDOVER_ABANDONED, 4, &rec, NULL, NULL), -EINVAL);
	rec.state = HANDOVER_PREPARED;
	ck_assert_int_eq(record_compare_and_set(r, HANDOVER_ABANDONED, 4, &rec, NULL, NULL), -EINVAL);
	rec.epoch = 5;
	ck_assert_int_eq(record_compare_and_set(r, HANDOVER_ABANDONED, 4, &rec, NULL, NULL), 0);
	/* store cannot change state or epoch, nor the VM */
	rec.epoch = 6;
	ck_assert_int_eq(record_store(r, &rec, NULL), -EINVAL);
	rec.epoch = 5;
	rec.state = HANDOVER_ABANDONED;
	ck_assert_int_eq(record_store(r, &rec, NULL), -EINVAL);
	rec.state = HANDOVER_PREPARED;
	memcpy(rec.uuid, OTHER, sizeof rec.uuid);
	ck_assert_int_eq(record_store(r, &rec, NULL), -EINVAL);
	/* an arrival cannot be forgotten before it was abandoned */
	ck_assert_int_eq(record_remove(r, NULL), -EINVAL);
	record_close(r);
	remove_dir();
}
END_TEST

static void *race(void *arg)
{
	void **a = arg;
	struct vm_record rec = *(struct vm_record *)a[1];
	rec.state = *(enum handover_state *)a[2];
	return (void *)(intptr_t)record_compare_and_set(a[0], HANDOVER_PREPARED, rec.epoch, &rec, NULL, NULL);
}

START_TEST(owner_and_abandoned_exclude_each_other)
{
	make_dir(_i);
	struct record *r = create(HANDOVER_PREPARED, 1);
	for (uint64_t epoch = 1; epoch < 40; epoch++) {
		struct vm_record rec;
		ck_assert_int_eq(record_load(r, &rec, NULL), 0);
		enum handover_state owner = HANDOVER_OWNER_UNCONFIRMED, abandoned = HANDOVER_ABANDONED;
		void *a[] = {r, &rec, &owner}, *b[] = {r, &rec, &abandoned};
		pthread_t ta, tb;
		void *ra, *rb;
		ck_assert_int_eq(pthread_create(&ta, NULL, race, epoch & 1 ? a : b), 0);
		ck_assert_int_eq(pthread_create(&tb, NULL, race, epoch & 1 ? b : a), 0);
		pthread_join(ta, &ra);
		pthread_join(tb, &rb);
		ck_assert((ra == NULL) != (rb == NULL));
		ck_assert_int_eq((int)(intptr_t)ra + (int)(intptr_t)rb, -ESTALE);
		ck_assert_int_eq(record_load(r, &rec, NULL), 0);
		if (rec.state == HANDOVER_OWNER_UNCONFIRMED)
			step(r, HANDOVER_ABANDONED, epoch);
		step(r, HANDOVER_PREPARED, epoch + 1);
	}
	record_close(r);
	remove_dir();
}
END_TEST

START_TEST(a_torn_write_leaves_the_former_record)
{
	uint8_t before[2 * RECORD_SLOT_BYTES], after[2 * RECORD_SLOT_BYTES];
	struct vm_record got;
	make_dir(_i);
	struct record *r = create(HANDOVER_OWNER, 1);
	step(r, HANDOVER_OWNER, 2);
	peek(before);
	step(r, HANDOVER_HANDING_OVER, 2);
	peek(after);
	record_close(r);
	int slot = memcmp(before, after, RECORD_SLOT_BYTES) ? 0 : 1;
	const uint8_t *other = before + !slot * RECORD_SLOT_BYTES;
	ck_assert_msg(!memcmp(other, after + !slot * RECORD_SLOT_BYTES, RECORD_SLOT_BYTES),
		      "a write touched both slots");

	/* the sectors of a slot reach the medium in any order, or not at all */
	for (unsigned sectors = 0; sectors < 256; sectors++) {
		uint8_t torn[RECORD_SLOT_BYTES];
		for (unsigned i = 0; i < 8; i++)
			memcpy(torn + i * 512,
			       (sectors & 1u << i ? after : before) + slot * RECORD_SLOT_BYTES + i * 512,
			       512);
		scribble(slot * RECORD_SLOT_BYTES, torn, sizeof torn);
		if (load_fresh(&got, NULL))
			ck_abort_msg("sectors %#x: no record", sectors);
		/* the sectors between first and last are all zero, so these two alone make a whole slot */
		bool whole = !memcmp(torn, after + slot * RECORD_SLOT_BYTES, sizeof torn);
		if (got.state != (whole ? HANDOVER_HANDING_OVER : HANDOVER_OWNER) || got.epoch != 2)
			ck_abort_msg("sectors %#x: %s", sectors, handover_state_name(got.state));
	}
	/* half a sector of noise */
	scribble(slot * RECORD_SLOT_BYTES + 200, "noise", 5);
	ck_assert_int_eq(record_open(dir, UUID, &r, NULL), 0);
	ck_assert_int_eq(record_lock(r, 0, NULL), 0);
	ck_assert_int_eq(record_load(r, &got, NULL), 0);
	ck_assert_int_eq(got.state, HANDOVER_OWNER);
	/* taking the lock repaired it: now the other one may be lost */
	scribble(!slot * RECORD_SLOT_BYTES, "noise", 5);
	ck_assert_int_eq(load_fresh(&got, NULL), 0);
	ck_assert_int_eq(got.state, HANDOVER_OWNER);
	record_close(r);
	remove_dir();
}
END_TEST

START_TEST(without_a_sound_slot_there_is_no_answer)
{
	uint8_t file[2 * RECORD_SLOT_BYTES];
	struct vm_record got;
	struct error err = ERROR_INIT;
	char path[600];
	make_dir(_i);
	struct record *r = create(HANDOVER_OWNER, 1);
	step(r, HANDOVER_OWNER, 2);
	record_close(r);
	peek(file);

	/* a newer program's slot is not passed over for an older one */
	uint8_t newer[RECORD_SLOT_BYTES];
	memcpy(newer, file, sizeof newer);
	put_be32(newer + 8, RECORD_FORMAT_VERSION + 1);
	put_be64(newer + 16, 100);
	reseal(newer);
	scribble(0, newer, sizeof newer);
	ck_assert_int_eq(load_fresh(&got, &err), -EPROTONOSUPPORT);
	ck_assert_ptr_nonnull(strstr(err.message, UUID));

	scribble(0, "noise", 5);
	scribble(RECORD_SLOT_BYTES, "noise", 5);
	ck_assert_int_eq(load_fresh(&got, &err), -EUCLEAN);
	ck_assert_int_eq(record_open(dir, UUID, &r, NULL), 0);
	ck_assert_int_eq(record_lock(r, 0, NULL), -EUCLEAN);
	/* the failed lock is not kept */
	struct record *again = NULL;
	ck_assert_int_eq(record_open(dir, UUID, &again, NULL), 0);
	ck_assert_int_eq(record_is_held(again, NULL), 0);
	record_close(again);
	record_close(r);

	/* somebody copied another VM's record here */
	scribble(0, file, sizeof file);
	path_of(OTHER, path, sizeof path);
	char from[600];
	path_of(UUID, from, sizeof from);
	ck_assert_int_eq(rename(from, path), 0);
	ck_assert_int_eq(record_open(dir, OTHER, &r, NULL), 0);
	ck_assert_int_eq(record_load(r, &got, NULL), -EUCLEAN);
	record_close(r);
	ck_assert_int_eq(truncate(path, 5000), 0);
	ck_assert_int_eq(record_open(dir, OTHER, &r, NULL), 0);
	ck_assert_int_eq(record_load(r, &got, &err), -EUCLEAN);
	record_close(r);
	remove_dir();
}
END_TEST

START_TEST(a_failed_write_ends_all_promises_until_the_medium_was_read_again)
{
	struct vm_record rec, got;
	struct error err = ERROR_INIT;
	make_dir(_i);
	struct record *r = create(HANDOVER_PREPARED, 1);
	/* the second slot is beyond the limit on file size: EFBIG */
	signal(SIGXFSZ, SIG_IGN);
	struct rlimit old, small = {.rlim_cur = RECORD_SLOT_BYTES};
	getrlimit(RLIMIT_FSIZE, &old);
	small.rlim_max = old.rlim_max;
	ck_assert_int_eq(record_load(r, &rec, NULL), 0);
	rec.state = HANDOVER_OWNER_UNCONFIRMED;
	setrlimit(RLIMIT_FSIZE, &small);
	int rc = record_compare_and_set(r, HANDOVER_PREPARED, 1, &rec, NULL, &err);
	int load = record_load(r, &got, NULL);
	int second = record_compare_and_set(r, HANDOVER_PREPARED, 1, &rec, NULL, NULL);
	int reload = record_reload(r, &got, NULL);
	setrlimit(RLIMIT_FSIZE, &old);
	ck_assert_int_eq(rc, -EFBIG);
	ck_assert_ptr_nonnull(strstr(err.message, "owner-unconfirmed"));
	ck_assert_int_eq(load, -EIO);
	ck_assert_int_eq(second, -EIO);
	ck_assert_int_lt(reload, 0);
	ck_assert_int_eq(record_load(r, &got, NULL), -EIO);
	/* the lock was held all along, and the medium answers now */
	struct record *other = NULL;
	ck_assert_int_eq(record_open(dir, UUID, &other, NULL), 0);
	ck_assert_int_eq(record_is_held(other, NULL), 1);
	record_close(other);
	ck_assert_int_eq(record_reload(r, &got, NULL), 0);
	ck_assert_int_eq(got.state, HANDOVER_PREPARED);
	ck_assert_int_eq(record_compare_and_set(r, HANDOVER_PREPARED, 1, &rec, NULL, NULL), 0);
	record_close(r);
	remove_dir();
}
END_TEST

START_TEST(the_lock_is_the_process_s)
{
	int ready[2];
	char byte;
	struct record *r = NULL;
	make_dir(_i);
	record_close(create(HANDOVER_OWNER, 1));
	ck_assert_int_eq(pipe(ready), 0);
	pid_t child = fork();
	if (child == 0) {
		if (record_open(dir, UUID, &r, NULL) || record_lock(r, 0, NULL) ||
		    write(ready[1], "x", 1) != 1)
			_exit(1);
		pause();
		_exit(0);
	}
	close(ready[1]);
	ck_assert_int_eq(read(ready[0], &byte, 1), 1);
	close(ready[0]);

	ck_assert_int_eq(record_open(dir, UUID, &r, NULL), 0);
	ck_assert_int_eq(record_is_held(r, NULL), 1);
	ck_assert_int_eq(record_lock(r, 0, NULL), -EBUSY);
	uint64_t start = clock_now_ms();
	ck_assert_int_eq(record_lock(r, 100, NULL), -EBUSY);
	ck_assert_uint_ge(clock_now_ms() - start, 100);
	/* reading is allowed, writing is not */
	struct vm_record rec;
	ck_assert_int_eq(record_load(r, &rec, NULL), 0);
	ck_assert_int_eq(record_store(r, &rec, NULL), -ENOLCK);
	ck_assert_int_eq(record_compare_and_set(r, HANDOVER_OWNER, 1, &rec, NULL, NULL), -ENOLCK);
	ck_assert_int_eq(record_remove(r, NULL), -ENOLCK);

	kill(child, SIGKILL);
	ck_assert_int_eq(waitpid(child, NULL, 0), child);
	ck_assert_int_eq(record_is_held(r, NULL), 0);
	ck_assert_int_eq(record_lock(r, 0, NULL), 0);
	ck_assert_int_eq(record_lock(r, 0, NULL), -EDEADLK);
	/* another descriptor of the same process neither gets the lock nor, when closed, drops it */
	struct record *second = NULL;
	ck_assert_int_eq(record_open(dir, UUID, &second, NULL), 0);
	ck_assert_int_eq(record_lock(second, 0, NULL), -EBUSY);
	record_close(second);
	ck_assert_int_eq(record_open(dir, UUID, &second, NULL), 0);
	ck_assert_int_eq(record_is_held(second, NULL), 1);
	record_unlock(r);
	ck_assert_int_eq(record_lock(second, 0, NULL), 0);
	record_close(second);
	record_close(r);
	remove_dir();
}
END_TEST

START_TEST(a_killed_writer_leaves_what_it_had_reported)
{
	make_dir(_i);
	record_close(create(HANDOVER_OWNER, 0));
	for (int round = 0; round < 15; round++) {
		int acks[2];
		ck_assert_int_eq(pipe(acks), 0);
		struct vm_record before;
		ck_assert_int_eq(load_fresh(&before, NULL), 0);
		pid_t child = fork();
		if (child == 0) {
			struct record *r = NULL;
			struct vm_record rec;
			if (record_open(dir, UUID, &r, NULL) || record_lock(r, 1000, NULL) ||
			    record_load(r, &rec, NULL))
				_exit(1);
			for (;;) {
				uint64_t from = rec.epoch++;
				if (record_compare_and_set(r, HANDOVER_OWNER, from, &rec, NULL, NULL) ||
				    write(acks[1], &rec.epoch, sizeof rec.epoch) != sizeof rec.epoch)
					_exit(1);
			}
		}
		close(acks[1]);
		uint64_t acked = before.epoch, next;
		unsigned n = 0, stop_after = 1 + (unsigned)round * 3;
		while (n < stop_after && read(acks[0], &next, sizeof next) == sizeof next) {
			acked = next;
			n++;
		}
		ck_assert_uint_eq(n, stop_after);
		kill(child, SIGKILL);
		ck_assert_int_eq(waitpid(child, NULL, 0), child);
		while (read(acks[0], &next, sizeof next) == sizeof next)
			acked = next;
		close(acks[0]);
		struct vm_record after;
		ck_assert_int_eq(load_fresh(&after, NULL), 0);
		/* what was reported is there; at most the write under way came on top */
		ck_assert_uint_ge(after.epoch, acked);
		ck_assert_uint_le(after.epoch, acked + 1);
	}
	remove_dir();
}
END_TEST

START_TEST(creation_happens_once_and_whole)
{
	struct vm_record rec = sample(HANDOVER_OWNER, 1), got;
	struct record *r = NULL, *none = NULL;
	char path[600];
	make_dir(_i);
	/* what a creation that was interrupted leaves: garbage under another name */
	r = create(HANDOVER_OWNER, 1);
	record_close(r);
	char from[600];
	path_of(UUID, from, sizeof from);
	path_of(UUID ".new", path, sizeof path);
	ck_assert_int_eq(rename(from, path), 0);
	ck_assert_int_eq(truncate(path, 100), 0);
	ck_assert_int_eq(record_open(dir, UUID, &none, NULL), -ENOENT);
	r = create(HANDOVER_PREPARED, 8);
	ck_assert_int_eq(access(path, F_OK), -1);
	ck_assert_int_eq(load_fresh(&got, NULL), 0);
	ck_assert_uint_eq(got.epoch, 8);
	ck_assert_int_eq(record_create(dir, &rec, &none, NULL), -EEXIST);
	ck_assert_ptr_null(none);
	ck_assert_int_eq(access(path, F_OK), -1);
	ck_assert_int_eq(load_fresh(&got, NULL), 0);
	ck_assert_uint_eq(got.epoch, 8);
	record_close(r);

	rec.state = HANDOVER_MOVED;
	ck_assert_int_eq(record_create(dir, &rec, &none, NULL), -EINVAL);
	memcpy(rec.uuid, "../../../../../etc/passwd-and-so-on-xx", sizeof rec.uuid - 1);
	rec.state = HANDOVER_OWNER;
	ck_assert_int_eq(record_create(dir, &rec, &none, NULL), -EINVAL);
	ck_assert_int_eq(record_open(dir, "../records/x", &none, NULL), -EINVAL);
	ck_assert_int_eq(record_open("/nonexistent", UUID, &none, NULL), -ENOENT);
	/* not through a link, not a directory */
	path_of(OTHER, path, sizeof path);
	ck_assert_int_eq(symlink(from, path), 0);
	ck_assert_int_lt(record_open(dir, OTHER, &none, NULL), 0);
	ck_assert_ptr_null(none);
	remove_dir();
}
END_TEST

START_TEST(a_removed_record_cannot_be_locked)
{
	struct record *holder, *waiter = NULL;
	make_dir(_i);
	holder = create(HANDOVER_OWNER, 1);
	ck_assert_int_eq(record_open(dir, UUID, &waiter, NULL), 0);
	ck_assert_int_eq(record_remove(holder, NULL), 0);
	struct vm_record rec = sample(HANDOVER_OWNER, 1);
	ck_assert_int_lt(record_store(holder, &rec, NULL), 0);
	record_close(holder);
	struct record *fresh = create(HANDOVER_OWNER, 5);
	ck_assert_int_eq(record_lock(waiter, 0, NULL), -ENOENT);
	record_close(waiter);
	record_close(fresh);
	remove_dir();
}
END_TEST

static int count(void *opaque, const char *uuid)
{
	char *all = opaque;
	strcat(all, uuid);
	strcat(all, ";");
	return strcmp(uuid, OTHER) ? 0 : -ECANCELED;
}

START_TEST(listing_gives_records_only)
{
	char all[200] = "", path[600];
	make_dir(_i);
	ck_assert_int_eq(record_list(dir, count, all, NULL), 0);
	record_close(create(HANDOVER_OWNER, 1));
	path_of("notes.txt", path, sizeof path);
	close(open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
	path_of(OTHER ".new", path, sizeof path);
	close(open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
	ck_assert_int_eq(record_list(dir, count, all, NULL), 0);
	ck_assert_str_eq(all, UUID ";");
	path_of(OTHER, path, sizeof path);
	close(open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
	ck_assert_int_eq(record_list(dir, count, all, NULL), -ECANCELED);
	remove_dir();
}
END_TEST

int main(void)
{
	Suite *s = suite_create("record");
	TCase *tc = tcase_create("record");
	tcase_set_timeout(tc, 120);
	tcase_add_test(tc, codec_gives_back_what_went_in);
	tcase_add_test(tc, codec_refuses_every_flipped_bit);
	tcase_add_test(tc, codec_refuses_senseless_content_under_a_sound_checksum);
	int n = ARRAY_SIZE(roots);
	tcase_add_loop_test(tc, a_record_is_durable_through_a_whole_move, 0, n);
	tcase_add_loop_test(tc, compare_and_set_compares, 0, n);
	tcase_add_loop_test(tc, owner_and_abandoned_exclude_each_other, 0, n);
	tcase_add_loop_test(tc, a_torn_write_leaves_the_former_record, 0, n);
	tcase_add_loop_test(tc, without_a_sound_slot_there_is_no_answer, 0, n);
	tcase_add_loop_test(tc, a_failed_write_ends_all_promises_until_the_medium_was_read_again, 0, n);
	tcase_add_loop_test(tc, the_lock_is_the_process_s, 0, n);
	tcase_add_loop_test(tc, a_killed_writer_leaves_what_it_had_reported, 0, n);
	tcase_add_loop_test(tc, creation_happens_once_and_whole, 0, n);
	tcase_add_loop_test(tc, a_removed_record_cannot_be_locked, 0, n);
	tcase_add_loop_test(tc, listing_gives_records_only, 0, n);
	suite_add_tcase(s, tc);
	return suite_run(s);
}
