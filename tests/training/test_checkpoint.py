"""Training states in folders of any name: read back before they count as written."""

import grain.python as grain
import jax.numpy as jnp
import pytest

from medsam_jax.errors import UserError
from medsam_jax.training import checkpoint
from medsam_jax.training.step import TrainState


def state(step: int) -> TrainState:
    arrays = {"a.kernel": jnp.arange(6.0) * step}
    return TrainState(jnp.int32(step), arrays, (), arrays)


def numbers():
    return iter(grain.MapDataset.range(100).to_iter_dataset())


@pytest.mark.parametrize("name", ["w [v2]", "**", "back\\slash", "n\nl", "é #1", "y" * 240])
def test_a_run_resumes_in_any_folder(tmp_path, name):
    data = numbers()
    saved = checkpoint.TrainCheckpoints(tmp_path / name / "checkpoints", 2)
    assert saved.restore_latest(state(0), data) is None
    for step in (1, 2, 3):
        assert next(data) == step - 1
        saved.save(step, state(step), data, {"best_score": step})
    saved.close()
    (tmp_path / name).rename(tmp_path / "moved [x]")
    data = numbers()
    again = checkpoint.TrainCheckpoints(tmp_path / "moved [x]" / "checkpoints", 2)
    restored, progress = again.restore_latest(state(0), data)
    again.close()
    assert (int(restored.step), progress, next(data)) == (3, {"best_score": 3}, 3)
    assert restored.arrays["a.kernel"].tolist() == [0, 3, 6, 9, 12, 15]
    found = {path.name for path in (tmp_path / "moved [x]" / "checkpoints").iterdir()}
    assert found == {"2", "3"}


def test_a_state_that_cannot_be_read_back_ends_the_run(tmp_path, monkeypatch):
    """Orbax itself leaves the arrays of a folder with brackets where it does not find them."""
    monkeypatch.setattr(checkpoint, "plain_path", lambda path: path.absolute())
    data = numbers()
    saved = checkpoint.TrainCheckpoints(tmp_path / "w [v2]" / "checkpoints", 2)
    saved.save(1, state(1), data, {})
    with pytest.raises(UserError, match=r"checkpoints/1: was written and cannot be read back"):
        saved.save(2, state(2), data, {})
    saved.close()
