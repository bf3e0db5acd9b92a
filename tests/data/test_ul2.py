"""UL2: pieces fit the lengths, denoisers come at their rates, and nothing of the text is lost."""

import collections
import json

import numpy as np
import pytest
import seqio
import tensorflow as tf

from tasks import corpora, noise, objectives, ul2, user_files
from tasks.errors import UserError

LENGTHS = {"inputs": 64, "targets": 40}


@pytest.fixture
def features(bytes_vocabulary):
    return {name: seqio.Feature(bytes_vocabulary) for name in LENGTHS}


def examples(features, documents, lengths=LENGTHS, seed=0, **settings):
    rows = tf.ragged.constant(documents, tf.int32)
    dataset = tf.data.Dataset.from_tensor_slices({"targets": rows})
    dataset = dataset.map(lambda x: {"targets": tf.ensure_shape(x["targets"], [None])})
    with seqio.utils.map_seed_manager(seed):
        return list(ul2.ul2(dataset, lengths, features, **settings).as_numpy_iterator())


def documents(count=60, size=200, seed=0):
    return np.random.default_rng(seed).integers(10, 250, (count, size)).tolist()


def text_of(example, first_sentinel):
    """The text that inputs and targets come from."""
    spans: dict[int, list[int]] = collections.defaultdict(list)
    current = None
    for token in example["targets"].tolist():
        if token > 258:
            current = token
        else:
            spans[current or 0].append(token)
    text = [x for token in example["inputs"].tolist() for x in (spans[token] if token > 258 else [token])]
    return text + spans[0]


@pytest.mark.parametrize("denoisers", [ul2.UL2, ul2.UL2R], ids=["ul2", "ul2r"])
def test_pieces_fit_and_together_are_the_text(features, bytes_vocabulary, denoisers):
    texts = documents()
    found = examples(features, texts, denoisers=denoisers)
    for example in found:
        assert len(example["inputs"]) <= LENGTHS["inputs"] - 1 and len(example["targets"]) <= LENGTHS["targets"] - 1
    first = bytes_vocabulary.vocab_size - 1
    restored = [token for example in found for token in text_of(example, first)]
    assert restored == [token for text in texts for token in text]


def test_denoisers_come_at_their_rates(features):
    tokens = {"R": "r: ", "S": "s: ", "X": "x: "}
    found = examples(features, documents(400), denoisers=ul2.UL2R, mode_tokens=tokens)
    modes = collections.Counter(chr(example["inputs"][0] - 3) for example in found)
    total = sum(modes.values())
    for mode, share in {"r": 0.25, "s": 0.5, "x": 0.25}.items():
        assert modes[mode] / total == pytest.approx(share, abs=4 * (share * (1 - share) / total) ** 0.5)


@pytest.mark.parametrize("denoiser", ul2.UL2, ids=str)
def test_each_denoiser_corrupts_as_much_as_it_says(features, denoiser):
    lengths = {"inputs": 512, "targets": 300}
    found = examples(features, documents(40, 2_000), lengths, denoisers=[denoiser])
    full = found[:-1]  # the last piece is shorter
    noisy = [int((example["targets"] < 259).sum()) for example in full]
    piece = ul2.piece_length(denoiser, 511, 299)
    assert np.mean(noisy) / piece == pytest.approx(denoiser.noise_density, rel=0.15)
    spans = [int((example["targets"] > 258).sum()) for example in full]
    if denoiser.mean_noise_span_length is None:
        assert set(spans) == {0} and len(set(noisy)) > 20, "one span at the end, of any length"
    else:
        assert np.mean(noisy) / np.mean(spans) == pytest.approx(denoiser.mean_noise_span_length, rel=0.45)
    longest = {name: max(len(example[name]) for example in full) for name in lengths}
    assert longest["inputs"] >= 510 or longest["targets"] >= 297, "a piece is as long as it can be"


def test_the_same_seed_gives_the_same_examples(features):
    first, again, other = (examples(features, documents(), seed=seed) for seed in (1, 1, 2))
    same = [a["inputs"].tolist() == b["inputs"].tolist() for a, b in zip(first, again, strict=True)]
    assert all(same) and [x["inputs"].tolist() for x in first] != [x["inputs"].tolist() for x in other]


def test_texts_that_are_not_joined_keep_apart(features, bytes_vocabulary):
    texts = documents(30, 25)
    found = examples(features, texts, concatenate=False)
    assert sorted(text_of(example, bytes_vocabulary.vocab_size - 1) for example in found) == sorted(texts)


@pytest.mark.parametrize(
    ("lengths", "settings", "says"),
    [
        ({"inputs": 64, "targets": 3}, {}, r"X-denoiser \(spans of 3, 50% noise\): no text fits"),
        ({"inputs": 64}, {}, "must give targets"),
        (LENGTHS, {"mode_tokens": {"R": "[R]"}}, "have none for the mode 'S'"),
        (LENGTHS, {"mode_tokens": ul2.MODE_TOKENS | {"Q": "q"}}, "have 'Q'; the modes are R, S, X"),
        (LENGTHS, {"mode_tokens": {"R": "", "S": "[S]", "X": "[X]"}}, "the mode token '' is unknown"),
        ({"inputs": 2048, "targets": 2048}, {}, "VOCABULARY_EXTRA_IDS"),
    ],
)
def test_what_does_not_fit_is_named(features, lengths, settings, says):
    with pytest.raises(UserError, match=says):
        examples(features, documents(2), lengths, **settings)


def test_short_lengths_are_said_of_spans_that_cannot_be_long(features, caplog):
    examples(features, documents(2))
    assert "X-denoiser (spans of 64, 15% noise) has spans of 11 tokens only" in caplog.text


def test_the_end_mask_is_uniform():
    seeds = np.arange(8_000).reshape(2_000, 2, 2)
    mask = noise.random_end_noise_mask(40, 0.25, seeds)
    sizes = mask.sum(axis=1)
    assert mask[:, -1].all() and not np.diff(mask.astype(int), axis=1).min() < 0
    assert (sizes.min(), sizes.max()) == (1, 19) and sizes.mean() == pytest.approx(10, abs=0.5)
    assert noise.random_end_noise_mask(1, 0.25, seeds).sum() == 0


# FILES_OBJECTIVE.


@pytest.fixture
def text(tmp_path, bytes_vocabulary):
    (tmp_path / "a.txt").write_text("".join(f"this is text number {i}, of some words\n" for i in range(40)))
    (tmp_path / "b.jsonl").write_text(json.dumps({"inputs": "a", "targets": "b"}) + "\n")
    yield tmp_path
    for name in {"files", "a", "b"} & set(seqio.TaskRegistry.names()):
        seqio.TaskRegistry.remove(name)


@pytest.mark.parametrize("name", user_files.OBJECTIVES)
def test_every_objective_trains_on_own_text(text, name):
    task = user_files.register_files("files", f"{text}/a.txt", objective=name)
    found = list(task.get_dataset(LENGTHS, "train", shuffle=False, seed=0).as_numpy_iterator())
    assert found
    for example in found:
        for feature, length in LENGTHS.items():
            assert len(example.get(feature, ())) <= length


def test_settings_reach_the_objective(text):
    settings = {"noise_density": 0.5, "mean_noise_span_length": 5.0, "concatenate": False}
    lengths = {"inputs": 64, "targets": 64}
    task = user_files.register_files("files", f"{text}/a.txt", objective="span_corruption", **settings)
    found = list(task.get_dataset(lengths, "train", shuffle=False, seed=0).as_numpy_iterator())
    assert len(found) == 40, "each text on its own"
    joined = user_files.register_files("files", f"{text}/a.txt", objective="span_corruption")
    shown = list(joined.get_dataset(lengths, "train", shuffle=False, seed=0).as_numpy_iterator())
    for rows, density in ((found, 0.5), (shown, 0.15)):
        counts = np.sum([[(x[feature] < 259).sum() for feature in ("targets", "inputs")] for x in rows], axis=0)
        assert counts[0] / counts.sum() == pytest.approx(density, abs=0.06)
    assert len(shown) < 40


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"objective": "span_coruption"}, "did you mean 'span_corruption'"),
        ({"objective": "lm", "noise_density": 0.5}, "NOISE_DENSITY = 0.5: the objective 'lm' has no such setting"),
        ({"objective": "prefix_lm", "mean_noise_span_length": 3.0}, "MEAN_NOISE_SPAN_LENGTH = 3.0: the objective"),
        ({"noise_density": 0.5}, "the objective 'text_to_text' has no such setting"),
        ({"objective": "iid_denoising", "noise_density": 1.5}, "NOISE_DENSITY = 1.5: it must be above 0"),
        ({"objective": "span_corruption", "mean_noise_span_length": 0.0}, "it must be at least 1"),
    ],
)
def test_a_setting_that_the_objective_lacks_is_an_error(text, settings, says):
    with pytest.raises(UserError, match=says):
        user_files.register_files("files", f"{text}/b.jsonl", text_template="{inputs}", **settings)


def test_mode_tokens_go_to_the_corpora_that_use_them(text):
    tokens = dict(ul2.MODE_TOKENS)
    objective = {"a": "ul2", "b": "text_to_text"}
    files = {"a": f"{text}/a.txt", "b": f"{text}/b.jsonl"}
    corpora.register(files, objective=objective, mode_tokens=tokens)
    task = seqio.TaskRegistry.get("a")
    (first, *_) = task.get_dataset(LENGTHS, "train", shuffle=False, seed=0).as_numpy_iterator()
    assert bytes((first["inputs"][:3] - 3).tolist()).decode() in tokens.values()
    with pytest.raises(UserError, match="UL2_MODE_TOKENS"):
        corpora.register({"b": files["b"]}, mode_tokens=tokens)
    seqio.MixtureRegistry.remove(corpora.MIXTURE)


def test_objectives_by_name_are_those_of_the_options():
    from typing import get_args

    from t5x_lite import options

    assert set(get_args(options.Objective)) == {user_files.TEXT_TO_TEXT, *user_files.OBJECTIVES}
    assert objectives.span_corruption in user_files.OBJECTIVES.values()
