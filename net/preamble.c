/* SPDX-License-Identifier: Apache-2.0 */
#include "net/preamble.h"

#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>

#include "base/cleanup.h"
#include "base/clock.h"

#define PREFIX "SNMIGRATE/1 "

static const char *const channel_names[] = {[CHANNEL_CONTROL] = "control",
					    [CHANNEL_MEMORY] = "memory",
					    [CHANNEL_DISK] = "disk",
					    [CHANNEL_PAIR] = "pair"};

const char *channel_name(enum channel channel)
{
	return (size_t)channel < ARRAY_SIZE(channel_names) ? channel_names[channel] : "unknown";
}

static bool is_word(const char *p, size_t len, const char *word)
{
	return strlen(word) == len && memcmp(p, word, len) == 0;
}

static bool token_valid(enum channel channel, const char *p, size_t len)
{
	if (channel == CHANNEL_CONTROL)
		return is_word(p, len, PREAMBLE_BY_CA) || is_word(p, len, PREAMBLE_BY_PAIRING);
	if (channel == CHANNEL_PAIR)
		return is_word(p, len, "-");
	if (len != TOKEN_HEX_CHARS)
		return false;
	for (size_t i = 0; i < len; i++) {
		if (!(p[i] >= '0' && p[i] <= '9') && !(p[i] >= 'a' && p[i] <= 'f'))
			return false;
	}
	return true;
}

int preamble_parse(const char *line, size_t len, struct preamble *out, struct error *err)
{
	const size_t prefix_len = sizeof PREFIX - 1;
	const char *channel, *space, *token;
	size_t channel_len, token_len;
	unsigned i;

	if (len >= PREAMBLE_MAX_BYTES)
		return error_set(err, EPROTO, "preamble is longer than %u bytes", PREAMBLE_MAX_BYTES);
	if (len < prefix_len || memcmp(line, PREFIX, prefix_len) != 0) {
		if (len > 10 && memcmp(line, "SNMIGRATE/", 10) == 0 && line[10] != '1')
			return error_set(err, EPROTO,
					 "preamble is of another version (this side speaks SNMIGRATE/1)");
		return error_set(err, EPROTO, "preamble does not begin with SNMIGRATE/1");
	}
	channel = line + prefix_len;
	space = memchr(channel, ' ', len - prefix_len);
	if (!space)
		return error_set(err, EPROTO, "preamble has no token");
	channel_len = (size_t)(space - channel);
	token = space + 1;
	token_len = len - (size_t)(token - line);
	for (i = 0; i < ARRAY_SIZE(channel_names); i++) {
		if (is_word(channel, channel_len, channel_names[i]))
			break;
	}
	if (i == ARRAY_SIZE(channel_names))
		return error_set(err, EPROTO,
				 "preamble names no known channel (control, memory, disk or pair)");
	if (!token_valid((enum channel)i, token, token_len))
		return error_set(err, EPROTO, "preamble of a %s channel has a malformed token",
				 channel_names[i]);
	*out = (struct preamble){.channel = (enum channel)i};
	memcpy(out->token, token, token_len);
	return 0;
}

static int wait_fd(int fd, short events, uint64_t deadline_ns, struct error *err)
{
	for (;;) {
		struct pollfd pfd = {.fd = fd, .events = events};
		uint64_t now = clock_now_ns();
		int n, wait_ms = -1;

		if (deadline_ns && now >= deadline_ns)
			return error_set(err, ETIMEDOUT, "preamble timed out");
		if (deadline_ns)
			wait_ms = (int)((deadline_ns - now + 999999) / 1000000);
		n = poll(&pfd, 1, wait_ms);
		if (n > 0)
			return 0;
		if (n < 0 && errno != EINTR)
			return error_errno(err, errno, "preamble: poll");
	}
}

static int consume(int fd, char *buf, size_t len, struct error *err)
{
	ssize_t n;

	do {
		n = recv(fd, buf, len, MSG_DONTWAIT);
	} while (n < 0 && errno == EINTR);
	if (n < 0)
		return error_errno(err, errno, "preamble: read");
	if ((size_t)n != len) /* it was peeked: somebody else reads this socket */
		return error_set(err, EIO, "preamble: short read of peeked data");
	return 0;
}

int preamble_read(int fd, unsigned timeout_ms, struct preamble *out, struct error *err)
{
	uint64_t deadline = timeout_ms ? clock_now_ns() + (uint64_t)timeout_ms * 1000000 : 0;
	char line[PREAMBLE_MAX_BYTES];
	size_t len = 0;

	for (;;) {
		ssize_t n = recv(fd, line + len, sizeof line - len, MSG_PEEK | MSG_DONTWAIT);
		char *newline;
		size_t take;
		int ret;

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
			ret = wait_fd(fd, POLLIN, deadline, err);
			if (ret == -ETIMEDOUT)
				return error_set(err, ETIMEDOUT, "no preamble line within %u ms", timeout_ms);
			if (ret < 0)
				return ret;
			continue;
		}
		if (n < 0)
			return error_errno(err, errno, "preamble: read");
		if (n == 0 && !len)
			return error_set(err, ENODATA, "the peer closed the connection without a preamble");
		if (n == 0)
			return error_set(err, EPROTO, "the peer closed the connection within the preamble");
		newline = memchr(line + len, '\n', (size_t)n);
		/* All peeked bytes up to a newline belong to the line: taking them keeps poll honest. */
		take = newline ? (size_t)(newline - (line + len)) + 1 : (size_t)n;
		ret = consume(fd, line + len, take, err);
		if (ret < 0)
			return ret;
		len += take;
		if (newline)
			return preamble_parse(line, len - 1, out, err);
		/* Strangers (a TLS hello, a scanner) are told early. */
		if (memcmp(line, PREFIX, len < sizeof PREFIX - 1 ? len : sizeof PREFIX - 1) != 0)
			return preamble_parse(line, len < PREAMBLE_MAX_BYTES ? len : PREAMBLE_MAX_BYTES - 1,
					      out, err);
		if (len == sizeof line)
			return error_set(err, EPROTO, "preamble is longer than %u bytes", PREAMBLE_MAX_BYTES);
		if (deadline && clock_now_ns() >= deadline)
			return error_set(err, ETIMEDOUT, "no preamble line within %u ms", timeout_ms);
	}
}

int preamble_write(int fd, const struct preamble *pre, unsigned timeout_ms, struct error *err)
{
	uint64_t deadline = timeout_ms ? clock_now_ns() + (uint64_t)timeout_ms * 1000000 : 0;
	char line[PREAMBLE_MAX_BYTES];
	struct preamble check;
	size_t len, done = 0;
	int ret;

	len = (size_t)snprintf(line, sizeof line, PREFIX "%s %.*s\n", channel_name(pre->channel),
			       TOKEN_HEX_CHARS, pre->token);
	ret = preamble_parse(line, len - 1, &check, err);
	if (ret < 0)
		return ret;
	while (done < len) {
		ssize_t n = send(fd, line + done, len - done, MSG_DONTWAIT | MSG_NOSIGNAL);

		if (n >= 0) {
			done += (size_t)n;
			continue;
		}
		if (errno == EINTR)
			continue;
		if (errno != EAGAIN && errno != EWOULDBLOCK)
			return error_errno(err, errno, "preamble: write");
		ret = wait_fd(fd, POLLOUT, deadline, err);
		if (ret < 0)
			return ret;
	}
	return 0;
}

int token_generate(char *token, struct error *err)
{
	uint8_t raw[TOKEN_HEX_CHARS / 2];

	if (getrandom(raw, sizeof raw, 0) != (ssize_t)sizeof raw)
		return error_errno(err, errno, "getrandom");
	for (size_t i = 0; i < sizeof raw; i++)
		snprintf(token + 2 * i, 3, "%02x", raw[i]);
	return 0;
}
