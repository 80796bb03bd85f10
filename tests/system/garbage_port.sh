#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Garbage on the one port, of every kind and much of it, while a VM arrives through the same port: the daemon stays alive and small,
# tells strangers nothing, and the move ends well.
source "$(dirname "$0")/lib.sh"
source "$(dirname "$0")/refuse_lib.sh"
require_kvm
command -v python3 >/dev/null || skip "no python3"
DISK_MB=32
hosts_up
native_vm a vm1 128M "ws=8 rate=10 touch=16 zero=1 disk=rw diskrate=100 hb=100"
wait_touched a vm1
seq=$(hb_field "$(wait_hb a vm1)" seq)
rss_kib() { awk '/^VmRSS/ { print $2 }' "/proc/${DAEMON_PID[b]}/status"; }
fds() { find "/proc/${DAEMON_PID[b]}/fd" -mindepth 1 | wc -l; }
threads() { awk '/^Threads/ { print $2 }' "/proc/${DAEMON_PID[b]}/status"; }
before=$(rss_kib) fds_before=$(fds) threads_before=$(threads)

cat >"$T/garbage.py" <<'PY'
# One stranger a case: what came back must be nothing, and the connection must be closed in time.
import os, socket, struct, sys, time
address = (sys.argv[1], 16516)
control = b'SNMIGRATE/1 control -\n'
def client_hello_cut():
    return bytes([22, 3, 1, 2, 0]) + bytes([1, 0, 1, 252, 3, 3]) + os.urandom(100)
cases = {
    # name: (bytes sent, seconds until it must be closed, may the peer answer with a TLS alert)
    'random': (os.urandom(4096), 2, False),
    'random-nl': (os.urandom(100).replace(b'\n', b'') + b'\n' + os.urandom(4096), 2, False),
    'zeroes': (bytes(100000), 2, False),
    'line-256-no-newline': (b'x' * 256, 2, False),
    'line-too-long': (b'SNMIGRATE/1 control ' + b'-' * 300 + b'\n', 2, False),
    'line-long': (b'SNMIGRATE/1 control ' + b'-' * 100000, 2, False),
    'empty-line': (b'\n', 2, False),
    'nul': (b'SNMIGRATE/1 control -\0\n', 2, False),
    'version': (b'SNMIGRATE/99 control -\n', 2, False),
    'channel': (b'SNMIGRATE/1 shell -\n', 2, False),
    'control-token': (b'SNMIGRATE/1 control ' + b'a' * 32 + b'\n', 2, False),
    'memory-unknown-token': (b'SNMIGRATE/1 memory ' + b'0123456789abcdef' * 2 + b'\n', 2, False),
    'disk-unknown-token': (b'SNMIGRATE/1 disk ' + b'0123456789abcdef' * 2 + b'\n', 2, False),
    'disk-no-token': (b'SNMIGRATE/1 disk -\n', 2, False),
    'half-line': (b'SNMIGRATE/1 con', 9, False),
    'nothing': (b'', 9, False),
    'tls-garbage': (control + os.urandom(5000), 6, True),
    'tls-text': (control + b'GET / HTTP/1.1\r\n\r\n', 6, True),
    'tls-record-huge': (control + bytes([22, 3, 1, 255, 255]) + os.urandom(70000), 6, True),
    'tls-hello-cut': (control + client_hello_cut(), 14, True),
    'tls-nothing': (control, 14, True),
}
opened = {}
for name, (data, limit, alert) in cases.items():
    s = socket.create_connection(address, 5)
    s.setblocking(True)
    s.settimeout(3)
    try:
        if data:
            s.sendall(data)
    except (ConnectionResetError, BrokenPipeError):
        pass
    opened[name] = (s, time.monotonic(), limit, alert)
bad = 0
# A byte now and then is progress, but not enough: the limits are on the whole line and the whole handshake.
import threading
trickles = {'trickle-line': (b'SNMIGRATE/1 ' + b'x' * 200, 0, 9), 'trickle-tls': (control + client_hello_cut() + bytes(300), len(control) + 11, 16)}
for name, (data, at_once, limit) in trickles.items():
    s = socket.create_connection(address, 5)
    def send(s=s, data=data, at_once=at_once):
        try:
            s.sendall(data[:at_once])
            for i in range(at_once, len(data)):
                s.sendall(data[i:i + 1])
                time.sleep(0.3)
        except OSError:
            pass
    threading.Thread(target=send, daemon=True).start()
    opened[name] = (s, time.monotonic(), limit, True)
for name, (s, since, limit, alert) in opened.items():
    got, closed = b'', False
    while True:
        left = since + limit * float(sys.argv[2]) - time.monotonic()
        s.settimeout(max(left, 0.01))
        try:
            d = s.recv(65536)
        except socket.timeout:
            break
        except (ConnectionResetError, BrokenPipeError):
            closed = True
            break
        if not d:
            closed = True
            break
        got += d
    is_alert = len(got) == 7 and got[0] == 21
    if not closed or (got and not (alert and is_alert)):
        bad += 1
        print(f'{name}: closed {closed}, answer {got[:80]!r}')
    s.close()
print(f'{len(opened) - bad} of {len(opened)} strangers got nothing and were hung up on')
sys.exit(1 if bad else 0)
PY
cat >"$T/flood.py" <<'PY'
# 200 connections at once, a third of each kind: silent, half a preamble, a whole one and then nothing. Held for argv[2] s.
import socket, sys, time
held, refused = [], 0
for i in range(200):
    try:
        s = socket.create_connection((sys.argv[1], 16516), 5)
        s.sendall([b'', b'SNMIGRATE/1 mem', b'SNMIGRATE/1 control -\n'][i % 3])
        held.append(s)
    except OSError:
        refused += 1
print(f'{len(held)} connections held, {refused} refused', flush=True)
time.sleep(float(sys.argv[2]))
# half-open: some go without a word, some with a reset
import struct
for i, s in enumerate(held):
    if i % 2:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    s.close()
PY
# Strangers sit in the source's network: the move's own connections come through the same link. A slow link makes the move last.
ns a tc qdisc add dev eth0 root tbf rate 80mbit burst 64kb latency 100ms
snmigrate a vm1 hostb --with-storage --json >"$T/move.json" 2>"$T/move.err" &
mover=$!
for i in $(seq 200); do grep -q '"storage"' "$T/move.json" && break; sleep 0.05; done
grep -q '"storage"' "$T/move.json" || fail "the move did not begin: $(cat "$T/move.err")"
rc=0; ns a timeout 60 python3 "$T/garbage.py" "$(address b)" 1.5 >"$T/garbage.out" 2>&1 & strangers=$!
ns s ip addr add 10.9.0.99/24 dev br0
ns s timeout 60 python3 "$T/flood.py" "$(address b)" 3 >"$T/flood.out" 2>&1 & flood=$!
most=0 most_fds=0 most_workers=0
while kill -0 $strangers 2>/dev/null || kill -0 $flood 2>/dev/null; do
	kill -0 "${DAEMON_PID[b]}" 2>/dev/null || fail "the daemon of hostb ended"
	r=$(rss_kib) f=$(fds) w=$(processes b snvmm)
	[ "$r" -gt $most ] && most=$r
	[ "$f" -gt $most_fds ] && most_fds=$f
	[ "$w" -gt $most_workers ] && most_workers=$w
	sleep 0.2
done
ns a tc qdisc del dev eth0 root
wait $flood || fail "flood: $(cat "$T/flood.out")"
cat "$T/flood.out"
rc=0; wait $mover || rc=$?
[ $rc = 0 ] || fail "the move among strangers: exit $rc: $(cat "$T/move.err")"
[ "$(tail -n 1 "$T/move.json" | jq -r .result)" = moved ] || fail "$(tail -n 1 "$T/move.json")"
assert_good "$(wait_hb b vm1 "$seq")"
wait $strangers || fail "strangers: $(cat "$T/garbage.out")"
cat "$T/garbage.out"
kill -0 "${DAEMON_PID[b]}" || fail "the daemon of hostb ended"
[ $most_workers -le 33 ] || fail "$most_workers snvmm for unproven strangers, at most 32 are allowed (half of them from one address)"
# everything of the strangers goes away: processes, descriptors, threads; what is left is the VM
for i in $(seq 200); do
	[ "$(processes b snvmm)" = 1 ] && [ "$(fds)" -le $((fds_before + 6)) ] && [ "$(threads)" -le $((threads_before + 3)) ] && break
	sleep 0.1
done
clean b 1
[ "$(fds)" -le $((fds_before + 6)) ] || fail "descriptors leak: $fds_before before, $(fds) now"
[ "$(threads)" -le $((threads_before + 3)) ] || fail "threads leak: $threads_before before, $(threads) now"
[ $((most - before)) -le 32768 ] || fail "the daemon grew from $before KiB to $most KiB"
# and back through the other daemon, while one address holds as many connections open there as it is given
ns s timeout 60 python3 "$T/flood.py" "$(address a)" 30 >"$T/flood.out" 2>&1 & flood=$!
for i in $(seq 100); do grep -q held "$T/flood.out" && break; sleep 0.1; done
snmigrate b vm1 hosta --with-storage >"$T/out" 2>&1 || fail "the way back among silent strangers: $(cat "$T/out")"
kill -0 $flood 2>/dev/null || fail "the strangers had gone before the move ended: nothing was shown"
kill $flood; wait $flood 2>/dev/null || true
echo "figure: among 223 strangers the daemon grew by $((most - before)) KiB, $most_fds descriptors and $most_workers snvmm at most; the move ended well"
