/* SPDX-License-Identifier: Apache-2.0 */
#ifndef MEMXFER_PACE_H
#define MEMXFER_PACE_H

#include <stdbool.h>
#include <stdint.h>

/*
 * When the guest may be stopped, and how far it is slowed until then: decisions from figures alone, without a
 * clock, a guest or a link, so that tests simulate all three.
 */

/* What a pause costs besides its memory, as measured in earlier ones. */
struct mem_pause_costs {
	uint64_t stop_us, drain_us, state_us, load_us;
	uint64_t lead_us; /* from the last look at the dirty log to the pause: the guest runs on */
};

struct mem_prediction {
	uint64_t dirty_bytes;
	double dirty_bytes_per_s, rate_bytes_per_s; /* a rate of 0: nothing is measured yet */
	uint64_t collect_us, round_trip_us;
	struct mem_pause_costs pause;
};

/* Above this a prediction has nothing to go by. */
#define MEM_PREDICTION_MAX_US UINT64_C(1000000000000)

/* The downtime, if the guest were stopped now. *fixed_us (may be NULL): the part of it that is not data. */
uint64_t mem_predict_us(const struct mem_prediction *p, uint64_t *fixed_us);

struct mem_pace_options {
	uint64_t budget_us;	   /* of the downtime */
	unsigned max_rounds;	   /* 0: any number */
	unsigned max_time_ms;	   /* since the first round; 0: any time */
	unsigned slow_max_percent; /* how far the guest may be slowed: 0 (never) to 99 */
	double shrink; /* without a tighter limit a round is to have at most this part of the one before */
};

/* A round that has ended, and what is dirty after it. */
struct mem_pace_round {
	unsigned rounds;     /* so far, this one included */
	uint64_t elapsed_ms; /* since the first one began */
	uint64_t ns;	     /* that it took */
	uint64_t began_bytes, left_bytes;
	double rate_bytes_per_s;
	uint64_t predicted_us, fixed_us; /* mem_predict_us */
};

enum mem_pace_verdict {
	MEM_PACE_FITS, /* stop the guest: the budget holds */
	MEM_PACE_ON,   /* another round */
	MEM_PACE_OVER, /* a limit is reached, or nothing that is allowed gets it any smaller */
};

struct mem_pace {
	struct mem_pace_options opt;
	double speed;			/* of the guest: 1 = as fast as it goes */
	uint64_t least_bytes, least_ms; /* that a round left, and when */
	unsigned late;			/* rounds in a row that did not get small enough */
	unsigned stalled;		/* rounds without a new least, when no more may be done about it */
};

void mem_pace_init(struct mem_pace *p, const struct mem_pace_options *opt);
/* Rounds begin once more: what the guest dirtied meanwhile counts no more than before, its speed stays. */
void mem_pace_again(struct mem_pace *p);
/* Judges a round and sets p->speed for the next one. */
enum mem_pace_verdict mem_pace_next(struct mem_pace *p, const struct mem_pace_round *r);

/*
 * Spreads a speed of the whole over n vCPUs by what each of them dirties at full speed: those that dirty most
 * are slowed, all to the same rate, none below `least`. Nothing dirtied: all alike.
 */
void mem_pace_spread(const double *dirties, unsigned n, double speed, double least, double *speeds);

#endif
