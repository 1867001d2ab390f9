"""LLMEngine: vLLM's engine interface, which builds what the loop needs and keeps ranks in step.

It settles the arguments, loads the model, sizes the cache, turns prompts into sequences, and tells
the other ranks, before it does it itself, whatever it was asked to do.

Several threads may use one engine. One lock lets their calls in one at a time, and each step runs
the requests of all of them.
"""

import json
import os
import signal
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from nanovllm.checkpoint import weights
from nanovllm.checkpoint.config_json import read_model_config
from nanovllm.checkpoint.generation_config import make_default_params, read_generation_config
from nanovllm.checkpoint.hub import find_model
from nanovllm.checkpoint.tokenizer import load_tokenizer, tokenizer_errors
from nanovllm.config import EngineArgs
from nanovllm.distributed.consistency import check_facts, collect_facts
from nanovllm.distributed.launch import join_as_worker, join_torchrun, start_workers
from nanovllm.distributed.ranks import Ranks
from nanovllm.engine.adjustments import check_adjustments, encode_bad_words
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.core import EngineCore
from nanovllm.engine.memory import (
    count_blocks,
    graph_sizes,
    make_kv_cache,
    most_blocks,
    reserved_bytes,
)
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.parallel_sampling import ParentRequest, fan_out, ids_in_use
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.frontend.detokenizer import make_detokenizer
from nanovllm.inputs import parse_prompt
from nanovllm.layers.attention import rope_store
from nanovllm.layers.backend import choose_backend, compile_linears
from nanovllm.models.model_config import ModelConfig, check_tensor_parallel_size
from nanovllm.outputs import RequestOutput, StepRecord
from nanovllm.sampling_params import SamplingParams
from nanovllm.validation import (
    check_number,
    check_options,
    check_type,
    check_unicode,
    vllm_defaults,
)

Message = list[Any]  # a command, its payload, and the ids of abandoned requests
Request = dict[str, Any]  # the arguments of a Sequence, as rank 0 tells them to the others
WORKER_CODE = "from nanovllm.engine.llm_engine import run_worker; run_worker()"
GIVE_WAY_SECONDS = 1e-4  # enough for a thread that waits for a lock to wake up and take it


@dataclass(eq=False)
class NoCall:
    """Takes the place of a `nanovllm.llm.Call` where requests belong to none."""

    seqs: list[Sequence]
    news: None = None


class CallReference(weakref.ref):
    """A weak reference to a call that outlives the call and still knows its sequences.

    Python's collector may drop a call at any moment, also in the middle of a step. It then only
    appends this reference to `LLMEngine.abandoned`, and runs no other code.
    """

    __slots__ = ("seqs",)
    seqs: list[Sequence]


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
        self.closed = self._released = True  # until it stands
        check_type("engine_args", args, EngineArgs)
        args = replace(args)  # a checked copy: an attribute may have been set since the last check
        folder = find_model(args.model, args.revision)
        config = read_model_config(folder)
        check_tensor_parallel_size(config, args.tensor_parallel_size)
        self.ranks = ranks or Ranks()
        self.args = settled = resolve_args(args, config)
        self.device = torch.device(settled.device)
        config = replace(config, dtype=weights.resolve_dtype(args.dtype, config, self.device))
        self.model_config = config
        self.tokenizer = None if args.skip_tokenizer_init else load_tokenizer(args, folder)
        self.eos_ids, self.default_params = read_generation_config(
            folder, config, self.tokenizer, args
        )
        backend = choose_backend(
            args.attention_backend, self.device, config.head_dim, args.block_size
        )
        if args.enable_torch_compile:
            backend = compile_linears(backend)
        if store_kv is not None:
            store = partial(rope_store, store=store_kv)
            backend = replace(backend, rope_store=store, capturable=False)
        if ranks is None and args.tensor_parallel_size > 1:
            self.ranks = self._start_ranks(args)
        self.device = self.ranks.local_device(self.device)
        settled = replace(settled, device=str(self.device))
        try:
            check_facts(self.ranks, collect_facts(folder, config, settled))
            # What is sized by the longest request (the RoPE table, the rows of the persistent
            # batch) need not follow the config's positions where no cache could hold so many.
            capacity = most_blocks(config, settled, self.ranks) * args.block_size
            settled = replace(settled, max_model_len=min(settled.max_model_len, capacity))
            reserved = reserved_bytes(self.device)
            model = weights.load_model(folder, config, backend, self.ranks, settled)
            self.ranks.init_process_group(self.device)
            runner = ModelRunner(model, make_kv_cache(config, settled, self.ranks, 1), settled)
            num_blocks = count_blocks(runner, settled, reserved)
            runner.kv_cache = make_kv_cache(config, settled, self.ranks, num_blocks)
            self.max_model_len = resolve_max_model_len(args, settled, num_blocks)
            self.block_manager = block_manager_class(
                num_blocks, args.block_size, args.enable_prefix_caching
            )
            budget, chunked = settled.max_num_batched_tokens, args.enable_chunked_prefill
            scheduler = scheduler_class(self.block_manager, args.max_num_seqs, budget, chunked)
            runner.capture(graph_sizes(runner, settled))
            self.core = EngineCore(scheduler, runner, args.async_scheduling)
            self.ranks.use_step_timeout()
        except BaseException as error:
            self.ranks.monitor.report_error(error)
            self.ranks.close(kill=True)
            raise
        self.num_requests = 0  # ever added
        self.parents: dict[str, ParentRequest] = {}  # unfinished ones, by request id
        self.abandoned: deque[NoCall | CallReference] = deque()
        self._calls: set[CallReference] = set()
        # `lock` admits one thread at a time. `_acting` is held while a call is carried out: only
        # the same thread can find it held, when a signal handler or a destructor interrupts it.
        # Both are entered by `with` alone, which no Ctrl-C can separate from the release.
        self.lock, self._acting = threading.RLock(), threading.Lock()
        self._lined_up: set[int] = set()  # threads that wait for the lock
        self._turn = 0  # times that a thread has got it
        self._close_when_done = False
        self.closed = self._released = False

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, **options: Any) -> "LLMEngine":
        """Build an engine. vLLM's options of this method say who is asking and what to log."""
        check_options("from_engine_args", options, vllm_defaults.FROM_ENGINE_ARGS)
        return cls(engine_args)

    def _start_ranks(self, args: EngineArgs) -> Ranks:
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return start_workers(args.tensor_parallel_size, asdict(args), WORKER_CODE)
        LLMEngine._engines_under_torchrun += 1
        return join_torchrun(args.tensor_parallel_size, LLMEngine._engines_under_torchrun)

    # -- threads ---------------------------------------------------------------------------------

    def line_up(self) -> None:
        """Call this before taking the lock: it lets a thread that already waits go first.

        Python's locks are not fair. A thread that runs one step after the other would release the
        lock and have it again before any other thread has woken up. (This is only a courtesy. It
        ends after a millisecond, in case the other thread was interrupted and has gone.)
        """
        me, turn = threading.get_ident(), self._turn
        for _ in range(10):
            if self._turn != turn or not self._lined_up - {me}:
                break
            time.sleep(GIVE_WAY_SECONDS)
        self._lined_up.add(me)

    def leave_line(self) -> None:
        """Call this when you have got the lock."""
        self._turn += 1
        self._lined_up.discard(threading.get_ident())

    def watch(self, call: Any) -> None:
        """Abort the unfinished sequences of `call.seqs` once the call has no references left."""
        reference = CallReference(call, self.abandoned.append)
        reference.seqs = call.seqs
        self._calls.add(reference)

    # -- requests --------------------------------------------------------------------------------

    @property
    def sequences(self) -> dict[str, Sequence]:
        """The unfinished sequences by request id, in order of arrival."""
        return self.core.scheduler.requests

    def is_free(self, request: Request) -> bool:
        """Whether no unfinished request uses the id of this one, or an id of its sequences."""
        return not any(map(self._is_taken, ids_in_use(request)))

    def _is_taken(self, request_id: str) -> bool:
        return request_id in self.sequences or self._is_unfinished(self.parents.get(request_id))

    def _is_unfinished(self, parent: ParentRequest | None) -> bool:
        found = self.sequences
        return parent is not None and any(found.get(s.request_id) is s for s in parent.children)

    def make_request(self, request_id: str, prompt: Any, params: SamplingParams | None) -> Request:
        """Check one prompt (text, token ids, or vLLM's dict of either) and its parameters."""
        check_type("request_id", request_id, str)
        params = self.get_default_sampling_params() if params is None else params
        check_type("sampling_params", params, SamplingParams)
        params = replace(params)  # a checked copy: the caller's object stays the caller's
        if self.tokenizer is None and params.stop:
            raise ValueError(f"stop={params.stop!r} needs a tokenizer (skip_tokenizer_init)")
        bad_word_ids = self._check_adjustments(params)
        text, token_ids = self._tokenize(prompt)
        room = self.max_model_len - len(token_ids)
        if not token_ids or room < 1:
            raise ValueError(
                f"a prompt has 1 to {self.max_model_len - 1} tokens, since it must leave room for "
                f"one more in max_model_len={self.max_model_len}; got {len(token_ids)}"
            )
        last = self.model_config.vocab_size - 1
        plain = set(map(type, token_ids)) == {int}
        if not (plain and 0 <= min(token_ids) <= max(token_ids) <= last):
            for token_id in token_ids:  # one by one, to name it
                check_number("every prompt token id", token_id, 0, last)
        return {
            "request_id": request_id,
            "prompt": text,
            "token_ids": token_ids,
            "params": asdict(params),
            "bad_word_ids": bad_word_ids,
            "max_length": len(token_ids) + min(params.max_tokens or room, room),
        }

    def _check_adjustments(self, params: SamplingParams) -> list[list[int]]:
        """Check token ids against the vocabulary; the token ids of the bad words."""
        if params.bad_words and self.tokenizer is None:
            raise ValueError(
                f"bad_words={params.bad_words!r} needs a tokenizer (skip_tokenizer_init)"
            )
        vocab_size = self.model_config.vocab_size
        encode = partial(self.encode, add_special_tokens=False)
        bad_word_ids = encode_bad_words(params.bad_words, encode, vocab_size)
        end_ids = self.eos_ids.union(params.stop_token_ids)
        check_adjustments(params, bad_word_ids, end_ids, vocab_size)
        return bad_word_ids

    def _tokenize(self, prompt: Any) -> tuple[str | None, list[int]]:
        prompt = parse_prompt(prompt)
        text, token_ids = prompt["prompt"], prompt["prompt_token_ids"]
        if text is not None:
            check_type("prompt", text, str)
            check_unicode("prompt", text)
        if token_ids is None and text is not None:
            token_ids = self.encode(text)
        if not isinstance(token_ids, (list, tuple)):
            raise TypeError(f"a prompt is a str, token ids, or a dict of one, got {prompt!r:.80}")
        return text, list(token_ids)

    def encode(self, text: str, **options: Any) -> list[int]:
        """The token ids of a text; options are those of the tokenizer's own `encode`."""
        tokenizer = self.get_tokenizer()
        with tokenizer_errors(getattr(tokenizer, "name_or_path", "")):
            return tokenizer.encode(text, **options)

    def add(self, requests: list[Request], call: Any = None) -> list[Sequence]:
        """Queue requests that `make_request` has checked, on every rank: all of them or none.

        call: its `seqs` are extended by the new sequences, which report to its `news`.
        """
        call = call or NoCall([])
        try:
            self.line_up()
            with self.lock:
                self.leave_line()
                self.check_open()
                self._check_names(requests)
                if self.ranks.world_size > 1:  # an error must come before the other ranks are told
                    json.dumps(requests)
                    self._make_sequences(requests)
                return self._on_all_ranks("add", requests, call)
        except BaseException:
            if call.seqs:
                self.abort(call.seqs)
            raise

    def _check_names(self, requests: list[Request]) -> None:
        counts = Counter(name for request in requests for name in ids_in_use(request))
        for request in requests:
            for name in ids_in_use(request):
                if counts[name] > 1 or self._is_taken(name):
                    own = request["request_id"]
                    why = "" if name == own else f": one of its answers would be {name!r}, which"
                    raise ValueError(f"request_id={own!r}{why} is already in use")

    def _make_sequences(self, requests: list[Request]) -> list[Sequence]:
        seqs = []
        for number, request in enumerate(requests, start=self.num_requests):
            params = SamplingParams(**request["params"])
            eos_ids = frozenset() if params.ignore_eos else self.eos_ids
            seqs += fan_out(
                **{**request, "params": params},
                stop_ids=eos_ids.union(params.stop_token_ids),
                end_ids=self.eos_ids.union(params.stop_token_ids),
                eos_id=None if params.ignore_eos else getattr(self.tokenizer, "eos_token_id", None),
                noise=(self.args.seed, number),
                make_detokenizer=partial(make_detokenizer, self.tokenizer),
            )
        return seqs

    def _apply_add(self, requests: list[Request], call: Any = None) -> list[Sequence]:
        seqs = self._make_sequences(requests)
        if call is not None:
            for seq in seqs:
                seq.news = call.news
            call.seqs.extend(seqs)  # before they are queued: what `seqs` names can be aborted
        self.num_requests += len(requests)
        self.parents |= {seq.parent.request_id: seq.parent for seq in seqs if seq.parent}
        self.core.add(seqs)
        return seqs

    def add_request(
        self, request_id: str, prompt: Any, params: SamplingParams, **options: Any
    ) -> str:
        """Check and queue one request; ValueError or TypeError if it cannot be honoured.

        options: those of vLLM's method, with its defaults. Returns the request's id.
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
        self.abort([seq for request_id in ids for seq in self._sequences_of(request_id)])

    def _sequences_of(self, request_id: str) -> list[Sequence]:
        """The sequences of the request that its caller named so. Some may have ended."""
        parent, seq = self.parents.get(request_id), self.sequences.get(request_id)
        alone = [seq] if seq is not None and seq.parent is None else []
        return [*parent.children, *alone] if parent else alone

    def abort(self, seqs: list[Sequence]) -> None:
        """End those of the sequences that are unfinished. An engine that is closed has none.

        From within a step (in a destructor, or in a signal handler) this only makes a note.
        """
        self.line_up()
        with self.lock:
            self.leave_line()
            if self._acting.locked():
                self.abandoned.append(NoCall(seqs))
            elif ids := self._unfinished_ids(seqs):
                self._on_all_ranks("abort", ids)

    def _unfinished_ids(self, seqs: Iterable[Sequence]) -> list[str]:
        """The ids of those that are unfinished; not of others that have taken over their ids."""
        found = self.sequences
        return [seq.request_id for seq in seqs if found.get(seq.request_id) is seq]

    def _apply_abort(self, request_ids: list[str]) -> None:
        seqs = [self.sequences[i] for i in request_ids if i in self.sequences]
        self.core.abort(seqs)
        self._forget_ended_parents(seqs)

    def _forget_ended_parents(self, seqs: list[Sequence]) -> None:
        """Forget the parents of sequences that have ended, if no answer of theirs is unfinished.

        An interrupt may leave an ended parent behind. That is harmless, because a name is in use
        only while a sequence is, and it lasts only until the engine has nothing to do.
        """
        for parent in {seq.parent for seq in seqs if seq.parent and seq.is_finished}:
            if self.parents.get(parent.request_id) is parent and not self._is_unfinished(parent):
                del self.parents[parent.request_id]
        if not self.sequences:
            self.parents.clear()

    def has_unfinished_requests(self) -> bool:
        """Whether a step has anything to do for requests that nobody has abandoned."""
        return self.get_num_unfinished_requests() > 0

    def get_num_unfinished_requests(self) -> int:
        """The number of unfinished requests that nobody has abandoned.

        As in vLLM, a request for several answers counts once for each unfinished answer.
        """
        seqs = (seq for noted in list(self.abandoned) for seq in noted.seqs)
        return 0 if self.closed else len(self.sequences) - len(set(self._unfinished_ids(seqs)))

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Forget the keys and values of all prompts so far. False if requests are using them.

        Raises ValueError for True, because running requests are never preempted for this.
        """
        options = {"reset_running_requests": reset_running_requests}
        options["reset_connector"] = reset_connector
        check_options("reset_prefix_cache", options, vllm_defaults.RESET_PREFIX_CACHE)
        self.line_up()
        with self.lock:
            self.leave_line()
            self.check_open()
            return self._on_all_ranks("reset_prefix_cache", None)

    def _apply_reset_prefix_cache(self, _: None) -> bool:
        return self.block_manager.reset_prefix_cache()

    # -- steps -----------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Run one step; the state of every request that got a token in it, with all its answers."""
        self.line_up()
        with self.lock:
            self.leave_line()
            firsts = dict.fromkeys(seq.siblings[0] for seq in self.run_step())
            return read_texts(list(firsts), RequestOutput.of)

    def advance(self) -> list[Sequence]:
        """As `step`, without making outputs."""
        self.line_up()
        with self.lock:
            self.leave_line()
            return self.run_step()

    def run_step(self) -> list[Sequence]:
        """As `advance`, for a thread that already holds the lock."""
        self.check_open()
        return self._on_all_ranks("step", None)

    def _apply_step(self, _: None) -> list[Sequence]:
        seqs = self.core.step() if self.core.has_work else []
        self._forget_ended_parents(seqs)
        return seqs

    def _on_all_ranks(self, command: str, payload: Any, *own: Any) -> Any:
        """Do what rank 0 was asked to do, on every rank alike. The caller holds the lock.

        own: further arguments that only this rank has.
        """
        if self._acting.locked():
            raise RuntimeError(
                f"this engine was asked to {command} from within another call of the same thread "
                f"(by a signal handler or a destructor); ask it when that call has returned"
            )
        with self._acting:
            try:
                return self._share_and_act(command, payload, *own)
            except BaseException as error:
                if self.ranks.world_size > 1:  # ranks may now differ: this engine cannot go on
                    try:
                        if isinstance(error, RuntimeError):
                            # If another rank has failed, that is the cause.
                            self.ranks.monitor.check_workers()
                            self.ranks.monitor.check_errors()
                    finally:
                        self._release(kill=True)
                raise
            finally:
                if self._close_when_done:
                    self._close()

    def _share_and_act(self, command: str, payload: Any, *own: Any) -> Any:
        """Every message also carries the ids of the requests that were abandoned meanwhile."""
        noted = list(self.abandoned)
        ids = self._unfinished_ids(seq for item in noted for seq in item.seqs)
        theirs, payload, ids = self.ranks.broadcast([command, payload, ids])
        if theirs != command:
            raise RuntimeError(
                f"rank {self.ranks.rank} was asked to {command} while rank 0 was asked to "
                f"{theirs}: under torchrun every rank must make the same calls"
            )
        result = self.act([command, payload, ids], *own)
        for item in noted:  # not before: if this is interrupted, the next call sees them again
            self._calls.discard(item)
            self.abandoned.popleft()
        return result

    def act(self, message: Message, *own: Any) -> Any:
        """Carry out one of rank 0's messages on this rank."""
        command, payload, abandoned_ids = message
        if abandoned_ids:
            self._apply_abort(abandoned_ids)
        return getattr(self, f"_apply_{command}")(payload, *own)

    # -- the end ---------------------------------------------------------------------------------

    @property
    def trace(self) -> list[StepRecord]:
        return list(self.core.trace)

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters of a request that comes without any. The object is the caller's own."""
        return make_default_params(self.default_params)

    def get_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError("skip_tokenizer_init=True: no tokenizer, prompts must be token ids")
        return self.tokenizer

    def check_open(self) -> None:
        if self.closed:
            raise RuntimeError("this engine is closed: nothing more can be asked of it")

    def close(self) -> None:
        """Give back all memory and end the other ranks. May be called again.

        Another thread's step ends first; threads that wait for answers get a RuntimeError. From
        within a step (in a destructor, or in a signal handler) the engine closes after that step.
        """
        if self._released:
            return
        self.line_up()
        with self.lock:
            self.leave_line()
            if self._acting.locked():
                self._close_when_done = True
            else:
                self._close()

    def _close(self) -> None:
        if self._released:
            return
        try:
            if not self.closed:
                for seq in self.sequences.values():
                    seq.news = None  # its caller gets an error in place of news
                self.core.abort(list(self.sequences.values()))
                if self.ranks.rank == 0:
                    self.ranks.broadcast(["close", None, []])
        except RuntimeError:  # a rank is gone already
            pass
        finally:
            self._release(kill=self.closed)

    def _release(self, kill: bool) -> None:
        """End all that is unfinished. If this is interrupted, `close` calls it again."""
        self.closed = True
        for seq in list(self.sequences.values()):
            seq.news = None
            seq.finish("abort")
        self.sequences.clear()
        self.parents.clear()
        self.core.launched.clear()
        graphs = self.core.runner.graphs if self.core.runner else None
        self.ranks.close(kill, graphs)
        self.core.runner = None
        self._released = True


def read_texts(seqs: list[Sequence], read: Callable[[Sequence], Any]) -> list[Any]:
    """read(seq) of each. If reading is interrupted, the texts of their requests are made anew."""
    try:
        return [read(seq) for seq in seqs]
    except BaseException:
        for seq in seqs:
            for sibling in seq.siblings:
                sibling.read_again()
        raise


def resolve_args(args: EngineArgs, config: ModelConfig) -> EngineArgs:
    """The arguments with nothing left open that the model or the machine decides."""
    cuda = torch.cuda.is_available()
    device = ("cuda" if cuda else "cpu") if args.device == "auto" else args.device
    if device != "cpu" and not (cuda and device.partition(":")[0] == "cuda"):
        raise ValueError(f"device={device!r} is not usable here; try 'cpu' or 'auto'")
    limit = config.derived_max_model_len
    length = args.max_model_len or limit
    if length > limit:
        raise ValueError(f"max_model_len={length} is over the model's limit of {limit} positions")
    usual, least = 512 if device == "cpu" else 16_384, 1 if args.enable_chunked_prefill else length
    budget = args.max_num_batched_tokens or max(usual, least)
    if budget < least:
        raise ValueError(
            f"max_num_batched_tokens={budget} must be at least max_model_len={length} with "
            f"enable_chunked_prefill=False"
        )
    return replace(args, device=device, max_model_len=length, max_num_batched_tokens=budget)


def resolve_max_model_len(args: EngineArgs, settled: EngineArgs, num_blocks: int) -> int:
    """Tokens a request may have. It must fit in the cache alone, so that it can always end."""
    capacity = num_blocks * args.block_size
    if args.max_model_len is not None and args.max_model_len > capacity:
        raise ValueError(
            f"max_model_len={args.max_model_len} does not fit in the KV cache of {capacity} "
            f"tokens; lower it, or give the cache more blocks (num_gpu_blocks_override)"
        )
    return min(settled.max_model_len, capacity)


def run_worker() -> None:
    """A rank that another engine started: do what rank 0 says until it says close, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, rank 0 too
    ranks, settings = join_as_worker()
    engine = LLMEngine(EngineArgs(**settings), ranks=ranks)
    try:
        while True:
            message = ranks.broadcast(None)
            if message[0] == "close":
                return
            engine.act(message)
    except torch.distributed.DistError:  # rank 0 is gone
        sys.exit(1)
    except BaseException as error:
        ranks.monitor.report_error(error)
        raise
    finally:
        engine._release(kill=False)
