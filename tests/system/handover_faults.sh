#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What the kill matrix does not cover of docs/handover.md, B to G and "The way out": records that cannot be written at either side, both
# sides killed, a source killed while it cleans up, daemons restarted in between, resolve --run-here and --give-up, a VM stopped or paused
# during its move. After each: the outcome of the table, never two running copies, nothing left over, and the next move works.
#   CASES: a subset
SILENCE_MS=${SILENCE_MS:-1000}
source "$(dirname "$0")/lib.sh"
require_kvm
DISK_MB=32
hosts_up
cases=0 vm= mover= rc=0
CASES=${CASES:-handing_over_fails moved_fails owner_fails_once abandoned_fails unconfirmed_fails killed_at_moved_recorded both_killed_held
	both_killed_owner daemons_restarted run_here run_here_wrong run_here_answered give_up_source stopped_in_mirror paused_in_mirror}

# begin FAULTS_A FAULTS_B [MOVE OPTIONS]: new daemons with these, a new VM at a, and its move to b in the background
begin() {
	local fa=$1 fb=$2; shift 2
	cases=$((cases + 1)) vm=vm$cases
	daemon_kill a TERM; daemon_kill b TERM
	rm -rf "$T/fault"; mkdir "$T/fault"
	daemon_start b "SNM_FAULT=$fb" "SNM_FAULT_DIR=$T/fault"
	daemon_start a "SNM_FAULT=$fa" "SNM_FAULT_DIR=$T/fault"
	native_vm a $vm 64M "ws=4 rate=5 touch=4 zero=1 disk=rw diskrate=100 hb=700 seed=$cases" >/dev/null
	wait_touched a $vm
	snmigrate a $vm hostb --with-storage --json "$@" >"$T/move.json" 2>"$T/move.err" &
	mover=$!
}
reach() { # POINT
	local i
	for i in $(seq 400); do [ -e "$T/fault/$1.hit" ] && return 0; sleep 0.05; done
	cat "$T/move.json" "$T/move.err"; fail "$name: $1 was not reached"
}
go() { local p; for p in "$@"; do touch "$T/fault/$p.go"; done; }
# plain HOST...: a new daemon without faults; a snvmm that lives keeps those it has
plain() { local h; for h in "$@"; do daemon_kill "$h"; daemon_start "$h" "SNM_FAULT_DIR=$T/fault"; done; }
last() { tail -n 1 "$T/move.json"; }
ended() { rc=0; wait $mover || rc=$?; }
exits() { # EXIT...
	local e
	ended
	for e in "$@"; do [ $rc = "$e" ] && return 0; done
	fail "$name: exit $rc, not $*: $(last) $(cat "$T/move.err")"
}
kill_snvmm() { local h p; for h in "$@"; do for p in $(pids_in "$h" snvmm); do kill -KILL "$p" 2>/dev/null || true; done; done; }
never_two() {
	[ "$(vm_state a $vm)" != running ] || [ "$(vm_state b $vm)" != running ] || fail "$name: TWO RUNNING COPIES"
}
settles() { # STATE@HOST: there, and nowhere else
	local i h=${1#*@} want=${1%@*}
	for i in $(seq 200); do
		never_two
		[ "$(vm_state "$h" $vm)" = "$want" ] && [ "$(vm_state "$(other "$h")" $vm)" = absent ] && return 0
		sleep 0.1
	done
	fail "$name: not $1: hosta $(vm_state a $vm), hostb $(vm_state b $vm); exit $rc; $(last)"
}
left_over() { # HOST PROCESSES
	local n
	[ -z "$(ls -A "$T/$1/state/incoming" 2>/dev/null)" ] || echo "host$1: incoming: $(ls "$T/$1/state/incoming")"
	n=$(pids_in "$1" snvmm | wc -l); [ "$n" -eq "$2" ] || echo "host$1: $n snvmm, not $2"
	n=$(pids_in "$1" qemu-nbd | wc -l); [ "$n" -eq "$2" ] || echo "host$1: $n qemu-nbd, not $2"
}
# nothing left over, and the next move works; the VM is deleted
finish() { # HOST where it is
	local h=$1 o i rest state hb rc2
	o=$(other "$h")
	for i in $(seq 150); do
		state=$(vm_state "$h" $vm)
		rest=$(left_over "$o" 0; left_over "$h" $([[ $state = running || $state = paused ]] && echo 1 || echo 0))
		[ -n "$rest" ] || { [ ! -e "$(vm_dir "$o" $vm)" ] || [ "$state" = crashed ] || rest="host$o: the VM's folder is still there"; }
		[ -z "$rest" ] && break
		sleep 0.1
	done
	[ -z "$rest" ] || fail "$name: left over: $rest"
	case $state in
	crashed | stopped) snvm "$h" start $vm >/dev/null ;;
	paused) snvm "$h" resume $vm >/dev/null ;;
	esac
	hb=$(wait_hb "$h" $vm); assert_good "$hb"
	for i in $(seq 10); do
		rc2=0; snmigrate "$h" $vm "host$o" --with-storage --json >"$T/next.json" 2>&1 || rc2=$?
		[ $rc2 = 3 ] || break # still unconfirmed for an instant
		sleep 0.5
	done
	[ $rc2 = 0 ] || fail "$name: the next move: exit $rc2: $(tail -n 1 "$T/next.json")"
	hb=$(wait_hb "$o" $vm "$(hb_field "$hb" seq)"); assert_good "$hb"
	snvm "$o" stop --force $vm >/dev/null
	snvm "$o" delete $vm >/dev/null
}

# A/B: handing-over cannot be written: the guest runs on
handing_over_fails() {
	begin record-handing-over:failif ""
	touch "$T/fault/record-handing-over.fail"
	exits 4; settles running@a
	rm "$T/fault/record-handing-over.fail"
	finish a
}
# E: the destination owns, the source cannot write moved: it does not resume, and its daemon settles it once the medium is back
moved_fails() {
	begin record-moved:failif ""
	touch "$T/fault/record-moved.fail"
	ended
	case $rc in 0 | 6) ;; *) fail "$name: exit $rc: $(last)" ;; esac
	for _ in 1 2 3 4 5; do never_two; [ "$(vm_state a $vm)" != running ] || fail "$name: the source runs again"; sleep 0.1; done
	rm "$T/fault/record-moved.fail"
	settles running@b; finish b
}
# B: the way back cannot be written for a while: the guest waits and goes on
owner_fails_once() {
	begin after-ready:hold,record-owner:failif ""
	reach after-ready
	touch "$T/fault/record-owner.fail"
	kill_snvmm b; go after-ready
	sleep 0.8; never_two
	[ "$(vm_state a $vm)" != running ] || fail "$name: it runs behind a record that says handing-over"
	rm "$T/fault/record-owner.fail"
	exits 4; settles running@a; finish a
}
# A: the promise cannot be written
abandoned_fails() {
	begin in-mirror:hold record-abandoned:failif
	reach in-mirror
	touch "$T/fault/record-abandoned.fail"
	snmigrate a cancel $vm >/dev/null
	go in-mirror
	exits 5
	sleep 0.5; [ "$(vm_state a $vm)" = running ] || fail "$name: the source is $(vm_state a $vm)"
	rm "$T/fault/record-abandoned.fail"
	settles running@a; finish a
}
# D, "D's owner write fails": nothing got out; the promise, and the source goes on
unconfirmed_fails() {
	begin "" record-owner-unconfirmed:failif
	touch "$T/fault/record-owner-unconfirmed.fail"
	exits 4 6; settles running@a
	rm "$T/fault/record-owner-unconfirmed.fail"
	finish a
}
# F and G: the source dies with moved on its medium, nothing deleted yet
killed_at_moved_recorded() {
	begin moved-recorded:hold ""
	reach moved-recorded
	kill_snvmm a; go moved-recorded
	exits 0; settles running@b; finish b
}
# D: both die before the owner record: only the source's disks are the VM
both_killed_held() {
	begin after-commit:hold d-held-running:hold
	reach after-commit; reach d-held-running
	kill_snvmm a b; go after-commit d-held-running
	exits 8; settles crashed@a; finish a
}
# E: both die after it: only the destination's are
both_killed_owner() {
	begin "" d-owner-recorded:hold
	reach d-owner-recorded
	kill_snvmm a b; go d-owner-recorded
	exits 8 6; settles crashed@b; finish b
}
# C and D: both daemons restarted between COMMIT and the owner record
daemons_restarted() {
	begin after-commit:hold d-held-running:hold
	reach after-commit; reach d-held-running
	plain a b
	go d-held-running after-commit
	exits 0; settles running@b; finish b
}
# D, host lost before its owner record: --run-here at the source; the host comes back and has promised
run_here() {
	begin "" d-held-running:hold
	reach d-held-running
	snmigrate a resolve $vm --run-here --yes-the-other-host-is-off >/dev/null 2>&1 && fail "$name: forced before it was in doubt"
	daemon_kill b; kill_snvmm b
	exits 6 4
	snmigrate a resolve $vm --run-here --yes-the-other-host-is-off >"$T/out" 2>&1 || fail "$name: $(cat "$T/out")"
	for _ in $(seq 50); do [ "$(vm_state a $vm)" = running ] && break; sleep 0.1; done
	wait_hb a $vm >/dev/null
	daemon_start b "SNM_FAULT_DIR=$T/fault"
	settles running@a; finish a
}
# The same, but the other host had the VM all the time: when the link heals the lower epoch stops at once
run_here_wrong() {
	begin "" d-owner-recorded:hold
	reach d-owner-recorded; link_cut b
	sleep "$(awk "BEGIN { print $SILENCE_MS * 1.3 / 1000 }")"
	go d-owner-recorded
	exits 6
	wait_state a $vm in-doubt 5; wait_state b $vm running 5
	snmigrate a resolve $vm --run-here --yes-the-other-host-is-off >"$T/out" 2>&1 || fail "$name: $(cat "$T/out")"
	wait_state a $vm running 5
	link_heal b
	wait_state b $vm in-doubt 10
	[ "$(vm_state a $vm)" = running ] || fail "$name: the forced one is $(vm_state a $vm)"
	snvm b resume $vm >/dev/null 2>&1 && fail "$name: resumed in doubt"
	snmigrate b resolve $vm --give-up >"$T/out" 2>&1 || fail "$name: $(cat "$T/out")"
	settles running@a
	ls -d "$T"/b/state/kept/$vm-* >/dev/null 2>&1 || fail "$name: what was given up is not kept"
	finish a
}
# A source in doubt is not forced while the other side answers
run_here_answered() {
	begin "" "record-owner-unconfirmed:failif,record-abandoned:failif"
	touch "$T/fault/record-owner-unconfirmed.fail" "$T/fault/record-abandoned.fail"
	sleep 0.5
	for _ in $(seq 100); do [ "$(vm_state b $vm)" = in-doubt ] && break; sleep 0.1; done
	[ "$(vm_state b $vm)" = in-doubt ] || fail "$name: the destination is $(vm_state b $vm), not in doubt"
	snmigrate a resolve $vm --run-here --yes-the-other-host-is-off >"$T/out" 2>&1 && fail "$name: forced while the other side answers"
	never_two
	rm "$T/fault/record-owner-unconfirmed.fail" "$T/fault/record-abandoned.fail"
	exits 4 6 0; settles running@a; finish a
}
# D, link: a source in doubt that is given up; the other side's word settles
give_up_source() {
	begin after-commit:hold d-held-running:hold
	reach after-commit; reach d-held-running
	link_cut b
	sleep "$(awk "BEGIN { print $SILENCE_MS * 1.3 / 1000 }")"
	go after-commit d-held-running
	exits 6
	# 6: the paused guest is given up, the record stays in doubt until the other side is heard
	local rc3=0; snmigrate a resolve $vm --give-up >"$T/out" 2>&1 || rc3=$?
	[ $rc3 = 0 ] || [ $rc3 = 6 ] || fail "$name: exit $rc3: $(cat "$T/out")"
	never_two
	link_heal b
	settles running@b; finish b
}
stopped_in_mirror() {
	begin in-mirror:hold ""
	reach in-mirror
	snvm a stop --force $vm >"$T/out" 2>&1 &
	local stopper=$!
	sleep 0.3; go in-mirror
	wait $stopper || fail "$name: stop: $(cat "$T/out")"
	exits 4; settles stopped@a; finish a
}
paused_in_mirror() {
	begin in-mirror:hold ""
	reach in-mirror
	snvm a pause $vm >/dev/null
	go in-mirror
	exits 0; settles paused@b
	sleep 0.3; [ "$(vm_state b $vm)" = paused ] || fail "$name: it was started there"
	finish b
}

for name in $CASES; do
	t0=$(date +%s%N)
	$name
	echo "$name: exit $rc ($(( ($(date +%s%N) - t0) / 1000000 )) ms)"
done
echo "figure: $cases faults in the handover, each with the outcome of docs/handover.md"
