#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Long: make memory-faults
# The native guest gives memory back, by its balloon and by reporting free pages, moves, and takes it again: what was given back is
# neither sent nor allocated at the destination, whatever moment it was given back at, and nothing else is lost.
source "$(dirname "$0")/lib.sh"
require_kvm
DISK_MB=16
MIB=1048576
SPARE=$((256 * 256)) # pages of 256 MiB
hosts_up

field() { sed -nE "s/.*[ ]$2=([0-9]+).*/\1/p" <<<"$1"; }
spare() { console "$1" "$2" | grep '^spare held=' | tail -n 1 || true; }
wait_spare() { # HOST VM FIELD VALUE
	local i line
	for i in $(seq 150); do
		line=$(spare "$1" "$2")
		[ "$(field "$line" "$3")" = "$4" ] && return 0
		sleep 0.1
	done
	console "$1" "$2" | grep '^BAD' | head
	fail "$2 at host$1: $3 does not get $4: $line"
}
say_to() { printf '%s' "$3" | timeout 2 socat -u - "UNIX-CONNECT:$(vm_dir "$1" "$2")/console.sock" || fail "$2 is not to be told"; }
info() { snvm "$1" info "$2" --json | jq -r "$3"; }
resident() { info "$1" "$2" .resident_bytes; }
refuse() { # EXIT WORDS COMMAND...
	local want=$1 words=$2 rc=0
	shift 2
	"$@" >"$T/out" 2>&1 || rc=$?
	[ $rc = "$want" ] && grep -q -- "$words" "$T/out" || fail "exit $rc, not $want with \"$words\": $(cat "$T/out")"
}
move() { # FROM VM OPTION...
	local h=$1 vm=$2 seq
	shift 2
	seq=$(hb_field "$(wait_hb "$h" "$vm")" seq)
	snmigrate "$h" "$vm" "host$(other "$h")" --with-storage --json "$@" >"$T/move.json" 2>"$T/move.err" ||
		fail "move of $vm: exit $?: $(tail -n 1 "$T/move.json") $(cat "$T/move.err")"
	end=$(tail -n 1 "$T/move.json")
	assert_good "$(wait_hb "$(other "$h")" "$vm" "$seq")"
}
memory_sent() { jq -r .memory_bytes <<<"$end"; }
within() { [ "$1" -ge "$2" ] && [ "$1" -le "$3" ] || fail "$4: $1 is not from $2 to $3"; }

# first with all of it in use, to compare with
native_vm a vm1 512M "ws=32 rate=20 touch=32 spare=256 diskrate=50 hb=100 zero_every=0"
wait_touched a vm1
within "$(resident a vm1)" $((310 * MIB)) $((380 * MIB)) "what the host holds for a guest that uses all"
move a vm1
full_sent=$(memory_sent) full_there=$(resident b vm1)
within "$full_sent" $((200 * MIB)) $((600 * MIB)) "sent of a guest that uses all"

# by the balloon, as far as the host asks
[ "$(info b vm1 '.balloon | "\(.driver) \(.target_bytes) \(.actual_bytes)"')" = "true $((512 * MIB)) $((512 * MIB))" ] || fail "balloon: $(info b vm1 .balloon)"
refuse 2 "is no size" snvm b balloon vm1 lots
refuse 2 "takes a VM and a size" snvm b balloon vm1
refuse 3 "more than the 512 MiB that it has" snvm b balloon vm1 513M
refuse 3 "2 MiB at the least" snvm b balloon vm1 4K
refuse 3 "no VM named" snvm b balloon vm9 256M
snvm b balloon vm1 256M
wait_spare b vm1 balloon $SPARE
[ "$(info b vm1 .balloon.actual_bytes)" = $((256 * MIB)) ] || fail "balloon: $(info b vm1 .balloon)"
snvm b info vm1 | grep -q "the guest keeps 256 MiB, asked for 256" || fail "info: $(snvm b info vm1)"
within "$(resident b vm1)" $((70 * MIB)) $((130 * MIB)) "what the host holds after inflating"
move b vm1
balloon_sent=$(memory_sent) balloon_there=$(resident a vm1)
within "$balloon_sent" $((30 * MIB)) $((full_sent - 220 * MIB)) "sent of a guest that gave 256 MiB back"
within "$balloon_there" $((60 * MIB)) $((full_there - 220 * MIB)) "allocated at the destination"
# target and balloon went along; half of it comes back there
[ "$(info a vm1 '.balloon | "\(.driver) \(.target_bytes) \(.actual_bytes)"')" = "true $((256 * MIB)) $((256 * MIB))" ] || fail "balloon after the move: $(info a vm1 .balloon)"
snvm a balloon vm1 384M
wait_spare a vm1 held $((SPARE / 2))
# paused, it hears of it when it goes on
snvm a pause vm1
snvm a balloon vm1 512M
snvm a resume vm1
wait_spare a vm1 held $SPARE
within "$(resident a vm1)" $((310 * MIB)) $((380 * MIB)) "what the host holds after deflating"

# by reporting, and back
say_to a vm1 r
wait_spare a vm1 given $SPARE
within "$(resident a vm1)" $((70 * MIB)) $((130 * MIB)) "what the host holds after reporting"
move a vm1
report_sent=$(memory_sent) report_there=$(resident b vm1)
within "$report_sent" $((30 * MIB)) $((full_sent - 220 * MIB)) "sent of a guest that reported 256 MiB"
within "$report_there" $((60 * MIB)) $((full_there - 220 * MIB)) "allocated at the destination"

snvm b stop --force vm1
snvm b set vm1 balloon=no
grep -q balloon "$(vm_dir b vm1)/vm.ini" && fail "balloon=no: $(cat "$(vm_dir b vm1)/vm.ini")"
snvm b start vm1
[ "$(info b vm1 .balloon)" = null ] || fail "it has a balloon still: $(info b vm1 .balloon)"
refuse 3 "has no balloon" snvm b balloon vm1 256M
snvm b stop --force vm1; snvm b delete vm1

# In post-copy, given back at the destination while it is missing there: nobody waits for it, and it can be used again. All of it was
# written after the round that went before, and what is pushed would take minutes.
daemon_kill a TERM
mkdir "$T/fault"
daemon_start a SNM_FAULT=recorded-handing-over:hold "SNM_FAULT_DIR=$T/fault"
SPARE=$((SPARE / 2))
native_vm a vm2 256M "ws=16 rate=10 touch=16 spare=128 churn=200 diskrate=50 hb=100"
wait_touched a vm2
say_to a vm2 r
wait_spare a vm2 given $SPARE
snmigrate a vm2 hostb --with-storage --postcopy now --json >"$T/move.json" 2>"$T/move.err" &
mover=$!
for _ in $(seq 400); do [ -e "$T/fault/recorded-handing-over.hit" ] && break; sleep 0.05; done
say_to a vm2 u
wait_spare a vm2 held $SPARE
snmigrate a tune vm2 --bandwidth 1M || fail "not tuned: $(tail -n 1 "$T/move.json")"
touch "$T/fault/recorded-handing-over.go"
for _ in $(seq 400); do grep -q '"phase": *"postcopy"' "$T/move.json" && break; sleep 0.05; done
refuse 3 "memory is on the way" snvm b balloon vm2 128M
say_to b vm2 r
wait_spare b vm2 given $SPARE
within "$(resident b vm2)" $((30 * MIB)) $((130 * MIB)) "allocated at the destination in post-copy"
say_to b vm2 u
wait_spare b vm2 held $SPARE
snmigrate a tune vm2 --bandwidth 0
wait $mover || fail "post-copy: exit $?: $(tail -n 1 "$T/move.json") $(cat "$T/move.err")"
end=$(tail -n 1 "$T/move.json")
jq -e --argjson spare $SPARE '.result == "moved" and .postcopy.remaining_bytes == 0 and .postcopy.pages > $spare and .postcopy.pages_sent < .postcopy.pages / 2' \
	<<<"$end" >/dev/null || fail "post-copy: $end"
postcopy=$(jq -r '"\(.postcopy.pages) pages were missing, \(.postcopy.pages_sent) were sent"' <<<"$end")
assert_good "$(wait_hb b vm2)"

# all the time, while it moves: by pre-copy and by post-copy; then it reads all of its memory and its disks again
say_to b vm2 c
move b vm2
snvm a balloon vm2 192M
move a vm2 --postcopy now
say_to b vm2 q
for _ in $(seq 150); do console b vm2 | grep -q '^done ' && break; sleep 0.2; done
console b vm2 | grep -q '^done ok=1' || fail "at its end: $(console b vm2 | grep -e '^BAD' -e '^done' | head)"
mib() { echo $((($1 + MIB / 2) / MIB)); }
echo "figure: 512 MiB, 320 used: sent $(mib "$full_sent") MiB, allocated there $(mib "$full_there"); 256 MiB in the balloon: $(mib "$balloon_sent"), $(mib "$balloon_there"); 256 MiB reported: $(mib "$report_sent"), $(mib "$report_there"); in post-copy $postcopy"
