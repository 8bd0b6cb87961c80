"""Conversations for instruction tuning: from JSONL or a `datasets` id to rows whose loss counts answers only.

A conversation is a list of messages, each with a role and its content; a row with an instruction and an output makes one of two
messages, what else it gives as input below the instruction. The tokenizer's chat template turns it into tokens, and the template's
`{% generation %}` markers say which of them are answers: labels are -100 elsewhere.

Packing: a conversation is one document, and never cut within a message. Rows hold whole conversations, the longest first, each in
the fullest row that has room (best fit decreasing); they are not padded, so they differ in length. One that is longer than a row is
shortened by its last exchanges; if its first answer does not end within a row it is left out. Both are counted. What follows a
conversation's last answer teaches nothing and is left out too.
"""

from __future__ import annotations

import bisect
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import LemoError
from .text_data import PackedDocuments, data_paths, dataset_rows, jsonl_rows

logger = logging.getLogger(__name__)

# Token ids and labels of a conversation, int64 of one length: lists of Python's integers take three times the memory.
Piece = tuple[torch.Tensor, torch.Tensor]

ROLES = ("system", "user", "assistant", "tool")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class Conversation:
    """Messages under a stable name (`train.jsonl:17`), the name deciding their split.

    Args:
        name: The name.
        messages: Dicts with `role` and `content`; the last one is an answer.
    """

    name: str
    messages: list[dict[str, str]]


@dataclass(frozen=True)
class ConversationFields:
    """Where a row holds what: either `messages`, or `instruction` and `output` with an optional `input`."""

    messages: str = "messages"
    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"


def file_conversations(paths: Sequence[str | Path], fields: ConversationFields | None = None) -> list[Conversation]:
    """Reads `.jsonl` files, one conversation a line.

    Args:
        paths: Files, or folders whose `.jsonl` files are taken, sorted by path.
        fields: Names of the fields.

    Raises:
        LemoError: If a path is missing, a file is no JSONL, a line holds no conversation with an answer, or there is none.
    """
    found: list[Conversation] = []
    for path in data_paths(paths, {".jsonl"}):
        if path.suffix != ".jsonl":
            raise LemoError(f"conversations are read from .jsonl files; got {str(path)!r}; write one JSON object a line")
        found += [_conversation(row, name, place, fields) for name, place, row in jsonl_rows(path)]
    if not found:
        raise LemoError(f"data is empty; {[str(path) for path in paths]}; give .jsonl files with conversations")
    return found


def dataset_conversations(
    name: str,
    config: str | None = None,
    split: str = "train",
    streaming: bool = True,
    fields: ConversationFields | None = None,
    max_conversations: int | None = None,
) -> list[Conversation]:
    """Reads conversations from a `datasets` id; arguments as in `text_data.dataset_documents`.

    Raises:
        LemoError: If the data set cannot be read, a row holds no conversation with an answer, or there is none.
    """
    found: list[Conversation] = []
    for place, row in dataset_rows(name, config, split, streaming):
        if max_conversations is not None and len(found) >= max_conversations:
            break
        found.append(_conversation(row, place, place, fields))
    if not found:
        raise LemoError(f"data set is empty; {name!r} split {split!r}; choose another split")
    return found


def _conversation(row: Any, name: str, place: str, fields: ConversationFields | None) -> Conversation:
    fields = fields or ConversationFields()
    if not isinstance(row, dict):
        raise LemoError(f"line is no JSON object; {place} has a {type(row).__name__}; write one object a line")
    if fields.messages in row:
        messages = _checked(row[fields.messages], fields.messages, place)
    elif isinstance(row.get(fields.instruction), str) and isinstance(row.get(fields.output), str):
        given = row.get(fields.input) or ""
        question = f"{row[fields.instruction]}\n\n{given}" if given else row[fields.instruction]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": row[fields.output]}]
    else:
        raise LemoError(
            f"row holds neither {fields.messages!r} nor {fields.instruction!r} with {fields.output!r}; {place} has {sorted(row)}; "
            "set messages_field, or instruction_field and output_field, to what it has"
        )
    answers = [index for index, message in enumerate(messages) if _is_answer(message)]
    if not answers:
        roles = [message["role"] for message in messages]
        raise LemoError(
            f"conversation has no answer to learn; {place} has messages of {roles}; leave it out, or add one of role 'assistant'"
        )
    return Conversation(name, messages[: answers[-1] + 1])


def _is_answer(message: dict[str, str]) -> bool:
    return message["role"] == "assistant" and bool(message["content"].strip())


def _checked(messages: Any, field: str, place: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise LemoError(
            f"{field!r} is no list of messages; {place} has a {type(messages).__name__}; list objects with role and content"
        )
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise LemoError(
                f"message has an unknown role; {role!r} in message {index} of {place}, which has {sorted(message)}; "
                f"use one of {', '.join(ROLES)} in the field 'role'"
            )
        if not isinstance(content, str):
            raise LemoError(
                f"message has no text; content of message {index} of {place} is a {type(content).__name__}; write it as one text"
            )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


# Tokens and labels.


def set_chat_template(tokenizer: Any, path: str | Path | None, loss_on: str) -> None:
    """Sees to a chat template that does what the loss needs, before anything is read or tokenised.

    Args:
        tokenizer: Gets the template in `path`, so that it is saved with it.
        path: A Jinja file; `None` keeps the tokenizer's own template.
        loss_on: "answers" needs `{% generation %}` markers, "all" does not.

    Raises:
        LemoError: If there is no template, or it lacks the markers.
    """
    if path is not None:
        try:
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise LemoError(f"chat template cannot be read ({reason}); {str(path)!r}; give a Jinja file") from error
    where = f"{str(path)!r}" if path is not None else f"that of {tokenizer.name_or_path!r}"
    if not tokenizer.chat_template:
        raise LemoError(f"tokenizer has no chat template; {tokenizer.name_or_path!r}; give one with chat_template: FILE.jinja")
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # several templates, none of them the default
        raise LemoError(f"tokenizer has no default chat template; {where}; give one with chat_template: FILE.jinja") from error
    if loss_on == "answers" and _GENERATION.search(template) is None:
        raise LemoError(
            f"chat template does not mark answers, it has no {{% generation %}}; {where}; give one that has with chat_template: FILE.jinja "
            "({% generation %} before an answer, {% endgeneration %} behind its end-of-turn token), or set loss_on: all"
        )


def tokenize_conversations(
    tokenizer: Any, conversations: Iterable[Conversation], seq_len: int, loss_on: str = "answers"
) -> list[Piece]:
    """Token ids and labels of the conversations that fit into `seq_len` tokens; the others are shortened or left out, and counted.

    Args:
        tokenizer: With a chat template of [`set_chat_template`].
        conversations: The conversations.
        seq_len: Tokens of a row.
        loss_on: "answers": labels are -100 outside of answers. "all": every token but the first counts.

    Raises:
        LemoError: If the template refuses a conversation, or marks none of its tokens as an answer.
    """
    found: list[Piece] = []
    total = shortened = 0
    for conversation in conversations:
        total += 1
        for tries, (ids, labels) in enumerate(_shorter_and_shorter(tokenizer, conversation, loss_on)):
            if len(ids) <= seq_len:
                found.append((torch.tensor(ids), torch.tensor(labels)))
                shortened += tries > 0
                break
    if shortened or len(found) < total:
        logger.warning(
            "conversations are longer than seq_len=%d; of %d, %d are shortened by their last exchanges and %d left out, whose first "
            "answer ends beyond it; raise seq_len to keep them whole",
            *(seq_len, total, shortened, total - len(found)),
        )
    return found


def _shorter_and_shorter(tokenizer: Any, conversation: Conversation, loss_on: str) -> Iterator[tuple[list[int], list[int]]]:
    """The conversation, then without its last exchange, and so on."""
    answers = [index for index, message in enumerate(conversation.messages) if _is_answer(message)]
    for last in reversed(answers):
        yield _tokens_and_labels(tokenizer, conversation.messages[: last + 1], conversation.name, loss_on)


def _tokens_and_labels(tokenizer: Any, messages: list[dict[str, str]], name: str, loss_on: str) -> tuple[list[int], list[int]]:
    answers_only = loss_on == "answers"
    try:
        encoded = tokenizer.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=answers_only,
            tokenizer_kwargs={"verbose": False},
        )
    except Exception as error:  # of any kind: a template is a program
        reason = " ".join(str(error).split())[:200]
        raise LemoError(
            f"chat template refuses a conversation ({type(error).__name__}: {reason}); {name}; leave it out, or change chat_template"
        ) from error
    ids = list(encoded["input_ids"])
    counted = encoded["assistant_masks"] if answers_only else [1] * len(ids)
    # The loss shifts labels by one: a document's first label is what the document before it would have to predict.
    labels = [token if count and place else -100 for place, (token, count) in enumerate(zip(ids, counted, strict=True))]
    if not any(label != -100 for label in labels):
        raise LemoError(
            f"chat template marks no token of a conversation as an answer; {name}; put {{% generation %}} and {{% endgeneration %}} "
            "around what an assistant's message becomes"
        )
    return ids, labels


# Rows.


def pack_conversations(
    tokenizer: Any, conversations: Sequence[Conversation], seq_len: int, layout: str = "packed", loss_on: str = "answers"
) -> PackedDocuments:
    """Lays whole conversations into rows of at most `seq_len` tokens.

    Args:
        tokenizer: With a chat template of [`set_chat_template`].
        conversations: The conversations.
        seq_len: Tokens of a row.
        layout: "packed" lays several in a row, "windows" one.
        loss_on: As in [`tokenize_conversations`].

    Returns:
        Rows with `input_ids`, `labels` and `position_ids`, which restart with each conversation; to be collated by
        [`lay_in_one_row`].

    Raises:
        LemoError: If no conversation fits.
    """
    pieces = tokenize_conversations(tokenizer, conversations, seq_len, loss_on)
    if not pieces:
        raise LemoError(
            f"no conversation fits into seq_len={seq_len}; {len(conversations)} are read; raise seq_len, or give shorter ones"
        )
    rows = best_fit([len(ids) for ids, _ in pieces], seq_len) if layout == "packed" else [[index] for index in range(len(pieces))]
    return PackedDocuments([_row([pieces[index] for index in row]) for row in rows], seq_len)


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Bins of at most `room`: indices of `lengths`, the longest first, each into the fullest bin that takes it."""
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, minus the bin's number), ascending
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect.bisect_left(free, (lengths[index], -len(bins)))
        if place == len(free):
            left, number = room, len(bins)
            bins.append([])
        else:
            left, number = free[place][0], -free.pop(place)[1]
        bins[number].append(index)
        if left > lengths[index]:
            bisect.insort(free, (left - lengths[index], -number))
    return bins


def _row(pieces: Sequence[Piece]) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.cat([ids for ids, _ in pieces]),
        "labels": torch.cat([labels for _, labels in pieces]),
        "position_ids": torch.cat([torch.arange(len(ids)) for ids, _ in pieces]),
    }


def lay_in_one_row(samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Collates samples of different lengths as one row without padding; `position_ids` say where documents begin."""
    return {name: torch.cat([sample[name] for sample in samples])[None] for name in samples[0]}
