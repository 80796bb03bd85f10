#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Alone: judges the guest's gaps
# The native guest (1 GiB, 100 MB/s dirtied, two disks in use) moves back and forth MOVES times: no bad page, no bad sector.
# With SNM_VERIFY=1 both sides compare all memory and device state at each handover, which makes the gaps longer.
IDLE=0
source "$(dirname "$0")/lib.sh"
require_kvm
MOVES=${MOVES:-$([ "${SNM_BRIEF:-}" = 1 ] && echo 3 || echo 20)}
hosts_up
native_vm a vm1 1G "ws=256 rate=100 touch=512 disk=rw diskrate=300 fresh=1 hb=100"
wait_touched a vm1
here=a worst=0 downs=
for n in $(seq "$MOVES"); do
	there=$(other $here)
	seq=$(hb_field "$(wait_hb $here vm1)" seq)
	snmigrate $here vm1 "host$there" --with-storage --json >"$T/move.json" || { rc=$?; tail -n 3 "$T/move.json"; fail "move $n: exit $rc"; }
	end=$(tail -n 1 "$T/move.json")
	[ "$(jq -r .result <<<"$end")" = moved ] || fail "move $n: $end"
	[ ! -e "$(vm_dir $here vm1)" ] || fail "move $n: the source's folder is still there"
	[ "$(vm_state $here vm1)" = absent ] || fail "move $n: the source still lists it"
	# the parts of the blackout are all of it
	jq -e '([.stop_us, .drain_us, .dirty_us, .state_us, .send_us, .load_us, .resume_us] | add) as $sum
		| (.downtime_ms * 1000 - $sum | fabs) < 2 and .stop_us > 0 and .state_us > 0 and .send_us > 0 and .load_us > 0' \
		<<<"$end" >/dev/null || fail "move $n: the blackout's parts: $end"
	[ "${SNM_VERIFY:-}" != 1 ] || jq -e '.verified.memory_pieces == 512 and .verified.left_out == 0' <<<"$end" >/dev/null || fail "move $n was not verified: $end"
	hb=$(wait_hb $there vm1 "$seq")
	assert_good "$hb"
	worst=$(hb_field "$hb" maxgap_us)
	downs="$downs $(jq -r .downtime_ms <<<"$end")"
	echo "move $n host$here -> host$there: $(jq -r '"total \(.total_ms) ms, downtime \(.downtime_ms) ms of \(.predicted_downtime_ms) predicted, slowed by \(.guest_slowed_percent) %, rounds \(.rounds)"' <<<"$end"), longest gap so far $worst us"
	here=$there
done
echo "figure: $MOVES moves, longest gap the guest saw: $worst us; downtime_ms:$downs"
