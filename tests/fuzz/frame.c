/* SPDX-License-Identifier: Apache-2.0 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include <xxhash.h>

#include "base/bytes.h"
#include "net/frame.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* The checksum is made right first, else nothing would get past it; the raw bytes are read too. */
static void read_all(const uint8_t *data, size_t size)
{
	struct conn *conn;
	struct frame f;
	int fds[2];

	if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds) < 0)
		abort();
	if (send(fds[0], data, size, MSG_DONTWAIT) != (ssize_t)size)
		abort();
	close(fds[0]);
	if (conn_from_fd(fds[1], &conn, NULL) < 0)
		abort();
	while (frame_read(conn, 1000, &f, NULL) == 0) {
		if (!frame_type_is_json(f.type) ? f.json != NULL : !json_is_object(f.json))
			abort();
		frame_release(&f);
	}
	conn_close(conn);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	uint8_t copy[8192];

	if (size > sizeof copy)
		return 0;
	memcpy(copy, data, size);
	read_all(copy, size);
	if (size < FRAME_HEADER_BYTES)
		return 0;
	put_be32(copy, 0x534e4d43);
	put_be16(copy + 6, 0);
	put_be32(copy + 16, (uint32_t)(size - FRAME_HEADER_BYTES));
	put_be64(copy + 20, XXH3_64bits(copy + FRAME_HEADER_BYTES, size - FRAME_HEADER_BYTES));
	read_all(copy, size);
	return 0;
}
