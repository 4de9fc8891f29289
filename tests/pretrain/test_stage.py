"""data.stage: what a node reads lies on its own disk, copied once, and the run is the same."""

import logging
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from swath.pretrain.config import Recipe, read_recipe
from swath.pretrain.data import Data
from swath.pretrain.forecast import forecast
from swath.pretrain.record import read_lines
from swath.pretrain.trainer import pretrain
from swath.pretrain.world import World
from swath.shards.errors import InputError
from swath.shards.order import SampleOrder
from swath.shards.stores.folder import Folder
from tests.shard_folders import make_shards

RECIPE = """
backbone: {name: vit_tiny_patch8, width: 24, depth: 1, heads: 3}
objective: {name: mae, decoder_width: 24, decoder_depth: 1, decoder_heads: 3}
train: {global_batch: 8, epochs: 2, precision: fp32, device: cpu, threads: 1}
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("stage") / "shards", samples=60, per_shard=3)


def recipe(shards: Path, run: Path, *more: str) -> Recipe:
    return read_recipe(RECIPE, [f"run.dir={run}", f"data.train={shards}", *more], name="test")


def staged(cache: Path) -> list[str]:
    return ["data.stage=true", f"data.cache_dir={cache}"]


def of_epoch(data: Data, epoch: int, lanes: set[int]) -> set[str]:
    """SHA-256 of the shards of the samples that these lanes hold."""
    (order,) = data.stream().orders
    positions = np.arange(epoch * order.samples, (epoch + 1) * order.samples)
    numbers = order.find(positions[np.isin(positions % order.samples % order.lanes, list(lanes))])[0]
    return {data.readers[0].manifest.shards[s].sha256 for s in order.shards(numbers)}


@pytest.mark.parametrize("window", [1, 4, 7, 100])
@pytest.mark.parametrize(("count", "lanes"), [(1, range(1)), (3, range(3)), (4, range(1, 3)), (7, range(6, 7))])
def test_the_order_says_which_shards_lanes_still_need(window: int, count: int, lanes: range) -> None:
    sizes = [5, 1, 9, 2, 2, 11, 3, 4, 6]
    order = SampleOrder(sizes, seed=3, window=window, lanes=count)
    for first in (0, 13, order.samples - 1, 2 * order.samples + 20):
        begun = first % order.samples // count // window * window  # of a lane, where the window in hand begins
        positions = np.arange(first // order.samples * order.samples, (first // order.samples + 1) * order.samples)
        index = positions % order.samples
        mine = positions[np.isin(index % count, list(lanes)) & (index // count >= begun)]
        needed = order.needed(first, lanes)
        assert len(needed) == len(set(needed))
        if len(mine):
            assert set(needed) == set(order.shards(order.find(mine)[0]))
        if window == 1 and len(lanes) == 1:
            assert needed == order.shards(order.find(mine)[0])


def test_each_node_copies_what_it_reads_once_and_reads_the_same(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[tuple[str, str]] = []
    stream, here = Folder.stream, ""

    def counting(self: Folder, name: str, **known: object) -> object:
        copied.append((here, name))
        return stream(self, name, **known)  # type: ignore[arg-type]

    monkeypatch.setattr(Folder, "stream", counting)
    cut = {"global_batch": 8, "micro_batch": 2, "step": 2, "device": torch.device("cpu")}
    for node in (0, 1):
        here = str(node)
        cache = tmp_path / here
        datas = [Data(recipe(shards, tmp_path / "run", "data.lanes=2", "data.window=5", *staged(cache)).data, 0) for _ in (0, 1)]
        plain = Data(recipe(shards, tmp_path / "run", "data.lanes=2", "data.window=5").data, 0)
        assert not cache.exists(), "opening copies nothing"
        for local, data in enumerate(datas):
            world = World(rank=2 * node + local, size=4, local=local, nodes=2)
            batches, wanted = data.batches(**cut, world=world), plain.batches(**cut, world=world)  # type: ignore[arg-type]
            for made, right in islice(zip(batches, wanted, strict=True), 8):
                assert torch.equal(made.chips.id, right.chips.id) and torch.equal(made.chips.visit, right.chips.visit)
                assert torch.equal(made.chips.stored["image"].pixels, right.chips.stored["image"].pixels)
            batches.close(), wanted.close()  # type: ignore[attr-defined]
        have: set[str] = set()
        for _ in range(1000):
            have = {path.name for path in cache.iterdir()} - {"lock"}
            if of_epoch(plain, 1, {node}) <= have and not any(name.endswith(".partial") for name in have):
                break
            data.readers[0].store.remote.wait(0.01)  # type: ignore[attr-defined]
        both = of_epoch(plain, 0, {node}) | of_epoch(plain, 1, {node})
        assert of_epoch(plain, 1, {node}) <= have <= both and len(both) < len(plain.readers[0].manifest.shards)
        for data in (*datas, plain):
            data.close()
    assert len(copied) == len(set(copied)), "two ranks of a node copied the same"


def test_a_run_is_the_same_and_may_change_its_mind(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def losses(run: str, *more: str) -> list[float]:
        pretrain(recipe(shards, tmp_path / run, "train.max_steps=3", *more))
        return [line["loss"] for line in read_lines(tmp_path / run / "metrics.jsonl")]

    caplog.set_level(logging.WARNING, logger="swath")
    plain = losses("plain")
    assert losses("staged", *staged(tmp_path / "cache")) == plain
    assert (tmp_path / "cache").is_dir() and not caplog.messages
    (tmp_path / "file").touch()
    assert len(losses("staged", *staged(tmp_path / "file" / "cache"), "train.max_steps=4")) == 4, "no folder: the run goes on"
    assert sum("data.stage" in message for message in caplog.messages) == 1


def test_a_plan_needs_no_disk_of_a_node(shards: Path, tmp_path: Path) -> None:
    said = forecast(recipe(shards, tmp_path / "run", *staged(tmp_path / "cache")), 4)
    assert said.samples == 60 and not (tmp_path / "cache").exists()


def test_a_cache_in_the_home_folder_is_not_meant(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.cache_dir: data\.stage copies shards to a disk of the node"):
        recipe(shards, tmp_path / "run", "data.stage=true")
