#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# snmigrate rehearse: all but the handover. The guest never stops and stays; nothing runs at the other host, which keeps what was
# copied; both journals say so; and the move that follows goes on from it.
source "$(dirname "$0")/lib.sh"
source "$(dirname "$0")/refuse_lib.sh"
require_kvm
DISK_MB=64
FILL_MB=32
SILENCE_MS=3000
hosts_up
native_vm a vm1 128M "ws=16 rate=20 touch=32 zero=1 disk=rw diskrate=100 span=8 hb=100"
wait_touched a vm1
snmigrate a rehearse vm1 hostb --with-storage --json >"$T/move.json" 2>"$T/err" || fail "rehearse: exit $?: $(tail -n 1 "$T/move.json") $(cat "$T/err")"
tail -n 1 "$T/move.json" >"$T/end.json"
jq -e '.result == "rehearsed" and .exit == 0 and .downtime_ms == 0 and .memory_bytes > 0 and .disk_bytes > 33554432 and .rounds >= 1' "$T/end.json" >/dev/null || fail "the last line: $(cat "$T/end.json")"
jq -e '.predicted.total_ms > 0 and .predicted_downtime_ms > 0' "$T/end.json" >/dev/null || fail "predictions: $(cat "$T/end.json")"
! grep -q '"phase":"handover"' "$T/move.json" || fail "the guest was stopped: $(grep phase "$T/move.json")"
[ "$(vm_state a vm1)" = running ] && [ "$(vm_state b vm1)" = absent ] || fail "vm1 is $(vm_state a vm1) at hosta, $(vm_state b vm1) at hostb"
untouched a vm1
[ "$(snmigrate b partial list --json | jq -r '.[].name')" = vm1 ] || fail "hostb keeps nothing: $(snmigrate b partial list)"
for _ in $(seq 50); do [ "$(snmigrate a history vm1 --json | jq -r .result)" = rehearsed ] && break; sleep 0.1; done
[ "$(snmigrate a history vm1 --json | jq -c '[.result, .exit, .phase]')" = '["rehearsed",0,"memory"]' ] || fail "history at hosta: $(snmigrate a history vm1 --json)"
[ "$(snmigrate b history vm1 --json | jq -c '[.result, .exit, .reason]')" = '["rehearsed",0,""]' ] || fail "history at hostb: $(snmigrate b history vm1 --json)"
# for people, and with what was kept
snmigrate a rehearse vm1 hostb --with-storage --plain >"$T/out" 2>&1 || fail "rehearse: exit $?: $(cat "$T/out")"
grep -qE '^VM vm1 was rehearsed to hostb and runs on here; in [0-9.]+ s \(predicted: [0-9.]+ s\): ' "$T/out" && grep -q "would have stood still for about" "$T/out" || fail "the text: $(cat "$T/out")"
untouched a vm1
snmigrate a vm1 hostb --with-storage --json >"$T/move.json" || fail "move: exit $?: $(tail -n 1 "$T/move.json")"
[ "$(tail -n 1 "$T/move.json" | jq .disk_bytes)" -lt 33554432 ] || fail "the move copied all again: $(tail -n 1 "$T/move.json")"
assert_good "$(wait_hb b vm1 "${SEEN[vm1]}")"
refuse 3 "no host named hostc" snmigrate b rehearse vm1 hostc --with-storage
echo "figure: predicted $(jq .predicted.total_ms "$T/end.json") ms, took $(jq .total_ms "$T/end.json"); stop predicted $(jq -c '[.predicted.downtime_least_ms, .predicted.downtime_most_ms, .predicted_downtime_ms]' "$T/end.json"), was $(tail -n 1 "$T/move.json" | jq .downtime_ms)"
