"""The engine: the loop that plans, runs and takes in steps, and vLLM's LLMEngine around it.

`EngineCore` is the loop on one rank, twice. The plain loop runs a step to its end before it plans
the next. The overlapped loop plans and launches step N+1 while N is still running, so that the
device never waits for the host; only then does it read N's tokens. `LLMEngine` builds what the loop
needs (model, cache, scheduler), turns prompts into sequences, and keeps all ranks in step.
"""

import os
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import xxhash

from nanovllm.config import EngineArgs
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.model_runner import ModelRunner, PendingTokens, allocate_kv_cache
from nanovllm.engine.scheduler import ScheduledBatch, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.model.loader import choose_dtype, find_model, load_model, load_tokenizer, stop_ids_of
from nanovllm.model.model_config import ModelConfig
from nanovllm.model.parallel import Ranks, check_divisible
from nanovllm.ops.attention import choose_backend
from nanovllm.outputs import RequestOutput, StepRecord
from nanovllm.sampling_params import SamplingParams
from nanovllm.validation import check_number, check_type

TRACE_LENGTH = 100_000  # steps remembered


@dataclass
class LaunchedStep:
    batch: ScheduledBatch
    start_time: float
    num_free_blocks: int
    tokens: PendingTokens | None = None  # None: the launch has not succeeded


class EngineCore:
    """The loop: scheduler and model runner, a step at a time."""

    def __init__(self, scheduler: Scheduler, runner: ModelRunner, async_scheduling: bool = True):
        self.scheduler = scheduler
        self.runner = runner
        self.async_scheduling = async_scheduling
        self.launched: deque[LaunchedStep] = deque()  # planned, tokens not yet read
        self.trace: deque[StepRecord] = deque(maxlen=TRACE_LENGTH)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self.launched)

    def step(self) -> list[Sequence]:
        """Advance by one step; the sequences that got a token. A failed step is undone, and raises.

        After a failure nothing is lost: the same sequences wait to be run again, or aborted.
        """
        try:
            updated = self.overlapped_step() if self.async_scheduling else self.plain_step()
            return updated if self.scheduler.has_work else updated + self.drain()
        except BaseException:
            self.scheduler.roll_back([step.batch for step in self.launched])
            self.launched.clear()
            raise

    def plain_step(self) -> list[Sequence]:
        self._launch(self.scheduler.schedule())
        return self._take_in()

    def overlapped_step(self) -> list[Sequence]:
        had_one = bool(self.launched)
        self._launch(self.scheduler.schedule())  # step N+1 is launched ...
        return self._take_in() if had_one else []  # ... before step N's tokens are read

    def drain(self) -> list[Sequence]:
        """Take in every launched step."""
        updated = []
        while self.launched:
            updated += self._take_in()
        return updated

    def abort(self, seqs: list[Sequence]) -> None:
        for seq in seqs:
            self.scheduler.abort(seq)
        if not self.scheduler.has_work:
            self.drain()

    def _launch(self, batch: ScheduledBatch) -> None:
        if not batch.rows:
            return
        free = self.scheduler.block_manager.num_free_blocks
        step = LaunchedStep(batch, time.perf_counter(), free)
        self.launched.append(step)
        step.tokens = self.runner.launch(batch)

    def _take_in(self) -> list[Sequence]:
        """Read the oldest launched step's tokens and hand them to the scheduler."""
        if not self.launched:
            return []
        step = self.launched[0]
        token_ids = step.tokens.read()
        self.launched.popleft()
        updated = self.scheduler.update(step.batch, token_ids)
        self._record(step)
        return updated

    def _record(self, step: LaunchedStep) -> None:
        self.trace.append(
            StepRecord(
                start_time=step.start_time,
                end_time=time.perf_counter(),
                rows=tuple((r.seq.request_id, r.start, r.num_tokens) for r in step.batch.rows),
                num_running=len(self.scheduler.running),
                num_waiting=len(self.scheduler.waiting),
                num_free_blocks=step.num_free_blocks,
            )
        )


@dataclass(frozen=True)
class Request:
    """A checked request, as rank 0 tells it to the others."""

    request_id: str
    prompt: str | None
    token_ids: list[int]
    params: SamplingParams
    seed: int


class LLMEngine:
    """vLLM's engine interface: requests in, steps, outputs.

    A learner's own BlockManager or Scheduler class, or store function, may take the place of the
    engine's (one rank only).
    """

    _engines_under_torchrun = 0

    def __init__(
        self,
        args: EngineArgs,
        *,
        ranks: Ranks | None = None,
        block_manager_class: type = BlockManager,
        scheduler_class: type = Scheduler,
        store_kv: Any = None,
    ):
        self.args = args
        self.closed = True  # until it stands
        self.device = choose_device(args.device)
        folder = find_model(args.model, args.revision)
        self.model_config = config = ModelConfig.from_folder(folder)
        check_divisible(config, args.tensor_parallel_size)
        self.max_model_len = self._longest(config)
        self.max_num_batched_tokens = self._token_budget()
        self.tokenizer = None if args.skip_tokenizer_init else load_tokenizer(args, folder)
        self.eos_ids, self.default_params = stop_ids_of(folder, config, self.tokenizer)
        backend = choose_backend(args.attention_backend, self.device)
        if store_kv is not None:
            backend = replace(backend, store_kv=store_kv)
        dtype = choose_dtype(args.dtype, config, self.device)
        self.ranks = ranks or self._start_ranks()
        try:
            model = load_model(
                folder,
                config,
                backend,
                self.ranks,
                self.max_model_len,
                dtype,
                self.device,
                args.use_tqdm_on_load,
            )
            self.ranks.connect()
            kv_cache = allocate_kv_cache(
                config, args, self.ranks, self.max_model_len, dtype, self.device
            )
            self._fit_max_model_len(kv_cache.shape[2] * args.block_size)
            self.block_manager = block_manager_class(
                kv_cache.shape[2], args.block_size, args.enable_prefix_caching
            )
            scheduler = scheduler_class(
                self.block_manager,
                args.max_num_seqs,
                self.max_num_batched_tokens,
                args.enable_chunked_prefill,
            )
            runner = ModelRunner(model, kv_cache, self.ranks, config.vocab_size)
            self.core = EngineCore(scheduler, runner, args.async_scheduling)
        except BaseException:
            self.ranks.close(kill=True)
            raise
        self.sequences: dict[str, Sequence] = {}  # unfinished, by request id
        self.num_requests = 0
        self.closed = False

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> "LLMEngine":
        return cls(engine_args)

    def _start_ranks(self) -> Ranks:
        size = self.args.tensor_parallel_size
        if size == 1:
            return Ranks()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            LLMEngine._engines_under_torchrun += 1
            return Ranks.from_torchrun(size, LLMEngine._engines_under_torchrun)
        return Ranks.start_workers(size, asdict(self.args))

    def _longest(self, config: ModelConfig) -> int:
        asked, limit = self.args.max_model_len, config.max_position_embeddings
        if asked is not None and asked > limit:
            raise ValueError(
                f"max_model_len={asked} is over the model's limit of {limit} positions"
            )
        return asked or limit

    def _token_budget(self) -> int:
        budget = self.args.max_num_batched_tokens or (512 if self.device.type == "cpu" else 16384)
        if self.args.enable_chunked_prefill or budget >= self.max_model_len:
            return budget
        if self.args.max_num_batched_tokens is None:
            return self.max_model_len
        raise ValueError(
            f"max_num_batched_tokens={budget} must be at least max_model_len="
            f"{self.max_model_len} with enable_chunked_prefill=False"
        )

    def _fit_max_model_len(self, capacity: int) -> None:
        """A request as long as max_model_len must fit in the cache alone, so it can always end."""
        if self.args.max_model_len is not None and self.max_model_len > capacity:
            raise ValueError(
                f"max_model_len={self.max_model_len} does not fit in the KV cache of {capacity} "
                f"tokens; lower it, or give the cache more blocks (num_gpu_blocks_override)"
            )
        self.max_model_len = min(self.max_model_len, capacity)

    # -- requests --------------------------------------------------------------------------------

    def make_request(self, request_id: str, prompt: Any, params: SamplingParams | None) -> Request:
        """Check one prompt (text, token ids, or vLLM's dict of either) and its parameters."""
        check_type("request_id", request_id, str)
        if params is None:
            params = SamplingParams(**self.default_params)
        check_type("sampling_params", params, SamplingParams)
        params = replace(params)  # a checked copy: the caller's object stays the caller's
        if self.tokenizer is None and params.stop:
            raise ValueError(f"stop={params.stop!r} needs a tokenizer (skip_tokenizer_init)")
        text, token_ids = self._tokenize(prompt)
        self._check_ids(token_ids)
        ordinal = self.num_requests
        self.num_requests += 1
        seed = params.seed
        if seed is None:  # of the engine's seed and the request's number: equal prompts differ
            digest = xxhash.xxh3_64_digest(f"{self.args.seed} {ordinal}".encode())
            seed = int.from_bytes(digest, "little", signed=True)
        return Request(request_id, text, token_ids, params, seed)

    def _tokenize(self, prompt: Any) -> tuple[str | None, list[int]]:
        if isinstance(prompt, dict):
            known = [key for key in ("prompt_token_ids", "prompt") if prompt.get(key) is not None]
            if not known or set(prompt) - {"prompt_token_ids", "prompt"}:
                raise ValueError(
                    f"a prompt dict has 'prompt' or 'prompt_token_ids', got keys {list(prompt)}"
                )
            if known[0] == "prompt_token_ids":
                return prompt.get("prompt"), list(prompt["prompt_token_ids"])
            prompt = prompt["prompt"]
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("with skip_tokenizer_init=True prompts must be token ids")
            return prompt, self.tokenizer.encode(prompt)
        if isinstance(prompt, (list, tuple)):
            return None, list(prompt)
        raise TypeError(
            f"a prompt must be a str, a list of token ids or a dict, got {prompt!r:.80}"
        )

    def _check_ids(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise ValueError("the prompt is empty: at least one token is needed")
        if len(token_ids) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(token_ids)} tokens; with one to generate, at most "
                f"{self.max_model_len - 1} fit in max_model_len={self.max_model_len}"
            )
        for token_id in token_ids:
            check_number("every prompt token id", token_id, 0, self.model_config.vocab_size - 1)

    def add(self, requests: list[Request]) -> list[Sequence]:
        """Queue checked requests, on every rank."""
        self._check_open()
        taken = [request.request_id for request in requests]
        for request_id in taken:
            if request_id in self.sequences or taken.count(request_id) > 1:
                raise ValueError(f"request_id={request_id!r} is already in use")
        return self._on_all_ranks("add", [asdict(request) for request in requests])

    def _apply_add(self, requests: list[dict]) -> list[Sequence]:
        seqs = [self._sequence(**request) for request in requests]
        for seq in seqs:
            self.sequences[seq.request_id] = seq
            self.core.scheduler.add(seq)
        return seqs

    def _sequence(
        self, request_id: str, prompt: str | None, token_ids: list[int], params: dict, seed: int
    ) -> Sequence:
        checked = SamplingParams(**params)
        stop_ids = frozenset(checked.stop_token_ids) | (
            frozenset() if checked.ignore_eos else self.eos_ids
        )
        room = self.max_model_len - len(token_ids)
        max_length = len(token_ids) + min(checked.max_tokens or room, room)
        wants_text = checked.detokenize and self.tokenizer is not None
        detokenizer = Detokenizer(self.tokenizer, checked) if wants_text else None
        return Sequence(
            request_id, prompt, list(token_ids), checked, stop_ids, max_length, seed, detokenizer
        )

    def add_request(self, request_id: str, prompt: Any, params: SamplingParams) -> None:
        """Check and queue one request; ValueError or TypeError if it cannot be honoured."""
        self.add([self.make_request(request_id, prompt, params)])

    def abort_request(self, request_id: str | list[str]) -> None:
        """End requests before their time; ids that are not running are ignored."""
        self._check_open()
        self._on_all_ranks("abort", [request_id] if isinstance(request_id, str) else request_id)

    def _apply_abort(self, request_ids: list[str]) -> None:
        known = [self.sequences.pop(i) for i in request_ids if i in self.sequences]
        self.core.abort(known)

    def has_unfinished_requests(self) -> bool:
        return not self.closed and self.core.has_work

    # -- steps -----------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Run one step; the state of every request that got a token in it."""
        return [RequestOutput.of(seq) for seq in self.advance()]

    def advance(self) -> list[Sequence]:
        """As `step`, without making outputs."""
        self._check_open()
        return self._on_all_ranks("step", None)

    def _apply_step(self, _: None) -> list[Sequence]:
        updated = self.core.step() if self.core.has_work else []
        for seq in updated:
            if seq.is_finished:
                self.sequences.pop(seq.request_id, None)
        return updated

    def _on_all_ranks(self, command: str, payload: Any) -> Any:
        """Do what rank 0 was asked to do, on every rank alike."""
        try:
            theirs, payload = self.ranks.share([command, payload])
            if theirs != command:
                raise RuntimeError(
                    f"rank {self.ranks.rank} was asked to {command} while rank 0 was asked to "
                    f"{theirs}: under torchrun every rank must make the same calls"
                )
            return getattr(self, f"_apply_{command}")(payload)
        except BaseException:
            if self.ranks.size > 1:  # ranks may now differ: this engine cannot go on
                self._release(kill=True)
            raise

    # -- the end ---------------------------------------------------------------------------------

    @property
    def trace(self) -> list[StepRecord]:
        return list(self.core.trace)

    def get_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError("this engine has no tokenizer (skip_tokenizer_init=True)")
        return self.tokenizer

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError("this engine is closed")

    def close(self) -> None:
        """Give back all memory and end the other ranks. May be called again."""
        if self.closed:
            return
        try:
            self.core.abort(list(self.sequences.values()))
            if self.ranks.rank == 0:
                self.ranks.share(["close", None])
        except RuntimeError:  # a rank is gone already
            pass
        finally:
            self._release(kill=False)

    def _release(self, kill: bool) -> None:
        self.closed = True
        for seq in self.sequences.values():
            seq.finish("abort")
        self.sequences.clear()
        self.core.launched.clear()
        self.core.runner = None
        self.ranks.close(kill)


def choose_device(device: str) -> torch.device:
    """The device asked for; "auto": a usable GPU, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device={device!r} is not usable here; try 'cpu' or 'auto'")
    return torch.device(device)


def run_worker() -> None:
    """A rank that another engine started: do what rank 0 says until it says close, or is gone."""
    port, rank, size = map(int, sys.argv[1:])
    ranks = Ranks.join(port, rank, size)
    args = EngineArgs(**ranks.settings())
    engine = LLMEngine(args, ranks=ranks)
    try:
        while True:
            command, payload = ranks.share(None)
            if command == "close":
                return
            getattr(engine, f"_apply_{command}")(payload)
    except torch.distributed.DistError:  # rank 0 is gone
        sys.exit(1)
    except KeyboardInterrupt:  # Ctrl-C reaches the whole group; rank 0 reports it
        sys.exit(130)
