"""Real text that needs no download: Python's language reference and docstrings, split and turned into examples.

A source is a topic of the language reference (`pydoc_data.topics`) or a top-level module or package of the standard
library (its docstrings and signatures, parsed from the files, never imported). Each source belongs to `train` or
`validation`, by a hash of its name. Sentences and signatures are deduplicated; those in both splits are removed from
`train`. The result is deterministic for a version of Python.

Must not import: TensorFlow, SeqIO, tokens, models.
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
KINDS = ("class", "function", "language", "module")  # topics of passages; "language" is the language reference

_VALIDATION_SHARE = 1 / 8  # of the sources
_NOT_LIBRARY = {
    "__pycache__",
    "dist-packages",
    "ensurepip",
    "idlelib",
    "lib-dynload",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
_MAX_PARAMETERS, _MAX_SUMMARY_WORDS, _MAX_DEFAULT = 8, 12, 20


class Passage(NamedTuple):
    """The prose of one docstring or reference topic."""

    source: str
    kind: str
    sentences: tuple[str, ...]


class Function(NamedTuple):
    """A signature without `self` and `cls`. A parameter without default has None; `summary` may be empty."""

    source: str
    name: str
    parameters: tuple[tuple[str, str | None], ...]
    summary: str


class Text(NamedTuple):
    """The passages and functions of a split."""

    passages: list[Passage]
    functions: list[Function]


class Question(NamedTuple):
    """A question as in SQuAD. All answers are accepted, and all are in the context."""

    context: str
    question: str
    answers: tuple[str, ...]


# ---------------------------------------------------------------------------------------------------- text to sentences

_BULLET = re.compile(r"(?m)^\s*(?:[*+-]|\d+\.)\s+")
_NOT_PROSE = re.compile(r">>>|::=|[-=*^]{4}|  \S.*   |^\s*(?:\.\.|:\w+|@)", re.MULTILINE)  # code, grammar, tables
_CODE = re.compile(r"[={}|\\<>]|__\w+__ |%\w| \d+ \d")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]*\s+(?=[\"'(A-Z])")


def sentences(text: str) -> tuple[str, ...]:
    """Return the English sentences of a docstring or topic, without code, grammar, tables and fragments."""
    result = []
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*[*+-] )", text):
        if _NOT_PROSE.search(paragraph):
            continue
        for sentence in _SENTENCE_END.split(" ".join(_BULLET.sub("", paragraph).split())):
            plain = sum(c.islower() or c == " " for c in sentence)
            if len(sentence.split()) >= 4 and len(sentence) <= 300 and plain >= 0.75 * len(sentence):
                result += [sentence] if sentence[0].isupper() and not _CODE.search(sentence) else []
    return tuple(result)


def normalized(text: str) -> str:
    """Return the letters and digits in lower case, the key for deduplication."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def _hash(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\n".join(parts).encode()).digest()[:8], "big")


# ---------------------------------------------------------------------------------------------------- sources to splits


def _library_files() -> Iterator[tuple[str, str]]:
    """Yield path and top-level name of each source file of the standard library, in a fixed order."""
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
    """Return all passages and functions, before they are split.

    Raises MissingFileError if Python was installed without the sources of its standard library.
    """
    from pydoc_data.topics import topics

    passages = [Passage(f"topic {name}", "language", sentences(topics[name])) for name in sorted(topics)]
    functions = []
    for path, name in _library_files():
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in strings
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
            "Use a Python that includes its .py files (python.org's, a distribution's, pyenv's, conda's or uv's)"
        )
    return Text(passages, functions)


def split_of(source: str) -> str:
    """Return the split of a source, by a hash of its name."""
    return "validation" if _hash("quickstart", source) < _VALIDATION_SHARE * 2**64 else "train"


def _is_new(seen: set[str], text: str) -> bool:
    """Return whether `text` is not in `seen`, and add it."""
    key = normalized(text)
    if key in seen:
        return False
    seen.add(key)
    return True


@functools.cache
def texts() -> dict[str, Text]:
    """Return both splits, without common sentences or signatures. The first call takes some seconds."""
    everything = _read()
    splits: dict[str, Text] = {}
    seen_sentences: set[str] = set()
    seen_signatures: set[str] = set()
    for name in ("validation", "train"):  # duplicates stay in validation
        passages, functions = [], []
        others = frozenset(seen_sentences)
        for passage in everything.passages:
            if split_of(passage.source) == name:
                unique = tuple(s for s in passage.sentences if _is_new(seen_sentences, s))
                if unique:
                    passages.append(passage._replace(sentences=unique))
        for function in everything.functions:
            if split_of(function.source) == name and _is_new(seen_signatures, signature(function)):
                foreign = normalized(function.summary) in others
                functions.append(function._replace(summary="") if foreign else function)
        splits[name] = Text(passages, functions)
    return splits


# --------------------------------------------------------------------------------------------------- splits to examples


def labelled_sentences(split: str) -> list[tuple[str, str]]:
    """Return sentences with their kind, in equal numbers per kind (that of the rarest)."""
    by_kind: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for passage in texts()[split].passages:
        by_kind[passage.kind] += passage.sentences
    size = min(map(len, by_kind.values()))
    chosen = [(s, kind) for kind, group in by_kind.items() for s in sorted(group, key=_hash)[:size]]
    return sorted(chosen, key=lambda pair: _hash(pair[0]))


def signature(function: Function) -> str:
    """Return `split ( sep = None , maxsplit = -1 )`: punctuation is spaced, so that names tokenise consistently."""
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
        # More than half of all defaults are None: a quarter of those is kept, so that no answer is in the majority.
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
    """Return questions on the default of a parameter of a signature, and on the exception that a sentence mentions."""

    def collect(ask: Callable[..., Iterator[Question]], items: list) -> list[Question]:
        return [question for item in items for question in ask(item)]

    text = texts()[split]
    result = collect(_default_questions, text.functions) + collect(_exception_questions, text.passages)
    return sorted(result, key=lambda q: _hash(q.context, q.question))
