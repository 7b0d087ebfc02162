"""A receipt as one HTML page: verdict, what was looked at, plots, every finding.  Light, dark, and on paper."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyrosome.verify.plots import MAX_SERIES, drawn, shown

MAX_PLOTS = 40
_STATES = {"ok": "ok", "look": "look", "fail": "FAIL", "none": "left out"}

_LIGHT = """--ink: #1b1f24; --soft: #57606a; --paper: #ffffff; --card: #f6f8fa; --line: #d8dee4;
 --ok: #1a7f37; --look: #9a6700; --fail: #cf222e; --s0: #0969da; --s1: #bc4c00; --s2: #8250df; --s3: #1a7f37;
 --s4: #bf3989; --s5: #57606a;"""
_STYLE = (
    ":root { color-scheme: light dark; "
    + _LIGHT
    + " }"
    + """
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117; --card: #161b22;
 --line: #30363d; --ok: #3fb950; --look: #d29922; --fail: #f85149; --s0: #58a6ff; --s1: #f0883e; --s2: #bc8cff;
 --s3: #3fb950; --s4: #f778ba; --s5: #9198a1; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1040px; padding: 28px 20px 64px; background: var(--paper); color: var(--ink);
 font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 36px 0 10px; }
p { margin: 4px 0; }
.verdict { display: flex; gap: 14px; align-items: baseline; border-left: 6px solid var(--state); padding: 10px 16px;
 background: var(--card); border-radius: 4px; margin: 16px 0; flex-wrap: wrap; }
.verdict strong { color: var(--state); font-size: 18px; }
.ok { --state: var(--ok); } .look { --state: var(--look); }
.fail { --state: var(--fail); } .none { --state: var(--soft); }
.soft { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; }
td { overflow-wrap: anywhere; }
td.num, th.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.state { color: var(--state); font-weight: 600; white-space: nowrap; width: 72px; }
td.what { width: 30%; } td.name { white-space: nowrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 0; font-size: 14px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
details { border: 1px solid var(--line); border-radius: 6px; margin: 8px 0; padding: 0 14px; }
summary { cursor: pointer; padding: 9px 0; font-weight: 600; }
summary .soft { font-weight: 400; }
summary .state { color: var(--state); }
details[open] { padding-bottom: 10px; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 16px; }
figure { margin: 0; background: var(--card); border-radius: 6px; padding: 10px 12px; break-inside: avoid; }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 4px; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg .axis { fill: var(--ink); }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .bound { stroke: var(--fail); stroke-dasharray: 5 4; stroke-width: 1.3; }
svg .span { stroke: var(--ink); stroke-width: 1.6; opacity: 0.75; }
svg text.bound { fill: var(--fail); stroke: none; }
.legend { font-size: 12.5px; margin-top: 4px; }
.key { margin-right: 14px; } .key::before { content: ""; display: inline-block; width: 10px; height: 10px;
 border-radius: 2px; margin-right: 5px; background: var(--c); }
@media print { :root { color-scheme: light; PAPER } body { max-width: none; padding: 0; font-size: 11px; }
 details > *:not(summary) { display: revert; } details::details-content { content-visibility: visible; height: auto; }
 tr { break-inside: avoid; } }
""".replace("PAPER", _LIGHT)
    + "".join(
        f".s{i} {{ fill: var(--s{i}); --c: var(--s{i}); }}\n"
        f".l{i} {{ stroke: var(--s{i}); fill: none; stroke-width: 1.8; }}\n"
        for i in range(MAX_SERIES)
    )
)


def page(receipt: dict[str, Any]) -> str:
    """The whole page of a receipt as `Record.as_dict` makes it."""
    model = receipt.get("model") or {}
    name = str(model.get("name", receipt["asked"]["model"]))
    body = [
        f"<h1>Verification of {shown(name)}</h1>",
        f'<p class="soft">{shown(receipt["began"])}, {_seconds(receipt["seconds"])}</p>',
        _verdict(receipt),
        '<div class="wide">' + _summary(receipt) + "</div>",
        *_plots(receipt),
        "<h2>Findings</h2>",
        *map(_check, receipt["checks"]),
        "<h2>What was looked at, and where</h2>",
        *(_part(title, receipt.get(title) or {}) for title in ("model", "asked", "machine", "versions")),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>Verification of {shown(name)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main>{chr(10).join(body)}</main></body></html>\n"
    )


def _verdict(receipt: dict[str, Any]) -> str:
    n = receipt["counts"]
    state = "fail" if n["failed"] or not receipt["ok"] else "look" if n["warned"] else "ok"
    nothing = "Interrupted: not everything was looked at" if receipt["interrupted"] else "Nothing could be looked at"
    said = {
        "fail": "Something is wrong" if n["failed"] else nothing,
        "look": "Nothing failed; some findings deserve a look",
        "ok": "All is well",
    }[state]
    counted = f"{n['well']} held, {n['failed']} failed, {n['left_out']} left out"
    counted += f", {n['warned']} to look at" if n["warned"] else ""
    return f'<div class="verdict {state}"><strong>{said}</strong><span>{counted}</span></div>'


def _summary(receipt: dict[str, Any]) -> str:
    rows = "".join(map(_summed, receipt["checks"]))
    titles = "".join(f'<th class="num">{t}</th>' for t in ("held", "failed", "to look at", "left out", "time"))
    return f"<table><thead><tr><th></th><th>check</th>{titles}</tr></thead><tbody>{rows}</tbody></table>"


def _summed(check: dict[str, Any]) -> str:
    n, state = check["counts"], _of(check["counts"])
    cells = "".join(f'<td class="num">{n[k]}</td>' for k in ("well", "failed", "warned", "left_out"))
    name = f'<td class="state">{_STATES[state]}</td><td class="name">{shown(check["check"])}</td>'
    return f'<tr class="{state}">{name}{cells}<td class="num">{_seconds(check["seconds"])}</td></tr>'


def _of(counts: dict[str, int]) -> str:
    if counts["failed"]:
        return "fail"
    return "look" if counts["warned"] else "ok" if counts["well"] else "none"


def _state(finding: dict[str, Any]) -> str:
    if finding["ok"] is None:
        return "none"
    return "fail" if not finding["ok"] else "look" if finding.get("warns") else "ok"


def _plots(receipt: dict[str, Any]) -> Iterator[str]:
    figures = []
    for check in receipt["checks"]:
        for finding in check["findings"]:
            plots = finding["figures"].get("plots") if isinstance(finding["figures"], dict) else None
            figures += [drawn(p) for p in plots if isinstance(p, dict)] if isinstance(plots, list) else []
    figures = [f for f in figures if f][:MAX_PLOTS]
    if figures:
        yield "<h2>Plots</h2>"
        yield f'<div class="plots">{"".join(figures)}</div>'


def _check(check: dict[str, Any]) -> str:
    n, state = check["counts"], _of(check["counts"])
    said = f"{n['well']} held, {n['failed']} failed, {n['left_out']} left out, {_seconds(check['seconds'])}"
    rows = "".join(
        f'<tr class="{_state(f)}"><td class="state">{_STATES[_state(f)]}</td><td class="what">{shown(f["what"])}</td>'
        f"<td>{shown(f['detail'])}</td></tr>"
        for f in check["findings"]
    )
    opened = " open" if state in ("fail", "look") else ""
    title = f'<span class="state">{_STATES[state]}</span> {shown(check["check"])} <span class="soft">{said}</span>'
    table = f'<div class="wide"><table><tbody>{rows}</tbody></table></div>'
    return f'<details class="{state}"{opened}><summary>{title}</summary>{table}</details>'


def _part(title: str, values: dict[str, Any]) -> str:
    rows = "".join(
        f"<dt>{shown(k)}</dt><dd>{shown(_told(v))}</dd>" for k, v in values.items() if v not in (None, "", [])
    )
    return f"<details><summary>{shown(title)}</summary><dl>{rows}</dl></details>" if rows else ""


def _told(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_told(v)}" for k, v in value.items())
    return ", ".join(map(_told, value)) if isinstance(value, list) else str(value)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
