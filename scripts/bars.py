#!/usr/bin/env python3
"""Measures every planner against the speed it must reach, and prints a table.

    scripts/bars.py [--dtype f32|bf16] [--repeat 3] [--json F] [NAME ...]

A planner's bar is a bound on t / (dense time · density), planning included: what it leaves out must be saved in
time too. Others are bounds on dense time, on planning's share, or on growth when N doubles. NAME limits the run to
some mechanisms; all take about five minutes on two cores. Ratios are of one run, so a busy machine blurs them.
HEED_COMMAND names another `heed` than build/bin/heed. Only Python's standard library is used.
"""
import argparse
import array
import json
import math
import os
import pathlib
import random
import struct
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOKENS, HEADS, D = 32768, 2, 64
CLUSTERS = TOKENS // 512  # of routing-transformer
PARO_BLOCKS, PARO_DENSITY = TOKENS // 64, 0.5

# Shares of dense attention's speed that planners must keep, (without, with) AMX, where gathering weighs more.
USUAL, MOBA, STREAMING = (0.7, 0.45), (0.8, 0.5), (0.85, 0.45)
REPORTED = None  # unstructured: measured, without a bar

CAUSAL = {
    "streaming": STREAMING,
    "streaming:sink=64": STREAMING,
    "moba:block=128,top_k=8": MOBA,
    "moba": USUAL,
    "flash-moba": USUAL,
    "power": USUAL,
    "s2:allow_partial=true": USUAL,
    "moa": USUAL,
    "moa:beta=0.05": USUAL,
    "hip": REPORTED,  # its search multiplies twice what its attention does; it has bounds of its own below
    "dhsa": USUAL,
    "psa": USUAL,
    "landmark:top_k=16": USUAL,
    "combiner": USUAL,
    "combiner:variant=mixture": REPORTED,  # what its summaries attend to is half as much as what it attends to
    "proxy-attn": USUAL,
    "pbs-attn": USUAL,
    "seer-attention:oracle=true,density=0.1": REPORTED,  # the oracle is a dense pass of its own
    "blockrank:segment=512": USUAL,
    "routing-transformer": USUAL,
    "natten:kernel_size=1024": USUAL,
}
FULL = {
    "flash-moba": USUAL,
    "vmoba:mode=1d,chunk=256": USUAL,
    "vmoba:mode=3d,grid=32x32x32,chunk=4x8x8": USUAL,
    "psa": USUAL,
    "combiner": USUAL,
    "routing-transformer": USUAL,
    "natten:kernel_size=1024": USUAL,
    "natten:grid=128x256,kernel_size=33x33": USUAL,
    "natten:grid=32x32x32,kernel_size=11x11x11": USUAL,
    "gna:grid=128x256,kernel_size=32x32,stride=16x16": USUAL,
    "gna:grid=32x32x32,kernel_size=16x16x16,stride=8x8x8": USUAL,
    "hilo:grid=128x256,alpha=0.5": USUAL,
    "davit:kind=window,grid=128x256": USUAL,
    "paro:grid=32x32x32": USUAL,
    "llsa": USUAL,
    "biformer:grid=128x256,regions=16,top_k=16": USUAL,
    "biformer:grid=128x256": USUAL,
}
PLANNING = {"moba:block=128,top_k=8": 0.15}  # most of the time that planning may take
OF_DENSE = {"hip": 0.25}  # most of dense attention's time


def llsa_levels(tokens):  # as many as there can be: more tokens need more levels, or the coarsest grows with N²
    return max(1, math.floor(math.log(tokens, 16) - 1 + 1e-9))


# name: (bound of the growth, lengths, the call at a length)
GROWTH = {
    "llsa": (2.3, [1 << e for e in range(14, 19)], lambda n: f"llsa:levels={llsa_levels(n)}"),
    "hip": (2.4, [1 << e for e in range(14, 17)], lambda n: "hip"),
}


def write_input(path):
    """q, k, v, and the tensors that paro and routing-transformer want: learned or calibrated ones in real use."""
    rng = random.Random(0)

    def uniform(n):
        return array.array("f", [2 * rng.random() - 1 for _ in range(n)]).tobytes()

    shape = [1, HEADS, TOKENS, D]
    mask = bytearray()
    for _ in range(HEADS * PARO_BLOCKS):
        row = bytearray(PARO_BLOCKS)
        for block in rng.sample(range(PARO_BLOCKS), int(PARO_DENSITY * PARO_BLOCKS)):
            row[block] = 1
        mask += row
    tensors = {name: ("F32", shape, uniform(HEADS * TOKENS * D)) for name in ("q", "k", "v")}
    tensors["mu"] = ("F32", [HEADS, CLUSTERS, D], uniform(HEADS * CLUSTERS * D))
    tensors["order"] = ("I32", [HEADS], struct.pack(f"<{HEADS}i", *(5 * (h % 2) for h in range(HEADS))))
    tensors["mask"] = ("U8", [HEADS, PARO_BLOCKS, PARO_BLOCKS], bytes(mask))
    header, at = {}, 0
    for name, (dtype, extents, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": extents, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _, _, data in tensors.values():
            f.write(data)


def bench(calls, options):
    command = [os.environ.get("HEED_COMMAND", str(ROOT / "build/bin/heed")), "bench", "attend", "--json", "-", *options]
    for call in calls:
        command += ["--mechanism", call]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    return json.loads(done.stdout)


class Table:
    def __init__(self):
        self.rows = []
        print(f"{'mechanism':<56}{'N':>8}{'density':>9}{'t, s':>9}{'measured':>10}{'bar':>7}  ")

    def add(self, name, tokens, density, seconds, what, measured, bar):
        met = None if bar is None else measured <= bar
        verdict = {None: "reported", True: "met", False: "missed"}[met]
        print(
            f"{name:<56}{tokens:>8}{density:>9.4f}{seconds:>9.4f}{measured:>10.2f}"
            f"{'' if bar is None else f'{bar:.2f}':>7}  {verdict}: {what}",
            flush=True,
        )
        self.rows.append(
            {
                "mechanism": name,
                "tokens": tokens,
                "density": density,
                "seconds": seconds,
                "what": what,
                "measured": measured,
                "bar": bar,
                "met": met,
            }
        )


def measure_planners(table, names, common, path):
    machine = None
    for planners, full in ((CAUSAL, False), (FULL, True)):
        calls = [c for c in planners if not names or c.split(":")[0] in names]
        if not calls:
            continue
        run = bench(["dense", *calls], [*common, "--input", str(path), *(["--full"] if full else [])])
        machine = {key: run[key] for key in ("isa", "threads", "f32_peak", "bf16_peak")}
        amx = run["isa"] == "amx"
        dense = run["results"][0]["best_s"]
        for call, r in zip(calls, run["results"][1:]):
            name, row = call + (" (full)" if full else ""), (TOKENS, r["density"], r["best_s"])
            share = planners[call]
            bar = None if share is None else 1 / share[amx]
            table.add(name, *row, "t / (dense · density)", r["time_over_dense_times_density"], bar)
            if call in PLANNING:
                table.add(name, *row, "planning / t", r["plan_s"] / r["best_s"], PLANNING[call])
            if call in OF_DENSE and not amx:
                table.add(name, *row, "t / dense", r["best_s"] / dense, OF_DENSE[call])
    return machine


def measure_growth(table, names, common):
    for name, (bar, lengths, call) in GROWTH.items():
        if names and name not in names:
            continue
        before = None
        for n in lengths:
            r = bench([call(n)], [*common, "--length", str(n), "--heads", "1"])["results"][0]
            if before is not None:
                table.add(call(n), n, r["density"], r["best_s"], "t(N) / t(N/2)", r["best_s"] / before, bar)
            before = r["best_s"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path, metavar="F")
    args = parser.parse_args()
    known = {c.split(":")[0] for c in (*CAUSAL, *FULL)}
    for name in args.names:
        if name not in known:
            sys.exit(f"{name}: no planner with a bar, expected one of {', '.join(sorted(known))}")
    common = ["--dtype", args.dtype, "--repeat", str(args.repeat)]
    table = Table()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "input.safetensors"
        write_input(path)
        machine = measure_planners(table, args.names, common, path)
        measure_growth(table, args.names, common)
    bars = [r for r in table.rows if r["met"] is not None]
    print(f"\n{sum(r['met'] for r in bars)} of {len(bars)} bars met")
    if args.json:
        args.json.write_text(json.dumps({"dtype": args.dtype, "machine": machine, "rows": table.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
