"""The shipped base model, and the loop that trains it."""

import ast
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lemo_hf.base_model.data import TokenStream, held_out_rows
from lemo_hf.base_model.export import losses, ngram_perplexity
from lemo_hf.base_model.recipe import BaseModelRecipe
from lemo_hf.base_model.renaming import DocumentRenaming, own_names, rename
from lemo_hf.base_model.training import BASE_MODEL_FOLDER, BaseModelTrainer, learning_rate_factor, main
from lemo_hf.errors import LemoError
from lemo_hf.text_data import TextDocument, python_sources, split_documents, tokenize_documents


@pytest.fixture(scope="module")
def shipped():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL_FOLDER, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(BASE_MODEL_FOLDER)


def test_shipped_model_is_a_small_stock_llama(shipped):
    model, tokenizer = shipped
    assert type(model).__name__ == "LlamaForCausalLM"
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_951_872
    assert sum(path.stat().st_size for path in BASE_MODEL_FOLDER.rglob("*")) <= 9_000_000
    weights = load_file(BASE_MODEL_FOLDER / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert model.config.max_position_embeddings == 1024
    assert len(tokenizer) == model.config.vocab_size == 4096
    assert tokenizer.pad_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    source = "def f(x):\n    return x + 1  # caf\u00e9\n"
    assert tokenizer.decode(tokenizer(source)["input_ids"]) == source


@pytest.fixture(scope="module")
def unseen(shipped):
    """Token ids of a file younger than the model, which therefore has never seen it."""
    text = (BASE_MODEL_FOLDER.parents[1] / "text_data.py").read_text()
    return tokenize_documents(shipped[1], [TextDocument("text_data", text)])[0]


def test_shipped_model_predicts_unseen_code_far_better_than_ngrams_predict_held_out_files(shipped, unseen):
    found = json.loads((BASE_MODEL_FOLDER / "measurements.json").read_text())
    assert found["finished"]
    assert found["held_out_perplexity"] < 0.25 * found["five_gram_perplexity"]
    rows = held_out_rows([unseen], 1024)
    perplexity = math.exp(losses(shipped[0], rows).sum() / (rows[:, 1:] != -100).sum())
    assert perplexity < 34  # 25.8 when it was shipped


def test_shipped_model_attends_to_what_it_has_read(shipped, unseen):
    tokens = torch.tensor(unseen)
    ends = range(1025, len(tokens), 512)
    far = torch.stack([tokens[end - 1025 : end] for end in ends])
    by_context = {length: losses(shipped[0], far[:, -length - 1 :])[:, -32:].mean() for length in (64, 1024)}
    assert by_context[1024] < by_context[64] - 0.4  # 0.8 nats when it was shipped
    once = tokens[:2000].view(4, 500)
    twice = losses(shipped[0], torch.cat([once, once], dim=1))
    assert twice[:, 500:].mean() < twice[:, :499].mean() - 0.2  # 0.42 nats when it was shipped


def test_shipped_model_copies_names_it_has_just_read(shipped):
    folder = BASE_MODEL_FOLDER.parents[1]
    names = sorted({name for path in folder.rglob("*.py") for name in own_names(path.read_text())})
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    listed = shipped[1]("".join(f"{names[index]}, " for index in order), add_special_tokens=False)["input_ids"]
    once = torch.tensor(listed[:2000]).view(4, 500)
    twice = losses(shipped[0], torch.cat([once, once], dim=1))
    assert twice[:, 500:].mean() < twice[:, :499].mean() - 0.9  # 1.13 nats when it was shipped


DOCUMENTS = [TextDocument(f"file{i}", "".join(f"x{i} = {(i * j) % 97}\n" for j in range(60))) for i in range(40)]

NAMED = [
    TextDocument(
        f"named{i}", f"def measure_{i}(total):\n    return total\n\n\nlimit{i} = measure_{i}({i})\nprint(limit{i})\n" * 20
    )
    for i in range(40)
]


def tiny_recipe(folder, **changes):
    fields: dict = {
        "held_out_share": 0.2,
        "vocab_size": 300,
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 1,
    }
    fields |= {"head_dim": 16, "intermediate_size": 48, "context_length": 64, "batch_rows": 4, "micro_batch_rows": 2}
    fields |= {
        "short_context_length": 16,
        "warmup_steps": 2,
        "max_steps": 8,
        "eval_every": 3,
        "eval_rows": 4,
        "threads": 1,
        "output_dir": str(folder),
    }
    return BaseModelRecipe(**(fields | {"export_dir": str(folder / "export")} | changes))


def parameters(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


@pytest.mark.parametrize("rename_from_epoch", [None, 0])
def test_stopped_and_resumed_equals_straight_run(tmp_path, rename_from_epoch):
    documents = DOCUMENTS if rename_from_epoch is None else NAMED
    names = {"rename_from_epoch": rename_from_epoch}
    straight = BaseModelTrainer(tiny_recipe(tmp_path / "straight", **names), documents)
    start = parameters(straight)
    straight.run()
    BaseModelTrainer(tiny_recipe(tmp_path / "stopped", **names), documents).run(stop_at=5)
    resumed = BaseModelTrainer(tiny_recipe(tmp_path / "stopped", **names), documents)
    assert resumed.step == 5
    resumed.run()
    assert resumed.step == straight.step == 8
    expected, found = parameters(straight), parameters(resumed)
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
        assert not torch.equal(value, start[name]), name
    curves = [[(each["step"], each["held_out_loss"]) for each in trainer.history] for trainer in (straight, resumed)]
    assert curves[0] == curves[1]
    assert [step for step, _ in curves[0]] == [3, 6, 8]


def test_worker_threads_change_nothing(tmp_path):
    one, three = (BaseModelTrainer(tiny_recipe(tmp_path / str(n), threads=n, batch_rows=6), DOCUMENTS) for n in (1, 3))
    assert [one.train_step() for _ in range(3)] == [three.train_step() for _ in range(3)]
    assert one.evaluate(one.held_out) == three.evaluate(three.held_out)
    found = parameters(three)
    assert all(torch.equal(value, found[name]) for name, value in parameters(one).items())


def test_output_folder_of_another_run_and_broken_checkpoints_are_refused(tmp_path):
    BaseModelTrainer(tiny_recipe(tmp_path), DOCUMENTS).run(stop_at=1)
    with pytest.raises(LemoError, match=r"another run; .* has hidden_size=32, the recipe 48; choose another folder"):
        BaseModelTrainer(tiny_recipe(tmp_path, hidden_size=48), DOCUMENTS)
    state = tmp_path / "checkpoint-000001" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(LemoError, match=r"checkpoint is corrupt .*checkpoint-000001'; remove it"):
        BaseModelTrainer(tiny_recipe(tmp_path), DOCUMENTS)


def test_export_loads_with_the_stock_class_and_is_measured(tmp_path, capsys, monkeypatch):
    import yaml
    from transformers import AutoModelForCausalLM

    recipe = tiny_recipe(tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(vars(recipe)))
    monkeypatch.setattr("lemo_hf.base_model.training.python_sources", lambda packages: DOCUMENTS)
    assert main([str(tmp_path / "recipe.yaml")]) == 0
    assert "exported step 8" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(recipe.export_dir, dtype=torch.float32)
    found = json.loads((tmp_path / "run" / "export" / "measurements.json").read_text())
    rows = BaseModelTrainer(recipe, DOCUMENTS).held_out
    loss = (losses(model, rows).sum() / (rows[:, 1:] != -100).sum()).item()
    assert found["held_out_loss"] == pytest.approx(loss, rel=1e-5)
    assert f"{found['held_out_perplexity']:.2f}" in (tmp_path / "run" / "export" / "README.md").read_text()


def test_bad_recipes_are_one_line(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("hiden_size: 4\n")
    assert main([str(tmp_path / "recipe.yaml")]) == 2
    assert capsys.readouterr().err.startswith("unknown recipe field; 'hiden_size'; the fields are packages")
    with pytest.raises(LemoError, match=r"recipe does not exist; .*; give the path"):
        BaseModelRecipe.load(tmp_path / "missing.yaml")
    with pytest.raises(LemoError, match="not a multiple of micro_batch_rows; 4 and 3; "):
        tiny_recipe(tmp_path, micro_batch_rows=3)


def test_committed_recipe_is_the_shipped_shape():
    recipe = BaseModelRecipe.load("recipes/base_python_1k.yaml")
    assert (recipe.vocab_size, recipe.hidden_size, recipe.num_layers, recipe.context_length) == (4096, 256, 6, 1024)


def test_token_stream_visits_each_token_once_an_epoch_in_a_new_order():
    documents = [list(range(start, start + 37)) for start in range(0, 370, 37)]
    stream = TokenStream(documents, context_length=8, seed=3)
    first, second = (stream.rows(epoch * stream.rows_per_epoch, stream.rows_per_epoch) for epoch in (0, 1))
    inputs = first[:, :-1].flatten().tolist()
    assert len(set(inputs)) == len(inputs) == stream.rows_per_epoch * 8 >= 370 - 17
    assert not torch.equal(first, second)
    same = TokenStream(documents, context_length=8, seed=3)
    assert torch.equal(same.rows(stream.rows_per_epoch - 2, 4), torch.cat([first[-2:], second[:2]]))


SOURCE = '''
import os
class Reader(Base):
    """A Reader has a max_size and a level; "level" is quoted."""  # max_size, level
    def __init__(self, max_size, level=3):
        self.max_size = max_size
        self.level = level
        self._level_of = os.level + len(f"{max_size}")
    def read(self, i, once): return Reader(max_size=i, level=i + self.level)
'''


def test_own_names_are_those_a_file_defines_and_repeats():
    assert own_names(SOURCE) == ["Reader", "level", "max_size"]  # once, read, _level_of stand there once; i is too short
    assert own_names("def broken(:") == []


def test_renaming_is_consistent_and_leaves_prose_alone():
    found = rename(SOURCE, {"Reader": "Writer", "level": "depth", "max_size": "min_age"})
    assert '"""A Reader has a min_age and a level; "level" is quoted."""  # min_age, level' in found
    assert "return Writer(min_age=i, depth=i + self.depth)" in found
    assert "_level_of = os.depth" in found
    back = rename(found, {"Writer": "Reader", "depth": "level", "min_age": "max_size"})
    assert back == SOURCE
    assert type(ast.parse(found)) is ast.Module


def characters(documents):
    return [[ord(character) for character in document.text] for document in documents]


def test_renamed_documents_depend_on_seed_epoch_and_document_alone():
    renaming = DocumentRenaming(NAMED, 1, 5, characters)
    assert renaming.renamed(0) == {}
    first, second = renaming.renamed(1), renaming.renamed(2)
    assert DocumentRenaming(NAMED, 0, 5, characters).renamed(2) == second != first
    assert DocumentRenaming(NAMED, 1, 6, characters).renamed(2) != second
    assert 10 < len(first) < 30  # of 40; a fair coin each, and one of three names at least
    for index, ids in first.items():
        text = "".join(map(chr, ids))
        assert text != NAMED[index].text
        # One to one: as many different words as before, and each as often.
        counts = [sorted(map(words.count, set(words))) for words in (text.split(), NAMED[index].text.split())]
        assert counts[0] == counts[1]


@pytest.mark.parametrize("longer", [True, False])
def test_token_stream_keeps_its_rows_an_epoch_when_documents_are_renamed(longer):
    documents = [list(range(start, start + 37)) for start in range(0, 370, 37)]

    class Renaming:
        def renamed(self, epoch):
            return {} if epoch == 0 else {index: [1000 * epoch + index] * (90 if longer else 2) for index in range(8)}

    plain, stream = (TokenStream(documents, 8, 3, renaming) for renaming in (None, Renaming()))
    count = stream.rows_per_epoch
    assert count == plain.rows_per_epoch
    assert torch.equal(stream.rows(0, count), plain.rows(0, count))
    second = stream.rows(count, count)
    assert second.shape == (count, 9)
    assert 1000 <= second.max() < 1008
    assert torch.equal(TokenStream(documents, 8, 3, Renaming()).rows(2 * count - 3, 6), stream.rows(2 * count - 3, 6))


def test_learning_rate_ends_by_the_clock_when_that_comes_first():
    recipe = BaseModelRecipe(warmup_steps=4, max_steps=100, max_minutes=10.0, decay_share=0.25)
    assert learning_rate_factor(0, 0.0, recipe) == 0.25
    assert learning_rate_factor(50, 5.0, recipe) == 1.0
    assert learning_rate_factor(50, 8.75, recipe) == pytest.approx(0.5)
    assert learning_rate_factor(95, 5.0, recipe) == pytest.approx(0.2)
    assert learning_rate_factor(100, 11.0, recipe) == 0.0


def test_ngram_perplexity_by_hand():
    # Unigrams of a a b: P(a) = (2 + 2/4)/5, P(b) = (1 + 2/4)/5. Bigrams: after a come a and b once each, so
    # P(b|a) = (1 + 2 P(b))/4; b was never followed, so P(a|b) = P(a).
    train, held_out = np.array([0, 0, 1]), [np.array([0, 1, 0])]
    p_a, p_b = 2.5 / 5, 1.5 / 5
    assert ngram_perplexity(train, held_out, 1, 4) == pytest.approx((p_b * p_a) ** -0.5)
    assert ngram_perplexity(train, held_out, 2, 4) == pytest.approx(((1 + 2 * p_b) / 4 * p_a) ** -0.5)


@pytest.mark.slow
def test_held_out_perplexity_of_the_interpreters_own_library(shipped):
    model, tokenizer = shipped
    held_out = split_documents(python_sources(["stdlib"]), 0.05)[1]
    rows = held_out_rows(tokenize_documents(tokenizer, held_out), 1024)
    perplexity = math.exp(losses(model, rows).sum() / (rows[:, 1:] != -100).sum())
    expected = json.loads((BASE_MODEL_FOLDER / "measurements.json").read_text())["held_out_perplexity"]
    assert perplexity == pytest.approx(expected, rel=0.25)  # other interpreters hold out other files
