"""The command: reads flags and gin files, and runs one mode.

    python run.py --gin_file=models/t5_1_1/small.gin --gin_file=runs/pretrain.gin --gin.BATCH_SIZE=64
                  --gin.MODEL_DIR="'/tmp/m'" [--mode=eval]

Every option of t5x_lite/options.py is a macro, with its default. The gin files and the bindings follow in the order
given; the last one to set a value wins. A relative gin path is looked up in the current folder, then in gin_configs/,
then in --gin_search_paths.

A wrong name, type or file is reported in one line, with the nearest valid names; the exit code is 2.
"""

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence

from absl import flags

from t5x_lite.cli.gin_files import configure, operative_config
from t5x_lite.errors import UserError, nearest
from t5x_lite.options import option_lines

INTERRUPTED = 128 + signal.SIGINT  # exit code, as a shell's
MODES = ("train", "eval", "infer", "score", "inspect", "plan")


def command() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):  # a terminal may lack characters that data has
        stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    code = main(sys.argv)
    if any(type(thread).__module__.startswith("orbax.") for thread in threading.enumerate()):
        # Orbax's threads of a failed save wait ten minutes for one another, and hold the process back.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv` (with the program's name first); returns the exit code."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before anything imports TensorFlow
    try:
        options = parse_flags(argv)
        if options.help:
            print(__doc__, options.get_help(), "Options, each a macro: --gin.NAME=VALUE", sep="\n")
            print(option_lines())
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
            train.train(run, operative_config())
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
    flags.DEFINE_boolean(
        "suggest", False, "--mode=plan: a table of batch sizes, meshes and REMAT that fit, and the quickest.", **module
    )
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
