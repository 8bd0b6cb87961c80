"""The quality bench's base: its rows, its training, what is measured on it."""

import dataclasses
import shutil

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.quality.base import (
    MIX_ROWS,
    RETRIEVAL_ROWS,
    SIZES,
    QualityTrainer,
    base_trainer,
    inputs_and_labels,
    main,
    retrieval_scores,
)
from benchmarks.quality.base_results import DEPTHS, HAYSTACKS, by_task, questions, training_state
from benchmarks.quality.retrieval import TASKS
from lemo_hf.base_model.training import build_model, token_losses
from lemo_hf.errors import LemoError


def tiny(folder, **changes):
    fields = {"vocab_size": 2000, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    fields |= {
        "intermediate_size": 48,
        "context_length": 128,
        "short_context_length": 128,
        "batch_rows": 10,
        "micro_batch_rows": 2,
    }
    fields |= {"warmup_steps": 2, "max_steps": 4, "max_minutes": None, "eval_every": 2, "eval_rows": 4, "threads": 1}
    fields |= {"rename_from_epoch": None, "output_dir": str(folder), "export_dir": str(folder / "export")}
    return dataclasses.replace(SIZES["small"], **(fields | changes))


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory, sources):
    """A tokenizer trained once, for all tiny runs."""
    from lemo_hf.base_model.data import train_tokenizer

    folder = tmp_path_factory.mktemp("tiny") / "tokenizer"
    train_tokenizer(sources, 2000, 128).save_pretrained(folder)
    return folder


def tiny_trainer(folder, tokenizer_folder, sources, **changes):
    shutil.copytree(tokenizer_folder, folder / "tokenizer", dirs_exist_ok=True)
    return QualityTrainer(tiny(folder, **changes), sources[1:], sources[:1])


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def test_base_resumes_bit_for_bit_and_exports_on_the_way(tmp_path, tokenizer_folder, sources):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    straight = tiny_trainer(tmp_path / "straight", tokenizer_folder, sources)
    start = weights(straight)
    straight.run()
    out = tmp_path / "base"
    stopped = tiny_trainer(tmp_path / "stopped", tokenizer_folder, sources)
    stopped.run(stop_at=2, at_checkpoint=lambda: stopped.export(out))
    early = out.resolve()
    resumed = tiny_trainer(tmp_path / "stopped", tokenizer_folder, sources)
    assert resumed.step == 2
    resumed.run(at_checkpoint=lambda: resumed.export(out))
    assert out.is_symlink()
    assert out.resolve() != early
    assert early.is_dir()
    loaded = dict(AutoModelForCausalLM.from_pretrained(out).named_parameters())
    for name, value in weights(straight).items():
        assert torch.equal(value, weights(resumed)[name]), name
        assert torch.equal(value, loaded[name]), name
        assert not torch.equal(value, start[name]), name
    assert straight.history[-1]["passkey_loss"] == resumed.history[-1]["passkey_loss"] > 0
    assert len(AutoTokenizer.from_pretrained(out)) == 2000
    # From an export another run goes on, with its tokenizer and its weights.
    further = QualityTrainer(tiny(tmp_path / "further"), sources[1:], sources[:1], out)
    assert all(torch.equal(value, loaded[name]) for name, value in weights(further).items())


def test_a_call_ends_after_its_minutes_and_leaves_a_checkpoint(tmp_path, tokenizer_folder, sources):
    trainer = tiny_trainer(tmp_path, tokenizer_folder, sources, max_steps=1000)
    trainer.run(minutes=0.001)
    assert 1 <= trainer.step < 200
    assert not trainer.finished()
    assert (tmp_path / f"checkpoint-{trainer.step:06d}" / "state.safetensors").is_file()


def test_mixed_rows_are_a_function_of_their_number_and_hold_the_share_of_retrieval(tmp_path, tokenizer_folder, sources):
    stream = tiny_trainer(tmp_path, tokenizer_folder, sources).stream
    rows = stream.rows(0, 2 * MIX_ROWS)
    assert torch.equal(rows[7:12], stream.rows(7, 5))
    inputs, labels = inputs_and_labels(rows)
    assert inputs.min() >= 0
    assert torch.equal(labels[labels != -100], inputs[labels != -100])
    masked = (labels == -100).any(1)
    assert masked.sum() == 2 * RETRIEVAL_ROWS
    for cycle in masked.view(2, MIX_ROWS):  # spread out: never three in a row, some in either half
        assert cycle[: MIX_ROWS // 2].sum() == RETRIEVAL_ROWS // 2
    text = torch.cat([row for row, other in zip(rows, masked, strict=True) if not other]).view(-1, 129)
    assert torch.equal(text, stream.text.rows(0, len(text)))
    assert torch.equal(stream.rows(MIX_ROWS, MIX_ROWS), rows[MIX_ROWS:])


def test_rows_count_the_same_and_only_what_is_asked_is_learnt(tmp_path, tokenizer_folder, sources):
    trainer = tiny_trainer(tmp_path, tokenizer_folder, sources)
    rows = trainer.stream.rows(0, 8)
    inputs, labels = inputs_and_labels(rows)
    asked = (labels[:, 1:] != -100).sum(1)
    assert asked.unique().numel() > 1
    loss, gradients = trainer._gradients(rows)
    alone = []
    for row, label in zip(inputs, labels, strict=True):
        losses = token_losses(trainer.model, row[None], row[None])
        alone.append(losses[label[1:] != -100].mean())
    assert loss == pytest.approx(torch.stack(alone).mean().item(), rel=1e-3)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_retrieval_scores_see_right_and_wrong_answers(tokenizer):
    ids = torch.tensor([5, 9, 9, 7])

    class Knows(torch.nn.Module):
        """Predicts token 9 always."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.lm_head = lambda hidden: torch.nn.functional.one_hot(hidden, 12) * 20.0

        def model(self, input_ids):
            return dataclasses.make_dataclass("Output", ["last_hidden_state"])(torch.full_like(input_ids, 9))

    right, half = retrieval_scores(Knows(), [{"input_ids": ids, "answers": [span]} for span in ((1, 3), (2, 4))])
    assert right["right"] == right["tokens_right"] == 1
    assert right["loss"] < 1e-6
    assert half == {"right": 0.0, "tokens_right": 0.5, "loss": pytest.approx(10, abs=0.01)}


def test_base_results_put_every_question_in_its_cell(tokenizer, haystack, tmp_path):
    asked = questions(tokenizer, 400, 2, haystack)
    assert len(asked) == len(TASKS) * len(HAYSTACKS) * len(DEPTHS) * 2
    scores = [
        {"right": float(each["task"] == "passkey" and each["depth"] > 0), "tokens_right": each["depth"], "loss": 1.0}
        for each in asked
    ]
    found = by_task(asked, scores)
    for name in HAYSTACKS:
        assert found["key_value"][name]["right"] == 0
        assert found["passkey"][name]["right"] == 0.8
        assert found["passkey"][name]["standard_error"] == pytest.approx((0.8 * 0.2 / 10) ** 0.5)
        assert [each["right"] for each in found["passkey"][name]["by_depth"].values()] == [0, 1, 1, 1, 1]
        assert found["variable_tracking"][name]["by_depth"]["0.75"]["tokens_right"] == 0.75
    with pytest.raises(LemoError, match=r"export has no checkpoint beside it; .*; give the newest model"):
        training_state(tmp_path)


def test_large_recipe_builds_and_takes_a_step_at_its_size(tokenizer):
    recipe = SIZES["large"]
    with FakeTensorMode():
        model = build_model(recipe, tokenizer)
        rows = torch.zeros(1, recipe.context_length + 1, dtype=torch.long)
        token_losses(model, rows).mean().backward()
        assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 80e6 <= count <= 200e6
    assert recipe.context_length == 2048
    assert recipe.max_minutes is None  # bounded by steps: the same however often it was stopped


def test_base_command_refuses_what_is_in_its_way(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    assert main(["--size", "small", "--out", str(tmp_path / "model")]) == 2
    assert "there is something else in the way" in capsys.readouterr().err
    with pytest.raises(LemoError, match=r"unknown size; 'huge'; choose one of small, large"):
        base_trainer("huge", tmp_path / "none")
