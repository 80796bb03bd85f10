#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What a VMM may still do, at rest and in a move: every thread has its filter, gains no privileges, and holds capabilities only
# where it needs them; a call that its filter does not have fails or, where it is grave, ends the process, and the log names the kind
# of thread and the call.
TRESPASS=1
source "$(dirname "$0")/lib.sh"
require_kvm
grep -q '^Seccomp_filters:' /proc/self/status || skip "this kernel does not tell how many filters a thread has"
# the kinds whose threads open files, dial and start qemu-nbd: the filter of the process alone
WIDE="snvmm sigterm qemu-nbd-keeper machine-events"
threads=0 kinds=
field() { awk -v f="$2:" '$1 == f {print $2}' "$1" 2>/dev/null; }
# judge HOST: all threads of its VMMs and what they started
judge() {
	local p t name n most seen=
	for p in $(pids_in "$1" snvmm); do
		for t in /proc/"$p"/task/*; do
			name=$(tr ' ' - <"$t/comm" 2>/dev/null) || continue
			n=$(field "$t/status" Seccomp_filters)
			[ -n "$n" ] || continue
			threads=$((threads + 1))
			[ "$(field "$t/status" Seccomp)" = 2 ] || fail "thread $name of host$1 has no filter"
			[ "$(field "$t/status" NoNewPrivs)" = 1 ] || fail "thread $name of host$1 may gain privileges"
			if [ "$n" -ge 2 ]; then
				# memory threads: CAP_SYS_NICE
				case $name in mem-*) most=0000000000800000 ;; *) most=0000000000000000 ;; esac
				[ "$(field "$t/status" CapPrm)" = $most ] || fail "thread $name of host$1 has capabilities $(field "$t/status" CapPrm)"
				seen="$seen ${name%%-[0-9]*}"
			else
				grep -qw -- "$name" <<<"$WIDE" || fail "thread $name of host$1 has the filter of the process alone"
			fi
		done
	done
	for p in $(pids_in "$1" qemu-nbd); do
		[ "$(field "/proc/$p/status" Seccomp)" = 2 ] && [ "$(field "/proc/$p/status" NoNewPrivs)" = 1 ] || fail "qemu-nbd of host$1 is not confined"
		seen="$seen qemu-nbd"
	done
	kinds=$(printf '%s\n' $kinds $seen | sort -u | tr '\n' ' ')
}
want() { local k; for k in "$@"; do grep -qw -- "$k" <<<"$kinds" || fail "no thread $k among: $kinds"; done; }

DISK_MB=64 FILL_MB=8
VM_EXTRA="[net lan]
bridge = br0
mac = 52:54:00:00:00:01"
hosts_up SNM_LOG=debug
native_vm a vm1 256M "ws=32 rate=20 touch=64 disk=rw diskrate=100 hb=100"
wait_touched a vm1
judge a
want vcpu disk-ring disk-pool nbd-client console qemu-nbd
echo "at rest: $threads threads"

# held in the middle, where the mirrors are up; each kind of thread also asks for what its filter does not have
KINDS="vcpu device disk nbd memory mirror link"
called() { case $1 in process) echo "this process" ;; vcpu) echo "vCPU threads" ;; nbd) echo "NBD threads" ;; link) echo "control channel threads" ;; *) echo "$1 threads" ;; esac; }
asks=$(for k in $KINDS; do printf 'confine-%s:fail,' "$k"; done)
again() { daemon_kill "$1" TERM; daemon_start "$@"; }
mkdir -p "$T/fault"
snvm a stop --force vm1
again a "SNM_FAULT=${asks}in-mirror:hold" "SNM_FAULT_DIR=$T/fault"
again b "SNM_FAULT=${asks%,}"
snvm a start vm1
wait_hb a vm1 >/dev/null
snmigrate a vm1 hostb --with-storage --json >"$T/move.json" 2>&1 &
move=$!
for _ in $(seq 300); do [ -e "$T/fault/in-mirror.hit" ] && break; sleep 0.1; done
[ -e "$T/fault/in-mirror.hit" ] || fail "the move did not get to its mirrors: $(tail -n 1 "$T/move.json")"
threads=0
judge a; judge b
want mirror mirror-copy nbd-request nbd-reply hashes
touch "$T/fault/in-mirror.go"
wait $move || fail "move: $(tail -n 1 "$T/move.json")"
judge b
echo "in a move: $threads threads, of: $kinds"
hb=$(wait_hb b vm1); assert_good "$hb"
for h in a b; do
	for kind in $KINDS; do
		n=$(cat "$T/$h"/state/logs/* | grep -ac "the filter of $(called "$kind") does not have the call getppid: it fails") || true
		[ "$n" -ge 1 ] || fail "the log of host$h does not say that $(called "$kind") called getppid"
		# once in a process: the source's VMM, or the destination's
		[ "$n" -le 2 ] || fail "the log of host$h says $n times that $(called "$kind") called getppid"
	done
	grep -qa "forbids the call" "$T/$h"/state/logs/* && fail "a process of host$h ended"
	rm -f "$T/$h"/state/logs/*
done
echo "an unforeseen call of each kind: told, and the VM went on"

# --- a grave one ends the process
said() { # HOST KIND
	grep -qha "the filter of $(called "$2") forbids the call ptrace: the process ends" "$T/$1"/state/logs/* || fail "the log of host$1 does not say that $(called "$2") called ptrace"
	rm -f "$T/$1"/state/logs/*
	echo "$2: ended"
}
# at a VM's start
snvm b stop --force vm1
for kind in process vcpu disk; do
	again b "SNM_FAULT=confine-$kind-grave:fail"
	snvm b start vm1 >"$T/out" 2>&1 && wait_state b vm1 crashed
	said b $kind
done
# in a move, at the source
again b SNM_FAULT=confine-memory-grave:fail
snvm b start vm1; wait_hb b vm1 >/dev/null
snmigrate b vm1 hosta --with-storage --json >"$T/move.json" 2>&1 && fail "confine-memory-grave: moved"
wait_state b vm1 crashed
said b memory
# and at the destination, where the VM does not feel it
again b
snvm b start vm1; wait_hb b vm1 >/dev/null
again a SNM_FAULT=confine-link-grave:fail
rc=0
snmigrate b vm1 hosta --with-storage --json >"$T/move.json" 2>&1 || rc=$?
[ $rc = 3 ] || [ $rc = 4 ] || fail "confine-link-grave at the destination: exit $rc: $(tail -n 1 "$T/move.json")"
said a link
hb=$(wait_hb b vm1); assert_good "$hb"
[ "$(vm_state b vm1)" = running ] || fail "confine-link-grave: the VM is $(vm_state b vm1)"
again a
snmigrate b vm1 hosta --with-storage --json >"$T/move.json" 2>&1 || fail "the last move: $(tail -n 1 "$T/move.json")"
hb=$(wait_hb a vm1); assert_good "$hb"
echo "figure: every kind of thread is confined: $kinds"
