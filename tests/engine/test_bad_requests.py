"""Every parameter at its borders and beyond: messages name the parameter, the value, the limit."""

import inspect
import math
import pickle
from copy import copy, deepcopy
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import chain
from pathlib import Path

import pytest

from nanovllm import LLM, EngineArgs, LLMEngine, SamplingParams

NAN, INF = float("nan"), float("inf")
LENGTH, VOCAB = 20, 300
TOP = 2**31 - 1
NEAR_ONE = math.nextafter(1.0, 2.0)
WRONG = ["1", [1], {}, object(), 1j]

# name: (values that are taken, values out of range, more values of a wrong type)
SAMPLING = {
    "n": ([1, 2], [0, -1, TOP + 1], [1.0, True, None]),
    "temperature": ([0, 0.0, 0.01, 1, 2.0], [-1e-9, -1, 2.5, NAN, INF], [True, None]),
    "top_p": ([5e-324, 0.5, 1, 1.0], [0, 0.0, -0.1, NEAR_ONE, NAN, INF], [True, None]),
    "top_k": ([-1, 0, 1, TOP], [-2, TOP + 1], [1.0, NAN, True, None]),
    "min_p": ([0, 0.0, 1, 1.0], [-5e-324, NEAR_ONE, NAN, INF], [True, None]),
    "seed": ([None, 0, -(2**63), 2**63 - 1], [-(2**63) - 1, 2**63], [1.0, NAN, True]),
    "max_tokens": ([None, 1, TOP], [0, -1, TOP + 1], [1.0, NAN, True]),
    "stop": ([None, [], "a", ["a", "b"], ("a",)], ["", ["a", ""]], [5, True, [5], ["a", None]]),
    "stop_token_ids": ([None, [], [0], (1, TOP)], [[-1], [1, TOP + 1]], [5, True, [1.0], ["a"]]),
    "min_tokens": ([0, 16], [-1, 17, TOP + 1], [1.0, NAN, True, None]),
    "presence_penalty": ([-2, 0, 2.0], [-2.1, 2.1, NAN, INF], [True, None]),
    "frequency_penalty": ([-2, 0, 2.0], [-2.1, 2.1, NAN, INF], [True, None]),
    "repetition_penalty": (
        [2.0**-126, 1, 1.5, 3e38],
        [0, 0.0, -1.0, 1e-45, NAN, INF],
        [True, None],
    ),
    "logit_bias": ([None, {}, {0: 1, "7": -5.5}, {TOP: -INF}], [], [5, True, {1: "a"}, {1.0: 1.0}]),
    "bad_words": ([None, [], ["a"], ("a", " b ")], [["a", ""]], [5, True, [5], ["a", None], "a"]),
    "allowed_token_ids": ([None, [0], (1, TOP)], [[-1], [1, TOP + 1]], [5, True, [1.0], ["a"]]),
    "ignore_eos": ([True, False], [], [0, 1, None, NAN]),
    "include_stop_str_in_output": ([True, False], [], [0, 1, None]),
    "skip_special_tokens": ([True, False], [], [0, 1, None]),
    "detokenize": ([True, False], [], [0, 1, None]),
    "logprobs": ([None, 0, 1, 20, True], [-1, -2, 21, TOP], [1.0, NAN, False]),
    "prompt_logprobs": ([None, 0, 1, 20, True], [-1, -2, 21, TOP], [1.0, NAN, False]),
    "skip_reading_prefix_cache": ([None, True, False], [], [0, 1, "no"]),
}
ENGINE = {
    "seed": ([None, 0, -(2**63), 2**63 - 1], [2**63, -(2**63) - 1], [1.0, True, NAN]),
    "tensor_parallel_size": ([1, TOP], [0, -1, TOP + 1], [1.0, True, None]),
    "max_model_len": ([None, -1, "auto", 1, TOP], [0, -2, TOP + 1], [1.0, True, NAN]),
    "max_num_seqs": ([None, 1, 2**16], [0, -1, 2**16 + 1, TOP], [1.0, True]),
    "max_num_batched_tokens": ([None, 1, TOP], [0, -1, TOP + 1], [1.0, True]),
    "block_size": ([None, 1, TOP], [0, -1, TOP + 1], [1.0, True]),
    "num_gpu_blocks_override": ([None, 1, TOP], [0, -1, TOP + 1], [1.0, True]),
    "gpu_memory_utilization": ([0.01, 0.5, 1, 1.0], [0.009, 0, NEAR_ONE, NAN, INF], [True, None]),
    "dtype": (["auto", "float32", "bfloat16", "float16", "half", "float"], ["int8", "float64"], []),
} | {
    name: ([True, False], [], [0, 1, None, "yes"])
    for name in ("skip_tokenizer_init", "enforce_eager", "enable_torch_compile", "use_tqdm_on_load")
} | {
    name: ([True, False, None], [], [0, 1, "yes"])
    for name in ("enable_prefix_caching", "enable_chunked_prefill", "async_scheduling")
} | {"override_generation_config": ([{}, {"top_k": 1}], [], [None, 5, True])}  # fmt: skip
NAMES = {  # strings, checked where they are used
    "model", "tokenizer", "revision", "device", "attention_backend", "dtype", "generation_config",
}  # fmt: skip
NOT_WRONG = {
    "override_generation_config": [{}],
    "dtype": WRONG,
    "stop": [[1]],
    "stop_token_ids": [[1]],
    "logit_bias": [{}],
    "allowed_token_ids": [[1]],
}
ITS_OWN = {"distributed_executor_backend"}  # what it takes depends on the number of ranks


def in_words(value):
    """A test's name for a value, the same in every process: without its address."""
    text = value.__name__ if isinstance(value, type) else repr(value)
    return text.partition(" object at ")[0][:40]


def cases(table, which):
    for name, row in table.items():
        wrong_types = WRONG[1:] if name.startswith("stop") else WRONG
        wrong_types = [v for v in wrong_types if v not in NOT_WRONG.get(name, [])]
        values = row[which] + (wrong_types if which == 2 else [])
        yield from ((name, value) for value in values)


def build(kind, name, value):
    return (
        EngineArgs("m", **{name: value}) if kind is EngineArgs else SamplingParams(**{name: value})
    )


TABLES = [(SamplingParams, SAMPLING), (EngineArgs, ENGINE)]


def all_cases(which):
    return list(chain(*([(kind, *case) for case in cases(table, which)] for kind, table in TABLES)))


@pytest.mark.parametrize(("kind", "name", "value"), all_cases(0), ids=in_words)
def test_values_within_the_limits_are_taken(kind, name, value):
    build(kind, name, value)


@pytest.mark.parametrize(("kind", "name", "value"), all_cases(1), ids=in_words)
def test_values_beyond_a_limit_are_named(kind, name, value):
    with pytest.raises(ValueError) as caught:
        build(kind, name, value)
    message = str(caught.value)
    bad = next(v for v in value if v in ("", -1, TOP + 1)) if isinstance(value, list) else value
    assert name in message
    assert repr(bad) in message


@pytest.mark.parametrize(("kind", "name", "value"), all_cases(2), ids=in_words)
def test_values_of_a_wrong_type_are_named(kind, name, value):
    with pytest.raises(TypeError) as caught:
        build(kind, name, value)
    assert name in str(caught.value)


def test_the_tables_are_whole():
    for kind, table in TABLES:
        ours = {f.name for f in fields(kind) if f.repr}
        others = NAMES | ITS_OWN if kind is EngineArgs else set()
        assert ours - set(table) - others == set()


ONLY = [(kind, f.name) for kind, _ in TABLES for f in fields(kind) if not f.repr]


@pytest.mark.parametrize(("kind", "name"), ONLY, ids=in_words)
def test_vllms_other_parameters_take_their_default_alone(kind, name):
    with pytest.raises(ValueError, match=name):
        build(kind, name, "something else")
    with pytest.raises(ValueError, match=name):
        build(kind, name, [float("nan")])


ALSO = [(kind, name) for kind, _ in TABLES for name in kind.unsupported_parameters]


@pytest.mark.parametrize(("kind", "name"), ALSO, ids=in_words)
def test_what_is_no_field_takes_the_values_that_change_nothing(kind, name):
    accepted = kind.unsupported_parameters[name]
    for value in accepted:
        parameters = build(kind, name, value)
        setattr(parameters, name, value)
        assert getattr(parameters, name) == accepted[0]
        assert parameters == build(kind, "seed", kind().seed)
    for value in ("another", [NAN], object(), 77):
        with pytest.raises(ValueError, match=f"{name}=.* is not supported.*engine accepts only"):
            build(kind, name, value)
        with pytest.raises(ValueError, match=f"{name}=.* is not supported.*engine accepts only"):
            setattr(parameters, name, value)


def test_zero_is_a_number_and_no_flag():
    assert EngineArgs(cpu_offload_gb=0.0, pipeline_parallel_size=1) == EngineArgs()
    for name, value in [("enable_lora", 0), ("trust_remote_code", 0), ("max_loras", True)]:
        with pytest.raises(ValueError, match=f"{name}={value} is not supported"):
            EngineArgs(**{name: value})


def test_sampling_parameters_are_given_by_name():
    """The first parameter is n in vLLM, so a number alone would mean something else here."""
    with pytest.raises(TypeError, match="positional"):
        SamplingParams(2)


def test_a_low_temperature_is_raised_as_in_vllm():
    for low in (1e-9, 0.001, 0.00999):
        with pytest.warns(UserWarning, match=rf"temperature={low!r} is raised to 0.01") as caught:
            assert SamplingParams(temperature=low).temperature == 0.01
        assert caught[0].filename == __file__
    assert SamplingParams(temperature=0).is_greedy


def test_none_means_our_default_where_vllms_default_is_none():
    names = ("seed", "max_num_seqs", "block_size", "enable_prefix_caching", "async_scheduling")
    assert EngineArgs("m", **dict.fromkeys(names)) == EngineArgs("m")
    assert EngineArgs("m", attention_backend=None, enable_chunked_prefill=None) == EngineArgs("m")
    assert (EngineArgs(dtype="half").dtype, EngineArgs(dtype="float").dtype) == (
        "float16",
        "float32",
    )


def test_an_executor_is_taken_where_it_changes_nothing(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for size, name, taken in [
        (1, None, True), (1, "mp", True), (1, "uni", True), (1, "ray", False),
        (2, None, True), (2, "mp", True), (2, "uni", False), (2, "external_launcher", False),
    ]:  # fmt: skip
        options = {"tensor_parallel_size": size, "distributed_executor_backend": name}
        if taken:
            EngineArgs("m", **options)
        else:
            with pytest.raises(ValueError, match=f"distributed_executor_backend='{name}'"):
                EngineArgs("m", **options)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    EngineArgs("m", tensor_parallel_size=2, distributed_executor_backend="external_launcher")


# -- attributes set after the check ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [(SamplingParams, "best_of"), (SamplingParams, "temprature"), (EngineArgs, "enable_lra")],
)
def test_an_attribute_that_is_no_parameter_is_refused_as_an_argument_is(kind, name):
    parameters = build(kind, "seed", 1)
    with pytest.raises(AttributeError, match=f"{kind.__name__}.*{name}"):
        setattr(parameters, name, 1)
    with pytest.raises(TypeError, match=f"{kind.__name__}.*{name}"):
        build(kind, name, 1)
    with pytest.raises(AttributeError, match=f"{kind.__name__}.*{name}"):
        getattr(parameters, name)


@pytest.mark.parametrize("kind", [SamplingParams, EngineArgs])
def test_parameters_can_be_copied_pickled_and_inspected(kind):
    given = build(kind, "seed", 7)
    copies = [replace(given), copy(given), deepcopy(given), pickle.loads(pickle.dumps(given))]
    assert all(other == given and other is not given for other in copies)
    assert list(inspect.signature(kind).parameters) == [f.name for f in fields(kind)]
    assert list(asdict(given)) == [f.name for f in fields(kind)]
    assert "seed=7" in repr(given)
    assert kind(**asdict(given)) == given


def bad_values():
    """Every parameter of both classes with one value that its constructor refuses."""
    for kind, table in TABLES:
        for name in table:
            yield kind, name, object()
        yield from ((kind, f.name, "another") for f in fields(kind) if not f.repr)
    yield from ((EngineArgs, name, 5) for name in sorted(NAMES))
    yield from ((EngineArgs, name, "") for name in ("model", "tokenizer", "revision"))
    yield EngineArgs, "tensor_parallel_size", 0
    yield SamplingParams, "stop", "half \ud800"


@pytest.mark.parametrize(("kind", "name", "value"), bad_values(), ids=in_words)
def test_a_bad_value_set_later_is_refused_where_it_is_used(llm, kind, name, value):
    use = partial(llm.generate, [1]) if kind is SamplingParams else LLMEngine
    parameters = kind() if kind is SamplingParams else kind(llm.llm_engine.args.model)
    setattr(parameters, name, value)
    with pytest.raises((TypeError, ValueError), match=f"{name}[ =]"):
        use(parameters)


def test_what_is_appended_to_a_checked_list_is_checked(llm):
    params = SamplingParams(stop=["a"])
    params.stop.append(5)
    with pytest.raises(TypeError, match=r"stop.*5"):
        llm.generate([1], params, use_tqdm=False)


@pytest.mark.parametrize("args", [None, "m", {"model": "m"}, SamplingParams()], ids=in_words)
def test_an_engine_is_made_of_its_arguments_alone(args):
    with pytest.raises(TypeError, match=r"engine_args must be of type EngineArgs, got"):
        LLMEngine(args)


class APath:
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return self.path


@pytest.mark.parametrize("name", ["model", "tokenizer", "revision"])
def test_a_path_of_any_class_is_taken_and_bytes_are_not(name):
    model = {} if name == "model" else {"model": "m"}
    for value in (Path("a/b"), APath("a/b"), "a/b"):
        assert getattr(EngineArgs(**model, **{name: value}), name) == "a/b"
    for value in (b"a/b", APath(b"a/b"), 5, ["a/b"]):
        with pytest.raises(TypeError, match=f"{name} must be of type str"):
            EngineArgs(**model, **{name: value})
    with pytest.raises(ValueError, match=f"{name} must not be empty"):
        EngineArgs(**model, **{name: ""})


# -- requests to a whole engine ------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, max_model_len=LENGTH, use_tqdm_on_load=False) as llm:
        yield llm
        assert not llm.llm_engine.sequences


GOOD = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
PROMPTS = [
    None, 5, 1.5, True, object(), b"text", {1}, {}, {"prompt": None}, {"prompt": 5}, {"text": "a"},
    {"prompt_token_ids": "ab"}, {"prompt_token_ids": []}, {"prompt_token_ids": [1.0]},
    {"prompt_token_ids": None}, {"prompt": [1, 2]}, {"prompt": "a", "multi_modal_data": {}}, "",
    [""], [[]], [None], [1, "a"], ["a", 1], [1, 2.0], [[1], 2], [[1, "a"]], [[True]], [True, False],
    [[NAN]], [[-1]], [[VOCAB]], [[2**70]], ["a", None], [["a", "b"]], [[[1]]], {"prompt": "\ud800"},
    {"prompt": 5, "prompt_token_ids": [1]}, {"prompt_token_ids": {1: 2}}, [1] * LENGTH,
    [1] * (LENGTH + 1), [[1], [1] * LENGTH], "a" * 10_000, iter([[1]]),
]  # fmt: skip


@pytest.mark.parametrize("call", ["generate", "stream"])
@pytest.mark.parametrize("prompts", PROMPTS, ids=in_words)
def test_bad_prompts_are_refused_and_nothing_is_queued(llm, call, prompts):
    with pytest.raises((TypeError, ValueError), match="prompt") as caught:
        getattr(llm, call)(prompts, GOOD)
    assert len(str(caught.value)) < 400
    assert not llm.llm_engine.sequences


@pytest.mark.parametrize("length", [1, LENGTH - 2, LENGTH - 1])
def test_prompts_within_the_limit(llm, length):
    output = llm.generate([1] * length, GOOD, use_tqdm=False)[0].outputs[0]
    assert len(output.token_ids) == min(2, LENGTH - length)


def test_the_limit_is_in_the_message(llm):
    for length in (LENGTH, LENGTH + 1):
        with pytest.raises(ValueError, match=rf"1 to {LENGTH - 1} tokens.*={LENGTH}; got {length}"):
            llm.generate([1] * length, GOOD, use_tqdm=False)
    for token_id in (-1, VOCAB, 2**70):
        with pytest.raises(ValueError, match=rf"token id.*{VOCAB - 1}, got {token_id}"):
            llm.generate([[0, token_id]], GOOD, use_tqdm=False)
    llm.generate([[0, VOCAB - 1]], GOOD, use_tqdm=False)


@pytest.mark.parametrize(
    "params", [5, "x", {}, {"temperature": 0}, [5], [None, GOOD], [GOOD, None, GOOD], [], object()]
)
def test_bad_params_are_named(llm, params):
    with pytest.raises((TypeError, ValueError), match="sampling_params"):
        llm.generate([[1]], params, use_tqdm=False)


def test_params_changed_after_their_check_are_checked_again(llm):
    params = SamplingParams()
    params.temperature = NAN
    with pytest.raises(ValueError, match=r"temperature.*nan"):
        llm.generate([1], params, use_tqdm=False)


@pytest.mark.parametrize("prompts", [[], ()])
def test_no_prompts_no_outputs(llm, prompts):
    assert llm.generate(prompts, GOOD, use_tqdm=False) == []
    assert list(llm.stream(prompts, GOOD)) == []


HALF = "a\ud800b"  # half of a surrogate pair, as JSON can spell it


def a_talk(content="a"):
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda llm: llm.generate(HALF), "prompt"),
        (lambda llm: llm.generate(["a", {"prompt": HALF}]), "prompt"),
        (lambda llm: llm.generate({"prompt": HALF, "prompt_token_ids": [1]}), "prompt"),
        (lambda llm: llm.stream(HALF), "prompt"),
        (lambda llm: llm.generate("a", SamplingParams(stop=HALF)), "stop"),
        (lambda llm: llm.generate("a", SamplingParams(stop=["a", HALF])), "stop"),
        (lambda llm: llm.chat(a_talk(HALF)), r"messages\[0\]\['content'\]"),
        (lambda llm: llm.chat([a_talk(), a_talk(HALF)]), r"messages\[1\]\[0\]\['content'\]"),
        (lambda llm: llm.chat([{"role": HALF, "content": "a"}]), r"messages\[0\]\['role'\]"),
        (lambda llm: llm.chat([a_talk()[0] | {HALF: "a"}]), r"a key of messages\[0\]"),
        (lambda llm: llm.chat(a_talk(), chat_template=HALF), "chat_template"),
        (lambda llm: llm.chat(a_talk(), chat_template="{{ '\\ud800' }}"), "chat template's text"),
        (lambda llm: llm.chat(a_talk(), chat_template_kwargs={"tools": [{"name": HALF}]}),
         r"tools\[0\]\['name'\]"),
        (lambda llm: llm.chat(a_talk(), chat_template_kwargs={"documents": (HALF,)}),
         r"documents\[0\]"),
    ],
)  # fmt: skip
def test_half_a_surrogate_pair_is_named_wherever_it_stands(llm, call, name):
    with pytest.raises(ValueError, match=rf"{name} must be valid Unicode.*'\\ud800'") as caught:
        call(llm)
    str(caught.value).encode()  # the message itself can be printed
    assert not llm.llm_engine.sequences


def test_whole_surrogate_pairs_and_every_other_character_are_taken(llm):
    text = "\N{GRINNING FACE}\0\ufffe\U0010ffff\N{COMBINING ACUTE ACCENT}"
    llm.generate(text, GOOD, use_tqdm=False)


TALKS = [None, 5, {}, {"role": "user"}, [None], [5], [[5]], ["a"], [["a"]], [{}], [[{}]],
         [{"role": "user"}], [{"role": "user", "content": [{"type": "text", "text": 5}]}],
         [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}],
         [{"role": "user", "content": []}, "a"],
         [{"role": "user", "content": "a"}, [{"role": "user", "content": "b"}]],
         [[{"role": "user", "content": "b"}], {"role": "user", "content": "a"}]]  # fmt: skip


@pytest.mark.parametrize("messages", TALKS, ids=in_words)
def test_bad_conversations_are_named(llm, messages):
    with pytest.raises((TypeError, ValueError), match="messages"):
        llm.chat(messages, GOOD, use_tqdm=False)


@pytest.mark.parametrize(
    "options",
    [{"chat_template": 5}, {"chat_template": "{{"}, {"chat_template": "{{ 1 / 0 }}"},
     {"chat_template": "{% for i in range(9999999) %}{{ i }}{% endfor %}"},
     {"chat_template_kwargs": 5}, {"chat_template_kwargs": {"tokenize": True}}],
    ids=repr,
)  # fmt: skip
def test_bad_templates_are_named(llm, options):
    with pytest.raises((TypeError, ValueError), match=r"messages|chat_template|prompt"):
        llm.chat([{"role": "user", "content": "a"}], GOOD, use_tqdm=False, **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [("chat_template", 5), ("chat_template", b"a"), ("add_generation_prompt", "yes")],
)
def test_chat_options_of_a_wrong_type_are_named(llm, name, value):
    for options in ({name: value}, {"chat_template_kwargs": {name: value}}):
        with pytest.raises(TypeError, match=f"^{name} must be of type"):
            llm.chat(a_talk(), GOOD, use_tqdm=False, **options)


@pytest.mark.parametrize(
    "options",
    [{"model": "/no/such folder"}, {"model": ""}, {"model": "\0"}, {"device": "tpu"},
     {"device": ""}, {"attention_backend": "x"}, {"attention_backend": 5}, {"tokenizer": "/no"},
     {"max_model_len": 513}, {"tensor_parallel_size": 3}, {"block_size": TOP},
     {"num_gpu_blocks_override": TOP}, {"max_num_seqs": TOP}],
    ids=repr,
)  # fmt: skip
def test_what_only_the_model_or_the_machine_can_refuse(tiny_model, options, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = {"model": str(tiny_model(family="qwen3")), "use_tqdm_on_load": False} | options
    with pytest.raises((TypeError, ValueError)) as caught:
        LLM(**given)
    assert next(iter(options)) in str(caught.value)
