"""Keys and values of the sequences of one batch, for all layers.

Column c of row b holds one token. A prompt occupies the columns [0, length). Generated tokens begin at a common column
behind the longest prompt, so that a decoding step writes one column for the whole batch. The gap in between is masked.
Rows stay dense: the last row overwrites a finished one.

That first column and `width` are multiples of 32. Sums over columns then run over the same lanes in the same order,
however long the longest prompt of the batch is. So the numbers of a sequence do not depend on its batch, almost always
bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

COLUMN_BLOCK = 32


def round_up(columns: int, block: int = COLUMN_BLOCK) -> int:
    return -(-columns // block) * block


class KVCache:
    """Room for `max_rows` sequences of up to `capacity` columns. One batch after the other can use it."""

    def __init__(
        self,
        *,
        num_layers: int,
        max_rows: int,
        num_groups: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.max_rows, self.capacity = max_rows, capacity
        self.num_rows = self.column = 0  # `column` is the next one to write
        shape = (num_layers, max_rows, num_groups)
        # Keys are stored transposed, as the product with the queries needs them. All begins with zeros: a masked
        # column still takes part in the product with the values, and 0 x NaN would be NaN.
        self.keys = torch.zeros(*shape, head_dim, capacity, dtype=dtype, device=device)
        self.values = torch.zeros(*shape, capacity, head_dim, dtype=dtype, device=device)
        self.mask = torch.full((max_rows, 1, 1, capacity), -torch.inf, dtype=dtype, device=device)
        self._open = torch.zeros(1, dtype=torch.long, device=device)  # the open column

    def begin(self, num_rows: int, max_prompt: int) -> None:
        """Forget the batch before this one."""
        if self.num_rows or self.column:
            self.keys.zero_()
            self.values.zero_()
            self.mask.fill_(-torch.inf)
        self.num_rows = num_rows
        self.column = round_up(max_prompt)

    def fill(self, first_row: int, num_rows: int, keys: Tensor, values: Tensor) -> None:
        """Give rows [first_row, first_row + num_rows) one prompt.

        `keys` and `values`: [num_layers, length, num_groups, head_dim].
        """
        length, rows = keys.shape[1], slice(first_row, first_row + num_rows)
        self.keys[:, rows, :, :, :length] = keys.permute(0, 2, 3, 1).unsqueeze(1)
        self.values[:, rows, :, :length] = values.transpose(1, 2).unsqueeze(1)
        self.mask[rows, :, :, :length] = 0

    def open_column(self) -> None:
        """Make the next column visible to all rows. Each layer then writes it."""
        self.mask[:, :, :, self.column] = 0
        self._open.fill_(self.column)
        self.column += 1

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the open column of the first rows: `key`, `value` [rows, num_groups, head_dim].

        Returns the keys [rows, num_groups, head_dim, capacity] and the values [rows, num_groups, capacity, head_dim].
        """
        keys, values = self.keys[layer, : len(key)], self.values[layer, : len(value)]
        keys.index_copy_(3, self._open, key.unsqueeze(3))
        values.index_copy_(2, self._open, value.unsqueeze(2))
        return keys, values

    @property
    def width(self) -> int:
        """Columns that attention has to look at."""
        return round_up(self.column)

    def keep(self, rows: list[int]) -> None:
        """Row i becomes a copy of row rows[i], which is i itself or a row from len(rows) on."""
        for target, source in enumerate(rows):
            if target != source:
                self.keys[:, target, :, :, : self.column] = self.keys[:, source, :, :, : self.column]
                self.values[:, target, :, : self.column] = self.values[:, source, :, : self.column]
                self.mask[target] = self.mask[source]
        self.num_rows = len(rows)


def rows_without(num_rows: int, finished: list[int]) -> list[int]:
    """What to give to `KVCache.keep` to remove the `finished` rows. As few rows as possible are moved."""
    gone = set(finished)
    rows = list(range(num_rows - len(gone)))
    movers = iter([row for row in range(len(rows), num_rows) if row not in gone])
    return [row if row not in gone else next(movers) for row in rows]
