"""Real text that needs no download: what is written in every Python, split by source and made into examples.

Two kinds of source: a topic of the language reference (`pydoc_data.topics`) and a top-level module or package of the
standard library (its docstrings and signatures, parsed from the files, never imported). A source is whole in `train`
or in `validation`, by a hash of its name; a sentence or signature found in both is left out of `train`, and a repeated
one is kept once. For one version of Python everything here is always the same.

Must not know: TensorFlow, SeqIO, tokens, models.
"""

import ast
import functools
import hashlib
import os
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tasks import metrics
from tasks.errors import MissingFileError

SPLITS = ("train", "validation")
KINDS = ("class", "function", "language", "module")  # what a passage describes; "language" is the reference's

_VALIDATION_SHARE = 1 / 8  # of the sources
_NOT_LIBRARY = {
    *("__pycache__", "dist-packages", "ensurepip", "idlelib", "lib-dynload", "lib2to3", "pydoc_data"),
    *("site-packages", "test", "tests", "turtledemo"),
}
_MAX_PARAMETERS, _MAX_SUMMARY_WORDS, _MAX_DEFAULT = 8, 12, 20


class Passage(NamedTuple):
    """The prose of one docstring or reference topic."""

    source: str
    kind: str
    sentences: tuple[str, ...]


class Function(NamedTuple):
    """A signature; `self` and `cls` are left out, a parameter without default has None, `summary` may be empty."""

    source: str
    name: str
    parameters: tuple[tuple[str, str | None], ...]
    summary: str


class Text(NamedTuple):
    """What one split holds."""

    passages: list[Passage]
    functions: list[Function]


class Question(NamedTuple):
    """As in SQuAD; each answer is right, and each is in the context."""

    context: str
    question: str
    answers: tuple[str, ...]


# ---------------------------------------------------------------------------------------------------- text to sentences

_BULLET = re.compile(r"(?m)^\s*(?:[*+-]|\d+\.)\s+")
_NOT_PROSE = re.compile(r">>>|::=|[-=*^]{4}|  \S.*   |^\s*(?:\.\.|:\w+|@)", re.MULTILINE)  # code, grammar, tables
_CODE = re.compile(r"[={}|\\<>]|__\w+__ |%\w| \d+ \d")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]*\s+(?=[\"'(A-Z])")


def sentences(text: str) -> tuple[str, ...]:
    """The English sentences of a docstring or topic, each on one line; code, grammar, tables and fragments left out."""
    found = []
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*[*+-] )", text):
        if _NOT_PROSE.search(paragraph):
            continue
        for sentence in _SENTENCE_END.split(" ".join(_BULLET.sub("", paragraph).split())):
            plain = sum(c.islower() or c == " " for c in sentence)
            if len(sentence.split()) >= 4 and len(sentence) <= 300 and plain >= 0.75 * len(sentence):
                found += [sentence] if sentence[0].isupper() and not _CODE.search(sentence) else []
    return tuple(found)


def normalized(text: str) -> str:
    """Letters and digits alone, in lower case: two texts that agree in this count as the same."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def _hash(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\n".join(parts).encode()).digest()[:8], "big")


# ---------------------------------------------------------------------------------------------------- sources to splits


def _library_files() -> Iterator[tuple[str, str]]:
    """Path and top-level name of each source file of the standard library, in a fixed order."""
    root = sysconfig.get_path("stdlib")
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _NOT_LIBRARY)
        for file in sorted(files):
            if file.endswith(".py") and not file.startswith("_sysconfigdata"):
                path = os.path.join(folder, file)
                yield path, os.path.relpath(path, root).removesuffix(".py").split(os.sep)[0]


_KIND_OF_NODE: dict[type, str] = {
    ast.Module: "module",
    ast.ClassDef: "class",
    ast.FunctionDef: "function",
    ast.AsyncFunctionDef: "function",
}


def _function(source: str, node: ast.FunctionDef | ast.AsyncFunctionDef, summary: str) -> Function:
    arguments = node.args
    positional = arguments.posonlyargs + arguments.args
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults + arguments.kw_defaults
    pairs = zip(positional + arguments.kwonlyargs, defaults, strict=True)
    parameters = [(a.arg, ast.unparse(d) if d else None) for a, d in pairs if a.arg not in ("self", "cls")]
    return Function(source, node.name, tuple(parameters), summary)


def _read() -> Text:
    """All passages and functions, before they are split.

    Raises FileNotFoundError where Python was installed without the sources of its standard library.
    """
    from pydoc_data.topics import topics

    passages = [Passage(f"topic {name}", "language", sentences(topics[name])) for name in sorted(topics)]
    functions = []
    for path, name in _library_files():
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes in strings
            tree = ast.parse(file.read(), path)
        source = f"module {name.strip('_')}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                prose = sentences(ast.get_docstring(node) or "")
                passages.append(Passage(source, _KIND_OF_NODE[type(node)], prose))
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    functions.append(_function(source, node, prose[0] if prose else ""))
    if not functions:
        raise MissingFileError(
            f"no Python sources in {sysconfig.get_path('stdlib')}: the quickstart's text is the standard library. "
            "Use a Python that has its .py files (python.org's, a distribution's, pyenv's, conda's or uv's)"
        )
    return Text(passages, functions)


def split_of(source: str) -> str:
    """Where a source belongs, by its name alone."""
    return "validation" if _hash("quickstart", source) < _VALIDATION_SHARE * 2**64 else "train"


def _kept_once(seen: set[str], text: str) -> bool:
    key = normalized(text)
    if key in seen:
        return False
    seen.add(key)
    return True


@functools.cache
def texts() -> dict[str, Text]:
    """Both splits, without a sentence or a signature in common. Takes some seconds, once."""
    everything = _read()
    splits: dict[str, Text] = {}
    seen_sentences: set[str] = set()
    seen_signatures: set[str] = set()
    for name in ("validation", "train"):  # what is in both stays in validation
        passages, functions = [], []
        others = frozenset(seen_sentences)
        for passage in everything.passages:
            if split_of(passage.source) == name:
                kept = tuple(s for s in passage.sentences if _kept_once(seen_sentences, s))
                if kept:
                    passages.append(passage._replace(sentences=kept))
        for function in everything.functions:
            if split_of(function.source) == name and _kept_once(seen_signatures, signature(function)):
                foreign = normalized(function.summary) in others
                functions.append(function._replace(summary="") if foreign else function)
        splits[name] = Text(passages, functions)
    return splits


# --------------------------------------------------------------------------------------------------- splits to examples


def labelled_sentences(split: str) -> list[tuple[str, str]]:
    """Sentences with the kind of thing they describe, as many of each kind: as many as the rarest has."""
    by_kind: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for passage in texts()[split].passages:
        by_kind[passage.kind] += passage.sentences
    size = min(map(len, by_kind.values()))
    chosen = [(s, kind) for kind, found in by_kind.items() for s in sorted(found, key=_hash)[:size]]
    return sorted(chosen, key=lambda pair: _hash(pair[0]))


def signature(function: Function) -> str:
    """`split ( sep = None , maxsplit = -1 )`: spaces round the marks, so that a name is written alike everywhere."""
    shown = [name if default is None else f"{name} = {default}" for name, default in function.parameters]
    return f"{function.name} ( {' , '.join(shown)} )"


def _default_questions(function: Function) -> Iterator[Question]:
    if not 2 <= len(function.parameters) <= _MAX_PARAMETERS:
        return
    shown = signature(function)
    summary = " ".join(function.summary.split()[:_MAX_SUMMARY_WORDS])
    context = f"{shown} : {summary}" if summary else shown
    for name, default in function.parameters:
        if default is None or len(default) > _MAX_DEFAULT or " " in default or not name.strip("_"):
            continue
        # More than half of all defaults are None: a quarter of those is enough, and leaves no answer that fits most.
        if not metrics.normalize_answer(default) or (default == "None" and _hash(shown, name) % 4):
            continue
        unquoted = default.strip("'")
        answers = (default,) if unquoted == default else (default, unquoted)
        yield Question(context, f"What is the default of {name} ?", answers)


_EXCEPTION = re.compile(r"\b[A-Z]\w*(?:Error|Exception|Warning|Exit|Iteration|Interrupt)\b")


def _exception_questions(passage: Passage) -> Iterator[Question]:
    for sentence in passage.sentences:
        names = tuple(dict.fromkeys(_EXCEPTION.findall(sentence)))
        if names:
            yield Question(sentence, "Which exception is it about ?", names)


def questions(split: str) -> list[Question]:
    """The default of a parameter, given a signature and what its function does; the exception that a sentence names."""

    def collect(ask: Callable[..., Iterator[Question]], items: list) -> list[Question]:
        return [question for item in items for question in ask(item)]

    text = texts()[split]
    found = collect(_default_questions, text.functions) + collect(_exception_questions, text.passages)
    return sorted(found, key=lambda q: _hash(q.context, q.question))
