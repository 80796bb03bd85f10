/* SPDX-License-Identifier: Apache-2.0 */
#include "host/record.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "base/fault.h"
#include "base/log.h"
#include "host/handover.h"

/*
 * A slot, big-endian. Magic, version, sequence and checksum keep their places in every format version.
 *    0  8  "SNMREC\r\n"        40  4  flags               576 256  folder
 *    8  4  format version      44  4  zero                832 256  reason
 *   12  4  zero                48  8  created_ns         1088  ..  zero
 *   16  8  sequence            56  8  changed_ns         4088   8  XXH3-64 of the bytes before
 *   24  8  epoch               64 64  uuid
 *   32  4  state              128 128 name
 *   36  4  zero               256 64  peer, 320 128 peer_address, 448 8 peer_epoch, 456 120 zero
 */
static const uint8_t magic[8] = {'S', 'N', 'M', 'R', 'E', 'C', '\r', '\n'};
enum {
	AT_MAGIC = 0,
	AT_VERSION = 8,
	AT_SEQUENCE = 16,
	AT_EPOCH = 24,
	AT_STATE = 32,
	AT_FLAGS = 40,
	AT_CREATED = 48,
	AT_CHANGED = 56,
	AT_UUID = 64,
	AT_NAME = 128,
	AT_PEER = 256,
	AT_ADDRESS = 320,
	AT_PEER_EPOCH = 448,
	AT_FOLDER = 576,
	AT_REASON = 832,
	AT_END = 1088,
	AT_CHECKSUM = RECORD_SLOT_BYTES - 8,
};
_Static_assert(sizeof((struct vm_record){0}.name) <= 128, "the name has 128 bytes of the slot");

#define FILE_BYTES   (2 * RECORD_SLOT_BYTES)
#define LOCK_POLL_MS 20
#define NEW_SUFFIX   ".new"
#define CREATE_TRIES 16

struct record {
	pthread_mutex_t mutex;
	int dirfd; /* STATE_DIR/records */
	int fd;
	char uuid[VM_UUID_CHARS + 1];
	bool direct;
	bool locked;
	bool failed; /* a write failed: the medium holds one of two contents */
	int slot;    /* of `current`; meaningful while locked */
	struct vm_record current;
	uint8_t *buf; /* FILE_BYTES, aligned for O_DIRECT */
};

static bool uuid_ok(const char *uuid)
{
	for (int i = 0; i < VM_UUID_CHARS; i++) {
		char c = uuid[i];
		bool dash = i == 8 || i == 13 || i == 18 || i == 23;
		if (dash ? c != '-' : !((c >= '0' && c <= '9') || (c >= 'a' && c <= 'f')))
			return false;
	}
	return uuid[VM_UUID_CHARS] == '\0';
}

/* ---- codec */

static void put_string(uint8_t *slot, size_t at, const char *s)
{
	memcpy(slot + at, s, strlen(s));
}

void record_encode(const struct vm_record *rec, uint8_t slot[RECORD_SLOT_BYTES])
{
	memset(slot, 0, RECORD_SLOT_BYTES);
	memcpy(slot + AT_MAGIC, magic, sizeof magic);
	put_be32(slot + AT_VERSION, RECORD_FORMAT_VERSION);
	put_be64(slot + AT_SEQUENCE, rec->sequence);
	put_be64(slot + AT_EPOCH, rec->epoch);
	put_be32(slot + AT_STATE, (uint32_t)rec->state);
	put_be32(slot + AT_FLAGS, rec->flags);
	put_be64(slot + AT_CREATED, rec->created_ns);
	put_be64(slot + AT_CHANGED, rec->changed_ns);
	put_be64(slot + AT_PEER_EPOCH, rec->peer_epoch);
	put_string(slot, AT_UUID, rec->uuid);
	put_string(slot, AT_NAME, rec->name);
	put_string(slot, AT_PEER, rec->peer);
	put_string(slot, AT_ADDRESS, rec->peer_address);
	put_string(slot, AT_FOLDER, rec->folder);
	put_string(slot, AT_REASON, rec->reason);
	put_be64(slot + AT_CHECKSUM, XXH3_64bits(slot, AT_CHECKSUM));
}

/* The field must be a terminated string that fits `size`, zero behind it to the end of its room. */
static bool get_string(const uint8_t *slot, size_t at, size_t room, char *out, size_t size)
{
	size_t len = strnlen((const char *)slot + at, room);
	if (len >= size || !bytes_all_zero(slot + at + len, room - len))
		return false;
	memcpy(out, slot + at, len + 1);
	return true;
}

int record_decode(const uint8_t slot[RECORD_SLOT_BYTES], struct vm_record *out, struct error *err)
{
	memset(out, 0, sizeof *out);
	if (memcmp(slot + AT_MAGIC, magic, sizeof magic) ||
	    get_be64(slot + AT_CHECKSUM) != XXH3_64bits(slot, AT_CHECKSUM))
		return error_set(err, EUCLEAN, "no valid record");
	out->sequence = get_be64(slot + AT_SEQUENCE);
	uint32_t version = get_be32(slot + AT_VERSION);
	if (version > RECORD_FORMAT_VERSION)
		return error_set(err, EPROTONOSUPPORT,
				 "record of format %u, this program knows %d: use the newer program again",
				 version, RECORD_FORMAT_VERSION);
	uint32_t state = get_be32(slot + AT_STATE);
	out->epoch = get_be64(slot + AT_EPOCH);
	out->flags = get_be32(slot + AT_FLAGS);
	out->created_ns = get_be64(slot + AT_CREATED);
	out->changed_ns = get_be64(slot + AT_CHANGED);
	out->peer_epoch = get_be64(slot + AT_PEER_EPOCH);
	if (version == 0 || state == HANDOVER_NONE || state >= HANDOVER_STATES ||
	    out->flags & ~RECORD_FLAGS_KNOWN || get_be32(slot + 12) || get_be32(slot + 36) ||
	    get_be32(slot + 44) || !get_string(slot, AT_UUID, 64, out->uuid, sizeof out->uuid) ||
	    !uuid_ok(out->uuid) || !get_string(slot, AT_NAME, 128, out->name, sizeof out->name) ||
	    !get_string(slot, AT_PEER, 64, out->peer, sizeof out->peer) ||
	    !get_string(slot, AT_ADDRESS, 128, out->peer_address, sizeof out->peer_address) ||
	    !bytes_all_zero(slot + AT_PEER_EPOCH + 8, AT_FOLDER - AT_PEER_EPOCH - 8) ||
	    !get_string(slot, AT_FOLDER, 256, out->folder, sizeof out->folder) ||
	    !get_string(slot, AT_REASON, 256, out->reason, sizeof out->reason) ||
	    !bytes_all_zero(slot + AT_END, AT_CHECKSUM - AT_END))
		return error_set(err, EUCLEAN, "record with a sound checksum but senseless content");
	out->state = (enum handover_state)state;
	return 0;
}

/* ---- medium */

/* A filesystem without O_DIRECT says EINVAL at open (tmpfs) or at the first transfer. */
static int go_buffered(struct record *r)
{
	int flags = fcntl(r->fd, F_GETFL);
	if (flags < 0 || fcntl(r->fd, F_SETFL, flags & ~O_DIRECT) < 0)
		return -errno;
	r->direct = false;
	return 0;
}

static int open_file(struct record *r, const char *name, int flags)
{
	int base = O_RDWR | O_DSYNC | O_CLOEXEC | O_NOFOLLOW | flags;

	r->direct = !fault_point("record-direct");
	r->fd = openat(r->dirfd, name, base | (r->direct ? O_DIRECT : 0), 0600);
	if (r->fd < 0 && errno == EINVAL && r->direct) {
		r->direct = false;
		r->fd = openat(r->dirfd, name, base, 0600);
	}
	return r->fd < 0 ? -errno : 0;
}

static int write_at(struct record *r, const uint8_t *buf, size_t len, off_t offset)
{
	size_t done = 0;
	while (done < len) {
		ssize_t n = pwrite(r->fd, buf + done, len - done, offset + (off_t)done);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EINVAL && r->direct && !go_buffered(r))
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			return -EIO;
		done += (size_t)n;
	}
	/* O_DSYNC covers the data; asked for once more where the page cache is in between. */
	if (!r->direct && fdatasync(r->fd) < 0)
		return -errno;
	return 0;
}

/* Both slots into r->buf. */
static int read_slots(struct record *r, struct error *err)
{
	for (;;) {
		ssize_t n = pread(r->fd, r->buf, FILE_BYTES, 0);
		if (n == FILE_BYTES)
			return 0;
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EINVAL && r->direct && !go_buffered(r))
			continue;
		if (n < 0)
			return error_errno(err, errno, "record %s: read", r->uuid);
		return error_set(err, EUCLEAN, "record %s: the file is %zd bytes short", r->uuid,
				 (ssize_t)FILE_BYTES - n);
	}
}

/* The newest sound slot; *slot is its number. */
static int load_newest(struct record *r, struct vm_record *out, int *slot, struct error *err)
{
	struct vm_record rec[2];
	struct error e[2] = {ERROR_INIT, ERROR_INIT};
	int rc = read_slots(r, err);
	if (rc)
		return rc;
	for (int i = 0; i < 2; i++)
		rec[i].state = record_decode(r->buf + i * RECORD_SLOT_BYTES, &rec[i], &e[i]) ? HANDOVER_NONE
											     : rec[i].state;
	/* A newer format has a sequence, too, and may not be passed over when it is the latest. */
	bool sound[2] = {e[0].code == 0 || e[0].code == -EPROTONOSUPPORT,
			 e[1].code == 0 || e[1].code == -EPROTONOSUPPORT};
	int best = !sound[0] ? 1 : !sound[1] ? 0 : rec[1].sequence > rec[0].sequence;
	if (e[best].code) {
		error_copy(err, &e[best]);
		return error_is_set(err) ? error_prefix(err, "record %s", r->uuid) : e[best].code;
	}
	if (strcmp(rec[best].uuid, r->uuid))
		return error_set(err, EUCLEAN, "record %s: it holds the record of VM %s", r->uuid,
				 rec[best].uuid);
	*out = rec[best];
	*slot = best;
	return 0;
}

/* Writes `to` with the next sequence into the slot that does not hold the current record. */
static int write_next(struct record *r, const struct vm_record *to, struct error *err)
{
	struct vm_record next = *to;
	int slot = !r->slot;
	char point[48];
	int rc;

	next.sequence = r->current.sequence + 1;
	next.created_ns = r->current.created_ns;
	next.changed_ns = clock_realtime_ns();
	record_encode(&next, r->buf);
	snprintf(point, sizeof point, "record-%s", handover_state_name(next.state));
	if (fault_point(point))
		rc = -EIO;
	else
		rc = write_at(r, r->buf, RECORD_SLOT_BYTES, slot * RECORD_SLOT_BYTES);
	if (rc) {
		r->failed = true;
		return error_errno(err, rc, "record %s: write %s, epoch %llu", r->uuid,
				   handover_state_name(next.state), (unsigned long long)next.epoch);
	}
	snprintf(point, sizeof point, "recorded-%s", handover_state_name(next.state));
	fault_point(point);
	r->current = next;
	r->slot = slot;
	return 0;
}

/* ---- life of a record */

static struct record *record_new(const char *uuid)
{
	struct record *r = calloc(1, sizeof *r);
	if (!r)
		return NULL;
	r->dirfd = r->fd = -1;
	if (posix_memalign((void **)&r->buf, RECORD_SLOT_BYTES, FILE_BYTES)) {
		free(r);
		return NULL;
	}
	pthread_mutex_init(&r->mutex, NULL);
	snprintf(r->uuid, sizeof r->uuid, "%s", uuid);
	return r;
}

void record_close(struct record *r)
{
	if (!r)
		return;
	if (r->fd >= 0)
		close(r->fd);
	if (r->dirfd >= 0)
		close(r->dirfd);
	pthread_mutex_destroy(&r->mutex);
	free(r->buf);
	free(r);
}

static void cleanup_record(struct record **r)
{
	record_close(*r);
}

static int open_records_dir(const char *state_dir, bool create, int *out, struct error *err)
{
	CLEANUP_FD int state = open(state_dir, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (state < 0)
		return error_errno(err, errno, "%s", state_dir);
	if (create) {
		if (mkdirat(state, "records", 0700) == 0) {
			CLEANUP_FD int readable = openat(state, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
			if (readable < 0 || fsync(readable) < 0)
				return error_errno(err, errno, "%s: sync", state_dir);
		} else if (errno != EEXIST) {
			return error_errno(err, errno, "%s/records", state_dir);
		}
	}
	*out = openat(state, "records", O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
	if (*out < 0)
		return error_errno(err, errno, "%s/records", state_dir);
	return 0;
}

/* 0, -EBUSY when somebody else has it. OFD locks: not lost when another descriptor of this process is closed.
 */
static int try_lock(int fd)
{
	struct flock fl = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = 1};
	if (fcntl(fd, F_OFD_SETLK, &fl) == 0)
		return 0;
	return errno == EAGAIN || errno == EACCES ? -EBUSY : -errno;
}

int record_create(const char *state_dir, const struct vm_record *init, struct record **out, struct error *err)
{
	CLEANUP(cleanup_record) struct record *r = NULL;
	char temp[VM_UUID_CHARS + sizeof NEW_SUFFIX];
	struct stat mine, there;
	int rc;

	if (!uuid_ok(init->uuid) || !handover_transition_allowed(HANDOVER_NONE, 0, init->state, init->epoch))
		return error_set(err, EINVAL, "record %.36s: cannot be created as %s", init->uuid,
				 handover_state_name(init->state));
	r = record_new(init->uuid);
	if (!r)
		return error_errno(err, ENOMEM, "record %s", init->uuid);
	if ((rc = open_records_dir(state_dir, true, &r->dirfd, err)))
		return rc;

	/* Written aside, then renamed: a record either exists with a sound slot or not at all. */
	snprintf(temp, sizeof temp, "%s" NEW_SUFFIX, init->uuid);
	for (int i = 0;; i++) {
		if ((rc = open_file(r, temp, O_CREAT)))
			return error_errno(err, rc, "record %s: create", r->uuid);
		if ((rc = try_lock(r->fd)))
			return error_errno(err, rc, "record %s: being created", r->uuid);
		/* Another creator may have renamed it between our open and our lock. */
		if (fstat(r->fd, &mine) == 0 && fstatat(r->dirfd, temp, &there, AT_SYMLINK_NOFOLLOW) == 0 &&
		    mine.st_ino == there.st_ino && mine.st_dev == there.st_dev)
			break;
		close(steal_fd(&r->fd));
		if (i >= CREATE_TRIES)
			return error_set(err, EBUSY, "record %s: being created by another process", r->uuid);
	}
	r->locked = true;
	if ((rc = posix_fallocate(r->fd, 0, FILE_BYTES)) && rc != EOPNOTSUPP)
		return error_errno(err, rc, "record %s: allocate", r->uuid);
	r->current = *init;
	r->current.sequence = 1;
	r->current.created_ns = r->current.changed_ns = clock_realtime_ns();
	r->slot = 0;
	memset(r->buf, 0, FILE_BYTES);
	record_encode(&r->current, r->buf);
	if ((rc = write_at(r, r->buf, FILE_BYTES, 0)))
		goto undo;
	if (fsync(r->fd) < 0) {
		rc = -errno;
		goto undo;
	}
	if (renameat2(r->dirfd, temp, r->dirfd, r->uuid, RENAME_NOREPLACE) < 0) {
		rc = -errno;
		goto undo;
	}
	if (fsync(r->dirfd) < 0) {
		rc = -errno;
		unlinkat(r->dirfd, r->uuid, 0);
		return error_errno(err, rc, "record %s: sync directory", r->uuid);
	}
	log_info("record %s (%s): created as %s, epoch %llu%s%s", r->uuid, init->name,
		 handover_state_name(init->state), (unsigned long long)init->epoch,
		 init->peer[0] ? ", peer " : "", init->peer);
	*out = steal_ptr(r);
	return 0;
undo:
	unlinkat(r->dirfd, temp, 0);
	if (rc == -EEXIST)
		return error_set(err, EEXIST, "record %s exists already", r->uuid);
	return error_errno(err, rc, "record %s: create", r->uuid);
}

int record_open(const char *state_dir, const char *uuid, struct record **out, struct error *err)
{
	CLEANUP(cleanup_record) struct record *r = NULL;
	struct stat st;
	int rc;

	if (!uuid_ok(uuid))
		return error_set(err, EINVAL, "not a UUID in lower case: %.40s", uuid);
	r = record_new(uuid);
	if (!r)
		return error_errno(err, ENOMEM, "record %s", uuid);
	if ((rc = open_records_dir(state_dir, false, &r->dirfd, err)))
		return rc;
	if ((rc = open_file(r, uuid, O_NONBLOCK)))
		return error_errno(err, rc, "record %s", uuid);
	if (fstat(r->fd, &st) < 0)
		return error_errno(err, errno, "record %s", uuid);
	if (!S_ISREG(st.st_mode))
		return error_set(err, EUCLEAN, "record %s: not a regular file", uuid);
	*out = steal_ptr(r);
	return 0;
}

static void drop_lock(struct record *r)
{
	struct flock fl = {.l_type = F_UNLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = 1};
	fcntl(r->fd, F_OFD_SETLK, &fl);
	r->locked = false;
}

/* Caller holds the mutex and the lock. What is read is written again: a killed process may have left it short
 * of the medium. */
static int settle_medium(struct record *r, struct error *err)
{
	int rc = load_newest(r, &r->current, &r->slot, err);
	if (rc)
		return rc;
	r->current.sequence++;
	record_encode(&r->current, r->buf);
	rc = write_at(r, r->buf, RECORD_SLOT_BYTES, !r->slot * RECORD_SLOT_BYTES);
	if (rc)
		return error_errno(err, rc, "record %s: write", r->uuid);
	r->slot = !r->slot;
	r->failed = false;
	return 0;
}

int record_lock(struct record *r, unsigned timeout_ms, struct error *err)
{
	uint64_t deadline = clock_now_ms() + timeout_ms;
	struct stat st;
	int rc;

	SCOPE_LOCK(&r->mutex);
	if (r->locked)
		return error_set(err, EDEADLK, "record %s: locked already", r->uuid);
	while ((rc = try_lock(r->fd)) == -EBUSY && clock_now_ms() < deadline)
		clock_sleep_ms(LOCK_POLL_MS);
	if (rc == -EBUSY)
		return error_set(err, EBUSY, "record %s: in use by the VM's live snvmm or by another command",
				 r->uuid);
	if (rc)
		return error_errno(err, rc, "record %s: lock", r->uuid);
	r->locked = true;
	if (fstat(r->fd, &st) < 0 || st.st_nlink == 0) {
		drop_lock(r);
		return error_set(err, ENOENT, "record %s: removed meanwhile", r->uuid);
	}
	if ((rc = settle_medium(r, err)))
		drop_lock(r);
	return rc;
}

void record_unlock(struct record *r)
{
	SCOPE_LOCK(&r->mutex);
	if (r->locked)
		drop_lock(r);
}

int record_is_held(struct record *r, struct error *err)
{
	struct flock fl = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = 1};
	if (fcntl(r->fd, F_OFD_GETLK, &fl) < 0)
		return error_errno(err, errno, "record %s: query lock", r->uuid);
	return fl.l_type != F_UNLCK;
}

bool record_is_direct(const struct record *r)
{
	return r->direct;
}

static int check_writable(const struct record *r, struct error *err)
{
	if (!r->locked)
		return error_set(err, ENOLCK, "record %s: not locked", r->uuid);
	if (r->failed)
		return error_set(err, EIO, "record %s: an earlier write failed, its content is unknown",
				 r->uuid);
	return 0;
}

int record_load(struct record *r, struct vm_record *out, struct error *err)
{
	SCOPE_LOCK(&r->mutex);
	if (r->locked) {
		int rc = check_writable(r, err);
		if (!rc)
			*out = r->current;
		return rc;
	}
	int slot;
	return load_newest(r, out, &slot, err);
}

int record_reload(struct record *r, struct vm_record *out, struct error *err)
{
	SCOPE_LOCK(&r->mutex);
	if (!r->locked)
		return error_set(err, ENOLCK, "record %s: not locked", r->uuid);
	r->failed = true; /* until the medium has said otherwise */
	int rc = settle_medium(r, err);
	if (!rc)
		*out = r->current;
	return rc;
}

int record_store(struct record *r, const struct vm_record *to, struct error *err)
{
	SCOPE_LOCK(&r->mutex);
	int rc = check_writable(r, err);
	if (rc)
		return rc;
	if (strcmp(to->uuid, r->uuid) || to->state != r->current.state || to->epoch != r->current.epoch ||
	    to->flags & ~RECORD_FLAGS_KNOWN)
		return error_set(err, EINVAL, "record %s: only compare-and-set changes state or epoch",
				 r->uuid);
	return write_next(r, to, err);
}

int record_compare_and_set(struct record *r, enum handover_state from, uint64_t from_epoch,
			   const struct vm_record *to, struct vm_record *actual, struct error *err)
{
	SCOPE_LOCK(&r->mutex);
	int rc = check_writable(r, err);
	if (rc)
		return rc;
	if (actual)
		*actual = r->current;
	if (r->current.state != from || r->current.epoch != from_epoch)
		return error_set(err, ESTALE, "record %s: is %s, epoch %llu, not %s, epoch %llu", r->uuid,
				 handover_state_name(r->current.state), (unsigned long long)r->current.epoch,
				 handover_state_name(from), (unsigned long long)from_epoch);
	if (strcmp(to->uuid, r->uuid) || to->state == HANDOVER_NONE || to->flags & ~RECORD_FLAGS_KNOWN ||
	    !handover_transition_allowed(from, from_epoch, to->state, to->epoch))
		return error_set(err, EINVAL, "record %s: %s, epoch %llu, cannot become %s, epoch %llu",
				 r->uuid, handover_state_name(from), (unsigned long long)from_epoch,
				 handover_state_name(to->state), (unsigned long long)to->epoch);
	if ((rc = write_next(r, to, err)))
		return rc;
	log_info("record %s (%s): %s, epoch %llu -> %s, epoch %llu%s%s%s%s", r->uuid, to->name,
		 handover_state_name(from), (unsigned long long)from_epoch, handover_state_name(to->state),
		 (unsigned long long)to->epoch, to->peer[0] ? ", peer " : "", to->peer,
		 to->reason[0] ? ": " : "", to->reason);
	return 0;
}

int record_remove(struct record *r, struct error *err)
{
	SCOPE_LOCK(&r->mutex);
	int rc = check_writable(r, err);
	if (rc)
		return rc;
	if (!handover_transition_allowed(r->current.state, r->current.epoch, HANDOVER_NONE, 0))
		return error_set(err, EINVAL, "record %s: cannot be removed while %s", r->uuid,
				 handover_state_name(r->current.state));
	if (unlinkat(r->dirfd, r->uuid, 0) < 0)
		return error_errno(err, errno, "record %s: remove", r->uuid);
	r->failed = true; /* nothing may be written to it any more */
	if (fsync(r->dirfd) < 0)
		return error_errno(err, errno, "record %s: sync directory", r->uuid);
	log_info("record %s (%s): removed, was %s, epoch %llu", r->uuid, r->current.name,
		 handover_state_name(r->current.state), (unsigned long long)r->current.epoch);
	return 0;
}

static int only_uuids(const struct dirent *d)
{
	return uuid_ok(d->d_name);
}

int record_list(const char *state_dir, int (*each)(void *opaque, const char *uuid), void *opaque,
		struct error *err)
{
	CLEANUP_FREE char *path = NULL;
	struct dirent **names = NULL;

	if (asprintf(&path, "%s/records", state_dir) < 0) {
		path = NULL;
		return error_errno(err, ENOMEM, "%s/records", state_dir);
	}
	int n = scandir(path, &names, only_uuids, alphasort);
	if (n < 0)
		return errno == ENOENT ? 0 : error_errno(err, errno, "%s", path);
	int rc = 0;
	for (int i = 0; i < n; i++) {
		if (!rc)
			rc = each(opaque, names[i]->d_name);
		free(names[i]);
	}
	free(names);
	return rc;
}
