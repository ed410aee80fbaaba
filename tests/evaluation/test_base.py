"""The journal of finished work, and what tells checkpoints apart."""

from medsam_jax.evaluation.base import Journal, checkpoint_identity


def test_journal_drops_a_cut_line_and_reads_every_process(tmp_path):
    Journal(tmp_path, {"a": 1}, process=0).append([{"n": 1}, {"n": 2}])
    path = next(tmp_path.iterdir())
    path.write_text(path.read_text() + '{"n": 3')
    Journal(tmp_path, {"a": 1}, process=1).append([{"n": 4}])
    journal = Journal(tmp_path, {"a": 1}, process=0)
    journal.append([{"n": 5}])
    assert sorted(row["n"] for row in journal.rows()) == [1, 2, 4, 5]
    assert Journal(tmp_path, {"a": 2}).rows() == []


def test_identity_changes_with_the_checkpoint(tmp_path):
    (tmp_path / "model.json").write_text("{}")
    before = checkpoint_identity(str(tmp_path))
    (tmp_path / "model.json").write_text("{ }")
    assert checkpoint_identity(str(tmp_path)) != before
    assert checkpoint_identity("lite_medsam") == ["lite_medsam"]
