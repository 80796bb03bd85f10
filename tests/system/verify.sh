#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Long: make memory-faults
# SNM_VERIFY=1: at each handover both sides agree on all of the guest's memory and device state before the destination may run it;
# one byte that is not as it should be, in either, is found and named, and the guest goes on at its source.
source "$(dirname "$0")/lib.sh"
source "$(dirname "$0")/refuse_lib.sh"
require_kvm
DISK_MB=32 CPUS=2
hosts_up SNM_VERIFY=1
native_vm a vm1 128M "ws=24 rate=60 touch=16 scan=40 fill=few span=16 hb=300"
wait_touched a vm1

# move HOST EXIT OPTION...
move() {
	local rc=0
	snmigrate "$1" vm1 "host$(other "$1")" --with-storage --json "${@:3}" >"$T/move.json" 2>"$T/move.err" || rc=$?
	end=$(tail -n 1 "$T/move.json")
	[ $rc = "$2" ] || fail "${*:3}: exit $rc, not $2: $end"
}
says() { jq -e "$1" <<<"$end" >/dev/null || fail "$2: $end"; }

move a 0
assert_good "$(wait_hb b vm1)"
# 64 regions; machine, two vCPUs, irqchip, pci, serial, power, two disks, rng
says '.verified.memory_pieces == 64 and .verified.left_out == 0 and .verified.sections >= 8' "verified"
grep -q "verified: 64 pieces of memory (0 left out), $(jq .verified.sections <<<"$end") sections of device state agree" "$T"/b/state/logs/* ||
	fail "the destination says nothing of it"
whole=$(jq -c .verified <<<"$end")
# deltas, and the last round over all streams
move b 0 --bandwidth 40M --compress off --priority guest --max-rounds 5
says '.verified.left_out == 0 and .delta_pages > 100' "deltas"
assert_good "$(wait_hb a vm1)"
move a 0 --suspend
says '.verified.left_out == 0' "suspended"
snvm b resume vm1
assert_good "$(wait_hb b vm1)"
move b 0 --postcopy now
says '.verified.memory_pieces == 64 and .verified.left_out > 0 and .verified.left_out < 64' "post-copy"
late=$(jq .verified.left_out <<<"$end")
assert_good "$(wait_hb a vm1)"

# A byte that flips at the destination.
daemon_kill b TERM
mkdir "$T/faults"
daemon_start b SNM_VERIFY=1 SNM_FAULT=d-flip-memory:failif,d-flip-device:failif SNM_FAULT_DIR="$T/faults"
touch "$T/faults/d-flip-memory.fail"
move a 4
says '.result == "failed" and (.reason | test("verify: guest memory differs in 1 of 64 pieces, first in the 2048 KiB at byte 0x4000000$"))' "memory"
untouched a vm1
echo "memory: $(jq -r .reason <<<"$end")"
rm "$T/faults/d-flip-memory.fail"
touch "$T/faults/d-flip-device.fail"
move a 4
says '.result == "failed" and (.reason | test("verify: device state: section serial differs at byte [0-9]+"))' "device"
untouched a vm1
echo "device: $(jq -r .reason <<<"$end")"
rm "$T/faults/d-flip-device.fail"
move a 0
says '.verified.left_out == 0' "afterwards"
assert_good "$(wait_hb b vm1)"
downtime=$(jq .downtime_ms <<<"$end")

# It is the source's to ask for; without it nothing is compared.
daemon_kill a TERM
daemon_start a
move b 0
says '.verified.memory_pieces == 64' "to a host without the variable"
move a 0
says 'has("verified") | not' "without the variable"
assert_good "$(wait_hb b vm1)"
echo "figure: $whole; post-copy: $late of 64 pieces left out; moved in $downtime ms of downtime"
