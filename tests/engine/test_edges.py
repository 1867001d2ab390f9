"""Edges where small engines break: each is a clear error or a right answer, and leaves nothing."""

import ast
import gc
import json
import shutil
import subprocess
import sys
import weakref
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from counting_model import CountingModel, make_sequence
from patience import HANGS
from small_requests import PROMPTS, greedy, ids
from transformers import AutoTokenizer

from nanovllm import LLM, EngineArgs, LLMEngine, SamplingParams
from nanovllm.engine.memory import profile_run
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduler import ScheduledSequence
from nanovllm.layers.norm import RMSNorm

ROOT = Path(__file__).resolve().parents[2]


def make(folder, **options):
    return LLM(str(folder), **{"max_model_len": 128, "use_tqdm_on_load": False} | options)


def answer(llm, prompts=PROMPTS, params=None):
    return llm.generate(prompts, params or greedy(), use_tqdm=False)


@pytest.fixture(scope="module")
def expected(folder):
    with make(folder) as llm:
        return ids(answer(llm))


@pytest.fixture
def llm(folder):
    with make(folder) as llm:
        yield llm
        assert not llm.llm_engine.has_unfinished_requests()
        assert (
            llm.llm_engine.block_manager.num_free_blocks == llm.llm_engine.block_manager.num_blocks
        )


@pytest.fixture
def copy(folder, tmp_path):
    """The model in a folder of its own, to change its files."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


def change(file, **fields):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | fields))


# -- lengths -----------------------------------------------------------------------------------


def test_an_output_ends_where_the_models_length_does(folder):
    with make(folder, max_model_len=20) as llm:
        output = answer(llm, [PROMPTS[0]], greedy(100))[0].outputs[0]
        assert len(output.token_ids) == 17
        assert output.finish_reason == "length"


def test_no_max_tokens_means_what_is_left(folder):
    with make(folder, max_model_len=20) as llm:
        assert len(ids(answer(llm, [PROMPTS[0]], greedy(None)))[0]) == 17


def test_a_prompt_larger_than_the_cache_is_refused(folder):
    with make(folder, max_model_len=None, num_gpu_blocks_override=2) as llm:
        assert llm.llm_engine.max_model_len == 32
        with pytest.raises(ValueError, match="got 40"):
            answer(llm, [PROMPTS[0], [1] * 40])
        assert not llm.llm_engine.sequences, "the good prompt before it was queued"


def test_a_lone_sequence_may_fill_the_cache_but_not_outgrow_it(folder):
    with make(folder, max_model_len=None, num_gpu_blocks_override=2) as llm:
        output = answer(llm, [PROMPTS[0]], greedy(1000))[0].outputs[0]
        assert len(output.token_ids) == 29


def test_a_length_that_the_cache_cannot_hold_is_refused(folder):
    with pytest.raises(ValueError, match=r"max_model_len=128 .* 32\s+tokens"):
        make(folder, num_gpu_blocks_override=2)


def test_more_requests_than_rows(folder, expected):
    with make(folder, max_num_seqs=3) as llm:
        assert ids(answer(llm, PROMPTS * 4)) == expected * 4


# -- ends of sequence ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "in_file", ["config.json", "generation_config.json", "tokenizer_config.json"]
)
def test_every_end_of_sequence_id_ends_and_stays_out_of_the_text(copy, expected, in_file):
    stop = expected[0][4]
    first = expected[0].index(stop)
    if in_file == "tokenizer_config.json":
        token = AutoTokenizer.from_pretrained(copy).convert_ids_to_tokens(stop)
        change(copy / in_file, eos_token=token)
    else:
        change(copy / in_file, eos_token_id=[298, stop])
    with make(copy) as llm:
        output = answer(llm, [PROMPTS[0]], greedy(ignore_eos=False))[0].outputs[0]
        assert output.token_ids == expected[0][: first + 1]
        assert output.finish_reason == "stop"
        assert output.text == llm.get_tokenizer().decode(
            expected[0][:first], skip_special_tokens=True
        )
        assert ids(answer(llm, [PROMPTS[0]])) == [expected[0]], "ignore_eos"


def test_stop_token_ids(llm, expected):
    first = expected[0].index(expected[0][3])
    output = answer(llm, [PROMPTS[0]], greedy(stop_token_ids=[expected[0][3]]))[0].outputs[0]
    assert output.token_ids == expected[0][: first + 1]
    assert output.finish_reason == "stop"


def test_a_stop_string_may_stay_in_the_output(llm):
    text = answer(llm, [PROMPTS[1]])[0].outputs[0].text
    stop = text[4:6]
    params = greedy(stop=[stop], include_stop_str_in_output=True)
    output = answer(llm, [PROMPTS[1]], params)[0].outputs[0]
    assert output.text == text[: text.index(stop) + 2]


def test_generation_config_gives_the_defaults_when_no_params_are_given(copy):
    change(copy / "generation_config.json", temperature=0.5, top_k=7, top_p=0.9, max_new_tokens=3)
    with make(copy) as llm:
        params = llm.llm_engine.make_request("a", [1], None)["params"]
        assert (params["temperature"], params["top_k"], params["top_p"]) == (0.5, 7, 0.9)
        outputs = llm.generate(PROMPTS[0], use_tqdm=False)
        assert len(outputs[0].outputs[0].token_ids) <= 3
        given = llm.llm_engine.make_request("b", [1], SamplingParams())["params"]
        assert given["temperature"] == 1.0, "a caller's own are not touched"


@pytest.mark.parametrize("text", ["{", "[1, 2]", "7", ""])
def test_a_generation_config_that_is_no_object_is_named(copy, text):
    (copy / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"generation_config\.json is not a JSON object"):
        make(copy)


@pytest.mark.parametrize("name", ["model", "tokenizer", "revision"])
def test_names_of_another_type_are_refused(name):
    with pytest.raises(TypeError, match=f"{name} must be of type str, got 5"):
        EngineArgs(**{"model": "m", name: 5})
    assert EngineArgs(Path("m"), tokenizer=Path("t")).tokenizer == "t"


def test_a_default_of_generation_config_that_cannot_be_is_refused(copy, expected):
    change(copy / "generation_config.json", repetition_penalty=-1.1)
    with make(copy) as llm:
        with pytest.raises(
            ValueError, match=r"generation_config\.json: repetition_penalty must be"
        ):
            llm.generate(PROMPTS, use_tqdm=False)
        assert ids(answer(llm)) == expected, "a caller's own params do not ask for it"


# -- chat ----------------------------------------------------------------------------------------

TALK = [{"role": "user", "content": "hello"}]


def test_chat_adds_no_second_bos(tiny_model):
    with make(tiny_model(family="llama", adds_bos=True)) as llm:
        bos = llm.get_tokenizer().bos_token_id
        assert llm.get_tokenizer().encode("hello")[0] == bos
        output = llm.chat(TALK, greedy(), use_tqdm=False)[0]
        assert output.prompt_token_ids.count(bos) == 1
        assert output.prompt_token_ids[0] == bos


def test_chat_takes_one_conversation_or_many(llm):
    one = llm.chat(TALK, greedy(), use_tqdm=False)
    many = llm.chat([TALK, TALK], greedy(), use_tqdm=False)
    assert ids(many) == ids(one) * 2


def test_chat_options_reach_the_template(llm):
    template = "{{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}{{ mood or '' }}"

    def prompt_of(**options):
        output = llm.chat(TALK, greedy(1), use_tqdm=False, chat_template=template, **options)[0]
        assert output.prompt == llm.get_tokenizer().decode(output.prompt_token_ids)
        return output.prompt

    assert prompt_of() == "hello>"
    assert prompt_of(add_generation_prompt=False) == "hello"
    assert prompt_of(chat_template_kwargs={"mood": "!"}) == "hello>!"


@pytest.mark.parametrize(
    "messages", [[], [[]], "hello", ["hello"], [{"content": 1, "role": {}}, 7]]
)
def test_chat_names_what_is_no_conversation(llm, messages):
    with pytest.raises((TypeError, ValueError), match="messages"):
        llm.chat(messages, greedy(), use_tqdm=False)


def test_chat_without_a_template_names_the_model(copy):
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    file = copy / "tokenizer_config.json"
    content = json.loads(file.read_text())
    content.pop("chat_template", None)
    file.write_text(json.dumps(content))
    with make(copy) as llm, pytest.raises(ValueError, match=str(copy)):
        llm.chat(TALK, greedy(), use_tqdm=False)


# -- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("fail_at", [1, 2, 5])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_model_leaves_nothing_behind(folder, expected, overlap, fail_at, error):
    with make(folder, async_scheduling=overlap) as llm:
        model = llm.llm_engine.core.runner.model
        calls, forward = [], model.forward

        def fail_once(*args):
            calls.append(args)
            if len(calls) == fail_at:
                raise error("planted failure")
            return forward(*args)

        model.forward = fail_once
        with pytest.raises(error, match="planted"):
            answer(llm)
        assert not llm.llm_engine.has_unfinished_requests()
        assert not llm.llm_engine.sequences
        assert ids(answer(llm)) == expected, "the next call must not see the failed one's cache"


def test_one_bad_prompt_queues_none(llm, expected):
    with pytest.raises(ValueError, match="token id"):
        answer(llm, [*PROMPTS, [10**6]])
    assert not llm.llm_engine.sequences
    assert ids(answer(llm)) == expected


def test_prompts_and_params_must_be_as_many(llm):
    with pytest.raises(ValueError, match="3 prompts, but 2 sampling_params"):
        answer(llm, PROMPTS, [greedy(), greedy()])


def test_an_unknown_argument_is_an_error(folder):
    with pytest.raises(TypeError, match="no_such_thing"):
        make(folder, no_such_thing=1)


def test_the_callers_params_are_left_alone(llm):
    params = greedy(stop="zzz", seed=3)
    before = asdict(params)
    answer(llm, PROMPTS, params)
    assert asdict(params) == before


# -- what an engine leaves in its process --------------------------------------------------------


def test_two_engines_side_by_side(folder, tiny_model, expected):
    other = tiny_model(family="llama", rope="llama3")
    with make(other, max_model_len=64, block_size=5) as second:
        alone = ids(answer(second))
    with make(folder) as first, make(other, max_model_len=64, block_size=5) as second:
        streams = first.stream(PROMPTS, greedy()), second.stream(PROMPTS, greedy())
        for _ in zip(*streams, strict=False):  # a step here, a step there
            pass
        for stream in streams:
            list(stream)
        assert ids(streams[0].outputs) == expected
        assert ids(streams[1].outputs) == alone


@pytest.mark.parametrize("end", ["close", "del"])
def test_memory_comes_back(folder, end):
    llm = make(folder)
    answer(llm)
    runner = llm.llm_engine.core.runner
    held = [weakref.ref(runner.kv_cache), weakref.ref(runner.model)]
    del runner
    if end == "close":
        llm.close()
    else:
        del llm
    gc.collect()
    assert [ref() for ref in held] == [None, None]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_process_is_left_as_it_was(folder, dtype):
    before = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    with make(folder, dtype=dtype) as llm:
        assert llm.llm_engine.core.runner.kv_cache.dtype == getattr(torch, dtype)
        assert [len(x) for x in ids(answer(llm))] == [12, 12, 12]
    assert (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
    ) == before


def test_enforce_eager_is_accepted(folder, expected):
    with make(folder, enforce_eager=True) as llm:
        assert ids(answer(llm)) == expected


@pytest.mark.parametrize(
    ("num_seqs", "length", "tokens"), [(3, 128, 201), (2, 128, 1 + 128), (1, 128, 128), (1, 99, 99)]
)
def test_a_profile_run_is_the_largest_step_and_leaves_no_trace(
    folder, expected, num_seqs, length, tokens
):
    """A GPU runs these steps before it sizes the cache: first as many decode rows as are gathered
    at once, then one decode row and as many prompt tokens as the budget allows."""
    options = {"max_num_seqs": num_seqs, "max_num_batched_tokens": 200, "max_model_len": length}
    with make(folder, **options) as llm:
        runner, seen, scored = llm.llm_engine.core.runner, [], []
        forward, logits = runner.model.forward, runner.model.compute_logits
        runner.model.forward = lambda ids, *rest: seen.append(len(ids)) or forward(ids, *rest)
        runner.model.compute_logits = lambda hidden: scored.append(len(hidden)) or logits(hidden)
        profile_run(runner, 200)
        assert seen == [num_seqs, tokens]
        assert scored[0] == scored[-1] == max(scored) == num_seqs, "logits of more rows at once"
        runner.model.forward, runner.model.compute_logits = forward, logits
        assert ids(answer(llm)) == expected


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_torch_compile_changes_no_tokens(folder, expected):
    with make(folder, enable_torch_compile=True) as llm:
        assert ids(answer(llm)) == expected
        compiled = llm.llm_engine.core.runner.backend.norm_linear
        assert hasattr(compiled, "_torchdynamo_orig_callable")


def test_torch_compile_needs_what_eager_forbids(folder):
    with pytest.raises(ValueError, match="enable_torch_compile=True does"):
        make(folder, enable_torch_compile=True, enforce_eager=True)


def test_a_norm_leaves_its_input_alone(folder):
    norm = RMSNorm(8, 1e-6, torch.float32)
    norm.weight.fill_(2.0)
    x = torch.randn(3, 8)
    kept = x.clone()
    norm(x)
    assert torch.equal(x, kept)


def test_slots_beyond_32_bits_are_not_wrapped():
    """A block so far back in a large cache that its slots do not fit in 32 bits."""
    seen = []

    class Model(CountingModel):
        def __call__(self, input_ids, kv_cache, batch):
            seen.append(batch)
            raise InterruptedError

    seq = make_sequence("a", [1, 2, 3], 1)
    seq.block_table = [2**29]
    args = EngineArgs("counting", max_num_seqs=1, max_model_len=16)
    runner = ModelRunner(Model(), torch.zeros(1, 2, 1, 16, 1, 1), args)
    with pytest.raises(InterruptedError):
        runner.launch([ScheduledSequence(seq, 0, 3, True, admitted=True)])
    with pytest.raises(InterruptedError):
        runner.launch([ScheduledSequence(seq, 2, 1, True)])
    assert seen[0].slot_mapping.tolist() == [2**33, 2**33 + 1, 2**33 + 2]
    assert seen[1].slot_mapping.tolist() == [2**33 + 2]


def test_a_progress_bar_shows_the_loading(folder, capfd):
    with make(folder, use_tqdm_on_load=True):
        assert "Loading model.safetensors: 100%" in capfd.readouterr().err


def test_progress_bars_can_be_had_and_left_out(llm, expected, capfd):
    assert ids(answer(llm)) == expected
    assert capfd.readouterr().err == ""
    assert ids(llm.generate(PROMPTS, greedy())) == expected
    assert "Processed prompts" in capfd.readouterr().err


def test_no_assert_speaks_to_users():
    for path in (ROOT / "nanovllm").rglob("*.py"):
        found = [
            n.lineno for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Assert)
        ]
        assert not found, f"{path.name}: {found}"


def python(code, *arguments, timeout=HANGS):
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        check=False,
    )


def test_runs_without_triton_and_without_a_warning(folder, expected):
    code = """
import json, sys
sys.modules["triton"] = None  # importing it fails from now on
from nanovllm import LLM, SamplingParams
with LLM(sys.argv[1], max_model_len=128, device="cpu", use_tqdm_on_load=False) as llm:
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    outputs = llm.generate(json.loads(sys.argv[2]), params, use_tqdm=False)
print(json.dumps([output.outputs[0].token_ids for output in outputs]))
"""
    done = python(code, folder, json.dumps(PROMPTS))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected
    assert done.stderr == ""


def test_a_failed_start_of_two_ranks_ends(copy):
    (copy / "model.safetensors").unlink()
    code = """
import sys
from nanovllm import LLM
LLM(sys.argv[1], tensor_parallel_size=2, use_tqdm_on_load=False)
"""
    done = python(code, copy)  # its workers hold the pipes: this waits for them too
    assert done.returncode == 1
    assert "model.safetensors" in done.stderr


def test_vllms_names_are_taken_by_the_engine(folder):
    engine = LLMEngine.from_engine_args(EngineArgs(model=str(folder), use_tqdm_on_load=False))
    engine.add_request("0", {"prompt_token_ids": [1, 2]}, greedy(2))
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    engine.close()
    assert outputs[-1].finished
    assert outputs[-1].num_cached_tokens == 0
    assert outputs[-1].metrics.ttft > 0
    assert outputs[-1].tpot > 0
