"""What two processes do for tests/test_processes.py: started once, they train many tiny runs together and write what they found.

    RANK=0 WORLD_SIZE=2 ... python tests/process_runs.py FOLDER [die | variants]

One file of results per process, `rank<r>.json`. accelerate sets FSDP up on accelerators only: where it is told that there are
several, FSDP2 runs on the CPU with gloo.
"""

import faulthandler
import hashlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from training_runs import RandomText, curve, tiny_arguments, tiny_lemo_model
from transformers import Trainer, TrainerCallback

from lemo_hf import LemoTrainer, lemo_callbacks
from lemo_hf.errors import LemoStopped
from lemo_hf.evaluation.layer_scores import visit_layers
from lemo_hf.hub.lemo_files import predictor_tensors
from lemo_hf.models.modeling_lemo_llama import LemoLlamaForCausalLM
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.training.phases.layer_fit import LayerFit
from lemo_hf.training.phases.threshold_search import ThresholdSearch
from lemo_hf.training.scale_out.processes import Processes

# Where a hang ends, seconds after the start.
LIMIT = 420
SAMPLED = {"selection": "sampled"}
THRESHOLD = {"selection": "threshold", "attention_forward": "sparse"}
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
# Rounds that do not come out even: 5 documents to fit on, 3 of the profile set.
PHASES = {"predictor_documents": 5, "calibrate_documents": 3, "calibrate_rounds": 1, "predictor_steps": 2, "prune_documents": 2}


class UnevenText(RandomText):
    """Samples of different lengths; the second is padding alone, the fifth has no label, the eighth is a single token."""

    lengths = (96, 40, 64, 17, 80, 96, 33, 1)

    def __init__(self) -> None:
        super().__init__(len(self.lengths))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self.tokens[index, : self.lengths[index]]
        mask = torch.full_like(tokens, int(index != 1))
        return {
            "input_ids": tokens,
            "labels": tokens.clone() if index not in (1, 4) else torch.full_like(tokens, -100),
            "attention_mask": mask,
        }


class Stream(torch.utils.data.IterableDataset):
    """Every other sample."""

    def __init__(self, first: int, end: int = 40) -> None:
        self.first, self.end = first, end

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        samples = RandomText(40)
        return (samples[index] for index in range(self.first, self.end, 2))


def padded(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Collates samples of different lengths, padded on the right."""
    fills = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        name: torch.nn.utils.rnn.pad_sequence([sample[name] for sample in samples], batch_first=True, padding_value=fill)
        for name, fill in fills.items()
    }


class Stopped(Exception):
    """Stands for a kill."""


def stop_in_phase(trainer: LemoTrainer, saves: int) -> None:
    """Has a trainer stop right after the phases' progress has been saved so many times."""
    save, done = trainer.lemo_run.save_progress, []

    def save_and_stop(*args: Any) -> None:
        save(*args)
        done.append(None)
        if len(done) == saves:
            raise Stopped

    trainer.lemo_run.save_progress = save_and_stop


def make_trainer(
    folder: Path, lemo: dict[str, Any], fsdp: bool = False, lora: bool = True, data: Any = None, **changes: Any
) -> Any:
    """A tiny trainer of this process, in whichever engine."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    distributed = {"ddp_backend": "gloo"} if "RANK" in os.environ else {}
    kwargs = {"data_collator": changes.pop("data_collator")} if "data_collator" in changes else {}
    eval_dataset, given = changes.pop("eval_dataset", None), changes.pop("model", None)
    arguments = tiny_arguments(folder, **distributed, fsdp=fsdp, **changes)
    if fsdp:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    model = given or tiny_lemo_model(lora=lora, **lemo)
    return LemoTrainer(model=model, args=arguments, train_dataset=data or RandomText(), eval_dataset=eval_dataset, **kwargs)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Tensors' bits in a few letters."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def outcome(trainer: Any) -> dict[str, Any]:
    """What is compared of a finished run."""
    backbone = sparse_backbone(trainer.model)
    history = trainer.state.log_history
    return {
        "curve": curve(trainer),
        "engine": type(trainer.model_wrapped).__name__,
        "types": sorted({str(tensor.dtype) for tensor in predictor_tensors(backbone).values()}),
        "predictors": digest(predictor_tensors(backbone)),
        "thresholds": backbone.config.lemo.thresholds,
        "refits": trainer.lemo_run.refits if isinstance(trainer, LemoTrainer) else None,
        "recall": [logs["recall"] for logs in history if "recall" in logs],
        "kept_share": [logs["kept_share"] for logs in history if "kept_share" in logs],
        "saved_bytes": [logs["saved_bytes"] for logs in history if "saved_bytes" in logs],
        "offloaded_bytes": [logs["offloaded_bytes"] for logs in history if "offloaded_bytes" in logs],
    }


def error_of(call: Callable[[], Any]) -> str:
    """The message of the error that a call must raise."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def gradients(trainer: Any, rank: int) -> dict[str, list[float]]:
    """Gradients of the first predictor by this process' document, and what a step makes of those of both."""
    run = trainer.lemo_run
    recorded: list[Any] = []
    visit_layers(run.backbone, run.documents.fitting(rank), recorded.append)
    predictor = run.backbone.layers[0].lemo_predictor
    fit = LayerFit(predictor, False, Processes())
    fit.running = torch.ones(3, dtype=torch.float64)
    weights = [weight.requires_grad_(True) for weight in predictor.parameters()]
    with torch.enable_grad():
        own = torch.autograd.grad(fit.loss(recorded[0]), weights)
    for weight in weights:
        weight.requires_grad_(False)
    fit.step(recorded[0], 1, 0.0, True)
    # Adam's first moment after one step is a tenth of the gradient.
    return {"own": own[-1].tolist(), "shared": (10 * fit.first[-1]).tolist()}


def thresholds(trainer: Any, processes: Processes | None) -> list[float]:
    """Thresholds after a round of the search, by all processes or by each for itself."""
    run = trainer.lemo_run
    search = ThresholdSearch(run.model, run.backbone, run.documents.profile(), 0.25, 0.25, processes)
    if processes is None:
        search.processes.count, search.processes.rank = 1, 0
    search.begin()
    search.step()
    return search.thresholds


def stop_in_calibration(out: Path, rank: int) -> list[int]:
    """A run whose second process alone gets a signal within a round of calibration: its exit code, and what was read by then."""
    trainer, read = make_trainer(out / "signalled", THRESHOLD, **PHASES, max_steps=2), []
    measure = ThresholdSearch._sum_of_losses

    def measure_and_signal(search: Any, batch: Any) -> Any:
        read.append(batch)
        if rank == 1 and search.round == 1 and len(read) == 3:
            signal.raise_signal(signal.SIGTERM)
        return measure(search, batch)

    ThresholdSearch._sum_of_losses = measure_and_signal
    try:
        trainer.train()
    except LemoStopped as stopped:
        return [stopped.code, len(read)]
    finally:
        ThresholdSearch._sum_of_losses = measure
    return [0, len(read)]


class DieInStep(TrainerCallback):
    """Kills this process, as kill -9 does, in a step; the others are left waiting for it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def die(out: Path) -> None:
    """A run under FSDP2 whose second process dies in the third step."""
    trainer = make_trainer(out / "died", SAMPLED, fsdp=True, **SAVING)
    if os.environ["RANK"] == "1":
        trainer.add_callback(DieInStep(3))
    trainer.train()


def variant(tied: bool, targets: list[str] | None, modules_to_save: list[str] | None = None) -> Any:
    """A tiny model whose embeddings and head are tied, adapted or trained."""
    torch.manual_seed(0)
    plain = tiny_lemo_model(lora=False, **SAMPLED).config
    plain.tie_word_embeddings = tied
    model = LemoLlamaForCausalLM(plain)
    if targets is None:
        return model
    adapter = LoraConfig(
        r=2, target_modules=targets, modules_to_save=modules_to_save, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, adapter)


def variants(out: Path) -> None:
    """The same steps by DDP and FSDP2 of models whose ends are tied, adapted, trained; weights and losses by engine."""
    kinds: dict[str, tuple[bool, Any, Any, dict[str, Any]]] = {
        "tied": (True, ["q_proj", "v_proj"], None, {}),
        "tied_whole": (True, None, None, {}),
        "whole_accumulated": (False, None, None, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}),
        "ends_adapted": (False, ["q_proj", "lm_head", "embed_tokens"], None, {}),
        "head_trained": (False, ["q_proj"], ["lm_head"], {}),
    }
    found: dict[str, Any] = {}
    for name, (tied, targets, saved, changes) in kinds.items():
        for engine in ("ddp", "fsdp"):
            folder = out / f"{name}_{engine}"
            trainer = make_trainer(
                *(folder, SAMPLED, engine == "fsdp"),
                model=variant(tied, targets, saved),
                **{"max_steps": 2, "learning_rate": 1e-3, **changes},
            )
            trainer.train()
            trainer.save_model(str(folder / "final"))
            found[f"{name}_{engine}"] = curve(trainer)
    (out / f"variants{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")


def main(out: Path) -> None:
    """Everything that two processes are asked to do."""
    rank = int(os.environ["RANK"])
    found: dict[str, Any] = {}
    began = time.perf_counter()

    def train(name: str, *args: Any, resume: Any = None, folder: str | None = None, **kwargs: Any) -> Any:
        trainer = make_trainer(out / (folder or name), *args, **kwargs)
        trainer.train(resume_from_checkpoint=resume)
        found[name] = outcome(trainer)
        found[f"seconds of {name}"] = round(time.perf_counter() - began, 1)
        return trainer

    # The same steps by DDP and FSDP2, saved on the way.
    train("ddp", SAMPLED, **SAVING)
    sharded = train("fsdp", SAMPLED, fsdp=True, eval_dataset=RandomText(4), **SAVING)
    found["fsdp"]["eval_loss"] = sharded.evaluate()["eval_loss"]
    sharded.save_model(str(out / "fsdp_final"))
    train("ddp_kept_rows", {**SAMPLED, "checkpoint": "kept_rows"}, max_steps=2)
    train("fsdp_kept_rows", {**SAMPLED, "checkpoint": "kept_rows"}, fsdp=True, max_steps=2)
    offload = {**SAMPLED, "checkpoint": "kept_rows", "offload": "sensitive", "offload_budget": "1MiB"}
    train("ddp_offload", offload, max_steps=2, offload_min_bytes=1)
    train("fsdp_offload", {**offload, "offload": "uniform"}, fsdp=True, max_steps=2, offload_min_bytes=1)
    train("fsdp_checkpointing", SAMPLED, fsdp=True, max_steps=2, gradient_checkpointing=True)

    for engine in ("ddp", "fsdp"):
        ratio = {"selection": "ratio", "checkpoint": "kept_rows"}
        train(f"bf16_{engine}", ratio, fsdp=engine == "fsdp", bf16=True, max_steps=2)

    # Resumed: by the same engine, by the other, and from what one process saved.
    later = {**SAVING, "resume": str(out / "fsdp" / "checkpoint-2")}
    train("fsdp_resumed", SAMPLED, fsdp=True, folder="fsdp_again", **later)
    train("ddp_from_fsdp", SAMPLED, folder="ddp_again", **later)
    train("fsdp_from_single", SAMPLED, fsdp=True, folder="third", **{**later, "resume": str(out / "single" / "checkpoint-2")})

    # The phases, shared; a refit at every step.
    refits = {"probe_steps": 1, "recall_drop": -1, "refit_documents": 3, "max_steps": 2}
    train("phases_ddp", THRESHOLD, **PHASES, **refits)
    train("phases_fsdp", THRESHOLD, fsdp=True, **PHASES, **refits)

    # Stopped within the phase, to be resumed by one process; and what one process left, gone on with.
    trainer = make_trainer(out / "stopped_by_two", THRESHOLD, **PHASES, max_steps=2)
    stop_in_phase(trainer, 2)
    try:
        trainer.train()
    except Stopped:
        found["stopped"] = True
    train("resumed_by_two", THRESHOLD, folder="stopped_by_one", resume=True, **PHASES, max_steps=2)

    trainer = make_trainer(out / "unpruned", THRESHOLD, **{**PHASES, "prune_documents": 0}, max_steps=1)
    stop_in_phase(trainer, 2)
    with suppress(Stopped):
        trainer.train()
    found["gradients"] = gradients(trainer, rank)
    found["thresholds"] = {"two": thresholds(trainer, Processes()), "one": thresholds(trainer, None)}

    # A stream of which each process has its own part.
    parts = {"data": Stream(rank), "accelerator_config": {"dispatch_batches": False}}
    train("stream", THRESHOLD, **parts, **PHASES, max_steps=2)

    # Parts of unequal length under FSDP2, where every process has to run equally many forwards.
    # accelerate has each read every other batch: 4 samples are left of the shorter one.
    parts["data"] = Stream(rank, end=17 if rank else 40)
    one = {"predictor_documents": 1, "probe_documents": 8, "probe_steps": 1, "max_steps": 1}
    short = train("short_stream", {"selection": "ratio"}, fsdp=True, **parts, **one)
    found["short_stream"]["probes"] = short.lemo_run.documents.probe_count

    found["signal"] = stop_in_calibration(out, rank)

    # Batches that are padding, without labels or short, on one process at a time.
    uneven = {"data": UnevenText(), "data_collator": padded, "train_sampling_strategy": "sequential", "max_steps": 4}
    uneven |= {"per_device_train_batch_size": 1, **PHASES}
    for engine in ("ddp", "fsdp"):
        train(f"uneven_{engine}", THRESHOLD, fsdp=engine == "fsdp", **uneven)

    train("uneven_sampled", SAMPLED, **uneven)

    # All weights trained, the head among them.
    whole = train("whole_fsdp", SAMPLED, fsdp=True, lora=False, max_steps=2, learning_rate=1e-3)
    whole.save_model(str(out / "whole_fsdp_final"))
    train("whole_ddp", SAMPLED, lora=False, max_steps=2, learning_rate=1e-3).save_model(str(out / "whole_ddp_final"))

    # The best model is taken back into its shards.
    # The worst one, in truth, which is not the last.
    best = {
        "metric_for_best_model": "loss",
        "greater_is_better": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "eval_dataset": RandomText(4),
    }
    trainer = train("best", SAMPLED, fsdp=True, **SAVING, **best)
    trainer.save_model(str(out / "best_final"))
    found["best"]["checkpoint"] = trainer.state.best_model_checkpoint

    # Callbacks in a stock trainer.
    def stock(fsdp: bool) -> Any:
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        arguments = tiny_arguments(out / "stock", ddp_backend="gloo", fsdp=fsdp, max_steps=2)
        if fsdp:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        model = tiny_lemo_model(**SAMPLED)
        return Trainer(model=model, args=arguments, train_dataset=RandomText(), callbacks=lemo_callbacks(arguments))

    replicated = stock(fsdp=False)
    replicated.train()
    found["stock"] = outcome(replicated)
    found["stock_fsdp"] = error_of(lambda: stock(fsdp=True))

    # Unlike processes.
    unlike: dict[str, Callable[[], Any]] = {
        "lemo": lambda: make_trainer(out / "unlike", {**SAMPLED, "keep_ratio": 0.5 - 0.1 * rank}),
        "seed": lambda: make_trainer(out / "unlike", SAMPLED, seed=rank),
        "argument": lambda: make_trainer(out / "unlike", SAMPLED, learning_rate=0.1 + rank),
        "model": lambda: make_trainer(out / "unlike", SAMPLED, lora=rank == 0),
        "data": lambda: make_trainer(out / "unlike", SAMPLED, data=RandomText(24 - rank)).train(),
    }
    found["unlike"] = {name: error_of(call) for name, call in unlike.items()}
    processes = Processes()
    found["unlike"]["predictors"] = error_of(
        lambda: processes.require_same_tensors({"a": torch.ones(2), "b": torch.full((2,), 1.0 + rank)})
    )
    found["all"] = [processes.all(True), processes.all(rank == 0)]
    found["means"] = processes.means([float(rank), float("nan") if rank else 3.0, float("nan")])
    found["turns"] = [processes.turn(done, 5) for done in (0, 2, 4)]
    found["log level"] = logging.getLogger("lemo_hf").getEffectiveLevel()
    found["seconds"] = round(time.perf_counter() - began, 1)
    (out / f"rank{rank}.json").write_text(json.dumps(found, default=str), encoding="utf-8")


if __name__ == "__main__":
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    torch.set_num_threads(1)
    {"die": die, "variants": variants}.get(sys.argv[-1], main)(Path(sys.argv[1]))
    faulthandler.cancel_dump_traceback_later()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
