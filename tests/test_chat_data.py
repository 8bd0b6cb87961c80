"""Conversations as training data, and the recipes for instruction tuning and continued pretraining run small."""

import json
from pathlib import Path

import pytest
import torch
from chat_runs import MARKED, UNMARKED, conversation, tokenizer
from peft import PeftModel
from tiny_recipe import document, write_jsonl, write_source
from transformers import AutoModelForCausalLM, AutoTokenizer

from lemo_hf.chat_data import (
    Conversation,
    ConversationFields,
    best_fit,
    dataset_conversations,
    file_conversations,
    lay_in_one_row,
    pack_conversations,
    set_chat_template,
    tokenize_conversations,
)
from lemo_hf.errors import LemoError
from lemo_hf.recipe import DataFields, read_recipe
from lemo_hf.recipe.running import run_recipe
from lemo_hf.recipe.samples import load_samples

RECIPES = Path(__file__).parent.parent / "recipes"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def talk(*lengths):
    """Exchanges of questions and answers of so many words."""
    return [message for seed, words in enumerate(lengths) for message in conversation(seed, words)]


def test_rows_of_messages_and_of_instructions_are_conversations(tmp_path):
    rows = [
        {"messages": [{"role": "system", "content": "s"}, *conversation(0), {"role": "user", "content": "no answer to this"}]},
        {"instruction": "Sum up.", "input": "A text.", "output": "Short."},
        {"instruction": "Greet.", "input": "", "output": "Hello."},
        {"instruction": "Greet.", "output": "Hello."},
    ]
    found = file_conversations([write_rows(tmp_path / "a.jsonl", rows)])
    assert [each.name for each in found] == [f"a.jsonl:{line}" for line in range(1, 5)]
    assert [message["role"] for message in found[0].messages] == ["system", "user", "assistant"]
    assert found[1].messages[0]["content"] == "Sum up.\n\nA text."
    assert (
        found[2].messages
        == found[3].messages
        == [
            {"role": "user", "content": "Greet."},
            {"role": "assistant", "content": "Hello."},
        ]
    )
    fields = ConversationFields(messages="dialogue", instruction="question", output="answer")
    others = [{"dialogue": conversation(0)}, {"question": "Why?", "answer": "So."}]
    assert len(file_conversations([write_rows(tmp_path / "b.jsonl", others)], fields)) == 2


def test_a_data_set_s_rows_are_conversations_too(tmp_path):
    rows = [{"messages": conversation(seed), "length": 3} for seed in range(5)]
    write_rows(tmp_path / "train.jsonl", rows)
    found = dataset_conversations(str(tmp_path), split="train", max_conversations=3)
    assert [each.messages for each in found] == [conversation(seed) for seed in range(3)]
    with pytest.raises(
        LemoError, match=r"row holds neither 'texts' nor .*train:0 has \['length', 'messages'\]; set messages_field"
    ):
        dataset_conversations(str(tmp_path), fields=ConversationFields(messages="texts"))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "a"}, "row holds neither 'messages' nor 'instruction' with 'output'; {0} has ['text']; set messages_field"),
        ({"messages": "hello"}, "'messages' is no list of messages; {0} has a str; list objects with role and content"),
        (
            {"messages": [{"role": "user", "content": "a"}]},
            "conversation has no answer to learn; {0} has messages of ['user']; leave",
        ),
        ({"messages": [{"role": "assistant", "content": " "}]}, "conversation has no answer to learn; {0}"),
        (
            {"messages": [{"role": "gpt", "content": "a"}]},
            "message has an unknown role; 'gpt' in message 0 of {0}, which has ['content', 'role']; use one of system, user,",
        ),
        (
            {"messages": [{"from": "human", "value": "a"}]},
            "unknown role; None in message 0 of {0}, which has ['from', 'value']; use",
        ),
        (
            {"messages": [{"role": "user", "content": ["a"]}]},
            "message has no text; content of message 0 of {0} is a list; write it",
        ),
        (["a"], "line is no JSON object; {0} has a list; write one object a line"),
    ],
)
def test_rows_that_are_no_conversation_are_refused_by_their_line(tmp_path, row, says):
    path = write_rows(tmp_path / "a.jsonl", [{"messages": conversation(0)}, row])
    with pytest.raises(LemoError) as refused:
        file_conversations([path])
    assert says.format(f"{path}:2") in str(refused.value)
    assert str(refused.value).count("; ") >= 2
    assert "\n" not in str(refused.value)


def test_files_that_hold_no_conversations_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty.jsonl").write_text("\n")
    for path, says in (("a.txt", "read from .jsonl files"), ("empty.jsonl", "data is empty"), ("none.jsonl", "does not exist")):
        with pytest.raises(LemoError, match=says):
            file_conversations([tmp_path / path])


def test_a_template_without_markers_is_refused_before_anything_is_read(tmp_path):
    marked = tmp_path / "mine.jinja"
    marked.write_text(MARKED)
    bare = tokenizer({"rag": MARKED})
    with pytest.raises(LemoError, match=r"tokenizer has no default chat template; .*; give one with chat_template: FILE.jinja"):
        set_chat_template(bare, None, "all")
    bare = tokenizer(None)
    with pytest.raises(LemoError, match=r"tokenizer has no chat template; .*; give one with chat_template: FILE.jinja"):
        set_chat_template(bare, None, "all")
    with pytest.raises(LemoError) as refused:
        load_samples(DataFields(seq_len=64, data_files=["not looked at.jsonl"], data_format="chat"), tokenizer(UNMARKED), 8)
    assert str(refused.value).startswith("chat template does not mark answers, it has no {% generation %}; that of ")
    assert str(refused.value).endswith("or set loss_on: all")
    assert "\n" not in str(refused.value)
    set_chat_template(tokenizer(UNMARKED), None, "all")
    set_chat_template(bare, marked, "answers")
    assert bare.chat_template == MARKED
    with pytest.raises(LemoError, match=r"chat template cannot be read .*none.jinja.*; give a Jinja file"):
        set_chat_template(bare, tmp_path / "none.jinja", "answers")
    marked.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}{% generation %}{% endgeneration %}")
    set_chat_template(bare, marked, "answers")
    with pytest.raises(LemoError, match="chat template marks no token of a conversation as an answer; mine:1; put"):
        tokenize_conversations(bare, [Conversation("mine:1", conversation(0))], 512)
    marked.write_text("{{ raise_exception('roles must alternate') }}{% generation %}{% endgeneration %}")
    set_chat_template(bare, marked, "answers")
    with pytest.raises(
        LemoError, match=r"chat template refuses a conversation \(TemplateError: roles must alternate\); mine:1; leave"
    ):
        tokenize_conversations(bare, [Conversation("mine:1", conversation(0))], 512)


@pytest.mark.parametrize("template", [MARKED, "chatml"])
def test_labels_are_the_answers_tokens(template):
    made = tokenizer(MARKED)
    if template == "chatml":
        set_chat_template(made, RECIPES / "chatml_answers.jinja", "answers")
    messages = [{"role": "system", "content": "be short"}, *talk(8, 5)]
    ((ids, labels),) = tokenize_conversations(made, [Conversation("a", messages)], 4096)
    assert made.decode(ids) == made.apply_chat_template(messages, tokenize=False)
    ids, labels = ids.tolist(), labels.tolist()
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    end = "<|im_end|>" if template == "chatml" else made.eos_token
    answers = "".join(message["content"] + end for message in messages if message["role"] == "assistant")
    assert made.decode([label for label in labels if label != -100]) == answers
    ((_, everything),) = tokenize_conversations(made, [Conversation("a", messages)], 4096, "all")
    assert everything.tolist() == [-100, *ids[1:]]


def test_long_conversations_lose_their_last_exchanges_and_are_counted(caplog):
    made = tokenizer()
    whole = [Conversation(f"c:{n}", talk(*lengths)) for n, lengths in enumerate([(10, 10, 10), (10,), (300,), (10, 300)])]
    sizes = [len(tokenize_conversations(made, [each], 10**6)[0][0]) for each in whole]
    one_exchange = len(tokenize_conversations(made, [Conversation("x", whole[0].messages[:2])], 10**6)[0][0])
    assert not caplog.text
    found = tokenize_conversations(made, whole, sizes[0] - 1)
    assert [len(ids) for ids, _ in found][1:] == [sizes[1], one_exchange]
    assert one_exchange < len(found[0][0]) < sizes[0]  # two of three
    assert made.decode(found[0][0]).endswith(made.eos_token)
    assert caplog.messages == [
        f"conversations are longer than seq_len={sizes[0] - 1}; of 4, 2 are shortened by their last exchanges and 1 left out, whose "
        "first answer ends beyond it; raise seq_len to keep them whole"
    ]
    with pytest.raises(LemoError, match="no conversation fits into seq_len=8; 4 are read; raise seq_len"):
        pack_conversations(made, whole, 8)


def test_conversations_are_packed_whole():
    made = tokenizer()
    conversations = [Conversation(f"c:{seed}", conversation(seed, 5 + 3 * seed)) for seed in range(30)]
    alone = sorted(ids.tolist() for ids, _ in tokenize_conversations(made, conversations, 256))
    rows = pack_conversations(made, conversations, 256)
    found = []
    for row in rows:
        assert row["input_ids"].shape == row["labels"].shape == row["position_ids"].shape
        assert len(row["input_ids"]) <= 256
        starts = (row["position_ids"] == 0).nonzero().flatten().tolist()
        assert (row["labels"][starts] == -100).all()
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            assert (row["labels"][start:end] != -100).any()
            found.append(row["input_ids"][start:end].tolist())
    assert sorted(found) == alone
    full = sum(len(row["input_ids"]) for row in rows) / (256 * len(rows))
    assert full > 0.9
    single = pack_conversations(made, conversations, 256, "windows")
    assert sorted(row["input_ids"].tolist() for row in single) == alone
    batch = lay_in_one_row([rows[0], rows[1]])
    assert batch["input_ids"].shape == (1, len(rows[0]["input_ids"]) + len(rows[1]["input_ids"]))
    assert (batch["position_ids"][0] == 0).sum() == (rows[0]["position_ids"] == 0).sum() + (rows[1]["position_ids"] == 0).sum()


def test_best_fit():
    assert best_fit([5, 4, 3, 3, 2], 8) == [[0, 2], [1, 3], [4]]
    assert best_fit([4, 8, 4, 1], 8) == [[1], [0, 2], [3]]
    assert best_fit([], 8) == []
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 100, (400,), generator=generator).tolist()
    bins = best_fit(lengths, 100)
    assert sorted(index for each in bins for index in each) == list(range(400))
    assert all(sum(lengths[index] for index in each) <= 100 for each in bins)
    assert len(bins) <= 1.05 * sum(lengths) / 100 + 1


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"python_packages": ["networkx"], "data_format": "chat"}, "Python sources are no conversations; data_format='chat'"),
        (
            {"data_files": ["a"], "chat_template": "b.jinja"},
            "chat_template is for conversations; got 'b.jinja' with data_format='text'",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields, says):
    with pytest.raises(LemoError, match=says.replace("(", r"\(")):
        DataFields(seq_len=64, **fields)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"))


def small(recipe, source, folder, **fields):
    """A committed recipe with a tiny model and local data in place of the Hub's."""
    fields |= {"model": source / "base", "dtype": "float32", "dataset": "null", "output_dir": folder, "bf16": "false"}
    fields |= {"max_steps": 3, "block_size": 16, "learning_rate": 1e-2, "warmup_steps": 0, "gradient_accumulation_steps": 2}
    fields |= {"use_cpu": "true", "disable_tqdm": "true", "dataloader_pin_memory": "false", "report_to": "none"}
    return read_recipe(RECIPES / f"{recipe}.yaml", {name: str(value) for name, value in fields.items()})


def losses(folder):
    log = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "loss" in entry]


def test_the_instruction_tuning_recipe_runs(source, tmp_path, monkeypatch):
    monkeypatch.chdir(RECIPES.parent)  # where its command is given
    rows = [{"messages": talk(*([4 + seed] * (1 + seed % 3)))} for seed in range(30)]
    rows += [{"instruction": document(seed, 30), "input": "", "output": document(seed + 9, 10)} for seed in range(10)]
    files = write_rows(tmp_path / "train.jsonl", rows)
    recipe = small(
        "qwen3_8b_answers_32k", source, tmp_path / "out", data_files=files, held_out_share=0.2, seq_len=256, rope_type="linear"
    )
    results = run_recipe(recipe)
    assert results.perplexity_after.value < results.perplexity_before.value
    assert results.data == "local files train.jsonl; conversations, loss on answers"
    for entry in losses(tmp_path / "out"):
        assert 0.4 < entry["kept_share"] < 0.7
        assert entry["saved_bytes"] > 0
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert "generation" in saved.chat_template
    # A plain adapter on the stock base.
    base = AutoModelForCausalLM.from_pretrained(source / "base")
    assert PeftModel.from_pretrained(base, tmp_path / "out")(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_the_continued_pretraining_recipe_runs(source, tmp_path):
    write_jsonl(tmp_path / "books.jsonl", [document(seed, 150) for seed in range(30)])
    recipe = small(
        "llama3_8b_pretrain_64k", source, tmp_path / "out", data_files=tmp_path / "books.jsonl", held_out_share=0.2, seq_len=256
    )
    results = run_recipe(recipe)
    assert results.perplexity_after.value < results.perplexity_before.value
    assert results.base_config["rope_parameters"]["factor"] == 4.0
    shares = [entry["kept_share"] for entry in losses(tmp_path / "out")]
    assert all(share < 0.7 for share in shares[:-1])


def test_bad_conversations_leave_no_folder(source, tmp_path):
    files = write_rows(tmp_path / "train.jsonl", [{"messages": [{"role": "human", "content": "a"}]}] * 40)
    recipe = small(
        "qwen3_8b_answers_32k",
        source,
        tmp_path / "out",
        data_files=files,
        seq_len=64,
        chat_template=RECIPES / "chatml_answers.jinja",
    )
    with pytest.raises(LemoError, match="unknown role; 'human'"):
        run_recipe(recipe)
    assert not (tmp_path / "out").exists()
