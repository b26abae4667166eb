"""What tells files from others of the same names, in a fraction of a second however large."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

BLOCKS, BLOCK_BYTES = 64, 1 << 16


def fingerprint(files: Sequence[Path]) -> str:
    """SHA-256 over names, sizes and contents; of a file above 4 MiB, over 64 blocks of it.

    Training changes nearly every weight and editing moves all text behind it, so the evenly
    spaced blocks (first and last included) tell such files apart; a change that spares them all
    and the size is not seen.
    """
    digest = sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\n".encode())
        with file.open("rb") as data:
            if size <= BLOCKS * BLOCK_BYTES:
                digest.update(data.read())
                continue
            for block in range(BLOCKS):
                data.seek((size - BLOCK_BYTES) * block // (BLOCKS - 1))
                digest.update(data.read(BLOCK_BYTES))
    return f"sha256:{digest.hexdigest()}"
