#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# snnbd as a command: its ways to listen, wrong usage, clear errors, locks, and what is left after kill -9.
. "$(dirname "$0")/lib.bash"
need nbdinfo qemu-img qemu-io socat openssl

# refuse STATUS PATTERN ARGS...: one clear line on stderr.
refuse() {
	local want=$1 pattern=$2 rc=0
	shift 2
	timeout 20 "$bin/snnbd" "$@" >out 2>err </dev/null || rc=$?
	[ $rc -eq "$want" ] || { cat err; fail "snnbd $*: status $rc instead of $want"; }
	grep -qE "$pattern" err || { cat err; fail "snnbd $*: message"; }
}
"$bin/snnbd" --help | grep '^usage: snnbd' >/dev/null || fail "--help"
"$bin/snnbd" --version | grep -E '^snnbd [0-9]' >/dev/null || fail "--version"
refuse 2 'FILE is missing' --unix s
refuse 2 'where to serve' disk
refuse 2 'unknown format: vmdk' --format vmdk --unix s disk
refuse 2 'usage: snnbd' --nonsense
refuse 2 'go together' --tls-ca ca --unix s disk
refuse 2 'one of --unix' --unix s --stdio disk
refuse 1 'absent: open: No such file' --unix s absent
refuse 1 'neither a regular file nor a block device' --unix s /dev/null
truncate -s 1M disk
refuse 1 "bind: .*No such file" --unix "$tmp/no/such/folder" disk
refuse 1 'at most 107 bytes' --unix "$tmp/$(printf '%0200d' 0)" disk
refuse 1 'no socket' --stdio disk
refuse 1 'not a qcow2 image' --format qcow2 --unix s disk
truncate -s 2M 'nbd:localhost:1'
image qcow2 plain.qcow2 8M
cp plain.qcow2 'nbd:unix:x'
image qcow2 base.qcow2 8M
qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2
refuse 1 'backing file' --format qcow2 --unix s overlay.qcow2
qemu-img create -q -f qcow2 -o data_file=external.raw with-data.qcow2 8M
refuse 1 'external data file' --format qcow2 --unix s with-data.qcow2

# A file called like a protocol is a file.
start --format qcow2 'nbd:unix:x'
[ "$(nbdinfo --size "$uri")" = 8388608 ] || fail "a file named nbd:unix:x"
refuse 1 'in use' --format qcow2 --unix s2 'nbd:unix:x'
stop
start --format raw 'nbd:localhost:1'
refuse 1 'in use' --unix s2 'nbd:localhost:1'
qemu-io -f raw -c 'write 0 512' 'file:nbd:localhost:1' >/dev/null 2>&1 && fail "qemu-io opened a disk that is served"
stop

# qemu-nbd does not outlive a snnbd that was killed outright.
start --format qcow2 plain.qcow2
child=$(cat "/proc/$server_pid/task/"*/children | tr -d ' ')
[ -n "$child" ] || fail "no qemu-nbd child"
kill -KILL "$server_pid"
wait "$server_pid" 2>/dev/null || true
server_pid=''
for _ in $(seq 100); do [ -e "/proc/$child" ] || break; sleep 0.05; done
[ ! -e "/proc/$child" ] || fail "qemu-nbd $child outlived snnbd"
start --format qcow2 plain.qcow2
stop

# --tcp, --stdio, LISTEN_FDS.
port=$((20000 + $$ % 20000))
setpriv --pdeathsig TERM -- "$bin/snnbd" --tcp "127.0.0.1:$port" disk 2>snnbd.log &
server_pid=$!
for _ in $(seq 100); do nbdinfo --size "nbd://127.0.0.1:$port" >size 2>/dev/null && break; sleep 0.05; done
[ "$(cat size)" = 1048576 ] || fail "--tcp"
kill "$server_pid"; wait "$server_pid" || fail "--tcp: exit status"
server_pid=''
socat "UNIX-LISTEN:$sock" "EXEC:'$bin/snnbd' --stdio disk,nofork" 2>snnbd.log &
server_pid=$!
for _ in $(seq 100); do [ ! -S "$sock" ] || break; sleep 0.05; done
[ "$(nbdinfo --size "$uri")" = 1048576 ] || fail "--stdio"
wait "$server_pid" || fail "--stdio: exit status"
server_pid=''
# nbdinfo starts its command with socket activation
[ "$(nbdinfo --size -- [ "$bin/snnbd" disk ] 2>/dev/null)" = 1048576 ] || fail "LISTEN_FDS"

# TLS from the first byte; a client without a certificate of the CA gets nowhere.
openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=ca 2>/dev/null
for name in server client; do
	openssl req -newkey rsa:2048 -nodes -keyout $name.key -out $name.csr -subj /CN=$name 2>/dev/null
	openssl x509 -req -in $name.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -out $name.pem \
		-extfile <(echo "subjectAltName=DNS:$name,IP:127.0.0.1") 2>/dev/null
done
setpriv --pdeathsig TERM -- "$bin/snnbd" --tcp "127.0.0.1:$port" --tls-ca ca.pem --tls-cert server.pem \
	--tls-key server.key disk 2>snnbd.log &
server_pid=$!
# dial NAME OPTIONS: nbdinfo through a TLS client.
dial() {
	rm -f tls.sock
	socat "UNIX-LISTEN:tls.sock" "OPENSSL:127.0.0.1:$port,cafile=ca.pem,commonname=server$1" 2>socat.log &
	local pid=$! i rc=0
	for i in $(seq 100); do [ ! -S tls.sock ] || break; sleep 0.05; done
	timeout 20 nbdinfo --size "nbd+unix:///?socket=tls.sock" >size 2>/dev/null || rc=1
	wait $pid || true
	return $rc
}
for _ in $(seq 100); do grep -q serving snnbd.log && break; sleep 0.05; done
dial ",cert=client.pem,key=client.key" && [ "$(cat size)" = 1048576 ] || { cat socat.log; fail "TLS"; }
! dial "" || fail "TLS without a client certificate"
! timeout 2 nbdinfo --size "nbd://127.0.0.1:$port" >/dev/null 2>&1 || fail "plain NBD on a TLS port"
kill "$server_pid"; wait "$server_pid" || fail "TLS: exit status"
server_pid=''
