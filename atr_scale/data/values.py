"""Values of tables and JSON files that other programs have written: ids, captions and texts of unexpected types."""

from __future__ import annotations

import io
import json
import math
import re
import tokenize
from ast import literal_eval
from typing import Any

# What pandas and Python write for a missing value.
NULLS = ("", "none", "nan", "null", "<na>")
MAX_DIGITS = 4000  # Python converts no longer integers from and to text


def valid_unicode(value: Any) -> Any:
    """`value` with U+FFFD for each lone surrogate in its texts, which no file can hold; also in lists and dicts."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [valid_unicode(item) for item in value]
    if isinstance(value, dict):
        return {valid_unicode(key): valid_unicode(item) for key, item in value.items()}
    return value


def id_text(value: Any) -> str:
    """An id as text: "7" for 7, 7.0 and "7.0", as a column of integers with a gap is written. "" for what is no id."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        return ""
    text = str(value).strip()
    whole = re.fullmatch(r"(\d+)\.0+", text)
    return "" if text.lower() in NULLS else whole[1] if whole else text


def caption_texts(value: Any) -> list[str]:
    """The texts in a caption: itself, or the items of a list, also of one that was written as text.

    Nothing for null, also if it was written as text (None, nan). Raises ValueError for other types.
    """
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in NULLS:
            return []
        items = _written_list(text) if text.startswith("[") and text.endswith("]") else None
        return [value] if items is None else items
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, list) and all(item is None or isinstance(item, str) for item in value):
        return [item for item in value if item is not None and item.strip().lower() not in NULLS]
    raise ValueError(f"a caption is {json_type(value)}, not a text")


def _written_list(text: str) -> list[str] | None:
    """The texts in a list that JSON, Python or numpy has written; None for any other text in brackets."""
    try:
        found = json.loads(text)
        return caption_texts(found) if isinstance(found, list) else None
    except (ValueError, RecursionError):
        pass
    items = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(text[1:-1]).readline):
            if token.type == tokenize.STRING:
                items.append(literal_eval(token.string))
            elif token.string.strip(" ,\r\n") not in ("", "None", "nan"):
                return None
    except (tokenize.TokenError, SyntaxError, ValueError):
        return None
    return items if all(isinstance(item, str) for item in items) else None


def json_type(value: Any) -> str:
    """What JSON calls the type of `value`, with its article."""
    names = {str: "a text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def load_json(payload: bytes) -> Any:
    """The content of a JSON file in UTF-8, 16 or 32. Raises ValueError.

    Bytes that are no text become lone surrogates, and integers of more than 4,000 digits texts, so that the rest of
    the file can be used.
    """
    text = payload.decode(json.detect_encoding(payload), "surrogateescape")
    try:
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) <= MAX_DIGITS else digits)
    except RecursionError:
        raise ValueError("nested too deeply") from None
