/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

#include "base/cleanup.h"
#include "base/clock.h"
#include "net/conn.h"

#define HOST_MAX_BYTES 256
#define PORT_MAX_BYTES 8

/* "HOST:PORT", "[V6]:PORT"; an empty host is left to the caller. */
static int split_address(const char *address, char host[HOST_MAX_BYTES], char port[PORT_MAX_BYTES],
			 struct error *err)
{
	const char *start = address, *end, *colon;
	unsigned number = 0;

	if (*address == '[') {
		start = address + 1;
		end = strchr(start, ']');
		if (!end || end[1] != ':')
			return error_set(err, EINVAL, "address '%s' is not [IPv6]:PORT", address);
		colon = end + 1;
	} else {
		colon = strrchr(address, ':');
		if (!colon || strchr(address, ':') != colon)
			return error_set(err, EINVAL, "address '%s' is not HOST:PORT or [IPv6]:PORT",
					 address);
		end = colon;
	}
	if ((size_t)(end - start) >= HOST_MAX_BYTES)
		return error_set(err, EINVAL, "address '%.40s...' has too long a host name", address);
	if (!colon[1] || strlen(colon + 1) > 5 || strspn(colon + 1, "0123456789") != strlen(colon + 1))
		return error_set(err, EINVAL, "address '%s' has no port number", address);
	for (const char *p = colon + 1; *p; p++)
		number = number * 10 + (unsigned)(*p - '0');
	if (number > 65535)
		return error_set(err, EINVAL, "address '%s': port %u is above 65535", address, number);
	memcpy(host, start, (size_t)(end - start));
	host[end - start] = '\0';
	snprintf(port, PORT_MAX_BYTES, "%u", number);
	return 0;
}

static int resolve(const char *address, int flags, struct addrinfo **out, struct error *err)
{
	struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM, .ai_flags = flags};
	char host[HOST_MAX_BYTES], port[PORT_MAX_BYTES];
	int ret = split_address(address, host, port, err);

	if (ret < 0)
		return ret;
	if (!*host && !(flags & AI_PASSIVE))
		return error_set(err, EINVAL, "address '%s' has no host", address);
	ret = getaddrinfo(*host ? host : NULL, port, &hints, out);
	if (ret == EAI_SYSTEM)
		return error_errno(err, errno, "address '%s'", address);
	if (ret)
		return error_set(err, EHOSTUNREACH, "address '%s': %s", address, gai_strerror(ret));
	return 0;
}

/* Waits for a connect(2) in progress. 0 or positive errno. */
static int await_connect(int fd, uint64_t deadline_ns)
{
	for (;;) {
		struct pollfd pfd = {.fd = fd, .events = POLLOUT};
		uint64_t now = clock_now_ns();
		int wait_ms = -1, n, soerr = 0;
		socklen_t len = sizeof soerr;

		if (deadline_ns)
			wait_ms = now >= deadline_ns ? 0 : (int)((deadline_ns - now + 999999) / 1000000);
		n = poll(&pfd, 1, wait_ms);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return errno;
		if (n == 0)
			return ETIMEDOUT;
		if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &soerr, &len) < 0)
			return errno;
		return soerr;
	}
}

/* Any port of it. 0 or positive errno. */
static int bind_local(int fd, const struct addrinfo *local, int family)
{
	struct sockaddr_storage addr;

	while (local && local->ai_family != family)
		local = local->ai_next;
	if (!local)
		return 0;
	memcpy(&addr, local->ai_addr, local->ai_addrlen);
	if (family == AF_INET)
		((struct sockaddr_in *)&addr)->sin_port = 0;
	else if (family == AF_INET6)
		((struct sockaddr_in6 *)&addr)->sin6_port = 0;
	return bind(fd, (struct sockaddr *)&addr, local->ai_addrlen) == 0 ? 0 : errno;
}

static int connect_one(const struct addrinfo *ai, const struct addrinfo *local, unsigned timeout_ms,
		       uint64_t deadline_ns, int *out)
{
	CLEANUP_FD int fd = socket(ai->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	int one = 1, e;

	if (fd < 0)
		return errno;
	(void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	if (timeout_ms)
		(void)setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &timeout_ms, sizeof timeout_ms);
	e = bind_local(fd, local, ai->ai_family);
	if (e)
		return e;
	if (connect(fd, ai->ai_addr, ai->ai_addrlen) < 0) {
		if (errno != EINPROGRESS && errno != EINTR)
			return errno;
		e = await_connect(fd, deadline_ns);
		if (e)
			return e;
	}
	*out = steal_fd(&fd);
	return 0;
}

int net_connect(const char *address, unsigned timeout_ms, struct error *err)
{
	return net_connect_from("", address, timeout_ms, err);
}

int net_connect_from(const char *local, const char *address, unsigned timeout_ms, struct error *err)
{
	uint64_t deadline = timeout_ms ? clock_now_ns() + (uint64_t)timeout_ms * 1000000 : 0;
	struct addrinfo *list = NULL, *own = NULL;
	int fd = -1, e = EHOSTUNREACH;
	int ret = *local ? resolve(local, 0, &own, err) : 0;

	if (ret == 0)
		ret = resolve(address, 0, &list, err);
	for (struct addrinfo *ai = list; ret == 0 && ai && fd < 0; ai = ai->ai_next)
		e = connect_one(ai, own, timeout_ms, deadline, &fd);
	if (own)
		freeaddrinfo(own);
	if (ret < 0)
		return ret;
	freeaddrinfo(list);
	if (fd >= 0)
		return fd;
	if (e == ETIMEDOUT)
		return error_set(err, e, "cannot connect to %s: no answer within %u ms", address, timeout_ms);
	return *local ? error_errno(err, e, "cannot connect to %s from %s", address, local)
		      : error_errno(err, e, "cannot connect to %s", address);
}

int net_listen(const char *address, int backlog, struct error *err)
{
	struct addrinfo *list = NULL;
	int e = EADDRNOTAVAIL;
	int ret = resolve(address, AI_PASSIVE, &list, err);

	if (ret < 0)
		return ret;
	for (struct addrinfo *ai = list; ai; ai = ai->ai_next) {
		CLEANUP_FD int fd = socket(ai->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
		int one = 1;

		if (fd >= 0 && setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) == 0 &&
		    bind(fd, ai->ai_addr, ai->ai_addrlen) == 0 && listen(fd, backlog) == 0) {
			freeaddrinfo(list);
			return steal_fd(&fd);
		}
		e = errno;
	}
	freeaddrinfo(list);
	return error_errno(err, e, "cannot listen on %s", address);
}
