#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Two fresh hosts, with no certificate and no peer in their configuration: one prints a code, the other takes it, and a VM moves.
# Wrong, mistyped, expired and used codes, a machine in the middle, a revoked host, a host without the right, floods: refused.
source "$(dirname "$0")/lib.sh"
source "$(dirname "$0")/refuse_lib.sh"
require_kvm
command -v python3 >/dev/null || skip "no python3"
DISK_MB=${DISK_MB:-32}
config() {
	local h=$1
	mkdir -p "$T/$h"
	cat >"$T/$h/host.ini" <<INI
[host]
name = host$h
listen = 0.0.0.0:16516
state-dir = $T/$h/state
control = $T/$h/control.sock
[limits]
silence-ms = $SILENCE_MS
retry-for = 0
[programs]
snvmm = $BIN/snvmm
INI
}
hosts_up
checks=0
# no TEXT HOST ARGUMENT...: exit 3, and TEXT on stderr
no() {
	local text=$1 h=$2 rc=0
	shift 2
	snmigrate "$h" "$@" >"$T/out" 2>"$T/err" || rc=$?
	[ $rc = 3 ] || fail "$*: exit $rc, not 3: $(cat "$T/err")"
	grep -qF -- "$text" "$T/err" || fail "$*: '$text' is not in: $(cat "$T/err")"
	checks=$((checks + 1))
}
logged() { grep -qF -- "$2" "$T/$1/daemon.log" "$T/$1"/state/logs/* || fail "'$2' is not in the logs of host$1"; checks=$((checks + 1)); }
code() { snmigrate "$1" pair "${@:2}" 2>"$T/hint"; }
A=$(address a):16516 B=$(address b):16516

# ---- codes that will not do
no "no code is open there" b pair "$A" "$(code b)"
stale=$(code a)
grep -q "snmigrate pair .*:16516 $stale" "$T/hint" || fail "no hint what to type: $(cat "$T/hint")"
no "the code is not of the host that answers at $A" b pair "$A" "$(code b)"
first=Y; [ "${stale:0:1}" != Y ] || first=Z
no "the code is mistyped" b pair "$A" "$first${stale:1}"
no "a code has 25 letters and digits" b pair "$A" ABCDE
# codes do not outlive their daemon
daemon_kill a TERM; daemon_start a
no "no code is open there" b pair "$A" "$stale"
expired=$(code a --valid 1s)
sleep 1.2
no "refused: the code has expired" b pair "$A" "$expired"
# a code of the right host, but not one that it knows: five tries close what is open
open=$(code a)
for i in 1 2 3 4; do no "refused: the code is wrong" b pair "$A" "$stale"; done
no "no code is open there any more" b pair "$A" "$stale"
no "the code is void" b pair "$A" "$open"
logged a "was not paired: the code is wrong"
[ "$(snmigrate a peers --json | jq length)$(snmigrate b peers --json | jq length)" = 00 ] || fail "somebody is paired"

# ---- a machine in the middle, which ends TLS on both sides with a certificate of its own
ns s ip addr add 10.9.0.99/24 dev br0
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$T/m.key" -out "$T/m.pem" -days 10 -subj /CN=hosta \
	-addext subjectAltName=DNS:hosta >/dev/null 2>&1
cat >"$T/relay.py" <<'PY'
import socket, ssl, sys, threading
cert, key, target, log = sys.argv[1:5]
def context(side):
    c = ssl.SSLContext(side)
    c.minimum_version = ssl.TLSVersion.TLSv1_3
    c.check_hostname = False
    c.verify_mode = ssl.CERT_NONE
    c.load_cert_chain(cert, key)
    return c
def note(what):
    with open(log, 'a') as f:
        f.write(what + '\n')
def pump(name, a, b):
    try:
        while True:
            d = a.recv(65536)
            if not d:
                break
            note(f'{name} {len(d)}')
            b.sendall(d)
    except OSError as e:
        note(f'{name} ended: {e}')
    for s in (a, b):
        try: s.shutdown(socket.SHUT_RDWR)
        except OSError: pass
def serve(s):
    line = b''
    while not line.endswith(b'\n'):
        line += s.recv(1)
    out = socket.create_connection((target, 16516), 5)
    out.sendall(line)
    note('preamble ' + line.decode().strip())
    try:
        up = context(ssl.PROTOCOL_TLS_CLIENT).wrap_socket(out)
        note('tls with the listening host')
        down = context(ssl.PROTOCOL_TLS_SERVER).wrap_socket(s, server_side=True)
        note('tls with the calling host')
    except (OSError, ssl.SSLError) as e:
        note(f'refused: {e}')
        return
    threading.Thread(target=pump, args=('answer', up, down), daemon=True).start()
    pump('caller', down, up)
l = socket.create_server(('10.9.0.99', 16516))
note('listens')
while True:
    s, _ = l.accept()
    threading.Thread(target=serve, args=(s,), daemon=True).start()
PY
ns s python3 "$T/relay.py" "$T/m.pem" "$T/m.key" "$(address a)" "$T/relay.log" & relay=$!
for i in $(seq 50); do grep -q listens "$T/relay.log" 2>/dev/null && break; sleep 0.1; done
good=$(code a)
no "somebody is in between" b pair 10.9.0.99:16516 "$good"
grep -q "tls with the listening host" "$T/relay.log" || fail "the machine in the middle did not reach the listening host: $(cat "$T/relay.log")"
! grep -q "^caller" "$T/relay.log" || fail "the calling host told the machine in the middle something: $(cat "$T/relay.log")"
[ "$(snmigrate a peers --json | jq length)" = 0 ] || fail "the machine in the middle is paired"

# ---- three commands: pair, pair, move
started=$(date +%s%N)
snmigrate b pair "$A" "$good" >"$T/out" || fail "pairing"
grep -q "^paired with hosta ($A), certificate SHA-256 " "$T/out" || fail "$(cat "$T/out")"
no "the code was used already, by host hostb" b pair "$A" "$good"
[ "$(snmigrate a peers --json | jq -r '.[] | "\(.name) \(.address) \(.trust) \(.send) \(.receive) \(.administer)"')" = "hostb $B paired true true false" ] ||
	fail "$(snmigrate a peers --json)"
[ "$(snmigrate a peers --json | jq -r '.[0].certificates[0].sha256')" = "$(openssl x509 -in "$T/b/state/trust/host.pem" -noout -fingerprint -sha256 |
	sed 's/.*=//; s/://g' | tr 'A-F' 'a-f')" ] || fail "the certificate that hosta knows is not hostb's"
native_vm a vm1 128M "ws=8 rate=10 touch=16 zero=1 disk=rw diskrate=100 hb=100"
wait_touched a vm1
seq=$(hb_field "$(wait_hb a vm1)" seq)
snmigrate a vm1 hostb --with-storage >"$T/out" 2>&1 || fail "the first move: $(cat "$T/out")"
assert_good "$(wait_hb b vm1 "$seq")"
echo "figure: pairing and the first move of a guest with two disks of $DISK_MB MiB: $((($(date +%s%N) - started) / 1000000)) ms, 3 commands"
# the machine in the middle of a move between paired hosts
snmigrate b peers set hosta address=10.9.0.99
no "found one for: hosta, SHA-256" b vm1 hosta --with-storage
snmigrate b peers set hosta address="$A"
kill $relay; wait $relay 2>/dev/null || true

# ---- rights
snmigrate a peers set hostb -send
no "host hostb may not send VMs to hosta (on hosta: snmigrate peers set hostb +send)" b vm1 hosta --with-storage
logged a "may not send VMs to hosta"
snmigrate a peers set hostb +send -receive
snmigrate b peers set hosta -receive
no "host hosta may not receive VMs from hostb (on hostb: snmigrate peers set hosta +receive)" b vm1 hosta --with-storage
snmigrate b peers set hosta +receive
seq=$(hb_field "$(wait_hb b vm1)" seq)
snmigrate b vm1 hosta --with-storage >"$T/out" 2>&1 || fail "back: $(cat "$T/out")"
assert_good "$(wait_hb a vm1 "$seq")"
no "host hostb may not receive VMs from hosta" a vm1 hostb --with-storage
snmigrate a peers set hostb +receive
[ "$(snmigrate a peers | awk '$1 == "hostb" { print $NF, $(NF - 1) }')" = "receive send" ] || fail "$(snmigrate a peers)"

# commands for another host: only of one that may administer, and never about trust
onto() { # TEXT COMMAND...: refused, on behalf of hostb at hosta
	local rc=0
	"$BIN/$2" --control "$T/b/control.sock" --on hosta "${@:3}" >"$T/out" 2>"$T/err" || rc=$?
	[ $rc = 3 ] && grep -qF -- "$1" "$T/err" || fail "${*:2}: exit $rc: $(cat "$T/err")"
	checks=$((checks + 1))
}
onto "host hosta refused: host hostb may not administer hosta (on hosta: snmigrate peers set hostb +administer)" snvm list
snmigrate a peers set hostb +administer
[ "$(snvm b --on hosta list --json | jq -r '.[0] | .name + " " + .state')" = "vm1 running" ] || fail "list from hostb: $(snvm b --on hosta list)"
snvm b --on hosta pause vm1
[ "$(vm_state a vm1)" = paused ] || fail "paused from hostb: $(vm_state a vm1)"
snvm b --on hosta resume vm1
snmigrate b --on hosta peers | grep -q '^hostb .*send receive administer$' || fail "peers from hostb"
onto "'peer-set' is not among the commands that other hosts may send" snmigrate peers set hostb +send
onto "'console' is not among the commands" snvm console vm1
onto "no VM named nothing on host hosta" snvm pause nothing
logged a "host hostb: pause, on behalf of its administrator"
snmigrate a peers set hostb -administer
onto "may not administer hosta" snvm pause vm1

# ---- revoked: not while a VM is on its way, unless by force, and then the move ends and the VM stays
ns a tc qdisc add dev eth0 root tbf rate 20mbit burst 64kb latency 100ms
snmigrate a vm1 hostb --with-storage --json >"$T/move.json" 2>"$T/move.err" & mover=$!
for i in $(seq 200); do grep -q '"storage"' "$T/move.json" && break; sleep 0.05; done
no "VM vm1 is being moved there: snmigrate cancel vm1 first" a unpair hostb
snmigrate a unpair hostb --force || fail "unpair --force"
rc=0; wait $mover || rc=$?
# 4: a disk was being dialled just then
[ $rc = 5 ] || [ $rc = 4 ] || fail "the move to a host that is no longer paired: exit $rc: $(cat "$T/move.err")"
ns a tc qdisc del dev eth0 root
wait_hb a vm1 >/dev/null
[ "$(vm_state a vm1)" = running ] || fail "vm1 is $(vm_state a vm1)"
no "no host named hostb" a vm1 hostb --with-storage
no "is not paired" a unpair hostb
# hostb still knows hosta, but is a stranger there
native_vm b vm2 64M "ws=2 rate=1 touch=2 zero=1 hb=100"
no "this host is not paired there, or not any more" b vm2 hosta --with-storage
logged a "is of no host that is paired here"
# and once more: the same hosts, the same certificates
snmigrate b pair "$A" "$(code a)" >/dev/null || fail "pairing again"
# a host that was installed anew is not the one that was paired
daemon_kill a TERM
mv "$T/a/state/trust" "$T/a/trust.old"
daemon_start a
no "expected hosta with the certificate of SHA-256" b vm2 hosta --with-storage
no "host hosta is paired already, with another certificate" b pair "$A" "$(code a)"
snmigrate b unpair hosta
snmigrate b pair "$A" "$(code a)" >/dev/null || fail "pairing with the new installation"

# ---- strangers at the pairing port: nothing without a code, a handful of processes with one
cat >"$T/flood.py" <<'PY'
import socket, sys, time
held = []
for i in range(60):
    s = socket.create_connection((sys.argv[1], 16516), 5)
    s.sendall([b'SNMIGRATE/1 pair -\n', b'SNMIGRATE/1 pair -\n\x16\x03\x01', b'SNMIGRATE/1 pair -\nGET / HTTP/1.1\r\n\r\n'][i % 3])
    held.append(s)
print('held', flush=True)
time.sleep(float(sys.argv[2]))
closed = 0
for s in held:
    s.setblocking(False)
    try:
        d = s.recv(100)
        # an alert is all that a stranger hears
        closed += len(d) == 0 or (len(d) == 7 and d[0] == 21)
    except BlockingIOError:
        pass
    except OSError:
        closed += 1
print(closed)
PY
daemon_kill a TERM; daemon_start a
pairing() { pids_in a snvmm "--pair " | wc -l; } # not --paired, which VMs that came are for good
[ "$(ns s timeout 60 python3 "$T/flood.py" "$(address a)" 1 | tail -n 1)" = 60 ] || fail "strangers are listened to without a code"
[ "$(pairing)" = 0 ] || fail "a process for a stranger, without a code"
last=$(code a)
ns s timeout 60 python3 "$T/flood.py" "$(address a)" 13 >"$T/flood.out" & flood=$!
most=0
while kill -0 $flood 2>/dev/null; do
	n=$(pairing)
	[ $n -gt $most ] && most=$n
	sleep 0.2
done
[ "$(tail -n 1 "$T/flood.out")" = 60 ] || fail "strangers are not hung up on in time: $(cat "$T/flood.out")"
[ $most -le 4 ] && [ $most -gt 0 ] || fail "$most processes for strangers"
snmigrate b pair "$A" "$last" >/dev/null || fail "pairing after the strangers"
kill -0 "${DAEMON_PID[a]}" || fail "the daemon of hosta ended"
echo "$checks refusals and sentences; 60 strangers at the pairing port had $most processes at most"
