#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A VM that is stopped moves by the same command: its disks keep shape and content and are proved, it is stopped at the destination and starts
# there, the source's files go afterwards. snvm start is held off meanwhile. Whoever is killed wherever: exactly one host has the VM.
source "$(dirname "$0")/lib.sh"
source "$(dirname "$0")/refuse_lib.sh"
require_kvm
DISK_MB=32 FILL_MB=8
hosts_up
cases=0
declare -A ran

sums() { # HOST VM: of what both disks read as
	local d
	d=$(vm_dir "$1" "$2")
	{ cat "$d/data.raw"; qemu-img convert -q -f qcow2 -O raw "$d/root.qcow2" "$T/as.raw"; cat "$T/as.raw"; } | sha256sum
}
# stopped_vm NAME: at a, off
stopped_vm() {
	local d=$T/make.$1
	mkdir -p "$d"
	head -c "${FILL_MB}M" /dev/urandom >"$d/data.raw"
	truncate -s "${DISK_MB}M" "$d/data.raw"
	qemu-img convert -q -f raw -O qcow2 "$d/data.raw" "$d/root.qcow2"
	printf '[vm]\nname = %s\nmemory = 64M\nkernel = %s\ncmdline = ws=4 rate=5 touch=4 zero=1 disk=rw diskrate=100 hb=200 idle=1 seed=%s\nserial = socket\n[disk root]\npath = root.qcow2\nformat = qcow2\n[disk data]\npath = data.raw\nformat = raw\n' \
		"$1" "$GUEST" "$cases" >"$d/vm.ini"
	snvm a create "$d/vm.ini" --import "root=$d/root.qcow2" --import "data=$d/data.raw" >/dev/null
	rm -rf "$d"
	[ "$(vm_state a "$1")" = stopped ] || fail "$1 is $(vm_state a "$1")"
}
last() { tail -n 1 "$T/move.json"; }

# --- there: content, sparseness, receipt; nothing runs, nothing stays behind ---
stopped_vm vm0
before=$(sums a vm0)
snmigrate a vm0 hostb --with-storage --json --receipt "$T/receipt.json" >"$T/move.json" || fail "cold: exit $?: $(last)"
jq -e 'select(.event == "end") | .result == "moved" and .cold and .downtime_ms == 0 and .memory_bytes == 0 and .left_behind == [] and .disk_bytes > 0' <<<"$(last)" >/dev/null || fail "cold: $(last)"
jq -e '.agreed and ([.disks[] | .root_source == .root_destination] | all)' "$T/receipt.json" >/dev/null || fail "receipt: $(cat "$T/receipt.json")"
[ "$(vm_state b vm0)" = stopped ] && [ "$(vm_state a vm0)" = absent ] || fail "vm0: hosta $(vm_state a vm0), hostb $(vm_state b vm0)"
[ ! -e "$(vm_dir a vm0)" ] || fail "the source's files are still there"
[ "$(sums b vm0)" = "$before" ] || fail "the disks differ"
allocated=$(($(stat -c %b "$(vm_dir b vm0)/data.raw") / 2048))
[ "$allocated" -le $((FILL_MB + 1)) ] || fail "data.raw has $allocated MiB allocated"
[ "$(pids_in a snvmm; pids_in b snvmm)" = "" ] || fail "a snvmm is left"
# at once, and it runs; and back while it does
snvm b start vm0 >/dev/null
assert_good "$(wait_hb b vm0)"
kill -KILL "$(pids_in b snvmm)"
wait_state b vm0 crashed; sleep 0.5
refuse 3 "VM vm0 is crashed: snvm start vm0, or snvm stop vm0" snmigrate b vm0 hosta --with-storage
snvm b start vm0 >/dev/null
wait_touched b vm0
snmigrate b vm0 hosta --with-storage >/dev/null || fail "hot after cold: exit $?"
assert_good "$(wait_hb a vm0)"
snvm a stop --force vm0 >/dev/null
# a qcow2 that a guest has written to, rehearsed, then moved with its source kept
before=$(sums a vm0)
snmigrate a rehearse vm0 hostb --with-storage >"$T/out" || fail "rehearse: exit $?: $(cat "$T/out")"
grep -q "stays here" "$T/out" || fail "rehearse: $(cat "$T/out")"
[ "$(vm_state a vm0)" = stopped ] || fail "rehearsed: $(vm_state a vm0)"
snmigrate a vm0 hostb --with-storage --keep-source >"$T/out" || fail "keep: exit $?"
grep -q "is stopped there" "$T/out" || fail "said: $(cat "$T/out")"
[ "$(sums b vm0)" = "$before" ] || fail "the disks differ after the rehearsal"
ls -d "$T"/a/state/kept/vm0-* >/dev/null || fail "the source was not kept"
rm -rf "$T"/a/state/kept
snmigrate b history | grep -q vm0 || fail "no history"
snvm b delete vm0 >/dev/null

# --- refusals ---
stopped_vm vm1
refuse 3 "VM vm1 has local disks" snmigrate a vm1 hostb
refuse 3 "VM vm1 is stopped: --suspend is for a guest that runs" snmigrate a vm1 hostb --with-storage --suspend
refuse 3 "VM vm1 is stopped: --mirror buffered is for a guest that runs" snmigrate a vm1 hostb --with-storage --mirror buffered
[ "$(vm_state a vm1)" = stopped ] && [ -z "$(pids_in a snvmm)" ] || fail "after the refusals: $(vm_state a vm1), $(pids_in a snvmm)"

# --- held off, cancelled, and whoever dies where ---
begin() { # FAULTS_A FAULTS_B: new daemons with these, a stopped VM, its move in the background
	local fa=$1 fb=$2
	cases=$((cases + 1)) vm=die$cases
	daemon_kill a TERM; daemon_kill b TERM
	rm -rf "$T/fault"; mkdir "$T/fault"
	daemon_start b "SNM_FAULT=$fb" "SNM_FAULT_DIR=$T/fault"
	daemon_start a "SNM_FAULT=$fa" "SNM_FAULT_DIR=$T/fault"
	stopped_vm $vm
	want=$(sums a $vm)
	snmigrate a $vm hostb --with-storage --json >"$T/move.json" 2>"$T/move.err" &
	mover=$!
}
reach() {
	local i
	for i in $(seq 300); do [ -e "$T/fault/$1.hit" ] && return 0; sleep 0.05; done
	cat "$T/move.json" "$T/move.err"; fail "$1 was not reached"
}
go() { local p; for p in "$@"; do touch "$T/fault/$p.go"; done; }
kill_snvmm() { local h p; for h in "$@"; do for p in $(pids_in "$h" snvmm); do kill -KILL "$p" 2>/dev/null || true; done; done; }
# ends EXIT HOST: the command's exit; the VM is stopped there and nowhere else, whole, with nothing left over; it starts
ends() {
	local rc=0 i h=$2 o
	o=$(other "$h")
	wait $mover || rc=$?
	[ $rc = "$1" ] || fail "$vm: exit $rc, not $1: $(last) $(cat "$T/move.err")"
	for i in $(seq 100); do
		[ "$(vm_state "$h" $vm)" = stopped ] && [ "$(vm_state "$o" $vm)" = absent ] && [ ! -e "$(vm_dir "$o" $vm)" ] &&
			[ -z "$(ls -A "$T/$o/state/incoming" 2>/dev/null)" ] && [ -z "$(pids_in a snvmm; pids_in b snvmm; pids_in a qemu-nbd; pids_in b qemu-nbd)" ] && break
		sleep 0.1
	done
	[ "$(vm_state "$h" $vm)" = stopped ] && [ "$(vm_state "$o" $vm)" = absent ] || fail "$vm: hosta $(vm_state a $vm), hostb $(vm_state b $vm)"
	[ ! -e "$(vm_dir "$o" $vm)" ] || fail "$vm: its folder is still at host$o"
	[ "$(sums "$h" $vm)" = "$want" ] || fail "$vm: the disks differ"
	snvm "$h" start $vm >/dev/null || fail "$vm does not start"
	[ -n "${ran[$h]:-}" ] || assert_good "$(wait_hb "$h" $vm)"
	ran[$h]=1
	snvm "$h" stop --force $vm >/dev/null
	snvm "$h" delete $vm >/dev/null
}
begin in-mirror:hold ""
reach in-mirror
refuse 3 "is stopped, and being moved" snvm a start $vm
refuse 3 "is stopped, and being moved" snvm a delete $vm
refuse 3 "" snvm a stop $vm
refuse 3 "" snmigrate a $vm hostb --with-storage
[ "$(snvm a list --json | jq -r --arg n $vm '.[] | select(.name == $n) | "\(.state) \(.migrating.destination)"')" = "stopped hostb" ] || fail "$vm: $(snvm a list --json)"
snmigrate a cancel $vm >/dev/null; go in-mirror
ends 5 a
# two commands at once: the second is refused as long as the process is the first one's, asked or not, and does not end it
begin move-before-asked:hold ""
reach move-before-asked
refuse 3 "another command is about to move it" snmigrate a $vm hostb --with-storage
go move-before-asked
ends 0 b
# nor does somebody's SIGTERM, once the VM may be the other host's
begin after-commit:hold ""
reach after-commit
kill -TERM "$(pids_in a snvmm)"; sleep 0.3
[ -n "$(pids_in a snvmm)" ] || fail "$vm: its snvmm ended between COMMIT and RUNNING"
go after-commit
ends 0 b
begin in-mirror:hold ""
reach in-mirror; kill -TERM "$(pids_in a snvmm)"
ends 4 a
# before COMMIT: at the source
begin in-mirror:hold ""; reach in-mirror; kill_snvmm a; ends 4 a
begin "" d-before-ready:kill; ends 4 a
begin after-ready:kill ""; ends 4 a
begin after-commit:hold d-commit-received:hold; reach after-commit; reach d-commit-received; kill_snvmm b; go after-commit; ends 4 a
# after it: at the destination
begin after-commit:hold ""; reach after-commit; sleep 0.3; kill_snvmm a; ends 0 b
begin "" d-owner-recorded:kill; ends 0 b
begin moved-recorded:kill ""; ends 0 b
# the daemons: the move goes on without them
begin in-mirror:hold d-owner-recorded:hold
reach in-mirror; daemon_kill a; daemon_kill b; daemon_start a "SNM_FAULT_DIR=$T/fault"; daemon_start b "SNM_FAULT_DIR=$T/fault"
go in-mirror; reach d-owner-recorded; daemon_kill b; daemon_start b "SNM_FAULT_DIR=$T/fault"; go d-owner-recorded
ends 0 b
echo "a stopped VM moved cold; $cases times interrupted, each time one owner"
