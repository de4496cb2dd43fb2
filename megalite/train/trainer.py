"""The trainer: `train_step` is the whole mathematics of a step; all that only watches is a callback.

for metrics in Trainer(load_config("experiment=quickstart")):
    ...
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megalite.checkpoint.store import CheckpointStore
from megalite.comm import Communicator
from megalite.config.schema import Config
from megalite.errors import RunError
from megalite.mesh import AXES
from megalite.model.multi_token import counted
from megalite.model.transformer import Transformer
from megalite.pipeline.runtime import Pipeline
from megalite.precision import choose_precision
from megalite.train import build
from megalite.train.balance import Balance
from megalite.train.callback import Callback, StepMetrics
from megalite.train.evaluate import Evaluation, evaluate
from megalite.train.fp8_steps import Fp8Steps
from megalite.train.interrupt import Stopped, StopRequest
from megalite.train.loss_scale import LossScale
from megalite.train.memory import begin_measuring, measured_memory
from megalite.train.numerics import Numerics, sentence
from megalite.train.observers import make_observers
from megalite.train.resume import resume, rewind, training_state
from megalite.train.run_folder import RunFolder, check_free_space, run_path
from megalite.train.spikes import Spikes
from megalite.train.statistics import Statistics
from megalite.train.whole_model import gathered_model
from megalite.world import join, world_from_environment


class Trainer:
    """Builds a run from its configuration, resuming by itself; iterate to train. One instance a process.

    `step`: steps done. `facts`: what the header shows. Raises UserError for bad input before anything is trained.
    """

    def __init__(self, config: Config, callbacks: Sequence[Callback] | None = None) -> None:
        self.config = config
        self.world = world_from_environment()
        self.mesh = build.make_mesh(config, self.world)
        join(self.world)
        ordered, check = config.train.deterministic == "layout", config.parallel.check
        self.comm = Communicator(self.mesh, ordered=ordered, check=check)
        self.run_dir: Path = run_path(config)
        folders: list[RunFolder] = []
        self.comm.on_rank_zero(lambda: folders.append(RunFolder(config, self.world.attempt)))
        self._folder = folders[0] if folders else None
        try:
            self._build()
            watchers = make_observers(config) if callbacks is None else callbacks
        except BaseException:
            if self._folder is not None:
                self._folder.abandon()
            raise
        self.model: Transformer | None = None  # the whole model, at the end of a run that samples from it
        self.callbacks = [c for c in watchers if c.every_rank or self.mesh.rank == 0]

    def _build(self) -> None:
        config = self.config
        settled = build.settle_process(config, self.world)
        self.device = self.world.device
        self.precision = choose_precision(config.precision, self.device)
        self.data = build.make_data(config, self.comm)
        begin_measuring(self.device)
        self.vocab = config.model.vocab or self.data.tokenizer.vocab
        schedule = build.make_schedule(config, self.mesh)
        self.stages = build.make_stages(config, self.comm, self.vocab, schedule.placement, self.precision, self.device)
        self.gradients = build.make_gradients(config, self.comm, self.stages, self.precision)
        self.pipeline = Pipeline(self.stages, schedule, self.comm, self.gradients, config.train.z_loss)
        self.optimizer = build.make_optimizer(config, self.stages, self.gradients, self.precision)
        self.loss_scale = LossScale.of(config.precision, self.precision.scaled)
        self.balance = Balance(self.stages, self.comm, config.model)
        self.fp8 = Fp8Steps(self.stages, self.comm, whole=not build.shards_weights(config, self.mesh))
        self.numerics = Numerics(self.stages, self.pipeline, self.gradients, self.comm, config.debug.numerics)
        self.statistics = Statistics(self.stages, self.comm, config.log.statistics)
        self.store = CheckpointStore(self.run_dir / "checkpoints", self.comm, config.checkpoint.keep)
        state_bytes = self.optimizer.state_bytes()
        if config.checkpoint.every is not None:
            self.comm.on_rank_zero(lambda: check_free_space(self.run_dir, state_bytes))
        self.facts = build.run_facts(
            config, self.world, self.mesh, self.data, self.vocab, self.precision, self.stages, schedule
        )
        self.facts.update(run_dir=str(self.run_dir), set_by_engine=settled)
        self.spikes = Spikes.of(config.train)
        # Of this course, the last checkpoint whose turn it was, and its step.
        self.saved: tuple[int, Path] | None = None
        self.step = self.skipped_in_a_row = 0
        self.stopping = self.rewinding = False
        self.resumed = resume(self)
        self.start_step = self.step
        if self.resumed:
            self.facts["resumed_from"] = self.resumed.path

    def fit(self) -> None:
        """Train to the last step (or until asked to stop)."""
        for _ in self:
            pass

    def __iter__(self) -> Iterator[StepMetrics]:
        with StopRequest() as stop, ExitStack() as ends:
            self._begin(ends)
            while self.step < self.config.train.steps and not self.stopping:
                metrics = self._evaluated(self.train_step(stop.asked), lambda: stop.asked)
                for callback in self.callbacks:
                    callback.on_step(self, metrics)
                if self.rewinding:
                    rewind(self)
                elif self._checkpoint_due():
                    self.save()
                yield metrics
            if self.step >= self.config.train.steps and self.config.log.sample is not None:
                self.model = self.whole_model()

    def train_step(self, asked_to_stop: bool = False) -> StepMetrics:
        """One optimizer step over the global batch: accumulate, reduce, clip, update.

        The loss is divided by the number of valid tokens of the whole global batch before backward, so ranks and
        microbatches with fewer valid tokens weigh exactly what they should.
        """
        started = time.perf_counter()
        step = self.step + 1
        read = self._microbatches(step + self.spikes.skipped)
        valid = torch.stack([counted(batch, self.config.model.mtp) for batch in read]).sum(0)
        microbatches = [batch.to(self.device) for batch in read]
        data_s = time.perf_counter() - started
        self.comm.all_reduce(valid, "dp")
        tokens, *ahead = valid.clamp(min=1.0).tolist()

        self.gradients.zero()
        self.balance.begin()
        self.fp8.begin()
        self.numerics.begin()
        self.statistics.begin(step)
        scale = self.loss_scale.value
        with self.fp8.weights_kept():
            sums = self.pipeline.train(microbatches, tokens, ahead, scale)
        self.gradients.finish()
        self.numerics.end()
        (nll_sum, z_sum, *ahead_sums), stop = self._agreed(sums, asked_to_stop)
        loss, z_loss = nll_sum / tokens, z_sum / tokens
        grad_norm, routed = self.gradients.global_norm().item() / scale, self.balance.measure()
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        spike = self.spikes.see(loss, grad_norm) if finite else ""
        self.rewinding = bool(spike) and self._can_rewind(step)
        if finite and not self.rewinding:
            clip = self.config.optim.clip
            factor = (clip / grad_norm if 0 < clip < grad_norm else 1.0) / scale
            if factor != 1.0:
                self.gradients.scale(factor)
            self.optimizer.step(step)
            self.balance.update(routed)
        self.step, self.stopping = step, stop
        found = None if finite else self.numerics.first(sums)
        self._note_skip(finite, loss, grad_norm, found)
        if spike:
            self.event("spike", message=f"step {step}, {spike}", rewinds=self.rewinding)
        self.loss_scale.update(finite)
        self.fp8.update(finite, self.loss_scale.value / scale)
        metrics = self._measured(loss, z_loss, grad_norm, not finite, time.perf_counter() - started, data_s)
        further = [total / count for total, count in zip(ahead_sums, ahead, strict=True)]
        mtp_loss = sum(further) / len(further) if further else None
        scaled = scale if self.loss_scale.dynamic else None
        experts = self.balance.described(routed)
        metrics = replace(metrics, spike=spike or None, rewinds=self.spikes.rewinds or None, numerics=found)
        measured = self.statistics.measure()
        return replace(metrics, experts=experts, mtp_loss=mtp_loss, loss_scale=scaled, statistics=measured)

    def whole_model(self) -> Transformer | None:
        """The model as one process holds it, on rank 0; None elsewhere. A collective."""
        weights = self.optimizer.state_tensors()
        return gathered_model(self.config, self.comm, self.vocab, weights, self.precision.compute, self.device)

    def event(self, kind: str, **facts: Any) -> None:
        """Tell the callbacks about something rare; kept in events.jsonl."""
        for callback in self.callbacks:
            callback.on_event(self, {"kind": kind, "step": self.step, **facts})

    def save(self) -> Path:
        """Write this step's checkpoint; complete on disk when it returns."""
        started = time.perf_counter()
        if self._in_turn:
            self.saved = self.step, self.store.path(self.step)
        back_to = self.saved[1] if self.saved and self.spikes.limit else None
        path = self.store.save(self.step, *training_state(self), spared=back_to)
        self.event("save", path=str(path), seconds=round(time.perf_counter() - started, 3))
        return path

    def evaluate(self, max_batches: int = 0, asked_to_stop: Callable[[], bool] | None = None) -> list[Evaluation]:
        """Loss on every validation set, over all ranks. Raises Stopped when one of them is asked to stop."""
        self.fp8.begin()  # scales are those that a checkpoint of this instant would hold
        token_bytes = torch.as_tensor(self.data.token_bytes)
        samples = max_batches * self.config.train.global_batch
        # Not into a live line, which is on the terminal already.
        show = self.config.log.progress in ("auto", "lines") and not sys.stdout.isatty()
        where = (self.comm, self.config.train.micro_batch, self.device, samples, asked_to_stop, show)
        return [evaluate(self.pipeline.evaluate, v, token_bytes, *where) for v in self.data.validation]

    def _agreed(self, sums: torch.Tensor, asked_to_stop: bool) -> tuple[list[float], bool]:
        """Each column of `sums` over the global batch, and whether any rank is to stop.

        One slot a microbatch of the whole step, added up in their order: the bits do not depend on dp. tp ranks hold
        the same sums, so the first speaks for all.
        """
        ranks, place, columns = self.mesh.size("dp"), self.mesh.index("dp"), sums.shape[1]
        totals = torch.zeros(len(sums) * ranks * columns + 1, dtype=torch.float64)
        if self.mesh.index("tp") == 0:
            totals[:-1].view(len(sums), ranks, columns)[:, place] = sums
        totals[-1] = asked_to_stop
        self.comm.all_reduce(totals, *AXES)
        rows = totals[:-1].view(-1, columns).tolist()
        return [sum(column) for column in zip(*rows, strict=True)], bool(totals[-1] > 0)

    def _microbatches(self, number: int) -> list[Any]:
        """This rank's microbatches of global batch `number`, from 1, on the host. Their samples depend on that and on
        layout-free order alone."""
        micro, ranks = self.config.train.micro_batch, self.mesh.size("dp")
        first = (number - 1) * self.config.train.global_batch + self.mesh.index("dp") * micro
        starts = range(first, number * self.config.train.global_batch, micro * ranks)
        return [self.data.train.batch(range(start, start + micro)) for start in starts]

    @property
    def _microbatches_a_step(self) -> int:
        return self.config.train.global_batch // self.config.train.micro_batch

    def _begin(self, ends: ExitStack) -> None:
        """Dry run, the record of this start, and the observers; `ends` will call each on_end, whatever happens."""
        finished = self.step >= self.config.train.steps
        if self.config.train.dry_run and not finished:
            self.facts["predicted_step_s"] = self._dry_run()
        if self._folder is not None and not finished:
            self._folder.record(self.config, self.facts, self.start_step)
            self.data.tokenizer.save(self.run_dir / "tokenizer.json")
        for callback in reversed(self.callbacks):
            ends.callback(callback.on_end, self)
        for callback in self.callbacks:
            callback.on_start(self)
        if self.resumed:
            self.event("resume", **self.resumed.record())
        if finished:
            message = f"already finished: {self.step} of {self.config.train.steps} steps; raise train.steps to go on"
            self.event("warning", message=message)

    def _dry_run(self) -> float:
        """A throw-away microbatch, twice (of a pipeline: a step): memory and shape errors come now. Returns predicted
        seconds a step."""
        batches = [batch.to(self.device) for batch in self._microbatches(1)]
        whole = self.mesh.size("pp") > 1  # every rank must play its part
        rehearsed = self.pipeline if whole else self.pipeline.shortened(1)
        batches = batches if whole else batches[:1]
        seconds = 0.0
        for _ in range(1 if whole else 2):
            started = time.perf_counter()
            self.gradients.zero()
            tokens = float(batches[0].targets.numel())
            with self.fp8.weights_kept():
                rehearsed.train(batches, tokens, [tokens] * self.config.model.mtp)
            self.gradients.finish()
            seconds = time.perf_counter() - started
        return seconds * int(self.facts["accumulation"]) / len(batches)

    def _evaluated(self, metrics: StepMetrics, asked_to_stop: Callable[[], bool]) -> StepMetrics:
        """The same metrics with the first validation set's results, on steps that evaluate; a stop does not wait."""
        train = self.config.train
        if self.stopping or self.rewinding:
            return metrics
        last = self.step == train.steps and train.final_eval
        if not last and (train.eval_every == 0 or self.step % train.eval_every):
            return metrics
        try:
            results = self.evaluate(0 if last else train.eval_batches, asked_to_stop)
        except Stopped:
            self.stopping = True
            return metrics
        for result in results:
            self.event("evaluation", **result._asdict())
        if not results:
            return metrics
        measured = {"val_loss": results[0].loss, "val_bits_per_byte": results[0].bits_per_byte}
        return StepMetrics(**{**vars(metrics), **measured})

    def _checkpoint_due(self) -> bool:
        every, done = self.config.checkpoint.every, self.step == self.config.train.steps
        return every is not None and (self.stopping or done or self._in_turn)

    @property
    def _in_turn(self) -> bool:
        """Whether this step has a checkpoint of its own, wherever the run was stopped."""
        every = self.config.checkpoint.every
        return every is not None and every > 0 and self.step % every == 0

    def _can_rewind(self, step: int) -> bool:
        """Whether this run goes back because of the spike in `step`; the same on all ranks."""
        spikes, train = self.spikes, self.config.train
        if spikes.rewinds >= spikes.limit or self.saved is None:
            return False
        skipped = spikes.skipped + step - self.saved[0]
        return (train.steps + skipped) * train.global_batch <= self.data.train.n_samples

    def _note_skip(self, finite: bool, loss: float, grad_norm: float, found: dict[str, Any] | None) -> None:
        if finite:
            self.skipped_in_a_row = 0
            return
        # What a smaller loss scale will cure is part of finding it.
        self.skipped_in_a_row += not (math.isfinite(loss) and self.loss_scale.can_fall)
        where = "debug.numerics=true names the module"
        if self.numerics.on:
            where = "nothing watched was not finite" if found is None else sentence(found, self._microbatches_a_step)
        message = f"step {self.step}, loss {loss!r}, gradient norm {grad_norm!r}; {where}"
        self.event("skip", loss=repr(loss), grad_norm=repr(grad_norm), message=message)
        if self.skipped_in_a_row >= self.config.train.nonfinite_limit:
            raise RunError(
                f"train.nonfinite_limit: {self.skipped_in_a_row} steps in a row had a loss or gradient that is not"
                f" finite (step {self.step}); lower optim.lr or resume from an older checkpoint"
            )

    def _measured(
        self, loss: float, z_loss: float, grad_norm: float, skipped: bool, step_s: float, data_s: float
    ) -> StepMetrics:
        step_tokens = self.config.train.global_batch * self.config.data.sequence_length
        flops = self.facts["flops_per_token"] * step_tokens / step_s / self.mesh.world_size
        peak = self.facts["peak_flops"]
        return StepMetrics(
            step=self.step,
            tokens=self.step * step_tokens,
            loss=loss,
            grad_norm=grad_norm,
            lr=self.optimizer.lr(self.step),
            tokens_per_s=step_tokens / step_s,
            model_tflops=flops / 1e12,
            mfu=flops / peak if peak else None,
            memory_gb=measured_memory(self.device) / 1e9,
            step_s=step_s,
            data_s=data_s,
            skipped=skipped,
            z_loss=z_loss,
        )
