#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Long: make operation
# Paired hosts whose certificates last for half a minute: a guest moves back and forth while they are renewed, and nobody notices.
source "$(dirname "$0")/lib.sh"
require_kvm
DISK_MB=16
LIFE_S=${LIFE_S:-30}
config() {
	local h=$1
	mkdir -p "$T/$h"
	cat >"$T/$h/host.ini" <<INI
[host]
name = host$h
listen = $(address "$h"):16516
state-dir = $T/$h/state
control = $T/$h/control.sock
[limits]
silence-ms = $SILENCE_MS
certificate-validity = ${LIFE_S}s
retry-for = 0
[programs]
snvmm = $BIN/snvmm
INI
}
hosts_up
own() { openssl x509 -in "$T/$1/state/trust/host.pem" -noout -fingerprint -sha256 | sed 's/.*=//; s/://g' | tr 'A-F' 'a-f'; }
snmigrate b pair "$(address a):16516" "$(snmigrate a pair 2>/dev/null)" || fail "pairing"
first_a=$(own a) first_b=$(own b)
native_vm a vm1 128M "ws=2 rate=10 touch=8 zero=1 disk=rw diskrate=100 hb=100"
wait_touched a vm1
at=a moves=0
end=$(($(date +%s) + LIFE_S * 3 / 2))
while [ "$(date +%s)" -lt $end ]; do
	seq=$(hb_field "$(wait_hb $at vm1)" seq)
	snmigrate $at vm1 "host$(other $at)" --with-storage >"$T/out" 2>&1 || fail "move $moves from host$at: $(cat "$T/out")"
	at=$(other $at) moves=$((moves + 1))
	assert_good "$(wait_hb $at vm1 "$seq")"
done
for h in a b; do
	first=first_$h
	[ "$(own $h)" != "${!first}" ] || fail "the certificate of host$h is still the first one"
	snmigrate "$(other $h)" peers --json | grep -q "$(own $h)" || fail "host$(other $h) does not know host$h's certificate"
	grep -q "trust/host.pem was renewed" "$T/$h/daemon.log" || fail "no word of it in the log of host$h"
	! grep -q "have to be paired again" "$T/$h/daemon.log" || fail "host$h left the other behind"
done
[ $moves -ge 3 ] || fail "$moves moves only"
echo "figure: $moves moves in $((LIFE_S * 3 / 2)) s between hosts whose certificates last for $LIFE_S s, each renewed $(grep -c 'was renewed' "$T/a/daemon.log") times"
