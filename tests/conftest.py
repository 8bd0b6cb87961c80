"""What every test may rely on: no network, one thread, tiny seeded models."""

import gc
import os
import tempfile
from collections.abc import Generator
from dataclasses import replace
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face import reads it: no test may depend on the network
_caches = tempfile.TemporaryDirectory()  # removed at exit: no test reads or fills a person's caches
os.environ["HF_HOME"] = _caches.name
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # forked data loaders would print a warning each

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels run in triton's interpreter then, which is chosen when a kernel is defined: before anything imports triton.
    os.environ["TRITON_INTERPRET"] = "1"
from transformers import LlamaConfig, LlamaForCausalLM

# Tiny tensors: threads cost more than they give, and one thread keeps sums in one order on every machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _imported_modules_are_no_garbage() -> Generator[None]:
    """Trainers collect garbage as training begins: half a second each time where that looks through every imported module."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def tiny_llama_config() -> LlamaConfig:
    """3 layers, hidden 64, 4 heads sharing 2 key/value heads, vocabulary 128, context 512, float32, no dropout."""
    return LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        attention_dropout=0.0,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


@pytest.fixture
def tiny_llama(tiny_llama_config: LlamaConfig) -> LlamaForCausalLM:
    """The stock model of `tiny_llama_config`, the same weights in every test."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(tiny_llama_config)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Skips what lemo_hf itself refuses on the older releases of transformers within the supported range."""
    try:
        return (yield)
    except ValueError as error:
        if "with this release of transformers" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="module")
def traced_once() -> Generator[None]:
    """Every training step that is estimated is traced once for all tests of a file."""
    from lemo_hf.profiling.estimate import estimator

    traces: dict[str, Any] = {}
    trace_step = estimator.trace_step

    def trace(config: Any, settings: Any, on_gpu: bool) -> Any:
        key = repr(replace(settings, lemo=replace(settings.lemo, memory_budget=None)))
        if key not in traces:
            traces[key] = trace_step(config, settings, on_gpu)
        return traces[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimator, "trace_step", trace)
        yield
