"""The command: reads flags and gin files, and runs one mode.

    python run.py --gin_file=models/t5_1_1/small.gin --gin_file=runs/pretrain.gin --gin.BATCH_SIZE=64
                  --gin.MODEL_DIR="'/tmp/m'" [--mode=eval]

Every option of t5x_lite/run_config.py is a macro, with its default. The gin files and the bindings follow in the order
given; the last one to set a value wins. A relative gin path is looked up in the current folder, then in gin_configs/,
then in --gin_search_paths.

A wrong name, type or file is reported in one line, with the nearest valid names; the exit code is 2.
"""

import contextlib
import functools
import inspect
import logging
import os
import re
import signal
import sys
import tokenize
import traceback
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import gin
from absl import flags
from gin import config as gin_config

from t5x_lite.errors import UserError, nearest

log = logging.getLogger("t5x_lite")

# A link to the checkout's folder; where the package is installed, the files themselves.
GIN_CONFIGS = (Path(__file__).resolve().parents[1] / "gin_configs").resolve()
# Modules that have moved, by the names that gin files of earlier versions have for them.
GIN_MODULES = {
    "t5x_lite.run_config": "t5x_lite.options",
    "t5x_lite.model.config": "t5x_lite.config",
    "t5x_lite.training.losses": "t5x_lite.losses",
    "t5x_lite.training.optim": "t5x_lite.optim",
    "t5x_lite.training.freezing": "t5x_lite.trainable",
}
INTERRUPTED = 128 + signal.SIGINT  # exit code, as a shell's
MODES = ("train", "eval", "infer", "score", "inspect", "plan")


def command() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):  # a terminal may lack characters that data has
        stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    sys.exit(main(sys.argv))


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv` (with the program's name first); returns the exit code."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before anything imports TensorFlow
    try:
        options = parse_flags(argv)
        if options.help:
            from t5x_lite import run_config

            print(__doc__, options.get_help(), "Options, each a macro: --gin.NAME=VALUE", sep="\n")
            print(run_config.option_lines())
            return 0
        run = configure(options.gin_file, options.gin_bindings, options.gin_search_paths)
        from t5x_lite import distributed
        from t5x_lite.metrics import metric_logger

        if options.mode != "plan":
            distributed.connect(options.coordinator_address, options.process_count, options.process_index)
        metric_logger.setup_logging(info=distributed.is_first())
        keep_compiled()
        from t5x_lite.cli import dry_run, evaluate, infer, inspect_batch, plan, train

        if options.dry_run:
            dry_run.dry_run(run, options.mode)
        elif options.mode == "train":
            train.train(run, gin.operative_config_str())
        elif options.mode == "plan":
            plan.plan(run, options.topology, options.decode, options.suggest)
        else:
            modes = {"eval": evaluate.evaluate, "infer": infer.infer, "score": infer.score}
            (modes | {"inspect": inspect_batch.inspect})[options.mode](run)
    except KeyboardInterrupt:
        print("\nrun.py: interrupted; what was saved before stays.", file=sys.stderr)
        _abort_all_processes(INTERRUPTED)
        return INTERRUPTED
    except Exception as error:
        if not isinstance(error, _user_errors()):
            _abort_all_processes(1, error)
            raise
        message = str(error).split("\n  In call to configurable")[0].strip()
        print(f"run.py: {message}", file=sys.stderr)
        _abort_all_processes(2)
        return 2
    return 0


def _user_errors() -> tuple[type[Exception], ...]:
    """The errors shown as one line: this package's, and those of `tasks`, which does not know it."""
    tasks = sys.modules.get("tasks.errors")
    return (UserError,) if tasks is None else (UserError, tasks.UserError)


def _abort_all_processes(code: int, error: BaseException | None = None) -> None:
    if distributed := sys.modules.get("t5x_lite.distributed"):  # else JAX has not even been loaded
        distributed.abort_all_processes(code, error)


def keep_compiled() -> None:
    """What XLA compiles is kept for the next run, unless JAX has been told where to keep it."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        import jax

        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = os.path.join(cache, "t5x_lite", "jax")
        with contextlib.suppress(OSError):  # a home folder that cannot be written
            os.makedirs(folder, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", folder)


# Flags


def parse_flags(argv: Sequence[str]) -> flags.FlagValues:
    """The flags of `argv`. `--gin.NAME=VALUE` is short for `--gin_bindings="NAME = VALUE"`."""
    values = flags.FlagValues()
    module = {"flag_values": values, "module_name": "run.py"}
    flags.DEFINE_multi_string("gin_file", [], "A gin file; may be given several times.", **module)
    flags.DEFINE_multi_string("gin_bindings", [], "A binding NAME = VALUE; may be given several times.", **module)
    flags.DEFINE_list("gin_search_paths", [], "More folders to look for gin files in.", **module)
    flags.DEFINE_string("mode", "train", f"What to do: {', '.join(MODES)}.", **module)
    flags.DEFINE_boolean("dry_run", False, "Build config, data shapes, mesh and parameter count, and stop.", **module)
    flags.DEFINE_boolean("strict", False, "Refuse where the newest checkpoint is damaged (STRICT).", **module)
    flags.DEFINE_string(
        "topology", None, "--mode=plan: of what, such as v5e:4x4, 2xv5e:16x16, h100:8, cpu:8.", **module
    )
    flags.DEFINE_boolean("decode", False, "--mode=plan: of decoding, too.", **module)
    flags.DEFINE_boolean("suggest", False, "--mode=plan: find mesh, REMAT and NUM_MICROBATCHES that fit.", **module)
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, where JAX does not find it.", **module)
    flags.DEFINE_integer("process_count", None, "Number of processes; 1: train alone, search for none.", **module)
    flags.DEFINE_integer("process_index", None, "Of this process, from 0; with --coordinator_address.", **module)
    flags.DEFINE_boolean("help", False, "Show this.", short_name="h", **module)
    arguments = []
    for argument in argv:
        if match := re.match(r"--?gin\.([^=]*)(=?)(.*)", argument, re.DOTALL):
            if not match[2]:
                raise UserError(f"{argument} has no value: write {argument}=VALUE")
            argument = f"--gin_bindings={match[1]} = {match[3]}"
        arguments.append(argument)
    try:
        rest = values(arguments)[1:]
    except flags.UnrecognizedFlagError as error:
        names = [f"--{name}" for name in values if len(name) > 1]
        raise UserError(f"unknown flag --{error.flagname}.{nearest(f'--{error.flagname}', names)}") from None
    except flags.Error as error:
        raise UserError(str(error)) from None
    if values.strict:
        values.gin_bindings = [*values.gin_bindings, "STRICT = True"]
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: every option is a flag, --NAME=VALUE")
    if values.mode not in MODES:
        raise UserError(f"unknown mode {values.mode!r}.{nearest(values.mode, MODES)}")
    if (values.mode == "plan") != (values.topology is not None):
        raise UserError("--mode=plan and --topology go together: --mode=plan --topology=v5e:4x4")
    if values.mode == "plan" and values.dry_run:
        raise UserError("--dry_run is for the other modes: --mode=plan touches no devices and reads no data anyway")
    if values.mode != "plan" and (values.decode or values.suggest):
        raise UserError("--decode and --suggest are for --mode=plan")
    return values


# Gin


@functools.cache
def configurables() -> dict[str, Callable]:
    """What gin files can name: the parts that a run is made of."""
    from t5x_lite import run_config
    from t5x_lite.model import interface
    from t5x_lite.training import freezing, losses, optim

    parts = (
        *(run_config.RunConfig, *interface.config_types().values(), losses.LossConfig),
        *(optim.make_optimizer, optim.adafactor, optim.adamw, freezing.gradual_unfreezing),
        *(optim.rsqrt_decay, optim.warmup_rsqrt_decay, optim.constant, optim.linear, optim.cosine),
    )
    names = {"Run" if part is run_config.RunConfig else part.__name__: part for part in parts}
    for name, part in names.items():
        gin.external_configurable(part, name=name, module=GIN_MODULES.get(part.__module__, part.__module__))
    return names


Config = Mapping[tuple[str, str], Mapping[str, Any]]  # gin's: (scope, part) to the values of its parameters


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
    # Whatever the locale; and not from packages, whose reader logs an error for each place where a file is not.
    reader: Any = functools.partial(open, encoding="utf-8")
    gin_config._FILE_READERS[:] = [(reader, os.path.isfile)]
    for file in files:
        if not any(Path(folder, file).is_file() for folder in gin_config._LOCATION_PREFIXES):
            raise UserError(_no_file(file))
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for modules of the user's, also when run.py is installed elsewhere
    parts = configurables()
    gin.clear_config()
    config = gin_config._CONFIG  # gin has no public list of what is bound
    used: set[str] = set()  # macros, also where a later file or binding overrides what uses them
    from t5x_lite import run_config

    gin.parse_config(run_config.gin_defaults())
    defaults = {(scope, part, name) for (scope, part), values in config.items() for name in values}
    used |= _macros_used(config)
    for file in files:
        _parse(gin.parse_config_file, file, f"--gin_file={file}")
        used |= _macros_used(config)
    for binding in bindings:
        _parse(gin.parse_config, binding, f"--gin.{binding.replace(' = ', '=', 1)}")
    if gin.query_parameter("MODEL_DIR/gin.macro.value") is None:
        gin.parse_config(f"MODEL_DIR = 'runs/{Path(files[-1]).stem if files else 'run'}'")
    _check_macros(config, used)
    _use_folder_of(files, bindings)
    _count_total_steps(config)
    _check_parameters(config, parts, defaults)
    return gin.get_configurable("Run")()


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


def _check_macros(config: Config, used_before: set[str]) -> None:
    """Refuses macros that are set and used nowhere, or used and set nowhere."""
    macros, used = _macros(config), _macros_used(config)
    for name in macros:
        if name not in used | used_before:
            raise UserError(f"unknown macro {name}: nothing uses it.{nearest(name, used)}")
    for name in used - macros.keys():
        raise UserError(f"macro {name} is used but never set.{nearest(name, macros)}")


def _check_parameters(
    config: Config, parts: Mapping[str, Callable], defaults: Collection[tuple[str, str, str]]
) -> None:
    """Refuses values that are missing or of the wrong type, in the parts that this run is made of.

    What is set of other parts is logged, but for what is among `defaults`.
    """
    from t5x_lite.model import interface

    macros = _macros(config)
    chosen = {ref.selector.split(".")[-1] for ref in gin_config.iterate_references(config)} | {"Run"}
    for name, part in parts.items():
        if name not in chosen:
            for (scope, selector), values in config.items():
                for parameter in values:
                    if selector.split(".")[-1] == name and (scope, selector, parameter) not in defaults:
                        log.warning("%s.%s is set, but this run does not use %s.", name, parameter, name)
            continue
        bound: dict[str, Any] = {}
        for (_, selector), values in config.items():
            if selector.split(".")[-1] == name:
                bound |= values
        hints = typing.get_type_hints(part.__init__ if inspect.isclass(part) else part)
        for parameter, value in bound.items():
            said = f"{name}.{parameter}"
            while _refers_to(value, "gin.macro"):
                said = value.config_key[0]
                value = macros[said]
            if _refers_to(value, "gin.constant") and value.config_key[0] == "gin.REQUIRED":
                raise UserError(f"{said} is required: set it with --gin.{said}=VALUE")
            if parameter in hints and not _fits(value, hints[parameter]):
                raise UserError(f"{said} = {value!r} is not of its type: {_type_name(hints[parameter])}")
        needed = {p.name for p in inspect.signature(part).parameters.values() if p.default is p.empty}
        if unset := sorted(needed - bound.keys()):
            of_model = name in interface.config_types()
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
