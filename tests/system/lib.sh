# SPDX-License-Identifier: Apache-2.0
# Two hosts on this machine for the system tests: a daemon each, in a network namespace each, behind a bridge in a
# third namespace, so that the link can be cut without a word. Sourced; not executable.
# shellcheck shell=bash
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
B=${B:-$ROOT/build}
BIN=$B/bin
T=
declare -A DAEMON_PID
NS=snm$$
while [ -e "/run/netns/${NS}s" ]; do NS=${NS}x; done # one that was killed may have left them
SILENCE_MS=${SILENCE_MS:-4000} # two tests share the processors in the check; who waits for silence itself sets less
GUEST=$B/guest/native.elf
HOSTS="a b"

fail() { echo "FAIL: $*"; show_logs; exit 1; }
skip() { echo "skipped: $*"; exit 77; }
show_logs() {
	local h f
	for h in $HOSTS; do
		for f in "$T/$h/daemon.log" "$T/$h"/state/logs/*; do
			[ -f "$f" ] || continue
			echo "--- $f"; tail -n 40 "$f"
		done
	done
}
ns() { local h=$1; shift; ip netns exec "$NS$h" "$@"; }
address() { case $1 in a) echo 10.9.0.1 ;; b) echo 10.9.0.2 ;; esac; }
other() { case $1 in a) echo b ;; b) echo a ;; esac; }

require_kvm() {
	[ -c /dev/kvm ] && [ -w /dev/kvm ] || skip "no usable /dev/kvm"
	[ "$(id -u)" = 0 ] || skip "needs root for network namespaces"
	ip netns add "${NS}probe" 2>/dev/null || skip "network namespaces cannot be made"
	ip netns del "${NS}probe"
}

net_up() {
	local h n=0
	ip netns add "${NS}s"
	ns s ip link set lo up
	ns s ip link add br0 type bridge
	ns s ip link set br0 up
	for h in $HOSTS; do
		ip netns add "$NS$h"
		ns "$h" ip link set lo up
		ip link add "v$$$h" netns "${NS}s" type veth peer name eth0 netns "$NS$h"
		ns s ip link set "v$$$h" master br0 up
		ns "$h" ip addr add "$(address "$h")/24" dev eth0
		ns "$h" ip link set eth0 up
		ns "$h" ip link add br0 type bridge
		ns "$h" ip link set br0 up
		n=$((n + 1))
	done
}
link_cut() { ns s ip link set "v$$${1:-b}" nomaster; }
link_heal() { ns s ip link set "v$$${1:-b}" master br0 2>/dev/null || true; }

config() {
	local h=$1 o
	o=$(other "$h")
	mkdir -p "$T/$h"
	cat >"$T/$h/host.ini" <<INI
[host]
name = host$h
listen = $(address "$h"):16516
state-dir = $T/$h/state
control = $T/$h/control.sock
[tls]
ca = $T/pki/ca.pem
cert = $T/pki/host$h.pem
key = $T/pki/host$h.key
[peer host$o]
address = $(address "$o"):16516
[limits]
silence-ms = $SILENCE_MS
mirror-grace-ms = ${GRACE_MS:-500}
retry-for = ${RETRY_FOR:-0}
${LIMITS_EXTRA:-}
[programs]
snvmm = $BIN/snvmm
INI
}
# daemon_start HOST [ENV=VALUE...]
daemon_start() {
	local h=$1; shift
	ip netns exec "$NS$h" env "$@" "$BIN/snmigrated" --config "$T/$h/host.ini" >>"$T/$h/daemon.log" 2>&1 </dev/null &
	DAEMON_PID[$h]=$!
	disown "${DAEMON_PID[$h]}"
	local i
	for i in $(seq 100); do
		[ -S "$T/$h/control.sock" ] && snvm "$h" list >/dev/null 2>&1 && return 0
		kill -0 "${DAEMON_PID[$h]}" 2>/dev/null || fail "daemon of host$h ended at its start"
		sleep 0.05
	done
	fail "daemon of host$h does not answer"
}
daemon_kill() { local h=$1; kill -"${2:-KILL}" "${DAEMON_PID[$h]}" 2>/dev/null || true; local i; for i in $(seq 100); do kill -0 "${DAEMON_PID[$h]}" 2>/dev/null || break; sleep 0.05; done; }

hosts_up() {
	local h
	T=$(mktemp -d "${TMPDIR:-/var/tmp}/snm-test.XXXXXX")
	trap hosts_down EXIT
	trap 'exit 130' INT TERM
	net_up
	"$BIN/snmigrate" pki init "$T/pki" >/dev/null
	for h in $HOSTS; do
		"$BIN/snmigrate" pki issue "$T/pki" "host$h" "$(address "$h")" >/dev/null
		config "$h"
	done
	for h in $HOSTS; do daemon_start "$h" "$@"; done
}
# Every process that carries this test's folder on its command line or as a namespace member is ours.
our_pids() {
	local h
	for h in $HOSTS s; do ip netns pids "$NS$h" 2>/dev/null || true; done
}
hosts_down() {
	local rc=$? last=$BASH_COMMAND trespass= h p
	set +e
	# also what set -e ended
	[ $rc = 0 ] || [ $rc = 77 ] || [ "$last" = "exit 1" ] || echo "FAIL: exit $rc after: $last"
	# a call that no filter should meet, whatever the test is about; TRESPASS: it makes such calls
	if [ -z "${TRESPASS:-}" ] && grep -asE 'the filter of .* (forbids|does not have) the call' "$T"/*/state/logs/*; then
		echo "FAIL: a VMM's thread made a call that its filter does not have"
		trespass=1 rc=1
	fi
	[ -n "${SNM_KEEP:-}" ] && [ $rc -ne 0 ] && { echo "kept: $T, namespaces $NS*"; return; }
	for p in $(our_pids); do kill -KILL "$p" 2>/dev/null; done
	for h in $HOSTS s; do ip netns del "$NS$h" 2>/dev/null; done
	sleep 0.2
	for h in $HOSTS; do
		find /sys/fs/cgroup -maxdepth 4 -type d -path "*snmigrate-host$h*" 2>/dev/null | sort -r | while read -r d; do rmdir "$d" 2>/dev/null; done
	done
	rm -rf "$T"
	[ -z "$trespass" ] || exit 1
}

snvm() { local h=$1; shift; "$BIN/snvm" --control "$T/$h/control.sock" "$@"; }
snmigrate() { local h=$1; shift; "$BIN/snmigrate" --control "$T/$h/control.sock" "$@"; }
vm_state() { snvm "$1" list --json | jq -r --arg n "$2" '[.[] | select(.name == $n) | .state][0] // "absent"'; }
wait_state() { # HOST VM STATE [SECONDS]
	local i
	for i in $(seq $((${4:-10} * 10))); do
		[ "$(vm_state "$1" "$2")" = "$3" ] && return 0
		sleep 0.1
	done
	fail "$2 at host$1 is $(vm_state "$1" "$2"), not $3"
}
pids_in() { # HOST COMM [ARGUMENT]: processes of that host
	local p
	for p in $(ip netns pids "$NS$1" 2>/dev/null); do
		[ "$(cat "/proc/$p/comm" 2>/dev/null)" = "$2" ] || continue
		[ -z "${3:-}" ] || tr '\0' ' ' <"/proc/$p/cmdline" 2>/dev/null | grep -q -- "$3" || continue
		echo "$p"
	done
}
vm_dir() { echo "$T/$1/state/vms/$2"; }
# What the serial console has kept (its last 64 KiB).
console() { timeout 2 socat -u -T 0.1 "UNIX-CONNECT:$(vm_dir "$1" "$2")/console.sock" - 2>/dev/null | tr -d '\r' || true; }
last_hb() { console "$1" "$2" | grep '^hb ' | tail -n 1 || true; }
hb_field() { sed -nE "s/.*[ ]$2=([0-9]+).*/\1/p" <<<"$1"; }
# Runs until a heartbeat with a higher seq than $3 is seen; prints it. Fails on BAD lines.
wait_hb() { # HOST VM [AFTER_SEQ]
	local i out line
	for i in $(seq 60); do
		out=$(console "$1" "$2")
		if grep -q '^BAD' <<<"$out"; then grep '^BAD' <<<"$out" | head; fail "the guest found something bad"; fi
		line=$(grep '^hb .* acked=[0-9]' <<<"$out" | tail -n 1) || true # none yet
		[ -n "$line" ] && [ "$(hb_field "$line" seq)" -gt "${3:--1}" ] && { echo "$line"; return 0; }
		sleep 0.2
	done
	fail "no heartbeat of $2 at host$1 after ${3:-the start}"
}
assert_good() { # heartbeat line
	local f
	for f in badpages badsectors badreqs badcpu; do
		[ "$(hb_field "$1" $f)" = 0 ] || fail "$f in: $1"
	done
}
# native_vm HOST NAME MEMORY "GUEST OPTIONS" (VM_EXTRA: one more line of [vm]; IDLE=0: its vCPU never halts): a raw and a qcow2 disk of DISK_MB each, of which FILL_MB are random
native_vm() {
	local h=$1 name=$2 memory=$3 options=$4 d=$T/make.$2
	mkdir -p "$d"
	head -c "${FILL_MB:-0}M" /dev/urandom | tee "$d/root.raw" >"$d/data.raw"
	truncate -s "${DISK_MB:-256}M" "$d/root.raw" "$d/data.raw"
	qemu-img convert -q -f raw -O qcow2 "$d/root.raw" "$d/root.qcow2"
	cat >"$d/vm.ini" <<INI
[vm]
name = $name
memory = $memory
cpus = ${CPUS:-1}
kernel = $GUEST
cmdline = $options idle=${IDLE:-1}
serial = socket
${VM_EXTRA:-}
[disk root]
path = root.qcow2
format = qcow2
[disk data]
path = data.raw
format = raw
INI
	snvm "$h" create "$d/vm.ini" --import "root=$d/root.qcow2" --import "data=$d/data.raw"
	rm -rf "$d"
	snvm "$h" start "$name"
}
wait_touched() { # HOST VM
	local i
	for i in $(seq 300); do
		console "$1" "$2" | grep '^touched' >/dev/null && return 0
		sleep 0.2
	done
	fail "$2 did not fill its memory"
}
