"""Text as bytes."""

import sys
import sysconfig
from pathlib import Path

import numpy as np

from .settings import Settings, fail

SUFFIXES = (".py", ".txt", ".md", ".rst")


def load(settings: Settings) -> tuple[np.ndarray, np.ndarray, str]:
    """Return the bytes for training and for validation, and what they are.

    Every tenth file (after a fixed shuffle) is for validation, so that no file is in both; of files
    with the same contents there is one. A single file is cut instead; its last tenth is for
    validation.
    """
    if settings.text:
        name, files = ", ".join(path.name for path in settings.text), set()
        for path in settings.text:
            if not path.exists():
                fail(f"--text: no such file or folder: {path}")
            inside = {f for f in path.rglob("*") if f.suffix in SUFFIXES}
            files |= inside if path.is_dir() else {path}
    else:
        name = f"Python {sys.version_info.major}.{sys.version_info.minor} standard library"
        root = Path(sysconfig.get_path("stdlib"))
        files = {f for f in root.rglob("*.py") if "site-packages" not in f.parts}

    files = sorted(f for f in files if f.is_file() and f.stat().st_size)
    order = np.random.default_rng(0).permutation(len(files))
    contents, size = {}, 0
    for i in order:
        if size >= settings.megabytes * 1e6:
            break
        content = files[i].read_bytes()
        size += 0 if content in contents else len(content)
        contents[content] = None
    contents = [np.frombuffer(content, np.uint8) for content in contents]
    if not contents:
        fail(f"--text: no text in {name}; folders are searched for {', '.join(SUFFIXES)}")
    if len(contents) == 1:
        train, validation = np.split(contents[0], [contents[0].size * 9 // 10])
    else:
        validation = np.concatenate(contents[::10])
        train = np.concatenate([c for i, c in enumerate(contents) if i % 10])
    for part, data in (("training", train), ("validation", validation)):
        if data.size <= settings.seq:
            fail(
                f"--text: expected more than {settings.seq} bytes (--seq) for {part}, "
                f"got {data.size}; give more text or a smaller --seq"
            )
    sizes = f"{train.size / 1e6:.3g} MB for training, {validation.size / 1e6:.3g} MB held out"
    return train, validation, f"{name}, {len(contents)} files, {sizes}"


def windows(data: np.ndarray, rng: np.random.Generator, count: int, seq: int) -> np.ndarray:
    """Return `count` random windows of the text, int32 [count, seq + 1]."""
    starts = rng.integers(0, data.size - seq, count)
    return data[starts[:, None] + np.arange(seq + 1)].astype(np.int32)
