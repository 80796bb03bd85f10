# SPDX-License-Identifier: Apache-2.0
"""The native guest (tests/guest) on two hosts, under our programs and under QEMU, and what it says of itself."""
import json
import os
import shutil
import socket
import subprocess
import time

import peers

BUSY_WAIT_S = 0.02
CONSOLE_QUIET_S = 0.02  # shorter than the distance of two heartbeats
KEPT_BYTES = 64 << 10
GUEST_TIMEOUT_S = 60
MOVE_TIMEOUT_S = 900


class Loopback:
    """Both hosts are this machine."""
    addresses = ("127.0.0.1", "127.0.0.1")

    def prefix(self, _host):
        return []

    def close(self):
        pass


class Shaped:
    """A network namespace for each host, and between them a link of `mbit` Mb/s each way (tbf)."""
    addresses = ("10.9.7.1", "10.9.7.2")

    def __init__(self, mbit):
        if os.geteuid() or not shutil.which("tc"):
            raise peers.Missing("a shaped link needs root and tc (apt-get install iproute2)")
        self.names = [f"snmb{os.getpid()}{h}" for h in "ab"]
        try:
            for name in self.names:
                self.run("ip", "netns", "add", name)
            self.run("ip", "link", "add", "eth0", "netns", self.names[0], "type", "veth", "peer", "name", "eth0",
                     "netns", self.names[1])
            for name, address in zip(self.names, self.addresses):
                self.run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
                self.run("ip", "-n", name, "link", "set", "lo", "up")
                self.run("ip", "-n", name, "link", "set", "eth0", "up")
                self.run("tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", f"{mbit}mbit",
                         "burst", "256kb", "latency", "20ms")
        except RuntimeError as e:
            self.close()
            raise peers.Missing(f"a shaped link cannot be made here: {e}") from None

    @staticmethod
    def run(*argv):
        p = subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if p.returncode:
            raise RuntimeError(f"{' '.join(argv)}: {p.stderr.strip()}")

    def prefix(self, host):
        return ["ip", "netns", "exec", self.names[host]]

    def close(self):
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False)


class Serial:
    """What the guest says on its serial line. read() gives the bytes, or as many of the last as are kept."""

    def __init__(self, read):
        self.read = read

    def lines(self):
        # the last line may be half written, and the first half lost
        return [line.rstrip(b"\r").decode(errors="replace") for line in self.read().split(b"\n")[:-1]]

    def wait(self, found, what):
        deadline = time.monotonic() + GUEST_TIMEOUT_S
        while True:
            lines = self.lines()
            bad = [line for line in lines if line.startswith("BAD")]
            if bad:
                raise RuntimeError(f"the guest found something bad: {bad[0]}")
            r = found(lines)
            if r:
                return r
            if time.monotonic() > deadline:
                raise RuntimeError(f"the guest: no {what} within {GUEST_TIMEOUT_S} s")
            time.sleep(BUSY_WAIT_S)

    def touched(self):
        self.wait(lambda lines: any(line.startswith("touched") for line in lines), "'touched'")
        self.beats_after(-1, 2)

    @staticmethod
    def beats(lines):
        out = []
        for line in lines:
            if not line.startswith("hb "):
                continue
            fields = dict(f.split("=", 1) for f in line.split()[1:] if "=" in f)
            try:
                out.append({k: int(v) for k, v in fields.items()})
            except ValueError:
                continue
        return [b for b in out if "seq" in b and "gap_since_hb_us" in b]

    def last_seq(self):
        return max((b["seq"] for b in self.beats(self.lines())), default=-1)

    def beats_after(self, seq, n):
        def enough(lines):
            later = [b for b in self.beats(lines) if b["seq"] > seq]
            return later if len(later) >= n else None
        return self.wait(enough, "heartbeat")

    def last_beat(self):
        return max(self.wait(self.beats, "heartbeat"), key=lambda b: b["seq"])

    def pages_per_s(self, since):
        """Rewritten from that heartbeat to the next one from now."""
        now = self.beats_after(self.last_seq(), 1)[-1]
        return (now["pages"] - since["pages"]) * 1e3 / (now["t"] - since["t"])

    def longest_gap_ms(self, seq):
        """Of all that the guest saw from heartbeat `seq` to the second one from now. The first heartbeat after `touched`
        is not among them: it counts the touching."""
        now = self.last_seq()
        return max(b["gap_since_hb_us"] for b in self.beats_after(seq, now - seq + 2)) / 1e3


def read_file(path):
    try:
        with open(path, "rb") as f:
            return f.read()
    except FileNotFoundError:
        return b""


def read_console(path):
    """What a console socket has kept: 64 KiB, which move with the guest. They come at once."""
    data = b""
    with socket.socket(socket.AF_UNIX) as s:
        try:
            s.connect(path)
            s.settimeout(CONSOLE_QUIET_S)
            while (more := s.recv(1 << 16)):
                data += more
                if len(data) > 4 * KEPT_BYTES:  # it goes on as fast as it is read
                    break
        except OSError:  # no more for now, or not there yet
            pass
    return data


def cmdline(touch, extra):
    # disks are the other benchmark's: this guest leaves them alone
    return f"disk=off touch={touch} {extra} hb=50 zero=0"  # of two the guest takes the first


# --- ours ---

class Hosts:
    """Two daemons, their state in the folder; VMs move between them."""

    def __init__(self, build, folder, link):
        self.bin = {p: os.path.join(build, "bin", p) for p in ("snmigrate", "snmigrated", "snvm", "snvmm")}
        self.kernel = os.path.join(build, "guest", "native.elf")
        self.folder, self.link = os.path.join(folder, "hosts"), link
        shutil.rmtree(self.folder, ignore_errors=True)
        os.makedirs(self.folder)
        self.daemons, self.vms = [], 0
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self):
        ports = [peers.free_port() for _ in "ab"]
        pki = os.path.join(self.folder, "pki")
        self.run("snmigrate", "pki", "init", pki)
        for i, name in enumerate("ab"):
            self.run("snmigrate", "pki", "issue", pki, name, self.link.addresses[i])
            other = 1 - i
            os.makedirs(os.path.join(self.folder, name))
            with open(os.path.join(self.folder, name, "host.ini"), "w", encoding="ascii") as f:
                f.write(f"[host]\nname = {name}\nlisten = {self.link.addresses[i]}:{ports[i]}\n"
                        f"state-dir = {self.folder}/{name}/state\ncontrol = {self.control(i)}\n"
                        f"[tls]\nca = {pki}/ca.pem\ncert = {pki}/{name}.pem\nkey = {pki}/{name}.key\n"
                        f"[peer {'ab'[other]}]\naddress = {self.link.addresses[other]}:{ports[other]}\n"
                        f"[limits]\nallow-no-tls = yes\n[programs]\nsnvmm = {self.bin['snvmm']}\n")
        for i, name in enumerate("ab"):
            argv = [*self.link.prefix(i), self.bin["snmigrated"], "--config", f"{self.folder}/{name}/host.ini"]
            self.daemons.append(peers.Server(argv, lambda i=i: os.path.exists(self.control(i)),
                                             f"{self.folder}/{name}.log"))

    def control(self, host):
        return os.path.join(self.folder, "ab"[host], "control.sock")

    def run(self, program, *args, host=None):
        argv = [self.bin[program], *(["--control", self.control(host)] if host is not None else []), *args]
        p = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           timeout=MOVE_TIMEOUT_S, check=False)
        if p.returncode:
            words = (p.stderr or p.stdout).strip().splitlines()[-1:]
            raise RuntimeError(f"{program} {' '.join(args[:3])}: exit status {p.returncode}: {' '.join(words)}")
        return p.stdout

    def close(self):
        for host, daemon in enumerate(self.daemons):
            try:
                vms = json.loads(self.run("snvm", "list", "--json", host=host))
            except (RuntimeError, ValueError):
                vms = []
            for vm in vms:
                subprocess.run([self.bin["snvm"], "--control", self.control(host), "stop", vm["name"], "--force"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
            daemon.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class OurGuest:
    def __init__(self, hosts, memory_mib, touch, extra="", cpus=1, disk=None):
        self.hosts, self.host = hosts, 0
        hosts.vms += 1
        self.name = f"vm{hosts.vms}"
        self.serial = Serial(lambda: read_console(
            os.path.join(hosts.folder, "ab"[self.host], "state", "vms", self.name, "console.sock")))
        definition = os.path.join(hosts.folder, f"{self.name}.ini")
        with open(definition, "w", encoding="ascii") as f:
            f.write(f"[vm]\nname = {self.name}\nmemory = {memory_mib}M\ncpus = {cpus}\nkernel = {hosts.kernel}\n"
                    f"cmdline = {cmdline(touch, extra)}\nserial = socket\n")
            if disk:
                f.write("[disk root]\npath = root.raw\nformat = raw\n")
        hosts.run("snvm", "create", definition, *(["--import", f"root={disk}"] if disk else []), host=0)
        hosts.run("snvm", "start", self.name, host=0)
        self.serial.touched()

    def move(self, *options):
        before = self.serial.last_beat()
        seq = before["seq"]
        out = self.hosts.run("snmigrate", "move", self.name, "ab"[1 - self.host], "--with-storage", "--json", *options,
                             host=self.host)
        self.host = 1 - self.host
        events = [json.loads(line) for line in out.strip().splitlines()]
        began = {e["phase"]: e["ms"] for e in events if e["event"] == "phase"}
        end = events[-1]
        # until the guest runs there; what is cleaned up after that costs it nothing
        return {"wall_s": (began["cleanup"] - began["memory"]) / 1e3, "total_s": end["total_ms"] / 1e3,
                "downtime_ms": end["downtime_ms"], "gap_ms": self.serial.longest_gap_ms(seq),
                "pages_per_s": self.serial.pages_per_s(before), "wire_bytes": end["wire_bytes"], "end": end}

    def close(self):
        self.hosts.run("snvm", "stop", self.name, "--force", host=self.host)
        self.hosts.run("snvm", "delete", self.name, host=self.host)


# --- QEMU ---

class QemuGuest:
    """The same guest, kernel and command line. A move starts a QEMU with -incoming and ends the one before."""

    def __init__(self, folder, kernel, link, memory_mib, touch, extra="", cpus=1):
        self.program = os.environ.get("BENCH_QEMU") or "qemu-system-x86_64"
        peers.need(self.program)
        self.folder, self.link, self.host, self.count = folder, link, 0, 0
        path = os.path.join(folder, "qemu.serial")
        if os.path.exists(path):
            os.unlink(path)
        self.serial = Serial(lambda: read_file(path))  # both QEMUs append to it
        self.argv = [self.program, "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35,accel=kvm",
                     "-m", f"{memory_mib}M", "-smp", str(cpus), "-kernel", kernel, "-append", cmdline(touch, extra),
                     "-chardev", f"file,id=s,path={path},append=on", "-serial", "chardev:s"]
        self.qemu = self.start(0, [])
        try:
            self.serial.touched()
        except BaseException:
            self.close()
            raise

    def start(self, host, more):
        self.count += 1
        return peers.Qmp([*self.link.prefix(host), *self.argv, *more], os.path.join(self.folder, f"qmp{self.count}"),
                         os.path.join(self.folder, "qemu.log"))

    @staticmethod
    def prepare(q, channels, compression, downtime_ms, auto_converge=False, postcopy=False):
        if auto_converge:
            q.command("migrate-set-capabilities", capabilities=[{"capability": "auto-converge", "state": True}])
        if postcopy:
            q.command("migrate-set-capabilities", capabilities=[{"capability": "postcopy-ram", "state": True}])
        parameters = {"max-bandwidth": 1 << 40, "downtime-limit": downtime_ms}
        if channels:
            q.command("migrate-set-capabilities", capabilities=[{"capability": "multifd", "state": True}])
            parameters |= {"multifd-channels": channels, "multifd-compression": compression}
        q.command("migrate-set-parameters", **parameters)

    def give_up(self):
        self.qemu.command("migrate_cancel")
        while self.qemu.command("query-migrate").get("status") == "cancelling":
            time.sleep(BUSY_WAIT_S)

    def move(self, channels=0, compression="none", downtime_ms=50, auto_converge=False, postcopy=False,
             give_up_s=MOVE_TIMEOUT_S):
        """postcopy: after one round. None: it has not come to its end in give_up_s."""
        before = self.serial.last_beat()
        seq = before["seq"]
        there = 1 - self.host
        port = peers.free_port()
        to = self.start(there, ["-incoming", "defer"])
        try:
            self.prepare(to, channels, compression, downtime_ms, postcopy=postcopy)
            self.prepare(self.qemu, channels, compression, downtime_ms, auto_converge, postcopy)
            uri = f"tcp:{self.link.addresses[there]}:{port}"
            to.command("migrate-incoming", uri=uri)
            self.qemu.command("migrate", uri=uri)
            deadline = time.monotonic() + give_up_s
            while (info := self.qemu.command("query-migrate")).get("status") != "completed":
                if time.monotonic() > deadline and give_up_s < MOVE_TIMEOUT_S:
                    self.give_up()
                    to.close()
                    return None
                if postcopy and info.get("ram", {}).get("dirty-sync-count", 0) > 1:
                    self.qemu.command("migrate-start-postcopy")
                    postcopy = False
                if info.get("status") in ("failed", "cancelled") or time.monotonic() > deadline:
                    raise RuntimeError(f"QEMU's migration: {info.get('status')}: {info.get('error-desc', '')}")
                time.sleep(BUSY_WAIT_S)
        except BaseException:
            to.close()
            raise
        self.qemu.close()
        self.qemu, self.host = to, there
        return {"wall_s": info["total-time"] / 1e3, "total_s": info["total-time"] / 1e3,
                "downtime_ms": float(info["downtime"]), "gap_ms": self.serial.longest_gap_ms(seq),
                "pages_per_s": self.serial.pages_per_s(before), "wire_bytes": info["ram"]["transferred"]}

    def close(self):
        self.qemu.close()

