"""When Python looks for unreachable cycles in a gateway process.

Streams make none, cancelled ones neither: what they allocate goes by reference counts. With Python's defaults a
process that streams to 512 clients spent 13% of its time looking at the modules and the tokenizer again and again,
60 ms at a time.
"""

from __future__ import annotations

import gc
from typing import Final

THRESHOLDS: Final = (5_000, 20, 20)
"""Of allocations before the youngest objects are looked at, and of looks at one generation before the next older one.
gRPC leaves one of five objects for each call, and errors may leave tracebacks, so there is a look at all that is
young now and then."""


def settle() -> None:
    """Call it when the process has started up: what is there now stays, and is never looked at again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
