#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Long: make operation
# What a VM sees of the processor: the baseline of two hosts, the levels, a baseline made smaller and one that asks for too much;
# refused while the VM runs; and the VM moves with it and keeps it.
source "$(dirname "$0")/lib.sh"
source "$(dirname "$0")/refuse_lib.sh"
require_kvm
DISK_MB=16
SILENCE_MS=3000
hosts_up
# A register of the table that the guest was given: HOST FUNCTION REGISTER (3 to 6: eax to edx), in decimal
register() { echo '{"cmd":"check"}' | timeout 5 socat -t 3 - "UNIX-CONNECT:$(vm_dir "$1" vm1)/snvmm.sock" | jq --argjson f "$2" --argjson r "$3" 'first(.cpu.cpuid[] | select(.[0] == $f and .[1] == 0) | .[$r]) // 0'; }
started() { snvm a start vm1; wait_hb a vm1 >/dev/null; }
native_vm a vm1 64M "ws=8 rate=20 touch=8 zero=1 disk=rw diskrate=100 span=8 hb=100"
wait_hb a vm1 >/dev/null
own=$(register a 7 4)
[ "$own" -gt 0 ] || fail "this host's CPU has no feature in leaf 7: $own"

snmigrate a baseline hosta hostb >"$T/both" || fail "baseline: exit $?"
cat "$T/both"
[ "$(snmigrate b baseline hosta | tail -n +2)" = "$(tail -n +2 "$T/both")" ] || fail "the same processor has another baseline: $(snmigrate b baseline hosta)"
refuse 3 "no host named hostc" snmigrate a baseline hosta hostc
# a host that is not there is named
daemon_kill b TERM
refuse 3 "host hostb: .*Connection refused" snmigrate a baseline hosta hostb
daemon_start b

refuse 3 "VM vm1 is not stopped" snvm a set vm1 cpu=x86-64-v2
snvm a stop --force vm1
refuse 3 "'memory' is nothing that can be set" snvm a set vm1 memory=1G
refuse 3 "none of host, x86-64-v2" snvm a set vm1 cpu=486
refuse 3 "cpu: $T/none: No such file" snvm a set vm1 "cpu=baseline:$T/none"
refuse 3 "which baseline" snvm a set vm1 cpu=baseline
refuse 3 "no VM named vm9" snvm a set vm9 cpu=host

# the baseline of both: all that there is
(cd "$T" && "$BIN/snvm" --control "$T/a/control.sock" set vm1 cpu=baseline:both)
started
[ "$(register a 7 4)" = "$own" ] || fail "the baseline of equal hosts took something away: $(register a 7 4) of $own"
snvm a stop --force vm1

# without what stands in leaf 7, and without anything that it does not name
sed '/^cpuid.7.0/d' "$T/both" >"$T/less"
snvm a set vm1 "cpu=baseline:$T/less"
grep -q '^cpu = baseline$' "$(vm_dir a vm1)/vm.ini" && grep -q '^vendor = ' "$(vm_dir a vm1)/vm.ini" || fail "vm.ini: $(cat "$(vm_dir a vm1)/vm.ini")"
started
[ "$(register a 7 4)" = 0 ] || fail "the guest sees leaf 7 as $(register a 7 4)"
snmigrate a check vm1 hostb --json | jq -e '.lines[] | select(.check == "cpu" and .result == "pass")' >/dev/null || fail "check: $(snmigrate a check vm1 hostb)"
snmigrate a vm1 hostb --with-storage --json >"$T/move.json" || fail "move: exit $?: $(tail -n 1 "$T/move.json")"
assert_good "$(wait_hb b vm1)"
[ "$(register b 7 4)" = 0 ] || fail "at hostb the guest sees leaf 7 as $(register b 7 4)"
# and after a cold start there
snvm b stop --force vm1
snvm b start vm1
wait_hb b vm1 >/dev/null
[ "$(register b 7 4)" = 0 ] || fail "started anew at hostb the guest sees leaf 7 as $(register b 7 4)"
snmigrate b vm1 hosta --with-storage --json >"$T/move.json" || fail "move back: exit $?: $(tail -n 1 "$T/move.json")"
snvm a stop --force vm1

# more than this host has, by name; another vendor
sed 's/^cpuid.1.0.ecx = /&tm2 /' "$T/both" >"$T/more"
grep -q tm2 "$T/more" || fail "no line for cpuid.1.0.ecx in the baseline"
snvm a set vm1 "cpu=baseline:$T/more"
refuse 3 "lacks 1 feature that the definition wants: tm2" snvm a start vm1
sed 's/^vendor = .*/vendor = CyrixInstead/' "$T/both" >"$T/cyrix"
snvm a set vm1 "cpu=baseline:$T/cyrix"
refuse 3 "wants one of CyrixInstead" snvm a start vm1

# the levels: leaf 7 has three features in v3, none in v2
for level in "x86-64-v2 0" "x86-64-v3 $((1 << 3 | 1 << 5 | 1 << 8))"; do
	read -r name bits <<<"$level"
	snvm a set vm1 "cpu=$name"
	if snvm a start vm1 2>"$T/err"; then
		wait_hb a vm1 >/dev/null
		[ "$(register a 7 4)" = "$bits" ] || fail "$name: leaf 7 is $(register a 7 4), not $bits"
		[ $(($(register a 1 5) >> 25 & 1)) = 0 ] || fail "$name: the guest sees AES"
		echo "$name: leaf 1 ecx $(register a 1 5), leaf 7 ebx $(register a 7 4)"
		snvm a stop --force vm1
	else
		grep -q "this host lacks .* that the definition wants" "$T/err" || fail "$name: $(cat "$T/err")"
		echo "$name: $(cat "$T/err")"
	fi
done
snvm a set vm1 cpu=host
! grep -q '^cpu =' "$(vm_dir a vm1)/vm.ini" || fail "vm.ini after cpu=host: $(cat "$(vm_dir a vm1)/vm.ini")"
started
[ "$(register a 7 4)" = "$own" ] || fail "cpu=host: leaf 7 is $(register a 7 4), not $own"
# at creation, too
sed "s/^name = .*/name = vm2/; s|^serial.*|&\ncpu = baseline:less|; s|^kernel = .*|kernel = $GUEST|; /^uuid/d; /^\[disk/,\$d" "$(vm_dir a vm1)/vm.ini" >"$T/vm2.ini"
snvm a create "$T/vm2.ini"
grep -q '^vendor = ' "$(vm_dir a vm2)/vm.ini" || fail "vm2's definition has no baseline: $(cat "$(vm_dir a vm2)/vm.ini")"
echo "figure: $checks refusals"
