"""Serves a model over OpenAI's HTTP API: chats with tools, completions, streams, log-probabilities, token ids.

    python -m dr_jax.serve --checkpoint=runs/quickstart/export --port=8000

`--checkpoint` is a Hugging Face directory, or 'world' for the tiny model that comes with dr_jax. Whoever is on this
machine can ask; where the environment variable DR_JAX_API_KEY holds a key, whoever has it. SIGTERM lets answers that
are under way finish.
"""

from __future__ import annotations

import asyncio
import os
import pathlib
import signal
import sys
from collections.abc import Sequence

import jax
from absl import flags

from dr_jax import assemble, entry
from dr_jax.agent.chat import Chat
from dr_jax.agent.template import ChatTemplate
from dr_jax.endpoint import server
from dr_jax.endpoint.server import Served
from dr_jax.engine.service import Engine
from dr_jax.errors import ConfigError, DrJaxError
from dr_jax.model import hf, letters
from dr_jax.model.config import ModelConfig
from dr_jax.records import Finish, Sampling


def main(argv: Sequence[str] | None = None) -> int:
    values = flags.FlagValues()

    def define(kind: str, name: str, default: object, about: str) -> None:
        getattr(flags, f"DEFINE_{kind}")(name, default, about, flag_values=values)

    define("string", "checkpoint", None, "Hugging Face directory, or 'world'.")
    define("string", "name", "", "The model's name in requests; the directory's where it is left out.")
    define("string", "host", "127.0.0.1", "Address to listen on; any but this machine's own needs DR_JAX_API_KEY.")
    define("integer", "port", 8000, "Port to listen on; 0 takes any free one.")
    define("integer", "slots", 16, "Sequences drawn at once.")
    define("integer", "context", 8192, "Tokens of a prompt and its answer; the model's own limit where that is less.")
    define("integer", "tensor", 1, "Devices that the model is spread over.")
    define("string", "dtype", "", "float32 | bfloat16; bfloat16 on accelerators and float32 on CPUs if left out.")
    define("integer", "max_sequences", server.Limits.sequences, "Drawn or waiting at once; more get status 429.")
    return entry.run_without_config(_serve, values, about=__doc__, argv=argv)


def _serve(values: flags.FlagValues) -> None:
    if not values.checkpoint:
        raise ConfigError("--checkpoint is required, for example --checkpoint=world")
    if values.dtype not in ("", "float32", "bfloat16"):
        raise ConfigError(f"--dtype: got {values.dtype!r}; allowed: float32, bfloat16")
    if values.max_sequences < 1:
        raise ConfigError(f"--max_sequences: got {values.max_sequences}, must be at least 1")
    key = os.environ.get(assemble.SERVER_KEY_VARIABLE, "")
    server.check_host(values.host, key)  # before minutes go into loading
    asyncio.run(_until_stopped(values, key))


def load(
    checkpoint: str, *, name: str = "", slots: int = 16, context: int = 8192, tensor: int = 1, dtype: str = ""
) -> tuple[Engine, Served]:
    """A model for the endpoint, and its engine on the first `tensor` devices, to be closed by the caller.

    `context` is cut to what the model goes up to.
    """
    path = assemble.hf_directory(checkpoint, "--checkpoint")
    config = ModelConfig.from_hf(path)
    chat = Chat.load(path)
    template = ChatTemplate.load(path, chat)
    mesh = letters.make_mesh({"data": 1, "fsdp": 1, "tensor": tensor})
    letters.check_mesh(config, mesh.shape, letters.DEFAULT_RULES)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    context = min(context, config.max_positions)
    engine = Engine(
        config,
        hf.load(path, config, mesh=mesh, dtype=dtype),
        mesh=mesh,
        rules=letters.DEFAULT_RULES,
        slots=slots,
        context=context,
        decode_text=chat.decode,
    )
    return engine, Served(name or pathlib.Path(checkpoint).resolve().name, engine, template, context)


async def _until_stopped(values: flags.FlagValues, key: str) -> None:
    stop = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    engine, model = load(
        values.checkpoint,
        name=values.name,
        slots=values.slots,
        context=values.context,
        tensor=values.tensor,
        dtype=values.dtype,
    )
    limits = server.Limits(sequences=values.max_sequences)
    async with engine, server.serve(model, host=values.host, port=values.port, api_key=key, limits=limits) as url:
        # Until it has compiled its programs the engine answers nobody, and requests wait.
        ready = await engine.generate([0], Sampling(max_new_tokens=1))
        if ready.finish is Finish.ERROR:
            raise DrJaxError(ready.detail)
        print(f"{model.name}: {url}", flush=True)
        await stop.wait()
        print("stopping: answers under way may finish", flush=True)


if __name__ == "__main__":
    sys.exit(main())
