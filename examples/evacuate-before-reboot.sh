#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Moves every VM of this host away and then reboots it, unless something would be lost by that.
#
#   evacuate-before-reboot.sh [HOST,HOST...]     to these hosts; without, to all that the configuration has
#
#   HOST      this host's name in its configuration (default: the machine's)
#   DEADLINE  begin no move after that time (default 30m)
#   PARALLEL  moves at once (default 2)
#   REBOOT    what is run in the end (default: systemctl reboot)
#
# Exit status: that of the evacuation when it did not come to the reboot, 3 if another one is under way.
set -eu
host=${HOST:-$(uname -n)}
deadline=${DEADLINE:-30m}
parallel=${PARALLEL:-2}
reboot=${REBOOT:-systemctl reboot}
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# The last line of --json says how it ended, whatever the exit; it needs nothing but jq to be read.
status=0
snmigrate evacuate "$host" ${1:+--to "$1"} --with-storage --parallel "$parallel" --deadline "$deadline" --json >"$log" || status=$?
end=$(tail -n 1 "$log")
echo "evacuation of $host: $(printf '%s' "$end" | jq -r '"\(.result): \(.reason)"')"
printf '%s' "$end" | jq -r '.vms[]? | select(.state != "moved") | "  \(.vm): \(.state): \(.reason)"'

# 0: nothing that runs is left here. 7: neither, but some files could not be deleted, which a reboot does not change.
case $status in
0 | 7) ;;
*)
	echo "not rebooting: $host is not empty; it stays in maintenance (snmigrate maintenance off)" >&2
	exit "$status"
	;;
esac
# Afterwards, on this host: snmigrate maintenance off; on the others: snmigrate return HOST --with-storage
exec $reboot
