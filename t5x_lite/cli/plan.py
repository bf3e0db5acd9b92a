"""`--mode=plan`: compile the training step for hardware that you do not have, and print what it needs."""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import jax

from t5x_lite.cli import task_setup
from t5x_lite.errors import UserError
from t5x_lite.run_config import RunConfig
from t5x_lite.storage import MirroredDirectory
from t5x_lite.training.partitioner import Partitioner

if TYPE_CHECKING:
    from t5x_lite.plan import Memory, Plan
    from t5x_lite.plan.topologies import Topology


def plan(run: RunConfig, topology: str, decode: bool, suggest: bool) -> None:
    """Prints memory and time of a step on `topology` and writes them to MODEL_DIR/plan.json. Uses no devices or data.

    Args:
      decode: also compile decoding.
      suggest: first print a table of batch sizes, meshes, REMAT and NUM_MICROBATCHES, and plan with the quickest that
        fits the run's own BATCH_SIZE.
    """
    if not (planning := task_setup.tool("plan")):
        raise UserError("--mode=plan: the package t5x_lite.plan has been removed")
    from t5x_lite.plan import evidence, rows, topologies

    place = topologies.find(topology)
    candidates = []
    if suggest:
        run, step, candidates = _suggested(run, place)
    else:
        step = step_plan(run, place)
    if decode:
        step.decode_memory = decode_memory(run, place)
    print(planning.table(step))
    for line in evidence.lines(step, place, run.model, run.pack):
        print(line)
    folder = MirroredDirectory(run.model_dir)
    folder.path.mkdir(parents=True, exist_ok=True)
    values = rows.values(step) | ({"candidates": [rows.values(each) for each in candidates]} if candidates else {})
    (folder.path / "plan.json").write_text(json.dumps(values, indent=1) + "\n")
    folder.publish()
    print(f"as JSON: {folder}/plan.json")


def step_plan(run: RunConfig, place: "Topology", on_paper: bool = False) -> "Plan":
    """Returns the plan of a run's training step; `place` and `on_paper` are those of plan.of_step."""
    from t5x_lite import plan as planning

    partitioner = task_setup.partitioner(run, place.devices)
    return planning.of_step(
        place,
        partitioner.compiler,
        partitioner.abstract,
        abstract_batch(run, partitioner),
        config=run.model,
        optimizer=run.optimizer,
        loss=run.loss,
        lengths=dict(run.task_feature_lengths),
        num_microbatches=run.num_microbatches,
        rng_impl=run.rng_impl,
        on_paper=on_paper,
    )


def abstract_batch(run: RunConfig, partitioner: Partitioner) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and shardings of a global training batch."""
    shapes = task_setup.feature_converter(run).batch(run.task_feature_lengths, run.batch_size)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=partitioner.batch_sharding)
        for name, (shape, dtype) in shapes.items()
    }


def decode_memory(run: RunConfig, place: "Topology") -> "Memory":
    """Returns the memory that each device needs to predict for a batch of EVAL_BATCH_SIZE rows."""
    from t5x_lite import plan as planning

    predictor = task_setup.predictor(run, task_setup.partitioner(run, place.devices, trains=False))
    return planning.compile_within(predictor.lower(run.eval_batch_size, run.task_feature_lengths), place)[0]


def _suggested(run: RunConfig, place: "Topology") -> tuple[RunConfig, "Plan", list["Plan"]]:
    """Prints the frontier of settings; returns the suggested run and its plan, and the plans of all settings."""
    from t5x_lite.plan import rows, suggest

    def with_setting(setting: suggest.Setting) -> RunConfig:
        model: Any = dataclasses.replace(run.model, remat=setting.remat)  # pyright: ignore[reportArgumentType]
        return dataclasses.replace(
            run,
            model=model,
            mesh=setting.mesh,
            batch_size=setting.batch_size,
            num_microbatches=setting.num_microbatches,
        )

    search = suggest.Search(
        lambda setting: step_plan(with_setting(setting), place, on_paper=True), run.batch_size, run.mesh, place
    )
    setting, step = search.run()
    best = [rows.values(candidate.plan) for candidate in suggest.frontier(search.fitting)]
    print(rows.markdown(best, rows.COLUMNS_OF_ONE_RUN))
    print(f"suggested for BATCH_SIZE = {run.batch_size}: {setting.flags}\n")
    return with_setting(setting), step, [candidate.plan for candidate in search.compiled]
