/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/storage-model/wire.h"

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"

static void tcp_pair(int sv[2])
{
	struct sockaddr_in sa = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t len = sizeof sa;
	int one = 1, l = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	ck_assert_int_ge(l, 0);
	ck_assert_int_eq(bind(l, (struct sockaddr *)&sa, sizeof sa), 0);
	ck_assert_int_eq(listen(l, 1), 0);
	ck_assert_int_eq(getsockname(l, (struct sockaddr *)&sa, &len), 0);
	sv[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	ck_assert_int_eq(connect(sv[0], (struct sockaddr *)&sa, sizeof sa), 0);
	sv[1] = accept4(l, NULL, NULL, SOCK_CLOEXEC);
	ck_assert_int_ge(sv[1], 0);
	for (int i = 0; i < 2; i++)
		setsockopt(sv[i], IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	close(l);
}

static void make_pair(bool tcp, int sv[2])
{
	if (tcp)
		tcp_pair(sv);
	else
		ck_assert_int_eq(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sv), 0);
}

/* --- the thread --- */

struct moment {
	bool silent[2];
	uint64_t bytes_per_ms, delay_ns;
	uint64_t now;
};

static void cut(struct wire *w)
{
	for (int i = 0; i < 2; i++) {
		shutdown(w->ends[i], SHUT_RDWR);
		w->pipes[i].from_closed = w->pipes[i].to_closed = true;
		w->pipes[i].len = 0;
	}
}

static void take_in(struct wire *w, int way, const struct moment *at)
{
	struct wire_pipe *p = &w->pipes[way];
	size_t tail = (p->head + p->len) % WIRE_BUFFER_BYTES;
	size_t room = WIRE_BUFFER_BYTES - p->len;
	if (tail + room > WIRE_BUFFER_BYTES)
		room = WIRE_BUFFER_BYTES - tail;
	ssize_t n = recv(w->ends[way], p->buf + tail, room, MSG_DONTWAIT);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (n <= 0) {
		p->from_closed = true;
		return;
	}
	if (!p->len)
		p->ready_ns = at->now + at->delay_ns;
	p->len += (size_t)n;
}

/* How much may pass before a fault that is planned; *fault when it is due. */
static size_t up_to_fault(struct wire *w, size_t n, bool *is_cut)
{
	pthread_mutex_lock(&w->lock);
	if (w->silence_after && n >= w->silence_after) {
		n = w->silence_after;
		w->silence_after = 0;
		w->silent[WIRE_DOWN] = true;
		w->silent[WIRE_UP] = w->silence_both;
	} else if (w->silence_after) {
		w->silence_after -= n;
	}
	if (w->cut_after && n >= w->cut_after) {
		n = w->cut_after;
		w->cut_after = 0;
		*is_cut = true;
	} else if (w->cut_after) {
		w->cut_after -= n;
	}
	pthread_mutex_unlock(&w->lock);
	return n;
}

static void give_out(struct wire *w, int way, const struct moment *at)
{
	struct wire_pipe *p = &w->pipes[way];
	size_t n = p->len;
	bool is_cut = false;
	if (p->head + n > WIRE_BUFFER_BYTES)
		n = WIRE_BUFFER_BYTES - p->head;
	if (at->bytes_per_ms && n > at->bytes_per_ms)
		n = at->bytes_per_ms;
	if (way == WIRE_UP)
		n = up_to_fault(w, n, &is_cut);
	ssize_t sent = send(w->ends[!way], p->buf + p->head, n, MSG_DONTWAIT | MSG_NOSIGNAL);
	if (sent > 0) {
		p->head = (p->head + (size_t)sent) % WIRE_BUFFER_BYTES;
		p->len -= (size_t)sent;
		if (at->bytes_per_ms)
			p->next_ns = at->now + (uint64_t)sent * 1000000 / at->bytes_per_ms;
	} else if (sent < 0 && errno != EAGAIN && errno != EINTR) {
		p->to_closed = true;
		p->len = 0;
	}
	if (is_cut)
		cut(w);
}

static bool may_give(const struct wire_pipe *p, int way, const struct moment *at)
{
	return p->len && !p->to_closed && !at->silent[way] && p->ready_ns <= at->now && p->next_ns <= at->now;
}

static bool look(struct wire *w, struct moment *at)
{
	pthread_mutex_lock(&w->lock);
	memcpy(at->silent, w->silent, sizeof at->silent);
	at->bytes_per_ms = w->bytes_per_ms;
	at->delay_ns = w->delay_ns;
	bool quit = w->quit;
	pthread_mutex_unlock(&w->lock);
	at->now = clock_now_ns();
	return !quit;
}

static void pass_end_on(struct wire *w, int way, const struct moment *at)
{
	struct wire_pipe *p = &w->pipes[way];
	if (p->from_closed && !p->len && !p->to_closed && !at->silent[way]) {
		shutdown(w->ends[!way], SHUT_WR);
		p->to_closed = true;
	}
}

static void *wire_main(void *arg)
{
	struct wire *w = arg;
	struct moment at;
	while (look(w, &at)) {
		struct pollfd fds[3] = {{.fd = w->wake[0], .events = POLLIN}, {.fd = -1}, {.fd = -1}};
		int wait_ms = -1;
		for (int way = 0; way < 2; way++) {
			struct wire_pipe *p = &w->pipes[way];
			pass_end_on(w, way, &at);
			if (!p->from_closed && p->len < WIRE_BUFFER_BYTES)
				fds[1 + way].events |= POLLIN;
			if (may_give(p, way, &at))
				fds[1 + !way].events |= POLLOUT;
			else if (p->len && !at.silent[way])
				wait_ms = 1; /* for the delay or the rate */
		}
		for (int i = 0; i < 2; i++)
			if (fds[1 + i].events)
				fds[1 + i].fd = w->ends[i];
		if (poll(fds, 3, wait_ms) < 0)
			continue;
		if (fds[0].revents) {
			char bytes[64];
			(void)!read(w->wake[0], bytes, sizeof bytes);
		}
		at.now = clock_now_ns();
		for (int way = 0; way < 2; way++) {
			if (fds[1 + way].events & POLLIN && fds[1 + way].revents)
				take_in(w, way, &at);
			if (fds[1 + !way].events & POLLOUT && fds[1 + !way].revents)
				give_out(w, way, &at);
		}
	}
	return NULL;
}

/* --- control --- */

static void wake(struct wire *w)
{
	pthread_mutex_unlock(&w->lock);
	(void)!write(w->wake[1], "", 1);
}

struct wire *wire_create(bool tcp, int *client_fd, int *server_fd)
{
	struct wire *w = calloc(1, sizeof *w);
	int client[2], server[2];
	ck_assert_ptr_nonnull(w);
	make_pair(tcp, client);
	make_pair(tcp, server);
	ck_assert_int_eq(pipe2(w->wake, O_CLOEXEC | O_NONBLOCK), 0);
	w->ends[0] = client[1];
	w->ends[1] = server[1];
	for (int i = 0; i < 2; i++)
		ck_assert_ptr_nonnull(w->pipes[i].buf = malloc(WIRE_BUFFER_BYTES));
	pthread_mutex_init(&w->lock, NULL);
	ck_assert_int_eq(pthread_create(&w->thread, NULL, wire_main, w), 0);
	*client_fd = client[0];
	*server_fd = server[0];
	return w;
}

void wire_pace(struct wire *w, uint64_t bytes_per_ms, unsigned delay_us)
{
	pthread_mutex_lock(&w->lock);
	w->bytes_per_ms = bytes_per_ms;
	w->delay_ns = delay_us * UINT64_C(1000);
	wake(w);
}

void wire_silence(struct wire *w, bool up, bool down)
{
	pthread_mutex_lock(&w->lock);
	w->silent[WIRE_UP] = up;
	w->silent[WIRE_DOWN] = down;
	wake(w);
}

void wire_cut_after(struct wire *w, uint64_t bytes)
{
	pthread_mutex_lock(&w->lock);
	w->cut_after = bytes;
	wake(w);
}

void wire_silence_after(struct wire *w, uint64_t bytes, bool both)
{
	pthread_mutex_lock(&w->lock);
	w->silence_after = bytes;
	w->silence_both = both;
	wake(w);
}

void wire_free(struct wire *w)
{
	pthread_mutex_lock(&w->lock);
	w->quit = true;
	wake(w);
	pthread_join(w->thread, NULL);
	for (int i = 0; i < 2; i++) {
		close(w->ends[i]);
		close(w->wake[i]);
		free(w->pipes[i].buf);
	}
	pthread_mutex_destroy(&w->lock);
	free(w);
}
