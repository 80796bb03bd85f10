#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Long: make operation
# A network of its own for memory and disks (migration-address), networks that are refused (allow-from, deny-from), hosts that are
# refused by name (deny-peers), and the rights of configured hosts.
source "$(dirname "$0")/lib.sh"
source "$(dirname "$0")/refuse_lib.sh"
require_kvm
command -v python3 >/dev/null || skip "no python3"
DISK_MB=32
data_address() { case $1 in a) echo 10.8.0.1 ;; b) echo 10.8.0.2 ;; esac; }
hosts_up
for h in a b; do
	daemon_kill $h TERM
	ns $h ip addr add "$(data_address $h)/24" dev eth0
	sed -i "s/^listen = .*/&\nmigration-address = $(data_address $h)\nallow-from = 10.9.0.0\/24, 10.8.0.0\/24\ndeny-from = 10.9.0.96\/28/" "$T/$h/host.ini"
	daemon_start $h
done
native_vm a vm1 128M "ws=8 rate=10 touch=32 zero=1 disk=rw diskrate=100 hb=100"
wait_touched a vm1
# there with a slow link, so that the connections can be looked at
ns a tc qdisc add dev eth0 root tbf rate 100mbit burst 64kb latency 100ms
snmigrate a vm1 hostb --with-storage --json --streams 2 >"$T/move.json" 2>"$T/move.err" & mover=$!
control=0 data=0 wrong=0
while kill -0 $mover 2>/dev/null; do
	# local and remote address of what hosta has open to the port
	while read -r from to; do
		case "${from%:*} $to" in
		"10.9.0.1 10.9.0.2:16516") control=$((control + 1)) ;;
		"10.8.0.1 10.8.0.2:16516") data=$((data + 1)) ;;
		*) wrong=$((wrong + 1)); echo "wrong: $from $to" ;;
		esac
	done < <(ns a ss -Htn state established dport = :16516 | awk '{ print $3, $4 }')
	n=$(ns a ss -Htn state established dst 10.9.0.2 dport = :16516 | wc -l)
	[ "$n" -le 1 ] || fail "$n connections to the address of control"
	sleep 0.1
done
rc=0; wait $mover || rc=$?
ns a tc qdisc del dev eth0 root
[ $rc = 0 ] || fail "the move over two networks: exit $rc: $(cat "$T/move.err")"
[ $control -gt 0 ] && [ $data -gt 0 ] && [ $wrong = 0 ] || fail "seen: control $control times, data $data times, others $wrong times"
assert_good "$(wait_hb b vm1)"
echo "figure: control was seen $control times on its network, data $data times on theirs"
# only control may be lost from sight: without the data network a move does not begin to copy, and the guest goes on
ns b ip addr del 10.8.0.2/24 dev eth0
ns b ip addr add 10.8.0.2/32 dev lo 2>/dev/null || true
rc=0; snmigrate b vm1 hosta --with-storage >"$T/out" 2>&1 || rc=$?
[ $rc = 4 ] || fail "a move without the data network: exit $rc: $(cat "$T/out")"
grep -q "10.8.0.1:16516" "$T/out" || fail "the address of data is not in: $(cat "$T/out")"
wait_state b vm1 running
ns b ip addr del 10.8.0.2/32 dev lo
ns b ip addr add 10.8.0.2/24 dev eth0
seq=$(hb_field "$(wait_hb b vm1)" seq)
snmigrate b vm1 hosta --with-storage >"$T/out" 2>&1 || fail "back: $(cat "$T/out")"
assert_good "$(wait_hb a vm1 "$seq")"

# what the addresses and networks let in
cat >"$T/knock.py" <<'PY'
import socket, sys
source, address, line = sys.argv[1:4]
s = socket.create_connection((address, 16516), 5, (source, 0))
try:
    s.sendall(line.encode() + b'\n')
    s.settimeout(1.5)
    d = s.recv(100)
    print('closed' if not d else 'answered')
except (ConnectionResetError, BrokenPipeError):
    print('closed')
except TimeoutError:
    print('listens')
PY
ns s ip addr add 10.9.0.99/24 dev br0
ns s ip addr add 10.9.0.7/24 dev br0
ns s ip addr add 172.31.9.7/24 dev br0
ns b ip route add 172.31.9.0/24 dev eth0
knock() { [ "$(ns "$1" python3 "$T/knock.py" "$2" "$3" "$4")" = "$5" ] || fail "$4 from $2 to $3: not $5"; }
knock s 10.9.0.7 10.9.0.2 "SNMIGRATE/1 control -" listens
knock s 10.9.0.99 10.9.0.2 "SNMIGRATE/1 control -" closed
knock s 172.31.9.7 10.9.0.2 "SNMIGRATE/1 control -" closed
knock a 10.8.0.1 10.8.0.2 "SNMIGRATE/1 control -" closed
knock a 10.8.0.1 10.8.0.2 "SNMIGRATE/1 pair -" closed
grep -q "connection from 10.9.0.99 closed: .* refuses that network" "$T/b/daemon.log" || fail "the refused network is not in the log"
grep -q "connection from 172.31.9.7 closed: .* refuses that network" "$T/b/daemon.log" || fail "the network that is not allowed is not in the log"
grep -q "at the migration-address, which is for data alone" "$T/b/daemon.log" || fail "control at the migration-address is not in the log"

# hosts by name, and the rights of configured ones
sed -i 's/^listen = .*/&\ndeny-peers = hostx, hosta/' "$T/b/host.ini"
daemon_kill b TERM; daemon_start b
refuse 3 "host hosta is refused by host hostb" snmigrate a vm1 hostb --with-storage
untouched a vm1
snmigrate b peers | grep -q '^hosta .*refused (deny-peers)$' || fail "$(snmigrate b peers)"
sed -i '/^deny-peers/d; s/^\[peer hosta\]/&\nsend = no/' "$T/b/host.ini"
daemon_kill b TERM; daemon_start b
refuse 3 "host hosta may not send VMs to hostb (\[peer hosta\] send = no in $T/b/host.ini)" snmigrate a vm1 hostb --with-storage
untouched a vm1
refuse 3 "it is \[peer hosta\] of $T/b/host.ini; set send" snmigrate b peers set hosta +send
refuse 3 "it is \[peer hosta\] of $T/b/host.ini; remove it there" snmigrate b unpair hosta
sed -i '/^send = no/d' "$T/b/host.ini"
sed -i 's/^\[peer hostb\]/&\nreceive = no/' "$T/a/host.ini"
daemon_kill b TERM; daemon_start b
daemon_kill a TERM; daemon_start a
refuse 3 "host hostb may not receive VMs from hosta (\[peer hostb\] receive = no in $T/a/host.ini)" snmigrate a vm1 hostb --with-storage
untouched a vm1
echo "$checks refusals"
