#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What only a client that sends exactly what it is told can show: the server's own answers out of range.
. "$(dirname "$0")/lib.bash"
# nbdsh runs the first python3 of PATH, which need not be the one that Debian's module is for.
/usr/bin/python3 -c 'import nbd' 2>/dev/null || {
	echo "skipped: python3-libnbd is missing"
	exit 77
}
truncate -s 1M disk
start disk
/usr/bin/python3 -mnbd -u "$uri" -c '
import errno
h.set_strict_mode(0)
def expect(e, f):
    try:
        f()
    except nbd.Error as x:
        assert x.errnum == e, (x.errnum, e)
    else:
        raise AssertionError("succeeded")
expect(errno.ENOSPC, lambda: h.pwrite(b"x" * 512, 1048576))
expect(errno.EINVAL, lambda: h.pread(512, 1048576))
expect(errno.EINVAL, lambda: h.trim(512, 1048576))
'
stop
