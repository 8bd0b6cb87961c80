"""Bases in few bits that stay as training needs them."""

from torch import nn

from ..errors import LemoError


def keep_trainable(model: nn.Module) -> None:
    """Has bitsandbytes' 4-bit matrices on a CPU keep the layout that gradients pass through.

    Where a CPU multiplies bfloat16 (AVX512), the first forward in evaluation mode lays them out anew, in place and for good, for an
    operator without a backward: an evaluation or a recall probe would end all gradients below the last layer without a word.
    Seen with bitsandbytes 0.50; the switch is each module's own attribute, and it is not set back: a run may be continued.

    Args:
        model: Any model.

    Raises:
        LemoError: If that has happened already.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise LemoError(
                f"4-bit weights were laid out for inference by an evaluation on the CPU, no gradient passes them; {name}; "
                "load the model anew and make the trainer before evaluating"
            )
        module.support_avx512bf16_for_cpu = False
