"""`--dry_run`: check the inputs of a mode without computing anything."""

from t5x_lite.cli import task_setup, train
from t5x_lite.run_config import RunConfig, last_step


def dry_run(run: RunConfig, mode: str) -> None:
    """Builds the inputs of `mode` and prints a summary; computes and writes nothing."""
    partitioner = task_setup.partitioner(run)
    if mode == "train":
        steps = f"{last_step(run):,} of {run.batch_size} rows, in {run.num_microbatches} micro-batch(es)"
        start = task_setup.choose_start(run)
        if start.step is not None:
            train.check_model(run, str(start.path))
    print(f"model       {task_setup.parameter_summary(run, partitioner)}: {run.model}")
    print(f"mesh        {partitioner}")
    if mode == "train":
        print(f"steps       {steps}\nstart       {start.reason}")
    elif mode != "inspect":
        print(f"checkpoint  {task_setup.checkpoint_to_read(run)[0].path}")
    name = task_setup.register_tasks(run)
    if mode in ("train", "inspect"):
        print(f"data        {name}, this host's batches:")
        for feature, shape in task_setup.build_train_batches(
            run, name, partitioner.local_rows(run.batch_size)
        ).shapes.items():
            print(f"            {feature} {list(shape)}")
    for task, rate in task_setup.rates(name).items():
        print(f"            {rate:7.3%} {task}")
    for note in task_setup.data_notes(run, name):
        print(f"note        {note}")
    print("Dry run: nothing was computed or written.")
