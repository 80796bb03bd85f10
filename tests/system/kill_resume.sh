#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Who is killed in the middle of the copy costs no second copy: both runs together send at most 5 % more than what is allocated and
# written. And what is kept of a move that failed: who sees it, when it goes, and when it is not taken up.
#   CASES: a subset; the check (SNM_BRIEF=1) has four, make storage-faults all
source "$(dirname "$0")/lib.sh"
source "$(dirname "$0")/refuse_lib.sh"
require_kvm
ALL="destination-snvmm-retried destination-frozen destination-snvmm source-snvmm destination-snmigrated source-snmigrated command expiry not-kept other-peer disk-grown spoilt cancelled"
[ "${SNM_BRIEF:-}" = 1 ] && ALL="destination-snvmm-retried source-snvmm expiry spoilt"
CASES=${CASES:-$ALL}
MIB=1048576
DISK_MB=256 FILL_MB=${FILL_MB:-192}
RATE=64 # MiB a second
SPAN_MB=2
ALLOCATED=$((2 * FILL_MB * MIB))
hosts_up
sent() { ns a cat /sys/class/net/eth0/statistics/tx_bytes; }
kept() { snmigrate b partial list --json | jq -r --arg n "$vm" '[.[] | select(.name == $n)] | length'; }
kept_bytes() { snmigrate b partial list --json | jq -r --arg n "$vm" '[.[] | select(.name == $n) | .allocated_bytes] | add // 0'; }
# what is not listed any more is being deleted
nothing_left() {
	local i
	for i in $(seq 50); do [ -z "$(ls -A "$T/b/state/partial")" ] && return 0; sleep 0.1; done
	fail "$case: left: $(ls -A "$T/b/state/partial")"
}
wait_kept() { # 0|1
	local i
	for i in $(seq 150); do [ "$(kept)" = "$1" ] && return 0; sleep 0.1; done
	fail "$case: $(kept) partials of $vm at hostb, not $1"
}
# half_a_move OPTIONS...: begins a move and returns at 50 %, with $mover
half_a_move() {
	local began i
	began=$(sent)
	: >"$T/move.json"
	snmigrate a $vm hostb --with-storage --json --bandwidth ${RATE}M "$@" >"$T/move.json" 2>"$T/move.err" &
	mover=$!
	for i in $(seq 1200); do
		[ $((($(sent) - began) * 100 / ALLOCATED)) -ge 50 ] && return 0
		kill -0 $mover 2>/dev/null || fail "$case: the move ended before 50 %: $(tail -n 1 "$T/move.json")"
		sleep 0.02
	done
	fail "$case: no 50 %"
}
ends() { # EXIT
	local rc=0
	wait $mover || rc=$?
	[ $rc = "$1" ] || fail "$case: exit $rc, not $1: $(cat "$T/move.err"); $(tail -n 1 "$T/move.json")"
}
move_on() { snmigrate a $vm hostb --with-storage --json >"$T/move.json" 2>"$T/move.err" || fail "$case: the next move: exit $?: $(cat "$T/move.err")"; }
good_at() { assert_good "$(wait_hb "$1" $vm "${2:--1}")"; }
# Both runs together, in bytes on the wire: what is allocated, 5 %, the memory (it is small), and what the guest wrote
within() { # BYTES
	local hb written
	hb=$(wait_hb b $vm)
	written=$(($(hb_field "$hb" writes) * 32768))
	[ "$1" -le $((ALLOCATED + ALLOCATED / 20 + 24 * MIB + written)) ] ||
		fail "$case: $1 bytes on the wire in both runs, $ALLOCATED allocated, $written written"
	echo "$case: $1 bytes on the wire for $ALLOCATED allocated and $written written"
}
done_with() { snvm b stop --force $vm; snvm b delete $vm; wait_kept 0; clean a; clean b; }

run_case() {
	local began hb
	began=$(sent)
	case $case in
	destination-snvmm-retried) # the move goes on by itself
		half_a_move --retry-for 1m
		kill -KILL $(pids_in b snvmm incoming)
		ends 0
		[ "$(tail -n 1 "$T/move.json" | jq .attempts)" -gt 1 ] || fail "$case: no new attempt"
		grep -q '"event":"retry"' "$T/move.json" || fail "$case: nobody was told"
		good_at b
		within $(($(sent) - began)) ;;
	destination-frozen) # it neither reads nor dies: the next attempt ends it
		half_a_move --retry-for 1m
		kill -STOP $(pids_in b snvmm incoming)
		ends 0
		[ "$(tail -n 1 "$T/move.json" | jq .attempts)" -gt 1 ] || fail "$case: no new attempt"
		good_at b
		within $(($(sent) - began)) ;;
	destination-snvmm)
		half_a_move
		kill -KILL $(pids_in b snvmm incoming)
		ends 4
		wait_kept 1
		[ "$(kept_bytes)" -gt $((ALLOCATED / 4)) ] || fail "$case: only $(kept_bytes) bytes are kept"
		# not a VM to anybody
		[ "$(vm_state b $vm)" = absent ] || fail "$case: hostb lists $vm"
		refuse 3 "no VM named $vm" snvm b start $vm
		untouched a $vm
		move_on; good_at b; within $(($(sent) - began)) ;;
	source-snvmm)
		half_a_move
		kill -KILL "$(snvm a info $vm --json | jq -r .pid)"
		ends 8
		wait_kept 1
		snvm a start $vm
		good_at a
		move_on; good_at b; within $(($(sent) - began)) ;;
	destination-snmigrated) # what is connected goes on
		half_a_move --retry-for 1m
		daemon_kill b; daemon_start b
		ends 0; good_at b; within $(($(sent) - began)) ;;
	source-snmigrated)
		half_a_move --retry-for 1m
		daemon_kill a; daemon_start a
		ends 0; good_at b; within $(($(sent) - began)) ;;
	command)
		half_a_move
		kill -KILL $(pids_in b snvmm incoming)
		ends 4
		wait_kept 1
		snmigrate b partial list | grep -q "^$vm  *hosta " || fail "$case: $(snmigrate b partial list)"
		refuse 3 "nothing is kept here of an arrival of other" snmigrate b partial delete other
		snmigrate b partial delete $vm
		wait_kept 0
		nothing_left
		move_on; good_at b ;;
	expiry)
		half_a_move --keep-partial 3s
		kill -KILL $(pids_in b snvmm incoming)
		ends 4
		wait_kept 1; wait_kept 0
		nothing_left
		move_on; good_at b ;;
	not-kept)
		half_a_move --keep-partial 0
		kill -KILL $(pids_in b snvmm incoming)
		ends 4
		clean b
		[ -z "$(ls -A "$T/b/state/partial")" ] || fail "$case: kept: $(ls -A "$T/b/state/partial")"
		move_on; good_at b ;;
	other-peer) # what another host brought is not taken for this one's
		half_a_move
		kill -KILL $(pids_in b snvmm incoming)
		ends 4
		wait_kept 1
		sed -i 's/"peer": "hosta"/"peer": "hostc"/' "$T"/b/state/partial/*/partial.json
		move_on; good_at b
		[ "$(tail -n 1 "$T/move.json" | jq '.disk_bytes - .mirrored_bytes')" -ge $((ALLOCATED * 9 / 10)) ] || fail "$case: it was taken up: $(tail -n 1 "$T/move.json")" ;;
	disk-grown) # one disk has another shape now: it begins anew, the other one goes on
		half_a_move
		kill -KILL $(pids_in b snvmm incoming)
		ends 4
		wait_kept 1
		snvm a stop --force $vm
		truncate -s +64M "$(vm_dir a $vm)/data.raw"
		snvm a start $vm
		move_on; good_at b
		[ "$(stat -c %s "$(vm_dir b $vm)/data.raw")" = $(((DISK_MB + 64) * MIB)) ] || fail "$case: $(ls -l "$(vm_dir b $vm)")" ;;
	spoilt) # what is kept is compared, not trusted: a byte changed, an image cut off
		half_a_move
		kill -KILL $(pids_in b snvmm incoming)
		ends 4
		wait_kept 1
		for f in "$T"/b/state/partial/*/data.raw; do printf 'spoilt' | dd of="$f" bs=1 seek=$((20 * MIB + 77)) conv=notrunc status=none; done
		for f in "$T"/b/state/partial/*/root.qcow2; do truncate -s 100K "$f"; done
		move_on; good_at b
		grep -q "disk root begins anew" "$T/b/state/logs/$vm.log" || fail "$case: a qcow2 that was cut off was taken up"
		snvm b stop --force $vm
		[ "$(dd if="$(vm_dir b $vm)/data.raw" bs=1 skip=$((20 * MIB + 77)) count=6 status=none | tr -d '\0')" != spoilt ] || fail "$case: the spoilt bytes are the VM's now"
		qemu-img check -q "$(vm_dir b $vm)/root.qcow2" || fail "$case: root.qcow2"
		snvm b start $vm ;;
	cancelled) # while it waits for the link
		half_a_move --retry-for 1m
		link_cut b
		for _ in $(seq 100); do grep -q '"event":"retry"' "$T/move.json" && break; sleep 0.1; done
		grep -q '"event":"retry"' "$T/move.json" || fail "$case: no retry: $(tail -n 2 "$T/move.json")"
		snmigrate a cancel $vm
		began=$(date +%s%N)
		ends 5
		[ $((($(date +%s%N) - began) / 1000000)) -lt 4000 ] || fail "$case: it took $((($(date +%s%N) - began) / 1000000)) ms"
		link_heal b
		good_at a
		wait_kept 1
		move_on; good_at b; within $(($(sent) - $2)) ;;
	esac
}
n=0
for case in $CASES; do
	n=$((n + 1)) vm=vm$n
	native_vm a $vm 64M "ws=4 rate=1 touch=4 zero=1 disk=rw diskrate=30 depth=2 span=$SPAN_MB record=200 hb=100 seed=$n"
	wait_touched a $vm
	run_case "$case" "$(sent)"
	done_with
	echo "$case: as it should be"
done
echo "figure: $n ways to break a copy"
