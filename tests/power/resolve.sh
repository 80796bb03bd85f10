# SPDX-License-Identifier: Apache-2.0
# What a person can do while the destination host is off, and what becomes of it when that was not the end of it (docs/handover.md,
# "The way out"). Sourced by power_loss.sh. One loss, six VMs:
#   r1 after-commit     --run-here at the source              runs there, a higher epoch; the arrival is given up after the boot
#   r2 owner-recorded   --run-here at the source              likewise; the other copy, an owner of a lower epoch, never runs again
#   r3 after-commit     --give-up at the source               its paused guest ends; after the boot its disks are the VM, crashed
#   r4 owner-recorded   --give-up at the source after the boot   the files that it still keeps go to kept/
#   r5 after-commit     resolve alone                         says what to do; settles by itself
#   r6 running-sent     --give-up at the source               its tombstone goes; --run-here at the destination after the boot
# shellcheck shell=bash
refused() { # VM HOST STATUS PATTERN CMD...: refused with this status and a sentence that has the pattern
	local vm=$1 host=$2 status=$3 pattern=$4 rc=0
	shift 4
	on "$host" "$@" >"$work/refused" 2>&1 || rc=$?
	[[ $rc == "$status" ]] && grep -q -- "$pattern" "$work/refused" && return
	bad "$vm" "$host: $*: exit $rc, not $status with '$pattern': $(tail -n 2 "$work/refused" | tr '\n' ' ')"
}
done_by() { # VM HOST STATUS CMD...
	local vm=$1 host=$2 status=$3 rc=0
	shift 3
	on "$host" "$@" >"$work/done" 2>&1 || rc=$?
	[[ $rc == "$status" ]] || bad "$vm" "$host: $*: exit $rc, not $status: $(tail -n 2 "$work/done" | tr '\n' ' ')"
}
record_of() { # VM HOST: "STATE EPOCH"
	{ on "$2" snmigrate resolve "$1" 2>/dev/null || :; } | sed -nE 's/.*\(record ([a-z-]+), epoch ([0-9]+).*/\1 \2/p'
}
resolve_off() { case $1 in r6) echo "absent+record off 0" ;; *) echo "in-doubt+any off 6" ;; esac; }
resolve_acted() {
	case $1 in
	r1 | r2) echo "running off 6" ;;
	r6) echo "absent off 0" ;;
	*) echo "in-doubt+any off 6" ;;
	esac
}
resolve_back() {
	case $1 in
	r1 | r5) echo "running absent 6" ;;
	r2) echo "running in-doubt+any 6" ;;
	r3) echo "crashed absent 6" ;;
	r4) echo "absent+keeps crashed 6" ;;
	r6) echo "absent in-doubt+any 0" ;;
	esac
}
resolve_end() {
	case $1 in
	r1 | r5) echo "running absent 6" ;;
	r2) echo "running absent+kept 6" ;;
	r3) echo "crashed absent 6" ;;
	r4) echo "absent+kept crashed 6" ;;
	r6) echo "absent running 0" ;;
	esac
}
batch_resolve() {
	local yes=--yes-the-other-host-is-off epoch state
	lab kill host2
	silence 1.3
	release host1
	settle "host2 is off" resolve_off
	epoch=$(record_of r1 host1) # handing-over, of the attempt
	refused r1 host1 3 "no power\|has no power\|yes-the-other" snmigrate resolve r1 --run-here
	refused r1 host1 3 "in doubt\|in-doubt\|already started" snvm start r1
	done_by r5 host1 6 snmigrate resolve r5
	done_by r1 host1 0 snmigrate resolve r1 --run-here $yes
	done_by r2 host1 0 snmigrate resolve r2 --run-here $yes
	done_by r3 host1 6 snmigrate resolve r3 --give-up
	done_by r6 host1 0 snmigrate resolve r6 --give-up
	host_status host1
	[[ $(things_of host1 r3) != *snvmm=* ]] || { sleep 3; host_status host1; }
	[[ $(things_of host1 r3) != *snvmm=* ]] || bad r3 "given up, but its snvmm is still there"
	settle "host2 is off, a person decided" resolve_acted
	state=$(record_of r1 host1)
	[[ ${state% *} == owner-unconfirmed ]] && ((${state#* } > ${epoch#* })) || bad r1 "record $state after $epoch and --run-here"
	wait_beat host1 r1 && wait_beat host1 r2 || :
	lab boot host2
	settle "host2 is back" resolve_back
	# the copy that had let its effects out before the power went: it may not run, whoever asks for it
	refused r2 host2 3 "in doubt\|in-doubt\|made its owner\|owner since" snvm start r2
	refused r2 host2 3 "answers" snmigrate resolve r2 --run-here $yes
	refused r6 host2 3 "" snvm start r6
	refused r4 host2 3 "" snmigrate resolve r4 --give-up
	for _ in 1 2 3 4 5; do
		sleep 2
		host_status host1
		host_status host2
		one_runs r2
		[[ $(things_of host2 r2) != *snvmm=* ]] || bad r2 "the old copy has an snvmm at host2"
	done
	done_by r2 host2 0 snmigrate resolve r2 --give-up
	done_by r4 host1 0 snmigrate resolve r4 --give-up
	done_by r6 host2 0 snmigrate resolve r6 --run-here $yes
	settle "all is decided" resolve_end
	for vm in r1 r2; do
		[[ -n ${BAD[$vm]:-} ]] || [[ $(record_of $vm host1) == owner\ * ]] || bad $vm "not confirmed: $(record_of $vm host1)"
	done
}
make_vms_resolve() {
	make_vm r1 after-commit
	make_vm r2 owner-recorded
	make_vm r3 after-commit
	make_vm r4 owner-recorded
	make_vm r5 after-commit
	make_vm r6 running-sent
}
