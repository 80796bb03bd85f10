#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Alone: judges what a guest's write waits
# The link drops every packet for CUT_S seconds at 10, 50 and 90 % of the copy, with a guest that writes: no error in the guest, no
# write slower than 100 ms because of it, and what had arrived is not sent again. Once with a silence limit above the cut (the disk
# sessions are dialled again), once below it (the move begins a new attempt and compares what is there).
#   PERCENTS, LIMITS (ms), CUT_S: subsets; the check (SNM_BRIEF=1) cuts at 50 % alone, make storage-faults at all three
GRACE_MS=50 RETRY_FOR=2m SILENCE_MS=10000
source "$(dirname "$0")/lib.sh"
source "$(dirname "$0")/refuse_lib.sh"
require_kvm
CUT_S=${CUT_S:-5} PERCENTS=${PERCENTS:-$([ "${SNM_BRIEF:-}" = 1 ] && echo 50 || echo 10 50 90)} LIMITS=${LIMITS:-10000 1500}
MIB=1048576
DISK_MB=320 FILL_MB=${FILL_MB:-256}
RATE=${RATE:-64} # MiB a second: the copy takes long enough for a cut at each place
SPAN_MB=4 ON_THE_WAY=17
hosts_up
sent() { ns a cat /sys/class/net/eth0/statistics/tx_bytes; }
ALLOCATED=$((2 * FILL_MB * MIB))
copied_percent() { echo $((($(sent) - BEGAN) * 100 / ALLOCATED)); }

# The guest's heartbeats from the console at host a go to $T/console; mark NAME notes the last whole one
declare -A MARK
mark() { MARK[$1]=$(grep '^hb .* acked=' "$T/console" | tail -n 1); }
since() { echo $(($(hb_field "${MARK[$2]}" "$3") - $(hb_field "${MARK[$1]}" "$3"))); } # FROM TO FIELD
# one_cut VM PERCENT LIMIT: the figures of the move in $T/move.json
one_cut() {
	local vm=$1 percent=$2 limit=$3 hb rc=0 end i follower
	socat -u "UNIX-CONNECT:$(vm_dir a "$vm")/console.sock" - 2>/dev/null | stdbuf -oL tr -d '\r' >"$T/console" &
	follower=$!
	: >"$T/move.json"
	for i in $(seq 100); do grep -q '^hb .* acked=' "$T/console" && break; sleep 0.1; done
	mark START
	BEGAN=$(sent)
	snmigrate a "$vm" hostb --with-storage --json --bandwidth ${RATE}M >"$T/move.json" 2>"$T/move.err" &
	mover=$!
	for i in $(seq 1200); do
		[ "$(copied_percent)" -ge "$percent" ] && break
		kill -0 $mover 2>/dev/null || fail "the move ended before $percent %: $(tail -n 1 "$T/move.json")"
		sleep 0.02
	done
	mark CUT
	# sessions that fell silent without a cut: this machine is too busy to be judged by
	NOISE=$(grep -c "mirror: no reply for" "$T/a/state/logs/$vm.log" || true)
	link_cut b
	sleep "$CUT_S"
	link_heal b
	sleep 0.2
	mark HEALED
	wait $mover || rc=$?
	kill $follower 2>/dev/null || true
	end=$(tail -n 1 "$T/move.json")
	[ $rc = 0 ] || fail "$percent %, limit $limit ms: exit $rc: $(cat "$T/move.err"); $end"
	hb=$(wait_hb b "$vm" "$(hb_field "${MARK[HEALED]}" seq)")
	assert_good "$hb"
	[ "$(since CUT HEALED writes)" -gt $((CUT_S * 10)) ] || fail "the guest made $(since CUT HEALED writes) writes while the link was cut"
	COPIED=$(jq '.disk_bytes - .mirrored_bytes' <<<"$end") ATTEMPTS=$(jq .attempts <<<"$end")
	SLOW=$(since CUT HEALED slowwrites) LONGEST=$(hb_field "${MARK[HEALED]}" maxwrite_us)
}
n=0 noisy=0
for limit in $LIMITS; do
	daemon_kill a TERM; daemon_kill b TERM
	sed -i "s/^silence-ms.*/silence-ms = $limit/" "$T/a/host.ini" "$T/b/host.ini"
	daemon_start a; daemon_start b
	for percent in $PERCENTS; do
		n=$((n + 1)) vm=vm$n
		# few chunks are written to
		native_vm a $vm 64M "ws=4 rate=1 touch=4 zero=1 disk=rw diskrate=40 depth=2 span=$SPAN_MB record=200 hb=100"
		wait_touched a $vm
		one_cut $vm "$percent" "$limit"
		if [ "$SLOW" != 0 ]; then
			[ "$NOISE" -ge 2 ] || fail "$percent %, limit $limit ms: $SLOW writes took longer than 100 ms"
			noisy=$((noisy + 1))
			echo "not judged: $SLOW slow writes, but $NOISE sessions fell silent before the cut already: the machine is busy"
		fi
		if [ "$limit" -lt $((CUT_S * 1000)) ]; then
			[ "$ATTEMPTS" -gt 1 ] || fail "$percent %, limit $limit ms: no new attempt was needed"
		else
			[ "$ATTEMPTS" = 1 ] || fail "$percent %, limit $limit ms: a new attempt within the silence limit"
		fi
		# 1 % more than what is allocated, chunks that were on their way, and chunks that the guest wrote to meanwhile
		more=$((COPIED - ALLOCATED))
		budget=$((ALLOCATED / 100 + 2 * ON_THE_WAY * MIB + 2 * SPAN_MB * MIB))
		[ $more -le $budget ] || fail "$percent %, limit $limit ms: $more bytes of the disks were sent again, more than $budget"
		echo "cut at $percent %, silence limit $limit ms: $ATTEMPTS attempts, $more bytes copied again, longest write $LONGEST us"
		clean a
		snvm b stop --force $vm
		snvm b delete $vm
	done
done
echo "figure: $n cuts of $CUT_S s; in $noisy of them the machine was too busy to judge the slow writes"
