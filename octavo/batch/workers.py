"""Who does the work: an engine in this process, or replicas in processes of their own.

With replicas each gets its share of the machine (threads of a processor, or a GPU of its own), and each
next item goes to the one that has least to do. When one ends, whatever it had is given to the others.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from octavo import platform
from octavo.batch.run import in_thread
from octavo.batch.shares import Share, shares
from octavo.batch.work import Workers, WorkersInfo, WorkItem
from octavo.config import EngineArgs
from octavo.engine.async_engine import AsyncLLM
from octavo.engine.chat_template import ChatTemplate
from octavo.engine.setup import EngineParts, build_engine
from octavo.engine.tokenizer import Tokenizer
from octavo.errors import ConfigError, EngineDeadError, OctavoError, RequestError
from octavo.outputs import RequestOutput

if TYPE_CHECKING:
    from octavo.server.engine_child import EngineChild
    from octavo.server.engine_client import EngineClientInfo
    from octavo.server.process_client import ProcessEngineClient

logger = logging.getLogger("octavo")

_NEEDED = ("msgspec", "prometheus_client", "starlette")
GROUPS_REMEMBERED = 1 << 12
NO_LIMIT = 1 << 30


class EngineWorkers:
    """One engine, in this process."""

    def __init__(self, parts: EngineParts) -> None:
        args = parts.config.args
        self._llm = AsyncLLM.from_parts(parts)
        self.tokenizer: Tokenizer | None = parts.engine.tokenizer
        self.template: ChatTemplate | None = None
        if self.tokenizer is not None:
            self.template = parts.chat_template(None)
        self._info = WorkersInfo(
            model=args.model,
            model_path=str(parts.model_path),
            tokenizer_path=None if self.tokenizer is None else str(parts.config.tokenizer_path),
            chat_template=args.chat_template,
            trust_remote_code=args.trust_remote_code,
            max_model_len=parts.engine.info.max_model_len,
            vocab_size=parts.config.model.vocab_size,
            max_num_seqs=parts.config.max_num_seqs,
            num_replicas=1,
            dtype=parts.config.dtype,
            speculative_method=None if parts.config.speculative is None else parts.config.speculative.method,
            generation_defaults=dict(parts.generation_defaults),
            eos_token_ids=tuple(parts.engine.info.eos_token_ids),
            block_size=args.block_size,
            num_blocks=parts.plan.num_blocks,
            notes=tuple(parts.notes),
        )

    @classmethod
    async def open(cls, engine_kwargs: Mapping[str, Any]) -> EngineWorkers:
        """Load a model. Raises what `LLM` does."""
        args = EngineArgs.from_kwargs(**engine_kwargs)
        return cls(await in_thread(lambda: build_engine(args), EngineParts.close))

    @property
    def info(self) -> WorkersInfo:
        """See Workers."""
        return self._info

    async def run(self, item: WorkItem) -> RequestOutput:
        """See Workers."""
        prompt, adds_special_tokens = _prompt_of(item, self.template)
        outputs = self._llm.generate(
            prompt, item.params, kind="final", add_special_tokens=adds_special_tokens
        )
        found = None
        async for output in outputs:
            found = output
        assert found is not None
        return found

    async def close(self) -> None:
        """See Workers."""
        await asyncio.to_thread(self._llm.shutdown)


class _Replica:
    """One engine in a process of its own, and how much it has to do."""

    def __init__(self, number: int, child: EngineChild, client: ProcessEngineClient) -> None:
        self.number = number
        self.child = child
        self.client = client
        self.num_open = 0  # sequences


class ReplicaWorkers:
    """Several engines that share the items between them."""

    def __init__(self, replicas: list[_Replica], info: EngineClientInfo) -> None:
        self._replicas = replicas
        self._numbers = itertools.count(1)
        self._groups: OrderedDict[str, _Replica] = OrderedDict()
        self._told: set[int] = set()  # replicas whose end was logged
        self.tokenizer: Tokenizer | None = None
        self.template: ChatTemplate | None = None
        if info.tokenizer_path is not None:
            self.tokenizer = Tokenizer.from_folder(info.tokenizer_path, info.trust_remote_code)
        if self.tokenizer is not None:
            self.template = ChatTemplate.for_tokenizer(self.tokenizer, info.chat_template)
        names = {field.name for field in dataclasses.fields(WorkersInfo)}
        facts = {field.name: getattr(info, field.name) for field in dataclasses.fields(info)}
        facts = {name: value for name, value in facts.items() if name in names}
        facts["max_num_seqs"] = info.max_num_seqs * len(replicas)
        self._info = WorkersInfo(num_replicas=len(replicas), **facts)

    @classmethod
    async def open(
        cls, engine_kwargs: Mapping[str, Any], count: int, *, log_level: str = "warning"
    ) -> ReplicaWorkers:
        """Start `count` processes and wait until all of them have loaded the model.

        Call it in the main thread: on Linux a child ends with the thread that started it. Raises
        ConfigError where the machine has not as many devices, and whatever ended a replica's loading.
        """
        missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise OctavoError(f"several replicas need {', '.join(missing)}: pip install 'octavo[server]'")
        args = EngineArgs.from_kwargs(**engine_kwargs)
        parts = shares(args, count)
        replicas: list[_Replica] = []
        try:
            for number, share in enumerate(parts):
                replicas.append(await _start(number, engine_kwargs, share, log_level))
            infos = await asyncio.gather(*(replica.client.wait_ready() for replica in replicas))
            return cls(replicas, infos[0])
        except BaseException:
            await _end(replicas)
            raise

    @property
    def info(self) -> WorkersInfo:
        """See Workers."""
        return self._info

    @property
    def process_ids(self) -> list[int]:
        """Of the replicas, in their order; the dead ones too."""
        return [replica.child.process.pid for replica in self._replicas]

    async def run(self, item: WorkItem) -> RequestOutput:
        """See Workers. An item whose replica ends is done again by another one."""
        prompt, continues = _prompt_of(item, self.template)
        text: str | None = None
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError(
                    "a text needs a tokenizer, and this model has none; give token ids", "prompt"
                )
            text, token_ids = prompt, self.tokenizer.encode(prompt, add_special_tokens=continues)
        else:
            token_ids = prompt
        while True:
            replica = self._choose(item.group)
            try:
                return await self._run_on(replica, item, token_ids, text, continues)
            except EngineDeadError as error:
                if replica.client.is_alive:
                    raise
                self._tell(replica, error)

    async def _run_on(
        self, replica: _Replica, item: WorkItem, token_ids: list[int], text: str | None, continues: bool
    ) -> RequestOutput:
        replica.num_open += item.params.num_samples
        try:
            outputs = replica.client.generate(
                token_ids,
                item.params,
                request_id=f"{item.key}/{next(self._numbers)}",
                arrival_time=time.monotonic(),
                kind="final",
                continue_prompt=continues,
                prompt=text,
            )
            found = None
            async for output in outputs:
                found = output
            assert found is not None
            return found
        finally:
            replica.num_open -= item.params.num_samples

    def _choose(self, group: str | None) -> _Replica:
        """The replica with least to do, or the one that knows the group, unless it has much more to do."""
        alive = [replica for replica in self._replicas if replica.client.is_alive]
        if not alive:
            raise EngineDeadError("every replica has ended; the log says why")
        least = min(alive, key=lambda replica: replica.num_open)
        if group is None:
            return least
        known = self._groups.get(group)
        if known is not None and known.client.is_alive:
            room = max(4, known.client.info.max_num_seqs // 4)
            if known.num_open <= least.num_open + room:
                self._groups.move_to_end(group)
                return known
        self._groups[group] = least
        self._groups.move_to_end(group)
        if len(self._groups) > GROUPS_REMEMBERED:
            self._groups.popitem(last=False)
        return least

    def _tell(self, replica: _Replica, error: EngineDeadError) -> None:
        if replica.number not in self._told:
            self._told.add(replica.number)
            num_left = sum(other.client.is_alive for other in self._replicas)
            logger.error("replica %d: %s; its work goes to the %d left", replica.number, error, num_left)

    async def close(self) -> None:
        """See Workers."""
        await _end(self._replicas)


async def open_workers(
    engine_kwargs: Mapping[str, Any], *, data_parallel_size: int = 1, log_level: str = "warning"
) -> EngineWorkers | ReplicaWorkers:
    """Load a model for offline work: in this process, or in as many others.

    engine_kwargs: as for `LLM`. Raises what `LLM` does, and ConfigError for too many replicas.
    """
    if data_parallel_size < 1:
        raise ConfigError(f"data_parallel_size must be at least 1, not {data_parallel_size}")
    platform.prepare_environment()
    if data_parallel_size == 1:
        return await EngineWorkers.open(engine_kwargs)
    return await ReplicaWorkers.open(engine_kwargs, data_parallel_size, log_level=log_level)


def _prompt_of(item: WorkItem, template: ChatTemplate | None) -> tuple[str | list[int], bool]:
    """(text or token ids, whether special tokens go before it). Raises RequestError."""
    prompt: Any = item.prompt
    if isinstance(prompt, str) or not prompt or not isinstance(prompt[0], Mapping):
        return prompt, item.add_special_tokens
    if template is None:
        raise RequestError("chat needs a tokenizer with a template, and this model has none", "messages")
    return template.render(prompt), False


async def _start(number: int, engine_kwargs: Mapping[str, Any], share: Share, log_level: str) -> _Replica:
    from octavo.server.base_client import Limits
    from octavo.server.engine_child import EngineChild
    from octavo.server.metrics import ServerMetrics
    from octavo.server.process_client import ProcessEngineClient

    # Only the first one's log is shown: what the others load is the same.
    child = EngineChild.start(
        {**engine_kwargs, **share.options},
        log_level=log_level if number == 0 else "error",
        variables=share.variables,
    )
    client = ProcessEngineClient(child, Limits(max_queue=NO_LIMIT), ServerMetrics(), engine_timeout=600.0)
    replica = _Replica(number, child, client)
    await client.connect()
    return replica


async def _end(replicas: list[_Replica]) -> None:
    await asyncio.gather(*(replica.client.shutdown() for replica in replicas), return_exceptions=True)
    for replica in replicas:
        replica.child.kill()


def _are_workers(engine: EngineWorkers, replicas: ReplicaWorkers) -> tuple[Workers, Workers]:
    """For the type checker: both keep to the protocol."""
    return engine, replicas
