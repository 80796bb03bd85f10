#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# snmigrate check against two live hosts: nothing in the way, then what can be provoked here, one by one, each with what to do; that a
# check changes nothing; and that a refused move tells every reason at once. (The rest of the lines: tests/unit/host/test_check.c.)
source "$(dirname "$0")/lib.sh"
source "$(dirname "$0")/refuse_lib.sh"
require_kvm
DISK_MB=64
FILL_MB=16
SILENCE_MS=3000
hosts_up
trap 'rc=$?; umount "$T/b/state" 2>/dev/null || true; (exit $rc); hosts_down' EXIT
native_vm a vm1 64M "ws=8 rate=20 touch=8 zero=1 disk=rw diskrate=100 span=8 hb=100"
wait_touched a vm1
tree() { (cd "$T/b/state" && find . ! -name check.lock ! -name 'journal.db*' ! -path './logs*' ! -name lock | sort); }
# checked EXIT LINE RESULT TEXT DO: what the report says on that line
checked() {
	local status=$1 rc=0 got
	shift
	snmigrate a check "${VM:-vm1}" "${TO:-hostb}" --json >"$T/check.json" 2>"$T/check.err" || rc=$?
	[ $rc = "$status" ] || fail "check: exit $rc, not $status: $(cat "$T/check.json" "$T/check.err")"
	got=$(jq -r --arg l "$1" '.lines[] | select(.check == $l) | .result' "$T/check.json")
	[ "$got" = "$2" ] || fail "$1 is '$got', not $2: $(cat "$T/check.json")"
	jq -e --arg l "$1" --arg t "$3" --arg d "$4" '.lines[] | select(.check == $l) | (.text | contains($t)) and (.do | contains($d))' "$T/check.json" >/dev/null ||
		fail "$1 does not say '$3' and '$4': $(jq -c --arg l "$1" '.lines[] | select(.check == $l)' "$T/check.json")"
	checks=$((checks + 1))
	echo "$1: $(jq -r --arg l "$1" '.lines[] | select(.check == $l) | .text' "$T/check.json")"
}

# --- nothing is in the way ---
before=$(tree)
snmigrate a check vm1 hostb || fail "check: exit $?"
checked 0 link pass "MB/s on one connection, round trip" ""
jq -e '[.lines[] | select(.result == "failure")] == [] and (.lines | length) == 20' "$T/check.json" >/dev/null || fail "check: $(cat "$T/check.json")"
jq -e '.measured | .link_bytes_per_s > 1000000 and .round_trip_us > 0 and (.clock_offset_ms | fabs) < 1000' "$T/check.json" >/dev/null || fail "measured: $(jq .measured "$T/check.json")"
jq -e '.predicted.total_ms > 0 and .predicted.downtime_most_ms >= 50' "$T/check.json" >/dev/null || fail "predicted: $(jq .predicted "$T/check.json")"
for l in vm trust versions cpu tsc admission memory bridges mtu clock dirty-rate; do checked 0 $l pass "" ""; done
checked 0 dirty-rate pass "the guest changes" ""
snvm a pause vm1
checked 0 dirty-rate pass "not measured" ""
snvm a resume vm1
[ "$(tree)" = "$before" ] || fail "a check changed the destination: $(diff <(echo "$before") <(tree))"
clean b

# --- the link ---
ns b tc qdisc replace dev eth0 root tbf rate 40mbit burst 32kb latency 100ms
ns a tc qdisc replace dev eth0 root tbf rate 40mbit burst 32kb latency 100ms
checked 0 link warning "MB/s on one connection" "take long"
jq -e '.measured.link_bytes_per_s | . > 2000000 and . < 8000000' "$T/check.json" >/dev/null || fail "40 Mbit/s were measured as $(jq .measured.link_bytes_per_s "$T/check.json") bytes a second"
ns a tc qdisc del dev eth0 root
ns b tc qdisc del dev eth0 root

# --- the destination's daemon: name, arrivals, bridges, disk ---
ns a ip link set br0 mtu 1400
cat >"$T/net.ini" <<INI
[vm]
name = vmnet
memory = 64M
cpus = 1
kernel = $GUEST
cmdline = ws=8 rate=20 touch=8 zero=1 hb=100 idle=1
serial = socket
[net lan]
bridge = br0
[net dmz]
bridge = br1
INI
ns a ip link add br1 type bridge
ns a ip link set br1 up
snvm a create "$T/net.ini"
snvm a start vmnet
VM=vmnet checked 3 bridges failure "net dmz: bridge br1" "make the bridge on hostb"
VM=vmnet checked 3 mtu pass "" ""
ns b ip link add br1 type bridge
ns b ip link set br1 mtu 1300
VM=vmnet checked 0 bridges pass "" ""
VM=vmnet checked 0 mtu warning "MTU of 1500 here and 1300 on hostb" "ip link set br1 mtu 1500"
ns b ip link del br1

native_vm b vm1 64M "ws=8 rate=20 touch=8 zero=1 disk=rw diskrate=100 span=8 hb=100"
checked 3 admission failure "another VM named vm1 is already on host hostb" "hostb"
# a move says no itself, and says everything that it can: name and bridge
sed -i 's/name = vmnet/name = vmnet2/' "$T/net.ini"
native_vm b vmnet2 64M "ws=8 rate=20 touch=8 zero=1 disk=rw diskrate=100 span=8 hb=100"
snvm a create "$T/net.ini"
snvm a start vmnet2
refuse 3 "net dmz: .*br1.*; another VM named vmnet2" snmigrate a vmnet2 hostb --with-storage
for vm in vmnet vmnet2; do snvm a stop --force $vm; snvm a delete $vm; done
for vm in vm1 vmnet2; do snvm b stop --force $vm; snvm b delete $vm; done
daemon_kill b TERM
echo 'max-incoming = 0' >>"$T/b/host.ini"
sed -i '/^max-incoming/d; s/^retry-for.*/&\nmax-incoming = 0/' "$T/b/host.ini"
daemon_start b
checked 3 admission failure "host hostb takes at most 0 arrivals" "hostb"
sed -i '/^max-incoming/d' "$T/b/host.ini"
# a small file system without O_DIRECT
daemon_kill b TERM
mount -t tmpfs -o size=80m tmpfs "$T/b/state"
daemon_start b
checked 3 disk-space failure "MiB of disk free" "make room on hostb"
checked 3 disk-speed warning "not measured" "check again"
daemon_kill b TERM
umount "$T/b/state"

# --- nobody there, or somebody else ---
checked 3 trust failure "Connection refused" "snmigrated runs on hostb"
[ "$(jq '.lines | length' "$T/check.json")" = 2 ] || fail "lines without a destination: $(cat "$T/check.json")"
TO=hostc checked 3 trust failure "no [peer hostc]" ""
"$BIN/snmigrate" pki init "$T/other" >/dev/null
"$BIN/snmigrate" pki issue "$T/other" hostb 10.9.0.2 >/dev/null
cp "$T/b/host.ini" "$T/b/host.ini.good"
sed -i "s|$T/pki|$T/other|" "$T/b/host.ini"
daemon_start b
checked 3 trust failure "" "certificates"
daemon_kill b TERM
cp "$T/b/host.ini.good" "$T/b/host.ini"
daemon_start b

# --- the VM ---
kill -KILL "$(pids_in a snvmm)"
wait_state a vm1 crashed
checked 3 vm failure "VM vm1 is crashed" "snvm start vm1"
snvm a stop vm1
checked 0 vm pass "VM vm1 is stopped on hosta" ""
snvm a start vm1
refuse 3 "no VM named vm9" snmigrate a check vm9 hostb
refuse 3 "VM vm1 is on host hosta already" snmigrate a check vm1 hosta

# --- after a move the dirty rate of a paused VM is known, too; the prediction is of the right size ---
wait_touched a vm1
checked 0 vm pass "is running on hosta" ""
predicted=$(jq .predicted.total_ms "$T/check.json")
snmigrate a vm1 hostb --with-storage --json >"$T/move.json" || fail "move: exit $?: $(tail -n 1 "$T/move.json")"
echo "predicted $predicted ms, took $(tail -n 1 "$T/move.json" | jq .total_ms) ms"
for _ in $(seq 50); do snmigrate b history vm1 --json | tail -n 1 | jq -e .ended_ms >/dev/null && break; sleep 0.1; done
snvm b pause vm1
snmigrate b check vm1 hosta --json >"$T/check.json" || fail "check: exit $?: $(cat "$T/check.json")"
jq -e '.lines[] | select(.check == "dirty-rate") | .text | contains("at its last move")' "$T/check.json" >/dev/null || fail "dirty rate: $(cat "$T/check.json")"
snvm b resume vm1
assert_good "$(wait_hb b vm1)"
echo "figure: $checks lines; predicted $predicted ms, took $(tail -n 1 "$T/move.json" | jq .total_ms) ms"
