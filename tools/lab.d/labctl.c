/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The lab's control path: runs commands on a lab host.
 *
 *   labctl agent PORT                 on the host; serves every connection in a process of its own
 *   labctl exec ADDRESS PORT CMD...   from outside; like ssh: stdin, stdout, stderr and exit status are the
 * command's labctl wait ADDRESS PORT SECONDS  until the agent answers
 *
 * Frames, both ways: one byte type, four bytes big-endian length, payload.
 *   client: 'A' the argument vector, NUL-terminated strings; 'I' stdin data; 'E' end of stdin
 *   agent:  'H' hello; 'O' stdout data; 'R' stderr data; 'X' one byte exit status, last frame
 * The command's process group gets SIGHUP when the client goes away. Its exit ends the session even where a
 * daemon that it started still holds stdout, so that starting one does not hang the caller.
 *
 * The agent trusts whoever can connect: it listens on a point-to-point interface inside the lab's own
 * namespace.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { FRAME_HEAD = 5, FRAME_MAX = 65536, ARGS_MAX = 1024 };

static int write_all(int fd, const void *data, size_t len)
{
	const char *p = data;
	while (len > 0) {
		ssize_t n = write(fd, p, len);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN) {
			struct pollfd pfd = {.fd = fd, .events = POLLOUT};
			poll(&pfd, 1, -1);
			continue;
		}
		if (n <= 0)
			return -1;
		p += n;
		len -= (size_t)n;
	}
	return 0;
}

static int read_all(int fd, void *data, size_t len)
{
	char *p = data;
	while (len > 0) {
		ssize_t n = read(fd, p, len);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return -1;
		p += n;
		len -= (size_t)n;
	}
	return 0;
}

static int send_frame(int fd, char type, const void *data, uint32_t len)
{
	unsigned char head[FRAME_HEAD] = {(unsigned char)type, (unsigned char)(len >> 24),
					  (unsigned char)(len >> 16), (unsigned char)(len >> 8),
					  (unsigned char)len};
	if (write_all(fd, head, sizeof head) < 0)
		return -1;
	return len > 0 ? write_all(fd, data, len) : 0;
}

/* Reads one frame into buf (FRAME_MAX bytes). Returns its type, or 0 at the end of the connection or on
 * garbage. */
static char recv_frame(int fd, char *buf, uint32_t *len)
{
	unsigned char head[FRAME_HEAD];
	if (read_all(fd, head, sizeof head) < 0)
		return 0;
	uint32_t n = (uint32_t)head[1] << 24 | (uint32_t)head[2] << 16 | (uint32_t)head[3] << 8 | head[4];
	if (n > FRAME_MAX || (n > 0 && read_all(fd, buf, n) < 0))
		return 0;
	*len = n;
	return (char)head[0];
}

static void set_keepalive(int fd)
{
	int on = 1, idle = 5, interval = 2, count = 3;
	setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof count);
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

/* Forwards what the pipe holds. Returns false once it is at its end. */
static bool forward(int from, int sock, char type)
{
	static char buf[FRAME_MAX];
	ssize_t n = read(from, buf, sizeof buf);
	if (n < 0 && (errno == EINTR || errno == EAGAIN))
		return true;
	if (n <= 0)
		return false;
	return send_frame(sock, type, buf, (uint32_t)n) == 0;
}

static void drain(int from, int sock, char type)
{
	struct pollfd pfd = {.fd = from, .events = POLLIN};
	while (poll(&pfd, 1, 0) == 1 && forward(from, sock, type))
		;
}

static pid_t start_command(char *args, uint32_t len, int in[2], int out[2], int err[2])
{
	char *argv[ARGS_MAX + 1];
	int argc = 0;
	if (len == 0 || args[len - 1] != '\0')
		return -1;
	for (char *p = args; p < args + len; p += strlen(p) + 1) {
		if (argc == ARGS_MAX)
			return -1;
		argv[argc++] = p;
	}
	argv[argc] = NULL;
	pid_t pid = fork();
	if (pid != 0)
		return pid;
	setsid();
	dup2(in[0], 0);
	dup2(out[1], 1);
	dup2(err[1], 2);
	for (int fd = 3; fd < 64; fd++)
		close(fd);
	sigset_t none;
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGPIPE, SIG_DFL);
	execvp(argv[0], argv);
	fprintf(stderr, "%s: %s\n", argv[0], strerror(errno));
	_exit(errno == ENOENT ? 127 : 126);
}

/* One session; the process ends with it. */
static void serve(int sock)
{
	static char buf[FRAME_MAX];
	uint32_t len = 0;
	int in[2], out[2], err[2];
	set_keepalive(sock);
	if (send_frame(sock, 'H', NULL, 0) < 0 || recv_frame(sock, buf, &len) != 'A')
		_exit(1);
	if (pipe(in) < 0 || pipe(out) < 0 || pipe(err) < 0)
		_exit(1);
	sigset_t chld;
	sigemptyset(&chld);
	sigaddset(&chld, SIGCHLD);
	sigprocmask(SIG_BLOCK, &chld, NULL);
	int sigfd = signalfd(-1, &chld, SFD_CLOEXEC);
	pid_t pid = start_command(buf, len, in, out, err);
	close(in[0]);
	close(out[1]);
	close(err[1]);
	if (pid < 0)
		_exit(1);
	/* The command may not read its stdin: what it has not taken waits here, not in a blocking write. */
	fcntl(in[1], F_SETFL, O_NONBLOCK);
	char *pending = NULL;
	uint32_t pending_len = 0, pending_done = 0;
	bool stdin_ended = false, out_open = true, err_open = true;
	char status = (char)255;
	for (;;) {
		struct pollfd pfd[5] = {
			{.fd = sigfd, .events = POLLIN},
			{.fd = pending == NULL ? sock : -1, .events = POLLIN},
			{.fd = out_open ? out[0] : -1, .events = POLLIN},
			{.fd = err_open ? err[0] : -1, .events = POLLIN},
			{.fd = pending != NULL ? in[1] : -1, .events = POLLOUT},
		};
		if (poll(pfd, 5, -1) < 0 && errno != EINTR)
			break;
		if (pfd[2].revents != 0)
			out_open = forward(out[0], sock, 'O');
		if (pfd[3].revents != 0)
			err_open = forward(err[0], sock, 'R');
		if (pfd[4].revents != 0) {
			ssize_t n = write(in[1], pending + pending_done, pending_len - pending_done);
			if (n > 0)
				pending_done += (uint32_t)n;
			if ((n < 0 && errno != EAGAIN) || pending_done == pending_len) {
				if (n < 0) {
					close(in[1]); /* nobody reads any more; later input is dropped */
					in[1] = -1;
				}
				free(pending);
				pending = NULL;
			}
		}
		if (pfd[1].revents != 0) {
			char type = recv_frame(sock, buf, &len);
			if (type == 'I' && in[1] >= 0 && !stdin_ended && len > 0) {
				pending = malloc(len);
				if (pending == NULL)
					_exit(1);
				memcpy(pending, buf, len);
				pending_len = len;
				pending_done = 0;
			} else if (type == 'E') {
				stdin_ended = true;
				if (in[1] >= 0)
					close(in[1]);
				in[1] = -1;
			} else if (type != 'I') {
				kill(-pid, SIGHUP);
				_exit(1);
			}
		}
		if (pfd[0].revents != 0) {
			struct signalfd_siginfo si;
			int ws;
			if (read(sigfd, &si, sizeof si) < 0)
				break;
			if (waitpid(pid, &ws, WNOHANG) == pid) {
				status = (char)(WIFEXITED(ws) ? WEXITSTATUS(ws) : 128 + WTERMSIG(ws));
				break;
			}
		}
	}
	if (out_open)
		drain(out[0], sock, 'O');
	if (err_open)
		drain(err[0], sock, 'R');
	send_frame(sock, 'X', &status, 1);
	/* The client closes first, so that no reset overtakes the last frame. */
	shutdown(sock, SHUT_WR);
	while (read(sock, buf, sizeof buf) > 0)
		;
	_exit(0);
}

static int run_agent(uint16_t port)
{
	int s = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1;
	struct sockaddr_in sa = {.sin_family = AF_INET, .sin_port = htons(port)};
	setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	if (s < 0 || bind(s, (struct sockaddr *)&sa, sizeof sa) < 0 || listen(s, 128) < 0) {
		perror("labctl agent");
		return 1;
	}
	signal(SIGCHLD, SIG_IGN);
	signal(SIGPIPE, SIG_IGN);
	for (;;) {
		int c = accept4(s, NULL, NULL, SOCK_CLOEXEC);
		if (c < 0)
			continue;
		pid_t pid = fork();
		if (pid == 0) {
			close(s);
			signal(SIGCHLD, SIG_DFL);
			serve(c);
		}
		close(c);
	}
}

/* Connects and reads the hello; -1 when there is no agent within timeout_ms. */
static int connect_agent(const char *address, uint16_t port, int timeout_ms)
{
	struct sockaddr_in sa = {.sin_family = AF_INET, .sin_port = htons(port)};
	if (inet_pton(AF_INET, address, &sa.sin_addr) != 1)
		return -1;
	int s = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (s < 0)
		return -1;
	struct pollfd pfd = {.fd = s, .events = POLLOUT};
	char buf[FRAME_HEAD];
	if (connect(s, (struct sockaddr *)&sa, sizeof sa) < 0 && errno != EINPROGRESS)
		goto fail;
	int so_error = 0;
	socklen_t sl = sizeof so_error;
	if (poll(&pfd, 1, timeout_ms) != 1 || getsockopt(s, SOL_SOCKET, SO_ERROR, &so_error, &sl) < 0 ||
	    so_error != 0)
		goto fail;
	pfd.events = POLLIN;
	if (poll(&pfd, 1, timeout_ms) != 1)
		goto fail;
	fcntl(s, F_SETFL, 0);
	if (read_all(s, buf, sizeof buf) < 0 || buf[0] != 'H')
		goto fail;
	set_keepalive(s);
	return s;
fail:
	close(s);
	return -1;
}

/* Copies output until the exit frame; returns the exit status, 255 when the connection is lost. */
static int relay_output(int s)
{
	static char buf[FRAME_MAX];
	uint32_t len;
	for (;;) {
		switch (recv_frame(s, buf, &len)) {
		case 'O':
			if (write_all(1, buf, len) < 0)
				return 255;
			break;
		case 'R':
			if (write_all(2, buf, len) < 0)
				return 255;
			break;
		case 'X':
			return len == 1 ? (unsigned char)buf[0] : 255;
		default:
			fprintf(stderr, "labctl: connection lost\n");
			return 255;
		}
	}
}

static int run_exec(const char *address, uint16_t port, char **argv)
{
	static char buf[FRAME_MAX];
	uint32_t len = 0;
	for (; *argv != NULL; argv++) {
		size_t n = strlen(*argv) + 1;
		if (n > FRAME_MAX - len) {
			fprintf(stderr, "labctl: the command line is longer than %d bytes\n", FRAME_MAX);
			return 255;
		}
		memcpy(buf + len, *argv, n);
		len += (uint32_t)n;
	}
	int s = connect_agent(address, port, 5000);
	if (s < 0) {
		fprintf(stderr, "labctl: no agent answers at %s port %u\n", address, port);
		return 255;
	}
	signal(SIGPIPE, SIG_IGN);
	if (send_frame(s, 'A', buf, len) < 0) {
		fprintf(stderr, "labctl: connection lost\n");
		return 255;
	}
	/* A process of its own sends stdin: were one process to block in sending, nobody would read the
	 * output that the agent may be blocked in sending, and both would wait for ever. */
	pid_t sender = fork();
	if (sender < 0)
		return 255;
	if (sender == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		ssize_t n;
		while ((n = read(0, buf, 32768)) > 0 || (n < 0 && errno == EINTR)) {
			if (n > 0 && send_frame(s, 'I', buf, (uint32_t)n) < 0)
				_exit(1);
		}
		send_frame(s, 'E', NULL, 0);
		_exit(0);
	}
	int status = relay_output(s);
	kill(sender, SIGKILL);
	waitpid(sender, NULL, 0);
	return status;
}

static int run_wait(const char *address, uint16_t port, int seconds)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	for (time_t end = now.tv_sec + seconds; now.tv_sec <= end; clock_gettime(CLOCK_MONOTONIC, &now)) {
		/* Short: a SYN sent before the host's interface is up is only repeated after a second. */
		int s = connect_agent(address, port, 200);
		if (s >= 0) {
			close(s);
			return 0;
		}
		nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
	}
	fprintf(stderr, "labctl: no agent at %s port %u within %d s\n", address, port, seconds);
	return 1;
}

static int print_tsc_khz(void)
{
	/* Of several short measurements the median: one may be interrupted between the two clocks. */
	uint64_t khz[9];
	for (int i = 0; i < 9; i++) {
		struct timespec a, b;
		clock_gettime(CLOCK_MONOTONIC_RAW, &a);
		uint64_t tsc = __builtin_ia32_rdtsc();
		nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
		clock_gettime(CLOCK_MONOTONIC_RAW, &b);
		tsc = __builtin_ia32_rdtsc() - tsc;
		khz[i] = tsc * 1000000 /
			 (uint64_t)((b.tv_sec - a.tv_sec) * 1000000000 + b.tv_nsec - a.tv_nsec);
		for (int j = i; j > 0 && khz[j] < khz[j - 1]; j--) {
			uint64_t t = khz[j];
			khz[j] = khz[j - 1];
			khz[j - 1] = t;
		}
	}
	printf("%llu\n", (unsigned long long)khz[4]);
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 3 && strcmp(argv[1], "agent") == 0)
		return run_agent((uint16_t)atoi(argv[2]));
	if (argc == 2 && strcmp(argv[1], "tsc-khz") == 0)
		return print_tsc_khz();
	if (argc >= 5 && strcmp(argv[1], "exec") == 0)
		return run_exec(argv[2], (uint16_t)atoi(argv[3]), argv + 4);
	if (argc == 5 && strcmp(argv[1], "wait") == 0)
		return run_wait(argv[2], (uint16_t)atoi(argv[3]), atoi(argv[4]));
	fprintf(stderr, "usage: labctl agent PORT | exec ADDRESS PORT CMD... | wait ADDRESS PORT SECONDS | "
			"tsc-khz\n");
	return 2;
}
