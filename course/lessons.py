"""Which lesson ends in which file of the engine: each file has one, or is off the path.

A learner who finishes that lesson has read the whole file and met nothing no lesson explained.
tests/authoring/test_size.py checks that the tables and the folder agree.
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

# No lesson needs these files. A first reader need not open them.
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
    "engine/parallel_sampling.py",
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
