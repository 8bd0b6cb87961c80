"""Repository-level completion: files of a held-out package in a row, the last of which uses names that earlier ones define.

A sample holds excerpts of the files that define what the last file imports, then other files of the package, then the last file's
beginning. Its spans are the tokens of the imported names in the last file, in its import statements (`kind="import"`) and in its code
(`kind="use"`), wherever the definition lies at least `min_distance` tokens before. A model that reads far back predicts them better: of a use, the
name stood in the import line too, so `since_mention` says how far back it was last seen.
"""

from __future__ import annotations

import ast
import hashlib
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from benchmarks.quality.corpus import held_out_documents, package_of
from lemo_hf.errors import LemoError
from lemo_hf.text_data import TextDocument

MIN_DISTANCE = 1024
# Of a sample's tokens, the last file's share; the rest is for the files before it.
LAST_FILE_SHARE = 0.375
MAX_DEFINING_FILES = 3
LINES_BEFORE_DEFINITION = 3
MIN_FILE_TOKENS = 64  # no other file is begun for less
_REEXPORTS = 4  # modules that an import is followed through, from `__init__.py` to where the name is defined


@dataclass(frozen=True)
class Span:
    """Where an imported name stands in a sample.

    Args:
        start, end: Its tokens are `input_ids[start:end]`; the first may hold a space or sign before the name.
        name: The name.
        kind: `"import"` in an import statement, `"use"` elsewhere.
        definition: The first token of the line that defines it.
        since_mention: Tokens since the name last stood anywhere in the sample.
    """

    start: int
    end: int
    name: str
    kind: str
    definition: int
    since_mention: int

    @property
    def distance(self) -> int:
        """Tokens between the definition and the name."""
        return self.start - self.definition


@dataclass(frozen=True)
class RepositorySample:
    """A sample: `input_ids`, int64 `(tokens,)`, its spans in order, and the names of its files in order, the completed one last."""

    input_ids: torch.Tensor
    spans: list[Span]
    files: list[str]


class SourceFile:
    """A document with its definitions, imports and uses by line and column, read from its syntax tree."""

    def __init__(self, document: TextDocument) -> None:
        self.name, self.text = document.name, document.text
        self.lines = document.text.splitlines(keepends=True)

    @cached_property
    def tree(self) -> ast.Module:
        try:
            return ast.parse(self.text)
        except (SyntaxError, ValueError):
            return ast.Module([], [])

    @cached_property
    def definitions(self) -> dict[str, int]:
        """Line (from 0) of each top-level function, class or assigned name."""
        found: dict[str, int] = {}
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.setdefault(node.name, node.lineno - 1)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name):
                        found.setdefault(target.id, node.lineno - 1)
        return found

    @cached_property
    def imports(self) -> dict[str, tuple[list[str], list[tuple[int, int]]]]:
        """Names that `from module import name` brings in under their own name: module files (two candidates), (line, column)s."""
        found: dict[str, tuple[list[str], list[tuple[int, int]]]] = {}
        folder = self.name.split("/")[:-1]
        for node in ast.walk(self.tree):
            if not isinstance(node, ast.ImportFrom):
                continue
            if node.level > len(folder):
                continue
            parts = folder[: len(folder) - node.level + 1] if node.level else []
            parts = parts + (node.module.split(".") if node.module else [])
            path = "/".join(parts)
            for alias in node.names:
                if alias.asname is None and alias.name != "*":
                    places = found.setdefault(alias.name, ([f"{path}.py", f"{path}/__init__.py"], []))[1]
                    places.append((alias.lineno - 1, alias.col_offset))
        return found

    @cached_property
    def uses(self) -> dict[str, list[tuple[int, int]]]:
        """(line, column)s where each name is read; names that the file assigns anywhere are left out."""
        read: dict[str, list[tuple[int, int]]] = {}
        stored: set[str] = set(self.definitions)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                read.setdefault(node.id, []).append((node.lineno - 1, node.col_offset))
            elif isinstance(node, ast.Name):
                stored.add(node.id)
            elif isinstance(node, ast.arg):
                stored.add(node.arg)
        return {name: places for name, places in read.items() if name not in stored}

    def character(self, line: int, column: int) -> int:
        """Offset in the text of a syntax tree's place, whose column counts bytes."""
        return sum(map(len, self.lines[:line])) + len(self.lines[line].encode()[:column].decode())


class Repository:
    """The files of one package.

    Args:
        documents: Documents named `package/path.py`.
    """

    def __init__(self, documents: Sequence[TextDocument]) -> None:
        self.files = {document.name: SourceFile(document) for document in documents}

    def defining(self, file: SourceFile, name: str) -> SourceFile | None:
        """The file of the package that defines what `file` imports as `name`, through re-exports; `None` if there is none."""
        for _ in range(_REEXPORTS):
            if name not in file.imports:
                return None
            there = next((self.files[path] for path in file.imports[name][0] if path in self.files), None)
            if there is None or name in there.definitions:
                return there
            file = there
        return None

    def sources(self, last: SourceFile) -> dict[str, list[str]]:
        """By defining file, the names that `last` imports from it and uses; those with the most names first."""
        found: dict[str, list[str]] = {}
        for name in last.imports:
            there = self.defining(last, name) if name in last.uses else None
            if there is not None and there is not last:
                found.setdefault(there.name, []).append(name)
        return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))[:MAX_DEFINING_FILES])


class _Row:
    """Texts laid end to end, tokenised one by one, with each token's place in the whole text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.text = ""
        self.ids: list[int] = []
        self.offsets: list[tuple[int, int]] = []
        if tokenizer.bos_token_id is not None:
            self.ids, self.offsets = [tokenizer.bos_token_id], [(0, 0)]

    def add(self, text: str, limit: int) -> int:
        """Appends at most `limit` tokens of `text`; returns where it begins in the whole text."""
        start = len(self.text)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        taken = encoded["offset_mapping"][: max(limit, 0)]
        self.ids += encoded["input_ids"][: len(taken)]
        self.offsets += [(start + first, start + last) for first, last in taken]
        self.text += text[: taken[-1][1]] if taken else ""
        return start

    def span(self, first: int, last: int) -> tuple[int, int] | None:
        """Tokens that overlap the characters `[first, last)`; `None` where those are not all there."""
        if last > len(self.text):
            return None
        start = bisect_right(self.offsets, first, key=lambda offset: offset[1])
        end = bisect_left(self.offsets, last, key=lambda offset: offset[0])
        return start, end

    def mentions(self, name: str) -> list[int]:
        """First tokens of all places where the word `name` stands."""
        found = re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", self.text)
        return [span[0] for match in found if (span := self.span(*match.span()))]


def _excerpt(file: SourceFile, names: Sequence[str]) -> tuple[str, int]:
    """The file's text from just before the first definition of `names`, and that line's number."""
    first = max(0, min(file.definitions[name] for name in names) - LINES_BEFORE_DEFINITION)
    return "".join(file.lines[first:]), first


def build_sample(
    repository: Repository, last: SourceFile, tokenizer: Any, tokens: int, min_distance: int = MIN_DISTANCE
) -> RepositorySample | None:
    """The sample that completes the file `last`, at most `tokens` long; `None` if no name in it lies far enough from its definition.

    Args:
        repository: The package's files.
        last: One of them.
        tokenizer: A fast tokenizer (spans come from its character offsets).
        tokens: Most tokens of the sample.
        min_distance: Tokens from a definition to a name that counts.
    """
    sources = repository.sources(last)
    if not sources:
        return None
    row = _Row(tokenizer)
    for_last = int(tokens * LAST_FILE_SHARE)
    room = tokens - for_last - len(row.ids)
    definition: dict[str, int] = {}
    for path, names in sources.items():
        file = repository.files[path]
        text, first_line = _excerpt(file, names)
        header = f"# {path}\n"
        start = row.add(header + text, room // len(sources)) + len(header)
        for name in names:
            line = sum(map(len, file.lines[first_line : file.definitions[name]]))
            found = row.span(start + line, start + line + len(file.lines[file.definitions[name]]))
            if found is not None:
                definition[name] = found[0]
    files = list(sources)
    for path in sorted(set(repository.files) - set(sources) - {last.name}, key=_hash):
        left = tokens - for_last - len(row.ids)
        if left < MIN_FILE_TOKENS:
            break
        row.add(f"# {path}\n{repository.files[path].text}", left)
        files.append(path)
    header = f"# {last.name}\n"
    start = row.add(header + last.text, tokens - len(row.ids)) + len(header)
    spans = []
    for name, defined in definition.items():
        mentions = row.mentions(name)
        for kind, (line, column) in [
            *(("import", place) for place in last.imports[name][1]),
            *(("use", place) for place in last.uses[name]),
        ]:
            at = start + last.character(line, column)
            found = row.span(at, at + len(name))
            if found is not None and found[0] - defined >= min_distance:
                since = found[0] - max(mention for mention in mentions if mention < found[0])
                spans.append(Span(*found, name, kind, defined, since))
    if not spans:
        return None
    return RepositorySample(torch.tensor(row.ids), sorted(spans, key=lambda span: span.start), [*files, last.name])


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8).digest()


def _samples_of(documents: Sequence[TextDocument], tokenizer: Any, tokens: int, min_distance: int) -> Iterator[RepositorySample]:
    """Samples of one package, by the hash of the completed file's name."""
    repository = Repository(documents)
    for name in sorted(repository.files, key=_hash):
        found = build_sample(repository, repository.files[name], tokenizer, tokens, min_distance)
        if found is not None:
            yield found


def repository_samples(
    tokenizer: Any,
    tokens: int = 4096,
    count: int = 48,
    min_distance: int = MIN_DISTANCE,
    documents: Sequence[TextDocument] | None = None,
) -> list[RepositorySample]:
    """At most `count` samples, the packages taking turns.

    Args:
        tokenizer: A fast tokenizer.
        tokens: Most tokens of a sample.
        count: Most samples.
        min_distance: Tokens from a definition to a name that counts.
        documents: Held-out documents instead of the corpus's.

    Raises:
        LemoError: `tokens` leave no room for a definition `min_distance` tokens away, or nothing was found.
    """
    if tokens * (1 - LAST_FILE_SHARE) <= min_distance // 2 or tokens <= min_distance:
        raise LemoError(
            f"samples are too short; {tokens} tokens for a distance of {min_distance}; use at least {2 * min_distance}"
        )
    by_package: dict[str, list[TextDocument]] = {}
    for document in held_out_documents() if documents is None else documents:
        by_package.setdefault(package_of(document.name), []).append(document)
    running = [_samples_of(each, tokenizer, tokens, min_distance) for _, each in sorted(by_package.items())]
    found: list[RepositorySample] = []
    while running and len(found) < count:
        for samples in list(running):
            sample = next(samples, None)
            if sample is None:
                running.remove(samples)
            elif len(found) < count:
                found.append(sample)
    if not found:
        raise LemoError(
            f"no file uses a name defined {min_distance} tokens before; {len(by_package)} packages; lower min_distance"
        )
    return found
