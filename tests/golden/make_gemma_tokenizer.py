"""Make the tiny tokenizer in gemma_tokenizer/ as Gemma's are made, and the ids that transformers gives with it.

In the environment of make_families.py, with sentencepiece 0.2.3:

    /tmp/peer/bin/pip install sentencepiece==0.2.3 protobuf
    /tmp/peer/bin/python tests/golden/make_gemma_tokenizer.py

SentencePiece learns a BPE model with byte fallback from help texts of Python 3.11 and lines of our own, with Gemma's
settings and special pieces, ten <unusedN> and runs of two to four spaces for its 99 and 31. transformers turns
tokenizer.model into tokenizer.json, to which <image_soft_token> is added as Gemma 3's is.

texts.json has texts of our own and random ones of pieces, with the ids that transformers gives without tokens around
them, and the text that it makes of the ids.
"""

import io
import json
import pathlib
import random
import tempfile
from pydoc_data.topics import topics

import sentencepiece
import transformers

FOLDER = pathlib.Path(__file__).parent / "gemma_tokenizer"
LINES = ["Zoë naïve café über Straße — “quoted” … ½ ﬁ 漢字 かな 日本", "a  b   c    d if x:\n    return y"]
PIECES = [
    *("<mask>", *(f"<unused{i}>" for i in range(10)), "<start_of_turn>", "<end_of_turn>"),
    *("\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<table>", "</table>"),
]
TEXTS = [
    *("", " ", "  ", "\n", "\t", "\t\t x", "The statement is executed.", " leading and trailing ", "two  spaces"),
    *("   three", "a    b", "     five", "\n      six\n", " " * 7, " " * 9 + "nine", "x" + " " * 23 + "y", " \n \n"),
    *("\n\n", "one\n\ntwo\n\n\nthree\n\n\n\nfour\n\n\n\n\n\n", "\r\n", "1234567 3.14 10,000", "CamelCase snake_case"),
    *("Zoë's naïve café", "漢字 and 龍", "😀 👩‍👩‍👧 é é", "\u00a0nbsp \u200b \ufeff", "½ ﬁ Ⅷ", "\x00\x07 control"),
    *("<start_of_turn>user\nHello!<end_of_turn>\n<start_of_turn>model\n", "<bos>The <eos> <pad><unk>", "a<bos>b"),
    *("<bos>  <eos>", "<mask> is<mask>", "<table> <td></table>", "<unused0><unused9> <unused10>", "<0x41> <0x0A>"),
    *("a<image_soft_token>b", "<extra_id_0> </s>", "▁literal ▁▁▁▁▁ ▁", "< bos>", "<<bos>>", "<start_of_turn", "\\n"),
]


def learn(folder):
    model = io.BytesIO()
    texts = [part for _, text in sorted(topics.items())[:20] for part in text.split("\n\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts + 20 * LINES),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=PIECES,
        num_threads=1,
        minloglevel=1,
        **{f"{name}_id": i for i, name in enumerate(("pad", "eos", "bos", "unk"))},
        **{f"{name}_piece": f"<{name}>" for name in ("pad", "eos", "bos", "unk")},
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def random_texts(tokenizer, count=120, seed=5):
    """Return texts of random pieces and of few different characters, where merges compete."""
    rng = random.Random(seed)
    pieces = [tokenizer.convert_ids_to_tokens(i).replace("▁", " ") for i in range(25 + 256, 700)]
    few = [" ", "  ", "\n", "\t", "a", "e", "=", "*", "_", "é", "龍", "<bos>", "<start_of_turn>"]
    for k in range(count):
        yield "".join(rng.choice(few if k % 2 or rng.random() < 0.3 else pieces) for _ in range(rng.randint(5, 25)))


def main():
    FOLDER.mkdir(exist_ok=True)
    learn(FOLDER)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "tokenizer.model").write_bytes((FOLDER / "tokenizer.model").read_bytes())
        tokenizer = transformers.GemmaTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
        tokenizer.save_pretrained(folder / "out")
        config = json.loads((folder / "out" / "tokenizer_config.json").read_text())
        config = {
            key: value for key, value in config.items() if key not in ("is_local", "local_files_only", "vocab_file")
        }
        (FOLDER / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
        model = json.loads((folder / "out" / "tokenizer.json").read_text())
        (FOLDER / "tokenizer.json").write_text(json.dumps(model, ensure_ascii=False) + "\n", encoding="utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    rows = []
    for text in [*TEXTS, *random_texts(tokenizer)]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        rows.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=False)})
    lines = ",\n".join(json.dumps(row) for row in rows)
    (FOLDER / "texts.json").write_text(f"[\n{lines}\n]\n")
    print(len(tokenizer), sum(row["text"] != row["decoded"] for row in rows), "texts change")


if __name__ == "__main__":
    main()
