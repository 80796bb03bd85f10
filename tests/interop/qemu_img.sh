#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# qemu-img: convert -n into an export, compare with it, map and measure of it.
. "$(dirname "$0")/lib.bash"
need qemu-img qemu-io jq

image qcow2 in 80M
qemu-io -f qcow2 -c 'write -P 21 64k 9M' -c 'write -P 22 50M 3M' -c 'write -z 55M 1M' in >/dev/null
for way in "${ways[@]}"; do
	read -r format options <<<"$way"
	rm -f disk
	image "$format" disk 80M
	# shellcheck disable=SC2086
	start --format "$format" $options disk
	qemu-img convert -n -f qcow2 -O raw in "$uri" || fail "$way: convert -n"
	qemu-img compare -q -f qcow2 -F raw in "$uri" || fail "$way: compare"
	qemu-img convert -n -W -m 8 -f qcow2 -O raw in "$uri" || fail "$way: convert out of order"
	qemu-img compare -q -f qcow2 -F raw in "$uri" || fail "$way: compare 2"
	qemu-img map -f raw --output=json "$uri" | jq -e '[.[] | select(.data) | .length] | add == 12582912' >/dev/null ||
		fail "$way: map: $(qemu-img map -f raw --output=json "$uri")"
	stop
	qemu-img compare -q -f qcow2 -F "$format" in disk || fail "$way: the file itself"
	echo "ok: $way"
done
