"""Compiles every kernel for a GPU that need not be there, from the very arguments of its launches.

Run as a program without triton's interpreter: launches are replaced by compilation for sm_90 (H100, H200), and each public
function is called once on a few CPU rows of real width. Prints a JSON object: kernel -> shared bytes of its programs, largest.
"""

import json
import sys
from inspect import signature
from typing import Any

import lemo_kernels
import torch
import triton
from lemo_kernels import host
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64",
    torch.bool: "*i1", torch.float64: "*fp64", torch.uint8: "*u8",
}  # fmt: skip
# Public function -> sizes that its module's `probe` takes, those of Llama-3-8B and one or two that take another path.
SIZES: dict[str, list[tuple[Any, ...]]] = {
    "take_rows": [(4096,)],
    "gather_norm": [(4096, "plain"), (4096, "centred")],
    "apply_rotary": [(32, 8, 128)],
    "gated_activation": [(14336, "silu")],
    "block_features": [(4096, 64, "plain", 32, 32, 32, 32, 32)],
    "attend": [(128, "all"), (128, "window"), (64, "all"), (96, "all"), (256, "all")],
    "block_scores": [(128, 64), (256, 64), (80, 48)],
    "cross_entropy_in_place": [(128256,)],
}
shared: dict[str, int] = {}


def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """In place of `JITFunction.run`: what a launch with these arguments would compile."""
    bound = signature(self.fn).bind(*args, **{name: options.pop(name) for name in list(options) if name in self.arg_names})
    bound.apply_defaults()
    types, constants, divisible = {}, {}, {}
    for place, (param, value) in enumerate(zip(self.params, bound.arguments.values(), strict=True)):
        if param.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not param.do_not_specialize):
            types[param.name], constants[(place,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            types[param.name] = POINTERS[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        else:
            types[param.name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
            aligned = isinstance(value, int) and value % 16 == 0 and not param.do_not_specialize
        if aligned:
            divisible[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=self, signature=types, constexprs=constants, attrs=divisible)
    compiled = triton.compile(
        source, target=TARGET, options={key: options[key] for key in ("num_warps", "num_stages") if key in options}
    )
    name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
    shared[name] = max(shared.get(name, 0), compiled.metadata.shared)


def main() -> None:
    """Compiles what the functions launch in the dtypes named on the command line."""
    triton.runtime.jit.JITFunction.run = compile_instead
    host.require_interpreter = lambda device: None
    for name, all_sizes in SIZES.items():
        for sizes in all_sizes:
            for dtype in sys.argv[1:]:
                lemo_kernels.probe(name, torch.device("cpu"), getattr(torch, dtype), *sizes)
    sys.stdout.write(json.dumps(shared) + "\n")


if __name__ == "__main__":
    main()
