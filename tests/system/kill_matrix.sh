#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Every actor killed at every named point (docs/handover.md, "Who dies when"), on the native guest. After each: the outcome of the
# table, never two running copies, nothing left over, and the next move works.
#   POINTS, VICTIMS: subsets; SILENCE_MS: the hosts' silence limit; RETRY_FOR: how long a lost link is tried again (0)
SILENCE_MS=${SILENCE_MS:-1000}
source "$(dirname "$0")/lib.sh"
require_kvm
# owner-recorded: RUNNING not sent, the destination's record durable (handover.md, E)
ALL="before-storage in-copy in-mirror in-precopy after-ready after-commit owner-recorded"
# the check (SNM_BRIEF=1) has the two beside the handover, make kill-matrix all
[ "${SNM_BRIEF:-}" = 1 ] && ALL="after-ready after-commit"
POINTS=${POINTS:-$ALL}
VICTIMS=${VICTIMS:-source-snvmm destination-snvmm source-snmigrated destination-snmigrated link}
DISK_MB=64
hosts_up
cases=0

# What the table allows: "STATE@HOST:EXIT ..."
expected() { # POINT VICTIM
	# before the handover a new attempt makes up for what broke at the destination or between the hosts
	[ "${RETRY_FOR:-0}" = 0 ] || case $2-$1 in
	*-after-* | *-owner-recorded) ;;
	destination-* | link-*) echo "running@b:0"; return ;;
	esac
	case $2-$1 in
	source-snvmm-after-commit | source-snvmm-owner-recorded) echo "running@b:0" ;;
	source-snvmm-*) echo "crashed@a:8" ;;
	destination-snvmm-owner-recorded) echo "crashed@b:8" ;;
	destination-snvmm-*) echo "running@a:4" ;;
	source-snmigrated-*) echo "running@b:0" ;;
	destination-snmigrated-after-* | destination-snmigrated-owner-recorded) echo "running@b:0" ;;
	destination-snmigrated-*) echo "running@b:0 running@a:4" ;;
	link-after-commit | link-owner-recorded) echo "running@b:0 running@b:6" ;;
	link-*) echo "running@a:4" ;;
	esac
}
snvmm_pid() { snvm "$1" info "$2" --json | jq -r .pid; }
strike() { # VICTIM
	case $1 in
	source-snvmm) kill -KILL "$(snvmm_pid a "$vm")" ;;
	destination-snvmm) kill -KILL $(pids_in b snvmm incoming) ;;
	source-snmigrated) daemon_kill a ;;
	destination-snmigrated) daemon_kill b ;;
	link) link_cut b ;;
	esac
}
mend() { # VICTIM
	case $1 in
	source-snmigrated) daemon_start a "SNM_FAULT=$fault" "SNM_FAULT_DIR=$T/fault" ;;
	destination-snmigrated) daemon_start b "SNM_FAULT=$fault_b" "SNM_FAULT_DIR=$T/fault" ;;
	link) sleep "$(awk "BEGIN { print $SILENCE_MS * 1.5 / 1000 }")"; link_heal b ;;
	esac
}
# Where it settled, as "STATE@HOST"; empty while undecided. Two running copies end the test at once.
outcome() {
	local a b
	a=$(vm_state a "$vm") b=$(vm_state b "$vm")
	[ "$a" = running ] && [ "$b" = running ] && fail "TWO RUNNING COPIES of $vm"
	case $a-$b in
	running-absent) echo running@a ;;
	absent-running) echo running@b ;;
	crashed-absent) echo crashed@a ;;
	absent-crashed) echo crashed@b ;;
	esac
}
# No arrival, no stray process on either side, but for the VM's own where it runs.
left_over() { # HOST RUNNING_HERE(0/1)
	local n
	[ -z "$(ls -A "$T/$1/state/incoming" 2>/dev/null)" ] || echo "host$1: incoming: $(ls "$T/$1/state/incoming")"
	n=$(pids_in "$1" snvmm | wc -l); [ "$n" -eq "$2" ] || echo "host$1: $n snvmm for $2 VM"
	n=$(pids_in "$1" qemu-nbd | wc -l); [ "$n" -eq "$2" ] || echo "host$1: $n qemu-nbd for $2 VM"
	[ "$2" = 1 ] || [ ! -e "$(vm_dir "$1" "$vm")" ] || [ "${where%@*}" = crashed ] || echo "host$1: the VM's folder is still there"
}

for point in $POINTS; do
	for victim in $VICTIMS; do
		cases=$((cases + 1)); vm=vm$cases
		begin=$(date +%s%N)
		daemon_kill a TERM; daemon_kill b TERM
		rm -rf "$T/fault"; mkdir "$T/fault"
		fault=$point:hold fault_b= hits=$point
		# COMMIT sent means COMMIT read here: the destination runs, held, before its owner record
		case $point in
		after-commit) fault_b=d-held-running:hold hits="$point d-held-running" ;;
		owner-recorded) fault_b=d-owner-recorded:hold hits=d-owner-recorded ;;
		esac
		daemon_start b "SNM_FAULT=$fault_b" "SNM_FAULT_DIR=$T/fault"
		daemon_start a "SNM_FAULT=$fault" "SNM_FAULT_DIR=$T/fault"
		native_vm a $vm 128M "ws=16 rate=20 touch=8 zero=1 disk=rw diskrate=200 hb=100 seed=$cases"
		wait_touched a $vm
		snmigrate a $vm hostb --with-storage --json >"$T/move.json" 2>"$T/move.err" &
		mover=$!
		for hit in $hits; do
			for _ in $(seq 400); do [ -e "$T/fault/$hit.hit" ] && break; sleep 0.05; done
			[ -e "$T/fault/$hit.hit" ] || { cat "$T/move.json" "$T/move.err"; fail "$victim at $point: $hit was not reached"; }
		done
		strike "$victim"
		sleep 0.1
		[ "$victim" = link ] && sleep "$(awk "BEGIN { print $SILENCE_MS * 1.2 / 1000 }")"
		for hit in $hits; do touch "$T/fault/$hit.go"; done
		mend "$victim"
		rc=0; wait $mover || rc=$?
		where=
		for _ in $(seq $((300 + SILENCE_MS / 50))); do # beyond the silence limit
			where=$(outcome); [ -n "$where" ] && break
			sleep 0.1
		done
		[ -n "$where" ] || fail "$victim at $point: undecided: hosta $(vm_state a $vm), hostb $(vm_state b $vm); exit $rc; $(tail -n 1 "$T/move.json")"
		case " $(expected "$point" "$victim") " in
		*" $where:$rc "*) ;;
		*) fail "$victim at $point: $where, exit $rc; the table says $(expected "$point" "$victim"); $(tail -n 1 "$T/move.json")" ;;
		esac
		for _ in $(seq $((100 + SILENCE_MS / 100))); do
			rest=$(left_over a $([ "$where" = running@a ] && echo 1 || echo 0); left_over b $([ "$where" = running@b ] && echo 1 || echo 0))
			[ -z "$rest" ] && break
			sleep 0.1
		done
		[ -z "$rest" ] || fail "$victim at $point: left over: $rest"
		# and the next move works, in the direction that is left
		h=${where#*@}
		[ "${where%@*}" = crashed ] && { snvm "$h" start $vm; }
		hb=$(wait_hb "$h" $vm); assert_good "$hb"
		for _ in 1 2 3 4 5 6 7 8; do
			rc2=0; snmigrate "$h" $vm "host$(other "$h")" --with-storage --json >"$T/next.json" 2>&1 || rc2=$?
			[ $rc2 = 3 ] || break # still unconfirmed for an instant
			sleep 1
		done
		[ $rc2 = 0 ] || fail "$victim at $point: the next move: exit $rc2: $(tail -n 1 "$T/next.json")"
		hb=$(wait_hb "$(other "$h")" $vm "$(hb_field "$hb" seq)"); assert_good "$hb"
		snvm "$(other "$h")" stop --force $vm
		snvm "$(other "$h")" delete $vm
		# what was kept of the disks for the next attempt is gone with it
		rest=$(ls -A "$T/a/state/partial" "$T/b/state/partial" | grep -v -e : -e '^$' || true)
		[ -z "$rest" ] || fail "$victim at $point: kept after the VM has moved: $rest"
		echo "$victim at $point: $where, exit $rc ($(( ($(date +%s%N) - begin) / 1000000 )) ms)"
	done
done
echo "figure: $cases deaths, each with the outcome of docs/handover.md"
