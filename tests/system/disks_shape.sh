#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What a disk is stays what it is: raw sparse, qcow2 with every property, read-only disks, backing files by choice, block
# devices at either end. Guests run while they move; source and destination are compared afterwards.
source "$(dirname "$0")/lib.sh"
source "$(dirname "$0")/refuse_lib.sh"
require_kvm
loops=()
drop_loops() { local l; for l in "${loops[@]}"; do losetup -d "$l" 2>/dev/null || true; done; }
mkdir -p "${TMPDIR:-/var/tmp}"
W=$(mktemp -d "${TMPDIR:-/var/tmp}/snm-shape.XXXXXX")
trap 'drop_loops; rm -rf "$W"' EXIT
skipped=0
PARTS=${PARTS:-1 2 3}
part() { [[ " $PARTS " = *" $1 "* ]]; }
part_skipped() { skipped=$((skipped + 1)); echo "skipped: $*"; }

# --- images, before the hosts: their configuration names some
rand() { head -c "$1" /dev/urandom; }
rand 48M >"$W/base.raw"; truncate -s 64M "$W/base.raw"
qemu-img convert -q -f raw -O qcow2 -o cluster_size=32k "$W/base.raw" "$W/same-content.qcow2"
cp "$W/base.raw" "$W/differs.raw"; printf x | dd of="$W/differs.raw" bs=1 seek=1000000 conv=notrunc status=none
LOOP_A='' LOOP_B=''
loop() { # FILE: a loop device on it
	local l
	l=$(losetup -f --show "$1" 2>/dev/null) || return 1
	echo "$l"
}
truncate -s 64M "$W/dev.a"; rand 20M | dd of="$W/dev.a" conv=notrunc status=none
rand 72M >"$W/dev.b"
if LOOP_A=$(loop "$W/dev.a"); then loops+=("$LOOP_A"); fi
if LOOP_B=$(loop "$W/dev.b"); then loops+=("$LOOP_B"); fi

# The hosts' own clean-up, with ours behind it.
LIMITS_EXTRA="[devices]
allow = ${LOOP_B:-/dev/none}, ${LOOP_A:-/dev/none}
[backing wrong]
path = $W/differs.raw
format = raw
[backing anything]
path = $W/same-content.qcow2
format = qcow2"
hosts_up
trap 'hosts_down; drop_loops; rm -rf "$W"' EXIT

LOAD="ws=4 rate=10 touch=4 zero=1 disk=rw diskrate=100 span=16 hb=100 idle=1"
# vm NAME "DISK SECTIONS" [IMPORTS...]
vm() {
	local name=$1 disks=$2
	shift 2
	printf '[vm]\nname = %s\nmemory = 64M\nkernel = %s\ncmdline = %s\n%s\n' "$name" "$GUEST" "${OPTIONS:-$LOAD}" "$disks" >"$T/$name.ini"
	snvm a create "$T/$name.ini" "$@" >/dev/null || fail "create $name"
	snvm a start "$name"
	wait_touched a "$name"
}
shape() { # IMAGE: what qemu-img says of it, but sizes in the file and names
	qemu-img info -U --output=json "$1" | jq -cS '{format, "virtual-size", "cluster-size", data: (."format-specific".data // {} | del(.corrupt))}'
}
allocated() { echo $(($(stat -c %b "$1") * 512)); }
# move_apart FROM VM TO OPTION...: guest left paused there, files kept here; both stopped then; sets KEPT and THERE
move_apart() {
	local from=$1 name=$2 to=$3 epoch
	shift 3
	wait_hb "$from" "$name" >/dev/null
	snmigrate "$from" "$name" "host$to" --with-storage --suspend --keep-source --json "$@" >"$T/move.json" 2>"$T/move.err" || fail "move of $name to host$to $*: $(cat "$T/move.err"; tail -n 1 "$T/move.json")"
	epoch=$(tail -n 1 "$T/move.json" | jq -r .epoch)
	KEPT=$T/$from/state/kept/$name-$epoch
	THERE=$(vm_dir "$to" "$name")
	[ -d "$KEPT" ] && [ -d "$THERE" ] || fail "$name: no $KEPT or $THERE"
	snvm "$to" stop --force "$name"
}
same() { qemu-img compare -U -f "$1" -F "$3" "$2" "$4" >"$T/compare" || fail "$2 and $4: $(cat "$T/compare")"; }
MIRRORED=$((4 << 20)) # what a guest may write during a short move
sound() { qemu-img check -q "$1" >"$T/check" 2>&1 || { [ $? = 3 ] || fail "$1: $(cat "$T/check")"; }; }
sent() { tail -n 1 "$T/move.json" | jq .disk_bytes; }
gone_from() { # HOST VM
	[ ! -e "$(vm_dir "$1" "$2")" ] || fail "the folder of $2 is still at host$1: $(ls "$(vm_dir "$1" "$2")")"
}

# --- 1. qcow2 in every shape, a sparse raw disk, read-only ones; written through the guest; there and back again
q() { rand 8M >"$W/fill"; truncate -s 64M "$W/fill"; qemu-img convert -q -f raw -O qcow2 -o "$2" "$W/fill" "$W/$1"; }
run_shapes() { # NAME OPTIONS...: a VM of at most 4 qcow2 disks, each with its options
	local name=$1 n=0 o sections='' imports=()
	shift
	for o in "$@"; do
		q "$name.d$n.qcow2" "$o"
		sections="$sections
[disk d$n]
path = d$n.qcow2
format = qcow2"
		imports+=(--import "d$n=$W/$name.d$n.qcow2")
		n=$((n + 1))
	done
	vm "$name" "$sections" "${imports[@]}"
	local i before after
	declare -A was
	for i in $(seq 0 $((n - 1))); do was[$i]=$(shape "$(vm_dir a "$name")/d$i.qcow2"); done
	move_apart a "$name" b
	for i in $(seq 0 $((n - 1))); do
		before=${was[$i]} after=$(shape "$THERE/d$i.qcow2")
		[ "$before" = "$after" ] || fail "shape of d$i of $name: $before became $after"
		same qcow2 "$KEPT/d$i.qcow2" qcow2 "$THERE/d$i.qcow2"
		sound "$THERE/d$i.qcow2"
		echo "shape kept: $after"
	done
	rm -rf "$KEPT"
	snvm b start "$name"
	wait_touched b "$name"
	snmigrate b "$name" hosta --with-storage >/dev/null || fail "$name back"
	gone_from b "$name"
	assert_good "$(wait_hb a "$name")"
	snvm a stop --force "$name"
	for i in $(seq 0 $((n - 1))); do
		[ "$(shape "$(vm_dir a "$name")/d$i.qcow2")" = "${was[$i]}" ] || fail "shape of d$i of $name after the way back"
		sound "$(vm_dir a "$name")/d$i.qcow2"
	done
	snvm a delete "$name"
}
if part 1; then
shapes=8
# the check (SNM_BRIEF=1) has four of them, make storage-faults all
[ "${SNM_BRIEF:-}" = 1 ] && shapes=4
[ $shapes = 4 ] || run_shapes s1 compat=0.10 compat=1.1,cluster_size=4k,lazy_refcounts=on compat=1.1,cluster_size=2M,refcount_bits=64 compat=0.10,cluster_size=512
run_shapes s2 extended_l2=on,cluster_size=128k extended_l2=on,cluster_size=16k,lazy_refcounts=on,compression_type=zstd refcount_bits=1,cluster_size=64k compression_type=zstd,lazy_refcounts=on
echo "figure: $shapes qcow2 shapes went there and back"

rand 1M >"$W/cd.iso"
qemu-img convert -q -f raw -O qcow2 "$W/cd.iso" "$W/ro.qcow2"
truncate -s 1G "$W/sparse.raw"; rand 4M | dd of="$W/sparse.raw" bs=1M seek=500 conv=notrunc status=none
OPTIONS="${LOAD/disk=rw/disk=ro}" vm r1 "[disk sparse]
path = sparse.raw
format = raw
[disk cd]
path = cd.iso
format = raw
read-only = yes
[disk ro]
path = ro.qcow2
format = qcow2
read-only = yes
[disk shared]
path = $W/cd.iso
format = raw
read-only = yes" --import "sparse=$W/sparse.raw" --import "cd=$W/cd.iso" --import "ro=$W/ro.qcow2"
move_apart a r1 b
[ "$(stat -c %s "$THERE/sparse.raw")" = 1073741824 ] || fail "size of the sparse disk"
[ "$(allocated "$THERE/sparse.raw")" -le $(($(allocated "$KEPT/sparse.raw") * 102 / 100 + 65536)) ] || fail "sparse: $(allocated "$KEPT/sparse.raw") became $(allocated "$THERE/sparse.raw")"
cmp "$THERE/sparse.raw" "$W/sparse.raw"
cmp "$THERE/cd.raw" "$W/cd.iso"
cmp "$THERE/shared.raw" "$W/cd.iso"
same qcow2 "$THERE/ro.qcow2" raw "$W/cd.iso"
[ "$(grep -c '^read-only = yes' "$THERE/vm.ini")" = 3 ] || fail "read-only did not travel"
snvm b start r1
wait_touched b r1
assert_good "$(wait_hb b r1)"
for p in $(pids_in b qemu-nbd); do tr '\0' ' ' <"/proc/$p/cmdline" | grep -q -- --read-only || fail "a read-only image is open for writing"; done
snvm b stop --force r1
snvm b delete r1
rm -rf "$KEPT"
[ -e "$W/cd.iso" ] || fail "a file outside the VM's folder was deleted"
echo "figure: sparse and read-only disks moved"
fi

# --- 2. backing files
make_chain() { # NAME: base.raw <- mid.qcow2 <- top.qcow2
	qemu-img create -q -f qcow2 -o cluster_size=16k -b "$W/base.raw" -F raw "$W/$1.mid.qcow2"
	qemu-io -f qcow2 -c 'write -P 17 20M 2M' -c 'write -z 1M 512k' "$W/$1.mid.qcow2" >/dev/null
	qemu-img create -q -f qcow2 -o "${TOP_OPTIONS:-extended_l2=on,cluster_size=128k}" -b "$W/$1.mid.qcow2" -F qcow2 "$W/$1.top.qcow2"
	qemu-io -f qcow2 -c 'write -P 18 40M 1M' -c 'write -z 21M 256k' "$W/$1.top.qcow2" >/dev/null
}
chain_vm() { # NAME
	make_chain "$1"
	vm "$1" "[disk root]
path = root.qcow2
format = qcow2
backing = $W/$1.mid.qcow2, $W/base.raw" --import "root=$W/$1.top.qcow2"
}
if part 2; then
sum=$(sha256sum <"$W/base.raw")
chain_vm c1
refuse 3 "disk root has a backing file ($W/c1.mid.qcow2): choose --backing flatten" snmigrate a c1 hostb --with-storage
untouched a c1
refuse 2 "backing thin" snmigrate a c1 hostb --with-storage --backing thin

move_apart a c1 b --backing flatten
qemu-img info "$THERE/root.qcow2" | grep -q "backing file" && fail "a flattened image has a backing file"
same qcow2 "$KEPT/root.qcow2" qcow2 "$THERE/root.qcow2"
sound "$THERE/root.qcow2"
grep -q backing "$THERE/vm.ini" && fail "the definition still names a backing file"
[ "$(sent)" -ge 40000000 ] || fail "flatten sent $(sent) bytes"
snvm b delete c1
echo "figure: flatten: $(sent) bytes of disks sent"

chain_vm c2
move_apart a c2 b --backing chain
[ "$(shape "$THERE/root.below1.qcow2")" = "$(shape "$W/c2.mid.qcow2")" ] || fail "shape of the middle: $(shape "$THERE/root.below1.qcow2")"
cmp "$THERE/root.below2.raw" "$W/base.raw"
[ "$(qemu-img info --output=json "$THERE/root.qcow2" | jq -r '."backing-filename"')" = root.below1.qcow2 ] || fail "backing name of the overlay"
same qcow2 "$KEPT/root.qcow2" qcow2 "$THERE/root.qcow2"
for f in root root.below1; do sound "$THERE/$f.qcow2"; done
[ "$(allocated "$THERE/root.qcow2")" -le $(($(allocated "$KEPT/root.qcow2") + 1048576)) ] || fail "the overlay grew: $(allocated "$KEPT/root.qcow2") to $(allocated "$THERE/root.qcow2")"
[ "$(allocated "$THERE/root.below1.qcow2")" -le $(($(allocated "$W/c2.mid.qcow2") + 1048576)) ] || fail "the middle grew"
[ "$(sent)" -le $(($(allocated "$W/base.raw") + $(allocated "$W/c2.mid.qcow2") + $(allocated "$KEPT/root.qcow2") + MIRRORED)) ] || fail "chain sent $(sent) bytes"
echo "figure: chain: $(sent) bytes of disks sent"
rm -rf "$KEPT"
snvm b start c2
wait_touched b c2
# and on with the chain that is its own now
snmigrate b c2 hosta --with-storage --backing chain >/dev/null || fail "c2 back"
gone_from b c2
assert_good "$(wait_hb a c2)"
snvm a stop --force c2
cmp "$(vm_dir a c2)/root.below2.raw" "$W/base.raw"
snvm a delete c2
gone_from a c2

chain_vm c3
# what is below c3's disk is base.raw with something of its own: nobody has that
refuse 3 "no \[backing\] of host hostb has the content of c3.mid.qcow2" snmigrate a c3 hostb --with-storage --backing reuse
untouched a c3
snvm a stop --force c3
snvm a delete c3
qemu-img create -q -f qcow2 -b "$W/base.raw" -F raw "$W/over.qcow2"
vm c4 "[disk root]
path = root.qcow2
format = qcow2
backing = $W/base.raw" --import "root=$W/over.qcow2"
move_apart a c4 b --backing reuse
[ "$(sent)" -le $(($(allocated "$KEPT/root.qcow2") + MIRRORED)) ] || fail "reuse sent $(sent) bytes, the overlay has $(allocated "$KEPT/root.qcow2")"
grep -q "^backing = $W/same-content.qcow2" "$THERE/vm.ini" || fail "the definition: $(cat "$THERE/vm.ini")"
[ "$(ls "$THERE" | grep -c '\.qcow2$\|\.raw$')" = 1 ] || fail "reuse copied a file: $(ls "$THERE")"
same qcow2 "$KEPT/root.qcow2" qcow2 "$THERE/root.qcow2"
sound "$THERE/root.qcow2"
snvm b start c4
wait_touched b c4
assert_good "$(wait_hb b c4)"
echo "figure: reuse: $(sent) bytes of disks sent"
snvm b stop --force c4
snvm b delete c4
[ -e "$W/same-content.qcow2" ] || fail "the destination's own file was deleted"
[ "$(sha256sum <"$W/base.raw")" = "$sum" ] || fail "base.raw was changed"
# imports: what an image says is not enough
make_chain c5
printf '[vm]\nname = c5\nmemory = 64M\nkernel = %s\n[disk root]\npath = root.qcow2\nformat = qcow2\n' "$GUEST" >"$T/c5.ini"
refuse 3 "has a backing file, $W/c5.mid.qcow2, which the definition does not name" snvm a create "$T/c5.ini" --import "root=$W/c5.top.qcow2"
echo "backing = $W/c5.mid.qcow2" >>"$T/c5.ini"
refuse 3 "$W/c5.mid.qcow2 has a backing file, $W/base.raw" snvm a create "$T/c5.ini" --import "root=$W/c5.top.qcow2"
qemu-img convert -q -O qcow2 "$W/base.raw" "$W/cut.qcow2"; truncate -s 1M "$W/cut.qcow2"
sed -i '/^backing/d' "$T/c5.ini"
refuse 3 "cut.qcow2.*truncated" snvm a create "$T/c5.ini" --import "root=$W/cut.qcow2"
[ -z "$(ls "$T/a/state/creating")" ] || fail "half-made VMs: $(ls "$T/a/state/creating")"
fi

# --- 3. block devices
if ! part 3; then
	:
elif [ -z "$LOOP_A" ] || [ -z "$LOOP_B" ]; then
	part_skipped "block devices: no two free loop devices"
else
	vm v1 "[disk root]
path = $LOOP_A
format = raw"
	refuse 3 "another-device.* is not among the block devices that host hostb allows" snmigrate a v1 hostb --with-storage --to-disk root=/dev/another-device
	refuse 3 "VM v1 has no disk of that name" snmigrate a v1 hostb --with-storage --to-disk rot=/dev/loop0
	refuse 2 "DISK=/DEVICE is needed" snmigrate a v1 hostb --with-storage --to-disk root=loop0
	mount_point=$W/mnt; mkdir "$mount_point"
	untouched a v1
	snmigrate a v1 hostb --with-storage --to-disk "root=$LOOP_B" --suspend --json >"$T/move.json" 2>"$T/move.err" || fail "to a device: $(cat "$T/move.err")"
	[ "$(tail -n 1 "$T/move.json" | jq -c .left_behind)" = "[\"$LOOP_A\"]" ] || fail "left behind: $(tail -n 1 "$T/move.json")"
	gone_from a v1
	snvm b stop --force v1
	cmp -n 67108864 "$LOOP_A" "$LOOP_B" || fail "the devices differ"
	[ -e "$(vm_dir b v1)/root.raw" ] && fail "a file was made beside the device"
	grep -q "^size = 67108864" "$(vm_dir b v1)/vm.ini" || fail "the disk is to stay 64 MiB: $(cat "$(vm_dir b v1)/vm.ini")"
	snvm b start v1
	wait_touched b v1
	[ "$(snvm b info v1 --json | jq '.disks[0].virtual_bytes')" = 67108864 ] || fail "the disk grew: $(snvm b info v1 --json)"
	# and from the device into a file
	move_apart b v1 a
	cmp -n 67108864 "$LOOP_B" "$THERE/root.raw" || fail "file and device differ"
	[ "$(stat -c %s "$THERE/root.raw")" = 67108864 ] || fail "size of the file"
	snvm a delete v1
	# qcow2 onto a device: its content
	rand 3M >"$W/x"; truncate -s 32M "$W/x"; qemu-img convert -q -f raw -O qcow2 "$W/x" "$W/x.qcow2"
	OPTIONS="${LOAD/span=16/span=8}" vm v2 "[disk root]
path = root.qcow2
format = qcow2" --import "root=$W/x.qcow2"
	move_apart a v2 b --to-disk "root=$LOOP_B"
	head -c 32M "$LOOP_B" >"$W/view"
	same qcow2 "$KEPT/root.qcow2" raw "$W/view"
	snvm b delete v2
	# too small, mounted
	truncate -s 128M "$W/big.raw"
	OPTIONS="${LOAD/disk=rw/disk=off}" vm v3 "[disk root]
path = root.raw
format = raw" --import "root=$W/big.raw"
	refuse 3 "$LOOP_B on host hostb has 75497472 bytes, the disk 134217728" snmigrate a v3 hostb --with-storage --to-disk "root=$LOOP_B"
	snvm a stop --force v3; snvm a delete v3
	if mkfs.ext4 -q "$LOOP_B" 2>/dev/null && mount "$LOOP_B" "$mount_point" 2>/dev/null; then
		truncate -s 32M "$W/small.raw"
		OPTIONS="${LOAD/disk=rw/disk=off}" vm v4 "[disk root]
path = root.raw
format = raw" --import "root=$W/small.raw"
		refuse 3 "$LOOP_B: the block device is in use" snmigrate a v4 hostb --with-storage --to-disk "root=$LOOP_B"
		untouched a v4
		umount "$mount_point"
	else
		part_skipped "a mounted device: ext4 cannot be made or mounted"
	fi
	echo "figure: block devices at both ends"
fi
echo "figure: $checks refusals, $skipped parts skipped"
