/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The native test guest: loads memory and disks, checks all that it reads, and says how long it ever stood
 * still. Options, lines and their meaning: tests/guest/README.md
 */
#include "guest.h"
#include "selfdesc.h"

#define BAD_LINES_MAX  50u
#define ACTIVE_STEP_MS 100u
#define INPUT_POLL_MS  50u
#define MXCSR_CANARY   0x5f80u /* rounding up: nothing sets that by accident */

void guest_main(const struct start_info *info);

uint64_t tsc_khz, active_ticks, guest_seed, work_done;
uint64_t bad_count[BAD_KINDS];
extern uint64_t fs_area[];

static uint64_t random_state;
static uint64_t start_tsc, last_tsc, max_gap, last_gap, gap_since_heartbeat, gaps, gap_min;
static uint64_t heartbeat_seq, canary = 1, waited;
static bool print_gaps;

uint64_t guest_random(void)
{
	return selfdesc_mix(random_state += 0x9e3779b97f4a7c15ULL);
}

bool report_bad(unsigned kind)
{
	return ++bad_count[kind] <= BAD_LINES_MAX;
}

bool pacer_take(struct pacer *p)
{
	uint64_t per_second_ticks = tsc_khz * 1000, passed = active_ticks - p->last, most;

	if (!p->per_second)
		return false;
	p->last = active_ticks;
	if (passed > per_second_ticks / 10)
		passed = per_second_ticks / 10;
	/* 20 bits of fraction; passed is below 2^30 and per_second below 2^24, so nothing overflows. */
	p->credit += passed * p->per_second / (per_second_ticks >> 20);
	most = (p->per_second / 20 + 1) << 20;
	if (p->credit > most)
		p->credit = most;
	if (p->credit < 1u << 20)
		return false;
	p->credit -= 1u << 20;
	work_done++;
	return true;
}

static void cpuid(uint32_t leaf, uint32_t out[4])
{
	__asm__ volatile("cpuid"
			 : "=a"(out[0]), "=b"(out[1]), "=c"(out[2]), "=d"(out[3])
			 : "a"(leaf), "c"(0));
}

/* TSC ticks in 40 ms of the PIT's channel 2, or 0 if there is no PIT. */
static uint64_t pit_ticks_40ms(void)
{
	const unsigned latch = 1193182 / 25;
	uint64_t start, now;

	outb(0x61, (uint8_t)((inb(0x61) & ~2u) | 1));
	outb(0x43, 0xb0); /* channel 2, both bytes, mode 0 */
	outb(0x42, latch & 0xff);
	outb(0x42, latch >> 8);
	start = rdtsc();
	if (inb(0x61) & 0x20)
		return 0;
	do {
		now = rdtsc();
		if (now - start > 4000000000ULL)
			return 0;
	} while (!(inb(0x61) & 0x20));
	return (now + rdtsc()) / 2 - start;
}

static const char *find_tsc_khz(void)
{
	uint32_t r[4], max;
	uint64_t t[3];

	tsc_khz = option_number("tsc_khz", 0);
	if (tsc_khz)
		return "option";
	cpuid(0, r);
	max = r[0];
	if (max >= 0x15) {
		cpuid(0x15, r);
		if (r[0] && r[1] && r[2]) {
			tsc_khz = (uint64_t)r[2] * r[1] / r[0] / 1000;
			return "cpuid15";
		}
	}
	cpuid(0x40000000, r);
	if (r[0] >= 0x40000010 && r[0] < 0x40010000) {
		cpuid(0x40000010, r);
		if (r[0]) {
			tsc_khz = r[0];
			return "cpuid40000010";
		}
	}
	/* The median of three: one of them may have been interrupted by the host. */
	for (unsigned i = 0; i < 3; i++)
		t[i] = pit_ticks_40ms();
	tsc_khz = (t[0] > t[1]) == (t[0] < t[2]) ? t[0] : (t[1] > t[0]) == (t[1] < t[2]) ? t[1] : t[2];
	tsc_khz /= 40;
	if (tsc_khz)
		return "pit";
	tsc_khz = 1000000;
	return "guess";
}

/* State that only the VMM can lose: an SSE register, MXCSR and the FS base. A register is 0 after a botched
 * restore. */
static void cpu_canaries_set(void)
{
	uint32_t mxcsr = MXCSR_CANARY;

	fs_area[0] = canary;
	__asm__ volatile("movq %0, %%xmm15" ::"r"(canary));
	__asm__ volatile("ldmxcsr %0" ::"m"(mxcsr));
}

static void cpu_canaries_check(void)
{
	uint64_t xmm, fs;
	uint32_t mxcsr;

	__asm__ volatile("movq %%xmm15, %0" : "=r"(xmm));
	__asm__ volatile("movq %%fs:0, %0" : "=r"(fs));
	__asm__ volatile("stmxcsr %0" : "=m"(mxcsr));
	if ((xmm != canary || fs != canary || (mxcsr & 0xffc0) != (MXCSR_CANARY & 0xffc0)) &&
	    report_bad(BAD_CPU))
		con_printf("BAD cpu xmm15=0x%lx fs0=0x%lx expected=0x%lx mxcsr=0x%x expected_mxcsr=0x%x\n",
			   xmm, fs, canary, mxcsr, MXCSR_CANARY);
	canary = canary * 6364136223846793005ULL + 1442695040888963407ULL;
	cpu_canaries_set();
}

static uint64_t to_us(uint64_t ticks)
{
	return ticks / tsc_khz * 1000 + ticks % tsc_khz * 1000 / tsc_khz;
}

static void tick(void)
{
	uint64_t now = rdtsc(), since = last_tsc, passed = now - since, gap;

	if (now < last_tsc) {
		if (report_bad(BAD_CPU))
			con_printf("BAD tsc went back from=%lu to=%lu\n", last_tsc, now);
		passed = 0;
	}
	last_tsc = now;
	/* what it waited for on purpose is no gap */
	gap = passed - (passed < waited ? passed : waited);
	waited = 0;
	if (gap > max_gap)
		max_gap = gap;
	if (gap > gap_since_heartbeat)
		gap_since_heartbeat = gap;
	if (gap >= gap_min) {
		last_gap = gap;
		gaps++;
		if (print_gaps)
			con_printf("gap tsc=%lu us=%lu\n", since, to_us(gap));
	}
	active_ticks += passed < tsc_khz * ACTIVE_STEP_MS ? passed : tsc_khz * ACTIVE_STEP_MS;
}

/* Halts until the timer's next interrupt; of that time, a period is as wanted. */
static void wait_for_work(void)
{
	uint64_t before = rdtsc(), period = tsc_khz * IDLE_MS;

	idle_wait();
	waited = rdtsc() - before;
	if (waited > period)
		waited = period;
}

static void print_counters(const char *what)
{
	con_printf("%s seq=%lu t=%lu maxgap_us=%lu lastgap_us=%lu gap_since_hb_us=%lu gaps=%lu pages=%lu "
		   "scanned=%lu "
		   "touched=%lu badpages=%lu sectors=%lu badsectors=%lu badreqs=%lu badcpu=%lu writes=%lu "
		   "reads=%lu "
		   "flushes=%lu zeroes=%lu discards=%lu slowwrites=%lu maxwrite_us=%lu inflight=%u "
		   "dropped=%lu acked=%lu",
		   what, heartbeat_seq++, to_us(last_tsc - start_tsc) / 1000, to_us(max_gap), to_us(last_gap),
		   to_us(gap_since_heartbeat), gaps, mem_stats.rewritten, mem_stats.scanned,
		   mem_stats.touched, bad_count[BAD_PAGE], disk_stats.sectors, bad_count[BAD_SECTOR],
		   bad_count[BAD_REQUEST], bad_count[BAD_CPU], disk_stats.writes, disk_stats.reads,
		   disk_stats.flushes, disk_stats.zeroes, disk_stats.discards, disk_stats.slow_writes,
		   to_us(disk_stats.max_write), disk_in_flight(), con_dropped(), disk_acked(0));
	for (unsigned i = 1; i < disk_count(); i++)
		con_printf(" acked%u=%lu", i, disk_acked(i));
	con_printf("\n");
	gap_since_heartbeat = 0;
}

static void main_loop(void)
{
	uint64_t hb = option_number("hb", 200) * tsc_khz, run = option_number("run", 0) * 1000 * tsc_khz;
	uint64_t next_hb, next_input, work_before;
	bool touched_said = false, idle;
	enum { RUNNING, DRAINING, VERIFYING, DONE } phase = RUNNING;

	idle = option_number("idle", 0);
	options_report_unknown();
	con_drain();
	start_tsc = last_tsc = rdtsc();
	next_hb = start_tsc;
	next_input = start_tsc;
	cpu_canaries_set();
	if (idle)
		idle_init();
	for (;;) {
		work_before = work_done;
		tick();
		cpu_canaries_check();
		con_poll();
		switch (phase) {
		case RUNNING:
			mem_step();
			spare_step();
			disk_step();
			if (!touched_said && mem_touched() && spare_touched()) {
				con_printf("touched t=%lu pages=%lu\n", to_us(last_tsc - start_tsc) / 1000,
					   mem_stats.touched);
				touched_said = true;
				max_gap = last_gap = gaps =
					0; /* faults on fresh memory are no stops of the guest */
			}
			if (run && last_tsc - start_tsc > run) {
				con_printf("finishing why=run\n");
				phase = DRAINING;
			}
			break;
		case DRAINING:
			if (disk_finish_step())
				phase = VERIFYING;
			break;
		case VERIFYING:
			if (mem_verify_step() && spare_verify_step()) {
				uint64_t bad = 0;

				for (unsigned i = 0; i < BAD_KINDS; i++)
					bad += bad_count[i];
				disk_report_done();
				print_counters("final");
				con_printf("done ok=%u bad=%lu\n", bad == 0, bad);
				con_drain();
				guest_power_off();
				phase = DONE;
			}
			break;
		case DONE:
			break;
		}
		if (last_tsc >= next_hb) {
			spare_print();
			print_counters("hb");
			next_hb = last_tsc + hb;
		}
		if (phase == RUNNING && last_tsc >= next_input) {
			next_input = last_tsc + INPUT_POLL_MS * tsc_khz;
			int c = con_input();

			spare_command(c);
			if (c == 'q') {
				con_printf("finishing why=console\n");
				phase = DRAINING;
			}
		}
		if (idle && phase == RUNNING && work_done == work_before)
			wait_for_work();
	}
}

void guest_main(const struct start_info *info)
{
	const char *from;

	con_init();
	platform_init(info);
	guest_seed = option_number("seed", 1);
	random_state = selfdesc_mix(guest_seed);
	from = find_tsc_khz();
	gap_min = option_number("gapmin", 1000) * tsc_khz / 1000;
	print_gaps = option_number("gaplog", 0);
	con_printf("native-guest format=1 tsc_khz=%lu tsc_from=%s ram_mib=%lu seed=%lu\n", tsc_khz, from,
		   ram_bytes() / MIB, guest_seed);
	if (option_string("poweroff") && !*option_string("poweroff"))
		con_printf("BAD option poweroff is empty\n");
	disk_init();
	spare_init();
	mem_init();
	con_printf("memory ws_pages=%lu cold_pages=%lu zero_pages=%lu\n", mem_stats.ws_pages,
		   mem_stats.cold_pages, mem_stats.zero_pages);
	if (option_is("selftest", "fault"))
		__asm__ volatile("ud2");
	main_loop();
}
