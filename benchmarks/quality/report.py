"""Tables of docs/quality.md from committed results of the quality bench.

A table stands between `<!-- table:NAME -->` and `<!-- /table:NAME -->`; which there are, and of which results, `TABLES` says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.quality.choices import CHOICES
from benchmarks.quality.extension import EQUAL_STEPS, EQUAL_TIME
from benchmarks.quality.noise_scale import STEP_ROWS
from benchmarks.quality.retrieval import TASKS as RETRIEVAL_TASKS
from lemo_hf.errors import LemoError

Results = Sequence[Mapping[str, Any]]
NONE = "Not measured yet."
GROUPS = ("core", "shares", "tails", "blocks", "nearby", "layers", "parts", "adapters")  # those with tables of their own
CORE = ("stock", "exact-0.5", "exact-0.3", "keys-0.5", "keys-0.3")
# What the bench is for: arm, point, measure, unit, the largest difference to stock that is a success; `None`: a loss is no tie.
GOALS = tuple(
    (f"{form}-{share:g}", point, measure, unit, most)
    for form in ("exact", "keys")
    for share, point, measure, unit, most in (
        (0.5, EQUAL_STEPS, "perplexity", "%", 1.0),
        (0.3, EQUAL_STEPS, "perplexity", "%", 1.5),
        (0.5, EQUAL_TIME, "perplexity", "%", -2.0),
        (0.3, EQUAL_TIME, "perplexity", "%", 0.0),
        (0.5, EQUAL_STEPS, "retrieval", "points", None),
        (0.5, EQUAL_STEPS, "retrieval_loss", "nats", None),
    )
)


def source(result: Mapping[str, Any]) -> str:
    """One line that says where figures come from."""
    machine, versions = result["machine"], result["versions"]
    commits = ", ".join(result["commits_of_runs"])
    note = f"{result['note']}; " if "note" in result else ""  # what the code of that day did otherwise
    return f"{note}{result['date']}, runs of commit {commits}, torch {versions['torch']}, {machine.get('gpu') or machine['processor']}."


def difference(found: Mapping[str, Any] | None, unit: str = "%") -> str:
    """A difference for a table: mean, interval, spread over seeds, and whether it is a tie."""
    if found is None:
        return "-"
    text = f"{found['mean']:+.2f} {unit} [{found['low']:+.2f}, {found['high']:+.2f}]"
    text += " one seed" if found["spread"] is None else f" ± {found['spread']:.2f}"
    return f"{text}, tie" if found["is_tie"] else text


def number(found: Mapping[str, Any] | None, digits: int = 3) -> str:
    """A mean with its spread over seeds."""
    if found is None:
        return "-"
    return f"{found['mean']:.{digits}f}" + ("" if found["spread"] is None else f" ± {found['spread']:.{digits}f}")


def settings_of(results: Results) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Every result with each of its settings, those of the most runs first."""
    for result in results:
        for setting in sorted(result["settings"].values(), key=lambda each: -runs_in(each)):
            yield result, setting


def runs_in(setting: Mapping[str, Any]) -> int:
    """Runs of a setting: one an arm and seed."""
    return sum(len(arm["seeds"]) for arm in setting["arms"].values())


def main_settings(results: Results) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Of each result, text and number of steps the setting of the most runs; other rates and schedules have a table of their own."""
    shown = set()
    for result, setting in settings_of(results):
        of = (id(result), *(setting["setting"][name] for name in ("steps", "tokens", "text", "accumulation")))
        if of not in shown:
            shown.add(of)
            yield result, setting


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; the first column to the left, the others to the right."""
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def steps_of(setting: Mapping[str, Any]) -> str:
    """Steps and, where they are several, the rows of a step."""
    rows = setting["accumulation"]
    return f"{setting['steps']} steps" + ("" if rows == 1 else f" of {rows} rows")


def of_setting(result: Mapping[str, Any], setting: Mapping[str, Any]) -> str:
    """What a table's figures were made with."""
    of, seeds = setting["setting"], max(len(arm["seeds"]) for arm in setting["arms"].values())
    return (
        f"{of['text']}, {of['tokens']} tokens, base {Path(of['base']).name}, {steps_of(of)} of stock, {of['schedule']} rate {of['learning_rate']:g}, "
        f"LoRA r={of['rank']}, {'bfloat16 autocast' if of['mixed'] else 'float32'}, up to {seeds} seeds; {source(result)}"
    )


def cost_cells(arm: Mapping[str, Any]) -> list[str]:
    """Saved bytes, FLOPs and step time as shares of stock's."""
    cost = arm["cost"]
    if cost is None:
        return ["1", "1", "1"] if arm["arm"]["lemo"] is None and arm["arm"]["trains"] else ["-", "-", "-"]
    ratios = (cost["saved_bytes"] / cost["stock_saved_bytes"], cost["flops"] / cost["stock_flops"], cost["mean_time_ratio"])
    return [f"{ratio:.2f}" for ratio in ratios]


def arm_row(name: str, arm: Mapping[str, Any]) -> list[str]:
    """An arm's row of the tables by group."""
    steps, time = (arm["points"].get(point) for point in (EQUAL_STEPS, EQUAL_TIME))
    cells = [name, str(len(arm["seeds"])), *cost_cells(arm)]
    for point in (steps, time):
        cells.append("-" if point is None else number(point["perplexity"]))
        cells.append("-" if point is None or name.startswith("stock") else difference(point["versus_stock"].get("perplexity")))
    cells[-2] += "" if time is None else f" ({time['steps']:.0f} steps)"
    return cells


GROUP_HEAD = (
    *("arm", "seeds", "saved bytes", "FLOPs", "step time", "perplexity, equal steps", "against stock"),
    *("perplexity, equal time", "against stock"),
)


def group_table(group: str) -> Callable[[Results], str]:
    """The table of a group of arms, one per setting that has any of it, beside the stock arm."""

    def render(results: Results) -> str:
        parts = []
        for result, setting in main_settings(results):
            names = [arm["arm"]["name"] for arm in setting["arms"].values() if arm["arm"]["group"] == group]
            if names:
                shown = ["stock"] * ("stock" in setting["arms"] and "stock" not in names) + names
                parts.append(f"{arms_table([setting['arms'][name] for name in shown])}\n\n{of_setting(result, setting)}")
        return "\n\n".join(parts) or NONE

    return render


def arms_table(arms: Sequence[Mapping[str, Any]]) -> str:
    """Arms of a setting with their costs: beside the form that they change one thing of where there is one, else at equal time too."""
    rows, plain = [arm_row(arm["arm"]["name"], arm) for arm in arms], [arm["arm"]["plain"] for arm in arms]
    if not any(plain):
        return table(GROUP_HEAD, rows)
    for row, arm, of in zip(rows, arms, plain, strict=True):
        own = arm["points"].get(EQUAL_STEPS, {}).get("versus_plain")
        row[-2:] = [of or "-", difference(own), verdict(own)]
    return table((*GROUP_HEAD[:-2], "changes", "against that, equal steps", "verdict"), rows)


def verdict(found: Mapping[str, Any] | None) -> str:
    """A difference in a word."""
    if found is None:
        return "-"
    word = "tie" if found["is_tie"] else "better" if found["mean"] < 0 else "worse"
    return f"{word}, one seed" if found["spread"] is None and word != "tie" else word


def choices_table(results: Results) -> str:
    """Ways to choose blocks and shares at equal steps, against stock and against the form's own way at the same share."""
    parts = []
    for result, setting in main_settings(results):
        rows = []
        for name, arm in setting["arms"].items():
            point = arm["points"].get(EQUAL_STEPS)
            if arm["arm"]["group"] != "choices" or point is None:
                continue
            own, choice = point.get("versus_plain"), arm["arm"]["choice"]
            about = [
                name,
                "layers' shares by `share_search`" if choice is None else CHOICES[choice].title,
                str(len(arm["seeds"])),
            ]
            rows.append([*about, difference(point["versus_stock"].get("perplexity")), difference(own), verdict(own)])
        if rows:
            head = ("arm", "choice", "seeds", "against stock, equal steps", "against the form's own choice", "verdict")
            parts.append(f"{table(head, rows)}\n\n{of_setting(result, setting)}")
    return "\n\n".join(parts) or NONE


def patterns_table(results: Results) -> str:
    """Attention patterns at equal steps, against stock and against the sparse form without one."""
    parts = []
    for result, setting in main_settings(results):
        rows = []
        for name, arm in setting["arms"].items():
            point = arm["points"].get(EQUAL_STEPS)
            if point is not None and (arm["arm"]["group"] == "patterns" or name == "sparse-0.5"):
                plain = point.get("versus_plain")
                about = [name, str(len(arm["seeds"])), *cost_cells(arm), number(point["perplexity"])]
                rows.append([*about, difference(point["versus_stock"].get("perplexity")), difference(plain), verdict(plain)])
        if len(rows) > 1:
            head = (
                *("arm", "seeds", "saved bytes", "FLOPs", "step time", "perplexity", "against stock"),
                *("against no pattern (goal: at most +0.5 %)", "verdict"),
            )
            parts.append(f"{table(head, rows)}\n\n{of_setting(result, setting)}")
    return "\n\n".join(parts) or NONE


def positions_table(results: Results) -> str:
    """Perplexity by stretch, and what far context is worth."""
    parts = []
    for result, setting in main_settings(results):
        quarter = setting["setting"]["tokens"] // 4
        names = [f"{quarter * part // 1024}-{quarter * (part + 1) // 1024}K" for part in range(4)]
        rows = []
        for name in ("before", *CORE):
            arm = setting["arms"].get(name)
            for point, found in (arm["points"] if arm else {}).items():
                far = found["far_context"]
                gain = ", ".join(f"{each['percent']:+.1f} % [{each['low']:+.1f}, {each['high']:+.1f}]" for each in far)
                rows.append([f"{name}, {point.replace('_', ' ')}", *(number(each, 2) for each in found["by_stretch"]), gain])
        if rows:
            head = ("arm", *names, f"last stretch, far context against {quarter // 2}-{quarter} tokens, by seed")
            parts.append(f"{table(head, rows)}\n\n{of_setting(result, setting)}")
    return "\n\n".join(parts) or NONE


def retrieval_table(results: Results) -> str:
    """Retrieval and repositories of the main arms."""
    parts = []
    for result, setting in main_settings(results):
        rows = []
        for name in ("before", *CORE, "sparse-0.5"):
            arm = setting["arms"].get(name)
            for point, found in (arm["points"] if arm else {}).items():
                scores, versus = found.get("retrieval"), found["versus_stock"]
                if scores is None:
                    continue
                tasks = [f"{scores[task]:.2f}" for task in RETRIEVAL_TASKS]
                stock = name == "stock"
                rows.append(
                    [
                        f"{name}, {point.replace('_', ' ')}",
                        str(scores["questions"]),
                        *tasks,
                        f"{scores['accuracy']:.3f}",
                        "-" if stock else difference(versus.get("retrieval"), "points"),
                        "-" if stock else difference(versus.get("retrieval_loss"), "nats"),
                        number(found.get("repositories"), 2),
                        "-" if stock else difference(versus.get("repositories")),
                    ]
                )
        if rows:
            head = (
                *("arm", "questions", "passkey", "key-value", "variable tracking", "all", "against stock"),
                *("loss of the answers", "perplexity of imported names", "against stock"),
            )
            parts.append(f"{table(head, rows)}\n\n{of_setting(result, setting)}")
    return "\n\n".join(parts) or NONE


def goals_table(results: Results) -> str:
    """The bench's goals, and whether they are met, in every setting that says something of them."""
    rows = []
    for result, setting in main_settings(results):
        for arm, point, measure, unit, most in GOALS:
            found = setting["arms"].get(arm, {}).get("points", {}).get(point, {}).get("versus_stock", {}).get(measure)
            if found is None:
                continue
            if most is None:
                # More right answers are better, more nats are not.
                goal, met = "no loss", found["is_tie"] or (found["mean"] > 0) == (measure == "retrieval")
            elif most == 0:
                goal, met = "lower", found["mean"] < 0 and not found["is_tie"]
            else:
                goal, met = f"at most {most:+.1f} {unit}", found["mean"] <= most
            word = "missed" if not met else "met by the mean" if most and found["high"] > most else "met"
            if most is None and found["is_tie"]:
                word = "none shown"  # an interval of a few questions may hide one
            if found["spread"] is None:
                word += ", one seed"
            name = f"{arm}, {point.replace('_', ' ')}, {measure.replace('_loss', ', loss of the answers')}"
            about = setting["setting"]
            of = f"{about['text']}, base {Path(about['base']).name}, {steps_of(about)}, {about['schedule']} rate, {result['machine'].get('gpu') or 'CPU'}"
            of += f"; {result['note']}" if "note" in result else ""
            rows.append([name, of, goal, difference(found, unit), word])
    return table(("goal", "setting", "against stock", "measured", ""), rows) if rows else NONE


def settings_table(results: Results) -> str:
    """Stock and the exact form by rate and schedule."""
    rows = []
    for result, setting in settings_of(results):
        of = setting["setting"]
        base = f"{Path(of['base']).name}{', ' + result['note'] if 'note' in result else ''}"
        for name in ("stock", "exact-0.5"):
            arm = setting["arms"].get(name)
            if arm is not None:
                point = arm["points"][EQUAL_STEPS]
                about = [
                    name,
                    of["text"],
                    base,
                    f"{of['schedule']} {of['learning_rate']:g}",
                    steps_of(of),
                    str(len(arm["seeds"])),
                ]
                versus = "-" if name == "stock" else difference(point["versus_stock"].get("perplexity"))
                rows.append([*about, number(point["perplexity"]), versus])
    head = ("arm", "text", "base", "rate", "steps", "seeds", "perplexity", "against stock of the same rate")
    return table(head, sorted(rows, key=lambda row: (row[2], row[1], row[0] != "stock", row[4], row[3]))) if rows else NONE


def with_error(found: Sequence[float], digits: int = 2) -> str:
    """A value and its standard error."""
    return f"{found[0]:.{digits}f} ± {found[1]:.{digits}f}"


def batch_table(results: Results, noise: Mapping[str, Any] | None) -> str:
    """Rows of a step: steps that a form needs by its gradient's noise, and what runs showed."""
    rows = []
    for _, setting in main_settings(results) if noise is not None else ():
        of = setting["setting"]
        forms = noise["texts"].get(of["text"], {})
        for name, arm in setting["arms"].items():
            needed = forms.get(name, {}).get("steps", {}).get(str(of["accumulation"]))
            if needed is None or EQUAL_TIME not in arm["points"]:
                continue
            steps, time = (arm["points"][point]["versus_stock"].get("perplexity") for point in (EQUAL_STEPS, EQUAL_TIME))
            about = [of["text"], str(of["accumulation"]), str(of["steps"]), name, str(len(arm["seeds"]))]
            affordable = f"{1 / arm['cost']['mean_time_ratio']:.2f}"
            rows.append([*about, with_error(needed), affordable, difference(steps), difference(time)])
    head = (
        *(
            "text",
            "rows of a step",
            "stock's steps",
            "arm",
            "seeds",
            "steps needed for one of stock's",
            "steps in the time of one",
        ),
        *("against stock, equal steps", "equal time"),
    )
    return table(head, sorted(rows, key=lambda row: (row[0], int(row[1]), int(row[2]), row[3]))) if rows else NONE


def noise_table(_: Results, noise: Mapping[str, Any] | None) -> str:
    """Bias and noise of the forms' gradients, by text."""
    if noise is None:
        return NONE
    rows = []
    for text, forms in noise["texts"].items():
        for name, form in forms.items():
            own = ["0"] if name == "stock" else [with_error(form["bias"])]
            needed = ["1" if name == "stock" else with_error(each) for each in form["steps"].values()]
            rows.append([text, name, *own, with_error(form["noise"], 1), *needed])
    head = ("text", "arm", "bias", "noise, rows", *(f"steps needed for one of stock's, B = {count}" for count in STEP_ROWS))
    of = noise["config"]
    return (
        f"{table(head, rows)}\n\n{of['rows']} rows of {of['tokens']} tokens, base {of['base']}, {of['dtype']}; {noise['date']}."
    )


TABLES: dict[str, Callable[[Results], str]] = {
    "quality_goals": goals_table,
    "quality_positions": positions_table,
    "quality_retrieval": retrieval_table,
    "quality_choices": choices_table,
    "quality_patterns": patterns_table,
    "quality_settings": settings_table,
    **{f"quality_{group}": group_table(group) for group in GROUPS},
}


# Those that read the result of `noise_scale.py` too.
NOISE_TABLES = {"quality_noise": noise_table, "quality_batch": batch_table}


def updated_page(text: str, results: Results, noise: Mapping[str, Any] | None = None, *, needs_all: bool = True) -> str:
    """The page with every table rendered anew.

    Args:
        text: The page.
        results: Committed results of the extension.
        noise: That of `noise_scale.py`.
        needs_all: Whether every table has a place in it; otherwise those that have one are rendered.

    Raises:
        LemoError: If a table has no place in a page that needs it, or several.
    """
    renderers = TABLES | {name: partial(render, noise=noise) for name, render in NOISE_TABLES.items()}
    for name, render in renderers.items():
        marked = re.compile(rf"(<!-- table:{name} -->\n).*?(<!-- /table:{name} -->)", re.DOTALL)
        places = len(marked.findall(text))
        if places > 1 or (needs_all and not places):
            raise LemoError(f"page has {places} places for table {name}; it needs 1; add <!-- table:{name} --> markers")
        if places:
            rendered = render(results)
            text = marked.sub(lambda match, rendered=rendered: f"{match[1]}{rendered}\n{match[2]}", text)
    return text
