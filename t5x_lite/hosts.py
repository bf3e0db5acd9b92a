"""The processes of one run: how they find one another, and what is said when one of them is lost.

Nothing has to be set on Cloud TPU VMs, under Slurm (srun) and under Open MPI: JAX finds the others by itself. Elsewhere
the address of the first process, their number and each one's index are given. Must not know: models, data, runs.
"""

import os
import sys
import traceback

import jax

# A process that is not heard of for so long is taken for dead, and JAX then ends the others.
HEARTBEAT_SECONDS = 60
# What JAX says where it finds no cluster, and where it has been started already (in a notebook, say).
_ALONE = ("coordinator_address should be defined", "must be called before any JAX")


def connect(
    coordinator_address: str | None = None, process_count: int | None = None, process_index: int | None = None
) -> None:
    """Joins the processes of this run; does nothing where there is one. To be called before JAX's first computation.

    Raises ValueError: only some of the three are given, or they make no sense.
    """
    if coordinator_address is None and process_count is None and process_index is None:
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        except (ValueError, RuntimeError) as error:
            if not any(said in str(error) for said in _ALONE):
                raise
        return
    if coordinator_address is None or process_count is None or process_index is None:
        raise ValueError(
            "--coordinator_address=HOST:PORT (of process 0), --process_count and --process_index go together; got "
            f"{coordinator_address}, {process_count}, {process_index}"
        )
    if ":" not in coordinator_address or not 0 <= process_index < process_count:
        raise ValueError(
            f"--coordinator_address={coordinator_address} must be HOST:PORT, and --process_index={process_index} at "
            f"least 0 and below --process_count={process_count}"
        )
    jax.distributed.initialize(
        coordinator_address, process_count, process_index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
    )


def is_first() -> bool:
    """Whether this is the process that logs and writes."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def end_if_one_of_several(code: int, error: BaseException | None = None) -> None:
    """Ends this process at once, if there are others, which then end too; of an error, says what to do.

    An ordinary exit would wait for the others, which wait for this one.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    if error is not None:
        traceback.print_exception(error)
        print(
            f"\nrun.py: process {jax.process_index()} of {jax.process_count()} stops for the error above. If it speaks "
            "of a connection or of another task, another process was lost first: its own log says why. All processes "
            f"stop within {HEARTBEAT_SECONDS} s; start the same command again on all hosts, and the run goes on from "
            "its last checkpoint.",
            file=sys.stderr,
        )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
