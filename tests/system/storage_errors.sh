#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Storage that fails during a move: the guest runs on at the source, the command says what and where and ends with 4 (3 where
# it could be seen before anything was touched), and nothing half-made stays at the destination.
source "$(dirname "$0")/lib.sh"
source "$(dirname "$0")/refuse_lib.sh"
require_kvm
W=$(mktemp -d "${TMPDIR:-/var/tmp}/snm-errors.XXXXXX")
mkdir "$W/small"
loops=()
undo() {
	local l
	for l in "${loops[@]}"; do losetup -d "$l" 2>/dev/null || true; done
	umount -l "$W/small" 2>/dev/null || true
	[ -z "$T" ] || umount -l "$T/b/state" 2>/dev/null || true
	rm -rf "$W"
}
trap undo EXIT
skipped=0
part_skipped() { skipped=$((skipped + 1)); echo "skipped: $*"; }
LOOP_S='' LOOP_D=''
# A source device whose file will be cut; a destination device on a file system that is too small for it.
head -c 64M /dev/urandom >"$W/source.dev"
if LOOP_S=$(losetup -f --show "$W/source.dev" 2>/dev/null); then loops+=("$LOOP_S"); fi
if mount -t tmpfs -o size=24m snm "$W/small" 2>/dev/null; then
	truncate -s 64M "$W/small/dev"
	if LOOP_D=$(losetup -f --show "$W/small/dev" 2>/dev/null); then loops+=("$LOOP_D"); fi
fi
LIMITS_EXTRA="[devices]
allow = ${LOOP_D:-/dev/none}"
hosts_up
trap 'undo; hosts_down' EXIT
daemon_kill b TERM
mkdir -p "$T/b/state.real"; mv "$T/b/state" "$T/b/state.real/state"; mkdir "$T/b/state"
mount -t tmpfs -o size=512m snm "$T/b/state"
daemon_start b

LOAD="ws=4 rate=10 touch=4 zero=1 disk=rw diskrate=50 span=8 hb=100 idle=1"
vm() { # NAME "DISK SECTIONS" [IMPORTS...]
	local name=$1 disks=$2
	shift 2
	printf '[vm]\nname = %s\nmemory = 64M\nkernel = %s\ncmdline = %s\n%s\n' "$name" "$GUEST" "$LOAD" "$disks" >"$T/$name.ini"
	snvm a create "$T/$name.ini" "$@" >/dev/null || fail "create $name"
	snvm a start "$name"
	wait_touched a "$name"
}
# Nothing half-made is to stay, not even to go on from later.
NO_PARTIAL=()
if "$BIN/snmigrate" --help | grep -q -- --keep-partial; then NO_PARTIAL=(--keep-partial 0); fi
# during NAME ACTION OPTION...: runs ACTION while NAME's disks are being copied, slowly; the move's exit status in RC
during() {
	local name=$1 action=$2 mover i
	shift 2
	wait_hb a "$name" >/dev/null
	snmigrate a "$name" hostb --with-storage --bandwidth 8M --json "${NO_PARTIAL[@]}" "$@" >"$T/move.json" 2>"$T/move.err" &
	mover=$!
	for i in $(seq 200); do grep -q '"phase": *"storage"' "$T/move.json" && break; sleep 0.05; done
	sleep 1
	"$action"
	snmigrate a tune "$name" --bandwidth 0 2>/dev/null || true
	RC=0
	wait $mover || RC=$?
}
failed() { # NAME STATUS TEXT: so ended the move, and nothing has changed
	local reason
	reason=$(tail -n 1 "$T/move.json" | jq -r .reason)
	[ "$RC" = "$2" ] || fail "$1: exit $RC, not $2: $reason"
	grep -q -- "$3" <<<"$reason" || fail "$1: '$3' is not in: $reason"
	checks=$((checks + 1))
	echo "failed ($RC): $reason"
	untouched a "$1"
	[ -z "$(ls -A "$T/b/state/vms")" ] || fail "$1: left at hostb: $(ls "$T/b/state/vms")"
}
raw_vm() { # NAME
	head -c 64M /dev/urandom >"$W/$1.raw"
	vm "$1" "[disk root]
path = root.raw
format = raw" --import "root=$W/$1.raw"
	rm -f "$W/$1.raw"
}
end_vm() { snvm a stop --force "$1"; snvm a delete "$1"; }

# --- the destination becomes full, and later has room again
raw_vm e1
fill() { head -c 1G /dev/zero >"$T/b/state/filler" 2>/dev/null || true; }
during e1 fill
failed e1 4 "disk root: .* of [0-9]* bytes at [0-9]*: No space left on device, at hostb"
rm -f "$T/b/state/filler"
snmigrate a e1 hostb --with-storage >/dev/null || fail "e1 did not move once there was room"
assert_good "$(wait_hb b e1)"
snvm b stop --force e1; snvm b delete e1
head -c 64M /dev/urandom >"$W/e2.raw"; qemu-img convert -q -f raw -O qcow2 "$W/e2.raw" "$W/e2.qcow2"
vm e2 "[disk root]
path = root.qcow2
format = qcow2" --import "root=$W/e2.qcow2"
during e2 fill
failed e2 4 "disk root: .* of [0-9]* bytes at [0-9]*: No space left on device, at hostb"
rm -f "$T/b/state/filler" "$W"/e2.*

# --- qcow2: cut under us, before and during a move
image=$(vm_dir a e2)/root.qcow2
keep=$(stat -c %s "$image")
cut_qcow2() { truncate -s $((keep / 2)) "$image"; }
during e2 cut_qcow2
reason=$(tail -n 1 "$T/move.json" | jq -r .reason)
[ $RC = 4 ] || fail "a cut qcow2: exit $RC: $reason"
grep -q "disk root: $image on hosta was cut from [0-9]* to $((keep / 2)) bytes" <<<"$reason" || fail "a cut qcow2: $reason"
echo "failed ($RC): $reason"
checks=$((checks + 1))
clean b
[ "$(vm_state a e2)" = running ] || fail "e2 is $(vm_state a e2)"
refuse 3 "$image on hosta was cut from [0-9]* to $((keep / 2)) bytes" snmigrate a e2 hostb --with-storage
snvm a stop --force e2
refuse 3 "root.*truncated\|root.*qemu-img check" snvm a start e2
snvm a delete e2

# --- raw: cut, grown, exchanged
raw_vm e3
image=$(vm_dir a e3)/root.raw
cut_raw() { truncate -s 32M "$image"; }
during e3 cut_raw
[ $RC = 4 ] || fail "a cut raw file: exit $RC"
failed e3 4 "disk root.*hosta"
refuse 3 "disk root: $image on hosta was cut from 67108864 to 33554432 bytes" snmigrate a e3 hostb --with-storage
truncate -s 80M "$image"
refuse 3 "disk root: $image on hosta grew from 67108864 to 83886080 bytes" snmigrate a e3 hostb --with-storage
truncate -s 64M "$image"
grow() { truncate -s 65M "$image"; }
during e3 grow
failed e3 4 "disk root: $image on hosta grew from 67108864 to 68157440 bytes"
truncate -s 64M "$image"
cp "$image" "$W/other"; mv "$image" "$W/real"; cp "$W/other" "$image"
refuse 3 "disk root: $image on hosta is another file" snmigrate a e3 hostb --with-storage
untouched a e3
mv "$W/real" "$image" 2>/dev/null || true
snvm a stop --force e3
snvm a delete e3

# --- a source that cannot be read
if [ -z "$LOOP_S" ]; then
	part_skipped "source read error: no free loop device"
else
	vm e4 "[disk root]
path = $LOOP_S
format = raw"
	cut_device() { truncate -s 48M "$W/source.dev"; }
	during e4 cut_device
	failed e4 4 "disk root: .*read of the local disk at byte [0-9]* (sector [0-9]*): Input/output error, on hosta"
	end_vm e4
fi

# --- a destination that cannot be written
if [ -z "$LOOP_D" ]; then
	part_skipped "destination I/O error: no free loop device, or no tmpfs"
else
	raw_vm e5
	nothing() { :; }
	during e5 nothing --to-disk "root=$LOOP_D"
	failed e5 4 "disk root: .* of [0-9]* bytes at [0-9]*: \(Input/output error\|No space left on device\), at hostb"
	end_vm e5
fi

# --- corrupt images
head -c 8M /dev/urandom >"$W/c.raw"; qemu-img convert -q -f raw -O qcow2 "$W/c.raw" "$W/c.qcow2"
# an entry of the first L2 table that points nowhere
l1=$(od -A n -t u8 -j 40 -N 8 --endian=big "$W/c.qcow2" | tr -d ' ')
l2=$(($(od -A n -t u8 -j "$l1" -N 8 --endian=big "$W/c.qcow2" | tr -d ' ') & 0xffffffffffff))
printf '\200\000\000\000\000\001\002\003' | dd of="$W/c.qcow2" bs=1 seek=$l2 conv=notrunc status=none
printf '[vm]\nname = c1\nmemory = 64M\nkernel = %s\n[disk root]\npath = root.qcow2\nformat = qcow2\n' "$GUEST" >"$T/c1.ini"
refuse 3 "c.qcow2.*\(corrupt\|errors\)" snvm a create "$T/c1.ini" --import "root=$W/c.qcow2"
sed -i "s|^path = .*|path = $W/c.qcow2|" "$T/c1.ini"
refuse 3 "c.qcow2.*\(corrupt\|errors\)" snvm a create "$T/c1.ini"
[ -z "$(find "$T/a/state/creating" "$T/b/state/incoming" -mindepth 1)" ] || fail "half-made: $(find "$T/a/state/creating" "$T/b/state/incoming" -mindepth 1)"
echo "figure: $checks errors, each with what and where, the guest running on; $skipped parts skipped"
