"""`course bench`: the reference's workloads, right counts, whole records, wrong counts refused."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import xxhash
from patience import HANGS

from course import arguments
from course.benchmarks import attention, queue
from course.cli import build_parser, main
from course.clone import ROOT
from course.commands import bench
from course.measure import engine_runs as measure
from course.measure import roofline
from course.measure.workloads import SAMPLING, WORKLOADS, make_workload, number_runs
from course.models import random_model
from nanovllm.layers.backend import TORCH_BACKEND

VOCAB = 151_936


# -- workloads -----------------------------------------------------------------------------------


def test_the_workloads_have_the_reference_lengths():
    throughput, latency, shared, qwen3 = (make_workload(name, 0, 1.0, VOCAB) for name in WORKLOADS)
    assert len(throughput.prompts) == 256
    assert sum(throughput.num_outputs) == 133_966
    assert sum(map(len, throughput.prompts)) == 142_827
    assert ([len(p) for p in latency.prompts], latency.num_outputs) == ([128], [512])
    assert [len(p) for p in shared.prompts] == [2176] * 256
    assert shared.num_outputs == [64] * 256
    assert qwen3 == throughput


REFERENCE = {
    "W1": "2802a879d50fe5d2",
    "W2": "ddb48c4138121b8d",
    "W3": "0f8d3ba76fdc669c",
    "W5": "2802a879d50fe5d2",
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_token_of_a_full_workload_is_the_reference_one(name):
    """Peers were timed on these very workloads: a changed token makes figures incomparable."""
    workload = make_workload(name, 1, 1.0, VOCAB)
    written = repr((workload.prompts, workload.num_outputs)).encode()
    assert xxhash.xxh3_64_hexdigest(written) == REFERENCE[name]


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize(("scale", "vocab_size"), [(1.0, VOCAB), (0.125, 300), (0.125, 20_000)])
def test_runs_differ_in_tokens_and_not_in_lengths(name, scale, vocab_size):
    first, second = (make_workload(name, run, scale, vocab_size) for run in (0, 1))
    assert list(map(len, first.prompts)) == list(map(len, second.prompts))
    assert first.num_outputs == second.num_outputs
    assert all(p[:8] != q[:8] for p, q in zip(first.prompts, second.prompts, strict=True))
    assert max(map(max, second.prompts)) < vocab_size


def test_the_workloads_sample_as_the_reference_does():
    assert SAMPLING["W5"] == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    assert all(SAMPLING[name] == {"temperature": 0.6} for name in ("W1", "W2", "W3"))


def test_workloads_with_the_same_prompts_do_not_share_a_run():
    assert number_runs(["W1", "W2", "W5"], 3) == {
        "W1": range(3),
        "W2": range(3),
        "W5": range(3, 6),
    }
    assert number_runs(["W5"], 3) == {"W5": range(3)}


def test_the_shared_prefix_is_shared_at_any_scale():
    for scale in (1.0, 0.125):
        workload = make_workload("W3", 0, scale, VOCAB)
        common = workload.shared_prefix
        assert common == 2048 * scale
        assert len({tuple(p[:common]) for p in workload.prompts}) == 1
        assert len({tuple(p[: common + 4]) for p in workload.prompts}) == len(workload.prompts)


# -- counting ------------------------------------------------------------------------------------

SMALL = SimpleNamespace(
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    hidden_size=10,
    intermediate_size=20,
    vocab_size=100,
    dtype=torch.bfloat16,
)
LAYER = (4 + 2 + 2 + 4) * 8 * 10 + 3 * 10 * 20  # weights
KV = 2 * 2 * 2 * 8 * 2  # bytes a token
PAIR = 4 * 2 * 4 * 8  # FLOPs for each token attending to one


def step(*rows):
    return SimpleNamespace(rows=rows)


def test_a_trace_is_counted_by_hand():
    """Two prompts of 5 and 9, the second in two chunks; then one step decodes both."""
    trace = [step(("a", 0, 5), ("b", 0, 3)), step(("a", 5, 1), ("b", 3, 6)), step(("b", 9, 1))]
    first, second, third = roofline.count_work(SMALL, trace, {"a": 5, "b": 9})
    weights = 2 * LAYER + 100 * 10
    assert first.weight_bytes == second.weight_bytes == third.weight_bytes == 2 * weights
    assert [w.kv_bytes for w in (first, second, third)] == [8 * KV, 15 * KV, 10 * KV]
    assert first.flops == 2 * 2 * LAYER * 8 + 2 * 1000 * 1 + PAIR * (15 + 6)
    assert second.flops == 2 * 2 * LAYER * 7 + 2 * 1000 * 2 + PAIR * (6 + (4 + 5 + 6 + 7 + 8 + 9))
    assert third.flops == 2 * 2 * LAYER * 1 + 2 * 1000 * 1 + PAIR * 10


def test_a_step_without_a_sampled_row_reads_no_head():
    chunk, rest = roofline.count_work(SMALL, [step(("a", 0, 4)), step(("a", 4, 4))], {"a": 8})
    assert chunk.weight_bytes == 2 * 2 * LAYER
    assert rest.weight_bytes == chunk.weight_bytes + 2 * 1000


def test_what_is_computed_again_after_a_preemption_samples_once():
    trace = [step(("a", 0, 4)), step(("a", 4, 1)), step(("a", 0, 4)), step(("a", 4, 2))]
    works = roofline.count_work(SMALL, trace, {"a": 4})
    heads = [work.weight_bytes - 2 * 2 * LAYER for work in works]
    assert heads == [2000, 2000, 0, 2000]


def test_a_shared_prefix_can_be_counted_once_a_step():
    trace = [step(("a", 0, 10), ("b", 8, 3)), step(("a", 10, 1), ("b", 11, 1))]
    works = roofline.count_work(SMALL, trace, {"a": 10, "b": 11}, shared_prefix=8)
    assert [w.kv_bytes for w in works] == [21 * KV, 23 * KV]
    assert [w.kv_bytes_shared for w in works] == [13 * KV, 15 * KV]


def test_the_roofline_takes_each_steps_larger_part():
    peaks = roofline.Peaks(bandwidth=100.0, flops=1000.0)
    works = [roofline.Work(100, 50, 10, 500), roofline.Work(100, 50, 10, 5000)]
    assert peaks.seconds(works) == pytest.approx(1.5 + 5.0)
    assert peaks.seconds(works, shared=True) == pytest.approx(1.1 + 5.0)


@pytest.mark.parametrize(("percent", "value"), [(50, 2), (99, 4), (0, 1), (25, 1), (26, 2)])
def test_percentile_is_the_nearest_rank(percent, value):
    assert measure.percentile([4, 1, 3, 2], percent) == value


# -- checks --------------------------------------------------------------------------------------


def test_a_wrong_number_of_tokens_is_refused():
    measure.check_counts([3, 5], [3, 5])
    with pytest.raises(RuntimeError, match=r"1 of 2 .* request 1, was to get 5 and got 4"):
        measure.check_counts([3, 5], [3, 4])
    with pytest.raises(RuntimeError, match="1 were answered"):
        measure.check_counts([3, 5], [3])


@dataclass
class ShortLLM:
    """Gives every request a token too few."""

    def generate(self, prompts, params, use_tqdm):
        counts = [p.max_tokens - 1 for p in params]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * n)]) for n in counts]


def test_an_engine_that_gives_too_few_tokens_is_found_out():
    with pytest.raises(RuntimeError, match="wrong number of tokens"):
        measure.answer(ShortLLM(), make_workload("W2", 0, 0.125, 300))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["W4"], "got 'W4'"),
        (["--scale", "0"], "above 0"),
        (["--scale", "2"], "above 0"),
        (["--scale", "1/0"], "above 0"),
        (["--runs", "0"], "at least 1"),
        (["--engine", "block_size"], "NAME=VALUE"),
        (["sampling", "--settings", "plain,beam"], "got 'beam'"),
        (["sampling", "--batch-sizes", "1,0"], "at least 1"),
        (["sampling", "--batch-sizes", "1;2"], "separated by commas, got '1;2'"),
        (["serving", "--rates", "1,inf"], "above 0"),
        (["serving", "--rates", "1,,2"], "separated by commas"),
        (["serving", "--seconds", "-1"], "above 0"),
        (["serving", "--goodput", "itl:5"], "must be ttft:MS"),
        (["serving", "--goodput", "ttft"], "must be ttft:MS"),
        (["serving", "--goodput", "ttft:fast"], "must be ttft:MS"),
        (["serving", "--goodput", "tpot:0"], "above 0, got 'tpot:0'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["bench", *arguments])
    assert message in capsys.readouterr().err


def test_a_benchmark_among_the_workloads_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "W1", "attention"])
    assert "must be one of W1, W2, W3, W5, got 'attention'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [
        "transformers --engine block_size=32",
        "transformers --scale 1/8",
        "attention --model /nope",
        "W1 --batch 4",
        "serving --runs 2",
        "sampling --rates 1,2",
        "sampling --batch 4",  # no short form of --batch-sizes
        "W5 --seed 1",
        "serving --settings greedy",
        "queue --dtype float32",
        "kernel_ladder --ranks 2",
    ],
)
def test_an_argument_of_another_benchmark_is_none_of_this_one(given, monkeypatch, capsys):
    for module in bench.BENCHMARKS.values():
        monkeypatch.setattr(module, "main", lambda args: pytest.fail("it was measured"))
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *given.split()])
    assert stopped.value.code == 2
    [option] = [word for word in given.split() if word.startswith("--")]
    assert f"unrecognized arguments: {option}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ([], ["workloads"]),
        (["W1", "W2", "--runs", "2"], ["workloads", "W1", "W2", "--runs", "2"]),
        (["--runs", "2", "W1"], ["workloads", "--runs", "2", "W1"]),
        (["sampling", "--runs", "2"], ["sampling", "--runs", "2"]),
        (["--help"], ["--help"]),
    ],
)
def test_a_command_without_a_benchmark_means_the_workloads(given, meant):
    assert bench.with_benchmark(["bench", *given]) == ["bench", *meant]
    assert bench.with_benchmark(["run", *given]) == ["run", *given]


@pytest.mark.parametrize("name", bench.BENCHMARKS)
def test_every_benchmark_has_arguments_of_its_own(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", name, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: course bench {name}" in shown
    assert "--json FILE" in shown


def recorded_commands():
    """Every `course bench ...` that a shipped record says it was made by."""
    for file in sorted((ROOT / "figures/data").glob("*.json")):
        yield from re.findall(r'"command": "course (bench [^"]+)"', file.read_text())


@pytest.mark.parametrize("command", sorted(set(recorded_commands())))
def test_a_recorded_command_is_still_one(command):
    assert build_parser().parse_args(bench.with_benchmark(command.split())).main


def test_a_record_that_cannot_be_written_is_found_before_measuring(tmp_path, monkeypatch, capsys):
    measured = {}
    monkeypatch.setattr(attention, "measure", lambda args: measured)
    monkeypatch.setattr(attention, "print_report", print)
    assert main(["bench", "attention", "--json", str(tmp_path / "new/x.json")]) == 0
    monkeypatch.setattr(attention, "measure", lambda args: pytest.fail("it was measured"))
    (tmp_path / "file").touch()
    assert main(["bench", "attention", "--json", str(tmp_path / "file/x.json")]) == 2
    assert "course bench: " in capsys.readouterr().err


def test_an_option_of_the_engine_is_json_or_a_string():
    assert arguments.option("block_size=32") == ("block_size", 32)
    assert arguments.option("enable_prefix_caching=False") == ("enable_prefix_caching", False)
    assert arguments.option("dtype=bfloat16") == ("dtype", "bfloat16")


def test_a_recorded_command_holds_no_path():
    given = "bench W1 --json /home/me/x.json --model /a/b/qwen --scale 1/8 --engine tokenizer=/c/d"
    assert arguments.command_line(given.split()) == (
        "course bench W1 --model qwen --scale 1/8 --engine tokenizer=d"
    )
    assert arguments.command_line(["bench", "--json=/x/y", "W2"]) == "course bench W2"


# -- whole runs ----------------------------------------------------------------------------------


@pytest.fixture
def small_peaks(monkeypatch):
    """Measure the machine with small buffers: the numbers do not matter here."""
    monkeypatch.setattr(roofline, "BUFFER_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(roofline, "MATRIX", {"cpu": 64})
    monkeypatch.setattr(attention, "ROUND_BYTES", {"cpu": 2**16})


def numbers_of(record):
    """Every number in a record, however deep."""
    if isinstance(record, dict):
        return [n for value in record.values() for n in numbers_of(value)]
    if isinstance(record, list):
        return [n for value in record for n in numbers_of(value)]
    return [record] if isinstance(record, (int, float)) else []


def test_the_workloads_run_on_a_tiny_model(tiny_model, small_peaks, tmp_path, monkeypatch, capsys):
    file = tmp_path / "record.json"
    model = str(tiny_model(max_positions=4096))
    arguments = ["bench", "--model", model, "--scale", "1/32", "--runs", "2", "--json", str(file)]
    arguments += ["--engine", "num_gpu_blocks_override=40"]
    monkeypatch.setattr(sys, "argv", ["course", *arguments])
    assert main(arguments) == 0
    text, record = capsys.readouterr().out, json.loads(file.read_text())
    assert list(record["workloads"]) == ["W1", "W2", "W3", "W5"]
    assert record["engine"]["num_gpu_blocks_override"] == 40
    assert str(tmp_path.parent) not in file.read_text()
    assert os.path.expanduser("~") not in file.read_text()
    assert all(n == n and n >= 0 for n in numbers_of(record))
    for name, result in record["workloads"].items():
        assert name in text
        assert len(result["runs"]) == 2
        workload = make_workload(name, 0, 1 / 32, 300)
        for run in result["runs"]:
            assert run["output_tokens"] == sum(workload.num_outputs)
            # The last token of a request is never computed; one computed twice was preempted.
            first = run["prompt_tokens"] + run["output_tokens"] - run["requests"]
            again = run["tokens_computed"] + run["cached_prompt_tokens"] - first
            assert 0 <= again <= run["preempted_tokens"]
    shared = record["workloads"]["W3"]["median"]
    assert shared["cached_prompt_tokens"] > 0
    assert shared["bytes_prefix_read_once"] < shared["bytes"]
    for name in ("W1", "W5"):
        assert record["workloads"][name]["sampling"] == SAMPLING[name]
        assert record["workloads"][name]["median"]["cached_prompt_tokens"] == 0
    [top_k] = (line.split() for line in text.splitlines() if line.startswith("    top-k"))
    assert top_k == ["top-k", "-", "-", "-", "20"]


def test_attention_alone_runs_on_a_cpu(small_peaks, tmp_path, capsys):
    file = tmp_path / "record.json"
    arguments = ["bench", "attention", "--scale", "1/32", "--json", str(file)]
    assert main(arguments) == 0
    record = json.loads(file.read_text())
    assert record["backend"] == "torch"
    assert list(record["shapes"]) == list(attention.shapes())
    assert list(record["mixes"]) == list(attention.mixes())
    row = record["shapes"]["256 x 900"]
    assert row["bytes"] == 8 * 28 * 2 * 8 * 128 * 4
    assert row["bytes_per_second"] == pytest.approx(row["bytes"] / row["microseconds"] * 1e6)
    assert "256 x 900" in capsys.readouterr().out


def test_the_hosts_work_is_measured_for_each_length_of_the_queue(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(queue, "COUNTS", (3, 80))
    file = tmp_path / "queue.json"
    assert main(["bench", "queue", "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    assert [row["queued"] for row in record["queues"]] == [3, 80]
    assert all(row[name]["median_us"] > 0 for row in record["queues"] for name in ("add", "step"))
    assert record["blocked"]["prompt_tokens"] > 1000
    assert "a prompt of 1,0" in capsys.readouterr().out


def test_attention_is_given_each_context_once():
    """Every block belongs to one row; and the torch function reads exactly the context."""
    lens = [33, 1, 16]
    inputs = attention.make_inputs(lens, torch.device("cpu"), torch.float32, seed=0)
    used = [inputs.block_tables[i, : -(-n // 16)].tolist() for i, n in enumerate(lens)]
    assert sorted(block for row in used for block in row) == list(range(5))
    out = inputs.prepare(TORCH_BACKEND)()
    blocks = inputs.block_tables[0, :3].long()
    key, value = (c[blocks].flatten(0, 1)[:33, 0] for c in (inputs.k_cache, inputs.v_cache))
    weights = (inputs.query[0, :2] @ key.T * attention.HEAD_DIM**-0.5).softmax(-1)
    torch.testing.assert_close(out[0, :2], weights @ value)


def test_attention_of_another_name_is_refused(capsys):
    assert main(["bench", "attention", "--attention-backend", "nonesuch"]) == 2
    assert "got 'nonesuch'" in capsys.readouterr().err


def test_transformers_beside_the_engine(tiny_model, tmp_path, capsys):
    file = tmp_path / "record.json"
    arguments = ["bench", "transformers", "--model", str(tiny_model()), "--requests", "3"]
    assert main([*arguments, "--batch", "2", "--runs", "1", "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    assert record["max_num_seqs"] == 32
    assert len(record["transformers"]["seconds"]) == 1
    assert "times as many output tokens a second" in capsys.readouterr().out


# -- the random model ----------------------------------------------------------------------------

TINY_SHAPE = {
    **random_model.SHAPE,
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def test_the_random_model_is_the_same_each_time_and_runs(tmp_path):
    from nanovllm import LLM, SamplingParams

    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        random_model.make(folder, TINY_SHAPE)
    one, two = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert one == two
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert json.loads((folders[0] / "config.json").read_text())["dtype"] == "bfloat16"
    with LLM(folders[0], max_model_len=64, use_tqdm_on_load=False) as llm:
        assert llm.get_tokenizer().decode(llm.get_tokenizer().encode("é!")) == "é!"
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        assert len(llm.generate("hello", params, use_tqdm=False)[0].outputs[0].token_ids) == 4


def test_the_random_model_is_left_alone_once_made(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path))
    (tmp_path / random_model.FOLDER).mkdir()
    monkeypatch.setattr(random_model.subprocess, "run", pytest.fail)
    assert random_model.random_model_dir() == tmp_path / random_model.FOLDER


def test_the_shape_is_qwen3_0_6b():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**random_model.SHAPE))
    assert sum(p.numel() for p in model.parameters()) == 596_049_920


# -- the read kernel -----------------------------------------------------------------------------

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton has no build for this system"
)
INTERPRETED = """
import torch
from course.measure.read_kernel import read
source, sums = torch.arange(2.0 * 4 * 16), torch.zeros(2)
read(source, sums, tile=16, tiles=4, warps=1)
assert sums.tolist() == [sum(range(64)), sum(range(64, 128))], sums
"""


@needs_triton
def test_the_read_kernel_reads_everything_once():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", INTERPRETED], check=True, env=environment, timeout=HANGS)


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_the_read_kernel_compiles_for_gpus(capability):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from course.measure.read_kernel import SHAPES, read_kernel

    types = {"source": "*fp32", "sums": "*fp32", "TILE": "constexpr", "TILES": "constexpr"}
    for tile, tiles, warps in SHAPES:
        source = ASTSource(read_kernel, types, {(2,): tile, (3,): tiles})
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options={"num_warps": warps})
        assert "ld.global" in compiled.asm["ptx"]
        assert 2**16 % (tile * tiles) == 0
