"""`swath retrieve`: the rows of a file of features that are most like a query, by cosine; exact, a block at a time.

Letters: q query, n row of the file, k neighbour, d width.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from swath.hub.load import Loaded, load_backbone
from swath.probes.embed import embed_image, load_pyarrow, weights_digest
from swath.shards.errors import InputError
from swath.shards.sources.source import Options

_BLOCK_VALUES = 1 << 23  # similarities that are looked at together: 32 MiB
_SHOWN = ("key", "label", "lat", "lon")


def nearest(
    features: np.ndarray | Iterable[np.ndarray], queries_qd: np.ndarray, k: int, exclude: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(rows (Q, k) int64, cosines (Q, k) float32) of the features most like each query, best first; of equals the first row.

    `features` (N, D), or blocks of them in order, each of which is in memory once. `exclude` (Q,) is a row that a query must not
    find, itself say, -1 for none. Where rows are fewer than k, -1 and -inf stand for the rest. ValueError for another width.
    """
    query_qd = F.normalize(torch.from_numpy(np.ascontiguousarray(queries_qd, dtype=np.float32)))
    count = len(query_qd)
    best = torch.full((count, k), -torch.inf)
    row = torch.full((count, k), -1)
    barred = None if exclude is None else torch.from_numpy(np.asarray(exclude, dtype=np.int64))
    first = 0
    for block_nd in _blocks(features, max(1, _BLOCK_VALUES // max(count, 1))):
        if block_nd.shape[1] != query_qd.shape[1]:
            raise ValueError(f"features have width {block_nd.shape[1]}, queries {query_qd.shape[1]}")
        cosine_qn = query_qd @ F.normalize(torch.from_numpy(block_nd.astype(np.float32))).T
        number_n = torch.arange(first, first + len(block_nd))
        if barred is not None:
            cosine_qn[barred[:, None] == number_n] = -torch.inf
        candidates = torch.cat([best, cosine_qn], dim=1)
        numbers = torch.cat([row, number_n.expand(count, -1)], dim=1)
        taken = _largest(candidates, k)
        best, row = candidates.gather(1, taken), numbers.gather(1, taken)
        first += len(block_nd)
    row[best == -torch.inf] = -1
    return row.numpy(), best.numpy()


def _blocks(features: np.ndarray | Iterable[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    for part in [features] if isinstance(features, np.ndarray) else features:
        for first in range(0, len(part), rows):
            yield part[first : first + rows]


def _largest(values_qn: torch.Tensor, k: int) -> torch.Tensor:
    """(Q, k) int64: where the k largest of each row are, largest first, of equals the first ones (`topk` takes any of them)."""
    edge_q1 = values_qn.topk(k, dim=1).values[:, -1:]
    above_qn, level_qn = values_qn > edge_q1, values_qn == edge_q1
    taken_qn = above_qn | (level_qn & (level_qn.cumsum(dim=1) <= k - above_qn.sum(dim=1, keepdim=True)))
    place_qk = taken_qn.nonzero()[:, 1].view(-1, k)
    return place_qk.gather(1, values_qn.gather(1, place_qk).argsort(dim=1, descending=True, stable=True))


@dataclass
class Index:
    """A file that `swath embed` wrote; rows are read in blocks, never all at once. `told` is what it says of itself."""

    path: Path
    file: Any
    told: dict[str, Any]

    @classmethod
    def open(cls, path: Path | str) -> "Index":
        """InputError for what is no such file."""
        parquet, path = load_pyarrow(), Path(path)
        try:
            file = parquet.ParquetFile(path)
            told = json.loads((file.schema_arrow.metadata or {})[b"swath"])
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path} is no file of features that `swath embed` wrote ({error})") from None
        return cls(path, file, told)

    @property
    def rows(self) -> int:
        return self.file.metadata.num_rows

    def blocks(self) -> Iterator[np.ndarray]:
        """(n, D) float32 features, in order."""
        for batch in self._batches(["feature"]):
            column = batch.column(0)
            yield column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1).astype(np.float32)

    def row_of(self, query: str) -> int | None:
        """The number of the row with this key, or of this number; None where there is none."""
        import pyarrow.compute as pc

        first = 0
        for batch in self._batches(["key"]):
            found = pc.index(batch.column(0), query).as_py()  # type: ignore[attr-defined]
            if found >= 0:
                return first + found
            first += len(batch)
        return int(query) if query.isdecimal() and int(query) < self.rows else None

    def take(self, rows: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Some rows, in the order asked for; only the row groups that they lie in are read."""
        ends = np.cumsum([self.file.metadata.row_group(n).num_rows for n in range(self.file.num_row_groups)])
        made: dict[int, dict[str, Any]] = {}
        for group in sorted({int(np.searchsorted(ends, row, side="right")) for row in rows}):
            start = int(ends[group - 1]) if group else 0
            inside = [row for row in set(rows) if start <= row < ends[group]]
            table = self.file.read_row_group(group, columns=list(columns)).take([row - start for row in inside])
            made |= dict(zip(inside, table.to_pylist(), strict=True))
        return [made[row] for row in rows]

    def _batches(self, columns: list[str]) -> Iterator[Any]:
        try:
            yield from self.file.iter_batches(batch_size=4096, columns=columns)
        except OSError as error:
            raise InputError(f"{self.path} is damaged ({error}); embed again") from None


def retrieve(
    path: Path | str,
    queries: Sequence[str],
    *,
    k: int = 10,
    backbone: Path | str | None = None,
    options: Options | None = None,
) -> dict[str, Any]:
    """The `k` nearest rows of the file at `path` to each query: a key, the number of a row, or the path of an image, which needs
    the `backbone` that made the file. A row does not find itself. `table` shows the result.

    Raises InputError for a query that is none of these, and for another backbone than the file's.
    """
    if k < 1:
        raise InputError(f"-k must be at least 1, not {k}")
    index = Index.open(path)
    if not index.rows:
        raise InputError(f"{path} has no rows")
    loaded: Loaded | None = None
    rows, features = [], []
    for query in queries:
        row = index.row_of(query)
        if row is not None:
            features.append(np.asarray(index.take([row], ["feature"])[0]["feature"], dtype=np.float32))
        elif Path(query).exists():
            loaded = loaded or _same_backbone(index, backbone)
            height, width = index.told["size"]
            features.append(embed_image(loaded, Path(query), (height, width), options)[0])
        else:
            raise InputError(f"{query!r} is no key in {path}, no number of its {index.rows:,} rows, and no image")
        rows.append(-1 if row is None else row)
    found, cosine = nearest(index.blocks(), np.stack(features), min(k, index.rows), np.asarray(rows))
    answers = []
    for query, row, near, similarity in zip(queries, rows, found.tolist(), cosine.tolist(), strict=True):
        there = [(number, value) for number, value in zip(near, similarity, strict=True) if number >= 0]
        told = index.take([number for number, _ in there], _SHOWN)
        neighbours = [
            {"rank": rank, "row": number, "cosine": value, **row_told}
            for rank, ((number, value), row_told) in enumerate(zip(there, told, strict=True), start=1)
        ]
        asked = Path(query).name if row < 0 else index.take([row], ["key"])[0]["key"]
        answers.append({"query": asked, "row": None if row < 0 else row, "neighbours": neighbours})
    return {"rows": index.rows, "features": index.told, "queries": answers}


def _same_backbone(index: Index, backbone: Path | str | None) -> Loaded:
    if backbone is None:
        raise InputError(f"an image as a query needs --backbone, the {index.told['backbone']} that made {index.path}")
    loaded = load_backbone(backbone)
    if weights_digest(loaded) != index.told["weights_sha256"]:
        raise InputError(f"{backbone} has other weights than those that made {index.path}, whose features do not compare")
    return loaded


def table(result: dict[str, Any]) -> str:
    """The result as text: for each query its neighbours, best first."""
    lines = []
    for answer in result["queries"]:
        lines.append(f"nearest to {answer['query']}, of {result['rows']:,} rows of {result['features']['data']}")
        wide = max((len(near["key"]) for near in answer["neighbours"]), default=0)
        for near in answer["neighbours"]:
            place = "" if near["lat"] is None else f"  {near['lat']:.5f} {near['lon']:.5f}"
            label = "" if near["label"] is None else f"  {near['label']}"
            lines.append(f"{near['rank']:>4}  {near['cosine']:.4f}  {near['key']:<{wide}}  row {near['row']}{label}{place}")
    return "\n".join(lines)
