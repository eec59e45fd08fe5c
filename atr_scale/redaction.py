"""The removal of secrets from everything that is written: logs, tracebacks, pages, the files of a run."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

REDACTED = "[redacted]"
SHORTEST_SECRET = 8  # shorter values are words ("true", "testing") and would blot out half of a page
_SECRET_NAME = (
    r"(?:\w*(?:secret|passwor?d|passwd|credential)\w*|\w*(?:api|access|private|signing)_?key\w*|(?:\w*_)?token)"
)
_SECRET_NAME_ONLY = re.compile(rf"{_SECRET_NAME}\Z", re.IGNORECASE)
_ASSIGNMENT = re.compile(rf"""(\b{_SECRET_NAME}["']?\s*[:=]\s*)("[^"\n]+"|'[^'\n]+'|[^\s,;&}}\]"']+)""", re.IGNORECASE)
_HEADER = re.compile(r"""(\bAuthorization["']?\s*[:=]\s*["']?)[^"'\n]+""", re.IGNORECASE)  # of HTTP
_RECOGNISABLE = re.compile(
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"  # AWS access key ids
    r"|\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}"  # hub, OpenAI, GitHub tokens
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user:password in an address
    r"|(?<=\bBearer )[\w.~+/=-]{16,}|(?<=PRIVATE KEY-----)[^-]+"
    r"|(?<=X-Amz-Signature=)\w+|(?<=X-Amz-Credential=)[^&\s]+|(?<=X-Amz-Security-Token=)[^&\s]+"  # pre-signed addresses
)


def is_secret_name(name: str) -> bool:
    """Whether a variable or key of this name is expected to hold a secret."""
    return bool(_SECRET_NAME_ONLY.match(name)) and not name.upper().endswith(("_FILE", "_PATH", "_DIR"))


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """The text without secrets: values of variables and keys with a secret's name, and tokens of a known form."""
    values = {value for name, value in environ.items() if is_secret_name(name) and len(value) >= SHORTEST_SECRET}
    for value in sorted(values, key=len, reverse=True):  # a secret may contain another
        text = text.replace(value, REDACTED)
    text = _HEADER.sub(rf"\1{REDACTED}", text)
    return _RECOGNISABLE.sub(REDACTED, _ASSIGNMENT.sub(_redact_assignment, text))


def _redact_assignment(match: re.Match[str]) -> str:
    name = re.match(r"\w+", match[1])
    assert name is not None
    empty = match[2].strip("\"'").lower() in {"null", "none", "true", "false"}
    return match[0] if empty or not is_secret_name(name[0]) else match[1] + REDACTED
