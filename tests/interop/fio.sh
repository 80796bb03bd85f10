#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# fio's nbd engine with verify: random sizes and offsets, trims between, and four connections at once.
. "$(dirname "$0")/lib.bash"
need fio qemu-img
fio --enghelp 2>/dev/null | grep -w nbd >/dev/null || { echo "skipped: this fio has no nbd engine"; exit 77; }

run() {
	fio --ioengine=nbd --uri="$uri" --thread --group_reporting --output=fio.log "$@" >/dev/null 2>&1 ||
		{ tail -n 20 fio.log; fail "$way: fio $*"; }
	! grep -qiE 'verify: bad|err= *[1-9]' fio.log || { tail -n 20 fio.log; fail "$way: fio $*"; }
}
for way in "${ways[@]}"; do
	read -r format options <<<"$way"
	rm -f disk
	image "$format" disk 64M
	# shellcheck disable=SC2086
	start --format "$format" $options disk
	run --name=mixed --rw=randrw --bsrange=512-128k --bs_unaligned=0 --blockalign=512 --size=48M --iodepth=32 \
		--verify=crc32c --verify_fatal=1 --do_verify=1
	# Depth 1: fio trims a block and writes it without waiting, and NBD does not order requests that overlap.
	run --name=trim --rw=randtrimwrite --bs=64k --size=16M --iodepth=1 --verify=crc32c --verify_fatal=1
	# Four connections, each its own quarter.
	run --name=four --numjobs=4 --rw=randwrite --bs=16k --size=16M --offset_increment=16M --iodepth=16 \
		--fsync=64 --verify=sha1 --verify_fatal=1 --do_verify=1
	stop
	[ "$format" = raw ] || qemu-img check -q disk || fail "$way: qemu-img check"
	echo "ok: $way"
done
