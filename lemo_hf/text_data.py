"""Text sources and packing: from Python files, local text or a `datasets` id to token windows for `Trainer`.

A source yields named documents; the name alone decides, by its hash, whether a document is held out, so the
split never depends on what else is installed. Packing gives one of two layouts (`layout`):

- `"windows"`: every sample is a window of one document, all of `seq_len` tokens.
- `"packed"`: every sample is several documents (or windows of long ones) in a row, `position_ids` restarting at 0
  with each of them, which is how transformers and LeMo find the document boundaries of a row.

Labels equal the inputs, except that the first label of every packed document is -100: the loss shifts labels by
one, so that label is what the previous document's last token would be asked to predict.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.data import Dataset

from .errors import LemoError

# Folders that hold tests, fixtures or other people's code rather than the package's own sources.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload", "_bundled"}
)
MIN_CHARACTERS = 200
# A document is a near duplicate when this share of its characters stands in lines already seen.
NEAR_DUPLICATE_SHARE = 0.8
LAYOUTS = ("windows", "packed")


class HasName(Protocol):
    """What the split of a document needs."""

    @property
    def name(self) -> str: ...


Named = TypeVar("Named", bound=HasName)


@dataclass(frozen=True)
class TextDocument:
    """A piece of text under a stable name (`stdlib/asyncio/queues.py`), the name deciding its split."""

    name: str
    text: str


def is_held_out(name: str, share: float) -> bool:
    """Whether the document called `name` belongs to the held-out split.

    Args:
        name: stable name of the document.
        share: expected held-out fraction of the documents, in [0, 1].
    """
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def split_documents(documents: Iterable[Named], share: float = 0.05) -> tuple[list[Named], list[Named]]:
    """Splits documents into (training, held-out) by the hash of their names; `share` is the held-out fraction."""
    train: list[Named] = []
    held_out: list[Named] = []
    for document in documents:
        (held_out if is_held_out(document.name, share) else train).append(document)
    return train, held_out


def drop_duplicates(documents: Iterable[TextDocument]) -> list[TextDocument]:
    """Sorts documents by name and drops exact and near duplicates of earlier ones.

    Near means that at least 80 % of the characters stand in lines that earlier documents already hold (generated
    tables, vendored copies, files that differ in a licence header).
    """
    seen: set[bytes] = set()
    kept: list[TextDocument] = []
    for document in sorted(documents, key=lambda document: document.name):
        lines = [line.strip().encode() for line in document.text.splitlines()]
        lines = [line for line in lines if line]
        size = sum(map(len, lines))
        known = sum(len(line) for line in lines if line in seen)
        if size and known >= NEAR_DUPLICATE_SHARE * size:
            continue
        seen.update(lines)
        kept.append(document)
    return kept


def package_files(package: str) -> Iterator[tuple[str, Path]]:
    """Yields (document name, path) of a package's Python files; `stdlib` is the running interpreter's library."""
    if package == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
    else:
        try:
            spec = importlib.util.find_spec(package)  # locates a top-level package without importing it
        except (ImportError, ValueError):
            spec = None
        if spec is None or "." in package:
            raise LemoError(
                f"Python package is not installed; {package!r}; install it, or name an installed top-level package or 'stdlib'"
            )
        if not spec.submodule_search_locations:
            if spec.origin is None or not spec.origin.endswith(".py"):
                raise LemoError(f"Python package has no source files; {package!r}; name a package written in Python")
            yield f"{package}.py", Path(spec.origin)
            return
        root = Path(next(iter(spec.submodule_search_locations)))
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts[:-1]):
            yield f"{package}/{relative.as_posix()}", path


def python_sources(packages: Sequence[str] = ("stdlib",)) -> list[TextDocument]:
    """Reads the Python files of installed packages, without importing the packages.

    Args:
        packages: names of installed packages; `"stdlib"` means the running interpreter's standard library. Tests
            are left out, as are files shorter than 200 characters or not decodable as UTF-8.

    Returns:
        Documents sorted by name, without exact or near duplicates.

    Raises:
        LemoError: a package is not installed or leaves no text.
    """
    documents: list[TextDocument] = []
    for package in packages:
        found = len(documents)
        for name, path in package_files(package):
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if len(text) >= MIN_CHARACTERS:
                documents.append(TextDocument(name, text))
        if len(documents) == found:
            raise LemoError(f"package has no usable Python sources; {package!r}; name another package or 'stdlib'")
    if not documents:
        raise LemoError("no Python packages were named; packages=[]; name at least one, for example 'stdlib'")
    return drop_duplicates(documents)


def text_file_documents(paths: Sequence[str | Path], field: str = "text") -> list[TextDocument]:
    """Reads local text files (one document each) and `.jsonl` files (one document a line, in `field`).

    Args:
        paths: files, or folders whose `.txt`, `.md`, `.py` and `.jsonl` files are taken, sorted by path.
        field: the JSONL field that holds the text.

    Raises:
        LemoError: a path is missing, not UTF-8, not JSONL with that field, or nothing but blank text was found.
    """
    documents: list[TextDocument] = []
    for path in data_paths(paths, {".txt", ".md", ".py", ".jsonl"}):
        if path.suffix != ".jsonl":
            documents.append(TextDocument(path.name, _utf8_text(path)))
            continue
        for name, place, row in jsonl_rows(path):
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                found = sorted(row) if isinstance(row, dict) else type(row).__name__
                raise LemoError(
                    f"JSONL line has no text in field {field!r}; {place} has {found}; set the text field to one of them"
                )
            documents.append(TextDocument(name, row[field]))
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise LemoError(f"data is empty; {[str(path) for path in paths]}; give files that hold text")
    return documents


def data_paths(paths: Sequence[str | Path], suffixes: Collection[str]) -> list[Path]:
    """The files in `paths`, and of the folders in it those with one of `suffixes`, sorted by path.

    Raises:
        LemoError: If a path does not exist.
    """
    files: list[Path] = []
    for given in map(Path, paths):
        if given.is_dir():
            files += sorted(path for path in given.rglob("*") if path.suffix in suffixes and path.is_file())
        elif given.is_file():
            files.append(given)
        else:
            raise LemoError(f"data file does not exist; {str(given)!r}; give the path of a text or .jsonl file")
    return files


def _utf8_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LemoError(f"data file is not UTF-8 text; {str(path)!r} byte {error.start}; convert it to UTF-8") from error


def jsonl_rows(path: Path) -> Iterator[tuple[str, str, Any]]:
    """Yields (name, place, row) of a JSONL file's lines: a stable name, and `path:line` for errors.

    Raises:
        LemoError: If the file is no UTF-8, or a line no JSON.
    """
    for number, line in enumerate(_utf8_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise LemoError(f"line is not JSON ({error.msg}); {place}; write one JSON object a line") from error
        yield f"{path.name}:{number}", place, row


def dataset_documents(
    name: str,
    config: str | None = None,
    split: str = "train",
    streaming: bool = True,
    field: str = "text",
    max_documents: int | None = None,
) -> list[TextDocument]:
    """Reads documents from a `datasets` id (on the Hub, or a local folder that `load_dataset` takes).

    Args:
        name, config, split, streaming: as in `datasets.load_dataset`.
        field: the column that holds the text.
        max_documents: stop after this many; needed when streaming a data set that does not fit in memory.

    Raises:
        LemoError: `datasets` is not installed, or the data set cannot be read or has no such column or no text.
    """
    documents: list[TextDocument] = []
    for place, row in dataset_rows(name, config, split, streaming):
        if max_documents is not None and len(documents) >= max_documents:
            break
        if not isinstance(row.get(field), str):
            raise LemoError(
                f"data set has no text column {field!r}; {name!r} has {sorted(row)}; set the text field to one of them"
            )
        if row[field].strip():
            documents.append(TextDocument(place, row[field]))
    if not documents:
        raise LemoError(f"data set has no text; {name!r} split {split!r}; choose another split or field")
    return documents


def dataset_rows(name: str, config: str | None, split: str, streaming: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, row) of a data set, the place being a stable name; arguments as in `datasets.load_dataset`.

    Raises:
        LemoError: `datasets` is not installed, or the data set cannot be read.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise LemoError(f"reading a data set needs the datasets package; {name!r}; pip install datasets") from error
    try:
        rows = load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # whatever went wrong (network, name, split), the user needs one line
        reason = " ".join(str(error).split())[:200]
        raise LemoError(
            f"data set cannot be loaded ({reason}); {name!r} split {split!r}; check its name, split and network"
        ) from error
    for number, row in enumerate(rows):
        yield f"{name}/{split}:{number}", row


def tokenize_documents(tokenizer: Any, documents: Sequence[TextDocument]) -> list[list[int]]:
    """Token ids of each document, with the tokenizer's bos before and eos after it where it has them."""
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # verbose=False: documents longer than the model's context are expected here, they are cut below.
    encoded = tokenizer([document.text for document in documents], add_special_tokens=False, verbose=False)["input_ids"]
    return [before + list(ids) + after for ids in encoded]


class PackedDocuments(Dataset):
    """Map-style data set of packed samples for `Trainer`.

    Each item is a dict of int64 tensors of shape `(seq_len,)`: `input_ids`, `labels` and, in the packed layout,
    `position_ids`.
    """

    def __init__(self, samples: list[dict[str, torch.Tensor]], seq_len: int) -> None:
        self.samples = samples
        self.seq_len = seq_len

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return dict(self.samples[index])


def _sample(pieces: Sequence[Sequence[int]], positions: bool) -> dict[str, torch.Tensor]:
    """One sample from the documents (or windows of documents) that stand in its row."""
    input_ids = torch.tensor([token for piece in pieces for token in piece], dtype=torch.long)
    labels = input_ids.clone()
    start = 0
    for piece in pieces:
        labels[start] = -100
        start += len(piece)
    sample = {"input_ids": input_ids, "labels": labels}
    if positions:
        sample["position_ids"] = torch.cat([torch.arange(len(piece)) for piece in pieces])
    return sample


def pack_token_ids(token_ids: Sequence[Sequence[int]], seq_len: int, layout: str = "windows") -> PackedDocuments:
    """Cuts tokenised documents into samples of exactly `seq_len` tokens.

    Args:
        token_ids: one sequence of token ids a document.
        seq_len: tokens a sample.
        layout: `"windows"` cuts each document into windows and drops its shorter rest; `"packed"` lays documents in a
            row one after the other, cutting them where a row ends, and drops the last row if it is not full.

    Raises:
        LemoError: unknown layout, or nothing fills a sample.
    """
    if layout not in LAYOUTS:
        raise LemoError(f"unknown layout; {layout!r}; choose one of {', '.join(LAYOUTS)}")
    if seq_len < 2:
        raise LemoError(f"seq_len is too short to predict a token; {seq_len}; use at least 2")
    samples: list[dict[str, torch.Tensor]] = []
    if layout == "windows":
        for ids in token_ids:
            for start in range(0, len(ids) - seq_len + 1, seq_len):
                samples.append(_sample([ids[start : start + seq_len]], positions=False))
    else:
        row: list[Sequence[int]] = []
        room = seq_len
        for ids in token_ids:
            start = 0
            while start < len(ids):
                piece = ids[start : start + room]
                start += len(piece)
                row.append(piece)
                room -= len(piece)
                if room == 0:
                    samples.append(_sample(row, positions=True))
                    row, room = [], seq_len
    if not samples:
        longest = max((len(ids) for ids in token_ids), default=0)
        total = sum(len(ids) for ids in token_ids)
        raise LemoError(
            f"data does not fill one sample of seq_len={seq_len}; longest document {longest} tokens, {total} in all; "
            "lower seq_len or give more text"
        )
    return PackedDocuments(samples, seq_len)


def pack_documents(
    tokenizer: Any, documents: Sequence[TextDocument], seq_len: int, layout: str = "windows", block_size: int | None = None
) -> PackedDocuments:
    """Tokenises documents and packs them to `seq_len`; see `pack_token_ids` for the layouts.

    Args:
        block_size: LeMo's block size; a `seq_len` below it is refused, since nothing could be eliminated.

    Raises:
        LemoError: no documents, `seq_len` shorter than a block, or nothing fills a sample.
    """
    if not documents:
        raise LemoError("data is empty; 0 documents; give at least one text, or check the held-out share")
    if block_size is not None and seq_len < block_size:
        raise LemoError(
            f"seq_len {seq_len} is shorter than one block (block_size={block_size}); lower block_size or use longer samples"
        )
    return pack_token_ids(tokenize_documents(tokenizer, documents), seq_len, layout)


def spread_samples(samples: PackedDocuments, limit: int | None) -> PackedDocuments:
    """At most `limit` samples, evenly from all of them: documents are sorted, and the first ones may all be of one kind."""
    count = len(samples) if limit is None else min(limit, len(samples))
    return PackedDocuments([samples.samples[index * len(samples) // count] for index in range(count)], samples.seq_len)
