"""Eight CPU devices for all tests, the golden values, and real data: a test that needs real data and has none skips."""

import gc
import importlib.metadata
import importlib.util
import json
import logging
import os
import pathlib

import jaxtyping
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
XLA_FLAGS = "--xla_force_host_platform_device_count=8"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # A training step compiles in a third of the time. Later versions have no such flag.
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", XLA_FLAGS)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# XLA's threads on CPUs. Each device waits for others in several collectives at once, one thread each: with only as many
# threads as devices, which is what it has on two cores, none is left to arrive, and the program stands still.
os.environ.setdefault("NPROC", "32")

REPO = pathlib.Path(__file__).resolve().parents[1]

# Most of the time goes to compiling: quickly rather than well, and each program once.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPO / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")

# Tracing makes so many objects that collecting garbage as often as usual takes a tenth of the time.
gc.set_threshold(200_000, 20, 100)

# Shapes and types that signatures state are checked at every call; only here, for a run should not pay for it.
if importlib.util.find_spec("beartype"):
    jaxtyping.install_import_hook("t5x_lite", "beartype.beartype")


# These have few tests and take the longest. They come first, so that no process waits for one of them at the end.
LONG_FILES = ["test_readme.py", "test_jobs.py", "test_torture.py", "test_hosts.py", "test_accelerator.py"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG_FILES.index(item.path.name) if item.path.name in LONG_FILES else len(LONG_FILES))


@pytest.fixture
def same_root_logger():
    """For tests of the command, which sets up logging."""
    handlers = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = handlers


@pytest.fixture
def unchecked_types():
    """For what our own code says to a value of the wrong type: the check above would speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def golden():
    """name -> path of a file in tests/golden: values that other implementations computed."""
    return (REPO / "tests" / "golden").joinpath


@pytest.fixture(scope="session")
def golden_json(golden):
    """name -> contents of a JSON file among them."""
    return lambda name: json.loads(golden(f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def gemma_texts(golden_json):
    """Texts with the ids that transformers gives them with Gemma's tokenizer, and its text of these."""
    return golden_json("gemma_tokenizer/texts")


@pytest.fixture
def data_dir() -> pathlib.Path:
    folder = os.environ.get("T5X_LITE_DATA_DIR")
    if not folder:
        pytest.skip("needs the corpora's official files: set T5X_LITE_DATA_DIR")
    return pathlib.Path(folder)
