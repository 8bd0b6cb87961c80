"""Parts of benchmarks/gpu_suite.py that everything else builds on: every kernel runs, every architecture trains in bfloat16."""

import time
from dataclasses import dataclass
from typing import Any, get_args

import torch
from agreement import error_ratio, require
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from lemo_hf import LemoConfig
from lemo_hf.models.kernel_switch import kernel_mode
from lemo_hf.models.lemo_config import AttentionForward
from lemo_hf.profiling.estimate.step_model import StepSettings, build_model


@dataclass(frozen=True)
class Scale:
    """Real sizes on a GPU, or tiny ones on the CPU."""

    tiny: bool

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return torch.device("cpu" if self.tiny else "cuda")

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Dtypes to check; bfloat16 products are wrong in the interpreter."""
        return [torch.float32, torch.float16] + ([] if self.tiny else [torch.bfloat16])


KERNELS: tuple[tuple[str, tuple[int | str, ...]], ...] = (
    ("take_rows", (4096,)),
    ("gather_norm", (4096, "plain")),
    ("apply_rotary", (32, 8, 128)),
    ("gated_activation", (14336, "silu")),
    ("attend", (128, "all")),
    ("attend", (128, "window")),
    ("attend_nearby", (128,)),
    ("attend_kept_keys", (128,)),
    ("informativeness_by_document", (128, 64)),
    ("cross_entropy_in_place", (128256,)),
    ("block_features", (4096, 64, "plain", 32, 32, 32, 32, 32)),
)


def run_kernels(scale: Scale) -> dict[str, Any]:
    """Every kernel once, in bfloat16: seconds until it has compiled and run, or why it cannot."""
    import lemo_kernels

    rows: list[dict[str, Any]] = []
    for name, sizes in KERNELS:
        began = time.perf_counter()
        row: dict[str, Any] = {"kernel": name, "sizes": sizes}
        try:
            # In the interpreter products of bfloat16 are wrong, but they run.
            lemo_kernels.probe(name, scale.device, torch.float32 if scale.tiny else torch.bfloat16, *sizes)
        except torch.AcceleratorError:
            raise  # nothing runs in this process any more
        except Exception as failure:  # whatever the compiler raises: the others still have something to say
            row["failure"] = f"{type(failure).__name__}: {' '.join(str(failure).split())[:1000]}"
        rows.append(row | {"seconds": time.perf_counter() - began})
    require(not any("failure" in row for row in rows), str([row for row in rows if "failure" in row]))
    return {"rows": rows}


def small_config(model_type: str, tiny: bool) -> PreTrainedConfig:
    """A model that kernels and flash operators serve."""
    width, layers = (32, 1) if tiny else (128, 2)
    values: dict[str, Any] = {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4, "vocab_size": 160, "max_position_embeddings": 512,
    }  # fmt: skip
    if model_type == "opt":
        values |= {"ffn_dim": 2 * width, "word_embed_proj_dim": width, "dropout": 0.0, "attention_dropout": 0.0}
    else:
        values |= {"intermediate_size": 2 * width, "num_key_value_heads": 2, "head_dim": width // 4}
    if model_type == "mistral":
        values["sliding_window"] = 12 if tiny else 48  # shorter than the documents: the Triton kernels serve it
    return AutoConfig.for_model(model_type, **values)


def small_model(model_type: str, lemo: LemoConfig, tiny: bool) -> nn.Module:
    """The architecture with adapters whose every weight has a gradient; the same weights every time."""
    torch.manual_seed(0)
    config = small_config(model_type, tiny)
    model = build_model(config, StepSettings(64, "lemo", lemo, dtype="float32"), list(range(config.num_hidden_layers)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def moved(model: nn.Module, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    """The model on a device with its base in `dtype`; adapters and predictors stay float32."""
    model = model.to(device)
    for name, parameter in model.named_parameters():
        if "lora_" not in name and "lemo_predictor" not in name:
            parameter.data = parameter.data.to(dtype)
    return model


def train(model: nn.Module, batch: dict[str, Tensor], steps: int) -> tuple[list[float], list[Tensor]]:
    """Losses of some AdamW steps on one batch, and the first step's gradients, float32 on the CPU."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    batch = {name: part.to(weights[0].device) for name, part in batch.items()}
    losses: list[float] = []
    gradients: list[Tensor] = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        gradients = gradients or [weight.grad.float().cpu() for weight in weights if weight.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, gradients


def largest_error(gradients: list[Tensor], wanted: list[Tensor]) -> float:
    """Of all weights' gradients."""
    return max(error_ratio(got, want) for got, want in zip(gradients, wanted, strict=True) if want.abs().max() > 0)


def run_training(scale: Scale, model_type: str) -> dict[str, Any]:
    """One architecture in every form: the first step against float32 on the CPU, then some more. What rounding to 16 bits
    alone does to the gradients is measured on the CPU, too; kernels on a GPU may double it.
    """
    documents, dtype = ((20, 3, 17), torch.float32) if scale.tiny else ((90, 7, 53), torch.bfloat16)
    tokens = torch.randint(0, 160, (2, sum(documents)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in documents]).expand(2, -1)
    forms = [(form, checkpoint, "full") for form in get_args(AttentionForward) for checkpoint in ("none", "kept_rows")]
    # Pairs of blocks at the full share: scores that differ in the last bits would choose others.
    forms += [("sparse", "none", "shifted_groups"), ("sparse", "none", "block_sparse"), ("sparse", "kept_rows", "block_sparse")]
    rows = []
    few = [("exact", "kept_rows", "full"), ("kept_keys", "none", "full"), ("sparse", "kept_rows", "block_sparse")]
    for form, checkpoint, pattern in few if scale.tiny else forms:
        for packed in (True,) if scale.tiny else (False, True):
            batch = {"input_ids": tokens, "labels": tokens} | ({"position_ids": positions} if packed else {})
            # The default, a uniform draw, needs no scores: theirs would differ in the last bits and choose other blocks.
            size = 16 if pattern == "block_sparse" else 8
            lemo = LemoConfig(
                attention_forward=form,
                # Documents are short: of most of their tokens these are not all.
                nearby_tokens=7 if form == "kept_keys" else None,
                checkpoint=checkpoint,
                block_size=size,
                segment_size=64,
                attention_pattern=pattern,
                pattern_share=1.0,
            )  # type: ignore[arg-type]
            with kernel_mode("reference"):
                (loss, *_), wanted = train(small_model(model_type, lemo, scale.tiny), batch, steps=1)
                _, rounded = train(moved(small_model(model_type, lemo, scale.tiny), "cpu", dtype), batch, steps=1)
            with kernel_mode("kernels"):
                model = moved(small_model(model_type, lemo, scale.tiny), scale.device, dtype)
                losses, gradients = train(model, batch, steps=2 if scale.tiny else 4)
            error, usual = largest_error(gradients, wanted), largest_error(rounded, wanted)
            row = {
                "form": form,
                "checkpoint": checkpoint,
                "pattern": pattern,
                "packed": packed,
                "losses": losses,
                "float32_loss": loss,
            }
            rows.append(row | {"gradient_error": error, "rounding_error": usual})
            require(abs(losses[0] / loss - 1) < (1e-5 if scale.tiny else 0.01), f"another loss than on the CPU: {rows[-1]}")
            require(error < 2 * usual + 1e-4, f"other gradients than on the CPU: {rows[-1]}")
            require(losses[-1] < losses[0], f"it must learn: {rows[-1]}")
    return {"rows": rows}
