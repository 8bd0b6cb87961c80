"""The quality bench's text, questions and repositories: what they promise, on small inputs."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.quality import corpus, headers
from benchmarks.quality.repositories import Repository, SourceFile, build_sample, repository_samples
from benchmarks.quality.retrieval import HOPS, TASKS, sample, training_row, words_of
from lemo_hf.errors import LemoError
from lemo_hf.quickstart.comparison import EVALUATION_PACKAGES, TRAIN_PACKAGES
from lemo_hf.text_data import TextDocument


def drawn(seed):
    return torch.Generator().manual_seed(seed)


# Corpus


def test_no_package_is_in_two_splits_and_the_quickstarts_keep_their_roles():
    named = [package for packages in corpus.SPLITS.values() for package in packages]
    assert len(named) == len(set(named))
    assert set(EVALUATION_PACKAGES) <= set(corpus.HELD_OUT_PACKAGES)
    assert set(TRAIN_PACKAGES) <= set(corpus.EXTENSION_PACKAGES)


def random_words(seed, count):
    return [f"word{index}" for index in torch.randint(5000, (count,), generator=drawn(seed)).tolist()]


def test_planted_near_duplicates_are_dropped_and_nothing_else():
    text = random_words(0, 800)
    edited = [f"other{index}" if index % 40 == 0 else word for index, word in enumerate(text)]
    half_new = text[:400] + random_words(1, 400)
    vendored = text[:500] + random_words(2, 50)  # most of it is in the first, which is far longer
    documents = {
        "original": text,
        "unlike": random_words(3, 800),
        "licence": [*random_words(4, 60), *text],
        "edited": edited,
        "half_new": half_new,
        "vendored": vendored,
        "short": text[20:80],
        "copy": text,
    }
    kept, dropped = corpus.drop_near_duplicates(TextDocument(name, " ".join(words)) for name, words in documents.items())
    assert [document.name for document in kept] == ["original", "unlike", "half_new"]
    assert dropped == [(name, "original") for name in ("licence", "edited", "vendored", "short", "copy")]


def test_sampled_candidates_find_what_comparing_all_pairs_finds():
    texts = []
    for seed in range(30):  # six families of five, ever less alike
        family, place = divmod(seed, 5)
        words = random_words(100 + family, 120)
        changed = torch.randperm(120, generator=drawn(seed))[: place * (family + 1)].tolist()
        texts.append(" ".join(f"new{seed}{index}" if index in changed else word for index, word in enumerate(words)))
    kept: list[set] = []
    expected = []
    for index, text in enumerate(texts):
        own = set(corpus.shingles(text).tolist())
        shares = [(len(own & other) / len(own | other), len(own & other) / len(own)) for other in kept]
        if not any(jaccard >= corpus.MAX_JACCARD or contained >= corpus.MAX_CONTAINMENT for jaccard, contained in shares):
            kept.append(own)
            expected.append(str(index))
    found, _ = corpus.drop_near_duplicates(TextDocument(str(index), text) for index, text in enumerate(texts))
    assert [document.name for document in found] == expected
    assert 6 < len(expected) < 28


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Three packages, one a split; the base's vendors a file of the held-out one and is larger than its share."""
    files = {f"away/part{index}.py": random_words(index, 300) for index in range(4)}
    files |= {f"longer/part{index}.py": random_words(10 + index, 300) for index in range(3)}
    files |= {f"common/part{index}.py": random_words(20 + index, 300) for index in range(12)}
    files["common/_vendor/away_part.py"] = ["vendored", *files["away/part1.py"]]
    files["common/tests/test_it.py"] = random_words(40, 300)
    for name, words in files.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(words))
        (tmp_path / "site" / name.split("/")[0] / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(
        corpus, "SPLITS", {"held_out": ("away", "not_installed_here"), "extension": ("longer",), "base": ("common",)}
    )
    monkeypatch.setattr(corpus, "FOLDER", tmp_path / "corpus")
    corpus.corpus.cache_clear()
    yield tmp_path
    corpus.corpus.cache_clear()


def names(documents):
    return [document.name for document in documents]


def test_corpus_is_split_by_package_capped_and_without_copies_of_held_out_files(installed):
    assert names(corpus.held_out_documents()) == [f"away/part{index}.py" for index in range(4)]
    assert names(corpus.training_documents("extension", ["longer"])) == [f"longer/part{index}.py" for index in range(3)]
    everything = names(corpus.training_documents("base"))
    assert everything == sorted(f"common/part{index}.py" for index in range(12))  # no tests, nothing vendored
    assert corpus.corpus()["dropped"]["base"] == [["common/_vendor/away_part.py", "away/part1.py"]]
    assert corpus.statistics()["base"]["dropped_like_another_split"] == 1
    size = len(corpus.training_documents("base")[0].text) + 200
    few = names(corpus.training_documents("base", base_bytes=3 * size))
    assert 2 <= len(few) <= 3
    assert set(few) < set(everything)
    corpus.corpus.cache_clear()
    assert names(corpus.training_documents("base", base_bytes=3 * size)) == few
    (installed / "site/common/part0.py").write_text("changed = 1\n" * 30)  # another corpus, not the one kept on disk
    corpus.corpus.cache_clear()
    assert "changed" in next(d.text for d in corpus.training_documents("base") if d.name == "common/part0.py")


def test_corpus_refuses_what_would_mix_the_splits(installed):
    with pytest.raises(LemoError, match=r"no split to train on; 'held_out'; choose base or extension"):
        corpus.training_documents("held_out")
    with pytest.raises(LemoError, match=r"package is not in the extension split; 'away'; choose among longer"):
        corpus.training_documents("extension", ["away"])
    with pytest.raises(LemoError, match=r"split has no text here; 'held_out' of \['not_installed_here'\]; install"):
        corpus.held_out_documents(["not_installed_here"])


# Retrieval

ASKED = {
    "passkey": r"\n    # The pass key is (\d{5})\. Remember it\.",
    "key_value": r"\n    (\w+) = (\d{4})",
    "variable_tracking": r"\n    (\w+) = (\d{4})",
}


@settings(max_examples=25, deadline=None)
@given(
    task=st.sampled_from(TASKS), depth=st.floats(0, 1), tokens=st.integers(400, 1500), real=st.booleans(), seed=st.integers(0, 99)
)
def test_sample_has_its_length_and_one_right_answer_at_its_depth(tokenizer, haystack, task, depth, tokens, real, seed):
    found = sample(task, tokenizer, tokens, depth, drawn(seed), haystack if real else None)
    ids = found["input_ids"]
    assert ids.shape == found["labels"].shape == (tokens,)
    ((start, end),) = found["answers"]
    assert end == tokens
    asked = torch.zeros(tokens, dtype=torch.bool)
    asked[start:end] = True
    assert torch.equal(found["labels"], torch.where(asked, ids, -100))
    text, answer = tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])
    question = text.rsplit("\n", 1)[1]
    # The question is answered by what stands before it, and by one thing only.
    if task == "passkey":
        assert question == "    # The pass key is"
        assert re.findall(ASKED[task], text) == [answer.strip()]
    elif task == "key_value":
        name = re.fullmatch(r"    assert (\w+) ==", question)[1]
        assert re.findall(rf"\n    {name} = (.*)", text) == [answer.strip()]
    else:
        name = re.fullmatch(r"    # (\w+) =", question)[1]
        chain = []
        while not name.isdigit():
            (name,) = re.findall(rf"\n    {name} = (\w+)", text)
            chain.append(name)
        assert len(chain) == HOPS + 1
        assert answer == f" {' = '.join(chain)}"
    # The line asked for, or a chain's first line, begins at the needle, up to the end of a line of the haystack away.
    assert re.match(ASKED[task], tokenizer.decode(ids[found["needle"] :]))
    number = re.findall(r"\d+", answer)[-1]
    assert number in re.match(ASKED[task], tokenizer.decode(ids[found["needle"] :])).groups()
    if task != "variable_tracking":
        assert found["needle"] / start == pytest.approx(depth, abs=0.02 + 80 / tokens)
    else:
        assert found["needle"] / start <= depth + 0.02 + 80 / tokens


def test_sample_depends_on_its_generator_alone_and_goes_deeper_with_depth(tokenizer, haystack):
    first, again, other = (sample("key_value", tokenizer, 600, 0.5, drawn(seed), haystack) for seed in (1, 1, 2))
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert not torch.equal(first["input_ids"], other["input_ids"])
    for task in TASKS:
        needles = [sample(task, tokenizer, 1024, depth, drawn(3))["needle"] for depth in (0.0, 0.25, 0.5, 0.75, 1.0)]
        assert needles == sorted(needles)
        assert needles[0] == 1
        assert needles[-1] > 800


def test_made_up_contexts_are_what_the_tokenizer_makes_of_their_text(tokenizer):
    for task in TASKS:
        ids = sample(task, tokenizer, 700, 0.4, drawn(5))["input_ids"].tolist()
        assert tokenizer(tokenizer.decode(ids[1:]), add_special_tokens=False)["input_ids"] == ids[1:]


def test_samples_that_cannot_be_made_are_refused(tokenizer, haystack):
    with pytest.raises(LemoError, match=r"unknown retrieval task; 'needle'; choose one of passkey"):
        sample("needle", tokenizer, 512, 0.5, drawn(0))
    with pytest.raises(LemoError, match=r"depth is outside \[0, 1\]; 1\.5; "):
        sample("passkey", tokenizer, 512, 1.5, drawn(0))
    with pytest.raises(LemoError, match=r"context is too short for passkey; 24 tokens; use at least (\d+)") as error:
        sample("passkey", tokenizer, 24, 0.5, drawn(0))
    least = int(re.search(r"at least (\d+)", str(error.value))[1])
    assert len(sample("passkey", tokenizer, least, 0.5, drawn(0))["input_ids"]) == least
    with pytest.raises(LemoError, match=r"haystack is shorter than the context; 100 of 512 tokens"):
        sample("passkey", tokenizer, 512, 0.5, drawn(0), haystack[:100])


def test_training_rows_ask_much_and_every_answer_stands_before(tokenizer, haystack):
    asked, kinds = [], set()
    for seed in range(40):
        row = training_row(tokenizer, 512, drawn(seed), haystack if seed % 2 else None)
        ids, labels = row["input_ids"], row["labels"]
        assert ids.shape == labels.shape == (512,)
        where = labels != -100
        assert torch.equal(labels[where], ids[where])
        asked.append(where.float().mean().item())
        if ids[0] != tokenizer.bos_token_id:
            kinds.add("copy")
            continue
        for episode in tokenizer.decode(ids).split(tokenizer.bos_token)[1:]:
            questions = re.findall(
                r"\n    assert (\w+) == (\d+)|\n    # (\w+) = (\w+) = (\w+) = (\d+)|\n    # The pass key( of \w+)? is (\d+)(?!\d|\.)",
                episode,
            )
            assert questions
            for name, number, third, second, first, value, key, code in questions:
                if name:
                    kinds.add("key_value")
                    assert re.findall(rf"\n    {name} = (.*)", episode) == [number]
                elif third:
                    kinds.add("variable_tracking")
                    found = [re.findall(rf"\n    {each} = (\w+)", episode) for each in (third, second, first)]
                    assert found == [[second], [first], [value]]
                else:
                    kinds.add("passkey")
                    assert episode.count(f"# The pass key{key} is {code}. Remember it.") == 1
    assert kinds == {"copy", *TASKS}
    with pytest.raises(LemoError, match=r"retrieval row of a length it cannot have; 1001 tokens; use a multiple of 8"):
        training_row(tokenizer, 1001, drawn(0))
    assert sum(asked) / len(asked) > 0.12  # one question in 512 tokens would be 0.01


def test_names_are_single_tokens(tokenizer):
    words = words_of(tokenizer)
    assert len(words.names) > 900
    assert all(tokenizer.convert_tokens_to_ids(f"\u0120{name}") == index for index, name in words.names.items())


# Repositories

LINES = "".join(f"value_{index} = {index}\n" for index in range(60))


def repository_documents():
    texts = {
        "shop/__init__.py": "from .deep import read_prices\n",
        "shop/deep/__init__.py": "from .reading import read_prices\n",
        "shop/deep/reading.py": f"{LINES}def read_prices(path):\n    return path\n{LINES}",
        "shop/orders.py": f"class Order:\n    pass\n\nORDER_LIMIT = 3\n{LINES}",
        "shop/other.py": LINES * 2,
        "shop/main.py": (
            "from . import read_prices\nfrom shop.orders import Order, ORDER_LIMIT as limit\nfrom .other import value_7\nimport os\n\n"
            'def run(path):\n    caf\u00e9 = "\u00e9\u00e9"; prices = read_prices(path)\n    value_7 = 1\n'
            "    return Order(prices, limit, value_7, os.path)  # Order\n\nrun(Order, read_prices)\n"
        ),
    }
    return [TextDocument(name, text) for name, text in texts.items()]


def test_repository_sample_points_to_imported_names_far_from_their_definitions(tokenizer):
    found = build_sample(*at("shop/main.py"), tokenizer, tokens=4096, min_distance=200)
    assert found.files[-1] == "shop/main.py"
    assert found.files[:2] == ["shop/deep/reading.py", "shop/orders.py"]
    spans = [(span.name, span.kind) for span in found.spans]
    # An alias (`limit`), a name assigned again (value_7) and an import from elsewhere (os) do not count.
    assert spans == [
        ("read_prices", "import"),
        ("Order", "import"),
        ("read_prices", "use"),
        ("Order", "use"),
        ("Order", "use"),
        ("read_prices", "use"),
    ]
    for span in found.spans:
        text = tokenizer.decode(found.input_ids[span.start : span.end])
        assert span.name in text
        assert len(text) <= len(span.name) + 1
        line = tokenizer.decode(found.input_ids[span.definition : span.end])
        assert line.startswith({"read_prices": "def read_prices", "Order": "class Order"}[span.name])
        assert span.distance >= 200
        since = tokenizer.decode(found.input_ids[span.start - span.since_mention + 1 : span.start])
        mention = tokenizer.decode(found.input_ids[span.start - span.since_mention : span.start])
        assert not re.search(rf"\b{span.name}\b", since) or text.startswith("(")
        assert re.search(rf"\b{span.name}\b", mention)


def at(name):
    repository = Repository(repository_documents())
    return repository, repository.files[name]


def test_imports_are_followed_to_where_the_name_is_defined():
    repository, last = at("shop/main.py")
    assert repository.sources(last) == {"shop/deep/reading.py": ["read_prices"], "shop/orders.py": ["Order"]}
    assert repository.defining(last, "os") is None


def test_repository_samples_keep_to_their_length_and_distance(tokenizer):
    documents = repository_documents()
    near = repository_samples(tokenizer, 2048, 4, min_distance=900, documents=documents)
    assert all(span.distance >= 900 for found in near for span in found.spans)
    assert {span.name for found in near for span in found.spans} == {"read_prices", "Order"}
    short = build_sample(*at("shop/main.py"), tokenizer, tokens=700, min_distance=100)
    assert len(short.input_ids) <= 700
    assert all(span.end <= 700 for span in short.spans)
    with pytest.raises(LemoError, match=r"no file uses a name defined 3000 tokens before; 1 packages"):
        repository_samples(tokenizer, 8000, 4, min_distance=3000, documents=documents)
    with pytest.raises(LemoError, match=r"samples are too short; 1000 tokens for a distance of 1024"):
        repository_samples(tokenizer, 1000, 4, documents=documents)


def test_files_that_do_not_parse_are_left_alone(tokenizer):
    broken = TextDocument("shop/broken.py", "def broken(:\n" * 20)
    assert SourceFile(broken).definitions == {}
    documents = [*repository_documents(), broken]
    assert len(repository_samples(tokenizer, 4096, 9, min_distance=200, documents=documents)) == 1


# Headers


@pytest.fixture
def projects(tmp_path, monkeypatch):
    """Two packages with headers; one of those to train on is a copy of a held-out one."""
    shared = " ".join(random_words(0, 300))
    files = {
        "apart/include/shared.h": shared,
        "apart/include/alone.hpp": " ".join(random_words(1, 300)),
        "learnt/include/copy.h": shared,
        "learnt/include/own.h": " ".join(random_words(2, 300)),
        "learnt/source.py": " ".join(random_words(3, 300)),
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(headers, "PROJECTS", {"held_out": ("apart/include",), "extension": ("learnt/include", "absent/include")})
    headers._documents.cache_clear()
    yield
    headers._documents.cache_clear()


def test_headers_are_split_by_project_and_copies_stay_held_out(projects):
    names = {split: [document.name for document in headers.header_documents(split)] for split in headers.PROJECTS}
    assert names == {"held_out": ["apart/include/alone.hpp", "apart/include/shared.h"], "extension": ["learnt/include/own.h"]}


def test_missing_headers_say_which_packages_have_them(projects, monkeypatch):
    with pytest.raises(LemoError, match="no such split of headers; 'base'; choose held_out or extension"):
        headers.header_documents("base")
    monkeypatch.setattr(headers, "PROJECTS", {"held_out": ("absent/include",), "extension": ()})
    headers._documents.cache_clear()
    with pytest.raises(LemoError, match="no headers of the held_out split here; absent/include; install"):
        headers.header_documents("held_out")
