# SPDX-License-Identifier: Apache-2.0
# Three hosts, each of which knows the other two. Sourced after lib.sh.
# shellcheck shell=bash disable=SC2034,SC2154
source "$(dirname "${BASH_SOURCE[0]}")/refuse_lib.sh"
HOSTS="a b c"
DISK_MB=12
FILL_MB=3
# A guest that dirties less than the link carries beside another move.
GUEST_OPTIONS="ws=4 rate=1 touch=8 zero=1 disk=rw diskrate=50 span=4 hb=100"
LINK_MBIT=${LINK_MBIT:-200}

step() { echo "--- $* (after $SECONDS s)"; }
address() { case $1 in a) echo 10.9.0.1 ;; b) echo 10.9.0.2 ;; c) echo 10.9.0.3 ;; esac; }
eval "two_hosts_$(declare -f config)"
config() {
	local h=$1 o
	two_hosts_config "$h"
	sed -i '/^\[peer/,/^address/d' "$T/$h/host.ini"
	for o in $HOSTS; do
		[ "$o" = "$h" ] || printf '[peer host%s]\naddress = %s:16516\n' "$o" "$(address "$o")" >>"$T/$h/host.ini"
	done
}
eval "plain_$(declare -f net_up)"
# The link is what bounds a move, not this machine's processors.
net_up() { plain_net_up; fast; }
limit() { local h; for h in $HOSTS; do ns "$h" tc qdisc replace dev eth0 root tbf rate "$1mbit" burst 64kb latency 100ms; done; }
slow() { limit "$1"; }
fast() { limit "$LINK_MBIT"; }

# The host on which the VM runs; fails if that is not exactly one.
where() {
	local h found=
	for h in $HOSTS; do
		[ "$(vm_state "$h" "$1")" = running ] && found+=$h
	done
	echo "$found"
}
# once HOST...: every VM of $vms runs on exactly one host, which is one of those, and lives
once() {
	local vm at
	for vm in $vms; do
		at=$(where "$vm")
		[ ${#at} = 1 ] || fail "$vm runs on '$at'"
		[[ " $* " == *" $at "* ]] || fail "$vm runs on host$at, not on $*"
		assert_good "$(wait_hb "$at" "$vm")"
	done
}
wait_plan() { # HOST JQ-CONDITION
	local i plan
	for i in $(seq 300); do
		plan=$(snmigrate "$1" evacuate --status --json)
		jq -e "$2" <<<"$plan" >/dev/null 2>&1 && return 0 # there may be none yet
		sleep 0.1
	done
	fail "the plan of host$1 does not come to $2: $plan"
}
# In the background, not by a function's subshell, so that $evacuator is the command itself.
evacuate() {
	"$BIN/snmigrate" --control "$T/a/control.sock" evacuate hosta --with-storage --json "$@" >"$T/evacuate.json" 2>"$T/evacuate.err" </dev/null &
	evacuator=$!
}
# figures PLAN END [WORDS]: what was predicted beside what happened
figures() {
	jq -rn --argjson p "$1" --argjson e "$2" --arg w "${3:-}" '
		($p.vms | map(select(.state == "waiting")) | map({(.vm): .}) | add) as $of |
		($e.vms[] | select(.state == "moved") | "\(.vm) to \(.destination): predicted \($of[.vm].predicted_begin_ms) to \($of[.vm].predicted_end_ms) ms, was \(.begin_ms) to \(.end_ms) ms"),
		"figure: \($w)evacuation predicted \($p.predicted_ms) ms, took \($e.total_ms) ms (\((($e.total_ms - $p.predicted_ms) * 100 / $p.predicted_ms) | round) %)"' >>"$T/figures"
	grep -v '^figure' "$T/figures"
}
come_back() {
	local h
	for h in b c; do
		snmigrate "$h" return hosta --with-storage --json >"$T/return.json" || fail "return from host$h: exit $?: $(tail -n 1 "$T/return.json")"
		tail -n 1 "$T/return.json" | jq -e '.result == "moved" and .kind == "return" and ([.vms[] | .destination] | all(. == "hosta"))' >/dev/null || fail "return: $(tail -n 1 "$T/return.json")"
	done
}
