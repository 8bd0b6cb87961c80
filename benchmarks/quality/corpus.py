"""The quality bench's text: Python sources of this machine, split by package, without near-duplicate files.

    python -m benchmarks.quality.corpus          (what there is, by split and package)

Three splits that share no package: `base` trains the base model, `extension` extends its context, `held_out` measures. Beyond exact
copies, a file is left out if it is much like one already taken: with S(d) the set of its hashed runs of five words, Jaccard
`|S(a) & S(b)| / |S(a) | S(b)|` or, against files vendored with changes, containment `|S(a) & S(b)| / |S(a)|`. Held-out files are taken first,
so that no copy of one (a vendored package, a model file copied from another) can stand in the training text.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from lemo_hf.errors import LemoError
from lemo_hf.quickstart.comparison import EVALUATION_PACKAGES, TRAIN_PACKAGES
from lemo_hf.text_data import MIN_CHARACTERS, TextDocument, is_held_out, package_files

# The quickstart's packages keep their roles, so that the two can be compared. Packages that are not installed are left out.
HELD_OUT_PACKAGES = (*EVALUATION_PACKAGES, "aiohttp", "fsspec", "pydantic", "rich", "trl", "werkzeug")
EXTENSION_PACKAGES = (*TRAIN_PACKAGES, "hypothesis", "matplotlib", "mypy", "tensorboard")
BASE_PACKAGES = (
    *("stdlib", "_pytest", "anyio", "attr", "bitsandbytes", "click", "dateutil", "dill", "evaluate", "filelock", "fontTools"),
    *("google", "grpc", "httpx2", "idna", "jinja2", "markdown", "markdown_it", "mpmath", "multiprocess", "mypyc", "numpy"),
    *("packaging", "pandas", "PIL", "pip", "psutil", "pyarrow", "pygments", "pyparsing", "requests", "setuptools", "sympy"),
    *("torch", "torchgen", "tqdm", "transformers", "triton", "typer", "urllib3", "yaml"),
)
SPLITS = {"held_out": HELD_OUT_PACKAGES, "extension": EXTENSION_PACKAGES, "base": BASE_PACKAGES}
# Bytes that a package other than the standard library may give to the base's text, or transformers and torch would be most of it.
BASE_BYTES = 1_500_000
LARGE_BASE_BYTES = 20_000_000
# Files of this share of the standard library were held out from the embedded base, which is where the small base begins.
STDLIB_HELD_OUT_SHARE = 0.05
MAX_FILE_BYTES = 400_000  # longer files are tables

SHINGLE_WORDS = 5
MAX_JACCARD = 0.5
MAX_CONTAINMENT = 0.7
SAMPLED_SHINGLES = 8  # one of so many shingles finds the candidates, which are then compared in full
SMALLEST_SHINGLES = 8
FOLDER = Path("outputs/quality/corpus")
_WORD = re.compile(r"\w+|[^\w\s]")


def shingles(text: str) -> np.ndarray:
    """Sorted distinct 64-bit hashes of the runs of `SHINGLE_WORDS` words (or signs) of `text`, uint64."""
    words = np.fromiter((zlib.crc32(word.encode()) for word in _WORD.findall(text)), np.uint64)
    if len(words) < SHINGLE_WORDS:
        return np.unique(words)
    hashes = np.zeros(len(words) - SHINGLE_WORDS + 1, np.uint64)
    for offset in range(SHINGLE_WORDS):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + words[offset : len(words) - SHINGLE_WORDS + 1 + offset]
        hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes)


def drop_near_duplicates(documents: Iterable[TextDocument]) -> tuple[list[TextDocument], list[tuple[str, str]]]:
    """Leaves out every document that is much like an earlier one that stayed.

    Candidates share one of the sampled shingles (one in `SAMPLED_SHINGLES`, and the few smallest, which also catches short
    files); Jaccard and containment are then exact.

    Returns:
        The documents that stay, in their order, and (left out, like which) names.
    """
    kept: list[TextDocument] = []
    dropped: list[tuple[str, str]] = []
    sets: list[np.ndarray] = []
    holders: dict[int, list[int]] = {}
    for document in documents:
        own = shingles(document.text)
        sample = np.union1d(own[own % SAMPLED_SHINGLES == 0], own[:SMALLEST_SHINGLES]).tolist()
        shared: Counter[int] = Counter(holder for shingle in sample for holder in holders.get(shingle, ()))
        like = None
        for holder, count in shared.most_common(8):
            if count < 0.5 * MAX_JACCARD * len(sample):
                break  # an estimate this low is no near duplicate
            common = len(np.intersect1d(own, sets[holder], assume_unique=True))
            if common >= MAX_CONTAINMENT * len(own) or common >= MAX_JACCARD * (len(own) + len(sets[holder]) - common):
                like = holder
                break
        if like is not None:
            dropped.append((document.name, kept[like].name))
            continue
        for shingle in sample:
            holders.setdefault(shingle, []).append(len(kept))
        kept.append(document)
        sets.append(own)
    return kept, dropped


def _installed_files(package: str) -> list[tuple[str, Path]]:
    """(name, path) of a package's files in the order of their names' hashes; empty if it is not installed."""
    try:
        found = list(package_files(package))
    except LemoError:
        return []
    return sorted(found, key=lambda item: hashlib.blake2b(item[0].encode(), digest_size=8).digest())


def _candidates(split: str, base_bytes: int) -> Iterator[tuple[str, Path]]:
    """Files of a split before near-duplicates are dropped; a package of `base` gives at most its share of bytes."""
    for package in SPLITS[split]:
        room = base_bytes if split == "base" and package != "stdlib" else None
        for name, path in _installed_files(package):
            size = path.stat().st_size
            if not MIN_CHARACTERS <= size <= MAX_FILE_BYTES:
                continue
            if package == "stdlib" and is_held_out(name, STDLIB_HELD_OUT_SHARE):
                continue
            if room is not None:
                if size > room:
                    continue
                room -= size
            yield name, path


def _build(files: dict[str, list[tuple[str, Path]]]) -> dict[str, object]:
    """Reads the files and drops near-duplicates, held-out files first; per split the documents and what was dropped."""
    documents: list[TextDocument] = []
    split_of: dict[str, str] = {}
    for split, found in files.items():
        for name, path in sorted(found):
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            documents.append(TextDocument(name, text))
            split_of[name] = split
    kept, dropped = drop_near_duplicates(documents)
    return {
        "documents": {split: [[d.name, d.text] for d in kept if split_of[d.name] == split] for split in SPLITS},
        "dropped": {split: [pair for pair in dropped if split_of[pair[0]] == split] for split in SPLITS},
    }


@lru_cache(maxsize=2)
def corpus(base_bytes: int = BASE_BYTES) -> dict[str, dict[str, list]]:
    """The whole corpus: `documents` and `dropped`, each by split.

    It is made once (about a minute) and then read from `outputs/quality/corpus/`, under the hash of the files' names and sizes
    and of this module.

    Args:
        base_bytes: Most bytes that a package gives to the `base` split, the standard library excepted.
    """
    files = {split: list(_candidates(split, base_bytes)) for split in SPLITS}
    described = [(split, name, path.stat().st_size) for split, found in files.items() for name, path in found]
    content = json.dumps(described).encode() + Path(__file__).read_bytes()
    place = FOLDER / f"{hashlib.blake2b(content, digest_size=8).hexdigest()}.json"
    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(_build(files)))
        os.replace(partial, place)
    found = json.loads(place.read_text())
    return {"documents": found["documents"], "dropped": found["dropped"]}


def _documents(split: str, packages: Sequence[str] | None, base_bytes: int = BASE_BYTES) -> list[TextDocument]:
    for package in packages or ():
        if package not in SPLITS[split]:
            raise LemoError(
                f"package is not in the {split} split; {package!r}; choose among {', '.join(SPLITS[split])}, whose roles are fixed"
            )
    found = [TextDocument(name, text) for name, text in corpus(base_bytes)["documents"][split]]
    chosen = [document for document in found if packages is None or package_of(document.name) in packages]
    if not chosen:
        raise LemoError(f"split has no text here; {split!r} of {packages or 'all packages'}; install its packages")
    return chosen


def package_of(name: str) -> str:
    """The package of a document: `stdlib/asyncio/queues.py` and `six.py` are of `stdlib` and `six`."""
    return name.split("/", 1)[0].removesuffix(".py")


def training_documents(split: str, packages: Sequence[str] | None = None, base_bytes: int = BASE_BYTES) -> list[TextDocument]:
    """Documents to train on.

    Args:
        split: `"base"` (the base model's text) or `"extension"` (text of other packages, for extending its context).
        packages: Only these packages of the split.
        base_bytes: Most bytes that a package gives to the `base` split, the standard library excepted.

    Raises:
        LemoError: Another split, a package of another split, or no text.
    """
    if split not in ("base", "extension"):
        raise LemoError(f"no split to train on; {split!r}; choose base or extension")
    return _documents(split, packages, base_bytes)


def held_out_documents(packages: Sequence[str] | None = None) -> list[TextDocument]:
    """Documents of packages that no training split touches, sorted by name; a package's files are neighbours.

    Raises:
        LemoError: A package of another split, or no text.
    """
    return _documents("held_out", packages)


def statistics() -> dict[str, dict[str, object]]:
    """By split: files, bytes, files dropped as near-duplicates, of them those like a file of another split, bytes by package."""
    found = corpus()
    split_of = {name: split for split, documents in found["documents"].items() for name, _ in documents}
    out: dict[str, dict[str, object]] = {}
    for split, documents in found["documents"].items():
        sizes: Counter[str] = Counter()
        for name, text in documents:
            sizes[package_of(name)] += len(text.encode())
        dropped = found["dropped"][split]
        out[split] = {
            "files": len(documents),
            "bytes": sum(sizes.values()),
            "dropped_near_duplicates": len(dropped),
            "dropped_like_another_split": sum(split_of[like] != split for _, like in dropped),
            "bytes_by_package": dict(sorted(sizes.items())),
        }
    return out


def main() -> None:
    """Prints the corpus by split."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(json.dumps(statistics(), indent=1))


if __name__ == "__main__":
    main()
