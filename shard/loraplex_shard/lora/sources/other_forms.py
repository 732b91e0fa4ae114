"""What trainers and people put into folders instead of an adapter's files, and what can be done with it."""

import re
from collections.abc import Collection
from posixpath import basename, dirname

MOST_NAMED = 5  # folders, in a message

_SAVE = "save the adapter with PEFT's save_pretrained, which writes adapter_config.json and adapter_model.safetensors"
_PICKLE = "is a pickle file, which could run any code"
_CONVERT = (
    """python -c "import torch, safetensors.torch as s; s.save_file({n: t.contiguous().clone() for n, t in torch.load"""
    """('adapter_model.bin', map_location='cpu', weights_only=True).items()}, 'adapter_model.safetensors')\""""
)
_JOIN = (
    """python -c "import glob, safetensors.torch as s; s.save_file({n: t for f in glob.glob('adapter_model-*') """
    """for n, t in s.load_file(f).items()}, 'adapter_model.safetensors')\""""
)
# Patterns of files' names. The first one that fits a file says why its folder is not an adapter.
_FORMS = {
    r"adapter_model-\d+-of-\d+\.safetensors": "its tensors are in parts, which PEFT does not read. "
    f"This joins them: {_JOIN}",
    r"adapter_model\.bin": f"adapter_model.bin {_PICKLE}. This converts it: {_CONVERT}",
    r".*\.nemo": "NeMo's format is not read: llm.export_ckpt(..., target='hf-peft') in NeMo converts it",
    r".*\.distcp": "torch's distributed checkpoints are not read: llm.export_ckpt(..., target='hf-peft') converts "
    f"NeMo's; after FSDP, {_SAVE}",
    r"pytorch_lora_weights\.(safetensors|bin)": "this is an adapter of diffusers, for a model of images",
    r".*\.(zip|tar|tgz|tar\.(gz|bz2|xz|zst)|7z|rar)": "it is packed: unpack it here",
    r"((ft-|hf_)?(model|pytorch_model)([-_]\d+([-_]of[-_]\d+)?)?|consolidated.*)\.(safetensors|bin|pth|pt)": "this is "
    "a whole model, perhaps with an adapter merged into it: serve it as MODEL, or save the adapter without merging it",
    r"adapter(_\d+|_model-\d+-of-\d+)?\.(pt|pth|bin)|.*\.lora(\.pth)?": f"it {_PICKLE}: {_SAVE}",
    r".*\.(incomplete|part|partial|tmp|crdownload|aria2)": "a download is not complete: do it again",
    r"(optimizer|scheduler|scaler|trainer_state|training_args|rng_state.*|.*_(model|optim)_states)\.\w+": "this is the "
    f"state of a training, without the adapter: {_SAVE}",
}
_SUBFOLDER = re.compile(r".+/adapter_config\.json")


def is_other(name: str) -> bool:
    """Whether a file with this name, which may be in a folder below, can tell why a folder is not an adapter."""
    return bool(_SUBFOLDER.fullmatch(name)) or any(re.fullmatch(form, basename(name)) for form in _FORMS)


def why_no_adapter(names: Collection[str]) -> str:
    """What to do about a folder in which the config or the tensors are missing, from the names of its files. Empty if
    they do not tell."""
    if inside := [dirname(name) for name in names if _SUBFOLDER.fullmatch(name)]:
        inside.sort(key=lambda folder: [(not part.isdecimal(), part.zfill(20)) for part in re.split(r"(\d+)", folder)])
        more = f" and {len(inside) - MOST_NAMED} others" if len(inside) > MOST_NAMED else ""
        return (
            f"there are adapters in folders below it: {', '.join(inside[-MOST_NAMED:])}{more}; name one, or move it up"
        )
    files = {basename(name) for name in names}
    return next((said for form, said in _FORMS.items() if any(re.fullmatch(form, file) for file in files)), "")
