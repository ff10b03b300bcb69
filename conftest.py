"""In every test the shapes in annotations are checked: a wrong one is an error at the function that gets the array.

A program that was compiled once is not compiled again in the same session, and files with slow tests come first.
"""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

import tests.shape_checks  # noqa: F401  (found by its name)
from tests.forced_devices import NOT_OPTIMIZED

PACKAGES = ("jax_medllm", "torch_ref", "medllm_parity", "medllm")
ROOT = Path(__file__).parent


def modules_with_shapes() -> list[str]:
    """The product's modules that say what shape an array has."""
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    paths = [file.relative_to(ROOT).with_suffix("") for file in files if "from jaxtyping" in file.read_text("utf-8")]
    return [".".join(path.parts).removesuffix(".__init__") for path in paths]


# On matrices this small, torch's threads only wait for each other; here, and in every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nor is anything compiled by it: for that bitsandbytes would import torch's compiler, a second in each process.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# LLVM's passes take long, and change nothing of what a program is asked to compute. On an accelerator, where the tests look at
# what the machine really gives, they stay.
if os.environ.get("JAX_PLATFORMS") == "cpu":
    os.environ.setdefault("XLA_FLAGS", NOT_OPTIMIZED)
# Tracing makes much that stays: at Python's own threshold an eighth of its time goes to looking for garbage in all there is.
gc.set_threshold(100_000)
install_import_hook(modules_with_shapes(), "tests.shape_checks.shapes_checked")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported stays: nobody looks for garbage in it, now or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.unfreeze = lambda: None  # after an audit all of it would be looked at again, in each of the next
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first: of several processes none is left to wait for the last one's."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep compiled programs for the session, all its processes and their children: each model that is opened would compile the
    same ones again. They are the session's own, not those that the user keeps."""
    if jax.config.jax_compilation_cache_dir is None:
        mine = tmp_path_factory.getbasetemp()
        programs = (mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine) / "programs"
        for name, value in {"compilation_cache_dir": str(programs), "persistent_cache_min_compile_time_secs": 0.0}.items():
            jax.config.update(f"jax_{name}", value)
            os.environ[f"JAX_{name.upper()}"] = str(value)
