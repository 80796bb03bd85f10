#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# qemu-io scripts: writes, zeroes, discards, FUA, odd sizes, and requests out of range or not allowed.
. "$(dirname "$0")/lib.bash"
need qemu-io qemu-img

io() {
	local out
	out=$(qemu-io -f raw "$@" "$uri" 2>&1) || { echo "$out"; return 1; }
	! grep -qiE 'failed|error|verification' <<<"$out" || { echo "$out"; return 1; }
}
for way in "${ways[@]}"; do
	read -r format options <<<"$way"
	rm -f disk
	image "$format" disk 32M
	# shellcheck disable=SC2086
	start --format "$format" $options disk
	io -c 'write -P 1 0 8M' -c 'write -P 2 512 512' -c 'read -P 1 0 512' -c 'read -P 2 512 512' \
		-c 'read -P 1 1k 8191k' -c 'flush' || fail "$way: write"
	io -c 'write -P 3 1000 3333' -c 'read -P 3 1000 3333' -c 'read -P 1 4333 512' || fail "$way: unaligned write"
	io -c 'write -f -P 4 1M 64k' -c 'read -P 4 1M 64k' || fail "$way: FUA"
	io -c 'write -z 2M 1M' -c 'read -P 0 2M 1M' -c 'read -P 1 3M 64k' || fail "$way: zeroes"
	io -c 'write -z -u 4M 1M' -c 'read -P 0 4M 1M' -c 'read -P 1 5M 64k' || fail "$way: zeroes that unmap"
	io -c 'write -z 5243011 70001' -c 'read -P 0 5243011 70001' -c 'read -P 1 5242880 131' \
		-c 'read -P 1 5313012 512' || fail "$way: unaligned zeroes"
	io -c 'discard 6M 1M' -c 'read -P 0 6M 1M' -c 'read -P 1 7M 64k' || fail "$way: discard"
	io -c 'write -P 9 33553920 512' -c 'read -P 9 33553920 512' || fail "$way: last sector"
	io -c 'aio_write -P 5 8M 1M' -c 'aio_write -P 6 9M 1M' -c 'aio_write -P 7 10M 1M' -c 'aio_flush' \
		-c 'read -P 5 8M 1M' -c 'read -P 6 9M 1M' -c 'read -P 7 10M 1M' || fail "$way: asynchronous"
	# qemu-io itself stops what lies beyond the end; nbdsh is not in Debian's libnbd-bin, so the raw protocol
	# (tests/unit/nbd) has the server's own answers. What the user sees is an error, not a hang:
	! io -c 'read 32M 512' >/dev/null || fail "$way: read beyond the end succeeded"
	! io -c 'write 33553920 1024' >/dev/null || fail "$way: write beyond the end succeeded"
	stop
	# shellcheck disable=SC2086
	start --format "$format" $options --read-only disk
	qemu-io -r -f raw -c 'read -P 5 8M 1M' "$uri" | grep '^read 1048576' >/dev/null || fail "$way: read-only read"
	! io -c 'write -P 1 0 512' >/dev/null 2>&1 || fail "$way: a read-only disk was written"
	stop
	[ "$format" = raw ] || qemu-img check -q disk || fail "$way: qemu-img check"
	echo "ok: $way"
done
