#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Long: make storage-faults
# A VM with 16 disks, raw and qcow2, moves in both modes of the mirror: every disk arrives with its content, format and
# sparseness, and the memory that the copies take stays below what docs/operating.md says.
source "$(dirname "$0")/lib.sh"
require_kvm
DISKS=16 QCOW2="2 7 12" DISK_MB=64 FILL_MB=24
PIECES_KB=16384 # 64 pieces of 256 KiB
BUFFER_KB=65536
PER_DISK_KB=2048 # a connection, its threads, and what it holds
hosts_up
mkdir "$T/fault" "$T/make"
daemon_kill a TERM
daemon_start a SNM_FAULT=in-mirror:hold "SNM_FAULT_DIR=$T/fault"
daemon_kill b TERM
daemon_start b SNM_FAULT=in-mirror:hold "SNM_FAULT_DIR=$T/fault"

format() { if [[ " $QCOW2 " == *" $1 "* ]]; then echo qcow2; else echo raw; fi; }
imports=()
{
	printf '[vm]\nname = vm1\nmemory = 96M\nkernel = %s\nserial = socket\n' "$GUEST"
	echo "cmdline = ws=4 rate=1 touch=4 zero=1 disk=rw diskrate=50 span=8 record=100 fresh=0 hb=100 idle=1"
	for i in $(seq $DISKS); do
		head -c "${FILL_MB}M" /dev/urandom >"$T/make/d$i.raw"
		truncate -s "${DISK_MB}M" "$T/make/d$i.raw"
		[ "$(format "$i")" = raw ] || { qemu-img convert -q -f raw -O qcow2 "$T/make/d$i.raw" "$T/make/d$i.qcow2"; rm "$T/make/d$i.raw"; }
		printf '[disk d%s]\npath = d%s.%s\nformat = %s\n' "$i" "$i" "$(format "$i")" "$(format "$i")"
	done
} >"$T/make/vm.ini"
for i in $(seq $DISKS); do imports+=(--import "d$i=$T/make/d$i.$(format "$i")"); done
snvm a create "$T/make/vm.ini" "${imports[@]}"
snvm a start vm1
wait_touched a vm1

# The guest uses the first four; the others keep what they have.
contents() { # HOST
	local i f
	for i in $(seq 5 $DISKS); do
		f=$(vm_dir "$1" vm1)/d$i.$(format "$i")
		if [ "$(format "$i")" = qcow2 ]; then
			qemu-img convert -U -q -f qcow2 -O raw "$f" "$T/make/content"
			f=$T/make/content
		fi
		sha256sum <"$f"
	done
}
anonymous_kb() { awk '/^RssAnon:/ { print $2 }' "/proc/$1/status" 2>/dev/null || echo 0; }
contents a >"$T/contents"
before_kb=$(du -ck "$(vm_dir a vm1)"/d*.* | tail -n 1 | cut -f 1)

# move FROM OPTION...: prints by how many KiB the source's memory grew until all disks were synced
move() {
	local from=$1 there pid base most=0 now rc=0
	there=$(other "$from")
	shift
	rm -f "$T/fault"/*
	pid=$(pids_in "$from" snvmm | head -n 1)
	base=$(anonymous_kb "$pid")
	snmigrate "$from" vm1 "host$there" --with-storage --json "$@" >"$T/move.json" 2>"$T/move.err" &
	local mover=$!
	while [ ! -e "$T/fault/in-mirror.hit" ]; do
		kill -0 $mover 2>/dev/null || fail "the disks are not synced: $(tail -n 2 "$T/move.json")"
		now=$(anonymous_kb "$pid")
		[ "$now" -gt "$most" ] && most=$now
		sleep 0.02
	done
	touch "$T/fault/in-mirror.go"
	wait $mover || rc=$?
	[ $rc = 0 ] || fail "exit $rc: $(tail -n 1 "$T/move.json")"
	assert_good "$(wait_hb "$there" vm1 "$(hb_field "$(wait_hb "$there" vm1)" seq)")"
	contents "$there" | cmp -s - "$T/contents" || fail "a disk did not arrive as it was"
	grown=$((most - base))
	[ $grown -le $((PIECES_KB + BUFFER_KB + DISKS * PER_DISK_KB)) ] ||
		fail "$grown KiB for the copies, $((PIECES_KB + BUFFER_KB + DISKS * PER_DISK_KB)) are allowed"
}
move a
sync_kb=$grown
after_kb=$(du -ck "$(vm_dir b vm1)"/d*.* | tail -n 1 | cut -f 1)
[ "$after_kb" -le $((before_kb * 102 / 100 + DISKS * 8 * 1024)) ] || fail "$before_kb KiB at the source, $after_kb at the destination"
for i in $QCOW2; do
	[ "$(qemu-img info -U --output json "$(vm_dir b vm1)/d$i.qcow2" | jq -r .format)" = qcow2 ] || fail "d$i is no qcow2"
done
move b --mirror buffered
echo "figure: 16 disks: the source's memory grew by $sync_kb KiB (sync) and $grown KiB (buffered) while they were copied"
