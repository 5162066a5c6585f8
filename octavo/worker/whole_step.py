"""A step of few rows as one graph: inputs, forward, head, draw and verdict.

The host writes the step's rows into page-locked memory, launches the graph, and finds the tokens in
page-locked memory when the device is done. Requests that draw by temperature alone, or greedily, need
nothing else. Where one filters, is penalised, masked or asks for log-probabilities, or where a short
chunk of a prompt lies among the rows, the same graph ends with the logits, and what the step needs
beside them is launched behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from octavo.core.messages import SchedulerOutput
from octavo.kernels.triton import sample
from octavo.kernels.triton import whole_step as kernels
from octavo.kernels.triton.step import StepOutputs
from octavo.models.decoder import CausalLM
from octavo.sampling.noise import Stream
from octavo.speculation.acceptance import SyntheticAcceptance
from octavo.worker.cuda_graph import CudaGraphs, StepBuffers
from octavo.worker.gpu_step import GpuStep, slot_tables
from octavo.worker.graph_sizes import SHORT_ROWS, GraphKey
from octavo.worker.step_math import StepInputs, Verdict


@dataclass(slots=True)
class WholeStep:
    """A step whose graph was launched."""

    inputs: StepInputs
    hidden: torch.Tensor  # [num_tokens, hidden]
    logits: torch.Tensor | None  # [L, vocab_size] float32; None if nothing is sampled
    verdict: Verdict | None  # None: the draw is still to come


class WholeSteps:
    """What lies around the forward in the graphs of short steps, and their launches."""

    def __init__(
        self,
        steps: GpuStep,
        buffers: StepBuffers,
        model: CausalLM,
        most_rows: int,
        synthetic: SyntheticAcceptance | None,
    ) -> None:
        """`most_rows`: of the largest graph that ends with a verdict."""
        self._state = state = steps.state
        self._steps, self._buffers, self._model = steps, buffers, model
        self.most_rows = most_rows
        self._most_reqs = min(most_rows, len(buffers.seq_lens))
        self._memory = kernels.WholeStepMemory.allocate(most_rows, self._most_reqs, state.device)
        self._ring = self._memory.ring.numpy()
        self._turn = 0  # steps launched; the device counts along
        self._counters = torch.zeros(most_rows, dtype=torch.int32, device=state.device)
        self._stop_ids = state.stop_ids  # the table that the graphs read
        self._coins: kernels.Coins | None = None
        if synthetic is not None:
            rates = synthetic.rates_of(kernels.TOKENS).to(state.device)
            self._coins = kernels.Coins(synthetic.coins, rates)
        self._outputs = StepOutputs(
            buffers.input_ids, buffers.positions, buffers.slot_mapping, buffers.query_start_loc,
            buffers.seq_lens, buffers.table_rows, self._memory.num_valid, self._memory.logits_rows,
            self._memory.draw_positions,
        )  # fmt: skip

    def start_over(self) -> None:
        """The device has carried out no step so far, whatever was sent."""
        self._turn = 0
        self._memory.turn.zero_()

    def covers(self, key: GraphKey) -> bool:
        """See StepTail."""
        return not key.has_chunk and key.rows <= self.most_rows

    def empty_step(self) -> None:
        """See StepTail."""
        self._next_place(0, 0, False)

    def before(self, key: GraphKey) -> None:
        """See StepTail."""
        kernels.prepare(
            self._memory, slot_tables(self._state), self._steps.draws, self._outputs, key.rows,
            min(key.rows, self._most_reqs),
        )  # fmt: skip

    def behind(self, key: GraphKey, hidden: torch.Tensor) -> torch.Tensor:
        """See StepTail."""
        memory, rows = self._memory, key.rows
        logits = self._model.logits(hidden)
        sample.draw(
            logits, memory.temperature[:rows], seed=memory.seed[:rows], position=memory.draw_positions[:rows],
            stream=int(Stream.DRAW), out=memory.drawn[:rows], counters=self._counters[:rows],
            wanted=memory.facts[:1],
        )  # fmt: skip
        kernels.finish(memory, slot_tables(self._state), self._coins, min(rows, self._most_reqs))
        return logits

    def launch(self, graphs: CudaGraphs, out: SchedulerOutput, only_draws: bool) -> WholeStep | None:
        """Launch the step's graph; None if there is none that ends with logits.

        `only_draws`: every row draws by temperature alone, and drafts are compared with what was drawn.
        """
        rows = self._steps.describe(out)
        if rows.longest > SHORT_ROWS or rows.num_tokens > self.most_rows:
            return None
        key = self._steps.graph_of(rows)
        if key is None or not (self.covers(key) and graphs.has(key)):
            return None
        num_reqs, count, memory = len(rows.table), rows.num_logits, self._memory
        draws = only_draws and rows.is_dense and self._state.stop_ids is self._stop_ids
        place = self._next_place(num_reqs, rows.num_tokens, draws)
        self._ring[place, kernels.HEADER : kernels.HEADER + rows.table.size] = rows.table.reshape(-1)
        hidden, logits = graphs.run(key)
        assert logits is not None
        self._steps.adopt(out, rows, memory.rows[:num_reqs])
        buffers = self._buffers
        inputs = StepInputs(
            input_ids=buffers.input_ids[: rows.num_tokens],
            positions=buffers.positions[: rows.num_tokens],
            metadata=None,
            num_valid=memory.num_valid[:num_reqs],
            logits_rows=memory.logits_rows[:count],
            logits_slots=rows.logits_slots,
            draw_positions=memory.draw_positions[:count],
        )
        verdict = None
        if draws:
            answers = memory.answers[place, :num_reqs]
            verdict = Verdict(answers[:, : rows.width], answers[:, kernels.TOKENS :].T)
            return WholeStep(inputs, hidden[: rows.num_tokens], None, verdict)
        if not count:
            return WholeStep(inputs, hidden[: rows.num_tokens], None, None)
        # a draw may write into them, and the graph's own do not know how many rows are padding
        logits = logits[:count] if rows.is_dense else logits[inputs.logits_rows]
        return WholeStep(inputs, hidden[: rows.num_tokens], logits, None)

    def time(self, graphs: CudaGraphs, rows: int) -> bool:
        """Launch a step of padding alone; False if there is no graph of this size that ends with logits."""
        key = graphs.sizes.graph_for(rows)
        if key is None or not (self.covers(key) and graphs.has(key)):
            return False
        self.empty_step()
        graphs.run(key)
        return True

    def _next_place(self, num_reqs: int, num_rows: int, draws: bool) -> int:
        place = self._turn % kernels.PLACES
        self._turn += 1
        self._ring[place, : kernels.HEADER] = (num_reqs, num_rows, draws, 0)
        return place
