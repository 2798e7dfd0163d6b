"""What a training step costs with regularization, over the same step without: `python -m tests.benchmarks.step`.

All rows of a workload run in one process, a few steps each in turns, in an order that is drawn anew for each turn. A
ratio is that of the medians; its interval is a bootstrap over the turns. The numbers and what they mean are in
docs/performance.md.
"""

import argparse
import gc
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from .capture import machine
from .rows import LARGE, MODES, PLAIN, QUICK, TWIN, WORKLOADS, Setting, rows

TURNS, STEPS, RESAMPLES = 40, 3, 2_000
TARGETS = {
    ("mlp", "compiled", "fxreg, gradient"): 1.03,
    ("gpt", "compiled", "fxreg, gradient"): 1.01,
    **{
        (workload.name, "whole", f"fxreg, {how}"): 1.02
        for workload in WORKLOADS
        for how in ("gradient", "emit=backward")
    },
}
"""Of the ratio to the plain row of the same mode. That of emit=backward is the ratio of the loss term in the graph."""
WHOLE_TARGET = 0.95
"""Of the ratio of a whole step with rules to the separate, compiled one without."""

NOISY = 0.05
"""A spread of identical twins that says nothing about such targets."""

Samples = dict[tuple[str, str], list[float]]
"""Seconds a step, turn by turn, by mode and row."""


def seconds(step: Any, steps: int, device: torch.device, clock: Callable[[], float]) -> float:
    """How long a step takes, behind one that brings its weights back into the caches."""
    step()
    _wait(device)
    start = clock()
    for _ in range(steps):
        step()
    _wait(device)
    return (clock() - start) / steps


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sample(
    setting: Setting, turns: int, only: str, steps: int = STEPS, clock: Callable[[], float] = time.perf_counter
) -> Samples:
    """All rows of a workload, in turns."""
    makers = {(mode, name): make for mode, name, make in rows(setting)}
    chosen = {key for key in makers if re.search(only, ", ".join(key))}
    chosen |= {("compiled" if "whole" in key else key[0], PLAIN) for key in chosen} | {(m, PLAIN) for m, _ in chosen}
    made = {key: make() for key, make in makers.items() if key in chosen}
    for key, step in made.items():
        print(f"  {', '.join(key)}", file=sys.stderr, flush=True)
        for _ in range(3):
            step()
    order, found = list(made), defaultdict[tuple[str, str], list[float]](list)
    for _ in range(turns):
        random.shuffle(order)
        for key in order:
            found[key].append(seconds(made[key], steps, setting.device, clock))
    return {key: found[key] for key in made}


def interval(row: list[float], base: list[float]) -> tuple[float, float, float]:
    """The ratio of the medians, and where it lies in 95 of 100 draws of as many turns."""
    drawn = random.Random(0)
    ratios = []
    for _ in range(RESAMPLES):
        turns = drawn.choices(range(len(row)), k=len(row))
        ratios.append(statistics.median([row[t] for t in turns]) / statistics.median([base[t] for t in turns]))
    ratios.sort()
    low, high = ratios[round(0.025 * RESAMPLES)], ratios[round(0.975 * RESAMPLES) - 1]
    return statistics.median(row) / statistics.median(base), low, high


def table(workload: str, samples: Samples) -> str:
    """Every row over the plain one of its mode; whole steps over the separate compiled one, too."""
    spread = {mode: _spread(samples, mode) for mode in MODES}
    out = []
    for (mode, name), row in samples.items():
        ratio, low, high = interval(row, samples[mode, PLAIN])
        target = TARGETS.get((workload, mode, name))
        if (mode, name) == ("compiled", "fxreg, emit=backward") and (mode, "loss term in the graph") in samples:
            target = interval(samples[mode, "loss term in the graph"], samples[mode, PLAIN])[0]
        cells = [mode, name, f"{1000 * statistics.median(row):.3f}", f"{1000 * min(row):.3f}"]
        cells += [f"{ratio:.3f}", f"{low:.3f}–{high:.3f}", f"{min(row) / min(samples[mode, PLAIN]):.3f}"]
        out.append([*cells, *_verdict(target, high, spread[mode])])
        if mode == "whole":
            ratio, low, high = interval(row, samples["compiled", PLAIN])
            minimum = min(row) / min(samples["compiled", PLAIN])
            target = WHOLE_TARGET if name.startswith("fxreg") else None
            cells = [
                "",
                "  over the separate compiled step",
                "",
                "",
                f"{ratio:.3f}",
                f"{low:.3f}–{high:.3f}",
                f"{minimum:.3f}",
            ]
            out.append([*cells, *_verdict(target, high, spread["compiled"])])
    header = ["mode", "row", "median ms", "min ms", "ratio", "95%", "of min", "target", "met"]
    twins = ", ".join(f"{mode} ±{value:.3f}" for mode, value in spread.items() if value)
    return f"{tabulate(out, header, 'github', disable_numparse=True)}\n\nIdentical twins: {twins}."


def _spread(samples: Samples, mode: str) -> float:
    """How far from 1 the ratio of two identical steps may be."""
    if (mode, TWIN) not in samples:
        return 0.0
    _, low, high = interval(samples[mode, TWIN], samples[mode, PLAIN])
    return max(abs(low - 1), abs(high - 1))


def _verdict(target: float | None, high: float, spread: float) -> list[str]:
    if target is None:
        return ["", ""]
    met = "too noisy" if spread > NOISY else "yes" if high <= target + spread else "no"
    return [f"{target:.3f}", met]


# What a row leaves behind, each in a process of its own.


_CALL = re.compile(r"^ +(?:cpp_fused\w*|triton_\w+\.run)\(", re.MULTILINE)
"""A call of a kernel that Inductor wrote; on the CPU it may hold several loops."""


def footprint(setting: Setting, mode: str, name: str) -> dict[str, Any]:
    """Cold compile time, calls of kernels and of products, and peak memory of the steps behind it."""
    from torch._inductor.utils import run_and_get_code

    (make,) = (make for m, n, make in rows(setting) if (m, n) == (mode, name))
    step = make()
    start = time.perf_counter()
    _, codes = run_and_get_code(step)
    cold = time.perf_counter() - start
    kernels = sum(len(_CALL.findall(code)) for code in codes)
    products = sum(code.count("extern_kernels.") for code in codes)
    added = sum(code.count("extern_kernels.addmm(") for code in codes)
    for _ in range(3):
        _peak(step, setting.device)
    peak = (_alive() + _peak(step, setting.device)) / 2**20
    return {"cold_s": cold, "kernels": kernels, "extern": products, "addmm": added, "peak_mib": peak}


def _peak(step: Any, device: torch.device) -> int:
    """The bytes that a step allocates at most, beyond what there is before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(allocated, default=0)


def _alive() -> int:
    """The bytes of all tensors that there are: parameters, gradients, the optimizer's state, the batch."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    tensors += [thing.grad for thing in tensors if thing.is_leaf and thing.grad is not None]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def footprints(setting: Setting, only: str) -> list[list[str]]:
    out = []
    for mode, name, _ in rows(setting):
        if mode not in ("compiled", "whole") or (name != PLAIN and not re.search(only, f"{mode}, {name}")):
            continue
        with tempfile.TemporaryDirectory() as cache:
            child = [sys.executable, "-m", "tests.benchmarks.step", *sys.argv[1:], "--child", mode, name]
            child += ["--workload", setting.workload.name]
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
            done = subprocess.run(child, env=environment, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        shown = [f"{found['cold_s']:.1f}", f"{found['kernels']}", f"{found['extern']}", f"{found['addmm']}"]
        out.append([mode, name, *shown, f"{found['peak_mib']:.1f}"])
        print(f"  {mode}, {name}: {found}", file=sys.stderr, flush=True)
    return out


def _device(given: argparse.Namespace) -> str:
    """What ran, and how, for people."""
    name = torch.cuda.get_device_name() if given.device == "cuda" else given.device
    return ", ".join([name, *(["bfloat16 autocast"] if given.autocast else []), *filter(None, [given.compile_mode])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke test: a small model, three turns")
    parser.add_argument("--workload", default="", help="only this one")
    parser.add_argument(
        "--only", default="", help="only rows whose 'mode, name' this expression finds, and what they are compared with"
    )
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--steps", type=int, default=STEPS, help="in a turn: more where one is short")
    parser.add_argument(
        "--cpu-time", action="store_true", help="that of the process: where others use the machine, too"
    )
    parser.add_argument("--footprint", action="store_true", help="compile time, kernels and memory instead of time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile-mode", help="of torch.compile: reduce-overhead, max-autotune")
    parser.add_argument("--autocast", action="store_true", help="the forward pass in bfloat16")
    parser.add_argument("--optimizer", default="sgd", choices=["sgd", "adamw"])
    parser.add_argument("--samples", type=Path, help="where to write the raw samples, as JSON")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    known = WORKLOADS if given.device == "cpu" else (*WORKLOADS, *LARGE)
    chosen = [QUICK] if given.quick else [w for w in known if given.workload in ("", w.name)]
    how = (torch.device(given.device), given.compile_mode, given.autocast, given.optimizer)
    settings = [Setting(workload, *how) for workload in chosen]
    if given.child:
        print(json.dumps(footprint(settings[0], *given.child)))
        return
    load = f"load {os.getloadavg()[0]:.1f} at the start"
    measure = "CPU time" if given.cpu_time else "wall time"
    print(f"{machine()}, {torch.get_num_threads()} threads, {load}; {given.optimizer}, {_device(given)}, {measure}")
    raw: dict[str, Any] = {"machine": machine(), "load": os.getloadavg()[0], "arguments": vars(given), "seconds": {}}
    for setting in settings:
        size = sum(parameter.numel() for parameter in setting.model().parameters())
        print(f"\n{setting.workload.name}: {size:,} parameters\n", flush=True)
        if given.footprint:
            header = ["mode", "row", "cold compile s", "kernels", "extern", "of them addmm", "peak MiB"]
            print(tabulate(footprints(setting, given.only), header, "github", disable_numparse=True), flush=True)
            continue
        clock = time.process_time if given.cpu_time else time.perf_counter
        samples = sample(setting, 3 if given.quick else given.turns, given.only, given.steps, clock)
        raw["seconds"][setting.workload.name] = {", ".join(key): times for key, times in samples.items()}
        print(table(setting.workload.name, samples), flush=True)
    print(f"\nLoad {os.getloadavg()[0]:.1f} at the end.")
    if given.samples:
        given.samples.write_text(json.dumps(raw, default=str, indent=1))


if __name__ == "__main__":
    main()
