# SPDX-License-Identifier: Apache-2.0
# A Linux VM in the lab, its collector, and its judges. Sourced by the system tests and by tools/demo.
# shellcheck shell=bash
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PATH=$PATH:/usr/sbin:/sbin
VM=${VM:-vm1}
GUEST_IP=10.77.0.100
work= collector_pids=()
HOSTS=(host1 host2) # of the lab

skip() { echo "skipped: $*"; exit 77; }
step() { echo "$(date +%T) $*"; }
fail() { echo "FAILED: $*"; exit 1; }
lab() { "$repo/tools/lab" "$@"; }
on() { local h=$1; shift; lab exec "$h" "$@" </dev/null; }
state_of() { on "$1" snvm list --json | jq -r --arg n "$VM" '[.[] | select(.name == $n) | .state][0] // "absent"'; }

require_lab() {
	command -v qemu-system-x86_64 >/dev/null || skip "qemu-system-x86_64 is missing"
	command -v busybox >/dev/null || skip "busybox is missing"
	[[ -w /dev/net/tun ]] || skip "/dev/net/tun is not accessible"
}
# shellcheck disable=SC2317
linux_cleanup() {
	local status=$? h
	if ((status != 0)) && [[ -e $LAB_DIR/conf ]]; then
		for h in "${HOSTS[@]}"; do
			echo "--- $h:"
			lab log $h 2>/dev/null | tail -n 25 || true
			on $h sh -c 'tail -n 25 /var/lib/snmigrate/logs/* 2>/dev/null' || true
		done
		echo "--- guest's console:"; tail -n 40 "$work/console" 2>/dev/null || true
	fi
	((${#collector_pids[@]} == 0)) || kill "${collector_pids[@]}" 2>/dev/null || true
	if [[ -n ${SNM_KEEP:-} ]] && ((status != 0)); then echo "kept: LAB_DIR=$LAB_DIR"; return; fi
	lab down || true
	rm -rf "$work"
}
# linux_definition NAME MEMORY CPUS IP OPTIONS MAC: of a Debian VM with two disks; MAC: its last byte
linux_definition() {
	cat <<INI
[vm]
name = $1
memory = $2
cpus = $3
kernel = /var/lib/guest/vmlinuz
initrd = /var/lib/guest/initrd
cmdline = console=ttyS0 loglevel=5 panic=-1 guest.ip=$4/24 guest.collector=10.77.0.254 $5
serial = socket
[disk root]
path = root.qcow2
format = qcow2
[disk data]
path = data.raw
format = raw
[net lan]
bridge = br0
mac = 52:54:00:00:00:$6
INI
}
# linux_up [lab up options]: the lab, the guest's files, the VM running on host1, its collector
linux_up() {
	work=$(mktemp -d)
	export LAB_DIR=$work/lab
	trap linux_cleanup EXIT
	trap 'exit 1' INT TERM HUP
	# Emulated hosts answer slowly: what is 50 ms on hardware is not there.
	printf '[limits]\nretry-for = 0\nmirror-grace-ms = %s\nsilence-ms = %s\n' "${GRACE_MS:-3000}" "${SILENCE_MS:-10000}" >"$work/limits.ini"
	step "two hosts start"
	lab up --ini "$work/limits.ini" --owner $$ "$@"
	step "the Linux guest's files: kernel, initrd, ext4 on qcow2, ext4 on raw"
	"$repo/tests/linux-guest/build" "$work/guest"
	linux_definition "$VM" "${MEMORY:-512M}" 2 "$GUEST_IP" "guest.interval=${INTERVAL_MS:-5}" 01 >"$work/vm.ini"
	on host1 mkdir -p /var/lib/guest
	local file
	for file in vmlinuz initrd root.qcow2 data.raw; do lab push host1 "$work/guest/$file" /var/lib/guest/$file; done
	lab push host1 "$work/vm.ini" /var/lib/guest/vm.ini
	"$repo/tools/lab" net "$work/guest/collector" listen 7001 "$work/records.log" &
	collector_pids+=($!)
	step "the VM is created and started on host1"
	on host1 snvm create /var/lib/guest/vm.ini --import root=/var/lib/guest/root.qcow2 --import data=/var/lib/guest/data.raw
	on host1 rm -rf /var/lib/guest
	on host1 snvm start "$VM"
	console_follow host1
	wait_for 90 "records from the guest" has_records 1
	"$repo/tools/lab" net "$work/guest/collector" watch $GUEST_IP 7000 "$work/counter.log" &
	collector_pids+=($!)
	wait_for 30 "50 records from the guest" has_records 50
}
# The console from the host where the VM is into $work/console: what was kept (it travels with the VM), and what follows.
console_follow() {
	rm -f "$work/console"
	lab exec "$1" sh -c "socat -u UNIX-CONNECT:/var/lib/snmigrate/vms/$VM/console.sock - | tr -d '\r'" </dev/null >>"$work/console" 2>/dev/null &
	collector_pids+=($!)
}
wait_for() { # SECONDS WHAT CMD...
	local i seconds=$1 what=$2
	shift 2
	for ((i = 0; i < seconds * 5; i++)); do
		if "$@"; then return; fi
		sleep 0.2
	done
	fail "no $what within $seconds s"
}
records_of() { "$work/guest/collector" summary "$work/records.log" | jq "select(.stream == \"$1\") | .count"; }
has_records() {
	local root data
	root=$(records_of root) && data=$(records_of data)
	((${root:-0} >= $1 && ${data:-0} >= $1))
}
has_more_records() { # of both streams than so many
	local root data
	root=$(records_of root) && data=$(records_of data)
	((${root:-0} > $1 && ${data:-0} > $2))
}
# linux_move FROM TO: one move with all checks that can be made while the guest runs; prints its figures
linux_move() {
	local from=$1 to=$2 root data end
	root=$(records_of root) data=$(records_of data)
	lab exec "$from" snmigrate "$VM" "$to" --with-storage --json </dev/null >"$work/move.json" ||
		{ local rc=$?; tail -n 3 "$work/move.json"; fail "move $from -> $to: exit $rc"; }
	end=$(tail -n 1 "$work/move.json")
	[[ $(jq -r .result <<<"$end") == moved ]] || fail "move $from -> $to: $end"
	console_follow "$to"
	[[ $(state_of "$to") == running ]] || fail "$VM is $(state_of "$to") at $to"
	[[ $(state_of "$from") == absent ]] || fail "$from still lists $VM"
	on "$from" test ! -e "/var/lib/snmigrate/vms/$VM" || fail "the VM's folder is still at $from"
	[[ -z $(on "$from" sh -c 'busybox pidof snvmm qemu-nbd; true') ]] || fail "processes of the VM are left at $from"
	wait_for 30 "new records after the move" has_more_records "$((root + 20))" "$((data + 20))"
	jq -r --arg way "$from -> $to" '"\($way): total \(.total_ms) ms, storage \(.storage_ms) ms, memory \(.memory_ms) ms, downtime \(.downtime_ms) ms, rounds \(.rounds), \(.wire_bytes) bytes on the wire"' <<<"$end"
}
# linux_judge HOST: powers the guest off there and judges everything that it left
linux_judge() {
	local host=$1 image
	"$repo/tools/lab" net timeout 20 socat -u "TCP:$GUEST_IP:7002" - >"$work/dmesg" || fail "the guest's kernel messages cannot be had"
	(($(wc -l <"$work/dmesg") > 50)) || fail "the guest's kernel messages are too few"
	if grep -Ei 'I/O error|lockup|stall|hung|timekeeping watchdog|went back|backwards|Call Trace|BUG:|EXT4-fs (error|warning)' "$work/dmesg"; then fail "dmesg shows errors"; fi
	on "$host" snvm stop "$VM" --timeout 60
	[[ $(state_of "$host") == stopped ]] || fail "$VM is $(state_of "$host") after the power button"
	(($(grep -c 'guest: ready' "$work/console") == 1)) || fail "the guest rebooted, or its console was not seen"
	if grep -E 'I/O error|lockup|stall|went back|backwards|Call Trace|connection lost|cannot' "$work/console"; then fail "the guest's console shows errors"; fi
	"$work/guest/collector" summary "$work/records.log"
	"$work/guest/collector" summary "$work/counter.log"
	[[ $("$work/guest/collector" summary "$work/counter.log" | jq '.connections == 1 and .out_of_order == 0') == true ]] ||
		fail "the counter's connection did not hold"
	[[ $("$work/guest/collector" summary "$work/records.log" | jq -s 'all(.connections == 1 and .out_of_order == 0)') == true ]] ||
		fail "the recorders' connections did not hold"
	for image in root.qcow2 data.raw; do lab pull "$host" "/var/lib/snmigrate/vms/$VM/$image" "$work/$image" </dev/null; done
	"$repo/tests/linux-guest/verify" "$work/guest" "$work/root.qcow2" "$work/data.raw" "$work/records.log"
}
