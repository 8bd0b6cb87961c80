"""Small text for the tests of the quality bench."""

import pytest
import torch
from tiny_recipe import write_source
from transformers import AutoTokenizer

from lemo_hf.base_model.training import BASE_MODEL_FOLDER
from lemo_hf.text_data import python_sources, tokenize_documents


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE_MODEL_FOLDER)


@pytest.fixture(scope="session")
def sources():
    return python_sources(["packaging"])


@pytest.fixture(scope="session")
def haystack(tokenizer, sources):
    return torch.tensor([token for ids in tokenize_documents(tokenizer, sources) for token in ids[1:-1]])


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return str(write_source(tmp_path_factory.mktemp("quality")) / "base")
