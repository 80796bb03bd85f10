#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Long: make memory-faults
# Alone: judges rates
# A guest that changes little of the pages that it writes to, over a limited link: with deltas its rounds get shorter, fewer bytes
# travel and the guest stands still for less, and no page is wrong.
source "$(dirname "$0")/lib.sh"
source "$(dirname "$0")/refuse_lib.sh"
require_kvm
DISK_MB=8
hosts_up
# Even a guest on a busy host writes to all of its working set in the time that a round of it takes.
native_vm a vm1 128M "ws=24 rate=60 touch=4 zero=1 scan=20 fill=few zero_every=64 disk=off hb=400"
wait_touched a vm1

# move HOST OPTION...: its last line in $end
move() {
	local rc=0
	snmigrate "$1" vm1 "host$(other "$1")" --with-storage --json --bandwidth 20M --compress off --priority guest --max-rounds 6 \
		"${@:2}" >"$T/move.json" 2>"$T/move.err" || rc=$?
	end=$(tail -n 1 "$T/move.json")
	[ $rc = 0 ] || fail "${*:2}: exit $rc: $end $(cat "$T/move.err")"
}
n() { jq "$1" <<<"$end"; }
# whole HOST: every page that it writes to has been checked since
whole() {
	local x y
	x=$(wait_hb "$1" vm1)
	for _ in $(seq 60); do
		y=$(wait_hb "$1" vm1 "$(hb_field "$x" seq)")
		[ $(($(hb_field "$y" pages) - $(hb_field "$x" pages))) -gt 6144 ] && { assert_good "$y"; return; }
	done
	fail "the guest does not go on: $x ... $y"
}
figures="[.wire_bytes, .memory_ms, .rounds, .downtime_ms, .delta_pages, .delta_bytes]"

refuse 2 "not auto, off, or a number" snmigrate a vm1 hostb --with-storage --delta-cache much
refuse 3 "delta_cache_bytes" snmigrate a vm1 hostb --with-storage --delta-cache 5k

move a --delta-cache off
off=$(n '.wire_bytes') off_send=$(n '.send_us') off_said=$(n "$figures" | tr -d '\n ')
[ "$(n .delta_pages)" = 0 ] || fail "deltas without: $end"
whole b
move b
on=$(n '.wire_bytes') on_send=$(n '.send_us') on_said=$(n "$figures" | tr -d '\n ')
whole a
[ "$(n .delta_pages)" -gt 3000 ] || fail "no deltas: $end"
[ "$(n .delta_bytes)" -lt $(($(n .delta_pages) * 400)) ] || fail "long deltas: $end"
jq -es '[.[] | .memory.delta_pages // empty] | length > 0' "$T/move.json" >/dev/null || fail "no deltas in the progress"
[ "$on" -lt $((off * 7 / 10)) ] || fail "with deltas $on bytes travelled, without $off"
[ "$on_send" -lt "$off_send" ] || fail "the last memory took $on_send us with deltas, $off_send without"

# A cache of a third of what the guest writes to: some pages go as deltas, and none wrong.
move a --delta-cache 8M
small_said=$(n "$figures" | tr -d '\n ')
whole b
[ "$(n .delta_pages)" -gt 500 ] || fail "no deltas from a small cache: $end"
# Unlimited: whatever it finds worth while.
rc=0
snmigrate b vm1 hosta --with-storage --json >"$T/move.json" 2>"$T/move.err" || rc=$?
[ $rc = 0 ] || fail "unlimited: exit $rc: $(tail -n 1 "$T/move.json")"
whole a
echo "figure: bytes, memory ms, rounds, downtime ms, delta pages, delta bytes: off $off_said; auto $on_said; 8M $small_said; unlimited auto $(tail -n 1 "$T/move.json" | jq "$figures" | tr -d '\n ')"
