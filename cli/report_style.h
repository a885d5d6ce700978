// The style sheet of the report.
#pragma once

namespace heed::cli {

inline constexpr const char* report_style = R"(
:root {
  --page: #fbfaf7; --card: #ffffff; --ink: #1d2129; --muted: #687180; --line: #e4e2dc; --good: #1c7c54; --bad: #b8324a;
  --s0: #6b7484; --s1: #2f6fd6; --s2: #d2691e; --s3: #23936b; --s4: #9a4fc0; --s5: #c23a62; --s6: #80741a; --s7: #1790a0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14161a; --card: #1c1f25; --ink: #e8e9ec; --muted: #98a1b0; --line: #2e333c; --good: #5fd0a0; --bad: #ff8097;
    --s0: #a2acbc; --s1: #74a8ff; --s2: #ff9d5c; --s3: #57cf9f; --s4: #cb92ee; --s5: #ff7fa3; --s6: #d3c455; --s7: #56cbdb;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 56px 24px 72px; }
.kicker { color: var(--muted); font-size: 14px; letter-spacing: 0.02em; margin: 0 0 12px; }
h1 { font-size: 31px; line-height: 1.28; font-weight: 650; letter-spacing: -0.012em; margin: 0 0 14px; max-width: 27em; text-wrap: balance; }
.lead { font-size: 17px; color: var(--muted); margin: 0 0 36px; max-width: 50em; }
h2 { font-size: 19px; font-weight: 650; margin: 44px 0 4px; }
h3 { font-size: 15px; font-weight: 600; margin: 0 0 12px; }
p.note { color: var(--muted); font-size: 14px; margin: 0 0 14px; max-width: 60em; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px 22px; }
.scroll { overflow-x: auto; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 20px; }
@media (max-width: 760px) { .two { grid-template-columns: 1fr; } h1 { font-size: 25px; } main { padding-top: 32px; } }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { color: var(--muted); font-weight: 500; text-align: right; padding: 4px 0 8px 18px; white-space: nowrap; vertical-align: bottom; }
td { text-align: right; padding: 9px 0 9px 18px; border-top: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.name { font-weight: 600; }
td.name small { display: block; font-weight: 400; color: var(--muted); font-size: 12.5px; }
.chip { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 8px; }
.good { color: var(--good); } .bad { color: var(--bad); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 22px; font-size: 14px; margin: 0 0 10px; }
svg { display: block; width: 100%; height: auto; overflow: visible; font-family: inherit; }
.label { font-size: 13px; fill: var(--ink); } .value { font-size: 13px; fill: var(--muted); font-variant-numeric: tabular-nums; }
.tick, .axis { font-size: 12.5px; fill: var(--muted); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); } .zero { stroke: var(--muted); }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
)"
// One rule a series for what is filled, drawn and shown as a chip.
#define HEED_SERIES(n)                                                                          \
  ".bar.s" #n " { fill: var(--s" #n "); } .line.s" #n " { stroke: var(--s" #n "); } .chip.s" #n \
  " { background: var(--s" #n "); }\n"
    HEED_SERIES(0) HEED_SERIES(1) HEED_SERIES(2) HEED_SERIES(3) HEED_SERIES(4) HEED_SERIES(5) HEED_SERIES(6)
        HEED_SERIES(7)
#undef HEED_SERIES
            R"(.plans { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 22px; }
figure { margin: 0; }
figure img { display: block; width: 100%; border-radius: 6px; border: 1px solid var(--line); background: #fff; }
figcaption { font-size: 13px; color: var(--muted); margin-top: 8px; line-height: 1.4; }
figcaption b { color: var(--ink); font-weight: 600; display: block; }
.ramp { display: inline-block; width: 120px; height: 10px; border-radius: 3px; vertical-align: middle; margin: 0 6px;
  background: linear-gradient(90deg, rgb(248 221 190), rgb(228 128 116), rgb(140 52 122), rgb(36 18 84)); }
.key { font-weight: 600; } .keys td { font-size: 15px; }
footer { margin-top: 52px; padding-top: 18px; border-top: 1px solid var(--line); color: var(--muted); font-size: 13.5px; }
footer dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; margin: 0; }
footer dd { margin: 0; color: var(--ink); overflow-wrap: anywhere; }
)";

}  // namespace heed::cli
