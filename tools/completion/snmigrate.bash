# SPDX-License-Identifier: Apache-2.0
# bash completion for snmigrate and snvm: subcommands, options, and the names of VMs and hosts that the daemon knows.
_snmigrate_vms() { snvm list 2>/dev/null | sed '1d;s/ .*//'; }
_snmigrate_hosts() { snmigrate peers 2>/dev/null | sed '1d;s/ .*//'; }
_snmigrate_own_name() { sed -n 's/^[[:space:]]*name[[:space:]]*=[[:space:]]*\([^ ;]*\).*/\1/p' /etc/snmigrate/snmigrated.ini 2>/dev/null | head -n 1; }
_snmigrate_options() { "$1" --help 2>/dev/null | grep -o -e '--[a-z][a-z-]*' | sort -u; }

_snmigrate() {
	local cur=${COMP_WORDS[COMP_CWORD]} words=() w
	for w in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do [[ $w == -* ]] || words+=("$w"); done
	if [[ $cur == -* && ${words[0]-} != peers ]]; then
		mapfile -t COMPREPLY < <(compgen -W "$(_snmigrate_options snmigrate)" -- "$cur")
		return
	fi
	[[ ${words[0]-} == move || ${words[0]-} == check || ${words[0]-} == rehearse ]] && words=("${words[@]:1}") && set -- move
	case ${#words[@]}:${words[0]-} in
	0:*) mapfile -t COMPREPLY < <(compgen -W "$(_snmigrate_vms) $([[ ${1-} == move ]] || echo move check rehearse baseline cancel tune dirty-rate watch resolve evacuate return maintenance partial status history pair peers unpair pki)" -- "$cur") ;;
	1:unpair | 2:peers) mapfile -t COMPREPLY < <(compgen -W "$(_snmigrate_hosts)" -- "$cur") ;;
	1:peers) mapfile -t COMPREPLY < <(compgen -W "set" -- "$cur") ;;
	*:peers) mapfile -t COMPREPLY < <(compgen -W "+send -send +receive -receive +administer -administer address=" -- "$cur") ;;
	*:pair) COMPREPLY=() ;;
	1:pki) mapfile -t COMPREPLY < <(compgen -W "init issue" -- "$cur") ;;
	*:pki) mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
	1:partial) mapfile -t COMPREPLY < <(compgen -W "list delete" -- "$cur") ;;
	*:baseline) mapfile -t COMPREPLY < <(compgen -W "$(_snmigrate_hosts)" -- "$cur") ;;
	1:maintenance) mapfile -t COMPREPLY < <(compgen -W "on off" -- "$cur") ;;
	1:evacuate) mapfile -t COMPREPLY < <(compgen -W "$(_snmigrate_own_name)" -- "$cur") ;;
	*:partial | *:status | *:maintenance | *:evacuate) ;;
	1:cancel | 1:tune | 1:dirty-rate | 1:watch | 1:resolve | 1:history) mapfile -t COMPREPLY < <(compgen -W "$(_snmigrate_vms)" -- "$cur") ;;
	1:*) mapfile -t COMPREPLY < <(compgen -W "$(_snmigrate_hosts)" -- "$cur") ;;
	esac
}
_snvm() {
	local cur=${COMP_WORDS[COMP_CWORD]} words=() w
	for w in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do [[ $w == -* ]] || words+=("$w"); done
	if [[ $cur == -* ]]; then
		mapfile -t COMPREPLY < <(compgen -W "$(_snmigrate_options snvm)" -- "$cur")
		return
	fi
	case ${#words[@]}:${words[0]-} in
	0:*) mapfile -t COMPREPLY < <(compgen -W "create start stop pause resume list info console balloon set delete" -- "$cur") ;;
	*:create) mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
	1:list) ;;
	2:set) mapfile -t COMPREPLY < <(compgen -W "cpu=host cpu=x86-64-v2 cpu=x86-64-v3 cpu=baseline: balloon=yes balloon=no" -- "$cur") ;;
	2:balloon) COMPREPLY=() ;;
	1:*) mapfile -t COMPREPLY < <(compgen -W "$(_snmigrate_vms)" -- "$cur") ;;
	esac
}
complete -F _snmigrate snmigrate
complete -F _snvm snvm
