"""The base model with the three committed adapters, which PEFT loads once."""

import pytest
from peft import PeftModel
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from examples.adapters import base, train

Loaded = tuple[LlamaForCausalLM, PreTrainedTokenizerBase]


@pytest.fixture(scope="session")
def loaded() -> Loaded:
    return base.load()


@pytest.fixture(scope="session")
def tokenizer(loaded: Loaded) -> PreTrainedTokenizerBase:
    return loaded[1]


@pytest.fixture(scope="session")
def adapted(loaded: Loaded) -> PeftModel:
    first, *others = train.TASKS
    model = PeftModel.from_pretrained(loaded[0], train.FOLDER / first, adapter_name=first)
    for name in others:
        model.load_adapter(train.FOLDER / name, adapter_name=name)
    return model
