#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# --keep-source --suspend: source and destination hold the same disks to the byte, as sparse as they were, and what is kept
# can be started by nobody.
source "$(dirname "$0")/lib.sh"
source "$(dirname "$0")/refuse_lib.sh"
require_kvm
DISK_MB=${DISK_MB:-256}
hosts_up
# Sparse disks: data in pieces, holes, clusters of zeroes, discarded ones; the guest works in the first 32 MiB.
mkdir "$T/make"
truncate -s "${DISK_MB}M" "$T/make/data.raw"
qemu-img create -q -f qcow2 "$T/make/root.qcow2" "${DISK_MB}M"
for f in "raw data.raw" "qcow2 root.qcow2"; do
	set -- $f
	qemu-io -f "$1" -c 'write -P 0xa5 40M 12M' -c 'write -P 0x5a 70M 8M' -c 'write -z 72M 1M' -c 'write -P 1 100M 512' \
		-c 'write -P 7 120M 16M' -c 'discard 124M 4M' -c 'write -z 160M 1M' -c 'write -P 9 255M 1M' "$T/make/$2" >/dev/null
done
dd if=/dev/urandom of="$T/make/data.raw" bs=1M seek=200 count=6 conv=notrunc status=none
cat >"$T/make/vm.ini" <<INI
[vm]
name = vm1
memory = 128M
kernel = $GUEST
cmdline = ws=16 rate=20 touch=8 zero=1 disk=rw diskrate=200 span=32 hb=100 idle=1 seed=5
[disk root]
path = root.qcow2
format = qcow2
[disk data]
path = data.raw
format = raw
INI
snvm a create "$T/make/vm.ini" --import "root=$T/make/root.qcow2" --import "data=$T/make/data.raw" >/dev/null
rm -rf "$T/make"
snvm a start vm1
wait_touched a vm1
wait_hb a vm1 >/dev/null
snmigrate a vm1 hostb --with-storage --keep-source --suspend --json >"$T/move.json" || fail "exit $?: $(tail -n 1 "$T/move.json")"
[ "$(tail -n 1 "$T/move.json" | jq -r .result)" = moved ] || fail "$(tail -n 1 "$T/move.json")"
[ "$(vm_state a vm1)" = absent ] || fail "the source still lists it: $(vm_state a vm1)"
wait_state b vm1 paused 5

# paused it stays, and says nothing
first=$(last_hb b vm1)
sleep 1
[ "$(vm_state b vm1)" = paused ] || fail "the guest does not stay paused: $(vm_state b vm1)"
[ "$(last_hb b vm1)" = "$first" ] || fail "a paused guest goes on: $first, $(last_hb b vm1)"
clean a

# what is kept: one folder, with both disks, that nothing starts
kept=$(echo "$T"/a/state/kept/*)
[ -d "$kept" ] || fail "no folder in kept: $kept"
[ "$(ls -A "$T/a/state/vms")" = "" ] || fail "vms is not empty at the source: $(ls "$T/a/state/vms")"
name=$(basename "$kept")
refuse 3 "no VM named $name" snvm a start "$name"
refuse 3 "not on host hosta any more: it moved to hostb" snvm a start vm1
refuse 3 "not on host hosta any more: it moved to hostb" snvm a resume vm1
# and when, once the journal has it; what its VMM said there is in its own log
for i in $(seq 50); do snmigrate a history vm1 --json | jq -se 'map(select(.direction == "out"))[-1].result == "moved"' >/dev/null && break; sleep 0.1; done
refuse 3 "it moved to hostb at $(date +%Y)-[0-9][0-9]-[0-9][0-9] [0-9][0-9]:[0-9][0-9]:[0-9][0-9]" snvm a info vm1
grep -q "arrives from hosta, epoch" "$T/b/state/logs/vm1.log" && grep -q "state incoming -> " "$T/b/state/logs/vm1.log" || fail "the log of vm1 at hostb: $(cat "$T/b/state/logs/vm1.log")"
grep -q "state incoming -> " "$T/b/state/logs/incoming.log" && fail "the log of arrivals has the VM's lines: $(cat "$T/b/state/logs/incoming.log")"
refuse 3 "vm1" snmigrate a vm1 hostb --with-storage
ns a timeout 10 "$BIN/snvmm" --config "$T/a/host.ini" --vm vm1 >"$T/out" 2>&1 && fail "snvmm runs what has moved away"
ns a timeout 10 "$BIN/snvmm" --config "$T/a/host.ini" --vm "$name" >"$T/out" 2>&1 && fail "snvmm runs what is kept"
ns a timeout 10 "$BIN/snvmm" --config "$T/a/host.ini" --vm "../kept/$name" >"$T/out" 2>&1 && fail "snvmm runs what is kept"
daemon_kill a TERM
daemon_start a
[ "$(snvm a list --json | jq length)" = 0 ] || fail "a new daemon lists what is kept"
[ "$(processes a snvmm)" = 0 ] || fail "a new daemon starts what is kept"

snvm b stop --force vm1
wait_state b vm1 stopped 5
there=$(vm_dir b vm1)
disk_path() { snvm b info vm1 --json | jq -r ".disks[] | select(.id == \"$1\") | .path"; }
root=$(disk_path root) data=$(disk_path data)
case $root in "$there"/*) ;; *) fail "the disk is not in the VM's own folder: $root" ;; esac
qemu-img compare -f qcow2 -F qcow2 "$kept/root.qcow2" "$root" || fail "root differs"
qemu-img compare -f raw -F raw "$kept/data.raw" "$data" || fail "data differs"
cmp "$kept/data.raw" "$data" || fail "data differs by cmp"
qemu-img check -q -f qcow2 "$kept/root.qcow2" || fail "qemu-img check of the source"
qemu-img check -q -f qcow2 "$root" || fail "qemu-img check of the destination"
[ "$(qemu-img info --output=json "$root" | jq -r .format)" = qcow2 ] || fail "the format did not survive"
for f in root data; do
	case $f in root) from=$kept/root.qcow2 to=$root ;; data) from=$kept/data.raw to=$data ;; esac
	s=$(($(stat -c %b "$from") * 512)) d=$(($(stat -c %b "$to") * 512))
	echo "figure: disk $f: allocated $s bytes at the source, $d at the destination ($(awk "BEGIN { printf \"%+.1f %%\", 100 * ($d - $s) / $s }"))"
	[ $((d * 100)) -le $((s * 105)) ] && [ $((d * 100)) -ge $((s * 95)) ] || fail "disk $f: allocated size not within 5 %"
done
# what the guest wrote before is still what it finds: it starts there and checks the sectors of its earlier life
snvm b start vm1
assert_good "$(wait_hb b vm1)"
