#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Long: make operation
# Alone: emulated hosts
# Three hosts in the lab and six VMs under load, four of them Debian with fsync recorders and an open connection, two native guests that
# check all their memory and disks: host1 is emptied two at a time, the command and then the daemon killed in the middle and taken up
# again, then all come back. Nothing is lost, nothing runs twice, the journals of all hosts say so, and the times are those of the plan.
#   LINUX, NATIVE: names, fewer for a try; WITHIN: per cent by which the whole may differ from the plan
source "$(dirname "$0")/linux_lib.sh"
require_lab
LINUX=${LINUX-lx1 lx2 lx3 lx4}
NATIVE=${NATIVE-na1 na2}
WITHIN=${WITHIN:-30}
HOSTS=(host1 host2 host3)
MEMORY=${MEMORY:-192M}
# An emulated host has one processor, which takes some ten milliseconds for what a guest does in each.
PERIOD_MS=${PERIOD_MS:-500}
GUEST_OPTIONS="ws=2 rate=1 touch=4 zero=1 scan=2 disk=rw diskrate=10 depth=2 span=4 hb=500 gapmin=100000 timeout=600000"
read -ra vms <<<"$LINUX $NATIVE"
declare -A seen # the last heartbeat of a native guest, the last record of a Linux one

number_of() { local i; for i in "${!vms[@]}"; do [[ ${vms[i]} != "$1" ]] || echo $((i + 1)); done; }
is_linux() { [[ " $LINUX " == *" $1 "* ]]; }
snm() { local h=$1; shift; on "$h" snmigrate "$@"; }
list_of() { on "$1" snvm list --json; }

# ---- the VMs ----

linux_vm() { # NAME
	local n
	n=$(number_of "$1")
	linux_definition "$1" "$MEMORY" 1 "10.77.0.10$n" "guest.port=710$n guest.interval=$PERIOD_MS guest.count=$PERIOD_MS" "0$n" >"$work/$1.ini"
	lab push host1 "$work/$1.ini" "/var/lib/guest/$1.ini"
	lab net "$work/guest/collector" listen "710$n" "$work/$1.records" &
	collector_pids+=($!)
	on host1 snvm create "/var/lib/guest/$1.ini" --import root=/var/lib/guest/root.qcow2 --import data=/var/lib/guest/data.raw
	on host1 snvm start "$1"
	wait_for 180 "records of $1" grew "$1"
	lab net "$work/guest/collector" watch "10.77.0.10$n" 7000 "$work/$1.counter" &
	collector_pids+=($!)
}
native_vm() { # NAME
	cat >"$work/$1.ini" <<INI
[vm]
name = $1
memory = 64M
kernel = /var/lib/guest/native.elf
cmdline = $GUEST_OPTIONS seed=$(number_of "$1")
serial = socket
[disk root]
path = root.qcow2
format = qcow2
size = 8M
[disk data]
path = data.raw
format = raw
size = 8M
INI
	lab push host1 "$work/$1.ini" "/var/lib/guest/$1.ini"
	on host1 snvm create "/var/lib/guest/$1.ini"
	on host1 snvm start "$1"
	look
	wait_for 120 "heartbeat of $1" grew "$1"
	calm host1
}
# What the serial console has kept, of the VM wherever it is.
console() { # HOST VM
	on "$1" sh -c "busybox timeout 5 socat -u -T 1 UNIX-CONNECT:/var/lib/snmigrate/vms/$2/console.sock - | tr -d '\r'" 2>/dev/null || true
}
field() { sed -nE "s/.*[ ]$2=([0-9]+).*/\1/p" <<<"$1"; }
# Whether it has gone on since it was last asked; a native guest that found something bad ends the test.
grew() { # VM
	local now hb f
	if is_linux "$1"; then
		now=$("$work/guest/collector" summary "$work/$1.records" 2>/dev/null | jq -s 'if length == 2 then map(.count) | min else 0 end')
	else
		hb=$(console "$(where "$1")" "$1")
		! grep '^BAD' <<<"$hb" || fail "$1 found something bad"
		hb=$(grep '^hb .* acked=[0-9]' <<<"$hb" | tail -n 1) || return 1
		for f in badpages badsectors badreqs badcpu; do [[ $(field "$hb" $f) == 0 ]] || fail "$1: $hb"; done
		now=$(field "$hb" seq)
	fi
	((${now:-0} > ${seen[$1]:-0} + 2)) || return 1
	seen[$1]=$now
}
# The host on which it runs: exactly one has it running, no other as anything but a VM that moved away.
where() { # VM
	local h found=()
	for h in "${HOSTS[@]}"; do
		[[ $(jq -r --arg n "$1" '[.[] | select(.name == $n) | .state][0] // "absent"' "$work/$h.list") != running ]] || found+=("$h")
	done
	echo "${found[*]}"
}
look() { local h; for h in "${HOSTS[@]}"; do list_of "$h" >"$work/$h.list"; done; }
# Each VM runs on exactly one of these hosts, is on no other, and lives.
once() { # HOST...
	local vm at h
	look
	for vm in "${vms[@]}"; do
		at=$(where "$vm")
		[[ $at && " $* " == *" $at "* ]] || fail "$vm runs on '$at', not on one of $*"
		for h in "${HOSTS[@]}"; do
			[[ $h == "$at" ]] || jq -e --arg n "$vm" 'all(.name != $n)' "$work/$h.list" >/dev/null || fail "$vm runs on $at, and $h lists it, too: $(<"$work/$h.list")"
		done
		wait_for 60 "life in $vm on $at" grew "$vm"
	done
}
empty() { # HOST
	[[ $(list_of "$1" | jq length) == 0 ]] || fail "$1 is not empty: $(list_of "$1")"
	[[ -z $(on "$1" sh -c 'busybox pidof snvmm qemu-nbd; true') ]] || fail "processes of a VM are left on $1"
	[[ -z $(on "$1" sh -c 'ls -A /var/lib/snmigrate/vms /var/lib/snmigrate/incoming | grep -v : || true') ]] || fail "files of a VM are left on $1"
}

# The native guests never rest, and an emulated host has one processor: they get what is left of it.
calm() { # HOST...
	local vm h pid
	for h in "$@"; do
		list_of "$h" >"$work/$h.list"
		for vm in $NATIVE; do
			pid=$(jq -r --arg n "$vm" '.[] | select(.name == $n and .state == "running") | .name' "$work/$h.list")
			[[ -z $pid ]] || pid=$(on "$h" snvm info "$vm" --json | jq .pid)
			# shellcheck disable=SC2016
			[[ -z $pid ]] || on "$h" sh -c 'for t in $(grep -lx "vcpu.*" /proc/$0/task/*/comm); do t=${t%/comm}; busybox renice -n 15 -p "${t##*/}"; done' "$pid" >/dev/null
		done
	done
}

# ---- the journals ----

declare -A left # where each was before
leave() { local vm; look; for vm in "${vms[@]}"; do left[$vm]=$(where "$vm"); done; }
# Of each VM the last move from where it was, and the arrival where it is, both moved: nothing twice.
journals() {
	local vm at from said
	look
	for vm in "${vms[@]}"; do
		at=$(where "$vm") from=${left[$vm]}
		said=$(snm "$from" history "$vm" --json | jq -sc 'map(select(.direction == "out"))[-1] | [.peer, .result]')
		[[ $said == "[\"$at\",\"moved\"]" ]] || fail "the journal of $from says $said of $vm, which is on $at"
		wait_for 20 "arrival of $vm in the journal of $at" arrived "$at" "$vm" "$from"
	done
}
arrived() { [[ $(snm "$1" history "$2" --json | jq -sc 'map(select(.direction == "in"))[-1] | [.peer, .result]') == "[\"$3\",\"moved\"]" ]]; }

# ---- plans ----

# In the background: there, so that a kill of the command is one there.
start_plan() { # HOST ARGUMENT...
	local h=$1
	shift
	lab exec "$h" snmigrate "$@" --with-storage --json </dev/null >"$work/plan.json" 2>"$work/plan.err" &
	planner=$!
}
wait_plan() { # HOST JQ-CONDITION
	local i
	for ((i = 0; i < 300; i++)); do
		snm "$1" evacuate --status --json 2>/dev/null | jq -e "$2" >/dev/null 2>&1 && return
		sleep 0.5
	done
	fail "the plan of $1 does not come to $2: $(snm "$1" evacuate --status --json)"
}
# What was predicted beside what happened, of each VM and of the whole; the difference of the whole, per cent, into $off.
figures() { # WORDS PLAN END
	jq -rn --argjson p "$2" --argjson e "$3" '($p.vms | map({(.vm): .}) | add) as $of | $e.vms[] | select(.state == "moved") |
		"\(.vm) to \(.destination): predicted \($of[.vm].predicted_begin_ms) to \($of[.vm].predicted_end_ms) ms, was \(.begin_ms) to \(.end_ms) ms"'
	off=$(jq -n --argjson p "$2" --argjson e "$3" '($e.total_ms - $p.predicted_ms) * 100 / $p.predicted_ms | round')
	echo "figure: $1: predicted $(jq .predicted_ms <<<"$2") ms, took $(jq .total_ms <<<"$3") ms ($off %)"
}
moved_all() { # END NUMBER
	jq -e --argjson n "$2" '.event == "end" and .result == "moved" and .exit == 0 and ([.vms[] | select(.state == "moved")] | length) == $n and ([.vms[].attempts] | add) <= $n' \
		<<<"$1" >/dev/null || fail "$1"
}

work=$(mktemp -d)
export LAB_DIR=$work/lab
trap linux_cleanup EXIT
trap 'exit 1' INT TERM HUP
printf '[limits]\nretry-for = 0\nmirror-grace-ms = 5000\nsilence-ms = 15000\n' >"$work/limits.ini"
step "three hosts start"
lab up --hosts 3 --mem 2048 --disk 4G --ini "$work/limits.ini" --owner $$
lab status
on host1 mkdir -p /var/lib/guest
if [[ $LINUX ]]; then
	"$repo/tests/linux-guest/build" "$work/guest" 2
	for file in vmlinuz initrd root.qcow2 data.raw; do lab push host1 "$work/guest/$file" /var/lib/guest/$file; done
fi
[[ -z $NATIVE ]] || lab push host1 "$repo/build/guest/native.elf" /var/lib/guest/native.elf
for vm in $LINUX; do step "$vm starts"; linux_vm "$vm"; done
for vm in $NATIVE; do step "$vm starts"; native_vm "$vm"; done
on host1 rm -rf /var/lib/guest
once host1

step "what a plan goes by: one of each kind moves to host2 and back"
for vm in ${LINUX%% *} ${NATIVE%% *}; do
	snm host1 "$vm" host2 --with-storage --json >"$work/move.json" || fail "move: exit $?: $(tail -n 1 "$work/move.json")"
	jq -r '"\(.vm): \(.total_ms) ms, storage \(.storage_ms), memory \(.memory_ms), downtime \(.downtime_ms)"' <<<"$(tail -n 1 "$work/move.json")"
	snm host2 "$vm" host1 --with-storage --json >"$work/move.json" || fail "move: exit $?: $(tail -n 1 "$work/move.json")"
	calm host1
done
once host1

step "the dry run"
plan=$(snm host1 evacuate host1 --with-storage --parallel 2 --dry-run --json) || fail "dry run: exit $?: $plan"
jq -e --argjson n ${#vms[@]} '([.vms[] | select(.state == "waiting")] | length) == $n and ([.vms[].destination] | unique) == ["host2", "host3"]' <<<"$plan" >/dev/null || fail "$plan"

leave
step "host1 is emptied; the command is killed, then the daemon"
start_plan host1 evacuate host1 --parallel 2
wait_plan host1 '[.vms[] | select(.state == "moving" and .phase != "")] | length == 2'
# shellcheck disable=SC2016
on host1 sh -c 'kill -KILL $(busybox pidof snmigrate)'
wait $planner 2>/dev/null || true
wait_plan host1 '[.vms[] | select(.state == "moved")] | length >= 1'
on host1 lab-daemon kill
sleep 1
on host1 lab-daemon start
snm host1 evacuate --follow --json >"$work/plan.json" || fail "follow: exit $?: $(tail -n 1 "$work/plan.json")"
end=$(tail -n 1 "$work/plan.json")
moved_all "$end" ${#vms[@]}
lab log host1 | grep -q "evacuation of ${#vms[@]} VMs is taken up again" || fail "it was not taken up"
figures "evacuation of ${#vms[@]} VMs, killed twice" "$plan" "$end"
evacuation_off=$off
calm host2 host3
once host2 host3
empty host1
journals

leave
step "all come back"
snm host1 maintenance off
for h in host2 host3; do
	start_plan $h return host1 --parallel 2
	wait $planner || fail "return from $h: exit $?: $(tail -n 1 "$work/plan.json") $(<"$work/plan.err")"
	end=$(tail -n 1 "$work/plan.json")
	moved_all "$end" "$(jq '.vms | length' <<<"$end")"
	figures "return from $h" "$(head -n 1 "$work/plan.json")" "$end"
done
for h in host2 host3; do empty $h; done
calm host1
once host1
journals

step "the guests end and are judged"
for vm in $NATIVE; do
	on host1 sh -c "(sleep 1; echo q; sleep 1) | busybox timeout 10 socat - UNIX-CONNECT:/var/lib/snmigrate/vms/$vm/console.sock" >/dev/null 2>&1 || true
	ended() { console host1 "$1" | grep -q '^done'; }
	wait_for 120 "end of $vm" ended "$vm"
	console host1 "$vm" | grep '^done' | grep -q 'ok=1 bad=0' || fail "$vm: $(console host1 "$vm" | tail -n 5)"
	echo "$vm: $(console host1 "$vm" | grep '^done')"
done
for vm in $LINUX; do
	on host1 snvm stop "$vm" --timeout 120
	for image in root.qcow2 data.raw; do lab pull host1 "/var/lib/snmigrate/vms/$vm/$image" "$work/$image" </dev/null; done
	"$repo/tests/linux-guest/verify" "$work/guest" "$work/root.qcow2" "$work/data.raw" "$work/$vm.records" || fail "$vm lost something"
	"$work/guest/collector" summary "$work/$vm.records" | jq -se 'all(.connections == 1 and .out_of_order == 0)' >/dev/null || fail "$vm: the recorders' connections did not hold"
	"$work/guest/collector" summary "$work/$vm.counter" | jq -se 'all(.connections == 1 and .out_of_order == 0)' >/dev/null || fail "$vm: the counter's connection did not hold"
	echo "$vm: $("$work/guest/collector" summary "$work/$vm.records" | jq -sc 'map({(.stream): .count}) | add'), longest gap of its connection $("$work/guest/collector" summary "$work/$vm.counter" | jq -c '.longest_gap_ms // .')"
done
((evacuation_off <= WITHIN && evacuation_off >= -WITHIN)) || fail "the evacuation took $evacuation_off % more than planned"
echo "figure: ${#vms[@]} VMs on three emulated hosts, there and back: $SECONDS s"
step passed
