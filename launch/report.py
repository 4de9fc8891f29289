"""report.html: one self-contained page per run: curves, throughput, reconstructions, health, probes, the configuration."""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swath.hub.curves import Panel, plotted
from swath.pretrain.record import read_lines
from swath.shards.files import write_bytes

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#1c2733}
h1{font-size:1.6em}h2{font-size:1.15em;margin-top:2em;border-bottom:1px solid #d5dde5}
table{border-collapse:collapse}td,th{padding:.25em .9em;border-bottom:1px solid #e3e9ef;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}img{max-width:100%}pre{background:#f5f8fa;padding:1em;overflow:auto}
.warn{background:#fff4d6;padding:.5em 1em;border-left:4px solid #e0a800}figure{margin:1em 0}figcaption{color:#5a6b7b}
"""


def write_report(run: Path) -> Path:
    """Write and return <run>/report.html from what the run folder holds."""
    metrics, health = read_lines(run / "metrics.jsonl"), read_lines(run / "health.jsonl")
    parts = [
        f"<h1>{html.escape(run.name)}</h1>",
        _summary(run, metrics, health),
        _warnings(health),
        _curves(metrics, health),
        _pictures(run),
        _health_table(health),
        _probes(run),
        f"<h2>Configuration</h2><pre>{html.escape(_read(run / 'recipe.yaml'))}</pre>",
        f"<h2>Resolved once, at the first start</h2><pre>{html.escape(_read(run / 'choices.json'))}</pre>",
    ]
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(run.name)} · swath</title>"
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )
    path = run / "report.html"
    write_bytes(path, page.encode())
    return path


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _table(rows: Sequence[Sequence[Any]], head: Sequence[str] = ()) -> str:
    def cell(value: Any) -> str:
        number = isinstance(value, (int, float))
        return f"<td{' class=n' if number else ''}>{html.escape(_number(value) if number else str(value))}</td>"

    top = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows)
    return f"<table>{'<tr>' + top + '</tr>' if top else ''}{body}</table>"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _summary(run: Path, metrics: list[dict[str, Any]], health: list[dict[str, Any]]) -> str:
    if not metrics:
        return "<p>No step has been done yet.</p>"
    last, seconds = metrics[-1], sum(row["seconds"] for row in metrics)
    recent = [row["samples_per_second"] for row in metrics[-50:]]
    rows: list[tuple[str, Any]] = [
        ("steps", last["step"]),
        ("samples seen", last["samples"]),
        ("epochs", round(last["epoch"], 2)),
        ("loss", last["loss"] if last["loss"] is not None else "not finite"),
        ("samples per second (median of the last 50 steps)", sorted(recent)[len(recent) // 2]),
        ("hours of steps", seconds / 3600),
        ("share of time waiting for data", sum(r["data_wait"] * r["seconds"] for r in metrics) / seconds),
        ("share of the machine's measured peak (MFU)", last["mfu"]),
        ("steps skipped as not finite", sum(row["skipped"] for row in metrics)),
        ("damaged samples gone past", max(row["damaged_samples"] for row in metrics)),
    ]
    if health and health[-1]["loss"] is not None:
        on = "held-out" if health[-1]["held_out"] else "fixed training"
        rows.append((f"loss on {on} samples", health[-1]["loss"]))
    for path in sorted((run / "probes").glob("*.json")):
        result = json.loads(path.read_text())
        metric = result.get("metric", "accuracy")
        rows.append((f"{result['task']} probe: {metric}", result[metric]))
    return _table(rows)


def _warnings(health: list[dict[str, Any]]) -> str:
    signs = sorted({sign for row in health for sign in row.get("warnings", [])})
    return "".join(f"<p class=warn>{html.escape(sign)}</p>" for sign in signs)


def _curves(metrics: list[dict[str, Any]], health: list[dict[str, Any]]) -> str:
    if not metrics:
        return ""
    steps = [row["step"] for row in metrics]
    looks = [row["step"] for row in health]
    panels: list[Panel] = [
        ("loss", [(steps, [r["loss"] for r in metrics], "training"), (looks, [r["loss"] for r in health], "fixed samples")]),
        ("learning rate", [(steps, [row["lr"] for row in metrics], "")]),
        ("gradient norm", [(steps, [row["grad_norm"] for row in metrics], "")]),
        ("samples per second", [(steps, [row["samples_per_second"] for row in metrics], "")]),
        ("effective rank", [(looks, [row[f"{n}_rank"] for row in health], n) for n in ("pooled", "tokens")]),
        ("variance that position explains", [(looks, [row["positional"] for row in health], "")]),
    ]
    return "<h2>Curves</h2>" + _plot(panels)


def _plot(panels: list[Panel]) -> str:
    """As an inline SVG."""
    buffer = io.StringIO()
    with plotted(panels) as figure:
        figure.savefig(buffer, format="svg")
    return "<figure>" + buffer.getvalue()[buffer.getvalue().index("<svg") :] + "</figure>"


def _pictures(run: Path) -> str:
    paths = sorted((run / "pictures").glob("*.png"))
    if not paths:
        return ""
    chosen = [paths[-1]] if len(paths) == 1 else [paths[0], paths[-1]]
    figures = [_figure(path, f"step {int(path.stem[5:])}: input, what the encoder saw, reconstruction") for path in chosen]
    return "<h2>Reconstructions</h2>" + "".join(figures)


def _health_table(health: list[dict[str, Any]]) -> str:
    if not health:
        return ""
    keys = [k for k, v in health[0].items() if isinstance(v, float)]
    rows = [[key.replace("_", " "), health[0][key], health[-1][key]] for key in keys]
    return "<h2>Health of the representation</h2>" + _table(rows, ["measure", "at the first look", "at the last"])


def _probes(run: Path) -> str:
    made = ""
    for path in sorted((run / "probes").glob("*.json")):
        result = json.loads(path.read_text())
        metrics = list(dict.fromkeys(name for row in result.get("rows", []) for name in row["metrics"]))
        rows = [
            [row["name"] + " (transductive)" * bool(row["transductive"]), *(_with_interval(row, name) for name in metrics)]
            for row in result.get("rows", [])
        ]
        made += f"<h2>Probe: {html.escape(result['task'])}</h2>" + _table(rows, ["", *metrics])
        if "preprocessing" in result:
            from swath.probes.run import preprocessing_rows  # probes take long to import

            head, *cells = preprocessing_rows(result["preprocessing"], "size, by normalisation")
            made += _table(cells, head) + "<p>* as the backbone's contract says</p>"
        made += "".join(_figure(path.with_name(f"{path.stem}-{name}.png"), name) for name in result.get("pictures", []))
    return made


def _with_interval(row: dict[str, Any], metric: str) -> str:
    value, ends = row["metrics"].get(metric), row["interval"].get(metric)
    shown = "–" if value is None else f"{value:.4f}"
    return f"{shown} ({ends[0]:.4f} to {ends[1]:.4f})" if ends else shown


def _figure(path: Path, caption: str) -> str:
    if not path.exists():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
