#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Alone: judges rates and waits
# Long: make storage-faults
# --mirror buffered over a link with a round trip of 100 ms: a guest's writes do not follow it, what is buffered is seen in the
# progress, it is drained before the handover, and a link that falls silent meanwhile neither slows the guest nor costs a write. A relay delays,
# as not every kernel has netem.
IDLE=0
source "$(dirname "$0")/lib.sh"
source "$(dirname "$0")/refuse_lib.sh"
require_kvm
DISK_MB=24 FILL_MB=8 SILENCE_MS=4000
RTT_MS=100
hosts_up
ns s ip addr add 10.9.0.9/24 dev br0
ns s "$B/tests/helpers/slow_link" 10.9.0.9:16516 10.9.0.2:16516 $((RTT_MS / 2)) >"$T/relay.log" 2>&1 &
disown $!
for _ in $(seq 50); do grep -q ready "$T/relay.log" && break; sleep 0.1; done
sed -i 's/^address = 10.9.0.2:/address = 10.9.0.9:/' "$T/a/host.ini"
mkdir "$T/fault"
plain() { daemon_kill a TERM; daemon_start a "$@"; }
plain SNM_FAULT=in-mirror:hold "SNM_FAULT_DIR=$T/fault"
native_vm a vm1 64M "ws=4 rate=1 touch=4 zero=1 disk=rw depth=1 diskrate=400 span=16 record=0 discard=zero fresh=0 hb=100"
wait_touched a vm1

refuse 2 "sync or buffered" snmigrate a vm1 hostb --with-storage --mirror asynchronous
refuse 2 "mirror-buffer" snmigrate a vm1 hostb --with-storage --mirror-buffer large
refuse 3 "mirror-buffer: from 1048576 to 17179869184 bytes" snmigrate a vm1 hostb --with-storage --mirror-buffer 1000
untouched a vm1

begin_move() {
	rm -f "$T/fault"/*
	snmigrate a vm1 hostb --with-storage --json --max-downtime 300 "$@" >"$T/move.json" 2>"$T/move.err" &
	mover=$!
	local i
	for i in $(seq 300); do
		[ -e "$T/fault/in-mirror.hit" ] && return 0
		kill -0 $mover 2>/dev/null || break
		sleep 0.1
	done
	fail "the disks are not synced: $(tail -n 2 "$T/move.json")"
}
# changes COMMAND...: what the guest had acknowledged on its two disks while that ran, a second
changes() {
	local h0 h1 n=0 f
	h0=$(wait_hb a vm1)
	"$@"
	h1=$(wait_hb a vm1 "$(hb_field "$h0" seq)")
	for f in writes zeroes discards; do n=$((n + $(hb_field "$h1" $f) - $(hb_field "$h0" $f))); done
	echo $((n * 1000 / ($(hb_field "$h1" t) - $(hb_field "$h0" t))))
}
end_move() { # EXIT
	local rc=0
	wait $mover || rc=$?
	[ $rc = "$1" ] || fail "exit $rc, not $1: $(tail -n 1 "$T/move.json")"
}

unmirrored=$(changes sleep 2)
begin_move
sync=$(changes sleep 3)
snmigrate a cancel vm1
touch "$T/fault/in-mirror.go"
end_move 5
untouched a vm1

begin_move --mirror buffered
buffered=$(changes sleep 3)
sleep 1
seen=$(jq -s 'map(.mirror_buffered_bytes // 0) | max' "$T/move.json")
[ "$seen" -gt 0 ] || fail "no progress line tells what is buffered: $(tail -n 2 "$T/move.json")"
# Depth 1 and a round trip of 0.1 s: ten a second and disk at most, where each waits for both.
[ "$sync" -le 25 ] || fail "$sync changes a second in a synchronous mirror with a round trip of $RTT_MS ms"
[ "$buffered" -ge $((unmirrored / 2)) ] || fail "$buffered changes a second, $unmirrored without a mirror"
[ "$buffered" -ge $((sync * 4)) ] || fail "$buffered changes a second, $sync in a synchronous mirror"

# The link falls silent with something buffered: the guest goes on, and so does the move when the link is back.
interrupted() { link_cut b; sleep 1.5; link_heal b; }
cut=$(changes interrupted)
[ "$cut" -ge $((unmirrored / 2)) ] || fail "$cut changes a second while the link was cut, $unmirrored without a mirror"
touch "$T/fault/in-mirror.go"
end_move 0
hb=$(wait_hb b vm1)
assert_good "$(wait_hb b vm1 "$(hb_field "$hb" seq)")"
clean a
end=$(tail -n 1 "$T/move.json")
echo "figure: round trip $RTT_MS ms, guest's changes a second at depth 1 on two disks: $unmirrored unmirrored, $sync sync, $buffered buffered (at most $seen bytes of them on the way); downtime $(jq .downtime_ms <<<"$end") ms"
