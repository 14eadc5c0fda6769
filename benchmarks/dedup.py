"""De-duplication of prompts at ROUGE-L 0.7: `RougeLIndex` against rouge-score on all pairs.

    python benchmarks/dedup.py                        # 100,000 prompts, as the goal says
    python benchmarks/dedup.py --num-prompts 2000     # a quick look

The prompts imitate the output of self-instruct. They have a few thousand sentence patterns, words with the frequencies
of natural text, lengths from a line to a paragraph, and a share of near and exact duplicates. A prompt is kept if it
resembles none that was kept before. The stage `prompts` does the same.

rouge-score (pip install rouge-score) does the same comparisons one pair at a time. It is measured on a sample of the
pairs, and its time is multiplied by the number of all pairs. Both run on one core, in this process.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path

from rapidfuzz.distance import Indel
from tqdm import tqdm

from nemo_srl.data.dedup import RougeLIndex
from nemo_srl.words import tokenize

THRESHOLD = 0.7
OPENERS = """write a {w} {w} about|explain in simple terms|give me {w} examples of|what is the difference
between {w} and|how can i improve|you are a {w}. describe|summarize the {w} of|translate into {w}: {w}
and|why do {w} people like|list the main parts of|compare {w} {w} with|i have a {w} problem with|suggest
three names for a {w}|create a weekly plan for|classify each of these as {w} or {w}:|rewrite this so that
it sounds {w}:|solve for {w}:|find the mistake in|is it true that {w} causes|help me decide between {w}
and"""
BODIES = """the {w} {w} of {w}|{w} and {w} in a {w}|a {w} who {w} every {w}|{w}, {w}, {w} and {w}|{w} {w}
from {w} to {w}|an old {w} that {w} the {w} {w}|{w} when the {w} is too {w}|{w}|the {w} between {w} and
{w} {w}|how {w} {w} became {w}|my {w} {w} at the {w}|{w} without {w} or {w}"""
TAILS = """|for a {w} audience|in less than {w} words|and give a {w} reason for each|using {w} and {w}
only|so that a child understands it|as a {w} {w}|with at least one {w} {w}|then say what {w} would do|step
by step, starting from {w}|and end with a question about {w}|without the word {w}|like a {w} would in a
{w} {w}"""


def synthesize(num_prompts: int, *, seed: int) -> list[str]:
    """Prompts with Zipf-distributed words. 15% repeat an earlier prompt, and most of these change some of its words."""
    rng = random.Random(seed)
    openers, bodies, tails = (" ".join(text.split()).split("|") for text in (OPENERS, BODIES, TAILS))
    vocabulary = ["".join(rng.choices("aeioubcdfglmnprst", k=rng.randint(3, 10))) for _ in range(20_000)]
    weights = [1 / (rank + 10) for rank in range(len(vocabulary))]
    words = iter(rng.choices(vocabulary, weights, k=60 * num_prompts))
    prompts: list[str] = []
    for _ in range(num_prompts):
        if prompts and rng.random() < 0.15:
            tokens = rng.choice(prompts).split()
            for _ in range(rng.randint(0, 1 + len(tokens) // 4)):
                tokens[rng.randrange(len(tokens))] = next(words)
        else:
            num_sentences = rng.choices([1, 2, 3], [80, 15, 5])[0]
            sentences = (
                f"{rng.choice(openers)} {rng.choice(bodies)} {rng.choice(tails)}" for _ in range(num_sentences)
            )
            tokens = [t.replace("{w}", next(words)) for t in " ".join(sentences).split()]
        prompts.append(" ".join(tokens))
    return prompts


def measure_index(prompts: list[str]) -> tuple[float, list[str], int]:
    """Seconds, the kept prompts, and the number of pairs if each prompt is compared with all prompts kept so far."""
    index, kept, num_pairs = RougeLIndex(THRESHOLD), list[str](), 0
    start = time.perf_counter()
    for prompt in tqdm(prompts, desc="RougeLIndex", disable=None):
        num_pairs += len(kept)
        if not index.is_duplicate(prompt):
            index.add(prompt)
            kept.append(prompt)
    return time.perf_counter() - start, kept, num_pairs


def seconds_per_pair(prompts: list[str], *, num_pairs: int, seed: int) -> dict[str, float]:
    """Seconds per pair by program. Each figure is the median of five means."""
    from rouge_score.rouge_scorer import RougeScorer

    rng, scorer = random.Random(seed), RougeScorer(["rougeL"], use_stemmer=False)
    token_lists = {prompt: tokenize(prompt) for prompt in prompts}
    seconds: dict[str, list[float]] = {"rouge_score": [], "rapidfuzz": []}
    for _ in range(5):
        pairs = [(rng.choice(prompts), rng.choice(prompts)) for _ in range(num_pairs)]
        start = time.perf_counter()
        for a, b in pairs:
            scorer.score(a, b)["rougeL"].fmeasure  # noqa: B018
        seconds["rouge_score"].append((time.perf_counter() - start) / num_pairs)
        tokens = [(token_lists[a], token_lists[b]) for a, b in pairs]
        start = time.perf_counter()
        for a_tokens, b_tokens in tokens:
            Indel.normalized_similarity(a_tokens, b_tokens, score_cutoff=THRESHOLD)
        seconds["rapidfuzz"].append((time.perf_counter() - start) / num_pairs)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-prompts", type=int, default=100_000)
    parser.add_argument("--sample-pairs", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/dedup.json"))
    args = parser.parse_args()

    prompts = synthesize(args.num_prompts, seed=args.seed)
    seconds, kept, num_pairs = measure_index(prompts)
    per_pair = seconds_per_pair(prompts, num_pairs=args.sample_pairs, seed=args.seed)
    result = {
        "num_prompts": len(prompts),
        "mean_tokens": statistics.fmean(len(tokenize(p)) for p in prompts),
        "num_kept": len(kept),
        "num_pairs": num_pairs,
        "seconds": seconds,
        "rouge_score_seconds_extrapolated": per_pair["rouge_score"] * num_pairs,
        "rapidfuzz_all_pairs_seconds_extrapolated": per_pair["rapidfuzz"] * num_pairs,
        "speedup_over_rouge_score": per_pair["rouge_score"] * num_pairs / seconds,
        "speedup_over_rapidfuzz_all_pairs": per_pair["rapidfuzz"] * num_pairs / seconds,
        "python": platform.python_version(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
