/* SPDX-License-Identifier: Apache-2.0 */
/* The native test guest's own small platform layer: all of it runs in ring 3 on one vCPU, without interrupts.
 */
#ifndef TESTS_GUEST_GUEST_H
#define TESTS_GUEST_GUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PAGE_BYTES 4096u
#define MIB	   (1024u * 1024u)
#define barrier()  __asm__ volatile("" ::: "memory")

/* Port I/O; ring 3 may, by the TSS's clear bitmap. */
static inline void outb(uint16_t port, uint8_t v)
{
	__asm__ volatile("outb %0, %1" ::"a"(v), "Nd"(port));
}
static inline void outw(uint16_t port, uint16_t v)
{
	__asm__ volatile("outw %0, %1" ::"a"(v), "Nd"(port));
}
static inline void outl(uint16_t port, uint32_t v)
{
	__asm__ volatile("outl %0, %1" ::"a"(v), "Nd"(port));
}
static inline uint8_t inb(uint16_t port)
{
	uint8_t v;
	__asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port));
	return v;
}
static inline uint16_t inw(uint16_t port)
{
	uint16_t v;
	__asm__ volatile("inw %1, %0" : "=a"(v) : "Nd"(port));
	return v;
}
static inline uint32_t inl(uint16_t port)
{
	uint32_t v;
	__asm__ volatile("inl %1, %0" : "=a"(v) : "Nd"(port));
	return v;
}

/* MMIO by plain moves only: an instruction emulator may not know what else a compiler would choose. */
static inline uint8_t mmio_read8(uint64_t a)
{
	uint8_t v;
	__asm__ volatile("movb (%1), %0" : "=q"(v) : "r"(a) : "memory");
	return v;
}
static inline uint16_t mmio_read16(uint64_t a)
{
	uint16_t v;
	__asm__ volatile("movw (%1), %0" : "=r"(v) : "r"(a) : "memory");
	return v;
}
static inline uint32_t mmio_read32(uint64_t a)
{
	uint32_t v;
	__asm__ volatile("movl (%1), %0" : "=r"(v) : "r"(a) : "memory");
	return v;
}
static inline void mmio_write8(uint64_t a, uint8_t v)
{
	__asm__ volatile("movb %0, (%1)" ::"q"(v), "r"(a) : "memory");
}
static inline void mmio_write16(uint64_t a, uint16_t v)
{
	__asm__ volatile("movw %0, (%1)" ::"r"(v), "r"(a) : "memory");
}
static inline void mmio_write32(uint64_t a, uint32_t v)
{
	__asm__ volatile("movl %0, (%1)" ::"r"(v), "r"(a) : "memory");
}

static inline uint64_t rdtsc(void)
{
	uint32_t lo, hi;
	__asm__ volatile("lfence; rdtsc" : "=a"(lo), "=d"(hi)::"memory");
	return (uint64_t)hi << 32 | lo;
}

/* console.c: a queue that con_poll() drains by a byte a call, so that printing never holds up the main loop.
 */
void con_init(void);
void con_printf(const char *format, ...) __attribute__((format(printf, 1, 2)));
void con_poll(void);
void con_drain(void);
int con_input(void); /* the next byte typed, or -1 */
uint64_t con_dropped(void);

/* platform.c: start info, options, memory, time. */
struct start_info;
void platform_init(const struct start_info *info);
const char *option_string(const char *name); /* null if absent; valid for ever */
uint64_t option_number(const char *name, uint64_t otherwise);
bool option_is(const char *name, const char *value);
void options_report_unknown(void);
uint64_t ram_bytes(void);
uint64_t ram_low_end(void);			 /* end of RAM below 4 GiB */
void map_physical(uint64_t base, uint64_t len);	 /* identity, usable at once */
void *ram_alloc(uint64_t bytes, uint64_t align); /* zeroed; halts when there is no memory left */
uint64_t ram_pages_left(void);
uint64_t *ram_page(uint64_t index); /* the index-th page that ram_alloc() has not given out */
/* idle=1: the PIT interrupts a halt every IDLE_MS */
#define IDLE_MS 1u
void idle_init(void);
void idle_wait(void); /* entry.S; RAX is lost, as in any call */
_Noreturn void guest_halt(const char *why);
void guest_power_off(void);

/* main.c: time in TSC ticks. Active time leaves out what passed while the guest stood still. */
extern uint64_t tsc_khz;
extern uint64_t active_ticks;
extern uint64_t guest_seed;
extern uint64_t work_done; /* counts: a pass of the main loop that did nothing may be followed by an idle wait */
uint64_t guest_random(void);
/* True a bounded number of times for each kind of failure; all of them are counted. */
bool report_bad(unsigned kind);
enum { BAD_PAGE, BAD_SECTOR, BAD_REQUEST, BAD_CPU, BAD_KINDS };
extern uint64_t bad_count[BAD_KINDS];

/* Credit for work at a set rate. Time lost is not caught up, so a stop is not followed by a burst. */
struct pacer {
	uint64_t per_second; /* units */
	uint64_t credit;     /* units << 20 */
	uint64_t last;	     /* active_ticks */
};
bool pacer_take(struct pacer *p);

/* memwork.c */
void mem_init(void);
void mem_step(void);
bool mem_touched(void);
bool mem_verify_step(void); /* true when every page has been checked */
/* A page as its number and generation make it; false, and said so, if it is not. */
void mem_write_page(uint64_t *page, uint64_t number, uint64_t generation);
bool mem_check_page(const uint64_t *page, uint64_t number, uint64_t generation);
struct mem_stats {
	uint64_t rewritten, scanned, touched, ws_pages, zero_pages, cold_pages;
};
extern struct mem_stats mem_stats;

/* spare.c */
void spare_init(void); /* before mem_init */
void spare_step(void);
bool spare_touched(void);
bool spare_verify_step(void);
void spare_command(int c); /* a byte typed */
void spare_print(void);

/* diskwork.c */
void disk_init(void);
void disk_step(void);
bool disk_finish_step(void); /* true when drained, read back in full and flushed */
void disk_report_done(void);
struct disk_stats {
	uint64_t sectors, writes, reads, flushes, zeroes, discards, rechecked;
	uint64_t slow_writes, max_write; /* changes that took long; ticks of the longest one */
};
extern struct disk_stats disk_stats;
unsigned disk_count(void);
uint64_t disk_acked(unsigned disk);
unsigned disk_in_flight(void);

#endif
