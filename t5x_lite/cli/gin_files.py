"""Gin files: from files and bindings to a `RunConfig`, with an error in one line for whatever is wrong in them."""

import functools
import inspect
import io
import logging
import os
import re
import sys
import tokenize
import traceback
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import gin
from gin import config as gin_config
from gin import config_parser

from t5x_lite import options, storage
from t5x_lite.errors import UserError, nearest
from t5x_lite.model import families

log = logging.getLogger("t5x_lite")

# A link to the checkout's folder; where the package is installed, the files themselves.
GIN_CONFIGS = (Path(__file__).resolve().parents[1] / "gin_configs").resolve()
# Modules that have moved, by the names that gin files of earlier versions have for them.
GIN_MODULES = {
    "t5x_lite.run_config": "t5x_lite.options",
    "t5x_lite.model.config": "t5x_lite.config",
    "t5x_lite.training.loss_config": "t5x_lite.losses",
    "t5x_lite.training.optim": "t5x_lite.optim",
    "t5x_lite.training.freezing": "t5x_lite.trainable",
}


@functools.cache
def configurables() -> dict[str, Callable]:
    """What gin files can name: the parts that a run is made of."""
    from t5x_lite import run_config
    from t5x_lite.training import freezing, loss_config, optim

    parts = (
        *(run_config.RunConfig, *families.config_types().values(), *families.makers(), loss_config.LossConfig),
        *(optim.make_optimizer, optim.adafactor, optim.adamw, optim.muon, freezing.gradual_unfreezing),
        *(optim.rsqrt_decay, optim.warmup_rsqrt_decay, optim.constant, optim.linear, optim.cosine),
    )
    names = {"Run" if part is run_config.RunConfig else part.__name__: part for part in parts}
    for name, part in names.items():
        gin.external_configurable(part, name=name, module=GIN_MODULES.get(part.__module__, part.__module__))
    return names


Config = Mapping[tuple[str, str], Mapping[str, Any]]  # gin's: (scope, part) to the values of its parameters


def operative_config() -> str:
    """The values that made the run, as a gin file."""
    return gin.operative_config_str()


def configure(files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str] = ()) -> Any:
    """Reads `files` and `bindings`, checks them, and returns the `RunConfig` that they describe.

    Raises:
      UserError: a name that does not exist or is used nowhere, a value of the wrong type, a missing file or value.
      Exception: whatever a module that a gin file imports raises.
    """
    if not files and not bindings:
        raise UserError(
            f"nothing to run: give a --gin_file, such as quickstart.gin or {' or '.join(_gin_files('runs'))}"
        )
    files, search_paths = ([os.path.expanduser(path) for path in paths] for paths in (files, search_paths))
    for folder in search_paths:
        if not Path(folder).is_dir():
            raise UserError(f"--gin_search_paths: no such folder: {folder}")
    gin_config._LOCATION_PREFIXES[:] = ["", str(GIN_CONFIGS), *search_paths]
    # Not from packages, whose reader logs an error for each place where a file is not.
    readers: Any = [(_open, _is_file)]
    gin_config._FILE_READERS[:] = readers
    for file in files:
        if not any(_is_file(os.path.join(folder, file)) for folder in gin_config._LOCATION_PREFIXES):
            raise UserError(_no_file(file))
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for modules of the user's, also when run.py is installed elsewhere
    _check_macro_names(files, bindings)
    parts = configurables()
    gin.clear_config()
    config = gin_config._CONFIG  # gin has no public list of what is bound
    gin.parse_config(options.gin_defaults())
    defaults = {(scope, part, name) for (scope, part), values in config.items() for name in values}
    for file in files:
        _parse(gin.parse_config_file, file, f"--gin_file={file}")
    for binding in bindings:
        _parse(gin.parse_config, binding, f"--gin.{binding.replace(' = ', '=', 1)}")
    if gin.query_parameter("MODEL_DIR/gin.macro.value") is None:
        gin.parse_config(f"MODEL_DIR = 'runs/{Path(files[-1]).stem if files else 'run'}'")
    macros = _macros(config)
    for name in _macros_used(config) - macros.keys():
        raise UserError(f"macro {name} is used but never set.{nearest(name, macros)}")
    _use_folder_of(files, bindings)
    _count_total_steps(config)
    _check_parameters(config, parts, defaults)
    return gin.get_configurable("Run")()


def _place(path: str) -> Any:
    """Returns a gin file as a place to read: of a run in a bucket it is its config.gin."""
    if not storage.is_url(path):
        return Path(path)
    from t5x_lite.convert import bucket

    return bucket.place_of(path)


def _is_file(path: str) -> bool:
    return _place(path).is_file()


def _open(path: str) -> TextIO:
    if not storage.is_url(path):
        return open(path, encoding="utf-8")
    file = io.StringIO(_place(path).read_text(encoding="utf-8"))
    file.name = path  # pyright: ignore[reportAttributeAccessIssue]  # from which Gin takes a statement's place
    return file


class _MacroNames(config_parser.ParserDelegate):
    """Collects the macros that gin files set and use, without a look at the parts that they configure."""

    def __init__(self) -> None:
        self.set: set[str] = set()
        self.used: set[str] = set()

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> None: ...

    def macro(self, macro_name: str) -> None:
        self.used.add(macro_name)

    def read(self, text: Any) -> None:
        """Reads gin's statements from a text or an open file, and from the files that it includes."""
        for statement in config_parser.ConfigParser(text, self):
            if isinstance(statement, config_parser.IncludeStatement):
                self.read_file(statement.filename)
            elif isinstance(statement, config_parser.BindingStatement) and not statement.arg_name:
                self.set.add(f"{statement.scope}/{statement.selector}".lstrip("/"))

    def read_file(self, name: str) -> None:
        paths = (os.path.join(folder, name) for folder in gin_config._LOCATION_PREFIXES)
        with _open(next(filter(_is_file, paths))) as file:
            self.read(file)


def _check_macro_names(files: Sequence[str], bindings: Sequence[str]) -> None:
    """Refuses macros that are set and that nothing uses, before JAX is imported for the parts of a run.

    A macro is also used where a later file or binding overrides what uses it. Other mistakes are left to gin.
    """
    names = _MacroNames()
    try:
        names.read(options.gin_defaults())
        for file in files:
            names.read_file(file)
        names.read("\n".join(bindings))
    except Exception:
        return  # gin will say what is wrong
    for unknown in sorted(names.set - names.used):
        raise UserError(f"unknown macro {unknown}: nothing uses it.{nearest(unknown, names.used)}")


def _use_folder_of(files: Sequence[str], bindings: Sequence[str]) -> None:
    """Where the config.gin of a run is given whose MODEL_DIR is gone, uses the folder that the file lies in."""
    run = Path(files[-1]).parent if files and Path(files[-1]).name == "config.gin" else None
    if run is None or not (run / "checkpoints").is_dir() or any(b.startswith("MODEL_DIR") for b in bindings):
        return
    model_dir = gin.query_parameter("MODEL_DIR/gin.macro.value")
    if isinstance(model_dir, str) and "://" not in model_dir and not Path(model_dir).expanduser().exists():
        log.warning("MODEL_DIR = %r does not exist: the run is taken to be in %s, with its config.gin.", model_dir, run)
        gin.parse_config(f"MODEL_DIR = {str(run)!r}")


def _count_total_steps(config: Config) -> None:
    """Sets TRAIN_STEPS, which schedules count to, from TOTAL_TRAIN_STEPS."""
    from t5x_lite import run_config

    macros = _macros(config)
    total, initial = macros.get("TOTAL_TRAIN_STEPS"), macros.get("INITIAL_CHECKPOINT_PATH")
    if isinstance(total, int) and macros.get("TRAIN_STEPS") is None and isinstance(initial, str | None):
        initial = None if initial is None else os.path.expanduser(initial)
        steps = run_config.steps_of_run(total, initial)
        gin.parse_config(f"TRAIN_STEPS = {steps}\nTOTAL_TRAIN_STEPS = None")


def _gin_files(under: str = "") -> list[str]:
    return sorted(str(file.relative_to(GIN_CONFIGS)) for file in (GIN_CONFIGS / under).rglob("*.gin"))


def _no_file(file: str) -> str:
    names = _gin_files() + [str(path) for path in Path(file).parent.glob("*.gin")]
    folders = ", ".join(gin_config._LOCATION_PREFIXES[1:])
    return f"no gin file {file} in the current folder or in {folders}.{nearest(file, names)}"


def _parse(parse: Callable[[str], Any], text: str, source: str) -> None:
    """Calls gin's `parse` on `text`; what gin has against it becomes one line."""
    try:
        parse(text)
    except (ValueError, KeyError, OSError, SyntaxError, tokenize.TokenError, ImportError) as error:
        frames = list(traceback.walk_tb(error.__traceback__))
        importing = any(frame.f_code.co_name == "process_import" for frame, _ in frames)
        missing = isinstance(error, ModuleNotFoundError) and Path(frames[-1][0].f_code.co_filename).parent.name == "gin"
        if importing and not missing:
            raise  # from the user's module: it keeps its traceback
        raise UserError(_explained(error, source)) from None


def _explained(error: Exception, source: str) -> str:
    message, _, location = str(error).partition("\n")
    message = message.strip('"')  # KeyError puts them
    if place := re.search(r'In file "(.*)", line (\d+)', location):
        source = f"{place[1]}, line {place[2]}"
    parts = configurables()
    if match := re.match(r"No configurable matching (?:reference )?'?@?([\w./]+)", message):
        return f"{source}: unknown name {match[1]}.{nearest(match[1], parts)}"
    if match := re.match(r"Configurable '(.*)' doesn't have a parameter named '(.*)'", message):
        names = inspect.signature(parts[match[1]]).parameters if match[1] in parts else ()
        return f"{source}: {match[1]} has no parameter {match[2]}.{nearest(match[2], names)}"
    if match := re.match(r"Unable to open file: (.*?)\. Searched", message):
        return f"{source}: {_no_file(match[1])}"
    if isinstance(error, (SyntaxError, tokenize.TokenError)):
        if isinstance(error, SyntaxError) and error.filename:
            source = f"{error.filename}, line {error.lineno}"
        hint = " (on a command line a string needs both quotes: --gin.NAME=\"'text'\")" if "--gin." in source else ""
        return f"{source}: not a gin value or statement{hint}"
    return f"{source}: {message}"


def _macros(config: Config) -> dict[str, Any]:
    return {scope: bound["value"] for (scope, part), bound in config.items() if part == "gin.macro"}


def _macros_used(config: Config) -> set[str]:
    return {ref.config_key[0] for ref in gin_config.iterate_references(config) if ref.selector == "gin.macro"}


def _check_parameters(
    config: Config, parts: Mapping[str, Callable], defaults: Collection[tuple[str, str, str]]
) -> None:
    """Refuses values that are missing or of the wrong type, in the parts that this run is made of.

    What is set of other parts is logged, but for what is among `defaults`, or set alike of a part that is used: files
    such as adapt/lora.gin are for models of several families.
    """
    macros = _macros(config)
    chosen = {ref.selector.split(".")[-1] for ref in gin_config.iterate_references(config)} | {"Run"}
    used = [item for (_, part), bound in config.items() if part.split(".")[-1] in chosen for item in bound.items()]
    for name, part in parts.items():
        if name not in chosen:
            for (scope, selector), values in config.items():
                for parameter, value in values.items() if selector.split(".")[-1] == name else ():
                    if (scope, selector, parameter) not in defaults and (parameter, value) not in used:
                        log.warning("%s.%s is set, but this run does not use %s.", name, parameter, name)
            continue
        bound: dict[str, Any] = {}
        for (_, selector), values in config.items():
            if selector.split(".")[-1] == name:
                bound |= values
        hints = typing.get_type_hints(part.__init__ if inspect.isclass(part) else part)
        for parameter, value in bound.items():
            option = f"{name}.{parameter}"
            while _refers_to(value, "gin.macro"):
                option = value.config_key[0]
                value = macros[option]
            if _refers_to(value, "gin.constant") and value.config_key[0] == "gin.REQUIRED":
                raise UserError(f"{option} is required: set it with --gin.{option}=VALUE")
            if parameter in hints and not _fits(value, hints[parameter]):
                raise UserError(f"{option} = {value!r} is not of its type: {_type_name(hints[parameter])}")
        needed = {p.name for p in inspect.signature(part).parameters.values() if p.default is p.empty}
        if unset := sorted(needed - bound.keys()):
            of_model = name in families.config_types()
            models = (
                " A model file sets them, such as --gin_file=models/t5_1_1/small.gin or models/bert.gin."
                if of_model
                else ""
            )
            raise UserError(f"{name} has no value for {', '.join(unset)}.{models}")


def _refers_to(value: Any, selector: str) -> bool:
    return isinstance(value, gin_config.ConfigurableReference) and value.selector == selector


def _fits(value: Any, hint: Any) -> bool:
    """Whether a gin value is of the type `hint`. What only running can tell (a macro in a list, an odd hint) fits."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if isinstance(value, gin_config.ConfigurableReference):
        part = configurables().get(value.selector.split(".")[-1])
        if part is None:
            return True
        literal = hint in (int, float, str, bool, type(None)) or origin in (typing.Literal, tuple, Mapping, Sequence)
        return not literal and not (inspect.isclass(part) and isinstance(hint, type) and not issubclass(part, hint))
    if origin is typing.Literal:
        return value in arguments
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(_fits(v, arguments[1]) for v in value.values())
    if origin is tuple and Ellipsis not in arguments:
        return isinstance(value, (list, tuple)) and len(value) == len(arguments) and all(map(_fits, value, arguments))
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return isinstance(value, (list, tuple)) and all(_fits(v, arguments[0]) for v in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else hint is not None or value is None


def _type_name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(argument) for argument in arguments)
    if origin is typing.Literal:
        return " or ".join(map(repr, arguments))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a dict of {_type_name(arguments[0])} to {_type_name(arguments[1])}"
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "").replace("collections.abc.", "")
