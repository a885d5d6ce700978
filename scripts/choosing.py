#!/usr/bin/env python3
"""Measures every mechanism that runs on a model at about the same density, and renders what docs/choosing.md shows.

    scripts/choosing.py fit smollm2|gemma3                  what is fitted to the model: build/choosing/MODEL-NAME.safetensors
    scripts/choosing.py measure smollm2|gemma3 [NAME ...]   what is lost: build/choosing/MODEL-NAME.json
    scripts/choosing.py time smollm2|gemma3                 how fast: build/choosing/MODEL-times*.json; wants a quiet machine
    scripts/choosing.py render                              the tables of docs/choosing.md, and docs/choosing.svg

They are runs of heed calibrate, which then needs libtorch, and of heed compare. A file that exists is not made again: delete it.
Fitted mechanisms are measured where they were fitted before. Only Python's standard library is used.
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
# The same with what `heed calibrate` learned from the text behind the measured part, and how it is told to.
FITTED = {
    "moa-fitted": ("moa", ["--density", "0.125", "--pieces", "4", "--tokens", "4096"]),
    "dhsa-fitted": (CALLS["dhsa"], ["--pieces", "8", "--tokens", "2048"]),
    "seer-attention-fitted": ("seer-attention:density=0.13", ["--pieces", "8", "--tokens", "4096"]),
}
EVERY = CALLS | {name: call for name, (call, _) in FITTED.items()}


def heed(model, command, options):
    RESULTS.mkdir(parents=True, exist_ok=True)
    program = os.environ.get("HEED_COMMAND", str(ROOT / "build/bin/heed"))
    text = ["--file", str(CACHE / "bible-kjv.txt")]
    words = [program, command, str(CACHE / MODELS[model]["file"]), *text, *options]
    if subprocess.run(words, stdout=subprocess.DEVNULL, check=False).returncode != 0:
        print(f"{' '.join(words)}: failed", file=sys.stderr)


def fitted(model, name):
    return RESULTS / f"{model}-{name}.safetensors"


def fit(model):
    for name, (call, how) in FITTED.items():
        if not fitted(model, name).exists():
            print(model, name, flush=True)
            # Parameters are said when it is used: what was given here would be kept.
            what = ["--mechanism", call.split(":")[0], "--skip", str(TOKENS), "-o", str(fitted(model, name))]
            heed(model, "calibrate", [*what, *how])


def compare(model, names, out, extra):
    if out.exists() or not all(fitted(model, n).exists() for n in names if n in FITTED):
        return
    options = ["--tokens", str(TOKENS), "--json", str(out), *extra]
    for name in names:
        options += ["--mechanism", EVERY[name].format(**MODELS[model])]
        if name in FITTED:
            options += ["--calibration", str(fitted(model, name))]
    print(model, *names, flush=True)
    heed(model, "compare", options)


def measure(model, names):
    about = MODELS[model]
    tasks = ["--task", "perplexity,passkey,copy", "--passkey-length", str(about["length"]), "--copy-gap", str(about["gap"])]
    for name in names or EVERY:
        compare(model, [name], RESULTS / f"{model}-{name}.json", tasks)


# The runs that are timed: dense attention is in each, as only what one run measured is divided.
def timed(model):
    runs = [("times", list(CALLS))] + [(f"times-{name}", ["dense", name]) for name in FITTED]
    return [(names, RESULTS / f"{model}-{run}.json") for run, names in runs]


def time(model):
    for names, out in timed(model):
        # The shortest task there is: the document is read and timed, and nothing is scored.
        compare(model, names, out, ["--task", "copy", "--copy-gap", "1"])


# Rows by name: what was lost, and how many times faster than dense attention the timed run was, where there was one.
def load(model):
    rows = {}
    for name in EVERY:
        path = RESULTS / f"{model}-{name}.json"
        if path.exists():
            whole = json.loads(path.read_text())
            rows[name] = whole["mechanisms"][0] | {"machine": whole["machine"], "isa": whole["isa"], "faster": {}}
    for names, path in timed(model):
        if path.exists():
            measured = dict(zip(names, json.loads(path.read_text())["mechanisms"]))
            for name, row in measured.items():
                if name in rows:
                    rows[name]["faster"] = {k: measured["dense"][k] / row[k] for k in ("prefill_s", "attention_s")}
    return rows


def ratio(row, key):
    return f"{row['faster'][key]:.2f} ×" if row["faster"] else "–"


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
            f"| `{EVERY[name].format(**about)}`{', fitted' if name in FITTED else ''} | {100 * r['density']:.1f} % | "
            f"{ratio(r, 'prefill_s')} | {ratio(r, 'attention_s')} | {r['ppl']:.2f} | "
            f"{sum(k['found'] for k in keys)}/{len(keys)} | {second:.2f} |"
        )
    first = [c["nll_first"] for c in dense["tasks"]["copy"]]
    lines.append("")
    lines.append(
        f"prefill and attention: times faster than dense at {TOKENS:,} tokens ({dense['isa']}, two cores). copy: nats a token "
        f"over the second occurrence; dense needs {sum(first) / len(first):.2f} for the first."
    )
    return "\n".join(lines)


# Heights of labels in a column beside the plot: as near to their points' as fit, in the points' order.
def spread(heights, gap, bottom):
    placed = []
    for y in heights:
        placed.append(max(y, placed[-1] + gap if placed else y))
    limit = bottom
    for k in reversed(range(len(placed))):
        placed[k] = min(placed[k], limit)
        limit = placed[k] - gap
    return placed


def label(name):
    return name.replace("-fitted", ", fitted") + (", oracle" if "oracle=true" in EVERY[name] else "")


def svg(models):
    width, height, pad, column = 560, 430, 56, 170  # column: of labels
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * len(models)}" height="{height + 30}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for i, (model, rows) in enumerate(models.items()):
        dense = rows["dense"]
        data = [(r["faster"].get("attention_s", 1), r["nll"] - dense["nll"], n, r) for n, r in rows.items()]
        top = max(d[0] for d in data) * 1.02
        left = 0.9 * min(d[0] for d in data)
        high = max(d[1] for d in data) * 1.08 + 1e-9
        low = min(0, min(d[1] for d in data)) - 0.03 * high
        x0, x1 = i * width + pad, (i + 1) * width - column

        def px(v):
            return x0 + (x1 - x0) * (v - left) / (top - left)

        # Differences span two orders of magnitude: a root spreads the small ones.
        def py(v):
            f = math.copysign(math.sqrt(abs(v)), v)
            a, b = math.copysign(math.sqrt(abs(low)), low), math.sqrt(high)
            return height - 40 - (height - 90) * (f - a) / (b - a)

        parts.append(f'<text x="{x0}" y="24" font-size="15" font-weight="bold">{MODELS[model]["title"]}</text>')
        parts.append(f'<line x1="{x0}" y1="{height - 30}" x2="{x1}" y2="{height - 30}" stroke="#888"/>')
        parts.append(f'<line x1="{x0}" y1="40" x2="{x0}" y2="{height - 30}" stroke="#888"/>')
        for tick in range(1, int(top) + 1) if top > 3 else (1, 1.25, 1.5, 1.75, 2, 2.5):
            if tick <= top:
                parts.append(f'<text x="{px(tick):.0f}" y="{height - 14}" text-anchor="middle" fill="#555">{tick:g}×</text>')
        for tick in (0, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2):
            if tick <= high:
                parts.append(f'<text x="{x0 - 6}" y="{py(tick) + 4:.0f}" text-anchor="end" fill="#555">{tick:g}</text>')
                parts.append(
                    f'<line x1="{x0}" y1="{py(tick):.0f}" x2="{x1}" y2="{py(tick):.0f}" stroke="#eee"/>'
                )
        parts.append(
            f'<text x="{(x0 + x1) / 2:.0f}" y="{height + 8}" text-anchor="middle">attention, times faster than dense'
            "</text>"
        )
        parts.append(
            f'<text transform="translate({x0 - 40},{height / 2:.0f}) rotate(-90)" text-anchor="middle">'
            "nats a token lost</text>"
        )
        points = sorted(((py(d[1]), px(d[0]), d[2], d[3]) for d in data), key=lambda p: p[:3])
        for at, (y, x, name, _) in zip(spread([p[0] for p in points], 14, height - 36), points):
            text = x1 + 14
            parts.append(f'<polyline points="{x:.1f},{y:.1f} {text - 10},{at:.1f} {text - 3},{at:.1f}" fill="none" stroke="#bbb"/>')
            parts.append(f'<text x="{text}" y="{at + 4:.1f}">{label(name)}</text>')
        for y, x, _, r in points:
            keys = r["tasks"]["passkey"]
            share = sum(k["found"] for k in keys) / len(keys)
            colour = "#1a7f37" if share == 1 else "#c0392b" if share <= 0.34 else "#d68910"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')
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
    elif len(sys.argv) == 3 and sys.argv[1] in ("fit", "time") and sys.argv[2] in MODELS:
        {"fit": fit, "time": time}[sys.argv[1]](sys.argv[2])
    elif sys.argv[1:] == ["render"]:
        render()
    else:
        sys.exit(__doc__)
