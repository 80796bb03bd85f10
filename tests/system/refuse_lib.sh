# SPDX-License-Identifier: Apache-2.0
# What the tests of refusals share. Sourced after lib.sh; not executable.
# shellcheck shell=bash
checks=0

# refuse STATUS TEXT COMMAND...: that exit status, exactly one line on stderr, and TEXT (a basic regular expression) in it
refuse() {
	local status=$1 text=$2 rc=0
	shift 2
	"$@" >"$T/out" 2>"$T/err" </dev/null || rc=$?
	[ "$rc" = "$status" ] || fail "exit $rc, not $status: $* (stderr: $(cat "$T/err"))"
	[ "$(wc -l <"$T/err")" = 1 ] || fail "not one line on stderr: $*: $(cat "$T/err")"
	grep -q -- "$text" "$T/err" || fail "'$text' is not in: $(cat "$T/err")"
	checks=$((checks + 1))
	echo "refused ($rc): $(cat "$T/err")"
}
processes() { # HOST COMM
	local p n=0
	for p in $(ip netns pids "$NS$1" 2>/dev/null); do
		[ "$(cat "/proc/$p/comm" 2>/dev/null)" = "$2" ] && n=$((n + 1))
	done
	echo $n
}
# What a refused arrival may leave at HOST, where EXPECTED VMs run (default none): nothing. Half a minute's patience is for the
# process that said no and has to end.
clean() { # HOST [EXPECTED]
	local i rest
	for i in $(seq 100); do
		rest=
		[ -z "$(ls -A "$T/$1/state/incoming" 2>/dev/null)" ] || rest="incoming: $(ls "$T/$1/state/incoming")"
		[ "$(processes "$1" snvmm)" = "${2:-0}" ] || rest="$rest $(processes "$1" snvmm) snvmm, not ${2:-0}"
		[ -z "$rest" ] && return 0
		sleep 0.1
	done
	fail "left over at host$1: $rest"
}
# VM still runs at HOST, is not being moved, and its guest goes on; nothing at the other side
declare -A SEEN
untouched() { # HOST VM [EXPECTED SNVMM AT THE OTHER HOST]
	local hb o i
	o=$(other "$1")
	[ "$(vm_state "$1" "$2")" = running ] || fail "$2 is $(vm_state "$1" "$2") at host$1"
	for i in $(seq 50); do
		[ "$(snvm "$1" info "$2" --json | jq -c .migrating)" = null ] && break
		sleep 0.1
	done
	[ "$(snvm "$1" info "$2" --json | jq -c .migrating)" = null ] || fail "$2 is still migrating"
	hb=$(wait_hb "$1" "$2" "${SEEN[$2]:--1}")
	assert_good "$hb"
	SEEN[$2]=$(hb_field "$hb" seq)
	clean "$o" "${3:-0}"
}
