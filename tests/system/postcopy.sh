#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Post-copy, on the native guest that checks its own pages and sectors: moves with it, a link that is cut in the middle, and either
# VMM killed meanwhile: the outcomes of docs/handover.md.
#   MOVES, CASES, CHOICES: subsets; the check (SNM_BRIEF=1) has those that differ most
RETRY_FOR=0 SILENCE_MS=1500
source "$(dirname "$0")/lib.sh"
require_kvm
MOVES=${MOVES:-$([ "${SNM_BRIEF:-}" = 1 ] && echo 2 || echo 8)}
ALL="cut cut-and-daemon cut-10 cut-50 cut-90 source-snvmm destination-snvmm give-up" ALL_CHOICES="refused auto"
[ "${SNM_BRIEF:-}" = 1 ] && ALL="cut source-snvmm destination-snvmm" ALL_CHOICES=
CASES=${CASES-$ALL} CHOICES=${CHOICES-$ALL_CHOICES}
DISK_MB=64
hosts_up
guest_does() { echo "ws=64 rate=$1 touch=128 disk=rw diskrate=200 hb=100"; } # MB/s dirtied
figure() { jq -r '"downtime \(.downtime_ms) ms (drain \(.drain_us) us, send \(.send_us), load \(.load_us), resume \(.resume_us)), \(.postcopy.pages) pages, \(.postcopy.faults) faults, median \(.postcopy.fault_median_us) us, worst \(.postcopy.fault_worst_us) us, \(.postcopy.sessions) sessions, \(.postcopy.ms) ms"' <<<"$1"; }

# start_move FROM VM: in the background, until its guest runs at the other side with pages missing there. 1 MiB a second is pushed,
# so there is time; what the guest touches comes at once.
start_move() {
	local h=$1 vm=$2 i
	: >"$T/move.json"
	rm -f "$T"/fault/*
	snmigrate "$h" "$vm" "host$(other "$h")" --with-storage --postcopy now --json >"$T/move.json" 2>"$T/move.err" &
	mover=$!
	for i in $(seq 400); do [ -e "$T/fault/recorded-handing-over.hit" ] && break; sleep 0.05; done
	snmigrate "$h" tune "$vm" --bandwidth 1M || fail "not tuned: $(tail -n 1 "$T/move.json")"
	touch "$T/fault/recorded-handing-over.go"
	for i in $(seq 400); do
		grep -q '"phase": *"postcopy"' "$T/move.json" && return 0
		kill -0 $mover 2>/dev/null || fail "the move ended before post-copy: $(tail -n 1 "$T/move.json") $(cat "$T/move.err")"
		sleep 0.05
	done
	fail "no post-copy: $(tail -n 1 "$T/move.json")"
}
end_of() { # EXIT: what the mover said, with that exit
	local rc=0
	wait $mover || rc=$?
	end=$(tail -n 1 "$T/move.json")
	[ $rc = "$1" ] || fail "exit $rc, not $1: $end $(cat "$T/move.err")"
}
arrived() { # PERCENT of the missing pages, or more
	local i
	for i in $(seq 600); do
		tail -n 1 "$T/move.json" | jq -e --argjson p "$1" '.postcopy // empty | (.pages * 4096) as $all | $all - .remaining_bytes >= $all * $p / 100' >/dev/null && return 0
		kill -0 $mover 2>/dev/null || fail "the move ended before $1 % of the pages were there: $(tail -n 1 "$T/move.json")"
		sleep 0.05
	done
	fail "$1 % of the pages are not there: $(tail -n 1 "$T/move.json")"
}
# What the destination's journal says of the last arrival, as soon as it says so.
journal_says() { # HOST VM "RESULT EXIT PHASE"
	local i said
	for i in $(seq 150); do
		said=$(snmigrate "$1" history "$2" --json | jq -r 'select(.direction == "in") | "\(.result) \(.exit) \(.phase)"' | tail -n 1)
		[ "$said" = "$3" ] && return 0
		sleep 0.1
	done
	fail "the journal of host$1 says '$said' of $2, not '$3': $(snmigrate "$1" history "$2" --json)"
}
snvmm_pid() { snvm "$1" info "$2" --json | jq -r .pid; }

native_vm a vm1 256M "$(guest_does 80)"
wait_touched a vm1
here=a
for n in $(seq "$MOVES"); do
	there=$(other $here)
	seq=$(hb_field "$(wait_hb $here vm1)" seq)
	snmigrate $here vm1 "host$there" --with-storage --postcopy now --json >"$T/move.json" 2>"$T/move.err" || fail "move $n: exit $?: $(tail -n 1 "$T/move.json")"
	end=$(tail -n 1 "$T/move.json")
	# nothing twice, and what was missing is all there
	jq -e '.result == "moved" and .postcopy.pages > 0 and .postcopy.remaining_bytes == 0 and .postcopy.pages_sent == .postcopy.pages
		and .postcopy.sessions == 1' <<<"$end" >/dev/null || fail "move $n: $end"
	[ "$(vm_state $here vm1)" = absent ] || fail "move $n: the source still lists it"
	[ ! -e "$(vm_dir $here vm1)" ] || fail "move $n: the source's folder is still there"
	hb=$(wait_hb $there vm1 "$seq"); assert_good "$hb"
	journal_says $there vm1 "moved 0 cleanup"
	snmigrate $there history vm1 --json | jq -se --argjson e "$end" 'map(select(.direction == "in"))[-1].details
		| .postcopy.pages == $e.postcopy.pages and .postcopy.remaining_bytes == 0 and .memory_bytes == $e.memory_bytes' >/dev/null ||
		fail "move $n: the destination's journal: $(snmigrate $there history vm1 --json | tail -n 1), the source's end: $end"
	echo "move $n host$here -> host$there: $(figure "$end")"
	here=$there
done
snvm $here stop --force vm1; snvm $here delete vm1

daemon_kill a TERM
mkdir "$T/fault"
daemon_start a SNM_FAULT=recorded-handing-over:hold "SNM_FAULT_DIR=$T/fault"
for case in $CASES; do
	vm=${case//-/}
	native_vm a "$vm" 256M "$(guest_does 10)"
	wait_touched a "$vm"
	start_move a "$vm"
	[ "$(vm_state a "$vm")" = absent ] && [ "$(vm_state b "$vm")" = running ] ||
		fail "$case: in post-copy: hosta $(vm_state a "$vm"), hostb $(vm_state b "$vm")"
	[ -e "$(vm_dir a "$vm")" ] || fail "$case: the source's files went before its memory"
	journal_says b "$vm" "null null postcopy"
	snmigrate a cancel "$vm" 2>"$T/cancel.err" && fail "$case: it was cancelled"
	grep -q "too late to cancel" "$T/cancel.err" || fail "$case: cancel: $(cat "$T/cancel.err")"
	snvm b pause "$vm" 2>"$T/pause.err" && fail "$case: it was paused"
	grep -q "memory is on the way" "$T/pause.err" || fail "$case: pause: $(cat "$T/pause.err")"
	case $case in
	cut*)
		seq=$(hb_field "$(wait_hb b "$vm")" seq)
		seconds=4
		case $case in cut-[0-9]*) arrived "${case#cut-}"; seconds=5 ;; esac
		link_cut b
		sleep $seconds
		# one that was restarted meanwhile does not know the pages' channels
		[ "$case" != cut-and-daemon ] || { daemon_kill b; daemon_start b; }
		kill -0 $mover 2>/dev/null || fail "$case: the move ended meanwhile: $(tail -n 1 "$T/move.json")"
		link_heal b
		snmigrate a tune "$vm" --bandwidth 0
		end_of 0
		jq -e '.result == "moved" and .postcopy.remaining_bytes == 0 and .postcopy.sessions > 1
			and .postcopy.pages_sent <= .postcopy.pages * 1.1' <<<"$end" >/dev/null || fail "$case: $end"
		hb=$(wait_hb b "$vm" "$((seq + 5))"); assert_good "$hb"
		[ ! -e "$(vm_dir a "$vm")" ] || fail "$case: the source's folder is still there"
		journal_says b "$vm" "moved 0 cleanup"
		;;
	source-snvmm | give-up)
		if [ "$case" = give-up ]; then
			link_cut b
			snmigrate a resolve "$vm" --give-up >/dev/null
			link_heal b
		else
			kill -KILL "$(pids_in a snvmm)"
		fi
		end_of 8
		wait_state b "$vm" crashed 20
		grep -q "lost the last" "$T/b/state/logs/$vm.log" || fail "$case: nothing says why"
		[ -e "$(vm_dir a "$vm")" ] || fail "$case: the source's files went although the VM has not been started"
		;;
	destination-snvmm)
		kill -KILL "$(pids_in b snvmm incoming)"
		end_of 8
		wait_state b "$vm" crashed 20
		[ -e "$(vm_dir a "$vm")" ] || fail "$case: the source's files went although the VM has not been started"
		;;
	esac
	if [ "${case%%-*}" != cut ]; then
		[ "$(vm_state a "$vm")" = absent ] || fail "$case: hosta lists it as $(vm_state a "$vm")"
		for _ in $(seq 50); do [ -z "$(pids_in a snvmm)" ] && break; sleep 0.1; done
		[ -z "$(pids_in a snvmm)" ] || fail "$case: hosta has a snvmm still"
		journal_says b "$vm" "crashed 8 postcopy"
		snvm a start "$vm" 2>/dev/null && fail "$case: it could be started at the source"
		# the disks are good, and once it runs there the source's files go
		snvm b start "$vm"
		hb=$(wait_hb b "$vm"); assert_good "$hb"
		for _ in $(seq 100); do [ -e "$(vm_dir a "$vm")" ] || break; sleep 0.1; done
		[ ! -e "$(vm_dir a "$vm")" ] || fail "$case: the source's folder stayed"
	fi
	rest=$(ls -A "$T/a/state/incoming" "$T/b/state/incoming" | grep -v -e : -e '^$' || true)
	[ -z "$rest" ] || fail "$case: left over: $rest"
	echo "$case: $([ "${case%%-*}" = cut ] && figure "$end" || jq -r .reason <<<"$end")"
	snvm b stop --force "$vm"; snvm b delete "$vm"
done

for choice in $CHOICES; do
	vm=${choice}d
	daemon_kill b TERM
	daemon_start b $([ "$choice" = refused ] && echo SNM_FAULT=d-userfaultfd:fail)
	native_vm a "$vm" 256M "$(guest_does 120)"
	wait_touched a "$vm"
	case $choice in
	refused) # a destination that cannot: `now` is refused before anything moved, `auto` goes on without
		rc=0
		snmigrate a "$vm" hostb --with-storage --postcopy now --json >"$T/move.json" 2>&1 || rc=$?
		[ $rc = 3 ] && grep -q "hostb cannot take part in post-copy: userfaultfd" "$T/move.json" || fail "refused: exit $rc: $(tail -n 1 "$T/move.json")"
		hb=$(wait_hb a "$vm"); assert_good "$hb"
		snmigrate a "$vm" hostb --with-storage --postcopy auto --json >"$T/move.json" 2>&1 || fail "refused, auto: exit $?: $(tail -n 1 "$T/move.json")"
		grep -q "cannot take part in post-copy" "$T/move.json" || fail "refused, auto: nothing was said"
		end=$(tail -n 1 "$T/move.json")
		jq -e '.result == "moved" and (has("postcopy") | not)' <<<"$end" >/dev/null || fail "refused, auto: $end"
		;;
	auto) # dirtied faster than the link carries: six rounds, and then it goes all the same
		snmigrate a "$vm" hostb --with-storage --postcopy auto --bandwidth 48M --json >"$T/move.json" 2>&1 || fail "auto: exit $?: $(tail -n 1 "$T/move.json")"
		end=$(tail -n 1 "$T/move.json")
		jq -e '.result == "moved" and .rounds <= 9 and .postcopy.pages_sent <= .postcopy.pages * 1.1 and .postcopy.pages > 1000' <<<"$end" >/dev/null || fail "auto: $end"
		echo "auto: $(figure "$end")"
		;;
	esac
	hb=$(wait_hb b "$vm"); assert_good "$hb"
	snvm b stop --force "$vm"; snvm b delete "$vm"
done
echo "figure: $MOVES moves with post-copy, and: $CASES $CHOICES"
