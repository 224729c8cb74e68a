"""The names of an engine's requests, each in use from when its request comes until the engine has forgotten it.

The end of a cancelled request is told at once, but a lane may still work on it. One that comes under the same name
meanwhile, as whoever tries again after a cancellation or a stop string sends it, waits here until that is over. Knows
nothing of requests but what they are called.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import partial

from drift_scheduler.errors import DriftError

Act = Callable[[], None]


class Names:
    """Threads may share it. What it is given to call is called without its lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By name, what is to be done once it is free; `None` while its request has not been cancelled.
        self._used: dict[str, list[Act] | None] = {}

    def take(self, name: str, enter: Act, refused: Callable[[DriftError], None]) -> None:
        """Call `enter`, which brings a request of that name: now, or once the cancelled one of that name is gone.

        Raises DriftError when the name is in use, and what `enter` raises; `refused` hears of that where it is late.
        """
        with self._lock:
            if name in self._used:
                later = self._used[name]
                if later is None:
                    raise DriftError(f"request id '{name}' is in use")
                later.append(partial(self._take_late, name, enter, refused))
                return
            self._used[name] = None
        try:
            enter()
        except DriftError:
            self.free((name,))
            raise

    def leave(self, name: str, cancel: Act) -> None:
        """Call `cancel`, which ends the request of that name, after whatever brings that."""
        with self._lock:
            later = self._used.get(name)
            if later:
                later.append(partial(self.leave, name, cancel))
                return
            if name in self._used:
                self._used[name] = []
        cancel()

    def free(self, names: Iterable[str]) -> None:
        """The engine has forgotten the requests of these names."""
        for name in names:
            with self._lock:
                later = self._used.pop(name, None)
            for act in later or ():
                act()

    def _take_late(self, name: str, enter: Act, refused: Callable[[DriftError], None]) -> None:
        try:
            self.take(name, enter, refused)
        except DriftError as error:
            refused(error)
