"""Pushing to a Hub on loopback: what arrives, what is refused, what survives."""

import copy
import hashlib
import json
import logging
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hub_server import READ_TOKEN, HubServer, Repo, hub_client, require_no_token, snapshot
from references.tiny_models import random_tokens
from remote_process import run_remote
from safetensors.torch import load
from tiny_recipe import write_source
from training_runs import RandomText, tiny_arguments, tiny_lemo_model, tiny_trainer
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME

from lemo_hf import AutoLemoModelForCausalLM, LemoTrainingArguments, cli, lemo_callbacks
from lemo_hf.errors import LemoError
from lemo_hf.hub.export import export_run
from lemo_hf.hub.lemo_files import CONFIG_FILE, PREDICTORS_FILE, predictor_tensors
from lemo_hf.hub.model_card import BEGIN
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.training.faults.whole_checkpoints import SEAL_FILE, damage

# huggingface_hub 2.4 hands files to its HTTP client in a way that this deprecates; nothing here can avoid it.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CARD = "README.md"
SPARSE = {"selection": "ratio", "attention_forward": "sparse"}
TOKENS = random_tokens(100, 1)[None]


@pytest.fixture
def hub(monkeypatch):
    """A Hub; the client of this process is logged in as "me"."""
    with HubServer() as server:
        hub_client(monkeypatch, server, server.token)
        yield server
        assert server.unknown == [each for each in server.unknown if each == "GET /api/agent-harnesses"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def run(source):
    ends(["train", source / "recipe.yaml", "--selection", "ratio", "--predictor_documents", "1"])
    return source / "out"


def ends(arguments, code=0):
    with pytest.raises(SystemExit) as end:
        cli.main([str(each) for each in arguments])
    assert end.value.code == code


# lemo export --push.


@pytest.mark.parametrize("kind", ["adapter", "merged", "remote-code"])
def test_what_is_pushed_is_the_folder_private_in_one_commit(kind, hub, run, tmp_path, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    folder = tmp_path / "folder"
    ends(["export", run, "--to", kind, "--output", folder, "--push", f"me/{kind}"])
    repo = hub.repos[f"me/{kind}"]
    assert repo.private
    assert len(repo.commits) == 1
    assert repo.files == snapshot(folder)
    card = repo.files[CARD].decode()
    assert f"# {kind}" in card
    assert f'"me/{kind}"' in card
    assert f"{hub.url}/me/{kind} (private)" in capfd.readouterr().out
    require_no_token(hub, caplog, capfd, tmp_path)

    name = f"me/{kind}"
    if kind == "adapter":
        pulled, local = (AutoLemoModelForCausalLM.from_pretrained(each) for each in (name, str(folder)))
        here, there = (predictor_tensors(sparse_backbone(each)) for each in (local, pulled))
        assert all(torch.equal(here[each], there[each]) for each in here)
    else:
        pulled, local = (AutoModelForCausalLM.from_pretrained(each) for each in (name, folder))
    weights, wanted = pulled.state_dict(), local.state_dict()
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[each], wanted[each]) for each in wanted)


def test_a_pushed_model_is_pulled_saved_and_loaded_again_as_remote_code(hub, run, tmp_path):
    """The pull names the repository in its auto_map ("me/x--module.Class"); what is saved from there must not."""
    folder = export_run(run, "remote-code", tmp_path / "remote-code")
    ends(["export", folder, "--push", "me/pulled"])
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    first, second = run_remote("me/pulled", tmp_path / "process", TOKENS, **environment)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(first["logits"], model.eval()(TOKENS).logits)
    assert all(torch.equal(first[name], second[name]) for name in first)
    saved = tmp_path / "process" / "saved_1"
    auto_map = json.loads((saved / "config.json").read_text())["auto_map"]
    assert auto_map == json.loads((folder / "config.json").read_text())["auto_map"]
    assert {path.name: path.read_bytes() for path in saved.glob("*.py")} == {p.name: p.read_bytes() for p in folder.glob("*.py")}


def test_a_name_without_user_is_the_users_and_public_is_said(hub, run, tmp_path, capsys):
    ends(["export", run, "--to", "adapter", "--output", tmp_path / "out", "--push", "short", "--public"])
    assert hub.repos["me/short"].private is False
    out = capsys.readouterr().out
    assert "me/short (public)" in out
    assert "nobody else can load the adapter" in out


def test_update_replaces_what_an_earlier_export_left(hub, run, tmp_path, capsys):
    hub.repos["me/used"] = Repo(
        private=True, files={"notes.md": b"mine", "model-00001-of-00002.safetensors": b"old", CARD: b"old"}
    )
    arguments = ["export", run, "--to", "adapter", "--push", "me/used", "--output", tmp_path / "out"]
    ends(arguments, code=2)
    assert "name is taken; 'me/used' holds 3 files" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert hub.repos["me/used"].commits == []
    ends([*arguments, "--update"])
    assert hub.repos["me/used"].files == {**snapshot(tmp_path / "out"), "notes.md": b"mine"}


@pytest.mark.parametrize(("private", "flag", "says"), [(False, [], "add --public"), (True, ["--public"], "leave out --public")])
def test_nothing_is_pushed_to_a_repository_of_other_visibility(private, flag, says, hub, run, tmp_path, capsys):
    hub.repos["me/there"] = Repo(private=private)
    ends(["export", run, "--to", "adapter", "--output", tmp_path / "out", "--push", "me/there", *flag], code=2)
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def logged_in_as(token):
    def become(hub, monkeypatch):
        hub_client(monkeypatch, hub, token)

    return become


def answers(route, status):
    return lambda hub, monkeypatch: hub.answers.update({route: status})


def dies_at(route):
    def die(hub, monkeypatch):
        hub.die_at = route

    return die


# Name of the fault: what happens, the repository, whether it comes after the folder has been written, and what is said of it.
FAULTS = {
    "no token": (logged_in_as(None), "me/x", False, "needs a login"),
    "unknown token": (logged_in_as("hf_of_nobody"), "me/x", False, "does not accept the token (401)"),
    "read token": (logged_in_as(READ_TOKEN), "me/x", False, "the token may only read"),
    "not my name": (lambda *_: None, "them/x", True, "the token may not write there (403)"),
    "no name": (lambda *_: None, "me/x y", False, "write USER/NAME"),
    "name taken by then": (answers("create", 409), "me/x", True, "name is taken (409)"),
    "forbidden commit": (answers("commit", 403), "me/x", True, "the token may not write there (403)"),
    "forbidden upload": (answers("upload", 403), "me/x", True, "the token may not write there (403)"),
    "token expires": (answers("batch", 401), "me/x", True, "does not accept the token (401)"),
    "card refused": (answers("validate", 400), "me/x", True, "Invalid metadata in README.md"),
    "down": (answers("whoami", 503), "me/x", False, "the Hub answers 503 (refused: Bearer <token>)"),
    "down at the end": (answers("commit", 500), "me/x", True, "the Hub answers 500 (refused: Bearer <token>)"),
    "gone": (dies_at("whoami"), "me/x", False, "the Hub cannot be reached"),
    "gone at the repository": (dies_at("create"), "me/x", True, "the Hub cannot be reached"),
    "gone at the upload": (dies_at("upload"), "me/x", True, "the Hub cannot be reached"),
    "gone at the commit": (dies_at("commit"), "me/x", True, "the Hub cannot be reached"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda name: name.replace(" ", "-"))
def test_a_push_that_fails_says_so_in_a_line_and_leaves_the_folder_whole(fault, hub, run, tmp_path, monkeypatch, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    happens, name, after, says = FAULTS[fault]
    happens(hub, monkeypatch)
    folder = tmp_path / "out"
    ends(["export", run, "--to", "adapter", "--output", folder, "--push", name], code=2)
    shown = capfd.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("lemo: ") or "Traceback" in line]
    assert len(lines) == 1
    assert says in lines[0]
    assert lines[0].count("; ") >= 2
    assert hub.token not in shown.err + shown.out + caplog.text
    if after:
        export_run(run, "adapter", tmp_path / "alone", repo_id=name)
        assert snapshot(folder) == snapshot(tmp_path / "alone")
        require_no_token(hub, caplog, capfd, tmp_path)
    else:
        assert not folder.exists()
        assert not hub.repos
    assert not any(repo.files for repo in hub.repos.values())


def test_an_upload_goes_on_after_its_connection_dropped(hub, run, tmp_path):
    hub.drop_uploads = [5000, 20000]
    hub.drops["commit"] = 2
    ends(["export", run, "--to", "adapter", "--output", tmp_path / "out", "--push", "me/x"])
    assert hub.drop_uploads == []
    assert hub.repos["me/x"].files == snapshot(tmp_path / "out")
    assert len(hub.repos["me/x"].commits) == 1


def test_pushing_again_sends_only_what_has_not_arrived(hub, run, tmp_path, capsys):
    folder = tmp_path / "out"
    hub.drops["commit"] = 100
    ends(["export", run, "--to", "adapter", "--output", folder, "--push", "me/x"], code=2)
    err = capsys.readouterr().err
    assert f"'{folder}' is complete: go on with `lemo export {folder} --push me/x`" in err
    large = {
        hashlib.sha256(data).hexdigest() for name, data in snapshot(folder).items() if name.endswith((".safetensors", ".png"))
    }
    assert set(hub.objects) == large
    hub.drops.clear()
    sent = hub.requests["upload"]
    ends(["export", folder, "--push", "me/x"])
    assert hub.requests["upload"] == sent
    assert hub.repos["me/x"].files == snapshot(folder)


def test_only_an_exported_folder_is_pushed_as_it_is(hub, run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder in (run, run / "checkpoint-2", tmp_path / "empty"):
        ends(["export", folder, "--push", "me/x"], code=2)
        assert "folder is none that lemo export wrote" in capsys.readouterr().err
    assert not hub.repos


# Trainer's own pushes.


def pushing(folder, hub, strategy="every_save", **changes):
    """Arguments of a run that pushes; the token comes as an argument, from where it could get into files."""
    values = {"hub_strategy": strategy, "hub_model_id": "me/run", "hub_token": hub.token, "hub_always_push": True}
    return {"push_to_hub": True, "save_strategy": "steps", "save_steps": 3, **values, **changes}


STRATEGIES = {
    "end": set(),
    "every_save": set(),
    "checkpoint": {"last-checkpoint"},
    "all_checkpoints": {"checkpoint-3", "checkpoint-6"},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_of_trainer_pushes_predictors_settings_and_our_card(strategy, hub, tmp_path, monkeypatch, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    hub_client(monkeypatch, hub, None)
    trainer = tiny_trainer(tmp_path / "run", SPARSE, **pushing(tmp_path, hub, strategy))
    trainer.train()
    trainer._finish_current_push()
    repo = hub.repos["me/run"]
    assert repo.private
    during = dict(repo.files)
    folders = {name.split("/")[0] for name in during if "/" in name}
    assert folders == STRATEGIES[strategy]
    assert bool(during) == (strategy != "end")
    for place in ["", *(f"{folder}/" for folder in folders)] if during else []:
        for name in ("adapter_model.safetensors", PREDICTORS_FILE, CONFIG_FILE, CARD):
            assert place + name in during
        assert BEGIN in during[place + CARD].decode()
    for folder in folders:
        here = tmp_path / "run" / ("checkpoint-6" if folder == "last-checkpoint" else folder)
        pushed = {name.removeprefix(f"{folder}/"): data for name, data in during.items() if name.startswith(f"{folder}/")}
        assert pushed == snapshot(here)
        assert "lemo_state.json" in pushed

    trainer.push_to_hub(tags=["mine"], license="mit")
    model = trainer.accelerator.unwrap_model(trainer.model)
    predictors = load(repo.files[PREDICTORS_FILE])
    assert all(torch.equal(predictors[name], value) for name, value in predictor_tensors(sparse_backbone(model)).items())
    assert json.loads(repo.files[CONFIG_FILE])["selection"] == "ratio"
    card = repo.files[CARD].decode()
    assert "# run\n" in card
    assert "| Optimizer steps | 6 |" in card
    assert "- mine\n" in card
    assert "license: mit\n" in card
    assert "generated automatically" not in card
    assert json.loads(repo.files["results.json"])["steps"] == 6
    assert "lemo_phases.safetensors" not in during.keys() | repo.files.keys()
    require_no_token(hub, caplog, capfd, tmp_path)
    left = snapshot(tmp_path / "run")
    assert {name: left[name] for name in repo.files if "/" not in name and name in left} == {
        name: data for name, data in repo.files.items() if "/" not in name and name in left
    }


def test_a_pushed_run_is_pulled_as_a_model_that_trains(hub, source, tmp_path):
    out = tmp_path / "out"
    base = tmp_path / "base"
    shutil.copytree(source / "base", base)
    settings = ["--selection", "ratio", "--predictor_documents", "1", "--model", base, "--output_dir", out]
    ends(["train", source / "recipe.yaml", *settings, "--push_to_hub", "true", "--hub_model_id", "me/recipe"])
    repo = hub.repos["me/recipe"]
    assert repo.files == {name: data for name, data in snapshot(out).items() if not name.startswith("checkpoint-")} | {
        name: repo.files[name] for name in repo.files.keys() & {TRAINING_ARGS_NAME}
    }
    for name in ("recipe.yaml", "results.json", CARD):
        assert str(tmp_path).encode() not in repo.files[name]
    assert "Perplexity" in repo.files[CARD].decode()
    pulled = AutoLemoModelForCausalLM.from_pretrained("me/recipe", is_trainable=True)
    local = AutoLemoModelForCausalLM.from_pretrained(out)
    weights = local.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in pulled.state_dict().items())
    assert sparse_backbone(pulled).config.lemo == sparse_backbone(local).config.lemo


class Listing(TrainerCallback):
    """Lists what lies in the run's folder as each push begins: the upload itself reads it at some later time."""

    def __init__(self):
        self.seen = []

    def on_push_begin(self, args, state, control, **kwargs):
        self.seen.append(set(snapshot(Path(args.output_dir))))


def test_the_callbacks_alone_push_predictors_and_settings_too(hub, tmp_path):
    arguments = tiny_arguments(tmp_path / "run", **pushing(tmp_path, hub, "checkpoint"))
    callbacks = [*lemo_callbacks(arguments), Listing()]
    trainer = Trainer(model=tiny_lemo_model(**SPARSE), args=arguments, train_dataset=RandomText(), callbacks=callbacks)
    trainer.train()
    trainer.push_to_hub()
    first, second, last = callbacks[-1].seen
    for step, listed in ((3, first), (6, second)):
        files = {PREDICTORS_FILE, CONFIG_FILE}
        assert files | {f"checkpoint-{step}/{name}" for name in (*files, "lemo_state.json")} <= listed
        assert "lemo_phases.safetensors" not in listed
    assert {PREDICTORS_FILE, CONFIG_FILE} <= last
    files = hub.repos["me/run"].files
    for place in ("", "last-checkpoint/"):
        predictors = load(files[place + PREDICTORS_FILE])
        assert all(torch.equal(predictors[name], value) for name, value in predictor_tensors(trainer.model.model.model).items())


def test_checkpoints_are_pushed_sealed_and_left_alone_afterwards(hub, tmp_path):
    trainer = tiny_trainer(tmp_path / "run", SPARSE, **pushing(tmp_path, hub, "checkpoint"))
    listing = Listing()
    trainer.add_callback(listing)
    trainer.train()
    assert all(f"checkpoint-{step}/{SEAL_FILE}" in seen for step, seen in zip((3, 6), listing.seen, strict=True))
    for layer in sparse_backbone(trainer.model).layers:  # as those of the best step, which is loaded at the end
        for weight in layer.lemo_predictor.parameters():
            weight.data += 1
    trainer.push_to_hub()
    assert damage(tmp_path / "run" / "checkpoint-6") is None


@pytest.mark.parametrize("fault", ["no token", "unknown token"])
def test_training_that_cannot_push_does_not_begin(fault, hub, source, tmp_path, monkeypatch, capsys):
    FAULTS[fault][0](hub, monkeypatch)
    out = tmp_path / "out"
    push = ["--push_to_hub", "true", "--hub_model_id", "me/x"]
    ends(["train", source / "recipe.yaml", "--output_dir", out, *push], code=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lemo: ")]
    assert len(lines) == 1
    assert FAULTS[fault][3] in lines[0]
    assert not out.exists()


def test_a_push_that_fails_in_the_background_is_said_and_training_ends(hub, tmp_path, caplog, capfd):
    hub.answers["commit"] = 403
    trainer = tiny_trainer(tmp_path / "run", SPARSE, **pushing(tmp_path, hub))
    trainer.train()
    trainer._finish_current_push()
    said = [record.message for record in caplog.records if "the token may not write there (403)" in record.message]
    assert len(said) == 2
    assert trainer.state.global_step == 6
    with pytest.raises(LemoError, match=r"the token may not write there \(403\); 'me/run'"):
        trainer.push_to_hub()
    assert {PREDICTORS_FILE, CONFIG_FILE, CARD, "adapter_model.safetensors"} <= snapshot(tmp_path / "run").keys()
    require_no_token(hub, caplog, capfd, tmp_path)


def test_arguments_hold_a_token_and_show_it_nowhere(tmp_path):
    arguments = LemoTrainingArguments(output_dir=str(tmp_path), hub_token="hf_very_secret", use_cpu=True)
    assert arguments.hub_token == "hf_very_secret"
    for shown in (repr(arguments), str(arguments), str(arguments.to_dict()), str(arguments.to_sanitized_dict())):
        assert "hf_very_secret" not in shown
    stored = pickle.dumps(arguments)
    assert b"hf_very_secret" not in stored
    assert pickle.loads(stored).hub_token is None  # noqa: S301 (our own bytes)
    assert copy.copy(arguments).hub_token == copy.deepcopy(arguments).hub_token == "hf_very_secret"
