"""Flags and variables of vLLM, SGLang, TGI, LoRAX, llama.cpp, earlier versions and our other commands, and what they
are here."""

from collections.abc import Collection, Iterable, Mapping

FORMER = {"resume": "store"}  # settings of earlier versions, and what they are called now
HABITS = {
    "--model-id": "--model",
    "--model-path": "--model",
    "--hf-repo": "--model",
    "-hf": "--model",
    "-m": "--model",
    "--port": "--http-port; gRPC has --grpc-port",
    "-p": "--http-port; gRPC has --grpc-port",
    "--hostname": "--host",
    "--tensor-parallel-size": "--tp",
    "-tp": "--tp",
    "--tp-size": "--tp",
    "--num-shard": "--tp",
    "--sharded": "--tp",
    "--nnodes": "--nodes",
    "--max-num-seqs": "--max-sequences",
    "--max-running-requests": "--max-sequences",
    "--max-num-batched-tokens": "--max-batch-tokens",
    "--chunked-prefill-size": "--max-batch-tokens",
    "--max-batch-prefill-tokens": "--max-batch-tokens",
    "--max-concurrent-requests": "--max-queue",
    "--max-input-length": "--max-model-len",
    "--max-input-tokens": "--max-model-len",
    "--max-total-tokens": "--max-model-len",
    "--context-length": "--max-model-len",
    "--ctx-size": "--max-model-len",
    "-c": "--max-model-len",
    "--parallel": "--max-sequences",
    "--n-parallel": "--max-sequences",
    "-np": "--max-sequences",
    "--alias": "--served-model-name",
    "--kv-cache-dtype": "--kv-dtype",
    "--quantization": "--quantize",
    "--enable-lora": "always on: leave it out",
    "--enable-prefix-caching": "always on: leave it out",
    "--enable-chunked-prefill": "always on: leave it out",
    "--enable-auto-tool-choice": "always on: leave it out",
    "--tool-call-parser": "not needed: the chat template says it",
    "--lora-modules": "--adapters DIRECTORY, with a folder for each",
    "--lora-paths": "--adapters DIRECTORY, with a folder for each",
    "--lora": "--adapters DIRECTORY, with a folder for each",
    "--lora-scaled": "--adapters DIRECTORY, with a folder for each, whose adapter_config.json has the scale",
    "--lora-adapters": "--adapters DIRECTORY, with a folder for each",
    "--max-loras": "--max-adapters-on-device",
    "--max-loras-per-batch": "--max-adapters-on-device",
    "--max-active-adapters": "--max-adapters-on-device",
    "--max-lora-rank": "not needed: leave it out",
    "--max-cpu-loras": "--adapter-host-gib",
    "--max-loaded-loras": "--adapter-host-gib",
    "--lora-dtype": "--adapter-dtype",
    "--lora-target-modules": "not needed: leave it out",
    "--lora-backend": "not needed: leave it out",
    "--adapter-id": "not supported: requests name their adapter",
    "--adapter-source": "not needed: leave it out",
    "--preloaded-adapter-ids": "not supported: run `loraplex adapters load` after the start",
    "--preloaded-adapter-source": "not needed: leave it out",
    "--adapter-memory-fraction": "--adapter-memory-gib",
    "--gpu-memory-utilization": "--gpu-memory-fraction",
    "--mem-fraction-static": "--gpu-memory-fraction",
    "--cuda-memory-fraction": "--gpu-memory-fraction",
    "--ssl-certfile": "--tls-cert",
    "--ssl-keyfile": "--tls-key",
    "--ssl-cert-file": "--tls-cert",
    "--ssl-key-file": "--tls-key",
    "--otlp-traces-endpoint": "--otlp-endpoint",
    "--api-key": "--api-keys FILE, which holds hashes of keys",
    "--api-key-file": "--api-keys FILE, which holds hashes of keys",
    "--trust-remote-code": "not supported: a model's code is never run",
    "--chat-template": "not supported: put chat_template.jinja into the model's directory",
    "--chat-template-file": "not supported: put chat_template.jinja into the model's directory",
    "--hf-overrides": "not supported: change config.json in a copy of the model",
    "--hf_overrides": "not supported: change config.json in a copy of the model",
    "--hf-token": "the variable HF_TOKEN",
    "--download-dir": "the variable HF_HOME",
    "--huggingface-hub-cache": "the variable HF_HUB_CACHE",
    "--weights-cache-override": "the variable HF_HUB_CACHE",
    "--predibase-api-token": "not supported: adapters come from a directory, an object store or the hub",
    "--cors-allow-origin": "--cors-origins",
    "--allowed-origins": "--cors-origins",
    "--json-output": "--log-format json",
    "--payload-limit": "--max-body-mib",
    "--graceful-termination-timeout": "--drain-seconds",
    "--max-batch-total-tokens": "--kv-blocks; a block has 16 tokens",
    "--cache-type-k": "--kv-dtype",
    "--cache-type-v": "--kv-dtype",
    "--n-gpu-layers": "--device cuda",
    "-ngl": "--device cuda",
    "--prometheus-port": "not needed: GET /metrics is at --http-port",
    "--source": "not supported: a model is a directory, a file or a hub id",
    "--pipeline-parallel-size": "not supported: --tp divides the model over GPUs",
    "--data-parallel-size": "not a flag: run `loraplex shard` for each replica, and `loraplex router`",
    "--dp-size": "not a flag: run `loraplex shard` for each replica, and `loraplex router`",
    "--rope-scaling": "not supported: change config.json in a copy of the model",
    "--rope-factor": "not supported: change config.json in a copy of the model",
    **dict.fromkeys(
        ("--speculate", "--speculative-tokens", "--speculative-config", "--swap-space", "--cpu-offload-gb"),
        "not supported: leave it out",
    ),
    **dict.fromkeys(
        (
            *("--prefix-caching", "--chunked-prefill", "--cont-batching", "-cb", "--flash-attn", "-fa", "--jinja"),
            *("--metrics", "--enable-metrics", "--embedding", "--embeddings"),
        ),
        "always on: leave it out",
    ),
    **dict.fromkeys(
        (
            *("--compile", "--eager", "--eager-prefill", "--enforce-eager", "--disable-cuda-graph", "--cuda-graphs"),
            *("--backend", "--attention-backend", "--disable-custom-kernels", "--disable-sgmv", "--embedding-dim"),
            *("--validation-workers", "--waiting-served-ratio", "--max-waiting-tokens", "--adapter-cycle-time-s"),
            *("--default-adapter-source", "--max-best-of", "--max-stop-sequences", "--max-top-n-tokens"),
            *("--guided-decoding-backend", "--grammar-backend", "--enable-reasoning", "--block-size", "--page-size"),
        ),
        "not needed: leave it out",
    ),
    **{f"--{former}": f"--{name}" for former, name in FORMER.items()},
}

# Variables that other servers read, and the flags that they stand for, or what they are here. LoRAX and TGI have one
# for each of their flags.
VARIABLES = {
    **{
        name: f"--{name.lower().replace('_', '-')}"
        for name in (
            *("MODEL_ID", "REVISION", "DTYPE", "QUANTIZE", "KV_CACHE_DTYPE", "TRUST_REMOTE_CODE"),
            *("NUM_SHARD", "SHARDED", "CUDA_MEMORY_FRACTION", "WEIGHTS_CACHE_OVERRIDE"),
            *("MAX_INPUT_LENGTH", "MAX_INPUT_TOKENS", "MAX_TOTAL_TOKENS", "MAX_BATCH_PREFILL_TOKENS"),
            *("MAX_CONCURRENT_REQUESTS", "MAX_ACTIVE_ADAPTERS", "ADAPTER_MEMORY_FRACTION", "LORA_ADAPTERS"),
            *("ADAPTER_ID", "ADAPTER_SOURCE", "PRELOADED_ADAPTER_IDS", "PRELOADED_ADAPTER_SOURCE"),
            *("PORT", "CORS_ALLOW_ORIGIN", "OTLP_ENDPOINT", "JSON_OUTPUT", "API_KEY", "PREDIBASE_API_TOKEN"),
        )
    },
    **dict.fromkeys(("VLLM_API_KEY", "LLAMA_API_KEY"), "--api-key"),
    "VLLM_LORA_RESOLVER_CACHE_DIR": "--lora-modules",
    "VLLM_CPU_KVCACHE_SPACE": "--kv-blocks",
    "VLLM_CPU_OMP_THREADS_BIND": "--threads",
    **dict.fromkeys(
        ("VLLM_USE_MODELSCOPE", "SGLANG_USE_MODELSCOPE"),
        "not supported: models come from a directory or Hugging Face's hub (HF_ENDPOINT names another one)",
    ),
    **dict.fromkeys(("HF_API_TOKEN", "HF_HUB_TOKEN", "HUGGINGFACE_TOKEN", "HUGGINGFACE_HUB_TOKEN"), "--hf-token"),
    "HUGGINGFACEHUB_API_TOKEN": "--hf-token",
    "TRANSFORMERS_CACHE": "--weights-cache-override",
    "PREDIBASE_MODEL_BUCKET": "--adapters-s3",
    **dict.fromkeys(("S3_ENDPOINT_URL", "R2_ACCOUNT_ID"), "the variable AWS_ENDPOINT_URL_S3"),
}
LLAMA_CPP = "LLAMA_ARG_"  # llama.cpp's variables begin with it, and end with the flag's name
# Without the setting that these stand for, a server does what its operator does not expect, such as serve everybody.
SERIOUS = {
    *("VLLM_API_KEY", "LLAMA_ARG_API_KEY_FILE", "LLAMA_ARG_SSL_CERT_FILE", "LLAMA_ARG_SSL_KEY_FILE"),
    *("MODEL_ID", "LLAMA_ARG_MODEL", "LLAMA_ARG_HF_REPO"),
}


def setting_of(hint: str) -> str:
    """The setting of ours that a hint begins with, if it begins with a flag."""
    return hint.partition(" ")[0].rstrip(";").removeprefix("--").replace("-", "_")


def translated(
    arguments: Iterable[str], own: Collection[str], others: Mapping[str, Collection[str]], positional: str = ""
) -> str | None:
    """A hint for the first argument that is a flag of another server, or of one of our other commands; None if there
    is none. `own` and `others` are settings, those of others by the command; `positional` has no flag."""
    flags = {f"--{setting.replace('_', '-')}" for setting in own if setting != positional}
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("-") and name not in flags and (hint := _hint(name, flags, others, positional)):
            return f"there is no {name}; {hint}"
    return None


def _hint(name: str, flags: Collection[str], others: Mapping[str, Collection[str]], positional: str) -> str | None:
    known = HABITS.get(name, name)
    setting = setting_of(known)
    if setting == positional:
        return f"here it is {positional.upper()}, without a flag"
    if known.startswith("--") and f"--{setting.replace('_', '-')}" not in flags:
        other = next((other for other, theirs in others.items() if setting in theirs), None)
        return other and (f"it is a flag of `loraplex {other}`" if known == name else f"`loraplex {other}` has {known}")
    return f"here it is {known}" if name in HABITS else None
