"""A model's tokenizer files as one ZIP archive, for clients that tokenize themselves.

Only files of these names leave the model's directory; weights and everything else stay.
"""

from __future__ import annotations

import functools
import hashlib
import io
import zipfile
from pathlib import Path
from typing import Final

from drift_gateway.refusal import Reason, Refusal

NAMES: Final = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "config.json", "generation_config.json", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
MAX_BYTES: Final = 200 * 1024 * 1024
"""What smg takes at most."""
PIECE_BYTES: Final = 512 * 1024


@functools.lru_cache(maxsize=1)
def archive(directory: str) -> tuple[bytes, str]:
    """The archive, and its SHA-256 in hexadecimal. Raises Refusal where it would be too large.

    The same files make the same bytes.
    """
    found = [path for name in NAMES if (path := Path(directory) / name).is_file()]
    size = sum(path.stat().st_size for path in found)
    if size > MAX_BYTES:
        raise Refusal(
            Reason.NO_TOKENIZER, f"the tokenizer's files have {size} bytes, more than the {MAX_BYTES} sent"
        )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as into:
        for path in found:
            entry = zipfile.ZipInfo(path.name)  # with a fixed time
            entry.compress_type = zipfile.ZIP_DEFLATED
            into.writestr(entry, path.read_bytes())
    data = buffer.getvalue()
    return data, hashlib.sha256(data).hexdigest()
