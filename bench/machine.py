# SPDX-License-Identifier: Apache-2.0
"""What a figure needs beside it: the machine, medians, the table, the files of results."""
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
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


# --- rows ---

class Rows:
    """What is measured and what came of it; every row is printed as soon as it is known."""

    def __init__(self, runs):
        self.runs, self.rows = runs, []

    def alternate(self, sides, runs=None):
        """Each side in turn, `runs` times, the order turned round every time. {name: [result]}"""
        results, runs = {name: [] for name in sides}, runs or self.runs
        for i in range(runs):
            order = list(sides) if i % 2 == 0 else list(sides)[::-1]
            for name in order:
                if sys.stdout.isatty():
                    print(f"  {name} {i + 1}/{runs}\033[K", end="\r", flush=True)
                results[name].append(sides[name](i))
        return results

    def add(self, rid, what, figure, goal, good, detail, samples=None):
        status = "no goal" if good is None else "met" if good else "missed"
        self.rows.append({"id": rid, "what": what, "figure": figure, "goal": goal, "status": status,
                          "detail": detail, "samples": samples})
        print(f"{rid}: {what}: {figure:.2f} ({goal or 'no goal'}): {status}. {detail}", flush=True)

    def note(self, rid, what, goal, status, detail=""):
        self.rows.append({"id": rid, "what": what, "goal": goal, "status": status, "detail": detail})
        print(f"{rid}: {what}: {status} {detail}".rstrip(), flush=True)


def choose(plan, rows):
    chosen = list(plan) if rows == "all" else rows.split(",")
    for rid in chosen:
        if rid not in plan:
            sys.exit(f"bench: no row {rid}; there are: {' '.join(plan)}")
    return chosen


def measure(rows, plan, chosen, about, missing):
    """Runs the chosen rows of {id: function}. `missing` is the exception that says a peer is not there."""
    if about["load_average"] > 0.5:
        print(f"bench: load average {about['load_average']:.2f}: other programs run; the figures will be noisy")
    if rows.runs < FEWEST_RUNS:
        print(f"bench: a trial: fewer than {FEWEST_RUNS} runs of each side")
    for rid in chosen:
        try:
            plan[rid]()
        except missing as e:
            rows.note(rid, "", "", "skipped", str(e))
        except Exception as e:  # whatever it is, the other rows are measured  # pylint: disable=broad-except
            rows.note(rid, "", "", "failed", f"{type(e).__name__}: {e}")


def finish(rows, base):
    """The table and the sum. The exit status: 1 if a row could not be measured."""
    print()
    print_table(rows.rows)

    def count(word):
        return sum(r["status"].startswith(word) for r in rows.rows)
    print(f"\n{count('met')} met, {count('missed')} missed, {count('no goal')} without a goal, {count('skipped')} skipped, "
          f"{count('failed')} failed; {os.path.relpath(base)}.json and .md")
    return 1 if count("failed") else 0


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


def write_results(folder, name, machine, settings, rows):
    """NAME-DATE.json, every run's figures, and NAME-DATE.md, the table. The path without its ending."""
    os.makedirs(folder, exist_ok=True)
    base = os.path.join(folder, f"{name}-" + machine["date"].replace(":", "").replace("-", ""))
    with open(base + ".json", "w", encoding="utf-8") as f:
        json.dump({"machine": machine, "settings": settings, "rows": rows}, f, indent=1)
        f.write("\n")
    with open(base + ".md", "w", encoding="utf-8") as f:
        f.write(f"# {name.capitalize()}, {machine['date']}\n\n")
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
