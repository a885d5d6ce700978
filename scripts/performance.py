#!/usr/bin/env python3
"""Measures how fast heed is on this machine, other programs beside it, and renders what docs/performance.md shows.

    scripts/performance.py measure [--short] [NAME ...]   runs of heed bench: build/performance/NAME.json; wants a quiet machine
    scripts/performance.py render [--short]               the tables of docs/performance.md, and docs/roofline.svg

A measurement that exists is not repeated: delete its file. --short measures small sizes and keeps and renders them in
build/performance-short: to see that it works. A program that is not installed (scripts/deps.sh peers) or fails is left out,
with the line that says why. Only Python's standard library is used.
"""
import datetime
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
HEED = os.environ.get("HEED_COMMAND", str(ROOT / "build/bin/heed"))
CACHE = pathlib.Path(
    os.environ.get("HEED_CACHE")
    or pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "heed"
)
SMOLLM2, GEMMA3 = str(CACHE / "smollm2-135m-instruct-q4_1.gguf"), str(CACHE / "gemma-3-270m-q4_k_m.gguf")
STREAMING, MOBA = "streaming:sink=64,window=512", "moba:block=128,top_k=8"
MODEL_MOBA, MODEL_STREAMING = "moba:block=64,top_k=8,sink=64", "streaming:sink=4,window=512"
OPENVINO = ["openvino", "openvino:trishape", "openvino:xattention"]


def options(mechanisms=(), against=(), **named):
    words = []
    for name, value in named.items():
        words += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    for mechanism in mechanisms:
        words += ["--mechanism", mechanism]
    for peer in against:
        words += ["--against", peer]
    return words


# Name -> arguments of heed bench. Lengths, repeats and dtypes are what about fifteen minutes on two cores allow.
def measurements(short):
    n = 2048 if short else 16384
    dense = {"mechanisms": ["dense"], "against": ["torch"]}
    runs = {
        "peak": ["peak"],
        "one-head-64": ["attend", *options(**dense, length=n, heads=1, head_size=64, repeat=5)],
        "one-head-128": ["attend", *options(**dense, length=n, heads=1, head_size=128, repeat=3)],
        "one-thread": ["attend", *options(mechanisms=["dense"], length=n, heads=1, threads=1, repeat=3)],
        "four-heads-4k": ["attend", *options(**dense, length=n // 4, heads=4, full=True, repeat=5)],
        "four-heads-16k": ["attend", *options(**dense, length=n, heads=4, full=True, dtype="f32", repeat=3)],
        "one-head-64k": ["attend", *options(**dense, length=n * 4, heads=1, dtype="f32", repeat=1)],
        "sparse": [
            "attend",
            *options(["dense", STREAMING, MOBA], ["torch"], length=n * 2, heads=2, dtype="f32", repeat=3),
        ],
        "sparse-bf16": ["attend", *options(["dense", STREAMING, MOBA], length=n * 2, heads=2, dtype="bf16", repeat=3)],
        "backward-4k": ["backward", *options(["dense"], ["torch"], length=n // 4, heads=4, dtype="both", repeat=5)],
        "backward-16k": ["backward", *options(["dense", MOBA], ["torch"], length=n, heads=2, dtype="both", repeat=2)],
        "linear-smollm2": ["linear", SMOLLM2, *options(against=["torch"], rows=512, repeat=3 if short else 7)],
        "linear-gemma3": ["linear", GEMMA3, *options(against=["torch"], rows=512, repeat=3)],
    }
    tokens, contexts = (600, "512,600") if short else (6900, "512,2000,8000")
    mechanisms = ["dense", MODEL_MOBA, MODEL_STREAMING]
    runs |= {
        "prefill-openvino": ["prefill", SMOLLM2, *options(mechanisms, OPENVINO, length=tokens, repeat=2)],
        "prefill-llama": ["prefill", SMOLLM2, *options(mechanisms, ["llama.cpp"], length=f"512,{tokens}", repeat=2)],
        "decode-llama": ["decode", SMOLLM2, *options(mechanisms, ["llama.cpp"], length=contexts, repeat=3)],
    }
    return runs


def folder(short):
    return ROOT / "build" / ("performance-short" if short else "performance")


# One run of heed bench, without those peers that are not installed.
def bench(arguments, out):
    while True:
        run = subprocess.run(
            [HEED, "bench", *arguments, "--json", str(out)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False,
        )
        sys.stderr.write(run.stderr)
        missing = re.match(r"heed: --against (\S+): ", run.stderr)
        if run.returncode == 0 or not missing:
            return run
        at = [i for i, word in enumerate(arguments) if word == "--against" and arguments[i + 1] == missing[1]][0]
        arguments = arguments[:at] + arguments[at + 2 :]


def measure(short, names):
    where, begin = folder(short), time.monotonic()
    where.mkdir(parents=True, exist_ok=True)
    for name, arguments in measurements(short).items():
        out = where / f"{name}.json"
        if out.exists() or (names and name not in names):
            continue
        print(f"{time.monotonic() - begin:5.0f} s  {name}: heed bench {' '.join(arguments)}", flush=True)
        run = bench(arguments, out)
        if run.returncode == 0:
            result = json.loads(out.read_text())
            shown = [w.replace(str(CACHE) + "/", "") for w in run.args[1:-2]]
            result |= {"command": " ".join(["heed", *shown]), "date": datetime.date.today().isoformat()}
            out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{time.monotonic() - begin:5.0f} s  done", flush=True)


def load(short):
    found = {name: folder(short) / f"{name}.json" for name in measurements(short)}
    return {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}


# Tables

PEERS = {"torch": "torch", "llama.cpp": "llama.cpp (llama-cpp-python", "openvino": "OpenVINO GenAI"}


def titled(name, against):
    program, _, mode = name.partition(":")
    title = PEERS[program] + " " + against["version"] + (")" if "(" in PEERS[program] else "")
    return title + (f", {mode.upper()}" if mode else "")


def percent(x):
    return f"{100 * x:.0f} %"


def seconds(x):
    return f"{1e3 * x:.1f} ms" if x < 1 else f"{x:.2f} s"


def error(x):
    return "–" if x is None else f"{x:.0e}".replace("e-0", "e-")


def source(*runs):
    lines = [f"`{r['command']}`" for r in runs if r]
    dates = sorted({r["date"] for r in runs if r})
    return f"{', '.join(lines)}; {' and '.join(dates)}" if lines else ""


def peak_table(runs):
    r = runs["peak"]
    lines = ["| threads | f32 | bf16 products | int8 products | reading |", "|---|---|---|---|---|"]
    for p in r["peaks"]:
        some = [f"{p[k] * 1e-9:.0f} G{u}/s" if p[k] else "none" for k, u in (("bf16_flops", "F"), ("int8_ops", "O"))]
        read = f"{p['read_bytes_per_s'] * 1e-9:.1f} GB/s"
        lines.append(f"| {p['threads']} | {p['f32_flops'] * 1e-9:.0f} GF/s | {some[0]} | {some[1]} | {read} |")
    return [*lines, "", f"{r['machine']}, {r['isa']}. {source(r)}."]


def attend_rows(r, lines):
    for x in r["results"]:
        what = f"{r['heads']} × N = {r['length']:,}, D = {r['head_size']}" + ("" if r["threads"] > 1 else ", one thread")
        row = f"| {what} | `{x['mechanism']}`{'' if x['causal'] else ' full'} | {x['dtype']} | {seconds(x['best_s'])} | "
        row += f"{x['flops_per_s'] * 1e-9:.0f} GF/s, {percent(x['share_of_peak'])} | {error(x['max_relative_error'])} | "
        torch = (x.get("against") or {}).get("torch")
        if torch:
            name = "SDPA" if torch["function"].startswith("scaled") else "FlexAttention"
            row += f"{seconds(torch['best_s'])} {name}, {percent(torch['share_of_peak'])} | "
            row += f"{error(torch['max_relative_error'])} | **{torch['ratio']:.2f} ×** |"
        else:
            row += "– | – | – |"
        lines.append(row)


def attend_table(names):
    def table(runs):
        lines = ["| tensors | mechanism | | heed | of the peak | error | torch | error | ratio |", "|---" * 9 + "|"]
        chosen = [runs[n] for n in names if n in runs]
        for r in chosen:
            attend_rows(r, lines)
        return [*lines, "", f"{chosen[0]['machine']}, {chosen[0]['isa']}, {chosen[0]['threads']} threads. {source(*chosen)}."]

    return table


def backward_table(runs):
    lines = [
        "| tensors | mechanism | | forward | + backward | of the f32 peak | torch, dense | ratio |",
        "|---" * 8 + "|",
    ]
    chosen = [runs[n] for n in ("backward-4k", "backward-16k") if n in runs]
    for r in chosen:
        for x in r["results"]:
            torch = (x.get("against") or {}).get("torch")
            theirs = f"{seconds(torch['both_s'])} | **{torch['ratio']:.2f} ×**" if torch else "– | –"
            lines.append(
                f"| {r['heads']} × N = {r['length']:,}, D = {r['head_size']} | `{x['mechanism']}`{'' if x['causal'] else ' full'} "
                f"| {x['dtype']} | {seconds(x['forward_s'])} | {seconds(x['both_s'])} | {percent(x['share_of_f32_peak'])} | {theirs} |"
            )
    return [*lines, "", f"{chosen[0]['machine']}, {chosen[0]['isa']}, {chosen[0]['threads']} threads. {source(*chosen)}."]


def linear_table(runs):
    lines = ["| model | matrix | format | heed | of the peak | torch | ratio |", "|---" * 7 + "|"]
    below = []
    chosen = [(n, runs[f"linear-{n}"]) for n in ("smollm2", "gemma3") if f"linear-{n}" in runs]
    for name, r in chosen:
        for x in r["results"]:
            torch = (x.get("against") or {}).get("torch")
            theirs = f"{torch['flops_per_s'] * 1e-9:.0f} GF/s | **{torch['ratio']:.2f} ×**" if torch else "– | –"
            lines.append(
                f"| {name} | {x['inputs']} → {x['outputs']} | {x['format']} | {x['flops_per_s'] * 1e-9:.0f} GF/s | "
                f"{percent(x['share_of_peak'])} | {theirs} |"
            )
        one = r["one_row"]
        below.append(
            f"One row through all {one['matrices']} matrices of {name} ({one['bytes'] / 2**20:.0f} MiB), as decoding does: "
            f"{1e3 * one['seconds']:.2f} ms, {one['bytes_per_s'] * 1e-9:.1f} GB/s, {percent(one['share_of_read'])} of reading."
        )
    machine = chosen[0][1]
    return [*lines, "", *below, "", f"{machine['machine']}, {machine['isa']}. {source(*(r for _, r in chosen))}."]


def model_table(names):
    def table(runs):
        chosen = [runs[n] for n in names if n in runs]
        decode = chosen[0]["phase"] == "decode"
        head = "| context | | tokens/s | ms a token |" if decode else "| tokens | | tokens/s | of the peak |"
        lines = [head + " heed is faster by |", "|---" * 5 + "|"]
        for r in chosen:
            for length in dict.fromkeys(x["length"] for x in r["results"]):
                rows = [x for x in r["results"] if x["length"] == length]
                for x in rows:
                    more = f"{1e3 / x['tokens_per_s']:.2f}" if decode else percent(x["share_of_peak"])
                    lines.append(f"| {length:,} | heed `{x['mechanism']}` | {x['tokens_per_s']:.0f} | {more} | |")
                for name, theirs in rows[0].get("against", {}).items():
                    more = f"{1e3 / theirs['tokens_per_s']:.2f}" if decode else ""
                    factors = ", ".join(
                        f"**{x['against'][name]['ratio']:.2f} ×** ({x['mechanism'].partition(':')[0]})" for x in rows
                    )
                    lines.append(
                        f"| {length:,} | {titled(name, theirs)} | {theirs['tokens_per_s']:.0f} | {more} | {factors} |"
                    )
        r = chosen[0]
        return [*lines, "", f"{r['machine']}, {r['isa']}, {r['threads']} threads. {source(*chosen)}."]

    return table


TABLES = {
    "peak": (["peak"], peak_table),
    "dense": (
        names := ["one-head-64", "one-head-128", "four-heads-4k", "four-heads-16k", "one-head-64k", "one-thread"],
        attend_table(names),
    ),
    "sparse": (names := ["sparse", "sparse-bf16"], attend_table(names)),
    "backward": (["backward-4k", "backward-16k"], backward_table),
    "linear": (["linear-smollm2", "linear-gemma3"], linear_table),
    "prefill": (names := ["prefill-openvino", "prefill-llama"], model_table(names)),
    "decode": (["decode-llama"], model_table(["decode-llama"])),
}


# The roofline


# (flops a byte, flops a second, label, group): what was measured, over the bytes that it must move.
def points(runs):
    found, halves = [], runs["peak"]["peaks"][-1]["bf16_flops"] > 0
    for name in ("one-head-64", "one-head-128", "sparse", "sparse-bf16"):
        for x in runs.get(name, {"results": []})["results"]:
            if x["dtype"] == "bf16" and not halves:
                continue  # multiplied as f32: the same dot again
            size = runs[name]["head_size"]
            text = f"{x['mechanism'].partition(':')[0]}, {runs[name]['length'] // 1024}k, D = {size}, {x['dtype']}"
            found.append((4 * x["pairs"] * size / x["bytes"], x["flops_per_s"], text, "attention"))
    for name, r in runs.items():
        if not name.startswith("linear-"):
            continue
        model, wide = name.partition("-")[2], 2 if halves else 4
        largest = max(r["results"], key=lambda x: x["inputs"] * x["outputs"])
        i, o, rows = largest["inputs"], largest["outputs"], r["rows"]
        bytes_moved = wide * (i * o + rows * i) + 4 * rows * o
        found.append((2 * rows * i * o / bytes_moved, largest["flops_per_s"], f"{model}: {rows} rows × {i} → {o}", "linear"))
        one = r["one_row"]
        intensity = 2 * one["weights"] / one["bytes"]
        found.append((intensity, intensity * one["bytes_per_s"], f"{model}: one row, decoding", "decode"))
    return found


COLOURS = {"attention": "#1f6feb", "linear": "#1a7f37", "decode": "#d68910"}


def svg(runs):
    peak = runs["peak"]["peaks"][-1]
    width, height, left, bottom, right = 860, 520, 64, 56, 30
    found = points(runs)
    low_x, high_x = 1, 10 ** math.ceil(math.log10(max([p[0] for p in found] + [1000])))
    roofs = [(peak["f32_flops"], "f32 multiply-adds")]
    if peak["bf16_flops"]:
        roofs.append((peak["bf16_flops"], "bf16 products"))
    top = max([r[0] for r in roofs] + [p[1] for p in found]) * 1.6
    low_y = min([p[1] for p in found] + [peak["read_bytes_per_s"]]) * 0.5

    def px(v):
        return left + (width - left - right) * (math.log10(v) - math.log10(low_x)) / (math.log10(high_x) - math.log10(low_x))

    def py(v):
        return height - bottom - (height - bottom - 40) * (math.log10(v) - math.log10(low_y)) / (
            math.log10(top) - math.log10(low_y)
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="24" font-size="15" font-weight="bold">{runs["peak"]["machine"]}, {runs["peak"]["isa"]}, '
        f'{peak["threads"]} threads</text>',
    ]
    for decade in range(0, int(math.log10(high_x)) + 1):
        x = px(10**decade)
        parts.append(f'<line x1="{x:.0f}" y1="40" x2="{x:.0f}" y2="{height - bottom}" stroke="#eee"/>')
        parts.append(f'<text x="{x:.0f}" y="{height - bottom + 18}" text-anchor="middle" fill="#555">{10**decade:,}</text>')
    for exponent in range(int(math.log10(low_y)), int(math.log10(top)) + 1):
        for step in (1, 2, 5):
            v = step * 10**exponent
            if low_y <= v <= top:
                parts.append(f'<line x1="{left}" y1="{py(v):.0f}" x2="{width - right}" y2="{py(v):.0f}" stroke="#eee"/>')
                parts.append(
                    f'<text x="{left - 6}" y="{py(v) + 4:.0f}" text-anchor="end" fill="#555">{v * 1e-9:g}</text>'
                )
    read = peak["read_bytes_per_s"]
    for flops, name in roofs:
        knee = flops / read
        parts.append(
            f'<line x1="{px(knee):.1f}" y1="{py(flops):.1f}" x2="{width - right}" y2="{py(flops):.1f}" stroke="#444" '
            'stroke-width="2"/>'
        )
        parts.append(
            f'<text x="{px(knee) + 4:.0f}" y="{py(flops) - 8:.0f}" fill="#444">{name}: {flops * 1e-9:.0f} GF/s</text>'
        )
    knee, start = max(r[0] for r in roofs) / read, max(low_x, low_y / read)
    parts.append(
        f'<line x1="{px(start):.1f}" y1="{py(start * read):.1f}" x2="{px(knee):.1f}" y2="{py(knee * read):.1f}" stroke="#444" '
        'stroke-width="2"/>'
    )
    slope = math.degrees(math.atan2(py(read) - py(10 * read), px(10) - px(1)))
    at = math.sqrt(start * knee)
    parts.append(
        f'<text transform="translate({px(at) - 6:.0f},{py(at * read) - 6:.0f}) rotate({-slope:.0f})" text-anchor="middle" '
        f'fill="#444">reading memory: {read * 1e-9:.1f} GB/s</text>'
    )
    for x, y, _, group in found:
        parts.append(f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="4.5" fill="{COLOURS[group]}"/>')
    for x, y, at, text, end in place([(px(x), py(y), text) for x, y, text, _ in found], width - right):
        anchor = ' text-anchor="end"' if end else ""
        parts.append(f'<text x="{x:.0f}" y="{at:.0f}"{anchor}>{text}</text>')
    parts.append(
        f'<text x="{(left + width - right) / 2:.0f}" y="{height - 12}" text-anchor="middle">flops for each byte that must come '
        "from memory</text>"
    )
    parts.append(
        f'<text transform="translate(18,{height / 2:.0f}) rotate(-90)" text-anchor="middle">GF/s, pairs attended only</text>'
    )
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


# Labels beside their points, on the left where the right has no room, pushed down until none covers another.
def place(labels, edge):
    taken, placed = [], []
    for x, y, text in sorted(labels, key=lambda p: p[1]):
        long = 6.6 * len(text)
        end = x + 9 + long > edge
        begin = x - 9 - long if end else x + 9
        at = y + 4
        while any(abs(at - ty) < 13 and begin < tx + tl and tx < begin + long for tx, ty, tl in taken):
            at += 2
        taken.append((begin, at, long))
        placed.append((x - 9 if end else x + 9, y, at, text, end))
    return placed


def render(short):
    runs = load(short)
    page = ROOT / "docs" / "performance.md"
    text = page.read_text()
    for name, (needed, table) in TABLES.items():
        begin, end = f"<!-- table {name} -->", "<!-- end -->"
        if any(n in runs for n in needed):
            at = text.index(begin) + len(begin)
            text = text[:at] + "\n\n" + "\n".join(table(runs)) + "\n\n" + text[text.index(end, at) :]
    where = folder(True) if short else ROOT / "docs"
    (where / "performance.md").write_text(text)
    if "peak" in runs:
        (where / "roofline.svg").write_text(svg(runs))


if __name__ == "__main__":
    words = [w for w in sys.argv[1:] if w != "--short"]
    is_short = "--short" in sys.argv
    known = measurements(is_short)
    if words[:1] == ["measure"] and all(w in known for w in words[1:]):
        measure(is_short, words[1:])
    elif words == ["render"]:
        render(is_short)
    else:
        sys.exit(__doc__)
