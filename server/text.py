"""What needs no engine: /tokenize, /detokenize, /apply-template and /v1/messages/count_tokens."""

from typing import Annotated, Any

from pydantic import AliasChoices, Field

from . import messages, schemas
from .anthropic import CountRequest
from .errors import ApiError
from .schemas import Templated, Text, TokenId
from .service import Service, blamed


class TemplateRequest(Templated):
    model: schemas.Name | None = None
    messages: schemas.Messages
    tools: schemas.Tools | None = None

    def render(self, service: Service) -> str:
        with blamed("tools"):
            tools = messages.tools_chat(self.tools) if self.tools else None
        with blamed("messages"):
            return service.render(messages.chat(self.messages), tools, self.variables())


class TokenizeRequest(Templated):
    """The text as llama.cpp (`content`) or vLLM (`prompt`) name it, or messages for the chat template."""

    model: schemas.Name | None = None
    text: Annotated[Text | None, Field(validation_alias=AliasChoices("content", "prompt"))] = None
    messages: schemas.Messages | None = None
    tools: schemas.Tools | None = None
    special: Annotated[bool | None, Field(validation_alias=AliasChoices("add_special_tokens", "add_special"))] = None
    with_pieces: bool | None = None


class DetokenizeRequest(schemas.Body):
    model: schemas.Name | None = None
    tokens: Annotated[list[TokenId], Field(max_length=2**20)]


def template(service: Service, body: TemplateRequest) -> dict[str, Any]:
    service.adapter(body.model)
    return {"prompt": body.render(service)}


def tokenize(service: Service, body: TokenizeRequest) -> dict[str, Any]:
    """{tokens, count, max_model_len}; with_pieces: each token with its text, or its bytes if they are no text."""
    service.adapter(body.model)
    if (body.text is None) == (body.messages is None):
        raise ApiError(400, "content: give either content (or prompt) or messages", param="content")
    if body.messages is None:
        ids = service.tokenizer.encode(body.text, body.special is not False)
    else:
        ids = service.tokenizer.encode(TemplateRequest.render(body, service), False)  # type: ignore[arg-type]
    found = [{"id": id, "piece": piece(service, id)} for id in ids] if body.with_pieces else ids
    return {"tokens": found, "count": len(ids), "max_model_len": service.context}


def piece(service: Service, id: int) -> str | list[int]:
    spelled: bytes = service.tokenizer.piece(id)
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return list(spelled)


def detokenize(service: Service, body: DetokenizeRequest) -> dict[str, Any]:
    service.adapter(body.model)
    service.check_tokens(body.tokens, "tokens")
    found = service.tokenizer.decode(body.tokens, skip_special_tokens=False)
    return {"content": found, "prompt": found}


def count(service: Service, body: CountRequest) -> dict[str, Any]:
    service.adapter(body.model)
    return {"input_tokens": len(service.prompts(body.job())[0].ids)}
