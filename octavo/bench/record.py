"""What a run leaves behind: one record a request, one summary, one JSON file.

The file's keys are a contract with everybody who reads results later, so they are written down here and
nowhere else, and `schema_version` changes when one of them changes its meaning. Times are seconds. Moments
are seconds since the start of the measured part (its *origin*), which the monitor's snapshots share; the
warm-up lies before it. What was not measured is None, never zero.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from octavo.errors import ConfigError, OctavoError

SCHEMA_VERSION = 1
ENGINES_WITHOUT_SUFFIX = ("transformers",)


@dataclass
class RequestRecord:
    """One request, as its caller saw it.

    `scheduled_time` is when the load wanted it sent, `sent_time` when it was sent. Latencies count from the
    scheduled moment where the load is open (requests come at their own times) and from sending where it is
    closed. `arrivals` has one `(moment, tokens)` for each piece of the answer that arrived.
    """

    index: int
    prompt_id: str = ""
    repeat: int = 0
    prompt_tokens: int | None = None
    generated_tokens: int = 0
    tokens_estimated: bool = False  # counted by tokenizing the text again, not by the engine
    scheduled_time: float = 0.0
    sent_time: float | None = None
    first_token_time: float | None = None
    end_time: float | None = None
    ttft: float | None = None
    tpot: float | None = None
    latency: float | None = None
    queue_time: float | None = None  # from the same start to the engine's first step, where it tells
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    drafted: int | None = None  # None: this engine does not tell, or does not speculate
    accepted: int | None = None
    num_verifications: int | None = None  # steps that brought tokens, those without a draft included
    drafted_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)
    reached_by_position: list[int] = field(default_factory=list)  # all drafts before it were accepted
    cached_tokens: int | None = None
    num_preemptions: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    output_sha256: str | None = None  # of the token ids where they are known, otherwise of the text
    output_token_ids: list[int] | None = None
    output_text: str | None = None

    @property
    def ok(self) -> bool:
        """True if the request was answered to its end."""
        return self.error is None

    @property
    def itl(self) -> list[float]:
        """Gaps between successive arrivals, in seconds; several tokens that come at once make one gap."""
        moments = [moment for moment, _ in self.arrivals]
        return [after - before for before, after in itertools.pairwise(moments)]

    def derive(self, *, open_loop: bool) -> None:
        """Fill in what follows from the moments and the output: latencies, tpot, the hash."""
        start = self.scheduled_time if open_loop or self.sent_time is None else self.sent_time
        if self.first_token_time is not None:
            self.ttft = self.first_token_time - start
        if self.end_time is not None:
            self.latency = self.end_time - start
        self.derive_tpot()
        self.output_sha256 = output_hash(self.output_token_ids, self.output_text)

    def derive_tpot(self) -> None:
        """Time per output token after the first; None for fewer than two."""
        self.tpot = None
        if self.ttft is not None and self.latency is not None and self.generated_tokens > 1:
            self.tpot = (self.latency - self.ttft) / (self.generated_tokens - 1)


def output_hash(token_ids: Sequence[int] | None, text: str | None) -> str | None:
    """SHA-256 of token ids (as decimal numbers with commas) or, where there are none, of the text."""
    if token_ids is not None:
        return hashlib.sha256(",".join(map(str, token_ids)).encode()).hexdigest()
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


@dataclass
class RunResult:
    """One run of one engine with one method: what the result file holds.

    `summary` is made by `octavo.bench.metrics`, `gpu_monitoring` by the monitor.
    """

    engine: str
    method: str
    effective_config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    requests: list[RequestRecord] = field(default_factory=list)
    engine_metrics: dict[str, Any] = field(default_factory=dict)
    gpu_monitoring: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def failures(self) -> list[RequestRecord]:
        """The requests that were not answered."""
        return [record for record in self.requests if not record.ok]

    @property
    def valid(self) -> bool:
        """False if the client could not keep up, so that its figures say nothing of the engine."""
        return bool(self.summary.get("client", {}).get("valid", True))

    @property
    def exit_code(self) -> int:
        """1 if a request failed, none was made, or the client could not keep up; otherwise 0."""
        return int(bool(self.failures) or not self.requests or not self.valid)

    def to_json(self) -> dict[str, Any]:
        """As plain data, the keys in the order in which a reader wants them."""
        names = [f.name for f in fields(self) if f.name not in ("schema_version", "requests")]
        plain: dict[str, Any] = {"schema_version": self.schema_version}
        for name in names:
            plain[name] = getattr(self, name)
            if name == "summary":
                plain["requests"] = [asdict(record) for record in self.requests]
        whole: dict[str, Any] = rounded(plain)
        return whole

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> RunResult:
        """The other way round. Raises ConfigError for what is no result, or one of another version."""
        version = plain.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ConfigError(
                f"this is no result file of schema_version {SCHEMA_VERSION} (it says {version!r}); "
                "make it again with this version of Octavo"
            )
        known = {f.name for f in fields(RequestRecord)}
        records = []
        for item in plain.get("requests", []):
            record = RequestRecord(**{key: value for key, value in item.items() if key in known})
            record.arrivals = [(moment, tokens) for moment, tokens in record.arrivals]
            records.append(record)
        names = {f.name for f in fields(cls)} - {"requests"}
        missing = sorted(names - set(plain))
        if missing:
            raise ConfigError(f"the result file lacks {', '.join(missing)}")
        return cls(**{name: plain[name] for name in names}, requests=records)


def rounded(value: Any) -> Any:
    """Floats to a microsecond (or six digits behind the point), so that files stay small and readable."""
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            return None if value != value else str(value)
        return round(value, 6) if abs(value) >= 1e-3 or value == 0 else float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {str(key): rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return value


# ---------------------------------------------------------------------- files


def result_path(output: str | Path, method: str, engine: str) -> Path:
    """`<stem>_<method>.json` for transformers, `<stem>_<method>_<engine>.json` for every other engine."""
    path = Path(output)
    stem = path.name[: -len(path.suffix)] if path.suffix else path.name
    parts = [stem, method] if engine in ENGINES_WITHOUT_SUFFIX else [stem, method, engine]
    name = re.sub(r"[^\w.+-]+", "-", "_".join(parts))
    return path.with_name(f"{name}{path.suffix or '.json'}")


def check_writable(path: Path, *, force: bool = False) -> None:
    """Raise ConfigError if a result could not be written to `path`; to be asked before anything is loaded."""
    if path.exists() and not force:
        raise ConfigError(
            f"{path} exists already, and results are not overwritten: give another --output "
            "(OUTPUT_FILE), or --force"
        )
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give --output the name of a file")
    folder = path.parent
    if not folder.is_dir():
        raise ConfigError(f"the folder {folder} of --output does not exist; make it first")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"the folder {folder} of --output cannot be written to")


def save(result: RunResult, path: str | Path, *, force: bool = False) -> Path:
    """Write a result; the file is there complete or not at all. Raises ConfigError if it exists."""
    path = Path(path)
    check_writable(path, force=force)
    text = json.dumps(result.to_json(), ensure_ascii=False, allow_nan=False, indent=1)
    write_whole(path, text + "\n")
    return path


def write_whole(path: Path, text: str) -> None:
    """Write beside the file, then take its place."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load(path: str | Path) -> RunResult:
    """Read a result file. Raises OctavoError if it is missing or damaged, ConfigError if it is no result."""
    try:
        plain = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no result file {path}") from None
    except (OSError, ValueError) as error:
        raise OctavoError(f"{path} cannot be read as a result file: {error}") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"{path} is no result file: it holds a {type(plain).__name__}")
    try:
        return RunResult.from_json(plain)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no result file: {error}") from None
