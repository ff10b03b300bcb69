"""Models and adapters on disk: what is read, written, merged and refused."""

import numpy as np
import pytest

from medllm.errors import UserError
from medllm.model.directory import ModelDirectory, write_model

pytest_plugins = ["tests.small_weights"]


def test_one_file_and_many_shards_read_back_the_same(tmp_path, weights):
    write_model(tmp_path / "one", {}, weights.items())
    write_model(tmp_path / "many", {}, weights.items(), shard_bytes=1)
    assert len(list((tmp_path / "many").glob("model-*-of-00004.safetensors"))) == 4
    for folder in ("one", "many"):
        directory = ModelDirectory(tmp_path / folder)
        assert set(directory.names()) == set(weights)
        for name, value in weights.items():
            assert directory.shape(name) == value.shape
            assert directory.dtype(name) == value.dtype
            np.testing.assert_array_equal(directory.read(name), value)
            np.testing.assert_array_equal(directory.read_slice(name, slice(1, 3)), value[1:3])


def test_a_write_that_fails_leaves_nothing(tmp_path, weights):
    def failing():
        yield "a", np.ones(3)
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        write_model(tmp_path / "model", {}, failing())
    assert list(tmp_path.iterdir()) == []


def test_missing_things_are_named(tmp_path, base):
    with pytest.raises(UserError, match="no such model folder"):
        ModelDirectory(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        ModelDirectory(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{not json")
    with pytest.raises(UserError, match="not JSON"):
        ModelDirectory(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="only safetensors weights are read"):
        ModelDirectory(tmp_path / "empty").names()
    with pytest.raises(UserError, match=r"has no tensor lm_head\.weight"):
        ModelDirectory(base).read("lm_head.weight")


def test_a_missing_shard_is_named(tmp_path, weights):
    write_model(tmp_path / "m", {}, weights.items(), shard_bytes=1)
    (tmp_path / "m" / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00004"):
        ModelDirectory(tmp_path / "m").names()


def test_a_truncated_file_is_refused(base):
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="truncated"):
        ModelDirectory(base).names()
