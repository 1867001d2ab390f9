"""Which lesson ends in which file of the engine, and which functions a learner must understand.

Each file of the engine has one lesson, in which its subject is explained, or it is off the path.
tests/authoring/test_size.py checks that the first two tables and the folder agree. The last table
lists the functions that a learner must understand, some of which are in files off the path.
"""

FILES_OF_LESSON: dict[str, tuple[str, ...]] = {
    "00_tour": (
        "llm.py",
        "config.py",
        "outputs.py",
    ),
    "01_naive_generate": (
        "sampling_params.py",
        "models/model_config.py",
        "models/decoder.py",
        "layers/functional.py",
        "layers/norm.py",
        "layers/rope.py",
        "layers/sampler.py",
    ),
    "02_kv_cache": (),  # previews layers/attention.py, which lesson 03 completes
    "03_paged_blocks": ("layers/attention.py", "metadata.py"),
    "04_prefix_hashing": ("engine/block_manager.py",),
    "05_scheduler": ("engine/sequence.py", "engine/waiting_queue.py", "engine/scheduler.py"),
    "06_triton_kernels": (
        "kernels/store.py",
        "kernels/decode_attention.py",
        "layers/backend.py",
    ),
    "07_cuda_graphs": (
        "engine/input_batch.py",
        "engine/cuda_graphs.py",
        "engine/model_runner.py",
        "engine/memory.py",
        "engine/core.py",
    ),
    "08_tensor_parallelism": (
        "distributed/ranks.py",
        "layers/linear.py",
        "engine/llm_engine.py",
    ),
    "09_the_ladder": (),  # measures all of them together
}

# These files are the subject of no lesson, and a first reader need not open them. `PATH` lists
# the few functions of theirs through which every request passes.
OFF_THE_PATH: tuple[str, ...] = (
    # They read a checkpoint's files, and turn ids into text.
    "checkpoint/config_json.py",
    "checkpoint/generation_config.py",
    "checkpoint/hub.py",
    "checkpoint/safetensors_files.py",
    "checkpoint/tokenizer.py",
    "checkpoint/weights.py",
    "frontend/detokenizer.py",
    # They refuse what the engine cannot honour, and let scripts that were written for vLLM run.
    "validation/checks.py",
    "validation/fields.py",
    "validation/unsupported.py",
    "validation/vllm_defaults.py",
    "frontend/chat.py",
    "frontend/input_processor.py",
    # Several threads may call one engine, and a caller may leave before the answer has come.
    "frontend/streaming.py",
    "frontend/turns.py",
    "engine/commands.py",
    "inputs.py",
    "utils/argparse_utils.py",
    "entrypoints/llm.py",
    "engine/arg_utils.py",
    # They start and end the processes of the ranks, and notice when one fails.
    "engine/worker.py",
    "distributed/cleanup.py",
    "distributed/consistency.py",
    "distributed/launch.py",
    "distributed/monitor.py",
    "distributed/python_command.py",
    "distributed/signed_store.py",
    # A request may ask for several answers, for log probabilities, and for adjusted logits.
    "frontend/parallel_sampling.py",
    "logprobs.py",
    "layers/logprobs.py",
    "engine/logprobs.py",
    "engine/output_logprobs.py",
    "engine/prompt_logprobs.py",
    "layers/adjustments.py",
    "engine/adjustments.py",
    # The kernels that lesson 06 does not show.
    "kernels/adjustments.py",
    "kernels/decode_plan.py",
    "kernels/device_functions.py",
    "kernels/filters.py",
    "kernels/flash_attention.py",
    "kernels/gpu_limits.py",
    "kernels/linear.py",
    "kernels/logprobs.py",
    "kernels/prefill_attention.py",
    "kernels/sampling.py",
)

# The functions that a learner of lessons 00 to 09 must understand, by lesson and file. They are all
# functions of engine/, models/ and layers/ that a default `generate` runs on a CPU, and what the
# lessons show of the kernels, the CUDA graphs and the ranks. `python -m authoring.reading_path`
# counts their lines.
PATH: dict[str, dict[str, tuple[str, ...]]] = {
    "00_tour": {},
    "01_naive_generate": {
        "layers/functional.py": (
            "linear",
            "linear_add",
            "norm_linear",
            "norm_swiglu",
        ),
        "layers/norm.py": ("RMSNorm.forward",),
        "layers/rope.py": ("apply_rope",),
        "layers/sampler.py": (
            "add_noise",
            "checked_argmax",
            "divisors",
            "draw",
            "gumbel_noise",
            "log_of",
            "philox",
            "sample",
        ),
        "models/decoder.py": (
            "Attention.forward",
            "Decoder.compute_logits",
            "Decoder.forward",
            "DecoderLayer.forward",
        ),
    },
    "02_kv_cache": {},
    "03_paged_blocks": {
        "layers/attention.py": (
            "compute_slots",
            "decode_attention",
            "DecodeMetadata.length_groups",
            "gather_kv",
            "group_by_length",
            "masked_attention",
            "plan_decode",
            "prefill_attention",
            "prefill_chunk",
            "rope_store",
            "store_kv",
        ),
    },
    "04_prefix_hashing": {
        "engine/block_manager.py": (
            "BlockManager.add_reference",
            "BlockManager.allocate",
            "BlockManager.allocate_block",
            "BlockManager.block_hash",
            "BlockManager.cache_full_blocks",
            "BlockManager.evict",
            "BlockManager.find_cached_blocks",
            "BlockManager.free",
            "BlockManager.num_free_after_touch",
            "BlockManager.num_free_blocks",
            "BlockManager.num_new_blocks",
            "BlockManager.touch",
            "hash_block",
        ),
    },
    "05_scheduler": {
        "engine/scheduler.py": (
            "ScheduledSequence.decodes",
            "ScheduledSequence.end",
            "Scheduler.add",
            "Scheduler.admit",
            "Scheduler.allocate_or_preempt",
            "Scheduler.can_admit",
            "Scheduler.has_work",
            "Scheduler.remove_finished",
            "Scheduler.schedule",
            "Scheduler.schedule_running",
            "Scheduler.schedule_tokens",
            "Scheduler.schedule_waiting",
            "Scheduler.update",
            "Scheduler.would_fail_again",
        ),
        "engine/sequence.py": (
            "Sequence.__post_init__",
            "Sequence._announce",
            "Sequence._is_visible",
            "Sequence.append",
            "Sequence.append_text",
            "Sequence.append_token",
            "Sequence.check_stop",
            "Sequence.finish",
            "Sequence.in_flight",
            "Sequence.is_finished",
            "Sequence.num_unscheduled",
            "Sequence.output_ids",
            "Sequence.siblings",
        ),
        "engine/waiting_queue.py": (
            "WaitingQueue.__getitem__",
            "WaitingQueue.__len__",
            "WaitingQueue.append",
            "WaitingQueue.popleft",
        ),
    },
    "06_triton_kernels": {
        "layers/backend.py": ("Backend.paged_attention",),
        "kernels/store.py": (
            "rope_store_kernel",
            "store_kv",
            "store_kv_kernel",
        ),
        "kernels/device_functions.py": ("online_softmax_step",),
        "kernels/decode_attention.py": ("decode_attention_kernel",),
    },
    "07_cuda_graphs": {
        "engine/adjustments.py": (
            "AdjustmentTables.free_except",
            "AdjustmentTables.select",
            "Table.free_except",
        ),
        "engine/core.py": (
            "EngineCore._change",
            "EngineCore.add",
            "EngineCore.complete_step",
            "EngineCore.drain",
            "EngineCore.has_work",
            "EngineCore.launch",
            "EngineCore.overlapped_step",
            "EngineCore.plain_step",
            "EngineCore.step",
        ),
        "engine/cuda_graphs.py": (
            "GraphRunner.capture",
            "GraphRunner.padded_size",
            "GraphRunner.replay",
        ),
        "engine/input_batch.py": (
            "InputBatch._make_rows",
            "InputBatch.sampling_metadata",
            "InputBatch.set_next_ids",
            "InputBatch.update",
            "upload",
        ),
        "engine/logprobs.py": ("LogprobsProcessor.update",),
        "engine/model_runner.py": (
            "AsyncModelRunnerOutput.__init__",
            "AsyncModelRunnerOutput._copy_to_host",
            "AsyncModelRunnerOutput.read",
            "ModelRunner._decode_metadata",
            "ModelRunner._drop_unwanted",
            "ModelRunner._prefill_inputs",
            "ModelRunner.decode_step",
            "ModelRunner.execute_model",
            "ModelRunner.launch",
            "ModelRunner.mixed_step",
            "ModelRunner.sample_tokens",
        ),
    },
    "08_tensor_parallelism": {
        "engine/commands.py": (
            "CommandedEngine._broadcast",
            "CommandedEngine._unfinished_ids",
            "CommandedEngine.abort",
            "CommandedEngine.check_open",
            "CommandedEngine.on_all_ranks",
            "CommandedEngine.sequences",
        ),
        "engine/llm_engine.py": (
            "LLMEngine.add",
            "LLMEngine.add_on_this_rank",
            "LLMEngine.advance",
            "LLMEngine.is_free",
            "LLMEngine.make_request",
            "LLMEngine.make_sequences",
            "LLMEngine.tokenizer",
        ),
        "layers/linear.py": (
            "ColumnParallelLinear.norm_linear",
            "ColumnParallelLinear.norm_swiglu",
            "ParallelLMHead.norm_linear",
            "RowParallelLinear.__init__",
            "RowParallelLinear.linear_add",
            "VocabParallelEmbedding.__init__",
            "VocabParallelEmbedding.forward",
        ),
        "distributed/ranks.py": (
            "Ranks.all_reduce",
            "Ranks.all_reduce_argmax",
            "Ranks.broadcast",
            "Ranks.shard",
        ),
    },
    "09_the_ladder": {},
}
