"""Which engines a run may be spread by: what is refused, in one line before the first step, and the launch files."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import ParallelismConfig
from safetensors.torch import load_file
from training_runs import RandomText, tiny_arguments, tiny_lemo_model, tiny_trainer
from transformers import Trainer

from lemo_hf import LemoTrainer, lemo_callbacks
from lemo_hf.errors import LemoError
from lemo_hf.training.scale_out import parallel_options
from lemo_hf.training.scale_out.parallel_options import prepare_engine, refuse_deepspeed, refuse_fsdp

LAUNCH = Path(__file__).parent.parent / "recipes" / "launch"
LAYER = "LemoLlamaDecoderLayer"


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """accelerate's plugins write what they are asked for into the environment, where the next one reads it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def refused(call: Any) -> str:
    """The one line that a call must raise."""
    with pytest.raises(LemoError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    assert message.count(";") >= 2
    return message


@pytest.mark.parametrize(
    ("size", "words"), [("cp_size", "ring attention"), ("sp_size", "Ulysses"), ("tp_size", "tensor parallelism")]
)
def test_engines_that_cut_sequences_or_matrices_are_refused(tmp_path: Path, size: str, words: str) -> None:
    arguments = tiny_arguments(tmp_path)
    arguments.parallelism_config = ParallelismConfig(**{size: 2})
    message = refused(lambda: LemoTrainer(model=tiny_lemo_model(), args=arguments, train_dataset=RandomText()))
    assert words in message
    assert f"{size}=2" in message


def test_models_that_are_cut_already_are_refused(tmp_path: Path) -> None:
    for name, value, words in (
        ("tp_size", 4, "tp_size=4"),
        ("is_distributed_loading_by_transformers", True, "distributed_config"),
    ):
        model = tiny_lemo_model(lora=False)
        model.__class__ = type("Cut", (type(model),), {name: value})
        assert words in refused(lambda model=model: prepare_engine(tiny_arguments(tmp_path), model))


def test_one_process_on_several_gpus_is_refused(tmp_path: Path) -> None:
    arguments = tiny_arguments(tmp_path)
    arguments._n_gpu = 2
    assert "torchrun --nproc_per_node 2" in refused(lambda: prepare_engine(arguments, tiny_lemo_model()))


def test_a_batch_size_that_one_process_would_lower_alone_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = tiny_arguments(tmp_path, auto_find_batch_size=True)
    prepare_engine(arguments, tiny_lemo_model())
    monkeypatch.setattr(type(arguments), "world_size", 2)
    assert "auto_find_batch_size=True, 2 processes" in refused(lambda: prepare_engine(arguments, tiny_lemo_model()))


def test_fsdp_that_would_silently_not_be_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "FSDP was asked for" in refused(lambda: prepare_engine(tiny_arguments(tmp_path), tiny_lemo_model()))


def plugin(**options: Any) -> FullyShardedDataParallelPlugin:
    """FSDP2 with whole layers, as the launch file has it, but for some options."""
    return FullyShardedDataParallelPlugin(**{"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap", **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading=True"),
        ({"activation_checkpointing": True}, "use LemoConfig(checkpoint='kept_rows')"),
        ({"cpu_offload": True}, "fsdp_offload_params=True"),
        (
            {"transformer_cls_names_to_wrap": ["LlamaMLP"]},
            f"to wrap LlamaMLP; leave fsdp_transformer_layer_cls_to_wrap out, or name {LAYER}",
        ),
        ({"auto_wrap_policy": "size_based_wrap", "min_num_params": 1000}, "min_num_params=1000"),
    ],
)
def test_options_of_fsdp_that_would_hang_or_lose_weights_are_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    assert words in refused(lambda: refuse_fsdp(plugin(**options), tiny_arguments(tmp_path), tiny_lemo_model()))


def test_fsdp1_is_refused(tmp_path: Path) -> None:
    old = SimpleNamespace(fsdp_version=1)
    assert "fsdp_version=1; set it to 2" in refused(lambda: refuse_fsdp(old, tiny_arguments(tmp_path), tiny_lemo_model()))


def test_sharded_optimizer_of_few_bits_is_refused(tmp_path: Path) -> None:
    arguments = tiny_arguments(tmp_path, optim="adamw_bnb_8bit")
    assert "optim=adamw_bnb_8bit" in refused(lambda: refuse_fsdp(plugin(), arguments, tiny_lemo_model()))


def test_compiled_layers_under_fsdp2_are_refused(tmp_path: Path) -> None:
    arguments = tiny_arguments(tmp_path)
    arguments.torch_compile = True
    assert "torch_compile=True" in refused(lambda: refuse_fsdp(plugin(), arguments, tiny_lemo_model()))


def test_fsdp2_by_whole_layers_is_let_through(tmp_path: Path) -> None:
    for options in ({}, {"transformer_cls_names_to_wrap": [LAYER]}, {"cpu_offload": False}, {"reshard_after_forward": False}):
        refuse_fsdp(plugin(**options), tiny_arguments(tmp_path), tiny_lemo_model())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage=3; set it to 2, or use FSDP2"),
        ({"sequence_parallel_size": 4}, "sequence_parallel_size=4"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size=2"),
        ({"pipeline": {"stages": 2}}, "pipeline.stages=2"),
    ],
)
def test_deepspeed_beyond_data_parallelism_is_refused(config: dict[str, Any], words: str) -> None:
    assert words in refused(lambda: refuse_deepspeed(config))


def test_deepspeed_config_of_the_arguments_is_read(tmp_path: Path) -> None:
    arguments = tiny_arguments(tmp_path)
    arguments.hf_deepspeed_config = SimpleNamespace(config={"zero_optimization": {"stage": 3}})
    assert "stage=3" in refused(lambda: prepare_engine(arguments, tiny_lemo_model()))
    arguments.hf_deepspeed_config = SimpleNamespace(config=json.loads((LAUNCH / "zero2.json").read_text()))
    prepare_engine(arguments, tiny_lemo_model())


def test_callbacks_refuse_in_a_stock_trainer_too(tmp_path: Path) -> None:
    arguments = tiny_arguments(tmp_path)
    arguments._n_gpu = 2
    stock = {"model": tiny_lemo_model(), "args": arguments, "train_dataset": RandomText()}
    assert "DataParallel" in refused(lambda: Trainer(**stock, callbacks=lemo_callbacks(arguments)))


def test_a_stock_trainer_under_fsdp2_is_refused_and_ours_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        _shared_state: ClassVar[dict[str, bool]] = {"is_set": True}
        fsdp_plugin = plugin()

    monkeypatch.setattr(parallel_options, "AcceleratorState", Engine)
    arguments = tiny_arguments(tmp_path)
    stock = {"model": tiny_lemo_model(), "args": arguments, "train_dataset": RandomText()}
    message = refused(lambda: Trainer(**stock, callbacks=lemo_callbacks(arguments)))
    assert "no whole adapter; 1 processes; use LemoTrainer or LemoSFTTrainer" in message
    tiny_trainer(tmp_path)
    assert Engine.fsdp_plugin.transformer_cls_names_to_wrap == [LAYER]


def test_trainer_of_one_process_is_let_through(tmp_path: Path) -> None:
    tiny_trainer(tmp_path)


def test_launch_files_are_accelerates() -> None:
    configs = {path.stem: load_config_from_file(str(path)) for path in LAUNCH.glob("*.yaml")}
    assert {name: config.distributed_type.value for name, config in configs.items()} == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}
    fsdp = {name.removeprefix("fsdp_"): value for name, value in configs["fsdp2"].fsdp_config.items()}
    version, offload = fsdp.pop("version"), fsdp.pop("offload_params")
    options = FullyShardedDataParallelPlugin(**fsdp, fsdp_version=version, cpu_offload=offload)
    refuse_fsdp(options, SimpleNamespace(optim="adamw_torch"), tiny_lemo_model())  # type: ignore[arg-type]
    refuse_deepspeed(json.loads((LAUNCH / "zero2.json").read_text()))


@pytest.mark.slow
def test_lemo_train_by_torchrun(tmp_path: Path) -> None:
    from tiny_recipe import write_source

    write_source(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "lemo_hf.cli",
        "train",
    ]
    options = ["--selection", "ratio", "--predictor_documents", "3", "--ddp_backend", "gloo"]
    done = subprocess.run([*launch, str(recipe), *options], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("dense perplexity after") == 1
    assert done.stdout.count("3 steps in") == 1
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_model.safetensors", "lemo_predictors.safetensors", "README.md", "results.json", "recipe.yaml"} <= names
    # Started once more, each process says why not.
    again = subprocess.run([*launch, str(recipe), *options], capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode != 0
    assert again.stderr.count("lemo: output folder holds another run") in (1, 2)


@pytest.mark.slow
def test_zero2_on_the_cpu(tmp_path: Path) -> None:
    """The launch file's ZeRO-2 on two processes takes DDP's steps, also when resumed and when samples differ in length."""
    pytest.importorskip(
        "deepspeed", reason="needs DeepSpeed, which the tests' dependencies leave out: pip install 'deepspeed>=0.18'"
    )
    if shutil.which("g++") is None:
        pytest.skip("DeepSpeed compiles its collectives for the CPU, and there is no g++")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    runs = [str(Path(__file__).with_name("deepspeed_runs.py")), str(tmp_path)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *runs], capture_output=True, text=True, timeout=460, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    for name, like in (("zero2", "ddp"), ("resumed", "ddp"), ("uneven_zero2", "uneven_ddp")):
        assert (first[name]["engine"], first[name]["optimizer"]) == ("DeepSpeedEngine", "DeepSpeedZeroOptimizer")
        assert len(first[name]["curve"]) == 4
        assert first[name]["curve"] == pytest.approx(first[like]["curve"], rel=1e-6)
        assert (first[name]["predictors"], first[name]["thresholds"]) == (first[like]["predictors"], first[like]["thresholds"])
        got, wanted = (load_file(tmp_path / f"{each}_final" / "adapter_model.safetensors") for each in (name, like))
        assert got.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-6)
    assert [path.name for path in (tmp_path / "again").glob("checkpoint-*")] == ["checkpoint-4"]  # went on, not anew
    early = load_file(tmp_path / "zero2" / "checkpoint-2" / "adapter_model.safetensors")
    late = load_file(tmp_path / "again" / "checkpoint-4" / "adapter_model.safetensors")
    assert not any(torch.equal(early[key], value) for key, value in late.items())
