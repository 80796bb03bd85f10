#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Power loss of a host, and a cut link, at every named point of a move (docs/handover.md, "Who dies when"), in the lab. A batch is
# one loss that hits seven VMs, each at a point of its own. Then what resolve does about a host that is off.
#   BATCHES, POINTS: subsets; SILENCE_MS, GRACE_MS: the hosts' limits; WAIT_S: patience
source "$(dirname "$0")/power_lib.sh"
source "$repo/tests/power/resolve.sh"
require_lab
POINTS=${POINTS:-before-storage in-copy in-mirror in-precopy after-ready after-commit owner-recorded}
BATCHES=${BATCHES:-source-host destination-host link resolve}
wait_ready_list=()
power_up

make_vms() { # PREFIX POINT...
	local p prefix=$1 n=0
	shift
	for p in "$@"; do
		n=$((n + 1))
		make_vm "$prefix$n" "$p"
	done
}
at_late() { case ${POINT[$1]} in after-commit | owner-recorded) return 0 ;; esac; return 1; }

# ---- the source host dies
source_off() { if at_late "$1"; then echo "off running"; else echo "off absent+record"; fi; }
source_back() { if at_late "$1"; then echo "absent running"; else echo "crashed absent"; fi; }
batch_source_host() {
	lab kill host1
	silence 1.2
	release host2
	settle "host1 is off" source_off
	lab boot host1
	settle "host1 is back" source_back
}
# ---- the destination host dies
destination_off() { if at_late "$1"; then echo "in-doubt+any off 6"; else echo "running off 4"; fi; }
destination_back() {
	case ${POINT[$1]} in
	owner-recorded) echo "absent+keeps crashed 6" ;;
	after-commit) echo "running absent 6" ;;
	*) echo "running absent 4" ;;
	esac
}
batch_destination_host() {
	lab kill host2
	silence 1.3
	release host1
	settle "host2 is off" destination_off
	lab boot host2
	settle "host2 is back" destination_back
}
# ---- the link is cut
link_cut() { if at_late "$1"; then echo "in-doubt+any running 6"; else echo "running absent+record 4"; fi; }
link_healed() { if at_late "$1"; then echo "absent running 6"; else echo "running absent 4"; fi; }
batch_link() {
	lab cut
	silence 1.3
	release host1 host2
	settle "the link is cut" link_cut
	lab heal
	settle "the link is healed" link_healed
}

for name in $BATCHES; do
	batch=$name
	step "$batch: VMs start"
	# shellcheck disable=SC2086
	if [[ $name == resolve ]]; then make_vms_resolve; else make_vms "${name:0:1}" $POINTS; fi
	step "$batch: moves begin"
	bring_to_points
	step "$batch: the loss"
	"batch_${name//-/_}"
	step "$batch: the next moves"
	host_status host1; host_status host2
	for vm in "${VMS[@]}"; do [[ -n ${BAD[$vm]:-} ]] || next_move "$vm"; done
	summary
done
echo "figure: $((cases - failed)) of $cases losses of power or link with the outcome of docs/handover.md"
step "$((cases - failed)) passed, $failed failed"
((failed == 0))
