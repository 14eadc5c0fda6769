"""The prompts of a batch: which segments are computed together, and their attention.

Every segment is computed once, after its parents. Segments of one depth in the prefix tree form chunks, and a chunk
goes through the layers as one matrix of tokens. Only attention has to know which token belongs to which segment. It
comes in two forms with equal results up to rounding. On a CPU, the segments are computed one after the other, without
any padding. On a GPU, hundreds of small kernels for each layer would take longer than the padding of one large kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nemo_srl.engines.embedded.batching import Segment

Attend = Callable[[int, Tensor], Tensor]
"""(layer, query [num_tokens, num_heads, head_dim]) -> [num_tokens, num_heads x head_dim], for the tokens of a chunk."""

_CPU_TOKENS = 1024
"""Tokens that go through a layer together. Fewer would read the weights too often. More would not fit the cache."""

_GPU_TOKENS = 8192
"""The same with padding. More would save no time, and attention's memory grows with it."""


@dataclass
class PrefilledPrompts:
    """Keys and values of segments, and the hidden state [hidden_size] after the last token of each.

    `keys`, `values`: [num_layers, num_tokens, num_groups, head_dim]. `span` says which tokens a segment has there.
    """

    keys: Tensor
    values: Tensor
    spans: dict[int, slice]
    last_hidden: dict[int, Tensor]

    def span(self, segment: Segment) -> slice:
        return self.spans[id(segment)]

    def of_prompt(self, end: Segment) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole prompt whose last segment is `end`."""
        spans = [self.span(segment) for segment in end.path]
        return torch.cat([self.keys[:, x] for x in spans], 1), torch.cat([self.values[:, x] for x in spans], 1)


def chunks(segments: Sequence[Segment], device: torch.device) -> Iterator[list[Segment]]:
    """Chunks of segments of one depth. So the parents of all are in earlier chunks."""
    padded = device.type != "cpu"
    limit = _GPU_TOKENS if padded else _CPU_TOKENS
    by_depth: dict[int, list[Segment]] = {}
    for segment in segments:
        by_depth.setdefault(len(segment.path), []).append(segment)
    for depth in sorted(by_depth):
        of_depth = by_depth[depth]
        if padded:
            of_depth.sort(key=lambda s: len(s.tokens))  # each is padded to the longest of its chunk, which is the last
        chunk: list[Segment] = []
        for segment in of_depth:
            length = len(segment.tokens)
            total = (len(chunk) + 1) * length if padded else sum(len(s.tokens) for s in chunk) + length
            if chunk and total > limit:
                yield chunk
                chunk = []
            chunk.append(segment)
        yield chunk


def attention(chunk: Sequence[Segment], done: PrefilledPrompts) -> Attend:
    """The attention of the tokens of `chunk` over the paths of their segments, all of which are in `done`."""
    return attend_by_segment(chunk, done) if done.keys.device.type == "cpu" else attend_padded(chunk, done)


def attend_by_segment(chunk: Sequence[Segment], done: PrefilledPrompts) -> Attend:
    """One segment after the other. torch's fused attention is slower there, and its rounding depends on the cut."""
    groups, head_dim = done.keys.shape[2:]
    masks: dict[int, Tensor] = {}  # by segment, for all heads of a group

    def of_segment(layer: int, query: Tensor, segment: Segment) -> Tensor:
        length, per_group = query.shape[0], query.shape[1] // groups
        if id(segment) not in masks:
            mask = query.new_full((length, segment.end), -torch.inf).triu_(segment.start + 1)
            masks[id(segment)] = mask.repeat(per_group, 1)
        spans = [done.span(part) for part in segment.path]
        key = torch.cat([done.keys[layer, span] for span in spans]).permute(1, 2, 0)
        value = torch.cat([done.values[layer, span] for span in spans]).transpose(0, 1)
        # The heads of a group share keys. So they count as more queries: [groups, heads x length, head_dim].
        folded = query.view(length, groups, per_group, head_dim).permute(1, 2, 0, 3).reshape(groups, -1, head_dim)
        scores = torch.add(masks[id(segment)], torch.bmm(folded, key), alpha=1 / math.sqrt(head_dim))
        out = torch.bmm(torch.softmax(scores, -1), value)
        return out.view(groups, per_group, length, head_dim).permute(2, 0, 1, 3).reshape(length, -1)

    def attend(layer: int, query: Tensor) -> Tensor:
        parts = torch.split(query, [len(segment.tokens) for segment in chunk])
        return torch.cat([of_segment(layer, part, segment) for part, segment in zip(parts, chunk, strict=True)])

    return attend


def attend_padded(chunk: Sequence[Segment], done: PrefilledPrompts) -> Attend:
    """All segments at once: queries are padded to the longest segment, keys to the longest path."""
    device, (groups, head_dim) = done.keys.device, done.keys.shape[2:]
    lengths = torch.tensor([len(segment.tokens) for segment in chunk])
    starts = torch.tensor([segment.start for segment in chunk])
    first = done.span(chunk[0]).start
    spans = [done.span(segment) for segment in chunk]
    query_index = pad_sequence([torch.arange(s.start - first, s.stop - first) for s in spans], batch_first=True)
    paths = [torch.cat([torch.arange(x.start, x.stop) for x in map(done.span, s.path)]) for s in chunk]
    key_index = pad_sequence(paths, batch_first=True).to(device)  # [segments, keys]
    order = torch.arange(query_index.shape[1])
    # Query i of a segment stands at position start + i and sees the keys up to there. A padded query sees some keys,
    # too, and is left out of the result.
    visible = torch.arange(key_index.shape[1]) <= (starts[:, None] + order)[:, :, None]
    real = (order < lengths[:, None]).to(device)
    query_index, visible = query_index.to(device), visible[:, None].to(device)

    def attend(layer: int, query: Tensor) -> Tensor:
        num, per_group = query.shape[0], query.shape[1] // groups
        # The heads of a group share keys. So they count as more queries: [segments, groups, heads x queries, head_dim].
        shape = (*query_index.shape, groups, per_group, head_dim)
        folded = query[query_index].view(shape).permute(0, 2, 3, 1, 4).flatten(2, 3)
        key, value = (x[layer][key_index].transpose(1, 2) for x in (done.keys, done.values))
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=visible.repeat(1, 1, per_group, 1))
        found = out.view(len(chunk), groups, per_group, -1, head_dim).permute(0, 3, 1, 2, 4)[real]
        return found.reshape(num, -1)

    return attend
