"""docs/reliability.md has a row for every test of a fault, and no other."""

from __future__ import annotations

from tests.faults.page import PAGE, Marked, Seen, marked_tests, page, read_page


def test_every_fault_has_its_row_and_the_reverse() -> None:
    text = PAGE.read_text(encoding="utf-8")
    written, marked = read_page(text), marked_tests()
    assert len(marked) == len(set(marked)) > 20
    assert [row for row in marked if row not in written] == [], "run pytest tests/faults --write-reliability"
    assert [row for row in written if row not in marked] == [], "run pytest tests/faults --write-reliability"
    assert page(written) == text


def test_what_was_seen_is_read_back() -> None:
    marked: Marked = marked_tests()[0]
    seen = {marked: Seen("`a | b` and\nmore", 12.4)}
    assert read_page(page(seen)) == {marked: Seen("`a | b` and more", 12.0)}
