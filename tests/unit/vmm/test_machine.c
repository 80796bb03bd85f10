/* SPDX-License-Identifier: Apache-2.0 */
/* Whole machines on /dev/kvm: running, stopping, saving, loading, tracking, power events. */
#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

#include "base/bitmap.h"
#include "base/bytes.h"
#include "base/cleanup.h"
#include "base/clock.h"
#include "tests/suite.h"
#include "tests/unit/vmm/tiny_kernel.h"
#include "vmm/bus.h"
#include "vmm/machine_internal.h"
#include "vmm/memory.h"
#include "vmm/state.h"

#define MEMORY_BYTES (32u << 20)
#define WAIT_MS	     20000

static char dir[] = "/tmp/snm-test-machine-XXXXXX";
static char kernel[64], console[80], serial[96];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned events[3];

static void on_event(void *opaque, enum machine_event event, const char *detail)
{
	SCOPE_LOCK(&lock);
	events[event]++;
}

static unsigned event_count(enum machine_event event)
{
	SCOPE_LOCK(&lock);
	return events[event];
}

static void wait_event(enum machine_event event, unsigned n)
{
	uint64_t until = clock_now_ms() + WAIT_MS;
	while (event_count(event) < n && clock_now_ms() < until)
		clock_sleep_ms(2);
	ck_assert_uint_eq(event_count(event), n);
}

static void setup(void)
{
	strcpy(dir + sizeof dir - 7, "XXXXXX");
	ck_assert_ptr_nonnull(mkdtemp(dir));
	snprintf(kernel, sizeof kernel, "%s/kernel", dir);
	snprintf(console, sizeof console, "%s/console", dir);
	snprintf(serial, sizeof serial, "file:%s", console);
	memset(events, 0, sizeof events);
}

static void teardown(void)
{
	unlink(kernel);
	unlink(console);
	rmdir(dir);
}

static struct machine_config config(unsigned cpus)
{
	return (struct machine_config){.memory_bytes = MEMORY_BYTES,
				       .cpus = cpus,
				       .balloon = true,
				       .serial = serial,
				       .run_dir = dir,
				       .event = on_event};
}

static struct machine *create(const struct machine_config *cfg)
{
	struct machine *m = NULL;
	struct error err = ERROR_INIT;
	int ret = machine_create(cfg, &m, &err);
	ck_assert_msg(ret == 0, "%s", err.message);
	return m;
}

static struct machine *boot(const void *code, size_t len, unsigned cpus)
{
	struct machine_config cfg = config(cpus);
	struct machine *m = create(&cfg);
	struct error err = ERROR_INIT;
	tiny_write(kernel, code, len);
	int ret = machine_load_kernel(m, kernel, NULL, "x", &err);
	ck_assert_msg(ret == 0, "%s", err.message);
	return m;
}

static uint32_t word(struct machine *m, uint64_t gpa)
{
	return __atomic_load_n((uint32_t *)guest_memory_ptr(machine_memory(m), gpa, 4), __ATOMIC_RELAXED);
}

/* Until the guest has counted further than `from`. */
static uint32_t wait_count(struct machine *m, uint32_t from)
{
	uint64_t until = clock_now_ms() + WAIT_MS;
	while (word(m, TINY_COUNTER) <= from && clock_now_ms() < until)
		clock_sleep_ms(1);
	ck_assert_uint_gt(word(m, TINY_COUNTER), from);
	ck_assert_uint_eq(word(m, TINY_BAD), 0);
	return word(m, TINY_COUNTER);
}

static long console_bytes(void)
{
	struct stat st;
	return stat(console, &st) ? -1 : (long)st.st_size;
}

static void wait_console(long n)
{
	uint64_t until = clock_now_ms() + WAIT_MS;
	while (console_bytes() < n && clock_now_ms() < until)
		clock_sleep_ms(2);
	ck_assert_int_eq(console_bytes(), n);
}

static struct state_writer *save(struct machine *m, const uint8_t **buf, size_t *len)
{
	struct state_writer *w = state_writer_create();
	struct error err = ERROR_INIT;
	ck_assert_int_eq(machine_pause(m, &err), 0);
	ck_assert_int_eq(machine_drain(m, 1000, &err), 0);
	int ret = machine_save(m, w, &err);
	ck_assert_msg(ret == 0, "%s", err.message);
	ck_assert_int_eq(state_writer_finish(w, buf, len, &err), 0);
	return w;
}

static void copy_memory(struct machine *to, struct machine *from)
{
	memcpy(machine_memory(to)->base, machine_memory(from)->base, MEMORY_BYTES);
}

/* A machine for the state of m, made as a destination makes it. */
static struct machine *twin(struct machine *m)
{
	struct machine_config cfg = config(1);
	struct error err = ERROR_INIT;
	json_t *cpu = machine_cpu_describe(m, &err);
	ck_assert_ptr_nonnull(cpu);
	cfg.cpu = cpu;
	struct machine *n = create(&cfg);
	json_decref(cpu);
	return n;
}

START_TEST(a_stopped_guest_stands_still)
{
	struct machine *m = boot(tiny_count, sizeof tiny_count, 1);
	uint32_t n = 0;
	ck_assert(!machine_is_running(m));
	for (int i = 0; i < 50; i++) {
		ck_assert_int_eq(machine_start(m, NULL), 0);
		ck_assert(machine_is_running(m));
		wait_count(m, n);
		ck_assert_int_eq(machine_pause(m, NULL), 0);
		n = word(m, TINY_COUNTER);
		clock_sleep_ms(1);
		ck_assert_uint_eq(word(m, TINY_COUNTER), n);
	}
	ck_assert_int_eq(machine_pause(m, NULL), 0);
	machine_destroy(m);
}
END_TEST

START_TEST(many_vcpus_start_and_stop)
{
	struct machine *m = boot(tiny_count, sizeof tiny_count, MACHINE_CPUS_MAX);
	uint32_t n = 0;
	for (int i = 0; i < 10; i++) {
		ck_assert_int_eq(machine_start(m, NULL), 0);
		n = wait_count(m, n);
		ck_assert_int_eq(machine_pause(m, NULL), 0);
		n = word(m, TINY_COUNTER);
	}
	machine_destroy(m);
}
END_TEST

/* Threads that are parked take part; the second time all memory is made before the pause. */
START_TEST(several_vcpus_are_saved_and_loaded)
{
	struct machine_config cfg = config(9);
	struct machine *m = boot(tiny_count, sizeof tiny_count, 9);
	for (int i = 0; i < 10; i++) {
		const uint8_t *buf;
		size_t len;
		struct error err = ERROR_INIT;
		ck_assert_int_eq(machine_start(m, NULL), 0);
		wait_count(m, word(m, TINY_COUNTER) + 100);
		struct state_writer *w = state_writer_create();
		if (i % 2)
			ck_assert_int_eq(machine_prepare_save(m, w, &err), 0);
		ck_assert_int_eq(machine_pause(m, &err), 0);
		ck_assert_int_eq(machine_drain(m, 1000, &err), 0);
		int ret = machine_save(m, w, &err);
		ck_assert_msg(ret == 0, "%s", err.message);
		ck_assert_int_eq(state_writer_finish(w, &buf, &len, &err), 0);
		cfg.cpu = machine_cpu_describe(m, &err);
		struct machine *n = create(&cfg);
		json_decref(cfg.cpu);
		copy_memory(n, m);
		uint32_t at = word(m, TINY_COUNTER);
		ret = machine_load(n, buf, len, &err);
		ck_assert_msg(ret == 0, "%s", err.message);
		state_writer_free(w);
		machine_destroy(m);
		m = n;
		ck_assert_uint_eq(word(m, TINY_COUNTER), at);
	}
	machine_destroy(m);
}
END_TEST

/* One vCPU's state that cannot be loaded fails the whole, and says whose it is. */
START_TEST(a_missing_vcpu_is_named)
{
	struct machine *m = boot(tiny_count, sizeof tiny_count, 3);
	const uint8_t *buf;
	size_t len;
	struct error err = ERROR_INIT;
	struct state_writer *w = save(m, &buf, &len);
	uint8_t *copy = malloc(len);
	memcpy(copy, buf, len);
	uint8_t *name = memmem(copy, len, "cpu.2", 6);
	ck_assert_ptr_nonnull(name);
	name[4] = '7';
	XXH3_state_t *sum = XXH3_createState();
	XXH3_64bits_reset(sum);
	XXH3_64bits_update(sum, name, 32);
	XXH3_64bits_update(sum, name + 40, get_le32(name + 28));
	put_le64(name + 32, XXH3_64bits_digest(sum));
	XXH3_freeState(sum);
	struct machine_config cfg = config(3);
	cfg.cpu = machine_cpu_describe(m, NULL);
	struct machine *n = create(&cfg);
	json_decref(cfg.cpu);
	ck_assert_int_eq(machine_load(n, copy, len, &err), -ENOENT);
	ck_assert_msg(strstr(err.message, "cpu.2"), "%s", err.message);
	free(copy);
	state_writer_free(w);
	machine_destroy(n);
	machine_destroy(m);
}
END_TEST

START_TEST(a_loaded_guest_goes_on_where_it_was)
{
	struct machine *m = boot(tiny_count, sizeof tiny_count, 1);
	struct error err = ERROR_INIT;
	ck_assert_int_eq(machine_start(m, NULL), 0);
	wait_console(1);
	for (int i = 0; i < 8; i++) {
		const uint8_t *buf;
		size_t len;
		wait_count(m, word(m, TINY_COUNTER) + 100);
		struct state_writer *w = save(m, &buf, &len);
		struct machine *n = twin(m);
		copy_memory(n, m);
		uint32_t at = word(m, TINY_COUNTER);
		int ret = machine_load(n, buf, len, &err);
		ck_assert_msg(ret == 0, "%s", err.message);
		/* Saved again it is the same, but for clocks. */
		unsigned nsections;
		ret = machine_compare(n, buf, len, &nsections, &err);
		ck_assert_msg(ret == 0, "%s", err.message);
		ck_assert_uint_ge(nsections, 5);
		ck_assert_int_eq(machine_adjust_clock(n, 1000000, &err), 0);

		state_writer_free(w);
		machine_destroy(m);
		ck_assert_int_eq(machine_start(n, NULL), 0);
		wait_count(n, at + 100);
		m = n;
	}
	ck_assert_int_eq(console_bytes(), 1); /* nothing was printed again */
	machine_destroy(m);
}
END_TEST

/* A register of a device, of a vCPU, of the interrupt controllers: each is missed where it belongs. */
/* KVM writes to the guest's memory when the MSR of its wall clock is set: when the guest does so, not when it
 * arrives somewhere. */
START_TEST(loading_leaves_memory_alone)
{
	static const uint32_t wall_clocks[] = {0x11, 0x4b564d00};
	uint32_t at = MEMORY_BYTES / 2 + 4096u * (unsigned)_i;
	struct machine *m = boot(tiny_count, sizeof tiny_count, 1);
	struct error err = ERROR_INIT;
	const uint8_t *buf;
	size_t len;
	ck_assert_int_eq(machine_start(m, NULL), 0);
	wait_count(m, 100);
	ck_assert_int_eq(machine_pause(m, &err), 0);
	ck_assert_int_eq(vcpu_set_msr(&m->vcpus[0], wall_clocks[_i], at), 0);
	ck_assert_uint_ne(word(m, at), 0); /* its version */
	struct state_writer *w = save(m, &buf, &len);
	struct machine *n = twin(m);
	copy_memory(n, m);
	ck_assert_msg(machine_load(n, buf, len, &err) == 0, "%s", err.message);
	ck_assert_int_eq(machine_adjust_clock(n, 1000000, &err), 0);
	ck_assert_int_eq(memcmp(machine_memory(n)->base, machine_memory(m)->base, MEMORY_BYTES), 0);
	state_writer_free(w);
	machine_destroy(m);
	machine_destroy(n);
}
END_TEST

START_TEST(a_machine_that_is_another_is_found_out)
{
	struct machine *m = boot(tiny_count, sizeof tiny_count, 1);
	struct error err = ERROR_INIT;
	const uint8_t *buf;
	size_t len;
	unsigned nsections;
	ck_assert_int_eq(machine_start(m, NULL), 0);
	wait_console(1);
	struct state_writer *w = save(m, &buf, &len);
	struct machine *n = twin(m);
	ck_assert_int_eq(machine_load(n, buf, len, &err), 0);
	uint8_t v = 0x5a;
	bus_write(machine_bus(n), BUS_PIO, 0x3ff, &v, 1);
	ck_assert_int_eq(machine_compare(n, buf, len, &nsections, &err), -EBADMSG);
	ck_assert_msg(strstr(err.message, "section serial differs at byte"), "%s", err.message);
	/* another run of the same guest: other registers */
	ck_assert_int_eq(machine_load(n, buf, len, &err), 0);
	ck_assert_int_eq(machine_compare(n, buf, len, &nsections, &err), 0);
	uint32_t at = word(m, TINY_COUNTER);
	ck_assert_int_eq(machine_start(m, NULL), 0);
	wait_count(m, at + 1000);
	const uint8_t *later;
	size_t later_len;
	struct state_writer *x = save(m, &later, &later_len);
	ck_assert_int_eq(machine_compare(n, later, later_len, &nsections, &err), -EBADMSG);
	ck_assert_msg(strstr(err.message, "cpu.0: its registers differ"), "%s", err.message);
	state_writer_free(x);
	state_writer_free(w);
	machine_destroy(n);
	machine_destroy(m);
}
END_TEST

START_TEST(saving_changes_nothing)
{
	struct machine *m = boot(tiny_count, sizeof tiny_count, 1);
	const uint8_t *buf;
	size_t len;
	uint32_t n = 0;
	for (int i = 0; i < 5; i++) {
		ck_assert_int_eq(machine_start(m, NULL), 0);
		wait_count(m, n + 100);
		state_writer_free(save(m, &buf, &len));
		n = word(m, TINY_COUNTER);
	}
	machine_destroy(m);
}
END_TEST

START_TEST(a_state_of_another_shape_is_refused)
{
	struct machine *m = boot(tiny_count, sizeof tiny_count, 1);
	struct error err = ERROR_INIT;
	const uint8_t *buf;
	size_t len;
	struct state_writer *w = save(m, &buf, &len);
	struct machine_config cfg = config(2);
	struct machine *n = create(&cfg);
	ck_assert_int_eq(machine_load(n, buf, len, &err), -EPROTO);
	ck_assert_ptr_nonnull(strstr(err.message, "vCPUs"));
	machine_destroy(n);
	cfg = config(1);
	n = create(&cfg);
	ck_assert_int_lt(machine_load(n, buf, len - 1, &err), 0);
	ck_assert_int_lt(machine_load(n, "SNMSTATE", 8, &err), 0);
	ck_assert_int_eq(machine_load(n, buf, len, &err), 0);
	state_writer_free(w);
	machine_destroy(n);
	machine_destroy(m);
}
END_TEST

START_TEST(dirty_pages_are_the_guests_and_the_vmms)
{
	struct machine *m = boot(tiny_count, sizeof tiny_count, 1);
	struct dirty_source d = machine_dirty_source(m);
	struct error err = ERROR_INIT;
	size_t npages = MEMORY_BYTES / 4096;
	uint64_t *map = bitmap_alloc(npages), *all = bitmap_alloc(npages);
	bitmap_set_range(all, 0, npages);
	ck_assert_int_eq(d.start(d.opaque, &err), 0);
	ck_assert_int_eq(d.collect(d.opaque, map, &err), 0);
	ck_assert_uint_eq(bitmap_count(map, npages), npages); /* all, at first */
	for (size_t p = 0; p < npages; p += 512)
		ck_assert_int_eq(d.clear(d.opaque, p, 512, all, &err), 0);
	bitmap_clear_range(map, 0, npages);
	ck_assert_int_eq(d.collect(d.opaque, map, &err), 0);
	ck_assert_uint_eq(bitmap_count(map, npages), 0);

	ck_assert_int_eq(machine_start(m, NULL), 0);
	wait_count(m, 100);
	ck_assert_int_eq(machine_pause(m, NULL), 0);
	ck_assert_int_eq(guest_memory_write(machine_memory(m), 0x300000, "x", 1), 0);
	ck_assert_int_eq(d.collect(d.opaque, map, &err), 0);
	ck_assert(bitmap_test(map, TINY_COUNTER / 4096));
	ck_assert(bitmap_test(map, 0x300000 / 4096));
	ck_assert_uint_lt(bitmap_count(map, npages), 16);
	/* Not cleared, so reported again; the VMM's own only once. */
	bitmap_clear_range(map, 0, npages);
	ck_assert_int_eq(d.collect(d.opaque, map, &err), 0);
	ck_assert(bitmap_test(map, TINY_COUNTER / 4096));
	ck_assert(!bitmap_test(map, 0x300000 / 4096));
	/* After clearing, the next write is seen. */
	ck_assert_int_eq(d.clear(d.opaque, 512, 512, all, &err), 0);
	bitmap_clear_range(map, 0, npages);
	ck_assert_int_eq(d.collect(d.opaque, map, &err), 0);
	ck_assert(!bitmap_test(map, TINY_COUNTER / 4096));
	ck_assert_int_eq(machine_start(m, NULL), 0);
	wait_count(m, word(m, TINY_COUNTER));
	ck_assert_int_eq(machine_pause(m, NULL), 0);
	ck_assert_int_eq(d.collect(d.opaque, map, &err), 0);
	ck_assert(bitmap_test(map, TINY_COUNTER / 4096));
	ck_assert_int_eq(d.stop(d.opaque), 0);
	free(map);
	free(all);
	machine_destroy(m);
}
END_TEST

START_TEST(power_off_is_told_once)
{
	struct machine *m = boot(tiny_power_off, sizeof tiny_power_off, 1);
	ck_assert_int_eq(machine_start(m, NULL), 0);
	wait_event(MACHINE_EVENT_SHUTDOWN, 1);
	ck_assert(!machine_is_running(m));
	wait_console(1);
	clock_sleep_ms(20);
	ck_assert_uint_eq(event_count(MACHINE_EVENT_SHUTDOWN), 1);
	machine_destroy(m);
}
END_TEST

START_TEST(held_effects_leave_only_when_released)
{
	struct machine *m = boot(tiny_power_off, sizeof tiny_power_off, 1);
	ck_assert_int_eq(machine_start_held(m, NULL), 0);
	uint64_t until = clock_now_ms() + WAIT_MS;
	while (machine_is_running(m) && clock_now_ms() < until)
		clock_sleep_ms(2); /* it has powered itself off */
	clock_sleep_ms(50);
	ck_assert_uint_eq(event_count(MACHINE_EVENT_SHUTDOWN), 0);
	ck_assert_int_eq(console_bytes(), 0);
	ck_assert_int_eq(machine_release_effects(m, NULL), 0);
	wait_event(MACHINE_EVENT_SHUTDOWN, 1);
	wait_console(1);
	ck_assert_int_eq(machine_release_effects(m, NULL), 0); /* no harm */
	machine_destroy(m);
}
END_TEST

START_TEST(a_held_guest_that_is_abandoned_leaves_no_trace)
{
	struct machine *m = boot(tiny_power_off, sizeof tiny_power_off, 1);
	ck_assert_int_eq(machine_start_held(m, NULL), 0);
	clock_sleep_ms(100);
	ck_assert_int_eq(machine_pause(m, NULL), 0);
	machine_destroy(m);
	ck_assert_uint_eq(event_count(MACHINE_EVENT_SHUTDOWN), 0);
	ck_assert_int_eq(console_bytes(), 0);
}
END_TEST

START_TEST(a_power_off_nobody_saw_travels_with_the_state)
{
	struct machine *m = boot(tiny_power_off, sizeof tiny_power_off, 1);
	const uint8_t *buf;
	size_t len;
	struct error err = ERROR_INIT;
	ck_assert_int_eq(machine_start_held(m, NULL), 0);
	uint64_t until = clock_now_ms() + WAIT_MS;
	while (machine_is_running(m) && clock_now_ms() < until)
		clock_sleep_ms(2);
	struct state_writer *w = save(m, &buf, &len);
	struct machine *n = twin(m);
	copy_memory(n, m);
	ck_assert_int_eq(machine_load(n, buf, len, &err), 0);
	machine_destroy(m);
	ck_assert_int_eq(machine_start_held(n, NULL), 0);
	clock_sleep_ms(30);
	ck_assert_uint_eq(event_count(MACHINE_EVENT_SHUTDOWN), 0);
	ck_assert_int_eq(machine_release_effects(n, NULL), 0);
	wait_event(MACHINE_EVENT_SHUTDOWN, 1);
	wait_console(1); /* and its last words too */
	state_writer_free(w);
	machine_destroy(n);
}
END_TEST

START_TEST(reset_boots_again_and_tracking_stays_on)
{
	struct machine *m = boot(tiny_reset, sizeof tiny_reset, 2);
	struct dirty_source d = machine_dirty_source(m);
	size_t npages = MEMORY_BYTES / 4096;
	uint64_t *map = bitmap_alloc(npages), *all = bitmap_alloc(npages);
	bitmap_set_range(all, 0, npages);
	ck_assert_int_eq(d.start(d.opaque, NULL), 0);
	ck_assert_int_eq(d.collect(d.opaque, map, NULL), 0);
	ck_assert_int_eq(d.clear(d.opaque, 0, npages, all, NULL), 0);
	bitmap_clear_range(map, 0, npages);
	ck_assert_int_eq(machine_start(m, NULL), 0);
	wait_event(MACHINE_EVENT_SHUTDOWN, 1);
	ck_assert_uint_eq(event_count(MACHINE_EVENT_RESET), 2);
	ck_assert_uint_eq(word(m, TINY_BOOTS), 3);
	ck_assert_int_eq(d.collect(d.opaque, map, NULL), 0);
	ck_assert(bitmap_test(map, TINY_BOOTS / 4096));	  /* the guest's */
	ck_assert(bitmap_test(map, TINY_ADDRESS / 4096)); /* the kernel loaded again */
	free(map);
	free(all);
	machine_destroy(m);
}
END_TEST

START_TEST(a_held_reset_waits_too)
{
	struct machine *m = boot(tiny_reset, sizeof tiny_reset, 1);
	ck_assert_int_eq(machine_start_held(m, NULL), 0);
	clock_sleep_ms(100);
	ck_assert_uint_eq(event_count(MACHINE_EVENT_RESET), 0);
	ck_assert_int_eq(machine_release_effects(m, NULL), 0);
	wait_event(MACHINE_EVENT_SHUTDOWN, 1);
	ck_assert_uint_eq(event_count(MACHINE_EVENT_RESET), 2);
	machine_destroy(m);
}
END_TEST

START_TEST(a_triple_fault_is_a_crash)
{
	struct machine *m = boot(tiny_triple_fault, sizeof tiny_triple_fault, 1);
	ck_assert_int_eq(machine_start(m, NULL), 0);
	wait_event(MACHINE_EVENT_CRASHED, 1);
	ck_assert(!machine_is_running(m));
	machine_destroy(m);
}
END_TEST

static void refused(struct machine *m, const char *why)
{
	struct error err = ERROR_INIT;
	ck_assert_int_lt(machine_load_kernel(m, kernel, NULL, "", &err), 0);
	ck_assert_msg(strstr(err.message, kernel) && strstr(err.message, why), "%s", err.message);
}

START_TEST(bad_kernels_are_refused_by_name)
{
	struct machine_config cfg = config(1);
	struct machine *m = create(&cfg);
	Elf64_Ehdr eh;
	Elf64_Phdr ph[2];
	unlink(kernel);
	refused(m, "No such file");
	tiny_write(kernel, tiny_count, sizeof tiny_count);
	ck_assert_int_eq(truncate(kernel, 0), 0);
	refused(m, "neither");
	tiny_write(kernel, tiny_count, sizeof tiny_count);
	ck_assert_int_eq(truncate(kernel, 100), 0);
	refused(m, "truncated");
	tiny_write(kernel, tiny_count, sizeof tiny_count);
	ck_assert_int_eq(truncate(kernel, 300), 0);
	refused(m, "outside the file");

	tiny_headers(&eh, ph);
	ph[0].p_filesz = UINT64_MAX - 100;
	tiny_write_headers(kernel, &eh, ph, tiny_count, sizeof tiny_count);
	refused(m, "outside the file");
	tiny_headers(&eh, ph);
	ph[0].p_paddr = UINT64_MAX - 4095;
	tiny_write_headers(kernel, &eh, ph, tiny_count, sizeof tiny_count);
	refused(m, "does not fit");
	tiny_headers(&eh, ph);
	ph[0].p_memsz = UINT64_C(1) << 40;
	tiny_write_headers(kernel, &eh, ph, tiny_count, sizeof tiny_count);
	refused(m, "does not fit");
	tiny_headers(&eh, ph);
	eh.e_phoff = UINT64_MAX / 2;
	tiny_write_headers(kernel, &eh, ph, tiny_count, sizeof tiny_count);
	refused(m, "read");
	tiny_headers(&eh, ph);
	ph[1].p_filesz = 8;
	tiny_write_headers(kernel, &eh, ph, tiny_count, sizeof tiny_count);
	refused(m, "PVH");
	struct error err = ERROR_INIT;
	tiny_write(kernel, tiny_count, sizeof tiny_count);
	ck_assert_int_lt(machine_load_kernel(m, kernel, "/nowhere/initrd", "", &err), 0);
	ck_assert_ptr_nonnull(strstr(err.message, "/nowhere/initrd"));
	ck_assert_int_lt(machine_load_kernel(m, dir, NULL, "", &err), 0);
	ck_assert_ptr_nonnull(strstr(err.message, "not a regular file"));
	machine_destroy(m);
}
END_TEST

static struct machine *balloon_twin(struct machine *m, bool balloon)
{
	struct machine_config cfg = config(1);
	struct error err = ERROR_INIT;
	json_t *cpu = machine_cpu_describe(m, &err);
	cfg.cpu = cpu;
	cfg.balloon = balloon;
	struct machine *n = create(&cfg);
	json_decref(cpu);
	return n;
}

/* Target and device go along; a machine without one does not take the state of one that has it. */
START_TEST(a_balloon_goes_along)
{
	struct machine_config cfg = config(1);
	struct machine_balloon b;
	struct error err = ERROR_INIT;
	struct machine *m = create(&cfg), *with = balloon_twin(m, true), *without = balloon_twin(m, false);
	ck_assert(machine_balloon(m, &b));
	ck_assert(b.target_bytes == MEMORY_BYTES && b.actual_bytes == MEMORY_BYTES && !b.driver);
	ck_assert_int_eq(machine_balloon_set(m, MEMORY_BYTES + 1, &err), -EINVAL);
	ck_assert_int_eq(machine_balloon_set(m, MEMORY_BYTES / 2, &err), 0);
	ck_assert(!machine_balloon(without, &b));
	ck_assert_int_eq(machine_balloon_set(without, MEMORY_BYTES / 2, &err), -ENOTSUP);
	const uint8_t *buf;
	size_t len;
	struct state_writer *w = save(m, &buf, &len);
	ck_assert_int_lt(machine_load(without, buf, len, &err), 0);
	ck_assert_ptr_nonnull(strstr(err.message, "section virtio-balloon"));
	ck_assert_msg(machine_load(with, buf, len, &err) == 0, "%s", err.message);
	ck_assert(machine_balloon(with, &b));
	ck_assert_uint_eq(b.target_bytes, MEMORY_BYTES / 2);
	state_writer_free(w);
	machine_destroy(m);
	machine_destroy(with);
	machine_destroy(without);
}
END_TEST

START_TEST(bad_configurations_are_refused)
{
	struct machine *m;
	struct error err = ERROR_INIT;
	struct machine_config cfg = config(0);
	ck_assert_int_eq(machine_create(&cfg, &m, &err), -EINVAL);
	cfg = config(65);
	ck_assert_int_eq(machine_create(&cfg, &m, &err), -EINVAL);
	cfg = config(1);
	cfg.memory_bytes = 4097;
	ck_assert_int_eq(machine_create(&cfg, &m, &err), -EINVAL);
	cfg = config(1);
	cfg.serial = "tcp:80";
	ck_assert_int_eq(machine_create(&cfg, &m, &err), -EINVAL);
	ck_assert_ptr_nonnull(strstr(err.message, "tcp:80"));
}
END_TEST

START_TEST(cpu_of_this_host_runs_here)
{
	struct error err = ERROR_INIT;
	json_t *cpu = machine_cpu_describe_host(&err);
	ck_assert_msg(cpu != NULL, "%s", err.message);
	int ret = machine_cpu_check(cpu, &err);
	ck_assert_msg(ret == 0, "%s", err.message);
	json_decref(cpu);
}
END_TEST

/* Sets all bits of one register of leaf `function`; register 3 to 6 are eax to edx. */
static void tamper(json_t *cpu, uint32_t function, unsigned reg, json_int_t value)
{
	size_t i;
	json_t *row, *table = json_object_get(cpu, "cpuid");
	json_array_foreach(table, i, row)
	{
		if (json_integer_value(json_array_get(row, 0)) == function &&
		    json_integer_value(json_array_get(row, 1)) == 0)
			json_array_set_new(row, reg, json_integer(value));
	}
}

START_TEST(cpu_that_cannot_run_here_is_named)
{
	struct error err = ERROR_INIT;
	json_t *cpu = machine_cpu_describe_host(&err);
	tamper(cpu, 1, 5, 0xffffffff);
	ck_assert_int_eq(machine_cpu_check(cpu, &err), -ENOTSUP);
	ck_assert_msg(strstr(err.message, "monitor") && strstr(err.message, "vmx"), "%s", err.message);
	json_decref(cpu);
	cpu = machine_cpu_describe_host(&err);
	tamper(cpu, 0, 4, 0x756e6547); /* "Genu" */
	tamper(cpu, 0, 6, 0x49656e69);
	tamper(cpu, 0, 5, 0x6c65746f);
	int ret = machine_cpu_check(cpu, &err);
	if (ret == 0) { /* on an Intel host */
		tamper(cpu, 0, 4, 0x68747541);
		ret = machine_cpu_check(cpu, &err);
	}
	ck_assert_int_eq(ret, -ENOTSUP);
	ck_assert_ptr_nonnull(strstr(err.message, "vendor"));
	json_decref(cpu);
}
END_TEST

START_TEST(hostile_cpu_descriptions_are_refused)
{
	static const char *const bad[] = {
		"{}",
		"[]",
		"{\"tsc_khz\":1,\"cpuid\":[]}",
		"{\"tsc_khz\":1,\"cpuid\":[[1,2]]}",
		"{\"tsc_khz\":1,\"cpuid\":[[1,0,0,-1,0,0,0]]}",
		"{\"tsc_khz\":1,\"cpuid\":[[1,0,0,4294967296,0,0,0]]}",
		"{\"tsc_khz\":1,\"cpuid\":[[1,0,0,\"x\",0,0,0]]}",
		"{\"tsc_khz\":-1,\"cpuid\":[[1,0,0,0,0,0,0]]}",
		"{\"cpuid\":[[1,0,0,0,0,0,0]]}",
		"{\"tsc_khz\":1,\"cpuid\":{\"a\":1}}",
	};
	for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
		struct error err = ERROR_INIT;
		json_t *j = json_loads(bad[i], 0, NULL);
		ck_assert_int_eq(machine_cpu_check(j, &err), -EPROTO);
		json_decref(j);
	}
	json_t *many = json_object(), *table = json_array();
	for (int i = 0; i < 300; i++)
		json_array_append_new(table, json_pack("[i,i,i,i,i,i,i]", i, 0, 0, 0, 0, 0, 0));
	json_object_set_new(many, "cpuid", table);
	json_object_set_new(many, "tsc_khz", json_integer(1));
	ck_assert_int_eq(machine_cpu_check(many, NULL), -EPROTO);
	json_decref(many);
}
END_TEST

int main(void)
{
	if (access("/dev/kvm", R_OK | W_OK)) {
		printf("skipped: no access to /dev/kvm\n");
		/* run-unit wants a summary line of libcheck's shape: one check, skipped */
		printf("100%%: Checks: 1, Failures: 0, Errors: 0\n");
		return 0;
	}
	Suite *s = suite_create("machine");
	TCase *t = tcase_create("machine");
	tcase_add_checked_fixture(t, setup, teardown);
	tcase_add_test(t, a_stopped_guest_stands_still);
	tcase_add_test(t, many_vcpus_start_and_stop);
	tcase_add_test(t, several_vcpus_are_saved_and_loaded);
	tcase_add_test(t, a_missing_vcpu_is_named);
	tcase_add_test(t, a_loaded_guest_goes_on_where_it_was);
	tcase_add_loop_test(t, loading_leaves_memory_alone, 0, 2);
	tcase_add_test(t, a_machine_that_is_another_is_found_out);
	tcase_add_test(t, saving_changes_nothing);
	tcase_add_test(t, a_state_of_another_shape_is_refused);
	tcase_add_test(t, dirty_pages_are_the_guests_and_the_vmms);
	tcase_add_test(t, power_off_is_told_once);
	tcase_add_test(t, held_effects_leave_only_when_released);
	tcase_add_test(t, a_held_guest_that_is_abandoned_leaves_no_trace);
	tcase_add_test(t, a_power_off_nobody_saw_travels_with_the_state);
	tcase_add_test(t, reset_boots_again_and_tracking_stays_on);
	tcase_add_test(t, a_held_reset_waits_too);
	tcase_add_test(t, a_triple_fault_is_a_crash);
	tcase_add_test(t, bad_kernels_are_refused_by_name);
	tcase_add_test(t, a_balloon_goes_along);
	tcase_add_test(t, bad_configurations_are_refused);
	tcase_add_test(t, cpu_of_this_host_runs_here);
	tcase_add_test(t, cpu_that_cannot_run_here_is_named);
	tcase_add_test(t, hostile_cpu_descriptions_are_refused);
	suite_add_tcase(s, t);
	return suite_run(s);
}
