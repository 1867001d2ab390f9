"""Which lesson ends in which file of the engine: each file has one, or is off the path.

A learner who finishes that lesson has read the whole file and met nothing no lesson explained.
tests/authoring/test_size.py checks that the tables and the folder agree.
"""

FILES_OF_LESSON: dict[str, tuple[str, ...]] = {
    "00_tour": (
        "llm.py",
        "config.py",
        "outputs.py",
        "validation/checks.py",
        "validation/fields.py",
    ),
    "01_naive_generate": (
        "sampling_params.py",
        "models/model_config.py",
        "models/decoder.py",
        "layers/functional.py",
        "layers/norm.py",
        "layers/rope.py",
        "checkpoint/generation_config.py",
        "checkpoint/weights.py",
        "layers/functional.py",
        "ops/sampler.py",
        "logprobs.py",
        "ops/logprobs.py",
        "engine/detokenizer.py",
    ),
    "02_kv_cache": (),  # previews layers/attention.py, which lesson 03 completes
    "03_paged_blocks": ("layers/attention.py", "metadata.py"),
    "04_prefix_hashing": ("engine/block_manager.py",),
    "05_scheduler": ("engine/sequence.py", "engine/scheduler.py"),
    "06_triton_kernels": (
        "ops/kernels.py",
        "kernels/sampling.py",
        "kernels/logprobs.py",
        "layers/backend.py",
    ),
    "07_cuda_graphs": (
        "engine/persistent_batch.py",
        "engine/model_runner.py",
        "engine/memory.py",
        "engine/output_logprobs.py",
        "engine/logprobs.py",
        "engine/engine.py",
    ),
    "08_tensor_parallelism": (
        "distributed/ranks.py",
        "distributed/launch.py",
        "distributed/signed_store.py",
        "layers/linear.py",
        "llm_engine.py",
    ),
    "09_the_ladder": (),  # measures all of them together
}

# No lesson needs these files. The first group finds and opens a checkpoint's files, the second one
# keeps the processes of ranks equal and alive, and the third one lets scripts that were written for
# vLLM run here.
OFF_THE_PATH: tuple[str, ...] = (
    "checkpoint/hub.py",
    "checkpoint/safetensors_files.py",
    "checkpoint/tokenizer.py",
    "distributed/consistency.py",
    "distributed/monitor.py",
    "distributed/python_command.py",
    "distributed/cleanup.py",
    "frontend/chat.py",
    "inputs.py",
    "engine/parallel_sampling.py",
    "vllm_defaults.py",
    "utils/argparse_utils.py",
    "entrypoints/llm.py",
    "engine/arg_utils.py",
    "engine/llm_engine.py",
    # Penalties, biases and forbidden tokens change the logits before they are sampled.
    "ops/adjustments.py",
    "kernels/adjustments.py",
    "engine/adjustments.py",
)
