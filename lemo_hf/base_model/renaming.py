"""Renames identifiers in training documents, against memorisation.

A small corpus seen for several epochs is learnt by heart: which name follows is then known from the rest of the file. With
other names in place of some of the file's own, the same everywhere in it, the name must be copied from where it stood before.
"""

from __future__ import annotations

import ast
import builtins
import keyword
import random
import re
from collections.abc import Callable, Sequence

from ..text_data import TextDocument

_WORD = re.compile(r"[A-Za-z_]\w*")
# Strings and comments. Triple quotes come first, or they would be taken for an empty string and a quote.
_PROSE = re.compile(
    r'"""(?:[^\\]|\\.)*?"""|' r"'''(?:[^\\]|\\.)*?'''|" r'"(?:[^"\\\n]|\\.)*"|' r"'(?:[^'\\\n]|\\.)*'|" r"#[^\n]*",
    re.DOTALL,
)
_STAYING = frozenset(keyword.kwlist) | frozenset(keyword.softkwlist) | frozenset(dir(builtins)) | {"self", "cls"}
_MIN_LENGTH = 3
_DOCUMENT_SHARE = 0.5
_NAME_SHARE = 0.5
_DRAWS = 20  # before a name stays as it is, because nearly every drawn one stands in the file already


def own_names(text: str) -> list[str]:
    """The names that a Python source defines (functions, classes, arguments, variables, attributes) and has at least twice.

    Keywords, builtins, double-underscore names, and names below three characters are left out. Sorted; empty if the text does
    not parse.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    words = _WORD.findall(text)
    once: set[str] = set()
    repeated = {word for word in words if word in once or once.add(word)}  # type: ignore[func-returns-value]
    return sorted(
        name for name in found & repeated - _STAYING if len(name) >= _MIN_LENGTH and name.isascii() and not name.startswith("__")
    )


def rename(text: str, names: dict[str, str]) -> str:
    """`text` with each name of `names` replaced, everywhere in code at once.

    In strings and comments only names that no prose word looks like (`max_size`, `fromFile`) are replaced.
    """
    in_prose = {name: other for name, other in names.items() if "_" in name.strip("_") or not (name[1:].islower())}

    def replaced(part: str, mapping: dict[str, str]) -> str:
        return _WORD.sub(lambda match: mapping.get(match[0], match[0]), part)

    parts, at = [], 0
    for match in _PROSE.finditer(text):
        parts += [replaced(text[at : match.start()], names), replaced(match[0], in_prose)]
        at = match.end()
    return "".join([*parts, replaced(text[at:], names)])


def _kind(name: str) -> tuple[bool, bool, bool]:
    """Private or not, constant or not, class or not: a name is replaced by one of its own kind."""
    return name.startswith("_"), name.isupper(), name.lstrip("_")[:1].isupper()


class DocumentRenaming:
    """Which documents of an epoch are renamed, and how: a pure function of (seed, epoch, document).

    Half of the documents are, each with about half of its own names, mapped one to one onto names that stand elsewhere in the
    corpus and not in the document.

    Args:
        documents: The corpus.
        first_epoch: Earlier epochs (0-based) see every document as it is.
        seed: Of the draws.
        tokenize: Texts to token ids, as the documents' own were made.
    """

    def __init__(
        self,
        documents: Sequence[TextDocument],
        first_epoch: int,
        seed: int,
        tokenize: Callable[[list[TextDocument]], list[list[int]]],
    ) -> None:
        self.documents = documents
        self.first_epoch = first_epoch
        self.seed = seed
        self.tokenize = tokenize
        self.names = [own_names(document.text) for document in documents]
        self.pools: dict[tuple[bool, bool, bool], list[str]] = {}
        for name in sorted({name for names in self.names for name in names}):
            self.pools.setdefault(_kind(name), []).append(name)

    def _drawn_names(self, epoch: int, index: int) -> dict[str, str]:
        draw = random.Random(f"{self.seed} {epoch} {index}")
        if draw.random() >= _DOCUMENT_SHARE:
            return {}
        taken = set(_WORD.findall(self.documents[index].text))
        names = {}
        for name in self.names[index]:
            if draw.random() >= _NAME_SHARE:
                continue
            for _ in range(_DRAWS):
                other = draw.choice(self.pools[_kind(name)])
                if other not in taken:
                    names[name] = other
                    taken.add(other)
                    break
        return names

    def renamed(self, epoch: int) -> dict[int, list[int]]:
        """Token ids of the documents that `epoch` renames, by their index."""
        if epoch < self.first_epoch:
            return {}
        texts = {}
        for index, document in enumerate(self.documents):
            names = self._drawn_names(epoch, index)
            if names:
                texts[index] = TextDocument(document.name, rename(document.text, names))
        return dict(zip(texts, self.tokenize(list(texts.values())), strict=True))
