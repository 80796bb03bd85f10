#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Alone: emulated hosts
# A Debian guest with two ext4 disks, two vCPUs, fsync recorders and an open TCP connection moves host1 -> host2, then
# back and forth, MOVES times in all; then every record that arrived is on its disks. With SNM_VERIFY=1 both sides compare all memory
# and device state at each handover.
source "$(dirname "$0")/linux_lib.sh"
require_lab
MOVES=${MOVES:-2}
linux_up ${SNM_VERIFY:+--env SNM_VERIFY="$SNM_VERIFY"}
balloon() { on "$1" snvm info "$VM" --json | jq -r "$2"; }
balloon_is() { [[ $(balloon "$1" '.balloon | "\(.driver) \(.actual_bytes)"') == "true $2" ]]; }
here=host1 there=host2
# Debian's driver: as far as it is asked, and what it has no use for by itself
step "the guest gives memory back: the host holds $(balloon $here '.resident_bytes / 1048576 | floor') MiB of 512"
on $here snvm balloon "$VM" 448M
wait_for 180 "balloon of 64 MiB" balloon_is $here $((448 << 20))
(($(balloon $here .resident_bytes) < 458 << 20)) || fail "the host holds $(balloon $here .resident_bytes) bytes for a guest that keeps 448 MiB"
for ((n = 1; n <= MOVES; n++)); do
	step "move $n"
	linux_move $here $there
	[[ ${SNM_VERIFY:-} != 1 ]] || tail -n 1 "$work/move.json" | jq -e '.verified.memory_pieces == 256' || fail "move $n was not verified"
	swap=$here here=$there there=$swap
done
balloon_is $here $((448 << 20)) || fail "the balloon after the moves: $(balloon $here .balloon)"
on $here snvm balloon "$VM" 512M
wait_for 180 "empty balloon" balloon_is $here $((512 << 20))
step "the guest is powered off and judged"
linux_judge $here
echo "figure: $MOVES moves of a Linux guest; longest gap of the counter's connection: $("$work/guest/collector" summary "$work/counter.log" | jq -c .)"
step passed
