#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Long: make operation
# What goes wrong with an evacuation: a destination's VMM is killed and the move tried again; SIGINT of the command, the cancel, the
# deadline. Each guest runs exactly once at every stop, and none of them found anything bad. SNM_BRIEF=1: two guests instead of four.
source "$(dirname "$0")/lib.sh"
source "$(dirname "$0")/evacuate_lib.sh"
require_kvm
hosts_up
vms="vm1 vm2 vm3 vm4"
[ "${SNM_BRIEF:-}" = 1 ] && vms="vm1 vm2"
n=0
for vm in $vms; do n=$((n + 1)); native_vm a $vm 64M "$GUEST_OPTIONS seed=$n"; done
for vm in $vms; do wait_hb a $vm >/dev/null; done

step "one whose destination dies is tried again"
slow 60
evacuate --parallel 2
retried=0
for _ in $(seq 300); do
	for h in b c; do
		snmigrate $h status --json | jq -e '[.moving[] | select(.phase == "storage")] | length > 0' >/dev/null || continue
		p=$(pids_in $h snvmm --incoming | head -n 1)
		kill -KILL "$p" && retried=1 && break 2
	done
	sleep 0.05
done
[ $retried = 1 ] || fail "no arrival to kill: $(cat "$T/evacuate.json")"
wait $evacuator || fail "evacuate: exit $?: $(tail -n 1 "$T/evacuate.json")"
tail -n 1 "$T/evacuate.json" | jq -e '[.vms[] | select(.attempts > 1)] | length >= 1' >/dev/null || fail "nothing was tried again: $(tail -n 1 "$T/evacuate.json")"
once b c
fast
snmigrate a maintenance off
come_back

step "SIGINT of the command leaves it running; the cancel ends it"
slow 30
evacuate
wait_plan a '[.vms[] | select(.state == "moving" and .phase == "storage")] | length >= 1'
kill -INT $evacuator
rc=0; wait $evacuator || rc=$?
[ $rc = 130 ] && grep -q "the plan goes on" "$T/evacuate.err" || fail "SIGINT: exit $rc: $(cat "$T/evacuate.err")"
snmigrate a evacuate --follow --json >"$T/evacuate.json" &
evacuator=$!
snmigrate a evacuate --cancel
rc=0; wait $evacuator || rc=$?
[ $rc = 5 ] || fail "cancel: exit $rc: $(tail -n 1 "$T/evacuate.json")"
once a b c

step "after the deadline nothing is begun"
evacuate --parallel 1 --deadline 1s
rc=0; wait $evacuator || rc=$?
[ $rc = 4 ] || fail "deadline: exit $rc: $(tail -n 1 "$T/evacuate.json")"
tail -n 1 "$T/evacuate.json" | jq -e '[.vms[] | select(.state == "stays" and (.reason | contains("the deadline had passed")))] | length >= 1' >/dev/null || fail "deadline: $(tail -n 1 "$T/evacuate.json")"
once a b c
fast
for vm in $vms; do assert_good "$(wait_hb "$(where $vm)" $vm)"; done
echo "figure: tried again, interrupted, cancelled and late: $SECONDS s"
