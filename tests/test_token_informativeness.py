import pytest
import torch
from references.block_scores import brute_block_scores, brute_informativeness
from references.device_costs import NewStorages

from lemo_hf.models.lemo_config import LemoConfigError
from lemo_hf.models.token_informativeness import block_informativeness, block_scores


def heads(tokens, queries, keys, dim=4, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, queries, dim, generator=generator).to(dtype),
        torch.randn(tokens, keys, dim, generator=generator).to(dtype),
    )


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 31])
def test_scores_equal_brute_force(tokens, queries, keys):
    query, key = heads(tokens, queries, keys)
    got = block_scores(query, key, block_size=8, scale=0.5)
    wanted = torch.tensor(brute_block_scores(query, key, 8, 0.5))
    torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-5, atol=1e-6)
    assert got.shape == (-(-tokens // 8),) * 2


@pytest.mark.parametrize("tokens", [63, 64, 65])
def test_scores_equal_brute_force_around_one_block_of_64(tokens):
    query, key = heads(tokens, 2, 1, dim=2)
    got = block_scores(query, key, block_size=64, scale=0.7)
    torch.testing.assert_close(got, torch.tensor(brute_block_scores(query, key, 64, 0.7)), rtol=1e-5, atol=1e-6)


def test_strips_do_not_show():
    """A long document is scored by strips of queries; the whole matrix at once says the same, ragged end included."""
    query, key = heads(2003, 4, 2, dim=8)
    one_strip = block_scores(query, key, 64, 0.35, chunk_size=4096)
    for chunk_size in (64, 100, 512):
        torch.testing.assert_close(block_scores(query, key, 64, 0.35, chunk_size=chunk_size), one_strip, rtol=1e-5, atol=1e-6)
    # The same by its definition on the whole token matrix, in float64.
    wide = torch.einsum("ihd,jhd->hij", query.double(), key.double().repeat_interleave(2, 1)).mul(0.35).relu().mean(0).tril()
    corner = wide[1984:, :64].max()
    torch.testing.assert_close(one_strip[31, 0].double(), corner, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one_strip[31, 31].double(), wide[1984:, 1984:].max(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [1, 5, 8, 20, 70])
@pytest.mark.parametrize("chunk_size", [8, 24, 128])
def test_pairs_outside_a_window_do_not_count(window, chunk_size):
    query, key = heads(61, 2, 1)
    got = block_scores(query, key, 8, 0.5, window, chunk_size)
    torch.testing.assert_close(got, torch.tensor(brute_block_scores(query, key, 8, 0.5, window)), rtol=1e-5, atol=1e-6)
    if window < 40:
        # A block pair that lies outside scores 0, and still is one of the partners that the divisor counts.
        assert not got[7, :2].any()
        informativeness = block_informativeness(got)
        torch.testing.assert_close(informativeness[0], got[1:, 0].sum() / 7)


def test_later_keys_do_not_count():
    query, key = heads(16, 2, 2)
    key[8:] = 100 * query[:8]
    scores = block_scores(query, key, 8, 1.0)
    assert scores[0, 1] == 0
    torch.testing.assert_close(scores[0, 0], block_scores(query[:8], key[:8], 8, 1.0)[0, 0])


def test_negative_scores_do_not_cancel_positive_ones():
    query = torch.tensor([[[1.0], [1.0]]])
    key = torch.tensor([[[3.0], [-3.0]]])
    assert block_scores(query, key, 1, 1.0).item() == 1.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_scored_in_float32(dtype):
    query, key = heads(20, 4, 2, dtype=dtype)
    scores = block_scores(query, key, 8, 0.5)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, block_scores(query.float(), key.float(), 8, 0.5), rtol=0, atol=0)


def test_float64_stays_float64():
    assert block_scores(*heads(9, 2, 1, dtype=torch.float64), 4, 1.0).dtype == torch.float64


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_informativeness_is_its_formula(blocks):
    scores = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(blocks))
    wanted = brute_informativeness(scores.tril().tolist())
    torch.testing.assert_close(block_informativeness(scores), torch.tensor(wanted))


def test_informativeness_does_not_grow_with_the_document():
    """A threshold means the same at every length: equal scores give equal I at 4 and at 40 blocks, and at every place."""
    for blocks in (4, 40):
        torch.testing.assert_close(block_informativeness(torch.full((blocks, blocks), 0.3)), torch.full((blocks,), 0.3))


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (4, 2), (6, 1)])
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 31])
def test_mean_scores_equal_brute_force(tokens, queries, keys):
    query, key = heads(tokens, queries, keys)
    got = block_scores(query, key, 8, 0.5, reduction="mean")
    torch.testing.assert_close(got, torch.tensor(brute_block_scores(query, key, 8, 0.5, None, "mean")), rtol=1e-5, atol=1e-6)
    assert tokens < 9 or (got < 0).any(), "signed"


@pytest.mark.parametrize("window", [1, 5, 8, 9, 15, 16, 17, 20, 60, 61, 70])
def test_mean_scores_leave_out_pairs_outside_a_window(window):
    query, key = heads(61, 2, 1)
    got = block_scores(query, key, 8, 0.5, window, reduction="mean")
    torch.testing.assert_close(got, torch.tensor(brute_block_scores(query, key, 8, 0.5, window, "mean")), rtol=1e-5, atol=1e-6)


def test_mean_scores_of_narrow_inputs_and_float64():
    query, key = heads(20, 4, 2, dtype=torch.bfloat16)
    got = block_scores(query, key, 8, 0.5, reduction="mean")
    assert got.dtype == torch.float32
    assert torch.equal(got, block_scores(query.float(), key.float(), 8, 0.5, reduction="mean"))
    assert block_scores(*heads(9, 2, 1, dtype=torch.float64), 4, 1.0, reduction="mean").dtype == torch.float64


@pytest.mark.parametrize("window", [None, 20])
def test_mean_scores_copy_neither_all_queries_nor_pairs_of_tokens(window):
    """8 query heads on 2 key heads in 16 bits: the float32 sums of four heads each are all that grows with tokens."""
    query, key = heads(512, 8, 2, dim=32, dtype=torch.float16)
    with NewStorages() as made:
        block_scores(query, key, 16, 0.5, window, reduction="mean")
    assert made.largest == 512 * 2 * 32 * 4 < query.nbytes


def test_an_unknown_reduction_is_named():
    with pytest.raises(LemoConfigError, match="reduction must be one of max, mean; got 'sum'"):
        block_scores(*heads(9, 2, 1), 4, 1.0, reduction="sum")
