"""The report's HTML: results, health, charts, samples and settings of runs, in one file without outside parts."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from html import escape

from ..findings import FINDINGS
from .charts import Line, line_chart, short
from .runs import Run
from .style import SCRIPT, STYLE

FIRST = ["reward", "rewards/", "loss", "mean_token_accuracy", "entropy", "grad_norm", "learning_rate"]  # then by name
COLORS = 8
MOST_SAMPLES = 60  # per stage


def render_page(runs: list[Run], title: str) -> str:
    """The whole page, as text."""
    sections = [
        _section("Results", "".join(_results(run, len(runs) > 1) for run in runs if run.results)),
        _section("Summary", _summary(runs)),
        _section("Health", "".join(_health(run, len(runs) > 1) for run in runs)),
        _section("Curves", _charts(runs)),
        _section("Samples", "".join(_samples(run, len(runs) > 1) for run in runs if run.samples)),
        _section("Completions", "".join(_completions(run, len(runs) > 1) for run in runs if run.completions)),
        _section("Settings", _settings(runs)),
    ]
    made = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    return (
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1><p>fastalign report, {made}</p></header>"
        + "".join(sections)
        + f"</main><div id='tip'></div><script>{SCRIPT}</script></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _table(columns: Sequence, rows: Sequence[Sequence], css: str = "") -> str:
    head = "".join(f"<th>{escape(str(column))}</th>" for column in columns)
    body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{css}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cell(value) -> str:
    if isinstance(value, bool):
        return f'<td class="{"right" if value else "wrong"}">{"✓" if value else "✗"}</td>'
    if isinstance(value, (int, float)):
        return f'<td class="number">{short(value)}</td>'
    return f"<td>{'' if value is None else escape(str(value))}</td>"


def _run_heading(run: Run, several: bool) -> str:
    return f"<h3>{escape(run.name)}</h3>" if several else ""


def _results(run: Run, several: bool) -> str:
    results = run.results or {}
    return _run_heading(run, several) + _table(results.get("columns", []), results.get("rows", []), "results")


def _summary(runs: list[Run]) -> str:
    rows: list[list] = [["steps", *(run.state.get("global_step") for run in runs)]]
    rows.append(["epochs", *(_rounded(run.state.get("epoch")) for run in runs)])
    rows.append(["tokens", *(run.last("num_tokens") for run in runs)])
    for key in ("reward", "eval_reward", "loss", "eval_loss", "mean_token_accuracy"):
        curves = [run.curves().get(key) for run in runs]
        rows.append(
            [f"{key}, first → last", *(f"{short(c[0][1])} → {short(c[-1][1])}" if c else None for c in curves)]
        )
    best = [run.state.get("best_metric") for run in runs]
    rows.append(["best metric", *best])
    totals = dict.fromkeys(k for run in runs for entry in run.log for k in entry if k.startswith("train_"))
    for key in totals:
        rows.append([key.replace("_", " "), *(_rounded(run.last(key)) for run in runs)])
    rows = [row for row in rows if any(value is not None for value in row[1:])]
    return _table(["", *(run.name for run in runs)], rows, "summary")


def _health(run: Run, several: bool) -> str:
    """What the run's findings say, when, how often, and what to do."""
    rows = []
    for name, logs in run.findings().items():
        step, value = logs[0]
        often = f"in {len(logs)} logs" if len(logs) > 1 else "once"
        says = FINDINGS[name].says.format(value=value)
        rows.append([name, f"{says[0].upper()}{says[1:]}", step, often, FINDINGS[name].remedy])
    if not rows:
        return _run_heading(run, several) + "<p>Nothing was found.</p>"
    return _run_heading(run, several) + _table(["", "finding", "first at step", "found", "what to do"], rows, "health")


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _charts(runs: list[Run]) -> str:
    """One chart per metric; training and evaluation of the same metric share it, and so do the runs."""
    curves = [run.curves() for run in runs]
    names = dict.fromkeys(name.removeprefix("eval_") for found in curves for name in found)
    ordered = sorted(names, key=lambda name: _rank(name, "reward" in names))
    cards = []
    for name in ordered:
        lines = []
        for index, (run, found) in enumerate(zip(runs, curves, strict=True)):
            prefix = f"{run.name} " if len(runs) > 1 else ""
            both = name in found and f"eval_{name}" in found
            color = index % COLORS
            if name in found:
                lines.append(Line(f"{prefix}{'train' if both else ''}".strip() or name, found[name], color))
            if f"eval_{name}" in found:
                shade = color if len(runs) > 1 else 1
                lines.append(Line(f"{prefix}eval".strip(), found[f"eval_{name}"], shade, dashed=True))
        legend = _legend(lines) if len(lines) > 1 or lines[0].dashed else ""
        cards.append(f"<figure><figcaption>{escape(_words(name))}{legend}</figcaption>{line_chart(lines)}</figure>")
    return f'<div class="charts">{"".join(cards)}</div>' if cards else "<p>Nothing was logged.</p>"


def _rank(name: str, is_online: bool) -> int:
    """Place among the charts: of runs on samples the reward comes first, then what it is made of."""
    if is_online and name.startswith("rewards/") and name.endswith("/mean"):
        name = "rewards/"
    return FIRST.index(name) if name in FIRST else len(FIRST)


def _words(name: str) -> str:
    return name.replace("_", " ").replace("grad norm", "gradient norm")


def _legend(lines: list[Line]) -> str:
    items = [
        f'<span><i class="s{line.color}{" dashed" if line.dashed else ""}"></i>{escape(line.label)}</span>'
        for line in lines
    ]
    return f'<span class="legend">{"".join(items)}</span>'


def _samples(run: Run, several: bool) -> str:
    """The same prompts side by side: one column per stage."""
    stages = list(dict.fromkeys(sample.get("stage", "") for sample in run.samples))
    prompts: dict[str, dict] = {}
    for sample in run.samples:
        prompts.setdefault(str(sample.get("prompt", "")), {})[sample.get("stage", "")] = sample
    expects = any("expected" in sample for sample in run.samples)
    head = ["prompt", *(["expected"] if expects else []), *(stage or "completion" for stage in stages)]
    rows = []
    for prompt, by_stage in list(prompts.items())[:MOST_SAMPLES]:
        expected = next((s["expected"] for s in by_stage.values() if "expected" in s), None)
        cells = [f"<td>{escape(prompt)}</td>", *([f"<td>{escape(str(expected))}</td>"] if expects else [])]
        cells += [_completion(by_stage.get(stage)) for stage in stages]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    header = "".join(f"<th>{escape(str(name))}</th>" for name in head)
    more = (
        f"<p>{len(prompts) - MOST_SAMPLES} more in {escape(str(run.folder))}.</p>"
        if len(prompts) > MOST_SAMPLES
        else ""
    )
    return (
        _run_heading(run, several)
        + f'<div class="scroll"><table class="samples"><thead><tr>{header}</tr></thead><tbody>{"".join(rows)}</tbody>'
        + "</table></div>"
        + more
    )


def _completion(sample: dict | None) -> str:
    if sample is None:
        return "<td></td>"
    judged = (
        {True: ("right", "✓ "), False: ("wrong", "✗ ")}.get(bool(sample["correct"])) if "correct" in sample else None
    )
    css, mark = judged or ("", "")
    return f'<td class="{css}">{mark}{escape(str(sample.get("completion", "")))}</td>'


def _completions(run: Run, several: bool) -> str:
    """What was sampled first and last, with the rewards, as it was logged."""
    tables = []
    for rows in run.completions:
        columns = [name for name in rows[0] if name != "step"] if rows else []
        shown = [[_said(row[name]) for name in columns] for row in rows[:MOST_SAMPLES]]
        tables += [f"<h4>step {rows[0]['step']}</h4>", _table(columns, shown, "samples")] if rows else []
    return _run_heading(run, several) + "".join(tables)


def _said(value):
    """Messages as text, nothing for NaN, anything else as it is."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in value)
    return None if isinstance(value, float) and math.isnan(value) else value


def _settings(runs: list[Run]) -> str:
    names = sorted({name for run in runs for name in run.settings})
    rows = [[name, *(_text(run.settings.get(name)) for run in runs)] for name in names]
    if not rows:
        return ""
    table = _table(["", *(run.name for run in runs)], rows, "settings")
    shown = " open" if len(rows) <= 24 else ""
    return f"<details{shown}><summary>{len(rows)} settings differ from their defaults</summary>{table}</details>"


def _text(value) -> str | None:
    return None if value is None else str(value)
