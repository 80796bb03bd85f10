/* SPDX-License-Identifier: Apache-2.0 */
#ifndef HOST_EXIT_H
#define HOST_EXIT_H

/* Exit status of snmigrate, and of a move's last JSON line. */
enum move_exit {
	EXIT_MOVED = 0,
	EXIT_USAGE = 2,
	EXIT_REFUSED = 3,     /* nothing touched */
	EXIT_FAILED = 4,      /* the VM is at the source as before */
	EXIT_CANCELLED = 5,   /* likewise */
	EXIT_IN_DOUBT = 6,    /* paused; the message says what to do */
	EXIT_NOT_CLEANED = 7, /* moved, but the source is not cleaned up */
	EXIT_CRASHED = 8,     /* the VM runs nowhere */
};

#endif
