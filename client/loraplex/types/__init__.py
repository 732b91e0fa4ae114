"""What the SDK returns. Plain data, independent of gRPC and protobuf."""

from loraplex.types.answers import (
    Classification,
    ClassifiedToken,
    Embedding,
    FinishReason,
    GeneratedSequence,
    Generation,
    PromptToken,
    StreamPiece,
    Token,
    TokenLogprob,
    TokenSpan,
    ToolCall,
    ToolCallPart,
    Usage,
)
from loraplex.types.server import Adapter, AdapterResidence, AdapterState, AdapterTier, Classifier, ModelInfo

__all__ = [
    "Adapter",
    "AdapterResidence",
    "AdapterState",
    "AdapterTier",
    "Classification",
    "ClassifiedToken",
    "Classifier",
    "Embedding",
    "FinishReason",
    "GeneratedSequence",
    "Generation",
    "ModelInfo",
    "PromptToken",
    "StreamPiece",
    "Token",
    "TokenLogprob",
    "TokenSpan",
    "ToolCall",
    "ToolCallPart",
    "Usage",
]
