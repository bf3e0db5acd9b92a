"""The command line: gin files and flags to a `RunConfig`, and what the user is told of each mistake."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import gin
import jax
import pytest
from core.test_model import PARAMETERS as T5_PARAMETERS
from core.test_t5gemma import PARAMETERS as T5GEMMA_PARAMETERS
from repeats import fast

from t5x_lite import options
from t5x_lite.bert import BertConfig
from t5x_lite.cli import main as run
from t5x_lite.cli import task_setup
from t5x_lite.convert import hub
from t5x_lite.errors import UserError
from t5x_lite.model.families import model_of
from t5x_lite.model.t5 import T5Config
from t5x_lite.run_config import RunConfig, last_step
from t5x_lite.training import step

REPO = Path(run.__file__).parents[2]
# BERT's as transformers 5.23 counts them, with T5's vocabulary.
PARAMETERS = (
    T5_PARAMETERS | T5GEMMA_PARAMETERS | {"bert/tiny": 4_640_642, "bert/mini": 11_680_642, "bert/large": 337_872_258}
)
SMALL = "--gin_file=models/t5_1_1/small.gin"


pytestmark = pytest.mark.usefixtures("same_root_logger")


def configured(*arguments: str) -> RunConfig:
    flags = run.parse_flags(["run.py", *arguments])
    return run.configure(flags.gin_file, flags.gin_bindings, flags.gin_search_paths)


def refused(capsys, *arguments: str) -> str:
    """The one line that the command says of these arguments."""
    assert run.main(["run.py", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("run.py: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], ["nothing to run", "quickstart.gin", "runs/finetune.gin"]),
        (["--mode=trian"], ["'trian'", "Did you mean train"]),
        (["--mod=train"], ["--mod", "Did you mean --mode"]),
        (["train"], ["'train'", "--NAME=VALUE"]),
        (["--gin.BATCH_SIZE"], ["--gin.BATCH_SIZE=VALUE"]),
        (["--gin_file=quikstart.gin"], ["quikstart.gin", "Did you mean quickstart.gin"]),
        (["--gin_file=models/t5_1_1/smal.gin"], ["Did you mean models/t5_1_1/small.gin"]),
        (["--gin_search_paths=/nowhere", SMALL], ["/nowhere"]),
        ([SMALL, "--gin.BATCHSIZE=64"], ["BATCHSIZE", "Did you mean BATCH_SIZE"]),
        ([SMALL, "--gin.BATCH_SIZE='many'"], ["BATCH_SIZE", "'many'", "int"]),
        ([SMALL, "--gin.BATCH_SIZE=True"], ["BATCH_SIZE", "int"]),
        ([SMALL, "--gin.DTYPE='float16'"], ["DTYPE", "bfloat16"]),
        ([SMALL, "--gin.BEAM_SIZE=@T5Config()"], ["BEAM_SIZE = @T5Config()", "int"]),
        ([SMALL, "--gin.TASK_FEATURE_LENGTHS=@adafactor()"], ["TASK_FEATURE_LENGTHS", "dict of str to int"]),
        ([SMALL, "--gin.Run.loss=@Run()"], ["Run.loss = @Run()", "LossConfig"]),
        ([SMALL, "--gin.MESH={'data': '2'}"], ["MESH", "dict of str to int"]),
        ([SMALL, "--gin.MODEL_DIR=/tmp/m"], ["--gin.MODEL_DIR=/tmp/m", "quotes"]),
        ([SMALL, "--gin.TASK_FEATURE_LENGTHS={'inputs': 3"], ["TASK_FEATURE_LENGTHS", "not a gin value"]),
        ([SMALL, "--gin.T5Config.d_modle=3"], ["d_modle", "Did you mean d_model"]),
        ([SMALL, "--gin.T5Confg.d_model=3"], ["T5Confg", "Did you mean T5Config"]),
        ([SMALL, "--gin.OPTIMIZER=@adafctor()"], ["adafctor", "Did you mean adafactor"]),
        ([SMALL, "--gin.SCHEDULE=@constant()"], ["constant", "optim"]),
        ([SMALL, "--gin.SCHEDULE=@optim.linear()"], ["TRAIN_STEPS = None", "int"]),
        ([SMALL, "--gin.BATCH_SIZE=%ROWS"], ["ROWS", "never set"]),
        ([SMALL, "--gin.T5Config.num_heads=0"], ["num_heads", "0"]),
        ([SMALL, "--gin.BATCH_SIZE=6", "--gin.NUM_MICROBATCHES=4"], ["BATCH_SIZE = 6", "NUM_MICROBATCHES = 4"]),
        ([SMALL, "--gin.TRAIN_STEPS=1", "--gin.TOTAL_TRAIN_STEPS=1"], ["TRAIN_STEPS = 1", "TOTAL_TRAIN_STEPS = 1"]),
        ([SMALL, "--gin.KEEP_BEST_METRIC='a/b'", "--gin.EVAL_PERIOD=300"], ["KEEP_BEST_METRIC", "300"]),
        ([SMALL, "--gin.EVAL_FILES='a.txt'"], ["EVAL_FILES", "TRAIN_FILES"]),
        ([SMALL], ["TRAIN_STEPS is not set"]),
        ([SMALL, "--gin.TRAIN_STEPS=1"], ["MIXTURE_OR_TASK_NAME", "TRAIN_FILES"]),
        ([SMALL, "--gin.TRAIN_STEPS=1", "--gin.MESH={'dat': 8}"], ["'dat'", "data, fsdp, tensor"]),
        ([SMALL, "--gin.TRAIN_STEPS=1", "--gin.MESH={'data': 3}"], ["data=3", "8 cpu"]),
        ([SMALL, "--gin.TRAIN_STEPS=1", "--gin.BATCH_SIZE=12"], ["BATCH_SIZE", "12", "8 parts"]),
        ([SMALL, "--gin.TRAIN_STEPS=1", "--gin.MESH={'fsdp': 2, 'tensor': 4}"], ["'heads' of size 6", "tensor = 4"]),
        (
            [SMALL, "--gin.TRAIN_STEPS=1", "--gin.TRAINABLE=(('encoder/layer/mlp', True),)"],
            ["'encoder/layer/mlp'", "nearest: encoder/layers/mlp"],
        ),
        ([SMALL, "--gin.TRAINABLE=(('encoder', 1),)"], ["TRAINABLE", "not of its type"]),
        ([SMALL, "--gin_file=runs/finetune.gin"], ["INITIAL_CHECKPOINT_PATH", "required"]),
        (["--gin_file=runs/pretrain.gin"], ["T5Config", "d_model", "models/t5_1_1/small.gin"]),
        ([SMALL, "--mode=eval", "--gin.MODEL_DIR='/nowhere/m'"], ["no checkpoint", "/nowhere/m"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, said):
    line = refused(capsys, *arguments)
    for part in said:
        assert part in line


def test_mistakes_in_a_gin_file_are_said_with_file_and_line(capsys, tmp_path):
    file = tmp_path / "mine.gin"
    for text, said in [
        ("BATCH_SIZE = 3\nT5Config:\n  d_modl = 3\n", f"{file}, line 3: T5Config has no parameter d_modl"),
        ("\ninclude 'models/t5_1_1/smal.gin'\n", f"{file}, line 2: no gin file models/t5_1_1/smal.gin"),
        ("import absent_module\n", f"{file}, line 1: No module named 'absent_module'"),
        ("BATCH_SIZE = 3 4\n", f"{file}, line 1: not a gin value"),
        ("BATCH_SIZE = [3\n", "not a gin value"),
    ]:
        file.write_text(text)
        assert said in refused(capsys, f"--gin_file={file}")


@pytest.mark.parametrize("text", ["import absent_of_mine", "raise ValueError('mine')", "1 +", "{}['x']"])
def test_what_a_users_module_raises_keeps_its_traceback(tmp_path, monkeypatch, text):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_module_of_mine.py").write_text(text + "\n")
    file = tmp_path / "mine.gin"
    file.write_text("import a_module_of_mine\n")
    with pytest.raises((ModuleNotFoundError, ValueError, SyntaxError, KeyError)) as error:
        run.main(["run.py", f"--gin_file={file}"])
    assert not isinstance(error.value, UserError)


@pytest.mark.parametrize(
    ("arguments", "code", "answer"),
    [
        (["--mode=trian"], 2, "run.py: unknown mode 'trian'. Did you mean train?\n"),
        (["--gin_file=quickstart.gin", "--gin.MODLE_DIR='m'"], 2, "Did you mean MODEL_DIR"),
        (["--help"], 0, "TOP_P = 1.0\n"),
    ],
)
def test_names_are_answered_before_jax_is_imported(arguments, code, answer):
    script = (
        f"import sys, run; code = run.main({['run.py', *arguments]}); "
        "assert not {'jax', 'optax', 'tensorflow'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == code and answer in (done.stderr if code else done.stdout), done.stderr


def test_a_macro_counts_as_used_in_an_included_file(tmp_path):
    (tmp_path / "sizes.gin").write_text("T5Config.num_heads = %HEADS\n")
    (tmp_path / "mine.gin").write_text(f"include '{tmp_path}/sizes.gin'\nHEADS = 4\n")
    assert configured(SMALL, f"--gin_file={tmp_path}/mine.gin").model.num_heads == 4


def test_help_names_modes_and_flags(capsys):
    assert run.main(["run.py", "--help"]) == 0
    said = capsys.readouterr().out
    for part in ("--gin_file", "--gin_bindings", "--gin_search_paths", "--mode", "--[no]dry_run", *run.MODES):
        assert part in said
    assert "BATCH_SIZE = 128\n      rows in a batch" in said and "OPTIMIZER = @adafactor()" in said


def test_the_last_one_to_set_a_macro_wins(tmp_path):
    (tmp_path / "mine.gin").write_text("BATCH_SIZE = 24\nRANDOM_SEED = 5\n")
    search = f"--gin_search_paths={tmp_path}"
    assert configured(SMALL).batch_size == 128
    assert configured(SMALL, search, "--gin_file=mine.gin").batch_size == 24
    found = configured(SMALL, search, "--gin_file=mine.gin", "--gin.BATCH_SIZE=32")
    assert (found.batch_size, found.random_seed, found.eval_batch_size) == (32, 5, 32)
    assert configured(SMALL, "--gin_bindings=BATCH_SIZE = 48").batch_size == 48


def test_a_file_in_the_current_folder_goes_before_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configured(SMALL, "--gin_file=quickstart.gin").batch_size != 7
    (tmp_path / "quickstart.gin").write_text("BATCH_SIZE = 7\n")
    assert configured(SMALL, "--gin_file=quickstart.gin").batch_size == 7


def test_a_macro_of_the_users_may_be_left_without_use_by_the_command_line(tmp_path):
    (tmp_path / "mine.gin").write_text("ROWS = 8\nBATCH_SIZE = %ROWS\n")
    assert configured(SMALL, f"--gin_file={tmp_path}/mine.gin").batch_size == 8
    assert configured(SMALL, f"--gin_file={tmp_path}/mine.gin", "--gin.BATCH_SIZE=16").batch_size == 16


def test_without_a_model_dir_it_is_named_after_the_last_gin_file():
    assert configured("--gin_file=runs/pretrain.gin", SMALL).model_dir == "runs/small"
    assert configured(SMALL, "--gin.MODEL_DIR='/m'").model_dir == "/m"


def test_the_operative_config_gives_the_same_run(tmp_path):
    first = configured(SMALL, "--gin_file=runs/pretrain.gin", "--gin.MESH={'fsdp': -1}", "--gin.CLIP_NORM=1.5")
    (tmp_path / "config.gin").write_text(gin.operative_config_str())
    again = configured(f"--gin_file={tmp_path}/config.gin")
    assert dataclasses.replace(again, optimizer=first.optimizer) == first
    assert again.model_dir == "runs/pretrain" and again.mesh == {"fsdp": -1}
    assert (
        float(again.optimizer.schedule(20_000)) == float(first.optimizer.schedule(20_000)) == pytest.approx(0.00707107)
    )


def test_options_and_their_defaults_are_the_frozen_list():
    """A new option, or another default, is a decision: it changes this list, and CHANGELOG says so."""
    frozen = (REPO / "tests" / "options.txt").read_text().splitlines()
    macros = [line for line in options.gin_defaults().splitlines() if re.match("[A-Z]", line.partition(".")[0][1:])]
    changed = sorted(set(macros) ^ set(frozen))
    assert not changed, "\n".join(["not as in tests/options.txt:", *changed])


def test_every_option_has_a_text_and_every_field_of_a_run_a_macro():
    declared = {field.name: field for section in options.SECTIONS for field in options.options(section)}
    fields = {field.name for field in dataclasses.fields(RunConfig)} - options.PARTS.keys()
    assert fields < declared.keys()
    for name, field in declared.items():
        assert field.metadata["text"] and "\n" not in field.metadata["text"]
        assert name in fields or field.metadata["sets"], f"{name} sets nothing"


def test_the_page_of_options_is_made_from_them():
    page = (REPO / "docs" / "reference" / "options.md").read_text()
    assert page == options.reference_page(), "python -m t5x_lite.options > docs/reference/options.md"


def test_config_files_of_earlier_versions_give_the_same_run():
    """config.gin as an earlier version wrote it, with all that it spelt out."""
    configuration = configured(f"--gin_file={REPO}/tests/earlier_config.gin")
    assert (configuration.batch_size, configuration.beam_alpha, configuration.train_steps) == (16, 0.6, 1200)
    assert configuration.model.vocab_size == 4096 and configuration.eval_batch_size == 64
    with pytest.raises(UserError, match="BEAM_ALPHA"):
        dataclasses.replace(configuration, beam_alpha=-1.0)


def test_every_model_file_is_counted():
    assert {
        str(file.relative_to(REPO / "gin_configs/models"))[:-4] for file in REPO.glob("gin_configs/models/*/*.gin")
    } == set(PARAMETERS)


@pytest.mark.parametrize("size", fast(PARAMETERS.keys(), "t5_1_0/small", "byt5/xxl"))
def test_parameter_counts(size):
    file = REPO / "gin_configs" / "models" / f"{size}.gin"
    partitioner = task_setup.partitioner(configured(f"--gin_file={file}"))
    assert step.param_count(partitioner.abstract.params) == PARAMETERS[size]
    assert f"{PARAMETERS[size]:,} parameters" in file.read_text().splitlines()[0]


@pytest.mark.parametrize("mesh", ["data", "fsdp", "fsdp_tensor"])
def test_mesh_files_use_all_devices(mesh):
    partitioner = task_setup.partitioner(configured(SMALL, f"--gin_file=mesh/{mesh}.gin"))
    assert partitioner.mesh.size == len(jax.devices()) == 8
    shares = {axis for axis, size in partitioner.mesh.shape.items() if size > 1}
    assert shares == {"data": {"data"}, "fsdp": {"fsdp"}, "fsdp_tensor": {"fsdp", "tensor"}}[mesh]


def test_run_files_follow_the_published_recipes():
    pretrain = configured(SMALL, "--gin_file=runs/pretrain.gin")
    assert [float(pretrain.optimizer.schedule(n)) for n in (0, 40_000)] == pytest.approx([0.01, 0.005])
    assert (pretrain.batch_size, pretrain.task_feature_lengths) == (128, {"inputs": 512, "targets": 114})
    assert pretrain.model.dropout_rate == 0.0
    finetune = configured(SMALL, "--gin_file=runs/finetune.gin", "--gin.INITIAL_CHECKPOINT_PATH=None")
    assert [float(finetune.optimizer.schedule(n)) for n in (0, 40_000)] == pytest.approx([0.001, 0.001])
    assert finetune.model.dropout_rate == 0.1
    bert = configured(
        "--gin_file=models/bert.gin", "--gin_file=runs/finetune_bert.gin", "--gin.INITIAL_CHECKPOINT_PATH='bert'"
    )
    assert isinstance(bert.model, BertConfig)
    assert (bert.model.heads, bert.model.num_labels, bert.model.dropout_rate) == (("pooler", "classify"), 2, 0.1)
    assert [float(bert.optimizer.schedule(n)) for n in (17, 34, 189)] == pytest.approx([1e-5, 2e-5, 1e-5])
    for name in ("eval", "infer", "score"):
        assert isinstance(configured(SMALL, f"--gin_file=runs/{name}.gin").model, T5Config)


def test_transfer_strategies_are_one_file_apart():
    kinds = {"multitask": "proportional", "leave_one_out": "leave_out_squad", "supervised_multitask": "proportional"}
    for name, kind in kinds.items():
        found = configured(SMALL, f"--gin_file=runs/{name}.gin")
        pretrain = configured(SMALL, "--gin_file=runs/pretrain.gin")
        prefix = "glue_squad_" if name == "supervised_multitask" else "c4_glue_squad_"
        assert found.mixture_or_task_name == prefix + kind
        others = {"mixture_or_task_name", "model_dir", "eval_examples", "optimizer"}  # an optimizer holds functions
        for field in {field.name for field in dataclasses.fields(RunConfig)} - others:
            assert getattr(found, field) == getattr(pretrain, field), field


def test_compared_architectures_cost_alike():
    flops, kinds = {}, set()
    for file in sorted((REPO / "gin_configs" / "compare").glob("*.gin")):
        found = configured(f"--gin_file={file}")
        flops[file.stem] = model_of(found.model).flops(1, found.task_feature_lengths)
        kinds.add((found.model.decoder_only, found.model.prefix_lm))
    assert len(flops) == 6 and len(kinds) == 3
    for objective in ("denoising", "lm"):
        same = [value for name, value in flops.items() if name.endswith(f"_{objective}")]
        assert len(same) == 3 and max(same) < 1.35 * min(same), same


def test_total_train_steps_count_those_of_the_initial_checkpoint(tmp_path):
    (tmp_path / "checkpoints" / "30" / "params").mkdir(parents=True)
    total = configured(
        SMALL, "--gin.TOTAL_TRAIN_STEPS=100", f"--gin.INITIAL_CHECKPOINT_PATH='{tmp_path}/checkpoints/30'"
    )
    assert (total.train_steps, total.total_train_steps) == (70, None)  # what schedules count to
    total = dataclasses.replace(total, train_steps=None, total_train_steps=100)
    assert last_step(total) == 70
    assert last_step(dataclasses.replace(total, initial_checkpoint_path=None)) == 100
    assert last_step(dataclasses.replace(total, total_train_steps=None, train_steps=100)) == 100
    with pytest.raises(ValueError, match="30 steps"):
        last_step(dataclasses.replace(total, total_train_steps=30))


def test_paths_may_begin_with_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = configured(SMALL, "--gin.MODEL_DIR='~/m'", "--gin.TRAIN_FILES=['~/a.jsonl', 'b.jsonl']")
    assert (found.model_dir, found.train_files) == (f"{tmp_path}/m", [f"{tmp_path}/a.jsonl", "b.jsonl"])


def test_a_run_that_was_moved_is_where_its_config_is(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moved" / "checkpoints").mkdir(parents=True)
    (tmp_path / "moved" / "config.gin").write_text("MODEL_DIR = 'gone'\n")
    assert configured(SMALL, "--gin_file=moved/config.gin").model_dir == "moved"
    assert "'gone' does not exist: the run is taken to be in moved" in caplog.text
    assert configured(SMALL, "--gin_file=moved/config.gin", "--gin.MODEL_DIR='new'").model_dir == "new"


def test_what_is_set_of_a_part_that_is_not_used_is_said(caplog):
    configured(SMALL, "--gin.adamw.weight_decay=0.1")
    assert "adamw.weight_decay is set, but this run does not use adamw" in caplog.text
    caplog.clear()
    configured(SMALL, "--gin.OPTIMIZER=@adamw()", "--gin.adamw.weight_decay=0.1")
    assert "weight_decay" not in caplog.text
    with pytest.raises(UserError, match="TRAIN_STEPS = -3 must be at least 0"):
        configured(SMALL, "--gin.TRAIN_STEPS=-3")


def test_a_start_may_be_a_model_of_another_kind(golden, tmp_path, monkeypatch):
    def started(path):
        return task_setup.choose_start(
            configured(SMALL, f"--gin.INITIAL_CHECKPOINT_PATH='{path}'", f"--gin.MODEL_DIR='{tmp_path}'")
        )

    for path in (golden("hf_t5_v11"), golden("peft") / "all"):
        assert (started(path).kind, started(path).path) == ("import", str(path))
    monkeypatch.setattr(hub, "located", lambda name: golden("hf_t5_v11"))
    assert started("google/flan-t5-small").path == str(golden("hf_t5_v11"))
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"holds no checkpoint|does not exist"):
        started(tmp_path / "nothing")


# Packaging: bounds are written in three places, because pip and setuptools read different files.


def requirements(name: str) -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in (REPO / name).read_text().splitlines()]
    found = [re.fullmatch(r"([\w-]+(?:\[\w+\])?)(.*)", line) for line in lines if line and not line.startswith("-")]
    return {match[1]: match[2] for match in found if match}


def pins(python: str) -> dict[str, str]:
    """Name -> version that constraints.txt has for a Python version; each name once."""
    from packaging.requirements import Requirement

    lines = [line.partition("#")[0].strip() for line in (REPO / "constraints.txt").read_text().splitlines()]
    wanted = [Requirement(line) for line in lines if line]
    wanted = [r for r in wanted if r.marker is None or r.marker.evaluate({"python_version": python})]
    versions = {r.name.lower().replace("_", "-"): str(r.specifier) for r in wanted}
    assert len(versions) == len(wanted) and all(v.startswith("==") for v in versions.values())
    return {name: version.removeprefix("==") for name, version in versions.items()}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_every_requirement_has_bounds_and_a_pin_within_them(python):
    from packaging.specifiers import SpecifierSet

    tested = pins(python)
    for file in ("requirements.txt", "requirements-dev.txt", "requirements-tpu.txt", "requirements-gpu.txt"):
        for name, bounds in requirements(file).items():
            assert ">=" in bounds and "<" in bounds, f"{file}: {name}"
            assert SpecifierSet(bounds).contains(tested[name.partition("[")[0]]), f"{file}: {name}"


def test_both_tested_sets_have_the_same_packages():
    old, new = pins("3.11"), pins("3.13")
    assert old.keys() == new.keys() and pins("3.12") == new
    assert (old["jax"], new["jax"]) == ("0.10.2", "0.12.0.1") and old["flax"] != new["flax"]


def test_the_extras_have_the_bounds_of_the_requirements():
    text = (REPO / "pyproject.toml").read_text()
    for file in ("requirements-tpu.txt", "requirements-gpu.txt"):
        found = requirements(file)
        listed = ", ".join(f'"{name}{bounds}"' for name, bounds in found.items())
        assert f"[{listed}]" in text
        (bounds,) = (bounds for name, bounds in found.items() if name.startswith("jax["))
        assert bounds == requirements("requirements.txt")["jax"]
