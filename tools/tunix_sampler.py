"""Tunix's vanilla sampler on the work of `bench_engine.py`: `VENV/bin/python tunix_sampler.py CHECKPOINT`.

Reads a line of JSON (the arguments of `Bench.run`), samples, and answers with a line of JSON: seconds, CPU seconds and
useful tokens. Runs in Tunix's environment, so it imports nothing of this project.
"""

from __future__ import annotations

import json
import pathlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models import safetensors_loader
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen2 import params as loading

STOP, STOP_AT = 1, 16  # the token at which half of the rows stop, after so many


class Ids:
    """A tokenizer of numbers with spaces between them, which costs next to nothing."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(str(int(i)) for i in ids)

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return STOP

    def pad_id(self) -> int:
        return 0


class HalfStops(qwen2.Qwen2):
    """Every other row draws the stop token after `STOP_AT` tokens, and no row does before."""

    def __call__(self, input_tokens, positions, cache, attention_mask=None, **more):
        logits, cache = super().__call__(input_tokens, positions, cache, attention_mask, **more)
        stops = (positions[:, -1] == 128 + STOP_AT - 2) & (jnp.arange(logits.shape[0]) % 2 == 0)
        return logits.at[:, -1, STOP].add(jnp.where(stops, 1e9, -1e9)), cache


class Bench:
    """The model, and a sampler for each size of cache."""

    def __init__(self, checkpoint: str):
        hf = json.loads((pathlib.Path(checkpoint) / "config.json").read_text())
        self.checkpoint, self.never = checkpoint, hf["vocab_size"] + 7
        self.head = hf["hidden_size"] // hf["num_attention_heads"]
        self.config = qwen2.ModelConfig(
            num_layers=hf["num_hidden_layers"], vocab_size=hf["vocab_size"], embed_dim=hf["hidden_size"],
            hidden_dim=hf["intermediate_size"], num_heads=hf["num_attention_heads"], head_dim=self.head,
            num_kv_heads=hf["num_key_value_heads"], rope_theta=int(hf["rope_theta"]), norm_eps=hf["rms_norm_eps"],
            use_tied_embedding=hf["tie_word_embeddings"], dtype=jnp.float32, param_dtype=jnp.float32,
        )  # fmt: skip
        self.samplers: dict[Any, Sampler] = {}

    def sampler(self, cache: int, cls: type | None = None) -> Sampler:
        if (cache, cls) not in self.samplers:
            if cls is None:
                model = loading.create_model_from_safe_tensors(self.checkpoint, self.config, dtype=jnp.float32)
            else:
                model = safetensors_loader.load_and_create_model(
                    file_dir=self.checkpoint, model_class=cls, config=self.config, dtype=jnp.float32,
                    key_mapping=loading._get_key_and_transform_mapping,
                )  # fmt: skip
            sizes = CacheConfig(
                cache_size=cache, num_layers=self.config.num_layers, num_kv_heads=self.config.num_kv_heads,
                head_dim=self.head,
            )  # fmt: skip
            self.samplers[cache, cls] = Sampler(model, Ids(), sizes)
        return self.samplers[cache, cls]

    def batch(self, prompts: list[list[int]], new: int, cache: int, cls: type | None = None) -> int:
        """Useful tokens of one call; every row runs to the end unless its model stops it."""
        texts = [" ".join(map(str, prompt)) for prompt in prompts]
        sampled = self.sampler(cache, cls)(
            texts, max_generation_steps=new, max_prompt_length=len(prompts[0]), temperature=1.0, top_p=1.0, seed=3,
            eos_tokens=[STOP if cls else self.never],
        )  # fmt: skip
        return sum(len(tokens) for tokens in sampled.tokens)

    def turns(self, prompts: list[list[int]], new: int, observation: int, turns: int, padded_to: int) -> int:
        """As its agentic learner does it: each call one prompt, the whole conversation as text, from a pool of threads.

        The sampler pads a prompt to the next power of two, at least `padded_to`.
        """
        sampler = self.sampler(1024 + new)

        def one(number: int) -> int:
            text, useful = " ".join(map(str, prompts[number])), 0
            for turn in range(turns):
                sampled = sampler(
                    [text], max_generation_steps=new, max_prompt_length=padded_to, temperature=1.0, top_p=1.0,
                    seed=number * 7 + turn, eos_tokens=[self.never],
                )  # fmt: skip
                useful += len(sampled.tokens[0])
                text = f"{text} {sampled.text[0]} " + " ".join(["5"] * observation)
            return useful

        with ThreadPoolExecutor(len(prompts)) as pool:
            return sum(pool.map(one, range(len(prompts))))

    def run(self, case: str, prompts: list[list[int]], new: int, observation: int, turns: int) -> int:
        match case:
            case "full" | "group":
                return self.batch(prompts, new, len(prompts[0]) + new)
            case "cache2048":
                return self.batch(prompts, new, 2048)
            case "half_stop":  # a queue of 64, sixteen at a time
                parts = [prompts[i : i + 16] for i in range(0, len(prompts), 16)]
                return sum(self.batch(part, new, len(prompts[0]) + new, HalfStops) for part in parts)
            case "agentic_padded":
                return self.turns(prompts, new, observation, turns, padded_to=128)
            case "agentic_documented":
                return self.turns(prompts, new, observation, turns, padded_to=1024)
        raise ValueError(case)


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not get between the answers
    bench = Bench(sys.argv[1])
    for line in sys.stdin:
        job = json.loads(line)
        started_s, cpu_s = time.perf_counter(), time.process_time()
        tokens = bench.run(**job)
        took = dict(seconds=time.perf_counter() - started_s, cpu_s=time.process_time() - cpu_s, tokens=tokens)
        print(json.dumps(took), file=answers, flush=True)


if __name__ == "__main__":
    main()
