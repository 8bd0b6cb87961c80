"""A saved LeMo model as remote code: in a virtual environment that has never heard of lemo_hf, and under our own trainer."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from references.tiny_models import assert_same_gradients, lemo_model, loss_and_gradients, random_tokens, stock_model
from safetensors.torch import load_file, save_file
from training_runs import RandomText, curve, tiny_arguments, tiny_lemo_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from lemo_hf import AutoLemoModelForCausalLM, LemoTrainer, registry
from lemo_hf.hub.lemo_files import CONFIG_FILE, PREDICTORS_FILE

PROMPT = random_tokens(24, 3)[None]
TOKENS = random_tokens(50, 1)[None]
LEMO = {"selection": "ratio", "keep_ratio": 0.4}


def distributions_needed(*roots):
    """Name and version of everything that these need, themselves included, as installed here."""
    found, todo = {}, [(root, frozenset()) for root in roots]
    while todo:
        name, extras = todo.pop()
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # for another platform, or an optional one
            continue
        if canonicalize_name(name) in found and not extras:
            continue
        found[canonicalize_name(name)] = distribution.version
        for line in distribution.requires or []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                todo.append((needed.name, frozenset(needed.extras)))
    return found


@pytest.fixture(scope="module")
def fresh_python():
    """The interpreter of a new virtual environment that holds torch, transformers, safetensors and what these need."""
    versions = distributions_needed("torch", "transformers", "safetensors")
    assert not {"peft", "accelerate", "lemo-hf"} & set(versions)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = Path(folder) / "bin" / "python"
        pins = [f"{name}=={version}" for name, version in versions.items()]
        # Exactly what is installed here and nothing beside it: no other build of torch can come along.
        command = [python, "-m", "pip", "install", "--quiet", "--no-deps", *pins]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=900)
        except subprocess.TimeoutExpired:
            pytest.skip("pip did not install torch and transformers within 15 minutes")
        if result.returncode:
            pytest.skip(f"pip cannot install what is installed here: {result.stderr.strip().splitlines()[-1:]}")
        yield str(python)


PROGRAM = """
import importlib.util, json, sys
from pathlib import Path
assert not [name for name in ("lemo_hf", "lemo_kernels", "peft", "accelerate") if importlib.util.find_spec(name)]
import torch, transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
torch.set_num_threads(1)
folder, files, stock_name = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
given = load_file(files / "given.safetensors")
tokens, prompt = given["tokens"], given["prompt"]

def answers(model):
    model.eval()
    with torch.no_grad():
        logits = model(tokens).logits
    return logits, model.generate(prompt, max_new_tokens=8, do_sample=False)

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
for part in (type(model), type(model.config), type(model.config.lemo)):
    assert part.__module__.startswith("transformers_modules"), part
stock = getattr(transformers, stock_name).from_pretrained(folder)
assert type(stock).__module__.startswith("transformers.models"), type(stock)
found = {}
for name, each in (("remote", model), ("stock", stock)):
    found[name + ".logits"], found[name + ".generated"] = answers(each)

model.train()
loss = model(input_ids=tokens, labels=tokens).loss
loss.backward()
backbone = next(module for module in model.modules() if hasattr(module, "lemo_kept_shares"))
found["loss"], found["kept"] = loss.detach(), torch.tensor(backbone.lemo_kept_shares)
found |= {"grad." + name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
with torch.no_grad():
    for weight in model.parameters():
        if weight.grad is not None:
            weight -= 0.1 * weight.grad

saved = files / "saved_there"
model.save_pretrained(saved)
config = json.loads((saved / "config.json").read_text())
assert config["auto_map"] == json.loads((Path(folder) / "config.json").read_text())["auto_map"], config["auto_map"]
again = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
assert type(again).__module__.startswith("transformers_modules") and type(again) is not type(model)
found["changed.logits"], _ = answers(model)
found["again.logits"], _ = answers(again)
assert again.config.lemo.to_dict() == model.config.lemo.to_dict()
save_file({name: value.contiguous() for name, value in found.items()}, files / "found.safetensors")
"""


def run(python, program, *arguments, folder):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [python, "-c", program, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def code_files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.py")}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", registry.ARCHITECTURES)
def test_a_saved_model_works_where_nothing_of_ours_is_installed(fresh_python, architecture, tmp_path):
    stock = stock_model(architecture=architecture)
    model = lemo_model(stock, **LEMO)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    assert code_files(folder)
    save_file({"tokens": TOKENS, "prompt": PROMPT}, tmp_path / "given.safetensors")
    run(fresh_python, PROGRAM, folder, tmp_path, type(stock).__name__, folder=tmp_path)
    found = load_file(tmp_path / "found.safetensors")

    with torch.no_grad():
        logits = stock(TOKENS).logits
    generated = stock.generate(PROMPT, max_new_tokens=8, do_sample=False)
    for name in ("remote", "stock"):
        assert torch.equal(found[f"{name}.logits"], logits), name
        assert torch.equal(found[f"{name}.generated"], generated), name
    assert found["kept"].max() < 0.6
    loss, wanted = loss_and_gradients(model, {"input_ids": TOKENS, "labels": TOKENS})
    assert torch.equal(found["loss"], loss)
    got = {name.removeprefix("grad."): value for name, value in found.items() if name.startswith("grad.")}
    assert_same_gradients(got, wanted, rtol=1e-5, atol=1e-7)

    # What was saved there is as complete as what came: code, weights, predictors.
    assert not torch.equal(found["changed.logits"], logits)
    assert torch.equal(found["again.logits"], found["changed.logits"])
    assert code_files(tmp_path / "saved_there") == code_files(folder)
    for auto in (AutoLemoModelForCausalLM, type(stock)):
        with torch.no_grad():
            assert torch.equal(auto.from_pretrained(tmp_path / "saved_there").eval()(TOKENS).logits, found["changed.logits"])


@pytest.fixture
def remote_class(tmp_path):
    """The model class of a saved folder's own code files, which importing lemo_hf would otherwise keep out."""

    def load(model, lora=False):
        folder = tmp_path / "remote_model"
        model.save_pretrained(folder)
        found = get_class_from_dynamic_module("modeling_lemo_llama.LemoLlamaForCausalLM", str(folder))
        assert found.__module__.startswith("transformers_modules")
        return found.from_pretrained(folder)

    return load


def with_lora(model):
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(3)
        return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


def trainer_of(model, folder, lora, **changes):
    arguments = tiny_arguments(folder, learning_rate=1e-3, **changes)
    return LemoTrainer(model=with_lora(model) if lora else model, args=arguments, train_dataset=RandomText())


@pytest.mark.parametrize("lora", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("selection", ["threshold", pytest.param("sampled", marks=pytest.mark.slow)])
def test_our_trainer_trains_what_came_as_remote_code_and_resumes_it(remote_class, tmp_path, lora, selection):
    """All phases, against the same run of this package's class: fitted predictors, thresholds, losses, files."""
    base = tiny_lemo_model(lora=False, selection=selection)
    local = trainer_of(tiny_lemo_model(lora=False, selection=selection), tmp_path / "local", lora)
    local.train()
    model = remote_class(base)
    assert not isinstance(model, registry.ARCHITECTURES["llama"][1])
    whole = trainer_of(model, tmp_path / "whole", lora, save_strategy="steps", save_steps=3)
    whole.train()
    assert len(curve(whole)) == 6
    assert curve(whole) == curve(local)
    assert all(logs["kept_share"] < 1 for logs in whole.state.log_history if "kept_share" in logs)
    found = whole.lemo_run.lemo
    assert type(found).__module__.startswith("transformers_modules")
    assert found.to_dict() == local.lemo_run.lemo.to_dict()
    assert (found.thresholds is not None) == (selection == "threshold")

    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert (checkpoint / PREDICTORS_FILE).is_file()
    assert (checkpoint / CONFIG_FILE).is_file()
    resumed = trainer_of(remote_class(base), tmp_path / "resumed", lora)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert curve(resumed) == curve(whole)
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], weight, rtol=0, atol=0, msg=name)


SPOILT = "raise RuntimeError('code of the folder ran')\n"


@pytest.mark.parametrize("trust", [True, False, None])
def test_with_lemo_hf_imported_its_own_classes_win_and_the_folder_s_code_does_not_run(tmp_path, trust):
    lemo_model(stock_model(), **LEMO).save_pretrained(tmp_path)
    for path in tmp_path.glob("*.py"):
        path.write_text(SPOILT)
    config_class, model_class = registry.ARCHITECTURES["llama"]
    assert type(AutoConfig.from_pretrained(tmp_path, trust_remote_code=trust)) is config_class
    for auto in (AutoModelForCausalLM, AutoLemoModelForCausalLM):
        assert type(auto.from_pretrained(tmp_path, trust_remote_code=trust)) is model_class


ORDER_PROGRAM = """
import sys
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
def home():
    return type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)).__module__.split(".")[0]
print(home())
import lemo_hf
print(home())
"""


@pytest.mark.slow
def test_the_order_of_import_and_load_decides_and_nothing_else(tmp_path):
    """Without lemo_hf imported the folder's code runs, even where the package is installed; afterwards the package's."""
    lemo_model(stock_model(), **LEMO).save_pretrained(tmp_path / "model")
    root = Path(importlib.util.find_spec("lemo_hf").origin).parents[1]
    program = f"import sys\nsys.path.insert(0, {str(root)!r})\n{ORDER_PROGRAM}"
    assert run(sys.executable, program, tmp_path / "model", folder=tmp_path).split() == ["transformers_modules", "lemo_hf"]
