"""Write one HTML file about a run: figures of each stage, curves, success rates with intervals, pictures, videos.

The file holds everything it shows (no network, no other file), so it can be mailed. Nothing in it is computed from
anything but the run's own files.
"""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bridge.config import command_line
from bridge.run_files import RunConfig
from learner.run_folder import Run, load_run

CURVES = {
    "Stage I: supervised loss": ["sft/loss", "sft/loss_ema"],
    "Stage II: reward terms": ["train/ppo_loss", "train/sft_loss", "actor/total_loss"],
    "Stage II: loss ratio (β·|SFT| / |PPO|)": ["train/loss_ratio"],
    "Stage II: policy step": ["actor/approx_kl", "actor/pg_clipfrac"],
    "Stage II: value": ["actor/value_loss", "actor/value_clip_ratio"],
    "Stage II: gradient norm": ["actor/grad_norm"],
    "Stage II: success in rollouts": ["env/success_once"],
    "Stage II: returns and advantages": ["rollout/returns_mean", "rollout/advantages_mean"],
    "Stage II: episode length": ["env/episode_len"],
}

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5d6b7c; --line: #d8dee6; --paper: #ffffff; --tint: #f4f6f9;
        --accent: #0b6bcb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7ecf2; --soft: #9aa8b8; --line: #303a46; --paper: #14191f;
        --tint: #1c232b; --accent: #5aa9f7; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 72rem;
       margin: 2rem auto; padding: 0 1.25rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
p.note { color: var(--soft); max-width: 60rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } td, th { padding: .3rem .8rem .3rem 0;
        text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; } th { color: var(--soft);
        font-weight: 500; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: 1.25rem; }
.card { background: var(--tint); border-radius: .6rem; padding: .8rem 1rem; overflow-x: auto; }
.card h3 { margin: 0 0 .4rem; font-size: 1rem; } figure { margin: 0; }
figcaption { color: var(--soft); font-size: .9rem; }
video, img.picture { width: 100%; border-radius: .4rem; background: #000; } svg { max-width: 100%; height: auto; }
"""


def main(argv: list[str]) -> None:
    print(write_report(load_run(command_line("report", RunConfig, argv, __doc__).run)))


def write_report(run: Run) -> Path:
    """Returns the path of `report.html` in the run's folder."""
    parts = [
        f"<h1>Cotwin run “{html.escape(run.folder.name)}”</h1>",
        '<p class="note">All trials and demonstrations marked “stand-in” ran on an emulated FR3 in a simulated cell, '
        "not on a real arm.</p>",
        _section("In one table", _table(summary(run))),
        _section("Success before and after Stage II", _success_chart(run)),
        _section("Videos and pictures", _media(run)),
        _section("Learning curves", _curves(run)),
        _section("Every stage's figures", _stages(run)),
        _section("Every trial", _trials(run)),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Cotwin: {html.escape(run.folder.name)}</title><style>{STYLE}</style></head><body>"
        + "\n".join(p for p in parts if p)
        + "</body></html>\n"
    )
    path = run.folder / "report.html"
    path.write_text(page)
    return path


def summary(run: Run) -> list[tuple[str, str]]:
    """The rows that `cotwin demo` prints at its end. A figure that no stage measured is left out."""
    rows: list[tuple[str, str]] = []

    def add(label: str, text: str, *values: Any) -> None:
        if all(value is not None for value in values):
            rows.append((label, text.format(*values)))

    f = run.figure
    add("demonstrations, stand-in", "{} episodes, {:.2f} × real time", f("record", "episodes"), f("record", "rtf"))
    add("demonstrations, twin", "{} episodes", f("twin_demos", "episodes"))
    add("Stage I loss", "{:.4f} → {:.4f}", f("sft", "first_loss"), f("sft", "final_loss"))
    add("Stage II", "{} PPO optimiser steps", f("train", "optimizer_steps"))
    add("twin speed in Stage II", "{:.0f} env steps/s", f("train", "env_steps_per_s"))
    for stage, label in SUCCESS_STAGES.items():
        keys = ("successes", "trials", "wilson_low", "wilson_high")
        faults = f(stage, "faults")
        more = f"; besides, {faults} ended in faults" if faults else ""
        add(label, "{} of {} (95 % interval {:.0%} to {:.0%})" + more, *(f(stage, key) for key in keys))
    stage = "eval_after"
    add(
        "chunk latency p50 / p99",
        "{:.0f} / {:.0f} ms",
        f(stage, "chunk_latency_p50_ms"),
        f(stage, "chunk_latency_p99_ms"),
    )
    add("tick jitter p99", "{:.1f} ms", f(stage, "tick_jitter_p99_ms"))
    add(
        "checkpoint on the robot",
        "version {} → {}",
        f(stage, "policy_version_before"),
        f(stage, "policy_version_after"),
    )
    add("wall-clock time", "{:.0f} s", sum(stage.wall_s for stage in run.stages.values()) or None)
    return rows


SUCCESS_STAGES = {
    "twin_eval_before": "twin, after Stage I",
    "twin_eval_after": "twin, after Stage II",
    "eval_before": "stand-in, after Stage I",
    "eval_after": "stand-in, after Stage II",
}


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>" if body else ""


def _table(rows: Sequence[tuple[str, ...]], head: tuple[str, ...] = ()) -> str:
    if not rows:
        return ""
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    top = "<tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in head) + "</tr>" if head else ""
    return f"<table>{top}{cells}</table>"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _stages(run: Run) -> str:
    cards = []
    for name, stage in run.stages.items():
        rows = [("wall time", f"{stage.wall_s:.1f} s")]
        rows += [(key, _number(value)) for key, value in stage.figures.items() if not isinstance(value, list | dict)]
        cards.append(f'<div class="card"><h3>{html.escape(name)}</h3>{_table(rows)}</div>')
    return f'<div class="grid">{"".join(cards)}</div>' if cards else ""


def _trials(run: Run) -> str:
    tables = []
    for label, trials in run.trials.items():
        keys = ["seed", "success", "fault", "duration_s", "time_to_success_s", "policy_versions"]
        keys = [key for key in keys if any(key in trial for trial in trials)]
        rows = [tuple(_number(trial.get(key, "")) for key in keys) for trial in trials]
        table = _table(rows, tuple(keys))
        tables.append(f"<details><summary>{html.escape(label)} ({len(trials)} trials)</summary>{table}</details>")
    return "".join(tables)


def _media(run: Run) -> str:
    kinds = {".mp4": ("video/mp4", "video"), ".png": ("image/png", "picture"), ".jpg": ("image/jpeg", "picture")}
    items = []
    for name, stage in run.stages.items():
        for title, file in stage.files.items():
            path = run.folder / file
            if path.suffix not in kinds or not path.is_file():
                continue
            mime, kind = kinds[path.suffix]
            source = f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}"
            tag = f'<video controls loop muted playsinline src="{source}"></video>'
            if kind == "picture":
                tag = f'<img class="picture" alt="{html.escape(title)}" src="{source}">'
            caption = html.escape(f"{name}: {title.replace('_', ' ')}")
            items.append(f"<figure>{tag}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="grid">{"".join(items)}</div>' if items else ""


def _curves(run: Run) -> str:
    cards = []
    for title, tags in CURVES.items():
        lines = {tag: points for tag in tags for name, points in run.curves.items() if name.split(":")[-1] == tag}
        if lines:
            cards.append(f'<div class="card"><h3>{html.escape(title)}</h3>{_line_chart(lines)}</div>')
    return f'<div class="grid">{"".join(cards)}</div>' if cards else ""


def _figure(width: float, height: float):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    for item in (*axes.spines.values(),):
        item.set_color("#7d8a99")
    axes.tick_params(colors="#7d8a99", labelsize=8)
    return figure, axes


def _svg(figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _line_chart(lines: dict[str, list[tuple[int, float]]]) -> str:
    figure, axes = _figure(4.4, 2.5)
    for tag, points in lines.items():
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, marker="o" if len(points) < 30 else None, markersize=3, linewidth=1.3, label=tag)
    axes.set_xlabel("step", fontsize=8, color="#7d8a99")
    axes.legend(fontsize=7, frameon=False, labelcolor="#7d8a99")
    return _svg(figure)


def _success_chart(run: Run) -> str:
    rows = [
        (label, *(run.figure(stage, key) for key in ("successes", "trials", "wilson_low", "wilson_high")))
        for stage, label in SUCCESS_STAGES.items()
        if run.figure(stage, "trials")
    ]
    if not rows:
        return ""
    figure, axes = _figure(8.0, 0.55 * len(rows) + 0.8)
    for row, (_, successes, trials, low, high) in enumerate(rows):
        rate = successes / trials
        axes.barh(row, rate, color="#5aa9f7", height=0.5)
        axes.errorbar(rate, row, xerr=[[rate - low], [high - rate]], color="#7d8a99", capsize=4, linewidth=1.5)
        axes.text(1.02, row, f"{successes}/{trials}", va="center", fontsize=9, color="#7d8a99")
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.set_xlim(0, 1)
    axes.invert_yaxis()
    axes.set_xlabel("success rate, bars: Wilson 95 % interval", fontsize=8, color="#7d8a99")
    return _svg(figure)
