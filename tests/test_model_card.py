import builtins
import json
import logging
import re
import sys

import pytest
import torch
import update_model_cards
from card_results import ROPE, STOCK, results
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lemo_hf.errors import LemoError
from lemo_hf.evaluation.perplexity import Perplexity
from lemo_hf.hub.lemo_files import write_json
from lemo_hf.hub.model_card import (
    BEGIN,
    END,
    PLOT_FILE,
    Interval,
    RunResults,
    render_card,
    write_model_card,
)
from lemo_hf.models.lemo_config import LemoConfig

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT reads it

KINDS = ("adapter", "merged", "remote-code")


def test_numbers_are_those_of_the_results():
    text = render_card(results(), "mine")
    for shown in (
        "| 25 |",
        "62 s on CPU X",
        "88.217",
        "70.500 to 74.000",
        "| 0 | 0.512 | 0.961 |",
        "| 1 | 0.498 |  |",
        "0.487",
        "torch 2.99",
    ):
        assert shown in text
    other = render_card(results(perplexity_after=Interval(1.5, 1.25, 1.75, 7), kept_share=[0.1, 0.2]), "mine")
    assert "1.500 | 1.250 to 1.750 | 7" in other
    assert "72.209" not in other
    assert "| 0 | 0.100 |" in other


def test_what_was_not_measured_is_left_out():
    bare = results(
        perplexity_before=None, perplexity_after=None, kept_share=None, recall=None, steps=None, train_seconds=None, recipe=""
    )
    text = render_card(bare, "mine")
    for said in ("No held-out text was evaluated", "Memory was not measured", "no recall to report", "No stock LoRA run"):
        assert said in text
    for absent in ("Kept share", "Predictor recall", "Training time", "Optimizer steps", "None", "```yaml"):
        assert absent not in text


def test_rendering_again_keeps_what_a_person_added():
    first = render_card(results(), "mine")
    edited = first.replace("library_name: peft", "library_name: peft\nlicense: mit\nlanguage: en").replace(
        "- lora\n", "- lora\n- my-tag\n"
    )
    edited = edited.replace(BEGIN, f"A word before.\n\n{BEGIN}") + "\n## My notes\n\nTried on my corpus.\n"
    edited = edited.replace("72.209", "1.0")  # what stands between the markers is not theirs
    again = render_card(results(steps=50), "mine", edited)
    card = ModelCard(again)
    assert card.data.license == "mit"
    assert card.data.language == "en"
    assert "my-tag" in card.data.tags
    assert again.index("A word before.") < again.index(BEGIN) < again.index(END) < again.index("Tried on my corpus.")
    assert "| 50 |" in again
    assert "72.209" in again
    assert render_card(results(steps=50), "mine", again) == again


def test_metadata_that_cannot_be_read_stays_as_text(caplog):
    broken = render_card(results(), "mine").replace("library_name: peft", "license: [mit\nlibrary_name: peft")
    with caplog.at_level(logging.WARNING):
        text = render_card(results(), "mine", broken)
    assert "metadata is not YAML" in caplog.text
    assert ModelCard(text).data.library_name == "peft"
    assert "license: [mit" in text[text.index(END) :]
    assert render_card(results(), "mine", text) == text


def test_a_hand_written_card_without_markers_is_kept_whole():
    text = render_card(results(), "mine", "---\nlicense: mit\n---\n\nMy own card.\n")
    assert text.index(END) < text.index("My own card.")


def test_peft_default_card_is_kept_once_a_person_has_filled_in_a_line():
    default = ModelCard.from_template(ModelCardData()).text
    assert "[More Information Needed]" not in render_card(results(), "mine", default)
    filled = default.replace("[More Information Needed]", "Trained on my notes.", 1)
    assert "Trained on my notes." in render_card(results(), "mine", filled)


def test_cards_that_tools_write_do_not_pile_up(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)  # writes PEFT's default card
    assert "More Information Needed" in (tmp_path / "README.md").read_text()
    local = results(base_model=str(tmp_path / "base"), datasets=[])
    write_model_card(local, tmp_path, "mine")
    first = (tmp_path / "README.md").read_text()
    assert "More Information Needed" not in first
    assert str(tmp_path) not in first  # a local folder is nobody else's business, and the Hub refuses it as base_model
    model.save_pretrained(tmp_path)  # PEFT edits the card that is there
    write_model_card(local, tmp_path, "mine")
    assert (tmp_path / "README.md").read_text() == first
    assert "base_model" not in ModelCard(first).data.to_dict()


def test_a_baseline_without_elimination_does_not_claim_it():
    text = render_card(results(lemo=LemoConfig(enabled=False).to_dict()), "mine")
    assert "dense baseline" in text
    assert "leaves tokens out" not in text


def test_the_loading_example_runs_and_gives_the_models_logits(tiny_llama, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_llama.save_pretrained(base)
    config = {"rope_parameters": ROPE, "max_position_embeddings": 2048}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, **config), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    model.save_pretrained(adapter)
    text = render_card(results(base_model="org/base", base_config=config), "mine", adapter=str(adapter))
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace("org/base", str(base))
    code = "\n".join(line for line in code.splitlines() if "AutoTokenizer" not in line)
    names = {"AutoModelForCausalLM": AutoModelForCausalLM, "PeftModel": PeftModel}
    exec(code, names)
    ids = torch.arange(100)[None]
    with torch.no_grad():
        assert torch.equal(names["model"](ids).logits, model.eval()(ids).logits)


def example_code(text, heading):
    return re.search(r"```python\n(.*?)```", text[text.index(heading) :], re.DOTALL)[1]


def test_loading_examples_of_whole_models_name_them_alone(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path)
    for kind, trusted in (("merged", False), ("remote-code", True)):
        text = render_card(results(), "mine", adapter=str(tmp_path), kind=kind)
        code = example_code(text, "## How to load it")
        # The tokenizer's line needs it too: AutoTokenizer reads the config, whose type is unknown, and asks at a terminal.
        assert code.count("trust_remote_code=True") == (2 if trusted else 0)
        assert "peft" not in code
        names = {}
        exec("\n".join(line for line in code.splitlines() if "AutoTokenizer.from" not in line), names)
        assert names["model"].num_parameters() == tiny_llama.num_parameters()


def test_a_remote_code_card_says_what_is_run_and_how_to_train_on():
    text = render_card(results(), "mine", kind="remote-code")
    assert "runs the Python files of this repository" in text
    compile(example_code(text, "### Training it further"), "card", "exec")
    assert "LemoTrainer" in text
    dense = render_card(results(lemo=LemoConfig(enabled=False).to_dict()), "mine", kind="remote-code")
    assert "Training it further" not in dense
    assert "leaves tokens out" not in dense


def test_citation_and_precision():
    text = render_card(
        results(
            adapter="AdaLoRA r=4 on q_proj",
            precision="bfloat16 base",
            provenance={**results().provenance, "versions": {"lemo-hf": "9.9"}},
        ),
        "mine",
    )
    assert "eprint        = {2501.09767}" in text
    assert "version = {9.9}," in text
    assert "An AdaLoRA adapter of [some-org/some-model]" in text
    assert "| Adapter | AdaLoRA r=4 on q_proj |" in text
    assert "| Precision | bfloat16 base |" in text
    whole = render_card(results(adapter=""), "mine", kind="remote-code")
    assert "all of its weights fine-tuned" in whole
    assert "| Adapter |" not in whole


def test_the_plot_lies_beside_the_card_and_tells_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "lemo_hf.profiling.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would change the windows of a person's notebook
    write_model_card(results(), tmp_path, "mine")
    assert f"computed on in training: 0.50 to 0.51, mean 0.51]({PLOT_FILE})" in (tmp_path / "README.md").read_text()
    before = (tmp_path / PLOT_FILE).read_bytes()
    assert before.startswith(b"\x89PNG")
    assert update_model_cards.description(tmp_path / PLOT_FILE).endswith("0.50 to 0.51, mean 0.51")
    write_model_card(results(kept_share=[1.0, 0.25], recall=None), tmp_path, "mine")
    assert (tmp_path / PLOT_FILE).read_bytes() != before
    write_model_card(results(kept_share=None, recall=None), tmp_path, "mine")
    assert PLOT_FILE not in (tmp_path / "README.md").read_text()


def test_without_matplotlib_the_card_shows_numbers_and_says_why(tmp_path, monkeypatch, caplog):
    load = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib") or name.endswith("profiling.plots"):
            raise ImportError("No module named 'matplotlib'")
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with caplog.at_level(logging.WARNING):
        write_model_card(results(), tmp_path, "mine")
    text = (tmp_path / "README.md").read_text()
    assert "pip install matplotlib" in caplog.text
    assert PLOT_FILE not in text
    assert "<details><summary>The same" not in text
    assert "| 0 | 0.512 | 0.961 |" in text


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_moves_from_one_kind_of_folder_to_another(kind):
    """An export starts from the run's own card."""
    edited = render_card(results(), "mine", plot=PLOT_FILE).replace(END, f"{END}\n\n## My notes\n\nKept.")
    text = render_card(results(), "theirs", edited, adapter="me/model", kind=kind)
    assert text.count("## My notes") == 1
    assert text.count("# theirs") == 1
    assert "# mine" not in text
    assert PLOT_FILE not in text
    assert ModelCard(text).data.model_name == "theirs"
    assert '"me/model"' in text


def test_no_local_path_reaches_a_card(tmp_path):
    (tmp_path / "base").mkdir()
    run = results(base_model=str(tmp_path / "base"), datasets=[])
    text = render_card(run, "mine")
    assert str(tmp_path) not in text
    assert "path/to/base" in text
    gone = render_card(results(base_model="/home/somebody/models/base"), "mine")
    assert "somebody" not in gone


def test_intervals_come_from_the_documents():
    measured = Interval.of(Perplexity((20.0, 25.0, 24.0), (10, 10, 10)))
    assert measured.low < measured.value < measured.high
    assert measured.value == pytest.approx(torch.tensor(2.3).exp().item())
    alone = Interval.of(Perplexity((20.0,), (10,)))
    assert alone.low is None
    assert "one document" in render_card(results(perplexity_after=alone), "mine")


def test_results_file_comes_back(tmp_path):
    for run in (results(), results(stock=STOCK, batch=2, saved_bytes=1.5, license="mit")):
        write_json(tmp_path / "results.json", run.to_dict())
        assert RunResults.read(tmp_path / "results.json") == run
    for damaged in ("{}", json.dumps({**results().to_dict(), "stock": {}})):
        (tmp_path / "results.json").write_text(damaged)
        with pytest.raises(LemoError, match="cannot be read"):
            RunResults.read(tmp_path / "results.json")
