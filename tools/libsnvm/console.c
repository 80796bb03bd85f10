/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <termios.h>
#include <unistd.h>

#include "host/client.h"
#include "host/exit.h"
#include "tools/libsnvm/snvm.h"

#define CALL_TIMEOUT_MS 30000
#define LEAVE_KEY	0x1d /* ^] */

static struct termios saved;
static volatile sig_atomic_t ended;

static void on_signal(int sig)
{
	ended = 1;
}

static bool make_raw(void)
{
	if (!isatty(STDIN_FILENO) || tcgetattr(STDIN_FILENO, &saved) < 0)
		return false;
	struct termios raw = saved;
	cfmakeraw(&raw);
	struct sigaction sa = {.sa_handler = on_signal};
	sigaction(SIGTERM, &sa, NULL);
	sigaction(SIGHUP, &sa, NULL);
	return tcsetattr(STDIN_FILENO, TCSANOW, &raw) == 0;
}

static bool copy_all(int to, const char *buf, size_t len)
{
	for (size_t at = 0; at < len;) {
		ssize_t n = write(to, buf + at, len - at);
		if (n > 0)
			at += (size_t)n;
		else if (errno == EAGAIN)
			poll(&(struct pollfd){.fd = to, .events = POLLOUT}, 1, 1000);
		else if (errno != EINTR)
			return false;
	}
	return true;
}

/* Until ^], the end of the VM, or (not on a terminal) the end of the input and of what is still to come. */
static int talk(int fd, bool raw)
{
	char buf[4096];
	bool input = true;
	while (!ended) {
		struct pollfd p[2] = {{.fd = fd, .events = POLLIN},
				      {.fd = input ? STDIN_FILENO : -1, .events = POLLIN}};
		if (poll(p, 2, -1) < 0 && errno != EINTR)
			return EXIT_FAILED;
		if (p[0].revents) {
			ssize_t n = read(fd, buf, sizeof buf);
			if (n == 0 || (n < 0 && errno != EINTR && errno != EAGAIN))
				return 0;
			if (n > 0 && !copy_all(STDOUT_FILENO, buf, (size_t)n))
				return 0;
		}
		if (p[1].revents) {
			ssize_t n = read(STDIN_FILENO, buf, sizeof buf);
			char *leave = n > 0 && raw ? memchr(buf, LEAVE_KEY, (size_t)n) : NULL;
			if (leave)
				return copy_all(fd, buf, (size_t)(leave - buf)), 0;
			if (n <= 0)
				input = false;
			else if (!copy_all(fd, buf, (size_t)n))
				return 0;
		}
	}
	return 0;
}

int snvm_console(const struct snvm *s, int argc, char **argv)
{
	static const struct option none[] = {{0}};
	if (getopt_long(argc, argv, "", none, NULL) != -1)
		return client_option_error("snvm", argv);
	const char *name = snvm_one_name(argc, argv, optind);
	if (!name)
		return EXIT_USAGE;
	json_t *reply = NULL;
	int status = client_request("snvm", s->control, json_pack("{s:s, s:s}", "cmd", "console", "vm", name),
				    &reply, CALL_TIMEOUT_MS);
	if (status)
		return status;
	struct error err = ERROR_INIT;
	struct jsonl *j = NULL;
	const char *path = json_string_value(json_object_get(reply, "path"));
	int rc = jsonl_connect(path ? path : "", 5000, &j, &err);
	json_decref(reply);
	if (rc < 0) {
		fprintf(stderr, "snvm: console of VM %s: %s\n", name, err.message);
		return EXIT_FAILED;
	}
	bool raw = make_raw();
	if (raw)
		fprintf(stderr, "connected to VM %s; ^] leaves\r\n", name);
	status = talk(jsonl_fd(j), raw);
	if (raw) {
		tcsetattr(STDIN_FILENO, TCSANOW, &saved);
		fputs("\nleft the console\n", stderr);
	}
	jsonl_close(j);
	return status;
}
