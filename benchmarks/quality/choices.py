"""Every way to choose blocks that the quality bench compares, each under a name.

    with chosen_by(model, "strided"):
        model(**batch).loss.backward()

A choice ranks the blocks of every document in every layer (`block_rankings.py`), and the best `kept_block_count` of them are
kept, first and last among them, as the package does: so all choices keep the same number. Some are `LemoConfig` fields of the
package; the others replace the layers' `choose` while the context lasts. Those that restrict the gradient in a way the package
has no form for replace the layers' `sparse_forward` by `restricted_layer.py`: their gradient is right, their bytes and time are
not.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality import block_rankings as ranked
from benchmarks.quality.block_rankings import RUN, Ranking, Situation
from benchmarks.quality.gradient_oracle import row_gradient_norms
from benchmarks.quality.restricted_layer import Restriction, attend_nearby, restricted_forward
from lemo_hf.models.sparse_decoder import SparseBatch, sparse_backbone
from lemo_hf.models.token_elimination import Selection, choose_blocks

# Rows before a query that a dropped token sees where it gets local attention.
NEARBY = 128


@dataclass(frozen=True)
class Choice:
    """A way to choose blocks, or to restrict the gradient.

    Args:
        title: What tables call it.
        ranking: Scores of every document's blocks, whose best are kept; `None` leaves choosing to the package.
        lemo: `LemoConfig` fields that it sets.
        attention_factor, mlp_factor: Share of blocks that attention and MLP keep, in shares of `keep_ratio`, 1 at most.
        mlp: Which rows the MLP keeps: those of the best blocks by the same scores, or the best rows by `"activation"` or
            `"gradient"` norm.
        keys: As in `Restriction`.
        reweighted: Whether a kept row's branches are entered with one over its chance to be kept.
        nearby: Whether dropped tokens of the sparse form get local attention without gradient.
    """

    title: str
    ranking: Ranking | None = None
    lemo: dict[str, Any] = field(default_factory=dict)
    attention_factor: float = 1.0
    mlp_factor: float = 1.0
    mlp: str = "blocks"
    keys: str = "all"
    reweighted: bool = False
    nearby: bool = False

    @property
    def is_emulated(self) -> bool:
        """Whether the gradient is right and bytes and time are not."""
        plain = (self.attention_factor, self.mlp_factor, self.mlp, self.keys) == (1.0, 1.0, "blocks", "all")
        return not plain or self.reweighted or self.nearby

    @property
    def needs_oracle(self) -> bool:
        """Whether it looks at the dense gradient, which no training step knows."""
        return self.ranking is ranked.gradient_norm or self.mlp == "gradient"


_ALL = 1e9
_RATIO = {"selection": "ratio"}
_DRAWN = {"selection": "sampled", "sampling_temperature": None}
CHOICES = {
    "random_shared": Choice("uniform, all layers alike", lemo={**_DRAWN, "draws": "shared"}),
    "random_by_layer": Choice("uniform, each layer its own", lemo={**_DRAWN, "draws": "by_layer"}),
    "random_by_pairs": Choice("uniform, pairs of layers alike", ranked.drawn_by_pairs_of_layers),
    "random_runs": Choice(f"uniform, runs of {RUN} blocks", ranked.in_runs),
    "random_stretch": Choice("one drawn stretch", ranked.one_stretch),
    "stratified": Choice("one of each stretch", ranked.stratified),
    "balanced": Choice("every place equally often", ranked.balanced),
    "true": Choice("most informative, true scores", lemo={**_RATIO, "score_source": "true"}),
    "predicted": Choice("most informative, predicted", lemo={**_RATIO, "score_source": "predicted"}),
    "column_sum": Choice("paper's column sum alone", ranked.column_sum),
    "mean_over_block": Choice("mean over block pairs, not maximum", ranked.mean_over_block),
    "key_norm": Choice("key norm", ranked.key_norm),
    "output_norm": Choice("attention output norm (finished forward)", ranked.output_norm),
    "attention_mass": Choice("attention received (finished forward)", ranked.attention_mass),
    "gradient_norm": Choice("gradient norm (oracle)", ranked.gradient_norm),
    "strided": Choice("strided", ranked.strided),
    "local_and_sink": Choice("last blocks and first", ranked.local_and_sink),
    "informative_draw": Choice("drawn by informativeness, true scores", lambda at: ranked.informative_draw(at)[0]),
    "informative_draw_reweighted": Choice("the same, reweighted", lambda at: ranked.informative_draw(at)[0], reweighted=True),
    "kept_keys_alone": Choice("kept queries see kept keys alone in backward", keys="kept"),
    "kept_keys_centred": Choice("the same, these less their mean", keys="centred"),
    "all_key_weights": Choice("weight gradients of all keys too", keys="weights"),
    "attention_more": Choice("attention 1.4 r, MLP 0.775 r", attention_factor=1.4, mlp_factor=0.775),
    "attention_twice": Choice("attention 2 r, MLP 0.44 r", attention_factor=2.0, mlp_factor=0.4375),
    "mlp_more": Choice("attention 0.7 r, MLP 1.17 r", attention_factor=0.7, mlp_factor=1.16875),
    "attention_all": Choice("attention everything, MLP r", attention_factor=_ALL),
    "mlp_all": Choice("attention r, MLP everything", mlp_factor=_ALL),
    "mlp_activation": Choice("MLP rows by activation norm", mlp="activation"),
    "mlp_gradient": Choice("MLP rows by gradient norm (oracle)", mlp="gradient"),
    "attention_all_mlp_activation": Choice(
        "attention everything, MLP by activation norm", attention_factor=_ALL, mlp="activation"
    ),
    "attention_all_mlp_gradient": Choice("attention everything, MLP by gradient norm", attention_factor=_ALL, mlp="gradient"),
    "sparse_nearby": Choice(f"sparse form, dropped tokens see {NEARBY} tokens", nearby=True),
}
"""Every choice by name. Factors of attention and MLP keep the bytes of a Llama-3-8B layer: 4.5 and 8 rows of H per kept token."""


@contextmanager
def chosen_by(model: Any, name: str) -> Iterator[Choice]:
    """Makes a LeMo model choose its blocks by a named choice, at the shares and in the attention form that its config says.

    Args:
        model: A LeMo model, adapted or not.
        name: A key of `CHOICES`.

    Raises:
        ValueError: If there is no such choice, or the model's attention form is not the one that it is for.
    """
    if name not in CHOICES:
        raise ValueError(f"no choice is called so; got {name!r}; take one of {', '.join(CHOICES)}")
    choice, backbone = CHOICES[name], sparse_backbone(model)
    lemo = backbone.config.lemo
    if choice.is_emulated and choice.nearby != (lemo.attention_forward == "sparse"):
        raise ValueError(
            f"{name} is for the other attention form; got attention_forward={lemo.attention_forward!r}; load the model with the other"
        )
    # A ranking of ours asks the package for no scores, and for the number of each draw.
    fields = _DRAWN if choice.ranking is not None else choice.lemo
    before = {key: getattr(lemo, key) for key in fields}
    oracle: dict[str, list[Tensor]] = {}
    handles = []
    lemo.update(**fields)
    if choice.needs_oracle:
        handles.append(model.register_forward_pre_hook(partial(row_gradient_norms, oracle), with_kwargs=True))
    for layer in backbone.layers:
        if choice.ranking is not None:
            layer.choose = partial(_choose, layer, choice, oracle)
        if choice.is_emulated:
            layer.sparse_forward = partial(_restricted, layer, choice, oracle)
    try:
        yield choice
    finally:
        lemo.update(**before)
        for handle in handles:
            handle.remove()
        for layer in backbone.layers:
            # What the instance no longer has is the class's again.
            layer.__dict__.pop("choose", None)
            layer.__dict__.pop("sparse_forward", None)


@torch.no_grad()
def _choose(
    layer: Any, choice: Choice, oracle: dict[str, list[Tensor]], residual: Tensor, rotary: tuple[Tensor, ...], batch: SparseBatch
) -> Selection:
    """Stands in for a layer's `choose`; a layer that is run again finds what its first run chose."""
    if batch.keeps_everything or batch.config.is_dense(layer.layer_idx, batch.num_layers):
        return type(layer).choose(layer, residual, rotary, batch)
    if layer.layer_idx not in batch.selections:
        assert choice.ranking is not None
        scores = choice.ranking(Situation(layer, residual, rotary, batch, oracle))
        config = replace(batch.config, selection="ratio")
        batch.selections[layer.layer_idx] = choose_blocks(scores, batch.documents, config, layer.layer_idx, batch.draw)
    return batch.selections[layer.layer_idx]


def _restricted(
    layer: Any, choice: Choice, oracle: dict[str, list[Tensor]], hidden: Tensor, rotary: tuple[Tensor, ...], batch: SparseBatch
) -> Tensor:
    """Stands in for a layer's `sparse_forward`."""
    if batch.keeps_everything or batch.config.is_dense(layer.layer_idx, batch.num_layers):
        return type(layer).sparse_forward(layer, hidden, rotary, batch)
    residual, flat_rotary, documents = hidden.flatten(0, 1), batch.flat_rotary(rotary), batch.documents
    selection = layer.choose(residual, flat_rotary, batch)
    if choice.nearby:
        return attend_nearby(layer, residual, flat_rotary, documents, selection, NEARBY).view_as(hidden)
    at = Situation(layer, residual, flat_rotary, batch, oracle)
    attention = _at_share(at, choice.attention_factor)
    weights = None
    if choice.reweighted:
        chances = torch.cat(ranked.informative_draw(at)[1])
        weights = (1 / chances)[documents.block_of_row]
    mlp: Tensor | Callable[[Tensor], Tensor]
    if choice.mlp == "blocks":
        mlp = _at_share(at, choice.mlp_factor).kept_blocks[documents.block_of_row]
    elif choice.mlp == "gradient":
        mlp = _best_rows(at, oracle["mlp"][at.number])
    else:
        mlp = lambda middle: _best_rows(at, ranked.activation_norm(at, middle))  # noqa: E731
    given = Restriction(attention, mlp, choice.keys, weights, weights)
    return restricted_forward(layer, residual, flat_rotary, documents, given).view_as(hidden)


def _at_share(at: Situation, factor: float) -> Selection:
    """What the layer chooses at `factor` times its share; shared draws of one step are then nested."""
    if factor == 1:
        return at.batch.selections[at.number]
    share = min(1.0, factor * at.config.ratio_of(at.number))
    config = replace(at.config, keep_ratio=share)
    scores = None
    if config.needs_scores:
        scores = at.layer.informativeness(at.residual, at.rotary, at.batch)
    return choose_blocks(scores, at.documents, config, at.number, at.batch.draw)


def _best_rows(at: Situation, norms: Tensor) -> Tensor:
    """Marks as many rows of each document as the layer's blocks have, those of the largest norms, `(rows,)` bool."""
    kept = torch.zeros(len(norms), dtype=torch.bool)
    first = 0
    for length, count in zip(at.documents.lengths, at.batch.selections[at.number].kept_lengths, strict=True):
        kept[first + norms[first : first + length].topk(count).indices] = True
        first += length
    return kept
