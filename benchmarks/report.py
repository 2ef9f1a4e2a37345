"""What a run says: tables in Markdown, everything in JSON, plots."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.execution import Results, Settings
from benchmarks.machine import machine_facts
from benchmarks.plan import Case, Summary, more_is_better, summarise

__all__ = ["as_json", "as_markdown", "write"]

CACHE_WORDS = {
    "warm": "warm: everything was read once before",
    "dropped": "dropped: the files were removed from the page cache",
    "limited": "limited: dropped first, and the process may use half of the memory map's bytes",
    "none": "not stated",
}


def write(results: Results, settings: Settings) -> str:
    """Write ``results.json``, ``results.md`` and plots; the tables."""
    folder = settings.folder
    folder.mkdir(parents=True, exist_ok=True)
    facts = as_json(results, settings)
    (folder / "results.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    text = as_markdown(results, facts)
    (folder / "results.md").write_text(text)
    plot(results, folder)
    return text


def as_json(results: Results, settings: Settings) -> dict[str, Any]:
    """Everything that is known, under the cases' names."""
    summaries = summarise(results.cases, results.rounds)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": machine_facts(),
        "environments": results.environments,
        "settings": {**dataclasses.asdict(settings.grid), "interleaved": True, "only": settings.only},
        "source": results.source,
        "cases": {
            case.name: {
                "section": case.section,
                "environment": case.environment,
                "module": case.module,
                "parameters": dict(case.parameters),
                "store": case.store,
                "cache": case.cache,
                "figures": {figure: _figure(summary) for figure, summary in summaries.get(case.name, {}).items()},
            }
            for case in results.cases
        },
        "not measured": results.unmeasured,
        "checked": results.checked,
        "stores made": results.made,
        "bytes per stored value": results.sizes,
        "notes": results.notes,
    }


def _figure(summary: Summary) -> dict[str, Any]:
    return {
        "median": summary.median,
        "lowest": summary.lowest,
        "highest": summary.highest,
        "rounds": summary.values,
        "ratios": {other: {"median": summary.ratio(other), "rounds": values} for other, values in summary.ratios.items()},
    }


def as_markdown(results: Results, facts: Mapping[str, Any]) -> str:
    """The tables."""
    summaries = summarise(results.cases, results.rounds)
    sections: dict[str, list[Case]] = {}
    for case in results.cases:
        sections.setdefault(case.section, []).append(case)
    parts = ["# Benchmarks", _conditions(facts, len(results.rounds))]
    for title, some in sections.items():
        rows = [row for case in some for row in _rows(case, summaries.get(case.name, {}))]
        if rows:
            states = dict.fromkeys(CACHE_WORDS[case.cache] for case in some)
            parts += [f"## {title}", f"Cache: {'; '.join(states)}."]
            parts.append(_table(("case", "figure", "median", "lowest to highest", "times better than"), rows))
    parts += _sizes(results)
    parts += _losses(results.cases, summaries)
    if results.checked:
        parts += ["## Checked: sums of what each reader returned, against the source read by h5py"]
        parts.append(_table(("reader", "found"), list(results.checked.items())))
    if results.unmeasured:
        parts += ["## Not measured", _table(("case", "why"), list(results.unmeasured.items()))]
    if results.notes:
        parts += ["## Notes", "\n".join(f"* {name}: {value:.3g}" for name, value in results.notes.items())]
    return "\n\n".join(parts) + "\n"


def _conditions(facts: Mapping[str, Any], rounds: int) -> str:
    machine, source = facts["machine"], facts["source"]
    lines = [
        f"{facts['date']}, commit {facts['commit']}.",
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}.",
        f"{source.get('rows', 0):,} cells, {source.get('stored values', 0):,} stored values; {rounds} rounds, in each every case"
        " once, in a fresh process, in rotated order; medians, and medians of the rounds' ratios.",
    ]
    return "\n".join(lines)


def _rows(case: Case, figures: Mapping[str, Summary]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for figure, summary in figures.items():
        ratios = "; ".join(f"{other}: **{summary.ratio(other):.2f}**" for other in summary.ratios)
        spread = f"{_number(summary.lowest)} to {_number(summary.highest)}"
        rows.append((case.name, figure, _number(summary.median), spread, ratios))
    return rows


def _sizes(results: Results) -> list[str]:
    if not results.sizes:
        return []
    rows = []
    for name, size in results.sizes.items():
        made = results.made.get(name, {})
        rows.append(
            (
                name,
                f"{size['values and ids']:.2f}" if "values and ids" in size else "",
                f"{size['everything']:.2f}",
                f"{made['s']:.1f}" if "s" in made else "",
                f"{made['MB peak']:,.0f}" if "MB peak" in made else "",
            )
        )
    heads = ("format", "values and ids", "everything", "made in s (once)", "MB peak (once)")
    return ["## Bytes per stored value", _table(heads, rows)]


def _losses(found: Sequence[Case], summaries: Mapping[str, Mapping[str, Summary]]) -> list[str]:
    """Every ratio below 1: against others and bounds, then against ourselves (other profiles, fewer threads)."""
    ours = {case.name for case in found if case.module.startswith("benchmarks.ours")}
    rows = sorted(
        (summary.ratio(other), case.name, figure, other)
        for case in found
        for figure, summary in summaries.get(case.name, {}).items()
        for other in summary.ratios
        if summary.ratio(other) < 1
    )
    parts = []
    for title, own in (("What we lose at", False), ("Profiles and threads that are slower than others of ours", True)):
        some = [(f"**{ratio:.2f}**", name, figure, other) for ratio, name, figure, other in rows if (other in ours) is own]
        if some:
            parts += [f"## {title}: every ratio below 1", _table(("ratio", "case", "figure", "is worse than"), some)]
    return parts


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(value: float) -> str:
    """Three digits at least, whole numbers from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _commit() -> str:
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + (" with changes" if changed.strip() else "")


def plot(results: Results, folder: Path) -> list[Path]:
    """One picture a section, bars from lowest to highest; nothing where matplotlib is missing."""
    try:
        import matplotlib as mpl
    except ImportError:
        return []
    mpl.use("agg")
    from matplotlib.figure import Figure

    summaries = summarise(results.cases, results.rounds)
    written = []
    for title in dict.fromkeys(case.section for case in results.cases):
        some = [(case, summaries[case.name]) for case in results.cases if case.section == title and summaries.get(case.name)]
        if not some:
            continue
        figure_name = next(iter(some[0][1]))
        some_with = [(case, figures) for case, figures in some if figure_name in figures]
        bars = [(case.name, figures[figure_name]) for case, figures in some_with]
        picture = Figure(figsize=(10, 1.2 + 0.36 * len(bars)), layout="constrained")
        axes = picture.add_subplot()
        medians = [summary.median for _, summary in bars]
        spread = [
            [summary.median - summary.lowest for _, summary in bars],
            [summary.highest - summary.median for _, summary in bars],
        ]
        colours = ["#2b6cb0" if case.module.startswith("benchmarks.ours") else "#a0aec0" for case, _ in some_with]
        drawn = axes.barh(range(len(bars)), medians, xerr=spread, color=colours, ecolor="#4a5568")
        axes.bar_label(drawn, [_number(median) for median in medians], padding=6)
        axes.margins(x=0.12)
        axes.set_yticks(range(len(bars)), [name for name, _ in bars])
        axes.invert_yaxis()
        better = "more" if more_is_better(figure_name) else "less"
        axes.set_xlabel(f"{figure_name} (median, lowest to highest; {better} is better)")
        axes.set_title(title)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        path = folder / f"{''.join(letter if letter.isalnum() else '_' for letter in title.lower())}.png"
        picture.savefig(path, dpi=120)
        written.append(path)
    return written
