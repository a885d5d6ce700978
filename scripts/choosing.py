#!/usr/bin/env python3
"""Measures every mechanism that runs on a model at about the same density, and renders what docs/choosing.md shows.

    scripts/choosing.py measure smollm2|gemma3 [NAME ...]   what is lost: build/choosing/MODEL-NAME.json
    scripts/choosing.py time smollm2|gemma3                 how fast: build/choosing/MODEL-times.json; wants a quiet machine
    scripts/choosing.py render                              the tables of docs/choosing.md, and docs/choosing.svg

Both are runs of heed compare. A measurement that exists is not repeated: delete its file. Only Python's standard library is used.
"""
import json
import math
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "build" / "choosing"
CACHE = pathlib.Path(
    os.environ.get("HEED_CACHE")
    or pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "heed"
)
MODELS = {
    "smollm2": {"title": "SmolLM2-135M", "file": "smollm2-135m-instruct-q4_1.gguf", "length": 4000, "gap": 3500, "proxies": 3},
    "gemma3": {"title": "Gemma 3 270M", "file": "gemma-3-270m-q4_k_m.gguf", "length": 7000, "gap": 6500, "proxies": 1},
}
TOKENS = 8000
# Parameters that give about an eighth of dense attention's pairs at 8,000 tokens (blockrank: what its mask gives).
# The number of proxy heads is what `heed calibrate` finds for the model.
CALLS = {
    "dense": "dense",
    "streaming": "streaming:sink=4,window=512",
    "moa": "moa:alpha=0,beta=0.064",
    "power": "power:block=64",
    "s2": "s2:local_blocks=4,stride_blocks=16,allow_partial=true",
    "moba": "moba:block=64,top_k=8,sink=64",
    "flash-moba": "flash-moba:block=64,top_k=9",
    "hip": "hip:budget=256,window=256",
    "dhsa": "dhsa:budget=512,global=64,local=128",
    "proxy-attn": "proxy-attn:proxy_heads={proxies},min_budget=512,mass=0.6,block=64",
    "pbs-attn": "pbs-attn:block=64,segment=256,mass=0.5",
    "seer-attention": "seer-attention:oracle=true,density=0.13",
    "psa": "psa:ratios=1:.06,2:.1,4:.15,8:.3",
    "blockrank": "blockrank:segment=300",
}


def compare(model, calls, out, extra):
    command = [
        os.environ.get("HEED_COMMAND", str(ROOT / "build/bin/heed")), "compare", str(CACHE / MODELS[model]["file"]),
        "--file", str(CACHE / "bible-kjv.txt"), "--tokens", str(TOKENS), "--json", str(out), *extra,
    ]
    for name in calls:
        command += ["--mechanism", CALLS[name].format(**MODELS[model])]
    RESULTS.mkdir(parents=True, exist_ok=True)
    print(model, *calls, flush=True)
    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode != 0:
        print(f"{model} {' '.join(calls)}: failed", file=sys.stderr)


def measure(model, names):
    about = MODELS[model]
    tasks = ["--task", "perplexity,passkey,copy", "--passkey-length", str(about["length"]), "--copy-gap", str(about["gap"])]
    for name in names or CALLS:
        out = RESULTS / f"{model}-{name}.json"
        if not out.exists():
            compare(model, [name], out, tasks)


def time(model):
    out = RESULTS / f"{model}-times.json"
    if not out.exists():
        # The shortest task there is: the document is read and timed, and nothing is scored.
        compare(model, list(CALLS), out, ["--task", "copy", "--copy-gap", "1"])


# Rows by name: what was lost, and the seconds of the timed run where there was one.
def load(model):
    rows = {}
    for name in CALLS:
        path = RESULTS / f"{model}-{name}.json"
        if path.exists():
            whole = json.loads(path.read_text())
            rows[name] = whole["mechanisms"][0] | {"machine": whole["machine"], "isa": whole["isa"]}
            rows[name] |= {"prefill_s": None, "attention_s": None}
    times = RESULTS / f"{model}-times.json"
    if times.exists():
        for name, row in zip(CALLS, json.loads(times.read_text())["mechanisms"]):
            if name in rows:
                rows[name] |= {"prefill_s": row["prefill_s"], "attention_s": row["attention_s"]}
    return rows


def faster(dense, row, key):
    return dense[key] / row[key] if dense[key] and row[key] else None


def ratio(dense, row, key):
    x = faster(dense, row, key)
    return f"{x:.2f} ×" if x else "–"


def table(about, rows):
    dense = rows["dense"]
    lines = [
        "| mechanism | density | prefill | attention | perplexity | pass key | copy, nats |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, r in sorted(rows.items(), key=lambda item: item[1]["ppl"]):
        keys = r["tasks"]["passkey"]
        copies = r["tasks"]["copy"]
        second = sum(c["nll_second"] for c in copies) / len(copies)
        lines.append(
            f"| `{CALLS[name].format(**about)}` | {100 * r['density']:.1f} % | {ratio(dense, r, 'prefill_s')} | "
            f"{ratio(dense, r, 'attention_s')} | {r['ppl']:.2f} | "
            f"{sum(k['found'] for k in keys)}/{len(keys)} | {second:.2f} |"
        )
    first = [c["nll_first"] for c in dense["tasks"]["copy"]]
    lines.append("")
    lines.append(
        f"prefill and attention: times faster than dense at {TOKENS:,} tokens ({dense['isa']}, two cores). copy: nats a token "
        f"over the second occurrence; dense needs {sum(first) / len(first):.2f} for the first."
    )
    return "\n".join(lines)


# Where a label stands beside its point so that labels do not cover each other: pushed down until free.
def place(points):
    taken, placed = [], []
    for x, y, text in sorted(points, key=lambda p: p[1]):
        at = y + 4
        while any(abs(at - ty) < 13 and x < tx + tw and tx < x + 7 * len(text) for tx, ty, tw in taken):
            at += 3
        taken.append((x, at, 7 * len(text)))
        placed.append((x, y, at, text))
    return placed


def svg(models):
    width, height, pad = 470, 400, 56
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * len(models)}" height="{height + 30}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for i, (model, rows) in enumerate(models.items()):
        dense = rows["dense"]
        data = [(faster(dense, r, "attention_s") or 1, r["nll"] - dense["nll"], n, r) for n, r in rows.items()]
        top = max(d[0] for d in data) * 1.12
        high = max(d[1] for d in data) * 1.08 + 1e-9
        low = min(0, min(d[1] for d in data)) - 0.03 * high
        x0 = i * width + pad

        def px(v):
            return x0 + (width - pad - 30) * v / top

        # Differences span two orders of magnitude: a root spreads the small ones.
        def py(v):
            f = math.copysign(math.sqrt(abs(v)), v)
            a, b = math.copysign(math.sqrt(abs(low)), low), math.sqrt(high)
            return height - 40 - (height - 90) * (f - a) / (b - a)

        parts.append(f'<text x="{x0}" y="24" font-size="15" font-weight="bold">{MODELS[model]["title"]}</text>')
        parts.append(f'<line x1="{x0}" y1="{height - 30}" x2="{x0 + width - pad - 20}" y2="{height - 30}" stroke="#888"/>')
        parts.append(f'<line x1="{x0}" y1="40" x2="{x0}" y2="{height - 30}" stroke="#888"/>')
        for tick in range(1, int(top) + 1):
            parts.append(f'<text x="{px(tick):.0f}" y="{height - 14}" text-anchor="middle" fill="#555">{tick}×</text>')
        for tick in (0, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2):
            if tick <= high:
                parts.append(f'<text x="{x0 - 6}" y="{py(tick) + 4:.0f}" text-anchor="end" fill="#555">{tick:g}</text>')
                parts.append(
                    f'<line x1="{x0}" y1="{py(tick):.0f}" x2="{x0 + width - pad - 20}" y2="{py(tick):.0f}" stroke="#eee"/>'
                )
        parts.append(
            f'<text x="{x0 + (width - pad) / 2:.0f}" y="{height + 8}" text-anchor="middle">attention, times faster than dense'
            "</text>"
        )
        parts.append(
            f'<text transform="translate({x0 - 40},{height / 2:.0f}) rotate(-90)" text-anchor="middle">'
            "nats a token lost</text>"
        )
        for x, y, name, r in data:
            keys = r["tasks"]["passkey"]
            share = sum(k["found"] for k in keys) / len(keys)
            colour = "#1a7f37" if share == 1 else "#c0392b" if share <= 0.34 else "#d68910"
            parts.append(f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="5" fill="{colour}"/>')
        for x, y, at, text in place([(px(d[0]) + 9, py(d[1]), d[2]) for d in data]):
            parts.append(f'<text x="{x:.0f}" y="{at:.0f}">{text}</text>')
    parts.append(
        f'<text x="{pad}" y="{height + 24}" fill="#555">pass key: green found at every depth, orange at some, red at a third or less</text>'
    )
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def render():
    models = {m: load(m) for m in MODELS}
    models = {m: rows for m, rows in models.items() if "dense" in rows}
    page = ROOT / "docs" / "choosing.md"
    text = page.read_text()
    for model, rows in models.items():
        begin, end = f"<!-- table {model} -->", "<!-- end -->"
        if begin not in text:
            continue
        at = text.index(begin) + len(begin)
        text = text[:at] + "\n\n" + table(MODELS[model], rows) + "\n\n" + text[text.index(end, at):]
    page.write_text(text)
    (ROOT / "docs" / "choosing.svg").write_text(svg(models))


if __name__ == "__main__":
    if len(sys.argv) >= 3 and sys.argv[1] == "measure" and sys.argv[2] in MODELS:
        measure(sys.argv[2], sys.argv[3:])
    elif len(sys.argv) == 3 and sys.argv[1] == "time" and sys.argv[2] in MODELS:
        time(sys.argv[2])
    elif sys.argv[1:] == ["render"]:
        render()
    else:
        sys.exit(__doc__)
