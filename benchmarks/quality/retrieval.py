"""Synthetic retrieval as Python-looking text: passkey, key-value and variable tracking, to measure and to train on.

    passkey             # The pass key is 48213. Remember it.       ...   # The pass key is 48213
    key_value           count = 4821                                ...   assert count == 4821
    variable_tracking   first = 4821 ... second = first ... third = second ...   # third = second = first = 4821

`sample` asks one question at the end of a context of a given length about a line at a given depth, in a haystack of text, among lines
of the same kind about other names. Variable tracking (RULER's task) writes the chain out: the answer is `second = first = 4821`, every step of
which is one look-up. `training_row` is dense instead: many definitions and a question about each, or a segment repeated, so that most of a row
teaches copying; a context with one answer in a thousand tokens teaches a small model next to nothing.

Names are words that are one token of the tokenizer and do not occur in the haystack of the same context.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from lemo_hf.errors import LemoError

TASKS = ("passkey", "key_value", "variable_tracking")
HOPS = 2  # lines of a chain beyond the one that holds the number
# One distractor (a pair, or a chain) in so many tokens of a measured context.
KEY_VALUE_SPACING = 32
CHAIN_SPACING = 128
MOST_DISTRACTORS = 128  # beyond, a longer context is a longer way and no more of them
MIN_EPISODE = 128  # tokens of a training row's episode, which hold a definition and its question
_NAME = re.compile(r" [a-z]{3,}")
_FILLERS = (
    "\n    {0}.{1}({2})",
    "\n    {0}[{1}] = {2} + {0}",
    "\n    if {0} is not {1}:\n        return {2}",
    "\n    for {0} in {1}({2}):\n        {0}.{2}()",
    "\n    # The {0} of each {1} is a {2}.",
)


class Words:
    """What the tasks need to know of a tokenizer.

    Args:
        tokenizer: A byte-level tokenizer; one word of Python text with the space before it is often one token of it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
        self.starts_line = torch.tensor([text.startswith("\n") for text in texts])
        self.names: dict[int, str] = {}
        for index, text in enumerate(texts):
            if _NAME.fullmatch(text) and not keyword.iskeyword(text[1:]) and self.encode([text])[0] == [index]:
                self.names[index] = text[1:]
        if len(self.names) < 64:
            raise LemoError(f"tokenizer has too few one-token words; {len(self.names)}; train one of a larger vocabulary")

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]


@lru_cache(maxsize=4)
def words_of(tokenizer: Any) -> Words:
    """The tokenizer's `Words`, made once."""
    return Words(tokenizer)


def _below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (1,), generator=generator))


def _filler(words: Words, count: int, haystack: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
    """`count` tokens of the haystack from a random place, or of made-up lines where there is none."""
    if count <= 0:
        return torch.empty(0, dtype=torch.long)
    if haystack is not None:
        if len(haystack) < count:
            raise LemoError(f"haystack is shorter than the context; {len(haystack)} of {count} tokens; give more text")
        start = _below(len(haystack) - count + 1, generator)
        return haystack[start : start + count].long()
    names = sorted(words.names.values())[::2]  # the other half is left for the questions
    lines: list[int] = []
    while len(lines) < count:
        drawn = torch.randint(len(names), (count // 8 + 1, 3), generator=generator).tolist()
        kinds = torch.randint(len(_FILLERS), (len(drawn),), generator=generator).tolist()
        texts = [_FILLERS[kind].format(*(names[i] for i in each)) for kind, each in zip(kinds, drawn, strict=True)]
        lines += [token for line in words.encode(texts) for token in line]
    return torch.tensor(lines[:count])


def _free_names(words: Words, filler: torch.Tensor) -> list[str]:
    """Names that do not occur in `filler`."""
    there = set(filler.tolist())
    return [name for index, name in sorted(words.names.items()) if index not in there]


def _drawn_names(words: Words, count: int, filler: torch.Tensor, generator: torch.Generator) -> list[str]:
    """`count` different ones of the free names."""
    free = _free_names(words, filler)
    if len(free) < count:
        raise LemoError(f"too few names are left; {len(free)} of {count}; use a shorter context or a larger vocabulary")
    return [free[i] for i in torch.randperm(len(free), generator=generator)[:count].tolist()]


def _numbers(count: int, digits: int, generator: torch.Generator) -> list[int]:
    return torch.randint(10 ** (digits - 1), 10**digits, (count,), generator=generator).tolist()


def _chain(names: Sequence[str], number: int) -> list[str]:
    """Lines that pass a number on from name to name."""
    return [f"\n    {name} = {value}" for name, value in zip(names, [number, *names], strict=False)]


def _question(task: str, names: Sequence[str], number: int) -> tuple[str, str]:
    """A question's text up to its answer, and the answer."""
    if task == "passkey":
        return f"\n    # The pass key{f' of {names[0]}' if names else ''} is", f" {number}"
    if task == "key_value":
        return f"\n    assert {names[0]} ==", f" {number}"
    last, *others = reversed(names)
    return f"\n    # {last} =", f" {' = '.join([*others, str(number)])}"


def _definition(task: str, names: Sequence[str], number: int) -> list[str]:
    """The lines that hold what `_question` asks for."""
    if task == "passkey":
        return [f"\n    # The pass key{f' of {names[0]}' if names else ''} is {number}. Remember it."]
    return _chain(names, number)


def _laid_out(
    words: Words, filler: torch.Tensor, places: Sequence[tuple[int, list[int]]], questions: Sequence[tuple[list[int], list[int]]]
) -> dict[str, Any]:
    """A context: bos, the filler with each piece put before its token `place`, then the questions with their answers.

    Returns:
        `input_ids` and `labels` (-100 outside answers), int64 `(tokens,)`, `answers` as (start, end) token spans, and `pieces`, the
        start of each piece.
    """
    ids = [] if words.tokenizer.bos_token_id is None else [words.tokenizer.bos_token_id]
    starts = [0] * len(places)
    tokens, done = filler.tolist(), 0
    for index in sorted(range(len(places)), key=lambda index: places[index][0]):  # stable: pieces of one place keep their order
        place, piece = places[index]
        ids += tokens[done:place]
        done = place
        starts[index] = len(ids)
        ids += piece
    ids += tokens[done:]
    answers = []
    for question, answer in questions:
        answers.append((len(ids) + len(question), len(ids) + len(question) + len(answer)))
        ids += question + answer
    input_ids = torch.tensor(ids)
    labels = torch.full_like(input_ids, -100)
    for start, end in answers:
        labels[start:end] = input_ids[start:end]
    return {"input_ids": input_ids, "labels": labels, "answers": answers, "pieces": starts}


def _line_start(words: Words, filler: torch.Tensor, place: int) -> int:
    """The first place from `place` on where a line of `filler` ends, so that a piece does not stand inside a line."""
    later = words.starts_line[filler[place:]].nonzero()
    return place + int(later[0]) if len(later) else len(filler)


def sample(
    task: str,
    tokenizer: Any,
    tokens: int,
    depth: float,
    generator: torch.Generator,
    haystack: torch.Tensor | None = None,
) -> dict[str, Any]:
    """One context of exactly `tokens` tokens that ends with the answer to its only question.

    Args:
        task: One of `TASKS`.
        tokenizer: The model's.
        tokens: Length of the context, question and answer included.
        depth: Where the line asked for stands (a chain's first line, the others follow within 1/16 of the context each), as a
            fraction in [0, 1] of the text before the question.
        generator: Of all draws.
        haystack: Token ids of some text, from which the rest of the context is cut; made-up lines if `None`.

    Returns:
        `input_ids` and `labels` (-100 outside the answer), int64 `(tokens,)`, `answers` as (start, end) token spans of `input_ids`, and
        `needle`, the position of the line asked for.

    Raises:
        LemoError: Unknown task, a depth outside [0, 1], or a context too short for the task.
    """
    if task not in TASKS:
        raise LemoError(f"unknown retrieval task; {task!r}; choose one of {', '.join(TASKS)}")
    if not 0 <= depth <= 1:
        raise LemoError(f"depth is outside [0, 1]; {depth}; give the fraction of the context before the line asked for")
    words = words_of(tokenizer)
    # The longest filler that may be needed decides which names are free.
    widest = _filler(words, tokens, haystack, generator)
    own = {"passkey": 0, "key_value": 1, "variable_tracking": HOPS + 1}[task]
    spacing = {"passkey": tokens + 1, "key_value": KEY_VALUE_SPACING, "variable_tracking": CHAIN_SPACING}[task]
    others = min(tokens // spacing, MOST_DISTRACTORS)
    names = _drawn_names(words, own * (others + 1), widest, generator)
    numbers = _numbers(others + 1, 5 if task == "passkey" else 4, generator)
    groups = [names[own * index : own * (index + 1)] for index in range(others + 1)]
    lines = [words.encode(_definition(task, group, number)) for group, number in zip(groups, numbers, strict=True)]
    question, answer = words.encode(list(_question(task, groups[0], numbers[0])))
    before = 0 if tokenizer.bos_token_id is None else 1
    room = tokens - before - len(question) - len(answer) - sum(len(line) for group in lines for line in group)
    if room < len(lines):
        raise LemoError(f"context is too short for {task}; {tokens} tokens; use at least {tokens - room + len(lines)}")
    filler = widest[:room]
    places: list[tuple[int, list[int]]] = []
    for index, group in enumerate(lines):
        gap = room // 16 if len(group) > 1 else 0
        share = depth if index == 0 else float(torch.rand(1, generator=generator))
        first = round(share * (room - gap * (len(group) - 1)))
        places += [(_line_start(words, filler, first + gap * step), line) for step, line in enumerate(group)]
    found = _laid_out(words, filler, places, [(question, answer)])
    needle = found.pop("pieces")[0]
    return {**found, "needle": needle}


def _copy_episode(words: Words, tokens: int, haystack: torch.Tensor | None, generator: torch.Generator) -> dict[str, Any]:
    """A segment of random tokens or of text, repeated to the end; everything after its first time is asked."""
    length = 8 + _below(max(1, tokens // 2 - 8), generator)
    if _below(2, generator):
        segment = torch.randint(len(words.starts_line), (length,), generator=generator)
    else:
        segment = _filler(words, length, haystack, generator)
    ids = segment.repeat(tokens // length + 1)[:tokens]
    labels = ids.clone()
    labels[:length] = -100
    return {"input_ids": ids, "labels": labels}


def _question_episode(
    words: Words, task: str, tokens: int, haystack: torch.Tensor | None, generator: torch.Generator
) -> dict[str, Any]:
    """Definitions in the first part of the episode, in a haystack or close together, then a question about each."""
    widest = _filler(words, tokens, haystack, generator)
    size = {"passkey": 1, "key_value": 1, "variable_tracking": HOPS + 1}[task]
    alone = task == "passkey" and _below(3, generator) == 0  # the one pass key, without a name
    dense = 1.0 if _below(2, generator) else 0.2 + 0.8 * float(torch.rand(1, generator=generator))
    cost = {"passkey": 32, "key_value": 14, "variable_tracking": 34}[task]  # tokens of a group and its question, roughly
    count = 1 if alone else max(1, min(int(dense * tokens) // cost, len(_free_names(words, widest)) // size))
    names = _drawn_names(words, size * count, widest, generator)
    groups = [[] if alone else names[size * index : size * (index + 1)] for index in range(count)]
    numbers = _numbers(count, 5 if task == "passkey" else 4, generator)
    told = [words.encode(_definition(task, group, number)) for group, number in zip(groups, numbers, strict=True)]
    asked = words.encode([text for each in zip(groups, numbers, strict=True) for text in _question(task, *each)])
    questions = [(asked[2 * index], asked[2 * index + 1]) for index in range(count)]
    before = 0 if words.tokenizer.bos_token_id is None else 1

    def needed(number: int) -> int:
        return before + sum(len(line) for group in told[:number] for line in group) + sum(map(len, sum(questions[:number], ())))

    while count and needed(count) > tokens:
        count -= 1
    filler = widest[: tokens - needed(count)]
    places: list[tuple[int, list[int]]] = []
    for group in told[:count]:
        at = sorted(torch.randint(len(filler) + 1, (len(group),), generator=generator).tolist())
        places += [(_line_start(words, filler, place), line) for place, line in zip(at, group, strict=True)]
    if len(filler) < 64:
        places = _interleaved(told[:count], _line_start(words, filler, 0), generator)  # no text to spread the lines over
    order = torch.randperm(count, generator=generator).tolist()
    return _laid_out(words, filler, places, [questions[index] for index in order])


def _interleaved(groups: Sequence[list[list[int]]], place: int, generator: torch.Generator) -> list[tuple[int, list[int]]]:
    """All lines at one place, groups mixed with each other, each in its own order."""
    order = [index for index, group in enumerate(groups) for _ in group]
    order = [order[i] for i in torch.randperm(len(order), generator=generator).tolist()]
    rest = [iter(group) for group in groups]
    return [(place, next(rest[index])) for index in order]


def training_row(
    tokenizer: Any, tokens: int, generator: torch.Generator, haystack: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """A row of `tokens` tokens made of 1, 2, 4 or 8 episodes of one kind, most of which are asked about.

    A seventh of the rows are repeated segments, the others questions of `TASKS`. Short episodes teach the looking-up, long ones
    the distance.

    Args:
        tokenizer: The model's.
        tokens: At least `MIN_EPISODE`, and a multiple of 8.
        generator: Of all draws.
        haystack: As for `sample`.

    Returns:
        `input_ids` and `labels` (-100 where nothing is asked), int64 `(tokens,)`.
    """
    if tokens < MIN_EPISODE or tokens % 8:
        raise LemoError(f"retrieval row of a length it cannot have; {tokens} tokens; use a multiple of 8, at least {MIN_EPISODE}")
    words = words_of(tokenizer)
    kind = ("copy", *TASKS, *TASKS)[_below(7, generator)]
    episodes = min(1 << _below(4, generator), max(1, tokens // MIN_EPISODE))
    parts = []
    for _ in range(episodes):
        if kind == "copy":
            parts.append(_copy_episode(words, tokens // episodes, haystack, generator))
        else:
            parts.append(_question_episode(words, kind, tokens // episodes, haystack, generator))
    return {name: torch.cat([part[name] for part in parts]) for name in ("input_ids", "labels")}
