"""Flags of vLLM, SGLang, TGI, LoRAX, llama.cpp, earlier versions and our other commands, and what they are here."""

from collections.abc import Collection, Iterable, Mapping

FORMER = {"resume": "store"}  # settings of earlier versions, and what they are called now
HABITS = {
    "--model-id": "--model",
    "--model-path": "--model",
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
    "--otlp-traces-endpoint": "--otlp-endpoint",
    "--api-key": "--api-keys FILE, which holds hashes of keys",
    "--trust-remote-code": "not supported: a model's code is never run",
    "--chat-template": "not supported: put chat_template.jinja into the model's directory",
    "--hf-overrides": "not supported: change config.json in a copy of the model",
    "--hf_overrides": "not supported: change config.json in a copy of the model",
    "--download-dir": "the variable HF_HOME",
    "--cors-allow-origin": "--cors-origins",
    "--allowed-origins": "--cors-origins",
    "--json-output": "--log-format json",
    **{f"--{former}": f"--{name}" for former, name in FORMER.items()},
}


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
    flag = known.partition(" ")[0].rstrip(";")
    setting = flag.removeprefix("--").replace("-", "_")
    if setting == positional:
        return f"here it is {positional.upper()}, without a flag"
    if flag.startswith("--") and flag not in flags:
        other = next((other for other, theirs in others.items() if setting in theirs), None)
        return other and (f"it is a flag of `loraplex {other}`" if known == name else f"`loraplex {other}` has {known}")
    return f"here it is {known}" if name in HABITS else None
