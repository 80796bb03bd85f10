# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# Kernel and disk images of the lab, kept in a cache directory that may be deleted at any time.
# Sourced by tools/lab and tests/linux-guest/build. Every function prints the path of what it made on stdout.
#
# The kernel and its modules come from Debian's linux-image-cloud-amd64, downloaded and unpacked, never installed.
# The userland is made of this machine's own programs with the libraries that ldd names.

LAB_CACHE=${LAB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/snmigrate-lab}

images_fail() {
	echo "lab: $*" >&2
	return 1
}

# Runs a function under the cache's lock, so that labs starting at the same time build each image once.
with_cache_lock() {
	mkdir -p "$LAB_CACHE"
	(
		flock 9
		"$@" 9>&-
	) 9>"$LAB_CACHE/lock"
}

# The kernel's directory: vmlinuz, config, lib/modules/VERSION with modules.dep, and a file `version`.
fetch_kernel() { with_cache_lock fetch_kernel_locked; }

fetch_kernel_locked() {
	local dir=$LAB_CACHE/kernel
	if [[ -e $dir/version ]]; then
		echo "$dir"
		return 0
	fi
	command -v apt-get >/dev/null || images_fail "the kernel package needs apt-get" || return 1
	command -v busybox >/dev/null || images_fail "busybox is missing: run tools/setup" || return 1
	local work package version
	work=$(mktemp -d "$LAB_CACHE/fetch.XXXXXX")
	package=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | awk '$1 == "Depends:" && $2 ~ /^linux-image/ {print $2}')
	if [[ -z $package ]]; then
		rm -rf "$work"
		images_fail "apt knows no linux-image-cloud-amd64: run apt-get update"
		return 1
	fi
	echo "lab: downloading $package" >&2
	# A directory of root's is closed to apt's sandbox user; apt says so at length and goes on as root.
	if ! (cd "$work" && apt-get -qq download "$package" 2>apt.log); then
		cat "$work/apt.log" >&2
		rm -rf "$work"
		images_fail "cannot download $package (apt-get update?)"
		return 1
	fi
	dpkg -x "$work"/*.deb "$work/x"
	version=$(basename "$work"/x/lib/modules/*)
	mkdir "$work/kernel"
	mv "$work/x/boot/vmlinuz-$version" "$work/kernel/vmlinuz"
	mv "$work/x/boot/config-$version" "$work/kernel/config"
	mkdir -p "$work/kernel/lib/modules"
	mv "$work/x/lib/modules/$version" "$work/kernel/lib/modules/"
	busybox depmod -b "$work/kernel" "$version"
	echo "$version" >"$work/kernel/version"
	mv "$work/kernel" "$dir"
	rm -rf "$work"
	echo "$dir"
}

# module_files KERNEL NAME...: the modules' files and all they depend on, in the order to insert them.
module_files() {
	local kernel=$1 version
	version=$(<"$kernel/version")
	shift
	printf '%s\n' "$@" | awk -v dep="$kernel/lib/modules/$version/modules.dep" -v base="$kernel/lib/modules/$version" '
		function visit(file,    list, n, i) {
			if (file in seen) return
			seen[file] = 1
			n = split(needs[file], list, " ")
			for (i = 1; i <= n; i++) visit(list[i])
			print base "/" file
		}
		BEGIN {
			while ((getline line < dep) > 0) {
				colon = index(line, ":")
				file = substr(line, 1, colon - 1)
				needs[file] = substr(line, colon + 2)
				name = file; sub(/.*\//, "", name); sub(/\.ko$/, "", name); gsub(/_/, "-", name)
				path[name] = file
			}
		}
		{ name = $0; gsub(/_/, "-", name)
		  if (name in path) visit(path[name])
		  else { print "lab: the kernel has no module " $0 > "/dev/stderr"; bad = 1 } }
		END { exit bad }'
}

# make_skeleton DIR: the folders of a root file system, merged as Debian's are.
make_skeleton() {
	mkdir -p "$1"/{usr/bin,usr/lib,usr/lib64,etc,proc,sys,dev,run,tmp,var/lib,root,mnt}
	ln -s usr/bin "$1/bin"
	ln -s usr/bin "$1/sbin"
	ln -s bin "$1/usr/sbin"
	ln -s usr/lib "$1/lib"
	ln -s usr/lib64 "$1/lib64"
}

# install_busybox ROOT: the static busybox and a link for each of its applets.
install_busybox() {
	local applet
	cp -L "$(command -v busybox)" "$1/usr/bin/busybox"
	for applet in $(busybox --list); do
		[[ $applet == busybox ]] || ln -sf busybox "$1/usr/bin/$applet"
	done
}

# install_programs ROOT FILE...: programs into ROOT/usr/bin, with the libraries that they load.
install_programs() {
	local root=$1 file
	shift
	for file in "$@"; do
		rm -f "$root/usr/bin/${file##*/}"
		cp -L "$file" "$root/usr/bin/"
	done
	# ldd fails on a static program, which needs nothing
	for file in "$@"; do ldd "$file" 2>/dev/null || true; done |
		awk '$2 == "=>" && $3 ~ /^\// {print $3} $1 ~ /^\/.*ld-linux/ {print $1}' | sort -u |
		while read -r file; do
			mkdir -p "$root${file%/*}"
			[[ -e $root$file ]] || cp -L "$file" "$root$file"
		done
}

# Deletes images of older builds that no lab can still be using.
prune_cache() { find "$LAB_CACHE" -maxdepth 1 -type f -name 'host-*' -atime +2 -mtime +2 -delete; }

# make_image ROOT FILE: a read-only ext4 image of a folder.
make_image() {
	local kib
	kib=$(du -s --apparent-size -k "$1" | cut -f1)
	rm -f "$2"
	mke2fs -q -t ext4 -O ^has_journal,^resize_inode -E root_owner=0:0 -m 0 -N $(($(find "$1" | wc -l) + 1000)) \
		-d "$1" "$2" "$((kib + kib / 4 + 16384))K" >/dev/null
}

# The host's initrd: busybox and the modules that lead to its disks.
host_initrd() { with_cache_lock host_initrd_locked "$1"; }

host_initrd_locked() {
	local kernel=$1 here=${BASH_SOURCE[0]%/*} out file n=100 work
	out=$LAB_CACHE/host-initrd-$(cat "$here/host-initrd-init" "${BASH_SOURCE[0]}" "$kernel/version" | sha256sum | cut -c1-16)
	if [[ ! -e $out ]]; then
		work=$(mktemp -d "$LAB_CACHE/initrd.XXXXXX")
		mkdir -p "$work"/{bin,modules,proc,sys,dev,root}
		cp -L "$(command -v busybox)" "$work/bin/busybox"
		for file in $(module_files "$kernel" virtio_pci virtio_blk overlay); do
			cp "$file" "$work/modules/$((n++))-${file##*/}"
		done
		install -m 0755 "$here/host-initrd-init" "$work/init"
		(cd "$work" && find . | cpio --quiet -o -H newc -R 0:0) >"$out.tmp"
		rm -rf "$work"
		mv "$out.tmp" "$out"
	fi
	echo "$out"
}

HOST_PROGRAMS=(dash bash qemu-nbd qemu-img qemu-io ip bridge tc ss socat openssl jq strace e2fsck mke2fs debugfs dumpe2fs chattr
	nbdinfo nbdcopy fio dd cp mv tar stat nft tcpdump ethtool gdb lsof losetup unshare nsenter setpriv sqlite3)

# The host's root file system but for this project's own programs.
host_base_image() { with_cache_lock host_base_image_locked "$1" "$2"; }

host_base_image_locked() {
	local kernel=$1 labctl=$2 here=${BASH_SOURCE[0]%/*} out program work programs=() path
	for program in "${HOST_PROGRAMS[@]}"; do
		if path=$(PATH=$PATH:/usr/sbin:/sbin type -P "$program"); then programs+=("$path"); fi
	done
	out=$LAB_CACHE/host-base-$({
		cat "$here/host-init" "$here/host-daemon" "${BASH_SOURCE[0]}" "$kernel/version" "$labctl"
		stat -L -c '%n %s %Y' "${programs[@]}"
	} | sha256sum | cut -c1-16).img
	if [[ ! -e $out ]]; then
		echo "lab: building the hosts' root image" >&2
		prune_cache
		work=$(mktemp -d "$LAB_CACHE/base.XXXXXX")
		make_skeleton "$work"
		install_busybox "$work"
		install_programs "$work" "${programs[@]}" "$labctl"
		# not busybox's own shell, which prefers its applets to the programs of the same name
		ln -sf dash "$work/usr/bin/sh"
		cp -r "$kernel/lib/modules" "$work/usr/lib/modules"
		install -m 0755 "$here/host-init" "$work/usr/bin/lab-init"
		install -m 0755 "$here/host-daemon" "$work/usr/bin/lab-daemon"
		printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n' >"$work/etc/passwd"
		printf 'root:x:0:\nkvm:x:106:\nnogroup:x:65534:\n' >"$work/etc/group"
		printf '127.0.0.1 localhost\n10.77.0.1 host1\n10.77.0.2 host2\n10.77.0.254 net\n' >"$work/etc/hosts"
		ln -s /proc/mounts "$work/etc/mtab"
		cat >"$work/etc/inittab" <<-'INITTAB'
			::sysinit:/sbin/lab-init
			::respawn:/usr/bin/labctl agent 22
			ttyS0::respawn:-/bin/sh
			::ctrlaltdel:/bin/busybox reboot
		INITTAB
		make_image "$work" "$out.tmp"
		rm -rf "$work"
		mv "$out.tmp" "$out"
	fi
	echo "$out"
}

# QEMU itself for the hosts (lab up --with-qemu).
host_qemu_image() { with_cache_lock host_qemu_image_locked; }

host_qemu_image_locked() {
	local qemu out work file
	qemu=$(command -v qemu-system-x86_64)
	out=$LAB_CACHE/host-qemu-$({
		cat "${BASH_SOURCE[0]}"
		stat -L -c '%n %s %Y' "$qemu"
	} | sha256sum | cut -c1-16).img
	if [[ ! -e $out ]]; then
		echo "lab: building the image with QEMU" >&2
		work=$(mktemp -d "$LAB_CACHE/qemu.XXXXXX")
		make_skeleton "$work"
		install_programs "$work" "$qemu"
		mkdir -p "$work/usr/share/qemu"
		for file in /usr/share/qemu/{kvmvapic,linuxboot,linuxboot_dma,pvh}.bin /usr/share/seabios/bios{,-256k}.bin; do
			[[ -e $file ]] && cp -L "$file" "$work/usr/share/qemu/"
		done
		make_image "$work" "$out.tmp"
		rm -rf "$work"
		mv "$out.tmp" "$out"
	fi
	echo "$out"
}

# host_project_image OUT BIN-DIR: this build's programs; made anew by every lab, since they change all the time.
host_project_image() {
	local out=$1 bin=$2 work programs=()
	work=$(mktemp -d "${out%/*}/proj.XXXXXX")
	make_skeleton "$work"
	if compgen -G "$bin/*" >/dev/null; then
		mapfile -t programs < <(find "$bin" -maxdepth 1 -type f -perm -u+x)
		((${#programs[@]} == 0)) || install_programs "$work" "${programs[@]}"
	fi
	make_image "$work" "$out"
	rm -rf "$work"
}
