"""Scripts in the style of vLLM's documentation run here, with the import and the model changed.

Each is written for this file and uses one documented feature. It imports `vllm`, which stands for
nanovllm here, and its model is the storyteller. What it prints must match the pattern beside it.
"""

import importlib
import pkgutil
import re
import sys

import pytest

import nanovllm
from course.models.choice import own_model

SCRIPTS = {}  # name -> (pattern of what it prints, script, words of its command line)


def script(name, pattern, text, *words):
    SCRIPTS[name] = (pattern, text, words)


script(
    "quickstart",
    r"(Prompt: '.+', Generated text: '.+'\n){4}",
    """
from vllm import LLM, SamplingParams

prompts = [
    "Hello, my name is",
    "The president of the zoo is",
    "Once upon a time",
    "The future of the little robot is",
]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95)
llm = LLM(model="MODEL")
outputs = llm.generate(prompts, sampling_params)
for output in outputs:
    prompt = output.prompt
    generated_text = output.outputs[0].text
    print(f"Prompt: {prompt!r}, Generated text: {generated_text!r}")
""",
)

script(
    "generate by the command line",
    r"(Once upon a time.+\n-+\n){2}",
    """
from vllm import LLM, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser


def main(args: dict):
    wanted = {name: args.pop(name) for name in ("max_tokens", "temperature", "top_p", "top_k")}
    llm = LLM(**args)
    params = llm.get_default_sampling_params()
    for name, value in wanted.items():
        if value is not None:
            setattr(params, name, value)
    for output in llm.generate(["Once upon a time"] * 2, params):
        print(output.prompt, output.outputs[0].text.replace(chr(10), " "))
        print("-" * 50)


if __name__ == "__main__":
    parser = FlexibleArgumentParser()
    EngineArgs.add_cli_args(parser)
    parser.set_defaults(model="MODEL")
    group = parser.add_argument_group("Sampling parameters")
    group.add_argument("--max-tokens", type=int)
    group.add_argument("--temperature", type=float)
    group.add_argument("--top-p", type=float)
    group.add_argument("--top-k", type=int)
    main(vars(parser.parse_args()))
""",
    "--max-tokens",
    "6",
    "--max_model_len=64",
    "--no-enable-prefix-caching",
)

script(
    "chat by the command line",
    r"(Generated text: .+\n){4}-+\nGenerated text: .+\n-+\n",
    """
from vllm import LLM, EngineArgs
from vllm.utils import FlexibleArgumentParser


def main(args: dict):
    max_tokens = args.pop("max_tokens")
    template_path = args.pop("chat_template_path")
    llm = LLM(**args)
    params = llm.get_default_sampling_params()
    params.max_tokens = max_tokens

    def show(outputs):
        for output in outputs:
            print(f"Generated text: {output.outputs[0].text!r}")
        print("-" * 80)

    conversation = [
        {"role": "system", "content": "You are a helpful assistant"},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello! How can I assist you today?"},
        {"role": "user", "content": "Tell me a story about a fox."},
    ]
    show(llm.chat([conversation for _ in range(4)], params, use_tqdm=True))
    template = open(template_path).read() if template_path else "{{ messages[-1].content }}"
    show(llm.chat(conversation, params, use_tqdm=False, chat_template=template))


if __name__ == "__main__":
    parser = FlexibleArgumentParser()
    engine_group = parser.add_argument_group("Engine arguments")
    EngineArgs.add_cli_args(engine_group)
    engine_group.set_defaults(model="MODEL")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--chat-template-path", type=str)
    main(vars(parser.parse_args()))
""",
    "--max-tokens",
    "4",
    "--tokenizer-mode",
    "auto",
    "--load_format",
    "auto",
)

script(
    "an engine of one's own",
    r"(request \d done: '.+'\n){3}0 left\n",
    """
import argparse

from vllm import EngineArgs, LLMEngine, RequestOutput, SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser


def requests():
    yield "A robot may not", SamplingParams(temperature=0.0, max_tokens=4)
    yield "To be or not to be,", SamplingParams(temperature=0.8, top_k=5, max_tokens=3)
    yield "What is the meaning", SamplingParams(temperature=0.8, top_p=0.95, max_tokens=5)


def main(args: argparse.Namespace):
    engine = LLMEngine.from_engine_args(EngineArgs.from_cli_args(args))
    waiting, request_id = list(requests()), 0
    while waiting or engine.has_unfinished_requests():
        if waiting:
            prompt, params = waiting.pop(0)
            engine.add_request(str(request_id), prompt, params)
            request_id += 1
        request_outputs: list[RequestOutput] = engine.step()
        for output in request_outputs:
            if output.finished:
                print(f"request {output.request_id} done: {output.outputs[0].text!r}")
    print(engine.get_num_unfinished_requests(), "left")


if __name__ == "__main__":
    parser = FlexibleArgumentParser(description="Demo of using the LLMEngine class directly")
    parser = EngineArgs.add_cli_args(parser)
    main(parser.parse_args())
""",
    "--model",
    "MODEL",
    "--max-num-seqs",
    "2",
)

script(
    "prefix caching and its reset",
    r"True\n\[0, 0\] \[48, 48\] True \[0, 0\]\n",
    """
from vllm import LLM, SamplingParams

prefix = "Once upon a time there was a little fox who lived in the old wood near the river. " * 3
prompts = [prefix + "She was", prefix + "One day"]
params = SamplingParams(temperature=0.0, max_tokens=4)
plain = LLM(model="MODEL", enable_prefix_caching=False).generate(prompts, params)
llm = LLM(model="MODEL", enable_prefix_caching=True, gpu_memory_utilization=0.4)
llm.generate(prompts[0], params)
cached = llm.generate(prompts, params)
print([o.outputs[0].text for o in plain] == [o.outputs[0].text for o in cached])
found = [output.num_cached_tokens // 16 * 16 for output in cached]
done = llm.reset_prefix_cache()
again = llm.generate(prompts[:1], params) + llm.generate(prompts[1:], params)
print([o.num_cached_tokens for o in plain], [min(n, 48) for n in found], done,
      [again[0].num_cached_tokens, plain[1].num_cached_tokens])
""",
)

script(
    "two engines, one after the other",
    r"True\n",
    """
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

params = SamplingParams(temperature=0.0, max_tokens=4)
llm = LLM(model="MODEL", enable_prefix_caching=False, gpu_memory_utilization=0.4)
first = llm.generate("Once upon a time", params)[0].outputs[0].text
del llm
cleanup_dist_env_and_memory()
llm = LLM(model="MODEL", enable_prefix_caching=True, gpu_memory_utilization=0.4)
print(llm.generate("Once upon a time", params)[0].outputs[0].text == first)
""",
)

script(
    "a prompt of token ids",
    r"None \[1, 2, 3, 4\] 3\n",
    """
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

llm = LLM(model="MODEL")
output = llm.generate(TokensPrompt(prompt_token_ids=[1, 2, 3, 4]), SamplingParams(max_tokens=3))[0]
print(output.prompt, output.prompt_token_ids, len(output.outputs[0].token_ids))
""",
)

script(
    "prompts as dicts",
    r"Once upon a time \| A fox\n",
    """
from vllm import LLM, SamplingParams, TextPrompt

llm = LLM("MODEL")
prompts = [TextPrompt(prompt="Once upon a time"), {"prompt": "A fox", "multi_modal_data": None}]
print(*[o.prompt for o in llm.generate(prompts, SamplingParams(max_tokens=2))], sep=" | ")
""",
)

script(
    "parameters for each prompt",
    r"\[2, 5\]\n",
    """
from vllm import LLM, SamplingParams

llm = LLM(model="MODEL")
params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (2, 5)]
outputs = llm.generate(["One", "Two"], sampling_params=params, use_tqdm=False)
print([len(output.outputs[0].token_ids) for output in outputs])
""",
)

script(
    "the model's own sampling parameters",
    r"0.7 300 1.0 16\n",
    """
from vllm import LLM

own = LLM(model="MODEL", generation_config="auto").get_default_sampling_params()
neutral = LLM(model="MODEL", generation_config="vllm").get_default_sampling_params()
print(own.temperature, own.max_tokens, neutral.temperature, neutral.max_tokens)
""",
)

script(
    "generation defaults that are overridden",
    r"0.2 3\n",
    """
from vllm import LLM

llm = LLM(model="MODEL", override_generation_config={"temperature": 0.2, "max_new_tokens": 3})
params = llm.get_default_sampling_params()
print(params.temperature, len(llm.generate("A fox")[0].outputs[0].token_ids))
""",
)

script(
    "a progress bar of one's own",
    r"3 Processed prompts .*3",
    """
from functools import partial

from tqdm import tqdm
from vllm import LLM, SamplingParams

made = []


class Bar(tqdm):
    def __init__(self, *args, **kwargs):
        made.append(kwargs)
        super().__init__(*args, **kwargs)

    def close(self):
        made.append(self.n)
        super().close()


llm = LLM(model="MODEL")
llm.generate(["a", "b", "c"], SamplingParams(max_tokens=1), use_tqdm=partial(Bar, leave=False))
print(made[0]["total"], made[0]["desc"], made[1:])
""",
)

script(
    "why a request ended",
    r"length None\nstop fox\nstop \d+ True\n",
    """
from vllm import LLM, SamplingParams

llm = LLM(model="MODEL", disable_log_stats=True)


def end(**options):
    params = SamplingParams(temperature=0, **options)
    return llm.generate("There was once a proud", params, use_tqdm=False)[0].outputs[0]


short = end(max_tokens=1)
print(short.finish_reason, short.stop_reason)
word = end(max_tokens=3).text.split()[0]
stopped = end(max_tokens=9, stop=[word])
print(stopped.finish_reason, stopped.stop_reason.replace(word, "fox"))
stopped = end(max_tokens=9, stop_token_ids=[short.token_ids[0]])
print(stopped.finish_reason, stopped.stop_reason, stopped.stop_reason == stopped.token_ids[-1])
""",
)

script(
    "fields that were not asked for",
    r"None None None None None True\n",
    """
from vllm import LLM, SamplingParams

output = LLM(model="MODEL").generate("A fox", SamplingParams(max_tokens=1, logprobs=None))[0]
answer = output.outputs[0]
print(answer.cumulative_logprob, answer.logprobs, output.prompt_logprobs, output.lora_request,
      answer.lora_request, answer.finished())
""",
)

script(
    "what a request took",
    r"4 tokens True True\n",
    """
import time

from vllm import LLM, SamplingParams

llm = LLM(model="MODEL", disable_log_stats=False)
params = SamplingParams(max_tokens=4, ignore_eos=True)
metrics = llm.generate("Once upon a time", params)[0].metrics
queue_time = metrics.scheduled_ts - metrics.queued_ts
decode_time = metrics.last_token_ts - metrics.first_token_ts
print(metrics.num_generation_tokens, "tokens", abs(time.time() - metrics.arrival_time) < 600,
      min(queue_time, decode_time, metrics.first_token_latency) > 0)
""",
)

script(
    "vLLM's defaults written out",
    r"1\n",
    """
from vllm import LLM, SamplingParams

llm = LLM(
    model="MODEL", tokenizer=None, tokenizer_mode="auto", trust_remote_code=False, dtype="auto",
    quantization=None, revision=None, tokenizer_revision=None, seed=0, enforce_eager=False,
    gpu_memory_utilization=0.92, cpu_offload_gb=0, load_format="auto", kv_cache_dtype="auto",
    disable_custom_all_reduce=False, hf_overrides=None, compilation_config=None, block_size=None,
    max_num_seqs=None, max_num_batched_tokens=None, enable_prefix_caching=None,
    enable_chunked_prefill=None, scheduling_policy="fcfs", pipeline_parallel_size=1,
)
params = SamplingParams(
    n=1, presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0, temperature=1.0,
    top_p=1.0, top_k=0, min_p=0.0, seed=None, stop=None, stop_token_ids=None, bad_words=None,
    ignore_eos=False, max_tokens=2, min_tokens=0, logprobs=None, prompt_logprobs=None,
    detokenize=True, skip_special_tokens=True, spaces_between_special_tokens=True,
    structured_outputs=None, logit_bias=None, allowed_token_ids=None, extra_args=None,
)
print(len(llm.generate("A fox", params, lora_request=None, priority=None)))
""",
)

script(
    "chat with every argument",
    r"'.+'\n",
    """
from vllm import LLM, SamplingParams

llm = LLM(model="MODEL")
messages = [{"role": "user", "content": "Tell me a story about a bear."}]
params = SamplingParams(max_tokens=6, temperature=0.0)
outputs = llm.chat(messages, params, False, None, None, "auto", True, False, None, None,
                   tokenization_kwargs=None, mm_processor_kwargs=None)
print(repr(outputs[0].outputs[0].text))
""",
)

script(
    "the beginning of an answer",
    r"True\n",
    """
from vllm import LLM, SamplingParams

llm = LLM(model="MODEL")
messages = [
    {"role": "user", "content": "Tell me a story about a bear."},
    {"role": "assistant", "content": "There was once a bear called"},
]
output = llm.chat(messages, SamplingParams(max_tokens=2), add_generation_prompt=False,
                  continue_final_message=True)[0]
print(output.prompt.endswith("a bear called"))
""",
)

script(
    "a chat template for all calls",
    r"Ask: Who\? Answer:\n",
    """
from vllm import LLM, SamplingParams

template = "{% for m in messages %}Ask: {{ m.content }}{% endfor %} Answer:"
llm = LLM(model="MODEL", chat_template=template)
print(llm.chat([{"role": "user", "content": "Who?"}], SamplingParams(max_tokens=1))[0].prompt)
""",
)

script(
    "tools",
    r"\['get_weather'\]\n",
    """
import json

from vllm import LLM, SamplingParams

tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
template = "{{ tools | map(attribute='function.name') | list }}"
llm = LLM(model="MODEL")
output = llm.chat([{"role": "user", "content": "Weather?"}], SamplingParams(max_tokens=1),
                  tools=tools, chat_template=template)[0]
print(output.prompt)
""",
)

script(
    "stop strings in the output",
    r"True False\n",
    """
from vllm import LLM, SamplingParams

llm = LLM(model="MODEL")
kept, cut = llm.generate(["Once upon a time"] * 2, [
    SamplingParams(temperature=0.0, stop=[" a"], include_stop_str_in_output=keep)
    for keep in (True, False)
])
print(kept.outputs[0].text.endswith(" a"), cut.outputs[0].text.endswith(" a"))
""",
)

script(
    "reproducible by a seed",
    r"True False\n",
    """
from vllm import LLM, SamplingParams

llm = LLM(model="MODEL", seed=None)
params = [SamplingParams(seed=seed, temperature=1.5) for seed in (7, 7, 8)]
texts = [output.outputs[0].text for output in llm.generate(["Once upon a time"] * 3, params)]
print(texts[0] == texts[1], texts[0] == texts[2])
""",
)

script(
    "a dtype by its short name",
    r"torch.float32\n",
    """
import torch
from vllm import LLM

llm = LLM(model="MODEL", dtype="float", distributed_executor_backend="uni", max_model_len=64)
print(llm.llm_engine.model_config.dtype)
""",
)

script(
    "an LLM of engine arguments",
    r"48 48\n",
    """
from dataclasses import asdict

from vllm import LLM, EngineArgs

engine_args = EngineArgs(model="MODEL", max_model_len=48, max_num_seqs=5, disable_log_stats=True)
print(LLM.from_engine_args(engine_args).llm_engine.max_model_len,
      LLM(**asdict(engine_args)).llm_engine.max_model_len)
""",
)

script(
    "a request that is aborted",
    r"1 0 \[\]\n",
    """
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.engine.llm_engine import LLMEngine

engine = LLMEngine.from_engine_args(EngineArgs(model="MODEL"))
name = engine.add_request("a", {"prompt_token_ids": [5, 6]}, SamplingParams(max_tokens=50))
engine.step()
before = engine.get_num_unfinished_requests()
engine.abort_request([name])
print(before, engine.get_num_unfinished_requests(), engine.step())
""",
)

script(
    "text that grows from step to step",
    r"True \d+\n",
    """
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.sampling_params import RequestOutputKind

engine = LLMEngine.from_engine_args(EngineArgs(model="MODEL", async_scheduling=None))
params = SamplingParams(max_tokens=12, temperature=0.0, output_kind=RequestOutputKind.CUMULATIVE)
engine.add_request("0", "Once upon a time", params)
texts = []
while engine.has_unfinished_requests():
    texts += [output.outputs[0].text for output in engine.step()]
print(all(later.startswith(text) for text, later in zip(texts, texts[1:])), len(texts))
""",
)

script(
    "a prompt that the tokenizer made",
    r"True\n",
    """
from vllm import LLM, SamplingParams

llm = LLM(model="MODEL")
tokenizer = llm.get_tokenizer()
ids = tokenizer.encode("Once upon a time")
params = SamplingParams(temperature=0.0, max_tokens=8)
a = llm.generate({"prompt_token_ids": ids}, params)[0].outputs[0].text
b = llm.generate("Once upon a time", params)[0].outputs[0].text
print(a == b)
""",
)

script(
    "token ids without a tokenizer",
    r"'' 4\n",
    """
from vllm import LLM, SamplingParams

llm = LLM(model="MODEL", skip_tokenizer_init=True)
answer = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, detokenize=False))[0].outputs[0]
print(repr(answer.text), len(answer.token_ids))
""",
)

script(
    "conversations with a batch of parameters",
    r"2 \[1, 2\]\n",
    """
from vllm import LLM, SamplingParams

llm = LLM(model="MODEL")
texts = ["Tell me a story about a fox.", [{"type": "text", "text": "Tell me about a hen."}]]
talks = [[{"role": "user", "content": text}] for text in texts]
params = [SamplingParams(max_tokens=n) for n in (1, 2)]
outputs = llm.chat(messages=talks, sampling_params=params, use_tqdm=False)
print(len(outputs), [len(output.outputs[0].token_ids) for output in outputs])
""",
)

script(
    "types of what comes out",
    r"True True\n",
    """
from vllm import LLM, PromptType, SamplingParams
from vllm.outputs import CompletionOutput, RequestOutput

prompts: list[PromptType] = ["A fox", [3, 4], {"prompt_token_ids": [5]}]
outputs = LLM(model="MODEL").generate(prompts, SamplingParams(max_tokens=1))
print(all(isinstance(output, RequestOutput) for output in outputs),
      all(isinstance(output.outputs[0], CompletionOutput) for output in outputs))
""",
)

script(
    "a copy of parameters",
    r"0.5 0.9 SamplingParams\(.*temperature=0.9",
    """
from vllm import SamplingParams

base = SamplingParams(temperature=0.5, top_k=10)
other = base.clone()
other.temperature = 0.9
print(base.temperature, other.temperature, other)
""",
)

script(
    "a refusal that names the parameter",
    r"speculative_config=.*None\nenable_lora=True.*\n",
    """
from vllm import LLM

for options in ({"speculative_config": {"method": "ngram"}}, {"enable_lora": True}):
    try:
        LLM(model="MODEL", **options)
    except ValueError as error:
        print(error)
""",
)


@pytest.fixture
def vllm(monkeypatch):
    """`import vllm` and `from vllm.x.y import z` find nanovllm's modules."""
    names = ["nanovllm", *(m.name for m in pkgutil.walk_packages(nanovllm.__path__, "nanovllm."))]
    for name in names:
        if not name.startswith("nanovllm.kernels"):  # need triton
            alias = name.replace("nanovllm", "vllm", 1)
            monkeypatch.setitem(sys.modules, alias, importlib.import_module(name))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_for_vllm_runs(vllm, monkeypatch, capsys, name):
    pattern, text, words = SCRIPTS[name]
    model = str(own_model())
    monkeypatch.setattr(sys, "argv", ["script.py", *(w.replace("MODEL", model) for w in words)])
    code = compile(text.replace("MODEL", model), f"<{name}>", "exec")
    exec(code, {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert re.match(pattern, printed), printed


def test_there_are_thirty_scripts():
    assert len(SCRIPTS) >= 30
