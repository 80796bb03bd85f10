/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The loader of a machine's saved state, on a KVM machine with two vCPUs, a disk and every device that needs
 * no privilege: the input edits what that machine saves of itself, lengths and checksums are made right, and
 * it is loaded. The machine must take it or refuse it with a reason, write no guest memory, and be able to
 * load the good state afterwards.
 *
 * Input: edits. A byte (low bits: what), u16 section, u16 offset, u8 length, then so many bytes.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#define XXH_STATIC_LINKING_ONLY
#include <xxhash.h>

#include "base/bytes.h"
#include "base/log.h"
#include "block/open.h"
#include "vmm/bus.h"
#include "vmm/machine.h"
#include "vmm/state.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define MEMORY_BYTES  (UINT64_C(4) << 20)
#define DISK_BYTES    (1 << 20)
#define HEADER_BYTES  24u
#define SECTION_BYTES 40u
#define STATE_MAX     (1u << 20)
#define EDITS_MAX     16u
#define FDS_MAX	      200

static struct machine *machine;
static uint8_t *good, *edited;
static size_t good_len, edited_len;

static void quiet(enum log_level level, const char *vm, const char *message)
{
	(void)level, (void)vm, (void)message;
}

static void die(const char *what, const struct error *err)
{
	fprintf(stderr, "%s: %s\n", what, err->message);
	abort();
}

static void no_event(void *opaque, enum machine_event event, const char *detail)
{
	(void)opaque, (void)event, (void)detail;
}

static void make_machine(void)
{
	static char dir[] = "/tmp/snmigrate-fuzz-XXXXXX";
	char disk[64];
	struct error err = ERROR_INIT;
	struct machine_config cfg = {.memory_bytes = MEMORY_BYTES,
				     .cpus = 2,
				     .ndisks = 1,
				     .disks = {{.id = "root"}},
				     .serial = "file:/dev/null",
				     .run_dir = dir,
				     .event = no_event};
	struct block_open_options bo = {.run_dir = dir, .format = BLOCK_FORMAT_RAW};

	if (access("/dev/kvm", R_OK | W_OK) < 0) {
		printf("skipped: no usable /dev/kvm\n");
		fflush(stdout);
		_exit(0); /* exit would be taken for a crash */
	}
	if (!mkdtemp(dir))
		abort();
	snprintf(disk, sizeof disk, "%s/disk", dir);
	int fd = open(disk, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (fd < 0 || ftruncate(fd, DISK_BYTES) < 0)
		abort();
	close(fd);
	log_set_sink(quiet);
	if (block_open(disk, &bo, &cfg.disks[0].block, &err) < 0)
		die("disk", &err);
	if (machine_create(&cfg, &machine, &err) < 0)
		die("machine", &err);
	unlink(disk);
	rmdir(dir);
}

static void save_good(void)
{
	struct state_writer *w = state_writer_create();
	struct error err = ERROR_INIT;
	const uint8_t *buf;

	if (machine_pause(machine, &err) < 0 || machine_drain(machine, 1000, &err) < 0 ||
	    machine_save(machine, w, &err) < 0 || state_writer_finish(w, &buf, &good_len, &err) < 0)
		die("save", &err);
	good = malloc(good_len);
	edited = malloc(STATE_MAX);
	if (!good || !edited || good_len > STATE_MAX / 2)
		abort();
	memcpy(good, buf, good_len);
	state_writer_free(w);
}

/* Of the section: its place, or 0 when there are not so many. */
static size_t find_section(unsigned n)
{
	size_t at = HEADER_BYTES;

	while (n-- && at + SECTION_BYTES <= edited_len)
		at += SECTION_BYTES + get_le32(edited + at + 28);
	return at + SECTION_BYTES <= edited_len ? at : 0;
}

static void change_length(size_t section, size_t at, size_t drop, const uint8_t *bytes, size_t add)
{
	if (edited_len + add > STATE_MAX || at + drop > edited_len)
		return;
	memmove(edited + at + add, edited + at + drop, edited_len - at - drop);
	memcpy(edited + at, bytes, add);
	edited_len = edited_len - drop + add;
	put_le32(edited + section + 28, (uint32_t)(get_le32(edited + section + 28) - drop + add));
}

enum edit {
	EDIT_SET,
	EDIT_XOR,
	EDIT_INSERT,
	EDIT_DROP,
	EDIT_VERSION,
	EDIT_NAME,
	EDIT_REMOVE,
	EDIT_TWICE,
	EDITS
};

static void edit(uint8_t what, unsigned which, unsigned offset, const uint8_t *bytes, size_t len)
{
	unsigned nsections = get_le32(edited + 12);
	size_t s = nsections ? find_section(which % nsections) : 0, payload, n;

	if (!s)
		return;
	payload = get_le32(edited + s + 28);
	offset = payload ? offset % (unsigned)payload : 0;
	n = len < payload - offset ? len : payload - offset;
	uint8_t *p = edited + s + SECTION_BYTES + offset;
	switch (what % EDITS) {
	case EDIT_SET:
		memcpy(p, bytes, n);
		break;
	case EDIT_XOR:
		for (size_t i = 0; i < n; i++)
			p[i] ^= bytes[i];
		break;
	case EDIT_INSERT:
		change_length(s, (size_t)(p - edited), 0, bytes, len);
		break;
	case EDIT_DROP:
		change_length(s, (size_t)(p - edited), n, bytes, 0);
		break;
	case EDIT_VERSION:
		put_le32(edited + s + 24, len ? bytes[0] : 0);
		break;
	case EDIT_NAME:
		for (size_t i = 0; i < len && i < STATE_NAME_BYTES; i++)
			edited[s + i] ^= bytes[i];
		break;
	case EDIT_REMOVE:
		memmove(edited + s, edited + s + SECTION_BYTES + payload,
			edited_len - s - SECTION_BYTES - payload);
		edited_len -= SECTION_BYTES + payload;
		put_le32(edited + 12, nsections - 1);
		break;
	default:
		n = SECTION_BYTES + payload;
		if (edited_len + n > STATE_MAX)
			break;
		memmove(edited + s + n, edited + s, edited_len - s);
		edited_len += n;
		put_le32(edited + 12, nsections + 1);
	}
}

static void repair(void)
{
	size_t at = HEADER_BYTES;

	put_le64(edited + 16, edited_len);
	while (range_fits(at, SECTION_BYTES, edited_len)) {
		size_t len = get_le32(edited + at + 28);
		XXH3_state_t sum;

		if (!range_fits(at + SECTION_BYTES, len, edited_len))
			return;
		XXH3_64bits_reset(&sum);
		XXH3_64bits_update(&sum, edited + at, 32);
		XXH3_64bits_update(&sum, edited + at + SECTION_BYTES, len);
		put_le64(edited + at + 32, XXH3_64bits_digest(&sum));
		at += SECTION_BYTES + len;
	}
}

/* As a guest that looks at its devices. */
static void look_around(void)
{
	struct bus *bus = machine_bus(machine);
	uint8_t data[8];

	for (unsigned slot = 0; slot < 4; slot++) {
		for (unsigned reg = 0; reg < 256; reg += 4) {
			put_le32(data, 0x80000000u | slot << 11 | reg);
			bus_write(bus, BUS_PIO, 0xcf8, data, 4);
			bus_read(bus, BUS_PIO, 0xcfc, data, 4);
		}
	}
	for (unsigned reg = 0; reg < 8; reg++)
		bus_read(bus, BUS_PIO, 0x3f8 + reg, data, 1);
}

/* Loading reads rings and descriptors at most: the guest's memory is as empty as it was. */
static void check_untouched(void)
{
	struct mem_space space = machine_memory_space(machine);
	struct stat st;

	if (fstat(space.fd, &st) < 0 || st.st_size != (off_t)MEMORY_BYTES)
		abort();
	for (off_t at = 0; (at = lseek(space.fd, at, SEEK_DATA)) >= 0; at += MEM_PAGE_BYTES) {
		/* a page that was only read is there, and zero */
		if (!bytes_all_zero(space.base + at, MEM_PAGE_BYTES)) {
			fprintf(stderr, "guest memory was written at 0x%llx\n", (unsigned long long)at);
			abort();
		}
	}
	int fd = dup(space.fd);
	if (fd < 0 || fd > FDS_MAX) {
		fprintf(stderr, "descriptors are not given back\n");
		abort();
	}
	close(fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct error err = ERROR_INIT;

	if (!machine) {
		make_machine();
		save_good();
	}
	memcpy(edited, good, good_len);
	edited_len = good_len;
	for (unsigned n = 0; n < EDITS_MAX && size >= 6; n++) {
		size_t len = data[5] < size - 6 ? data[5] : size - 6;

		edit(data[0], get_be16(data + 1), get_be16(data + 3), data + 6, len);
		data += 6 + len;
		size -= 6 + len;
	}
	repair();
	if (machine_load(machine, edited, edited_len, &err) < 0 && !err.message[0])
		abort();
	look_around();
	check_untouched();
	err = ERROR_INIT;
	if (machine_load(machine, good, good_len, &err) < 0)
		die("the good state", &err);
	return 0;
}
