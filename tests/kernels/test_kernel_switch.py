import importlib.util
import inspect
import logging
import subprocess
import sys
from pathlib import Path

import lemo_kernels
import pytest
import torch
import triton
from lemo_kernels import pattern_predictor, token_movement
from references.kernel_inputs import DEVICE, random, split_rows
from torch.library import CustomOpDef

from lemo_hf.models import document_attention, kept_key_attention, kernel_switch
from lemo_hf.models.kernel_switch import kernel, kernel_mode
from lemo_hf.models.lemo_config import LemoConfigError

PROBES = {
    "take_rows": (48,),
    "gather_norm": (48, "centred"),
    "add_norm": (48, "plain"),
    "apply_rotary": (4, 2, 16),
    "attend_nearby": (16,),
    "attend_kept_keys": (16,),
    "rest_query_gradient": (16,),
    "gated_activation": (40, "gelu"),
    "block_features": (48, 64, "centred", 8, 3, 5, 8, 6),
}


@pytest.fixture(autouse=True)
def reference_unless_kernels_are_asked_for():
    """Here the switch stands as users find it."""


@pytest.fixture(autouse=True)
def nothing_tried_yet():
    kernel_switch._reason_against.cache_clear()
    kernel_switch._say_once.cache_clear()
    yield
    kernel_switch._reason_against.cache_clear()


def test_the_reference_runs_on_the_cpu_and_wherever_it_is_asked_for():
    assert kernel("take_rows", torch.zeros(2, 8), 8) is None
    with kernel_mode("reference"):
        assert kernel("take_rows", random(2, 8), 8) is None


def test_kernels_run_where_they_are_asked_for_and_modes_nest():
    rows = random(2, 8)
    with kernel_mode("kernels"):
        assert kernel("take_rows", rows, 8) is lemo_kernels.take_rows
        with kernel_mode("reference"):
            assert kernel("take_rows", rows, 8) is None
        assert kernel("take_rows", rows, 8) is not None
    assert kernel_switch._mode == "auto"


def test_other_functions_stand_in_for_kernels_whatever_the_mode():
    rows, ours = random(2, 8), lambda *args: None
    with kernel_switch.standing_in({"take_rows": ours}), kernel_mode("reference"):
        assert kernel("take_rows", rows.to("cpu"), 8) is ours
        assert kernel("gather_norm", rows, 8, "plain") is None
        with kernel_switch.standing_in({}):
            assert kernel("take_rows", rows, 8) is None
        assert kernel("take_rows", rows, 8) is ours
    with kernel_mode("reference"):
        assert kernel("take_rows", rows, 8) is None


def test_an_unknown_mode_is_refused():
    with (
        pytest.raises(LemoConfigError, match="kernel_mode must be one of auto, kernels, reference; got 'off'; choose one"),
        kernel_mode("off"),
    ):
        pass


@pytest.mark.parametrize("name", PROBES)
def test_a_kernel_is_tried_forward_and_backward_before_its_first_use_and_draws_nothing(name):
    state = torch.get_rng_state()
    with torch.inference_mode():
        lemo_kernels.probe(name, DEVICE, torch.float16, *PROBES[name])
    assert torch.equal(torch.get_rng_state(), state)


def on_cuda(name="take_rows", dtype=torch.float32):
    """The decision for a tensor that says it is on CUDA."""
    return kernel_switch._may_run(name, False, "cuda", dtype, (8,))


def test_a_kernel_that_fails_to_compile_says_so_once_and_the_reference_runs(monkeypatch, caplog):
    tried = []

    def broken(*args):
        tried.append(args)
        raise RuntimeError("out of resource:\n  shared memory")

    monkeypatch.setattr(token_movement, "probe", broken)
    with caplog.at_level(logging.WARNING):
        assert not on_cuda()
        assert not on_cuda()
        assert not kernel_switch._may_run("take_rows", False, "cuda", torch.float32, (16,))
    assert caplog.messages == [
        "The kernel take_rows cannot run, its PyTorch reference does: RuntimeError: out of resource: shared memory"
    ]
    assert len(tried) == 2, "a kernel is tried once per size, not at each call"
    with (
        kernel_mode("kernels"),
        pytest.raises(LemoConfigError, match=r"the kernel take_rows cannot run; .* shared memory; leave"),
    ):
        kernel("take_rows", random(2, 8), 8)


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_a_device_that_fails_is_no_reason_for_the_reference_and_is_asked_again(failure, monkeypatch, caplog):
    answers = [failure("CUDA error: an illegal memory access was encountered"), None]

    def uncertain(*args):
        if answer := answers.pop(0):
            raise answer

    monkeypatch.setattr(token_movement, "probe", uncertain)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with pytest.raises(failure, match="illegal memory access"):
        on_cuda()
    assert on_cuda()
    assert not caplog.messages


def test_a_fault_of_the_device_is_waited_for(monkeypatch):
    """A launch returns before its kernel has run."""

    def late(device):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(token_movement, "probe", lambda *args: None)
    monkeypatch.setattr(torch.cuda, "synchronize", late)
    with pytest.raises(torch.AcceleratorError, match="unspecified launch failure"):
        on_cuda()


@pytest.mark.parametrize(
    ("change", "dtype", "reason"),
    [
        (("lemo_kernels", None), torch.float32, "lemo_kernels is not there (No module named 'triton')"),
        (("_INTERFACE", 99), torch.float32, "lemo_kernels has interface 1, this code was written for 99"),
        (None, torch.float64, "kernels take float32, float16 and bfloat16, not torch.float64"),
    ],
)
def test_every_other_reason_is_said_too(change, dtype, reason, monkeypatch, caplog):
    if change:
        monkeypatch.setattr(kernel_switch, *change)
        monkeypatch.setattr(kernel_switch, "_absence", "No module named 'triton'", raising=False)
    assert not on_cuda(dtype=dtype)
    assert caplog.messages == [f"The kernel take_rows cannot run, its PyTorch reference does: {reason}"]


@pytest.mark.parametrize(
    "name", ["attend", "attend_backward", "with_kept_row_gradient", "attend_kept_keys", "rest_query_gradient"]
)
def test_attention_has_no_reference_but_on_the_cpu_and_the_log_promises_none(name, caplog):
    assert not on_cuda(name, torch.float64)
    reason = "kernels take float32, float16 and bfloat16, not torch.float64"
    assert caplog.messages == [f"The kernel {name} cannot run, and its PyTorch reference is for the CPU: {reason}"]


def test_every_reference_for_the_cpu_alone_is_known_to_the_switch():
    """Those that refuse other devices, by asking for the CPU behind their kernel."""
    asking = set()
    for module in (document_attention, kept_key_attention):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            source = inspect.getsource(function)
            if function.__module__ == module.__name__ and f'kernel("{name}"' in source:
                assert "require_cpu" in source or "_kernel(" in source
                asking.add(name)
    assert asking == kernel_switch._CPU_REFERENCES


def test_importing_the_package_imports_no_triton_and_without_triton_it_is_an_import_error():
    code = "import sys, lemo_kernels; print('triton' in sys.modules, 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False False\n"
    missing = subprocess.run([sys.executable, "-c", "import sys; sys.modules['triton'] = None; import lemo_kernels"], capture_output=True, text=True)  # fmt: skip
    assert "ImportError: lemo_kernels needs triton; none is installed; pip install triton" in missing.stderr


def test_the_switch_is_importable_without_the_kernels(monkeypatch):
    monkeypatch.setitem(sys.modules, "lemo_kernels", None)
    spec = importlib.util.spec_from_file_location("lemo_hf.models.switch_alone", kernel_switch.__file__)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    assert alone.lemo_kernels is None
    assert not alone._may_run("take_rows", False, "cuda", torch.float32, (8,))
    assert "lemo_kernels" in alone._absence


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU kernels need no interpreter")
def test_forced_on_the_cpu_without_the_interpreter_is_an_error(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    message = "cannot run; .* run in triton's interpreter only; got TRITON_INTERPRET not set; set it to 1 before .*; leave"
    with kernel_mode("kernels"), pytest.raises(LemoConfigError, match=message):
        kernel("take_rows", random(2, 8), 8)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_switch_and_the_kernels_stay_within_one_compiled_graph(backend):
    kept_rows, rest_rows = split_rows(9, 4, 1)
    weight = random(8, seed=3)

    def layer(stream):
        if kernel("gather_norm", stream, 8, "plain") is None:
            return stream
        slots = kernel("row_slots", stream, 8)(kept_rows, rest_rows, 9)
        kept, normed, stream = kernel("gather_norm", stream, 8, "plain")(stream, kept_rows, slots, weight, epsilon=1e-6)
        gate = kernel("gated_activation", stream, 8, "silu")(normed, kept, "silu")
        return kernel("merge_rows", stream, 8)(stream, kept_rows, slots, kept, gate)

    torch._dynamo.reset()
    stream = random(9, 8).requires_grad_()
    with kernel_mode("kernels"):
        wanted = layer(stream)
        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        got = compiled(stream)
    assert torch.equal(got, wanted)
    gradients = [torch.autograd.grad(result.square().sum(), stream)[0] for result in (got, wanted)]
    assert torch.equal(*gradients)
    with kernel_mode("reference"):
        assert compiled(stream) is stream, "another mode must compile anew"
    torch._dynamo.reset()


def test_operators_that_copy_host_numbers_stay_out_of_cuda_graphs():
    """A graph would read the numbers' pinned memory again after it has been given to somebody else."""
    folder = Path(lemo_kernels.__file__).parent
    reading = set()
    for path in folder.glob("*.py"):
        module = importlib.import_module(f"lemo_kernels.{path.stem}") if path.stem != "__init__" else lemo_kernels
        if path.stem != "host" and "on_device(" in path.read_text():
            operators = [value._opoverload for value in vars(module).values() if isinstance(value, CustomOpDef)]
            assert operators
            assert all(torch.Tag.cudagraph_unsafe in found.tags for found in operators), path.stem
            reading.add(path.stem)
    assert reading == {"document_attention", "token_informativeness"}


def test_probes_heed_what_a_kernel_cannot_take():
    with pytest.raises(ValueError, match="at most 64 wide"):
        pattern_predictor.probe(DEVICE, torch.float32, 8, 4, "plain", 200, 4, 4, 4, 6)
