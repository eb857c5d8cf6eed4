"""Answers one question, showing the research as it happened.

    python -m dr_jax.ask --config=configs/quickstart.py --checkpoint=runs/quickstart/export \\
        --question="What is the film Silent Harbor's director's birthplace?"

`--checkpoint` is a Hugging Face directory; without it the model that the config starts from answers. With `--server`
its weights are not loaded: the endpoint draws (`endpoint/remote.py`), and the checkpoint is there for its tokenizer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import pathlib
import sys
import tempfile
from collections.abc import Sequence

from absl import flags

from dr_jax import assemble, entry
from dr_jax.agent import episode
from dr_jax.records import Episode, Question
from dr_jax.run_config import RunConfig


def transcript(record: Episode) -> str:
    """The episode as a person reads it: what the policy wrote, what the tools answered, the answer."""
    turns = [turn.strip() for turn in record.response.split("<|im_end|>") if turn.strip()]
    observations = [f"[{use.tool}, {use.seconds:.2f} s]\n{use.observation}" for use in record.tool_uses]
    lines = []
    for index, turn in enumerate(turns):
        lines += [turn, *observations[index : index + 1], ""]
    return "\n".join([*lines, f"{record.stop}: {record.answer if record.answer is not None else 'no answer'}"])


def main(argv: Sequence[str] | None = None) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("question", None, "What to find out.", flag_values=values, required=True)
    flags.DEFINE_string("checkpoint", None, "Hugging Face directory that answers.", flag_values=values)
    flags.DEFINE_string("server", None, entry.SERVER_HELP, flag_values=values)
    return entry.run(_ask, values, about=__doc__, argv=argv)


def _ask(run: RunConfig, values: flags.FlagValues) -> None:
    run = assemble.with_checkpoint(run, values.checkpoint)
    # One sequence: no need for the slots and pages of a training run.
    run = dataclasses.replace(run, engine=dataclasses.replace(run.engine, slots=1, pages=0, prefill_rows=1))
    today = datetime.datetime.now(datetime.UTC).date().isoformat()

    async def work(workdir: pathlib.Path) -> Episode:
        async with assemble.answering(run, workdir, values.server) as (host, sampler):
            context = host.context(run, sampler, seed=run.seed, today=today, temperature=0.0)
            return await episode.run(Question("ask", values.question, ()), 0, context)

    with tempfile.TemporaryDirectory() as workdir:
        print(transcript(asyncio.run(work(pathlib.Path(workdir)))))


if __name__ == "__main__":
    sys.exit(main())
