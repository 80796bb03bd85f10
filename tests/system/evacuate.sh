#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A host is emptied and filled again: three daemons, four guests under load and one that is off. The dry run beside what happened;
# refusals and maintenance; the command and then the daemon killed in the middle, and taken up; the way back. Each guest runs exactly once
# at every stop, and none of them found anything bad. SNM_BRIEF=1: no dry runs of what does not fit, and the first evacuation is the one that is killed.
source "$(dirname "$0")/lib.sh"
source "$(dirname "$0")/evacuate_lib.sh"
require_kvm
hosts_up
vms="vm1 vm2 vm3 vm4"
whole() { [ "${SNM_BRIEF:-}" != 1 ]; }

n=0
for vm in $vms; do
	n=$((n + 1))
	if [ $vm = vm4 ]; then VM_EXTRA="priority = 7"; else VM_EXTRA=; fi
	native_vm a $vm 64M "$GUEST_OPTIONS seed=$n"
done
VM_EXTRA=
native_vm a vm5 64M "$GUEST_OPTIONS"
snvm a stop --force vm5
for vm in $vms; do wait_hb a $vm >/dev/null; done

step "what is refused, with a sentence"
refuse 3 "a host is evacuated by its own daemon, so run snmigrate evacuate hostb on hostb" snmigrate a evacuate hostb
refuse 3 "run snmigrate return hosta on each host that its VMs went to" snmigrate a return hosta
refuse 3 "no host named hostx" snmigrate a evacuate hosta --to hostb,hostx
refuse 3 "that is this host" snmigrate a evacuate hosta --to hosta
refuse 3 "neither an evacuation nor a return is under way" snmigrate a evacuate --cancel
snmigrate a evacuate --status | grep "^Neither" >/dev/null || fail "status without a plan"

step "maintenance keeps arrivals out, also after a restart"
snmigrate b maintenance on
daemon_kill b TERM
daemon_start b
snmigrate b status >"$T/out"
grep -q "^In maintenance" "$T/out" || fail "status: $(cat "$T/out")"
refuse 3 "host hostb is in maintenance and takes no VMs" snmigrate a vm1 hostb --with-storage
if whole; then
	rc=0; plan=$(snmigrate a evacuate hosta --with-storage --dry-run --json --to hostb) || rc=$?
	[ $rc = 4 ] || fail "a dry run with no room: exit $rc: $plan"
	jq -e '[.vms[] | select(.state == "stays") | .reason | contains("hostb is in maintenance")] == [true, true, true, true]' <<<"$plan" >/dev/null || fail "$plan"
	plan=$(snmigrate a evacuate hosta --with-storage --dry-run --json) || fail "dry run: exit $?: $plan"
	jq -e '[.vms[] | select(.state == "waiting") | .destination] == ["hostc", "hostc", "hostc", "hostc"]' <<<"$plan" >/dev/null || fail "a host in maintenance is a destination: $plan"
	rc=0; plan=$(snmigrate a evacuate hosta --dry-run --json) || rc=$?
	[ $rc = 4 ] || fail "a dry run without --with-storage: exit $rc"
	jq -e '[.vms[] | select(.reason | contains("--with-storage is needed"))] | length == 4' <<<"$plan" >/dev/null || fail "$plan"
fi
snmigrate b maintenance off

step "the plan, and unless SNM_BRIEF=1 by what an earlier move of one of them took"
if whole; then
	snmigrate a vm1 hostb --with-storage --json >"$T/move.json" || fail "move: $(tail -n 1 "$T/move.json")"
	snmigrate b vm1 hosta --with-storage --json >"$T/move.json" || fail "move: $(tail -n 1 "$T/move.json")"
	for _ in $(seq 50); do snmigrate a history vm1 --json | tail -n 1 | jq -e .ended_ms >/dev/null && break; sleep 0.1; done
fi
plan=$(snmigrate a evacuate hosta --with-storage --dry-run --json) || fail "dry run: exit $?: $plan"
jq -e '[.vms[] | [.vm, .state]] | .[0] == ["vm4", "waiting"] and .[4] == ["vm5", "off"]' <<<"$plan" >/dev/null || fail "the order is not that of priority: $plan"
jq -e '[.vms[].destination] | map(select(. == "hostb")) | length == 2' <<<"$plan" >/dev/null || fail "not spread over both hosts: $plan"
[ "$(snmigrate a status --json | jq .maintenance)" = false ] || fail "a dry run set maintenance"
once a

# Emptied, as the plan said.
emptied() {
	evacuate --parallel 2
	wait $evacuator || fail "evacuate: exit $?: $(tail -n 1 "$T/evacuate.json")"
	end=$(tail -n 1 "$T/evacuate.json")
	jq -e '.event == "end" and .result == "moved" and .exit == 0 and ([.vms[] | select(.state == "moved")] | length) == 4' <<<"$end" >/dev/null || fail "$end"
	figures "$plan" "$end"
	once b c
}
if whole; then
	step "emptied, as predicted"
	emptied
	refuse 3 "host hosta is in maintenance" snmigrate "$(where vm1)" vm1 hosta --with-storage

	step "and back"
	rc=0; snmigrate b return hosta --with-storage --json >"$T/return.json" || rc=$?
	[ $rc = 4 ] && tail -n 1 "$T/return.json" | jq -e '.vms | length == 2 and all(.state == "stays" and (.reason | contains("hosta is in maintenance")))' >/dev/null || fail "return to a host in maintenance: exit $rc: $(tail -n 1 "$T/return.json")"
	snmigrate a maintenance off
	come_back
	once a
	# the whole's times, of three: one may meet whatever else this machine does
	for n in 2 3; do
		step "emptied again, $n"
		plan=$(snmigrate a evacuate hosta --with-storage --dry-run --json) || fail "dry run: exit $?: $plan"
		emptied
		snmigrate a maintenance off
		come_back
	done
	once a
	off=$(grep -o '([-0-9]* %)' "$T/figures" | tr -d '() %-' | sort -n | sed -n 2p)
	[ "$off" -le 30 ] || fail "in the middle of three, the plan was wrong by $off %: $(cat "$T/figures")"
	slow 80
fi

step "the command killed in the middle, then the daemon"
evacuate --parallel 2
wait_plan a '[.vms[] | select(.state == "moving" and .phase != "")] | length == 2'
kill -KILL $evacuator
wait $evacuator 2>/dev/null || true
snmigrate a status >"$T/out" || true
grep -q "^An evacuation is under way: [0-4] of 5 VMs moved" "$T/out" || fail "status: $(cat "$T/out")"
refuse 3 "an evacuation is under way here already" snmigrate a evacuate hosta --with-storage
wait_plan a '[.vms[] | select(.state == "moved")] | length >= 1'
daemon_kill a
sleep 0.2
daemon_start a
snmigrate a evacuate --follow --json >"$T/evacuate.json" || fail "follow: exit $?: $(tail -n 1 "$T/evacuate.json")"
end=$(tail -n 1 "$T/evacuate.json")
jq -e '.result == "moved" and ([.vms[] | select(.state == "moved")] | length) == 4' <<<"$end" >/dev/null || fail "taken up: $end"
jq -e '[.vms[].attempts] | add <= 4' <<<"$end" >/dev/null || fail "moved twice: $end"
grep -q "evacuation of 5 VMs is taken up again" "$T/a/daemon.log" || fail "it was not taken up"
once b c
whole || figures "$plan" "$end" "killed and taken up: "
echo "killed and taken up: $(jq -c '[.vms[] | [.vm, .state, .destination, .attempts]]' <<<"$end")"
snmigrate a evacuate --status >"$T/out"
grep -q "^priority = 7" "$(vm_dir "$(where vm4)" vm4)/vm.ini" || fail "the priority did not travel: $(cat "$(vm_dir "$(where vm4)" vm4)/vm.ini")"
grep -q "^moved: 4 moved, 0 stay, 1 not running" "$T/out" || fail "status: $(cat "$T/out")"
fast
snmigrate a maintenance off
come_back
once a

for vm in $vms; do assert_good "$(wait_hb "$(where $vm)" $vm)"; done
grep '^figure' "$T/figures"
