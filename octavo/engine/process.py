"""An engine in a process of its own, at the other end of a socket.

Three threads, so that nothing outside ever holds up a step of the model:

    main      builds the engine, then only steps: commands in between, outputs to the outbox
    reader    decodes what the front end sends, checks requests, and ends the process with the socket
    sender    encodes and sends; while the socket is full, later outputs of a request join earlier ones

and a fourth, `GrammarDesk`, where grammars are compiled. The process ends when the front end does (end
of the socket, and on Linux the kernel's word), when it is told to, or when a step fails: then the cause
is the last message.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from octavo import hub
from octavo.config import EngineArgs
from octavo.engine import wire
from octavo.engine.energy_account import measure_energy
from octavo.engine.grammar_desk import CompileJob, GrammarDesk
from octavo.engine.outbox import Outbox, Recipient
from octavo.errors import OctavoError
from octavo.outputs import RequestOutput
from octavo.platform import prepare_environment
from octavo.platform.head_start import head_start
from octavo.platform.process import die_with_parent, name_process
from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    from octavo.engine.engine import Engine
    from octavo.engine.request_reader import PreparedRequest
    from octavo.engine.setup import EngineParts

logger = logging.getLogger("octavo")

_CHUNK = 1 << 16


@dataclass(slots=True)
class _Prepared:
    """A checked request, on its way to the main thread."""

    admit: wire.Admit
    request: PreparedRequest


class EngineProcess:
    """The loop around a built engine."""

    def __init__(self, sock: socket.socket, start: wire.Start) -> None:
        self._sock = sock
        self._start = start
        self._commands: queue.SimpleQueue[_Prepared | wire.Abort | wire.GetStats | wire.Shutdown] = (
            queue.SimpleQueue()
        )
        self._open: dict[str, Recipient] = {}  # by the engine's request id
        self._step_began: float | None = None
        self._engine: Engine | None = None
        self._desk = GrammarDesk(self._compile, self._refuse)
        self.outbox = Outbox(sock, start.heartbeat_interval, self._step_seconds, self._desk.expire)

    # ------------------------------------------------------------------ main thread

    def run(self, reader: FrameSource) -> None:
        """Build, then serve until told to end. Raises what ends it."""
        threading.Thread(target=self._read, args=(reader,), name="octavo-reader", daemon=True).start()
        args = EngineArgs.from_kwargs(**self._start.engine_args)
        prepare_environment()
        self.outbox.post(wire.Loading("looking for the model", None))
        # If it is missing that is known before torch is imported.
        model = hub.resolve(args.model, trust_remote_code=args.trust_remote_code)
        tokenizer = model if args.tokenizer is None else hub.resolve_tokenizer(args.tokenizer)
        self.outbox.post(wire.Found(str(model), str(tokenizer)))
        with head_start():
            from octavo.engine.setup import build_engine

        parts = build_engine(args, progress=lambda stage, part: self.outbox.post(wire.Loading(stage, part)))
        if (reason := measure_energy(parts)) is not None:
            logger.debug("energy is not measured: %s", reason)
        self._engine = parts.engine
        gc.freeze()  # collections need not look through all that was imported and loaded
        self.outbox.post(ready_message(parts))
        try:
            self._serve(parts.engine)
        finally:
            parts.close()

    def _serve(self, engine: Engine) -> None:
        while True:
            # Idle: wait for a command. Busy: take what is there and go on.
            while not self._commands.empty() or not engine.has_work():
                command = self._commands.get()
                if isinstance(command, wire.Shutdown):
                    return
                self._obey(engine, command)
            self._step_began = time.monotonic()
            outputs = engine.step()
            self._step_began = None
            if outputs:
                self._deliver(outputs)

    def _obey(self, engine: Engine, command: _Prepared | wire.Abort | wire.GetStats) -> None:
        if isinstance(command, _Prepared):
            self._admit(engine, command)
        elif isinstance(command, wire.Abort):
            for key in command.keys:
                if self._open.pop(str(key), None) is not None:
                    engine.abort(str(key))
                self.outbox.forget(key)
        else:
            fault = None
            if command.check_integrity:
                try:
                    engine.scheduler.check_integrity()
                except AssertionError as error:
                    fault = str(error) or "check_integrity failed"
            self.outbox.post(wire.Stats(command.serial, engine.stats(), fault))

    def _admit(self, engine: Engine, prepared: _Prepared) -> None:
        admit = prepared.admit
        name = str(admit.key)
        try:
            engine.admit(name, prepared.request, admit.kind, arrival_time=admit.arrival_time)  # type: ignore[arg-type]
        except Exception as error:  # this request's alone: nothing of it was kept
            self._refuse(admit.key, error)
            return
        self._open[name] = Recipient(admit.key, admit.kind == "delta")

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        found = []
        for output in outputs:
            name = output.request_id
            request = self._open.pop(name, None) if output.finished else self._open.get(name)
            if request is not None:
                found.append((request, output))
        self.outbox.post_outputs(found)

    # ------------------------------------------------------------------ any thread

    def _step_seconds(self) -> float:
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def _refuse(self, key: int, error: Exception) -> None:
        if not isinstance(error, OctavoError):
            logger.error("a request failed on its way in; the others go on", exc_info=error)
        self.outbox.post(wire.Refused(key, type(error).__name__, str(error), getattr(error, "param", None)))

    # ------------------------------------------------------------------ reader and grammar threads

    def _read(self, reader: FrameSource) -> None:
        """Until the socket ends; then the whole process does, in the middle of a step if need be."""
        try:
            while (body := reader.next()) is not None:
                self._take(wire.read_to_engine(body))
        except (OSError, ValueError, msgspec.DecodeError) as error:
            logger.error("the engine cannot read what the server sends: %s", error)
        os._exit(1)

    def _take(self, message: wire.ToEngine) -> None:
        if self._engine is None:  # still loading: nothing is served yet, and nothing would be lost
            if isinstance(message, wire.Shutdown):
                os._exit(0)
            raise ValueError(f"{type(message).__name__} before the engine was ready")
        if isinstance(message, wire.Admit):
            self._prepare(message)
        elif isinstance(message, wire.Abort):
            for key in message.keys:
                self._desk.take(key)
            self._commands.put(message)
        elif isinstance(message, (wire.GetStats, wire.Shutdown)):
            self._commands.put(message)
        else:
            raise ValueError(f"{type(message).__name__} out of place")

    def _prepare(self, admit: wire.Admit) -> None:
        try:
            params = SamplingParams(**admit.params)
            if params.structured_outputs is None:
                self._commands.put(_Prepared(admit, self._checked(admit, params)))
                return
            timeout = self._start.grammar_timeout
            deadline = time.monotonic() + timeout if timeout else float("inf")
            self._desk.add(CompileJob(admit, params, deadline))
        except Exception as error:
            self._refuse(admit.key, error)

    def _checked(self, admit: wire.Admit, params: SamplingParams) -> PreparedRequest:
        assert self._engine is not None
        return self._engine.read_request(
            {"prompt_token_ids": admit.prompt_ids}, params, add_special_tokens=admit.continue_prompt
        )

    def _compile(self, job: CompileJob) -> None:
        key = job.admit.key
        try:
            prepared = _Prepared(job.admit, self._checked(job.admit, job.params))
        except Exception as error:
            if self._desk.take(key):
                self._refuse(key, error)
            return
        # An abort that comes after this finds the request in the queue before it.
        self._desk.take(key, lambda: self._commands.put(prepared))


def ready_message(parts: EngineParts) -> wire.Ready:
    """What the front end must know of a loaded engine."""
    config, info = parts.config, parts.engine.info
    args = config.args
    return wire.Ready(
        model=args.model,
        model_path=str(config.model_path),
        tokenizer_path=None if parts.engine.tokenizer is None else str(config.tokenizer_path),
        chat_template=args.chat_template,
        trust_remote_code=args.trust_remote_code,
        max_model_len=info.max_model_len,
        vocab_size=info.vocab_size,
        eos_token_ids=tuple(info.eos_token_ids),
        dtype=config.dtype,
        max_num_seqs=config.max_num_seqs,
        block_size=args.block_size,
        num_blocks=parts.plan.num_blocks,
        speculative_method=None if config.speculative is None else config.speculative.method,
        generation_defaults=dict(parts.generation_defaults),
        notes=tuple(parts.notes),
    )


class FrameSource:
    """Whole messages from a blocking socket, one after another."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._frames = wire.FrameReader()
        self._ready: deque[bytes] = deque()

    def next(self) -> bytes | None:
        """The next body; None at the end of the socket."""
        while not self._ready:
            data = self._sock.recv(_CHUNK)
            if not data:
                return None
            self._ready.extend(self._frames.feed(data))
        return self._ready.popleft()


def main(fd: int, parent: int) -> None:
    """Serve the socket with this file descriptor until it ends; never returns."""
    # The front end decides when this process ends; a Ctrl-C in the terminal reaches both.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent(parent)
    name_process("octavo-engine")
    sock = socket.socket(fileno=fd)
    reader = FrameSource(sock)
    body = reader.next()
    if body is None:
        os._exit(1)
    start = wire.read_to_engine(body)
    if not isinstance(start, wire.Start):
        raise SystemExit("the first message must be Start")
    _show_log(start.log_level)
    process = EngineProcess(sock, start)
    code = 0
    try:
        process.run(reader)
    except BaseException as error:  # the front end must hear of it, whatever it is
        code = 1
        if not isinstance(error, OctavoError):
            logger.critical("the engine has failed", exc_info=error)
        process.outbox.post(wire.Failed(type(error).__name__, str(error) or type(error).__name__))
    process.outbox.close()
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)  # daemon threads and a device's own threads are not waited for


def _show_log(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("octavo: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False
