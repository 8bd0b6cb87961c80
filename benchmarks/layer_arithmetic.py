"""What a LeMo layer saves for backward and computes, against stock LoRA, at the shape of an 8B model. Exact, no GPU, no weights.

    python benchmarks/layer_arithmetic.py

Fake CPU tensors run the real code (forward and backward) of `--layers` layers; embeddings, final norm and head are left out.
Bytes are unique storages that autograd saves, parameters excluded; FLOPs count causal pairs once, but of kept-key attention and of
the gradient through dropped keys all pairs of the CPU's strips, masked ones too; choosing blocks is included.
"""

import argparse
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaModel

from lemo_hf import LemoConfig, LemoLlamaConfig
from lemo_hf.models.modeling_lemo_llama import LemoLlamaModel
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.profiling.activation_memory import ActivationMemory
from lemo_hf.profiling.estimate.fake_model import fake_model
from lemo_hf.profiling.flops import FlopCounter
from lemo_hf.profiling.provenance import provenance
from lemo_hf.training.phases.predictor_training import parameter_share

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "vocab_size": 128,
}
# "any": exact counts are the same on every machine.
RESULT = Path(__file__).parent / "results" / "layer_arithmetic--any.json"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Predictor sizes of an 8B layer: 2 * (4096 * 128 + 128 * 128 + 128 * 64) = 1.10 M, 0.5 % of the layer's 218 M.
PREDICTOR = {"predictor_rank": 128, "predictor_features": 64}


def build(layers: int, lemo: LemoConfig | None, adapter_dtype: torch.dtype) -> nn.Module:
    """The backbone with LoRA r=8 on q, k, v, o: stock if `lemo` is None; bf16 base."""
    shape = LLAMA_3_8B | {"num_hidden_layers": layers}
    model = LlamaModel(LlamaConfig(**shape)) if lemo is None else LemoLlamaModel(LemoLlamaConfig(**shape, lemo=lemo))
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=PROJECTIONS))
    for name, parameter in adapted.named_parameters():
        if "lemo_predictor" not in name:
            parameter.data = parameter.data.to(adapter_dtype if "lora_" in name else torch.bfloat16)
    return adapted


def measure(layers: int, tokens: int, lemo: LemoConfig | None, adapter_dtype: torch.dtype, autocast: bool) -> dict[str, float]:
    """Saved bytes and FLOPs per layer of one training forward and backward, and the predictors' share of its parameters."""
    mode = FakeTensorMode()
    model = fake_model(lambda: build(layers, lemo, adapter_dtype), mode).train()
    model.enable_input_require_grads()  # as with embeddings below that train: every layer's input gets a gradient
    with mode:
        input_ids = torch.zeros(1, tokens, dtype=torch.long)

        def forward() -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                return model(input_ids=input_ids).last_hidden_state

        with ActivationMemory(model) as memory:
            output = forward()
        with FlopCounter(model) as counter:
            forward().sum().backward()
        del output
    saved = sum(amount for layer, amount in memory.saved.by("layer").items() if layer is not None)
    flops = sum(amount for layer, amount in counter.flops.by("layer").items() if layer is not None)
    share = 0.0 if lemo is None else parameter_share(sparse_backbone(model))
    return {"saved_bytes": saved / layers, "flops": flops / layers, "predictor_share": share}


def arms(keep: float) -> dict[str, LemoConfig | None]:
    """Stock and the LeMo configurations that are compared."""
    sparse: dict[str, Any] = {"attention_forward": "sparse", "selection": "ratio", "keep_ratio": keep}
    exact: dict[str, Any] = {"attention_forward": "exact", "selection": "sampled", "keep_ratio": keep}
    keys: dict[str, Any] = {"attention_forward": "kept_keys", "selection": "ratio", "block_reduction": "mean", "keep_ratio": keep}
    return {
        "stock": None,
        "exact": LemoConfig(**exact, **PREDICTOR),
        "kept keys": LemoConfig(**keys, **PREDICTOR),
        "sparse": LemoConfig(**sparse, **PREDICTOR),
        "exact, kept-row checkpointing": LemoConfig(**exact, **PREDICTOR, checkpoint="kept_rows"),
        "kept keys, kept-row checkpointing": LemoConfig(**keys, **PREDICTOR, checkpoint="kept_rows"),
        "sparse, kept-row checkpointing": LemoConfig(**sparse, **PREDICTOR, checkpoint="kept_rows"),
    }


def main() -> None:
    """Measures every arm with every adapter setting and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the one document")
    parser.add_argument("--keep", type=float, default=0.5, help="kept share of blocks")
    parser.add_argument("--layers", type=int, default=2, help="layers that are run; figures are per layer")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write (default: %(default)s)")
    args = parser.parse_args()
    rows = []
    row_bytes = args.tokens * LLAMA_3_8B["hidden_size"] * 2
    settings = ((torch.bfloat16, False), (torch.float32, False), (torch.float32, True))
    for adapter_dtype, autocast in settings:
        stock: dict[str, float] = {}
        adapters = f"{str(adapter_dtype).removeprefix('torch.')} adapters{', bf16 autocast' if autocast else ''}"
        print(f"\n{adapters}")
        for name, lemo in arms(args.keep).items():
            result = measure(args.layers, args.tokens, lemo, adapter_dtype, autocast)
            stock = stock or result
            row = {
                "arm": name,
                "adapters": adapters,
                "lemo": asdict(lemo) if lemo else None,
                **result,
                "saved_rows_of_h": result["saved_bytes"] / row_bytes,
                "saved_of_stock": result["saved_bytes"] / stock["saved_bytes"],
                "flops_of_stock": result["flops"] / stock["flops"],
            }
            rows.append(row)
            print(
                f"  {name:34s} saved {row['saved_rows_of_h']:6.2f} H a token = {row['saved_of_stock']:.3f} of stock, "
                f"{result['flops'] / 1e12:.3f} TFLOP = {row['flops_of_stock']:.3f}"
            )
    config = {"shape": "Llama-3-8B", "tokens": args.tokens, "keep": args.keep, "batch": 1, "lora": "r=8 on q, k, v, o"}
    document = {"date": f"{datetime.now(UTC):%Y-%m-%d}", **provenance(), "config": config, "rows": rows}
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    main()
