#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The link is gone for a moment while the disks are copied, shorter than the silence limit but longer than a guest's write may
# wait: the guest goes on from its local disk, the disk session is dialled again, and the move ends well.
SILENCE_MS=8000 GRACE_MS=200
source "$(dirname "$0")/lib.sh"
source "$(dirname "$0")/refuse_lib.sh"
require_kvm
DISK_MB=64
hosts_up
native_vm a vm1 128M "ws=8 rate=10 touch=8 zero=1 disk=rw diskrate=300 hb=100"
wait_touched a vm1
seq=$(hb_field "$(wait_hb a vm1)" seq)
ns a tc qdisc replace dev eth0 root tbf rate 80mbit burst 256kb latency 100ms
: >"$T/move.json"
snmigrate a vm1 hostb --with-storage --json >"$T/move.json" 2>"$T/move.err" &
mover=$!
for _ in $(seq 200); do grep -q '"storage"' "$T/move.json" && break; sleep 0.05; done
sleep 1
link_cut b
sleep 2
link_heal b
ns a tc qdisc del dev eth0 root
rc=0; wait $mover || rc=$?
[ $rc = 0 ] || fail "exit $rc: $(cat "$T/move.err"); $(tail -n 2 "$T/move.json")"
hb=$(wait_hb b vm1 "$seq")
assert_good "$hb"
clean a
again=$(grep -c "dialling again" "$T/a/state/logs/vm1.log" || true)
[ "$again" -ge 1 ] || fail "no disk session was dialled again: the cut was not felt"
echo "figure: a cut of 2 s: $again sessions dialled again, longest gap the guest saw $(hb_field "$hb" maxgap_us) us"
