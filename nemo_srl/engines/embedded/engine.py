"""`GenerationEngine` on the embedded decoder.

The same requests and parameters give the same completions on the same machine, byte for byte. An interruption changes
nothing: batches depend on the list of requests alone. A batch whose completions are all there is skipped. A batch that
was interrupted runs again as a whole, and yields what was missing.

A sample does not depend on its batch either, if the machine's matrix products round a row in the same way whatever
the other rows are. Those of oneDNN do (AVX-512, bfloat16 and float32). Elsewhere it is true up to rounding.

A request that the context has no room for gives completions without an answer. Raises `EngineError` if the model's
logits are not numbers. Log-probabilities are those of the model at temperature 1. They are given for every token that
is a whole number, and not only for the most probable ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from nemo_srl.engines.checks import length_check, plan_samples
from nemo_srl.engines.embedded.batching import SampleSlot, plan_batches, prefix_tree
from nemo_srl.engines.embedded.cuda_graphs import CudaGraphs, GraphedSteps
from nemo_srl.engines.embedded.kv_cache import KVCache, rows_without
from nemo_srl.engines.embedded.llama import LlamaModel
from nemo_srl.engines.embedded.sampling import choose, sample_uniforms
from nemo_srl.engines.embedded.settings import BATCH_SIZES, EmbeddedSettings
from nemo_srl.engines.embedded.stop import StopStrings, cut
from nemo_srl.errors import ConfigError, EngineError
from nemo_srl.models.tokenizer import load_tokenizer
from nemo_srl.protocols import GenerationRequest, SamplingParams
from nemo_srl.records import Completion, NumberLogprobs

CPU_CACHE_BYTES, MIN_CPU_BATCH_SIZE = 10**9, 32
"""Unless `engine.max_batch_size` is set."""


class EmbeddedEngine:
    """Serves the Hugging Face directory `model_dir` from this process."""

    def __init__(self, model_dir: Path, settings: EmbeddedSettings) -> None:
        """Raises `ConfigError` if the device is not there."""
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                f"engine.device='cuda': torch {torch.__version__} finds no usable GPU. Set engine.device=cpu. "
                "`python recipes/doctor.py platform=cuda` says what is wrong with the GPU."
            )
        self._model = LlamaModel(model_dir, dtype=getattr(torch, settings.dtype), device=device)
        self._steps: Steps = self._model
        if device == "cuda" and settings.cuda_graphs:
            self._steps = GraphedSteps(self._model, CudaGraphs())
        self._max_batch_size = settings.max_batch_size or BATCH_SIZES[device]
        self._limits_cache = device == "cpu" and settings.max_batch_size is None
        self._check = length_check(self._model.spec.max_position_embeddings)
        self._tokenizer = load_tokenizer(model_dir)
        self._stop = StopStrings(self._decode)
        self._numbers: dict[int, str] | None = None

    def generate(
        self, requests: Sequence[GenerationRequest], params: SamplingParams, *, completed: Collection[str] = ()
    ) -> Iterator[tuple[Completion, ...]]:
        """See `protocols.GenerationEngine`. Requests are checked in this call, not at the first `next`."""
        plan = plan_samples(requests, params, completed, check=self._check)
        batches = plan_batches(plan.requests, self._batch_size(plan.requests, params))
        return chain(plan.unanswered, self._generate(batches, params, plan.missing))

    def _batch_size(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> int:
        """On a CPU, more rows read the weights less often. But nobody has planned the memory of their cache."""
        if not self._limits_cache or not requests:
            return self._max_batch_size
        length = max(len(request.prompt_token_ids) for request in requests) + params.max_tokens
        fitting = CPU_CACHE_BYTES // (length * self._model.cache_bytes_per_token)
        return max(MIN_CPU_BATCH_SIZE, min(self._max_batch_size, fitting))

    def close(self) -> None:
        """There is nothing to end. The memory is freed with the object."""

    def _generate(
        self, batches: list[list[SampleSlot]], params: SamplingParams, missing: dict[str, list[int]]
    ) -> Iterator[tuple[Completion, ...]]:
        for slots in batches:
            wanted = {slot.key for slot in slots if slot.index in missing.get(slot.request.key, ())}
            if not wanted:
                continue
            for finished in self._explained(self._run_batch(slots, params)):
                if new := tuple(c for c in finished if c.key in wanted):
                    wanted -= {c.key for c in new}
                    yield new
                if not wanted:
                    break

    def _explained(self, batch: Iterator[list[Completion]]) -> Iterator[list[Completion]]:
        """Raises `EngineError` with the remedy when the GPU's memory is full."""
        try:
            yield from batch
        except torch.OutOfMemoryError as e:
            raise EngineError(
                f"engine.max_batch_size={self._max_batch_size}: the GPU's memory is full. Lower it. nvidia-smi shows "
                f"whether another process uses the GPU. ({e})"
            ) from e

    def _run_batch(self, slots: list[SampleSlot], params: SamplingParams) -> Iterator[list[Completion]]:
        batch = _Batch(self._model, self._steps, slots, params, self._number_tokens() if params.num_logprobs else {})
        end_tokens = frozenset(self._model.spec.eos_token_ids)

        def ends(slot: SampleSlot, tokens: list[int]) -> bool:
            return tokens[-1] in end_tokens or self._stop.reached(tokens, slot.request.stop)

        while batch.slots:
            if finished := batch.step(ends):
                yield [self._completion(*sample, end_tokens, params) for sample in finished]

    def _number_tokens(self) -> dict[int, str]:
        """The tokens that are whole numbers, as {id: text}. Their texts may begin with blanks."""
        if self._numbers is None:
            texts = enumerate(self._decode([i]) for i in range(self._model.spec.vocab_size))
            self._numbers = {i: text for i, text in texts if text.isascii() and text.strip().isdigit()}
        return self._numbers

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _completion(
        self,
        slot: SampleSlot,
        tokens: list[int],
        logprobs: dict[int, list[float]],
        end_tokens: frozenset[int],
        params: SamplingParams,
    ) -> Completion:
        ended = tokens[-1] in end_tokens
        text = cut(self._decode(tokens[:-1] if ended else tokens), slot.request.stop)
        stopped = ended or text.endswith(slot.request.stop)
        return Completion(
            request_key=slot.request.key,
            index=slot.index,
            text=text,
            num_tokens=len(tokens),
            finish_reason="stop" if stopped else "length",
            number_logprobs=self._number_logprobs(text, tokens, logprobs) if params.num_logprobs else None,
        )

    def _number_logprobs(self, text: str, tokens: list[int], logprobs: dict[int, list[float]]) -> NumberLogprobs:
        numbers = self._number_tokens()
        found: NumberLogprobs = []
        for position, values in logprobs.items():
            number, before = numbers[tokens[position]], self._decode(tokens[:position])
            if not text.startswith(before):
                continue  # half a character stands before the number, so its place in the text is unknown
            begin = len(before) + len(number) - len(number.lstrip())
            found.append((begin, dict(zip(numbers.values(), values, strict=True))))
        return found


class Steps(Protocol):
    """What decodes: the model itself, or `GraphedSteps` around it."""

    def new_cache(self, *, num_rows: int, max_prompt: int, max_tokens: int) -> KVCache: ...

    def decode(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor: ...


class _Batch:
    """Sequences that are decoded together: one token each per `step`. A sequence that ends leaves the batch."""

    def __init__(
        self,
        model: LlamaModel,
        steps: Steps,
        slots: Sequence[SampleSlot],
        params: SamplingParams,
        numbers: Collection[int],
    ) -> None:
        """`numbers` are token ids. Wherever one of them is chosen, the log-probabilities of all of them are kept."""
        self.model = model
        self.steps = steps
        self.params = params
        self.slots = list(slots)
        self.tokens: list[list[int]] = [[] for _ in slots]
        self.logprobs: list[dict[int, list[float]]] = [{} for _ in slots]
        self._numbers = model.tensor(list(numbers))
        self._is_number = frozenset(numbers)
        uniforms = [sample_uniforms(s.request.seed, s.request.key, s.index, params.max_tokens) for s in slots]
        self._uniforms = torch.stack(uniforms).to(model.device)
        self._positions = model.tensor([len(s.request.prompt_token_ids) for s in slots])
        self._prefill()

    @torch.inference_mode()
    def _prefill(self) -> None:
        prompts = [slot.request.prompt_token_ids for slot in self.slots]
        segments, ends = prefix_tree(prompts)
        prefilled = self.model.prefill(segments)
        self._cache = self.steps.new_cache(
            num_rows=len(prompts), max_prompt=max(map(len, prompts)), max_tokens=self.params.max_tokens
        )
        hidden: list[Tensor] = []
        source: list[int] = []  # for each row, the number of its prompt in `hidden`
        for prompt, rows in groupby(prompts):
            count = len(list(rows))
            self._cache.fill(len(source), count, *prefilled.of_prompt(ends[prompt]))
            source += [len(hidden)] * count
            hidden.append(prefilled.last_hidden[id(ends[prompt])])
        self._logits = self.model.logits(torch.stack(hidden))[source]

    @torch.inference_mode()
    def step(
        self, ends: Callable[[SampleSlot, list[int]], bool]
    ) -> list[tuple[SampleSlot, list[int], dict[int, list[float]]]]:
        """Choose one token for every sequence. Removes and returns the sequences that ended with it.

        Each is returned as its slot, its tokens, and by position the log-probabilities of numbers.
        """
        num_done, params = len(self.tokens[0]), self.params
        if num_done:
            last = self.model.tensor([tokens[-1] for tokens in self.tokens])
            self._logits = self.steps.decode(last, self._positions, self._cache)
            self._positions += 1
        uniforms = self._uniforms[:, num_done]
        chosen = choose(self._logits, uniforms, temperature=params.temperature, top_p=params.top_p).tolist()
        for row, token in enumerate(chosen):
            self.tokens[row].append(token)
        if numeric := [row for row, token in enumerate(chosen) if token in self._is_number]:
            logprobs = torch.log_softmax(self._logits[numeric].float(), -1)[:, self._numbers]
            for row, values in zip(numeric, logprobs.tolist(), strict=True):
                self.logprobs[row][num_done] = values
        if -1 in chosen:
            raise EngineError(
                f"request {self.slots[chosen.index(-1)].request.key!r}: the model's output is not a number. Its "
                "weights are damaged or its training diverged. If it is the model of a user, copy or download it "
                "again. If a stage of this run trained it, look at the training's loss, delete the directory of that "
                "stage, and lower its learning rate."
            )
        full = num_done + 1 == params.max_tokens
        ended = [i for i, slot in enumerate(self.slots) if full or ends(slot, self.tokens[i])]
        finished = [(self.slots[i], self.tokens[i], self.logprobs[i]) for i in ended]
        if ended:
            self._keep(rows_without(len(chosen), ended))
        return finished

    def _keep(self, rows: list[int]) -> None:
        self._cache.keep(rows)
        self.slots = [self.slots[i] for i in rows]
        self.tokens = [self.tokens[i] for i in rows]
        self.logprobs = [self.logprobs[i] for i in rows]
        self._uniforms, self._positions = self._uniforms[rows], self._positions[rows]
