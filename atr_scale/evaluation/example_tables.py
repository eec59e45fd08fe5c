"""Markdown tables of examples and misses, with links to the audio of their clips."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from atr_scale.evaluation.examples import Example, Retrieved

CELL = 110  # characters of a caption shown in a table
MISSED_CELLS = 3  # retrieved items shown of a miss

Link = Callable[[int], str | None]  # clip -> address of its audio relative to the report


def examples_table(examples: Sequence[Example], link: Link) -> str:
    """Queries with all of their retrieved items."""
    width = max(len(example.retrieved) for example in examples)
    head = "| query | rank of the match |" + "".join(f" {place} |" for place in range(1, width + 1))
    rows = [head, "|:-|-:|" + ":-|" * width]
    for example in examples:
        found = [_item(example, item, link) for item in example.retrieved]
        found += [""] * (width - len(found))
        rows.append(f"| {_query(example, link)} | {example.rank} | {' | '.join(found)} |")
    return "\n".join(rows)


def misses_table(misses: Sequence[Example], link: Link) -> str:
    """Queries whose right item was not the first, worst first."""
    rows = ["| rank | query | right | retrieved instead | what may explain it |", "|-:|:-|:-|:-|:-|"]
    for miss in misses:
        instead = "<br>".join(
            f"{place}. {_item(miss, item, link, ' ')}" for place, item in enumerate(miss.retrieved[:MISSED_CELLS], 1)
        )
        right = _item(miss, miss.match, link, mark="") if miss.match else ""
        rows.append(
            f"| {miss.rank} | {_query(miss, link)} | {right} | {instead} | {table_cell(miss.why, len(miss.why))} |"
        )
    return "\n".join(rows)


def _query(example: Example, link: Link) -> str:
    address = link(example.index) if example.direction == "a2t" and example.index is not None else None
    return table_cell(example.query) + _play(address, "<br>")


def _item(example: Example, item: Retrieved, link: Link, between: str = "<br>", mark: str = "✅ ") -> str:
    address = link(item.index) if example.direction == "t2a" else None
    return f"{mark if item.hit else ''}{table_cell(item.name)}{between}{item.score:.3f}" + _play(address, " ")


def _play(address: str | None, before: str) -> str:
    return f"{before}[▶&nbsp;listen]({address})" if address else ""


def table_cell(text: str, longest: int = CELL) -> str:
    """Text escaped for a Markdown table cell, and shortened."""
    text = " ".join(text.split())
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    for old, new in (
        ("&", "&amp;"),
        ("<", "&lt;"),
        ("\\", "\\\\"),
        ("|", "\\|"),
        ("`", "\\`"),
        ("*", "\\*"),
        ("_", "\\_"),
        ("[", "\\["),
    ):
        text = text.replace(old, new)
    return text
