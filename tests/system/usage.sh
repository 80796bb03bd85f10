#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What the commands say of themselves and what they do with wrong words: help on stdout and status 0, one sentence on stderr
# and status 2, the option named; help, README and docs/operating.md speak of the same options. No daemon is needed.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
BIN=${B:-$ROOT/build}/bin
T=$(mktemp -d "${TMPDIR:-/tmp}/snm-usage.XXXXXX")
trap 'rm -rf "$T"' EXIT
trap 'exit 130' INT TERM
checks=0
unset SNMIGRATE_CONTROL
fail() { echo "FAIL: $*"; exit 1; }
run() { rc=0; "$@" >"$T/out" 2>"$T/err" </dev/null || rc=$?; checks=$((checks + 1)); }
# wrong TEXT PROGRAM ARGUMENT...: status 2, one line on stderr that begins with the program's name and has TEXT, nothing on stdout
wrong() {
	local text=$1
	shift
	run "$BIN/$1" "${@:2}"
	[ $rc = 2 ] || fail "$*: exit $rc, not 2: $(cat "$T/err")"
	[ "$(wc -l <"$T/err")" = 1 ] || fail "$*: not one line on stderr: $(cat "$T/err")"
	grep -q "^$1: " "$T/err" || fail "$*: the program does not name itself: $(cat "$T/err")"
	grep -qF -- "$text" "$T/err" || fail "$*: '$text' is not in: $(cat "$T/err")"
	[ ! -s "$T/out" ] || fail "$*: something on stdout: $(cat "$T/out")"
}

version=$(cat "$ROOT/VERSION")
for program in snmigrate snvm snmigrated snvmm snnbd; do
	run "$BIN/$program" --help
	[ $rc = 0 ] && grep -qi "^usage: $program " "$T/out" && [ ! -s "$T/err" ] || fail "$program --help: exit $rc: $(cat "$T/err")"
	[ "$(wc -L <"$T/out")" -le 125 ] || fail "$program --help has a line of $(wc -L <"$T/out") characters"
	cp "$T/out" "$T/$program.help"
	run "$BIN/$program" --version
	[ $rc = 0 ] && [ "$(cat "$T/out")" = "$program $version" ] || fail "$program --version: $rc: $(cat "$T/out")"
	run "$BIN/$program"
	[ $rc = 2 ] && [ ! -s "$T/out" ] && grep -qi "usage: $program " "$T/err" || fail "$program without a word: exit $rc"
	run "$BIN/$program" --nonsense
	[ $rc = 2 ] && grep -q -- "--nonsense" "$T/err" || fail "$program --nonsense: exit $rc: $(cat "$T/err")"
done
for words in "snmigrate help" "snmigrate -h" "snmigrate move --help" "snmigrate vm1 host2 --help" "snmigrate cancel --help" "snmigrate history --help" "snmigrate status -h" "snmigrate pki --help" \
	"snvm help" "snvm -h" "snvm start --help" "snvm create --help" "snvm list -h"; do
	read -ra w <<<"$words"
	run "$BIN/${w[0]}" "${w[@]:1}"
	[ $rc = 0 ] && cmp -s "$T/out" "$T/${w[0]}.help" && [ ! -s "$T/err" ] || fail "$words: exit $rc: $(cat "$T/err")"
done

wrong "unknown or ambiguous option '--nonsense'" snmigrate --nonsense
wrong "unknown or ambiguous option '--nonsense'" snmigrate vm1 host2 --nonsense
wrong "unknown or ambiguous option '--nonsense'" snmigrate --nonsense move vm1 host2
wrong "unknown option '-x'" snmigrate move -x vm1 host2
wrong "option '--max-downtime' needs an argument" snmigrate vm1 host2 --max-downtime
wrong "option '--json=1' takes no argument" snmigrate vm1 host2 --json=1
wrong "--max-downtime 99999999999999999999" snmigrate vm1 host2 --max-downtime 99999999999999999999
for bad in fast 0 -1 100 ''; do wrong "--priority $bad: guest, balanced or finish" snmigrate vm1 host2 --priority "$bad"; done
for bad in go cancell ''; do wrong "--on-exceed $bad: cancel, throttle or postcopy" snmigrate vm1 host2 --on-exceed "$bad"; done
for bad in 0 -1 10001 x ''; do wrong "--max-rounds $bad: not a number" snmigrate vm1 host2 --max-rounds "$bad"; done
for bad in soon 25h -1 ''; do wrong "--max-time $bad: not a time" snmigrate vm1 host2 --max-time "$bad"; done
wrong "--retry-for soon: not a time" snmigrate vm1 host2 --retry-for soon
wrong "--keep-partial 9999d: not a time" snmigrate vm1 host2 --keep-partial 9999d
wrong "option '--retry-for' needs an argument" snmigrate vm1 host2 --retry-for
wrong "partial takes" snmigrate partial
wrong "partial takes" snmigrate partial delete
wrong "partial takes" snmigrate partial list vm1
for bad in lz4 zstd: zstd:0 zstd:20 zstd:x auto:1 ''; do wrong "--compress $bad" snmigrate vm1 host2 --compress "$bad"; done
for bad in later yes ''; do wrong "--postcopy $bad: auto, now or never" snmigrate vm1 host2 --postcopy "$bad"; done
for bad in 0 17 -1 x ''; do wrong "--streams $bad" snmigrate vm1 host2 --streams "$bad"; done
wrong "a move takes a VM and a host" snmigrate move vm1
wrong "a move takes a VM and a host" snmigrate vm1 host2 host3
wrong "a move takes a VM and a host" snmigrate --with-storage
wrong "at most 63 characters" snmigrate "$(printf 'x%.0s' {1..64})" host2
wrong "watch takes one VM" snmigrate watch a b
wrong "watch takes one VM" snmigrate watch "$(printf 'x%.0s' {1..64})"
wrong "--receipt: $T/no/such/folder" snmigrate vm1 host2 --receipt "$T/no/such/folder"
wrong "option '--receipt' needs an argument" snmigrate vm1 host2 --receipt
wrong "--receipt is of the move of one VM" snmigrate watch --receipt "$T/receipt"
wrong "cancel takes one VM" snmigrate cancel a b
wrong "dirty-rate takes one VM" snmigrate dirty-rate
wrong "dirty-rate takes one VM" snmigrate dirty-rate a b
for bad in 0 -1 61 x ''; do wrong "--seconds $bad: not a number from 1 to 60" snmigrate dirty-rate vm1 --seconds "$bad"; done
wrong "resolve takes" snmigrate resolve
wrong "resolve takes" snmigrate resolve vm1 --give-up --run-here
wrong "status takes no VM" snmigrate status vm1
wrong "a move takes a VM and a host" snmigrate rehearse vm1
wrong "--streams 0" snmigrate rehearse vm1 host2 --streams 0
wrong "check takes a VM and a host" snmigrate check vm1
wrong "check takes a VM and a host" snmigrate check vm1 host2 host3
wrong "--max-downtime soon" snmigrate check vm1 host2 --max-downtime soon
wrong "unknown or ambiguous option '--nonsense'" snmigrate check vm1 host2 --nonsense
wrong "history takes one VM" snmigrate history a b
for bad in soon 3x 2026-13-01 2026-01-31x -1 ''; do wrong "--since $bad: not a time" snmigrate history --since "$bad"; done
for bad in 0 -1 10001 x ''; do wrong "--limit $bad: not a number" snmigrate history --limit "$bad"; done
wrong "unknown or ambiguous option '--nonsense'" snmigrate status --nonsense
for sub in move watch resolve check baseline history pair unpair pki; do wrong "--on does not go with $sub" snmigrate --on host2 $sub; done
wrong "option '--on' needs an argument" snvm --on
wrong "--on does not go with move" snmigrate --on host2 vm1 host2
wrong "pair takes nothing" snmigrate pair host1
wrong "pair takes nothing" snmigrate pair host1 CODE more
wrong "pair takes nothing" snmigrate pair host1 CODE --valid 1m
for bad in 0 2h soon ''; do wrong "--valid $bad: not a time from 1s to 1h" snmigrate pair --valid "$bad"; done
wrong "peers takes" snmigrate peers host1
wrong "peers takes" snmigrate peers --json set host1 +send
wrong "peers set takes a HOST" snmigrate peers set host1
for bad in send +all -x =send address=; do wrong "peers set: '$bad' is not" snmigrate peers set host1 "$bad"; done
wrong "unpair takes one host" snmigrate unpair
wrong "unpair takes one host" snmigrate unpair host1 host2
wrong "unknown or ambiguous option '--nonsense'" snmigrate unpair host1 --nonsense
wrong "evacuate takes one host" snmigrate evacuate
wrong "evacuate takes one host" snmigrate evacuate host1 host2
wrong "evacuate takes one host" snmigrate evacuate "$(printf 'x%.0s' {1..64})"
wrong "return takes one host" snmigrate return
wrong "return does not take --to" snmigrate return host1 --to=host2
wrong "return does not take --cancel" snmigrate return --cancel
for bad in , a,,b ''; do wrong "--to" snmigrate evacuate host1 --to "$bad"; done
for bad in 0 65 -1 x ''; do wrong "--parallel $bad: not a number" snmigrate evacuate host1 --parallel "$bad"; done
for bad in 0 soon 31d ''; do wrong "--deadline $bad: not a time" snmigrate evacuate host1 --deadline "$bad"; done
wrong "--order smallest: priority, size or fastest" snmigrate evacuate host1 --order smallest
wrong "--backing copy: flatten, chain or reuse" snmigrate evacuate host1 --backing copy
wrong "evacuate --status stands by itself" snmigrate evacuate --status host1
wrong "evacuate --cancel stands by itself" snmigrate evacuate --cancel --with-storage
wrong "does not take --follow beside" snmigrate evacuate --status --follow
wrong "maintenance takes on or off" snmigrate maintenance
wrong "maintenance takes on or off" snmigrate maintenance maybe
wrong "maintenance takes on or off" snmigrate maintenance on off
wrong "pki takes" snmigrate pki
wrong "pki" snmigrate pki init
wrong "pki" snmigrate pki issue DIR host1
wrong "option '--days' needs an argument" snmigrate pki init DIR --days
wrong "--days" snmigrate pki init "$T/pki" --days soon
[ ! -e "$T/pki" ] || fail "a wrong --days made a CA"
wrong "unknown subcommand 'begin'" snvm begin vm1
wrong "unknown or ambiguous option '--nonsense'" snvm --nonsense list
wrong "unknown or ambiguous option '--nonsense'" snvm start vm1 --nonsense
wrong "option '--import' needs an argument" snvm create vm.ini --import
wrong "expected DISK=PATH" snvm create vm.ini --import root
wrong "create takes one definition" snvm create
wrong "create takes one definition" snvm create a.ini b.ini
for sub in start stop pause resume info console delete; do
	wrong "$sub takes exactly one VM" snvm $sub
	wrong "$sub takes exactly one VM" snvm $sub a b
done
wrong "list takes no" snvm list vm1
for bad in "" "vm1" "vm1 cpu" "vm1 =host" "vm1 cpu=host more"; do
	read -ra w <<<"$bad"
	wrong "set takes a VM and KEY=VALUE" snvm set "${w[@]}"
done
wrong "baseline takes hosts" snmigrate baseline
wrong "unknown or ambiguous option '--nonsense'" snmigrate baseline --nonsense
wrong "--timeout" snvm stop vm1 --timeout -1

# Every option in a help text is one that the program knows...
for words in "snmigrate move" "snvm create" "snvm start" "snvm stop" "snvm list" "snvm info"; do
	read -ra w <<<"$words"
	if [ "${w[0]}" = snmigrate ]; then options=$(sed -n '/snmigrate VM HOST/,/snmigrate watch/p' "$T/snmigrate.help" | grep -o '^ *--[a-z-]*' | xargs); else
		options=$(grep "^  ${w[1]} " "$T/snvm.help" | grep -o -- '--[a-z-]*' | xargs); fi
	[ -n "$options" ] || fail "$words: no option in its help"
	for o in $options; do
		run "$BIN/${w[0]}" "${w[1]}" "$o"
		if grep -q "unknown" "$T/err"; then fail "$words $o is in the help, but not known: $(cat "$T/err")"; fi
	done
done
# ...and every option that the documents write beside a command is in its help.
for doc in README.md docs/operating.md; do
	[ -f "$ROOT/$doc" ] || continue
	for program in snmigrate snvm snmigrated snnbd; do
		for o in $(grep -oE "(^|[ \`/])$program [^\`|]*" "$ROOT/$doc" | grep -oE -- '--[a-z][a-z-]+' | sort -u); do
			grep -q -- "$o" "$T/$program.help" || fail "$doc speaks of $program $o, which its help does not know"
			checks=$((checks + 1))
		done
	done
done
# ...and every option of a help text is in the program's man page, and the other way round.
for page in "$ROOT"/docs/man/*.[18].scd; do
	program=$(basename "$page" | sed 's/\..*//')
	for o in $(grep -oE -- '--[a-z][a-z-]+' "$T/$program.help" | sort -u); do
		case $o in --help | --version) continue ;; esac
		grep -q -- "\*$o\*" "$page" || fail "$program $o is not in $(basename "$page")"
		checks=$((checks + 1))
	done
	for o in $(grep -oE -- '\*--[a-z][a-z-]+\*' "$page" | tr -d '*' | sort -u); do
		grep -q -- "$o" "$T/$program.help" || fail "$(basename "$page") speaks of $o, which $program does not know"
	done
done
# The exit statuses of docs/operating.md are those of the help.
for n in 0 2 3 4 5 6 7 8; do
	text=$(sed -nE "s/^\| $n \| ([a-z ]*).*/\1/p" "$ROOT/docs/operating.md" | head -n 1)
	[ -n "$text" ] || fail "docs/operating.md does not list exit status $n"
	tr '\n' ' ' <"$T/snmigrate.help" | grep -q "$n $(cut -d' ' -f1-2 <<<"$text" | sed 's/ $//')" || fail "exit status $n: '$text' is not what the help says"
done
# Where a daemon is needed, the sentence says how to name one.
run "$BIN/snvm" --control "$T/none.sock" list
[ $rc = 3 ] && [ "$(wc -l <"$T/err")" = 1 ] && grep -q "$T/none.sock" "$T/err" || fail "no daemon: exit $rc: $(cat "$T/err")"
echo "$checks calls"
