"""Make the tiny random models in families/ and what transformers computes with them, one folder per model.

transformers and PyTorch are not dependencies of the project, so they have an environment of their own:

    python3.11 -m venv /tmp/peer
    /tmp/peer/bin/pip install torch==2.13.0 transformers==5.23.0
    /tmp/peer/bin/python tests/golden/make_families.py

With `--back FOLDER` it writes nothing: FOLDER has a folder for each model, `python -m t5x_lite.convert
tests/golden/families/NAME FOLDER/NAME --to=huggingface`, which it loads, names missing and unexpected tensors, and
compares logits.

values.npz holds the inputs (0 is padding), the logits of `decoder_input_tokens`, 12 greedy tokens and the best of three
beams with its score, both without the start token, and `state`, each tensor of transformers' model with its
shape. transformers divides a beam's log-probability by length^length_penalty, T5X and this project by
((5 + length) / 6)^alpha: with both exponents 0 both rank by log-probability, so the beams are made with
length_penalty=0 and to be compared with alpha=0.
"""

import argparse
import pathlib
import shutil

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent / "families"
BEAMS, NEW_TOKENS = 3, 12
# Heads times d_kv is not d_model, and no two sizes are equal, so that no axis can be mistaken for another.
SIZES = {
    "vocab_size": 96,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 20,
    "num_layers": 2,
    "num_heads": 3,
    "decoder_start_token_id": 0,
}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
T5 = {"seed": 9, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}
# The config of each model. Some keys are not of the config: `seed`, the first whose values tell something; `kind`, the
# model type; `head`, an output table of its own, as the published models have, which transformers 5 makes for no T5;
# `dtype` and `shards`, how the file is written.
MODELS = {
    "t5": T5,
    "t5_bfloat16": {**T5, "dtype": torch.bfloat16},
    "t5_float16": {**T5, "dtype": torch.float16},
    "flan_shards": {"seed": 17, **GATED, "head": True, "shards": "16KB"},
    "ul2": {"seed": 17, **GATED, "head": True, "feed_forward_proj": "gated-silu"},
    "byt5": {
        **GATED,
        "seed": 3,
        "head": True,
        "vocab_size": 384,
        "d_model": 12,
        "d_ff": 14,
        "num_layers": 3,
        "num_decoder_layers": 1,
        "num_heads": 2,
    },
    "mt5": {"seed": 39, "kind": "mt5"},
    "umt5": {"seed": 19, "kind": "umt5", "head": True},
    "umt5_tied": {"seed": 149, "kind": "umt5", "num_layers": 1},
}
# With a head for classes, T5ForSequenceClassification: its values.npz has inputs and logits of the classes.
CLASSIFIERS = {
    "t5_classes": {**T5, "num_labels": 3},
    "umt5_classes": {"seed": 19, "kind": "umt5", "num_labels": 1, "id2label": {"0": "similarity"}},
}
CLASSES = {
    "t5": (transformers.T5Config, transformers.T5ForConditionalGeneration),
    "mt5": (transformers.MT5Config, transformers.MT5ForConditionalGeneration),
    "umt5": (transformers.UMT5Config, transformers.UMT5ForConditionalGeneration),
}
CLASSIFIER_CLASSES = {
    "t5": transformers.T5ForSequenceClassification,
    "umt5": transformers.UMT5ForSequenceClassification,
}


def make(folder, seed, kind="t5", head=False, dtype=torch.float32, shards="1GB", **config):
    """Write a random model to `folder`."""
    torch.manual_seed(seed)
    config_class, model_class = CLASSES[kind]
    model = model_class(config_class(**SIZES | config))
    # Random models' logits are nearly uniform, and tied ones repeat their last token. These are neither.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter.copy_(torch.exp(0.3 * torch.randn_like(parameter)))
            elif "relative_attention_bias" in name:
                parameter.normal_(std=2.0)
            elif name == "shared.weight":
                parameter.normal_(std=0.7 if head or kind == "mt5" else 2.0)
            elif not head and name.endswith("o.weight"):
                parameter *= 6
        if head:
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        model.lm_head.weight[1] *= 3  # a large row is often the largest logit, so that rows end
    model.to(dtype).save_pretrained(folder, max_shard_size=shards)
    (folder / "generation_config.json").unlink()
    if head:  # as the published files have it; transformers 5 writes true in every case
        file = folder / "config.json"
        text = file.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
        file.write_text(text)


def make_classifier(folder, seed, kind="t5", **config):
    """Write a random model with a head for classes to `folder`, and return it."""
    torch.manual_seed(seed)
    model = CLASSIFIER_CLASSES[kind](CLASSES[kind][0](**SIZES | config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.5 if "classification_head" in name or "shared" in name else 0.25)
            if "layer_norm" in name:
                parameter.copy_(torch.exp(parameter))
    model.save_pretrained(folder)
    return model.eval()


def classes_of(model, encoder):
    """Return logits of the classes, row by row: transformers wants equally many end tokens in all rows of a batch."""
    rows = [torch.tensor(row[row != 0])[None].long() for row in encoder]
    with torch.no_grad():
        return np.concatenate([model(row).logits.numpy() for row in rows])


def load(folder):
    """Return the model in float32. Raises AssertionError if a tensor is missing, unexpected or of another shape."""
    tied = '"tie_word_embeddings": true' in (folder / "config.json").read_text()
    kind = transformers.AutoConfig.from_pretrained(folder).model_type
    model, report = CLASSES[kind][1].from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    # transformers 5 scales the outputs of every UMT5 by 1/sqrt(d_model). transformers 4 and T5X do so only where the
    # file says that the tables are tied.
    if kind == "umt5":
        model.config.tie_word_embeddings = tied
    return model.eval()


def inputs(vocab_size, rng):
    """Return inputs [3, 11] that end with 1, and decoder inputs [3, 6] that start with 0, both padded with 0."""
    encoder, decoder = (rng.integers(3, vocab_size, (3, length)) for length in (11, 6))
    for row, (inputs_length, targets_length) in enumerate([(11, 6), (7, 4), (4, 5)]):
        encoder[row, inputs_length - 1 :] = 0
        encoder[row, inputs_length - 1] = 1
        decoder[row, targets_length:] = 0
    decoder[:, 0] = 0
    return encoder.astype(np.int32), decoder.astype(np.int32)


def logits_of(model, encoder, decoder):
    encoder, decoder = torch.tensor(encoder).long(), torch.tensor(decoder).long()
    with torch.no_grad():
        return model(encoder, attention_mask=(encoder != 0).long(), decoder_input_ids=decoder).logits.numpy()


def values(model, rng):
    """Return the arrays of values.npz, or None if `is_telling` is false or T5X's beam search may find another beam."""
    encoder, decoder = inputs(model.config.vocab_size, rng)
    generate = {
        "inputs": torch.tensor(encoder).long(),
        "attention_mask": torch.tensor(encoder != 0).long(),
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "return_dict_in_generate": True,
    }
    greedy = model.generate(**generate)
    # transformers drops a sequence that ends with less probability than `num_beams` others at its step; T5X does not.
    # Where a wider beam finds nothing better, that makes no difference.
    options = {"length_penalty": 0.0, "output_scores": True}
    beam, wide = (model.generate(**generate, **options, num_beams=number) for number in (BEAMS, 3 * BEAMS))
    if not torch.allclose(beam.sequences_scores, wide.sequences_scores):
        return None
    arrays = {
        "encoder_input_tokens": encoder,
        "decoder_input_tokens": decoder,
        "logits": logits_of(model, encoder, decoder),
        "greedy": padded(greedy.sequences),
        "beam": padded(beam.sequences),
        "beam_scores": beam.sequences_scores.numpy(),
        "state": np.array([f"{name} {tuple(value.shape)}" for name, value in sorted(model.state_dict().items())]),
    }
    return arrays if is_telling(arrays["greedy"], arrays["beam"]) else None


def padded(sequences, ends=(1,)):
    """Return tokens [B, NEW_TOKENS] without the start token. After the end come zeros, for which beams have ones."""
    tokens = sequences.numpy()[:, 1:].astype(np.int32)
    tokens = np.pad(tokens, [(0, 0), (0, NEW_TOKENS - tokens.shape[1])])
    is_end = np.isin(tokens, ends)
    return np.where(np.cumsum(is_end, -1) - is_end > 0, 0, tokens)


def is_telling(greedy, beam, ends=(1,)):
    """Return whether the decoded tokens can tell right from wrong.

    The best beams ended, for T5X and transformers rank a beam that is cut short differently; greedy tokens are of many
    kinds and not the best beam of each row; a beam has some length.
    """
    is_end = np.isin(beam, ends)
    return (
        is_end.any(-1).all() and (beam != greedy).any() and len(np.unique(greedy)) >= 7 and is_end.argmax(-1).max() > 2
    )


def back(folder):
    """Load what was converted back to Hugging Face's format, and print how far its logits are from the golden's."""
    for name in MODELS:
        golden = np.load(FOLDER / name / "values.npz")
        model = load(folder / name)  # asserts that nothing is missing or unexpected
        got = logits_of(model, golden["encoder_input_tokens"], golden["decoder_input_tokens"])
        print(f"{name}: nothing missing or unexpected, logits differ by {np.abs(got - golden['logits']).max():.2g}")
    for name, config in CLASSIFIERS.items():
        golden = np.load(FOLDER / name / "values.npz")
        kind = CLASSIFIER_CLASSES[config.get("kind", "t5")]
        model, report = kind.from_pretrained(folder / name, output_loading_info=True)
        assert not any(report.values()), report
        got = classes_of(model.eval(), golden["encoder_input_tokens"])
        print(f"{name}: nothing missing or unexpected, logits differ by {np.abs(got - golden['logits']).max():.2g}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--back", type=pathlib.Path)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if options.back:
        return back(options.back)
    for name, config in MODELS.items():
        folder = FOLDER / name
        if folder.exists():
            shutil.rmtree(folder)
        make(folder, **config)
        arrays = values(load(folder), np.random.default_rng(config["seed"]))
        assert arrays, f"{name}: take another seed"
        np.savez_compressed(folder / "values.npz", **arrays)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{name}: {size} bytes, logits up to {np.abs(arrays['logits']).max():.1f}")
    for name, config in CLASSIFIERS.items():
        model = make_classifier(FOLDER / name, **config)
        encoder, _ = inputs(SIZES["vocab_size"], np.random.default_rng(config["seed"]))
        encoder[0, 4] = 1  # a pair: first </s> second </s>
        arrays = {"encoder_input_tokens": encoder, "logits": classes_of(model, encoder)}
        np.savez_compressed(FOLDER / name / "values.npz", **arrays)
        print(f"{name}: logits {arrays['logits'].round(2).tolist()}")


if __name__ == "__main__":
    main()
