"""Flags of vLLM, SGLang, TGI, LoRAX, llama.cpp and earlier versions, and their equivalents here."""

from collections.abc import Iterable

HABITS = {
    "--model": "MODEL, without a flag",
    "--model-id": "MODEL, without a flag",
    "--model-path": "MODEL, without a flag",
    "-m": "MODEL, without a flag",
    "--port": "--http-port; gRPC has --grpc-port",
    "-p": "--http-port; gRPC has --grpc-port",
    "--hostname": "--host",
    "--tensor-parallel-size": "--tp",
    "-tp": "--tp",
    "--tp-size": "--tp",
    "--num-shard": "--tp",
    "--nnodes": "--nodes",
    "--max-num-seqs": "--max-sequences",
    "--max-running-requests": "--max-sequences",
    "--max-num-batched-tokens": "--max-batch-tokens",
    "--chunked-prefill-size": "--max-batch-tokens",
    "--max-concurrent-requests": "--max-queue",
    "--max-total-tokens": "--max-model-len",
    "--context-length": "--max-model-len",
    "--ctx-size": "--max-model-len",
    "--kv-cache-dtype": "--kv-dtype",
    "--quantization": "--quantize",
    "--enable-lora": "always on: leave it out",
    "--enable-prefix-caching": "always on: leave it out",
    "--enable-chunked-prefill": "always on: leave it out",
    "--lora-modules": "--adapters DIRECTORY, with a folder for each",
    "--lora-paths": "--adapters DIRECTORY, with a folder for each",
    "--lora": "--adapters DIRECTORY, with a folder for each",
    "--max-loras": "--max-adapters-on-device",
    "--max-loras-per-batch": "--max-adapters-on-device",
    "--max-active-adapters": "--max-adapters-on-device",
    "--max-lora-rank": "not needed: leave it out",
    "--max-cpu-loras": "--adapter-host-gib",
    "--adapter-memory-fraction": "--adapter-memory-gib",
    "--gpu-memory-utilization": "--gpu-memory-fraction",
    "--mem-fraction-static": "--gpu-memory-fraction",
    "--cuda-memory-fraction": "--gpu-memory-fraction",
    "--api-key": "--api-keys FILE, which holds hashes of keys",
    "--trust-remote-code": "not supported: a model's code is never run",
    "--chat-template": "not supported: put chat_template.jinja into the model's directory",
    "--hf-overrides": "not supported: change config.json in a copy of the model",
    "--hf_overrides": "not supported: change config.json in a copy of the model",
    "--download-dir": "the variable HF_HOME",
    "--cors-allow-origin": "--cors-origins",
    "--allowed-origins": "--cors-origins",
    "--json-output": "--log-format json",
    "--resume": "--store",  # its former name
}


def translated(arguments: Iterable[str], flags: Iterable[str]) -> str | None:
    """A hint for the first argument that is another server's flag and not in `flags`; None if there is none."""
    own = set(flags)
    for argument in arguments:
        name = argument.partition("=")[0]
        if name in HABITS and name not in own:
            return f"there is no {name}; here it is {HABITS[name]}"
    return None
