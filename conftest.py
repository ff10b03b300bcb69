"""In every test the shapes in annotations are checked: a wrong one is an error at the function that gets the array."""

from pathlib import Path

from jaxtyping import install_import_hook

import tests.shape_checks  # noqa: F401  (found by its name)

PACKAGES = ("jax_medllm", "torch_ref", "medllm_parity", "medllm")
ROOT = Path(__file__).parent


def modules_with_shapes() -> list[str]:
    """The product's modules that say what shape an array has."""
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    paths = [file.relative_to(ROOT).with_suffix("") for file in files if "from jaxtyping" in file.read_text("utf-8")]
    return [".".join(path.parts).removesuffix(".__init__") for path in paths]


install_import_hook(modules_with_shapes(), "tests.shape_checks.shapes_checked")
