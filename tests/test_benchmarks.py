"""The benchmarks' own logic, and every script end to end with tiny models. Nothing is asserted about how long they take."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks import cases, contestants, decoding, embedding, gpu, profile_layer, runner, speed, targets, worker
from benchmarks.cases import Case, Result
from benchmarks.contestants import Contestant, WrongOutput
from benchmarks.worker import Call, Failure
from family_sources import make_embedder
from lsg_albert.conversion import convert_checkpoint

TINY = cases.SIZES["tiny"]
RUN = ["--size", "tiny", "--threads", "1", "--rounds", "2"]


# Stand-ins for contestants: the workers import this file to find them.


def _raise(size, positions, mode):
    raise RuntimeError("this one | cannot be built")


def _fail_check(size, device):
    contestants.check_equal(torch.zeros(2), torch.ones(2), "16 tokens")


class _Dying(contestants.Floor):
    def forward(self, embeddings):
        os.kill(os.getpid(), signal.SIGKILL)


class _Hungry(contestants.Floor):
    def forward(self, embeddings):
        torch.empty(worker.available_memory(), dtype=torch.uint8)


class _NotFinite(contestants.Floor):
    def forward(self, embeddings):
        return super().forward(embeddings / 0)


def _floor(model_class):
    return Contestant(model_class.__name__, lambda size, positions, mode: model_class(size), takes="embeddings")


broken = Contestant("broken", _raise)
wrong = replace(contestants.CONTESTANTS["floor"], check=_fail_check)
dying, hungry, not_finite = map(_floor, (_Dying, _Hungry, _NotFinite))
STAND_INS = [f"test_benchmarks:{name}" for name in ("broken", "wrong", "dying", "hungry", "not_finite")]


def result(seconds, name="ours", lengths=(64,), **fields):
    """A result with these times in rounds 1, 2, ..., or in the rounds that are given as keys."""
    seconds = seconds if isinstance(seconds, dict) else dict(enumerate(seconds, start=1))
    return Result(Case(name, fields.pop("mode", "forward"), lengths), seconds, **fields)


# Statistics


def test_time_ratio_is_taken_within_rounds():
    # The machine was ten times slower in round 2: the ratio of the medians would be 3 / 1.5, not 2 in every round.
    ours, other = result([2.0, 20.0, 3.0]), result([1.0, 10.0, 1.5])
    assert cases.time_ratio([ours], [other]) == 2.0
    assert cases.time_ratio([result([2.0, 9.0, 4.0])], [result([1.0, 3.0, 2.0])]) == 2.0  # of 2, 3 and 2


def test_time_ratio_adds_up_what_stands_on_one_side():
    assert cases.time_ratio([result([6.0, 8.0])], [result([1.0, 1.0]), result([2.0, 3.0])]) == 2.0


def test_time_ratio_uses_common_rounds_only():
    assert cases.time_ratio([result([2.0, 2.0, 50.0])], [result([1.0, 1.0])]) == 2.0
    # The slow one has only its first call.
    assert cases.time_ratio([result([3.0, 1.0, 2.0])], [result({0: 8.0})]) == 0.25


def test_ratios_of_failed_cases_are_none():
    failed = result([], error="broken")
    assert cases.time_ratio([result([1.0])], [failed]) is None
    assert cases.time_ratio([failed], [result([1.0])]) is None
    assert cases.memory_ratio(result([1.0], peak_bytes=3), failed) is None
    assert cases.memory_ratio(result([1.0], peak_bytes=3), result([1.0], peak_bytes=2)) == 1.5


def test_result_counts_real_tokens_and_survives_json():
    measured = result([2.0, 4.0, 6.0], lengths=(100, 20), peak_bytes=5, weights_bytes=7, code="abc")
    assert (measured.median, measured.spread, measured.tokens_per_second) == (4.0, (2.0, 6.0), 30.0)
    assert measured.case.shape == (2, 100)
    assert cases.result_from_json(json.loads(json.dumps(cases.result_to_json(measured)))) == measured


def plan(**fields):
    return runner.Plan(
        **{"size": TINY, "positions": 64, "threads": 1, "rounds": 5, "budget": 60, "limit": 60, **fields}
    )


@pytest.mark.parametrize("seconds, in_all", [(1.0, 6.0), (15.0, 60.0), (50.0, 50.0), (100.0, 100.0)])
def test_seconds_of_case_keeps_to_the_budget(seconds, in_all):
    assert runner.seconds_of_case(seconds, plan()) == in_all


def test_estimate_left_scales_the_nearest_result():
    done = [result([1.0], lengths=(64,)), result([5.0], name="floor", lengths=(64,)), result([], error="broken")]
    todo = [Case("ours", "forward", (128,)), Case("ours", "training", (64,))]
    assert runner.estimate_left(done, todo, plan(rounds=1)) == 2 * 2.0 + 2 * 3.0
    assert runner.estimate_left([], todo, plan()) is None


# Inputs and checks


def test_make_inputs_masks_and_labels_only_what_is_real():
    inputs = worker.make_inputs(Case("ours", "training", (40, 10)), TINY)
    assert inputs["attention_mask"].sum(1).tolist() == [40, 10]
    assert (inputs["input_ids"][1, 10:] == 0).all() and (inputs["input_ids"][0] >= worker.FIRST_WORD).all()
    labelled = inputs["labels"] != worker.IGNORED
    assert 1 < labelled.sum() < 20 and not labelled[1, 10:].any()
    assert torch.equal(inputs["labels"][labelled], inputs["input_ids"][labelled])
    assert set(worker.make_inputs(Case("ours", "forward", (40, 40)), TINY)) == {"input_ids"}


def test_make_inputs_gives_the_floor_embeddings():
    embeddings = worker.make_inputs(Case("floor", "training", (8, 8), "bfloat16"), TINY, "embeddings")["embeddings"]
    assert (embeddings.shape, embeddings.dtype, embeddings.requires_grad) == ((16, 16), torch.bfloat16, True)


def test_check_equal_trips_on_differences_shapes_and_nan():
    ones = torch.ones(2, 3)
    contestants.check_equal(ones + 5e-5, ones, "ours")
    for other in (ones + 2e-4, ones[:1], ones * float("nan")):
        with pytest.raises(WrongOutput, match="ours"):
            contestants.check_equal(other, ones, "ours")


@pytest.mark.parametrize(
    "fields", [{}, {"sparsity_type": "lsh"}, {"sparsity_type": "none"}, {"attn_implementation": "eager"}]
)
def test_check_against_albert_accepts_ours(fields):
    contestants.check_against_albert(TINY, "cpu", **fields)


@pytest.mark.parametrize("fields", [{"layer_norm_eps": 0.1}, {"hidden_act": "relu"}, {"num_hidden_layers": 3}])
def test_check_against_albert_trips_on_another_model(fields):
    with pytest.raises(WrongOutput, match="differs from ALBERT's"):
        contestants.check_against_albert(TINY, "cpu", **fields)


def test_floor_is_the_products_of_ours():
    floor = contestants.Floor(TINY)
    names = ["embedding_hidden_mapping_in", "query", "key", "value", "dense", "ffn", "ffn_output"]
    model = contestants.CONTESTANTS["ours"].make(TINY, 64, "forward")
    ours = {name.rpartition(".")[2]: m for name, m in model.encoder.named_modules() if isinstance(m, nn.Linear)}
    theirs = {name.rpartition(".")[2]: m for name, m in floor.named_modules() if isinstance(m, nn.Linear)}
    assert list(theirs) == names
    assert {name: m.weight.shape for name, m in theirs.items()} == {name: ours[name].weight.shape for name in names}
    states = floor.eval()(torch.randn(1000, TINY.embedding)).last_hidden_state
    assert 0.1 < states.std() < 10


def test_contestant_names_know_groups_and_refuse_others():
    assert contestants.contestant_names("ours,peers,ours") == ["ours", *contestants.PEERS]
    with pytest.raises(ValueError, match="no contestant 'albatross'.*longformer"):
        contestants.contestant_names("albatross")


# speed.py, end to end


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def arguments(folder):
    names = ",".join(["ours", *STAND_INS, "albert-eager", "floor"])
    return [
        "--name", "tiny", "--results", str(folder), "--contestants", names, "--lengths", "64", "--device", "cpu",
        "--dtypes", "float32", *RUN,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(arguments):
    return speed.main(arguments)


def read(folder, name="tiny"):
    return json.loads((folder / f"{name}.json").read_text())


def test_speed_measures_every_case(finished, folder):
    data = read(folder)
    assert list(data["groups"]) == ["forward float32 1 x 64", "training float32 1 x 64"]
    for group in data["groups"].values():
        good = [r for r in group if r["case"]["contestant"] in ("ours", "albert-eager", "floor")]
        assert [r["error"] for r in good] == [None] * 3
        assert all(set(r["seconds"]) == {"1", "2"} and r["weights_bytes"] > 0 for r in good)
    machine = data["machine"]
    assert machine["threads"] == 1 and machine["torch"] == torch.__version__ and machine["processor"]
    assert not list(folder.glob("*.tmp"))


def test_speed_shows_failures_and_goes_on(finished, folder):
    errors = {
        "broken": "RuntimeError: this one | cannot be built",
        "wrong": "WrongOutput: 16 tokens: the output differs from ALBERT's by 1.0e+00, more than 1e-04",
        "dying": "the process was killed (signal 9), as the kernel does when memory runs out",
        "hungry": "can't allocate memory",
        "not_finite": "WrongOutput: the output is not finite",
    }
    for group in read(folder)["groups"].values():
        found = {r["case"]["contestant"].partition(":")[2]: r["error"] for r in group}
        for name, error in errors.items():
            assert error in found[name]
    assert finished.count("**failed** | RuntimeError: this one / cannot be built |") == 2
    assert "| test_benchmarks:dying | failed |" in finished


def test_speed_writes_tables_and_a_picture(finished, folder):
    assert (folder / "tiny.md").read_text() == finished
    for text in ("## forward, float32", "## training, float32", "| ours / it |", "- `floor`: only the matrix"):
        assert text in finished
    pytest.importorskip("matplotlib")
    assert "![Time and memory against length](tiny.png)" in finished
    assert (folder / "tiny.png").read_bytes().startswith(b"\x89PNG")


def test_speed_goes_on_where_it_stopped(finished, folder, arguments, monkeypatch, capsys):
    measured = []
    monkeypatch.setattr(speed, "run_groups", lambda *args: runner.run_groups(*args, say=measured.append))
    monkeypatch.setattr(runner, "measure_group", lambda workers, cases, code, say: [result([1.0])])
    speed.main(arguments)
    assert measured[0].startswith("0 of 2 groups")
    # A group without one of the contestants is measured anew as a whole, and so are results of other code.
    store = runner.Store(folder / "tiny.json", read(folder)["machine"], read(folder)["settings"])
    everything = [r.case for r in store.groups["forward float32 1 x 64"]]
    assert store.has("forward float32 1 x 64", everything[:2])
    assert not store.has("forward float32 1 x 64", [*everything, Case("bigbird", "forward", (64,))])
    monkeypatch.setattr(runner, "code_digest", lambda: "other")
    assert runner.Store(folder / "tiny.json", read(folder)["machine"], read(folder)["settings"]).groups == {}


def test_speed_refuses_results_that_were_measured_otherwise(finished, arguments):
    with pytest.raises(SystemExit, match="was measured with other settings"):
        speed.main([*arguments, "--rounds", "3"])


@pytest.mark.parametrize("extra", [["--modes", "sideways"], ["--dtypes", "float8"], ["--contestants", "albatross"]])
def test_speed_refuses_unknown_names(arguments, extra):
    with pytest.raises(SystemExit):
        speed.main([*arguments, *extra])


class FakeWorkers:
    """Calls take one second each; a case whose batch is too large runs out of memory."""

    def __init__(self, largest=8, error="OutOfMemoryError: CUDA out of memory", seconds=1.0, **fields):
        self.plan, self.largest, self.error, self.seconds = plan(**fields), largest, error, seconds
        self.running, self.asked = {}, []

    def ask(self, request, case):
        self.asked.append((request, case))
        if len(case.lengths) > self.largest:
            return Failure(self.error)
        return Call(self.seconds, 1000 * case.tokens, 10)


def test_measure_group_takes_turns():
    workers = FakeWorkers(rounds=2)
    group = [Case(name, "forward", (64,)) for name in ("a", "b", "c")]
    runner.measure_group(workers, group, "code", say=lambda line: None)
    order = "".join(case.contestant for _, case in workers.asked)
    assert order == "abc" + "bca" + "cab"


def test_measure_group_keeps_to_the_budget():
    case = Case("a", "forward", (64,))
    few = runner.measure_group(FakeWorkers(seconds=20.0), [case], "code", say=lambda line: None)[0]
    assert set(few.seconds) == {1, 2}  # and the first call: 60 seconds
    one = runner.measure_group(FakeWorkers(seconds=45.0), [case], "code", say=lambda line: None)[0]
    assert set(one.seconds) == {0} and speed.count_calls(one) == "1, cold"


# targets.py


def test_make_targets_are_those_of_the_project():
    made = targets.make_targets()
    assert len(made) == 21 and len({target.text for target in made}) == 21
    limits = {target.text: target.limit for target in made}
    assert limits["forward, 4096, bfloat16: time / albert-sdpa"] == 0.35
    assert limits["forward, float32, 16384 against 4096: peak memory beyond the weights"] == 4.2
    groups = targets.make_groups(made)
    assert [case.contestant for case in groups["forward-float32"]] == ["ours", "floor", "albert-sdpa", "longformer"]
    assert [case.lengths for case in groups["padding-forward"]] == [
        targets.DOCUMENTS, *((length,) for length in targets.DOCUMENTS), targets.DOCUMENTS
    ]  # fmt: skip


def test_target_row_says_met_not_met_and_failed():
    target = targets.make_targets()[0]
    (ours,), (floor,) = target.numerators, target.denominators

    def row(seconds, **fields):
        return targets.target_row(target, {ours: Result(ours, {1: seconds}, **fields), floor: Result(floor, {1: 1.0})})

    assert row(1.3)[1:] == ["1.300", "<= 1.40", "met"]
    assert row(1.5)[1:] == ["1.500", "<= 1.40", "**not met**"]
    assert row(1.5, error="broken")[1:] == ["failed", "<= 1.40", "not met (broken)"]


def test_targets_run_end_to_end(tmp_path):
    groups = ["growth", "padding-forward", "padding-backward"]
    arguments = ["--name", "t", "--results", str(tmp_path), "--groups", ",".join(groups), *RUN]
    text = targets.main(arguments)
    assert (tmp_path / "t.md").read_text() == text
    assert list(read(tmp_path, "t")["groups"]) == groups
    assert text.count("| <= ") == 6 and "| forward, float32, 512 against 128: time |" in text
    assert "1 x 9 ours" in text


def test_very_long_targets_are_those_of_the_project():
    limits = {(target.quantity, target.numerators[0].mode, target.numerators[0].lengths): target.limit
              for target in targets.very_long_targets()}  # fmt: skip
    assert limits == {
        ("time", "forward", (131072,)): 8.4,
        ("GiB", "forward", (65536,)): 24,
        ("GiB", "forward", (131072,)): 24,
        ("GiB", "checkpointed", (32768,)): 24,
    }


def test_measured_value_in_gib_is_the_peak_and_the_weights():
    target = targets.very_long_targets()[1]
    (case,) = target.cases
    measured = Result(case, {1: 1.0}, peak_bytes=2**31, weights_bytes=2**30)
    assert targets.measured_value(target, {case: measured}) == 3.0
    assert targets.measured_value(target, {case: replace(measured, peak_bytes=None)}) is None


def test_very_long_targets_run_end_to_end(tmp_path):
    arguments = ["--set", "very-long", "--name", "v", "--results", str(tmp_path), "--groups", "checkpointed", *RUN]
    assert targets.main(arguments).count("| <= 24.00 | met |") == 1
    with pytest.raises(SystemExit):
        targets.parse_args(["--set", "very-long", "--groups", "training"])


def test_checkpointed_training_keeps_no_activations_of_layers():
    def kept(mode):
        """The tensors kept for the backward pass, in bytes."""
        case = Case("ours", mode, (64,))
        model = worker.make_model(worker.Setup("ours", TINY, 64, 1), case)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            model(**worker.make_inputs(case, TINY))
        return sum(sizes)

    assert kept("checkpointed") < kept("training") / 2


# decoding.py


def written(whole, first, error=None):
    """The results of calls for five tokens and for one, with these seconds by round."""
    case = Case("ours", "generate", (64,), new_tokens=5)
    return Result(case, whole, error=error), Result(replace(case, new_tokens=1), first)


def test_one_more_token_is_the_difference_within_rounds():
    token = decoding.one_more_token(*written({1: 9.0, 2: 90.0, 3: 4.0}, {1: 1.0, 2: 10.0}))
    assert token.seconds == {1: 2.0, 2: 20.0}
    assert decoding.one_more_token(*written({0: 9.0}, {1: 1.0, 2: 1.0})).seconds == {0: 2.0}  # no common round
    assert decoding.one_more_token(*written({}, {1: 1.0}, error="broken")).error == "broken"


@pytest.fixture(scope="module")
def writer():
    """Our sequence-to-sequence model, its inputs for greedy decoding, and what it writes."""
    case = Case("ours", "generate", (64,), new_tokens=4)
    model = worker.make_model(worker.Setup("ours", TINY, 64, 1), case)
    inputs = worker.make_inputs(case, TINY)
    return model, inputs, worker.run_model(model, inputs, "generate")


def test_check_generated_trips_on_other_tokens_and_an_early_stop(writer):
    model, inputs, output = writer
    worker.check_generated(output.sequences, model, inputs)
    with pytest.raises(WrongOutput, match=r"shape \(1, 4\), not \(1, 5\)"):
        worker.check_generated(output.sequences[:, :-1], model, inputs)
    other = output.sequences.clone()
    other[:, -1] = (other[:, -1] + 1) % TINY.vocabulary
    with pytest.raises(WrongOutput, match="misses the best score"):
        worker.check_generated(other, model, inputs)


def test_bytes_of_cache_count_shared_keys_once(writer):
    if isinstance(writer[2].past_key_values, tuple):
        pytest.skip("`generate` of older releases returns tuples, which do not tell what is shared")
    keys = 65 + 1 + 2 * 4  # the encoder's for the first layer, one for the second, and the decoder's in both layers
    assert worker.bytes_of_cache(writer[2]) == 2 * keys * TINY.hidden * 4
    assert worker.bytes_of_cache(torch.zeros(1)) is None


def test_decoding_runs_end_to_end(tmp_path):
    arguments = ["--name", "d", "--results", str(tmp_path), "--lengths", "32,64", "--new-tokens", "3", *RUN]
    names = "ours,led,two-berts,test_benchmarks:broken"
    text = decoding.main([*arguments, "--beams", "1,2", "--contestants", names])
    assert (tmp_path / "d.md").read_text() == text
    assert list(read(tmp_path, "d")["groups"]) == [
        f"float32 {length}, {beams} beams" for beams in (1, 2) for length in (32, 64)
    ]
    for title in ("## greedy, float32", "## 2 beams, float32"):
        assert title in text
    assert text.count("| **failed** | RuntimeError: this one / cannot be built |") == 4 == text.count("**failed**")
    with pytest.raises(SystemExit):
        decoding.parse_args(["--new-tokens", "1"])


# embedding.py


def test_batches_hold_texts_of_about_the_same_length():
    lengths = [4096, 100, 3000, 16000, 4000, 20000, 50]
    assert embedding.batches(lengths, "by length") == [[5], [3], [0, 4, 2, 1], [6]]
    assert embedding.batches(lengths, "single") == [[i] for i in range(7)]
    assert embedding.batches([5] * 17, "mixed") == [[*range(8)], [*range(8, 16)], [16]]


def test_draw_lengths_are_the_same_each_time():
    lengths = embedding.draw_lengths(64, 4096)
    assert lengths == embedding.draw_lengths(64, 4096) and 64 <= min(lengths) < 100 and 3000 < max(lengths) <= 4096
    assert 16 < sum(length < 256 for length in lengths) < 32  # a third of the doublings


@pytest.fixture(scope="module")
def embedders(tmp_path_factory):
    """The directories of an embedder and of the converted one."""
    pytest.importorskip("sentence_transformers", reason="benchmarks/embedding.py needs it")
    folder = tmp_path_factory.mktemp("embedders")
    make_embedder(folder / "source")
    convert_checkpoint(folder / "source", folder / "converted", max_length=1024, block_size=16, verify=False)
    return folder


def test_embedder_returns_vectors_in_the_order_of_the_texts(embedders):
    texts = worker.make_inputs(Case("ours", "embed", (20, 40, 9)), TINY, "texts")["texts"]
    single = embedding.Embedder(str(embedders / "source"), 512, "single", chunked=False)
    cut, chunked = (
        embedding.Embedder(str(embedders / "source"), 22, "by length", chunked) for chunked in (False, True)
    )
    torch.testing.assert_close(cut([texts[0], texts[2]]), single([texts[0], texts[2]]))
    words = texts[1].split()
    parts = single([" ".join(words[:20]), " ".join(words[20:])])
    mean = torch.nn.functional.normalize(parts.mean(0), dim=0)
    torch.testing.assert_close(chunked(texts)[1], mean)
    torch.testing.assert_close(cut(texts)[1], parts[0])


def test_embedding_check_trips_on_another_model(embedders):
    source, converted = str(embedders / "source"), str(embedders / "converted")
    embedding.check(cases.Embedders(source=source, converted=converted), "cpu")
    other = make_embedder(embedders / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: -x for name, x in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(WrongOutput, match="differs from the source's"):
        embedding.check(cases.Embedders(source=str(other), converted=converted), "cpu")


def test_embedding_runs_end_to_end(embedders, tmp_path):
    models = ["--source", str(embedders / "source"), "--converted", str(embedders / "converted")]
    run = ["--threads", "1", "--rounds", "1", "--documents", "10", "--max-length", "256"]
    text = embedding.main([*models, *run, "--name", "e", "--results", str(tmp_path)])
    assert (tmp_path / "e.md").read_text() == text
    assert "**failed**" not in text and all(
        f"| {getattr(embedding, name).label} |" in text for name in embedding.NAMES
    )
    assert str(embedders) not in (tmp_path / "e.json").read_text()
    with pytest.raises(SystemExit):
        embedding.parse_args(["--source", str(tmp_path), "--converted", str(tmp_path)])


# gpu.py


def test_largest_batch_doubles_until_memory_runs_out():
    batch, tried = gpu.largest_batch(FakeWorkers(largest=8), "ours", "forward", 64, "cuda", most_tokens=2**20)
    assert (batch, [len(r.case.lengths) for r in tried]) == (8, [1, 2, 4, 8])


def test_largest_batch_stops_at_the_most_tokens():
    assert gpu.largest_batch(FakeWorkers(largest=64), "ours", "forward", 64, "cuda", most_tokens=256)[0] == 4
    assert gpu.largest_batch(FakeWorkers(largest=64), "ours", "forward", 64, "cuda", most_tokens=1)[0] == 1


def test_largest_batch_halves_from_a_start():
    workers = FakeWorkers(largest=4)
    assert gpu.largest_batch(workers, "ours-compiled", "forward", 64, "cuda", 2**20, start=16)[0] == 4
    assert [len(case.lengths) for request, case in workers.asked if request == "prepare"] == [16, 8, 4]


def test_largest_batch_reports_what_is_not_memory():
    for error in ("OutOfMemoryError: CUDA out of memory", "ValueError: refused"):
        assert gpu.largest_batch(FakeWorkers(0, error), "ours", "forward", 64, "cuda", 2**20) == error


def test_model_flops_count_products_and_attention():
    size = replace(TINY, hidden=10, layers=3, feed_forward=20, embedding=4, vocabulary=50, block=8)
    per_layer = 2 * (4 * 10 * 10 + 2 * 10 * 20) + 2 * 2 * 10 * (1 + 2 * 8 + 3 * 8)
    forward = 2 * 4 * 10 + 3 * per_layer
    assert gpu.model_flops(size, 64, "forward") == forward
    assert gpu.model_flops(size, 64, "training") == 3 * (forward + 2 * 10 * 4 + 2 * 4 * 50)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_refuses_without_a_device(tmp_path):
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main(["--name", "gpu", "--results", str(tmp_path)])


def test_gpu_runs_end_to_end_on_a_cpu(tmp_path):
    arguments = ["--name", "gpu", "--results", str(tmp_path), "--device", "cpu", "--lengths", "32,128", *RUN]
    arguments += ["--contestants", "ours,test_benchmarks:broken", "--most-tokens", "128", "--matrix", "32"]
    text = gpu.main(arguments)
    assert (tmp_path / "gpu.md").read_text() == text
    groups = read(tmp_path, "gpu")["groups"]
    assert [len(r["case"]["lengths"]) for r in groups["ours training 32"]] == [1, 4]
    assert [len(r["case"]["lengths"]) for r in groups["ours training 128"]] == [1]
    assert "| 32 | test_benchmarks:broken | - | **failed** | RuntimeError: this one / cannot be built |" in text
    assert "over the ratio of lengths |" in text and "not measured" in text


# profile_layer.py


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_profile_layer_names_the_parts(mode):
    before = [dict(vars(module)) for module in profile_layer.attention_modules()]
    text = profile_layer.main(["--length", "64", "--size", "tiny", "--threads", "1", "--rounds", "1", "--mode", mode])
    for part in ("projections", "feed-forward", "selection", "attention kernel", "activation", "norms", "not watched"):
        assert f"| {part} |" in text or part in text
    assert [vars(module) for module in profile_layer.attention_modules()] == before


@pytest.mark.parametrize(
    "operator, sizes, functions, part",
    [
        ("addmm", {64, 32}, [], "projections"),
        ("addmm", {64, 32, 48}, [], "feed-forward"),
        ("gelu", {64, 48}, [], "activation"),
        ("native_layer_norm", {64, 32}, [], "norms"),
        ("gather", {64}, [("lsg_functional", "text_attention"), ("lsg_sparsity", "gather_tokens")], "selection"),
        ("cat", {64}, [("lsg_gather", "key_windows")], "window gathering and masks"),
        ("bmm", {64}, [("lsg_softmax", "eager_attention")], "attention kernel"),
        ("_scaled_dot_product_flash_attention_for_cpu", {64}, [], "attention kernel"),
        ("matmul", {64}, [("lsg_functional", "global_attention")], "attention of the global tokens"),
        ("add", {64, 32}, [], "residuals, copies and the rest"),
    ],
)
def test_part_of_sorts_operators(operator, sizes, functions, part):
    assert profile_layer.part_of(operator, sizes, functions, TINY) == part
