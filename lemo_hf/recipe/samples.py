"""The samples that a recipe's data fields describe: text or conversations, read, split, tokenised and packed."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import default_data_collator

from ..chat_data import (
    Conversation,
    ConversationFields,
    dataset_conversations,
    file_conversations,
    lay_in_one_row,
    pack_conversations,
    set_chat_template,
)
from ..errors import LemoError
from ..text_data import (
    Named,
    PackedDocuments,
    TextDocument,
    dataset_documents,
    pack_documents,
    python_sources,
    split_documents,
    spread_samples,
    text_file_documents,
)
from .reading import DataFields


def read_documents(data: DataFields) -> list[TextDocument]:
    """The text that the recipe names."""
    if data.data_files:
        return text_file_documents(data.data_files, data.text_field)
    if data.dataset:
        return dataset_documents(*_data_set(data), data.text_field, data.max_documents)
    return python_sources(data.python_packages or [])


def read_conversations(data: DataFields) -> list[Conversation]:
    """The conversations that the recipe names."""
    if data.data_files:
        return file_conversations(data.data_files, _fields(data))[: data.max_documents]
    return dataset_conversations(*_data_set(data), _fields(data), data.max_documents)


def _data_set(data: DataFields) -> tuple[str, str | None, str, bool]:
    return str(data.dataset), data.dataset_config, data.dataset_split, data.dataset_streaming


def _fields(data: DataFields) -> ConversationFields:
    return ConversationFields(data.messages_field, data.instruction_field, data.input_field, data.output_field)


def load_samples(data: DataFields, tokenizer: Any, block_size: int) -> tuple[PackedDocuments, PackedDocuments | None]:
    """Training and held-out samples of up to `seq_len` tokens; no held-out ones where the recipe holds nothing out.

    Args:
        data: The fields.
        tokenizer: For chat data it gets the recipe's chat template.
        block_size: LeMo's block size.

    Raises:
        LemoError: If there is too little on either side, or the data or the chat template are not what the fields say.
    """
    if data.data_format == "chat":
        set_chat_template(tokenizer, data.chat_template, data.loss_on)
        train, held_out = _split(data, read_conversations, lambda paths: file_conversations(paths, _fields(data)))

        def pack(part: Sequence[Conversation]) -> PackedDocuments:
            return pack_conversations(tokenizer, part, data.seq_len, data.layout, data.loss_on)

        return _limited(data, pack(train), pack(held_out) if held_out else None)
    texts, held_out_texts = _split(data, read_documents, lambda paths: text_file_documents(paths, data.text_field))

    def pack_text(part: Sequence[TextDocument]) -> PackedDocuments:
        return pack_documents(tokenizer, part, data.seq_len, data.layout, block_size)

    return _limited(data, pack_text(texts), pack_text(held_out_texts) if held_out_texts else None)


def _split(
    data: DataFields, read: Callable[[DataFields], list[Named]], read_files: Callable[[list[str]], list[Named]]
) -> tuple[list[Named], list[Named]]:
    documents = read(data)
    if data.held_out_files:
        return documents, read_files(data.held_out_files)
    if not data.held_out_share:
        return documents, []
    train, held_out = split_documents(documents, data.held_out_share)
    if not held_out:
        raise LemoError(
            f"held_out_share leaves no document to evaluate on; {data.held_out_share} of {len(train)} documents; "
            "name held_out_files, raise held_out_share, or set it to 0"
        )
    return train, held_out


def _limited(
    data: DataFields, train: PackedDocuments, held_out: PackedDocuments | None
) -> tuple[PackedDocuments, PackedDocuments | None]:
    return spread_samples(train, data.max_train_samples), held_out and spread_samples(held_out, data.max_eval_samples)


def collator_of(data: DataFields) -> Callable[[list[Any]], dict[str, Any]]:
    """How samples become a batch: rows of conversations differ in length and are laid in one row, without padding."""
    return lay_in_one_row if data.data_format == "chat" else default_data_collator
