"""One tiny model of each kind, for what every model must hold to."""

import dataclasses

import numpy as np
import tiny

from t5x_lite.bert import BertConfig
from t5x_lite.t5_encoder import T5EncoderConfig, t5_encoder
from t5x_lite.t5gemma import T5GemmaConfig

DECODER = dataclasses.replace(tiny.CONFIG, num_encoder_layers=0)
BERT = BertConfig(d_model=48, d_ff=96, num_heads=4, num_layers=2, vocab_size=264, max_length=64)

# The encoder has other sizes; a window and a pattern of layers, neither of which the stacks' lengths are multiples of.
T5GEMMA = T5GemmaConfig(
    d_model=48,
    d_ff=96,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    num_encoder_layers=2,
    num_decoder_layers=3,
    encoder_d_model=40,
    encoder_d_ff=64,
    encoder_num_heads=4,
    vocab_size=264,
    sliding_window=3,
    attention_softcap=5.0,
)
T5GEMMA_2 = dataclasses.replace(
    T5GEMMA,
    generation=2,
    num_kv_heads=2,
    encoder_d_model=0,
    encoder_num_heads=0,
    attention_softcap=0.0,
    logits_softcap=0.0,
    global_rope_theta=1e6,
    global_rope_factor=8.0,
)

CONFIGS = {
    "encoder-decoder": tiny.CONFIG,
    "decoder": DECODER,
    "prefix LM": dataclasses.replace(DECODER, prefix_lm=True),
    "encoder": t5_encoder(tiny.CONFIG, embed_dim=40),
    "encoder classifier": T5EncoderConfig(**vars(tiny.CONFIG) | {"head": "classify", "num_labels": 3}),
    "T5Gemma": T5GEMMA,
    "T5Gemma 2": T5GEMMA_2,
    "BERT": BERT,
    "BERT classifier": dataclasses.replace(BERT, heads=("pooler", "classify"), num_labels=3),
}


def lengths(config) -> dict[str, int]:
    is_short = isinstance(config, BertConfig) or getattr(config, "head", "") == "classify"
    return {"inputs": 24} if is_short else {"inputs": 24, "targets": 16}


def batch(config, rows: int = 8, pack: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of random examples, as the model's feature converter makes them."""
    from t5x_lite.model.families import model_of

    converter, random = model_of(config).feature_converter(pack), np.random.default_rng(seed)
    widths = converter.widths(lengths(config), {*converter.features, *converter.optional_lengths})
    most = {"random": 2, "label": 3, "segments": 2}
    examples = {
        name: random.integers(0 if name in most else 2, most.get(name, 264), (rows, width)).astype(np.int32)
        for name, width in widths.items()
    }
    return {name: x[:rows] for name, x in converter.convert(examples, widths).items()}
