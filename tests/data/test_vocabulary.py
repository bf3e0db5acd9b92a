"""The shared vocabulary: lazy, replaceable, and the same for every task."""

import copy
import os
import pathlib
import pickle
import subprocess
import sys

import pytest
import seqio
import tensorflow as tf

from tasks import vocabulary

REPO = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_import_reads_nothing():
    code = (
        "import tasks, seqio\n"
        "from tasks import vocabulary\n"
        "assert vocabulary._t5 is None and 't5x_lite' not in __import__('sys').modules\n"
        "assert 'glue_cola_v002' in seqio.TaskRegistry.names()\n"
    )
    environment = os.environ | {"T5X_LITE_DATA_DIR": "/nowhere"}  # would be refused if it were looked at
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=REPO, check=True)


def test_one_object_for_all_tasks_that_can_be_replaced(bytes_vocabulary):
    features = [
        seqio.get_mixture_or_task(name).output_features[key]
        for name in ("glue_cola_v002", "squad_v110", "c4_glue_squad_proportional")
        for key in ("inputs", "targets")
    ]
    assert {id(f.vocabulary) for f in features} == {id(vocabulary.SHARED)}
    shared = features[0].vocabulary
    assert shared.vocab_size == 256 + 3 + 100
    assert shared.extra_ids == 100
    assert shared.eos_id == 1
    assert shared.encode("a") == [100] == shared.encode_tf("a").numpy().tolist()
    assert shared.decode([100, 1, 101]) == "a"
    assert shared.decode_tf(tf.constant([100])).numpy() == b"a"
    assert shared == bytes_vocabulary
    assert shared != seqio.PassThroughVocabulary(5)


def test_copies_are_the_same_object():
    assert copy.deepcopy(vocabulary.SHARED) is vocabulary.SHARED
    assert pickle.loads(pickle.dumps(vocabulary.SHARED)) is vocabulary.SHARED
    assert hash(vocabulary.SHARED) == hash(copy.copy(vocabulary.SHARED))


def test_a_missing_model_is_named_with_the_cure(tmp_path, corpus, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no SentencePiece model at .*nothing\.model.*T5X_LITE_DATA_DIR"):
        vocabulary.set_default(str(tmp_path / "nothing.model"))
    monkeypatch.setattr(vocabulary, "T5_MODEL", str(tmp_path / "public.model"))
    with pytest.raises(FileNotFoundError, match=r"vocab/sentencepiece\.model is not there.*public\.model.*VOCABULARY"):
        vocabulary.default_vocabulary()


def test_what_is_not_a_model_is_refused(tmp_path):
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(ValueError, match=r"text\.model is not a SentencePiece model"):
        vocabulary.set_default(str(tmp_path / "text.model"))


def test_ids_of_the_public_vocabulary(data_dir):
    t5 = vocabulary.default_vocabulary()
    assert t5.vocab_size == 32100
    assert t5.unk_id == 2
    assert t5.encode("translate English to German: The house is wonderful.") == [
        13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5,
    ]  # fmt: skip
    assert t5.encode("Das Haus ist wunderbar.") == [644, 4598, 229, 19250, 5]
    assert t5.encode("<extra_id_0> <extra_id_99>") == [32099, 32000]
