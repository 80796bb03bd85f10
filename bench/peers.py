# SPDX-License-Identifier: Apache-2.0
"""The programs that are compared: how each is started, what its run is, and what it took."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time

PACKAGES = {  # program -> Debian package
    "nbdkit": "nbdkit",
    "nbdcopy": "libnbd-bin",
    "qemu-img": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "fio": "fio",
}
START_TIMEOUT_S = 20
RUN_TIMEOUT_S = 3600


class Missing(Exception):
    """A peer is not installed: the row is skipped."""


def need(*programs):
    missing = [p for p in programs if not shutil.which(p)]
    if missing:
        packages = " ".join(sorted({PACKAGES.get(p, p) for p in missing}))
        raise Missing(f"{', '.join(missing)} not found: apt-get install {packages}")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def listening(port):
    # a look, not a connection, which the server would have to serve
    with open("/proc/net/tcp", encoding="ascii") as f:
        return any(line.split()[1] == f"0100007F:{port:04X}" and line.split()[3] == "0A" for line in list(f)[1:])


def peak_memory(pid):
    """VmHWM in bytes; 0 once the process has gone."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as f:
            for line in f:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as f:
        fields = f.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Server:
    """A process in the background that ends with this one; ready() says when it can be used."""

    def __init__(self, argv, ready, log, **popen):
        self.argv, self.log = argv, log
        with open(log, "ab") as out:
            self.proc = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "--", *argv], stderr=out,
                                         **{"stdin": subprocess.DEVNULL, "stdout": out, **popen})
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ready():
            if self.proc.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"{argv[0]} does not start: {self.last_words()}")
            time.sleep(0.01)

    def last_words(self):
        with open(self.log, encoding="utf-8", errors="replace") as f:
            return " / ".join(f.read().strip().splitlines()[-3:])

    def kill(self):
        if self.proc.poll() is None:
            self.proc.kill()
        self.proc.wait()

    def stop(self):
        """An orderly end. What the process took, up to then."""
        took = {"peak_memory_bytes": peak_memory(self.proc.pid), "cpu_s": cpu_seconds(self.proc.pid)}
        self.proc.send_signal(signal.SIGTERM)
        try:
            self.proc.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(f"{self.argv[0]} does not end") from None
        return took

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.kill()


def run(argv, log):
    """A program to its end: wall time, processor time, peak memory, and what it printed."""
    begin = time.monotonic()
    with open(log, "ab") as err:
        proc = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "--", *argv], stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=err)
    peak = 0
    os.set_blocking(proc.stdout.fileno(), False)
    out = b""
    while True:
        # VmHWM begins anew at exec; getrusage would count this interpreter's memory, from before it
        peak = peak_memory(proc.pid) or peak
        out += proc.stdout.read() or b""
        pid, status, usage = os.wait4(proc.pid, os.WNOHANG)
        if pid:
            break
        if time.monotonic() - begin > RUN_TIMEOUT_S:
            proc.kill()
        time.sleep(0.005)
    wall = time.monotonic() - begin
    proc.returncode = os.waitstatus_to_exitcode(status)
    out += proc.stdout.read() or b""
    proc.stdout.close()
    if proc.returncode:
        with open(log, encoding="utf-8", errors="replace") as f:
            words = " / ".join(f.read().strip().splitlines()[-3:])
        raise RuntimeError(f"{argv[0]}: exit status {proc.returncode}: {words}")
    return {"wall_s": wall, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_memory_bytes": peak,
            "out": out.decode(errors="replace")}


# --- ours ---

class Ours:
    def __init__(self, build, folder):
        self.snnbd = os.path.join(build, "bin", "snnbd")
        self.driver = os.path.join(build, "bench", "mirror_driver")
        self.snmigrate = os.path.join(build, "bin", "snmigrate")
        self.folder, self.log = folder, os.path.join(folder, "ours.log")

    def certificates(self):
        pki = os.path.join(self.folder, "pki")
        if not os.path.exists(pki):
            for argv in (["init", pki], ["issue", pki, "source", "127.0.0.1"], ["issue", pki, "destination", "127.0.0.1"]):
                subprocess.run([self.snmigrate, "pki", *argv], check=True, stdout=subprocess.DEVNULL)
        return pki

    def tls_options(self, name):
        pki = self.certificates()
        return ["--tls-ca", f"{pki}/ca.pem", "--tls-cert", f"{pki}/{name}.pem", "--tls-key", f"{pki}/{name}.key"]

    def server(self, destination, fmt="raw", direct=True, tls=False):
        port = free_port()
        argv = [self.snnbd, "--tcp", f"127.0.0.1:{port}", "--format", fmt]
        argv += ["--direct"] if direct else []
        argv += self.tls_options("destination") if tls else []
        s = Server([*argv, destination], lambda: listening(port), self.log)
        s.port = port
        return s

    def driver_argv(self, source, fmt="raw", direct=True, port=None, tls=False, options=()):
        argv = [self.driver, "--source", source, "--format", fmt, "--run-dir", self.folder]
        argv += [] if direct else ["--buffered"]
        argv += ["--to", f"127.0.0.1:{port}"] if port else []
        argv += [*self.tls_options("source"), "--tls-peer", "destination"] if tls else []
        return [*argv, *options]

    def copy(self, source, destination, fmt="raw", direct=True, tls=False, options=()):
        """One pass by our client and server, ending when the destination has flushed."""
        with self.server(destination, fmt, direct, tls) as server:
            r = run(self.driver_argv(source, fmt, direct, server.port, tls, options), self.log)
            said = json.loads(r.pop("out"))
            r["server"] = server.stop()
        r["driver"] = said
        r["peak_memory_bytes"] = said["peak_memory_bytes"]
        return r

    def load(self, source, depth, seconds):
        """A guest's writes without a mirror."""
        r = run(self.driver_argv(source, options=["--load", str(depth), "--seconds", str(seconds)]), self.log)
        return json.loads(r["out"])


# --- nbdcopy to nbdkit's file plugin ---

def nbdcopy(source, destination, folder):
    need("nbdkit", "nbdcopy")
    port, log = free_port(), os.path.join(folder, "nbdcopy.log")
    with Server(["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "file", destination],
                lambda: listening(port), log) as server:
        r = run(["nbdcopy", "--connections=4", "--destination-is-zero", "--flush", source,
                 f"nbd://127.0.0.1:{port}"], log)
        r["server"] = server.stop()
    return r


# --- QEMU ---

class Qmp:
    """A QEMU in the background that is driven by QMP on the socket `path`."""

    def __init__(self, argv, path, log):
        need(argv[0])
        if os.path.exists(path):
            os.unlink(path)
        self.log = log
        self.server = Server([*argv, "-qmp", f"unix:{path},server=on,wait=off"], lambda: os.path.exists(path), log)
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(RUN_TIMEOUT_S)
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self.sock.connect(path)
                break
            except ConnectionRefusedError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        self.file = self.sock.makefile("rw", encoding="utf-8")
        self.events = []
        self.file.readline()
        self.command("qmp_capabilities")

    def command(self, command, /, **arguments):
        self.file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.file.flush()
        while True:
            m = json.loads(self.file.readline())
            if "event" in m:
                self.events.append(m)
            elif "error" in m:
                raise RuntimeError(f"QEMU: {command}: {m['error']['desc']}")
            else:
                return m["return"]

    def wait_event(self, *names):
        while True:
            while self.events:
                m = self.events.pop(0)
                if m["event"] == "BLOCK_JOB_ERROR" or m.get("data", {}).get("error"):
                    raise RuntimeError(f"QEMU: {m}")
                if m["event"] in names:
                    return m
            m = json.loads(self.file.readline())
            if "event" in m:
                self.events.append(m)

    def close(self):
        self.server.kill()
        self.file.close()
        self.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


class Qemu(Qmp):
    """A QEMU without a guest that holds one raw disk."""

    def __init__(self, source, folder, direct=True):
        need("qemu-nbd")
        self.folder, self.direct = folder, direct
        disk = {"driver": "raw", "node-name": "disk0", "discard": "unmap",
                "cache": {"direct": direct, "no-flush": False},
                "file": {"driver": "file", "filename": source, "discard": "unmap",
                         "aio": "native" if direct else "threads",
                         "cache": {"direct": direct, "no-flush": False}}}
        super().__init__(["qemu-system-x86_64", "-S", "-machine", "none", "-nodefaults", "-display", "none",
                          "-blockdev", json.dumps(disk)], os.path.join(folder, "qmp"), os.path.join(folder, "qemu.log"))

    def destination(self, path):
        """qemu-nbd over the destination; several requests in flight, as a mirror job has them."""
        port = free_port()
        argv = ["qemu-nbd", "-t", "-f", "raw", "-b", "127.0.0.1", "-p", str(port), "--discard=unmap"]
        argv += ["--cache=none", "--aio=native"] if self.direct else ["--cache=writeback", "--aio=threads"]
        s = Server([*argv, path], lambda: listening(port), self.log)
        s.port = port
        return s

    def mirror(self, port, mode="background"):
        """Starts the job. It says READY after a flush of the target."""
        self.command("drive-mirror", **{"device": "disk0", "job-id": "m", "target": f"nbd:127.0.0.1:{port}",
                                        "format": "raw", "sync": "full", "mode": "existing", "copy-mode": mode})

    def cancel_mirror(self):
        """After READY: what is under way ends, the copy stays consistent."""
        self.command("block-job-cancel", device="m")
        self.wait_event("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")

    def export(self, path):
        self.command("nbd-server-start", addr={"type": "unix", "data": {"path": path}})
        self.command("block-export-add", **{"type": "nbd", "id": "x", "node-name": "disk0", "name": "",
                                            "writable": True})


def drive_mirror(source, destination, folder, direct=True):
    with Qemu(source, folder, direct) as q, q.destination(destination) as target:
        begin = time.monotonic()
        q.mirror(target.port)
        q.wait_event("BLOCK_JOB_READY")
        wall = time.monotonic() - begin
        q.cancel_mirror()
        took = {"cpu_s": cpu_seconds(q.server.proc.pid), "peak_memory_bytes": peak_memory(q.server.proc.pid)}
        server = target.stop()
    return {"wall_s": wall, **took, "server": server}


# --- fio as a guest, by NBD ---

def fio_argv(sock, depth, seconds, size_bytes):
    return ["fio", "--name=guest", "--ioengine=nbd", "--thread", f"--uri=nbd+unix:///?socket={sock}",
            "--rw=randwrite", "--bs=4k", f"--iodepth={depth}", f"--size={size_bytes}", "--time_based",
            f"--runtime={seconds}", "--norandommap", "--randrepeat=1", "--output-format=json"]


def fio_latency(out):
    job = json.loads(out[out.index("{"):])["jobs"][0]
    if job["error"]:
        raise RuntimeError(f"fio: error {job['error']}")
    w = job["write"]
    return {"writes": w["total_ios"], "p50_us": w["clat_ns"]["percentile"]["50.000000"] / 1e3,
            "p99_us": w["clat_ns"]["percentile"]["99.000000"] / 1e3, "max_us": w["clat_ns"]["max"] / 1e3,
            "iops": w["iops"]}


def guest_over_ours(ours, source, destination, depth, seconds, size_bytes):
    """The guest waits for the remote as long as with QEMU: else a slow reply would end the mirroring that is measured."""
    need("fio")
    sock = os.path.join(ours.folder, "guest.sock")
    if os.path.exists(sock):
        os.unlink(sock)
    log = os.path.join(ours.folder, "fio.log")
    with ours.server(destination) as server, \
         Server(ours.driver_argv(source, port=server.port, options=["--serve", sock, "--grace-ms", "10000"]),
                lambda: os.path.exists(sock), ours.log, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as driver:
        driver.proc.stdout.readline()
        driver.proc.stdin.write(b"mirror\n")
        if not driver.proc.stdout.readline():
            raise RuntimeError(f"mirror_driver: {driver.last_words()}")
        r = fio_latency(run(fio_argv(sock, depth, seconds, size_bytes), log)["out"])
        driver.proc.stdin.close()
        said = driver.proc.stdout.readline()
        driver.proc.wait(60)
        if driver.proc.returncode or not said:
            raise RuntimeError(f"mirror_driver: {driver.last_words()}")
        server.stop()
    r["sessions"] = json.loads(said)["sessions"]
    return r


def guest_over_qemu(source, destination, folder, depth, seconds, size_bytes):
    need("fio")
    sock, log = os.path.join(folder, "guest.sock"), os.path.join(folder, "fio.log")
    if os.path.exists(sock):
        os.unlink(sock)
    with Qemu(source, folder) as q, q.destination(destination) as target:
        q.export(sock)
        q.mirror(target.port, "write-blocking")
        q.wait_event("BLOCK_JOB_READY")
        r = fio_latency(run(fio_argv(sock, depth, seconds, size_bytes), log)["out"])
        q.cancel_mirror()
        target.stop()
    return r


# --- versions ---

def versions():
    def first_line(*argv):
        if not shutil.which(argv[0]):
            return "not installed"
        p = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        m = re.search(r"\d+(\.\d+)+\S*", p.stdout)
        return m.group(0).rstrip(",") if m else "unknown"
    return {p: first_line(p, "--version") for p in sorted(PACKAGES)}
