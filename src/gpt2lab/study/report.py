"""The report of a study: Markdown, and the same as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import itertools
import re
from pathlib import Path

from markdown_it import MarkdownIt

from gpt2lab.study.measure import TEMPERATURE, Measured
from gpt2lab.tracking import size

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; --text: #1d1d1f; --line: #d9d9de; --paper: #fff; --panel: #f5f5f7; }}
@media (prefers-color-scheme: dark) {{ :root {{ --text: #e8e8ea; --line: #3a3a3e; --paper: #18181a; --panel: #242427; }} }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: var(--text); background: var(--paper);
  font: 16px/1.55 system-ui, sans-serif; }}
h1 {{ line-height: 1.2; }} h2 {{ margin-top: 2.2rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }}
.wide {{ overflow-x: auto; }} table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }}
td:first-child {{ white-space: nowrap; }}
img {{ max-width: 100%; height: auto; border-radius: 6px; background: #fff; }}
pre {{ background: var(--panel); padding: .7rem .9rem; border-radius: 6px; overflow-x: auto; white-space: pre-wrap;
  font-size: 13px; }}
code {{ font-family: ui-monospace, monospace; }} p > code, li > code {{ background: var(--panel); padding: .1em .3em; }}
@media print {{ body {{ margin: 0; max-width: none; font-size: 11pt; }} pre, img, table {{ break-inside: avoid; }} }}
</style></head><body>
{body}
</body></html>
"""


MEMORY_NOISE = 0.3
"""Trainings of the same model differ by a fifth in the memory of the whole process: what the allocator keeps varies."""


def table(rows: list[Measured]) -> str:
    """The table of a study, in Markdown; ratios are against the first row."""
    first = rows[0]
    lines = [
        "| | parameters | KV cache, bytes a token | peak memory | training, tokens/s | held-out loss | perplexity |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        ratio = f" ({row.tokens_per_second / first.tokens_per_second:.2f}x)" if row is not first else ""
        lines.append(
            f"| {row.name} | {row.parameters:,} | {row.kv_bytes_per_token:,} | {size(row.peak_memory_bytes)} "
            f"| {row.tokens_per_second:,.0f}{ratio} | {row.loss:.3f} | {row.perplexity:.1f} |"
        )
    return "\n".join(lines)


def findings(rows: list[Measured]) -> list[str]:
    """What each row changed against the one above it, in words. One seed: nothing here is more than a look."""
    said = []
    for before, row in itertools.pairwise(rows):
        change = ", ".join(f"`{key}: {value}`" for key, value in row.changes.items())
        loss, speed = row.loss - before.loss, row.tokens_per_second / before.tokens_per_second
        overlap = row.slowest < before.fastest and before.slowest < row.fastest
        kv, memory = (
            row.kv_bytes_per_token / before.kv_bytes_per_token,
            row.peak_memory_bytes / before.peak_memory_bytes,
        )
        verdict = (
            "looks better"
            if loss < -0.01
            else "looks worse"
            if loss > 0.01
            else "makes no difference that one seed could show"
        )
        pace = "speed within the noise" if overlap else f"{abs(speed - 1):.0%} {'faster' if speed > 1 else 'slower'}"
        said.append(
            f"**{row.name}** ({change}): loss {loss:+.3f}, which {verdict}; {pace}; "
            f"KV cache {kv:.2f}x, peak memory {'alike' if abs(memory - 1) < MEMORY_NOISE else f'{memory:.2f}x'}."
        )
    return said


def markdown_report(
    rows: list[Measured], *, unigram: float, intro: str, trained_len: int, command: str, environment: str, prompt: str
) -> str:
    """The whole report."""
    best = min(rows, key=lambda row: row.perplexity)
    parts = [
        "# What each variant costs and buys",
        intro,
        "## The table",
        table(rows),
        f"A model that only knows how often each token occurs has perplexity **{unigram:.1f}** on the same text; the best "
        f"row, {best.name}, has **{best.perplexity:.1f}** ({unigram / best.perplexity:.1f} times less).",
        "Each row keeps what stands above it. Peak memory is that of the whole training process, of which Python and torch "
        "take some hundreds of MB; the same model's differs by a fifth from run to run. Speeds are medians of rounds in "
        "which the rows took turns; the ratio is to the first row. The KV cache is what a context of "
        f"{trained_len} tokens holds in 16 bits, divided by its tokens.",
        "## What it shows",
        "\n".join(f"- {finding}" for finding in findings(rows)),
        "## Learning",
        "![Held-out loss against tokens and against seconds](learning.png)",
        "## Beyond the trained length",
        "![Held-out loss by position in the context](positions.png)",
        f"Models were trained on contexts of {trained_len} tokens. Learned positions end there; RoPE has an angle for every "
        "position, but whether a model can use those it has never met is what the plot tells.",
        "## Samples",
        f"Each continues `{prompt}`, temperature {TEMPERATURE}, the same seeds.",
        *(f"### {row.name}\n\n" + "\n\n".join(_fenced(prompt + sample) for sample in row.samples) for row in rows),
        "## How it was made",
        f"```sh\n{command}\n```\n\n{environment}",
    ]
    return "\n\n".join(parts) + "\n"


def html_report(markdown: str, folder: Path) -> str:
    """The same as one page: pictures inside, light and dark, fit for printing."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")

    def embed(match: re.Match[str]) -> str:
        picture = base64.b64encode((folder / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{picture}"'

    title = html.escape(markdown.partition("\n")[0].lstrip("# "))
    return _PAGE.format(title=title, body=re.sub(r'src="([\w.-]+\.png)"', embed, body))


def _fenced(text: str) -> str:
    fence = "`" * max(3, max((len(run) + 1 for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text.strip(chr(10))}\n{fence}"
