# SPDX-License-Identifier: Apache-2.0
"""What a figure needs beside it: the machine, medians, the table, the files of results."""
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import time


FEWEST_RUNS = 5  # behind a figure that counts


def output(*argv):
    if not shutil.which(argv[0]):
        return ""
    return subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False).stdout.strip()


def cpu_model():
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
        for line in f:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def memory_mib():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20


def describe(root, folder, versions):
    commit = output("git", "-C", root, "rev-parse", "--short", "HEAD")
    changed = output("git", "-C", root, "status", "--porcelain", "--untracked-files=no")
    with open(os.path.join(root, "VERSION"), encoding="utf-8") as f:
        version = f.read().strip()
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "snmigrate": f"{version} {commit}{' and changes' if changed else ''}",
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "memory_mib": memory_mib(),
        "kernel": platform.release(),
        "virtualization": output("systemd-detect-virt") or "unknown",
        "file_system": output("findmnt", "-n", "-o", "FSTYPE", "-T", folder),
        "mount_options": output("findmnt", "-n", "-o", "OPTIONS", "-T", folder),
        "disk": output("findmnt", "-n", "-o", "SOURCE", "-T", folder),
        "load_average": os.getloadavg()[0],
        "versions": versions,
    }


def median(values):
    return statistics.median(values)


def loopback_round_trip_us(samples=2000):
    """One byte there and back over TCP on the loopback device, between two processes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        child = os.fork()
        if child == 0:
            try:
                s = socket.create_connection(listener.getsockname())
                s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while (b := s.recv(1)):
                    s.sendall(b)
            finally:
                os._exit(0)
        s = listener.accept()[0]
    took = []
    with s:
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(samples):
            begin = time.perf_counter_ns()
            s.sendall(b"x")
            s.recv(1)
            took.append((time.perf_counter_ns() - begin) / 1e3)
    os.waitpid(child, 0)
    return median(took)


def spread(values):
    """Half the distance between the extremes, in percent of the median: what the machine's noise is worth."""
    m = median(values)
    return 100 * (max(values) - min(values)) / 2 / m if m else 0.0


# --- tables ---

def cells(row):
    figure = row.get("figure")
    return [row["id"], row["what"], "" if figure is None else f"{figure:.2f}", row.get("goal", ""), row["status"],
            row.get("detail", "")]


HEAD = ["row", "measure", "figure", "goal", "result", "detail"]


def print_table(rows):
    table = [HEAD, *(cells(r) for r in rows)]
    widths = [max(len(r[i]) for r in table) for i in range(len(HEAD) - 1)]
    for r in table:
        print("  ".join([*(c.ljust(w) for c, w in zip(r, widths)), r[-1]]).rstrip())


def write_results(folder, machine, settings, rows):
    os.makedirs(folder, exist_ok=True)
    base = os.path.join(folder, "storage-" + machine["date"].replace(":", "").replace("-", ""))
    with open(base + ".json", "w", encoding="utf-8") as f:
        json.dump({"machine": machine, "settings": settings, "rows": rows}, f, indent=1)
        f.write("\n")
    with open(base + ".md", "w", encoding="utf-8") as f:
        f.write(f"# Storage, {machine['date']}\n\n")
        v = ", ".join(f"{p} {n}" for p, n in machine["versions"].items())
        f.write(f"snmigrate {machine['snmigrate']}. {machine['cpus']} × {machine['cpu']}, {machine['memory_mib']} MiB, "
                f"Linux {machine['kernel']}, {machine['file_system']} ({machine['mount_options']}) on "
                f"{machine['disk']}, virtualization: {machine['virtualization']}, load average before the run "
                f"{machine['load_average']:.2f}. {v}.\n\n")
        if settings["BENCH_RUNS"] < FEWEST_RUNS:
            f.write(f"**A trial**: fewer than {FEWEST_RUNS} runs of each side.\n\n")
        f.write("Settings: " + ", ".join(f"{k} {v}" for k, v in settings.items()) + ".\n\n")
        f.write("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD) + "\n")
        for r in rows:
            f.write("| " + " | ".join(cells(r)) + " |\n")
    return base
