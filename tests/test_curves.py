"""`pretraining.curves` joins the logs of runs that followed each other."""

import json
from pathlib import Path

import pytest

from pretraining.curves import join_curves, main


def write_log(folder: Path, name: str, field: str, losses: dict[int, float]) -> Path:
    folder.mkdir()
    lines = [{"step": step, "loss": loss} for step, loss in losses.items()] + [{"step": 20, "eval_loss": 1.0}]
    (folder / name).write_text(json.dumps({field: lines}))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    first = write_log(tmp_path / "checkpoint-20", "trainer_state.json", "log_history", {10: 5.0, 20: 4.0})
    return [first, write_log(tmp_path / "b", "history.json", "history", {5: 3.0})]


def test_a_run_begins_where_the_one_before_it_ended(runs):
    first, second = join_curves([(str(runs[0]), 100), (str(runs[1]), 8)])
    assert first["points"] == [[1000, 5.0], [2000, 4.0]]
    assert second["points"] == [[2040, 3.0]]


def test_the_command_writes_points_and_picture(runs, tmp_path):
    assert main([f"{runs[0]}=100", f"{runs[1]}=8", "--output", str(tmp_path / "training")]) == 0
    assert [len(curve["points"]) for curve in json.loads((tmp_path / "training.json").read_text())] == [2, 1]
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_a_log_is_named(tmp_path, capsys):
    assert main([f"{tmp_path}=8", "--output", str(tmp_path / "training")]) == 1
    assert f"{tmp_path} has neither history.json nor trainer_state.json" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["runs/a", "=8", "runs/a=", "runs/a=0", "runs/a=-1"])
def test_a_run_needs_its_tokens_per_step(text, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([text, "--output", str(tmp_path / "training")])
    assert f"{text!r} is not RUN=TOKENS_PER_STEP" in capsys.readouterr().err


def test_a_log_without_a_loss_is_named(tmp_path, capsys):
    run = write_log(tmp_path / "a", "history.json", "history", {})
    assert main([f"{run}=8", "--output", str(tmp_path / "training")]) == 1
    assert "holds no training loss" in capsys.readouterr().err
