#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Alone: judges rates
# A guest that dirties its memory at twice what the link carries: --priority, --on-exceed and the budget of --max-downtime,
# that it always gets its speed back; and snmigrate dirty-rate. SNM_BRIEF=1 leaves out the move that goes over the budget.
IDLE=0
source "$(dirname "$0")/lib.sh"
source "$(dirname "$0")/refuse_lib.sh"
require_kvm
DISK_MB=8 CPUS=2
hosts_up
native_vm a vm1 192M "ws=96 rate=168 touch=8 zero=1 scan=4 disk=off hb=400"
wait_touched a vm1
LIMIT=80M BUDGET=25

# speed HOST: pages a second that the guest rewrites
speed() {
	local x y
	x=$(wait_hb "$1" vm1)
	sleep 1.5
	y=$(wait_hb "$1" vm1 "$(hb_field "$x" seq)")
	assert_good "$y"
	echo $((($(hb_field "$y" pages) - $(hb_field "$x" pages)) * 1000 / ($(hb_field "$y" t) - $(hb_field "$x" t))))
}
# full_speed HOST WHEN: as at the start; a busy machine may take a part of it, but a slowed guest has lost nearly all
full_speed() {
	local now
	now=$(speed "$1")
	echo "$2: the guest rewrites $now pages a second, $before before"
	[ "$now" -ge $((before * 6 / 10)) ] || fail "$2: the guest rewrites $now pages a second, before the moves $before"
}
# move HOST EXIT OPTION...: in $T/move.json
move() {
	local rc=0
	snmigrate "$1" vm1 "host$(other "$1")" --with-storage --json --bandwidth $LIMIT --max-downtime $BUDGET "${@:3}" >"$T/move.json" 2>"$T/move.err" || rc=$?
	end=$(tail -n 1 "$T/move.json")
	echo "host$1 ${*:3}: exit $rc: $(jq -c '[.result, .rounds, .total_ms, .downtime_ms, .predicted_downtime_ms, .guest_slowed_percent, .guest_slowed_ms]' <<<"$end")"
	[ $rc = "$2" ] || fail "${*:3}: exit $rc, not $2: $end"
}
says() { jq -e "$1" <<<"$end" >/dev/null || fail "$2: $end"; }
slowed() { jq -r '.guest_slowed_percent // empty' "$T/move.json" | sort -n | tail -n 1; }
before=$(speed a)

# What it dirties is known beforehand: 96 MiB, over and over, at 168 MB/s. Counted are tenths of a second, so a busy machine shows less.
snmigrate a dirty-rate vm1 --seconds 2 --json >"$T/rate.json" || fail "dirty-rate: exit $?"
jq -e '.vm == "vm1" and .seconds == 2 and .working_set_bytes > 99e6 and .working_set_bytes < 110e6 and .memory_bytes == 201326592
	and .dirty_bytes_per_s > 100e6 and .dirty_bytes_per_s < 190e6 and .most_dirty_bytes_per_s >= .dirty_bytes_per_s' "$T/rate.json" >/dev/null ||
	fail "dirty-rate: $(jq -c . "$T/rate.json")"
snmigrate a dirty-rate vm1 --seconds 1 >"$T/out" || fail "dirty-rate: exit $?"
grep -qE '^vm1 dirties [0-9.]+ MB/s \(at most [0-9.]+ MB/s\), [0-9.]+ MB of its memory in 1 s$' "$T/out" || fail "dirty-rate says: $(cat "$T/out")"
refuse 3 "no VM named vm9" snmigrate a dirty-rate vm9
snvm a pause vm1
refuse 3 "VM vm1 is paused" snmigrate a dirty-rate vm1
snvm a resume vm1
# a move that begins ends a measurement
snmigrate a dirty-rate vm1 --seconds 60 >"$T/rate.out" 2>"$T/rate.err" &
measurer=$!
sleep 0.5
refuse 3 "being measured already" snmigrate a dirty-rate vm1

# Nothing may slow it, so the budget breaks: the move is given up, after no more rounds than were allowed.
move a 5 --priority guest --max-rounds 4 --on-exceed cancel
says '.result == "cancelled" and .rounds == 4 and .guest_slowed_percent == 0 and .predicted_downtime_ms > 25' "given up"
says '.reason | test("downtime of about [0-9]+ ms.*25 ms")' "the reason"
[ "$(slowed)" = 0 ] || fail "it was slowed by $(slowed) %"
jq -es '[.[] | .predicted_downtime_ms // empty] | length > 1 and .[-1] > 25' "$T/move.json" >/dev/null || fail "no prediction in the progress"
rc=0; wait $measurer || rc=$?
[ $rc = 3 ] && grep -q "VM vm1 is being moved" "$T/rate.err" || fail "the measurement: exit $rc: $(cat "$T/rate.err" "$T/rate.out")"
untouched a vm1
full_speed a "after the move that was given up"

# Slowed as far as it needs, it fits the budget; the other host's guest is as fast as ever.
move a 0 --priority finish
says '.result == "moved" and .predicted_downtime_ms <= 25 and .max_downtime_ms == 25' "the prediction"
# what it came to: twice the budget is for a machine that was busy in that moment
says '.downtime_ms <= 50' "the downtime"
says '.guest_slowed_percent > 40 and .guest_slowed_percent <= 99 and .guest_slowed_ms > 0' "slowed"
jq -es '[.[] | select(.event == "message") | .text] | any(test("slowed down"))' "$T/move.json" >/dev/null || fail "no message says that it is slowed"
figure="dirty-rate $(jq '.dirty_bytes_per_s / 1e5 | round / 10' "$T/rate.json") MB/s; --priority finish: $(jq -c '[.rounds, .total_ms, .downtime_ms, .predicted_downtime_ms, .guest_slowed_percent]' <<<"$end") (rounds, ms, downtime, predicted, slowed by %)"
vcpus=$(jq -r '.guest_slowed_vcpus // empty' "$T/move.json" | sort -n | tail -n 1)
clean a
full_speed b "moved"

# A cancel gives it its speed back, too.
: >"$T/move.json"
snmigrate b vm1 hosta --with-storage --json --bandwidth $LIMIT --priority finish --max-downtime $BUDGET >"$T/move.json" 2>"$T/move.err" &
mover=$!
for _ in $(seq 400); do [ "$(slowed)" -gt 40 ] 2>/dev/null && break; sleep 0.05; done
[ "$(slowed)" -gt 40 ] || fail "the guest was not slowed: $(tail -n 2 "$T/move.json")"
refuse 3 "VM vm1 is being moved" snmigrate b dirty-rate vm1
snmigrate b cancel vm1 || fail "cancel: exit $?"
rc=0; wait $mover || rc=$?
[ $rc = 5 ] || fail "cancelled while slowed: exit $rc: $(tail -n 1 "$T/move.json")"
untouched b vm1
full_speed b "after the cancel"

# Without a word it goes over the budget at the limit, and says what was expected.
if [ "${SNM_BRIEF:-}" != 1 ]; then
	move b 0 --priority guest --max-rounds 3
	# one after the disks, and the last one, are counted, too
	says '.result == "moved" and .rounds >= 3 and .rounds <= 5 and .predicted_downtime_ms > 25 and .guest_slowed_percent == 0' "over the budget"
	full_speed a "moved over the budget"
fi
echo "figure: $figure; $vcpus of 2 vCPUs slowed"
