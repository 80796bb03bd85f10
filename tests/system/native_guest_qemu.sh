#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Alone: emulated host
# The native test guest itself, judged on QEMU: it runs clean, it sees what it is there to see (a changed page, a changed
# sector, a stop), and it comes through a migration that somebody else's VMM performs. What fails here is not snmigrate's
# fault.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
build=${B:-$repo/build}
guest=$build/guest/native.elf
check_disk=$build/tests/guest/check_disk

skip() {
	echo "skipped: $*"
	exit 77
}
command -v qemu-system-x86_64 >/dev/null || skip "qemu-system-x86_64 is missing"
if [[ ! -e $guest || ! -e $check_disk ]]; then
	make -C "$repo" B="$build" "$guest" "$check_disk"
fi
# SNM_ACCEL=tcg: the same without KVM
accel=tcg
if [[ ${SNM_ACCEL:-kvm} == kvm && -r /dev/kvm && -w /dev/kvm ]]; then accel=kvm; fi

work=$(mktemp -d)
pids=()
# shellcheck disable=SC2317
cleanup() {
	local status=$? pid
	for pid in "${pids[@]}"; do kill -9 "$pid" 2>/dev/null || true; done
	wait 2>/dev/null || true
	if ((status != 0 && status != 77)); then
		for f in "$work"/*.serial "$work"/*.log; do
			[[ -e $f ]] || continue
			echo "--- ${f##*/}:"
			tail -n 15 "$f"
		done
	fi
	rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 1' INT TERM HUP

step() { echo "$(date +%T) $*"; }
fail() {
	echo "FAILED: $*"
	exit 1
}

# qemu NAME OPTIONS [ARGUMENT...]: starts QEMU with disks NAME.0 and NAME.1; its process becomes $qemu_pid
qemu() {
	local name=$1 options=$2
	shift 2
	qemu-system-x86_64 -nodefaults -no-user-config -display none -no-reboot -machine q35 -accel $accel -m 256M \
		-kernel "$guest" -append "poweroff=io:0x604:0x2000 hb=100 fresh=1 zero=2 $options" -serial "file:$work/$name.serial" \
		-drive if=none,id=d0,format=raw,discard=unmap,file="$work/$disk.0" -device virtio-blk-pci,disable-legacy=on,drive=d0 \
		-drive if=none,id=d1,format=raw,discard=unmap,file="$work/$disk.1" -device virtio-blk-pci,disable-legacy=on,drive=d1 \
		"$@" <&0 >"$work/$name.log" 2>&1 &
	qemu_pid=$!
	pids+=($qemu_pid)
}
new_disks() {
	disk=$1
	truncate -s 48M "$work/$disk.0"
	truncate -s 16M "$work/$disk.1"
}
# wait_line NAME PATTERN SECONDS
wait_line() {
	local deadline=$((SECONDS + $3))
	until grep -aqs "$2" "$work/$1.serial"; do
		((SECONDS < deadline)) || fail "$1: no line '$2' within $3 s"
		kill -0 $qemu_pid 2>/dev/null || grep -aqs "$2" "$work/$1.serial" || fail "$1: QEMU is gone before '$2'"
		sleep 0.05
	done
}
wait_exit() {
	local deadline=$((SECONDS + $2)) status=0
	while kill -0 $qemu_pid 2>/dev/null; do
		((SECONDS < deadline)) || fail "$1: the guest does not power off within $2 s"
		sleep 0.05
	done
	wait $qemu_pid || status=$?
	((status == 0)) || fail "$1: QEMU exits with $status"
}
# value NAME LINE-PATTERN KEY: of the last such line that is whole: the guest may be writing one
value() { grep -a "$2.*"$'\r$' "$work/$1.serial" | tail -n 1 | tr -d '\r' | tr ' ' '\n' | sed -n "s/^$3=//p"; }
bad_lines() { grep -a '^BAD' "$work/$1.serial" || true; }
# judge_disks NAME: the images hold what the guest says it wrote last
judge_disks() {
	local i
	for i in 0 1; do
		"$check_disk" --seed "$(value "$1" "^disk $i final" seed)" --digest "$(value "$1" "^disk $i final" digest)" \
			--record "$(value "$1" "^disk $i final" acked)" "$work/$disk.$i" || fail "$1: disk $i is not what the guest wrote"
	done
}
judge_clean() {
	[[ -z $(bad_lines "$1") ]] || fail "$1: $(bad_lines "$1" | head -n 3)"
	grep -aq '^done ok=1 bad=0' "$work/$1.serial" || fail "$1: no clean end"
	judge_disks "$1"
}

step "runs clean on QEMU ($accel): memory, two disks, heartbeats"
new_disks clean
qemu clean "ws=48 touch=64 rate=20 run=3 seed=$RANDOM"
wait_line clean '^done' 60
wait_exit clean 10
judge_clean clean
grep -a '^hb ' "$work/clean.serial" | tr -d '\r' | awk '
	function get(key,  i, kv) { for (i = 2; i <= NF; i++) { split($i, kv, "="); if (kv[1] == key) return kv[2] } return -1 }
	{
		if (get("seq") != n++) { print "heartbeat " n - 1 " has seq " get("seq"); exit 1 }
		if (get("pages") < pages || get("reads") < reads || get("writes") < writes || get("acked") < acked) {
			print "a counter runs backwards: " $0; exit 1 }
		pages = get("pages"); reads = get("reads"); writes = get("writes"); acked = get("acked")
	}
	END {
		if (n < 15) { print n " heartbeats in 3 s at 10 a second"; exit 1 }
		if (pages < 5000 || reads < 50 || writes < 50 || acked < 10) { print "no load: " $0; exit 1 }
	}' || fail "heartbeats"
for key in scanned zeroes discards flushes; do
	[[ $(value clean '^final' $key) -gt 0 ]] || fail "no $key at all"
done
echo "figure: native guest on QEMU/$accel: $(value clean '^final' pages) pages rewritten in 3 s at 20 MB/s," \
	"longest gap $(value clean '^final' maxgap_us) us"

step "the disk checker sees a changed, a misplaced and a stale sector"
digest=$(value clean '^disk 0 final' digest)
lba=$("$check_disk" --find-valid "$work/clean.0") || fail "no valid sector beyond the records"
poke() { dd of="$work/copy" conv=notrunc status=none "$@"; }
cp --sparse=always "$work/clean.0" "$work/copy"
printf 'X' | poke bs=1 seek=$((lba * 512 + 300))
if "$check_disk" "$work/copy"; then fail "a changed sector passes"; fi
cp --sparse=always "$work/clean.0" "$work/copy"
poke if="$work/clean.0" bs=512 skip="$lba" seek=$((lba + 1)) count=1
if "$check_disk" "$work/copy"; then fail "a misplaced sector passes"; fi
cp --sparse=always "$work/clean.0" "$work/copy"
poke if=/dev/zero bs=512 seek="$lba" count=1
if "$check_disk" --digest "$digest" "$work/copy"; then fail "a lost sector passes"; fi

step "the guest sees a changed page, a changed sector and a stop"
new_disks broken
qemu broken "ws=16 touch=64 rate=20 scan=500 diskrate=50 gaplog=1 seed=$RANDOM" -object \
	memory-backend-file,id=ram,size=256M,mem-path="$work/ram",share=on -machine memory-backend=ram
wait_line broken '^touched' 60
[[ -z $(bad_lines broken) ]] || fail "bad before anything was broken: $(bad_lines broken)"
printf 'XXXXXXXX' | dd of="$work/ram" bs=1 seek=$((240 * 1048576 + 1000)) conv=notrunc status=none
wait_line broken '^BAD page address=0xf000000 .* kind=torn word=125 .*found=0x5858585858585858' 20
dd if=/dev/urandom of="$work/broken.0" bs=1M seek=20 count=16 conv=notrunc status=none
wait_line broken '^BAD sector disk=0 .* kind=corrupt' 20
kill -STOP $qemu_pid
sleep 0.5
kill -CONT $qemu_pid
seen=$(grep -ac '^hb' "$work/broken.serial")
wait_line broken "^hb seq=$((seen + 3)) " 20
gap=$(value broken '^hb' maxgap_us)
((gap >= 450000)) || fail "a stop of 500 ms shows as a gap of $gap us"
grep -aqE "^gap tsc=[0-9]+ us=$gap.?\$" "$work/broken.serial" || fail "the longest gap, of $gap us, has no line of its own"
[[ $(value broken '^hb' badpages) -ge 1 && $(value broken '^hb' badsectors) -ge 1 ]] || fail "bad things are not counted"
[[ $(value broken '^hb' badcpu) -eq 0 && $(value broken '^hb' badreqs) -eq 0 ]] || fail "counted where nothing was bad"
{ kill -9 $qemu_pid && wait $qemu_pid; } 2>/dev/null || true

step "comes through a migration by QEMU, to a file and back"
new_disks moved
mkfifo "$work/monitor"
exec {monitor}<>"$work/monitor"
qemu moved1 "ws=48 touch=64 rate=20 run=6 seed=$RANDOM" -monitor stdio <"$work/monitor"
wait_line moved1 '^hb seq=15 ' 60
echo "migrate \"exec:cat > $work/state\"" >&$monitor
deadline=$((SECONDS + 60))
until echo "info migrate" >&$monitor && grep -aq 'Migration status: completed' "$work/moved1.log"; do
	((SECONDS < deadline)) || fail "QEMU's migration does not end"
	sleep 0.2
done
echo quit >&$monitor
wait_exit moved1 10
[[ -z $(bad_lines moved1) ]] || fail "bad before the move: $(bad_lines moved1 | head -n 3)"
qemu moved2 "" -incoming "exec:cat $work/state"
wait_line moved2 '^done' 60
wait_exit moved2 10
judge_clean moved2
before=$(value moved1 '^hb' seq) after=$(grep -a -m 1 '^hb' "$work/moved2.serial" | sed 's/^hb seq=\([0-9]*\).*/\1/')
((after > before && after <= before + 2)) || fail "heartbeat $before before the move, $after after it"
echo "passed"
