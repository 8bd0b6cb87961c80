"""A kept share for every layer, found before the first step by what each share is worth to training (ours).

    predictor -> shares -> calibrate -> sparse -> dense tail

Every layer starts with `keep_ratio`. On some documents the damage is measured that half of it, and half as much again, does in
one layer while the others stay (share_sensitivity.py). The shares of least damage within the budget (share_solver.py) become
`keep_ratio`, if on documents that none was measured on they do less damage than the shares at the start; if not, those stay.

The budget is what the shares at the start cost, in kept blocks, in FLOPs or in bytes of a training step; with `memory_budget` it is
that. Shares are whole blocks of the longest document looked at, so kept blocks come out exactly and the others from below.

As many documents are measured as keep all phases within 5 % of the run's compute, one at least and 16 at most. Several processes
measure one each, and what they found is put together in the order of the documents: all have the same shares, bit for bit.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm
from transformers import TrainerState, TrainingArguments

from ...errors import LemoError
from ...evaluation.layer_scores import backbone_inputs, documents_of
from ...models.lemo_config import shown
from ...models.token_elimination import kept_block_count
from ...profiling.estimate.cards import read_bytes
from ...profiling.estimate.estimator import Estimator
from ..lemo_callback import LemoCallback, by_layer
from ..lemo_run import LemoRun
from ..step_memory import step_settings
from .phase_cost import LARGE_SHARE, PhaseCost, SearchCost, estimate_cost, estimate_search_cost
from .share_sensitivity import ShareSensitivity
from .share_solver import solve_shares

logger = logging.getLogger(__name__)

# Of a layer's share at the start: what is tried.
_TRIED = (0.5, 1.5)
_MOST_DOCUMENTS = 16
# First and last block of a document always stay.
_ALWAYS_KEPT = 2
_MEMORY_ROUNDS = 8


class SharePhase(LemoCallback):
    """Finds the layers' shares before thresholds are set by them, where `share_search` asks for it."""

    begins = "shares"

    def begin(self, args: TrainingArguments, state: TrainerState) -> None:
        run, own = self.run, self.run.args
        if own.share_search is None or "shares" in run.finished:
            return
        self._refuse(args)
        taken = run.take_progress("shares")
        run.phase = "shares"
        began = time.perf_counter()
        blocks = longest_document(run)
        search = ShareSearch(run, blocks)
        if not any(search.probes):
            logger.info("share search skipped: no layer chooses blocks; keep_ratio=%s", shown(run.lemo.keep_ratio))
            run.finished.append("shares")
            run.phase = "calibrate"
            return
        budget = search_budget(run, args, search)
        done = self._measure(search, self._documents(args, state, search) if taken is None else taken[0]["documents"], taken)
        found = search.solve(budget)
        before, after = search.compare(found, done)
        better = after < before
        words = "are taken" if better else "are not taken, those at the start stay"
        logger.info(
            "share search: the shares found %s; damage %.5g, at the start %.5g, on %d documents that they were not found on; %s",
            *(words, after, before, search.checked(done), ", ".join(f"{share:.3g}" for share in found)),
        )
        kept = found if better else search.start
        run.processes.require_same({"shares found": kept}, "see that all run on the same kind of device")
        if better:
            run.lemo.update(keep_ratio=kept, thresholds=None)  # those that the model brings keep other shares
        run.finished.append("shares")
        run.phase = "calibrate"
        run.save_progress("calibrate", {}, {})
        run.report(
            {
                **by_layer("searched_share", kept),
                **by_layer("share_worth", search.worth()),
                "share_damage_before": before,
                "share_damage_after": min(after, before),
                "share_documents": done,
                "share_seconds": time.perf_counter() - began,
            }
        )

    def _refuse(self, args: TrainingArguments) -> None:
        run, own = self.run, self.run.args
        if run.lemo.memory_budget is not None and own.share_search != "memory":
            raise LemoError(
                f"memory_budget is kept by share_search='memory' only; {run.lemo.memory_budget!r}, share_search={own.share_search!r}; "
                "set share_search='memory', or leave one of them out"
            )
        # Layers run by themselves here, and backward: engines that hold parts of their weights would have to follow.
        if isinstance(run.model, FSDPModule) or getattr(args, "deepspeed_plugin", None) is not None:
            raise LemoError(
                f"an engine that shards weights cannot run single layers; share_search={own.share_search!r}; find the shares in a run of "
                "one process and set keep_ratio to them"
            )

    def _documents(self, args: TrainingArguments, state: TrainerState, search: "ShareSearch") -> int:
        run, count = self.run, self.run.processes.count
        samples = state.max_steps * args.train_batch_size * args.gradient_accumulation_steps
        others = run.phase_cost or estimate_cost(run.lemo, len(run.backbone.layers), 0, 0, 0, samples)
        one = estimate_search_cost(run.lemo, len(run.backbone.layers), max(map(len, search.probes)))
        documents = affordable_documents(others, one, count)
        documents = min(documents, *run.processes.gather(run.documents.fitting_count(documents)))
        # Of one process: all share the documents, and the samples.
        rounds = -(-documents // count)
        cost = replace(others, shares=rounds * one.document)
        words = "share search: %d documents, %d probes each; %s"
        level = logging.WARNING if cost.share > LARGE_SHARE else logging.INFO
        fix = "; train for more steps, or leave share_search out" if cost.share > LARGE_SHARE else ""
        logger.log(level, words + fix, documents, sum(map(len, search.probes)), cost)
        return documents

    def _measure(self, search: "ShareSearch", documents: int, taken: Any) -> int:
        run = self.run
        if taken is not None:
            search.restore(taken[0])
        run.save_progress("shares", {"documents": documents, **search.state()}, {})
        with tqdm(total=documents, initial=search.done, desc="shares", unit="doc", disable=not run.shows_progress) as bar:
            while search.done < documents:
                before = search.done
                search.step(documents)
                run.save_progress("shares", {"documents": documents, **search.state()}, {})
                bar.update(search.done - before)
                if run.stop_requested():
                    run.stop.leave(f"after {search.done} of {documents} documents of the share search")
        return documents


def affordable_documents(others: PhaseCost, one: SearchCost, processes: int) -> int:
    """Documents of a search with which all phases together take 5 % of a run; at least 1."""
    room = LARGE_SHARE / (1 - LARGE_SHARE) * others.steps - others.predictor - others.calibrate
    return min(max(int(room // one.document), 1) * processes, _MOST_DOCUMENTS)


def longest_document(run: LemoRun) -> int:
    """Blocks of the longest document that the phases look at.

    Raises:
        LemoError: On every process alike, if it leaves no choice.
    """
    batches = [*run.documents.probes(), *run.documents.profile()]
    found = [documents_of(backbone_inputs(batch, torch.device("cpu")), run.lemo.block_size) for batch in batches]
    blocks = max(run.processes.gather(max((count for each in found for count in each.block_counts), default=0)))
    if blocks <= _ALWAYS_KEPT:
        raise LemoError(
            f"documents are too short to find shares on; the longest of {len(batches)} has {blocks} blocks (block_size="
            f"{run.lemo.block_size}), and the first and last always stay; lower block_size, use longer samples, or leave share_search out"
        )
    return blocks


class ShareSearch:
    """The search of one run.

    Args:
        run: The run; its documents are at hand.
        blocks: Blocks of a document, in which shares are counted.

    Raises:
        LemoError: If the shares at the start leave nothing to take away.
    """

    def __init__(self, run: LemoRun, blocks: int) -> None:
        self._run, self._blocks = run, blocks
        self._sensitivity = ShareSensitivity(run.model, run.backbone)
        lemo, layers = run.lemo, len(run.backbone.layers)
        kept = [kept_block_count(blocks, lemo.ratio_of(layer)) for layer in range(layers)]
        self._chosen = [layer for layer in range(layers) if not replace(lemo, selection="ratio").is_dense(layer, layers)]
        if self._chosen and sum(kept[layer] for layer in self._chosen) <= _ALWAYS_KEPT * len(self._chosen):
            raise LemoError(
                f"the budget is no more than the always-kept blocks need; keep_ratio={shown(lemo.keep_ratio)} of {blocks} blocks, of which "
                f"the first and last always stay; set keep_ratio to {(_ALWAYS_KEPT + 1) / blocks:.2g} or more, or leave share_search out"
            )
        self.start = [count / blocks if layer in self._chosen else lemo.ratio_of(layer) for layer, count in enumerate(kept)]
        self.probes = [self._probes(kept[layer]) if layer in self._chosen else [] for layer in range(layers)]
        self.tried = [sorted({self.start[layer], *self.probes[layer]}) for layer in range(layers)]
        self.done = 0
        # By document: the damage at the start, at every probe, and the weight.
        self._found: list[tuple[float, list[list[float]], float]] = []

    def _probes(self, kept: int) -> list[float]:
        counts = {min(max(round(factor * kept), _ALWAYS_KEPT), self._blocks) for factor in _TRIED} - {kept}
        return [count / self._blocks for count in sorted(counts)]

    def state(self) -> dict[str, Any]:
        """What the next document needs, as JSON types."""
        return {"found": self._found}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from what `state` gave."""
        self._found = [(base, probed, weight) for base, probed, weight in state["found"]]
        self.done = len(self._found)

    def step(self, documents: int) -> None:
        """Measures the next document, or one on each process."""
        place, together, _ = self._run.processes.turn(self.done, documents)
        found = self._sensitivity.measure(self._run.documents.fitting(place), self.start, self.probes, place)
        self._found += self._run.processes.gather(found)[:together]
        self.done += together

    def damages(self) -> list[list[float]]:
        """By layer the mean damage at each share of `tried`."""
        total = max(sum(weight for *_, weight in self._found), 1e-12)
        base = sum(weight * value for value, _, weight in self._found) / total
        result = []
        for layer, (tried, probes) in enumerate(zip(self.tried, self.probes, strict=True)):
            at = dict.fromkeys(tried, base)
            for place, share in enumerate(probes):
                at[share] = sum(weight * probed[layer][place] for _, probed, weight in self._found) / total
            result.append([at[share] for share in tried])
        return result

    def worth(self) -> list[float]:
        """By layer the damage that the largest share tried saves over the smallest; NaN where there is no choice."""
        return [values[0] - values[-1] if len(values) > 1 else float("nan") for values in self.damages()]

    def solve(self, budget: "Budget") -> list[float]:
        """The shares of least damage within the budget, in whole blocks."""

        def within(amount: float) -> list[float]:
            shares = solve_shares(self.tried, self.damages(), budget.costs, amount)
            # One layer may lie between two shares that were tried.
            return [
                int(share * self._blocks + 1e-6) / self._blocks if layer in self._chosen else share
                for layer, share in enumerate(shares)
            ]

        return budget.keep(within)

    def checked(self, documents: int) -> int:
        """Documents that shares are compared on: as many as were measured, of the profile set."""
        return min(documents, min(self._run.processes.gather(len(self._run.documents.profile()))))

    def compare(self, found: list[float], documents: int) -> tuple[float, float]:
        """Damage at the start and at the shares found, on documents that nothing was measured on where there are enough."""
        processes, total = self._run.processes, self.checked(documents)
        sums, weights, done = [0.0, 0.0], 0.0, 0
        profile = self._run.documents.profile()
        while done < total:
            place, together, _ = processes.turn(done, total)
            here = self._sensitivity.damage(profile[place], [self.start, found], place)
            for values, weight in processes.gather(here)[:together]:
                sums = [so_far + weight * value for so_far, value in zip(sums, values, strict=True)]
                weights += weight
            done += together
        return sums[0] / max(weights, 1e-12), sums[1] / max(weights, 1e-12)


class Budget:
    """What shares may cost.

    Args:
        costs: By layer the cost of each share tried.
        amount: What all layers together may cost.
        needed: Measures whole shares in the unit of `limit`, where the sum over layers is not all there is.
        limit: What that may be.
    """

    def __init__(
        self,
        costs: list[list[float]],
        amount: float,
        needed: Callable[[list[float]], float] | None = None,
        limit: float = 0.0,
    ) -> None:
        self.costs, self._amount, self._needed, self._limit = costs, amount, needed, limit

    def keep(self, solve: Callable[[float], list[float]]) -> list[float]:
        """The shares that `solve` finds for an amount, within the limit."""
        amount, found = self._amount, solve(self._amount)
        for _ in range(_MEMORY_ROUNDS if self._needed is not None else 0):
            assert self._needed is not None, "asked above"
            over = self._needed(found) - self._limit
            if over <= 0:
                return found
            amount -= over
            found = solve(amount)
        if self._needed is not None and self._needed(found) > self._limit:
            raise LemoError(
                f"no shares found within the memory; {self._limit / 2**20:.1f} MiB; use share_search='kept_share' or set keep_ratio"
            )
        return found


def search_budget(run: LemoRun, args: TrainingArguments, search: ShareSearch) -> Budget:
    """The budget that `share_search` names.

    Raises:
        LemoError: If a training step cannot be estimated, where it has to be.
    """
    tried, start = search.tried, search.start
    unit = str(run.args.share_search)
    if unit == "kept_share":
        return Budget(tried, sum(start))
    try:
        settings = step_settings(run, args)
    except LemoError as error:
        raise LemoError(f"share_search={unit!r} needs an estimate, {error}; use share_search='kept_share'") from error
    estimator = Estimator(run.backbone.config, on_gpu=args.device.type == "cuda")

    def at(shares: list[float]) -> Any:
        return replace(settings, lemo=replace(run.lemo, keep_ratio=shares))

    columns = []
    for place in range(max(map(len, tried))):
        shares = [of_layer[min(place, len(of_layer) - 1)] for of_layer in tried]
        columns.append([getattr(cost, unit) for cost in estimator.layer_costs(at(shares))])
    # Of shares that cost the same the smaller one is the cheaper.
    costs = [[columns[place][layer] + share for place, share in enumerate(of_layer)] for layer, of_layer in enumerate(tried)]
    amount = sum(cost[of_layer.index(share)] for cost, of_layer, share in zip(costs, tried, start, strict=True))
    if unit == "flops":
        return Budget(costs, amount)

    def needed(shares: list[float]) -> float:
        return float(estimator.estimate(at(shares)).total_bytes)

    whole = needed(start)
    limit = float(read_bytes(run.lemo.memory_budget)) if run.lemo.memory_budget else whole
    return Budget(costs, amount + limit - whole, needed, limit)
