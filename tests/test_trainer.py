import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import RandomText, curve, tiny_arguments, tiny_lemo_model, tiny_trainer
from transformers import Trainer, TrainerCallback, TrainingArguments

from lemo_hf import LemoTrainer, lemo_callbacks
from lemo_hf.errors import LemoError
from lemo_hf.hub import lemo_files
from lemo_hf.hub.lemo_files import read_json
from lemo_hf.hub.model_card import BEGIN, END
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.training import lemo_run
from lemo_hf.training.lemo_run import PROGRESS_FILE
from lemo_hf.training.phases import predictor_training, threshold_search
from lemo_hf.training.phases.block_score_maps import MAPS_FILE
from lemo_hf.training.run_record import LOG_FILE

SPARSE = {"selection": "threshold", "attention_forward": "sparse"}
SAMPLED = {"selection": "sampled"}


class Killed(Exception):
    pass


class KillAfter(TrainerCallback):
    """Ends a run like a kill, after a step's checkpoint was written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def killed(trainer, step):
    trainer.add_callback(KillAfter(step))
    with pytest.raises(Killed):
        trainer.train()


def last_metrics(trainer):
    return [logs for logs in trainer.state.log_history if "loss" in logs][-1]


def test_elimination_is_active_and_saves_bytes(tmp_path):
    half = tiny_trainer(tmp_path / "half", {**SAMPLED, "keep_ratio": 0.5})
    whole = tiny_trainer(tmp_path / "whole", {**SAMPLED, "keep_ratio": 1.0})
    half.train()
    whole.train()
    few, all_of_them = last_metrics(half), last_metrics(whole)
    assert few["kept_share"] == few["kept_share/layer_0"] == 0.5
    assert all_of_them["kept_share"] == 1.0
    for layer in (0, 1):
        assert few[f"saved_bytes/layer_{layer}"] < 0.6 * all_of_them[f"saved_bytes/layer_{layer}"]
    assert curve(half) != curve(whole)


@pytest.mark.parametrize(
    "lemo", [SAMPLED, SPARSE, {"selection": "ratio", "attention_forward": "exact"}], ids=lambda d: d["selection"]
)
def test_same_seed_same_curve(tmp_path, lemo):
    first, second = (tiny_trainer(tmp_path / name, lemo, probe_steps=2) for name in "ab")
    first.train()
    second.train()
    assert curve(first) == curve(second)
    assert len(set(curve(first))) == 6
    assert curve(first) != curve(_trained(tmp_path / "c", lemo, seed=1))


def _trained(folder, lemo, **changes):
    trainer = tiny_trainer(folder, lemo, **changes)
    trainer.train()
    return trainer


@pytest.mark.parametrize("lemo", [SAMPLED, SPARSE], ids=["sampled", "threshold"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_at_a_step_gives_the_same_curve(tmp_path, lemo, accumulation):
    changes = {"save_strategy": "steps", "save_steps": 2, "probe_steps": 3, "dense_tail_share": 0.2, "max_steps": 5}
    changes |= {"gradient_accumulation_steps": accumulation, "refit_limit": 1, "recall_drop": -1.0, "refit_documents": 1}
    never_stopped = _trained(tmp_path / "whole", lemo, **changes)
    killed(tiny_trainer(tmp_path / "cut", lemo, **changes), 3)
    resumed = tiny_trainer(tmp_path / "cut", lemo, **changes)
    resumed.train(resume_from_checkpoint=True)
    assert curve(resumed) == curve(never_stopped)
    assert last_metrics(resumed)["kept_share"] == 1.0  # the dense tail
    expected = sparse_backbone(never_stopped.model).layers[0].lemo_predictor.parameters()
    for ours, theirs in zip(sparse_backbone(resumed.model).layers[0].lemo_predictor.parameters(), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("phase", ["predictor", "calibrate"])
def test_killed_inside_a_phase_gives_the_same_curve(tmp_path, monkeypatch, phase):
    never_stopped = _trained(tmp_path / "whole", SPARSE, prune_documents=1)
    owner, name = {
        "predictor": (predictor_training.PredictorTraining, "fit"),
        "calibrate": (threshold_search.ThresholdSearch, "step"),
    }[phase]
    calls = []
    untouched = getattr(owner, name)

    def dies_at_the_second_call(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return untouched(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies_at_the_second_call)
        with pytest.raises(Killed):
            tiny_trainer(tmp_path / "cut", SPARSE, prune_documents=1).train()
    left = {path.name for path in (tmp_path / "cut").iterdir()}
    assert left - {LOG_FILE, MAPS_FILE} == {PROGRESS_FILE}
    resumed = tiny_trainer(tmp_path / "cut", SPARSE, prune_documents=1)
    done_again = []
    monkeypatch.setattr(owner, name, lambda self, *args: done_again.append(1) or untouched(self, *args))
    resumed.train(resume_from_checkpoint=True)
    assert len(done_again) == {"predictor": 3, "calibrate": 1}[phase]
    assert curve(resumed) == curve(never_stopped)
    assert sparse_backbone(resumed.model).config.lemo == sparse_backbone(never_stopped.model).config.lemo


def test_checkpoints_hold_predictors_thresholds_and_phase(tmp_path):
    trainer = _trained(tmp_path, SPARSE, save_strategy="steps", save_steps=3)
    checkpoint = tmp_path / "checkpoint-3"
    backbone = sparse_backbone(trainer.model)
    stored = load_file(checkpoint / "lemo_predictors.safetensors")
    assert torch.equal(stored["layers.1.key.matrices.0"], backbone.layers[1].lemo_predictor.key.matrices[0])
    assert read_json(checkpoint / "lemo_config.json")["thresholds"] == backbone.config.lemo.thresholds
    state = read_json(checkpoint / "lemo_state.json")
    assert state["phase"] == "sparse"
    assert state["finished"] == ["predictor", "calibrate"]
    assert not (tmp_path / PROGRESS_FILE).exists()


def test_final_model_has_its_files(tmp_path):
    trainer = _trained(tmp_path / "run", SAMPLED)
    trainer.save_model(str(tmp_path / "final"))
    names = {path.name for path in (tmp_path / "final").iterdir()}
    assert {"adapter_model.safetensors", "lemo_predictors.safetensors", "lemo_config.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


def test_a_finished_adapter_has_our_card_and_a_persons_text_stays(tmp_path):
    trainer = _trained(tmp_path / "run", SPARSE, save_strategy="steps", save_steps=6)
    assert BEGIN not in (tmp_path / "run" / "checkpoint-6" / "README.md").read_text()
    card = tmp_path / "final" / "README.md"
    trainer.save_model(str(tmp_path / "final"))
    text = card.read_text()
    for part in (
        "# final",
        "| Optimizer steps | 6 |",
        "24 samples",
        "| Context | 96 tokens |",
        "| Layer | Kept share | Predictor recall |",
    ):
        assert part in text
    assert "More Information Needed" not in text
    card.write_text(text.replace(END, END + "\n\n## My notes\n"))
    trainer.save_model(str(tmp_path / "final"))
    assert card.read_text().count("## My notes") == 1
    assert card.read_text().count("# final") == 1


def test_a_whole_model_has_a_card_of_its_own_and_an_untrained_one_none(tmp_path):
    untrained = tiny_trainer(tmp_path / "run", SAMPLED)
    untrained.save_model(str(tmp_path / "untrained"))
    whole = LemoTrainer(
        model=tiny_lemo_model(lora=False, **SAMPLED), args=tiny_arguments(tmp_path / "whole"), train_dataset=RandomText()
    )
    whole.train()
    whole.save_model(str(tmp_path / "whole"))
    assert (tmp_path / "whole" / "lemo_predictors.safetensors").is_file()
    assert BEGIN not in (tmp_path / "untrained" / "README.md").read_text()
    assert "trust_remote_code=True" in (tmp_path / "whole" / "README.md").read_text()


def test_full_model_resumes_after_pruning(tmp_path):
    def trainer():
        model = tiny_lemo_model(lora=False, selection="ratio")
        changes = {"prune_documents": 1, "prune_share": 0.6, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
        return LemoTrainer(model=model, args=tiny_arguments(tmp_path, **changes), train_dataset=RandomText())

    killed(trainer(), 3)
    assert read_json(tmp_path / "checkpoint-2" / "lemo_config.json")["predictor_sizes"] != [[8] * 4] * 2
    resumed = trainer()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_the_run_and_names_the_checkpoint(tmp_path, where):
    trainer = tiny_trainer(tmp_path, SAMPLED, save_strategy="steps", save_steps=2)

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            weight = next(weight for name, weight in model.named_parameters() if "lora_A" in name)
            if state.global_step == 3 and where == "loss":
                weight.data[0, 0] = math.nan
            elif state.global_step == 3:
                weight.register_hook(lambda grad: grad * math.inf)

    trainer.add_callback(Poison())
    with pytest.raises(
        LemoError, match=rf"{where} is not finite; .* at step 4, last good checkpoint: .*checkpoint-2; lower"
    ) as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert trainer.state.global_step == 3


class PartlyUnlabelled(RandomText):
    """Every other pair of samples has no label, and the last pairs no real token either."""

    def __getitem__(self, index):
        sample = {**super().__getitem__(index), "attention_mask": torch.ones(96, dtype=torch.long)}
        if index % 4 < 2:
            sample["labels"] = torch.full_like(sample["labels"], -100)
            sample["attention_mask"] = torch.full_like(sample["attention_mask"], int(index < 8))
        return sample


def test_batches_without_labels_pass_and_are_said_once(tmp_path, caplog):
    changes = {"predictor_documents": 0, "train_sampling_strategy": "sequential"}
    args = tiny_arguments(tmp_path / "ours", **changes)
    ours = LemoTrainer(model=tiny_lemo_model(**SAMPLED), args=args, train_dataset=PartlyUnlabelled())
    with caplog.at_level("WARNING", logger="lemo_hf"):
        ours.train()
    assert ours.state.global_step == 6
    assert [record.message for record in caplog.records if "no label" in record.message] == [
        "batch has no label; step 1, 192 tokens; it trains nothing: leave out samples whose labels are all -100 "
        "(said once, others pass alike)"
    ]
    stock = Trainer(
        model=tiny_lemo_model(**SAMPLED),
        args=tiny_arguments(tmp_path / "stock", **changes),
        train_dataset=PartlyUnlabelled(),
        callbacks=lemo_callbacks(args),
    )
    stock.train()
    assert curve(stock) == curve(ours)
    for (name, one), other in zip(ours.model.named_parameters(), stock.model.parameters(), strict=True):
        assert torch.equal(one, other), name
        assert one.isfinite().all()


def test_a_checkpoint_is_written_once_and_read_once(tmp_path, monkeypatch):
    def counted(module, name):
        calls = []
        untouched = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append(args[-1]) or untouched(*args, **kwargs))
        return calls

    saves = counted(lemo_run, "save_lemo_files")
    killed(tiny_trainer(tmp_path, SAMPLED, save_strategy="steps", save_steps=2), 5)
    assert [Path(folder).name for folder in saves] == ["checkpoint-2", "checkpoint-4"]
    loads = counted(lemo_files, "_install")
    tiny_trainer(tmp_path, SAMPLED, save_strategy="steps", save_steps=2).train(resume_from_checkpoint=True)
    assert len(loads) == 1


def test_hub_imports_nothing_from_training():
    for path in Path(lemo_files.__file__).parent.glob("*.py"):
        assert "training" not in [
            part for line in path.read_text().splitlines() if "import " in line for part in re.split(r"\W", line)
        ]


def test_used_output_folder_is_refused(tmp_path):
    first = _trained(tmp_path, SAMPLED, save_strategy="steps", save_steps=6)
    first.train()  # its own folder
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(LemoError, match="output folder holds another run"):
        tiny_trainer(tmp_path, SAMPLED).train()
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_progress_of_another_run_is_refused(tmp_path):
    (tmp_path / PROGRESS_FILE).write_bytes(b"")
    with pytest.raises(LemoError, match="output folder holds another run"):
        tiny_trainer(tmp_path, SAMPLED).train()
    with pytest.raises(LemoError, match="corrupt or truncated"):
        tiny_trainer(tmp_path, SAMPLED).train(resume_from_checkpoint=True)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(LemoError, match="no run to go on from"):
        tiny_trainer(tmp_path, SAMPLED).train(resume_from_checkpoint=True)
    with pytest.raises(LemoError, match="checkpoint does not exist"):
        tiny_trainer(tmp_path, SAMPLED).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


def test_resuming_with_other_settings_is_refused(tmp_path):
    killed(tiny_trainer(tmp_path, SAMPLED, save_strategy="steps", save_steps=2), 3)
    with pytest.raises(LemoError, match=r"run was started with keep_ratio=0.5, it is resumed with 0.25"):
        tiny_trainer(tmp_path, {**SAMPLED, "keep_ratio": 0.25}).train(resume_from_checkpoint=True)


def test_resumes_from_shipped_predictors_of_another_width(tmp_path):
    shipped = str(tmp_path / "shipped")
    _trained(tmp_path / "first", {"selection": "ratio", "predictor_rank": 6, "predictor_features": 5}).save_model(shipped)

    def trainer():
        return tiny_trainer(tmp_path / "cut", {"selection": "ratio"}, predictors=shipped, save_strategy="steps", save_steps=2)

    killed(trainer(), 3)
    resumed = trainer()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert sparse_backbone(resumed.model).layers[0].lemo_predictor.sizes == [6] * 4


def test_the_best_model_has_its_predictors_and_thresholds(tmp_path):
    changes = {
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
    }
    changes |= {"greater_is_better": True, "metric_for_best_model": "eval_loss"}  # the first one: loss falls
    changes |= {"probe_steps": 4, "recall_drop": -1.0, "refit_limit": 1, "refit_documents": 2}
    trainer = LemoTrainer(
        model=tiny_lemo_model(**SPARSE),
        args=tiny_arguments(tmp_path, **changes),
        train_dataset=RandomText(),
        eval_dataset=RandomText(samples=4),
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    assert any("recall_before_refit" in logs for logs in trainer.state.log_history)
    backbone = sparse_backbone(trainer.model)
    for name, value in load_file(best / "lemo_predictors.safetensors").items():
        layer, part = name.removeprefix("layers.").split(".", 1)
        assert torch.equal(backbone.layers[int(layer)].lemo_predictor.get_parameter(part), value), name
    assert backbone.config.lemo.thresholds == read_json(best / "lemo_config.json")["thresholds"]


def test_stock_trainer_with_callbacks_has_the_same_curve(tmp_path):
    args = tiny_arguments(tmp_path / "ours")
    stock_args = TrainingArguments(
        **{
            name: getattr(args, name)
            for name in ("max_steps", "per_device_train_batch_size", "learning_rate", "use_cpu", "disable_tqdm")
        },
        output_dir=str(tmp_path / "stock"),
        logging_steps=1,
        save_strategy="steps",
        save_steps=3,
        report_to="none",
        dataloader_pin_memory=False,
    )
    stock = Trainer(model=tiny_lemo_model(**SPARSE), args=stock_args, train_dataset=RandomText(), callbacks=lemo_callbacks(args))
    stock.train()
    ours = _trained(tmp_path / "ours", SPARSE)
    assert curve(stock) == curve(ours)
    assert last_metrics(stock)["kept_share/layer_1"] == last_metrics(ours)["kept_share/layer_1"]
    assert (tmp_path / "stock" / "checkpoint-3" / "lemo_state.json").is_file()


def test_stock_arguments_are_refused(tmp_path):
    with pytest.raises(LemoError, match="LemoTrainer needs LemoTrainingArguments"):
        LemoTrainer(model=tiny_lemo_model(), args=TrainingArguments(output_dir=str(tmp_path), report_to="none"))


def test_reporters_receive_layer_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = tiny_trainer(tmp_path, SPARSE, report_to="tensorboard", probe_steps=3)
    trainer.train()
    events = next(Path(tmp_path).rglob("events.out.tfevents.*"))
    reader = EventAccumulator(str(events.parent))
    reader.Reload()
    tags = set(reader.Tags()["scalars"])
    assert {f"train/{name}/layer_1" for name in ("kept_share", "saved_bytes", "threshold", "recall")} <= tags
