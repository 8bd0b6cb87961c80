import subprocess
import sys

import pytest

import lemo_hf


def test_importing_needs_no_optional_package_and_registers_the_models():
    """In a process of its own, with the optional packages made impossible to import."""
    # typer is not blocked: transformers itself depends on it.
    program = """
import sys
for name in ("datasets", "evaluate", "matplotlib", "trl", "triton", "tensorboard", "pandas"):
    sys.modules[name] = None
import lemo_hf
from transformers import AutoConfig, AutoModelForCausalLM
assert "lemo_hf.training" not in sys.modules, "the training half must load on first use"
config = AutoConfig.for_model("lemo_llama", num_hidden_layers=1, hidden_size=32, intermediate_size=32, vocab_size=16,
                              num_attention_heads=2, num_key_value_heads=1)
assert type(config) is lemo_hf.LemoLlamaConfig
assert type(AutoModelForCausalLM.from_config(config)) is lemo_hf.LemoLlamaForCausalLM
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_every_public_name_loads():
    assert set(lemo_hf.__all__) <= set(dir(lemo_hf))
    for name in lemo_hf.__all__:
        assert getattr(lemo_hf, name).__name__ == name


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'LemoGpt'"):
        _ = lemo_hf.LemoGpt
