"""Where the samples lie: the world, and the part of it that they cover. Plate carrée, degrees; nothing is downloaded."""

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from swath.shards.inspection.outline import outlines
from swath.shards.inspection.survey import Survey, positions
from swath.shards.reader import ShardReader

MOST = 1_000_000  # samples that are drawn; of more, every so many
_POINTS = 5_000  # that can be told apart; more are counted by cell
_GROUPS = 8  # colours
# Okabe and Ito's colours, which the colour-blind tell apart, without the yellow that is pale on paper
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C564B")
_REST = "#9A9A9A"
_COARSE = 8  # degrees of latitude below which the outline of land would mislead
_KM = 111.2  # of a degree of latitude
_Window = tuple[tuple[float, float], tuple[float, float]]
_WORLD: _Window = ((-180.0, 180.0), (-90.0, 90.0))


@dataclass
class Group:
    """Samples of one colour: `lat`, `lon` (N,) in degrees."""

    name: str
    colour: str
    lat: np.ndarray
    lon: np.ndarray


def draw_map(readers: dict[str, ShardReader], surveys: dict[str, Survey]) -> Figure | None:
    """The world and a closer look, by split, or by class where there is one split; None where nothing has a position.

    Few samples are points; many are counted by cell, and some of them shown as points where there are colours to tell.
    """
    total = sum(found.lat.count for found in surveys.values())
    if not total:
        return None
    step = -(-sum(len(reader) for reader in readers.values()) // MOST)
    groups = _groups(readers, step)
    lat = np.concatenate([group.lat for group in groups])
    lon = np.concatenate([group.lon for group in groups])
    if not len(lat):  # what has a position is so rare that the stride missed it
        return None
    west, east, south, north = _window(lat, lon)
    many, near = len(lat) > _POINTS, east - west < 180
    by = "" if len(groups) == 1 else " by split" if len(readers) > 1 else " by class"
    panels = [("world", _WORLD, not many)]
    if near:
        across = (east - west) * _KM * np.cos(np.radians((south + north) / 2))
        panels.append(
            (f"closer: {_km(across)} × {_km((north - south) * _KM)}", ((west, east), (south, north)), not many or bool(by))
        )
    elif many and by:
        panels.append(("world", _WORLD, True))
    wide = min(max((east - west) * _squeeze(south, north) / (north - south), 0.8), 1.6) if near else 2.0
    width, share = (13.0, 2 / (2 + wide)) if len(panels) > 1 else (11.0, 1.0)
    figure = Figure(figsize=(width, 0.45 * width * share + 1.3), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=(2, wide)[: len(panels)])[0]
    for one, (title, window, coloured) in zip(axes, panels, strict=True):
        _panel(one, groups, window, coloured=coloured)
        some = f", {_POINTS:,} of them{by}" if coloured and many else "" if many else by
        one.set_title(title + some, fontsize=10)
    if near:
        for turn in (-360, 0, 360):
            x = np.array([west, east, east, west, west]) + turn
            axes[0].plot(x, (south, south, north, north, south), color="black", linewidth=0.8)
    drawn = "" if step == 1 else f", one in {step} is drawn"
    figure.suptitle(f"{total:,} samples with a position{drawn}", fontsize=11)
    if by:
        handles = [axes[0].scatter([], [], s=30, color=group.colour) for group in groups]
        names = [group.name for group in groups]
        legend = figure.legend(handles, names, loc="outside lower center", ncols=min(len(groups), 5), fontsize=9, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a name may hold a $
    return figure


def _groups(readers: dict[str, ShardReader], step: int) -> list[Group]:
    """By split; of one split by class, the most frequent ones first and the rest together."""
    if len(readers) > 1:
        taken = {split: positions(reader.index.samples[::step])[:2] for split, reader in readers.items()}
        return _coloured([(split, lat, lon) for split, (lat, lon) in taken.items()])
    reader = next(iter(readers.values()))
    samples, classes = reader.index.samples[::step], reader.manifest.classes
    labels = samples["label"]
    numbers = [n for n in np.unique(labels).tolist() if 0 <= n < len(classes)]
    if len(numbers) < 2:
        return _coloured([("", *positions(samples)[:2])])
    counts = np.bincount(labels[(labels >= 0) & (labels < len(classes))])
    numbers = sorted(numbers, key=lambda n: -counts[n])
    shown = numbers if len(numbers) <= _GROUPS else numbers[: _GROUPS - 1]
    made = [(classes[n], *positions(samples[labels == n])[:2]) for n in shown]
    rest = samples[~np.isin(labels, shown)]
    return _coloured(made) + [Group("all others", _REST, *positions(rest)[:2])] * bool(len(rest))


def _coloured(named: list[tuple[str, np.ndarray, np.ndarray]]) -> list[Group]:
    return [Group(_short(name), _COLOURS[n % len(_COLOURS)], lat, lon) for n, (name, lat, lon) in enumerate(named)]


def _short(name: str) -> str:
    """As a legend can hold it."""
    plain = "".join(c if c.isprintable() else "?" for c in name[:30])
    return plain + "…" * (len(name) > 30)


def _window(lat: np.ndarray, lon: np.ndarray) -> tuple[float, float, float, float]:
    """West, east, south, north with a margin; it may cross the date line, with longitudes beyond 180."""
    spread = [float(np.ptp((lon - middle + 180) % 360)) for middle in (0.0, 180.0)]
    middle = 180.0 * int(np.argmin(spread))
    turned = (lon - middle + 180) % 360 - 180 + middle
    west, east, south, north = float(turned.min()), float(turned.max()), float(lat.min()), float(lat.max())
    squeeze = _squeeze(south, north)
    side = max((east - west) * squeeze, north - south, 0.05)  # no flatter than 1 to 2: a line of samples needs room around it
    tall, wide = max(north - south, side / 2), max((east - west) * squeeze, side / 2) / squeeze
    south, north = (south + north - 1.2 * tall) / 2, (south + north + 1.2 * tall) / 2
    west, east = (west + east - 1.2 * wide) / 2, (west + east + 1.2 * wide) / 2
    return west, east, max(south, -90.0), min(north, 90.0)


def _squeeze(south: float, north: float) -> float:
    """How much shorter a degree of longitude is than one of latitude; at the poles they are drawn a sixth as long, not less."""
    return max(float(np.cos(np.radians((south + north) / 2))), 1 / 6)


def _panel(axes: Axes, groups: list[Group], window: _Window, *, coloured: bool) -> None:
    """Land, graticule and the samples of a window: some as points in the colours of their groups, or all counted by cell."""
    x, y = window
    centre = (x[0] + x[1]) / 2
    axes.set(xlim=x, ylim=y)
    if y[1] - y[0] > _COARSE:
        land = [piece + np.array([turn, 0]) for piece in outlines() for turn in (-360, 0, 360)]
        axes.add_collection(PolyCollection(land, facecolor="#ECE7DC", edgecolor="#B9B09C", linewidth=0.5, zorder=0))
        axes.set_facecolor("#F6FAFC")
    axes.grid(color="#BFC9CF", linewidth=0.4, zorder=0.5)
    axes.set_axisbelow(True)
    if window == _WORLD:
        axes.set(xticks=range(-180, 181, 60), yticks=range(-90, 91, 30), aspect=1)
    else:
        axes.set_aspect(1 / _squeeze(*y))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _degrees((v + 180) % 360 - 180 if v != 180 else 180, "WE")))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _degrees(v, "SN")))
    axes.tick_params(labelsize=8, length=2)
    turned = [(group, (group.lon - centre + 180) % 360 - 180 + centre) for group in groups]
    if not coloured:
        cells = axes.hexbin(
            np.concatenate([lon for _, lon in turned]), np.concatenate([group.lat for group in groups]), mincnt=1, norm=LogNorm(),
            gridsize=(120, 35) if window == _WORLD else (60, 25), extent=(*x, *y), cmap="viridis", linewidths=0.1, zorder=2,
        )  # fmt: skip
        axes.figure.colorbar(cells, ax=axes, shrink=0.6, label="samples per cell", pad=0.01)
        return
    rng = np.random.default_rng(0)
    most = max(_POINTS // len(groups), 1)
    some = [rng.permutation(len(lon))[:most] for _, lon in turned]
    places = np.concatenate([np.stack([lon[n], group.lat[n]], axis=1) for (group, lon), n in zip(turned, some, strict=True)])
    colours = np.repeat([group.colour for group in groups], [len(n) for n in some])
    mixed = rng.permutation(len(places))  # so that no group hides the others
    size = float(np.clip(2000 / max(len(places), 1), 4, 36))
    axes.scatter(*places[mixed].T, s=size, c=colours[mixed], alpha=0.8, linewidths=0, zorder=2)


def _degrees(value: float, sides: str) -> str:
    side = "" if value == 0 else sides[int(value > 0)]
    return f"{abs(value):.6g}°{side}"


def _km(length: float) -> str:
    return f"{length:,.0f} km" if length >= 10 else f"{length:.1f} km"
