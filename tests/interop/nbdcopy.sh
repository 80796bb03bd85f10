#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# nbdcopy to and from snnbd, with its default of several connections and many requests; holes survive.
. "$(dirname "$0")/lib.bash"
need nbdcopy qemu-img qemu-io

truncate -s 96M in
qemu-io -f raw -c 'write -P 17 0 5M' -c 'write -P 18 40M 20M' -c 'write -P 19 100662784 512' in >/dev/null
head -c 3M /dev/urandom | dd of=in bs=64k seek=1000 conv=notrunc status=none
for way in "${ways[@]}"; do
	read -r format options <<<"$way"
	rm -f disk out
	image "$format" disk 96M
	# shellcheck disable=SC2086
	start --format "$format" $options disk
	nbdcopy in "$uri" || fail "$way: in"
	nbdcopy "$uri" out || fail "$way: out"
	cmp in out || fail "$way: differs"
	nbdcopy --connections=4 --requests=64 --request-size=65536 "$uri" out || fail "$way: out, 4 connections"
	cmp in out || fail "$way: differs with 4 connections"
	stop
	qemu-img compare -q -f raw -F "$format" in disk || fail "$way: qemu-img compare"
	want=$(stat -c '%b' in) got=$(stat -c '%b' disk)
	[ "$got" -le $((want + want / 20 + 2048)) ] || fail "$way: $got blocks allocated instead of $want"
	echo "ok: $way"
done
