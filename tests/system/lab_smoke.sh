#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Alone: emulated hosts
# The lab itself: two hosts with a working /dev/kvm, control path, network cut, power loss, and the Linux guest run by QEMU
# in a host, judged as the tests of snmigrate judge it. What fails here is not snmigrate's fault.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PATH=$PATH:/usr/sbin:/sbin

skip() {
	echo "skipped: $*"
	exit 77
}
[[ ${SNM_BRIEF:-} != 1 ]] || skip "in the check, linux_moves.sh uses the whole lab; make soak runs this"
command -v qemu-system-x86_64 >/dev/null || skip "qemu-system-x86_64 is missing"
command -v busybox >/dev/null || skip "busybox is missing"
[[ -w /dev/net/tun ]] || skip "/dev/net/tun is not accessible"

work=$(mktemp -d)
export LAB_DIR=$work/lab
lab() { "$repo/tools/lab" "$@"; }
collector_pids=()
# shellcheck disable=SC2317
cleanup() {
	local status=$?
	if ((status != 0)) && [[ -e $LAB_DIR/conf ]]; then
		echo "--- guest's console:"
		lab exec host1 tail -n 60 /var/lib/guest/console </dev/null || true
		echo "--- kernel of host1:"
		lab exec host1 dmesg </dev/null | tail -n 20 || true
	fi
	((${#collector_pids[@]} == 0)) || kill "${collector_pids[@]}" 2>/dev/null || true
	lab down || true
	rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 1' INT TERM HUP

step() { echo "$(date +%T) $*"; }
fail() {
	echo "FAILED: $*"
	exit 1
}

step "both hosts start"
lab up --with-qemu --no-daemon --owner $$
lab status

step "each host has a KVM of its own"
for host in host1 host2; do
	lab exec $host sh -c 'test -c /dev/kvm && test -d /sys/module/kvm' </dev/null || fail "$host has no /dev/kvm"
done

step "exec passes exit status, stdout, stderr and stdin, and many run at once"
status=0
out=$(echo input | lab exec host1 sh -c 'cat; echo error >&2; exit 42' 2>"$work/err") || status=$?
[[ $status == 42 && $out == input && $(<"$work/err") == error ]] || fail "exec: status $status, out '$out'"
pids=()
for i in {1..8}; do
	lab exec host$((i % 2 + 1)) sh -c "sleep 1; echo $i" </dev/null >"$work/out$i" &
	pids+=($!)
done
for i in {1..8}; do
	wait "${pids[i - 1]}" || fail "exec $i failed"
	[[ $(<"$work/out$i") == "$i" ]] || fail "exec $i printed '$(<"$work/out$i")'"
done

step "push and pull keep every byte, and holes"
head -c 5000001 /dev/urandom >"$work/a"
truncate -s 1G "$work/a"
chmod 0750 "$work/a"
lab push host2 "$work/a" /var/lib/a
lab pull host2 /var/lib/a "$work/b" </dev/null
cmp "$work/a" "$work/b"
[[ $(stat -c %a "$work/b") == 750 ]] || fail "the mode changed on the way"
if lab push host2 "$work/a" /nowhere/a 2>/dev/null; then fail "push to a missing folder succeeded"; fi
if lab pull host2 /nowhere "$work/c" </dev/null 2>/dev/null || [[ -e $work/c ]]; then fail "pull of a missing file succeeded"; fi
(($(lab exec host2 stat -c %b /var/lib/a </dev/null) * 512 < 8000000)) || fail "push filled the holes"

step "cut and heal"
ping_peer() { lab exec host1 ping -q -c 2 -i 0.2 -W 1 10.77.0.2 </dev/null >/dev/null; }
ping_peer || fail "no network between the hosts"
lab exec host2 sh -c 'nc -l -p 9000 >/tmp/received' </dev/null &
listener=$!
# shellcheck disable=SC2016
lab exec host1 sh -c 'for i in $(seq 50); do echo $i; sleep 0.1; done | socat -u - TCP:10.77.0.2:9000,retry=50,interval=0.2' </dev/null &
sender=$!
sleep 1
lab cut
if ping_peer; then fail "packets pass the cut"; fi
lab net busybox ping -q -c 1 -W 2 10.77.0.2 >/dev/null || fail "the cut keeps this machine from host2"
lab heal
ping_peer || fail "heal does not heal"
wait $sender || fail "a connection did not survive a short cut"
wait $listener || fail "the listener failed"
(($(lab exec host2 sh -c 'wc -l </tmp/received' </dev/null) == 50)) || fail "bytes were lost in the cut"
lab cut host2
if lab net busybox ping -q -c 1 -W 1 10.77.0.2 >/dev/null; then fail "host2 is not cut off"; fi
lab heal

step "power loss keeps what was synced, and only the killed host is gone"
lab exec host2 sh -c 'echo durable >/var/lib/durable && sync /var/lib/durable' </dev/null
lab kill host2
lab exec host1 true </dev/null || fail "host1 died with host2"
if lab exec host2 true </dev/null 2>/dev/null; then fail "host2 is still there"; fi
lab boot host2
[[ $(lab exec host2 cat /var/lib/durable </dev/null) == durable ]] || fail "the disk of host2 was lost"

step "the Linux guest is built and copied to host1"
"$repo/tests/linux-guest/build" "$work/guest"
lab exec host1 mkdir -p /var/lib/guest </dev/null
for file in vmlinuz initrd root.qcow2 data.raw; do lab push host1 "$work/guest/$file" /var/lib/guest/$file; done
step "it boots under KVM in host1"
"$repo/tools/lab" net "$work/guest/collector" listen 7001 "$work/records.log" &
collector_pids+=($!)
# shellcheck disable=SC2016
lab exec host1 sh -ec '
	cd /var/lib/guest
	ip tuntap add dev tap0 mode tap
	ip link set tap0 master br0
	ip link set tap0 up
	setsid qemu-system-x86_64 -accel kvm -cpu host -m 512 -smp 2 -nodefaults -display none -machine pc \
		-kernel vmlinuz -initrd initrd \
		-append "console=ttyS0 loglevel=5 panic=-1 guest.ip=10.77.0.100/24 guest.collector=10.77.0.254" \
		-drive file=root.qcow2,format=qcow2,if=virtio -drive file=data.raw,format=raw,if=virtio \
		-netdev tap,id=n,ifname=tap0,script=no,downscript=no -device virtio-net-pci,netdev=n,romfile= \
		-device virtio-rng-pci -serial file:console -monitor unix:monitor,server=on,wait=off \
		</dev/null >qemu.log 2>&1 &
	echo $! >qemu.pid' </dev/null

wait_for() { # SECONDS WHAT CMD...
	local i seconds=$1 what=$2
	shift 2
	for ((i = 0; i < seconds * 5; i++)); do
		if "$@"; then return; fi
		sleep 0.2
	done
	lab exec host1 cat /var/lib/guest/qemu.log </dev/null || true
	fail "no $what within $seconds s"
}
records_of() { "$work/guest/collector" summary "$work/records.log" | jq "select(.stream == \"$1\") | .count"; }
has_records() {
	local root data
	root=$(records_of root) && data=$(records_of data)
	((${root:-0} >= $1 && ${data:-0} >= $1))
}
wait_for 60 "records from the guest" has_records 1
step "its records arrive"
"$repo/tools/lab" net "$work/guest/collector" watch 10.77.0.100 7000 "$work/counter.log" &
collector_pids+=($!)
wait_for 60 "100 records from the guest" has_records 100
lab net busybox nc 10.77.0.100 7002 </dev/null >"$work/dmesg"
grep -q 'Linux version' "$work/dmesg" || fail "the guest does not send its kernel's messages"

step "the power button ends it cleanly, and every record that arrived is on its disks"
lab exec host1 sh -c 'echo system_powerdown | socat - UNIX:/var/lib/guest/monitor >/dev/null' </dev/null
# shellcheck disable=SC2016
wait_for 30 "end of the guest" lab exec host1 sh -c '! kill -0 $(cat /var/lib/guest/qemu.pid) 2>/dev/null' </dev/null
lab exec host1 cat /var/lib/guest/console </dev/null | tr -d '\r' >"$work/console"
grep -E 'guest: (ready|powering off)' "$work/console"
(($(grep -c 'guest: ready' "$work/console") == 1)) || fail "the guest rebooted"
if grep -E 'I/O error|lockup|stall|went back|Call Trace|connection lost|cannot' "$work/console"; then
	fail "the guest's console shows errors"
fi
"$work/guest/collector" summary "$work/records.log"
"$work/guest/collector" summary "$work/counter.log"
[[ $("$work/guest/collector" summary "$work/counter.log" | jq '.connections == 1 and .out_of_order == 0') == true ]] ||
	fail "the counter's connection did not hold"
[[ $("$work/guest/collector" summary "$work/records.log" | jq -s 'all(.connections == 1 and .out_of_order == 0)') == true ]] ||
	fail "the recorders' connections did not hold"
for image in root.qcow2 data.raw; do lab pull host1 /var/lib/guest/$image "$work/$image" </dev/null; done
"$repo/tests/linux-guest/verify" "$work/guest" "$work/root.qcow2" "$work/data.raw" "$work/records.log"

step "the hosts' clocks agree with this machine's"
for host in host1 host2; do
	ahead=$(($(lab exec $host date +%s </dev/null) - $(date +%s)))
	((ahead >= -2 && ahead <= 2)) || fail "the clock of $host is $ahead s ahead"
done

step "the judge finds a lost record"
echo "999999999 1 99999999" >>"$work/records.log"
if "$repo/tests/linux-guest/verify" "$work/guest" "$work/root.qcow2" "$work/data.raw" "$work/records.log" >/dev/null 2>"$work/err"; then
	fail "a record that is not on the disk went unnoticed"
fi
grep -q 'acknowledged and are not on the disk' "$work/err"

step "down leaves nothing"
kill "${collector_pids[@]}" 2>/dev/null || true
wait "${collector_pids[@]}" 2>/dev/null || true
collector_pids=()
lab net sleep 1000 &
lab down
wait $! 2>/dev/null || true
if pgrep -f -- "$LAB_DIR" >"$work/left"; then fail "processes are left: $(<"$work/left")"; fi
[[ ! -e $LAB_DIR ]] || fail "$LAB_DIR is left"
step passed
