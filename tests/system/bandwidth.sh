#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Alone: judges rates
# --bandwidth holds what all disks send together, "snmigrate tune" changes it in flight, and the guest writes on meanwhile.
source "$(dirname "$0")/lib.sh"
source "$(dirname "$0")/refuse_lib.sh"
require_kvm
MIB=1048576
DISK_MB=80 FILL_MB=80
hosts_up
native_vm a vm1 128M "ws=4 rate=1 touch=4 zero=1 disk=rw diskrate=20 span=1 record=100 hb=100"
wait_touched a vm1

refuse 2 "bandwidth" snmigrate a vm1 hostb --with-storage --bandwidth fast
refuse 2 "bandwidth" snmigrate a vm1 hostb --with-storage --bandwidth -1
refuse 3 "bandwidth: at least 1048576 bytes" snmigrate a vm1 hostb --with-storage --bandwidth 1000
refuse 3 "VM vm1 is not being moved" snmigrate a tune vm1 --bandwidth 1G
refuse 2 "nothing to change" snmigrate a tune vm1
untouched a vm1

sent() { ns a cat /sys/class/net/eth0/statistics/tx_bytes; }
# rate SECONDS: bytes a second on the wire
rate() {
	local n0 t0 n1 t1
	n0=$(sent) t0=$(date +%s%N)
	sleep "$1"
	n1=$(sent) t1=$(date +%s%N)
	echo $(((n1 - n0) * 1000000000 / (t1 - t0)))
}
# below RATE LIMIT: 5 % above the limit, and 2 % for TLS, TCP and IP, are the most that is held
below() { [ "$1" -le $(($2 * 107 / 100)) ] || fail "$1 bytes a second with a limit of $2"; }
: >"$T/move.json"
snmigrate a vm1 hostb --with-storage --json --bandwidth 4M >"$T/move.json" 2>"$T/move.err" &
mover=$!
for _ in $(seq 200); do grep -q '"phase":"storage"' "$T/move.json" && break; sleep 0.05; done
sleep 0.5
writes=$(hb_field "$(wait_hb a vm1)" writes)
slow=$(rate 4)
below "$slow" $((4 * MIB))
[ "$(hb_field "$(wait_hb a vm1)" writes)" -gt "$writes" ] || fail "the guest does not write while the copy is held"
snmigrate a tune vm1 --bandwidth 16M || fail "tune: exit $?"
sleep 1
fast=$(rate 3)
below "$fast" $((16 * MIB))
[ "$fast" -gt $((slow * 3 / 2)) ] || fail "after tune 16M $fast bytes a second, before $slow"
[ "$(jq -r '.bandwidth_bytes_per_s // empty' "$T/move.json" | sort -n | uniq | xargs)" = "$((4 * MIB)) $((16 * MIB))" ] ||
	fail "the progress does not tell the limit: $(jq -c .bandwidth_bytes_per_s "$T/move.json" | xargs)"
snmigrate a tune vm1 --bandwidth 0 || fail "tune 0: exit $?"
rc=0; wait $mover || rc=$?
[ $rc = 0 ] || fail "the move: exit $rc: $(tail -n 1 "$T/move.json")"
assert_good "$(wait_hb b vm1 "$(hb_field "$(wait_hb b vm1)" seq)")"
clean a


# The memory keeps to it, too; not its last round.
: >"$T/move.json"
snmigrate b vm1 hosta --with-storage --json --bandwidth 100M >"$T/move.json" 2>"$T/move.err" || fail "back: exit $?: $(tail -n 1 "$T/move.json")"
assert_good "$(wait_hb a vm1 "$(hb_field "$(wait_hb a vm1)" seq)")"
end=$(tail -n 1 "$T/move.json")
below $(($(jq '.wire_bytes' <<<"$end") * 1000 / $(jq '.total_ms' <<<"$end"))) $((100 * MIB))
clean b
echo "figure: $slow bytes a second with --bandwidth 4M ($((4 * MIB))), $fast after tune 16M ($((16 * MIB)))"
