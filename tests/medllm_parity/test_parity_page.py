"""The page of an audit, from numbers made up."""

import base64
import re

import pytest

pytest.importorskip("jax")
pytest.importorskip("torch")

from medllm_parity.measure import Audit, Drift
from medllm_parity.page import render

FACTS = {"model": "m", "adapters": [], "reference": None, "reference_adapters": [], "dtype": "float32", "quantization": "none"}


def drift_plot(*errors: tuple[float, float]) -> tuple[str, str]:
    """Page and SVG of an audit whose residual stream has these errors (JAX, torch) after its layers."""
    drift = [Drift(layer, "layer output", jax, torch, True) for layer, (jax, torch) in enumerate(errors)]
    page = render(Audit(len(errors), {**FACTS, "rows": 3, "tokens": 24}, drift=drift), {})
    image = re.search(r"data:image/svg\+xml;base64,([\w+/=]+)", page)
    assert image is not None
    return page, base64.b64decode(image[1]).decode("utf-8")


def test_the_drift_plot_has_a_number_at_every_power_of_ten_though_all_errors_lie_within_one():
    page, svg = drift_plot((2e-7, 2.1e-7), (3e-7, 3e-7), (4e-7, 4.2e-7))
    for power in "10⁻⁸", "10⁻⁷", "10⁻⁶", "10⁻⁵", "10⁻⁴", "10⁻³":
        assert f">{power}<" in svg
    assert "0.95 times as far from the truth as torch" in page


def test_the_drift_plot_reaches_as_far_as_the_errors_do():
    _, svg = drift_plot((2e-7, 2e-7), (30.0, 3e-7))
    assert ">10⁻⁸<" in svg
    assert ">10²<" in svg
