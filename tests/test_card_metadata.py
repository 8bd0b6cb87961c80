import logging

import pytest
from card_results import results
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lemo_hf.hub.model_card import Interval, render_card

KINDS = ("adapter", "merged", "remote-code")


@pytest.mark.parametrize(
    ("kind", "library", "relation"),
    [("adapter", "peft", "adapter"), ("merged", "transformers", "finetune"), ("remote-code", "transformers", "finetune")],
)
def test_metadata_lets_the_hub_file_the_model(kind, library, relation):
    run = results(language=["en"], license="mit")
    data = ModelCard(render_card(run, "mine", kind=kind)).data
    assert (data.library_name, data.pipeline_tag) == (library, "text-generation")
    assert (data.base_model, data["base_model_relation"]) == ("some-org/some-model", relation)
    assert (data.datasets, data.language, data.license) == (["some-org/books"], ["en"], "mit")
    assert {"lemo", "long-context"} <= set(data.tags)
    assert ("lora" in data.tags) == (kind == "adapter")


@pytest.mark.parametrize("kind", KINDS)
def test_the_evaluation_comes_back_through_huggingface_hub(kind):
    data = ModelCard(render_card(results(), "mine", kind=kind)).data
    assert data.metrics == ["perplexity"]
    assert data.model_name == "mine"
    assert data.eval_results == [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type="some-org/books",
            dataset_name="data set some-org/books, train, held out",
            metric_type="perplexity",
            metric_name="Dense perplexity at 4096 tokens",
            metric_value=72.209,
        )
    ]
    assert ModelCardData(**data.to_dict()).eval_results == data.eval_results


def test_metadata_holds_what_is_known_only():
    bare = results(base_model="some-model", datasets=[], perplexity_after=None)
    data = ModelCard(render_card(bare, "mine")).data.to_dict()
    assert set(data) == {"library_name", "pipeline_tag", "tags"}


def test_rendering_again_keeps_a_persons_evaluation_and_base_model():
    local = results(base_model="some-model")
    card = ModelCard(render_card(local, "mine"))
    theirs = EvalResult("question-answering", "org/questions", "Questions", "accuracy", 0.5, metric_name="Accuracy")
    card.data.eval_results.append(theirs)
    card.data.base_model = "org/the-base"
    again = ModelCard(
        render_card(results(base_model="some-model", perplexity_after=Interval(60.0, None, None, 5)), "mine", str(card))
    )
    assert again.data.base_model == "org/the-base"
    assert again.data["base_model_relation"] == "adapter"
    assert [each.metric_value for each in again.data.eval_results] == [60.0, 0.5]
    assert again.data.eval_results[1] == theirs
    unmeasured = ModelCard(render_card(results(base_model="some-model", perplexity_after=None), "mine", str(again)))
    assert unmeasured.data.eval_results == [theirs]


def test_an_evaluation_that_the_hub_refuses_is_left_out_with_a_warning(caplog):
    edited = render_card(results(), "mine").replace("- name: mine\n", "- title: mine\n")
    with caplog.at_level(logging.WARNING):
        text = render_card(results(), "mine", edited)
    assert "model-index is not one that the Hub accepts" in caplog.text
    assert text == render_card(results(), "mine")


def test_a_licence_and_languages_that_a_person_stated_stay():
    edited = render_card(results(license="mit", language=["en"]), "mine").replace("license: mit", "license: apache-2.0")
    edited = edited.replace("- en\n", "- en\n- de\n")
    data = ModelCard(render_card(results(license="mit", language=["en"]), "mine", edited)).data
    assert (data.license, data.language) == ("apache-2.0", ["en", "de"])
