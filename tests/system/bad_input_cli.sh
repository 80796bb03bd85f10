#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What people mistype and what strangers send: one clear sentence on stderr, its exit status, nothing touched.
# One daemon on the loopback address; no guest runs, so neither KVM nor root is needed.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
BIN=${B:-$ROOT/build}/bin
T=$(mktemp -d "${TMPDIR:-/tmp}/snm-cli.XXXXXX")
PORT=$((20000 + $$ % 20000))
DAEMON=
cleanup() {
	[ -z "$DAEMON" ] || kill -KILL "$DAEMON" 2>/dev/null || true
	rm -rf "$T"
}
trap cleanup EXIT
trap 'exit 130' INT TERM
checks=0
fail() { echo "FAIL: $*"; [ ! -f "$T/daemon.log" ] || tail -n 20 "$T/daemon.log"; exit 1; }

# refuse STATUS TEXT COMMAND...: the exit status, exactly one line on stderr, and TEXT in it
refuse() {
	local status=$1 text=$2 rc=0
	shift 2
	"$@" >"$T/out" 2>"$T/err" </dev/null || rc=$?
	[ "$rc" = "$status" ] || fail "exit $rc, not $status: $* ($(cat "$T/err"))"
	[ "$(wc -l <"$T/err")" = 1 ] || fail "not one line on stderr: $*: $(cat "$T/err")"
	grep -qF -- "$text" "$T/err" || fail "'$text' is not in: $(cat "$T/err")"
	checks=$((checks + 1))
}
config() { # FILE, text from stdin is appended
	cat >"$T/$1" <<-INI
		[host]
		name = h1
		listen = 127.0.0.1:$PORT
		state-dir = $T/state
		[tls]
		ca = $T/pki/ca.pem
		cert = $T/pki/h1.pem
		key = $T/pki/h1.key
		[peer h2]
		address = 127.0.0.1:1
	INI
	cat >>"$T/$1"
}
definition() { # FILE NAME, more from stdin
	printf '[vm]\nname = %s\nmemory = 64M\nkernel = %s\n' "$2" "${KERNEL:-$T/kernel}" >"$T/$1"
	cat >>"$T/$1"
}
snvm() { "$BIN/snvm" --control "$T/state/control.sock" "$@"; }
snmigrate() { "$BIN/snmigrate" --control "$T/state/control.sock" "$@"; }

# --- certificates
refuse 2 "pki takes" "$BIN/snmigrate" pki
refuse 3 "no-such-folder/ca.key" "$BIN/snmigrate" pki issue "$T/no-such-folder" h1 127.0.0.1
"$BIN/snmigrate" pki init "$T/pki" >/dev/null
"$BIN/snmigrate" pki issue "$T/pki" h1 127.0.0.1 host.example >/dev/null
[ "$(stat -c %a "$T/pki/ca.key" "$T/pki/h1.key" | sort -u)" = 600 ] || fail "key files are not mode 0600"
refuse 3 "is not overwritten" "$BIN/snmigrate" pki init "$T/pki"
refuse 3 "is not overwritten" "$BIN/snmigrate" pki issue "$T/pki" h1 127.0.0.1
refuse 3 "neither an IP address nor a host name" "$BIN/snmigrate" pki issue "$T/pki" h3 'a b'
refuse 3 "neither an IP address nor a host name" "$BIN/snmigrate" pki issue "$T/pki" h3 10.0.0.300
refuse 3 "not a host name" "$BIN/snmigrate" pki issue "$T/pki" ../h3 127.0.0.1
[ ! -e "$T/pki/h3.key" ] || fail "a refused certificate left a key"
openssl verify -CAfile "$T/pki/ca.pem" "$T/pki/h1.pem" >/dev/null || fail "the certificate does not verify"

# --- the daemon's configuration
refuse 3 "$T/none.ini: No such file" "$BIN/snmigrated" --config "$T/none.ini" --check
config bad.ini <<<'[limits]
silence-ms = soon'
refuse 3 "bad.ini:12: silence-ms: 'soon' is not a number" "$BIN/snmigrated" --config "$T/bad.ini" --check
config bad.ini <<<'nonsense'
refuse 3 "bad.ini:11: expected 'key = value'" "$BIN/snmigrated" --config "$T/bad.ini" --check
config bad.ini </dev/null
sed -i "s|^ca = .*|ca = $T/pki/none.pem|" "$T/bad.ini"
refuse 3 "none.pem" "$BIN/snmigrated" --config "$T/bad.ini" --check
config bad.ini </dev/null
"$BIN/snmigrate" pki init "$T/other" >/dev/null
"$BIN/snmigrate" pki issue "$T/other" h1 127.0.0.1 >/dev/null
sed -i "s|^key = .*|key = $T/other/h1.key|" "$T/bad.ini"
refuse 3 "h1" "$BIN/snmigrated" --config "$T/bad.ini" --check

# --- no daemon
refuse 3 "snmigrated does not run here" snvm list
refuse 3 "snmigrated does not run here" snmigrate vm1 h2
refuse 3 "snmigrated does not run here" snmigrate watch
refuse 3 "snmigrated does not run here" snmigrate watch vm1

config host.ini </dev/null
"$BIN/snmigrated" --config "$T/host.ini" --check >/dev/null || fail "--check refuses a good configuration"
"$BIN/snmigrated" --config "$T/host.ini" >"$T/daemon.log" 2>&1 </dev/null &
DAEMON=$!
for _ in $(seq 100); do
	snvm list >/dev/null 2>&1 && break
	kill -0 "$DAEMON" 2>/dev/null || fail "the daemon ended"
	sleep 0.05
done
[ "$(stat -c %a "$T/state/control.sock")" = 600 ] || fail "the control socket is not mode 0600"
refuse 3 "another snmigrated uses this state directory" "$BIN/snmigrated" --config "$T/host.ini"

# --- wrong usage
refuse 2 "unknown subcommand 'frobnicate'" snvm frobnicate
refuse 2 "takes exactly one VM" snvm start
refuse 2 "takes exactly one VM" snvm info a b
refuse 2 "--timeout" snvm stop vm1 --timeout soon
refuse 2 "expected DISK=PATH" snvm create x.ini --import root
refuse 2 "a move takes a VM and a host" snmigrate vm1
refuse 2 "--max-downtime" snmigrate vm1 h2 --max-downtime fast
refuse 2 "resolve takes" snmigrate resolve vm1 --run-here --give-up

# --- definitions
printf 'kernel' >"$T/kernel"
refuse 3 "$T/none.ini: No such file" snvm create "$T/none.ini"
definition bad.ini vm1 <<<'cpus = many'
refuse 3 "bad.ini:5: cpus: 'many' is not a number" snvm create "$T/bad.ini"
definition bad.ini move </dev/null
refuse 3 "bad.ini:2: name: 'move' is the name of a subcommand" snvm create "$T/bad.ini"
KERNEL=/nonexistent/vmlinuz definition bad.ini vm1 </dev/null
refuse 3 "kernel /nonexistent/vmlinuz: No such file" snvm create "$T/bad.ini"
definition bad.ini vm1 <<<'firmware = x'
refuse 3 "firmware: not supported yet" snvm create "$T/bad.ini"
definition bad.ini vm1 <<<'[disk root]
path = root.qcow2
format = qcow2'
refuse 3 "[disk root]: root.qcow2 does not exist" snvm create "$T/bad.ini"
refuse 3 "no [disk data]" snvm create "$T/bad.ini" --import data="$T/kernel"
refuse 3 "none.img: No such file" snvm create "$T/bad.ini" --import root="$T/none.img"
[ "$(snvm list --json | jq length)" = 0 ] || fail "a refused VM is listed"
[ -z "$(ls "$T/state/vms" "$T/state/creating" "$T/state/records" | grep -v :)" ] || fail "a refused VM left files"

# --- VMs
qemu-img create -q -f qcow2 "$T/whole.qcow2" 16M
qemu-io -f qcow2 -c 'write -P 7 0 8M' "$T/whole.qcow2" >/dev/null
head -c 1M "$T/whole.qcow2" >"$T/cut.qcow2"
definition vm1.ini vm1 <<<'[disk root]
path = root.qcow2
format = qcow2'
refuse 3 "truncated" snvm create "$T/vm1.ini" --import root="$T/cut.qcow2"
snvm create "$T/vm1.ini" --import root="$T/whole.qcow2" >/dev/null || fail "create"
refuse 3 "already on host h1" snvm create "$T/vm1.ini" --import root="$T/whole.qcow2"
truncate -s 1M "$T/state/vms/vm1/root.qcow2"
before=$(snvm list --json)
refuse 3 "no VM named vm2 on host h1" snvm start vm2
refuse 3 "no VM named vm2 on host h1" snmigrate vm2 h2 --with-storage
refuse 3 "no host named h9" snmigrate vm1 h9 --with-storage
refuse 3 "VM vm1 is on host h1 already" snmigrate vm1 h1 --with-storage
refuse 3 "root.qcow2: truncated or corrupt qcow2 image" snmigrate vm1 h2 --with-storage
refuse 3 "not being moved" snmigrate cancel vm1
refuse 3 "not running" snvm pause vm1
refuse 3 "not running" snvm console vm1
refuse 3 "add --yes-the-other-host-is-off" snmigrate resolve vm1 --run-here
refuse 3 "not in doubt" snmigrate resolve vm1 --run-here --yes-the-other-host-is-off
refuse 3 "nothing to give up" snmigrate resolve vm1 --give-up
refuse 3 "truncated" snvm start vm1
[ "$(snvm list --json)" = "$before" ] || fail "a refusal changed the VM"
cmp -s "$T/cut.qcow2" "$T/state/vms/vm1/root.qcow2" || fail "a refusal changed the disk"
# the last JSON line is there whatever the end
rc=0
snmigrate vm1 h9 --with-storage --json >"$T/out" 2>/dev/null || rc=$?
[ $rc = 3 ] && [ "$(tail -n 1 "$T/out" | jq -r '.result, .exit, (has("left_behind") and has("downtime_ms") and has("rounds"))' | xargs)" = "refused 3 true" ] ||
	fail "the last JSON line: $(tail -n 1 "$T/out")"

# --- strangers on the port: nothing is answered, and the daemon goes on
for line in 'GET / HTTP/1.1' 'SNMIGRATE/2 control -' 'SNMIGRATE/1 memory 0123' "$(head -c 400 /dev/zero | tr '\0' x)" \
	'SNMIGRATE/1 disk 0123456789abcdef0123456789abcdef'; do
	answer=$(printf '%s\r\n\r\n' "$line" | timeout 10 socat -t 3 - "TCP:127.0.0.1:$PORT" 2>/dev/null | wc -c || true)
	[ "$answer" = 0 ] || fail "a stranger got $answer bytes for: ${line:0:40}"
	checks=$((checks + 1))
done
answer=$(printf 'SNMIGRATE/1 control -\nthis is not TLS' | timeout 15 socat -t 12 - "TCP:127.0.0.1:$PORT" 2>/dev/null | head -c 4000 | tr -dc '[:print:]' || true)
case $answer in *"$T"* | *h1*) fail "an unproven peer was told: $answer" ;; esac
for _ in $(seq 100); do
	pgrep -f -- "--incoming --config $T/host.ini" >/dev/null || break
	sleep 0.1
done
! pgrep -f -- "--incoming --config $T/host.ini" >/dev/null || fail "a stranger's snvmm is still there"
printf '{"cmd":"nonsense"}\n{"cmd":"list"}\nnot json\n{"cmd":"list"}\n' | socat -t 2 - "UNIX-CONNECT:$T/state/control.sock" >"$T/out"
# what is not JSON ends the connection
[ "$(wc -l <"$T/out")" = 3 ] && [ "$(jq -r .ok "$T/out" | xargs)" = "false true false" ] || fail "control socket: $(cat "$T/out")"
snvm delete vm1 || fail "delete"
[ -z "$(ls "$T/state/vms" "$T/state/records" | grep -v :)" ] || fail "delete left files"
kill -TERM "$DAEMON"
wait "$DAEMON" || fail "the daemon's end: status $?"
DAEMON=
echo "$checks refusals, each with its sentence and its status"
