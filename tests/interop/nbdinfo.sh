#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# nbdinfo's view of an export: capabilities, sizes, names, extents.
. "$(dirname "$0")/lib.bash"
need nbdinfo qemu-img qemu-io jq

for way in "${ways[@]}"; do
	read -r format options <<<"$way"
	image "$format" disk 64M
	qemu-io -f "$format" -c 'write -P 7 1M 2M' -c 'write -P 8 63M 1M' disk >/dev/null
	# shellcheck disable=SC2086
	start --format "$format" $options --export disk0 --description 'a disk' disk
	nbdinfo --json "$uri" >info.json
	jq -e '.protocol == "newstyle-fixed" and .structured and (.exports | length == 1)
		and (.exports[0] | .["export-size"] == 67108864 and (.contexts == ["base:allocation"])
		and (.is_read_only | not) and .can_df and .can_fua and .can_flush and .can_trim and .can_zero
		and .can_fast_zero and .can_multi_conn and .can_cache and .block_size_maximum == 33554432)' \
		info.json >/dev/null || { cat info.json; fail "$way: nbdinfo --json"; }
	for can in connect flush fua trim zero 'fast-zero' 'multi-conn' cache df write read; do
		nbdinfo --can "$can" "$uri" || fail "$way: --can $can"
	done
	! nbdinfo --is read-only "$uri" || fail "$way: claims to be read-only"
	nbdinfo --list --json "$uri" | jq -e '.exports[0] | .["export-name"] == "disk0" and .description == "a disk"' >/dev/null ||
		fail "$way: --list"
	nbdinfo --json "nbd+unix:///disk0?socket=$sock" | jq -e '.exports[0]["export-name"] == "disk0"' >/dev/null ||
		fail "$way: export by name"
	! nbdinfo "nbd+unix:///other?socket=$sock" >/dev/null 2>&1 || fail "$way: serves an export that is not there"
	nbdinfo --map --json "$uri" >map.json
	jq -e '([.[] | .length] | add) == 67108864
		and ([.[] | select(.offset + .length <= 1048576 or (.offset >= 3145728 and .offset + .length <= 66060288)) | .type] | unique) == [3]
		and ([.[] | select(.offset == 1048576)][0].type == 0) and .[-1].type == 0' map.json >/dev/null ||
		{ cat map.json; fail "$way: --map"; }
	stop

	# shellcheck disable=SC2086
	start --format "$format" $options --read-only disk
	nbdinfo --is read-only "$uri" || fail "$way: not read-only"
	for can in write trim zero; do
		! nbdinfo --can "$can" "$uri" || fail "$way: read-only, yet --can $can"
	done
	stop
	rm -f disk
	echo "ok: $way"
done
