"""vLLM's names, defaults, command line and inputs: each is taken, or refused by its name."""

import argparse
import ast
import json
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from authoring import vllm_table
from course.models.choice import own_model
from nanovllm import LLM, EngineArgs, LLMEngine, SamplingParams, inputs
from nanovllm.utils.argparse_utils import FlexibleArgumentParser
from nanovllm.validation import vllm_defaults

NAMES = vllm_table.NAMES
PARAMS = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)


@pytest.fixture(scope="module")
def llm():
    with LLM(str(own_model()), device="cpu", use_tqdm_on_load=False) as llm:
        yield llm


# -- names and defaults --------------------------------------------------------------------------


def defaults(name):
    """(parameter, vLLM's default) of a class, without those whose default is an object of vLLM."""
    for parameter, default in NAMES[name]["parameters"].items():
        value = {"set()": "None"}.get(default, default)
        if "(" not in value and not value.startswith("RequestOutputKind"):
            yield parameter, ast.literal_eval(value)


@pytest.mark.parametrize("kind", [EngineArgs, SamplingParams])
def test_every_default_of_vllm_may_be_written_out(kind):
    given = dict(defaults(kind.__name__))
    assert len(given) > 0.9 * len(NAMES[kind.__name__]["parameters"])
    for name, value in given.items():
        assert kind(**{name: value}) == replace(kind(), **{name: value}), name
    assert kind(**given) == replace(kind(), **{k: given[k] for k in given if k in own(kind)})


def own(kind):
    return {f.name for f in fields(kind)}


@pytest.mark.parametrize("kind", [EngineArgs, SamplingParams])
def test_every_parameter_of_vllm_is_known(kind):
    known = own(kind) | kind.unsupported_parameters.keys()
    assert set(NAMES[kind.__name__]["parameters"]) <= known
    assert not own(kind) & kind.unsupported_parameters.keys(), "a field that the table would hide"
    assert kind.unsupported_parameters.keys() <= set(NAMES[kind.__name__]["parameters"]), (
        "no name of vLLM's"
    )


def test_every_option_of_a_method_is_one_of_vllms():
    for name, kind in vllm_table.CLASSES.items():
        for method, parameters in NAMES[name]["methods"].items():
            if hasattr(kind, method):
                assert vllm_table.OPTIONS.get((name, method), {}).keys() <= set(parameters)


def test_the_page_is_current():
    text = vllm_table.PAGE.read_text(encoding="utf-8")
    assert text == vllm_table.with_tables(text), "run `python -m authoring.vllm_table --write`"
    assert "| `temperature` | same |" in text
    assert "| `logit_bias` | same |" in text
    assert "| `beam_search()` | absent |" in text


def test_an_old_page_is_noticed(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text(vllm_table.PAGE.read_text(encoding="utf-8").replace("absent |", "same |"))
    monkeypatch.setattr(vllm_table, "PAGE", page)
    assert vllm_table.main([]) == 1
    assert "--write" in capsys.readouterr().err
    assert vllm_table.main(["--write"]) == 0
    assert vllm_table.main([]) == 0


def test_options_of_methods_take_vllms_defaults_alone(llm):
    messages = [{"role": "user", "content": "a"}]
    engine = llm.llm_engine
    calls = [
        (partial(llm.generate, "a", PARAMS, use_tqdm=False), vllm_defaults.GENERATE),
        (partial(llm.chat, messages, PARAMS, use_tqdm=False), vllm_defaults.CHAT),
        (partial(engine.add_request, "1", "a", PARAMS), vllm_defaults.ADD_REQUEST),
        (partial(engine.abort_request, []), vllm_defaults.ABORT_REQUEST),
        (llm.reset_prefix_cache, vllm_defaults.RESET_PREFIX_CACHE),
    ]
    for call, table in calls:
        for name, accepted in table.items():
            for value in accepted:
                call(**{name: value})
                engine.abort_request("1")
            with pytest.raises(ValueError, match=f"{name}='x' is not supported"):
                call(**{name: "x"})
        with pytest.raises(TypeError, match="unexpected keyword argument 'priorities'"):
            call(priorities=None)
    assert not engine.has_unfinished_requests()


# -- the command line ----------------------------------------------------------------------------

WORDS = {  # one other value of every field, as words and as itself
    "model": ("other", "other"), "tokenizer": ("tok", "tok"), "revision": ("main", "main"),
    "dtype": ("half", "float16"), "generation_config": ("vllm", "vllm"),
    "override_generation_config": ('{"top_k": 3}', {"top_k": 3}), "device": ("cpu", "cpu"),
    "seed": ("-5", -5), "tensor_parallel_size": ("2", 2), "max_model_len": ("99", 99),
    "distributed_executor_backend": ("mp", "mp"), "max_num_seqs": ("7", 7),
    "max_num_batched_tokens": ("64", 64), "block_size": ("32", 32),
    "num_gpu_blocks_override": ("11", 11), "gpu_memory_utilization": ("0.5", 0.5),
    "attention_backend": ("torch", "torch"),
}  # fmt: skip


def parse(*words):
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    return EngineArgs.from_cli_args(parser.parse_args(words))


@pytest.mark.parametrize("name", [f.name for f in fields(EngineArgs) if f.repr])
def test_every_argument_goes_through_the_command_line_and_back(name):
    option = "--" + name.replace("_", "-")
    if name in WORDS:
        text, value = WORDS[name]
        ways = [[option, text], [f"{option}={text}"], [f"--{name}", text]]
    else:
        value = not getattr(EngineArgs(), name)
        ways = [[option if value else option.replace("--", "--no-")]]
    for words in ways:
        args = parse(*words)
        assert getattr(args, name) == value
        assert args == replace(EngineArgs(), **{name: value})


@pytest.mark.parametrize(
    ("text", "value"), [("4k", 4000), ("4K", 4096), ("1.5k", 1500), ("auto", None), ("-1", None)]
)
def test_a_length_may_be_written_short(text, value):
    assert parse("--max-model-len", text).max_model_len == value
    with pytest.raises(SystemExit):
        parse("--max-model-len", f"{text}x")


def test_without_words_the_command_line_gives_the_defaults():
    assert parse() == EngineArgs()


@pytest.mark.parametrize(
    ("words", "name"),
    [(["--enable-lora"], "enable_lora"), (["--load-format", "dummy"], "load_format"),
     (["--trust-remote-code"], "trust_remote_code"), (["--max_loras=3"], "max_loras"),
     (["--quantization", "awq"], "quantization"), (["--hf-overrides", '{"a": 1}'], "hf_overrides"),
     (["--pipeline-parallel-size", "2"], "pipeline_parallel_size")],
)  # fmt: skip
def test_an_option_that_cannot_be_honoured_is_refused_by_name(words, name):
    with pytest.raises(ValueError, match=f"{name}=.* is not supported.*engine accepts only"):
        parse(*words)


def test_options_of_vllm_with_its_defaults_are_taken():
    words = [
        "--load-format",
        "auto",
        "--no-enable-lora",
        "--max-loras",
        "1",
        "--hf-overrides",
        "{}",
    ]
    assert parse(*words) == EngineArgs()


def test_the_help_of_an_option_is_the_comment_above_its_field():
    text = " ".join(EngineArgs.add_cli_args(FlexibleArgumentParser()).format_help().split())
    words = "--max-num-seqs MAX_NUM_SEQS The most requests that run at once. (default: 256)"
    assert words in text
    assert "and the checkpoint's dtype on other GPUs. (default: auto)" in text, "two lines"
    assert "--enable-lora" not in text, "what is refused is not offered"
    for f in fields(EngineArgs):
        assert f"--{f.name.replace('_', '-')}" in text
    unsupported = [f.name for f in fields(EngineArgs) if not f.repr]
    assert text.count("The engine accepts only the default.") == len(unsupported)


def test_the_options_join_those_of_a_plain_parser_and_of_a_group():
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompt")
    group = parser.add_argument_group("engine")
    assert EngineArgs.add_cli_args(group) is group
    args = parser.parse_args(["--prompt", "a", "--seed", "3"])
    assert EngineArgs.from_cli_args(args) == EngineArgs(seed=3)


# -- inputs --------------------------------------------------------------------------------------


def test_the_kinds_of_prompts_are_dicts(llm):
    ids = llm.llm_engine.input_processor.encode("A fox")
    prompts = [
        inputs.TokensPrompt(prompt_token_ids=ids, prompt="A fox", token_type_ids=None),
        inputs.TextPrompt(prompt="A fox", multi_modal_data=None, cache_salt=None),
        ids,
        "A fox",
    ]
    outputs = llm.generate(prompts, PARAMS, use_tqdm=False)
    assert [o.prompt for o in outputs] == ["A fox", "A fox", None, "A fox"]
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 1


@pytest.mark.parametrize("name", sorted(inputs.PROMPT_KEYS - {"prompt", "prompt_token_ids"}))
def test_options_of_a_prompt_that_would_be_ignored_are_named(llm, name):
    with pytest.raises(ValueError, match=name):
        llm.generate({"prompt": "a", name: "x"}, PARAMS)


# -- progress bars, tools ------------------------------------------------------------------------


def test_a_callable_makes_the_bar(llm):
    calls = []

    def make(**options):
        calls.append(options)
        return SimpleNamespace(update=calls.append, close=lambda: calls.append("closed"))

    llm.generate(["a", "b"], PARAMS, use_tqdm=make)
    assert (calls[0]["total"], calls[0]["desc"]) == (2, "Processed prompts")
    assert sum(n for n in calls[1:-1]) == 2
    assert calls[-1] == "closed"
    with pytest.raises(ZeroDivisionError):
        llm.generate("a", PARAMS, use_tqdm=lambda **options: 1 / 0)
    assert not llm.llm_engine.has_unfinished_requests()
    llm.chat([{"role": "user", "content": "a"}], PARAMS, partial(tqdm, disable=True))


@pytest.mark.parametrize("value", [None, 0, 1, "yes", []])
def test_what_is_no_bool_and_makes_no_bar_is_refused(llm, value):
    with pytest.raises(TypeError, match="use_tqdm must be of type bool, or callable"):
        llm.generate("a", PARAMS, use_tqdm=value)
    assert not llm.llm_engine.has_unfinished_requests()


def test_tools_that_a_template_would_ignore_are_refused(llm):
    messages = [{"role": "user", "content": "a"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(ValueError, match=r"tools=.*does not use tools"):
        llm.chat(messages, PARAMS, use_tqdm=False, tools=tools)
    for empty in (None, []):
        llm.chat(messages, PARAMS, use_tqdm=False, tools=empty)
    with pytest.raises(TypeError, match="tools must be of type list"):
        llm.chat(messages, PARAMS, use_tqdm=False, tools={"name": "f"})


def test_parts_of_text_are_one_text(llm):
    parts = [{"type": "text", "text": "Tell me"}, {"type": "text", "text": "a story"}]
    message = {"role": "user", "content": parts}
    joined = {"role": "user", "content": "Tell me\na story"}
    for one, other in (([message], [joined]), ([[message]], [[joined]])):
        texts = [llm.chat(m, PARAMS, use_tqdm=False)[0].prompt for m in (one, other)]
        assert texts[0] == texts[1]
    assert message["content"] is parts, "the caller's own is not changed"


def test_a_template_that_is_neither_text_nor_a_file_is_refused():
    with pytest.raises(ValueError, match="chat_template='/no/such' is neither a template nor"):
        LLM(str(own_model()), chat_template="/no/such")
    with pytest.raises(TypeError, match="chat_template must be of type str"):
        LLM(str(own_model()), chat_template=5)


def test_a_template_of_all_calls_may_be_a_file(tmp_path, llm):
    file = tmp_path / "template.jinja"
    file.write_text("Ask: {{ messages[0].content }}")
    model = llm.llm_engine.args.model
    for template in (file, str(file), file.read_text()):
        with LLM(model, chat_template=template, use_tqdm_on_load=False) as other:
            messages = [{"role": "user", "content": "Who?"}]
            assert other.chat(messages, PARAMS, use_tqdm=False)[0].prompt == "Ask: Who?"
            given = other.chat(messages, PARAMS, use_tqdm=False, chat_template="{{ 1 }}")
            assert given[0].prompt == "1"


# -- where sampling defaults come from -----------------------------------------------------------


def test_a_folder_gives_the_defaults_in_place_of_the_models(tmp_path, llm):
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"top_k": 3, "max_new_tokens": 2, "eos_token_id": 5}))
    model = llm.llm_engine.args.model
    options = {"generation_config": str(tmp_path), "override_generation_config": {"top_k": 4}}
    with LLM(model, use_tqdm_on_load=False, **options) as other:
        params = other.get_default_sampling_params()
        assert params == SamplingParams(top_k=4, max_tokens=2)
        assert 5 in other.llm_engine.eos_ids
        params.top_k = 1  # the caller's own
        assert other.get_default_sampling_params().top_k == 4
        assert len(other.generate("a", use_tqdm=False)[0].outputs[0].token_ids) <= 2


def test_neutral_defaults_keep_the_models_own_ends(llm):
    with LLM(llm.llm_engine.args.model, generation_config="vllm", use_tqdm_on_load=False) as other:
        assert other.get_default_sampling_params() == SamplingParams()
        assert other.llm_engine.eos_ids == llm.llm_engine.eos_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [({"generation_config": "/no/such"}, "generation_config='/no/such' must be 'auto', 'vllm', or"),
     ({"override_generation_config": {"topk": 1}}, "override_generation_config takes .*'topk'")],
)  # fmt: skip
def test_defaults_that_are_not_there_are_refused(llm, options, message):
    with pytest.raises(ValueError, match=message):
        LLM(llm.llm_engine.args.model, use_tqdm_on_load=False, **options)


# -- lengths -------------------------------------------------------------------------------------


def test_a_request_may_be_as_long_as_yarn_stretches_the_model(tiny_model):
    """The file says max_position_embeddings=100, and YaRN makes 4 times 128 positions."""
    folder = Path(tiny_model(rope="yarn", max_positions=100))
    with LLM(str(folder), use_tqdm_on_load=False) as llm:
        assert llm.llm_engine.max_model_len == 4 * 128
        params = SamplingParams(max_tokens=2, ignore_eos=True)
        output = llm.generate([[1] * 300], params, use_tqdm=False)[0]
        assert len(output.outputs[0].token_ids) == 2
    with pytest.raises(ValueError, match="max_model_len=513 is over the model's limit of 512"):
        LLM(str(folder), max_model_len=513, use_tqdm_on_load=False)


# -- ends, counts, caches ------------------------------------------------------------------------


def test_the_end_token_is_no_stop_reason_and_another_one_is(llm):
    processor = llm.llm_engine.input_processor
    first = llm.generate("Once", PARAMS, use_tqdm=False)[0].outputs[0].token_ids[0]
    eos_ids, tokenizer = processor.eos_ids, processor.tokenizer
    own_eos = tokenizer.eos_token_id

    def end(**options):
        params = SamplingParams(temperature=0.0, max_tokens=3, **options)
        answer = llm.generate("Once", params, use_tqdm=False)[0].outputs[0]
        return answer.finish_reason, answer.stop_reason

    try:
        processor.eos_ids = eos_ids | {first}  # as generation_config.json can name more
        assert end() == ("stop", first)
        tokenizer.eos_token_id = first
        assert end() == ("stop", None)
        assert end(ignore_eos=True, stop_token_ids=[first]) == ("stop", first)
        text = tokenizer.decode([first])
        assert end(stop=[text], include_stop_str_in_output=True) == ("stop", text)
    finally:
        processor.eos_ids, tokenizer.eos_token_id = eos_ids, own_eos
    assert end(ignore_eos=True) == ("length", None)


def test_the_prefix_cache_is_forgotten_unless_it_is_used(llm):
    engine, prompt = llm.llm_engine, list(range(1, 50))

    def cached():
        return llm.generate(prompt, PARAMS, use_tqdm=False)[0].num_cached_tokens

    cached()
    assert cached() == 48
    engine.add_request("x", prompt, PARAMS)
    engine.step()
    assert engine.get_num_unfinished_requests() == 1
    assert engine.reset_prefix_cache() is False
    assert len(engine.block_manager.hash_to_block_id) > 0
    engine.abort_request(["x"])
    assert llm.reset_prefix_cache() is True
    assert not engine.block_manager.hash_to_block_id
    assert cached() == 0
    assert cached() == 48


def test_two_ranks_forget_together_and_share_the_defaults(tiny_model):
    options = {"override_generation_config": {"temperature": 0.0, "max_new_tokens": 3}}
    with LLM(tiny_model(), tensor_parallel_size=2, use_tqdm_on_load=False, **options) as llm:
        first = llm.generate([[1] * 40], use_tqdm=False)[0]
        again = llm.generate([[1] * 40], use_tqdm=False)[0]
        assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 32)
        assert llm.reset_prefix_cache()
        last = llm.generate([[1] * 40], use_tqdm=False)[0]
        assert last.num_cached_tokens == 0
        assert len(last.outputs[0].token_ids) == 3
        assert last.outputs[0].token_ids == first.outputs[0].token_ids


def test_a_closed_engine_has_nothing_left_and_forgets_nothing():
    llm = LLM(str(own_model()), device="cpu", use_tqdm_on_load=False)
    llm.close()
    assert llm.llm_engine.get_num_unfinished_requests() == 0
    with pytest.raises(RuntimeError, match="closed"):
        llm.reset_prefix_cache()


def test_times_are_on_vllms_clocks(llm):
    engine = llm.llm_engine
    engine.add_request("t", [1, 2, 3], PARAMS)
    (seq,) = engine.sequences.values()
    before = replace(seq.metrics)
    assert (before.scheduled_ts, before.first_token_ts, before.num_generation_tokens) == (0, 0, 0)
    assert before.ttft is None
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    metrics = outputs[-1].metrics
    assert metrics.queued_ts < metrics.scheduled_ts < metrics.first_token_ts
    assert metrics.ttft == metrics.first_token_latency == metrics.first_token_ts - metrics.queued_ts
    assert metrics.num_generation_tokens == 3
    assert metrics.arrival_time - metrics.queued_ts > 1e8, "seconds since 1970"
    pace = (metrics.last_token_ts - metrics.first_token_ts) / 2
    assert outputs[-1].tpot == pytest.approx(pace)


def test_an_engine_is_made_of_arguments_and_an_llm_of_an_engine_args(llm):
    args = EngineArgs(llm.llm_engine.args.model, max_model_len=40, use_tqdm_on_load=False)
    assert vars(args) == asdict(args)
    with LLM.from_engine_args(args) as other, LLM(**vars(args)) as third:
        assert other.llm_engine.max_model_len == third.llm_engine.max_model_len == 40
    LLMEngine.from_engine_args(args, usage_context=None, stat_loggers=None).close()
    with pytest.raises(ValueError, match=r"stat_loggers=.* is not supported"):
        LLMEngine.from_engine_args(args, stat_loggers=[print])


def test_swap_space_is_taken_with_a_warning_as_in_vllm(llm):
    with pytest.warns(DeprecationWarning, match="swap_space"):
        LLM(llm.llm_engine.args.model, swap_space=4, use_tqdm_on_load=False).close()
