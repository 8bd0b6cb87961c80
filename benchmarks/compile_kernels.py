"""Whether the kernels compile for a GPU that is not here, and fit its registers.

Runs every kernel module's probe at the sizes of Llama 3 8B (and at odd ones) on CPU tensors, with triton's launches replaced by a
compilation for the named architecture: what triton's compiler and ptxas refuse shows without a GPU. Nothing is executed.

    python benchmarks/compile_kernels.py --capability 90 [--out FILE.json]
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from lemo_kernels import (
    document_attention,
    gated_mlp,
    kept_key_attention,
    nearby_attention,
    pattern_predictor,
    rotary,
    row_norm,
    segmented_loss,
    token_informativeness,
    token_movement,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

# As `probe` of each module takes them. Wide and narrow rows, sizes that are no power of two, one head.
PROBES: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
    *((token_movement.probe, (width,)) for width in (4096, 5120, 33)),
    *((row_norm.probe, (width, kind)) for width in (128, 4096, 14336) for kind in ("plain", "centred")),
    *((rotary.probe, heads) for heads in ((32, 8, 128), (28, 4, 128), (1, 1, 6))),
    *((gated_mlp.probe, (width, name)) for width in (14336, 65) for name in gated_mlp.ACTIVATIONS),
    *((document_attention.probe, (size, visible)) for size in (64, 128, 256) for visible in ("all", "window")),
    *((nearby_attention.probe, (size,)) for size in (64, 128, 256)),
    *((kept_key_attention.probe, (size,)) for size in (64, 128, 256)),
    *((token_informativeness.probe, (size, 64)) for size in (64, 128, 256)),
    *((segmented_loss.probe, (vocabulary,)) for vocabulary in (128256, 50272)),
    *((pattern_predictor.probe, (4096, 64, kind, *[width] * 4, 32)) for kind in ("plain", "centred") for width in (32, 64)),
]
_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32"}


def signature_of(kernel: JITFunction, values: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Types, constants and alignments of a launch, as triton specialises them."""
    signature, constants, alignments = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        aligned = False
        if parameter.is_constexpr or (isinstance(value, int) and not isinstance(value, bool) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], aligned = "*" + _TYPES[value.dtype], True
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name], aligned = "i32" if abs(value) < 2**31 else "i64", value % 16 == 0
        if aligned:
            alignments[(place,)] = [["tt.divisibility", 16]]
    return signature, constants, alignments


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of local memory (spills) of each thread."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fields = dict(part.split(":") for part in text.split() if part.count(":") == 1 and not part.endswith(":"))
    return {"registers": int(fields["REG"]), "stack_bytes": int(fields["STACK"]), "local_bytes": int(fields.get("LOCAL", 0))}


def line_of(entry: dict[str, Any]) -> str:
    """A result as a line of text."""
    size = {name: value for name, value in entry["constants"].items() if not isinstance(value, bool)}
    if "failure" in entry:
        return f"{entry['kernel']:24s} {'/'.join(entry['types']):14s} DOES NOT COMPILE {size}: {entry['failure']}"
    return (
        f"{entry['kernel']:24s} {'/'.join(entry['types']):14s} warps {entry['num_warps']:2d}  registers {entry['registers']:3d}"
        f"  spilled {entry['stack_bytes'] + entry['local_bytes']:5d} B  shared {entry['shared_bytes']:6d} B  {size}"
    )


def compile_all(capability: int, dtypes: list[torch.dtype]) -> list[dict[str, Any]]:
    """Compiles what every probe launches; one entry per distinct kernel."""
    target, found = GPUTarget("cuda", capability, 32), {}

    def compile_instead(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        values = dict(zip(self.arg_names, args, strict=False))
        values |= {name: options.pop(name) for name in list(options) if name in self.arg_names}
        signature, constants, alignments = signature_of(self, values)
        source = ASTSource(self, signature, constants, alignments)
        key = source.hash() + str(sorted(options.items()))
        if key in found:
            return
        types = sorted({kind for kind in signature.values() if kind[0] == "*" and "i" not in kind})
        switches = {name: value for name, value in constants.items() if name.isupper()}
        found[key] = {"kernel": self.fn.__name__, "types": types, "constants": switches}
        try:
            compiled = triton.compile(source, target=target, options=options)
        except Exception as failure:  # whatever the compiler raises is the result
            found[key]["failure"] = f"{type(failure).__name__}: {' '.join(str(failure).split())[:500]}"
        else:
            found[key] |= {"num_warps": compiled.metadata.num_warps, "shared_bytes": compiled.metadata.shared}
            found[key] |= resources(compiled.asm["cubin"])
        print(line_of(found[key]), flush=True)

    original, JITFunction.run = JITFunction.run, compile_instead
    try:
        for probe, sizes in PROBES:
            for dtype in dtypes:
                probe(torch.device("cpu"), dtype, *sizes)
    finally:
        JITFunction.run = original
    return list(found.values())


def main() -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, default=90, help="90 for H100 and H200, 80 for A100, 89 for Ada")
    parser.add_argument("--float32", action="store_true", help="float32 rows too")
    parser.add_argument("--out", type=Path, help="file for the results as JSON")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("compiling needs triton's compiler; got TRITON_INTERPRET=1; unset it")
    results = compile_all(arguments.capability, [torch.bfloat16, torch.float32] if arguments.float32 else [torch.bfloat16])
    failed = sum("failure" in entry for entry in results)
    print(f"{len(results) - failed} of {len(results)} kernels compile for capability {arguments.capability / 10}")
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"capability": arguments.capability, "triton": triton.__version__, "kernels": results}, indent=1) + "\n"
        )
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
