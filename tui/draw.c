/* SPDX-License-Identifier: Apache-2.0 */
/* From the state of the moves to a page, for any size: what matters less goes first. */
#include <stdio.h>
#include <string.h>

#include "tui/text.h"
#include "tui/ui.h"

#define NARROW_COLS 60 /* below, lines are shortened */
#define LABEL_MAX   20

/* Rows of each section; what is left over stays empty above the keys. */
struct layout {
	unsigned title, bar, phases, disks, verify, memory, send, dirty, facts, messages, gaps;
};

struct pen {
	struct screen *s;
	const struct view *v;
	unsigned row, label; /* label: the column in which what follows a row's name begins */
	bool narrow;
	uint64_t now_ms; /* since the move's start */
	time_t now;
};

static double part_of(uint64_t done, uint64_t total)
{
	return total ? (double)done / (double)total : 1;
}

/* Right-aligned; returns the column in which it begins. */
static unsigned text_right(struct screen *s, unsigned row, unsigned end, enum style style, const char *text)
{
	unsigned cells = text_cells(text), col = cells < end ? end - cells : 0;
	screen_text(s, row, col, end, style, text);
	return col;
}

/* --- what is how high --- */

static void give(unsigned *left, unsigned *field, unsigned upto)
{
	while (*left && *field < upto) {
		++*field;
		--*left;
	}
}

static unsigned facts_wanted(const struct view *v)
{
	return v->downtime_predicted || v->slowed_percent || v->postcopy.known || v->bandwidth ||
	       v->buffered_bytes || v->ended;
}

static struct layout plan(const struct view *v, unsigned rows)
{
	struct layout l = {0};
	unsigned messages = v->nmessages < VIEW_MESSAGES ? v->nmessages : VIEW_MESSAGES;
	bool memory = v->memory.known;
	/* each at least once... */
	give(&rows, &l.title, 1);
	give(&rows, &l.bar, 1);
	give(&rows, &l.messages, messages ? 1 : 0);
	give(&rows, &l.phases, 1);
	give(&rows, &l.disks, v->ndisks ? 1 : 0);
	give(&rows, &l.verify, v->verify_bytes ? 1 : 0);
	give(&rows, &l.memory, memory ? 1 : 0);
	give(&rows, &l.send, 1);
	give(&rows, &l.facts, facts_wanted(v));
	give(&rows, &l.dirty, memory ? 1 : 0);
	/* ...then more of each */
	give(&rows, &l.disks, v->ndisks);
	give(&rows, &l.memory, memory && v->nrounds ? 2 : l.memory);
	give(&rows, &l.messages, messages < 4 ? messages : 4);
	give(&rows, &l.gaps, 3);
	give(&rows, &l.send, 3);
	give(&rows, &l.dirty, memory ? 3 : 0);
	give(&rows, &l.messages, 2 * messages < 12 ? 2 * messages : 12);
	for (unsigned high = 4; high <= 10 && rows; high++) {
		give(&rows, &l.send, high);
		give(&rows, &l.dirty, memory ? high : 0);
	}
	give(&rows, &l.messages, 2 * messages);
	return l;
}

/* --- sections --- */

static enum style result_style(const struct view *v)
{
	if (!strcmp(v->result, "moved") || !strcmp(v->result, "rehearsed"))
		return v->exit_status ? STYLE_WARN : STYLE_GOOD;
	return strcmp(v->result, "cancelled") ? STYLE_BAD : STYLE_WARN;
}

static void draw_title(struct pen *p)
{
	char clock[TEXT_BYTES];
	unsigned end = text_right(p->s, p->row, p->s->cols, STYLE_PLAIN, text_clock(p->now_ms, clock));
	unsigned col = screen_text(p->s, p->row, 0, end, STYLE_BOLD, p->v->vm);
	const char *from = p->v->from, *to = *p->v->host ? p->v->host : "?";
	screen_format(p->s, p->row, col, end ? end - 1 : 0, STYLE_PLAIN, "  %s%s%s", from,
		      *from ? " -> " : "-> ", to);
	p->row++;
}

/* "0:45 left, ends 13:45:12" */
static void say_left(const struct pen *p, char *out, size_t size)
{
	const struct view *v = p->v;
	char left[TEXT_BYTES], at[16] = "";
	struct tm tm;
	if (v->ended) {
		snprintf(out, size, "%s", v->result);
		return;
	}
	if (!v->left_known) {
		snprintf(out, size, "%s", p->narrow ? "" : "time left not known yet");
		return;
	}
	time_t end = p->now + (time_t)((v->left_ms + 500) / 1000);
	if (localtime_r(&end, &tm))
		strftime(at, sizeof at, "%H:%M:%S", &tm);
	text_clock(v->left_ms, left);
	if (p->narrow)
		snprintf(out, size, "%s left", left);
	else
		snprintf(out, size, "%s left, ends %s", left, at);
}

static void draw_bar(struct pen *p)
{
	char right[64];
	say_left(p, right, sizeof right);
	enum style style = p->v->ended ? result_style(p->v) : STYLE_BAR;
	unsigned end = text_right(p->s, p->row, p->s->cols, p->v->ended ? style : STYLE_PLAIN, right);
	unsigned col = screen_format(p->s, p->row, 0, end, STYLE_BOLD, "%3.0f %% ", p->v->percent);
	screen_bar(p->s, p->row, col, *right && end ? end - 1 : end, p->v->percent / 100, style);
	p->row++;
}

static void phase_words(const struct pen *p, unsigned i, char *out, size_t size)
{
	char span[TEXT_BYTES];
	const struct view_phase *ph = &p->v->phase[i];
	uint64_t end = ph->ended_ms ? ph->ended_ms : p->now_ms;
	snprintf(out, size, "%s %s", ph->name, text_span(end > ph->began_ms ? end - ph->began_ms : 0, span));
}

/* The last ones that fit; the present one is bold. */
static void draw_phases(struct pen *p)
{
	char words[80];
	unsigned n = p->v->nphases, first = n, cells = 0;
	while (first > 0) {
		phase_words(p, first - 1, words, sizeof words);
		unsigned more = text_cells(words) + (first < n ? 2 : 0);
		if (cells + more > p->s->cols)
			break;
		cells += more;
		first--;
	}
	if (!n)
		screen_text(p->s, p->row, 0, p->s->cols, STYLE_DIM, "begins");
	unsigned col = 0;
	for (unsigned i = first; i < n; i++) {
		bool present = i == n - 1 && !p->v->ended;
		phase_words(p, i, words, sizeof words);
		col = screen_text(p->s, p->row, col, p->s->cols, present ? STYLE_BOLD : STYLE_PLAIN, words) +
		      2;
	}
	p->row++;
}

/* One row "label bar per cent words". */
static void draw_gauge(struct pen *p, const char *label, double part, enum style style, const char *words)
{
	struct screen *s = p->s;
	unsigned end = s->cols, col;
	screen_text(s, p->row, 0, p->label - 1, STYLE_PLAIN, label);
	if (*words) {
		/* in a column of their own, so that bars of rows below one another are equally long */
		unsigned room = p->narrow ? text_cells(words) : 36;
		col = s->cols > p->label + room + 10 ? s->cols - room : s->cols;
		screen_text(s, p->row, col, s->cols, STYLE_PLAIN, words);
		end = col ? col - 1 : 0;
	}
	/* 100 only when it is all */
	double percent = part >= 1 ? 100 : part * 100 > 99 ? 99 : part * 100;
	col = end > 6 ? end - 6 : 0;
	screen_bar(s, p->row, p->label, col, part, style);
	screen_format(s, p->row, col, end, STYLE_PLAIN, " %3.0f %%", percent);
	p->row++;
}

static void disk_words(const struct pen *p, uint64_t done, uint64_t total, uint64_t mirrored, char *out,
		       size_t size)
{
	char d[TEXT_BYTES], t[TEXT_BYTES], m[TEXT_BYTES];
	text_bytes((double)done, d);
	text_bytes((double)total, t);
	if (p->narrow)
		*out = '\0';
	else if (mirrored)
		snprintf(out, size, "%s of %s, mirrored %s", d, t, text_bytes((double)mirrored, m));
	else
		snprintf(out, size, "%s of %s", d, t);
}

static void draw_disks(struct pen *p, unsigned rows)
{
	const struct view *v = p->v;
	unsigned each = rows < v->ndisks ? rows - 1 : v->ndisks;
	char words[96], label[48];
	for (unsigned i = 0; i < each; i++) {
		const struct view_disk *d = &v->disk[i];
		disk_words(p, d->synced_bytes, d->total_bytes, d->mirrored_bytes, words, sizeof words);
		draw_gauge(p, d->id, part_of(d->synced_bytes, d->total_bytes), STYLE_BAR, words);
	}
	if (each == v->ndisks)
		return;
	/* the others in one row */
	uint64_t done = 0, total = 0, mirrored = 0;
	for (unsigned i = each; i < v->ndisks; i++) {
		done += v->disk[i].synced_bytes;
		total += v->disk[i].total_bytes;
		mirrored += v->disk[i].mirrored_bytes;
	}
	snprintf(label, sizeof label, each ? "%u more" : "%u disks", v->ndisks - each);
	disk_words(p, done, total, mirrored, words, sizeof words);
	draw_gauge(p, label, part_of(done, total), STYLE_BAR, words);
}

/* Reading both sides again. */
static void draw_verify(struct pen *p)
{
	const struct view *v = p->v;
	char words[96];
	disk_words(p, v->verified_bytes, v->verify_bytes, 0, words, sizeof words);
	draw_gauge(p, p->narrow ? "same" : "compared", part_of(v->verified_bytes, v->verify_bytes),
		   STYLE_GOOD, words);
}

static void draw_memory(struct pen *p, unsigned rows)
{
	const struct view_memory *m = &p->v->memory;
	char words[128], left[TEXT_BYTES], total[TEXT_BYTES], began[TEXT_BYTES];
	uint64_t rest = m->remaining_bytes < m->total_bytes ? m->remaining_bytes : m->total_bytes;
	text_bytes((double)m->remaining_bytes, left);
	text_bytes((double)m->total_bytes, total);
	snprintf(words, sizeof words, p->narrow ? "r%u" : "%2$s of %3$s left, round %1$u", m->round, left,
		 total);
	draw_gauge(p, p->narrow ? "mem" : "memory", part_of(m->total_bytes - rest, m->total_bytes), STYLE_BAR,
		   words);
	if (rows < 2)
		return;
	/* what each round began with: the first all, then what the guest had dirtied */
	screen_text(p->s, p->row, 0, p->label - 1, STYLE_PLAIN, p->narrow ? "rnds" : "rounds");
	unsigned end = p->s->cols, col = p->label, n = p->v->nrounds, fit = end > col ? (end - col) / 14 : 0;
	if (m->wire_bytes && (double)m->sent_bytes > 1.05 * (double)m->wire_bytes && !p->narrow) {
		snprintf(words, sizeof words, "compressed %.1f : 1",
			 (double)m->sent_bytes / (double)m->wire_bytes);
		end = text_right(p->s, p->row, end, STYLE_PLAIN, words);
		fit = end > col + 1 ? (end - col - 1) / 14 : 0;
	}
	for (unsigned i = n > fit ? n - fit : 0; i < n; i++)
		col = screen_format(p->s, p->row, col, end, i == n - 1 ? STYLE_BOLD : STYLE_PLAIN, "%u: %s",
				    p->v->round[i].number, text_bytes((double)p->v->round[i].bytes, began)) +
		      2;
	p->row++;
}

/* The most that is in the graphs of both rates, which share a scale. */
static uint64_t graph_peak(const struct view *v, unsigned width)
{
	uint64_t peak = 1;
	unsigned first = v->nsamples > width ? v->nsamples - width : 0;
	for (unsigned i = first; i < v->nsamples; i++) {
		const struct view_sample *x = view_sample(v, i);
		peak = x->send > peak ? x->send : peak;
		peak = x->dirty > peak ? x->dirty : peak;
	}
	return peak;
}

static void draw_graph(struct pen *p, unsigned rows, bool dirty)
{
	const struct view *v = p->v;
	char rate[TEXT_BYTES], peak_words[TEXT_BYTES];
	unsigned left = p->label + 12, width = p->s->cols > left ? p->s->cols - left : 0;
	if (width > VIEW_HISTORY)
		width = VIEW_HISTORY;
	left = p->s->cols - width;
	uint64_t peak = graph_peak(v, width);
	screen_text(p->s, p->row, 0, p->label - 1, STYLE_PLAIN,
		    dirty ? (p->narrow ? "dirt" : "dirtied") : "send");
	uint64_t now = dirty ? v->dirty_rate : v->send_rate;
	/* what is dirtied is known when a round ends */
	screen_format(p->s, p->row, p->label, left, STYLE_BOLD, dirty && !now ? "-" : "%s/s",
		      text_bytes((double)now, rate));
	if (rows > 2)
		screen_format(p->s, p->row + 1, p->label, left, STYLE_DIM, "of %s",
			      text_bytes((double)peak, peak_words));
	unsigned n = v->nsamples < width ? v->nsamples : width;
	for (unsigned i = 0; i < n; i++) {
		const struct view_sample *x = view_sample(v, v->nsamples - n + i);
		screen_column(p->s, p->row, rows, p->s->cols - n + i,
			      (double)(dirty ? x->dirty : x->send) / (double)peak,
			      dirty ? STYLE_DIRTY : STYLE_SEND);
	}
	p->row += rows;
}

static void draw_facts(struct pen *p)
{
	const struct view *v = p->v;
	char words[TEXT_BYTES];
	unsigned col = 0, end = p->s->cols;
	if (v->ended && !strcmp(v->result, "moved"))
		col = screen_format(p->s, p->row, col, end, STYLE_GOOD, "downtime %.0f ms  ", v->downtime_ms);
	else if (v->downtime_predicted && !v->postcopy.known)
		col = screen_format(p->s, p->row, col, end, STYLE_PLAIN, "downtime about %.0f ms  ",
				    v->predicted_downtime_ms);
	if (v->slowed_percent && !v->ended)
		col = screen_format(p->s, p->row, col, end, STYLE_WARN,
				    p->narrow ? "guest -%u %%  " : "guest slowed by %u %%  ",
				    v->slowed_percent);
	if (v->postcopy.known && !v->ended && !v->postcopy.connected)
		col = screen_format(p->s, p->row, col, end, STYLE_WARN, "guest waits for the link  ");
	else if (v->postcopy.known && !v->ended)
		col = screen_format(
			p->s, p->row, col, end, STYLE_PLAIN, "%llu waits for a page, %.1f ms (worst %.1f)  ",
			(unsigned long long)v->postcopy.faults, (double)v->postcopy.median_us / 1000,
			(double)v->postcopy.worst_us / 1000);
	if (v->bandwidth)
		col = screen_format(p->s, p->row, col, end, v->throttled ? STYLE_WARN : STYLE_PLAIN,
				    "limit %s/s%s  ", text_bytes((double)v->bandwidth, words),
				    v->throttled ? " (holds it back)" : "");
	if (v->buffered_bytes)
		screen_format(p->s, p->row, col, end, STYLE_PLAIN, "buffered %s",
			      text_bytes((double)v->buffered_bytes, words));
	p->row++;
}

/* Bytes of text that fit into so many cells, at a space if there is one late enough. */
static size_t fitting(const char *text, unsigned cells)
{
	const char *p = text, *space = NULL;
	unsigned used = 0, take;
	while (*p) {
		const char *before = p;
		if (*p == ' ')
			space = p;
		text_next(&p, &take);
		if (used + take > cells)
			return (size_t)(space && space > text ? space + 1 - text : before - text);
		used += take;
	}
	return (size_t)(p - text);
}

/* Rows that a message takes; draws the last `rows` of them from p->row on if draw. */
static unsigned message_rows(struct pen *p, const struct view_message *m, unsigned skip, bool draw)
{
	char clock[TEXT_BYTES], line[VIEW_TEXT];
	unsigned indent = p->narrow ? 0 : 8, n = 0, width = p->s->cols > indent ? p->s->cols - indent : 1;
	for (const char *at = m->text; *at; n++) {
		size_t len = fitting(at, width);
		if (!len) /* a character wider than the screen */
			break;
		snprintf(line, sizeof line, "%.*s", (int)len, at);
		at += len;
		if (!draw || n < skip)
			continue;
		if (!n && indent)
			screen_text(p->s, p->row, 0, indent - 1, STYLE_DIM, text_clock(m->ms, clock));
		screen_text(p->s, p->row++, indent, p->s->cols, STYLE_PLAIN, line);
	}
	return n;
}

/* The newest at the bottom; of the oldest that is shown perhaps only its end. */
static void draw_messages(struct pen *p, unsigned rows)
{
	const struct view *v = p->v;
	unsigned kept = v->nmessages < VIEW_MESSAGES ? v->nmessages : VIEW_MESSAGES, first = v->nmessages,
		 used = 0, skip = 0;
	while (first > v->nmessages - kept && used < rows)
		used += message_rows(p, view_message(v, --first), 0, false);
	if (used > rows)
		skip = used - rows;
	for (unsigned i = first; i < v->nmessages; i++, skip = 0)
		message_rows(p, view_message(v, i), skip, true);
}

static unsigned label_cells(const struct view *v, bool narrow)
{
	unsigned n = narrow ? 4 : 8;
	for (unsigned i = 0; i < v->ndisks; i++) {
		unsigned cells = text_cells(v->disk[i].id);
		n = cells > n ? cells : n;
	}
	unsigned most = narrow ? 8 : LABEL_MAX;
	return (n < most ? n : most) + 1;
}

static void gap(struct pen *p, struct layout *l)
{
	if (l->gaps) {
		l->gaps--;
		p->row++;
	}
}

static void draw_move(struct pen *p, unsigned rows)
{
	struct layout l = plan(p->v, rows);
	if (l.title)
		draw_title(p);
	if (l.bar)
		draw_bar(p);
	if (l.phases)
		draw_phases(p);
	gap(p, &l);
	if (l.disks)
		draw_disks(p, l.disks);
	if (l.verify)
		draw_verify(p);
	if (l.memory)
		draw_memory(p, l.memory);
	gap(p, &l);
	if (l.send)
		draw_graph(p, l.send, false);
	if (l.dirty)
		draw_graph(p, l.dirty, true);
	if (l.facts)
		draw_facts(p);
	gap(p, &l);
	if (l.messages)
		draw_messages(p, l.messages);
}

/* --- many moves --- */

static void draw_overview_row(struct pen *p, const struct view *v, bool selected)
{
	struct screen *s = p->s;
	char name[160], left[TEXT_BYTES], right[64];
	unsigned half = s->cols * 2 / 5;
	snprintf(name, sizeof name, "%s %s -> %s", selected ? ">" : " ", v->vm, *v->host ? v->host : "?");
	screen_text(s, p->row, 0, half > 1 ? half - 1 : 1, selected ? STYLE_SELECTED : STYLE_PLAIN, name);
	if (v->ended)
		snprintf(right, sizeof right, "%s", v->result);
	else
		snprintf(right, sizeof right, "%s%s%s", p->narrow ? "" : view_phase_name(v),
			 p->narrow ? "" : "  ", v->left_known ? text_clock(v->left_ms, left) : "-:--");
	unsigned end = text_right(s, p->row, s->cols, v->ended ? result_style(v) : STYLE_PLAIN, right);
	unsigned col = screen_format(s, p->row, half, end, STYLE_PLAIN, "%3.0f %% ", v->percent);
	/* equally long for all: the words to the right of it differ */
	unsigned words = p->narrow ? 10 : 22, bar_end = s->cols > words ? s->cols - words : 0;
	screen_bar(s, p->row, col,
		   bar_end + 1 < end ? bar_end
		   : end	     ? end - 1
				     : 0,
		   v->percent / 100, v->ended ? result_style(v) : STYLE_BAR);
	p->row++;
}

static void draw_overview(struct pen *p, const struct ui *ui, unsigned rows)
{
	unsigned first = ui->selected >= rows ? ui->selected - rows + 1 : 0;
	for (unsigned i = first; i < ui->nviews && i < first + rows; i++)
		draw_overview_row(p, ui->view[i], i == ui->selected);
}

/* --- the bottom line --- */

static void draw_keys(struct screen *s, const struct ui *ui)
{
	unsigned row = s->rows - 1, col = 0;
	bool narrow = s->cols < NARROW_COLS;
	if (ui->mode == UI_CONFIRM) {
		screen_format(s, row, 0, s->cols, STYLE_KEYS,
			      narrow ? "Cancel %s? y/n" : "Cancel the move of %s? It stays where it is. y/n",
			      ui->target->vm);
	} else if (ui->mode == UI_BANDWIDTH) {
		col = screen_format(s, row, 0, s->cols, STYLE_KEYS,
				    narrow ? "Bytes/s: "
					   : "Bandwidth of %s in bytes/s (200M, 1G; 0: no limit; Esc): ",
				    ui->target->vm);
		col = screen_text(s, row, col, s->cols, STYLE_KEYS, ui->input);
		s->cursor_row = (int)row;
		s->cursor_col = (int)(col < s->cols ? col : s->cols - 1);
	} else {
		screen_text(
			s, row, 0, s->cols, STYLE_KEYS,
			narrow ? (ui->nviews > 1 ? "c cancel b rate q leave j/k" : "c cancel b rate q leave")
			: ui->nviews > 1
				? "c cancel   b bandwidth   q leave, they go on   up/down another move"
				: "c cancel   b bandwidth   q leave, the move goes on");
	}
	screen_style(s, row, 0, s->cols, STYLE_KEYS);
}

void ui_draw(struct screen *s, const struct ui *ui, uint64_t since_ms, time_t now)
{
	struct pen p = {.s = s, .narrow = s->cols < NARROW_COLS, .now = now};
	unsigned rows = s->rows - 1;
	if (ui->nviews > 1 && rows) {
		unsigned list = rows / 3 ? rows / 3 : 1;
		list = list < ui->nviews ? list : ui->nviews;
		draw_overview(&p, ui, list);
		rows -= list;
		if (rows > 12) {
			rows--;
			p.row++;
		}
	}
	if (ui->selected < ui->nviews) {
		p.v = ui->view[ui->selected];
		p.label = label_cells(p.v, p.narrow);
		p.now_ms = p.v->ended ? p.v->now_ms : p.v->now_ms + since_ms;
		draw_move(&p, rows);
	} else if (rows) {
		screen_text(s, 0, 0, s->cols, STYLE_PLAIN, "no VM of this host is being moved");
	}
	draw_keys(s, ui);
}
