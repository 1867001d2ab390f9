"""The parameters of vLLM 0.24 that this engine lacks, and the values that it accepts for them.

The first value of a parameter is vLLM's default, which a script may spell out. Further values are
accepted where they change nothing in this engine. Every other value would be ignored, so it is an
error (see unsupported.py).
"""

from enum import Enum
from typing import Any


class RequestOutputKind(Enum):
    """Which output of a request a step returns in vLLM. In this engine it is CUMULATIVE."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


def each(names: str, *accepted: Any) -> dict[str, tuple]:
    """Return a table in which each of the space-separated names accepts these values."""
    return dict.fromkeys(names.split(), accepted)


SAMPLING: dict[str, tuple] = {
    **each("structured_outputs logprob_token_ids", None),
    **each("repetition_detection", None),
    "extra_args": (None, {}),
    "flat_logprobs": (False,),
    "spaces_between_special_tokens": (True,),
    "output_kind": (RequestOutputKind.CUMULATIVE,),
    "skip_clone": (False, True),  # every request is cloned, so its parameters are always safe
    **each("output_text_buffer_length routed_experts_prompt_start", 0),
    "thinking_token_budget": (None, -1),
}

ENGINE: dict[str, tuple] = {
    # the model's files
    **each("served_model_name hf_config_path download_dir code_revision tokenizer_revision", None),
    **each("hf_token quantization_config safetensors_load_strategy override_attention_dtype", None),
    **each("model_weights", ""),
    "tokenizer_mode": ("auto", "hf"),
    "load_format": ("auto", "hf", "safetensors"),
    "config_format": ("auto", "hf"),
    "runner": ("auto", "generate"),
    "convert": ("auto", "none"),
    "model_impl": ("auto",),
    "hf_overrides": ({}, None),
    "model_loader_extra_config": ({}, None),
    "ignore_patterns": (["original/**/*"], "original/**/*"),
    "safetensors_prefetch_num_threads": (8,),
    "safetensors_prefetch_block_size": (16 * 1024 * 1024,),
    "pt_load_map_location": ("cpu",),
    **each("allow_deprecated_quantization disable_sliding_window", False),
    "max_parallel_loading_workers": (None,),
    # the computation and its devices
    "compilation_config": (None, {}),
    **each("attention_config mamba_config kernel_config", None, {}),
    "ir_op_priority": (None, {}),
    **each("cudagraph_capture_sizes max_cudagraph_capture_size device_ids", None),
    **each("enable_flashinfer_autotune gdn_prefill_backend", None),
    **each("moe_backend linear_backend", "auto"),
    "optimization_level": (2,),
    "performance_mode": ("balanced",),
    "disable_cascade_attn": (True, False),  # there is no cascade attention
    "disable_custom_all_reduce": (False, True),  # NCCL or gloo reduces
    "use_fp64_gumbel": (False,),
    # several processes and machines
    **each("prefill_context_parallel_size decode_context_parallel_size data_parallel_size", 1),
    **each("nnodes dcp_kv_cache_interleave_size cp_kv_cache_interleave_size", 1),
    **each("node_rank ubatch_size", 0),
    **each("numa_bind data_parallel_hybrid_lb data_parallel_external_lb", False),
    **each("data_parallel_multi_port_external_lb enable_expert_parallel", False),
    **each("enable_ep_weight_filter enable_elastic_ep enable_dbo enable_eplb", False),
    **each("ray_workers_use_nsight", False),
    **each("distributed_timeout_seconds cpu_distributed_timeout_seconds numa_bind_nodes", None),
    **each("numa_bind_cpus data_parallel_rank data_parallel_start_rank", None),
    **each("data_parallel_size_local data_parallel_address data_parallel_rpc_port", None),
    **each("disable_nccl_for_dp_synchronization", None),
    "eplb_config": (None, {}),
    "master_addr": ("127.0.0.1",),
    "master_port": (29501,),
    "data_parallel_backend": ("mp",),
    "dcp_comm_backend": ("ag_rs",),
    "all2all_backend": ("allgather_reducescatter",),
    "expert_placement_strategy": ("linear",),
    "dbo_decode_token_threshold": (32,),
    "dbo_prefill_token_threshold": (512,),
    "worker_cls": ("auto",),
    "worker_extension_cls": ("",),
    # the KV cache, and memory
    "prefix_caching_hash_algo": ("sha256",),
    **each("kv_cache_memory_bytes kv_offloading_size mamba_block_size", None),
    **each("calculate_kv_scales kv_sharing_fast_prefill kv_cache_metrics", False),
    **each("enable_sleep_mode enable_cumem_allocator", False),
    "kv_cache_dtype_skip_layers": ([],),
    "kv_cache_metrics_sample": (0.01,),
    "kv_offloading_backend": ("native",),
    "offload_backend": ("auto",),
    **each("cpu_offload_gb offload_group_size", 0),
    **each("cpu_offload_params offload_params", set(), None),
    **each("offload_num_in_group offload_prefetch_step", 1),
    **each("mamba_cache_dtype mamba_ssm_cache_dtype", "auto"),
    "mamba_cache_mode": ("none",),
    "mamba_backend": ("triton",),
    "enable_mamba_cache_stochastic_rounding": (False,),
    "mamba_cache_philox_rounds": (0,),
    # the scheduler
    "scheduling_policy": ("fcfs",),
    "scheduler_cls": (None,),
    **each("max_num_partial_prefills max_long_partial_prefills prefill_schedule_interval", 1),
    **each("stream_interval", 1),
    **each("long_prefill_token_threshold", 0),
    "watermark": (0.0,),
    "scheduler_reserve_full_isl": (True,),
    "disable_hybrid_kv_cache_manager": (None, True, False),  # every layer attends to everything
    # logs and metrics: this engine logs nothing, and it always measures requests
    "disable_log_stats": (False, True),
    "aggregate_engine_logging": (False, True),
    **each("show_hidden_metrics_for_version otlp_traces_endpoint collect_detailed_traces", None),
    **each("cudagraph_metrics enable_layerwise_nvtx_tracing enable_mfu_metrics", False),
    **each("enable_logging_iteration_details jit_monitor_verbose", False),
    "profiler_config": (None, {}),
    # further features of vLLM's models and requests
    "max_logprobs": (20,),
    "logprobs_mode": ("raw_logprobs",),
    **each("logits_processors pooler_config speculative_config spec_method spec_model", None),
    **each("spec_tokens diffusion_config kv_transfer_config kv_events_config", None),
    **each("ec_transfer_config reasoning_config weight_transfer_config", None),
    **each("io_processor_plugin reasoning_parser_plugin", None),
    "reasoning_parser": ("",),
    "structured_outputs_config": (None, {}),
    "additional_config": ({}, None),
    **each("enable_prompt_embeds enable_return_routed_experts tokens_only", False),
    **each("fail_on_environ_validation", False),
    "shutdown_timeout": (0,),
    "renderer_num_workers": (1,),
    # LoRA
    **each("enable_lora fully_sharded_loras enable_tower_connector_lora", False),
    **each("specialize_active_lora enable_mixed_moe_lora_format", False),
    **each("default_mm_loras max_cpu_loras lora_target_modules", None),
    "max_loras": (1,),
    "max_lora_rank": (16,),
    "lora_dtype": ("auto",),
    # images, audio and video
    "allowed_local_media_path": ("",),
    **each("allowed_media_domains mm_processor_kwargs mm_encoder_attn_backend", None),
    **each("mm_encoder_attn_dtype mm_encoder_fp8_scale_path", None),
    **each("mm_encoder_fp8_scale_save_path video_pruning_rate", None),
    **each("language_model_only enable_mm_embeds interleave_mm_strings mm_encoder_only", False),
    **each("skip_mm_profiling disable_chunked_mm_input enable_mm_processor_stats", False),
    **each("limit_mm_per_prompt media_io_kwargs", {}, None),
    "mm_processor_cache_gb": (4,),
    "mm_processor_cache_type": ("lru",),
    "mm_shm_cache_max_object_size_mb": (128,),
    "mm_encoder_tp_mode": ("weights",),
    "mm_encoder_fp8_scale_save_margin": (1.5,),
    "mm_tensor_ipc": ("direct_rpc",),
}

# The parameters of methods.
REQUESTS: dict[str, tuple] = {
    "lora_request": (None,),
    "tokenization_kwargs": (None, {}),
}
GENERATE = {**REQUESTS, "priority": (None,), "mm_processor_kwargs": (None, {})}
CHAT = {
    **REQUESTS,
    "chat_template_content_format": ("auto", "string"),
    "mm_processor_kwargs": (None, {}),
}
ADD_REQUEST = {
    **REQUESTS,
    **each("arrival_time trace_headers prompt_text", None),
    "priority": (0,),
}
ABORT_REQUEST: dict[str, tuple] = {"internal": (False,)}
RESET_PREFIX_CACHE = each("reset_running_requests reset_connector", False)
CLEANUP: dict[str, tuple] = {"shutdown_ray": (False,)}  # there is no Ray
FROM_ENGINE_ARGS: dict[str, tuple] = {
    "usage_context": (None,),
    "stat_loggers": (None,),
    "enable_multiprocessing": (False,),
}
