/* SPDX-License-Identifier: Apache-2.0 */
/*
 * counter PORT INTERVAL-MS
 * Runs in the guest. Counts from 1 on every TCP connection, a line at a time, for as long as the connection
 * lives.
 */
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	if (argc != 3) {
		fprintf(stderr, "usage: counter PORT INTERVAL-MS\n");
		return 2;
	}
	struct sockaddr_in sa = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(argv[1]))};
	long interval_ms = strtol(argv[2], NULL, 10);
	int on = 1, s = socket(AF_INET, SOCK_STREAM, 0);
	setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	if (s < 0 || bind(s, (struct sockaddr *)&sa, sizeof sa) < 0 || listen(s, 16) < 0) {
		perror("counter");
		return 1;
	}
	signal(SIGCHLD, SIG_IGN);
	signal(SIGPIPE, SIG_IGN);
	for (;;) {
		int c = accept(s, NULL, NULL);
		if (c < 0)
			continue;
		if (fork() == 0) {
			close(s);
			setsockopt(c, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
			dprintf(c, "stream counter\n");
			for (unsigned long n = 1; dprintf(c, "%lu\n", n) > 0; n++)
				nanosleep(&(struct timespec){.tv_sec = interval_ms / 1000,
							     .tv_nsec = interval_ms % 1000 * 1000000},
					  NULL);
			fprintf(stderr, "counter: connection lost\n");
			_exit(0);
		}
		close(c);
	}
}
