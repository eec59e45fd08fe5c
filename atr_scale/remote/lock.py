"""The lock of a run on S3: an object that names its holder, who writes it anew regularly.

Who starts second is refused, or waits until the holder is dead, as `locks` describes. The object is written only if
there is none, where the store knows such writes. Where it does not, two that start in the same second both write, and
each reads a little later who was last.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Hashable
from dataclasses import asdict
from types import TracebackType

from atr_scale.data.storage import filesystem, join, retried
from atr_scale.errors import UserError
from atr_scale.locks import STALE_S, TOUCH_S, Holder, in_use, wait_until_dead
from atr_scale.remote.objects import get_bytes, put_bytes, remove
from atr_scale.run_files import LOCK

logger = logging.getLogger(__name__)

CONFIRM_S = 1.0
RELEASE_S = 10.0  # a store that hangs does not stop the end


class RemoteLock:
    """Held while it is entered. Raises UserError if another process holds it and lives, or if it cannot be written."""

    def __init__(self, address: str) -> None:
        self.what, self.place = f"the run folder {address}", join(address, LOCK)
        self._me = Holder.me()
        self._released = threading.Event()
        self._touching = threading.Thread(target=self._touch, name="lock", daemon=True)

    def __enter__(self) -> RemoteLock:
        new = True
        while not self._write(new):
            new = False
            try:
                wait_until_dead(self.what, self.place, self._touched, self._holder)
            except UserError as error:
                raise UserError(f"{error}; without a sign of life its lock is void after {STALE_S:.0f} s") from None
        self._touching.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._released.set()
        releasing = threading.Thread(target=self._release, name="unlock", daemon=True)
        releasing.start()
        releasing.join(RELEASE_S)

    def _release(self) -> None:
        self._touching.join()
        with contextlib.suppress(Exception):  # the store is away: others wait until the lock is void
            if self.is_mine():
                remove(self.place)

    def is_mine(self) -> bool:
        """Whether no other process has taken the lock over. One attempt; raises OSError."""
        found = Holder.parse(get_bytes(self.place) or b"")
        return found is not None and found.token == self._me.token

    def _write(self, new: bool) -> bool:
        """Write the lock. False if another process has it. new: not if there is a lock."""
        try:
            if new and retried(lambda: get_bytes(self.place), self.place) is not None:
                return False
            if not retried(lambda: put_bytes(self._content, self.place, only_new=new), self.place):
                return self.is_mine()  # an attempt before may have written it although it failed
        except (FileNotFoundError, PermissionError) as error:
            raise UserError(f"{self.what} cannot be written ({error}): check the bucket and its permissions") from None
        except OSError as error:
            raise UserError(f"{self.what} cannot be written: {error}; check AWS_ENDPOINT_URL") from None
        time.sleep(CONFIRM_S)
        holder = retried(self._holder, self.place)
        if holder is None or holder.token != self._me.token:
            raise in_use(self.what, holder)
        return True

    @property
    def _content(self) -> bytes:
        return json.dumps(asdict(self._me)).encode()

    def _holder(self) -> Holder | None:
        return Holder.parse(retried(lambda: get_bytes(self.place), self.place) or b"")

    def _touched(self) -> Hashable | None:
        try:
            info = retried(lambda: filesystem().info(self.place), self.place)
        except FileNotFoundError:
            return None
        return str(info["LastModified"]), str(info.get("ETag"))

    def _touch(self) -> None:
        """Write the lock anew until it is released. Ends the process if another one has taken the lock."""
        while not self._released.wait(TOUCH_S):
            with contextlib.suppress(Exception):  # the store is away: whoever uploads says so
                found = Holder.parse(get_bytes(self.place) or b"")
                if found is not None and found.token != self._me.token and not self._released.is_set():
                    logger.critical(
                        "%s was taken over by %s, as this process gave no sign of life: it ends here", self.what, found
                    )
                    os._exit(1)
                put_bytes(self._content, self.place)
