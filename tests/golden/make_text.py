"""Recompute the values of the files here that hold text, from the inputs in them, with other implementations.

They do not fit the project's own environment:

    python3.11 -m venv /tmp/peer
    /tmp/peer/bin/pip install seqio==0.0.20 tensorflow==2.21.0 tensorflow-text==2.21.1 sentencepiece==0.2.3 \
        scikit-learn==1.9.1 transformers==4.57.6 mesh-tensorflow babel nltk pandas sacrebleu rouge-score editdistance
    /tmp/peer/bin/pip install --no-deps t5==0.9.4
    /tmp/peer/bin/python tests/golden/make_text.py --check

`--check` writes nothing, names the files that differ and exits with 1. To add a case, write its input and run this.
"""

import io
import json
import pathlib
import sys
import tempfile

import numpy as np
import sentencepiece
import seqio
import t5.data.mixtures  # registers the tasks
import tensorflow as tf
from t5.data import postprocessors, preprocessors
from t5.evaluation import metrics, qa_utils
from transformers.data.metrics import squad_metrics

FOLDER = pathlib.Path(__file__).parent


def plain(value):
    """Return TensorFlow's and NumPy's values as JSON has them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    return value.decode() if isinstance(value, bytes) else value


def tensors(value):
    if isinstance(value, dict):
        return {key: tensors(item) for key, item in value.items()}
    no_texts = isinstance(value, list) and not value
    return tf.constant(value, tf.string if no_texts else None)


def preprocess(task, example):
    """Return what a registered task makes of a raw example before it is tokenized."""
    if "stsb" in task:
        example = example | {"label": np.float32(example["label"])}
    dataset = tf.data.Dataset.from_tensors(tensors(example))
    for step in seqio.TaskRegistry.get(task).preprocessors:
        if step is seqio.preprocessors.tokenize:
            break
        dataset = step(dataset)
    return [plain(output) for output in dataset.as_numpy_iterator()]


def text_preprocessors(data):
    tasks = {f"glue_{name}_v002": cases for name, cases in data["glue"].items()}
    tasks |= {f"super_glue_{name}_v102": cases for name, cases in data["super_glue"].items()}
    tasks |= {name: cases for name, cases in data.items() if name.startswith(("squad", "trivia_qa"))}
    for task, cases in tasks.items():
        for case in cases:
            case["output"] = preprocess(task, case["example"])
    for case in data["wmt"]:
        case["output"] = preprocess(case["task"], case["example"])
    for case in data["pad_punctuation"]:
        case["output"] = plain(preprocessors._pad_punctuation(tf.constant(case["text"])).numpy())


def catalogue(data):
    """T5's other tasks: texts, metrics, and the mixtures' rates ("examples" where t5 asks TFDS for their number)."""
    for task, cases in data["text"].items():
        for case in cases:
            case["output"] = preprocess(task, case["example"])
    made = {
        "mean_3class_f1": metrics.mean_multiclass_f1(num_classes=3),
        "mean_group_all_match": metrics.mean_group_metric(metrics.all_match),
        "deduplicated_squad": metrics.deduplicate_metric(metrics.squad),
    }
    for case in data["metrics"]:
        metric = made.get(case["metric"]) or getattr(metrics, case["metric"])
        case["result"] = plain(metric(case["targets"], case["predictions"]))
    for case in data["wsc_simple"]:
        case["result"] = postprocessors.wsc_simple(
            case["prediction"], example={"targets_pretokenized": case["candidate"]}
        )
    names = {"rate_num_examples": "examples", "rate_unsupervised": t5.data.rate_unsupervised(None)}
    for name in sorted(seqio.MixtureRegistry.names()):
        rates = seqio.MixtureRegistry.get(name)._task_to_rate
        data["mixtures"][name] = {
            task: names[rates[task].__name__] if callable(rates[task]) else rates[task] for task in sorted(rates)
        }


def squad(data):
    for case in data["squad"]["per_example"]:
        answers, prediction = case["answers"], case["prediction"]
        case["normalized_prediction"] = qa_utils.normalize_squad(prediction)
        case |= plain(metrics.squad([answers], [prediction]))
        for name, score in (("em", squad_metrics.compute_exact), ("f1", squad_metrics.compute_f1)):
            case[f"official_{name}"] = 100.0 * max(score(answer, prediction) for answer in answers)
    for row in data["normalize_squad"]:
        row[1:] = qa_utils.normalize_squad(row[0]), squad_metrics.normalize_answer(row[0])


def table_3(data):
    vocabulary, table = seqio.PassThroughVocabulary(data["vocab_size"]), data["table3"]
    words = table["text"].split()

    def encode(name, mask):
        bits = tf.constant([bit == "1" for bit in table[mask]])
        tokens = getattr(preprocessors, name)(tf.range(len(words)), bits, vocabulary, None).numpy()
        return " ".join(words[t] if t < len(words) else f"<{'XYZ'[data['first_sentinel'] - t]}>" for t in tokens)

    for name, mask in (("iid_replace_spans", "mask_iid"), ("random_spans", "mask_spans")):
        table[name] = [encode("noise_span_to_unique_sentinel", mask), encode("nonnoise_span_to_unique_sentinel", mask)]
    table["iid_drop_tokens"] = [encode("drop_noise_tokens", "mask_iid"), encode("drop_nonnoise_tokens", "mask_iid")]
    table["mass_style_inputs(one mask token)"] = encode("noise_token_to_sentinel", "mask_iid")


def models(data):
    """Train both models; also yield their files."""
    corpus = data["corpus"]
    for kind in ("unigram", "bpe"):
        values, file = data[kind], io.BytesIO()
        settings = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "num_threads": 1, "hard_vocab_limit": False}
        settings |= {"model_type": kind, "vocab_size": values["vocab_size"], "minloglevel": 1}
        text = iter(corpus * data["repeat"])
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=text, model_writer=file, **settings)
        yield f"spm/{kind}.model", file.getvalue()
        model = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
        values["pieces"] = [model.id_to_piece(i) for i in range(len(model))]
        values["rows"][: len(corpus)] = [{"text": text} for text in corpus]
        for row in values["rows"]:
            text, ids = row["text"], model.encode(row["text"])
            row |= {"normalized": model.normalize(text), "pieces": model.encode(text, out_type=str), "ids": ids}
            row["decoded"] = model.decode(ids)
        known = [row for row in values["rows"] if model.unk_id() not in row["ids"]]
        same = [row for row in known if model.normalize(row["decoded"]) == row["normalized"]]
        values["lossless_on_texts_without_unk"] = [len(same), len(known)]
        with tempfile.NamedTemporaryFile() as copy:
            copy.write(file.getvalue())
            copy.flush()
            vocabulary = seqio.SentencePieceVocabulary(copy.name, 100)
            vocabulary.encode("")  # reads the file
        case = values["seqio_extra_ids_100"]
        ids, hello = vocabulary.encode(case["text"]), vocabulary.encode("hello world")
        case |= {name: getattr(vocabulary, name) for name in ("vocab_size", "eos_id", "pad_id", "unk_id")}
        case |= {name: vocabulary.encode(name)[-1] for name in ("<extra_id_0>", "<extra_id_99>")}
        case |= {"encode": ids, "encode_tf": plain(vocabulary.encode_tf(case["text"]).numpy())}
        case |= {"decode": vocabulary.decode(ids), "decode_stops_at_eos": vocabulary.decode([*hello, 1, *ids])}
        case["decode_out_of_range"] = vocabulary.decode([*vocabulary.encode("hello"), vocabulary.vocab_size])
        case["decode_tf"] = plain(vocabulary.decode_tf(tf.constant(hello)).numpy())


def main():
    check, changed = "--check" in sys.argv[1:], []
    makers = {"text_preprocessors": text_preprocessors, "catalogue": catalogue, "metrics": squad}
    makers |= {"pretraining_objectives": table_3, "sentencepiece": models}
    for name, make in makers.items():
        data = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        files = dict(make(data) or ())
        files[f"{name}.json"] = (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()
        for file, content in files.items():
            path = FOLDER / file
            if path.read_bytes() != content:
                changed.append(file)
                if not check:
                    path.write_bytes(content)
    print("differ:" if check else "written:", ", ".join(changed) or "none")
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
