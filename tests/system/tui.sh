#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Alone: a terminal that is watched
# The full-screen view of snmigrate in real terminals (tmux): sizes, resizing, keys, terminals that can little, names that would
# steer a terminal, and that leaving it in whatever way never ends the move. Pages are compared with those kept in screens/, which are
# recordings of such a terminal (SNM_RECORD=1 records them anew); what is a figure is masked on both sides.
source "$(dirname "$0")/lib.sh"
require_kvm
command -v tmux >/dev/null || skip "tmux is not installed (tools/setup)"
DISK_MB=80 FILL_MB=80
checks=0
SCREENS=$ROOT/tests/system/screens
TM=(tmux -L "snm$$" -f /dev/null)
tui_down() {
	local rc=$?
	set +e # or the trap ends here, and everything stays
	"${TM[@]}" kill-server 2>/dev/null
	(exit $rc)
	hosts_down
}
hosts_up
trap tui_down EXIT
export SNMIGRATE_CONTROL=$T/a/control.sock LC_ALL=C.UTF-8 TZ=UTC
native_vm a vm1 128M "ws=8 rate=10 touch=32 zero=1 disk=rw diskrate=50 span=8 record=100 hb=100"
native_vm a vm2 64M "ws=4 rate=4 touch=8 zero=1 disk=rw diskrate=20 span=8 record=100 hb=100"
wait_touched a vm1
wait_touched a vm2

# term COLSxROWS "ENVIRONMENT" ARGUMENT...: snmigrate in a terminal of that size, in place of the former one
term() {
	local size=$1 env=$2
	shift 2
	"${TM[@]}" kill-server 2>/dev/null || true
	sleep 0.2
	"${TM[@]}" new-session -d -x "${size%x*}" -y "${size#*x}" "env $env $BIN/snmigrate $*; echo EXIT \$?; sleep 1000"
}
screen() { "${TM[@]}" capture-pane -p; }
resize() { "${TM[@]}" resize-window -x "${1%x*}" -y "${1#*x}"; }
keys() { "${TM[@]}" send-keys "$@"; }
# Waits until the screen has the words (a basic regular expression).
sees() {
	local i
	for i in $(seq 100); do
		screen | grep -q -- "$1" && { checks=$((checks + 1)); return 0; }
		sleep 0.1
	done
	fail "'$1' does not come on the screen: $(screen)"
}
lacks() {
	! screen | grep -q -- "$1" || fail "'$1' is on the screen: $(screen)"
	checks=$((checks + 1))
}
# The page fills the terminal: the title above, the keys at the very bottom.
whole_page() { # COLSxROWS
	local i page
	for i in $(seq 50); do
		page=$(screen)
		if [ "$(head -n 1 <<<"$page" | grep -c '^vm1')" = 1 ] && [ "$(wc -l <<<"$page")" = "${1#*x}" ] && tail -n 1 <<<"$page" | grep -q '^c cancel'; then
			checks=$((checks + 1))
			return 0
		fi
		sleep 0.1
	done
	fail "not a whole page at $1: $page"
}
# A page without what differs from one second to the next: numbers with their units, how far bars and graphs go, what comes and goes
# with the guest's load and this machine's. Where things are is whole_page's to judge.
masked() {
	sed -E 's/\b[0-9]+([.:][0-9]+)*( ?(B|kB|MB|GB|ms|s|min|h))?\b/N/g; s/N( N)+/N/g; s/[▁▂▃▄▅▆▇█░▏▎▍▌▋▊▉]+( *[▁▂▃▄▅▆▇█░▏▎▍▌▋▊▉]+)*/▒/g
		s/, mirrored N//; s/ \(holds it back\)//; s/ +/ /g; s/ $//; s/^N disk .*session broke.*//' <<<"$1"
}
like_kept() { # COLSxROWS NAME
	local i page kept=$SCREENS/$2_$1.txt
	if [ "${SNM_RECORD:-}" = 1 ]; then mkdir -p "$SCREENS"; screen >"$kept"; fi
	for i in $(seq 100); do
		page=$(screen)
		# the title's clock is at the right edge
		if [ "$(masked "$page")" = "$(masked "$(cat "$kept")")" ] && [ "$(head -n 1 <<<"$page" | wc -m)" = $((${1%x*} + 1)) ]; then
			checks=$((checks + 1))
			return 0
		fi
		sleep 0.1
	done
	fail "not as in $kept: $(diff <(masked "$(cat "$kept")") <(masked "$page")) $page"
}
moving() { [ "$(snvm a info "$1" --json | jq -r .migrating.destination)" = hostb ]; }
goes_on() { moving "$1" || fail "the move of $1 does not go on: $(snvm a info "$1" --json)"; checks=$((checks + 1)); }

# --- a move on a terminal: what it shows, at its size and at others
term 80x24 "" vm1 hostb --with-storage --bandwidth 4M
sees '^vm1  hosta -> hostb  *0:0'
sees 'storage [0-9.]* '
sees '^root .*█.* % .* of 83.9 MB'
sees '^data .* of 83.9 MB'
sees '^send .*MB/s .*[▁▂▃▄▅▆▇█]'
sees 'limit 4.2 MB/s'
sees 'left, ends [0-2][0-9]:[0-5][0-9]:[0-5][0-9]'
whole_page 80x24
like_kept 80x24 move
for size in 40x10 200x50 20x5 132x43 80x24; do
	resize $size
	whole_page $size
	sees ' % '
done
resize 10x2
sleep 0.6
resize 80x24
whole_page 80x24

# --- keys: no is no, a rate is typed in, nonsense is refused
keys c
sees 'Cancel the move of vm1? It stays where it is. y/n'
keys n
sees '^c cancel'
goes_on vm1
keys b
sees 'Bandwidth of vm1'
keys 1 Escape
sees '^c cancel'
keys b 1 2 3 Enter
sees 'bandwidth: at least 1048576 bytes'
keys b 9 BSpace 3 x M Enter
sees 'the bandwidth is limited to 3.1 MB/s from now on'
sees 'limit 3.1 MB/s'
# --- leaving it leaves the move; a watch comes back
keys q
sees 'the move of VM vm1 goes on; "snmigrate watch vm1" follows it'
sees 'EXIT 130'
goes_on vm1
term 200x50 "" watch vm1
sees '^vm1  hosta -> hostb'
sees 'limit 3.1 MB/s'
whole_page 200x50
sees 'left, ends'
like_kept 200x50 watch
keys C-c
sees 'EXIT 130'
goes_on vm1
# a terminal that goes away
term 80x24 "" watch vm1
sees '^vm1  hosta'
"${TM[@]}" kill-server
for _ in $(seq 50); do pgrep -f "$BIN/snmigrate watch vm1" >/dev/null || break; sleep 0.1; done
! pgrep -f "$BIN/snmigrate watch vm1" >/dev/null || fail "a watch outlives its terminal"
goes_on vm1

# --- terminals that can little
term 80x24 "LC_ALL=C TERM=vt100" watch vm1
sees '^root .*###'
! screen | LC_ALL=C grep -q '[^ -~]' || fail "more than ASCII: $(screen)"
keys q; sees 'EXIT 130'
term 80x24 "NO_COLOR=1" watch vm1
sees '^root'
! "${TM[@]}" capture-pane -pe | grep -q $'\x1b\[[0-9;]*3[0-7]m' || fail "colours in spite of NO_COLOR: $("${TM[@]}" capture-pane -pe | cat -v)"
keys q; sees 'EXIT 130'
term 80x24 "" watch vm1
sees '^root'
"${TM[@]}" capture-pane -pe | grep -q $'\x1b\[[0-9;]*3[0-7]m' || fail "no colours: $("${TM[@]}" capture-pane -pe | cat -v)"
keys q; sees 'EXIT 130'
for how in "TERM=dumb" "TERM=" "TERM=nonsense"; do
	term 100x10 "$how" watch vm1
	sees '^vm1 -> hostb  storage .* % .* MB/s.* left'
	lacks '^root'
	keys C-c; sees 'EXIT 130'
done
term 100x10 "" watch vm1 --plain
sees '^vm1 -> hostb  storage .* % .* MB/s.* left'
lacks '^root'
keys C-c; sees 'EXIT 130'
# a pipe gets a line a phase, and no escape sequences
timeout -s INT 3 "$BIN/snmigrate" watch vm1 >"$T/pipe" 2>"$T/pipe.err" || true
grep -qx 'vm1 -> hostb: storage' "$T/pipe" && ! grep -q $'[\x1b\r]' "$T/pipe" || fail "to a pipe: $(cat -v "$T/pipe")"
goes_on vm1

# --- all moves of the host
"$BIN/snmigrate" vm2 hostb --with-storage --bandwidth 4M --json >"$T/vm2.json" 2>"$T/vm2.err" &
mover=$!
for _ in $(seq 100); do moving vm2 && break; sleep 0.1; done
term 80x24 "" watch
sees 'vm1 -> hostb .*storage'
sees 'vm2 -> hostb .*storage'
sees 'up/down another move'
if screen | grep -q '^> vm1'; then second=vm2; else second=vm1; fi
keys Down
sees "^> $second"
sees "^$second  hosta -> hostb"
timeout -s INT 4 "$BIN/snmigrate" watch --json >"$T/all.json" || true
[ "$(jq -r 'select(.event == "progress") | .vm' "$T/all.json" | sort -u | xargs)" = "vm1 vm2" ] || fail "watch --json: $(tail -n 3 "$T/all.json")"
# the selected one is cancelled, by its own keys; the other goes on
[ $second = vm2 ] || keys Up
sees '^> vm2'
keys c
sees 'Cancel the move of vm2?'
keys y
rc=0; wait $mover || rc=$?
[ $rc = 5 ] || fail "vm2 after its cancel: exit $rc: $(cat "$T/vm2.err")"
sees 'vm2 -> hostb .*cancelled'
goes_on vm1
# --- to the end: the last line is on the ordinary screen
if [ $second = vm2 ]; then keys Up; else keys Down; fi
sees '^> vm1'
keys b 0 Enter
sees 'the bandwidth is not limited any more'
for _ in $(seq 300); do screen | grep -q 'EXIT' && break; sleep 0.2; done
sees 'VM vm1 moved to hostb in '
sees 'VM vm2 stays here: cancelled'
sees 'EXIT 5'
assert_good "$(wait_hb b vm1 "$(hb_field "$(wait_hb b vm1)" seq)")"
snmigrate a watch >"$T/none" 2>&1 || fail "a watch of nothing: exit $?"
grep -q "no VM of this host is being moved" "$T/none" || fail "a watch of nothing: $(cat "$T/none")"

# --- one move from beginning to end on the screen
term 80x24 "" vm2 hostb --with-storage --bandwidth 40M
sees '^vm2  hosta -> hostb'
for _ in $(seq 300); do screen | grep -q 'EXIT' && break; sleep 0.2; done
sees 'VM vm2 moved to hostb in .* s; downtime '
sees 'EXIT 0'

# --- a daemon whose names and reasons are hostile: the terminal does what the program says, nothing else
esc='\\u001b]0;owned\\u0007\\u001b[2J\\u009b31m\\r'
cat >"$T/hostile.jsonl" <<LINES
{"ok":true,"uuid":"u","epoch":2,"host":"h${esc}"}
{"event":"phase","phase":"st${esc}","ms":1,"peer":"p${esc}"}
{"event":"progress","phase":"st${esc}","ms":1000,"percent":10,"disks":[{"id":"d${esc}","total_bytes":10,"synced_bytes":5}]}
{"event":"message","ms":1100,"text":"m${esc}"}
LINES
printf '{"event":"end","result":"failed","exit":4,"reason":"r%s","left_behind":["l%s"]}\n' "$esc" "$esc" >"$T/hostile.end"
sed -i 's/\\\\/\\/g' "$T/hostile.jsonl" "$T/hostile.end"
jq -e . "$T/hostile.jsonl" "$T/hostile.end" >/dev/null || fail "the hostile lines are not JSON"
for how in "" --plain --json; do
	rm -f "$T/hostile.sock"
	socat "UNIX-LISTEN:$T/hostile.sock" "SYSTEM:read -r line; cat $T/hostile.jsonl; sleep 3; cat $T/hostile.end; sleep 1" &
	server=$!
	for _ in $(seq 50); do [ -S "$T/hostile.sock" ] && break; sleep 0.1; done
	TERM=xterm timeout 20 script -qec "$BIN/snmigrate --control $T/hostile.sock watch vm1 $how" "$T/raw" >/dev/null </dev/null 2>&1 || true
	wait $server || true
	# the title of the window is not set, nothing is in C1 codes, no bell rings, and the words are there
	if LC_ALL=C grep -qaP '\x1b\][0-9]|\x07|\xc2\x9b|[^\xc2-\xf4\x80-\xbf]\x9b' "$T/raw"; then fail "an escape sequence came through: $(cat -v "$T/raw")"; fi
	grep -qa 'owned' "$T/raw" && grep -qa 'stays here: r?\]0;owned' "$T/raw" || fail "the reason is not shown: $(cat -v "$T/raw")"
	# the one run was on the full screen, the other was not
	[ "$(grep -qaF 'q leave, the move goes on' "$T/raw" && echo screen)" = "$([ -n "$how" ] || echo screen)" ] || fail "'$how': $(cat -v "$T/raw")"
	checks=$((checks + 1))
done
echo "$checks looks"
