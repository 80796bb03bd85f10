# SPDX-License-Identifier: Apache-2.0
# Common to the outside judges: a private folder, a snnbd, and its end whatever happens.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
bin=$root/${SNM_BUILD:-build}/bin
tmp=$(mktemp -d "${TMPDIR:-/tmp}/snm-interop.XXXXXX")
server_pid=''
cleanup() {
	[ -z "$server_pid" ] || kill -KILL "$server_pid" 2>/dev/null || true
	rm -rf "$tmp"
}
trap cleanup EXIT
trap 'exit 1' INT TERM HUP
cd "$tmp"
sock=$tmp/s
uri="nbd+unix:///?socket=$sock"

fail() {
	echo "FAIL: $*"
	[ ! -s "$tmp/snnbd.log" ] || sed 's/^/  snnbd: /' "$tmp/snnbd.log"
	exit 1
}
need() {
	local t
	for t in "$@"; do
		command -v "$t" >/dev/null || { echo "skipped: $t is not installed"; exit 77; }
	done
}
# start OPTION... FILE: serves FILE at $uri.
start() {
	rm -f "$sock"
	# The server dies with this shell even if that is killed outright.
	setpriv --pdeathsig TERM -- "$bin/snnbd" --unix "$sock" "$@" 2>"$tmp/snnbd.log" &
	server_pid=$!
	local i
	for i in $(seq 200); do
		[ ! -S "$sock" ] || return 0
		kill -0 "$server_pid" 2>/dev/null || break
		sleep 0.05
	done
	fail "snnbd $* does not listen"
}
# An orderly end: exit status 0, no socket, no child left.
stop() {
	local rc=0
	kill -TERM "$server_pid"
	wait "$server_pid" || rc=$?
	server_pid=''
	[ $rc -eq 0 ] || fail "snnbd ended with status $rc"
	[ ! -e "$sock" ] || fail "snnbd left its socket"
	! grep -q 'error:' "$tmp/snnbd.log" || fail "snnbd complained"
}
# Every way of serving: format, then the options for it.
ways=("raw" "raw --no-io-uring" "raw --direct" "raw --direct --no-io-uring" "qcow2" "qcow2 --direct")
# image FORMAT NAME SIZE
image() {
	# qemu-img writes a block into a raw file to find out about O_DIRECT
	if [ "$1" = raw ]; then rm -f "$2" && truncate -s "$3" "$2"; else qemu-img create -q -f "$1" "$2" "$3"; fi
}
