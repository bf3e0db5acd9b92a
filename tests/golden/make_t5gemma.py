"""Make the tiny random models in t5gemma/ and what transformers computes with them, one folder per model.

transformers and PyTorch are not dependencies of the project: see make_families.py for their environment, and for
values.npz, whose `inputs`, `padded` and `is_telling` are used here.

    /tmp/peer/bin/python tests/golden/make_t5gemma.py

With `--back FOLDER` it writes nothing: FOLDER has a folder for each model, `python -m t5x_lite.convert
tests/golden/t5gemma/NAME FOLDER/NAME --to=huggingface`, which it loads, names missing and unexpected tensors, and
compares logits.

Each model has the shape of a published one, made small: heads as many as keys' (T5Gemma s to xl), grouped (2B), an
encoder larger than the decoder (9B-2B), two end tokens (the instruction-tuned); T5Gemma 2 with one head of keys (270M,
1B) and two (4B), and a vision tower, of which the text has no use. values.npz also has the mean loss of `labels` and,
of its gradient in each of `gradient_names`, products with the random vectors of `probes`, and its norm.
"""

import argparse
import pathlib
import shutil
import zlib

import numpy as np
import torch
import transformers
from make_families import BEAMS, NEW_TOKENS, inputs, is_telling, padded

FOLDER = pathlib.Path(__file__).parent / "t5gemma"
START, EOI = 2, 90
VOCABULARY = 96
STACK = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "query_pre_attn_scalar": 6,
    "sliding_window": 3,
    "max_position_embeddings": 64,
}
FIRST = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 8.0}
ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
SECOND = {"num_hidden_layers": 7, "attn_logit_softcapping": None, "rope_parameters": ROPE}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 14,
    "patch_size": 14,
    "vision_use_head": False,
}
LARGER = {"hidden_size": 24, "intermediate_size": 28, "num_attention_heads": 6, "num_key_value_heads": 3}
# Changes of encoder and decoder, and of the encoder alone; `seed`, the first whose values tell something; `dtype` and
# `shards`, how the file is written.
MODELS = {
    "small": {"seed": 129, "both": {"num_key_value_heads": 4}},
    "2b": {"seed": 88},
    "9b_2b": {"seed": 116, "encoder": {**LARGER, "num_hidden_layers": 4}},
    "2b_it": {"seed": 78, "eos_token_id": [1, 7], "dtype": torch.bfloat16, "shards": "16KB"},
    "2_270m": {"seed": 52, "second": True, "both": {"num_key_value_heads": 1}},
    "2_4b": {"seed": 223, "second": True, "dtype": torch.bfloat16, "shards": "16KB"},
}


def make(folder, seed, second=False, both=None, encoder=None, dtype=torch.float32, shards="1GB", **config):
    """Write a random model to `folder`."""
    torch.manual_seed(seed)
    decoder = STACK | (SECOND if second else FIRST) | (both or {})
    if second:
        images = {"boi_token_index": EOI - 1, "eoi_token_index": EOI, "image_token_index": EOI + 1}
        outer = {"text_config": decoder, "vision_config": VISION, "mm_tokens_per_image": 1, **images}
        config_class, model_class = transformers.T5Gemma2Config, transformers.T5Gemma2ForConditionalGeneration
        config |= {"eoi_token_index": EOI, "image_token_index": EOI + 1}
    else:
        outer = decoder | (encoder or {})
        config_class, model_class = transformers.T5GemmaConfig, transformers.T5GemmaForConditionalGeneration
        config["vocab_size"] = VOCABULARY
    model = model_class(config_class(encoder=outer, decoder=dict(decoder), **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # With little of a token's own embedding in the outputs, tied tables do not repeat the last token.
            table = "embed_tokens" in name or "lm_head" in name
            std = 0.3 if parameter.ndim < 2 else 0.2 if table else 1.5 * parameter.shape[-1] ** -0.5
            parameter.normal_(mean=3.0 if "layers" in name and "post" in name else 0.0, std=std)
        model.get_output_embeddings().weight[1] *= 3  # so that rows end
    model.to(dtype).save_pretrained(folder, max_shard_size=shards)
    (folder / "generation_config.json").unlink()


def load(folder):
    """Return the model in float32. Raises AssertionError if a tensor is missing, unexpected or of another shape."""
    kind = transformers.AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, kind.architectures[0])
    options = {"dtype": torch.float32, "output_loading_info": True, "attn_implementation": "eager"}
    model, report = model_class.from_pretrained(folder, **options)
    assert not any(report.values()), report
    return model.eval()


def logits_of(model, encoder, decoder):
    encoder, decoder = torch.tensor(encoder).long(), torch.tensor(decoder).long()
    decoder[:, 0] = START
    mask = (encoder != 0).long()
    ones = torch.ones_like(decoder)
    return model(encoder, attention_mask=mask, decoder_input_ids=decoder, decoder_attention_mask=ones).logits


def values(model, seed):
    """Return the arrays of values.npz, or None if they tell too little, or wider beams find other tokens."""
    rng = np.random.default_rng(seed)
    encoder, decoder = inputs(EOI - 2, rng)
    encoder[0, 3] = EOI
    generate = {
        "inputs": torch.tensor(encoder).long(),
        "attention_mask": torch.tensor(encoder != 0).long(),
        "decoder_start_token_id": START,
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "return_dict_in_generate": True,
        "pad_token_id": 0,
        "eos_token_id": model.config.eos_token_id,
    }
    options = {"length_penalty": 0.0, "output_scores": True}
    with torch.no_grad():
        greedy = model.generate(**generate)
        beam, wide = (model.generate(**generate, **options, num_beams=number) for number in (BEAMS, 3 * BEAMS))
    if not torch.allclose(beam.sequences_scores, wide.sequences_scores):
        return None
    ends = np.atleast_1d(model.config.eos_token_id)
    tokens = {"greedy": padded(greedy.sequences, ends), "beam": padded(beam.sequences, ends)}
    if not is_telling(*tokens.values(), ends):
        return None
    logits = logits_of(model, encoder, decoder)
    labels = torch.tensor(rng.integers(3, VOCABULARY, decoder.shape))
    labels[:, 1:][torch.tensor(decoder[:, 1:] == 0)] = -100  # padding, which torch's loss ignores
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    gradients = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    return {
        "encoder_input_tokens": encoder,
        "decoder_input_tokens": decoder,
        "logits": logits.detach().numpy(),
        "beam_scores": beam.sequences_scores.numpy(),
        "state": np.array([f"{name} {tuple(value.shape)}" for name, value in sorted(model.state_dict().items())]),
        "labels": labels.numpy(),
        "loss": np.float32(loss.item()),
        **tokens,
        "gradient_names": np.array(list(gradients)),
        "gradients": np.array([probes(name, x) for name, x in gradients.items()], np.float32),
    }


def probes(name, gradient):
    """Return the products of a gradient with four vectors that its name determines, and its norm."""
    vectors = np.random.default_rng(zlib.crc32(name.encode())).standard_normal((4, gradient.size))
    return [*(vectors @ gradient.reshape(-1)), np.linalg.norm(gradient)]


def back(folder):
    """Load what was converted back to Hugging Face's format, and print how far its logits are from the golden's."""
    for name in MODELS:
        golden = np.load(FOLDER / name / "values.npz")
        model = load(folder / name)  # asserts that nothing is missing or unexpected
        with torch.no_grad():
            got = logits_of(model, golden["encoder_input_tokens"], golden["decoder_input_tokens"]).numpy()
        print(f"{name}: nothing missing or unexpected, logits differ by {np.abs(got - golden['logits']).max():.2g}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--back", type=pathlib.Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if options.back:
        return back(options.back)
    for name, config in MODELS.items():
        folder = FOLDER / name
        for seed in range(config["seed"], config["seed"] + 400):
            if folder.exists():
                shutil.rmtree(folder)
            make(folder, **config | {"seed": seed})
            if arrays := values(load(folder), seed):
                break
        else:
            raise SystemExit(f"{name}: no seed tells enough")
        np.savez_compressed(folder / "values.npz", **arrays)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{name}: seed {seed}, {size} bytes, logits up to {np.abs(arrays['logits']).max():.1f}")


if __name__ == "__main__":
    main()
