#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One bit of a disk that is not what it was: on the way (--no-tls, through a relay), in bulk data, in a mirrored write after the
# disks were compared, in a request's header; and in the destination's files before they are read again. Each is caught before
# COMMIT: the guest goes on at the source, the message names disk and range. With TLS, and without a flip, the same moves work.
#   CASES: a subset; the check (SNM_BRIEF=1) has four, make storage-faults all
source "$(dirname "$0")/lib.sh"
require_kvm
[ -x "$B/tests/helpers/bit_relay" ] || fail "build/tests/helpers/bit_relay is not built"
export DISK_MB=96 FILL_MB=64
export LIMITS_EXTRA="allow-no-tls = yes"
RELAY=10.9.0.1:26516
hosts_up
ALL="bulk_data bulk_header later_data later_header file_data file_hole file_qcow2 none"
[ "${SNM_BRIEF:-}" = 1 ] && ALL="bulk_data later_data file_qcow2 none"
CASES=${CASES:-$ALL}
relay_pid='' mover='' caught=0

point_a_at() { # ADDRESS of hostb for hosta
	sed -i "/^\[peer hostb\]/,/^\[limits\]/s/^address = .*/address = $1/" "$T/a/host.ini"
}
relay() { # EXPORT SPEC [FILE]
	[ -z "$relay_pid" ] || { kill "$relay_pid" 2>/dev/null || true; wait "$relay_pid" 2>/dev/null || true; }
	ip netns exec "${NS}a" "$B/tests/helpers/bit_relay" $RELAY "$(address b):16516" "$@" >"$T/relay.out" 2>"$T/relay.err" &
	relay_pid=$!
	point_a_at $RELAY
}
begin() { # FAULT MOVE-OPTION...: hosta with this fault point, its VM moves in the background
	local f=$1 i; shift
	daemon_kill a TERM
	rm -rf "$T/fault"; mkdir "$T/fault"
	daemon_start a "SNM_FAULT=$f" "SNM_FAULT_DIR=$T/fault"
	native_vm a vm1 64M "ws=4 rate=5 touch=4 zero=1 disk=rw diskrate=100 span=16 hb=300 seed=$caught" >/dev/null
	wait_touched a vm1
	snmigrate a vm1 hostb --with-storage --json "$@" >"$T/move.json" 2>"$T/move.err" &
	mover=$!
	[ -n "$f" ] || return 0
	for i in $(seq 400); do [ -e "$T/fault/${f%%:*}.hit" ] && return 0; sleep 0.05; done
	cat "$T/move.json" "$T/move.err"; fail "$name: ${f%%:*} was not reached"
}
go() { touch "$T/fault/$1.go"; }
wait_flip() { local _; for _ in $(seq 200); do grep -q '^flipped' "$T/relay.out" && return 0; sleep 0.05; done; fail "$name: nothing was flipped: $(cat "$T/relay.err")"; }
# the move ends with 4 and names DISK; the place lies within the range
is_caught() { # DISK [OFFSET]
	local rc=0 reason range seq hb
	wait $mover || rc=$?
	reason=$(tail -n 1 "$T/move.json" | jq -r .reason)
	[ $rc = 4 ] || fail "$name: exit $rc, not 4: $reason"
	range=$(grep -oE "disk $1: .* bytes [0-9]+ to [0-9]+" <<<"$reason" | grep -oE '[0-9]+ to [0-9]+$') || fail "$name: no disk $1 with a range in: $reason"
	[ -z "${2:-}" ] || { [ "$2" -ge "${range% to *}" ] && [ "$2" -le "${range#* to }" ]; } || fail "$name: $2 is not within $range"
	[ "$(tail -n 1 "$T/move.json" | jq -r .proof.agreed)" = false ] || fail "$name: it says that the disks agreed"
	[ "$(vm_state a vm1)" = running ] || fail "$name: hosta $(vm_state a vm1)"
	wait_state b vm1 absent # the source is told first
	seq=$(hb_field "$(wait_hb a vm1)" seq); hb=$(wait_hb a vm1 "$seq"); assert_good "$hb"
	caught=$((caught + 1))
	echo "$name: $reason"
	snvm a stop --force vm1 >/dev/null; snvm a delete vm1 >/dev/null
}
flipped_at() { sed -n 's/^flipped .* at //p' "$T/relay.out"; }

bulk_data() { relay data data:40; begin "" --no-tls; wait_flip; is_caught data "$(flipped_at)"; }
bulk_header() { relay data header:40; begin "" --no-tls; wait_flip; is_caught data; }
later_data() { relay data later:data "$T/now"; begin in-precopy:hold --no-tls; touch "$T/now"; wait_flip; go in-precopy; is_caught data "$(flipped_at)"; rm "$T/now"; }
later_header() { relay root later:header "$T/now"; begin in-precopy:hold --no-tls; touch "$T/now"; wait_flip; go in-precopy; is_caught root; rm "$T/now"; }
# behind the destination's back, when all is copied and before it is read again
spoil() { # FILE OFFSET
	local f
	f=$(ls "$T"/b/state/incoming/*/"$1")
	[ "$(od -An -tu1 -N1 -j "$2" "$f" | tr -d ' ')" = 90 ] && printf '\x5b' >"$T/byte" || printf '\x5a' >"$T/byte"
	dd if="$T/byte" of="$f" bs=1 seek="$2" conv=notrunc,fsync status=none
}
file_data() {
	point_a_at "$(address b):16516"
	echo old >"$T/bad.json"
	begin in-mirror:hold --receipt "$T/bad.json"
	spoil data.raw $((50 << 20)); go in-mirror; is_caught data $((50 << 20))
	jq -e '(.agreed | not) and .result == "failed" and .disks[1].bad_offset == 52428800 and .disks[1].bad_bytes == 262144' "$T/bad.json" >/dev/null || fail "$name: the receipt: $(cat "$T/bad.json")"
}
file_hole() { point_a_at "$(address b):16516"; begin in-mirror:hold; spoil data.raw $((80 << 20)); go in-mirror; is_caught data $((80 << 20)); }
file_qcow2() {
	local at
	point_a_at "$(address b):16516"
	begin in-verify:hold # flushed, so that the file says where its clusters are
	at=$(qemu-img map -U --output=json "$(ls "$T"/b/state/incoming/*/root.qcow2)" | jq "map(select(.data and .start <= (50*1048576) and .start + .length > (50*1048576)))[0] | .offset - .start + 50*1048576")
	spoil root.qcow2 "$at"; go in-verify; is_caught root $((50 << 20))
}
none() {
	local rc=0 proof
	relay data data:100000
	begin "" --no-tls --receipt "$T/receipt.json"
	wait $mover || rc=$?
	[ $rc = 0 ] || fail "$name: exit $rc: $(tail -n 1 "$T/move.json")"
	proof=$(tail -n 1 "$T/move.json" | jq -c .proof)
	jq -e '.agreed and (.disks | length == 2) and all(.disks[]; .root_source == .root_destination and .chunks_proved >= .chunks and .chunks == 384 and .mirrored_writes > 0)' <<<"$proof" >/dev/null || fail "$name: $proof"
	[ "$(stat -c %a "$T/receipt.json")" = 600 ] && [ "$(ls "$T"/receipt.json*)" = "$T/receipt.json" ] || fail "$name: $(ls -l "$T"/receipt.json*)"
	jq -e --argjson p "$proof" '.agreed and .result == "moved" and .disks == $p.disks and (.does_not_cover | length > 4) and (.does_not_cover[-1] | test("--no-tls"))
		and .hosts.source.name == "hosta" and .hosts.destination.name == "hostb" and (.hosts[].certificate_sha256 | length) == 64 and .hosts.source != .hosts.destination
		and .memory.every_frame_checked and .started <= .ended' "$T/receipt.json" >/dev/null || fail "$name: the receipt: $(cat "$T/receipt.json")"
	assert_good "$(wait_hb b vm1 "$(hb_field "$(wait_hb b vm1)" seq)")"
	echo "$name: $proof"
	snvm b stop --force vm1 >/dev/null; snvm b delete vm1 >/dev/null
}
for name in $CASES; do $name; done
[ -z "$relay_pid" ] || kill "$relay_pid" 2>/dev/null || true
echo "figure: $caught flipped bits, all caught before COMMIT"
