#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Long: make operation
# examples/: the script that evacuates and reboots, with a reboot that is only noted down, and the systemd unit: what systemd thinks of it,
# and its ExecStart and ExecStop as they stand there, with the paths and the name of this test's host.
source "$(dirname "$0")/lib.sh"
source "$(dirname "$0")/evacuate_lib.sh"
require_kvm
command -v systemd-analyze >/dev/null || skip "needs systemd-analyze"
hosts_up
vms="vm1 vm2"
UNIT=$ROOT/examples/snmigrate-evacuate.service
for vm in $vms; do native_vm a $vm 64M "$GUEST_OPTIONS"; done
for vm in $vms; do wait_hb a $vm >/dev/null; done
# shellcheck disable=SC2030,SC2031
script() { (export PATH="$BIN:$PATH" SNMIGRATE_CONTROL="$T/a/control.sock" HOST=hosta REBOOT="touch $T/rebooted"; "$@"); }

# --- the script does not reboot a host that is not empty ---
snmigrate b maintenance on
snmigrate c maintenance on
rc=0; script "$ROOT/examples/evacuate-before-reboot.sh" >"$T/out" 2>&1 || rc=$?
[ $rc = 4 ] && [ ! -e "$T/rebooted" ] && grep -q "not rebooting: hosta is not empty" "$T/out" || fail "exit $rc: $(cat "$T/out")"
grep -q "vm1: stays: .*hostb is in maintenance" "$T/out" || fail "no reason: $(cat "$T/out")"
once a
# --- but one that is ---
snmigrate c maintenance off
script "$ROOT/examples/evacuate-before-reboot.sh" hostc >"$T/out" 2>&1 || fail "exit $?: $(cat "$T/out")"
[ -e "$T/rebooted" ] && grep -q "^evacuation of hosta: moved: 2 moved, 0 stay" "$T/out" || fail "no reboot: $(cat "$T/out")"
once c

# --- the unit ---
sed "s|/usr/bin/|$BIN/|; s|/etc/snmigrate/|$T/a/|" "$UNIT" >"$T/snmigrate-evacuate.service"
systemd-analyze --man=no verify "$T/snmigrate-evacuate.service" 2>&1 | grep "snmigrate-evacuate" | grep -v "Cannot add dependency" >"$T/verify" || true
[ ! -s "$T/verify" ] || fail "systemd-analyze verify: $(cat "$T/verify")"
exec_line() { sed -n "s|^$1=-\{0,1\}||p" "$T/snmigrate-evacuate.service" | sed 's/%H/hosta/'; }
[ -n "$(exec_line ExecStart)" ] && [ -n "$(exec_line ExecStop)" ] || fail "the unit has no ExecStart or no ExecStop"
snmigrate a status --json | jq -e .maintenance >/dev/null || fail "an evacuated host is not in maintenance"
# shellcheck disable=SC2046
script $(exec_line ExecStart) || fail "ExecStart: exit $?"
snmigrate a status --json | jq -e '.maintenance | not' >/dev/null || fail "ExecStart left it in maintenance"
snmigrate c return hosta --with-storage >"$T/out" || fail "return: exit $?: $(cat "$T/out")"
once a
# shellcheck disable=SC2046
script $(exec_line ExecStop) >"$T/out" || fail "ExecStop: exit $?: $(cat "$T/out")"
once c # b is in maintenance still
tail -n 1 "$T/out" | jq -e '.result == "moved"' >/dev/null || fail "ExecStop: $(tail -n 1 "$T/out")"
echo "figure: the script and the unit evacuated 2 VMs each"
