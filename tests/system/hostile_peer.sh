#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A host with a valid certificate that lies: each of its HELLOs and frames is refused with a sentence, nothing of it stays,
# nothing outside the state directory is touched, and the daemon goes on.
source "$(dirname "$0")/lib.sh"
source "$(dirname "$0")/refuse_lib.sh"
require_kvm
[ -x "$B/tests/helpers/hostile_peer" ] || fail "build/tests/helpers/hostile_peer is not built"
LIMITS_EXTRA="[devices]
allow = /dev/snm-test/*"
hosts_up
daemon_kill a TERM
hostile() { # CASE EXPECTED
	local out rc=0
	out=$(ns a timeout 30 "$B/tests/helpers/hostile_peer" "$(address b):16516" hostb "$T/pki/ca.pem" "$T/pki/hosta.pem" "$T/pki/hosta.key" "$1" $((checks + 1)) 2>&1) || rc=$?
	[ $rc = 0 ] || fail "$1: exit $rc: $out"
	grep -q -- "$2" <<<"$out" || fail "$1: '$2' is not in: $out"
	kill -0 "${DAEMON_PID[b]}" || fail "$1: the daemon ended"
	checks=$((checks + 1))
	echo "$1: $(tail -n 1 <<<"$out")"
}
before=$(find "$T/b/state/vms" "$T/pki" -printf "%p %s %T@\n"; stat -c '%n %Y %s' /etc/hostname /etc/shadow)

# the definition
hostile disk-path-parent '^refused: .*\.\./\.\./escaped.*plain file name'
hostile disk-path-absolute '^refused: .*/etc/hostname.*plain file name'
hostile disk-path-ours '^refused: .*vm\.ini'
hostile kernel-path '^refused: .*kernel = .*plain file name'
hostile initrd-path '^refused: .*/etc/shadow.*plain file name'
hostile serial-file '^refused: .*file:/etc/escaped.*only socket'
hostile definition-malformed '^refused: definition from hosta:8:'
hostile bridge-missing '^refused: .*bridge nobr7: no such interface on this host'
# what goes with it
hostile disk-list-short '^refused: .*"disks" does not match'
hostile backing-absolute '^refused: .*backing = /etc/shadow: not a plain file name'
hostile backing-unsaid '^refused: .*what is below does not match the definition'
hostile backing-many '^refused: .*9 files below a disk'
hostile backing-hash '^refused: .*"sha256" of the backing file'
hostile device-not-allowed '^refused: .*/dev/vda is not among the block devices that host hostb allows'
hostile device-parent '^refused: .*/dev/snm-test/\.\./vda is not among the block devices'
hostile device-file '^refused: .*/dev/snm-test/none'
hostile mode-unknown '^refused: .*unknown "mode"'
hostile disk-id-other '^refused: .*does not match the definition'
hostile disk-huge '^refused: .*"virtual_bytes"'
hostile disk-negative '^refused: .*"virtual_bytes"'
hostile disk-allocated-huge '^refused: not enough disk space'
hostile region-outside '^refused: .*region outside guest memory'
hostile region-overflow '^refused: .*region outside guest memory'
hostile file-foreign-name '^refused: .*none that travels'
hostile file-huge '^refused: .*"size"'
hostile file-twice '^refused: .*there twice'
hostile memory-huge '^refused: not enough memory'
hostile streams-many '^refused: .*"streams"'
hostile name-other '^refused: .*do not match the definition'
hostile uuid-path '^refused: .*do not match the definition'
hostile versions-newer '^refused: .*upgrade the destination'
hostile versions-older '^refused: .*upgrade the source'
hostile hash-seed-none '^refused: .*"hash_seed" is missing'
hostile hash-seed-long '^refused: .*16 hexadecimal digits'
hostile hash-chunks-tiny '^refused: .*chunks of 512 bytes'
hostile hash-chunks-odd '^refused: .*chunks of 1049088 bytes'
hostile hash-chunks-many '^refused: .*chunks of 1048576 bytes'
hostile cpu-feature "^refused: this host's CPU lacks .* of the guest's: "
hostile cpu-vendor "^refused: .*cannot change vendor"
hostile cpu-none '^refused: .*"cpu" is missing'
hostile no-tls '^refused: .*allow-no-tls'
hostile epoch-zero 'epoch 0'
hostile empty-hello '^refused: '
clean b
[ -z "$(ls -A "$T/b/state/records")" ] || fail "a refused HELLO left a record: $(ls "$T/b/state/records")"

# an arrival that was accepted and goes wrong
hostile first-not-hello '^closed: '
hostile first-junk '^closed: '
for case in wrong-epoch unknown-type junk frame-too-long checksum commit-early state-early prepare-early phase-unknown hello-again \
	hash-early hash-disk hash-many sums-early file-index file-beyond file-gap file-missing silent vanish; do
	hostile $case '^\(aborted\|closed\): '
	clean b
done
# and an honest beginning is taken still: its hostile brothers left nothing that stands in its way
hostile honest '^accepted'
clean b
[ "$(find "$T/b/state/vms" "$T/pki" -printf "%p %s %T@\n"; stat -c '%n %Y %s' /etc/hostname /etc/shadow)" = "$before" ] || fail "something outside the arrival changed"
[ -z "$(find "$T" -name '*escaped*')" ] && [ ! -e /etc/escaped ] || fail "a path escaped"
[ "$(snvm b list --json | jq length)" = 0 ] || fail "a hostile VM is listed"
echo "figure: $checks hostile peers, nothing left of any"
