#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A move that cannot be: one clear sentence on stderr, its exit status, the VM as it was at the source, nothing at the
# destination. (What needs no guest is in bad_input_cli.sh, what a lying host sends in hostile_peer.sh.)
source "$(dirname "$0")/lib.sh"
source "$(dirname "$0")/refuse_lib.sh"
require_kvm
DISK_MB=16
LOAD="ws=4 rate=10 touch=4 zero=1 disk=rw diskrate=50 hb=100"
hosts_up
native_vm a vm1 64M "$LOAD"
wait_touched a vm1
uuid=$(snvm a info vm1 --json | jq -r .uuid)
files=$(ls "$(vm_dir a vm1)")
move() { snmigrate a vm1 hostb --with-storage; }
# refused STATUS TEXT: the move is, and nothing has changed
refused() {
	refuse "$1" "$2" move
	untouched a vm1
	[ "$(ls "$(vm_dir a vm1)")" = "$files" ] || fail "the VM's folder changed: $(ls "$(vm_dir a vm1)")"
}

# --- who and where
refuse 3 "no VM named vm9 on host hosta" snmigrate a vm9 hostb --with-storage
refuse 3 "no host named hostc" snmigrate a vm1 hostc --with-storage
refuse 3 "is on host hosta already" snmigrate a vm1 hosta --with-storage
refuse 3 "move it with --with-storage" snmigrate a vm1 hostb
daemon_kill b TERM
refused 3 "10.9.0.2:16516.*Connection refused"
link_cut b
begin=$(date +%s)
refused 3 "10.9.0.2:16516"
[ $(($(date +%s) - begin)) -le 25 ] || fail "an unreachable host was waited for $(($(date +%s) - begin)) s"
link_heal b

# --- certificates: the files are read for every connection, so they are exchanged under a running daemon
ours() { rm -rf "$T/pki"; cp -a "$T/pki.good" "$T/pki"; }
cp -a "$T/pki" "$T/pki.good"
daemon_start b
"$BIN/snmigrate" pki init "$T/pki2" >/dev/null
for h in hosta hostb; do "$BIN/snmigrate" pki issue "$T/pki2" $h 10.9.0.9 >/dev/null; done
cp "$T/pki2/hostb."* "$T/pki/"
refused 3 "the peer.s certificate (name hostb.*is not issued by the CA in $T/pki/ca.pem"
ours; cp "$T/pki2/hosta."* "$T/pki/"
refused 3 "refuses our certificate $T/pki/hosta.pem"
ours
"$BIN/snmigrate" pki issue "$T/pki.good" hostx 10.9.0.9 >/dev/null
cp "$T/pki.good/hostx.pem" "$T/pki/hostb.pem"; cp "$T/pki.good/hostx.key" "$T/pki/hostb.key"
refused 3 "expected a peer named hostb, but the certificate found is for: hostx"
ours
cp "$T/pki.good/hostx.pem" "$T/pki/hosta.pem"; cp "$T/pki.good/hostx.key" "$T/pki/hosta.key"
refused 3 "hostb refused: no \[peer\] of host hostb has the name of your certificate, hostx"
ours
expire() { # HOST: a certificate of the good CA that ended an hour ago
	openssl req -new -key "$T/pki.good/$1.key" -subj "/CN=$1" -out "$T/old.csr" 2>/dev/null
	rm -rf "$T/ca"; mkdir "$T/ca"; : >"$T/ca/index.txt"; echo 7001 >"$T/ca/serial"
	cat >"$T/ca/ca.cnf" <<-CNF
		[ca]
		default_ca = c
		[c]
		database = $T/ca/index.txt
		serial = $T/ca/serial
		new_certs_dir = $T/ca
		default_md = sha256
		policy = p
		x509_extensions = x
		[p]
		commonName = supplied
		[x]
		subjectAltName = DNS:$1
		extendedKeyUsage = serverAuth, clientAuth
	CNF
	openssl ca -batch -config "$T/ca/ca.cnf" -cert "$T/pki.good/ca.pem" -keyfile "$T/pki.good/ca.key" -in "$T/old.csr" -out "$T/pki/$1.pem" \
		-startdate "$(date -u -d '-2 hours' +%Y%m%d%H%M%SZ)" -enddate "$(date -u -d '-1 hour' +%Y%m%d%H%M%SZ)" -notext >"$T/ca/log" 2>&1 || fail "openssl ca: $(cat "$T/ca/log")"
}
expire hosta
refused 3 "hosta.pem.*expired on 20"
ours; expire hostb
refused 3 "the peer.s certificate (name hostb.*expired on 20"
ours

# --- the destination's room
daemon_kill b TERM
mkdir -p "$T/b/state.big"; mv "$T/b/state" "$T/b/state.big/state"; mkdir "$T/b/state"
mount -t tmpfs -o size=40m snm "$T/b/state"
trap 'umount -l "$T/b/state" 2>/dev/null; hosts_down' EXIT
daemon_start b
refused 3 "not enough disk space in $T/b/state"
daemon_kill b TERM
umount "$T/b/state"; rmdir "$T/b/state"; mv "$T/b/state.big/state" "$T/b/state"
trap hosts_down EXIT
daemon_start b
total_gib=$(awk '/MemTotal/ { print int($2 / 1048576) + 1 }' /proc/meminfo)
mkdir "$T/make"
cat >"$T/make/big.ini" <<INI
[vm]
name = big
memory = $((total_gib * 4))G
kernel = $GUEST
cmdline = ws=2 rate=1 touch=1 zero=1 disk=off hb=100 idle=1
INI
snvm a create "$T/make/big.ini" >/dev/null
snvm a start big
wait_touched a big
refuse 3 "not enough memory: .*big.* needs $((total_gib * 4096))\|not enough memory" snmigrate a big hostb --with-storage
untouched a big
snvm a stop --force big
snvm a delete big

# --- there already
cat >"$T/make/same.ini" <<INI
[vm]
name = vm1
memory = 64M
kernel = $GUEST
INI
snvm b create "$T/make/same.ini" >/dev/null
refused 3 "another VM named vm1 is already on host hostb"
snvm b delete vm1
sed -i "s/^name = .*/name = twin/; 2a uuid = $uuid" "$T/make/same.ini"
snvm b create "$T/make/same.ini" >/dev/null
refused 3 "hostb"
[ "$(vm_state b twin)" = stopped ] || fail "the VM with the same uuid is $(vm_state b twin)"
snvm b delete twin

# --- a bridge that only the source has
ns a ip link add onlya type bridge
ns a ip link set onlya up
cat >"$T/make/net.ini" <<INI
[vm]
name = net1
memory = 64M
kernel = $GUEST
cmdline = ws=2 rate=1 touch=1 zero=1 disk=off hb=100 idle=1
[net lan]
bridge = onlya
INI
snvm a create "$T/make/net.ini" >/dev/null
snvm a start net1
wait_touched a net1
refuse 3 "net lan: bridge onlya: no such interface" snmigrate a net1 hostb --with-storage
untouched a net1
snvm a stop --force net1
ns a ip link del onlya
refuse 3 "onlya" snvm a start net1
snvm a delete net1

# --- a VM that cannot start any more
cat >"$T/make/gone.ini" <<INI
[vm]
name = gone
memory = 64M
kernel = $GUEST
[disk root]
path = root.qcow2
format = qcow2
size = 16M
INI
snvm a create "$T/make/gone.ini" >/dev/null
mv "$(vm_dir a gone)/kernel" "$T/kernel"
refuse 3 "kernel $(vm_dir a gone)/kernel: No such file" snvm a start gone
[ "$(vm_state a gone)" = stopped ] || fail "gone is $(vm_state a gone)"
mv "$T/kernel" "$(vm_dir a gone)/kernel"
qemu-io -f qcow2 -c 'write -P 7 0 8M' "$(vm_dir a gone)/root.qcow2" >/dev/null
truncate -s 1M "$(vm_dir a gone)/root.qcow2"
refuse 3 "root.*truncated" snvm a start gone
refuse 3 "VM gone stays here: disk root: .*truncated or corrupt qcow2" snmigrate a gone hostb --with-storage
[ "$(processes a qemu-nbd)" = 1 ] || fail "a qemu-nbd of the VM that did not start is left"
snvm a delete gone

# --- a second move of the same VM, while the first runs on a slow link and ends well
ns a tc qdisc add dev eth0 root tbf rate 40mbit burst 64kb latency 100ms
snmigrate a vm1 hostb --with-storage --json >"$T/first.json" 2>"$T/first.err" &
first=$!
for i in $(seq 100); do grep -q '"storage"' "$T/first.json" && break; sleep 0.05; done
refuse 3 "VM vm1 is already being moved" move
refuse 3 "VM vm1 is not stopped" snvm a delete vm1
ns a tc qdisc del dev eth0 root
rc=0; wait $first || rc=$?
[ $rc = 0 ] || fail "the first move: exit $rc: $(cat "$T/first.err")"
assert_good "$(wait_hb b vm1 "${SEEN[vm1]}")"
[ "$(vm_state a vm1)" = absent ] || fail "the source still lists it"
refuse 3 "not on host hosta any more: it moved to hostb" snvm a start vm1
clean a
echo "figure: $checks refusals, each with its sentence and its status, and the VM untouched"
