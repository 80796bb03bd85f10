#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Disks that both hosts see: without --with-storage the memory alone moves, once the destination has proved that it sees the very same
# file. The disk is handed over with its lock, written by one host at a time, and never deleted. Copies, other files, qcow2, disks elsewhere
# and files without O_DIRECT are refused; whoever dies, one host has the VM, and its disk is whole.
source "$(dirname "$0")/lib.sh"
source "$(dirname "$0")/refuse_lib.sh"
require_kvm
W=$(mktemp -d "${TMPDIR:-/var/tmp}/snm-shared.XXXXXX")
drop() { umount "$W/at-b" 2>/dev/null; rm -rf "$W"; }
trap drop EXIT
mkdir "$W/at-a" "$W/at-b" "$W/copy"
mount --bind "$W/at-a" "$W/at-b" || skip "no bind mounts"
mkdir "$W/at-a/vms"
LIMITS_EXTRA="[shared]
path = $W/copy, $W/at-X"
config_of() { sed -i "s|$W/at-X|$W/at-$1|" "$T/$1/host.ini"; }
# two hosts that see one folder at two places
eval "$(declare -f config | sed '1s/config/config_plain/')"
config() { config_plain "$1"; config_of "$1"; }
hosts_up
trap 'hosts_down; drop' EXIT

# shared_vm NAME [MORE DISKS]: at a, its disk in the shared folder, started
shared_vm() {
	truncate -s 32M "$W/at-a/vms/$1.raw"
	printf '[vm]\nname = %s\nmemory = 64M\nkernel = %s\ncmdline = ws=4 rate=10 touch=4 zero=1 disk=rw diskrate=200 span=16 hb=200 idle=1\nserial = socket\n[disk root]\npath = %s/at-a/vms/%s.raw\nformat = raw\n%s\n' \
		"$1" "$GUEST" "$W" "$1" "${2:-}" >"$T/$1.ini"
	snvm a create "$T/$1.ini" >/dev/null
	snvm a start "$1"
	wait_touched a "$1"
}
last() { tail -n 1 "$T/move.json"; }
locked() { # PATH: somebody has it
	python3 - "$1" <<'PY'
import fcntl, os, struct, sys
fd = os.open(sys.argv[1], os.O_RDWR)
lk = fcntl.fcntl(fd, 36, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))  # F_OFD_GETLK
sys.exit(0 if struct.unpack("hhqqi4x", lk)[0] != fcntl.F_UNLCK else 1)
PY
}
nothing_left() { [ -z "$(find "$W" -name '.snmigrate-*')" ] || fail "left: $(find "$W" -name '.snmigrate-*')"; }
disk_of() { snvm "$1" list --json | jq -r --arg n "$2" '.[] | select(.name == $n) | .disks[0].path'; }

# --- to and fro under load ---
shared_vm vm1
inode=$(stat -c %i "$W/at-a/vms/vm1.raw")
seq=0 from=a
for n in 1 2; do
	to=$(other $from)
	snmigrate $from vm1 host$to --json >"$T/move.json" || fail "shared $n: exit $?: $(last)"
	jq -e --arg p "$W/at-$from/vms/vm1.raw" '.result == "moved" and .shared == [$p] and .left_behind == [] and .disk_bytes == 0 and .memory_bytes > 0' <<<"$(last)" >/dev/null || fail "shared $n: $(last)"
	hb=$(wait_hb $to vm1 $seq); assert_good "$hb"; seq=$(hb_field "$hb" seq)
	[ "$(vm_state $from vm1)" = absent ] && [ ! -e "$(vm_dir $from vm1)" ] || fail "vm1 is still at host$from"
	[ "$(disk_of $to vm1)" = "$W/at-$to/vms/vm1.raw" ] || fail "its disk at host$to is $(disk_of $to vm1)"
	[ "$(stat -c %i "$W/at-a/vms/vm1.raw")" = "$inode" ] || fail "the disk is another file"
	locked "$W/at-a/vms/vm1.raw" || fail "nobody has the lock at host$to"
	nothing_left
	from=$to
done
# with its own restart there, stopped and moved
snvm a stop --force vm1
locked "$W/at-a/vms/vm1.raw" && fail "locked, though stopped"
sum=$(sha256sum <"$W/at-a/vms/vm1.raw")
snmigrate a vm1 hostb --json >"$T/move.json" || fail "cold: exit $?: $(last)"
jq -e '.cold and (.shared | length) == 1 and .left_behind == []' <<<"$(last)" >/dev/null || fail "cold: $(last)"
[ "$(vm_state b vm1)" = stopped ] && [ "$(sha256sum <"$W/at-a/vms/vm1.raw")" = "$sum" ] || fail "cold: $(vm_state b vm1), or the disk changed"
snvm b start vm1
assert_good "$(wait_hb b vm1)"
snmigrate b vm1 hosta >/dev/null || fail "back: exit $?"
assert_good "$(wait_hb a vm1)"

# --- refusals; the guest goes on ---
no() { refuse 3 "$1" snmigrate a vm1 hostb; nothing_left; untouched a vm1; }
daemon_kill b TERM
good=$(cat "$T/b/host.ini")
sed -i "s|^path = .*|path = $W/copy|" "$T/b/host.ini"
mkdir "$W/copy/vms"
cp "$W/at-a/vms/vm1.raw" "$W/copy/vms/vm1.raw"
daemon_start b
no "disk root: host hostb: vms/vm1.raw is not shared ($W/copy: the folder is another one than the source's)"
# the folder is the same, but another file stands in the image's place
daemon_kill b TERM
echo "$good" >"$T/b/host.ini"
mkdir "$W/at-c"
daemon_start b
kill_mount() { nsenter -t "${DAEMON_PID[b]}" -m mount --bind "$W/copy/vms/vm1.raw" "$W/at-b/vms/vm1.raw"; }
if kill_mount; then
	no "the file is another one than the source's"
	nsenter -t "${DAEMON_PID[b]}" -m umount "$W/at-b/vms/vm1.raw"
else
	echo "skipped: no mount inside the host's namespace"
fi
daemon_kill b TERM
sed -i "/^\[shared\]/,/^path/d" "$T/b/host.ini"
daemon_start b
no "this host has no \[shared\] path"
daemon_kill b TERM
echo "$good" >"$T/b/host.ini"
daemon_start b
refuse 3 "to-disk needs --with-storage" snmigrate a vm1 hostb --to-disk root=/dev/null
untouched a vm1
# a disk of another VM of the destination
printf '[vm]\nname = other\nmemory = 64M\nkernel = %s\n[disk root]\npath = %s/at-b/vms/vm1.raw\nformat = raw\n' "$GUEST" "$W" >"$T/other.ini"
snvm b create "$T/other.ini" >/dev/null
no "vms/vm1.raw is a disk of VM other on host hostb"
snvm b delete other >/dev/null
[ -e "$W/at-a/vms/vm1.raw" ] || fail "deleting another VM deleted the shared disk"
# qcow2, and a disk elsewhere
qemu-img create -q -f qcow2 "$W/at-a/vms/q.qcow2" 16M
shared_vm vm2 "[disk data]
path = $W/at-a/vms/q.qcow2
format = qcow2"
refuse 3 "disk data: its format is qcow2" snmigrate a vm2 hostb
untouched a vm2
snvm a stop --force vm2; snvm a delete vm2 >/dev/null
truncate -s 16M "$W/elsewhere.raw"
shared_vm vm3 "[disk data]
path = $W/elsewhere.raw
format = raw"
refuse 3 "elsewhere.raw is in no folder of \[shared\] path on host hosta: move it with --with-storage" snmigrate a vm3 hostb
# with storage, both are copied, and stay
snmigrate a vm3 hostb --with-storage --json >"$T/move.json" || fail "with storage: exit $?: $(last)"
jq -e '(.left_behind | length) == 2 and .shared == null' <<<"$(last)" >/dev/null || fail "with storage: $(last)"
[ -e "$W/at-a/vms/vm3.raw" ] && [ "$(disk_of b vm3)" = "$(vm_dir b vm3)/root.raw" ] || fail "vm3: $(disk_of b vm3)"
assert_good "$(wait_hb b vm3)"
snvm b stop --force vm3; snvm b delete vm3 >/dev/null

# --- whoever dies ---
dies() { # FAULTS_A FAULTS_B EXIT STATE HOST
	daemon_kill a TERM; daemon_kill b TERM
	daemon_start b "SNM_FAULT=$2"; daemon_start a "SNM_FAULT=$1"
	snvm a start vm1 2>/dev/null || true
	wait_hb a vm1 >/dev/null
	local rc=0 o
	o=$(other "$5")
	snmigrate a vm1 hostb --json >"$T/move.json" 2>"$T/move.err" || rc=$?
	[ $rc = "$3" ] || fail "$1 $2: exit $rc, not $3: $(last) $(cat "$T/move.err")"
	wait_state "$5" vm1 "$4"; wait_state "$o" vm1 absent
	nothing_left
	daemon_kill a TERM; daemon_kill b TERM
	daemon_start b; daemon_start a
	[ "$4" = running ] || snvm "$5" start vm1
	local hb
	hb=$(wait_hb "$5" vm1 "$([ "$4" = running ] && hb_field "$(last_hb "$5" vm1)" seq || echo -1)"); assert_good "$hb"
	locked "$W/at-a/vms/vm1.raw" || fail "$1 $2: nobody has the lock"
	[ "$5" = a ] || snmigrate b vm1 hosta >/dev/null || fail "back: exit $?"
	snvm a stop --force vm1
}
snvm a stop --force vm1
dies "" d-before-ready:kill 4 running a
dies after-ready:kill "" 8 crashed a
dies "" d-held-running:kill 4 running a
dies "" d-owner-recorded:kill 8 crashed b
dies moved-recorded:kill "" 0 running b
# killed while the destination looks for the second name: whoever opens the disk next takes it away
daemon_kill a TERM; daemon_kill b TERM
daemon_start b; daemon_start a SNM_FAULT=in-hello:kill
snvm a start vm1
for next in start stop; do
	wait_hb a vm1 >/dev/null
	snmigrate a vm1 hostb >"$T/out" 2>&1 && fail "moved, although the source was killed: $(cat "$T/out")"
	wait_state a vm1 crashed
	[ -n "$(find "$W" -name '.snmigrate-*')" ] || fail "no second name is left: the test is no test"
	snvm a $next vm1 >/dev/null
	[ $next = start ] || break
	nothing_left
done
daemon_kill a TERM; daemon_start a
snmigrate a vm1 hostb >/dev/null || fail "cold: exit $?"
nothing_left
echo "a shared disk moved with its lock; $checks refusals"
