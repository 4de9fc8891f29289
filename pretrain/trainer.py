"""The training loop. Step s (counted from 0) trains on global batch s of the order; a checkpoint of step n has done n of them.

    chips ──prepare──▶ batch ──objective──▶ numerator, weight ──backward──▶ gradients of the numerator
    loss = numerator / weight over the whole global batch: gradients are divided by it inside the optimiser's one pass.

Order, views and masks are pure functions of the position, so a run that was killed continues with the numbers it would have had.
"""

import dataclasses
import gc
import json
import logging
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

import swath
from swath.backbones.base import Features
from swath.kernels import dispatch
from swath.pretrain import augment, build, checkpoint, cost, health, initial, precision, returns
from swath.pretrain.config import Recipe, refuse_changes
from swath.pretrain.data import Data
from swath.pretrain.objective import Objective
from swath.pretrain.optimizer import adamw
from swath.pretrain.owner import Owner
from swath.pretrain.pictures import sheet
from swath.pretrain.record import Record, finite
from swath.pretrain.stages import Stage, plan
from swath.pretrain.strategy import strategy
from swath.pretrain.watch import HOLD, Watch
from swath.pretrain.world import World, is_echo
from swath.shards.bands import InputContract
from swath.shards.draw import Draw
from swath.shards.errors import InputError
from swath.shards.files import disk_errors, write_bytes, write_json
from swath.shards.loader import MicroBatch
from swath.shards.order import cut
from swath.shards.prepare import prepare

log = logging.getLogger("swath")


@dataclass
class Result:
    """How a call of `pretrain` ended: after `step` of `total` steps, or asked to stop by a signal."""

    run: Path
    step: int
    total: int
    stopped: bool


def pretrain(recipe: Recipe) -> Result:
    """Train, or continue, the run of `recipe` until its end or until a signal asks to stop; with the other processes, where
    torchrun started this one."""
    kind = _device(recipe.train.device)
    world = World.join(kind)
    try:
        world.first(lambda: _examine(recipe, world))
        with disk_errors("writing the run", recipe.run.dir), _owned(recipe.run.dir, world):
            while (result := _Trainer(recipe, world, kind).train()) is None:
                gc.collect()  # the model that was given up, before there is another
            return result
    except Exception as error:
        if is_echo(error):  # the rank whose own error it was is to be seen to end first
            log.error("rank %d: a collective failed, since another rank ended or was late", world.rank)
            time.sleep(HOLD)
        raise
    finally:
        world.leave()


def _examine(recipe: Recipe, world: World) -> None:
    """What cannot be is refused by one rank, once, before any of them begins."""
    data = Data(recipe.data, recipe.run.seed)
    try:
        _cut(recipe, world)
        stages = plan(recipe.train, data)
        with torch.device("meta"):  # every stage's size now, not when the stage begins
            made = [build.model(recipe, data, stage.size, stages[-1].size) for stage in stages]
        initial.examine(made[-1], recipe, data.contracts)
    finally:
        data.close()


def _cut(recipe: Recipe, world: World) -> tuple[int, int]:
    train, lanes = recipe.train, recipe.data.lanes
    return cut(train.global_batch, world.size, train.micro_batch, lanes=lanes, nodes=world.nodes)


@contextmanager
def _owned(run: Path, world: World) -> Iterator[None]:
    """The run is this world's while inside; rank 0 holds the lease."""
    lease = ExitStack()

    def take() -> None:
        run.mkdir(parents=True, exist_ok=True)
        lease.enter_context(Owner(run))

    with lease:
        world.first(take)
        yield


def _device(asked: str) -> str:
    if asked == "cuda" and not torch.cuda.is_available():
        raise InputError("train.device is cuda, and torch sees no GPU here; train.device=cpu would do")
    return "cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu"


class _Trainer:
    def __init__(self, recipe: Recipe, world: World, kind: str) -> None:
        self.recipe, self.run, self.world = recipe, recipe.run.dir, world
        self.data = Data(recipe.data, recipe.run.seed)
        self.micro, self.accumulate = _cut(recipe, world)
        self.stages = plan(recipe.train, self.data)
        self.stage = self.stages[0]  # of the step in hand, or of the last one that was done
        self.total = self.stages[-1].last
        stored = world.first(self._stored)
        self.stored = None if stored is None else Path(stored)
        self.start = initial.started(recipe)
        self.data.contracts = initial.renormalised(self.data.contracts, self.start)
        self.device = world.device(kind)
        self.chosen = world.first(self._choices)
        self._heed(self.chosen)
        self.model = self._build()
        if recipe.train.init is not None and self.stored is None:
            log.info(initial.load(self.model, recipe))
        unused = self.chosen["unused_weights"] or len(self.data.contracts) > 1
        self.strategy = strategy(recipe.train.strategy, self.model, world, self.device, unused=unused)
        self.optimizer = adamw(self.model, weight_decay=recipe.train.weight_decay, betas=recipe.train.betas)
        self.saver = checkpoint.Saver(
            self.run, world, keep=recipe.checkpoint.keep, permanent_every=recipe.checkpoint.permanent_every
        )
        self.step = 0
        self.asked = self.stopped = False  # to stop, by a signal to this rank; and all ranks have agreed to
        self.bad: dict[int, list[int]] = {}  # the last steps in a row that were not finite, and their samples
        self.returns = world.first(lambda: returns.read(self.run))
        self.left_out = returns.ids(self.returns, self.device)
        self.watch = Watch(self.run, world, recipe.train.hang_after)

    # --- what is fixed before the first step ---

    def _stored(self) -> str | None:
        """The checkpoint to continue from, after checking that this is the same run on the same data."""
        returns.undo(self.run)
        latest = checkpoint.find_latest(self.run, mend=True)
        resolved = self.run / "recipe.yaml"
        if resolved.exists():
            refuse_changes(yaml.safe_load(resolved.read_text()), self.recipe.resolved(), self.run)
        initial.begin(self.recipe, self.data.contracts)
        self.data.contracts = initial.renormalised(self.data.contracts, initial.started(self.recipe))
        if latest is not None:
            state = checkpoint.read_state(latest)
            trained = {name: InputContract.model_validate(contract) for name, contract in state["contracts"].items()}
            where = ", ".join(one.path for one in self.recipe.data.train)
            remedy = f"shards with the bands of the run, or another run.dir for {where}"
            for name, contract in trained.items():
                if name in self.data.contracts:
                    contract.require(self.data.contracts[name], ours=f"checkpoint {latest}", theirs=where, remedy=remedy)
            if trained != self.data.contracts or state["shards"] != self.data.shards:
                raise InputError(f"{where} is not the data that {latest} was trained on; {remedy}")
        write_bytes(resolved, yaml.safe_dump(self.recipe.resolved(), sort_keys=False).encode())
        return None if latest is None else str(latest)

    def _build(self) -> Objective:
        size = self.stages[-1].size
        return build.model(self.recipe, self.data, size, size).to(self.device)

    def _choices(self) -> dict[str, Any]:
        """What `auto` came to, and the threads: decided at the first start, kept in choices.json, used ever after."""
        path = self.run / "choices.json"
        if path.exists():
            return json.loads(path.read_text())
        torch.set_num_threads(self.recipe.train.threads or torch.get_num_threads())
        asked, gain = self.recipe.train.precision, None
        probe = self._build()
        steps = [build.rehearsal(probe, self.data, stage.size, self.micro, self.device) for stage in self.stages]
        flops = [cost.flops(step) for step in steps]  # a micro-batch that does not fit fails here, whichever stage it is of
        picked: precision.Precision
        if asked == "auto":
            picked, gain = precision.choose(self.device, steps[-1])
            log.info("precision auto: bf16 is %.2f times as fast here, training in %s", gain, picked)
        else:
            picked = asked
        chosen = {
            "precision": picked,
            "bf16_gain": None if gain is None else finite(gain),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "device": self.device.type,
            "flops_per_sample": [count / self.micro for count in flops],  # of each stage
            "peak_flops": cost.peak(self.device, picked),
            "unused_weights": any(p.requires_grad and p.grad is None for p in probe.parameters()),
        }
        write_json(path, chosen)
        return chosen

    def _heed(self, chosen: dict[str, Any]) -> None:
        here = {"torch": torch.__version__, "machine": platform.machine(), "device": self.device.type}
        moved = [f"{k} {chosen[k]} then, {v} now" for k, v in here.items() if chosen[k] != v]
        if moved:
            log.warning("losses will not repeat bit for bit: %s", "; ".join(moved))
        torch.set_num_threads(chosen["threads"])

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) that the backbone sees, in the stage that was reached."""
        return self.stage.size

    @property
    def view_size(self) -> tuple[int, int]:
        """(height, width) of the images that the objective is given."""
        return self.size[0] * self.model.scale, self.size[1] * self.model.scale

    # --- the loop ---

    def train(self) -> Result | None:
        """None where the run has gone back, and another trainer is to continue it."""
        self._restore()
        record = Record(self.run, self.step, self.total) if self.world.rank == 0 else None
        previous = self._catch_signals()
        try:
            with self.watch, self.saver:
                if self.step == 0 and self.world.first(lambda: record is not None and not record.looks):
                    self._check(record)
                if self.step < self.total:
                    try:
                        self._steps(record)
                    except returns.Return:
                        return None
        finally:
            if record is not None:
                record.close()
            self.data.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return Result(self.run, self.step, self.total, self.stopped)

    def _steps(self, record: Record | None) -> None:
        train = self.recipe.train
        log.info(
            "%d steps of %d samples (%d samples in the data set), %s, %s on %s, micro-batch %d × %d%s",
            self.total, train.global_batch, self.data.samples,
            ", then ".join(str(stage) for stage in self.stages if stage.last > stage.first),
            self.chosen["precision"], self.device, self.micro, self.accumulate,
            f", {train.strategy} on {self.world.size} ranks" if self.world.size > 1 else "",
        )  # fmt: skip
        log.info("operators: %s", dispatch.summary(self.device.type))
        batches = self.data.batches(
            global_batch=train.global_batch, micro_batch=self.micro, step=self.step, device=self.device, world=self.world
        )  # fmt: skip
        waiting: dict[str, Any] | None = None  # a step's numbers are read one step later, so that the device never waits
        self.model.train()
        while self.step < self.total and not self.stopped:
            row = self._one_step(batches)
            self.step += 1
            if waiting is not None:
                self._write(record, waiting)
            waiting = row
            last = self.step == self.total or self.stopped
            due = self.step % self.recipe.checkpoint.every == 0
            look = self.step % self.recipe.health.every == 0
            if last or due or look:
                self._write(record, waiting)
                waiting = None
            if look or self.step == self.total:
                self.watch.at("the look at health", self.step)
                self._check(record)
            if last or due:
                self.watch.at("saving", self.step)
                self._save()
            self.asked = self.asked or self.saver.failed  # ends the run as a signal does: at a step that all ranks agree on
        batches.close()  # type: ignore[attr-defined]

    def _one_step(self, batches: Iterator[MicroBatch]) -> dict[str, Any]:
        """One update. Returns what is to be written, tensors still on the device."""
        began, waited = time.perf_counter(), 0.0
        self.model.progress = self.step / self.total
        stage, self.stage = self.stage, self._stage_of(self.step)
        if stage is not self.stage:
            self.watch.allow(long=True)  # until its first step is done
        share = self.recipe.train.global_batch  # keeps sums of squares near 1; divided out again below
        sums: dict[str, Tensor] = {}  # over micro-steps, then over ranks
        ids = []
        for number in range(self.accumulate):
            start = time.perf_counter()
            self.watch.at("data", self.step + 1)
            chips = next(batches).chips.to(self.device)
            waited += time.perf_counter() - start
            ids.append(chips.id)
            self.watch.at("forward and backward", self.step + 1)
            draw = Draw(self.recipe.run.seed, chips.id, chips.visit)
            view = augment.view(self.recipe.data.augment, draw, next(iter(chips.stored.values())).size)
            batch = prepare(chips, self.data.contracts_of(chips), self.view_size, view, self.data.clear)
            batch = returns.leave_out(batch, self.left_out, self.data.contracts)
            with self.strategy.exchange(number == self.accumulate - 1):
                with precision.autocast(self.chosen["precision"], self.device):
                    outcome = self.strategy.forward(batch, draw)
                (outcome.numerator / share).backward()
            terms = {"": (outcome.numerator.detach(), outcome.weight), **outcome.terms}
            for name, amounts in terms.items():
                amounts = torch.stack([amount.float() for amount in amounts])
                sums[name] = sums[name] + amounts if name in sums else amounts
        self.watch.at("the exchange of numbers", self.step + 1)
        # one exchange of all numbers; the last tell how many ranks want to stop, and how many samples were gone past
        extra = torch.tensor([float(self.asked), float(len(self.data.skips))], device=self.device)
        *reduced, extra = self.world.sum(torch.stack([*sums.values(), extra])).unbind()
        terms = {name: pair.unbind() for name, pair in zip(sums, reduced, strict=True)}
        numerator, weight = terms.pop("")
        lr = self.stage.lr(self.step)
        norm, skipped = self._update(numerator, weight, share, lr)
        self.model.after_step(skipped)
        if self.world.size == 1:  # nobody else needs to hear of it first
            self.stopped = self.asked
        return {
            "step": self.step + 1,
            "samples": (self.step + 1) * self.recipe.train.global_batch,
            "stage": self.stage,
            "loss": numerator / weight,
            "lr": lr,
            "grad_norm": norm,
            "terms": {name: amount / count for name, (amount, count) in terms.items()},
            "skipped": skipped,
            "nothing_valid": weight == 0,
            "stop": extra[0] > 0,
            "damaged": extra[1],
            "ids": ids,
            "seconds": time.perf_counter() - began,
            "waited": waited,
        }

    def _stage_of(self, step: int) -> Stage:
        return next(stage for stage in self.stages if step < stage.last)

    def _update(self, numerator: Tensor, weight: Tensor, share: int, lr: float) -> tuple[Tensor, Tensor]:
        """The optimiser's step, skipped on the device where anything is not finite. Returns (gradient norm, skipped)."""
        # gradients are the mean over ranks of those of numerator / share; divided by this they are of numerator / weight
        factor = weight / (share * self.world.size)
        norm = self.strategy.norm() / factor
        skipped = ~(torch.isfinite(norm) & torch.isfinite(numerator))
        clip = self.recipe.train.clip_norm
        if clip is not None:
            factor = factor * (norm / clip).clamp_min(1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.grad_scale = factor.float()  # type: ignore[attr-defined]
        self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, skipped

    def _write(self, record: Record | None, row: dict[str, Any]) -> None:
        """Read a step's numbers from the device, write its line, and stop the run after too many bad steps in a row. All ranks
        read the same numbers, rank 0 writes them."""
        self.watch.at("reading the numbers", row["step"])
        self.stopped = self.stopped or bool(row["stop"])
        self.watch.allow(long=False)
        skipped, empty = bool(row["skipped"]), bool(row["nothing_valid"])
        samples = self.recipe.train.global_batch
        speed = samples / row["seconds"]
        line = {
            "step": row["step"],
            "samples": row["samples"],
            "epoch": row["samples"] / self.data.samples,
            "size": list(row["stage"].size),
            "loss": finite(float(row["loss"])),
            "lr": row["lr"],
            "seconds": row["seconds"],
            "grad_norm": finite(float(row["grad_norm"])),
            "terms": {name: finite(float(value)) for name, value in row["terms"].items()},
            "samples_per_second": speed,
            "data_wait": row["waited"] / row["seconds"],
            "mfu": speed * self.chosen["flops_per_sample"][row["stage"].number] / self.chosen["peak_flops"],
            "skipped": skipped,
            "damaged_samples": int(row["damaged"]),
        }
        if record is not None:
            record.step(line)
        if not skipped or empty:
            self.bad = {}
            return
        ids = [one for own in self.world.gather(torch.cat(row["ids"]).tolist()) for one in own]
        self.bad[row["step"]] = ids
        if record is not None:
            write_json(self.run / f"skipped-step-{row['step']:08d}.json", {"step": row["step"], "sample_ids": ids})
            log.warning("step %d skipped: loss or gradient is not finite; its sample ids are in the run folder", row["step"])
        if len(self.bad) >= self.recipe.train.max_bad_steps:
            self._turn_back(row["step"])

    def _turn_back(self, step: int) -> None:
        """After too many bad steps in a row the run goes back, as often as it may, or ends."""
        if len(self.returns) < self.recipe.train.return_on_bad:
            self.saver.wait()
            made = self.world.first(lambda: returns.note(self.run, self.bad))
            log.warning(
                "%d steps in a row were not finite, up to step %d: back to step %d, and on without their %d samples (%s)",
                len(self.bad), step, made["to"], len(made["sample_ids"]), self.run / returns.FILE,
            )  # fmt: skip
            raise returns.Return
        raise self.world.refuse(
            f"{len(self.bad)} steps in a row had a loss or gradient that is not finite, up to step {step}; "
            "a lower train.lr_per_256, train.clip_norm=1 or train.precision=fp32 would be next to try"
        )

    def _check(self, record: Record | None) -> None:
        """Held-out loss, health, and pictures of what the objective makes now. Every rank looks at all of it, since a sharded
        model needs them all; rank 0 writes it down."""
        row: dict[str, Any] = {
            "step": self.step,
            "size": list(self.size),
            "held_out": self.data.held_out is not self.data.readers,
        }
        total: dict[str, list[float]] = {}
        looks: list[Features] = []
        pictures: dict[str, dict[str, Tensor]] = {}
        self.model.progress = self.step / self.total
        self.model.eval()
        with torch.no_grad(), precision.autocast(self.chosen["precision"], self.device), self.strategy.whole():
            for number, reader in enumerate(self.data.held_out):
                count = min(self.recipe.health.samples, len(reader))
                chips = reader.chips(np.linspace(0, len(reader) - 1, count).astype(np.int64)).to(self.device)
                for first in range(0, count, self.micro):
                    part = chips.part(slice(first, first + self.micro))
                    batch = prepare(part, self.data.contracts_of(part), self.view_size, clear=self.data.clear)
                    draw = Draw(self.recipe.run.seed, batch.id, batch.visit)
                    outcome = self.model(batch, draw)
                    if self.model.scale != 1:
                        batch = prepare(part, self.data.contracts_of(part), self.size, clear=self.data.clear)
                    modality = next(iter(batch.images))
                    amounts = total.setdefault(modality, [0.0, 0.0])
                    total[modality] = [amounts[0] + float(outcome.numerator), amounts[1] + float(outcome.weight)]
                    if number == 0:  # health is of one kind of samples
                        looks.append(self.model.backbone(*self.model.look(batch, draw)))
                    if modality not in pictures and outcome.picture is not None:
                        pictures[modality] = outcome.picture()
        self.model.train()
        if record is None:
            return
        numerator, weight = (sum(amounts[i] for amounts in total.values()) for i in (0, 1))
        row["loss"] = numerator / weight if weight else None
        if len(total) > 1:
            row["losses"] = {name: finite(amount / count) if count else None for name, (amount, count) in total.items()}
        measured = health.measure(torch.cat([f.pooled for f in looks]), torch.cat([f.tokens for f in looks]))
        row |= {name: finite(value) for name, value in measured.items()}
        row["warnings"] = health.warnings([*record.looks, row])
        record.check(row)
        for sign in row["warnings"]:
            log.warning("health at step %d: %s", self.step, sign)
        for name, images in pictures.items():
            suffix = f"-{name}" if len(pictures) > 1 else ""
            sheet(images, self.data.contracts[name], self.run / "pictures" / f"step-{self.step:08d}{suffix}.png")

    # --- stopping and continuing ---

    def _restore(self) -> None:
        checkpoint.start_optimizer(self.optimizer)
        if self.stored is None:
            return
        checkpoint.load_into(self.stored, checkpoint.tensors_of(self.model, self.optimizer), self.world)
        state = checkpoint.read_state(self.stored)
        self.step, self.bad = state["step"], {int(step): ids for step, ids in state.get("bad", {}).items()}
        log.info("continuing from %s", self.stored)

    def _save(self) -> None:
        """Begin to write the checkpoint of the steps that are done; raises what went wrong with the one before."""
        state = {
            "step": self.step,
            "samples": self.step * self.recipe.train.global_batch,
            "total_steps": self.total,
            "config": {**self.recipe.resolved(), "data": {**self.recipe.resolved()["data"], "size": list(self.size)}},
            "backbone": {"name": self.recipe.backbone["name"], "options": dataclasses.asdict(self.model.backbone.config)},
            "contracts": {name: contract.model_dump(mode="json") for name, contract in self.data.contracts.items()},
            "shards": self.data.shards,
            "start": self.start,
            "choices": self.chosen,
            "bad": dict(self.bad),
            "returns": self.returns,
            "versions": {"swath": swath.__version__, "torch": torch.__version__, "python": platform.python_version()},
        }
        self.saver.save(self.step, checkpoint.tensors_of(self.model, self.optimizer), state)

    def _catch_signals(self) -> dict[int, Any]:
        """SIGTERM, SIGUSR1 and the first Ctrl-C ask for a checkpoint after the step in hand; a second Ctrl-C interrupts it."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self.asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.asked = True
            log.info("%s: saving after this step", signal.Signals(number).name)

        return {n: signal.signal(n, ask) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
