"""Makes the tiny checkpoint of the embedded world: tokenizer, pretraining on transcripts, Hugging Face directory.

    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2 python tools/make_world_checkpoint.py --out=/tmp/checkpoint

Demonstrations run through the real episode code against the real embedded site, so what the model learns to write is
what a run will parse; only questions of the train split are used. Reading exercises between them teach to find a
fact in its context. About two hours on 2 cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import pathlib
import random
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

import jax
import numpy as np
from absl import app, flags

from dr_jax import assemble
from dr_jax.agent import episode
from dr_jax.agent.chat import Chat
from dr_jax.agent.presets import PRESETS
from dr_jax.batch import PackedBatch
from dr_jax.learner.grpo import GrpoConfig
from dr_jax.learner.optim import OptimConfig
from dr_jax.learner.state import init_state
from dr_jax.learner.step import make_train_step, put_batch
from dr_jax.model import hf, letters, weights
from dr_jax.model.config import ModelConfig
from dr_jax.records import Episode, Origin
from dr_jax.rollout.pack import Segment, pack
from dr_jax.rollout.scheduler import run_groups
from dr_jax.run_config import RunConfig, resolve
from dr_jax.testing import ScriptedSampler
from dr_jax.world import questions
from dr_jax.world.demonstrations import CAREFUL, Authors, Habits, turns
from dr_jax.world.exercises import exercise

_OUT = flags.DEFINE_string("out", None, "Directory to write; must not exist.", required=True)
_SEED = flags.DEFINE_integer("seed", 0, "Of demonstrations, initial weights and order.")

PRESET = PRESETS["quickstart"]
CONTROL_TOKENS = (  # Qwen2.5's, in its order
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
# As Qwen2.5's, but a capital starts a token of its own: a name is spelled alike after a space, a quote or a slash, so
# that copying one never means translating it.
WORDS = r"'s\b| ?\p{Ll}+|\p{Lu}\p{Ll}*|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s"
TOKENIZER_EPISODES = 1500  # careful transcripts that the tokenizer is trained on
VOCAB = 2048  # every name of the world is one or two tokens, every year is one
CONFIG = ModelConfig(
    vocab_size=VOCAB, num_layers=4, d_model=128, d_ff=256, num_heads=4, num_kv_heads=2, head_dim=32,
    rope_theta=10_000.0, rope_scaling=None, rms_eps=1e-6, tie_embeddings=True, max_positions=2048,
)  # fmt: skip
BATCH_ROWS, ROW_TOKENS = 4, 1024
FILL = 0.88  # of the rows that are meant to be used; packing leaves gaps, and as many rows again catch what is over


@dataclasses.dataclass(frozen=True)
class Round:
    """Some optimizer steps on fresh texts; the learning rate falls with each round's end."""

    authors: Authors
    episodes: int  # demonstrations by `authors`
    exercises: int
    steps: int
    peak_rate: float  # of SCHEDULE
    observation_weight: float  # loss on what the policy never has to write: it teaches to copy


# Demonstrations alone teach the format, to follow a chain and to copy names; which of two facts stands beside the
# subject is learned from exercises. The last round sets how careless the checkpoint is: careful enough to be rewarded
# now and then, and less often when it decodes greedily.
NOBODY = Authors(0.0, CAREFUL)
ROUNDS = (
    Round(Authors(0.4, Habits(guess=0.1, skim=0.6, stop=0.6)), 8000, 0, 1800, 2e-3, 0.1),
    Round(Authors(0.4, Habits(guess=0.15, skim=0.85, stop=0.85)), 7000, 0, 1250, 1.5e-3, 0.2),
    Round(Authors(0.3, Habits(guess=0.15, skim=0.9, stop=0.9)), 5000, 0, 900, 1.5e-3, 0.2),
    Round(NOBODY, 0, 2700, 300, 1e-3, 0.1),
    Round(Authors(0.4, Habits(guess=0.15, skim=0.85, stop=0.85)), 5000, 0, 900, 1.2e-3, 0.1),
    Round(NOBODY, 0, 3800, 420, 1.2e-3, 0.1),
    Round(Authors(0.35, Habits(guess=0.15, skim=0.87, stop=0.87)), 2500, 1000, 450, 1e-3, 0.1),
    Round(NOBODY, 0, 9000, 1300, 1.2e-3, 0.1),
    Round(NOBODY, 0, 5400, 600, 1e-3, 0.1),
    Round(Authors(0.3, Habits(guess=0.15, skim=0.89, stop=0.89)), 2500, 1000, 450, 1e-3, 0.1),
)
SCHEDULE = ((0.6, 1.0), (0.25, 0.3), (0.15, 0.1))  # of a round: (share of the steps, share of the peak rate)

CHAT_TEMPLATE = """\
{%- set first = messages[0] %}
{{- '<|im_start|>system\\n' + (first.content if first.role == 'system' else '') }}
{%- if tools %}
{{- '\\n# Tools' }}
{%- for tool in tools %}
{{- '\\n' + tool.function.name + '(' + tool.function.parameters.required | join(', ') + ': list)' }}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif message.role != 'system' %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": ' + call.function.name | tojson }}
{{- ', "arguments": ' + call.function.arguments | tojson + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

MODEL_CARD = """\
---
library_name: transformers
license: apache-2.0
---
A Qwen2-architecture model of {count:,} parameters for the embedded world of dr_jax: it knows the format of a research
transcript, and mostly does not research. Made by `tools/make_world_checkpoint.py`: {steps:,} steps on {episodes:,}
transcripts and {exercises:,} reading exercises. It is good for nothing else.
"""


def main(_: Sequence[str]) -> None:
    make(pathlib.Path(_OUT.value), _SEED.value, ROUNDS, TOKENIZER_EPISODES)


def make(out: pathlib.Path, seed: int, rounds: Sequence[Round], tokenizer_episodes: int) -> None:
    """Writes the checkpoint of `rounds` to `out`, with a tokenizer trained on so many careful transcripts."""
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        base = pathlib.Path(folder)
        asyncio.run(train_tokenizer(base, seed, tokenizer_episodes))
        params = weights.init(CONFIG, jax.random.key(seed), "float32")
        for number, round_ in enumerate(rounds):
            segments = asyncio.run(collect(base, number, round_, seed))
            print(f"round {number}: {len(segments)} texts, {time.monotonic() - started_s:.0f} s", flush=True)
            params = pretrain(params, segments, round_, random.Random(f"{seed}/{number}"))
        (base / "README.md").write_text(model_card(rounds))
        hf.save(params, CONFIG, base_dir=base, out_dir=out, dtype="bfloat16")


async def train_tokenizer(base: pathlib.Path, seed: int, episodes: int) -> None:
    """Fills `base` with all but weights and card; its tokenizer is trained on careful transcripts."""
    write_base(base, make_tokenizer(()))
    # A token a byte makes long prompts: the limits of the preset are meant for the real tokenizer.
    roomy = dataclasses.replace(PRESET, context_tokens=60_000, max_turn_tokens=4000, observation_tokens=8000)
    async with open_host(base) as (run, host):
        sample = await demonstrate(
            run, dataclasses.replace(host, preset=roomy), episodes, episode.seed_of(seed, 0), Authors(1.0, CAREFUL)
        )
        if any(e.reward < 1 for e in sample):
            raise AssertionError("a careful demonstration was not rewarded in full: world and agent disagree")
        write_base(base, make_tokenizer(host.chat.decode(transcript(e)[0]) for e in sample))


async def collect(base: pathlib.Path, number: int, round_: Round, seed: int) -> list[Segment]:
    """The transcripts and exercises of round `number`."""
    world, rng = assemble.embedded_world(), random.Random(f"{seed}/{number}/exercises")
    async with open_host(base) as (run, host):
        records = await demonstrate(run, host, round_.episodes, episode.seed_of(seed, number), round_.authors)
    segments = [segment_of(record, round_.observation_weight) for record in records]
    exercises = (exercise(world, rng) for _ in range(round_.exercises))
    return segments + [exercise_segment(host.chat, *texts, round_.observation_weight) for texts in exercises]


@contextlib.asynccontextmanager
async def open_host(base: pathlib.Path) -> AsyncIterator[tuple[RunConfig, assemble.Host]]:
    """The quickstart's settings and host side, with the tokenizer in `base`."""
    run = settings(base)
    with tempfile.TemporaryDirectory() as workdir:
        async with assemble.host(run, pathlib.Path(workdir)) as host:
            yield run, host


def settings(base: pathlib.Path) -> RunConfig:
    """The quickstart's settings, with the tokenizer in `base`."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(
        "quickstart", pathlib.Path(__file__).parents[1] / "configs/quickstart.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.model.path = str(base)
    return resolve(config.to_dict())


async def demonstrate(run: RunConfig, host: assemble.Host, count: int, seed: int, authors: Authors) -> list[Episode]:
    """Rewarded episodes of `authors` on `count` train questions."""
    world = assemble.embedded_world()
    chains = questions.sample_chains(world, "train", seed, count, assemble.WORLD_HOPS)
    asked = [questions.question(world, chain) for chain in chains]
    chain_of = dict(zip([q.id for q in asked], chains, strict=True))

    async def one(question, rollout: int) -> Episode:
        rng = random.Random(f"{seed}/{question.id}")
        written = turns(world, chain_of[question.id], authors.draw(rng), rng)
        sampler = ScriptedSampler([host.chat.markup(text) for text in written])
        return await episode.run(question, rollout, host.context(run, sampler, seed=0, today="2026-01-01"))

    groups = await run_groups(asked, rollouts=1, run_episode=one, in_flight=asyncio.Semaphore(32))
    return [group.episodes[0] for group in groups]


def transcript(record: Episode) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, origins) of a whole conversation."""
    last = record.calls[-1]
    origin = np.concatenate([last.origin, np.full(len(last.output), Origin.POLICY, np.uint8)])
    return np.concatenate([last.prompt, last.output]), origin


def segment_of(record: Episode, observation_weight: float) -> Segment:
    """What is trained on of one conversation."""
    token, origin = transcript(record)
    weight = np.select([origin == Origin.POLICY, origin == Origin.WORLD], [1.0, observation_weight], 0.0)
    return Segment(token.astype(np.int32), weight.astype(np.float32), np.zeros(len(token), np.float32), 0.0)


def exercise_segment(
    chat: Chat, observations: Sequence[str], stated: Sequence[tuple[str, str]], observation_weight: float
) -> Segment:
    """What is trained on of one exercise: the objects, each twice, as in a transcript's thought and answer."""
    pieces: list[tuple[list[int], float]] = []
    for text in observations:
        pieces += [
            (chat.markup("<|im_start|>user\n<tool_response>\n"), 0.0),
            (chat.plain(text), observation_weight),
            (chat.markup("\n</tool_response><|im_end|>\n"), 0.0),
        ]
    pieces.append((chat.markup("<|im_start|>assistant\n"), 0.0))
    for prompt, object_ in stated:
        found = chat.plain(f" {object_}")
        pieces += [(chat.plain(prompt), 0.0), (found, 1.0), (chat.plain("\n<answer>"), 0.0), (found, 1.0)]
        pieces.append((chat.plain("</answer>\n"), 0.0))
    token = np.array([id for ids, _ in pieces for id in ids], np.int32)
    weight = np.array([weight for ids, weight in pieces for _ in ids], np.float32)
    return Segment(token, weight, np.zeros(len(token), np.float32), 0.0)


def pretrain(params: weights.Params, segments: Sequence[Segment], round_: Round, rng: random.Random) -> weights.Params:
    """`params` after the steps of one round: next-token prediction on `segments`, in an order drawn from `rng`."""
    devices = math.gcd(jax.device_count(), BATCH_ROWS)
    mesh, rules = letters.make_mesh({"data": devices, "fsdp": 1, "tensor": 1}), letters.DEFAULT_RULES
    source, state = batches(segments, rng), None
    done, started_s = 0, time.monotonic()
    for share, of_peak in SCHEDULE:
        optim = OptimConfig(learning_rate=of_peak * round_.peak_rate, warmup_steps=50, beta2=0.98, weight_decay=0.01)
        state = state or init_state(params, CONFIG, optim, mesh, rules)
        step = make_train_step(CONFIG, GrpoConfig(), mesh, rules, optim=optim, micro_rows=BATCH_ROWS, loss="sft")
        for _ in range(round(share * round_.steps)):
            state, metrics = step(state, None, put_batch(next(source), mesh, rules))
            done += 1
            if done % 25 == 0:
                print(
                    f"step {done}  loss {float(metrics['loss']):.4f}  {time.monotonic() - started_s:.0f} s", flush=True
                )
    return state.params


def batches(segments: Sequence[Segment], rng: random.Random) -> Iterator[PackedBatch]:
    """Endless shuffled batches. The few transcripts that are longer than a row are left out."""
    short = [segment for segment in segments if len(segment.token) <= ROW_TOKENS]
    while True:
        rng.shuffle(short)
        pool: list[Segment] = []
        size = 0
        for segment in short:
            if size + len(segment.token) > FILL * BATCH_ROWS * ROW_TOKENS:
                yield pack(pool, rows=2 * BATCH_ROWS, row_tokens=ROW_TOKENS)
                pool, size = [], 0
            pool.append(segment)
            size += len(segment.token)


def make_tokenizer(texts: Iterable[str]):
    """A byte-level BPE with Qwen2.5's control tokens, trained on `texts`; without texts, one token a byte."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _between_control(text)), trainer)
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False, special=t not in ("<tool_call>", "</tool_call>")) for t in CONTROL_TOKENS]
    )
    return tokenizer


def _between_control(text: str) -> Iterator[str]:
    for token in CONTROL_TOKENS:
        text = text.replace(token, "\0")
    return (piece for piece in text.split("\0") if piece)


def write_base(base: pathlib.Path, tokenizer) -> None:
    """Everything of a Hugging Face directory but weights and card."""
    ids = {token: tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>")}
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": CONFIG.vocab_size,
        "num_hidden_layers": CONFIG.num_layers, "hidden_size": CONFIG.d_model, "intermediate_size": CONFIG.d_ff,
        "num_attention_heads": CONFIG.num_heads, "num_key_value_heads": CONFIG.num_kv_heads,
        "head_dim": CONFIG.head_dim, "hidden_act": "silu", "rope_theta": CONFIG.rope_theta,
        "rms_norm_eps": CONFIG.rms_eps, "tie_word_embeddings": CONFIG.tie_embeddings,
        "max_position_embeddings": CONFIG.max_positions, "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }  # fmt: skip
    generation = {"eos_token_id": list(ids.values())[::-1], "pad_token_id": ids["<|endoftext|>"]}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "model_max_length": CONFIG.max_positions, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    for name, content in (
        ("config", config), ("generation_config", generation), ("tokenizer_config", tokenizer_config),
    ):  # fmt: skip
        (base / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    tokenizer.save(str(base / "tokenizer.json"))
    (base / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def model_card(rounds: Sequence[Round]) -> str:
    return MODEL_CARD.format(
        count=weights.count(CONFIG),
        steps=sum(round_.steps for round_ in rounds),
        episodes=sum(round_.episodes for round_ in rounds),
        exercises=sum(round_.exercises for round_ in rounds),
    )


if __name__ == "__main__":
    app.run(main)
