/* SPDX-License-Identifier: Apache-2.0 */
/* powerbutton CMD...: runs in the guest; waits for the ACPI power button, then becomes CMD. */
#include <fcntl.h>
#include <glob.h>
#include <linux/input.h>
#include <poll.h>
#include <stdio.h>
#include <unistd.h>

enum { DEVICES_MAX = 16 };

int main(int argc, char **argv)
{
	struct pollfd pfd[DEVICES_MAX];
	nfds_t n = 0;
	glob_t g;
	if (argc < 2)
		return 2;
	if (glob("/dev/input/event*", 0, NULL, &g) != 0) {
		fprintf(stderr, "powerbutton: no input device\n");
		return 1;
	}
	for (size_t i = 0; i < g.gl_pathc && n < DEVICES_MAX; i++) {
		int fd = open(g.gl_pathv[i], O_RDONLY | O_CLOEXEC);
		if (fd >= 0)
			pfd[n++] = (struct pollfd){.fd = fd, .events = POLLIN};
	}
	while (poll(pfd, n, -1) >= 0) {
		for (nfds_t i = 0; i < n; i++) {
			struct input_event e;
			if (pfd[i].revents == 0)
				continue;
			if (read(pfd[i].fd, &e, sizeof e) != sizeof e) {
				pfd[i].fd = -1; /* unplugged */
				continue;
			}
			if (e.type == EV_KEY && e.code == KEY_POWER && e.value == 1) {
				fprintf(stderr, "powerbutton: pressed\n");
				execvp(argv[1], argv + 1);
				return 1;
			}
		}
	}
	return 1;
}
