"""Sources, the split and packing."""

import json
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lemo_hf.errors import LemoError
from lemo_hf.text_data import (
    TextDocument,
    drop_duplicates,
    is_held_out,
    pack_documents,
    pack_token_ids,
    python_sources,
    split_documents,
    text_file_documents,
    tokenize_documents,
)


@pytest.fixture
def tokenizer():
    """One token a word, bos 0, eos 1."""
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "?": 2, "a": 3, "b": 4, "c": 5}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="?")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package that fails when it is imported, with files that must be skipped."""
    files = {
        "__init__.py": "raise RuntimeError('must not be imported')\n" + "".join(f"x{i} = {i}\n" for i in range(60)),
        "a.py": "".join(f"a{i} = {i}\n" for i in range(60)),
        "copy_of_a.py": "".join(f"a{i} = {i}\n" for i in range(60)),
        "near_a.py": "import os\n" + "".join(f"    a{i} = {i}  \n" for i in range(60)),
        "short.py": "y = 1\n",
        "tests/test_a.py": "".join(f"t{i} = {i}\n" for i in range(60)),
    }
    for name, text in files.items():
        path = tmp_path / "fragile_package" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    (tmp_path / "fragile_package" / "binary.py").write_bytes(b"\xff\xfe" * 200)
    monkeypatch.syspath_prepend(tmp_path)


def test_python_sources_skip_tests_duplicates_and_unreadable_files_without_importing(package):
    names = [document.name for document in python_sources(["fragile_package"])]
    assert names == ["fragile_package/__init__.py", "fragile_package/a.py"]
    assert "fragile_package" not in sys.modules


def test_stdlib_root_is_the_running_interpreters(monkeypatch, tmp_path):
    (tmp_path / "queues.py").write_text("".join(f"q{i} = {i}\n" for i in range(60)))
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("".join(f"o{i} = {i}\n" for i in range(60)))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path) if name == "stdlib" else None)
    assert [document.name for document in python_sources(["stdlib"])] == ["stdlib/queues.py"]


def test_unknown_package_is_one_line():
    with pytest.raises(LemoError, match="not installed; 'no_such_package_here'; ") as error:
        python_sources(["no_such_package_here"])
    assert "\n" not in str(error.value)


def test_duplicates_keep_the_first_by_name():
    lines = "".join(f"line {i}\n" for i in range(10))
    kept = drop_duplicates([TextDocument("b", lines), TextDocument("a", lines), TextDocument("c", lines + "new text, " * 9)])
    assert [document.name for document in kept] == ["a", "c"]


def test_split_depends_on_the_name_alone():
    documents = [TextDocument(f"file{i}", "text") for i in range(2000)]
    train, held_out = split_documents(documents, 0.1)
    assert len(train) + len(held_out) == 2000
    assert 150 < len(held_out) < 250
    assert [document.name for document in held_out] == [d.name for d in documents if is_held_out(d.name, 0.1)]
    again = split_documents(documents[::-2], 0.1)[1]
    assert {document.name for document in again} <= {document.name for document in held_out}
    # Pinned: a changed hash would let training files of the shipped model into evaluation.
    assert is_held_out("stdlib/bdb.py", 0.05)
    assert not is_held_out("stdlib/argparse.py", 0.05)


def test_text_and_jsonl_files(tmp_path):
    (tmp_path / "one.txt").write_text("a b c")
    (tmp_path / "two.jsonl").write_text(json.dumps({"text": "a\u2028b"}, ensure_ascii=False) + "\n\n" + json.dumps({"text": "c"}))
    documents = text_file_documents([tmp_path])
    assert [(document.name, document.text) for document in documents] == [
        ("one.txt", "a b c"),
        ("two.jsonl:1", "a\u2028b"),
        ("two.jsonl:3", "c"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; .*nothing.jsonl.*; give the path"),
        ("", "data is empty; .*; give files"),
        ("not json", "is not JSON .*nothing.jsonl:1; "),
        ('{"content": "a"}', r"no text in field 'text'; .*nothing.jsonl:1 has \['content'\]; "),
        ("[1]", "no text in field 'text'; .* has list; "),
    ],
)
def test_bad_files_are_one_line(tmp_path, content, message):
    path = tmp_path / "nothing.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(LemoError, match=message) as error:
        text_file_documents([path])
    assert "\n" not in str(error.value)


def test_file_that_is_not_utf8_names_the_byte(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(LemoError, match=r"not UTF-8 text; .*latin.txt' byte 3; "):
        text_file_documents([tmp_path / "latin.txt"])


def test_dataset_from_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    from lemo_hf.text_data import dataset_documents

    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps({"body": f"text {i}"}) + "\n" for i in range(5)))
    found = dataset_documents(str(tmp_path / "set"), split="train", streaming=True, field="body", max_documents=3)
    assert [document.text for document in found] == ["text 0", "text 1", "text 2"]
    with pytest.raises(LemoError, match=r"no text column 'text'; .* has \['body'\]; "):
        dataset_documents(str(tmp_path / "set"))
    with pytest.raises(LemoError, match=r"cannot be loaded .*; check") as error:
        dataset_documents(str(tmp_path / "set"), split="nothing")
    assert "\n" not in str(error.value)


def test_windows_hold_one_document_and_drop_its_rest():
    packed = pack_token_ids([list(range(10, 17)), [1, 2], list(range(20, 23))], seq_len=3, layout="windows")
    assert [sample["input_ids"].tolist() for sample in packed] == [[10, 11, 12], [13, 14, 15], [20, 21, 22]]
    assert packed[0]["labels"].tolist() == [-100, 11, 12]
    assert set(packed[0]) == {"input_ids", "labels"}


def test_packed_rows_restart_positions_and_never_predict_across_documents():
    packed = pack_token_ids([[10, 11, 12], [20, 21, 22, 23], [30, 31]], seq_len=4, layout="packed")
    assert [sample["input_ids"].tolist() for sample in packed] == [[10, 11, 12, 20], [21, 22, 23, 30]]
    assert [sample["position_ids"].tolist() for sample in packed] == [[0, 1, 2, 0], [0, 1, 2, 0]]
    assert [sample["labels"].tolist() for sample in packed] == [[-100, 11, 12, -100], [-100, 22, 23, -100]]
    assert all(sample["input_ids"].dtype == torch.long for sample in packed)


def test_tokens_stand_between_bos_and_eos(tokenizer):
    assert tokenize_documents(tokenizer, [TextDocument("x", "a b"), TextDocument("y", "c")]) == [[0, 3, 4, 1], [0, 5, 1]]
    packed = pack_documents(tokenizer, [TextDocument("x", "a b"), TextDocument("y", "c a b")], seq_len=8, layout="packed")
    assert packed[0]["input_ids"].tolist() == [0, 3, 4, 1, 0, 5, 3, 4]


def test_what_cannot_be_packed_is_one_line(tokenizer):
    document = TextDocument("x", "a b c")
    with pytest.raises(
        LemoError, match=r"seq_len 48 is shorter than one block \(block_size=64\); lower block_size or use longer"
    ):
        pack_documents(tokenizer, [document], seq_len=48, block_size=64)
    with pytest.raises(LemoError, match="does not fill one sample of seq_len=64; longest document 5 tokens, 5 in all; lower"):
        pack_documents(tokenizer, [document], seq_len=64)
    with pytest.raises(LemoError, match="data is empty; 0 documents; "):
        pack_documents(tokenizer, [], seq_len=64)
    with pytest.raises(LemoError, match="unknown layout; 'rows'; choose one of windows, packed"):
        pack_documents(tokenizer, [document], seq_len=4, layout="rows")


def test_trainer_takes_the_samples(tokenizer, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    config = LlamaConfig(
        vocab_size=6, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=8
    )
    data = pack_token_ids([[0, 3, 4, 1]] * 4, seq_len=8, layout="packed")
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    result = Trainer(LlamaForCausalLM(config), arguments, train_dataset=data).train()
    assert result.training_loss == pytest.approx(1.79, abs=0.2)  # about log(6)
