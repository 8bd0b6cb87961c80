"""The arms of the quality bench: what is compared with what, by group, the most telling first.

    python -m benchmarks.quality.arms          (their names, by group)

An arm is one way to train the same adapter on the same rows. Groups, in the order in which a queue should run them:

    core       stock LoRA, LeMo exact at kept shares 0.5 and 0.3: the goals of the bench
    shares     all forms from 0.05 to 0.8; the sparse form once as the paper has it
    patterns   attention patterns among the kept tokens of the sparse form
    choices    ways to choose the blocks, at share 0.5 (and 0.1, where a choice has most to win), beside the uniform shared draw
    tails      the last steps dense, and kept shares that rise or fall over the run
    blocks     block sizes 16 to 128
    nearby     how many nearby tokens kept keys see, and the exact form's gradient
    layers     which layers stay dense, and shares that rise or fall with depth
    parts      attention's share against the MLP's; 0.7 with 0.39, and 1 with 0.22, keep the bytes of 0.5 in both in a Llama-3-8B layer
    adapters   LoRA on all linear layers, stock's and LeMo's
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lemo_hf import LemoConfig
from lemo_hf.errors import LemoError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        name: Unique; result files are called by it.
        group: Its group.
        lemo: Fields of its `LemoConfig`; `None` trains the stock model with the stock trainer.
        choice: A name of `benchmarks.quality.choices`: how blocks are chosen, instead of as `lemo` says.
        targets: Modules that carry adapters.
        tail: Share of the steps, at the end, that keep every token.
        ramp: Kept share at the first and at the last step; linear between them.
        trains: `False` for the base with its context extended and nothing else.
        plain: The arm that differs in nothing but what this one tries.
        training: Further fields of its `LemoTrainingArguments`.
    """

    name: str
    group: str
    lemo: Mapping[str, Any] | None = None
    choice: str | None = None
    targets: tuple[str, ...] = ATTENTION
    tail: float = 0.0
    ramp: tuple[float, float] | None = None
    trains: bool = True
    plain: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_stock(self) -> bool:
        """Whether nothing of LeMo takes part."""
        return self.lemo is None

    @property
    def reference(self) -> str:
        """The stock arm that it is compared with: the one of the same adapters."""
        return "stock" if self.targets == ATTENTION else "stock-all-linear"

    @property
    def config(self) -> LemoConfig | None:
        """Its `LemoConfig`, checked."""
        return None if self.lemo is None else LemoConfig.from_dict(dict(self.lemo))

    @property
    def has_equal_time(self) -> bool:
        """Whether it is measured at equal time: what changes one thing must first be better for it at equal steps."""
        return self.lemo is not None and self.plain is None

    @property
    def has_cost(self) -> bool:
        """Whether its steps cost what the package's would: the bench's own ways to choose cost more than ones made for speed."""
        return self.lemo is not None and self.choice is None and not self.training

    @property
    def depends_on_the_end(self) -> bool:
        """Whether a shorter run is no beginning of a longer one."""
        return self.tail > 0 or self.ramp is not None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self) | {"targets": list(self.targets), "ramp": None if self.ramp is None else list(self.ramp)}


def exact(share: float | list[float], **others: Any) -> dict[str, Any]:
    """The exact form with uniform shared draws at a kept share."""
    return {"attention_forward": "exact", "selection": "sampled", "keep_ratio": share, **others}


def sparse(share: float, **others: Any) -> dict[str, Any]:
    """The sparse form with the most informative blocks by prediction, as `lemo-sparse-nearby` of `lemo bench`: dropped tokens see those
    just before them, scores are means, the first layer is dense.
    """
    form = {"attention_forward": "sparse", "nearby_tokens": 128, "block_reduction": "mean", "predictor_features": 40}
    return {**form, "selection": "ratio", "keep_ratio": share, "dense_layers": [0], **others}


def keys(share: float | list[float], **others: Any) -> dict[str, Any]:
    """Every token attends to the most informative blocks by prediction, and to those just before it."""
    form = {"attention_forward": "kept_keys", "block_reduction": "mean", "predictor_features": 40}
    return {**form, "selection": "ratio", "keep_ratio": share, **others}


# What the paper's sparse form has not.
PAPER = {"nearby_tokens": 0, "block_reduction": "max", "predictor_features": 32}


@dataclass
class _Listed:
    arms: dict[str, Arm] = field(default_factory=dict)

    def add(self, group: str, name: str, lemo: Mapping[str, Any] | None = None, **others: Any) -> None:
        if name in self.arms:
            raise ValueError(f"two arms of one name; {name!r}; name one of them otherwise")
        self.arms[name] = Arm(name, group, lemo, **others)


# Of `benchmarks.quality.choices`, those that are worth a run first.
CHOICES = (
    *("random_by_layer", "true", "stratified", "balanced", "informative_draw", "attention_more", "strided", "predicted"),
    *("column_sum", "mean_over_block", "key_norm", "output_norm", "attention_mass", "informative_draw_reweighted"),
    *(
        "local_and_sink",
        "gradient_norm",
        "random_by_pairs",
        "random_runs",
        "random_stretch",
        "kept_keys_alone",
        "kept_keys_centred",
        "all_key_weights",
    ),
)
PARTS = (
    "attention_all",
    "mlp_all",
    "attention_twice",
    "mlp_more",
    "mlp_activation",
    "mlp_gradient",
    "attention_all_mlp_activation",
)
PATTERNS: dict[str, dict[str, Any]] = {
    "groups": {"attention_pattern": "shifted_groups"},
    "blocks": {"attention_pattern": "block_sparse", "pattern_share": 0.25},
    "blocks-0.5": {"attention_pattern": "block_sparse", "pattern_share": 0.5},
}
# The sparse form: does informativeness pay where dropping changes the forward pass?
SPARSE_CHOICES = ("random_shared", "true", "informative_draw")


def all_arms(layers: int = 6) -> dict[str, Arm]:
    """Every arm by name, in the order of the groups.

    Args:
        layers: Layers of the base, for shares by layer.
    """
    listed = _Listed()
    add = listed.add
    add("core", "stock")
    add("core", "exact-0.5", exact(0.5))
    add("core", "exact-0.3", exact(0.3))
    add("core", "before", trains=False)
    for share in (0.1, 0.2, 0.8, 0.05):
        add("shares", f"exact-{share:g}", exact(share))
    for share in (0.5, 0.3, 0.1, 0.2, 0.8, 0.05):
        add("shares", f"keys-{share:g}", keys(share))
    for share in (0.5, 0.3, 0.8, 0.1, 0.05):
        add("shares", f"sparse-{share:g}", sparse(share))
    add("shares", "sparse-0.5-paper", sparse(0.5, **PAPER))
    for name, pattern in PATTERNS.items():
        add("patterns", f"sparse-0.5-{name}", sparse(0.5, **pattern), plain="sparse-0.5")
    for name in CHOICES:
        add("choices", f"exact-0.5-{name}", exact(0.5), choice=name, plain="exact-0.5")
    for name in SPARSE_CHOICES:
        add("choices", f"sparse-0.5-{name}", sparse(0.5), choice=name, plain="sparse-0.5")
    for name in SPARSE_CHOICES:
        add("choices", f"keys-0.5-{name}", keys(0.5), choice=name, plain="keys-0.5")
    # Shares by measured sensitivity, as many blocks in all.
    for name, form in (("exact-0.5", exact(0.5)), ("sparse-0.5", sparse(0.5))):
        add("choices", f"{name}-searched", form, plain=name, training={"share_search": "kept_share"})
    for name in ("true", "informative_draw", "stratified"):
        add("choices", f"exact-0.1-{name}", exact(0.1), choice=name, plain="exact-0.1")
    # What changes one thing of the kept keys at 0.5, or of another form.
    of_keys: dict[str, Any] = {"plain": "keys-0.5"}
    for tail in (0.15, 0.3):
        add("tails", f"keys-0.5-tail-{tail:g}", keys(0.5), tail=tail)
    add("tails", "sparse-0.5-tail-0.15", sparse(0.5), tail=0.15)
    for first, last in ((0.7, 0.3), (0.3, 0.7)):
        add("tails", f"keys-ramp-{first:g}-{last:g}", keys(0.5), ramp=(first, last))
    for size in (16, 32, 128):
        add("blocks", f"keys-0.5-block-{size}", keys(0.5, block_size=size), **of_keys)
    for width in (64, 1024):
        add("nearby", f"keys-0.5-nearby-{width}", keys(0.5, nearby_tokens=width), **of_keys)
    for width in (0, 256):
        add("nearby", f"exact-0.5-nearby-{width}", exact(0.5, nearby_tokens=width), plain="exact-0.5")
    add("layers", "keys-0.5-dense-last", keys(0.5, dense_layers=[-1]), **of_keys)
    add("layers", "keys-0.5-dense-first", keys(0.5, dense_layers=[0]), **of_keys)
    add("layers", "exact-0.5-dense-last", exact(0.5, dense_layers=[-1]), plain="exact-0.5")
    add("layers", "sparse-0.5-no-dense", sparse(0.5, dense_layers=[]), plain="sparse-0.5")
    add("layers", "sparse-0.5-dense-2", sparse(0.5, dense_layers=[0, 1]), plain="sparse-0.5")
    for first, last in ((0.3, 0.7), (0.7, 0.3)):
        shares = [round(first + (last - first) * layer / max(1, layers - 1), 3) for layer in range(layers)]
        add("layers", f"keys-by-layer-{first:g}-{last:g}", keys(shares), **of_keys)
    for attention, mlp in ((0.7, 0.39), (0.5, 0.25)):
        add("parts", f"keys-{attention:g}-mlp-{mlp:g}", keys(attention, mlp_keep_ratio=mlp), **of_keys)
    add("parts", "exact-1-mlp-0.22", exact(1.0, mlp_keep_ratio=0.22), plain="exact-0.5")
    for name in PARTS:
        add("parts", f"exact-0.5-{name}", exact(0.5), choice=name, plain="exact-0.5")
    add("adapters", "stock-all-linear", targets=ALL_LINEAR)
    for share in (0.5, 0.3):
        add("adapters", f"keys-{share:g}-all-linear", keys(share), targets=ALL_LINEAR)
    add("adapters", "exact-0.5-all-linear", exact(0.5), targets=ALL_LINEAR)
    return listed.arms


def chosen(names: Iterable[str], arms: Mapping[str, Arm]) -> list[Arm]:
    """The arms that `names` ask for, each a group or an arm, in their order and each once.

    Raises:
        LemoError: If there is no such arm.
    """
    groups = list(dict.fromkeys(arm.group for arm in arms.values()))
    found: dict[str, Arm] = {}
    for name in names:
        matching = [arm for arm in arms.values() if name in (arm.name, arm.group)]
        if not matching:
            raise LemoError(f"no such arm; {name!r}; choose groups ({', '.join(groups)}) or arms ({', '.join(arms)})")
        found |= {arm.name: arm for arm in matching}
    return list(found.values())


def main() -> None:
    """Prints the arms."""
    arms = all_arms()
    for group in dict.fromkeys(arm.group for arm in arms.values()):
        print(f"{group}: {', '.join(arm.name for arm in arms.values() if arm.group == group)}")


if __name__ == "__main__":
    main()
