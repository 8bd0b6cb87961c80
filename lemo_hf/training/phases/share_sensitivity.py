"""What every layer's kept share is worth: the damage to training as one layer's share changes and the others stay as they are.

    sparse form, kept keys    damage = mean loss a token of the training-time forward
    exact form                damage = mean over layers k of 1 - cos(g_k, d_k) ** 2

g_k is the gradient of layer k's trained weights as the shares leave it, d_k the dense one of the same document: the error that is
left when g_k is scaled as well as it can be, since Adam does not see a gradient's scale. A change in layer l reaches the gradients
of l and of all layers below it, by what they receive from l; with shared draws rows that they keep and l does not are hit most.

A document's layer inputs x_0 ... x_L are kept (the prefix), and nothing below a probed layer is run again:

    sparse form, kept keys    the layers above x_l and the head, once for each share probed
    exact form                the forward is the dense one whatever is kept, so the layers above l are not run either, forward or
                              backward: layer l alone runs at the probed share, and what it sends down goes through the graph of
                              the step that made x

With k the kept share, P shares probed in each of L layers, in dense forwards of one document: 3 + k + P (1 + k + k (L - 1) / 2) in
the exact form, of which 3 are the step's forward and the dense gradient, layer by layer; P k' (L + 1) / 2 + k' in the others, k' the
share of a dense forward that the training-time one computes. Memory: a training step at the present shares, every layer's input as
activation checkpointing keeps it, and one dense layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...errors import LemoError
from ...evaluation.layer_scores import backbone_inputs, evaluation_mode
from ...models.segmented_loss import shift_labels
from ...models.sparse_decoder import SparseBatch, sparse_evaluation

# What supported backbones apply to the last layer's output, in their order.
_AFTER_LAYERS = ("norm", "final_layer_norm", "project_out")


class ShareSensitivity:
    """Damage of kept shares on single documents; the model's own lemo block is as before after every call.

    Args:
        model: The model with its head, wrapped by PEFT or not; used in evaluation mode.
        backbone: Its backbone with LeMo.
    """

    def __init__(self, model: Any, backbone: Any) -> None:
        self.model = model
        self.backbone = backbone
        lemo = backbone.config.lemo
        # Thresholds are not found yet, and keep the most informative blocks.
        changes = {"selection": "ratio", "thresholds": None} if lemo.selection == "threshold" else {}
        self._lemo = replace(lemo, **changes)

    @property
    def is_exact(self) -> bool:
        """Whether the damage is a gradient's; it is a loss otherwise."""
        return self._lemo.attention_forward == "exact"

    def measure(
        self, batch: dict[str, Any], shares: list[float], probes: list[list[float]], draw: int
    ) -> tuple[float, list[list[float]], float]:
        """Damage on one document as single layers' shares change.

        Args:
            batch: The collated document, with labels.
            shares: The present share of every layer.
            probes: By layer the shares to try in it.
            draw: Number of the draw, for sampled selection; alike for all shares.

        Returns:
            The damage at the present shares, the damage at every probed one, and the document's weight: 1 in the exact form, its
            labelled tokens in the others, 0 if it has nothing to learn from.
        """
        with evaluation_mode(self.model):
            run = _Run(self, batch, shares, draw)
            if not run.weight:
                return 0.0, [[0.0] * len(of_layer) for of_layer in probes], 0.0
            found = _errors(run, probes) if self.is_exact else _losses(run, probes)
        return *found, 1.0 if self.is_exact else run.weight

    def damage(self, batch: dict[str, Any], candidates: list[list[float]], draw: int) -> tuple[list[float], float]:
        """Damage on one document at whole lists of shares, and the document's weight; arguments as in `measure`."""
        found, dense, weight = [], None, 0.0
        with evaluation_mode(self.model):
            for shares in candidates:
                run = _Run(self, batch, shares, draw)
                if not run.weight:
                    return [0.0] * len(candidates), 0.0
                if self.is_exact:
                    top = run.gradient_at_the_top()
                    dense = run.dense_gradients(top) if dense is None else dense
                    found.append(mean_error(run.gradients(run.hidden[-1], top, len(dense)), dense))
                else:
                    found.append(run.loss(run.hidden[-1]))
                weight = 1.0 if self.is_exact else run.weight
        return found, weight


class _Run:
    """A document's forward at the present shares: every layer's input and, in the exact form, the graph between them."""

    def __init__(self, owner: ShareSensitivity, batch: dict[str, Any], shares: list[float], draw: int) -> None:
        self.backbone = owner.backbone
        self.layers = list(owner.backbone.layers)
        self.weights = [[weight for weight in layer.parameters() if weight.requires_grad] for layer in self.layers]
        self.shares, self._draw, self._lemo = shares, draw, owner._lemo
        self._head = getattr(owner.model, "get_base_model", lambda: owner.model)().get_output_embeddings()
        self._batches: dict[float | None, SparseBatch] = {}
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.hidden: list[Tensor] = []
        device = next(self.backbone.parameters()).device
        self._labels = shift_labels(batch["labels"]).flatten().to(device)
        self.weight = float((self._labels != -100).sum())
        with torch.set_grad_enabled(owner.is_exact), self._watched(), self._with_shares(owner):
            output = self.backbone(**backbone_inputs(batch, device)).last_hidden_state
        if len(self.hidden) <= len(self.layers):  # nothing but padding
            self.weight = 0.0
            return
        with torch.no_grad():
            if not torch.equal(self._after_layers(self.hidden[-1]), output):
                raise LemoError(
                    "share_search does not know what this model does after its last layer; "
                    f"{type(self.backbone).__name__}; leave share_search out and set keep_ratio"
                )

    @contextmanager
    def _with_shares(self, owner: ShareSensitivity) -> Iterator[None]:
        lemo, draw = self.backbone.config.lemo, self.backbone.lemo_draw
        changed = {"keep_ratio": list(self.shares), "selection": self._lemo.selection}
        before = {name: getattr(lemo, name) for name in changed}
        self.backbone.lemo_draw = self._draw
        lemo.update(**changed)
        try:
            with sparse_evaluation(self.backbone):
                yield
        finally:
            lemo.update(**before)
            self.backbone.lemo_draw = draw

    @contextmanager
    def _watched(self) -> Iterator[None]:
        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if "sparse_batch" in kwargs:
                self.hidden.append(args[0])
                self._calls.append((args[1:], kwargs))

        def after(module: Any, args: Any, output: Tensor) -> None:
            self.hidden.append(output)

        hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in self.layers]
        hooks.append(self.layers[-1].register_forward_hook(after))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def layer(self, index: int, hidden: Tensor, share: float | None) -> Tensor:
        """A layer on `hidden` `(batch, seq_len, hidden)` at a share of its own; `None` is the dense layer."""
        args, kwargs = self._calls[index]
        if share not in self._batches:
            documents = kwargs["sparse_batch"].documents
            whole: dict[str, Any] = {"keep_ratio": 1.0, "mlp_keep_ratio": None}
            config = replace(self._lemo, **(whole if share is None else {"keep_ratio": share}))
            self._batches[share] = SparseBatch(documents, config, len(self.layers), self._draw)
        # What a layer chose is remembered, and this one may read another input than the last time.
        self._batches[share].forget(index)
        output: Tensor = self.layers[index](hidden, *args, **{**kwargs, "sparse_batch": self._batches[share]})
        return output

    def _after_layers(self, hidden: Tensor) -> Tensor:
        for name in _AFTER_LAYERS:
            module = getattr(self.backbone, name, None)
            hidden = hidden if module is None else module(hidden)
        return hidden

    def _parts(self, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        size = self._lemo.segment_size
        return zip(hidden.flatten(0, 1).split(size), self._labels.split(size), strict=True)

    def _sum_of_losses(self, rows: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(self._head(self._after_layers(rows)).float(), labels, reduction="sum")

    @torch.no_grad()
    def loss(self, hidden: Tensor) -> float:
        """Mean loss a token from the last layer's output."""
        return sum(self._sum_of_losses(*part).item() for part in self._parts(hidden)) / self.weight

    @torch.enable_grad()
    def gradient_at_the_top(self) -> Tensor:
        """Gradient of that loss in the last layer's output, in segments as training takes it."""
        found = []
        for rows, labels in self._parts(self.hidden[-1].detach()):
            leaf = rows.requires_grad_()
            found.append(torch.autograd.grad(self._sum_of_losses(leaf, labels) / self.weight, leaf)[0])
        return torch.cat(found).view_as(self.hidden[-1])

    @torch.enable_grad()
    def through_layer(self, index: int, share: float | None, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """What a layer at a share makes of the gradient in its output: that in its input, and its weights' as one vector."""
        leaf = self.hidden[index].detach().requires_grad_()
        output = self.layer(index, leaf, share)
        found = torch.autograd.grad(output, [leaf, *self.weights[index]], gradient, allow_unused=True)
        return found[0], _flat(found[1:], self.weights[index])

    def dense_gradients(self, top: Tensor) -> list[Tensor]:
        """The dense gradient of every layer's weights, one layer's graph at a time."""
        found: list[Tensor] = []
        for index in range(len(self.layers) - 1, -1, -1):
            top, gradient = self.through_layer(index, None, top)
            found.insert(0, gradient)
        return found

    def gradients(self, output: Tensor, gradient: Tensor, count: int) -> list[Tensor]:
        """Gradients of the lowest `count` layers' weights at the present shares, from that in their output, `hidden[count]`."""
        weights = [weight for of_layer in self.weights[:count] for weight in of_layer]
        if not weights:
            return [gradient.new_zeros(0)] * count
        found = iter(torch.autograd.grad(output, weights, gradient, retain_graph=True, allow_unused=True))
        return [_flat([next(found) for _ in of_layer], of_layer) for of_layer in self.weights[:count]]

    def down(self, index: int, gradient: Tensor) -> tuple[Tensor | None, Tensor]:
        """`through_layer` at the layer's present share, by the graph that is there."""
        below = [self.hidden[index]] if self.hidden[index].requires_grad else []
        inputs = [*below, *self.weights[index]]
        if not inputs:
            return None, gradient.new_zeros(0)
        found = torch.autograd.grad(self.hidden[index + 1], inputs, gradient, retain_graph=True, allow_unused=True)
        return (found[0] if below else None), _flat(found[len(below) :], self.weights[index])


def _losses(run: _Run, probes: list[list[float]]) -> tuple[float, list[list[float]]]:
    found: list[list[float]] = []
    with torch.no_grad():
        for index, of_layer in enumerate(probes):
            found.append([])
            for share in of_layer:
                hidden = run.layer(index, run.hidden[index], share)
                for above in range(index + 1, len(run.layers)):
                    hidden = run.layer(above, hidden, run.shares[above])
                found[-1].append(run.loss(hidden))
    return run.loss(run.hidden[-1]), found


def _errors(run: _Run, probes: list[list[float]]) -> tuple[float, list[list[float]]]:
    top = run.gradient_at_the_top()
    dense = run.dense_gradients(top)
    gradient: Tensor | None = top
    above: list[Tensor] = []  # gradients of the layers above the probed one, which its share does not change
    found: list[list[float]] = [[] for _ in probes]
    for index in range(len(run.layers) - 1, -1, -1):
        assert gradient is not None, "layers above the lowest trained one pass a gradient on"
        for share in probes[index]:
            sent, own = run.through_layer(index, share, gradient)
            below = run.gradients(run.hidden[index], sent, index) if run.hidden[index].requires_grad else dense[:0]
            below = below or [torch.zeros_like(each) for each in dense[:index]]
            found[index].append(mean_error([*below, own, *above], dense))
        gradient, own = run.down(index, gradient)
        above.insert(0, own)
        if gradient is None:  # nothing is trained below
            above = [*(torch.zeros_like(each) for each in dense[:index]), *above]
            break
    whole = mean_error(above, dense)
    # Below the lowest trained layer no share changes a gradient.
    return whole, [values or [whole] * len(of_layer) for values, of_layer in zip(found, probes, strict=True)]


def mean_error(gradients: list[Tensor], dense: list[Tensor]) -> float:
    """Mean over layers of 1 - cos ** 2; layers whose dense gradient is zero, or that train nothing, do not count."""
    errors = []
    for mine, theirs in zip(gradients, dense, strict=True):
        if theirs.any():
            product = (mine.double() @ theirs.double()).item()
            norms = mine.double().square().sum().item() * theirs.double().square().sum().item()
            errors.append(1 - product**2 / norms if norms else 1.0)
    return sum(errors) / max(len(errors), 1)


def _flat(gradients: Any, weights: list[Tensor]) -> Tensor:
    parts = [
        torch.zeros_like(weight) if gradient is None else gradient for gradient, weight in zip(gradients, weights, strict=True)
    ]
    return torch.cat([part.flatten().float() for part in parts]) if parts else torch.zeros(0)
