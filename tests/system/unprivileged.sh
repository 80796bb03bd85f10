#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Long: make operation
# Daemons and VMMs of a user that is not root, who may open /dev/kvm, /dev/net/tun and /dev/userfaultfd and has CAP_NET_ADMIN: VMs with disks and
# a network run, and move, live, by post-copy and stopped; hosts are paired, killed VMMs and daemons are settled. Where a right is missing
# it is said which.
source "$(dirname "$0")/lib.sh"
source "$(dirname "$0")/refuse_lib.sh"
require_kvm
command -v setpriv >/dev/null || skip "no setpriv (util-linux)"
AS=64321 DISK_MB=32 FILL_MB=4
W=$(mktemp -d "${TMPDIR:-/var/tmp}/snm-user.XXXXXX")
trap 'rm -rf "$W"' EXIT
chmod 711 "$W"
mkdir "$W/bin" "$W/dev"
cp "$BIN"/sn* "$W/bin/"
BIN=$W/bin
cp "$GUEST" "$W/native.elf"
chmod -R a+rX "$W/bin" "$W/native.elf"
GUEST=$W/native.elf
for d in kvm net/tun userfaultfd; do
	[ -c /dev/$d ] || continue
	mknod -m 600 "$W/dev/${d##*/}" c "0x$(stat -c %t /dev/$d)" "0x$(stat -c %T /dev/$d)"
	chown $AS "$W/dev/${d##*/}"
done
# user FILE DEVICES CAPABILITIES: a program that starts another as that user; ip netns exec has made a mount namespace for it
user() {
	{
		echo '#!/bin/sh'
		for d in $2; do [ ! -e "$W/dev/$d" ] || echo "mount --bind $W/dev/$d $(find /dev -name "$d" -type c | head -n 1)"; done
		echo "exec setpriv --reuid=$AS --regid=$AS --clear-groups --inh-caps=-all$3 --ambient-caps=-all$3 --bounding-set=-all$3 \"\$@\""
	} >"$W/$1"
	chmod 755 "$W/$1"
}
user as "kvm tun userfaultfd" ,+net_admin
user as-plain "kvm" ""
eval "$(declare -f config | sed '1s/config/config_plain/')"
config() {
	config_plain "$1"
	sed -i "/^\[peer/,/^address/d; /^\[tls\]/,/^key/d" "$T/$1/host.ini"
	chmod 711 "$T"
	chown -R $AS "$T/$1"
}
hosts_up "$W/as"
trap 'hosts_down; rm -rf "$W"' EXIT

# rights NAME UID CAPABILITIES PID...: each of these processes has no more than that
rights() {
	local what=$1 uid=$2 caps=$3 p
	shift 3
	[ $# -gt 0 ] || fail "no $what"
	for p in "$@"; do
		[ "$(awk '/^Uid:/ { print $2, $3, $4, $5 }' "/proc/$p/status")" = "$uid $uid $uid $uid" ] || fail "$what $p: $(grep ^Uid "/proc/$p/status")"
		(((0x$(awk '/^CapPrm:/ { print $2 }' "/proc/$p/status") & ~caps) == 0)) || fail "$what $p: $(grep ^Cap "/proc/$p/status")"
	done
}
NET_ADMIN=$((1 << 12))
everybody() { # HOST
	rights snmigrated $AS $NET_ADMIN "${DAEMON_PID[$1]}"
	# shellcheck disable=SC2046
	rights snvmm $AS $NET_ADMIN $(pids_in "$1" snvmm)
	# shellcheck disable=SC2046
	rights qemu-nbd $AS $NET_ADMIN $(pids_in "$1" qemu-nbd)
}
there() { # FROM TO ARGUMENT...
	local seq from=$1 to=$2
	shift 2
	seq=$(hb_field "$(wait_hb "$from" vm1)" seq)
	snmigrate "$from" vm1 "host$to" --with-storage --json "$@" >"$T/move.json" 2>"$T/move.err" || fail "$from to $to $*: exit $?: $(tail -n 1 "$T/move.json") $(cat "$T/move.err")"
	assert_good "$(wait_hb "$to" vm1 "$seq")"
	[ ! -e "$(vm_dir "$from" vm1)" ] || fail "the source's folder is still there"
}

# --- hosts are paired by root or by that user; a VM with a network and two disks runs and moves ---
code=$(snmigrate a pair 2>/dev/null)
snmigrate b pair "$(address a):16516" "$code" >"$T/out" 2>&1 || fail "pair: $(cat "$T/out")"
[ "$(stat -c '%u %a' "$T/a/state/trust/host.pem")" = "$AS 600" ] || fail "the key: $(ls -ln "$T/a/state/trust/host.pem")"
VM_EXTRA="[net lan]
bridge = br0" native_vm a vm1 128M "ws=16 rate=100 touch=32 disk=rw diskrate=200 hb=100"
wait_touched a vm1
everybody a
[ -n "$(ns a ip -o link show master br0)" ] || fail "no tap at the bridge of hosta"
there a b
everybody b
[ -n "$(ns b ip -o link show master br0)" ] && [ -z "$(ns a ip -o link show master br0)" ] || fail "the taps did not move along"
there b a --quick
if [ -e "$W/dev/userfaultfd" ]; then there a b --postcopy now; there b a; else echo "skipped: no /dev/userfaultfd"; fi

# --- who is killed is settled ---
kill -KILL "$(pids_in a snvmm)"
wait_state a vm1 crashed
snvm a start vm1
wait_touched a vm1
daemon_kill a; daemon_start a "$W/as"
[ "$(vm_state a vm1)" = running ] || fail "after the daemon was killed: $(vm_state a vm1)"
snvm a stop --force vm1
snmigrate a vm1 hostb --with-storage >/dev/null || fail "cold: exit $?"
[ "$(vm_state b vm1)" = stopped ] || fail "cold: $(vm_state b vm1)"
snvm b start vm1
assert_good "$(wait_hb b vm1)"
everybody b
there b a
snvm a stop --force vm1

# --- a right that is missing is named ---
daemon_kill a TERM; daemon_start a "$W/as-plain"
refuse 3 "net lan: bridge br0: .*Operation not permitted\|net lan: bridge br0: /dev/net/tun: Permission denied" snvm a start vm1
install -d -m 700 "$T/secret"; install -m 600 "$GUEST" "$T/secret/kernel"
printf '[vm]\nname = vm2\nmemory = 64M\nkernel = %s/secret/kernel\n' "$T" >"$T/vm2.ini"
refuse 3 "secret/kernel: Permission denied" snvm a create "$T/vm2.ini"
# nobody's network, and no kernel help for post-copy: all else works
printf '[vm]\nname = vm2\nmemory = 64M\nkernel = %s\ncmdline = ws=4 rate=10 touch=4 hb=100\nserial = socket\n' "$GUEST" >"$T/vm2.ini"
snvm a create "$T/vm2.ini" >/dev/null
snvm a start vm2
# shellcheck disable=SC2046
rights snvmm $AS 0 $(pids_in a snvmm)
snmigrate a vm2 hostb >/dev/null || fail "plain: exit $?"
assert_good "$(wait_hb b vm2)"
if [ "$(cat /proc/sys/vm/unprivileged_userfaultfd)" = 0 ]; then
	refuse 3 "userfaultfd: Operation not permitted" snmigrate b vm2 hosta --postcopy now
	assert_good "$(wait_hb b vm2)"
fi
sed -i 's/^name = .*/name = vm3/' "$T/vm2.ini"
snvm a create "$T/vm2.ini" >/dev/null
chmod 000 "$W/dev/kvm"
refuse 3 "/dev/kvm: Permission denied" snvm a start vm3
echo "user $AS ran it all; $checks refusals"
