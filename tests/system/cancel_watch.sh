#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Cancel, Ctrl-C, watch, the JSON lines, --max-downtime, and a guest that powers itself off in the middle.
source "$(dirname "$0")/lib.sh"
source "$(dirname "$0")/refuse_lib.sh"
require_kvm
DISK_MB=64
SILENCE_MS=3000
hosts_up
native_vm a vm1 256M "ws=32 rate=40 touch=64 zero=1 disk=rw diskrate=200 hb=100"
wait_touched a vm1
slow() { ns a tc qdisc replace dev eth0 root tbf rate "$1" burst 256kb latency 100ms; }
fast() { ns a tc qdisc del dev eth0 root 2>/dev/null || true; }
# Waits until the lines of FILE tell PHASE.
wait_phase() { # FILE PHASE
	local i
	for i in $(seq 300); do
		grep -q "\"phase\":\"$2\"" "$1" 2>/dev/null && return 0
		sleep 0.05
	done
	fail "phase $2 was not reached: $(tail -n 3 "$1")"
}
# Every line is an object; per cent never runs backwards; the last has every key that scripts rely on, and none else a result.
check_lines() { # FILE RESULT
	jq -es 'length > 0 and all(type == "object")' "$1" >/dev/null || fail "not JSON lines: $(cat "$1")"
	jq -es '[.[] | .percent // empty] | . == sort and all(. >= 0 and . <= 100)' "$1" >/dev/null || fail "per cent runs backwards: $(jq -c '.percent // empty' "$1" | xargs)"
	jq -es '.[-1] as $e | ["result", "reason", "total_ms", "storage_ms", "memory_ms", "downtime_ms", "memory_bytes", "disk_bytes", "wire_bytes", "rounds", "left_behind"]
		| all(. as $k | $e | has($k))' "$1" >/dev/null || fail "keys are missing in the last line: $(tail -n 1 "$1")"
	jq -es '.[-1] | (.reason | type == "string") and (.left_behind | type == "array") and ([.total_ms, .storage_ms, .memory_ms, .downtime_ms, .memory_bytes, .disk_bytes, .wire_bytes, .rounds] | all(type == "number" and . >= 0))' \
		"$1" >/dev/null || fail "wrong types in the last line: $(tail -n 1 "$1")"
	jq -es '[.[:-1][] | select(has("result"))] == []' "$1" >/dev/null || fail "a result before the last line: $(grep result "$1")"
	[ "$(tail -n 1 "$1" | jq -r .result)" = "$2" ] || fail "the result is not $2: $(tail -n 1 "$1")"
}
# cancel_in PHASE RATE: the move is cancelled there; exit 5, the guest as before, nothing at the destination
cancel_in() {
	local begin rc=0
	slow "$2"
	: >"$T/move.json"
	snmigrate a vm1 hostb --with-storage --json >"$T/move.json" 2>"$T/move.err" &
	local mover=$!
	wait_phase "$T/move.json" "$1"
	sleep 1.2
	begin=$(date +%s%N)
	snmigrate a cancel vm1 >"$T/out" 2>&1 || fail "cancel in $1: exit $?: $(cat "$T/out")"
	wait $mover || rc=$?
	echo "cancel in $1: exit $rc after $((($(date +%s%N) - begin) / 1000000)) ms: $(cat "$T/move.err")"
	[ $rc = 5 ] || fail "cancel in $1: exit $rc: $(tail -n 1 "$T/move.json")"
	[ "$(wc -l <"$T/move.err")" = 1 ] && grep -q cancelled "$T/move.err" || fail "cancel in $1: not one sentence: $(cat "$T/move.err")"
	check_lines "$T/move.json" cancelled
	[ "$(jq -r 'select(.event == "phase") | .phase' "$T/move.json" | tail -n 1)" = "$1" ] || fail "it was cancelled in another phase: $(jq -r 'select(.event == "phase") | .phase' "$T/move.json" | xargs)"
	fast
	untouched a vm1
	refuse 3 "VM vm1 is not being moved" snmigrate a cancel vm1
}
refuse 3 "VM vm1 is not being moved" snmigrate a cancel vm1
refuse 3 "no VM named vm9" snmigrate a cancel vm9
refuse 3 "VM vm1 is not being moved" snmigrate a watch vm1
files=$(ls "$(vm_dir a vm1)")
cancel_in storage 20mbit
cancel_in memory 200mbit
[ "$(ls "$(vm_dir a vm1)")" = "$files" ] || fail "the VM's folder changed: $(ls "$(vm_dir a vm1)")"

# Ctrl-C leaves the move running and says what to do; watch comes back to it and ends as the move does.
slow 160mbit
: >"$T/move.json"
"$BIN/snmigrate" --control "$T/a/control.sock" vm1 hostb --with-storage --json >"$T/move.json" 2>"$T/move.err" &
mover=$!
wait_phase "$T/move.json" storage
# a background job of a script ignores SIGINT unless it catches it itself, which is what is tested
kill -INT $mover
rc=0; wait $mover || rc=$?
[ $rc = 130 ] || fail "after SIGINT: exit $rc: $(cat "$T/move.err")"
grep -q "snmigrate watch vm1.*snmigrate cancel vm1" "$T/move.err" || fail "after SIGINT: $(cat "$T/move.err")"
[ "$(snvm a info vm1 --json | jq -r .migrating.destination)" = hostb ] || fail "the move does not go on: $(snvm a info vm1 --json)"
snvm a info vm1 | grep -q "^moving  to hostb, [0-9]* %, for [0-9]* s$" || fail "info does not tell of the move: $(snvm a info vm1)"
refuse 3 "already being moved" snmigrate a vm1 hostb --with-storage
# what arrives at the destination is not its VM yet
for cmd in start stop delete pause console; do
	refuse 3 "VM vm1 is arriving from host hosta" snvm b "$cmd" vm1
done
refuse 3 "VM vm1 is arriving from host hosta" snmigrate b cancel vm1
refuse 3 "VM vm1 is arriving from host hosta" snmigrate b vm1 hosta --with-storage
refuse 3 "no VM named vm9" snmigrate b resolve vm9 --run-here
snmigrate a watch vm1 --json >"$T/watch.json" 2>"$T/watch.err" &
watcher=$!
snmigrate a watch vm1 >"$T/watch.txt" 2>&1 &
second=$!
sleep 1
fast
rc=0; wait $watcher || rc=$?
[ $rc = 0 ] || fail "watch: exit $rc: $(cat "$T/watch.err")"
check_lines "$T/watch.json" moved
rc=0; wait $second || rc=$?
[ $rc = 0 ] && grep -q "VM vm1 moved to hostb" "$T/watch.txt" || fail "the second watch: exit $rc: $(cat "$T/watch.txt")"
assert_good "$(wait_hb b vm1 "${SEEN[vm1]}")"
SEEN[vm1]=$(hb_field "$(wait_hb b vm1)" seq)
clean a
echo "watch: $(tail -n 1 "$T/watch.json")"

# --max-downtime: wrong values are usage; a generous one ends pre-copy sooner than a tight one on the same slow link
for bad in 0 -1 fast 5s ''; do refuse 2 "max-downtime" snmigrate b vm1 hosta --with-storage --max-downtime "$bad"; done
ns b tc qdisc replace dev eth0 root tbf rate 800mbit burst 256kb latency 100ms
snmigrate b vm1 hosta --with-storage --json --max-downtime 2000 >"$T/move.json" || fail "--max-downtime 2000: exit $?: $(tail -n 1 "$T/move.json")"
check_lines "$T/move.json" moved
echo "--max-downtime 2000: $(tail -n 1 "$T/move.json" | jq -c '[.rounds, .downtime_ms]')"
loose=$(tail -n 1 "$T/move.json" | jq .rounds)
ns b tc qdisc del dev eth0 root
slow 800mbit
snmigrate a vm1 hostb --with-storage --json --max-downtime 40 >"$T/move.json" || fail "--max-downtime 40: exit $?: $(tail -n 1 "$T/move.json")"
check_lines "$T/move.json" moved
echo "--max-downtime 40: $(tail -n 1 "$T/move.json" | jq -c '[.rounds, .downtime_ms]')"
tight=$(tail -n 1 "$T/move.json" | jq .rounds)
fast
[ "$loose" -lt "$tight" ] || fail "--max-downtime 2000 took $loose rounds, --max-downtime 40 took $tight: the option does nothing"
snvm b stop --force vm1
snvm b delete vm1

# A guest that powers itself off during the move ends it; the VM is stopped, at the source. ACPI sleep control: S5, enable.
native_vm a vm2 128M "ws=8 rate=10 touch=8 zero=1 disk=rw diskrate=100 span=8 hb=100 poweroff=io:0x600:0x34:8"
wait_touched a vm2
slow 20mbit
: >"$T/move.json"
snmigrate a vm2 hostb --with-storage --json >"$T/move.json" 2>"$T/move.err" &
mover=$!
wait_phase "$T/move.json" storage
printf q | timeout 5 socat -u - "UNIX-CONNECT:$(vm_dir a vm2)/console.sock"
rc=0; wait $mover || rc=$?
fast
echo "power-off in the move: exit $rc: $(cat "$T/move.err")"
[ $rc = 4 ] || fail "power-off in the move: exit $rc: $(tail -n 1 "$T/move.json")"
check_lines "$T/move.json" failed
wait_state a vm2 stopped 10
clean a; clean b
[ "$(vm_state b vm2)" = absent ] || fail "the destination lists it: $(vm_state b vm2)"
snvm a start vm2
assert_good "$(wait_hb a vm2)"

# After COMMIT it is too late to cancel, and the command says so: the move ends well.
snvm a stop --force vm2
daemon_kill a TERM
mkdir "$T/fault"
daemon_start a SNM_FAULT=after-commit:hold "SNM_FAULT_DIR=$T/fault"
snvm a start vm2
seq=$(hb_field "$(wait_hb a vm2)" seq)
snmigrate a vm2 hostb --with-storage --json >"$T/move.json" 2>"$T/move.err" &
mover=$!
for _ in $(seq 300); do [ -e "$T/fault/after-commit.hit" ] && break; sleep 0.05; done
refuse 3 "too late to cancel" snmigrate a cancel vm2
touch "$T/fault/after-commit.go"
rc=0; wait $mover || rc=$?
[ $rc = 0 ] || fail "a cancel that came too late: exit $rc: $(tail -n 1 "$T/move.json")"
check_lines "$T/move.json" moved
assert_good "$(wait_hb b vm2 "$seq")"
[ "$(vm_state a vm2)" = absent ] || fail "vm2 is at both hosts"
echo "figure: $checks refusals; rounds with --max-downtime 2000: $loose, with 40: $tight"
