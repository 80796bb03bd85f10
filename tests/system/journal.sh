#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The journal: both sides of a move that went well, was refused, was cancelled; a daemon of either side killed at every named point of
# a move, after which exactly one copy runs and both journals say so; and databases that are corrupt, or cannot be written, which
# hold no move up.
#   POINTS, SIDES: subsets
source "$(dirname "$0")/lib.sh"
source "$(dirname "$0")/refuse_lib.sh"
require_kvm
command -v sqlite3 >/dev/null || skip "needs sqlite3"
ALL="before-storage in-copy in-mirror in-verify in-precopy after-ready d-held-running d-owner-recorded d-running-sent moved-recorded"
# the check (SNM_BRIEF=1) has those around the handover, on one side each
[ "${SNM_BRIEF:-}" = 1 ] && ALL="in-mirror d-held-running moved-recorded"
POINTS=${POINTS:-$ALL}
SIDES=${SIDES:-a b}
DISK_MB=16
GUEST_OPTIONS="ws=8 rate=20 touch=8 zero=1 disk=rw diskrate=100 span=8 hb=100"
hosts_up
db() { echo "$T/$1/state/journal.db"; }
sql() { sqlite3 -readonly -separator ' ' "$(db "$1")" ".timeout 2000" "$2" 2>/dev/null || true; }
# said HOST SQL EXPECTED: that the journal comes to say so; within some seconds, as it is nobody's to wait for
said() {
	local i got
	for i in $(seq 150); do
		got=$(sql "$1" "$2")
		[ "$got" = "$3" ] && return 0
		sleep 0.1
	done
	fail "the journal of host$1 says '$got', not '$3': $2; $(sql "$1" "SELECT direction, name, epoch, phase, result, reason FROM move")"
}
story="SELECT direction, name, peer, result, exit FROM move WHERE name ="

# --- what a person does ---
native_vm a vm1 64M "$GUEST_OPTIONS"
wait_touched a vm1
refuse 3 "no host named hostc" snmigrate a vm1 hostc --with-storage
snmigrate a vm1 hostb --with-storage --json >"$T/move.json" || fail "move: exit $?: $(tail -n 1 "$T/move.json")"
said a "$story 'vm1'" "out vm1 hostb moved 0"
said b "$story 'vm1'" "in vm1 hosta moved 0"
for k in downtime_ms memory_bytes disk_bytes rounds attempts; do
	want=$(tail -n 1 "$T/move.json" | jq ".$k")
	said a "SELECT json_extract(details, '\$.$k') = $want FROM move" 1
	said b "SELECT json_extract(details, '\$.$k') = $want FROM move" 1
done
said a "SELECT json_extract(details, '\$.left_behind'), phase FROM move" "[] cleanup"
said b "SELECT json_extract(details, '\$.wire_bytes') > 0 FROM move" 1
said a "SELECT ended_ms - begun_ms BETWEEN 1 AND 60000 AND begun_ms > 1.6e12 FROM move" 1
said b "SELECT ended_ms - begun_ms BETWEEN 1 AND 60000 AND begun_ms > 1.6e12 FROM move" 1

ns b tc qdisc replace dev eth0 root tbf rate 8mbit burst 64kb latency 100ms
snmigrate b vm1 hosta --with-storage --json >"$T/move.json" 2>"$T/move.err" &
mover=$!
for _ in $(seq 200); do grep -q '"phase":"storage"' "$T/move.json" && break; sleep 0.05; done
said b "SELECT direction, phase, result FROM move WHERE ended_ms IS NULL" "out storage "
said a "SELECT direction, peer, phase FROM move WHERE ended_ms IS NULL" "in hostb storage"
[ "$(snmigrate b status --json | jq -c '.moving | map([.vm, .direction, .peer, .phase, (.percent | type)])')" = '[["vm1","out","hosta","storage","number"]]' ] || fail "status: $(snmigrate b status --json)"
[ "$(snmigrate a status --json | jq -c '.moving | map([.vm, .direction, .peer, .phase])')" = '[["vm1","in","hostb","storage"]]' ] || fail "status: $(snmigrate a status --json)"
snmigrate b status | grep -qE '^  vm1 +to +hosta +storage, [0-9]+ %, for ' || fail "status: $(snmigrate b status)"
snmigrate b history vm1 | grep -qE 'vm1 +to +hosta +under way \(storage\)' || fail "history: $(snmigrate b history)"
snmigrate b cancel vm1
rc=0; wait $mover || rc=$?
[ $rc = 5 ] || fail "cancel: exit $rc"
said b "$story 'vm1' AND direction = 'out'" "out vm1 hosta cancelled 5"
said b "SELECT phase, reason FROM move WHERE direction = 'out'" "storage cancelled"
said a "$story 'vm1' AND direction = 'in'" "in vm1 hostb failed 4"
said a "SELECT phase, reason LIKE '%cancelled%' FROM move WHERE direction = 'in'" "storage 1"
ns b tc qdisc del dev eth0 root
[ "$(snmigrate a status --json | jq -c '.moving, (.partials | map([.vm, .peer]))' | xargs)" = "[] [[vm1,hostb]]" ] || fail "status: $(snmigrate a status --json)"
snmigrate b history | grep -qE 'vm1 +to +hosta +cancelled in storage, ' || fail "history: $(snmigrate b history)"
# refused by the other host: it has another VM of that name
native_vm a vm1 64M "$GUEST_OPTIONS"
refuse 3 "another VM named vm1" snmigrate b vm1 hosta --with-storage
said b "SELECT result, exit, phase, reason LIKE '%another VM named vm1%' FROM move ORDER BY id DESC LIMIT 1" "refused 3 connect 1"
history() { snmigrate b history "$@" --json | jq -sc "${QUERY:-map([.direction, .result])}"; }
[ "$(history)" = '[["in","moved"],["out","cancelled"],["out","refused"]]' ] || fail "history: $(history)"
[ "$(history vm1 --limit 1)" = '[["out","refused"]]' ] || fail "history --limit: $(history vm1 --limit 1)"
[ "$(history --since 1h)" = "$(history)" ] && [ "$(history --since 0s)" = '[]' ] && [ "$(history vm2)" = '[]' ] || fail "history --since: $(history --since 1h)"
[ "$(QUERY='map(.details | has("proof"), has("downtime_ms")) | unique' history)" = '[false,true]' ] || fail "history: $(QUERY=. history)"
for h in a b; do snvm $h stop --force vm1; snvm $h delete vm1; done

# --- a daemon killed in the middle ---
cases=0
for point in $POINTS; do
	for side in $SIDES; do
		cases=$((cases + 1)); vm=kill$cases
		daemon_kill a TERM; daemon_kill b TERM
		rm -rf "$T/fault"; mkdir "$T/fault"
		case $point in d-*) at=b ;; *) at=a ;; esac
		for h in a b; do
			if [ $h = $at ]; then daemon_start $h "SNM_FAULT=$point:hold" "SNM_FAULT_DIR=$T/fault"; else daemon_start $h; fi
		done
		native_vm a $vm 64M "$GUEST_OPTIONS seed=$cases"
		wait_hb a $vm >/dev/null
		snmigrate a $vm hostb --with-storage --json >"$T/move.json" 2>"$T/move.err" &
		mover=$!
		for _ in $(seq 400); do [ -e "$T/fault/$point.hit" ] && break; sleep 0.05; done
		[ -e "$T/fault/$point.hit" ] || fail "$point was not reached: $(cat "$T/move.json" "$T/move.err")"
		daemon_kill $side
		touch "$T/fault/$point.go"
		sleep 0.3
		daemon_start $side
		wait $mover || true
		where=
		for _ in $(seq 200); do
			where=$(vm_state a $vm)-$(vm_state b $vm)
			case $where in running-running) fail "TWO RUNNING COPIES of $vm" ;; running-absent | absent-running) break ;; esac
			sleep 0.1
		done
		case $where in
		absent-running) out="moved 0" in="moved 0" ;;
		running-absent) out="failed 4" in="failed 4" ;;
		*) fail "$point, daemon of $side killed: $where" ;;
		esac
		said a "$story '$vm'" "out $vm hostb $out"
		said b "$story '$vm' AND result = '${in% *}'" "in $vm hosta $in"
		said a "SELECT count(*) FROM move WHERE ended_ms IS NULL" 0
		said b "SELECT count(*) FROM move WHERE ended_ms IS NULL" 0
		said b "SELECT count(*) <= 1 FROM move WHERE name = '$vm' AND result = 'moved'" 1
		echo "$point, daemon of host$side killed: $where; $(sql a "$story '$vm'"); $(sql b "$story '$vm'")"
		h=a; [ "$where" = absent-running ] && h=b
		snvm $h stop --force $vm; snvm $h delete $vm
	done
done

# --- the source's VMM killed: it crashed, and nobody was there to write it down ---
daemon_kill a TERM
rm -rf "$T/fault"; mkdir "$T/fault"
daemon_start a SNM_FAULT=in-mirror:hold "SNM_FAULT_DIR=$T/fault"
native_vm a vmx 64M "$GUEST_OPTIONS"
wait_hb a vmx >/dev/null
snmigrate a vmx hostb --with-storage --json >"$T/move.json" 2>"$T/move.err" &
mover=$!
for _ in $(seq 400); do [ -e "$T/fault/in-mirror.hit" ] && break; sleep 0.05; done
pid=$(snvm a info vmx --json | jq .pid)
daemon_kill a
kill -KILL "$pid"
touch "$T/fault/in-mirror.go"
daemon_start a
wait $mover || true
said a "$story 'vmx'" "out vmx hostb crashed 8"
said b "$story 'vmx'" "in vmx hosta failed 4"
rc=0; snmigrate a status >"$T/out" || rc=$?
[ $rc = 6 ] && grep -q "do: snvm start vmx" "$T/out" || fail "status: exit $rc: $(cat "$T/out")"
snvm a start vmx
snmigrate a status >"$T/out" || fail "status: exit $?: $(cat "$T/out")"
wait_hb a vmx >/dev/null

# --- what the journal lost is taken from what the VMMs wrote ---
daemon_kill a TERM; daemon_kill b TERM
rm -f "$(db a)"* "$(db b)"*
daemon_start a; daemon_start b
said a "SELECT count(*) > 0 FROM move WHERE direction = 'out' AND result = 'moved' AND exit = 0" 1
said b "$story 'vmx'" "in vmx hosta failed 4"
said b "$story 'vm1' AND direction = 'out'" "out vm1 hosta refused 3"
said b "$story 'vm1' AND direction = 'in'" "in vm1 hosta moved 0"

# --- a database that is none, and one that cannot be: moves go on ---
daemon_kill a TERM; daemon_kill b TERM
rm -f "$(db a)"*; head -c 20000 /dev/urandom >"$(db a)" # a sound WAL beside it would repair it
rm -f "$(db b)"*; mkdir "$(db b)"
daemon_start a; daemon_start b
snmigrate a vmx hostb --with-storage --json >"$T/move.json" || fail "move without a journal: exit $?: $(tail -n 1 "$T/move.json")"
grep -q "journal.db is corrupt: moved aside" "$T/a/daemon.log" || fail "nothing is said of the corrupt journal"
[ -s "$(db a).corrupt" ] || fail "the corrupt journal was not kept"
snmigrate b status | grep -q "The journal cannot be read: .*journal.db" || fail "status: $(snmigrate b status)"
refuse 4 "journal.db" snmigrate b history
grep -q "journal.db.*; moves go on without it" "$T/b/daemon.log" || fail "nothing is said of the journal that cannot be opened"
said a "$story 'vmx'" "out vmx hostb moved 0"
rmdir "$(db b)"
said b "$story 'vmx' AND result = 'moved'" "in vmx hosta moved 0"
grep -q "journal.db is written again" "$T/b/daemon.log" || fail "nothing is said of the journal that is there again"
assert_good "$(wait_hb b vmx)"
echo "figure: $cases daemons killed"
