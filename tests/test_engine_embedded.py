"""The embedded engine against transformers, and its promises: batches, resumption, limits, errors."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from nemo_srl.engines import open_engine
from nemo_srl.engines.embedded import engine as embedded
from nemo_srl.engines.embedded.batching import prefix_tree
from nemo_srl.engines.embedded.engine import EmbeddedEngine
from nemo_srl.engines.embedded.llama import LlamaModel
from nemo_srl.engines.embedded.settings import EmbeddedSettings
from nemo_srl.engines.embedded.stop import StopStrings, cut
from nemo_srl.errors import ConfigError, DataError, EngineError, ModelError
from nemo_srl.judging.points import parse_score, score_lines
from nemo_srl.protocols import GenerationRequest, SamplingParams
from nemo_srl.records import Completion
from tests.completions import collect, keys
from tests.families import OTHERS
from tests.tiny import make_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
SAMPLED = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=24)
GREEDY = SamplingParams(temperature=0, top_p=1.0, max_tokens=24)


def rewrite_config(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose distributions are sharp enough for greedy choices to be clear and samples to end."""
    directory = make_model(tmp_path_factory.mktemp("engine") / "model", ["a tiny text"], vocab_size=300)
    weights = load_file(directory / "model.safetensors")
    weights = {k: v * (4.0 if "norm" not in k else 1.0) for k, v in weights.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    rewrite_config(directory, eos_token_id=[2, *range(100, 110)])
    (directory / "generation_config.json").unlink()
    return directory


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> EmbeddedEngine:
    return EmbeddedEngine(model_dir, EmbeddedSettings(dtype="float32", max_batch_size=7))


def make_requests(n: int = 3) -> list[GenerationRequest]:
    """Prompts of 5 to 75 tokens; some share most of theirs, and two are the same."""
    generator = torch.Generator().manual_seed(0)
    stem = tuple(torch.randint(3, 100, (40,), generator=generator).tolist())
    prompts = [stem, stem[:20], *((*stem[:30], *range(20, 20 + i)) for i in (5, 20, 45)), stem[3:8], stem]
    return [GenerationRequest(key=f"r{i}", prompt_token_ids=p, n=n, seed=11) for i, p in enumerate(prompts)]


@pytest.mark.parametrize(
    ("family", "tied", "groups", "rope_scaling"),
    [
        *(
            ("llama", tied, groups, rope)
            for tied in (True, False)
            for groups in (4, 2, 1)
            for rope in (None, LLAMA3_ROPE)
        ),
        *((family, family == "qwen2", 2, None) for family in OTHERS),
    ],
)
def test_logits_are_those_of_transformers(
    tmp_path: Path, family: str, tied: bool, groups: int, rope_scaling: dict[str, Any] | None
) -> None:
    directory = make_model(tmp_path / "m", ["text"], family=family, num_query_groups=groups, tie_word_embeddings=tied)
    if rope_scaling:
        rewrite_config(directory, rope_scaling=rope_scaling)
    reference = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32).eval()
    model = LlamaModel(directory, dtype=torch.float32)
    stem = tuple(range(20, 250))
    prompts = [stem, (*stem[:100], 7, 8, 9), (5,), stem[:50]]
    segments, ends = prefix_tree(prompts)
    prefilled = model.prefill(segments)
    cache = model.new_cache(num_rows=len(prompts), max_prompt=len(stem), max_tokens=4)
    for row, prompt in enumerate(prompts):
        cache.fill(row, 1, *prefilled.of_prompt(ends[prompt]))
    continuation = (33, 44, 55)
    got = [model.logits(torch.stack([prefilled.last_hidden[id(ends[p])] for p in prompts]))]
    for i, token in enumerate(continuation):
        positions = torch.tensor([len(p) + i for p in prompts])
        got.append(model.decode(torch.full((len(prompts),), token), positions, cache))
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            want = reference(torch.tensor([prompt + continuation])).logits[0, len(prompt) - 1 :]
        torch.testing.assert_close(torch.stack([g[row] for g in got]), want, atol=1e-4, rtol=1e-4)


def test_greedy_text_is_that_of_transformers(engine: EmbeddedEngine, model_dir: Path) -> None:
    reference = LlamaForCausalLM.from_pretrained(model_dir, torch_dtype=torch.float32).eval()
    found = collect(engine.generate(make_requests(n=1), GREEDY))
    reasons = set()
    for request in make_requests(n=1):
        prompt = torch.tensor([request.prompt_token_ids])
        tokens = reference.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False, pad_token_id=2
        )[0, prompt.shape[1] :].tolist()
        completion = found[f"{request.key}/00"]
        stopped = tokens[-1] in engine._model.spec.eos_token_ids
        assert completion.num_tokens == len(tokens)
        assert completion.finish_reason == ("stop" if stopped else "length")
        text = engine._tokenizer.decode(tokens[:-1] if stopped else tokens, skip_special_tokens=True)
        assert completion.text == text
        reasons.add(completion.finish_reason)
    assert reasons


def test_finish_reasons(engine: EmbeddedEngine) -> None:
    found = collect(engine.generate(make_requests(), SAMPLED)).values()
    assert {c.finish_reason for c in found} == {"stop", "length"}
    assert all(c.num_tokens == 24 for c in found if c.finish_reason == "length")
    assert any(c.num_tokens < 24 for c in found if c.finish_reason == "stop")


def test_a_stop_string_ends_its_sample_and_changes_no_other(engine: EmbeddedEngine) -> None:
    whole = collect(engine.generate(make_requests(), SAMPLED))
    letters = Counter(x for c in whole.values() for x in set(c.text[2:-2]) if x.isascii())
    stop = tuple(x for x, _ in letters.most_common(2))
    found = collect(engine.generate([replace(r, stop=stop) for r in make_requests()], SAMPLED))
    num_cut = 0
    for key, c in whole.items():
        ends = [c.text.index(s) + len(s) for s in stop if s in c.text]
        if not ends:
            assert found[key] == c
            continue
        assert (found[key].text, found[key].finish_reason) == (c.text[: min(ends)], "stop")
        assert found[key].num_tokens <= c.num_tokens
        num_cut += found[key].num_tokens < c.num_tokens
    assert num_cut >= 2


def test_what_a_token_brings_after_a_stop_string_is_cut_off() -> None:
    pieces = {1: "It is right.", 2: "\nScore", 3: ": 4", 4: "\n\nAnd", 5: "\n"}

    def decode(ids: list[int]) -> str:
        return "".join(pieces[i] for i in ids)

    stop = score_lines(5)
    reached = [StopStrings(decode).reached([1, 2, 3, 4, 5][:n], stop) for n in range(1, 6)]
    assert reached == [False, False, False, True, True]
    assert cut(decode([1, 2, 3, 4, 5]), stop) == "It is right.\nScore: 4\n"
    assert parse_score(cut(decode([1, 2, 3, 4]), stop), max_score=5) == 4
    assert not StopStrings(decode).reached([1, 2, 3, 4], ())
    assert cut("Score: 3.5\n", stop) == "Score: 3.5\n", "points that are not whole end where the model ends"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_interrupted_anywhere_and_resumed_equals_uninterrupted(model_dir: Path, dtype: str) -> None:
    engine = EmbeddedEngine(model_dir, EmbeddedSettings(dtype=dtype, max_batch_size=7))
    requests = make_requests()
    whole = collect(engine.generate(requests, SAMPLED))
    steps = len(list(engine.generate(requests, SAMPLED)))
    for interval in range(1, steps + 1, 4):
        found: dict[str, Completion] = {}
        while len(found) < len(whole):
            before = len(found)
            for yielded, batch in enumerate(engine.generate(requests, SAMPLED, completed=set(found)), start=1):
                assert not {c.key for c in batch} & found.keys()
                found |= {c.key: c for c in batch}
                if yielded == interval:
                    break
            assert len(found) > before
        assert found == whole


def test_a_finished_call_does_no_work(engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = make_requests()
    monkeypatch.setattr(engine, "_run_batch", lambda *_: pytest.fail("nothing was missing"))
    assert list(engine.generate(requests, SAMPLED, completed=keys(requests))) == []


def test_samples_differ_but_not_by_their_batch(engine: EmbeddedEngine, model_dir: Path) -> None:
    requests = make_requests()
    found = collect(engine.generate(requests, SAMPLED))
    assert len({found[f"r0/{i:02d}"].text for i in range(3)}) == 3
    assert found["r0/00"].text != found["r6/00"].text, "the same prompt under another key"
    assert collect(engine.generate(requests[::-1], SAMPLED)) == found
    alone = collect(engine.generate(requests[2:3], SAMPLED))
    assert alone == {key: found[key] for key in alone}
    one_by_one = EmbeddedEngine(model_dir, EmbeddedSettings(dtype="float32", max_batch_size=1))
    assert collect(one_by_one.generate(requests, SAMPLED)) == found


def test_on_a_cpu_more_rows_are_decoded_together_if_their_cache_is_small(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = EmbeddedEngine(model_dir, EmbeddedSettings(dtype="float32", device="cpu"))
    params, requests = (
        SamplingParams(temperature=1.0, top_p=1.0, max_tokens=25),
        make_requests(),
    )  # of 75 tokens at most
    per_row = 100 * found._model.cache_bytes_per_token
    for rows, expected in ((1000, 128), (50, 50), (1, 32)):
        monkeypatch.setattr(embedded, "CPU_CACHE_BYTES", rows * per_row)
        assert found._batch_size(requests, params) == expected
    cache = found._model.allocate_cache(3, 7)
    assert cache.keys.nbytes + cache.values.nbytes == 3 * 7 * found._model.cache_bytes_per_token
    fixed = EmbeddedEngine(model_dir, EmbeddedSettings(dtype="float32", device="cpu", max_batch_size=200))
    assert fixed._batch_size(requests, params) == 200


def test_another_seed_gives_other_samples(engine: EmbeddedEngine) -> None:
    request = make_requests()[0]
    other = GenerationRequest(key=request.key, prompt_token_ids=request.prompt_token_ids, n=3, seed=12)
    assert collect(engine.generate([request], SAMPLED)) != collect(engine.generate([other], SAMPLED))


def test_a_prompt_that_leaves_no_room_gets_no_answer_and_changes_no_other(engine: EmbeddedEngine) -> None:
    fits = GenerationRequest(key="fits", prompt_token_ids=(5,) * 1000, n=1, seed=0)
    long = GenerationRequest(key="long", prompt_token_ids=(5,) * 1001, n=1, seed=0)
    empty = GenerationRequest(key="empty", prompt_token_ids=(), n=2, seed=0)
    found = collect(engine.generate([long, fits, empty], SAMPLED))
    assert found["fits/00"] == collect(engine.generate([fits], SAMPLED))["fits/00"]
    assert (found["long/00"].finish_reason, found["long/00"].text, found["long/00"].num_tokens) == ("too_long", "", 0)
    assert re.search("1001 tokens .*max_tokens=24 .* 1024 tokens", found["long/00"].reason)
    assert [found[f"empty/{i:02d}"].reason for i in range(2)] == ["its prompt has no tokens"] * 2
    assert not list(engine.generate([long, fits, empty], SAMPLED, completed=found)), "none is asked again"


def test_requests_that_make_no_sense_are_refused(engine: EmbeddedEngine) -> None:
    request = make_requests()[0]
    with pytest.raises(DataError, match=r"'r0' occurs more than once"):
        engine.generate([request, request], SAMPLED)
    with pytest.raises(DataError, match=r"max_tokens=1024: no prompt has room .* 1024 tokens \(the model's context\)"):
        engine.generate([request], replace(SAMPLED, max_tokens=1024))
    assert list(engine.generate([], SAMPLED)) == []


def test_a_model_that_diverged_is_an_error_and_not_text(model_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model_dir, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    engine = EmbeddedEngine(broken, EmbeddedSettings(dtype="float32"))
    for params in (SAMPLED, GREEDY):
        with pytest.raises(EngineError, match="not a number"):
            list(engine.generate(make_requests(), params))


def test_unknown_rotary_scaling_is_refused(model_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "yarn"
    shutil.copytree(model_dir, other)
    rewrite_config(other, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    with pytest.raises(ModelError, match=r"yarn.*default, linear and llama3"):
        EmbeddedEngine(other, EmbeddedSettings())


def test_open_engine(model_dir: Path) -> None:
    engine = open_engine(EmbeddedSettings(dtype="float32"), model_dir)
    assert len(collect(engine.generate(make_requests()[:1], SAMPLED))) == 3
    engine.close()
    with pytest.raises(ConfigError, match=r"engine\.name='nope'"):
        open_engine(EmbeddedSettings(name="nope"), model_dir)
    with pytest.raises(ConfigError, match=r"engine\.dtype='int8'"):
        EmbeddedSettings(dtype="int8")
    with pytest.raises(ConfigError, match=r"engine\.max_batch_size=0"):
        EmbeddedSettings(max_batch_size=0)


def test_log_probabilities_of_numbers_are_those_of_transformers_at_their_place(
    engine: EmbeddedEngine, model_dir: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(model_dir)
    digits = {text: engine._tokenizer.convert_tokens_to_ids(text) for text in "0123456789"}
    request = make_requests()[0]
    # Hot enough, and enough samples, for digits to come up among 300 tokens. Most of these are bytes and not text.
    params = SamplingParams(temperature=3.0, top_p=1.0, max_tokens=4, num_logprobs=20)
    found = collect(engine.generate([replace(request, n=300)], params))
    plain = collect(engine.generate([replace(request, n=300)], replace(params, num_logprobs=0)))
    num_checked = 0
    for key, completion in found.items():
        assert completion.text == plain[key].text
        assert plain[key].number_logprobs is None
        for offset, logprobs in completion.number_logprobs or []:
            assert completion.text[offset].isdigit()
            before = engine._tokenizer(completion.text[:offset], add_special_tokens=False)["input_ids"]
            if engine._decode(before) != completion.text[:offset] or "\ufffd" in completion.text[:offset]:
                continue  # the text does not tell which tokens it came from
            ids = torch.tensor([[*request.prompt_token_ids, *before]])
            with torch.no_grad():
                expected = torch.log_softmax(model(ids).logits[0, -1], -1)
            assert logprobs.keys() >= digits.keys()
            for text, token in digits.items():
                assert logprobs[text] == pytest.approx(float(expected[token]), abs=1e-3)
            num_checked += 1
    assert num_checked > 0


def test_every_tensor_is_made_on_the_models_device(model_dir: Path, engine: EmbeddedEngine) -> None:
    """A tensor that is made without a device would be on PyTorch's default one, here a device without data."""
    requests, params = make_requests(), replace(SAMPLED, num_logprobs=3)
    with torch.device("meta"):
        elsewhere = EmbeddedEngine(model_dir, EmbeddedSettings(dtype="float32", max_batch_size=7, device="cpu"))
        found = collect(elsewhere.generate(requests, params))
    assert found == collect(engine.generate(requests, params))


def test_a_device_that_is_unknown_or_not_there_is_refused(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"engine\.device='tpu': must be one of auto, cpu, cuda"):
        EmbeddedSettings(device="tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"engine\.device='cuda'.*engine\.device=cpu.*doctor"):
        EmbeddedEngine(model_dir, EmbeddedSettings(device="cuda"))


def test_a_full_gpu_names_the_setting_to_lower(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine = EmbeddedEngine(model_dir, EmbeddedSettings(max_batch_size=5))
    monkeypatch.setattr(LlamaModel, "prefill", full)
    with pytest.raises(EngineError, match=r"engine\.max_batch_size=5: the GPU's memory is full. Lower it"):
        collect(engine.generate(make_requests(), SAMPLED))
