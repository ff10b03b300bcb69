"""Errors for want of memory, as the frameworks word them, in one line; and those that are of something else, as they were."""

import numpy as np
import pytest

from medllm.config import ModelConfig, TrainingConfig
from medllm.errors import UserError
from medllm.mini.study import BASE
from medllm.shortage import advising
from medllm.stage_config import CorpusConfig, CptConfig, CurateConfig, RpoConfig


class OutOfMemoryError(RuntimeError):
    """PyTorch's goes by this name."""


MODEL = ModelConfig(str(BASE))
CPT = CptConfig(MODEL, "run", CorpusConfig(length=4096), training=TrainingConfig(batch_size=4, remat="none"))
SEEN = [
    # XLA on a GPU while a step runs, and its compiler on a TPU
    (
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 21474836480 bytes."),
        ": 20.0 GiB were asked",
    ),
    (
        RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 36.93G of 15.48G hbm."),
        ": 36.93G are needed",
    ),
    (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.15 GiB"), ": 2.00 GiB were asked for"),
    (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 68719476736 bytes."),
        ": 64.0 GiB",
    ),
    (MemoryError(), "out of memory (the weights alone take"),
]


@pytest.mark.parametrize(("error", "said"), SEEN)
def test_each_frameworks_error_is_one_line_with_what_was_asked_for(error, said):
    with pytest.raises(UserError) as raised, advising(CPT, "jax"):
        raise error
    line = str(raised.value)
    assert said in line
    assert "\n" not in line
    assert "--training.batch_size (4; --training.accumulation makes up for it), --training.remat (layer, from none)" in line
    assert "--corpus.length (4,096)" in line


def test_numpys_own_is_one_too():
    with pytest.raises(UserError, match="out of memory"), advising(CPT, "jax"):
        np.ones(1 << 60, np.uint8)


def test_what_cannot_be_lowered_is_not_named_and_the_planners_figure_is():
    config = RpoConfig(
        ModelConfig(str(BASE), quantization="nf4"), "run", "p", training=TrainingConfig(batch_size=1, remat="layer")
    )
    with pytest.raises(UserError) as raised, advising(config, "jax"):
        raise MemoryError
    line = str(raised.value)
    assert "batch_size" not in line
    assert "remat" not in line
    assert "quantization" not in line
    assert "--pairs.max_length (4,096)" in line
    assert "the weights alone take" in line
    assert line.endswith("or spread it over more devices (--mesh)")


def test_the_reference_engine_has_no_mesh():
    with pytest.raises(UserError) as raised, advising(CPT, "torch"):
        raise MemoryError
    assert "--mesh" not in str(raised.value)


def test_generation_is_told_of_its_own_settings():
    config = CurateConfig(MODEL, "run", ("problems",))
    with pytest.raises(UserError, match=r"--batch_size \(32\), .* --sampling.max_new_tokens \(512\)"), advising(config, "jax"):
        raise MemoryError


@pytest.mark.parametrize(
    "error",
    [
        ValueError("shapes do not fit"),
        RuntimeError('RESOURCE_EXHAUSTED: Error writing local file "x": No space left on device'),
        UserError("out of memory of another kind"),
    ],
)
def test_another_error_stays_what_it_is(error):
    with pytest.raises(Exception) as raised, advising(CPT, "jax"):  # noqa: PT011  (which one is what is asked)
        raise error
    assert raised.value is error
