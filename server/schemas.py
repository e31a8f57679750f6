"""The parameters that the endpoints share, with their limits. A type that allows only null is a parameter we refuse."""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

Temperature = Annotated[float, Field(ge=0, le=2)]
Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Text = Annotated[str, Field(max_length=2**25)]
Name = Annotated[str, Field(max_length=256)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
Stop = Annotated[list[StopString], Field(max_length=16)]
StopField = Annotated[
    Stop | None,
    BeforeValidator(lambda v: [v] if isinstance(v, str) else v, json_schema_input_type=StopString | Stop | None),
]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Bias = dict[Annotated[TokenId, Field(strict=False)], Annotated[float, Field(ge=-100, le=100)]]
Messages = Annotated[list[dict[str, Any]], Field(min_length=1, max_length=10_000)]
Tools = Annotated[list[dict[str, Any]], Field(max_length=256)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Kwargs = Annotated[dict[Name, bool | int | float | Annotated[str, Field(max_length=1024)] | None], Field(max_length=32)]
Format = Annotated[dict[str, Any], Field(min_length=1)]  # of an answer; grammars.py reads it
Refused: TypeAlias = None
RESERVED = {"messages", "tools", "add_generation_prompt", "tokenize", "chat_template", "documents"}

# Sampling's names for what the APIs call otherwise
SAMPLING = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "seed": "seed",
            "repetition_penalty": "repetition_penalty", "presence_penalty": "presence_penalty",
            "frequency_penalty": "frequency_penalty", "ignore_eos": "ignore_eos", "logit_bias": "logit_bias",
            "stop": "stop"}  # fmt: skip


class Body(BaseModel):
    """A JSON object: types as they are written (no "1" for 1), no NaN; fields that nobody documents are ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Templated(Body):
    """What reaches the chat template besides messages and tools."""

    reasoning_effort: Effort | None = None
    chat_template_kwargs: Kwargs | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def free(cls, value: Any) -> Any:
        if taken := RESERVED & set(value or ()):
            raise ValueError(f"{min(taken)} is set by the server")
        return value

    def variables(self) -> dict[str, Any]:
        """For the template: "none" turns thinking off where a model can do that."""
        effort: dict[str, Any] = {}
        if self.reasoning_effort:
            effort = {"reasoning_effort": self.reasoning_effort, "enable_thinking": self.reasoning_effort != "none"}
        return {**effort, **(self.chat_template_kwargs or {})}


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against listeners: there is none here


class Sampled(Body):
    """The parameters of OpenAI's two completion endpoints, and those that local servers added."""

    model: Name | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | None = None
    stop: StopField = None
    logit_bias: Annotated[Bias, Field(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    max_tokens: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = None

    @field_validator("stream_options")
    @classmethod
    def streams(cls, value: Any, info: Any) -> Any:
        if value is not None and not info.data.get("stream"):
            raise ValueError("stream_options needs stream: true")
        return value

    @property
    def usage_wanted(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


def sampling(body: Any) -> dict[str, Any]:
    """Fields of Sampling, of those that the body has."""
    named = {ours: getattr(body, theirs, None) for theirs, ours in SAMPLING.items()}
    found: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    if "top_k" in found:
        found["top_k"] = max(0, found["top_k"])  # -1 is off as well
    if "stop" in found:
        found["stop"] = tuple(found["stop"])
    return found
