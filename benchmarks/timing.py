"""Timing two or more sides in turn, so that a noisy machine is noisy for all of them."""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path


def alternate(sides, rounds, warmup=1):
    """{name: median seconds} of `sides` {name: function}, called in turn, `rounds` times each."""
    seconds = {name: [] for name in sides}
    for i in range(warmup + rounds):
        for name, function in sides.items():
            start = time.perf_counter()
            function()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def extra_mb(function):
    """(result, MB that were resident at the peak beyond those from before). Linux only."""

    def resident(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # else the peak is that of all before
    before = resident("VmRSS:")
    return function(), resident("VmHWM:") - before


def report(rows, description):
    """Print `rows`, dictionaries with the same keys, as a table, or with --json as JSON."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true")
    if parser.parse_args().json:
        print(json.dumps(rows, indent=2))
        return
    cells = [[str(key) for key in rows[0]]]
    for row in rows:
        cells.append([f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()])
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))
