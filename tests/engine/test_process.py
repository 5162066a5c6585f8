"""The engine's process from inside: its outbox, its grammar desk and its loop, over a real socket."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from octavo.engine import wire
from octavo.engine.grammar_desk import CompileJob, GrammarDesk
from octavo.engine.outbox import Outbox, Recipient
from octavo.engine.process import EngineProcess, FrameSource
from octavo.errors import RequestError
from octavo.outputs import CompletionOutput, RequestOutput
from octavo.sampling_params import SamplingParams
from tests.engine.fakes import fake_engine, word_tokenizer

START = wire.Start({}, "info", 10.0, 0.05)


class FrontEnd:
    """The other end of the socket: sends commands, reads what comes."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(30)
        self._sock = sock
        self._source = FrameSource(sock)

    def send(self, message: wire.Message) -> None:
        self._sock.sendall(wire.frame(message))

    def next(self, kind: type[Any]) -> Any:
        """The next message of this kind; heartbeats and others before it are passed over."""
        while (body := self._source.next()) is not None:
            message = wire.read_from_engine(body)
            if isinstance(message, kind):
                return message
        raise AssertionError("the engine has closed the socket")

    def outputs_of(self, key: int) -> list[wire.WireAnswer]:
        """Answers of one request up to its last."""
        found: list[wire.WireAnswer] = []
        while True:
            for output in self.next(wire.Outputs).outputs:
                if output.key == key:
                    found += output.answers
                    if output.metrics is not None:
                        return found


class Running:
    """An EngineProcess around the fake engine, its loop in a thread."""

    def __init__(self, **options: Any) -> None:
        ours, theirs = socket.socketpair()
        self.front = FrontEnd(ours)
        self.sockets = (ours, theirs)
        self.engine = fake_engine(tokenizer=word_tokenizer(), **options)
        self.process = EngineProcess(theirs, START)
        self.process._engine = self.engine
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        try:
            self.process._serve(self.engine)
        except BaseException as error:
            self.error = error

    def take(self, message: wire.ToEngine) -> None:
        """As the reader's thread does."""
        self.process._take(message)


@pytest.fixture
def running() -> Iterator[Running]:
    found = Running()
    yield found
    found.take(wire.Shutdown())
    found.thread.join(30)
    found.process.outbox.close()
    for sock in found.sockets:
        sock.close()


def admit(key: int, max_tokens: int = 4, kind: str = "delta", **params: Any) -> wire.Admit:
    given = wire.params_to_wire(SamplingParams(max_tokens=max_tokens, **params))
    return wire.Admit(key, [1, 2, 3], given, kind, True, time.monotonic())


def test_a_request_is_served_in_deltas_or_whole(running: Running) -> None:
    running.take(admit(1, seed=5))
    deltas = running.front.outputs_of(1)
    running.take(admit(2, kind="final", seed=5))
    (whole,) = running.front.outputs_of(2)
    assert "".join(answer.text for answer in deltas) == whole.text != ""
    assert [token for answer in deltas for token in answer.token_ids] == whole.token_ids
    assert whole.finish_reason == "length"


def test_a_bad_request_is_refused_and_the_others_go_on(running: Running) -> None:
    running.take(wire.Admit(1, [], {}, "delta", True, 0.0))
    assert running.front.next(wire.Refused).kind == "RequestError"
    running.take(wire.Admit(2, [1], {"temperature": "hot"}, "delta", True, 0.0))
    refused = running.front.next(wire.Refused)
    assert (refused.key, refused.param) == (2, "temperature")
    running.take(wire.Admit(3, [1], {"best_of": 2}, "delta", True, 0.0))  # cannot stream: known at admission
    assert running.front.next(wire.Refused).param == "best_of"
    running.take(admit(4))
    assert running.front.outputs_of(4)


def test_an_abort_frees_all(running: Running) -> None:
    running.take(admit(1, max_tokens=90, ignore_eos=True))
    running.front.next(wire.Outputs)
    running.take(wire.Abort([1, 77]))
    running.take(wire.GetStats(5, True))
    found = running.front.next(wire.Stats)
    assert (found.serial, found.fault) == (5, None)
    assert (found.stats.num_running, found.stats.num_used_blocks) == (0, 0)


def test_a_fault_in_the_books_is_told(running: Running) -> None:
    running.engine.scheduler._slots._free.pop()
    running.take(wire.GetStats(1, True))
    assert "slot" in running.front.next(wire.Stats).fault
    running.engine.scheduler._slots._free.append(0)


def test_heartbeats_come_while_nothing_happens(running: Running) -> None:
    beats = [running.front.next(wire.Heartbeat) for _ in range(3)]
    assert all(beat.step_seconds == 0 for beat in beats)


def test_a_heartbeat_tells_of_a_step_without_end() -> None:
    found = Running(delay=0.5)
    found.take(admit(1, max_tokens=2))
    deadline = time.monotonic() + 30
    while found.front.next(wire.Heartbeat).step_seconds < 0.1:
        assert time.monotonic() < deadline
    found.front.outputs_of(1)
    found.take(wire.Shutdown())
    found.thread.join(30)
    found.process.outbox.close()
    for sock in found.sockets:
        sock.close()


def test_a_step_that_fails_ends_the_loop() -> None:
    found = Running(fail_at=1)
    found.take(admit(1))
    found.thread.join(30)
    assert "flames" in str(found.error)
    found.process.outbox.close()
    for sock in found.sockets:
        sock.close()


def test_outputs_that_wait_for_the_socket_are_joined() -> None:
    ours, theirs = socket.socketpair()
    outbox = Outbox(theirs, 60.0, lambda: 0.0, lambda: None)
    front = FrontEnd(ours)
    front.next(wire.Heartbeat)
    # Nobody reads: fill the socket until the sender is stuck, then go on posting.
    big = "x" * 200_000
    requests = {key: Recipient(key, is_delta=True) for key in (1, 2)}

    def output(text: str, tokens: list[int]) -> RequestOutput:
        return RequestOutput("r", None, [1], outputs=[CompletionOutput(0, text, tokens)])

    for _ in range(4):
        outbox.post_outputs([(requests[1], output(big, [0]))])
        time.sleep(0.02)
    for index in range(100):
        outbox.post_outputs([(requests[2], output("a", [index]))])
    assert len(outbox._outputs) <= 2  # not a hundred
    answers: list[wire.WireAnswer] = []
    messages = 0
    while sum(len(answer.token_ids) for answer in answers) < 100:
        for found in front.next(wire.Outputs).outputs:
            if found.key == 2:
                messages += 1
                answers += found.answers
    assert messages < 100
    assert [token for answer in answers for token in answer.token_ids] == list(range(100))
    assert "".join(answer.text for answer in answers) == "a" * 100
    outbox.close()
    ours.close()
    theirs.close()


def test_a_grammar_that_takes_too_long_is_refused_in_time() -> None:
    release = threading.Event()
    compiled: list[int] = []
    refused: list[tuple[int, Exception]] = []

    def compile_job(job: CompileJob) -> None:
        release.wait(30)
        desk.take(job.admit.key, lambda: compiled.append(job.admit.key))

    desk = GrammarDesk(compile_job, lambda key, error: refused.append((key, error)))
    params, now = SamplingParams(), time.monotonic()
    desk.add(CompileJob(admit(1), params, now - 1.0))  # late already
    desk.add(CompileJob(admit(2), params, now + 60.0))
    desk.add(CompileJob(admit(3), params, now + 60.0))
    desk.expire()
    desk.expire()
    ((key, error),) = refused
    assert key == 1
    assert isinstance(error, RequestError)
    assert "grammar-timeout" in str(error)
    assert desk.take(3)  # its client has gone
    release.set()
    deadline = time.monotonic() + 30
    while compiled != [2]:
        assert time.monotonic() < deadline, compiled
        time.sleep(0.01)
    time.sleep(0.05)
    assert compiled == [2]  # neither the late one nor the aborted one
