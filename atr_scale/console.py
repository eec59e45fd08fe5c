"""Log lines on the terminal: above the progress bars, never inside them, without secrets."""

from __future__ import annotations

import logging
from typing import TextIO

from atr_scale.redaction import redact


class ConsoleHandler(logging.StreamHandler[TextIO]):
    """Writes log lines to stderr. Bars of this process are cleared for a line and drawn again below it."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm  # only if there is something to write, so that --help stays instant

        try:
            tqdm.write(redact(self.format(record)), file=self.stream)
            self.flush()
        except Exception:
            self.handleError(record)
