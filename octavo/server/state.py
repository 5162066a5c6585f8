"""What the routes know: the engine's client, the settings, and the model as the front end sees it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from octavo.engine.chat_template import ChatTemplate
from octavo.engine.tokenizer import Tokenizer
from octavo.errors import RequestError
from octavo.server.answer.tool_formats import ToolFormat, format_named, format_of_template
from octavo.server.engine_client import EngineClient, EngineClientInfo
from octavo.server.errors import ModelUnknownError
from octavo.server.settings import ServeSettings


@dataclass(frozen=True)
class ServedModel:
    """The loaded model: what the engine says of it, its tokenizer, and what its chat template can do."""

    info: EngineClientInfo
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    template_text: str  # all of its templates; "" where there is none
    tool_format: ToolFormat | None  # how it writes calls; None: its template does not say
    writes_reasoning: bool  # marks its reasoning with <think>
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def load(cls, info: EngineClientInfo, settings: ServeSettings) -> ServedModel:
        """Read tokenizer and template from the model's folder. Takes a moment: not for the event loop.

        Raises ModelError for damaged files, ConfigError for a parser or template that there is not.
        """
        tokenizer = None
        if info.tokenizer_path is not None:
            tokenizer = Tokenizer.from_folder(info.tokenizer_path, info.trust_remote_code)
        return cls.of(info, settings, tokenizer)

    @classmethod
    def of(cls, info: EngineClientInfo, settings: ServeSettings, tokenizer: Tokenizer | None) -> ServedModel:
        """As `load`, around a tokenizer that is there already."""
        template = None
        if tokenizer is not None:
            template = ChatTemplate.for_tokenizer(tokenizer, info.chat_template)
        text = "\n".join(template.sources.values()) if template is not None else ""
        tool_format = format_of_template(text)
        if settings.tool_parser != "auto":
            tool_format = format_named(settings.tool_parser)
        # A template that writes the tag, or a vocabulary that has it as a token.
        thinks = "<think>" in text or (
            tokenizer is not None and tokenizer.backend.token_to_id("</think>") is not None
        )
        thinks = settings.reasoning_parser != "none" and (thinks or settings.reasoning_parser == "think")
        return cls(info, tokenizer, template, text, tool_format, thinks)

    @property
    def name(self) -> str:
        """The name that answers report."""
        return self.info.served_model_names[0]

    @property
    def knows_tools(self) -> bool:
        """True if the chat template shows the tools to its model."""
        return "tools" in self.template_text


@dataclass(frozen=True)
class ServerState:
    """Everything a route needs; one for each application, at `app.state.octavo`."""

    client: EngineClient
    settings: ServeSettings
    served: ServedModel

    def model(self, name: str | None) -> ServedModel:
        """The model that serves requests for `name`; None is the only one. Raises ModelUnknownError."""
        if name is not None and name not in self.served.info.served_model_names:
            raise ModelUnknownError(name, self.served.info.served_model_names)
        return self.served


def need_tokenizer(model: ServedModel, what: str) -> Tokenizer:
    """The tokenizer, or a RequestError that says why there is none."""
    if model.tokenizer is None:
        raise RequestError(
            f"{what} needs a tokenizer, and this model is served without one; /v1/completions takes token ids"
        )
    return model.tokenizer
