# SPDX-License-Identifier: Apache-2.0
# Several VMs of the native guest in the lab, each stopped at a point of its move of its own, so that one power loss or one cut
# makes a case of each. Sourced by power_loss.sh.
# shellcheck shell=bash
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
B=${B:-$repo/build}
PATH=$PATH:/usr/sbin:/sbin
SILENCE_MS=${SILENCE_MS:-10000}
GRACE_MS=${GRACE_MS:-3000}
WAIT_S=${WAIT_S:-180} # for anything that is sure to come
work=
declare -A SEQ SEED POINT ACKED0 ACKED1 BAD UUID
VMS=() # of the batch under way
cases=0 failed=0 batch=

step() { echo "$(date +%T) $*"; }
skip() { echo "skipped: $*"; exit 77; }
die() { echo "FAILED: $*"; exit 1; }
lab() { "$repo/tools/lab" "$@"; }
on() { local h=$1; shift; lab exec "$h" "$@" </dev/null; }
other() { case $1 in host1) echo host2 ;; host2) echo host1 ;; esac; }
# The case is lost, the others go on.
bad() { # VM TEXT...
	local vm=$1; shift
	echo "BAD $batch, ${POINT[$vm]} ($vm): $*"
	BAD[$vm]=1
}

require_lab() {
	local p
	for p in qemu-system-x86_64 busybox jq mke2fs; do command -v $p >/dev/null || skip "$p is missing"; done
	[[ -w /dev/net/tun ]] || skip "/dev/net/tun is not accessible"
	[[ -e $B/guest/native.elf && -e $B/tests/guest/check_disk ]] || skip "the native guest is not built (make guest)"
}
# shellcheck disable=SC2317
power_cleanup() {
	local status=$? h
	trap - ERR
	exec >&3 2>&3
	if ((status != 0)) && [[ -e ${LAB_DIR:-}/conf ]]; then
		mkdir -p "${POWER_LOGS:-$work/logs}"
		for h in host1 host2; do
			echo "--- $h:"
			lab log $h 2>/dev/null | tail -n 30 || true
			on $h sh -c 'cat /var/lib/lab/snmigrated.log; tail -n 200 /var/lib/snmigrate/logs/*' >"${POWER_LOGS:-$work/logs}/$h" 2>/dev/null || true
		done
	fi
	if [[ -n ${SNM_KEEP:-} ]] && ((status != 0)); then echo "kept: LAB_DIR=$LAB_DIR, $work"; return; fi
	lab down || true
	rm -rf "$work"
}
power_up() {
	work=$(mktemp -d "${TMPDIR:-/var/tmp}/snm-power.XXXXXX")
	export LAB_DIR=$work/lab
	trap power_cleanup EXIT
	# what ends the script may come in the middle of a redirected command
	exec 3>&1
	for signal in INT TERM HUP; do trap "echo 'FAILED: ended by SIG$signal' >&3; exit 1" $signal; done
	set -E
	trap 'echo "FAILED: line $LINENO of ${BASH_SOURCE[0]##*/}: $BASH_COMMAND" >&3' ERR
	# Emulated hosts answer slowly: what is 50 ms on hardware is not there.
	printf '[limits]\nmax-incoming = 16\nretry-for = 0\nmirror-grace-ms = %s\nsilence-ms = %s\n' "$GRACE_MS" "$SILENCE_MS" >"$work/limits.ini"
	step "two hosts start"
	lab up --ini "$work/limits.ini" --owner $$ --bin "$B/bin"
	truncate -s 16M "$work/data.raw"
	qemu-img create -q -f qcow2 "$work/root.qcow2" 16M
	local h
	for h in host1 host2; do
		on $h mkdir -p /var/lib/t
		lab push $h "$repo/tests/power/in_host" /var/lib/t/in_host
		lab push $h "$B/tests/guest/check_disk" /var/lib/t/check_disk
	done
	for f in "$B/guest/native.elf" "$work/data.raw" "$work/root.qcow2"; do lab push host1 "$f" "/var/lib/t/${f##*/}"; done
	on host1 sync
	on host2 sync
}

# host_status HOST: into $work/HOST.status; empty while the host is off
host_status() { on "$1" /var/lib/t/in_host status >"$work/$1.status" 2>/dev/null || : >"$work/$1.status"; }
state_of() { # HOST VM, as of the last host_status
	awk -v vm="$2" '$1 == "vm" && $2 == vm {s = $3} END {print s == "" ? "absent" : s}' "$work/$1.status"
}
# Everything of the VM that is on the host, as words; running or paused VMs may have what they need.
things_of() { # HOST VM
	awk -v u="${UUID[$2]}" -v vm="$2" '
		$1 == "proc" && index($3, u) {n[$2]++}
		$1 == "incoming" && index($2, u) {n["incoming"]++}
		$1 == "cgroup" && index($2, u) {n["cgroup"]++}
		$1 == "vms" && $2 == vm {n["folder"]++}
		$1 == "records" && index($2, u) {n["record"]++}
		$1 == "kept" && index($2, vm "-") {n["kept"]++}
		END {for (k in n) print k "=" n[k]}' "$work/$1.status" | sort | tr '\n' ' '
}
# What must be there, given the VM's state on this host, once all is settled.
things_expected() { # STATE
	case $1 in
	running | paused) echo "cgroup=1 folder=1 qemu-nbd=1 record=1 snvmm=1 " ;;
	crashed | stopped) echo "folder=1 record=1 " ;;
	absent) echo "" ;;
	esac
}
# The guest never rests, so a copy runs where its vCPU has used the processor since the last look; the hosts' lists may differ while
# a word is on its way.
declare -A TICKS
one_runs() { # VM
	local h now ran=0
	for h in host1 host2; do
		now=$(awk -v u="${UUID[$1]}" '$1 == "ticks" && index($2, u) {n += $3 + $4; seen = 1} END {if (seen) print n}' "$work/$h.status")
		[[ -z $now || -z ${TICKS[$h.$1]:-} ]] || ((now <= ${TICKS[$h.$1]})) || ran=$((ran + 1))
		TICKS[$h.$1]=$now
	done
	((ran < 2)) || bad "$1" "TWO RUNNING COPIES"
}

# make_vm NAME POINT: created on host1 and started with a daemon whose children stop at the point
make_vm() {
	local vm=$1 point=$2 fault=$2
	cases=$((cases + 1))
	VMS+=("$vm")
	POINT[$vm]=$point
	SEED[$vm]=$((cases * 10))
	unset "BAD[$vm]"
	case $point in owner-recorded | running-sent) fault= ;; esac
	cat >"$work/vm.ini" <<INI
[vm]
name = $vm
memory = 32M
cpus = 1
kernel = /var/lib/t/native.elf
cmdline = ws=2 rate=1 touch=4 zero=1 scan=2 disk=rw diskrate=20 depth=4 span=8 record=200 hb=1000 timeout=600000 seed=${SEED[$vm]}
serial = socket
[disk root]
path = root.qcow2
format = qcow2
[disk data]
path = data.raw
format = raw
INI
	lab push host1 "$work/vm.ini" /var/lib/t/vm.ini
	on host1 sh -ec "mkdir -p /run/f/$vm
		lab-daemon restart SNM_FAULT=$fault:hold SNM_FAULT_DIR=/run/f/$vm
		snvm create /var/lib/t/vm.ini --import root=/var/lib/t/root.qcow2 --import data=/var/lib/t/data.raw >/dev/null
		snvm start $vm
		/var/lib/t/in_host modest" || die "$vm cannot be made"
}
heartbeats() { local h=$1; shift; on "$h" /var/lib/t/in_host heartbeats "$@" >"$work/$h.hb" 2>/dev/null || :; } # HOST VM...
hb_field() { # HOST VM FIELD, as of the last heartbeats
	sed -nE "s/^$2 hb(.*)? $3=([0-9]+).*/\2/p" "$work/$1.hb"
}
# Until the guest has its memory in place and has flushed some records.
wait_loaded() { # VM...
	local vm todo i
	for ((i = 0; i < WAIT_S / 2; i++)); do
		heartbeats host1 "$@"
		todo=
		for vm in "$@"; do
			local a0 a1
			a0=$(hb_field host1 "$vm" acked) a1=$(hb_field host1 "$vm" acked1)
			((${a0:-0} >= 3 && ${a1:-0} >= 3)) && grep -q "^$vm touched" "$work/host1.hb" || todo+=" $vm"
		done
		[[ -z $todo ]] && return
	done
	die "no records from:$todo"
}
# The VM's move begins in the background, its exit status into $work/VM.rc.
begin_move() { # VM
	rm -f "$work/$1.rc"
	(
		rc=0
		lab exec host1 snmigrate "$1" host2 --with-storage --json </dev/null >"$work/$1.move" 2>"$work/$1.err" || rc=$?
		echo $rc >"$work/$1.rc"
	) &
}
wait_hit() { # HOST VM POINT
	local i again=0
	for ((i = 0; i < WAIT_S / 5; i++)); do
		on "$1" /var/lib/t/in_host hit "/run/f/$2" "$3" 5 && return
		# refused, nothing touched: a host that stands still for seconds is these hosts' own weakness
		if [[ $(cat "$work/$2.rc" 2>/dev/null) == 3 ]] && ((again++ < 3)); then
			echo "  again: $(tail -n 1 "$work/$2.move" | jq -r .reason)"
			begin_move "$2"
		fi
	done
	tail -n 2 "$work/$2.move" "$work/$2.err"
	die "$2 did not reach $3"
}
# Every VM of the batch made, loaded and brought to its point.
bring_to_points() {
	local vm late=()
	for vm in "${VMS[@]}"; do wait_ready_list+=("$vm"); done
	wait_loaded "${wait_ready_list[@]}"
	host_status host1
	for vm in "${VMS[@]}"; do
		UUID[$vm]=$(awk -v vm="$vm" '$1 == "vm" && $2 == vm {print $4}' "$work/host1.status")
		[[ -n ${UUID[$vm]} ]] || die "$vm is not listed"
		case ${POINT[$vm]} in after-ready | after-commit | owner-recorded | running-sent) late+=("$vm") ;; *) begin_move "$vm" ;; esac
	done
	for vm in "${VMS[@]}"; do
		case " ${late[*]} " in *" $vm "*) ;; *) wait_hit host1 "$vm" "${POINT[$vm]}" ;; esac
	done
	# The last acknowledged records that anybody has seen; from now on the guests at the late points stand still.
	heartbeats host1 "${VMS[@]}"
	for vm in "${VMS[@]}"; do
		ACKED0[$vm]=$(hb_field host1 "$vm" acked) ACKED1[$vm]=$(hb_field host1 "$vm" acked1)
		SEQ[$vm]=$(hb_field host1 "$vm" seq)
		[[ -n ${ACKED0[$vm]} && -n ${ACKED1[$vm]} ]] || die "no heartbeat of $vm"
	done
	for vm in ${late[@]+"${late[@]}"}; do
		local d=
		case ${POINT[$vm]} in
		after-commit) d=d-held-running ;;
		owner-recorded) d=d-owner-recorded ;;
		running-sent) d=d-running-sent ;;
		esac
		on host2 sh -ec "mkdir -p /run/f/$vm; lab-daemon restart SNM_FAULT=$d:hold SNM_FAULT_DIR=/run/f/$vm"
		begin_move "$vm"
		if [[ -n $d ]]; then
			wait_hit host2 "$vm" "$d"
			on host2 /var/lib/t/in_host modest
		fi
		case ${POINT[$vm]} in after-ready | after-commit) wait_hit host1 "$vm" "${POINT[$vm]}" ;; esac
	done
}
release() { # HOST...: everything that stands at a point there goes on
	local h
	for h in "$@"; do on "$h" sh -c 'for d in /run/f/*/; do for p in before-storage in-copy in-mirror in-precopy after-ready after-commit d-held-running d-owner-recorded d-running-sent; do : >"$d/$p.go"; done; done'; done
}
silence() { sleep "$(awk -v f="$1" "BEGIN { print $SILENCE_MS * f / 1000 }")"; }

# settle WHEN EXPECT: EXPECT VM prints "STATE-AT-HOST1 STATE-AT-HOST2 [EXIT]"; "off" for a host without power, "-" for an exit that
# nobody is there to see. Waits until every VM is there, with nothing left over where it is not.
settle() {
	local when=$1 expect=$2 vm i pending want a b rc h s why
	declare -A reason
	for ((i = 0; i < WAIT_S; i++)); do
		host_status host1
		host_status host2
		pending=0
		for vm in "${VMS[@]}"; do
			[[ -z ${BAD[$vm]:-} ]] || continue
			one_runs "$vm"
			read -r a b rc <<<"$($expect "$vm") -"
			why=
			for h in host1 host2; do
				s=$a
				[[ $h == host1 ]] || s=$b
				[[ $s != off ]] || continue
				[[ $(state_of $h "$vm") == "${s%%+*}" ]] || why+="$h: $(state_of $h "$vm"), not ${s%%+*}; "
				things_match "$h" "$vm" "$s" || why+="$h has $(things_of $h "$vm"); "
			done
			if [[ ${rc%% *} != - ]]; then
				[[ $(cat "$work/$vm.rc" 2>/dev/null || echo none) == "${rc%% *}" ]] ||
					why+="exit $(cat "$work/$vm.rc" 2>/dev/null || echo none), not ${rc%% *}: $(tail -n 1 "$work/$vm.move"); "
			fi
			reason[$vm]=$why
			[[ -z $why ]] || pending=1
		done
		((pending)) || break
		sleep 1
	done
	for vm in "${VMS[@]}"; do
		[[ -z ${BAD[$vm]:-} ]] || continue
		if [[ -n ${reason[$vm]} ]]; then bad "$vm" "$when: ${reason[$vm]}"; else echo "  $when, ${POINT[$vm]}: $($expect "$vm")"; fi
	done
}
# STATE alone: exactly what a settled VM in this state has. STATE+record: a record may wait for the other side. STATE+any: not looked at.
things_match() { # HOST VM STATE
	local have want
	have=$(things_of "$1" "$2") want=$(things_expected "${3%%+*}")
	case $3 in
	*+any) return 0 ;;
	*+record) [[ $have == "$want" || $have == "$want"record=1\  ]] ;;
	*+keeps) [[ $have == "folder=1 record=1 " ]] ;; # the former source, until the VM has been started elsewhere
	*+kept) [[ $have == "kept=1 " || $have == "kept=1 record=1 " ]] ;;
	*) [[ $have == "$want" ]] ;;
	esac
}
# The VM's disks where it lies hold what the guest had called acknowledged.
check_records() { # HOST VM
	on "$1" /var/lib/t/in_host record "$2" "${SEED[$2]}" "${ACKED0[$2]}" "${ACKED1[$2]}" >"$work/record.out" 2>&1 ||
		{ bad "$2" "records up to ${ACKED0[$2]} and ${ACKED1[$2]} were acknowledged: $(tail -n 3 "$work/record.out" | tr '\n' ' ')"; return 1; }
}
# The VM's disks as they lie there, for whoever looks for the cause.
keep_evidence() { # HOST VM
	[[ -n ${POWER_LOGS:-} ]] || return 0
	mkdir -p "$POWER_LOGS/$2"
	on "$1" sh -c "cat /var/lib/snmigrate/logs/$2.log; qemu-img map -U --output=json /var/lib/snmigrate/vms/$2/root.qcow2; qemu-img check -U /var/lib/snmigrate/vms/$2/root.qcow2" >"$POWER_LOGS/$2/log" 2>&1 || :
	cp "$work/$2".* "$work/$1.hb" "$POWER_LOGS/$2/" || :
	lab pull "$1" "/var/lib/snmigrate/vms/$2/root.qcow2" "$POWER_LOGS/$2/root.qcow2" || :
}
# The console's kept lines travel with the VM: only a beat that comes after the first one seen here shows that it lives here.
wait_beat() { # HOST VM [AFTER_SEQ]: its heart beats (further than seq), nothing bad was found
	local i seq f after=${3:--1} seen=
	on "$1" /var/lib/t/in_host modest
	for ((i = 0; i < WAIT_S / 3; i++)); do
		heartbeats "$1" "$2"
		if grep "^$2 BAD" "$work/$1.hb"; then bad "$2" "the guest found something bad (at $1)"; keep_evidence "$1" "$2"; return 1; fi
		seq=$(hb_field "$1" "$2" seq)
		if [[ -n $seq && -z $seen ]]; then
			seen=$seq
			((seq < after)) || after=$seq
		elif [[ -n $seq ]] && ((seq > after)); then
			for f in badpages badsectors badreqs badcpu; do
				[[ $(hb_field "$1" "$2" $f) == 0 ]] || { bad "$2" "$f is $(hb_field "$1" "$2" $f)"; return 1; }
			done
			return 0
		fi
	done
	bad "$2" "no heartbeat at $1"
	return 1
}
# Where the VM is: its disks, a start if it crashed, a move to the other host, its disks there; then it is deleted.
next_move() { # VM
	local vm=$1 at=host1 to rc=0 i
	[[ $(state_of host1 "$vm") == absent ]] && at=host2
	to=$(other $at)
	if [[ $(state_of $at "$vm") == crashed ]]; then
		check_records $at "$vm" || return 0
		on $at snvm start "$vm" || { bad "$vm" "cannot be started at $at"; return 0; }
		SEQ[$vm]=-1
	fi
	wait_beat $at "$vm" "${SEQ[$vm]}" || return 0
	local seq
	seq=$(hb_field $at "$vm" seq)
	for ((i = 0; i < 15; i++)); do
		rc=0
		on $at snmigrate "$vm" $to --with-storage --json >"$work/$vm.next" 2>&1 || rc=$?
		((rc == 3)) || break # what the former attempt left is still being cleaned, or unconfirmed
		sleep 2
	done
	((rc == 0)) || { bad "$vm" "the next move: exit $rc: $(tail -n 1 "$work/$vm.next")"; return 0; }
	wait_beat $to "$vm" "$seq" || return 0
	host_status $at
	[[ $(state_of $at "$vm") == absent && $(things_of $at "$vm") =~ ^(kept=1 )?(record=1 )?$ ]] || { bad "$vm" "after the next move $at has $(things_of $at "$vm")"; return 0; }
	on $to snvm stop --force "$vm" || { bad "$vm" "cannot be stopped"; return 0; }
	check_records $to "$vm" || return 0
	on $to snvm delete "$vm"
}
# One line a case.
summary() {
	local vm
	for vm in "${VMS[@]}"; do
		if [[ -n ${BAD[$vm]:-} ]]; then
			failed=$((failed + 1))
			echo "FAIL $batch, ${POINT[$vm]}"
			for h in host1 host2; do on $h sh -c "snvm stop --force $vm; snvm delete $vm" >/dev/null 2>&1 || :; done
		else
			echo "ok   $batch, ${POINT[$vm]}"
		fi
	done
	VMS=()
	wait_ready_list=()
}
