"""What the demo tells: a table, a summary, a plot."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from .demo_rounds import ROUNDS, Request

__all__ = ["Summary", "plot", "print_report", "summarize"]

_MEANING = {
    "cold": "first time",
    "ram": "from RAM",
    "disk": "from disk, in a new process",
}


@dataclass(frozen=True)
class Summary:
    """The whole run in numbers, as ``--json`` prints it last.

    Args:
        requests: how many were answered.
        answers_equal: how many of them as without the cache.
        hit_ratio: round -> share of prompt tokens whose KV was loaded.
        median_ttft_s: round -> median seconds to the first token.
        median_ttft_without_cache_s: round -> the same for the same requests without LMKV.
        cold_over_warm: warm round -> median of the cold round over the median of this one; empty without a cold round.
        median_speedup: round -> median over its requests of seconds without LMKV over seconds with it.
        model_load_s: seconds to read the model into the first process.
        total_s: seconds for everything but installing and converting the model.
    """

    requests: int
    answers_equal: int
    hit_ratio: dict[str, float]
    median_ttft_s: dict[str, float]
    median_ttft_without_cache_s: dict[str, float]
    cold_over_warm: dict[str, float]
    median_speedup: dict[str, float]
    model_load_s: float
    total_s: float

    @property
    def passed(self) -> bool:
        """Every answer was equal, and every warm round hit something."""
        warm = [ratio for name, ratio in self.hit_ratio.items() if name != "cold"]
        return self.answers_equal == self.requests and all(ratio > 0 for ratio in warm)


def summarize(requests: Sequence[Request], model_load_s: float, total_s: float) -> Summary:
    """The summary of a run of at least one request."""
    rounds = {name: [r for r in requests if r.round == name] for name in ROUNDS if any(r.round == name for r in requests)}
    ttft = {name: median(r.ttft_s for r in group) for name, group in rounds.items()}
    return Summary(
        requests=len(requests),
        answers_equal=sum(r.answer_equal for r in requests),
        hit_ratio={
            name: round(sum(r.hit_tokens for r in group) / sum(r.tokens for r in group), 4) for name, group in rounds.items()
        },
        median_ttft_s={name: round(value, 4) for name, value in ttft.items()},
        median_ttft_without_cache_s={
            name: round(median(r.ttft_without_cache_s for r in group), 4) for name, group in rounds.items()
        },
        cold_over_warm={
            name: round(ttft["cold"] / value, 1) for name, value in ttft.items() if name != "cold" and "cold" in ttft
        },
        median_speedup={name: round(median(r.speedup for r in group), 1) for name, group in rounds.items()},
        model_load_s=round(model_load_s, 2),
        total_s=round(total_s, 1),
    )


def print_report(requests: Sequence[Request], summary: Summary) -> None:
    """Table and totals on standard output."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    title = "Seconds to the first token (TTFT), without LMKV and with it"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("round", "document"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens", "hit", "tier", "without", "with", "speed-up", "same"):
        table.add_column(name, justify="right", no_wrap=True)
    before = ""
    for r in requests:
        if before not in ("", r.round):
            table.add_section()
        times = (f"{r.ttft_without_cache_s:.2f}", f"{r.ttft_s:.2f}", f"{r.speedup:.1f}x")
        name = r.round if r.round != before else ""
        same = "yes" if r.answer_equal else "NO"
        table.add_row(name, r.document, f"{r.tokens:,}", f"{r.hit_tokens:,}", r.tier or "-", *times, same)
        before = r.round
    console = Console() if sys.stdout.isatty() else Console(width=100)
    console.print(table)
    for name, value in summary.median_ttft_s.items():
        over = f" ({summary.cold_over_warm[name]:.1f} times faster)" if name in summary.cold_over_warm else ""
        console.print(
            f"{name:>4}, {_MEANING[name]}: median TTFT {value:.2f} s{over}, {summary.hit_ratio[name]:.1%} of tokens hit",
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"{summary.answers_equal} of {summary.requests} answers equal those without the cache, token for token.\n"
        f"{summary.total_s:.0f} s in all; reading the model took {summary.model_load_s:.1f} s.",
        highlight=False,
        soft_wrap=True,
    )


def plot(requests: Sequence[Request], path: Path) -> None:
    """A PNG with a group of bars a document: TTFT of each round.

    Raises:
        OSError: the file can't be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r.document for r in requests))
    rounds = [name for name in ROUNDS if any(r.round == name for r in requests)]
    figure = Figure(figsize=(max(6.0, 1.7 * len(names)), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(rounds)
    for i, name in enumerate(rounds):
        times = {r.document: r.ttft_s for r in requests if r.round == name}
        places = [names.index(document) + (i - (len(rounds) - 1) / 2) * width for document in times]
        bars = axes.bar(places, list(times.values()), width, label=f"{name}: {_MEANING[name]}")
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    tokens = {r.document: r.tokens for r in requests}
    axes.set_xticks(range(len(names)), [f"{name}\n{tokens[name]:,} tokens" for name in names], fontsize=8)
    axes.set_ylabel("seconds to the first token")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(rounds), fontsize=8, title="Questions about long documents, with LMKV")
    figure.savefig(path, format="png", dpi=130)
