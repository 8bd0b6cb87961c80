"""Updates wider than the residual stream, as float32 norms over 16-bit embeddings make them: with kernels as without."""

import pytest
import torch
from references.kernel_inputs import DEVICE
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lemo_hf.models.documents import find_documents
from lemo_hf.models.kernel_switch import kernel_mode
from lemo_hf.models.row_movement import merge, take
from lemo_hf.models.token_elimination import selection_of_blocks

HIDDEN = 24


def merged(mode: str, norm: nn.Module | None) -> list[torch.Tensor]:
    """The new stream and every gradient of a layer whose sublayers work in float32 on a float16 stream."""
    generator = torch.Generator().manual_seed(3)
    documents = find_documents(1, 20, 4, DEVICE)
    selection = selection_of_blocks(torch.tensor([True, False, True, False, True], device=DEVICE), documents)
    stream = torch.randn(20, HIDDEN, generator=generator).to(DEVICE).half().requires_grad_()
    update = torch.randn(12, HIDDEN, generator=generator).to(DEVICE).requires_grad_()
    rest_update = torch.randn(8, HIDDEN, generator=generator).to(DEVICE)
    with kernel_mode(mode):
        taken = take(stream, selection, norm)
        result = merge(taken, taken.kept, update, None, rest_update, selection)
    assert result.dtype == torch.float32
    weights = torch.randn(result.shape, generator=generator).to(DEVICE)
    return [result, *torch.autograd.grad((result * weights).sum(), (stream, update))]


@pytest.mark.parametrize("norm", [None, "plain"])
def test_the_stream_becomes_as_wide(norm):
    module = None if norm is None else LlamaRMSNorm(HIDDEN).to(DEVICE)
    got, wanted = merged("kernels", module), merged("reference", module)
    for mine, reference in zip(got, wanted, strict=True):
        assert mine.dtype == reference.dtype
        torch.testing.assert_close(mine, reference, rtol=0, atol=0)
    # The sum itself, not one rounded to the stream's float16.
    assert not torch.equal(wanted[0], wanted[0].half().float())
