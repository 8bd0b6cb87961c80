"""Kill -9 and signals at set moments of a run: what is resumed ends with the bits of a run that nobody stopped."""

import random
import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from killed_runs import Fault, Killer, limit_files, run_server, send_to_group, send_to_itself

from lemo_hf.training.faults.whole_checkpoints import damage, newest_whole


@pytest.fixture(scope="module")
def context():
    with run_server() as server:
        yield server


def attempt_alone(killer, **changes):
    assert killer.attempt(**changes) == 0, killer.log[-4000:]
    return killer.result()


@pytest.fixture(scope="module")
def straight(context, tmp_path_factory):
    """What a run that nobody stops ends with: its bits, and the events that it comes past."""
    return attempt_alone(Killer(context, tmp_path_factory.mktemp("straight") / "run"))


def finished_alike(killer, straight):
    result = attempt_alone(killer)
    assert result["digest"] == straight["digest"]
    assert result["step"] == straight["step"] == 6


def test_the_events_are_those_of_every_phase(straight):
    """Or the matrix below would not kill where it says."""
    found = set(straight["events"])
    wanted = "predictor document", "calibrate forward", "step forward", "step backward", "optimizer step", "probe", "refit"
    assert found >= {*wanted, "evaluating", "train end", "trained", "half of removing checkpoint-4"}
    files = "lemo_phases.safetensors", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"
    assert found >= {f"half of {name}" for name in files}
    assert found >= {"before lemo_state.json", "before lemo_checkpoint.json", "after lemo_checkpoint.json"}


ACROSS_THE_PHASES = [
    *(("predictor document", 1), ("half of lemo_phases", 1), ("calibrate forward", 3), ("step backward", 1)),
    *(("half of adapter_model", 0), ("half of trainer_state", 0), ("before lemo_checkpoint.json", 0), ("refit", 0)),
    *(
        ("evaluating", 0),
        ("half of removing checkpoint-2", 0),
        ("half of optimizer", 0),
        ("trained", 0),
        ("all of adapter_model", 0),
    ),
]


def test_killed_again_and_again_across_all_phases(context, straight, tmp_path, record_property):
    killer = Killer(context, tmp_path / "run")
    for at, skip in ACROSS_THE_PHASES:
        assert killer.attempt(Fault(at, skip)) == -signal.SIGKILL, (at, killer.log[-4000:])
    finished_alike(killer, straight)
    assert "checkpoint-2 is not whole: trainer_state.json, which is written last, is missing" in killer.log
    assert not list(tmp_path.rglob("*.partial"))
    record_property("kills", len(ACROSS_THE_PHASES))


STOPS = {
    "predictor": ("predictor document", 0, signal.SIGTERM, "after 1 of 3 documents of the predictor phase"),
    "calibrate": ("calibrate forward", 3, signal.SIGUSR1, "where its files stand"),
    "step": ("step forward", 2, signal.SIGTERM, "checkpoint-3"),
    "evaluation": ("evaluating", 0, signal.SIGINT, "checkpoint-3"),
    "saving": ("half of optimizer.pt", 0, signal.SIGTERM, "checkpoint-3"),
    "last step": ("optimizer step", 5, signal.SIGTERM, "checkpoint-6"),
}


# The others are slow: each case is two runs.
QUICK = "step", "optimizer"


def some_quick(cases):
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow, id=name.replace(" ", "-")) for name in cases]


@pytest.mark.parametrize("case", some_quick(STOPS))
def test_a_signal_saves_and_leaves(context, straight, tmp_path, case):
    at, skip, number, where = STOPS[case]
    killer = Killer(context, tmp_path / "run")
    assert killer.attempt(Fault(at, skip, partial(send_to_itself, number))) == 128 + number, killer.log[-4000:]
    said = re.findall(rf"stopped by {number.name}, saved .*; go on with resume_from_checkpoint", killer.log)
    assert len(said) == 1
    assert where in said[0]
    if where.startswith("checkpoint"):
        assert Path(newest_whole(tmp_path / "run")).name == where
    finished_alike(killer, straight)


# Evaluation has one batch: a second worker might not have begun to outlive signals yet.
OF_THE_GROUP = [
    ("step forward", 2, signal.SIGTERM, 2),
    ("step backward", 2, signal.SIGUSR1, 2),
    ("evaluating", 0, signal.SIGINT, 1),
]


def test_a_signal_to_the_whole_process_group_leaves_the_workers_to_their_parent(context, tmp_path):
    changes = {
        "max_steps": 4,
        "dataloader_multiprocessing_context": "fork",
        "predictor_documents": 1,
        "prune_documents": 0,
        "calibrate_rounds": 1,
        "probe_steps": 0,
    }
    ends = {}
    for place, (at, skip, number, workers) in enumerate(OF_THE_GROUP):
        killer = Killer(context, tmp_path / f"run{place}")
        changes["dataloader_num_workers"] = workers
        assert killer.attempt(Fault(at, skip, partial(send_to_group, number)), **changes) == 128 + number, killer.log[-4000:]
        assert killer.log.count("received; saving at the end of this step") == 1
        assert "DataLoader worker" not in killer.log
        assert Path(newest_whole(tmp_path / f"run{place}")).name == "checkpoint-3"
        if workers == 2:
            ends[place] = attempt_alone(killer, **changes)["digest"]
    # Workers change what is drawn, so these compare with each other.
    assert (
        ends[0]
        == ends[1]
        == attempt_alone(Killer(context, tmp_path / "straight"), **changes | {"dataloader_num_workers": 2})["digest"]
    )


def twice(number: int) -> None:
    send_to_itself(number)
    send_to_itself(number)


def test_a_second_interrupt_leaves_at_once_and_a_second_sigterm_does_not(context, tmp_path):
    killer = Killer(context, tmp_path / "run")
    assert killer.attempt(Fault("step forward", 0, partial(twice, signal.SIGINT))) == 1
    assert "KeyboardInterrupt" in killer.log
    assert newest_whole(tmp_path / "run") is None
    assert killer.attempt(Fault("step forward", 0, partial(twice, signal.SIGTERM))) == 143
    assert Path(newest_whole(tmp_path / "run")).name == "checkpoint-1"


# Bytes that a file may have, so that another file is the first not to fit, and what is said.
FULL_DISKS = {
    "phases": ("predictor document", 0, 2000, "progress of the phases could not be written"),
    "first checkpoint": ("step backward", 1, 2000, "checkpoint of step 2 could not be written"),
    "adapter": ("step backward", 3, 2000, "checkpoint of step 4 could not be written"),
    "optimizer": ("half of optimizer.pt", 1, 2000, "checkpoint of step 4 could not be written"),
    "seal": ("all of trainer_state.json", 1, 100, "checkpoint of step 4 could not be written"),
    "model": ("trained", 0, 2000, "model could not be written"),
}


@pytest.mark.parametrize("case", some_quick(FULL_DISKS))
def test_a_full_disk_keeps_the_last_whole_checkpoint(context, straight, tmp_path, case):
    at, skip, size, says = FULL_DISKS[case]
    killer = Killer(context, tmp_path / "run")
    assert killer.attempt(Fault(at, skip, partial(limit_files, size)), save_total_limit=2) == 1
    error = re.findall(r"LemoRunError: (.*)", killer.log)[-1]
    assert error.startswith(says)
    assert f"{tmp_path / 'run'!s}" in error
    assert re.search(r", [\d,]+ bytes free; last whole checkpoint: ", error)
    # Without its seal a checkpoint is whole all the same.
    kept = {"phases": None, "first checkpoint": None, "seal": "checkpoint-4", "model": "checkpoint-6"}.get(case, "checkpoint-2")
    assert (f"{tmp_path / 'run' / kept}" if kept else "none yet") in error
    # Nothing half-written lies there to be resumed from.
    assert all(damage(folder) is None for folder in (tmp_path / "run").glob("checkpoint-*"))
    finished_alike(killer, straight)


# --- The full matrix ---


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_killed_at_every_event(context, straight, tmp_path, record_property, part):
    events = list(enumerate(straight["events"]))[part::10]
    record_property("kills", len(events))
    for number, name in events:
        killer = Killer(context, tmp_path / f"run{number}")
        assert killer.attempt(Fault(number)) == -signal.SIGKILL, (number, name)
        try:
            finished_alike(killer, straight)
        except AssertionError as error:
            raise AssertionError(f"killed at event {number}, {name}: {error}") from error


# Where the ten kills of each phase come; an event that a resumed run comes past again, so that all ten are in the phase.
PHASES = {
    "predictor": ["predictor document", "half of lemo_phases", "all of lemo_phases", "before lemo_phases", "predictor document"],
    "calibrate": ["calibrate forward"] * 3 + ["half of lemo_phases", "before lemo_phases"],
    "sparse": ["step forward", "step backward", "optimizer step", "step forward", "step backward"],
    "dense": ["step forward", "step backward", "optimizer step", "step forward", "step backward"],
    "saving": [
        "half of adapter_model",
        "before lemo_state.json",
        "half of optimizer",
        "half of rng_state",
        "half of trainer_state",
    ],
    "rotating": ["half of removing checkpoint"] * 5,
    "evaluating": ["evaluating"] * 5,
    "probing": ["probe", "refit", "probe", "refit", "refit"],
    "finishing": ["trained", "half of adapter_model", "all of adapter_model", "before lemo_predictors", "before lemo_config"],
}
# The event behind which the phase begins.
REACHED = {
    "calibrate": ("calibrate forward", 0),
    "sparse": ("step forward", 0),
    "dense": ("all of removing checkpoint-2", 0),
    "saving": ("step forward", 3),
    "evaluating": ("step forward", 2),
    "probing": ("step forward", 2),
    "finishing": ("train end", 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_killed_ten_times_in_a_row_in_each_phase(context, straight, tmp_path, record_property, phase):
    killer = Killer(context, tmp_path / "run")
    changes = {}
    if phase == "rotating":  # where a run gets on between the kills: the checkpoint that is saved is whole by then
        changes = {"max_steps": 12, "save_steps": 1}
        straight = attempt_alone(Killer(context, tmp_path / "straight"), **changes)
    if phase in REACHED:
        assert killer.attempt(Fault(*REACHED[phase])) == -signal.SIGKILL, killer.log[-4000:]
    for at in PHASES[phase] * 2:
        assert killer.attempt(Fault(at), **changes) == -signal.SIGKILL, (at, killer.log[-4000:])
    assert attempt_alone(killer, **changes)["digest"] == straight["digest"]
    record_property("kills", 10)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_ten_times_at_any_moment(context, straight, tmp_path, record_property, seed):
    draw = random.Random(seed)
    killer = Killer(context, tmp_path / "run")
    kills = 0
    while kills < 10 and not Path(f"{killer.folder}.json").is_file():
        process = killer.start()
        time.sleep(draw.uniform(0.0, 2.0))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    finished_alike(killer, straight)
    record_property("kills", kills)
