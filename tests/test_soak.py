"""Thousands of small steps of every kind in one process: no error, no value that is not finite, no growth in memory."""

import ctypes
import gc
import json
import random
import re
import resource
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from references.tiny_models import checkpoint_stock_layers, lemo_model, place, stock_model, with_varied_vectors
from torch._subclasses.fake_tensor import FakeTensor

from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.profiling.provenance import provenance

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
STEPS, WARM_UP = 2000, 800
# What the process itself may gather over these steps: hypothesis remembers every example that it drew, and the library of 16-bit
# matrix products keeps what it compiled for the last thousand shapes.
RESIDENT_GROWTH = 48 * 2**20
ARCHITECTURES = {
    "llama": {},
    "mistral": {"sliding_window": 37},
    "opt": {"max_position_embeddings": 600},
    "qwen2": {},
    "qwen3": {},
}
LAYOUTS = ["left", "right", "left_positions", "packed_positions", "packed_seq_idx", "packed_cu"]

FIELDS = {
    "architecture": st.sampled_from(list(ARCHITECTURES)),
    "layout": st.sampled_from(LAYOUTS),
    "padding": st.integers(0, 70),
    "rows_of_padding": st.integers(0, 1),
    "text": st.sampled_from(["random", "random", "one token over and over"]),
    "labels": st.sampled_from(["all", "all", "few", "none"]),
    "items": st.sampled_from(["counted", "not given"]),
    "micro_batches": st.integers(1, 2),
    "stock_checkpointing": st.sampled_from(["off", "off", "on"]),
    "precision": st.sampled_from(["float32", "float32", "bfloat16 autocast"]),
    "evaluated": st.booleans(),
    "seed": st.integers(0, 2**31),
    "lemo": st.fixed_dictionaries(
        {
            "block_size": st.sampled_from([1, 4, 16, 64]),
            "keep_ratio": st.floats(0.01, 1.0),
            "selection": st.sampled_from(["sampled", "ratio", "threshold"]),
            "sampling_temperature": st.sampled_from([None, 0.5, 1.0]),
            "score_source": st.sampled_from(["predicted", "true"]),
            "thresholds": st.lists(st.floats(-5, 15), min_size=2, max_size=2),
            "attention_forward": st.sampled_from(["sparse", "exact", "kept_keys"]),
            "checkpoint": st.sampled_from(["none", "kept_rows"]),
            "dense_layers": st.sampled_from([[], [], [0], [-1]]),
            "segment_size": st.sampled_from([13, 100, 1024]),
        }
    ),
}


def steps(longest):
    """Strategy of a step whose documents have up to `longest` tokens."""

    def spread(seed):
        drawn = random.Random(seed)
        return [drawn.randint(1, longest) for _ in range(drawn.randint(1, 5))]

    # By itself hypothesis tries the shortest again and again.
    ends = st.lists(st.integers(1, longest), min_size=1, max_size=5)
    lengths = st.one_of(*[st.integers(0, 2**31).map(spread)] * 3, ends)
    return st.fixed_dictionaries(FIELDS | {"lengths": lengths})


class Soak:
    """One model and optimizer of each architecture, for all steps."""

    def __init__(self):
        self.done = self.without_label = self.tokens = 0
        self.counts = Counter()
        self.models, self.optimizers = {}, {}
        for name, changes in ARCHITECTURES.items():
            model = lemo_model(with_varied_vectors(stock_model(architecture=name, **changes)), {})
            if name in ("mistral", "qwen3"):
                model.enable_input_require_grads()
            self.models[name] = model
            trained = [weight for weight in model.parameters() if weight.requires_grad]
            self.optimizers[name] = torch.optim.AdamW(trained, lr=1e-4)

    def step(self, drawn):
        model, optimizer = self.models[drawn["architecture"]], self.optimizers[drawn["architecture"]]
        sparse_backbone(model).config.lemo.update(**drawn["lemo"])
        if drawn["stock_checkpointing"] == "on":
            checkpoint_stock_layers(model)
        has_label = False
        for number in range(drawn["micro_batches"]):
            batch, labelled = batch_of(drawn, number)
            has_label |= labelled
            if drawn["items"] == "counted":
                batch["num_items_in_batch"] = max(1, int((batch["labels"] != -100).sum()))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=drawn["precision"] != "float32"):
                loss = model.train()(**batch).loss
            loss.backward()
            assert loss.isfinite() or (loss.isnan() and not labelled and "num_items_in_batch" not in batch), loss
        grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
        assert grads
        assert all(grad.isfinite().all() for grad in grads), "gradient"
        assert has_label or not any(grad.any() for grad in grads), "a gradient without a label"
        optimizer.step()
        optimizer.zero_grad()
        assert all(weight.isfinite().all() for weight in model.parameters()), "weight"
        if drawn["stock_checkpointing"] == "on":
            stop = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
            stop()
        if drawn["evaluated"]:
            with torch.no_grad():
                logits = model.eval()(**{name: part for name, part in batch.items() if name != "num_items_in_batch"}).logits
            real = batch.get("attention_mask", torch.ones(logits.shape[:2])).bool()
            assert logits[real].isfinite().all(), "logits of evaluation"
        self.done += 1
        self.tokens += drawn["micro_batches"] * sum(drawn["lengths"])
        self.without_label += not has_label
        for name in ("architecture", "layout", "labels", "stock_checkpointing", "precision"):
            self.counts[f"{name}: {drawn[name]}"] += 1
        for name in ("block_size", "selection", "sampling_temperature", "score_source", "attention_forward", "checkpoint"):
            self.counts[f"{name}: {drawn['lemo'][name]}"] += 1


def batch_of(drawn, number):
    """The drawn batch and whether it has a label."""
    generator = torch.Generator().manual_seed(drawn["seed"] + number)
    documents = [torch.randint(3, 96, (length,), generator=generator) for length in drawn["lengths"]]
    if drawn["text"] != "random":
        documents = [part[:1].expand(len(part)) for part in documents]
    batch = place(documents, drawn["layout"], drawn["padding"]).batch
    if drawn["labels"] == "none":
        batch["labels"].fill_(-100)
    elif drawn["labels"] == "few":
        batch["labels"][torch.rand(batch["labels"].shape, generator=generator) < 0.9] = -100
    if drawn["rows_of_padding"] and "attention_mask" in batch:
        empty = {"input_ids": 0, "attention_mask": 0, "labels": -100, "position_ids": 1}
        batch = {name: torch.cat((part, torch.full_like(part[:1], empty[name]))) for name, part in batch.items()}
    return batch, bool((batch["labels"][:, 1:] != -100).any())


def memory():
    """Living tensors, their bytes, and the process's resident bytes, once what is free is given back."""
    gc.collect()
    storages, tensors = {}, 0
    for thing in gc.get_objects():
        # Asking the thing itself wakes lazy modules. Fake tensors that another test left have no bytes.
        if issubclass(type(thing), torch.Tensor) and not issubclass(type(thing), FakeTensor):
            tensors += 1
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    else:
        resident = 0
    return {"tensors": tensors, "tensor_bytes": sum(storages.values()), "resident_bytes": resident}


def soaked(steps_wanted, measured_every, longest=600):
    """Runs the steps; the soak and its memory at every `measured_every` steps."""
    # What other tests left, and may still let go of, is not looked at.
    gc.collect()
    gc.freeze()
    soak, found = Soak(), {}

    @settings(
        max_examples=steps_wanted,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(steps(longest))
    def run(drawn):
        soak.step(drawn)
        if soak.done % measured_every == 0:
            found[soak.done] = memory()

    run()
    return soak, found


def test_sixty_steps_of_every_kind():
    soak, found = soaked(60, 30, longest=130)
    assert soak.done == 60
    assert 0 < soak.without_label < 30
    for name, options in (("architecture", ARCHITECTURES), ("layout", LAYOUTS)):
        assert sum(soak.counts[f"{name}: {option}"] > 0 for option in options) > 3
    assert found[60]["tensor_bytes"] == found[30]["tensor_bytes"]


@pytest.mark.slow
def test_two_thousand_steps_do_not_grow():
    began = time.perf_counter()
    soak, found = soaked(STEPS, 200)
    assert soak.done == STEPS
    warm, end = found[WARM_UP], found[STEPS]
    assert (end["tensors"], end["tensor_bytes"]) == (warm["tensors"], warm["tensor_bytes"])
    assert end["resident_bytes"] - warm["resident_bytes"] < RESIDENT_GROWTH
    machine = provenance()["machine"]
    result = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        **provenance(),
        "config": {"steps": STEPS, "warm_up": WARM_UP, "lengths": "1 to 600", "documents": "1 to 5", "lora": "all-linear, r=4"},
        "result": {
            "errors": 0,
            "values_not_finite": 0,
            "tokens": soak.tokens,
            "steps_without_label": soak.without_label,
            "seconds": round(time.perf_counter() - began),
            "memory_by_step": found,
            "steps_by_option": dict(sorted(soak.counts.items())),
        },
    }
    name = re.sub("[^a-z0-9]+", "-", f"{machine['processor']} {machine['cores']} cores".lower()).strip("-")
    (RESULTS / f"soak--{name}.json").write_text(json.dumps(result, indent=1) + "\n")
