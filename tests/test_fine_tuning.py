"""What the fine-tuning scripts share: files, rows, samples, options."""

import argparse
import gzip
import json
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("accelerate", reason="transformers' Trainer needs it; it is no dependency of the models")

import fine_tuning
from fine_tuning import Field, UsageError

FIELDS = {"text": Field("body"), "spans": Field("spans", (list,), "list of spans")}
ROWS = [{"body": f'Text {i}, "quoted"\nand long: ' + "x" * 200_000, "spans": [i, [i + 1]]} for i in range(3)]
EXPECTED = [{"text": row["body"], "spans": row["spans"]} for row in ROWS]


def as_csv(rows):
    def quoted(value):
        text = value if isinstance(value, str) else json.dumps(value)
        return '"' + text.replace('"', '""') + '"'

    return "\n".join(["body,spans,other", *(f"{quoted(row['body'])},{quoted(row['spans'])},1" for row in rows)]) + "\n"


def as_json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


# --- rows


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.csv", "rows.csv.gz"])
def test_read_rows_of_every_kind_of_file(tmp_path, name):
    text = (as_csv if ".csv" in name else as_json_lines)(ROWS).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert fine_tuning.read_rows(tmp_path / name, FIELDS) == EXPECTED


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", b'body,spans\na,"[1]"\nb,none\n', 'line 3: no list of spans in a field "spans"'),
        ("rows.csv", b"text,spans\na,[1]\n", 'line 2: no text in a field "body"'),
        ("rows.csv", b"body,spans\na\n", 'line 2: no list of spans in a field "spans"'),
        ("rows.jsonl", b"[1]\n", 'line 1: no text in a field "body"'),
        ("rows.jsonl", b'{"body": "\xff"}\n', "cannot read"),
        ("rows.jsonl.gz", b"no gzip", "cannot read"),
        ("rows.jsonl.gz", gzip.compress(as_json_lines(ROWS).encode())[:-20], "cannot read"),
    ],
    ids=["csv value", "csv column", "csv short line", "json list", "not utf-8", "no gzip", "half a gzip"],
)
def test_read_rows_names_what_it_cannot_use(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as raised:
        fine_tuning.read_rows(tmp_path / name, FIELDS)
    assert message in str(raised.value) and name in str(raised.value) and "\n" not in str(raised.value)


def test_sample_is_always_the_same_one():
    rows = list(range(100))
    chosen = fine_tuning.sample(rows, 10)
    assert len(set(chosen)) == 10 and chosen == fine_tuning.sample(rows, 10)
    assert fine_tuning.sample(rows, None) is rows and fine_tuning.sample(rows, 100) is rows


def test_class_names_take_the_place_of_indices():
    batch = {"text": ["a", "b"], "one": [1, -1], "many": [[0, 1], []]}
    named = fine_tuning.name_classes(batch, {"one": ["x", "y"], "many": ["u", "v"]})
    assert named == {"text": ["a", "b"], "one": ["y", None], "many": [["u", "v"], []]}


# --- files


def test_write_atomically_leaves_the_old_file_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    fine_tuning.write_atomically(path, "old")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fine_tuning.os, "replace", killed)
        fine_tuning.write_atomically(path, "new")
    assert path.read_text() == "old"
    fine_tuning.write_atomically(path, "new")
    assert path.read_text() == "new" and [*tmp_path.iterdir()] == [path]


def test_save_final_replaces_a_whole_folder(tmp_path):
    config = SimpleNamespace(use_cache=False)  # as the Trainer leaves it

    def save_model(folder):
        assert config.use_cache
        (tmp_path / "final.partial").mkdir()
        (tmp_path / "final.partial" / "new").write_text(folder)

    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "old").write_text("")
    trainer = SimpleNamespace(
        model=SimpleNamespace(config=config), save_model=save_model, is_world_process_zero=lambda: True
    )
    fine_tuning.save_final(trainer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["new"]


def test_last_checkpoint_is_the_newest_whole_one(tmp_path):
    assert fine_tuning.last_checkpoint(tmp_path) is None
    for step, state in ((9, '{"global_step": 9}'), (10, '{"global_step": 10}'), (11, '{"glob')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-12").mkdir()
    assert fine_tuning.last_checkpoint(tmp_path) == (tmp_path / "checkpoint-10", {"global_step": 10})


@pytest.mark.parametrize("left", ["checkpoint", "final"])
def test_check_same_run_guards_what_a_run_has_left(tmp_path, left):
    args = argparse.Namespace(output=tmp_path, lr=0.1, log_every=5)
    fine_tuning.check_same_run(args, {"output", "log_every"})
    args.lr = 0.2
    fine_tuning.check_same_run(args, {"output", "log_every"})  # nothing was trained yet
    if left == "final":
        (tmp_path / "final").mkdir()
    else:
        (tmp_path / "checkpoint-1").mkdir()
        (tmp_path / "checkpoint-1" / "trainer_state.json").write_text("{}")
    args.log_every = 6
    fine_tuning.check_same_run(args, {"output", "log_every"})
    args.lr = 0.3
    with pytest.raises(UsageError, match="lr 0.2, not 0.3"):
        fine_tuning.check_same_run(args, {"output", "log_every"})


# --- results


def test_ratio_spread_is_the_ratio_of_sums_and_what_resampling_gives():
    assert fine_tuning.ratio_spread([0, 0], [0, 0]) == (0, 0, 0)
    assert fine_tuning.ratio_spread([1, 2], [2, 4]) == (50, 50, 50)
    rng = np.random.default_rng(1)
    wholes = rng.integers(1, 40, 300)
    parts = rng.binomial(wholes, 0.3)
    mean, low, high = fine_tuning.ratio_spread(parts, wholes)
    assert mean == pytest.approx(100 * parts.sum() / wholes.sum())
    half = 196 * np.sqrt(((parts - mean / 100 * wholes) ** 2).sum()) / wholes.sum()  # by the delta method
    assert low == pytest.approx(mean - half, abs=0.3) and high == pytest.approx(mean + half, abs=0.3)


# --- options


def parser():
    made = fine_tuning.make_parser("A script.")
    fine_tuning.add_data_options(made, ["text"])
    fine_tuning.add_training_options(made)
    return made


def test_every_training_option_reaches_the_trainer(tmp_path, monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # older releases would keep --bf16 there for other tests

    options = (
        "--epochs 2 --steps 7 --batch-size 3 --gradient-accumulation 5 --lr 0.5 --warmup 4 --schedule cosine --bf16"
    )
    options += " --seed 9 --log-every 11 --save-every 13 --eval-every 17 --eval-batch-size 19 --train-file x"
    args = parser().parse_args([*options.split(), "--output", str(tmp_path)])
    made = TrainingArguments(**fine_tuning.training_keywords(args))
    assert (made.num_train_epochs, made.max_steps, made.per_device_train_batch_size) == (2, 7, 3)
    assert (made.gradient_accumulation_steps, made.learning_rate, made.warmup_steps) == (5, 0.5, 4)
    assert (made.lr_scheduler_type, made.bf16, made.seed, made.logging_steps) == ("cosine", True, 9, 11)
    assert (made.save_steps, made.eval_steps, made.per_device_eval_batch_size) == (13, 17, 19)
    assert made.eval_strategy == "steps" and made.output_dir == str(tmp_path)
    args.eval_every, args.steps = 0, None
    made = TrainingArguments(**fine_tuning.training_keywords(args))
    assert made.eval_strategy == "no" and made.max_steps == -1


@pytest.mark.parametrize(
    "option",
    [
        ["--batch-size", "0"],
        ["--warmup", "-1"],
        ["--limit-train", "0"],
        ["--steps", "x"],
        ["--lr", "nan"],
        ["--epochs", "0"],
    ],
)
def test_impossible_numbers_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--output", "x", *option])
    assert option[0] in capsys.readouterr().err


def test_check_length_completes_and_refuses():
    config = SimpleNamespace(max_position_embeddings=64)
    assert fine_tuning.check_length("--max-length", None, config) == 64
    assert fine_tuning.check_length("--max-length", 64, config) == 64
    assert fine_tuning.check_length("--max-length", 9, SimpleNamespace()) == 9
    with pytest.raises(UsageError, match="--max-length 65 is more than the model's 64 positions"):
        fine_tuning.check_length("--max-length", 65, config)
    with pytest.raises(UsageError, match="--max-length is needed"):
        fine_tuning.check_length("--max-length", None, SimpleNamespace())


def test_run_script_tells_errors_in_one_line(capsys):
    def failing(_):
        raise UsageError("no such file: x")

    assert fine_tuning.run_script("run_it", failing, ["--a", "b c"]) == 1
    assert capsys.readouterr().err == "run_it: no such file: x\n"
    assert fine_tuning.run_script("run_it", lambda command: command, ["--a", "b c"]) == 0
    assert capsys.readouterr().out == "python examples/run_it.py --a 'b c'\n"


# --- training


def test_train_goes_on_from_the_last_checkpoint_and_not_past_the_end(tmp_path):
    """With a Trainer that only notes what it was asked for."""
    calls = []

    def build(checkpoint):
        return SimpleNamespace(train=lambda **given: calls.append(given), state=SimpleNamespace(global_step=5))

    trained = fine_tuning.train(tmp_path, build)
    assert calls.pop() == {"resume_from_checkpoint": None} and trained.checkpoint is None
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "trainer_state.json").write_text('{"global_step": 3, "max_steps": 5}')
    trained = fine_tuning.train(tmp_path, build)
    assert calls.pop() == {"resume_from_checkpoint": str(folder)} and trained.state == {"global_step": 5}
    trained = fine_tuning.train(tmp_path, build, finished=lambda state: state["global_step"] == 3)
    assert not calls and trained.state["global_step"] == 3 and trained.checkpoint == folder
