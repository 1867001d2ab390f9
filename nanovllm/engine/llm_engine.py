"""LLMEngine: takes requests, runs steps and returns outputs, on every rank alike.

Its methods are vLLM's. `add`, `abort` and `advance` first broadcast a command to all ranks, and
then carry it out here, while the other ranks carry it out too (see `on_all_ranks`). Several threads
may use one engine. They take turns, and each step runs the requests of all of them.
"""

import json
import os
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanovllm.checkpoint import weights
from nanovllm.checkpoint.config_json import read_model_config
from nanovllm.checkpoint.generation_config import make_default_params, read_generation_config
from nanovllm.checkpoint.hub import find_model
from nanovllm.checkpoint.tokenizer import load_tokenizer
from nanovllm.config import EngineArgs
from nanovllm.distributed.consistency import check_facts, collect_facts
from nanovllm.distributed.launch import join_torchrun, start_workers
from nanovllm.distributed.ranks import Ranks
from nanovllm.engine.arg_utils import resolve_args, resolve_max_model_len
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.commands import CommandedEngine
from nanovllm.engine.core import EngineCore
from nanovllm.engine.memory import make_model_runner, max_num_blocks, reserved_bytes
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.frontend.detokenizer import make_detokenizer
from nanovllm.frontend.input_processor import InputProcessor, Request
from nanovllm.frontend.parallel_sampling import fan_out, ids_of
from nanovllm.frontend.streaming import Call, RequestGroup, read_texts
from nanovllm.layers.attention import rope_store
from nanovllm.layers.backend import Backend, choose_backend, compile_linears
from nanovllm.models.model_config import ModelConfig, check_tensor_parallel_size
from nanovllm.outputs import RequestOutput, StepRecord
from nanovllm.sampling_params import SamplingParams
from nanovllm.validation import check_options, check_type, vllm_defaults

WORKER_CODE = "from nanovllm.engine.worker import run_worker; run_worker()"


class LLMEngine(CommandedEngine):
    """vLLM's engine interface.

    ranks: given to an engine whose ranks have been started already, as a worker's have.
    block_manager_class, scheduler_class, store_kv: a learner's own classes and store function may
    take the place of the engine's, on one rank only.
    Raises TypeError or ValueError for a model or an argument that the engine cannot honour.
    """

    num_torchrun_engines = 0  # of this process

    def __init__(
        self,
        args: EngineArgs,
        *,
        ranks: Ranks | None = None,
        block_manager_class: type = BlockManager,
        scheduler_class: type = Scheduler,
        store_kv: Any = None,
    ):
        super().__init__()
        check_type("engine_args", args, EngineArgs)
        args = replace(args)  # a checked copy: an attribute may have been set since the last check
        folder = find_model(args.model, args.revision)
        config = read_model_config(folder)
        check_tensor_parallel_size(config, args.tensor_parallel_size)
        self.args = resolved = resolve_args(args, config)
        device = torch.device(resolved.device)
        config = replace(config, dtype=weights.resolve_dtype(args.dtype, config, device))
        self.model_config = config
        tokenizer = None if args.skip_tokenizer_init else load_tokenizer(args, folder)
        eos_ids, default_params = read_generation_config(folder, config, tokenizer, args)
        backend = make_backend(args, device, config, store_kv)
        self.ranks = ranks or self._start_ranks(args)
        self.device = self.ranks.local_device(device)
        resolved = replace(resolved, device=str(self.device))
        try:
            check_facts(self.ranks, collect_facts(folder, config, resolved))
            # The RoPE table and the rows of the input batch are as long as the longest request,
            # so they need not be longer than any cache could be.
            capacity = max_num_blocks(config, resolved, self.ranks) * args.block_size
            resolved = replace(
                resolved, max_model_len=min(resolved.max_model_len or capacity, capacity)
            )
            runner = self._make_runner(folder, backend, resolved)
            self.max_model_len = resolve_max_model_len(args, resolved, runner.num_blocks)
            self.block_manager = block_manager_class(
                runner.num_blocks, args.block_size, args.enable_prefix_caching
            )
            budget, chunked = resolved.max_num_batched_tokens, args.enable_chunked_prefill
            scheduler = scheduler_class(self.block_manager, args.max_num_seqs, budget, chunked)
            self.core = EngineCore(scheduler, runner, args.async_scheduling)
            self.ranks.use_step_timeout()
        except BaseException as error:
            self.ranks.monitor.report_error(error)
            self.ranks.close(kill=True)
            raise
        self.input_processor = InputProcessor(
            tokenizer, default_params, eos_ids, config.vocab_size, self.max_model_len
        )
        self.num_requests = 0  # ever added
        self.open()

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, **options: Any) -> "LLMEngine":
        """Build an engine. vLLM's options of this method say who is asking and what to log."""
        check_options("from_engine_args", options, vllm_defaults.FROM_ENGINE_ARGS)
        return cls(engine_args)

    def _start_ranks(self, args: EngineArgs) -> Ranks:
        if args.tensor_parallel_size == 1:
            return Ranks()
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return start_workers(args.tensor_parallel_size, asdict(args), WORKER_CODE)
        LLMEngine.num_torchrun_engines += 1
        return join_torchrun(args.tensor_parallel_size, LLMEngine.num_torchrun_engines)

    def _make_runner(self, folder: Path, backend: Backend, args: EngineArgs) -> ModelRunner:
        """Load the model, and make its runner with the KV cache that memory allows."""
        reserved = reserved_bytes(self.device)
        model = weights.load_model(folder, self.model_config, backend, self.ranks, args)
        self.ranks.init_process_group(self.device)
        return make_model_runner(model, self.model_config, args, reserved)

    # -- commands: each method broadcasts, and then acts -----------------------------------------

    def add(
        self, requests: list[Request], group: Call | RequestGroup | None = None
    ) -> list[Sequence]:
        """Queue requests that `make_request` has checked, on every rank, all of them or none.

        group: its `seqs` are extended by the new sequences, which note their news in its `news`.
        Returns the new sequences, in order. Raises ValueError for an id that is in use.
        """
        group = RequestGroup() if group is None else group
        try:
            with self.turns.take():
                self.check_open()
                self.parents.check_ids(requests)
                if self.ranks.world_size > 1:  # raise errors before the other ranks are told
                    json.dumps(requests)
                    self.make_sequences(requests)
                with self.on_all_ranks("add", requests) as requests:
                    return self.add_on_this_rank(requests, group)
        except BaseException:
            if group.seqs:
                self.abort(group.seqs)
            raise

    def add_on_this_rank(
        self, requests: list[Request], group: Call | RequestGroup | None = None
    ) -> list[Sequence]:
        """Queue requests on this rank alone. Return their sequences, in order."""
        seqs = self.make_sequences(requests)
        if group is not None:
            for seq in seqs:
                seq.news = group.news
            group.seqs.extend(seqs)  # before they are queued, so that an interrupt can abort them
        self.num_requests += len(requests)
        self.parents.add_parents_of(seqs)
        self.core.add(seqs)
        return seqs

    def make_sequences(self, requests: list[Request]) -> list[Sequence]:
        """Return the sequences of checked requests, in order, without queueing them."""
        seqs = []
        eos_ids, tokenizer = self.input_processor.eos_ids, self.tokenizer
        for number, request in enumerate(requests, start=self.num_requests):
            params = SamplingParams(**request["params"])
            stop_token_ids = frozenset(params.stop_token_ids or ())
            eos_id = getattr(tokenizer, "eos_token_id", None)
            seqs += fan_out(
                Sequence,
                **{**request, "params": params},
                stop_ids=(frozenset() if params.ignore_eos else eos_ids) | stop_token_ids,
                end_ids=eos_ids | stop_token_ids,
                eos_id=None if params.ignore_eos else eos_id,
                noise=(self.args.seed, number),
                make_detokenizer=partial(make_detokenizer, tokenizer),
            )
        return seqs

    def advance(self) -> list[Sequence]:
        """Run one step on every rank. Return the sequences that got a token or ended in it."""
        with self.on_all_ranks("step"):
            seqs = self.core.step()
            self.parents.forget_ended(seqs)
            return seqs

    def step(self) -> list[RequestOutput]:
        """Run one step. Return the state of each request that got a token, with all its answers."""
        with self.turns.take():
            firsts = dict.fromkeys(seq.siblings[0] for seq in self.advance())
            return read_texts(list(firsts), RequestOutput.of)

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Forget the keys and values of all prompts so far, unless requests are using them.

        Returns whether they are forgotten. Raises ValueError for the option True, because running
        requests are never preempted for this.
        """
        options = {"reset_running_requests": reset_running_requests}
        options["reset_connector"] = reset_connector
        check_options("reset_prefix_cache", options, vllm_defaults.RESET_PREFIX_CACHE)
        with self.on_all_ranks("reset_prefix_cache"):
            return self.block_manager.reset_prefix_cache()

    # -- requests --------------------------------------------------------------------------------

    def is_free(self, request: Request) -> bool:
        """Return whether no unfinished request uses this one's id, or an id of its sequences."""
        return not any(map(self.parents.is_in_use, ids_of(request)))

    def make_request(self, request_id: str, prompt: Any, params: SamplingParams | None) -> Request:
        """Check and tokenize one prompt, as `InputProcessor.make_request`."""
        return self.input_processor.make_request(request_id, prompt, params)

    def add_request(
        self, request_id: str, prompt: Any, params: SamplingParams, **options: Any
    ) -> str:
        """Check and queue one request. Return its id.

        options: those of vLLM's method, with its defaults.
        Raises TypeError or ValueError if the engine cannot honour the request.
        """
        check_options("add_request", options, vllm_defaults.ADD_REQUEST)
        self.add([self.make_request(request_id, prompt, params)])
        return request_id

    def abort_request(self, request_ids: str | list[str], internal: bool = False) -> None:
        """End requests before their time, with all their answers.

        Ids that are not running are ignored, and so is the id of a single answer.
        """
        check_options("abort_request", {"internal": internal}, vllm_defaults.ABORT_REQUEST)
        ids = [request_ids] if isinstance(request_ids, str) else request_ids
        if not (isinstance(ids, (list, tuple)) and all(isinstance(i, str) for i in ids)):
            raise TypeError(
                f"request_ids must be a str or a list of them, got {request_ids!r:.200}"
            )
        self.check_open()
        self.abort([seq for request_id in ids for seq in self.parents.sequences_of(request_id)])

    def has_unfinished_requests(self) -> bool:
        """Return whether a step has anything to do for requests that nobody has abandoned."""
        return self.get_num_unfinished_requests() > 0

    def get_num_unfinished_requests(self) -> int:
        """Return the number of unfinished requests that nobody has abandoned.

        As in vLLM, a request for several answers counts once for each unfinished answer.
        """
        abandoned_ids = self._unfinished_ids(self.abandoned.seqs)
        return 0 if self.closed else len(self.sequences) - len(set(abandoned_ids))

    @property
    def trace(self) -> list[StepRecord]:
        """A record of each of the last steps."""
        return list(self.core.trace)

    @property
    def tokenizer(self) -> Any:
        return self.input_processor.tokenizer

    @property
    def eos_ids(self) -> frozenset[int]:
        return self.input_processor.eos_ids

    def get_tokenizer(self) -> Any:
        """Return the tokenizer. Raises ValueError if the engine was told to load none."""
        return self.input_processor.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the parameters of a request that comes without any, as the caller's own copy."""
        return make_default_params(self.input_processor.default_params)


def make_backend(
    args: EngineArgs, device: torch.device, config: ModelConfig, store_kv: Any
) -> Backend:
    """Return the functions that compute a step. store_kv: a learner's store function, or None."""
    backend = choose_backend(args.attention_backend, device, config.head_dim, args.block_size)
    if args.enable_torch_compile:
        backend = compile_linears(backend)
    if store_kv is not None:
        store = partial(rope_store, store=store_kv)
        backend = replace(backend, rope_store=store, capturable=False)
    return backend
